"""`appliance gc` and `appliance delete`: remove store paths that nothing holds on to."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from appliance.cli.options import add_json_option, add_log_options, add_service_options
from appliance.cli.output import print_json, write_line
from appliance.cli.quantities import local_store, readable, seconds, size_bytes, whole_paths

if TYPE_CHECKING:
    from appliance.collector.collection import CollectionPlan, CollectOptions
    from appliance.collector.sweep import Swept
    from appliance.store.store import Store

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name


def add_gc(commands: "Subparsers") -> None:
    """Add `appliance gc`."""
    command = commands.add_parser(
        "gc",
        usage="%(prog)s [OPTION]...",
        help="remove store paths that no root, view or session needs",
        description="Remove all store paths that cannot be reached from a root (`appliance root`), "
        "a view or a running session, and whatever only they need. Imports and sessions go on "
        "meanwhile.",
    )
    printing = command.add_argument_group("instead of removing anything")
    shown = printing.add_mutually_exclusive_group()
    shown.add_argument("--print-roots", action="store_true", help="print the roots, and whose")
    shown.add_argument(
        "--print-live", action="store_true", help="print the store paths that are kept"
    )
    shown.add_argument(
        "--print-dead", action="store_true", help="print the store paths that can be removed"
    )
    shown.add_argument("--dry-run", action="store_true", help="print how much would be removed")
    shown.add_argument(
        "--compact",
        action="store_true",
        help="give unused space in data.mdb back to the file system; refused while another process "
        "has the store open",
    )
    what = command.add_argument_group("what is removed")
    what.add_argument(
        "--grace",
        default="1h",
        metavar="TIME",
        help="keep what was put within TIME: a number of seconds, or of minutes, hours, days or "
        "weeks with the suffix m, h, d or w (default: 1h)",
    )
    what.add_argument(
        "--delete-older-than",
        metavar="TIME",
        help="keep store paths that were put within TIME, too, such as 30d",
    )
    what.add_argument(
        "--max-freed",
        metavar="SIZE",
        help="remove no more store paths once SIZE is freed (K, M, G and T are suffixes); the ones "
        "that were put first go first",
    )
    what.add_argument(
        "--keep-free",
        metavar="SIZE",
        help="remove no more store paths once SIZE is free on the file system of the store",
    )
    _add_force(what)
    add_json_option(command)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_gc)


def add_delete(commands: "Subparsers") -> None:
    """Add `appliance delete`."""
    command = commands.add_parser(
        "delete",
        usage="%(prog)s [OPTION]... PATH...",
        help="remove store paths",
        description="Remove each PATH and whatever only these paths need. Refused if a PATH can be "
        "reached from a root, a view or a running session, or if a path that stays refers to it.",
    )
    command.add_argument(
        "paths", nargs="+", metavar="PATH", help="a store path, with or without /nix/store/"
    )
    _add_force(command)
    add_json_option(command)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_delete)


def _add_force(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on although directories of paths that are kept are damaged; what only they refer "
        "to is lost",
    )


def _run_gc(options: argparse.Namespace) -> None:
    from appliance.collector.collection import collect, collecting, plan
    from appliance.db.compaction import compact
    from appliance.store.store import Store

    path = local_store(options)
    if options.compact:
        with collecting(path):
            _print_compacted(options, *compact(path))
        return
    chosen = _collect_options(options)
    store = Store.open(path)
    try:
        with collecting(path):
            if options.print_roots:
                _print_roots(options, store, chosen.grace_s)
            elif options.print_live or options.print_dead or options.dry_run:
                _print_plan(options, plan(store, chosen))
            else:
                _print_swept(options, collect(store, chosen))
    finally:
        store.close()


def _collect_options(options: argparse.Namespace) -> "CollectOptions":
    from appliance.collector.collection import CollectOptions

    older_than, max_freed = options.delete_older_than, options.max_freed
    keep_free = options.keep_free
    return CollectOptions(
        grace_s=seconds("--grace", options.grace),
        older_than_s=0 if older_than is None else seconds("--delete-older-than", older_than),
        max_freed_bytes=None if max_freed is None else size_bytes("--max-freed", max_freed),
        keep_free_bytes=None if keep_free is None else size_bytes("--keep-free", keep_free),
        is_forced=options.force,
    )


def _run_delete(options: argparse.Namespace) -> None:
    from appliance.collector.collection import CollectOptions, collect, collecting
    from appliance.store.store import Store

    paths = whole_paths(options.paths)
    store_path = local_store(options)
    store = Store.open(store_path)
    try:
        with collecting(store_path):
            chosen = CollectOptions(grace_s=0, chosen=paths, is_forced=options.force)
            _print_swept(options, collect(store, chosen))
    finally:
        store.close()


# --- Output ---


def _print_roots(options: argparse.Namespace, store: "Store", grace_s: float) -> None:
    from appliance.collector.collection import roots_of

    found = roots_of(store, grace_s)
    if options.json:
        print_json(found)
        return
    for path, where in found.items():
        write_line(f"{path}\t{where}")


def _print_plan(options: argparse.Namespace, made: "CollectionPlan") -> None:
    if options.print_live or options.print_dead:
        chosen = made.graph.paths.keys() - set(made.dead) if options.print_live else made.dead
        names = made.names(chosen)
        if options.json:
            print_json(names)
            return
        for name in names:
            write_line(name)
        return
    num_blobs, num_directories = made.marks.num_dead(made.first_removed)
    if options.json:
        print_json(
            {
                "paths": len(made.dead),
                "directories": num_directories,
                "blobs": num_blobs,
                "freedBytes": made.freed_bytes,
            }
        )
        return
    write_line(
        f"{len(made.dead)} of {len(made.graph.paths)} store paths, {num_directories} directories "
        f"and {num_blobs} blobs would be removed: {readable(made.freed_bytes)}"
    )


def _print_swept(options: argparse.Namespace, swept: "Swept") -> None:
    if options.json:
        print_json(
            {
                "paths": swept.num_paths,
                "directories": swept.num_directories,
                "blobs": swept.num_blobs,
                "files": swept.num_files,
                "freedBytes": swept.freed_bytes,
            }
        )
        return
    write_line(
        f"{swept.num_paths} store paths, {swept.num_directories} directories and "
        f"{swept.num_blobs} blobs removed: {readable(swept.freed_bytes)}"
    )


def _print_compacted(options: argparse.Namespace, before: int, after: int) -> None:
    if options.json:
        print_json({"bytesBefore": before, "bytesAfter": after})
        return
    write_line(f"data.mdb: {readable(before)} before, {readable(after)} now")
    sys.stdout.flush()
