"""Every program that shows metrics, each after it has done something.

One supervisor serves a local store, and the other one what a daemon serves of it. Each has answered
a guest. A binary cache serves the same store.
"""

import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.http_process import HttpProcess, get_over_unix
from tests.fakes.running_command import DEADLINE_S

SMALL: Final = b"small content"
LARGE: Final = os.urandom(100_000)
ACCEPT: Final = "application/openmetrics-text; version=1.0.0"
NUM_MISSING: Final = 3
_ROOT: Final = 1
_MISSING: Final = b"0123456789abcdfghijklmnpqrsvwxyz-missing"


class Served(NamedTuple):
    """The programs, and where the metrics of some of them are."""

    local: ApplianceProcess
    remote: ApplianceProcess
    daemon: DaemonProcess
    cache: HttpProcess
    url: str
    socket: Path
    daemon_url: str

    def local_text(self, accept: str = "") -> str:
        return get(self.url, accept)

    def remote_text(self) -> str:
        return get_over_unix(self.socket, "/metrics")

    def daemon_text(self, accept: str = "") -> str:
        return get(self.daemon_url, accept)

    def cache_text(self, accept: str = "text/plain") -> str:
        return get(f"{self.cache.url}/metrics", accept)

    def texts(self) -> list[str]:
        """Return all of it in the text format."""
        return [self.local_text(), self.remote_text(), self.daemon_text(), self.cache_text()]


@contextmanager
def serving(directory: Path) -> Iterator[Served]:
    """Run the programs for a block; what they keep is in `directory`."""
    tree = directory / "tree"
    tree.mkdir()
    (tree / "small").write_bytes(SMALL)
    (tree / "large").write_bytes(LARGE)
    store, theirs = directory / "store", directory / "remote"
    theirs.mkdir()
    (name,) = import_tree(store, tree)
    path = theirs / "metrics.sock"
    daemon_options = ("--metrics=:0", "--min-free=1K")
    uri = f"lmdb://{store}"
    with ExitStack() as stack:
        daemon = stack.enter_context(DaemonProcess(uri, theirs, options=daemon_options))
        local_options = ("--metrics=:0", "--min-free=1K")
        local = stack.enter_context(ApplianceProcess(store, directory, *local_options))
        remote = stack.enter_context(
            ApplianceProcess(
                daemon.unix_uri, theirs, f"--metrics={path}", f"--state-dir={theirs / 'state'}"
            )
        )
        for supervisor in (local, remote):
            _use(stack.enter_context(FakeGuest(supervisor.connect())), name)
        cache = stack.enter_context(HttpProcess(["--store", uri], theirs))
        digest = name.partition("-")[0]
        assert cache.ask(f"/{digest}.narinfo").status == 200
        urls = (_announced(local.log()), _announced(daemon.log()))
        yield Served(local, remote, daemon, cache, urls[0], path, urls[1])


def _use(guest: FakeGuest, name: str) -> None:
    guest.mount()
    top = guest.lookup(_ROOT, name.encode())
    small, large = guest.lookup(top, b"small"), guest.lookup(top, b"large")
    assert guest.ask(fuse_client.read(small, 0, 4096)).body == SMALL
    assert guest.ask(fuse_client.read(large, 0, 1 << 17), room=1 << 17).body == LARGE
    for _ in range(NUM_MISSING):
        assert guest.ask(fuse_client.getattr_(1 << 40)).error
    assert guest.ask(fuse_client.lookup(_ROOT, _MISSING)).error


def _announced(log: str) -> str:
    match = re.search(r"metrics are on (127\.0\.0\.1:\d+)", log)
    assert match, log
    return f"http://{match[1]}/metrics"


# --- Clients ---


def get(url: str, accept: str = "") -> str:
    """Return what a server answers with, given this header Accept."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as reply:
        text: str = reply.read().decode()
    return text


def parse_openmetrics(text: str) -> Iterator[Metric]:
    metrics: Iterator[Metric] = openmetrics.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return metrics


def values(metrics: Iterator[Metric], name: str) -> dict[tuple[str, ...], float]:
    """Return the samples called `name`, by the values of their labels other than `vm`."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "vm"): (
            sample.value
        )
        for metric in metrics
        for sample in metric.samples
        if sample.name == name
    }
