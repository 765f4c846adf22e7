"""examples/progress.py, by which the demos say that something long still runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "progress.py"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not PROGRAM.is_file():
        pytest.skip("no examples beside the tests: not a source checkout")
    spec = importlib.util.spec_from_file_location("progress", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    monkeypatch.setattr(result, "SECONDS", 0.01)
    return result


def wait_for(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed until `text` was; fails after a while."""
    printed = ""
    for _ in range(1000):
        printed += capsys.readouterr().out
        if text in printed:
            return printed
        time.sleep(0.01)
    raise AssertionError(f"never printed {text!r}: {printed!r}")


def test_lines_where_there_is_no_terminal(
    module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with module.progress("counting", 3) as bar:
        wait_for("  ... counting: 0 of 3, 0 s\n", capsys)
        bar.step("ignored")
        printed = wait_for("  ... counting: 1 of 3, 0 s\n", capsys)
    assert "\r" not in printed
    with module.progress("waiting"):
        wait_for("  ... waiting: 0 s\n", capsys)


def test_it_ends_with_the_block(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with module.progress("failing"):
            wait_for("failing", capsys)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("module")
def test_a_command_keeps_its_output_and_status() -> None:
    code = "import sys; print('out'); sys.exit(3)"
    command = [sys.executable, str(PROGRAM), "running", "--", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "  ... running\nout\n")
    done = subprocess.run(command[:3], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "examples/progress.py" in done.stderr
