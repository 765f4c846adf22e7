"""The classes that vLLM asks for: what is supported, a step's metadata, and a layer's attention."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import flashtile
from flashtile.integrations.vllm import check_names, counts, logger, refuse

_INTERFACE = "vllm.v1.attention.backend"
check_names(
    {
        "vllm._custom_ops": ("reshape_and_cache_flash",),
        "vllm.envs": ("VLLM_BATCH_INVARIANT",),
        _INTERFACE: (
            "AttentionBackend",
            "AttentionCGSupport",
            "AttentionImpl",
            "AttentionMetadataBuilder",
            "AttentionType",
            "MultipleOf",
        ),
    }
)

from vllm import _custom_ops as ops  # noqa: E402
from vllm import envs  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

UNLIMITED = (-1, -1)
UNQUANTISED = ("auto", "float16", "bfloat16")  # of kv_cache_dtype
LARGEST_ON_CUDA = 256  # head_dim


class Backend(AttentionBackend):  # type: ignore[misc]
    """What CUSTOM stands for. vLLM asks it these questions before a model runs on CUDA."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(UNQUANTISED)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(_kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= LARGEST_ON_CUDA

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_ONLY)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: few queries of a long sequence are decoded, in another order than many are summed.

        The bits of a request depend on it and on the queries that it has in a step. Other requests
        decide how many those are, as they share the tokens of a step.
        """
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= 8)

    @classmethod
    def supports_combination(cls, *_args: object, **_options: object) -> str | None:
        """What else stands in the way, in words."""
        if not flashtile.build_info()["cuda_architectures"]:
            return "this flashtile was built without CUDA"
        return None


class CPUBackend(Backend):
    """What CPU_ATTN stands for, where flashtile takes its place. vLLM does not ask it anything."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size >= 1

    @classmethod
    def supports_combination(cls, *_args: object, **_options: object) -> str | None:
        """Nothing stands in the way."""
        return None


@dataclass
class Metadata:
    """A step: what is the same in all layers of a group. vLLM reads and adds members."""

    num_actual_tokens: int  # rows behind are padding
    max_query_len: int
    query_start_loc: Tensor  # (requests + 1,)
    max_seq_len: int
    seq_lens: Tensor  # (requests,), with the new tokens
    block_table: Tensor
    slot_mapping: Tensor
    causal: bool


class Builder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Makes the metadata of a step. Nothing is planned: tensors go on as they are."""

    # Tensors that a CUDA graph holds are read when it is replayed, and no shape depends on values.
    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_settings(vllm_config, kv_cache_spec)

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002  no result depends on it
        common_attn_metadata: Any,
        fast_build: bool = False,  # noqa: ARG002  the same
    ) -> Metadata:
        common = common_attn_metadata
        if isinstance(common.causal, Tensor):
            refuse("causal is a tensor, with a value for each request", "one for all")
        if common.mm_req_doc_ranges:
            refuse("mm_req_doc_ranges has tokens of images that see each other", "None")
        if common.rswa_prefix_lens is not None:
            refuse("rswa_prefix_lens is a tensor (R-SWA)", "None")
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=bool(common.causal),
        )

    def update_block_table(
        self, metadata: Metadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> Metadata:
        return dataclasses.replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


@functools.cache
def say_once() -> None:
    """That this is flashtile: vLLM itself names backends by the name that it knows."""
    logger.info("flashtile %s computes attention in this process", flashtile.__version__)


def check_settings(vllm_config: Any, kv_cache_spec: Any) -> None:
    """Refuses settings of the engine that change attention; on the CPU vLLM itself does not ask."""
    if envs.VLLM_BATCH_INVARIANT:
        refuse(
            "VLLM_BATCH_INVARIANT is set",
            "it not to be: bits depend on how a prompt is cut into parts, which depends on the"
            " other requests",
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            refuse(f"{name} is {size}", "1")
    if vllm_config.kv_transfer_config is not None:
        refuse("kv_transfer_config names a KV connector", "None")
    model = vllm_config.model_config
    if model.rswa_window is not None:
        refuse(f"rswa_window is {model.rswa_window}", "None")
    if kv_cache_spec.dtype != model.dtype:
        refuse(f"the cache holds {kv_cache_spec.dtype}", f"{model.dtype}, the dtype of the model")


class Attention(AttentionImpl):  # type: ignore[misc]
    """The attention of a layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: object,
    ) -> None:
        if kv_cache_dtype not in UNQUANTISED:
            refuse(f"kv_cache_dtype is {kv_cache_dtype!r}", f"one of {', '.join(UNQUANTISED)}")
        if not Backend.supports_attn_type(attn_type):
            refuse(f"attn_type is {str(attn_type)!r}", "decoder and encoder_only")
        for name, value in others.items():
            refuse(f"{name} is {value!r}, which is not known", "what vLLM 0.32 passes to all")
        if sinks is not None and tuple(sinks.shape) != (num_heads,):
            refuse(f"sinks has shape {tuple(sinks.shape)}", f"({num_heads},)")
        say_once()
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name  # vLLM sets its kv_cache
        self.sliding_window = sliding_window
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes).float()
        self.sinks = sinks  # loaded later, into this tensor
        self.softcap = float(logits_soft_cap or 0)

    def forward(
        self,
        layer: Any,  # noqa: ARG002  its scales are those of quantised caches
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of (tokens, heads, head_size), into output."""
        if output_scale is not None or output_block_scale is not None:
            refuse("output_scale is a tensor (fused quantisation of the output)", "None")
        if attn_metadata is None:  # a run that measures memory
            return output.zero_()
        step, rows = attn_metadata, attn_metadata.num_actual_tokens
        out = output[:rows].view(rows, self.num_heads, -1)
        how = self._options(query.device, causal=step.causal)
        if self.attn_type == AttentionType.ENCODER_ONLY:
            starts, longest = step.query_start_loc, step.max_query_len
            tensors = (query[:rows], key[:rows], value[:rows])
            flashtile.attention_varlen(*tensors, starts, starts, longest, longest, out=out, **how)
        else:
            flashtile.attention_with_kvcache(
                query[:rows],
                *self._keys_and_values(kv_cache),
                cache_seqlens=step.seq_lens,
                block_table=step.block_table,
                cu_seqlens_q=step.query_start_loc,
                max_seqlen_q=step.max_query_len,
                out=out,
                **how,
            )
        counts.served += 1
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes new tokens to their slots of the cache; a slot of -1 is padding."""
        if self.attn_type == AttentionType.ENCODER_ONLY:
            return
        k_cache, v_cache = self._keys_and_values(kv_cache)
        rows = slot_mapping.shape[0]  # there may be more keys, which are padding
        if not kv_cache.is_cpu:
            if k_cache.shape != v_cache.shape:
                sizes = f"head_size is {k_cache.shape[-1]} and head_size_v {v_cache.shape[-1]}"
                refuse(f"{sizes} on CUDA", "the same of both")
            ops.reshape_and_cache_flash(
                *(key, value, k_cache, v_cache, slot_mapping, self.kv_cache_dtype),
                *(layer._k_scale, layer._v_scale),
            )
            return
        used = slot_mapping >= 0
        if not used.all():
            slot_mapping, key, value = slot_mapping[used], key[:rows][used], value[:rows][used]
            rows = slot_mapping.shape[0]
        block_size = k_cache.shape[1]
        where = (slot_mapping // block_size, slot_mapping % block_size)
        k_cache[where] = key[:rows]
        v_cache[where] = value[:rows]

    def _keys_and_values(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """(blocks, block_size, heads, head_dim) of each, views of vLLM's one tensor of a layer.

        That is (blocks, heads, block_size, head_dim + head_dim_v), in any order in memory.
        """
        rows = kv_cache.transpose(1, 2)
        return rows[..., : self.head_size], rows[..., self.head_size :]

    def _options(self, device: torch.device, *, causal: bool) -> dict[str, Any]:
        """The keywords of flashtile's functions that do not change from step to step."""
        window = UNLIMITED
        if self.sliding_window is not None:
            left = self.sliding_window - 1  # vLLM counts the query itself
            window = (left, 0 if causal else left)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.to(device)
        return {
            "causal": causal,
            "window_size": window,
            "softmax_scale": self.scale,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sink": self.sinks,
        }
