"""Last step of gpu_check.sh: one JSON of steps, logs of failures, versions and benchmarks, and what
it says as tables. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench_table import table

OURS = "flashtile"
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
    parser.add_argument("folder", type=Path, help="with what gpu_check.sh wrote")
    parser.add_argument("--dry-run", action="store_true", help="nothing was run: no step passed")
    options = parser.parse_args()

    folder: Path = options.folder
    found = folder / "facts.json"
    facts = json.loads(found.read_text()) if found.exists() else {}
    logs = _logs(folder)
    steps = [_read_step(line, logs) for line in _lines(folder / "steps.tsv")]
    # A run that was cut short may have left half a line.
    rows = folder / "bench.jsonl"
    cases = [
        json.loads(row) for row in (rows.read_text().split("\n")[:-1] if rows.exists() else ())
    ]
    good = ("dry run",) if options.dry_run else GOOD
    as_wished = bool(steps) and all(step["status"] in good for step in steps)
    report = {
        "dry_run": options.dry_run,
        "passed": None if options.dry_run else as_wished,
        "facts": facts,
        "steps": steps,
        "bars": _bars(cases),
        "cases": cases,
    }
    output = folder / "gpu_check.json"
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(to_text(json.loads(output.read_text())))
    print(f"written to {output}")
    return 0 if as_wished else 1


def to_text(report: dict[str, Any]) -> str:
    """The report for people, from its JSON alone; "-" where nothing was measured."""
    facts = report["facts"]
    verdict = {None: "dry run", True: "every step passed", False: "NOT every step passed"}
    rows = [
        [s["name"], s["status"], _text(s["seconds"], "{}"), str(s["limit"])]
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
    cases = [c for c in report["cases"] if c["seqlen_q"] == c["seqlen_k"]]
    names = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
    header = ["pass", "batch", "heads", "tokens", "dim", "mask", *names, "over best SDPA"]
    return "\n\n".join(
        [
            f"{verdict[report['passed']]}: {facts.get('driver')}, commit {facts.get('commit')}",
            table(["step", "status", "s", "limit"], rows),
            "TFLOP/s of 16384 tokens against the bars for an H200; ratios above 1 are good",
            table(["pass", "dim", "mask", "bar", "flashtile", "over bar", "over best SDPA"], bars),
            "TFLOP/s, without decode steps",
            table(header, [_case_row(case, names) for case in cases]),
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


def _text(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _read_step(line: str, logs: dict[str, list[str]]) -> dict[str, Any]:
    name, status, seconds, limit, command = line.split("\t")
    log = logs.get(name, [])
    return {
        "name": name,
        "status": status,
        "seconds": int(seconds) if seconds else None,
        "limit": int(limit),
        "command": command.strip(),
        "log": log[-1:] if status in (*GOOD, "dry run") else log[-LOG_LINES:],
    }


def _logs(folder: Path) -> dict[str, list[str]]:
    """What every step printed; in log.txt a line "=== name" comes first."""
    logs: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in _lines(folder / "log.txt"):
        if line.startswith("=== "):
            lines = logs.setdefault(line[4:], [])
        else:
            lines.append(line)
    return logs


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
