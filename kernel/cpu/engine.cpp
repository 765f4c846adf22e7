// One instruction set's engines. CMake compiles this file once per instruction set.
#include "engine.h"

#include "append.h"
#include "backward.h"
#include "backward_vector.h"
#include "decode.h"
#include "forward.h"
#include "forward_vector.h"
#include "pass.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {
namespace {

template <class T>
constexpr Engine engine_of() {
  return {pass_of<Forward<VectorForward<T>>, ForwardParams>(),
          pass_of<Decode<VectorDecode<T>>, ForwardParams>(),
          pass_of<Backward<VectorBackward<T>>, BackwardParams>(), &append_kv<T>};
}

template <class K>
constexpr Engine narrow_engine_of() {
  return {pass_of<Forward<VectorForward<float, K>>, ForwardParams>(),
          pass_of<Decode<VectorDecode<float, K>>, ForwardParams>(),
          {},
          nullptr};
}

}  // namespace

// In the order of Dtype.
const EngineTable kEngines = {
    {engine_of<Half>(), engine_of<BFloat16>(), engine_of<float>(), engine_of<double>()},
    {narrow_engine_of<Half>(), narrow_engine_of<BFloat16>()}};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
