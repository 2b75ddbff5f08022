"""Where the installed commands begin, and `python -m appliance`."""

import os
import sys
from os.path import abspath, dirname


def main() -> None:
    """Run the command line, `appliance`."""
    _put_foreign_directories_last()
    from appliance.cli.main import main as run

    run()


def mount_helper() -> None:
    """Run the helper of mount(8), `mount.appliance`."""
    _put_foreign_directories_last()
    from appliance.cli.main import mount_helper as run

    run()


def _put_foreign_directories_last() -> None:
    """Search installed packages before PYTHONPATH and before the directory of the script.

    A `lmdb.py` that happens to lie in the working directory, or in a PYTHONPATH meant for another
    program, would otherwise be loaded in the place of the package. What is found nowhere else is
    still found there, and so is this package if that is where it was started from.
    """
    foreign: set[str] = set()
    if not sys.flags.ignore_environment and os.environ.get("PYTHONPATH"):
        foreign.update(map(abspath, os.environ["PYTHONPATH"].split(os.pathsep)))
    if not sys.flags.safe_path:
        foreign.add(abspath(sys.path[0]))
    foreign.discard(dirname(dirname(abspath(__file__))))
    # A stable sort: each of the two groups keeps its order.
    sys.path.sort(key=lambda name: abspath(name) in foreign)


if __name__ == "__main__":
    main()
