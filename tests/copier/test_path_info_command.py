"""`appliance path-info` beside `nix path-info`, of the same closure."""

import json
from typing import Any

import pytest

from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import NixClosure

pytestmark = pytest.mark.slow

# What Nix knows of its own store only.
OF_NIX = ("registrationTime", "ultimate")


@pytest.fixture
def copied(closure: NixClosure, store: CopiedStore) -> CopiedStore:
    store.run("copy", "--from", closure.nix.uri, "-r", *closure.tops)
    return store


def printed(ran: list[str]) -> Any:
    (line,) = ran
    return json.loads(line)


def of_nix(closure: NixClosure, *words: str) -> list[dict[str, Any]]:
    infos = json.loads(closure.nix.run("nix", "path-info", "--json", *words))
    return [
        {name: value for name, value in info.items() if name not in OF_NIX}
        for info in sorted(infos, key=lambda info: str(info["path"]))
    ]


def test_the_list_of_a_closure_is_that_of_nix(closure: NixClosure, copied: CopiedStore) -> None:
    words = ("-r", "-S", closure.tops[0])
    ours = printed(copied.run("path-info", "--json", "--json-format", "list", *words).lines)
    assert sorted(ours, key=lambda info: str(info["path"])) == of_nix(closure, *words)
    same = printed(copied.run("path-info", "--closure", "--json", "-S", closure.tops[0]).lines)
    assert {path: info["closureSize"] for path, info in same.items()} == {
        info["path"]: info["closureSize"] for info in ours
    }


def test_lines_are_those_of_nix(closure: NixClosure, copied: CopiedStore) -> None:
    for words in (("-s",), ("-S",), ("-r", "-s", "-S"), ("-r",)):
        command = ("path-info", *words, closure.tops[0])
        expected = closure.nix.run("nix", *command).decode().splitlines()
        assert sorted(copied.run(*command).lines) == sorted(expected)


def test_signatures_are_those_of_nix(closure: NixClosure, copied: CopiedStore) -> None:
    (expected,) = closure.nix.run("nix", "path-info", "--sigs", closure.tops[1]).splitlines()
    assert copied.run("path-info", "--sigs", closure.tops[1]).lines == [expected.decode()]
    (signed,) = copied.run("path-info", "--sigs", closure.tops[0]).lines
    (expected,) = closure.nix.run("nix", "path-info", "--sigs", closure.tops[0]).splitlines()
    # Nix also says that it has built the path.
    assert signed.split() == [word for word in expected.decode().split() if word != "ultimate"]


def test_all_paths(closure: NixClosure, copied: CopiedStore) -> None:
    assert copied.run("path-info", "--all").lines == sorted(closure.closure)
    assert copied.run("path-info").lines == sorted(closure.closure)
    refused = copied.run("path-info", "--all", closure.tops[0], status=2)
    assert refused.errors == f"appliance: {closure.tops[0]}: --all takes no PATH\n"


def test_a_path_that_is_missing(closure: NixClosure, copied: CopiedStore) -> None:
    missing = f"/nix/store/{'0' * 32}-missing"
    ran = copied.run("path-info", "-r", closure.tops[0], missing, status=1)
    assert ran.lines == sorted(closure.built, key=ran.lines.index)
    assert ran.errors == f"appliance: path {missing} is not valid\n"
    (absent,) = printed(copied.run("path-info", "--json", "--json-format", "list", missing).lines)
    assert absent == {"path": missing, "valid": False}
    newest = printed(copied.run("path-info", "--json", "--json-format", "2", missing).lines)
    assert newest["info"] == {f"{'0' * 32}-missing": None}
