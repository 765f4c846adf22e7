"""The build backend of the wheel: scikit-build-core, which is also asked to fetch what is missing.

A wheel needs libtorch's headers and libraries to build. They are taken from the torch that is
already installed, which may be several gigabytes; only where none is found does the build fetch
one. With ``FLASHTILE_CUDA=ON`` and no nvcc on the machine, the compiler is fetched as well.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TypeAlias

from scikit_build_core import build as _scikit

Settings: TypeAlias = dict[str, str | list[str]] | None

TORCH = "torch>=2.11"
NVCC = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"


def _torch_folders() -> list[Path]:
    """Where torch may be; purelib still names the user's environment under build isolation."""
    folders = [os.environ["TORCH_ROOT"]] if os.environ.get("TORCH_ROOT") else []
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        folders += list(spec.submodule_search_locations or [])
    folders += [os.path.join(sysconfig.get_path(key), "torch") for key in ("purelib", "platlib")]
    return [Path(folder) for folder in folders]


def _missing() -> list[str]:
    found = any((folder / "lib" / "libtorch_cpu.so").is_file() for folder in _torch_folders())
    needs = [] if found else [TORCH]
    cuda_home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    has_nvcc = shutil.which("nvcc") is not None or (cuda_home / "bin" / "nvcc").is_file()
    if os.environ.get("FLASHTILE_CUDA") == "ON" and not has_nvcc:
        needs.append(NVCC)
    return needs


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What scikit-build-core needs, and torch or nvcc where they are missing."""
    return [*_scikit.get_requires_for_build_wheel(config_settings), *_missing()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """The same for an editable install."""
    return [*_scikit.get_requires_for_build_editable(config_settings), *_missing()]


build_wheel = _scikit.build_wheel
build_editable = _scikit.build_editable
build_sdist = _scikit.build_sdist
get_requires_for_build_sdist = _scikit.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = _scikit.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _scikit.prepare_metadata_for_build_editable
