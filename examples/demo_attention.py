"""Attention alone, forward and backward: flashtile against manual attention.

Manual attention ("eager") writes the whole score matrix to memory, as the formula says. On a CPU
every measurement runs in a process of its own, so that the peak memory is that of one call.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import flashtile

HEADS, HEADS_KV, HEAD_DIM = 9, 3, 64  # those of SmolLM2-135M
SCORE_MATRICES = 4  # that manual attention holds at its peak: probabilities and three temporaries
SECONDS_PER_MEASUREMENT = 2.0

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + causal mask) v on (batch, seqlen, heads, head_dim)."""
    group = q.shape[2] // k.shape[2]
    query = q.transpose(1, 2)
    key, value = (t.transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    scores = query @ key.transpose(2, 3) / math.sqrt(q.shape[3])
    seqlen_q, seqlen_k = scores.shape[2:]
    hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    scores = scores.masked_fill_(hidden.triu(seqlen_k - seqlen_q + 1), float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    out: Tensor = weights.to(q.dtype) @ value
    return out.transpose(1, 2)


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by flashtile."""
    return flashtile.attention(q, k, v, causal=True)


IMPLEMENTATIONS: dict[str, Attention] = {"eager": eager, "flashtile": tiled}


@dataclass
class Measurement:
    """One forward and backward: seconds, and the most memory held beyond the inputs, in bytes."""

    seconds: float
    peak_bytes: int


def make_inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v that require gradients, and dout: one sequence of random normal numbers."""
    generator = torch.Generator().manual_seed(tokens)
    heads = (HEADS, HEADS_KV, HEADS_KV, HEADS)
    inputs = [torch.randn(1, tokens, h, HEAD_DIM, generator=generator) for h in heads]
    inputs = [t.to(device, dtype) for t in inputs]
    return [*(t.requires_grad_() for t in inputs[:3]), inputs[3]]


def results(attention: Attention, inputs: list[Tensor]) -> dict[str, Tensor]:
    """out, dq, dk, dv."""
    *qkv, dout = inputs
    out = attention(*qkv)
    dq, dk, dv = torch.autograd.grad(out, qkv, dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def relative_errors(
    attention: Attention, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Of out, dq, dk, dv: norm of the difference to manual attention in fp64, over its norm."""
    inputs = make_inputs(tokens, device, dtype)
    exact_inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    exact = results(eager, exact_inputs)
    computed = results(attention, inputs)
    return {n: ((computed[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact}


def measure(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Measurement | str:
    """Time and peak memory of one forward and backward, or a sentence why there are none."""
    missing = _missing_memory(tokens) if name == "eager" and device.type == "cpu" else 0
    if missing > 0:
        return f"left out: needs {missing / 2**30:.1f} GiB more memory than is free"
    if device.type != "cpu":
        return _measure_cuda(IMPLEMENTATIONS[name], make_inputs(tokens, device, dtype))
    command = [sys.executable, __file__, name, str(tokens), str(dtype).removeprefix("torch.")]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        last_line = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        return f"failed: {last_line}"
    return Measurement(**json.loads(child.stdout))


def _measure_cpu(attention: Attention, inputs: list[Tensor]) -> Measurement:
    """Median time over a fixed budget; the first call also gives the peak memory."""
    results(attention, make_inputs(64, torch.device("cpu"), inputs[0].dtype))  # libraries load
    _reset_high_water_mark()
    before = _memory_status("VmRSS")
    peak_bytes = 0
    seconds: list[float] = []
    while sum(seconds) < SECONDS_PER_MEASUREMENT:
        start = time.perf_counter()
        results(attention, inputs)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            peak_bytes = max(0, _memory_status("VmHWM") - before)
    return Measurement(statistics.median(seconds), peak_bytes)


def _measure_cuda(attention: Attention, inputs: list[Tensor]) -> Measurement:
    results(attention, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(attention, inputs)
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    repeats = 10
    start = time.perf_counter()
    for _ in range(repeats):
        results(attention, inputs)
    torch.cuda.synchronize()
    return Measurement((time.perf_counter() - start) / repeats, peak_bytes)


def _missing_memory(tokens: int) -> int:
    """Bytes that manual attention needs in fp32 beyond what the machine has free; <= 0: enough."""
    needed = SCORE_MATRICES * HEADS * tokens * tokens * 4
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (line for line in meminfo if line.startswith("MemAvailable:"))
    return needed - int(available.split()[1]) * 1024


def _memory_status(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its high-water mark) of this process, in bytes.

    Not getrusage's ru_maxrss: that survives exec, so a child would report its parent's peak.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _reset_high_water_mark() -> None:
    """Sets VmHWM to VmRSS where the kernel allows it; else the mark is that of the imports."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _main() -> None:
    """The child process of measure(): NAME TOKENS DTYPE; prints a Measurement as JSON."""
    name, tokens, dtype = sys.argv[1:]
    inputs = make_inputs(int(tokens), torch.device("cpu"), getattr(torch, dtype))
    print(json.dumps(asdict(_measure_cpu(IMPLEMENTATIONS[name], inputs))))


if __name__ == "__main__":
    _main()
