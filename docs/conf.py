"""The documentation site: ``make docs`` builds it with every warning an error."""

from __future__ import annotations

import re
from pathlib import Path
from types import FunctionType
from typing import Any

import engineworks

project = "engineworks"
version = release = engineworks.__version__
project_copyright = "the engineworks authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
source_suffix = {".md": "markdown"}
exclude_patterns: list[str] = []
nitpicky = False  # types of other packages have no page here

html_theme = "furo"
html_title = f"engineworks {version}"
html_copy_source = False
pygments_style = "default"

myst_heading_anchors = 4  # the anchors that links use where the repository is browsed
myst_enable_extensions = ["fieldlist"]
suppress_warnings = ["myst.header"]  # pages begin their levels as they do where they are browsed

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_ivar = True

# pages that stand at the root of the repository, and where they are on the site
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def _moved(app: Any, page: str, source: list[str]) -> None:
    """Leads links to pages at the root to where the site has them."""
    for name, place in MOVED.items():
        source[0] = re.sub(rf"\]\(((?:\.\./)*)\.\./{re.escape(name)}", rf"](\1{place}", source[0])


def _included(app: Any, path: Path, page: str, source: list[str]) -> None:
    """The same for a page at the root, which a page of the site includes."""
    for name, place in MOVED.items():
        source[0] = source[0].replace(f"]({name}", f"]({place}")
    source[0] = source[0].replace("](docs/", "](").replace("](LICENSE)", "](../LICENSE)")


def _plain(app: Any, context: Any, lines: list[str]) -> None:
    """``--help`` is no markup: stars and dashes are what they are."""
    for i, line in enumerate(lines):
        if not line.startswith(".. "):
            starred = re.sub(r"(?<!\*)\*(?!\*)", r"\*", line)
            lines[i] = re.sub(r"(?<![`\w])--[a-z][\w-]*", r"``\g<0>``", starred)


def setup(app: Any) -> None:
    # things are shown under the names by which they are promised
    for name in engineworks.__all__:
        thing = getattr(engineworks, name)
        if isinstance(thing, (type, FunctionType)):
            thing.__module__, thing.__name__, thing.__qualname__ = "engineworks", name, name
    app.connect("source-read", _moved)
    app.connect("include-read", _included)
    app.connect("sphinx-click-process-options", _plain)
    app.connect("sphinx-click-process-description", _plain)
