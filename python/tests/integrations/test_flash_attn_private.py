"""The functions of flash_attn with an underscore, and its classes, against manual attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flash_cases import (
    DIM,
    HEADS,
    HEADS_KV,
    OFFSETS,
    OFFSETS_K,
    PACKING,
    Case,
    kept_of,
    packed_of,
    tensors_of,
)
from flashtile.integrations import flash_attn as module
from flashtile.integrations.flash_attn import flash_attn_interface
from reference import assert_close
from scores_reference import Tensors, manual_scores, manual_scores_varlen
from test_kvcache import int32

pytestmark = pytest.mark.usefixtures("one_thread")

flash_attn: Any = module  # what is returned depends on arguments
interface: Any = flash_attn_interface
dropout_mask_varlen: Any = flashtile.dropout_mask_varlen  # of a tuple of arguments


class Below(torch.autograd.Function):
    """Attention by the functions with an underscore, as others build theirs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Any, given: Any) -> Any:
        name = "_flash_attn_varlen_forward" if given else "_flash_attn_forward"
        *how, slopes = options
        out, lse, weights, state = getattr(interface, name)(q, k, v, *given, *how, slopes, False)
        assert weights.shape == (0,)
        assert state.dtype == torch.int64
        assert state.shape == (2,)
        ctx.save_for_backward(q, k, v, out, lse, state)
        ctx.how = options, given
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> Any:
        q, k, v, out, lse, state = ctx.saved_tensors
        options, given = ctx.how
        gradients = tuple(torch.full_like(t, torch.nan) for t in (q, k, v))
        name = "_flash_attn_varlen_backward" if given else "_flash_attn_backward"
        function = getattr(interface, name)
        saved = (dout, q, k, v, out, lse)
        sums = function(*saved, *gradients, *given, *options, True, rng_state=state)
        rows = q.shape[-3]
        exact = (dout.double() * out.double()).sum(-1).transpose(-1, -2)
        assert torch.allclose(sums[..., :rows].double(), exact, atol=1e-5)
        wanted = rows + 128 * (len(given[0]) - 1) if given else 128
        assert sums.shape == (*exact.shape[:-1], wanted)
        return *gradients, None, None


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_functions_with_an_underscore(packed: bool, p: float) -> None:
    case = Case({}, {"causal": True, "window_size": (5, -1), "softcap": 3.0}, ("alibi_slopes",))
    given: Any = (int32(OFFSETS), int32(OFFSETS_K), 9, 11) if packed else ()
    tensors = (
        packed_of(case, OFFSETS[-1], OFFSETS_K[-1], HEADS_KV, torch.float32)
        if packed
        else tensors_of(case, 9, 14, HEADS_KV, torch.float32)
    )
    slopes = tensors.pop("alibi_slopes")
    keep = None
    if p and packed:
        keep = kept_of(lambda state: dropout_mask_varlen(state, p, *given, HEADS))
    elif p:
        keep = kept_of(lambda state: flashtile.dropout_mask(state, p, 2, HEADS, 9, 14))
    options = (p, DIM**-0.5, True, 5, -1, 3.0, slopes)

    def attend(t: Tensors) -> Tensor:
        torch.manual_seed(7)
        out: Tensor = Below.apply(t["q"], t["k"], t["v"], options, given)[0]
        return out

    def oracle(t: Tensors, dtype: torch.dtype) -> Tensor:
        every = {**{n: x.to(dtype) for n, x in t.items()}, "alibi_slopes": slopes.to(dtype)}
        rest: Any = {"dropout_p": p, "keep": keep, **case.oracle}
        if packed:
            return manual_scores_varlen(every, PACKING, **rest)[0]
        return manual_scores(every, **rest)[0]

    def run(function: Callable[[Tensors], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        out = function(leaves)
        return [out.detach(), *torch.autograd.grad(out, tuple(leaves.values()), dout.to(dtype))]

    dout = torch.randn(*tensors["q"].shape)
    actual = run(attend, torch.float32)
    exact = run(lambda t: oracle(t, torch.float64), torch.float64)
    plain = run(lambda t: oracle(t, torch.float32), torch.float32)
    for name, *three in zip(("out", "dq", "dk", "dv"), actual, exact, plain, strict=True):
        assert_close(name, *three)


def test_backward_takes_a_result_over_more_keys() -> None:
    q, k, v, dout = (torch.randn(1, 8, HEADS, DIM) for _ in range(4))
    scale, rest = DIM**-0.5, (False, -1, -1, 0.0, None)
    out, lse, *_ = interface._flash_attn_forward(q, k, v, 0.0, scale, *rest, False)
    whole = [torch.empty_like(t) for t in (q, k, v)]
    interface._flash_attn_backward(dout, q, k, v, out, lse, *whole, 0.0, scale, *rest, True)
    dq = torch.zeros_like(q)
    for part in (slice(0, 3), slice(3, 8)):
        keys, values = k[:, part], v[:, part]
        mine = [torch.empty_like(t) for t in (q, keys, values)]
        saved = (dout, q, keys, values, out, lse)
        interface._flash_attn_backward(*saved, *mine, 0.0, scale, *rest, True)
        dq += mine[0]
        assert torch.allclose(mine[1], whole[1][:, part], atol=1e-5)
        assert torch.allclose(mine[2], whole[2][:, part], atol=1e-5)
    assert torch.allclose(dq, whole[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"dk has shape \(1, 3, 4, 16\); allowed: \(1, 8, 4, 16\)"):
        interface._flash_attn_backward(
            dout, q, k, v, out, lse, None, whole[1][:, :3], None, 0.0, scale, *rest, True
        )
    with pytest.raises(ValueError, match=r"rng_state is None and dropout_p is 0\.5; allowed: that"):
        interface._flash_attn_backward(
            dout, q, k, v, out, lse, *whole, 0.5, scale, *rest, True, None
        )


def test_classes_with_apply() -> None:
    q, k, v = (torch.randn(2, 6, HEADS, DIM, requires_grad=True) for _ in range(3))
    how = (0.0, None, True, (-1, -1), 0.0, None, False, False)
    expected = flash_attn.flash_attn_func(q, k, v, causal=True)
    kv, qkv = torch.stack((k, v), 2), torch.stack((q, k, v), 2)
    cu = int32([0, 6, 12])

    def flat(t: Tensor) -> Tensor:
        return t.flatten(0, 1)

    results = [
        interface.FlashAttnFunc.apply(q, k, v, *how, True),
        interface.FlashAttnKVPackedFunc.apply(q, kv, *how, True),
        interface.FlashAttnQKVPackedFunc.apply(qkv, *how, True),
        interface.FlashAttnVarlenFunc.apply(
            *map(flat, (q, k, v)), cu, cu, 6, 6, *how, None, True
        ).view_as(q),
        interface.FlashAttnVarlenKVPackedFunc.apply(
            flat(q), flat(kv), cu, cu, 6, 6, *how, True
        ).view_as(q),
        interface.FlashAttnVarlenQKVPackedFunc.apply(flat(qkv), cu, 6, *how, True).view_as(q),
    ]
    for result in results:
        assert torch.equal(result, expected)
        assert result.requires_grad
    assert not interface.FlashAttnFunc.apply(q, k, v, *how, False).requires_grad
