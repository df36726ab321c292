import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import adapters.objects
from adapters import (
    AdapterConfig,
    AdapterStore,
    ResolvedVersion,
    open_artifact,
    write_artifact,
)
from adapters.errors import (
    AdapterNameError,
    AdapterNotFoundError,
    ArtifactError,
    StoreConflictError,
    StoreError,
    StoreFullError,
)
from adapters.names import MAX_EVENTS
from adapters.objects import Lease
from adapters.sources import unpack
from adapters.store import verify
from tests.conftest import file_limit


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def another_version(adapter: Path, tmp_path: Path, template: str = "x") -> Path:
    folder = tmp_path / f"version-{template}"
    shutil.copytree(adapter, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_what_is_added_is_found_by_name_alias_and_digest(
    store: AdapterStore, adapter: Path
) -> None:
    added = store.add(adapter, name="snips")
    digest = added.version.digest
    for reference in ("snips", "snips@latest", f"snips@sha256:{digest}", added.public_id):
        assert store.resolve(reference) == added
    assert added.public_id == f"snips@sha256:{digest[:12]}"
    assert open_artifact(added.folder).num_bytes == added.version.num_bytes
    assert added.folder == store.root / "objects" / digest


def test_a_new_version_moves_latest_and_keeps_the_old_one(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    first = store.add(adapter, name="a")
    second = store.add(another_version(adapter, tmp_path), name="a")
    assert store.resolve("a") == second
    assert store.resolve(first.public_id) == first
    assert first.version.weights_digest == second.version.weights_digest
    again = store.add(adapter, name="a")
    assert again.version.digest == first.version.digest
    assert store.resolve("a").version.digest == first.version.digest
    (record,) = store.names()
    assert len(record.versions) == 2


def test_other_files_of_a_checkpoint_are_not_copied(store: AdapterStore, adapter: Path) -> None:
    (adapter / "optimizer.pt").write_bytes(b"pickle")
    folder = store.add(adapter, name="a").folder
    assert not (folder / "optimizer.pt").exists()


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a/b", "../a", "a" * 65, "a@b", "a b", "é"])
def test_names_outside_the_grammar_are_refused(
    store: AdapterStore, adapter: Path, name: str
) -> None:
    with pytest.raises(AdapterNameError, match="1 to 64 lower-case letters"):
        store.add(adapter, name=name)
    with pytest.raises(AdapterNotFoundError):
        store.resolve(name)
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["latest", "smollm2-135m-instruct"])
def test_reserved_names_are_none(store: AdapterStore, adapter: Path, name: str) -> None:
    with pytest.raises(AdapterNameError, match="reserved"):
        store.add(adapter, name=name)


@pytest.mark.parametrize(
    "reference",
    ["b", "a@", "a@stable", "a@sha256:", "a@sha256:{0:.11}", "a@md5:{0}", "a@sha256:" + "0" * 64],
)
def test_what_the_store_does_not_hold_is_not_found(
    store: AdapterStore, adapter: Path, reference: str
) -> None:
    digest = store.add(adapter, name="a").version.digest
    with pytest.raises(AdapterNotFoundError):
        store.resolve(reference.format(digest))


def test_a_broken_adapter_leaves_the_store_as_it_was(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    before = sorted(store.root.rglob("*"))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError):
        store.add(adapter, name="b")
    assert sorted(store.root.rglob("*")) == before


CRASH = """
import os, sys
from pathlib import Path
import adapters.name_files, adapters.objects, adapters.store
module, name = sys.argv[1].rsplit(".", 1)
target = sys.modules[module]
calls = int(sys.argv[2])
real = getattr(target, name)
def crash(*arguments, **keywords):
    global calls
    calls -= 1
    if calls < 0:
        os._exit(9)
    return real(*arguments, **keywords)
setattr(target, name, crash)
adapters.store.AdapterStore(Path(sys.argv[3])).add(Path(sys.argv[4]), name="a")
"""


@pytest.mark.parametrize(
    ("step", "calls"),
    [
        ("adapters.objects.write_chunks", 0),
        ("adapters.objects.write_chunks", 2),
        ("adapters.objects.sync_folder", 0),
        ("adapters.examination.version_digest", 0),
        ("adapters.objects.sync_folder", 1),
        ("adapters.name_files.replace_file", 0),
        ("os.fsync", 7),
    ],
)
def test_a_process_killed_at_any_step_leaves_the_old_state_or_the_new(
    store: AdapterStore, adapter: Path, tmp_path: Path, step: str, calls: int
) -> None:
    """It ends between two system calls, cleans nothing up and lets go of the lock."""
    before = store.add(adapter, name="a")
    changed = another_version(adapter, tmp_path)
    arguments = [sys.executable, "-c", CRASH, step, str(calls), str(store.root), str(changed)]
    assert subprocess.run(arguments, check=False).returncode == 9
    found = store.resolve("a")
    # Killed after the last rename, before the disk has it: the new state, whole.
    assert found == before or step == "os.fsync"
    open_artifact(found.folder)
    after = store.add(changed, name="a")
    assert store.resolve("a").version.digest == after.version.digest
    assert open_artifact(after.folder).num_bytes == before.version.num_bytes
    kept = [path.name for path in (store.root / "objects").iterdir()]
    assert sorted(kept) == sorted({before.version.digest, after.version.digest})
    assert list((store.root / "incoming").iterdir()) == []


def test_a_damaged_object_is_replaced_when_it_is_added_again(
    store: AdapterStore, adapter: Path
) -> None:
    added = store.add(adapter, name="a")
    weights = added.folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"oops")
    assert store.add(adapter, name="a").version.digest == added.version.digest
    assert weights.read_bytes() == whole


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"digest": "../../../etc"}, "is no sha256"),
        ({"weights_digest": 5}, "not a record"),
        ({"num_bytes": "1"}, "a count is no integer of 64 bits"),
    ],
)
def test_a_record_that_points_elsewhere_is_broken(
    store: AdapterStore, adapter: Path, keys: dict[str, object], message: str
) -> None:
    store.add(adapter, name="a")
    path = store.root / "names" / "a.json"
    record = json.loads(path.read_text())
    record["versions"][0] |= keys
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError, match=message):
        store.resolve("a")


def test_the_same_weights_with_another_base_are_refused(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    claim = {"format": 1, "base_model": {"name": "other", "fingerprint": "0"}}
    (adapter / "rora.json").write_text(json.dumps(claim))
    with pytest.raises(ArtifactError, match=r"names base model .*'other'"):
        store.add(adapter, name="b")


def test_a_pipe_is_no_file(store: AdapterStore, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="no regular file"):
        store.add(adapter, name="a")


def test_an_alias_without_a_version_is_a_broken_record(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    path = store.root / "names" / "a.json"
    record = json.loads(path.read_text())
    record["aliases"]["stable"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError, match="an alias means '0000"):
        store.resolve("a")
    assert store.names() == []


def add_many(root: Path, folders: list[Path]) -> None:
    for folder in folders:
        AdapterStore(root).add(folder, name="shared")
        AdapterStore(root).add(folder, name=folder.name)


def test_several_processes_add_to_one_name_at_once(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    folders = [another_version(adapter, tmp_path, str(number)) for number in range(16)]
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=add_many, args=(store.root, folders[part::4])) for part in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    records = {record.name: record for record in store.names()}
    assert len(records["shared"].versions) == 16
    assert set(records) == {"shared", *(folder.name for folder in folders)}
    for name in records:
        verify(store.resolve(name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a record"),
        ('{"format": 2}', "format 2, 1 is expected"),
        ("{}", "not a record"),
        ("[" * 100_000, "not a record"),
    ],
)
def test_a_broken_record_is_named(
    store: AdapterStore, adapter: Path, content: str, message: str
) -> None:
    store.add(adapter, name="a")
    (store.root / "names" / "a.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        store.resolve("a")


def test_a_store_that_can_not_be_written_is_named(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can not be written"):
        AdapterStore(tmp_path / "file").add(adapter, name="a")


def test_an_absent_store_is_empty(store: AdapterStore) -> None:
    assert store.names() == []
    assert not store.root.exists()


def test_records_are_json_that_other_tools_read(store: AdapterStore, adapter: Path) -> None:
    added = store.add(adapter, name="a")
    record = json.loads((store.root / "names" / "a.json").read_text())
    assert record["aliases"] == {"latest": added.version.digest}


def two_versions(store: AdapterStore, adapter: Path, tmp_path: Path) -> tuple[str, str]:
    """Add two versions of "a"; return their digests, the older first."""
    first = store.add(adapter, name="a").version.digest
    return first, store.add(another_version(adapter, tmp_path), name="a").version.digest


def latest(store: AdapterStore, name: str = "a") -> str:
    return store.resolve(name).version.digest


def test_an_alias_stays_while_latest_moves(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    first = store.add(adapter, name="a").version.digest
    store.set_alias("a", "stable")
    second = store.add(another_version(adapter, tmp_path), name="a").version.digest
    assert latest(store, "a@stable") == first
    assert latest(store) == second
    store.set_alias(f"a@sha256:{first[:12]}", "latest")
    assert latest(store) == first


def test_a_version_can_be_added_without_becoming_the_latest(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    first = store.add(adapter, name="a", alias="canary").version.digest
    assert latest(store) == latest(store, "a@canary") == first
    second = store.add(another_version(adapter, tmp_path), name="a", alias="canary")
    assert latest(store) == first
    assert latest(store, "a@canary") == second.version.digest


def test_rollback_goes_back_step_by_step_and_forgets_what_it_left(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    folders = [another_version(adapter, tmp_path, text) for text in "abcd"]
    digests = [store.add(folder, name="a").version.digest for folder in folders[:3]]
    assert store.rollback("a").version.digest == digests[1]
    assert store.rollback("a").version.digest == digests[0]
    with pytest.raises(AdapterNotFoundError, match="'latest' has no earlier version"):
        store.rollback("a")
    added = store.add(folders[3], name="a").version.digest
    assert latest(store) == added
    assert store.rollback("a").version.digest == digests[0]
    assert [event.action for event in store.history("a")] == [
        "add", "add", "add", "rollback", "rollback", "add", "rollback",
    ]  # fmt: skip


def test_rollback_of_an_alias_leaves_the_others(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    first, second = two_versions(store, adapter, tmp_path)
    store.set_alias(f"a@sha256:{first}", "stable")
    store.set_alias("a", "stable")
    assert store.rollback("a", "stable").version.digest == first
    assert latest(store) == second


def test_a_rollback_skips_what_was_removed(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    digests = [
        store.add(another_version(adapter, tmp_path, text), name="a").version.digest
        for text in "abc"
    ]
    store.remove(f"a@sha256:{digests[1]}")
    assert store.rollback("a").version.digest == digests[0]


@pytest.mark.parametrize("alias", ["", "sha256:0", "A", "a/b", "../x"])
def test_aliases_outside_the_grammar_are_refused(
    store: AdapterStore, adapter: Path, alias: str
) -> None:
    store.add(adapter, name="a")
    with pytest.raises(AdapterNameError, match="alias"):
        store.set_alias("a", alias)
    with pytest.raises(AdapterNameError, match="alias"):
        store.add(adapter, name="b", alias=alias)


def test_what_an_alias_means_is_removed_only_by_force(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    first, second = two_versions(store, adapter, tmp_path)
    store.set_alias("a", "stable")
    with pytest.raises(StoreError, match="is what latest, stable means"):
        store.remove(f"a@sha256:{second}")
    with pytest.raises(StoreError, match="has the aliases stable"):
        store.remove("a")
    with pytest.raises(StoreError, match="'latest' is what the bare name means"):
        store.remove("a@latest")
    store.remove(f"a@sha256:{second}", force=True)
    assert latest(store) == first
    with pytest.raises(AdapterNotFoundError):
        store.resolve("a@stable")
    with pytest.raises(StoreError, match="its last version; remove the name"):
        store.remove(f"a@sha256:{first}", force=True)
    store.remove("a")
    assert store.names() == []


def test_an_alias_is_removed_by_its_name(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    store.set_alias("a", "stable")
    store.remove("a@stable")
    assert set(store.record("a").aliases) == {"latest"}
    store.remove("a")
    with pytest.raises(AdapterNotFoundError):
        store.remove("a")


def objects(store: AdapterStore) -> set[str]:
    return {path.name for path in (store.root / "objects").iterdir()}


def test_garbage_is_what_no_name_holds(store: AdapterStore, adapter: Path, tmp_path: Path) -> None:
    first, second = two_versions(store, adapter, tmp_path)
    store.add(adapter, name="b")
    assert store.collect_garbage().digests == ()
    store.remove("a")
    would = store.collect_garbage(dry_run=True)
    assert would.digests == (second,)
    assert would.num_bytes > 0
    assert objects(store) == {first, second}
    assert store.collect_garbage() == would
    assert objects(store) == {first}
    assert list((store.root / "trash").iterdir()) == []
    verify(store.resolve("b"))


def test_old_versions_are_dropped_unless_an_alias_means_them(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    digests = []
    for text in "abcd":
        folder = another_version(adapter, tmp_path, text)
        digests.append(store.add(folder, name="a").version.digest)
    store.set_alias(f"a@sha256:{digests[0]}", "stable")
    assert set(store.collect_garbage(keep_versions=1, dry_run=True).digests) == set(digests[1:3])
    assert len(store.record("a").versions) == 4
    store.collect_garbage(keep_versions=1)
    assert objects(store) == {digests[0], digests[3]}
    with pytest.raises(AdapterNotFoundError, match="no earlier version"):
        AdapterStore(store.root).rollback("a", "stable")


def test_a_lease_keeps_a_version_until_it_ends(store: AdapterStore, adapter: Path) -> None:
    resolved = store.add(adapter, name="a")
    with store.lease(resolved):
        with pytest.raises(StoreError, match="in use by a running server"):
            store.remove("a")
        store.remove("a", force=True)
        assert store.collect_garbage().leased == (resolved.version.digest,)
        open_artifact(resolved.folder)
    assert store.collect_garbage().digests == (resolved.version.digest,)
    with pytest.raises(AdapterNotFoundError, match="was removed from the store"):
        store.lease(resolved)
    assert list((store.root / "leases").iterdir()) == []


LEASE = """
import sys, time
from pathlib import Path
from adapters import AdapterStore
store = AdapterStore(Path(sys.argv[1]))
lease = store.lease(store.resolve("a"))
print("leased", flush=True)
time.sleep(60)
"""


def test_a_lease_of_another_process_ends_with_it(store: AdapterStore, adapter: Path) -> None:
    digest = store.add(adapter, name="a").version.digest
    arguments = [sys.executable, "-c", LEASE, str(store.root)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "leased\n"
        store.remove("a", force=True)
        assert store.collect_garbage().leased == (digest,)
        holder.kill()
    assert store.collect_garbage().digests == (digest,)


def test_nothing_is_collected_while_a_name_can_not_be_read(
    store: AdapterStore, adapter: Path
) -> None:
    store.add(adapter, name="a")
    (store.root / "names" / "a.json").write_text("{")
    with pytest.raises(StoreError, match="not a record"):
        store.collect_garbage()
    assert len(objects(store)) == 1


def test_a_changed_template_is_another_version_and_a_damaged_one_is_noticed(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    added = store.add(another_version(adapter, tmp_path), name="a")
    verify(added)
    (added.folder / "chat_template.jinja").write_text("changed")
    with pytest.raises(ArtifactError, match="differs from what was stored"):
        verify(added)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rora.json", "README.md"])
def test_a_link_is_never_followed_into_the_store(
    store: AdapterStore, adapter: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    source = adapter / name
    secret.write_bytes(source.read_bytes() if source.exists() else b"secret")
    source.unlink(missing_ok=True)
    source.symlink_to(secret)
    with pytest.raises(ArtifactError, match="symbolic link") as caught:
        store.add(adapter, name="a")
    assert caught.value.codes == ("file-link",)


def test_ranks_above_what_is_served_are_not_stored(store: AdapterStore, tmp_path: Path) -> None:
    factors = {"m.q": (np.ones((513, 600), np.float32), np.ones((600, 513), np.float32))}
    write_artifact(tmp_path / "a", AdapterConfig(513, 1), factors, provenance={})
    with pytest.raises(ArtifactError, match="rank 513, at most 512 is served; compact"):
        store.add(tmp_path / "a", name="a")


def test_a_listing_shows_what_changed_since_it_was_made(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    """Through the listing's file, which other processes write too."""
    names = [f"name-{number}" for number in range(40)]
    for name in names:
        store.add(adapter, name=name)
    assert [record.name for record in AdapterStore(store.root).names()] == sorted(names)
    other = AdapterStore(store.root)
    other.names()
    changed = store.add(another_version(adapter, tmp_path), name="name-7").version.digest
    store.remove("name-8")
    found = {record.name: record for record in other.names()}
    assert found["name-7"].latest.digest == changed
    assert set(found) == set(names) - {"name-8"}
    listing = store.root / "listing.tsv"
    for content in (
        b"",
        b"nonsense\n\t\t\t\n\xff\n",
        listing.read_bytes()[:-20],
        listing.read_bytes().replace(b"=", b"=0"),
    ):
        listing.write_bytes(content)
        assert AdapterStore(store.root).names() == other.names()


def test_a_listing_is_made_anew_when_it_has_grown_old(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    listing = store.root / "listing.tsv"
    while listing.stat().st_size < 80 * 1024:
        store.set_alias("a", "stable")
        store.remove("a@stable")
    fresh = AdapterStore(store.root)
    assert fresh.names() == store.names()
    assert len(listing.read_bytes().splitlines()) == 1
    inode = listing.stat().st_ino
    fresh.names()
    assert listing.stat().st_ino == inode


def test_moves_of_one_alias_do_not_push_out_those_of_another(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    first, second = two_versions(store, adapter, tmp_path)
    store.set_alias(f"a@sha256:{first}", "stable")
    store.set_alias(f"a@sha256:{second}", "stable")
    for _ in range(MAX_EVENTS):
        store.set_alias(f"a@sha256:{first}", "canary")
        store.set_alias(f"a@sha256:{second}", "canary")
    assert len([event for event in store.history("a") if event.alias == "canary"]) == MAX_EVENTS
    assert store.rollback("a", "stable").version.digest == first
    # And far back in a history that was cut, a rollback never goes forward.
    expected = [first, second] * MAX_EVENTS
    for number in range(MAX_EVENTS):
        try:
            found = store.rollback("a", "canary").version.digest
        except AdapterNotFoundError:
            break
        assert found == expected[number]
    assert MAX_EVENTS // 3 < number < MAX_EVENTS


def test_aliases_that_were_removed_leave_little(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    for number in range(MAX_EVENTS):
        store.set_alias("a", f"build-{number}")
        store.remove(f"a@build-{number}")
    assert len(store.history("a")) == MAX_EVENTS + 1


def test_a_lock_that_is_never_let_go_is_named(
    store: AdapterStore, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(adapter, name="a")
    monkeypatch.setattr("adapters.store._LOCK_SECONDS", 0.2)
    with FileLock(store.root / ".lock"), pytest.raises(StoreError, match="held by another process"):
        store.set_alias("a", "stable")


def test_nothing_is_collected_when_the_names_are_gone(store: AdapterStore, adapter: Path) -> None:
    """As in a copy that is half restored."""
    digest = store.add(adapter, name="a").version.digest
    (store.root / "names").rename(store.root / "elsewhere")
    with pytest.raises(StoreError, match="holds versions and no folder names/"):
        store.collect_garbage()
    (store.root / "names").mkdir()
    (store.root / "names" / "a.json").symlink_to("/nowhere")
    with pytest.raises(StoreError, match="a symbolic link"):
        store.collect_garbage()
    assert objects(store) == {digest}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["versions"][0].update(added=10**30),
        lambda record: record["versions"][0].update(num_bytes=-1),
        lambda record: record["history"][0].update(at="x"),
        lambda record: record["history"][0].update(digest=5),
        lambda record: record["history"][0].update(more=5),
    ],
)
def test_one_damaged_name_does_not_hide_the_others(
    store: AdapterStore, adapter: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    store.add(adapter, name="a")
    store.add(adapter, name="b")
    path = store.root / "names" / "a.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    assert [record.name for record in AdapterStore(store.root).names()] == ["b"]
    with pytest.raises(StoreError, match="not a record"):
        store.history("a")


def test_a_pipe_in_the_place_of_a_name_does_not_hang(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    os.mkfifo(store.root / "names" / "b.json")
    (store.root / "listing.tsv").unlink()
    os.mkfifo(store.root / "listing.tsv")
    assert [record.name for record in AdapterStore(store.root).names()] == ["a"]


def test_strange_folders_do_not_stop_the_store(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    (store.root / "leases" / "x").mkdir(parents=True)
    (store.root / "incoming" / "x.lock").mkdir()
    store.add(adapter, name="b")
    store.remove("b")
    assert store.collect_garbage().digests == ()


def test_what_changes_nothing_makes_no_folder(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "mistyped")
    assert store.collect_garbage().digests == ()
    for change in (store.rollback, store.remove, lambda name: store.set_alias(name, "x")):
        with pytest.raises(AdapterNotFoundError):
            change("a")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_another_base_counts_only_while_somebody_needs_it(
    store: AdapterStore, adapter: Path
) -> None:
    (adapter / "rora.json").write_text('{"base_model": {"name": "x", "fingerprint": "0"}}')
    store.add(adapter, name="a")
    store.remove("a")
    (adapter / "rora.json").write_text('{"base_model": {"name": "y", "fingerprint": "1"}}')
    folder = store.add(adapter, name="a").folder
    assert '"y"' in (folder / "rora.json").read_text()


def test_a_source_that_changes_while_it_is_copied_is_refused(
    store: AdapterStore, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files would be of two states."""
    copy = adapters.objects._copy

    def copy_and_change(source: Path, target: Path, max_bytes: int) -> None:
        copy(source, target, max_bytes)
        if source.name == "adapter_config.json":
            os.utime(adapter / "adapter_model.safetensors")

    monkeypatch.setattr("adapters.objects._copy", copy_and_change)
    with pytest.raises(ArtifactError, match="were changed while they were copied") as caught:
        store.add(adapter, name="a")
    assert caught.value.codes == ("file-changed",)
    assert store.names() == []


def staged(store: AdapterStore, folder: Path, name: str) -> tuple[ResolvedVersion, Lease]:
    with store.incoming() as incoming:
        incoming.copy(folder)
        return store.stage(store.examine(incoming.folder, given="what came"), name)


def test_a_staged_version_has_no_name_until_it_is_published(
    store: AdapterStore, adapter: Path
) -> None:
    resolved, lease = staged(store, adapter, "a")
    with lease:
        verify(resolved)
        with pytest.raises(AdapterNotFoundError):
            store.resolve("a")
        store.discard(resolved.version.digest)
        assert store.collect_garbage().digests == ()
        assert store.publish(resolved, "stable") == resolved
    store.discard(resolved.version.digest)
    assert store.resolve("a@stable") == store.resolve("a") == resolved
    verify(resolved)
    with pytest.raises(AdapterNameError, match="alias"):
        store.publish(resolved, "../x")


def test_a_staged_version_goes_when_it_is_discarded(store: AdapterStore, adapter: Path) -> None:
    resolved, lease = staged(store, adapter, "a")
    lease.release()
    store.discard(resolved.version.digest)
    assert objects(store) == set()
    store.discard(resolved.version.digest)  # of what is not there, nothing


def test_nothing_is_discarded_that_a_broken_name_may_hold(
    store: AdapterStore, adapter: Path
) -> None:
    resolved = store.add(adapter, name="a")
    (store.root / "names" / "a.json").write_text("{")
    store.discard(resolved.version.digest)
    verify(resolved)


def test_a_folder_that_came_is_examined_under_the_name_that_it_is_given(
    store: AdapterStore, adapter: Path
) -> None:
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"^what came: adapter_config\.json: ") as caught:
        staged(store, adapter, "a")
    assert caught.value.codes == ("json-syntax",)
    assert list((store.root / "incoming").iterdir()) == []


def test_a_lease_of_ones_own_stands_against_nothing(store: AdapterStore, adapter: Path) -> None:
    resolved = store.add(adapter, name="a")
    with store.lease(resolved) as own, store.lease(resolved) as other:
        with pytest.raises(StoreConflictError, match="in use by a running server"):
            store.remove("a", besides=[own])
        store.remove("a", besides=[own, other])


def test_a_store_without_room_says_so(store: AdapterStore, adapter: Path) -> None:
    store.add(adapter, name="a")
    before = sorted(store.root.rglob("*"))
    (adapter / "README.md").write_bytes(b"x" * 100_000)
    with file_limit(4096), pytest.raises(StoreFullError, match="can not be written"):
        store.add(adapter, name="b")
    assert sorted(store.root.rglob("*")) == before


def test_an_archive_without_room_to_be_unpacked_says_so(adapter: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(adapter, arcname="a")
    (tmp_path / "target").mkdir()
    with file_limit(4096), pytest.raises(StoreFullError, match="set TMPDIR"):
        unpack(tmp_path / "a.tar", tmp_path / "target")
