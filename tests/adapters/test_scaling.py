import math

import pytest
from peft.utils.other import get_pattern_key

from adapters import AdapterConfig, module_rank, module_scaling
from adapters.scaling import matching_key

MODULE = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize("rank", [1, 8, 32, 128])
def test_rora_divides_by_the_root_and_lora_by_the_rank(rank: int) -> None:
    assert module_scaling(AdapterConfig(rank, 16, use_rslora=True), MODULE) == 16 / math.sqrt(rank)
    assert module_scaling(AdapterConfig(rank, 16), MODULE) == 16 / rank


def test_patterns_give_each_module_its_own_rank_and_alpha() -> None:
    config = AdapterConfig(
        8,
        16,
        use_rslora=True,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"layers.11": 1, MODULE: 6},
    )
    assert module_rank(config, MODULE) == 4
    assert module_scaling(config, MODULE) == 3
    assert module_rank(config, MODULE.replace("q_proj", "v_proj")) == 8


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["proj"],
        ["1.self_attn.q_proj"],
        ["layers.11.self_attn.q_proj"],
        ["v_proj", "q_proj", "self_attn.q_proj"],
        [r"model\.layers\.\d+\.self_attn\.q_proj"],
        ["layers.11"],
        [".*"],
        [],
    ],
)
def test_a_key_matches_where_pefts_own_rule_says(patterns: list[str]) -> None:
    theirs = get_pattern_key(patterns, MODULE)
    ours = matching_key(dict.fromkeys(patterns), MODULE)
    assert ours == (theirs if theirs in patterns else None)
