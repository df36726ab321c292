"""What is found out of an adapter before the store keeps it: that it is right, and what it is."""

from dataclasses import dataclass
from pathlib import Path

from adapters.digest import version_digest, weights_digest
from adapters.errors import ArtifactError
from adapters.names import Version
from adapters.problems import refusal
from adapters.validation import validate


@dataclass(frozen=True)
class Examined:
    """An adapter on its way into the store, which keeps every rule.

    Args:
        folder: that holds it.
        version: what it would be.
        is_stored: whether the store has this version already, whole.
    """

    folder: Path
    version: Version
    is_stored: bool


def version_of(folder: Path, *, given: Path | str, added: int) -> Version:
    """Return the version that an adapter folder is, if it keeps every rule.

    Args:
        folder: of the adapter.
        given: what errors call it.
        added: seconds since the epoch, UTC.
    Raises: ArtifactError: every rule that it breaks.
    Cost: reads every tensor twice.
    """
    validation = validate(folder)
    if validation.problems or validation.artifact is None:
        raise refusal(ArtifactError, given, validation.problems)
    artifact = validation.artifact
    weights = weights_digest(artifact)
    ranks = [module.rank for module in artifact.modules.values()]
    return Version(
        digest=version_digest(weights, folder),
        weights_digest=weights,
        num_bytes=artifact.num_bytes_served,
        min_rank=min(ranks),
        max_rank=max(ranks),
        added=added,
    )
