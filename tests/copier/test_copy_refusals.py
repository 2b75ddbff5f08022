"""What is not as its source says is refused with one line, and nothing half-done is left."""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import Nix, NixClosure

pytestmark = pytest.mark.slow


class Cache:
    """A cache in a directory whose files are edited."""

    def __init__(self, directory: Path) -> None:
        self.uri = f"file://{directory}"
        self.directory = directory

    def narinfo(self, path: str) -> Path:
        return self.directory / f"{Path(path).name[:32]}.narinfo"

    def edit(self, path: str, old: str, new: str) -> None:
        text = self.narinfo(path).read_text()
        assert old in text
        self.narinfo(path).write_text(text.replace(old, new))

    def field(self, path: str, name: str) -> str:
        for line in self.narinfo(path).read_text().splitlines():
            if line.startswith(f"{name}: "):
                return line.removeprefix(f"{name}: ")
        raise AssertionError(name)

    def nar(self, path: str) -> Path:
        return self.directory / self.field(path, "URL")


@pytest.fixture(scope="module")
def original(closure: NixClosure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "cache"
    closure.cache(directory, "none")
    return directory


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Cache:
    shutil.copytree(original, tmp_path / "cache")
    return Cache(tmp_path / "cache")


def copy_from(
    store: CopiedStore, closure: NixClosure, cache: Cache, *, status: int = 1
) -> tuple[list[str], list[str]]:
    """Copy the closure on top; return what was copied, and why something was not."""
    keys = ["--trusted-public-keys", closure.public_key]
    ran = store.run("copy", "--from", cache.uri, *keys, "-r", closure.tops[0], status=status)
    lines = [
        line.removeprefix("appliance: ")
        for line in ran.errors.splitlines()
        if line.startswith("appliance: ")
    ]
    return ran.lines, lines


def with_referrers(closure: NixClosure, path: str) -> set[str]:
    """Return `path` and all of the closure on top that refers to it, directly or not."""
    referrers = closure.nix.text("nix-store", "--query", "--referrers-closure", path).split()
    return {*referrers} & {*closure.built}


def check_refused(
    store: CopiedStore, closure: NixClosure, cache: Cache, path: str, reason: str
) -> None:
    """Copy; check that `path` is refused for `reason` and its referrers for it; others are not."""
    copied, lines = copy_from(store, closure, cache)
    refused = with_referrers(closure, path)
    assert {*copied} == {*closure.built} - refused
    store.check_equals(closure, copied)
    assert len(lines) == len(refused)
    assert [line for line in lines if reason in line and path in line], lines
    others = [line for line in lines if "which is not in the store" in line]
    assert len(others) == len(refused) - 1, lines


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "content": (
        lambda nar: nar.write_bytes(nar.read_bytes().replace(b"lib\n", b"bad\n")),
        "the hash of its NAR is stated as",
    ),
    "cut": (lambda nar: nar.write_bytes(nar.read_bytes()[:1000]), "ends at offset 1000"),
    "longer": (
        lambda nar: nar.write_bytes(nar.read_bytes().replace(b"\x04\0\0\0\0\0\0\0lib\n", b"")),
        "NAR",
    ),
    "gone": (lambda nar: nar.unlink(), "does not exist"),
    "token": (lambda nar: nar.write_bytes(nar.read_bytes().replace(b"entry", b"enter")), "NAR"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_nar(store: CopiedStore, closure: NixClosure, cache: Cache, damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    path = closure.named("lib-1.0")
    spoil(cache.nar(path))
    check_refused(store, closure, cache, path, reason)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("Sig", f"test-1:{'A' * 86}==", "its signature by test-1 is wrong"),
        ("Sig", f"other-1:{'A' * 86}==", "signed by other-1 only, and no such key is trusted"),
        ("Sig", "test-1:AAAA", "64"),
        ("NarSize", "201008", "its signature by test-1 is wrong"),
        ("NarSize", "many", "NarSize"),
        ("StorePath", f"/nix/store/{'0' * 32}-lib-1.0", "expected /nix/store/"),
        ("URL", "../nar", "is not a path in the cache"),
        ("URL", ".", "is not a path in the cache"),
        ("URL", "nar/a b", "is not a path in the cache"),
        ("URL", "/etc/passwd", "is not a path in the cache"),
        ("URL", "file:///etc/passwd", "is not a path in the cache"),
        ("Compression", "br", "unknown compression 'br'"),
        ("Compression", "xz", "compressed with xz"),
        ("Compression", "zstd", "compressed with zstd"),
        ("Compression", "gzip", "compressed with gzip"),
        ("Compression", "bzip2", "compressed with bzip2"),
        ("References", "nonsense", "References"),
    ],
)
def test_a_narinfo_that_is_wrong(
    store: CopiedStore, closure: NixClosure, cache: Cache, name: str, value: str, reason: str
) -> None:
    path = closure.named("lib-1.0")
    text = cache.narinfo(path).read_text()
    lines = [line for line in text.splitlines() if not line.startswith(f"{name}: ")]
    cache.narinfo(path).write_text("\n".join([*lines, f"{name}: {value}"]) + "\n")
    check_refused(store, closure, cache, path, reason)


def test_a_path_without_a_signature(store: CopiedStore, closure: NixClosure, cache: Cache) -> None:
    path = closure.named("lib-1.0")
    cache.edit(path, f"Sig: {cache.field(path, 'Sig')}\n", "")
    check_refused(store, closure, cache, path, "it has no signature")
    keys = ["--trusted-public-keys", closure.public_key]
    words = ["--from", cache.uri, *keys, "--no-check-sigs", "-r", closure.tops[0]]
    store.run("copy", *words)
    assert store.path_infos().keys() == {*closure.built}


def test_a_content_address_needs_no_signature_but_the_right_content(
    store: CopiedStore, closure: NixClosure, cache: Cache
) -> None:
    _built, fixed, recursive, addressed = closure.tops
    words = ["copy", "--from", cache.uri, "-r"]
    store.run(*words, fixed, recursive, addressed)
    for path in (fixed, recursive):
        other = CopiedStore(f"{store.uri}-{Path(path).name}")
        # Another content, all else agrees with it.
        nar = cache.nar(path)
        nar.write_bytes(nar.read_bytes().replace(b"content\n", b"CONTENT\n"))
        claimed = cache.field(path, "NarHash")
        cache.edit(path, claimed, f"sha256:{hashlib.sha256(nar.read_bytes()).hexdigest()}")
        ran = other.run(*words, path, status=1)
        assert "its content address is fixed:" in ran.errors
        other.check_is_empty()


def test_a_reference_that_the_cache_does_not_have(
    store: CopiedStore, closure: NixClosure, cache: Cache
) -> None:
    path = closure.named("source")
    cache.narinfo(path).unlink()
    check_refused(store, closure, cache, path, "is not valid")


def test_a_reference_that_is_not_copied(store: CopiedStore, closure: NixClosure) -> None:
    app, lib = closure.named("app-2.0"), closure.named("lib-1.0")
    ran = store.run("copy", "--from", closure.nix.uri, app, status=1)
    missing = f"{app}: refers to {lib}, which is not in the store"
    assert f"{missing}; copy that path first, or copy closures with -r" in ran.errors
    store.check_is_empty()
    assert store.run("copy", "--from", closure.nix.uri, lib).lines == [lib]
    assert store.run("copy", "--from", closure.nix.uri, app).lines == [app]


def test_references_in_a_circle(store: CopiedStore, closure: NixClosure, cache: Cache) -> None:
    app, lib = closure.named("app-2.0"), closure.named("lib-1.0")
    cache.edit(lib, "References: ", f"References: {Path(app).name}")
    words = ["--from", cache.uri, "--no-check-sigs", "-r", app]
    ran = store.run("copy", *words, status=1)
    assert ran.errors.count("its references lead back to it") == 2
    store.check_is_empty()


def test_a_directory_that_is_no_cache(store: CopiedStore, tmp_path: Path) -> None:
    ran = store.run("copy", "--from", f"file://{tmp_path}", f"{'0' * 32}-a", status=1)
    assert "it has no nix-cache-info" in ran.errors


def test_a_cache_of_another_store(store: CopiedStore, closure: NixClosure, cache: Cache) -> None:
    (cache.directory / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
    ran = store.run("copy", "--from", cache.uri, closure.tops[0], status=1)
    assert "its store directory is '/gnu/store', expected /nix/store" in ran.errors


def test_a_cache_that_does_not_answer(store: CopiedStore) -> None:
    source = "http://127.0.0.1:1/cache"
    ran = store.run("copy", "--from", source, f"{'0' * 32}-a", status=1)
    assert "http://127.0.0.1:1/cache/nix-cache-info: " in ran.errors
    assert "Connection refused" in ran.errors


@pytest.fixture
def own(closure: NixClosure, tmp_path: Path) -> NixClosure:
    """Return a copy of the closure that a test may change."""
    shutil.copytree(closure.nix.root, tmp_path / "own", symlinks=True)
    return closure._replace(nix=Nix(tmp_path / "own"))


def test_a_tree_that_is_not_as_its_database_says(store: CopiedStore, own: NixClosure) -> None:
    path = own.named("lib-1.0")
    file = own.nix.directory / Path(path).name / "lib" / "lib.so"
    file.chmod(0o644)
    file.write_text("bad\n")
    ran = store.run("copy", "--from", own.nix.uri, "-r", own.tops[0], status=1)
    assert f"path {path}: the hash of its NAR is stated as" in ran.errors
    assert {*ran.lines} == {*own.built} - with_referrers(own, path)


def test_a_tree_that_is_gone(store: CopiedStore, own: NixClosure) -> None:
    path = own.named("lib-1.0")
    shutil.rmtree(own.nix.directory / Path(path).name)
    ran = store.run("copy", "--from", own.nix.uri, path, status=1)
    assert f"{path}: No such file or directory" in ran.errors
    store.check_is_empty()


def test_a_database_that_is_none(store: CopiedStore, tmp_path: Path) -> None:
    nix = Nix(tmp_path / "other")
    ran = store.run("copy", "--from", nix.uri, f"{'0' * 32}-a", status=1)
    reason = "cannot be read as the database of Nix: No such file or directory"
    assert f"db.sqlite: {reason}\n" in ran.errors
    database = nix.root / "nix/var/nix/db/db.sqlite"
    database.parent.mkdir(parents=True)
    database.write_text("text\n" * 1000)
    ran = store.run("copy", "--from", nix.uri, f"{'0' * 32}-a", status=1)
    assert "cannot be read as the database of Nix: file is not a database" in ran.errors


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("hash", "sha256:00", "sha256:00"),
        ("sigs", "nonsense", "signature"),
        ("deriver", "/nix/store/nonsense", "nonsense"),
        ("ca", "nonsense", "nonsense"),
    ],
)
def test_a_row_of_the_database_that_is_wrong(
    store: CopiedStore, own: NixClosure, column: str, value: str, reason: str
) -> None:
    path = own.named("lib-1.0")
    database = own.nix.root / "nix/var/nix/db/db.sqlite"
    connection = sqlite3.connect(database)
    with connection:
        connection.execute(f"UPDATE ValidPaths SET {column} = ? WHERE path = ?", (value, path))
    connection.close()
    ran = store.run("copy", "--from", own.nix.uri, path, status=1)
    assert reason in ran.errors
    assert path in ran.errors
    store.check_is_empty()


def test_an_export_that_ends_early(store: CopiedStore, closure: NixClosure) -> None:
    paths = closure.nix.text("nix-store", "--query", "--requisites", *closure.tops).split()
    export = closure.nix.run("nix-store", "--export", *paths)
    ran = store.run("copy", "--import", "-", data=export[:-200], status=1)
    assert "ends" in ran.errors
    assert ran.lines
    assert {*ran.lines} == {*store.path_infos()}
    store.check_equals(closure, ran.lines, without=["ca", "signatures"])


@pytest.mark.parametrize("data", [b"", b"text, and some more of it", b"\1" + bytes(7) + b"nar"])
def test_what_is_no_export(store: CopiedStore, data: bytes) -> None:
    ran = store.run("copy", "--import", "-", data=data, status=1)
    assert "export" in ran.errors or "NAR" in ran.errors
    store.check_is_empty()


def test_an_export_of_a_path_without_what_it_refers_to(
    store: CopiedStore, closure: NixClosure
) -> None:
    app, lib = closure.named("app-2.0"), closure.named("lib-1.0")
    named = closure.named("named")
    export = closure.nix.run("nix-store", "--export", app, named)
    ran = store.run("copy", "--import", "-", data=export, status=1)
    assert f"{app}: refers to {lib}, which is not in the store" in ran.errors
    assert ran.lines == [named]
    store.check_equals(closure, [named], without=["ca", "signatures"])


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("nonsense", "not JSON"),
        ("1", "neither a list nor an object of store paths"),
        ('[{"narSize": 1}]', "the entry has no path"),
        ('[{"path": "/etc"}]', "/etc: "),
        ('{"/nix/store/PATH": null}', "is not valid in its own store"),
        ('[{"path": "/nix/store/PATH", "valid": false}]', "is not valid in its own store"),
        ('[{"path": "/nix/store/PATH"}]', "narHash or narSize is missing"),
        ('[{"path": "/nix/store/PATH", "narHash": "x", "narSize": 1}]', "'x'"),
        ('{"exportReferencesGraph": {"g": []}}', "that is not a list of store paths"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_list_in_json_that_is_wrong(store: CopiedStore, document: str, reason: str) -> None:
    data = document.replace("PATH", f"{'0' * 32}-a").encode()
    ran = store.run("copy", "--path-info-json", "-", data=data, status=2)
    assert reason in ran.errors
    assert len(ran.errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "no PATH was given"),
        (["nonsense"], "not a store path"),
        (["--from", "ftp://x", "PATH"], "--from service address ftp://x: unknown scheme"),
        (
            ["--from", "local?rot=/x", "PATH"],
            "unknown parameter 'rot'; known are root, real and state",
        ),
        (["--from", "local?root=x", "PATH"], "root is not an absolute path"),
        (["--from", "file://x", "PATH"], "the path must be absolute"),
        (
            ["--from", "http://x?trusted=y", "PATH"],
            "unknown parameter 'trusted'; known is trusted-public-keys",
        ),
        (["--import", "-", "PATH"], "--import: cannot be combined with PATH"),
        (["--import", "/missing"], "--import /missing: No such file or directory"),
        (["--path-info-json", "-", "--stdin"], "--path-info-json: cannot be combined with --stdin"),
        (["--path-info-json", "-", "--from", "http://x"], "needs --from local or local?root=DIR"),
    ],
)
def test_words_that_make_no_sense(store: CopiedStore, words: list[str], reason: str) -> None:
    given = [word.replace("PATH", f"{'0' * 32}-a") for word in words]
    ran = store.run("copy", *given, status=2)
    assert reason in ran.errors
    assert not Path(store.uri.removeprefix("lmdb://")).exists()


def test_a_key_that_is_none(store: CopiedStore, closure: NixClosure, cache: Cache) -> None:
    words = ["--from", cache.uri, "--trusted-public-keys", "nonsense", closure.tops[0]]
    ran = store.run("copy", *words, status=2)
    assert "--trusted-public-keys: public key" in ran.errors
    assert not Path(store.uri.removeprefix("lmdb://")).exists()


def test_outcomes_as_json(store: CopiedStore, closure: NixClosure) -> None:
    lib, app = closure.named("lib-1.0"), closure.named("app-2.0")
    missing = f"/nix/store/{'0' * 32}-missing"
    store.run("copy", "--from", closure.nix.uri, lib)
    words = ["--from", closure.nix.uri, "--json", lib, app, missing]
    outcomes = [json.loads(line) for line in store.run("copy", *words, status=1).lines]
    size = closure.nix.path_infos(app)[app]["narSize"]
    assert sorted(outcomes, key=lambda outcome: str(outcome["status"])) == [
        {"path": app, "status": "copied", "narSize": size},
        {"path": lib, "status": "present"},
        {"path": missing, "status": "refused", "error": f"path {missing} is not valid"},
    ]
