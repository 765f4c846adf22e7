"""Says that something long still runs, for how long, and how far it is, whenever all is silent.

    with progress("eager attention", 64) as bar:
        ...
        bar.step()

A line comes after two seconds in which nothing else was written; text that comes piece by piece
goes through bar.write(), so that a line never lands inside it. On a terminal one line is written
again and again and leaves no trace, elsewhere a line each time. As a program, around a command,
whose output passes through; the exit status is the command's:

    python examples/progress.py "building" -- cmake --build build

The program also speaks while the command starts, or while Python loads a library and lets no thread
of its own run. Around programs that speak themselves it waits a little longer than they do.
"""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from types import TracebackType

SECONDS = 2.0  # of silence before a line
SECONDS_AROUND = 2.5  # the same of the outermost program
AROUND = "FLASHTILE_PROGRESS"  # the environment of what runs inside of one
ERASE = "\x1b[K"  # the rest of a terminal's line; ends what is to be written over


class progress:  # noqa: N801, reads as a statement
    """Reports from a thread of its own, so what runs need not come back to it."""

    def __init__(self, what: str, total: int = 0, seconds: float | None = None) -> None:
        self._done = 0
        self._what = what
        self._total = total
        self._seconds = SECONDS if seconds is None else seconds
        self._start = self._last = time.monotonic()
        self._ended = threading.Event()
        self._lock = threading.Lock()  # of what is written
        self._terminal = sys.stdout.isatty()
        self._in_line = False  # text of others stands in the current line
        self._shown = False  # our line stands there, on a terminal
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> progress:
        """Starts to report."""
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Ends it."""
        self._ended.set()
        self._thread.join()
        self.write("")

    def step(self, *_: object) -> None:
        """One more of the total is done; takes any arguments, as a callback."""
        self._done += 1

    def write(self, text: str) -> None:
        """Prints a piece of text, and puts off the next line."""
        with self._lock:
            print(f"\r{ERASE}{text}" if self._shown else text, end="", flush=True)
            self._shown = False
            if text:
                self._last = time.monotonic()
                self._in_line = not text.endswith(("\n", ERASE))

    def _report(self) -> None:
        while not self._ended.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            with self._lock:
                now = time.monotonic()
                if now < self._last + self._seconds:
                    continue
                count = f"{self._done} of {self._total}, " if self._total else ""
                line = f"  ... {self._what}: {count}{now - self._start:.0f} s"
                line = f"\r{line}{ERASE}" if self._terminal else f"{line}\n"
                print(f"\n{line}" if self._in_line else line, end="", flush=True)
                self._in_line = False
                self._shown = self._terminal
                self._last = now


def _read(file: int) -> bytes:
    """What there is to read; nothing at the end, which a terminal tells by an error."""
    try:
        return os.read(file, 1 << 16)
    except OSError:
        return b""


def run(what: str, command: list[str]) -> int:
    """Runs a command, passes on what it prints; its exit status. A terminal stays one for it."""
    terminal = sys.stdout.isatty()
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # bytes as they come
    decoder = codecs.getincrementaldecoder(sys.stdout.encoding)("surrogateescape")
    seconds = SECONDS if AROUND in os.environ else SECONDS_AROUND
    # The command gets make's job server too: what was opened for us stays open for it.
    child = subprocess.Popen(
        command, stdout=theirs, close_fds=False, env={**os.environ, AROUND: "1"}
    )
    os.close(theirs)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    with progress(what, seconds=seconds) as bar:
        while True:
            if select.select([ours], [], [], 0.1)[0]:
                data = _read(ours)
                bar.write(decoder.decode(data, final=not data))
                if not data:
                    break
            elif child.poll() is not None:  # what it left running may keep the pipe open
                break
        status = child.wait()
    os.close(ours)
    return status


def main() -> int:
    """WHAT -- COMMAND..."""
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    print(f"  ... {sys.argv[1]}", flush=True)
    try:
        return run(sys.argv[1], sys.argv[3:])
    except KeyboardInterrupt:  # the command got it too
        return 130


if __name__ == "__main__":
    sys.exit(main())
