#include "kernel_cases.h"

#include <algorithm>
#include <sstream>

#include "../support/check.h"

namespace flashtile::test {

namespace {

// Whether a pass runs the kernels with scores. The largest logits are the forward's alone, and a
// tensor without elements is none.
bool has_scores(const std::string& pass, const Setup& setup) {
  const ScoreInput& scores = setup.scores;
  if (scores.spec.softcap != 0 || scores.spec.dropout_p > 0 || !scores.bytes.empty()) return true;
  for (const ScoreTensor* const tensor :
       {&scores.bias[0], &scores.bias[1], &scores.alibi, &scores.sink, &scores.query_scale}) {
    if (tensor->exists()) return true;
  }
  return pass == "forward" && scores.spec.max_logit;
}

bool runs_on_sm90(const std::string& pass, const Setup& setup, const Schedule& schedule) {
  const bool takes_inputs =
      schedule.has_sm90 && tma_takes(setup.q) && tma_takes(setup.k) && tma_takes(setup.v);
  if (pass == "backward") return takes_inputs && tma_takes(setup.dout);
  return takes_inputs && tma_takes(make_tensor(setup, Role::kOut, setup.extents_out));
}

// Whether the kernels for few queries serve a forward: up to 64 queries times heads of a group, and
// at least 512 keys between the first that is seen and the last, 64 for each of those.
bool is_decoded(const Setup& setup) {
  const Extents &q = setup.extents_q, &k = setup.extents_k;
  const int64_t rows = q.seq * (q.heads / k.heads);
  if (setup.spec.keys_in_cache) return rows <= 64 || !setup.used_q.empty();
  if (setup.spec.is_varlen() || rows == 0 || rows > 64) return false;
  if (setup.spec.scores.dropout_p > 0) return false;
  int64_t first = k.seq, last = -1;
  for (int64_t i = 0; i < q.seq; ++i) {
    for (int64_t j = 0; j < k.seq; ++j) {
      if (!sees(setup.mask, q.seq, k.seq, i, j)) continue;
      first = std::min(first, j);
      last = std::max(last, j);
    }
  }
  return last - first + 1 >= std::max<int64_t>(512, 64 * rows);
}

}  // namespace

int slice_of(const HeadDims& head_dims) {
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  CHECK_EQ(flashtile_get_build_info(&info), FLASHTILE_OK);
  std::stringstream built(info.cuda_head_dims);  // "64,128"
  int smallest = 0;
  for (std::string entry; std::getline(built, entry, ',');) {
    const int slice = std::stoi(entry);
    const bool holds = slice >= std::max(head_dims.qk, head_dims.v);
    if (holds && (smallest == 0 || slice < smallest)) smallest = slice;
  }
  return smallest;
}

void need_device(const HeadDims& dims) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  if (slice_of(dims) == 0) SKIP("this build has no kernels of this head dim");
}

int scores_slice_of(const HeadDims& head_dims) {
  const int slice = slice_of(head_dims);
  if (slice == 0) return 0;
  return slice <= 64 ? 64 : slice <= 128 ? 128 : 256;
}

bool tma_takes(const HostTensor& tensor) {
  const Extents& e = tensor.extents();
  const Strides& s = tensor.strides();
  const auto takes = [](int64_t stride, int64_t extent) {
    return extent <= 1 || (stride > 0 && stride % 8 == 0);
  };
  const bool is_aligned = e.batch == 0 || tensor.start_byte() % 16 == 0;  // without data, at 0
  return e.seq > 0 && e.dim % 8 == 0 && is_aligned && takes(s.seq, e.seq) &&
         takes(s.head, e.heads) && takes(s.batch, e.batch);
}

std::string expected_plan(const std::string& pass, const Setup& setup, const Schedule& schedule) {
  const HeadDims dims = {setup.head_dim, setup.head_dim_v};
  const bool scores = has_scores(pass, setup);
  const int slice = scores ? scores_slice_of(dims) : slice_of(dims);
  const std::string end = std::string("_") + name_of(setup.dtype) + "_" + kind_of(setup.mask) +
                          (scores ? "_scores" : "");
  const auto sm80 = [&](const std::string& kernel) {
    return kernel + "_sm80_" + memory_class(schedule) + "_d" + std::to_string(slice) + end;
  };
  if (pass == "forward" && is_decoded(setup)) return sm80("decode");
  if (runs_on_sm90(pass, setup, schedule)) {
    return pass + "_sm90_d" + std::to_string(std::max(slice, 64)) + end;
  }
  return sm80(pass);
}

Attempt attempt_under(const Schedule& schedule, const Setup& setup, const Truth& truth,
                      const Backend& backend) {
  begin(schedule, setup.spec.deterministic);
  Attempt attempt;
  attempt.result = Run(setup, backend)();
  attempt.wrong = finish() + attempt.result.error;
  if (!attempt.wrong.empty()) return attempt;
  const auto check_plan = [&](const std::string& pass, const std::string& plan) {
    const std::string expected = expected_plan(pass, setup, schedule);
    if (plan != expected) attempt.wrong += "ran " + plan + ", not " + expected + "; ";
  };
  check_plan("forward", attempt.result.forward_plan);
  if (!setup.forward_only()) check_plan("backward", attempt.result.backward_plan);
  judge(setup, truth, attempt);
  return attempt;
}

Attempt attempt_on_device(const std::vector<Schedule>& schedules, const Setup& setup,
                          const Truth& truth, const Backend& backend) {
  Attempt all;  // the last, with the verdicts of all
  RunResult first;
  for (size_t i = 0; i < schedules.size(); ++i) {
    const std::string where =
        " on " + schedules[i].device + ", seed " + std::to_string(schedules[i].seed) + ": ";
    Attempt attempt = attempt_under(schedules[i], setup, truth, backend);
    if (i == 0) first = attempt.result;
    if (attempt.passed() && setup.spec.deterministic && !identical(first, attempt.result))
      attempt.wrong = "not the bits of the first schedule";
    if (!attempt.passed()) attempt.wrong = setup.name() + where + attempt.wrong;
    attempt.verdicts.insert(attempt.verdicts.begin(), all.verdicts.begin(), all.verdicts.end());
    all = attempt;
    if (!all.passed()) break;
  }
  return all;
}

std::map<std::string, std::vector<Schedule>> schedules_by_device() {
  std::map<std::string, std::vector<Schedule>> devices;
  for (const Schedule& schedule : schedules()) devices[schedule.device].push_back(schedule);
  return devices;
}

std::vector<Schedule> schedules_of_case(const std::vector<Schedule>& all, uint64_t seed,
                                        bool deterministic) {
  if (is_nightly()) return all;
  std::vector<Schedule> chosen = {all[seed % all.size()]};
  if (deterministic && all.size() > 1) chosen.push_back(all[(seed + 1) % all.size()]);
  return chosen;
}

void run_case(uint64_t seed, const std::function<std::pair<Setup, Truth>(uint64_t)>& draw,
              const Backend& backend, ErrorTable& table) {
  const std::pair<Setup, Truth> first = draw(seed);
  for (const auto& device : schedules_by_device()) {
    const std::vector<Schedule> its_schedules =
        schedules_of_case(device.second, seed, first.first.spec.deterministic);
    const Attempt attempt = attempt_draws(seed, [&](uint64_t drawn) {
      const std::pair<Setup, Truth> other = drawn == seed ? first : draw(drawn);
      return attempt_on_device(its_schedules, other.first, other.second, backend);
    });
    for (const Verdict& verdict : attempt.verdicts) table.add(device.first, first.first, verdict);
    CHECK_MESSAGE(attempt.passed(), attempt.wrong);
  }
}

void run_cases(const std::vector<Case>& cases, Dtype dtype, const HeadDims& head_dims) {
  need_device(head_dims);
  const Backend backend = cuda_backend();
  ErrorTable table;
  uint64_t seed = 1;
  for (const Case& spec : cases) {
    for (const Mask& mask : spec.masks) {
      const auto draw = [&](uint64_t drawn) {
        const Setup setup = make_setup(spec, dtype, head_dims, mask, drawn);
        return std::pair(setup, Truth(setup));
      };
      run_case(seed++, draw, backend, table);
    }
  }
  table.print();
}

}  // namespace flashtile::test
