"""A merged folder is what PEFT would merge, answers as base and adapter do, or is not kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import trainer.cli
from adapters import AdapterConfig, write_artifact
from adapters.base_model import fingerprint
from adapters.errors import (
    AdapterMismatchError,
    ArtifactError,
    BaseModelError,
    ConfigError,
    TrainingError,
)
from adapters.header import read_header
from adapters.tolerance import TOLERANCES, Difference, Dtype, tolerance_for
from tests.conftest import LINEAR
from tests.workloads import TOKENIZER_FILES, make_random_adapter
from trainer.merge import Merged, merge

TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


def merged_folder(
    adapter: Path,
    base: Path,
    output: Path,
    *,
    dtype: Dtype | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Merged:
    return merge(
        adapter, output, base_folder=base, base_name="tiny", dtype=dtype or "auto", say=say
    )


def pefts_weights(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """What PEFT merges, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return dict(merged.state_dict())


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(20, 60)[None]).logits
    return found


def random_adapter(folder: Path, base: Path, **settings: object) -> Path:
    arguments = {"rank": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEAR}
    config = AdapterConfig(**{**arguments, **settings})  # type: ignore[arg-type]
    return make_random_adapter(folder, base, config=config, modules=LINEAR, seed=3)


def rounded_model(base: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The tiny model, its files in another dtype."""
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(base / name, folder / name)
    return folder


def nothing_is_left(tmp_path: Path, *kept: str) -> bool:
    return {path.name for path in tmp_path.iterdir()} == set(kept)


def test_float32_is_what_peft_merges(tmp_path: Path, adapter: Path, tiny_model: Path) -> None:
    merged = merged_folder(adapter, tiny_model, tmp_path / "m")
    assert (merged.dtype, merged.num_modules) == ("float32", 14)
    assert merged.difference.largest <= TOLERANCES["float32"].largest < merged.effect.mean
    ours, theirs = (
        load_file(tmp_path / "m" / "model.safetensors"),
        pefts_weights(adapter, tiny_model),
    )
    for name, weight in load_file(tiny_model / "model.safetensors").items():
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
        # The control: what the adapter has, and nothing else, is not as it was.
        is_adapted = name.split(".")[-2] in LINEAR
        assert torch.equal(ours[name], weight) is not is_adapted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_pefts_float32_rounded_once(
    tmp_path: Path, adapter: Path, tiny_model: Path, dtype: Dtype
) -> None:
    merged = merged_folder(adapter, tiny_model, tmp_path / "m", dtype=dtype)
    assert merged.base_difference is not None
    assert 0 < merged.difference.mean <= merged.tolerance.mean < merged.effect.mean
    theirs = pefts_weights(adapter, tiny_model)
    for name, weight in load_file(tmp_path / "m" / "model.safetensors").items():
        assert weight.dtype == getattr(torch, dtype)
        expected = theirs[name].to(weight.dtype)
        # Sums in another order fall on the other side of a rounding now and then.
        assert (weight == expected).float().mean() > 0.998
        torch.testing.assert_close(weight, expected, rtol=2**-7, atol=1e-6)


def test_the_base_models_dtype_is_kept_and_its_weights_are_read_from_there(
    tmp_path: Path, adapter: Path, tiny_model: Path
) -> None:
    base = rounded_model(tiny_model, tmp_path / "base", torch.bfloat16)
    assert merged_folder(adapter, base, tmp_path / "m").dtype == "bfloat16"
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    header = read_header(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in header.values()} == {"BF16"}
    assert merged_folder(adapter, base, tmp_path / "wide", dtype="float32").dtype == "float32"


def test_ranks_and_alphas_that_differ_are_scaled_each_by_its_own(
    tmp_path: Path, tiny_model: Path
) -> None:
    adapter = random_adapter(
        tmp_path / "a",
        tiny_model,
        rank=6,
        rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 11},
        alpha_pattern={"layers.0.self_attn.v_proj": 2, "v_proj": 5, "up_proj": 20},
    )
    merged_folder(adapter, tiny_model, tmp_path / "m")
    ours, theirs = (
        load_file(tmp_path / "m" / "model.safetensors"),
        pefts_weights(adapter, tiny_model),
    )
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=0)


def test_the_folder_is_an_ordinary_model_with_tied_embeddings(
    tmp_path: Path, adapter: Path, tiny_model: Path
) -> None:
    merged_folder(adapter, tiny_model, tmp_path / "m")
    load: Any = AutoModelForCausalLM.from_pretrained  # typed without this argument's effect
    model, report = load(tmp_path / "m", output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys()
    assert not any(report.values())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in read_header(tmp_path / "m" / "model.safetensors")
    for name in TOKENIZER_FILES:
        assert (tmp_path / "m" / name).read_bytes() == (tiny_model / name).read_bytes()
    for path in (tmp_path / "m").iterdir():
        assert (
            path.stat().st_mode & 0o777 == (tmp_path / "m" / "config.json").stat().st_mode & 0o777
        )


def test_generation_settings_are_the_base_models_own(
    tmp_path: Path, adapter: Path, tiny_model: Path
) -> None:
    """Also those that transformers reads but refuses to write."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    settings = b'{"do_sample": false, "temperature": 0.6, "eos_token_id": [2, 0]}'
    (base / "generation_config.json").write_bytes(settings)
    merged_folder(adapter, base, tmp_path / "m")
    assert (tmp_path / "m" / "generation_config.json").read_bytes() == settings


def test_the_adapters_own_template_wins(tmp_path: Path, adapter: Path, tiny_model: Path) -> None:
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    merged_folder(adapter, tiny_model, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<Hi>"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_transposed_weights_of_gpt2_are_merged_as_peft_does(
    tmp_path: Path, tiny_model: Path
) -> None:
    torch.manual_seed(1)
    sizes = GPT2Config(
        vocab_size=49152, n_positions=64, n_embd=24, n_layer=2, n_head=2,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = tmp_path / "gpt2"
    model = GPT2LMHeadModel(sizes)
    model.save_pretrained(base)
    for name in TOKENIZER_FILES:
        shutil.copy(tiny_model / name, base / name)
    generator = np.random.default_rng(5)
    factors = {}
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module.endswith((".c_attn", ".c_proj", ".c_fc")):  # c_proj of attention is square
            in_features, out_features = weight.shape
            factors[module] = (
                generator.normal(0, 0.2, (3, in_features)).astype(np.float32),
                generator.normal(0, 0.2, (out_features, 3)).astype(np.float32),
            )
    config = AdapterConfig(3, 6, target_modules=("c_attn", "c_proj", "c_fc"))
    write_artifact(tmp_path / "a", config, factors, provenance={"format": 1})
    assert merged_folder(tmp_path / "a", base, tmp_path / "m").num_modules == 8
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    for name, weight in pefts_weights(tmp_path / "a", base).items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0)
    before = model.state_dict()["transformer.h.1.attn.c_proj.weight"]
    assert not torch.allclose(ours["transformer.h.1.attn.c_proj.weight"], before, atol=0.01)


def test_a_delta_whose_rounding_changes_the_answers_is_refused(
    tmp_path: Path, default_model: Path
) -> None:
    """Thirty layers of a delta far above the weights it is added to; the control is a usual one."""
    large = random_adapter(tmp_path / "large", default_model, lora_alpha=480)
    usual = random_adapter(tmp_path / "usual", default_model, lora_alpha=4)
    with pytest.raises(TrainingError, match=r"in bfloat16 differ by mean .*try --dtype float32"):
        merged_folder(large, default_model, tmp_path / "m")
    assert nothing_is_left(tmp_path, "large", "usual")
    assert merged_folder(usual, default_model, tmp_path / "m").num_modules == 210


def test_numbers_beyond_float16_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    adapter = random_adapter(tmp_path / "a", tiny_model, lora_alpha=80_000)
    with pytest.raises(TrainingError, match="in float16 differ by mean nan, largest nan"):
        merged_folder(adapter, tiny_model, tmp_path / "m", dtype="float16")
    assert nothing_is_left(tmp_path, "a")


def test_an_effect_that_rounds_away_is_refused_and_kept_in_float32(
    tmp_path: Path, tiny_model: Path
) -> None:
    base = rounded_model(tiny_model, tmp_path / "base", torch.bfloat16)
    adapter = random_adapter(tmp_path / "a", base, lora_alpha=1e-3)
    with pytest.raises(TrainingError, match="nearer to the base model than to the adapter"):
        merged_folder(adapter, base, tmp_path / "m")
    assert nothing_is_left(tmp_path, "a", "base")
    merged_folder(adapter, base, tmp_path / "m", dtype="float32")


def test_an_adapter_that_does_nothing_is_refused(
    tmp_path: Path, adapter: Path, tiny_model: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t * ("lora_A" in n) for n, t in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(TrainingError, match="changes no answer of tiny, a trained adapter is"):
        merged_folder(adapter, tiny_model, tmp_path / "m")
    assert nothing_is_left(tmp_path, "adapter")


def test_an_adapter_file_that_was_cut_is_refused(
    tmp_path: Path, adapter: Path, tiny_model: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors"):
        merged_folder(adapter, tiny_model, tmp_path / "m")
    assert nothing_is_left(tmp_path, "adapter")


def test_weights_that_are_changed_before_the_check_are_not_kept(
    tmp_path: Path, adapter: Path, tiny_model: Path
) -> None:
    """One module of the written file is the base's again: the file is what is checked."""

    def undo_one(line: str) -> None:
        if "comparing" in line:
            (path,) = tmp_path.glob(".m.*.tmp/model.safetensors")
            weights = load_file(path)
            name = "model.layers.1.mlp.up_proj.weight"
            weights[name] = load_file(tiny_model / "model.safetensors")[name]
            save_file(weights, path, {"format": "pt"})

    with pytest.raises(TrainingError, match="in float32 differ by mean"):
        merged_folder(adapter, tiny_model, tmp_path / "m", say=undo_one)
    assert nothing_is_left(tmp_path, "adapter")


@pytest.mark.parametrize("moment", ["loading", "writing", "comparing"])
def test_ctrl_c_leaves_nothing(
    tmp_path: Path, adapter: Path, tiny_model: Path, moment: str
) -> None:
    def interrupt(line: str) -> None:
        if moment in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged_folder(adapter, tiny_model, tmp_path / "m", say=interrupt)
    assert nothing_is_left(tmp_path, "adapter")


def test_embeddings_another_base_and_quantised_ones_are_refused(
    tmp_path: Path, adapter: Path, tiny_model: Path
) -> None:
    factors = {
        "model.embed_tokens": (np.ones((2, 49152), np.float32), np.ones((48, 2), np.float32))
    }
    write_artifact(
        tmp_path / "e", AdapterConfig(2, 2, target_modules=("embed_tokens",)), factors,
        provenance={}, embeddings=("model.embed_tokens",),
    )  # fmt: skip
    with pytest.raises(AdapterMismatchError, match=r"the embedding model\.embed_tokens, adapters"):
        merged_folder(tmp_path / "e", tiny_model, tmp_path / "m")

    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    claim = {"name": "other", "fingerprint": "0" * 64}
    (adapter / "rora.json").write_text(json.dumps({"base_model": claim}))
    with pytest.raises(AdapterMismatchError, match="was trained on 'other' with fingerprint 0000"):
        merged_folder(adapter, base, tmp_path / "m")
    claim["fingerprint"] = fingerprint(base)
    (adapter / "rora.json").write_text(json.dumps({"base_model": claim}))

    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="the base model is quantised"):
        merged_folder(adapter, base, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_command_prints_the_folder_or_json_and_refuses_a_full_one(
    tmp_path: Path, adapter: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "m"
    output.mkdir()  # an empty one is as good as none
    arguments = ["merge", str(adapter), "--output", str(output), "--model", str(tiny_model)]
    assert trainer.cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{output}\n"
    assert "log-probs differ from the unmerged model's by mean" in captured.err
    before = (output / "model.safetensors").stat()

    assert trainer.cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{output} holds something already" in captured.err
    assert "loading" not in captured.err.lower()
    assert (output / "model.safetensors").stat() == before

    arguments[3] = str(tmp_path / "n")
    assert trainer.cli.main([*arguments, "--json", "--dtype", "bfloat16"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["output"], printed["dtype"], printed["num_modules"]) == (
        str(tmp_path / "n"), "bfloat16", 14,
    )  # fmt: skip
    assert 0 < printed["mean_difference"] <= printed["tolerance"]["mean"]
    assert printed["mean_difference"] < printed["largest_difference"]

    (tmp_path / "file").write_text("")
    arguments[3] = str(tmp_path / "file")
    assert trainer.cli.main(arguments) == 2
    assert "is no folder that can be written" in capsys.readouterr().err


def test_a_dtype_that_is_none_of_ours_needs_a_name(
    tmp_path: Path, adapter: Path, tiny_model: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    save_file({n: w.double() for n, w in weights.items()}, base / "model.safetensors")
    with pytest.raises(ConfigError, match=r"most weights of .*base are F64, one of F32, BF16, F16"):
        merged_folder(adapter, base, tmp_path / "m")


def test_the_tolerance_is_the_tables_or_what_the_base_model_loses() -> None:
    def mean(base_mean: float) -> float:
        return tolerance_for("bfloat16", Difference(base_mean, 9.0)).mean

    assert tolerance_for("float32", None) == TOLERANCES["float32"]
    assert [mean(0.0), mean(0.02), mean(1.0)] == [0.025, 0.08, 0.25]
    assert not TOLERANCES["bfloat16"].allows(Difference(float("nan"), float("nan")))
    assert not TOLERANCES["float32"].allows(Difference(0.0, 0.1))
