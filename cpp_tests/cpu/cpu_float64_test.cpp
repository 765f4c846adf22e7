// fp64 means fp64: out, softmax_lse and gradients to 1e-13 of the largest value, at every head dim
// and scale, against attention in long double; and how the scale and the dtype of softmax_lse reach
// the library.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../support/check.h"
#include "../support/numbers_of_problem.h"
#include "../support/setup.h"
#include "../support/small_call.h"
#include "flashtile/flashtile.h"

using namespace flashtile::test;

namespace {

constexpr double kPromised = 1e-13;
using Numbers = std::vector<double>;
using Exact = std::vector<long double>;

// One head; row-major [rows, dim].
struct Problem {
  int queries = 7, keys = 11, dim = 8;
  long double scale = 1;
  bool causal = false;
  Numbers q, k, v, dout, dlse;

  Problem(int dim, double scale, double size_q = 1, double size_k = 1)
      : dim(dim), scale(static_cast<long double>(scale)) {
    Normal normal(static_cast<uint64_t>(dim) + 77);
    const auto draw = [&](int count, double size) {
      Numbers numbers(static_cast<size_t>(count));
      for (double& x : numbers) x = size * normal();
      return numbers;
    };
    q = draw(queries * dim, size_q);
    k = draw(keys * dim, size_k);
    v = draw(keys * dim, 1);
    dout = draw(queries * dim, 1);
    dlse = draw(queries, 1);
  }
};

struct Truth {
  Exact out, lse, dq, dk, dv;
};

// Where a number is, row-major.
size_t at(int row, int dim, int d) {
  return static_cast<size_t>(row) * static_cast<size_t>(dim) + static_cast<size_t>(d);
}

long double product(const Numbers& a, int i, const Numbers& b, int j, int dim) {
  long double sum = 0;
  for (int d = 0; d < dim; ++d) {
    sum += static_cast<long double>(a[at(i, dim, d)]) * b[at(j, dim, d)];
  }
  return sum;
}

// The formulas, a query at a time.
Truth truth_of(const Problem& p) {
  const auto size = [&](int rows) { return at(rows, p.dim, 0); };
  Truth t = {Exact(size(p.queries)), Exact(static_cast<size_t>(p.queries)), Exact(size(p.queries)),
             Exact(size(p.keys)), Exact(size(p.keys))};
  for (int i = 0; i < p.queries; ++i) {
    const int seen = p.causal ? p.keys - p.queries + i + 1 : p.keys;
    Exact weight(static_cast<size_t>(seen));
    for (int j = 0; j < seen; ++j)
      weight[static_cast<size_t>(j)] = p.scale * product(p.q, i, p.k, j, p.dim);
    const long double largest = *std::ranges::max_element(weight);
    long double sum = 0, delta = 0;
    for (long double& w : weight) sum += w = std::exp(w - largest);
    for (int j = 0; j < seen; ++j) {
      const long double w = weight[static_cast<size_t>(j)] /= sum;
      delta += w * product(p.dout, i, p.v, j, p.dim);
      for (int d = 0; d < p.dim; ++d) t.out[at(i, p.dim, d)] += w * p.v[at(j, p.dim, d)];
    }
    t.lse[static_cast<size_t>(i)] = largest + std::log(sum);
    for (int j = 0; j < seen; ++j) {
      const long double w = weight[static_cast<size_t>(j)];
      const long double slope = p.scale * w *
                                (product(p.dout, i, p.v, j, p.dim) - delta +
                                 static_cast<long double>(p.dlse[static_cast<size_t>(i)]));
      for (int d = 0; d < p.dim; ++d) {
        const size_t at_q = at(i, p.dim, d);
        const size_t at_k = at(j, p.dim, d);
        t.dq[at_q] += slope * p.k[at_k];
        t.dk[at_k] += slope * p.q[at_q];
        t.dv[at_k] += w * p.dout[at_q];
      }
    }
  }
  return t;
}

// Error over the largest value.
double error_of(const Numbers& result, const Exact& truth) {
  long double error = 0, largest = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const long double difference = std::fabs(result[i] - truth[i]);
    error = std::isfinite(result[i]) ? std::max(error, difference) : HUGE_VALL;
    largest = std::max(largest, std::fabs(truth[i]));
  }
  return static_cast<double>(error == 0 ? 0 : error / largest);
}

struct Result {
  Numbers out, lse, dq, dk, dv;
  flashtile_status status = FLASHTILE_OK;
};

template <class Number>
Numbers widened(const std::vector<Number>& numbers) {
  return {numbers.begin(), numbers.end()};
}

// The problem as flashtile_forward and flashtile_backward compute it, in Number; softmax_lse and
// dsoftmax_lse are in Lse. `change` may change the problem of the C API.
template <class Number, class Lse>
class Call {
 public:
  explicit Call(const Problem& p) : p_(p) {
    problem.dtype = problem.dtype_kv = problem.dtype_out =
        sizeof(Number) == 8 ? FLASHTILE_FLOAT64 : FLASHTILE_FLOAT32;
    problem.batch = problem.num_heads = problem.num_heads_kv = 1;
    problem.head_dim = p.dim;
    problem.seqlen_q = p.queries;
    problem.seqlen_k = p.keys;
    problem.softmax_scale_f64 = static_cast<double>(p.scale);
    problem.window_right = p.causal ? 0 : -1;
    problem.lse_dtype = sizeof(Lse) == 8 ? FLASHTILE_FLOAT64 : FLASHTILE_FLOAT32;
  }

  Result operator()() {
    Result r;
    for (const auto& [to, from] : {std::pair(&q, &p_.q), std::pair(&k, &p_.k), std::pair(&v, &p_.v),
                                   std::pair(&dout, &p_.dout)})
      to->assign(from->begin(), from->end());
    dlse.assign(p_.dlse.begin(), p_.dlse.end());
    for (auto* written : {&out, &dq}) written->assign(q.size(), static_cast<Number>(NAN));
    for (auto* written : {&dk, &dv}) written->assign(k.size(), static_cast<Number>(NAN));
    lse.assign(dlse.size(), static_cast<Lse>(NAN));
    r.status = forward();
    if (r.status == FLASHTILE_OK) r.status = backward();
    r.out = widened(out);
    r.lse = widened(lse);
    r.dq = widened(dq);
    r.dk = widened(dk);
    r.dv = widened(dv);
    return r;
  }

  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;

 private:
  flashtile_tensor rows(std::vector<Number>& data) const {
    return {data.data(), 0, p_.dim, p_.dim};
  }

  flashtile_status forward() {
    flashtile_forward_params params;
    flashtile_forward_init(&params);
    params.problem = &problem;
    params.q = rows(q);
    params.k = rows(k);
    params.v = rows(v);
    params.out = rows(out);
    params.softmax_lse = reinterpret_cast<float*>(lse.data());
    flashtile_workspace_size(&params, &params.workspace_bytes);
    const std::unique_ptr<void, void (*)(void*)> memory(room(params.workspace_bytes), std::free);
    params.workspace = memory.get();
    return flashtile_forward(&params, nullptr);
  }

  flashtile_status backward() {
    flashtile_backward_params params;
    flashtile_backward_init(&params);
    params.problem = &problem;
    params.q = rows(q);
    params.k = rows(k);
    params.v = rows(v);
    params.out = rows(out);
    params.dout = rows(dout);
    params.dq = rows(dq);
    params.dk = rows(dk);
    params.dv = rows(dv);
    params.softmax_lse = reinterpret_cast<const float*>(lse.data());
    params.dsoftmax_lse = reinterpret_cast<const float*>(dlse.data());
    flashtile_workspace_size_backward(&params, &params.workspace_bytes);
    const std::unique_ptr<void, void (*)(void*)> memory(room(params.workspace_bytes), std::free);
    params.workspace = memory.get();
    return flashtile_backward(&params, nullptr);
  }

  static void* room(size_t bytes) { return std::aligned_alloc(64, bytes / 64 * 64 + 64); }

  const Problem& p_;
  std::vector<Number> q, k, v, dout, out, dq, dk, dv;
  std::vector<Lse> lse, dlse;
};

void expect(const Result& result, const Truth& truth, double allowed, double allowed_lse,
            const std::string& name) {
  CHECK_MESSAGE(result.status == FLASHTILE_OK, name + ": " + flashtile_last_error());
  const struct {
    const char* name;
    double error, allowed;
  } errors[] = {{"out", error_of(result.out, truth.out), allowed},
                {"lse", error_of(result.lse, truth.lse), allowed_lse},
                {"dq", error_of(result.dq, truth.dq), allowed},
                {"dk", error_of(result.dk, truth.dk), allowed},
                {"dv", error_of(result.dv, truth.dv), allowed}};
  for (const auto& e : errors) {
    CHECK_MESSAGE(e.error <= e.allowed,
                  name + ": " + e.name + " is off by " + std::to_string(e.error * 1e15) + "e-15");
  }
}

using WideCall = Call<double, double>;

double usual_scale(int dim) { return 1 / std::sqrt(static_cast<double>(dim)); }

}  // namespace

TEST("fp64 is right to 1e-13 at every head dim") {
  for (int dim = 1; dim <= 256; dim += dim < 20 ? 1 : 19) {
    for (const bool causal : {false, true}) {
      Problem p(dim, usual_scale(dim));
      p.causal = causal;
      expect(WideCall(p)(), truth_of(p), kPromised, kPromised, "d " + std::to_string(dim));
    }
  }
}

TEST("fp64 is right to 1e-13 at every scale") {
  const struct {
    double scale, size_q, size_k;
  } scales[] = {{0.1, 1, 1},
                {-0.3, 1, 1},
                {3e-46, 1e22, 1e23},
                {1e40, 1e-20, 1e-20},
                {7.3, 1, 1},
                {1e-30, 1, 1},
                {1.0 / 3, 9, 9},
                {2e-39, 1e19, 1e20},
                {1e-200, 1e100, 1e100},
                {1e200, 1e-100, 1e-100}};
  for (const auto& [scale, size_q, size_k] : scales) {
    for (const int dim : {2, 64}) {
      const Problem p(dim, scale, size_q, size_k);
      expect(WideCall(p)(), truth_of(p), kPromised, kPromised, std::to_string(scale));
    }
  }
}

// What is stored costs its own rounding and no more: an fp32 log-sum-exp leaves out and gradients
// as they are, an fp64 one of fp32 tensors holds what fp32 arithmetic knows.
TEST("softmax_lse in either dtype") {
  for (const int dim : {3, 64}) {
    Problem p(dim, usual_scale(dim));
    for (double& x : p.dlse) x = static_cast<float>(x);
    const Truth truth = truth_of(p);
    const std::string name = "d " + std::to_string(dim);
    expect(Call<double, float>(p)(), truth, kPromised, 0x1p-23, name + " fp64, lse fp32");
    Problem rounded = p;  // so that the inputs are the same
    for (Numbers* n : {&rounded.q, &rounded.k, &rounded.v, &rounded.dout, &rounded.dlse})
      for (double& x : *n) x = static_cast<float>(x);
    const Truth other = truth_of(rounded);
    const Result narrow = Call<float, float>(rounded)(), wide = Call<float, double>(rounded)();
    expect(narrow, other, 2e-6, 2e-6, name + " fp32, lse fp32");
    expect(wide, other, 2e-6, 2e-6, name + " fp32, lse fp64");
    CHECK(narrow.out == wide.out);
    bool is_rounded = true;
    for (size_t i = 0; i < wide.lse.size(); ++i)
      is_rounded = is_rounded && narrow.lse[i] == static_cast<float>(wide.lse[i]);
    CHECK(is_rounded);
    CHECK(narrow.lse != wide.lse);
  }
}

TEST("which field holds the scale") {
  const Problem p(3, 0.1);
  const Numbers exact = WideCall(p)().out;
  WideCall call(p);
  call.problem.softmax_scale = 5;  // not read
  CHECK(call().out == exact);
  call.problem.softmax_scale_f64 = 0;
  call.problem.softmax_scale = 0.1f;
  CHECK(call().out == WideCall(Problem(3, static_cast<double>(0.1f)))().out);
  call.problem.softmax_scale = 0;  // neither: the usual one
  CHECK(call().out == WideCall(Problem(3, usual_scale(3)))().out);
  // An older caller has the float alone, and its 0 means uniform weights.
  Call<double, float> old(p);
  old.problem.struct_size = offsetof(flashtile_problem, softmax_scale_f64);
  old.problem.softmax_scale = 0;
  const Numbers uniform = old().out;
  expect(old(), truth_of(Problem(3, 0)), kPromised, 0x1p-23, "an old caller's scale 0");
  old.problem.struct_size = sizeof(flashtile_problem);
  old.problem.softmax_scale_f64 = 0;
  old.problem.flags = FLASHTILE_ZERO_SCALE;
  CHECK(old().out == uniform);
}

TEST("scales and dtypes that are refused") {
  SmallCall call;
  const auto said = [&](flashtile_status status) {
    const flashtile_status found = flashtile_forward(&call.forward, nullptr);
    CHECK_EQ(found, status);
    CHECK_EQ(flashtile_backward(&call.backward, nullptr), status);
    return std::string(found == FLASHTILE_OK ? "" : flashtile_last_error());
  };
  call.problem.softmax_scale_f64 = NAN;
  CHECK_EQ(said(FLASHTILE_INVALID_ARGUMENT), "softmax_scale is nan; allowed: a finite number");
  call.problem.softmax_scale_f64 = 1e40;
  CHECK_EQ(
      said(FLASHTILE_INVALID_ARGUMENT),
      "softmax_scale is 1e+40; allowed: -3.40282e+38 to 3.40282e+38 for float32, which computes "
      "in float32");
  call.problem.softmax_scale_f64 = 0;
  call.problem.flags = FLASHTILE_ZERO_SCALE;
  CHECK_EQ(said(FLASHTILE_INVALID_ARGUMENT),
           "softmax_scale is 0.5; allowed: 0 with FLASHTILE_ZERO_SCALE in flags");
  call.problem.flags = 0;
  call.problem.lse_dtype = FLASHTILE_BFLOAT16;
  CHECK_EQ(said(FLASHTILE_INVALID_ARGUMENT),
           "lse_dtype is 1; allowed: FLASHTILE_FLOAT32 (or 0) and FLASHTILE_FLOAT64");
  call.problem.lse_dtype = FLASHTILE_FLOAT64;
  call.problem.device = FLASHTILE_CUDA;
  call.problem.dtype = call.problem.dtype_kv = call.problem.dtype_out = FLASHTILE_BFLOAT16;
  CHECK_EQ(said(FLASHTILE_UNSUPPORTED), "lse_dtype is float64; allowed on CUDA: float32");
}
