"""`appliance root`: keeps store paths from garbage collection, under names."""

import argparse
from typing import TYPE_CHECKING, Any

from appliance.cli.options import add_json_option, add_log_options, add_service_options
from appliance.cli.output import print_json, write_line
from appliance.cli.quantities import local_store, whole_paths
from appliance.errors import StoreError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name


def add_root(commands: "Subparsers") -> None:
    """Add `appliance root` with its commands."""
    command = commands.add_parser(
        "root",
        usage="%(prog)s COMMAND [OPTION]... [ARGUMENT]...",
        help="keep store paths from garbage collection",
        description="Make, change and list roots. `appliance gc` keeps the store paths that are "
        "listed under a root, and all that they refer to.",
        epilog="Run `appliance root COMMAND --help` for the options of a command.",
    )
    below = command.add_subparsers(
        title="commands", required=True, metavar="COMMAND", prog="appliance root"
    )
    add = below.add_parser(
        "add",
        usage="%(prog)s [OPTION]... NAME PATH...",
        help="add store paths to a root",
        description="Add each PATH to the root NAME, which is made if it is missing.",
    )
    add.add_argument("name", metavar="NAME", help="the name of the root")
    add.add_argument(
        "paths", nargs="+", metavar="PATH", help="a store path, with or without /nix/store/"
    )
    rm = below.add_parser(
        "rm",
        usage="%(prog)s [OPTION]... NAME [PATH]...",
        help="remove store paths from a root, or the root",
        description="Remove each PATH from the root NAME, or the whole root if no PATH is given. "
        "The store paths themselves stay until `appliance gc` runs.",
    )
    rm.add_argument("name", metavar="NAME", help="the name of the root")
    rm.add_argument(
        "paths", nargs="*", metavar="PATH", help="a store path, with or without /nix/store/"
    )
    shown = below.add_parser(
        "list",
        usage="%(prog)s [OPTION]...",
        help="print all roots and their store paths",
        description="Print the name of each root with each of its store paths.",
    )
    add_json_option(shown)
    for one, run in ((add, _run_add), (rm, _run_rm), (shown, _run_list)):
        add_service_options(one)
        add_log_options(one)
        one.set_defaults(run=run)


def _run_add(options: argparse.Namespace) -> None:
    from appliance.nix.path_info import read_path_info
    from appliance.store.root_lists import RootLists
    from appliance.store.store import Store

    paths = whole_paths(options.paths)
    store_path = local_store(options)
    store = Store.open(store_path, or_readonly=True)
    try:
        # Listed first, then looked for, so that no collection can come between.
        roots = RootLists(store_path)
        before = set(roots.read(options.name))
        roots.add(options.name, paths)
        with store.snapshot() as snapshot:
            found = {path: snapshot.path_info(path.digest) for path in paths}
        missing = [
            path
            for path, encoded in found.items()
            if encoded is None or read_path_info(encoded).path != path
        ]
        if missing:
            roots.remove(options.name, [path for path in paths if path not in before])
            raise StoreError("\n".join(f"path {path.absolute()} is not valid" for path in missing))
    finally:
        store.close()


def _run_rm(options: argparse.Namespace) -> None:
    from appliance.store.root_lists import RootLists

    RootLists(local_store(options)).remove(options.name, whole_paths(options.paths) or None)


def _run_list(options: argparse.Namespace) -> None:
    from appliance.store.root_lists import RootLists

    roots = RootLists(local_store(options))
    shown = {name: sorted(path.absolute() for path in roots.read(name)) for name in roots.names()}
    if options.json:
        print_json(shown)
        return
    for name, paths in shown.items():
        for path in paths:
            write_line(f"{name}\t{path}")
