"""A guest runs a program that only a binary cache of Nix has, and meets a cache that is wrong."""

import contextlib
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from vmharness.served import Served, serve

from tests.copier.nix_closure import Nix

ANSWER_S: Final = 120.0
KEY_NAME: Final = "cache-1"
# A program whose interpreter is in its closure, and three paths that cannot be had.
EXPRESSION: Final = """
let
  build = attributes: derivation ({
    system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  } // attributes // { args = [ "-c" attributes.script ]; });
  shell = build { name = "shell-1"; script = "mkdir -p $out/bin; cp /bin/busybox $out/bin/sh"; };
  words = build { name = "words-1"; script = "echo greeting=hello > $out"; };
  alone = name: build { inherit name; script = "echo $name > $out"; };
in [
  (build {
    name = "app-1"; inherit shell words;
    script = ''
      mkdir -p $out/bin
      printf '#!%s/bin/sh\\n. %s\\necho "$greeting from $0"\\n' $shell $words > $out/bin/app
      chmod 755 $out/bin/app
    '';
  })
  (alone "forged-1") (alone "spoiled-1") (alone "late-1")
]
"""


class Cache(NamedTuple):
    """A cache that Nix has made, and the paths in it."""

    directory: Path
    key: str
    app: str
    forged: str
    spoiled: str
    late: str

    def narinfo(self, path: str) -> Path:
        return self.directory / f"{Path(path).name[:32]}.narinfo"

    def nar(self, path: str) -> Path:
        lines = self.narinfo(path).read_text().splitlines()
        return self.directory / next(line[5:] for line in lines if line.startswith("URL: "))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    directory = tmp_path_factory.mktemp("nix")
    nix = Nix(directory / "root")
    nix.root.mkdir()
    (directory / "default.nix").write_text(EXPRESSION)
    built = nix.text("nix-build", "--no-out-link", directory / "default.nix").splitlines()
    secret, public = directory / "secret", directory / "public"
    subprocess.run(
        ["nix-store", "--generate-binary-cache-key", KEY_NAME, secret, public], check=True
    )
    nix.run("nix", "store", "sign", "-r", "-k", secret, *built)
    target = f"file://{directory}/cache?compression=zstd"
    nix.run("nix", "copy", "--no-check-sigs", "--to", target, *built)
    cache = Cache(directory / "cache", public.read_text().strip(), *built)
    forged = cache.narinfo(cache.forged)
    (signature,) = (line for line in forged.read_text().splitlines() if line.startswith("Sig:"))
    (other,) = (
        line
        for line in cache.narinfo(cache.late).read_text().splitlines()
        if line.startswith("Sig:")
    )
    forged.write_text(forged.read_text().replace(signature, other))
    shutil.copy(cache.nar(cache.late), cache.nar(cache.spoiled))
    return cache


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def web(cache: Cache) -> Iterator[http.server.ThreadingHTTPServer]:
    handler = partial(_Silent, directory=str(cache.directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            with contextlib.suppress(OSError):
                server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def served(
    cache: Cache,
    web: http.server.ThreadingHTTPServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    uri = f"nix+http://127.0.0.1:{web.server_port}?trusted-public-keys={cache.key}"
    with serve("uml", directory / "store", directory, "--substituter", uri) as served:
        served.guest.check("mkdir -p /nix/store", ANSWER_S)
        served.mount(at="/nix/store")
        yield served


def lines_about(served: Served, text: str) -> list[str]:
    return [line for line in served.server.log().splitlines() if text in line]


def test_a_program_that_only_the_cache_has_runs(served: Served, cache: Cache) -> None:
    program = f"{cache.app}/bin/app"
    assert served.guest.check(program, ANSWER_S).decode() == f"hello from {program}\n"
    assert lines_about(served, "WARNING") == []


def test_what_is_wrong_is_an_error_and_one_line_each(served: Served, cache: Cache) -> None:
    for path, text in (
        (cache.forged, f"path {cache.forged}: its signature by {KEY_NAME} is wrong"),
        (cache.spoiled, f"{cache.spoiled} cannot be had: "),
    ):
        ran = served.guest.run(f"cat {path}; cat {path}", ANSWER_S)
        assert (ran.status, ran.output.count(b"Input/output error")) == (1, 2)
        assert len(lines_about(served, text)) == 1
    absent = f"/nix/store/{'0' * 32}-absent"
    assert b"No such file" in served.guest.run(f"cat {absent}", ANSWER_S).output


def test_a_cache_that_is_down_is_one_line_and_what_came_from_it_still_runs(
    served: Served, cache: Cache, web: http.server.ThreadingHTTPServer
) -> None:
    web.shutdown()
    web.server_close()
    ran = served.guest.run(f"cat {cache.late}; cat {cache.late}", ANSWER_S)
    assert (ran.status, ran.output.count(b"Input/output error")) == (1, 2)
    assert len(lines_about(served, "Connection refused")) == 1
    program = f"{cache.app}/bin/app"
    assert served.guest.check(program, ANSWER_S).decode() == f"hello from {program}\n"
