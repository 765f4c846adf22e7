"""Machine code as data: the kernels of a cubin, object or library, and the clean path round their
hot loops. sass_report.py prints it.

The hot loop is the innermost natural loop with the most HMMA (HGMMA on sm_90a) per iteration. Its
clean path executes every HMMA and every copy and otherwise the fewest instructions, so blocks that
are jumped over (masks, rescaling, rows that need the general copy) do not count.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable

MEMORY_CLASSES = ("large", "small")  # flashtile::Memory

CLASSES: dict[str, tuple[str, ...]] = {
    "mma": ("HMMA", "HGMMA"),
    "ldmatrix": ("LDSM",),
    "copy": ("LDGSTS", "LDGDEPBAR", "DEPBAR"),
    "shared": ("LDS", "STS"),
    "global": ("LDG", "STG", "RED", "ATOM", "ATOMG", "LD", "ST"),
    "local": ("LDL", "STL"),
    "exp": ("MUFU",),
    "float": ("FFMA", "FADD", "FMUL", "FMNMX"),
    "convert": ("F2F", "F2FP", "HADD2", "HMUL2", "HFMA2", "I2F", "F2I"),
    "select": ("FSETP", "FSEL", "ISETP", "SEL", "PLOP3", "VOTE", "VOTEU", "R2P", "P2R"),
    "integer": ("IMAD", "IADD3", "LOP3", "SHF", "LEA", "IABS", "IMNMX", "UIADD3", "ULOP3", "UIMAD"),
    "move": ("MOV", "UMOV", "R2UR", "S2R", "S2UR", "CS2R", "ULDC"),
    "control": ("BRA", "BSSY", "BSYNC", "BAR", "WARPSYNC", "NOP", "EXIT", "SYNCS", "WARPGROUP"),
}
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}

COPIES = ("RED", "ATOMG", "LDSM", "BAR")
MMA = ("HMMA", "HGMMA")


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # without modifiers
    text: str
    predicated: bool
    target: int | None  # of a branch

    @property
    def falls_through(self) -> bool:
        return self.predicated or self.opcode not in ("BRA", "EXIT", "RET", "BRX", "JMP")

    @property
    def is_mma(self) -> bool:
        return self.opcode in MMA

    @property
    def is_copy(self) -> bool:
        """What the clean path takes as much of as it can: copies of chunks, not of elements."""
        return self.opcode in COPIES or (self.opcode == "LDGSTS" and ".128" in self.text)

    @property
    def class_name(self) -> str:
        # IMAD.MOV and IMAD.SHL are what a move and a shift are written as.
        if self.text.startswith("IMAD.MOV"):
            return "move"
        return CLASS_OF.get(self.opcode, "other")


@dataclasses.dataclass
class Kernel:
    symbol: str
    architecture: str
    instructions: list[Instruction]
    registers: int = 0
    stack: int = 0
    shared: int = 0

    def key(self) -> tuple[str, int, str] | None:
        """(pass, head dim, memory class), or None for a kernel without a budget."""
        match = re.search(r"\d(Forward|Backward|Decode)Sm80I", self.symbol)
        head_dim = re.search(r"Li(\d+)E", self.symbol)
        memory = re.search(r"MemoryE(\d)E", self.symbol)
        if not (match and head_dim and memory):
            return None
        kernel_pass = "prefill" if "CacheKeys" in self.symbol else match[1].lower()
        if "ModifiedScores" in self.symbol:
            kernel_pass += " scores"
        return kernel_pass, int(head_dim[1]), MEMORY_CLASSES[int(memory[1])]

    @property
    def name(self) -> str:
        key = self.key()
        if key is None:
            inner = re.search(r"run\w*?I\w*?NS_\d+(\w+?)I?L?i?\d*E", self.symbol)
            return inner[1] if inner else self.symbol
        is_ordered = key[0].startswith("backward") and "ELb1E" in self.symbol
        ordered = " deterministic" if is_ordered else ""
        return f"{key[0]} d{key[1]} {key[2]}{ordered}"

    @property
    def is_decode(self) -> bool:
        key = self.key()
        return key is not None and key[0].startswith("decode")

    @property
    def dtype(self) -> str:
        return "bf16" if "nv_bfloat16" in self.symbol else "fp16"

    @property
    def local(self) -> int:
        """Accesses to local memory: what ptxas calls spill stores and spill loads."""
        return sum(i.opcode in ("LDL", "STL") for i in self.instructions)


@dataclasses.dataclass
class Loop:
    """The clean path round a natural loop, and the blocks of the loop that it jumps over."""

    path: list[Instruction]
    skipped: list[list[Instruction]] = dataclasses.field(default_factory=list)

    def count(self, *opcodes: str) -> int:
        return sum(i.opcode in opcodes for i in self.path)

    @property
    def mma(self) -> int:
        return self.count(*MMA)

    @property
    def per_mma(self) -> float:
        return len(self.path) / self.mma

    @property
    def local(self) -> int:
        return self.count("LDL", "STL")

    def by_class(self) -> dict[str, int]:
        counts = collections.Counter(i.class_name for i in self.path)
        return {name: counts[name] for name in [*CLASSES, "other"] if counts[name]}


def find_cuobjdump(given: str | None) -> str:
    """The tool from the command line, PATH, the CUDA toolkit, or a Python package that ships it."""
    if given:
        return given
    site = pathlib.Path(sysconfig.get_paths()["purelib"])
    candidates = [
        pathlib.Path("/usr/local/cuda/bin/cuobjdump"),
        *sorted(site.glob("nvidia/cu*/bin/cuobjdump")),
        *sorted(site.glob("nvidia/cuda_cuobjdump/bin/cuobjdump")),
        *sorted(site.glob("triton/backends/nvidia/bin/cuobjdump")),
    ]
    found = shutil.which("cuobjdump")
    if found:
        return found
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    sys.exit("cuobjdump not found: install the CUDA toolkit or `pip install nvidia-cuda-cuobjdump`")


INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE
)


def parse_instruction(match: re.Match[str]) -> Instruction:
    address, predicate, mnemonic, operands = match.groups()
    opcode = mnemonic.split(".")[0]
    # CALL.REL goes to code far away, and may or may not come back.
    branches = opcode in ("BRA", "CALL")
    target = re.search(r"0x([0-9a-f]+)\s*$", operands) if branches else None
    conditional_operands = opcode == "BRA" and "," in operands  # BRA P0, 0x10; BRA.DIV ~URZ, 0x10
    return Instruction(
        address=int(address, 16),
        opcode=opcode,
        text=mnemonic + operands,
        predicated=(predicate is not None and predicate != "@PT") or conditional_operands,
        target=int(target[1], 16) if target else None,
    )


def read_kernels(cuobjdump: str, path: pathlib.Path) -> list[Kernel]:
    def dump(option: str) -> str:
        command = [cuobjdump, option, str(path)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{path}: {(done.stderr or done.stdout).strip() or 'no device code'}")
        return done.stdout

    kernels = []
    architecture = "?"
    for section in re.split(
        r"^(?=\s*(?:code for sm_|Function : ))", dump("-sass"), flags=re.MULTILINE
    ):
        if code := re.match(r"\s*code for (sm_\w+)", section):
            architecture = code[1]
        elif function := re.match(r"\s*Function : (\S+)", section):
            body = [parse_instruction(m) for m in INSTRUCTION.finditer(section)]
            kernels.append(Kernel(function[1], architecture, body))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump("-res-usage"))
    # Both listings go through the device binaries in the same order.
    remaining: dict[str, list[tuple[str, ...]]] = collections.defaultdict(list)
    for symbol, *values in usage:
        remaining[symbol].append(tuple(values))
    for kernel in kernels:
        if remaining[kernel.symbol]:
            values = remaining[kernel.symbol].pop(0)
            kernel.registers, kernel.stack, kernel.shared = (int(v) for v in values)
    return kernels


Option = tuple[tuple[int, ...], list[int]]  # cost of a way through a loop, and its blocks
Wanted = Callable[[list[Instruction]], int]  # how much of what a path looks for a block has


def nothing(_block: list[Instruction]) -> int:
    return 0


def has_many(opcode: str, least: int) -> Wanted:
    """Of a block: whether it has at least so many of an opcode."""
    return lambda block: int(sum(i.text.startswith(opcode) for i in block) >= least)


class FlowGraph:
    """Basic blocks of a kernel."""

    def __init__(self, instructions: list[Instruction]) -> None:
        leaders = {instructions[0].address} if instructions else set()
        for before, after in itertools.pairwise(instructions):
            if before.target is not None or not before.falls_through:
                leaders.add(after.address)
        leaders.update(i.target for i in instructions if i.target is not None)
        self.blocks: list[list[Instruction]] = []
        for instruction in instructions:
            if instruction.address in leaders or not self.blocks:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        index = {block[0].address: n for n, block in enumerate(self.blocks)}
        self.successors: list[list[int]] = []
        for n, block in enumerate(self.blocks):
            last = block[-1]
            next_blocks = []
            if last.target in index:
                next_blocks.append(index[last.target])
            if last.falls_through and n + 1 < len(self.blocks):
                next_blocks.append(n + 1)
            self.successors.append(next_blocks)
        self.predecessors: list[list[int]] = [[] for _ in self.blocks]
        for n, next_blocks in enumerate(self.successors):
            for successor in next_blocks:
                self.predecessors[successor].append(n)
        self.reachable = self._find_reachable()

    def _find_reachable(self) -> set[int]:
        """What only a RET leads to is not: the way back from a slow path."""
        found = {0}
        stack = [0]
        while stack:
            new = set(self.successors[stack.pop()]) - found
            found |= new
            stack.extend(new)
        return found

    @functools.cached_property
    def dominators(self) -> list[set[int]]:
        everything = set(range(len(self.blocks)))
        dominators = [everything.copy() for _ in self.blocks]
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for n in sorted(self.reachable - {0}):
                before = [dominators[p] for p in self.predecessors[n] if p in self.reachable]
                new = {n} | set.intersection(*before)
                if new != dominators[n]:
                    dominators[n] = new
                    changed = True
        return dominators

    def loops(self) -> dict[int, set[int]]:
        """Header -> blocks of the natural loop."""
        dominators = self.dominators
        loops: dict[int, set[int]] = {}
        for tail in sorted(self.reachable):
            for header in self.successors[tail]:
                if header not in dominators[tail]:
                    continue
                body = loops.setdefault(header, {header})
                stack = [tail]
                while stack:
                    block = stack.pop()
                    if block not in body and block in self.reachable:
                        body.add(block)
                        stack.extend(self.predecessors[block])
        return loops

    def clean_path(
        self, header: int, body: set[int], wanted: Wanted = nothing
    ) -> list[Instruction]:
        """Header to back edge: most HMMA, then most of what is wanted, then most copies, then
        fewest instructions. Loops inside of it are gone through once."""
        best: dict[int, Option | None] = {}
        dominators = self.dominators

        def cost(block: int) -> tuple[int, ...]:
            instructions = self.blocks[block]
            mma = sum(i.is_mma for i in instructions)
            copies = sum(i.is_copy for i in instructions)
            return -mma, -wanted(instructions), -copies, len(instructions)

        def visit(block: int) -> Option | None:
            if block in best:
                return best[block]
            options: list[Option] = []
            for successor in self.successors[block]:
                if successor == header:
                    options.append(((0, 0, 0, 0), []))
                elif successor in body and successor not in dominators[block]:
                    rest = visit(successor)
                    if rest is not None:
                        options.append(rest)
            best[block] = None
            if options:
                rest_cost, rest_path = min(options)
                total = tuple(a + b for a, b in zip(cost(block), rest_cost, strict=True))
                best[block] = total, [block, *rest_path]
            return best[block]

        sys.setrecursionlimit(100_000)
        found = visit(header)
        return [i for block in found[1] for i in self.blocks[block]] if found else []


def mma_loops(kernel: Kernel, wanted: Wanted = nothing) -> list[Loop]:
    """The innermost loops with HMMA."""
    graph = FlowGraph(kernel.instructions)

    def has_mma(blocks: set[int]) -> bool:
        return any(i.is_mma for n in blocks for i in graph.blocks[n])

    bodies = {header: body for header, body in graph.loops().items() if has_mma(body)}
    innermost = {
        header: body
        for header, body in bodies.items()
        if not any(other < body for other in bodies.values())
    }
    loops = []
    for header, body in innermost.items():
        path = graph.clean_path(header, body, wanted)
        on_path = {i.address for i in path}
        blocks = [graph.blocks[n] for n in sorted(body)]
        loops.append(Loop(path, [block for block in blocks if block[0].address not in on_path]))
    return [loop for loop in loops if loop.mma]


def hot_loop(kernel: Kernel, wanted: Wanted = nothing) -> Loop | None:
    """The innermost loop with the most HMMA; of equals (a masked twin) the shortest path. Of
    decoding that for up to 16 packed rows, whose step is 64 keys."""
    loops = mma_loops(kernel, wanted)
    sign = 1 if kernel.is_decode else -1
    return min(loops, key=lambda loop: (sign * loop.mma, len(loop.path)), default=None)


def many_rows_loop(kernel: Kernel) -> Loop | None:
    """Of decoding, the loop for 17 to 64 packed rows, whose step is 32 keys."""
    loops = mma_loops(kernel) if kernel.is_decode else []
    return min(loops, key=lambda loop: (-loop.mma, len(loop.path)), default=None)
