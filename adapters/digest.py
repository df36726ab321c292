"""The two digests of an adapter: of its weights and of a version of it.

docs/format.md, "Digests", is the specification.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import numpy as np

from adapters.artifact import AdapterArtifact, LoraModule
from adapters.errors import ArtifactError
from adapters.folder import CHAT_TEMPLATE_FILE, PROVENANCE_FILE
from adapters.header import TensorInfo
from adapters.limits import MAX_TEMPLATE_BYTES
from adapters.reading import open_regular, read_json_file, reading
from adapters.tensors import Array, open_tensors

CHANGED = "differs from what was stored; add the adapter again"


def weights_digest(artifact: AdapterArtifact) -> str:
    r"""Return the hexadecimal sha256 of all that decides what the adapter computes.

    sha256("rora-weights-1\n" + C + "\n" + T_1 + ... + T_n) where C is the canonical JSON of the
    weight-bearing configuration, its patterns resolved to module paths, and T_i, tensors sorted by
    name, is the canonical JSON of [name, dtype, shape], "\n", and the tensor's bytes.

    The same for the same content however its JSON or tensors are ordered; the model's path and
    PEFT's version are not part of it.
    Raises: ArtifactError: the file changed while it was read.
    Cost: reads every tensor once, 1 MiB at a time.
    """
    digest = _digest_of_config(artifact)
    for _, tensor, chunks in artifact.read_chunks():
        digest.update(_head(tensor))
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest()


def read_verified(
    artifact: AdapterArtifact, expected: str
) -> Iterator[tuple[LoraModule, TensorInfo, Array]]:
    """Yield every tensor as stored, and see at the end that they had the expected weights digest.

    What was yielded may be used only after the last one.
    Raises: ArtifactError: as `weights_digest`, or they have another digest.
    Cost: reads every tensor once.
    """
    digest = _digest_of_config(artifact)
    with open_tensors(artifact.weights_path) as file:
        tensors = artifact.tensors
        arrays = file.read_all([tensor for _, tensor in tensors])
        for (module, tensor), array in zip(tensors, arrays, strict=True):
            digest.update(_head(tensor))
            digest.update(array.reshape(-1).view(np.uint8).data)
            yield module, tensor, array
    if digest.hexdigest() != expected:
        raise ArtifactError(f"{artifact.folder}: {CHANGED}")


def _digest_of_config(artifact: AdapterArtifact) -> "hashlib._Hash":
    digest = hashlib.sha256(b"rora-weights-1\n")
    digest.update(canonical_json(_weight_bearing(artifact)) + b"\n")
    return digest


def _head(tensor: TensorInfo) -> bytes:
    """Return canonical JSON of name, dtype and shape, and a line's end; hundreds of an adapter."""
    name, dtype = map(encode_basestring, (tensor.name, tensor.dtype))
    return f"[{name},{dtype},[{','.join(map(str, tensor.shape))}]]\n".encode()


def version_digest(weights: str, folder: Path) -> str:
    r"""Return the hexadecimal sha256 that names a version: weights, chat template and probe.

    sha256("rora-version-1\n" + weights + "\n" + sha256(chat template or "") + "\n" + P) where P is
    the canonical JSON of the probe in rora.json, or "null".

    Raises: ArtifactError: a file that is not what it should be.
    """
    template = hashlib.sha256(read_chat_template(folder) or b"").hexdigest()
    probe = canonical_json(read_provenance(folder).get("probe"))
    return hashlib.sha256(
        b"rora-version-1\n" + f"{weights}\n{template}\n".encode() + probe
    ).hexdigest()


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the content of rora.json, or nothing for an adapter that another tool made.

    Raises: ArtifactError: it is no JSON object within limits.
    """
    try:
        return read_json_file(folder / PROVENANCE_FILE)
    except FileNotFoundError:
        return {}


@dataclass(frozen=True)
class BaseClaim:
    """What rora.json says of the base model that the adapter was trained on."""

    name: object
    fingerprint: object

    def is_of_another(self, fingerprint: str, names: Sequence[str]) -> bool:
        """Tell whether it was another model than the one with this fingerprint and these names.

        A base in another form, as another dtype, has other weights and the same name.
        """
        return self.fingerprint != fingerprint and self.name not in names


def base_claim(folder: Path) -> BaseClaim | None:
    """Return what an adapter says of its base model, or None if it says nothing of its weights.

    Raises: ArtifactError: as `read_provenance`.
    """
    claim = read_provenance(folder).get("base_model")
    if not isinstance(claim, dict) or claim.get("fingerprint") is None:
        return None
    return BaseClaim(claim.get("name"), claim["fingerprint"])


def read_chat_template(folder: Path) -> bytes | None:
    """Return the adapter's own chat template, or None.

    Raises: ArtifactError: it is no file within limits.
    """
    path = folder / CHAT_TEMPLATE_FILE
    try:
        with open_regular(path, max_bytes=MAX_TEMPLATE_BYTES) as file, reading(path):
            return file.read()
    except FileNotFoundError:
        return None


def _weight_bearing(artifact: AdapterArtifact) -> dict[str, Any]:
    """Return what the configuration says about this adapter's modules, however it says it.

    The first pattern that matches counts, so neither a pattern's spelling nor the order of its keys
    may stand here: each module's own rank and alpha do.
    """
    config = artifact.config
    alphas = {name: module.alpha for name, module in artifact.modules.items()}
    targets = config.target_modules
    return {
        "alpha_pattern": {n: a for n, a in alphas.items() if a != float(config.lora_alpha)},
        "bias": "none",
        "lora_alpha": float(config.lora_alpha),
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {
            name: module.rank
            for name, module in artifact.modules.items()
            if module.rank != config.rank
        },
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": config.use_rslora,
    }


_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys and without spaces, in UTF-8."""
    return _ENCODER.encode(value).encode()
