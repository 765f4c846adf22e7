// A real GPU as the device of the kernel tests.
#include <cuda_runtime_api.h>

#include <memory>
#include <stdexcept>
#include <type_traits>

#include "../support/check.h"
#include "device.h"

namespace flashtile::test {

std::string device_unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no GPU: ") + cudaGetErrorString(error);
  if (count == 0) return "no GPU: cudaGetDeviceCount found none";
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess)
    return "no GPU: cudaGetDeviceProperties failed";
  return properties.major >= 8
             ? ""
             : std::string(properties.name) + " has a compute capability below 8.0";
}

namespace {
// No test of a program for GPUs begins without one.
[[maybe_unused]] const auto asked_first = check::unavailable = device_unavailable;
}  // namespace

std::vector<Schedule> schedules() {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return {};
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  const bool sm90_built = flashtile_get_build_info(&info) == FLASHTILE_OK &&
                          std::string(info.cuda_architectures).find("90a") != std::string::npos;
  return {{.device = properties.name,
           .shared_memory = static_cast<int>(properties.sharedMemPerBlockOptin),
           .has_sm90 = sm90_built && properties.major == 9 && properties.minor == 0}};
}

void begin(const Schedule&, bool) {}

std::string finish() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

std::string second_device_unavailable() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count < 2)
    return "two GPUs are needed, there are " + std::to_string(count);
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 1) != cudaSuccess || properties.major < 8)
    return "device 1 has a compute capability below 8.0";
  return "";
}

namespace {

void require(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

template <class T>
using Shared = std::shared_ptr<std::remove_pointer_t<T>>;

}  // namespace

// The mode in which whatever synchronises or allocates, on any thread, makes the capture fail.
std::function<void()> captured(const std::function<void(CUstream_st*)>& enqueue) {
  cudaStream_t raw_stream = nullptr;
  require(cudaStreamCreate(&raw_stream), "cudaStreamCreate");
  const Shared<cudaStream_t> stream(raw_stream, cudaStreamDestroy);
  require(cudaStreamBeginCapture(raw_stream, cudaStreamCaptureModeGlobal),
          "cudaStreamBeginCapture");
  enqueue(raw_stream);
  cudaGraph_t raw_graph = nullptr;
  require(cudaStreamEndCapture(raw_stream, &raw_graph), "cudaStreamEndCapture");
  const Shared<cudaGraph_t> graph(raw_graph, cudaGraphDestroy);
  cudaGraphExec_t raw_exec = nullptr;
  require(cudaGraphInstantiate(&raw_exec, raw_graph, 0), "cudaGraphInstantiate");
  const Shared<cudaGraphExec_t> exec(raw_exec, cudaGraphExecDestroy);
  return [stream, exec] {
    require(cudaGraphLaunch(exec.get(), stream.get()), "cudaGraphLaunch");
    require(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  };
}

}  // namespace flashtile::test
