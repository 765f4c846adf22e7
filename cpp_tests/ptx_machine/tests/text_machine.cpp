// Text kernels on the machine.
#include "machine.h"
#include "text_kernel.h"

namespace ptx_test {

namespace {

std::vector<cudaLibrary_t> libraries;

cudaKernel_t find(const std::string& name) {
  cudaKernel_t kernel = nullptr;
  for (const cudaLibrary_t library : libraries) {
    if (cudaLibraryGetKernel(&kernel, library, name.c_str()) == cudaSuccess) break;
  }
  return kernel;
}

bool set_shared(cudaKernel_t kernel, size_t shared) {
  return kernel != nullptr &&
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared)) == cudaSuccess;
}

bool launch(const std::string& name, unsigned threads, size_t shared, std::vector<void*>& args) {
  const cudaKernel_t kernel = find(name);
  return set_shared(kernel, shared) &&
         cudaLaunchKernel(kernel, dim3(1), dim3(threads), args.data(), shared, nullptr) ==
             cudaSuccess &&
         cudaDeviceSynchronize() == cudaSuccess;
}

}  // namespace

void load_text(const std::string& kernels) {
  cudaLibrary_t library = nullptr;
  const bool loaded = cudaLibraryLoadData(&library, module_text(kernels, "sm_90a").c_str(), nullptr,
                                          nullptr, 0, nullptr, nullptr, 0) == cudaSuccess;
  CHECK_MESSAGE(loaded, ptx::machine().reports_text());
  libraries.push_back(library);
}

void begin_text(uint64_t seed) {
  ptx::machine().configure(ptx::kSm90);
  ptx::machine().set_seed(seed);
  ptx::machine().clear_reports();
  ptx::machine().reset_counters();
}

void allow_shared(const std::string& name, size_t bytes) { CHECK(set_shared(find(name), bytes)); }

bool launch_text(const std::string& name, unsigned threads, size_t shared,
                 std::vector<void*> args) {
  const bool good = launch(name, threads, shared, args);
  CHECK_MESSAGE(good, ptx::machine().reports_text());
  return good;
}

void check_wgmma(uint64_t count, uint64_t flops) {
  CHECK_EQ(ptx::machine().counters().wgmma, count);
  CHECK_EQ(ptx::machine().counters().wgmma_flops, flops);
}
void check_bulk_loads(uint64_t bytes) {
  CHECK_EQ(ptx::machine().counters().bulk_load_bytes, bytes);
}

bool order_is_known() { return true; }
std::string text_unavailable() { return ""; }

}  // namespace ptx_test
