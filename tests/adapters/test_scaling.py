import math

import pytest

from adapters import AdapterConfig, resolve_scalings
from adapters.errors import ArtifactError

MODULE = "model.layers.11.self_attn.q_proj"
OTHER = MODULE.replace("q_proj", "v_proj")


@pytest.mark.parametrize("rank", [1, 8, 32, 128])
def test_rora_divides_by_the_root_and_lora_by_the_rank(rank: int) -> None:
    def scaling(*, use_rslora: bool) -> float:
        config = AdapterConfig(rank, 16, use_rslora=use_rslora)
        return resolve_scalings(config, [MODULE])[MODULE].scaling

    assert scaling(use_rslora=True) == 16 / math.sqrt(rank)
    assert scaling(use_rslora=False) == 16 / rank


def test_patterns_give_each_module_its_own_rank_and_alpha() -> None:
    config = AdapterConfig(
        8, 16, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={MODULE: 6, "v_proj": 2}
    )
    found = resolve_scalings(config, [MODULE, OTHER])
    assert (found[MODULE].rank, found[MODULE].alpha, found[MODULE].scaling) == (4, 6, 3)
    assert (found[OTHER].rank, found[OTHER].scaling) == (8, 2 / math.sqrt(8))


def test_keys_that_match_nothing_are_all_named() -> None:
    config = AdapterConfig(
        8, 16, rank_pattern={"q_proj": 8, "k_prj": 4}, alpha_pattern={"o_prj": 1}
    )
    with pytest.raises(ArtifactError, match=r"rank_pattern: k_prj, alpha_pattern: o_prj") as caught:
        resolve_scalings(config, [MODULE])
    assert caught.value.codes == ("pattern-without-match",)


def test_a_key_behind_another_one_matches_all_the_same() -> None:
    """PEFT applies the first; the second is no mistake."""
    config = AdapterConfig(8, 16, rank_pattern={"q_proj": 4, MODULE: 5})
    assert resolve_scalings(config, [MODULE])[MODULE].rank == 4
