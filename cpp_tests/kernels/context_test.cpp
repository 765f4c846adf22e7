// The first calls of threads that have no CUDA context yet, as the thread of an autograd engine or
// a worker of a server: all memory is of other threads, so the library's own calls are the thread's
// first.
#include <functional>
#include <future>

#include "../support/check.h"
#include "cache_on_device.h"

using namespace flashtile::test;

namespace {

template <class F>
auto on_new_thread(const F& work) {
  return std::async(std::launch::async, work).get();
}

// cuda_backend() with a thread for every call, since allocating and copying make a context current
// in the thread that does it.
Backend backend_of_other_threads() {
  static const Backend plain = cuda_backend();
  return {
      .device = FLASHTILE_CUDA,
      .allocate = [](size_t bytes) { return on_new_thread([=] { return plain.allocate(bytes); }); },
      .release = [](void* memory) { on_new_thread([=] { plain.release(memory); }); },
      .copy_in = [](void* device, const void* host,
                    size_t bytes) { on_new_thread([=] { plain.copy_in(device, host, bytes); }); },
      .copy_out =
          [](void* host, const void* device, size_t bytes) {
            on_new_thread([=] { plain.copy_out(host, device, bytes); });
          }};
}

// The last device model has the kernels that want tensor maps.
Schedule newest() { return schedules().back(); }

Setup setup_of(bool deterministic) {
  const Case spec = {.name = "first call of a thread",
                     .heads = 2,
                     .heads_kv = 1,
                     .seqlen_q = 70,
                     .seqlen_k = 70,
                     .deterministic = deterministic};
  return make_setup(spec, Dtype::kBFloat16, 64, kCausal);
}

void check_run(const Setup& setup, const RunResult& result) {
  CHECK_EQ(finish() + result.error, std::string());
  if (!result.error.empty()) return;
  CHECK_EQ(result.forward_plan, expected_plan("forward", setup, newest()));
  const Verdict verdict = compare(setup, Truth(setup), result.values);
  CHECK_MESSAGE(verdict.passed(), setup.name() + ":" + verdict.text());
}

// A prompt over pages of `page_size` rows: TMA loads pages of a multiple of 8 rows in boxes.
void check_prefill(int page_size) {
  const CacheSpec spec = {.dtype = Dtype::kBFloat16,
                          .sequences = {{.seed = 1, .keys = 70, .queries = 70}},
                          .page_size = page_size,
                          .layout_k = Layout::kPadded};
  const Backend backend = backend_of_other_threads();
  CacheCall call(spec);
  begin(newest());
  const CacheResult result = on_new_thread([&] { return run_on(backend, call, call.problem()); });
  CHECK_EQ(finish() + result.error, std::string());
  CHECK_EQ(result.plan, expected_cache_plan(call, newest()));
  check_cache_result(call, result);
}

}  // namespace

TEST("context: the first call of a thread is a forward") {
  need_device();
  const Backend backend = backend_of_other_threads();
  const Setup setup = setup_of(false);
  begin(newest());
  Run run(setup, backend);
  check_run(setup, on_new_thread([&] {
              RunResult result = run.forward();
              if (result.error.empty()) result = run.backward();
              return result;
            }));
}
TEST("context: the first call of a thread is a backward") {
  need_device();
  const Backend backend = backend_of_other_threads();
  for (const bool deterministic : {false, true}) {
    const Setup setup = setup_of(deterministic);
    begin(newest());
    Run run(setup, backend);
    run.forward();
    const RunResult result = on_new_thread([&] { return run.backward(); });
    CHECK_EQ(result.backward_plan, expected_plan("backward", setup, newest()));
    check_run(setup, result);
  }
}
TEST("context: the first call of a thread is a prompt over pages that TMA loads") {
  need_device();
  check_prefill(16);
}
TEST("context: the first call of a thread is a prompt over pages that warps copy") {
  need_device();
  check_prefill(7);
}
