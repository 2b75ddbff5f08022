"""Options that name keys: one that signs, and those whose signatures are trusted."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.errors import ConfigError, PathInfoError

if TYPE_CHECKING:
    from appliance.nix.signing import SecretKey
    from appliance.nix.trusted_keys import TrustedKeys


def add_signature_options(parser: argparse._ActionsContainer) -> None:
    """Add the options by which a server refuses paths that are not signed."""
    parser.add_argument(
        "--require-signatures",
        action="store_true",
        help="refuse store paths that are neither content-addressed nor signed by a key of "
        "--trusted-public-keys",
    )
    add_trusted_keys_option(parser, "public keys, NAME:BASE64, separated by spaces")


def add_trusted_keys_option(parser: argparse._ActionsContainer, meaning: str) -> None:
    """Add the option that lists trusted keys; `meaning` says what they are for."""
    parser.add_argument(
        "--trusted-public-keys",
        action="append",
        default=[],
        metavar="KEYS",
        help=f"{meaning}; may be given several times",
    )


def add_sign_option(parser: argparse._ActionsContainer, meaning: str) -> None:
    """Add the option that names files of secret keys; `meaning` says what they sign."""
    parser.add_argument(
        "--sign",
        action="append",
        default=[],
        metavar="FILE",
        type=Path,
        help=f"{meaning}; may be given several times",
    )


def required_keys(options: argparse.Namespace) -> "TrustedKeys | None":
    """Return the keys one of which must have signed a path; None if none need be.

    Raises:
        ConfigError: a key is not valid, or --require-signatures is missing.
    """
    from appliance.nix.trusted_keys import parse_keys

    if options.require_signatures:
        return parse_keys(options.trusted_public_keys, "--trusted-public-keys")
    if options.trusted_public_keys:
        raise ConfigError("--trusted-public-keys: goes with --require-signatures only")
    return None


def secret_keys(options: argparse.Namespace) -> "list[SecretKey]":
    """Read the files that --sign names.

    Raises:
        ConfigError: one cannot be read, or does not contain a secret key.
    """
    return [_read_secret_key(path) for path in options.sign]


def _read_secret_key(path: Path) -> "SecretKey":
    from appliance.nix.signing import SecretKey

    try:
        return SecretKey.parse(path.read_text(encoding="ascii").strip())
    except OSError as exc:
        raise ConfigError(f"--sign {path}: {exc.strerror}") from exc
    except (UnicodeDecodeError, PathInfoError) as exc:
        raise ConfigError(f"--sign {path}: {exc}") from exc
