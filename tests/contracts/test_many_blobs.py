"""Many small blobs at a time, whatever the service makes of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.errors import InvalidRequestError
from appliance.services.contracts import Services
from appliance.services.many_blobs import DIGESTS_MAX, many_of, missing_of, put_missing
from appliance.store.schema import INLINE_MAX
from tests.contracts.rig import Rig, fresh_bytes, read_blob
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.strict_server import StrictServer


def named(contents: Sequence[bytes]) -> list[tuple[Digest, bytes]]:
    return [(Digest.of(content), content) for content in contents]


def test_blobs_are_put_together_and_missing_ones_named(rig: Rig) -> None:
    contents = [fresh_bytes(size) for size in (0, 1, 5000, INLINE_MAX - 4)]
    digests = [digest for digest, _content in named(contents)]
    absent = Digest.of(fresh_bytes())

    async def work(services: Services) -> None:
        blobs = services.blobs
        assert await missing_of(blobs, [*digests, EMPTY_DIGEST, absent]) == [*digests, absent]
        await put_missing(blobs, named(contents[:2]))
        assert await missing_of(blobs, digests) == digests[2:]
        await put_missing(blobs, named(contents))
        await put_missing(blobs, [])
        assert await missing_of(blobs, digests) == []
        for digest, content in named(contents):
            assert await read_blob(blobs, digest) == content

    rig.run(work)


def test_more_blobs_than_fit_a_call_are_put(rig: Rig) -> None:
    contents = [fresh_bytes() for _ in range(100 if rig.is_slow else DIGESTS_MAX + 10)]
    digests = [digest for digest, _content in named(contents)]

    async def work(services: Services) -> None:
        await put_missing(services.blobs, named(contents))
        assert await missing_of(services.blobs, digests) == []

    rig.run(work)


def test_daemon_takes_no_large_blob_among_many(daemon: DaemonProcess) -> None:
    async def work(services: Services) -> None:
        many = await many_of(services.blobs)
        assert many is not None
        with pytest.raises(InvalidRequestError, match=f"has {INLINE_MAX + 1} bytes, at most"):
            await many.put_many([fresh_bytes(), bytes(INLINE_MAX + 1)])
        with pytest.raises(InvalidRequestError, match="blobs in one call"):
            await many.put_many([fresh_bytes() for _ in range(DIGESTS_MAX + 1)])

    Rig(daemon.unix_uri).run(work)


def test_daemon_before_a_peer_without_such_calls_has_none_either(
    snix_like: StrictServer, tmp_path: Path
) -> None:
    contents = [fresh_bytes() for _ in range(100)]

    async def work(services: Services) -> None:
        assert await many_of(services.blobs) is None
        await put_missing(services.blobs, named(contents))
        assert await missing_of(services.blobs, [Digest.of(one) for one in contents]) == []

    with DaemonProcess(snix_like.unix_uri, tmp_path) as daemon:
        Rig(daemon.unix_uri).run(work)
