"""examples/progress.py, by which the demos say that something long still runs."""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import signal
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


@pytest.mark.usefixtures("module")
def test_a_command_does_not_outlive_it() -> None:
    code = "import time; print('begun', flush=True); time.sleep(600)"
    command = [sys.executable, str(PROGRAM), "running", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        while "begun" not in program.stdout.readline():
            pass
        program.send_signal(signal.SIGTERM)
        # The status is that of the command, so it has ended; the program's own would be negative.
        assert program.wait(60) == -signal.SIGTERM % 256


# Seconds of silence in the middle of a line, of a program that knows nothing of progress ...
PAUSE = "import time; print('The sky is', end='', flush=True); time.sleep(3.5); print(' blue.')"
# ... and of one that writes its text through it.
STREAM = f"""
import sys, time
sys.path.insert(0, {str(PROGRAM.parent)!r})
from progress import progress
with progress("speaking") as bar:
    bar.write("The sky is")
    time.sleep(3.5)
    bar.write(" blue.\\n")
"""


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
def test_a_stream_that_pauses(around: bool) -> None:
    line = r"(  \.\.\. speaking: \d+ s\n)"
    # No line lands inside the text: it breaks off, and goes on below.
    expected = rf"The sky is\n{line}+ blue\.\n"
    command = [sys.executable, "-c", PAUSE if around else STREAM]
    if around:
        command = [sys.executable, str(PROGRAM), "speaking", "--", *command]
        expected = rf"  \.\.\. speaking\n{line}*{expected}"
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(expected, printed), printed


def test_a_line_waits_for_silence(
    module: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS", 60.0)
    with module.progress("speaking") as bar:
        bar.write("one")
        bar.write(" two\n")
    assert capsys.readouterr().out == "one two\n"
    with module.progress("speaking", seconds=0.01) as bar:
        bar.write("one")
        wait_for("one\n  ... speaking: 0 s\n", capsys)


@pytest.mark.usefixtures("module")
def test_a_terminal_stays_one() -> None:
    code = (
        "import os, sys, time; print(os.isatty(1), end='', flush=True); time.sleep(3.5);"
        " print(' end')"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, str(PROGRAM), "running", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=theirs, stdin=theirs):
        os.close(theirs)
        printed = b""
        try:
            while data := os.read(ours, 4096):
                printed += data
        except OSError:  # how a terminal ends
            pass
    os.close(ours)
    # The line stands below the text, and is erased before the text goes on.
    line = r"(\r  \.\.\. running: \d+ s\x1b\[K)+\r\x1b\[K"
    text = printed.decode().replace("\r\n", "\n").replace("\r\n", "\n")
    assert re.search(rf"True\n{line} end\r?\n$", text), text
