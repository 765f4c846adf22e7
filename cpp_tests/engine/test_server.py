"""The OpenAI-compatible server of examples/engine, with a small model.

FLASHTILE_ENGINE names the engine; ctest builds it from the installed package.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from server_process import (
    ENGINE_FOLDER,
    Response,
    ServerProcess,
    connection,
    events,
    http_request,
    message_of,
    read_head,
    write_tokenizer,
)
from tiny_llama import CONFIG, make_tensors

pytest.importorskip("safetensors", reason="safetensors, which writes the checkpoint, is missing")
pytest.importorskip("starlette", reason="starlette, which the server needs, is missing")
pytest.importorskip("uvicorn", reason="uvicorn, which the server needs, is missing")
pytest.importorskip("transformers", reason="transformers, which the server needs, is missing")
sys.path.append(str(ENGINE_FOLDER))
from export_model import write_checkpoint
from openai_requests import CompletionBody
from serve import Prompts

EXECUTABLE = os.environ.get("FLASHTILE_ENGINE", "")
pytestmark = pytest.mark.skipif(
    not Path(EXECUTABLE).is_file(), reason="FLASHTILE_ENGINE names no executable: it was not built"
)
MODEL = "tiny"
LONG = 100  # tokens
ENDLESS = 60000  # that nobody waits for
# The small model never ends an answer of these by itself.
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "abc", "temperature": 0}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "abc"}],
    "temperature": 0,
    "max_tokens": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("model") / MODEL
    write_checkpoint(result, {**CONFIG, "max_position_embeddings": ENDLESS}, make_tensors())
    write_tokenizer(result, CONFIG["vocab_size"])
    return result


def command(folder: Path, *options: str) -> list[str]:
    """Arguments of serve.py; options of the engine behind --."""
    return ["--engine", EXECUTABLE, "--model", str(folder), *options]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    limits = ("--max-queue", "4", "--max-body", "100000")
    limits += ("--header-seconds", "1", "--body-seconds", "2", "--", "--max-seqlen", "128")
    errors = folder.parent / "errors"
    with (
        errors.open("w") as stderr,
        ServerProcess(command(folder, *limits), stderr=stderr, start_new_session=True) as result,
    ):
        result.wait_until_healthy()
        yield result
        assert "Traceback" not in errors.read_text()


def wait_until_idle(server: ServerProcess) -> dict[str, Any]:
    """Until no request runs; the engine's numbers then."""
    while True:
        stats: dict[str, Any] = server.get("/stats").json
        if stats["running"] == stats["waiting"] == 0:
            return stats


# Fields


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(
            ("stop", "temperature", "top_p", "seed", "n", "stream", "stream_options", "user")
        ),
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"},
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "stop": []},
        {"temperature": 1, "top_p": 1, "seed": 5},
        {"store": False, "service_tier": "auto"},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(
    server: ServerProcess, fields: dict[str, Any]
) -> None:
    neutral = {"best_of": 1, "echo": False, "logprobs": None, "suffix": None}
    assert server.post("/v1/completions", {**COMPLETION, **neutral, **fields}).status == 200
    neutral = {"logprobs": False, "tools": [], "response_format": {"type": "text"}}
    assert server.post("/v1/chat/completions", {**CHAT, **neutral, **fields}).status == 200


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        *(
            ("/v1/completions", *item)
            for item in {"logprobs": 0, "best_of": 2, "echo": True}.items()
        ),
        *(
            ("/v1/chat/completions", *item)
            for item in {
                "n": 2,
                "frequency_penalty": 0.5,
                "presence_penalty": False,
                "logit_bias": {"5": 1},
                "logprobs": True,
                "top_logprobs": 2,
                "response_format": {"type": "json_object"},
                "tools": [{"type": "function"}],
                "tool_choice": "required",
                "store": True,
                "beams": 4,
                "stop": 5,
                "temperature": "hot",
                "top_p": 1.5,
                "max_tokens": 0,
                "stream_options": {"include_usage": True, "more": 1},
            }.items()
        ),
    ],
)
def test_fields_that_are_not_served_are_refused_by_name(
    server: ServerProcess, path: str, name: str, value: Any
) -> None:
    base = CHAT if "chat" in path else COMPLETION
    response = server.post(path, {**base, name: value})
    assert response.status == 400
    assert name in response.message


def test_messages_may_be_of_developers_and_in_parts(server: ServerProcess) -> None:
    def answer(messages: list[dict[str, Any]]) -> Any:
        response = server.post("/v1/chat/completions", {**CHAT, "messages": messages})
        return response.json["choices"][0]["message"]["content"]

    plain = [{"role": "system", "content": "xy"}, {"role": "user", "content": "abc"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]
    assert answer(plain) == answer(
        [{"role": "developer", "content": "xy"}, {"role": "user", "content": parts, "name": None}]
    )
    for wrong, name in (
        ([{"type": "image_url", "image_url": {"url": "x"}}], "image_url"),
        (17, "content"),
    ):
        body = {**CHAT, "messages": [{"role": "user", "content": wrong}]}
        response = server.post("/v1/chat/completions", body)
        assert response.status == 400
        assert name in response.message
    body = {**CHAT, "messages": [{"role": "user", "content": "a", "name": "bob"}]}
    assert "name" in server.post("/v1/chat/completions", body).message


def test_stop_temperature_and_seed_are_served(server: ServerProcess) -> None:
    def text(**fields: Any) -> Any:
        response = server.post("/v1/completions", {**COMPLETION, "max_tokens": 30, **fields})
        return response.json["choices"][0]["text"]

    greedy = text()
    assert text(stop=greedy[5:8]) == greedy[: greedy.index(greedy[5:8])]
    assert text(temperature=1, seed=3) == text(temperature=1, seed=3) != greedy
    assert text(temperature=1, top_p=0) == greedy
    assert text(prompt=["abc"]) == text(prompt=[[66, 67, 68]]) == greedy


def test_a_model_is_found_by_its_name(server: ServerProcess) -> None:
    (listed,) = server.get("/v1/models").json["data"]
    assert server.get(f"/v1/models/{MODEL}").json == listed
    assert server.get("/v1/models/other").status == 404
    assert "allowed: tiny" in server.get("/v1/models/other").message
    assert server.post("/v1/completions", {**COMPLETION, "model": "other"}).status == 404


# Bad input


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"model": "tiny", "prompt": "\\ud800"}', "the body is no JSON: "),
        (b'{"model": "tiny", "prompt": "\xff"}', "the body is no JSON: "),
        (b"[" * 50000 + b"]" * 50000, "the body is no JSON: "),
        (b'{"a":' * 10000 + b"1" + b"}" * 10000, "the body is no JSON: "),
        (b"", "the body is no JSON: "),
        (b"[]", "the body is no JSON object"),
        (b'{"model": "tiny"}', "prompt is missing"),
        (b'{"model": "tiny", "prompt": [1, 2.5]}', "prompt is [1, 2.5]; allowed: one text"),
        (b'{"model": "tiny", "prompt": ["a", "b"]}', 'prompt is ["a", "b"]; allowed: one text'),
        (b'{"model": "tiny", "prompt": [160]}', "prompt has 160; allowed: tokens, 0 to 159"),
        (b'{"model": "tiny", "prompt": "a", "top_p": 2}', "top_p is 2.0; allowed: 0 to 1"),
        (
            b'{"model": "tiny", "prompt": "a", "max_tokens": 0}',
            "max_tokens is 0; allowed: 1 to 1073741824",
        ),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature is NaN: "),
        (b'{"model": "tiny", "prompt": "%s"}' % (b"ab" * 2000), "prompt has 4000 characters"),
        (b'{"model": "tiny", "prompt": "%s"}' % (b"ab" * 100), "prompt has 200 tokens"),
    ],
)
def test_bad_requests_get_one_sentence(server: ServerProcess, body: bytes, sentence: str) -> None:
    response = server.post("/v1/completions", body)
    assert response.status == 400
    assert response.message.startswith(sentence)


def test_other_paths_are_errors_of_the_same_shape(server: ServerProcess) -> None:
    assert server.get("/v1/nothing").status == 404
    assert server.get("/v1/nothing").message == "there is no GET /v1/nothing"
    assert server.get("/v1/completions").status == 405
    assert server.get("/v1/completions").message == "there is no GET /v1/completions"


# Limits


def test_a_long_body_is_refused_whichever_way_it_comes(server: ServerProcess) -> None:
    body = {**COMPLETION, "prompt": "ab " * 3_500_000}
    response = server.post("/v1/completions", body)
    assert response.status == 413
    assert response.message == "the body is too long; allowed: 100000 bytes"

    async def chunked() -> tuple[int, bytes]:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        data = head + (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 300 + b"0\r\n\r\n"
        async with connection(server.port, data) as (reader, _):
            return await read_head(reader), await reader.read()

    status, rest = asyncio.run(chunked())
    assert status == 413
    assert b"allowed: 100000 bytes" in rest


@pytest.mark.parametrize(
    ("data", "status", "sentence"),
    [
        (b"POST /v1/completions HTTP/1.1\r\nHost: a", 408, "the header did not come within 1 sec"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{",
            408,
            "the body did not come within 2 seconds",
        ),
        (b"nonsense\r\n\r\n", 400, "Invalid HTTP request"),
    ],
)
def test_half_a_request_is_not_kept(
    server: ServerProcess, data: bytes, status: int, sentence: str
) -> None:
    async def ask() -> tuple[int, bytes]:
        async with connection(server.port, data) as (reader, _):
            return await read_head(reader), await reader.read()

    got, body = asyncio.run(asyncio.wait_for(ask(), 30))
    assert got == status
    assert message_of(json.loads(body)).startswith(sentence)


def test_a_silent_connection_is_closed(server: ServerProcess) -> None:
    async def ask() -> bytes:
        async with connection(server.port, b"") as (reader, _):
            return await reader.read()

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == b""


def test_a_full_queue_says_so(server: ServerProcess) -> None:
    """Four requests whose bodies do not end; the places are free again when they have gone."""
    half = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"

    async def ask() -> Response:
        async with AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(connection(server.port, half))
            response = await asyncio.to_thread(server.post, "/v1/completions", COMPLETION)
            assert (await asyncio.to_thread(server.get, "/health")).status == 200
            return response

    while (response := asyncio.run(ask())).status == 200:  # it was quicker than the four
        pass
    assert response.status == 429
    assert response.message == "4 requests run or wait already; allowed: 4"
    while server.post("/v1/completions", COMPLETION).status == 429:
        time.sleep(0.02)
    assert server.post("/v1/completions", COMPLETION).status == 200


class SlowTokenizer:
    """Waits until somebody lets it go."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def __call__(self, text: str) -> Any:
        self.entered.set()
        assert self.go.wait(10), "the event loop waited for the tokenizer"
        return SimpleNamespace(input_ids=[0] * len(text))


def test_the_event_loop_does_not_wait_for_the_tokenizer() -> None:
    tokenizer = SlowTokenizer()

    async def ask() -> list[int]:
        prompts = Prompts(tokenizer, max_seqlen=8)
        task = asyncio.create_task(
            prompts.read(CompletionBody, b'{"model": "tiny", "prompt": "aaa"}')
        )
        while not tokenizer.entered.is_set():
            await asyncio.sleep(0.01)
        tokenizer.go.set()
        _, tokens = await task
        return tokens

    assert asyncio.run(ask()) == [0, 0, 0]


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server: ServerProcess, stream: bool) -> None:
    before = wait_until_idle(server)
    body = {**COMPLETION, "max_tokens": LONG, "stream": stream}

    async def leave() -> None:
        async with connection(server.port, http_request("/v1/completions", body)):
            await asyncio.sleep(0.5)

    with server.stopped_engine():
        asyncio.run(leave())
        time.sleep(0.2)
    while (after := wait_until_idle(server))["cancelled"] == before["cancelled"]:
        assert after["finished"] == before["finished"]
    assert after["generated_tokens"] < before["generated_tokens"] + LONG
    assert after["pages_in_use"] == 0


# The engine's end


async def read_stream(port: int, body: dict[str, Any]) -> list[Any]:
    """All events of a stream."""
    async with connection(port, http_request("/v1/completions", body)) as (reader, _):
        assert await read_head(reader) == 200
        return [event async for event in events(reader)]


def test_requests_get_an_error_when_the_engine_dies_and_others_are_served(folder: Path) -> None:
    """Streaming and not; the server gives up at the fourth death in a minute."""
    long = ("--", "--max-seqlen", str(ENDLESS), "--pages", "4096")
    with ServerProcess(command(folder, *long), stderr=subprocess.PIPE, text=True) as server:
        server.wait_until_healthy()
        before = server.post("/v1/completions", {**COMPLETION, "max_tokens": LONG}).json
        body = {**COMPLETION, "max_tokens": ENDLESS - 10}

        async def kill_during_requests() -> tuple[list[list[Any]], list[Response], float]:
            streams = [
                asyncio.create_task(read_stream(server.port, {**body, "stream": True}))
                for _ in range(3)
            ]
            whole = [
                asyncio.create_task(asyncio.to_thread(server.post, "/v1/completions", body))
                for _ in range(3)
            ]
            while (await asyncio.to_thread(server.get, "/stats")).json["running"] < 6:
                pass
            await asyncio.sleep(0.1)  # until the first tokens
            server.kill_engine()
            start = time.monotonic()
            results = await asyncio.gather(*streams), await asyncio.gather(*whole)
            return *results, time.monotonic() - start

        streams, whole, seconds = asyncio.run(kill_during_requests())
        assert seconds < 2
        for response in whole:
            assert response.status == 503
            assert response.message == "the engine was ended by SIGKILL"
        for stream in streams:
            assert message_of(stream[-1]) == "the engine was ended by SIGKILL"
            assert not any("error" in event for event in stream[:-1])

        assert server.get("/v1/models").status == 200
        server.wait_until_healthy()
        after = server.post("/v1/completions", {**COMPLETION, "max_tokens": LONG}).json
        assert after["choices"] == before["choices"]

        for _ in range(2):
            server.kill_engine()
            while (response := server.get("/health")).status == 200:
                pass
            assert response.status == 503
            assert response.message == "the engine has ended and is being restarted"
            response = server.post("/v1/completions", COMPLETION)
            if response.status != 200:  # it was quicker than the next engine
                assert response.status == 503
                assert response.message == "the engine has ended and is being restarted"
            server.wait_until_healthy()
        server.kill_engine()
        assert server.process.wait(timeout=30) == 1
        assert server.process.stderr is not None
        said = server.process.stderr.read()
        assert "the engine ended 4 times within a minute: giving up" in said
        assert "Traceback" not in said


def test_ctrl_c_lets_requests_finish(server: ServerProcess) -> None:
    """SIGINT to the whole process group, as a terminal sends it. It ends the shared server."""
    body = {**COMPLETION, "max_tokens": LONG, "stream": True, "return_token_ids": True}

    async def interrupt() -> list[Any]:
        data = http_request("/v1/completions", body)
        async with connection(server.port, data) as (reader, _):
            with server.stopped_engine():
                os.killpg(server.process.pid, signal.SIGINT)
                await asyncio.sleep(0.3)
            assert await read_head(reader) == 200
            return [event async for event in events(reader)]

    received = asyncio.run(interrupt())
    assert received[-1] == "[DONE]"
    assert sum(len(event["choices"][0]["token_ids"]) for event in received[:-1]) == LONG
    assert server.process.wait(timeout=30) == 0


# Starting


def start_and_fail(arguments: list[str]) -> str:
    """The one line of a server that cannot start."""
    result = subprocess.run(
        [sys.executable, str(ENGINE_FOLDER / "serve.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    return line


def test_a_server_that_cannot_start_says_why_in_one_line(folder: Path, tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    assert "No such file" in start_and_fail(["--engine", nothing, "--model", str(folder)])
    assert "--model is " in start_and_fail(["--engine", EXECUTABLE, "--model", nothing])
    line = start_and_fail(["--engine", EXECUTABLE, "--model", str(tmp_path)])
    assert line == f"the engine ended with status 1: {tmp_path}/config.json: cannot be read"
    line = start_and_fail(command(folder, "--", "--pages", "none"))
    assert line.endswith(": --pages is none; allowed: 1 to 2147483647")
    line = start_and_fail(command(folder, "--", "--page", "5", "--nothing"))
    assert line.endswith(": there is no option --nothing; try --help")
    assert "cannot be listened at" in start_and_fail(command(folder, "--port", "99999"))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, make_tensors())
    assert f"{tmp_path}/tokenizer.json: cannot be read" == start_and_fail(
        command(tmp_path, "--port", "0")
    )
