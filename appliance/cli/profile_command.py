"""`appliance profile`: lists, shows, exports, imports and deletes profiles."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.options import (
    add_json_option,
    add_supervisor_options,
    service_addresses,
    state_dir,
)
from appliance.cli.output import print_json, write_line
from appliance.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from appliance.store.profiles import Profile, Profiles

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_STATE: Final = "keep profiles in DIR if the services are not all in one store"


def add_profile(commands: "Subparsers") -> None:
    """Add `appliance profile` with its commands."""
    command = commands.add_parser(
        "profile",
        usage="%(prog)s COMMAND [OPTION]... [ARGUMENT]...",
        help="keep what guests are known to read, to have it fetched ahead",
        description="Keep profiles. A profile is what a session read first, in that order "
        "(`--record-profile` of `virtiofs`, `attach` and `mount`). A session that has one "
        "(`--profile`) has all that fetched ahead when it begins.",
        epilog="Run `appliance profile COMMAND --help` for the options of a command.",
    )
    below = command.add_subparsers(
        title="commands", required=True, metavar="COMMAND", prog="appliance profile"
    )
    _add_list_and_show(below)
    _add_export_and_import(below)
    delete = below.add_parser(
        "delete",
        usage="%(prog)s [OPTION]... NAME...",
        help="delete profiles",
        description="Delete the profiles NAME, and what is left of recordings of them.",
    )
    delete.add_argument("names", nargs="+", metavar="NAME", help="the name of a profile")
    add_supervisor_options(delete, _STATE)
    delete.set_defaults(run=_run_delete)


def _add_list_and_show(below: "Subparsers") -> None:
    command = below.add_parser(
        "list",
        usage="%(prog)s [OPTION]...",
        help="print the names of all profiles",
        description="Print the names of all profiles, one a line.",
    )
    add_json_option(command)
    add_supervisor_options(command, _STATE)
    command.set_defaults(run=_run_list)
    command = below.add_parser(
        "show",
        usage="%(prog)s [OPTION]... NAME",
        help="print what a profile has, in numbers",
        description="Print how many store paths, directories and files the profile NAME has, how "
        "many bytes of content that is, and how long the sessions took to read it.",
    )
    command.add_argument("name", metavar="NAME", help="the name of the profile")
    add_json_option(command)
    add_supervisor_options(command, _STATE)
    command.set_defaults(run=_run_show)


def _add_export_and_import(below: "Subparsers") -> None:
    command = below.add_parser(
        "export",
        usage="%(prog)s [OPTION]... NAME",
        help="print a profile, for another host",
        description="Print the profile NAME on standard output; `appliance profile import` of "
        "another host reads it.",
    )
    command.add_argument("name", metavar="NAME", help="the name of the profile")
    add_supervisor_options(command, _STATE)
    command.set_defaults(run=_run_export)
    command = below.add_parser(
        "import",
        usage="%(prog)s [OPTION]... NAME FILE",
        help="make a profile of what another host has exported",
        description="Make what FILE has the profile NAME, in place of one of that name, once all "
        "of it was checked.",
    )
    command.add_argument("name", metavar="NAME", help="the name of the profile")
    command.add_argument("file", metavar="FILE", help="a file, or `-` for standard input")
    add_supervisor_options(command, _STATE)
    command.set_defaults(run=_run_import)


# --- Commands ---


def _run_list(options: argparse.Namespace) -> None:
    profiles = _profiles(options)
    if not options.json:
        for name in profiles.names():
            write_line(name)
        return
    print_json([_summary(name, profiles.read(name)) for name in profiles.names()], indent=2)


def _run_show(options: argparse.Namespace) -> None:
    summary = _summary(options.name, _profiles(options).read(options.name))
    if options.json:
        print_json(summary, indent=2)
        return
    for key, title in (
        ("paths", "store paths"),
        ("directories", "directories"),
        ("blobs", "files"),
        ("ranges", "ranges of files"),
        ("bytes", "bytes of content"),
        ("milliseconds", "milliseconds"),
    ):
        write_line(f"{title:<16} {summary[key]}")


def _run_export(options: argparse.Namespace) -> None:
    sys.stdout.write(_profiles(options).read(options.name).to_text())


def _run_import(options: argparse.Namespace) -> None:
    from appliance.store.profiles import parse_file

    profiles, file = _profiles(options), options.file
    profiles.path(options.name)
    try:
        profile = parse_file(Path("/dev/stdin" if file == "-" else file))
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from exc
    except StoreError as exc:
        raise StoreError(f"{file}: {exc}") from exc
    profiles.write(options.name, profile)


def _run_delete(options: argparse.Namespace) -> None:
    profiles = _profiles(options)
    for name in options.names:
        if profiles.seen(name) is None:  # all of them must be there, or none is deleted
            raise StoreError(f"profile {name}: there is none in {profiles.directory}")
    for name in options.names:
        profiles.delete(name)


def _profiles(options: argparse.Namespace) -> "Profiles":
    from appliance.store.profiles import Profiles

    services = service_addresses(options)
    return Profiles(services.views_beside(state_dir(options, services)))


def _summary(name: str, profile: "Profile") -> dict[str, object]:
    from appliance.store.profiles import ProfiledBlob, ProfiledDirectory, ProfiledPath

    reads = profile.reads
    blobs = [read for read in reads if isinstance(read, ProfiledBlob)]
    return {
        "name": name,
        "paths": sum(isinstance(read, ProfiledPath) for read in reads),
        "directories": sum(isinstance(read, ProfiledDirectory) for read in reads),
        "blobs": len({read.digest for read in blobs}),
        "ranges": len(blobs),
        "bytes": profile.num_bytes,
        "milliseconds": reads[-1].at_ms if reads else 0,
    }
