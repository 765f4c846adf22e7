"""The directive ``header``: the declarations of a C or C++ header with the comments beside them.

libclang reads the header, so signatures are the compiler's. hawkmoth, which does the same, wants
``/**`` before every declaration; these headers have ordinary comments, most of them at the end of
a field's line, and a comment may speak of several declarations in a row.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clang.cindex import Cursor, CursorKind, Index, TranslationUnit
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "include"

_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|/\*.*?\*/|//[^\n]*', re.DOTALL)
_GUARD = re.compile(r"_H_$")
# extern "C" is an unexposed declaration in some versions.
_SCOPES = (CursorKind.NAMESPACE, CursorKind.LINKAGE_SPEC, CursorKind.UNEXPOSED_DECL)
_KINDS = {
    CursorKind.STRUCT_DECL: "struct",
    CursorKind.ENUM_DECL: "enum",
    CursorKind.ENUM_CONSTANT_DECL: "enumerator",
    CursorKind.FIELD_DECL: "member",
    CursorKind.FUNCTION_DECL: "function",
    CursorKind.MACRO_DEFINITION: "macro",
}


@dataclass
class Comment:
    """A comment, or several ``//`` lines in a row, without its marks."""

    first: int  # lines, from 1
    last: int
    column: int
    is_trailing: bool  # code stands before it on its line
    text: str


@dataclass
class Entry:
    """Declarations that share one description."""

    kind: str
    signatures: list[str]
    names: list[str]
    text: str
    last: int
    shares: bool  # those that follow without a comment are meant too
    children: list[Entry] = field(default_factory=list)


def _bare(comment: str) -> str:
    """The text of one comment."""
    if comment.startswith("//"):
        return comment[2:].removeprefix(" ")
    lines = [re.sub(r"^ ?\* ?", "", line.strip(" \t")) for line in comment[2:-2].splitlines()]
    kept = [line if index else line.strip() for index, line in enumerate(lines)]
    return "\n".join(kept).strip()


@cache
def comments_of(path: Path) -> tuple[Comment, ...]:
    """All comments of a file in their order."""
    text, found = path.read_text(), []
    for match in _COMMENT.finditer(text):
        if match.group().startswith('"'):
            continue
        start = text.rfind("\n", 0, match.start()) + 1
        line = text.count("\n", 0, match.start()) + 1
        new = Comment(
            first=line,
            last=line + match.group().count("\n"),
            column=match.start() - start,
            is_trailing=bool(text[start : match.start()].strip()),
            text=_bare(match.group()),
        )
        before = found[-1] if found else None
        goes_on = (
            before is not None
            and match.group().startswith("//")
            and (before.last, before.column) == (line - 1, new.column)
            and not new.is_trailing
        )
        if goes_on:
            found[-1] = Comment(
                before.first, line, before.column, before.is_trailing, f"{before.text}\n{new.text}"
            )
        else:
            found.append(new)
    return tuple(found)


def _include_folders(is_cpp: bool) -> list[str]:
    """Headers of the compiler, which libclang comes without, and of torch."""
    folders = []
    own = subprocess.run(["cc", "-print-file-name=include"], capture_output=True, check=True)
    folders.append(own.stdout.decode().strip())
    if is_cpp:
        import torch  # noqa: PLC0415 - the C header needs none

        root = Path(torch.__file__).parent / "include"
        folders += [str(root), str(root / "torch/csrc/api/include")]
    return folders


def parse(header: str) -> TranslationUnit:
    """The header as the compiler sees it; an error in it is an error here."""
    is_cpp = "torch" in header
    language = ["-x", "c++", "-std=c++20"] if is_cpp else ["-x", "c", "-std=c99"]
    folders = [f"-isystem{folder}" for folder in _include_folders(is_cpp)]
    options = (
        TranslationUnit.PARSE_SKIP_FUNCTION_BODIES
        | TranslationUnit.PARSE_DETAILED_PROCESSING_RECORD
    )
    unit = Index.create().parse(
        str(INCLUDE / header), args=[*language, f"-I{INCLUDE}", *folders], options=options
    )
    errors = [str(found) for found in unit.diagnostics if found.severity >= 3]
    if errors:
        raise RuntimeError("\n".join(errors))
    return unit


def _is_ours(cursor: Cursor) -> bool:
    file = cursor.location.file
    return file is not None and Path(file.name).is_relative_to(INCLUDE)


def _public(parent: Cursor) -> Iterator[Cursor]:
    """Our declarations, without what only they use, in the order of the files."""
    for cursor in parent.get_children():
        if not _is_ours(cursor) or cursor.spelling == "detail":
            continue
        if cursor.kind in _SCOPES:
            yield from _public(cursor)
        elif cursor.kind in _KINDS and not _GUARD.search(cursor.spelling):
            is_only_named = cursor.kind == CursorKind.STRUCT_DECL and not cursor.is_definition()
            if not is_only_named:
                yield cursor


def _source(cursor: Cursor) -> str:
    """The text of a declaration in one line."""
    text = Path(cursor.location.file.name).read_bytes()
    part = text[cursor.extent.start.offset : cursor.extent.end.offset].decode()
    return " ".join(_COMMENT.sub("", part).split())


def _signature(cursor: Cursor) -> str:
    source, name = _source(cursor), cursor.spelling
    scope = cursor.semantic_parent
    if scope is not None and scope.kind == CursorKind.NAMESPACE:
        name = f"{scope.spelling}::{name}"
    match cursor.kind:
        case CursorKind.FIELD_DECL:
            _, equals, value = source.partition(" = ")
            kind, bracket, extent = cursor.type.spelling.partition("[")
            return f"{kind} {name}{bracket}{extent}{equals}{value}"
        case CursorKind.ENUM_CONSTANT_DECL:
            return f"{name} = {cursor.enum_value}"
        case CursorKind.FUNCTION_DECL:
            begin = source.index(cursor.spelling + "(") + len(cursor.spelling)
            end = _closing(source, begin)
            return f"{cursor.result_type.spelling} {name}{source[begin:end]}"
        case CursorKind.ENUM_DECL if cursor.is_anonymous():
            first = next(cursor.get_children()).spelling.lower()
            return f"@{first}"
        case _:
            return name


def _closing(text: str, begin: int) -> int:
    """Behind the parenthesis that closes the one at `begin`."""
    depth = 0
    for index in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(text)


def _describe(cursor: Cursor, begin: int) -> tuple[str, bool]:
    """What the comments before and behind a declaration say; whether one stands before it.

    Those before line `begin` are about the struct or enum that it is part of.
    """
    comments = comments_of(Path(cursor.location.file.name))
    first, last = cursor.extent.start.line, cursor.extent.end.line
    holds = cursor.kind in (CursorKind.STRUCT_DECL, CursorKind.ENUM_DECL) and first != last
    before = [c.text for c in comments if begin <= c.last == first - 1 and not c.is_trailing]
    behind = [c.text for c in comments if c.first == last and c.is_trailing and not holds]
    before = [text for text in before if not text.startswith("clang-format")]
    return "\n\n".join(before + behind), bool(before)


def entries(cursors: Iterable[Cursor], begin: int = 0) -> list[Entry]:
    """Declarations with their descriptions and members, of what begins at a line."""
    found: list[Entry] = []
    for cursor in cursors:
        kind, (text, shares) = _KINDS[cursor.kind], _describe(cursor, begin)
        before = found[-1] if found else None
        line = cursor.extent.start.line
        adjacent = before is not None and before.kind == kind and line - before.last <= 1
        if (
            adjacent
            and kind in ("member", "function", "macro")
            and ((not text and before.shares) or (text and text == before.text))
        ):
            before.signatures.append(_signature(cursor))
            before.names.append(cursor.spelling)
            before.last = cursor.extent.end.line
            continue
        last = cursor.extent.end.line
        new = Entry(kind, [_signature(cursor)], [cursor.spelling], text, last, shares)
        if kind in ("struct", "enum"):
            new.children = entries(_public(cursor), cursor.extent.start.line)
        found.append(new)
    return found


class Writer:
    """Writes descriptions as reStructuredText of a domain, with links to what is described."""

    def __init__(self, domain: str, described: list[Entry]) -> None:
        """For what is described in a domain."""
        self.domain = domain
        self.roles = {}
        for entry in described:
            for one in (entry, *(entry.children if entry.kind == "enum" else ())):
                for name in one.names:
                    self.roles[name] = {"function": "func"}.get(one.kind, one.kind)

    def _plain(self, text: str) -> str:
        """Plain text, in which names of the header are links; words joined by _ are code."""
        found = re.split(r"(\b\w*[A-Za-z0-9]_\w+\b(?!::))", text)
        for index, part in enumerate(found):
            role = self.roles.get(part)
            if index % 2 and role:
                found[index] = f"\\ :{self.domain}:{role}:`{part}`\\ "
            elif index % 2:
                found[index] = f"\\ ``{part}``\\ "
            else:
                found[index] = re.sub(r"([\\*_|`<>])", r"\\\1", part)
        return "".join(found)

    def _inline(self, text: str) -> str:
        """Text of a comment; `code` between backticks stays code."""
        parts = re.split(r"`([^`\n]+)`", text)
        for index, part in enumerate(parts):
            parts[index] = f"\\ ``{part}``\\ " if index % 2 else self._plain(part)
        return "".join(parts)

    def paragraphs(self, text: str) -> Iterator[str]:
        """A comment: what is indented, formulas and code, stays as it is."""
        for block in re.split(r"\n\s*\n", text):
            if block.startswith("  "):
                yield from ("::", "", *(f"   {line}" for line in block.splitlines()), "")
            else:
                yield from (*self._inline(block).splitlines(), "")

    def entry(self, entry: Entry) -> Iterator[str]:
        """The directive of an entry, its members inside."""
        kind = "enum-class" if self.domain == "cpp" and entry.kind == "enum" else entry.kind
        directive = f".. {self.domain}:{kind}:: "
        yield directive + entry.signatures[0]
        yield from (" " * len(directive) + signature for signature in entry.signatures[1:])
        yield ""
        yield from (f"   {line}" for line in self.paragraphs(entry.text))
        for child in entry.children:
            yield from (f"   {line}" for line in self.entry(child))


class Header(SphinxDirective):
    """``.. header:: flashtile/flashtile.h``: everything that it declares."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes."""
        header = self.arguments[0]
        self.env.note_dependency(str(INCLUDE / header))
        unit = parse(header)
        domain = "cpp" if "torch" in header else "c"
        cursors = list(_public(unit.cursor))
        if domain == "c":  # macros come first and belong between the others
            cursors.sort(key=lambda cursor: cursor.extent.start.line)
        described = entries(cursors)
        writer = Writer(domain, described)
        lines = list(writer.paragraphs(comments_of(INCLUDE / header)[0].text))
        for entry in described:
            lines += writer.entry(entry)
        return self.parse_text_to_nodes("\n".join(lines) + "\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Tells Sphinx about the directive."""
    app.add_directive("header", Header)
    return {"parallel_read_safe": True}
