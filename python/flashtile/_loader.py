"""Finds and loads libflashtile_torch.so, which registers the ops under ``torch.ops.flashtile``."""

from collections.abc import Iterable
from pathlib import Path

import torch

LIBRARY = "lib/libflashtile_torch.so"


def find(folders: Iterable[str]) -> Path:
    """The op library in one of the package's folders; an editable install has several."""
    candidates = [Path(folder) / LIBRARY for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    searched = ", ".join(str(candidate) for candidate in candidates)
    raise ImportError(
        f"flashtile's op library was not found; searched: {searched}. Build it with "
        "`pip install .` in a checkout, or with `make` and use <build>/python as PYTHONPATH."
    )


def load(folders: Iterable[str]) -> None:
    """Loads the library once. A second copy would register the same ops again and crash."""
    if hasattr(torch.ops.flashtile, "forward"):
        return
    path = find(folders)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{path} does not load into torch {torch.__version__}; flashtile needs torch >= 2.11. "
            f"The loader says: {error}"
        ) from error
