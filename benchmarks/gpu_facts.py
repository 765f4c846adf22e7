"""First line of gpu_check.sh: what this machine has. Runs without torch, too, then exits with 3."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Prints the line, writes the facts to the file that is named."""
    facts = {
        "commit": os.environ.get("FLASHTILE_COMMIT") or _commit(),
        "python": f"{platform.python_version()} at {sys.executable}",
        "cores": os.cpu_count(),
        "driver": _line(
            "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", at=0
        ),
        "nvcc": _line("nvcc", "--version", at=-1),
        **_torch_facts(),
    }
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=1) + "\n")
    print("found: " + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    return 0 if facts["torch"] else 3


def _torch_facts() -> dict[str, Any]:
    """None for what is not there; why flashtile cannot be imported, where it cannot."""
    facts: dict[str, Any] = dict.fromkeys(("torch", "cuda", "cudnn", "gpu", "flashtile"))
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return facts
    facts |= {"torch": str(torch.__version__), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        facts |= {"cudnn": torch.backends.cudnn.version(), "gpu": torch.cuda.get_device_name()}
    try:
        flashtile: Any = importlib.import_module("flashtile")
        facts["flashtile"] = flashtile.build_info()
    except Exception as error:
        facts["flashtile"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return facts


def _line(*command: str, at: int) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[at] if lines else "no answer"


def _commit() -> str:
    return _line(
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+",
        at=0,
    )


if __name__ == "__main__":
    sys.exit(main())
