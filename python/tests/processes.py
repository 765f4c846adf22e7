"""A process group of gloo: one start of processes for many checks, as a start costs seconds."""

import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Check: TypeAlias = Callable[[], None]  # runs on every rank
TIMEOUT = timedelta(seconds=30)  # of a rank that waits for others in vain


def _main(rank: int, world: int, folder: str, checks: Callable[[], Mapping[str, Check]]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=TIMEOUT)
    torch.manual_seed(0)
    failures: dict[str, str] = {}
    for name, check in checks().items():
        torch.manual_seed(0)
        try:
            check()
        except BaseException:  # an assertion, most of all: the others still run
            failures[name] = traceback.format_exc()
    Path(f"{folder}/{rank}").write_bytes(pickle.dumps(failures))
    # Not a barrier: a check that failed on one rank may have left the others in the middle of it.
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world)], 4 * TIMEOUT)
    dist.destroy_process_group()


def failures_in_processes(
    world: int, checks: Callable[[], Mapping[str, Check]], folder: Path
) -> dict[str, str]:
    """Runs all checks on every rank; name -> what failed, of those that did.

    Args:
        world: How many processes.
        checks: Makes the checks in every process, in one order; importable.
        folder: An empty one.
    """
    spawn(_main, (world, str(folder), checks), nprocs=world)  # type: ignore[no-untyped-call]
    found: dict[str, str] = {}
    for rank in range(world):
        for name, text in pickle.loads((folder / str(rank)).read_bytes()).items():
            found[name] = f"{found.get(name, '')}rank {rank}: {text}"
    return found
