// Hazards of asynchronous operations, one tiny kernel each: it must be reported under every seed,
// and its correct twin must not.
#include "expect.h"
#include "hopper.cuh"

namespace {

using hopper::arrive;
using hopper::arrive_expect;
using hopper::fence_init;
using hopper::fence_proxy;
using ptx::Error;
using ptx_test::Array;
using ptx_test::expect;

const ptx_test::Expected kClean = {};

struct alignas(1024) Tiles {
  float x[1024];
  uint64_t barrier[4];
};

// Two warps: thread 0 loads 1 KB, all threads read it.
enum class Load {
  kRight,
  kHalfWaits,
  kNoWait,
  kNeverRead,
  kWrongParity,
  kFewBytes,
  kManyBytes,
  kNoInitFence,
  kNoBarrier
};
template <Load kFault>
__global__ void load(const float* in, float* out) {
  __shared__ Tiles s;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    hopper::init(s.barrier[0], 1);
    if (kFault != Load::kNoInitFence) fence_init();
  }
  if (kFault != Load::kNoBarrier) __syncthreads();
  if (t == 0) {
    arrive_expect(s.barrier[0], kFault == Load::kFewBytes    ? 512
                                : kFault == Load::kManyBytes ? 1040
                                                             : 1024);
    hopper::load(s.x, in, 512, s.barrier[0]);
    hopper::load(s.x + 128, in + 128, 512, s.barrier[0]);
  }
  if (kFault == Load::kNeverRead) return;
  const bool waits = kFault != Load::kHalfWaits || t < 32;
  // The copy has landed by then, but this warp is not ordered after it.
  for (int i = 0; i < 200 && !waits; ++i) __nanosleep(10);
  if (kFault != Load::kNoWait && kFault != Load::kManyBytes && waits)
    hopper::wait(s.barrier[0], kFault == Load::kWrongParity ? 1 : 0);
  for (int i = 0; i < 4 && kFault != Load::kManyBytes; ++i) out[64 * i + t] = s.x[64 * i + t];
}

// A ring of one stage, three loads: the reader releases it.
enum class Ring { kRight, kNoRelease, kEarlyRelease, kTwice, kSkipsEmpty };
template <Ring kFault>
__global__ void ring(const float* in, float* out) {
  __shared__ Tiles s;
  const int t = static_cast<int>(threadIdx.x);
  uint64_t &full = s.barrier[0], &empty = s.barrier[1];
  if (t == 0) {
    hopper::init(full, 1);
    hopper::init(empty, 1);
    fence_init();
  }
  __syncthreads();
  if (t >= 32) {
    if (t != 32) return;
    for (int i = 0; i < 3; ++i) {
      if (kFault != Ring::kSkipsEmpty) hopper::wait(empty, (i & 1) ^ 1);
      arrive_expect(full, 128);
      hopper::load(s.x, in + 32 * i, 128, full);
    }
    return;
  }
  for (int i = 0; i < 3; ++i) {
    hopper::wait(full, i & 1);
    if (kFault == Ring::kEarlyRelease && t == 0) arrive(empty);
    __syncwarp();
    out[32 * i + t] = s.x[t];
    __syncwarp();
    if (kFault != Ring::kNoRelease && kFault != Ring::kEarlyRelease && t == 0) arrive(empty);
    if (kFault == Ring::kTwice && t == 0) arrive(empty);
  }
}

// A warp writes a tile, thread 0 stores it, then the tile is written again.
enum class Store {
  kRight,
  kFenceOfReader,
  kNoFence,
  kNoSync,
  kNoReadWait,
  kNoWaitAtEnd,
  kUnwritten
};
template <Store kFault>
__global__ void store(float* out, bool adds) {
  __shared__ Tiles s;
  const int t = static_cast<int>(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    if (kFault != Store::kUnwritten || t != 5) s.x[t] = static_cast<float>(t + round);
    if (kFault != Store::kNoFence && kFault != Store::kFenceOfReader) fence_proxy();
    if (kFault != Store::kNoSync) __syncthreads();
    if (t == 0) {
      if (kFault == Store::kFenceOfReader) fence_proxy();
      if (adds)
        hopper::add(out, s.x, 256);
      else
        hopper::store(out + 64 * round, s.x, 256);
      hopper::commit();
      if (kFault != Store::kNoReadWait && (kFault != Store::kNoWaitAtEnd || round == 0))
        hopper::wait_reads<0>();
    }
    __syncthreads();
  }
  if (kFault == Store::kNoReadWait && t == 0) hopper::wait_reads<0>();
}

// One warpgroup multiplies what it wrote itself: a[64][32], b[8][32] halves, 64-byte rows.
enum class Product {
  kRight,
  kRegisters,
  kNoProxyFence,
  kNoFence,
  kLateWrite,
  kTouched,
  kNoWait,
  kChangedA,
  kOverwritten,
  kStrayDescriptor
};
template <Product kFault>
__global__ void __launch_bounds__(128) product(const uint32_t* in, float* out, float zero) {
  __shared__ Tiles s;
  __shared__ Tiles b;
  const int t = static_cast<int>(threadIdx.x);
  uint32_t* words = reinterpret_cast<uint32_t*>(s.x);
  for (int i = t; i < 1024; i += 128) words[i] = in[i];
  uint32_t* more = reinterpret_cast<uint32_t*>(b.x);
  more[t] = in[t];
  if (kFault != Product::kNoProxyFence) fence_proxy();
  __syncthreads();
  float d[4] = {zero, zero, zero, zero};
  uint32_t a[4] = {in[t], in[t + 1], in[t + 2], in[t + 3]};
  if (kFault != Product::kNoFence) hopper::wgmma_fence();
  if (kFault == Product::kLateWrite) d[1] = in[5] > 7 ? 1.0f : 2.0f;
  constexpr bool kRegisters = kFault == Product::kRegisters || kFault == Product::kChangedA;
  uint64_t where = hopper::descriptor(s.x);
  if (kFault == Product::kStrayDescriptor) where |= uint64_t{1} << 60;
  if constexpr (kRegisters)
    hopper::wgmma(d, a, hopper::descriptor(b.x));
  else
    hopper::wgmma(d, where, hopper::descriptor(b.x));
  hopper::wgmma_commit();
  if (kFault == Product::kTouched) asm volatile("add.f32 %0, %0, 0f3F800000;" : "+f"(d[2]));
  if (kFault == Product::kChangedA) asm volatile("add.u32 %0, %0, 1;" : "+r"(a[1]));
  if (kFault == Product::kOverwritten) more[t] = 0;
  if (kFault != Product::kNoWait) hopper::wgmma_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = d[i];
  for (int i = 0; i < 4; ++i) out[4 * t + i] += static_cast<float>(a[i]);
}

// A producer loads b for two products; the stage must not be released before the wait for them.
template <bool kEarly>
__global__ void __launch_bounds__(160) stage(const uint32_t* in, float* out) {
  __shared__ Tiles s;
  __shared__ Tiles b;
  const int t = static_cast<int>(threadIdx.x);
  uint64_t &full = s.barrier[0], &empty = s.barrier[1];
  uint32_t* words = reinterpret_cast<uint32_t*>(s.x);
  for (int i = t; i < 1024; i += 160) words[i] = in[i];
  if (t == 0) {
    hopper::init(full, 1);
    hopper::init(empty, 1);
    fence_init();
  }
  fence_proxy();
  __syncthreads();
  if (t >= 128) {
    if (t != 128) return;
    for (int i = 0; i < 2; ++i) {
      hopper::wait(empty, (i & 1) ^ 1);
      arrive_expect(full, 512);
      hopper::load(b.x, in + 128 * i, 512, full);
    }
    return;
  }
  float d[4] = {0, 0, 0, 0};
  for (int i = 0; i < 2; ++i) {
    hopper::wait(full, i & 1);
    hopper::wgmma_fence();
    hopper::wgmma(d, hopper::descriptor(s.x), hopper::descriptor(b.x));
    hopper::wgmma_commit();
    if (kEarly && t == 0) arrive(empty);
    hopper::wgmma_wait<0>();
    if (!kEarly && t == 0) arrive(empty);
  }
  for (int i = 0; i < 4; ++i) out[4 * t + i] = d[i];
}

enum class Use { kRight, kOverwritten, kRead, kUnordered, kReinit, kNever, kMisaligned };
template <Use kFault>
__global__ void use_barrier(int* out) {
  __shared__ uint64_t b[2];
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0 && kFault != Use::kNever) hopper::init(b[0], 64);
  if (kFault != Use::kUnordered) __syncthreads();
  if (kFault == Use::kOverwritten && t == 0) b[0] = 0;
  if (kFault == Use::kReinit && t == 0) hopper::init(b[0], 64);
  if (kFault == Use::kRead) out[t] = static_cast<int>(b[0]);
  uint64_t& at = kFault == Use::kMisaligned
                     ? *reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(b) + 4)
                     : b[0];
  arrive(at);
  hopper::wait(at, 0);
  out[t] = t;
}

template <int kGiven, int kTaken>
__global__ void __launch_bounds__(384, 1) registers(int* out) {
  if (threadIdx.x < 128)
    hopper::give_registers<kGiven>();
  else
    hopper::take_registers<kTaken>();
  out[threadIdx.x] = 1;
}

template <bool kFence>
__global__ void global_proxy(float* buffer, float* out) {
  __shared__ Tiles s;
  const int t = static_cast<int>(threadIdx.x);
  buffer[t] = static_cast<float>(t);
  if (kFence) hopper::fence_proxy_global();
  if (t == 0) {
    hopper::init(s.barrier[0], 1);
    fence_init();
  }
  __syncwarp();
  if (t == 0) {
    arrive_expect(s.barrier[0], 128);
    hopper::load(s.x, buffer, 128, s.barrier[0]);
  }
  hopper::wait(s.barrier[0], 0);
  out[t] = s.x[t];
}

template <bool kWaits>
__global__ void read_back(float* buffer, float* out) {
  __shared__ Tiles s;
  const int t = static_cast<int>(threadIdx.x);
  s.x[t] = static_cast<float>(t);
  fence_proxy();
  __syncwarp();
  if (t == 0) {
    hopper::store(buffer, s.x, 128);
    hopper::commit();
    if (kWaits)
      hopper::wait_stores<0>();
    else
      hopper::wait_reads<0>();
    out[0] = buffer[3];
  }
}

__global__ void deadlock(int* out, int arrivals) {
  __shared__ uint64_t b;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) hopper::init(b, static_cast<uint32_t>(arrivals));
  __syncthreads();
  if (t < 32) arrive(b);
  hopper::wait(b, 0);
  out[t] = 1;
}

__global__ void fake_map(const __grid_constant__ CUtensorMap map, float* out) {
  __shared__ Tiles s;
  if (threadIdx.x == 0) {
    hopper::init(s.barrier[0], 1);
    fence_init();
    arrive_expect(s.barrier[0], 128);
    hopper::load_box(s.x, map, 0, 0, s.barrier[0]);
  }
  __syncwarp();
  hopper::wait(s.barrier[0], 0);
  out[threadIdx.x] = s.x[threadIdx.x];
}

}  // namespace

TEST("bulk loads without their wait, parity, bytes or fence are reported") {
  const Array<float> in(256), out(256);
  // Before the load is issued the words are unwritten, after it they are in flight.
  const std::vector<Error> early = {Error::kInFlight, Error::kUninitialised, Error::kRace};
  expect(kClean, [&] { load<Load::kRight><<<1, 64>>>(in.get(), out.get()); });
  expect({early}, [&] { load<Load::kNoWait><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kInFlight}, "nobody has waited"},
         [&] { load<Load::kNeverRead><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kRace}, "not ordered"},
         [&] { load<Load::kHalfWaits><<<1, 64>>>(in.get(), out.get()); });
  expect({early}, [&] { load<Load::kWrongParity><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kInFlight, Error::kUninitialised, Error::kBarrier}},
         [&] { load<Load::kFewBytes><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kBarrier}, "more than arrived"},
         [&] { load<Load::kManyBytes><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kProxy}, "fence.mbarrier_init"},
         [&] { load<Load::kNoInitFence><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kBarrier}, "mbarrier"},
         [&] { load<Load::kNoBarrier><<<1, 64>>>(in.get(), out.get()); });
}
TEST("rings whose stages are released wrongly are reported") {
  const Array<float> in(96), out(96);
  expect(kClean, [&] { ring<Ring::kRight><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kDeadlock}, "wait at the mbarrier"},
         [&] { ring<Ring::kNoRelease><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kInFlight, Error::kRace}},
         [&] { ring<Ring::kEarlyRelease><<<1, 64>>>(in.get(), out.get()); });
  expect({{Error::kBarrier}, "misses only"},
         [&] { ring<Ring::kSkipsEmpty><<<1, 64>>>(in.get(), out.get()); });
  // Two arrivals end two phases: the ring runs ahead of its reader.
  expect({{Error::kInFlight, Error::kRace, Error::kBarrier, Error::kDeadlock}},
         [&] { ring<Ring::kTwice><<<1, 64>>>(in.get(), out.get()); });
}
TEST("bulk stores without their fence, barrier or wait are reported") {
  const Array<float> out(128);
  for (const bool adds : {false, true}) {
    expect(kClean, [&] { store<Store::kRight><<<1, 64>>>(out.get(), adds); });
    expect(kClean, [&] { store<Store::kFenceOfReader><<<1, 64>>>(out.get(), adds); });
    expect({{Error::kProxy, Error::kRace}, "thread"},
           [&] { store<Store::kNoFence><<<1, 64>>>(out.get(), adds); });
    expect({{Error::kRace, Error::kUninitialised}},
           [&] { store<Store::kNoSync><<<1, 64>>>(out.get(), adds); });
    expect({{Error::kInFlight}, "may still read"},
           [&] { store<Store::kNoReadWait><<<1, 64>>>(out.get(), adds); });
    expect({{Error::kInFlight}, "no wait_group"},
           [&] { store<Store::kNoWaitAtEnd><<<1, 64>>>(out.get(), adds); });
    expect({{Error::kUninitialised}, "bulk copy"},
           [&] { store<Store::kUnwritten><<<1, 64>>>(out.get(), adds); });
  }
}
TEST("a missing proxy fence is reported as such") {
  const Array<float> out(128);
  expect({{Error::kProxy}, "no fence.proxy.async"},
         [&] { store<Store::kNoFence><<<1, 64>>>(out.get(), false); });
  const Array<float> buffer(32);
  expect(kClean, [&] { global_proxy<true><<<1, 32>>>(buffer.get(), out.get()); });
  expect({{Error::kProxy}, "global memory"},
         [&] { global_proxy<false><<<1, 32>>>(buffer.get(), out.get()); });
}
TEST("reading what a bulk store may still write is reported") {
  const Array<float> buffer(32), out(32);
  expect(kClean, [&] { read_back<true><<<1, 32>>>(buffer.get(), out.get()); });
  expect({{Error::kInFlight}, "in flight"},
         [&] { read_back<false><<<1, 32>>>(buffer.get(), out.get()); });
}
TEST("wgmma without its fences and waits is reported") {
  std::vector<uint32_t> words(1024);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(i % 7);
  const Array<uint32_t> in(words);
  const Array<float> out(512);
  const auto run = [&](auto kernel) {
    return [&, kernel] { kernel<<<1, 128>>>(in.get(), out.get(), 0.0f); };
  };
  expect(kClean, run(product<Product::kRight>));
  expect(kClean, run(product<Product::kRegisters>));
  expect({{Error::kProxy}, "read by wgmma"}, run(product<Product::kNoProxyFence>));
  expect({{Error::kWgmma}, "no wgmma.fence"}, run(product<Product::kNoFence>));
  expect({{Error::kWgmma}, "written after the last wgmma.fence"},
         run(product<Product::kLateWrite>));
  expect({{Error::kWgmma}, "an accumulator"}, run(product<Product::kTouched>));
  expect({{Error::kWgmma}, "has not waited"}, run(product<Product::kNoWait>));
  expect({{Error::kWgmma}, "a register of A"}, run(product<Product::kChangedA>));
  expect({{Error::kInFlight, Error::kRace}}, run(product<Product::kOverwritten>));
  expect({{Error::kWgmma}, "descriptor"}, run(product<Product::kStrayDescriptor>));
}
TEST("a stage released before the wait for wgmma is reported") {
  const Array<uint32_t> in(1024);
  const Array<float> out(512);
  expect(kClean, [&] { stage<false><<<1, 160>>>(in.get(), out.get()); });
  expect({{Error::kInFlight, Error::kRace}, "wgmma"},
         [&] { stage<true><<<1, 160>>>(in.get(), out.get()); });
}
TEST("misuse of mbarriers is reported") {
  const Array<int> out(64);
  expect(kClean, [&] { use_barrier<Use::kRight><<<1, 64>>>(out.get()); });
  expect({{Error::kBarrier}, "part of the mbarrier"},
         [&] { use_barrier<Use::kOverwritten><<<1, 64>>>(out.get()); });
  expect({{Error::kBarrier}, "part of the mbarrier"},
         [&] { use_barrier<Use::kRead><<<1, 64>>>(out.get()); });
  expect({{Error::kBarrier}, "initialis"},
         [&] { use_barrier<Use::kUnordered><<<1, 64>>>(out.get()); });
  expect({{Error::kBarrier}, "while it is one"},
         [&] { use_barrier<Use::kReinit><<<1, 64>>>(out.get()); });
  expect({{Error::kBarrier}, "no initialised mbarrier"},
         [&] { use_barrier<Use::kNever><<<1, 64>>>(out.get()); });
  expect({{Error::kMisaligned}, "multiple of 8"},
         [&] { use_barrier<Use::kMisaligned><<<1, 64>>>(out.get()); });
}
TEST("arrivals that never come are a deadlock") {
  const Array<int> out(64);
  expect(kClean, [&] { deadlock<<<1, 64>>>(out.get(), 32); });
  expect({{Error::kDeadlock}, "1 of 33 arrivals"}, [&] { deadlock<<<1, 64>>>(out.get(), 33); });
  expect({{Error::kBarrier}, "with 0 arrivals"}, [&] { deadlock<<<1, 64>>>(out.get(), 0); });
}
TEST("registers that the pool does not have are a deadlock") {
  // 384 threads start with 168 registers each: 504 for the three warpgroups.
  const Array<int> out(384);
  expect(kClean, [&] { registers<24, 240><<<1, 384>>>(out.get()); });
  expect(kClean, [&] { registers<40, 232><<<1, 384>>>(out.get()); });
  expect({{Error::kDeadlock}, "wait for registers"},
         [&] { registers<32, 240><<<1, 384>>>(out.get()); });
  expect({{Error::kRegisters}, "from 168"}, [&] { registers<176, 240><<<1, 384>>>(out.get()); });
}
TEST("what is no tensor map is reported") {
  const Array<float> out(32);
  const CUtensorMap nothing = {};
  expect({{Error::kTensorMap}, "no tensor map"}, [&] { fake_map<<<1, 32>>>(nothing, out.get()); });
}
