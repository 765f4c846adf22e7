// Forward for few query rows per key/value head (decoding): reading the keys and values once is
// most of the cost, so nothing is packed that is used only a few times.
//
// Keys are cut into parts of whole chunks; a task is (sequence, part, key/value head), the head
// innermost because rows of one token lie together, and covers all query rows of the head's group.
// Each leaves an unnormalised output and its softmax state; a second phase merges the parts of a
// row in order, so the result does not depend on the number of threads. Chunks that no query sees
// are not read.
//
// How rows meet a chunk is the matter of `Few` or, with kManyRows or more, of `Many`: VectorDecode
// (decode_vector.h) or TileDecode (decode_tiles.h).
//
// A sequence is cut into as many parts as its own length asks for, and into no more than the
// scratch memory has to have room for, which must not grow with a cache's capacity.
#pragma once

#include "arena.h"
#include "decode_vector.h"
#include "engine.h"
#include "parallel.h"
#include "scores.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

constexpr int64_t kParts = 32;      // of a sequence, at most
constexpr int64_t kPartKeys = 256;  // of a part, at least: each costs an output that is merged

template <class Few, class Many = Few>
class Decode {
 public:
  using T = typename Few::Storage;     // of q and out
  using K = typename Few::KeyStorage;  // of k and v
  using C = Compute<T>;

  Decode(const ForwardParams& params, const Scores& scores, const Extent& extent, int threads)
      : params_(params),
        problem_(params.problem),
        scores_(scores),
        extent_(extent),
        threads_(threads),
        tile_bytes_(tile_bytes(problem_, scores, extent)),
        group_(problem_.group()) {}

  static Scratch scratch(const Problem& problem, const Scores& scores, const Extent& extent,
                         int threads) {
    const size_t shares =
        static_cast<size_t>(all_parts(problem, extent) * problem.num_heads * extent.max_q);
    const size_t bytes = static_cast<size_t>(threads) * tile_bytes(problem, scores, extent) +
                         shares * share_bytes(problem);
    return {bytes, bytes};
  }

  void run() {
    const bool flush = sizeof(C) == sizeof(float);
    const int64_t heads = problem_.num_heads_kv;
    const int64_t parts = most_parts(problem_, extent_);
    parallel_for(threads_, problem_.batch * parts * heads, flush, [&](int64_t task, int thread) {
      attend(task / heads / parts, task / heads % parts, task % heads, thread);
    });
    parallel_for(threads_, problem_.batch * problem_.num_heads, flush, [&](int64_t task, int) {
      merge(task / problem_.num_heads, task % problem_.num_heads);
    });
  }

 private:
  static constexpr int64_t kManyRows = 8;  // packing pays for itself

  // The output of one query row over one part: [head_dim_v], unnormalised, and its state.
  struct Share {
    C* out;
    RowState<C>* state;
  };

  static int64_t allowed_parts(const Problem& problem) {
    return problem.cache.num_splits > 0 ? problem.cache.num_splits : kParts;
  }
  // Keys of a part, from the length of the sequence alone.
  static int64_t part_keys(const Problem& problem, int64_t keys) {
    const int64_t allowed = allowed_parts(problem);
    return larger_of(round_up((keys + allowed - 1) / allowed, kDecodeKeys), kPartKeys);
  }
  // Of a sequence.
  static int64_t most_parts(const Problem& problem, const Extent& extent) {
    return smaller_of(allowed_parts(problem), (extent.max_k + kPartKeys - 1) / kPartKeys);
  }
  static bool is_packed(const Problem& problem) {
    return problem.is_varlen() && !problem.cache.exists();
  }
  // Of all sequences: each begins a part of its own.
  static int64_t all_parts(const Problem& problem, const Extent& extent) {
    return is_packed(problem) ? problem.total_k / kPartKeys + problem.batch
                              : problem.batch * most_parts(problem, extent);
  }
  static int64_t rows_of(const Problem& problem, const Extent& extent) {
    return problem.group() * extent.max_q;
  }
  static size_t tile_bytes(const Problem& problem, const Scores& scores, const Extent& extent) {
    Arena few(nullptr), many(nullptr);
    Few::Tile::take(few, rows_of(problem, extent), problem, scores);
    Many::Tile::take(many, rows_of(problem, extent), problem, scores);
    return few.used() > many.used() ? few.used() : many.used();
  }
  static size_t share_bytes(const Problem& problem) {
    const int64_t dim = round_up(problem.head_dim_v, kLanes<C>);
    return static_cast<size_t>(dim + 2 * kLanes<C>) * sizeof(C);
  }
  char* workspace() const { return static_cast<char*>(params_.workspace); }
  Share share(const Sequence& seq, int64_t head_query, int64_t part) const {
    const int64_t first = is_packed(problem_) ? seq.k_begin / kPartKeys + seq.index
                                              : seq.index * most_parts(problem_, extent_);
    const int64_t row = (first + part) * problem_.num_heads * extent_.max_q + head_query;
    C* const at = reinterpret_cast<C*>(workspace() + static_cast<size_t>(threads_) * tile_bytes_ +
                                       static_cast<size_t>(row) * share_bytes(problem_));
    return {at + 2 * kLanes<C>, reinterpret_cast<RowState<C>*>(at)};
  }
  int64_t head_query(int64_t head, int64_t query) const { return head * extent_.max_q + query; }

  // All query rows of the group of `head` against one part of its keys. Row r of the tile is query
  // r / group of head head * group + r % group.
  void attend(int64_t batch, int64_t part, int64_t head, int thread) const {
    const Sequence seq = sequence_of(problem_, batch);
    if (seq.q_len == 0 || extent_.leaves_out(seq.q_len)) return;
    const int64_t count = part_keys(problem_, seq.k_len);
    const Range seen = seq.visible.keys_of_group(0, seq.q_len);
    const Range keys = {larger_of(part * count, round_down(seen.begin, kDecodeKeys)),
                        smaller_of((part + 1) * count, seen.end)};
    if (keys.empty()) return;
    if (group_ * seq.q_len < kManyRows) {
      attend_part<Few>(seq, {head, part}, keys, thread);
    } else {
      attend_part<Many>(seq, {head, part}, keys, thread);
    }
  }

  struct Place {
    int64_t head, part;
  };

  template <class Products>
  void attend_part(const Sequence& seq, const Place& place, const Range& keys, int thread) const {
    const int64_t rows = group_ * seq.q_len, head = place.head * group_;
    Arena arena(workspace() + static_cast<size_t>(thread) * tile_bytes_);
    const GroupScores<C> scores(problem_, scores_, seq, head);
    Products products(problem_, scores, rows, Products::Tile::take(arena, rows, problem_, scores_));
    for (int64_t r = 0; r < rows; ++r) {
      const Rows<const T> q = query_rows<const T>(params_.q, seq, head + r % group_);
      products.begin(r, q.row(r / group_));
    }
    for (int64_t k0 = keys.begin; k0 < keys.end; k0 += kDecodeKeys)
      attend_chunk(seq, products, place.head, k0);
    for (int64_t r = 0; r < rows; ++r) {
      const Share to = share(seq, head_query(head + r % group_, r / group_), place.part);
      *to.state = products.state(r);
      for (int64_t d = 0; d < problem_.head_dim_v; d += kLanes<C>) {
        store(to.out + d, load(products.out(r) + d));
      }
    }
  }

  // Adds the chunk of keys that starts at k0.
  template <class Products>
  void attend_chunk(const Sequence& seq, Products& products, int64_t head, int64_t k0) const {
    const int64_t count = smaller_of(kDecodeKeys, seq.k_len - k0);
    const Visible visible = seq.visible.block(0, seq.q_len, k0, count);
    if (!problem_.cache.exists()) {
      return products.attend(key_rows<const K>(params_.k, seq, head).from(k0),
                             key_rows<const K>(params_.v, seq, head).from(k0), k0, visible);
    }
    const K *k[kDecodeKeys], *v[kDecodeKeys];
    list_keys(problem_, params_.k, seq, head, {k0, k0 + count}, k);
    list_keys(problem_, params_.v, seq, head, {k0, k0 + count}, v);
    products.attend(RowList<const K>{k}, RowList<const K>{v}, k0, visible);
  }

  void merge(int64_t batch, int64_t head) const {
    const Sequence seq = sequence_of(problem_, batch);
    const Range keys = seq.visible.keys_of_group(0, seq.q_len);
    if (extent_.leaves_out(seq.q_len)) return;
    const int64_t count = part_keys(problem_, seq.k_len);
    const Range parts = {keys.begin / count, (keys.end + count - 1) / count};
    const Rows<T> out = query_rows<T>(params_.out, seq, head);
    const RowValues lse = row_values(problem_, params_.lse, seq, head);
    const HeadScores<C> scores(problem_, scores_, seq, head);
    C most = -kInfinity<C>;
    for (int64_t i = 0; i < seq.q_len; ++i) {
      const bool sees_keys = !seq.visible.keys_of(i).empty();
      RowState<C> state;
      const C* sum = nullptr;
      if (!keys.empty()) {
        state = merge_row(seq, head_query(head, i), parts, scores.factor());
        sum = share(seq, head_query(head, i), parts.begin).out;
      }
      finish_row<T>({sum, state, sees_keys, scores.scale(), scores.row_end(i)}, problem_.head_dim_v,
                    out.row(i), lse.from(i));
      if (state.largest > most) most = state.largest;
    }
    scores.raise_max_logit(static_cast<double>(most) * scores.scale());
  }

  // The state of a row over all parts; its output is summed up in the share of the first.
  RowState<C> merge_row(const Sequence& seq, int64_t row, const Range& parts,
                        C logit_factor) const {
    RowState<C> all;
    for (int64_t p = parts.begin; p < parts.end; ++p) {
      const C largest = share(seq, row, p).state->largest;
      if (largest > all.largest) all.largest = largest;
    }
    const C base = all.largest == -kInfinity<C> ? C{0} : all.largest;
    for (int64_t p = parts.begin; p < parts.end; ++p) {
      RowState<C>& state = *share(seq, row, p).state;
      const C factor = exp2<C, kExp2Degree<T>>(splat(state.largest - base), logit_factor)[0];
      all.sum += state.sum * factor;
      state.largest = factor;  // its use from here on
    }
    C* const to = share(seq, row, parts.begin).out;
    for (int64_t d = 0; d < problem_.head_dim_v; d += kLanes<C>) {
      Vec<C> sum{};
      for (int64_t p = parts.begin; p < parts.end; ++p) {
        const Share from = share(seq, row, p);
        sum += load(from.out + d) * from.state->largest;
      }
      store(to + d, sum);
    }
    return all;
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const Scores& scores_;
  const Extent extent_;
  const int threads_;
  const size_t tile_bytes_;
  const int64_t group_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
