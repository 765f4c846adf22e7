"""The mutants: small mistakes that somebody could make in the kernels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A patch of kernel/ (file, old text, new text) and the slice in which it shows."""

    name: str
    kernel: str  # "forward" or "backward"
    patches: list[tuple[str, str, str]]
    head_dim: int = 64
    harmless: bool = False


FORWARD = "forward_sm80.cuh"
SOFTMAX = "tile/softmax.cuh"
BACKWARD = "backward_sm80.cuh"
STORE = "backward_sm80_store.cuh"
DELTA = "backward_delta.cuh"

V_LANDED = "__syncthreads();  // V_j has landed; nobody reads K_j any more"
K_LANDED = "__syncthreads();  // K_{j-1} has landed; nobody reads V_j any more"
LOAD_K = "if (j > range.begin) stream.load_previous_k();"
KV_HEAD = (
    "work.head / (static_cast<int>(problem.num_heads) / static_cast<int>(problem.num_heads_kv))"
)
BLOCK_LANDED = (
    "__syncthreads();  // block i has landed; nobody reads block i - 1 or its dS any more"
)
DS_COMPLETE = "__syncthreads();  // dS of block i is complete"

MUTANTS = [
    # Order: waits and barriers.
    Mutant("no barrier after V's wait", "forward", [(FORWARD, V_LANDED, "")]),
    Mutant("no barrier before V is loaded again", "forward", [(FORWARD, K_LANDED, "")]),
    Mutant(
        "no wait for V",
        "forward",
        [(FORWARD, "ptx::cp_async_wait<0>(); " + V_LANDED, "__syncthreads();")],
    ),
    Mutant(
        "first wait one group too lax",
        "forward",
        [(FORWARD, "ptx::cp_async_wait<1>();", "ptx::cp_async_wait<2>();")],
    ),
    Mutant(
        "K prefetched into the block that is read",
        "forward",
        [(FORWARD, V_LANDED + " " + LOAD_K, LOAD_K + V_LANDED + "\n")],
    ),
    Mutant(
        "V loaded over K",
        "forward",
        [
            (
                FORWARD,
                "v.template load<kFromKToV>(target);",
                "v.template load<0>(target);",
            )
        ],
    ),
    # Masks and edges.
    Mutant(
        "causal edge one key short",
        "forward",
        [
            (
                "tile/mask.cuh",
                "return q - seqlen_q + seqlen_k + 1;",
                "return q - seqlen_q + seqlen_k;",
            )
        ],
    ),
    Mutant(
        "causal aligned top-left",
        "forward",
        [("tile/mask.cuh", "return q - seqlen_q + seqlen_k + 1;", "return q + 1;")],
    ),
    Mutant(
        "last block of keys unmasked",
        "forward",
        [
            (
                FORWARD,
                "if (range.is_edge(j)) apply_mask",
                "if (range.is_edge(j) && j + 1 < range.end) apply_mask",
            )
        ],
    ),
    Mutant(
        "mask ignores fragment rows 8 to 15",
        "forward",
        [
            (
                FORWARD,
                "const int query = q0 + accumulator_row(lane, m, 2 * half);",
                "const int query = q0 + accumulator_row(lane, m, 0);",
            )
        ],
    ),
    Mutant(
        "key range ends at the tile's first query",
        "forward",
        [
            (
                "tile/mask.cuh",
                "ceil_div(max_of(mask.key_end(last), 0), block_k)",
                "ceil_div(max_of(mask.key_end(q0), 0), block_k)",
            )
        ],
    ),
    Mutant(
        "one row of keys too many",
        "forward",
        [
            (
                FORWARD,
                "const int keys = work.sequence.seqlen_k - block * kKeys;",
                "const int keys = work.sequence.seqlen_k - block * kKeys + 1;",
            )
        ],
    ),
    Mutant(
        "one row of out too many",
        "forward",
        [("tile/epilogue.cuh", "if (row < rows) {", "if (row <= rows) {")],
    ),
    Mutant(
        "rows without keys not cleared",
        "forward",
        [(FORWARD, "if (empty) clear_row(o, m, half, factor[m][half]);", "")],
    ),
    # Softmax.
    Mutant("O not rescaled", "forward", [(SOFTMAX, "o.d[m][n][2 * half] *= factor;", "")]),
    Mutant("row sum not rescaled", "forward", [(SOFTMAX, "sum[m][half] *= factor;", "")]),
    Mutant(
        "row sum over two lanes of four",
        "forward",
        [(SOFTMAX, "return x + __shfl_xor_sync(0xffffffffu, x, 2);", "return x;")],
    ),
    Mutant(
        "row maximum over two lanes of four",
        "forward",
        [(SOFTMAX, "row_top = fmaxf(row_top, __shfl_xor_sync(0xffffffffu, row_top, 2));", "")],
    ),
    Mutant(
        "LSE in base 2",
        "forward",
        [
            (
                SOFTMAX,
                "(__log2f(whole_sum) - offset[m][half]) * kLn2",
                "(__log2f(whole_sum) - offset[m][half])",
            )
        ],
    ),
    # Layout.
    Mutant(
        "swizzle added instead of XORed",
        "forward",
        [
            (
                "tile/smem_tile.cuh",
                "base[i] = first ^ (i * 2 * kChunkBytes);",
                "base[i] = first + (i * 2 * kChunkBytes);",
            )
        ],
    ),
    Mutant(
        "fragment registers 1 and 2 swapped",
        "forward",
        [
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
        ],
    ),
    Mutant(
        "V not transposed",
        "forward",
        [
            (
                "tile/product_sm80.cuh",
                "ptx::ldmatrix_x4_trans(b_kn, b.at(16 * k, n));",
                "ptx::ldmatrix_x4(b_kn, b.at(16 * k, n));",
            )
        ],
    ),
    Mutant(
        "wrong key head of a group",
        "forward",
        [
            (
                FORWARD,
                KV_HEAD,
                "work.head % static_cast<int>(problem.num_heads_kv)",
            )
        ],
    ),
    # Backward.
    Mutant("no barrier after a block's wait", "backward", [(BACKWARD, BLOCK_LANDED, "")]),
    Mutant("no barrier after dS is stored", "backward", [(BACKWARD, DS_COMPLETE, "")]),
    Mutant(
        "no wait for Q and dO",
        "backward",
        [(BACKWARD, "ptx::cp_async_wait<0>(); " + BLOCK_LANDED, "__syncthreads();")],
    ),
    Mutant(
        "stages not swapped",
        "backward",
        [(BACKWARD, "stage.flip(loader.fill);", "if (i == range.begin) stage.flip(loader.fill);")],
    ),
    Mutant(
        "delta missing",
        "backward",
        [
            (
                DELTA,
                "float delta = sum_over_lanes(sum);",
                "float delta = 0.0f * sum_over_lanes(sum);",
            )
        ],
    ),
    Mutant(
        "dLSE with the wrong sign",
        "backward",
        [(DELTA, "delta -= *row_pointer(p.dlse,", "delta += *row_pointer(p.dlse,")],
    ),
    Mutant(
        "dQ not scaled",
        "backward",
        [
            (
                "backward_dq.cuh",
                "const float scale = p.problem.softmax_scale;",
                "const float scale = 1.0f;",
            )
        ],
    ),
    Mutant(
        "dQ added to the wrong block",
        "backward",
        [(BACKWARD, "dq += Slot::kDq;", "dq += i % 2 == 0 ? Slot::kDq : 0;")],
    ),
    Mutant(
        "dQ not cleared",
        "backward",
        [(DELTA, "clear_dq(launch.dq_accumulator + tile * Slot::kDq, thread);", "")],
    ),
    Mutant(
        "causal edge shifted in the backward",
        "backward",
        [
            (
                BACKWARD,
                "(causal ? block.row0 + key + shift : -(1 << 30))",
                "(causal ? block.row0 + key + shift + 1 : -(1 << 30))",
            )
        ],
    ),
    Mutant(
        "query range starts a block late",
        "backward",
        [
            (
                BACKWARD,
                "min(max(k0 + shift, 0) / block_q, range.end)",
                "min((max(k0 + shift, 0) + block_q - 1) / block_q, range.end)",
            )
        ],
    ),
    Mutant(
        "only the first head of a group",
        "backward",
        [
            (
                BACKWARD,
                "const int head = block.head * group + g;",
                "const int head = block.head * group;",
            )
        ],
    ),
    Mutant(
        "partner's half of dK not added",
        "backward",
        [(STORE, "add_registers(dk, other, lane);", "")],
    ),
    Mutant(
        "one row of dK and dV too many",
        "backward",
        [
            (
                STORE,
                "if (Copy::row(thread) + row < block.rows)",
                "if (Copy::row(thread) + row <= block.rows)",
            )
        ],
    ),
    Mutant(
        "no barrier between partner warps",
        "backward",
        [(BACKWARD, "share_scores();  // P^T of the warp's keys is complete", "")],
        head_dim=128,
    ),
    Mutant(
        "partner's queries read from the wrong half",
        "backward",
        [(BACKWARD, "(1 - warp.query) * kQueries / 8", "warp.query * kQueries / 8")],
        head_dim=128,
    ),
    # Controls.
    Mutant(
        "control: one barrier more",
        "forward",
        [(FORWARD, V_LANDED, "__syncthreads(); __syncthreads();")],
        harmless=True,
    ),
    Mutant(
        "control: rescale at every block",
        "forward",
        [
            (
                SOFTMAX,
                "inline constexpr float kSlack = 8.0f;",
                "inline constexpr float kSlack = 0.0f;",
            )
        ],
        harmless=True,
    ),
    Mutant(
        "control: one barrier more in the backward",
        "backward",
        [(BACKWARD, DS_COMPLETE, "__syncthreads(); __syncthreads();")],
        harmless=True,
    ),
]
