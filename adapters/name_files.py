"""The files of a store's names, and a copy of all of them in one.

    names/<name>.json    what a name holds: the truth
    listing.tsv          the same of every name, so that ten thousand of them are listed without as
                         many reads

An entry of the listing counts only while the name's file is the very one (inode, time and size)
that it was copied from. Deleting the listing costs time and nothing else. What is served, moved or
deleted is always read from the name's own file.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from adapters.errors import ArtifactError, StoreError
from adapters.limits import MIB
from adapters.names import (
    LATEST,
    NameHistory,
    NameRecord,
    Version,
    from_json,
    is_digest,
    is_name,
    is_time,
    to_json,
)
from adapters.reading import open_regular
from adapters.writer import make_folder, replace_file, sync_folder

_FEW_READS = 32  # names' files that are read in less time than the listing

# What a line of the listing takes, roughly.
_NAME_BYTES, _VERSION_BYTES, _ALIAS_BYTES = 120, 170, 100
_SLACK_BYTES = 64 * 1024
_MAX_NAME_FILE_BYTES, _MAX_LISTING_BYTES = 64 * MIB, 1024 * MIB

logger = logging.getLogger(__name__)


def file_key(found: os.stat_result) -> str:
    """Return what tells one state of a file from another: inode, time of change, size."""
    return f"{found.st_ino}:{found.st_mtime_ns}:{found.st_size}"


class NameFiles:
    """The names of a store.

    Args: root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        self._names = root / "names"
        self._lock = root / ".lock"
        self._listing = _Listing(root / "listing.tsv")

    def exist(self) -> bool:
        """Tell whether there is a folder of names."""
        return self._names.is_dir()

    def make_folder(self) -> None:
        """Make the folder of names, if need be; the caller holds the store's lock."""
        make_folder(self._names)

    def names(self) -> list[str]:
        """Return every name that has a file."""
        return list(self._scan())

    def records(self) -> list[NameRecord]:
        """Return every name's record, sorted by name; a broken one is logged and left out.

        Cost: one look at each file, and a read of those that changed since the last time.
        """
        found = sorted(self._scan().items())
        unknown = [name for name, key in found if self._listing.find(name, key) is None]
        if len(unknown) > _FEW_READS:
            self._listing.load()
        entries: dict[str, tuple[str, NameRecord]] = {}
        num_read = 0
        for name, key in found:
            record = self._listing.find(name, key)
            if record is None:
                num_read += 1
                record = self._readable(name)
                if record is None:
                    continue
                self._listing.remember(key, record)
            entries[name] = (key, record)
        if num_read > _FEW_READS or self._listing.has_grown_old(entries):
            # Somebody else is at it, or the store can only be read: it is listed all the same.
            with suppress(Timeout, OSError), FileLock(self._lock, timeout=0):
                self._listing.rewrite(entries)
        return [record for _, record in entries.values()]

    def read(self, name: str) -> NameHistory | None:
        """Return what a name holds, or None.

        Raises: StoreError: its file can not be read, or breaks the format.
        """
        path = self._path(name)
        try:
            with open_regular(path, max_bytes=_MAX_NAME_FILE_BYTES) as file:
                text = file.read()
        except FileNotFoundError:
            return None
        except ArtifactError as error:
            raise StoreError(f"{path}: {error.problems[0].message}") from error
        except OSError as error:
            raise StoreError(f"{path}: can not be read ({error.strerror})") from error
        return from_json(text, name=name, path=path)

    def write(self, history: NameHistory) -> None:
        """Replace what a name holds in one step; the caller holds the store's lock."""
        make_folder(self._names)
        path = self._path(history.record.name)
        replace_file(path, to_json(history))
        self._listing.append(history.record, file_key(path.stat()))

    def delete(self, name: str) -> None:
        """Forget a name; the caller holds the store's lock."""
        self._path(name).unlink()
        sync_folder(self._names)

    def left_behind(self) -> list[Path]:
        """Return files that killed writers left; the caller holds the store's lock."""
        return list(self._names.glob(".*.tmp"))

    def _readable(self, name: str) -> NameRecord | None:
        try:
            history = self.read(name)
        except StoreError as error:
            logger.warning("%s", error)
            return None
        return None if history is None else history.record

    def _path(self, name: str) -> Path:
        return self._names / f"{name}.json"

    def _scan(self) -> dict[str, str]:
        """Return the names that have a file, with what tells its state."""
        found = {}
        try:
            with os.scandir(self._names) as entries:
                for entry in entries:
                    name = entry.name.removesuffix(".json")
                    if name != entry.name and is_name(name):
                        with suppress(FileNotFoundError):
                            found[name] = file_key(entry.stat(follow_symlinks=False))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StoreError(f"{self._names}: can not be read ({error.strerror})") from error
        return found


@dataclass
class _Listing:
    """The copy at `path`: one line for each change of a name, the last one counts."""

    path: Path
    _entries: dict[str, tuple[str, NameRecord]] = field(default_factory=dict)
    _loaded: str = ""

    def find(self, name: str, key: str) -> NameRecord | None:
        """Return the record of a name whose file is still the one that was copied."""
        entry = self._entries.get(name)
        return entry[1] if entry is not None and entry[0] == key else None

    def remember(self, key: str, record: NameRecord) -> None:
        """Keep a record that was read from its own file."""
        self._entries[record.name] = (key, record)

    def load(self) -> None:
        """Read the copy, if it changed since it was read; what is broken in it is left out."""
        try:
            with open_regular(self.path, max_bytes=_MAX_LISTING_BYTES) as file:
                key = file_key(os.fstat(file.fileno()))
                if key == self._loaded:
                    return
                text = file.read().decode(errors="replace")
        except (OSError, ArtifactError):
            return
        self._loaded = key
        lines = text[: text.rfind("\n") + 1].splitlines()  # a last one without an end is torn
        # The last line of a name counts, so the earlier ones need not be understood.
        newest = {line.partition("\t")[0]: line for line in lines}
        for name, line in newest.items():
            with suppress(ValueError, TypeError):
                _, entry_key, versions, aliases = line.split("\t")
                self._entries[name] = (entry_key, _record(name, versions, aliases))

    def append(self, record: NameRecord, key: str) -> None:
        """Add what a name holds now; the caller holds the store's lock."""
        with suppress(OSError), self.path.open("a") as file:
            file.write(_line(record, key))

    def has_grown_old(self, entries: Mapping[str, tuple[str, NameRecord]]) -> bool:
        """Tell whether most of the file is lines of what is past."""
        try:
            num_bytes = self.path.stat().st_size
        except OSError:
            return False
        needed = sum(
            _NAME_BYTES + _VERSION_BYTES * len(record.versions) + _ALIAS_BYTES * len(record.aliases)
            for _, record in entries.values()
        )
        return num_bytes > 2 * needed + _SLACK_BYTES

    def rewrite(self, entries: Mapping[str, tuple[str, NameRecord]]) -> None:
        """Replace the copy; the caller holds the store's lock."""
        self._entries = dict(entries)
        temporary = self.path.with_suffix(".tmp")
        with suppress(OSError):
            with temporary.open("w") as file:
                file.writelines(_line(record, key) for key, record in entries.values())
            self._loaded = file_key(temporary.stat())
            temporary.replace(self.path)


def _line(record: NameRecord, key: str) -> str:
    """Return name, key, versions and aliases: text that is taken apart faster than JSON."""
    versions = ";".join(",".join(map(str, version)) for version in record.versions)
    aliases = ";".join(f"{alias}={digest}" for alias, digest in record.aliases.items())
    return f"{record.name}\t{key}\t{versions}\t{aliases}\n"


def _record(name: str, versions: str, aliases: str) -> NameRecord:
    made = []
    for text in versions.split(";"):
        digest, weights_digest, num_bytes, min_rank, max_rank, added = text.split(",")
        made.append(
            Version(
                digest, weights_digest, int(num_bytes), int(min_rank), int(max_rank), int(added)
            )
        )
    meanings = dict([alias.split("=") for alias in aliases.split(";")])
    record = NameRecord(name, tuple(made), meanings)
    if LATEST not in meanings or not {v.digest for v in made}.issuperset(meanings.values()):
        raise ValueError(aliases)
    if not all(is_digest(v.digest) and is_time(v.added) for v in made):
        raise ValueError(versions)
    return record
