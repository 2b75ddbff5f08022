"""`appliance config`: what is in force, where it comes from, and what is never shown."""

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from appliance.cli.main import main
from appliance.config.config_file import read_config
from appliance.config.setting_table import BY_KEY
from tests.fakes.running_command import APPLIANCE, DEADLINE_S

SECRET = "hunter2"
FILE = """\
store = "store"
log-level = "warning"

[[substituters]]
uri = "grpc+http://cache:1"

[virtiofs]
listen-dir = "vms"
queue-size = 64
[[virtiofs.sockets]]
name = "web1"
view = "web"
"""


def run(*words: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*APPLIANCE, "config", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        env=os.environ | (environ or {}),
    )


def output(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    main(["config", *words])
    return capsys.readouterr().out


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "appliance.toml"
    path.write_text(FILE)
    return path


def test_each_value_has_its_origin(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPLIANCE_BLOB_CACHE_SIZE", "3G")
    words = [f"--config={config}", "--state-dir=/s"]
    found = {row["key"]: row for row in json.loads(output(capsys, ["--json", *words]))}
    assert found.keys() == BY_KEY.keys()
    assert [tuple(found[key].values()) for key in (
        *("store", "state-dir", "blob-cache-size", "inodes", "virtiofs.queue-size"),
        *("substituters", "virtiofs.sockets"),
    )] == [
        ("store", f"lmdb://{config.parent}/store", "file", f"{config}:1"),
        ("state-dir", "/s", "command line", None),
        ("blob-cache-size", "3G", "environment", "APPLIANCE_BLOB_CACHE_SIZE"),
        ("inodes", "place", "default", None),
        ("virtiofs.queue-size", 64, "file", f"{config}:9"),
        ("substituters", [{"uri": "grpc+http://cache:1"}], "file", f"{config}:4"),
        ("virtiofs.sockets", [{"name": "web1", "view": "web"}], "file", f"{config}:10"),
    ]  # fmt: skip
    text = output(capsys, words)
    assert f'store = "lmdb://{config.parent}/store"  # {config}:1\n' in text
    assert 'state-dir = "/s"  # command line\n' in text
    assert 'blob-cache-size = "3G"  # environment: APPLIANCE_BLOB_CACHE_SIZE\n' in text
    assert 'inodes = "place"  # default\n' in text


def test_the_output_is_a_configuration_file(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = read_config(config, lambda _setting: True)
    shown = tmp_path / "shown.toml"
    shown.write_text(output(capsys, [f"--config={config}"]))
    second = read_config(shown, lambda _setting: True)
    assert {key: second.values[key].value for key in first.values if "sockets" not in key} == {
        key: each.value for key, each in first.values.items() if "sockets" not in key
    }
    (row,) = second.values["virtiofs.sockets"].value
    assert row.values == {"name": "web1", "view": "web"}


def test_a_command_shows_what_would_be_in_force_for_it(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--config={config}", "--json", "virtiofs", "--queue-size", "128", "/run/s"]
    found = {row["key"]: row for row in json.loads(output(capsys, words))}
    assert found["virtiofs.queue-size"]["value"] == 128
    assert found["virtiofs.queue-size"]["source"] == "command line"
    assert found["virtiofs.sockets"]["value"] == []
    assert "daemon.sign" not in found
    assert not any(key.startswith("mount.") for key in found)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--store=memory:", "virtiofs"], "--store: belongs behind virtiofs"),
        (["nothing"], "argument COMMAND: invalid choice: 'nothing'"),
        (["--check=/nowhere/x.toml"], "--check /nowhere/x.toml: No such file"),
        (["--check=/dev/null", "virtiofs"], "--check: cannot be combined with virtiofs"),
        (["virtiofs", "--queue-size=65"], "--queue-size 65: expected a power of two"),
    ],
)
def test_what_cannot_be_shown_is_said(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["config", *words])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"appliance: {why}")


@pytest.mark.slow
def test_a_file_is_checked_whatever_the_host_is_configured_to(config: Path) -> None:
    broken = config.with_name("broken.toml")
    broken.write_text("a = 1\nb = 2\n")
    environ = {"APPLIANCE_CONFIG": str(broken)}
    done = run("--check", str(config), environ=environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run("--check", str(broken), environ={})
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"appliance: {broken}:1: a: unknown key",
        f"appliance: {broken}:2: b: unknown key",
    ]
    # Every other command says so, too, and does nothing.
    done = run(environ=environ)
    assert (done.returncode, done.stdout) == (2, "")


# Where an address may have a secret: a user, a password, parameters, and what was not encoded.
ADDRESSES = [
    f"objectstore+s3://key:{SECRET}@bucket/prefix",
    f"objectstore+s3://{SECRET}@bucket",
    f"objectstore+s3://key:a/{SECRET}@bucket",
    f"objectstore+s3://key:a@{SECRET}@bucket",
    f"objectstore+s3://bucket?access_key_id=x&secret_access_key={SECRET}",
    f"objectstore+s3://bucket?region=eu&token=a'{SECRET} \"{SECRET}",
    f"objectstore+gs://bucket?{SECRET}",
    f"objectstore+s4://bucket?token={SECRET}",
    f"nix+https://user:{SECRET}@cache?trusted-public-keys=k",
    f"nix+https://cache?trusted-public-keys=k&sig={SECRET}",
]


@pytest.mark.parametrize("number", range(len(ADDRESSES)))
def test_secrets_in_addresses_are_never_shown(
    number: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it comes from a file, a variable or the command line, is right or breaks a rule."""
    address = ADDRESSES[number]
    config = tmp_path / "appliance.toml"
    quoted = json.dumps(address)
    shown = ""
    for text in (f"store = {quoted}\n", f"[[substituters]]\nuri = {quoted}\n"):
        config.write_text(text)
        for words in (["--check", str(config)], [f"--config={config}"],
                      [f"--config={config}", "--json"]):  # fmt: skip
            with suppress(SystemExit):
                main(["config", *words])
            out, err = capsys.readouterr()
            shown += out + err
    monkeypatch.setenv("APPLIANCE_STORE", address)
    monkeypatch.setenv("BLOB_SERVICE_ADDR", address)
    shown += output(capsys, []) + output(capsys, ["--json", "ls", "x"])
    shown += output(capsys, ["--store", address]) + output(capsys, ["ls", "--store", address, "x"])
    shown += output(capsys, ["virtiofs", "--substituter", address])
    assert SECRET not in shown
    assert "***" in shown
