// Forward over a key/value cache on CUDA, decoding and prefill, against manual attention over the
// gathered rows. cache_case.h says what is poison.
#include "../support/check.h"
#include "cache_on_device.h"

using namespace flashtile::test;

namespace {

const int kPageSizes[] = {0, 1, 7, 16, 48, 128, 256};
const Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16};

}  // namespace

TEST("pages of every size: decode and prefill in one call") {
  need_device();
  for (const int page_size : kPageSizes) {
    for (const Dtype dtype : kDtypes) {
      check_cache_on_devices(
          {.dtype = dtype,
           .heads = 4,
           .heads_kv = 2,
           .sequences = mixed_sequences(),
           .page_size = page_size,
           .batch_idx = page_size == 0,
           .packed = true,
           .layout_seed = static_cast<uint64_t>(page_size),
           .layout_k = dtype == Dtype::kFloat16 ? Layout::kOdd : Layout::kPadded},
          page_size == 7);
    }
  }
}

TEST("head dims of every class, on pages of 16 and 7") {
  need_device();
  const HeadDims all[] = {1, 8, 33, 64, 80, 96, 128, 160, 192, 256, {192, 128}, {64, 200}};
  size_t i = 0;
  for (const HeadDims& dims : all) {
    if (slice_of(dims) == 0) continue;
    for (const int page_size : {7, 16}) {
      check_cache_on_devices(
          {.dtype = kDtypes[++i % 2],
           .dims = dims,
           .sequences = {{.seed = 1, .keys = 140}, {.seed = 2, .keys = 83, .queries = 37}},
           .page_size = page_size,
           .packed = true,
           .layout_k = page_size == 7 ? Layout::kOdd : Layout::kPadded});
    }
  }
}

TEST("heads in groups of 1 to 16, and one key head for all") {
  need_device();
  const std::pair<int, int> heads[] = {{1, 1}, {6, 3},  {3, 1},  {8, 2}, {14, 2},
                                       {8, 1}, {16, 1}, {32, 2}, {24, 1}};
  for (const auto& [q, kv] : heads) {
    for (const int queries : {1, 2, 9}) {
      check_cache_on_devices({.dtype = kDtypes[queries % 2],
                              .heads = q,
                              .heads_kv = kv,
                              .sequences = {{.seed = 1, .keys = 200, .queries = queries},
                                            {.seed = 2, .keys = 3, .queries = queries}},
                              .page_size = 16});
    }
  }
}

TEST("masks: full, causal, windows, from the top left; more queries than keys") {
  need_device();
  for (const Mask& mask :
       {kFull, kCausal, Mask{40, 0}, Mask{17, 9}, Mask{0, 30}, kCausalTopLeft, Mask{5, 5, true}}) {
    for (const int page_size : {0, 48}) {
      CacheSpec spec = {.dtype = kDtypes[page_size == 0],
                        .heads = 2,
                        .heads_kv = 2,
                        .sequences = mixed_sequences(),
                        .page_size = page_size,
                        .packed = true,
                        .mask = mask};
      spec.sequences.push_back({.seed = 9, .keys = 7, .queries = 30});
      spec.sequences.push_back({.seed = 10, .keys = 700, .queries = 2});
      spec.sequences.push_back({.seed = 11, .keys = 300, .queries = 100});
      check_cache_on_devices(spec);
    }
  }
}

TEST("lengths at a page's and a step's edge, and past it") {
  need_device();
  for (const int page_size : {16, 64, 128}) {
    CacheSpec spec = {.dtype = Dtype::kBFloat16, .heads = 4, .heads_kv = 1};
    spec.page_size = page_size;
    for (const int keys : {0, 1, page_size - 1, page_size, page_size + 1, 63, 64, 65, 127, 129})
      spec.sequences.push_back({.seed = static_cast<uint64_t>(keys + 1), .keys = keys});
    check_cache_on_devices(spec);
  }
}

TEST("left padding, with and without pages, by batch index too") {
  need_device();
  for (const int page_size : {0, 1, 16, 48}) {
    for (const bool batch_idx : {false, true}) {
      if (batch_idx && page_size > 0) continue;
      for (const int queries : {2, 20}) {
        CacheSpec spec = {.dtype = kDtypes[queries == 2], .heads = 4, .heads_kv = 1};
        spec.sequences = {{.seed = 1, .keys = 130, .leftpad = 5},
                          {.seed = 2, .keys = 40, .leftpad = 0},
                          {.seed = 3, .keys = 0, .leftpad = 31},
                          {.seed = 4, .keys = 64, .leftpad = 16}};
        for (CacheSequence& sequence : spec.sequences) sequence.queries = queries;
        spec.page_size = page_size;
        spec.batch_idx = batch_idx;
        check_cache_on_devices(spec);
      }
    }
  }
}

TEST("long sequences are cut into parts, as many as asked for") {
  need_device();
  for (const int num_splits : {0, 1, 2, 3, 40}) {
    check_cache_on_devices({.dtype = Dtype::kBFloat16,
                            .heads = 4,
                            .heads_kv = 1,
                            .sequences = {{.seed = 1, .keys = 3000},
                                          {.seed = 2, .keys = 1025},
                                          {.seed = 3, .keys = 1100, .queries = 7}},
                            .page_size = 16,
                            .packed = true,
                            .num_splits = num_splits});
  }
}

// What TMA loads in pieces, and what is copied row by row, on sm_90a: pages that divide a block of
// keys and that a block divides, one that no block does, left padding.
TEST("prefill over aligned rows: every page size, head dim and way to load") {
  need_device();
  const HeadDims dims[] = {64, 40, 96, 128, 192, 256, {192, 128}, {64, 200}};
  size_t turn = 0;
  for (const HeadDims& head_dims : dims) {
    if (slice_of(head_dims) == 0) continue;
    for (const int page_size : {0, 1, 7, 8, 16, 48, 64, 128, 256}) {
      const Mask masks[] = {kFull, kCausal, Mask{70, 20}};
      CacheSpec spec = {.dtype = kDtypes[++turn % 2],
                        .heads = 2,
                        .heads_kv = turn % 3 == 0 ? 2 : 1,
                        .dims = head_dims,
                        .page_size = page_size,
                        .packed = turn % 5 != 0,
                        .mask = masks[turn % 3],
                        .layout_seed = turn,
                        .layout_k = Layout::kPadded};
      spec.sequences = {{.seed = 1, .keys = 260, .queries = 70},
                        {.seed = 2, .queries = 66},
                        {.seed = 3, .keys = 129, .queries = 131}};
      if (turn % 7 == 0) spec.sequences[0].leftpad = 3;
      for (CacheSequence& s : spec.sequences) s.queries = spec.packed ? s.queries : 70;
      check_cache_on_devices(spec);
    }
  }
}

// 16 packed rows are the last that share their warps' keys, 64 the last that are decoded.
TEST("packed rows at the edge of a form, in one call") {
  need_device();
  for (const int page_size : {0, 7, 16}) {
    CacheSpec spec = {.dtype = Dtype::kBFloat16, .heads = 2, .heads_kv = 2, .packed = true};
    spec.page_size = page_size;
    for (const int queries : {1, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65}) {
      spec.sequences.push_back({.seed = static_cast<uint64_t>(queries),
                                .keys = 90 + queries,
                                .queries = queries,
                                .leftpad = queries % 5});
    }
    check_cache_on_devices(spec);
    spec.mask = {30, 3};
    check_cache_on_devices(spec);
  }
}

// So many heads and sequences that a thread block takes two parts of four, one behind the other.
TEST("a thread block takes several parts") {
  need_device();
  CacheSpec spec = {.dtype = Dtype::kFloat16, .heads = 64, .heads_kv = 64, .dims = 8};
  if (slice_of(spec.dims) == 0) SKIP("this build has no kernels of this head dim");
  spec.page_size = 16;
  spec.sequences.resize(64);
  spec.sequences[5] = {.seed = 1, .keys = 200};
  spec.sequences[60] = {.seed = 2, .keys = 130};
  check_cache_on_devices(spec);
  for (CacheSequence& sequence : spec.sequences) sequence.queries = 0;
  spec.sequences[5].queries = 1;
  spec.sequences[60].queries = 18;
  spec.packed = true;
  check_cache_on_devices(spec);
}

// New rows are keys as soon as they are appended: by their number in a dense call, by
// cu_seqlens_new in a packed one.
TEST("forward right behind an append, packed and dense") {
  need_device();
  size_t turn = 0;
  for (const int page_size : {0, 7, 16}) {
    CacheSpec spec = packed_append();
    spec.page_size = page_size;
    spec.dtype = kDtypes[++turn % 2];
    check_cache_on_devices(spec);
    for (const auto& [queries, added] : {std::pair{1, 1}, {3, 3}, {12, 2}, {70, 3}}) {
      spec = dense_append(queries, added);
      spec.page_size = page_size;
      spec.dtype = kDtypes[++turn % 2];
      check_cache_on_devices(spec);
    }
  }
}

// 1 to 16 packed rows, 17 to 64, and prefill.
TEST("a negative scale in every form") {
  need_device();
  for (const int queries : {3, 20, 70}) {
    CacheSpec spec = {.dtype = kDtypes[queries == 20], .heads = 2, .heads_kv = 1, .scale = -0.2};
    spec.sequences = {{.seed = 1, .keys = 140, .queries = queries},
                      {.seed = 2, .keys = 90, .queries = queries}};
    spec.page_size = queries == 3 ? 0 : 16;
    spec.layout_k = Layout::kPadded;
    check_cache_on_devices(spec);
  }
}

TEST("a call that wants no LSE, in every form") {
  need_device();
  for (const int queries : {3, 20, 70}) {
    for (const Layout layout : {Layout::kPadded, Layout::kOdd}) {
      CacheSpec spec = {.dtype = Dtype::kFloat16, .heads = 2, .heads_kv = 1, .lse = false};
      spec.sequences = {{.seed = 1, .keys = 140, .queries = queries},
                        {.seed = 2, .keys = 0, .queries = queries}};
      spec.page_size = 16;
      spec.layout_k = layout;
      check_cache_on_devices(spec);
    }
  }
}

TEST("rows of V that end before those of K, and behind them, at the end of the tensors") {
  need_device();
  for (const HeadDims& dims : {HeadDims(64, 40), HeadDims(40, 64), HeadDims(64, 33)}) {
    for (const int queries : {3, 20, 70}) {
      for (const int leftpad : {0, 3}) {
        CacheSpec spec = rows_that_end_apart(queries, dims);
        spec.dtype = kDtypes[queries == 20];
        for (CacheSequence& sequence : spec.sequences) sequence.leftpad = leftpad;
        check_cache_on_devices(spec);
      }
    }
  }
}
