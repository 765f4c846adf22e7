// Order between the accesses of threads: vector clocks.
//
// A stamp is drawn from one counter that only grows. own(t) is the stamp of thread t's accesses
// since its last synchronisation. Thread t knows (is ordered after) an access of thread u stamped s
// when s < floor(t) (a barrier of the whole block lies between), or known[t][u] >= s (a named
// barrier, a warp barrier, an mbarrier), or u == t. So a barrier of the whole block costs nothing
// per pair of threads.
//
// TMA and wgmma see memory through the async proxy. What a thread wrote by ordinary stores is
// visible there once a fence.proxy.async stands anywhere between: a second set of clocks, raised
// by the fence and passed on with the first one.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace ptx {

using Known = std::vector<uint32_t>;  // [threads], stamp

// What is known of one block's threads: everything below `floor`, and up to `known`.
struct Horizon {
  uint32_t floor = 0;
  std::shared_ptr<const Known> known;
  bool covers(int other, uint32_t stamp) const {
    return stamp < floor || (known && (*known)[other] >= stamp);
  }
  void merge(const Horizon& other);
};

// The order of accesses, and what the async proxy sees of shared and of global memory.
enum Layer { kOrder, kSharedProxy, kGlobalProxy, kLayers };
using View = std::array<Horizon, kLayers>;
// What a thread knows of the threads of other blocks, by the block's number.
using Foreign = std::map<uint32_t, View>;

// What was released to a word of global memory: to everybody, and to the threads of one block
// (scope .cta).
struct Published {
  std::shared_ptr<const Foreign> all;
  std::shared_ptr<const Foreign> inside;
  uint32_t block = 0;  // of `inside`
  bool is_empty() const { return !all && !inside; }
};

// All that a release hands over.
struct Release {
  View view;
  std::shared_ptr<const Foreign> foreign;
};

class Clocks {
 public:
  static uint32_t next_stamp();

  void start(int threads, uint32_t block);
  bool knows(int thread, int other, uint32_t stamp) const {
    return thread == other || view_[thread][kOrder].covers(other, stamp);
  }
  // A write that `thread` knows is visible to an async operation which it starts.
  bool shows(Layer proxy, int thread, int other, uint32_t stamp) const {
    return view_[thread][proxy].covers(other, stamp);
  }
  // The same for an access by another block.
  bool knows_foreign(int thread, uint32_t block, int other, uint32_t stamp) const;
  bool shows_foreign(Layer proxy, int thread, uint32_t block, int other, uint32_t stamp) const;

  uint32_t own(int thread) const { return own_[thread]; }
  uint32_t floor(int thread) const { return view_[thread][kOrder].floor; }
  uint32_t block() const { return block_; }

  // All threads of the block meet.
  void join_all();
  // What `from` did becomes ordered before what `to` will do; `to` is part of `from`.
  void join(const std::vector<int>& from, const std::vector<int>& to);

  // fence.proxy.async by the lanes `mask` of the warp that begins at thread `first`.
  void fence_proxy(Layer proxy, int first, uint32_t mask);

  // Adds to `release` what these lanes did and know. What they do later does not belong to it.
  void add_release(Release& release, int first, uint32_t mask);
  // The lanes of `mask` take over what a release of this block handed out.
  void acquire(const Release& release, int first, uint32_t mask);
  // Releases by block. Proxy fences of other blocks do not serve this one: one stands in the block
  // of the asynchronous operation.
  void acquire_foreign(const Foreign& foreign, int first, uint32_t mask);

 private:
  void renew_warp(int first);
  void merge_foreign(std::shared_ptr<const Foreign>& to, const Foreign& from,
                     int layers = kLayers) const;

  uint32_t block_ = 0;
  bool proxies_ = false;  // some thread has executed a proxy fence
  std::vector<uint32_t> own_;
  std::vector<View> view_;
  std::vector<std::shared_ptr<const Foreign>> foreign_;
  bool any_foreign_ = false;
};

}  // namespace ptx
