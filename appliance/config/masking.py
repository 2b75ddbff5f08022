"""Addresses as they may be shown: without what opens doors.

Who connects (the part before an @) and parameters may hold passwords and keys. Credentials of
object stores belong into the environment, but an address can have them.
"""

from typing import Final

_GONE: Final = "***"
# Parameters that say how to connect, or what is trusted, and hold no secret.
HARMLESS_PARAMETERS: Final = frozenset(
    {
        *("wait-connect", "tls-ca-cert-path", "tls-client-cert-path", "tls-client-key-path"),
        *("trusted-public-keys", "view", "root", "narsize"),
    }
)


def masked(text: str) -> str:
    """Return a text without secrets, if it is an address; else as it is."""
    base, mark, query = text.partition("?")
    scheme, colon, rest = base.partition("://")
    if colon:
        place, slash, path = rest.partition("/")
        _user, at, host = place.rpartition("@")
        # Whoever forgets to encode a slash has the end of the secret in the path.
        if not at and "@" in path:
            place, slash, path = _GONE, "@", path.rpartition("@")[2]
        elif at:
            place = f"{_GONE}@{host}"
        base = f"{scheme}://{place}{slash}{path}"
    return base + mark + "&".join(map(_parameter, query.split("&"))) if mark else base


def masked_in(value: object) -> object:
    """Return a value as a file has it, with all texts in it masked."""
    match value:
        case str():
            return masked(value)
        case list():
            return [masked_in(each) for each in value]
        case dict():
            return {name: masked_in(each) for name, each in value.items()}
        case _:
            return value


def _parameter(text: str) -> str:
    name, equals, _value = text.partition("=")
    if name in HARMLESS_PARAMETERS or not text:
        return text
    return f"{name}={_GONE}" if equals else _GONE
