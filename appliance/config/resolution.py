"""Which value of each setting is in force, and where it comes from.

The command line comes before the environment, the environment before the configuration file, and
the file before the default. An empty variable counts as unset.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from appliance.config.config_file import read_config
from appliance.config.kinds import Several
from appliance.config.settings import (
    DEFAULT_CONFIG,
    ConfigFile,
    Setting,
    Substituters,
)
from appliance.errors import ConfigError
from appliance.system.child_environment import CONFIG_VARIABLE

# Options that say where to listen; where one is given, the file does not.
_LISTENING: Final = ("socket", "socket_path", "fd")


class ValueSource(StrEnum):
    """Where a value comes from."""

    COMMAND_LINE = "command line"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True)
class Origin:
    """Where the value of a setting comes from.

    Attributes:
        source: the kind of place.
        label: what errors about the value begin with: the option, the variable, or the file with
            the line and the key.
        place: the variable, or the file and the line; empty for the others.
    """

    source: ValueSource
    label: str
    place: str = ""


def config_file_of(
    options: argparse.Namespace, used: Iterable[Setting], environ: Mapping[str, str] = os.environ
) -> ConfigFile:
    """Read the configuration file that a command with `options` uses.

    A file that is named must exist; the default one may be missing.

    Args:
        options: what was parsed.
        used: the settings that the command uses.
        environ: the environment.

    Raises:
        ConfigError: the file cannot be read, or breaks rules.
    """
    named: Path | None = getattr(options, "config", None)
    label = "--config"
    if named is None and environ.get(CONFIG_VARIABLE):
        named, label = Path(environ[CONFIG_VARIABLE]), CONFIG_VARIABLE
    keys = {each.file_key for each in used if each.is_in_file}
    try:
        return read_config(named or DEFAULT_CONFIG, lambda each: each.file_key in keys)
    except FileNotFoundError as exc:
        if named is None:
            return ConfigFile(DEFAULT_CONFIG)
        raise ConfigError(f"{label} {named}: {exc.strerror}") from exc


def settle(
    options: argparse.Namespace,
    environ: Mapping[str, str] = os.environ,
    defaults: Mapping[str, Any] | None = None,
    *,
    reads_file: bool = True,
    when_faulty: Callable[[ConfigError], None] | None = None,
) -> None:
    """Put the values in force into `options`, and where they come from into `options.origins`.

    Args:
        options: what was parsed; `settings` has the settings of the command.
        environ: the environment.
        defaults: by the names of attributes, what to use in place of a setting's default.
        reads_file: whether the configuration file is used.
        when_faulty: is called with the faults of the file, which sets nothing then; without this,
            they are raised.

    Raises:
        ConfigError: a value or the file breaks a rule.
    """
    settings: dict[str, Setting] = getattr(options, "settings", {})
    options.origins = {}
    config = ConfigFile(DEFAULT_CONFIG)
    if reads_file:
        try:
            config = config_file_of(options, settings.values(), environ)
        except ConfigError as exc:
            if when_faulty is None:
                raise
            when_faulty(exc)
    options.config_file = config
    is_told_where = any(getattr(options, name, None) not in (None, []) for name in _LISTENING)
    for dest, setting in settings.items():
        given = getattr(options, dest, None)
        from_file = not (setting.is_of_host and is_told_where)
        value, origin = in_force(setting, given, environ, config if from_file else None)
        if origin.source is ValueSource.DEFAULT and dest in (defaults or {}):
            value = (defaults or {})[dest]
        setattr(options, dest, value)
        options.origins[dest] = origin


def label_of(options: argparse.Namespace, dest: str) -> str:
    """Return what errors about the value in force of a setting begin with."""
    origin: Origin | None = getattr(options, "origins", {}).get(dest)
    return f"--{dest.replace('_', '-')}" if origin is None else origin.label


def source_of(options: argparse.Namespace, dest: str) -> ValueSource:
    """Return where the value in force of a setting comes from."""
    origin: Origin = options.origins[dest]
    return origin.source


def in_force(
    setting: Setting, given: Any, environ: Mapping[str, str], config: ConfigFile | None
) -> tuple[Any, Origin]:
    """Return the value of a setting, and where it comes from.

    Args:
        setting: the setting.
        given: what the parser of the command line has; None if nothing was given.
        environ: the environment.
        config: the configuration file, or None if it does not set this.

    Raises:
        ConfigError: the value breaks a rule.
    """
    if given is not None:
        origin = Origin(ValueSource.COMMAND_LINE, setting.option)
        return _parsed(setting, given, origin), origin
    text = environ.get(setting.variable) if setting.variable else None
    if text:
        origin = Origin(ValueSource.ENVIRONMENT, setting.variable, setting.variable)
        return _parsed(setting, text, origin), origin
    if config is not None and setting.is_in_file and setting.file_key in config.values:
        found = config.values[setting.file_key]
        label = config.label(setting.file_key)
        return found.value, Origin(ValueSource.FILE, label, f"{config.path}:{found.line}")
    return setting.default, Origin(ValueSource.DEFAULT, setting.option)


def _parsed(setting: Setting, given: Any, origin: Origin) -> Any:
    if isinstance(given, bool):
        return given
    if isinstance(setting.kind, Substituters):
        return list(given)
    try:
        if isinstance(setting.kind, Several):
            return setting.kind.parse_all(given)
        return setting.kind.parse(given)
    except ConfigError as exc:
        shown = f" {given}" if isinstance(given, str) else ""
        raise ConfigError(f"{origin.label}{shown}: {exc}") from exc
