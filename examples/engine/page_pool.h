// Which pages of the key/value cache are free, and how many sequences hold each of the others.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace engine {

class PagePool {
 public:
  explicit PagePool(int32_t num_pages);

  int32_t size() const { return static_cast<int32_t>(holders_.size()); }
  int32_t free() const { return static_cast<int32_t>(free_.size()); }
  int32_t in_use() const { return size() - free(); }
  int32_t peak() const { return peak_; }  // the most that were ever in use
  int32_t holders(int32_t page) const { return holders_.at(page); }

  // A page with one holder; none when all are in use.
  std::optional<int32_t> allocate();
  // One more holder of a page that has some.
  void share(int32_t page);
  // One holder fewer; the page is free after the last.
  void release(int32_t page);

 private:
  int32_t& holders_of_used(int32_t page);

  std::vector<int32_t> holders_;  // [num_pages]
  std::vector<int32_t> free_;     // a stack: the page that was used last is warm in the caches
  int32_t peak_ = 0;
};

}  // namespace engine
