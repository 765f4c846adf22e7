#include "usual_cases.h"

#include <string>

#include "covering.h"
#include "matrix.h"

namespace flashtile::test {

namespace {

struct Pair {
  int seqlen_q, seqlen_k;
};

std::vector<Pair> usual_lengths(Lengths lengths) {
  if (lengths == Lengths::kShort) return {{1, 147}, {113, 203}, {128, 217}, {113, 211}, {108, 256}};
  return {{256, 512}, {512, 256}, {1024, 1024}};
}

}  // namespace

std::vector<UsualCase> usual_cases(const std::vector<HeadDims>& all_head_dims, Lengths lengths) {
  const std::vector<Pair> pairs = usual_lengths(lengths);
  const std::vector<Heads> heads = {{3, 3}, {4, 1}, {4, 2}};
  enum { kDims, kPair, kHeads, kMask, kDrop, kSlopes, kCap, kOrder, kPacked, kType, kCount };
  std::vector<int> levels(kCount, 2);
  levels[kDims] = static_cast<int>(all_head_dims.size());
  levels[kPair] = static_cast<int>(pairs.size());
  levels[kHeads] = levels[kSlopes] = 3;
  levels[kMask] = 4;
  CoveringArray array(levels, [](const Choice&) { return true; });
  array.extend(2);
  std::vector<UsualCase> cases;
  for (const Choice& row : array.rows()) {
    const auto at = [&](int factor) {
      return static_cast<size_t>(row[static_cast<size_t>(factor)]);
    };
    const auto [q, k] = pairs[at(kPair)];
    const Mask masks[] = {kFull, kCausal, {q / 3, k / 4}, {k / 5, 0}};
    UsualCase one = {.spec = {},
                     .head_dims = all_head_dims[at(kDims)],
                     .mask = masks[at(kMask)],
                     .dtype = at(kType) == 0 ? Dtype::kFloat16 : Dtype::kBFloat16};
    Case& spec = one.spec;
    spec.name = "usual " + std::to_string(cases.size());
    spec.heads = heads[at(kHeads)].q;
    spec.heads_kv = heads[at(kHeads)].kv;
    spec.seqlen_q = q;
    spec.seqlen_k = k;
    if (at(kPacked) == 1) {
      spec.lengths_q = {q, q / 2};
      spec.lengths_k = {k, k - k / 3};
    }
    spec.deterministic = at(kOrder) == 1;
    spec.dlse = false;
    spec.scores.dropout_p = at(kDrop) == 1 ? 0.17 : 0.0;
    spec.scores.alibi = static_cast<int>(at(kSlopes));
    spec.scores.softcap = at(kCap) == 1 ? 50.0 : 0.0;
    cases.push_back(one);
  }
  return cases;
}

}  // namespace flashtile::test
