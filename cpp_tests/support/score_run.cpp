#include "score_run.h"

#include "numbers_of_problem.h"

namespace flashtile::test {

ScoreRun::ScoreRun(const Setup& setup, const Backend& backend)
    : input_(setup.scores),
      rng_state_(backend, input_.spec.rng_state.data(), sizeof input_.spec.rng_state),
      mask_(backend, input_.bytes.data(), input_.bytes.size()) {
  flashtile_scores_init(&scores_);
  scores_.softcap = input_.spec.softcap;
  scores_.dropout_p = input_.spec.dropout_p;
  if (input_.spec.dropout_p > 0) scores_.rng_state = reinterpret_cast<int64_t*>(rng_state_.data());
  const auto place = [&](const ScoreTensor& tensor, flashtile_score_tensor& view) {
    if (tensor.exists()) view = view_of(tensor, keep(backend, tensor.host).data());
  };
  for (int n = 0; n < 2; ++n) place(input_.bias[n], scores_.bias[n]);
  place(input_.alibi, scores_.alibi_slopes);
  place(input_.sink, scores_.sink);
  place(input_.query_scale, scores_.query_scale);
  if (input_.spec.mask.kind != MaskKind::kNone) scores_.mask = mask_view();  // of 0 rows, too
  for (int n = 0; n < 2; ++n) {
    if (input_.bias[n].exists()) dbias_[n].emplace(backend, gradient(input_.bias[n]));
  }
  if (input_.alibi.exists()) dalibi_.emplace(backend, gradient(input_.alibi));
  if (input_.sink.exists()) dsink_.emplace(backend, gradient(input_.sink));
  const bool wide = lse_dtype_of(setup.dtype) == Dtype::kFloat64;
  if (input_.spec.max_logit) {
    const Extents heads = {1, 1, 1, setup.extents_q.heads};
    max_logit_.emplace(backend,
                       HostTensor(wide ? Dtype::kFloat64 : Dtype::kFloat32, heads, Layout::kOdd));
  }
}

void ScoreRun::fill(flashtile_forward_params& params) const {
  if (max_logit_.has_value()) params.max_logit = reinterpret_cast<float*>(max_logit_->data());
}

void ScoreRun::fill(flashtile_backward_params& params) const {
  for (int n = 0; n < 2; ++n) place(dbias_[n], input_.bias[n], params.dbias[n]);
  place(dalibi_, input_.alibi, params.dalibi_slopes);
  place(dsink_, input_.sink, params.dsink);
}

std::string ScoreRun::fetch_forward(ScoreResults& results) {
  if (!max_logit_.has_value()) return "";
  results.max_logit = max_logit_->fetch().dense();
  return max_logit_->host.gaps_are_untouched() ? "" : "max_logit: written outside the tensor; ";
}

std::string ScoreRun::fetch_backward(ScoreResults& results) {
  std::string error;
  const auto fetch = [&](std::optional<DeviceTensor>& from, const ScoreTensor& of, const char* name,
                         ScoreTensor& to) {
    if (!from.has_value()) return;
    to = {from->fetch(), of.dims, 1, of.dtype};
    if (!from->host.gaps_are_untouched())
      error += std::string(name) + ": written outside the tensor; ";
  };
  fetch(dbias_[0], input_.bias[0], "dbias[0]", results.dbias[0]);
  fetch(dbias_[1], input_.bias[1], "dbias[1]", results.dbias[1]);
  fetch(dalibi_, input_.alibi, "dalibi_slopes", results.dalibi);
  fetch(dsink_, input_.sink, "dsink", results.dsink);
  return error;
}

flashtile_score_tensor ScoreRun::view_of(const ScoreTensor& tensor, void* data) {
  const Strides& strides = tensor.host.strides();
  const Extents& e = tensor.host.extents();
  return {.data = data,
          .stride_batch = tensor.dims.batch ? strides.batch : 0,
          .stride_head = tensor.dims.head ? strides.head : 0,
          .stride_q = tensor.dims.query ? strides.seq : 0,
          .stride_k = tensor.dims.key ? tensor.key_step : 0,
          .seqlen_q = e.seq,
          .seqlen_k = e.dim / tensor.key_step,
          .dtype = dtype_of(tensor.dtype)};
}

flashtile_score_tensor ScoreRun::mask_view() const {
  const Extents& e = input_.mask.host.extents();
  const Dims& dims = input_.mask.dims;
  const bool bits = input_.spec.mask.kind == MaskKind::kBits;
  return {.data = mask_.data(),
          .stride_batch = dims.batch ? input_.mask_batch : 0,
          .stride_head = dims.head ? input_.mask_head : 0,
          .stride_q = dims.query ? input_.mask_row : 0,
          .stride_k = dims.key && !bits ? 1 : 0,
          .seqlen_q = e.seq,
          .seqlen_k = e.dim,
          .dtype = bits ? FLASHTILE_BITS : FLASHTILE_BOOL};
}

HostTensor ScoreRun::gradient(const ScoreTensor& of) {
  Extents e = of.host.extents();
  e.dim /= of.key_step;
  const int64_t row = e.dim + 1, head = row * e.seq + 2;
  return HostTensor(of.dtype, e, Strides{head * e.heads + 1, row, head}, 3);
}

void ScoreRun::place(const std::optional<DeviceTensor>& gradient, const ScoreTensor& of,
                     flashtile_score_tensor& view) {
  if (!gradient.has_value()) return;
  view = view_of({gradient->host, of.dims, 1, of.dtype}, gradient->data());
}

}  // namespace flashtile::test
