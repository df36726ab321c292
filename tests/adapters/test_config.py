import json
import re
from pathlib import Path

import peft
import pytest

from adapters import open_artifact
from adapters.config import AdapterConfig, parse_config, read_config
from adapters.errors import ArtifactError
from adapters.problems import describe

MINIMAL = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("key", "value", "code", "message"),
    [
        ("use_dora", True, "kind-dora", "use_dora: is True: a DoRA adapter is not served"),
        ("alora_invocation_tokens", [1], "kind-activated-lora", "an Activated LoRA is not served"),
        (
            "modules_to_save",
            ["lm_head"],
            "kind-modules-to-save",
            "fully trained module beside LoRA is not served",
        ),
        (
            "layer_replication",
            [[0, 2]],
            "kind-layer-replication",
            "layer replication is not served",
        ),
        ("bias", "all", "kind-bias", "bias: is all, only none is served"),
        (
            "use_rslorra",
            True,
            "config-key-unknown",
            "use_rslorra: unknown key with value True.*nearest known key: use_rslora",
        ),
        ("peft_type", "IA3", "config-peft-type", "peft_type: is IA3, only LORA is served"),
        (
            "init_lora_weights",
            "pissa",
            "config-initialisation",
            "is pissa, which changes the base weights",
        ),
        ("r", 0, "config-rank", "r: is 0, an integer of at least 1"),
        ("r", True, "config-rank", "r: is True, an integer of at least 1"),
        ("lora_alpha", float("nan"), "config-alpha", "lora_alpha: is nan, a number above 0"),
        ("lora_alpha", float("inf"), "config-alpha", "lora_alpha: is inf, a number above 0"),
        ("use_rslora", "yes", "config-use-rslora", "use_rslora: is yes, true or false"),
        (
            "rank_pattern",
            {"q_proj": 1.5},
            "config-rank-pattern",
            "rank_pattern: is .* an object of integers above 0",
        ),
        ("target_modules", [1], "config-targets", "target_modules: is"),
        (
            "target_modules",
            "q_proj)",
            "pattern-syntax",
            r"target_modules: 'q_proj\)' is no regular expression",
        ),
        (
            "rank_pattern",
            {"(": 2},
            "pattern-syntax",
            r"rank_pattern: '\(' is no regular expression",
        ),
        ("alpha_pattern", {"a" * 1001: 2}, "pattern-too-long", "1001 characters, at most 1000"),
        (
            "layers_to_transform",
            [0],
            "kind-chosen-layers",
            "a choice of modules by layer is not served",
        ),
        (
            "exclude_modules",
            ["q_proj"],
            "kind-excluded-modules",
            "a choice of modules by exclusion is not served",
        ),
    ],
)
def test_what_is_not_applied_is_refused(key: str, value: object, code: str, message: str) -> None:
    _, problems = parse_config({**MINIMAL, key: value})
    assert [problem.code for problem in problems] == [code]
    assert re.search(message, describe(problems))


@pytest.mark.parametrize("value", [None, False, {}, [], "", 0])
def test_unknown_keys_that_say_nothing_pass(value: object) -> None:
    assert parse_config({**MINIMAL, "key_of_2030": value})[1] == []


def test_every_mistake_is_reported_at_once() -> None:
    wrong = {**MINIMAL, "r": -1, "use_dora": True, "bias": "all"}
    _, problems = parse_config(wrong)
    assert {problem.code for problem in problems} == {"config-rank", "kind-dora", "kind-bias"}
    assert "\n" not in describe(problems)


def test_whatever_peft_writes_by_default_is_read(tmp_path: Path) -> None:
    """PEFT's own defaults must pass, with all the keys that this release of it writes."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(str(tmp_path))
    assert read_config(tmp_path) == (AdapterConfig(4, 12, target_modules=("q_proj",)), [])


def test_what_we_write_is_what_peft_reads(tmp_path: Path) -> None:
    ours = AdapterConfig(
        rank=8,
        lora_alpha=16.0,
        use_rslora=True,
        rank_pattern={"layers.0.q_proj": 3},
        alpha_pattern={"v_proj": 5.0},
        target_modules=("q_proj", "v_proj"),
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours.to_peft()))
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (theirs.r, theirs.lora_alpha, theirs.use_rslora) == (8, 16.0, True)
    assert theirs.rank_pattern == {"layers.0.q_proj": 3}
    assert theirs.alpha_pattern == {"v_proj": 5.0}
    assert set(theirs.target_modules) == {"q_proj", "v_proj"}
    assert read_config(tmp_path) == (ours, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "holds a list, a JSON object is expected"),
        (b'{"r": 8, "r": 16}', "key 'r' stands twice"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"target_modules": ["\\ud800"]}', "an escape that is half of a character"),
    ],
)
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no adapter_config\.json"):
        open_artifact(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b" " * (4 * 1024 * 1024 + 1))
    with pytest.raises(ArtifactError, match="4194305 bytes, at most 4194304"):
        read_config(tmp_path)
