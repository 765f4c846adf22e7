// `check` of the cache's ops: wrong lengths, tables and indices are reported instead of clamped in
// silence. On the CPU the call that brings them raises. On CUDA the check is asynchronous: the
// device writes a report into pinned host memory, one for each device, and the next call that
// checks, or the op raise_pending_checks, finds it there and raises.
#pragma once

#include "call.h"

namespace flashtile::ops {

// Whether a call checks: because it says so, or because the environment has FLASHTILE_CHECK=1.
bool is_checked(bool check);

// What the ops of the cache call the arguments of the C API.
inline constexpr std::pair<std::string_view, std::string_view> kCacheNames[] = {
    {"seqused_k", "cache_seqlens"},
    {"cu_seqlens_new", "cu_seqlens_q"},
    {"seqlen_q", "max_seqlen_q"}};

// The first wrong number of a problem on the CPU; empty when all is well.
std::string numbers_refusal(const flashtile_problem& problem);

// Raises what an earlier call found on this device, then looks at the numbers of this one.
void check_numbers(const flashtile_problem& problem, CUstream_st* stream);

// Raises what an earlier call found on any device.
void raise_pending_checks();

}  // namespace flashtile::ops
