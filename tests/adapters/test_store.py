import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapters import AdapterStore, open_artifact
from adapters.errors import AdapterNameError, AdapterNotFoundError, ArtifactError, StoreError


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


def test_latest_is_no_name(store: AdapterStore, adapter: Path) -> None:
    with pytest.raises(AdapterNameError, match="reserved"):
        store.add(adapter, name="latest")


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
import adapters.store, adapters.writer
module, name = sys.argv[1].rsplit(".", 1)
target = {"adapters.store": adapters.store, "os": os}[module]
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
        ("adapters.store.write_synced", 0),
        ("adapters.store.write_synced", 2),
        ("adapters.store.sync_folder", 0),
        ("adapters.store.version_digest", 0),
        ("adapters.store.sync_folder", 1),
        ("adapters.store.replace_file", 0),
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
    leftovers = [path.name for path in (store.root / "objects").iterdir()]
    assert sorted(leftovers) == sorted({before.version.digest, after.version.digest})


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
        ({"num_bytes": "1"}, "a count is no integer"),
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


def test_several_processes_add_to_one_name_at_once(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    folders = [another_version(adapter, tmp_path, str(number)) for number in range(8)]
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=add_many, args=(store.root, folders[half::2])) for half in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (record,) = store.names()
    assert len(record.versions) == 8


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
