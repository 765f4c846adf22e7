"""Devices. Without a GPU the CUDA cases skip, or fail where FLASHTILE_REQUIRE_GPU=1."""

import os
from collections.abc import Iterator

import pytest
import torch

import flashtile


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device, or this torch was built without CUDA"
    if not flashtile.build_info()["cuda_architectures"]:
        return "this flashtile was built without CUDA"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test marked or parametrised for CUDA asks for a GPU first."""
    callspec = getattr(item, "callspec", None)
    device = callspec.params.get("device") if callspec is not None else None
    if device != "cuda":
        return
    reason = _why_no_gpu()
    if reason is None:
        return
    if os.environ.get("FLASHTILE_REQUIRE_GPU") == "1":
        pytest.fail(f"FLASHTILE_REQUIRE_GPU=1, but there is {reason}")
    pytest.skip(reason)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of tiny calls: waking threads would take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.use_deterministic_algorithms(False)
