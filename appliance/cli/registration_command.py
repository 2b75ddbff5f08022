"""`appliance registration`: makes a Nix in a guest know the paths that it sees."""

import argparse
from typing import TYPE_CHECKING, Any

from appliance.cli.options import add_log_options, add_service_options
from appliance.cli.output import with_services, write_line
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.services.contracts import Services

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name


def add_registration(commands: "Subparsers") -> None:
    """Add the command."""
    command = commands.add_parser(
        "registration",
        usage="%(prog)s [OPTION]... PATH...",
        help="print store paths as input for `nix-store --load-db`",
        description="Print what `nix-store --load-db` reads to register each PATH, in the form of "
        "the file `registration` of closureInfo in nixpkgs.",
    )
    command.add_argument("paths", nargs="+", metavar="PATH", help="a store path")
    command.add_argument(
        "-r", "--recursive", action="store_true", help="print the closures of the paths"
    )
    printed = command.add_mutually_exclusive_group()
    printed.add_argument(
        "--store-paths", action="store_true", help="print only the paths, one per line"
    )
    printed.add_argument(
        "--total-nar-size",
        action="store_true",
        help="print only the total size of the NARs, in bytes",
    )
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_registration)


def _run_registration(options: argparse.Namespace) -> None:
    from appliance.services.paths_in_store import parse_path
    from appliance.services.registration import registered

    paths = []
    for text in options.paths:
        path, names = parse_path(text)
        if names:
            raise ConfigError(
                f"{text}: is below a store path; only whole store paths can be registered"
            )
        paths.append(path)

    async def work(services: "Services") -> None:
        found = await registered(services, paths, is_recursive=options.recursive)
        if options.total_nar_size:
            write_line(str(sum(one.narinfo.nar_size for one in found)))
            return
        for one in found:
            for line in [one.path.absolute()] if options.store_paths else one.lines():
                write_line(line)

    with_services(options, work)
