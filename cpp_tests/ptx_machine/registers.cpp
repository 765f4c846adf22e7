// Liveness on basic blocks, then linear scan. Correct under divergence because every write is
// masked by the lanes that execute it: for one lane this is ordinary register allocation.
#include "registers.h"

#include <algorithm>
#include <queue>

namespace ptx {

namespace {

using Bits = std::vector<uint64_t>;

bool test(const Bits& bits, int i) { return (bits[i >> 6] >> (i & 63)) & 1; }
void set(Bits& bits, int i) { bits[i >> 6] |= uint64_t{1} << (i & 63); }

struct BasicBlock {
  int begin = 0;
  int end = 0;
  std::vector<int> next;
  Bits use, def, in, out;
};

std::vector<BasicBlock> basic_blocks(const std::vector<Flow>& code, int registers) {
  const int n = static_cast<int>(code.size());
  std::vector<char> leader(n + 1, 0);
  leader[0] = 1;
  for (int i = 0; i < n; ++i) {
    for (const int t : code[i].targets) leader[t] = 1;
    if (!code[i].targets.empty() || code[i].ends) leader[i + 1] = 1;
  }
  std::vector<BasicBlock> blocks;
  std::vector<int> block_of(n + 1, -1);
  for (int i = 0; i < n; ++i) {
    if (leader[i]) blocks.push_back({i, i, {}, {}, {}, {}, {}});
    block_of[i] = static_cast<int>(blocks.size()) - 1;
    blocks.back().end = i + 1;
  }
  for (BasicBlock& b : blocks) {
    b.use = b.def = b.in = b.out = Bits((registers + 63) / 64);
    for (int i = b.begin; i < b.end; ++i) {
      for (const int r : code[i].uses) {
        if (!test(b.def, r)) set(b.use, r);
      }
      for (const int r : code[i].defs) {
        if (!code[i].guarded)
          set(b.def, r);
        else if (!test(b.def, r))
          set(b.use, r);  // the old value survives where the guard is false
      }
    }
    const Flow& last = code[b.end - 1];
    for (const int t : last.targets) b.next.push_back(block_of[t]);
    if (!last.ends && b.end < n) b.next.push_back(block_of[b.end]);
  }
  return blocks;
}

void solve_liveness(std::vector<BasicBlock>& blocks) {
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = blocks.size(); i-- > 0;) {
      BasicBlock& b = blocks[i];
      for (const int s : b.next) {
        for (size_t w = 0; w < b.out.size(); ++w) b.out[w] |= blocks[s].in[w];
      }
      for (size_t w = 0; w < b.in.size(); ++w) {
        const uint64_t in = b.use[w] | (b.out[w] & ~b.def[w]);
        changed |= in != b.in[w];
        b.in[w] = in;
      }
    }
  }
}

struct Interval {
  int reg = 0;
  int begin = 0;
  int end = -1;
};

std::vector<Interval> intervals(const std::vector<Flow>& code,
                                const std::vector<BasicBlock>& blocks, int registers) {
  std::vector<Interval> all(registers);
  for (int r = 0; r < registers; ++r) all[r] = {r, static_cast<int>(code.size()), -1};
  const auto touch = [&](int r, int at) {
    all[r].begin = std::min(all[r].begin, at);
    all[r].end = std::max(all[r].end, at);
  };
  for (const BasicBlock& b : blocks) {
    for (int r = 0; r < registers; ++r) {
      if (test(b.in, r)) touch(r, b.begin);
      if (test(b.out, r)) touch(r, b.end - 1);
    }
    for (int i = b.begin; i < b.end; ++i) {
      for (const int r : code[i].uses) touch(r, i);
      for (const int r : code[i].defs) touch(r, i);
    }
  }
  std::erase_if(all, [](const Interval& i) { return i.end < 0; });
  std::sort(all.begin(), all.end(), [](const Interval& a, const Interval& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.reg < b.reg;
  });
  return all;
}

}  // namespace

std::vector<int32_t> assign_registers(const std::vector<Flow>& code,
                                      const std::vector<RegisterClass>& registers, uint32_t& layout,
                                      uint32_t& kept_end) {
  const int count = static_cast<int>(registers.size());
  std::vector<BasicBlock> blocks = basic_blocks(code, count);
  solve_liveness(blocks);

  struct Active {
    int end;
    int kind;
    int32_t place;
    bool operator>(const Active& other) const { return end > other.end; }
  };
  constexpr uint32_t kBytes[] = {4, 128, 256};
  std::vector<int32_t> places(count, 0);
  std::vector<char> kept(count, 0);
  for (const Flow& flow : code) {
    for (const int r : flow.kept) {
      if (kept[r]) continue;
      kept[r] = 1;
      places[r] = static_cast<int32_t>(layout);
      layout += 128;
    }
  }
  kept_end = layout;
  std::vector<int32_t> free_places[3];
  std::priority_queue<Active, std::vector<Active>, std::greater<>> active;
  for (const Interval& interval : intervals(code, blocks, count)) {
    if (kept[interval.reg]) continue;
    while (!active.empty() && active.top().end < interval.begin) {
      free_places[active.top().kind].push_back(active.top().place);
      active.pop();
    }
    const RegisterClass width = registers[interval.reg];
    const int kind = width == RegisterClass::kPred ? 0 : width == RegisterClass::k64 ? 2 : 1;
    if (free_places[kind].empty()) {
      // Predicates come in groups of 32 so that vectors stay aligned.
      const int fresh = kind == 0 ? 32 : 1;
      for (int i = fresh; i-- > 0;)
        free_places[kind].push_back(static_cast<int32_t>(layout + i * kBytes[kind]));
      layout += fresh * kBytes[kind];
    }
    places[interval.reg] = free_places[kind].back();
    free_places[kind].pop_back();
    active.push({interval.end, kind, places[interval.reg]});
  }
  return places;
}

}  // namespace ptx
