"""Patches of source text. What is matched is code: comments and white space do not count, so that
a better comment or a wrapped line leaves every mutant as it was."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

Patch = tuple[str, str, str]  # file in kernel/, old text, new text

# A string, which may hold two slashes, or a comment.
STRING_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
TOKEN = re.compile(r"\w+|\S")


def without_comments(text: str) -> str:
    """The code alone; every line keeps its number."""
    return STRING_OR_COMMENT.sub(lambda found: found[1] or "\n" * found[0].count("\n"), text)


def code_pattern(old: str) -> re.Pattern[str]:
    """Matches the tokens of `old`, whole words only, whatever white space is between them."""
    tokens = TOKEN.findall(without_comments(old))
    if not tokens:
        raise ValueError(f"no code to look for: {old!r}")
    pattern = r"\s*".join(
        rf"\b{token}\b" if re.match(r"\w", token) else re.escape(token) for token in tokens
    )
    return re.compile(pattern)


def patch(text: str, old: str, new: str) -> str:
    """Replaces the code `old`, which must occur exactly once, and leaves the comments out."""
    pattern = code_pattern(old)
    code = without_comments(text)
    found = len(pattern.findall(code))
    if found != 1:
        raise ValueError(f"found {found} times instead of once: {old}")
    return pattern.sub(lambda _: new, code)


def patched(kernel: Path, patches: Iterable[Patch]) -> dict[str, str]:
    """The files of kernel/ that the patches change, with the changed text."""
    texts: dict[str, str] = {}
    for file, old, new in patches:
        text = texts[file] if file in texts else (kernel / file).read_text()
        texts[file] = patch(text, old, new)
    return texts


def copy_sources(source: Path, scratch: Path) -> None:
    """What a build without torch needs of the repository, to be patched."""
    for directory in ("kernel", "include", "cmake", "cpp_tests", "examples"):
        shutil.copytree(source / directory, scratch / directory)
    shutil.copy2(source / "CMakeLists.txt", scratch)


def copy_kernels(source: Path, kernel: Path) -> None:
    """What nvcc reads of kernel/, to be patched."""
    shutil.copytree(source, kernel, ignore=shutil.ignore_patterns("cpu", "torch"))


def apply(kernel: Path, patches: Iterable[Patch]) -> None:
    """Patches a copy of kernel/."""
    for file, text in patched(kernel, patches).items():
        (kernel / file).write_text(text)
