// Which rows a thread block works on: (block of rows, head, sequence) from one linear block index.
//
// Varlen needs no list of tiles and no longest length: with cu = cu_seqlens, sequence b owns the
// slots start(b) = cu[b] / kBlock + b onwards. start grows by at least ceil(length / kBlock) per
// sequence, so slots never collide, and a slot finds its sequence by binary search. Slots past a
// sequence's end have nothing to do. Padded workspace rows use the same slots: row = slot * kBlock
// + r.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../ptx/common.cuh"
#include "mask.cuh"

namespace flashtile {

// The rows of one sequence. Its tiles write all the rows that it owns: those in use with results,
// the others with zeros. In varlen the last sequence owns what lies behind it, too.
struct Sequence {
  int64_t batch = 0;  // index of the dense batch; 0 in varlen
  int64_t row_q = 0;  // first row in q
  int64_t row_k = 0;  // first row in k
  int seqlen_q = 0;   // rows in use
  int seqlen_k = 0;
  int owned_q = 0;  // rows written
  int owned_k = 0;
  int64_t index = 0;  // of the sequence
};

// Slots that cover every row once: grid size and padded workspace length, in blocks of `block`
// rows.
FLASHTILE_HOST_DEVICE int64_t slot_count(bool varlen, int64_t batch, int64_t seqlen, int64_t total,
                                         int block) {
  return varlen ? total / block + batch : batch * ((seqlen + block - 1) / block);
}

// Slot of a sequence's first block.
FLASHTILE_HOST_DEVICE int64_t first_slot(int64_t row, int64_t index, int block) {
  return row / block + index;
}

// The last sequence that has begun, or the first.
template <class HasBegun>
FLASHTILE_DEVICE int last_begun(int batch, const HasBegun& has_begun) {
  int low = 0, high = batch - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (has_begun(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}
// The last sequence whose first slot is <= slot.
FLASHTILE_DEVICE int find_sequence(const int32_t* cu_seqlens, int batch, int64_t slot, int block) {
  return last_begun(batch, [=](int b) { return first_slot(cu_seqlens[b], b, block) <= slot; });
}

// Where one side (queries or keys) of a sequence lies.
struct SequenceSide {
  int64_t row;
  int length, owned;
};

// Everything that device memory says is clamped to the tensor, so wrong offsets cannot leave it.
FLASHTILE_DEVICE SequenceSide sequence_side(const int32_t* cu_seqlens, const int32_t* seqused,
                                            int64_t index, int64_t batch, int64_t rows) {
  const auto clamp = [](int64_t x, int64_t low, int64_t high) { return min(max(x, low), high); };
  int64_t begin = 0, end = rows, owned_end = rows;
  if (cu_seqlens != nullptr) {
    begin = clamp(cu_seqlens[index], 0, rows);
    end = clamp(cu_seqlens[index + 1], begin, rows);
    owned_end = index + 1 == batch ? rows : end;
  }
  if (seqused != nullptr) end = begin + clamp(seqused[index], 0, end - begin);
  return {begin, static_cast<int>(end - begin), static_cast<int>(owned_end - begin)};
}

FLASHTILE_DEVICE SequenceSide query_side(const Problem& p, int64_t index) {
  return sequence_side(p.cu_seqlens_q, p.seqused_q, index, p.batch, p.rows_q());
}
FLASHTILE_DEVICE Sequence sequence_from(const Problem& p, int64_t index, const SequenceSide& q,
                                        const SequenceSide& k) {
  return {.batch = p.is_varlen() ? 0 : index,
          .row_q = q.row,
          .row_k = k.row,
          .seqlen_q = q.length,
          .seqlen_k = k.length,
          .owned_q = q.owned,
          .owned_k = k.owned,
          .index = index};
}

// Sequence `index` of a problem, dense or varlen.
FLASHTILE_DEVICE Sequence sequence_of(const Problem& p, int64_t index) {
  const SequenceSide q = query_side(p, index);
  return sequence_from(p, index, q,
                       sequence_side(p.cu_seqlens_k, p.seqused_k, index, p.batch, p.rows_k()));
}

// What a thread block works on: a block of rows of one head.
struct RowBlock {
  Sequence sequence;
  int head = 0;
  int row0 = 0;   // first row, within the sequence
  int rows = 0;   // in use, from row0 on; may be negative
  int owned = 0;  // to be written, from row0 on
  // The backward's: slots of the workspace, of the block and of the sequence's first queries.
  int64_t slot = 0;
  int64_t first_slot_q = 0;

  // A slot past the sequence's rows, or before the first sequence: nothing to write.
  FLASHTILE_DEVICE bool empty() const { return owned <= 0 || row0 < 0; }
};

enum class Side { kQueries, kKeys };

template <Side kSide>
FLASHTILE_DEVICE RowBlock block_from(int row0, int head, const Sequence& sequence) {
  constexpr bool kQueries = kSide == Side::kQueries;
  return {.sequence = sequence,
          .head = head,
          .row0 = row0,
          .rows = (kQueries ? sequence.seqlen_q : sequence.seqlen_k) - row0,
          .owned = (kQueries ? sequence.owned_q : sequence.owned_k) - row0};
}

// Blocks of queries per head and, when dense, per batch.
FLASHTILE_HOST_DEVICE int64_t query_blocks(const Problem& problem, int block) {
  return problem.is_varlen() ? slot_count(true, problem.batch, 0, problem.total_q, block)
                             : slot_count(false, 1, problem.seqlen_q, 0, block);
}
FLASHTILE_HOST_DEVICE int64_t query_tile_count(const Problem& problem, int block) {
  const int64_t per_head = problem.is_varlen() ? (problem.batch > 0 ? 1 : 0) : problem.batch;
  return query_blocks(problem, block) * problem.num_heads * per_head;
}

// Blocks of one head run together, so that its keys and values stay in the L2 cache; the last
// queries, which see the most keys under a causal mask, start first. `sequence_of`: where a
// sequence's rows are found.
template <class SequenceOf>
FLASHTILE_DEVICE RowBlock query_block(const Problem& problem, int index, int blocks, int block,
                                      const SequenceOf& sequence_of) {
  const int heads = static_cast<int>(problem.num_heads);
  const int outer = index / blocks;
  const int slot = blocks - 1 - index % blocks;
  const int head = outer % heads;
  if (!problem.is_varlen()) {
    return block_from<Side::kQueries>(slot * block, head, sequence_of(problem, outer / heads));
  }
  const int b = find_sequence(problem.cu_seqlens_q, static_cast<int>(problem.batch), slot, block);
  const Sequence sequence = sequence_of(problem, b);
  const int row0 = static_cast<int>(slot - first_slot(sequence.row_q, b, block)) * block;
  return block_from<Side::kQueries>(row0, head, sequence);
}

FLASHTILE_DEVICE RowBlock query_block(const Problem& problem, int index, int blocks, int block) {
  return query_block(problem, index, blocks, block, sequence_of);
}

// The key/value head of a query head. By hand: Problem::group() divides 64 bits, which takes a
// call.
FLASHTILE_DEVICE int key_head(const Problem& problem, int head) {
  return head / (static_cast<int>(problem.num_heads) / static_cast<int>(problem.num_heads_kv));
}

FLASHTILE_DEVICE BandMask band_mask(const Problem& problem, const Sequence& sequence) {
  return BandMask(problem.band, sequence.seqlen_q, sequence.seqlen_k);
}

// Blocks of keys that a tile of queries visits; none when all its queries are unused.
FLASHTILE_DEVICE BlockRange key_blocks(const Problem& problem, const RowBlock& work, int block_q,
                                       int block_k) {
  if (work.row0 >= work.sequence.seqlen_q) return {0, 0, 0, 0};
  return band_mask(problem, work.sequence).key_blocks(work.row0, block_q, block_k);
}

// Column `column` in row `row` of a head's tensor; a row's number.
FLASHTILE_DEVICE char* row_address(const View& view, const Sequence& sequence, int64_t row,
                                   int head, int column = 0) {
  return static_cast<char*>(view.data) +
         2 * (sequence.batch * view.stride_batch + row * view.stride_seq + head * view.stride_head +
              column);
}
FLASHTILE_DEVICE float* row_address(const RowView& view, const Sequence& sequence, int64_t row,
                                    int head) {
  return view.data + sequence.batch * view.stride_batch + head * view.stride_head + row;
}

}  // namespace flashtile
