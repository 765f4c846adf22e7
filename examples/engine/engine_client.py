"""The engine as a child process of an asyncio program: its lines, sorted by request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from asyncio import Queue, StreamReader
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

LONGEST_LINE = 1 << 20  # of the engine; its lines are short, and those that quote cut the quotation
LONGEST_REQUEST = 1 << 24  # bytes of a line that the engine takes (protocol.h)
NICENESS = 5  # above the server's: whoever asks hears something while the engine computes
ENDING_SECONDS = 0.5  # between the end of its output and its own
KEPT_WORDS = 4096  # bytes of standard error that say why an engine did not start


class EngineError(Exception):
    """A request that the engine refused; the text is its sentence."""


class EngineEndedError(Exception):
    """The engine is no more; the text says why."""


class EngineClient:
    """Talks to one engine. Requests may run at the same time."""

    def __init__(self, process: Process, errors: asyncio.Task[bytes]) -> None:
        self.ready: dict[str, Any] = {}
        self.end: str | None = None  # why the engine ended, as soon as it has
        self._process = process
        self._errors = errors
        self._lines: dict[str, Queue[dict[str, Any]]] = {}
        self._asking: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._ids = itertools.count()
        self._closing = False
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, executable: Path, model: Path, options: Sequence[str]) -> EngineClient:
        """Starts an engine and waits for its model; EngineEndedError when it does not start."""
        # torch and flashtile bring an OpenMP runtime each: one's threads must not spin while the
        # other's work. A session of its own: Ctrl-C is for the server, which lets requests finish.
        try:
            process = await asyncio.create_subprocess_exec(
                *(str(executable), "--model", str(model), *options),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                limit=LONGEST_LINE,
                env={"OMP_WAIT_POLICY": "passive", **os.environ},
                start_new_session=True,
            )
        except OSError as error:
            raise EngineEndedError(f"{executable} cannot be started: {error.strerror}") from None
        # Threads that it starts later inherit it.
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, process.pid, min(own + NICENESS, 19))
        assert process.stderr is not None
        loaded = asyncio.Event()
        client = cls(process, asyncio.create_task(_pass_on(process.stderr, loaded)))
        try:
            await client._wait_until_loaded()
        except BaseException:
            client.kill()
            raise
        loaded.set()
        client._reader = asyncio.create_task(client._read())
        return client

    async def generate(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The lines of a request: tokens, then the one that says why it finished.

        Closing the iterator early cancels the request. EngineError when it is refused,
        EngineEndedError when the engine ends before it.
        """
        name = str(next(self._ids))
        queue = self._lines[name] = Queue()
        running = False
        try:
            self._write({"id": name, **request})
            running = True
            await self._drain()
            while running:
                line = await queue.get()
                running = "token" in line
                if "end" in line:
                    raise EngineEndedError(line["end"])
                if "error" in line:
                    raise EngineError(line["error"])
                yield line
        finally:
            del self._lines[name]
            if running and self.end is None:
                self._write({"cancel": name})  # waits for nothing: we may be cancelled

    async def stats(self) -> dict[str, Any]:
        """The engine's numbers of now."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._write({"stats": True})
        self._asking.append(future)
        await self._drain()
        return await future

    async def wait(self) -> str:
        """Until the engine has ended; why."""
        assert self._reader is not None
        await asyncio.wait({self._reader})
        return self.end or "the engine has ended"

    async def close(self) -> None:
        """Lets running requests finish, then the engine."""
        self._closing = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self.wait()

    def kill(self) -> None:
        """Ends the engine at once."""
        if self._process.returncode is None:
            self._process.kill()

    async def _wait_until_loaded(self) -> None:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            words = (await self._errors).decode(errors="replace").strip().splitlines()
            said = f": {words[-1]}" if words else ""
            raise EngineEndedError(f"{_how_it_ended(await self._process.wait())}{said}")
        self.ready = json.loads(line)["ready"]

    def _write(self, message: dict[str, Any]) -> None:
        line = json.dumps(message)
        if len(line) > LONGEST_REQUEST:
            raise EngineError(f"the request has {len(line)} bytes; allowed: {LONGEST_REQUEST}")
        if self.end is not None:
            raise EngineEndedError(self.end)
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(line.encode() + b"\n")

    async def _drain(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # its end is on its way to everybody who waits
            await self._process.stdin.drain()

    async def _read(self) -> None:
        """Hands lines out until the engine ends, then its end to everybody who waits."""
        assert self._process.stdout is not None
        reason = None
        try:
            while text := await _next_line(self._process.stdout):
                self._take(json.loads(text))
        except EngineEndedError as error:
            reason = str(error)
        except (ValueError, KeyError, TypeError):
            reason = f"the engine wrote {text[:80]!r}, which is no line of its protocol"
        if reason is not None:
            self.kill()
        self.end = reason or _how_it_ended(await self._status())
        assert self._process.stdin is not None
        self._process.stdin.close()
        for queue in self._lines.values():
            queue.put_nowait({"end": self.end})
        for future in self._asking:
            if not future.done():
                future.set_exception(EngineEndedError(self.end))

    async def _status(self) -> int:
        """How it ended, after its output has."""
        if not self._closing:
            try:
                return await asyncio.wait_for(self._process.wait(), ENDING_SECONDS)
            except asyncio.TimeoutError:  # it closed its output alone
                self.kill()
        return await self._process.wait()

    def _take(self, line: dict[str, Any]) -> None:
        if "stats" in line:
            future = self._asking.popleft() if self._asking else None  # the last is unasked
            if future and not future.done():  # whoever asked may have gone away
                future.set_result(line["stats"])
        elif line["id"] in self._lines:  # else it was cancelled
            self._lines[line["id"]].put_nowait(line)


async def _next_line(output: StreamReader) -> bytes:
    try:
        line = await output.readline()
    except ValueError:
        raise EngineEndedError(
            f"the engine wrote a line of more than {LONGEST_LINE} bytes, which no reader keeps"
        ) from None
    await asyncio.sleep(0)  # lines that came together must not keep everybody else waiting
    return line


async def _pass_on(errors: StreamReader, loaded: asyncio.Event) -> bytes:
    """Standard error, passed on once the model is loaded; what was written before, at its end."""
    kept = b""
    while words := await errors.read(KEPT_WORDS):
        kept = (kept + words)[-KEPT_WORDS:]
        if loaded.is_set():
            sys.stderr.buffer.write(kept)
            sys.stderr.buffer.flush()
            kept = b""
    return kept


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"the engine ended with status {status}"
    try:
        return f"the engine was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"the engine was ended by signal {-status}"
