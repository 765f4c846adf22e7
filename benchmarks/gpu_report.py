"""Last step of gpu_check.sh: one JSON of steps, logs of failures, versions and benchmarks, and what
it says as tables.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_report
import torch
from bench_cases import OURS

LOG_LINES = 40  # of a step that did not pass; one that passed keeps its last line
GOOD = ("passed", "skipped")
SDPA = ("sdpa-flash", "sdpa-cudnn")

# TFLOP/s to reach on an H200 with 16384 tokens: (pass, head_dim, causal).
BARS = {
    ("forward", 64, False): 500,
    ("forward", 64, True): 475,
    ("forward", 128, False): 700,
    ("forward", 128, True): 680,
    ("forward", 256, False): 750,
    ("forward", 256, True): 640,
    ("backward", 64, False): 475,
    ("backward", 128, False): 612,
    ("backward", 128, True): 580,
    ("backward", 256, False): 530,
}


def main() -> int:
    """Writes the report; exit status 1 when a step neither passed nor was only shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="folder with steps.tsv, the logs and bench_*/")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="nothing was run: no step passed")
    options = parser.parse_args()

    facts = bench_report.machine_facts(torch.device("cuda")) | {
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _last_line("nvcc", "--version"),
        "cmake": _first_line("cmake", "--version"),
    }
    steps = [_read_step(line, options.work) for line in _lines(options.work / "steps.tsv")]
    cases = _cases(options.work)
    good = ("dry run",) if options.dry_run else GOOD
    as_wished = bool(steps) and all(step["status"] in good for step in steps)
    report = {
        "dry_run": options.dry_run,
        "passed": None if options.dry_run else as_wished,
        "facts": facts,
        "steps": steps,
        "bars": _bars(cases),
        "benchmark": {"facts": facts, "cases": cases, "memory": []},
    }
    folder = "dry-run" if options.dry_run else bench_report.machine_kind(facts)
    default = Path(__file__).parent / "results" / folder / "gpu_check.json"
    output: Path = options.output or default
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(to_text(json.loads(output.read_text())))
    print(f"written to {output}")
    return 0 if as_wished else 1


def to_text(report: dict[str, Any]) -> str:
    """The report for people, from its JSON alone; "-" where nothing was measured."""
    facts = report["facts"]
    verdict = {None: "dry run", True: "every step passed", False: "NOT every step passed"}
    rows = [
        [s["name"], s["status"], _text(s["seconds"], "{}"), str(s["share"])]
        for s in report["steps"]
    ]
    bars = [
        [
            b["pass"],
            str(b["head_dim"]),
            "causal" if b["causal"] else "full",
            str(b["bar"]),
            _text(b["tflops"], "{:.0f}"),
            _text(b["over_bar"]),
            _text(b["over_best_sdpa"]),
        ]
        for b in report["bars"]
    ]
    cases = [c for c in report["benchmark"]["cases"] if c["seqlen_q"] == c["seqlen_k"]]
    names = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
    header = ["pass", "batch", "heads", "tokens", "dim", "mask", *names, "over best SDPA"]
    return "\n\n".join(
        [
            f"{verdict[report['passed']]}: {facts['gpu'] or 'no GPU'}, commit {facts['commit']}",
            bench_report.table(["step", "status", "s", "share"], rows),
            "TFLOP/s of 16384 tokens against the bars for an H200; ratios above 1 are good",
            bench_report.table(
                ["pass", "dim", "mask", "bar", "flashtile", "over bar", "over best SDPA"], bars
            ),
            "TFLOP/s, without decode steps",
            bench_report.table(header, [_case_row(case, names) for case in cases]),
        ]
    )


def _case_row(case: dict[str, Any], names: list[str]) -> list[str]:
    heads = f"{case['heads']}/{case['heads_kv']}"
    speeds = [_text(_tflops(case, name), "{:.0f}") for name in names]
    mask = "causal" if case["causal"] else "full"
    row = [case["direction"], str(case["batch"]), heads, str(case["seqlen_k"])]
    return [*row, str(case["head_dim"]), mask, *speeds, _text(_over_sdpa(case))]


def _bars(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be reached, beside what was."""
    rows: list[dict[str, Any]] = []
    for (direction, head_dim, causal), bar in BARS.items():
        row: dict[str, Any] = {"pass": direction, "head_dim": head_dim, "causal": causal}
        row |= {"bar": bar, "tflops": None, "over_bar": None, "over_best_sdpa": None}
        for case in cases:
            same = (case["direction"], case["head_dim"], case["causal"]) == tuple(row.values())[:3]
            dense = case["seqlen_q"] == 16384 and case["heads"] == case["heads_kv"]
            speed = _tflops(case, OURS)
            if same and dense and case["dtype"] == "bfloat16" and speed is not None:
                row |= {"tflops": speed, "over_bar": speed / bar}
                row["over_best_sdpa"] = _over_sdpa(case)
        rows.append(row)
    return rows


def _tflops(case: dict[str, Any], name: str) -> float | None:
    seconds: float | None = case["contenders"].get(name, {}).get("wall_median")
    return None if seconds is None else float(case["flops"]) / seconds / 1e12


def _over_sdpa(case: dict[str, Any]) -> float | None:
    """How many times as fast as the faster of SDPA's backends, round by round."""
    ratios = [case["contenders"].get(name, {}).get("ratio") for name in SDPA]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _cases(work: Path) -> list[dict[str, Any]]:
    paths = [work / f"bench_{direction}" / "results.json" for direction in ("forward", "backward")]
    return [
        case for path in paths if path.exists() for case in json.loads(path.read_text())["cases"]
    ]


def _text(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _read_step(line: str, work: Path) -> dict[str, Any]:
    name, status, seconds, share, command = line.split("\t")
    log = _lines(work / f"{name}.log")
    return {
        "name": name,
        "status": status,
        "seconds": int(seconds) if seconds else None,
        "share": int(share),
        "command": command.strip(),
        "log": log[-1:] if status in (*GOOD, "dry run") else log[-LOG_LINES:],
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return ["not found"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines() or ["no answer"]


def _first_line(*command: str) -> str:
    return _output(*command)[0]


def _last_line(*command: str) -> str:
    return _output(*command)[-1]


if __name__ == "__main__":
    sys.exit(main())
