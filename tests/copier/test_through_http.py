"""A closure of Nix into `appliance http` and out again, by Nix itself."""

from pathlib import Path

import pytest

from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import Nix, NixClosure
from tests.fakes.http_process import HttpProcess

pytestmark = pytest.mark.slow


def trusting(closure: NixClosure, url: str) -> list[str]:
    return [
        *("--option", "require-sigs", "true"),
        *("--option", "trusted-public-keys", closure.public_key),
        *("--option", "substituters", url, "--option", "substitute", "true"),
    ]


def check_same(closure: NixClosure, other: Nix, paths: list[str]) -> None:
    """Check that a Nix store has the paths with what is known of them, and their contents."""
    # Only the store that has built a path says so; and when it was registered is its own matter.
    own = ("registrationTime", "ultimate")
    expected, found = (
        {
            path: {name: value for name, value in info.items() if name not in own}
            for path, info in nix.path_infos(*paths).items()
        }
        for nix in (closure.nix, other)
    )
    assert found == expected
    for path in paths:
        assert other.dump(path) == closure.nix.dump(path)
    other.run("nix-store", "--verify", "--check-contents")


def other_nix(directory: Path) -> Nix:
    directory.mkdir()
    return Nix(directory)


def test_nix_copies_it_there_and_back(
    closure: NixClosure, store: CopiedStore, tmp_path: Path
) -> None:
    required = ["--require-signatures", "--trusted-public-keys", closure.public_key]
    service = ("--store", store.uri)
    with HttpProcess(service, tmp_path / "http", "--allow-put", *required) as server:
        closure.nix.run("nix", "copy", "--to", server.url, *closure.tops)
        copied = other_nix(tmp_path / "copied")
        copying = ("nix", "copy", "--from", server.url, *closure.tops)
        copied.run(*copying, *trusting(closure, ""))
        check_same(closure, copied, closure.closure)
        realised = other_nix(tmp_path / "realised")
        realised.run("nix-store", "-r", *closure.tops, *trusting(closure, server.url))
        check_same(closure, realised, closure.closure)
    store.check_equals(closure, closure.closure)
    # And by our own copy, from the cache to another store.
    with HttpProcess(service, tmp_path / "http") as server:
        second = CopiedStore(f"{store.uri}-second")
        second.run(
            *("copy", "--from", server.url, "-r", *closure.tops),
            *("--trusted-public-keys", closure.public_key),
        )
    second.check_equals(closure, closure.closure)
