"""The example file, and what documents say of the keys."""

import re
from pathlib import Path

import pytest

from appliance.config.config_file import read_config
from appliance.config.setting_table import BY_KEY, all_keys
from appliance.errors import ConfigError
from tools.config_manual import config_page
from tools.config_pages import DOCUMENT, EXAMPLE, example


def set_in_example(text: str) -> str:
    """Return an example in which every key is set."""
    text = re.sub(r"^#(?=[a-z\[])", "", text, flags=re.MULTILINE)
    # This host may lack the groups, and only one of the two can be set.
    text = re.sub(r'"(kvm|appliance)"$', '"root"', text, flags=re.MULTILINE)
    return re.sub(r"^root = .*$", "", text, flags=re.MULTILINE)


def test_the_example_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text(example())
    assert read_config(path, lambda _setting: True).values == {}
    assert EXAMPLE.read_text() == example()


def test_every_key_of_the_example_can_be_set_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text(set_in_example(example()))
    assert {*read_config(path, lambda _setting: True).values, "root"} == set(BY_KEY)


def test_a_misspelt_key_of_the_example_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    text = set_in_example(example())
    for match in list(re.finditer(r"^([a-z-]+) = ", text, re.MULTILINE)):
        path.write_text(f"{text[: match.start()]}x{text[match.start() :]}")
        line = text.count("\n", 0, match.start()) + 1
        with pytest.raises(ConfigError) as caught:
            read_config(path, lambda _setting: False)
        assert f"{path}:{line}: " in str(caught.value)
        assert f"x{match[1]}: unknown key; did you mean " in str(caught.value)


def test_document_and_manual_have_every_key() -> None:
    manual = config_page().replace("\\-", "-")
    for key in all_keys():
        name = key.rpartition(".")[2]
        if not isinstance(
            getattr(BY_KEY.get(key), "kind", None), type(BY_KEY["substituters"].kind)
        ):
            assert f"| `{name}` |" in DOCUMENT.read_text() or key == "virtiofs.sockets"
            assert f"\\fB{name}\\fR" in manual or key == "virtiofs.sockets"
