"""AdapterArtifact: an adapter folder that keeps its rules, with tensors read on demand.

Owns the pairing of tensors to modules and the rules on their names and shapes.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.config import AdapterConfig, read_config
from adapters.errors import ArtifactError
from adapters.folder import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    MAX_FILE_BYTES,
    PICKLED_WEIGHTS_FILE,
    WEIGHTS_FILE,
)
from adapters.header import TensorInfo, header_of
from adapters.limits import MAX_ADAPTER_BYTES, MAX_READ_RANK
from adapters.problems import Code, Problem, refusal
from adapters.reading import open_regular, reading
from adapters.scaling import ModuleScaling, find_scalings
from adapters.tensors import NUMPY_DTYPES, Array, open_tensors

_MAX_CLASSIFIED = 100  # of the tensors that are no factors; more of them say nothing new
PEFT_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\."
    r"(?P<factor>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)"
)
_FACTOR_SHAPES = "[rank, in_features] and [out_features, rank] are expected"
# What else stands in files that call themselves adapters; the first that matches a name tells.
_OTHER_TENSORS = (
    (
        r".*(/|\\|\.\.).*",
        Code.TENSOR_NAME,
        "a name that climbs like a path, a module's path with dots is expected",
    ),
    (r".*\.lora_magnitude_vector(\..*)?", Code.TENSOR_DORA, "a DoRA magnitude; DoRA is not served"),
    (
        r".*\.modules_to_save\..*",
        Code.TENSOR_SAVED_MODULE,
        "a fully trained module; such modules are not served",
    ),
    (
        r".*\.lora_(A|B|embedding_A|embedding_B)\.(?!weight$|bias$)\w+(\.weight)?",
        Code.TENSOR_ADAPTER_NAME,
        "holds an adapter's name, as a state dict does; save it with PEFT's save_pretrained, or "
        "convert it",
    ),
    (
        r"lora_.*|.*\.lora_(down|up|mid)\..*|.*\.alpha|.*\.lora_[ab]",
        Code.TENSOR_FOREIGN_LAYOUT,
        "is not in PEFT's layout; convert it",
    ),
    (r".*\bbias", Code.TENSOR_BIAS, "a bias; adapters with biases are not served"),
    (
        r".*\.base_layer\.weight|.*\b(embed_tokens|lm_head|wte|wpe|embed_in|embed_out|word_embeddings|embeddings?)\.weight",
        Code.TENSOR_BASE_WEIGHT,
        "a full weight of the base model, which PEFT saves beside LoRA when the vocabulary grew; "
        "train on the base's own vocabulary, or save with save_embedding_layers=False",
    ),
)

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module's pair of factors: scaling * B @ A is what the adapter adds to its weight.

    Args:
        name: path of the module in the Hugging Face model, without PEFT's prefix.
        kind: "linear", or "embedding" for lora_embedding_A and lora_embedding_B.
        rank, alpha, scaling: of this module, by the configuration's patterns.
        lora_a: [rank, in_features] (embeddings: [rank, vocabulary]).
        lora_b: [out_features, rank] (embeddings: [hidden, rank]).
    """

    name: str
    kind: Kind
    rank: int
    alpha: float
    scaling: float
    lora_a: TensorInfo
    lora_b: TensorInfo

    @property
    def in_features(self) -> int:
        """Columns of A."""
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of B."""
        return self.lora_b.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors."""
        return self.lora_a.num_bytes + self.lora_b.num_bytes


def served_dtype(modules: Iterable[LoraModule]) -> str:
    """Return the dtype that an adapter is served in: its own, or float32 if it has several.

    Float32 holds the numbers of both others exactly.
    """
    dtypes = {tensor.dtype for m in modules for tensor in (m.lora_a, m.lora_b)}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


@dataclass(frozen=True)
class AdapterArtifact:
    """An adapter folder whose configuration and tensors agree."""

    folder: Path
    config: AdapterConfig
    modules: Mapping[str, LoraModule]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(module.num_bytes for module in self.modules.values())

    @property
    def num_bytes_served(self) -> int:
        """Bytes of all tensors where the adapter is served, which is in one dtype."""
        dtype = served_dtype(self.modules.values())
        tensors = (t for m in self.modules.values() for t in (m.lora_a, m.lora_b))
        itemsize = NUMPY_DTYPES[dtype].itemsize
        return sum(math.prod(tensor.shape) * itemsize for tensor in tensors)

    @property
    def weights_path(self) -> Path:
        """The file of the tensors."""
        return self.folder / WEIGHTS_FILE

    @property
    def tensors(self) -> list[tuple[LoraModule, TensorInfo]]:
        """Every tensor with its module, sorted by name."""
        pairs = [(m, tensor) for m in self.modules.values() for tensor in (m.lora_a, m.lora_b)]
        return sorted(pairs, key=lambda pair: pair[1].name)

    def read_tensors(self) -> Iterator[tuple[LoraModule, Array, Array]]:
        """Yield every module with its A and B, as stored, in the order of the file.

        Returns: per module, A [rank, in_features] and B [out_features, rank] in their stored dtype
            (float32, float16, or ml_dtypes' bfloat16), new.
        Raises: ArtifactError: the file became shorter than its header said, or was replaced by
            something else.
        Cost: one open, one read per tensor.
        """
        with open_tensors(self.weights_path) as file:
            for module in sorted(self.modules.values(), key=lambda m: m.lora_a.start):
                yield module, file.read(module.lora_a), file.read(module.lora_b)

    def read_chunks(self) -> Iterator[tuple[LoraModule, TensorInfo, Iterator[memoryview]]]:
        """Yield every tensor, sorted by name, with an iterator over its bytes.

        Each view, of at most 1 MiB, is gone with the next. Raises: as `read_tensors`.
        """
        with open_tensors(self.weights_path) as file:
            for module, tensor in self.tensors:
                yield module, tensor, file.chunks(tensor)


def open_artifact(folder: Path) -> AdapterArtifact:
    """Read the configuration and the header of an adapter folder and check that they agree.

    Raises: ArtifactError: every broken rule that shows without reading a tensor, with its code.
    Cost: every file is opened; configuration, header and template are read, no tensor.
    """
    artifact, problems = read_folder(folder)
    if problems or artifact is None:
        raise refusal(ArtifactError, folder, problems)
    return artifact


def read_folder(folder: Path) -> tuple[AdapterArtifact | None, list[Problem]]:
    """Return the adapter in `folder`, if there is enough of it, and every broken rule.

    Cost: as `open_artifact`.
    """
    if not os.path.isdir(folder):  # noqa: PTH112  (Path.is_dir raises for names too long)
        message = "no such folder, an adapter folder written by rora-train or PEFT is expected"
        return None, [Problem(Code.FOLDER_MISSING, folder.name or str(folder), message)]
    problems: list[Problem] = []
    config: AdapterConfig | None = None
    try:
        config, found = read_config(folder)
        problems += found
    except FileNotFoundError:
        message = f"no {CONFIG_FILE}, an adapter folder holds one; name the folder that PEFT wrote"
        problems.append(Problem(Code.CONFIG_MISSING, CONFIG_FILE, message))
    except ArtifactError as error:
        problems += error.problems
    tensors: dict[str, TensorInfo] | None = None
    path = folder / WEIGHTS_FILE
    try:
        with open_regular(path, max_bytes=MAX_ADAPTER_BYTES) as file, reading(path):
            tensors = header_of(file, path)
    except FileNotFoundError:
        problems.append(_missing_weights(folder))
    except ArtifactError as error:
        problems += error.problems
    problems += _small_file_problems(folder)
    if tensors is None:
        return None, problems
    factors, found = _pair(tensors)
    problems += found
    modules, found = _modules(config, factors)
    # Without a configuration the factors can still be looked at; the problems say what is missing.
    return AdapterArtifact(folder, config or _NO_CONFIG, modules), [*problems, *found]


def _missing_weights(folder: Path) -> Problem:
    # Not opened: a pickle runs code of whoever made it.
    if os.path.lexists(folder / PICKLED_WEIGHTS_FILE):
        message = f"a pickle, {WEIGHTS_FILE} is expected; save it again with safe_serialization"
        return Problem(Code.WEIGHTS_PICKLE, PICKLED_WEIGHTS_FILE, message)
    message = f"no {WEIGHTS_FILE}, an adapter folder holds one; name the folder that PEFT wrote"
    return Problem(Code.WEIGHTS_MISSING, WEIGHTS_FILE, message)


def _small_file_problems(folder: Path) -> list[Problem]:
    """Check the kind and size of the files that are read later, and that the template is text."""
    problems = []
    for name, max_bytes in MAX_FILE_BYTES.items():
        if name in (CONFIG_FILE, WEIGHTS_FILE):
            continue
        try:
            path = folder / name
            with open_regular(path, max_bytes=max_bytes) as file, reading(path):
                if name == CHAT_TEMPLATE_FILE:
                    file.read().decode("utf-8")
        except FileNotFoundError:
            pass
        except UnicodeDecodeError as error:
            message = f"not UTF-8 ({error.reason} at byte {error.start}); write it again"
            problems.append(Problem(Code.TEMPLATE_NOT_TEXT, name, message))
        except ArtifactError as error:
            problems += error.problems
    return problems


_Factors = dict[tuple[str, Kind], dict[str, TensorInfo]]


def _pair(tensors: Mapping[str, TensorInfo]) -> tuple[_Factors, list[Problem]]:
    """Return the factors by module and kind, and name every tensor that is none."""
    problems: list[Problem] = []
    num_others = 0
    factors: _Factors = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            num_others += 1
            if num_others <= _MAX_CLASSIFIED:
                problems.append(_other_tensor(name))
            continue
        if tensor.dtype not in NUMPY_DTYPES:
            message = f"is {tensor.dtype}, one of {', '.join(NUMPY_DTYPES)} is expected"
            problems.append(Problem(Code.FACTOR_DTYPE, name, message))
        kind: Kind = "embedding" if "embedding" in match["factor"] else "linear"
        side = "B" if "_B" in match["factor"] else "A"
        factors.setdefault((match["module"], kind), {})[side] = tensor
    if num_others > _MAX_CLASSIFIED:
        message = f"{num_others - _MAX_CLASSIFIED} more tensors are no factors of LoRA"
        problems.append(Problem(Code.TENSOR_UNKNOWN, WEIGHTS_FILE, message))
    if not tensors:
        message = "holds no tensor, factors A and B are expected; export the adapter again"
        problems.append(Problem(Code.TENSORS_NONE, WEIGHTS_FILE, message))
    return factors, problems


def _other_tensor(name: str) -> Problem:
    for pattern, code, message in _OTHER_TENSORS:
        if re.fullmatch(pattern, name):
            return Problem(code, name, message)
    message = (
        "no factor of LoRA, base_model.model.<module>.lora_A.weight or .lora_B.weight is expected"
    )
    return Problem(Code.TENSOR_UNKNOWN, name, message)


def _modules(
    config: AdapterConfig | None, factors: _Factors
) -> tuple[dict[str, LoraModule], list[Problem]]:
    """Return the modules that have both factors, and say what is wrong with any."""
    names = list(dict.fromkeys(module for module, _ in factors))
    scalings: dict[str, ModuleScaling] = {}
    problems: list[Problem] = []
    untargeted: set[str] = set()
    if config is not None:
        scalings, problems = find_scalings(config, names)
        try:
            untargeted = set(names) - config.targets(names)
        except ArtifactError as error:
            problems += error.problems
    modules = {}
    for (name, kind), sides in factors.items():
        if name in untargeted:
            message = "is not in target_modules, so that PEFT would leave it out"
            problems.append(Problem(Code.TARGET_MISSING, name, message))
        if kind == "embedding" and (name, "linear") in factors:
            message = "has factors of a linear layer and of an embedding, one kind is expected"
            problems.append(Problem(Code.FACTOR_KINDS, name, message))
        missing = {"A", "B"} - set(sides)
        if missing:
            message = f"has no lora_{missing.pop()}, both factors are expected"
            problems.append(Problem(Code.FACTOR_MISSING, name, message))
            continue
        problem = _shape_problem(name, sides["A"], sides["B"], scalings.get(name))
        if problem is not None:
            problems.append(problem)
        elif all(tensor.dtype in NUMPY_DTYPES for tensor in sides.values()):
            scaling = scalings.get(name, ModuleScaling(sides["A"].shape[0], 1.0, 1.0))
            modules[name] = LoraModule(
                name, kind, scaling.rank, scaling.alpha, scaling.scaling, sides["A"], sides["B"]
            )
    return modules, problems


# Stands for a configuration that can not be read; what it scales has a scaling of 1.
_NO_CONFIG = AdapterConfig(rank=1, lora_alpha=1.0)


def _shape_problem(
    name: str, lora_a: TensorInfo, lora_b: TensorInfo, scaling: ModuleScaling | None
) -> Problem | None:
    a, b = list(lora_a.shape), list(lora_b.shape)
    if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
        return Problem(Code.FACTOR_SHAPE, name, f"lora_A is {a}, lora_B is {b}; {_FACTOR_SHAPES}")
    if b[1] != a[0]:
        message = (
            f"lora_A is {a} (rank {a[0]}), lora_B is {b} (rank {b[1]}); export the adapter again"
        )
        return Problem(Code.RANK_FACTORS, name, message)
    if scaling is not None and scaling.rank != a[0]:
        message = (
            f"adapter_config.json declares rank {scaling.rank}, lora_A is {a} (rank {a[0]}); "
            "export the adapter again or correct rank_pattern"
        )
        return Problem(Code.RANK_CONFIG, name, message)
    if a[0] > MAX_READ_RANK:
        message = f"rank {a[0]}, at most {MAX_READ_RANK} is read"
        return Problem(Code.RANK_TOO_LARGE, name, message)
    return None
