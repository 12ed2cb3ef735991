"""The settings of the documentation site; tools/build_site.py gathers its pages and builds it."""

from __future__ import annotations

from repmlp_deploy import __version__

project = "RepMLP Deploy"
author = "the RepMLP Deploy contributors"
copyright = "the RepMLP Deploy contributors, MIT license"  # noqa: A001 - the name that Sphinx reads
release = __version__
version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns: list[str] = []
default_role = "literal"
smartquotes = False  # they would make a dash of the two that an option begins with
nitpicky = False

myst_heading_anchors = 3
myst_enable_extensions: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_use_type_comments = False
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"RepMLP Deploy {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
