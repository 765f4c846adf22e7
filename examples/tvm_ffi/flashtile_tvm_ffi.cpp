// flashtile's attention as a TVM-FFI module of two functions, forward and backward, over the C API.
// What implements DLPack is passed as it is, no tensor is copied, and the caller brings the
// results.
//
//   forward(q, k, v, out, softmax_lse, softmax_scale, window_left, window_right)
//   backward(q, k, v, out, softmax_lse, dout, dsoftmax_lse, dq, dk, dv,
//            softmax_scale, window_left, window_right)
//
// q is (batch, seqlen_q, num_heads, head_dim), k and v (batch, seqlen_k, num_heads_kv, ...), of any
// strides, the last of which is 1; softmax_lse is (batch, num_heads, seqlen_q). None: no
// softmax_lse (forward), a dsoftmax_lse of zeros, a softmax_scale of 1 / sqrt(head_dim). A window
// of -1 has no bound; a right one of 0 is causal.
//
// CUDA: work is enqueued on the environment's stream, and its allocator gives the workspace.
// TVM-FFI takes both from torch when it is called with torch tensors.
#include <flashtile/flashtile.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <new>
#include <optional>
#include <string>

namespace {

using tvm::ffi::Optional;
using tvm::ffi::ShapeView;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

// The sentence of the C API becomes the message of the exception.
void check(flashtile_status status) {
  if (status == FLASHTILE_OK) return;
  if (status == FLASHTILE_INVALID_ARGUMENT) TVM_FFI_THROW(ValueError) << flashtile_last_error();
  TVM_FFI_THROW(RuntimeError) << flashtile_last_error();
}

std::string to_string(ShapeView shape) {
  std::string text = "(";
  for (const int64_t size : shape) {
    text += (text.size() == 1 ? "" : ", ") + std::to_string(size);
  }
  return text + ")";
}

std::string to_string(DLDataType dtype) { return tvm::ffi::DLDataTypeToString(dtype); }

std::string to_string(DLDevice device) {
  return "device " + std::to_string(device.device_type) + ":" + std::to_string(device.device_id);
}

bool is_same(DLDevice a, DLDevice b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

flashtile_dtype dtype_of_q(DLDataType dtype) {
  const bool is_float = dtype.code == kDLFloat && dtype.lanes == 1;
  if (is_float && dtype.bits == 16) return FLASHTILE_FLOAT16;
  if (is_float && dtype.bits == 32) return FLASHTILE_FLOAT32;
  if (is_float && dtype.bits == 64) return FLASHTILE_FLOAT64;
  if (dtype.code == kDLBfloat && dtype.bits == 16 && dtype.lanes == 1) return FLASHTILE_BFLOAT16;
  TVM_FFI_THROW(TypeError) << "q is " << to_string(dtype)
                           << "; allowed: float16, bfloat16, float32 and float64";
}

flashtile_device device_of_q(DLDevice device) {
  if (device.device_type == kDLCPU) return FLASHTILE_CPU;
  if (device.device_type == kDLCUDA) return FLASHTILE_CUDA;
  TVM_FFI_THROW(ValueError) << "q is on " << to_string(device)
                            << " of DLPack; allowed: 1 (CPU) and 2 (CUDA)";
}

void expect_dims(const char* name, TensorView tensor, int32_t dims) {
  if (tensor.ndim() == dims) return;
  TVM_FFI_THROW(ValueError) << name << " has " << tensor.ndim() << " dimensions; allowed: " << dims;
}

// What the C API cannot see, as it takes one set of sizes and pointers.
template <size_t kDims>
void expect(const char* name, TensorView tensor, const std::array<int64_t, kDims>& shape,
            DLDataType dtype, DLDevice device) {
  expect_dims(name, tensor, kDims);
  const ShapeView wanted(shape.data(), kDims);
  for (size_t i = 0; i < kDims; ++i) {
    if (tensor.size(i) == shape[i]) continue;
    TVM_FFI_THROW(ValueError) << name << " has the shape " << to_string(tensor.shape())
                              << "; allowed: " << to_string(wanted);
  }
  if (tensor.dtype() != dtype) {
    TVM_FFI_THROW(TypeError) << name << " is " << to_string(tensor.dtype())
                             << "; allowed: " << to_string(dtype);
  }
  if (!is_same(tensor.device(), device)) {
    TVM_FFI_THROW(ValueError) << name << " is on " << to_string(tensor.device())
                              << "; allowed: " << to_string(device) << ", where q is";
  }
  if (tensor.numel() > 0 && shape.back() > 1 && tensor.strides().back() != 1) {
    TVM_FFI_THROW(ValueError) << name << " has the stride " << tensor.strides().back()
                              << " in its last dimension; allowed: 1";
  }
}

void* data_of(TensorView tensor) {
  return static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
}

// A softmax_lse or its gradient; without data where there is none.
struct Lse {
  float* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
};

// One attention: its problem, and what follows from the shapes of q, k and v for every tensor.
class Attention {
 public:
  Attention(TensorView q, TensorView k, TensorView v, const Optional<double>& softmax_scale,
            int64_t window_left, int64_t window_right)
      : dtype_(q.dtype()), device_(q.device()) {
    expect_dims("q", q, 4);
    expect_dims("k", k, 4);
    expect_dims("v", v, 4);
    problem_.device = device_of_q(device_);
    problem_.device_index = problem_.device == FLASHTILE_CUDA ? device_.device_id : -1;
    problem_.dtype = problem_.dtype_kv = problem_.dtype_out = dtype_of_q(dtype_);
    problem_.lse_dtype =
        problem_.dtype == FLASHTILE_FLOAT64 ? FLASHTILE_FLOAT64 : FLASHTILE_FLOAT32;
    problem_.batch = q.size(0);
    problem_.seqlen_q = q.size(1);
    problem_.num_heads = q.size(2);
    problem_.head_dim = q.size(3);
    problem_.seqlen_k = k.size(1);
    problem_.num_heads_kv = k.size(2);
    problem_.head_dim_v = v.size(3);
    problem_.window_left = window_left;
    problem_.window_right = window_right;
    if (softmax_scale.has_value()) {
      problem_.softmax_scale_f64 = *softmax_scale;
      if (*softmax_scale == 0) problem_.flags |= FLASHTILE_ZERO_SCALE;
    }
  }
  // Parameters point to the problem.
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  const flashtile_problem* problem() const { return &problem_; }
  DLDevice device() const { return device_; }

  // q and its gradient.
  flashtile_tensor queries(const char* name, TensorView view) const {
    return tensor(name, view, problem_.seqlen_q, problem_.num_heads, problem_.head_dim);
  }
  flashtile_tensor keys(const char* name, TensorView view) const {
    return tensor(name, view, problem_.seqlen_k, problem_.num_heads_kv, problem_.head_dim);
  }
  flashtile_tensor values(const char* name, TensorView view) const {
    return tensor(name, view, problem_.seqlen_k, problem_.num_heads_kv, problem_.head_dim_v);
  }
  // out and its gradient.
  flashtile_tensor outputs(const char* name, TensorView view) const {
    return tensor(name, view, problem_.seqlen_q, problem_.num_heads, problem_.head_dim_v);
  }
  Lse lse(const char* name, Optional<TensorView> given) const {
    if (!given.has_value()) return {};
    const TensorView view = *given;
    const uint8_t bits = problem_.lse_dtype == FLASHTILE_FLOAT64 ? 64 : 32;
    const std::array shape{problem_.batch, problem_.num_heads, problem_.seqlen_q};
    expect(name, view, shape, DLDataType{kDLFloat, bits, 1}, device_);
    return {static_cast<float*>(data_of(view)), view.stride(0), view.stride(1)};
  }

  // Of CUDA memory.
  CUstream_st* stream() const {
    if (problem_.device == FLASHTILE_CPU) return nullptr;
    return static_cast<CUstream_st*>(TVMFFIEnvGetStream(device_.device_type, device_.device_id));
  }

 private:
  flashtile_tensor tensor(const char* name, TensorView view, int64_t seqlen, int64_t heads,
                          int64_t head_dim) const {
    expect(name, view, std::array{problem_.batch, seqlen, heads, head_dim}, dtype_, device_);
    return {data_of(view), view.stride(0), view.stride(1), view.stride(2)};
  }

  DLDataType dtype_;
  DLDevice device_;
  flashtile_problem problem_ = FLASHTILE_PROBLEM_INIT;
};

// The memory that a call computes in, as aligned as the C API wants it. NumPy brings no allocator;
// that of a CUDA framework frees in the order of its stream.
class Workspace {
 public:
  Workspace(size_t bytes, DLDevice device) {
    if (device.device_type == kDLCPU) {
      host_ = ::operator new(bytes, kAlignment);
      return;
    }
    const int64_t size = static_cast<int64_t>(bytes + kBytes);
    const DLDataType byte{kDLUInt, 8, 1};
    tensor_ = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ShapeView(&size, 1), byte, device);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(host_, kAlignment); }

  void* memory() const {
    if (!tensor_) return host_;
    char* const begin = static_cast<char*>(tensor_->data_ptr());
    return begin + (kBytes - reinterpret_cast<uintptr_t>(begin) % kBytes) % kBytes;
  }

 private:
  static constexpr size_t kBytes = 64;
  static constexpr std::align_val_t kAlignment{kBytes};
  void* host_ = nullptr;
  std::optional<Tensor> tensor_;
};

void forward(TensorView q, TensorView k, TensorView v, TensorView out,
             Optional<TensorView> softmax_lse, const Optional<double>& softmax_scale,
             int64_t window_left, int64_t window_right) {
  const Attention attention(q, k, v, softmax_scale, window_left, window_right);
  const Lse lse = attention.lse("softmax_lse", softmax_lse);
  flashtile_forward_params params{};
  params.struct_size = sizeof params;
  params.problem = attention.problem();
  params.q = attention.queries("q", q);
  params.k = attention.keys("k", k);
  params.v = attention.values("v", v);
  params.out = attention.outputs("out", out);
  params.softmax_lse = lse.data;
  params.lse_stride_batch = lse.stride_batch;
  params.lse_stride_head = lse.stride_head;
  check(flashtile_workspace_size(&params, &params.workspace_bytes));
  const Workspace workspace(params.workspace_bytes, attention.device());
  params.workspace = workspace.memory();
  check(flashtile_forward(&params, attention.stream()));
}

void backward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView softmax_lse,
              TensorView dout, Optional<TensorView> dsoftmax_lse, TensorView dq, TensorView dk,
              TensorView dv, const Optional<double>& softmax_scale, int64_t window_left,
              int64_t window_right) {
  const Attention attention(q, k, v, softmax_scale, window_left, window_right);
  const Lse lse = attention.lse("softmax_lse", softmax_lse);
  const Lse dlse = attention.lse("dsoftmax_lse", dsoftmax_lse);
  flashtile_backward_params params{};
  params.struct_size = sizeof params;
  params.problem = attention.problem();
  params.q = attention.queries("q", q);
  params.k = attention.keys("k", k);
  params.v = attention.values("v", v);
  params.out = attention.outputs("out", out);
  params.dout = attention.outputs("dout", dout);
  params.dq = attention.queries("dq", dq);
  params.dk = attention.keys("dk", dk);
  params.dv = attention.values("dv", dv);
  params.softmax_lse = lse.data;
  params.lse_stride_batch = lse.stride_batch;
  params.lse_stride_head = lse.stride_head;
  params.dsoftmax_lse = dlse.data;
  params.dlse_stride_batch = dlse.stride_batch;
  params.dlse_stride_head = dlse.stride_head;
  check(flashtile_workspace_size_backward(&params, &params.workspace_bytes));
  const Workspace workspace(params.workspace_bytes, attention.device());
  params.workspace = workspace.memory();
  check(flashtile_backward(&params, attention.stream()));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward, forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward, backward);
