import json
from pathlib import Path

import numpy as np
import pytest

from adapters import AdapterConfig, open_artifact, write_artifact
from adapters.errors import AdapterMismatchError, BaseModelError, ConfigError
from tests.workloads import make_random_adapter
from trainer.export import peft_targets
from trainer.inject import check_ranks, inject_artifact, linear_sizes, target_modules
from trainer.model import BaseModel, load_base, load_tokenizer


@pytest.fixture
def base(tiny_model: Path) -> BaseModel:
    return load_base("tiny", tiny_model, dtype="float32")


def test_all_linear_is_every_linear_layer_but_the_output(base: BaseModel) -> None:
    modules = target_modules(base.model, ("all-linear",))
    assert len(modules) == 2 * 7
    assert not any("lm_head" in name for name in modules)
    assert linear_sizes(modules["model.layers.0.self_attn.k_proj"]) == (48, 24)


def test_names_and_suffixes_choose_modules_in_the_models_order(base: BaseModel) -> None:
    targets = ("v_proj", "layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj")
    assert list(target_modules(base.model, targets)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_a_target_that_names_nothing_is_refused(base: BaseModel) -> None:
    with pytest.raises(ConfigError, match=r"matches 'proj'; this model has down_proj, gate_proj"):
        target_modules(base.model, ("q_proj", "proj"))


def test_a_rank_above_a_modules_smaller_side_is_refused(base: BaseModel) -> None:
    modules = target_modules(base.model, ("all-linear",))
    with pytest.raises(ConfigError, match=r"25 is above 24, the smaller side of .*k_proj \[24, 48"):
        check_ranks(modules, AdapterConfig(25, 1))
    check_ranks(modules, AdapterConfig(24, 1))


def test_an_adapter_of_more_ranks_than_its_module_can_still_be_evaluated(
    tmp_path: Path, base: BaseModel, tiny_model: Path
) -> None:
    """PEFT makes such adapters, and the server takes them."""
    config = AdapterConfig(30, 8, target_modules=("k_proj",))
    folder = make_random_adapter(
        tmp_path / "a", tiny_model, config=config, modules=("k_proj",), seed=0
    )
    assert len(inject_artifact(base.model, open_artifact(folder))) == 2


def test_pefts_targets_are_last_names_only_where_these_are_exact(base: BaseModel) -> None:
    all_q = list(target_modules(base.model, ("q_proj",)))
    assert peft_targets(base, all_q) == ["q_proj"]
    assert peft_targets(base, all_q[:1]) == ["model.layers.0.self_attn.q_proj"]


def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, base: BaseModel, default_model: Path
) -> None:
    other = make_random_adapter(
        tmp_path / "other",
        default_model,
        config=AdapterConfig(4, 8, target_modules=("q_proj",)),
        modules=("q_proj",),
        seed=0,
    )
    with pytest.raises(AdapterMismatchError) as caught:
        inject_artifact(base.model, open_artifact(other))
    assert "self_attn.q_proj is [576, 576] in the adapter and [48, 48] in the model" in str(
        caught.value
    )
    assert "the model has no linear layer model.layers.29.self_attn.q_proj" in str(caught.value)


def test_an_adapted_output_layer_is_refused_by_name(tmp_path: Path, base: BaseModel) -> None:
    factors = {"lm_head": (np.ones((2, 48), np.float32), np.ones((49152, 2), np.float32))}
    write_artifact(
        tmp_path / "a", AdapterConfig(2, 8, target_modules=("lm_head",)), factors, provenance={}
    )
    with pytest.raises(AdapterMismatchError, match="lm_head is the output layer"):
        inject_artifact(base.model, open_artifact(tmp_path / "a"))


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("all-linear",), 14),
        (("q_proj", "mlp.up_proj"), 4),
        (("model.layers.1.self_attn.k_proj",), 1),
        ((r".*layers\.1\..*_proj",), 7),
        ((r".*self_attn\.[qv]_proj", "down_proj"), 6),
    ],
)
def test_targets_are_paths_ends_of_paths_or_regular_expressions(
    base: BaseModel, targets: tuple[str, ...], count: int
) -> None:
    assert len(target_modules(base.model, targets)) == count


def test_an_expression_that_can_not_be_matched_is_refused(base: BaseModel) -> None:
    with pytest.raises(ConfigError, match=r"adapter.target_modules"):
        target_modules(base.model, (r"(.*_proj",))


def test_folders_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)


def test_an_encoder_is_no_decoder(tmp_path: Path, tiny_model: Path) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(BaseModelError, match="no decoder model that transformers can load"):
        load_base("x", tmp_path, dtype="float32")
