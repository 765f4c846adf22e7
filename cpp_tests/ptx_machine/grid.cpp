#include "grid.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "ops.h"

namespace ptx {

namespace {

// Shadows keep their memory between launches.
SharedShadow& shadow_of(size_t slot) {
  static std::vector<std::unique_ptr<SharedShadow>> all;
  while (all.size() <= slot) all.push_back(std::make_unique<SharedShadow>());
  return *all[slot];
}

struct Index {
  uint32_t at[3];
};

Index index_of(const Machine::Launch& launch, uint64_t id) {
  return {{static_cast<uint32_t>(id % launch.grid[0]),
           static_cast<uint32_t>(id / launch.grid[0] % launch.grid[1]),
           static_cast<uint32_t>(id / launch.grid[0] / launch.grid[1])}};
}

// Runs the blocks of `order`, as many at a time as the grid has places.
void run(Grid& grid, const Machine::Launch& launch, const std::vector<uint64_t>& order,
         Random& random) {
  size_t next = 0;
  size_t alive = 0;
  const auto start = [&](size_t slot) {
    grid.running[slot] = next < order.size();
    if (!grid.running[slot]) return;
    grid.blocks[slot]->start(index_of(launch, order[next]).at, static_cast<uint32_t>(order[next]));
    ++next;
    ++alive;
  };
  for (size_t slot = 0; slot < grid.blocks.size(); ++slot) start(slot);
  while (alive != 0) {
    size_t pick = alive == 1 ? 0 : random.below(static_cast<uint32_t>(alive));
    size_t slot = 0;
    while (!grid.running[slot] || pick-- != 0) ++slot;
    Block& block = *grid.blocks[slot];
    switch (block.step()) {
      case Step::kRan: break;
      case Step::kStuck: block.report_stuck(dump_all(grid, &block)); break;
      case Step::kDone:
        --alive;
        start(slot);
        break;
    }
  }
}

}  // namespace

std::string dump_all(const Grid& grid, const Block* except) {
  std::string text;
  for (size_t i = 0; i < grid.blocks.size(); ++i) {
    const Block& block = *grid.blocks[i];
    if (!grid.running[i] || &block == except) continue;
    text += "\n  block (" + std::to_string(block.index[0]) + ", " + std::to_string(block.index[1]) +
            ", " + std::to_string(block.index[2]) + "):" + block.dump();
  }
  return text;
}

bool Machine::run_grid(const Launch& launch, const Kernel& kernel) {
  Random random{seed_ * 0x9E3779B97F4A7C15ull + launches_++};
  const uint64_t count = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  Grid grid;
  const uint32_t launch_stamp = Clocks::next_stamp();
  const uint64_t residents = std::min<uint64_t>(count, std::max(resident_blocks_, 1));
  for (size_t slot = 0; slot < residents; ++slot) {
    grid.blocks.push_back(std::make_unique<Block>());
    grid.running.push_back(false);
    Block& block = *grid.blocks.back();
    block.machine = this;
    block.kernel = &kernel;
    block.launch = &launch;
    block.random = &random;
    block.counters = &counters_;
    block.grid = &grid;
    block.checks = checks_;
    block.ordered_sums = ordered_sums_;
    block.threads = launch.block[0] * launch.block[1] * launch.block[2];
    block.shared_bytes = kernel.static_shared + static_cast<uint32_t>(launch.dynamic_shared);
    block.launch_stamp = launch_stamp;
    block.shadow = &shadow_of(slot);
    block.params.resize(kernel.param_bytes);
    for (size_t i = 0; i < kernel.params.size(); ++i) {
      std::memcpy(block.params.data() + kernel.params[i].offset, launch.args[i],
                  kernel.params[i].size);
    }
    block.prepare();
    counters_.shared_bytes_max = std::max<uint64_t>(counters_.shared_bytes_max, block.shared_bytes);
  }
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), uint64_t{0});
  for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[random.next() % i]);
  bool good = true;
  try {
    run(grid, launch, order, random);
  } catch (const LaunchAborted&) {
    good = false;
  }
  set_ftz(false);
  return good;
}

}  // namespace ptx
