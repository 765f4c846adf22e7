// The torch ops of a key/value cache: flashtile::{forward_kvcache, append_kv, append_kv_rotary}
// and raise_pending_checks, which needs no tensor (cache_checks.h).
#pragma once

#include <torch/csrc/stable/library.h>

namespace flashtile::ops {

void define_kvcache_ops(torch::stable::detail::StableLibrary& library);
void implement_kvcache_ops(torch::stable::detail::StableLibrary& library);  // CPU or CUDA

}  // namespace flashtile::ops
