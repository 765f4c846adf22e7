// flashtile_check_cache on CUDA: one thread block, a warp for every sequence in turn, whose lanes
// look at the columns of the block table.
#include "api/backend.h"
#include "cache_ops/report.h"
#include "cuda/device.h"
#include "launch.cuh"
#include "ptx/order.cuh"

namespace flashtile {

struct CheckCacheLaunch {
  Problem problem;
  CacheReport* report;
};

struct CheckCache {
  using Params = CheckCacheLaunch;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSharedBytes = kThreads * static_cast<int>(sizeof(CacheReport));
  static constexpr int kLanes = 32;

  static FLASHTILE_DEVICE void run(const Params& launch, char* shared) {
    auto* const found = reinterpret_cast<CacheReport*>(shared);  // [kThreads]
    const int thread = ptx::thread_index();
    found[thread] = first_of_thread(launch.problem, thread);
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();  // the upper half has its final reports
      if (thread < half && comes_before(found[thread + half], found[thread]))
        found[thread] = found[thread + half];
    }
    if (thread == 0 && found[0].what != 0) publish(found[0], *launch.report);
  }

 private:
  static FLASHTILE_DEVICE CacheReport first_of_thread(const Problem& problem, int thread) {
    CacheReport report = {};
    for (int64_t b = thread / kLanes; b < problem.batch && report.what == 0;
         b += kThreads / kLanes) {
      report = find_wrong_number(problem, b);
      if (report.what == 0) report = find_wrong_page(problem, b, thread % kLanes, kLanes);
    }
    return report;
  }

  // Into memory that other launches write and the host reads: the first to find it empty claims it,
  // and `what`, written last, says that the rest is there.
  static FLASHTILE_DEVICE void publish(const CacheReport& found, CacheReport& report) {
    if (ptx::compare_and_swap(&report.what, 0, kReportInWork) != 0) return;
    report.reserved = 0;
    report.sequence = found.sequence;
    report.index = found.index;
    report.value = found.value;
    report.least = found.least;
    report.most = found.most;
    ptx::store_release_system(&report.what, found.what);
  }
};

Status cuda::check_cache(const Problem& problem, CacheReport* report, int device_index,
                         CUstream_st* stream) {
  DeviceScope scope(device_index);
  Device device;
  if (Status s = scope.enter(device)) return s;
  return launch<CheckCache>({problem, report}, problem.batch == 0 ? 0 : 1, stream);
}

}  // namespace flashtile
