"""The README's examples: the Python blocks run, the C program is the one that the tests compile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def readme() -> str:
    path = ROOT / "README.md"
    if not path.is_file():
        pytest.skip("no README.md beside the tests: not a source checkout")
    return path.read_text()


def python_blocks(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)


def test_python_blocks_run(readme: str) -> None:
    blocks = [block for block in python_blocks(readme) if "transformers" not in block]
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["ok"] is False
    assert "head_dim_v" in str(names["reason"])


def test_block_of_transformers_runs(readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    (block,) = (block for block in python_blocks(readme) if "transformers" in block)
    names: dict[str, Any] = {"torch": torch}
    exec(compile(block, "README.md", "exec"), names)
    assert names["tokens"].shape == (2, 24)
    names["model"].set_attn_implementation("eager")
    options = {"attention_mask": names["padding"], "max_new_tokens": 4, "pad_token_id": 0}
    assert torch.equal(names["model"].generate(names["prompts"], **options), names["tokens"])


def test_c_program_is_the_compiled_one(readme: str) -> None:
    program = (ROOT / "examples" / "attention.c").read_text()
    assert program.count("\n") <= 40
    assert f"```c\n{program}```" in readme
