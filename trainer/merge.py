"""Base model + adapter -> one ordinary model folder, kept only if it answers as the two do.

Owns the sum of the weights and the check; how far off is too far is adapters/tolerance.py's.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters import AdapterArtifact, open_artifact
from adapters.base_model import base_tensors
from adapters.digest import read_chat_template
from adapters.errors import AdapterMismatchError, BaseModelError, ConfigError, TrainingError
from adapters.folder import CHAT_TEMPLATE_FILE
from adapters.tolerance import Difference, Dtype, Tolerance, tolerance_for
from adapters.writer import new_folder, sync_folder
from trainer.inject import adapters_off, check_base, inject_artifact
from trainer.lora_linear import LoraLinear
from trainer.model import load_base
from trainer.run_folder import check_output

_DTYPES: dict[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"
# What a model folder holds beside its weights and config.json, copied byte by byte.
_COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    _GENERATION_FILE,
    "LICENSE*",
)
# Prose, code, numbers and another script: any text shows whether weights are the same.
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps for the rest of the day.",
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
    "In 1969 two people walked on the Moon; 12 + 30 = 42. Привет, мир! 你好",
)
_MAX_TEXT_TOKENS = 48
_NUM_LIKELIEST = 20  # tokens looked at in every place; vLLM gives as many log-probs at most


@dataclass(frozen=True)
class Merged:
    """A merged model that was kept.

    Args:
        output: its folder.
        dtype: of its weights.
        num_modules: linear layers that the adapter changed.
        difference: from the unmerged model in float32.
        tolerance: what was allowed of it.
        base_difference: what the base model itself loses in `dtype`; None in float32.
        effect: what the adapter changes, in float32.
    """

    output: Path
    dtype: Dtype
    num_modules: int
    difference: Difference
    tolerance: Tolerance
    base_difference: Difference | None
    effect: Difference


@dataclass(frozen=True)
class _Unmerged:
    """What the unmerged model answers, in float32.

    Args:
        texts: token ids.
        tokens: [places, 20], int64. The likeliest tokens of every place, as the adapter has it.
        adapted, alone: [places, 20], float32. Their log-probs with the adapter and without.
    """

    texts: Sequence[Sequence[int]]
    tokens: Tensor
    adapted: Tensor
    alone: Tensor


def merge(
    adapter: Path,
    output: Path,
    *,
    base_folder: Path,
    base_name: str,
    dtype: Dtype | Literal["auto"] = "auto",
    say: Callable[[str], object],
) -> Merged:
    """Write base model + adapter as one model folder; `output` appears complete and checked or not.

    W' = W + scaling * B·A for every module of the adapter, in float32, rounded once to `dtype`. The
    folder is then loaded from disk and compared with the base model that has the adapter beside it.

    Args:
        adapter: its folder; its own chat template, if it has one, becomes the model's.
        output: a new or empty folder.
        base_name: what the base model is called, as adapters.base_model.model_name gives it.
        dtype: of the weights; "auto" is the one that most of the base model's have.
        say: told what is being done, a line at a time.

    Raises:
        ConfigError: `output` holds something, or no `dtype` fits what the base model's files have.
        ArtifactError: the adapter breaks a rule, or does not fit the base model.
        BaseModelError: it can not be loaded, or is quantised.
        TrainingError: the merged model is not the unmerged one within the tolerance, or the base
            model; or it can not be written.
    Cost: the base model in float32, then the merged one and the base model in `dtype`, each alone.
    Checked against: PEFT's merge_and_unload, in tests/trainer/test_merge.py.
    """
    check_output(output)
    artifact = open_artifact(adapter)
    _check_pair(artifact, base_folder, base_name)
    chosen = files_dtype(base_folder) if dtype == "auto" else dtype
    say(f"{adapter}: loading it and {base_name}")
    base = load_base(base_name, base_folder, dtype="float32")
    layers = inject_artifact(base.model, artifact)
    num_modules = len(layers)
    texts = [base.tokenizer(text)["input_ids"][:_MAX_TEXT_TOKENS] for text in _TEXTS]
    unmerged = _look_unmerged(base.model, layers, texts)
    effect = _difference(unmerged.adapted, unmerged.alone)
    if effect.largest == 0:
        raise TrainingError(
            f"{adapter}: changes no answer of {base_name}, a trained adapter is expected; "
            "train it for longer"
        )
    fold(base.model, layers)
    del layers
    if output.is_dir():  # an empty one, as check_output found
        output.rmdir()
    with new_folder(output.absolute()) as temporary:
        say(f"{output}: writing {num_modules} merged modules in {chosen}")
        _write(temporary, base.model, artifact, base_folder=base_folder, dtype=chosen)
        del base  # before the next one is loaded
        say(f"{output}: comparing it with the unmerged model")
        found = _look(temporary, base_name, chosen, unmerged)
        rounded = unmerged.alone
        base_difference = None
        if chosen != "float32":
            rounded = _look(base_folder, base_name, chosen, unmerged)
            base_difference = _difference(rounded, unmerged.alone)
        difference = _difference(found, unmerged.adapted)
        allowed = tolerance_for(chosen, base_difference)
        merged = Merged(output, chosen, num_modules, difference, allowed, base_difference, effect)
        say(described(merged))
        _check(merged, found - rounded, unmerged.adapted - unmerged.alone)
        _finish_files(temporary)
    return merged


@torch.no_grad()
def fold(model: PreTrainedModel, layers: dict[str, LoraLinear]) -> None:
    """Add every layer's scaling * B·A to its base's weight, in place, and put the base layer back.

    Args: layers: in `model`, by module path; their bases' weights are float32.
    """
    for name, layer in layers.items():
        weight = layer.base.weight
        assert isinstance(weight, Tensor)
        assert weight.dtype == torch.float32
        delta = layer.scaling * (layer.lora_b.float() @ layer.lora_a.float())
        weight += delta.t() if isinstance(layer.base, Conv1D) else delta
        model.set_submodule(name, layer.base)


def files_dtype(folder: Path) -> Dtype:
    """Return the dtype that most numbers of a model folder's weights have.

    Raises: ConfigError: it is none that a model is merged in.
    """
    counts: Counter[str] = Counter()
    for _, tensor in base_tensors(folder):
        counts[tensor.dtype] += tensor.num_bytes
    ((most, _),) = counts.most_common(1) or [("nothing", 0)]
    if most not in _DTYPES:
        raise ConfigError(
            f"dtype: auto, but most weights of {folder} are {most}, one of {', '.join(_DTYPES)} "
            f"is expected; name one of {', '.join(_DTYPES.values())}"
        )
    return _DTYPES[most]


def described(merged: Merged) -> str:
    """Return what was measured, in a line."""
    found, allowed, base = merged.difference, merged.tolerance, merged.base_difference
    alone = (
        "" if base is None else f"; {merged.dtype} changes the base model's by mean {base.mean:.2g}"
    )
    return (
        f"{merged.output}: log-probs differ from the unmerged model's by mean {found.mean:.2g} "
        f"(allowed: {allowed.mean:.2g}), largest {found.largest:.2g} (allowed: "
        f"{allowed.largest:.2g}); the adapter changes them by mean {merged.effect.mean:.2g}{alone}"
    )


def _check_pair(artifact: AdapterArtifact, base_folder: Path, base_name: str) -> None:
    """Refuse what shows before any weight is loaded."""
    others = [name for name, module in artifact.modules.items() if module.kind != "linear"]
    if others:
        raise AdapterMismatchError(
            f"{artifact.folder}: adapts the embedding {', '.join(others)}, adapters of linear "
            "layers are merged; serve this one beside its base model"
        )
    check_base(artifact.folder, base_folder, base_name)
    path = base_folder / _CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: not readable as JSON ({error})") from error
    if isinstance(config, dict) and config.get("quantization_config"):
        raise BaseModelError(
            f"{path}: the base model is quantised, a sum of weights needs them in 16 or 32 bits; "
            "name the model that it was made from"
        )


def _write(
    folder: Path,
    model: PreTrainedModel,
    artifact: AdapterArtifact,
    *,
    base_folder: Path,
    dtype: Dtype,
) -> None:
    """Write the model's folder, all but its weights as in the base model's."""
    rounded: Any = nn.Module.to(model, getattr(torch, dtype))  # one parameter after the other
    if (base_folder / _GENERATION_FILE).exists():
        # Copied below: transformers refuses to write some settings that it reads.
        rounded.generation_config = GenerationConfig()
    try:
        rounded.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, for one
        raise TrainingError(f"{folder.parent}: the model can not be written ({error})") from error
    for pattern in _COPIED:
        for path in base_folder.glob(pattern):
            if path.is_file():
                target = folder / path.relative_to(base_folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    template = read_chat_template(artifact.folder)
    if template is not None:
        # transformers takes this file before a template in tokenizer_config.json.
        (folder / CHAT_TEMPLATE_FILE).write_bytes(template)


def _look_unmerged(
    model: PreTrainedModel, layers: dict[str, LoraLinear], texts: Sequence[Sequence[int]]
) -> _Unmerged:
    adapted = _log_probs(model, texts)
    tokens = [log_probs.topk(_NUM_LIKELIEST).indices for log_probs in adapted]
    with adapters_off(layers):
        alone = _log_probs(model, texts)
    at = torch.cat(tokens)
    return _Unmerged(texts, at, torch.cat(adapted).gather(1, at), torch.cat(alone).gather(1, at))


def _look(folder: Path, name: str, dtype: Dtype, unmerged: _Unmerged) -> Tensor:
    """Load a model folder in `dtype` and return its log-probs of the tokens to look at."""
    model = load_base(name, folder, dtype=dtype).model
    return torch.cat(_log_probs(model, unmerged.texts)).gather(1, unmerged.tokens)


@torch.no_grad()
def _log_probs(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return [tokens, vocabulary], float32, on the CPU, for each text."""
    found = []
    for text in texts:
        logits = model(torch.tensor([text], device=model.device)).logits[0]
        found.append(logits.float().log_softmax(-1).cpu())
    return found


def _difference(log_probs: Tensor, expected: Tensor) -> Difference:
    distance = (log_probs - expected).abs()
    return Difference(float(distance.mean()), float(distance.max()))


def _check(merged: Merged, change: Tensor, effect: Tensor) -> None:
    """Refuse a merged model that is not the unmerged one, or that is the base model.

    Args:
        change: of log-probs by merging, both sides in the dtype of the merged model.
        effect: of the adapter on them, both sides in float32.
    """
    difference, allowed = merged.difference, merged.tolerance
    if not allowed.allows(difference):
        wider = "" if merged.dtype == "float32" else "; try --dtype float32"
        raise TrainingError(
            f"{merged.output}: merged log-probs in {merged.dtype} differ by mean "
            f"{difference.mean:.2g}, largest {difference.largest:.2g} from the unmerged model's, "
            f"at most mean {allowed.mean:.2g}, largest {allowed.largest:.2g} is expected; nothing "
            f"is kept{wider}"
        )
    # Rounding is not along the adapter's effect, so that this tells them apart also below it.
    if not (change - effect).square().mean() < change.square().mean():
        raise TrainingError(
            f"{merged.output}: the merged model is nearer to the base model than to the adapter, "
            f"whose effect of mean {merged.effect.mean:.2g} {merged.dtype} rounds away; nothing is "
            "kept; merge it with --dtype float32, or serve it beside its base model"
        )


def _finish_files(folder: Path) -> None:
    """Let who may read config.json read the weights, and wait until the disk has all of it."""
    mode = (folder / _CONFIG_FILE).stat().st_mode  # safetensors lets the owner alone
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
