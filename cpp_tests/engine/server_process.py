"""examples/engine/serve.py as a child process, with a small model, and what a client says to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE_FOLDER = Path(__file__).resolve().parents[2] / "examples" / "engine"
JSON = {"Content-Type": "application/json"}
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A token for every printable ASCII character, and the one that ends an answer."""
    from tokenizers import Tokenizer, decoders, models  # noqa: PLC0415, an optional part
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    characters = [chr(code) for code in range(32, 127)]
    others = [f"<{i}>" for i in range(vocab_size - len(characters) - 1)]
    vocab = {text: i for i, text in enumerate(["<eos>", *characters, *others])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(folder)


@dataclass
class Response:
    """What came back."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The sentence of an error of OpenAI's shape; AssertionError when it is another one."""
        return message_of(self.json)


def message_of(data: Any) -> str:
    """The sentence of an error of OpenAI's shape, one line."""
    assert data.keys() == {"error"}, data
    error = data["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    message = error["message"]
    assert isinstance(message, str)
    assert message
    assert "\n" not in message
    return message


class ServerProcess:
    """A running server. Used in a `with`, which ends it at once."""

    def __init__(self, command: list[str], **options: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        at = command.index("--") if "--" in command else len(command)
        command[at:at] = ["--port", str(self.port), "--log-level", "warning"]
        self.process = subprocess.Popen(
            [sys.executable, str(ENGINE_FOLDER / "serve.py"), *command], **options
        )

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        engines = self.engines()
        self.process.kill()
        self.process.wait()
        for engine in engines:
            try_kill(engine)

    def wait_until_healthy(self) -> None:
        """Until it answers, with an engine."""
        while self.get("/health").status != 200:
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.02)

    def get(self, path: str) -> Response:
        """GET; status 0 while nobody listens."""
        return self._ask(urllib.request.Request(self.url(path)))

    def post(self, path: str, body: Any) -> Response:
        """POST of JSON, or of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask(urllib.request.Request(self.url(path), data, JSON))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def engines(self) -> list[int]:
        """Processes of its engine: one, or none."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(child) for file in children for child in file.read_text().split()]

    def kill_engine(self) -> None:
        """As when memory has run out."""
        (engine,) = self.engines()
        try_kill(engine)

    @contextmanager
    def stopped_engine(self) -> Iterator[None]:
        """The engine does nothing meanwhile, as if a step took that long."""
        (engine,) = self.engines()
        os.kill(engine, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(engine, signal.SIGCONT)

    @staticmethod
    def _ask(request: urllib.request.Request) -> Response:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Response(response.status, response.read())
        except urllib.error.HTTPError as error:
            return Response(error.code, error.read())
        except urllib.error.URLError:
            return Response(0, b"")


def try_kill(process: int) -> None:
    """SIGKILL to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@asynccontextmanager
async def connection(
    port: int, data: bytes
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which these bytes were sent. Leaving closes it, whatever was read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        yield reader, writer
    finally:
        writer.transport.abort()


def http_request(path: str, body: Any) -> bytes:
    """A request whose connection ends with the answer; HTTP 1.0, whose answers have no chunks."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


async def read_head(reader: asyncio.StreamReader) -> int:
    """The status; the headers are skipped."""
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    return status


async def events(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """The events of a stream; "[DONE]" as it is."""
    async for line in reader:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield "[DONE]" if data == b"[DONE]" else json.loads(data)
