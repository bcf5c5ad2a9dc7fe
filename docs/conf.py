"""How the documentation is built: `make docs`, with every warning an error."""

import sys
from pathlib import Path

from neuronrank_core import __version__

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "NeuronRank"
version = release = __version__
copyright = "The NeuronRank authors, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax from the page's own folder: no page loads anything from the network.
    "numpydoc",
    "from_code",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"NeuronRank {__version__}"
# Pages say where a formula or a flag lives; sources of the pages themselves are in the repository.
html_copy_source = html_show_sourcelink = False

myst_heading_anchors = 3
# What a reference to our own code names has to be there; other libraries' names need a network to look up.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!neuronrank_(core|torch|cli)\.).*")]

autodoc_member_order = "bysource"
# Docstrings give types with shapes and units, which says more than annotations do.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
numpydoc_show_class_members = numpydoc_xref_param_type = False
