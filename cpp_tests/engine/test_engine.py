"""The C++ engine of examples/engine with a small model against the same model in plain torch.

FLASHTILE_ENGINE names the executable; ctest builds it from the installed package.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from engine_process import EngineProcess
from tiny_llama import CONFIG, Reference, make_tensors

pytest.importorskip("safetensors", reason="safetensors, which writes the checkpoint, is missing")
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "engine"))
from export_model import engine_config, write_checkpoint

EXECUTABLE = os.environ.get("FLASHTILE_ENGINE", "")
pytestmark = pytest.mark.skipif(
    not Path(EXECUTABLE).is_file(), reason="FLASHTILE_ENGINE names no executable: it was not built"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("model")
    write_checkpoint(result, CONFIG, make_tensors())
    return result


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(make_tensors())


def prompts(seed: int, count: int, longest: int) -> list[list[int]]:
    """Prompts of different lengths."""
    rng = random.Random(seed)
    return [
        [rng.randrange(CONFIG["vocab_size"]) for _ in range(rng.randint(1, longest))]
        for _ in range(count)
    ]


def check_answers(
    engine: EngineProcess, reference: Reference, asked: dict[str, tuple[list[int], int]]
) -> None:
    """Every request got the tokens of running alone."""
    for name, (prompt, count) in asked.items():
        assert engine.tokens[name] == reference.greedy(prompt, count), name
        assert engine.finished[name]["finished"] == "length"
        assert engine.finished[name]["usage"]["prompt_tokens"] == len(prompt)


def serve_over_time(engine: EngineProcess, asked: dict[str, tuple[list[int], int]]) -> None:
    """Sends a request whenever a few lines have come back, so that prompts meet decoding."""
    for name, (prompt, count) in asked.items():
        engine.send({"id": name, "prompt": prompt, "max_tokens": count})
        for _ in range(2):
            if len(engine.finished) < len(engine.tokens) or not engine.tokens:
                engine.receive()
    engine.wait_until_finished(*asked)


def test_requests_that_arrive_at_different_times(folder: Path, reference: Reference) -> None:
    asked = {str(i): (prompt, 3 + i) for i, prompt in enumerate(prompts(1, 16, 70))}
    with EngineProcess(EXECUTABLE, folder, "--max-step-tokens", "32") as engine:
        assert engine.ready["max_seqlen"] == CONFIG["max_position_embeddings"]
        serve_over_time(engine, asked)
        check_answers(engine, reference, asked)
        stats = engine.ask_stats()
    assert stats["finished"] == len(asked)
    assert stats["pages_in_use"] == 0
    assert stats["preemptions"] == 0
    assert 0 < stats["pages_peak"] <= stats["pages"]
    assert stats["generated_tokens"] == sum(count for _, count in asked.values())
    assert stats["steps"] < stats["generated_tokens"]  # a step served several requests
    assert stats["busy_seconds"] > 0
    assert stats["first_token_seconds_max"] >= stats["first_token_seconds_mean"] > 0


@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_cache_exhaustion_is_survived(folder: Path, reference: Reference, page_size: int) -> None:
    asked = {str(i): (prompt, 25) for i, prompt in enumerate(prompts(2, 6, 30))}
    pages = -(-64 // page_size)
    options = ("--pages", str(pages), "--page-size", str(page_size), "--max-step-tokens", "40")
    with EngineProcess(EXECUTABLE, folder, *options) as engine:
        serve_over_time(engine, asked)
        check_answers(engine, reference, asked)
    assert engine.stats["preemptions"] > 0
    assert engine.stats["pages_in_use"] == 0
    assert engine.stats["pages_peak"] <= pages
    assert engine.stats["computed_tokens"] > engine.stats["generated_tokens"]


def test_equal_beginnings_are_shared(folder: Path, reference: Reference) -> None:
    """The first step computes 40 tokens of "a"; the others find them in the cache."""
    (prompt,) = prompts(3, 1, 1)
    prompt = [*prompt, *(i * 7 % 160 for i in range(69))]
    asked = {"a": (prompt, 20), "b": ([*prompt[:20], 9], 20), "c": ([*prompt[:37], 7, 8], 20)}
    with EngineProcess(EXECUTABLE, folder, "--max-step-tokens", "40") as engine:
        engine.send(
            *({"id": name, "prompt": p, "max_tokens": count} for name, (p, count) in asked.items())
        )
        engine.wait_until_finished(*asked)
        check_answers(engine, reference, asked)
    shared = {name: line["usage"]["shared_tokens"] for name, line in engine.finished.items()}
    assert shared == {"a": 0, "b": 20, "c": 37}
    assert engine.stats["copied_pages"] == 2  # the rows of a page after the equal ones differ
    assert engine.stats["shared_tokens"] == 57
    assert engine.stats["pages_in_use"] == 0


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "a", "prompt": [1, 2], "max_tokens": 127}', "prompt has 2 tokens and max_tokens"),
        ('{"id": "a", "prompt": []}', "prompt is empty; allowed: 1 token and more"),
        ('{"id": "a"}', "prompt is missing; allowed: a list of tokens"),
        ('{"id": "a", "prompt": "text"}', "prompt is no list; allowed: a list of tokens"),
        ('{"id": "a", "prompt": [160]}', "prompt has 160; allowed: tokens, 0 to 159"),
        ('{"id": "a", "prompt": [-1]}', "prompt has -1; allowed: tokens, 0 to 159"),
        ('{"id": "a", "prompt": [1.5]}', "prompt has 1.5; allowed: tokens, 0 to 159"),
        (
            '{"id": "a", "prompt": [1], "max_tokens": 0}',
            "max_tokens is 0; allowed: 1 to 1073741824",
        ),
        (
            '{"id": "a", "prompt": [1], "max_tokens": 1.5}',
            "max_tokens is 1.5; allowed: whole numbers",
        ),
        (
            '{"id": "a", "prompt": [1], "seed": 0.5}',
            "seed is 0.5; allowed: whole numbers, 0 to 9007",
        ),
        ('{"id": "a", "prompt": [1], "top_p": 1.5}', "top_p is 1.5; allowed: 0 to 1"),
        (
            '{"id": "a", "prompt": [1], "temperature": "hot"}',
            'temperature is "hot"; allowed: 0 to 100',
        ),
        ('{"id": "a", "prompt": [1], "beams": 4}', "there is no field beams"),
        ('{"id": 7, "prompt": [1]}', "id is 7; allowed: a string"),
        ('{"cancel": []}', "cancel is []; allowed: a string"),
        ("[1, 2", "the line is no JSON object"),
        ('{"id": ' + "[" * 200000 + "]" * 200000 + "}", "the line is nested too deep"),
        ("17", "the line is no JSON object"),
        ("1" * (2**24 + 1), "the line is too long; allowed: 16777216 bytes"),
        ('{"id": "%s", "prompt": [1]}' % ("é" * 200), 'id is "éé'),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(
    shared_engine: EngineProcess, line: str, sentence: str
) -> None:
    before = len(shared_engine.errors)
    shared_engine.send(line)
    while len(shared_engine.errors) == before:
        shared_engine.receive()
    name, said = shared_engine.errors[-1]
    assert said.startswith(sentence)
    assert name == ("a" if line.startswith('{"id": "a"') else None)


def test_sentences_quote_a_part_of_a_long_value(shared_engine: EngineProcess) -> None:
    """Readers of lines need not keep megabytes."""
    long = "é" * 100_000
    for line in (
        {"id": "a", "prompt": [long]},
        {"id": "a", "prompt": [1], "top_p": long},
        {"id": "a", "prompt": [1], long: 1},
        {"id": long, "prompt": [1]},
        {"cancel": long},
    ):
        before = len(shared_engine.errors)
        shared_engine.send(json.dumps(line, ensure_ascii=False))
        while len(shared_engine.errors) == before:
            shared_engine.receive()
        _, said = shared_engine.errors[-1]
        assert "éé..." in said
        assert "\ufffd" not in said
        assert len(said) < 200


@pytest.fixture(scope="module")
def shared_engine(folder: Path) -> EngineProcess:
    return EngineProcess(EXECUTABLE, folder, "--pages", "64")


def test_an_engine_that_refused_goes_on(shared_engine: EngineProcess, reference: Reference) -> None:
    request = {"id": "x", "prompt": [1, 2, 3], "max_tokens": 5}
    shared_engine.send(request, {**request, "prompt": [4]})
    shared_engine.wait_until_finished("x")
    check_answers(shared_engine, reference, {"x": ([1, 2, 3], 5)})
    assert shared_engine.errors[-1] == ("x", "id x is still running; allowed: another one")


def test_a_stop_token_ends_the_answer(shared_engine: EngineProcess, reference: Reference) -> None:
    expected = reference.greedy([9, 8, 7], 12)
    stop = expected[6]
    shared_engine.send({"id": "stop", "prompt": [9, 8, 7], "max_tokens": 12, "stop": [stop]})
    shared_engine.wait_until_finished("stop")
    assert shared_engine.tokens["stop"] == expected[: expected.index(stop) + 1]
    assert shared_engine.finished["stop"]["finished"] == "stop"


def test_a_cancelled_request_gives_its_pages_back(shared_engine: EngineProcess) -> None:
    request = {"prompt": [3], "max_tokens": 127}
    shared_engine.send({"id": "early", **request}, {"cancel": "early"})
    shared_engine.wait_until_finished("early")
    assert shared_engine.finished["early"]["finished"] == "cancelled"
    assert not shared_engine.tokens["early"]
    for attempt in range(50):  # it may have ended before the line comes
        name = f"late {attempt}"
        shared_engine.send({"id": name, **request})
        shared_engine.wait_for_tokens(name, 2)
        shared_engine.send({"cancel": name})
        shared_engine.wait_until_finished(name)
        if shared_engine.finished[name]["finished"] == "cancelled":
            break
    assert shared_engine.finished[name]["finished"] == "cancelled"
    assert 2 <= len(shared_engine.tokens[name]) < 127
    assert shared_engine.ask_stats()["pages_in_use"] == 0
    shared_engine.end()


def test_sampling_depends_on_the_seed_alone(folder: Path) -> None:
    """Not on neighbours, and not on pages that were taken away in between."""

    def request(i: int) -> dict[str, object]:
        sampling = {"temperature": 1.0, "top_p": 0.9, "seed": i // 2}
        return {"id": str(i), "prompt": [10, 20 + i % 2], "max_tokens": 30, **sampling}

    def sample(*options: str) -> dict[str, list[int]]:
        with EngineProcess(EXECUTABLE, folder, *options) as engine:
            engine.send(*(request(i) for i in range(5)))
        if options:
            assert engine.stats["preemptions"] > 0
        return engine.tokens

    alone = sample()
    assert sample("--pages", "5") == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == 5
    with EngineProcess(EXECUTABLE, folder) as engine:
        engine.send(request(3))
    assert engine.tokens["3"] == alone["3"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_chooses_likely_tokens(
    folder: Path, reference: Reference, dtype: str
) -> None:
    """Rounding may choose another token, but only one that is nearly as likely."""
    asked = {str(i): prompt for i, prompt in enumerate(prompts(4, 3, 40))}
    with EngineProcess(EXECUTABLE, folder, "--dtype", dtype) as engine:
        for name, prompt in asked.items():
            engine.send({"id": name, "prompt": prompt, "max_tokens": 10})
    for name, prompt in asked.items():
        tokens = engine.tokens[name]
        assert len(tokens) == 10
        logits = reference.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        chosen = logits.gather(1, logits.new_tensor(tokens).long()[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 0.3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--model is missing; allowed: a folder of export_model.py"),
        (["--model"], "--model lacks its value"),
        (["--model", "x", "--beams", "4"], "there is no option --beams; try --help"),
        (["--model", "x", "more"], "there is no option more; try --help"),
        (["--model", "x", "--pages", "0"], "--pages is 0; allowed: 1 to 2147483647"),
        (["--model", "x"], "x/config.json: cannot be read"),
        (["--model", "{folder}", "--pages", "2000000000"], "allocate memory"),
    ],
)
def test_an_engine_that_cannot_start_says_why_in_one_line(
    folder: Path, options: list[str], sentence: str
) -> None:
    result = subprocess.run(
        [EXECUTABLE, *(option.format(folder=folder) for option in options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert sentence in line


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "gpt"}, "model_type is gpt; allowed: llama"),
        ({"hidden_size": 32}, "has shape [160,64]; allowed: [160,32]"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2."),
        ({"vocab_size": "many"}, "type must be number"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; allowed: "silu"'),
        ({"attention_bias": True}, "attention_bias is true; allowed: false"),
        ({"rope_scaling": {"factor": 8.0}}, 'rope_scaling is {"factor":8.0}; allowed: null'),
        ({"rope_theta": 0.0}, "rope_theta is 0.0; allowed: above 0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    write_checkpoint(tmp_path, {**CONFIG, **change}, make_tensors())
    result = subprocess.run(
        [EXECUTABLE, "--model", tmp_path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert sentence in result.stderr


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, make_tensors())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged, sentence in (
        (whole[:5], "too short for a safetensors file"),
        (whole[:-4], "lies outside of the file or has another size"),
        (b"\xff" * 8 + whole[8:], "its header does not end"),
    ):
        file.write_bytes(damaged)
        result = subprocess.run(
            [EXECUTABLE, "--model", tmp_path], capture_output=True, text=True, check=False
        )
        assert result.returncode == 1
        assert "model.safetensors: " in result.stderr
        assert sentence in result.stderr


def test_the_reference_says_what_transformers_says(reference: Reference) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        **{
            name: value
            for name, value in CONFIG.items()
            if name not in ("model_type", "rope_theta")
        },
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG["rope_theta"]},
    )
    assert engine_config(config) == CONFIG
    model = transformers.LlamaForCausalLM(config).double()
    model.load_state_dict({name: t.double() for name, t in make_tensors().items()})
    tokens = prompts(5, 1, 60)[0]
    ours, theirs = (
        reference.logits(tokens),
        model(model.dummy_inputs["input_ids"].new_tensor([tokens])),
    )
    assert (ours - theirs.logits[0]).abs().max() < 1e-5
