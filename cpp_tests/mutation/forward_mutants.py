"""Mutants of the forward, of the masks and of what both passes share."""

from __future__ import annotations

from mutant import Mutant

FORWARD = "forward/sm80.cuh"
SOFTMAX = "tile/softmax.cuh"
MASK = "tile/mask.cuh"
EDGES = "tile/band_edges.cuh"
WORK = "tile/work.cuh"
FINISH = "tile/finish_rows.cuh"
LOAD = "tile/load_sm80.cuh"
FORMAT = "tile/row_format.cuh"
TILE = "tile/smem_tile.cuh"
ALL_CASES = ("shapes", "masks", "used rows", "row formats", "values")

WAIT = "ptx::cp_async_wait<0>(); "
BARRIER = "__syncthreads(); "
NEGATE_Q = "if (params.negate_q) negate(q_target); "  # before the first barrier
LOAD_K = "if (j > range.begin) stream.load_previous_k(params); "  # behind that after V's wait
LOAD_V = "stream.load_previous_v(params); "  # behind that after K's
KV_HEAD = "head / (static_cast<int>(problem.num_heads) / static_cast<int>(problem.num_heads_kv))"


def mutant(name: str, *patch: str, cases: str = "shapes", head_dim: int = 64) -> Mutant:
    """A mutant of one patch: file, old text, new text."""
    file, old, new = patch
    return Mutant(name, "forward", ((file, old, new),), (cases,), head_dim)


def control(name: str, *patch: str) -> Mutant:
    """A patch that changes nothing that matters, under all cases."""
    file, old, new = patch
    return Mutant(name, "forward", ((file, old, new),), ALL_CASES, harmless=True)


ORDER = [
    mutant("no barrier after Q's and K's wait", FORWARD, NEGATE_Q + BARRIER, NEGATE_Q),
    mutant("no barrier after V's wait", FORWARD, BARRIER + LOAD_K, LOAD_K),
    mutant("no barrier before V is loaded again", FORWARD, BARRIER + LOAD_V, LOAD_V),
    mutant("no wait for V", FORWARD, WAIT + BARRIER + LOAD_K, BARRIER + LOAD_K),
    mutant("no wait for K", FORWARD, WAIT + BARRIER + LOAD_V, BARRIER + LOAD_V),
    mutant(
        "first wait one group too lax",
        FORWARD,
        "ptx::cp_async_wait<1>();",
        "ptx::cp_async_wait<2>();",
    ),
    mutant(
        "K prefetched into the block that is read",
        FORWARD,
        BARRIER + LOAD_K,
        LOAD_K + BARRIER,
    ),
    mutant(
        "V loaded over K",
        FORWARD,
        "v.template load_whole<Tile::kBytes>(target,",
        "v.template load_whole<0>(target,",
    ),
]

MASKS = [
    mutant(
        "right edge one key short",
        MASK,
        "clamp(shift + right + 1, seqlen_k)",
        "clamp(shift + right, seqlen_k)",
    ),
    mutant(
        "left edge one key short",
        MASK,
        "clamp(shift - left, kLongestSequence)",
        "clamp(shift - left + 1, kLongestSequence)",
        cases="masks",
    ),
    mutant(
        "every mask aligned top-left",
        MASK,
        "band.top_left ? 0 : int64_t{seqlen_k} - seqlen_q",
        "int64_t{0}",
    ),
    mutant(
        "every mask aligned bottom-right",
        MASK,
        "band.top_left ? 0 : int64_t{seqlen_k} - seqlen_q",
        "int64_t{seqlen_k} - seqlen_q",
        cases="masks",
    ),
    mutant(
        "blocks seen whole begin one early",
        MASK,
        ".full_begin = ceil_div(key_begin(last), block_k)",
        ".full_begin = key_begin(last) / block_k",
        cases="masks",
    ),
    mutant(
        "blocks seen whole end one late",
        MASK,
        ".full_end = max_of(key_end(q0), 0) / block_k",
        ".full_end = ceil_div(max_of(key_end(q0), 0), block_k)",
    ),
    mutant(
        "key range ends at the tile's first query",
        MASK,
        "ceil_div(max_of(key_end(last), 0), block_k)",
        "ceil_div(max_of(key_end(q0), 0), block_k)",
    ),
    mutant(
        "key range begins a block late",
        MASK,
        ".begin = first_key / block_k",
        ".begin = ceil_div(first_key, block_k)",
        cases="masks",
    ),
    mutant(
        "keys past the end unmasked",
        EDGES,
        "min(end + row, keys) - k0",
        "end + row - k0",
    ),
    mutant(
        "right edge ignores fragment rows 8 to 15",
        EDGES,
        "min(end + row, keys)",
        "min(end + row / 16 * 16, keys)",
    ),
    mutant(
        "left edge ignores fragment rows 8 to 15",
        EDGES,
        "begin + row - k0",
        "begin + row / 16 * 16 - k0",
        cases="masks",
    ),
    mutant(
        "left edge not applied",
        EDGES,
        "if (block < range.full_begin) {",
        "if (false) {",
        cases="masks",
    ),
    mutant(
        "rows without keys not cleared",
        FINISH,
        "if (empty) clear_row(o, m, half, factors.of[m][half]);",
        "",
    ),
]

ROWS = [
    mutant(
        "one row of keys too many",
        FORWARD,
        "const int keys = work.sequence.seqlen_k - block * kKeys;",
        "const int keys = work.sequence.seqlen_k - block * kKeys + 1;",
    ),
    mutant(
        "one row of out too many",
        "tile/epilogue.cuh",
        "if (row >= rows.count) continue;",
        "if (row > rows.count) continue;",
    ),
    mutant(
        "unused rows not written",
        FORWARD,
        "{first, out.stride_seq, work.owned, params.out}",
        "{first, out.stride_seq, work.rows, params.out}",
        cases="used rows",
    ),
    mutant(
        "unused rows not cleared",
        FINISH,
        "query >= sequence.seqlen_q || mask.sees_no_key(query)",
        "mask.sees_no_key(query)",
        cases="used rows",
    ),
    mutant(
        "rows of no sequence not written",
        WORK,
        "index + 1 == batch ? rows : end",
        "end",
        cases="used rows",
    ),
    mutant(
        "rows in use ignored",
        WORK,
        "if (seqused != nullptr) end =",
        "if (false) end =",
        cases="used rows",
    ),
    mutant(
        "slots of sequences collide", WORK, "return row / block + index;", "return row / block;"
    ),
    mutant(
        "wrong key head of a group",
        WORK,
        KV_HEAD,
        "head % static_cast<int>(problem.num_heads_kv)",
    ),
    mutant(
        "a row's last chunk of 16 bytes and one more",
        LOAD,
        "copy(target.at(pass, chunk) + kTileBytes, source + step, step);",
        "copy(target.at(pass, chunk) + kTileBytes, source + step, step - kChunkStep);",
        cases="row formats",
    ),
    mutant(
        "narrow copies past the row's end",
        LOAD,
        "row + step, bytes - step, unit);",
        "row + step, bytes, unit);",
        cases="row formats",
    ),
    mutant(
        "odd head dim: the last pair read whole",
        FORMAT,
        "4 * i + 2 < bytes ? elements[2 * i + 1] : 0u",
        "4 * i < bytes ? elements[2 * i + 1] : 0u",
        cases="row formats",
    ),
    mutant(
        "copies of 4 bytes go one too far",
        FORMAT,
        "global + i, i < bytes);",
        "global + i, i <= bytes);",
        cases="row formats",
    ),
    mutant(
        "odd head dim: one element of out too many",
        FORMAT,
        "if (2 * i < bytes) elements[i]",
        "if (2 * i <= bytes) elements[i]",
        cases="row formats",
    ),
]

SCORES = [
    mutant("O not rescaled", SOFTMAX, "o.d[m][n][2 * half] *= factor;", ""),
    mutant("row sum not rescaled", SOFTMAX, "sum[m][half] *= factor;", ""),
    mutant(
        "row sum over two lanes of four",
        SOFTMAX,
        "return x + __shfl_xor_sync(0xffffffffu, x, 2);",
        "return x;",
    ),
    mutant(
        "row maximum over two lanes of four",
        SOFTMAX,
        "row_top = fmaxf(row_top, __shfl_xor_sync(0xffffffffu, row_top, 2));",
        "",
    ),
    mutant("LSE in base 2", SOFTMAX, ".value(scale_log2) * kLn2", ".value(scale_log2)"),
    mutant(
        "huge scores not shifted",
        SOFTMAX,
        "fabsf(top[m][half] * scale_log2) > kLargestOffset",
        "false",
        cases="values",
    ),
    mutant(
        "LSE of huge scores without the shift",
        SOFTMAX,
        "log_sum(m, half, whole_sum).value(scale_log2) * kLn2",
        "log_sum(m, half, whole_sum).near * kLn2",
        cases="values",
    ),
    mutant(
        "shift subtracted from every other column",
        SOFTMAX,
        "s.d[m][n][2 * half + 1] -= shift;",
        "",
        cases="values",
    ),
    mutant(
        "old sums not brought to a new shift",
        SOFTMAX,
        "exponent = fmaf(before - shift, scale_log2, raised - offset[m][half]);",
        "exponent = raised - offset[m][half];",
        cases="values",
    ),
    mutant(
        "negative scale taken for positive",
        FORWARD,
        "if (params.negate_q) negate(q_target);",
        "",
        cases="values",
    ),
]

LAYOUT = [
    mutant(
        "swizzle added instead of XORed",
        TILE,
        "base[i] = first ^ (i * 2 * kChunkBytes);",
        "base[i] = first + (i * 2 * kChunkBytes);",
    ),
    Mutant(
        "fragment registers 1 and 2 swapped",
        "forward",
        (
            (
                "tile/accumulator.cuh",
                "a[1] = ptx::pack<T>(x.d[m][2 * k][2]",
                "a[2] = ptx::pack<T>(x.d[m][2 * k][2]",
            ),
            (
                "tile/accumulator.cuh",
                "a[2] = ptx::pack<T>(x.d[m][2 * k + 1][0]",
                "a[1] = ptx::pack<T>(x.d[m][2 * k + 1][0]",
            ),
        ),
    ),
    mutant(
        "V not transposed",
        "tile/product_sm80.cuh",
        "ptx::ldmatrix_x4_trans(b_kn, b.at(16 * k, n, b_bytes));",
        "ptx::ldmatrix_x4(b_kn, b.at(16 * k, n, b_bytes));",
    ),
    mutant(
        "panels of a tile read twice",
        TILE,
        "column_block / kBlocks * Tile::kPanelBytes",
        "column_block / kBlocks / 2 * Tile::kPanelBytes",
        head_dim=256,
    ),
    mutant(
        "third panel of a tile not filled",
        LOAD,
        "base[chunk % kPerPanel] + chunk / kPerPanel * Tile::kPanelBytes",
        "base[chunk % kPerPanel] + chunk / kPerPanel % 2 * Tile::kPanelBytes",
        head_dim=192,
    ),
]

CONTROLS = [
    control("control: one barrier more", FORWARD, BARRIER + LOAD_K, BARRIER + BARRIER + LOAD_K),
    control(
        "control: rescale at every block",
        SOFTMAX,
        "inline constexpr float kSlack = 8.0f;",
        "inline constexpr float kSlack = 0.0f;",
    ),
    control(
        "control: first queries first",
        WORK,
        "const int slot = blocks - 1 - index % blocks;",
        "const int slot = index % blocks;",
    ),
]

FORWARD_MUTANTS = ORDER + MASKS + ROWS + SCORES + LAYOUT + CONTROLS
