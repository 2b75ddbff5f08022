"""Random histories of a store, with collections and kills at any write, against a model.

`make soak-gc` runs it for long: APPLIANCE_SOAK_EXAMPLES is the number of histories.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.collector.collection import CollectOptions, collect, collecting
from appliance.db.environment import Environment
from appliance.errors import ContentMissingError
from appliance.store import blob_files, schema
from appliance.store.batch import Batch
from appliance.store.leases import Lease, LeaseKind
from appliance.store.root_lists import RootLists
from appliance.store.store import Store
from appliance.store.views import View, Views
from tests.collector.stored_trees import (
    Tree,
    check_exactly,
    check_readable,
    make_tree,
    objects_batch,
    put_tree,
)

if TYPE_CHECKING:
    from appliance.nix.store_path import StorePath

pytestmark = pytest.mark.slow
EXAMPLES = int(os.environ.get("APPLIANCE_SOAK_EXAMPLES", "12"))
STEPS = 14
# Where syncs cost nothing: kills of processes are tested, not power cuts.
MEMORY = "/dev/shm"
LARGE = b"large" * (schema.INLINE_MAX // 5 + 1)
CONTENTS = [b"one", b"two", b"three" * 900, LARGE, LARGE[1:]]
NOW = CollectOptions(grace_s=0)
# Trees that overlap in their files, and some of which refer to others.
TREES: list[Tree] = []
for number in range(8):
    chosen = {
        b"f%d" % at: CONTENTS[at] for at in range(5) if number >> at % 3 & 1 or at == number % 5
    }
    referred = [TREES[number // 2].path] if number % 2 else []
    TREES.append(make_tree(f"tree{number}", chosen, referred))
NAMES = ("a", "b")

trees = st.integers(0, len(TREES) - 1)  # as a tree itself would be a very long text
names = st.sampled_from(NAMES)


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that is killed at its write `number`; return whether it was.

    Writes are the beginning and the end of each transaction, and each file that is moved or
    removed.
    """
    child = os.fork()
    if child == 0:
        try:
            _kill_at(number)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def _kill_at(number: int) -> None:
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **named: object) -> object:
            count()
            done = original(*args, **named)
            count()
            return done

        return run

    for owner, name in (
        (Environment, "write"),
        (blob_files.BlobFiles, "remove"),
        (blob_files.BlobFiles, "place"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    begin = Environment.write

    def write(env: Environment, work: Callable[[object], object]) -> object:
        return begin(env, counted(work))

    Environment.write = write  # type: ignore[method-assign, assignment]


class History(RuleBasedStateMachine):
    """A store and what is known of it: who has roots, and what may be there."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="gc-model-", dir=MEMORY)) / "store"
        Store.open(self.path, create=True).close()
        # What was put with its PathInfo and not collected.
        self.present: set[StorePath] = set()
        self.roots: dict[str, set[StorePath]] = {}
        self.views: dict[str, set[StorePath]] = {}
        self.sessions: list[tuple[Lease, set[StorePath]]] = []

    def teardown(self) -> None:
        for lease, _ in self.sessions:
            lease.close()
        shutil.rmtree(self.path.parent)

    def live(self) -> list[Tree]:
        """Return the trees that roots reach and the store has had."""
        listed = [*self.roots.values(), *self.views.values(), *(held for _, held in self.sessions)]
        stack = [path for held in listed for path in held]
        found: set[StorePath] = set()
        by_path = {tree.path: tree for tree in TREES}
        while stack:
            path = stack.pop()
            if path in self.present and path not in found:
                found.add(path)
                stack += by_path[path].references
        return [by_path[path] for path in found]

    def has(self, tree: Tree) -> bool:
        return self.with_store(lambda store: _has(store, tree))

    def with_store(self, work: Callable[[Store], bool | None]) -> bool:
        store = Store.open(self.path)
        try:
            return bool(work(store))
        finally:
            store.close()

    # --- Puts ---

    @rule(at=trees)
    def put(self, at: int) -> None:
        tree = TREES[at]
        self.with_store(lambda store: put_tree(store, tree))
        self.present.add(tree.path)

    @rule(at=trees, grace=st.booleans())
    def put_with_a_collection_between(self, at: int, *, grace: bool) -> None:
        tree = TREES[at]

        def work(store: Store) -> bool:
            store.commit(objects_batch(store, tree))
            self.collect_in(store, CollectOptions(grace_s=3600 if grace else 0))
            batch = Batch()
            batch.add_path_info(tree.path.digest, tree.path_info())
            try:
                store.commit(batch)
            except ContentMissingError:
                assert not grace
                return False
            return True

        if self.with_store(work):
            self.present.add(tree.path)

    @rule(at=trees, number=st.integers(0, 12))
    def kill_a_put(self, at: int, number: int) -> None:
        tree = TREES[at]

        def work() -> None:
            store = Store.open(self.path)
            store.commit(objects_batch(store, tree))
            put_tree(store, tree)

        killed_at(number, work)
        if self.has(tree):
            self.present.add(tree.path)

    # --- Roots ---

    @rule(at=trees, name=names)
    def add_root(self, at: int, name: str) -> None:
        tree = TREES[at]
        if self.has(tree):
            RootLists(self.path).add(name, [tree.path])
            self.roots.setdefault(name, set()).add(tree.path)

    @precondition(lambda self: self.roots)
    @rule(data=st.data())
    def remove_root(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.roots)))
        RootLists(self.path).remove(name)
        del self.roots[name]

    @rule(chosen=st.sets(trees, max_size=2), name=names)
    def set_view(self, chosen: set[int], name: str) -> None:
        paths = {TREES[at].path for at in chosen if self.has(TREES[at])}
        views = Views(self.path)
        with views.locked():
            views.write(name, View(frozenset(paths)))
        self.views[name] = paths

    @rule(at=trees, is_new=st.booleans())
    def look_up_in_a_session(self, at: int, *, is_new: bool) -> None:
        tree = TREES[at]
        if is_new or not self.sessions:
            self.sessions.append((Lease.begin(self.path, LeaseKind.SESSION), set()))
        lease, held = self.sessions[-1]
        if self.has(tree):  # a session holds only what it has found
            lease.hold([tree.path.basename().encode()])
            held.add(tree.path)

    @precondition(lambda self: self.sessions)
    @rule(is_crash=st.booleans())
    def end_a_session(self, *, is_crash: bool) -> None:
        lease, _ = self.sessions.pop(0)
        if is_crash:
            lease.leave()
        else:
            lease.close()

    # --- Collections ---

    @rule()
    def collect(self) -> None:
        def work(store: Store) -> None:
            self.collect_in(store, NOW)
            check_exactly(store, [tree for tree in TREES if tree.path in self.present])

        self.with_store(work)

    @rule(number=st.integers(0, 30))
    def kill_a_collection(self, number: int) -> None:
        def work() -> None:
            store = Store.open(self.path)
            with collecting(store.path):
                collect(store, NOW)

        killed_at(number, work)

        def look(store: Store) -> None:
            self.present = {tree.path for tree in TREES if _has(store, tree)} & self.present

        live = {tree.path for tree in self.live()}
        self.with_store(look)
        assert live <= self.present

    def collect_in(self, store: Store, options: CollectOptions) -> None:
        live = self.live()
        held = {path for _, held in self.sessions for path in held}
        with collecting(store.path):
            collect(store, options)
        kept = {tree.path for tree in TREES if _has(store, tree)}
        expected = {tree.path for tree in live}
        assert held <= expected
        assert expected <= kept if options.grace_s else expected == kept
        self.present = kept
        check_readable(store, live)

    @invariant()
    def what_is_live_reads(self) -> None:
        self.with_store(lambda store: check_readable(store, self.live()))


def _has(store: Store, tree: Tree) -> bool:
    with store.snapshot() as snapshot:
        return snapshot.path_info(tree.path.digest) is not None


TestHistories = History.TestCase
TestHistories.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
