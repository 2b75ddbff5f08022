"""Playing profiles: in which order, with what beside them, and what is passed over."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from errno import ENOENT
from typing import Any

import pytest

from appliance.castore.digest import Digest
from appliance.errors import ContentMissingError, ServiceUnavailableError
from appliance.resolve.playback import Playbacks
from appliance.store.profiles import Profile, ProfiledBlob, ProfiledDirectory, ProfiledPath, Read

NAME = "5ndavkqr4ai2xn3pkdl1blgmnqmn4wlq-hello-2.12"
OTHER = "r8mm1bsjgvs2r4kf9yh5mp3dmv8hq7xn-glibc-2.40"
CACHE_BYTES = 1 << 20


def blob(number: int, size: int = 1000) -> ProfiledBlob:
    return ProfiledBlob(number, Digest.of(b"%d" % number), size, 0, size)


def directory(number: int) -> ProfiledDirectory:
    return ProfiledDirectory(number, Digest.of(b"directory %d" % number))


class RecordedLoader:
    """A loader that notes what it is asked for; what is in `held` comes when it is released."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.there: set[object] = set()
        self.errors: dict[object, Exception] = {}
        self.held: dict[object, asyncio.Event] = {}

    async def load_path(self, name: bytes) -> bool:
        return await self._load(name.decode())

    async def load_directory(self, digest: Digest) -> bool:
        return await self._load(digest)

    def has_range(self, read: ProfiledBlob) -> bool:
        return read.digest in self.there

    async def load_range(self, read: ProfiledBlob) -> None:
        await self._load(read.digest)

    async def _load(self, key: object) -> bool:
        if key in self.there:
            return False
        self.asked.append(key)
        if key in self.held:
            await self.held[key].wait()
        if key in self.errors:
            raise self.errors[key]
        self.there.add(key)
        return True


def run(
    work: Callable[[Playbacks, RecordedLoader], Coroutine[Any, Any, None]],
    cache_bytes: int = CACHE_BYTES,
) -> None:
    async def main() -> None:
        loader = RecordedLoader()
        playbacks = Playbacks(loader, cache_bytes)
        async with asyncio.timeout(30):
            await work(playbacks, loader)
            await playbacks.close()

    asyncio.run(main())


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(100_000):
        if is_so():
            return
        await asyncio.sleep(0.0001)
    raise AssertionError


async def played(playbacks: Playbacks, *reads: Read) -> dict[str, object]:
    await playbacks.begin("boot", Profile(reads))
    await until(lambda: not playbacks.report()[-1]["is_playing"])
    return playbacks.report()[-1]


def keys(*reads: ProfiledBlob | ProfiledDirectory) -> list[object]:
    return [read.digest for read in reads]


def test_blobs_are_asked_for_in_the_order_of_the_profile() -> None:
    blobs = [blob(number) for number in range(50)]

    async def work(playbacks: Playbacks, loader: RecordedLoader) -> None:
        loader.there.update(keys(blobs[3], blobs[7]))
        report = await played(playbacks, *blobs)
        assert loader.asked == [read.digest for read in blobs if read not in {blobs[3], blobs[7]}]
        assert report["fetched"] == 48
        assert report["there"] == 2
        assert report["fetched_bytes"] == 48 * 1000

    run(work)


def test_what_is_missing_or_fails_is_passed_over_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def work(playbacks: Playbacks, loader: RecordedLoader) -> None:
        loader.errors = {
            blob(0).digest: ContentMissingError("the service does not have it"),
            NAME: OSError(ENOENT, "is not there"),
            directory(5).digest: ServiceUnavailableError("away"),
        }
        report = await played(playbacks, ProfiledPath(0, NAME), blob(0), directory(5), blob(1))
        counts = {name: report[name] for name in ("fetched", "missing", "failed", "there")}
        assert counts == {"fetched": 1, "missing": 2, "failed": 1, "there": 0}

    run(work)
    assert [line for line in caplog.messages if "boot" in line] == [
        "profile boot was played: 1 fetched, 2 missing, 1 failed; 1000 bytes of content fetched"
    ]


def test_a_directory_is_asked_for_once_the_closures_before_it_have_come() -> None:
    async def work(playbacks: Playbacks, loader: RecordedLoader) -> None:
        loader.held[NAME] = asyncio.Event()
        reads = ProfiledPath(0, NAME), ProfiledPath(1, OTHER), directory(2), blob(3)
        await playbacks.begin("boot", Profile(reads))
        # Blobs do not wait for them.
        await until(lambda: blob(3).digest in loader.there)
        assert loader.asked == [NAME, OTHER, blob(3).digest]
        loader.there.add(directory(2).digest)
        loader.held[NAME].set()
        await until(lambda: not playbacks.report()[-1]["is_playing"])
        assert playbacks.report()[-1]["there"] == 1

    run(work)


def test_a_playback_takes_up_to_half_of_the_cache() -> None:
    blobs = [blob(number, 100_000) for number in range(10)]

    async def work(playbacks: Playbacks, loader: RecordedLoader) -> None:
        report = await played(playbacks, *blobs)
        assert loader.asked == keys(*blobs[:5])
        assert (report["fetched"], report["left_out"]) == (5, 5)

    run(work, cache_bytes=1_000_000)


def test_sessions_with_one_profile_share_it_and_the_last_one_ends_it() -> None:
    profile = Profile((blob(0), blob(1), blob(2)))

    async def work(playbacks: Playbacks, loader: RecordedLoader) -> None:
        loader.held[blob(1).digest] = asyncio.Event()
        for _ in range(3):
            await playbacks.begin("boot", profile)
        await until(lambda: blob(2).digest in loader.asked)
        assert loader.asked == keys(blob(0), blob(1), blob(2))
        assert playbacks.foresee(blob(1).digest)
        assert not playbacks.foresee(blob(9).digest)
        (report,) = playbacks.report()
        assert report["sessions"] == 3
        await playbacks.end(profile)
        await playbacks.end(profile)
        assert playbacks.report()[0]["is_playing"]
        await playbacks.end(profile)
        assert not playbacks.report()[0]["is_playing"]
        assert not playbacks.foresee(blob(1).digest)
        loader.held[blob(1).digest].set()
        # It is played again for the next one: what is there is passed over.
        await playbacks.begin("boot", profile)
        await until(lambda: not playbacks.report()[0]["is_playing"])
        assert loader.asked == keys(blob(0), blob(1), blob(2), blob(1))
        assert playbacks.report()[0]["sessions"] == 1

    run(work)


def test_the_playbacks_that_have_ended_and_are_shown_are_few() -> None:
    async def work(playbacks: Playbacks, _loader: RecordedLoader) -> None:
        for number in range(100):
            profile = Profile((blob(number),))
            await playbacks.begin(f"boot{number}", profile)
            await playbacks.end(profile)
        assert len(playbacks.report()) <= 17

    run(work)
