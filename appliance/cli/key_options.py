"""Options that name keys: one that signs, and those whose signatures are trusted."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.setting_options import add_settings
from appliance.config.resolution import label_of
from appliance.errors import ConfigError, PathInfoError

if TYPE_CHECKING:
    from appliance.nix.signing import SecretKey
    from appliance.nix.trusted_keys import TrustedKeys


def add_signature_options(parser: argparse._ActionsContainer, section: str) -> None:
    """Add the options by which a server refuses paths that are not signed."""
    add_settings(parser, "require-signatures", "trusted-public-keys", section=section)


def add_trusted_keys_option(parser: argparse._ActionsContainer, meaning: str) -> None:
    """Add the option that lists trusted keys for one command; `meaning` says what they are for."""
    add_settings(parser, "trusted-public-keys", section="daemon", use=meaning, is_configured=False)


def add_sign_option(parser: argparse._ActionsContainer, meaning: str) -> None:
    """Add the option that names files of secret keys; `meaning` says what they sign."""
    add_settings(parser, "sign", section="daemon", use=meaning, is_configured=False)


def required_keys(options: argparse.Namespace) -> "TrustedKeys | None":
    """Return the keys one of which must have signed a path; None if none need be.

    Raises:
        ConfigError: a key is not valid, or --require-signatures is missing.
    """
    from appliance.nix.trusted_keys import parse_keys

    if options.require_signatures:
        return parse_keys(options.trusted_public_keys, label_of(options, "trusted_public_keys"))
    if options.trusted_public_keys:
        label = label_of(options, "trusted_public_keys")
        raise ConfigError(f"{label}: goes with --require-signatures only")
    return None


def secret_keys(options: argparse.Namespace) -> "list[SecretKey]":
    """Read the files that --sign names.

    Raises:
        ConfigError: one cannot be read, or does not contain a secret key.
    """
    label = label_of(options, "sign")
    return [_read_secret_key(label, path) for path in options.sign]


def _read_secret_key(label: str, path: Path) -> "SecretKey":
    from appliance.nix.signing import SecretKey

    try:
        return SecretKey.parse(path.read_text(encoding="ascii").strip())
    except OSError as exc:
        raise ConfigError(f"{label} {path}: {exc.strerror}") from exc
    except (UnicodeDecodeError, PathInfoError) as exc:
        raise ConfigError(f"{label} {path}: {exc}") from exc
