"""Nix as the client: substituting, copying from and copying to."""

import contextlib
import subprocess
from pathlib import Path

import pytest

from appliance.nix.narinfo import parse_narinfo
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.http_process import HttpProcess
from tests.fakes.running_command import APPLIANCE
from tests.http_cache.conftest import Nix, Served, make_tree

pytestmark = pytest.mark.slow


def same(left: Path, right: Path) -> None:
    subprocess.run(["diff", "-r", "--no-dereference", left, right], check=True)


def trusting(public_key: Path) -> list[str]:
    return [
        *("--option", "require-sigs", "true"),
        *("--option", "trusted-public-keys", public_key.read_text()),
    ]


def requiring(public_key: Path) -> list[str]:
    return ["--require-signatures", "--trusted-public-keys", public_key.read_text().strip()]


def verify(store: str) -> None:
    done = subprocess.run(
        [*APPLIANCE, "verify", "--store", store], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_nix_substitutes_a_path(served: Served, nix: Nix) -> None:
    # It is content-addressed, and needs no signature.
    said = nix.run(
        *("nix-store", "--store", nix.store, "--realise", served.path),
        *("--option", "substituters", served.server.url),
        *("--option", "trusted-public-keys", ""),
    )

    assert served.path in said.splitlines()
    same(served.tree, nix.copy_of(served.path))


def closure(nix: Nix) -> list[str]:
    """Make three derivation outputs, each referring to the one before it, without a build.

    The paths are input-addressed, so that only signatures vouch for them.
    """
    paths: list[str] = []
    registration = ""
    for number in range(3):
        path = f"/nix/store/{str(number) * 32}-item-{number}"
        where = nix.copy_of(path)
        make_tree(where)
        (where / "number").write_text(f"{number} {' '.join(paths[-1:])}")
        dump = nix.run("nix-hash", "--type", "sha256", where).strip()
        size = len(
            subprocess.run(
                ["nix-store", "--dump", str(where)], check=True, stdout=subprocess.PIPE
            ).stdout
        )
        references = paths[-1:]
        lines = [path, dump, str(size), "", str(len(references)), *references]
        registration += "\n".join(lines) + "\n"
        paths.append(path)
    subprocess.run(
        ["nix-store", "--store", nix.store, "--load-db"],
        check=True,
        input=registration,
        text=True,
        env=nix.environ,
    )
    return paths


@pytest.mark.parametrize(
    "compression",
    ["", "?compression=none", "?compression=zstd", "?compression=bzip2&write-nar-listing=true"],
)
def test_nix_copies_a_closure_there_and_back(
    tmp_path: Path, nix: Nix, keys: Path, compression: str
) -> None:
    paths = closure(nix)
    nix.run("nix", "store", "sign", "--store", nix.store, "-k", keys / "secret", "-r", paths[-1])
    store = f"lmdb://{tmp_path}/store"
    options = (
        "--allow-put",
        "--require-signatures",
        "--trusted-public-keys",
        (keys / "public").read_text().strip(),
    )
    with HttpProcess(("--store", store), tmp_path, *options) as server:
        url = f"{server.url}{compression}"
        nix.run("nix", "copy", "--from", nix.store, "--to", url, paths[-1])
        for path in paths:
            assert server.ask(f"/{Path(path).name[:32]}.narinfo").status == 200
        # Nothing of an upload is left beside what is in the store.
        assert open_files(server) == []

        (tmp_path / "other").mkdir()
        other = Nix(tmp_path / "other")
        copying = ("nix", "copy", "--from", server.url, "--to", other.store, paths[-1])
        refused = other.run(*copying, *trusting(keys / "other" / "public"), status=1)
        assert "lacks a valid signature" in refused or "signed by any of the keys" in refused
        other.run(*copying, *trusting(keys / "public"))
        for path in paths:
            same(nix.copy_of(path), other.copy_of(path))
    verify(store)
    assert list((tmp_path / "store" / "tmp").glob("*")) == []


def open_files(server: HttpProcess) -> list[str]:
    """Return the files without a name that a server has open, and that are in a file system."""
    links = Path(f"/proc/{server.process.pid}/fd").iterdir()
    found = []
    for link in links:
        with contextlib.suppress(FileNotFoundError):
            target = str(link.readlink())
            if int(link.name) > 2 and target.endswith("(deleted)"):
                found.append(target)
    return found


def test_unsigned_paths_are_refused_where_signatures_are_required(
    tmp_path: Path, nix: Nix, keys: Path
) -> None:
    paths = closure(nix)
    store = f"lmdb://{tmp_path}/store"
    options = (
        "--allow-put",
        "--require-signatures",
        "--trusted-public-keys",
        (keys / "public").read_text().strip(),
    )
    with HttpProcess(("--store", store), tmp_path, *options) as server:
        copying = ("nix", "copy", "--from", nix.store, "--to", server.url, paths[0])
        nix.run(*copying, status=1)
        assert server.ask(f"/{Path(paths[0]).name[:32]}.narinfo").status == 404
        # A content-addressed path needs none.
        added = nix.add(make_tree(tmp_path / "added"))
        nix.run("nix", "copy", "--from", nix.store, "--to", server.url, added)
        assert server.ask(f"/{Path(added).name[:32]}.narinfo").status == 200
    verify(store)


def test_services_of_a_daemon_are_served_too(tmp_path: Path, nix: Nix) -> None:
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path / "daemon") as daemon:
        services = [
            f"--{kind}-service-addr={daemon.unix_uri}"
            for kind in ("blob", "directory", "path-info")
        ]
        with HttpProcess(services, tmp_path / "http", "--allow-put") as server:
            tree = make_tree(tmp_path / "added")
            added = nix.add(tree)
            nix.run("nix", "copy", "--from", nix.store, "--to", server.url, added)
            (tmp_path / "other").mkdir()
            other = Nix(tmp_path / "other")
            other.run("nix", "copy", "--from", server.url, "--to", other.store, added)
            same(tree, other.copy_of(added))
            assert open_files(server) == []
            narinfo = parse_narinfo(server.ask(f"/{Path(added).name[:32]}.narinfo").body.decode())
            part = server.ask(f"/{narinfo.url}", headers={"Range": "bytes=1000-2000"})
            assert part.body == server.ask(f"/{narinfo.url}").body[1000:2001]
    verify(f"lmdb://{tmp_path}/store")
