"""The model of decoding: its arithmetic, and that its rings are those of the kernels."""

import json
import pathlib
import re

import model
import model_decode
import pytest

H200 = next(gpu for gpu in model.GPUS if gpu.name == "H200")
CONFIG = pathlib.Path(model_decode.__file__).parents[1] / "kernel" / "config.cuh"


def test_memory_is_as_fast_for_a_step_as_for_the_whole_cache() -> None:
    form = model_decode.Decode(head_dim=128, memory="large", instructions=300, ldmatrix=16)
    steps = 32 * 8 * 4096 / model_decode.STEP  # of 32 sequences, 8 heads
    clocks = steps / H200.multiprocessors * form.step_bytes / model_decode.bytes_per_clock(H200)
    microseconds = clocks / (H200.clock * 1e3)
    assert microseconds == pytest.approx(model_decode.kv_microseconds(H200, 32, 4096))
    assert microseconds == pytest.approx(32 * 4096 * 8 * 128 * 4 / (0.9 * 4.8e12) * 1e6)


def test_the_busiest_unit_is_compared_with_memory() -> None:
    few = model_decode.Decode(128, "large", 300, 16)
    many = model_decode.Decode(128, "large", 30000, 16)
    assert model_decode.busiest_share(few, H200) < 1 < model_decode.busiest_share(many, H200)


def test_slices_of_an_architecture_are_read(tmp_path: pathlib.Path) -> None:
    row = {"instructions": 302, "classes": {"ldmatrix": 16}}
    rows = [
        {"name": "decode d128 large", "architecture": "sm_80"} | row,
        {"name": "decode d64 large", "architecture": "sm_80"} | row,
        {"name": "decode d64 small", "architecture": "sm_80"} | row,
        {"name": "decode d64 small", "architecture": "sm_89"} | row,
        {"name": "forward d64 large", "architecture": "sm_80"} | row,
    ]
    report = tmp_path / "report.json"
    report.write_text(json.dumps(rows))
    large = model_decode.read_decode(report, "sm_80")
    assert [(form.head_dim, form.memory) for form in large] == [(64, "large"), (128, "large")]
    assert [form.memory for form in model_decode.read_decode(report, "sm_89")] == ["small"]


def test_rings_are_those_of_the_kernels() -> None:
    text = CONFIG.read_text()
    for memory in ("large", "small"):
        table = re.search(rf"kDecode{memory.capitalize()}\[\] = .*?;", text, re.DOTALL)
        assert table is not None
        rows = re.findall(r"{(\d+), {(\d), (\d)}}", table[0])
        rings = {int(dim): (int(slots), int(blocks)) for dim, slots, blocks in rows}
        assert rings == model_decode.RINGS[memory]
