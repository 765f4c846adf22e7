// wgmma instructions and setmaxnreg: what a warpgroup does together.
#include "ops.h"
#include "wgmma.h"

namespace ptx {

namespace {

uint64_t uniform(Warp& warp, int32_t place, const char* what) {
  const uint64_t* value = warp.at<const uint64_t>(place);
  for (int l = 1; l < kLanes; ++l) {
    if (value[l] != value[0])
      warp.block->fail(Error::kDivergence, warp, warp.pc, l,
                       std::string("the lanes of a warp give different ") + what);
  }
  return value[0];
}

Descriptor descriptor(Warp& warp, int32_t place, bool mn_major) {
  const uint64_t bits = uniform(warp, place, "matrix descriptors");
  if (!Descriptor::is_legal(bits))
    warp.block->fail(Error::kWgmma, warp, warp.pc, 0,
                     "the matrix descriptor has bits outside of its fields");
  return Descriptor::decode(bits, mn_major);
}

bool scale_d(Warp& warp, const int32_t* operand) {
  const uint32_t bits = warp.pred(operand[0]) ^ static_cast<uint32_t>(operand[1]);
  if (bits != 0 && bits != kAllLanes)
    warp.block->fail(Error::kDivergence, warp, warp.pc, 0,
                     "the lanes of a warp give wgmma different predicates");
  return bits != 0;
}

float sign(Warp& warp, int32_t value) {
  if (value != 1 && value != -1)
    warp.block->fail(Error::kWgmma, warp, warp.pc, 0, "a scale of wgmma that is neither 1 nor -1");
  return static_cast<float>(value);
}

// operands: n, n / 2 accumulators, [4 registers of A | descriptor of A], descriptor of B, predicate
// (2), scale of A, scale of B, [transposition of A,] transposition of B
template <bool kBf16, bool kRegisters>
void multiply(Warp& warp, const Inst& inst, uint32_t mask) {
  if (warp.needs_lanes(mask, kAllLanes)) return;
  const int32_t* o = inst.operand;
  WgmmaOp op;
  op.n = o[0];
  op.bf16 = kBf16;
  op.a_in_registers = kRegisters;
  op.accumulators = o + 1;
  const int32_t* a = o + 1 + op.n / 2;
  const int32_t* rest = a + (kRegisters ? 4 : 1);
  const int32_t* last = rest + 5;
  if (kRegisters)
    op.a_registers = a;
  else
    op.a = descriptor(warp, a[0], *last++ != 0);
  op.b = descriptor(warp, rest[0], *last != 0);
  op.accumulate = scale_d(warp, rest + 1);
  op.scale_a = sign(warp, rest[3]);
  op.scale_b = sign(warp, rest[4]);
  warp.block->wgmmas->multiply(warp, warp.pc, op);
}

void fence(Warp& warp, const Inst&, uint32_t mask) {
  if (!warp.needs_lanes(mask, kAllLanes)) warp.block->wgmmas->fence(warp);
}
void commit(Warp& warp, const Inst&, uint32_t mask) {
  if (!warp.needs_lanes(mask, kAllLanes)) warp.block->wgmmas->commit(warp);
}
void wait(Warp& warp, const Inst& inst, uint32_t mask) {
  if (warp.needs_lanes(mask, kAllLanes)) return;
  warp.block->wgmmas->wait(warp, warp.pc, static_cast<uint32_t>(inst.operand[0]));
}

template <bool kIncrease>
void set_registers(Warp& warp, const Inst& inst, uint32_t mask) {
  if (warp.needs_lanes(mask, kAllLanes)) return;
  Block& block = *warp.block;
  const uint32_t wanted = static_cast<uint32_t>(inst.operand[0]);
  const auto fail = [&](const std::string& text) {
    block.fail(Error::kRegisters, warp, warp.pc, 0,
               "setmaxnreg to " + std::to_string(wanted) + text);
  };
  if (block.kernel->launch_registers == 0)
    fail(": the kernel has no .maxntid or .maxnreg, so ptxas ignores it");
  if (wanted % 8 != 0 || wanted < 24 || wanted > 256)
    fail("; allowed: multiples of 8 from 24 to 256");
  if (kIncrease ? wanted < warp.registers : wanted > warp.registers)
    fail(std::string(kIncrease ? ".inc" : ".dec") + " from " + std::to_string(warp.registers) +
         " registers");
  const int64_t more =
      (static_cast<int64_t>(wanted) - static_cast<int64_t>(warp.registers)) * kLanes;
  if (more > block.register_pool) {
    // It looks again, and counts then.
    --block.counters->instructions;
    block.counters->lane_instructions -= kLanes;
    warp.block_on(Wait::kRegisters, wanted, warp.pc, mask);
    return;
  }
  block.register_pool -= more;
  warp.registers = wanted;
  if (more < 0) {
    ++block.progress;
    block.wake(Wait::kRegisters, ~0u);
  }
}

}  // namespace

void add_wgmma_ops(OpTable& t) {
  for (int n = 8; n <= 256; n += 8) {
    const std::string shape = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k16.f32.";
    std::string d(static_cast<size_t>(1 + n / 2), 'w');
    d[0] = '#';
    t.add(shape + "f16.f16", d + "ddqiiii", multiply<false, false>, n);
    t.add(shape + "bf16.bf16", d + "ddqiiii", multiply<true, false>, n);
    t.add(shape + "f16.f16", d + "aaaadqiii", multiply<false, true>, n);
    t.add(shape + "bf16.bf16", d + "aaaadqiii", multiply<true, true>, n);
  }
  t.add("wgmma.fence.sync.aligned", "", fence);
  t.add("wgmma.commit_group.sync.aligned", "", commit);
  t.add("wgmma.wait_group.sync.aligned", "i", wait);
  t.add("setmaxnreg.inc.sync.aligned.u32", "i", set_registers<true>);
  t.add("setmaxnreg.dec.sync.aligned.u32", "i", set_registers<false>);
}

}  // namespace ptx
