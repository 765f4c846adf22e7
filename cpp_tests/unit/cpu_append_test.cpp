// flashtile_append_kv on the CPU: every byte of the cache afterwards is the one that this file
// says, and attention over it is right. Rotary embedding against its formula in fp64.
#include "../cache_case.h"

using namespace flashtile::test;

namespace {

struct RotaryTable {
  HostTensor cos, sin;  // [1, rows, 1, dim / 2]
  int dim;
  uint32_t flags;

  RotaryTable(Dtype dtype, int64_t rows, int dim, uint32_t flags)
      : cos(dtype, {1, rows, 1, dim / 2}, Strides{0, dim / 2 + 3, 0}, 0),
        sin(dtype, {1, rows, 1, dim / 2}, Strides{0, dim / 2 + 3, 0}, 0),
        dim(dim),
        flags(flags) {
    cos.for_each([&](int64_t b, int64_t p, int64_t h, int64_t d) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * d / dim);
      cos.set(b, p, h, d, std::cos(angle));
      sin.set(b, p, h, d, std::sin(angle));
    });
  }
  void put_into(flashtile_append_kv_params& params) {
    params.rotary_cos = cos.bytes().data();
    params.rotary_sin = sin.bytes().data();
    params.rotary_stride = cos.strides().seq;
    params.rotary_rows = cos.extents().seq;
    params.rotary_dim = dim;
    params.rotary_flags = flags;
  }
  // Number d of a head at a position, and the largest number that it is made of.
  std::pair<double, double> rotated(const HostTensor& x, int64_t b, int64_t s, int64_t h, int64_t d,
                                    int64_t position) const {
    const double itself = x.get(b, s, h, d);
    if (d >= dim) return {itself, 0.0};
    const bool halves = (flags & FLASHTILE_ROTARY_HALVES) != 0;
    const int64_t pair = halves ? d % (dim / 2) : d / 2;
    const bool second = halves ? d >= dim / 2 : d % 2 == 1;
    const int64_t partner = halves ? (second ? d - dim / 2 : d + dim / 2) : d ^ 1;
    const double other = x.get(b, s, h, partner);
    const double c = cos.get(0, position, 0, pair), sn = sin.get(0, position, 0, pair);
    return {itself * c + (second ? other : -other) * sn,
            std::max(std::fabs(itself), std::fabs(other))};
  }
};

// What the cache should hold: `call`'s own, before it appends, plus the new rows that belong there.
void expect_rows(const CacheCall& call, HostTensor& k, HostTensor& v) {
  for (size_t b = 0; b < call.spec().sequences.size(); ++b) {
    const CacheSequence& s = call.spec().sequences[b];
    for (int64_t i = 0; i < s.added; ++i) {
      const auto [page, row] = call.place_of(b, s.leftpad + s.keys + i);
      const int64_t batch = call.spec().packed ? 0 : static_cast<int64_t>(b);
      const int64_t from = call.spec().packed ? call.cu_new[b] + i : i;
      for (int64_t h = 0; h < k.extents().heads; ++h) {
        for (int64_t d = 0; d < k.extents().dim; ++d)
          k.set(page, row, h, d, call.k_new.get(batch, from, h, d));
        for (int64_t d = 0; d < v.extents().dim; ++d)
          v.set(page, row, h, d, call.v_new.get(batch, from, h, d));
      }
    }
  }
}

void check_append(const CacheSpec& spec) {
  CacheCall call(spec);
  HostTensor k = call.k, v = call.v;
  expect_rows(call, k, v);
  CHECK_EQ(call.append(), std::string());
  CHECK_MESSAGE(call.k.bytes() == k.bytes(), spec.name() + ": k");
  CHECK_MESSAGE(call.v.bytes() == v.bytes(), spec.name() + ": v");
  check_cache_result(call, call.run());
}

// Two products and a sum in fp32 or fp64, one rounding to 16 bits; times the largest number.
double unit_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64 ? 3 * epsilon_of(dtype)
                                                              : epsilon_of(dtype);
}

// k in the cache and q_out, at the positions that the header promises.
void check_rotation(const CacheSpec& spec, int rotary_dim, uint32_t flags) {
  CacheCall call(spec);
  RotaryTable table(spec.dtype, 400, rotary_dim, flags);
  HostTensor q_out(spec.dtype, call.q.extents(), Layout::kOdd);
  const flashtile_problem problem = call.problem();
  CHECK_EQ(call.append(problem,
                       [&](flashtile_append_kv_params& params) {
                         table.put_into(params);
                         params.q = CacheCall::view(call.q);
                         params.q_out = CacheCall::view(q_out);
                       }),
           std::string());
  CHECK(q_out.gaps_are_untouched());
  double worst = 0.0;
  const auto compare = [&](double got, const std::pair<double, double>& expected) {
    const double error = std::fabs(got - expected.first);
    const double allowed = unit_of(spec.dtype) * expected.second;
    worst = std::max(worst, error == 0.0 ? 0.0 : !(error <= allowed) ? kInfinity : error / allowed);
  };
  for (size_t b = 0; b < spec.sequences.size(); ++b) {
    const CacheSequence& s = spec.sequences[b];
    const int64_t before = s.leftpad + s.keys, batch = spec.packed ? 0 : static_cast<int64_t>(b);
    for (int64_t i = 0; i < s.added; ++i) {
      const auto [page, row] = call.place_of(b, before + i);
      const int64_t from = spec.packed ? call.cu_new[b] + i : i;
      for (int64_t h = 0; h < spec.heads_kv; ++h) {
        for (int64_t d = 0; d < spec.dims.qk; ++d)
          compare(call.k.get(page, row, h, d),
                  table.rotated(call.k_new, batch, from, h, d, before + i));
      }
    }
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t from = spec.packed ? call.cu_q[b] + i : i;
      const int64_t position = before + ((flags & FLASHTILE_ROTARY_Q_FIXED) != 0 ? 0 : i);
      for (int64_t h = 0; h < spec.heads; ++h) {
        for (int64_t d = 0; d < spec.dims.qk; ++d)
          compare(q_out.get(batch, from, h, d), table.rotated(call.q, batch, from, h, d, position));
      }
    }
  }
  CHECK_MESSAGE(worst <= 1.0, spec.name() + " rotary_dim " + std::to_string(rotary_dim) +
                                  " flags " + std::to_string(flags) + ": " + std::to_string(worst));
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
      check_append(spec);
    }
  }
}

TEST("packed: every sequence brings its own number of new rows") {
  for (const int page_size : {0, 5, 16}) {
    check_append({.dtype = Dtype::kBFloat16,
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
        check_rotation(spec, rotary_dim, flags);
      }
    }
  }
}

TEST("q may be rotated in place") {
  const CacheSpec spec = {.sequences = {{.seed = 1, .keys = 9, .queries = 2, .added = 2}}};
  std::vector<double> bits[2];
  for (const bool in_place : {false, true}) {
    CacheCall call(spec);
    RotaryTable table(spec.dtype, 40, 64, FLASHTILE_ROTARY_HALVES);
    HostTensor q_out(spec.dtype, call.q.extents(), Layout::kPadded);
    CHECK_EQ(call.append(call.problem(),
                         [&](flashtile_append_kv_params& params) {
                           table.put_into(params);
                           params.q = CacheCall::view(call.q);
                           params.q_out = CacheCall::view(in_place ? call.q : q_out);
                         }),
             std::string());
    bits[in_place ? 1 : 0] = (in_place ? call.q : q_out).dense();
  }
  CHECK(bits[0] == bits[1]);
}

TEST("a position without a row in the tables: k stays unwritten, q is NaN") {
  CacheCall call({.sequences = {{.seed = 1, .keys = 9, .queries = 3, .added = 3}}});
  HostTensor k = call.k;
  RotaryTable table(Dtype::kFloat32, 10, 64, 0);
  HostTensor q_out(Dtype::kFloat32, call.q.extents(), Layout::kPadded);
  CHECK_EQ(call.append(call.problem(),
                       [&](flashtile_append_kv_params& params) {
                         table.put_into(params);
                         params.q = CacheCall::view(call.q);
                         params.q_out = CacheCall::view(q_out);
                       }),
           std::string());
  for (int64_t i = 0; i < 3; ++i) {
    const auto [page, row] = call.place_of(0, 9 + i);
    CHECK_EQ(std::isnan(call.k.get(page, row, 0, 0)), i > 0);
    CHECK_EQ(std::isnan(q_out.get(0, i, 1, 63)), i > 0);
  }
}
