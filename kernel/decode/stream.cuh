// The loads of decoding: keys and values from wherever their pages are to a ring in shared memory.
#pragma once

#include "decode/work.cuh"
#include "tile/cache_rows.cuh"
#include "tile/load_sm80.cuh"

namespace flashtile {

// Keys and values of a part on their way to the ring of `kLoaders` threads, a warp or the block,
// one tile of each at a time. The lanes of a row share the search for its page; it is found one
// tile ahead.
template <class Tile, int kSlots, int kLoaders>
struct DecodeStream {
  using Loader = TileLoader<Tile, kLoaders>;
  using Target = typename Loader::Target;
  static constexpr int kRing = kSlots * Tile::kBytes;
  static constexpr int kAhead = kSlots / 2;              // tiles of K, and of V
  static constexpr int kPassRows = 32 / kThreadsPerRow;  // of a warp
  static constexpr int kWarpRows = kPassRows * Target::kPasses;
  static constexpr int kKeys = kDecodeWarps * kWarpRows;  // of the block's tiles of one turn
  static constexpr int kTurns = kDecodeStep / kKeys;      // of a step
  static_assert(kSlots % 2 == 1 && kTurns * kKeys == kDecodeStep);

  const DecodeParams& params;
  Target target;
  const char *k, *v;       // the lane's first chunk of row 0 of page 0
  int sequence;            // its number
  int origin;              // the sequence's row in the cache that is key 0
  int first, limit;        // rows that the queries see; none in lanes that look up nothing
  int end;                 // of the part's rows
  uint32_t slot = 0;       // of the next item that is ordered, in bytes
  uint32_t read_slot = 0;  // of the next item that is read
  int row = 0;             // of the sequence: the warp's row `lane` of the turn after the next
  int turns = 0;           // still to be ordered
  CachePlace next;         // of the warp's row `lane` in the next turn
  CachePlace on_way[Target::kPasses];  // of the lane's own rows, of which V is not yet ordered

  FLASHTILE_DEVICE DecodeStream(const DecodeParams& p, const DecodeWork& work, uint32_t ring)
      : params(p),
        target(ring, ptx::thread_index() % kLoaders),
        k(cache_head(p.forward.k, work.kv_head) + Loader::first_column()),
        v(cache_head(p.forward.v, work.kv_head) + Loader::first_column()),
        sequence(static_cast<int>(work.sequence.index)),
        origin(static_cast<int>(work.sequence.row_k)),
        first(origin + work.mask.key_begin(0)),
        limit(lane() < kWarpRows ? origin + work.mask.key_end(work.mask.seqlen_q - 1) : 0) {}

  // Orders the first tiles of the part [first_step, last_step).
  FLASHTILE_DEVICE void begin(int first_step, int last_step) {
    end = min(limit, origin + last_step * kDecodeStep);
    turns = (last_step - first_step) * kTurns;
    slot = read_slot = 0;
    row = origin + first_step * kDecodeStep + ptx::thread_index() / 32 * kWarpRows + lane();
    find();
    FLASHTILE_ROLL
    for (int i = 0; i < kAhead; ++i) {
      order_k();
      order_v();
    }
  }

  FLASHTILE_DEVICE void order_k() {
    if (turns > 0) {
      FLASHTILE_UNROLL
      for (int pass = 0; pass < Target::kPasses; ++pass) {
        const int from = load_row<Tile>(lane()) + pass * kPassRows;
        on_way[pass] = {__shfl_sync(0xffffffffu, next.page, from),
                        __shfl_sync(0xffffffffu, next.row, from)};
      }
      copy(k, params.forward.k, params.k);
      find();
    }
    commit();
  }
  FLASHTILE_DEVICE void order_v() {
    if (turns > 0) copy(v, params.forward.v, params.v);
    --turns;
    commit();
  }

  // The slot of the next item, in bytes: K, V, the next K, ...
  FLASHTILE_DEVICE uint32_t take_slot() {
    const uint32_t taken = read_slot;
    read_slot = behind(read_slot);
    return taken;
  }

 private:
  FLASHTILE_DEVICE static uint32_t behind(uint32_t slot) {
    return slot + Tile::kBytes == kRing ? 0 : slot + Tile::kBytes;
  }
  FLASHTILE_DEVICE static int lane() { return ptx::thread_index() % 32; }
  FLASHTILE_DEVICE void find() {
    next = {0, -1};
    if (row >= first && row < end)
      next = cache_place(params.forward.problem.cache, params.page_size, sequence, row);
    row += kKeys;
  }
  FLASHTILE_DEVICE void copy(const char* base, const View& view, const RowFormat& format) {
    FLASHTILE_UNROLL
    for (int pass = 0; pass < Target::kPasses; ++pass) {
      const CachePlace& place = on_way[pass];
      Loader::copy_row(target.at(pass, 0) + slot, base + place_bytes(view, place),
                       place.row >= 0 ? format.bytes - Loader::first_column() : 0, format.unit);
    }
  }
  FLASHTILE_DEVICE void commit() {
    ptx::cp_async_commit();
    slot = behind(slot);
  }
};

}  // namespace flashtile
