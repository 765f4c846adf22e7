"""can_run and the call agree: verdict and sentence, over random calls with random faults.

Faults are drawn from every argument: types, dtypes, devices, shapes, strides, values. Several may
meet, so the order in which they are found counts, too.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashtile
from test_kvcache import int32

pytestmark = pytest.mark.usefixtures("one_thread")

Draw = random.Random
Call = dict[str, Any]

NO_TENSORS = (None, 3, 1.5, [1.0], "q")
FLAGS = (True, False, np.True_, 1, None, "yes", torch.tensor(True))
SCALES = (None, 0.5, 2, np.float32(0.25), 0.0, -1.0, float("nan"), float("inf"), float("-inf"),
          1e300, -1e39, 1e-46, 10**400, "1", True, np.False_, torch.tensor(1.0), 1j)  # fmt: skip
WINDOWS = ((-1, -1), (0, 0), [3, 1], (np.int64(2), np.int32(0)), (torch.tensor(1), 2), (2**40, 0),
           (2**63, 0), (0, -(2**70)), (-2, 0), (1, -7), (1.0, 2), (True, 2), (None, None), (3,),
           (1, 2, 3), 3, None, "ab", (torch.tensor(1.0), 0), (np.True_, 0))  # fmt: skip
ALIGNMENTS = ("bottom_right", "top_left", "left", 0, None)
LENGTHS = (0, 3, np.int64(2), torch.tensor(2), 2**31 - 1, 2**31, 2**70, -1, True, np.True_, 2.0,
           "2", torch.tensor(-1), torch.tensor([2]), torch.tensor(2.0), torch.tensor(True),
           None)  # fmt: skip
BATCH, ROWS, HEADS, HEADS_KV, DIM = 2, 5, 4, 2, 8


def spoiled(draw: Draw, tensor: Tensor) -> Any:
    """The tensor with a fault of its form."""
    floats = (torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    strided = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2]
    return draw.choice(
        (
            draw.choice(NO_TENSORS),
            tensor.to(draw.choice((*floats, torch.float32, torch.int64, torch.int32))),
            tensor[None],
            tensor[0],
            tensor.flatten(),
            tensor.flatten()[0],
            tensor[:1],
            tensor[..., : tensor.shape[-1] // 2],
            tensor[..., :0],
            tensor.narrow(max(tensor.dim() - 2, 0), 0, 1),
            tensor.to("meta"),
            strided,
            tensor[:1].expand_as(tensor),
            tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor,
        )
    )


def offsets(draw: Draw, rows: int) -> Tensor:
    """cu_seqlens of two sequences, seldom right."""
    return int32(draw.choice(([0, 2, rows], [0, 0, rows - 1], [1, 2, rows], [0, 4, 3],
                              [0, -3, rows], [0, 2, rows + 1])))  # fmt: skip


def options(draw: Draw) -> Call:
    drawn: Call = {}
    for name, values in (
        ("causal", FLAGS),
        ("softmax_scale", SCALES),
        ("window_size", WINDOWS),
        ("causal_alignment", ALIGNMENTS),
        ("return_lse", FLAGS),
    ):
        if draw.random() < 0.3:
            drawn[name] = draw.choice(values[:3] if draw.random() < 0.8 else values)
    return drawn


CAPS = (0.0, 2.0, np.float32(30.0), -1.0, float("nan"), 1e39, 10**400, None, "1", True)
PROBABILITIES = (0.0, 0.5, 1, 1e-12, -0.1, 1.1, float("nan"), 1e-6, None, "0.5", np.True_)


def scores(draw: Draw, form: tuple[int, ...], rows: tuple[int, ...], *, cache: bool) -> Call:
    """A bias is of `form`, (batch, heads, queries, keys), and what goes by row has `rows`."""
    batch, num_heads = form[:2]
    packed = len(rows) == 1
    small = tuple(draw.choice((size, size, 1)) for size in form)
    tensors: Call = {
        "bias": torch.zeros(small[1:] if packed and draw.random() < 0.5 else small),
        "mask": torch.ones(small, dtype=torch.bool),
        "alibi_slopes": torch.zeros(draw.choice(((num_heads,), (batch, num_heads)))),
        "sink": torch.zeros(
            draw.choice(
                ((num_heads,), (batch, num_heads), (*(rows[:-1] or (1,)), num_heads, rows[-1]))
            )
        ),
        "query_scale": torch.ones(rows),
    }
    drawn = {name: tensor for name, tensor in tensors.items() if draw.random() < 0.15}
    if "bias" in drawn and draw.random() < 0.3:
        drawn["bias"] = (drawn["bias"],) * draw.choice((1, 2, 2, 3))
    if draw.random() < 0.2:
        drawn["softcap"] = draw.choice(CAPS[:2] if draw.random() < 0.5 else CAPS)
    if cache:
        return drawn
    if draw.random() < 0.2:
        drawn["dropout_p"] = draw.choice(
            PROBABILITIES[:2] if draw.random() < 0.5 else PROBABILITIES
        )
        if draw.random() < 0.7:
            drawn["rng_state"] = torch.zeros(2, dtype=torch.int64)
    if draw.random() < 0.2:
        drawn["return_max_logit"] = draw.choice(FLAGS[:2] if draw.random() < 0.7 else FLAGS)
    return drawn


def heads(draw: Draw) -> tuple[int, int, int, int]:
    """Of q and k; head dims of k and v."""
    return (HEADS, draw.choice((HEADS_KV, HEADS_KV, HEADS, 3)), DIM, draw.choice((DIM, 4)))


def an_out(draw: Draw, call: Call, shape: tuple[int, ...]) -> Tensor:
    """Somewhere to write to: new memory, or memory that is read, or that meets itself."""
    return draw.choice(
        (torch.zeros(shape), torch.zeros(shape), call["q"], torch.zeros(1).expand(shape))
    )


def dense(draw: Draw) -> Call:
    num_heads, num_heads_kv, dim, dim_v = heads(draw)
    call = {
        "q": torch.zeros(BATCH, ROWS, num_heads, dim),
        "k": torch.zeros(BATCH, ROWS + 1, num_heads_kv, dim),
        "v": torch.zeros(BATCH, ROWS + 1, num_heads_kv, dim_v),
        **options(draw),
    }
    if draw.random() < 0.3:
        call["deterministic"] = draw.choice(FLAGS)
    if draw.random() < 0.3:
        call["out"] = an_out(draw, call, (BATCH, ROWS, num_heads, dim_v))
    form = (BATCH, num_heads, ROWS, ROWS + 1)
    return {**call, **scores(draw, form, (BATCH, ROWS), cache=False)}


def varlen(draw: Draw) -> Call:
    num_heads, num_heads_kv, dim, dim_v = heads(draw)
    call = {
        "q": torch.zeros(ROWS, num_heads, dim),
        "k": torch.zeros(ROWS + 1, num_heads_kv, dim),
        "v": torch.zeros(ROWS + 1, num_heads_kv, dim_v),
        "cu_seqlens_q": offsets(draw, ROWS) if draw.random() < 0.2 else int32([0, 2, ROWS]),
        "cu_seqlens_k": offsets(draw, ROWS + 1) if draw.random() < 0.2 else int32([0, 3, ROWS + 1]),
        "max_seqlen_q": ROWS,
        "max_seqlen_k": ROWS + 1,
        **options(draw),
    }
    for name in ("max_seqlen_q", "max_seqlen_k"):
        if draw.random() < 0.15:
            call[name] = draw.choice(LENGTHS)
    for name in ("seqused_q", "seqused_k"):
        if draw.random() < 0.3:
            call[name] = int32(draw.choice(([2, 2], [0, 1], [3, 1], [-1, 2])))
    if draw.random() < 0.2:
        call["check"] = draw.choice(FLAGS)
    if draw.random() < 0.2:
        call["out"] = an_out(draw, call, (ROWS, num_heads, dim_v))
    form = (BATCH, num_heads, 3, draw.choice((3, 3, 2)))
    return {**call, **scores(draw, form, (ROWS,), cache=False)}


def numbers_of_cache(draw: Draw, call: Call) -> None:
    """Where the sequences lie, and sometimes more."""
    lengths = draw.choice(([3, 5], [3, 5], [0, 6], [7, 8], [-1, 2], [9, 0]))
    call["cache_seqlens"] = draw.choice((int32(lengths), int32(lengths), 4, *LENGTHS))
    if draw.random() < 0.4:
        call["block_table"] = int32(draw.choice(([0, 1, 2, 3], [3, 1, 0, 2], [0, -1, 2, 4])))
        call["block_table"] = call["block_table"].view(2, 2)
        call["k_cache"], call["v_cache"] = (call[n].view(4, 4, *call[n].shape[2:]) for n in CACHES)
    if draw.random() < 0.2:
        call["cache_batch_idx"] = int32(draw.choice(([1, 0], [0, 1], [0, 7], [-1, 1])))
    if draw.random() < 0.2:
        call["cache_leftpad"] = int32(draw.choice(([0, 1], [2, 3], [9, 0], [-1, 0])))


CACHES = ("k_cache", "v_cache")
KEYS = (*CACHES, "k", "v")
NARROW = (torch.float16, torch.bfloat16)


def kvcache(draw: Draw) -> Call:
    num_heads, num_heads_kv, dim, dim_v = heads(draw)
    call = {
        "q": torch.zeros(BATCH, 2, num_heads, dim),
        "k_cache": torch.zeros(BATCH, 8, num_heads_kv, dim),
        "v_cache": torch.zeros(BATCH, 8, num_heads_kv, dim_v),
        **options(draw),
    }
    rows: tuple[int, ...] = (BATCH, 2)
    if draw.random() < 0.3:
        rows = (4,)
        call["q"] = torch.zeros(*rows, num_heads, dim)
        call["cu_seqlens_q"] = offsets(draw, 4) if draw.random() < 0.4 else int32([0, 3, 4])
    numbers_of_cache(draw, call)
    if draw.random() < 0.6:
        call["k"] = torch.zeros(*rows, num_heads_kv, dim)
        call["v"] = torch.zeros(*rows, num_heads_kv, dim_v)
        if draw.random() < 0.1:
            call["k"] = call["k_cache"][tuple(slice(0, size) for size in call["k"].shape)]
        if draw.random() < 0.4:
            call["rotary_cos"], call["rotary_sin"] = torch.ones(9, 3), torch.zeros(9, 3)
            call["rotary_interleaved"] = draw.choice(FLAGS[:3])
    for name, values in (("num_splits", LENGTHS), ("max_seqlen_q", LENGTHS), ("check", FLAGS)):
        if draw.random() < 0.15:
            call[name] = draw.choice(values)
    if draw.random() < 0.2:
        call["out"] = an_out(draw, call, (*rows, num_heads, dim_v))
    form = (BATCH, num_heads, 3 if len(rows) == 1 else 2, draw.choice((8, 8, 5)))
    return {**call, **scores(draw, form, rows, cache=True)}


def with_faults(draw: Draw, call: Call) -> Call:
    """The call, or one with narrow keys, with up to three tensors spoiled."""
    if draw.random() < 0.15:
        dtype = draw.choice(NARROW)
        call |= {n: call[n].to(dtype) for n in KEYS if n in call}
    tensors = [n for n, value in call.items() if isinstance(value, Tensor) and value.dim() > 0]
    for name in draw.sample(tensors, min(len(tensors), draw.choice((0, 0, 0, 1, 1, 2, 3)))):
        call[name] = spoiled(draw, call[name])
    for name in ("cu_seqlens_q", "cu_seqlens_k"):  # None asks about another call
        if call.get(name, "") is None:
            call[name] = 3
    return call


def verdict(call: Callable[[], Any]) -> tuple[bool, str]:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return False, str(error)
    return True, ""


FUNCTIONS: list[tuple[Callable[[Draw], Call], Any, Any]] = [
    (dense, flashtile.attention, flashtile.can_run),
    (varlen, flashtile.attention_varlen, flashtile.can_run),
    (kvcache, flashtile.attention_with_kvcache, flashtile.can_run_with_kvcache),
]


@pytest.mark.parametrize(("form", "function", "can_run"), FUNCTIONS, ids=lambda f: f.__name__)
def test_can_run_says_what_the_call_says(
    form: Callable[[Draw], Call], function: Any, can_run: Any
) -> None:
    draw, said = random.Random(form.__name__), set()
    for index in range(500):
        call = with_faults(draw, form(draw))
        asked, answer = can_run(**call), verdict(lambda call=call: function(**call))  # type: ignore[misc]
        assert asked == answer, f"call {index}: {call}"
        said.add(answer[1].split(";")[0])
        assert not answer[1] or "; allowed: " in answer[1], answer
    assert "" in said, "no call ran"
    assert len(said) > 100, "too few different sentences to be a test"
