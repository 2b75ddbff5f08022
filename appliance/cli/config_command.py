"""`appliance config`: what is in force, and where each value comes from."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from appliance.cli.options import add_json_option, add_log_options, add_service_options
from appliance.cli.output import print_json, write_line
from appliance.cli.setting_options import add_settings
from appliance.config.masking import masked_in
from appliance.config.resolution import (
    Origin,
    ValueSource,
    config_file_of,
    in_force,
    settle,
)
from appliance.config.setting_table import BY_KEY, SECTIONS, SETTINGS
from appliance.config.settings import ConfigFile, Setting, TableArray
from appliance.config.toml_text import toml_text
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_HEADER: Final = "# in force, and where it comes from; what is commented out is not set"


def add_config(commands: "Subparsers") -> None:
    """Add `appliance config`."""
    command = commands.add_parser(
        "config",
        usage="%(prog)s [OPTION]... [COMMAND [ARGUMENT]...]",
        help="show the configuration that is in force, and check a configuration file",
        description="Print the values of all settings, and for each whether it comes from the "
        "command line, the environment, a line of the configuration file, or is the default. With "
        "a COMMAND and its arguments, print what would be in force for it. Secrets in addresses "
        "are not shown. The output can be read as a configuration file.",
    )
    command.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="a command such as `virtiofs`, and its arguments, which are not carried out",
    )
    command.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="check the configuration file FILE, report all its faults, and print nothing else",
    )
    add_json_option(command)
    add_settings(command, "state-dir")
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_config, opens_no_store=True, reads_no_file=True)


def _run_config(options: argparse.Namespace) -> None:
    from appliance.config.config_file import read_config

    if options.check is not None:
        if options.words:
            raise ConfigError(f"--check: cannot be combined with {options.words[0]}")
        try:
            read_config(options.check, lambda _setting: True)
        except FileNotFoundError as exc:
            raise ConfigError(f"--check {options.check}: {exc.strerror}") from exc
        return
    if options.words:
        shown = _of_command(options)
    else:
        shown = _of_all(options, config_file_of(options, SETTINGS))
    if options.json:
        print_json([each.as_json() for each in shown], indent=2)
        return
    for line in _lines(shown):
        write_line(line)


def in_force_lines(options: argparse.Namespace) -> "Iterator[str]":
    """Yield the lines of the configuration that is in force for no command in particular."""
    return _lines(_of_all(options, options.config_file))


class _Shown(NamedTuple):
    """A setting, its value in force, and where that comes from."""

    setting: Setting
    value: Any
    origin: Origin

    def visible(self) -> Any:
        """Return the value as a file would have it, without secrets; None if there is none."""
        return None if self.value is None else masked_in(self.setting.kind.shown(self.value))

    def place(self) -> str:
        """Return where the value comes from, for a person."""
        match self.origin.source:
            case ValueSource.ENVIRONMENT:
                return f"environment: {self.origin.place}"
            case ValueSource.FILE:
                return self.origin.place
            case source:
                return source.value

    def as_json(self) -> dict[str, object]:
        return {
            "key": self.setting.file_key,
            "value": self.visible(),
            "source": self.origin.source.value,
            "place": self.origin.place or None,
        }


def _of_all(options: argparse.Namespace, config: ConfigFile) -> list[_Shown]:
    shown = []
    for setting in SETTINGS:
        origin = None if setting.section else options.origins.get(setting.dest)
        if origin is not None and origin.source is ValueSource.COMMAND_LINE:
            shown.append(_Shown(setting, getattr(options, setting.dest), origin))
        else:
            shown.append(_Shown(setting, *in_force(setting, None, os.environ, config)))
    return shown


def _of_command(options: argparse.Namespace) -> list[_Shown]:
    from appliance.cli.main import command_parser

    for dest, origin in options.origins.items():
        if origin.source is ValueSource.COMMAND_LINE:
            option = options.settings[dest].option
            raise ConfigError(f"{option}: belongs behind {options.words[0]}")
    inner = command_parser(options.words[0]).parse_args(options.words)
    inner.config = options.config if inner.config is None else inner.config
    settle(inner)
    found = [
        _Shown(setting, getattr(inner, dest), inner.origins[dest])
        for dest, setting in inner.settings.items()
        if setting.is_in_file
    ]
    return sorted(found, key=lambda each: list(BY_KEY).index(each.setting.file_key))


# --- As a file ---


def _lines(shown: "Iterable[_Shown]") -> "Iterator[str]":
    yield _HEADER
    rows = list(shown)
    for section in SECTIONS:
        # A key behind an array of tables would belong to its last element.
        ours = sorted(
            (each for each in rows if each.setting.section == section),
            key=lambda each: isinstance(each.setting.kind, TableArray),
        )
        if ours and section:
            yield from ("", f"[{section}]")
        for each in ours:
            yield from _entry(each)


def _entry(shown: _Shown) -> "Iterator[str]":
    setting, value = shown.setting, shown.visible()
    key = setting.key or setting.name
    if value is None:
        default = setting.default_words()
        yield f"# {key} = {f'(default: {default})' if default else '(not set)'}"
    elif not isinstance(setting.kind, TableArray):
        yield f"{key} = {toml_text(value)}  # {shown.place()}"
    elif not value:
        yield f"# [[{setting.file_key}]]  # {shown.place()}"
    for row in value if isinstance(setting.kind, TableArray) else ():
        yield from ("", f"[[{setting.file_key}]]  # {shown.place()}")
        for name, one in row.items():
            yield f"{name} = {toml_text(one)}"
