// What there is between q k^T and v: flashtile_scores, as the caller gives it.
#include "api/check_scores.h"

#include <cfloat>
#include <cmath>

#include "cache.h"

namespace flashtile {
namespace {

enum class Kind {
  kBias,   // floating point
  kExact,  // float32, or float64 where the problem is
  kMask,
};

// Which dimensions a tensor has: batch, head, query, key.
struct Form {
  const char* name;
  Kind kind;
  bool has[4];
  bool by_row;  // its queries are rows of q, in varlen packed
};
constexpr Form kBias[2] = {{"bias[0]", Kind::kBias, {true, true, true, true}, false},
                           {"bias[1]", Kind::kBias, {true, true, true, true}, false}};
constexpr Form kSlopes = {"alibi_slopes", Kind::kExact, {true, true, false, false}, false};
constexpr Form kMask = {"mask", Kind::kMask, {true, true, true, true}, false};
constexpr Form kSink = {"sink", Kind::kBias, {true, true, true, false}, true};
constexpr Form kQueryScale = {"query_scale", Kind::kExact, {true, false, true, false}, true};
constexpr Form kDBias[2] = {{"dbias[0]", Kind::kBias, {true, true, true, true}, false},
                            {"dbias[1]", Kind::kBias, {true, true, true, true}, false}};
constexpr Form kDSlopes = {"dalibi_slopes", Kind::kExact, {true, true, false, false}, false};
constexpr Form kDSink = {"dsink", Kind::kBias, {true, true, true, false}, true};
constexpr Form kMaxLogit = {"max_logit", Kind::kExact, {false, true, false, false}, false};

constexpr const char* kStrides[4] = {"stride_batch", "stride_head", "stride_q", "stride_k"};

struct Strides {
  int64_t of[4];
};
Strides strides_of(const flashtile_score_tensor& t) {
  return {{t.stride_batch, t.stride_head, t.stride_q, t.stride_k}};
}
Strides strides_of(const ScoreView& t) {
  return {{t.stride_batch, t.stride_head, t.stride_q, t.stride_k}};
}

Status check_dtype_of(const Form& form, int32_t dtype, const Problem& problem) {
  const bool is_double = dtype == FLASHTILE_FLOAT64 && problem.dtype == Dtype::kFloat64;
  const char* allowed = nullptr;
  bool fits = false;
  switch (form.kind) {
    case Kind::kBias:
      fits = is_double || (dtype >= FLASHTILE_FLOAT16 && dtype <= FLASHTILE_FLOAT32);
      allowed = "FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, and FLOAT64 where q has it";
      break;
    case Kind::kExact:
      fits = is_double || dtype == FLASHTILE_FLOAT32;
      allowed = "FLASHTILE_FLOAT32, and FLOAT64 where q has it";
      break;
    case Kind::kMask:
      fits = dtype == FLASHTILE_BOOL || dtype == FLASHTILE_BITS;
      allowed = "FLASHTILE_BOOL and FLASHTILE_BITS";
      break;
  }
  if (fits) return FLASHTILE_OK;
  return fail(FLASHTILE_INVALID_ARGUMENT, "%s.dtype is %d; allowed: %s", form.name, dtype, allowed);
}

Status check_strides_of(const Form& form, const flashtile_score_tensor& t, const Problem& problem) {
  const Strides strides = strides_of(t);
  for (int i = 0; i < 4; ++i) {
    if (form.has[i] || strides.of[i] == 0) continue;
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s.%s is %lld; allowed: 0, it has no such dimension",
                form.name, kStrides[i], static_cast<I64>(strides.of[i]));
  }
  if (form.by_row && problem.is_varlen() && t.stride_q != 0 && t.stride_batch != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "%s.stride_batch is %lld in varlen; allowed: 0, with stride_q over the rows of q",
                form.name, static_cast<I64>(t.stride_batch));
  }
  return FLASHTILE_OK;
}

// The lengths that bias and mask reach over.
Status read_lengths(const Form& form, const flashtile_score_tensor& t, const Problem& problem,
                    ScoreView& view) {
  view.seqlen_q = form.by_row ? problem.rows_q() : problem.seqlen_q;
  view.seqlen_k = problem.seqlen_k;
  if (form.by_row) return FLASHTILE_OK;
  if (problem.cache.exists()) view.seqlen_k = problem.cache.capacity();
  const struct {
    const char* name;
    int64_t given, stride;
    bool is_read;
    int64_t& length;
  } lengths[] = {
      {"seqlen_q", t.seqlen_q, t.stride_q, problem.is_varlen(), view.seqlen_q},
      {"seqlen_k", t.seqlen_k, t.dtype == FLASHTILE_BITS ? 1 : t.stride_k,
       problem.is_varlen() || problem.cache.exists(), view.seqlen_k},
  };
  for (const auto& [name, given, stride, is_read, length] : lengths) {
    if (!is_read) continue;
    length = INT32_MAX;
    if (stride == 0) continue;
    if (given < 0 || given > INT32_MAX) {
      return fail(FLASHTILE_INVALID_ARGUMENT, "%s.%s is %lld; allowed: 0 to %d", form.name, name,
                  static_cast<I64>(given), INT32_MAX);
    }
    length = given;
  }
  return FLASHTILE_OK;
}

Status convert(const Form& form, const flashtile_score_tensor& t, const Problem& problem,
               ScoreView& view) {
  if (t.data == nullptr) return FLASHTILE_OK;
  if (Status s = check_dtype_of(form, t.dtype, problem)) return s;
  if (Status s = check_strides_of(form, t, problem)) return s;
  view = {.data = t.data,
          .stride_batch = t.stride_batch,
          .stride_head = t.stride_head,
          .stride_q = t.stride_q,
          .stride_k = t.stride_k,
          .dtype = static_cast<Dtype>(t.dtype)};
  if (view.dtype == Dtype::kBits) view.stride_k = 1;
  return read_lengths(form, t, problem, view);
}

// A gradient adds up over every dimension that its tensor repeats.
Status convert_gradient(const Form& form, const flashtile_score_tensor& t, const ScoreView& of,
                        const char* of_name, const Problem& problem, ScoreView& view) {
  if (t.data == nullptr) return FLASHTILE_OK;
  if (!of.exists()) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s is set and %s is not; allowed: both or neither",
                form.name, of_name);
  }
  if (Status s = convert(form, t, problem, view)) return s;
  const Strides strides = strides_of(t), of_strides = strides_of(of);
  for (int i = 0; i < 4; ++i) {
    if (of_strides.of[i] != 0 || strides.of[i] == 0) continue;
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s.%s is %lld; allowed: 0, as that of %s", form.name,
                kStrides[i], static_cast<I64>(strides.of[i]), of_name);
  }
  return FLASHTILE_OK;
}

Status read_softcap(double softcap, const Problem& problem, Scores& scores) {
  const double most = problem.dtype == Dtype::kFloat64 ? DBL_MAX : FLT_MAX;
  const double least = problem.dtype == Dtype::kFloat64 ? DBL_MIN : FLT_MIN;
  if (softcap == 0 || (softcap >= least && softcap <= most)) {
    scores.softcap = softcap;
    return FLASHTILE_OK;
  }
  return fail(FLASHTILE_INVALID_ARGUMENT, "softcap is %g; allowed: 0 (none) and %g to %g", softcap,
              least, most);
}

Status read_dropout(const flashtile_scores& user, const Problem& problem, Dropout& dropout) {
  const double p = user.dropout_p;
  if (!(p >= 0 && p <= 1)) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "dropout_p is %g; allowed: 0 to 1", p);
  }
  if (p < 0x1p-32) return FLASHTILE_OK;
  if (problem.cache.exists()) {
    return fail(FLASHTILE_UNSUPPORTED,
                "dropout_p is %g and page_size is %lld; allowed: 0 over a key/value cache", p,
                static_cast<I64>(problem.cache.page_size));
  }
  const auto threshold = static_cast<uint32_t>(std::lround(p * 65536));
  if (p < 1 && (threshold == 0 || threshold == 65536)) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "dropout_p is %g; allowed: 0, 1 and what 16 bits round to neither, 2^-17 to below "
                "1 - 2^-17",
                p);
  }
  if (threshold < 65536 && user.rng_state == nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "rng_state is NULL and dropout_p is %g; allowed: a pointer to seed and offset", p);
  }
  if (reinterpret_cast<uintptr_t>(user.rng_state) % 8 != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "rng_state is %p; allowed: a multiple of 8, a number's size",
                static_cast<const void*>(user.rng_state));
  }
  dropout = {threshold, p < 1 ? 1 / (1 - p) : 0, user.rng_state};
  return FLASHTILE_OK;
}

Status convert_common(const flashtile_problem& problem_of_user, const Problem& problem,
                      Scores& scores) {
  const flashtile_scores* const given = scores_of(problem_of_user);
  if (given == nullptr) return FLASHTILE_OK;
  flashtile_scores user = FLASHTILE_SCORES_INIT;
  if (Status s = read_struct(given, user, "scores")) return s;
  if (Status s = read_softcap(user.softcap, problem, scores)) return s;
  for (int i = 0; i < 2; ++i) {
    if (Status s = convert(kBias[i], user.bias[i], problem, scores.bias[i])) return s;
  }
  if (Status s = convert(kSlopes, user.alibi_slopes, problem, scores.alibi_slopes)) return s;
  if (Status s = convert(kMask, user.mask, problem, scores.mask)) return s;
  if (Status s = convert(kSink, user.sink, problem, scores.sink)) return s;
  if (Status s = convert(kQueryScale, user.query_scale, problem, scores.query_scale)) return s;
  return read_dropout(user, problem, scores.dropout);
}

// The number of keys in a mask of bits is a number of bytes.
int64_t keys_in_memory(const ScoreView& view) {
  return view.dtype == Dtype::kBits ? (view.seqlen_k + 7) / 8 : view.seqlen_k;
}

ScoreArgument argument_of(const Form& form, const ScoreView& view, const Problem& problem,
                          bool written) {
  ScoreArgument argument = {form.name, view, {}, written};
  const int64_t batch =
      form.by_row && problem.is_varlen() && view.stride_q != 0 ? 1 : problem.batch;
  const int64_t extents[4] = {batch, problem.num_heads, view.seqlen_q, keys_in_memory(view)};
  const Strides strides = strides_of(view);
  for (int i = 0; i < 4; ++i) argument.extents[i] = strides.of[i] == 0 ? 1 : extents[i];
  return argument;
}

struct Lengths {
  int64_t q, k;  // positions that bias and mask are read at
};
Lengths lengths_of(const Problem& p, int64_t sequence) {
  Lengths lengths = {p.seqlen_q, p.seqlen_k};
  if (p.is_varlen()) lengths.q = p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence];
  if (p.seqused_q != nullptr) lengths.q = p.seqused_q[sequence];
  if (p.cache.exists()) {
    const CacheRows rows = cache_rows(p, sequence);
    lengths.k = rows.begin + rows.count;
    return lengths;
  }
  if (p.is_varlen()) lengths.k = p.cu_seqlens_k[sequence + 1] - p.cu_seqlens_k[sequence];
  if (p.seqused_k != nullptr) lengths.k = p.seqused_k[sequence];
  return lengths;
}

Status check_reach(const Form& form, const ScoreView& view, const Problem& problem) {
  if (!view.exists()) return FLASHTILE_OK;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const auto [q, k] = lengths_of(problem, b);
    if (q > view.seqlen_q || k > view.seqlen_k) {
      const bool is_q = q > view.seqlen_q;
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s.%s is %lld; allowed: at least %lld, the %s of sequence %lld", form.name,
                  is_q ? "seqlen_q" : "seqlen_k",
                  static_cast<I64>(is_q ? view.seqlen_q : view.seqlen_k),
                  static_cast<I64>(is_q ? q : k), is_q ? "queries" : "keys", static_cast<I64>(b));
    }
  }
  return FLASHTILE_OK;
}

}  // namespace

Status convert_scores(const flashtile_forward_params& p, const Problem& problem, Scores& scores) {
  if (Status s = convert_common(*p.problem, problem, scores)) return s;
  if (p.max_logit == nullptr) return FLASHTILE_OK;
  scores.max_logit = {.data = p.max_logit,
                      .stride_head = 1,
                      .dtype = problem.lse_is_double ? Dtype::kFloat64 : Dtype::kFloat32};
  return FLASHTILE_OK;
}

Status convert_scores(const flashtile_backward_params& p, const Problem& problem, Scores& scores) {
  if (Status s = convert_common(*p.problem, problem, scores)) return s;
  for (int i = 0; i < 2; ++i) {
    if (Status s = convert_gradient(kDBias[i], p.dbias[i], scores.bias[i], kBias[i].name, problem,
                                    scores.dbias[i])) {
      return s;
    }
  }
  if (Status s = convert_gradient(kDSlopes, p.dalibi_slopes, scores.alibi_slopes, kSlopes.name,
                                  problem, scores.dalibi_slopes)) {
    return s;
  }
  return convert_gradient(kDSink, p.dsink, scores.sink, kSink.name, problem, scores.dsink);
}

Status check_score_lengths(const Target& target, const Problem& problem, const Scores& scores) {
  const bool are_sizes = !problem.is_varlen() && !problem.cache.exists();
  if (target.device != FLASHTILE_CPU || are_sizes) return FLASHTILE_OK;
  for (int i = 0; i < 2; ++i) {
    if (Status s = check_reach(kBias[i], scores.bias[i], problem)) return s;
    if (Status s = check_reach(kDBias[i], scores.dbias[i], problem)) return s;
  }
  return check_reach(kMask, scores.mask, problem);
}

ScoreArguments score_arguments(const Problem& problem, const Scores& scores) {
  ScoreArguments arguments;
  const auto add = [&](const Form& form, const ScoreView& view, bool written) {
    if (view.exists()) arguments.add(argument_of(form, view, problem, written));
  };
  for (int i = 0; i < 2; ++i) add(kBias[i], scores.bias[i], false);
  add(kSlopes, scores.alibi_slopes, false);
  add(kMask, scores.mask, false);
  add(kSink, scores.sink, false);
  add(kQueryScale, scores.query_scale, false);
  add(kMaxLogit, scores.max_logit, true);
  for (int i = 0; i < 2; ++i) add(kDBias[i], scores.dbias[i], true);
  add(kDSlopes, scores.dalibi_slopes, true);
  add(kDSink, scores.dsink, true);
  return arguments;
}

}  // namespace flashtile
