"""Sphinx: `make docs` builds build/docs from every Markdown file of this repository.

The sources' folder is the repository, so a link between two files is the same here and in a
checkout, and one that leads nowhere fails the build.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs/_ext"), str(ROOT / "python")]

project = "flashtile"
author = "the flashtile authors"
copyright = author  # noqa: A001 - Sphinx's name
release = re.search(r"(?m)^  VERSION (\S+)$", (ROOT / "CMakeLists.txt").read_text()).group(1)
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "headers"]
root_doc = "docs/index"
include_patterns = ["*.md", *(f"{folder}/**.md" for folder in (
    "benchmarks", "cpp_tests", "docs", "examples", "kernel"))]  # fmt: skip
html_theme = "furo"
html_title = f"flashtile {release}"
html_show_sourcelink = False
highlight_language = "none"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4

# Only names, signatures and docstrings are read, so nothing has to be compiled: the package takes
# the ops for loaded and registered. torch itself is there, so types are what a checker sees.
torch.ops.flashtile = SimpleNamespace(
    forward=None, python_registered=True, build_info=lambda: f"version={release}\n"
)
# Overloads are for type checkers; the signature with every keyword and its default is for readers.
for path in (ROOT / "python/flashtile").glob("*.py"):
    name = "flashtile" if path.stem == "__init__" else f"flashtile.{path.stem}"
    module = ModuleAnalyzer.for_file(path, name)
    ModuleAnalyzer.cache["module", name] = module
    module.analyze()
    module.overloads.clear()
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Differentiable", "Numerics", "Source"]
