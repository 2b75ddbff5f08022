"""Which value of each setting wins, for every setting that the table has."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.exported_options import exported_of
from appliance.cli.main import parse_command
from appliance.cli.options import service_addresses
from appliance.cli.quantities import min_free_bytes
from appliance.cli.setting_options import add_config_option, add_settings
from appliance.cli.substituter_options import substitution_of
from appliance.config.kinds import (
    Address,
    Choice,
    Flag,
    Group,
    Integer,
    Mode,
    PathName,
    Several,
    Size,
    Text,
)
from appliance.config.resolution import Origin, ValueSource, settle
from appliance.config.setting_table import BY_KEY, SETTINGS
from appliance.config.settings import Setting, Substituters, TableArray
from appliance.config.toml_text import toml_text
from appliance.errors import ConfigError

KEY = "cache.example-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
# Texts that a setting accepts, none of which is its default: one for each other source. By the
# name of settings with rules of their own, and by the kinds of all others.
BY_NAME: dict[str, tuple[str, str, str]] = {
    "root": (f"{'0' * 32}-a", f"{'1' * 32}-b", f"{'2' * 32}-c"),
    "metrics": (":9101", ":9102", ":9103"),
    "listen-address": ("[::1]:1", "127.0.0.1:2", "/run/x/socket"),
    "trusted-public-keys": (KEY, KEY.replace("-1", "-2"), KEY.replace("-1", "-3")),
    "queue-size": ("64", "128", "256"),
    "sign": ("/a", "/b", "/c"),
}
BY_KIND: dict[type, tuple[str, str, str]] = {
    Text: ("a", "b", "c"),
    Flag: ("true", "false", "true"),
    Address: ("grpc+http://a:1", "grpc+http://b:2", "grpc+http://c:3"),
    Substituters: ("grpc+http://a:1", "grpc+http://b:2", "grpc+http://c:3"),
    Integer: ("7", "8", "9"),
    Size: ("3G", "5M", "7T"),
    Mode: ("0600", "0640", "0666"),
    Group: ("41", "42", "43"),
    PathName: ("/a", "/b", "/c"),
}


def texts_of(setting: Setting) -> tuple[str, str, str]:
    """Return three texts that a setting accepts, none of which is its default."""
    kind = setting.kind
    if isinstance(kind, Choice):
        others = [word for word in kind.words if kind.parse(word) != setting.default]
        return (others[0], others[-1], others[0])
    return BY_NAME.get(setting.name) or BY_KIND[type(kind)]


def in_file(setting: Setting, text: str) -> str:
    """Return a configuration file that sets `setting` to what `text` stands for."""
    key = setting.key or setting.name
    head = f"[{setting.section}]\n" if setting.section else ""
    match setting.kind:
        case Substituters():
            return f"[[{key}]]\nuri = {toml_text(text)}\n"
        case Flag():
            return f"{head}{key} = {text}\n"
        case Integer():
            return f"{head}{key} = {text}\n"
        case Several():
            return f"{head}{key} = [{toml_text(text)}]\n"
        case _:
            return f"{head}{key} = {toml_text(text)}\n"


def on_command_line(setting: Setting, text: str) -> list[str]:
    if isinstance(setting.kind, Flag):
        return [setting.option if text == "true" else f"--no-{setting.name}"]
    return [setting.option, text]


def value_of(setting: Setting, text: str) -> Any:
    match setting.kind:
        case Flag():
            return text == "true"
        case Substituters():
            return [text]
        case Several():
            return setting.kind.parse_all([text])
        case kind:
            return kind.parse(text)


def settled(setting: Setting, words: Sequence[str], environ: dict[str, str]) -> tuple[Any, Origin]:
    parser = argparse.ArgumentParser()
    add_config_option(parser)
    add_settings(parser, setting.name, section=setting.section)
    options = parser.parse_args(words)
    settle(options, environ)
    return getattr(options, setting.dest), options.origins[setting.dest]


@pytest.mark.parametrize(
    "setting", [each for each in SETTINGS if each.has_option], ids=lambda each: each.file_key
)
def test_the_command_line_precedes_the_environment_the_file_and_the_default(
    setting: Setting, tmp_path: Path
) -> None:
    file, variable, word = texts_of(setting)
    config = tmp_path / "appliance.toml"
    config.write_text(f"# a comment\n{in_file(setting, file)}")
    environ = {"APPLIANCE_CONFIG": os.devnull}

    assert settled(setting, [], environ) == (
        setting.default,
        Origin(ValueSource.DEFAULT, setting.option),
    )

    environ["APPLIANCE_CONFIG"] = str(config)
    value, origin = settled(setting, [], environ)
    line = 2 + bool(setting.section)
    label = f"{config}:{line}: {setting.file_key}"
    assert value == value_of(setting, file)
    assert origin == Origin(ValueSource.FILE, label, f"{config}:{line}")

    if setting.variable:
        environ[setting.variable] = ""
        assert settled(setting, [], environ) == (value, origin)
        environ[setting.variable] = variable
        assert settled(setting, [], environ) == (
            value_of(setting, variable),
            Origin(ValueSource.ENVIRONMENT, setting.variable, setting.variable),
        )

    assert settled(setting, on_command_line(setting, word), environ) == (
        value_of(setting, word),
        Origin(ValueSource.COMMAND_LINE, setting.option),
    )


def test_every_setting_is_of_some_command() -> None:
    """Whatever a file can set has an effect on a command of its section, or on some command."""
    used: set[str] = set()
    for command in (["virtiofs"], ["mount", "/mnt"], ["daemon"], ["http"]):
        options = parse_command(command)
        used |= {each.file_key for each in options.settings.values() if each.is_in_file}
    assert used == set(BY_KEY)


def test_a_row_is_complete() -> None:
    for setting in SETTINGS:
        assert setting.help, setting.file_key
        needs_word = setting.has_option and not isinstance(setting.kind, Flag | Choice)
        assert bool(setting.metavar) == needs_word or setting.name == "log-level", setting.file_key
    rows = [each for each in SETTINGS if isinstance(each.kind, TableArray)]
    assert all(field.help for each in rows for field in each.kind.fields)  # type: ignore[attr-defined]


# --- The file that is read ---


def test_a_file_that_is_named_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=f"^--config {missing}: No such file"):
        parse_command(["ls", "--config", str(missing), "x"])
    monkeypatch.setenv("APPLIANCE_CONFIG", str(missing))
    with pytest.raises(ConfigError, match=f"^APPLIANCE_CONFIG {missing}: No such file"):
        parse_command(["ls", "x"])
    (tmp_path / "there.toml").write_text('store = "memory:"')
    options = parse_command(["ls", "--config", str(tmp_path / "there.toml"), "x"])
    assert options.store == "memory:"


def test_the_default_file_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPLIANCE_CONFIG")
    config = tmp_path / "appliance.toml"
    monkeypatch.setattr("appliance.config.resolution.DEFAULT_CONFIG", config)
    assert parse_command(["ls", "x"]).store is None
    config.write_text('store = "memory:"')
    assert parse_command(["ls", "x"]).store == "memory:"


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{tmp_path}: Is a directory$"):
        parse_command(["ls", "--config", str(tmp_path), "x"])


def test_relative_paths_begin_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "appliance.toml"
    config.write_text('store = "a/store"\nstate-dir = "state"\n[daemon]\nsign = ["key"]\n')
    monkeypatch.chdir("/")
    options = parse_command(["daemon", "--config", str(config)])
    assert options.store == f"lmdb://{tmp_path}/a/store"
    assert parse_command(["status", "--config", str(config)]).state_dir == tmp_path / "state"
    assert options.sign == [tmp_path / "key"]


# --- Settings that concern each other ---


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    config = tmp_path / "appliance.toml"
    config.write_text(
        'store = "store"\nblob-service-addr = "grpc+http://blobs:1"\nview = "web"\n'
        'min-free = "1G"\n[[substituters]]\nuri = "grpc+http://cache:1"\n'
        '[virtiofs]\nlisten-dir = "vms"\nmetrics = ":9100"\npid-file = "pid"\n'
        '[[virtiofs.sockets]]\nname = "web1"\n'
    )
    return config


def test_a_store_precedes_services_that_are_named_in_a_later_place(
    configured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = f"--config={configured}"
    (blobs, directories, _) = service_addresses(parse_command(["ls", config, "x"]))
    assert (blobs.label(), directories.directory()) == (
        "dns:///blobs:1",
        configured.parent / "store",
    )
    command = ["ls", config, "--store=lmdb:///elsewhere", "x"]
    assert service_addresses(parse_command(command)).one_store() == Path("/elsewhere")
    monkeypatch.setenv("BLOB_SERVICE_ADDR", "grpc+http://others:2")
    assert service_addresses(parse_command(command)).one_store() == Path("/elsewhere")
    (blobs, directories, _) = service_addresses(parse_command(["ls", config, "x"]))
    assert (blobs.label(), directories.directory()) == (
        "dns:///others:2",
        configured.parent / "store",
    )
    command.append("--blob-service-addr=grpc+http://given:3")
    assert service_addresses(parse_command(command)).blobs.label() == "dns:///given:3"


def test_what_is_said_for_one_supervisor_of_the_host_is_not_for_others(configured: Path) -> None:
    config = f"--config={configured}"
    for words in ([], ["--listen-dir=/run/x"]):
        options = parse_command(["virtiofs", config, *words])
        assert [row.values["name"] for row in options.sockets] == ["web1"]
        assert (options.metrics, options.pid_file) == (":9100", configured.parent / "pid")
    for words in (["/run/s"], ["--socket-path=/run/s"], ["--fd=3"]):
        options = parse_command(["virtiofs", config, *words])
        assert (options.sockets, options.listen_dir) == ([], None)
        assert (options.metrics, options.pid_file) == (None, None)


def test_a_root_of_the_command_line_takes_the_place_of_a_view_of_the_file(
    configured: Path,
) -> None:
    root = f"{'0' * 32}-system"
    options = parse_command(["virtiofs", f"--config={configured}"])
    assert exported_of(options).view == "web"
    options = parse_command(["virtiofs", f"--config={configured}", f"--root={root}"])
    assert (exported_of(options).view, exported_of(options).root) == (None, root)
    options = parse_command(["virtiofs", "--view=web", f"--root={root}"])
    with pytest.raises(ConfigError, match="only one of them"):
        exported_of(options)


def test_what_the_file_says_of_local_stores_is_not_for_remote_ones(configured: Path) -> None:
    configured.write_text(configured.read_text().replace("blob-service", "# "))
    options = parse_command(["virtiofs", f"--config={configured}"])
    substitution = substitution_of(options, service_addresses(options))
    assert min_free_bytes(options) == 1 << 30
    assert substitution is not None
    assert [each.label for each in substitution.substituters] == ["dns:///cache:1"]

    remote = "--store=grpc+http://far:1"
    options = parse_command(["virtiofs", f"--config={configured}", remote])
    assert min_free_bytes(options) is None
    assert substitution_of(options, service_addresses(options)) is None
    options = parse_command(["virtiofs", f"--config={configured}", remote, "--min-free=1"])
    with pytest.raises(ConfigError, match="not in one store of this machine"):
        min_free_bytes(options)
