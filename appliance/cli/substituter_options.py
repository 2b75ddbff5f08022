"""The options of `virtiofs` and `mount` for store paths that the store lacks."""

import argparse
from typing import TYPE_CHECKING

from appliance.cli.quantities import is_only_in_file
from appliance.cli.setting_options import add_settings
from appliance.config.resolution import ValueSource, label_of, source_of
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.resolve.substituting import Substitution
    from appliance.services.addresses import ServiceAddresses


def add_substituter_options(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = command.add_argument_group("substituters")
    add_settings(group, "substituter", "keep")


def substitution_of(
    options: argparse.Namespace, services: "ServiceAddresses"
) -> "Substitution | None":
    """Return what `options` ask for, or None if no substituter is given.

    Those of the configuration file are meant for a local store, and for no other.

    Raises:
        ConfigError: an address is not valid, or the store is not one of this machine.
    """
    if not options.substituter or is_only_in_file(options, "substituter"):
        if options.keep and source_of(options, "keep") is ValueSource.COMMAND_LINE:
            raise ConfigError("--keep: is for what comes from a --substituter")
        return None
    # Imported here because without substituters neither HTTP nor decompression is needed.
    from appliance.copier.substituters import parse_substituter
    from appliance.resolve.substituting import Substitution

    label = label_of(options, "substituter")
    if services.one_store() is None:
        raise ConfigError(f"{label}: needs a store of this machine (lmdb:) to copy into")
    found = []
    for uri in options.substituter:
        try:
            found.append(parse_substituter(uri))
        except ConfigError as exc:
            raise ConfigError(f"{label} {exc}") from exc
    return Substitution(tuple(found), keeps=options.keep)
