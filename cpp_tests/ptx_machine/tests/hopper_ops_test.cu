// Instructions of sm_90a against plain C++: phases and tokens of mbarriers, bulk copies and
// reductions, stmatrix, and blocks that wait for each other.
#include <cuda_bf16.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "expect.h"
#include "hopper.cuh"

namespace {

using ptx::Error;
using ptx_test::Array;
using ptx_test::expect;

const ptx_test::Expected kClean = {};

struct alignas(1024) Tiles {
  float x[1024];
  uint64_t barrier[4];
};

__device__ uint64_t arrive_count(uint64_t& b, uint32_t count) {
  uint64_t token;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1], %2;"
               : "=l"(token)
               : "r"(hopper::address_of(&b)), "r"(count)
               : "memory");
  return token;
}
__device__ uint64_t arrive_no_complete(uint64_t& b, uint32_t count) {
  uint64_t token;
  asm volatile("mbarrier.arrive.noComplete.shared::cta.b64 %0, [%1], %2;"
               : "=l"(token)
               : "r"(hopper::address_of(&b)), "r"(count)
               : "memory");
  return token;
}
__device__ int test(uint64_t& b, uint64_t token) {
  int done;
  asm volatile(
      "{\n\t.reg .pred p;\n\tmbarrier.test_wait.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.s32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(hopper::address_of(&b)), "l"(token)
      : "memory");
  return done;
}
__device__ int test_parity(uint64_t& b, uint32_t parity) {
  int done;
  asm volatile(
      "{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.s32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(hopper::address_of(&b)), "r"(parity)
      : "memory");
  return done;
}
__device__ int try_once(uint64_t& b, uint32_t parity) {
  int done;
  asm volatile(
      "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.s32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(hopper::address_of(&b)), "r"(parity)
      : "memory");
  return done;
}
__device__ void expect_tx(uint64_t& b, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(hopper::address_of(&b)),
      "r"(bytes)
      : "memory");
}
__device__ void complete_tx(uint64_t& b, uint32_t bytes) {
  asm volatile(
      "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(hopper::address_of(&b)),
      "r"(bytes)
      : "memory");
}

__global__ void phases(int* out) {  // one thread, so that every answer is known
  __shared__ uint64_t b;
  hopper::init(b, 4);
  int i = 0;
  out[i++] = test_parity(b, 0);  // phase 0 runs
  out[i++] = test_parity(b, 1);  // the phase before it counts as complete
  const uint64_t first = arrive_no_complete(b, 1);
  const uint64_t same = arrive_count(b, 2);
  out[i++] = test(b, first);
  out[i++] = first == same;
  arrive_count(b, 1);
  out[i++] = test(b, first);
  out[i++] = test_parity(b, 0);
  out[i++] = test_parity(b, 1);
  const uint64_t second = arrive_count(b, 3);
  out[i++] = second != first;
  expect_tx(b, 100);
  arrive_count(b, 1);
  out[i++] = test(b, second);  // bytes are missing
  complete_tx(b, 60);
  out[i++] = test(b, second);
  complete_tx(b, 40);
  out[i++] = test(b, second);
  out[i++] = try_once(b, 0);  // gives up
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(hopper::address_of(&b)) : "memory");
  b = 5;
  out[i++] = static_cast<int>(b);
}

__global__ void copy(const float* in, float* out, float* sums, float* bf16_sums) {
  __shared__ Tiles s;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    hopper::init(s.barrier[0], 1);
    hopper::fence_init();
    hopper::arrive_expect(s.barrier[0], 1024);
    hopper::load(s.x, in, 1024, s.barrier[0]);
  }
  __syncthreads();
  hopper::wait(s.barrier[0], 0);
  if (t == 0) {
    hopper::store(out, s.x, 1024);
    hopper::add(sums, s.x, 1024);
    hopper::commit();
    hopper::add(sums, s.x, 512);
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], 512;" ::"l"(
            bf16_sums),
        "r"(hopper::address_of(s.x))
        : "memory");
    hopper::commit();
    hopper::wait_stores<0>();
  }
}

template <bool kTranspose>
__global__ void store_matrix(const uint32_t* in, uint16_t* out) {
  __shared__ __align__(128) uint16_t s[4 * 64];
  const int l = static_cast<int>(threadIdx.x);
  if constexpr (kTranspose)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                     hopper::address_of(s + 8 * l)),
                 "r"(in[l]), "r"(in[32 + l]), "r"(in[64 + l]), "r"(in[96 + l])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                     hopper::address_of(s + 8 * l)),
                 "r"(in[l]), "r"(in[32 + l]), "r"(in[64 + l]), "r"(in[96 + l])
                 : "memory");
  __syncwarp();
  for (int i = l; i < 256; i += 32) out[i] = s[i];
}

__global__ void add_vectors(float* out) {
  const float x = static_cast<float>(threadIdx.x);
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(out + 4 * (threadIdx.x % 2)),
               "f"(x), "f"(x + 1), "f"(x + 2), "f"(x + 3)
               : "memory");
  asm volatile("red.global.add.v2.f32 [%0], {%1,%2};" ::"l"(out + 8), "f"(x), "f"(2 * x)
               : "memory");
}

__device__ int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ int load_relaxed(const int* p) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ void add_release(int* p, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ void add_relaxed(int* p, int x) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// Blocks append to a log in the order of their numbers, by plain writes.
enum class Turns { kRight, kFences, kNoRelease, kNoAcquire, kMissing };
template <Turns kFault>
__global__ void turns(int* turn, int* log) {
  const int mine = static_cast<int>(blockIdx.x);
  if (threadIdx.x != 0) return;
  constexpr bool kWeak = kFault == Turns::kFences;
  while ((kWeak || kFault == Turns::kNoAcquire ? load_relaxed(turn) : load_acquire(turn)) != mine) {
  }
  if (kWeak) __threadfence();
  log[0] = log[0] * 3 + mine;
  log[1 + mine] = log[0];
  if (kWeak) __threadfence();
  if (kFault == Turns::kMissing && mine == 1) return;
  if (kWeak || kFault == Turns::kNoRelease)
    add_relaxed(turn, 1);
  else
    add_release(turn, 1);
}

// The same by whole blocks: what one thread acquires and releases, barriers pass on.
template <bool kBarriers>
__global__ void block_turns(int* turn, int* log) {
  const int mine = static_cast<int>(blockIdx.x);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    while (load_acquire(turn) != mine) {
    }
  }
  __syncthreads();
  const int before = log[63 - t];
  __syncthreads();
  log[t] = before * 2 + mine;
  if (kBarriers) __syncthreads();
  if (t == 0) add_release(turn, 1);
}

// Each block adds its tile to a sum by bulk reductions, in order.
template <bool kWaits>
__global__ void ordered_adds(int* turn, float* sum, const float* values) {
  __shared__ Tiles s;
  const int mine = static_cast<int>(blockIdx.x);
  const int t = static_cast<int>(threadIdx.x);
  s.x[t] = values[32 * mine + t];
  hopper::fence_proxy();
  __syncwarp();
  if (t != 0) return;
  while (load_acquire(turn) != mine) {
  }
  hopper::fence_proxy_global();
  hopper::add(sum, s.x, 128);
  hopper::commit();
  if (kWaits)
    hopper::wait_stores<0>();
  else
    hopper::wait_reads<0>();
  hopper::fence_proxy_global();
  add_release(turn, 1);
}

__global__ void tiles(int* counter, int* owner, int count) {
  __shared__ int tile;
  for (;;) {
    if (threadIdx.x == 0) tile = atomicAdd(counter, 1);
    __syncthreads();
    if (tile >= count) return;
    if (threadIdx.x == 0) owner[tile] = static_cast<int>(blockIdx.x);
    __syncthreads();
  }
}

}  // namespace

TEST("phases, tokens and bytes of an mbarrier") {
  const Array<int> out(13);
  expect(kClean, [&] { phases<<<1, 1>>>(out.get()); });
  const std::vector<int> expected = {0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 5};
  for (size_t i = 0; i < expected.size(); ++i)
    CHECK_MESSAGE(out[i] == expected[i], "answer " + std::to_string(i));
}
TEST("bulk copies and reductions of ranges") {
  std::vector<float> host(256);
  std::iota(host.begin(), host.end(), 1.0f);
  const Array<float> in(host);
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const Array<float> out(256), sums(std::vector<float>(256, 0.5f)), packed(128);
    ptx_test::fresh_machine(seed, ptx::kSm90);
    copy<<<1, 64>>>(in.get(), out.get(), sums.get(), packed.get());
    ptx_test::check_clean();
    CHECK(out.host() == host);
    for (size_t i = 0; i < 256; ++i) CHECK_EQ(sums[i], 0.5f + host[i] * (i < 128 ? 2.0f : 1.0f));
    // The upper halves are bf16 numbers, added to zero.
    const auto upper = [](float x) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      return bits >> 16;
    };
    for (size_t i = 0; i < 128; ++i) CHECK_EQ(upper(packed[i]), upper(host[i]));
    CHECK_EQ(ptx::machine().counters().bulk_load_bytes, 1024u);
    CHECK_EQ(ptx::machine().counters().bulk_store_bytes, 3072u);
  }
}
TEST("counters of asynchronous kernels do not depend on the schedule") {
  const Array<float> in(256), out(256), sums(256), packed(128);
  uint64_t lanes = 0, waits = 0;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    ptx::Machine& machine = ptx_test::fresh_machine(seed, ptx::kSm90);
    copy<<<1, 64>>>(in.get(), out.get(), sums.get(), packed.get());
    if (seed == 1) lanes = machine.counters().lane_instructions;
    if (seed == 1) waits = machine.counters().mbarrier_waits;
    CHECK_EQ(machine.counters().lane_instructions, lanes);
    CHECK_EQ(machine.counters().mbarrier_waits, waits);
  }
  CHECK_EQ(waits, 2u);
}
TEST("stmatrix") {
  std::vector<uint32_t> host(128);
  for (uint32_t i = 0; i < 128; ++i) host[i] = 2 * i | (2 * i + 1) << 16;
  const Array<uint32_t> in(host);
  const Array<uint16_t> out(256);
  ptx_test::fresh_machine(1, ptx::kSm90);
  store_matrix<false><<<1, 32>>>(in.get(), out.get());
  ptx_test::check_clean();
  for (size_t i = 0; i < 256; ++i) CHECK_EQ(out[i], i);
  store_matrix<true><<<1, 32>>>(in.get(), out.get());
  ptx_test::check_clean();
  for (size_t i = 0; i < 256; ++i) CHECK_EQ(out[i], i / 64 * 64 + i % 8 * 8 + i % 64 / 8);
}
TEST("reductions of vectors") {
  const Array<float> out(10);
  ptx_test::fresh_machine(1, ptx::kSm90);
  add_vectors<<<2, 32>>>(out.get());
  ptx_test::check_clean();
  for (size_t i = 0; i < 8; ++i)
    CHECK_EQ(out[i], 2.0f * (i < 4 ? 240.0f + 16.0f * static_cast<float>(i)
                                   : 256.0f + 16.0f * static_cast<float>(i - 4)));
  CHECK_EQ(out[8], 992.0f);
  CHECK_EQ(out[9], 1984.0f);
}
TEST("blocks take turns") {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    for (const bool fences : {false, true}) {
      const Array<int> turn(1), log(7);
      ptx_test::fresh_machine(seed, ptx::kSm90).set_resident_blocks(6);
      if (fences)
        turns<Turns::kFences><<<6, 32>>>(turn.get(), log.get());
      else
        turns<Turns::kRight><<<6, 32>>>(turn.get(), log.get());
      ptx::machine().set_resident_blocks(1);
      ptx_test::check_clean();
      CHECK(log.host() == std::vector<int>({179, 0, 1, 5, 18, 58, 179}));
    }
  }
}
TEST("blocks of several threads take turns") {
  ptx_test::Expected race = {{Error::kRace}, "another block"};
  race.resident_blocks = 4;
  for (int round = 0; round < 4; ++round) {
    const Array<int> turn(1), log(64);
    ptx_test::fresh_machine(static_cast<uint64_t>(round), ptx::kSm90).set_resident_blocks(4);
    block_turns<true><<<4, 64>>>(turn.get(), log.get());
    ptx::machine().set_resident_blocks(1);
    ptx_test::check_clean();
    for (size_t i = 0; i < 64; ++i) CHECK_EQ(log[i], 11);  // ((0 * 2 + 1) * 2 + 2) * 2 + 3
  }
  expect(race, [] {
    const Array<int> turn(1), log(64);
    block_turns<false><<<4, 64>>>(turn.get(), log.get());
  });
}
TEST("turns without release, acquire or end are reported") {
  ptx_test::Expected race = {{Error::kRace}, "another block"};
  race.resident_blocks = 6;
  ptx_test::Expected endless = {{Error::kLivelock}, "block ("};
  endless.resident_blocks = 6;
  const auto run = [](auto kernel) {
    return [kernel] {
      const Array<int> turn(1), log(7);
      kernel<<<6, 32>>>(turn.get(), log.get());
    };
  };
  expect(race, run(turns<Turns::kNoRelease>));
  expect(race, run(turns<Turns::kNoAcquire>));
  expect(endless, run(turns<Turns::kMissing>));
}
TEST("ordered bulk reductions are reproducible, and not without their wait") {
  std::vector<float> host(32 * 6);
  const float of_block[] = {1e8f, 1.0f, -1e8f, 3.0f, 1e7f, -0.7f};  // sums depend on the order
  for (size_t i = 0; i < host.size(); ++i) host[i] = of_block[i / 32];
  const Array<float> values(host);
  const auto run = [&](auto kernel, uint64_t seed) {
    const Array<int> turn(1);
    const Array<float> sum(32);
    ptx_test::fresh_machine(seed, ptx::kSm90).set_resident_blocks(6);
    kernel<<<6, 32>>>(turn.get(), sum.get(), values.get());
    ptx::machine().set_resident_blocks(1);
    ptx_test::check_clean();
    return sum.host();
  };
  const std::vector<float> once = run(ordered_adds<true>, 1);
  bool differs = false;
  for (uint64_t seed = 2; seed <= 12; ++seed) {
    CHECK(run(ordered_adds<true>, seed) == once);
    differs |= run(ordered_adds<false>, seed) != once;
  }
  CHECK(differs);
}
TEST("resident blocks share tiles") {
  bool several = false;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const Array<int> counter(1), owner(std::vector<int>(20, -1));
    ptx_test::fresh_machine(seed, ptx::kSm90).set_resident_blocks(3);
    tiles<<<3, 64>>>(counter.get(), owner.get(), 20);
    ptx::machine().set_resident_blocks(1);
    ptx_test::check_clean();
    const std::vector<int> host = owner.host();
    CHECK(std::count(host.begin(), host.end(), -1) == 0);
    several |= std::count(host.begin(), host.end(), host[0]) != 20;
  }
  CHECK(several);
}
