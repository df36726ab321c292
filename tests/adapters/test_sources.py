"""Archives and hub names; what is malformed is tests/adapters/hostile's."""

import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterStore, open_artifact, weights_digest
from adapters.errors import ArtifactError
from adapters.sources import open_source
from tests.adapters.hostile.build import right, right_files, write_tar, write_zip


def digest(folder: Path) -> str:
    return weights_digest(open_artifact(folder))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return right(tmp_path / "right")


@pytest.mark.parametrize("folder", [".", "a", "some/where/deep"])
@pytest.mark.parametrize("kind", ["w", "w:gz", "zip"])
def test_an_archive_holds_the_same_adapter(
    tmp_path: Path, adapter: Path, kind: str, folder: str
) -> None:
    path = tmp_path / "archive"
    files = {
        **right_files(folder),
        f"{folder}/optimizer.pt": b"x",
        f"{folder}/README.md": b"hello",
        f"{folder}/Icon\r": b"",
    }
    if kind == "zip":
        write_zip(path, files)
    else:
        write_tar(path, files, mode=kind)
    with open_source(str(path)) as opened:
        assert digest(opened) == digest(adapter)
        names = {entry.name for entry in opened.iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert not opened.exists()


def test_an_archive_that_tar_made_of_a_folder(tmp_path: Path, adapter: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(adapter, arcname="x" * 150)  # a name that needs an extended header
    with open_source(str(tmp_path / "a.tar")) as opened:
        assert digest(opened) == digest(adapter)


def test_an_error_names_the_archive_and_not_where_it_was_unpacked(tmp_path: Path) -> None:
    files = right_files()
    write_zip(tmp_path / "a.zip", {name: files[name] for name in files if "config" in name})
    source = str(tmp_path / "a.zip")
    with (
        pytest.raises(ArtifactError, match=r"a\.zip: adapter_model\.safetensors: no") as caught,
        open_source(source) as opened,
    ):
        AdapterStore(tmp_path / "store").add(opened, name="a")
    assert "/rora-adapter-" not in str(caught.value)
    assert caught.value.codes == ("weights-missing",)


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "/a/b", "a/b/c", "../x", "-a/b"])
def test_what_is_neither_a_path_nor_a_hub_name_is_not_looked_for(source: str) -> None:
    with pytest.raises(ArtifactError, match="no such folder or archive"), open_source(source):
        pass


def test_a_hub_name_is_downloaded_by_the_hubs_own_library(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is not there in tests, so the library's one function is stood in for."""
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        for path in adapter.iterdir():
            (options["local_dir"] / path.name).write_bytes(path.read_bytes())
        return str(options["local_dir"])

    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with open_source("team/adapter@v2") as opened:
        assert digest(opened) == digest(adapter)
    assert (asked["name"], asked["revision"]) == ("team/adapter", "v2")
    assert "adapter_model.bin" not in asked["allow_patterns"]


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **_: Any) -> str:
        raise OSError(f"no route to {name}\nand more")

    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    expected = r"hub did not give it \(no route to team/adapter\) \[folder-missing\]"
    with pytest.raises(ArtifactError, match=expected), open_source("team/adapter"):
        pass
