"""AdapterStore: immutable adapter versions by digest, and names that point to them.

    store/objects/<version digest>/    an adapter folder, never changed
    store/names/<name>.json            its versions, oldest first, its aliases and their history
    store/leases/<digest>.<token>      locked by whoever needs a version, for as long as it does
    store/probes/<version digest>.json how its probe came out, and whether its quarantine was lifted
    store/incoming/, store/trash/      what is being added and deleted

Every change is written under a temporary name, synced and renamed; changes of one store are made
one at a time under a file lock, readers need none.
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from adapters.artifact import read_folder
from adapters.digest import CHANGED
from adapters.errors import (
    AdapterNotFoundError,
    AliasMovedError,
    ArtifactError,
    NoEarlierVersionError,
    RoraError,
    StoreError,
)
from adapters.examination import Examined, version_of
from adapters.name_files import NameFiles
from adapters.names import (
    LATEST,
    MIN_DIGEST_PREFIX,
    Event,
    NameHistory,
    NameRecord,
    Version,
    check_alias,
    check_name,
    is_name,
)
from adapters.objects import Incoming, Lease, Objects, delete, digests_of
from adapters.problems import refusal, shown
from adapters.removal import check_name_may_go, kept_versions, without_alias, without_version
from adapters.validation import validate
from adapters.verdict import ProbeVerdict
from adapters.verdict_files import Lift, ProbeRecord, VerdictFiles
from adapters.writer import make_folder, write_error

_LOCK_SECONDS = 60  # changes under the lock take milliseconds


@dataclass(frozen=True)
class ResolvedVersion:
    """A version as a request named it, with the folder that holds it."""

    name: str
    version: Version
    folder: Path

    @property
    def public_id(self) -> str:
        """`name@sha256:<12 digits>`: what the server tells about a request."""
        return f"{self.name}@sha256:{self.version.digest[:MIN_DIGEST_PREFIX]}"


@dataclass(frozen=True)
class Collected:
    """What a garbage collection took, or would take.

    Args:
        digests: of the versions, sorted.
        num_bytes: of their files.
        leased: versions that no name holds and somebody still needs.
    """

    digests: tuple[str, ...]
    num_bytes: int
    leased: tuple[str, ...]


class AdapterStore:
    """Names and versions of adapters in one folder.

    Args:
        root: the store's folder. It need not exist: an absent store is empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._objects = Objects(root, self._locked)
        self._names = NameFiles(root)
        self._verdicts = VerdictFiles(root)

    # Reading.

    def names(self) -> list[NameRecord]:
        """Return every name's record, sorted by name; a broken one is logged and left out.

        Cost: one look at each name's file, and a read of those that changed since the last time.
        """
        return self._names.records()

    def every_name(self) -> list[str]:
        """Return every name, sorted, those too whose record is broken."""
        return sorted(self._names.names())

    def resolve(self, reference: str) -> ResolvedVersion:
        """Return the version that `name`, `name@alias` or `name@sha256:<digits>` means now.

        Raises: AdapterNotFoundError: no such name, alias or digest, or a digest of fewer than 12
            digits or that two versions begin with.
        Cost: one small read.
        """
        name, at, wanted = reference.partition("@")
        record = self._existing(name).record
        version = record.latest if not at else record.find(wanted)
        return self.resolved(name, version)

    def resolved(self, name: str, version: Version) -> ResolvedVersion:
        """Return a version that `name` holds with the folder that holds it."""
        return ResolvedVersion(name, version, self._objects.folder(version.digest))

    def record(self, name: str) -> NameRecord:
        """Return what a name holds.

        Raises: AdapterNotFoundError: no such name.
        """
        return self._existing(name).record

    def history(self, name: str) -> tuple[Event, ...]:
        """Return the moves of a name's aliases, oldest first, the last 200 of each.

        Raises: AdapterNotFoundError: no such name.
        """
        return self._existing(name).events

    def probe_record(self, digest: str) -> ProbeRecord:
        """Return how a version's probe came out so far, by engine build.

        Cost: one small read.
        """
        return self._verdicts.read(digest)

    def lease(self, resolved: ResolvedVersion) -> Lease:
        """Return a lease that keeps a version's folder from garbage collection.

        Raises:
            AdapterNotFoundError: it was collected since it was resolved.
            StoreError: the store can not be written.
        """
        with self._locked():
            lease = self._objects.lease(resolved.version.digest)
            if not resolved.folder.is_dir():
                lease.release()
                raise AdapterNotFoundError(
                    f"{resolved.public_id}: was removed from the store; resolve it again"
                )
        return lease

    # Changing.

    def add(self, folder: Path, *, name: str, alias: str = LATEST) -> ResolvedVersion:
        """Copy an adapter folder into the store and let `name` and `alias` of it mean it.

        Adding what a name already holds moves the alias to it and adds no second version. A name's
        first version is its `latest`, whatever the alias.

        Raises:
            AdapterNameError: `name` or `alias` breaks the grammar.
            ArtifactError: every rule that the folder breaks; nothing was stored.
            StoreError: the store can not be written.
        Cost: reads the adapter three times, writes it once; others wait only while it is renamed.
        """
        check_name(name)
        check_alias(alias)
        # What is wrong with it is said before anything is copied.
        if read_folder(folder)[1]:
            raise refusal(ArtifactError, folder, validate(folder).problems)
        with self._writing(), self.incoming() as incoming:
            incoming.copy(folder)
            # All is said of the copy: the source may change under us.
            examined = self.examine(incoming.folder, given=folder)
            with self._locked():
                self._place(examined)
                return self._name(examined.version, name, alias)

    # The steps of adding, for whoever has more to ask of an adapter before it has a name.

    def incoming(self) -> Incoming:
        """Return a new folder of the store's own, to be filled with an adapter, and to be closed.

        Raises: StoreError: the store can not be written.
        """
        with self._writing():
            return self._objects.incoming()

    def examine(self, folder: Path, *, given: Path | str) -> Examined:
        """See that an adapter keeps every rule, and which version it is.

        Args:
            folder: of the adapter, in an `incoming`.
            given: what its errors call it.
        Raises: ArtifactError: every rule that it breaks.
        Cost: reads the adapter twice, and the same version that is stored once.
        """
        version = version_of(folder, given=given, added=_now())
        return Examined(folder, version, is_stored=self._objects.is_whole(version.digest))

    def stage(self, examined: Examined, name: str) -> tuple[ResolvedVersion, Lease]:
        """Store a version that no name holds yet; return it as `name` would, and a lease on it.

        Once the lease ends, the version stays only if it was named, see `discard`.

        Raises:
            ArtifactError: it is stored already and names another base model.
            StoreError: the store can not be written.
        """
        with self._locked():
            if not self._objects.digests():
                self._names.make_folder()  # without it garbage could not be told from the rest
            self._place(examined)
            lease = self._objects.lease(examined.version.digest)
        return self.resolved(name, examined.version), lease

    def publish(self, staged: ResolvedVersion, alias: str) -> ResolvedVersion:
        """Let the name of a staged version, and `alias` of it, mean it; the rest as in `add`.

        Raises: AdapterNameError, StoreError: as in `add`.
        """
        check_name(staged.name)
        check_alias(alias)
        with self._locked():
            return self._name(staged.version, staged.name, alias)

    def discard(self, digest: str) -> None:
        """Delete a version unless a name holds it, or might, or somebody leases it.

        Cost: as `names`.
        """
        with self._locked():
            # A name's file that is broken may hold any version.
            if len(self._names.records()) < len(self._names.names()) or self._is_needed(digest):
                return
            trash = [self._objects.to_trash(digest)] if self._objects.exists(digest) else []
        delete(trash)

    # Names and aliases.

    def set_alias(
        self, reference: str, alias: str, *, instead_of: Collection[str | None] | None = None
    ) -> ResolvedVersion:
        """Let `alias` of a name mean the version that `reference` means.

        Args: instead_of: digests of versions that it may mean by now, None for no version; left
            out, it may mean anything.

        Raises:
            AdapterNameError: `alias` breaks the grammar.
            AdapterNotFoundError: no such name or version.
            AliasMovedError: it means something else.
        """
        check_alias(alias)
        name, at, wanted = reference.partition("@")
        self._existing(name)  # before a folder is made for the lock
        with self._locked():
            history = self._existing(name)
            version = history.record.latest if not at else history.record.find(wanted)
            if instead_of is not None and history.record.aliases.get(alias) not in instead_of:
                raise _moved(name, alias)
            self._names.write(history.moved(alias, version.digest, action="alias", at=_now()))
        return self.resolved(name, version)

    def rollback(self, name: str, alias: str = LATEST, *, to: str | None = None) -> ResolvedVersion:
        """Let `alias` mean what it meant before; a second rollback goes one step further back.

        Args: to: digest of the version that this has to be.

        Raises:
            AdapterNotFoundError: no such name or alias.
            NoEarlierVersionError: it has not meant anything else.
            AliasMovedError: it is another version.
        """
        self._existing(name)
        with self._locked():
            history = self._existing(name)
            version = _before(history, alias)
            if to is not None and version.digest != to:
                raise _moved(name, alias)
            self._names.write(history.moved(alias, version.digest, action="rollback", at=_now()))
        return self.resolved(name, version)

    def before(self, name: str, alias: str = LATEST) -> Version:
        """Return what a rollback would go to. Raises: as `rollback`."""
        return _before(self._existing(name), alias)

    def remove(
        self, reference: str, *, force: bool = False, besides: Collection[Lease] = ()
    ) -> None:
        """Remove a name, one version of it (`name@sha256:…`) or an alias (`name@alias`).

        Files stay until `collect_garbage`. An alias other than `latest` goes without force.

        Args: besides: leases that stand against nothing.

        Raises:
            AdapterNotFoundError: no such name, version or alias.
            StoreConflictError: without force: an alias means the version, the name has aliases
                besides `latest`, or somebody holds a lease on one of its versions; with force: the
                last version of a name, or its alias `latest`.
        """
        name, at, wanted = reference.partition("@")
        self._existing(name)
        with self._locked():
            history = self._existing(name)
            leased = set() if force else self._objects.leased(besides=besides)
            if not at:
                check_name_may_go(history.record, leased, force=force)
                self._names.delete(name)
            elif ":" in wanted:
                version = history.record.find(wanted)
                left = without_version(history, version, leased, force=force, at=_now())
                self._names.write(left)
            else:
                self._names.write(without_alias(history, wanted, at=_now()))

    def keep_verdict(self, resolved: ResolvedVersion, build: str, verdict: ProbeVerdict) -> None:
        """Keep how a version's probe came out in an engine build.

        Raises: StoreError: the store can not be written.
        """
        digest = resolved.version.digest
        with self._locked():
            record = self._verdicts.read(digest).with_verdict(build, verdict)
            self._verdicts.write(digest, record)

    def lift_quarantine(self, reference: str, *, by: str) -> ResolvedVersion:
        """Let a version be served whatever its probe says, now and in any engine build.

        Args: by: who decided so, for those who wonder.

        Raises:
            AdapterNotFoundError: no such name or version.
            StoreError: the store can not be written.
        """
        resolved = self.resolve(reference)
        digest = resolved.version.digest
        with self._locked():
            record = replace(self._verdicts.read(digest), lifted=Lift(_now(), shown(by)))
            self._verdicts.write(digest, record)
        return resolved

    def collect_garbage(
        self, *, keep_versions: int | None = None, dry_run: bool = False
    ) -> Collected:
        """Delete versions that no name holds and nobody leases, and what crashes left behind.

        Args:
            keep_versions: also drop a name's versions beyond this many newest, except those that an
                alias means or somebody leases.
            dry_run: only say what would be deleted.
        Raises: StoreError: a name's file is broken, so that what it needs is not known.
        """
        if not self.root.exists():
            return Collected((), 0, ())
        with self._locked():
            leased = self._objects.leased()
            if self._objects.digests() and not self._names.exist():
                raise StoreError(
                    f"{self.root}: holds versions and no folder names/, so that what is needed is "
                    "not known; restore it"
                )
            held: set[str] = set()
            for name in self._names.names():
                history = self._names.read(name)
                if history is None:
                    continue
                kept = kept_versions(history.record, keep_versions, leased)
                if not dry_run and len(kept) < len(history.record.versions):
                    self._names.write(history.with_versions(kept))
                held |= {version.digest for version in kept}
            unheld = [digest for digest in self._objects.digests() if digest not in held]
            garbage = [digest for digest in unheld if digest not in leased]
            num_bytes = sum(map(self._objects.num_bytes, garbage))
            trash: list[Path] = []
            if not dry_run:
                trash += map(self._objects.to_trash, garbage)
                trash += self._objects.left_behind() + self._names.left_behind()
                trash += self._verdicts.left_behind(self._objects.digests())
        delete(trash)
        return Collected(tuple(garbage), num_bytes, tuple(d for d in unheld if d in leased))

    # Parts of a change; the caller holds the lock.

    def _place(self, examined: Examined) -> None:
        digest = examined.version.digest
        self._objects.place(
            examined.folder,
            digest,
            is_whole=examined.is_stored,
            is_needed=lambda: self._is_needed(digest),
        )

    def _is_needed(self, digest: str) -> bool:
        """Tell whether a name holds a version or somebody leases it."""
        if digest in self._objects.leased():
            return True
        records = self._names.records()
        return any(version.digest == digest for r in records for version in r.versions)

    def _name(self, version: Version, name: str, alias: str) -> ResolvedVersion:
        history = self._names.read(name) or NameHistory(NameRecord(name, (), {}))
        known = history.record.versions
        if all(old.digest != version.digest for old in known):
            history = history.with_versions((*known, version))
        aliases = [alias] if LATEST in history.record.aliases else [LATEST, alias]
        for moved in aliases:
            history = history.moved(moved, version.digest, action="add", at=_now())
        self._names.write(history)
        return self.resolved(name, version)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._writing():
            make_folder(self.root)
            try:
                with FileLock(self.root / ".lock", timeout=_LOCK_SECONDS):
                    yield
            except Timeout as error:
                raise StoreError(
                    f"{self.root / '.lock'}: held by another process for {_LOCK_SECONDS} s; see "
                    "what it does, or try again"
                ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except RoraError:
            raise
        except OSError as error:
            advice = "name a folder that is yours"
            raise write_error(self.root, error, advice=advice) from error

    def _existing(self, name: str) -> NameHistory:
        history = self._names.read(name) if is_name(name) else None
        if history is None:
            raise AdapterNotFoundError(f"adapter {shown(name)!r}: the store holds no such name")
        return history


def verify(resolved: ResolvedVersion) -> None:
    """See that a version's folder still holds what its digest promises.

    Raises: ArtifactError: it was changed, damaged or removed since it was stored.
    Cost: reads every tensor once.
    """
    if digests_of(resolved.folder) != (resolved.version.weights_digest, resolved.version.digest):
        raise ArtifactError(f"{resolved.folder}: {CHANGED}")


def _before(history: NameHistory, alias: str) -> Version:
    """Return what an alias meant before it meant what it does."""
    history.record.find(alias)
    previous = history.previous(alias)
    if previous is None:
        raise NoEarlierVersionError(
            f"adapter {history.record.name!r}: alias {alias!r} has no earlier version to go back to"
        )
    return history.record.version(previous)


def _moved(name: str, alias: str) -> AliasMovedError:
    return AliasMovedError(
        f"adapter {name!r}: alias {alias!r} was moved meanwhile and stays so; look where it is and "
        "ask again"
    )


def _now() -> int:
    return int(time.time())
