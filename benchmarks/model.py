"""A performance model of the kernels: what a GPU would make of their machine code.

    make model                                   every GPU, forward and backward, several lengths
    python benchmarks/model.py --gpu H200 --seqlen 16384 --head-dim 128

For one tile of scores (block_q x block_k) a multiprocessor needs tensor-core, exponential, issue,
shared-memory and, in the backward, reduction time. The longest of them is the floor; the others
overlap with it but for a share OVERLAP_LOSS, which was fitted to published measurements of
FlashAttention-2 and -3 (the last table compares). Where wgmma kernels add dQ to memory out of
registers, the warps that compute are HELD_UP for a share of that time. Tiles are then dealt out,
longest first, to the blocks that fit on the GPU: what this leaves idle is wave quantisation, what a
mask cuts from tiles is causal efficiency. The time of global memory is a floor of the whole. A
ranking with an error of 10 to 20 percent, not a promise; measured results (results/ of that GPU)
are printed beside it where there are any.

mma.sync kernels come from the report on their machine code (sass_report.py --json); wgmma tiles
that are candidates have the counts of trial kernels written down in WGMMA.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE.parent / "build"

OVERLAP_LOSS = 0.17
# A backward of d256 that adds dQ out of registers reaches 471 TFLOP/s on an H200, 747 with these
# additions compiled out (Dao-AILab/flash-attention #2889): 1980 of 4096 clocks a tile.
HELD_UP = 0.48
EDGE_TILES = 1.5  # prologue and epilogue of a row of tiles, in tiles
CLOCKS_PER_EXP = 1 / 16  # of a multiprocessor
ISSUES_PER_CLOCK = 4
SHARED_BYTES_PER_CLOCK = 128


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Peak numbers of data sheets; `tflops` is what large matrix products reach where that is known
    (H100, H200: limited by power), else the peak at the boost clock."""

    name: str
    architecture: str
    multiprocessors: int
    flops_per_clock: int  # of a multiprocessor's tensor cores: bf16, fp32 sums
    mma_sync_share: float  # of that rate, by mma.sync
    tflops: float
    memory_tbps: float
    reduction_bytes_per_clock: float  # fp32 additions to the L2 cache, of a multiprocessor

    @property
    def clock(self) -> float:
        """GHz while the tensor cores work at `tflops`."""
        return self.tflops * 1e3 / (self.multiprocessors * self.flops_per_clock)


GPUS = (
    Gpu("H200", "sm_90", 132, 4096, 0.62, 788, 4.8, 16),
    Gpu("H100", "sm_90", 132, 4096, 0.62, 788, 3.35, 16),
    Gpu("A100", "sm_80", 108, 2048, 1.0, 312, 2.0, 16),
    Gpu("L40S", "sm_89", 142, 1024, 1.0, 366, 0.86, 16),
    Gpu("RTX 4090", "sm_89", 128, 512, 1.0, 165, 1.01, 16),
)


@dataclasses.dataclass(frozen=True)
class Form:
    """A kernel: its tile and what each unit works for it, in clocks of a multiprocessor."""

    name: str
    kernel_pass: str
    head_dim: int
    block_q: int
    block_k: int
    blocks_per_sm: int
    exp: float
    issue: float
    shared: float
    reduced_bytes: float = 0.0  # dQ
    wgmma: bool = False
    red_v4: bool = False  # dQ is added by the warps that compute

    def units(self, gpu: Gpu) -> dict[str, float]:
        products = 4 if self.kernel_pass == "forward" else 10
        flops = products * self.block_q * self.block_k * self.head_dim
        rate = gpu.flops_per_clock * (1 if self.wgmma else gpu.mma_sync_share)
        return {
            "tensor": flops / rate,
            "exp": self.exp,
            "issue": self.issue,
            "shared": self.shared,
            "dQ": self.reduced_bytes / gpu.reduction_bytes_per_clock,
        }


def wgmma_form(
    kernel_pass: str,
    head_dim: int,
    tile: tuple[int, int],
    instructions: int,
    shared: float,
    dq: str = "",
) -> Form:
    """`instructions` per thread and tile on the clean path; a warpgroup for every 64 rows (keys in
    the backward), or two for what is split by product. `dq`: "bulk" or "red.v4"."""
    block_q, block_k = tile
    rows = block_q if kernel_pass == "forward" else 128
    warps = rows // 16
    return Form(
        name=f"{kernel_pass} d{head_dim} {block_q} x {block_k} wgmma {dq}".rstrip(),
        kernel_pass=kernel_pass,
        head_dim=head_dim,
        block_q=block_q,
        block_k=block_k,
        blocks_per_sm=1,
        exp=block_q * block_k * CLOCKS_PER_EXP,
        issue=instructions * warps / ISSUES_PER_CLOCK,
        shared=shared,
        reduced_bytes=0 if kernel_pass == "forward" else 4 * block_q * head_dim,
        wgmma=True,
        red_v4=dq == "red.v4",
    )


# Instructions per thread and shared-memory clocks per tile, of trial kernels (nvcc 13.0); with bulk
# reductions dQ passes through shared memory once more, out and in.
WGMMA = (
    wgmma_form("forward", 64, (192, 128), 378, 1216),
    wgmma_form("forward", 64, (128, 192), 536, 1280),
    wgmma_form("forward", 128, (128, 128), 391, 1792),
    wgmma_form("forward", 128, (128, 176), 518, 2368),
    wgmma_form("forward", 256, (128, 80), 326, 2432),
    wgmma_form("backward", 64, (128, 128), 522, 2816, "bulk"),
    wgmma_form("backward", 64, (128, 128), 518, 2304, "red.v4"),
    wgmma_form("backward", 128, (64, 128), 347, 2944, "bulk"),
    wgmma_form("backward", 128, (64, 128), 346, 2432, "red.v4"),
    wgmma_form("backward", 128, (80, 128), 431, 3488, "bulk"),
    wgmma_form("backward", 128, (80, 128), 444, 2848, "red.v4"),
    wgmma_form("backward", 192, (64, 64), 242, 2816, "bulk"),
    wgmma_form("backward", 192, (64, 64), 241, 2048, "red.v4"),
    wgmma_form("backward", 256, (64, 80), 373, 3776, "red.v4"),
    wgmma_form("backward", 256, (64, 64), 269, 2624, "red.v4"),
)


def read_mma_sync(path: pathlib.Path) -> dict[str, list[Form]]:
    """By architecture, from sass_report.py --json."""
    forms: dict[str, list[Form]] = {}
    for row in json.loads(path.read_text()):
        plan = re.fullmatch(r"(\d+) x (\d+), \d+, (\d+)", row["plan"])
        name = re.fullmatch(r"(forward|backward) d(\d+) (large|small)", row["name"])
        if plan is None or name is None or "bf16" not in row["dtypes"]:
            continue
        if (name[3] == "small") != (row["architecture"] == "sm_89"):
            continue  # compiled for it, not chosen there
        block_q, block_k, blocks = map(int, plan.groups())
        head_dim = int(name[2])
        products = 4 if name[1] == "forward" else 10
        # The report's percentages are of the tensor cores' time of these.
        per_clock = {"sm_80": 2048, "sm_89": 1024, "sm_90": 4096}[row["architecture"]]
        tensor = products * block_q * block_k * head_dim / per_clock
        form = Form(
            name=f"{row['name']} {block_q} x {block_k}",
            kernel_pass=name[1],
            head_dim=head_dim,
            block_q=block_q,
            block_k=block_k,
            blocks_per_sm=blocks,
            exp=tensor * row["exp_percent"] / 100,
            issue=tensor * row["issue_percent"] / 100,
            shared=tensor * row["shared_percent"] / 100,
            reduced_bytes=0 if name[1] == "forward" else 4 * block_q * head_dim,
        )
        forms.setdefault(row["architecture"], []).append(form)
    return forms


@dataclasses.dataclass(frozen=True)
class Work:
    """Equal lengths of queries and keys, a head of keys for every `group` heads of queries."""

    batch: int
    heads: int
    group: int
    seqlen: int
    causal: bool

    def flops(self, form: Form) -> float:
        products = 4 if form.kernel_pass == "forward" else 10
        scores = self.batch * self.heads * self.seqlen * self.seqlen
        return products * scores * form.head_dim / (2 if self.causal else 1)

    def global_bytes(self, form: Form) -> float:
        rows = self.batch * self.seqlen
        query = rows * self.heads * form.head_dim
        key = query / self.group
        if form.kernel_pass == "forward":
            return 2 * (2 * query + 2 * key)
        return 2 * (4 * query + 4 * key) + 3 * 4 * query  # dq accumulates in fp32


def tile_clocks(form: Form, gpu: Gpu) -> float:
    units = form.units(gpu)
    held_up = HELD_UP * units.pop("dQ") if form.red_v4 else 0.0
    longest = max(units.values())
    clocks = longest + OVERLAP_LOSS * (sum(units.values()) - longest) + held_up
    return max(clocks, form.units(gpu)["dQ"])


def tiles_of_rows(form: Form, work: Work) -> list[int]:
    """Tiles of each thread block of one head: over queries in the forward, keys in the backward."""
    own, other = form.block_q, form.block_k
    if form.kernel_pass == "backward":
        own, other = other, own
    rows = []
    for first in range(0, work.seqlen, own):
        all_tiles = -(-work.seqlen // other)
        if not work.causal:
            rows.append(all_tiles)
        elif form.kernel_pass == "forward":
            rows.append(-(-min(first + own, work.seqlen) // other))
        else:
            rows.append(all_tiles - first // other)
    return rows


def makespan(costs: list[float], workers: int) -> float:
    """Longest first, each to the worker that is free first."""
    free = [0.0] * min(workers, max(1, len(costs)))
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


@dataclasses.dataclass(frozen=True)
class Prediction:
    tflops: float
    limit: str  # the unit that takes longest
    balance: float  # of the multiprocessors' time, what has work


def predict(form: Form, gpu: Gpu, work: Work) -> Prediction:
    per_tile = tile_clocks(form, gpu)
    costs = [tiles + EDGE_TILES for tiles in tiles_of_rows(form, work)] * (work.batch * work.heads)
    if form.kernel_pass == "backward":  # a thread block takes all query heads of its key head
        costs = [work.group * cost for cost in costs[:: work.group]]
    # Blocks that share a multiprocessor share its units.
    workers = gpu.multiprocessors * form.blocks_per_sm
    span = makespan(costs, workers)
    seconds = span * per_tile * form.blocks_per_sm / (gpu.clock * 1e9)
    memory = work.global_bytes(form) / (gpu.memory_tbps * 1e12)
    units = form.units(gpu)
    limit = "memory" if memory > seconds else max(units, key=lambda unit: units[unit])
    return Prediction(
        tflops=work.flops(form) / max(seconds, memory) / 1e12,
        limit=limit,
        balance=sum(costs) / (span * workers),
    )


# (GPU, form of ours with the same tile, causal, TFLOP/s published, whose): 16k tokens, 2048 hidden.
PUBLISHED = (
    ("H100", "forward d64 192 x 128 wgmma", False, 497, "FlashAttention-3"),
    ("H100", "forward d64 192 x 128 wgmma", True, 473, "FlashAttention-3"),
    ("H100", "forward d128 128 x 176 wgmma", False, 648, "FlashAttention-3"),
    ("H100", "forward d128 128 x 128 wgmma", True, 616, "FlashAttention-3"),
    ("H100", "forward d256 128 x 80 wgmma", False, 756, "FlashAttention-3"),
    ("H100", "forward d256 128 x 80 wgmma", True, 642, "FlashAttention-3"),
    ("H100", "backward d64 128 x 128 wgmma bulk", False, 474, "FlashAttention-3"),
    ("H100", "backward d128 80 x 128 wgmma bulk", False, 561, "FlashAttention-3"),
    ("H200", "backward d256 64 x 80 wgmma red.v4", False, 480, "FlashAttention-3"),
)


def measured(gpu: Gpu) -> dict[tuple[str, int, int, bool], float]:
    """TFLOP/s by (pass, head_dim, seqlen, causal), from the results kept for this GPU."""
    found: dict[tuple[str, int, int, bool], float] = {}
    for path in (HERE / "results").glob(f"*{gpu.name.lower().replace(' ', '-')}*/*.json"):
        report = json.loads(path.read_text())
        for case in (report.get("benchmark") or report)["cases"]:
            if case["dtype"] != "bfloat16" or case["window"] or case["lengths"]:
                continue
            seconds = case["contenders"]["flashtile"]["wall_median"]
            if seconds is None:  # not timed
                continue
            key = (case["direction"], case["head_dim"], case["seqlen_q"], case["causal"])
            found[key] = case["flops"] / seconds / 1e12
    return found


def print_table(title: str, header: list[str], lines: list[list[object]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for line in lines:
        print(f"| {' | '.join('-' if x is None else str(x) for x in line)} |")


def work_of(head_dim: int, seqlen: int, causal: bool) -> Work:
    """16384 tokens, 2048 hidden: what published figures use."""
    return Work(max(1, 16384 // seqlen), max(1, 2048 // head_dim), 1, seqlen, causal)


def forms_on(gpu: Gpu, mma_sync: dict[str, list[Form]]) -> list[Form]:
    wide = list(WGMMA) if gpu.architecture == "sm_90" else []
    return wide + mma_sync.get(gpu.architecture, [])


def print_gpu(gpu: Gpu, forms: list[Form], seqlens: list[int]) -> None:
    results = measured(gpu)
    lines: list[list[object]] = []
    for form in sorted(forms, key=lambda f: (f.kernel_pass != "forward", f.head_dim, f.name)):
        for causal in (False, True):
            cells: list[object] = []
            for seqlen in seqlens:
                one = predict(form, gpu, work_of(form.head_dim, seqlen, causal))
                got = results.get((form.kernel_pass, form.head_dim, seqlen, causal))
                cells.append(f"{one.tflops:.0f}" + (f" ({got:.0f})" if got else ""))
            last = predict(form, gpu, work_of(form.head_dim, seqlens[-1], causal))
            lines.append([form.name, "causal" if causal else "full", *cells, last.limit])
    title = f"{gpu.name}: TFLOP/s by seqlen (measured); peak {gpu.tflops:.0f}"
    print_table(title, ["kernel", "mask", *map(str, seqlens), "limit"], lines)


def print_published() -> None:
    gpus = {gpu.name: gpu for gpu in GPUS}
    forms = {form.name: form for form in WGMMA}
    lines: list[list[object]] = []
    for gpu, form, causal, tflops, whose in PUBLISHED:
        one = predict(forms[form], gpus[gpu], work_of(forms[form].head_dim, 16384, causal)).tflops
        mask = "causal" if causal else "full"
        lines.append([gpu, form, mask, f"{one:.0f}", tflops, f"{one / tflops:.2f}", whose])
    header = ["GPU", "tile", "mask", "model", "published", "model / published", "of"]
    print_table("The model against published measurements, 16k", header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], help="only this one")
    parser.add_argument("--seqlen", type=int, action="append", help="default 512 to 16384")
    parser.add_argument("--head-dim", type=int, help="only this one")
    parser.add_argument(
        "--sass",
        type=pathlib.Path,
        default=BUILD / "sass_report.json",
        help="what sass_report.py --json wrote",
    )
    arguments = parser.parse_args()
    if not arguments.sass.exists():
        print(f"{arguments.sass} is missing: run `make model`", file=sys.stderr)
        return 1
    mma_sync = read_mma_sync(arguments.sass)
    for gpu in GPUS:
        if arguments.gpu in (None, gpu.name):
            forms = forms_on(gpu, mma_sync)
            forms = [f for f in forms if arguments.head_dim in (None, f.head_dim)]
            print_gpu(gpu, forms, arguments.seqlen or [512, 2048, 8192, 16384])
    print_published()
    return 0


if __name__ == "__main__":
    sys.exit(main())
