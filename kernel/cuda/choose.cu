// Which slices serve a call on CUDA. The table has a row for every slice of the build; choose()
// picks rows, from which the plan's name, the workspace and the launch follow. Host code only.
//
// Everything about the device is asked once a call (the runtime keeps these attributes), so there
// is no state to initialise, to lock or to get wrong with several devices.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <initializer_list>

#include "api/backend.h"
#include "build_config.h"
#include "cuda/slices.cuh"
#include "cuda/tensor_map.h"
#include "decode/dense.cuh"
#include "decode/plan.cuh"
#include "launch.cuh"
#include "tile/mask.cuh"

namespace flashtile::cuda {

template <class Params>
struct SliceRow {
  Pass pass;
  Family family;
  int head_dim;
  Variant variant;
  Status (*launch)(const Params& params, const Scores& scores, const Device& device,
                   CUstream_st* stream);
  size_t (*workspace_bytes)(const Problem& problem);
};

namespace {

using I64 = long long;

constexpr int kLargestOfAll = 256;  // head dim of the family's largest slice
constexpr int kMostSlices = 96;     // in a table

// The slices of a build that take the same parameters; of a pass, family and variant by ascending
// head dim.
template <class Params>
struct SliceTable {
  SliceRow<Params> rows[kMostSlices] = {};
  int count = 0;

  template <Pass kPass, Family kFamily, Variant kVariant = Variant::kPlain, int... kHeadDims>
  constexpr void add(std::integer_sequence<int, kHeadDims...>) {
    ((rows[count++] = {kPass, kFamily, kHeadDims, kVariant,
                       &Slice<kPass, kFamily, kHeadDims, kVariant>::launch,
                       &Slice<kPass, kFamily, kHeadDims, kVariant>::workspace_bytes}),
     ...);
  }
};

constexpr SliceTable<ForwardParams> kForwardSlices = [] {
  SliceTable<ForwardParams> table;
  table.add<Pass::kForward, Family::kSm80Large>(LargeHeadDims());
  table.add<Pass::kForward, Family::kSm80Small>(SmallHeadDims());
  table.add<Pass::kForward, Family::kSm90>(Sm90HeadDims());
  table.add<Pass::kPrefill, Family::kSm80Large>(LargeHeadDims());
  table.add<Pass::kPrefill, Family::kSm80Small>(SmallHeadDims());
  table.add<Pass::kPrefill, Family::kSm90>(Sm90HeadDims());
  table.add<Pass::kDecode, Family::kSm80Large>(LargeHeadDims());
  table.add<Pass::kDecode, Family::kSm80Small>(SmallHeadDims());
  table.add<Pass::kForward, Family::kSm80Large, Variant::kModified>(LargeScoresHeadDims());
  table.add<Pass::kForward, Family::kSm80Small, Variant::kModified>(SmallScoresHeadDims());
  table.add<Pass::kPrefill, Family::kSm80Large, Variant::kModified>(LargeScoresHeadDims());
  table.add<Pass::kPrefill, Family::kSm80Small, Variant::kModified>(SmallScoresHeadDims());
  table.add<Pass::kForward, Family::kSm90, Variant::kModified>(Sm90ScoresHeadDims());
  table.add<Pass::kPrefill, Family::kSm90, Variant::kModified>(Sm90ScoresHeadDims());
  table.add<Pass::kDecode, Family::kSm80Large, Variant::kModified>(LargeScoresHeadDims());
  table.add<Pass::kDecode, Family::kSm80Small, Variant::kModified>(SmallScoresHeadDims());
  return table;
}();

constexpr SliceTable<BackwardParams> kBackwardSlices = [] {
  SliceTable<BackwardParams> table;
  table.add<Pass::kBackward, Family::kSm80Large>(LargeHeadDims());
  table.add<Pass::kBackward, Family::kSm80Small>(SmallHeadDims());
  table.add<Pass::kBackward, Family::kSm90>(Sm90HeadDims());
  table.add<Pass::kBackward, Family::kSm80Large, Variant::kModified>(LargeScoresHeadDims());
  table.add<Pass::kBackward, Family::kSm80Small, Variant::kModified>(SmallScoresHeadDims());
  table.add<Pass::kBackward, Family::kSm90, Variant::kModified>(Sm90ScoresHeadDims());
  return table;
}();

// What a slice is found by, besides the head dims.
struct Kind {
  Pass pass;
  Family family;
  Variant variant;
};

// The smallest slice that holds the head dims.
template <class Params>
Status find(const SliceTable<Params>& table, const Kind& kind, const Problem& problem,
            const SliceRow<Params>*& found) {
  const int64_t wanted = problem.largest_head_dim();
  int largest = 0;
  for (int i = 0; i < table.count; ++i) {
    const SliceRow<Params>& row = table.rows[i];
    if (row.pass != kind.pass || row.family != kind.family || row.variant != kind.variant) continue;
    found = &row;
    if (wanted <= row.head_dim) return FLASHTILE_OK;
    largest = row.head_dim;
  }
  return fail(wanted <= kLargestOfAll ? FLASHTILE_NOT_BUILT : FLASHTILE_UNSUPPORTED,
              "%s is %lld; allowed on CUDA in this build: 1 to %d",
              problem.head_dim == wanted ? "head_dim" : "head_dim_v", static_cast<I64>(wanted),
              largest);
}

// The kernels number their thread blocks with an int: one for every block of rows and head.
Status check_blocks(const Problem& problem, const char* name, int64_t heads, int64_t seqlen,
                    int64_t total) {
  constexpr int64_t kBlock = 32;  // rows of the smallest block in config.cuh
  const int64_t blocks = problem.is_varlen() ? total / kBlock + problem.batch
                                             : (seqlen + kBlock - 1) / kBlock * problem.batch;
  int64_t all = 0;
  if (!__builtin_mul_overflow(blocks, heads, &all) && all <= INT32_MAX) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED,
              "%s is %lld for %lld blocks of %lld rows; allowed on CUDA: a product up to %d", name,
              static_cast<I64>(heads), static_cast<I64>(blocks), static_cast<I64>(kBlock),
              INT32_MAX);
}

Status check_query_blocks(const Problem& p) {
  return check_blocks(p, "num_heads", p.num_heads, p.seqlen_q, p.total_q);
}
Status check_key_blocks(const Problem& p) {
  return check_blocks(p, "num_heads_kv", p.num_heads_kv, p.seqlen_k, p.total_k);
}

struct Length {
  const char* name;
  int64_t value;
};
Length longest_keys(const Problem& p) {
  if (!p.cache.exists()) return {p.is_varlen() ? "total_k" : "seqlen_k", p.rows_k()};
  return {p.cache.block_table == nullptr ? "page_size" : "page_size * max_blocks",
          p.cache.capacity()};
}

// Positions in a sequence and their sums are ints.
Status check_lengths(const Problem& p) {
  const Length lengths[] = {{p.is_varlen() ? "total_q" : "seqlen_q", p.rows_q()}, longest_keys(p)};
  for (const auto& [name, value] : lengths) {
    if (value > kLongestSequence) {
      return fail(FLASHTILE_UNSUPPORTED, "%s is %lld; allowed on CUDA: 0 to %d", name,
                  static_cast<I64>(value), kLongestSequence);
    }
  }
  return FLASHTILE_OK;
}

Status check_forward_sizes(const Problem& problem) {
  if (Status s = check_dtype(problem)) return s;
  if (Status s = check_lengths(problem)) return s;
  return check_query_blocks(problem);
}

Status check_scores(const Scores& scores) {
  if (kHasScores || !scores.exist()) return FLASHTILE_OK;
  return fail(FLASHTILE_NOT_BUILT,
              "scores is set; allowed on CUDA in this build (FLASHTILE_SCORES=OFF): NULL, and no "
              "max_logit");
}

Variant variant_of(const Scores& scores) {
  return scores.exist() ? Variant::kModified : Variant::kPlain;
}

// As check_blocks() for the two launches of decoding.
Status check_decode_blocks(const Problem& p) {
  const int64_t blocks = decode_blocks(p);
  if (blocks <= INT32_MAX) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED,
              "num_heads is %lld for %lld sequences in a cache; allowed on CUDA: up to %d thread "
              "blocks, not %lld",
              static_cast<I64>(p.num_heads), static_cast<I64>(p.batch), INT32_MAX,
              static_cast<I64>(blocks));
}

Family family_for_all(const Device& device) {
  return memory_of(device) == Memory::kLarge ? Family::kSm80Large : Family::kSm80Small;
}

// The kernels for sm_90a on compute capability 9.0 where TMA takes all tensors, else those for
// sm_80 and later, which take everything. `note`: why not kSm90, on a device that has it.
Family choose_family(const Device& device, std::initializer_list<MappedTensor> tensors,
                     PlanName& name) {
  const Family general = family_for_all(device);
  if (!kHasSm90 || device.capability != 90) return general;
  TmaObstacle obstacle;
  for (const MappedTensor& tensor : tensors) {
    if (!obstacle) obstacle = tma_obstacle(tensor);
  }
  if (!obstacle && driver_encodes_tensor_maps()) return Family::kSm90;
  std::snprintf(name.note, sizeof name.note,
                "%s; the kernels for sm_90a take %s, those for sm_80 run instead",
                obstacle ? obstacle.text : "the driver has no cuTensorMapEncodeTiled",
                obstacle.takes);
  return general;
}
// `last` is the fourth tensor that TMA moves: the others are read and written without it.
template <class Params>
Family choose_family(const Params& params, const MappedTensor& last, const Device& device,
                     PlanName& name) {
  const Problem& p = params.problem;
  return choose_family(
      device,
      {query_tensor("q", params.q, p, p.head_dim), key_tensor("k", params.k, p, p.head_dim),
       key_tensor("v", params.v, p, p.head_dim_v), last},
      name);
}

template <class Params>
void write_name(PlanName& name, const char* pass, const SliceRow<Params>& row,
                const Problem& problem) {
  constexpr const char* kFamilies[] = {"_sm80_large", "_sm80_small", "_sm90"};
  char number[8];
  const char* const end = std::to_chars(number, number + sizeof number, row.head_dim).ptr;
  name.set_text({pass,
                 kFamilies[static_cast<int>(row.family)],
                 "_d",
                 {number, end},
                 problem.dtype == Dtype::kFloat16 ? "_fp16_" : "_bf16_",
                 problem.mask_name(),
                 row.variant == Variant::kPlain ? "" : "_scores"});
}

// The forward's loop, over tensors or over a cache. The note says also why a cache is not read by
// TMA alone.
Status choose_loop(const ForwardParams& params, Pass pass, Variant variant,
                   Plan<ForwardParams>& plan) {
  const Problem& p = params.problem;
  const MappedTensor out = query_tensor("out", params.out, p, p.head_dim_v);
  const Family family = choose_family(params, out, plan.device, plan.name);
  if (pass == Pass::kPrefill && family == Family::kSm90) {
    if (const TmaObstacle obstacle = page_obstacle(p.cache)) {
      std::snprintf(plan.name.note, sizeof plan.name.note,
                    "%s; TMA takes %s, rows of k and v are copied one by one instead",
                    obstacle.text, obstacle.takes);
    }
  }
  if (Status s = find(kForwardSlices, {pass, family, variant}, p, plan.loop)) return s;
  write_name(plan.name, "forward", *plan.loop, p);
  return FLASHTILE_OK;
}

Status choose_decode(const Problem& problem, Variant variant, Plan<ForwardParams>& plan) {
  const Kind kind = {Pass::kDecode, family_for_all(plan.device), variant};
  if (Status s = find(kForwardSlices, kind, problem, plan.decode)) return s;
  write_name(plan.name, "decode", *plan.decode, problem);
  const size_t bytes = plan.decode->workspace_bytes(problem);
  plan.workspace = {bytes, bytes};
  return FLASHTILE_OK;
}

// A dense call as one over a cache.
ForwardParams with_keys_in_cache(const ForwardParams& params) {
  ForwardParams cached = params;
  cached.problem = with_keys_in_cache(params.problem);
  return cached;
}

// Keys in a cache: decoding where some sequence may have few queries, and the forward's loop for
// the others in the same call. The name is that of decoding where there is some, the note that of
// the loop.
Status choose_over_cache(const ForwardParams& params, Variant variant, Plan<ForwardParams>& plan) {
  const DecodeForms forms = decode_forms(params.problem);
  if (Status s = forms.decode ? check_decode_blocks(params.problem) : FLASHTILE_OK) return s;
  if (forms.prefill) {
    if (Status s = choose_loop(params, Pass::kPrefill, variant, plan)) return s;
  }
  return forms.decode ? choose_decode(params.problem, variant, plan) : FLASHTILE_OK;
}

}  // namespace

Status choose(const ForwardParams& params, const Scores& scores, DeviceScope& scope,
              Plan<ForwardParams>& plan) {
  if (Status s = check_scores(scores)) return s;
  if (Status s = check_forward_sizes(params.problem)) return s;
  if (Status s = scope.enter(plan.device)) return s;
  const Variant variant = variant_of(scores);
  if (params.problem.cache.exists()) return choose_over_cache(params, variant, plan);
  if (is_dense_decode(params.problem) && !scores.dropout.exists())
    return choose_over_cache(with_keys_in_cache(params), variant, plan);
  return choose_loop(params, Pass::kForward, variant, plan);
}

Status choose(const BackwardParams& params, const Scores& scores, DeviceScope& scope,
              Plan<BackwardParams>& plan) {
  const Problem& p = params.problem;
  if (Status s = check_scores(scores)) return s;
  if (Status s = check_forward_sizes(p)) return s;
  if (Status s = check_key_blocks(p)) return s;
  if (Status s = scope.enter(plan.device)) return s;
  const Family general = family_for_all(plan.device);
  const MappedTensor dout = query_tensor("dout", params.dout, p, p.head_dim_v);
  const Variant variant = variant_of(scores);
  const Family family = choose_family(params, dout, plan.device, plan.name);
  // Enough for every family of the device: the family is known only with the tensors.
  size_t bytes = 0;
  for (const Family one : {general, Family::kSm90}) {
    if (one == Family::kSm90 && !(kHasSm90 && plan.device.capability == 90)) continue;
    const SliceRow<BackwardParams>* row = nullptr;
    if (Status s = find(kBackwardSlices, {Pass::kBackward, one, variant}, p, row)) return s;
    bytes = std::max(bytes, row->workspace_bytes(p));
    if (one == family) plan.loop = row;
  }
  plan.workspace = {bytes, bytes};
  write_name(plan.name, "backward", *plan.loop, p);
  return FLASHTILE_OK;
}

Status run(const ForwardParams& params, const Scores& scores, const Plan<ForwardParams>& plan,
           CUstream_st* stream) {
  if (plan.loop != nullptr) {
    if (Status s = plan.loop->launch(params, scores, plan.device, stream)) return s;
  }
  if (plan.decode == nullptr) return FLASHTILE_OK;
  if (params.problem.cache.exists())
    return plan.decode->launch(params, scores, plan.device, stream);
  return plan.decode->launch(with_keys_in_cache(params), scores, plan.device, stream);
}

Status run(const BackwardParams& params, const Scores& scores, const Plan<BackwardParams>& plan,
           CUstream_st* stream) {
  return plan.loop->launch(params, scores, plan.device, stream);
}

const char* architectures() { return kArchitectureList; }
const char* head_dims() { return kHeadDimList; }

}  // namespace flashtile::cuda
