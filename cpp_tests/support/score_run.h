// The scores of a setup in a backend's memory, and the gradients that come back.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device_memory.h"
#include "setup.h"

namespace flashtile::test {

// What a call writes of scores, beside what attention writes.
struct ScoreResults {
  ScoreTensor dbias[2], dalibi, dsink;
  std::vector<double> max_logit;
};

class ScoreRun {
 public:
  ScoreRun(const Setup& setup, const Backend& backend);
  ScoreRun(const ScoreRun&) = delete;
  ScoreRun& operator=(const ScoreRun&) = delete;

  const flashtile_scores* scores() const { return input_.spec.exist() ? &scores_ : nullptr; }
  void fill(flashtile_forward_params& params) const;
  void fill(flashtile_backward_params& params) const;

  // Both say what was written that is not the tensors'; "": nothing.
  std::string fetch_forward(ScoreResults& results);
  std::string fetch_backward(ScoreResults& results);

 private:
  static flashtile_dtype dtype_of(Dtype dtype) { return static_cast<flashtile_dtype>(dtype); }

  static flashtile_score_tensor view_of(const ScoreTensor& tensor, void* data);
  flashtile_score_tensor mask_view() const;
  const DeviceTensor& keep(const Backend& backend, const HostTensor& host) {
    return *inputs_.emplace_back(std::make_unique<DeviceTensor>(backend, host));
  }
  // Where the gradient of a tensor goes: as large, with strides of its own.
  static HostTensor gradient(const ScoreTensor& of);
  static void place(const std::optional<DeviceTensor>& gradient, const ScoreTensor& of,
                    flashtile_score_tensor& view);

  const ScoreInput& input_;
  DeviceBytes rng_state_, mask_;
  std::vector<std::unique_ptr<DeviceTensor>> inputs_;
  std::optional<DeviceTensor> dbias_[2], dalibi_, dsink_, max_logit_;
  flashtile_scores scores_ = {};
};

}  // namespace flashtile::test
