"""An OpenAI-compatible server in front of the C++ engine.

    python examples/engine/serve.py --engine build/engine/flashtile_engine --model FOLDER
        [--port 8000] [-- --pages 512 ...]

/v1/completions, /v1/chat/completions (both with streaming), /v1/models, /health, and /stats with
the engine's numbers. What is not served is refused with a sentence; no field is ignored. An engine
that dies is started again, at most 3 times a minute; then the server ends with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import secrets
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from api_error import ApiError
from engine_client import EngineEndedError, EngineError
from engine_supervisor import EngineSupervisor
from http_limits import PatientProtocol, QueueLimit, error_response, read_body, unless_gone
from openai_answers import Answer, Piece, error_event
from openai_requests import Body, ChatBody, CommonBody, CompletionBody, parse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from text_stream import TextStream

Events = AsyncGenerator[str, None]
Pieces = AsyncGenerator[Piece, None]


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, the request behind it has ended, too."""

    def __init__(self, events: Events, pieces: Pieces) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._generators: tuple[Events, Pieces] = (events, pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._generators:
                await generator.aclose()


class Prompts:
    """Prompts of requests, in a thread: what takes long keeps nobody else waiting."""

    def __init__(self, tokenizer: Any, max_seqlen: int) -> None:
        self._tokenizer = tokenizer
        # No token stands for more characters than it has in the vocabulary.
        longest = max(map(len, tokenizer.get_vocab()))
        self._most_characters = max_seqlen * longest
        self._thread = ThreadPoolExecutor(1)

    async def read(self, kind: type[Body], data: bytes) -> tuple[Body, list[int]]:
        """A request and the tokens of its prompt."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read, kind, data)

    def _read(self, kind: type[Body], data: bytes) -> tuple[Body, list[int]]:
        body = parse(kind, data)
        if isinstance(body, ChatBody):
            messages = body.conversation()
            self._check(sum(len(message["content"]) for message in messages), "messages")
            text = self._render(messages)
            self._check(len(text), "messages")
            return body, self._tokenizer(text, add_special_tokens=False).input_ids
        assert isinstance(body, CompletionBody)
        if not isinstance(body.prompt, str):
            return body, body.prompt
        self._check(len(body.prompt), "prompt")
        return body, self._tokenizer(body.prompt).input_ids

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # of jinja's, or whatever a template raises
            message = f"messages do not fit the model's chat template: {first_line(error)}"
            raise ApiError(400, message, param="messages") from None

    def _check(self, characters: int, name: str) -> None:
        most = self._most_characters
        if characters > most:
            message = f"{name} has {characters} characters; allowed: {most}, more never fit"
            raise ApiError(400, message, param=name, code="context_length_exceeded")


class Server:
    """The routes' work, over one engine and one tokenizer."""

    def __init__(
        self, arguments: argparse.Namespace, supervisor: EngineSupervisor, tokenizer: Any
    ) -> None:
        self._arguments = arguments
        self._supervisor = supervisor
        self._tokenizer = tokenizer
        self._prompts = Prompts(tokenizer, int(str(supervisor.ready["max_seqlen"])))
        self._model = arguments.model.resolve().name

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._complete(request, CompletionBody)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._complete(request, ChatBody)

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/ID."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._entry())

    async def health(self, _: Request) -> Response:
        """GET /health: 200 while an engine runs."""
        self._supervisor.engine()
        return JSONResponse({"status": "ok"})

    async def stats(self, _: Request) -> Response:
        """GET /stats."""
        return JSONResponse({**self._supervisor.ready, **await self._supervisor.engine().stats()})

    def _entry(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": 0, "owned_by": "local"}

    def _check_model(self, name: str) -> None:
        if name != self._model:
            message = f"model is {name[:100]}; allowed: {self._model}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _complete(self, request: Request, kind: type[CommonBody]) -> Response:
        arguments = self._arguments
        data = await read_body(request, arguments.max_body, arguments.body_seconds)
        return await unless_gone(request, self._answer(kind, data))

    async def _answer(self, kind: type[CommonBody], data: bytes) -> Response:
        self._supervisor.engine()  # without one nothing needs to be tokenized
        body, prompt = await self._prompts.read(kind, data)
        self._check_model(body.model)
        pieces = self._pieces(body, prompt)
        answer = Answer(body)
        if body.stream:
            first = await anext(pieces)  # a request that is refused is refused here, by its status
            return EventStream(self._events(answer, first, pieces), pieces)
        async with aclosing(pieces):
            return JSONResponse(answer.whole([piece async for piece in pieces]))

    async def _events(self, answer: Answer, first: Piece, rest: Pieces) -> Events:
        yield answer.chunk(first)
        last = first
        try:
            async for last in rest:
                yield answer.chunk(last)
        except EngineEndedError as error:
            yield error_event(unavailable(error))
        else:
            yield answer.end(last.usage)

    async def _pieces(self, body: CommonBody, prompt: list[int]) -> Pieces:
        request = {
            "prompt": prompt,
            "max_tokens": body.most_tokens(),
            "temperature": body.temperature,
            "top_p": body.top_p,
            "seed": secrets.randbits(32) if body.seed is None else body.seed,
            "stop": [self._tokenizer.eos_token_id],
        }
        text = TextStream(self._tokenizer, body.stop)
        count, reason = 0, "stop"
        async with aclosing(self._supervisor.engine().generate(request)) as lines:
            async for line in lines:
                if "token" not in line:
                    reason = line["finished"]
                    break
                count += 1
                yield Piece(text.push(line["token"]), [line["token"]])
                if text.stopped:
                    break
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "total_tokens": len(prompt) + count,
        }
        yield Piece(text.end(), [], reason, usage)


def unavailable(error: EngineEndedError) -> ApiError:
    """What requests get while there is no engine."""
    return ApiError(503, str(error), code="engine_ended")


def first_line(error: Exception) -> str:
    """One sentence of an exception that may say more."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


async def refused(request: Request, error: Exception) -> Response:
    """Every exception as an error of OpenAI's shape."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, EngineEndedError):
        return error_response(unavailable(error))
    if isinstance(error, EngineError):
        return error_response(ApiError(400, str(error)))
    if isinstance(error, HTTPException):
        asked = f"{request.method} {request.url.path[:100]}"
        return error_response(ApiError(error.status_code, f"there is no {asked}"))
    if isinstance(error, ApiError):
        return error_response(error)
    return error_response(ApiError(500, f"the server failed: {type(error).__name__}"))


def make_app(
    server: Server, supervisor: EngineSupervisor, arguments: argparse.Namespace
) -> Starlette:
    """The application."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await supervisor.close()

    expected = (ApiError, EngineError, EngineEndedError, ClientDisconnect, HTTPException, Exception)
    return Starlette(
        routes=[
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/health", server.health),
            Route("/stats", server.stats),
        ],
        middleware=[Middleware(QueueLimit, most=arguments.max_queue)],
        exception_handlers=dict.fromkeys(expected, refused),
        lifespan=lifespan,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; ValueError when it has none."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}/tokenizer.json: cannot be read")
    from transformers import AutoTokenizer  # noqa: PLC0415, seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder}: its tokenizer cannot be read: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: its tokenizer names no token that ends an answer")
    return tokenizer


def bind(host: str, port: int) -> socket.socket:
    """A socket that will listen there; ValueError when it cannot."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{host}:{port} cannot be listened at: {said}") from None
    return listener


async def run(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted or no engine stays alive; the exit status."""
    if not arguments.model.is_dir():
        raise ValueError(f"--model is {arguments.model}; allowed: a folder of export_model.py")
    listener = bind(arguments.host, arguments.port)
    supervisor = EngineSupervisor(arguments.engine, arguments.model, arguments.engine_options)
    uvicorn_server: uvicorn.Server | None = None

    def give_up() -> None:
        if uvicorn_server is not None:
            uvicorn_server.config.timeout_graceful_shutdown = 5
            uvicorn_server.should_exit = True

    try:
        await supervisor.start(give_up)
        tokenizer = await asyncio.to_thread(load_tokenizer, arguments.model)
        server = Server(arguments, supervisor, tokenizer)
        config = uvicorn.Config(
            make_app(server, supervisor, arguments),
            http=functools.partial(PatientProtocol, header_seconds=arguments.header_seconds),  # type: ignore[arg-type]
            log_level=arguments.log_level,
        )
        uvicorn_server = uvicorn.Server(config)
        host, port = listener.getsockname()[:2]
        logging.getLogger("uvicorn.error").info("http://%s:%d, Ctrl-C ends it", host, port)
        uvicorn_server.should_exit = supervisor.gave_up
        await uvicorn_server.serve(sockets=[listener])
        return 1 if supervisor.gave_up else 0
    finally:
        supervisor.kill()


def positive(text: str) -> float:
    """An argument that is a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def whole(text: str) -> int:
    """An argument that is a whole number above 0."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True, help="the executable")
    parser.add_argument("--model", type=Path, required=True, help="a folder of export_model.py")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--log-level", default="info", choices=uvicorn.config.LOG_LEVELS)
    parser.add_argument("--max-queue", type=whole, default=256, help="requests that run or wait")
    parser.add_argument("--max-body", type=whole, default=1 << 20, help="bytes of a request")
    parser.add_argument("--header-seconds", type=positive, default=10.0, help="for its header")
    parser.add_argument("--body-seconds", type=positive, default=60.0, help="for its body")
    parser.add_argument("engine_options", nargs="*", help="behind --: options of the engine")
    return parser.parse_args()


def main() -> int:
    """Exit status 1 with a sentence when it cannot serve, or no longer."""
    try:
        return asyncio.run(run(parse_arguments()))
    except (EngineEndedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # after everything has ended
        return 0


if __name__ == "__main__":
    sys.exit(main())
