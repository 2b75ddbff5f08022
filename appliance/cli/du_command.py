"""`appliance du`: what store paths and views take up, alone and together with others."""

import argparse
from typing import TYPE_CHECKING, Any

from appliance.cli.options import add_json_option, add_log_options, add_service_options
from appliance.cli.output import print_json, write_line
from appliance.cli.quantities import local_store, readable, whole_paths
from appliance.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from appliance.collector.disk_usage import StoreUsage

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name


def add_du(commands: "Subparsers") -> None:
    """Add `appliance du`."""
    command = commands.add_parser(
        "du",
        usage="%(prog)s [OPTION]... [PATH]...",
        help="show what store paths and views take up on the disk",
        description="Show for each PATH, or for all store paths if no PATH is given, how many "
        "bytes its files have, how many bytes of the store it shares with other store paths, and "
        "how many are there for it alone. Below, the same for the whole store.",
    )
    command.add_argument(
        "paths", nargs="*", metavar="PATH", help="a store path, with or without /nix/store/"
    )
    command.add_argument(
        "--view",
        metavar="NAME",
        help="show what the store paths of a view take up together, and share with others",
    )
    add_json_option(command)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_du)


def _run_du(options: argparse.Namespace) -> None:
    from appliance.collector.disk_usage import disk_usage
    from appliance.store.store import Store

    path = local_store(options)
    groups = _groups(options, path)
    store = Store.open(path, or_readonly=True)
    try:
        _check_valid(store, options)
        usage = disk_usage(store, groups)
    finally:
        store.close()
    _print(options, usage)


def _groups(
    options: argparse.Namespace, store_path: "Path"
) -> "list[tuple[str, list[bytes]]] | None":
    groups = []
    if options.view is not None:
        from appliance.store.views import Views

        paths = Views(store_path).read(options.view).paths
        groups.append((f"view {options.view}", [path.digest for path in paths]))
    groups += [(path.absolute(), [path.digest]) for path in whole_paths(options.paths)]
    return groups or None


def _check_valid(store: Any, options: argparse.Namespace) -> None:
    with store.snapshot() as snapshot:
        missing = [
            path for path in whole_paths(options.paths) if snapshot.path_info(path.digest) is None
        ]
    if missing:
        raise StoreError("\n".join(f"path {path.absolute()} is not valid" for path in missing))


def _print(options: argparse.Namespace, usage: "StoreUsage") -> None:
    if options.json:
        print_json(
            {
                "rows": [
                    {
                        "of": row.label,
                        "apparentBytes": row.apparent_bytes,
                        "sharedBytes": row.shared_bytes,
                        "exclusiveBytes": row.exclusive_bytes,
                    }
                    for row in usage.rows
                ],
                "store": {
                    "sharedBytes": usage.shared_bytes,
                    "exclusiveBytes": usage.exclusive_bytes,
                    "unreferencedBytes": usage.unreferenced_bytes,
                    "otherBytes": usage.other_bytes,
                    "unusedBytes": usage.unused_bytes,
                },
            }
        )
        return
    for row in usage.rows:
        sizes = (row.apparent_bytes, row.shared_bytes, row.exclusive_bytes)
        apparent, shared, exclusive = map(readable, sizes)
        write_line(f"{row.label}\tapparent {apparent}\tshared {shared}\texclusive {exclusive}")
    write_line(
        f"store\tshared {readable(usage.shared_bytes)}\texclusive "
        f"{readable(usage.exclusive_bytes)}\tunreferenced {readable(usage.unreferenced_bytes)}\t"
        f"other {readable(usage.other_bytes)}\tunused {readable(usage.unused_bytes)}"
    )
