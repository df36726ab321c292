"""Other layouts become folders that PEFT reads to the same logits, or are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters import AdapterConfig, open_artifact, validate, weights_digest, write_artifact
from adapters.convert import convert
from adapters.errors import ArtifactError
from adapters.receipt import BaseShapes, read_base_shapes
from tests.conftest import LINEAR
from tests.workloads import make_random_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tiny_model: Path) -> BaseShapes:
    return read_base_shapes(tiny_model, name="tiny")


@pytest.fixture
def ranked(tmp_path: Path, tiny_model: Path) -> Path:
    """An adapter with other ranks and alphas in some modules."""
    config = AdapterConfig(
        4,
        8,
        use_rslora=True,
        rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 9},
        alpha_pattern={"v_proj": 5},
        target_modules=LINEAR,
    )
    return make_random_adapter(
        tmp_path / "ranked", tiny_model, config=config, modules=LINEAR, seed=2
    )


def rename(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def change_keys(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **keys}))


def deltas(folder: Path) -> dict[str, Any]:
    return {
        module.name: module.scaling * b.astype("f8") @ a.astype("f8")
        for module, a, b in open_artifact(folder).read_tensors()
    }


def assert_same(before: dict[str, Any], folder: Path) -> None:
    assert validate(folder).problems == ()
    after = deltas(folder)
    assert set(before) == set(after)
    for name, delta in before.items():
        np.testing.assert_allclose(after[name], delta, rtol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name,
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.removeprefix("base_model.model.").replace(".weight", ".my_task.weight"),
        lambda name: name.removesuffix(".weight"),
    ],
    ids=["as it is", "adapter's name", "no prefix", "neither", "no .weight"],
)
def test_pefts_own_layouts_keep_every_delta(ranked: Path, tmp_path: Path, change: Any) -> None:
    before = deltas(ranked)
    rename(ranked, change)
    convert(ranked, tmp_path / "out", base=None)
    assert_same(before, tmp_path / "out")


@pytest.mark.parametrize(
    "keys",
    [
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"exclude_modules": ["lm_head"]},
        {"target_modules": "(?!lm_head).*_proj"},
    ],
)
def test_a_choice_of_modules_is_written_out(
    ranked: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    before = deltas(ranked)
    change_keys(ranked, **keys)
    with pytest.raises(ArtifactError):
        open_artifact(ranked)
    notes = convert(ranked, tmp_path / "out", base=None)
    assert any("wrote out the modules" in note for note in notes)
    assert_same(before, tmp_path / "out")


def make_kohya(path: Path, ranked: Path, *, alphas: bool = True) -> dict[str, Any]:
    """Write an adapter as sd-scripts would; return its deltas."""
    tensors, expected = {}, {}
    for module, a, b in open_artifact(ranked).read_tensors():
        flat = f"lora_te_{module.name.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = a
        tensors[f"{flat}.lora_up.weight"] = b
        if alphas:
            tensors[f"{flat}.alpha"] = np.array(3.0, np.float32)
        scaling = 3.0 / module.rank if alphas else 1.0
        expected[module.name] = scaling * b.astype("f8") @ a.astype("f8")
    save_file(tensors, path)
    return expected


@pytest.mark.parametrize("alphas", [True, False])
def test_kohyas_names_are_undone_by_the_base(
    ranked: Path, tmp_path: Path, base: BaseShapes, alphas: bool
) -> None:
    expected = make_kohya(tmp_path / "kohya.safetensors", ranked, alphas=alphas)
    convert(tmp_path / "kohya.safetensors", tmp_path / "out", base=base)
    assert_same(expected, tmp_path / "out")


def test_kohyas_names_are_refused_without_the_base(ranked: Path, tmp_path: Path) -> None:
    make_kohya(tmp_path / "kohya.safetensors", ranked)
    with pytest.raises(ArtifactError, match="give it with --model") as caught:
        convert(tmp_path / "kohya.safetensors", tmp_path / "out", base=None)
    assert caught.value.codes == ("layout-needs-base",)
    assert not (tmp_path / "out").exists()


def test_a_name_that_two_modules_could_have_is_refused(tmp_path: Path) -> None:
    base = BaseShapes("x", "0", {"a.b_c": (4, 4), "a_b.c": (4, 4)}, {})
    tensors = {
        f"lora_a_b_c.lora_{part}.weight": np.ones((2, 4) if part == "down" else (4, 2), "f4")
        for part in ("down", "up")
    }
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(ArtifactError, match=r"could be a\.b_c, a_b\.c") as caught:
        convert(tmp_path / "kohya.safetensors", tmp_path / "out", base=base)
    assert caught.value.codes == ("layout-ambiguous",)


def make_fused(folder: Path) -> tuple[Any, Any, BaseShapes]:
    """Write an adapter of a fused query, key and value; return its factors and a base without."""
    generator = np.random.default_rng(0)
    lora_a = generator.normal(size=(2, 8)).astype("f4")
    lora_b = generator.normal(size=(16, 2)).astype("f4")
    config = AdapterConfig(2, 4, use_rslora=True, target_modules=("qkv_proj",))
    factors = {"m.0.qkv_proj": (lora_a, lora_b)}
    write_artifact(folder, config, factors, provenance={"format": 1})
    parts = {"m.0.q_proj": (8, 8), "m.0.k_proj": (4, 8), "m.0.v_proj": (4, 8)}
    return lora_a, lora_b, BaseShapes("split", "0", parts, {})


def test_a_fused_projection_is_split_by_rows(tmp_path: Path) -> None:
    lora_a, lora_b, base = make_fused(tmp_path / "a")
    delta = 4 / np.sqrt(2) * lora_b.astype("f8") @ lora_a.astype("f8")
    notes = convert(tmp_path / "a", tmp_path / "out", base=base)
    assert notes == ["split m.0.qkv_proj into q_proj, k_proj, v_proj"]
    rows = {"m.0.q_proj": delta[:8], "m.0.k_proj": delta[8:12], "m.0.v_proj": delta[12:]}
    assert_same(rows, tmp_path / "out")


def test_a_fused_projection_that_the_base_has_stays_one(tmp_path: Path) -> None:
    *_, split = make_fused(tmp_path / "a")
    both = BaseShapes("both", "0", {**split.linear, "m.0.qkv_proj": (16, 8)}, {})
    convert(tmp_path / "a", tmp_path / "out", base=both)
    digests = [weights_digest(open_artifact(tmp_path / name)) for name in ("a", "out")]
    assert list(open_artifact(tmp_path / "out").modules) == ["m.0.qkv_proj"]
    assert digests[0] != digests[1]  # target_modules says the whole path now


def test_a_fused_projection_of_other_sizes_is_refused(tmp_path: Path) -> None:
    *_, split = make_fused(tmp_path / "a")
    wrong = BaseShapes("wrong", "0", {**split.linear, "m.0.v_proj": (5, 8)}, {})
    with pytest.raises(ArtifactError, match=r"B has 16 rows, 8 \+ 4 \+ 5 are expected"):
        convert(tmp_path / "a", tmp_path / "out", base=wrong)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda name: name.replace("lora_A.weight", "lora_a"), "layout-unknown"),
        (
            lambda name: name.replace(".weight", f".{'x' if 'layers.0' in name else 'y'}.weight"),
            "layout-ambiguous",
        ),
        (lambda name: name.replace("lora_A", "lora_B2"), "layout-unknown"),
    ],
)
def test_what_is_not_certain_is_refused(
    ranked: Path, tmp_path: Path, change: Any, code: str
) -> None:
    rename(ranked, change)
    with pytest.raises(ArtifactError) as caught:
        convert(ranked, tmp_path / "out", base=None)
    assert code in caught.value.codes
    assert not (tmp_path / "out").exists()


def test_ranks_that_the_config_does_not_say_have_no_certain_scaling(
    ranked: Path, tmp_path: Path
) -> None:
    change_keys(ranked, rank_pattern={})
    with pytest.raises(ArtifactError, match="alpha / rank is not certain"):
        convert(ranked, tmp_path / "out", base=None)


def test_kinds_that_are_not_served_are_not_converted_either(ranked: Path, tmp_path: Path) -> None:
    change_keys(ranked, use_dora=True)
    with pytest.raises(ArtifactError, match="a DoRA adapter is not served"):
        convert(ranked, tmp_path / "out", base=None)
