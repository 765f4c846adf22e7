"""The Python blocks of docs/integrations run."""

import pytest

import test_docs

# Whose modules are built first: test_beyond_torch.py, test_llama_cpp.py.
OTHERS = {f"docs/integrations/{name}.md" for name in ("beyond_torch", "llama_cpp")}
PAGES = test_docs.python_pages(of_integrations=True)


@pytest.mark.parametrize("page", sorted({*PAGES} - OTHERS))
def test_python_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_docs.test_python_runs(page, monkeypatch)


def test_others_are_pages() -> None:
    assert {*PAGES} > OTHERS
