"""Every block of code in the documentation runs, and every file and command that it names exists.

The words behind a fence say what a block is; `KINDS` lists them, and a block of another kind, or
of none, fails.

The Python blocks of a page run one after another, in one namespace. A C block is a program of its
own; the C++ blocks are one program together, a function each. A CMake block configures a project.
An sh block runs in a new folder that holds links to the files of this checkout.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import flashtile

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(flashtile.__file__).parents[2]

KINDS = {
    r"python": "runs",
    r"python needs (\w+)": "runs where that module is installed",
    r"c": "is compiled, linked and run",
    r"cpp": "is compiled, linked and run",
    r"cpp fragment: .+": "is not compiled, for the reason that it names",
    r"cmake": "is configured",
    r"sh": "runs",
    r"sh check-only: .+": "is only looked at, for the reason that it names",
    r"text picture(: .+)?": "is a drawing or formula",
    r"text output of the block above": "is compared, numbers masked",
    r"text transcript of make [\w-]+: .+": "is not compared, for the reason that it names",
    r"\{(toctree|eval-rst)\}": "speaks to Sphinx, whose warnings fail `make docs`",
}
# What an sh block that does not run may call.
COMMANDS = {
    *("build/engine/flashtile_engine", "cmake", "ctest", "export", "make", "pip", "python"),
    "vllm",
}

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs" / "conf.py").is_file(), reason="no docs: not a source checkout"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its fence."""

    page: str
    line: int
    info: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The Markdown files that Sphinx reads."""
    trees = [ROOT / name for name in ("benchmarks", "cpp_tests", "docs", "examples", "kernel")]
    found = [*ROOT.glob("*.md"), *(path for tree in trees for path in tree.glob("**/*.md"))]
    return sorted(found)


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks of a page, in their order."""
    found: list[Block] = []
    begin, info, fence, lines = 0, "", "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"\s*(`{3,}|~{3,})(.*)", line)
        if match and not fence:
            begin, fence, info, lines = number, match[1], match[2].strip(), []
        elif match and line.strip() == fence:
            found.append(Block(page, begin, info, "".join(f"{line}\n" for line in lines)))
            fence = ""
        elif fence:
            lines.append(line)
    assert not fence, f"{page}:{begin}: the block has no end"
    return found


def all_blocks() -> list[Block]:
    return [
        block
        for path in pages()
        for block in blocks_of(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]


def blocks(info: str) -> list[Block]:
    return [block for block in all_blocks() if block.info == info]


def unknown_kinds(found: list[Block]) -> list[str]:
    """Blocks that no test knows."""
    return [
        f"{block.where}: '{block.info}'; allowed: {', '.join(KINDS)}"
        for block in found
        if not any(re.fullmatch(kind, block.info) for kind in KINDS)
    ]


def masked(text: str) -> str:
    """Without numbers and the ends of lines."""
    return re.sub(r"\d[\d.e+-]*", "#", " ".join(text.split()))


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a command prints; an error if it fails."""
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation of the build that these tests import."""
    if not (BUILD / "CMakeCache.txt").is_file():
        pytest.skip(f"flashtile was not imported from a build: {BUILD}")
    folder = tmp_path_factory.mktemp("prefix")
    run(["cmake", "--install", str(BUILD), "--prefix", str(folder)], folder)
    return folder


def library_folder(prefix: Path) -> Path:
    return next(prefix.glob("lib*/libflashtile.so")).parent


def test_every_block_is_of_a_known_kind() -> None:
    found = all_blocks()
    assert {"README.md", "CONTRIBUTING.md", "docs/guide/c.md"} <= {block.page for block in found}
    assert not unknown_kinds(found)
    assert unknown_kinds(blocks_of("x.md", "```\nno language\n```\n")) == [
        f"x.md:1: ''; allowed: {', '.join(KINDS)}"
    ]


def python_pages(of_integrations: bool = False) -> list[str]:
    """Those of docs/integrations, which run beside the tests of the same, or the others."""
    found = {block.page for block in all_blocks() if block.info.startswith("python")}
    return sorted(p for p in found if p.startswith("docs/integrations/") == of_integrations)


@pytest.mark.parametrize("page", python_pages())
def test_python_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    names: dict[str, Any] = {}
    printed = ""
    for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8")):
        if block.info == "text output of the block above":
            assert masked(printed) == masked(block.text), block.where
        if not block.info.startswith("python"):
            continue
        if needed := re.fullmatch(r"python needs (\w+)", block.info):
            pytest.importorskip(needed[1], reason=f"{needed[1]} is not installed")
        output = io.StringIO()
        code = compile("\n" * block.line + block.text, page, "exec")  # line numbers of the page
        with contextlib.redirect_stdout(output):
            exec(code, names)
        printed = output.getvalue()
    check_results(page, names, printed)


def check_results(page: str, names: dict[str, Any], printed: str) -> None:
    """What a page says of its results, where it has no block for it."""
    if page == "README.md":
        assert names["lse"].shape == (2, 8, 1000)
        comment = re.search(r"print\(ok, reason\)  # (.*)", (ROOT / page).read_text())
        assert comment is not None
        assert printed.strip() == comment[1]
    if page == "docs/integrations/transformers.md":
        assert names["tokens"].shape == (2, 24)
        names["model"].set_attn_implementation("eager")
        options = {"attention_mask": names["padding"], "max_new_tokens": 4, "pad_token_id": 0}
        assert torch.equal(names["model"].generate(names["prompts"], **options), names["tokens"])


def test_outputs_follow_a_python_block() -> None:
    for page in {block.page for block in blocks("text output of the block above")}:
        before = ""
        for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8")):
            if block.info == "text output of the block above":
                assert before == "python" or before.startswith("python needs "), block.where
            before = block.info


def test_c_program_is_the_example() -> None:
    program = (ROOT / "examples" / "attention.c").read_text()
    assert program.count("\n") <= 40
    assert program in [block.text for block in blocks("c")]


@pytest.mark.parametrize("block", blocks("c"), ids=lambda block: block.where)
def test_c_runs(block: Block, prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "block.c").write_text(block.text)
    folder = library_folder(prefix)
    flags = [f"-I{prefix}/include", f"-L{folder}", f"-Wl,-rpath,{folder}", "-lflashtile", "-lm"]
    compiler = ["cc", "-std=c11", "-Wall", "-Werror", "-o", "block", "block.c"]
    run([*compiler, *flags], tmp_path)
    printed = run(["./block"], tmp_path)
    if sentence := re.search(r"prints `(.*)`", (ROOT / block.page).read_text()):
        assert masked(printed) == masked(sentence[1])


def test_cpp_runs(prefix: Path, tmp_path: Path) -> None:
    found = blocks("cpp")
    assert len(found) >= 2
    includes = {line for b in found for line in b.text.splitlines() if line.startswith("#include")}
    bodies = "".join(
        f"void block_{index}() {{  // {block.where}\n"
        + "".join(f"{line}\n" for line in block.text.splitlines() if not line.startswith("#"))
        + "}\n"
        for index, block in enumerate(found)
    )
    calls = " ".join(f"block_{index}();" for index in range(len(found)))
    source = "\n".join([*sorted(includes), bodies, f"int main() {{ {calls} }}\n"])
    (tmp_path / "blocks.cpp").write_text(source)
    headers = Path(torch.__file__).parent / "include"
    libraries = Path(torch.__file__).parent / "lib"
    folder = library_folder(prefix)
    cxx11 = int(torch.compiled_with_cxx11_abi())
    # Compiled apart from linking, and by the launcher that CMake would use: that may be a cache.
    launcher = os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", "").split()
    compiler = ["c++", "-std=c++20", "-O0", "-c", "blocks.cpp", "-o", "blocks.o"]
    compiler += [f"-I{ROOT}/include", f"-isystem{headers}"]
    compiler += [f"-isystem{headers}/torch/csrc/api/include", f"-D_GLIBCXX_USE_CXX11_ABI={cxx11}"]
    run([*launcher, *compiler], tmp_path)
    linker = ["c++", "-o", "blocks", "blocks.o", "-Wl,--no-as-needed"]
    for path in (libraries, folder):
        linker += [f"-L{path}", f"-Wl,-rpath,{path}"]
    run([*linker, "-lflashtile_torch", "-ltorch", "-ltorch_cpu", "-lc10"], tmp_path)
    run(["./blocks"], tmp_path)


@pytest.mark.parametrize("block", blocks("cmake"), ids=lambda block: block.where)
def test_cmake_configures(block: Block, prefix: Path, tmp_path: Path) -> None:
    head = "cmake_minimum_required(VERSION 3.25)\nproject(block C CXX)\n"
    (tmp_path / "CMakeLists.txt").write_text(head + block.text)
    for name in ("attention.c", "attention.cpp"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    options = [
        f"-DCMAKE_PREFIX_PATH={prefix};{torch.utils.cmake_prefix_path}",
        f"-DFLASHTILE_SOURCE={ROOT}",
        "-DFLASHTILE_CUDA=OFF",
        "--log-level=ERROR",
    ]
    run(["cmake", "-S", ".", "-B", "build", *options], tmp_path)


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.where)
def test_sh_runs(block: Block, prefix: Path, tmp_path: Path) -> None:
    if "pkg-config" in block.text and shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    for path in ROOT.iterdir():
        if path.name not in ("build", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "build").symlink_to(BUILD)
    python = str(Path(sys.executable).parent)
    environment = {
        "PATH": f"{python}{os.pathsep}{os.environ['PATH']}",
        "PKG_CONFIG_PATH": str(library_folder(prefix) / "pkgconfig"),
    }
    run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path, **environment)


def make_targets() -> set[str]:
    match = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return set(match[1].split())


def presets() -> set[str]:
    return set(re.findall(r'"name": "([\w-]+)"', (ROOT / "CMakePresets.json").read_text()))


def wrong_commands(text: str) -> list[str]:
    """Commands, targets, presets and files of a script that do not exist."""
    wrong: list[str] = []
    for line in text.splitlines():
        for command in re.split(r"&&|;", line.split("#")[0]):
            words = command.split()
            if not words:
                continue
            if words[0] not in COMMANDS:
                wrong.append(words[0])
            if words[0] == "make":
                targets = [word for word in words[1:] if "=" not in word]
                wrong += [f"make {target}" for target in targets if target not in make_targets()]
            preset = re.search(r"--preset (\S+)", command)
            if preset and preset[1] not in presets():
                wrong.append(f"--preset {preset[1]}")
            files = [word for word in words[1:] if re.search(r"\.(py|sh|txt|c|cpp)$", word)]
            wrong += [name for name in files if not (ROOT / name).is_file()]
    return wrong


def test_sh_that_does_not_run_names_what_exists() -> None:
    found = [block for block in all_blocks() if block.info.startswith("sh check-only")]
    assert found
    assert not [f"{one.where}: {wrong}" for one in found for wrong in wrong_commands(one.text)]
    text = "make tset && cmake --preset cpu-only\npython examples/dmo.py\nnomake x"
    assert wrong_commands(text) == ["make tset", "--preset cpu-only", "examples/dmo.py", "nomake"]


def code_spans(path: Path) -> list[str]:
    """The `code` of a page's prose."""
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))
    return re.findall(r"`([^`\n]+)`", text)


def exists(name: str, page: Path) -> bool:
    """Whether a path of a page is a file of this repository, seen from where such pages look."""
    folders = ("kernel", "include", "cpp_tests", "examples/engine")
    bases = (ROOT, page.parent, *(ROOT / folder for folder in folders))
    return any((base / name).is_file() or next(base.glob(name), None) for base in bases)


def test_prose_names_what_exists() -> None:
    missing: list[str] = []
    for path in pages():
        if path.parent.name.startswith("amd-") or path.name == "CHANGELOG.md":
            continue  # what was true once
        for span in code_spans(path):
            is_path = re.fullmatch(r"[\w*-]+(/[\w.*-]+)*/[\w*-]+\.(cuh?|h|c|cpp|py|sh|md)", span)
            if is_path and not span.startswith("build/") and not exists(span, path):
                missing.append(f"{path.relative_to(ROOT)}: {span}")
            if (target := re.fullmatch(r"make ([\w-]+).*", span)) and (
                target[1] not in make_targets()
            ):
                missing.append(f"{path.relative_to(ROOT)}: {span}")
    assert not missing


def test_prose_names_what_the_code_has() -> None:
    folders = ("kernel", "include", "cpp_tests", "benchmarks", "python", "cmake")
    suffixes = {".h", ".c", ".cpp", ".cu", ".cuh", ".py", ".txt", ".cmake"}
    words: set[str] = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes and path.is_file() and path.name != Path(__file__).name:
                words |= set(re.findall(r"\w+", path.read_text(encoding="utf-8", errors="replace")))
    found = [ROOT / "docs/recipes.md", ROOT / "docs/glossary.md", *ROOT.glob("docs/kernels/*.md")]
    spans = {(path.name, span) for path in found for span in code_spans(path)}
    names = {(page, span) for page, span in spans if re.fullmatch(r"[A-Za-z]\w{4,}", span)}
    assert len(names) > 20
    assert not sorted((page, name) for page, name in names if name not in words)


def test_pages_are_short() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 200
    assert (ROOT / "kernel/README.md").read_text().count("\n") <= 60
