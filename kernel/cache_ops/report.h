// Which numbers of a key/value cache are wrong. What cache.h clamps is found here.
#pragma once

#include "cache.h"
#include "flashtile/flashtile.h"

namespace flashtile {

using CacheReport = flashtile_cache_report;

// flashtile_cache_report.what, in the order in which a sequence's numbers are looked at.
enum class WrongNumber : int32_t {
  kNone = 0,
  kOffsetQ = 1,    // cu_seqlens_q
  kOffsetNew = 2,  // cu_seqlens_new
  kLength = 3,     // seqused_k
  kOverflow = 4,   // the same with the new rows
  kLeftpad = 5,
  kBatchIdx = 6,
  kPage = 7,  // block_table
};

// A report that is not complete yet. Only memory that launches share ever holds it.
inline constexpr int32_t kReportInWork = -1;

FLASHTILE_CACHE_INLINE CacheReport wrong_number(WrongNumber what, int64_t sequence, int64_t index,
                                                int64_t value, int64_t least, int64_t most) {
  return {static_cast<int32_t>(what), 0, sequence, index, value, least, most};
}

// Whether a was found before b: in an earlier sequence, or earlier in the same.
FLASHTILE_CACHE_INLINE bool comes_before(const CacheReport& a, const CacheReport& b) {
  if (a.what == 0 || b.what == 0) return a.what != 0;
  if (a.sequence != b.sequence) return a.sequence < b.sequence;
  return a.what != b.what ? a.what < b.what : a.index < b.index;
}

// The end of a sequence in cu_seqlens, and for the first sequence the beginning.
FLASHTILE_CACHE_INLINE CacheReport find_wrong_offset(WrongNumber what, const int32_t* cu_seqlens,
                                                     int64_t sequence, int64_t total) {
  if (cu_seqlens == nullptr) return {};
  const int64_t begin = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
  if (sequence == 0 && begin != 0) return wrong_number(what, 0, 0, begin, 0, 0);
  return end >= begin && end <= total
             ? CacheReport{}
             : wrong_number(what, sequence, sequence + 1, end, begin, total);
}

// How many rows a sequence has and where they begin.
FLASHTILE_CACHE_INLINE CacheReport find_wrong_rows(const Problem& problem, int64_t sequence) {
  const Cache& cache = problem.cache;
  const int64_t capacity = cache.capacity(), before = rows_before(problem, sequence);
  if (before < 0 || before > capacity)
    return wrong_number(WrongNumber::kLength, sequence, sequence, before, 0, capacity);
  const int64_t added = new_rows(cache, sequence).count;
  if (before + added > capacity)
    return wrong_number(WrongNumber::kOverflow, sequence, added, before, 0, capacity);
  const int64_t leftpad = cache.leftpad == nullptr ? 0 : cache.leftpad[sequence];
  if (leftpad < 0 || leftpad > before + added)
    return wrong_number(WrongNumber::kLeftpad, sequence, sequence, leftpad, 0, before + added);
  return {};
}

// Everything but the block table.
FLASHTILE_CACHE_INLINE CacheReport find_wrong_number(const Problem& problem, int64_t sequence) {
  const Cache& cache = problem.cache;
  CacheReport report =
      find_wrong_offset(WrongNumber::kOffsetQ, problem.cu_seqlens_q, sequence, problem.total_q);
  if (report.what == 0) {
    report =
        find_wrong_offset(WrongNumber::kOffsetNew, cache.cu_seqlens_new, sequence, cache.total_new);
  }
  if (report.what == 0) report = find_wrong_rows(problem, sequence);
  if (report.what != 0 || cache.batch_idx == nullptr) return report;
  const int64_t page = cache.batch_idx[sequence];
  return is_page(cache, page) ? report
                              : wrong_number(WrongNumber::kBatchIdx, sequence, sequence, page, 0,
                                             cache.num_pages - 1);
}

// The block table's row of a sequence, from the `lane`-th column whose rows are valid, every
// `lanes`-th. Columns of left padding alone are unused.
FLASHTILE_CACHE_INLINE CacheReport find_wrong_page(const Problem& problem, int64_t sequence,
                                                   int lane, int lanes) {
  const Cache& cache = problem.cache;
  if (cache.block_table == nullptr) return {};
  const CacheRows rows = cache_rows(problem, sequence);
  const int64_t written = clamped(rows_before(problem, sequence), 0, rows.begin);
  const int64_t end = rows.begin + rows.count;
  for (int64_t block = written / cache.page_size + lane; block * cache.page_size < end;
       block += lanes) {
    const int64_t page = named_page(cache, sequence, block);
    if (!is_page(cache, page)) {
      return wrong_number(WrongNumber::kPage, sequence, block, page, 0, cache.num_pages - 1);
    }
  }
  return {};
}

}  // namespace flashtile
