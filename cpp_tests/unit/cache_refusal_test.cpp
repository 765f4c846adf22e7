// Every refusal that a key/value cache adds to the C API: the status, the whole sentence, and that
// nothing was written.
#include <cstddef>
#include <memory>
#include <string>

#include "../support/check.h"
#include "../support/small_call.h"

using flashtile::test::SmallCall;

namespace {

// The small call with its keys as a cache of 6 pages of 2 rows, and one new row a sequence.
struct CacheCall : SmallCall {
  alignas(256) float k_new[kBatch * kHeadsKv * kDim] = {};
  alignas(256) float v_new[kBatch * kHeadsKv * kDim] = {};
  alignas(256) float cos[8] = {}, sin[8] = {};
  int32_t table[6] = {0, 1, 2, 3, 4, 5};
  int32_t lengths[2] = {3, 5};
  int32_t index[2] = {0, 1};
  int32_t cu_new[3] = {0, 1, 2};
  flashtile_append_kv_params append;

  CacheCall() {
    problem.page_size = 2;
    problem.num_pages = 6;
    problem.block_table = table;
    problem.block_table_stride = problem.max_blocks = 3;
    problem.seqused_k = lengths;
    problem.seqlen_new = 1;
    forward.k = forward.v = pages(k);
    forward.v.data = v;
    flashtile_append_kv_init(&append);
    append.problem = &problem;
    append.k_new = append.v_new = {k_new, kHeadsKv * kDim, kHeadsKv * kDim, kDim};
    append.v_new.data = v_new;
    append.k_cache = forward.k;
    append.v_cache = forward.v;
  }
  static flashtile_tensor pages(float* data) {
    return {data, 2 * kHeadsKv * kDim, kHeadsKv * kDim, kDim};
  }
  void rotate() {
    append.rotary_cos = cos;
    append.rotary_sin = sin;
    append.rotary_stride = 1;
    append.rotary_rows = 8;
    append.rotary_dim = 2;
    append.q = forward.q;
    append.q_out = forward.q;
    append.q_out.data = out;
  }
};

struct Refusal {
  void (*break_it)(CacheCall& call);
  flashtile_status status;
  const char* sentence;
};

constexpr flashtile_status kInvalid = FLASHTILE_INVALID_ARGUMENT;

// Of forward and append alike.
const Refusal kProblemRefusals[] = {
    {[](CacheCall& c) { c.problem.page_size = -1; }, kInvalid,
     "page_size is -1; allowed: 0 to 2147483647"},
    {[](CacheCall& c) { c.problem.cu_seqlens_k = c.cu_k; }, kInvalid,
     "cu_seqlens_k is set and page_size is 2; allowed: NULL with a cache"},
    {[](CacheCall& c) { c.problem.num_pages = -3; }, kInvalid,
     "num_pages is -3; allowed: 0 to 2147483647"},
    {[](CacheCall& c) { c.problem.num_splits = -1; }, kInvalid,
     "num_splits is -1; allowed: 0 to 2147483647"},
    {[](CacheCall& c) { c.problem.seqlen_new = -1; }, kInvalid,
     "seqlen_new is -1; allowed: 0 to 2147483647"},
    {[](CacheCall& c) {
       c.problem.cu_seqlens_new = c.cu_new;
       c.problem.total_new = -1;
     },
     kInvalid, "total_new is -1; allowed: 0 to 2147483647"},
    {[](CacheCall& c) { c.problem.seqused_k = nullptr; }, kInvalid,
     "seqused_k is NULL and new rows are announced; allowed: a pointer, which says where they "
     "belong"},
    {[](CacheCall& c) {
       c.problem.block_table = nullptr;
       c.problem.num_pages = 1;
     },
     kInvalid,
     "num_pages is 1; allowed: at least batch, 2, without block_table and cache_batch_idx"},
    {[](CacheCall& c) { c.problem.cache_batch_idx = c.index; }, kInvalid,
     "cache_batch_idx and block_table are set; allowed: one of the two"},
    {[](CacheCall& c) { c.problem.max_blocks = -1; }, kInvalid,
     "max_blocks is -1; allowed: 0 to 2147483647"},
};

const Refusal kAppendRefusals[] = {
    {[](CacheCall& c) { c.append.v_cache.data = c.k; }, kInvalid,
     "k_cache shares memory with v_cache; allowed: memory of its own"},
    {[](CacheCall& c) { c.append.v_new.data = c.v; }, kInvalid,
     "v_cache shares memory with v_new; allowed: memory of its own"},
    {[](CacheCall& c) { c.append.q_out.data = c.v; }, kInvalid,
     "v_cache shares memory with q_out; allowed: memory of its own"},
    {[](CacheCall& c) { c.append.q_out.data = c.q + SmallCall::kDim; }, kInvalid,
     "q_out shares memory with q; allowed: memory of its own"},
    {[](CacheCall& c) { c.append.problem = nullptr; }, kInvalid,
     "problem is NULL; allowed: a pointer to the struct"},
    {[](CacheCall& c) { c.problem.page_size = 0; }, kInvalid,
     "page_size is 0; allowed: 1 and more, the rows of a page of the cache"},
    {[](CacheCall& c) { c.append.k_new.data = nullptr; }, kInvalid,
     "k_new.data is NULL; allowed: a pointer to 1 rows"},
    {[](CacheCall& c) { c.append.v_cache.data = nullptr; }, kInvalid,
     "v_cache.data is NULL; allowed: a pointer to 2 rows"},
    {[](CacheCall& c) { c.append.k_cache.stride_batch = 0; }, kInvalid,
     "k_cache.stride_batch is 0 over 6 entries, which share memory; allowed: strides that keep "
     "them apart, they are written"},
    {[](CacheCall& c) { c.append.rotary_sin = nullptr; }, kInvalid,
     "rotary_sin is NULL and rotary_cos is not; allowed: both NULL (no rotation) or both set"},
    {[](CacheCall& c) { c.append.rotary_flags = 4; }, kInvalid,
     "rotary_flags is 0x4; allowed: FLASHTILE_ROTARY_HALVES, FLASHTILE_ROTARY_Q_FIXED"},
    {[](CacheCall& c) { c.append.rotary_cos = c.append.rotary_sin = nullptr; }, kInvalid,
     "q.data is set and rotary_cos is NULL; allowed: NULL, q is only rotated"},
    {[](CacheCall& c) { c.append.rotary_dim = 3; }, kInvalid,
     "rotary_dim is 3; allowed: even, 2 to head_dim, 8"},
    {[](CacheCall& c) { c.append.rotary_dim = 10; }, kInvalid,
     "rotary_dim is 10; allowed: even, 2 to head_dim, 8"},
    {[](CacheCall& c) { c.append.rotary_rows = 0; }, kInvalid,
     "rotary_rows is 0; allowed: 1 to 2147483647"},
    {[](CacheCall& c) { c.append.q_out.data = nullptr; }, kInvalid,
     "q_out.data is NULL; allowed: a pointer to 4 rows"},
    {[](CacheCall& c) {
       c.problem.cu_seqlens_new = c.cu_new;
       c.problem.total_new = 1;
     },
     kInvalid, "cu_seqlens_new[2] is 2; allowed: up to 1, the number of rows"},
    {[](CacheCall& c) { c.lengths[1] = 6; }, kInvalid,
     "seqused_k[1] is 6 and 1 new rows follow; allowed: 6 in all, the capacity"},
    {[](CacheCall& c) { c.lengths[0] = 7; }, kInvalid, "seqused_k[0] is 7; allowed: 0 to 6"},
    {[](CacheCall& c) { c.table[5] = 6; }, kInvalid, "block_table[1][2] is 6; allowed: 0 to 5"},
    {[](CacheCall& c) {
       c.problem.block_table = nullptr;
       c.problem.cache_batch_idx = c.index;
       c.lengths[0] = c.lengths[1] = 1;
       c.index[0] = -1;
     },
     kInvalid, "cache_batch_idx[0] is -1; allowed: 0 to 5"},
};

bool all_zero(const CacheCall& call) {
  const auto zero = [](const auto& array) {
    for (const float x : array) {
      if (x != 0.0f) return false;
    }
    return true;
  };
  return zero(call.k) && zero(call.v) && zero(call.out) && zero(call.lse);
}

void check_refusal(flashtile_status status, const CacheCall& call, const Refusal& refusal) {
  CHECK_EQ(status, refusal.status);
  CHECK_EQ(std::string(flashtile_last_error()), std::string(refusal.sentence));
  CHECK(all_zero(call));
}

}  // namespace

TEST("the cache calls that the refusals break are good ones") {
  const auto call = std::make_unique<CacheCall>();
  for (float& x : call->k_new) x = 1.0f;
  CHECK_MESSAGE(flashtile_append_kv(&call->append, nullptr) == FLASHTILE_OK,
                flashtile_last_error());
  call->rotate();
  CHECK_MESSAGE(flashtile_append_kv(&call->append, nullptr) == FLASHTILE_OK,
                flashtile_last_error());
  CHECK_MESSAGE(flashtile_forward(&call->forward, nullptr) == FLASHTILE_OK, flashtile_last_error());
  CHECK(!all_zero(*call));
}

TEST("a cache's numbers in the problem are refused by forward and by append") {
  for (const Refusal& refusal : kProblemRefusals) {
    const auto call = std::make_unique<CacheCall>();
    for (float& x : call->k_new) x = 1.0f;
    refusal.break_it(*call);
    check_refusal(flashtile_forward(&call->forward, nullptr), *call, refusal);
    check_refusal(flashtile_append_kv(&call->append, nullptr), *call, refusal);
  }
}

TEST("what flashtile_append_kv refuses, and flashtile_can_run_append_kv says beforehand") {
  for (const Refusal& refusal : kAppendRefusals) {
    const auto call = std::make_unique<CacheCall>();
    for (float& x : call->k_new) x = 1.0f;
    call->rotate();
    refusal.break_it(*call);
    char why[256] = "";
    CHECK_EQ(flashtile_can_run_append_kv(&call->append, why, sizeof why), refusal.status);
    check_refusal(flashtile_append_kv(&call->append, nullptr), *call, refusal);
    CHECK_EQ(std::string(why), std::string(flashtile_last_error()));
  }
}

TEST("a stream on the CPU is refused by append") {
  const auto call = std::make_unique<CacheCall>();
  for (float& x : call->k_new) x = 1.0f;
  auto* const stream = reinterpret_cast<CUstream_st*>(call->workspace);
  CHECK_EQ(flashtile_append_kv(&call->append, stream), FLASHTILE_INVALID_ARGUMENT);
  CHECK(std::string(flashtile_last_error()).ends_with("; allowed: NULL on the CPU"));
  CHECK(all_zero(*call));
}

TEST("a backward through a cache is refused") {
  const auto call = std::make_unique<CacheCall>();
  CHECK_EQ(flashtile_backward(&call->backward, nullptr), FLASHTILE_UNSUPPORTED);
  CHECK_EQ(std::string(flashtile_last_error()),
           std::string("page_size is 2 in a backward; allowed: 0, a key/value cache has no "
                       "gradient"));
}

TEST("a problem of version 0.2.0, which ends before the cache, is no cache") {
  const auto call = std::make_unique<SmallCall>();
  call->problem.page_size = 2;  // not in that version: garbage behind the struct
  call->problem.struct_size = offsetof(flashtile_problem, page_size);
  CHECK_MESSAGE(flashtile_forward(&call->forward, nullptr) == FLASHTILE_OK, flashtile_last_error());
  CHECK_MESSAGE(flashtile_backward(&call->backward, nullptr) == FLASHTILE_OK,
                flashtile_last_error());
}
