"""The command line as a whole."""

import argparse

import pytest

from appliance.cli.main import _parser


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in _parser("")._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def long_options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for name in parser._option_string_actions if name.startswith("--")}


@pytest.mark.parametrize("command", commands())
def test_options_are_never_abbreviated(command: str) -> None:
    parser = commands()[command]
    options = long_options(parser)
    assert "--json" in options
    for option in options:
        for word in {option[:-1], f"{option[:-1]}=1"} - options:
            _, unknown = parser.parse_known_args([word, "argument"])
            assert word in unknown


@pytest.mark.parametrize("words", [["--versio"], ["statu"], ["status", "--jso"]])
def test_abbreviation_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parser(words[0]).parse_args(words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("appliance: ")
