"""Trains a small character model from nothing, with flashtile as its attention.

Four query heads share two key/value heads. The text is this repository's README; the loss falls,
and a sample shows what was learnt. Less than a minute on two CPU cores; on a GPU in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import flashtile

HEADS, HEADS_KV, HEAD_DIM, LAYERS = 4, 2, 64, 2
WIDTH = HEADS * HEAD_DIM
CONTEXT, BATCH = 256, 4


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.project_qkv = nn.Linear(WIDTH, (HEADS + 2 * HEADS_KV) * HEAD_DIM, bias=False)
        self.project_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, seqlen, WIDTH). q, k and v stay views of one projection: no copies."""
        qkv = self.project_qkv(self.norms[0](x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split([HEADS, HEADS_KV, HEADS_KV], dim=2)
        x = x + self.project_out(flashtile.attention(q, k, v, causal=True).flatten(2))
        return x + self.mlp(self.norms[1](x))


class CharacterModel(nn.Module):
    """Characters and positions in, logits of the next character out."""

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, alphabet))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, seqlen) -> (batch, seqlen, alphabet)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        logits: Tensor = self.head(self.blocks(self.characters(ids) + self.positions(positions)))
        return logits


def sample(model: CharacterModel, ids: Tensor, count: int) -> Tensor:
    """`ids` (1, seqlen) with `count` more characters, drawn from the model."""
    with torch.inference_mode():
        for _ in range(count):
            logits = model(ids[:, -CONTEXT:])[:, -1].float()
            drawn = torch.multinomial(functional.softmax(logits / 0.7, dim=-1), 1)
            ids = torch.cat([ids, drawn], dim=1)
    return ids


def main() -> None:
    """Trains, printing the loss, and prints a sample."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "README.md")
    options = parser.parse_args()

    torch.manual_seed(0)
    text = options.text.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(c) for c in text])
    model = CharacterModel(len(alphabet)).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mixed = torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda")

    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        begins = torch.randint(len(data) - CONTEXT, (BATCH,))
        rows = torch.stack([data[b : b + CONTEXT + 1] for b in begins.tolist()]).to(options.device)
        with mixed:
            logits = model(rows[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == 1:
            rate = step * BATCH * CONTEXT / (time.perf_counter() - start)
            print(f"step {step:4}  loss {loss.item():.3f}  {rate:,.0f} characters/s", flush=True)

    with mixed:
        ids = sample(model, data[None, :32].to(options.device), 160)
    print("".join(alphabet[i] for i in ids[0].tolist()))


if __name__ == "__main__":
    main()
