// flashtile's attention as two XLA custom calls on host memory, flashtile_xla_forward and
// flashtile_xla_backward, over the C API. flashtile_jax.py calls them.
//
// XLA hands over dense row-major buffers. q is (..., seqlen_q, num_heads, head_dim): all leading
// dimensions together are the batch, so that vmap adds one and needs no loop.
#include <flashtile/flashtile.h>
#include <xla/ffi/api/ffi.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Shape = std::vector<int64_t>;

struct Failure : std::exception {
  Failure(ffi::ErrorCode code, std::string sentence) : error(code, std::move(sentence)) {}
  const char* what() const noexcept override { return error.message().c_str(); }
  ffi::Error error;
};

[[noreturn]] void refuse(std::string sentence) {
  throw Failure(ffi::ErrorCode::kInvalidArgument, std::move(sentence));
}

// The sentence of the C API becomes the message of the XLA error.
void check(flashtile_status status) {
  if (status == FLASHTILE_OK) return;
  const bool is_left_out = status == FLASHTILE_UNSUPPORTED || status == FLASHTILE_NOT_BUILT;
  const ffi::ErrorCode code =
      status == FLASHTILE_INVALID_ARGUMENT
          ? ffi::ErrorCode::kInvalidArgument
          : (is_left_out ? ffi::ErrorCode::kUnimplemented : ffi::ErrorCode::kInternal);
  throw Failure(code, flashtile_last_error());
}

// No exception may leave a handler: XLA is compiled without them.
template <typename Call>
ffi::Error run(Call call) {
  try {
    call();
    return ffi::Error::Success();
  } catch (const Failure& failure) {
    return failure.error;
  } catch (const std::bad_alloc&) {
    return {ffi::ErrorCode::kResourceExhausted, "there is no memory for the workspace"};
  } catch (const std::exception& other) {
    return ffi::Error::Internal(other.what());
  }
}

std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (const int64_t size : shape) {
    text += (text.size() == 1 ? "" : ", ") + std::to_string(size);
  }
  return text + ")";
}

Shape shape_of(AnyBuffer buffer) {
  return {buffer.dimensions().begin(), buffer.dimensions().end()};
}

void expect_shape(const char* name, AnyBuffer buffer, const Shape& wanted) {
  const Shape found = shape_of(buffer);
  if (found == wanted) return;
  refuse(std::string(name) + " has the shape " + to_string(found) +
         "; allowed: " + to_string(wanted));
}

std::string to_string(ffi::DataType type) {
  std::ostringstream text;
  text << static_cast<XLA_FFI_DataType>(type);
  return text.str();
}

flashtile_dtype dtype_of(const char* name, AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::F16: return FLASHTILE_FLOAT16;
    case ffi::BF16: return FLASHTILE_BFLOAT16;
    case ffi::F32: return FLASHTILE_FLOAT32;
    case ffi::F64: return FLASHTILE_FLOAT64;
    default:
      refuse(std::string(name) + " is " + to_string(buffer.element_type()) +
             "; allowed: F16, BF16, F32 and F64");
  }
}

void expect_dtype(const char* name, AnyBuffer buffer, ffi::DataType wanted) {
  if (buffer.element_type() == wanted) return;
  refuse(std::string(name) + " is " + to_string(buffer.element_type()) +
         "; allowed: " + to_string(wanted));
}

// The attributes of both calls.
struct Options {
  double softmax_scale;
  int64_t window_left;
  int64_t window_right;
  int64_t alignment;
};

// One attention: its problem, and what follows from the shapes of q, k and v for every buffer.
class Attention {
 public:
  Attention(AnyBuffer q, AnyBuffer k, AnyBuffer v, const Options& options) {
    const Shape shape_q = shape_of(q), shape_k = shape_of(k), shape_v = shape_of(v);
    for (const auto& [name, shape] : {std::pair("q", &shape_q), {"k", &shape_k}, {"v", &shape_v}}) {
      if (shape->size() >= 3) continue;
      refuse(std::string(name) + " has " + std::to_string(shape->size()) +
             " dimensions; allowed: 3 and more, (..., seqlen, heads, head_dim)");
    }
    leading_.assign(shape_q.begin(), shape_q.end() - 3);
    const int64_t *sizes_q = &shape_q.back() - 2, *sizes_k = &shape_k.back() - 2;
    problem_.batch = 1;
    for (const int64_t size : leading_) problem_.batch *= size;
    problem_.seqlen_q = sizes_q[0];
    problem_.num_heads = sizes_q[1];
    problem_.head_dim = sizes_q[2];
    problem_.seqlen_k = sizes_k[0];
    problem_.num_heads_kv = sizes_k[1];
    problem_.head_dim_v = shape_v.back();

    type_ = q.element_type();
    problem_.dtype = problem_.dtype_kv = problem_.dtype_out = dtype_of("q", q);
    problem_.lse_dtype = type_ == ffi::F64 ? FLASHTILE_FLOAT64 : FLASHTILE_FLOAT32;
    problem_.softmax_scale_f64 = options.softmax_scale;
    if (options.softmax_scale == 0) problem_.flags |= FLASHTILE_ZERO_SCALE;
    problem_.window_left = options.window_left;
    problem_.window_right = options.window_right;
    problem_.alignment = static_cast<int32_t>(options.alignment);
  }
  // Parameters point to the problem.
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  const flashtile_problem* problem() const { return &problem_; }
  int64_t lse_stride_head() const { return problem_.seqlen_q; }
  int64_t lse_stride_batch() const { return problem_.num_heads * problem_.seqlen_q; }

  // q and its gradient.
  flashtile_tensor queries(const char* name, AnyBuffer buffer) const {
    return tensor(name, buffer, {problem_.seqlen_q, problem_.num_heads, problem_.head_dim});
  }
  flashtile_tensor keys(const char* name, AnyBuffer buffer) const {
    return tensor(name, buffer, {problem_.seqlen_k, problem_.num_heads_kv, problem_.head_dim});
  }
  flashtile_tensor values(const char* name, AnyBuffer buffer) const {
    return tensor(name, buffer, {problem_.seqlen_k, problem_.num_heads_kv, problem_.head_dim_v});
  }
  // out and its gradient.
  flashtile_tensor outputs(const char* name, AnyBuffer buffer) const {
    return tensor(name, buffer, {problem_.seqlen_q, problem_.num_heads, problem_.head_dim_v});
  }
  // softmax_lse and its gradient.
  float* lse(const char* name, AnyBuffer buffer) const {
    expect_shape(name, buffer, after_leading({problem_.num_heads, problem_.seqlen_q}));
    expect_dtype(name, buffer, type_ == ffi::F64 ? ffi::F64 : ffi::F32);
    return static_cast<float*>(buffer.untyped_data());
  }

 private:
  Shape after_leading(const Shape& sizes) const {
    Shape shape = leading_;
    shape.insert(shape.end(), sizes.begin(), sizes.end());
    return shape;
  }
  flashtile_tensor tensor(const char* name, AnyBuffer buffer, const Shape& sizes) const {
    expect_shape(name, buffer, after_leading(sizes));
    expect_dtype(name, buffer, type_);
    const int64_t row = sizes[1] * sizes[2];
    return {buffer.untyped_data(), sizes[0] * row, row, sizes[2]};
  }

  Shape leading_;
  ffi::DataType type_;
  flashtile_problem problem_ = FLASHTILE_PROBLEM_INIT;
};

// The memory that a call computes in, as aligned as the C API wants it.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : memory_(::operator new(bytes, kAlignment)) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(memory_, kAlignment); }
  void* memory() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* memory_;
};

ffi::Error forward(AnyBuffer q, AnyBuffer k, AnyBuffer v, ffi::Result<AnyBuffer> out,
                   ffi::Result<AnyBuffer> softmax_lse, double softmax_scale, int64_t window_left,
                   int64_t window_right, int64_t alignment) {
  return run([&] {
    const Attention attention(q, k, v, {softmax_scale, window_left, window_right, alignment});
    flashtile_forward_params params{};
    params.struct_size = sizeof params;
    params.problem = attention.problem();
    params.q = attention.queries("q", q);
    params.k = attention.keys("k", k);
    params.v = attention.values("v", v);
    params.out = attention.outputs("out", *out);
    params.softmax_lse = attention.lse("softmax_lse", *softmax_lse);
    params.lse_stride_batch = attention.lse_stride_batch();
    params.lse_stride_head = attention.lse_stride_head();
    check(flashtile_workspace_size(&params, &params.workspace_bytes));
    const Workspace workspace(params.workspace_bytes);
    params.workspace = workspace.memory();
    check(flashtile_forward(&params, /*stream=*/nullptr));
  });
}

ffi::Error backward(AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer out, AnyBuffer softmax_lse,
                    AnyBuffer dout, AnyBuffer dsoftmax_lse, ffi::Result<AnyBuffer> dq,
                    ffi::Result<AnyBuffer> dk, ffi::Result<AnyBuffer> dv, double softmax_scale,
                    int64_t window_left, int64_t window_right, int64_t alignment) {
  return run([&] {
    const Attention attention(q, k, v, {softmax_scale, window_left, window_right, alignment});
    flashtile_backward_params params{};
    params.struct_size = sizeof params;
    params.problem = attention.problem();
    params.q = attention.queries("q", q);
    params.k = attention.keys("k", k);
    params.v = attention.values("v", v);
    params.out = attention.outputs("out", out);
    params.dout = attention.outputs("dout", dout);
    params.dq = attention.queries("dq", *dq);
    params.dk = attention.keys("dk", *dk);
    params.dv = attention.values("dv", *dv);
    params.softmax_lse = attention.lse("softmax_lse", softmax_lse);
    params.dsoftmax_lse = attention.lse("dsoftmax_lse", dsoftmax_lse);
    params.lse_stride_batch = params.dlse_stride_batch = attention.lse_stride_batch();
    params.lse_stride_head = params.dlse_stride_head = attention.lse_stride_head();
    check(flashtile_workspace_size_backward(&params, &params.workspace_bytes));
    const Workspace workspace(params.workspace_bytes);
    params.workspace = workspace.memory();
    check(flashtile_backward(&params, /*stream=*/nullptr));
  });
}

auto with_options(auto binding) {
  return std::move(binding)
      .template Attr<double>("softmax_scale")
      .template Attr<int64_t>("window_left")
      .template Attr<int64_t>("window_right")
      .template Attr<int64_t>("alignment");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashtile_xla_forward, forward,
                              with_options(ffi::Ffi::Bind()
                                               .Arg<AnyBuffer>()     // q
                                               .Arg<AnyBuffer>()     // k
                                               .Arg<AnyBuffer>()     // v
                                               .Ret<AnyBuffer>()     // out
                                               .Ret<AnyBuffer>()));  // softmax_lse

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashtile_xla_backward, backward,
                              with_options(ffi::Ffi::Bind()
                                               .Arg<AnyBuffer>()     // q
                                               .Arg<AnyBuffer>()     // k
                                               .Arg<AnyBuffer>()     // v
                                               .Arg<AnyBuffer>()     // out
                                               .Arg<AnyBuffer>()     // softmax_lse
                                               .Arg<AnyBuffer>()     // dout
                                               .Arg<AnyBuffer>()     // dsoftmax_lse
                                               .Ret<AnyBuffer>()     // dq
                                               .Ret<AnyBuffer>()     // dk
                                               .Ret<AnyBuffer>()));  // dv
