"""Where the numbers come from and where they go: machine, versions, JSON and markdown."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from bench_cases import OURS, SCORES
from bench_table import table
from bench_timing import NOT_TIMED, Result, Timing

import flashtile

TITLES = {
    "dense": "Forward and backward",
    "decode": "Decode",
    "prefill": "Prefill over pages",
    "features": "Windows, packed sequences, head_dim_v, one head",
}
SCORE_TITLES = {
    "Biases and masks": tuple(s for s in SCORES if s.endswith("q, k)")),
    "Softcap and ALiBi": ("softcap", "alibi"),
    "Dropout": ("dropout",),
    "Sinks": ("sink",),
}
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Memory:
    """Peak memory of one call beyond its inputs."""

    label: str
    dtype: str
    direction: str
    peak_bytes: dict[str, int]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Everything that a number depends on."""
    facts: dict[str, Any] = {
        "commit": _commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "flashtile": flashtile.build_info(),
    }
    return facts | (_gpu_facts() if device.type == "cuda" else {})


def _gpu_facts() -> dict[str, Any]:
    """None where there is no GPU."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("gpu", "compute_capability", "cuda", "cudnn"))
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": _cudnn_version(),
    }


def machine_kind(facts: dict[str, Any]) -> str:
    """Folder name: the GPU, or the processor and the instruction set that was used."""
    name = facts.get("gpu") or f"{facts['cpu']} {facts['flashtile']['cpu_instruction_set_used']}"
    name = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*ghz", "", str(name).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def to_json(facts: dict[str, Any], results: list[Result], memory: list[Memory]) -> str:
    """Facts, every timing in seconds (medians and all rounds) and the memory rows."""
    rows = [to_row(result) for result in results]
    document = {"facts": facts, "cases": rows, "memory": [dataclasses.asdict(m) for m in memory]}
    return json.dumps(document, indent=1)


def to_row(result: Result) -> dict[str, Any]:
    """One case of the JSON: the problem, every contender's timings, and why who refused it."""
    timings = result.timings | {name: Timing() for name in result.refused}
    contenders = {
        name: {
            "wall_median": statistics.median(timing.wall) if timing.wall else None,
            "cpu_median": statistics.median(timing.cpu) if timing.cpu else None,
            "ratio": result.ratio(name),
            "rounds": len(timing.wall),
            "compared": timing.compared,
        }
        for name, timing in timings.items()
    }
    row = dataclasses.asdict(result.case) | {"flops": result.case.flops}
    return row | {"contenders": contenders, "refused": result.refused}


def to_line(result: Result) -> str:
    """One case in a line: milliseconds of every contender, and ratios to flashtile."""
    case = result.case
    times = [
        f"{n} {_milliseconds(result, n)} ms ({_number(result.ratio(n))})" for n in result.timings
    ]
    times += [f"{n}: {reason}" for n, reason in result.refused.items()]
    what = f"{case.direction} {case.mask} {case.score}".rstrip()
    return f"{what} {case.label}: {', '.join(times)}"


def to_markdown(facts: dict[str, Any], results: list[Result], memory: list[Memory]) -> str:
    """The same for people."""
    where = facts.get("gpu", "") or "no GPU"
    if "gpu" not in facts:
        used = facts["flashtile"]["cpu_instruction_set_used"]
        where = f"{facts['cpu']} ({used}), {facts['threads']} thread(s)"
    parts = [
        f"# flashtile on {where}",
        (
            f"commit {facts['commit']}, {facts['date']}, torch {facts['torch']}, load average"
            f" {facts['load_average']:.1f} on {facts['cores']} cores. Ratios above 1: flashtile is"
            " faster; benchmarks/README.md says what each column means."
        ),
    ]
    for kind, title in TITLES.items():
        group = [r for r in results if r.case.kind == kind and not r.case.score]
        if group:
            parts += [f"## {title}", _timing_table(group, "gpu" in facts)]
    for title, names in SCORE_TITLES.items():
        group = [r for r in results if r.case.score in names]
        if group:
            parts += [f"## {title}", _timing_table(group, "gpu" in facts)]
    if memory:
        parts += ["## Peak memory beyond the inputs (MiB)", _memory_table(memory)]
    return "\n\n".join(parts) + "\n"


def _timing_table(results: list[Result], on_gpu: bool) -> str:
    rivals = list(dict.fromkeys(n for r in results for n in [*r.timings, *r.refused] if n != OURS))
    unit = "TFLOP/s" if on_gpu else "GFLOP/s"
    speed = "GB/s" if results[0].case.is_decode else unit
    scored = bool(results[0].case.score)
    header = ["shape", "dtype", "pass", "mask", *(["scores"] if scored else [])]
    header += ["flashtile ms", speed]
    for rival in rivals:
        header += [f"{rival} ms", "ratio", *([] if on_gpu else ["wall ratio"])]
    rows = []
    for result in results:
        case = result.case
        row = [case.label, case.dtype, case.direction, case.mask]
        row += [case.score] if scored else []
        row += [_milliseconds(result, OURS), _speed(result, on_gpu)]
        for rival in rivals:
            row += [_milliseconds(result, rival), _number(result.ratio(rival))]
            row += [] if on_gpu else [_number(_wall_ratio(result, rival))]
        rows.append(row)
    return table(
        [*header, "rounds"], [[*r, _rounds(x)] for r, x in zip(rows, results, strict=True)]
    )


def _memory_table(memory: list[Memory]) -> str:
    names = list(memory[0].peak_bytes)
    rows = [
        [m.label, m.dtype, m.direction, *(f"{m.peak_bytes[n] / 2**20:.0f}" for n in names)]
        for m in memory
    ]
    return table(["shape, causal", "dtype", "pass", *names], rows)


def _milliseconds(result: Result, name: str) -> str:
    if name in result.refused:
        return "not timed" if result.refused[name] in NOT_TIMED else "refused"
    if name not in result.timings:
        return "-"
    return f"{statistics.median(result.timings[name].compared) * 1e3:.3f}"


def _speed(result: Result, on_gpu: bool) -> str:
    if OURS in result.refused:
        return "-"
    seconds = statistics.median(result.timings[OURS].compared)
    if result.case.is_decode:
        return f"{result.case.cache_bytes / seconds / 1e9:.1f}"
    return f"{result.case.flops / seconds / (1e12 if on_gpu else 1e9):.1f}"


def _wall_ratio(result: Result, rival: str) -> float | None:
    if OURS not in result.timings or rival not in result.timings:
        return None
    pairs = zip(result.timings[rival].wall, result.timings[OURS].wall, strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _rounds(result: Result) -> str:
    return str(max((len(t.wall) for t in result.timings.values()), default=0))


def _commit() -> str:
    """Hash of the checkout, "+" when files differ from it; FLASHTILE_COMMIT where git is absent."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FLASHTILE_COMMIT", "unknown")
    return done.stdout.strip()


def _cudnn_version() -> int | None:
    cudnn: Any = torch.backends.cudnn
    version: int | None = cudnn.version()
    return version


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
