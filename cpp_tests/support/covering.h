// Covering arrays: few rows of choices in which every `strength` factors take every combination of
// their levels at least once. Greedy and deterministic, after the AETG algorithm (Cohen, Dalal,
// Fredman, Patton, 1997).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace flashtile::test {

using Choice = std::vector<int>;  // one level a factor; -1: not yet chosen

// Whether a row, of which some factors may not be chosen yet, is a case at all. Every allowed
// partial row must have an allowed completion.
using Allowed = std::function<bool(const Choice&)>;

class CoveringArray {
 public:
  CoveringArray(std::vector<int> levels, Allowed allowed)
      : levels_(std::move(levels)), allowed_(std::move(allowed)) {}

  // Adds rows until every `strength` factors are covered. Earlier rows count.
  void extend(int strength) {
    groups_.clear();
    choose_groups(strength, 0, {});
    for (const Choice& row : rows_) cover(row);
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (size_t at = 0; at < groups_[g].covered.size(); ++at) {
        if (!groups_[g].covered[at]) add_row(groups_[g], at);
      }
    }
  }

  const std::vector<Choice>& rows() const { return rows_; }

 private:
  // Some factors, and which combinations of their levels are covered or not allowed.
  struct Group {
    std::vector<int> factors;
    std::vector<bool> covered;
  };

  void choose_groups(int strength, int first, std::vector<int> factors) {
    if (strength == 0) {
      add_group(factors);
      return;
    }
    for (int f = first; f < count(); ++f) {
      factors.push_back(f);
      choose_groups(strength - 1, f + 1, factors);
      factors.pop_back();
    }
  }

  void add_group(const std::vector<int>& factors) {
    size_t combinations = 1;
    for (const int f : factors)
      combinations *= static_cast<size_t>(levels_[static_cast<size_t>(f)]);
    Group group = {factors, std::vector<bool>(combinations, false)};
    for (size_t at = 0; at < combinations; ++at)
      group.covered[at] = !allowed_(partial_row(group, at));
    groups_.push_back(group);
  }

  Choice partial_row(const Group& group, size_t at) const {
    Choice row(levels_.size(), -1);
    for (const int f : group.factors) {
      const auto factor = static_cast<size_t>(f);
      row[factor] = static_cast<int>(at % static_cast<size_t>(levels_[factor]));
      at /= static_cast<size_t>(levels_[factor]);
    }
    return row;
  }

  // Index of the row's combination; false where a factor of the group is not chosen yet.
  bool combination(const Group& group, const Choice& row, size_t& at) const {
    size_t scale = 1;
    at = 0;
    for (const int f : group.factors) {
      const auto factor = static_cast<size_t>(f);
      if (row[factor] < 0) return false;
      at += scale * static_cast<size_t>(row[factor]);
      scale *= static_cast<size_t>(levels_[factor]);
    }
    return true;
  }

  int gain(const Choice& row) const {
    int fresh = 0;
    for (const Group& group : groups_) {
      size_t at = 0;
      if (combination(group, row, at)) fresh += !group.covered[at];
    }
    return fresh;
  }

  void cover(const Choice& row) {
    for (Group& group : groups_) {
      size_t at = 0;
      if (combination(group, row, at)) group.covered[at] = true;
    }
  }

  // The best of several rows that have this combination.
  void add_row(const Group& group, size_t at) {
    constexpr int kCandidates = 6;
    Choice best;
    int best_gain = -1;
    for (int i = 0; i < kCandidates; ++i) {
      const Choice row = completed(partial_row(group, at));
      const int fresh = gain(row);
      if (fresh > best_gain) {
        best_gain = fresh;
        best = row;
      }
    }
    rows_.push_back(best);
    cover(best);
  }

  // Chooses the open factors in random order, each the level that covers most; ties are random.
  Choice completed(Choice row) {
    std::vector<int> open;
    for (int f = 0; f < count(); ++f) {
      if (row[static_cast<size_t>(f)] < 0) open.push_back(f);
    }
    while (!open.empty()) {
      const size_t pick = below(open.size());
      const int factor = open[pick];
      open.erase(open.begin() + static_cast<std::ptrdiff_t>(pick));
      row[static_cast<size_t>(factor)] = best_level(row, static_cast<size_t>(factor));
    }
    return row;
  }

  int best_level(Choice row, size_t factor) {
    int best = -1, best_gain = -1;
    const int levels = levels_[factor],
              start = static_cast<int>(below(static_cast<size_t>(levels)));
    for (int i = 0; i < levels; ++i) {
      const int level = (start + i) % levels;
      row[factor] = level;
      if (!allowed_(row)) continue;
      const int fresh = gain(row);
      if (fresh > best_gain) {
        best_gain = fresh;
        best = level;
      }
    }
    return best;
  }

  size_t below(size_t n) {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return static_cast<size_t>((z ^ (z >> 31)) % n);
  }

  int count() const { return static_cast<int>(levels_.size()); }

  std::vector<int> levels_;
  Allowed allowed_;
  std::vector<Group> groups_;
  std::vector<Choice> rows_;
  uint64_t state_ = 1;
};

}  // namespace flashtile::test
