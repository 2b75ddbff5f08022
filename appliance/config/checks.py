"""Rules for values that take other parts of the program to check; each is loaded when it is needed.

Each raises ConfigError with the rule that is broken.
"""

import os
import re
from typing import Final

from appliance.errors import ConfigError, PathInfoError

# Sockets that a service manager passes are there only when it has started the program.
_PASSED: Final = re.compile(r"sd[-_]listen", re.IGNORECASE)


def check_address(text: str) -> None:
    """Check the address of a service."""
    from appliance.services.addresses import parse_service_uri

    parse_service_uri(text)


def check_view(name: str) -> None:
    """Check the name of a view."""
    from appliance.store.views import check_view_name

    check_view_name(name)


def check_profile(name: str) -> None:
    """Check the name of a profile."""
    from appliance.store.profiles import check_profile_name

    check_profile_name(name)


def check_root(text: str) -> None:
    """Check a store path that is to be a root directory."""
    from appliance.services.paths_in_store import parse_path

    _path, names = parse_path(text)
    if names:
        raise ConfigError("is below a store path; expected a whole one")


def check_listen(text: str) -> None:
    """Check an address to listen on, unless it is passed by a service manager."""
    from appliance.rpc.listen import parse_listen_address

    if not _PASSED.match(text):
        parse_listen_address(text, os.environ)


def check_metrics(text: str) -> None:
    """Check an address to serve metrics on."""
    check_listen(f"127.0.0.1{text}" if text.startswith(":") else text)


def check_key(text: str) -> None:
    """Check public keys, separated by spaces."""
    from appliance.nix.signing import PublicKey

    try:
        for key in text.split():
            PublicKey.parse(key)
    except PathInfoError as exc:
        raise ConfigError(str(exc)) from exc


def check_tag(text: str) -> None:
    """Check the tag of a device."""
    from appliance.vhost.fs_device import encode_tag

    encode_tag(text)


def check_socket_name(text: str) -> None:
    """Check the name of a virtual machine."""
    from appliance.supervisor.attachments import check_attached_name

    check_attached_name(text)


def check_substituter(text: str) -> None:
    """Check the address of a substituter, with its keys."""
    from appliance.copier.substituters import parse_substituter

    parse_substituter(text)
