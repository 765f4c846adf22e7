"""The engine as a child process: lines in, lines out."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any, cast


class EngineProcess:
    """A running engine. Used in a `with`, which ends its input and waits for it."""

    def __init__(self, executable: str, folder: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [executable, "--model", str(folder), "--device", "cpu", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finished: dict[str, dict[str, Any]] = {}
        self.errors: list[tuple[str | None, str]] = []
        self.stats: dict[str, Any] = {}
        self.ready = self._line()["ready"]

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def send(self, *messages: dict[str, Any] | str) -> None:
        """Messages, or lines as they are; the engine takes all of them between two steps."""
        assert self.process.stdin is not None
        lines = [line if isinstance(line, str) else json.dumps(line) for line in messages]
        self.process.stdin.write("".join(line + "\n" for line in lines))
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Waits for a line and keeps what it says."""
        line = self._line()
        if "token" in line:
            assert line["index"] == len(self.tokens[line["id"]])
            self.tokens[line["id"]].append(line["token"])
        elif "finished" in line:
            self.finished[line["id"]] = line
        elif "error" in line:
            self.errors.append((line["id"], line["error"]))
        else:
            self.stats = line["stats"]
        return line

    def wait_for_tokens(self, name: str, count: int) -> None:
        """Until a request has at least `count` tokens."""
        while len(self.tokens[name]) < count:
            self.receive()

    def wait_until_finished(self, *names: str) -> None:
        """Until all of these are."""
        while not set(names) <= self.finished.keys():
            self.receive()

    def ask_stats(self) -> dict[str, Any]:
        """Numbers of now."""
        self.send({"stats": True})
        while "stats" not in self.receive():
            pass
        return self.stats

    def end(self) -> None:
        """Ends the input and reads the rest; the engine must leave by itself, without an error."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
            while True:
                if "stats" in self.receive():
                    break
        assert self.process.wait(timeout=60) == 0

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the engine ended"
        return cast(dict[str, Any], json.loads(line))
