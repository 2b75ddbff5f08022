"""Which substituters are asked, how often, and for whom."""

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from appliance.castore.digest import EMPTY_DIGEST
from appliance.errors import ServiceUnavailableError
from appliance.nix.store_path import StorePath
from appliance.resolve.local import LocalResolver
from appliance.resolve.resolver import SessionGrants
from appliance.resolve.substituting import Substituter, SubstitutingResolver, Substitution
from appliance.session.grant_table import GrantTable
from appliance.session.wants import RootNameWanted
from appliance.store.profiles import Profile, ProfiledDirectory, ProfiledPath
from appliance.store.store import Store
from tests.fs.guest import basename


class Asked:
    """A substituter that has nothing, and answers only what it is let answer."""

    def __init__(self, label: str = "asked", error: Exception | None = None) -> None:
        self.label = label
        self.paths: list[StorePath] = []
        self.asked: asyncio.Queue[StorePath] = asyncio.Queue()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._error = error

    async def has(self, path: StorePath) -> bool:
        self.paths.append(path)
        self.asked.put_nowait(path)
        await self.may_answer.wait()
        if self._error is not None:
            raise self._error
        return False

    def copy_words(self, store: str, path: StorePath) -> Sequence[str]:
        raise AssertionError(f"{path} is not to be copied to {store}")

    async def close(self) -> None:
        pass


@asynccontextmanager
async def resolving(
    directory: Path, *substituters: Substituter
) -> AsyncIterator[SubstitutingResolver]:
    store = Store.open(directory / "store", create=True)
    resolver = SubstitutingResolver(LocalResolver(store), store.path, Substitution(substituters))
    try:
        async with asyncio.timeout(30):
            yield resolver
    finally:
        await resolver.close()
        store.close()


@asynccontextmanager
async def session() -> AsyncIterator[SessionGrants]:
    table = GrantTable()
    try:
        yield SessionGrants(table)
    finally:
        table.close()


def test_what_nobody_has_is_asked_for_once_in_a_while(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = Asked("first"), Asked("second")
        async with resolving(tmp_path, first, second) as resolver, session() as guest:
            want = RootNameWanted(basename("absent"))
            answers = [await resolver.resolve(want, guest) for _ in range(5)]
            assert answers == [errno.ENOENT] * 5
            assert len(first.paths) == len(second.paths) == 1
            for name in (b"no-store-path", b"\xff" * 40, b".."):
                assert await resolver.resolve(RootNameWanted(name), guest) == errno.ENOENT
            assert len(first.paths) == 1

    asyncio.run(main())


def test_one_that_is_away_is_passed_over_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        away = Asked("away", ServiceUnavailableError("no answer"))
        second = Asked("second")
        async with resolving(tmp_path, away, second) as resolver, session() as guest:
            for number in range(5):
                want = RootNameWanted(basename(f"absent-{number}"))
                # It might have had the path.
                assert await resolver.resolve(want, guest) == errno.EIO
            assert len(away.paths) == 1
            assert len(second.paths) == 5

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == ["substituter away: no answer"]


def test_a_guest_that_tries_names_keeps_no_other_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        slow = Asked()
        slow.may_answer.clear()
        async with resolving(tmp_path, slow) as resolver, session() as greedy, session() as other:
            wants = [RootNameWanted(basename(f"greedy-{number}")) for number in range(100)]
            tasks = [asyncio.create_task(resolver.resolve(want, greedy)) for want in wants]
            await slow.asked.get()
            last = asyncio.create_task(resolver.resolve(RootNameWanted(basename("mine")), other))
            while (await slow.asked.get()).name != "mine":
                pass
            assert len(slow.paths) <= 9
            slow.may_answer.set()
            assert await last == errno.ENOENT
            assert set(await asyncio.gather(*tasks)) == {errno.ENOENT}

    asyncio.run(main())


def test_the_store_paths_of_a_profile_are_asked_for_in_its_order(tmp_path: Path) -> None:
    async def main() -> None:
        asked = Asked()
        async with resolving(tmp_path, asked) as resolver:
            names = [basename(f"path-{number}").decode() for number in range(5)]
            reads = [ProfiledPath(at_ms, name) for at_ms, name in enumerate(names)]
            end = resolver.play("boot", Profile((*reads, ProfiledDirectory(9, EMPTY_DIGEST))))
            found = [(await asked.asked.get()).basename() for _ in names]
            assert found == names
            end()
            # What is played until the end is cancelled by it.
            asked.may_answer.clear()
            resolver.play("other", Profile((ProfiledPath(0, basename("other").decode()),)))
            await asked.asked.get()

    asyncio.run(main())
