// The loads of decoding: keys and values from wherever their pages are to shared memory, a warp's
// own.
#pragma once

#include "decode_plan.cuh"
#include "tile/cache_rows.cuh"
#include "tile/load_sm80.cuh"

namespace flashtile {

// Keys and values of a part on their way to a warp's ring, 16 rows of each at a time. `Tile`: these
// 16 rows. The lanes of a row share the search for its page; it is found one step ahead.
template <class Tile, int kSlots>
struct DecodeStream {
  using Loader = TileLoader<Tile, 32>;
  using Target = typename Loader::Target;
  static constexpr int kRing = kSlots * Tile::kBytes;
  static constexpr int kAhead = kSlots / 2;  // steps

  const DecodeParams& params;
  Target target;
  const char *k, *v;  // the lane's first chunk of row 0 of page 0
  int sequence;       // its number
  int origin;         // the sequence's row in the cache that is key 0
  int first, limit;   // rows that the tile sees; none in lanes from 16 on: they look up nothing
  int end;            // of the part's rows
  uint32_t slot = 0;  // of the next item that is ordered, in bytes
  uint32_t read_slot = 0;  // of the next item that is read
  int row = 0;             // of the sequence: row `lane` of the step after the next
  int steps = 0;           // still to be ordered
  CachePlace next;         // of row `lane` in the next step
  CachePlace on_way[2];    // of the lane's own rows, whose K has been ordered and V has not

  FLASHTILE_DEVICE DecodeStream(const DecodeParams& p, const DecodeTile& work, const BandMask& mask,
                                uint32_t ring)
      : params(p),
        target(ring, lane()),
        k(first_chunk(p.forward.k, work.kv_head)),
        v(first_chunk(p.forward.v, work.kv_head)),
        sequence(static_cast<int>(work.sequence.index)),
        origin(static_cast<int>(work.sequence.row_k)),
        first(origin + mask.key_begin(work.query(0, p.plan.group))),
        limit(lane() < Tile::kRows
                  ? origin + mask.key_end(work.query(work.count() - 1, p.plan.group))
                  : 0) {}

  // Orders the first steps of the part [first_step, last_step).
  FLASHTILE_DEVICE void begin(int first_step, int last_step) {
    end = min(limit, origin + last_step * kDecodeStep);
    steps = last_step - first_step;
    slot = read_slot = 0;
    row = origin + first_step * kDecodeStep + ptx::thread_index() / 32 * Tile::kRows + lane();
    find();
    FLASHTILE_ROLL
    for (int i = 0; i < kAhead; ++i) {
      order_k();
      order_v();
    }
  }

  FLASHTILE_DEVICE void order_k() {
    if (steps > 0) {
      FLASHTILE_UNROLL
      for (int pass = 0; pass < 2; ++pass) {
        const int from = load_row<Tile>(lane()) + pass * Target::kRowsPerPass;
        on_way[pass] = {__shfl_sync(0xffffffffu, next.page, from),
                        __shfl_sync(0xffffffffu, next.row, from)};
      }
      copy(k, params.forward.k, params.k);
      find();
    }
    commit();
  }
  FLASHTILE_DEVICE void order_v() {
    if (steps > 0) copy(v, params.forward.v, params.v);
    --steps;
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
  FLASHTILE_DEVICE static const char* first_chunk(const View& view, int head) {
    return static_cast<const char*>(view.data) + 2 * (head * view.stride_head) +
           Loader::first_column();
  }
  FLASHTILE_DEVICE void find() {
    next = {0, -1};
    if (row >= first && row < end)
      next = cache_place(params.forward.problem.cache, params.page_size, sequence, row);
    row += kDecodeStep;
  }
  FLASHTILE_DEVICE void copy(const char* base, const View& view, const RowFormat& format) {
    FLASHTILE_UNROLL
    for (int pass = 0; pass < 2; ++pass) {
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
