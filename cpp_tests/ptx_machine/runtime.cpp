// The CUDA runtime entry points, answered by the machine. Linked in place of libcudart.
//
// "Device" memory is host memory with registered bounds; streams are done when a call returns. The
// machine knows no threads: calls that touch it take turns. As in the real library, a thread has no
// context until a call that needs one makes it current; asking what the device and the driver are
// needs none.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "machine.h"
#include "memory.h"

namespace {

struct Function {
  std::string name;  // mangled
  // cudaFuncSetAttribute, of each device
  std::array<size_t, ptx::kMostDevices> max_dynamic_shared = {48 * 1024, 48 * 1024};
};

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}

// The turn of a call, counted.
class Turn {
 public:
  Turn() = default;
  explicit Turn(uint64_t ptx::HostCalls::* kind) { ++(ptx::machine().mutable_host_calls().*kind); }

 private:
  std::lock_guard<std::mutex> lock_{ptx::machine().turns()};
};

// The turn of a call that needs the context of the current device.
class ContextTurn : public Turn {
 public:
  ContextTurn() { ptx::has_context() = true; }
  explicit ContextTurn(uint64_t ptx::HostCalls::* kind) : Turn(kind) { ptx::has_context() = true; }
};

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;

bool is_device(int device) { return device >= 0 && device < ptx::machine().device_count(); }
size_t& max_dynamic_shared(Function& function) {
  return function.max_dynamic_shared[static_cast<size_t>(current_device)];
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};
thread_local Configuration pushed;

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t shared) {
  const ContextTurn turn;
  const auto it = functions().find(function);
  if (it == functions().end()) return result(cudaErrorInvalidDeviceFunction);
  ptx::Machine::Launch l;
  l.kernel = it->second.name;
  l.grid[0] = grid.x, l.grid[1] = grid.y, l.grid[2] = grid.z;
  l.block[0] = block.x, l.block[1] = block.y, l.block[2] = block.z;
  l.dynamic_shared = shared;
  l.max_dynamic_shared = max_dynamic_shared(it->second);
  l.device = current_device;
  l.args = args;
  const size_t before = ptx::machine().reports().size();
  if (ptx::machine().launch(l)) return cudaSuccess;
  const bool refused = ptx::machine().reports().size() > before &&
                       ptx::machine().reports().back().kind == ptx::Error::kLaunch;
  return result(refused ? cudaErrorInvalidValue : cudaErrorLaunchFailure);
}

cudaError_t attribute(int* value, cudaDeviceAttr attr) {
  const ptx::Device& d = ptx::machine().device();
  switch (attr) {
    case cudaDevAttrComputeCapabilityMajor: *value = d.cc_major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.cc_minor; break;
    case cudaDevAttrMultiProcessorCount: *value = d.sm_count; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.smem_optin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.smem_per_sm; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = d.cc_minor == 9 ? 1536 : 2048; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrL2CacheSize: *value = 40 << 20; break;
    case cudaDevAttrCooperativeLaunch: *value = 0; break;
    default: return result(cudaErrorNotSupported);
  }
  return cudaSuccess;
}

}  // namespace

extern "C" {

// What nvcc's host code calls: registration and <<<>>>.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  functions()[host].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, args, shared);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                                    size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, args, shared);
}

// Launch.
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args,
                             size_t shared, cudaStream_t) {
  return launch(function, grid, block, args, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** args) {
  return launch(function, config->gridDim, config->blockDim, args, config->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attr, int value) {
  const ContextTurn turn(&ptx::HostCalls::function_attributes);
  const auto it = functions().find(function);
  if (it == functions().end()) return result(cudaErrorInvalidDeviceFunction);
  if (attr != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > ptx::machine().device().smem_optin) return result(cudaErrorInvalidValue);
  max_dynamic_shared(it->second) = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  const ContextTurn turn(&ptx::HostCalls::others);
  const auto it = functions().find(function);
  if (it == functions().end()) return result(cudaErrorInvalidDeviceFunction);
  std::memset(out, 0, sizeof(*out));
  out->maxThreadsPerBlock = 1024;
  out->maxDynamicSharedSizeBytes = static_cast<int>(max_dynamic_shared(it->second));
  out->ptxVersion = out->binaryVersion = ptx::machine().device().compute_capability();
  return cudaSuccess;
}
// Without register counts: by threads and shared memory alone.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  const ContextTurn turn(&ptx::HostCalls::others);
  const ptx::Device& d = ptx::machine().device();
  const int by_threads = threads > 0 ? (d.cc_minor == 9 ? 1536 : 2048) / threads : 0;
  const int by_shared = d.smem_per_sm / static_cast<int>(shared + 1024);
  *blocks = by_threads < by_shared ? by_threads : by_shared;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}

// Device and errors.
cudaError_t cudaGetDeviceCount(int* count) {
  const Turn turn(&ptx::HostCalls::others);
  *count = ptx::machine().device_count();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  const Turn turn(&ptx::HostCalls::current_devices);
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  const Turn turn(&ptx::HostCalls::current_devices);
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  current_device = device;
  ptx::has_context() = true;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attr, int device) {
  const Turn turn(&ptx::HostCalls::device_attributes);
  return is_device(device) ? attribute(value, attr) : result(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  const Turn turn(&ptx::HostCalls::others);
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  const ptx::Device& d = ptx::machine().device();
  std::memset(out, 0, sizeof(*out));
  std::strcpy(out->name, "PTX machine");
  out->major = d.cc_major;
  out->minor = d.cc_minor;
  out->multiProcessorCount = d.sm_count;
  out->sharedMemPerBlock = 48 * 1024;
  out->sharedMemPerBlockOptin = static_cast<size_t>(d.smem_optin);
  out->sharedMemPerMultiprocessor = static_cast<size_t>(d.smem_per_sm);
  out->warpSize = 32;
  out->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "CUDA error";
  }
}

// Kernels from PTX text. A kernel's handle is where its name is kept.
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**,
                                unsigned, cudaLibraryOption*, void**, unsigned) {
  if (!ptx::machine().load_text(static_cast<const char*>(code)))
    return result(cudaErrorInvalidValue);
  *library = reinterpret_cast<cudaLibrary_t>(1);  // all modules stay until the end
  return cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  static std::map<std::string, char> handles;
  const void* handle = &handles[name];
  functions()[handle].name = name;
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(handle));
  return cudaSuccess;
}

// The driver: one function is asked for by name.
cudaError_t cudaDriverGetVersion(int* version) {
  const Turn turn(&ptx::HostCalls::driver_versions);
  *version = ptx::machine().device().driver_version;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const Turn turn(&ptx::HostCalls::entry_points);
  const int driver = ptx::machine().device().driver_version;
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  const bool found = known && driver >= 12000 && static_cast<int>(version) <= driver;
  *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  if (status != nullptr) {
    *status = found    ? cudaDriverEntryPointSuccess
              : !known ? cudaDriverEntryPointSymbolNotFound
                       : cudaDriverEntryPointVersionNotSufficent;
  }
  return cudaSuccess;
}

// Memory.
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const ContextTurn turn(&ptx::HostCalls::others);
  *pointer = ptx::global_memory().allocate(bytes, current_device);
  return *pointer != nullptr ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
  return cudaMalloc(pointer, bytes);
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}
cudaError_t cudaFree(void* pointer) {
  const ContextTurn turn(&ptx::HostCalls::others);
  if (pointer == nullptr || ptx::global_memory().release(pointer)) return cudaSuccess;
  return result(cudaErrorInvalidValue);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const ContextTurn turn(&ptx::HostCalls::others);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const ContextTurn turn(&ptx::HostCalls::others);
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  const ContextTurn turn(&ptx::HostCalls::others);
  *pointer = std::malloc(bytes);
  return *pointer != nullptr ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* pointer) {
  const ContextTurn turn(&ptx::HostCalls::others);
  std::free(pointer);
  return cudaSuccess;
}

// Streams and events: everything is done when the call that started it returns.
cudaError_t cudaDeviceSynchronize() {
  const ContextTurn turn(&ptx::HostCalls::others);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  const ContextTurn turn(&ptx::HostCalls::others);
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const ContextTurn turn(&ptx::HostCalls::others);
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  const ContextTurn turn(&ptx::HostCalls::others);
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

}  // extern "C"
