"""Many streaming requests at once, some of whose clients leave, while the engine is killed in the
middle and prompts of 10 MB come in beside them.

    python cpp_tests/engine/server_soak.py --engine build/engine/flashtile_engine --model FOLDER

does it with a real model, and prints the numbers. What a server says that is left in peace is what
the others are compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server_process import (
    ServerProcess,
    connection,
    events,
    http_request,
    message_of,
    read_head,
)

MONITOR = Path(__file__).with_name("server_monitor.py")
LEAVES_AFTER = 2  # events
HUGE_BYTES = 10_000_000


@dataclass
class Load:
    """Request i has prompt i % len(prompts); the client of every fifth one leaves."""

    model: str
    prompts: list[str]
    tokens: int
    requests: int = 300
    at_once: int = 64
    kill_after: int = 100  # requests have ended

    def body(self, i: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": self.prompts[i % len(self.prompts)],
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }


@dataclass
class Result:
    """What came of it."""

    answers: dict[int, list[int]] = field(default_factory=dict)  # tokens of whole answers
    left: int = 0
    failed: list[float] = field(default_factory=list)  # in flight at the kill: seconds to the error
    refused: int = 0  # while there was no engine; asked again
    huge: list[int] = field(default_factory=list)  # statuses of the 10 MB prompts
    after_kill: int = 0  # whole answers that began later
    seconds: float = 0.0
    killed: float = float("inf")
    monitor: dict[str, Any] = field(default_factory=dict)
    memory_before: int = 0
    memory_after: int = 0


def resident_bytes(server: ServerProcess) -> int:
    """Of the server and its engine."""
    total = 0
    for process in (server.process.pid, *server.engines()):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) * 1024
    return total


class Soak:
    """One run of a load against a server."""

    def __init__(self, server: ServerProcess, load: Load) -> None:
        self.server = server
        self.load = load
        self.result = Result()
        self._ended = 0

    async def run(self, kill: bool) -> Result:
        """All requests. With `kill`, the engine dies and the other disturbances happen."""
        start = time.monotonic()
        gate = asyncio.Semaphore(self.load.at_once)

        async def one(i: int) -> None:
            async with gate:
                await self._ask_until_answered(i, leaves=kill and i % 5 == 4)
            self._ended += 1

        tasks = [asyncio.create_task(one(i)) for i in range(self.load.requests)]
        beside = [asyncio.create_task(self._kill()), asyncio.create_task(self._send_huge())]
        if not kill:
            for task in beside:
                task.cancel()
        await asyncio.gather(*tasks)
        await asyncio.gather(*beside, return_exceptions=not kill)
        self.result.seconds = time.monotonic() - start
        return self.result

    async def _ask_until_answered(self, i: int, leaves: bool) -> None:
        result = self.result
        while True:
            start = time.monotonic()
            tokens, error = await self._ask(i, leaves)
            if error is None:
                break
            if start < result.killed:
                result.failed.append(time.monotonic() - result.killed)
            else:
                result.refused += 1
            await asyncio.sleep(0.1)
        if leaves:
            result.left += 1
        else:
            result.answers[i] = tokens
            result.after_kill += start > result.killed

    async def _ask(self, i: int, leaves: bool) -> tuple[list[int], str | None]:
        """Tokens, or the one error."""
        tokens: list[int] = []
        seen = 0
        request = http_request("/v1/completions", self.load.body(i))
        async with connection(self.server.port, request) as (reader, _):
            status = await read_head(reader)
            if status != 200:
                assert status == 503, status
                return [], message_of(json.loads(await reader.read()))
            error, done = None, False
            async for event in events(reader):
                assert error is None, "something came after the error"
                assert not done, "something came after the end"
                seen += 1
                if event == "[DONE]":
                    done = True
                elif "error" in event:
                    error = message_of(event)
                else:
                    tokens += event["choices"][0]["token_ids"]
                if leaves and error is None and seen == LEAVES_AFTER:
                    return tokens, None
            assert done == (error is None), "the stream broke off"
            return tokens, error

    async def _kill(self) -> None:
        while self._ended < self.load.kill_after:
            await asyncio.sleep(0.01)
        self.result.killed = time.monotonic()
        self.server.kill_engine()

    async def _send_huge(self) -> None:
        body = json.dumps({"model": self.load.model, "prompt": "ab " * (HUGE_BYTES // 3)}).encode()
        request = http_request("/v1/completions", body)
        while self._ended < self.load.requests:
            async with connection(self.server.port, request) as (reader, _):
                self.result.huge.append(await read_head(reader))
            await asyncio.sleep(0.5)


def soak(server: ServerProcess, load: Load) -> tuple[Result, Result]:
    """The load in peace, then with everything that can happen."""
    peaceful = asyncio.run(Soak(server, load).run(kill=False))
    before = resident_bytes(server)
    monitor = subprocess.Popen(
        [sys.executable, str(MONITOR), str(server.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    result = asyncio.run(Soak(server, load).run(kill=True))
    output, _ = monitor.communicate()
    result.monitor = json.loads(output)
    while any(server.get("/stats").json[name] for name in ("running", "waiting")):
        time.sleep(0.05)
    result.memory_before, result.memory_after = before, resident_bytes(server)
    return peaceful, result


def check(load: Load, result: Result, expected: list[list[int]]) -> None:
    """AssertionError where the server broke a promise. `expected`: the tokens of every prompt."""
    for i, tokens in result.answers.items():
        assert tokens == expected[i % len(expected)], i
    assert result.left == load.requests // 5
    assert len(result.answers) + result.left == load.requests
    assert result.after_kill > 0
    assert result.failed
    assert max(result.failed) < 2
    assert result.huge
    assert set(result.huge) == {413}
    assert result.monitor["asked"] > 20
    assert result.monitor["slowest"] < 0.5
    assert result.memory_after - result.memory_before < 50e6


def show(result: Result) -> str:
    """The numbers."""
    return (
        f"{len(result.answers)} whole answers, {result.after_kill} of them asked for after the"
        f" kill; {result.left} clients left; {len(result.failed)} requests in flight at the kill,"
        f" the last error after {max(result.failed):.2f} s; {result.refused} refused without an"
        f" engine, and asked again; {len(result.huge)} prompts of 10 MB;"
        f" {result.monitor['asked']} questions for /health and /v1/models, the slowest"
        f" {result.monitor['slowest']:.3f} s; memory {result.memory_before / 1e6:.0f} MB before,"
        f" {result.memory_after / 1e6:.0f} MB after; {result.seconds:.0f} s"
    )


def main() -> None:
    """With a real model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    words = ("sea", "sky", "river", "mountain", "bridge", "engine", "number", "page", "tree", "cat")
    prompts = [f"Once upon a time there was a {word} that" for word in words]
    load = Load(arguments.model.resolve().name, prompts, arguments.tokens)
    command = ["--engine", str(arguments.engine), "--model", str(arguments.model)]
    with ServerProcess([*command, "--", "--device", "cpu"]) as server:
        server.wait_until_healthy()
        peaceful, result = soak(server, load)
    expected = [peaceful.answers[i] for i in range(len(prompts))]
    for i, tokens in peaceful.answers.items():
        assert tokens == expected[i % len(expected)], i
    print(show(result))
    check(load, result, expected)


if __name__ == "__main__":
    main()
