"""What the root directory of a socket or mount is, and which profiles its sessions have."""

import argparse
from typing import TYPE_CHECKING

from appliance.cli.setting_options import add_settings
from appliance.config.resolution import ValueSource, source_of
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.resolve.exports import Exported
    from appliance.supervisor.profiling import Profiling


def add_exported_options(parser: argparse._ActionsContainer, *, is_configured: bool = True) -> None:
    """Add the options that say what the root directory is."""
    add_settings(parser, "view", "root", is_configured=is_configured)


def exported_of(options: argparse.Namespace) -> "Exported":
    """Return what `options` ask the root directory to be.

    A view or path that was asked for elsewhere takes the place of one in the configuration file.

    Raises:
        ConfigError: both are given in one place, or the path is no store path.
    """
    view, root = options.view, options.root
    if view is not None and root is not None:
        if source_of(options, "view") is ValueSource.FILE:
            view = None
        elif source_of(options, "root") is ValueSource.FILE:
            root = None
    return exported("", view, root)


def exported(source: str, view: str | None, root: str | None) -> "Exported":
    """Return what a view or a store path, or neither, asks the root directory to be.

    Args:
        source: begins the text of errors.
        view: the name of a view, or None.
        root: a store path, with or without its directory, or None.

    Raises:
        ConfigError: both are given, no view may have that name, or the path is no store path.
    """
    from appliance.resolve.exports import Exported
    from appliance.services.paths_in_store import parse_path
    from appliance.store.views import check_view_name

    if view is not None and root is not None:
        raise ConfigError(f"{source}--view {view} and --root {root}: only one of them can be given")
    if view is not None:
        return Exported(view=check_view_name(view))
    if root is None:
        return Exported()
    path, names = parse_path(root)
    if names:
        raise ConfigError(f"{source}--root {root}: is below a store path; expected a whole one")
    return Exported(root=path.basename())


def add_profile_options(parser: argparse._ActionsContainer, *, is_configured: bool = True) -> None:
    """Add the options that name profiles."""
    add_settings(parser, "profile", "record-profile", is_configured=is_configured)


def profiling_of(options: argparse.Namespace) -> "Profiling":
    """Return which profiles `options` ask for."""
    from appliance.supervisor.profiling import Profiling

    return Profiling(options.profile, options.record_profile)
