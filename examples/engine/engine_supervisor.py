"""Keeps an engine running: one that dies is replaced."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from engine_client import EngineClient, EngineEndedError

MOST_RESTARTS = 3
PERIOD_SECONDS = 60.0
log = logging.getLogger("uvicorn.error")


class EngineSupervisor:
    """One engine at a time. A request while there is none raises EngineEndedError."""

    def __init__(self, executable: Path, model: Path, options: Sequence[str]) -> None:
        self._what = (executable, model, options)
        self._client: EngineClient | None = None
        self._restarts: deque[float] = deque()
        self._watcher: asyncio.Task[None] | None = None
        self.ready: dict[str, object] = {}
        self.gave_up = False

    async def start(self, on_giving_up: Callable[[], None]) -> None:
        """The first engine; EngineEndedError when it does not start. Others follow alone."""
        self._client = await EngineClient.start(*self._what)
        self.ready = self._client.ready
        self._watcher = asyncio.create_task(self._watch(on_giving_up))

    def engine(self) -> EngineClient:
        """The engine that is running."""
        if self._client is None or self._client.end is not None:
            raise EngineEndedError("the engine has ended and is being restarted")
        return self._client

    async def close(self) -> None:
        """Lets running requests finish, then the engine; it is not replaced any more."""
        client, self._client = self._client, None
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        if client is not None:
            await client.close()

    def kill(self) -> None:
        """Ends the engine at once."""
        if self._client is not None:
            self._client.kill()

    async def _watch(self, on_giving_up: Callable[[], None]) -> None:
        while self._client is not None:
            log.error("%s", await self._client.wait())
            self._client = await self._next_engine()
        log.error("the engine ended %d times within a minute: giving up", MOST_RESTARTS + 1)
        self.gave_up = True
        on_giving_up()

    async def _next_engine(self) -> EngineClient | None:
        while True:
            now = time.monotonic()
            while self._restarts and now - self._restarts[0] > PERIOD_SECONDS:
                self._restarts.popleft()
            if len(self._restarts) >= MOST_RESTARTS:
                return None
            self._restarts.append(now)
            try:
                client = await EngineClient.start(*self._what)
            except EngineEndedError as error:
                log.error("%s", error)
                continue
            log.warning("the engine was restarted")
            return client
