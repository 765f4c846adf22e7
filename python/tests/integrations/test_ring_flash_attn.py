"""The package ring-flash-attn on flashtile's flash_attn, in two processes, in bf16.

In fp32 the package itself rounds dq to bf16.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flashtile
from processes import Check, failures_in_processes
from reference import (
    Packing,
    Recorder,
    Result,
    Triple,
    assert_result,
    manual_attention,
    manual_varlen,
    run,
)

WORLD = 2
ROWS, HEADS, HEADS_KV, HEAD_DIM = 48, 4, 2, 32
LENGTHS = (24, 8, 16)
OFFSETS = (0, 24, 32, 48)

DENSE = (("ring", False), ("ring", True), ("zigzag_ring", True), ("stripe", True))
VARLEN = (
    ("ring", False),
    ("ring", True),
    ("zigzag_ring", True),
    ("llama3", False),
    ("llama3", True),
)
EVERY = [*((kind, causal, False) for kind, causal in DENSE), *((k, c, True) for k, c in VARLEN)]


def name_of(kind: str, causal: bool, is_varlen: bool) -> str:
    return f"{kind}-{'varlen' if is_varlen else 'dense'}-{'causal' if causal else 'full'}"


def package() -> Any:
    """ring_flash_attn without its patches of transformers, which need a transformers before 5."""
    flashtile.install_as("flash_attn")
    adapters: Any = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules["ring_flash_attn.adapters"] = adapters
    return importlib.import_module("ring_flash_attn")


def rows_of(kind: str, rank: int, is_varlen: bool) -> Tensor:
    """Which rows of the whole a rank holds."""
    if kind == "stripe":
        return torch.arange(rank, ROWS, WORLD)
    found = []
    for begin, end in pairwise(OFFSETS if is_varlen and kind != "llama3" else (0, ROWS)):
        if kind == "zigzag_ring":
            parts = torch.arange(begin, end).chunk(2 * WORLD)
            found += [parts[rank], parts[2 * WORLD - 1 - rank]]
        else:
            found.append(torch.arange(begin, end).chunk(WORLD)[rank])
    return torch.cat(found)


def whole(is_varlen: bool) -> tuple[Triple, Tensor]:
    """q, k, v and the gradient of out, equal on every rank."""
    batch = () if is_varlen else (2,)
    heads = (HEADS, HEADS_KV, HEADS_KV, HEADS)
    q, k, v, dout = (torch.randn(*batch, ROWS, h, HEAD_DIM).bfloat16() for h in heads)
    return (q, k, v), dout


def arguments(kind: str, causal: bool, is_varlen: bool) -> dict[str, Any]:
    """What follows q, k and v."""
    if not is_varlen:
        return {}
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    if kind != "llama3":
        return {"cu_seqlens": offsets // WORLD, "max_seqlen": max(LENGTHS) // WORLD}
    of_rank = package().llama3_flash_attn_prepare_cu_seqlens(
        offsets, causal, dist.get_rank(), WORLD
    )
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "local_k_slice")
    return {**dict(zip(names, of_rank, strict=True)), "heads_k_stride": 1}


def check(kind: str, causal: bool, is_varlen: bool) -> None:
    """out, LSE and gradients of this rank's rows, and that flashtile computed them."""
    inputs, dout = whole(is_varlen)
    rows, dim = rows_of(kind, dist.get_rank(), is_varlen), inputs[0].dim() - 3
    function = getattr(package(), f"{kind}_flash_attn_{'varlen_' if is_varlen else ''}func")
    given = arguments(kind, causal, is_varlen)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = function(q, k, v, **given, causal=causal, return_attn_probs=True)
        return out, lse

    manual: Callable[..., tuple[Tensor, Tensor]] = partial(manual_attention, causal=causal)
    if is_varlen:
        manual = partial(manual_varlen, packing=Packing(OFFSETS, OFFSETS), causal=causal)
    q, k, v, mine = (t.index_select(dim, rows) for t in (*inputs, dout))
    with Recorder() as recorder:
        actual = run(attend, (q, k, v), mine, None)
    assert "flashtile.forward.default" in recorder.calls
    assert "flashtile.backward.default" in recorder.calls
    wide = (inputs[0].double(), inputs[1].double(), inputs[2].double())
    exact, plain = (run(manual, whole, dout, None) for whole in (wide, inputs))
    assert_result(actual, part_of(exact, rows), part_of(plain, rows))


def part_of(result: Result, rows: Tensor) -> Result:
    """The rows of a rank."""
    dim = result.out.dim() - 3
    dense = [getattr(result, name).index_select(dim, rows) for name in ("out", "dq", "dk", "dv")]
    out, dq, dk, dv = dense
    return Result(out, result.lse[..., rows], dq, dk, dv)


def checks() -> Mapping[str, Check]:
    return {name_of(*case): partial(check, *case) for case in EVERY}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return failures_in_processes(WORLD, checks, tmp_path_factory.mktemp("ring_flash_attn"))


@pytest.mark.parametrize("name", [name_of(*case) for case in EVERY])
def test_in_processes(failures: dict[str, str], name: str) -> None:
    assert name not in failures, failures[name]
