// A random key/value cache from a seed: sequences, pages, padding, rows that are appended with or
// without rotation, mask, splits. And what it takes to pass: the bytes of the cache, the error
// bound, and the same bits when a sequence is alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "../support/append_case.h"
#include "../support/attempt.h"
#include "random_case.h"

namespace flashtile::test {

struct FuzzCache {
  CacheSpec spec;
  int rotary_dim = 0;  // 0: none
  uint32_t rotary_flags = 0;
  bool in_place = false;  // q is rotated where it is
  uint64_t seed = 1;

  std::string name() const {
    std::string text = spec.name() + ", splits " + std::to_string(spec.num_splits);
    if (rotary_dim > 0)
      text += ", rotary " + std::to_string(rotary_dim) + "/" + std::to_string(rotary_flags);
    for (const CacheSequence& s : spec.sequences) {
      text += " (" + std::to_string(s.queries) + " on " + std::to_string(s.keys) + "+" +
              std::to_string(s.added) + ", leftpad " + std::to_string(s.leftpad) + ")";
    }
    return text;
  }
  CacheSpec with_values(uint64_t values_seed) const {
    CacheSpec other = spec;
    for (size_t b = 0; b < other.sequences.size(); ++b)
      other.sequences[b].seed = values_seed * 64 + b;
    return other;
  }
};

inline int random_queries(Draw& draw) {
  if (draw.chance(0.5)) return 1;
  if (draw.chance(0.6)) return draw.between(2, 8);
  return draw.chance(0.2) ? 0 : draw.between(9, 70);
}

inline CacheSequence random_sequence(Draw& draw, int most) {
  CacheSequence sequence;
  sequence.keys = draw.chance(0.15) ? draw.between(0, 4 * most) : random_length(draw, most);
  sequence.queries = random_queries(draw);
  if (draw.chance(0.3)) sequence.leftpad = draw.between(0, 70);
  return sequence;
}

// In one tensor every sequence has as many queries and new rows as the first.
inline void random_sequences(Draw& draw, CacheSpec& spec, int most) {
  spec.sequences.clear();
  const bool append = draw.chance(0.5);
  for (int n = draw.between(1, 5); n > 0; --n) {
    CacheSequence sequence = random_sequence(draw, most);
    if (append) sequence.added = draw.chance(0.7) ? sequence.queries : draw.between(0, 20);
    if (spec.page_size > 1 && draw.chance(0.3)) {  // ends at the edge of a page
      const int pages = draw.between(1, std::max(1, most / spec.page_size));
      const int rows = pages * spec.page_size + draw.between(-1, 1);
      sequence.keys = std::max(0, rows - sequence.leftpad - sequence.added);
    }
    if (!spec.packed && !spec.sequences.empty()) {
      sequence.queries = spec.sequences[0].queries;
      sequence.added = spec.sequences[0].added;
    }
    spec.sequences.push_back(sequence);
  }
}

inline int64_t work_of(const CacheSpec& spec) {
  int64_t pairs = 0, rows = 0;
  for (const CacheSequence& s : spec.sequences) {
    pairs += int64_t{s.queries} * (s.keys + s.added);
    rows += s.keys + s.added;
  }
  // Every row is drawn, gathered and compared, which costs as much as some products.
  return (pairs * spec.heads + 40 * rows * spec.heads_kv) * (spec.dims.qk + spec.dims.v);
}

inline FuzzCache random_cache(uint64_t seed, const FuzzRange& range) {
  Draw draw(seed);
  FuzzCache c;
  CacheSpec& spec = c.spec;
  c.seed = seed;
  spec.dtype = draw.one_of(range.dtypes);
  spec.dims = random_head_dims(draw, range);
  spec.heads_kv = draw.one_of<int>({1, 1, 2, 3});
  spec.heads = spec.heads_kv * draw.one_of<int>({1, 2, 3, 4, 4, 8, 16, 20});
  spec.page_size = draw.one_of<int>({0, 0, 1, 7, 16, 16, 48, 128, 256});
  if (spec.page_size > 0 && draw.chance(0.2)) spec.page_size = draw.between(2, 300);
  spec.batch_idx = spec.page_size == 0 && draw.chance(0.5);
  spec.packed = draw.chance(0.5);
  spec.num_splits = draw.one_of<int>({0, 0, 0, 1, 2, 3, 7, 40});
  spec.layout_k = draw.one_of<Layout>({Layout::kOdd, Layout::kPadded});
  spec.layout_seed = draw.next();
  do {
    random_sequences(draw, spec, draw.one_of<int>({600, 300, 140, 70, 40, 20}));
  } while (work_of(spec) > range.work);
  int longest = 1;
  bool appends = false;
  for (const CacheSequence& s : spec.sequences) {
    longest = std::max(longest, s.keys + s.added);
    appends |= s.added > 0;
  }
  spec.mask = random_mask(draw, longest);
  if (spec.dtype == Dtype::kFloat32) spec.dtype_kv = narrow_keys(draw);
  if (!spec.dtype_kv && appends && spec.dims.qk >= 2 && draw.chance(0.4)) {
    c.rotary_dim = draw.chance(0.4) ? spec.dims.qk / 2 * 2 : 2 * draw.between(1, spec.dims.qk / 2);
    c.rotary_flags = static_cast<uint32_t>(draw.between(0, 3));
    c.in_place = draw.chance(0.4);
  }
  return c;
}

// Appends and holds the cache against what it has to be.
inline std::string append_and_compare(const CacheBackend& backend, Appending& what) {
  const CacheCall before = what.call;
  HostTensor k = before.k, v = before.v;
  expect_rows(before, k, v);
  std::string error = backend.append(what, what.call.problem());
  if (!error.empty()) return error;
  if (what.call.v.bytes() != v.bytes()) return "the cache's v is not what it should be";
  if (!what.table.has_value())
    return what.call.k.bytes() == k.bytes() ? "" : "the cache's k is not what it should be";
  if (!what.q_out.gaps_are_untouched() || !what.call.k.gaps_are_untouched())
    return "the rotation wrote between rows";
  const double worst = rotation_error(before, *what.table, what);
  return worst <= 1.0 ? "" : "the rotation errs by " + std::to_string(worst) + " of what it may";
}

// The sequence alone, on other pages and behind no padding, has the same bits.
inline std::string compare_alone(const CacheSpec& spec, const CacheCall& call,
                                 const CacheResult& result, const CacheBackend& backend) {
  const size_t chosen = spec.layout_seed % spec.sequences.size();
  CacheSpec alone = spec;
  alone.sequences = {spec.sequences[chosen]};
  alone.sequences[0].leftpad = 0;
  alone.sequences[0].keys += alone.sequences[0].added;
  alone.sequences[0].added = 0;
  alone.page_size = spec.page_size == 16 ? 0 : 16;
  alone.packed = true;
  alone.batch_idx = false;
  CacheCall other(alone);
  // The same numbers: a sequence draws its queries, then its keys, whether appended or not.
  const CacheResult found = backend.forward(other, other.problem());
  if (!found.error.empty()) return found.error;
  return rows_of(other, found, 0) == rows_of(call, result, chosen)
             ? ""
             : "sequence " + std::to_string(chosen) + " has other bits when it is alone; ";
}

// `change`: of what the truth is computed from; a planted bug.
inline Attempt attempt_cache(const FuzzCache& c, uint64_t values_seed, const CacheBackend& backend,
                             const std::function<void(AttentionInput&)>& change) {
  const CacheSpec spec = c.with_values(values_seed);
  Appending what = {CacheCall(spec)};
  if (c.rotary_dim > 0) {
    int rows = 1;
    for (const CacheSequence& s : spec.sequences)
      rows = std::max(rows, s.leftpad + s.keys + std::max(s.added, s.queries));
    what.table.emplace(spec.dtype, rows, c.rotary_dim, c.rotary_flags);
    what.q_out = HostTensor(spec.dtype, what.call.q.extents(), Layout::kOdd);
    what.in_place = c.in_place;
  }
  Attempt attempt;
  attempt.wrong = append_and_compare(backend, what);
  if (!attempt.wrong.empty()) return attempt;
  const CacheResult result = backend.forward(what.call, what.call.problem());
  attempt.wrong = result.error;
  if (!attempt.wrong.empty()) return attempt;
  if (c.rotary_dim == 0) attempt.wrong = compare_alone(spec, what.call, result, backend);
  attempt.result.values.out = result.out;
  attempt.result.values.lse = result.lse;
  AttentionInput input = what.call.gathered();
  change(input);
  const Setup setup = cache_setup(spec);
  judge(setup, Truth(setup, input), attempt);
  return attempt;
}

}  // namespace flashtile::test
