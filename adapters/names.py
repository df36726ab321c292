"""What a name of the store holds, the grammar of names, and how both are written down."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adapters.errors import AdapterNameError, AdapterNotFoundError, StoreError
from adapters.problems import shown

LATEST = "latest"
DEFAULT_MODEL_NAME = "smollm2-135m-instruct"  # the embedded base model's
NAME_PATTERN = "[a-z0-9][a-z0-9._-]{0,63}"  # of names and aliases
MIN_DIGEST_PREFIX = 12
MAX_EVENTS = 200  # of an alias, and of all that were removed; older ones are forgotten
_RECORD_FORMAT = 1
_NAME = re.compile(NAME_PATTERN)
_DIGEST = re.compile(r"[0-9a-f]{64}")

Action = Literal["add", "alias", "rollback", "remove"]


class Version(NamedTuple):
    """One version of a name; a tuple, since a listing makes ten thousand of them.

    Args:
        digest: version digest, 64 hexadecimal digits: the name of its folder.
        weights_digest: identity of what it computes; two versions may share it.
        num_bytes: bytes of its tensors where it is served, which is in one dtype.
        min_rank, max_rank: over its modules.
        added: seconds since the epoch, UTC.
    """

    digest: str
    weights_digest: str
    num_bytes: int
    min_rank: int
    max_rank: int
    added: int


@dataclass(frozen=True, slots=True)
class Event:
    """One move of an alias.

    Args:
        at: seconds since the epoch, UTC.
        alias: which one.
        action: "add" with a version, "alias" by hand, "rollback", or "remove" of it or its version.
        digest: what it meant from then on; None if it is gone.
    """

    at: int
    alias: str
    action: Action
    digest: str | None


@dataclass(frozen=True, slots=True)
class NameRecord:
    """What a name holds: versions, oldest first, and aliases by version digest."""

    name: str
    versions: tuple[Version, ...]
    aliases: Mapping[str, str]

    @property
    def latest(self) -> Version:
        """The version that the bare name means."""
        return self.version(self.aliases[LATEST])

    def version(self, digest: str) -> Version:
        """Return the version of exactly this digest."""
        for version in self.versions:
            if version.digest == digest:
                return version
        raise StoreError(f"adapter {self.name!r}: an alias means {digest!r}, no version of it")

    def find(self, wanted: str) -> Version:
        """Return the version that an alias or `sha256:<at least 12 digits>` means.

        Raises: AdapterNotFoundError: none, or several begin with these digits.
        """
        algorithm, colon, digits = wanted.partition(":")
        if not colon:
            if wanted not in self.aliases:
                raise AdapterNotFoundError(f"adapter {self.name!r}: no alias {shown(wanted)!r}")
            return self.version(self.aliases[wanted])
        found = [version for version in self.versions if version.digest.startswith(digits)]
        if algorithm != "sha256" or len(digits) < MIN_DIGEST_PREFIX or len(found) != 1:
            raise AdapterNotFoundError(
                f"adapter {self.name!r}: {len(found)} versions begin with {shown(wanted)!r}; "
                f"'sha256:' and at least {MIN_DIGEST_PREFIX} digits of one version are expected"
            )
        return found[0]


@dataclass(frozen=True, slots=True)
class NameHistory:
    """A record with the moves of its aliases, oldest first."""

    record: NameRecord
    events: tuple[Event, ...] = ()

    def moved(self, alias: str, digest: str, *, action: Action, at: int) -> "NameHistory":
        """Return it with `alias` meaning `digest`; unchanged if it does already."""
        if self.record.aliases.get(alias) == digest:
            return self
        aliases = {**self.record.aliases, alias: digest}
        return self._after(aliases, Event(at, alias, action, digest))

    def without_alias(self, alias: str, *, at: int) -> "NameHistory":
        """Return it without `alias`."""
        aliases = {name: digest for name, digest in self.record.aliases.items() if name != alias}
        return self._after(aliases, Event(at, alias, "remove", None))

    def with_versions(self, versions: Sequence[Version]) -> "NameHistory":
        """Return it with these versions."""
        return replace(self, record=replace(self.record, versions=tuple(versions)))

    def previous(self, alias: str) -> str | None:
        """Return what `alias` meant before its last move that was no rollback, if it is still held.

        So a second rollback goes one step further back.
        """
        trail: list[str] = []
        for event in self.events:
            if event.alias != alias:
                continue
            if event.digest is None:
                trail = []
            elif event.action == "rollback":
                while trail and trail[-1] != event.digest:
                    trail.pop()
                # What it went back to may be older than what is remembered.
                trail = trail or [event.digest]
            else:
                trail.append(event.digest)
        held = {version.digest for version in self.record.versions}
        current = self.record.aliases.get(alias)
        earlier = [digest for digest in trail[:-1] if digest in held and digest != current]
        return earlier[-1] if earlier else None

    def _after(self, aliases: Mapping[str, str], event: Event) -> "NameHistory":
        events = [*self.events, event]
        moves = [place for place, old in enumerate(events) if old.alias == event.alias]
        gone = [place for place, old in enumerate(events) if old.alias not in aliases]
        dropped = {*moves[:-MAX_EVENTS], *gone[:-MAX_EVENTS]}
        events = [old for place, old in enumerate(events) if place not in dropped]
        return NameHistory(replace(self.record, aliases=aliases), tuple(events))


def check_name(name: str) -> str:
    """Return `name` if it may name an adapter.

    Raises: AdapterNameError: it breaks the grammar or is reserved.
    """
    if not is_name(name):
        raise AdapterNameError(f"adapter name {shown(name)!r}: {_GRAMMAR}")
    if name == LATEST:
        raise AdapterNameError(f"adapter name {name!r}: reserved for the newest version's alias")
    if name == DEFAULT_MODEL_NAME:
        raise AdapterNameError(f"adapter name {name!r}: reserved for the embedded base model")
    return name


def check_alias(alias: str) -> str:
    """Return `alias` if it may name a version of a name.

    Raises: AdapterNameError: it breaks the grammar.
    """
    if not is_name(alias):
        raise AdapterNameError(f"alias {shown(alias)!r}: {_GRAMMAR}")
    return alias


_GRAMMAR = (
    "1 to 64 lower-case letters, digits, '.', '_' or '-' are expected, beginning with a letter or "
    "digit"
)


def is_name(text: str) -> bool:
    """Tell whether `text` keeps the grammar of names."""
    return _NAME.fullmatch(text) is not None


def is_time(seconds: object) -> bool:
    """Tell whether this is seconds since the epoch, before the year 10000."""
    return isinstance(seconds, int) and 0 <= seconds < 253_402_300_800


def is_digest(text: object) -> bool:
    """Tell whether `text` is a sha256 in hexadecimal digits."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def to_json(history: NameHistory) -> bytes:
    """Return the content of a name's file."""
    content = {
        "format": _RECORD_FORMAT,
        "versions": [version._asdict() for version in history.record.versions],
        "aliases": dict(history.record.aliases),
        "history": [asdict(event) for event in history.events],
    }
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def from_json(text: bytes, *, name: str, path: Path) -> NameHistory:
    """Return what a name's file says.

    Raises: StoreError: it breaks the format, or an alias means a version that is not there.
    """
    try:
        content = json.loads(text)
        if content["format"] != _RECORD_FORMAT:
            raise StoreError(
                f"{path}: format {content['format']}, {_RECORD_FORMAT} is expected; "
                "this store was written by another version"
            )
        versions = [Version(**entry) for entry in content["versions"]]
        record = checked_record(name, versions, content["aliases"])
        events = tuple(_checked_event(Event(**entry)) for entry in content.get("history", []))
    except StoreError as error:
        raise StoreError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: not a record of versions and aliases ({error})") from error
    return NameHistory(record, events)


def _checked_event(event: Event) -> Event:
    texts = (event.alias, event.action, event.digest or "")
    if not is_time(event.at) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a move of an alias is not what it should be")
    return event


def checked_record(name: str, versions: Sequence[Version], aliases: Any) -> NameRecord:
    """Return the record that a file describes.

    Raises: StoreError, ValueError, TypeError, KeyError, AttributeError: it describes none.
    """
    for version in versions:
        if not (is_digest(version.digest) and is_digest(version.weights_digest)):
            raise ValueError(f"{version.digest!r} is no sha256")
        counts = (version.num_bytes, version.min_rank, version.max_rank)
        if not all(isinstance(count, int) and 0 <= count < 2**63 for count in counts):
            raise ValueError("a count is no integer of 64 bits")
        if not is_time(version.added):
            raise ValueError("a time is none")
    record = NameRecord(name, tuple(versions), aliases)
    for digest in (aliases[LATEST], *aliases.values()):
        record.version(digest)
    return record
