"""The engine as a child process of an asyncio program: its lines, sorted by request."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from asyncio import Queue
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any


class EngineError(Exception):
    """A request that the engine refused; the text is its sentence."""


class EngineClient:
    """Talks to one engine. Requests may run at the same time."""

    def __init__(self, process: Process, ready: dict[str, Any]) -> None:
        self.ready = ready
        self._process = process
        self._lines: dict[str, Queue[dict[str, Any]]] = {}
        self._asking: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._ids = itertools.count()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, executable: Path, model: Path, options: Sequence[str]) -> EngineClient:
        """Starts an engine and waits until its model is loaded."""
        # torch and flashtile bring an OpenMP runtime each: one's threads must not spin while the
        # other's work.
        process = await asyncio.create_subprocess_exec(
            *(executable, "--model", model, *options),
            stdin=PIPE,
            stdout=PIPE,
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise EngineError(f"{executable} did not start; it says why on standard error")
        return cls(process, json.loads(line)["ready"])

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The lines of a request: tokens, then the one that says why it finished.

        Closing the iterator early cancels the request. EngineError when it is refused.
        """
        name = str(next(self._ids))
        queue = self._lines[name] = Queue()
        finished = False
        try:
            await self._send({"id": name, **request})
            while not finished:
                line = await queue.get()
                finished = "token" not in line
                if "error" in line:
                    raise EngineError(line["error"])
                yield line
        finally:
            del self._lines[name]
            if not finished:
                await self._send({"cancel": name})

    async def stats(self) -> dict[str, Any]:
        """The engine's numbers of now."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asking.append(future)
        await self._send({"stats": True})
        return await future

    async def close(self) -> None:
        """Lets running requests finish, then the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reader

    async def _send(self, message: dict[str, Any]) -> None:
        if self._process.returncode is not None:
            raise EngineError("the engine has ended")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        await self._process.stdin.drain()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for text in self._process.stdout:
            line = json.loads(text)
            if "stats" in line:
                future = self._asking.popleft() if self._asking else None  # the last is unasked
                if future and not future.done():  # whoever asked may have gone away
                    future.set_result(line["stats"])
            elif line["id"] in self._lines:  # else it was cancelled
                self._lines[line["id"]].put_nowait(line)
        for queue in self._lines.values():
            queue.put_nowait({"error": "the engine has ended"})
        for future in self._asking:
            future.set_exception(EngineError("the engine has ended"))
