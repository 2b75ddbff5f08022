"""Every way of copying brings a closure of Nix along as it is, and `verify` finds nothing wrong."""

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import Nix, NixClosure
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE

pytestmark = pytest.mark.slow


def test_from_the_database_of_nix(closure: NixClosure, store: CopiedStore) -> None:
    ran = store.run("copy", "--from", closure.nix.uri, "-r", *closure.tops)
    assert sorted(ran.lines) == sorted(closure.closure)
    store.check_equals(closure, closure.closure)


def test_nar_is_what_nix_dumps(closure: NixClosure, store: CopiedStore) -> None:
    store.run("copy", "--from", closure.nix.uri, "-r", closure.tops[0])
    for path in closure.built:
        command = [*APPLIANCE, "nar", "--store", store.uri, path]
        nar = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        assert nar == closure.nix.dump(path)


def test_derivations_and_what_they_need(closure: NixClosure, store: CopiedStore) -> None:
    deriver = closure.nix.text("nix-store", "--query", "--deriver", closure.tops[0])
    store.run("copy", "--from", closure.nix.uri, "-r", deriver)
    paths = closure.nix.text("nix-store", "--query", "--requisites", deriver).split()
    assert any(path.endswith("-lib-1.0.drv") for path in paths)
    store.check_equals(closure, paths)


def test_a_path_that_is_a_symlink(closure: NixClosure, store: CopiedStore, tmp_path: Path) -> None:
    nix = Nix(tmp_path / "root")
    shutil.copytree(closure.nix.root, nix.root, symlinks=True)
    (tmp_path / "link").symlink_to("no where")
    path = nix.text("nix-store", "--add", tmp_path / "link")
    store.run("copy", "--from", nix.uri, path)
    store.check_equals(closure._replace(nix=nix), [path])


def test_what_directories_count(closure: NixClosure, store: CopiedStore) -> None:
    documented = CopiedStore(f"{store.uri}-documented")
    words = ["--from", closure.nix.uri, "-r", closure.tops[0]]
    documented.run("copy", "--directory-sizes", "documented", *words)
    documented.check_equals(closure, closure.built)
    # The same paths, of nodes that count in another way.
    assert store.run("copy", "--from", documented.uri, "-r", closure.tops[0]).lines
    store.check_equals(closure, closure.built)


def test_an_import_names_the_command(closure: NixClosure, store: CopiedStore) -> None:
    path = closure.tops[0]
    ran = store.run("import", closure.nix.directory / Path(path).name, status=1)
    assert ran.errors.endswith(f"use: appliance copy {path}\n")


def test_what_refers_to_a_path_comes_after_it(closure: NixClosure, store: CopiedStore) -> None:
    ran = store.run("copy", "--from", str(closure.nix.root), "-r", *closure.tops)
    infos = closure.nix.path_infos(*closure.closure)
    for index, path in enumerate(ran.lines):
        assert set(infos[path]["references"]) <= {*ran.lines[: index + 1]}


@pytest.mark.parametrize("compression", ["none", "xz", "zstd", "gzip", "bzip2"])
def test_from_a_cache_in_a_directory(
    closure: NixClosure, store: CopiedStore, tmp_path: Path, compression: str
) -> None:
    uri = closure.cache(tmp_path / "cache", compression)
    (narinfo, *_) = (tmp_path / "cache").glob("*.narinfo")
    assert f"Compression: {compression}\n" in narinfo.read_text()
    keys = ["--trusted-public-keys", closure.public_key]
    store.run("copy", "--from", uri, *keys, "-r", *closure.tops)
    store.check_equals(closure, closure.closure)


@contextmanager
def served(directory: Path) -> Iterator[str]:
    handler = partial(Silent, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


def test_from_a_cache_behind_http(closure: NixClosure, store: CopiedStore, tmp_path: Path) -> None:
    closure.cache(tmp_path / "cache", "zstd")
    with served(tmp_path / "cache") as uri:
        # A plus sign in the base 64 of a key stands for itself.
        source = f"{uri}?trusted-public-keys={closure.public_key}"
        store.run("copy", "--from", source, "-r", *closure.tops)
    store.check_equals(closure, closure.closure)


def test_from_another_store(closure: NixClosure, store: CopiedStore, tmp_path: Path) -> None:
    first = CopiedStore(f"lmdb://{tmp_path}/first")
    first.run("copy", "--from", closure.nix.uri, "-r", *closure.tops)
    store.run("copy", "--from", first.uri, "-r", *closure.tops)
    store.check_equals(closure, closure.closure)


# Of these two, the second takes blobs one by one only.
@pytest.mark.parametrize("kind", ["lmdb", "memory"])
def test_into_and_from_a_daemon(
    closure: NixClosure, store: CopiedStore, tmp_path: Path, kind: str
) -> None:
    uri = {"lmdb": f"lmdb://{tmp_path}/served", "memory": "memory:"}[kind]
    with DaemonProcess(uri, tmp_path) as daemon:
        served = CopiedStore(daemon.unix_uri)
        served.run("copy", "--from", closure.nix.uri, "-r", *closure.tops)
        store.run("copy", "--from", daemon.unix_uri, "-r", *closure.tops)
    store.check_equals(closure, closure.closure)


def as_map(infos: dict[str, dict[str, Any]]) -> object:
    """Return what Nix 2.34 prints: a map, with the content address as text."""
    return {path: {**info, "path": path} for path, info in infos.items()}


def as_info(infos: dict[str, dict[str, Any]]) -> object:
    """Return the newest form: base names, and the content address as an object."""

    def content_address(text: str) -> object:
        _fixed, _, rest = text.partition(":")
        if text.startswith("text:"):
            return {"method": "text", "hash": rest}
        method = "nar" if rest.startswith("r:") else "flat"
        return {"method": method, "hash": rest.removeprefix("r:")}

    def entry(info: dict[str, Any]) -> object:
        found = {**info, "references": [Path(path).name for path in info["references"]]}
        if "deriver" in info:
            found["deriver"] = Path(info["deriver"]).name
        if "ca" in info:
            found["ca"] = content_address(info["ca"])
        return found

    found = {Path(path).name: entry(info) for path, info in infos.items()}
    return {"info": found, "storeDir": "/nix/store", "version": 2}


@pytest.mark.parametrize("form", ["list", "map", "info"])
def test_from_the_output_of_path_info(closure: NixClosure, store: CopiedStore, form: str) -> None:
    infos = closure.nix.path_infos(*closure.closure)
    forms = {"list": list(infos.values()), "map": as_map(infos), "info": as_info(infos)}
    data = json.dumps(forms[form]).encode()
    store.run("copy", "--from", closure.nix.uri, "--path-info-json", "-", data=data)
    store.check_equals(closure, closure.closure)


def attributes(closure: NixClosure, file: Path) -> Path:
    """Write what a derivation finds that has structured attributes with a graph of references."""
    infos = closure.nix.path_infos(*closure.closure)
    kept = ("path", "narHash", "narSize", "references", "ca")
    graph = [
        {**{name: info[name] for name in kept if name in info}, "valid": True, "closureSize": 1}
        for info in infos.values()
    ]
    graphs = {"exportReferencesGraph": {"graph": closure.tops}, "graph": graph, "name": "it"}
    file.write_text(json.dumps(graphs))
    return file


@pytest.mark.parametrize("is_named_by_variable", [False, True])
def test_from_structured_attributes(
    closure: NixClosure, store: CopiedStore, tmp_path: Path, *, is_named_by_variable: bool
) -> None:
    file = attributes(closure, tmp_path / ".attrs.json")
    words = ["copy", "--from", closure.nix.uri]
    if is_named_by_variable:
        store.run(*words, environ={"NIX_ATTRS_JSON_FILE": str(file)})
    else:
        store.run(*words, file)
    store.check_equals(closure, closure.closure, without=["deriver", "signatures"])


def test_paths_from_standard_input(closure: NixClosure, store: CopiedStore) -> None:
    data = "\n".join(closure.tops).encode()
    store.run("copy", "--from", closure.nix.uri, "-r", "--stdin", data=data)
    store.check_equals(closure, closure.closure)


def test_from_an_export_of_nix_store(closure: NixClosure, store: CopiedStore) -> None:
    paths = closure.nix.text("nix-store", "--query", "--requisites", *closure.tops).split()
    export = closure.nix.run("nix-store", "--export", *paths)
    ran = store.run("copy", "--import", "-", data=export)
    assert sorted(ran.lines) == sorted(closure.closure)
    store.check_equals(closure, closure.closure, without=["ca", "signatures"])
    # What is there already is left alone.
    assert store.run("copy", "--import", "-", data=export).lines == []


def test_what_is_known_by_a_path_to_it(
    closure: NixClosure, store: CopiedStore, tmp_path: Path
) -> None:
    (tmp_path / "result").symlink_to(closure.tops[0])
    within = closure.nix.directory / Path(closure.named("app-2.0")).name / "bin" / "app"
    base_name = Path(closure.tops[1]).name
    link = tmp_path / "result"
    store.run("copy", "--from", closure.nix.uri, "-r", link, within, base_name)
    store.check_equals(closure, [*closure.built, closure.tops[1]])
