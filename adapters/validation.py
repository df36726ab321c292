"""Rules on the numbers in an adapter's factors; names and shapes are adapters/artifact.py's."""

import numpy as np

from adapters.artifact import AdapterArtifact, Array, LoraModule
from adapters.errors import ArtifactError

# Far above what training gives (hundreds), far below what overflows float32 on its way through a
# model. Overflow is not the adapter's problem alone: not-a-number in the key-value cache stays in
# its blocks and reaches whoever gets them next.
MAX_DELTA_BOUND = 1e6


def check_values(module: LoraModule, lora_a: Array, lora_b: Array) -> None:
    """Refuse factors that can not be the outcome of training.

    Args:
        module: whose factors they are, with its scaling.
        lora_a: [rank, in_features].
        lora_b: [out_features, rank].
    Raises: ArtifactError: NaN or infinity, or scaling * |A| * |B| (Frobenius norms), which bounds
        the delta, above 1e6.
    """
    for side, factor in (("A", lora_a), ("B", lora_b)):
        if not np.isfinite(factor).all():
            raise ArtifactError(
                f"{module.name}: lora_{side} holds NaN or infinity, finite numbers are expected; "
                "train again with a lower learning rate"
            )
    norms = [float(np.linalg.norm(factor.astype(np.float64))) for factor in (lora_a, lora_b)]
    bound = module.scaling * norms[0] * norms[1]
    if not bound <= MAX_DELTA_BOUND:
        raise ArtifactError(
            f"{module.name}: scaling * |A| * |B| is {bound:.3g}, at most {MAX_DELTA_BOUND:g} is "
            "expected; check lora_alpha and train again"
        )


def check_artifact_values(artifact: AdapterArtifact) -> None:
    """Refuse an adapter whose numbers can not be served, or that does nothing.

    Raises: ArtifactError: as in `check_values`, or every lora_B is zero.
    Cost: reads every tensor once.
    """
    is_dead = True
    for module, lora_a, lora_b in artifact.read_tensors():
        check_values(module, lora_a, lora_b)
        is_dead = is_dead and not (lora_a.any() and lora_b.any())
    if is_dead:
        raise ArtifactError(
            f"{artifact.folder}: every delta is zero, so that it would answer as the base model; "
            "train it before you store it"
        )
