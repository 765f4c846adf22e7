#include "memory.h"

#include <cstdlib>
#include <cstring>

namespace ptx {

namespace {
// Unmapped to kernels on both sides of an allocation, so that a near miss stays out of every range.
constexpr size_t kGuardBytes = 512;
}  // namespace

GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

Allocation& GlobalMemory::add(const void* pointer, size_t bytes, const std::string& label,
                              bool read_only) {
  const uint64_t begin = reinterpret_cast<uint64_t>(pointer);
  Allocation& range = ranges_[begin];
  range = Allocation{};
  range.begin = begin;
  range.end = begin + bytes;
  range.label = label;
  range.read_only = read_only;
  return range;
}

void GlobalMemory::remove(uint64_t begin) { ranges_.erase(begin); }

Allocation* GlobalMemory::find(uint64_t address) {
  auto it = ranges_.upper_bound(address);
  if (it == ranges_.begin()) return nullptr;
  --it;
  const bool found = address < it->second.end && !is_elsewhere(it->second);
  return found ? &it->second : nullptr;
}

Allocation* GlobalMemory::nearest(uint64_t address) {
  auto above = ranges_.upper_bound(address);
  Allocation* best = above == ranges_.end() ? nullptr : &above->second;
  if (above != ranges_.begin()) {
    Allocation& below = std::prev(above)->second;
    if (best == nullptr || address < below.end || address - below.end < best->begin - address)
      best = &below;
  }
  return best;
}

void* GlobalMemory::allocate(size_t bytes, int device) {
  const size_t total = ((bytes + 255) / 256) * 256 + 2 * kGuardBytes;
  char* block = static_cast<char*>(std::aligned_alloc(256, total));
  if (block == nullptr) return nullptr;
  std::memset(block, 0xFF, total);
  Allocation& range =
      add(block + kGuardBytes, bytes, "cudaMalloc #" + std::to_string(next_label_++), false);
  range.device = device;
  range.owned = block;
  return block + kGuardBytes;
}

bool GlobalMemory::release(void* pointer) {
  auto it = ranges_.find(reinterpret_cast<uint64_t>(pointer));
  if (it == ranges_.end() || it->second.owned == nullptr) return false;
  std::free(it->second.owned);
  ranges_.erase(it);
  return true;
}

}  // namespace ptx
