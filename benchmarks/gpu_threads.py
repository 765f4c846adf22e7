"""The first calls of threads through torch, for a fresh process on a GPU.

Autograd runs a backward on a thread of its own, which has no CUDA context until some call makes
one current; memory comes from blocks that torch has already, so none does before ours. The same
goes for a forward on a thread that a program starts.
"""

from __future__ import annotations

import threading

import torch

import flashtile


def main() -> None:
    """Both against plain attention in float64; raises where they differ."""
    torch.manual_seed(0)
    shape = (1, 96, 2, 64)
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    spare = [torch.empty(2**20, device="cuda") for _ in range(8)]
    del spare  # what the calls allocate is there from now on
    inputs = [t.requires_grad_() for t in (q, k, v)]
    wide = [t.detach().cpu().double().transpose(1, 2).requires_grad_() for t in inputs]
    scores = wide[0] @ wide[1].transpose(-1, -2) / shape[-1] ** 0.5
    expected = scores.softmax(-1) @ wide[2]
    expected_grads = torch.autograd.grad(expected, wide, dout.cpu().double().transpose(1, 2))

    got: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: got.append(flashtile.attention(*(t.detach() for t in inputs)))
    )
    thread.start()
    thread.join()
    got += torch.autograd.grad(flashtile.attention(*inputs), inputs, dout)
    worst = 0.0
    for result, right in zip(got, (expected, *expected_grads), strict=True):
        difference = result.cpu().double().transpose(1, 2) - right
        worst = max(worst, float(difference.norm() / right.norm()))
    if not worst < 1e-2:  # bfloat16 rounds by 4e-3; NaN fails as well
        raise SystemExit(f"relative error {worst:.1e}; allowed: below 1e-2")
    print(f"a forward on a new thread and a backward on autograd's: relative error {worst:.1e}")


if __name__ == "__main__":
    main()
