"""Every integration has a page, and is imported only where it is asked for."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MODULES = sorted(
    path.stem
    for path in (ROOT / "python/flashtile/integrations").iterdir()
    if (path.suffix == ".py" and not path.stem.startswith("_")) or (path / "__init__.py").is_file()
)


def test_every_module_has_a_page() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs/integrations").glob("*.md"))
    missing = [name for name in MODULES if f"flashtile.integrations.{name}" not in pages]
    assert not missing


def test_flashtile_imports_none() -> None:
    code = "import sys, flashtile; print(*(m for m in sys.modules if 'integrations' in m))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.strip()
