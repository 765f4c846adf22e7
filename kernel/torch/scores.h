// What stands between q k^T and v: the options that the torch ops take for flashtile_scores, the
// checks on their tensors, and the way to the structs of the C API. flashtile.h says what they do.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "flashtile/flashtile.h"
#include "params.h"
#include "sentences.h"

namespace flashtile::ops {

// A new member is a line of visit, of refusal and of to_scores; python/flashtile/_options.py has
// the same order. Any strides; a dimension of one entry is repeated.
struct ScoreOptions {
  double softcap = 0;           // 0: none
  OptionalTensor alibi_slopes;  // (num_heads) or (batch, num_heads)
  OptionalTensor bias, bias2;   // (batch|1, num_heads|1, seqlen_q|1, seqlen_k|1), see ScoreSizes
  OptionalTensor mask;          // bool, shaped like a bias; true: the key is seen
  OptionalTensor sink;          // (num_heads), (batch, num_heads), (batch, num_heads, seqlen_q)
  double dropout_p = 0;         // 0: none
  OptionalTensor rng_state;     // (2), int64: seed and offset
  OptionalTensor query_scale;   // (batch, seqlen_q), packed (total_q)

  template <class Visit>
  void visit(const Visit& member) {
    member("float softcap=0.0", softcap);
    member("Tensor? alibi_slopes=None", alibi_slopes);
    member("Tensor? bias=None", bias);
    member("Tensor? bias2=None", bias2);
    member("Tensor? mask=None", mask);
    member("Tensor? sink=None", sink);
    member("float dropout_p=0.0", dropout_p);
    member("Tensor? rng_state=None", rng_state);
    member("Tensor? query_scale=None", query_scale);
  }
};

// Which gradients are wanted beside those of q, k and v.
struct WantedGradients {
  bool alibi_slopes = false, bias = false, bias2 = false, sink = false;

  bool any() const { return alibi_slopes || bias || bias2 || sink; }
  template <class Visit>
  void visit(const Visit& member) {
    member("bool wants_alibi_slopes=False", alibi_slopes);
    member("bool wants_bias=False", bias);
    member("bool wants_bias2=False", bias2);
    member("bool wants_sink=False", sink);
  }
};

// What the tensors are checked against. Of packed queries a bias and a mask may lack the batch, and
// go by the position in the sequence: (max_q, max_k). Over a cache their keys are its rows, as many
// as the longest sequence has.
struct ScoreSizes {
  const Tensor& q;  // 4 dimensions, packed 3
  int64_t batch;
  std::optional<int64_t> seqlen_k;  // unset: over a cache

  bool is_packed() const { return q.dim() == 3; }
  bool is_cache() const { return !seqlen_k.has_value(); }
  int64_t num_heads() const { return q.size(q.dim() - 2); }
  int64_t rows_q() const { return q.size(q.dim() - 3); }
};

// One sentence that names the argument, what it was and what is allowed; empty when all is well.
// Numbers are the C API's to refuse.
std::string refusal(const ScoreOptions& options, const ScoreSizes& sizes);
std::string refusal(const WantedGradients& wanted, const ScoreOptions& options);

// Of options that were not refused. The tensors must outlive the result.
flashtile_scores to_scores(const ScoreOptions& options);

// The options with a copy of every tensor whose gradient is wanted and whose entries share memory
// (expand): a gradient has a number for each of them.
ScoreOptions separated(ScoreOptions options, const WantedGradients& wanted);
// The same for a call that is asked about: stand-ins for those copies.
void set_copies(const ScoreOptions& options, const WantedGradients& wanted,
                flashtile_scores& scores);

// dalibi_slopes, dbias, dbias2, dsink: new and contiguous, shaped like what they are of, `like` and
// empty where none is wanted.
using ScoreGradients = std::array<Tensor, 4>;
ScoreGradients new_gradients(const ScoreOptions& options, const WantedGradients& wanted,
                             const Tensor& like);

// Says where they will lie, before they exist: at addresses from number `first` on
// (contiguous_view); then where they lie.
void set_stand_ins(const ScoreOptions& options, const WantedGradients& wanted, uintptr_t first,
                   flashtile_backward_params& params);
void place(const ScoreGradients& gradients, Scores& scores);

}  // namespace flashtile::ops
