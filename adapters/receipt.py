"""The receipt: what an adapter matches in a base model, said before anything is served.

Reads the base's config.json and the headers of its weights; no weight is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.artifact import AdapterArtifact, LoraModule
from adapters.base_model import base_tensors, fingerprint
from adapters.digest import read_provenance
from adapters.errors import AdapterMismatchError, BaseModelError
from adapters.factors import Delta
from adapters.folder import PROVENANCE_FILE
from adapters.problems import Code, Problem, refusal, shown

# Models whose linear layers store their weight as [in_features, out_features].
_TRANSPOSED = frozenset({"gpt2", "gpt_bigcode", "openai-gpt", "imagegpt", "decision_transformer"})
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"})
_NOT_LINEAR = _EMBEDDINGS | {"wpe"}
_OUTPUT = "lm_head"


@dataclass(frozen=True)
class BaseShapes:
    """What the headers of a base model's files say.

    Args:
        name: what it is called.
        fingerprint: of its weights.
        linear: (out_features, in_features) of every linear layer, by module path.
        embeddings: (vocabulary, hidden) of every embedding, by module path.
    """

    name: str
    fingerprint: str
    linear: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class MatchedModule:
    """A module of the adapter that the base model has.

    Args:
        name: module path.
        rank, scaling: of the module.
        norm: Frobenius norm of scaling * B @ A.
        num_bytes: of both factors.
    """

    name: str
    rank: int
    scaling: float
    norm: float
    num_bytes: int


@dataclass(frozen=True)
class Receipt:
    """What an adapter matches in a base model.

    Args:
        base: name of the base model.
        base_fingerprint: of its weights.
        is_trained_on_it: whether rora.json names this base; None if it says nothing.
        matched: modules that the base has, with these sizes.
        problems: modules that matched nothing or differ in size, and another base.
        untouched: linear layers of the base that the adapter leaves as they are.
    """

    base: str
    base_fingerprint: str
    is_trained_on_it: bool | None
    matched: tuple[MatchedModule, ...]
    problems: tuple[Problem, ...]
    untouched: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors that matched."""
        return sum(module.num_bytes for module in self.matched)

    def check(self) -> None:
        """Refuse an adapter of which anything does not fit.

        Raises: AdapterMismatchError: every module that does not, or another base.
        """
        if self.problems:
            raise refusal(AdapterMismatchError, f"on base model {self.base}", self.problems)


def read_base_shapes(folder: Path, *, name: str) -> BaseShapes:
    """Return the layers of a Hugging Face model folder from its config.json and headers.

    Args:
        folder: of the model.
        name: what the model is called, as adapters.base_model.model_name gives it.
    Raises: BaseModelError: a file that can not be read, or no weights.
    Cost: the headers, and 4 KiB of each tensor for the fingerprint.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{folder / 'config.json'}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{folder / 'config.json'}: a JSON object is expected")
    linear, embeddings = {}, {}
    for _, tensor in base_tensors(folder):
        module, dot, parameter = tensor.name.rpartition(".")
        if parameter != "weight" or not dot or len(tensor.shape) != 2:
            continue
        shape = (tensor.shape[0], tensor.shape[1])
        last = module.rpartition(".")[2]
        if last in _EMBEDDINGS:
            embeddings[module] = shape
        elif last not in _NOT_LINEAR:
            is_transposed = config.get("model_type") in _TRANSPOSED and last != _OUTPUT
            linear[module] = (shape[1], shape[0]) if is_transposed else shape
    if not linear:
        raise BaseModelError(f"{folder}: no linear layer in its weights; name a language model")
    if config.get("tie_word_embeddings") and _OUTPUT not in linear and len(embeddings) == 1:
        linear[_OUTPUT] = next(iter(embeddings.values()))
    return BaseShapes(name, fingerprint(folder), linear, embeddings)


def receipt(artifact: AdapterArtifact, base: BaseShapes) -> Receipt:
    """Return what `artifact` matches in `base`.

    Cost: reads every tensor once.
    """
    matched: dict[str, MatchedModule] = {}
    problems: list[Problem] = []
    touched = set()
    for module, lora_a, lora_b in artifact.read_tensors():
        path, shape = _find(module, base)
        if shape is None or path is None:
            message = f"matches no {_layer(module)} of the base model"
            problems.append(Problem(Code.MODULE_UNMATCHED, module.name, message))
        elif shape != _sizes(module):
            message = f"is for {list(_sizes(module))}, the base model has {list(shape)}"
            problems.append(Problem(Code.MODULE_SHAPE, module.name, message))
        else:
            touched.add(path)
            norm = Delta(lora_a, lora_b, module.scaling).norm()
            matched[module.name] = MatchedModule(
                module.name, module.rank, module.scaling, norm, module.num_bytes
            )
    claim = read_provenance(artifact.folder).get("base_model")
    claim = claim if isinstance(claim, dict) else {}
    trained_on = claim.get("fingerprint")
    is_trained_on_it = None if trained_on is None else trained_on == base.fingerprint
    # A base in another form, as another dtype, has other weights and the same name.
    if is_trained_on_it is False and claim.get("name") != base.name:
        message = (
            f"was trained on {shown(claim.get('name'))} with fingerprint "
            f"{shown(trained_on)[:12]}, this one has {base.fingerprint[:12]}"
        )
        problems.append(Problem(Code.BASE_OTHER, PROVENANCE_FILE, message))
    return Receipt(
        base=base.name,
        base_fingerprint=base.fingerprint,
        is_trained_on_it=is_trained_on_it,
        matched=tuple(matched[name] for name in artifact.modules if name in matched),
        problems=tuple(problems),
        untouched=tuple(name for name in base.linear if name not in touched and name != _OUTPUT),
    )


def _find(module: LoraModule, base: BaseShapes) -> tuple[str | None, tuple[int, int] | None]:
    """Return the base's path and shape of a module.

    Files of some models (GPT-2's) leave out the first part of their modules' paths.
    """
    layers = base.linear if module.kind == "linear" else base.embeddings
    for path in (module.name, module.name.partition(".")[2]):
        if path in layers:
            return path, layers[path]
    return None, None


def _sizes(module: LoraModule) -> tuple[int, int]:
    """Return the shape of the weight that the factors fit."""
    if module.kind == "linear":
        return (module.out_features, module.in_features)
    return (module.in_features, module.out_features)


def _layer(module: LoraModule) -> str:
    return "linear layer" if module.kind == "linear" else "embedding"


def to_json(found: Receipt) -> dict[str, Any]:
    """Return a receipt as JSON has it."""
    return {
        "base": found.base,
        "base_fingerprint": found.base_fingerprint,
        "is_trained_on_it": found.is_trained_on_it,
        "matched": [vars(module) for module in found.matched],
        "problems": [vars(problem) for problem in found.problems],
        "untouched": list(found.untouched),
        "num_bytes": found.num_bytes,
    }
