"""The performance model of the benchmarks: its arithmetic, and published figures."""

import dataclasses
import math

import model
import pytest

GPUS = {gpu.name: gpu for gpu in model.GPUS}
H100 = GPUS["H100"]
FORMS = {form.name: form for form in model.WGMMA}


def test_makespan_deals_the_longest_first() -> None:
    assert model.makespan([1, 1, 2, 3, 3], workers=2) == 5
    assert model.makespan([2, 2, 2], workers=2) == 4  # two waves, half of the second idle
    assert model.makespan([7], workers=100) == 7


def test_tiles_of_rows_counts_what_a_causal_mask_leaves() -> None:
    forward = FORMS["forward d128 128 x 128 wgmma"]
    assert model.tiles_of_rows(forward, model.Work(1, 1, 1, 512, causal=False)) == [4, 4, 4, 4]
    assert model.tiles_of_rows(forward, model.Work(1, 1, 1, 512, causal=True)) == [1, 2, 3, 4]
    backward = FORMS["backward d128 64 x 128 wgmma bulk"]
    assert model.tiles_of_rows(backward, model.Work(1, 1, 1, 512, causal=True)) == [8, 6, 4, 2]


def test_one_full_wave_runs_at_the_rate_of_a_tile() -> None:
    form = FORMS["forward d128 128 x 128 wgmma"]
    work = model.Work(batch=H100.multiprocessors, heads=1, group=1, seqlen=128 * 64, causal=False)
    got = model.predict(form, H100, work)
    assert math.isclose(got.balance, 1)
    share = form.units(H100)["tensor"] / model.tile_clocks(form, H100)
    assert got.tflops == pytest.approx(H100.tflops * share * 64 / (64 + model.EDGE_TILES))


def test_global_memory_is_a_floor() -> None:
    form = FORMS["forward d64 192 x 128 wgmma"]
    slow = dataclasses.replace(H100, memory_tbps=1e-3)
    got = model.predict(form, slow, model.work_of(64, 2048, causal=False))
    assert got.limit == "memory"
    assert got.tflops == pytest.approx(4 * 2048 * 64 / (4 * 64 * 2) * 1e-3)


@pytest.mark.parametrize("row", model.PUBLISHED, ids=lambda row: f"{row[1]} {row[2]}")
def test_model_is_within_a_quarter_of_what_was_published(
    row: tuple[str, str, bool, int, str],
) -> None:
    gpu, name, causal, tflops, _ = row
    form = FORMS[name]
    got = model.predict(form, GPUS[gpu], model.work_of(form.head_dim, 16384, causal))
    assert got.tflops == pytest.approx(tflops, rel=0.25)
