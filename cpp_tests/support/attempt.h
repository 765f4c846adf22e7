// A setup run once somewhere and compared with its truth, and the rule for values drawn unluckily.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "compare_scores.h"
#include "runner.h"
#include "setup.h"

namespace flashtile::test {

// Bitwise, so that NaN equals NaN.
inline bool identical(const AttentionOutput& a, const AttentionOutput& b) {
  const auto same = [](const std::vector<double>& x, const std::vector<double>& y) {
    return x.size() == y.size() &&
           (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(double)) == 0);
  };
  return same(a.out, b.out) && same(a.lse, b.lse) && same(a.dq, b.dq) && same(a.dk, b.dk) &&
         same(a.dv, b.dv);
}
inline bool identical(const ScoreResults& a, const ScoreResults& b) {
  const auto same = [](const ScoreTensor& x, const ScoreTensor& y) {
    return x.host.bytes() == y.host.bytes();
  };
  return same(a.dbias[0], b.dbias[0]) && same(a.dbias[1], b.dbias[1]) && same(a.dalibi, b.dalibi) &&
         same(a.dsink, b.dsink);
}
inline bool identical(const RunResult& a, const RunResult& b) {
  return identical(a.values, b.values) && identical(a.scores, b.scores);
}

struct Attempt {
  std::string wrong;      // what went wrong, "" when nothing did
  bool finished = false;  // there are results, and a verdict on them
  bool wrong_values_only = false;
  RunResult result;
  std::vector<Verdict> verdicts;  // on the results: one, or one for each schedule

  bool passed() const { return wrong.empty(); }
  bool forward_passed() const {
    return finished && std::all_of(verdicts.begin(), verdicts.end(),
                                   [](const Verdict& v) { return v.forward_passed(); });
  }
  // Passed, or nothing is wrong but an error that is larger than the bound.
  bool has_comparable_values() const {
    if (passed()) return true;
    const Verdict& last = verdicts.empty() ? Verdict() : verdicts.back();
    return wrong_values_only && last.lse.ratio <= 1.0 && last.max_logit.ratio <= 1.0 &&
           std::isfinite(largest_ratio());
  }
  double largest_ratio() const {
    const Verdict& last = verdicts.back();
    return std::max({last.forward.ratio, last.backward.ratio, last.scores.ratio});
  }
};

// Fills in the verdict of an attempt that has results.
inline void judge(const Setup& setup, const Truth& truth, Attempt& attempt) {
  attempt.finished = true;
  const Verdict verdict = compare(setup, truth, attempt.result);
  attempt.verdicts = {verdict};
  attempt.wrong_values_only = attempt.wrong.empty() && !verdict.passed();
  attempt.wrong += verdict.text();
}

// The bound of compare.h measures against the dtype's own error on the same values: a maximum over
// the roundings of a block of 16 rows. Where few roundings enter it can happen to be far below what
// is typical, and a sound result then misses the bound. An example: one query, and one key that
// takes all its weight. The error of that key's dk is a multiple of the error of rowsum(out *
// dout), one number here and one in the dtype. Of two such numbers one is more than four times the
// other in 16 of 100 draws.
//
// So after a narrow miss the same setup is run with other values, and the bound holds for all draws
// together: each side is its largest value in a block over all of them. Where the rare draws in
// which the block matters are few among the first 8, there are 32, 128 or 512, as long as the miss
// becomes narrower. An error that is larger than the bound allows in every draw stays so.
template <class Draw>
Attempt attempt_draws(uint64_t seed, const Draw& draw) {
  struct Pool {
    uint64_t draws;
    double narrow;  // the ratio so far with which it is worth the time
  };
  constexpr Pool kPools[] = {{8, 64.0}, {32, 64.0}, {128, 16.0}, {512, 4.0}};
  constexpr uint64_t kStep = 1000;
  Attempt attempt = draw(seed);
  const std::string alone = attempt.wrong;
  uint64_t drawn = 1;
  for (const auto& [draws, narrow] : kPools) {
    if (attempt.passed() || !attempt.has_comparable_values()) break;
    if (attempt.largest_ratio() > narrow) break;
    Verdict& pooled = attempt.verdicts.back();
    for (; drawn < draws; ++drawn) {
      const Attempt again = draw(seed + drawn * kStep);
      if (!again.has_comparable_values()) return again;
      pooled.forward.pool(again.verdicts.back().forward);
      pooled.backward.pool(again.verdicts.back().backward);
      pooled.scores.pool(again.verdicts.back().scores);
    }
    attempt.wrong = "";
    if (!pooled.passed())
      attempt.wrong = alone + "\n  over " + std::to_string(draws) + " draws:" + pooled.text();
  }
  return attempt;
}

// Twice, with the same bits, when the setup is deterministic.
inline Attempt attempt_on_cpu(const Setup& setup, const Truth& truth) {
  static const Backend backend = cpu_backend();
  Attempt attempt;
  attempt.result = Run(setup, backend)();
  attempt.wrong = attempt.result.error;
  if (!attempt.wrong.empty()) return attempt;
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  flashtile_get_build_info(&info);
  const std::string kernel =
      std::string("_cpu_") + info.cpu_instruction_set_used + "_" + name_of(setup.dtype) +
      (setup.spec.dtype_kv ? std::string("_kv_") + name_of(*setup.spec.dtype_kv) : "");
  for (const std::string& plan : {attempt.result.forward_plan, attempt.result.backward_plan}) {
    if (!plan.empty() && !plan.ends_with(kernel)) attempt.wrong += "ran " + plan + "; ";
  }
  if (setup.spec.deterministic && !identical(attempt.result, Run(setup, backend)()))
    attempt.wrong += "not the bits of the first run; ";
  judge(setup, truth, attempt);
  return attempt;
}

// `make(seed)`: the setup with the values of a seed.
template <class Make>
Attempt attempt_draws_on_cpu(uint64_t seed, const Make& make) {
  return attempt_draws(seed, [&](uint64_t drawn) {
    const Setup setup = make(drawn);
    return attempt_on_cpu(setup, Truth(setup));
  });
}

}  // namespace flashtile::test
