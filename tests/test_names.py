"""One name means one thing: modules and public classes of the whole tree."""

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

pytestmark = pytest.mark.lint

PACKAGE = Path(__file__).resolve().parents[1] / "appliance"
# Each package has these, and protobuf code has names of its own.
SHARED = {"__init__", "__main__"}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if "protos" not in path.parts and path.stem not in SHARED
)
# A module of fewer lines is part of another one, unless it is the border between two packages.
LINES_MIN = 25


def repeated(named: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    """Return the names that several modules have or define, with those modules."""
    places = defaultdict(list)
    for name, path in named:
        places[name].append(str(path.relative_to(PACKAGE)))
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def test_no_two_modules_have_the_same_name() -> None:
    assert repeated((path.stem, path) for path in MODULES) == {}


def test_no_two_modules_define_a_public_class_of_the_same_name() -> None:
    classes = (
        (node.name, path)
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert repeated(classes) == {}


def test_every_package_says_what_lives_there() -> None:
    silent = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("__init__.py")
        if len((ast.get_docstring(ast.parse(path.read_text())) or "").split()) < 8
    ]
    assert silent == []


def test_every_module_is_worth_a_door() -> None:
    small = [str(path) for path in MODULES if len(path.read_text().splitlines()) < LINES_MIN]
    assert small == []
