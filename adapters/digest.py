"""The two digests of an adapter: of its weights and of a version of it.

docs/format.md, "Digests", is the specification.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from adapters.artifact import CHAT_TEMPLATE_FILE, PROVENANCE_FILE, AdapterArtifact
from adapters.errors import ArtifactError
from adapters.scaling import module_alpha


def weights_digest(artifact: AdapterArtifact) -> str:
    r"""Return the hexadecimal sha256 of all that decides what the adapter computes.

    sha256("rora-weights-1\n" + C + "\n" + T_1 + ... + T_n) where C is the canonical JSON of the
    weight-bearing configuration, its patterns resolved to module paths, and T_i, tensors sorted by
    name, is the canonical JSON of [name, dtype, shape], "\n", and the tensor's bytes.

    The same for the same content however its JSON or tensors are ordered; the model's path and
    PEFT's version are not part of it.
    Cost: reads every tensor once.
    """
    digest = hashlib.sha256(b"rora-weights-1\n")
    digest.update(canonical_json(_weight_bearing(artifact)) + b"\n")
    chunks: dict[str, tuple[bytes, Any]] = {}
    for module, lora_a, lora_b in artifact.read_tensors():
        for tensor, array in ((module.lora_a, lora_a), (module.lora_b, lora_b)):
            described = canonical_json([tensor.name, tensor.dtype, list(tensor.shape)])
            chunks[tensor.name] = (described, array)
    for name in sorted(chunks):
        described, array = chunks[name]
        digest.update(described + b"\n")
        digest.update(array.tobytes())
    return digest.hexdigest()


def version_digest(weights: str, folder: Path) -> str:
    r"""Return the hexadecimal sha256 that names a version: weights, chat template and probe.

    sha256("rora-version-1\n" + weights + "\n" + sha256(chat template or "") + "\n" + P) where P is
    the canonical JSON of the probe in rora.json, or "null".
    """
    template = folder / CHAT_TEMPLATE_FILE
    template_bytes = template.read_bytes() if template.exists() else b""
    digest = hashlib.sha256(b"rora-version-1\n")
    digest.update(f"{weights}\n{hashlib.sha256(template_bytes).hexdigest()}\n".encode())
    try:
        digest.update(canonical_json(read_provenance(folder).get("probe")))
    except ValueError as error:  # NaN, or text that is no UTF-8
        raise ArtifactError(
            f"{folder / PROVENANCE_FILE}: probe is not plain JSON ({error})"
        ) from error
    return digest.hexdigest()


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the content of rora.json, or nothing for an adapter that another tool made."""
    path = folder / PROVENANCE_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: holds a {type(content).__name__}, a JSON object is expected")
    return content


def _weight_bearing(artifact: AdapterArtifact) -> dict[str, Any]:
    """Return what the configuration says about this adapter's modules, however it says it.

    The first pattern that matches counts, so neither a pattern's spelling nor the order of its keys
    may stand here: each module's own rank and alpha do.
    """
    config = artifact.config
    alphas = {name: module_alpha(config, name) for name in artifact.modules}
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


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys and without spaces, in UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
