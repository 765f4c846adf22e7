// Strides (S), sizes (L; the full ones in gpu_sizes_test.cpp), masks (M) and determinism (D).
#include <algorithm>
#include <cmath>

#include "target.h"

using namespace flashtile::test;

namespace {

constexpr int64_t kBeyondInt32 = (int64_t{1} << 31) + 8;

Strides bhsd(const Extents& e) { return strides_of(Layout::kHeadMajor, e); }

// Bits of out, LSE and gradients in the rows [0, rows) of a head-dim-64 setup with these heads.
bool same_rows(const RunResult& a, const RunResult& b, size_t rows, size_t heads) {
  const auto same = [&](const std::vector<double>& x, const std::vector<double>& y, size_t count) {
    return std::equal(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(count), y.begin());
  };
  return same(a.values.out, b.values.out, rows * heads * 64) &&
         same(a.values.lse, b.values.lse, rows * heads) &&
         same(a.values.dq, b.values.dq, rows * heads * 64);
}

// Values that depend on the place alone, not on how many others there are.
void fill_by_place(Setup& setup) {
  double phase = 0.0;
  for (HostTensor* tensor : {&setup.q, &setup.k, &setup.v, &setup.dout}) {
    phase += 1.0;
    set_all(*tensor, [&](auto, auto s, auto h, auto d) {
      return 2.0 * std::sin(phase + 1.7 * static_cast<double>(s) + 0.7 * static_cast<double>(h) +
                            0.31 * static_cast<double>(d));
    });
  }
}

}  // namespace

TEST("S1 MQA with strided dout, and with stride 0 everywhere") {
  Case spec = {.name = "S1", .batch = 2, .heads = 4, .heads_kv = 1, .seqlen_q = 32, .seqlen_k = 32};
  for (const Layout layout : {Layout::kMixed, Layout::kPadded, Layout::kBroadcast}) {
    spec.layout = layout;
    check_case(spec, 128);
  }
}

// Originally 410,923 rows, past 2^31 elements: gpu_sizes_test.cpp.
TEST("S2 packed dout of 16 heads of 96 with 9728 elements between rows") {
  Setup setup = make_setup({.name = "S2",
                            .heads = 16,
                            .heads_kv = 16,
                            .lengths_q = {17, 0, 40},
                            .lengths_k = {17, 5, 40}},
                           Dtype::kBFloat16, 96, kCausal);
  restride(setup.dout, setup.dtype, {9728, 9728, 96});
  check_setup(setup);
}

TEST("S3 one of k and v strided, one contiguous; only v transposed") {
  const Case spec = {
      .name = "S3", .batch = 2, .heads = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 70};
  for (const Dtype dtype : trap_dtypes()) {
    const Setup plain = make_setup(spec, dtype, 64, kCausal);
    const Strides strided = strides_of(Layout::kPadded, plain.extents_k);
    for (HostTensor Setup::* tensor : {&Setup::k, &Setup::v}) {
      Setup setup = plain;
      restride(setup.*tensor, dtype, strided, 16);
      check_setup(setup);
    }
    Setup setup = plain;
    restride(setup.v, dtype, bhsd(plain.extents_v));
    check_setup(setup);
  }
}

// Originally 2048 rows.
TEST("S4 q, k, v split from one tensor of 18 heads") {
  Setup setup =
      make_setup({.name = "S4", .heads = 16, .heads_kv = 1, .seqlen_q = 128, .seqlen_k = 128},
                 Dtype::kBFloat16, 64, kCausal);
  restride(setup.q, setup.dtype, {128 * 18 * 64, 18 * 64, 64});
  restride(setup.k, setup.dtype, {128 * 18 * 64, 18 * 64, 64}, 16 * 64);
  restride(setup.v, setup.dtype, {128 * 18 * 64, 18 * 64, 64}, 17 * 64);
  check_setup(setup);
}

TEST("S5 transposed heads, head dim 256") {
  check_case({.name = "S5",
              .batch = 2,
              .heads = 2,
              .heads_kv = 2,
              .seqlen_q = 70,
              .seqlen_k = 70,
              .layout = Layout::kHeadMajor},
             256, {Dtype::kBFloat16});
}

TEST("S8 rows and bases that 16 bytes do not divide, outputs too") {
  for (const HeadDims& head_dims : {HeadDims(46), HeadDims(64), HeadDims(128), HeadDims(47, 129)}) {
    check_case({.name = "S8",
                .batch = 2,
                .heads = 2,
                .heads_kv = 2,
                .seqlen_q = 40,
                .seqlen_k = 70,
                .layout = Layout::kOdd},
               head_dims);
  }
  check_case({.name = "S8", .heads = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 70}, 46);
}

TEST("S9 one key head with an odd head stride that nobody uses") {
  for (const Dtype dtype : trap_dtypes()) {
    Setup setup =
        make_setup({.name = "S9", .heads = 4, .heads_kv = 1, .seqlen_q = 40, .seqlen_k = 70}, dtype,
                   64, kCausal);
    for (HostTensor* tensor : {&setup.k, &setup.v})
      restride(*tensor, dtype, {12345, 64, 7});  // one batch, one head
    check_setup(setup);
  }
}

TEST("S11 keys and values of one head expanded to four by stride 0") {
  check_case({.name = "S11",
              .batch = 2,
              .heads = 8,
              .heads_kv = 4,
              .seqlen_q = 40,
              .seqlen_k = 70,
              .layout = Layout::kBroadcast},
             64);
}

// Originally of 8 heads of 64; and 65,536 and 71,280 heads. Here all but the last sequence are
// empty, so that the thread blocks behind 65,535 are reached in no time.
TEST("L1 65,536 batches") {
  std::vector<int> used(65536, 0);
  used[65535] = 2;
  check_setup_once(make_setup(
      {.name = "L1", .batch = 65536, .seqlen_q = 2, .seqlen_k = 2, .used_q = used, .used_k = used},
      Dtype::kFloat16, 8, kCausal));
}

// The thread blocks are numbered in one dimension, so this meets what the one above does.
TEST("L1 65,537 heads") {
  leave_to_nightly_on_machine();
  check_setup_once(make_setup({.name = "L1",
                               .heads = 65537,
                               .heads_kv = 65537,
                               .seqlen_q = 2,
                               .seqlen_k = 2,
                               .used_q = {1},
                               .used_k = {0}},
                              Dtype::kFloat16, 8, kCausal));
}

// Originally 15,000: sizes_test.cpp.
TEST("L2 1,000 batches, backward") {
  Setup setup = make_setup(
      {.name = "L2", .batch = 1000, .seqlen_q = 4, .seqlen_k = 4, .masks = {kFull}, .dlse = false},
      Dtype::kFloat16, 8, kCausal);
  fill_by_place(setup);  // all batches alike: of thousands some would miss the bound by chance
  check_setup(setup);
}

TEST("L7 strides of one batch or head just under and over 2^31") {
  for (const int64_t huge : {kBeyondInt32 - 16, kBeyondInt32, int64_t{1} << 40}) {
    Setup setup =
        make_setup({.name = "L7", .seqlen_q = 40, .seqlen_k = 70}, Dtype::kFloat16, 64, kCausal);
    for (HostTensor* tensor : {&setup.q, &setup.k, &setup.v, &setup.dout})
      restride(*tensor, setup.dtype, {huge, 64, huge});
    check_setup(setup);
  }
}

TEST("M1 (queries, keys) = (2, 5), (5, 2), (3, 128), (1, 200) in both alignments") {
  for (const auto& [queries, keys] :
       {std::pair(2, 5), std::pair(5, 2), std::pair(3, 128), std::pair(1, 200)}) {
    check_case({.name = "M1",
                .seqlen_q = queries,
                .seqlen_k = keys,
                .masks = {kCausal, kCausalTopLeft, {1, 1}, {1, 1, true}}},
               64);
  }
}

// Originally 16,384 rows.
TEST("M2 causal is the window (-1, 0), (S, 0) and (S - 1, 0), bit for bit") {
  constexpr int kRows = 300;
  const Case spec = {.name = "M2",
                     .heads = 2,
                     .heads_kv = 1,
                     .seqlen_q = kRows,
                     .seqlen_k = kRows,
                     .deterministic = true};
  const auto run = [&](const Mask& mask) {
    return results_of(make_setup(spec, Dtype::kFloat16, 64, mask));
  };
  const std::vector<RunResult> causal = run(kCausal);
  for (const Mask& mask : {Mask{-1, 0}, Mask{kRows, 0}, Mask{kRows - 1, 0}}) {
    const std::vector<RunResult> window = run(mask);
    for (size_t i = 0; i < causal.size(); ++i)
      CHECK_MESSAGE(identical(causal[i].values, window[i].values), name_of(mask));
  }
}

TEST("M3 a window with GQA and one query") {
  check_case({.name = "M3",
              .batch = 2,
              .heads = 8,
              .heads_kv = 2,
              .seqlen_q = 1,
              .seqlen_k = 300,
              .masks = {{100, 0}, {0, 0}, {100, 50}, {10, -1, true}}},
             64);
}

TEST("D1 deterministic: 12 runs, bit-equal dq, dk, dv: causal, window, packed, GQA, head dim 256") {
  const Case dense = {.name = "D1",
                      .heads = 4,
                      .heads_kv = 2,
                      .seqlen_q = 150,
                      .seqlen_k = 200,
                      .deterministic = true};
  Case packed = dense;
  packed.lengths_q = {70, 0, 90};
  packed.lengths_k = {60, 20, 130};
  const std::vector<Setup> setups = {make_setup(dense, Dtype::kFloat16, 64, kCausal),
                                     make_setup(dense, Dtype::kBFloat16, 128, {40, 20}),
                                     make_setup(packed, Dtype::kFloat16, 128, kFull),
                                     make_setup(packed, Dtype::kBFloat16, 256, kCausal)};
  constexpr size_t kRuns = 12;
  for (const Setup& setup : setups) {
    const std::vector<RunResult> results = results_of(setup, kRuns);
    for (size_t i = 0; i < results.size(); ++i) {
      const RunResult& first = results[i / kRuns * kRuns];  // of the same device
      CHECK_MESSAGE(identical(first.values, results[i].values), setup.name());
    }
  }
}

// Originally 300 batches of 2048 queries: gpu_sizes_test.cpp.
TEST("D2 3 batches, 256 queries, 128 keys, head dim 128, fp16 x 3: five runs agree with fp64") {
  const Setup setup = make_setup(
      {.name = "D2", .batch = 3, .seqlen_q = 256, .seqlen_k = 128, .values = Values::kTriple},
      Dtype::kFloat16, 128, kFull);
  const Truth truth(setup);
  for (const RunResult& result : results_of(setup, 5)) {
    const Verdict verdict = compare(setup, truth, result.values);
    CHECK_MESSAGE(verdict.passed(), setup.name() + verdict.text());
  }
}

// Originally with programmatic dependent launch, which only a GPU could do wrong.
TEST("D3 dout is written right before the backward") {
  for (const Values values : {Values::kNormal, Values::kTriple}) {
    const Setup setup = make_setup({.name = "D3",
                                    .heads = 4,
                                    .heads_kv = 2,
                                    .seqlen_q = 90,
                                    .seqlen_k = 140,
                                    .values = values},
                                   Dtype::kFloat16, 64, kCausal);
    const Truth truth(setup);
    for (const RunResult& result : results_with_late_dout(setup)) {
      CHECK_EQ(result.error, std::string());
      const Verdict verdict = compare(setup, truth, result.values);
      CHECK_MESSAGE(verdict.passed(), setup.name() + verdict.text());
    }
  }
}

// The machine reports every race; on the CPU the sanitizers would.
TEST("D4 no race is reported, head dims 64 to 256") {
  for (const int head_dim : {64, 96, 128, 192, 256}) {
    check_case({.name = "D4", .heads = 2, .heads_kv = 1, .seqlen_q = 130, .seqlen_k = 130},
               head_dim, {Dtype::kFloat16});
  }
}

// Originally with 19,802 keys.
TEST("D5 a longer neighbour changes no bit of the first sequence") {
  const auto run = [](int second) {
    Setup setup = make_setup({.name = "D5",
                              .heads = 14,
                              .heads_kv = 2,
                              .lengths_q = {1, second},
                              .lengths_k = {330, 40},
                              .dlse = false,
                              .deterministic = true},
                             Dtype::kBFloat16, 64, kCausal);
    fill_by_place(setup);
    return results_of(setup);
  };
  const std::vector<RunResult> shorter = run(9), longer = run(10);
  for (size_t i = 0; i < shorter.size(); ++i) CHECK(same_rows(shorter[i], longer[i], 1, 14));
}

TEST("D5 fewer keys in use in one batch change no bit of the others") {
  const auto run = [](int first) {
    return results_of(make_setup({.name = "D5",
                                  .batch = 4,
                                  .heads = 4,
                                  .heads_kv = 2,
                                  .seqlen_q = 2,
                                  .seqlen_k = 200,
                                  .used_k = {200, 100, first, 50},
                                  .deterministic = true},
                                 Dtype::kBFloat16, 64, kCausal));
  };
  const std::vector<RunResult> more = run(120), fewer = run(80);
  for (size_t i = 0; i < more.size(); ++i) CHECK(same_rows(more[i], fewer[i], 2 * 2, 4));
}
