"""Ring attention of two processes against half of what one process takes, forward and backward.

One thread a process, gloo over the loopback interface. "transfers" are those of a step of training
alone: keys and values in both passes, and the gradients of the keys and values. The bound is 1.15
times the half, and the transfers. Run it on two idle cores:

    PYTHONPATH=build/python .venv/bin/python benchmarks/bench_ring.py [SEQLEN ...]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import flashtile
from flashtile.integrations import ring

WORLD, HEADS, HEAD_DIM, REPEATS = 2, 8, 64, 5
HEADER = ("seqlen", "attention", "ring", "half", "transfers", "ring / half", "bound")


def step(attend: Callable[..., Any], tensors: list[Tensor], dout: Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None
    attend(*tensors).backward(dout)


def transfer(tensors: list[Tensor]) -> None:
    """To the other process and from it, three times two tensors."""
    peer = 1 - dist.get_rank()
    for _ in range(3):
        ops = [dist.P2POp(dist.isend, t, peer) for t in tensors]
        ops += [dist.P2POp(dist.irecv, torch.empty_like(t), peer) for t in tensors]
        for work in dist.batch_isend_irecv(ops):
            work.wait()


def seconds(functions: list[Callable[[], None]]) -> list[float]:
    """Medians of alternating runs. Both processes begin together."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(REPEATS + 1):
        for found, function in zip(times, functions, strict=True):
            dist.barrier()
            begin = time.perf_counter()
            function()
            if repeat:  # the first one warms up
                found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in times]


def measure(rank: int, folder: str, seqlens: list[int]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    kinds = {
        "zigzag causal": (ring.zigzag_ring_flash_attn_func, True),
        "ring full": (ring.ring_flash_attn_func, False),
    }
    for seqlen in seqlens:
        for name, (attend, causal) in kinds.items():
            runs: list[Callable[[], None]] = []
            for function, rows in ((attend, seqlen // WORLD), (flashtile.attention, seqlen)):
                *tensors, dout = (torch.randn(1, rows, HEADS, HEAD_DIM) for _ in range(4))
                tensors = [t.requires_grad_() for t in tensors]
                runs.append(partial(step, partial(function, causal=causal), tensors, dout))
            shards = [torch.randn(1, seqlen // WORLD, HEADS, HEAD_DIM) for _ in range(2)]
            mine, alone, moved = seconds([*runs, partial(transfer, shards)])
            half = alone / WORLD
            bound = 1.15 * half + moved
            if rank == 0:
                row = (f"{mine:.3f}", f"{half:.3f}", f"{moved:.3f}", f"{mine / half:.2f}")
                print("| " + " | ".join((str(seqlen), name, *row, f"{bound:.3f}")) + " |")
    dist.destroy_process_group()


if __name__ == "__main__":
    lengths = [int(argument) for argument in sys.argv[1:]] or [2048, 4096, 8192]
    print("seconds, float32, 8 heads of 64, two processes\n")
    print("| " + " | ".join(HEADER) + " |\n" + "| --- " * len(HEADER) + "|", flush=True)
    spawn(measure, (tempfile.mkdtemp(), lengths), nprocs=WORLD)  # type: ignore[no-untyped-call]
