"""The objects of one object store: requests, their repetitions, and their errors.

The services (`object_blobs`, `object_directories`, `object_path_infos`) share this. An object is
small enough to be read and written as a whole, so each request is one that may be repeated, and
`retry` decides about that as for any other peer; the library repeats nothing by itself.

The library starts threads of its own when it is first used, so this module is imported only where
the address of an object store is opened, after all forks.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError as ObjectExistsError
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore, HTTPStore, LocalStore, MemoryStore, S3Store

from appliance.errors import (
    ConfigError,
    CorruptBlobError,
    ReadOnlyStoreError,
    ServiceUnavailableError,
    StoreError,
)
from appliance.services.addresses import ObjectScheme, ObjectStoreAddress
from appliance.services.object_errors import error_of_store, has_answered, is_no_bucket
from appliance.services.retry import BUDGET_S, Patience, persevere

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

_NO_RETRIES: Final[Any] = {"max_retries": 0}
# Names in one piece of a listing.
_LISTED_AT_A_TIME: Final = 256
# How long to wait for requests at the end, and for those that are cancelled then.
_CLOSING_S: Final = 1.0
_CANCELLING_S: Final = 0.1
_RAISED: Final = (BaseError, OSError, NotImplementedError)


class Version(NamedTuple):
    """What tells one state of an object from the next, as the store says it."""

    e_tag: str | None
    version: str | None


class Bucket:
    """The objects at one address; used on one event loop.

    A store that has never answered is not waited for, unless `is_patient` (see `grpc_client.Peer`).

    Args:
        address: where the objects are.
        is_patient: wait for a store that has never answered, too.
        is_readonly: do not create a directory that is missing.
        budget_s: how long one request may take.

    Raises:
        ConfigError: an option of the address is not known, or one is missing.
        StoreError: the directory cannot be opened.
    """

    def __init__(
        self,
        address: ObjectStoreAddress,
        *,
        is_patient: bool = False,
        is_readonly: bool = False,
        budget_s: float = BUDGET_S,
    ) -> None:
        self.name = address.label()
        self._is_readonly = address.is_readonly()
        self._store = _opened(address, is_readonly=is_readonly)
        self._may_repeat = is_patient
        self._budget_s = budget_s
        self._under_way: set[asyncio.Future[Any]] = set()

    async def close(self) -> None:
        """Wait a moment for the requests that nobody waits for any more, and give up the others.

        The library reports the end of each to the event loop, from a thread of its own.
        """
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=_CLOSING_S)
        if self._under_way:
            for future in self._under_way:
                future.cancel()
            await asyncio.sleep(_CANCELLING_S)

    async def get(self, key: str, bytes_max: int) -> bytes | None:
        """Return the content of an object, or None if there is none.

        Raises:
            CorruptBlobError: it has more than `bytes_max` bytes.
            StoreError: it cannot be read.
        """
        found = await self.get_versioned(key, bytes_max)
        return None if found is None else found[0]

    async def get_versioned(self, key: str, bytes_max: int) -> tuple[bytes, Version] | None:
        """Return the content of an object and its version; see `get`."""

        async def work() -> tuple[bytes, Version]:
            result = await self._answer(obstore.get_async(self._store, key))
            meta = result.meta
            if meta["size"] > bytes_max:
                raise CorruptBlobError(
                    f"{self.name}: {key}: has {meta['size']} bytes, expected at most {bytes_max}"
                )
            content = bytes(await self._answer(result.bytes_async()))
            return content, Version(meta.get("e_tag"), meta.get("version"))

        try:
            return await self._repeated(key, work)
        except FileNotFoundError:
            return None

    async def has(self, key: str) -> bool:
        """Return whether there is an object."""
        try:
            await self._repeated(key, lambda: self._answer(obstore.head_async(self._store, key)))
        except FileNotFoundError:
            return False
        return True

    async def put(self, key: str, content: bytes) -> None:
        """Put an object; it is visible as a whole or not at all.

        Raises:
            ReadOnlyStoreError: nothing can be put there.
            StoreError: it cannot be put.
        """
        await self._put(key, content, "overwrite")

    async def put_new(self, key: str, content: bytes) -> bool:
        """Put an object; return False if there is one already."""
        return await self._put(key, content, "create")

    async def replace(self, key: str, content: bytes, version: Version) -> bool:
        """Replace an object; return False if it is no longer the one with that version.

        A directory of this machine does not know versions; the last one who replaces an object
        there wins.
        """
        mode: Any = {name: value for name, value in version._asdict().items() if value is not None}
        return await self._put(key, content, mode if self._knows_versions() else "overwrite")

    async def list(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names of the objects below `prefix`, in no particular order."""
        stream = obstore.list(self._store, prefix, chunk_size=_LISTED_AT_A_TIME)
        try:
            while True:
                try:
                    async with asyncio.timeout(self._budget_s):
                        metas = await self._answer(anext(stream))
                except StopAsyncIteration:
                    return
                for meta in metas:
                    yield meta["path"]
        except TimeoutError as exc:
            raise self._timed_out(prefix, self._budget_s) from exc
        except _RAISED as exc:
            raise error_of_store(exc, self.name, f"listing {prefix}/") from exc

    def _knows_versions(self) -> bool:
        return not isinstance(self._store, LocalStore)

    async def _put(self, key: str, content: bytes, mode: Any) -> bool:
        if self._is_readonly:
            raise ReadOnlyStoreError(f"{self.name}: can only be read")

        async def work() -> bool:
            try:
                await self._answer(obstore.put_async(self._store, key, content, mode=mode))
            except (ObjectExistsError, PreconditionError):
                return False
            return True

        try:
            return await self._repeated(key, work)
        except FileNotFoundError as exc:
            raise StoreError(f"{self.name}: {key}: cannot be put: {_first_line(exc)}") from exc

    async def _answer(self, request: Awaitable[T]) -> T:
        future = asyncio.ensure_future(request)
        self._under_way.add(future)
        future.add_done_callback(self._end)
        return await asyncio.shield(future)

    def _end(self, future: asyncio.Future[Any]) -> None:
        self._under_way.discard(future)
        if not future.cancelled():
            future.exception()  # retrieved, as whoever sent the request may be gone

    async def _repeated(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        patience = Patience(self._budget_s, may_repeat=lambda: self._may_repeat)

        async def attempt() -> T:
            timeout_s = patience.left_s()
            try:
                async with asyncio.timeout(timeout_s):
                    result = await work()
            except TimeoutError as exc:
                raise self._timed_out(key, timeout_s) from exc
            except FileNotFoundError as exc:
                self._may_repeat = True
                if is_no_bucket(exc):
                    raise StoreError(f"{self.name}: there is no such bucket") from exc
                raise
            except _RAISED as exc:
                error = error_of_store(exc, self.name, key)
                is_away = isinstance(error, ServiceUnavailableError)
                self._may_repeat |= not is_away or has_answered(exc)
                raise error from exc
            self._may_repeat = True
            return result

        return await persevere(attempt, patience)

    def _timed_out(self, what: str, timeout_s: float) -> ServiceUnavailableError:
        error = ServiceUnavailableError(f"{self.name}: {what}: no answer within {timeout_s:.3g} s")
        error.is_final = True
        return error


def _opened(address: ObjectStoreAddress, *, is_readonly: bool) -> "ObjectStore":
    try:
        return _store_of(address, is_readonly=is_readonly)
    except OSError as exc:
        raise StoreError(f"{address.label()}: {_first_line(exc)}") from exc
    except (BaseError, ValueError, TypeError) as exc:
        if address.scheme is ObjectScheme.FILE:
            raise StoreError(f"{address.label()}: {_first_line(exc)}") from exc
        raise ConfigError(f"service address {address.label()}: {_first_line(exc)}") from exc


def _store_of(address: ObjectStoreAddress, *, is_readonly: bool) -> "ObjectStore":
    options: Any = dict(address.options)
    prefix = address.prefix or None
    match address.scheme:
        case ObjectScheme.FILE:
            return LocalStore(address.prefix, mkdir=not is_readonly)
        case ObjectScheme.MEMORY:
            return MemoryStore()
        case ObjectScheme.S3:
            _allow_given_endpoint(options)
            return S3Store(address.place, prefix=prefix, config=options, retry_config=_NO_RETRIES)
        case ObjectScheme.GS:
            return GCSStore(address.place, prefix=prefix, config=options, retry_config=_NO_RETRIES)
        case ObjectScheme.AZ:
            return AzureStore(
                address.place, prefix=prefix, config=options, retry_config=_NO_RETRIES
            )
    url = f"{address.scheme}://{address.place}/{address.prefix}"
    if address.scheme is ObjectScheme.HTTP:
        options["allow_http"] = True
    return HTTPStore(url, client_options=options, retry_config=_NO_RETRIES)


def _allow_given_endpoint(options: dict[str, str]) -> None:
    # Whoever writes http:// out does not want to be told that it is not allowed.
    endpoints = [value for name, value in options.items() if "endpoint" in name]
    if any(endpoint.startswith("http://") for endpoint in endpoints):
        options.setdefault("allow_http", "true")


def _first_line(exc: BaseException) -> str:
    return str(exc).partition("\n")[0]
