"""NARs, the HTTP cache and copies, each beside what users have otherwise, in one run.

`python -m tests.bench_nix [ROUNDS [PART...]]` prints one line per measurement: our time, that of
the other, and the median of the ratios of the rounds; PART is nars, http or copies. Both take
turns, so that what else the machine does falls on both. Processor time is that of the program and
of those that it waited for. Needs Nix; nginx is left out where it is not installed (Debian:
nginx-light).
"""

import getpass
import os
import random
import shutil
import socket as socket_module
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from appliance.nix.narinfo import parse_narinfo
from appliance.nix.store_path import encode_base32
from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.http_process import HttpProcess
from tests.fakes.running_command import APPLIANCE, every_event

NUM_FILES = 17_000
NUM_PATHS = 46
# For copies: about as much as a small NixOS system.
NUM_COPIED = 200
FILES_OF_COPIED = 200
NUM_NEW = 20
FILES_OF_PATH = 500
MEAN_SIZE = 11_000
DEADLINE_S = 30.0
NGINX_CONFIGURATION = """
user {user}; worker_processes 2; pid {directory}/pid; error_log {directory}/error.log; daemon off;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; tcp_nopush on;
  client_body_temp_path {directory}/t; proxy_temp_path {directory}/t;
  fastcgi_temp_path {directory}/t; uwsgi_temp_path {directory}/t; scgi_temp_path {directory}/t;
  server {{ listen unix:{directory}/socket; listen 127.0.0.1:{port}; root {directory}/cache; }}
}}
"""


class Spent(NamedTuple):
    """Seconds on the clock, and of processors, in child processes that have ended."""

    elapsed_s: float
    processor_s: float


NIX_CONFIGURATION = "experimental-features = nix-command\nbuild-users-group =\n"


def timed(work: Callable[[], object]) -> Spent:
    started_s, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    used = after.children_user + after.children_system
    used_before = before.children_user + before.children_system
    return Spent(time.perf_counter() - started_s, used - used_before)


def compare(
    what: str, ours: Callable[[], object], other: Callable[[], object], rounds: int
) -> None:
    """Run both in turns; print the medians of their times, and of the ratios."""
    print_pairs(what, [(timed(ours), timed(other)) for _ in range(rounds)])


def print_pairs(what: str, pairs: Sequence[tuple[Spent, Spent]]) -> None:
    for name, field in (("time", 0), ("processor", 1)):
        first, second = (
            statistics.median(each[field] for each in side) for side in zip(*pairs, strict=True)
        )
        ratio = statistics.median(mine[field] / max(theirs[field], 0.01) for mine, theirs in pairs)
        print(f"{what}: {name} {first:.2f} s, {second:.2f} s, ratio {ratio:.2f}", flush=True)


def make_files(directory: Path, number: int, seed: int) -> Path:
    generator = random.Random(seed)
    for index in range(number):
        path = directory / f"d{index % max(number // 50, 1)}"
        path.mkdir(parents=True, exist_ok=True)
        size = int(generator.expovariate(1 / MEAN_SIZE))
        (path / f"f{index}").write_bytes(generator.randbytes(size))
    return directory


# --- NARs ---


def bench_nars(directory: Path, rounds: int) -> None:
    tree = make_files(directory / "tree", NUM_FILES, 1)
    (name,) = import_tree(directory / "store", tree)
    ours = [*APPLIANCE, "nar", "--store", f"lmdb://{directory}/store", name]
    other = ["nix-store", "--dump", str(tree)]
    target = directory / "out"

    def into_file(command: Sequence[str]) -> None:
        with target.open("wb") as file:
            subprocess.run(command, check=True, stdout=file)

    def into_pipe(command: Sequence[str]) -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            subprocess.run(["cat"], check=True, stdin=process.stdout, stdout=subprocess.DEVNULL)

    def into_nothing(command: Sequence[str]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    for where, run in (("file", into_file), ("pipe", into_pipe), ("/dev/null", into_nothing)):
        compare(
            f"nar of {NUM_FILES} files into a {where}, nix-store --dump",
            lambda run=run: run(ours),  # type: ignore[misc]
            lambda run=run: run(other),  # type: ignore[misc]
            rounds,
        )
    target.unlink()
    shutil.rmtree(tree)


# --- The HTTP cache ---


def download(socket: Path, names: Sequence[str]) -> None:
    """Fetch narinfos and NARs, eight at a time."""
    urls = [word for name in names for word in (f"http://x/{name}", "-o", "/dev/null")]
    command = ["curl", "--fail", "--no-progress-meter", "--unix-socket", str(socket)]
    subprocess.run([*command, "--parallel", "--parallel-max", "8", *urls], check=True)


@contextmanager
def nginx(directory: Path, port: int) -> Iterator[Path]:
    (directory / "t").mkdir()
    configuration = directory / "nginx.conf"
    text = NGINX_CONFIGURATION.format(directory=directory, user=getpass.getuser(), port=port)
    configuration.write_text(text)
    process = subprocess.Popen(["nginx", "-c", configuration])
    try:
        for _ in every_event(DEADLINE_S):
            if (directory / "socket").is_socket():
                break
        yield directory / "socket"
    finally:
        process.terminate()
        process.wait()


def bench_http(directory: Path, rounds: int) -> None:
    """Fetch a closure with curl, which drops what it gets, and with Nix, which unpacks it.

    Both servers send the same bytes: NARs that are not compressed.
    """
    if shutil.which("nginx") is None:
        print("nginx is not installed: the HTTP cache was not measured")
        return
    trees = [make_files(directory / f"path{n}", FILES_OF_PATH, n) for n in range(NUM_PATHS)]
    paths = import_tree(directory / "store", *trees)
    for tree in trees:
        shutil.rmtree(tree)
    narinfos = [f"{path[:32]}.narinfo" for path in paths]
    cache = directory / "nginx" / "cache"
    (cache / "nar").mkdir(parents=True)
    store = ("--store", f"lmdb://{directory}/store")
    with HttpProcess(store, directory / "http", "--zstd-level=0") as server:
        (cache / "nix-cache-info").write_bytes(server.ask("/nix-cache-info").body)
        narinfo_of = {
            name: parse_narinfo(server.ask(f"/{name}").body.decode()) for name in narinfos
        }
        for name, narinfo in narinfo_of.items():
            nar = f"nar/{encode_base32(narinfo.nar_hash.digest)}.nar"
            (cache / nar).write_bytes(server.ask(f"/{narinfo.url}").body)
            (cache / name).write_text(str(narinfo._replace(url=nar)))
        ours = [*narinfos, *(narinfo.url for narinfo in narinfo_of.values())]
        theirs = [*narinfos, *(f"nar/{path.name}" for path in (cache / "nar").iterdir())]
        what = f"a closure of {NUM_PATHS} paths over HTTP"
        port = free_port()
        with nginx(directory / "nginx", port) as socket:
            compare(
                f"{what} to curl, nginx with prepared files",
                lambda: download(server.socket, ours),
                lambda: download(socket, theirs),
                rounds,
            )
            first_times(directory, store, what, (ours, theirs), socket, rounds)
            compare(
                f"{what} to Nix, nginx with prepared files",
                lambda: fetch_with_nix(directory, server.url, paths),
                lambda: fetch_with_nix(directory, f"http://127.0.0.1:{port}", paths),
                rounds,
            )


def first_times(
    directory: Path,
    store: tuple[str, str],
    what: str,
    names: tuple[Sequence[str], Sequence[str]],
    nginx_socket: Path,
    rounds: int,
) -> None:
    """Fetch what the server has not sent since it started, so that it checks all of it."""
    ours, theirs = names
    ratios = []
    for number in range(rounds):
        with HttpProcess(store, directory / f"http{number}", "--zstd-level=0") as server:
            first = timed(lambda server=server: download(server.socket, ours))  # type: ignore[misc]
        other = timed(lambda: download(nginx_socket, theirs))
        ratios.append(first.elapsed_s / other.elapsed_s)
    print(f"{what} to curl, for the first time: ratio {statistics.median(ratios):.2f}", flush=True)


def free_port() -> int:
    with socket_module.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def fetch_with_nix(directory: Path, url: str, paths: Sequence[str]) -> None:
    """Copy into a new store of Nix."""
    root = directory / "fetched"
    shutil.rmtree(root, ignore_errors=True)
    home = directory / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    subprocess.run(
        [
            *("nix", "copy", "--from", url, "--to", f"local?root={root}", "--no-check-sigs"),
            *(f"/nix/store/{path}" for path in paths),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home), "NIX_CONFIG": NIX_CONFIGURATION},
    )


# --- Copies ---


def copy(source: str, target: str, paths: Sequence[str]) -> None:
    command = [*APPLIANCE, "copy", "--store", target, "--from", source, *paths]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def bench_copies(directory: Path, rounds: int) -> None:
    """Copy closures out of a store of Nix; the second one shares 90 % of the first."""
    root = directory / "nix"
    trees = [
        make_files(directory / f"path{n}", FILES_OF_COPIED, n) for n in range(NUM_COPIED + NUM_NEW)
    ]
    added = subprocess.run(
        ["nix-store", "--store", f"local?root={root}", "--add", *trees],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HOME": str(directory), "NIX_CONFIG": NIX_CONFIGURATION},
    )
    for tree in trees:
        shutil.rmtree(tree)
    paths = added.stdout.split()
    source = f"local?root={root}"
    first, second = paths[:NUM_COPIED], paths[NUM_NEW:]
    store = directory / "copied"

    def first_copy() -> None:
        shutil.rmtree(store, ignore_errors=True)
        copy(source, f"lmdb://{store}", first)

    what = f"copy of {NUM_COPIED} paths of which {NUM_NEW} are new, copy of all of them"
    pairs = []
    for _ in range(rounds):
        shutil.rmtree(store, ignore_errors=True)
        before = timed(lambda: copy(source, f"lmdb://{store}", first))
        pairs.append((timed(lambda: copy(source, f"lmdb://{store}", second)), before))
    print_pairs(what, pairs)
    served = directory / "served"

    def copy_to_daemon() -> None:
        shutil.rmtree(served, ignore_errors=True)
        with DaemonProcess(f"lmdb://{served}", directory / "daemon") as daemon:
            copy(source, daemon.unix_uri, first)

    compare("copy into a daemon, into a local store", copy_to_daemon, first_copy, rounds)


def main() -> None:
    """Run what was asked for."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    benches = {"nars": bench_nars, "http": bench_http, "copies": bench_copies}
    with tempfile.TemporaryDirectory(prefix="bench-nix-") as name:
        for part in sys.argv[2:] or benches:
            directory = Path(name) / part
            directory.mkdir()
            benches[part](directory, rounds)
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
