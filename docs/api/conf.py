"""Sphinx: the API reference, from the docstrings. `make docs` builds it, with warnings as errors."""

import hvd_saef

project = "hvd_saef"
version = release = hvd_saef.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "alabaster"
html_show_copyright = False
default_role = "code"  # `name` is code in docstrings, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
exclude_patterns = ["build"]
