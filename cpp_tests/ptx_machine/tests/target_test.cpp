// What the machine's devices have: which of several modules with one kernel they run, their driver,
// and memory of their own where there are two.
#include <thread>

#include "machine.h"
#include "text_kernel.h"

namespace {

using ptx_test::Buffer;

std::string stores(int value) {
  return ".visible .entry which(.param .u64 out)\n{\n.reg .b64 %d<2>;\n"
         "ld.param.u64 %d0, [out];\nst.global.u32 [%d0], " +
         std::to_string(value) + ";\nret;\n}\n";
}

void load_for(const std::string& target, int value) {
  cudaLibrary_t library = nullptr;
  const std::string text = ptx_test::module_text(stores(value), target);
  CHECK(cudaLibraryLoadData(&library, text.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0) ==
        cudaSuccess);
}

cudaKernel_t kernel() {
  cudaKernel_t found = nullptr;
  CHECK(cudaLibraryGetKernel(&found, nullptr, "which") == cudaSuccess);
  return found;
}

cudaError_t launch(const Buffer<uint32_t>& out, size_t shared = 0) {
  uint32_t* pointer = out.get();
  void* args[] = {static_cast<void*>(&pointer)};
  return cudaLaunchKernel(kernel(), dim3(1), dim3(1), args, shared, nullptr);
}

uint32_t run_on(const ptx::Device& device) {
  Buffer<uint32_t> out(1);
  ptx_test::begin_text(1);
  ptx::machine().configure(device);
  CHECK(launch(out) == cudaSuccess);
  return out.fetch()[0];
}

}  // namespace

TEST("sm_90a code runs on 9.0 alone, and before that of sm_90") {
  load_for("sm_80", 801);
  CHECK_EQ(run_on(ptx::kSm90), 801u);
  load_for("sm_90a", 911);
  CHECK_EQ(run_on(ptx::kSm90), 911u);
  load_for("sm_90", 901);
  CHECK_EQ(run_on(ptx::kSm90), 911u);
  ptx::Device later = ptx::kSm90;
  later.cc_major = 10;
  CHECK_EQ(run_on(later), 901u);
  CHECK_EQ(run_on(ptx::kSm89), 801u);
}
TEST("a driver that is too old has no encoder") {
  ptx_test::begin_text(1);
  ptx::Machine& machine = ptx::machine();
  void* function = &machine;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSuccess;
  ptx::Device old = ptx::kSm90;
  old.driver_version = 11080;
  machine.configure(old);
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &status) == cudaSuccess);
  CHECK(function == nullptr && status == cudaDriverEntryPointVersionNotSufficent);
  machine.configure(ptx::kSm90);
  CHECK(cudaGetDriverEntryPointByVersion("cuNoSuchThing", &function, 12000, cudaEnableDefault,
                                         &status) == cudaSuccess);
  CHECK(function == nullptr && status == cudaDriverEntryPointSymbolNotFound);
}
TEST("two devices: a kernel sees the memory of its own, and an attribute is of one") {
  load_for("sm_80", 801);
  ptx_test::begin_text(1);
  ptx::machine().configure(ptx::kSm80);
  CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice);  // there is one
  ptx::machine().set_device_count(2);
  CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice);
  CHECK(cudaSetDevice(1) == cudaSuccess);
  const Buffer<uint32_t> out(1);
  std::thread([] {
    int device = -1;
    CHECK(cudaGetDevice(&device) == cudaSuccess && device == 0);  // each thread has its own
  }).join();
  constexpr int kShared = 100 * 1024;
  CHECK(cudaFuncSetAttribute(kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) ==
        cudaSuccess);
  CHECK(launch(out, kShared) == cudaSuccess);
  CHECK_EQ(out.fetch()[0], 801u);
  CHECK(cudaSetDevice(0) == cudaSuccess);
  CHECK(launch(out, kShared) == cudaErrorInvalidValue);
  CHECK(ptx::machine().reports().size() == 1);
  CHECK(launch(out) == cudaErrorLaunchFailure);
  CHECK(ptx::machine().reports().back().kind == ptx::Error::kOutOfBounds);
  CHECK(ptx::machine().reports().back().text.ends_with("is on device 1"));
  ptx::machine().set_device_count(1);
}
