"""server_soak.py with a small model, whose tokens plain torch says, too."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from server_process import ENGINE_FOLDER, ServerProcess, write_tokenizer
from server_soak import Load, check, show, soak
from tiny_llama import CONFIG, Reference, make_tensors

pytest.importorskip("safetensors", reason="safetensors, which writes the checkpoint, is missing")
pytest.importorskip("starlette", reason="starlette, which the server needs, is missing")
pytest.importorskip("uvicorn", reason="uvicorn, which the server needs, is missing")
pytest.importorskip("transformers", reason="transformers, which the server needs, is missing")
sys.path.append(str(ENGINE_FOLDER))
from export_model import write_checkpoint

EXECUTABLE = os.environ.get("FLASHTILE_ENGINE", "")
pytestmark = pytest.mark.skipif(
    not Path(EXECUTABLE).is_file(), reason="FLASHTILE_ENGINE names no executable: it was not built"
)
TOKENS = 100
END = 0  # the token that ends an answer


def test_a_killed_engine_costs_the_requests_in_flight_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_checkpoint(folder, CONFIG, make_tensors())
    write_tokenizer(folder, CONFIG["vocab_size"])
    rng = random.Random(7)
    prompts = ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 20))) for _ in range(10)]
    load = Load("tiny", prompts, TOKENS)
    with ServerProcess(["--engine", EXECUTABLE, "--model", str(folder)]) as server:
        server.wait_until_healthy()
        peaceful, result = soak(server, load)
    print(show(result))

    reference = Reference(make_tensors())
    expected = []
    for prompt in prompts:
        tokens = reference.greedy([ord(character) - 31 for character in prompt], TOKENS)
        expected.append(tokens[: tokens.index(END) + 1] if END in tokens else tokens)
    for i, tokens in peaceful.answers.items():
        assert tokens == expected[i % len(expected)], i
    check(load, result, expected)
