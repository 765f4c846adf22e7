#include "cache_on_device.h"

#include <algorithm>

#include "../support/check.h"

namespace flashtile::test {

namespace {

// The rows that the call brings, into its cache on the device. Returns the error.
std::string append_under(const Schedule& schedule, CacheCall& call) {
  static const Backend backend = cuda_backend();
  begin(schedule);
  Appending what = {call};
  const std::string error = append_on(backend, what, call.problem());
  call.k = what.call.k;
  call.v = what.call.v;
  return error + finish();
}

}  // namespace

CacheResult run_on(const Backend& backend, CacheCall& call, const flashtile_problem& problem) {
  const CacheSpec& spec = call.spec();
  const Extents& rows = call.q.extents();
  HostTensor out(spec.dtype, {rows.batch, rows.seq, spec.heads, spec.dims.v}, spec.layout_k);
  HostTensor lse = make_row_tensor(rows, spec.dtype);
  Mirror mirror(backend);
  flashtile_problem moved = mirrored(mirror, backend, call, problem);
  if (moved.seqused_q != nullptr)
    moved.seqused_q = mirror.ints({problem.seqused_q, problem.seqused_q + problem.batch});
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &moved;
  params.q = mirror.tensor(call.q);
  params.k = mirror.tensor(call.k);
  params.v = mirror.tensor(call.v);
  params.out = mirror.tensor(out);
  if (spec.lse) params.softmax_lse = static_cast<float*>(mirror.tensor(lse).data);
  params.lse_stride_batch = lse.strides().batch;
  params.lse_stride_head = lse.strides().head;
  CacheResult result;
  size_t bytes = 0;
  char plan[96] = "";
  result.status = flashtile_workspace_size(&params, &bytes);
  const std::vector<uint8_t> poison(bytes, kPoison);
  const DeviceBytes workspace(backend, poison.data(), bytes);
  params.workspace = workspace.data();
  params.workspace_bytes = bytes;
  if (result.status == FLASHTILE_OK) result.status = flashtile_plan(&params, plan, sizeof plan);
  if (result.status == FLASHTILE_OK) result.status = flashtile_forward(&params, nullptr);
  if (result.status != FLASHTILE_OK) result.error = flashtile_last_error();
  mirror.copy_out();
  if (!out.gaps_are_untouched() || !lse.gaps_are_untouched())
    result.error += "wrote between the rows of out";
  result.plan = plan;
  result.out = out.dense();
  result.lse = lse.dense();
  return result;
}

CacheResult run_under(const Schedule& schedule, CacheCall& call, const flashtile_problem& problem) {
  static const Backend backend = cuda_backend();
  begin(schedule);
  CacheResult result = run_on(backend, call, problem);
  result.error += finish();
  return result;
}

bool prefills_on_sm90(const CacheCall& call, const Schedule& schedule) {
  const CacheSpec& spec = call.spec();
  const Extents& rows = call.q.extents();
  const HostTensor out(spec.dtype, {rows.batch, rows.seq, spec.heads, spec.dims.v}, spec.layout_k);
  return schedule.has_sm90 && tma_takes(call.q) && tma_takes(call.k) && tma_takes(call.v) &&
         tma_takes(out);
}

std::string expected_cache_plan(const CacheCall& call, const Schedule& schedule) {
  const CacheSpec& spec = call.spec();
  const bool decode = spec.packed || call.q.extents().seq * (spec.heads / spec.heads_kv) <= 64;
  const bool sm90 = !decode && prefills_on_sm90(call, schedule);
  const int slice = slice_of(spec.dims);
  return (decode ? "decode" : "forward") +
         (sm90 ? std::string("_sm90") : std::string("_sm80_") + memory_class(schedule)) + "_d" +
         std::to_string(sm90 ? std::max(slice, 64) : slice) + "_" + name_of(spec.dtype) + "_" +
         kind_of(spec.mask);
}

Attempt attempt_cache(const Schedule& schedule, const CacheSpec& spec) {
  CacheCall call(spec);
  const std::string error = call.appends() ? append_under(schedule, call) : "";
  CacheResult result = run_under(schedule, call, call.problem());
  result.error = error + result.error;
  Attempt attempt;
  attempt.wrong = result.error;
  if (!attempt.wrong.empty()) return attempt;
  const std::string expected = expected_cache_plan(call, schedule);
  if (result.plan != expected) attempt.wrong = "ran " + result.plan + ", not " + expected + "; ";
  attempt.result.values.out = result.out;
  attempt.result.values.lse = result.lse;
  const Setup setup = cache_setup(spec);
  const Truth truth(setup, call.gathered());
  if (!spec.lse) attempt.result.values.lse = truth.exact.lse;  // nobody asked for it
  judge(setup, truth, attempt);
  return attempt;
}

void check_cache_on_devices(CacheSpec spec, bool all_schedules) {
  static size_t turn = 0;
  ++turn;
  for (const auto& [device, its_schedules] : schedules_by_device()) {
    for (size_t i = 0; i < its_schedules.size(); ++i) {
      if (!all_schedules && i != turn % its_schedules.size()) continue;
      const Schedule& schedule = its_schedules[i];
      const Attempt attempt = attempt_draws(1, [&](uint64_t drawn) {
        CacheSpec other = spec;
        for (CacheSequence& sequence : other.sequences) sequence.seed += 100 * (drawn - 1);
        return attempt_cache(schedule, other);
      });
      CHECK_MESSAGE(attempt.passed(), spec.name() + " on " + device + ", seed " +
                                          std::to_string(schedule.seed) + ": " + attempt.wrong);
    }
  }
}

}  // namespace flashtile::test
