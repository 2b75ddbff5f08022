"""Commands on the store's services: daemon, nar, path-info, ls, cat; `cli_verify` has verify."""

import argparse
import os
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.options import service_addresses
from appliance.cli.output import print_json, with_services, write, write_line
from appliance.cli.verify_command import add_verify
from appliance.errors import ConfigError, PathInfoError, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from appliance.nix.signing import SecretKey
    from appliance.protos import pathinfo_pb2
    from appliance.services.store_view import StoreView

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_DEFAULT_LISTEN: Final = "[::1]:8000"


def _add_daemon(commands: "Subparsers", parents: "Sequence[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("daemon", parents=parents, help="serve the store over gRPC")
    command.add_argument(
        "-l",
        "--listen-address",
        action="append",
        default=[],
        metavar="ADDR",
        help="host:port, a socket path, @abstract, or sd-listen[:NAME]; may be repeated "
        f"(default: {_DEFAULT_LISTEN})",
    )
    command.add_argument(
        "--check-content",
        action="store_true",
        help="before a path becomes visible, read all that is in it and check what is said of it",
    )
    command.add_argument(
        "--allow-replace",
        action="store_true",
        help="let a path be given other content, which is refused otherwise",
    )
    command.set_defaults(run=_run_daemon)


def _add_nar(commands: "Subparsers", parents: "Sequence[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "nar", parents=parents, help="write a store path, or something in it, to stdout as a NAR"
    )
    command.add_argument("path", metavar="PATH")
    command.set_defaults(run=_run_nar)


def _add_path_info(commands: "Subparsers", parents: "Sequence[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "path-info",
        parents=parents,
        help="show what the store knows of store paths; all of them when none is given",
    )
    command.add_argument("paths", nargs="*", metavar="PATH")
    command.add_argument("-s", "--size", action="store_true", help="print the size of the NAR too")
    command.add_argument(
        "--narinfo",
        action="store_true",
        help="print what a binary cache of Nix says of PATH in DIGEST.narinfo",
    )
    command.add_argument(
        "--sign",
        metavar="FILE",
        type=Path,
        help="add a signature to the --narinfo, with the secret key in FILE",
    )
    command.set_defaults(run=_run_path_info)


def _add_ls(commands: "Subparsers", parents: "Sequence[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "ls", parents=parents, help="list a store path, or something in it"
    )
    command.add_argument("path", metavar="PATH")
    command.add_argument("-l", "--long", action="store_true", help="show modes and sizes too")
    command.add_argument("-R", "--recursive", action="store_true", help="descend into directories")
    command.set_defaults(run=_run_ls)


def _add_cat(commands: "Subparsers", parents: "Sequence[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("cat", parents=parents, help="write a file in a store path")
    command.add_argument("path", metavar="PATH")
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
        raise ConfigError("--sign: signs a --narinfo only")


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


# What adds each command to the command line, given the parsers of its common options.
COMMANDS: "Final[dict[str, Callable[[Subparsers, Sequence[argparse.ArgumentParser]], None]]]" = {
    "daemon": _add_daemon,
    "nar": _add_nar,
    "path-info": _add_path_info,
    "verify": add_verify,
    "ls": _add_ls,
    "cat": _add_cat,
}
