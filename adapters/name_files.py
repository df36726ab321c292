"""The files of a store's names, and a copy of all of them in one.

    names/<name>.json    what a name holds: the truth
    listing.jsonl        the same of every name, so that ten thousand of them are listed without as
                         many reads

An entry of the listing counts only while the name's file is the very one (inode, time and size)
that it was copied from. Deleting the listing costs time and nothing else.
"""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from adapters.errors import StoreError
from adapters.names import (
    VERSION_KEYS,
    NameHistory,
    NameRecord,
    Version,
    checked_record,
    from_json,
    is_name,
    to_json,
)
from adapters.writer import make_folder, replace_file, sync_folder

_FEW_READS = 32  # names' files that are read in less time than the listing

logger = logging.getLogger(__name__)

# inode, time of change in ns, bytes
FileKey = tuple[int, int, int]


def file_key(found: os.stat_result) -> FileKey:
    """Return what tells one state of a file from another."""
    return (found.st_ino, found.st_mtime_ns, found.st_size)


class NameFiles:
    """The names of a store.

    Args: root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        self._names = root / "names"
        self._lock = root / ".lock"
        self._listing = _Listing(root / "listing.jsonl")

    def names(self) -> list[str]:
        """Return every name that has a file."""
        return list(self._scan())

    def records(self) -> list[NameRecord]:
        """Return every name's record, sorted by name; a broken one is logged and left out.

        Cost: one look at each file, and a read of those that changed since the last time.
        """
        found = self._scan()
        if sum(self._listing.find(name, key) is None for name, key in found.items()) > _FEW_READS:
            self._listing.load()
        entries: dict[str, tuple[FileKey, NameRecord]] = {}
        num_read = 0
        for name, key in sorted(found.items()):
            record = self._listing.find(name, key)
            if record is None:
                num_read += 1
                try:
                    history = self.read(name)
                except StoreError as error:
                    logger.warning("%s", error)
                    continue
                if history is None:
                    continue
                record = history.record
                self._listing.remember(key, record)
            entries[name] = (key, record)
        if self._listing.needs_rewriting(len(found), num_read):
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
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
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

    def _path(self, name: str) -> Path:
        return self._names / f"{name}.json"

    def _scan(self) -> dict[str, FileKey]:
        """Return the names that have a file, with what tells its state."""
        found = {}
        try:
            with os.scandir(self._names) as entries:
                for entry in entries:
                    name = entry.name.removesuffix(".json")
                    if name != entry.name and is_name(name):
                        with suppress(FileNotFoundError):
                            found[name] = file_key(entry.stat(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise StoreError(f"{self._names}: can not be read ({error.strerror})") from error
        return found


@dataclass
class _Listing:
    """The copy at `path`: one line for each change of a name, the last one counts."""

    path: Path
    _entries: dict[str, tuple[FileKey, NameRecord]] = field(default_factory=dict)
    _loaded: FileKey | None = None
    _num_lines: int = 0

    def find(self, name: str, key: FileKey) -> NameRecord | None:
        """Return the record of a name whose file is still the one that was copied."""
        entry = self._entries.get(name)
        return entry[1] if entry is not None and entry[0] == key else None

    def remember(self, key: FileKey, record: NameRecord) -> None:
        """Keep a record that was read from its own file."""
        self._entries[record.name] = (key, record)

    def load(self) -> None:
        """Read the copy, if it changed since it was read; what is broken in it is left out."""
        try:
            with self.path.open("rb") as file:
                key = file_key(os.fstat(file.fileno()))
                if key == self._loaded:
                    return
                lines = file.read().splitlines()
        except OSError:
            return
        try:
            rows = json.loads(b"[" + b",".join(lines) + b"]")
        except ValueError:
            rows = [row for line in lines if (row := _parsed(line)) is not None]
        self._loaded, self._num_lines = key, len(lines)
        for row in rows:
            with suppress(ValueError, KeyError, TypeError, AttributeError, StoreError, IndexError):
                name, entry_key, versions, aliases = row
                known = (int(entry_key[0]), int(entry_key[1]), int(entry_key[2]))
                if self.find(name, known) is None:
                    made = [Version(*version) for version in versions]
                    self._entries[name] = (known, checked_record(name, made, aliases))

    def append(self, record: NameRecord, key: FileKey) -> None:
        """Add what a name holds now; the caller holds the store's lock."""
        with suppress(OSError), self.path.open("ab") as file:
            file.write(_line(record, key))

    def needs_rewriting(self, num_names: int, num_read: int) -> bool:
        """Tell whether the copy is so far behind, or so full of old lines, that it is made anew."""
        return num_read > 100 or self._num_lines > 2 * num_names + 100

    def rewrite(self, entries: Mapping[str, tuple[FileKey, NameRecord]]) -> None:
        """Replace the copy; the caller holds the store's lock."""
        self._entries = dict(entries)
        temporary = self.path.with_suffix(".tmp")
        with suppress(OSError):  # a store that can only be read is listed all the same
            with temporary.open("wb") as file:
                file.writelines(_line(record, key) for key, record in entries.values())
            temporary.replace(self.path)


def _parsed(line: bytes) -> object | None:
    try:
        parsed: object = json.loads(line)
    except ValueError:
        return None
    return parsed


def _line(record: NameRecord, key: FileKey) -> bytes:
    versions = [[getattr(version, name) for name in VERSION_KEYS] for version in record.versions]
    row = [record.name, key, versions, dict(record.aliases)]
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
