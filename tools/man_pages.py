"""Generates the manual pages from the parser: `python -m tools.man_pages DIRECTORY`.

There is one page for the program, `appliance.1`, one for each command, `appliance-COMMAND.1`, and
one for `appliance-virtiofsd`. The parser is the only source of options; what it does not know, the
examples and the meaning of some exit statuses, is in `manual_examples.py`. A command that is not
mentioned there has a page all the same.

Source: man(7) of groff and mandoc, which both have to read the pages without a warning.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from appliance import __version__
from appliance.cli.main import command_parser, virtiofsd_parser
from tools.manual_examples import EXAMPLES, FURTHER_STATUSES

PROGRAM: Final = "appliance"
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
    ("APPLIANCE_STORE", "The address of the store, in place of --store."),
    ("BLOB_SERVICE_ADDR", "The address of the blob service."),
    ("DIRECTORY_SERVICE_ADDR", "The address of the directory service."),
    ("PATH_INFO_SERVICE_ADDR", "The address of the path-info service."),
    ("APPLIANCE_STATE_DIR", "The state directory, in place of --state-dir."),
    ("APPLIANCE_BLOB_CACHE_SIZE", "The size of the cache, in place of --blob-cache-size."),
    ("PAGER", "The program that shows a --help page that is longer than the terminal."),
)
_FILES: Final = (
    ("/var/lib/appliance/store", "The store of root."),
    ("~/.local/state/appliance/store", "The store of any other user."),
)

Actions = Iterable[argparse.Action]


def pages() -> dict[str, str]:
    """Return the pages by the names of their files."""
    found = dict(_pages_of(command_parser(), ()))
    parser = virtiofsd_parser()
    found[f"{parser.prog}.1"] = _page(parser, (parser.prog,), parser.description or "", ())
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
    summary = summary or _first_lowered(parser.description or "")
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
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(seconds))
    title = "-".join(name)
    lines = [
        f'.TH "{_escaped(title.upper())}" "1" "{date}" "appliance {__version__}" '
        '"Appliance Manual"',
        ".SH NAME",
        f"{_escaped(title)} \\- {_text(_first_lowered(summary).rstrip('.'))}",
        ".SH SYNOPSIS",
        *_synopsis(parser),
        ".SH DESCRIPTION",
        _text(parser.description or summary),
        *_command_lines(commands),
        *_option_lines(parser),
        *_section("EXIT STATUS", _statuses(" ".join(name[1:]))),
        *_section("ENVIRONMENT", _VARIABLES if name[-1] != f"{PROGRAM}-virtiofsd" else ()),
        *(_section("FILES", _FILES) if len(name) == 1 else ()),
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
    return f"\\fB{_escaped(word)}\\fR" if word[0].isalnum() else _escaped(word)


def _command_lines(commands: Iterable[tuple[str, str]]) -> Iterator[str]:
    rows = list(commands)
    if rows:
        yield ".SH COMMANDS"
    for name, text in rows:
        yield from (".TP", f"\\fB{_escaped(name)}\\fR(1)", _text(_sentence(text)))


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
            yield f".SS {_escaped(group.title[0].upper() + group.title[1:])}"
            if group.description:
                yield _text(group.description)
        for action in actions:
            text = formatter._expand_help(action) if action.help else ""
            yield from (".TP", _invocation(action), _text(_sentence(text)))


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"\\fI{_escaped(str(action.metavar or action.dest.upper()))}\\fR"
    names = [f"\\fB{_escaped(name)}\\fR" for name in action.option_strings]
    if action.nargs == 0:
        return ", ".join(names)
    if action.metavar is None and action.choices:
        value = "|".join(f"\\fB{_escaped(str(choice))}\\fR" for choice in action.choices)
    else:
        value = f"\\fI{_escaped(str(action.metavar or action.dest.upper()))}\\fR"
    return ", ".join(f"{name} {value}" for name in names)


def _statuses(command: str) -> Iterator[tuple[str, str]]:
    further = dict(FURTHER_STATUSES.get(command, ()))
    for status, text in _EXIT_STATUSES:
        yield status, " ".join(filter(None, (further.get(status), text)))


def _section(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    entries = list(rows)
    if entries:
        yield f".SH {title}"
    for name, text in entries:
        yield from (".TP", f"\\fB{_escaped(name)}\\fR", _text(text))


def _example_lines(command: str) -> Iterator[str]:
    examples = EXAMPLES.get(command, ())
    if examples:
        yield ".SH EXAMPLES"
    for number, example in enumerate(examples):
        if number:
            yield ".PP"
        yield from (_text(example.purpose), ".PP", ".RS 4", ".nf", _escaped(example.line))
        yield from (".fi", ".RE")


def _references(name: tuple[str, ...], below: list[str]) -> list[str]:
    titles = below or (["appliance"] if name != (PROGRAM,) else [])
    if len(name) > 2:
        titles = ["-".join(name[:-1]), *titles]
    last = titles[-1:]
    return [f".BR {_escaped(title)} (1){'' if [title] == last else ','}" for title in titles]


# --- Text ---


def _text(text: str) -> str:
    """Return running text, with what is between backquotes in bold."""
    pieces = _escaped(" ".join(text.split())).split("`")
    bold = [f"\\fB{piece}\\fR" if number % 2 else piece for number, piece in enumerate(pieces)]
    return "".join(bold)


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti")
    # A line that begins with a dot or an apostrophe would be a request.
    return f"\\&{text}" if text[:1] in {".", "'"} else text


def _sentence(text: str) -> str:
    if not text:
        return ""
    first = text[0].upper() + text[1:]
    return first if first.endswith((".", "!")) else f"{first}."


def _first_lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


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
