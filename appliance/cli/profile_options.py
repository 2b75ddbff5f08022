"""Which profiles a socket or mount has: the options `--profile` and `--record-profile`."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.supervisor.profiling import Profiling


def add_profile_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that name profiles."""
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="have what the profile NAME names (see `appliance profile`) fetched ahead, in its "
        "order, from when a session begins (default: the profile that has the name of the view "
        "or of the store path, if there is one)",
    )
    parser.add_argument(
        "--record-profile",
        metavar="NAME",
        help="record what sessions read first, in that order, and make it the profile NAME when "
        "the last of them ends",
    )


def profiling_of(options: argparse.Namespace) -> "Profiling":
    """Return which profiles `options` ask for.

    Raises:
        ConfigError: no profile may have that name, or the two options are the same profile.
    """
    return profiling("", options.profile, options.record_profile)


def socket_profiling(given: Mapping[str, str], source: str, default: "Profiling") -> "Profiling":
    """Return which profiles a socket has, given what follows its path (see `split_place`).

    Args:
        given: the options behind the path, by name.
        source: begins the text of errors.
        default: what it has if they name no profile.

    Raises:
        ConfigError: see `profiling_of`.
    """
    if not {"profile", "record-profile"} & given.keys():
        return default
    return profiling(source, given.get("profile"), given.get("record-profile"))


def profiling(source: str, play: str | None, record: str | None) -> "Profiling":
    """Return which profiles are played and recorded; see `socket_profiling`."""
    from appliance.store.profiles import check_profile_name
    from appliance.supervisor.profiling import Profiling

    for option, name in (("--profile", play), ("--record-profile", record)):
        if name is not None:
            try:
                check_profile_name(name)
            except ConfigError as exc:
                raise ConfigError(f"{source}{option}: {exc}") from exc
    return Profiling(play, record)
