"""The options of `virtiofs` and `mount` for store paths that the store lacks."""

import argparse
from typing import TYPE_CHECKING

from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.resolve.substituting import Substitution
    from appliance.services.addresses import ServiceAddresses


def add_substituter_options(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = command.add_argument_group("substituters")
    group.add_argument(
        "--substituter",
        action="append",
        default=[],
        metavar="URI",
        help="copy a store path that is looked up and that the store lacks, with all that it "
        "refers to, from the store at URI, or from a binary cache of Nix: "
        "nix+https://HOST?trusted-public-keys=KEYS (also nix+http, nix+file). May be given "
        "several times: they are asked in that order",
    )
    group.add_argument(
        "--keep",
        action="store_true",
        help="keep what was copied from substituters; otherwise garbage collection may remove it "
        "once nobody uses it",
    )


def substitution_of(
    options: argparse.Namespace, services: "ServiceAddresses"
) -> "Substitution | None":
    """Return what `options` ask for, or None if no substituter is given.

    Raises:
        ConfigError: an address is not valid, or the store is not one of this machine.
    """
    if not options.substituter:
        if options.keep:
            raise ConfigError("--keep: is for what comes from a --substituter")
        return None
    # Imported here because without substituters neither HTTP nor decompression is needed.
    from appliance.copier.substituters import parse_substituter
    from appliance.resolve.substituting import Substitution

    if services.one_store() is None:
        raise ConfigError("--substituter: needs a store of this machine (lmdb:) to copy into")
    found = []
    for uri in options.substituter:
        try:
            found.append(parse_substituter(uri))
        except ConfigError as exc:
            raise ConfigError(f"--substituter {exc}") from exc
    return Substitution(tuple(found), keeps=options.keep)
