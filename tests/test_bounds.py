"""The bounds in code, in C and in docs/bounds.md are the same, and each names tests that exist."""

import importlib
import re
from pathlib import Path

import pytest

from appliance import bounds

pytestmark = pytest.mark.lint

PROJECT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (PROJECT / "docs/bounds.md").read_text().splitlines()
    if line.startswith("| `")
]


# Bounds that are where they are used have the names of their modules, too.
DOCUMENTED = {name.strip("`"): int(value.replace(",", "")) for name, value, *_rest in ROWS}


def test_the_document_has_every_bound_with_its_value() -> None:
    documented = {name: value for name, value in DOCUMENTED.items() if "." not in name}
    assert documented == {name: value for name, value in vars(bounds).items() if name.isupper()}


def test_bounds_of_other_modules_have_the_values_of_the_document() -> None:
    names = [name.rpartition(".") for name in DOCUMENTED if "." in name]
    assert names
    for module, _dot, name in names:
        value = getattr(importlib.import_module(module), name)
        assert value == DOCUMENTED[f"{module}.{name}"], name


def test_c_has_the_same_numbers() -> None:
    header = (PROJECT / "cffi_build/engine.h").read_text()
    for name, value in (
        ("ENG_REGIONS_MAX", bounds.REGIONS_MAX),
        ("ENG_NUM_MAX", bounds.QUEUE_SIZE_MAX),
        ("ENG_REQUEST_MAX", bounds.REQUEST_COPY_MAX),
    ):
        assert re.search(rf"\b{name} = {value},", header), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_the_tests_of_each_bound_exist(row: list[str]) -> None:
    path, *names = re.findall(r"`([^`]+)`", row[-1])
    text = (PROJECT / path).read_text()
    assert names
    assert [name for name in names if f"def {name}(" not in text] == []
