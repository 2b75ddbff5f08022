"""Generates the manual pages from the parser: `python -m tools.man_pages DIRECTORY`.

There is one page for the program, `appliance.1`, one for each command, `appliance-COMMAND.1`, one
for `appliance-virtiofsd`, and `appliance.toml.5`, see `config_manual.py`. The parser is the only
source of options; what it does not know, the examples and the meaning of some exit statuses, is in
`manual_examples.py`. A command that is not mentioned there has a page all the same.

Source: man(7) of groff and mandoc, which both have to read the pages without a warning.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from appliance.cli.main import command_parser, virtiofsd_parser
from appliance.config.setting_table import SETTINGS
from appliance.config.settings import DEFAULT_CONFIG
from appliance.system.child_environment import CONFIG_VARIABLE
from tools.config_manual import config_page
from tools.manual_examples import EXAMPLES, FURTHER_STATUSES
from tools.roff import PROGRAM, escaped, first_lowered, running, section, sentence, title_line

_EXIT_STATUSES: Final = (
    ("0", "The command did what it was asked to do."),
    ("1", "It failed; one line on standard error says why."),
    ("2", "An argument or a variable is not valid; nothing was done."),
    (
        ">128",
        "A signal ended it: 128 and the number of the signal, as shells count.",
    ),
)
_VARIABLES: Final = (
    *((each.variable, f"In place of {each.option}.") for each in SETTINGS if each.variable),
    (CONFIG_VARIABLE, "The configuration file, in place of --config."),
    ("PAGER", "The program that shows a --help page that is longer than the terminal."),
)
_FILES: Final = (
    (str(DEFAULT_CONFIG), "The configuration file; see appliance.toml(5)."),
    ("/var/lib/appliance/store", "The store of root."),
    ("~/.local/state/appliance/store", "The store of any other user."),
)

Actions = Iterable[argparse.Action]


def pages() -> dict[str, str]:
    """Return the pages by the names of their files."""
    found = dict(_pages_of(command_parser(), ()))
    parser = virtiofsd_parser()
    found[f"{parser.prog}.1"] = _page(parser, (parser.prog,), parser.description or "", ())
    found["appliance.toml.5"] = config_page()
    return found


def commands_of(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """Return the commands below `parser`, each with its help text."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {each.dest: each.help or "" for each in action._choices_actions}
            return {name: (child, texts[name]) for name, child in action.choices.items()}
    return {}


def _pages_of(
    parser: argparse.ArgumentParser, words: tuple[str, ...], summary: str = ""
) -> Iterator[tuple[str, str]]:
    commands = commands_of(parser)
    name = (PROGRAM, *words)
    summary = summary or first_lowered(parser.description or "")
    rows = [("-".join((*name, word)), text) for word, (_child, text) in commands.items()]
    yield f"{'-'.join(name)}.1", _page(parser, name, summary, rows)
    for word, (child, text) in commands.items():
        yield from _pages_of(child, (*words, word), text)


# --- One page ---


def _page(
    parser: argparse.ArgumentParser,
    name: tuple[str, ...],
    summary: str,
    commands: Iterable[tuple[str, str]],
) -> str:
    title = "-".join(name)
    lines = [
        title_line(title, "1"),
        ".SH NAME",
        f"{escaped(title)} \\- {running(first_lowered(summary).rstrip('.'))}",
        ".SH SYNOPSIS",
        *_synopsis(parser),
        ".SH DESCRIPTION",
        running(parser.description or summary),
        *_command_lines(commands),
        *_option_lines(parser),
        *section("EXIT STATUS", _statuses(" ".join(name[1:]))),
        *section("ENVIRONMENT", _VARIABLES if name[-1] != f"{PROGRAM}-virtiofsd" else ()),
        *(section("FILES", _FILES) if len(name) == 1 else ()),
        *_example_lines(" ".join(name[1:])),
        ".SH SEE ALSO",
        *_references(name, [row[0] for row in commands]),
    ]
    return "\n".join(lines) + "\n"


def _synopsis(parser: argparse.ArgumentParser) -> Iterator[str]:
    usage = parser.format_usage().removeprefix("usage: ").strip()
    for number, line in enumerate(usage.splitlines()):
        if number:
            yield ".br"
        words = line.split()
        yield " ".join(_word(word) for word in words)


def _word(word: str) -> str:
    """Return a word of a synopsis: what is typed is bold, what stands for something is italic."""
    match = re.fullmatch(r"([\[(]*)([A-Z|]+[A-Z=]*)([\])]*)(\.*)([\])]*)", word)
    if match:
        before, name, after, dots, last = match.groups()
        return f"{before}\\fI{name}\\fR{after}{dots}{last}"
    return f"\\fB{escaped(word)}\\fR" if word[0].isalnum() else escaped(word)


def _command_lines(commands: Iterable[tuple[str, str]]) -> Iterator[str]:
    rows = list(commands)
    if rows:
        yield ".SH COMMANDS"
    for name, text in rows:
        yield from (".TP", f"\\fB{escaped(name)}\\fR(1)", running(sentence(text)))


def _option_lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    yield ".SH OPTIONS"
    # The first two groups are of arguments and options without a title of their own.
    for number, group in enumerate(parser._action_groups):
        actions = [
            action
            for action in group._group_actions
            if action.help is not argparse.SUPPRESS
            and not isinstance(action, argparse._SubParsersAction)
        ]
        if not actions:
            continue
        if number >= 2 and group.title:
            yield f".SS {escaped(group.title[0].upper() + group.title[1:])}"
            if group.description:
                yield running(group.description)
        for action in actions:
            text = formatter._expand_help(action) if action.help else ""
            yield from (".TP", _invocation(action), running(sentence(text)))


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"\\fI{escaped(str(action.metavar or action.dest.upper()))}\\fR"
    names = [f"\\fB{escaped(name)}\\fR" for name in action.option_strings]
    if action.nargs == 0:
        return ", ".join(names)
    if action.metavar is None and action.choices:
        value = "|".join(f"\\fB{escaped(str(choice))}\\fR" for choice in action.choices)
    else:
        value = f"\\fI{escaped(str(action.metavar or action.dest.upper()))}\\fR"
    return ", ".join(f"{name} {value}" for name in names)


def _statuses(command: str) -> Iterator[tuple[str, str]]:
    further = dict(FURTHER_STATUSES.get(command, ()))
    for status, text in _EXIT_STATUSES:
        yield status, " ".join(filter(None, (further.get(status), text)))


def _example_lines(command: str) -> Iterator[str]:
    examples = EXAMPLES.get(command, ())
    if examples:
        yield ".SH EXAMPLES"
    for number, example in enumerate(examples):
        if number:
            yield ".PP"
        yield from (running(example.purpose), ".PP", ".RS 4", ".nf", escaped(example.line))
        yield from (".fi", ".RE")


def _references(name: tuple[str, ...], below: list[str]) -> list[str]:
    titles = below or (["appliance"] if name != (PROGRAM,) else [])
    if len(name) > 2:
        titles = ["-".join(name[:-1]), *titles]
    last = titles[-1:]
    return [f".BR {escaped(title)} (1){'' if [title] == last else ','}" for title in titles]


def main(words: list[str]) -> None:
    """Write all pages into the directory that is named."""
    if len(words) != 1:
        sys.exit("usage: python -m tools.man_pages DIRECTORY")
    directory = Path(words[0])
    directory.mkdir(parents=True, exist_ok=True)
    for name, page in pages().items():
        (directory / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
