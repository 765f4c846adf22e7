// Threads. Work is cut into tasks whose number and content do not depend on the number of threads,
// and each task writes its own memory, so results are bitwise equal for any number of threads.
#pragma once

#include "vec.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// While one lives, denormal numbers count as zero on this thread (float only): tiny weights would
// otherwise make the products an order of magnitude slower. The caller's mode comes back at the
// end.
class FlushDenormals {
 public:
  explicit FlushDenormals(bool wanted) : saved_(mode()) {
    if (wanted) set_mode(saved_ | kFlush);
  }
  ~FlushDenormals() { set_mode(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr uint64_t kFlush = 0x8040;  // FTZ | DAZ
  static uint64_t mode() { return __builtin_ia32_stmxcsr(); }
  static void set_mode(uint64_t mode) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FPCR.FZ
  static uint64_t mode() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t mode() { return 0; }
  static void set_mode(uint64_t) {}
#endif
  uint64_t saved_;
};

FLASHTILE_INLINE int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Calls task(index, thread) once for every index in [0, count); thread is below `threads`. Indices
// are handed out in order, so tasks that take long should come first.
template <class Task>
void parallel_for([[maybe_unused]] int threads, int64_t count, bool flush_denormals,
                  const Task& task) {
  int64_t next = 0;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
#endif
  {
    const FlushDenormals guard(flush_denormals);
    const int thread = thread_number();
    for (;;) {
      const int64_t index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (index >= count) break;
      task(index, thread);
    }
  }
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
