"""Every byte, name, mode and target that a real kernel sees is the host's."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness import samples, tree
from vmharness.served import MACHINES, Served, serve
from vmharness.tree import TreeDigest

from tests.fakes.appliance_process import import_tree

READ_S = 120.0
READ_MUCH_S = 400.0
DROP_CACHES = "echo 3 > /proc/sys/vm/drop_caches"


class Sample(NamedTuple):
    """A tree on the host and where guests see it."""

    source: Path
    seen_at: str

    def digest(self, below: str = ".") -> TreeDigest:
        return tree.tree_digest(tree.records(self.source / below, is_normalised=True))


class Stored(NamedTuple):
    """A store and what is in it."""

    path: Path
    varied: Sample
    many: Sample
    large: Sample


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    directory = tmp_path_factory.mktemp("samples")
    sources = [directory / name for name in ("varied", "many", "large")]
    samples.build_varied(sources[0])
    samples.build_many(sources[1])
    samples.build_large(sources[2])
    store = directory / "store"
    names = import_tree(store, *sources)
    yield Stored(store, *(Sample(s, f"/mnt/{n}") for s, n in zip(sources, names, strict=True)))
    shutil.rmtree(directory)  # pytest would keep it for the next two runs


@pytest.fixture(scope="module", params=MACHINES)
def served(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serve(request.param, stored.path, tmp_path_factory.mktemp("served")) as served:
        served.mount()
        yield served


def digest_in_guest(served: Served, mode: str, path: str, jobs: int) -> TreeDigest:
    command = f"{DROP_CACHES}; probe tree-digest -n {mode} '{path}' {jobs}"
    return TreeDigest.parse(served.guest.check(command, READ_MUCH_S))


@pytest.mark.parametrize("mode", samples.MODES)
def test_everything_a_tree_may_hold_is_the_hosts(served: Served, stored: Stored, mode: str) -> None:
    expected = stored.varied.digest()
    assert expected.errors == 0

    found = digest_in_guest(served, mode, stored.varied.seen_at, 1)

    if found != expected:
        listed = served.guest.run(f"probe hash -n {mode} {stored.varied.seen_at}", READ_S).output
        # a readable difference
        assert listed.splitlines(keepends=True) == tree.records(
            stored.varied.source, is_normalised=True
        )
    assert found == expected


def test_readers_side_by_side_get_the_same(served: Served, stored: Stored) -> None:
    expected = stored.varied.digest()
    served.guest.check(DROP_CACHES, READ_S)

    jobs = [
        served.guest.start(f"probe tree-digest -n {mode} {stored.varied.seen_at} 3")
        for mode in samples.MODES
    ]

    results = [job.wait(READ_S) for job in jobs]
    assert [(status, TreeDigest.parse(line)) for status, line in results] == [(0, expected)] * 4


@pytest.mark.parametrize("served", ["uml"], indirect=True)
@pytest.mark.parametrize("mode", samples.MODES)
def test_a_hundred_thousand_files_are_the_hosts(served: Served, stored: Stored, mode: str) -> None:
    expected = stored.many.digest(mode)

    assert digest_in_guest(served, mode, f"{stored.many.seen_at}/{mode}", 4) == expected


@pytest.mark.parametrize("served", ["uml", "qemu"], indirect=True)
def test_all_names_of_a_directory_of_fifty_thousand_are_listed(
    served: Served, stored: Stored
) -> None:
    names = sorted(path.name for path in (stored.many.source / "read").iterdir())
    assert len(names) == 50_000

    listed = served.guest.check(f"ls -1 {stored.many.seen_at}/read | sha256sum", READ_S)

    assert (
        listed.split()[0].decode()
        == hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    )


def test_leaves_of_the_hundred_thousand_are_the_hosts(served: Served, stored: Stored) -> None:
    for mode in ("mmap", "direct", "sendfile"):
        leaf = f"{mode}/077"
        found = digest_in_guest(served, mode, f"{stored.many.seen_at}/{leaf}", 2)
        assert found == stored.many.digest(leaf)


@pytest.mark.parametrize("served", ["uml"], indirect=True)
def test_two_gibibytes_are_the_hosts(served: Served, stored: Stored) -> None:
    job = served.guest.start(f"sha256sum {stored.large.seen_at}")
    with stored.large.source.open("rb") as file:
        expected = hashlib.file_digest(file, "sha256").hexdigest()

    status, output = job.wait(READ_MUCH_S)

    assert (status, output.split()[0].decode()) == (0, expected)


@pytest.mark.parametrize("mode", ["read", "mmap", "direct"])
def test_pieces_across_the_borders_of_a_large_file_are_the_hosts(
    served: Served, stored: Stored, mode: str
) -> None:
    offsets = " ".join(map(str, samples.PIECE_OFFSETS))
    command = f"acts pieces {mode} {stored.large.seen_at} {samples.PIECE_SIZE} {offsets}"

    found = served.guest.check(f"{DROP_CACHES}; {command}", READ_S)

    assert found == b"".join(samples.pieces(stored.large.source))


def test_equal_files_have_an_st_ino_each(served: Served, stored: Stored) -> None:
    names = ("plain", "also plain", "script", "nothing", "nothing either")
    paths = " ".join(f"'{stored.varied.seen_at}/{name}'" for name in names)

    lines = served.guest.check(f"probe stat {paths}", READ_S).decode().splitlines()

    found = [dict(field.split("=") for field in line.split()) for line in lines]
    assert len({status.pop("ino") for status in found}) == len(names)
    plain, also_plain, script, nothing, nothing_either = found
    assert plain == also_plain
    assert nothing == nothing_either
    assert (plain["mode"], script["mode"]) == ("0444", "0555")
    assert plain["size"] == script["size"]


def test_symlinks_lead_where_they_say(served: Served, stored: Stored) -> None:
    at = f"{stored.varied.seen_at}/symlinks"
    content = (stored.varied.source / "plain").read_bytes()

    for name in ("to a file", "longest resolvable"):
        assert served.guest.check(f"cat '{at}/{name}'", READ_S) == content
    served.guest.check(f"cd '{at}/to a directory/' && test -f ./...", READ_S)
    for name in ("dangling", "to itself", "longest"):
        assert served.guest.run(f"cat '{at}/{name}'", READ_S).status == 1


def test_the_root_is_not_listed_and_its_paths_are_there_by_name(
    served: Served, stored: Stored
) -> None:
    assert served.guest.check("probe hash -n read /mnt", READ_S) == b"d 0555 0 1 . -\n"
    served.guest.check(f"test -d {stored.many.seen_at} && test -f {stored.large.seen_at}", READ_S)
