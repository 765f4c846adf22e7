// The backward over wgmma and TMA for one head dim. CMake compiles this file once per head dim, for
// sm_90a only.
#include "backward/launch_sm90.cuh"

#ifndef FLASHTILE_HEAD_DIM
#error "compile with -DFLASHTILE_HEAD_DIM=64"
#endif

namespace flashtile {

template Status launch_backward_sm90<FLASHTILE_HEAD_DIM>(const BackwardParams& params,
                                                         CUstream_st* stream);

template size_t backward_workspace_sm90<FLASHTILE_HEAD_DIM>(const Problem& problem);

}  // namespace flashtile
