// A ring of buffers in shared memory between one loading thread and several consuming warps.
//
// Every buffer has two mbarriers: `full` completes when its bytes have landed (where several warps
// load: when each has arrived once), `empty` when each consumer has arrived once. Use n of the ring
// has buffer n % stages; the loading thread waits for the consumers of use n - stages, and in the
// first uses for none.
#pragma once

#include "../ptx/mbarrier.cuh"

namespace flashtile {

inline constexpr int kMbarrierBytes = 8;

template <int kStagesValue>
struct Ring {
  static constexpr int kStages = kStagesValue;
  static constexpr int kBytes = 2 * kStages * kMbarrierBytes;
  static_assert((kStages & (kStages - 1)) == 0);

  uint32_t barriers;  // shared memory: full[kStages], then empty[kStages]

  FLASHTILE_DEVICE static int stage(int use) { return use & (kStages - 1); }
  FLASHTILE_DEVICE static uint32_t parity(int use) { return use / kStages & 1; }
  FLASHTILE_DEVICE uint32_t full(int use) const { return barriers + stage(use) * kMbarrierBytes; }
  FLASHTILE_DEVICE uint32_t empty(int use) const {
    return barriers + (kStages + stage(use)) * kMbarrierBytes;
  }

  // By one thread, before any thread uses the ring.
  FLASHTILE_DEVICE void init(int consumers, int loaders = 1) const {
    FLASHTILE_UNROLL
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full(i), loaders);
      ptx::mbarrier_init(empty(i), consumers);
    }
  }

  // The loading thread: waits until the buffer is free and announces what will be copied there.
  FLASHTILE_DEVICE void acquire(int use, uint32_t bytes) const {
    wait_until_free(use);
    ptx::mbarrier_arrive_expect_tx(full(use), bytes);
  }
  FLASHTILE_DEVICE void wait_until_free(int use) const {
    ptx::mbarrier_wait(empty(use), parity(use) ^ 1);
  }
  // Consumers: the bytes have landed.
  FLASHTILE_DEVICE void wait(int use) const { ptx::mbarrier_wait(full(use), parity(use)); }
  // One lane of each consumer, a warp that has read the buffer.
  FLASHTILE_DEVICE void release(int use) const { ptx::mbarrier_arrive(empty(use)); }
};

}  // namespace flashtile
