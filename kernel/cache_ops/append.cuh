// Writes new keys and values into a cache, and rotates them and the queries on the way.
//
// A thread block has one row, all its heads: of k_new, of v_new, or of q. Its threads take items of
// a head in turn: first those of eight rotated pairs, then chunks of eight numbers that are copied.
// No thread reads what another one writes, so q_out may be q. What cannot be trusted, lengths,
// tables and offsets, comes through cache.h and tile/work.cuh.
#pragma once

#include "cache.h"
#include "launch.cuh"
#include "tile/row_format.cuh"
#include "tile/smem_tile.cuh"
#include "tile/unpack.cuh"
#include "tile/work.cuh"

namespace flashtile {

// The slots of a launch, one thread block each: those of k_new, then as many of v_new, then q's.
struct AppendLaunch {
  AppendParams params;
  int slots_new;
  int slots_q;
  int unit_k, unit_v, unit_q;  // 16 or 2 bytes: how both rows of a copy can be accessed
  int unit_tables;             // of the rows of rotary_cos and rotary_sin
};

// The heads of a row, from one tensor to another.
struct RowMove {
  const char* from;
  char* to;
  int64_t from_head, to_head;  // bytes from head to head
  int heads, head_dim, unit;
  int64_t position;  // row of the rotary tables; -1: copied as it is
};

template <class T>
struct Append {
  using Params = AppendLaunch;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = 8;
  static constexpr int kSharedBytes = 0;
  static constexpr int kItem = 8;  // numbers of a chunk, pairs of a rotated item

  static FLASHTILE_DEVICE void run(const Params& launch, char*) {
    const AppendParams& p = launch.params;
    const int slot = ptx::block_index();
    if (slot >= 2 * launch.slots_new) {
      rotate_query(launch, slot - 2 * launch.slots_new);
    } else if (slot >= launch.slots_new) {
      append(launch, slot - launch.slots_new,
             {p.v_new, p.v_cache, p.problem.head_dim_v, launch.unit_v, false});
    } else {
      append(launch, slot,
             {p.k_new, p.k_cache, p.problem.head_dim, launch.unit_k, p.rotary.cos != nullptr});
    }
  }

 private:
  // A sequence and one of its rows, which may lie past its end.
  struct SequenceRow {
    int64_t sequence, row;
  };
  static FLASHTILE_DEVICE SequenceRow sequence_row(const int32_t* cu_seqlens, int64_t batch,
                                                   int64_t seqlen, int slot) {
    if (cu_seqlens == nullptr) return {slot / seqlen, slot % seqlen};
    const int b = find_sequence(cu_seqlens, static_cast<int>(batch), slot, 1);
    return {b, slot - first_slot(cu_seqlens[b], b, 1)};
  }

  static FLASHTILE_DEVICE int64_t row_bytes(const View& view, int64_t batch, int64_t row) {
    return 2 * (batch * view.stride_batch + row * view.stride_seq);
  }

  // Keys or values.
  struct Side {
    const View &from, &to;
    int64_t head_dim;
    int unit;
    bool rotated;
  };
  static FLASHTILE_DEVICE void append(const Params& launch, int slot, const Side& side) {
    const Problem& problem = launch.params.problem;
    const Cache& cache = problem.cache;
    const auto [sequence, i] =
        sequence_row(cache.cu_seqlens_new, problem.batch, cache.seqlen_new, slot);
    const NewPlace place = new_place(launch.params, sequence, i);
    if (place.page < 0) return;
    const int64_t batch = cache.cu_seqlens_new == nullptr ? sequence : 0;
    const int64_t row = new_rows(cache, sequence).begin + i;
    move(launch,
         {.from = static_cast<const char*>(side.from.data) + row_bytes(side.from, batch, row),
          .to = static_cast<char*>(side.to.data) + row_bytes(side.to, place.page, place.row),
          .from_head = 2 * side.from.stride_head,
          .to_head = 2 * side.to.stride_head,
          .heads = static_cast<int>(problem.num_heads_kv),
          .head_dim = static_cast<int>(side.head_dim),
          .unit = side.unit,
          .position = side.rotated ? place.position : -1});
  }

  static FLASHTILE_DEVICE void rotate_query(const Params& launch, int slot) {
    const AppendParams& p = launch.params;
    const Problem& problem = p.problem;
    const auto [sequence, i] =
        sequence_row(problem.cu_seqlens_q, problem.batch, problem.seqlen_q, slot);
    const SequenceSide side =
        sequence_side(problem.cu_seqlens_q, nullptr, sequence, problem.batch, problem.rows_q());
    if (i < 0 || i >= side.length) return;
    const int64_t batch = problem.is_varlen() ? 0 : sequence;
    const RowMove row = {
        .from = static_cast<const char*>(p.q.data) + row_bytes(p.q, batch, side.row + i),
        .to = static_cast<char*>(p.q_out.data) + row_bytes(p.q_out, batch, side.row + i),
        .from_head = 2 * p.q.stride_head,
        .to_head = 2 * p.q_out.stride_head,
        .heads = static_cast<int>(problem.num_heads),
        .head_dim = static_cast<int>(problem.head_dim),
        .unit = launch.unit_q,
        .position = query_position(p, sequence, i)};
    if (row.position < p.rotary.rows) {
      move(launch, row);
    } else {
      fill_with_nan(row);
    }
  }

  static FLASHTILE_DEVICE void move(const Params& launch, const RowMove& row) {
    const int half = row.position < 0 ? 0 : static_cast<int>(launch.params.rotary.dim / 2);
    const int pairs = (half + kItem - 1) / kItem;  // items of eight pairs
    const int items = pairs + (row.head_dim - 2 * half + kItem - 1) / kItem;
    for (int i = ptx::thread_index(); i < row.heads * items; i += kThreads) {
      const int head = i / items, item = i % items;
      const char* const from = row.from + head * row.from_head;
      char* const to = row.to + head * row.to_head;
      if (item < pairs) {
        rotate(launch, row, from, to, kItem * item);
      } else {
        const int first = 2 * half + kItem * (item - pairs), bytes = 2 * (row.head_dim - first);
        store_chunk(to + 2 * first, load_chunk(from + 2 * first, bytes, row.unit), bytes, row.unit);
      }
    }
  }

  // Where eight pairs lie in a head: two chunks, the second behind the first or half the rotated
  // part further on. Bytes past a pair that exists are not touched.
  struct PairChunks {
    int first, second;              // in bytes
    int first_bytes, second_bytes;  // at most 16 count
  };
  static FLASHTILE_DEVICE PairChunks pair_chunks(const Rotary& rotary, int pair) {
    const int half = static_cast<int>(rotary.dim / 2), left = half - pair;
    if (rotary.halves) return {2 * pair, 2 * (half + pair), 2 * left, 2 * left};
    return {4 * pair, 4 * pair + kChunkBytes, 4 * left, 4 * left - kChunkBytes};
  }

  // Pairs `pair` to `pair` + 7 of a head: (x, y) -> (x cos - y sin, x sin + y cos).
  static FLASHTILE_DEVICE void rotate(const Params& launch, const RowMove& row, const char* from,
                                      char* to, int pair) {
    const Rotary& rotary = launch.params.rotary;
    const PairChunks at = pair_chunks(rotary, pair);
    const int64_t angle = 2 * (row.position * rotary.stride + pair);
    const int angle_bytes = static_cast<int>(rotary.dim) - 2 * pair;
    float numbers[2 * kItem], cosines[kItem], sines[kItem];
    unpack_chunk(load_chunk(from + at.first, at.first_bytes, row.unit), numbers);
    unpack_chunk(load_chunk(from + at.second, at.second_bytes, row.unit), numbers + kItem);
    unpack_chunk(
        load_chunk(static_cast<const char*>(rotary.cos) + angle, angle_bytes, launch.unit_tables),
        cosines);
    unpack_chunk(
        load_chunk(static_cast<const char*>(rotary.sin) + angle, angle_bytes, launch.unit_tables),
        sines);
    float turned[2 * kItem];
    FLASHTILE_UNROLL
    for (int i = 0; i < kItem; ++i) {
      const float x = rotary.halves ? numbers[i] : numbers[2 * i];
      const float y = rotary.halves ? numbers[i + kItem] : numbers[2 * i + 1];
      const float turned_x = x * cosines[i] - y * sines[i];
      const float turned_y = x * sines[i] + y * cosines[i];
      turned[i] = turned_x;
      turned[i + kItem] = turned_y;
    }
    uint4 first, second;
    pack_turned(turned, rotary.halves, first, second);
    store_chunk(to + at.first, first, at.first_bytes, row.unit);
    store_chunk(to + at.second, second, at.second_bytes, row.unit);
  }

  static FLASHTILE_DEVICE void unpack_chunk(const uint4& chunk, float* numbers) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    FLASHTILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<T>(words[i]);
      numbers[2 * i] = pair.x;
      numbers[2 * i + 1] = pair.y;
    }
  }

  // Eight x and then eight y: back into chunks of x and of y, or of pairs.
  static FLASHTILE_DEVICE void pack_turned(const float* turned, bool halves, uint4& first,
                                           uint4& second) {
    uint32_t words[kItem];
    FLASHTILE_UNROLL
    for (int i = 0; i < kItem; ++i) {
      const float low = halves ? turned[2 * i] : turned[i];
      const float high = halves ? turned[2 * i + 1] : turned[i + kItem];
      words[i] = ptx::pack<T>(low, high);
    }
    first = make_uint4(words[0], words[1], words[2], words[3]);
    second = make_uint4(words[4], words[5], words[6], words[7]);
  }

  static FLASHTILE_DEVICE void fill_with_nan(const RowMove& row) {
    constexpr uint16_t kNan = 0x7fff;  // fp16 and bf16
    for (int i = ptx::thread_index(); i < row.heads * row.head_dim; i += kThreads) {
      const int head = i / row.head_dim, d = i % row.head_dim;
      reinterpret_cast<uint16_t*>(row.to + head * row.to_head)[d] = kNan;
    }
  }
};

}  // namespace flashtile
