"""The functions of flash_attn 2.8 against manual attention in fp64, with every option."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flash_cases import (
    COMMON,
    DIM,
    HEADS,
    HEADS_KV,
    OF_FA2,
    OFFSETS,
    OFFSETS_K,
    PACKING,
    check_rows,
    kept_of,
    keywords,
    packed_of,
    scores_of,
    tensors_of,
    wrong_signatures,
)
from flashtile.integrations import flash_attn as module
from flashtile.integrations.flash_attn import flash_attn_interface
from reference import Packing, Recorder
from scores_reference import Tensors, check, manual_scores, manual_scores_varlen
from test_kvcache import Cache, int32, rotate

pytestmark = pytest.mark.usefixtures("one_thread")

flash_attn: Any = module  # what is returned depends on arguments
interface: Any = flash_attn_interface
dropout_mask_varlen: Any = flashtile.dropout_mask_varlen  # of a tuple of arguments

SELF = Packing(OFFSETS, OFFSETS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
BAND = "window_size_left, window_size_right, softcap, alibi_slopes"
SAVED = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
RECORDED = {
    "flash_attn_func": f"(q, k, v, {TAIL})",
    "flash_attn_kvpacked_func": f"(q, kv, {TAIL})",
    "flash_attn_qkvpacked_func": f"(qkv, {TAIL})",
    "flash_attn_varlen_func": f"(q, k, v, {LENGTHS}, {TAIL}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {LENGTHS}, {TAIL})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {TAIL})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)"
    ),
    "_flash_attn_forward": (f"(q, k, v, dropout_p, softmax_scale, causal, {BAND}, return_softmax)"),
    "_flash_attn_varlen_forward": (
        f"(q, k, v, {LENGTHS}, dropout_p, softmax_scale, causal, window_size_left=-1, "
        "window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
        "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0)"
    ),
    "_flash_attn_backward": (
        f"({SAVED}, dropout_p, softmax_scale, causal, {BAND}, deterministic, rng_state=None)"
    ),
    "_flash_attn_varlen_backward": (
        f"({SAVED}, {LENGTHS}, dropout_p, softmax_scale, causal, {BAND}, deterministic, "
        "rng_state=None, zero_tensors=False)"
    ),
}


def test_signatures() -> None:
    assert not wrong_signatures(RECORDED, interface)
    for name in flash_attn.__all__:
        assert name == "__version__" or getattr(flash_attn, name) is getattr(interface, name)
    for name in RECORDED:
        if name.startswith("flash"):
            last = list(inspect.signature(getattr(interface, name)).parameters)[-1]
            assert last == "s_aux", name
    wrapped = ("forward", "backward", "varlen_forward", "varlen_backward")
    for name in wrapped:
        function = getattr(interface, f"_wrapped_flash_attn_{name}")
        assert function is getattr(interface, f"_flash_attn_{name}")
        assert inspect.getfullargspec(function).args  # which ring-flash-attn reads


def two(result: Any) -> tuple[Tensor, Tensor]:
    """out and LSE of what return_attn_probs returns."""
    out, lse, weights = result
    assert weights.shape == (0,)
    return out, lse


@DTYPES
@pytest.mark.parametrize("name", OF_FA2)
def test_dense(name: str, dtype: torch.dtype) -> None:
    case = OF_FA2[name]

    def attend(t: Tensors) -> tuple[Tensor, Tensor]:
        options = {**case.peer, **keywords(t)}
        out = flash_attn.flash_attn_func(t["q"], t["k"], t["v"], **options)
        result = flash_attn.flash_attn_func(
            t["q"], t["k"], t["v"], **options, return_attn_probs=True
        )
        assert isinstance(out, Tensor)
        assert torch.equal(out, result[0])
        return two(result)

    for rows in ((9, 14), (14, 9)):  # the second has rows that see no key
        tensors = tensors_of(case, *rows, HEADS_KV, dtype)
        check(attend, lambda t: manual_scores(t, **case.oracle), tensors, dtype)


@pytest.mark.parametrize("name", OF_FA2)
def test_dense_packed(name: str) -> None:
    case, dtype = OF_FA2[name], torch.float32

    def kv(t: Tensors) -> tuple[Tensor, Tensor]:
        packed = torch.stack((t["k"], t["v"]), 2)
        options = {**case.peer, **keywords(t)}
        return two(
            flash_attn.flash_attn_kvpacked_func(t["q"], packed, **options, return_attn_probs=True)
        )

    def qkv(t: Tensors) -> tuple[Tensor, Tensor]:
        packed = torch.stack((t["q"], t["k"], t["v"]), 2)
        options = {**case.peer, **keywords(t)}
        return two(flash_attn.flash_attn_qkvpacked_func(packed, **options, return_attn_probs=True))

    oracle = lambda t: manual_scores(t, **case.oracle)  # noqa: E731
    check(kv, oracle, tensors_of(case, 9, 14, HEADS_KV, dtype), dtype)
    check(qkv, oracle, tensors_of(case, 13, 13, HEADS, dtype), dtype)


@pytest.mark.parametrize("name", OF_FA2)
def test_varlen(name: str) -> None:
    case, dtype = OF_FA2[name], torch.float32
    cu_q, cu_k = int32(OFFSETS), int32(OFFSETS_K)
    longest = (torch.tensor(9, dtype=torch.int32), torch.tensor(11))  # 0-d, as transformers gives

    def attend(t: Tensors) -> tuple[Tensor, Tensor]:
        given = (t["q"], t["k"], t["v"], cu_q, cu_k, *longest)
        options = {**case.peer, **keywords(t)}
        out = flash_attn.flash_attn_varlen_func(*given, **options)
        result = flash_attn.flash_attn_varlen_func(*given, **options, return_attn_probs=True)
        assert torch.equal(out, result[0])
        return two(result)

    def kv(t: Tensors) -> tuple[Tensor, Tensor]:
        packed = torch.stack((t["k"], t["v"]), 1)
        options = {**case.peer, **keywords(t), "return_attn_probs": True}
        given = (t["q"], packed, cu_q, cu_k, *longest)
        return two(flash_attn.flash_attn_varlen_kvpacked_func(*given, **options))

    def qkv(t: Tensors) -> tuple[Tensor, Tensor]:
        packed = torch.stack((t["q"], t["k"], t["v"]), 1)
        options = {**case.peer, **keywords(t), "return_attn_probs": True}
        return two(flash_attn.flash_attn_varlen_qkvpacked_func(packed, cu_q, 9, **options))

    total = (OFFSETS[-1], OFFSETS_K[-1])
    oracle = lambda t: manual_scores_varlen(t, PACKING, **case.oracle)  # noqa: E731
    for function in (attend, kv):
        check(function, oracle, packed_of(case, *total, HEADS_KV, dtype), dtype)
    oracle = lambda t: manual_scores_varlen(t, SELF, **case.oracle)  # noqa: E731
    check(qkv, oracle, packed_of(case, total[0], total[0], HEADS, dtype), dtype)


def test_packed_tensors_are_not_copied_and_have_one_gradient() -> None:
    qkv = torch.randn(2, 7, 3, HEADS, DIM, requires_grad=True)
    with Recorder() as recorder:
        out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
        out.sum().backward()
    (call,) = recorder.calls["flashtile.forward.default"]
    storage = qkv.untyped_storage().data_ptr()
    assert [t.untyped_storage().data_ptr() for t in call[:3]] == [storage] * 3
    assert qkv.grad is not None
    assert qkv.grad.is_contiguous()
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 7, 2, 4, 16\); allowed: .*3, num_he"):
        flash_attn.flash_attn_qkvpacked_func(qkv[:, :, :2])


def test_any_strides() -> None:
    heads_first = torch.randn(3, 2, HEADS, 8, DIM)
    q, k, v = heads_first.transpose(2, 3)  # as transformers gives them: no copy
    wide = torch.randn(3, 2, 8, HEADS, 2 * DIM)[..., ::2]  # gaps in the last dimension
    for given in ((q, k, v), wide.unbind(0)):
        expected = flashtile.attention(*(t.contiguous() for t in given))
        assert torch.equal(flash_attn.flash_attn_func(*given), expected)
    with Recorder() as recorder:
        flash_attn.flash_attn_func(q, k, v)
    assert list(recorder.calls) == ["flashtile.forward.default"]


@pytest.mark.parametrize("name", ["plain", "window_causal", "softcap", "alibi"])
def test_dropout_and_its_weights(name: str) -> None:
    case, p = OF_FA2[name], 0.3
    tensors = tensors_of(case, 9, 14, HEADS_KV, torch.float32)
    keep = kept_of(lambda state: flashtile.dropout_mask(state, p, 2, HEADS, 9, 14))
    options = {"dropout_p": p, "return_attn_probs": True}

    def attend(t: Tensors) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        out, lse, _ = flash_attn.flash_attn_func(
            t["q"], t["k"], t["v"], **options, **case.peer, **keywords(t)
        )
        return out, lse

    def oracle(t: Tensors) -> tuple[Tensor, ...]:
        return manual_scores(t, dropout_p=p, keep=keep, **case.oracle)

    check(attend, oracle, tensors, torch.float32)
    torch.manual_seed(7)
    out, lse, weights = flash_attn.flash_attn_func(
        *(tensors[n] for n in "qkv"), **options, **case.peer, **keywords(tensors)
    )
    assert weights.shape == (2, HEADS, 128, 128)
    assert weights.dtype == torch.float32
    used = weights[:, :, :9, :14]
    assert torch.equal(used < 0, ~keep & (used != 0))
    # As the peer's tests read it: blocks of keys, each with the largest score up to it.
    assert interface._get_block_size_n("cpu", DIM, True, False) >= 14
    wide = {name: t.double() for name, t in tensors.items()}
    scored = manual_scores(wide, **case.oracle)[1]
    assert torch.allclose(lse.double(), scored, atol=1e-5)
    shares = used.clamp(min=0).double() / used.abs().double().sum(-1, keepdim=True) / (1 - p)
    values = wide["v"].repeat_interleave(HEADS // HEADS_KV, 2)
    expected = torch.einsum("bhqk,bkhd->bqhd", shares, values)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_dropout_of_packed_sequences() -> None:
    case, p = OF_FA2["alibi"], 0.3
    tensors = packed_of(case, OFFSETS[-1], OFFSETS_K[-1], HEADS_KV, torch.float32)
    given: Any = (int32(OFFSETS), int32(OFFSETS_K), 9, 11)
    keep = kept_of(lambda state: dropout_mask_varlen(state, p, *given, HEADS))

    def call(t: Tensors) -> Any:
        torch.manual_seed(7)
        options = {"dropout_p": p, "return_attn_probs": True, **case.peer, **keywords(t)}
        return flash_attn.flash_attn_varlen_func(t["q"], t["k"], t["v"], *given, **options)

    def oracle(t: Tensors) -> tuple[Tensor, ...]:
        return manual_scores_varlen(t, PACKING, dropout_p=p, keep=keep, **case.oracle)

    check(lambda t: call(t)[:2], oracle, tensors, torch.float32)
    weights = call(tensors)[2]
    assert weights.shape == (3, HEADS, 128, 128)
    used = weights[0, :, :6, :11]
    assert torch.equal(used < 0, ~keep[0, :, :6, :11] & (used != 0))
    assert not weights[1].any()


@pytest.mark.parametrize("name", [*COMMON, "alibi"])
@pytest.mark.parametrize("page_size", [0, 4])
def test_kvcache(name: str, page_size: int) -> None:
    case, ends = OF_FA2[name], (17, 3, 9)
    cache = Cache(ends, page_size, 24, HEADS_KV, DIM, DIM, leftpad=(2, 0, 4))
    scores = scores_of(case, 3)
    q = torch.randn(3, 2, HEADS, DIM)
    how = {**case.peer, **keywords(scores), **cache.where()}
    out, lse = interface.flash_attn_with_kvcache(
        q, cache.k, cache.v, **how, return_softmax_lse=True
    )
    assert torch.equal(out, interface.flash_attn_with_kvcache(q, cache.k, cache.v, **how))
    check_rows((out, lse), q, cache, ends, case, scores)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_kvcache_appends_and_rotates(interleaved: bool, causal: bool) -> None:
    before, after = (14, 3), (17, 6)
    cache = Cache(before, 0, 24, HEADS_KV, DIM, DIM)
    q, k, v = (torch.randn(2, 3, h, DIM) for h in (HEADS, HEADS_KV, HEADS_KV))
    angles = torch.outer(torch.arange(24), 100.0 ** -torch.arange(0, 1, 1 / 4))
    tables = (angles.cos(), angles.sin())
    out, lse = interface.flash_attn_with_kvcache(
        q,
        cache.k,
        cache.v,
        k,
        v,
        *tables,
        causal=causal,
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
        **cache.where(),
    )
    turned = []
    for b, length in enumerate(before):
        places = length + torch.arange(3)
        keys, values = cache.rows(b, length + 3)
        assert torch.equal(values[0, -3:], v[b])
        expected = rotate(
            k[b].double(), places, (tables[0].double(), tables[1].double()), interleaved
        )
        assert torch.allclose(keys[0, -3:].double(), expected, atol=1e-6)
        turned.append(rotate(q[b], places if causal else places[:1], tables, interleaved))
    case = OF_FA2["causal" if causal else "plain"]
    check_rows((out, lse), torch.stack(turned), cache, after, case, {})


def test_one_length_for_all() -> None:
    cache = Cache((8, 8), 0, 8, HEADS_KV, DIM, DIM)
    q = torch.randn(2, 1, HEADS, DIM)
    place = {"cache_batch_idx": cache.where()["cache_batch_idx"]}
    given = flash_attn.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=8, **place)
    assert torch.equal(given, flash_attn.flash_attn_with_kvcache(q, cache.k, cache.v, **place))


def test_varlen_over_pages() -> None:
    case, ends = OF_FA2["sink_causal_softcap"], (17, 5)
    cache = Cache(ends, 4, 20, HEADS_KV, DIM, DIM)
    q, sink = torch.randn(4, HEADS, DIM), torch.randn(HEADS)
    given = (int32([0, 2, 4]), int32([0, 17, 22]), 2, 17)
    where = {"block_table": cache.pages.int(), "s_aux": sink, **case.peer}
    out, lse, weights = flash_attn.flash_attn_varlen_func(
        q, cache.k, cache.v, *given, **where, return_attn_probs=True
    )
    assert weights.shape == (0,)
    dense = (out.view(2, 2, HEADS, DIM), lse.view(HEADS, 2, 2).transpose(0, 1))
    check_rows(dense, q.view(2, 2, HEADS, DIM), cache, ends, case, {"sink": sink})
    scale, band = DIM**-0.5, (-1, -1, 0.0, None)
    below = interface._flash_attn_varlen_forward(
        q, cache.k, cache.v, *given, 0.0, scale, True, *band, block_table=cache.pages.int()
    )
    dense = (below[0].view(2, 2, HEADS, DIM), below[1].view(HEADS, 2, 2).transpose(0, 1))
    check_rows(dense, q.view(2, 2, HEADS, DIM), cache, ends, OF_FA2["causal"], {})
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1 with block_table; allowed: 0"):
        flash_attn.flash_attn_varlen_func(q, cache.k, cache.v, *given, 0.1, **where)


def test_compilers_see_one_graph() -> None:
    q, k, v = (torch.randn(2, 6, HEADS, DIM, requires_grad=True) for _ in range(3))
    cu = int32([0, 6, 12])

    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(3, 3))
        out = out + flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), softcap=2.0)
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return out + flash_attn.flash_attn_varlen_func(*flat, cu, cu, 6, 6).view_as(q)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected, out = step(q, k, v), compiled(q, k, v)
    assert torch.equal(out, expected)
    for one, other in zip(*(torch.autograd.grad(o.sum(), q) for o in (out, expected)), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_refusals_are_sentences() -> None:
    q = torch.randn(1, 4, HEADS, DIM)
    with pytest.raises(TypeError, match=r"window_size is 3; allowed: \(left, right\), two ints"):
        flash_attn.flash_attn_func(q, q, q, window_size=3)
    with pytest.raises(TypeError, match=r"k is a NoneType; allowed: torch\.Tensor"):
        flash_attn.flash_attn_func(q, None, q)
    cu, rest = int32([0, 4]), (0.0, 1.0, False)
    with pytest.raises(ValueError, match="leftpad_k is a tensor; allowed: None"):
        interface._flash_attn_varlen_forward(
            q[0], q[0], q[0], cu, cu, 4, 4, *rest, leftpad_k=int32([1])
        )
    with pytest.raises(AttributeError, match=r"flash_attn_gpu\.fwd is compiled code of another"):
        interface.flash_attn_gpu.fwd(q, q, q)
    cache = torch.randn(1, 8, HEADS, DIM, requires_grad=True)
    out = flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=8)
    with pytest.raises(RuntimeError):
        out.sum().backward()
