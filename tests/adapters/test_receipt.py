"""What an adapter matches in a base model, against the model itself."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adapters import AdapterConfig, open_artifact, write_artifact
from adapters.errors import AdapterMismatchError, BaseModelError
from adapters.receipt import BaseShapes, read_base_shapes, receipt
from tests.workloads import make_random_adapter


@pytest.fixture
def base(tiny_model: Path) -> BaseShapes:
    return read_base_shapes(tiny_model, name="tiny")


def change_weights(adapter: Path, change: object) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path)


def test_shapes_are_those_of_the_model(base: BaseShapes, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert base.linear == linear
    assert base.embeddings == {"model.embed_tokens": (49152, 48)}


def test_every_module_is_listed_with_its_rank_scaling_and_norm(
    adapter: Path, base: BaseShapes
) -> None:
    artifact = open_artifact(adapter)
    found = receipt(artifact, base)
    found.check()
    assert [module.name for module in found.matched] == list(artifact.modules)
    assert found.untouched == ()
    assert found.num_bytes == artifact.num_bytes
    norms = {
        module.name: np.linalg.norm(module.scaling * b.astype("f8") @ a.astype("f8"))
        for module, a, b in artifact.read_tensors()
    }
    for module in found.matched:
        assert module.norm == pytest.approx(norms[module.name])
        assert (module.rank, module.scaling) == (4, 4.0)


def test_what_matches_nothing_is_refused_and_what_stays_untouched_is_named(
    adapter: Path, base: BaseShapes
) -> None:
    def move_and_widen(tensors: dict[str, np.ndarray]) -> None:
        prefix = "base_model.model.model.layers"
        for side in "AB":
            name = f"{prefix}.1.self_attn.q_proj.lora_{side}.weight"
            tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)
        name = f"{prefix}.0.mlp.up_proj.lora_A.weight"
        tensors[name] = np.ones((4, 50), np.float32)

    change_weights(adapter, move_and_widen)
    found = receipt(open_artifact(adapter), base)
    assert {(problem.code, problem.where) for problem in found.problems} == {
        ("module-unmatched", "model.layers.7.self_attn.q_proj"),
        ("module-shape", "model.layers.0.mlp.up_proj"),
    }
    assert "model.layers.1.self_attn.q_proj" in found.untouched
    with pytest.raises(
        AdapterMismatchError, match=r"is for \[80, 50\], the base model has \[80, 48"
    ):
        found.check()


@pytest.mark.parametrize(
    ("claim", "is_trained_on_it", "codes"),
    [
        ({}, None, []),
        ({"name": "x", "fingerprint": "right"}, True, []),
        ({"name": "other", "fingerprint": "0" * 64}, False, ["base-other"]),
        ({"name": "tiny", "fingerprint": "0" * 64}, False, []),  # in another dtype, perhaps
        ("nonsense", None, []),
    ],
)
def test_another_base_is_refused_though_its_shapes_fit(
    adapter: Path, base: BaseShapes, claim: object, is_trained_on_it: bool, codes: list[str]
) -> None:
    text = json.dumps({"format": 1, "base_model": claim}).replace("right", base.fingerprint)
    (adapter / "rora.json").write_text(text)
    found = receipt(open_artifact(adapter), base)
    assert found.is_trained_on_it is is_trained_on_it
    assert [problem.code for problem in found.problems] == codes


def test_embeddings_and_a_tied_output_layer_are_matched(tmp_path: Path, base: BaseShapes) -> None:
    factors = {
        "model.embed_tokens": (np.ones((2, 49152), "f4"), np.ones((48, 2), "f4")),
        "lm_head": (np.ones((2, 48), "f4"), np.ones((49152, 2), "f4")),
    }
    config = AdapterConfig(2, 4, target_modules=("embed_tokens", "lm_head"))
    names = {"model.embed_tokens"}
    write_artifact(tmp_path / "a", config, factors, provenance={}, embeddings=names)
    found = receipt(open_artifact(tmp_path / "a"), base)
    found.check()
    assert len(found.matched) == 2
    assert len(found.untouched) == 14


def test_a_model_whose_layers_are_transposed_and_whose_names_are_shorter(tmp_path: Path) -> None:
    """GPT-2's files leave "transformer." out, and its layers are [in, out]."""
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    factors = {"transformer.h.0.attn.c_attn": (np.ones((2, 8), "f4"), np.ones((24, 2), "f4"))}
    adapter = AdapterConfig(2, 4, target_modules=("c_attn",))
    write_artifact(tmp_path / "a", adapter, factors, provenance={})
    base = read_base_shapes(tmp_path / "gpt2", name="gpt2")
    found = receipt(open_artifact(tmp_path / "a"), base)
    found.check()
    assert sorted(name.rpartition("h.0.")[2] for name in found.untouched) == [
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]


def test_a_base_has_other_names_too(adapter: Path, base: BaseShapes) -> None:
    claim = {"name": "other", "fingerprint": "0" * 64}
    (adapter / "rora.json").write_text(json.dumps({"base_model": claim}))
    known = dataclasses.replace(base, other_names=("another", "other"))
    assert [receipt(open_artifact(adapter), one).problems == () for one in (base, known)] == [
        False, True,
    ]  # fmt: skip


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json: not readable"):
        read_base_shapes(tmp_path, name="x")
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(BaseModelError, match="no linear layer"):
        read_base_shapes(tmp_path, name="x")


def test_no_weight_is_read(tiny_model: Path, tmp_path: Path, base: BaseShapes) -> None:
    """A model of zeros with the same shapes gives the same receipt but for its fingerprint."""
    shutil.copytree(tiny_model, tmp_path / "zeros")
    path = next((tmp_path / "zeros").glob("*.safetensors"))
    save_file({name: np.zeros_like(t) for name, t in load_file(path).items()}, path)
    config = AdapterConfig(4, 8, target_modules=("q_proj",))
    adapter = make_random_adapter(
        tmp_path / "a", tiny_model, config=config, modules=("q_proj",), seed=1
    )
    zeros = read_base_shapes(tmp_path / "zeros", name="zeros")
    assert zeros.fingerprint != base.fingerprint
    found = [receipt(open_artifact(adapter), one) for one in (base, zeros)]
    assert found[0].matched == found[1].matched


@pytest.mark.parametrize("prefix", ["language_model.model.layers", "zzz.model.layers", "layers"])
def test_paths_of_another_model_match_nothing(adapter: Path, base: BaseShapes, prefix: str) -> None:
    def rename_all(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.layers", prefix, 1)] = tensors.pop(name)

    change_weights(adapter, rename_all)
    found = receipt(open_artifact(adapter), base)
    assert found.matched == ()
    assert {problem.code for problem in found.problems} == {"module-unmatched"}


def test_quantised_layers_are_matched_by_name(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "quantised")
    path = next((tmp_path / "quantised").glob("*.safetensors"))
    tensors = {
        name.replace(".weight", ".qweight") if "proj" in name else name: (
            np.zeros((3, 4), np.int32) if "proj" in name else tensor
        )
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    found = receipt(open_artifact(adapter), read_base_shapes(tmp_path / "quantised", name="q"))
    found.check()
    assert len(found.matched) == 14
