"""benchmarks/gpu_check.sh without a GPU: dry runs of a checkout and of a package that lies in
another folder, and whole runs against stub tools.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = os.environ.get("FLASHTILE_BUILD")  # with the kernels; none where they are not built
PLAN = ["conformance", "first", "others", "threads", "autograd", "bench_16k", "bench_decode"]
PLAN += ["bench_lengths", "traps", "pytest", "rest", "memcheck"]
BUILD_STEPS = ["configure", "build"]
REST_OF_CHECKOUT = ["ctest", "pytest_all", "demo"]
NEED_TORCH = {"autograd", "bench_16k", "bench_decode", "bench_lengths", "pytest", "pytest_all"}
NEED_TORCH |= {"demo"}
MOST_SECONDS = 540  # that a loan may be planned to take
FIELDS = ["dry_run", "passed", "facts", "steps", "bars", "cases"]

# Stands for every tool: fails as FAILING says ("first=3 ctest=5"), and is silent otherwise. What it
# stands for is told by the test or the script that it is asked to run.
STUB = """#!/usr/bin/env bash
case "$0 $*" in
  *gpu_report.py*) exec {python} "$@" ;;
  *gpu_facts.py*) echo '{{"gpu": null}}' >"$2" && echo "found: a stub" && exit "${{FACTS:-0}}" ;;
  *--list*) echo "shapes bf16 d128" && echo "one more" && exit 0 ;;
  *bench.py*) tool=bench ;;
  *pytest*) tool=pytest ;;
  */gpu\\ shapes\\ bf16\\ d128) tool=first ;;
  *) tool=$(basename "$0") ;;
esac
echo "$tool ran"
for pair in $FAILING; do
  [[ ${{pair%=*}} == "$tool" ]] && exit "${{pair#*=}}"
done
exit 0
"""


def run_check(
    script: Path, output: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [script, "--output", output, *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        cwd=output.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    report = output / "gpu_check.json"
    return done, json.loads(report.read_text()) if report.exists() else {}


def write_stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def tests_of(executable: Path) -> set[str]:
    done = subprocess.run([executable, "--list"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


class DryRunOfCheckout(unittest.TestCase):
    """Without torch, so that it is quick, and visible what is left out."""

    report: dict[str, Any]
    done: subprocess.CompletedProcess[str]

    @classmethod
    def setUpClass(cls) -> None:
        with tempfile.TemporaryDirectory() as folder:
            python = Path(folder) / "python"
            write_stub(python, f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
            cls.done, cls.report = run_check(
                ROOT / "benchmarks" / "gpu_check.sh",
                Path(folder) / "out",
                "--dry-run",
                "--sanitizers",
                PYTHON=str(python),
                PYTHONPATH="",
            )

    def test_walks_every_step_in_order(self) -> None:
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        steps = self.report["steps"]
        expected = [*BUILD_STEPS, *PLAN, "racecheck", "synccheck", "initcheck", *REST_OF_CHECKOUT]
        assert [step["name"] for step in steps] == expected
        for step in steps:
            assert (step["status"], step["seconds"]) == ("dry run", None), step
            assert step["command"] in self.done.stdout

    def test_the_first_line_says_what_was_found(self) -> None:
        found = self.done.stdout.splitlines()[0]
        assert re.search(r"^found: .*python 3\.\d+.* torch None, cuda None", found), found

    def test_every_field_is_there_and_no_value_is_invented(self) -> None:
        assert list(self.report) == FIELDS
        assert (self.report["dry_run"], self.report["passed"]) == (True, None)
        for fact in ("commit", "python", "driver", "nvcc", "torch", "cuda", "cudnn", "gpu"):
            assert fact in self.report["facts"]
        assert len(self.report["bars"]) == 10
        for bar in self.report["bars"]:
            assert {bar[k] for k in ("tflops", "over_bar", "over_best_sdpa")} == {None}
        assert self.report["cases"] == []


@unittest.skipIf(BUILD is None, "this build has no kernels, so there is nothing to pack")
class Package(unittest.TestCase):
    """Made of this build's files, which need no GPU to be there, and moved before it runs."""

    folder: tempfile.TemporaryDirectory[str]
    root: Path
    report: dict[str, Any]
    done: subprocess.CompletedProcess[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        made, cls.root = Path(cls.folder.name) / "made", Path(cls.folder.name) / "moved" / "here"
        subprocess.run(
            [ROOT / "benchmarks" / "gpu_package.sh", "--build", str(BUILD), "--to", made],
            check=True,
            capture_output=True,
        )
        cls.root.parent.mkdir()
        made.rename(cls.root)
        cls.done, cls.report = cls.check()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.folder.cleanup()

    @classmethod
    def check(cls, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        # Not this build's Python package, but the one that was packed.
        return run_check(
            cls.root / "benchmarks" / "gpu_check.sh",
            Path(cls.folder.name) / "out",
            "--dry-run",
            **{"PYTHONPATH": "", **environment},
        )

    def test_every_step_names_files_that_are_there(self) -> None:
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        assert [step["name"] for step in self.report["steps"]] == PLAN
        here = 0
        for step in self.report["steps"]:
            assert step["status"] == "dry run", step
            paths = [word for word in shlex.split(step["command"]) if word.startswith("/")]
            outside = [
                p for p in paths if not p.startswith(self.folder.name) and p != sys.executable
            ]
            assert not outside, step
            here += sum(Path(p).exists() for p in paths if p.startswith(str(self.root)))
        assert here >= 15

    def test_a_step_whose_file_is_gone_is_named(self) -> None:
        for name, step in (
            ("build/cpp_tests/traps/traps_gpu", "traps"),
            ("benchmarks/gpu_threads.py", "autograd"),
            ("python/tests/test_varlen.py", "pytest"),
        ):
            path, away = self.root / name, self.root / "away"
            path.rename(away)
            try:
                done, report = self.check(PYTHON="/bin/false")  # quick: no torch
                (line,) = (x for x in done.stdout.splitlines() if x.startswith(f"{step} "))
                assert f"missing {path}" in line, line
                assert report == {}
                assert done.returncode != 0
            finally:
                away.rename(path)

    def test_fits_a_loan(self) -> None:
        planned = re.search(r"^planned: (\d+) s for a loan", self.done.stdout, re.MULTILINE)
        assert planned is not None
        limits = sum(step["limit"] for step in self.report["steps"])
        assert limits < int(planned[1]) < MOST_SECONDS  # what was found takes time as well

    def test_named_tests_exist(self) -> None:
        where = self.root / "build" / "cpp_tests"
        executables = {"gpu": where / "kernels" / "gpu", "traps_gpu": where / "traps" / "traps_gpu"}
        named = 0
        for step in self.report["steps"]:
            words = shlex.split(step["command"])
            for executable in executables.values():
                if str(executable) in words:
                    names = set(words[words.index(str(executable)) + 1 :]) - {"--except"}
                    assert names <= tests_of(executable), step
                    named += len(names)
        assert named > 60

    def test_cases_are_those_of_the_issue(self) -> None:
        all_cases = self.report["cases"]
        first = [(c["head_dim"], c["seqlen_k"]) for c in all_cases[:12]]
        assert first == [(d, 16384) for d in (128, 64, 256) for _ in range(4)]
        for case in all_cases:
            for name, times in case["contenders"].items():
                assert (times["wall_median"], times["ratio"], times["compared"]) == (None, None, [])
                assert case["refused"][name] == "dry run"
        cases = [c for c in all_cases if c["seqlen_q"] == c["seqlen_k"] and c["page_size"] == 0]
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
        assert {"decode", "prefill"} == {
            "decode" if c["seqlen_q"] < c["seqlen_k"] else "prefill"
            for c in all_cases
            if c["page_size"]
        }


class StubTools(unittest.TestCase):
    """A checkout whose tools are all stubs."""

    def run_with(
        self, failing: str, *arguments: str, facts: str = "0"
    ) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            tools, build = Path(folder) / "tools", Path(folder) / "build"
            stub = STUB.format(python=sys.executable)
            for path in (
                *(tools / name for name in ("python", "ctest", "compute-sanitizer")),
                build / "cpp_tests" / "ptx_machine" / "gpu_conformance",
                build / "cpp_tests" / "kernels" / "gpu",
                build / "cpp_tests" / "traps" / "traps_gpu",
            ):
                write_stub(path, stub)
            return run_check(
                ROOT / "benchmarks" / "gpu_check.sh",
                Path(folder) / "out",
                "--build",
                str(build),
                *arguments,
                FAILING=failing,
                FACTS=facts,
                PYTHON=str(tools / "python"),
                PATH=f"{tools}:{os.environ['PATH']}",
            )

    def test_all_pass(self) -> None:
        done, report = self.run_with("gpu_conformance=77")  # another GPU than it is for
        assert done.returncode == 0, done.stdout + done.stderr
        assert report["passed"] is True
        steps = report["steps"]
        assert [step["name"] for step in steps] == PLAN + REST_OF_CHECKOUT
        assert [step["status"] for step in steps] == ["skipped"] + ["passed"] * (len(steps) - 1)

    def test_goes_on_after_failures_and_tells(self) -> None:
        done, report = self.run_with(
            "gpu_conformance=1 traps_gpu=8 compute-sanitizer=9", "--sanitizers"
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert report["passed"] is False
        steps = {step["name"]: step for step in report["steps"]}
        assert list(steps) == [*PLAN, "racecheck", "synccheck", "initcheck", *REST_OF_CHECKOUT]
        failed = {"conformance": "failed (1)", "traps": "failed (1)"}
        failed |= dict.fromkeys(("memcheck", "racecheck", "synccheck", "initcheck"), "failed (9)")
        for name, step in steps.items():
            assert step["status"] == failed.get(name, "passed"), step
        assert steps["conformance"]["log"] == ["gpu_conformance ran"]
        assert sum(line.startswith("failed (8)") for line in steps["traps"]["log"]) == 6

    def test_a_wrong_first_result_is_looked_at_by_memcheck_at_once(self) -> None:
        done, report = self.run_with("first=1")
        names = [step["name"] for step in report["steps"]]
        assert names[:3] == ["conformance", "first", "memcheck"]
        assert names.count("memcheck") == 1
        assert done.returncode == 1

    def test_without_torch_its_steps_are_left_out_visibly(self) -> None:
        done, report = self.run_with("", facts="3")
        assert done.returncode == 1  # what was not looked at has not passed
        for step in report["steps"]:
            assert step["status"] == ("no torch" if step["name"] in NEED_TORCH else "passed"), step
        assert sum(line.split()[1:3] == ["no", "torch"] for line in done.stdout.splitlines()) >= 7


class Arguments(unittest.TestCase):
    def test_an_unknown_one_is_named(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            script = ROOT / "benchmarks" / "gpu_check.sh"
            done, report = run_check(script, Path(folder) / "out", "--bild", "x")
        assert (done.returncode, report) == (2, {})
        assert "unknown argument '--bild'; allowed: --output DIR" in done.stderr


class Each(unittest.TestCase):
    """benchmarks/gpu_each.sh bounds a test that hangs, and goes on."""

    def test_a_test_that_hangs_is_ended(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            executable = Path(folder) / "tests"
            write_stub(
                executable,
                "#!/usr/bin/env bash\n"
                'if [[ $1 == --list ]]; then printf "%s\\n" one "two, and" three; exit; fi\n'
                "[[ $1 == one ]] && exec sleep 60\nexit 0\n",
            )
            each = ROOT / "benchmarks" / "gpu_each.sh"
            command = [shutil.which("bash") or "bash", each, "1", "2", executable]
            done = subprocess.run(
                [*command, "one", "two, and"], capture_output=True, text=True, check=False
            )
            rest = subprocess.run(
                [*command, "--except", "one"], capture_output=True, text=True, check=False
            )
        assert done.returncode == 1
        lines = [re.sub(r" +\d+ s", "", line).split("  ") for line in done.stdout.splitlines()]
        assert ["timeout", "one"] in [[w.strip() for w in line if w] for line in lines], lines
        assert "2 tests ran, NOT all passed" in done.stdout
        assert rest.returncode == 0
        assert "2 tests ran, all passed" in rest.stdout


if __name__ == "__main__":
    unittest.main()
