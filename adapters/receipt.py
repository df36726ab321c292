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
from adapters.digest import base_claim
from adapters.errors import AdapterMismatchError, BaseModelError
from adapters.factors import Delta
from adapters.folder import PROVENANCE_FILE
from adapters.problems import Code, Problem, refusal, shown
from adapters.validation import checked_tensors

# Models whose linear layers store their weight as [in_features, out_features].
_TRANSPOSED = frozenset({"gpt2", "gpt_bigcode", "openai-gpt", "imagegpt", "decision_transformer"})
_EMBEDDINGS = frozenset(
    {"embed_in", "embed_tokens", "shared", "tok_embeddings", "word_embeddings", "wte"}
)
_NOT_LINEAR = _EMBEDDINGS | {"embed_positions", "position_embeddings", "wpe"}
# Files of some models (GPT-2's, Bloom's) leave out the first part of their modules' paths.
_LEFT_OUT = ("transformer", "model")
# What weights of quantised layers are called; their shapes say nothing of the layer's.
_QUANTISED = frozenset({"qweight", "weight_packed"})
_OUTPUT = "lm_head"


@dataclass(frozen=True)
class BaseShapes:
    """What the headers of a base model's files say.

    Args:
        name: what it is called.
        fingerprint: of its weights.
        linear: (out_features, in_features) of every linear layer, by module path; None if it is
            quantised, so that its file does not say.
        embeddings: (vocabulary, hidden) of every embedding, by module path.
        other_names: what it is called too.
    """

    name: str
    fingerprint: str
    linear: Mapping[str, tuple[int, int] | None]
    embeddings: Mapping[str, tuple[int, int]]
    other_names: tuple[str, ...] = ()


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
        folder: of the adapter.
        base: name of the base model.
        base_fingerprint: of its weights.
        is_trained_on_it: whether rora.json names this base; None if it says nothing.
        matched: every module, if all are in the base with these sizes; else none.
        problems: modules that matched nothing or differ in size, and another base.
        untouched: linear layers of the base that the adapter leaves as they are.
    """

    folder: Path
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
            place = f"{self.folder} on base model {self.base}"
            raise refusal(AdapterMismatchError, place, self.problems)


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
    linear: dict[str, tuple[int, int] | None] = {}
    embeddings = {}
    for _, tensor in base_tensors(folder):
        module, dot, parameter = tensor.name.rpartition(".")
        is_packed = parameter == "weight" and tensor.dtype == "U8"  # two numbers of 4 bits a byte
        if dot and (parameter in _QUANTISED or is_packed):
            linear[module] = None
            continue
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

    Cost: reads every tensor once, if every module fits.
    """
    problems: list[Problem] = []
    touched: set[str] = set()
    for module in artifact.modules.values():
        layers = _layers(module, base)
        problem = layer_problem(module.name, _sizes(module), layers, kind=_layer(module))
        path = find_layer(module.name, layers)
        if problem is not None:
            problems.append(problem)
        elif path in touched:
            message = f"is one more module for the base model's {path}, one is expected"
            problems.append(Problem(Code.MODULE_UNMATCHED, module.name, message))
        elif path is not None:
            touched.add(path)
    matched = {}
    if not problems:  # else its numbers say nothing, and may be many
        for module, lora_a, lora_b in checked_tensors(artifact):
            norm = Delta(lora_a, lora_b, module.scaling).norm()
            matched[module.name] = MatchedModule(
                module.name, module.rank, module.scaling, norm, module.num_bytes
            )
    claim = base_claim(artifact.folder)
    names = (base.name, *base.other_names)
    is_trained_on_it = None if claim is None else claim.fingerprint == base.fingerprint
    if claim is not None and claim.is_of_another(base.fingerprint, names):
        message = (
            f"was trained on {shown(claim.name)} with fingerprint {shown(claim.fingerprint)[:12]}, "
            f"this one has {base.fingerprint[:12]}"
        )
        problems.append(Problem(Code.BASE_OTHER, PROVENANCE_FILE, message))
    return Receipt(
        folder=artifact.folder,
        base=base.name,
        base_fingerprint=base.fingerprint,
        is_trained_on_it=is_trained_on_it,
        matched=tuple(matched[name] for name in artifact.modules if name in matched),
        problems=tuple(problems),
        untouched=tuple(name for name in base.linear if name not in touched and name != _OUTPUT),
    )


def find_layer(module: str, layers: Mapping[str, object]) -> str | None:
    """Return the path of a module among the base's layers, or None."""
    if module in layers:
        return module
    first, _, rest = module.partition(".")
    is_left_out = first in _LEFT_OUT and not any(path.startswith(f"{first}.") for path in layers)
    return rest if is_left_out and rest in layers else None


def layer_problem(
    module: str,
    sizes: tuple[int, int],
    layers: Mapping[str, tuple[int, int] | None],
    *,
    kind: str,
) -> Problem | None:
    """Say why a module fits none of the base's layers.

    Args:
        module: path.
        sizes: of the weight that its factors fit.
        layers: sizes of the base's weights of that kind; None if they are not known.
        kind: of layer, in words.
    """
    path = find_layer(module, layers)
    if path is None:
        return Problem(Code.MODULE_UNMATCHED, module, f"matches no {kind} of the base model")
    shape = layers[path]
    if shape is not None and shape != sizes:
        message = f"is for {list(sizes)}, the base model has {list(shape)}"
        return Problem(Code.MODULE_SHAPE, module, message)
    return None


def _layers(module: LoraModule, base: BaseShapes) -> Mapping[str, tuple[int, int] | None]:
    return base.linear if module.kind == "linear" else base.embeddings


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
