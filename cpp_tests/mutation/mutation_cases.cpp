// The cases that mutants run, in groups: a mutant names the group that should notice it. Chosen so
// that every mistake has a case that it breaks, small enough to run dozens of times, and stopped at
// the first failure. fp16, whose small rounding errors hide less.
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "../kernels/kernel_cases.h"
#include "../support/check.h"
#include "slice.h"

using namespace flashtile::test;

namespace {

enum class Pass { kForward, kBackward };

// compare() without the gradients.
Verdict compare_forward(const Setup& setup, const Truth& truth, const AttentionOutput& result) {
  Verdict verdict;
  verdict.forward =
      compare_rows({"out", result.out, truth.exact.out, truth.rounded.out, truth.input.heads,
                    setup.head_dim_v, false, epsilon_of(setup.dtype), truth.out_noise},
                   truth.input);
  verdict.lse = compare_lse(setup.dtype, result.lse, truth.exact.lse);
  return verdict;
}

bool run_once(Pass pass, const Setup& setup, const Truth& truth, const Schedule& schedule,
              AttentionOutput& values) {
  static const Backend backend = cuda_backend();
  begin(schedule, setup.spec.deterministic);
  Run run(setup, backend);
  const bool forward = pass == Pass::kForward;
  const RunResult result = forward ? run.forward() : run();
  const std::string reported = finish();
  CHECK_MESSAGE(reported.empty(), setup.name() + ": " + reported);
  CHECK_MESSAGE(result.error.empty(), setup.name() + ": " + result.error);
  if (!reported.empty() || !result.error.empty()) return false;
  CHECK_EQ(forward ? result.forward_plan : result.backward_plan,
           expected_plan(forward ? "forward" : "backward", setup, schedule));
  const Verdict verdict =
      forward ? compare_forward(setup, truth, result.values) : compare(setup, truth, result.values);
  CHECK_MESSAGE(verdict.passed(), setup.name() + verdict.text());
  values = result.values;
  return verdict.passed();
}

// Whether all is well. Schedules differ in what only order can break.
bool run_setup(Pass pass, const Setup& setup, bool exact_sums) {
  AttentionInput input = manual_input(setup);
  input.backward = pass == Pass::kBackward;
  Truth truth(setup, input);
  if (exact_sums) truth.dqk_noise = truth.dv_noise = 0.0;
  AttentionOutput first;
  bool is_first = true;
  for (const Schedule& schedule : schedules()) {
    AttentionOutput values;
    if (!run_once(pass, setup, truth, schedule, values)) return false;
    if (is_first) first = values;
    const bool same = is_first || identical(first, values);
    CHECK_MESSAGE(same, setup.name() + ": not the bits of the first schedule");
    if (!same) return false;
    is_first = false;
    if (!setup.spec.deterministic) break;
  }
  return true;
}

struct Sample {
  Case spec;
  HeadDims head_dims;
  std::function<void(Setup&)> change = [](Setup&) {};  // after the case has filled the tensors
  bool exact_sums = false;  // rounding the LSE is no excuse for a gradient
};

void run_samples(Pass pass, const std::vector<Sample>& samples) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  for (const Sample& sample : samples) {
    for (const Mask& mask : sample.spec.masks) {
      Setup setup = make_setup(sample.spec, Dtype::kFloat16, sample.head_dims, mask);
      sample.change(setup);
      if (!run_setup(pass, setup, sample.exact_sums)) return;
    }
  }
}

std::vector<Sample> shapes() {
  const int d = slice();
  return {
      {{.name = "GQA", .batch = 2, .heads = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 97}, d},
      {{.name = "values x 3", .seqlen_q = 200, .seqlen_k = 200, .values = Values::kTriple}, d},
      {{.name = "rows without keys", .seqlen_q = 150, .seqlen_k = 77, .masks = {kCausal}}, d},
      {{.name = "varlen",
        .heads = 2,
        .heads_kv = 1,
        .lengths_q = {65, 0, 130},
        .lengths_k = {130, 5, 140},
        .masks = {kCausal}},
       d},
  };
}

std::vector<Sample> masks() {
  const int d = slice();
  return {
      {{.name = "wide window", .seqlen_q = 200, .seqlen_k = 300, .masks = {{150, 100}}}, d},
      {{.name = "window",
        .seqlen_q = 97,
        .seqlen_k = 97,
        .masks = {{32, 64}, {0, 0}, {5, -1}, {-1, 7}}},
       d},
      {{.name = "top-left, more keys",
        .seqlen_q = 70,
        .seqlen_k = 190,
        .masks = {kCausalTopLeft, {32, 64, true}}},
       d},
      {{.name = "causal", .seqlen_q = 260, .seqlen_k = 260, .masks = {kCausal, {100, 0}}}, d},
      {{.name = "more queries", .seqlen_q = 190, .seqlen_k = 70, .masks = {{20, 30}}}, d},
  };
}

std::vector<Sample> used_rows() {
  const int d = slice();
  return {
      {{.name = "in use",
        .batch = 3,
        .seqlen_q = 130,
        .seqlen_k = 130,
        .used_q = {65, 130, 0},
        .used_k = {129, 17, 130}},
       d},
      {{.name = "no keys in use", .batch = 2, .seqlen_q = 40, .seqlen_k = 70, .used_k = {0, 33}},
       d},
      {{.name = "rows of no sequence",
        .heads = 2,
        .heads_kv = 1,
        .lengths_q = {40, 0, 30},
        .lengths_k = {50, 7, 64},
        .tail_q = 70,
        .tail_k = 33,
        .masks = {kFull}},
       d},
  };
}

// Rows that end inside a tile, in units of 16, 4 and 2 bytes, and rows that start anywhere.
std::vector<Sample> row_formats() {
  const int d = slice();
  Case spec = {.name = "padded",
               .heads = 2,
               .heads_kv = 1,
               .seqlen_q = 70,
               .seqlen_k = 135,
               .masks = {kFull},
               .layout = Layout::kPadded};
  std::vector<Sample> samples;
  for (const HeadDims& head_dims : {HeadDims(d - 24), HeadDims(d - 28), HeadDims(d - 31),
                                    HeadDims(d, d - 24), HeadDims(d - 24, d)}) {
    samples.push_back({spec, head_dims});
  }
  // Without a second row nothing but the first is asked where it starts: aligned, whatever its end.
  samples.push_back({{.name = "one row", .seqlen_q = 1, .seqlen_k = 1, .masks = {kFull}}, d - 28});
  spec.name = "odd";
  spec.layout = Layout::kOdd;
  samples.push_back({spec, d});
  return samples;
}

template <class Value>
void set_all(HostTensor& tensor, const Value& value) {
  tensor.for_each([&](int64_t b, int64_t s, int64_t h, int64_t c) {
    tensor.set(b, s, h, c, value(tensor.get(b, s, h, c), s, c));
  });
}

// Scores of 5e8 and one key that takes all. v and dout are small whole numbers: every sum of their
// products is exact, and so dS is 0, whatever the order.
void make_huge(Setup& setup) {
  set_all(setup.q, [](double, int64_t s, int64_t c) {
    return c == 0 ? 40000.0 + 96.0 * static_cast<double>(s) : 0.0;
  });
  set_all(setup.k, [](double, int64_t s, int64_t c) {
    return c != 0 ? 0.0 : s == 10 ? 60000.0 : 20000.0 + 32.0 * static_cast<double>(s);
  });
  for (HostTensor* tensor : {&setup.v, &setup.dout})
    set_all(*tensor, [](double x, int64_t, int64_t) { return std::round(x); });
}

void put_nan_into_dout(Setup& setup) { setup.dout.set(0, 3, 0, 0, std::nan("")); }

std::vector<Sample> values() {
  const int d = slice();
  return {
      {{.name = "huge scores", .seqlen_q = 200, .seqlen_k = 150, .masks = {kFull}, .dlse = false},
       d - 24,  // its scale is no power of two
       make_huge,
       true},
      {{.name = "every logit near -120",
        .seqlen_q = 200,
        .seqlen_k = 150,
        .masks = {kFull},
        .values = Values::kVeryNegative},
       d},
      {{.name = "NaN in dout", .seqlen_q = 20, .seqlen_k = 60, .used_k = {40}},
       d,
       put_nan_into_dout},
      {{.name = "negative scale",
        .seqlen_q = 40,
        .seqlen_k = 70,
        .masks = {kFull},
        .values = Values::kNegativeScale},
       d},
  };
}

// More tiles than the device has multiprocessors, equal ones: a block works on several.
std::vector<Sample> many_tiles() {
  return {{{.name = "many tiles",
            .batch = 2,
            .heads = 6,
            .heads_kv = 3,
            .seqlen_q = 250,
            .seqlen_k = 140,
            .masks = {kFull}},
           slice()}};
}

// A ring turns over many times, with a use so short that loader and consumers drift apart.
std::vector<Sample> many_uses() {
  const Case spec = {.name = "one query, one key",
                     .heads = 17,
                     .heads_kv = 1,
                     .seqlen_q = 1,
                     .seqlen_k = 1,
                     .masks = {kFull}};
  return {{spec, slice()}};
}

std::vector<Sample> turns() {
  const int d = slice();
  return {
      {{.name = "window",
        .heads = 2,
        .heads_kv = 2,
        .seqlen_q = 150,
        .seqlen_k = 300,
        .masks = {{140, 20}, kFull},
        .deterministic = true},
       d},
      {{.name = "varlen",
        .lengths_q = {70, 90},
        .lengths_k = {150, 90},
        .masks = {kCausal},
        .deterministic = true},
       d},
      {{.name = "causal",
        .heads = 4,
        .heads_kv = 2,
        .seqlen_q = 400,
        .seqlen_k = 400,
        .masks = {kCausal},
        .deterministic = true},
       d},
      {{.name = "more key blocks than places",
        .seqlen_q = 70,
        .seqlen_k = 900,
        .masks = {kFull},
        .deterministic = true},
       d},
      {{.name = "many turns",
        .heads = 2,
        .heads_kv = 2,
        .seqlen_q = 400,
        .seqlen_k = 600,
        .masks = {kFull},
        .deterministic = true},
       d},
  };
}

}  // namespace

TEST("forward shapes") { run_samples(Pass::kForward, shapes()); }
TEST("forward masks") { run_samples(Pass::kForward, masks()); }
TEST("forward used rows") { run_samples(Pass::kForward, used_rows()); }
TEST("forward row formats") { run_samples(Pass::kForward, row_formats()); }
TEST("forward values") { run_samples(Pass::kForward, values()); }
TEST("forward many tiles") { run_samples(Pass::kForward, many_tiles()); }
TEST("backward shapes") { run_samples(Pass::kBackward, shapes()); }
TEST("backward masks") { run_samples(Pass::kBackward, masks()); }
TEST("backward used rows") { run_samples(Pass::kBackward, used_rows()); }
TEST("backward row formats") { run_samples(Pass::kBackward, row_formats()); }
TEST("backward values") { run_samples(Pass::kBackward, values()); }
TEST("backward many uses") { run_samples(Pass::kBackward, many_uses()); }
TEST("backward turns") { run_samples(Pass::kBackward, turns()); }
