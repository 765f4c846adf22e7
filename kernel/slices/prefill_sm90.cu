// The forward's loop over a key/value cache by wgmma and TMA, for one head dim. CMake compiles this
// file once per head dim, for sm_90a only.
#include "forward/prefill_sm90.cuh"

#ifndef FLASHTILE_HEAD_DIM
#error "compile with -DFLASHTILE_HEAD_DIM=64"
#endif

namespace flashtile {

template Status launch_prefill_sm90<FLASHTILE_HEAD_DIM>(const ForwardParams& params,
                                                        CUstream_st* stream);

}  // namespace flashtile
