// flashtile_check_cache: its arguments, its work on the CPU, and its sentences.
#include <cstdio>

#include "api/backend.h"
#include "api/check_parts.h"
#include "cache_ops/report.h"

namespace flashtile {
namespace {

void check_on_cpu(const Problem& problem, CacheReport& report) {
  for (int64_t b = 0; b < problem.batch && report.what == 0; ++b) {
    report = find_wrong_number(problem, b);
    if (report.what == 0) report = find_wrong_page(problem, b, 0, 1);
  }
}

// The array that a number is in.
const char* name_of(WrongNumber what) {
  switch (what) {
    case WrongNumber::kOffsetQ: return "cu_seqlens_q";
    case WrongNumber::kOffsetNew: return "cu_seqlens_new";
    case WrongNumber::kLeftpad: return "cache_leftpad";
    case WrongNumber::kBatchIdx: return "cache_batch_idx";
    case WrongNumber::kPage: return "block_table";
    default: return "seqused_k";
  }
}

}  // namespace

Status check_cache(const flashtile_problem* user, CacheReport* report, CUstream_st* stream) {
  Target target;
  Problem problem;
  if (Status s = convert_problem(user, target, problem)) return s;
  if (!problem.cache.exists()) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "page_size is 0; allowed: 1 and more, the rows of a page of the cache");
  }
  if (report == nullptr)
    return fail(FLASHTILE_INVALID_ARGUMENT, "report is NULL; allowed: a pointer to the struct");
  if (Status s = check_stream(target, stream)) return s;
  if (target.device == FLASHTILE_CUDA)
    return cuda::check_cache(problem, report, target.device_index, stream);
  check_on_cpu(problem, *report);
  return FLASHTILE_OK;
}

Status describe(const CacheReport& report) {
  const auto what = static_cast<WrongNumber>(report.what);
  const I64 sequence = report.sequence, index = report.index, value = report.value;
  const I64 least = report.least, most = report.most;
  switch (what) {
    case WrongNumber::kOverflow:
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "seqused_k[%lld] is %lld and %lld new rows follow; allowed: %lld in all, the "
                  "capacity",
                  sequence, value, index, most);
    case WrongNumber::kPage:
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "block_table[%lld][%lld] is %lld; allowed: %lld to %lld", sequence, index, value,
                  least, most);
    default:
      return fail(FLASHTILE_INVALID_ARGUMENT, "%s[%lld] is %lld; allowed: %lld to %lld",
                  name_of(what), index, value, least, most);
  }
}

}  // namespace flashtile
