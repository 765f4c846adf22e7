// The torch ops of a key/value cache: flashtile::{forward_kvcache, forward_kvcache_out, append_kv,
// append_kv_rotary, gradient_of_kvcache}; and can_run_kvcache and raise_pending_checks, which
// compute nothing.
#pragma once

#include <torch/csrc/stable/library.h>

namespace flashtile::ops {

void define_kvcache_ops(torch::stable::detail::StableLibrary& library);
void implement_kvcache_ops(torch::stable::detail::StableLibrary& library);  // CPU or CUDA
void implement_kvcache_questions(torch::stable::detail::StableLibrary& library);

}  // namespace flashtile::ops
