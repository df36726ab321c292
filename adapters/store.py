"""AdapterStore: immutable adapter versions by digest, and names that point to them.

    store/objects/<version digest>/    an adapter folder, never changed
    store/names/<name>.json            its versions, oldest first, and its aliases

Every change is written under a temporary name, synced and renamed; changes of one store are made
one at a time under a file lock, readers need none.
"""

import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from adapters.artifact import ADAPTER_FILES, open_artifact
from adapters.digest import read_provenance, version_digest, weights_digest
from adapters.errors import AdapterNameError, AdapterNotFoundError, ArtifactError, StoreError
from adapters.validation import check_artifact_values
from adapters.writer import replace_file, sync_folder, write_synced

LATEST = "latest"
MIN_DIGEST_PREFIX = 12
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RECORD_FORMAT = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """One version of a name.

    Args:
        digest: version digest, 64 hexadecimal digits: the name of its folder.
        weights_digest: identity of what it computes; two versions may share it.
        num_bytes: bytes of its tensors.
        min_rank, max_rank: over its modules.
        added: seconds since the epoch, UTC.
    """

    digest: str
    weights_digest: str
    num_bytes: int
    min_rank: int
    max_rank: int
    added: int


@dataclass(frozen=True)
class NameRecord:
    """What a name holds: versions, oldest first, and aliases by version digest."""

    name: str
    versions: tuple[Version, ...]
    aliases: dict[str, str]

    @property
    def latest(self) -> Version:
        """The version that the bare name means."""
        return self.version(self.aliases[LATEST])

    def version(self, digest: str) -> Version:
        """Return the version of exactly this digest."""
        found = [version for version in self.versions if version.digest == digest]
        if not found:
            raise StoreError(f"adapter {self.name!r}: an alias means {digest!r}, no version of it")
        return found[0]


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


def check_name(name: str) -> str:
    """Return `name` if it may name an adapter.

    Raises: AdapterNameError: it breaks the grammar or is reserved.
    """
    if not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"adapter name {name!r}: 1 to 64 lower-case letters, digits, '.', '_' or '-' are "
            "expected, beginning with a letter or digit"
        )
    if name == LATEST:
        raise AdapterNameError(f"adapter name {name!r}: reserved for the newest version's alias")
    return name


class AdapterStore:
    """Names and versions of adapters in one folder.

    Args:
        root: the store's folder. It need not exist: an absent store is empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._objects = root / "objects"
        self._names = root / "names"

    def add(self, folder: Path, *, name: str) -> ResolvedVersion:
        """Copy an adapter folder into the store and let `name` and its alias `latest` mean it.

        Adding what a name already holds moves `latest` to it and adds no second version.

        Raises:
            AdapterNameError: `name` breaks the grammar.
            ArtifactError: the folder is no adapter; nothing was stored.
        Cost: reads the adapter twice, writes it once.
        """
        check_name(name)
        # What is wrong with it is said before anything is copied.
        open_artifact(folder)
        read_provenance(folder)
        with self._locked():
            version = self._store_object(folder)
            known = self._read_record(name)
            versions = known.versions if known else ()
            if all(old.digest != version.digest for old in versions):
                versions = (*versions, version)
            aliases = {**(known.aliases if known else {}), LATEST: version.digest}
            self._write_record(NameRecord(name, versions, aliases))
        return ResolvedVersion(name, version, self._objects / version.digest)

    def names(self) -> list[NameRecord]:
        """Return every name's record, sorted by name; a broken one is logged and left out."""
        records = []
        for path in sorted(self._names.glob("*.json")):
            if not _NAME.fullmatch(path.stem):
                continue
            try:
                record = self._read_record(path.stem)
            except StoreError as error:
                logger.warning("%s", error)
                continue
            if record is not None:
                records.append(record)
        return records

    def resolve(self, reference: str) -> ResolvedVersion:
        """Return the version that `name`, `name@alias` or `name@sha256:<digits>` means now.

        Raises: AdapterNotFoundError: no such name, alias or digest, or a digest of fewer than 12
            digits or that two versions begin with.
        Cost: one small read.
        """
        name, at, wanted = reference.partition("@")
        record = self._read_record(name) if _NAME.fullmatch(name) else None
        if record is None:
            raise AdapterNotFoundError(f"adapter {name!r}: the store holds no such name")
        version = record.latest if not at else _find_version(record, wanted)
        return ResolvedVersion(name, version, self._objects / version.digest)

    def _store_object(self, folder: Path) -> Version:
        """Copy `folder` to its place by digest, unless it is there whole; return what it is."""
        # Nobody reads it and we hold the lock, so one name serves all; a crash may have left it.
        incoming = self._objects / ".incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        try:
            for file_name in ADAPTER_FILES:
                if (folder / file_name).is_file():
                    write_synced(incoming / file_name, _read_file(folder / file_name))
            sync_folder(incoming)
            # The digest is of the copy: the source may change under us.
            artifact = open_artifact(incoming)
            check_artifact_values(artifact)
            weights = weights_digest(artifact)
            digest = version_digest(weights, incoming)
            target = self._objects / digest
            if _is_whole(target, weights):
                _check_same_base(target, incoming)
            else:
                shutil.rmtree(target, ignore_errors=True)
                incoming.rename(target)
                sync_folder(self._objects)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        ranks = [module.rank for module in artifact.modules.values()]
        return Version(
            digest=digest,
            weights_digest=weights,
            num_bytes=artifact.num_bytes,
            min_rank=min(ranks),
            max_rank=max(ranks),
            added=int(time.time()),
        )

    def _read_record(self, name: str) -> NameRecord | None:
        path = self._names / f"{name}.json"
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != _RECORD_FORMAT:
                raise StoreError(
                    f"{path}: format {content['format']}, {_RECORD_FORMAT} is expected; "
                    "this store was written by another version"
                )
            versions = tuple(_parse_version(version) for version in content["versions"])
            record = NameRecord(name, versions, content["aliases"])
            for digest in (record.aliases[LATEST], *record.aliases.values()):
                record.version(digest)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path}: can not be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path}: not a record of versions and aliases ({error})") from error
        return record

    def _write_record(self, record: NameRecord) -> None:
        self._names.mkdir(parents=True, exist_ok=True)
        content = {
            "format": _RECORD_FORMAT,
            "versions": [asdict(version) for version in record.versions],
            "aliases": record.aliases,
        }
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        replace_file(self._names / f"{record.name}.json", text.encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock"):
                yield
        except (ArtifactError, StoreError):
            raise
        except OSError as error:
            raise StoreError(
                f"{self.root}: can not be written ({error.strerror}); name a folder that is yours"
            ) from error


def _parse_version(entry: dict[str, Any]) -> Version:
    version = Version(**entry)
    for digest in (version.digest, version.weights_digest):
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is no sha256")
    if not all(isinstance(entry[key], int) for key in entry if not key.endswith("digest")):
        raise ValueError("a count is no integer")
    return version


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: can not be read ({error.strerror})") from error


def _is_whole(target: Path, weights: str) -> bool:
    """Tell whether an object is there and still holds the weights that its name promises."""
    try:
        return target.is_dir() and weights_digest(open_artifact(target)) == weights
    except ArtifactError:
        return False


def _check_same_base(stored: Path, given: Path) -> None:
    """Refuse weights that are stored already and now claim another base model.

    A version keeps the rora.json that it came with, so the new claim would be lost.
    """
    claims = [read_provenance(folder).get("base_model") for folder in (stored, given)]
    if claims[1] is not None and claims[0] != claims[1]:
        raise ArtifactError(
            f"rora.json: names base model {claims[1]}, the store holds these very weights with "
            f"{claims[0]}; add the folder that is right to a store of its own"
        )


def verify(resolved: ResolvedVersion) -> None:
    """See that a version's folder still holds the weights that its digest promises.

    Raises: ArtifactError: it was changed, damaged or removed since it was stored.
    Cost: reads every tensor once.
    """
    if weights_digest(open_artifact(resolved.folder)) != resolved.version.weights_digest:
        raise ArtifactError(
            f"{resolved.folder}: weights differ from those that were stored; add the adapter again"
        )


def _find_version(record: NameRecord, wanted: str) -> Version:
    algorithm, colon, digits = wanted.partition(":")
    if not colon:
        if wanted not in record.aliases:
            raise AdapterNotFoundError(f"adapter {record.name!r}: no alias {wanted!r}")
        return record.version(record.aliases[wanted])
    found = [version for version in record.versions if version.digest.startswith(digits)]
    if algorithm != "sha256" or len(digits) < MIN_DIGEST_PREFIX or len(found) != 1:
        raise AdapterNotFoundError(
            f"adapter {record.name!r}: {len(found)} versions begin with {wanted!r}; 'sha256:' and "
            f"at least {MIN_DIGEST_PREFIX} digits of one version are expected"
        )
    return found[0]
