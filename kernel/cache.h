// What the numbers of a key/value cache mean once they are clamped. Nothing that is read here can
// be trusted: every length and page that comes out is one that the tensors have.
//
// Always inlined: cpu/ compiles this once per instruction set (vec.h says why that matters).
// Kernels use it as it is: nvcc takes constexpr functions for both sides
// (--expt-relaxed-constexpr).
#pragma once

#include "params.h"

#define FLASHTILE_CACHE_INLINE [[gnu::always_inline]] inline constexpr

namespace flashtile {

FLASHTILE_CACHE_INLINE int64_t clamped(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// The new rows of a sequence: where they begin in the packed tensor (0 when dense), and how many.
struct NewRows {
  int64_t begin;
  int64_t count;
};
FLASHTILE_CACHE_INLINE NewRows new_rows(const Cache& cache, int64_t sequence) {
  if (cache.cu_seqlens_new == nullptr) return {0, cache.seqlen_new};
  const int64_t begin = clamped(cache.cu_seqlens_new[sequence], 0, cache.total_new);
  const int64_t end = clamped(cache.cu_seqlens_new[sequence + 1], begin, cache.total_new);
  return {begin, end - begin};
}

// Valid rows before new ones are appended; negative where the caller's number is negative.
FLASHTILE_CACHE_INLINE int64_t rows_before(const Problem& problem, int64_t sequence) {
  return problem.seqused_k == nullptr ? problem.cache.capacity() : problem.seqused_k[sequence];
}

// The rows that a sequence's queries may see: [begin, begin + count) of its rows in the cache.
struct CacheRows {
  int64_t begin;  // behind the left padding
  int64_t count;
};
FLASHTILE_CACHE_INLINE CacheRows cache_rows(const Problem& problem, int64_t sequence) {
  const Cache& cache = problem.cache;
  const int64_t before = rows_before(problem, sequence);
  const int64_t appended = before < 0 ? 0 : new_rows(cache, sequence).count;
  const int64_t end = clamped(before + appended, 0, cache.capacity());
  const int64_t begin = cache.leftpad == nullptr ? 0 : clamped(cache.leftpad[sequence], 0, end);
  return {begin, end - begin};
}

// The page of a sequence's block of page_size rows as the caller says it, and whether there is one.
FLASHTILE_CACHE_INLINE int64_t named_page(const Cache& cache, int64_t sequence, int64_t block) {
  if (cache.block_table != nullptr)
    return cache.block_table[sequence * cache.block_table_stride + block];
  return cache.batch_idx != nullptr ? cache.batch_idx[sequence] : sequence;
}
FLASHTILE_CACHE_INLINE bool is_page(const Cache& cache, int64_t page) {
  return page >= 0 && page < cache.num_pages;
}
// One that can be read; the nearest, where the caller's does not exist.
FLASHTILE_CACHE_INLINE int64_t readable_page(const Cache& cache, int64_t sequence, int64_t block) {
  return clamped(named_page(cache, sequence, block), 0, cache.num_pages - 1);
}

// Where new row i of a sequence goes: row `row` of page `page`, which is row `position` of the
// sequence. page is -1 where there is no place for it, or no row of the rotary tables.
struct NewPlace {
  int64_t page, row, position;
};
FLASHTILE_CACHE_INLINE NewPlace new_place(const AppendParams& params, int64_t sequence, int64_t i) {
  const Problem& problem = params.problem;
  const Cache& cache = problem.cache;
  constexpr NewPlace kNowhere = {-1, 0, 0};
  const int64_t before = rows_before(problem, sequence), position = before + i;
  const bool in_cache = i >= 0 && before >= 0 && position < cache.capacity();
  if (!in_cache || i >= new_rows(cache, sequence).count) return kNowhere;
  if (params.rotary.cos != nullptr && position >= params.rotary.rows) return kNowhere;
  const int64_t block = position / cache.page_size, page = named_page(cache, sequence, block);
  return is_page(cache, page) ? NewPlace{page, position - block * cache.page_size, position}
                              : kNowhere;
}

// Row of the rotary tables for query i of a sequence; it may not exist.
FLASHTILE_CACHE_INLINE int64_t query_position(const AppendParams& params, int64_t sequence,
                                              int64_t i) {
  const int64_t before = rows_before(params.problem, sequence);
  return (before < 0 ? 0 : before) + (params.rotary.q_fixed ? 0 : i);
}

}  // namespace flashtile
