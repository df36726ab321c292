"""The files of a store that say how its versions' probes came out.

    probes/<version digest>.json    {"format": 1, "verdicts": {<engine build>: {...}},
                                     "lifted": null | {"at", "by"}}

They can be made again: a file that is broken or deleted costs another asking of the probe, and a
quarantine that was lifted.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.errors import ArtifactError
from adapters.limits import MIB
from adapters.names import is_digest, is_time
from adapters.reading import open_regular
from adapters.verdict import ProbeVerdict, from_json, to_json
from adapters.writer import make_folder, replace_file

_FORMAT = 1
_MAX_FILE_BYTES = MIB
_MAX_BUILDS = 16  # the newest ones; each start of another version, dtype or base model is one

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lift:
    """Who decided that a version is served whatever its probe says.

    Args: at: seconds since the epoch, UTC.
    """

    at: int
    by: str


@dataclass(frozen=True, slots=True)
class ProbeRecord:
    """What came of a version's probe.

    Args:
        verdicts: by engine build, oldest first.
        lifted: whether its quarantine was.
    """

    verdicts: Mapping[str, ProbeVerdict] = field(default_factory=dict)
    lifted: Lift | None = None

    @property
    def newest(self) -> ProbeVerdict | None:
        """What the last build that asked the probe came to."""
        return next(reversed(list(self.verdicts.values())), None)

    def with_verdict(self, build: str, verdict: ProbeVerdict) -> "ProbeRecord":
        """Return it with one more verdict, the newest."""
        others = {key: old for key, old in self.verdicts.items() if key != build}
        kept = list(others.items())[-(_MAX_BUILDS - 1) :]
        return replace(self, verdicts={**dict(kept), build: verdict})

    def quarantine(self, build: str) -> str | None:
        """Return why an engine build must not serve the version, or None."""
        verdict = self.verdicts.get(build)
        if verdict is None or verdict.passed or self.lifted is not None:
            return None
        return verdict.reason


class VerdictFiles:
    """How the probes of a store's versions came out.

    Args: root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        self._probes = root / "probes"

    def read(self, digest: str) -> ProbeRecord:
        """Return what is known of a version's probe; a broken file is logged and says nothing."""
        path = self._path(digest)
        try:
            with open_regular(path, max_bytes=_MAX_FILE_BYTES) as file:
                return _from_json(file.read())
        except FileNotFoundError:
            return ProbeRecord()
        except (ArtifactError, OSError) as error:
            logger.warning("%s", error)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("%s: no record of a probe (%s)", path, error)
        return ProbeRecord()

    def write(self, digest: str, record: ProbeRecord) -> None:
        """Replace what is known in one step; the caller holds the store's lock."""
        make_folder(self._probes)
        replace_file(self._path(digest), _to_json(record))

    def left_behind(self, digests: Iterable[str]) -> list[Path]:
        """Return files of other versions than these, and what killed writers left.

        The caller holds the store's lock.
        """
        held = {self._path(digest) for digest in digests}
        return [path for path in self._probes.glob("*") if path not in held]

    def _path(self, digest: str) -> Path:
        assert is_digest(digest)
        return self._probes / f"{digest}.json"


def _to_json(record: ProbeRecord) -> bytes:
    content = {
        "format": _FORMAT,
        "verdicts": {build: to_json(verdict) for build, verdict in record.verdicts.items()},
        "lifted": None if record.lifted is None else asdict(record.lifted),
    }
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _from_json(text: bytes) -> ProbeRecord:
    content: Any = json.loads(text)
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r:.20}, {_FORMAT} is expected")
    lifted = None if content["lifted"] is None else Lift(**content["lifted"])
    if lifted is not None and not (is_time(lifted.at) and isinstance(lifted.by, str)):
        raise ValueError("what lifted its quarantine is not what it should be")
    verdicts = {build: from_json(one) for build, one in content["verdicts"].items()}
    return ProbeRecord(verdicts, lifted)
