"""The README's examples: the Python blocks run, the C program is the one that the tests compile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def readme() -> str:
    path = ROOT / "README.md"
    if not path.is_file():
        pytest.skip("no README.md beside the tests: not a source checkout")
    return path.read_text()


def test_python_blocks_run(readme: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["ok"] is False
    assert "head_dim_v" in str(names["reason"])


def test_c_program_is_the_compiled_one(readme: str) -> None:
    program = (ROOT / "examples" / "attention.c").read_text()
    assert program.count("\n") <= 40
    assert f"```c\n{program}```" in readme
