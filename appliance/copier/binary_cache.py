"""Binary caches of Nix, in a directory or behind HTTP.

nix-cache-info    has the line `StoreDir: /nix/store`, among others
DIGEST.narinfo    describes a path, see `nix/narinfo.py`
nar/...           a NAR, possibly compressed; the narinfo has its URL, relative to the cache
"""

import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, Final, Protocol
from urllib.parse import urlsplit

from appliance.castore.names import display
from appliance.copier.claims import sorted_references
from appliance.copier.decompression import Decompressed
from appliance.errors import (
    ConfigError,
    ContentMissingError,
    PathInfoError,
    ServiceUnavailableError,
    StoreError,
)
from appliance.nix.nar import Event, read_nar
from appliance.nix.narinfo import NarInfoFile, parse_narinfo
from appliance.nix.store_path import STORE_DIR, StorePath, encode_base32
from appliance.system.tracing import begin_call

_TIMEOUT_S: Final = 30.0
_RETRY_AFTER_S: Final = (0.2, 1.0)
_TEXT_MAX: Final = 1 << 20
_NUM_READERS: Final = 8
# Statuses for a missing file; object stores answer 403 to users who may not list.
_MISSING: Final = frozenset({403, 404, 410})
_WORTH_ANOTHER_TRY: Final = frozenset({408, 429, 500, 502, 503, 504})
_SCHEMES: Final = ("http", "https")
_USER_AGENT: Final = "appliance"


class CacheFiles(Protocol):
    """The files of a cache."""

    def open(self, name: str) -> BinaryIO | None:
        """Open a file by its path in the cache, or return None if it is not there.

        Raises:
            StoreError: that cannot be found out.
        """


class LocalCacheFiles:
    """Files below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, name: str) -> BinaryIO | None:
        """See `CacheFiles.open`."""
        path = self._directory / name
        try:
            return path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StoreError(f"{path}: {exc.strerror}") from exc


class HttpCacheFiles:
    """Files below an address.

    Raises:
        ConfigError: the address is not one of HTTP.
    """

    def __init__(self, base: str) -> None:
        parts = urlsplit(base)
        if parts.scheme not in _SCHEMES or not parts.hostname:
            raise ConfigError(f"{base}: not the address of an HTTP server")
        self._base = base.rstrip("/")
        # Without a handler for file: URLs, as a redirect must not lead to local files.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._opener.add_handler(handler)
        self._pause = threading.Event()

    def open(self, name: str) -> BinaryIO | None:
        """See `CacheFiles.open`."""
        url = f"{self._base}/{name}"
        for pause_s in (*_RETRY_AFTER_S, None):
            try:
                return self._open(url)
            except ServiceUnavailableError:
                if pause_s is None:
                    raise
                self._pause.wait(pause_s)
        raise AssertionError("the last try neither returned nor raised")

    def _open(self, url: str) -> BinaryIO | None:
        recorded = begin_call("GET", urlsplit(url).hostname or "")
        headers = {"User-Agent": _USER_AGENT, **({} if recorded is None else recorded.headers)}
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the opener has no other schemes
        try:
            response: BinaryIO = self._opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as exc:
            exc.close()
            if exc.code in _MISSING:
                return None
            kind = ServiceUnavailableError if exc.code in _WORTH_ANOTHER_TRY else StoreError
            raise kind(f"{url}: {exc.code} {display(exc.reason.encode())}") from exc
        except urllib.error.URLError as exc:
            raise ServiceUnavailableError(f"{url}: {exc.reason}") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise ServiceUnavailableError(f"{url}: {type(exc).__name__}: {exc}") from exc
        finally:
            if recorded is not None:
                recorded.end()
        return response


class BinaryCache:
    """A cache as a source.

    Args:
        files: its files.
        text: its name in messages.

    Raises:
        StoreError: it is not a cache, or is for another store directory.
    """

    num_readers = _NUM_READERS
    needs_signatures = True

    def __init__(self, files: CacheFiles, text: str) -> None:
        self._files = files
        self._text = text
        info = self._read_text("nix-cache-info")
        if info is None:
            raise StoreError(f"{text}: not a binary cache: it has no nix-cache-info")
        for line in info.splitlines():
            name, _, value = line.partition(":")
            if name == "StoreDir" and value.strip() != STORE_DIR:
                raise StoreError(
                    f"{text}: its store directory is {value.strip()!r}, expected {STORE_DIR}"
                )

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """See `CopySource.claim`."""
        name = f"{encode_base32(path.digest)}.narinfo"
        text = self._read_text(name)
        if text is None:
            return None
        try:
            claim = parse_narinfo(text)
        except PathInfoError as exc:
            raise PathInfoError(f"{self._text}/{name}: {exc}") from exc
        if claim.path != path:
            raise PathInfoError(
                f"{self._text}/{name}: describes {claim.path.absolute()}, "
                f"expected {path.absolute()}"
            )
        _check_url(claim.url, self._text)
        return claim._replace(references=sorted_references(claim.references))

    def events(self, claim: NarInfoFile) -> Generator[Event, None, None]:
        """See `CopySource.events`."""
        raw = self._files.open(claim.url)
        if raw is None:
            raise ContentMissingError(f"{self._text}/{claim.url}: does not exist")
        with closing(raw):
            decompressed = Decompressed(raw, claim.compression)
            yield from read_nar(self._reading(claim.url, decompressed.read))

    def _reading(self, name: str, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
        def checked(size: int) -> bytes:
            try:
                return read(size)
            except (OSError, http.client.HTTPException) as exc:
                raise StoreError(f"{self._text}/{name}: {type(exc).__name__}: {exc}") from exc

        return checked

    def _read_text(self, name: str) -> str | None:
        file = self._files.open(name)
        if file is None:
            return None
        with closing(file):
            data = self._reading(name, file.read)(_TEXT_MAX + 1)
        if len(data) > _TEXT_MAX:
            raise StoreError(f"{self._text}/{name}: is larger than {_TEXT_MAX} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError as exc:
            raise PathInfoError(f"{self._text}/{name}: not UTF-8") from exc


def _check_url(url: str, cache: str) -> None:
    # It must not lead out of the cache's directory, or to another server.
    parts = url.split("/")
    is_plain = all("!" <= character <= "~" for character in url)
    if not {"", ".", ".."}.isdisjoint(parts) or ":" in parts[0] or not is_plain:
        raise PathInfoError(f"{cache}: the URL {url!r} of a NAR is not a path in the cache")
