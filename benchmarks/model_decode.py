"""What decoding over a key/value cache costs a GPU, by its machine code: which unit is the slowest.

    make model                                     after the tables of model.py
    python benchmarks/model_decode.py --gpu H200

Every key and value is read once, so the time of memory is a floor: KV bytes / (MEMORY_SHARE *
bandwidth). Beside it stand the clocks in which a multiprocessor issues the instructions of a step
of 64 keys (its four warps, from sass_report.py --json) and those of shared memory. While both are
below what memory takes for the same bytes, a form with fewer instructions, TMA loads say, would
end no earlier. Memory is busy when enough is under way (Little's law): LATENCY * bandwidth, of
which each multiprocessor has the copies that its thread blocks have ordered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import sys

from model import BUILD, GPUS, Gpu, print_table

STEP = 64  # keys
WARPS = 4
ISSUES_PER_CLOCK = 4
MEMORY_SHARE = 0.9  # of the data sheet's bandwidth: what a copy reaches
LATENCY = 0.8e-6  # seconds, of global memory under load
# Slots of a ring, each K or V of a step, and thread blocks of a multiprocessor: decode_config.
RINGS = {
    "large": {32: (7, 3), 64: (7, 2), 96: (5, 2), 128: (5, 2), 192: (5, 1), 256: (5, 1)},
    "small": {32: (7, 3), 64: (5, 2), 96: (3, 2), 128: (3, 2), 192: (3, 1), 256: (3, 1)},
}


@dataclasses.dataclass(frozen=True)
class Decode:
    """The loop of one slice, a step of 64 keys."""

    head_dim: int
    memory: str  # class of shared memory
    instructions: int  # of a warp
    ldmatrix: int

    @property
    def step_bytes(self) -> int:
        return 2 * 2 * STEP * self.head_dim  # K and V, 16 bits

    @property
    def issue_clocks(self) -> float:
        return self.instructions * WARPS / ISSUES_PER_CLOCK

    @property
    def shared_clocks(self) -> float:
        """The copies in, and ldmatrix.x4 (512 bytes) out; 128 bytes a clock."""
        return (self.step_bytes + self.ldmatrix * WARPS * 512) / 128

    @property
    def bytes_under_way(self) -> int:
        """Of a multiprocessor: all slots but the one that is read."""
        slots, blocks = RINGS[self.memory][self.head_dim]
        return blocks * (slots - 1) * self.step_bytes // 2


def bytes_per_clock(gpu: Gpu) -> float:
    """Of global memory, for each multiprocessor."""
    return MEMORY_SHARE * gpu.memory_tbps * 1e3 / (gpu.multiprocessors * gpu.clock)


def needed_under_way(gpu: Gpu) -> float:
    """Bytes that each multiprocessor has to have ordered for memory to be busy."""
    return LATENCY * MEMORY_SHARE * gpu.memory_tbps * 1e12 / gpu.multiprocessors


def busiest_share(form: Decode, gpu: Gpu) -> float:
    """Clocks of the slowest unit of a multiprocessor, of those that memory takes."""
    memory = form.step_bytes / bytes_per_clock(gpu)
    return max(form.issue_clocks, form.shared_clocks) / memory


def read_decode(path: pathlib.Path, architecture: str) -> list[Decode]:
    """The slices that run on an architecture, ascending."""
    memory = "small" if architecture == "sm_89" else "large"
    forms = []
    for row in json.loads(path.read_text()):
        name = re.fullmatch(r"decode d(\d+) (large|small)", row["name"])
        if name is None or row["architecture"] != architecture or name[2] != memory:
            continue
        classes = row["classes"]
        forms.append(Decode(int(name[1]), memory, row["instructions"], classes["ldmatrix"]))
    return sorted(forms, key=lambda form: form.head_dim)


def kv_microseconds(gpu: Gpu, batch: int, seqlen: int) -> float:
    """To read the caches of 8 key/value heads of 128, 16 bits."""
    kv = batch * seqlen * 8 * 128 * 2 * 2
    return kv / (MEMORY_SHARE * gpu.memory_tbps * 1e6)


def print_gpu(gpu: Gpu, forms: list[Decode]) -> None:
    lines: list[list[object]] = []
    for form in forms:
        memory = form.step_bytes / bytes_per_clock(gpu)
        share = busiest_share(form, gpu)
        lines.append(
            [
                f"decode d{form.head_dim}",
                f"{memory:.0f}",
                f"{form.issue_clocks:.0f}",
                f"{form.shared_clocks:.0f}",
                f"{form.bytes_under_way / 1024:.0f} of {needed_under_way(gpu) / 1024:.0f}",
                "memory" if share < 1 else "issue or shared memory",
            ]
        )
    title = f"{gpu.name}: decoding, clocks of a step of {STEP} keys on a multiprocessor"
    header = ["kernel", "memory", "issue", "shared memory", "KB under way of needed", "limit"]
    print_table(title, header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], help="only this one")
    parser.add_argument("--sass", type=pathlib.Path, default=BUILD / "sass_report.json")
    arguments = parser.parse_args()
    if not arguments.sass.exists():
        print(f"{arguments.sass} is missing: run `make model`", file=sys.stderr)
        return 1
    gpus = [gpu for gpu in GPUS if arguments.gpu in (None, gpu.name)]
    for gpu in gpus:
        print_gpu(gpu, read_decode(arguments.sass, gpu.architecture))
    works = [(1, 1024), (1, 32768), (32, 4096), (256, 4096)]
    lines: list[list[object]] = [
        [gpu.name, *(f"{kv_microseconds(gpu, *work):.1f}" for work in works)] for gpu in gpus
    ]
    header = ["GPU", *(f"{batch} x {seqlen}" for batch, seqlen in works)]
    print_table("Microseconds of memory for 8 key/value heads of 128", header, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
