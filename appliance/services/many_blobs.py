"""Small blobs in numbers, where a call for each would cost more than its content.

A service that takes many blobs in one call has a method `many` that returns a `ManyBlobs`. For any
other, the functions here make a call for each blob, many at a time.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final, Protocol, runtime_checkable

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.errors import StoreError, WrongDigestError
from appliance.services.contracts import BlobService, BlobWriter, Buffer
from appliance.services.retry import Patience, persevere

# Digests in one question, and blobs in one answer or in one call that puts.
DIGESTS_MAX: Final = 2048
# Calls for single blobs under way at a time: their latency dominates.
_SINGLE_MAX: Final = 64
# After this many answers in a row that a blob is not there, only one in `_ASK_ONE_IN` is asked for,
# and the others are sent without asking: the question costs about as much as a small blob.
_MISSING_IN_A_ROW: Final = 32
_ASK_ONE_IN: Final = 16


class ManyBlobs(Protocol):
    """The small blobs of a service, many in one call."""

    async def has_many(self, digests: Sequence[Digest]) -> Sequence[bool]:
        """Return whether each blob exists, for at most `DIGESTS_MAX` of them."""

    async def put_many(self, contents: Sequence[Buffer]) -> None:
        """Make blobs durable and visible together.

        Args:
            contents: at most `DIGESTS_MAX`, of at most `schema.INLINE_MAX` bytes each.

        Raises:
            StoreError: some may have been put, and others not.
        """


@runtime_checkable
class OffersMany(Protocol):
    """A blob service that may take many blobs in one call."""

    async def many(self) -> ManyBlobs | None:
        """Return its blobs as `ManyBlobs`, or None if its peer does not know such calls."""


@runtime_checkable
class WritesExpected(Protocol):
    """A blob service whose writers verify what they are given."""

    async def open_write_of(self, digest: Digest) -> BlobWriter:
        """Begin to write the blob `digest`.

        The writer's `close` raises WrongDigestError, and nothing becomes visible, if what it was
        given is something else.
        """


@runtime_checkable
class CountsPresent(Protocol):
    """A writer that does not send what of its blob is there already.

    Attributes:
        num_bytes_present: how much that was, so far.
    """

    num_bytes_present: int


class VerifyingWriter:
    """A writer that compares what it is given with a digest, for services that do not.

    Args:
        writer: writes it; is aborted if it is something else.
        digest: of the blob.
    """

    def __init__(self, writer: BlobWriter, digest: Digest) -> None:
        self._writer = writer
        self._digest = digest
        self._hasher = blake3()

    async def write(self, data: Buffer) -> None:
        """See `BlobWriter.write`."""
        self._hasher.update(data)
        await self._writer.write(data)

    async def close(self) -> Digest:
        """See `BlobWriter.close`.

        Raises:
            WrongDigestError: it is not the blob that is expected.
        """
        actual = Digest(self._hasher.digest())
        if actual != self._digest:
            await self.abort()
            raise WrongDigestError("blob", self._digest, actual)
        return await self._writer.close()

    async def abort(self) -> None:
        """See `BlobWriter.abort`."""
        await self._writer.abort()


async def many_of(blobs: BlobService) -> ManyBlobs | None:
    """Return the blobs of a service as `ManyBlobs`, or None if it takes only one at a time."""
    return await blobs.many() if isinstance(blobs, OffersMany) else None


async def put_missing(blobs: BlobService, contents: Sequence[tuple[Digest, Buffer]]) -> None:
    """Put small blobs that the service does not have yet, one by one if it takes no more.

    Raises:
        StoreError: some may have been put, and others not.
    """
    many = await many_of(blobs)
    if many is None:
        await _put_each(blobs, contents)
        return
    by_digest = dict(contents)
    missing = await missing_of(blobs, list(by_digest))
    for start in range(0, len(missing), DIGESTS_MAX):
        part = missing[start : start + DIGESTS_MAX]
        await many.put_many([by_digest[digest] for digest in part])


async def missing_of(blobs: BlobService, digests: Sequence[Digest]) -> list[Digest]:
    """Return those of `digests` that the service does not have."""
    many = await many_of(blobs)
    if many is None:
        return _left_out(digests, await _has_each(blobs, digests))
    missing: list[Digest] = []
    for start in range(0, len(digests), DIGESTS_MAX):
        part = digests[start : start + DIGESTS_MAX]
        missing += _left_out(part, await many.has_many(part))
    return missing


def _left_out(digests: Sequence[Digest], are_there: Sequence[bool]) -> list[Digest]:
    return [digest for digest, is_there in zip(digests, are_there, strict=True) if not is_there]


async def put_one(blobs: BlobService, digest: Digest, pieces: Iterable[Buffer]) -> None:
    """Put a blob.

    Raises:
        StoreError: it cannot be put, or its content does not have that digest.
    """
    writer = await blobs.open_write()
    try:
        for piece in pieces:
            await writer.write(piece)
    except BaseException:
        await writer.abort()
        raise
    kept = await writer.close()
    if kept != digest:
        raise StoreError(f"blob {digest}: was read again, and had digest {kept}")


async def _has_each(blobs: BlobService, digests: Sequence[Digest]) -> list[bool]:
    places = asyncio.Semaphore(_SINGLE_MAX)

    async def has(digest: Digest) -> bool:
        async with places:
            return await blobs.has(digest)

    return list(await asyncio.gather(*(has(digest) for digest in digests)))


async def _put_each(blobs: BlobService, contents: Sequence[tuple[Digest, Buffer]]) -> None:
    places = asyncio.Semaphore(_SINGLE_MAX)
    checks = PresenceChecks()

    async def put(digest: Digest, content: Buffer) -> None:
        async with places:
            if checks.are_worthwhile():
                is_there = await blobs.has(digest)
                checks.learn(is_there=is_there)
                if is_there:
                    return
            await persevere(
                lambda: put_one(blobs, digest, [content]), Patience(starts_at_failure=True)
            )

    try:
        async with asyncio.TaskGroup() as group:
            for digest, content in contents:
                group.create_task(put(digest, content))
    except ExceptionGroup as exc:
        raise exc.exceptions[0] from None


class PresenceChecks:
    """Decides whether to ask if an object is there, or to send it unasked."""

    def __init__(self) -> None:
        self._num_missing = 0
        self._num_unasked = 0

    def are_worthwhile(self) -> bool:
        """Return whether to ask for the next blob, judging by the answers so far."""
        if self._num_missing < _MISSING_IN_A_ROW:
            return True
        self._num_unasked = (self._num_unasked + 1) % _ASK_ONE_IN
        return self._num_unasked == 0

    def learn(self, *, is_there: bool) -> None:
        """Record an answer."""
        self._num_missing = 0 if is_there else self._num_missing + 1
