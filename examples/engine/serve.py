"""An OpenAI-compatible server in front of the C++ engine.

    python examples/engine/serve.py --engine build/engine/flashtile_engine --model FOLDER
        [--port 8000] [-- --pages 512 ...]

/v1/completions, /v1/chat/completions (both with streaming), /v1/models, and /stats with the
engine's numbers. What is not served is refused with a sentence; no field is ignored.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from engine_client import EngineClient, EngineError
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from text_stream import TextStream
from transformers import AutoTokenizer

# Numbers that JSON lines can carry: the engine cannot say whose a line was that it could not read.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class CommonBody(BaseModel):
    """Fields of both kinds of request, named as OpenAI names them."""

    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: Finite = 1.0
    top_p: Finite = 1.0
    seed: Int64 | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    return_token_ids: bool = (
        False  # not OpenAI's: every choice then has the token_ids it stands for
    )


class CompletionBody(CommonBody):
    prompt: str | list[Int64]
    max_tokens: Int64 = 16


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class ChatBody(CommonBody):
    messages: list[Message] = Field(min_length=1)
    max_tokens: Int64 = 256
    max_completion_tokens: Int64 | None = None


@dataclass
class Piece:
    """Text of one or several tokens; the last one of an answer says why it ended."""

    text: str
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, int] | None = None


@dataclass
class Answer:
    """How an answer is written down: as a completion or as a chat, whole or in chunks."""

    body: CommonBody
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The response without streaming."""
        kind = "chat.completion" if self.chat else "text_completion"
        content = {"message": {"role": "assistant", "content": piece.text}}
        choice = content if self.chat else {"text": piece.text}
        return {**self._frame(kind), "choices": [self._choice(choice, piece)], "usage": piece.usage}

    def chunk(self, piece: Piece) -> str:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        delta = {"delta": {"role": "assistant", "content": piece.text}}
        choice = delta if self.chat else {"text": piece.text}
        return self._event({**self._frame(kind), "choices": [self._choice(choice, piece)]})

    def end(self, usage: dict[str, int] | None) -> str:
        """The last events of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        asked = self.body.stream_options.include_usage
        event = {**self._frame(kind), "choices": [], "usage": usage}
        return (self._event(event) if asked else "") + "data: [DONE]\n\n"

    def _frame(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.body.model,
        }

    def _choice(self, content: dict[str, Any], piece: Piece) -> dict[str, Any]:
        ids = {"token_ids": piece.tokens} if self.body.return_token_ids else {}
        return {
            "index": 0,
            "finish_reason": piece.finish_reason,
            "logprobs": None,
            **content,
            **ids,
        }

    @staticmethod
    def _event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data)}\n\n"


class Server:
    """The routes' work, over one engine and one tokenizer."""

    def __init__(self, engine: EngineClient, tokenizer: Any, model: str) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model = model

    async def complete(self, body: CompletionBody) -> Any:
        """POST /v1/completions."""
        text = body.prompt
        tokens = self.tokenizer(text).input_ids if isinstance(text, str) else text
        return await self._answer(Answer(body, chat=False), tokens, body.max_tokens)

    async def chat(self, body: ChatBody) -> Any:
        """POST /v1/chat/completions."""
        text = self.tokenizer.apply_chat_template(
            [message.model_dump() for message in body.messages],
            tokenize=False,
            add_generation_prompt=True,
        )
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        most = body.max_completion_tokens
        most = body.max_tokens if most is None else most
        return await self._answer(Answer(body, chat=True), tokens, most)

    async def _answer(self, answer: Answer, prompt: list[int], max_tokens: int) -> Any:
        body = answer.body
        if body.model != self.model:
            raise EngineError(f"model is {body.model}; allowed: {self.model}")
        request = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "seed": secrets.randbits(32) if body.seed is None else body.seed,
            "stop": [self.tokenizer.eos_token_id],
        }
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        pieces = self._pieces(request, stops)
        first = await anext(pieces)  # a request that is refused is refused here, with its status
        if body.stream:
            return StreamingResponse(
                self._events(answer, first, pieces), media_type="text/event-stream"
            )
        whole = first
        async for piece in pieces:
            text, tokens = whole.text + piece.text, whole.tokens + piece.tokens
            whole = Piece(text, tokens, piece.finish_reason, piece.usage)
        return answer.whole(whole)

    async def _events(
        self, answer: Answer, first: Piece, rest: AsyncIterator[Piece]
    ) -> AsyncIterator[str]:
        yield answer.chunk(first)
        last = first
        async with aclosing(rest):  # a client that goes away cancels the request
            async for last in rest:
                yield answer.chunk(last)
        yield answer.end(last.usage)

    async def _pieces(self, request: dict[str, Any], stops: list[str]) -> AsyncIterator[Piece]:
        text = TextStream(self.tokenizer, stops)
        count, reason = 0, "stop"
        async with aclosing(self.engine.generate(request)) as lines:
            async for line in lines:
                if "token" not in line:
                    reason = line["finished"]
                    break
                count += 1
                yield Piece(text.push(line["token"]), [line["token"]])
                if text.stopped:
                    break
        prompt = len(request["prompt"])
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "total_tokens": prompt + count,
        }
        yield Piece(text.end(), [], reason, usage)


def error_response(message: str) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=400)


def make_app(arguments: argparse.Namespace) -> FastAPI:
    """The application; the engine lives as long as it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = await EngineClient.start(
            arguments.engine, arguments.model, arguments.engine_options
        )
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        app.state.server = Server(engine, tokenizer, arguments.model.resolve().name)
        yield
        await engine.close()

    app = FastAPI(title="flashtile engine", lifespan=lifespan)

    @app.exception_handler(EngineError)
    async def refused(_: Request, error: EngineError) -> JSONResponse:
        return error_response(str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return error_response(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> Any:
        return await app.state.server.complete(body)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody) -> Any:
        return await app.state.server.chat(body)

    @app.get("/v1/models")
    async def models() -> Any:
        entry = {"id": app.state.server.model, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [entry]}

    @app.get("/stats")
    async def stats() -> Any:
        return {**app.state.server.engine.ready, **await app.state.server.engine.stats()}

    return app


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True, help="the executable")
    parser.add_argument("--model", type=Path, required=True, help="a folder of export_model.py")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("engine_options", nargs="*", help="behind --: options of the engine")
    arguments = parser.parse_args()
    uvicorn.run(
        make_app(arguments),
        host=arguments.host,
        port=arguments.port,
        log_level=arguments.log_level,
    )


if __name__ == "__main__":
    main()
