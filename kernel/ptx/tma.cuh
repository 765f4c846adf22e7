// PTX of compute capability 9.0: copies by the tensor memory accelerator, issued by one thread.
//
// Loads announce their bytes to an mbarrier; the whole box counts, also where it leaves the tensor
// and zeros arrive. Stores and reductions form bulk groups of the issuing thread, and read shared
// memory through the async proxy: a fence_proxy_async_shared() of the writers comes first.
#pragma once

#include "common.cuh"
#include "cuda/tensor_map.h"

namespace flashtile::ptx {

// Elements of a 5-D tensor, innermost dimension first.
struct Coordinates {
  int c0, c1, c2, c3, c4;
};

// Fetches the descriptor ahead of its first use.
FLASHTILE_DEVICE void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Box at `x` -> shared memory; completes on the mbarrier.
FLASHTILE_DEVICE void tma_load(uint32_t shared, const TensorMap& map, uint32_t barrier,
                               const Coordinates& x) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(x.c0), "r"(x.c1), "r"(x.c2), "r"(x.c3), "r"(x.c4)
      : "memory");
}
// Shared memory -> box at `x`; elements outside of the tensor are not written.
FLASHTILE_DEVICE void tma_store(const TensorMap& map, uint32_t shared, const Coordinates& x) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
      "r"(shared), "r"(x.c0), "r"(x.c1), "r"(x.c2), "r"(x.c3), "r"(x.c4)
      : "memory");
}

// `bytes` contiguous bytes, a multiple of 16, of 16-byte aligned memory.
FLASHTILE_DEVICE void bulk_load(uint32_t shared, const void* global, uint32_t bytes,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}
FLASHTILE_DEVICE void bulk_reduce_add_f32(float* global, uint32_t shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared), "r"(bytes)
      : "memory");
}

FLASHTILE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the last kPending groups of this thread are done: written, visible.
template <int kPending>
FLASHTILE_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// The same for reading their sources: shared memory may be written again.
template <int kPending>
FLASHTILE_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace flashtile::ptx
