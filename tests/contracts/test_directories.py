"""What every directory service does."""

import pytest

from appliance.castore.digest import EMPTY_DIGEST
from appliance.castore.directory import Directory, DirectoryNode
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ProtocolError
from appliance.services.contracts import Services
from tests.contracts.rig import Rig, closure, fresh_leaf, parent_of, put_closure

A = Directory()
B = parent_of(A)
C = Directory([DirectoryNode(b"a", A.digest(), 0), DirectoryNode(b"a'", A.digest(), 0)])
D = parent_of(A, B)
WRONG = Directory([DirectoryNode(b"foo", A.digest(), 42)])
# What is put, and in which order it comes back.
TAKEN = {
    "a": ([A], [A]),
    "a b": ([A, B], [B, A]),
    "a c": ([A, C], [C, A]),
    "a a c": ([A, A, C], [C, A]),
    "a b d": ([A, B, D], [D, B, A]),
}
NOT_TAKEN = {
    "child is missing": [B],
    "child comes late": [B, A],
    "one is left over": [A, C, B],
    "size is wrong": [A, WRONG],
}


async def put_refused(services: Services, *members: Directory) -> None:
    with pytest.raises(ProtocolError):
        await put_closure(services.directories, *members)
    for member in members:
        if member.digest() != EMPTY_DIGEST:
            assert await services.directories.get(member.digest()) is None


def test_unknown_directory_is_absent(rig: Rig) -> None:
    digest = fresh_leaf().digest()

    async def work(services: Services) -> None:
        assert await services.directories.get(digest) is None
        assert await closure(services.directories, digest) == []

    rig.run(work)


def test_empty_directory_is_there_before_anybody_puts_it(rig: Rig) -> None:
    async def work(services: Services) -> None:
        assert await services.directories.get(EMPTY_DIGEST) == Directory()
        assert await closure(services.directories, EMPTY_DIGEST) == [Directory()]

    rig.run(work)


def test_leaf_comes_back_as_it_was_put(rig: Rig) -> None:
    leaf = fresh_leaf()

    async def work(services: Services) -> None:
        assert await services.directories.put(leaf) == leaf.digest()
        assert await services.directories.get(leaf.digest()) == leaf
        assert await closure(services.directories, leaf.digest()) == [leaf]

    rig.run(work)


def test_directory_with_subdirectories_cannot_come_alone(rig: Rig) -> None:
    leaf = fresh_leaf()
    parent = parent_of(leaf)

    async def work(services: Services) -> None:
        await services.directories.put(leaf)
        with pytest.raises(ProtocolError):
            await services.directories.put(parent)
        assert await services.directories.get(parent.digest()) is None

    rig.run(work)


@pytest.mark.parametrize("dialect", SizeDialect)
def test_closure_comes_back_parents_first_and_each_once(rig: Rig, dialect: SizeDialect) -> None:
    leaf = fresh_leaf()
    other = fresh_leaf()
    middle = parent_of(leaf, dialect=dialect)
    top = parent_of(middle, leaf, other, dialect=dialect)

    async def work(services: Services) -> None:
        root = await put_closure(services.directories, leaf, leaf, middle, other, top)
        assert root == top.digest()
        found = await closure(services.directories, root)
        assert found[0] == top
        assert set(found) == {top, middle, leaf, other}
        assert len(found) == 4
        assert found.index(middle) < found.index(leaf)
        assert await services.directories.get(middle.digest()) == middle

    rig.run(work)


@pytest.mark.slow
def test_chain_of_thousands_is_put_and_got(rig: Rig) -> None:
    chain = [fresh_leaf()]
    while len(chain) < 3000:
        chain.append(parent_of(chain[-1]))

    async def work(services: Services) -> None:
        root = await put_closure(services.directories, *chain)
        assert await closure(services.directories, root) == chain[::-1]

    rig.run(work)


def test_child_has_to_come_first(rig: Rig) -> None:
    leaf = fresh_leaf()

    rig.run(lambda services: put_refused(services, parent_of(leaf), leaf))


def test_child_has_to_come_along_even_if_it_is_there(rig: Rig) -> None:
    leaf = fresh_leaf()
    parent = parent_of(leaf)

    async def work(services: Services) -> None:
        await services.directories.put(leaf)
        await put_refused(services, parent)

    rig.run(work)


def test_even_the_empty_directory_has_to_come_along(rig: Rig) -> None:
    rig.run(lambda services: put_refused(services, parent_of(Directory(), fresh_leaf())))


@pytest.mark.parametrize("size", [0, 3, 1 << 63])
def test_stated_size_has_to_be_right(rig: Rig, size: int) -> None:
    leaf = fresh_leaf()
    wrong = Directory([DirectoryNode(b"leaf", leaf.digest(), size)])

    rig.run(lambda services: put_refused(services, leaf, wrong))


def test_sizes_are_counted_one_way_throughout(rig: Rig) -> None:
    one, two = fresh_leaf(), fresh_leaf()
    documented = parent_of(one, dialect=SizeDialect.DOCUMENTED)
    doubled = parent_of(two, dialect=SizeDialect.DOUBLED)
    top = Directory(
        [
            DirectoryNode(b"a", documented.digest(), documented.size(SizeDialect.DOCUMENTED)),
            DirectoryNode(b"b", doubled.digest(), doubled.size(SizeDialect.DOUBLED)),
        ]
    )

    rig.run(lambda services: put_refused(services, one, two, documented, doubled, top))


def test_all_has_to_be_below_the_last(rig: Rig) -> None:
    rig.run(lambda services: put_refused(services, fresh_leaf(), fresh_leaf()))


def test_root_has_to_be_last(rig: Rig) -> None:
    leaf = fresh_leaf()

    rig.run(lambda services: put_refused(services, leaf, parent_of(leaf), leaf))


def test_closure_of_nothing_is_refused(rig: Rig) -> None:
    rig.run(put_refused)


def test_closure_aborted_is_absent(rig: Rig) -> None:
    leaf = fresh_leaf()

    async def work(services: Services) -> None:
        putter = services.directories.put_multiple_start()
        await putter.put(leaf)
        await putter.abort()
        assert await services.directories.get(leaf.digest()) is None

    rig.run(work)


def test_closure_is_invisible_until_it_is_closed(rig: Rig) -> None:
    leaf = fresh_leaf()

    async def work(services: Services) -> None:
        putter = services.directories.put_multiple_start()
        await putter.put(leaf)
        assert await services.directories.get(leaf.digest()) is None
        await putter.close()
        assert await services.directories.get(leaf.digest()) == leaf

    rig.run(work)


@pytest.mark.parametrize(("put", "got"), TAKEN.values(), ids=TAKEN.keys())
def test_known_closure_is_taken_and_comes_back(
    rig: Rig, put: list[Directory], got: list[Directory]
) -> None:
    async def work(services: Services) -> None:
        assert await put_closure(services.directories, *put) == got[0].digest()
        assert await closure(services.directories, got[0].digest()) == got
        assert await services.directories.get(got[0].digest()) == got[0]

    rig.run(work)


@pytest.mark.parametrize("put", NOT_TAKEN.values(), ids=NOT_TAKEN.keys())
def test_known_closure_that_breaks_a_rule_is_not_taken(rig: Rig, put: list[Directory]) -> None:
    async def work(services: Services) -> None:
        with pytest.raises(ProtocolError):
            await put_closure(services.directories, *put)

    rig.run(work)
