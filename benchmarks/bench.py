"""What `make bench` runs: flashtile against torch's scaled_dot_product_attention, in one process.

Every case times all contenders in turn (A B A B ...) on the same numbers, on one thread unless
told otherwise. Writes results.json and results.md under benchmarks/results/<machine kind>/ (with
--kind: <machine kind>-<kind>/) when all is done, or with --lines each case to a file as it is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

# Before torch loads: idle OpenMP threads must not burn the processor time that is measured.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import bench_cases
import bench_report
import bench_scores
import torch
from bench_cases import OURS, Case
from bench_timing import DRY_RUN, NO_TIME, Result, peak_memory, time_case, untimed

MEMORY_LENGTHS = {False: (2048, 8192), True: (2048, 4096, 8192, 16384)}
HERE = Path(__file__).resolve().parent


def main() -> int:
    """Runs the chosen cases, prints the tables and writes them."""
    options = _parser().parse_args()
    if options.peak_memory:  # the child process of _memory_rows
        torch.set_num_threads(options.threads)
        case, name = json.loads(options.peak_memory)
        print(peak_memory(Case(**case), name))
        return 0

    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    cases = [case for case in _all_cases(device, options) if _selected(case, options)]
    if options.tokens:
        cases.sort(key=lambda case: options.tokens.index(case.seqlen_k))
    if not cases:
        filters = "--dtype, --pass, --kind, --score and --tokens"
        print(f"no case is left; see {filters}", file=sys.stderr)
        return 2
    seconds = options.seconds or (4.0 if options.full else 1.5)
    if device.type == "cuda":
        seconds = options.seconds or 0.5
    facts = bench_report.machine_facts(device)
    results = []
    for result in _results(cases, device, options, seconds):
        results.append(result)
        if options.lines:
            with options.lines.open("a") as lines:
                lines.write(json.dumps(bench_report.to_row(result)) + "\n")
            print(bench_report.to_line(result), flush=True)
    if options.lines:
        return 0
    memory = []
    without = options.no_memory or options.dry_run or options.kind == ["scores"]
    if device.type == "cpu" and not without:
        memory = _memory_rows(options.full, options.threads)

    name = "-".join([bench_report.machine_kind(facts), *(options.kind or [])])
    folder = options.output or HERE / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    markdown = bench_report.to_markdown(facts, results, memory)
    (folder / "results.json").write_text(bench_report.to_json(facts, results, memory) + "\n")
    (folder / "results.md").write_text(markdown)
    print(markdown)
    print(f"written to {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--full", action="store_true", help="more shapes, float64, more rounds")
    parser.add_argument("--seconds", type=float, help="per case; default 1.5, with --full 4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", help="only this one, for example bfloat16")
    parser.add_argument("--pass", dest="direction", choices=("forward", "backward"))
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=("dense", "decode", "prefill", "features", "scores"),
        help="only these; scores on a CPU and on request alone",
    )
    parser.add_argument(
        "--score",
        nargs="+",
        choices=sorted({score.partition(" ")[0] for score in bench_cases.SCORES}),
        help="of the kind scores only these",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="only cases of so many keys, those of the first number first",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="leave out the cases that are not begun by then",
    )
    parser.add_argument("--dry-run", action="store_true", help="time nothing, name every case")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--output", type=Path, help="folder of the two result files")
    parser.add_argument(
        "--lines",
        type=Path,
        metavar="FILE",
        help="append every case to it as a line of JSON when it is done; no tables, nothing else",
    )
    parser.add_argument("--peak-memory", help=argparse.SUPPRESS)
    return parser


def _all_cases(device: torch.device, options: argparse.Namespace) -> list[Case]:
    if device.type == "cuda":
        return bench_cases.cuda_cases(options.full)
    wanted = options.kind is not None and "scores" in options.kind
    return bench_cases.cpu_cases(options.full) + (bench_scores.score_cases() if wanted else [])


def _selected(case: Case, options: argparse.Namespace) -> bool:
    return (
        options.dtype in (None, case.dtype)
        and options.direction in (None, case.direction)
        and (options.kind is None or case.kind in options.kind)
        and (options.score is None or case.score.partition(" ")[0] in options.score)
        and (options.tokens is None or case.seqlen_k in options.tokens)
    )


def _results(
    cases: list[Case], device: torch.device, options: argparse.Namespace, seconds: float
) -> Iterable[Result]:
    end = time.monotonic() + options.time_limit
    for case in cases if options.lines else _progress(cases, "timing"):
        if options.dry_run:
            yield untimed(case, device, DRY_RUN)
        elif time.monotonic() > end:
            yield untimed(case, device, NO_TIME)
        else:
            yield time_case(case, device, seconds)


def _memory_rows(full: bool, threads: int) -> list[bench_report.Memory]:
    """Forward and backward together, each contender in a process of its own."""
    cases = [
        Case(dtype, 8, 8, length, length, 64, True, "backward")
        for dtype in ("float32", "bfloat16")
        for length in MEMORY_LENGTHS[full]
    ]
    rows = []
    for case in _progress(cases, "memory"):
        peaks = {}
        for name in (OURS, "sdpa"):
            argument = json.dumps([dataclasses.asdict(case), name])
            command = [sys.executable, __file__, "--peak-memory", argument]
            command += ["--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name] = int(done.stdout)
        rows.append(bench_report.Memory(case.label, case.dtype, "forward + backward", peaks))
    return rows


def _progress(cases: list[Case], title: str) -> Iterable[Case]:
    try:
        from tqdm import tqdm  # noqa: PLC0415, a comfort
    except ImportError:
        return cases
    bar: Iterable[Case] = tqdm(cases, title)
    return bar


if __name__ == "__main__":
    sys.exit(main())
