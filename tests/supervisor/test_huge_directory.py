"""A directory with a million entries does not make any process grow."""

from pathlib import Path
from typing import Final

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.hostile_guest import descendants
from tests.fakes.huge_directory import fill_with_huge_directory
from tests.fs.guest import basename

pytestmark = pytest.mark.slow

NUM: Final = 1_000_000
REPLY_BYTES: Final = 1 << 20
LIMIT_BYTES: Final = 200 << 20


def own_peak_bytes(pid: int) -> int:
    """Return the peak memory of a process, without file mappings and shared memory."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    in_kib = {name: int(status[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem")}
    return (in_kib["VmHWM"] - in_kib["RssFile"] - in_kib["RssShmem"]) << 10


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("huge") / "store"
    fill_with_huge_directory(path, NUM)
    return path


def test_it_is_listed_and_looked_into_by_processes_that_stay_small(
    store: Path, tmp_path: Path
) -> None:
    with (
        ApplianceProcess(store, tmp_path) as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        top = guest.lookup(fuse_client.ROOT, basename("huge"))
        num, cookie, last = 0, 2, b""
        while True:
            request = fuse_client.readdirplus(top, cookie, REPLY_BYTES)
            entries = fuse_client.parse_direntplus(guest.ask(request, room=REPLY_BYTES).body)
            if not entries:
                break
            assert entries[0][1].name > last
            assert entries[0][0].nodeid == top + 1 + num
            num += len(entries)
            cookie, last = entries[-1][1].off, entries[-1][1].name
        assert num == NUM
        for number in range(0, NUM, NUM // 500):
            assert guest.lookup(top, b"%07d" % number) == top + 1 + number
            target = guest.ask(fuse_client.readlink(top + 1 + number))
            assert target.body == b"x"
        assert guest.ask(fuse_client.getattr_(top + NUM + 1)).error
        pids = {appliance.process.pid, *descendants(appliance.process.pid)}
        assert len(pids) >= 3
        assert max(map(own_peak_bytes, pids)) < LIMIT_BYTES
