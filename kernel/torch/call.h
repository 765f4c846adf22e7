// What every torch op does around a call of the core: raise its refusals, name torch's stream, get
// outputs and scratch memory from torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "api/call.h"
#include "flashtile/flashtile.h"
#include "sentences.h"

// Lives in libtorch_cuda.so, which a CPU-only torch does not have: hence weak, and asked for below.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flashtile::ops {

using torch::stable::accelerator::DeviceGuard;

// The sentence and nothing before it: STD_TORCH_CHECK would begin with this file and line, and
// can_run could not give the same.
inline void raise_unless_empty(const std::string& sentence) {
  if (!sentence.empty()) throw std::runtime_error(sentence);
}

inline void raise_unless_ok(flashtile_status status, OpNames names) {
  if (status != FLASHTILE_OK) raise_unless_empty(in_words_of_op(flashtile_last_error(), names));
}

// Makes the tensor's device current for its lifetime and names torch's current stream on it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      raise_unless_empty("this torch was built without CUDA; allowed: tensors on cpu");
    }
    guard_.emplace(tensor.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<CUstream_st*>(stream);
  }
  CUstream_st* stream() const { return stream_; }

 private:
  std::optional<DeviceGuard> guard_;
  CUstream_st* stream_ = nullptr;  // null on CPU
};

// Scratch memory from torch's allocator, aligned to 64 bytes and more. Freed when the call returns;
// on CUDA the caching allocator keeps it for work enqueued later on the same stream.
struct Workspace {
  Workspace(const Tensor& like, size_t bytes) : size(bytes) {
    if (bytes == 0) return;
    memory = torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    data = memory->mutable_data_ptr();
  }
  size_t size;
  void* data = nullptr;
  std::optional<Tensor> memory;
};

inline View to_core(const flashtile_tensor& view) {
  return {view.data, view.stride_batch, view.stride_seq, view.stride_head};
}

// Checks, plans and computes. `user` has all but the workspace, with stand-ins for outputs that do
// not exist yet: only a call that is not refused gets memory. `allocate(call)` then puts them into
// the core's params, ForwardParams or BackwardParams, and scores. `like` is on the device; `names`
// are for refusals.
template <class Params, class UserParams, class Allocate>
void run_call(const UserParams& user, const Tensor& like, CUstream_st* stream, OpNames names,
              const Allocate& allocate) {
  Call<Params> call;
  raise_unless_ok(prepare(&user, call), names);
  allocate(call);
  const Workspace workspace(like, call.plan.workspace.wanted);
  call.params.workspace = workspace.data;
  call.params.workspace_bytes = workspace.size;
  raise_unless_ok(flashtile::run(call, stream), names);
}

// Whether a call would run, the kernel's name or "", and why: why not, or why that kernel is not
// the one that the device has for such problems.
using Answer = std::tuple<bool, std::string, std::string>;

// Checks and plans, and computes nothing.
template <class Params, class UserParams>
Answer ask_call(const UserParams& user, OpNames names) {
  Call<Params> call;
  if (prepare(&user, call) != FLASHTILE_OK)
    return {false, "", in_words_of_op(flashtile_last_error(), names)};
  return {true, call.plan.name.text, in_words_of_op(call.plan.name.note, names)};
}

}  // namespace flashtile::ops
