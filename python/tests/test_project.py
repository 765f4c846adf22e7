"""Files around the code: workflows and .ci/run, make's ARGS, indexes, versions, forms."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashtile

ROOT = Path(__file__).resolve().parents[2]
TAKES_ARGS = {
    "demo": ["examples/demo.py"],
    "demo-engine": ["examples/demo_engine.py"],
    "bench": ["benchmarks/bench.py"],
    "sass-report": ["benchmarks/sass_report.py"],
    "slices": ["cpp_tests/slices_test.py"],
    "model": ["benchmarks/model.py", "benchmarks/model_decode.py"],
    "gpu-package": ["benchmarks/gpu_package.sh"],
}

pytestmark = pytest.mark.skipif(
    not (ROOT / ".ci" / "run").is_file(), reason="no .ci/run: not a source checkout"
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def make_n(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would do; nothing is done. Without the flags of a make that runs the tests."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.run(
        ["make", "-n", f"PYTHON={sys.executable}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def makefile_targets() -> list[str]:
    match = re.search(r"^\.PHONY: (help .*)$", read("Makefile"), re.MULTILINE)
    assert match is not None
    return match[1].split()


def workflow_targets(name: str) -> list[str]:
    """Targets of the jobs of a workflow, each of which is a call of make.yml."""
    text = read(f".github/workflows/{name}")
    jobs = re.findall(r"^  ([\w-]+):$", text.split("\njobs:\n")[1], re.MULTILINE)
    targets = re.findall(r"^    with:\n      target: ([\w-]+)$", text, re.MULTILINE)
    assert text.count("uses: ./.github/workflows/make.yml\n") == len(jobs)
    assert targets == jobs
    return targets


def test_workflows_run_what_ci_runs() -> None:
    lines = [line.split("#")[0].strip() for line in read(".ci/run").splitlines()]
    wanted = [line.removeprefix("make ") for line in lines if line.startswith("make ")]
    assert wanted
    assert sorted(workflow_targets("ci.yml")) == sorted(wanted)
    assert workflow_targets("nightly.yml") == ["test-nightly"]
    assert {*wanted, "test-nightly"} <= {*makefile_targets()}
    assert 'run: make "$TARGET"' in read(".github/workflows/make.yml")


def test_one_image_with_nvcc() -> None:
    image = json.loads(read(".devcontainer/devcontainer.json"))["image"]
    assert re.findall(
        r"^    container: (.*)$", read(".github/workflows/make.yml"), re.MULTILINE
    ) == [image]
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-devel-ubuntu24\.04", image)


@pytest.mark.parametrize("target", TAKES_ARGS)
def test_args_reach_the_script(target: str) -> None:
    result = make_n(target, "ARGS=--one 'two words'")
    assert result.returncode == 0, result.stderr
    commands = result.stdout.replace("\\\n", "")
    for script in TAKES_ARGS[target]:
        lines = [line for line in commands.splitlines() if script in line]
        assert lines, commands
        assert all("--one 'two words'" in line.split(script)[1] for line in lines), lines
    assert commands.count("--one") == len(TAKES_ARGS[target])


def test_args_are_refused_where_no_script_takes_them() -> None:
    others = [target for target in makefile_targets() if target not in TAKES_ARGS]
    assert "test" in others
    for target in others:
        result = make_n(target, "ARGS=--one")
        assert result.returncode == 2
        assert f"ARGS is '--one' and make {target} takes none; allowed for: " in result.stderr
    allowed = result.stderr.split("allowed for: ")[1].split(".  Stop")[0].split()
    assert sorted(allowed) == sorted(TAKES_ARGS)


def test_every_example_is_in_the_index() -> None:
    folder = ROOT / "examples"
    programs = [path for path in folder.iterdir() if path.suffix in {".c", ".cpp", ".py"}]
    for path in (folder / "engine").iterdir():
        if path.suffix in {".cpp", ".py"} and re.search(
            r"^int main\(|__main__", path.read_text(), re.M
        ):
            programs.append(path)
    names = {str(path.relative_to(folder)) for path in programs}
    assert {"attention.c", "demo.py", "engine/main.cpp", "engine/serve.py"} <= names
    links = set(re.findall(r"\[[^\]]*\]\(([^)#]*)\)", read("examples/README.md")))
    assert not names - links
    assert not [link for link in links if not (folder / link).exists()]


def test_every_test_folder_is_in_the_index() -> None:
    folder = ROOT / "cpp_tests"
    entries = {path.name + "/" * path.is_dir() for path in folder.iterdir()}
    entries -= {"CMakeLists.txt", "README.md", "__pycache__/"}
    named = re.findall(r"^\| (.*?) \|", read("cpp_tests/README.md"), re.MULTILINE)
    assert {name for cell in named for name in re.findall(r"`(.*?)`", cell)} == entries


def test_citation_and_changelog_have_this_version() -> None:
    version = re.escape(flashtile.__version__)
    citation = read("CITATION.cff")
    assert re.search(rf"^version: {version}$", citation, re.MULTILINE)
    assert re.search(r"^license: BSD-3-Clause$", citation, re.MULTILINE)
    holder = re.search(r"^Copyright \(c\) \d+, (.*)$", read("LICENSE"), re.MULTILINE)
    author = re.findall(r"^  - name: (.*)$", citation, re.MULTILINE)
    assert holder is not None
    assert [name.lower() for name in author] == [holder[1].lower()]
    newest = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] in {flashtile.__version__, "Unreleased"}
    assert re.search(rf"^## {version}\b", read("CHANGELOG.md"), re.MULTILINE)


def test_a_bug_report_has_what_an_answer_needs() -> None:
    items = read(".github/ISSUE_TEMPLATE/bug.yml").split("\n  - type: ")
    required = [item for item in items if re.search(r"^ +required: true$", item, re.MULTILINE)]
    for words in ("flashtile.build_info()", "flashtile.can_run(...)"):
        assert [item for item in required if words in item], words
