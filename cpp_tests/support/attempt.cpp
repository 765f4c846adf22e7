#include "attempt.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace flashtile::test {

bool identical(const AttentionOutput& a, const AttentionOutput& b) {
  const auto same = [](const std::vector<double>& x, const std::vector<double>& y) {
    return x.size() == y.size() &&
           (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(double)) == 0);
  };
  return same(a.out, b.out) && same(a.lse, b.lse) && same(a.dq, b.dq) && same(a.dk, b.dk) &&
         same(a.dv, b.dv);
}

bool identical(const ScoreResults& a, const ScoreResults& b) {
  const auto same = [](const ScoreTensor& x, const ScoreTensor& y) {
    return x.host.bytes() == y.host.bytes();
  };
  return same(a.dbias[0], b.dbias[0]) && same(a.dbias[1], b.dbias[1]) && same(a.dalibi, b.dalibi) &&
         same(a.dsink, b.dsink);
}

bool identical(const RunResult& a, const RunResult& b) {
  return identical(a.values, b.values) && identical(a.scores, b.scores);
}

bool Attempt::forward_passed() const {
  return finished && std::all_of(verdicts.begin(), verdicts.end(),
                                 [](const Verdict& v) { return v.forward_passed(); });
}

bool Attempt::has_comparable_values() const {
  if (passed()) return true;
  const Verdict& last = verdicts.empty() ? Verdict() : verdicts.back();
  return wrong_values_only && last.lse.ratio <= 1.0 && last.max_logit.ratio <= 1.0 &&
         std::isfinite(largest_ratio());
}

double Attempt::largest_ratio() const {
  const Verdict& last = verdicts.back();
  return std::max({last.forward.ratio, last.backward.ratio, last.scores.ratio});
}

void judge(const Setup& setup, const Truth& truth, Attempt& attempt) {
  attempt.finished = true;
  const Verdict verdict = compare(setup, truth, attempt.result);
  attempt.verdicts = {verdict};
  attempt.wrong_values_only = attempt.wrong.empty() && !verdict.passed();
  attempt.wrong += verdict.text();
}

Attempt attempt_draws(uint64_t seed, const std::function<Attempt(uint64_t)>& draw) {
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

}  // namespace flashtile::test
