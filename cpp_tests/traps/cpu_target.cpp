#include <sys/mman.h>

#include <map>

#include "large_memory.h"
#include "target.h"

namespace flashtile::test {
namespace {

// Pages come into being when they are touched.
std::map<void*, size_t> mappings;

void* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw check::Skipped{"no room for the addresses of a large tensor"};
  mappings[memory] = bytes;
  return memory;
}

void unmap_pages(void* memory) {
  munmap(memory, mappings[memory]);
  mappings.erase(memory);
}

}  // namespace

const Backend& large_backend() {
  static const Backend backend = [] {
    Backend pages = cpu_backend();
    pages.allocate = map_pages;
    pages.release = unmap_pages;
    return pages;
  }();
  return backend;
}

void leave_to_nightly_on_machine() {}

std::vector<Dtype> trap_dtypes() { return {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32}; }

void check_setup(const Setup& setup) {
  const Attempt attempt = attempt_on_cpu(setup, Truth(setup));
  CHECK_MESSAGE(attempt.passed(), setup.name() + " on the CPU: " + attempt.wrong);
}

void check_setup_once(const Setup& setup) { check_setup(setup); }

void check_draws(const std::function<Setup(uint64_t)>& draw) {
  const Attempt attempt = attempt_draws_on_cpu(1, draw);
  CHECK_MESSAGE(attempt.passed(), draw(1).name() + " on the CPU: " + attempt.wrong);
}

std::vector<RunResult> results_with_late_dout(const Setup& setup) {
  static const Backend backend = cpu_backend();
  const Setup early = without_dout(setup);
  Run run(early, backend);
  CHECK_EQ(run.forward().error, std::string());
  const std::vector<uint8_t>& dout = setup.dout.bytes();
  return {run.backward([&](void* memory) { std::memcpy(memory, dout.data(), dout.size()); })};
}

std::vector<RunResult> results_of(const Setup& setup, int runs) {
  static const Backend backend = cpu_backend();
  std::vector<RunResult> results;
  for (int i = 0; i < runs; ++i) {
    results.push_back(Run(setup, backend)());
    CHECK_EQ(results.back().error, std::string());
  }
  return results;
}

std::vector<CacheBackend> cache_backends() { return {cpu_cache_backend()}; }

}  // namespace flashtile::test
