"""examples/engine/engine_client.py with engines that are scripts, some of which misbehave."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "engine"))
from engine_client import LONGEST_LINE, EngineClient, EngineEndedError, EngineError

ENGINE = """#!{python}
import json, sys, time
print('{{"ready": {{}}}}', flush=True)
for text in sys.stdin:
    line = json.loads(text)
    id = line.get("id")
    {answer}
    sys.stdout.flush()
"""
ECHO = """print(json.dumps({"id": id, "finished": "length"} if id else {"cancelled": line}))"""


def with_engine(folder: Path, answer: str, use: Callable[[EngineClient], Awaitable[None]]) -> None:
    """Runs `use` with an engine that answers a line like this."""
    script = folder / "engine"
    script.write_text(ENGINE.format(python=sys.executable, answer=answer))
    script.chmod(0o755)

    async def run() -> None:
        client = await EngineClient.start(script, folder, [])
        try:
            await use(client)
        finally:
            client.kill()
            await client.wait()

    asyncio.run(asyncio.wait_for(run(), 60))


async def finish(client: EngineClient, **request: Any) -> list[dict[str, Any]]:
    return [line async for line in client.generate({"prompt": [1], **request})]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ('print("x" * 3_000_000)', f"the engine wrote a line of more than {LONGEST_LINE} bytes"),
        ('sys.stdout.write("x" * 3_000_000)', "the engine wrote a line of more than"),
        ('print("hello")', r"the engine wrote b'hello\\n', which is no line of its protocol"),
        ('print("[1]")', "which is no line of its protocol"),
        (r'sys.stdout.buffer.write(b"\xff\n")', "which is no line of its protocol"),
        ("sys.exit(3)", "the engine ended with status 3"),
        ("import os; os.abort()", "the engine was ended by SIGABRT"),
        ("import os; os.close(1); time.sleep(60)", "the engine was ended by SIGKILL"),
    ],
)
def test_everybody_hears_how_an_engine_ended(tmp_path: Path, answer: str, sentence: str) -> None:
    """Those that wait, and those that come later; nobody hangs."""

    async def use(client: EngineClient) -> None:
        results = await asyncio.gather(
            *(finish(client) for _ in range(3)), client.stats(), return_exceptions=True
        )
        for result in results:
            assert isinstance(result, EngineEndedError)
            assert sentence.replace("\\\\", "\\") in str(result)
        for late in (finish(client), client.stats()):
            with pytest.raises(EngineEndedError):
                await late

    with_engine(tmp_path, answer, use)


def test_a_line_of_almost_a_mebibyte_is_read(tmp_path: Path) -> None:
    async def use(client: EngineClient) -> None:
        with pytest.raises(EngineError, match=r"^x{1000000}$"):
            await finish(client)

    with_engine(tmp_path, 'print(json.dumps({"id": id, "error": "x" * 1_000_000}))', use)


def test_a_request_that_the_engine_would_not_read_is_refused(tmp_path: Path) -> None:
    async def use(client: EngineClient) -> None:
        with pytest.raises(EngineError, match=r"the request has \d+ bytes; allowed: 16777216"):
            await finish(client, prompt=[1] * 6_000_000)
        assert (await finish(client))[-1]["finished"] == "length"

    with_engine(tmp_path, ECHO, use)


def test_many_lines_at_once_keep_nobody_waiting(tmp_path: Path) -> None:
    """While 50,000 tokens are read, others have their turn again and again."""
    answer = """print("\\n".join('{"id": "0", "token": 5}' for _ in range(50_000)))
    print('{"id": "0", "finished": "length"}')"""

    async def use(client: EngineClient) -> None:
        task = asyncio.create_task(finish(client))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(task.result()) == 50_001
        assert turns > 10_000

    with_engine(tmp_path, answer, use)
