// Order between blocks: release and acquire of words of global memory.
#include "grid.h"

namespace ptx {

namespace {

bool is_global(uint64_t address) { return (address & kWindowMask) == 0; }

std::shared_ptr<const Foreign> merged(const std::shared_ptr<const Foreign>& a,
                                      const std::shared_ptr<const Foreign>& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto both = std::make_shared<Foreign>(*a);
  for (const auto& [block, view] : *b) {
    for (int layer = 0; layer < kLayers; ++layer) (*both)[block][layer].merge(view[layer]);
  }
  return both;
}

// All that these lanes did and know, as other blocks see it.
std::shared_ptr<const Foreign> publish(Warp& warp, uint32_t mask) {
  Clocks& clocks = warp.block->clocks;
  Release release;
  clocks.add_release(release, warp.first_thread(), mask);
  auto all =
      release.foreign ? std::make_shared<Foreign>(*release.foreign) : std::make_shared<Foreign>();
  (*all)[clocks.block()] = release.view;
  return all;
}

}  // namespace

void release_words(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order,
                   bool changed) {
  Block& block = *warp.block;
  auto& released = block.grid->released;
  if (!releases(order) && block.fenced.empty() && released.empty()) return;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    if (!is_global(address[l])) continue;
    std::shared_ptr<const Foreign> mine;
    if (releases(order))
      mine = publish(warp, 1u << l);
    else if (!block.fenced.empty())
      mine = block.fenced[warp.first_thread() + l];
    const auto it = released.find(address[l]);
    // A store ends what an earlier one released; an update carries it on.
    const bool keeps = changed && it != released.end();
    if (keeps)
      it->second = merged(it->second, mine);
    else if (mine)
      released[address[l]] = mine;
    else if (it != released.end())
      released.erase(it);
  }
}

void acquire_words(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order) {
  Block& block = *warp.block;
  const auto& released = block.grid->released;
  if (released.empty()) return;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const auto it = is_global(address[l]) ? released.find(address[l]) : released.end();
    if (it == released.end() || !it->second) continue;
    if (acquires(order)) {
      block.clocks.acquire_foreign(*it->second, warp.first_thread(), 1u << l);
      continue;
    }
    if (block.observed.empty()) block.observed.resize(block.threads);
    auto& observed = block.observed[warp.first_thread() + l];
    observed = merged(observed, it->second);
  }
}

void fence_order(Warp& warp, uint32_t mask) {
  Block& block = *warp.block;
  for (uint32_t lanes = mask; lanes != 0 && !block.observed.empty(); lanes &= lanes - 1) {
    const int thread = warp.first_thread() + __builtin_ctz(lanes);
    auto& observed = block.observed[thread];
    if (!observed) continue;
    block.clocks.acquire_foreign(*observed, warp.first_thread(), lanes & -lanes);
    observed = nullptr;
  }
  if (block.fenced.empty()) block.fenced.resize(block.threads);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    block.fenced[warp.first_thread() + l] = publish(warp, 1u << l);
  }
}

void yield_poll(Warp& warp) {
  if (warp.block->grid->blocks.size() > 1) warp.yields = warp.event = true;
}

}  // namespace ptx
