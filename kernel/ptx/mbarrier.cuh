// PTX of compute capability 9.0: mbarriers, and the fences that order them and the async proxy.
//
// An mbarrier counts arrivals and bytes of one phase; when both are complete the next phase begins.
// A waiting thread names the parity of the phase that it waits for: the first one has parity 0.
#pragma once

#include "common.cuh"

namespace flashtile::ptx {

// By one thread; the others see it after fence_mbarrier_init() and a barrier of the block.
FLASHTILE_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
FLASHTILE_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FLASHTILE_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase wait for `bytes` that copies will bring.
FLASHTILE_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity is complete; may suspend the thread for a while.
FLASHTILE_DEVICE bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, done;\n\t}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
FLASHTILE_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  FLASHTILE_ROLL
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// This thread's ordinary writes to shared memory become visible to TMA and wgmma, for those that
// synchronise with it afterwards.
FLASHTILE_DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The same for global memory.
FLASHTILE_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace flashtile::ptx
