"""The class that SGLang asks for: the attention of all layers, and the tables of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile.integrations.sglang import check_names, counts, refuse

NEEDED: dict[str, tuple[str, ...]] = {
    "sglang.srt.layers.attention.base_attn_backend": ("AttentionBackend",),
    "sglang.srt.layers.radix_attention": ("AttentionType",),
    "sglang.srt.mem_cache.memory_pool": ("KVWriteLoc",),
    "sglang.srt.mem_cache.swa_memory_pool": ("SWAKVPool",),
    "sglang.srt.runtime_context": ("get_parallel", "get_spec"),
}
check_names(NEEDED)

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend  # noqa: E402
from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.mem_cache.memory_pool import KVWriteLoc  # noqa: E402
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool  # noqa: E402
from sglang.srt.runtime_context import get_parallel, get_spec  # noqa: E402

# A padded sequence of a CUDA graph has one key: its row of the table is filled, and its result is
# thrown away.
PADDED_LENGTH = 1


@dataclass
class Step:
    """What all layers of a step share."""

    starts: Tensor  # (batch + 1,) int32: where the queries of a request begin
    seqlens: Tensor  # (batch,) int32, with the new tokens
    pages: Tensor  # (batch, ...) int32


class Backend(AttentionBackend):  # type: ignore[misc]
    """Attention over SGLang's pool, whose rows are tokens: (tokens, heads, head_dim)."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        check_settings(model_runner)
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.page_size = model_runner.page_size or 1
        self.forward_metadata: Step | None = None
        self.buffers: Step | None = None  # those that CUDA graphs read

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """The tables of a step that runs eagerly."""
        check_batch(forward_batch)
        batch, seq_lens = forward_batch, forward_batch.seq_lens
        if batch.forward_mode.is_decode_or_idle():
            starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32, device=seq_lens.device)
        else:
            ends = batch.extend_seq_lens.cumsum(0, dtype=torch.int32)
            starts = torch.nn.functional.pad(ends, (1, 0))
        longest = self.req_to_token.shape[1]
        if batch.seq_lens_cpu is not None and len(batch.seq_lens_cpu) > 0:
            longest = int(batch.seq_lens_cpu.max())
        pages = self._pages(batch.req_pool_indices, longest)
        self.forward_metadata = Step(starts, seq_lens.int(), pages)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:  # noqa: ARG002
        """Tensors that stay where they are, for all graphs of decoding."""
        table = self.req_to_token
        width = -(-table.shape[1] // self.page_size)
        starts = torch.arange(max_bs + 1, dtype=torch.int32, device=table.device)
        seqlens = torch.full_like(starts[:-1], PADDED_LENGTH)
        self.buffers = Step(starts, seqlens, starts.new_zeros((max_bs, width)))

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:  # noqa: ARG002
        """Fills these tensors, before a graph is captured and before it is replayed."""
        check_batch(forward_batch)
        if not forward_batch.forward_mode.is_decode_or_idle():
            refuse("a CUDA graph is made of prefill", "graphs of decoding")
        if self.buffers is None:
            raise RuntimeError("SGLang replays a CUDA graph without init_cuda_graph_state")
        all_, size = self.buffers, forward_batch.batch_size
        step = Step(all_.starts[: size + 1], all_.seqlens[:size], all_.pages[:size])
        step.seqlens.copy_(forward_batch.seq_lens[:size])
        indices = forward_batch.req_pool_indices[:size]
        step.pages.copy_(self._pages(indices, self.req_to_token.shape[1]))
        self.forward_metadata = step

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return PADDED_LENGTH

    def support_triton(self) -> bool:
        return True

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> Tensor:
        """One query for each request."""
        return self._attend(q, (k, v), layer, forward_batch, options, save=save_kv_cache)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> Tensor:
        """A part of a prompt for each request."""
        return self._attend(q, (k, v), layer, forward_batch, options, save=save_kv_cache)

    def _attend(
        self,
        q: Tensor,
        new: tuple[Tensor | None, Tensor | None],
        layer: Any,
        forward_batch: Any,
        options: dict[str, Any],
        *,
        save: bool,
    ) -> Tensor:
        sinks = options.pop("sinks", None)
        check_layer(layer, options)
        k, v = new
        if save and k is not None and v is not None:
            where = KVWriteLoc.for_layer(forward_batch, layer)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        step, window = self.forward_metadata, layer.sliding_window_size
        if step is None:
            raise RuntimeError("SGLang calls a layer without init_forward_metadata")
        out = flashtile.attention_with_kvcache(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self._paged(self.token_to_kv_pool.get_key_buffer(layer.layer_id)),
            self._paged(self.token_to_kv_pool.get_value_buffer(layer.layer_id)),
            cache_seqlens=step.seqlens,
            block_table=step.pages,
            cu_seqlens_q=step.starts,
            causal=True,
            window_size=(window, 0) if window is not None and window >= 0 else (-1, -1),
            softmax_scale=layer.scaling,
            softcap=float(layer.logit_cap or 0),
            sink=sinks,
        )
        counts.served += 1
        return out.flatten(1)

    def _pages(self, indices: Tensor, longest: int) -> Tensor:
        """The pages of requests. All rows of a page follow each other, so its first tells which."""
        slots: Tensor = self.req_to_token[indices, : longest : self.page_size]
        return slots // self.page_size

    def _paged(self, pool: Tensor) -> Tensor:
        return pool.view(-1, self.page_size, *pool.shape[1:])


def check_settings(runner: Any) -> None:
    """Refuses what changes attention and holds for the whole run."""
    if runner.use_mla_backend:
        refuse("the model has multi-head latent attention (MLA)", "models with heads of keys")
    if get_spec().speculative_algorithm is not None:
        refuse(f"speculative_algorithm is {get_spec().speculative_algorithm!r}", "None")
    if get_parallel().dcp_enabled:
        refuse("decode context parallelism is enabled", "one rank for a request")
    if get_parallel().attn_cp_size > 1:
        refuse(f"attn_cp_size is {get_parallel().attn_cp_size}", "1")
    if runner.kv_cache_dtype != runner.dtype:
        refuse(f"the cache holds {runner.kv_cache_dtype}", f"{runner.dtype}, that of the model")
    if isinstance(runner.token_to_kv_pool, SWAKVPool):
        refuse("layers with windows have a pool of their own", "--disable-hybrid-swa-memory")


def check_batch(forward_batch: Any) -> None:
    """Refuses what changes attention and belongs to a step."""
    mode = forward_batch.forward_mode
    if mode.is_target_verify() or mode.is_draft_extend_v2() or mode.is_dllm_extend():
        refuse(f"forward_mode is {mode.name}", "EXTEND, MIXED, DECODE and IDLE")
    for name in ("spec_info", "encoder_lens", "multi_item_delimiter_indices"):
        if getattr(forward_batch, name) is not None:
            refuse(f"{name} is not None", "None")
    if forward_batch.mha_return_lse:
        refuse("mha_return_lse is set", "results without their LSE")


def check_layer(layer: Any, options: dict[str, Any]) -> None:
    """Refuses what changes attention and belongs to a layer."""
    if layer.attn_type != AttentionType.DECODER:
        refuse(f"attn_type is {layer.attn_type}", "AttentionType.DECODER")
    if layer.is_cross_attention:
        refuse("the layer is cross attention", "attention of a sequence to itself")
    if layer.use_irope:
        refuse("use_irope is set (local attention)", "it not to be")
    if layer.pos_encoding_mode != "NONE":
        refuse(f"pos_encoding_mode is {layer.pos_encoding_mode!r}", "'NONE'")
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        refuse(f"logit_capping_method is {layer.logit_capping_method!r}", "'tanh'")
    if layer.xai_temperature_len is not None and layer.xai_temperature_len > 0:
        refuse(f"xai_temperature_len is {layer.xai_temperature_len}", "-1")
    for name, value in options.items():
        if value is not None and value is not False:
            refuse(f"{name} is given", "sinks alone, besides q, k, v and save_kv_cache")
