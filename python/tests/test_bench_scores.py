"""What `make bench` times against each other under --kind scores computes the same."""

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

bench_scores = pytest.importorskip("bench_scores", reason="no benchmarks: not a source checkout")
bench_cases: Any = importlib.import_module("bench_cases")
bench_runs: Any = importlib.import_module("bench_runs")

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    dataclasses.replace(case, seqlen_q=48 * case.seqlen_q // 1024, seqlen_k=48, head_dim=16)
    for case in bench_scores.score_cases()
    if case.dtype == "float32" and case.seqlen_k == 1024
]
DEVICE = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.direction} {c.mask} {c.score} {c.label}")
def test_contenders_agree(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scores, "_compiled_flex", lambda: flex_attention)
    runs = bench_runs.make_runs(case, DEVICE)
    assert tuple(runs) == bench_runs.contenders(case, DEVICE)
    results: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, run in runs.items():
        made = run()  # out, or gradients of q, k, v and maybe the bias
        made = made if isinstance(made, tuple) else (made,)
        is_ours = name.startswith(bench_cases.OURS)
        turned = made[:3] if is_ours else (t.transpose(1, 2) for t in made[:3])
        results[name] = (*turned, *made[3:])
    ours = results.pop(bench_cases.OURS)
    for name, theirs in results.items():
        for actual, expected in zip(ours, theirs, strict=True):
            assert actual.shape == expected.shape
            same = torch.allclose(actual, expected, atol=2e-5)
            assert same == (case.score not in ("dropout", "sink")), name


def test_every_score_is_timed() -> None:
    cases = bench_scores.score_cases()
    assert len(set(cases)) == len(cases)
    assert {case.score for case in cases} == set(bench_cases.SCORES)
    assert all(case.kind == "scores" and case.min_rounds >= 7 for case in cases)
