"""The build backend: scikit-build-core, which is also asked to fetch what is missing.

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
TOOLKIT = "/usr/local/cuda"  # where CMake looks, too


def _torch_folders() -> list[Path]:
    """Where torch may be; purelib still names the user's environment under build isolation."""
    folders = [os.environ["TORCH_ROOT"]] if os.environ.get("TORCH_ROOT") else []
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        folders += list(spec.submodule_search_locations or [])
    folders += [os.path.join(sysconfig.get_path(key), "torch") for key in ("purelib", "platlib")]
    return [Path(folder) for folder in folders]


def _lacks_nvcc() -> bool:
    """Whether kernels are asked for and CMake would look for their compiler in vain."""
    if os.environ.get("FLASHTILE_CUDA") != "ON" or os.environ.get("CUDACXX"):
        return False
    folders = [os.environ.get("CUDA_HOME"), TOOLKIT]
    found = any(folder and (Path(folder) / "bin" / "nvcc").is_file() for folder in folders)
    return not found and shutil.which("nvcc") is None


def _missing() -> list[str]:
    found = any((folder / "lib" / "libtorch_cpu.so").is_file() for folder in _torch_folders())
    return ([] if found else [TORCH]) + ([NVCC] if _lacks_nvcc() else [])


def _use_fetched_nvcc() -> None:
    """CMake finds no compiler among Python's packages: CUDACXX names it."""
    spec = importlib.util.find_spec("nvidia") if _lacks_nvcc() else None
    for folder in (spec and spec.submodule_search_locations) or []:
        toolkit = Path(folder) / "cu13"
        if (toolkit / "bin" / "nvcc").is_file():
            # Packages have no links: nvcc looks in lib64, CMake for the runtime without a version.
            _link(toolkit / "lib64", "lib")
            _link(toolkit / "lib" / "libcudart.so", "libcudart.so.13")
            os.environ["CUDACXX"] = str(toolkit / "bin" / "nvcc")


def _link(path: Path, target: str) -> None:
    if not path.exists():
        path.symlink_to(target)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What scikit-build-core needs, and torch or nvcc where they are missing."""
    return [*_scikit.get_requires_for_build_wheel(config_settings), *_missing()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """The same for an editable install."""
    return [*_scikit.get_requires_for_build_editable(config_settings), *_missing()]


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Builds the wheel into a folder and returns its name."""
    _use_fetched_nvcc()
    return str(_scikit.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """The same for an editable install."""
    _use_fetched_nvcc()
    return str(_scikit.build_editable(wheel_directory, config_settings, metadata_directory))


build_sdist = _scikit.build_sdist
get_requires_for_build_sdist = _scikit.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = _scikit.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _scikit.prepare_metadata_for_build_editable
