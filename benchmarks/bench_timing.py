"""Interleaved timing (A B C A B C ...) on CPU and CUDA, and the peak memory of a CPU call."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_cases import OURS, Case
from bench_runs import Run, contenders, make_runs

MIN_ROUNDS, MAX_ROUNDS = 3, 200
L2_FLUSH_BYTES = 512 * 2**20  # beyond every L2; also hides the launch cost of what follows
NO_TIME = "no time left"
DRY_RUN = "dry run"
NOT_TIMED = (NO_TIME, DRY_RUN)  # of a case, for all contenders


@dataclasses.dataclass
class Timing:
    """Seconds of every round of one contender; CUDA has device time only, so cpu stays empty."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(
        default_factory=list
    )  # of the process, on a CPU with one thread

    @property
    def compared(self) -> list[float]:
        """What ratios are made of: processor time, which neighbours disturb least, or wall time."""
        return self.cpu or self.wall


@dataclasses.dataclass
class Result:
    """All timings of one case; contenders that refused it, with their reason."""

    case: Case
    timings: dict[str, Timing]
    refused: dict[str, str]

    def ratio(self, rival: str) -> float | None:
        """Median over rounds of rival's time over flashtile's: above 1 flashtile is faster."""
        if OURS not in self.timings or rival not in self.timings:
            return None
        pairs = zip(self.timings[rival].compared, self.timings[OURS].compared, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def time_case(case: Case, device: torch.device, seconds: float) -> Result:
    """Rounds of one call each, for about `seconds`, after one warm-up call each."""
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, run in make_runs(case, device).items():
        try:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            runs[name] = run
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
    if device.type == "cuda":
        return Result(case, _cuda_rounds(runs, seconds), refused)
    calls = 2 if case.is_decode else 1
    return Result(case, _cpu_rounds(runs, seconds, calls, case.min_rounds), refused)


def untimed(case: Case, device: torch.device, reason: str) -> Result:
    """A case that is not run, for one of the reasons NOT_TIMED."""
    return Result(case, {}, dict.fromkeys(contenders(case, device), reason))


def _cpu_rounds(
    runs: dict[str, Run], seconds: float, calls: int, min_rounds: int
) -> dict[str, Timing]:
    """The last of so many calls is timed: the one before clears away what a rival left behind."""
    timings = {name: Timing() for name in runs}
    end = time.perf_counter() + seconds
    for count in range(MAX_ROUNDS):
        now = time.perf_counter()
        # A case far over its budget (an SDPA path that collapses) stops after one round.
        enough = count >= MIN_ROUNDS or now > end + seconds
        if now > end and enough and count >= min_rounds:
            break
        for name, run in runs.items():
            for _ in range(calls - 1):
                run()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            timings[name].cpu.append(time.process_time() - cpu)
            timings[name].wall.append(time.perf_counter() - wall)
    return timings


def _cuda_rounds(runs: dict[str, Run], seconds: float) -> dict[str, Timing]:
    """Events around each call, behind a write that evicts the L2 cache."""
    timings = {name: Timing() for name in runs}
    event: Any = torch.cuda.Event
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    end = time.perf_counter() + seconds
    for count in range(MAX_ROUNDS):
        if time.perf_counter() > end and count >= MIN_ROUNDS:
            break
        for name, run in runs.items():
            start, stop = (event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            timings[name].wall.append(start.elapsed_time(stop) / 1e3)
    return timings


def peak_memory(case: Case, name: str) -> int:
    """Most bytes that one CPU call holds beyond its inputs. Run it in a fresh process.

    A backward case counts from before its forward, as a training step does.
    """
    small = dataclasses.replace(case, seqlen_q=min(case.seqlen_q, 64), seqlen_k=64)
    make_runs(small, torch.device("cpu"))[name]()  # libraries load
    run = make_runs(case, torch.device("cpu"))[name]
    with contextlib.suppress(OSError):  # resets the high-water mark where the kernel allows it
        Path("/proc/self/clear_refs").write_text("5")
    before = _memory_status("VmRSS")
    run()
    return max(0, _memory_status("VmHWM") - before)


def _memory_status(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes; ru_maxrss survives exec and may be the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
