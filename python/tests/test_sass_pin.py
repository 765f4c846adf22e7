"""The pin of the kernels' opcode sequences: what it calls equal, changed, renamed, missing, new."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import sass
import sass_pin
from sass_pin import Entry, Pin

FP16 = ("sm_80", "ForwardSm80<64, large, fp16>")
BF16 = ("sm_80", "ForwardSm80<64, large, bf16>")
HOPPER = ("sm_90a", "ForwardSm90<64, fp16>")
ENTRY = Entry("0123456789abcdef", 1000, 64, 260, 64, 128)
LOOP = "hot loop per HGMMA 4.062 (260/64)"
CODE = """
        /*0000*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0010*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   EXIT ;
        /*0040*/                   NOP;
"""


def make_kernel(code: str) -> sass.Kernel:
    body = [sass.parse_instruction(match) for match in sass.INSTRUCTION.finditer(code)]
    return sass.Kernel("symbol", "sm_80", body, registers=128)


def make_entry(code: str) -> Entry:
    kernel = make_kernel(code)
    return sass_pin.make_entry(kernel, sass.hot_loop(kernel))


def make_pin(**changes: object) -> Pin:
    pin = Pin("nvcc 13.0.88", "cuobjdump 13.0.85", {FP16: ENTRY, BF16: ENTRY, HOPPER: ENTRY})
    return dataclasses.replace(pin, **changes)  # type: ignore[arg-type]


def test_entry() -> None:
    entry = make_entry(CODE)
    assert dataclasses.astuple(entry)[1:] == (4, 1, 2, 1, 128)
    assert make_entry(CODE.replace("R8", "R12").replace("NOP", "NOP; NOP")) == entry
    for old, new in ((".M88.4", ".M88.2"), ("HMMA.16816.F32 ", "HMMA.16816.F32.BF16 ")):
        assert make_entry(CODE.replace(old, new)).opcodes != entry.opcodes


def test_names_say_nothing_of_files() -> None:
    inner = "flashtile::DqOrder<256, (flashtile::Memory)1>"
    kernel = f"flashtile::BackwardDq<__nv_bfloat16, 256, {inner} >"
    demangled = f"void flashtile::run<{kernel} >({kernel}::Params)"
    assert sass_pin.shorten(demangled) == "BackwardDq<bf16, 256, DqOrder<256, small>>"
    assert sass_pin.shorten(demangled.replace("> >", ">>")) == sass_pin.shorten(demangled)


def check(tmp_path: Path, old: Pin, new: Pin, *, whole: bool = True) -> int:
    sass_pin.write(old, tmp_path / "pin.json")
    assert sass_pin.read(tmp_path / "pin.json") == old
    return sass_pin.check(tmp_path / "pin.json", new, whole)


def test_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, make_pin(), make_pin()) == 0
    assert "3 equal, 0 changed" in capsys.readouterr().out
    assert sass_pin.compare_files(tmp_path / "pin.json", tmp_path / "pin.json") == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"opcodes": "f", "instructions": 1004, "loop": 264},
            f"instructions 1000 -> 1004, HGMMA 64, {LOOP} -> 4.125 (264/64), registers 128",
        ),
        (
            {"opcodes": "f"},
            f"other opcodes, the same counts: instructions 1000, HGMMA 64, {LOOP}, registers 128",
        ),
        (
            {"registers": 136},
            f"instructions 1000, HGMMA 64, {LOOP}, registers 128 -> 136",
        ),
        (
            {"loop": 0, "loop_mma": 0},
            f"instructions 1000, HGMMA 64, {LOOP} -> -, registers 128",
        ),
    ],
)
def test_changed(
    changed: dict[str, int], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = make_pin().kernels | {HOPPER: dataclasses.replace(ENTRY, **changed)}  # type: ignore[arg-type]
    new = make_pin(kernels=kernels)
    assert check(tmp_path, make_pin(), new) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"FAILED changed ForwardSm90<64, fp16> sm_90a: {said}"
    assert lines[1:] == ["if the change is meant: make sass-report ARGS=--pin"]
    sass_pin.write(new, tmp_path / "new.json")
    assert sass_pin.compare_files(tmp_path / "pin.json", tmp_path / "new.json") == 1
    assert "2 equal, 1 changed, 0 renamed" in capsys.readouterr().out


def test_missing_and_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = dataclasses.replace(ENTRY, opcodes="other")
    new = make_pin(kernels={FP16: ENTRY, HOPPER: ENTRY, ("sm_80", "CheckCache"): other})
    assert check(tmp_path, make_pin(), new) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "FAILED missing ForwardSm80<64, large, bf16> sm_80",
        "FAILED new CheckCache sm_80",
    ]
    part = make_pin(kernels={FP16: ENTRY})
    assert check(tmp_path, make_pin(), part, whole=False) == 0
    assert check(tmp_path, make_pin(), part) == 1


def test_an_architecture_that_is_not_built_is_not_missing(tmp_path: Path) -> None:
    assert check(tmp_path, make_pin(), make_pin(kernels={FP16: ENTRY, BF16: ENTRY})) == 0


def test_renamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal code goes with equal template arguments where it can, and never counts twice."""
    names = {key: (key[0], key[1].replace("ForwardSm", "PrefillSm")) for key in (BF16, FP16)}
    new = make_pin(kernels={HOPPER: ENTRY} | dict.fromkeys(names.values(), ENTRY))
    assert check(tmp_path, make_pin(), new) == 0
    said = capsys.readouterr().out.splitlines()[2:]
    assert sorted(said) == sorted(
        f"renamed {old[1]} sm_80: now {now[1]}" for old, now in names.items()
    )
    one = make_pin(kernels={HOPPER: ENTRY, ("sm_80", "Prefill"): ENTRY})
    assert check(tmp_path, make_pin(), one) == 1
    captured = capsys.readouterr()
    assert captured.out.count("\nrenamed ") == 1
    assert captured.err.count("FAILED missing ") == 1


def test_another_compiler_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = make_pin(compiler="nvcc 13.2.20", kernels={})
    assert check(tmp_path, make_pin(), new) == 0
    said = "pin.json is of nvcc 13.0.88: code by nvcc 13.2.20 is not compared with it"
    assert said in capsys.readouterr().out


def test_another_disassembler_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = make_pin().kernels | {FP16: dataclasses.replace(ENTRY, opcodes="f")}
    new = make_pin(disassembler="cuobjdump 13.5.37", kernels=kernels)
    assert check(tmp_path, make_pin(), new) == 1
    assert "may spell opcodes in another way" in capsys.readouterr().err


def test_no_pin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sass_pin.check(tmp_path / "sass_pin.json", make_pin(), whole=True) == 1
    assert "sass_pin.json is missing" in capsys.readouterr().err


def test_the_stored_pin_is_whole(tmp_path: Path) -> None:
    """As --pin wrote it: a line a kernel, in order, for every architecture of the library."""
    pin = sass_pin.read(sass_pin.DEFAULT)
    sass_pin.write(pin, tmp_path / "pin.json")
    assert (tmp_path / "pin.json").read_text() == sass_pin.DEFAULT.read_text()
    assert {architecture for architecture, _ in pin.kernels} == {
        "sm_80",
        "sm_89",
        "sm_90",
        "sm_90a",
    }
