// Fences: of memory order between blocks, and of the async proxy.
#include "grid.h"
#include "ops.h"

namespace ptx {

namespace {

template <bool kShared, bool kGlobal>
void fence_proxy(Warp& warp, const Inst&, uint32_t mask) {
  Clocks& clocks = warp.block->clocks;
  if (kShared) clocks.fence_proxy(kSharedProxy, warp.first_thread(), mask);
  if (kGlobal) clocks.fence_proxy(kGlobalProxy, warp.first_thread(), mask);
}

void fence(Warp& warp, const Inst& inst, uint32_t mask) {
  fence_order(warp, mask, inst.operand[0]);
}

}  // namespace

void add_fence_ops(OpTable& t) {
  t.add("membar.cta", "#", fence, kAcquireRelease | kInBlock);
  for (const char* scope : {"gl", "sys"})
    t.add(std::string("membar.") + scope, "#", fence, kAcquireRelease);
  const std::pair<const char*, Order> orders[] = {{"sc", kAcquireRelease},
                                                  {"acq_rel", kAcquireRelease},
                                                  {"acquire", kAcquire},
                                                  {"release", kRelease}};
  for (const auto& [name, order] : orders) {
    for (const auto& [scope, in_block] : kScopes)
      t.add(std::string("fence.") + name + scope, "#", fence, order | in_block);
  }
  t.add("fence.proxy.async", "", fence_proxy<true, true>);
  t.add("fence.proxy.async.shared::cta", "", fence_proxy<true, false>);
  t.add("fence.proxy.async.global", "", fence_proxy<false, true>);
}

}  // namespace ptx
