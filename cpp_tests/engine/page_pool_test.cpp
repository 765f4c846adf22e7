// The page pool of examples/engine: its edges, and random use against a model that cannot be wrong.
#include "page_pool.h"

#include <map>
#include <random>
#include <stdexcept>

#include "check.h"

namespace {

template <class Exception, class Call>
bool throws(const Call& call) {
  try {
    call();
  } catch (const Exception&) {
    return true;
  }
  return false;
}

}  // namespace

TEST("a page is free after its last holder") {
  engine::PagePool pool(2);
  const int32_t page = pool.allocate().value_or(-1);
  pool.share(page);
  CHECK_EQ(pool.holders(page), 2);
  pool.release(page);
  CHECK_EQ(pool.in_use(), 1);
  pool.release(page);
  CHECK_EQ(pool.in_use(), 0);
  CHECK_EQ(pool.peak(), 1);
}

TEST("a pool without pages, and pages that are free or do not exist, are refused") {
  CHECK(throws<std::invalid_argument>([] { engine::PagePool pool(0); }));
  engine::PagePool pool(1);
  CHECK(throws<std::logic_error>([&] { pool.release(0); }));
  CHECK(throws<std::logic_error>([&] { pool.share(0); }));
  CHECK(throws<std::out_of_range>([&] { pool.share(1); }));
  CHECK(throws<std::out_of_range>([&] { pool.release(-1); }));
  CHECK(pool.allocate().has_value());
  CHECK(!pool.allocate().has_value());
}

TEST("random use agrees with a count of holders") {
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    std::mt19937 random(seed);
    const int32_t size = 1 + static_cast<int32_t>(random() % 40);
    engine::PagePool pool(size);
    std::map<int32_t, int32_t> holders;  // of the pages in use
    const auto some_page = [&] {
      return std::next(holders.begin(), static_cast<int64_t>(random() % holders.size()));
    };
    size_t peak = 0;
    for (int step = 0; step < 2000; ++step) {
      const uint32_t action = random() % 8;
      if (action < 4) {
        const std::optional<int32_t> page = pool.allocate();
        CHECK_EQ(page.has_value(), static_cast<int32_t>(holders.size()) < size);
        if (page.has_value()) {
          CHECK(*page >= 0 && *page < size && !holders.contains(*page));
          holders[*page] = 1;
        }
      } else if (!holders.empty() && action < 5) {
        const auto at = some_page();
        pool.share(at->first);
        ++at->second;
      } else if (!holders.empty()) {
        const auto at = some_page();
        pool.release(at->first);
        if (--at->second == 0) holders.erase(at);
      }
      peak = std::max(peak, holders.size());
      CHECK_EQ(pool.in_use(), static_cast<int32_t>(holders.size()));
      for (const auto& [page, count] : holders) CHECK_EQ(pool.holders(page), count);
    }
    CHECK_EQ(pool.peak(), static_cast<int32_t>(peak));
  }
}
