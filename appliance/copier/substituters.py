"""Substituters: binary caches of Nix, and other stores (see `resolve.substituting`).

nix+https://HOST/...?trusted-public-keys=KEYS   a binary cache; nix+http and nix+file as well
lmdb:, grpc+unix:, objectstore+... and others   services, see `services/addresses.py`
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Final, TypeVar
from urllib.parse import quote

from appliance.copier.binary_cache import BinaryCache, HttpCacheFiles, LocalCacheFiles
from appliance.copier.source_address import CacheAddress, parse_source
from appliance.errors import ConfigError
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.nix.trusted_keys import TrustedKeys, parse_keys
from appliance.resolve.substituting import Substituter
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import Services
from appliance.services.open_services import LoopThread, open_services

T = TypeVar("T")

_NIX: Final = "nix+"


def parse_substituter(uri: str) -> Substituter:
    """Return the substituter at an address; it is connected to at the first question.

    Raises:
        ConfigError: a rule is broken; the text names it.
    """
    if not uri.startswith(_NIX):
        address = parse_service_uri(uri)
        return StoreSubstituter(uri, ServiceAddresses(address, address, address))
    source = parse_source(uri.removeprefix(_NIX))
    if not isinstance(source, CacheAddress):
        raise ConfigError(f"{uri}: expected nix+https://HOST, nix+http://HOST or nix+file:///DIR")
    keys = parse_keys(source.keys, uri)
    if not keys.keys:
        raise ConfigError(f"{uri}: trusted-public-keys=KEYS is missing behind a question mark")
    return NixCacheSubstituter(source, keys)


class NixCacheSubstituter:
    """A binary cache of Nix; what it says is believed if a trusted key has signed it."""

    def __init__(self, address: CacheAddress, keys: TrustedKeys) -> None:
        self.label = address.base
        self._address = address
        self._keys = keys
        self._cache: BinaryCache | None = None

    async def has(self, path: StorePath) -> bool:
        """See `Substituter.has`."""
        return await _in_thread(lambda: self._has(path))

    def copy_words(self, store: str, path: StorePath) -> Sequence[str]:
        """See `Substituter.copy_words`."""
        keys = quote(" ".join(self._address.keys), safe=":/=+")
        source = f"{self._address.base}?trusted-public-keys={keys}"
        return ["copy", "--quiet", "--store", store, "--from", source, "-r", path.absolute()]

    async def close(self) -> None:
        """Do nothing: a thread that waits for the cache ends with the process."""

    def _has(self, path: StorePath) -> bool:
        if self._cache is None:
            directory = self._address.directory()
            base = self._address.base
            files = HttpCacheFiles(base) if directory is None else LocalCacheFiles(directory)
            self._cache = BinaryCache(files, base)
        claim = self._cache.claim(path)
        if claim is None:
            return False
        self._keys.check(claim)
        return True


class StoreSubstituter:
    """Other services, which are believed as those of --store are; contents are verified."""

    def __init__(self, uri: str, addresses: ServiceAddresses) -> None:
        self.label = addresses.path_infos.label()
        self._uri = uri
        self._addresses = addresses
        self._opening = asyncio.Lock()
        self._thread: LoopThread | None = None
        self._services: Services | None = None
        self._opened = AsyncExitStack()

    async def has(self, path: StorePath) -> bool:
        """See `Substituter.has`."""
        async with self._opening:
            if self._thread is None:
                self._thread = LoopThread("substituter")
            if self._services is None:
                opening = open_services(self._addresses, is_readonly=True)
                self._services = await self._thread.run(self._opened.enter_async_context(opening))
        encoded = await self._thread.run(_get(self._services, path))
        return encoded is not None and read_path_info(encoded).path == path

    def copy_words(self, store: str, path: StorePath) -> Sequence[str]:
        """See `Substituter.copy_words`."""
        return ["copy", "--quiet", "--store", self._uri, "--to", store, path.absolute()]

    async def close(self) -> None:
        """See `Substituter.close`."""
        if self._thread is not None:
            await self._thread.run(self._opened.aclose())
            self._thread.close()


async def _get(services: Services, path: StorePath) -> bytes | None:
    return await services.path_infos.get(path.digest)


async def _in_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns; unlike those of an executor, its thread delays no exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def end(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type] # no error, so it is a result

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as exc:  # noqa: BLE001 - whatever it was, the caller must get it
            error = exc
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end, result, error)

    threading.Thread(target=run, name="substituter", daemon=True).start()
    return await future
