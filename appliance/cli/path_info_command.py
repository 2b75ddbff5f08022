"""`appliance path-info`: what is known about store paths, as Nix prints it."""

import argparse
from typing import TYPE_CHECKING, Any

from appliance.cli.key_options import add_sign_option, secret_keys
from appliance.cli.options import add_json_option, add_log_options, add_service_options
from appliance.cli.output import print_json, with_services, write, write_line
from appliance.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.nix.signing import SecretKey
    from appliance.nix.store_path import StorePath
    from appliance.protos import pathinfo_pb2
    from appliance.services.closures import PathInfos
    from appliance.services.contracts import Services

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name


def add_path_info(commands: "Subparsers") -> None:
    """Add the command."""
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
    command.add_argument("--all", action="store_true", help="list all store paths (the default)")
    command.add_argument(
        "-r",
        "--recursive",
        "--closure",
        action="store_true",
        help="also list all store paths that PATHs refer to",
    )
    command.add_argument(
        "-s",
        "--size",
        action="store_true",
        help="also print the size of the NAR in bytes (which --json always does)",
    )
    command.add_argument(
        "-S",
        "--closure-size",
        action="store_true",
        help="also print the total size in bytes of the NARs of the closure",
    )
    command.add_argument(
        "--sigs", action="store_true", help="also print the content address and the signatures"
    )
    add_json_option(command)
    command.add_argument(
        "--json-format",
        choices=["list", "1", "2"],
        default="1",
        help="the form of --json: list, as of Nix up to 2.18 and Lix; 1, a map by path; 2, a map "
        "by base name in `info`, as of Nix from 2.33 on (default: 1)",
    )
    command.add_argument(
        "--narinfo",
        action="store_true",
        help="print the narinfo file that a Nix binary cache would have for PATH",
    )
    add_sign_option(command, "sign the output of --narinfo with the secret key in FILE")
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_path_info)


def _run_path_info(options: argparse.Namespace) -> None:
    from appliance.services.closures import look_up
    from appliance.services.paths_in_store import parse_path

    _check_options(options)
    keys = secret_keys(options)
    paths = [parse_path(text)[0] for text in options.paths]

    async def work(services: "Services") -> None:
        if not paths:
            known = await _all_paths(services)
        else:
            known = await look_up(services.path_infos, paths, is_recursive=options.recursive)
        more = known.found
        if options.closure_size and paths and not options.recursive:
            more = (await look_up(services.path_infos, paths, is_recursive=True)).found
        _print(options, known, _closure_sizes(known, more) if options.closure_size else None, keys)

    with_services(options, work)


def _check_options(options: argparse.Namespace) -> None:
    if options.all and options.paths:
        raise ConfigError(f"{options.paths[0]}: --all takes no PATH")
    shows_more = options.json or options.size or options.closure_size or options.sigs
    if options.narinfo and (shows_more or options.recursive or len(options.paths) != 1):
        raise ConfigError("--narinfo: takes one PATH, and no other option of what to print")
    if options.sign and not options.narinfo:
        raise ConfigError("--sign: expected --narinfo, too")


async def _all_paths(services: "Services") -> "PathInfos":
    from appliance.nix.path_info import read_path_info
    from appliance.nix.store_path import StorePath
    from appliance.protos import pathinfo_pb2
    from appliance.services.closures import PathInfos

    found = {
        read_path_info(encoded).path: pathinfo_pb2.PathInfo.FromString(encoded)
        async for encoded in services.path_infos.list()
    }
    return PathInfos({path: found[path] for path in sorted(found, key=StorePath.basename)}, {})


def _closure_sizes(
    known: "PathInfos", infos: "dict[StorePath, pathinfo_pb2.PathInfo]"
) -> "dict[StorePath, int]":
    from appliance.services.closures import closure_size

    return {path: closure_size(path, infos) for path in known.found}


def _print(
    options: argparse.Namespace,
    known: "PathInfos",
    closure_sizes: "dict[StorePath, int] | None",
    keys: "Sequence[SecretKey]",
) -> None:
    from appliance.services.path_info_forms import path_infos_json

    if options.json:
        infos = {**known.found, **dict.fromkeys(known.missing)}
        print_json(path_infos_json(infos, closure_sizes, options.json_format))
        return
    longest = max((len(path.absolute()) for path in known.found), default=0)
    has_columns = options.size or closure_sizes is not None or options.sigs
    for path, info in known.found.items():
        if options.narinfo:
            write(_narinfo(info, keys).encode())
            continue
        columns = [path.absolute().ljust(longest if has_columns else 0)]
        if options.size:
            columns.append(f"{info.narinfo.nar_size:>11}")
        if closure_sizes is not None:
            columns.append(f"{closure_sizes[path]:>11}")
        if options.sigs:
            columns.append(" ".join(_signatures(info)))
        write_line("\t".join(columns))
    if known.missing:
        raise StoreError("\n".join(known.problems()))


def _signatures(info: "pathinfo_pb2.PathInfo") -> list[str]:
    from appliance.nix.content_address import ContentAddress
    from appliance.nix.signing import Signature

    address = ContentAddress.of_message(info.narinfo)
    signatures = [str(Signature(each.name, each.data)) for each in info.narinfo.signatures]
    return signatures if address is None else [f"ca:{address}", *signatures]


def _narinfo(info: "pathinfo_pb2.PathInfo", keys: "Sequence[SecretKey]") -> str:
    from appliance.nix.narinfo import narinfo_of

    narinfo = narinfo_of(info)
    for key in keys:
        narinfo = narinfo.with_signature(key.sign(narinfo.fingerprint()))
    return str(narinfo)
