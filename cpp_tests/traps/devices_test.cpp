// Two devices in one process: data on the one that is not current, and first calls from two
// threads. A test is a process. On the machine device 1 is a second device 0 with memory and
// function attributes of its own.
#include <cuda_runtime_api.h>

#include <barrier>
#include <thread>

#include "../kernels/cache_on_device.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

Setup setup_of(int queries, int keys) {
  const Case spec = {.name = "two devices",
                     .batch = 2,
                     .heads = 4,
                     .heads_kv = 2,
                     .seqlen_q = queries,
                     .seqlen_k = keys,
                     .used_k = {keys, keys - 3}};
  return make_setup(spec, Dtype::kBFloat16, 64, kCausal);
}

CacheCall cache_of() {
  return CacheCall({.dtype = Dtype::kBFloat16,
                    .heads = 4,
                    .heads_kv = 2,
                    .sequences = {{.seed = 1, .keys = 70, .queries = 2, .added = 2},
                                  {.seed = 2, .keys = 0, .queries = 24, .added = 24}},
                    .page_size = 16,
                    .packed = true});
}

// What the library does, on one device: the forward's loop and decoding, backwards, a cache.
class Work {
 public:
  explicit Work(int device) : backend_(cuda_backend_of(device)) {}

  void operator()() {
    many_result_ = many_();
    few_result_ = few_();
    append_error_ = append_on(backend_, cache_, cache_.call.problem());
    cache_result_ = run_on(backend_, cache_.call, cache_.call.problem());
  }

  void check() const {
    check_run(many_setup_, many_result_, "forward");
    check_run(few_setup_, few_result_, "decode");
    CacheCall expected = cache_of();
    CHECK_EQ(append_error_ + expected.append(), std::string());
    check_cache_result(expected, cache_result_);
  }

 private:
  static void check_run(const Setup& setup, const RunResult& result, const std::string& kernel) {
    CHECK_EQ(result.error, std::string());
    if (!result.error.empty()) return;
    CHECK_MESSAGE(result.forward_plan.starts_with(kernel), result.forward_plan);
    const Verdict verdict = compare(setup, Truth(setup), result.values);
    CHECK_MESSAGE(verdict.passed(), setup.name() + ":" + verdict.text());
  }

  const Backend backend_;
  const Setup many_setup_ = setup_of(70, 90), few_setup_ = setup_of(2, 600);
  Run many_{many_setup_, backend_}, few_{few_setup_, backend_};
  Appending cache_ = {cache_of()};
  RunResult many_result_, few_result_;
  std::string append_error_;
  CacheResult cache_result_;
};

void need_two_devices() {
  need_device();
  const std::string reason = second_device_unavailable();
  if (!reason.empty()) throw check::Skipped{reason};
}

}  // namespace

TEST("G1 data on device 1 while device 0 is current, and the other way round") {
  need_two_devices();
  for (const Schedule& schedule : schedules()) {
    for (const int current : {0, 1}) {
      begin(schedule);
      Work work(1 - current);
      CHECK_EQ(cudaSetDevice(current), cudaSuccess);
      work();
      int now = -1;
      CHECK_EQ(cudaGetDevice(&now), cudaSuccess);
      CHECK_EQ(now, current);
      CHECK_EQ(finish(), std::string());
      work.check();
    }
  }
}

// On the last model of the machine, which needs the driver's encoder of tensor maps, too.
TEST("G4 the first calls of two threads at the same time, each on a device of its own") {
  need_two_devices();
  begin(schedules().back());
  Work works[2] = {Work(0), Work(1)};
  std::barrier start(2);
  const auto run = [&](int device) {
    cudaSetDevice(device);
    start.arrive_and_wait();
    works[device]();
  };
  std::thread first(run, 0), second(run, 1);
  first.join();
  second.join();
  CHECK_EQ(finish(), std::string());
  for (const Work& work : works) work.check();
}
