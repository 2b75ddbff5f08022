import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.lint, pytest.mark.slow]

PROJECT = Path(__file__).resolve().parents[1]


def test_protobuf_code_is_what_the_protos_give(tmp_path: Path) -> None:
    subprocess.run([PROJECT / "setup" / "protos.sh", tmp_path], check=True, timeout=60)

    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2.py*")}
    assert len(made) == 2 * len(list(PROJECT.glob("appliance/protos/*.proto")))
    assert made == {name: (PROJECT / name).read_text() for name in made}


@pytest.mark.parametrize("generator", ["wiregen", "config_pages"])
def test_what_tables_give_is_up_to_date(generator: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tools.{generator}", "--check"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stdout + done.stderr
