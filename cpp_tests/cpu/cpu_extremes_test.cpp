// The CPU op on numbers that break careless kernels, on every instruction set of this machine: huge
// logits, rows far below zero, and NaN and inf, which reach the rows that they touch and no other.
#include <cmath>
#include <string>
#include <vector>

#include "../support/attempt.h"
#include "../support/check.h"
#include "../support/instruction_sets.h"
#include "../support/runner.h"

using namespace flashtile::test;

namespace {

constexpr Dtype kAllDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32,
                                Dtype::kFloat64};

template <class Visit>
void for_each_engine(const Visit& visit) {
  for (const InstructionSet& set : instruction_sets()) {
    const ForcedInstructionSet forced(set.name);
    for (const Dtype dtype : kAllDtypes) {
      if (set.has(dtype)) visit(set.name + " " + name_of(dtype), dtype);
    }
  }
}

AttentionOutput run(const Setup& setup) {
  const RunResult result = Run(setup, cpu_backend())();
  CHECK_MESSAGE(result.error.empty(), result.error);
  return result.values;
}

template <class Value>
void set_all(HostTensor& tensor, const Value& value) {
  tensor.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    tensor.set(b, s, h, d, value(s, d, tensor.get(b, s, h, d)));
  });
}

// Every logit of key j is logits[j % size], exactly: it is in dimension 0 alone.
Setup with_logits(const Case& spec, Dtype dtype, const std::vector<double>& logits,
                  const Mask& mask, uint64_t seed) {
  Setup setup = make_setup(spec, dtype, 64, mask, seed);
  setup.softmax_scale = 0.125f;
  set_all(setup.q, [](auto, auto d, double x) { return d == 0 ? 256.0 : 0.0 * x; });
  set_all(setup.k, [&](auto s, auto d, double x) {
    return d == 0 ? logits[static_cast<size_t>(s) % logits.size()] / 32.0 : x;
  });
  return setup;
}

bool is_finite_row(const std::vector<double>& values, int64_t row, int64_t row_size) {
  for (int64_t i = row * row_size; i < (row + 1) * row_size; ++i) {
    if (!std::isfinite(values[static_cast<size_t>(i)])) return false;
  }
  return true;
}

bool is_nan_row(const std::vector<double>& values, int64_t row, int64_t row_size) {
  for (int64_t i = row * row_size; i < (row + 1) * row_size; ++i) {
    if (!std::isnan(values[static_cast<size_t>(i)])) return false;
  }
  return true;
}

// One sequence with the element (row, head 0, column 1) of `tensor` replaced.
AttentionOutput run_with(Setup setup, char tensor, int64_t row, double value) {
  HostTensor& target = tensor == 'q'   ? setup.q
                       : tensor == 'k' ? setup.k
                       : tensor == 'v' ? setup.v
                                       : setup.dout;
  target.set(0, row, 0, 1, value);
  return run(setup);
}

// A number that is not finite in key or value `row`: the queries that see it, and no other, show
// it.
void check_key_row(const Setup& setup, char tensor, int64_t row, double value,
                   const std::string& engine) {
  const int64_t q = setup.extents_q.seq, k = setup.extents_k.seq, dim = setup.head_dim;
  const AttentionOutput r = run_with(setup, tensor, row, value);
  for (int64_t i = 0; i < q; ++i) {
    const bool seen = sees(setup.mask, q, k, i, row);
    // An infinite key whose score is -inf has weight 0: a row that sees it may stay finite.
    if (seen && tensor == 'k' && std::isinf(value)) continue;
    const std::string where =
        engine + " " + name_of(setup.mask) + " " + tensor + " query " + std::to_string(i);
    CHECK_MESSAGE(is_finite_row(r.out, i, dim) == !seen, where + " out");
    CHECK_MESSAGE(is_finite_row(r.dq, i, dim) == !seen, where + " dq");
  }
}

// The same for query or dout `row`.
void check_query_row(const Setup& setup, char tensor, int64_t row, double value,
                     const std::string& engine) {
  const int64_t q = setup.extents_q.seq, k = setup.extents_k.seq, dim = setup.head_dim;
  const AttentionOutput r = run_with(setup, tensor, row, value);
  const std::string where = engine + " " + name_of(setup.mask) + " " + tensor + " ";
  for (int64_t i = 0; i < q; ++i) {
    CHECK_MESSAGE(is_finite_row(r.dq, i, dim) == (i != row), where + "dq " + std::to_string(i));
  }
  for (int64_t j = 0; j < k; ++j) {
    if (sees(setup.mask, q, k, row, j)) continue;
    CHECK_MESSAGE(is_finite_row(r.dk, j, dim) && is_finite_row(r.dv, j, dim),
                  where + "key " + std::to_string(j));
  }
}

}  // namespace

TEST("logits of 1e12: one key gives its value and finite gradients") {
  for_each_engine([](const std::string& engine, Dtype dtype) {
    const double huge = dtype == Dtype::kFloat16 ? 65504.0 : 133120.0;
    for (const int queries : {1, 40}) {  // the decode pass, and the other
      Setup setup = make_setup({.name = "", .seqlen_q = queries, .seqlen_k = 1, .dlse = false},
                               dtype, 64, kFull);
      for (HostTensor* t : {&setup.q, &setup.k, &setup.v}) {
        set_all(*t, [&](auto...) { return huge; });
      }
      const AttentionOutput r = run(setup);
      for (const double x : r.out) CHECK_MESSAGE(x == huge, engine + " out " + std::to_string(x));
      for (const auto* gradient : {&r.dq, &r.dk, &r.dv}) {
        for (const double x : *gradient) CHECK_MESSAGE(std::isfinite(x), engine + " gradient");
      }
      for (size_t d = 0; d < r.dv.size(); ++d) {
        double sum = 0.0, largest = 0.0;
        for (int i = 0; i < queries; ++i) {
          sum += setup.dout.get(0, i, 0, static_cast<int64_t>(d));
          largest += std::fabs(setup.dout.get(0, i, 0, static_cast<int64_t>(d)));
        }
        CHECK_MESSAGE(
            std::fabs(r.dv[d] - sum) <= epsilon_of(dtype) * std::fabs(sum) + 1e-6 * largest,
            engine + " dv " + std::to_string(r.dv[d]) + " not " + std::to_string(sum));
      }
    }
  });
}

TEST("logits of both signs and any size agree with manual attention") {
  const std::vector<std::vector<double>> all = {
      {-245000.0},                       // every key
      {-245760.0, -245760.0, 8192.0},    // most keys
      {1048576.0, 1048576.0, 131072.0},  // ties
      {4096.0, -4096.0},
  };
  for_each_engine([&](const std::string& engine, Dtype dtype) {
    const Case spec{.name = "large logits", .seqlen_q = 70, .seqlen_k = 130};
    for (const std::vector<double>& logits : all) {
      for (const Mask& mask : {kFull, kCausal, Mask{20, 10}}) {
        const Attempt attempt = attempt_draws_on_cpu(
            7, [&](uint64_t seed) { return with_logits(spec, dtype, logits, mask, seed); });
        CHECK_MESSAGE(attempt.passed(), engine + " " + name_of(mask) + ": " + attempt.wrong);
      }
    }
  });
}

TEST("a row whose keys all score -inf is NaN, as in torch") {
  for_each_engine([](const std::string& engine, Dtype dtype) {
    for (const int queries : {1, 40}) {
      Setup setup = make_setup({.name = "", .seqlen_q = queries, .seqlen_k = 50}, dtype, 16, kFull);
      set_all(setup.q, [](auto, auto d, double x) { return d == 0 ? 1.0 : x; });
      set_all(setup.k, [](auto, auto d, double x) { return d == 0 ? -kInfinity : x; });
      const AttentionOutput r = run(setup);
      for (int i = 0; i < queries; ++i) {
        CHECK_MESSAGE(is_nan_row(r.out, i, 16) && std::isnan(r.lse[static_cast<size_t>(i)]),
                      engine + " row " + std::to_string(i));
      }
    }
  });
}

TEST("NaN and inf reach the rows that see them and no other") {
  const Case spec{.name = "", .heads = 1, .heads_kv = 1, .seqlen_q = 120, .seqlen_k = 150};
  constexpr int64_t kRow = 50, kKey = 80;
  for_each_engine([&](const std::string& engine, Dtype dtype) {
    for (const Mask& mask : {kCausal, kCausalTopLeft, Mask{20, 10}, Mask{0, 0}, Mask{-1, 5}}) {
      const Setup setup = make_setup(spec, dtype, 24, mask, 3);
      for (const double value : {double{NAN}, double{INFINITY}}) {
        check_key_row(setup, 'k', kKey, value, engine);
        check_key_row(setup, 'v', kKey, value, engine);
        check_query_row(setup, 'q', kRow, value, engine);
        check_query_row(setup, 'd', kRow, value, engine);
      }
    }
  });
}

TEST("NaN and inf in decoding reach the rows that see them and no other") {
  const Case spec{.name = "", .heads = 1, .heads_kv = 1, .seqlen_q = 4, .seqlen_k = 300};
  for_each_engine([&](const std::string& engine, Dtype dtype) {
    for (const Mask& mask : {kCausal, Mask{20, 0}, Mask{0, 0}, Mask{130, 2}}) {
      const Setup setup = make_setup(spec, dtype, 24, mask, 3);
      for (const int64_t key : {0, 150, 278, 295, 296, 297, 298, 299}) {
        check_key_row(setup, 'k', key, NAN, engine);
        check_key_row(setup, 'v', key, NAN, engine);
      }
    }
  });
}
