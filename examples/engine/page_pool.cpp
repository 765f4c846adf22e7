#include "page_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace engine {

PagePool::PagePool(int32_t num_pages) {
  if (num_pages < 1) {
    throw std::invalid_argument("pages is " + std::to_string(num_pages) + "; allowed: 1 and more");
  }
  holders_.assign(num_pages, 0);
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

std::optional<int32_t> PagePool::allocate() {
  if (free_.empty()) return std::nullopt;
  const int32_t page = free_.back();
  free_.pop_back();
  holders_[page] = 1;
  peak_ = std::max(peak_, in_use());
  return page;
}

void PagePool::share(int32_t page) { ++holders_of_used(page); }

void PagePool::release(int32_t page) {
  if (--holders_of_used(page) == 0) free_.push_back(page);
}

int32_t& PagePool::holders_of_used(int32_t page) {
  int32_t& holders = holders_.at(page);
  if (holders == 0) throw std::logic_error("page " + std::to_string(page) + " is free");
  return holders;
}

}  // namespace engine
