"""The command line as a whole."""

import argparse
import json

import pytest

from appliance.cli.main import _parser
from appliance.cli.output import print_json
from appliance.cli.terminal import terminal_columns


def commands() -> dict[str, argparse.ArgumentParser]:
    return commands_of(_parser(""), "")


def commands_of(parser: argparse.ArgumentParser, name: str) -> dict[str, argparse.ArgumentParser]:
    """Return the parser itself if it has no commands; else those, by names such as `view list`."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        return {name.strip(): parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for word, child in below[0].choices.items():
        found |= commands_of(child, f"{name} {word}")
    return found


def long_options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for name in parser._option_string_actions if name.startswith("--")}


@pytest.mark.parametrize("command", commands())
def test_options_are_never_abbreviated(command: str) -> None:
    parser = commands()[command]
    options = long_options(parser)
    assert "--log-level" in options
    for option in options:
        for word in {option[:-1], f"{option[:-1]}=1"} - options:
            _, unknown = parser.parse_known_args([word, "argument", "argument"])
            assert word in unknown


@pytest.mark.parametrize("command", commands())
def test_every_argument_has_a_help_text(command: str) -> None:
    assert [action.dest for action in commands()[command]._actions if not action.help] == []


def test_only_commands_that_print_json_take_json() -> None:
    takers = {name for name, parser in commands().items() if "--json" in long_options(parser)}
    assert takers == {"status", "path-info", "ls", "verify", "copy", "bench", "view list"}


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", commands())
def test_help_fits_the_terminal(
    command: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    terminal_columns.cache_clear()
    lines = commands()[command].format_help().splitlines()
    terminal_columns.cache_clear()
    assert [line for line in lines if len(line) > int(columns)] == []
    assert lines[0].startswith(f"usage: appliance {command} [OPTION]...")


def test_unknown_option_refers_to_the_help_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        _parser("cat").parse_args(["cat", "--json", "path"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "appliance: unrecognized arguments: --json (see appliance cat --help)"


def test_json_has_names_as_they_are(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    names = ["\u00fcn\u00ef", "not UTF-8: \udcff"]
    print_json(names)
    out = capfdbinary.readouterr().out
    assert out == b'["\xc3\xbcn\xc3\xaf", "not UTF-8: \\udcff"]\n'
    assert json.loads(out) == names


@pytest.mark.parametrize("words", [["--versio"], ["statu"], ["status", "--jso"]])
def test_abbreviation_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parser(words[0]).parse_args(words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("appliance: ")
