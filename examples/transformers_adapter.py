"""flashtile as an attention of Hugging Face transformers: as right as "eager", or refused by name.

    import transformers_adapter

    model.set_attn_implementation(transformers_adapter.FLASHTILE)

transformers calls two functions, and both must be registered. The *mask function* runs once per
forward pass and kind of layer. It gets the mask as a rule, such as "no key behind the query, none
4096 or more in front of it". The *attention function* runs in every layer. An attention without a
mask function of its own gets no mask at all: padding, windows and the empty rows of a static cache
are then forgotten in silence. Here the mask function turns the rule into what flashtile takes (a
window and the rows of every sequence), and refuses a rule for which there is no such thing.

Served, forward and backward: causal, bidirectional and sliding-window attention, with padding on
either side or with sequences packed by position_ids; cross attention; GQA; any scaling. Without
gradients also: padding on the left in front of a cache, and static caches. A causal query that is
padding in front of its sequence gives 0; eager gives an average that has no meaning.

Refused with NotImplementedError: dropout, softcap, sinks, biases, masks that are tensors, chunks,
blocks and prefixes, gaps in the padding, attention weights, and every keyword not known here.

torch.compile: a graph break where a rule with a window or packed sequences is read, and none where
generate() makes the masks ahead. Without attention_mask and cache transformers always reads
position_ids for packed sequences. Gaps in the padding end a compiled graph while it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import flashtile

# A name with "flash" in it would make transformers look for a package of the flash-attn family.
FLASHTILE = "tiled"

# Keywords that models hand through to their attention and that change nothing in it.
# sliding_window is in the mask already.
IGNORED = {"cache_position", "deterministic", "num_items_in_batch", "output_hidden_states",
           "output_router_logits", "position_ids", "return_dict", "sliding_window",
           "use_cache"}  # fmt: skip
FULL = (-1, -1)  # the window without bounds
REFUSAL = "flashtile's adapter does not serve {}; use eager attention"


def refuse(what: str) -> NoReturn:
    """Raises the one sentence that says what is not served."""
    raise NotImplementedError(REFUSAL.format(what))


def require(condition: Tensor, otherwise: str) -> None:
    """Refuses unless the condition holds; a compiled graph does so when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, REFUSAL.format(otherwise))
    elif not condition:
        refuse(otherwise)


class Rule(NamedTuple):
    """Which keys a query sees: from `left` before its position to `right` after it; -1: all.

    With `sequences`, (batch, seqlen), only those keys that have the number of the query there.
    """

    left: int = -1
    right: int = -1
    sequences: Tensor | None = None


class Rows(NamedTuple):
    """The sequences that the rows of a batch are, for attention_varlen; int32."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None = None  # rows not in use give 0
    seqused_k: Tensor | None = None


class Cached(NamedTuple):
    """The rows of a cache in use and, of these, the padding in front; (batch,) int32."""

    cache_seqlens: Tensor
    cache_leftpad: Tensor | None


@dataclass(frozen=True)
class Mask:
    """What every layer gets as its attention_mask. Without `rows` and `cached` it is dense."""

    window: tuple[int, int]
    q_length: int
    kv_length: int
    kv_used: int  # no query sees a key from this one on
    rows: Rows | None = None
    cached: Cached | None = None
    ndim: int = 4  # transformers asks whether this is a 2-d mask that says what is padding: no

    def contiguous(self) -> Mask:
        """What generate() asks of a mask that it makes ahead."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(REFUSAL.format(f"a model that computes with its mask (.{name})"))


# --- The mask function: once per forward pass ---------------------------------------------------


@torch.compiler.disable(reason="the rule of a mask is read from the closure of its function")
def read_rule(mask: Callable[..., Any]) -> Rule:
    """The rule of a mask function; those of transformers are known by their names."""
    name = mask.__qualname__.partition(".")[0]
    if mask.__module__ != masking_utils.__name__:
        refuse(f"the mask function {name}")
    cells = (cell.cell_contents for cell in mask.__closure__ or ())
    bound: dict[str, Any] = dict(zip(mask.__code__.co_freevars, cells, strict=True))
    if name == "causal_mask_function":
        rule = Rule(right=0)
    elif name == "bidirectional_mask_function":
        rule = Rule()
    elif name == "sliding_window_overlay":
        rule = Rule(left=bound["sliding_window"] - 1)
    elif name == "sliding_window_bidirectional_overlay":
        rule = Rule(bound["sliding_window"], bound["sliding_window"])
    elif name == "packed_sequence_mask_function":
        rule = Rule(sequences=bound["packed_sequence_mask"])
    elif name == "remap_positions_for_packed_sequence":  # in a sequence positions rise as rows do
        rule = read_rule(bound["mask_function"])
    elif name == "and_masks":
        left, right, sequences = zip(*map(read_rule, bound["mask_functions"]), strict=True)
        left, right = (min((n for n in side if n != -1), default=-1) for side in (left, right))
        packed = [ids for ids in sequences if ids is not None]
        rule = Rule(left, right, *packed) if len(packed) < 2 else refuse("a packing in a packing")
    else:
        refuse(f"a mask made by {name}")
    return rule


def packed_rows(sequences: Tensor) -> Rows | None:
    """Sequences that follow each other in every entry of the batch; None: each entry is one."""
    require((sequences.diff() >= 0).all(), "packed sequences that lie in parts")
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    cu_seqlens = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).int()
    return Rows(cu_seqlens, cu_seqlens) if len(cu_seqlens) > len(sequences) + 1 else None


def padded_rows(
    first: Tensor, count: Tensor, q_length: int, kv_length: int, *, skip_q: bool
) -> Rows:
    """Entries whose keys first to first + count - 1 are no padding: two sequences for each.

    One is the padding in front, not in use; the other the rest, of which `count` keys are in use.
    skip_q: the queries in front are padding, too, so that query i stays beside key i.
    """
    entry = torch.arange(len(first), device=first.device)
    zero = torch.zeros_like(first)
    first_q = first if skip_q else zero

    def pairs(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack((a, b), 1).flatten().int()

    def offsets(length: int, first: Tensor) -> Tensor:
        begins = pairs(entry * length, entry * length + first)
        return F.pad(begins, (0, 1), value=len(first) * length)

    cu_seqlens = offsets(q_length, first_q), offsets(kv_length, first)
    return Rows(*cu_seqlens, pairs(zero, q_length - first_q), pairs(zero, count))


def flashtile_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str = "cpu",
    **_hints: object,
) -> Mask:
    """Query i stands at q_offset + i, key j at kv_offset + j.

    q_offset of a static cache is a tensor, for whose value nobody waits. attention_mask, (batch,
    positions) bool, is False for padding, and so is every position behind its end.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    is_plain = mask_function is masking_utils.causal_mask_function
    rule = Rule(right=0) if is_plain else read_rule(mask_function)
    window = (rule.left, rule.right)
    if rule.sequences is not None:
        return Mask(window, q_length, kv_length, kv_length, packed_rows(rule.sequences))

    begin = 0 if window == FULL else q_offset - kv_offset  # the key beside the first query
    is_static = isinstance(begin, Tensor)
    if window != FULL and rule.right != 0 and (is_static or begin + q_length != kv_length):
        refuse("a window that looks ahead over a cache")
    kv_used = begin + q_length if rule.right == 0 and not is_static else kv_length
    if not 0 <= begin <= kv_used <= kv_length:
        refuse(f"queries {begin} to {kv_used - 1} over {kv_length} keys")

    visible = attention_mask
    if visible is not None:
        visible = F.pad(visible, (0, max(0, kv_offset + kv_used - visible.shape[1])))
        visible = visible[:, kv_offset : kv_offset + kv_used]
        if not is_static and not torch.compiler.is_compiling() and visible.all():
            visible = None
    if visible is None and not is_static:
        return Mask(window, q_length, kv_length, kv_used)

    leftpad = None
    if visible is not None:
        first, count = visible.int().argmax(1), visible.sum(1)
        key = torch.arange(kv_used, device=visible.device)
        between = (key >= first[:, None]) & (key < (first + count)[:, None])
        require((between == visible).all(), "padding between the tokens of a sequence")
        if not is_static and begin == 0:
            rows = padded_rows(first, count, q_length, kv_used, skip_q=window != FULL)
            return Mask(window, q_length, kv_length, kv_used, rows)
        newest = begin + q_length
        require((first + count == newest).all(), "padding behind the newest key of a cache")
        leftpad = first.int()
    in_use = torch.as_tensor(begin + q_length, dtype=torch.int32, device=device)
    cached = Cached(in_use.repeat(batch_size), leftpad)
    return Mask(window, q_length, kv_length, kv_used, cached=cached)


# --- The attention function: in every layer -----------------------------------------------------


def check_options(module: torch.nn.Module, dropout: float, options: dict[str, Any]) -> None:
    """Refuses what would change the result; a keyword that is None asks for nothing."""
    if dropout and module.training:
        refuse(f"dropout={dropout} in training")
    for name, value in options.items():
        if value is None or name in IGNORED or (name == "output_attentions" and value is False):
            continue
        refuse(f"{name}={value}" if isinstance(value, (bool, int, float, str)) else name)


def fitting_mask(mask: object, q_length: int, kv_length: int, *, is_causal: bool | None) -> Mask:
    """The mask, if it is one of ours and fits; is_causal is what the layer asks for, if it does."""
    if not isinstance(mask, Mask):
        refuse(f"an attention mask that is a {type(mask).__name__}")
    if (mask.q_length, mask.kv_length) != (q_length, kv_length):
        made = f"{mask.q_length} queries and {mask.kv_length} keys"
        refuse(f"a mask of {made} over {q_length} queries and {kv_length} keys")
    if is_causal is not None and q_length > 1 and is_causal != (mask.window[1] == 0):
        refuse(f"is_causal={is_causal} with a mask that says otherwise")
    return mask


def flashtile_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Query (batch, heads, q_length, head_dim); key and value (batch, heads_kv, kv_length, ...).

    Returns (batch, q_length, heads, head_dim_v) and no attention weights. Heads are not repeated.
    The transposes are views: flashtile reads any strides, so nothing is copied, unless padding or
    packing makes one long row of the whole batch.
    """
    check_options(module, dropout, options)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    q_length, kv_length = q.shape[1], k.shape[1]
    if attention_mask is None:  # as in eager, every query then sees every key
        attention_mask = Mask(FULL, q_length, kv_length, kv_length)
        is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    mask = fitting_mask(attention_mask, q_length, kv_length, is_causal=is_causal)
    if mask.cached is not None:
        return flashtile.attention_with_kvcache(
            q, k, v, window_size=mask.window, softmax_scale=scaling, **mask.cached._asdict()
        ), None
    k, v = k[:, : mask.kv_used], v[:, : mask.kv_used]
    if mask.rows is None:
        return flashtile.attention(q, k, v, window_size=mask.window, softmax_scale=scaling), None
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    options = {"max_seqlen_q": q_length, "max_seqlen_k": kv_length, "window_size": mask.window}
    options |= {"softmax_scale": scaling, "causal_alignment": "top_left", **mask.rows._asdict()}
    out = flashtile.attention_varlen(q, k, v, **options)
    return out.unflatten(0, (-1, q_length)), None


AttentionInterface.register(FLASHTILE, flashtile_attention)
AttentionMaskInterface.register(FLASHTILE, flashtile_mask)
