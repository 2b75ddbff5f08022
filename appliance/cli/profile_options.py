"""Which profiles a socket or mount has: the options `--profile` and `--record-profile`."""

import argparse
from typing import TYPE_CHECKING

from appliance.cli.setting_options import add_settings

if TYPE_CHECKING:
    from appliance.supervisor.profiling import Profiling


def add_profile_options(parser: argparse._ActionsContainer, *, is_configured: bool = True) -> None:
    """Add the options that name profiles."""
    add_settings(parser, "profile", "record-profile", is_configured=is_configured)


def profiling_of(options: argparse.Namespace) -> "Profiling":
    """Return which profiles `options` ask for."""
    from appliance.supervisor.profiling import Profiling

    return Profiling(options.profile, options.record_profile)
