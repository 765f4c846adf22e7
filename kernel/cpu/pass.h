// A pass of an engine from the class that does its work.
#pragma once

#include "engine.h"
#include "vec.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

template <class Work, class Params>
constexpr Pass<Params> pass_of() {
  return {&Work::scratch, [](const Params& params, const Scores& scores, const Extent& extent,
                             int threads) { Work(params, scores, extent, threads).run(); }};
}

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
