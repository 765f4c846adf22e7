"""What the compiler made of the kernels: instructions per tensor-core instruction in the hot loops.

    python benchmarks/sass_report.py                            the library in build/
    python benchmarks/sass_report.py --classes forward.cubin    any cubins, objects, libraries
    python benchmarks/sass_report.py --pin                      store the opcode sequences
    python benchmarks/sass_report.py --compare old.json new.json  two such files

Prints, per kernel: the hot loop's clean path (sass.py) beside the budget pinned here and beside
FlashAttention-2's (fa2_sass.json); what ptxas gave it; and how long its other units work while the
tensor cores work for 100. fp16 and bf16 share a row where they agree.

Exit status 1 when a kernel exceeds its budget, accesses local memory in its hot loop, waits for
shared memory where it must not, or has other opcodes than sass_pin.json (sass_pin.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import sass_pin
import sass_sm90
from sass import (
    Kernel,
    Loop,
    Wanted,
    find_cuobjdump,
    has_many,
    hot_loop,
    many_rows_loop,
    read_kernels,
)
from sass_budgets import (
    BUDGETS,
    CAP_BUDGETS,
    DETERMINISTIC_EXTRA,
    LOCAL_LIMITS,
    MANY_ROWS,
    OPTION_BUDGETS,
    SHARED_LIMITS,
)

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE.parent / "build"

# Clocks of one instruction of a warp. HMMA.16816 (fp32 accumulation) on one of the four tensor
# cores of a multiprocessor: A100, L40S, H100 at its peak rate, which mma.sync does not reach.
TENSOR_CLOCKS = {"sm_80": 8, "sm_89": 16, "sm_90": 4}
EXP_CLOCKS = 8  # 16 exponentials per clock and multiprocessor
SHARED_BYTES_PER_CLOCK = 32  # 128 per multiprocessor, a quarter for each tensor core


Plans = dict[str, dict[str, object]]  # of kernel_plans, by kernel


@dataclasses.dataclass
class Row:
    """One kernel, or the fp16 and the bf16 one where nothing here tells them apart."""

    name: str
    architecture: str
    dtypes: list[str]
    registers: int
    stack_bytes: int
    hmma: int
    instructions: int
    budget: float | None
    fa2: float | None  # per HMMA
    local_in_loop: int
    local_in_kernel: int
    issue_percent: float
    exp_percent: float
    shared_percent: float
    shared_limit: float | None
    plan: str  # tile, warps, blocks per multiprocessor
    shared_bytes: int | None
    classes: dict[str, int]

    @property
    def per_hmma(self) -> float:
        return self.instructions / self.hmma

    def numbers(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {"dtypes": None, "per_hmma": round(self.per_hmma, 3)}

    def failures(self) -> list[str]:
        where = f"{self.name} {'/'.join(self.dtypes)} {self.architecture}"
        found = []
        allowed = (n for name, n in LOCAL_LIMITS.items() if self.name.startswith(name))
        if self.local_in_loop > next(allowed, 0):
            found.append(f"{where}: {self.local_in_loop} local-memory instructions in the hot loop")
        if self.budget is not None and self.per_hmma > self.budget:
            found.append(f"{where}: {self.per_hmma:.3f} instructions per HMMA, not {self.budget}")
        if self.shared_limit is not None and self.shared_percent > self.shared_limit:
            found.append(f"{where}: shared memory is busy {self.shared_percent} % of the time")
        return found


def budget_of(kernel: Kernel) -> float | None:
    key = kernel.key()
    budget = BUDGETS.get(key) if key else None
    if budget is not None and "deterministic" in kernel.name:
        return round(budget + DETERMINISTIC_EXTRA, 2)
    return budget


def shared_limit_of(kernel: Kernel) -> float | None:
    key = kernel.key()
    return SHARED_LIMITS.get(key) if key and kernel.architecture == "sm_80" else None


def fa2_per_hmma(kernel: Kernel, loops: list[dict[str, object]]) -> float | None:
    """FA2's better mask: a kernel of ours serves them all."""
    key = kernel.key()
    if key is None:
        return None
    kernel_pass, head_dim, memory = key
    values = [
        int(str(loop["instructions"])) / int(str(loop["hmma"]))
        for loop in loops
        if (loop["pass"], loop["head_dim"]) == (kernel_pass, head_dim)
        and loop["class"] in ("both", memory)
    ]
    return min(values, default=None)


def shared_bytes(loop: Loop) -> int:
    """Bytes that a warp moves from and to shared memory in one iteration."""

    def width(text: str) -> int:
        return 16 if ".128" in text else 8 if ".64" in text else 4

    total = 0
    for i in loop.path:
        if i.opcode == "LDSM":
            total += 512 if ".4" in i.text else 256 if ".2" in i.text else 128
        elif i.opcode in ("LDS", "STS", "LDGSTS") and not i.text.startswith("LDS RZ"):
            total += 32 * width(i.text)
    return total


def make_many_rows(kernel: Kernel, row: Row, loop: Loop) -> Row:
    """The row of a decoding kernel's other loop."""
    key = kernel.key()
    assert key
    other = make_row(kernel, loop, [], {})
    other.name = row.name.replace("decode", MANY_ROWS, 1)
    other.budget = BUDGETS.get((key[0].replace("decode", MANY_ROWS, 1), *key[1:]))
    return other


def options_of(kernel: Kernel, loop: Loop) -> dict[str, tuple[Wanted, float | None]]:
    """The options whose code alone is looked for: by what it has, and its budget."""
    key = kernel.key()
    if key is None or key[2] != "large":
        return {}
    scores = loop.count("MUFU")  # of a lane
    capped = has_many("MUFU.RCP", scores)
    if key[0] == "backward scores":
        return {"softcap": (capped, CAP_BUDGETS.get((key[1], kernel.architecture)))}
    if key[0] != "forward scores" or kernel.architecture != "sm_80":
        return {}
    wanted = {
        "softcap": capped,
        "ALiBi": has_many("FFMA", 2 * scores),
        "bias fp32": has_many("LDG.E.64", scores // 2),
        "bias of 16 bits": has_many("LDG.E R", scores // 2 - 1),
    }
    return {name: (want, OPTION_BUDGETS.get((name, key[1]))) for name, want in wanted.items()}


def make_options(kernel: Kernel, row: Row, loop: Loop) -> list[Row]:
    """The rows of the paths with one option alone."""
    rows = []
    extra = DETERMINISTIC_EXTRA if "deterministic" in kernel.name else 0
    for name, (wanted, budget) in options_of(kernel, loop).items():
        path = hot_loop(kernel, wanted)
        if budget is None or path is None:
            continue
        other = make_row(kernel, path, [], {})
        other.name = f"{row.name} {name}"
        other.budget = round(budget + extra, 2)
        other.shared_limit = None
        rows.append(other)
    return rows


def make_row(kernel: Kernel, loop: Loop, fa2: list[dict[str, object]], plans: Plans) -> Row:
    tensor = TENSOR_CLOCKS.get(kernel.architecture.rstrip("a"), 8) * loop.mma

    def percent(clocks: float) -> float:
        return round(100 * clocks / tensor, 1)

    plan = plans.get(kernel.name.removesuffix(" deterministic"), {})
    return Row(
        name=kernel.name,
        architecture=kernel.architecture,
        dtypes=[kernel.dtype],
        registers=kernel.registers,
        stack_bytes=kernel.stack,
        hmma=loop.mma,
        instructions=len(loop.path),
        budget=budget_of(kernel),
        fa2=fa2_per_hmma(kernel, fa2),
        local_in_loop=loop.local,
        local_in_kernel=kernel.local,
        issue_percent=percent(len(loop.path)),
        exp_percent=percent(loop.count("MUFU") * EXP_CLOCKS),
        shared_percent=percent(shared_bytes(loop) / SHARED_BYTES_PER_CLOCK),
        shared_limit=shared_limit_of(kernel),
        plan=str(plan.get("plan", "-")),
        shared_bytes=int(str(plan["shared_bytes"])) if plan else None,
        classes=loop.by_class(),
    )


def read_plans(executable: pathlib.Path) -> Plans:
    """What the tuning table plans for each kernel; empty when the program has not been built."""
    if not executable.exists():
        return {}
    listing = subprocess.run([str(executable)], check=True, capture_output=True, text=True).stdout
    return {str(entry["kernel"]): entry for entry in map(json.loads, listing.splitlines())}


def merged(rows: list[Row]) -> list[Row]:
    """Rows that differ by nothing but the dtype become one."""
    kept: list[Row] = []
    for row in rows:
        twin = next((other for other in kept if other.numbers() == row.numbers()), None)
        if twin is None:
            kept.append(row)
        else:
            twin.dtypes.extend(dtype for dtype in row.dtypes if dtype not in twin.dtypes)
    return sorted(
        kept, key=lambda row: (row.architecture, [*map(natural, row.name.split())], row.dtypes)
    )


def natural(word: str) -> tuple[str, int]:
    digits = word.lstrip("d")
    return ("d", int(digits)) if digits.isdigit() else (word, 0)


def print_table(title: str, header: list[str], lines: list[list[object]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for line in lines:
        print(f"| {' | '.join('-' if x is None else str(x) for x in line)} |")


def print_tables(rows: list[Row], classes: bool) -> None:
    if not rows:
        return
    kernel = ["kernel", "dtype", "arch"]

    def table(title: str, columns: dict[str, Callable[[Row], object]]) -> None:
        lines = [
            [row.name, " ".join(sorted(row.dtypes)), row.architecture]
            + [value(row) for value in columns.values()]
            for row in rows
        ]
        print_table(title, kernel + list(columns), lines)

    table(
        "Hot loop: instructions on the clean path",
        {
            "HMMA": lambda row: row.hmma,
            "instructions": lambda row: row.instructions,
            "per HMMA": lambda row: f"{row.per_hmma:.2f}",
            "budget": lambda row: row.budget,
            "FA2": lambda row: f"{row.fa2:.2f}" if row.fa2 else None,
            "of FA2": lambda row: f"{row.per_hmma / row.fa2:.2f}" if row.fa2 else None,
            "local memory": lambda row: row.local_in_loop,
        },
    )
    table(
        "ptxas: what each kernel takes",
        {
            "registers": lambda row: row.registers,
            "stack B": lambda row: row.stack_bytes,
            "spill instructions": lambda row: row.local_in_kernel,
            "shared memory B": lambda row: row.shared_bytes,
            "tile, warps, blocks per SM": lambda row: row.plan,
        },
    )
    table(
        "Other units, in percent of the tensor cores' time (A100, L40S, H100 at peak rate)",
        {
            "issue slots": lambda row: row.issue_percent,
            "exponentials": lambda row: row.exp_percent,
            "shared memory": lambda row: row.shared_percent,
        },
    )
    if classes:
        table(
            "Instructions by class",
            {"classes": lambda row: ", ".join(f"{n} {c}" for n, c in row.classes.items())},
        )


def default_files() -> list[pathlib.Path]:
    return [path for path in [BUILD / "kernel" / "libflashtile.so"] if path.exists()]


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="cubins, objects, libraries")
    parser.add_argument("--filter", default="", help="only kernels whose name contains this")
    parser.add_argument("--classes", action="store_true", help="counts by instruction class")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    parser.add_argument("--dump", action="store_true", help="print the clean path of each kernel")
    parser.add_argument("--cuobjdump", help="path of the disassembler")
    parser.add_argument(
        "--plans",
        type=pathlib.Path,
        default=BUILD / "cpp_tests" / "kernel_plans",
        help="the program that prints the tuning table (built with the tests)",
    )
    parser.add_argument(
        "--pin", action="store_true", help="store every kernel's opcode sequence in the pin"
    )
    parser.add_argument(
        "--pin-file", type=pathlib.Path, default=sass_pin.DEFAULT, help="the pin, another one"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=pathlib.Path,
        metavar=("OLD", "NEW"),
        help="compare two pins, and do nothing else",
    )
    return parser, parser.parse_args()


@dataclasses.dataclass
class Report:
    """What one pass over the machine code has found."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    sm90_rows: list[sass_sm90.Row] = dataclasses.field(default_factory=list)
    entries: list[tuple[str, str, sass_pin.Entry]] = dataclasses.field(default_factory=list)

    def write(self, path: pathlib.Path) -> None:
        listing = [row.numbers() | {"dtypes": sorted(row.dtypes)} for row in self.rows]
        listing += [dataclasses.asdict(row) for row in self.sm90_rows]
        path.write_text(json.dumps(listing, indent=1) + "\n")

    def failures(self) -> list[str]:
        return [problem for row in [*self.rows, *self.sm90_rows] for problem in row.failures()]


def read_report(arguments: argparse.Namespace, cuobjdump: str, files: list[pathlib.Path]) -> Report:
    fa2 = json.loads((HERE / "fa2_sass.json").read_text())["loops"]
    plans = read_plans(arguments.plans)
    report = Report()
    for kernel in (kernel for path in files for kernel in read_kernels(cuobjdump, path)):
        if arguments.filter not in f"{kernel.name} {kernel.dtype} {kernel.architecture}":
            continue
        loop = hot_loop(kernel)
        entry = sass_pin.make_entry(kernel, loop)
        report.entries.append((kernel.architecture, kernel.symbol, entry))
        if loop is None:
            continue
        if sass_sm90.is_sm90(kernel):
            report.sm90_rows.append(sass_sm90.make_row(kernel, loop))
        else:
            report.rows.append(make_row(kernel, loop, fa2, plans))
            if (many := many_rows_loop(kernel)) is not None:
                report.rows.append(make_many_rows(kernel, report.rows[-1], many))
            else:
                report.rows += make_options(kernel, report.rows[-1], loop)
        if arguments.dump:
            print(f"\n{kernel.name} {kernel.dtype} {kernel.architecture}")
            print("\n".join(f"  {i.address:05x}  {i.text}" for i in loop.path))
    report.rows = merged(report.rows)
    return report


def pin_or_check(
    arguments: argparse.Namespace, cuobjdump: str, files: list[pathlib.Path], report: Report
) -> int:
    """Writes the pin or compares with it: 1 where a kernel differs."""
    pin = sass_pin.make_pin(cuobjdump, files, report.entries)
    if arguments.pin:
        sass_pin.write(pin, arguments.pin_file)
        print(f"\n{len(pin.kernels)} kernels by {pin.compiler} pinned in {arguments.pin_file}")
        return 0
    whole = not arguments.filter and all(".so" in path.name for path in files)
    return sass_pin.check(arguments.pin_file, pin, whole)


def main() -> int:
    parser, arguments = parse_arguments()
    if arguments.compare:
        return sass_pin.compare_files(*arguments.compare)
    if arguments.pin and arguments.filter:
        parser.error("--pin stores every kernel: leave --filter out")
    files = arguments.files or default_files()
    if not files:
        parser.error("no library in build/: name the files to read")
    cuobjdump = find_cuobjdump(arguments.cuobjdump)
    report = read_report(arguments, cuobjdump, files)
    if not report.rows and not report.sm90_rows:
        print("no kernel with tensor-core instructions found", file=sys.stderr)
        return 1
    print_tables(report.rows, arguments.classes)
    sass_sm90.print_table(report.sm90_rows)
    if arguments.json:
        report.write(arguments.json)
    pinned = pin_or_check(arguments, cuobjdump, files, report)
    problems = report.failures()
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else pinned


if __name__ == "__main__":
    sys.exit(main())
