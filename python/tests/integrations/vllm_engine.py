"""Runs in the environment of vLLM, by test_vllm.py: what the engine makes of small random models.

    vllm_engine.py MODELS RESULTS CASE...

MODELS is a folder, where models are made if they are missing; RESULTS a file for JSON: of each case
the tokens or vectors, the calls that flashtile served, or the error.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # counts are those of a process

import torch

VOCABULARY = 256
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
BLOOM = {"hidden_size": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 32}
GEMMA = {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 32, "sliding_window": 32}
GEMMA["tie_word_embeddings"] = True
BERT = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
# The classes of transformers, and what is not their default.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama ForCausalLM", SIZES),
    "window": ("Mistral ForCausalLM", {**SIZES, "sliding_window": 32}),
    "softcap": ("Gemma2 ForCausalLM", {**SIZES, **GEMMA}),
    "sinks": ("GptOss ForCausalLM", {**SIZES, **GPT_OSS}),
    "alibi": ("Bloom ForCausalLM", BLOOM),
    "encoder": ("Bert Model", BERT),
}
LENGTHS = [5, 190, 33, 64, 17, 128, 1, 77, 100, 32, 3, 150, 45, 96, 31, 60]  # of 16 prompts
STEP = 96  # tokens of all requests in a step: longer prompts are cut into parts
NEW = 12


def make_model(folder: Path, name: str) -> Path:
    """Saves a model whose weights are large enough for attention to be far from uniform."""
    where = folder / name
    if (where / "config.json").is_file():
        return where
    transformers = importlib.import_module("transformers")
    classes, options = MODELS[name]
    family, kind = classes.split()
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if name == "softcap" and parameter is embeddings:  # also its last layer: it would say
            torch.nn.init.normal_(parameter, std=0.02)  # each token again
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        elif name == "sinks" and parameter.shape == (SIZES["num_attention_heads"],):
            torch.nn.init.normal_(parameter, std=2)
    model.save_pretrained(where)
    if name == "encoder":
        save_tokenizer(where)
    return where


def save_tokenizer(where: Path) -> None:
    """Words that are numbers. vLLM asks encoders for a tokenizer, and does not use it here."""
    tokenizers, transformers = (importlib.import_module(m) for m in ("tokenizers", "transformers"))
    words = tokenizers.models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0")
    special = {"pad_token": "0", "unk_token": "0"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), **special
    )
    tokenizer.save_pretrained(where)


def prompts() -> list[dict[str, list[int]]]:
    torch.manual_seed(2)
    return [{"prompt_token_ids": torch.randint(3, VOCABULARY, (n,)).tolist()} for n in LENGTHS]


def make_engine(model: Path, dtype: str, **options: Any) -> Any:
    vllm = importlib.import_module("vllm")
    # vLLM looks at each kind of model in a new process, which would import all of it again.
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda function: function()
    settings = {
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": STEP,
        "max_num_seqs": len(LENGTHS),
        "kv_cache_memory_bytes": 64 << 20,
        "seed": 0,
    }
    return vllm.LLM(str(model), **{**settings, **options})


def runner_up(step: dict[int, Any], chosen: int) -> tuple[int, float]:
    """The second choice, and how far its logarithmic probability is below the first."""
    found = {token: one.logprob for token, one in step.items()}
    first = found.pop(chosen)
    token = max(found, key=lambda one: found[one])
    return token, first - found[token]


def run(case: str, folder: Path) -> dict[str, Any]:
    """The result of a case, MODEL-DTYPE, or its error in words."""
    name, dtype = case.split("-")
    vllm, plugin = (importlib.import_module(m) for m in ("vllm", "flashtile.integrations.vllm"))
    plugin.counts.served = 0
    options: dict[str, Any] = {}
    if name == "encoder":
        options = {"runner": "pooling", "max_num_batched_tokens": 512}
        options["skip_tokenizer_init"] = False
    if name == "fp8":
        name, options = "llama", {"kv_cache_dtype": "fp8"}
    engine, others = None, None
    try:
        model = make_model(folder, name)
        engine = make_engine(model, dtype, **options)
        if name == "encoder":
            outputs = engine.embed(prompts(), use_tqdm=False)
            result: Any = [output.outputs.embedding for output in outputs]
        else:
            greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=2)
            greedy.detokenize = False
            outputs = [o.outputs[0] for o in engine.generate(prompts(), greedy, use_tqdm=False)]
            result = [list(output.token_ids) for output in outputs]
            others = [
                [runner_up(*step) for step in zip(output.logprobs, output.token_ids, strict=True)]
                for output in outputs
            ]
        return {"result": result, "runners_up": others, "served": plugin.counts.served}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
    finally:
        del engine
        importlib.import_module("vllm.distributed.parallel_state").cleanup_dist_env_and_memory()
        gc.collect()


def main() -> None:
    folder, results, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    found = {}
    for case in cases:
        found[case] = run(case, folder)
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
