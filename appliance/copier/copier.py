"""Copies store paths: leaves first, each one checked, and none that the target has already.

First the closure is looked up, breadth first, several paths at a time. Then every missing path is
a job, ordered so that the references of a path come before it. A few threads take the jobs: each
reads a tree into a batch, checks it, waits for the jobs of the path's references, and commits.
Those jobs have started earlier, so no thread waits for a job that cannot start. If a reference was
refused, so is the path.

Fewer threads read than there are: while some paths are being committed, the next ones are read.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from threading import BoundedSemaphore
from typing import Final, NamedTuple, Protocol

from appliance.copier.claim_checks import AddressCheck, CheckClaim, check_nar
from appliance.copier.claims import Content, has_known_nar, path_info_of_claim
from appliance.copier.ingest import CopyProgress, TreeEvent, TreeIngest
from appliance.copier.target import CopyTarget
from appliance.errors import ApplianceError, ServiceUnavailableError, StoreError, StoreFullError
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.path_info_rules import check_claims
from appliance.nix.store_path import StorePath
from appliance.services.closures import references_of
from appliance.store.batch import Batch
from appliance.system.tracing import span

_WAIT_S: Final = 0.1
_NUM_LOOKUPS: Final = 16
# Paths that the target is asked for in one question.
_LOOKED_UP_TOGETHER: Final = 1024
# Threads that wait for references or for the disk, beside those that read.
_NUM_WAITING: Final = 6


@contextmanager
def _threads(number: int, name: str) -> Iterator[ThreadPoolExecutor]:
    executor = ThreadPoolExecutor(number, name)
    try:
        yield executor
    except KeyboardInterrupt:
        # Do not wait for threads that may wait for a server: the process ends now.
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        executor.shutdown(cancel_futures=True)
        raise
    executor.shutdown()


class CopySource(Protocol):
    """Provides store paths: a claim about each, and its tree.

    Its methods may be called from several threads at the same time.
    """

    # How many trees may be read at the same time.
    num_readers: int
    # Whether its claims must be signed by a trusted key.
    needs_signatures: bool

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """Return the claim about `path`, or None if the source does not have the path.

        Raises:
            ApplianceError: the source cannot be read, or the claim breaks a rule.
        """

    def events(self, claim: NarInfoFile) -> Generator[TreeEvent, None, None]:
        """Yield the tree of a path, as `read_nar` does; the caller closes the generator.

        Raises:
            ApplianceError: the tree cannot be read, or breaks a rule.
        """


class CopyStatus(Enum):
    """The result for one path, in a word."""

    COPIED = "copied"
    PRESENT = "present"
    REFUSED = "refused"


class CopyOutcome(NamedTuple):
    """The result for one path; `reason` says why it was refused."""

    path: StorePath
    status: CopyStatus
    nar_size: int = 0
    num_files: int = 0
    reason: str = ""


class _Looked(NamedTuple):
    """The result of a look-up: a claim, a reason why there is none, or neither if present."""

    path: StorePath
    claim: NarInfoFile | None = None
    references: tuple[StorePath, ...] = ()
    reason: str = ""


class ClosureCopy:
    """One copy of some paths.

    Args:
        source: where to copy from.
        target: where to copy to.
        check: raises an error for a claim that is not trusted.
        is_recursive: copy the references of the paths as well, and theirs.
        progress: counts files and bytes.
        when_waiting: called ten times a second while trees are read, and after each path, with the
            numbers of paths done and of all paths to copy.
    """

    def __init__(
        self,
        source: CopySource,
        target: CopyTarget,
        check: CheckClaim,
        *,
        is_recursive: bool,
        progress: CopyProgress,
        when_waiting: Callable[[int, int], None],
    ) -> None:
        self._source = source
        self._check = check
        self._is_recursive = is_recursive
        self._target = target
        self._progress = progress
        self._when_waiting = when_waiting
        self._committer = PathCommitter(target, progress)
        self._reading = BoundedSemaphore(source.num_readers)
        self._jobs: dict[StorePath, Future[CopyOutcome]] = {}
        self._refused: dict[StorePath, str] = {}

    def run(self, paths: Iterable[StorePath]) -> Iterator[CopyOutcome]:
        """Copy, and yield the result for each path; a copied path is durable by then.

        Raises:
            ApplianceError: the target fails in a way that affects all paths.
        """
        num_threads = self._source.num_readers + _NUM_WAITING
        with _threads(num_threads, "copy") as executor, self._stopping():
            claims: dict[StorePath, NarInfoFile] = {}
            for looked in self._look_up(paths):
                if looked.reason:
                    self._refused[looked.path] = looked.reason
                    yield CopyOutcome(looked.path, CopyStatus.REFUSED, reason=looked.reason)
                elif looked.claim is None:
                    yield CopyOutcome(looked.path, CopyStatus.PRESENT)
                else:
                    claims[looked.path] = looked.claim
            for path in cyclic_paths({path: _dependencies(path, claims) for path in claims}):
                reason = f"path {path.absolute()}: its references lead back to it"
                self._refused[path] = reason
                del claims[path]
                yield CopyOutcome(path, CopyStatus.REFUSED, reason=reason)
            self._progress.num_expected_bytes = sum(each.nar_size for each in claims.values())
            for path in _leaves_first(claims):
                self._jobs[path] = executor.submit(self._copy, claims[path])
            for index, job in enumerate(self._jobs.values()):
                while not wait([job], _WAIT_S).done:
                    self._when_waiting(index, len(self._jobs))
                self._when_waiting(index + 1, len(self._jobs))
                yield job.result()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop the jobs that are running if the block ends early."""
        try:
            yield
        except BaseException:
            self._progress.is_stopped = True
            self._target.interrupt()
            raise

    def _look_up(self, paths: Iterable[StorePath]) -> Iterator[_Looked]:
        with _threads(_NUM_LOOKUPS, "look-up") as executor:
            level = list(dict.fromkeys(paths))
            seen = set(level)
            while level:
                following: list[StorePath] = []
                for looked in self._look_at(level, executor):
                    yield looked
                    if self._is_recursive:
                        new = [path for path in looked.references if path not in seen]
                        seen.update(new)
                        following += new
                level = following

    def _look_at(
        self, paths: Sequence[StorePath], executor: ThreadPoolExecutor
    ) -> Iterator[_Looked]:
        for start in range(0, len(paths), _LOOKED_UP_TOGETHER):
            some = paths[start : start + _LOOKED_UP_TOGETHER]
            known = self._target.known_among(some)
            claimed = executor.map(self._claim, [path for path in some if path not in known])
            for path in some:
                if path in known:
                    yield _Looked(path, references=tuple(references_of(known[path])))
                else:
                    yield next(claimed)

    def _claim(self, path: StorePath) -> _Looked:
        try:
            claim = self._source.claim(path)
            if claim is None:
                return _Looked(path, reason=f"path {path.absolute()} is not valid")
            self._check(claim)
        except ApplianceError as exc:
            return _Looked(path, reason=about(path, exc))
        return _Looked(path, claim, claim.references)

    def _copy(self, claim: NarInfoFile) -> CopyOutcome:
        path = claim.path
        if self._progress.is_stopped:
            return CopyOutcome(path, CopyStatus.REFUSED, reason="stopped")
        # If a reference is known to be missing already, there is no need to read the tree.
        reason = self._obstacle(claim, may_wait=False)
        if reason:
            return CopyOutcome(path, CopyStatus.REFUSED, reason=reason)
        try:
            with (
                span("copy", path=path.absolute()),
                self._reading,
                closing(self._source.events(claim)) as events,
            ):
                self._progress.path = path.absolute()
                read = self._committer.read(claim, events)
        except StoreFullError:
            raise
        except ApplianceError as exc:
            return CopyOutcome(path, CopyStatus.REFUSED, reason=about(path, exc))
        try:
            reason = self._obstacle(claim, may_wait=True)
        except BaseException:
            read.batch.discard()
            raise
        if reason:
            read.batch.discard()
            return CopyOutcome(path, CopyStatus.REFUSED, reason=reason)
        return self._committer.commit(read)

    def _obstacle(self, claim: NarInfoFile, *, may_wait: bool) -> str:
        """Return a message if a reference keeps the path from being put, or nothing."""
        for reference in claim.references:
            if reference == claim.path:
                continue
            job = self._jobs.get(reference)
            if job is not None:
                if not may_wait and not job.done():
                    continue
                if job.result().status is CopyStatus.REFUSED:
                    return missing_reference(claim.path, reference)
            elif reference in self._refused:
                return missing_reference(claim.path, reference)
            elif self._target.known(reference) is None:
                hint = "; copy that path first, or copy closures with -r"
                return missing_reference(claim.path, reference) + hint
        return ""


class ReadPath(NamedTuple):
    """A path whose tree was read and checked, ready to be committed."""

    path: StorePath
    content: Content
    batch: Batch


class PathCommitter:
    """Reads, checks and commits one path at a time."""

    def __init__(self, target: CopyTarget, progress: CopyProgress) -> None:
        self._target = target
        self._progress = progress

    def read(self, claim: NarInfoFile, events: Iterable[TreeEvent]) -> ReadPath:
        """Read a tree and check it against `claim`; the caller commits or discards the batch.

        Raises:
            ApplianceError: the tree does not agree with the claim, or cannot be read or staged.
        """
        address = AddressCheck(claim)
        ingest = self.ingest(
            nar_limit=claim.nar_size if has_known_nar(claim) else None, address=address
        )
        try:
            content = ingest.take_all(events)
            check_nar(claim, content)
            return self.checked(claim, content, ingest, address)
        except BaseException:
            ingest.discard()
            raise

    def ingest(
        self, *, nar_limit: int | None = None, address: AddressCheck | None = None
    ) -> TreeIngest:
        """Return a `TreeIngest` for one tree."""
        return TreeIngest(
            self._target,
            self._progress,
            nar_limit=nar_limit,
            nar_hash=None if address is None else address.nar_hash,
            flat_hash=None if address is None else address.flat_hash,
        )

    def checked(
        self,
        claim: NarInfoFile,
        content: Content,
        ingest: TreeIngest,
        address: AddressCheck | None = None,
    ) -> ReadPath:
        """Check the PathInfo and add it to the batch of the tree.

        Raises:
            PathInfoError: it contradicts itself, or its content address that of the content.
        """
        encoded = path_info_of_claim(claim, content)
        check_claims(encoded)
        if address is not None:
            address.check(content)
        ingest.batch.add_path_info(claim.path.digest, encoded, needs_references=True)
        return ReadPath(claim.path, content, ingest.batch)

    def commit(self, read: ReadPath) -> CopyOutcome:
        """Commit a path; takes over the batch in any case.

        Raises:
            StoreFullError, ServiceUnavailableError: the target takes no other path either.
        """
        path, content, batch = read
        try:
            self._target.commit(batch)
        except (StoreFullError, ServiceUnavailableError):
            raise
        except ApplianceError as exc:
            return CopyOutcome(path, CopyStatus.REFUSED, reason=about(path, exc))
        return CopyOutcome(path, CopyStatus.COPIED, content.nar_size, content.num_files)


def missing_reference(path: StorePath, reference: StorePath) -> str:
    """Return the message for a path that was refused because of a reference."""
    return f"path {path.absolute()}: refers to {reference.absolute()}, which is not in the store"


def about(path: StorePath, exc: ApplianceError) -> str:
    """Return the message of an error, which names the path."""
    text = " ".join(str(exc).split())
    return text if path.basename() in text else f"path {path.absolute()}: {text}"


def _dependencies(path: StorePath, claims: Mapping[StorePath, NarInfoFile]) -> list[StorePath]:
    return [
        reference
        for reference in claims[path].references
        if reference != path and reference in claims
    ]


def _leaves_first(claims: Mapping[StorePath, NarInfoFile]) -> Iterator[StorePath]:
    graph = {path: _dependencies(path, claims) for path in claims}
    yield from TopologicalSorter(graph).static_order()


def cyclic_paths(graph: Mapping[StorePath, Sequence[StorePath]]) -> set[StorePath]:
    """Return the paths on cycles of references, given those of each path to others."""
    found: set[StorePath] = set()
    left = dict(graph)
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as exc:
            cycle = set(exc.args[1])
            found |= cycle
            left = {
                path: [reference for reference in references if reference not in cycle]
                for path, references in left.items()
                if path not in cycle
            }
        else:
            return found


def failure_text(refused: Iterable[str], cause: ApplianceError | None) -> StoreError:
    """Return the error of a whole copy: one line per refused path, then the one for `cause`."""
    lines = list(refused)
    if cause is not None:
        lines.append(str(cause))
    return StoreError("\n".join(lines))
