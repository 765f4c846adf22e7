"""Options of flash_attn's functions, beside what the oracle calls them; caches with an oracle."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference import Packing, assert_close, assert_lse_close
from scores_reference import Tensors, manual_scores
from test_kvcache import Cache

HEADS, HEADS_KV, DIM = 4, 2, 16
OFFSETS, OFFSETS_K = [0, 6, 6, 15], [0, 11, 11, 15]  # one sequence is empty
PACKING = Packing(OFFSETS, OFFSETS_K)


class Case(NamedTuple):
    """One set of options."""

    peer: dict[str, Any]  # numbers, as flash_attn takes them
    oracle: dict[str, Any]  # the same, as manual_scores takes them
    tensors: tuple[str, ...] = ()  # by the oracle's names


COMMON = {
    "plain": Case({}, {}),
    "causal": Case({"causal": True}, {"causal": True}),
    "window": Case({"window_size": (5, 2)}, {"window_size": (5, 2)}),
    "window_list": Case({"window_size": [3, -7]}, {"window_size": (3, -1)}),
    "window_tensor": Case({"window_size": torch.tensor([0, 4])}, {"window_size": (0, 4)}),
    "window_0d": Case(
        {"window_size": (torch.tensor(6), torch.tensor(-1)), "causal": True},
        {"window_size": (6, 0)},
    ),
    "window_causal": Case(
        {"window_size": (4, 4), "causal": True}, {"window_size": (4, 4), "causal": True}
    ),
    "softcap": Case({"softcap": 1.5}, {"softcap": 1.5}),
    "softcap_off": Case({"softcap": -1.0}, {}),
    "scale": Case({"softmax_scale": 0.6}, {"softmax_scale": 0.6}),
    "sink": Case({}, {}, ("sink",)),
    "sink_causal_softcap": Case(
        {"causal": True, "softcap": 2.0}, {"causal": True, "softcap": 2.0}, ("sink",)
    ),
}
OF_FA2 = {
    **COMMON,
    "alibi": Case({"causal": True}, {"causal": True}, ("alibi_slopes",)),
    "tiny_dropout": Case({"dropout_p": 1e-30, "deterministic": True}, {}),
}


def scores_of(case: Case, batch: int) -> Tensors:
    """The tensors of a case: slopes by head or, for two sequences, by sequence, and a sink."""
    shape = (batch, HEADS) if batch > 1 else (HEADS,)
    every = {"alibi_slopes": torch.rand(*shape), "sink": torch.randn(HEADS)}
    return {name: every[name] for name in case.tensors}


def keywords(tensors: Tensors) -> dict[str, Any]:
    """Slopes and sink by the peer's names."""
    names = {"alibi_slopes": "alibi_slopes", "sink": "s_aux"}
    return {names[name]: tensor for name, tensor in tensors.items() if name in names}


def render(function: Any) -> str:
    """The parameters and defaults, without annotations and without our own keyword."""
    parameters = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(function).parameters.values()
        if p.name != "s_aux"
    ]
    return str(inspect.Signature(parameters))


def wrong_signatures(recorded: dict[str, str], module: Any) -> list[str]:
    """Functions whose parameters or defaults are not the recorded ones."""
    rendered = {name: render(getattr(module, name)) for name in recorded}
    return [
        f"{name}{text} is not {name}{recorded[name]}"
        for name, text in rendered.items()
        if text != recorded[name]
    ]


def check_rows(
    results: tuple[Tensor, Tensor],
    q: Tensor,
    cache: Cache,
    ends: tuple[int, ...],
    case: Case,
    scores: Tensors,
) -> None:
    """out and LSE of dense queries over a cache, of which sequence b has `ends[b]` rows."""
    for b, end in enumerate(ends):
        k, v = cache.rows(b, end)
        tensors: Tensors = {"q": q[b][None], "k": k, "v": v, **scores}
        if "alibi_slopes" in scores:
            tensors["alibi_slopes"] = scores["alibi_slopes"][b][None]
        wide = {name: t.double() for name, t in tensors.items()}
        exact, exact_lse, _ = manual_scores(wide, **case.oracle)
        plain, _, _ = manual_scores(tensors, **case.oracle)
        assert_close("out", results[0][b][None], exact, plain)
        assert_lse_close(results[1][b][None], exact_lse)


def tensors_of(case: Case, rows_q: int, rows_k: int, heads_kv: int, dtype: torch.dtype) -> Tensors:
    """Two dense sequences."""
    shapes = ((2, rows_q, HEADS, DIM), (2, rows_k, heads_kv, DIM), (2, rows_k, heads_kv, DIM))
    tensors = {n: torch.randn(*s).to(dtype) for n, s in zip("qkv", shapes, strict=True)}
    return {**tensors, **scores_of(case, 2)}


def packed_of(case: Case, total_q: int, total_k: int, heads_kv: int, dtype: torch.dtype) -> Tensors:
    """As many packed rows, of three sequences."""
    shapes = ((total_q, HEADS, DIM), (total_k, heads_kv, DIM), (total_k, heads_kv, DIM))
    tensors = {n: torch.randn(*s).to(dtype) for n, s in zip("qkv", shapes, strict=True)}
    scores = scores_of(case, len(OFFSETS) - 1)
    return {**tensors, **scores}


def kept_of(draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Which weights a call keeps that draws right after this seed."""
    torch.manual_seed(7)
    return draw(torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64))
