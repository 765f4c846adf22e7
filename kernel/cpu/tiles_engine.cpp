// The bfloat16 engine on AMX tiles, in namespace avx512_bf16 on vectors, in amx_emulated on
// emulated tiles.
#include "append.h"
#include "backward.h"
#include "backward_tiles.h"
#include "decode.h"
#include "decode_tiles.h"
#include "engine.h"
#include "forward.h"
#include "forward_tiles.h"
#include "pass.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

const Engine kBFloat16Engine = {
    pass_of<Forward<TileForward>, ForwardParams>(),
    pass_of<Decode<VectorDecode<BFloat16>, TileDecode>, ForwardParams>(),
    pass_of<Backward<TileBackward>, BackwardParams>(), &append_kv<BFloat16>};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
