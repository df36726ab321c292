"""Other layouts become folders that PEFT reads to the same logits, or are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from adapters import AdapterConfig, open_artifact, validate, weights_digest, write_artifact
from adapters.convert import convert
from adapters.errors import ArtifactError
from adapters.receipt import BaseShapes, read_base_shapes
from tests.conftest import LINEAR
from tests.reference import ATOL
from tests.workloads import formed_deltas as deltas
from tests.workloads import make_random_adapter, pefts_logits

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


def test_peft_reads_what_was_converted_to_the_same_logits(
    ranked: Path, tmp_path: Path, tiny_model: Path
) -> None:
    before = pefts_logits(tiny_model, ranked)
    rename(ranked, lambda name: name.replace(".weight", ".default.weight"))
    convert(ranked, tmp_path / "out", base=None)
    after = pefts_logits(tiny_model, tmp_path / "out")
    torch.testing.assert_close(after, before, atol=ATOL["logits-float32"], rtol=0)


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ["q_proj"]},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"layers_to_transform": 1},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": ".*q_proj"},
    ],
)
def test_tensors_that_peft_would_leave_out_are_not_taken_in(
    ranked: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    change_keys(ranked, **keys)
    with pytest.raises(ArtifactError) as caught:
        convert(ranked, tmp_path / "out", base=None)
    assert "target-missing" in caught.value.codes


def test_paths_that_end_in_one_another_keep_their_own_scaling(tmp_path: Path) -> None:
    """By PEFT's rule the key "proj" also matches "l.0.proj"."""
    generator = np.random.default_rng(0)
    factors = {
        name: (
            generator.normal(size=(r, 8)).astype("f4"),
            generator.normal(size=(6, r)).astype("f4"),
        )
        for name, r in (("proj", 2), ("l.0.proj", 4), ("l.1.proj", 4))
    }
    config = AdapterConfig(
        4,
        8,
        rank_pattern={"l.0.proj": 4, "l.1.proj": 4, "proj": 2},
        alpha_pattern={"l.0.proj": 8, "l.1.proj": 8, "proj": 64},
    )
    write_artifact(tmp_path / "a", config, factors, provenance={})
    before = deltas(tmp_path / "a")
    rename(tmp_path / "a", lambda name: name.replace(".weight", ".x.weight"))
    convert(tmp_path / "a", tmp_path / "out", base=None)
    assert_same(before, tmp_path / "out")


def test_paths_that_differ_by_a_dot_keep_their_own_ranks(tmp_path: Path) -> None:
    """A dot of a key stands for any character, so "a.b" also matches "a_b"."""
    ranks = {"m.a.b": 2, "m.a_b": 4, "m.c.d": 2}
    factors = {name: (np.ones((r, 8), "f4"), np.ones((6, r), "f4")) for name, r in ranks.items()}
    config = AdapterConfig(4, 8, rank_pattern={"m.a_b": 4, "m.a.b": 2, "m.c.d": 2})
    write_artifact(tmp_path / "a", config, factors, provenance={})
    before = deltas(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "out", base=None)
    assert_same(before, tmp_path / "out")


@pytest.mark.parametrize("prefix", ["lora_te1_", "lora_te2_"])
def test_two_names_of_one_module_are_refused(
    ranked: Path, tmp_path: Path, base: BaseShapes, prefix: str
) -> None:
    make_kohya(tmp_path / "kohya.safetensors", ranked)
    tensors = load_file(tmp_path / "kohya.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("lora_te_", prefix)] = tensors[name]
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(ArtifactError, match="one more") as caught:
        convert(tmp_path / "kohya.safetensors", tmp_path / "out", base=base)
    assert caught.value.codes == ("layout-ambiguous",)


def test_a_fused_projection_beside_its_parts_is_refused(tmp_path: Path) -> None:
    lora_a, lora_b, split = make_fused(tmp_path / "a")
    factors = {"m.0.qkv_proj": (lora_a, lora_b), "m.0.q_proj": (lora_a, lora_b[:8])}
    config = AdapterConfig(2, 4, target_modules=("qkv_proj", "q_proj"))
    write_artifact(tmp_path / "b", config, factors, provenance={})
    with pytest.raises(ArtifactError, match="stands beside its own parts"):
        convert(tmp_path / "b", tmp_path / "out", base=split)


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_an_alpha_that_is_none_is_refused_and_leaves_nothing(
    ranked: Path, tmp_path: Path, base: BaseShapes, alpha: float
) -> None:
    path = tmp_path / "kohya.safetensors"
    make_kohya(path, ranked)
    tensors = load_file(path)
    save_file({n: np.array(alpha, "f4") if "alpha" in n else t for n, t in tensors.items()}, path)
    with pytest.raises(ArtifactError, match="a number of at least 0 is expected"):
        convert(path, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_keys_that_match_nothing_are_left_out(ranked: Path, tmp_path: Path) -> None:
    before = deltas(ranked)
    change_keys(ranked, alpha_pattern={"nobody": 3, "v_proj": 5})
    with pytest.raises(ArtifactError, match="or convert the adapter"):
        open_artifact(ranked)
    notes = convert(ranked, tmp_path / "out", base=None)
    assert "left out of alpha_pattern what matches no module: nobody, …" in notes
    assert_same(before, tmp_path / "out")


def test_numbers_that_are_none_are_not_converted(ranked: Path, tmp_path: Path) -> None:
    tensors = load_file(ranked / WEIGHTS)
    tensors[next(iter(tensors))][0] = np.nan
    save_file(tensors, ranked / WEIGHTS)
    with pytest.raises(ArtifactError, match="holds NaN or infinity"):
        convert(ranked, tmp_path / "out", base=None)
