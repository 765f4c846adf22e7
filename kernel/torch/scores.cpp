// Checks on the tensors of scores, each answered with a sentence, and their way into the C structs.
// python/flashtile/_scores.py says the same sentences.
#include "scores.h"

#include <initializer_list>
#include <utility>
#include <vector>

#include "forward.h"

namespace flashtile::ops {
namespace {

// One dimension of an allowed shape: a size, which may have to be 1 instead, or any that has a
// name.
struct Allowed {
  int64_t size = 0;
  bool or_one = false;
  const char* any = nullptr;

  bool fits(int64_t given) const {
    return any != nullptr || given == size || (or_one && given == 1);
  }
};
using Shape = std::vector<Allowed>;

Allowed exactly(int64_t size) { return {.size = size}; }
Allowed one_or(int64_t size) { return {.size = size, .or_one = true}; }
Allowed any(const char* name) { return {.any = name}; }

std::ostream& operator<<(std::ostream& stream, const Allowed& allowed) {
  if (allowed.any != nullptr) return stream << allowed.any;
  return stream << allowed.size << (allowed.or_one && allowed.size != 1 ? " or 1" : "");
}

bool fits(const Tensor& tensor, const Shape& shape) {
  return std::ranges::equal(tensor.sizes(), shape, [](int64_t size, const Allowed& allowed) {
    return allowed.fits(size);
  });
}

// "(4,), (2, 4) or (2, 4, 5)".
std::string text_of(const std::vector<Shape>& shapes) {
  std::string text;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (i > 0) text += i + 1 == shapes.size() ? " or " : ", ";
    text += tuple_text(shapes[i]);
  }
  return text;
}

std::string shapes_refusal(const char* name, const Tensor& tensor,
                           const std::vector<Shape>& shapes) {
  for (const Shape& shape : shapes) {
    if (fits(tensor, shape)) return {};
  }
  return sentence(name, " has shape ", tuple_text(tensor.sizes()), "; allowed: ", text_of(shapes));
}

std::vector<Shape> bias_shapes(const ScoreSizes& sizes) {
  const Allowed batch = one_or(sizes.batch), heads = one_or(sizes.num_heads());
  Allowed keys = any("max_k");
  if (!sizes.seqlen_k.has_value()) {
    keys = any("seqlen_cache");
  } else if (!sizes.is_packed()) {
    keys = one_or(*sizes.seqlen_k);
  }
  if (!sizes.is_packed()) return {{batch, heads, one_or(sizes.rows_q()), keys}};
  return {{heads, any("max_q"), keys}, {batch, heads, any("max_q"), keys}};
}

std::vector<Shape> slopes_shapes(const ScoreSizes& sizes) {
  const Allowed heads = exactly(sizes.num_heads());
  return {{heads}, {exactly(sizes.batch), heads}};
}

std::vector<Shape> sink_shapes(const ScoreSizes& sizes) {
  std::vector<Shape> shapes = slopes_shapes(sizes);
  const int64_t batch = sizes.is_packed() ? 1 : sizes.batch;
  shapes.push_back({exactly(batch), exactly(sizes.num_heads()), exactly(sizes.rows_q())});
  return shapes;
}

std::vector<Shape> query_scale_shapes(const ScoreSizes& sizes) {
  if (sizes.is_packed()) return {{exactly(sizes.rows_q())}};
  return {{exactly(sizes.batch), exactly(sizes.rows_q())}};
}

using Dtypes = std::vector<ScalarType>;

// Device and dtype against q; any strides will do.
std::string kinds_refusal(const char* name, const Tensor& tensor, const Tensor& q,
                          const Dtypes& dtypes) {
  if (device_name(tensor) != device_name(q)) {
    return sentence(name, " is on ", device_name(tensor), "; allowed: ", device_name(q),
                    ", the device of q");
  }
  std::string names;
  for (const ScalarType dtype : dtypes) {
    if (tensor.scalar_type() == dtype) return {};
    names += (names.empty() ? "" : ", ") + dtype_name(dtype);
  }
  return sentence(name, " has dtype ", dtype_name(tensor.scalar_type()), "; allowed: ", names);
}

Dtypes exact_dtypes(const Tensor& q) {
  if (q.scalar_type() != ScalarType::Double) return {ScalarType::Float};
  return {ScalarType::Float, ScalarType::Double};
}
Dtypes float_dtypes(const Tensor& q) {
  Dtypes dtypes = {ScalarType::Half, ScalarType::BFloat16};
  for (const ScalarType dtype : exact_dtypes(q)) dtypes.push_back(dtype);
  return dtypes;
}
Dtypes mask_dtypes(const Tensor& /*q*/) { return {ScalarType::Bool}; }

bool drops(double dropout_p) { return dropout_p >= 0x1p-32; }

std::string rng_state_refusal(const ScoreOptions& options, const ScoreSizes& sizes) {
  const OptionalTensor& state = options.rng_state;
  if (state.has_value()) {
    const std::string text = shape_refusal("rng_state", *state, {2});
    return text.empty() ? kind_refusal("rng_state", *state, sizes.q, ScalarType::Long) : text;
  }
  if (!drops(options.dropout_p) || options.dropout_p >= 1 || sizes.is_cache()) return {};
  return sentence("rng_state is None and dropout_p is ", options.dropout_p,
                  "; allowed: a tensor of seed and offset");
}

// Which dimension of a tensor is the batch, the head, the query and the key; -1: none.
using Dims = std::array<int, 4>;

Dims bias_dims(const Tensor& tensor) {
  return tensor.dim() == 3 ? Dims{-1, 0, 1, 2} : Dims{0, 1, 2, 3};
}
Dims head_dims(const Tensor& tensor) {  // of slopes and sinks
  if (tensor.dim() == 1) return {-1, 0, -1, -1};
  return {0, 1, tensor.dim() == 3 ? 2 : -1, -1};
}
Dims query_dims(const Tensor& tensor) {
  return tensor.dim() == 1 ? Dims{-1, -1, 0, -1} : Dims{0, -1, 1, -1};
}

// `strides` are those of the tensor or of its gradient.
template <class Strides>
flashtile_score_tensor to_score(const Tensor& tensor, const Dims& dims, void* data,
                                const Strides& strides) {
  const auto size = [&](int dim) { return dim < 0 ? 1 : tensor.size(dim); };
  const auto stride = [&](int dim) { return size(dim) == 1 ? 0 : strides[dim]; };
  return {.data = data,
          .stride_batch = stride(dims[0]),
          .stride_head = stride(dims[1]),
          .stride_q = stride(dims[2]),
          .stride_k = stride(dims[3]),
          .seqlen_q = size(dims[2]),
          .seqlen_k = size(dims[3]),
          .dtype = to_dtype(tensor.scalar_type()).value_or(FLASHTILE_BOOL)};  // of a mask
}

// A tensor of no numbers may have no memory, and NULL would say that there is no tensor.
void* memory_of(const Tensor& tensor) {
  static constexpr double kNoNumbers = 0;
  const void* const data = tensor.numel() == 0 ? &kNoNumbers : tensor.const_data_ptr();
  return const_cast<void*>(data);
}

std::vector<int64_t> contiguous_strides(const Tensor& tensor) {
  std::vector<int64_t> strides(static_cast<size_t>(tensor.dim()));
  int64_t stride = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= 0; --dim) {
    strides[static_cast<size_t>(dim)] = stride;
    stride *= tensor.size(dim);
  }
  return strides;
}

flashtile_score_tensor read_score(const OptionalTensor& tensor, Dims (*dims)(const Tensor&)) {
  if (!tensor.has_value()) return {};
  return to_score(*tensor, dims(*tensor), memory_of(*tensor), tensor->strides());
}

// What a gradient is of, null where none is wanted.
struct Gradient {
  const Tensor* of;
  Dims (*dims)(const Tensor&);
};
using Gradients = std::array<Gradient, 4>;  // in the order of ScoreGradients
Gradients gradients_of(const ScoreOptions& options, const WantedGradients& wanted) {
  const auto of = [](const OptionalTensor& tensor, bool is_wanted) {
    return is_wanted && tensor.has_value() ? &*tensor : nullptr;
  };
  return {{{of(options.alibi_slopes, wanted.alibi_slopes), head_dims},
           {of(options.bias, wanted.bias), bias_dims},
           {of(options.bias2, wanted.bias2), bias_dims},
           {of(options.sink, wanted.sink), head_dims}}};
}

// Whether entries are one number because a dimension of them has stride 0.
bool repeats(const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) == 0) return true;
  }
  return false;
}

}  // namespace

std::string refusal(const ScoreOptions& options, const ScoreSizes& sizes) {
  const struct {
    const char* name;
    const OptionalTensor& tensor;
    std::vector<Shape> (*shapes)(const ScoreSizes&);
    Dtypes (*dtypes)(const Tensor& q);
  } tensors[] = {
      {"alibi_slopes", options.alibi_slopes, slopes_shapes, exact_dtypes},
      {"bias[0]", options.bias, bias_shapes, float_dtypes},
      {"bias[1]", options.bias2, bias_shapes, float_dtypes},
      {"mask", options.mask, bias_shapes, mask_dtypes},
      {"sink", options.sink, sink_shapes, float_dtypes},
      {"query_scale", options.query_scale, query_scale_shapes, exact_dtypes},
  };
  for (const auto& [name, tensor, shapes, dtypes] : tensors) {
    if (!tensor.has_value()) continue;
    std::string text = shapes_refusal(name, *tensor, shapes(sizes));
    if (text.empty()) text = kinds_refusal(name, *tensor, sizes.q, dtypes(sizes.q));
    if (!text.empty()) return text;
  }
  return rng_state_refusal(options, sizes);
}

std::string refusal(const WantedGradients& wanted, const ScoreOptions& options) {
  const struct {
    const char* name;
    bool is_wanted, is_there;
  } tensors[] = {{"alibi_slopes", wanted.alibi_slopes, options.alibi_slopes.has_value()},
                 {"bias", wanted.bias, options.bias.has_value()},
                 {"bias2", wanted.bias2, options.bias2.has_value()},
                 {"sink", wanted.sink, options.sink.has_value()}};
  for (const auto& [name, is_wanted, is_there] : tensors) {
    if (!is_wanted || is_there) continue;
    return sentence("wants_", name, " is True and ", name, " is None; allowed: False");
  }
  return {};
}

flashtile_scores to_scores(const ScoreOptions& options) {
  flashtile_scores scores = FLASHTILE_SCORES_INIT;
  scores.softcap = options.softcap;
  scores.alibi_slopes = read_score(options.alibi_slopes, head_dims);
  scores.bias[0] = read_score(options.bias, bias_dims);
  scores.bias[1] = read_score(options.bias2, bias_dims);
  scores.mask = read_score(options.mask, bias_dims);
  scores.sink = read_score(options.sink, head_dims);
  scores.query_scale = read_score(options.query_scale, query_dims);
  scores.dropout_p = options.dropout_p;
  if (options.rng_state.has_value())
    scores.rng_state = static_cast<const int64_t*>(options.rng_state->const_data_ptr());
  return scores;
}

ScoreOptions separated(ScoreOptions options, const WantedGradients& wanted) {
  for (const auto& [tensor, is_wanted] :
       {std::pair(&options.alibi_slopes, wanted.alibi_slopes),
        std::pair(&options.bias, wanted.bias), std::pair(&options.bias2, wanted.bias2),
        std::pair(&options.sink, wanted.sink)}) {
    if (is_wanted && tensor->has_value() && repeats(tensor->value()))
      *tensor = torch::stable::contiguous(tensor->value());
  }
  return options;
}

void set_copies(const ScoreOptions& options, const WantedGradients& wanted,
                flashtile_scores& scores) {
  flashtile_score_tensor* const places[] = {&scores.alibi_slopes, &scores.bias[0], &scores.bias[1],
                                            &scores.sink};
  const Gradients gradients = gradients_of(options, wanted);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const auto& [of, dims] = gradients[i];
    if (of == nullptr || of->numel() == 0 || !repeats(*of)) continue;
    *places[i] = to_score(*of, dims(*of), stand_in_memory(9 + i), contiguous_strides(*of));
  }
}

ScoreGradients new_gradients(const ScoreOptions& options, const WantedGradients& wanted,
                             const Tensor& like) {
  ScoreGradients tensors;
  const Gradients gradients = gradients_of(options, wanted);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor* const of = gradients[i].of;
    tensors[i] = of == nullptr ? torch::stable::new_empty(like, {0})
                               : torch::stable::new_empty(*of, of->sizes());
  }
  return tensors;
}

void set_stand_ins(const ScoreOptions& options, const WantedGradients& wanted, uintptr_t first,
                   flashtile_backward_params& params) {
  flashtile_score_tensor* const places[] = {&params.dalibi_slopes, &params.dbias[0],
                                            &params.dbias[1], &params.dsink};
  const Gradients gradients = gradients_of(options, wanted);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const auto& [of, dims] = gradients[i];
    if (of == nullptr || of->numel() == 0) continue;
    *places[i] = to_score(*of, dims(*of), stand_in_memory(first + i), contiguous_strides(*of));
  }
}

void place(const ScoreGradients& gradients, Scores& scores) {
  ScoreView* const places[] = {&scores.dalibi_slopes, &scores.dbias[0], &scores.dbias[1],
                               &scores.dsink};
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (places[i]->exists()) places[i]->data = gradients[i].mutable_data_ptr();
  }
}

}  // namespace flashtile::ops
