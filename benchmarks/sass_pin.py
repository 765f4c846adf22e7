"""The opcode sequence of every kernel, pinned: what a change does to machine code that it should
not touch. sass_report.py compares with sass_pin.json and, with --pin, writes it.

A sequence is the opcodes with their modifiers in the order of the code, without registers, offsets
and predicates, which a longer parameter struct may move. Only code by the same nvcc is compared:
another one chooses other instructions.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from sass import Kernel, Loop

DEFAULT = pathlib.Path(__file__).resolve().parent / "sass_pin.json"

Key = tuple[str, str]  # architecture, name of the kernel


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel for one architecture. The hot loop is that of sass.py, on its clean path."""

    opcodes: str  # hash of the sequence
    instructions: int
    mma: int
    loop: int  # instructions of the hot loop
    loop_mma: int
    registers: int

    def counts(self, mma: str) -> dict[str, str]:
        """For people: `mma` is what the architecture calls its tensor-core instruction."""
        has_loop = self.loop_mma > 0
        loop = f"{self.loop / self.loop_mma:.3f} ({self.loop}/{self.loop_mma})" if has_loop else "-"
        return {
            "instructions": str(self.instructions),
            mma: str(self.mma),
            f"hot loop per {mma}": loop,
            "registers": str(self.registers),
        }


@dataclasses.dataclass
class Pin:
    """The kernels of a library and what compiled and disassembled them."""

    compiler: str
    disassembler: str
    kernels: dict[Key, Entry]


@dataclasses.dataclass
class Changes:
    """What tells two pins apart."""

    equal: list[Key] = dataclasses.field(default_factory=list)
    changed: list[Key] = dataclasses.field(default_factory=list)
    renamed: dict[Key, Key] = dataclasses.field(default_factory=dict)  # old: new
    removed: list[Key] = dataclasses.field(default_factory=list)
    added: list[Key] = dataclasses.field(default_factory=list)


def make_entry(kernel: Kernel, loop: Loop | None) -> Entry:
    opcodes = [i.text.split()[0] for i in kernel.instructions]
    while opcodes and opcodes[-1] == "NOP":  # fills the last line of the instruction cache
        opcodes.pop()
    return Entry(
        opcodes=hashlib.sha256("\n".join(opcodes).encode()).hexdigest()[:16],
        instructions=len(opcodes),
        mma=sum(i.is_mma for i in kernel.instructions),
        loop=len(loop.path) if loop else 0,
        loop_mma=loop.mma if loop else 0,
        registers=kernel.registers,
    )


def demangle(symbols: list[str]) -> list[str]:
    """What a kernel is called: the struct and its template arguments."""
    tool = shutil.which("c++filt") or shutil.which("llvm-cxxfilt") or shutil.which("cu++filt")
    if tool is None:
        sys.exit("c++filt not found: it comes with binutils")
    done = subprocess.run(
        [tool], input="\n".join(symbols), check=True, capture_output=True, text=True
    )
    return [shorten(line) for line in done.stdout.splitlines()]


def shorten(demangled: str) -> str:
    """ "DecodeSm80<64, large, fp16>" of void flashtile::run<...>(...::Params)."""
    found = re.match(r"void flashtile::run<(.*?) ?>\(", demangled)
    name = found[1] if found else demangled
    for long, short in (
        ("flashtile::", ""),
        (", (Variant)0", ""),
        (", PlainScores", ""),
        ("(Variant)1", "scores"),
        ("(Memory)0", "large"),
        ("(Memory)1", "small"),
        ("__half", "fp16"),
        ("__nv_bfloat16", "bf16"),
        ("> >", ">>"),
    ):
        name = name.replace(long, short)
    return name


def disassembler_version(cuobjdump: str) -> str:
    said = subprocess.run([cuobjdump, "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", said.stdout)
    return f"cuobjdump {found[1]}" if found else "cuobjdump"


def compiler_version(cuobjdump: str, path: pathlib.Path) -> str:
    """Of the nvcc that made the device code of a cubin, an object or a library: ptxas notes it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [cuobjdump, "-xelf", ".1.sm_", str(path.resolve())]  # the first will do
        subprocess.run(command, cwd=scratch, check=False, capture_output=True)
        # A cubin is device code itself and has none inside.
        for cubin in [*sorted(pathlib.Path(scratch).iterdir()), path]:
            if found := re.search(rb"release [\d.]+, V(\d+\.\d+\.\d+)", cubin.read_bytes()):
                return f"nvcc {found[1].decode()}"
    return "nvcc"


def make_pin(
    cuobjdump: str, files: list[pathlib.Path], entries: list[tuple[str, str, Entry]]
) -> Pin:
    """The pin of what was read from the files: architecture, symbol and entry of each kernel."""
    pin = Pin(compiler_version(cuobjdump, files[0]), disassembler_version(cuobjdump), {})
    names = demangle([symbol for _, symbol, _ in entries])
    for (architecture, _, entry), name in zip(entries, names, strict=True):
        if pin.kernels.setdefault((architecture, name), entry) != entry:
            sys.exit(f"two different kernels are {name} for {architecture}")
    return pin


def write(pin: Pin, path: pathlib.Path) -> None:
    """A line a kernel: a difference of two versions names the kernels."""
    lines = [
        f"  {json.dumps(' '.join(key))}: {json.dumps(dataclasses.asdict(entry))}"
        for key, entry in sorted(pin.kernels.items(), key=lambda item: natural(item[0]))
    ]
    head = f' "compiler": {json.dumps(pin.compiler)},\n'
    head += f' "disassembler": {json.dumps(pin.disassembler)},\n "kernels": {{\n'
    path.write_text("{\n" + head + ",\n".join(lines) + "\n }\n}\n")


def natural(key: Key) -> list[tuple[int, str]]:
    """Numbers in order: 64 before 128."""
    words = re.findall(r"\d+|\D+", " ".join(key))
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


def read(path: pathlib.Path) -> Pin:
    stored = json.loads(path.read_text())
    kernels = {
        (name.split(" ", 1)[0], name.split(" ", 1)[1]): Entry(**entry)
        for name, entry in stored["kernels"].items()
    }
    return Pin(stored["compiler"], stored["disassembler"], kernels)


def compare(old: Pin, new: Pin) -> Changes:
    changes = Changes()
    for key, entry in old.kernels.items():
        if key not in new.kernels:
            changes.removed.append(key)
        elif new.kernels[key] == entry:
            changes.equal.append(key)
        else:
            changes.changed.append(key)
    changes.added = [key for key in new.kernels if key not in old.kernels]
    find_renamed(old, new, changes)
    return changes


def find_renamed(old: Pin, new: Pin, changes: Changes) -> None:
    """Of the removed and the added, what is the same code under another name: first where the
    template arguments are the same, too."""
    by_code: dict[tuple[str, Entry], list[Key]] = collections.defaultdict(list)
    for key in changes.added:
        by_code[key[0], new.kernels[key]].append(key)
    for same_arguments in (True, False):
        for key in list(changes.removed):
            twins = by_code[key[0], old.kernels[key]]
            if same_arguments:
                arguments = key[1].partition("<")[2]
                fitting = [twin for twin in twins if twin[1].partition("<")[2] == arguments]
            else:
                fitting = twins
            if fitting:
                twin = fitting[0]
                changes.renamed[key] = twin
                twins.remove(twin)
                changes.removed.remove(key)
                changes.added.remove(twin)


def describe(old: Pin, new: Pin, changes: Changes) -> list[str]:
    """A line for the whole, and one for each kernel that is not as it was."""

    def name(key: Key) -> str:
        return f"{key[1]} {key[0]}"

    counts = {
        "equal": changes.equal,
        "changed": changes.changed,
        "renamed": changes.renamed,
        "missing": changes.removed,
        "new": changes.added,
    }
    summary = ", ".join(f"{len(keys)} {what}" for what, keys in counts.items())
    lines = [f"{len(old.kernels)} kernels pinned, {len(new.kernels)} compared: {summary}"]
    for key in changes.changed:
        mma = "HGMMA" if key[0] == "sm_90a" else "HMMA"
        before, after = old.kernels[key].counts(mma), new.kernels[key].counts(mma)
        what = ", ".join(
            f"{label} {count}" + (f" -> {after[label]}" if after[label] != count else "")
            for label, count in before.items()
        )
        if before == after:
            what = f"other opcodes, the same counts: {what}"
        lines.append(f"changed {name(key)}: {what}")
    lines += [f"renamed {name(a)}: now {b[1]}" for a, b in changes.renamed.items()]
    lines += [f"missing {name(key)}" for key in changes.removed]
    lines += [f"new {name(key)}" for key in changes.added]
    return lines


def check(pin: pathlib.Path, new: Pin, whole: bool) -> int:
    """Prints how a library compares with the pin: 1 where a kernel is not as pinned. `whole`: it
    ought to have every pinned kernel of its architectures."""
    if not pin.exists():
        print(f"FAILED {pin.name} is missing: make it with --pin", file=sys.stderr)
        return 1
    old = read(pin)
    if old.compiler != new.compiler:
        print(f"\n{pin.name} is of {old.compiler}: code by {new.compiler} is not compared with it")
        return 0
    built = {architecture for architecture, _ in new.kernels}
    asked = {key: entry for key, entry in old.kernels.items() if key[0] in built}
    old.kernels = asked
    changes = compare(old, new)
    if not whole:
        changes.removed = []
    summary, *lines = describe(old, new, changes)
    print(f"\nOpcode sequences beside {pin.name} ({old.compiler}): {summary}")
    for line in lines:
        renamed = line.startswith("renamed ")
        print(line if renamed else f"FAILED {line}", file=sys.stdout if renamed else sys.stderr)
    if not (changes.changed or changes.removed or changes.added):
        return 0
    if old.disassembler != new.disassembler:
        print(
            f"the pin was read by {old.disassembler}, this by {new.disassembler}, "
            "which may spell opcodes in another way",
            file=sys.stderr,
        )
    print("if the change is meant: make sass-report ARGS=--pin", file=sys.stderr)
    return 1


def compare_files(old_path: pathlib.Path, new_path: pathlib.Path) -> int:
    """Prints what tells two pins apart; 1 where something but names does."""
    old, new = read(old_path), read(new_path)
    changes = compare(old, new)
    for before, after in ((old.compiler, new.compiler), (old.disassembler, new.disassembler)):
        if before != after:
            print(f"{old_path.name} is of {before}, {new_path.name} of {after}")
    print("\n".join(describe(old, new, changes)))
    return 1 if changes.changed or changes.removed or changes.added else 0
