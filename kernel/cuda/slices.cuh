// The functions that the slices instantiate: one per (pass, head_dim, memory class). Each picks
// dtype and mask at run time, launches, and returns. api/api.cpp and cuda/backend.cu need only
// this.
#pragma once

#include <cstddef>

#include "config.cuh"
#include "params.h"
#include "status.h"

namespace flashtile {

template <int kHeadDim, Memory kMemory>
Status launch_forward_sm80(const ForwardParams& params, CUstream_st* stream);

// Keys in a cache: the sequences of few queries, and rows that belong to none. With decode_forms().
template <int kHeadDim, Memory kMemory>
Status launch_decode_sm80(const ForwardParams& params, CUstream_st* stream);

// Bytes of params.workspace that launch_decode_sm80 uses.
template <int kHeadDim, Memory kMemory>
size_t decode_workspace_sm80(const Problem& problem);

// Keys in a cache: the other sequences.
template <int kHeadDim, Memory kMemory>
Status launch_prefill_sm80(const ForwardParams& params, CUstream_st* stream);

// For sm_90a; every tensor is one that TMA takes (cuda/tensor_map.h).
template <int kHeadDim>
Status launch_forward_sm90(const ForwardParams& params, CUstream_st* stream);

// The same for sm_90a; q, k, v and out are tensors that TMA takes (cuda/tensor_map.h), of any
// pages.
template <int kHeadDim>
Status launch_prefill_sm90(const ForwardParams& params, CUstream_st* stream);

template <int kHeadDim, Memory kMemory>
Status launch_backward_sm80(const BackwardParams& params, CUstream_st* stream);

// Bytes of params.workspace that launch_backward_sm80 uses.
template <int kHeadDim, Memory kMemory>
size_t backward_workspace_sm80(const Problem& problem);

// For sm_90a; q, k, v and dout are tensors that TMA takes (cuda/tensor_map.h).
template <int kHeadDim>
Status launch_backward_sm90(const BackwardParams& params, CUstream_st* stream);

// Bytes of params.workspace that launch_backward_sm90 uses.
template <int kHeadDim>
size_t backward_workspace_sm90(const Problem& problem);

}  // namespace flashtile
