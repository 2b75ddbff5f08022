"""A wheel in an environment of its own, as somebody else would install it.

Nothing is downloaded: the environment borrows the packages that the wheel depends on from this one.
"""

import sys
import sysconfig
import venv
from pathlib import Path

from tests.fakes.finished_program import output_of


def install(wheel: Path, directory: Path) -> Path:
    """Install the wheel alone into a new environment, and return its directory of programs."""
    venv.create(directory)
    python = directory / "bin" / "python"
    output_of(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python),
        *("install", "--no-index", "--no-deps", wheel),
        cwd=directory,
    )
    (site_packages,) = directory.glob("lib/python*/site-packages")
    # A directory named there is searched after it, and the links of editable installs in it are not
    # followed: the project is the one that was just installed.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "bin"
