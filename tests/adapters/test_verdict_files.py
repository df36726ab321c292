"""What a store keeps of its versions' probes."""

import json
from pathlib import Path

import pytest

from adapters import AdapterStore, ResolvedVersion
from adapters.errors import AdapterNotFoundError, StoreError
from adapters.tolerance import Difference, Tolerance
from adapters.verdict import ProbeVerdict, Seen
from adapters.verdict_files import ProbeRecord
from tests.adapters.hostile.build import right

PASSED = ProbeVerdict(
    passed=True,
    reason="as in training",
    base=Difference(1e-5, 2e-5),
    adapter=Difference(2e-5, 3e-5),
    tolerance=Tolerance(1e-4, 2e-3),
    seen=(Seen((-0.1,), (-0.2,)), Seen((), ())),
)
FAILED = ProbeVerdict(
    passed=False,
    reason="not as in training",
    base=Difference(1e-5, 2e-5),
    adapter=Difference(4.0, 8.0),
    tolerance=Tolerance(1e-4, 2e-3),
    seen=(),
)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def version(tmp_path: Path, store: AdapterStore) -> ResolvedVersion:
    return store.add(right(tmp_path / "a"), name="a")


def path_of(store: AdapterStore, version: ResolvedVersion) -> Path:
    return store.root / "probes" / f"{version.version.digest}.json"


def test_verdicts_are_kept_by_build_and_the_newest_is_last(
    store: AdapterStore, version: ResolvedVersion
) -> None:
    digest = version.version.digest
    assert store.probe_record(digest) == ProbeRecord()
    assert ProbeRecord().newest is None
    store.keep_verdict(version, "one", PASSED)
    store.keep_verdict(version, "two", FAILED)
    record = AdapterStore(store.root).probe_record(digest)
    assert record == ProbeRecord({"one": PASSED, "two": FAILED})
    assert record.newest == FAILED
    assert record.quarantine("one") is None
    assert record.quarantine("two") == "not as in training"
    assert record.quarantine("three") is None
    store.keep_verdict(version, "one", FAILED)
    assert list(store.probe_record(digest).verdicts) == ["two", "one"]


def test_old_builds_are_forgotten(store: AdapterStore, version: ResolvedVersion) -> None:
    for number in range(20):
        store.keep_verdict(version, str(number), PASSED)
    kept = store.probe_record(version.version.digest).verdicts
    assert list(kept) == [str(number) for number in range(4, 20)]


def test_a_quarantine_is_lifted_for_every_build_and_says_by_whom(
    store: AdapterStore, version: ResolvedVersion
) -> None:
    store.keep_verdict(version, "one", FAILED)
    assert store.lift_quarantine("a@latest", by="Ada\n" + "x" * 500).version == version.version
    store.keep_verdict(version, "two", FAILED)
    record = store.probe_record(version.version.digest)
    assert record.quarantine("one") is None
    assert record.quarantine("two") is None
    assert record.lifted is not None
    assert record.lifted.by.startswith(r"Ada\nxxx")
    assert len(record.lifted.by) < 150
    with pytest.raises(AdapterNotFoundError, match="no such name"):
        store.lift_quarantine("b", by="Ada")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 2, "verdicts": {}, "lifted": null}',
        b'{"format": 1, "verdicts": {}}',
        b'{"format": 1, "verdicts": [], "lifted": null}',
        b'{"format": 1, "verdicts": {"one": {"passed": true}}, "lifted": null}',
        b'{"format": 1, "verdicts": {}, "lifted": {"at": -1, "by": "x"}}',
        b'{"format": 1, "verdicts": {}, "lifted": {"at": 1}}',
        b'{"format": 1, "verdicts": {}, "lifted": {"at": 1, "by": 2}}',
        b"\xff" * 100,
        b" " * (1024 * 1024 + 1),
        b"[" * 100_000,
    ],
    ids=range(14),
)
def test_a_broken_file_says_nothing_and_is_replaced(
    store: AdapterStore,
    version: ResolvedVersion,
    content: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.keep_verdict(version, "one", FAILED)
    path = path_of(store, version)
    path.write_bytes(content)
    assert store.probe_record(version.version.digest) == ProbeRecord()
    assert version.version.digest in caplog.text or path.name in caplog.text
    store.keep_verdict(version, "two", PASSED)
    assert store.probe_record(version.version.digest) == ProbeRecord({"two": PASSED})


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("passed", 1),
        ("reason", None),
        ("base", {"mean": 1.0}),
        ("adapter", {"mean": float("nan"), "largest": 1.0}),
        ("tolerance", {"mean": "1", "largest": 1.0}),
        ("seen", [{"base": [None], "adapter": []}]),
        ("seen", [[]]),
    ],
)
def test_a_verdict_that_is_none_says_nothing(
    store: AdapterStore, version: ResolvedVersion, part: str, value: object
) -> None:
    store.keep_verdict(version, "one", FAILED)
    path = path_of(store, version)
    content = json.loads(path.read_text())
    content["verdicts"]["one"][part] = value
    path.write_text(json.dumps(content))
    assert store.probe_record(version.version.digest) == ProbeRecord()


def test_a_store_that_can_only_be_read_keeps_nothing_and_says_so(
    store: AdapterStore, version: ResolvedVersion
) -> None:
    """A folder in the lock's place stands for a file system that is mounted to be read."""
    (store.root / ".lock").unlink()
    (store.root / ".lock").mkdir()
    with pytest.raises(StoreError, match="can not be written"):
        store.keep_verdict(version, "one", PASSED)
    assert store.probe_record(version.version.digest) == ProbeRecord()


def test_what_is_known_of_a_probe_goes_with_its_version(
    store: AdapterStore, version: ResolvedVersion, tmp_path: Path
) -> None:
    other = right(tmp_path / "b")
    (other / "chat_template.jinja").write_text("x")
    kept = store.add(other, name="b")
    for one in (version, kept):
        store.keep_verdict(one, "one", PASSED)
    left = store.root / "probes" / ".x.json.1234.tmp"
    left.write_text("of a killed writer")
    store.remove("a")
    assert path_of(store, version).exists()
    store.collect_garbage(dry_run=True)
    assert path_of(store, version).exists()
    store.collect_garbage()
    assert list((store.root / "probes").iterdir()) == [path_of(store, kept)]
    assert store.probe_record(kept.version.digest) == ProbeRecord({"one": PASSED})
