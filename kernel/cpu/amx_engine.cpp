// The bfloat16 engine on AMX tiles, or, in namespace amx_emulated, on emulated ones.
#include "amx_backward.h"
#include "amx_forward.h"
#include "decode.h"
#include "engine.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {
namespace {

template <class Work, class Params>
constexpr Pass<Params> pass_of() {
  return {&Work::scratch, [](const Params& params, const Extent& extent, int threads) {
            Work(params, extent, threads).run();
          }};
}

}  // namespace

const Engine kBFloat16Engine = {pass_of<AmxForward, ForwardParams>(),
                                pass_of<Decode<BFloat16>, ForwardParams>(),
                                pass_of<AmxBackward, BackwardParams>()};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
