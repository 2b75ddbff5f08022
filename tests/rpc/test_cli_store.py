"""The commands that look into a store, on its own files and through a daemon."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.castore.directory import DirectoryNode
from appliance.nix.store_path import nar_path
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE
from tests.store.audit import audit

pytestmark = pytest.mark.slow


class Stored(NamedTuple):
    """What was imported, and how it is addressed."""

    uri: str
    path: str


@pytest.fixture(scope="module")
def stored_daemon(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[DaemonProcess, str, str]]:
    directory = tmp_path_factory.mktemp("cli")
    tree = directory / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/run").write_bytes(b"#!/bin/sh\n")
    (tree / "bin/run").chmod(0o755)
    (tree / "note").write_bytes(b"a note\n" * 100_000)
    (tree / "link").symlink_to("note")
    uri = f"lmdb://{directory}/store"
    path = run("import", "--store", uri, str(tree)).stdout.decode().strip()
    with DaemonProcess(uri, directory) as daemon:
        yield daemon, uri, path


@pytest.fixture(params=["lmdb", "grpc"])
def stored(request: pytest.FixtureRequest, stored_daemon: tuple[DaemonProcess, str, str]) -> Stored:
    daemon, uri, path = stored_daemon
    return Stored(uri if request.param == "lmdb" else daemon.unix_uri, path)


def run(
    *arguments: str, status: int = 0, environ: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run(
        [*APPLIANCE, *arguments],
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, **(environ or {})},
    )
    assert done.returncode == status, done.stderr
    return done


def test_nar_is_that_of_the_path(stored: Stored) -> None:
    nar = run("nar", "--store", stored.uri, stored.path).stdout

    path = nar_path(hashlib.sha256(nar).digest(), "tree")
    assert path.absolute() == stored.path


def test_nar_of_something_below_a_path(stored: Stored) -> None:
    nar = run("nar", "--store", stored.uri, f"{stored.path}/bin/run").stdout

    assert nar.startswith(b"\x0d\0\0\0\0\0\0\0nix-archive-1\0\0\0")
    assert b"#!/bin/sh\n" in nar


def test_cat_writes_a_file(stored: Stored) -> None:
    done = run("cat", "--store", stored.uri, f"{stored.path}/note")

    assert done.stdout == b"a note\n" * 100_000


@pytest.mark.parametrize("below", ["/bin", "", "/link"])
def test_cat_of_what_is_no_file_fails(stored: Stored, below: str) -> None:
    done = run("cat", "--store", stored.uri, stored.path + below, status=1)

    assert b"is not a regular file" in done.stderr


def test_ls_lists_a_directory(stored: Stored) -> None:
    done = run("ls", "--store", stored.uri, stored.path)

    assert done.stdout.decode().splitlines() == ["./bin", "./link", "./note"]


def test_ls_lists_all_below_with_modes_and_sizes(stored: Stored) -> None:
    lines = run("ls", "-lR", "--store", stored.uri, stored.path).stdout.decode().splitlines()

    assert [line.split() for line in lines] == [
        ["dr-xr-xr-x", "0", "./bin"],
        ["-r-xr-xr-x", "10", "./bin/run"],
        ["lrwxrwxrwx", "0", "./link", "->", "note"],
        ["-r--r--r--", "700000", "./note"],
    ]


@pytest.mark.parametrize(
    ("below", "line"), [("/bin/run", "-r-xr-xr-x 10 run"), ("/link", "lrwxrwxrwx 0 link -> note")]
)
def test_ls_of_what_is_no_directory_names_it(stored: Stored, below: str, line: str) -> None:
    done = run("ls", "-l", "--store", stored.uri, stored.path + below)

    assert " ".join(done.stdout.decode().split()) == line


def test_ls_writes_names_of_any_encoding(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "tree") + b"/\xff")).touch()
    uri = f"lmdb://{tmp_path}/store"
    path = run("import", "--store", uri, str(tmp_path / "tree")).stdout.decode().strip()

    # As in a locale of UTF-8 other than C.
    done = run("ls", "--store", uri, path, environ={"PYTHONIOENCODING": "utf-8:strict"})
    assert done.stdout == b"./\xff\n"


@pytest.mark.parametrize(
    "words", ["cat {}/note", "nar {}", "ls -R {}", "path-info", "path-info --json"]
)
def test_output_that_cannot_be_written_is_one_line_and_status_one(
    stored: Stored, words: str
) -> None:
    command = [*words.format(stored.path).split(), "--store", stored.uri]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*APPLIANCE, *command], stdout=full, stderr=subprocess.PIPE, check=False, timeout=60
        )

    assert done.returncode == 1
    assert done.stderr == b"appliance: standard output: No space left on device\n"


def test_closed_output_is_one_line_and_status_one(stored: Stored) -> None:
    command = [*APPLIANCE, "cat", f"{stored.path}/note", "--store", stored.uri]
    done = subprocess.run(
        ["bash", "-c", '"$@" >&-', "bash", *command],
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )

    assert done.returncode == 1
    assert done.stderr == b"appliance: standard output: Bad file descriptor\n"


def test_ls_prints_json(stored: Stored) -> None:
    done = run("ls", "--json", "-R", "--store", stored.uri, stored.path)

    assert json.loads(done.stdout) == {
        "type": "directory",
        "entries": {
            "bin": {
                "type": "directory",
                "entries": {"run": {"type": "regular", "size": 10, "executable": True}},
            },
            "link": {"type": "symlink", "target": "note"},
            "note": {"type": "regular", "size": 700_000},
        },
    }


def test_path_info_lists_all_paths(stored: Stored) -> None:
    assert run("path-info", "--store", stored.uri).stdout.decode() == f"{stored.path}\n"


def test_path_info_prints_json(stored: Stored) -> None:
    missing = "/nix/store/" + "0" * 32 + "-missing"
    nar = run("nar", "--store", stored.uri, stored.path).stdout
    done = run("path-info", "--json", "--store", stored.uri, stored.path, missing)

    infos = json.loads(done.stdout)
    assert infos[missing] is None
    assert infos[stored.path]["narSize"] == len(nar)
    assert infos[stored.path]["references"] == []
    assert infos[stored.path]["ca"].startswith("fixed:r:sha256:")


def test_missing_path_is_one_line_and_status_one(stored: Stored) -> None:
    missing = "/nix/store/" + "0" * 32 + "-missing"
    for command in ("nar", "ls", "cat", "path-info"):
        done = run(command, "--store", stored.uri, missing, status=1)
        assert done.stderr.decode() == f"appliance: path {missing} is not valid\n"


def test_right_digest_under_another_name_is_missing(stored: Stored) -> None:
    run("ls", "--store", stored.uri, stored.path + "r", status=1)


def test_what_is_no_store_path_is_one_line_and_status_two(stored: Stored) -> None:
    done = run("ls", "--store", stored.uri, "/etc/passwd", status=2)

    assert done.stderr.startswith(b"appliance: /etc/passwd: not a store path")
    assert done.stderr.count(b"\n") == 1


def test_daemon_that_is_not_there_is_one_line_and_status_one(tmp_path: Path) -> None:
    done = run("path-info", "--store", f"grpc+unix://{tmp_path}/nobody.sock", status=1)

    assert b"Traceback" not in done.stderr
    assert b"nobody.sock" in done.stderr


def test_reader_that_leaves_early_is_no_error_of_ours(stored: Stored) -> None:
    command = " ".join([*APPLIANCE, "cat", "--store", stored.uri, f"{stored.path}/note"])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -c 10"], capture_output=True, check=True, timeout=60
    )

    assert done.stdout == b"a note\na n"
    assert b"Traceback" not in done.stderr


def test_directory_sizes_are_counted_as_asked(tmp_path: Path) -> None:
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file").touch()
    found = {}
    for dialect in ("documented", "doubled"):
        uri = f"lmdb://{tmp_path}/{dialect}"
        run("import", "--store", uri, "--directory-sizes", dialect, str(tmp_path / "tree"))
        (info,) = audit(tmp_path / dialect).path_infos
        assert isinstance(info.node, DirectoryNode)
        found[dialect] = (info.path, info.nar_sha256, info.node)

    *documented, small = found["documented"]
    *doubled, large = found["doubled"]
    assert documented == doubled
    assert small.digest != large.digest
    assert (small.size, large.size) == (2, 4)


NAME = "ünï"
LOCALES = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "Latin-1 streams": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.parametrize("environ", LOCALES.values(), ids=LOCALES.keys())
def test_names_in_utf_8_are_shown_so_whatever_the_locale(
    tmp_path: Path, environ: Mapping[str, str]
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / NAME).symlink_to(NAME)
    os.close(os.open(os.fsencode(tree) + b"/\xff", os.O_CREAT))
    store = ("--store", f"lmdb://{tmp_path}/store")
    name = NAME.encode()

    def shown(command: str, *words: str, status: int = 0) -> bytes:
        done = run(command, *store, *words, status=status, environ=environ)
        return done.stderr if status else done.stdout

    path = shown("import", str(tree)).decode().strip()
    assert shown("ls", path) == b"./" + name + b"\n./\xff\n"
    assert shown("ls", "-l", f"{path}/{NAME}").endswith(name + b" -> " + name + b"\n")
    tree_json = json.loads(shown("ls", "--json", path))
    assert NAME in tree_json["entries"]
    assert name in shown("cat", f"{path}/{NAME}", status=1)
    assert name + b" does not exist" in shown("cat", f"{path}/x{NAME}", status=1)
    assert b"'" + name + b"'" in shown("ls", f"/nix/store/{NAME}", status=2)
    refusal = shown("import", str(tree / NAME), status=1)
    assert b"/" + name + b": no name" in refusal
    assert b"'" + name + b"'" in refusal
    assert name in shown("mount", str(tmp_path / NAME), status=1)
