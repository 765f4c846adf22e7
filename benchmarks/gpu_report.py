"""Last step of gpu_check.sh: one JSON of steps, logs of failures, versions and benchmark."""

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

LOG_LINES = 40  # of a step that did not pass; one that passed keeps its last line


def main() -> int:
    """Writes the report; exit status 1 when a step did not pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="folder with steps.tsv, the logs and bench/")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = bench_report.machine_facts(device) | {
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _last_line("nvcc", "--version"),
        "cmake": _first_line("cmake", "--version"),
    }
    steps = [_read_step(line, options.work) for line in _lines(options.work / "steps.tsv")]
    passed = bool(steps) and all(step["status"] == "passed" for step in steps)
    bench = options.work / "bench" / "results.json"
    report = {
        "passed": passed,
        "facts": facts,
        "steps": steps,
        "benchmark": json.loads(bench.read_text()) if bench.exists() else None,
    }
    default = Path(__file__).parent / "results" / bench_report.machine_kind(facts)
    output: Path = options.output or default / "gpu_check.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'every step passed' if passed else 'NOT every step passed'}; written to {output}")
    return 0 if passed else 1


def _read_step(line: str, work: Path) -> dict[str, Any]:
    name, status, seconds = line.split("\t")
    log = _lines(work / f"{name}.log")
    kept = log[-1:] if status == "passed" else log[-LOG_LINES:]
    return {"name": name, "status": status, "seconds": int(seconds), "log": kept}


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
