"""An unpatched llama.cpp on the backend library of examples/ggml: tokens, and ggml's own tests."""

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import test_docs
from example_builds import BUILD, needed
from llama_cpp_build import BIN, EXAMPLE, build_backend, model_file, run_python

pytestmark = pytest.mark.heavy

LAYERS, PROMPTS, TOKENS = 30, 8, 32

# Two sequences in every batch; argv: the model, the backend library or nothing.
TWO_SEQUENCES = """
import json, sys
import llama_cpp as ll
import numpy as np
from generate import load_backend, operations_computed

if sys.argv[2]:
    load_backend(sys.argv[2])
ll.llama_backend_init()
quiet = ll.llama_log_callback(lambda *arguments: None)
ll.llama_log_set(quiet, None)
model = ll.llama_model_load_from_file(sys.argv[1].encode(), ll.llama_model_default_params())
words = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))

def generate(unified):
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified, params.flash_attn_type = 1024, 2, unified, 1
    params.n_threads = params.n_threads_batch = 1
    context = ll.llama_init_from_model(model, params)
    now, position, tokens = [[504, 3426, 314, 253], [1780, 314, 260]], [0, 0], [[], []]
    for _ in range(17):
        batch = ll.llama_batch_init(16, 0, 2)
        last = []
        for sequence in (0, 1):
            for token in now[sequence]:
                n = batch.n_tokens
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, position[sequence], 1
                batch.seq_id[n][0], batch.logits[n] = sequence, True
                batch.n_tokens, position[sequence] = n + 1, position[sequence] + 1
            last.append(batch.n_tokens - 1)
        assert ll.llama_decode(context, batch) == 0
        for sequence in (0, 1):
            logits = ll.llama_get_logits_ith(context, last[sequence])
            tokens[sequence].append(int(np.ctypeslib.as_array(logits, shape=(words,)).argmax()))
        now = [tokens[0][-1:], tokens[1][-1:]]
        ll.llama_batch_free(batch)
    ll.llama_free(context)
    return tokens

tokens = [generate(False), generate(True)]
print(json.dumps([tokens, operations_computed(sys.argv[2]) if sys.argv[2] else 0]))
"""


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    needed("diskcache", "diskcache")  # llama_cpp imports it


def generate(*options: str) -> Any:
    return json.loads(run_python(f"{EXAMPLE}/generate.py", "--model", str(model_file()), *options))


def test_tokens_are_equal() -> None:
    own = generate()
    ours = generate("--backend", str(build_backend()))
    print(f"\n{ours['text']}\n{ours['flashtile_operations']} operations by flashtile")
    assert len(own["tokens"]) == PROMPTS
    assert {len(tokens) for tokens in own["tokens"]} == {TOKENS}
    assert ours["tokens"] == own["tokens"]
    assert own["flashtile_operations"] == 0
    # One evaluation for a prompt and one for each token.
    assert ours["flashtile_operations"] == LAYERS * PROMPTS * (1 + TOKENS)


def test_a_quantised_cache_is_left_to_ggml() -> None:
    ours = generate("--backend", str(build_backend()), "--cache", "q8_0", "--tokens", "2")
    assert ours["flashtile_operations"] == 0


def test_two_sequences() -> None:
    """In streams of their own, and in a unified cache, where the mask keeps them apart."""
    model = str(model_file())
    own, none = json.loads(run_python("-c", TWO_SEQUENCES, model, ""))
    ours, computed = json.loads(run_python("-c", TWO_SEQUENCES, model, str(build_backend())))
    assert own[0][0] != own[0][1]
    assert ours == own
    # llama.cpp computes the prompts of the streams, four tokens and three, in two batches.
    assert (none, computed) == (0, (18 + 17) * LAYERS)


def test_page(tmp_path: Path) -> None:
    """Its three lines, and what they print."""
    page = "docs/integrations/llama_cpp.md"
    blocks = test_docs.blocks_of(page, (test_docs.ROOT / page).read_text(encoding="utf-8"))
    code, output = (
        next(block.text for block in blocks if block.info == info)
        for info in ("python needs llama_cpp", "text output of the block above")
    )
    build_backend()
    (tmp_path / "build").symlink_to(BUILD)
    (tmp_path / "model.gguf").symlink_to(model_file())
    assert test_docs.masked(run_python("-c", code, folder=tmp_path)) == test_docs.masked(output)


def features(case: str) -> list[str]:
    """What a case of test-backend-ops has beside q, k and v."""
    patterns = {
        "mask": r"mask=1",
        "sinks": r"sinks=1",
        "ALiBi": r"max_bias=(?!0\.0)",
        "softcap": r"logit_softcap=(?!0\.0)",
        "several sequences": r"nr23=\[\d+,(?!1\])",
    }
    return [name for name, pattern in patterns.items() if re.search(pattern, case)]


def test_backend_ops() -> None:
    """ggml's own test of backends, against its CPU backend."""
    command = [str(BIN / "test-backend-ops"), "test", "-b", "FLASHTILE", "-o", "FLASH_ATTN_EXT"]
    environment = {**os.environ, "GGML_BACKEND_PATH": str(build_backend())}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    cases = re.findall(r"^\s*FLASH_ATTN_EXT\((.*)\): (.*)$", result.stdout, re.MULTILINE)
    plain = [(case, re.sub(r"\x1b\[[\d;]*m", "", verdict)) for case, verdict in cases]
    verdicts = Counter(verdict.split(" [")[0] for _, verdict in plain)
    passed = Counter(name for case, verdict in plain if verdict == "OK" for name in features(case))
    print(f"\n{dict(verdicts)}; of those that passed: {dict(passed)}")
    assert result.returncode == 0, result.stdout[-5000:]
    assert set(verdicts) == {"OK", "not supported"}
    assert all(passed[name] > 0 for name in ("mask", "sinks", "ALiBi", "softcap"))
    # Quantised caches, and nothing else.
    left = [case for case, verdict in plain if verdict != "OK"]
    assert not [case for case in left if re.search(r"type_K=(f16|bf16|f32),type_V=\1", case)]
