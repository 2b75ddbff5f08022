"""Commands on the store's services: daemon, nar, path-info, verify, ls, cat."""

import argparse
import os
import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli_addresses import service_addresses
from appliance.errors import ConfigError, PathInfoError, StoreError
from appliance.terminal import progress_line, writing_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from appliance.castore.signing_keys import SecretKey
    from appliance.protos import pathinfo_pb2
    from appliance.rpc.store_view import StoreView
    from appliance.store.services import Services
    from appliance.store.verify import Progress
    from appliance.terminal import ProgressLine

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_DEFAULT_LISTEN: Final = "[::1]:8000"
_PROGRESS_INTERVAL_S: Final = 0.1


def print_json(value: object, indent: int | None = None) -> None:
    """Print `value` to stdout."""
    import json

    _write(json.dumps(value, indent=indent).encode() + b"\n")


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


def _add_verify(commands: "Subparsers", parents: "Sequence[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "verify",
        parents=parents,
        help="read all that is in store paths, of all when none is given, and say what is not as "
        "it should be: contents, NARs, content addresses",
    )
    command.add_argument("paths", nargs="*", metavar="PATH")
    command.set_defaults(run=_run_verify)


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
    from appliance.rpc.listen_address import parse_listen_address

    listen = [
        address
        for text in options.listen_address or [_DEFAULT_LISTEN]
        for address in parse_listen_address(text, os.environ)
    ]
    serve(DaemonConfig(service_addresses(options), listen))


def _run_nar(options: argparse.Namespace) -> None:
    async def work(view: "StoreView") -> None:
        node = await view.find(options.path)
        async with aclosing(view.nar(node)) as pieces:
            async for piece in pieces:
                _write(piece)

    _with_view(options, work)


def _run_cat(options: argparse.Namespace) -> None:
    async def work(view: "StoreView") -> None:
        node = await view.find(options.path)
        async with aclosing(view.content(node, options.path)) as pieces:
            async for piece in pieces:
                _write(piece)

    _with_view(options, work)


def _run_ls(options: argparse.Namespace) -> None:
    from appliance.rpc.store_view import describe

    async def work(view: "StoreView") -> None:
        node = await view.find(options.path)
        if options.json:
            tree = await view.tree(node, is_recursive=options.recursive)
            print_json(tree)
            return
        async with aclosing(view.walk(node, is_recursive=options.recursive)) as entries:
            async for name, entry in entries:
                _write_line(describe(name, entry, is_long=options.long))

    _with_view(options, work)


def _run_path_info(options: argparse.Namespace) -> None:
    from appliance.rpc.store_view import path_info_json

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
                _write(_narinfo(info, key).encode())
            else:
                _write_line(f"{path}\t{info.narinfo.nar_size:>12}" if options.size else path)
        if missing:
            raise StoreError("\n".join(f"path {path} is not valid" for path in missing))

    _with_view(options, work)


def _run_verify(options: argparse.Namespace) -> None:
    import asyncio

    from appliance.rpc.store_view import parse_path
    from appliance.store.verify import Verifier, VerifyError

    paths = [parse_path(text)[0] for text in options.paths]
    problems: list[str] = []

    async def work(services: "Services") -> None:
        verifier = Verifier(services, report)
        showing = asyncio.create_task(_show_progress(line, verifier.progress))
        try:
            for path in paths:
                await verifier.verify(path)
            if not paths:
                await verifier.verify_all()
        finally:
            showing.cancel()
            line.clear()
        counts = {
            "paths": verifier.num_paths,
            "bytes": verifier.progress.num_bytes,
            "failures": verifier.num_failed,
        }
        summary = ", ".join(f"{name}: {count}" for name, count in counts.items())
        if options.json:
            print_json({**counts, "problems": problems})
        elif not verifier.num_failed:
            _write_line(summary)
        if verifier.num_failed:
            raise StoreError(summary)

    def report(error: VerifyError) -> None:
        if options.json:
            problems.append(str(error))
            return
        line.clear()
        print(f"appliance: {error}", file=sys.stderr)

    with progress_line() as line:
        _with_services(options, work)


async def _show_progress(line: "ProgressLine", progress: "Progress") -> None:
    import asyncio

    while True:
        line.update(num_files=progress.num_files, num_bytes=progress.num_bytes, path=progress.path)
        await asyncio.sleep(_PROGRESS_INTERVAL_S)


def _check_path_info_options(options: argparse.Namespace) -> None:
    if options.narinfo and (options.json or options.size or len(options.paths) != 1):
        raise ConfigError("--narinfo: takes one PATH, and neither --json nor --size")
    if options.sign and not options.narinfo:
        raise ConfigError("--sign: signs a --narinfo only")


def _narinfo(info: "pathinfo_pb2.PathInfo", key: "SecretKey | None") -> str:
    from appliance.castore.narinfo import narinfo_of

    narinfo = narinfo_of(info)
    if key is not None:
        narinfo = narinfo.with_signature(key.sign(narinfo.fingerprint()))
    return str(narinfo)


def _secret_key(path: Path) -> "SecretKey":
    from appliance.castore.signing_keys import SecretKey

    try:
        return SecretKey.parse(path.read_text(encoding="ascii").strip())
    except OSError as exc:
        raise ConfigError(f"--sign {path}: {exc.strerror}") from exc
    except (UnicodeDecodeError, PathInfoError) as exc:
        raise ConfigError(f"--sign {path}: {exc}") from exc


def _with_view(options: argparse.Namespace, work: "Callable[[StoreView], Awaitable[None]]") -> None:
    from appliance.rpc.store_view import StoreView

    _with_services(options, lambda services: work(StoreView(services)))


def _with_services(
    options: argparse.Namespace, work: "Callable[[Services], Awaitable[None]]"
) -> None:
    import asyncio  # takes longer to import than some commands to run

    from appliance.rpc.open_services import open_services

    async def run() -> None:
        async with open_services(service_addresses(options), is_readonly=True) as services:
            await work(services)

    asyncio.run(run())


def _write_line(text: str) -> None:
    # Names are bytes, of UTF-8 or not, whatever the locale has.
    _write(text.encode("utf-8", "surrogateescape") + b"\n")


def _write(data: bytes) -> None:
    with writing_output():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


# What adds each command to the command line, given the parsers of its common options.
COMMANDS: "Final[dict[str, Callable[[Subparsers, Sequence[argparse.ArgumentParser]], None]]]" = {
    "daemon": _add_daemon,
    "nar": _add_nar,
    "path-info": _add_path_info,
    "verify": _add_verify,
    "ls": _add_ls,
    "cat": _add_cat,
}
