import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters import (
    AdapterConfig,
    open_artifact,
    version_digest,
    weights_digest,
    write_artifact,
)
from adapters.errors import ArtifactError


def digest_of(folder: Path) -> str:
    return weights_digest(open_artifact(folder))


def edit_config(folder: Path, **keys: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_order_formatting_and_descriptions_do_not_change_the_weights_digest(adapter: Path) -> None:
    before = digest_of(adapter)
    path = adapter / "adapter_config.json"
    keys = json.loads(path.read_text())
    keys["target_modules"] = keys["target_modules"][::-1]
    path.write_text(json.dumps(dict(reversed(keys.items()))))
    edit_config(adapter, base_model_name_or_path="elsewhere", peft_version="9", lora_alpha=8)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(reversed(tensors.items())), adapter / "adapter_model.safetensors", {"x": "y"})
    assert digest_of(adapter) == before


@pytest.mark.parametrize(
    "keys",
    [{"lora_alpha": 9}, {"use_rslora": False}, {"alpha_pattern": {"q_proj": 1}}],
    ids=str,
)
def test_whatever_scales_changes_the_weights_digest(adapter: Path, keys: dict[str, object]) -> None:
    before = digest_of(adapter)
    edit_config(adapter, **keys)
    assert digest_of(adapter) != before


def test_one_bit_of_one_tensor_changes_the_weights_digest(adapter: Path) -> None:
    before = digest_of(adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name].view(np.uint32)[0, 0] ^= 1
    save_file(tensors, path)
    assert digest_of(adapter) != before


def test_template_and_probe_make_versions_of_the_same_weights(adapter: Path) -> None:
    weights = digest_of(adapter)
    plain = version_digest(weights, adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with_template = version_digest(weights, adapter)
    (adapter / "rora.json").write_text(json.dumps({"format": 1, "probe": {"prompts": [[1, 2]]}}))
    assert len({plain, with_template, version_digest(weights, adapter)}) == 3
    assert digest_of(adapter) == weights


def test_which_of_two_matching_patterns_comes_first_changes_the_digest(adapter: Path) -> None:
    """The first one counts, for PEFT and for us; so two orders are two adapters."""
    found = set()
    for keys in (("q_proj", "0.self_attn.q_proj"), ("0.self_attn.q_proj", "q_proj")):
        edit_config(adapter, alpha_pattern={key: 1.0 + len(key) for key in keys})
        module = open_artifact(adapter).modules["model.layers.0.self_attn.q_proj"]
        found.add((digest_of(adapter), module.scaling))
    assert len({digest for digest, _ in found}) == len({scaling for _, scaling in found}) == 2


def test_patterns_that_mean_the_same_have_the_same_digest(adapter: Path) -> None:
    edit_config(adapter, alpha_pattern={"q_proj": 3, "v_proj": 4})
    before = digest_of(adapter)
    edit_config(adapter, alpha_pattern={r"self_attn\.v_proj": 4.0, "[q]_proj": 3.0})
    assert digest_of(adapter) == before


def test_the_order_of_patterns_survives_writing(tmp_path: Path) -> None:
    patterns = {"q": 1.0, "a.q": 64.0}
    config = AdapterConfig(2, 4, alpha_pattern=patterns, target_modules=("q",))
    factors = {"a.q": (np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))}
    write_artifact(tmp_path / "a", config, factors, provenance={})
    read = open_artifact(tmp_path / "a")
    assert list(read.config.alpha_pattern) == list(patterns)
    assert read.modules["a.q"].scaling == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "holds a list"),
        (b'{"probe": NaN}', "NaN is no number of JSON"),
        (b'{"probe": "\\ud800"}', "half of a character"),
    ],
)
def test_a_broken_provenance_is_refused(adapter: Path, content: bytes, message: str) -> None:
    (adapter / "rora.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        version_digest("0", adapter)
