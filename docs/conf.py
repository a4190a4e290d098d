"""How Sphinx builds these pages: `make docs`."""

import preftune.version

project = "preftune"
release = preftune.version.__version__
copyright = "the authors of preftune"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images"]
suppress_warnings = ["config.cache"]
html_theme = "alabaster"
html_theme_options = {"description": "Preference tuning, packed and exact.", "page_width": "1120px"}
html_show_copyright = False

# Links to headings as on the pages of a repository.
myst_heading_anchors = 4

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
