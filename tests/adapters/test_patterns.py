import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from adapters.errors import ArtifactError
from adapters.patterns import PatternTable, check_key, check_pattern, match_modules, targeted

MODULE = "model.layers.11.self_attn.q_proj"


def pefts_key(keys: list[str], module: str) -> str | None:
    theirs: str = get_pattern_key(keys, module)
    return theirs if theirs in keys and re.match(rf"(.*\.)?({theirs})$", module) else None


@pytest.mark.parametrize(
    "keys",
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
        ["", "q_proj"],
        ["."],
        ["layers.11.self_attn_q_proj"],
        ["layers.11.self.attn.q_proj"],
        ["(q|k)_proj", "q_proj"],
        ["layers.(1|11).self_attn.q_pro[a-j]"],
    ],
)
def test_a_key_matches_where_pefts_own_rule_says(keys: list[str]) -> None:
    assert PatternTable(keys).first_match(MODULE) == pefts_key(keys, MODULE)


NAMES = st.lists(st.text("abc_1", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join)
KEYS = st.text("abc_1.", max_size=8) | st.text("abc_1.*?+()|[]^$\\d", max_size=10)


@settings(max_examples=2000, deadline=None)
@given(keys=st.lists(KEYS, max_size=6, unique=True), modules=st.lists(NAMES, max_size=4))
def test_any_key_that_is_accepted_matches_as_in_peft(keys: list[str], modules: list[str]) -> None:
    keys = [key for key in keys if check_key("rank_pattern", key) is None]
    table = PatternTable(keys)
    for module in modules:
        assert table.first_match(module) == pefts_key(keys, module)
    matched = {key for key in keys for m in modules if re.match(rf"(.*\.)?({key})$", m)}
    assert set(table.unmatched(modules)) == set(keys) - matched


@settings(max_examples=1000, deadline=None)
@given(pattern=KEYS, modules=st.lists(NAMES, max_size=4))
def test_an_expression_chooses_the_modules_that_it_chooses_in_peft(
    pattern: str, modules: list[str]
) -> None:
    if check_pattern("target_modules", pattern) is None:
        assert targeted(pattern, modules) == {m for m in modules if re.fullmatch(pattern, m)}


@given(targets=st.lists(NAMES, max_size=4), modules=st.lists(NAMES, max_size=6))
def test_names_choose_whole_paths_and_their_ends(targets: list[str], modules: list[str]) -> None:
    chosen = {m for m in modules if any(m == t or m.endswith(f".{t}") for t in targets)}
    assert targeted(tuple(targets), modules) == chosen


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("(", "pattern-syntax"),
        ("(?i)q_proj", "pattern-too-costly"),
        ("q_proj)|(k_proj", "pattern-syntax"),  # right only inside the group that PEFT puts it in
        ("a" * 1001, "pattern-too-long"),
        ("(?!k)_proj", "pattern-too-costly"),
        (r"(a)\1", "pattern-too-costly"),
        ("a{,3}", "pattern-too-costly"),
        ("((a{1000}){1000}){1000}", "pattern-too-costly"),
        ("[[a]", "pattern-too-costly"),
    ],
)
def test_keys_that_can_not_be_matched_as_in_peft_are_refused(key: str, code: str) -> None:
    problem = check_key("rank_pattern", key)
    assert problem is not None
    assert problem.code == code


def test_an_expression_that_would_hang_pythons_matcher_takes_no_time() -> None:
    key = "(([a-z0-9.]+)+)+!"
    assert check_key("rank_pattern", key) is None
    started = time.process_time()
    assert PatternTable([key]).first_match(MODULE * 3) is None
    assert time.process_time() - started < 1  # re.match would take years


def test_patterns_that_would_take_long_are_refused_before_they_are_tried() -> None:
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in range(3000)]
    keys = {f"(a|b)?layers[.]{n}.*": 1 for n in range(3000)}
    with pytest.raises(ArtifactError, match="at most 100000000 are expected") as caught:
        match_modules("rank_pattern", keys, modules)
    assert caught.value.codes == ("pattern-too-costly",)
    # As many whole paths are no matter.
    values, unmatched = match_modules("rank_pattern", dict.fromkeys(modules, 1), modules)
    assert (len(values), unmatched) == (3000, [])
