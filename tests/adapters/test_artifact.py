import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from adapters import AdapterConfig, open_artifact, write_artifact
from adapters.errors import ArtifactError
from adapters.writer import new_folder

CONFIG = AdapterConfig(rank=2, lora_alpha=4, target_modules=("q", "v"), rank_pattern={"v": 3})


def make(folder: Path, dtype: DTypeLike = np.float32) -> Path:
    def array(*shape: int) -> np.ndarray:
        return np.arange(np.prod(shape)).reshape(shape).astype(dtype)

    factors = {"m.q": (array(2, 5), array(7, 2)), "m.v": (array(3, 5), array(4, 3))}
    write_artifact(folder, CONFIG, factors, provenance={"format": 1})
    return folder


def resave(folder: Path, change: object) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: DTypeLike) -> None:
    artifact = open_artifact(make(tmp_path / "a", dtype))
    assert {m.name: (m.rank, m.scaling) for m in artifact.modules.values()} == {
        "m.q": (2, 2.0),
        "m.v": (3, 4 / 3),
    }
    read = {module.name: (a, b) for module, a, b in artifact.read_tensors()}
    assert read["m.v"][0].dtype == dtype
    np.testing.assert_array_equal(read["m.v"][0], np.arange(15).reshape(3, 5).astype(dtype))
    assert artifact.num_bytes == sum(a.nbytes + b.nbytes for a, b in read.values())


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    files = [sorted(p.read_bytes() for p in make(tmp_path / n).iterdir()) for n in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda t: t.pop("base_model.model.m.q.lora_A.weight"), "factor-missing", "has no lora_A"),
        (
            lambda t: t.update({"lm_head.weight": np.ones(2)}),
            "tensor-base-weight",
            "lm_head.weight: a full weight",
        ),
        (
            lambda t: t.update({"base_model.model.m.q.lora_A.weight": np.ones((3, 5), "f4")}),
            "rank-factors",
            r"lora_A is \[3, 5\] \(rank 3\), lora_B is \[7, 2\] \(rank 2\)",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.m.q.lora_A.weight": np.ones((3, 5), "f4"),
                    "base_model.model.m.q.lora_B.weight": np.ones((7, 3), "f4"),
                }
            ),
            "rank-config",
            "adapter_config.json declares rank 2, lora_A is",
        ),
        (
            lambda t: t.update({"base_model.model.m.q.lora_A.weight": np.ones(5, "f4")}),
            "factor-shape",
            r"\[rank, in_features\] and \[out_features, rank\] are expected",
        ),
        (
            lambda t: t.update({"base_model.model.m.q.lora_A.weight": np.ones((2, 5), "i4")}),
            "factor-dtype",
            "is I32, one of F32, F16, BF16",
        ),
        (lambda t: t.clear(), "tensors-none", "holds no tensor"),
        (
            lambda t: t.update(
                {
                    "base_model.model.m.q.lora_embedding_A": np.ones((2, 5), "f4"),
                    "base_model.model.m.q.lora_embedding_B": np.ones((7, 2), "f4"),
                }
            ),
            "factor-kinds",
            "m.q: has factors of a linear layer and of an embedding",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.m.o.lora_A.weight": np.ones((2, 5), "f4"),
                    "base_model.model.m.o.lora_B.weight": np.ones((7, 2), "f4"),
                }
            ),
            "target-missing",
            "m.o: is not in target_modules, so that PEFT would leave it out",
        ),
    ],
)
def test_tensors_that_break_a_rule_are_refused(
    tmp_path: Path, change: object, code: str, message: str
) -> None:
    folder = make(tmp_path / "a")
    resave(folder, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        open_artifact(folder)
    assert code in caught.value.codes


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="a pickle"):
        open_artifact(folder)


def test_a_file_cut_short_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    artifact = open_artifact(folder)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(artifact.modules["m.v"].lora_b.stop - 1)
    with pytest.raises(ArtifactError, match="the file was changed while it was read"):
        list(artifact.read_tensors())


def test_embeddings_are_read_in_pefts_layout(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    keys = {**CONFIG.to_peft(), "target_modules": ["embed"], "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(keys))
    tensors = {
        "base_model.model.m.embed.lora_embedding_A": np.ones((2, 9), "f4"),
        "base_model.model.m.embed.lora_embedding_B": np.ones((5, 2), "f4"),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (module,) = open_artifact(folder).modules.values()
    assert (module.kind, module.in_features, module.out_features) == ("embedding", 9, 5)


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        make(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write_half_and_stop() -> None:
        with new_folder(tmp_path / "a") as temporary:
            (temporary / "half").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half_and_stop()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="lora_A is float64"):
        write_artifact(
            tmp_path / "a", CONFIG, {"m.q": (np.ones((2, 5)), np.ones((7, 2)))}, provenance={}
        )
    assert list(tmp_path.iterdir()) == []
