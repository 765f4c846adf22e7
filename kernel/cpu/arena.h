// Cuts the caller's workspace into arrays. With a null start it only counts the bytes, so that the
// same code that takes the arrays also says how much they need.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vec.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + at);
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlign = 128;  // two cache lines: neighbours never share one
  char* start_;
  size_t used_ = 0;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
