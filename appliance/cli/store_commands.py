"""The commands that show what is in a store path: nar, ls and cat."""

import argparse
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.options import (
    add_json_option,
    add_log_options,
    add_service_options,
    service_addresses,
)
from appliance.cli.output import print_json, with_services, write, write_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from appliance.services.store_view import StoreView

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

# What `nar`, `ls` and `cat` take.
_PATH_HELP: Final = "a store path, or something in it, with or without /nix/store/"


def add_nar(commands: "Subparsers") -> None:
    """Add `appliance nar`."""
    command = commands.add_parser(
        "nar",
        usage="%(prog)s [OPTION]... PATH",
        help="write a store path, or something in it, to standard output as a NAR",
        description="Write PATH to standard output as a Nix archive (NAR).",
    )
    command.add_argument("path", metavar="PATH", help=_PATH_HELP)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_nar)


def add_ls(commands: "Subparsers") -> None:
    """Add `appliance ls`."""
    command = commands.add_parser(
        "ls",
        usage="%(prog)s [OPTION]... PATH",
        help="list a store path, or something in it",
        description="List PATH, or what it contains if it is a directory.",
    )
    command.add_argument("path", metavar="PATH", help=_PATH_HELP)
    command.add_argument(
        "-l",
        "--long",
        action="store_true",
        help="also print modes and sizes in bytes (which --json always does)",
    )
    command.add_argument("-R", "--recursive", action="store_true", help="descend into directories")
    add_json_option(command)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_ls)


def add_cat(commands: "Subparsers") -> None:
    """Add `appliance cat`."""
    command = commands.add_parser(
        "cat",
        usage="%(prog)s [OPTION]... PATH",
        help="write a file of a store path to standard output",
        description="Write the contents of the file PATH to standard output.",
    )
    command.add_argument("path", metavar="PATH", help=_PATH_HELP)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_cat)


def _run_nar(options: argparse.Namespace) -> None:
    local_store = service_addresses(options).one_store()
    if local_store is not None:
        from appliance.cli.nar_output import write_local_nar

        write_local_nar(local_store, options.path)
        return

    async def work(view: "StoreView") -> None:
        node = await view.find(options.path)
        async with aclosing(view.nar(node)) as pieces:
            async for piece in pieces:
                write(piece)

    _with_view(options, work)


def _run_cat(options: argparse.Namespace) -> None:
    async def work(view: "StoreView") -> None:
        node = await view.find(options.path)
        async with aclosing(view.content(node, options.path)) as pieces:
            async for piece in pieces:
                write(piece)

    _with_view(options, work)


def _run_ls(options: argparse.Namespace) -> None:
    from appliance.services.store_view import describe

    async def work(view: "StoreView") -> None:
        node = await view.find(options.path)
        if options.json:
            tree = await view.tree(node, is_recursive=options.recursive)
            print_json(tree)
            return
        async with aclosing(view.walk(node, is_recursive=options.recursive)) as entries:
            async for name, entry in entries:
                write_line(describe(name, entry, is_long=options.long))

    _with_view(options, work)


def _with_view(options: argparse.Namespace, work: "Callable[[StoreView], Awaitable[None]]") -> None:
    from appliance.services.store_view import StoreView

    with_services(options, lambda services: work(StoreView(services)))
