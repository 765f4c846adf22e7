// The CPU backend's entry points: choose the instruction set, then the pass, then as many threads
// as the workspace has room for. Nothing is remembered between calls but that the process is a
// child of fork().
//
// The environment variable FLASHTILE_CPU_ISA forces an instruction set by its name, for tests and
// measurements; a name that this build or this machine does not have is an error.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "api/backend.h"
#include "cache.h"
#include "engine.h"
#include "unused_rows.h"
#if defined(FLASHTILE_CPU_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>
#endif

namespace flashtile::cpu {
namespace {

// Query rows per key/value head (the whole group's) up to which the decode pass is faster.
constexpr int64_t kDecodeRows = 16;

// One query is always decoded, however many heads share its keys.
int64_t decode_queries(const Problem& problem) {
  const int64_t queries = kDecodeRows / problem.group();
  return queries > 1 ? queries : 1;
}

struct InstructionSet {
  const char* name;
  const EngineTable* engines;
  const Engine* bfloat16;  // null: the table's
  bool (*runs_here)();
  bool only_by_name;

  // Of the dtypes of q and of k and v.
  const Engine& engine(Dtype dtype, Dtype dtype_kv) const {
    if (dtype != dtype_kv) return engines->narrow[static_cast<int>(dtype_kv)];
    if (dtype == Dtype::kBFloat16 && bfloat16 != nullptr) return *bfloat16;
    return engines->engine[static_cast<int>(dtype)];
  }
};

bool always() { return true; }
#if defined(FLASHTILE_CPU_HAVE_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif
#if defined(FLASHTILE_CPU_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(FLASHTILE_CPU_HAVE_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(FLASHTILE_CPU_HAVE_AMX)
// The processor has bf16 tiles and Linux lets this process use them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // leaf 7, edx
  if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// The best first. "amx-emulated" is for tests and runs only when it is named.
constexpr InstructionSet kInstructionSets[] = {
#if defined(FLASHTILE_CPU_HAVE_AMX)
    {"amx", &avx512::kEngines, &amx::kBFloat16Engine, has_amx, false},
#endif
#if defined(FLASHTILE_CPU_HAVE_AVX512_BF16)
    {"avx512_bf16", &avx512::kEngines, &avx512_bf16::kBFloat16Engine, has_avx512_bf16, false},
#endif
#if defined(FLASHTILE_CPU_HAVE_AVX512)
    {"avx512", &avx512::kEngines, nullptr, has_avx512, false},
#endif
#if defined(FLASHTILE_CPU_HAVE_AVX2)
    {"avx2", &avx2::kEngines, nullptr, has_avx2, false},
#endif
    {"portable", &portable::kEngines, nullptr, always, false},
    {"amx-emulated", &portable::kEngines, &amx_emulated::kBFloat16Engine, always, true},
};

const InstructionSet* choose_instruction_set() {
  const char* wanted = std::getenv("FLASHTILE_CPU_ISA");
  for (const InstructionSet& set : kInstructionSets) {
    const bool named =
        wanted == nullptr || *wanted == 0 ? !set.only_by_name : std::strcmp(wanted, set.name) == 0;
    if (named && set.runs_here()) return &set;
  }
  return nullptr;
}

Status no_instruction_set() {
  const char* wanted = std::getenv("FLASHTILE_CPU_ISA");
  return fail(FLASHTILE_UNSUPPORTED,
              "environment variable FLASHTILE_CPU_ISA is \"%s\"; this build has %s, and the "
              "processor must support the one that is named",
              wanted == nullptr ? "" : wanted, instruction_sets());
}

#if defined(_OPENMP)
// Threads do not survive fork(), but GNU's OpenMP runtime still counts on those that the parent
// had, and waits for them forever. One thread works in every child.
std::atomic<bool> is_forked = false;
[[maybe_unused]] const int kForkIsWatched =
    pthread_atfork(nullptr, nullptr, [] { is_forked.store(true, std::memory_order_relaxed); });
#endif

// How many a call gets that wants so many; 0: all.
int threads_for([[maybe_unused]] int wanted) {
#if defined(_OPENMP)
  if (is_forked.load(std::memory_order_relaxed)) return 1;
  return wanted > 0 ? wanted : omp_get_max_threads();
#else
  return 1;
#endif
}

const char* dtype_name(Dtype dtype) {
  constexpr const char* kNames[] = {"fp16", "bf16", "fp32", "fp64"};
  return kNames[static_cast<int>(dtype)];
}

bool is_decode(const Problem& problem, const Extent& extent) {
  return extent.max_q <= decode_queries(problem);
}

Extent exact_extent(const Problem& problem) {
  if (!problem.is_varlen()) return {problem.seqlen_q, problem.seqlen_k};
  Extent extent;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t q = int64_t{problem.cu_seqlens_q[b + 1]} - problem.cu_seqlens_q[b];
    const int64_t k = int64_t{problem.cu_seqlens_k[b + 1]} - problem.cu_seqlens_k[b];
    if (q > extent.max_q) extent.max_q = q;
    if (k > extent.max_k) extent.max_k = k;
  }
  return extent;
}

int64_t clamp_hint(int64_t hint, int64_t total) { return hint <= 0 || hint > total ? total : hint; }

// Without reading cu_seqlens and lengths: room for all threads if the longest lengths were told
// truly, and for one thread if they were not. `most_queries`: with longer sequences the pass does
// not run.
template <class Params>
WorkspaceSize planned_bytes(const Pass<Params>& pass, const Problem& problem, const Scores& scores,
                            int threads, int64_t most_queries = INT64_MAX) {
  const auto at_most = [&](int64_t max_q, int64_t max_k) {
    return Extent{max_q < most_queries ? max_q : most_queries, max_k};
  };
  const bool cache = problem.cache.exists(), varlen = problem.is_varlen();
  if (!varlen && !cache) {
    const Extent extent = at_most(problem.seqlen_q, problem.seqlen_k);
    return {pass.scratch(problem, scores, extent, threads).wanted,
            pass.scratch(problem, scores, extent, 1).minimum};
  }
  const int64_t most_q = varlen ? problem.total_q : problem.seqlen_q;
  const int64_t most_k = cache ? problem.cache.capacity() : problem.total_k;
  const Extent hint =
      at_most(clamp_hint(problem.seqlen_q, most_q), clamp_hint(problem.seqlen_k, most_k));
  const Extent most = at_most(most_q, most_k);
  const size_t wanted = pass.scratch(problem, scores, hint, threads).wanted;
  const size_t needed = pass.scratch(problem, scores, most, 1).minimum;
  return {wanted > needed ? wanted : needed, needed};
}

WorkspaceSize planned_decode_bytes(const Engine& engine, const Problem& problem,
                                   const Scores& scores, int threads) {
  return planned_bytes(engine.decode, problem, scores, threads, decode_queries(problem));
}

template <class Params>
Status run_pass(const Pass<Params>& pass, const Params& params, const Scores& scores, int threads,
                const Extent& extent) {
  while (threads > 1 &&
         pass.scratch(params.problem, scores, extent, threads).minimum > params.workspace_bytes) {
    --threads;
  }
  const size_t needed = pass.scratch(params.problem, scores, extent, threads).minimum;
  if (needed > (params.workspace == nullptr ? 0 : params.workspace_bytes)) {
    return fail(FLASHTILE_WORKSPACE_TOO_SMALL,
                "workspace_bytes is %zu; this call needs at least %zu bytes, see "
                "flashtile_workspace_size",
                params.workspace == nullptr ? size_t{0} : params.workspace_bytes, needed);
  }
  pass.run(params, scores, extent, threads);
  return FLASHTILE_OK;
}

int64_t queries_in_use(const Problem& problem, int64_t sequence) {
  if (problem.seqused_q != nullptr) return problem.seqused_q[sequence];
  if (!problem.is_varlen()) return problem.seqlen_q;
  return int64_t{problem.cu_seqlens_q[sequence + 1]} - problem.cu_seqlens_q[sequence];
}

// Sequences in a cache each take the pass that suits their own number of queries: which one it is
// must not depend on the neighbours, because the two do not agree in every bit.
Status run_cached(const Engine& engine, const ForwardParams& params, const Scores& scores,
                  int threads) {
  const Problem& problem = params.problem;
  Extent few, many;
  many.min_q = decode_queries(problem) + 1;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t q = queries_in_use(problem, b), k = cache_rows(problem, b).count;
    Extent& extent = q < many.min_q ? few : many;
    if (q > extent.max_q) extent.max_q = q;
    if (k > extent.max_k) extent.max_k = k;
  }
  if (few.max_q > 0) {
    if (Status s = run_pass(engine.decode, params, scores, threads, few)) return s;
  }
  return many.max_q > 0 ? run_pass(engine.forward, params, scores, threads, many) : FLASHTILE_OK;
}

Status run_forward(const Engine& engine, const ForwardParams& params, const Scores& scores,
                   int threads) {
  if (params.problem.cache.exists()) return run_cached(engine, params, scores, threads);
  const Extent extent = exact_extent(params.problem);
  return run_pass(is_decode(params.problem, extent) ? engine.decode : engine.forward, params,
                  scores, threads, extent);
}

// Before the heads raise it.
void clear_max_logit(const Problem& problem, const ScoreView& to) {
  for (int64_t h = 0; to.exists() && h < problem.num_heads; ++h) {
    if (to.dtype == Dtype::kFloat64) {
      static_cast<double*>(to.data)[h] = -std::numeric_limits<double>::infinity();
    } else {
      static_cast<float*>(to.data)[h] = -std::numeric_limits<float>::infinity();
    }
  }
}

// Names the pass; fails where the instruction set that was asked for does not run here.
template <class Params>
Status choose_engine(const char* pass, const Problem& problem, int threads, Plan<Params>& plan) {
  const InstructionSet* set = choose_instruction_set();
  if (set == nullptr) return no_instruction_set();
  const Dtype dtype = problem.dtype, dtype_kv = problem.dtype_kv();
  const bool is_narrow = dtype_kv != dtype;
  plan.name.set_text({pass, "_cpu_", set->name, "_", dtype_name(dtype), is_narrow ? "_kv_" : "",
                      is_narrow ? dtype_name(dtype_kv) : ""});
  plan.engine = &set->engine(dtype, dtype_kv);
  plan.threads = threads_for(threads);
  return FLASHTILE_OK;
}

}  // namespace

Status choose(const ForwardParams& params, const Scores& scores, int threads,
              Plan<ForwardParams>& plan) {
  const Problem& problem = params.problem;
  const bool decode = is_decode(problem, {problem.seqlen_q, problem.seqlen_k});
  const char* const pass = decode ? "decode" : "forward";
  if (Status s = choose_engine(pass, problem, threads, plan)) return s;
  const Engine& engine = *plan.engine;
  WorkspaceSize& workspace = plan.workspace;
  workspace = decode ? planned_decode_bytes(engine, problem, scores, plan.threads)
                     : planned_bytes(engine.forward, problem, scores, plan.threads);
  // The lengths may turn out to need the other pass. Sequences in a cache each get their own.
  if (problem.is_varlen() || (problem.cache.exists() && problem.seqused_q != nullptr)) {
    const WorkspaceSize other = decode
                                    ? planned_bytes(engine.forward, problem, scores, plan.threads)
                                    : planned_decode_bytes(engine, problem, scores, plan.threads);
    if (other.wanted > workspace.wanted) workspace.wanted = other.wanted;
    if (other.least > workspace.least) workspace.least = other.least;
  }
  return FLASHTILE_OK;
}

Status choose(const BackwardParams& params, const Scores& scores, int threads,
              Plan<BackwardParams>& plan) {
  const Problem& problem = params.problem;
  if (Status s = choose_engine("backward", problem, threads, plan)) return s;
  plan.workspace = planned_bytes(plan.engine->backward, problem, scores, plan.threads);
  return FLASHTILE_OK;
}

Status run(const ForwardParams& params, const Scores& scores, const Plan<ForwardParams>& plan) {
  clear_max_logit(params.problem, scores.max_logit);
  if (Status s = run_forward(*plan.engine, params, scores, plan.threads)) return s;
  clear_unused(params);
  return FLASHTILE_OK;
}

Status run(const BackwardParams& params, const Scores& scores, const Plan<BackwardParams>& plan) {
  const Extent extent = exact_extent(params.problem);
  if (Status s = run_pass(plan.engine->backward, params, scores, plan.threads, extent)) return s;
  clear_unused(params);
  return FLASHTILE_OK;
}

Status append_kv(const AppendParams& params, int threads) {
  const InstructionSet* set = choose_instruction_set();
  if (set == nullptr) return no_instruction_set();
  const Dtype dtype = params.problem.dtype_kv();  // nothing of q where it differs
  set->engine(dtype, dtype).append_kv(params, threads_for(threads));
  return FLASHTILE_OK;
}

const char* instruction_sets() {
  return "portable"
#if defined(FLASHTILE_CPU_HAVE_AVX2)
         ",avx2"
#endif
#if defined(FLASHTILE_CPU_HAVE_AVX512)
         ",avx512"
#endif
#if defined(FLASHTILE_CPU_HAVE_AVX512_BF16)
         ",avx512_bf16"
#endif
#if defined(FLASHTILE_CPU_HAVE_AMX)
         ",amx"
#endif
      ;
}

const char* instruction_set_used() {
  const InstructionSet* set = choose_instruction_set();
  return set == nullptr ? "" : set->name;
}

}  // namespace flashtile::cpu
