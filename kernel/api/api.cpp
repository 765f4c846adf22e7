// The entry points of include/flashtile/flashtile.h.
//
//   call.h       what happens to a forward or backward call: prepare, then ask or run
//   check*.cpp   the caller's structs -> params.h; every refusal has its sentence
//   backend.h    what a backend answers: choose (name, workspace) and run
#include <cstdio>

#include "api/call.h"
#include "flashtile/flashtile.h"
#include "status.h"

namespace flashtile {
namespace {

Status can_append_kv(const flashtile_append_kv_params* user, Target& target, AppendParams& params) {
  if (Status s = check_append_kv(user, target, params)) return s;
  if (target.device == FLASHTILE_CPU) return FLASHTILE_OK;
  return cuda::can_append_kv(params, target.device_index);
}

Status append_kv(const flashtile_append_kv_params* user, CUstream_st* stream) {
  Target target;
  AppendParams params;
  if (Status s = check_append_kv(user, target, params)) return s;
  if (Status s = check_stream(target, stream)) return s;
  return target.device == FLASHTILE_CPU ? cpu::append_kv(params, target.threads)
                                        : cuda::append_kv(params, target.device_index, stream);
}

void copy_text(const char* text, char* out, size_t size) {
  if (out != nullptr && size > 0) std::snprintf(out, size, "%s", text);
}

template <class Params, class UserParams>
Status can_run(const UserParams* user, char* why, size_t why_size) {
  Call<Params> call;
  const Status status = prepare(user, call);
  copy_text(status == FLASHTILE_OK ? call.plan.name.note : last_error(), why, why_size);
  return status;
}

template <class Params, class UserParams>
Status plan_name(const UserParams* user, char* name, size_t name_size) {
  Call<Params> call;
  if (Status s = prepare(user, call)) return s;
  copy_text(call.plan.name.text, name, name_size);
  return FLASHTILE_OK;
}

template <class Params, class UserParams>
Status workspace_size(const UserParams* user, size_t* bytes) {
  if (bytes == nullptr)
    return fail(FLASHTILE_INVALID_ARGUMENT, "bytes is NULL; allowed: a pointer to the result");
  Call<Params> call;
  if (Status s = prepare_sizes(user, call)) return s;
  *bytes = call.plan.workspace.wanted;
  return FLASHTILE_OK;
}

template <class Params, class UserParams>
Status execute(const UserParams* user, CUstream_st* stream) {
  Call<Params> call;
  if (Status s = prepare(user, call)) return s;
  return run(call, stream);
}

}  // namespace
}  // namespace flashtile

using flashtile::BackwardParams;
using flashtile::ForwardParams;

extern "C" {

void flashtile_problem_init(flashtile_problem* problem) { *problem = FLASHTILE_PROBLEM_INIT; }

void flashtile_scores_init(flashtile_scores* scores) { *scores = FLASHTILE_SCORES_INIT; }

void flashtile_forward_init(flashtile_forward_params* params) {
  *params = flashtile_forward_params{};
  params->struct_size = sizeof *params;
}

void flashtile_backward_init(flashtile_backward_params* params) {
  *params = flashtile_backward_params{};
  params->struct_size = sizeof *params;
}

void flashtile_append_kv_init(flashtile_append_kv_params* params) {
  *params = flashtile_append_kv_params{};
  params->struct_size = sizeof *params;
}

flashtile_status flashtile_can_run_append_kv(const flashtile_append_kv_params* params, char* why,
                                             size_t why_size) {
  flashtile::Target target;
  flashtile::AppendParams checked;
  const flashtile_status status = flashtile::can_append_kv(params, target, checked);
  flashtile::copy_text(status == FLASHTILE_OK ? "" : flashtile_last_error(), why, why_size);
  return status;
}

flashtile_status flashtile_append_kv(const flashtile_append_kv_params* params,
                                     CUstream_st* stream) {
  return flashtile::append_kv(params, stream);
}

flashtile_status flashtile_check_cache(const flashtile_problem* problem,
                                       flashtile_cache_report* report, CUstream_st* stream) {
  return flashtile::check_cache(problem, report, stream);
}

flashtile_status flashtile_describe_report(const flashtile_cache_report* report, char* why,
                                           size_t why_size) {
  const bool empty = report == nullptr || report->what <= 0;
  const flashtile_status status = empty ? FLASHTILE_OK : flashtile::describe(*report);
  flashtile::copy_text(empty ? "" : flashtile_last_error(), why, why_size);
  return status;
}

flashtile_status flashtile_can_run(const flashtile_forward_params* params, char* why,
                                   size_t why_size) {
  return flashtile::can_run<ForwardParams>(params, why, why_size);
}

flashtile_status flashtile_can_run_backward(const flashtile_backward_params* params, char* why,
                                            size_t why_size) {
  return flashtile::can_run<BackwardParams>(params, why, why_size);
}

flashtile_status flashtile_plan(const flashtile_forward_params* params, char* name,
                                size_t name_size) {
  return flashtile::plan_name<ForwardParams>(params, name, name_size);
}

flashtile_status flashtile_plan_backward(const flashtile_backward_params* params, char* name,
                                         size_t name_size) {
  return flashtile::plan_name<BackwardParams>(params, name, name_size);
}

flashtile_status flashtile_workspace_size(const flashtile_forward_params* params, size_t* bytes) {
  return flashtile::workspace_size<ForwardParams>(params, bytes);
}

flashtile_status flashtile_workspace_size_backward(const flashtile_backward_params* params,
                                                   size_t* bytes) {
  return flashtile::workspace_size<BackwardParams>(params, bytes);
}

flashtile_status flashtile_forward(const flashtile_forward_params* params, CUstream_st* stream) {
  return flashtile::execute<ForwardParams>(params, stream);
}

flashtile_status flashtile_backward(const flashtile_backward_params* params, CUstream_st* stream) {
  return flashtile::execute<BackwardParams>(params, stream);
}

const char* flashtile_last_error(void) { return flashtile::last_error(); }

const char* flashtile_status_string(flashtile_status status) {
  switch (status) {
    case FLASHTILE_OK: return "ok";
    case FLASHTILE_INVALID_ARGUMENT: return "invalid argument";
    case FLASHTILE_UNSUPPORTED: return "unsupported";
    case FLASHTILE_NOT_BUILT: return "not built";
    case FLASHTILE_WORKSPACE_TOO_SMALL: return "workspace too small";
    case FLASHTILE_DEVICE_ERROR: return "device error";
  }
  return "unknown status";
}

#define FLASHTILE_TEXT_OF(x) #x
#define FLASHTILE_TEXT(x) FLASHTILE_TEXT_OF(x)
const char* flashtile_version(void) {
  return FLASHTILE_TEXT(FLASHTILE_VERSION_MAJOR) "." FLASHTILE_TEXT(
      FLASHTILE_VERSION_MINOR) "." FLASHTILE_TEXT(FLASHTILE_VERSION_PATCH);
}
#undef FLASHTILE_TEXT
#undef FLASHTILE_TEXT_OF

flashtile_status flashtile_get_build_info(flashtile_build_info* info) {
  if (info == nullptr) {
    return flashtile::fail(FLASHTILE_INVALID_ARGUMENT,
                           "info is NULL; allowed: a pointer to the struct");
  }
  if (info->struct_size < sizeof *info) {
    return flashtile::fail(FLASHTILE_INVALID_ARGUMENT,
                           "info.struct_size is %u; allowed: %zu (its sizeof) and more",
                           info->struct_size, sizeof *info);
  }
  info->version = flashtile_version();
  info->cuda_architectures = flashtile::cuda::architectures();
  info->cuda_head_dims = flashtile::cuda::head_dims();
  info->cpu_instruction_sets = flashtile::cpu::instruction_sets();
  info->cpu_instruction_set_used = flashtile::cpu::instruction_set_used();
  return FLASHTILE_OK;
}

}  // extern "C"
