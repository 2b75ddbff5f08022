"""Recordings: what becomes of them at their end, when they are killed, and at their bounds."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from appliance.bounds import RECORDED_BYTES_MAX
from appliance.castore.digest import Digest
from appliance.errors import StoreError
from appliance.store import recording as recording_module
from appliance.store.profiles import (
    Profile,
    ProfiledBlob,
    ProfiledDirectory,
    ProfiledPath,
    Profiles,
)
from appliance.store.recording import Recording

NAME = b"5ndavkqr4ai2xn3pkdl1blgmnqmn4wlq-hello-2.12"
DIGESTS = [Digest.of(b"%d" % number) for number in range(20)]
LARGE = 100 << 20


@pytest.fixture
def profiles(tmp_path: Path) -> Profiles:
    return Profiles(tmp_path)


def begun(profiles: Profiles, *, goes_on: bool = False) -> Recording:
    return Recording.begin(profiles, "boot", goes_on=goes_on)


def note_directories(recording: Recording, digests: list[Digest]) -> None:
    for digest in digests:
        recording.note_directory(digest, time.monotonic_ns())


def digests_of(profile: Profile) -> list[Digest]:
    return [read.digest for read in profile.reads if isinstance(read, ProfiledDirectory)]


def test_a_recording_becomes_the_profile_at_its_end(profiles: Profiles) -> None:
    profiles.write("boot", Profile((ProfiledDirectory(0, DIGESTS[9]),)))
    recording = begun(profiles)
    recording.note_path(NAME)
    recording.note_path(b".registration")  # of a view; it is no store path
    recording.note_directory(DIGESTS[0], time.monotonic_ns())
    recording.note_blob(DIGESTS[1], 5000, 0, 262144, time.monotonic_ns())
    recording.note_blob(DIGESTS[2], LARGE, 262144, 524288, time.monotonic_ns())
    recording.note_blob(DIGESTS[2], LARGE, 262144, 524288, time.monotonic_ns())
    # Until then, the profile is what it was.
    assert digests_of(profiles.read("boot")) == [DIGESTS[9]]
    recording.finish()
    reads = [read._replace(at_ms=0) for read in profiles.read("boot").reads]
    assert reads == [
        ProfiledPath(0, NAME.decode()),
        ProfiledDirectory(0, DIGESTS[0]),
        ProfiledBlob(0, DIGESTS[1], 5000, 0, 5000),
        ProfiledBlob(0, DIGESTS[2], LARGE, 262144, 524288),
    ]
    assert [path.name for path in profiles.directory.iterdir()] == ["boot"]


def test_reads_of_several_workers_are_in_the_order_of_their_times(profiles: Profiles) -> None:
    recording = begun(profiles)
    now_ns = time.monotonic_ns()
    for digest, read_ns in zip(DIGESTS, (50, 10, 30), strict=False):
        with mock.patch.object(time, "monotonic_ns", return_value=now_ns + 100_000_000):
            recording.note_directory(digest, now_ns + read_ns * 1_000_000)
    recording.finish()
    assert digests_of(profiles.read("boot")) == [DIGESTS[1], DIGESTS[2], DIGESTS[0]]


def test_a_recording_of_nothing_leaves_the_profile_as_it_was(profiles: Profiles) -> None:
    profiles.write("boot", Profile((ProfiledDirectory(0, DIGESTS[9]),)))
    begun(profiles).finish()
    assert digests_of(profiles.read("boot")) == [DIGESTS[9]]


def test_what_is_no_read_is_left_out(profiles: Profiles) -> None:
    recording = begun(profiles)
    recording.note_directory(b"short", 0)
    recording.note_blob(b"short", 5000, 0, 5000, 0)
    recording.note_blob(DIGESTS[0], LARGE, LARGE + 262144, LARGE + 524288, 0)
    recording.note_blob(DIGESTS[0], 2**64 - 1, 0, 262144, 0)
    recording.note_blob(DIGESTS[0], 0, 0, 262144, 0)
    recording.note_directory(DIGESTS[0], 2**64 - 1)  # a time that has not come yet
    recording.finish()
    (read,) = profiles.read("boot").reads
    assert read.at_ms < 10_000


def test_two_processes_do_not_record_one_profile(profiles: Profiles) -> None:
    recording = begun(profiles)
    with pytest.raises(StoreError, match="another process records it"):
        begun(profiles)
    recording.finish()
    begun(profiles).finish()


_RECORDER = """
import sys, time
from pathlib import Path
from appliance.castore.digest import Digest
from appliance.store.profiles import Profiles
from appliance.store.recording import Recording
recording = Recording.begin(Profiles(Path(sys.argv[1])), "boot", goes_on=False)
for number in range(10**9):
    recording.note_directory(Digest.of(b"%d" % number), time.monotonic_ns())
    if number == 10: print("under way", flush=True)
"""


@contextmanager
def killed_recorder(directory: Path) -> Iterator[None]:
    """Record the digests in `DIGESTS` and more, and be killed in the midst of that."""
    command = [sys.executable, "-c", _RECORDER, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"under way\n"
        process.send_signal(signal.SIGKILL)
    yield


def test_what_a_killed_process_has_recorded_is_the_profile(profiles: Profiles) -> None:
    profiles.write("boot", Profile((ProfiledDirectory(0, DIGESTS[9]),)))
    with killed_recorder(profiles.directory.parent):
        assert profiles.names() == ["boot"]
        assert digests_of(profiles.read("boot"))[:10] == DIGESTS[:10]
    # The next one begins anew, and what was recorded stays until its end.
    recording = begun(profiles)
    assert digests_of(profiles.read("boot"))[:10] == DIGESTS[:10]
    note_directories(recording, DIGESTS[15:])
    recording.finish()
    assert digests_of(profiles.read("boot")) == DIGESTS[15:]


def test_a_recording_goes_on_after_a_kill_if_its_session_does(profiles: Profiles) -> None:
    with killed_recorder(profiles.directory.parent):
        before = digests_of(profiles.read("boot"))
    recording = begun(profiles, goes_on=True)
    new = Digest.of(b"new")
    note_directories(recording, [*DIGESTS[:3], new])
    recording.finish()
    assert digests_of(profiles.read("boot")) == [*before, new]


def test_a_recording_that_was_cut_off_anywhere_is_usable(profiles: Profiles) -> None:
    recording = begun(profiles)
    note_directories(recording, DIGESTS[:3])
    recording.leave()
    path = profiles.recording_path("boot")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        recording = begun(profiles, goes_on=True)
        note_directories(recording, DIGESTS[3:4])
        recording.leave()
        num_whole = max(0, whole[:length].count(b"\n") - 1)
        assert digests_of(profiles.read("boot")) == [*DIGESTS[:num_whole], DIGESTS[3]]


def test_a_full_disk_ends_a_recording_and_leaves_whole_lines(profiles: Profiles) -> None:
    recording = begun(profiles)
    note_directories(recording, DIGESTS[:5])
    size = profiles.recording_path("boot").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(StoreError):
            note_directories(recording, DIGESTS[5:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    recording.leave()
    assert digests_of(profiles.read("boot")) == DIGESTS[:5]


def test_a_recording_has_a_bounded_number_of_reads(
    profiles: Profiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "RECORDED_MAX", 10)
    recording = begun(profiles)
    note_directories(recording, DIGESTS)
    recording.finish()
    assert digests_of(profiles.read("boot")) == DIGESTS[:10]


def test_a_recording_covers_a_bounded_number_of_bytes(profiles: Profiles) -> None:
    recording = begun(profiles)
    size = RECORDED_BYTES_MAX
    recording.note_blob(DIGESTS[0], size, 0, size, time.monotonic_ns())
    recording.note_blob(DIGESTS[1], 1, 0, 1, time.monotonic_ns())
    recording.note_directory(DIGESTS[2], time.monotonic_ns())
    recording.finish()
    assert profiles.read("boot").num_bytes == RECORDED_BYTES_MAX


def test_a_recording_needs_a_place_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("not a directory")
    with pytest.raises(StoreError, match=os.fspath(tmp_path)):
        begun(Profiles(tmp_path))
