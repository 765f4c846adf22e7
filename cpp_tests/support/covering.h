// Covering arrays: few rows of choices in which every `strength` factors take every combination of
// their levels at least once. Greedy and deterministic, after the AETG algorithm (Cohen, Dalal,
// Fredman, Patton, 1997).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
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
  void extend(int strength);

  const std::vector<Choice>& rows() const { return rows_; }

 private:
  // Some factors, and which combinations of their levels are covered or not allowed.
  struct Group {
    std::vector<int> factors;
    std::vector<bool> covered;
  };

  void choose_groups(int strength, int first, std::vector<int> factors);
  void add_group(const std::vector<int>& factors);
  Choice partial_row(const Group& group, size_t at) const;

  // Index of the row's combination; false where a factor of the group is not chosen yet.
  bool combination(const Group& group, const Choice& row, size_t& at) const;
  int gain(const Choice& row) const;
  void cover(const Choice& row);

  // The best of several rows that have this combination.
  void add_row(const Group& group, size_t at);

  // Chooses the open factors in random order, each the level that covers most; ties are random.
  Choice completed(Choice row);
  int best_level(Choice row, size_t factor);
  size_t below(size_t n);

  int count() const { return static_cast<int>(levels_.size()); }

  std::vector<int> levels_;
  Allowed allowed_;
  std::vector<Group> groups_;
  std::vector<Choice> rows_;
  uint64_t state_ = 1;
};

}  // namespace flashtile::test
