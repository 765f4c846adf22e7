#include "clocks.h"

#include <algorithm>

namespace ptx {

namespace {

uint32_t g_stamp = 1;
constexpr int kWarp = 32;

void raise(Known& to, const Known& from) {
  for (size_t u = 0; u < to.size(); ++u) to[u] = std::max(to[u], from[u]);
}

}  // namespace

void Horizon::merge(const Horizon& other) {
  floor = std::max(floor, other.floor);
  if (!other.known || other.known == known) return;
  if (!known) {
    known = other.known;
    return;
  }
  auto merged = std::make_shared<Known>(*known);
  raise(*merged, *other.known);
  known = std::move(merged);
}

uint32_t Clocks::next_stamp() { return ++g_stamp; }

void Clocks::start(int threads, uint32_t block) {
  const uint32_t stamp = next_stamp();
  block_ = block;
  proxies_ = any_foreign_ = false;
  own_.assign(threads, stamp);
  View view;
  view[kOrder].floor = stamp;
  // What earlier launches wrote is visible to every proxy.
  view[kSharedProxy].floor = view[kGlobalProxy].floor = stamp;
  view_.assign(threads, view);
  foreign_.assign(threads, nullptr);
}

bool Clocks::knows_foreign(int thread, uint32_t block, int other, uint32_t stamp) const {
  return shows_foreign(kOrder, thread, block, other, stamp);
}

bool Clocks::shows_foreign(Layer layer, int thread, uint32_t block, int other,
                           uint32_t stamp) const {
  const auto& foreign = foreign_[thread];
  if (!foreign) return false;
  const auto it = foreign->find(block);
  return it != foreign->end() && it->second[layer].covers(other, stamp);
}

void Clocks::merge_foreign(std::shared_ptr<const Foreign>& to, const Foreign& from,
                           int layers) const {
  auto merged = to ? std::make_shared<Foreign>(*to) : std::make_shared<Foreign>();
  for (const auto& [block, view] : from) {
    if (block == block_) continue;
    View& mine = (*merged)[block];
    for (int layer = 0; layer < layers; ++layer) mine[layer].merge(view[layer]);
  }
  to = std::move(merged);
}

void Clocks::join_all() {
  if (proxies_) {
    for (const Layer layer : {kSharedProxy, kGlobalProxy}) {
      Horizon all;
      for (const View& view : view_) all.merge(view[layer]);
      for (View& view : view_) view[layer] = all;
    }
  }
  if (any_foreign_) {
    std::shared_ptr<const Foreign> all;
    const Foreign* last = nullptr;
    for (const auto& foreign : foreign_) {
      if (foreign && foreign.get() != last) merge_foreign(all, *(last = foreign.get()));
    }
    std::fill(foreign_.begin(), foreign_.end(), all);
  }
  const uint32_t stamp = next_stamp();
  std::fill(own_.begin(), own_.end(), stamp);
  for (View& view : view_) {
    view[kOrder].floor = stamp;
    view[kOrder].known = nullptr;
  }
}

void Clocks::join(const std::vector<int>& from, const std::vector<int>& to) {
  auto known = std::make_shared<Known>(own_.size(), 0);
  View joined;
  std::shared_ptr<const Foreign> foreign;
  const Known* merged = nullptr;
  const Foreign* last = nullptr;
  for (const int t : from) {
    const Horizon& order = view_[t][kOrder];
    joined[kOrder].floor = std::max(joined[kOrder].floor, order.floor);
    if (order.known && order.known.get() != merged) raise(*known, *(merged = order.known.get()));
    if (proxies_) {
      for (const Layer layer : {kSharedProxy, kGlobalProxy}) joined[layer].merge(view_[t][layer]);
    }
    if (foreign_[t] && foreign_[t].get() != last)
      merge_foreign(foreign, *(last = foreign_[t].get()));
  }
  for (const int t : from) (*known)[t] = own_[t];
  joined[kOrder].known = std::move(known);
  const uint32_t stamp = next_stamp();
  for (const int t : from) own_[t] = stamp;
  for (const int t : to) {
    view_[t][kOrder] = joined[kOrder];
    if (proxies_) {
      view_[t][kSharedProxy] = joined[kSharedProxy];
      view_[t][kGlobalProxy] = joined[kGlobalProxy];
    }
    if (foreign) foreign_[t] = foreign;
  }
}

void Clocks::fence_proxy(Layer proxy, int first, uint32_t mask) {
  proxies_ = true;
  // The lanes of a warp fence together: one horizon serves them all.
  Horizon all;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    all.merge(view_[first + __builtin_ctz(lanes)][kOrder]);
  }
  auto known =
      all.known ? std::make_shared<Known>(*all.known) : std::make_shared<Known>(own_.size(), 0);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int t = first + __builtin_ctz(lanes);
    (*known)[t] = own_[t];
  }
  all.known = std::move(known);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int t = first + __builtin_ctz(lanes);
    all.floor = view_[t][kOrder].floor;
    view_[t][proxy].merge(all);
    if (foreign_[t]) {
      auto raised = std::make_shared<Foreign>(*foreign_[t]);
      for (auto& [block, view] : *raised) view[proxy].merge(view[kOrder]);
      foreign_[t] = std::move(raised);
    }
  }
  renew_warp(first);
}

void Clocks::renew_warp(int first) {
  const uint32_t stamp = next_stamp();
  const int end = std::min(first + kWarp, static_cast<int>(own_.size()));
  for (int t = first; t < end; ++t) own_[t] = stamp;
}

void Clocks::add_release(Release& release, int first, uint32_t mask) {
  const Foreign* last = nullptr;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int t = first + __builtin_ctz(lanes);
    for (int layer = 0; layer < kLayers; ++layer) release.view[layer].merge(view_[t][layer]);
    const auto& foreign = foreign_[t];
    if (foreign && foreign.get() != last) merge_foreign(release.foreign, *(last = foreign.get()));
  }
  Horizon& order = release.view[kOrder];
  auto known =
      order.known ? std::make_shared<Known>(*order.known) : std::make_shared<Known>(own_.size(), 0);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int t = first + __builtin_ctz(lanes);
    (*known)[t] = own_[t];
  }
  order.known = std::move(known);
  renew_warp(first);
}

void Clocks::acquire(const Release& release, int first, uint32_t mask) {
  // Lanes of a warp mostly know the same: what one of them got serves the next.
  View before, after;
  bool have = false;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int t = first + __builtin_ctz(lanes);
    View& view = view_[t];
    bool same = have;
    for (int layer = 0; layer < kLayers && same; ++layer) {
      same = view[layer].known == before[layer].known && view[layer].floor == before[layer].floor;
    }
    if (!same) {
      before = after = view;
      for (int layer = 0; layer < kLayers; ++layer) after[layer].merge(release.view[layer]);
      have = true;
    }
    view = after;
    if (release.foreign) {
      any_foreign_ = true;
      merge_foreign(foreign_[t], *release.foreign);
    }
  }
}

void Clocks::acquire_foreign(const Foreign& foreign, int first, uint32_t mask) {
  const auto mine = foreign.find(block_);
  if (mine != foreign.end()) acquire({mine->second, nullptr}, first, mask);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    merge_foreign(foreign_[first + __builtin_ctz(lanes)], foreign, kOrder + 1);
  }
  any_foreign_ = true;
}

}  // namespace ptx
