"""The plug-in for vLLM: greedy tokens of small models are those of vLLM's own attention.

vLLM pins torch and has 3.5 GB of packages, so it lives in build/vllm-venv, made by `make
test-integrations-heavy` (cmake/requirements-vllm.txt). These tests start its Python with
vllm_engine.py, once with flashtile and once without. What has no mark "heavy" needs no vLLM.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flashtile
from example_builds import BUILD, missing

plugin = importlib.import_module("flashtile.integrations.vllm")

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = ROOT / "build/vllm-venv"
LAYERS = 2
# In bfloat16 two attentions round differently, and the layers behind them carry that on. Where the
# first and second choice of vLLM are as close as this, in logarithms of their probabilities, either
# may win: a few steps of bfloat16, which are 1/32 and 1/16 for logits from 4 to 16.
GAP = 0.25

# Head dimensions are multiples of 32, which vLLM's own attention asks for.
CASES = [
    *("llama-float32", "llama-bfloat16", "window-float32", "softcap-float32"),
    *("sinks-float32", "alibi-float32", "encoder-float32"),
]
REFUSED = ["fp8-bfloat16"]


def plugin_metadata(folder: Path) -> None:
    """What an installed flashtile tells vLLM: the entry points of pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    points = re.findall(r'\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"', project)
    assert len(points) == 2
    info = folder / "flashtile-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flashtile\nVersion: 0\n")
    text = "".join(f"[{group}]\n{name} = {value}\n" for group, name, value in points)
    (info / "entry_points.txt").write_text(text)


def run_engine(folder: Path, models: Path, cases: list[str], switch: str) -> dict[str, Any]:
    """What vLLM makes of cases, in a process of its own; and its log."""
    python = ENVIRONMENT / "bin/python"
    if not python.is_file():
        missing(f"vLLM is not installed in {ENVIRONMENT}: make test-integrations-heavy does that")
    folder.mkdir(exist_ok=True)
    plugin_metadata(folder)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
        "PYTHONPATH": f"{BUILD / 'python'}{os.pathsep}{folder}",
        "FLASHTILE_VLLM": switch,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles how it ranks tokens, which takes a minute
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    script = Path(__file__).with_name("vllm_engine.py")
    results = folder / "results.json"
    run = subprocess.run(
        [str(python), str(script), str(models), str(results), *cases],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    return {"log": run.stdout, **json.loads(results.read_text())}


@pytest.mark.heavy
def test_tokens_are_those_of_vllm(tmp_path: Path) -> None:
    """One test for all cases: pytest-xdist would start the engines in each of its processes."""
    own = run_engine(tmp_path / "own", tmp_path / "models", CASES, "0")
    ours = run_engine(tmp_path / "flashtile", tmp_path / "models", CASES + REFUSED, "1")
    line = f"flashtile {flashtile.__version__} computes attention in this process"
    assert line not in own["log"]
    assert ours["log"].count(line) == 1
    for case in CASES:
        check_case(case, own[case], ours[case])
    sentence = "kv_cache_dtype is 'fp8'; flashtile's backend for vLLM allows one of auto,"
    assert ours["fp8-bfloat16"]["error"].startswith(f"NotImplementedError: {sentence}")


def check_case(case: str, own: dict[str, Any], ours: dict[str, Any]) -> None:
    assert "error" not in own, f"{case}: {own['where']}"
    assert "error" not in ours, f"{case}: {ours['where']}"
    assert own["served"] == 0, case
    assert ours["served"] > LAYERS, case
    assert ours["served"] % LAYERS == 0, case
    assert len(own["result"]) == 16, case
    if case.startswith("encoder"):
        for vector, expected in zip(ours["result"], own["result"], strict=True):
            assert vector == pytest.approx(expected, abs=1e-5), case
        return
    pairs = list(zip(ours["result"], own["result"], own["runners_up"], strict=True))
    equal = sum(actual == expected for actual, expected, _ in pairs)
    assert equal >= (16 if case.endswith("float32") else 12), case
    for actual, expected, runners_up in pairs:
        for token, own_token, (second, gap) in zip(actual, expected, runners_up, strict=True):
            if token != own_token:  # what follows has another text before it
                assert token == second, case
                assert gap <= GAP, case
                break


# Without vLLM: what register() decides, over a registry like vLLM's.


class Backends(Enum):
    """Members with the methods that register() calls."""

    CUSTOM = "custom"
    CPU_ATTN = "cpu"

    def is_overridden(self) -> bool:
        return self in overrides

    def get_path(self) -> str:
        return overrides.get(self, self.value)


overrides: dict[Backends, str] = {}
OURS = "flashtile.integrations._vllm_backend."
OTHER = "another.plugin.Backend"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Backends, str]]:
    """In the place of vLLM's, empty, and no switch in the environment."""
    monkeypatch.delenv("FLASHTILE_VLLM", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    host, module = ModuleType("vllm"), ModuleType(plugin.REGISTRY)
    host.__version__ = "0.99.0"  # type: ignore[attr-defined]
    module.AttentionBackendEnum = Backends  # type: ignore[attr-defined]
    module.register_backend = overrides.__setitem__  # type: ignore[attr-defined]
    for one in (host, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    overrides.clear()
    yield overrides
    overrides.clear()


@pytest.mark.parametrize(
    ("environment", "on_cpu"),
    [
        ({}, False),
        ({"FLASHTILE_VLLM": "1"}, True),
        ({"FLASHTILE_VLLM": "0"}, False),
        ({"VLLM_PLUGINS": "other,flashtile"}, True),
        ({"VLLM_PLUGINS": "flashtile_other"}, False),
        ({"VLLM_PLUGINS": "flashtile", "FLASHTILE_VLLM": "0"}, False),
    ],
    ids=str,
)
def test_the_cpu_is_flashtile_only_where_the_user_says_so(
    environment: dict[str, str],
    on_cpu: bool,
    registry: dict[Backends, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        plugin.register()
    expected = {Backends.CUSTOM: OURS + "Backend"}
    if on_cpu:
        expected[Backends.CPU_ATTN] = OURS + "CPUBackend"
    assert registry == expected
    (line,) = caplog.messages  # once
    assert ("in the place of vLLM's own" in line) is on_cpu


def test_a_switch_that_is_no_number_is_refused(
    registry: dict[Backends, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTILE_VLLM", "yes")
    with pytest.raises(ValueError, match="FLASHTILE_VLLM is 'yes'; allowed: 0, 1"):
        plugin.register()
    assert not registry


def test_another_plugin_keeps_what_it_has(
    registry: dict[Backends, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry[Backends.CUSTOM] = OTHER
    monkeypatch.setenv("FLASHTILE_VLLM", "1")
    caplog.set_level(logging.INFO)
    plugin.register()
    assert registry == {Backends.CUSTOM: OTHER, Backends.CPU_ATTN: OURS + "CPUBackend"}
    assert f"CUSTOM is {OTHER}, so flashtile is not CUSTOM" in caplog.messages[0]
    registry[Backends.CPU_ATTN] = OTHER
    with pytest.raises(RuntimeError, match=f"where {OTHER} has replaced CPU_ATTN"):
        plugin.register()
    assert registry[Backends.CPU_ATTN] == OTHER


def test_a_vllm_without_its_names_is_named(
    registry: dict[Backends, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where flashtile was not asked for, vLLM goes on without it."""
    monkeypatch.delattr(sys.modules[plugin.REGISTRY], "register_backend")
    sentence = f"vllm 0.99.0 (tested: {plugin.TESTED}) has no {plugin.REGISTRY}.register_backend"
    plugin.register()
    assert sentence in caplog.messages[0]
    monkeypatch.setenv("FLASHTILE_VLLM", "1")
    with pytest.raises(ImportError, match=re.escape(sentence)):
        plugin.register()
    assert not registry


def test_vllm_that_is_not_installed_is_named(
    registry: dict[Backends, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("FLASHTILE_VLLM", "1")
    with pytest.raises(ImportError, match=r"vllm cannot be imported \(.*\); flashtile\.integr"):
        plugin.register()
    assert not registry


def test_entry_point_is_the_function(tmp_path: Path) -> None:
    plugin_metadata(tmp_path)
    (point,) = entry_points_of(tmp_path, "vllm.general_plugins")
    assert (point.name, point.load()) == (plugin.PLUGIN, plugin.register)


def entry_points_of(folder: Path, group: str) -> list[Any]:
    found = importlib.metadata.distributions(path=[str(folder)])
    return [point for one in found for point in one.entry_points if point.group == group]
