"""Checkpointing that keeps attention, and DDP, FSDP2 and DTensors in two processes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import flashtile
from flashtile.integrations.training import OPS_TO_SAVE
from processes import Check, failures_in_processes
from reference import Recorder

HEADS, HEAD_DIM = 4, 16
WIDTH = HEADS * HEAD_DIM


class Block(nn.Module):
    """Attention with two key heads, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH * 2)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (HEADS * 2, HEAD_DIM))
        q, k, v = qkv.split((HEADS, HEADS // 2, HEADS // 2), dim=2)
        return x + self.out(flashtile.attention(q, k, v, causal=True).flatten(2))  # type: ignore[no-any-return]


def model_and_data() -> tuple[nn.Sequential, Tensor]:
    """Equal in every process: the seed is."""
    return nn.Sequential(Block(), Block()), torch.randn(4, 12, WIDTH)


def gradients_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def my_half(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def assert_gradients(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        whole = one.full_tensor() if isinstance(one, DTensor) else one
        torch.testing.assert_close(whole, other, rtol=1e-5, atol=1e-7)


def check_ddp() -> None:
    """Half of the batch on every rank gives the gradients of the whole."""
    model, x = model_and_data()
    torch.manual_seed(0)
    alone, _ = model_and_data()
    parallel = DistributedDataParallel(model)
    assert_gradients(gradients_of(parallel, my_half(x)), gradients_of(alone, x))


def check_fsdp() -> None:
    model, x = model_and_data()
    torch.manual_seed(0)
    alone, _ = model_and_data()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    actual = gradients_of(model, my_half(x))
    assert all(isinstance(gradient, DTensor) for gradient in actual)
    assert_gradients(actual, gradients_of(alone, x))


def check_fsdp_in_bf16() -> None:
    """Mixed precision casts parameters and inputs: q, k and v come in bf16, gradients in fp32."""
    model, x = model_and_data()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*model, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    with Recorder() as recorder:
        actual = gradients_of(model, my_half(x))
    calls = recorder.calls["flashtile.forward.default"]
    assert {tensor.dtype for call in calls for tensor in call[:3]} == {torch.bfloat16}
    assert {gradient.dtype for gradient in actual} == {torch.float32}
    assert all(bool(g.full_tensor().isfinite().all()) for g in actual if isinstance(g, DTensor))


def shards(mesh: DeviceMesh, tensors: Sequence[Tensor], dim: int | None) -> list[Tensor]:
    placement = Replicate() if dim is None else Shard(dim)
    return [distribute_tensor(t, mesh, [placement]).requires_grad_() for t in tensors]


def check_dtensor(attend: Any, tensors: Sequence[Tensor], dim: int, offsets: Sequence[Any]) -> None:
    """What two shards give is what the whole gives, and out stays sharded as q."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mine = shards(mesh, tensors, dim)
    spread = [distribute_tensor(t, mesh) if isinstance(t, Tensor) else t for t in offsets]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, right = attend(*mine, *spread), attend(*leaves, *offsets)
    assert out.placements == (Shard(dim),)
    assert out.to_local().shape[dim] == right.shape[dim] // 2
    torch.testing.assert_close(out.full_tensor(), right)
    actual = torch.autograd.grad(out.square().sum().full_tensor(), mine)
    expected = torch.autograd.grad(right.square().sum(), leaves)
    for one, other in zip(actual, expected, strict=True):
        assert isinstance(one, DTensor)
        torch.testing.assert_close(one.full_tensor(), other)


def dense() -> list[Tensor]:
    return [torch.randn(2, 8, heads, 16) for heads in (4, 2, 2)]


def packed(count: int = 2) -> list[Tensor]:
    return [torch.randn(8, heads, 16) for heads in (4, *[2] * count)]


def with_scores(tensors: Sequence[Tensor], sink: Tensor) -> Tensor:
    q, k, v = tensors
    return flashtile.attention(q, k, v, causal=True, softcap=5.0, sink=sink)


def check_dtensor_of_scores() -> None:
    """The sink is sharded with the heads, and so is its gradient."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors, sink = dense(), torch.randn(4)
    mine, (my_sink,) = shards(mesh, tensors, 2), shards(mesh, [sink], 0)
    sink.requires_grad_()
    out, right = with_scores(mine, my_sink), with_scores(tensors, sink)
    assert isinstance(out, DTensor)
    assert out.placements == (Shard(2),)
    torch.testing.assert_close(out.full_tensor(), right)
    total = out.square().sum()
    assert isinstance(total, DTensor)
    (actual,) = torch.autograd.grad(total.full_tensor(), my_sink)
    assert isinstance(actual, DTensor)
    assert actual.placements == (Shard(0),)
    torch.testing.assert_close(
        actual.full_tensor(), torch.autograd.grad(right.square().sum(), sink)[0]
    )


def checks() -> Mapping[str, Check]:
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    causal = partial(flashtile.attention, causal=True)
    varlen = partial(flashtile.attention_varlen, causal=True)
    shared = flashtile.shared_prefix_attention
    return {
        "ddp": check_ddp,
        "fsdp": check_fsdp,
        "fsdp_in_bf16": check_fsdp_in_bf16,
        "dtensor_by_batch": partial(check_dtensor, causal, dense(), 0, ()),
        "dtensor_by_heads": partial(check_dtensor, causal, dense(), 2, ()),
        "dtensor_of_varlen": partial(check_dtensor, varlen, packed(), 1, (cu, cu, 5, 5)),
        "dtensor_of_shared_prefix": partial(check_dtensor, shared, packed(4), 1, (cu, 5)),
        "dtensor_of_scores": check_dtensor_of_scores,
    }


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return failures_in_processes(2, checks, tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("name", checks())
def test_in_processes(failures: dict[str, str], name: str) -> None:
    assert name not in failures, failures[name]


@pytest.mark.parametrize("is_selective", [True, False], ids=["selective", "all"])
def test_checkpointing(*, is_selective: bool) -> None:
    """What is kept is not computed again, and gradients are the same, bit for bit."""
    model, x = model_and_data()
    x.requires_grad_()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().mean(), leaves)
    options: dict[str, Any] = {"use_reentrant": False}
    if is_selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(OPS_TO_SAVE))
    with Recorder() as recorder:
        loss = checkpoint(model, x, **options).square().mean()
        actual = torch.autograd.grad(loss, leaves)
    assert len(recorder.calls["flashtile.forward.default"]) == (2 if is_selective else 4)
    assert len(recorder.calls["aten.addmm.default"]) > 4  # of four linear layers: done again
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_checkpointing_with_scores() -> None:
    """Dropout draws again, but not where its result is kept; max_logit is an op of its own."""
    q, k, v = (torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3))

    def step(q: Tensor) -> Tensor:
        out, largest = flashtile.attention(q * 2, k, v, dropout_p=0.5, return_max_logit=True)
        return out + largest.sum()

    contexts = partial(create_selective_checkpoint_contexts, list(OPS_TO_SAVE))
    results = []
    either: list[dict[str, Any]] = [{}, {"context_fn": contexts}]
    for options in either:
        torch.manual_seed(3)
        with Recorder() as recorder:
            out = checkpoint(step, q, use_reentrant=False, **options)
            results.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
        count = len(recorder.calls["flashtile.forward_max_logit.default"])
        assert count == (1 if options else 2)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_list_is_whole() -> None:
    """Every op with a formula for gradients, but for the backward ones."""
    names = {name.partition("::")[2] for name in dir_of_ops() if "forward" in name}
    no_gradients = {name for name in names if name.endswith("_out") or "kvcache" in name}
    assert {op._opname for op in OPS_TO_SAVE} == names - no_gradients


def dir_of_ops() -> list[str]:
    return [
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("flashtile::")
    ]
