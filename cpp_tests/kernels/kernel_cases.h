// Runs cases through the compiled CUDA kernels under every schedule and checks everything about
// them: values, NaN, gaps, the device's reports, and that the kernel we think of is the one that
// ran.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../support/attempt.h"
#include "../support/error_table.h"
#include "device.h"

namespace flashtile::test {

// The slice of this build that runs: the smallest that holds q, k and v; 0 where none does.
int slice_of(const HeadDims& head_dims);

// The same of the kernels with scores, whose slices are 64, 128 and 256; 0 in a build without them.
int scores_slice_of(const HeadDims& head_dims);

// Skips the test where nothing can run.
void need_device(const HeadDims& dims = 64);

// Whether TMA takes a tensor: rows of whole 16 bytes that start at multiples of 16 bytes, none of
// them twice.
bool tma_takes(const HostTensor& tensor);

std::string expected_plan(const std::string& pass, const Setup& setup, const Schedule& schedule);

Attempt attempt_under(const Schedule& schedule, const Setup& setup, const Truth& truth,
                      const Backend& backend);

// Under each of these schedules of one device; stops where something is wrong. A deterministic
// setup must give the same bits under all.
Attempt attempt_on_device(const std::vector<Schedule>& schedules, const Setup& setup,
                          const Truth& truth, const Backend& backend);

// The schedules of every device, those of one device together.
std::map<std::string, std::vector<Schedule>> schedules_by_device();

// From case to case another one of a device's schedules; two where their bits are compared; all of
// them for make test-nightly.
std::vector<Schedule> schedules_of_case(const std::vector<Schedule>& all, uint64_t seed,
                                        bool deterministic);

// On every device. `draw(seed)`: the setup and its truth with the values of a seed.
void run_case(uint64_t seed, const std::function<std::pair<Setup, Truth>(uint64_t)>& draw,
              const Backend& backend, ErrorTable& table);

// Every case under each of its masks, with these head dims.
void run_cases(const std::vector<Case>& cases, Dtype dtype, const HeadDims& head_dims);

}  // namespace flashtile::test
