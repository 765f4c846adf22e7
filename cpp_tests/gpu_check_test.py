"""benchmarks/gpu_check.sh without a GPU: its dry run, and whole runs against stub tools."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["conformance", "ctest", "pytest", "memcheck", "racecheck", "synccheck", "initcheck"]
STEPS += ["bench_forward", "bench_backward", "demo"]
BUILD_STEPS = ["configure", "build", "build_torch"]
MOST_SECONDS = 530  # of all steps together; the issue allows nine minutes

# Stands for every tool: fails as FAILING says ("ctest=3 pytest=5"), and is silent otherwise.
STUB = """#!/usr/bin/env bash
case "$0 $*" in
  *gpu_report.py*) exec {python} "$@" ;;
  *pytest*) tool=pytest ;;
  *bench.py*) tool=bench ;;
  *) tool=$(basename "$0") ;;
esac
echo "$tool ran"
for pair in $FAILING; do
  [[ ${{pair%=*}} == "$tool" ]] && exit "${{pair#*=}}"
done
exit 0
"""


def run_check(
    output: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh", "--output", output, *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(output.read_text()) if output.exists() else {}
    return done, report


class DryRun(unittest.TestCase):
    report: dict[str, Any]
    done: subprocess.CompletedProcess[str]

    @classmethod
    def setUpClass(cls) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cls.done, cls.report = run_check(Path(folder) / "report.json", "--dry-run")

    def test_walks_every_step_in_order(self) -> None:
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        steps = self.report["steps"]
        assert [step["name"] for step in steps] == BUILD_STEPS + STEPS
        for step in steps:
            assert (step["status"], step["seconds"]) == ("dry run", None), step
            assert step["command"] in self.done.stdout
        assert sum(step["share"] for step in steps) <= MOST_SECONDS

    def test_every_field_is_there_and_no_value_is_invented(self) -> None:
        assert list(self.report) == ["dry_run", "passed", "facts", "steps", "bars", "benchmark"]
        assert self.report["dry_run"] is True
        assert self.report["passed"] is None
        for fact in ("commit", "gpu", "driver", "nvcc", "cuda", "cudnn", "torch", "flashtile"):
            assert fact in self.report["facts"]
        assert len(self.report["bars"]) == 10
        for bar in self.report["bars"]:
            assert {bar[k] for k in ("tflops", "over_bar", "over_best_sdpa")} == {None}
        for case in self.report["benchmark"]["cases"]:
            for name, times in case["contenders"].items():
                assert times["wall_median"] is None
                assert (times["ratio"], times["compared"]) == (None, [])
                assert case["refused"][name] == "dry run"

    def test_cases_are_those_of_the_issue(self) -> None:
        cases = [
            c
            for c in self.report["benchmark"]["cases"]
            if c["seqlen_q"] == c["seqlen_k"] and c["page_size"] == 0
        ]
        got = {
            (c["direction"], c["batch"], c["heads"], c["heads_kv"], c["seqlen_k"], c["head_dim"])
            for c in cases
            if set(c["contenders"]) == {"flashtile", "sdpa-flash", "sdpa-cudnn", "fa3"}
        }
        lengths = (512, 1024, 2048, 4096, 8192, 16384, 32768)
        expected = set()
        for direction in ("forward", "backward"):
            expected |= {(direction, 1, 64, 8, n, 128) for n in lengths}
            for dim in (64, 128, 256):
                heads = 2048 // dim
                expected |= {(direction, max(1, 16384 // n), heads, heads, n, dim) for n in lengths}
        assert got == expected
        assert len(cases) == 2 * len(expected)  # full and causal

    def test_sanitized_tests_exist(self) -> None:
        source = (ROOT / "cpp_tests" / "kernels" / "kernels_test.cpp").read_text()
        names = set(re.findall(r'^TEST\("([^"]*)"\)', source, re.MULTILINE))
        for step in self.report["steps"]:
            if step["name"].endswith("check"):
                wanted = step["command"].split("kernels/gpu ")[1].replace("\\ ", "_").split()
                assert wanted
                assert {name.replace("_", " ") for name in wanted} <= names


class StubTools(unittest.TestCase):
    def run_with(self, failing: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            tools, build = Path(folder) / "tools", Path(folder) / "build"
            stub = STUB.format(python=sys.executable)
            for path in (
                *(tools / name for name in ("python", "ctest", "compute-sanitizer")),
                build / "cpp_tests" / "ptx_machine" / "gpu_conformance",
                build / "cpp_tests" / "kernels" / "gpu",
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(stub)
                path.chmod(0o755)
            return run_check(
                Path(folder) / "report.json",
                "--build",
                str(build),
                FAILING=failing,
                PYTHON=str(tools / "python"),
                PATH=f"{tools}:{os.environ['PATH']}",
            )

    def test_all_pass(self) -> None:
        done, report = self.run_with("gpu_conformance=77")  # another GPU than it is for
        assert done.returncode == 0, done.stdout + done.stderr
        assert report["passed"] is True
        assert [step["status"] for step in report["steps"]] == ["skipped"] + ["passed"] * 9

    def test_goes_on_after_failures_and_tells(self) -> None:
        done, report = self.run_with("gpu_conformance=1 ctest=8 compute-sanitizer=9")
        assert done.returncode == 1, done.stdout + done.stderr
        assert report["passed"] is False
        steps = {step["name"]: step for step in report["steps"]}
        assert list(steps) == STEPS
        assert steps["conformance"]["status"] == "failed (1)"
        assert steps["ctest"]["status"] == "failed (8)"
        assert steps["ctest"]["log"] == ["ctest ran"]
        for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
            assert steps[name]["status"] == "failed (9)"
        for name in ("pytest", "bench_forward", "bench_backward", "demo"):
            assert steps[name]["status"] == "passed"


class Arguments(unittest.TestCase):
    def test_an_unknown_one_is_named(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            done, report = run_check(Path(folder) / "report.json", "--bild", "x")
        assert (done.returncode, report) == (2, {})
        assert "unknown argument '--bild'; allowed: --build DIR" in done.stderr


if __name__ == "__main__":
    unittest.main()
