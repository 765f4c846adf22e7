// One instruction set's engines. CMake compiles this file once per instruction set.
#include "engine.h"

#include "backward.h"
#include "decode.h"
#include "forward.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {
namespace {

template <class Work, class Params>
constexpr Pass<Params> pass_of() {
  return {&Work::scratch, [](const Params& params, const Extent& extent, int threads) {
            Work(params, extent, threads).run();
          }};
}

template <class T>
constexpr Engine engine_of() {
  return {pass_of<Forward<T>, ForwardParams>(), pass_of<Decode<T>, ForwardParams>(),
          pass_of<Backward<T>, BackwardParams>()};
}

}  // namespace

// In the order of Dtype.
const EngineTable kEngines = {
    {engine_of<Half>(), engine_of<BFloat16>(), engine_of<float>(), engine_of<double>()}};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
