"""The commands that read or serve the services of a store: daemon, nar, path-info, ls and cat.

`verify` is one of them, too, and has a module of its own.
"""

import argparse
import os
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.copy_command import add_copy
from appliance.cli.import_nar_command import add_import_nar
from appliance.cli.listen_options import add_socket_options, socket_access, tls_files
from appliance.cli.options import (
    add_json_option,
    add_log_options,
    add_service_options,
    service_addresses,
)
from appliance.cli.output import print_json, with_services, write, write_line
from appliance.cli.registration_command import add_registration
from appliance.cli.verify_command import add_verify
from appliance.errors import ConfigError, PathInfoError, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from appliance.nix.signing import SecretKey
    from appliance.protos import pathinfo_pb2
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
    serving.add_argument(
        "--check-content",
        action="store_true",
        help="before a store path becomes visible, read all of its contents and check them "
        "against its PathInfo",
    )
    serving.add_argument(
        "--allow-replace",
        action="store_true",
        help="let clients replace the contents of a store path, which is refused otherwise",
    )
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_daemon)


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


def _add_path_info(commands: "Subparsers") -> None:
    command = commands.add_parser(
        "path-info",
        usage="%(prog)s [OPTION]... [PATH]...",
        help="list store paths and what is known about them",
        description="List each PATH that the store has, or all store paths if no PATH is given. "
        "With --json, also print what the store knows about each of them.",
    )
    command.add_argument(
        "paths", nargs="*", metavar="PATH", help="a store path, with or without /nix/store/"
    )
    command.add_argument(
        "-s",
        "--size",
        action="store_true",
        help="also print the size of the NAR in bytes (which --json always does)",
    )
    add_json_option(command)
    command.add_argument(
        "--narinfo",
        action="store_true",
        help="print the narinfo file that a Nix binary cache would have for PATH",
    )
    command.add_argument(
        "--sign",
        metavar="FILE",
        type=Path,
        help="sign the output of --narinfo with the secret key in FILE",
    )
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_path_info)


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
            checks_content=options.check_content,
            access=socket_access(options),
            tls=tls_files(options),
        )
    )


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


def _run_path_info(options: argparse.Namespace) -> None:
    from appliance.services.store_view import path_info_json

    _check_path_info_options(options)
    key = None if options.sign is None else _secret_key(options.sign)

    async def work(view: "StoreView") -> None:
        infos = await view.path_infos(options.paths)
        if options.json:
            print_json(
                {path: None if info is None else path_info_json(info) for path, info in infos}
            )
            return
        missing = [path for path, info in infos if info is None]
        for path, info in infos:
            if info is None:
                continue
            if options.narinfo:
                write(_narinfo(info, key).encode())
            else:
                write_line(f"{path}\t{info.narinfo.nar_size:>12}" if options.size else path)
        if missing:
            raise StoreError("\n".join(f"path {path} is not valid" for path in missing))

    _with_view(options, work)


def _check_path_info_options(options: argparse.Namespace) -> None:
    if options.narinfo and (options.json or options.size or len(options.paths) != 1):
        raise ConfigError("--narinfo: takes one PATH, and neither --json nor --size")
    if options.sign and not options.narinfo:
        raise ConfigError("--sign: expected --narinfo, too")


def _narinfo(info: "pathinfo_pb2.PathInfo", key: "SecretKey | None") -> str:
    from appliance.nix.narinfo import narinfo_of

    narinfo = narinfo_of(info)
    if key is not None:
        narinfo = narinfo.with_signature(key.sign(narinfo.fingerprint()))
    return str(narinfo)


def _secret_key(path: Path) -> "SecretKey":
    from appliance.nix.signing import SecretKey

    try:
        return SecretKey.parse(path.read_text(encoding="ascii").strip())
    except OSError as exc:
        raise ConfigError(f"--sign {path}: {exc.strerror}") from exc
    except (UnicodeDecodeError, PathInfoError) as exc:
        raise ConfigError(f"--sign {path}: {exc}") from exc


def _with_view(options: argparse.Namespace, work: "Callable[[StoreView], Awaitable[None]]") -> None:
    from appliance.services.store_view import StoreView

    with_services(options, lambda services: work(StoreView(services)))


# For each command, the function that adds its parser.
COMMANDS: "Final[dict[str, Callable[[Subparsers], None]]]" = {
    "copy": add_copy,
    "import-nar": add_import_nar,
    "daemon": _add_daemon,
    "nar": _add_nar,
    "path-info": _add_path_info,
    "registration": add_registration,
    "verify": add_verify,
    "ls": _add_ls,
    "cat": _add_cat,
}
