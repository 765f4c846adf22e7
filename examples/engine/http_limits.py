"""What a client may take of the server: seconds, bytes, places in the queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

import h11
from api_error import ApiError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

# A body that is too long is read to its end, up to here: a client that is still writing would not
# see the answer.
MOST_DISCARDED = 1 << 26

Result = TypeVar("Result")


def error_response(error: ApiError) -> Response:
    """The response of an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


class QueueLimit:
    """Lets so many requests for completions in at once; an application around the application."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._inside >= self._most:
            message = f"{self._inside} requests run or wait already; allowed: {self._most}"
            await error_response(ApiError(429, message))(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body; ApiError when it is too long or does not come in time."""
    declared = int(request.headers.get("content-length", 0))
    too_long = ApiError(413, f"the body is too long; allowed: {most} bytes")
    if declared > (most if "expect" in request.headers else MOST_DISCARDED):
        raise too_long
    try:
        body = await asyncio.wait_for(_collect(request, most), seconds)
    except asyncio.TimeoutError:
        message = f"the body did not come within {seconds:g} seconds, which are allowed"
        raise ApiError(408, message) from None
    if body is None:
        raise too_long
    return body


async def _collect(request: Request, most: int) -> bytes | None:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
        elif size > MOST_DISCARDED:
            break
        else:
            chunks.clear()
    return b"".join(chunks) if size <= most else None


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work, which ends when its client goes away: ClientDisconnect."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
        await asyncio.wait({task, watcher})


class PatientProtocol(H11Protocol):
    """HTTP of uvicorn, with a limit on the seconds that a header may take."""

    def __init__(self, *args: Any, header_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_seconds = header_seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused like everything else."""
        self._refuse(ApiError(400, msg))

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._header_seconds, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        begun, _ = self.conn.trailing_data
        if begun:
            message = f"the header did not come within {self._header_seconds:g} seconds"
            self._refuse(ApiError(408, f"{message}, which are allowed"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        reason = HTTPStatus(error.status).phrase.encode()
        response = h11.Response(status_code=error.status, headers=headers, reason=reason)
        for part in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()
