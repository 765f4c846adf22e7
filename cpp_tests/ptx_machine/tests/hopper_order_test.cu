// Order through global memory: releases and acquires, fences, bulk copies. Each fault must be
// reported under every seed, whatever the values, and its correct twin must not.
#include "expect.h"
#include "hopper.cuh"

namespace {

using hopper::arrive_expect;
using hopper::fence_init;
using hopper::fence_proxy;
using hopper::fence_proxy_global;
using ptx::Error;
using ptx_test::Array;
using ptx_test::expect;

constexpr int kThreads = 64;

ptx_test::Expected clean(int blocks, bool ordered_sums = false) {
  return {.resident_blocks = blocks, .ordered_sums = ordered_sums};
}
ptx_test::Expected fault(Error kind, const char* mention, int blocks, bool ordered_sums = false) {
  return {
      .kinds = {kind}, .mention = mention, .resident_blocks = blocks, .ordered_sums = ordered_sums};
}

#define STORE(name, modifiers)                                                         \
  __device__ void name(int* p, int x) {                                                \
    asm volatile("st." modifiers ".global.b32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); \
  }
#define LOAD(name, modifiers)                                                            \
  __device__ int name(const int* p) {                                                    \
    int x;                                                                               \
    asm volatile("ld." modifiers ".global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory"); \
    return x;                                                                            \
  }
#define FENCE(name, modifiers) \
  __device__ void name() { asm volatile("fence." modifiers ";" ::: "memory"); }
STORE(store_release, "release.gpu")
STORE(store_release_block, "release.cta")
STORE(store_relaxed, "relaxed.gpu")
STORE(store_volatile, "volatile")
LOAD(load_acquire, "acquire.gpu")
LOAD(load_acquire_block, "acquire.cta")
LOAD(load_relaxed, "relaxed.gpu")
LOAD(load_volatile, "volatile")
FENCE(fence_gpu, "acq_rel.gpu")
FENCE(fence_block, "acq_rel.cta")
FENCE(fence_release, "release.gpu")
FENCE(fence_acquire, "acquire.gpu")
#undef STORE
#undef LOAD
#undef FENCE

// Block 0 writes a row and says so; block 1 waits for the word and reads the row.
enum class Message {
  kRight,
  kFences,
  kOneWayFences,
  kVolatile,
  kNoRelease,
  kNoAcquire,
  kReleaseInBlock,
  kAcquireInBlock,
  kFenceInBlock,
  kWrongFences,
  kNoFenceBehind,
  kNoBarrierBefore,
  kNoBarrierAfter
};
template <Message kFault>
__device__ void send(int* flag) {
  switch (kFault) {
    case Message::kNoRelease: return store_relaxed(flag, 1);
    case Message::kReleaseInBlock: return store_release_block(flag, 1);
    case Message::kFences:
    case Message::kNoFenceBehind: fence_gpu(); return store_relaxed(flag, 1);
    case Message::kOneWayFences: fence_release(); return store_relaxed(flag, 1);
    case Message::kWrongFences: fence_acquire(); return store_relaxed(flag, 1);
    case Message::kFenceInBlock: fence_block(); return store_relaxed(flag, 1);
    case Message::kVolatile: __threadfence(); return store_volatile(flag, 1);
    default: return store_release(flag, 1);
  }
}
template <Message kFault>
__device__ void receive(const int* flag) {
  constexpr bool kRelaxed = kFault == Message::kNoAcquire || kFault == Message::kFences ||
                            kFault == Message::kOneWayFences || kFault == Message::kWrongFences ||
                            kFault == Message::kNoFenceBehind;
  if constexpr (kRelaxed) {
    while (load_relaxed(flag) == 0) {
    }
  } else if constexpr (kFault == Message::kVolatile) {
    while (load_volatile(flag) == 0) {
    }
  } else if constexpr (kFault == Message::kAcquireInBlock) {
    while (load_acquire_block(flag) == 0) {
    }
  } else {
    while (load_acquire(flag) == 0) {
    }
  }
  if (kFault == Message::kFences) fence_gpu();
  if (kFault == Message::kOneWayFences || kFault == Message::kWrongFences) fence_acquire();
  if (kFault == Message::kVolatile) __threadfence();
}
template <Message kFault>
__global__ void message(int* flag, int* row, int* out) {
  const int t = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0) {
    row[t] = t;
    if (kFault != Message::kNoBarrierBefore) __syncthreads();
    if (t == 0) send<kFault>(flag);
    return;
  }
  if (t == 0) receive<kFault>(flag);
  if (kFault != Message::kNoBarrierAfter) __syncthreads();
  out[t] = row[kThreads - 1 - t];
}

// Blocks add to one row in the order of their numbers.
enum class Turns { kRight, kNoRelease, kNoAcquire, kNoBarrierBefore, kNoBarrierAfter, kNone };
template <Turns kFault, class T>
__global__ void turns(int* turn, T* row) {
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  if (t == 0 && kFault != Turns::kNone) {
    if constexpr (kFault == Turns::kNoAcquire) {
      while (load_relaxed(turn) != block) {
      }
    } else {
      while (load_acquire(turn) != block) {
      }
    }
  }
  if (kFault != Turns::kNoBarrierAfter) __syncthreads();
  atomicAdd(row + t, static_cast<T>(block));
  if (kFault != Turns::kNoBarrierBefore) __syncthreads();
  if (t != 0) return;
  if constexpr (kFault == Turns::kNoRelease)
    store_relaxed(turn, block + 1);
  else
    store_release(turn, block + 1);
}

// The same by bulk reductions of one thread.
enum class BulkTurns {
  kRight,
  kNoFenceAfter,
  kNoFenceBefore,
  kNoFences,
  kFenceOfShared,
  kNoFullWait,
  kNoRelease,
  kNoAcquire
};
template <BulkTurns kFault>
__global__ void bulk_turns(int* turn, float* row) {
  __shared__ alignas(128) float s[kThreads];
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  s[t] = static_cast<float>(block);
  fence_proxy();
  __syncthreads();
  if (t != 0) return;
  if constexpr (kFault == BulkTurns::kNoAcquire) {
    while (load_relaxed(turn) != block) {
    }
  } else {
    while (load_acquire(turn) != block) {
    }
  }
  constexpr bool kNoFences = kFault == BulkTurns::kNoFences;
  if (kFault == BulkTurns::kFenceOfShared)
    fence_proxy();
  else if (kFault != BulkTurns::kNoFenceBefore && !kNoFences)
    fence_proxy_global();
  hopper::add(row, s, sizeof s);
  hopper::commit();
  if (kFault == BulkTurns::kNoFullWait)
    hopper::wait_reads<0>();
  else
    hopper::wait_stores<0>();
  if (kFault != BulkTurns::kNoFenceAfter && !kNoFences) fence_proxy_global();
  if constexpr (kFault == BulkTurns::kNoRelease)
    store_relaxed(turn, block + 1);
  else
    store_release(turn, block + 1);
}

// Block 0 writes a row by ordinary stores, block 1 loads it by a bulk copy.
enum class Handover { kRight, kFenceOfWriter, kNoFence };
template <Handover kFault>
__global__ void handover(int* flag, float* row, float* out) {
  __shared__ alignas(128) float s[kThreads];
  __shared__ uint64_t b;
  const int t = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0) {
    row[t] = static_cast<float>(t);
    if (kFault == Handover::kFenceOfWriter) fence_proxy_global();
    __syncthreads();
    if (t == 0) store_release(flag, 1);
    return;
  }
  if (t == 0) {
    hopper::init(b, 1);
    fence_init();
    while (load_acquire(flag) == 0) {
    }
    if (kFault == Handover::kRight) fence_proxy_global();
    arrive_expect(b, sizeof s);
    hopper::load(s, row, sizeof s, b);
  }
  __syncthreads();
  hopper::wait(b, 0);
  out[t] = s[t];
}

// A row is overwritten that a bulk load reads: after its wait, at once, or by who has not waited.
enum class Overwrite { kRight, kAtOnce, kByAnother };
template <Overwrite kFault>
__global__ void overwrite(float* row, float* out) {
  __shared__ alignas(128) float s[kThreads];
  __shared__ uint64_t b;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    hopper::init(b, 1);
    fence_init();
    arrive_expect(b, sizeof s);
    hopper::load(s, row, sizeof s, b);
  }
  __syncthreads();
  const bool waits = kFault != Overwrite::kByAnother || t < 32;
  if (kFault == Overwrite::kRight || (kFault == Overwrite::kByAnother && waits)) hopper::wait(b, 0);
  row[t] = 1.0f;
  hopper::wait(b, 0);
  out[t] = s[t];
}

__global__ void strong_read(int* word, int* out, bool plain) {
  if (blockIdx.x == 0)
    out[0] = load_relaxed(word);
  else if (plain)
    *word = 1;
  else
    store_relaxed(word, 1);
}

__global__ void count(int* word, bool in_block) {
  if (in_block)
    asm volatile("red.relaxed.cta.global.add.s32 [%0], 1;" ::"l"(word) : "memory");
  else
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(word) : "memory");
}

// An ordinary addition and one by a bulk copy.
__global__ void two_proxies(float* row, bool apart) {
  __shared__ alignas(128) float s[32];
  const int t = static_cast<int>(threadIdx.x);
  s[t] = 1.0f;
  fence_proxy();
  __syncwarp();
  if (blockIdx.x == 0) {
    atomicAdd(row + t, 1.0f);
  } else if (t == 0) {
    hopper::add(row + (apart ? 32 : 0), s, sizeof s);
    hopper::commit();
    hopper::wait_stores<0>();
  }
}

template <Message kFault>
void run_message(const ptx_test::Expected& expected) {
  expect(expected, [] {
    const Array<int> flag(1), row(kThreads), out(kThreads);
    message<kFault><<<2, kThreads>>>(flag.get(), row.get(), out.get());
  });
}
template <Turns kFault, class T = float>
void run_turns(const ptx_test::Expected& expected) {
  expect(expected, [] {
    const Array<int> turn(1);
    const Array<T> row(kThreads);
    turns<kFault><<<3, kThreads>>>(turn.get(), row.get());
  });
}
template <BulkTurns kFault>
void run_bulk_turns(const ptx_test::Expected& expected) {
  expect(expected, [] {
    const Array<int> turn(1);
    const Array<float> row(kThreads);
    bulk_turns<kFault><<<3, kThreads>>>(turn.get(), row.get());
  });
}
template <Handover kFault>
void run_handover(const ptx_test::Expected& expected) {
  expect(expected, [] {
    const Array<int> flag(1);
    const Array<float> row(kThreads), out(kThreads);
    handover<kFault><<<2, kThreads>>>(flag.get(), row.get(), out.get());
  });
}

}  // namespace

TEST("a message between blocks without release, acquire or fence is reported") {
  run_message<Message::kRight>(clean(2));
  run_message<Message::kFences>(clean(2));
  run_message<Message::kOneWayFences>(clean(2));
  run_message<Message::kVolatile>(clean(2));
  const ptx_test::Expected race = fault(Error::kRace, "another block", 2);
  run_message<Message::kNoRelease>(race);
  run_message<Message::kNoAcquire>(race);
  run_message<Message::kWrongFences>(race);
  run_message<Message::kNoFenceBehind>(race);
  run_message<Message::kNoBarrierBefore>(race);
  run_message<Message::kNoBarrierAfter>(race);
}
TEST("releases, acquires and fences of a block's scope do not reach another block") {
  const ptx_test::Expected race = fault(Error::kRace, "another block", 2);
  run_message<Message::kReleaseInBlock>(race);
  run_message<Message::kAcquireInBlock>(race);
  run_message<Message::kFenceInBlock>(race);
  for (const bool in_block : {false, true}) {
    expect(in_block ? fault(Error::kRace, "atomic update", 2) : clean(2), [&] {
      const Array<int> word(1);
      count<<<2, 1>>>(word.get(), in_block);
    });
  }
  // Threads of one block are within it.
  expect(clean(1), [&] {
    const Array<int> word(1);
    count<<<1, kThreads>>>(word.get(), true);
  });
}
TEST("sums whose order is promised are reported when it is not kept") {
  run_turns<Turns::kRight>(clean(3, true));
  const ptx_test::Expected unordered = fault(Error::kUnorderedSum, "atomic update", 3, true);
  run_turns<Turns::kNoRelease>(unordered);
  run_turns<Turns::kNoAcquire>(unordered);
  run_turns<Turns::kNoBarrierBefore>(unordered);
  run_turns<Turns::kNoBarrierAfter>(unordered);
  run_turns<Turns::kNone>(unordered);
  // Where nothing is promised, and where the order does not matter.
  run_turns<Turns::kNoRelease>(clean(3));
  run_turns<Turns::kNone>(clean(3));
  run_turns<Turns::kNone, int>(clean(3, true));
}
TEST("sums by bulk reductions whose order is promised") {
  run_bulk_turns<BulkTurns::kRight>(clean(3, true));
  // The end of a bulk copy is a fence of its proxy by itself.
  run_bulk_turns<BulkTurns::kNoFenceAfter>(clean(3, true));
  const ptx_test::Expected proxy = fault(Error::kProxy, "fence.proxy.async", 3, true);
  run_bulk_turns<BulkTurns::kNoFenceBefore>(proxy);
  run_bulk_turns<BulkTurns::kNoFences>(proxy);
  run_bulk_turns<BulkTurns::kFenceOfShared>(proxy);
  run_bulk_turns<BulkTurns::kNoFullWait>(fault(Error::kUnorderedSum, "in flight", 3, true));
  run_bulk_turns<BulkTurns::kNoRelease>(fault(Error::kUnorderedSum, "not ordered", 3, true));
  run_bulk_turns<BulkTurns::kNoAcquire>(fault(Error::kUnorderedSum, "not ordered", 3, true));
  run_bulk_turns<BulkTurns::kNoFences>(clean(3));
  run_bulk_turns<BulkTurns::kNoFullWait>(clean(3));
}
TEST("a bulk load of what another block wrote needs a proxy fence of its own block") {
  run_handover<Handover::kRight>(clean(2));
  run_handover<Handover::kNoFence>(fault(Error::kProxy, "another block", 2));
  run_handover<Handover::kFenceOfWriter>(fault(Error::kProxy, "another block", 2));
}
TEST("global memory overwritten while a bulk load may read it is reported") {
  const auto run = [](auto kernel) {
    return [kernel] {
      const Array<float> row(kThreads), out(kThreads);
      kernel<<<1, kThreads>>>(row.get(), out.get());
    };
  };
  expect(clean(1), run(overwrite<Overwrite::kRight>));
  const ptx_test::Expected either = {.kinds = {Error::kInFlight, Error::kRace},
                                     .mention = "read by the bulk load"};
  expect(either, run(overwrite<Overwrite::kAtOnce>));
  expect(either, run(overwrite<Overwrite::kByAnother>));
}
TEST("a strong access races with plain ones and with the other proxy") {
  for (const bool plain : {false, true}) {
    expect(plain ? fault(Error::kRace, "not ordered", 2) : clean(2), [&] {
      const Array<int> word(1), out(1);
      strong_read<<<2, 1>>>(word.get(), out.get(), plain);
    });
  }
  for (const bool apart : {false, true}) {
    expect(apart ? clean(2) : fault(Error::kRace, "atomic update", 2), [&] {
      const Array<float> row(64);
      two_proxies<<<2, 32>>>(row.get(), apart);
    });
  }
}
