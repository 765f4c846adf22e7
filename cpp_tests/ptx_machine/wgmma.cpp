#include "wgmma.h"

#include <algorithm>
#include <cstring>

#include "access.h"
#include "half.h"
#include "warp.h"

namespace ptx {

namespace {

constexpr uint32_t kPoison = 0x7FA0DEAD;  // a signalling NaN
constexpr uint32_t kDepth = 16;           // k of one instruction

// Bytes of a row of the swizzle's pattern.
uint32_t span_of(Swizzle s) {
  return s == Swizzle::k128 ? 128 : s == Swizzle::k64 ? 64 : s == Swizzle::k32 ? 32 : 16;
}

float widen(uint16_t x, bool bf16) { return bf16 ? bf16_to_float(x) : fp16_to_float(x); }

}  // namespace

bool Descriptor::is_legal(uint64_t bits) {
  // [13:0] address, [29:16] leading, [45:32] stride, [51:49] base, [63:62] swizzle.
  constexpr uint64_t kUsed =
      0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 7ull << 49 | 3ull << 62;
  return (bits & ~kUsed) == 0;
}

Descriptor Descriptor::decode(uint64_t bits, bool mn_major) {
  static constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
  Descriptor d;
  d.start = static_cast<uint32_t>(bits & 0x3FFF) << 4;
  d.leading = static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4;
  d.stride = static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4;
  d.base = static_cast<uint32_t>(bits >> 49 & 7);
  d.swizzle = kModes[bits >> 62];
  d.mn_major = mn_major;
  return d;
}

uint32_t Descriptor::chunk(uint32_t line, uint32_t chunk) const {
  const uint32_t span = span_of(swizzle);
  uint32_t at = start;
  if (!mn_major) {  // 8 rows a core matrix; the stride leads to the next 8 rows
    at += line / 8 * stride + line % 8 * span;
    at += chunk * (swizzle == Swizzle::kNone ? leading : 16);
  } else if (swizzle == Swizzle::kNone) {
    at += line / 8 * leading + line % 8 * 16 + chunk * stride;
  } else {  // a panel is as wide as the span; the leading offset leads to the next panel
    const uint32_t per_panel = span / 16;
    at += line / 8 * stride + line % 8 * span;
    at += chunk / per_panel * leading + chunk % per_panel * 16;
  }
  // The base offset names the row of the pattern at which the matrix begins.
  return swizzled(at - (base << 7), swizzle) + (base << 7);
}

Wgmmas::Wgmmas(Block& block) : block_(block) {}

void Wgmmas::start() {
  groups_.clear();
  groups_.resize(block_.threads / (kGroupWarps * kLanes));
}

void Wgmmas::fence(Warp& warp) {
  const size_t g = static_cast<size_t>(warp.index / kGroupWarps);
  if (g >= groups_.size()) return;
  Lane& lane = groups_[g].lanes[warp.index % kGroupWarps];
  const Kernel& kernel = *block_.kernel;
  lane.fenced = true;
  lane.snapshot.assign(warp.regs + kernel.pinned_begin, warp.regs + kernel.pinned_end);
}

// The register holds what it held at the last wgmma.fence.
void Wgmmas::check_fenced(Lane& lane, Warp& warp, uint32_t pc, int32_t place, const char* what) {
  if (!block_.checks) return;
  if (!lane.fenced)
    block_.fail(Error::kWgmma, warp, pc, 0, "no wgmma.fence stands before the first wgmma");
  const uint32_t at = static_cast<uint32_t>(place) - block_.kernel->pinned_begin;
  const uint32_t* now = warp.at<const uint32_t>(place);
  uint32_t then[kLanes];
  std::memcpy(then, lane.snapshot.data() + at, sizeof then);
  for (int l = 0; l < kLanes; ++l) {
    if (now[l] != then[l])
      block_.fail(Error::kWgmma, warp, pc, l,
                  std::string("a register of ") + what + " was written after the last wgmma.fence");
  }
}

void Wgmmas::multiply(Warp& warp, uint32_t pc, const WgmmaOp& op) {
  const int g = warp.index / kGroupWarps;
  if (static_cast<size_t>(g) >= groups_.size())
    block_.fail(Error::kDivergence, warp, pc, 0,
                "wgmma needs 4 warps; the block has " + std::to_string(block_.warps.size()));
  Warpgroup& wg = groups_[g];
  Lane& mine = wg.lanes[warp.index % kGroupWarps];
  mine.here = true;
  mine.pc = pc;
  mine.op = op;
  for (int w = 0; w < kGroupWarps; ++w) {
    const Lane& lane = wg.lanes[w];
    if (!lane.here) {
      if (block_.warps[g * kGroupWarps + w].live == 0)
        block_.fail(Error::kDivergence, warp, pc, 0,
                    "a warp of this warpgroup has exited before this wgmma");
      warp.block_on(Wait::kWarpgroup, static_cast<uint32_t>(g), pc + 1, kAllLanes);
      return;
    }
    if (lane.pc != pc)
      block_.fail(Error::kDivergence, warp, pc, 0,
                  "the warps of a warpgroup are at different wgmmas; warp " +
                      std::to_string(g * kGroupWarps + w) + " at " + block_.where(lane.pc));
  }
  execute(wg, g * kGroupWarps, pc);
  for (Lane& lane : wg.lanes) lane.here = false;
  block_.wake(Wait::kWarpgroup, static_cast<uint32_t>(g));
}

Wgmmas::Chain& Wgmmas::chain_of(Warpgroup& wg, Warp& warp, uint32_t pc, const WgmmaOp& op) {
  const int32_t* begin = op.accumulators;
  const int32_t* end = begin + op.n / 2;
  Chain* found = nullptr;
  for (const auto& chain : wg.chains) {
    if (chain->n == op.n && std::equal(begin, end, chain->places.begin())) {
      found = chain.get();
      continue;
    }
    const bool busy =
        std::any_of(chain->in_flight.begin(), chain->in_flight.end(), [](bool x) { return x; });
    if (busy && std::find_first_of(begin, end, chain->places.begin(), chain->places.end()) != end)
      block_.fail(
          Error::kWgmma, warp, pc, 0,
          "the accumulators are those of another wgmma in flight, at " + block_.where(chain->pc));
  }
  if (found == nullptr) {
    wg.chains.push_back(std::make_unique<Chain>());
    found = wg.chains.back().get();
    found->places.assign(begin, end);
    found->n = op.n;
    found->values.resize(static_cast<size_t>(64) * op.n);
  }
  return *found;
}

// Takes the accumulators of warp w out of its registers.
void Wgmmas::begin_chain(Warpgroup& wg, Chain& chain, int w, Warp& warp, uint32_t pc) {
  for (int i = 0; i < chain.n / 2; ++i) {
    check_fenced(wg.lanes[w], warp, pc, chain.places[i], "the accumulators");
    float* from = warp.at<float>(chain.places[i]);
    const int row = 16 * w + 8 * (i / 2 % 2);
    const int column = 8 * (i / 4) + i % 2;
    for (int l = 0; l < kLanes; ++l) {
      chain.values[static_cast<size_t>(row + l / 4) * chain.n + column + 2 * (l % 4)] = from[l];
      std::memcpy(from + l, &kPoison, 4);
    }
  }
  chain.in_flight[w] = true;
}

void Wgmmas::execute(Warpgroup& wg, int first_warp, uint32_t pc) {
  const WgmmaOp& op = wg.lanes[0].op;
  const uint32_t group = wg.lanes[0].committed;
  for (int w = 1; w < kGroupWarps; ++w) {
    const Lane& lane = wg.lanes[w];
    Warp& warp = block_.warps[first_warp + w];
    if (lane.committed != group)
      block_.fail(Error::kDivergence, warp, pc, 0,
                  "the warps of a warpgroup have committed different numbers of wgmma groups");
    const bool same = lane.op.accumulate == op.accumulate && lane.op.b.start == op.b.start &&
                      lane.op.b.leading == op.b.leading && lane.op.b.stride == op.b.stride &&
                      lane.op.a.start == op.a.start;
    if (!same)
      block_.fail(Error::kDivergence, warp, pc, 0,
                  "the warps of a warpgroup give one wgmma different operands");
  }
  if (wg.groups.empty() || wg.groups.back().number != group)
    wg.groups.push_back({group, block_.async.add_completion(first_warp * kLanes, pc)});
  const uint32_t completion = wg.groups.back().completion;
  Chain& chain = chain_of(wg, block_.warps[first_warp], pc, op);
  chain.pc = pc;
  for (int w = 0; w < kGroupWarps; ++w) {
    if (!chain.in_flight[w]) begin_chain(wg, chain, w, block_.warps[first_warp + w], pc);
    chain.group[w] = group;
  }
  a_.resize(64 * kDepth);
  b_.resize(static_cast<size_t>(op.n) * kDepth);
  const Issue issue = {&op, first_warp, pc, completion};
  load_a(wg, issue, a_.data());
  load_shared(op.b, static_cast<uint32_t>(op.n), issue, b_.data());
  const float sign = op.scale_a * op.scale_b;
  if (sign < 0) {
    for (float& x : a_) x = -x;
  }
  wgmma_product(a_.data(), b_.data(), chain.values.data(), op.n, op.accumulate);
  ++block_.counters->wgmma;
  block_.counters->wgmma_flops += 2ull * 64 * kDepth * static_cast<uint64_t>(op.n);
}

// a[64][16]
void Wgmmas::load_a(Warpgroup& wg, const Issue& issue, float* a) {
  const WgmmaOp& op = *issue.op;
  if (!op.a_in_registers) {
    std::vector<float> transposed(64 * kDepth);  // [16][64]
    load_shared(op.a, 64, issue, transposed.data());
    for (uint32_t k = 0; k < kDepth; ++k)
      for (uint32_t m = 0; m < 64; ++m) a[m * kDepth + k] = transposed[k * 64 + m];
    return;
  }
  for (int w = 0; w < kGroupWarps; ++w) {
    Warp& warp = block_.warps[issue.first_warp + w];
    Lane& lane = wg.lanes[w];
    HeldA held;
    held.group = lane.committed;
    held.pc = issue.pc;
    for (int i = 0; i < 4; ++i) {
      const int32_t place = op.a_registers[i];
      held.places[i] = place;
      check_fenced(lane, warp, issue.pc, place, "A");
      const uint32_t* from = warp.at<const uint32_t>(place);
      std::memcpy(held.values[i].data(), from, sizeof held.values[i]);
      const int row = 16 * w + 8 * (i % 2);
      const int column = 8 * (i / 2);
      for (int l = 0; l < kLanes; ++l) {
        float* to = a + (row + l / 4) * kDepth + column + 2 * (l % 4);
        to[0] = widen(static_cast<uint16_t>(from[l]), op.bf16);
        to[1] = widen(static_cast<uint16_t>(from[l] >> 16), op.bf16);
      }
    }
    if (block_.checks) lane.held.push_back(held);
  }
}

// to[16][rows]
void Wgmmas::load_shared(const Descriptor& d, uint32_t rows, const Issue& issue, float* to) {
  const int first_warp = issue.first_warp;
  const uint32_t lines = d.mn_major ? kDepth : rows;
  const uint32_t chunks = d.mn_major ? rows / 8 : kDepth / 8;
  SharedShadow::Passed passed;
  int failed = 0;
  for (uint32_t line = 0; line < lines; ++line) {
    for (uint32_t c = 0; c < chunks; ++c) {
      const uint32_t offset = d.chunk(line, c) - static_cast<uint32_t>(kSharedBase);
      Warp& warp = block_.warps[first_warp];
      if (offset + 16 > block_.shared_bytes || offset + 16 < 16)
        block_.fail(Error::kOutOfBounds, warp, issue.pc, 0,
                    "wgmma reads shared offset " + std::to_string(static_cast<int32_t>(offset)) +
                        "; the block has " + std::to_string(block_.shared_bytes) + " bytes");
      if (block_.checks) {
        if (!block_.shadow->async_read_by(block_.clocks, first_warp * kLanes, offset, passed,
                                          failed))
          fail_shadow(block_.warps[first_warp + failed], issue.pc, 0, "read by wgmma");
        block_.shadow->mark_async_read(offset, 16, first_warp / kGroupWarps, issue.completion);
      }
      uint16_t halves[8];
      std::memcpy(halves, block_.shared.data() + offset, 16);
      for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t row = d.mn_major ? 8 * c + i : line;
        const uint32_t k = d.mn_major ? line : 8 * c + i;
        to[k * rows + row] = widen(halves[i], issue.op->bf16);
      }
    }
  }
}

void Wgmmas::commit(Warp& warp) {
  const size_t g = static_cast<size_t>(warp.index / kGroupWarps);
  if (g < groups_.size()) ++groups_[g].lanes[warp.index % kGroupWarps].committed;
}

void Wgmmas::deliver(Warp& warp, Lane& lane, Chain& chain, int w) {
  for (int i = 0; i < chain.n / 2; ++i) {
    float* to = warp.at<float>(chain.places[i]);
    const int row = 16 * w + 8 * (i / 2 % 2);
    const int column = 8 * (i / 4) + i % 2;
    for (int l = 0; l < kLanes; ++l) {
      uint32_t bits;
      std::memcpy(&bits, to + l, 4);
      if (bits != kPoison && block_.checks)
        block_.fail(Error::kWgmma, warp, chain.pc, l,
                    "an accumulator of this wgmma was written before the wait for it");
      to[l] = chain.values[static_cast<size_t>(row + l / 4) * chain.n + column + 2 * (l % 4)];
    }
    // What the wait delivers is no write of the thread.
    const uint32_t at = static_cast<uint32_t>(chain.places[i]) - block_.kernel->pinned_begin;
    if (!lane.snapshot.empty()) std::memcpy(lane.snapshot.data() + at, to, sizeof(float) * kLanes);
  }
  chain.in_flight[w] = false;
}

void Wgmmas::wait(Warp& warp, uint32_t pc, uint32_t allowed) {
  const size_t g = static_cast<size_t>(warp.index / kGroupWarps);
  if (g >= groups_.size()) return;
  Warpgroup& wg = groups_[g];
  const int w = warp.index % kGroupWarps;
  Lane& lane = wg.lanes[w];
  const uint32_t first_pending = lane.committed > allowed ? lane.committed - allowed : 0;
  for (const Group& group : wg.groups) {
    if (group.number >= first_pending) continue;
    for (int l = 0; l < kLanes; ++l)
      block_.async.see(group.completion, block_.clocks, warp.first_thread() + l);
  }
  std::erase_if(lane.held, [&](const HeldA& held) {
    if (held.group >= first_pending) return false;
    for (int i = 0; i < 4; ++i) {
      const uint32_t* now = warp.at<const uint32_t>(held.places[i]);
      for (int l = 0; l < kLanes; ++l) {
        if (now[l] != held.values[i][l])
          block_.fail(
              Error::kWgmma, warp, held.pc, l,
              "a register of A was written before the wait for this wgmma, at " + block_.where(pc));
      }
    }
    return true;
  });
  for (const auto& chain : wg.chains) {
    if (chain->in_flight[w] && chain->group[w] < first_pending) deliver(warp, lane, *chain, w);
  }
  // Groups that all four warps have waited for are not needed any more.
  uint32_t oldest = lane.committed;
  for (const Lane& other : wg.lanes) oldest = std::min(oldest, other.committed);
  while (wg.groups.size() > 8 && wg.groups.front().number + 8 < oldest) wg.groups.pop_front();
}

int Wgmmas::unfinished(int& thread) const {
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (const auto& chain : groups_[g].chains) {
      for (int w = 0; w < kGroupWarps; ++w) {
        if (!chain->in_flight[w]) continue;
        thread = static_cast<int>(g * kGroupWarps + w) * kLanes;
        return static_cast<int>(chain->pc);
      }
    }
  }
  return -1;
}

}  // namespace ptx
