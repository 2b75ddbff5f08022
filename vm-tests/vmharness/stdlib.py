"""The tree that demo and benchmark take unless told otherwise: Python's standard library."""

import shutil
import sysconfig
from pathlib import Path


def copy_standard_library(directory: Path) -> Path:
    """Copy the running Python's standard library into `directory` and return the copy.

    Without the packages installed into it, which are no part of it and can be of any size.
    """
    source = Path(sysconfig.get_path("stdlib"))
    copy = directory / source.name
    installed = shutil.ignore_patterns("site-packages", "dist-packages")
    shutil.copytree(source, copy, symlinks=True, ignore=installed)
    return copy
