"""The manual page of the configuration file, appliance.toml(5), from the table of settings."""

from collections.abc import Iterator
from typing import Final

from appliance.config.setting_table import SECTIONS
from appliance.config.settings import DEFAULT_CONFIG, Setting
from appliance.system.child_environment import CONFIG_VARIABLE
from tools.config_pages import array_of, rows, written
from tools.roff import escaped, running, sentence, title_line

_ABOUT: Final = (
    f"All commands of appliance read one configuration file: that of --config, or else of "
    f"{CONFIG_VARIABLE}, or else {DEFAULT_CONFIG}, which may be missing. It is TOML. Keys of a "
    "table such as [virtiofs] are for that command, and those before the first table for all "
    "commands that have such an option.",
    "The command line comes before the environment, the environment before the file, and the file "
    "before the defaults. A list is replaced as a whole. Relative paths begin at the directory of "
    "the file.",
    "The file is read once, when a command begins, and checked as a whole. A key that is not known "
    "is a fault, too. Each fault is reported with file, line and key, and nothing is done then.",
    "With SOCKET, --socket-path or --fd, `appliance virtiofs` does not use sockets, listen-dir, "
    "metrics and pid-file of the file. What the file says of substituters and min-free is for a "
    "store of this machine, and for no other.",
    "Everybody may read the file. Credentials of object stores belong into the environment, in the "
    "variables of their vendors' tools.",
)


def config_page() -> str:
    """Return the page."""
    lines = [
        title_line("appliance.toml", "5"),
        ".SH NAME",
        "appliance.toml \\- configuration of appliance",
        ".SH SYNOPSIS",
        f"\\fI{escaped(str(DEFAULT_CONFIG))}\\fR",
        ".SH DESCRIPTION",
    ]
    for number, paragraph in enumerate(_ABOUT):
        lines += [*([".PP"] if number else []), running(paragraph)]
    for section, settings in rows():
        lines += _keys(section, settings)
    lines += [".SH SEE ALSO", ".BR appliance (1),", ".BR appliance\\-config (1)"]
    return "\n".join(lines) + "\n"


def _keys(section: str, settings: list[Setting]) -> Iterator[str]:
    array = array_of(section)
    if array is not None:
        yield from (f".SH [[{escaped(section)}]]", running(sentence(array.help)))
    else:
        yield f".SH {f'[{section}]' if section else 'KEYS'}"
        yield running(sentence(f"{SECTIONS[section]}"))
    for setting in settings:
        yield from (".TP", f"\\fB{escaped(setting.key or setting.name)}\\fR", _about(setting))


def _about(setting: Setting) -> str:
    told = f"{sentence(setting.help)} {sentence(written(setting))}"
    default = setting.default_words()
    return running(f"{told} Default: {default}." if default else told)
