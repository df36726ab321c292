"""Compaction against what PEFT computes, and against a plain singular value decomposition."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import DTypeLike
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapters import AdapterConfig, open_artifact, validate, weights_digest, write_artifact
from adapters.compact import Compaction, compact_to_budget, compact_to_error
from adapters.errors import ArtifactError, ConfigError
from tests.conftest import LINEAR
from tests.reference import ATOL
from tests.workloads import formed_deltas as deltas
from tests.workloads import pefts_logits

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pattern": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 11},
        "alpha_pattern": {"v_proj": 5},
    },
}


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_with_peft(folder: Path, base: Path, **options: Any) -> Path:
    """Let PEFT make an adapter, give it random weights, and save it."""
    torch.manual_seed(1)
    targets = list(LINEAR)
    config = LoraConfig(r=6, lora_alpha=9, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base_model(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # Of rank 2, so that compaction has something to do.
            rows, columns = parameter.shape
            parameter.data = torch.randn(rows, 2) @ torch.randn(2, columns) * 0.05
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_is_right_and_means_the_same_when_compacted(
    tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    adapter = make_with_peft(tmp_path / "peft", tiny_model, **KINDS[kind])
    assert validate(adapter).problems == ()
    found = compact_to_error(open_artifact(adapter), tmp_path / "small", max_error=1e-6)
    assert found.error <= found.largest_error <= 1e-6
    assert {module.new_rank for module in found.modules} == {2}
    assert min(module.rank for module in found.modules) > 2
    assert validate(tmp_path / "small").problems == ()
    before, after = (pefts_logits(tiny_model, tmp_path / name) for name in ("peft", "small"))
    assert float((before - after).abs().max()) <= ATOL["logits-float32"]
    # The control: without the adapter, or with half of its ranks, the logits are elsewhere.
    compact_to_budget(open_artifact(adapter), tmp_path / "half", rank_budget=14)
    assert float((before - pefts_logits(tiny_model, tmp_path / "half")).abs().max()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_keeps_its_digest_through_peft_and_through_us(
    tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    adapter = make_with_peft(tmp_path / "peft", tiny_model, **KINDS[kind])
    artifact = open_artifact(adapter)
    model = PeftModel.from_pretrained(base_model(tiny_model), str(adapter))
    model.save_pretrained(str(tmp_path / "again"))
    factors = {module.name: (a, b) for module, a, b in artifact.read_tensors()}
    write_artifact(tmp_path / "ours", artifact.config, factors, provenance={})
    digests = [weights_digest(open_artifact(tmp_path / n)) for n in ("peft", "again", "ours")]
    assert len(set(digests)) == 1


def make(
    folder: Path, *, rank: int, true_rank: int, dtype: DTypeLike = np.float32, rslora: bool = True
) -> Path:
    """Write two modules whose factors have `rank` rows and whose delta has `true_rank`."""
    generator = np.random.default_rng(3)

    def factors(out_features: int, in_features: int) -> tuple[Any, Any]:
        a = generator.normal(size=(true_rank, in_features))
        b = generator.normal(size=(out_features, true_rank))
        mix, _ = np.linalg.qr(generator.normal(size=(rank, true_rank)))
        return (mix @ a).astype(dtype), (b @ mix.T).astype(dtype)

    config = AdapterConfig(rank, 16, use_rslora=rslora, target_modules=("q", "o"))
    pairs = {"m.q": factors(96, 80), "m.o": factors(80, 96)}
    provenance = {"format": 1, "probe": {"old": 1}, "method": "rora"}
    write_artifact(folder, config, pairs, provenance=provenance, chat_template=b"{{ own }}")
    return folder


@pytest.mark.parametrize("rslora", [True, False])
def test_a_rank_of_64_that_is_really_8_becomes_8(tmp_path: Path, rslora: bool) -> None:
    folder = make(tmp_path / "a", rank=64, true_rank=8, rslora=rslora)
    found = compact_to_error(open_artifact(folder), tmp_path / "b", max_error=1e-6)
    assert [module.new_rank for module in found.modules] == [8, 8]
    small = open_artifact(tmp_path / "b")
    assert {module.rank for module in small.modules.values()} == {8}
    assert small.num_bytes == found.new_num_bytes == found.num_bytes // 8
    before, after = deltas(folder), deltas(tmp_path / "b")
    for name, delta in before.items():
        assert np.linalg.norm(after[name] - delta) <= 1e-6 * np.linalg.norm(delta)


def relative_errors(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(delta - after.get(name, 0)) / np.linalg.norm(delta))
        for name, delta in before.items()
    }


@pytest.mark.parametrize("max_error", [0.0, 0.05, 0.3, 0.9])
def test_the_least_rank_within_the_error_is_taken(tmp_path: Path, max_error: float) -> None:
    folder = make(tmp_path / "a", rank=24, true_rank=24)
    found = compact_to_error(open_artifact(folder), tmp_path / "b", max_error=max_error)
    errors = relative_errors(deltas(folder), deltas(tmp_path / "b"))
    for module in found.modules:
        values = np.linalg.svd(deltas(folder)[module.name], compute_uv=False)
        tails = [np.linalg.norm(values[rank:]) / np.linalg.norm(values) for rank in range(25)]
        assert module.new_rank == next(
            r for r, tail in enumerate(tails) if tail <= max_error + 1e-12
        )
        assert errors[module.name] == pytest.approx(module.error / module.norm, abs=1e-6)
        assert errors[module.name] <= max_error + 1e-12
    assert_error_of_the_whole(found, deltas(folder), deltas(tmp_path / "b"))


def assert_error_of_the_whole(
    found: Compaction, before: dict[str, Any], after: dict[str, Any]
) -> None:
    lost = sum(np.sum((delta - after.get(name, 0)) ** 2) for name, delta in before.items())
    norm = sum(np.sum(delta**2) for delta in before.values())
    assert found.error == pytest.approx(np.sqrt(lost / norm), abs=1e-6)


def test_a_budget_goes_where_the_singular_values_are_largest(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rank=10, true_rank=10)
    before = deltas(folder)
    values = {name: np.linalg.svd(delta, compute_uv=False)[:10] for name, delta in before.items()}
    for budget in (1, 7, 19, 100):
        output = tmp_path / str(budget)
        found = compact_to_budget(open_artifact(folder), output, rank_budget=budget)
        least = sorted(np.concatenate(list(values.values())))[::-1][: min(budget, 20)][-1]
        ranks = {module.name: module.new_rank for module in found.modules}
        assert ranks == {name: int(np.sum(v >= least)) for name, v in values.items()}
        assert_error_of_the_whole(found, before, deltas(output))


def test_a_module_that_keeps_its_rank_keeps_its_bits(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rank=6, true_rank=6)
    compact_to_error(open_artifact(folder), tmp_path / "b", max_error=1e-9)
    digests = [weights_digest(open_artifact(tmp_path / name)) for name in ("a", "b")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_are_kept_whole_where_they_can_not_be_rounded_finely_enough(
    tmp_path: Path, dtype: DTypeLike
) -> None:
    folder = make(tmp_path / "a", rank=32, true_rank=4, dtype=dtype)
    fine = compact_to_error(open_artifact(folder), tmp_path / "fine", max_error=1e-5)
    assert [module.new_rank for module in fine.modules] == [32, 32]
    coarse = compact_to_error(open_artifact(folder), tmp_path / "coarse", max_error=0.03)
    assert [module.new_rank for module in coarse.modules] == [4, 4]
    errors = relative_errors(deltas(folder), deltas(tmp_path / "coarse"))
    assert max(errors.values()) <= 0.03
    assert coarse.largest_error == pytest.approx(max(errors.values()), rel=1e-6)


def test_a_dead_module_is_left_out_and_the_rest_comes_along(tmp_path: Path) -> None:
    factors = {
        "m.q": (np.ones((4, 8), np.float32), np.ones((6, 4), np.float32)),
        "m.o": (np.ones((4, 8), np.float32), np.zeros((6, 4), np.float32)),
    }
    config = AdapterConfig(4, 4, target_modules=("q", "o"))
    write_artifact(tmp_path / "a", config, factors, provenance={"probe": {"old": 1}})
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ own }}")
    found = compact_to_error(open_artifact(tmp_path / "a"), tmp_path / "b", max_error=1e-6)
    small = open_artifact(tmp_path / "b")
    assert {name: module.rank for name, module in small.modules.items()} == {"m.q": 1}
    # Else PEFT would make fresh factors for the one that is gone, and warn.
    assert small.config.target_modules == ("m.q",)
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ own }}"
    assert "probe" not in (tmp_path / "b" / "rora.json").read_text()
    assert [module.new_rank for module in found.modules if module.name == "m.o"] == [0]


def test_an_embedding_stays_one(tmp_path: Path) -> None:
    a, b = np.ones((4, 50), np.float32), np.ones((8, 4), np.float32)
    config = AdapterConfig(4, 4, target_modules=("embed_tokens",))
    names = {"model.embed_tokens"}
    factors = {"model.embed_tokens": (a, b)}
    write_artifact(tmp_path / "a", config, factors, provenance={}, embeddings=names)
    compact_to_error(open_artifact(tmp_path / "a"), tmp_path / "b", max_error=1e-5)
    (module,) = open_artifact(tmp_path / "b").modules.values()
    assert (module.kind, module.rank, module.in_features) == ("embedding", 1, 50)


def test_what_can_not_be_meant_is_refused(tmp_path: Path) -> None:
    artifact = open_artifact(make(tmp_path / "a", rank=4, true_rank=4))
    for max_error in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="at least 0 and below 1"):
            compact_to_error(artifact, tmp_path / "b", max_error=max_error)
    with pytest.raises(ConfigError, match="at least 1 is expected"):
        compact_to_budget(artifact, tmp_path / "b", rank_budget=0)
    with pytest.raises(ArtifactError, match="exists already"):
        compact_to_error(artifact, tmp_path / "a", max_error=0.1)
    assert not (tmp_path / "b").exists()
