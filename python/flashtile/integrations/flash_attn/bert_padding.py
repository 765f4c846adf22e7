"""Between padded batches and packed sequences: flash_attn.bert_padding in plain torch."""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def __getattr__(name: str) -> Any:
    """`rearrange` of einops, which callers import from here; einops is needed for nothing else."""
    if name == "rearrange":
        return importlib.import_module("einops").rearrange
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002
    """The rows of input, ``(rows, ...)``, that indices name. Differentiable."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """``(first_axis_dim, ...)``: values in the rows that indices name, 0 in all others."""
    rows = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return rows.index_copy(0, indices, values)


def index_first_axis_residual(
    input: Tensor,  # noqa: A002
    indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rows of input that indices name, and input without a gradient."""
    return index_first_axis(input, indices), input.detach()


def _offsets(lengths: Tensor) -> Tensor:
    return functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one after the other.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask: ``(batch, seqlen)``, bool or int, 1 where there is a token.
        unused_mask: The same, 1 where there is room for a token that is not in use. None: nowhere.

    Returns:
        ``(hidden, indices, cu_seqlens, max_seqlen, seqused)``: tokens and room, ``(total, ...)``;
        their places in the flat batch; offsets, ``(batch + 1,)`` int32; the longest sequence, an
        int, for which the host waits; tokens in use of every sequence, ``(batch,)`` int32.
    """
    has_room = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = has_room.sum(-1, dtype=torch.int32)
    seqused = attention_mask.sum(-1, dtype=torch.int32)
    indices = has_room.flatten().nonzero().flatten()
    hidden = index_first_axis(hidden_states.flatten(0, 1), indices)
    return hidden, indices, _offsets(lengths), _longest(lengths), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same of rows that hold several sequences, one after the other, and padding.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask_in_length: ``(batch, seqlen)``, int: the lengths of the sequences of a row,
            then zeros.

    Returns:
        ``(hidden, indices, cu_seqlens, max_seqlen)``, a sequence for every length that is not 0.
    """
    tokens = attention_mask_in_length.sum(-1)
    places = torch.arange(attention_mask_in_length.shape[-1], device=tokens.device)
    indices = (places < tokens.unsqueeze(-1)).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    hidden = index_first_axis(hidden_states.flatten(0, 1), indices)
    return hidden, indices, _offsets(lengths), _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """``(batch, seqlen, ...)`` of tokens, ``(total, ...)``, and their places; 0 elsewhere."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *rows.shape[1:])
