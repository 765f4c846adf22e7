"""What a mutant is: a small mistake that somebody could make in the kernels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Patches of kernel/ and the slice and cases in which they show.

    `patches` are (file, old text, new text); `cases` the groups of mutation_cases.cpp that run;
    `memory` the slices' memory class, or "sm90" for the kernels that only sm_90a has.
    """

    name: str
    kernel: str  # "forward", "backward", "decode", "prefill", "append" or "check_cache"
    patches: tuple[tuple[str, str, str], ...]
    cases: tuple[str, ...] = ("shapes",)
    head_dim: int = 64
    memory: str = "large"
    harmless: bool = False
