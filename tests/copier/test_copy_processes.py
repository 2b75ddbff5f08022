"""What a copy shows, and what is left of one that ends in the middle."""

import http.server
import os
import pty
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import NixClosure
from tests.fakes.running_command import APPLIANCE

pytestmark = pytest.mark.slow


class FlakyCache:
    """A cache behind HTTP that does to some requests what a test says."""

    def __init__(self, directory: Path) -> None:
        self.requests: list[str] = []
        # What is answered to a path, instead of its file; each answer once.
        self.answers: dict[str, list[int]] = {}
        # Paths whose answer never comes.
        self.hanging: set[str] = set()
        self.was_reached = threading.Event()
        self.is_over = threading.Event()
        cache = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(directory))

            def do_GET(self) -> None:
                cache.requests.append(self.path)
                if self.path in cache.hanging:
                    cache.was_reached.set()
                    cache.is_over.wait()
                elif cache.answers.get(self.path):
                    self.send_error(cache.answers[self.path].pop(0))
                else:
                    super().do_GET()

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def cache(closure: NixClosure, tmp_path: Path) -> Iterator[FlakyCache]:
    closure.cache(tmp_path / "cache", "none")
    cache = FlakyCache(tmp_path / "cache")
    yield cache
    cache.close()


def nar_url(directory: Path, path: str) -> str:
    narinfo = (directory / "cache" / f"{Path(path).name[:32]}.narinfo").read_text()
    return "/" + narinfo.split("URL: ")[1].split("\n")[0]


def test_a_server_that_is_busy_is_asked_again(
    closure: NixClosure, store: CopiedStore, cache: FlakyCache, tmp_path: Path
) -> None:
    url = nar_url(tmp_path, closure.named("app-2.0"))
    cache.answers = {"/nix-cache-info": [503], url: [500, 503]}
    words = ["--from", cache.uri, "--no-check-sigs", "-r", *closure.tops]
    store.run("copy", *words)
    assert cache.requests.count(url) == 3
    store.check_equals(closure, closure.closure)


def test_a_server_that_fails_for_one_path(
    closure: NixClosure, store: CopiedStore, cache: FlakyCache, tmp_path: Path
) -> None:
    lib = closure.named("lib-1.0")
    url = nar_url(tmp_path, lib)
    cache.answers = {url: [500] * 10}
    words = ["--from", cache.uri, "--no-check-sigs", "-r", closure.named("named"), lib]
    ran = store.run("copy", *words, status=1)
    assert f"path {lib}: {cache.uri}{url}: 500 " in ran.errors
    assert ran.lines == [closure.named("named")]


def test_present_paths_are_not_asked_for(
    closure: NixClosure, store: CopiedStore, cache: FlakyCache
) -> None:
    store.run("copy", "--from", closure.nix.uri, "-r", *closure.tops)
    store.run("copy", "--from", cache.uri, "-r", *closure.tops)
    assert cache.requests == ["/nix-cache-info"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_copy_that_ends_in_the_middle_leaves_what_is_complete(
    closure: NixClosure,
    store: CopiedStore,
    cache: FlakyCache,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    cache.hanging = {nar_url(tmp_path, closure.named("app-2.0"))}
    words = ["copy", "--store", store.uri, "--from", cache.uri, "--no-check-sigs", "-r"]
    process = subprocess.Popen([*APPLIANCE, *words, *closure.tops], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, process.stdout:
        assert cache.was_reached.wait(60)
        process.send_signal(number)
        # It does not wait for the server.
        assert process.wait(20) == -number
    infos = store.path_infos()
    for info in infos.values():
        assert {*info["references"]} <= {*infos}
    store.run("verify")
    cache.hanging.clear()
    store.run("copy", "--from", cache.uri, "--no-check-sigs", "-r", *closure.tops)
    store.check_equals(closure, closure.closure)
    directory = Path(store.uri.removeprefix("lmdb://"))
    assert [path for path in (directory / "tmp").rglob("*") if path.is_file()] == []


def test_progress_on_a_terminal(closure: NixClosure, store: CopiedStore, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.write_bytes(closure.nix.run("nix-store", "--export", *closure.built))
    for source in (["--from", closure.nix.uri, "-r", closure.tops[1]], ["--import", str(export)]):
        master, terminal = pty.openpty()
        command = [*APPLIANCE, "copy", "--store", store.uri, *source]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=True)
        os.close(terminal)
        shown = b""
        while True:
            try:
                shown += os.read(master, 4096)
            except OSError:
                break
        os.close(master)
        # The line is removed before anything else is printed.
        last = shown.decode().rpartition("\x1b[K")[2]
        assert last.startswith(f"copied {len(done.stdout.splitlines())} paths, ")
        if "--import" in source:
            assert "files, 0.2 MB, " in shown.decode()


def test_a_reader_that_is_gone(
    closure: NixClosure, store: CopiedStore, cache: FlakyCache, tmp_path: Path
) -> None:
    # When the first path is printed another one is under way.
    cache.answers = {nar_url(tmp_path, closure.named("app-2.0")): [503, 503]}
    words = ["copy", "--store", store.uri, "--from", cache.uri, "--no-check-sigs", "-r"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*APPLIANCE, *words, *closure.tops],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    store.run("verify")
