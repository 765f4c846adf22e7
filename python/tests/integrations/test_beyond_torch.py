"""The page about the examples beyond torch runs where they are built."""

from pathlib import Path

import pytest

import test_docs
from example_builds import BUILD, build_example, needed

needed("jax", "jax")
needed("tvm_ffi", "apache-tvm-ffi")


def test_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(build_example("jax")))
    build_example("tvm_ffi")
    (tmp_path / "build").symlink_to(BUILD)
    monkeypatch.chdir(tmp_path)
    test_docs.test_python_runs("docs/integrations/beyond_torch.md", monkeypatch)
