"""The book: what Sphinx makes of the documents of the tree; `make docs` runs it.

The source directory is a copy of the whole tree, so links lead where they do on a disk.
The pages of commands are in build/reference there.
"""

from appliance import __version__

project = "Appliance"
author = "The authors of Appliance"
version = release = __version__
root_doc = "docs/book/index"
extensions = ["myst_parser"]
include_patterns = [
    "docs/*.md",
    "docs/*/*.md",
    "build/reference/*.md",
    "cffi_build/README.md",
    "vm-tests/README.md",
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
# Headings can be linked to, down to this level.
myst_heading_anchors = 4
nitpicky = True
html_theme = "alabaster"
html_theme_options = {
    "description": "Read-only file systems for virtual machines",
    "fixed_sidebar": True,
    "page_width": "75em",
}
html_show_sourcelink = False
