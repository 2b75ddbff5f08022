"""The manual pages, read by groff, man and mandoc; the examples, parsed by the parser."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Final

import pytest

from appliance.cli.main import command_parser
from tools.man_pages import commands_of, pages
from tools.manual_examples import EXAMPLES, FURTHER_STATUSES

DEADLINE_S: Final = 60
READERS: Final = {
    # Each prints a line for everything that it does not like.
    "groff": ("groff", "-man", "-Tutf8", "-ww", "-z"),
    "man": ("man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"),
    "mandoc": ("mandoc", "-Tlint", "-Wwarning"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("man")
    for name, page in pages().items():
        (made / name).write_text(page)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_readers_have_nothing_to_complain_about(reader: str, directory: Path) -> None:
    for page in sorted(directory.iterdir()):
        done = subprocess.run(
            [*READERS[reader], str(page)],
            stdout=subprocess.DEVNULL if reader == "man" else subprocess.PIPE,
            stderr=subprocess.STDOUT if reader != "man" else subprocess.PIPE,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        assert (done.stdout or "") + (done.stderr or "") == "", page.name
        assert done.returncode == 0


def test_every_command_and_program_has_a_page(directory: Path) -> None:
    names = {page.name for page in directory.iterdir()}
    commands = commands_of(command_parser())
    assert {f"appliance-{name}.1" for name in commands} <= names
    assert {"appliance.1", "appliance-virtiofsd.1", "appliance-view-list.1"} <= names


def test_a_page_shows_every_option_of_its_command(directory: Path) -> None:
    for name, (parser, _text) in commands_of(command_parser()).items():
        page = (directory / f"appliance-{name}.1").read_text().replace("\\-", "-")
        options = {word for action in parser._actions for word in action.option_strings}
        assert options - set(re.findall(r"\\fB(-[^\\]*)\\fR", page)) == set(), name
        sections = re.findall(r"^\.SH (.*)$", page, re.MULTILINE)
        assert sections[:4] == ["NAME", "SYNOPSIS", "DESCRIPTION"] + (
            ["COMMANDS"] if commands_of(parser) else ["OPTIONS"]
        )
        assert {"EXIT STATUS", "ENVIRONMENT", "SEE ALSO"} <= set(sections)


def test_pages_refer_to_pages_that_exist(directory: Path) -> None:
    names = {page.name for page in directory.iterdir()}
    for page in directory.iterdir():
        text = page.read_text().replace("\\-", "-")
        for title in re.findall(r"^\.BR (\S+) \(1\)", text, re.MULTILINE):
            assert f"{title}.1" in names, page.name


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_are_accepted_by_the_parser(command: str) -> None:
    for example in EXAMPLES[command]:
        program, *words = shlex.split(example.line)
        assert program == "appliance"
        assert command_parser(words[0]).parse_args(words).command == command


def test_nothing_is_said_of_commands_that_are_gone() -> None:
    assert set(EXAMPLES) | set(FURTHER_STATUSES) <= set(commands_of(command_parser()))


def test_what_is_rendered_is_what_was_meant(directory: Path) -> None:
    done = subprocess.run(
        ["mandoc", "-Tutf8", "-Owidth=80", str(directory / "appliance-doctor.1")],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    text = re.sub(r".\x08", "", done.stdout)
    assert "appliance-doctor - check what this host lacks" in text
    assert "This host lacks what one of the uses needs." in text
    assert "    appliance doctor --json virtiofs" in text
