// Runs a setup through the C API on any backend: copies the poisoned buffers there, calls forward
// and backward, copies everything back, and looks at the gaps.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "device_memory.h"
#include "flashtile/flashtile.h"
#include "manual_attention.h"
#include "score_run.h"
#include "setup.h"

namespace flashtile::test {

struct RunResult {
  AttentionOutput values;
  ScoreResults scores;
  std::string error;  // "" when everything ran and only tensor elements were written
  std::string forward_plan, backward_plan;
};

class Run {
 public:
  Run(const Setup& setup, const Backend& backend);

  // The sentences with which forward and backward refuse the setup; "" where one does not. A call
  // must say what can_run said of it, and must not have touched its outputs.
  struct Refusals {
    std::string forward, backward;
  };
  Refusals refusals();

  // Forward, and backward unless the setup is forward only.
  RunResult operator()();

  RunResult forward();

  // `before` is called with the memory of dout right before the backward, which may be queued
  // behind what it queues.
  RunResult backward(const std::function<void(void* dout)>& before = nullptr);

 private:
  bool ok(flashtile_status status);
  static std::string checked_refusal(flashtile_status status, const std::string& why);
  std::vector<double> fetch(DeviceTensor& tensor, const char* name);
  void fill_problem();
  void fill_params();

  const Setup& setup_;
  const Backend& backend_;
  DeviceBytes cu_q_, cu_k_, used_q_, used_k_, block_table_, leftpad_;
  DeviceTensor q_, k_, v_, dout_, dlse_, lse_, out_, dq_, dk_, dv_;
  ScoreRun scores_;
  flashtile_problem problem_ = {};
  flashtile_forward_params forward_ = {};
  flashtile_backward_params backward_ = {};
  RunResult result_;
};

}  // namespace flashtile::test
