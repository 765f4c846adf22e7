"""The API reference names everything public, and nothing else: reference_test.py OBJECTS.INV.

The reference is made by libclang and autodoc. Here the headers and `flashtile.__all__` are read as
text, so that a name which those lose is missed.
"""

from __future__ import annotations

import ast
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = ROOT / "include/flashtile"


def described(inventory: Path) -> dict[str, set[str]]:
    """Domain -> names that the built pages describe. A name has its scope before it."""
    names: dict[str, set[str]] = {"c": set(), "cpp": set(), "py": set()}
    text = zlib.decompress(inventory.read_bytes().split(b"\n", 4)[4]).decode()
    for line in text.splitlines():
        match = re.match(r"(\S+) (\w+):(\w+) ", line)
        if match is None or match[2] not in names or match[3] in ("functionParam", "module"):
            continue
        scope, _, name = match[1].rpartition(".")
        if match[2] == "c" and (match[3] == "enumerator" or "anon" in scope or "@" in scope):
            names["c"].add(name)  # C's enumerators have no scope
        elif not match[1].startswith(("@", "[anon")):  # an enumeration without a name
            names[match[2]].add(match[1])
    return names


def code(path: Path) -> str:
    """A header without its comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)


def without(text: str, opening: str) -> str:
    """The text without everything from `opening` to the brace that closes its first one."""
    while (begin := text.find(opening)) >= 0:
        depth, end = 1, text.index("{", begin) + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[:begin] + text[end:]
    return text


def fields(body: str) -> Iterator[str]:
    """Names that the declarations of a struct's body declare."""
    for declaration in body.split(";"):
        declared = re.sub(r"<[^;]*>|\{[^}]*\}|\[[^]]*\]", "", declaration)
        names = (re.search(r"(\w+)\s*(?:=.*)?$", part.strip()) for part in declared.split(","))
        yield from (name[1] for name in names if name)


def names_of_c() -> set[str]:
    """Functions, types with their fields, macros and enumerators of flashtile.h."""
    text = code(INCLUDE / "flashtile.h")
    names = set(re.findall(r"\b(?:flashtile_\w+(?=\()|FLASHTILE_\w+)", text))
    names.discard("FLASHTILE_FLASHTILE_H_")  # the guard
    for kind, body, name in re.findall(r"typedef (struct|enum) \{([^}]*)\} (\w+);", text):
        names.add(name)
        names |= {f"{name}.{field}" for field in fields(body)} if kind == "struct" else set()
    return names


def names_of_cpp() -> set[str]:
    """Functions, structs with their members and enumerations of the headers for libtorch."""
    names = set()
    for path in sorted(INCLUDE.glob("torch*.h")):
        text = without(code(path), "namespace detail {")
        names |= set(re.findall(r"^inline [\w:<>, ]*?(\w+)\(", text, re.MULTILINE))
        for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.MULTILINE | re.DOTALL):
            names |= {name, *(f"{name}::{field}" for field in fields(body))}
        for name, body in re.findall(r"enum class (\w+)[^{]*\{([^}]*)\}", text):
            names |= {name, *(f"{name}::{field}" for field in re.findall(r"(\w+) =", body))}
    return {f"flashtile::{name}" for name in names}


def names_of_python() -> set[str]:
    """What `from flashtile import *` gives."""
    for node in ast.parse((ROOT / "python/flashtile/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {f"flashtile.{name}" for name in ast.literal_eval(node.value)}
    raise ValueError("no __all__ in flashtile")


def main() -> int:
    """1 when a name is missing or too many."""
    found, failed = described(Path(sys.argv[1])), False
    wanted = {"c": names_of_c(), "cpp": names_of_cpp(), "py": names_of_python()}
    for domain, names in wanted.items():
        have = found[domain]
        failed |= not names or names != have
        print(f"{domain}: {len(names)} public names, {len(names & have)} in the reference")
        print("".join(f"  not in the reference: {name}\n" for name in sorted(names - have)), end="")
        print("".join(f"  not in the headers: {name}\n" for name in sorted(have - names)), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
