// flashtile_append_kv on the CPU: every byte of the cache afterwards is the one that this file
// says, and attention over it is right. Rotary embedding against its formula in fp64.
#include "../support/append_case.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

void check_append_and_attention(const CacheSpec& spec) {
  check_append(spec, append_on_cpu);
  CacheCall call(spec);
  CHECK_EQ(call.append(), std::string());
  check_cache_result(call, call.run());
}

}  // namespace

TEST("new rows land behind the rows in use, and attention counts them in") {
  for (const int page_size : {0, 1, 7, 16, 48, 128}) {
    for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
      const CacheSpec spec = {
          .dtype = dtype,
          .heads = 4,
          .heads_kv = 2,
          .dims = {64, 40},
          .sequences = {{.seed = 1, .keys = 130, .queries = 2, .leftpad = 3, .added = 2},
                        {.seed = 2, .keys = 0, .queries = 2, .added = 2},
                        {.seed = 3, .keys = 15, .queries = 2, .added = 2}},
          .page_size = page_size,
          .batch_idx = page_size == 0 && dtype != Dtype::kFloat64};
      check_append_and_attention(spec);
    }
  }
}

TEST("packed: every sequence brings its own number of new rows") {
  for (const int page_size : {0, 5, 16}) {
    check_append_and_attention({.dtype = Dtype::kBFloat16,
                                .heads = 2,
                                .heads_kv = 1,
                                .sequences = {{.seed = 1, .keys = 100, .queries = 1, .added = 1},
                                              {.seed = 2, .keys = 0, .queries = 70, .added = 70},
                                              {.seed = 3, .keys = 20, .queries = 0, .added = 0},
                                              {.seed = 4, .keys = 16, .queries = 20, .added = 20}},
                                .page_size = page_size,
                                .packed = true});
  }
}

TEST("rotary embedding: pairs side by side and in halves, the whole head and a part of it") {
  for (const uint32_t flags : {0, 1, 2, 3}) {
    for (const int rotary_dim : {64, 32, 2, 10}) {
      for (const Dtype dtype :
           {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
        CacheSpec spec = {.dtype = dtype, .heads = 4, .heads_kv = 2, .page_size = 16};
        spec.sequences = {{.seed = 1, .keys = 130, .queries = 3, .leftpad = 3, .added = 3},
                          {.seed = 2, .keys = 0, .queries = 3, .added = 3}};
        spec.packed = flags == 1;
        check_rotation(spec, RotaryTable(dtype, 400, rotary_dim, flags), append_on_cpu);
      }
    }
  }
}

TEST("a position without a row in the tables: k and v stay unwritten, q is NaN") {
  check_missing_angles(Dtype::kFloat32, append_on_cpu);
}
