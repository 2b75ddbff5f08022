"""`appliance view`: makes, changes and shows views, each a set of store paths under a name."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.options import (
    add_json_option,
    add_supervisor_options,
    service_addresses,
    state_dir,
)
from appliance.cli.output import print_json, with_services, write_line
from appliance.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from appliance.nix.store_path import StorePath
    from appliance.services.contracts import Services
    from appliance.store.views import View, Views

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_STATE: Final = "keep views in DIR if the services are not all in one store"


def add_view(commands: "Subparsers") -> None:
    """Add `appliance view` with its commands."""
    command = commands.add_parser(
        "view",
        usage="%(prog)s COMMAND [OPTION]... [ARGUMENT]...",
        help="make, change and show views: sets of store paths that a guest may see",
        description="Make, change and show views. A view is a set of store paths under a name. A "
        "guest or mount that is given a view (`--view NAME` of `virtiofs` and `mount`) sees its "
        "paths and no others, and follows its changes.",
        epilog="Run `appliance view COMMAND --help` for the options of a command.",
    )
    below = command.add_subparsers(
        title="commands", required=True, metavar="COMMAND", prog="appliance view"
    )
    _add_create_and_set(below)
    _add_add_and_rm(below)
    _add_show_list_and_delete(below)


# --- Options ---


def _add_create_and_set(below: "Subparsers") -> None:
    for name, verb, effect in (
        ("create", "make a new view", "Make a view called NAME."),
        ("set", "make a view, or replace what it has", "Make the view NAME, or replace its paths."),
    ):
        command = below.add_parser(
            name,
            usage="%(prog)s [OPTION]... NAME",
            help=verb,
            description=f"{effect} Without --closure and --store-paths, it is empty.",
        )
        command.add_argument("name", metavar="NAME", help="the name of the view")
        given = command.add_mutually_exclusive_group()
        given.add_argument(
            "--closure",
            nargs="+",
            metavar="PATH",
            help="put store paths and whatever they refer to into the view",
        )
        given.add_argument(
            "--store-paths",
            metavar="FILE",
            help="put the store paths that FILE lists, one a line, into the view; refused if a "
            "path refers to one that is not listed (`-` is standard input)",
        )
        command.add_argument(
            "--registration-files",
            action="store_true",
            help="have a file .registration, which `nix-store --load-db` reads, and a file "
            ".store-paths in the root of the view",
        )
        add_supervisor_options(command, _STATE)
        command.set_defaults(run=_run_create if name == "create" else _run_set)


def _add_add_and_rm(below: "Subparsers") -> None:
    command = below.add_parser(
        "add",
        usage="%(prog)s [OPTION]... NAME PATH...",
        help="add store paths, with whatever they refer to",
        description="Add store paths, with whatever they refer to, to the view NAME. Guests see "
        "them at their next lookup.",
    )
    _add_name_and_paths(command)
    command.set_defaults(run=_run_add)
    command = below.add_parser(
        "rm",
        usage="%(prog)s [OPTION]... NAME PATH...",
        help="remove store paths",
        description="Remove store paths from the view NAME; refused if a path that stays refers to "
        "one of them. Guests keep what they have cached, and get ESTALE for the rest.",
    )
    _add_name_and_paths(command)
    command.set_defaults(run=_run_rm)


def _add_show_list_and_delete(below: "Subparsers") -> None:
    command = below.add_parser(
        "show",
        usage="%(prog)s [OPTION]... NAME",
        help="print the store paths of a view",
        description="Print the store paths of the view NAME, one a line.",
    )
    command.add_argument("name", metavar="NAME", help="the name of the view")
    command.add_argument(
        "--registration",
        action="store_true",
        help="print what `nix-store --load-db` reads to register the paths",
    )
    add_supervisor_options(command, _STATE)
    command.set_defaults(run=_run_show)
    command = below.add_parser(
        "list",
        usage="%(prog)s [OPTION]...",
        help="print the names of all views",
        description="Print the names of all views, one a line.",
    )
    add_json_option(command)
    add_supervisor_options(command, _STATE)
    command.set_defaults(run=_run_list)
    command = below.add_parser(
        "delete",
        usage="%(prog)s [OPTION]... NAME...",
        help="delete views",
        description="Delete the views NAME. Their store paths stay in the store. Guests that have "
        "such a view see nothing until there is one of that name again.",
    )
    command.add_argument("names", nargs="+", metavar="NAME", help="the name of a view")
    add_supervisor_options(command, _STATE)
    command.set_defaults(run=_run_delete)


def _add_name_and_paths(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="the name of the view")
    command.add_argument("paths", nargs="+", metavar="PATH", help="a store path")
    add_supervisor_options(command, _STATE)


# --- Commands ---


def _run_create(options: argparse.Namespace) -> None:
    _write(options, is_new=True)


def _run_set(options: argparse.Namespace) -> None:
    _write(options, is_new=False)


def _write(options: argparse.Namespace, *, is_new: bool) -> None:
    from appliance.services.view_contents import closure_view, exact_view

    views, name, has_files = _views(options), options.name, options.registration_files
    views.path(name)
    if options.closure is not None:
        make, paths = closure_view, _parsed(options.closure)
    else:
        make, paths = exact_view, _parsed(_listed(options.store_paths))

    async def work(services: "Services") -> None:
        with views.locked():
            if is_new and name in views.names():
                raise StoreError(f"view {name}: exists; `appliance view set` replaces it")
            views.write(name, await make(services, paths, has_files=has_files))

    with_services(options, work, is_readonly=not has_files)


def _run_add(options: argparse.Namespace) -> None:
    from appliance.services.view_contents import closure_view

    paths = _parsed(options.paths)

    async def changed(services: "Services", old: "View") -> "View":
        wanted = old.paths.union(paths)
        return await closure_view(services, wanted, has_files=bool(old.files))

    _change(options, changed)


def _run_rm(options: argparse.Namespace) -> None:
    from appliance.services.view_contents import exact_view

    paths = _parsed(options.paths)

    async def changed(services: "Services", old: "View") -> "View":
        for path in paths:
            if path not in old.paths:
                raise StoreError(f"path {path.absolute()} is not in the view {options.name}")
        left = old.paths.difference(paths)
        return await exact_view(services, left, has_files=bool(old.files))

    _change(options, changed)


def _change(
    options: argparse.Namespace, changed: "Callable[[Services, View], Awaitable[View]]"
) -> None:
    """Replace the view `options.name` by what `changed` makes of it."""
    views, name = _views(options), options.name
    has_files = bool(views.read(name).files)

    async def work(services: "Services") -> None:
        with views.locked():
            views.write(name, await changed(services, views.read(name)))

    with_services(options, work, is_readonly=not has_files)


def _run_show(options: argparse.Namespace) -> None:
    paths = sorted(_views(options).read(options.name).paths, key=lambda path: path.basename())
    if not options.registration:
        for path in paths:
            write_line(path.absolute())
        return

    async def work(services: "Services") -> None:
        from appliance.services.registration import registered

        for one in await registered(services, paths, is_recursive=False):
            for line in one.lines():
                write_line(line)

    with_services(options, work)


def _run_list(options: argparse.Namespace) -> None:
    views = _views(options)
    if not options.json:
        for name in views.names():
            write_line(name)
        return
    shown = {name: views.read(name) for name in views.names()}
    print_json(
        [
            {
                "name": name,
                "paths": sorted(path.absolute() for path in view.paths),
                "registrationFiles": bool(view.files),
            }
            for name, view in shown.items()
        ],
        indent=2,
    )


def _run_delete(options: argparse.Namespace) -> None:
    views = _views(options)
    for name in options.names:
        views.read(name)  # all of them must be there, or none is deleted
    with views.locked():
        for name in options.names:
            views.delete(name)


def _views(options: argparse.Namespace) -> "Views":
    from appliance.store.views import Views

    services = service_addresses(options)
    return Views(services.views_beside(state_dir(options, services)))


def _parsed(texts: "Iterable[str]") -> "list[StorePath]":
    from appliance.services.paths_in_store import parse_path

    paths = []
    for text in texts:
        path, names = parse_path(text)
        if names:
            raise ConfigError(f"{text}: is below a store path; a view has whole store paths only")
        paths.append(path)
    return paths


def _listed(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as exc:
        raise ConfigError(f"--store-paths {file}: {exc.strerror}") from exc
    return [os.fsdecode(line) for line in data.splitlines() if line.strip()]
