"""`appliance doctor`: what this host lacks or has set badly, and what mends it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.options import (
    add_json_option,
    add_log_options,
    add_service_options,
    service_addresses,
)
from appliance.cli.output import print_json, write_line
from appliance.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.doctor.findings import Finding, Use

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_SOCKETS: Final = "appliance*/virtiofs*.sock"


def add_doctor(commands: "Subparsers") -> None:
    """Add the command."""
    command = commands.add_parser(
        "doctor",
        usage="%(prog)s [OPTION]... [USE]...",
        help="check what this host lacks, and show what mends it",
        description="Check whether this host can be used for each USE, by trying what it needs: "
        "virtiofs, mount, daemon, import or tests (default: all but tests). Each finding comes "
        "with the command that mends it. The exit status is 1 if a USE does not work, and 0 if "
        "all do, with or without advice.",
    )
    command.add_argument(
        "uses", nargs="*", metavar="USE", help="virtiofs, mount, daemon, import or tests"
    )
    command.add_argument(
        "--all", action="store_true", help="also show the checks that found nothing wrong"
    )
    command.add_argument(
        "--socket-path",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="also check who may connect to the vhost-user socket at PATH (default: those below "
        "/run that the units make)",
    )
    add_json_option(command)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_doctor)


def _run_doctor(options: argparse.Namespace) -> None:
    from appliance.doctor.examination import examine, unusable

    uses = _uses(options.uses)
    sockets = options.socket_path or sorted(Path("/run").glob(_SOCKETS))
    findings = examine(uses, service_addresses(options).one_store(), sockets)
    failing = unusable(findings, uses)
    if options.json:
        report = {
            "uses": {use.value: use not in failing for use in uses},
            "findings": [finding.as_json() for finding in findings],
        }
        print_json(report, indent=2)
    else:
        _print(findings, is_all=options.all)
    if failing:
        raise StoreError(f"this host lacks what it needs for: {', '.join(failing)}")


def _uses(words: "Sequence[str]") -> "list[Use]":
    from appliance.doctor.findings import IN_PRODUCTION, Use

    if not words:
        return [use for use in Use if use in IN_PRODUCTION]
    known = [use.value for use in Use]
    for word in words:
        if word not in known:
            raise ConfigError(f"USE {word}: must be one of {', '.join(known)}")
    return [use for use in Use if use.value in words]


def _print(findings: "Sequence[Finding]", *, is_all: bool) -> None:
    from appliance.doctor.findings import Verdict

    num_good = sum(finding.verdict is Verdict.OK for finding in findings)
    for finding in findings:
        if finding.verdict is Verdict.OK and not is_all:
            continue
        write_line(f"{finding.verdict.value:<8} {finding.subject}: {finding.found}")
        if finding.remedy:
            write_line(f"         to mend it: {finding.remedy}")
    write_line(f"{num_good} of {len(findings)} checks found nothing to mend")
