"""The options that every op takes."""

from typing import Any, NamedTuple

from torch import Tensor

UNLIMITED = -1  # window_left, window_right: no bound on this side (FLASHTILE_UNLIMITED)


class Options(NamedTuple):
    """How to attend: the last parameters of every op, in the order of its schema."""

    softmax_scale: float | None = None
    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    deterministic: bool = False
    alignment: int = 0  # flashtile_alignment
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None

    def numbers(self) -> tuple[Any, ...]:
        """The part that is not tensors."""
        return self[:7]

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The part that is tensors, or may be."""
        return self[7:]
