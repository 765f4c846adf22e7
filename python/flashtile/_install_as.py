"""The drop-ins: modules and metadata under the names of other packages, in this process."""

import importlib
import importlib.metadata
import importlib.util
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

_FOLDER = Path(__file__).resolve().parent / "integrations" / "drop_in"
_LOCAL = "+flashtile"  # of the versions of our distributions
_MARK = "IS_FLASHTILE"  # an attribute of our modules
_lock = threading.Lock()


class _DropIn(NamedTuple):
    """A folder of modules and of their distribution's metadata."""

    distribution: str
    modules: tuple[str, ...]

    def folder(self) -> str:
        return str(_FOLDER / self.distribution)


_FLASH_ATTN = _DropIn("flash_attn", ("flash_attn",))
_FLASH_ATTN_3 = _DropIn("flash_attn_3", ("flash_attn_interface", "flash_attn_3"))
_DROP_INS = {
    "flash_attn": _FLASH_ATTN,
    "flash_attn_interface": _FLASH_ATTN_3,
    "flash_attn_3": _FLASH_ATTN_3,
}


def _place(module: ModuleType) -> str:
    path = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return str(path or "an unknown place")


def _check_not_imported(drop_in: _DropIn) -> None:
    """RuntimeError where another module has the name in this process already."""
    for name in drop_in.modules:
        module = sys.modules.get(name)
        if module is not None and not hasattr(module, _MARK):
            raise RuntimeError(
                f"{name} is imported from {_place(module)} already; allowed: "
                "flashtile.install_as before anything imports it"
            )


def _installed(drop_in: _DropIn) -> tuple[str, str] | None:
    """The version and the place of what is installed under the name; None: nothing is.

    Without metadata the version is empty.
    """
    try:
        spec = importlib.util.find_spec(drop_in.modules[0])
    except ValueError:  # a module without a spec, in sys.modules
        spec = None
    if spec is None or spec.origin is None:  # nothing, or a namespace, which stays one
        return None
    try:
        version = importlib.metadata.version(drop_in.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return version, spec.origin


def _activate(drop_in: _DropIn) -> None:
    found = _installed(drop_in)
    if found is not None and found[0].endswith(_LOCAL):  # activated already, or from our wheel
        return
    if found is not None:
        version, place = found
        warnings.warn(
            f"{drop_in.modules[0]} {version or 'without a version'} is installed at {place}; in "
            "this process flashtile stands in its place",
            RuntimeWarning,
            stacklevel=3,
        )
    sys.path.insert(0, drop_in.folder())
    importlib.invalidate_caches()


def install_as(name: str) -> None:
    """Lets the packages of this process import flashtile under another name.

    After ``flashtile.install_as("flash_attn")`` a model that begins with ``from flash_attn import
    flash_attn_func`` starts and computes, on CPU and CUDA tensors. Call it before anything imports,
    or looks for, the name: some hosts remember that a package was missing. It puts a folder with
    the modules and the metadata of a distribution in front of ``sys.path``, so that
    ``importlib.util.find_spec`` and ``importlib.metadata`` find both, in spawned processes, too.
    The wheels of ``make drop-in-wheels`` do the same for every process of an environment. Calling
    it again, from any thread, changes nothing.

    Args:
        name: ``"flash_attn"``: FlashAttention 2, version 2.8.4; see
            ``flashtile.integrations.flash_attn``. ``"flash_attn_interface"`` or
            ``"flash_attn_3"``: FlashAttention 3, version 3.0.0; see
            ``flashtile.integrations.flash_attn_3``.

    Warns:
        RuntimeWarning: the package itself is installed, too: with its version and its place. In
            this process flashtile stands in front of it; its submodules that flashtile does not
            have can still be imported.

    Raises:
        TypeError: name is not a str.
        ValueError: name is none of these.
        RuntimeError: a module of that name that is not flashtile's is imported already.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; allowed: str")
    if name not in _DROP_INS:
        allowed = ", ".join(f'"{known}"' for known in _DROP_INS)
        raise ValueError(f'name is "{name}"; allowed: {allowed}')
    drop_in = _DROP_INS[name]
    with _lock:
        _check_not_imported(drop_in)
        _activate(drop_in)
        for module in drop_in.modules:
            importlib.import_module(module)
