"""AdapterArtifact: an adapter folder that keeps its rules, with tensors read on demand.

Owns the pairing of tensors to modules and the reading of their bytes. Files are read with checked
lengths, never mapped: a mapped file that somebody truncates kills the process that reads it.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adapters.config import CONFIG_FILE, AdapterConfig, read_config
from adapters.errors import ArtifactError, RankMismatchError
from adapters.header import TensorInfo, read_header
from adapters.scaling import module_rank, module_scaling

WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "rora.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# Every file that belongs to an adapter; others in the folder are none of our business.
ADAPTER_FILES = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    PROVENANCE_FILE,
    CHAT_TEMPLATE_FILE,
    "README.md",
    "report.html",
)
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?P<factor>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)"
)

Array = NDArray[Any]


@dataclass(frozen=True)
class LoraModule:
    """One module's pair of factors: scaling * B @ A is what the adapter adds to its weight.

    Args:
        name: path of the module in the Hugging Face model, without PEFT's prefix.
        kind: "linear", or "embedding" for lora_embedding_A and lora_embedding_B.
        rank, scaling: of this module, by the configuration's patterns.
        lora_a: [rank, in_features] (embeddings: [rank, vocabulary]).
        lora_b: [out_features, rank] (embeddings: [hidden, rank]).
    """

    name: str
    kind: Literal["linear", "embedding"]
    rank: int
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


@dataclass(frozen=True)
class AdapterArtifact:
    """An adapter folder whose configuration and tensors agree."""

    folder: Path
    config: AdapterConfig
    modules: Mapping[str, LoraModule]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(m.lora_a.num_bytes + m.lora_b.num_bytes for m in self.modules.values())

    def read_tensors(self) -> Iterator[tuple[LoraModule, Array, Array]]:
        """Yield every module with its A and B, as stored, in the order of the file.

        Returns: per module, A [rank, in_features] and B [out_features, rank] in their stored dtype
            (float32, float16, or ml_dtypes' bfloat16), new.
        Raises: ArtifactError: the file became shorter than its header said.
        Cost: one open, one read per tensor.
        """
        path = self.folder / WEIGHTS_FILE
        with path.open("rb", buffering=0) as file:
            for module in sorted(self.modules.values(), key=lambda m: m.lora_a.start):
                yield (
                    module,
                    _read_tensor(file.fileno(), module.lora_a, path),
                    _read_tensor(file.fileno(), module.lora_b, path),
                )


def open_artifact(folder: Path) -> AdapterArtifact:
    """Read the configuration and the header of an adapter folder and check that they agree.

    Raises:
        AdapterConfigError, ArtifactHeaderError: one of the two files is wrong by itself.
        RankMismatchError: a tensor's rank is not the one that the configuration declares.
        ArtifactError: a tensor that is no LoRA factor, or whose partner is missing; all are named.
    Cost: two files, no tensor.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ArtifactError(
            f"{folder}: weights in adapter_model.bin, a pickle, {WEIGHTS_FILE} is expected; "
            "save the adapter again with safe_serialization"
        )
    tensors = read_header(path)
    factors: dict[tuple[str, str], dict[str, TensorInfo]] = {}
    problems = []
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMPY_DTYPES:
            problems.append(
                f"tensor {name!r} is {tensor.dtype}, one of {', '.join(NUMPY_DTYPES)} is expected"
            )
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            problems.append(
                f"tensor {name!r} is not base_model.model.<module>.lora_A.weight or .lora_B.weight"
            )
            continue
        kind = "embedding" if "embedding" in match["factor"] else "linear"
        side = "B" if "_B" in match["factor"] else "A"
        factors.setdefault((match["module"], kind), {})[side] = tensor
    for (module, kind), sides in factors.items():
        for missing in {"A", "B"} - set(sides):
            problems.append(f"module {module!r} has no lora_{missing}")
        if kind == "embedding" and (module, "linear") in factors:
            problems.append(f"module {module!r} has factors of a linear layer and of an embedding")
        if not config.targets(module):
            problems.append(
                f"module {module!r} is not in target_modules, so that PEFT would leave it out"
            )
    if not tensors:
        problems.append("holds no tensor")
    if problems:
        raise ArtifactError(f"{path}: {'; '.join(problems)}")
    modules = {
        module: _lora_module(module, kind, sides["A"], sides["B"], config=config, path=path)
        for (module, kind), sides in factors.items()
    }
    return AdapterArtifact(folder, config, modules)


def _lora_module(
    name: str,
    kind: str,
    lora_a: TensorInfo,
    lora_b: TensorInfo,
    *,
    config: AdapterConfig,
    path: Path,
) -> LoraModule:
    if len(lora_a.shape) != 2 or len(lora_b.shape) != 2:
        raise ArtifactError(
            f"{path}: {name}: lora_A is {list(lora_a.shape)}, lora_B is {list(lora_b.shape)}; "
            "[rank, in_features] and [out_features, rank] are expected"
        )
    declared, found = module_rank(config, name), lora_a.shape[0]
    if lora_b.shape[1] != found:
        raise RankMismatchError(
            f"{path}: {name}: lora_A is {list(lora_a.shape)} (rank {found}), lora_B is "
            f"{list(lora_b.shape)} (rank {lora_b.shape[1]}); export the adapter again"
        )
    if declared != found:
        raise RankMismatchError(
            f"{path}: {name}: adapter_config.json declares rank {declared}, lora_A is "
            f"{list(lora_a.shape)} (rank {found}); export the adapter again or correct rank_pattern"
        )
    return LoraModule(
        name=name,
        kind="embedding" if kind == "embedding" else "linear",
        rank=found,
        scaling=module_scaling(config, name),
        lora_a=lora_a,
        lora_b=lora_b,
    )


def _read_tensor(descriptor: int, tensor: TensorInfo, path: Path) -> Array:
    array = np.empty(tensor.shape, dtype=NUMPY_DTYPES[tensor.dtype])
    view = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < tensor.num_bytes:
        read = os.preadv(descriptor, [view[done:]], tensor.start + done)
        if read == 0:
            raise ArtifactError(
                f"{path}: tensor {tensor.name!r} ends after {done} of {tensor.num_bytes} bytes; "
                "the file was changed while it was read"
            )
        done += read
    return array
