"""The documentation as HTML: `make docs`. Every warning is an error; docs/index.md is the navigation."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

from pmpo_kernels.version import __version__

project = "pmpo_kernels"
version = release = __version__
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**",
    "examples/**",
    "benchmarks/results/*.md",
]
exclude_patterns = ["**/.*", ".*", "out", "build", "docs/_*"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pmpo_kernels).*")]
autodoc_member_order = "bysource"
autodoc_mock_imports = ["trl", "verl", "accelerate"]  # the integrations' own; not installed for the documentation
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False

highlight_language = "text"
html_theme = "furo"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_title = "pmpo_kernels"
html_math_renderer = "mathml"
html_copy_source = False
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]

LINK = re.compile(r"^- \[([^\]]+)\]\(([^)]+)\.(?:md|rst)\)", re.M)


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """The lists of docs/index.md, which GitHub shows as they are, as tables of contents."""
    if docname != root_doc:
        return
    for caption, text in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", source[0], re.S | re.M):
        entries = "\n".join(f"{title} <{page}>" for title, page in LINK.findall(text))
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def mathml(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """A formula that a browser draws itself; one that docutils cannot read is a warning, hence an error."""
    try:
        block = isinstance(node, nodes.math_block)
        translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


def skip_aliases(app: Sphinx, kind: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """A field of a NamedTuple is in its signature; Python's docstring of it says no more than its number."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("source-read", add_navigation)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
