"""Writes a Llama-type checkpoint as the engine reads it: config.json, model.safetensors, tokenizer.

    python examples/engine/export_model.py SOURCE FOLDER

SOURCE is a GGUF file or a folder with a checkpoint of transformers. What the engine does not
compute (biases, scaled rotary embeddings, other activations) is refused here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPIED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes config.json and model.safetensors; tensors are named as in transformers' Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def engine_config(config: Any) -> dict[str, Any]:
    """config.json of a transformers config; ValueError where the engine computes something else."""
    rope = getattr(config, "rope_parameters", None) or {}
    allowed = {
        "model_type": (config.model_type, "llama"),
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for name, (value, wanted) in allowed.items():
        if value != wanted:
            raise ValueError(f"{name} is {value}; allowed: {wanted}")
    result = {name: getattr(config, name) for name in COPIED}
    result["model_type"] = "llama"
    result["rope_theta"] = float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)))
    result["head_dim"] = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return result


def export(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Reads a checkpoint with transformers and writes it, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415, seconds to import

    where: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if source.is_file():
        where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    config = engine_config(model.config)
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config["tie_word_embeddings"])
    }
    write_checkpoint(folder, config, tensors)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def main() -> int:
    """Exit status 1 with a sentence when the checkpoint cannot be exported."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    try:
        export(arguments.source, arguments.folder, DTYPES[arguments.dtype])
    except (ValueError, OSError) as error:
        print(f"{arguments.source}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
