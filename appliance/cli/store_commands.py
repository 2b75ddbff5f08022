"""The commands that read or serve the services of a store: daemon, nar, ls and cat.

The others have modules of their own.
"""

import argparse
import os
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.copy_command import add_copy
from appliance.cli.import_nar_command import add_import_nar
from appliance.cli.key_options import (
    add_sign_option,
    add_signature_options,
    required_keys,
    secret_keys,
)
from appliance.cli.listen_options import add_socket_options, socket_access, tls_files
from appliance.cli.options import (
    add_json_option,
    add_log_options,
    add_service_options,
    service_addresses,
)
from appliance.cli.output import print_json, with_services, write, write_line
from appliance.cli.path_info_command import add_path_info
from appliance.cli.quantities import add_min_free_option, min_free_bytes
from appliance.cli.registration_command import add_registration
from appliance.cli.verify_command import add_verify
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from appliance.services.store_view import StoreView

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_DEFAULT_LISTEN: Final = "[::1]:8000"


# What `nar`, `ls` and `cat` take.
_PATH_HELP: Final = "a store path, or something in it, with or without /nix/store/"


def _add_daemon(commands: "Subparsers") -> None:
    command = commands.add_parser(
        "daemon",
        usage="%(prog)s [OPTION]...",
        help="serve the store over gRPC",
        description="Serve the store over gRPC, to be read and written, until a signal ends it.",
    )
    serving = command.add_argument_group("serving")
    serving.add_argument(
        "-l",
        "--listen-address",
        action="append",
        default=[],
        metavar="ADDR",
        help="listen on ADDR: HOST:PORT, the path of a Unix socket, @NAME for an abstract one, or "
        "sd-listen[:NAME] for those that systemd passes; may be given several times (default: "
        f"{_DEFAULT_LISTEN})",
    )
    add_socket_options(serving)
    _add_writing(command.add_argument_group("what clients may put"))
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_daemon)


def _add_writing(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--read-only", action="store_true", help="nothing: refuse everything that is put"
    )
    group.add_argument(
        "--check-content",
        action="store_true",
        help="before a store path becomes visible, read all of its contents and check them "
        "against its PathInfo",
    )
    group.add_argument(
        "--allow-replace",
        action="store_true",
        help="let clients replace the contents of a store path, which is refused otherwise",
    )
    add_min_free_option(group)
    add_signature_options(group)
    add_sign_option(
        group,
        "sign each store path that is put with the secret key in FILE; implies --check-content, "
        "as --require-signatures does",
    )


def _add_nar(commands: "Subparsers") -> None:
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


def _add_ls(commands: "Subparsers") -> None:
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


def _add_cat(commands: "Subparsers") -> None:
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


def _run_daemon(options: argparse.Namespace) -> None:
    from appliance.rpc.daemon import DaemonConfig, serve
    from appliance.rpc.listen import parse_listen_address

    trusted_keys = required_keys(options)
    _check_read_only(options)
    listen = [
        address
        for text in options.listen_address or [_DEFAULT_LISTEN]
        for address in parse_listen_address(text, os.environ)
    ]
    serve(
        DaemonConfig(
            service_addresses(options),
            listen,
            may_replace_paths=options.allow_replace,
            min_free_bytes=min_free_bytes(options),
            checks_content=options.check_content,
            access=socket_access(options),
            tls=tls_files(options),
            is_readonly=options.read_only,
            trusted_keys=trusted_keys,
            secret_keys=secret_keys(options),
        )
    )


def _check_read_only(options: argparse.Namespace) -> None:
    about_writing = {
        "--check-content": options.check_content,
        "--allow-replace": options.allow_replace,
        "--require-signatures": options.require_signatures,
        "--sign": options.sign,
    }
    for option, value in about_writing.items():
        if options.read_only and value:
            raise ConfigError(f"--read-only: cannot be combined with {option}")


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


# For each command, the function that adds its parser.
COMMANDS: "Final[dict[str, Callable[[Subparsers], None]]]" = {
    "copy": add_copy,
    "import-nar": add_import_nar,
    "daemon": _add_daemon,
    "nar": _add_nar,
    "path-info": add_path_info,
    "registration": add_registration,
    "verify": add_verify,
    "ls": _add_ls,
    "cat": _add_cat,
}
