"""What stands between the scores and the softmax, against the ways there are without flashtile."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from bench_cases import EAGER, FLEX, OURS, PLAIN, SCORES, Case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flashtile

Attention = Callable[..., Tensor]
SOFTCAP, DROPOUT = 50.0, 0.1


def score_cases() -> list[Case]:
    """Eight heads; everything dense, and sinks also where a call is short."""
    shapes = [(1024, 64), (2048, 128)]
    options = itertools.product(
        shapes, ("float32", "bfloat16"), (False, True), ("forward", "backward"), SCORES
    )
    cases = [
        Case(dtype, 8, 8, n, n, head_dim, causal, direction, score=score)
        for (n, head_dim), dtype, causal, direction, score in options
        if direction == "backward" or not score.startswith("dbias")
    ]
    short = itertools.product((64, 1024), ("float32", "bfloat16"), ("forward", "backward"))
    return cases + [
        Case(dtype, 8, 8, 64, keys, 64, keys == 64, direction, score="sink")
        for keys, dtype, direction in short
    ]


class Numbers:
    """What the calls of a case share."""

    def __init__(self, case: Case) -> None:
        self.case = case
        heads = 1 if case.score.endswith("(1, 1, q, k)") else case.heads
        self.dtype = getattr(torch, case.dtype)
        shape = (1, heads, case.seqlen_q, case.seqlen_k)
        self.bias = torch.randn(shape).to(self.dtype)
        self.mask = torch.rand(shape) < 0.7
        self.mask[..., 0] = True  # no row without keys
        self.slopes = torch.linspace(0.01, 0.5, case.heads)
        self.sink = torch.randn(case.heads)
        self.state = torch.tensor([1, 2])
        rows, keys = torch.arange(case.seqlen_q)[:, None], torch.arange(case.seqlen_k)
        self.distance = (rows + case.seqlen_k - case.seqlen_q - keys).abs()
        self.seen = rows + case.seqlen_k - case.seqlen_q >= keys

    @property
    def name(self) -> str:
        """Without the shape."""
        return self.case.score.partition(" ")[0]

    def keywords(self) -> dict[str, Any]:
        """For flashtile."""
        return {
            "bias": {"bias": self.bias},
            "dbias": {"bias": self.bias},
            "mask": {"mask": self.mask},
            "softcap": {"softcap": SOFTCAP},
            "alibi": {"alibi_slopes": self.slopes},
            "dropout": {"dropout_p": DROPOUT, "rng_state": self.state},
            "sink": {"sink": self.sink},
        }[self.name]

    def hidden(self, scores: Tensor) -> Tensor:
        """-inf behind the query of a causal case."""
        return scores.masked_fill(~self.seen, -torch.inf) if self.case.causal else scores


def score_runs(
    case: Case, tensors: list[Tensor], direction: Callable[..., Callable[[], object]]
) -> dict[str, Callable[[], object]]:
    """q, k, v and dout are (1, heads, seqlen, head_dim); `direction` makes a call of an attention.

    Where the gradient of the bias is wanted, the bias is a fourth input.
    """
    numbers = Numbers(case)
    ours = [t.transpose(1, 2).contiguous() for t in tensors]
    is_leaf = numbers.name == "dbias"
    inputs = {
        name: [*given[:3], *([numbers.bias] if is_leaf else []), given[3]]
        for name, given in (("ours", ours), ("theirs", tensors))
    }

    def through_flashtile(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        given = {"bias": bias[0]} if bias else numbers.keywords()
        return flashtile.attention(q, k, v, causal=case.causal, **given)

    runs = {OURS: direction(case, through_flashtile, inputs["ours"])}
    if numbers.name == "sink":
        plain = functools.partial(flashtile.attention, causal=case.causal)
        return runs | {PLAIN: direction(case, plain, inputs["ours"])}
    for name in case.rivals:
        rival = {"sdpa": _sdpa, EAGER: _eager, FLEX: _flex}[name](numbers)
        runs[name] = direction(case, rival, inputs["theirs"])
    return runs


def _sdpa(numbers: Numbers) -> Attention:
    """Causal masks are in the mask beforehand, unless its gradient is wanted."""
    causal = numbers.case.causal
    if numbers.name == "dropout":
        return functools.partial(scaled_dot_product_attention, is_causal=causal, dropout_p=DROPOUT)
    if numbers.name == "dbias":
        return lambda q, k, v, bias: scaled_dot_product_attention(
            q, k, v, attn_mask=numbers.hidden(bias)
        )
    seen = numbers.mask & numbers.seen if causal else numbers.mask
    mask = seen if numbers.name == "mask" else numbers.hidden(numbers.bias)
    return functools.partial(scaled_dot_product_attention, attn_mask=mask)


def _eager(numbers: Numbers) -> Attention:
    """Plain torch operations, as models write them."""
    bias = numbers.slopes[:, None, None] * -numbers.distance

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        if numbers.name == "softcap":
            scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
        else:
            scores = scores + bias.to(scores.dtype)
        return numbers.hidden(scores).softmax(-1) @ v

    return attend


@functools.cache
def _compiled_flex() -> Attention:
    # Imports the compiler, for which other cases need not wait.
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    torch._dynamo.config.recompile_limit = 64  # a compilation for every case
    compiled: Attention = torch.compile(flex_attention, dynamic=False)
    return compiled


def _flex(numbers: Numbers) -> Attention:
    """flex_attention, compiled in the first call, which is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask  # noqa: PLC0415

    case, slopes = numbers.case, numbers.slopes

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    def alibi(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query - key).abs()

    def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    sizes = (case.seqlen_q, case.seqlen_k)
    mask = create_block_mask(is_seen, None, None, *sizes, device="cpu") if case.causal else None
    score_mod = cap if numbers.name == "softcap" else alibi

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():  # inference mode is not traced
            return _compiled_flex()(q, k, v, score_mod=score_mod, block_mask=mask)

    return attend
