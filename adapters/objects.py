"""The store's objects: adapter folders by digest, never changed, and who needs them.

    objects/<version digest>/          a version
    incoming/<token>/                  a copy that is being checked, claimed by `<token>.lock`
    trash/<token>/                     a version that is being deleted
    leases/<version digest>.<token>    locked by whoever needs a version, for as long as it does

A lock that its process does not hold any more is one that a killed process left behind.
"""

import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from adapters.artifact import open_artifact
from adapters.digest import read_provenance, version_digest, weights_digest
from adapters.errors import ArtifactError
from adapters.folder import MAX_FILE_BYTES, PROVENANCE_FILE
from adapters.limits import MIB
from adapters.names import is_digest
from adapters.problems import Code, Problem, refusal, shown
from adapters.reading import open_regular, reading
from adapters.writer import make_folder, sync_folder, write_chunks


class Lease:
    """Keeps a version's folder where it is until `release`, or the end of the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Whoever ends it may run in another thread than whoever took it.
        self._lock = FileLock(path, thread_local=False)
        self._lock.acquire(timeout=0)

    @property
    def path(self) -> Path:
        """The file that is locked."""
        return self._path

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._lock.is_locked:
            self._path.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Incoming:
    """A folder of the store's own for an adapter on its way in; what was not placed goes with it.

    Args:
        folder: empty; whoever has it may write what it likes there.
        lock: held as long as the folder is somebody's.
    """

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.folder = folder
        self._lock = lock

    def copy(self, source: Path) -> None:
        """Copy an adapter's files into the folder.

        Raises: ArtifactError: a file that is a link, no file, too large, or can not be read; or
            that changed meanwhile.
        """
        before = _state(source)
        for name, max_bytes in MAX_FILE_BYTES.items():
            _copy(source / name, self.folder / name, max_bytes)
        if _state(source) != before:
            message = "were changed while they were copied; add the adapter again"
            problem = Problem(Code.FILE_CHANGED, "files", message)
            raise refusal(ArtifactError, source, [problem])
        sync_folder(self.folder)

    def close(self) -> None:
        """Delete what is still there; a second time does nothing."""
        if self._lock.is_locked:
            shutil.rmtree(self.folder, ignore_errors=True)
            _claim_of(self.folder).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Objects:
    """The folders of a store's versions.

    Args:
        root: the store's folder.
        locked: takes the store's lock. Methods marked "under the lock" expect the caller to hold
            it.
    """

    def __init__(self, root: Path, locked: Callable[[], AbstractContextManager[None]]) -> None:
        self._objects = root / "objects"
        self._incoming = root / "incoming"
        self._trash = root / "trash"
        self._leases = root / "leases"
        self._locked = locked

    def folder(self, digest: str) -> Path:
        """Return where a version lies."""
        return self._objects / digest

    def exists(self, digest: str) -> bool:
        """Tell whether a version lies here, whole or not."""
        return self.folder(digest).exists()

    def digests(self) -> list[str]:
        """Return the digests of all versions that lie here, sorted."""
        return [path.name for path in _listed(self._objects) if is_digest(path.name)]

    def incoming(self) -> Incoming:
        """Return a new folder for an adapter on its way in."""
        folder = self._incoming / secrets.token_hex(6)
        # Whoever closes it may run in another thread than whoever opened it.
        lock = FileLock(_claim_of(folder), thread_local=False)
        with self._locked():
            make_folder(self._objects)
            make_folder(self._incoming)
            left_behind = self.left_behind()
            lock.acquire()
            folder.mkdir()
        delete(left_behind)
        return Incoming(folder, lock)

    def is_whole(self, digest: str) -> bool:
        """Tell whether a version is there and still holds what its name promises.

        Cost: reads every tensor.
        """
        folder = self.folder(digest)
        try:
            return folder.is_dir() and digests_of(folder)[1] == digest
        except ArtifactError as error:
            if Code.FILE_UNREADABLE in error.codes:
                raise  # that says nothing of what the file holds
            return False

    def place(
        self, incoming: Path, digest: str, *, is_whole: bool, is_needed: Callable[[], bool]
    ) -> None:
        """Give a checked copy its name, unless that version is there whole. Under the lock.

        Args:
            incoming: the copy.
            digest: of its version.
            is_whole: what `is_whole` said before the lock was taken.
            is_needed: tells whether anybody would miss the version that is there.
        Raises: ArtifactError: the version is there and names another base model.
        """
        target = self.folder(digest)
        if target.exists():
            if is_whole or self.is_whole(digest):
                problem = _other_base(target, incoming)
                if problem is None:
                    return
                if is_needed():
                    raise refusal(ArtifactError, "adapter", [problem])
            delete([self.to_trash(digest)])
        incoming.rename(target)
        sync_folder(self._objects)

    def lease(self, digest: str) -> Lease:
        """Return a new lease on a version. Under the lock."""
        make_folder(self._leases)
        return Lease(self._leases / f"{digest}.{secrets.token_hex(6)}")

    def leased(self, *, besides: Collection[Lease] = ()) -> set[str]:
        """Return the digests that somebody leases. Under the lock.

        Leases that killed processes left are deleted.
        Args: besides: leases that do not count.
        """
        passed_over = {lease.path for lease in besides}
        leased = set()
        for path in _listed(self._leases):
            if path in passed_over or path.is_dir():  # a folder is nobody's lease
                continue
            if _is_claimed(path):
                leased.add(path.name.partition(".")[0])
            else:
                path.unlink(missing_ok=True)
        return leased

    def to_trash(self, digest: str) -> Path:
        """Rename a version in one step to what nobody reads; return where it is. Under the lock."""
        make_folder(self._trash)
        return self.folder(digest).rename(self._trash / secrets.token_hex(6))

    def left_behind(self) -> list[Path]:
        """Return what killed writers left: copies, their claims, trash. Under the lock."""
        copies = {path.with_suffix("") for path in _listed(self._incoming)}
        left = [
            copy
            for copy in sorted(copies)
            if not _claim_of(copy).is_dir() and not _is_claimed(_claim_of(copy))
        ]
        return [*left, *map(_claim_of, left), *_listed(self._trash)]

    def num_bytes(self, digest: str) -> int:
        """Return the bytes of a version's files."""
        return sum(path.lstat().st_size for path in _listed(self.folder(digest)))


def delete(paths: Iterable[Path]) -> None:
    """Delete files and folders that nobody looks for any more; what can not be deleted stays."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def digests_of(folder: Path) -> tuple[str, str]:
    """Return the weights digest and the version digest of an adapter folder.

    Raises: ArtifactError: it breaks the format.
    Cost: reads every tensor once.
    """
    weights = weights_digest(open_artifact(folder))
    return weights, version_digest(weights, folder)


def _other_base(stored: Path, given: Path) -> Problem | None:
    """Say that weights which are stored already claim another base model now.

    A version keeps the rora.json that it came with, so the new claim would be lost.
    """
    claims = [read_provenance(folder).get("base_model") for folder in (stored, given)]
    if claims[1] is not None and claims[0] != claims[1]:
        message = (
            f"names base model {shown(claims[1])}, the store holds these very weights with "
            f"{shown(claims[0])}; add the folder that is right to a store of its own"
        )
        return Problem(Code.BASE_OTHER, PROVENANCE_FILE, message)
    return None


def _copy(source: Path, target: Path, max_bytes: int) -> None:
    """Copy a file, if there is one; a link or anything else but a file is refused."""
    try:
        with open_regular(source, max_bytes=max_bytes) as file:
            write_chunks(target, _chunks(file, source))
    except FileNotFoundError:
        return


def _state(folder: Path) -> list[tuple[int, ...] | None]:
    """Return what tells one state of an adapter's files from another."""
    found: list[tuple[int, ...] | None] = []
    for name in MAX_FILE_BYTES:
        try:
            status = (folder / name).lstat()
        except FileNotFoundError:
            found.append(None)
        else:
            times = (status.st_mtime_ns, status.st_ctime_ns)
            found.append((status.st_dev, status.st_ino, status.st_size, *times))
    return found


def _chunks(file: BinaryIO, source: Path) -> Iterator[bytes]:
    while True:
        with reading(source):
            chunk = file.read(MIB)
        if not chunk:
            return
        yield chunk


def _claim_of(incoming: Path) -> Path:
    return incoming.with_suffix(".lock")


def _is_claimed(path: Path) -> bool:
    """Tell whether a process holds the lock at `path`."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
