#include "bulk.h"

#include <algorithm>
#include <cstring>

#include "global_shadow.h"
#include "half.h"
#include "warp.h"

namespace ptx {

namespace {

template <class T>
void add_as(char* to, const char* from) {
  T a, b;
  std::memcpy(&a, to, sizeof(T));
  std::memcpy(&b, from, sizeof(T));
  a = static_cast<T>(a + b);
  std::memcpy(to, &a, sizeof(T));
}

template <class H>
void add_half(char* to, const char* from) {
  uint16_t a, b;
  std::memcpy(&a, to, 2);
  std::memcpy(&b, from, 2);
  a = H::narrow(H::widen(a) + H::widen(b));
  std::memcpy(to, &a, 2);
}

void add_element(Element kind, uint32_t bytes, char* to, const char* from) {
  switch (kind) {
    case Element::kF16: return add_half<Fp16>(to, from);
    case Element::kBf16: return add_half<Bf16>(to, from);
    case Element::kF32: return add_as<float>(to, from);
    case Element::kF64: return add_as<double>(to, from);
    case Element::kInteger:
      return bytes == 8 ? add_as<uint64_t>(to, from) : add_as<uint32_t>(to, from);
  }
}

// Copies or adds `bytes` from `from` into global memory.
void put(const BulkCopy& copy, uint64_t address, const char* from, uint32_t bytes) {
  char* to = reinterpret_cast<char*>(address);
  if (!copy.adds) {
    std::memcpy(to, from, bytes);
    return;
  }
  const uint32_t element = copy.element == Element::kF64                       ? 8
                           : copy.element == Element::kF32                     ? 4
                           : copy.element == Element::kInteger && !copy.tensor ? 4
                           : copy.element == Element::kInteger ? copy.map.element_bytes
                                                               : 2;
  for (uint32_t i = 0; i < bytes; i += element)
    add_element(copy.element, element, to + i, from + i);
}

// What lies outside of the tensor.
void fill(const TensorMap& map, char* to, uint32_t bytes) {
  if (map.nan_fill == 0) {
    std::memset(to, 0, bytes);
    return;
  }
  static const unsigned char kF16[] = {0xFF, 0x7F}, kF32[] = {0xFF, 0xFF, 0xFF, 0x7F};
  for (uint32_t i = 0; i < bytes; ++i)
    to[i] = static_cast<char>(map.element_bytes == 2 ? kF16[i % 2] : kF32[i % 4]);
}

}  // namespace

void BulkEngine::start(Block* block, int threads) {
  block_ = block;
  loads_.clear();
  storing_.clear();
  waiting_stores_ = 0;
  threads_.assign(threads, {});
}

void BulkEngine::add_load(BulkCopy copy) { loads_.push_back(std::move(copy)); }

void BulkEngine::add_store(BulkCopy copy) {
  const int thread = copy.thread;
  copy.group = threads_[thread].committed;
  threads_[thread].stores.push_back(std::move(copy));
  if (std::find(storing_.begin(), storing_.end(), thread) == storing_.end())
    storing_.push_back(thread);
  ++waiting_stores_;
}

void BulkEngine::land_load(const BulkCopy& copy) {
  Block& block = *block_;
  char* shared = block.shared.data();
  if (copy.tensor) {
    const uint32_t row_bytes = copy.map.row_bytes();
    const uint32_t base = static_cast<uint32_t>(kSharedBase) + copy.offset;
    copy.map.for_rows(copy.at, [&](uint32_t offset, uint64_t place, uint32_t from, uint32_t to) {
      for (uint32_t chunk = 0; chunk < row_bytes; chunk += 16) {
        char* at = shared + swizzled(base + offset + chunk, copy.map.swizzle) - kSharedBase;
        if (from <= chunk && chunk + 16 <= to) {
          std::memcpy(at, reinterpret_cast<const char*>(place + chunk), 16);
          continue;
        }
        fill(copy.map, at, 16);
        const uint32_t begin = std::max(from, chunk), end = std::min(to, chunk + 16);
        if (begin < end)
          std::memcpy(at + begin - chunk, reinterpret_cast<const char*>(place + begin),
                      end - begin);
      }
    });
  } else {
    std::memcpy(shared + copy.offset, reinterpret_cast<const char*>(copy.global), copy.bytes);
  }
  const auto it = block.mbarriers.find(copy.barrier);
  if (it == block.mbarriers.end())
    block.fail_thread(Error::kBarrier, copy.thread, copy.pc,
                      "the mbarrier at offset " + std::to_string(copy.barrier) +
                          " was invalidated before this copy had arrived");
  Mbarrier& b = it->second;
  AsyncWrite& write = block.async.write(copy.write);
  write.landed = true;
  write.phase = b.current;
  b.copy_pc = copy.pc;
  b.copy_thread = copy.thread;
  block.mbarrier_bytes(b, -int64_t{copy.bytes});
  block.mbarrier_end_phase(b);
}

void BulkEngine::read_store(BulkCopy& copy) {
  if (copy.was_read) return;
  copy.was_read = true;
  const char* shared = block_->shared.data();
  copy.data.resize(copy.bytes);
  if (!copy.tensor) {
    std::memcpy(copy.data.data(), shared + copy.offset, copy.bytes);
    return;
  }
  const uint32_t base = static_cast<uint32_t>(kSharedBase) + copy.offset;
  for (uint32_t at = 0; at < copy.bytes; at += 16)
    std::memcpy(copy.data.data() + at, shared + swizzled(base + at, copy.map.swizzle) - kSharedBase,
                16);
}

void BulkEngine::land_store(BulkCopy& copy) {
  if (copy.landed) return;
  read_store(copy);
  copy.landed = true;
  --waiting_stores_;
  if (!copy.tensor) return put(copy, copy.global, copy.data.data(), copy.bytes);
  copy.map.for_rows(copy.at, [&](uint32_t offset, uint64_t place, uint32_t from, uint32_t to) {
    if (from < to) put(copy, place + from, copy.data.data() + offset + from, to - from);
  });
}

void BulkEngine::wait(int thread, uint32_t allowed, bool only_read) {
  Thread& t = threads_[thread];
  const uint32_t first_pending = t.committed > allowed ? t.committed - allowed : 0;
  size_t kept = 0;
  for (BulkCopy& copy : t.stores) {
    const bool due = copy.group < first_pending;
    if (due) {
      only_read ? read_store(copy) : land_store(copy);
      block_->async.see(copy.read, block_->clocks, thread);
    }
    if (due && !only_read) {
      if (!block_->checks) continue;
      if (!copy.tensor) end_bulk_write(*block_, thread, copy.global, copy.bytes);
      if (copy.tensor)
        copy.map.for_rows(copy.at, [&](uint32_t, uint64_t place, uint32_t from, uint32_t to) {
          if (from < to) end_bulk_write(*block_, thread, place + from, to - from);
        });
      continue;
    }
    if (&t.stores[kept] != &copy) t.stores[kept] = std::move(copy);
    ++kept;
  }
  t.stores.resize(kept);
  if (kept == 0) std::erase(storing_, thread);
}

bool BulkEngine::step() {
  if (idle()) return false;
  Random& random = *block_->random;
  const size_t pick = random.below(static_cast<uint32_t>(loads_.size() + waiting_stores_));
  if (pick < loads_.size()) {
    std::swap(loads_[pick], loads_.back());
    const BulkCopy copy = std::move(loads_.back());
    loads_.pop_back();
    land_load(copy);
    return true;
  }
  size_t left = pick - loads_.size();
  for (const int thread : storing_) {
    for (BulkCopy& copy : threads_[thread].stores) {
      if (copy.landed || left-- != 0) continue;
      copy.was_read ? land_store(copy) : read_store(copy);
      return true;
    }
  }
  return false;
}

const BulkCopy* BulkEngine::unread_store() const {
  for (const Thread& t : threads_) {
    for (const BulkCopy& copy : t.stores) {
      if (!block_->async.is_complete(copy.read)) return &copy;
    }
  }
  return nullptr;
}

}  // namespace ptx
