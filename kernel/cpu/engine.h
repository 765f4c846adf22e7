// What dispatch.cpp sees of the code that is compiled once per instruction set.
#pragma once

#include "params.h"

namespace flashtile::cpu {

// Longest sequences: exact when a call runs, upper bounds or hints when a workspace is planned.
struct Extent {
  int64_t max_q = 0;
  int64_t max_k = 0;
  int64_t min_q = 0;  // shorter sequences, and ones that are longer than max_q, are another pass's

  constexpr bool leaves_out(int64_t q_len) const { return q_len < min_q || q_len > max_q; }
};

// Scratch memory of a pass: with `minimum` it runs on the given number of threads, anything up to
// `wanted` makes it faster.
struct Scratch {
  size_t minimum = 0;
  size_t wanted = 0;
};

// What scores need beside the problem is part of every question: Scores, params.h.
template <class Params>
struct Pass {
  Scratch (*scratch)(const Problem& problem, const Scores& scores, const Extent& extent,
                     int threads);
  void (*run)(const Params& params, const Scores& scores, const Extent& extent, int threads);
};

// The passes for one dtype of q and one of k and v. `decode` is the forward pass for few query rows
// per key/value head.
struct Engine {
  Pass<ForwardParams> forward;
  Pass<ForwardParams> decode;
  Pass<BackwardParams> backward;
  void (*append_kv)(const AppendParams& params, int threads);  // of the dtype of k and v
};

// One instruction set; engines are indexed by Dtype. `narrow`: q is float32, k and v are float16 or
// bfloat16; forward and decode alone.
struct EngineTable {
  Engine engine[4];
  Engine narrow[2];
};

namespace portable {
extern const EngineTable kEngines;
}
namespace avx2 {
extern const EngineTable kEngines;
}
namespace avx512 {
extern const EngineTable kEngines;
}
// bfloat16 alone: on products of AVX512-BF16, on AMX tiles and on tiles emulated in plain C++.
namespace avx512_bf16 {
extern const Engine kBFloat16Engine;
}
namespace amx {
extern const Engine kBFloat16Engine;
}
namespace amx_emulated {
extern const Engine kBFloat16Engine;
}

}  // namespace flashtile::cpu
