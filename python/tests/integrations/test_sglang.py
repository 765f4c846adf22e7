"""The plug-in for SGLang, whose packages need a GPU: over stand-ins, and against its sources.

The stand-ins have the members that the plug-in reads. That SGLang's classes have them, too, is
checked in its sources, which `make test-integrations-heavy` unpacks into build/sglang. It is never
run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from example_builds import missing
from integrations.test_vllm import entry_points_of, plugin_metadata
from scores_reference import manual_scores

plugin = importlib.import_module("flashtile.integrations.sglang")

SOURCES = Path(__file__).resolve().parents[3] / "build/sglang"
HEADS, HEADS_KV, HEAD_DIM, HEAD_DIM_V = 4, 2, 8, 12
CONTEXT = 16  # rows of the table of a request

# Of each class, in the module that has it: what the plug-in reads, calls or overrides.
READ = {
    "layers/radix_attention.py RadixAttention": "attn_type is_cross_attention layer_id logit_cap"
    " logit_capping_method pos_encoding_mode qk_head_dim scaling sliding_window_size tp_q_head_num"
    " use_irope xai_temperature_len",
    "model_executor/forward_batch_info.py ForwardBatch": "batch_size encoder_lens extend_seq_lens"
    " forward_mode multi_item_delimiter_indices req_pool_indices seq_lens seq_lens_cpu spec_info",
    "model_executor/forward_batch_deepseek_mha_mixin.py ForwardBatchDeepSeekMHAMixin": "mha_return"
    "_lse",
    "model_executor/forward_batch_info.py ForwardMode": "is_decode_or_idle is_target_verify"
    " is_draft_extend_v2 is_dllm_extend",
    "model_executor/model_runner.py ModelRunner": "dtype kv_cache_dtype page_size"
    " req_to_token_pool token_to_kv_pool use_mla_backend",
    "mem_cache/memory_pool.py ReqToTokenPool": "req_to_token",
    "mem_cache/memory_pool.py MHATokenToKVPool": "get_key_buffer get_value_buffer set_kv_buffer",
    "layers/attention/base_attn_backend.py AttentionBackend": "forward_decode forward_extend"
    " forward_metadata get_cuda_graph_seq_len_fill_value init_cuda_graph_state"
    " init_forward_metadata init_forward_metadata_out_graph support_triton",
    "mem_cache/memory_pool.py KVWriteLoc": "for_layer",
}


class AttentionType(Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class Mode(Enum):
    EXTEND, DECODE, TARGET_VERIFY = range(3)

    def is_decode_or_idle(self) -> bool:
        return self is Mode.DECODE

    def is_target_verify(self) -> bool:
        return self is Mode.TARGET_VERIFY

    def is_draft_extend_v2(self) -> bool:
        return False

    is_dllm_extend = is_draft_extend_v2


class Pool:
    """Keys and values by token, as SGLang's pool has them."""

    def __init__(self, tokens: int) -> None:
        self.k = torch.full((tokens, HEADS_KV, HEAD_DIM), torch.nan)
        self.v = torch.full((tokens, HEADS_KV, HEAD_DIM_V), torch.nan)

    def get_key_buffer(self, _layer_id: int) -> Tensor:
        return self.k

    def get_value_buffer(self, _layer_id: int) -> Tensor:
        return self.v

    def set_kv_buffer(self, _layer: Any, where: Tensor, k: Tensor, v: Tensor) -> None:
        self.k[where], self.v[where] = k, v


class WriteLoc:
    @staticmethod
    def for_layer(batch: Any, _layer: Any) -> Tensor:
        where: Tensor = batch.out_cache_loc
        return where


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of SGLang that the plug-in imports, by the last part of their name."""
    backends: dict[str, Any] = {}
    choices: list[str] = ["fa3"]
    members: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": "0.99.0"},
        plugin.REGISTRY: {
            "ATTENTION_BACKENDS": backends,
            "register_attention_backend": lambda name: lambda f: backends.setdefault(name, f),
        },
        plugin.CHOICES: {
            "ATTENTION_BACKEND_CHOICES": choices,
            "add_attention_backend_choices": choices.extend,
        },
        "sglang.srt.layers.attention.base_attn_backend": {
            "AttentionBackend": type("AttentionBackend", (), {})
        },
        "sglang.srt.layers.radix_attention": {"AttentionType": AttentionType},
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": WriteLoc},
        "sglang.srt.mem_cache.swa_memory_pool": {"SWAKVPool": type("SWAKVPool", (), {})},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: SimpleNamespace(dcp_enabled=False, attn_cp_size=1),
            "get_spec": lambda: SimpleNamespace(speculative_algorithm=None),
        },
    }
    made: dict[str, ModuleType] = {}
    for name, values in members.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        made[name.rpartition(".")[2]] = module
    backend = "flashtile.integrations._sglang_backend"
    monkeypatch.delitem(sys.modules, backend, raising=False)
    yield made
    sys.modules.pop(backend, None)


def make_runner(page_size: int, **changes: Any) -> Any:
    """Two requests, whose pages lie in the pool in no order."""
    table = torch.zeros(3, CONTEXT, dtype=torch.int32)  # of request pool entries
    blocks = torch.randperm(2 * CONTEXT // page_size).reshape(2, -1) + 1
    slots = blocks[:, :, None] * page_size + torch.arange(page_size)
    table[torch.tensor([2, 0])] = slots.reshape(2, CONTEXT).int()
    runner = {
        "req_to_token_pool": SimpleNamespace(req_to_token=table),
        "token_to_kv_pool": Pool(3 * CONTEXT),
        "page_size": page_size,
        "use_mla_backend": False,
        "dtype": torch.float32,
        "kv_cache_dtype": torch.float32,
    }
    return SimpleNamespace(**{**runner, **changes})


def make_layer(**changes: Any) -> Any:
    layer = {
        "attn_type": AttentionType.DECODER,
        "is_cross_attention": False,
        "layer_id": 0,
        "logit_cap": 0.0,
        "logit_capping_method": "tanh",
        "pos_encoding_mode": "NONE",
        "qk_head_dim": HEAD_DIM,
        "scaling": 0.4,
        "sliding_window_size": -1,
        "tp_q_head_num": HEADS,
        "use_irope": False,
        "xai_temperature_len": -1,
    }
    return SimpleNamespace(**{**layer, **changes})


def make_batch(runner: Any, lengths: list[int], new: list[int], **changes: Any) -> Any:
    """A step after which the two requests have `lengths` tokens, `new` of them new."""
    entries = torch.tensor([2, 0])
    table = runner.req_to_token_pool.req_to_token
    rows = zip(entries, lengths, new, strict=True)
    batch = {
        "forward_mode": Mode.DECODE if max(new) == 1 else Mode.EXTEND,
        "batch_size": 2,
        "req_pool_indices": entries,
        "seq_lens": torch.tensor(lengths),
        "seq_lens_cpu": torch.tensor(lengths),
        "extend_seq_lens": torch.tensor(new, dtype=torch.int32),
        "out_cache_loc": torch.cat([table[e, n - fresh : n] for e, n, fresh in rows]).long(),
        "spec_info": None,
        "encoder_lens": None,
        "multi_item_delimiter_indices": None,
        "mha_return_lse": None,
    }
    return SimpleNamespace(**{**batch, **changes})


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"sliding_window_size": 3}, {"window_size": (3, 0)}),
    ({"logit_cap": 2.0}, {"softcap": 2.0}),
    ({"sinks": True}, {"sinks": True}),
]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=str)
@pytest.mark.usefixtures("host")
def test_steps_are_attention_over_all_tokens(
    options: dict[str, Any], expected: dict[str, Any], page_size: int, graph: bool
) -> None:
    """A prompt in two parts, then decoding. A NaN is what no query may read."""
    runner = make_runner(page_size)
    backend = plugin.create(runner)
    backend.init_cuda_graph_state(4, 4)
    layer = make_layer(**{name: v for name, v in options.items() if name != "sinks"})
    sinks = torch.randn(HEADS) if "sinks" in options else None
    k = [torch.randn(CONTEXT, HEADS_KV, HEAD_DIM) for _ in range(2)]
    v = [torch.randn(CONTEXT, HEADS_KV, HEAD_DIM_V) for _ in range(2)]
    served = plugin.counts.served
    for lengths, new in (([5, 3], [5, 3]), ([9, 4], [4, 1]), ([10, 5], [1, 1])):
        batch = make_batch(runner, lengths, new)
        if graph and batch.forward_mode is Mode.DECODE:
            backend.init_forward_metadata_out_graph(batch, in_capture=True)
        else:
            backend.init_forward_metadata(batch)
        q = torch.randn(sum(new), HEADS * HEAD_DIM)
        fresh = [
            torch.cat([x[n - i : n] for x, n, i in zip(rows, lengths, new, strict=True)])
            for rows in (k, v)
        ]
        attend = backend.forward_decode if max(new) == 1 else backend.forward_extend
        out = attend(q, *fresh, layer, batch, sinks=sinks)
        begin = 0
        for b, (length, rows) in enumerate(zip(lengths, new, strict=True)):
            queries = q[begin : begin + rows].view(1, rows, HEADS, HEAD_DIM)
            tensors = {"q": queries, "k": k[b][None, :length], "v": v[b][None, :length]}
            if sinks is not None:
                tensors["sink"] = sinks
            tensors = {name: tensor.double() for name, tensor in tensors.items()}
            how = {name: value for name, value in expected.items() if name != "sinks"}
            exact = manual_scores(tensors, causal=True, softmax_scale=0.4, **how)[0]
            torch.testing.assert_close(
                out[begin : begin + rows].double(), exact[0].flatten(1), atol=2e-6, rtol=0
            )
            begin += rows
    assert plugin.counts.served == served + 3


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attn_type is AttentionType.ENCODER_ONLY"),
        ({"is_cross_attention": True}, "the layer is cross attention"),
        ({"use_irope": True}, "use_irope is set"),
        ({"pos_encoding_mode": "ROPE"}, "pos_encoding_mode is 'ROPE'; "),
        ({"logit_cap": 30.0, "logit_capping_method": "x"}, "logit_capping_method is 'x'"),
        ({"xai_temperature_len": 1024}, "xai_temperature_len is 1024"),
        ({}, "k_rope is given; flashtile's backend for SGLang allows sinks alone"),
    ],
    ids=str,
)
def test_layers_that_are_not_served(changes: dict[str, Any], sentence: str) -> None:
    runner = make_runner(1)
    backend, batch = plugin.create(runner), make_batch(runner, [1, 1], [1, 1])
    backend.init_forward_metadata(batch)
    q, given = torch.zeros(2, HEADS * HEAD_DIM), {} if changes else {"k_rope": torch.zeros(1)}
    with pytest.raises(NotImplementedError, match=re.escape(sentence)):
        backend.forward_decode(q, None, None, make_layer(**changes), batch, **given)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"forward_mode": Mode.TARGET_VERIFY}, "forward_mode is TARGET_VERIFY"),
        ({"spec_info": 1}, "spec_info is not None"),
        ({"encoder_lens": 1}, "encoder_lens is not None"),
        ({"multi_item_delimiter_indices": 1}, "multi_item_delimiter_indices is not None"),
        ({"mha_return_lse": True}, "mha_return_lse is set"),
    ],
    ids=str,
)
def test_steps_that_are_not_served(changes: dict[str, Any], sentence: str) -> None:
    runner = make_runner(1)
    backend = plugin.create(runner)
    batch = make_batch(runner, [1, 1], [1, 1], **changes)
    with pytest.raises(NotImplementedError, match=sentence):
        backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match=sentence):
        backend.init_forward_metadata_out_graph(batch)


@pytest.mark.usefixtures("host")
def test_a_graph_of_prefill_is_not_served() -> None:
    runner = make_runner(1)
    backend = plugin.create(runner)
    backend.init_cuda_graph_state(4, 4)
    with pytest.raises(NotImplementedError, match="a CUDA graph is made of prefill"):
        backend.init_forward_metadata_out_graph(make_batch(runner, [5, 3], [5, 3]))


def test_runs_that_are_not_served(
    host: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(sentence: str, **changes: Any) -> None:
        with pytest.raises(NotImplementedError, match=re.escape(sentence)):
            plugin.create(make_runner(1, **changes))

    refused("multi-head latent attention (MLA)", use_mla_backend=True)
    refused("the cache holds torch.float8_e4m3fn; ", kv_cache_dtype=torch.float8_e4m3fn)
    pool = host["swa_memory_pool"].SWAKVPool()
    refused("--disable-hybrid-swa-memory", token_to_kv_pool=pool)
    context = host["runtime_context"]
    with monkeypatch.context() as patch:
        parallel = SimpleNamespace(dcp_enabled=True, attn_cp_size=1)
        patch.setattr(sys.modules["flashtile.integrations._sglang_backend"], "get_parallel",
                      lambda: parallel)  # fmt: skip
        refused("decode context parallelism is enabled")
        parallel.dcp_enabled, parallel.attn_cp_size = False, 2
        refused("attn_cp_size is 2; ")
    backend = sys.modules["flashtile.integrations._sglang_backend"]
    spec = SimpleNamespace(speculative_algorithm="EAGLE")
    monkeypatch.setattr(backend, "get_spec", lambda: spec)
    refused("speculative_algorithm is 'EAGLE'")
    assert context.get_spec().speculative_algorithm is None


def test_register_adds_a_name_once(host: dict[str, ModuleType], tmp_path: Path) -> None:
    plugin_metadata(tmp_path)
    (point,) = entry_points_of(tmp_path, "sglang.srt.plugins")
    for _ in range(2):
        point.load()()
    assert host["choices"].ATTENTION_BACKEND_CHOICES == ["fa3", "flashtile"]
    backends = host["attention_registry"].ATTENTION_BACKENDS
    assert backends == {"flashtile": plugin.create}
    backends["flashtile"] = print
    with pytest.raises(RuntimeError, match="SGLang has another backend 'flashtile', from builtins"):
        plugin.register()


def test_a_sglang_without_its_names_is_named(
    host: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    del host["choices"].add_attention_backend_choices
    sentence = r"sglang 0.99.0 \(sources compared: 0.5.23\) has no \S+\.add_attention_back"
    with pytest.raises(ImportError, match=sentence):
        plugin.register()
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ImportError, match="sglang cannot be imported"):
        plugin.register()


@cache
def source(path: str) -> ast.Module:
    file = SOURCES / "sglang" / path
    if not file.is_file():
        missing(f"there is no {file}: make test-integrations-heavy unpacks SGLang's sources")
    return ast.parse(file.read_text(encoding="utf-8"))


def names_in(body: list[ast.stmt]) -> set[str]:
    """What a module or class defines or imports, and what its methods set on self."""
    found: set[str] = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.alias):
                found.add((node.asname or node.name).partition(".")[0])
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.add(statement.name)
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.heavy
def test_modules_of_sglang_have_what_is_imported() -> None:
    needed = {**plugin.NEEDED, **backend_needs()}
    for module, names in needed.items():
        path = module.partition(".")[2].replace(".", "/") + ".py"
        assert set(names) <= names_in(source(path).body), module


def backend_needs() -> dict[str, tuple[str, ...]]:
    """NEEDED of the module that cannot be imported without SGLang."""
    path = Path(str(plugin.__file__)).with_name("_sglang_backend.py")
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "NEEDED":
            found: dict[str, tuple[str, ...]] = ast.literal_eval(ast.unparse(statement.value))  # type: ignore[arg-type]
            return found
    raise AssertionError(path)


@pytest.mark.heavy
@pytest.mark.parametrize("where", READ)
def test_classes_of_sglang_have_what_is_read(where: str) -> None:
    path, name = where.split()
    (found,) = (
        node
        for node in source(f"srt/{path}").body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    assert set(READ[where].split()) <= names_in(found.body)


@pytest.mark.heavy
def test_functions_of_sglang_take_what_is_given() -> None:
    """Parameters of methods that the plug-in overrides or calls, in their order."""
    base, memory = "layers/attention/base_attn_backend.py", "mem_cache/memory_pool.py"
    expected = {
        (base, "forward_decode"): "q k v layer forward_batch save_kv_cache",
        (base, "forward_extend"): "q k v layer forward_batch save_kv_cache",
        (base, "init_cuda_graph_state"): "max_bs max_num_tokens",
        (base, "init_forward_metadata_out_graph"): "forward_batch in_capture",
        (memory, "set_kv_buffer"): "layer loc_info cache_k cache_v k_scale v_scale"
        " layer_id_override dcp_kv_mask",
        (memory, "for_layer"): "forward_batch layer",
    }
    for (path, name), parameters in expected.items():
        found = [
            " ".join(argument.arg for argument in node.args.args[1:])
            for node in ast.walk(source(f"srt/{path}"))
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert parameters in found, (path, name)
