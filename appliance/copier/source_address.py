"""Addresses of sources of store paths.

local, auto, daemon             the Nix store of this machine
local?root=DIR, /DIR            the Nix store below another root
local?real=DIR&state=DIR        a Nix store by the directory of its trees and that of db/db.sqlite
file:///DIR                     a binary cache in a directory
http://HOST/..., https://...    a binary cache
lmdb:, grpc+unix: and others    services, see `services/addresses.py`

Caches take the parameter trusted-public-keys=KEYS, as in Nix, or trusted_public_keys[]=KEY.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote

from appliance.copier.nix_store import NixStorePlace
from appliance.errors import ConfigError
from appliance.services.addresses import ServiceAddresses, parse_service_uri

_LOCAL: Final = frozenset({"local", "auto", "daemon", "local://"})
_CACHE_SCHEMES: Final = frozenset({"file", "http", "https"})
_KEY_OPTIONS: Final = frozenset({"trusted-public-keys", "trusted_public_keys[]"})
# Parameters of Nix that do not matter here.
_IGNORED_OPTIONS: Final = frozenset({"priority", "want-mass-query"})


class CacheAddress(NamedTuple):
    """A binary cache, and the public keys given in its address."""

    base: str
    keys: tuple[str, ...] = ()

    def directory(self) -> Path | None:
        """Return the directory of the cache, or None if it is behind HTTP."""
        scheme, _, rest = self.base.partition("://")
        return Path(unquote(rest)) if scheme == "file" else None


SourceAddress = NixStorePlace | CacheAddress | ServiceAddresses

THIS_MACHINE: Final = NixStorePlace.below(Path("/"))


def parse_source(text: str) -> SourceAddress:
    """Read an address.

    Raises:
        ConfigError: a rule is broken; the text names it.
    """
    base, _, query = text.partition("?")
    scheme = base.partition("://")[0]
    if base in _LOCAL:
        return _nix_store(text, query)
    if text.startswith("/"):
        return NixStorePlace.below(Path(text))
    if scheme in _CACHE_SCHEMES:
        return _cache(text, base, query)
    try:
        address = parse_service_uri(text)
    except ConfigError as exc:
        raise ConfigError(
            f"{exc}; or local, local?root=DIR, file:///DIR, http://HOST or https://HOST"
        ) from exc
    return ServiceAddresses(address, address, address)


def _nix_store(text: str, query: str) -> NixStorePlace:
    options = dict(_options(query))
    unknown = options.keys() - {"root", "real", "state"}
    if unknown:
        raise ConfigError(
            f"{text}: unknown parameter {min(unknown)!r}; known are root, real and state"
        )
    for name, value in options.items():
        if not value.startswith("/"):
            raise ConfigError(f"{text}: {name} is not an absolute path")
    place = NixStorePlace.below(Path(options.get("root", "/")))
    if "real" in options:
        place = place._replace(directory=Path(options["real"]))
    if "state" in options:
        place = place._replace(database=Path(options["state"]) / "db" / "db.sqlite")
    return place


def _cache(text: str, base: str, query: str) -> CacheAddress:
    keys: list[str] = []
    for name, value in _options(query):
        if name in _KEY_OPTIONS:
            keys += value.split()
        elif name not in _IGNORED_OPTIONS:
            raise ConfigError(f"{text}: unknown parameter {name!r}; known is trusted-public-keys")
    address = CacheAddress(base, tuple(keys))
    directory = address.directory()
    if directory is not None and not directory.is_absolute():
        raise ConfigError(f"{text}: the path must be absolute; write file:///DIR")
    return address


def _options(query: str) -> Iterator[tuple[str, str]]:
    # Base 64 in keys has plus signs, which must not become spaces.
    for option in query.split("&") if query else ():
        name, _, value = option.partition("=")
        yield unquote(name), unquote(value)
