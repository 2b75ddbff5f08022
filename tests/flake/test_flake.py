"""The flake: its package and its NixOS module, evaluated by Nix without nixpkgs.

`stub.nix` stands in for what they use of nixpkgs. Whether nixpkgs agrees is not shown here.
"""

import json
import os
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.running_command import APPLIANCE

PROJECT = Path(__file__).resolve().parents[2]
FILES = ["flake.nix", "nix/package.nix", "nix/module.nix"]
UNITS = {path.name for path in (PROJECT / "systemd").iterdir()}
PROGRAM = "/package/bin/appliance"

pytestmark = pytest.mark.slow


def nix_instantiate(directory: Path, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["nix-instantiate", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "HOME": str(directory),
            "NIX_STORE_DIR": str(directory / "store"),
            "NIX_STATE_DIR": str(directory / "state"),
            "NIX_LOG_DIR": str(directory / "log"),
        },
    )


def evaluated(directory: Path, settings: str, status: int = 0) -> Any:
    """Evaluate the flake with a configuration of services.appliance; return what it comes to."""
    expression = (
        f"import {PROJECT}/tests/flake/stub.nix {{ project = {PROJECT}; settings = {settings}; }}"
    )
    done = nix_instantiate(directory, "--eval", "--strict", "--json", "--expr", expression)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if status == 0 else done.stderr


EVERYTHING = """{
  enable = true;
  storeDir = "/srv/store";
  daemon = {
    listen = [ "/run/appliance/store.sock" "[::1]:8000" ];
    trustedPublicKeys = [ "one-1:AAAA" "two-1:BBBB" ];
    signKeyPaths = [ "/etc/key" ];
  };
  gc = { enable = true; deleteOlderThan = "7d"; };
  http = { enable = true; signKeyPaths = [ "/etc/one" "/etc/two" ]; priority = 20; };
  vms.web = { closure = [ "/nix/store/00000000000000000000000000000000-system" ]; queues = 2; };
  vms.db = { socket = "/run/vms/db.sock"; group = "vms"; listRoot = true; };
}"""


@pytest.mark.parametrize("name", FILES)
def test_nix_reads_the_files(tmp_path: Path, name: str) -> None:
    done = nix_instantiate(tmp_path, "--parse", PROJECT / name)
    assert done.returncode == 0, done.stderr


def commands(services: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Return the words of the commands of each unit, without the program."""
    found: dict[str, list[list[str]]] = {}
    for name, service in services.items():
        lines = service["serviceConfig"]["ExecStart"]
        if not name.startswith("appliance-closure-"):
            # The first one clears the list of the package's unit.
            assert (lines[0], len(lines)) == ("", 2)
            lines = lines[1:]
        found[name] = []
        for line in lines:
            program, *words = shlex.split(line)
            assert program == PROGRAM
            found[name].append(words)
    return found


def test_units_are_those_of_the_package_and_commands_exist(tmp_path: Path) -> None:
    systemd = evaluated(tmp_path, EVERYTHING)["systemd"]
    services = systemd["services"]
    assert sorted(services) == [
        "appliance-closure-web",
        "appliance-daemon",
        "appliance-gc",
        "appliance-http",
        "appliance-virtiofs@db",
        "appliance-virtiofs@web",
    ]
    for name in services:
        template, at, _instance = name.partition("@")
        is_of_package = f"{template}{at}.service" in UNITS
        assert is_of_package == (not name.startswith("appliance-closure-"))
    assert {f"{name}.socket" for name in systemd["sockets"]} <= UNITS
    assert {f"{name}.timer" for name in systemd["timers"]} <= UNITS
    for words in (words for several in commands(services).values() for words in several):
        # The program knows all words but the last, because of which it ends at once.
        done = subprocess.run(
            [*APPLIANCE, *words, "--no-such-option"], check=False, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "arguments: --no-such-option" in done.stderr
        assert done.stderr.count("\n") == 1


def test_settings_become_options(tmp_path: Path) -> None:
    systemd = evaluated(tmp_path, EVERYTHING)["systemd"]
    listed = commands(systemd["services"])
    words = {name: several[-1] for name, several in listed.items()}
    store = "--store=lmdb:///srv/store"
    assert words["appliance-daemon"] == [
        "daemon",
        store,
        "--listen-address=sd-listen:store",
        "--require-signatures",
        "--trusted-public-keys=one-1:AAAA two-1:BBBB",
        "--sign=%d/key0",
    ]
    assert words["appliance-http"] == [
        "http",
        store,
        "--listen-address=sd-listen:http",
        "--priority=20",
        "--sign=%d/key0",
        "--sign=%d/key1",
    ]
    assert words["appliance-virtiofs@web"] == [
        "virtiofs",
        store,
        "--socket-path=/run/appliance-web/virtiofs.sock",
        "--num-request-queues=2",
        "--keep-sessions",
        "--view=web",
    ]
    assert words["appliance-virtiofs@db"][2:] == [
        "--socket-path=/run/vms/db.sock",
        "--num-request-queues=1",
        "--keep-sessions",
        "--list-root",
    ]
    system = "/nix/store/00000000000000000000000000000000-system"
    assert listed["appliance-closure-web"] == [
        ["copy", store, "--recursive", system],
        ["view", "set", store, "web", "--registration-files", "--closure", system],
    ]
    assert words["appliance-gc"] == ["gc", store, "--delete-older-than=7d"]
    assert systemd["timers"] == {"appliance-gc": {"wantedBy": ["timers.target"]}}
    http = systemd["services"]["appliance-http"]["serviceConfig"]
    assert http["LoadCredential"] == ["key0:/etc/one", "key1:/etc/two"]
    assert systemd["sockets"]["appliance-daemon"]["listenStreams"] == [
        "",
        "/run/appliance/store.sock",
        "[::1]:8000",
    ]
    web = systemd["services"]["appliance-virtiofs@web"]
    assert web["requires"] == web["after"] == ["appliance-closure-web.service"]
    assert web["serviceConfig"]["Group"] == "kvm"
    assert systemd["services"]["appliance-virtiofs@db"]["requires"] == []


def test_little_is_needed(tmp_path: Path) -> None:
    systemd = evaluated(tmp_path, "{ enable = true; }")["systemd"]
    assert list(systemd["services"]) == ["appliance-daemon"]
    listening = systemd["sockets"]["appliance-daemon"]["listenStreams"]
    unit = (PROJECT / "systemd" / "appliance-daemon.socket").read_text()
    assert f"ListenStream={listening[1]}\n" in unit


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("{ enable = true; vms.web.queues = 0; }", "services.appliance.vms.web.queues is no"),
        ("{ enable = true; vm = { }; }", "services.appliance.vm is no option"),
        ('{ enable = true; storeDir = "store"; }', "services.appliance.storeDir is no path"),
    ],
)
def test_what_cannot_be_set(tmp_path: Path, settings: str, reason: str) -> None:
    assert reason in evaluated(tmp_path, settings, status=1)


def test_the_package_depends_on_what_the_project_does(tmp_path: Path) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    package = evaluated(tmp_path, "{ enable = true; }")["package"]
    assert (package["pname"], package["version"]) == (project["name"], project["version"])
    names = [dependency["name"] for dependency in package["dependencies"]]
    assert len(names) == len(project["dependencies"])
    for name, stated in zip(names, project["dependencies"], strict=True):
        assert stated.startswith(f"{name}>=")
    assert package["meta"]["mainProgram"] in project["scripts"]


def test_units_of_the_package_name_its_program() -> None:
    # `substituteInPlace --replace-fail` fails where there is nothing to replace.
    for name in UNITS:
        text = (PROJECT / "systemd" / name).read_text()
        assert ("/usr/bin/appliance" in text) == name.endswith(".service")
