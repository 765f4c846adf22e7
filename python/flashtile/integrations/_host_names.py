"""Names of the packages that flashtile plugs into, some of them private: which a version has."""

from __future__ import annotations

import importlib


def missing_names(names: dict[str, tuple[str, ...]]) -> list[str]:
    """Those that the installed version does not have, of modules and their attributes."""
    missing = []
    for module_name, attributes in names.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        missing += [f"{module_name}.{name}" for name in attributes if not hasattr(module, name)]
    return missing


def check_names(version: str, names: dict[str, tuple[str, ...]]) -> None:
    """ImportError unless the installed version, in words, has all of them."""
    if missing := missing_names(names):
        raise ImportError(f"{version} has no {' and no '.join(missing)}, which flashtile needs")
