"""Options of commands from the table of settings.

A parser leaves what was not given as None; `config.resolution.settle` puts the values in force in
its place, which also come from the environment and the configuration file.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from appliance.config.kinds import Choice, Flag, Several
from appliance.config.setting_table import setting
from appliance.config.settings import (
    DEFAULT_CONFIG,
    Setting,
    Substituters,
)
from appliance.system.child_environment import CONFIG_VARIABLE


def add_settings(
    container: argparse._ActionsContainer,
    *names: str,
    section: str = "",
    use: str = "",
    is_configured: bool = True,
) -> None:
    """Add the options of settings.

    Args:
        container: a parser, or a group of one.
        names: those of the settings.
        section: the section of the file that sets them, where it is not the top.
        use: what this command does with the value, in place of the help in the table.
        is_configured: whether the environment and the file set them for this command, too.
    """
    for name in names:
        one = setting(name, section)
        if use:
            one = replace(one, help=use)
        if not is_configured:
            one = replace(one, variable="", is_in_file=False)
        known = container.get_default("settings") or {}
        container.set_defaults(settings={**known, one.dest: one})
        if one.has_option:
            _add(container, one)


def add_config_option(container: argparse._ActionsContainer) -> None:
    """Add the option that names the configuration file."""
    container.add_argument(
        "--config",
        metavar="FILE",
        type=_config_path,
        help=f"read the configuration file FILE, see appliance.toml(5) (default: {CONFIG_VARIABLE},"
        f" or else {DEFAULT_CONFIG} if there is one)",
    )


def _config_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a path")
    return Path(text)


def _add(container: argparse._ActionsContainer, one: Setting) -> None:
    words: dict[str, Any] = {"help": _help(one)}
    match one.kind:
        case Flag():
            words |= {"action": argparse.BooleanOptionalAction}
        case Several() | Substituters():
            words |= {"action": "append", "metavar": one.metavar}
        case Choice(words=choices, is_upper=is_upper):
            words |= {"choices": choices}
            if is_upper:
                words |= {"type": str.lower, "metavar": one.metavar}
        case _:
            words |= {"metavar": one.metavar}
    container.add_argument(*filter(None, (one.short, one.option)), **words)


def _help(one: Setting) -> str:
    default = one.default_words()
    if one.variable:
        default = f"{one.variable}, or else {default}" if default else one.variable
    is_list = isinstance(one.kind, Several | Substituters)
    text = f"{one.help}; may be given several times" if is_list else one.help
    return f"{text} (default: {default})" if default else text
