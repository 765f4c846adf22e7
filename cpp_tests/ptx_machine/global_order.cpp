// Order between blocks: release and acquire of words of global memory.
#include "grid.h"

namespace ptx {

namespace {

using Handed = std::shared_ptr<const Foreign>;

bool is_global(uint64_t address) { return (address & kWindowMask) == 0; }

Handed merged(const Handed& a, const Handed& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto both = std::make_shared<Foreign>(*a);
  for (const auto& [block, view] : *b) {
    for (int layer = 0; layer < kLayers; ++layer) (*both)[block][layer].merge(view[layer]);
  }
  return both;
}

Published merged(const Published& a, const Published& b) {
  if (!b.inside) return {merged(a.all, b.all), a.inside, a.block};
  const bool both = a.inside && a.block == b.block;
  return {merged(a.all, b.all), both ? merged(a.inside, b.inside) : b.inside, b.block};
}

// All that these lanes did and know, as other blocks see it.
Handed publish(Warp& warp, uint32_t mask) {
  Clocks& clocks = warp.block->clocks;
  Release release;
  clocks.add_release(release, warp.first_thread(), mask);
  auto all =
      release.foreign ? std::make_shared<Foreign>(*release.foreign) : std::make_shared<Foreign>();
  (*all)[clocks.block()] = release.view;
  return all;
}

// What an acquire of this scope, in this block, takes from a release: of .cta only what the block
// itself has released.
Published seen(const Published& from, const Block& block, int32_t order) {
  const uint32_t number = block.clocks.block();
  Published seen{nullptr, from.block == number ? from.inside : nullptr, number};
  if (!from.all) return seen;
  if (!is_in_block(order)) {
    seen.all = from.all;
  } else if (const auto own = from.all->find(number); own != from.all->end()) {
    seen.inside = merged(seen.inside, std::make_shared<Foreign>(Foreign{*own}));
  }
  return seen;
}

void acquire(Warp& warp, int lane, const Published& from) {
  for (const Handed& view : {from.all, from.inside}) {
    if (view) warp.block->clocks.acquire_foreign(*view, warp.first_thread(), 1u << lane);
  }
}

// What a write of this lane hands over: its own release, or what a fence before it has published.
Published handed_over(Warp& warp, int lane, int32_t order) {
  Block& block = *warp.block;
  Published mine{nullptr, nullptr, block.clocks.block()};
  if (!block.fenced.empty()) mine = block.fenced[warp.first_thread() + lane];
  if (is_in_block(order)) mine.all = nullptr;
  if (releases(order)) (is_in_block(order) ? mine.inside : mine.all) = publish(warp, 1u << lane);
  return mine;
}

}  // namespace

void release_words(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order,
                   bool changed) {
  Block& block = *warp.block;
  auto& released = block.grid->released;
  if (!releases(order) && block.fenced.empty() && released.empty()) return;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    if (!is_global(address[l])) continue;
    const Published mine = handed_over(warp, l, order);
    const auto it = released.find(address[l]);
    // A store ends what an earlier one released; an update carries it on.
    const bool keeps = changed && it != released.end();
    if (keeps)
      it->second = merged(it->second, mine);
    else if (!mine.is_empty())
      released[address[l]] = mine;
    else if (it != released.end())
      released.erase(it);
  }
}

void acquire_words(Warp& warp, const uint64_t (&address)[kLanes], uint32_t mask, int32_t order) {
  Block& block = *warp.block;
  const auto& released = block.grid->released;
  if (released.empty()) return;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    const auto it = is_global(address[l]) ? released.find(address[l]) : released.end();
    if (it == released.end()) continue;
    const Published from = seen(it->second, block, order);
    if (acquires(order)) {
      acquire(warp, l, from);
      continue;
    }
    if (block.observed.empty()) block.observed.resize(block.threads);
    Published& observed = block.observed[warp.first_thread() + l];
    observed = merged(observed, from);
  }
}

void fence_order(Warp& warp, uint32_t mask, int32_t order) {
  Block& block = *warp.block;
  for (uint32_t lanes = mask; acquires(order) && lanes != 0 && !block.observed.empty();
       lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    Published& observed = block.observed[warp.first_thread() + l];
    if (observed.is_empty()) continue;
    acquire(warp, l, seen(observed, block, order));
    if (!is_in_block(order)) observed = {};
  }
  if (!releases(order)) return;
  if (block.fenced.empty()) block.fenced.resize(block.threads);
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    Published& fenced = block.fenced[warp.first_thread() + l];
    fenced.block = block.clocks.block();
    fenced.inside = publish(warp, 1u << l);
    if (!is_in_block(order)) fenced.all = fenced.inside;
  }
}

void yield_poll(Warp& warp) {
  if (warp.block->grid->blocks.size() > 1) warp.yields = warp.event = true;
}

}  // namespace ptx
