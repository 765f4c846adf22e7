// Every refusal of problem.scores and of its gradients: the whole sentence, the same from can_run
// and from the call, and nothing is written.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "../support/check.h"
#include "../support/small_call.h"

using flashtile::test::SmallCall;

namespace {

constexpr int64_t kB = SmallCall::kBatch, kH = SmallCall::kHeads, kQ = SmallCall::kQ,
                  kK = SmallCall::kK;
constexpr float kUntouched = -7.0f;

// A call with every tensor of scores, all of them good.
struct ScoredCall {
  SmallCall call;
  flashtile_scores scores = FLASHTILE_SCORES_INIT;
  float bias[kB * kH * kQ * kK] = {}, dbias[kB * kH * kQ * kK] = {};
  float slopes[kH] = {}, sink[kB * kH * kQ] = {}, query_scale[kB * kQ] = {};
  float dslopes[kH] = {}, dsink[kB * kH * kQ] = {}, max_logit[kH] = {};
  unsigned char mask[kB * kH * kQ * kK] = {};
  int64_t rng_state[2] = {1, 2};

  ScoredCall() {
    call.problem.scores = &scores;
    scores.softcap = 30;
    scores.bias[0] = full(bias);
    scores.bias[1] = {bias, 0, 0, 0, 1, 0, 0, FLASHTILE_FLOAT32};
    scores.alibi_slopes = {slopes, 0, 1, 0, 0, 0, 0, FLASHTILE_FLOAT32};
    scores.mask = {mask, kH * kQ * kK, kQ * kK, kK, 1, 0, 0, FLASHTILE_BOOL};
    scores.sink = {sink, kH * kQ, kQ, 1, 0, 0, 0, FLASHTILE_FLOAT32};
    scores.query_scale = {query_scale, kQ, 0, 1, 0, 0, 0, FLASHTILE_FLOAT32};
    scores.dropout_p = 0.25;
    scores.rng_state = rng_state;
    call.forward.max_logit = max_logit;
    call.backward.dbias[0] = full(dbias);
    call.backward.dalibi_slopes = {dslopes, 0, 1, 0, 0, 0, 0, FLASHTILE_FLOAT32};
    call.backward.dsink = {dsink, kH * kQ, kQ, 1, 0, 0, 0, FLASHTILE_FLOAT32};
    for (float& x : call.out) x = kUntouched;
    for (float& x : call.dq) x = kUntouched;
    for (float& x : dbias) x = kUntouched;
    for (float& x : max_logit) x = kUntouched;
  }

  static flashtile_score_tensor full(float* data) {
    return {data, kH * kQ * kK, kQ * kK, kK, 1, kQ, kK, FLASHTILE_FLOAT32};
  }
  void make_varlen() {
    call.make_varlen();
    for (flashtile_score_tensor* const t :
         {&scores.bias[0], &scores.bias[1], &scores.mask, &call.backward.dbias[0]}) {
      t->seqlen_q = kQ;
      t->seqlen_k = kK;
    }
    scores.sink.stride_batch = scores.query_scale.stride_batch = call.backward.dsink.stride_batch =
        0;
    scores.sink.stride_head = call.backward.dsink.stride_head = kB * kQ;
  }
  bool is_untouched() const {
    for (const float x : call.out) {
      if (x != kUntouched) return false;
    }
    for (const float x : call.dq) {
      if (x != kUntouched) return false;
    }
    for (const float x : dbias) {
      if (x != kUntouched) return false;
    }
    return max_logit[0] == kUntouched;
  }
};

struct Refusal {
  void (*break_it)(ScoredCall& c);
  const char* sentence;
};

// Of forward and backward.
const Refusal kRefusals[] = {
    {[](ScoredCall& c) { c.scores.struct_size = 8; },
     "scores.struct_size is 8; allowed: 416 to 4096"},
    {[](ScoredCall& c) { c.scores.softcap = -1; },
     "softcap is -1; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"},
    {[](ScoredCall& c) { c.scores.softcap = std::nan(""); },
     "softcap is nan; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"},
    {[](ScoredCall& c) { c.scores.bias[0].dtype = 9; },
     "bias[0].dtype is 9; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, and FLOAT64 where q has "
     "it"},
    {[](ScoredCall& c) { c.scores.bias[1].dtype = FLASHTILE_FLOAT64; },
     "bias[1].dtype is 3; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, and FLOAT64 where q has "
     "it"},
    {[](ScoredCall& c) { c.scores.bias[1].dtype = FLASHTILE_BOOL; },
     "bias[1].dtype is 4; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, and FLOAT64 where q has "
     "it"},
    {[](ScoredCall& c) { c.scores.alibi_slopes.dtype = FLASHTILE_BFLOAT16; },
     "alibi_slopes.dtype is 1; allowed: FLASHTILE_FLOAT32, and FLOAT64 where q has it"},
    {[](ScoredCall& c) { c.scores.alibi_slopes.stride_q = 1; },
     "alibi_slopes.stride_q is 1; allowed: 0, it has no such dimension"},
    {[](ScoredCall& c) { c.scores.mask.dtype = FLASHTILE_FLOAT32; },
     "mask.dtype is 2; allowed: FLASHTILE_BOOL and FLASHTILE_BITS"},
    {[](ScoredCall& c) { c.scores.sink.stride_k = 1; },
     "sink.stride_k is 1; allowed: 0, it has no such dimension"},
    {[](ScoredCall& c) { c.scores.query_scale.stride_head = 4; },
     "query_scale.stride_head is 4; allowed: 0, it has no such dimension"},
    {[](ScoredCall& c) { c.scores.query_scale.dtype = FLASHTILE_FLOAT16; },
     "query_scale.dtype is 0; allowed: FLASHTILE_FLOAT32, and FLOAT64 where q has it"},
    {[](ScoredCall& c) { c.scores.softcap = INFINITY; },
     "softcap is inf; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"},
    {[](ScoredCall& c) { c.scores.dropout_p = 1.5; }, "dropout_p is 1.5; allowed: 0 to 1"},
    {[](ScoredCall& c) { c.scores.dropout_p = -0.1; }, "dropout_p is -0.1; allowed: 0 to 1"},
    {[](ScoredCall& c) { c.scores.dropout_p = std::nan(""); }, "dropout_p is nan; allowed: 0 to 1"},
    {[](ScoredCall& c) { c.scores.dropout_p = 1e-7; },
     "dropout_p is 1e-07; allowed: 0, 1 and what 16 bits round to neither, 2^-17 to below 1 - "
     "2^-17"},
    {[](ScoredCall& c) { c.scores.dropout_p = 1 - 1e-7; },
     "dropout_p is 1; allowed: 0, 1 and what 16 bits round to neither, 2^-17 to below 1 - 2^-17"},
    {[](ScoredCall& c) { c.scores.rng_state = nullptr; },
     "rng_state is NULL and dropout_p is 0.25; allowed: a pointer to seed and offset"},
    {[](ScoredCall& c) {
       c.make_varlen();
       c.scores.sink.stride_batch = 16;
     },
     "sink.stride_batch is 16 in varlen; allowed: 0, with stride_q over the rows of q"},
    {[](ScoredCall& c) {
       c.make_varlen();
       c.scores.bias[0].seqlen_k = -1;
     },
     "bias[0].seqlen_k is -1; allowed: 0 to 2147483647"},
    {[](ScoredCall& c) {
       c.make_varlen();
       c.scores.bias[0].seqlen_k = 5;
     },
     "bias[0].seqlen_k is 5; allowed: at least 6, the keys of sequence 0"},
    {[](ScoredCall& c) {
       c.make_varlen();
       c.scores.mask.seqlen_q = 3;
     },
     "mask.seqlen_q is 3; allowed: at least 4, the queries of sequence 0"},
};

const Refusal kForwardRefusals[] = {
    {[](ScoredCall& c) { c.call.forward.out.data = c.bias; },
     "out shares memory with bias[0]; allowed: memory of its own"},
    {[](ScoredCall& c) { c.call.forward.max_logit = c.slopes; },
     "max_logit shares memory with alibi_slopes; allowed: memory of its own"},
    {[](ScoredCall& c) {
       c.call.problem.page_size = kK;
       c.call.problem.num_pages = kB;
       c.call.problem.dtype = FLASHTILE_FLOAT32;
       c.scores.bias[0].seqlen_k = kK;
     },
     "dropout_p is 0.25 and page_size is 6; allowed: 0 over a key/value cache"},
};

const Refusal kBackwardRefusals[] = {
    {[](ScoredCall& c) { c.scores.bias[0].data = nullptr; },
     "dbias[0] is set and bias[0] is not; allowed: both or neither"},
    {[](ScoredCall& c) { c.scores.sink.data = nullptr; },
     "dsink is set and sink is not; allowed: both or neither"},
    {[](ScoredCall& c) { c.scores.alibi_slopes.data = nullptr; },
     "dalibi_slopes is set and alibi_slopes is not; allowed: both or neither"},
    {[](ScoredCall& c) { c.scores.bias[0].stride_head = 0; },
     "dbias[0].stride_head is 24; allowed: 0, as that of bias[0]"},
    {[](ScoredCall& c) { c.call.backward.dbias[0].dtype = FLASHTILE_BITS; },
     "dbias[0].dtype is 5; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, and FLOAT64 where q has "
     "it"},
    {[](ScoredCall& c) { c.call.backward.dbias[0].dtype = FLASHTILE_BOOL; },
     "dbias[0].dtype is 4; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, and FLOAT64 where q has "
     "it"},
    {[](ScoredCall& c) { c.call.backward.dalibi_slopes.dtype = FLASHTILE_FLOAT16; },
     "dalibi_slopes.dtype is 0; allowed: FLASHTILE_FLOAT32, and FLOAT64 where q has it"},
    {[](ScoredCall& c) { c.call.backward.dsink.stride_k = 1; },
     "dsink.stride_k is 1; allowed: 0, it has no such dimension"},
    {[](ScoredCall& c) { c.call.backward.dbias[0].stride_q = 2; },
     "dbias[0].stride_q is 2 over 4 entries, which share memory; allowed: strides that keep them "
     "apart, they are written"},
    {[](ScoredCall& c) { c.call.backward.dbias[0].data = c.bias; },
     "dbias[0] shares memory with bias[0]; allowed: memory of its own"},
};

// Addresses that no number of the type has; the sentence begins with the name and ends so.
struct Misaligned {
  void (*break_it)(ScoredCall& c);
  const char* name;
  const char* allowed;
};
template <class T>
T* one_byte_on(T* data) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(data) + 1);
}
const Misaligned kMisaligned[] = {
    {[](ScoredCall& c) { c.scores.bias[0].data = one_byte_on(c.bias); }, "bias[0]",
     "; allowed: a multiple of 4, a number's size"},
    {[](ScoredCall& c) { c.scores.alibi_slopes.data = one_byte_on(c.slopes); }, "alibi_slopes",
     "; allowed: a multiple of 4, a number's size"},
    {[](ScoredCall& c) { c.scores.sink.data = one_byte_on(c.sink); }, "sink",
     "; allowed: a multiple of 4, a number's size"},
    {[](ScoredCall& c) { c.scores.query_scale.data = one_byte_on(c.query_scale); }, "query_scale",
     "; allowed: a multiple of 4, a number's size"},
    {[](ScoredCall& c) { c.scores.rng_state = one_byte_on(c.rng_state); }, "rng_state",
     "; allowed: a multiple of 8, a number's size"},
};

enum class Pass { kForward, kBackward };

void check_refusal(const Refusal& refusal, Pass pass) {
  const auto c = std::make_unique<ScoredCall>();
  refusal.break_it(*c);
  char why[512] = "";
  const bool forward = pass == Pass::kForward;
  const flashtile_status asked =
      forward ? flashtile_can_run(&c->call.forward, why, sizeof why)
              : flashtile_can_run_backward(&c->call.backward, why, sizeof why);
  CHECK(asked != FLASHTILE_OK);
  CHECK_EQ(std::string(why), std::string(refusal.sentence));
  CHECK_EQ(forward ? flashtile_forward(&c->call.forward, nullptr)
                   : flashtile_backward(&c->call.backward, nullptr),
           asked);
  CHECK_EQ(std::string(flashtile_last_error()), std::string(refusal.sentence));
  CHECK(c->is_untouched());
}

void check_misaligned(const Misaligned& misaligned) {
  const auto c = std::make_unique<ScoredCall>();
  misaligned.break_it(*c);
  CHECK(flashtile_forward(&c->call.forward, nullptr) != FLASHTILE_OK);
  const std::string forward = flashtile_last_error();
  CHECK(forward.starts_with(misaligned.name));
  CHECK(forward.ends_with(misaligned.allowed));
  CHECK(flashtile_backward(&c->call.backward, nullptr) != FLASHTILE_OK);
  CHECK_EQ(std::string(flashtile_last_error()), forward);
  CHECK(c->is_untouched());
}

}  // namespace

TEST("scores that the refusal tests break run as they are, dense and varlen") {
  for (const bool varlen : {false, true}) {
    const auto c = std::make_unique<ScoredCall>();
    if (varlen) c->make_varlen();
    const flashtile_status forward = flashtile_forward(&c->call.forward, nullptr);
    CHECK_MESSAGE(forward == FLASHTILE_OK, flashtile_last_error());
    const flashtile_status backward = flashtile_backward(&c->call.backward, nullptr);
    CHECK_MESSAGE(backward == FLASHTILE_OK, flashtile_last_error());
  }
}

TEST("bad scores are refused with a sentence") {
  for (const Refusal& refusal : kRefusals) {
    check_refusal(refusal, Pass::kForward);
    check_refusal(refusal, Pass::kBackward);
  }
  for (const Misaligned& misaligned : kMisaligned) check_misaligned(misaligned);
  for (const Refusal& refusal : kForwardRefusals) check_refusal(refusal, Pass::kForward);
  for (const Refusal& refusal : kBackwardRefusals) check_refusal(refusal, Pass::kBackward);
}
