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

void fence(Warp& warp, const Inst&, uint32_t mask) { fence_order(warp, mask); }

}  // namespace

void add_fence_ops(OpTable& t) {
  for (const char* scope : {"cta", "gl", "sys"}) t.add(std::string("membar.") + scope, "", fence);
  for (const char* order : {"sc", "acq_rel", "acquire", "release"}) {
    for (const char* scope : {"cta", "gpu", "sys"}) {
      t.add(std::string("fence.") + order + "." + scope, "", fence);
    }
  }
  t.add("fence.proxy.async", "", fence_proxy<true, true>);
  t.add("fence.proxy.async.shared::cta", "", fence_proxy<true, false>);
  t.add("fence.proxy.async.global", "", fence_proxy<false, true>);
}

}  // namespace ptx
