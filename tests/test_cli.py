"""The command line as a whole."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.cli.main import command_parser, main, parse_command
from appliance.cli.output import print_json
from appliance.cli.terminal import terminal_columns


def commands() -> dict[str, argparse.ArgumentParser]:
    return commands_of(command_parser(""), "")


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
    assert takers == {
        *("status", "path-info", "ls", "verify", "copy", "bench", "doctor", "view list"),
        *("profile list", "profile show"),
        *("gc", "delete", "root list", "du", "config"),
    }


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
        main(["cat", "--json", "path"])
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
        main(words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("appliance: ")


def test_the_page_of_all_commands_fits_a_small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal_columns.cache_clear()
    lines = command_parser().format_help().splitlines()
    terminal_columns.cache_clear()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert {name.split()[0] for name in commands()} <= set(words)


@pytest.mark.slow
def test_a_longer_page_goes_through_the_pager(tmp_path: Path) -> None:
    """In a terminal of 80 columns and 24 lines, by tmux; `tee` takes the place of the pager."""
    program = Path(sys.executable).with_name("appliance")
    paged = tmp_path / "paged"
    for command, is_paged in (("", False), ("virtiofs", True)):
        # A server of its own for each: one that was just killed may still be on its socket.
        socket = ("tmux", "-S", str(tmp_path / f"tmux{command}"), "-f", "/dev/null")
        session = [*socket, "new-session", "-d", "-x", "80", "-y", "24"]
        script = f"PAGER='tee {paged}' {program} {command} --help; {socket[0]} -S {socket[2]}"
        waiting = f"{script} wait-for -S done; sleep 60"
        subprocess.run([*session, waiting], check=True, timeout=60)
        subprocess.run([*socket, "wait-for", "done"], check=True, timeout=60)
        shown = subprocess.run(
            [*socket, "capture-pane", "-p"], check=True, timeout=60, capture_output=True, text=True
        ).stdout
        subprocess.run([*socket, "kill-server"], check=True, timeout=60)
        assert paged.exists() == is_paged
        # All of the shorter page is on the screen.
        assert ("usage: appliance COMMAND" in shown) == (not is_paged)
    assert paged.read_text().startswith("usage: appliance virtiofs")


@pytest.mark.parametrize("command", ["status", "verify", "daemon"])
@pytest.mark.parametrize(
    ("words", "level"),
    [
        ([], "INFO"),
        (["-q"], "WARNING"),
        (["--verbose"], "DEBUG"),
        (["--log-level", "error"], "ERROR"),
        (["-q", "--log-level=debug"], "DEBUG"),
        (["--log-level=error", "-v"], "DEBUG"),
    ],
)
def test_the_last_option_of_the_log_level_counts(
    command: str, words: list[str], level: str
) -> None:
    assert parse_command([command, *words]).log_level == level
