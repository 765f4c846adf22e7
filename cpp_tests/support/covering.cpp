#include "covering.h"

namespace flashtile::test {

void CoveringArray::extend(int strength) {
  groups_.clear();
  choose_groups(strength, 0, {});
  for (const Choice& row : rows_) cover(row);
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (size_t at = 0; at < groups_[g].covered.size(); ++at) {
      if (!groups_[g].covered[at]) add_row(groups_[g], at);
    }
  }
}

void CoveringArray::choose_groups(int strength, int first, std::vector<int> factors) {
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

void CoveringArray::add_group(const std::vector<int>& factors) {
  size_t combinations = 1;
  for (const int f : factors) combinations *= static_cast<size_t>(levels_[static_cast<size_t>(f)]);
  Group group = {factors, std::vector<bool>(combinations, false)};
  for (size_t at = 0; at < combinations; ++at)
    group.covered[at] = !allowed_(partial_row(group, at));
  groups_.push_back(group);
}

Choice CoveringArray::partial_row(const Group& group, size_t at) const {
  Choice row(levels_.size(), -1);
  for (const int f : group.factors) {
    const auto factor = static_cast<size_t>(f);
    row[factor] = static_cast<int>(at % static_cast<size_t>(levels_[factor]));
    at /= static_cast<size_t>(levels_[factor]);
  }
  return row;
}

bool CoveringArray::combination(const Group& group, const Choice& row, size_t& at) const {
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

int CoveringArray::gain(const Choice& row) const {
  int fresh = 0;
  for (const Group& group : groups_) {
    size_t at = 0;
    if (combination(group, row, at)) fresh += !group.covered[at];
  }
  return fresh;
}

void CoveringArray::cover(const Choice& row) {
  for (Group& group : groups_) {
    size_t at = 0;
    if (combination(group, row, at)) group.covered[at] = true;
  }
}

void CoveringArray::add_row(const Group& group, size_t at) {
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

Choice CoveringArray::completed(Choice row) {
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

int CoveringArray::best_level(Choice row, size_t factor) {
  int best = -1, best_gain = -1;
  const int levels = levels_[factor], start = static_cast<int>(below(static_cast<size_t>(levels)));
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

size_t CoveringArray::below(size_t n) {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<size_t>((z ^ (z >> 31)) % n);
}

}  // namespace flashtile::test
