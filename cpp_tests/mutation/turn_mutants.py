"""Mutants of the memory order of turns: what a key block's turn at dQ hands to the next one. The
numbers stay right on every device that is not in a hurry, and where blocks run one by one."""

from __future__ import annotations

from backward_mutants import BARRIER, COME_TO, FINISH, MAIN, TAKE_BLOCK
from backward_sm90_mutants import DQ as DQ_SM90
from mutant import Mutant

ORDER = "ptx/order.cuh"
RELEASE = "red.release.gpu.global.max.s32"
ACQUIRE = "atom.acquire.gpu.global.add.s32"
RELAXED_RELEASE = (ORDER, RELEASE, RELEASE.replace("release", "relaxed"))
RELAXED_ACQUIRE = (ORDER, ACQUIRE, ACQUIRE.replace("acquire", "relaxed"))

AWAIT = "Turns::template await<kGroup>(launch, smem + Shape::kNotes, slot); "
ADDED = "ptx::bulk_wait<0>(); "
FENCE = "ptx::fence_proxy_async_global(); "
FENCE_BEHIND_WAIT = (DQ_SM90, AWAIT + FENCE, AWAIT)
FENCE_BEHIND_ADD = (DQ_SM90, ADDED + FENCE, ADDED)


def mutant(
    name: str, *patches: tuple[str, str, str], head_dim: int = 64, memory: str = "large"
) -> Mutant:
    """A mutant of deterministic calls."""
    return Mutant(name, "backward", patches, ("turns",), head_dim, memory)


def mutant_sm90(name: str, *patches: tuple[str, str, str], head_dim: int = 64) -> Mutant:
    """The same of the kernels for sm_90a: head dim 64 adds bulk copies to dQ, 256 registers."""
    return mutant(name, *patches, head_dim=head_dim, memory="sm90")


SM80 = [
    mutant("turns passed without a release", RELAXED_RELEASE),
    mutant("turns taken without an acquire", RELAXED_ACQUIRE),
    mutant("turns released to their own block", (ORDER, RELEASE, RELEASE.replace("gpu", "cta"))),
    mutant("turns acquired from their own block", (ORDER, ACQUIRE, ACQUIRE.replace("gpu", "cta"))),
    mutant(
        "a turn ends before all have added",
        (MAIN, BARRIER + TAKE_BLOCK, COME_TO + BARRIER + TAKE_BLOCK.removeprefix(COME_TO)),
    ),
    mutant(
        "the last turn ends before all have added",
        (MAIN, BARRIER + FINISH, FINISH),
    ),
]

SM90 = [
    mutant_sm90("bulk turns passed without a release", RELAXED_RELEASE),
    mutant_sm90("bulk turns taken without an acquire", RELAXED_ACQUIRE),
    mutant_sm90("turns of roles passed without a release", RELAXED_RELEASE, head_dim=256),
    mutant_sm90("turns of roles taken without an acquire", RELAXED_ACQUIRE, head_dim=256),
    mutant_sm90("no proxy fence behind a turn's wait", FENCE_BEHIND_WAIT),
    mutant_sm90("no proxy fences around a turn", FENCE_BEHIND_WAIT, FENCE_BEHIND_ADD),
    mutant_sm90(
        "a proxy fence of the wrong memory behind a turn's wait",
        (DQ_SM90, AWAIT + FENCE, AWAIT + "ptx::fence_proxy_async_shared();"),
    ),
    # The end of a bulk copy is a fence of its proxy by itself.
    Mutant(
        "control: no proxy fence behind the addition of a turn",
        "backward",
        (FENCE_BEHIND_ADD,),
        ("turns",),
        memory="sm90",
        harmless=True,
    ),
]

TURN_MUTANTS = SM80 + SM90
