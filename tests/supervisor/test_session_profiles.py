"""Sessions that are recorded, and profiles that are played for them, in the real processes."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.castore.digest import Digest
from appliance.store.profiles import (
    Profile,
    ProfiledBlob,
    ProfiledDirectory,
    ProfiledPath,
    Profiles,
)
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree, uri_of
from tests.fakes.fuse_client import ROOT
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.fakes.scripted_services import ScriptedServices
from tests.fs.guest import File, Model

pytestmark = pytest.mark.slow

CONTENTS = {b"%03d" % number: b"content of %d" % number for number in range(100)}
READ = [b"042", b"007", b"099", b"000"]
LARGE = os.urandom(3 << 20)
MODEL: Model = {
    b"large": File(LARGE),
    b"sub": {name: File(content) for name, content in CONTENTS.items()},
}


class Recorder:
    """A local store with one path, and what a guest reads of it."""

    def __init__(self, directory: Path) -> None:
        tree = directory / "tree"
        (tree / "sub").mkdir(parents=True)
        for name, content in CONTENTS.items():
            (tree / "sub" / os.fsdecode(name)).write_bytes(content)
        (tree / "large").write_bytes(LARGE)
        self.store = directory / "store"
        (self.base,) = import_tree(self.store, tree)
        self.profiles = Profiles(self.store)

    def read_by(self, guest: FakeGuest, names: list[bytes]) -> None:
        """Read files, and a few bytes in the middle of the large one."""
        top = guest.lookup(ROOT, self.base.encode())
        sub = guest.lookup(top, b"sub")
        for name in names:
            answer = guest.ask(fuse_client.read(guest.lookup(sub, name), 0, 4096))
            assert answer.body == CONTENTS[name]
        large = guest.lookup(top, b"large")
        assert len(guest.ask(fuse_client.read(large, 1 << 20, 100)).body) == 100

    def check(self, profile: Profile, names: list[bytes]) -> None:
        blobs = [read for read in profile.reads if isinstance(read, ProfiledBlob)]
        large = ProfiledBlob(
            blobs[-1].at_ms, Digest.of(LARGE), len(LARGE), 1 << 20, (1 << 20) + (1 << 18)
        )
        assert [read.digest for read in blobs[:-1]] == [Digest.of(CONTENTS[n]) for n in names]
        assert blobs[-1] == large
        assert isinstance(profile.reads[0], ProfiledPath)
        assert profile.reads[0].name == self.base
        assert sum(isinstance(read, ProfiledDirectory) for read in profile.reads) == 2

    def wait_for(self, name: str, num_blobs: int) -> Profile:
        """Return what the recording under way has, once it has `number` blobs."""
        path, text = self.profiles.recording_path(name), ""
        for _ in every_event(DEADLINE_S):
            text = path.read_text() if path.exists() else ""
            if text.count("\nblob ") >= num_blobs and text.endswith("\n"):
                return Profile.parse(text)
        raise AssertionError(text)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    return Recorder(tmp_path_factory.mktemp("recorder"))


@pytest.mark.parametrize("answers", ["c", "python"])
def test_what_a_session_reads_becomes_a_profile(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    monkeypatch.setenv("APPLIANCE_ANSWERS", answers)
    with ApplianceProcess(recorder.store, tmp_path, f"--record-profile={answers}") as process:
        with FakeGuest(process.connect()) as guest:
            guest.mount()
            recorder.read_by(guest, [*READ, *READ])
            # It is written while the session goes on, and without another request.
            recorder.check(recorder.wait_for(answers, len(READ) + 1), READ)
        for _ in every_event(DEADLINE_S):
            if "was recorded" in process.log():
                break
    recorder.check(recorder.profiles.read(answers), READ)


def test_what_was_recorded_before_a_kill_is_a_profile_and_the_next_supervisor_goes_on(
    recorder: Recorder, tmp_path: Path
) -> None:
    options = ("--record-profile=killed", "--keep-sessions", "--num-request-queues=1")
    first = ApplianceProcess(recorder.store, tmp_path, *options)
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(FakeGuest(first.connect()))
        guest.mount()
        recorder.read_by(guest, READ[:2])
        recorder.wait_for("killed", 3)
        first.process.kill()
        first.process.wait(DEADLINE_S)
        recorder.check(recorder.profiles.read("killed"), READ[:2])
        with ApplianceProcess(recorder.store, tmp_path, *options) as second:
            assert "is taken over" in second.log()
            recorder.read_by(guest, READ)
            recorder.wait_for("killed", len(READ) + 1)
            stack.close()
            for _ in every_event(DEADLINE_S):
                if "was recorded" in second.log():
                    break
    blobs = [
        read for read in recorder.profiles.read("killed").reads if isinstance(read, ProfiledBlob)
    ]
    assert {read.digest for read in blobs} == {
        Digest.of(LARGE),
        *(Digest.of(CONTENTS[name]) for name in READ),
    }


def test_a_mount_is_recorded(recorder: Recorder, tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    with Mounted(recorder.store, path, "--record-profile=mount", "--threads=1"):
        for name in READ:
            assert (path / recorder.base / "sub" / os.fsdecode(name)).read_bytes() == CONTENTS[name]
        with (path / recorder.base / "large").open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            assert len(os.pread(file.fileno(), 100, 1 << 20)) == 100
    recorder.check(recorder.profiles.read("mount"), READ)


def test_a_recording_that_cannot_be_written_keeps_no_session_from_beginning(
    recorder: Recorder, tmp_path: Path
) -> None:
    with (
        Mounted(recorder.store, _made(tmp_path / "mnt"), "--record-profile=busy"),
        ApplianceProcess(recorder.store, _made(tmp_path / "p"), "--record-profile=busy") as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        recorder.read_by(guest, READ[:1])
        assert "another process records it; nothing is recorded" in process.log()


def _made(path: Path) -> Path:
    path.mkdir()
    return path


# --- Playing ---


class Far:
    """Services elsewhere with one path, and a state directory with a profile of it."""

    def __init__(self, directory: Path, services: ScriptedServices) -> None:
        self.services = services
        self.base = services.put(MODEL).decode()
        services.cut(LARGE)
        self.state = directory / "state"
        self.profiles = Profiles(self.state)

    def digest(self, name: bytes) -> Digest:
        return Digest.of(CONTENTS[name])

    def profile(self, *names: bytes) -> Profile:
        files = [
            ProfiledBlob(1, self.digest(name), len(CONTENTS[name]), 0, len(CONTENTS[name]))
            for name in names
        ]
        return Profile((ProfiledPath(0, self.base), *files))

    def appliance(self, directory: Path, *options: str, **more: Any) -> ApplianceProcess:
        state = f"--state-dir={self.state}"
        return ApplianceProcess(self.services.uri, directory, state, *options, **more)


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    with ScriptedServices(tmp_path) as services:
        yield Far(tmp_path, services)


def playbacks(process: ApplianceProcess, state: Path) -> list[dict[str, Any]]:
    command = [*APPLIANCE, "status", "--json", "--store", process.uri, f"--state-dir={state}"]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (supervisor,) = json.loads(text)["supervisors"]
    found: list[dict[str, Any]] = supervisor["remote"]["playbacks"]
    return found


def until_played(process: ApplianceProcess, far: Far, number: int = 1) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for _ in every_event(DEADLINE_S):
        found = playbacks(process, far.state)
        if len(found) == number and not any(one["is_playing"] for one in found):
            return found
    raise AssertionError(found)


def test_what_a_profile_names_is_fetched_when_a_guest_connects(far: Far, tmp_path: Path) -> None:
    large = ProfiledBlob(3, Digest.of(LARGE), len(LARGE), 1 << 20, (1 << 20) + 100)
    gone = ProfiledBlob(2, Digest.of(b"gone"), 4, 0, 4)
    far.profiles.write("boot", Profile((*far.profile(*READ).reads, gone, large)))
    with far.appliance(tmp_path, "--profile=boot") as process:
        with FakeGuest(process.connect()) as guest:
            (report,) = until_played(process, far)
            assert (report["profile"], report["fetched"], report["missing"]) == ("boot", 6, 1)
            assert [far.services.reads[far.digest(name)] for name in READ] == [1] * len(READ)
            chunks = [
                one
                for one in far.services.chunks[Digest.of(LARGE)]
                if far.services.reads[one.digest]
            ]
            assert 1 <= len(chunks) <= 2
            # It does not know names before it has looked them up, and then misses nothing.
            guest.mount()
            sub = guest.lookup(guest.lookup(ROOT, far.base.encode()), b"sub")
            for name in READ:
                answer = guest.ask(fuse_client.read(guest.lookup(sub, name), 0, 4096))
                assert answer.body == CONTENTS[name]
            wants = process.status()[0]["wants"]["kinds"]
            assert set(wants) == {"root_name"}
        # Another guest has the same profile: nothing is fetched twice.
        with FakeGuest(process.connect()):
            for _ in every_event(DEADLINE_S):
                (report,) = playbacks(process, far.state)
                if report["there"] and not report["is_playing"]:
                    break
            assert (report["fetched"], report["there"]) == (0, 6)
    reads = {digest: num for digest, num in far.services.reads.items() if digest != gone.digest}
    assert set(reads.values()) == {1}


def test_what_a_guest_wants_does_not_wait_for_what_is_fetched_ahead(
    far: Far, tmp_path: Path
) -> None:
    names = list(CONTENTS)[:90]
    far.profiles.write("boot", far.profile(*names))
    releases = [far.services.hold(far.digest(name)) for name in names]
    with (
        far.appliance(tmp_path, "--profile=boot") as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        sub = guest.lookup(guest.lookup(ROOT, far.base.encode()), b"sub")
        far.services.until_read(far.digest(names[0]))
        other = guest.lookup(sub, b"095")
        assert guest.ask(fuse_client.read(other, 0, 4096)).body == CONTENTS[b"095"]
        for release in releases:
            release()
        until_played(process, far)


def test_a_session_that_ends_has_nothing_more_fetched(far: Far, tmp_path: Path) -> None:
    names = list(CONTENTS)
    far.profiles.write("boot", far.profile(*names))
    releases = [far.services.hold(far.digest(name)) for name in names]
    with far.appliance(tmp_path, "--profile=boot") as process:
        with FakeGuest(process.connect()):
            far.services.until_read(far.digest(names[0]))
        (report,) = until_played(process, far)
        for release in releases:
            release()
        assert report["sessions"] == 0
    assert far.services.reads[far.digest(names[-1])] == 0


def test_a_profile_grants_nothing(far: Far, tmp_path: Path) -> None:
    far.profiles.write("boot", far.profile(*READ))
    subprocess.run(
        [
            *APPLIANCE,
            "view",
            "create",
            "empty",
            "--store",
            far.services.uri,
            f"--state-dir={far.state}",
        ],
        check=True,
    )
    with (
        far.appliance(tmp_path, "--view=empty", "--profile=boot") as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        until_played(process, far)
        assert guest.ask(fuse_client.lookup(ROOT, far.base.encode())).error


@pytest.mark.parametrize("kind", ["view", "root", "granted"])
def test_the_profile_of_a_view_or_path_is_played_by_itself(
    far: Far, tmp_path: Path, kind: str
) -> None:
    name = "web" if kind == "view" else far.base
    far.profiles.write(name, far.profile(*READ))
    options = {"view": ["--view=web"], "root": [f"--root={far.base}"], "granted": []}[kind]
    if kind == "view":
        subprocess.run(
            [
                *APPLIANCE,
                "view",
                "create",
                "web",
                "--store",
                far.services.uri,
                f"--state-dir={far.state}",
            ],
            check=True,
        )
    with (
        far.appliance(tmp_path, *options) as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        if kind == "granted":
            guest.lookup(ROOT, far.base.encode())
        (report,) = until_played(process, far)
        assert (report["profile"], report["missing"]) == (name, 0)
    assert [far.services.reads[far.digest(one)] for one in READ] == [1] * len(READ)


def test_each_socket_has_a_profile_of_its_own(far: Far, tmp_path: Path) -> None:
    for number in range(2):
        far.profiles.write(f"boot{number}", far.profile(READ[number]))
    sockets = [f"{number}.sock,profile=boot{number}" for number in range(2)]
    sockets.append("2.sock,record-profile=boot2")
    with far.appliance(tmp_path, "--profile=absent", sockets=sockets) as process:
        for number in range(2):
            with FakeGuest(process.connect(number)):
                reports = until_played(process, far, number + 1)
                assert reports[-1]["profile"] == f"boot{number}"
        with FakeGuest(process.connect(2)) as guest:
            guest.mount()
            guest.lookup(ROOT, far.base.encode())
    assert far.profiles.names() == ["boot0", "boot1", "boot2"]


def test_a_profile_that_is_not_there_or_is_broken_is_one_log_line(far: Far, tmp_path: Path) -> None:
    far.profiles.write("broken", Profile(()))
    far.profiles.path("broken").write_text("nonsense\n")
    for name, told in (("broken", "line 1: 'nonsense'"), ("absent", "there is none in")):
        with (
            far.appliance(tmp_path, f"--profile={name}") as process,
            FakeGuest(process.connect()) as guest,
        ):
            guest.mount()
            guest.lookup(ROOT, far.base.encode())
            for _ in every_event(DEADLINE_S):
                if "nothing is fetched ahead" in process.log():
                    break
            (line,) = [one for one in process.log().splitlines() if "fetched ahead" in one]
            assert f"profile {name}: " in line
            assert told in line


# --- The command ---


def profile_command(
    store: Path, *words: str, data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = [*APPLIANCE, "profile", words[0], "--store", uri_of(store), *words[1:]]
    return subprocess.run(command, input=data, capture_output=True, check=False)


def test_profiles_are_listed_shown_exported_imported_and_deleted(tmp_path: Path) -> None:
    digest = Digest.of(b"x")
    profile = Profile((ProfiledDirectory(5, digest), ProfiledBlob(7, digest, 1, 0, 1)))
    one, other = tmp_path / "one", tmp_path / "other"
    Profiles(one).write("boot", profile)
    assert profile_command(one, "list").stdout == b"boot\n"
    shown = json.loads(profile_command(one, "show", "boot", "--json").stdout)
    assert shown == {
        "name": "boot",
        "paths": 0,
        "directories": 1,
        "blobs": 1,
        "ranges": 1,
        "bytes": 1,
        "milliseconds": 7,
    }
    assert json.loads(profile_command(one, "list", "--json").stdout) == [shown]
    assert b"directories      1\n" in profile_command(one, "show", "boot").stdout
    exported = profile_command(one, "export", "boot").stdout
    file = tmp_path / "file"
    file.write_bytes(exported)
    assert profile_command(other, "import", "a", "-", data=exported).returncode == 0
    assert profile_command(other, "import", "b", str(file)).returncode == 0
    assert Profiles(other).read("a") == Profiles(other).read("b") == profile
    refused = profile_command(other, "import", "a", "-", data=exported + b"blob 1 nonsense 4\n")
    assert (refused.returncode, refused.stderr.count(b"\n")) == (1, 1)
    assert b"line 4" in refused.stderr
    assert Profiles(other).read("a") == profile
    for words in (("show", "absent"), ("export", "absent"), ("delete", "a", "absent")):
        result = profile_command(other, *words)
        assert result.returncode == 1
        assert b"profile absent: there is none" in result.stderr
    assert profile_command(other, "delete", "a", "b").returncode == 0
    assert profile_command(other, "list").stdout == b""
    assert profile_command(other, "import", "../x", str(file)).returncode == 2
    assert profile_command(other, "import", "x", str(tmp_path / "absent")).returncode == 2
