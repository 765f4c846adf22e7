// Forward calls over the key/value caches of cache_case.h on the device, under its schedules.
#pragma once

#include <algorithm>
#include <string>

#include "../support/append_case.h"
#include "kernel_cases.h"

namespace flashtile::test {

// The call with everything it reads and writes in the backend's memory.
CacheResult run_on(const Backend& backend, CacheCall& call, const flashtile_problem& problem);

// Under a schedule; what the device reports is an error, too.
CacheResult run_under(const Schedule& schedule, CacheCall& call, const flashtile_problem& problem);

// Whether sequences with many queries are served by the kernels for sm_90a.
bool prefills_on_sm90(const CacheCall& call, const Schedule& schedule);

// The decoding kernels have a row of 64 packed ones, the forward's loop the rest.
std::string expected_cache_plan(const CacheCall& call, const Schedule& schedule);

// The forward, behind an append where the spec has new rows: they are keys like all others.
Attempt attempt_cache(const Schedule& schedule, const CacheSpec& spec);

// Under a schedule of each device, other ones from call to call; or under all of them.
void check_cache_on_devices(CacheSpec spec, bool all_schedules = false);

}  // namespace flashtile::test
