"""What a server sends as a closure is believed as far as it holds together."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from appliance.castore.directory import Directory, DirectoryNode
from appliance.errors import ContentMissingError, CorruptBlobError, StoreError
from appliance.services.contracts import Services
from tests.contracts.rig import Rig, closure, parent_of
from tests.fakes.scripted_services import ScriptedServices

A = Directory()
B = parent_of(A)
C = Directory([DirectoryNode(b"a", A.digest(), 0), DirectoryNode(b"a'", A.digest(), 0)])
D = parent_of(A, B)

WHOLE: dict[str, list[Directory]] = {
    "a": [A],
    "b a": [B, A],
    "c a": [C, A],
    "d a b": [D, A, B],
    "d b a": [D, B, A],
}
BROKEN: dict[str, tuple[Directory, list[bytes], type[StoreError]]] = {
    "child is missing": (B, [B.to_bytes()], ContentMissingError),
    "root is missing": (B, [A.to_bytes()], CorruptBlobError),
    "child comes first": (B, [A.to_bytes(), B.to_bytes()], CorruptBlobError),
    "child comes twice": (C, [C.to_bytes(), A.to_bytes(), A.to_bytes()], CorruptBlobError),
    "another comes too": (C, [C.to_bytes(), B.to_bytes()], CorruptBlobError),
    "no directory": (B, [B.to_bytes(), b"\xff"], CorruptBlobError),
}


@pytest.fixture
def services(tmp_path: Path) -> Iterator[ScriptedServices]:
    with ScriptedServices(tmp_path) as scripted:
        yield scripted


def received(services: ScriptedServices, root: Directory, sent: Sequence[bytes]) -> list[Directory]:
    services.closures[root.digest()] = list(sent)

    async def work(opened: Services) -> list[Directory]:
        return await closure(opened.directories, root.digest())

    return Rig(services.uri).run(work)


@pytest.mark.parametrize("sent", WHOLE.values(), ids=WHOLE.keys())
def test_closure_that_is_whole_is_received_in_its_order(
    services: ScriptedServices, sent: list[Directory]
) -> None:
    assert received(services, sent[0], [item.to_bytes() for item in sent]) == sent


def test_empty_answer_is_absence(services: ScriptedServices) -> None:
    assert received(services, B, []) == []


@pytest.mark.parametrize(("root", "sent", "error"), BROKEN.values(), ids=BROKEN.keys())
def test_closure_that_is_not_is_an_error(
    services: ScriptedServices, root: Directory, sent: list[bytes], error: type[StoreError]
) -> None:
    with pytest.raises(error):
        received(services, root, sent)


def test_address_where_nobody_listens_is_no_error_before_it_is_used(tmp_path: Path) -> None:
    async def nothing(_services: Services) -> None:
        pass

    for uri in (f"grpc+unix://{tmp_path}/somewhere", "grpc+http://localhost", "grpc+https://[::1]"):
        Rig(uri).run(nothing)
