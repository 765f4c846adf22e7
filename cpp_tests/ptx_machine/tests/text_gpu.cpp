// Text kernels on a real GPU, whose driver assembles them.
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
  const cudaError_t error = cudaLibraryLoadData(&library, module_text(kernels, "sm_90a").c_str(),
                                                nullptr, nullptr, 0, nullptr, nullptr, 0);
  CHECK_MESSAGE(error == cudaSuccess, cudaGetErrorString(error));
  if (error == cudaSuccess) libraries.push_back(library);
}

void begin_text(uint64_t) {}

void allow_shared(const std::string& name, size_t bytes) { CHECK(set_shared(find(name), bytes)); }

bool launch_text(const std::string& name, unsigned threads, size_t shared,
                 std::vector<void*> args) {
  const bool good = launch(name, threads, shared, args);
  CHECK_MESSAGE(good, name + ": " + cudaGetErrorString(cudaGetLastError()));
  return good;
}

void check_wgmma(uint64_t, uint64_t) {}
void check_bulk_loads(uint64_t) {}

bool order_is_known() { return false; }

std::string text_unavailable() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return "no GPU";
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess)
    return "no GPU: cudaGetDeviceProperties failed";
  const bool hopper = properties.major == 9 && properties.minor == 0;
  return hopper ? "" : std::string(properties.name) + " is no GPU of compute capability 9.0";
}

}  // namespace ptx_test
