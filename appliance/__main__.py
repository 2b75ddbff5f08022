"""Entry points of the installed commands, and of `python -m appliance`."""

import os
import sys
from os.path import abspath, dirname


def main() -> None:
    """Run the command line, `appliance`."""
    _put_foreign_directories_last()
    from appliance.cli.main import main as run
    from appliance.system.exit import ending_beside_threads

    with ending_beside_threads():
        run()


def virtiofsd() -> None:
    """Run the program with the command line of virtiofsd, `appliance-virtiofsd`."""
    _put_foreign_directories_last()
    from appliance.cli.main import virtiofsd as run
    from appliance.system.exit import ending_beside_threads

    with ending_beside_threads():
        run()


def mount_helper() -> None:
    """Run the helper of mount(8), `mount.appliance` or `mount.fuse.appliance`."""
    _put_foreign_directories_last()
    from appliance.cli.main import mount_helper as run
    from appliance.system.exit import ending_beside_threads

    with ending_beside_threads():
        run()


def _put_foreign_directories_last() -> None:
    """Search installed packages before PYTHONPATH and before the directory of the script.

    Otherwise a file such as `lmdb.py` in the working directory, or in a PYTHONPATH that another
    program needs, would be loaded instead of the installed package. These directories are searched
    last, except that the one this package was loaded from keeps its place.
    """
    foreign: set[str] = set()
    if not sys.flags.ignore_environment and os.environ.get("PYTHONPATH"):
        foreign.update(map(abspath, os.environ["PYTHONPATH"].split(os.pathsep)))
    if not sys.flags.safe_path:
        foreign.add(abspath(sys.path[0]))
    foreign.discard(dirname(dirname(abspath(__file__))))
    # The sort is stable, so foreign and other directories keep their order.
    sys.path.sort(key=lambda name: abspath(name) in foreign)


if __name__ == "__main__":
    main()
