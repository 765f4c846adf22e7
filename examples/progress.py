"""Says every few seconds that something long still runs, for how long, and how far it is.

    with progress("eager attention", 64) as bar:
        ...
        bar.step()

On a terminal one line that is written again and again and leaves no trace, elsewhere a line each
time. As a program, around a command that is silent for long; the exit status is the command's:

    python examples/progress.py "building" -- cmake --build build
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import TracebackType

SECONDS = 2.0  # between two lines
SECONDS_ON_TERMINAL = 0.5


class progress:  # noqa: N801, reads as a statement
    """Reports from a thread of its own, so what runs need not come back to it."""

    def __init__(self, what: str, total: int = 0) -> None:
        self._done = 0
        self._what = what
        self._total = total
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._terminal = sys.stdout.isatty()
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
        if self._terminal:
            print("\r\x1b[K", end="", flush=True)

    def step(self, *_: object) -> None:
        """One more of the total is done; takes any arguments, as a callback."""
        self._done += 1

    def _report(self) -> None:
        while not self._ended.wait(SECONDS_ON_TERMINAL if self._terminal else SECONDS):
            count = f"{self._done} of {self._total}, " if self._total else ""
            line = f"  ... {self._what}: {count}{time.monotonic() - self._start:.0f} s"
            print(f"\r{line}\x1b[K" if self._terminal else f"{line}\n", end="", flush=True)


def main() -> int:
    """WHAT -- COMMAND..."""
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    print(f"  ... {sys.argv[1]}", flush=True)
    with progress(sys.argv[1]):
        return subprocess.run(sys.argv[3:], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
