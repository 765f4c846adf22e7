// A call of the C API on its way to a kernel: checked, converted and planned once, then asked for
// its name or its workspace, or run. The torch ops come this way, too.
#pragma once

#include "api/backend.h"
#include "api/check.h"

namespace flashtile {

// Params is ForwardParams or BackwardParams. Neither copied nor moved: on CUDA the device is
// current as long as the call lives.
template <class Params>
struct Call {
  Target target;
  Params params;
  Scores scores;
  Plan<Params> plan;
  cuda::DeviceScope device;
};

// Everything but the workspace and the stream. `user` is of the struct of the C API that Params
// comes from. Compiled for both in call.cpp, as are the others.
template <class UserParams, class Params>
[[nodiscard]] Status prepare(const UserParams* user, Call<Params>& call);

// The same before anything is allocated: no pointer to a tensor is looked at. Not to be run.
template <class UserParams, class Params>
[[nodiscard]] Status prepare_sizes(const UserParams* user, Call<Params>& call);

// Runs a prepared call in params.workspace, after a look at it and at the stream.
template <class Params>
[[nodiscard]] Status run(const Call<Params>& call, CUstream_st* stream);

}  // namespace flashtile
