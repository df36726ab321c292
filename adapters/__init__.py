"""The adapter artifact: format, rules, digests and the store. Imports no torch."""

from adapters.artifact import AdapterArtifact, LoraModule, open_artifact
from adapters.config import AdapterConfig
from adapters.digest import version_digest, weights_digest
from adapters.names import Event, NameRecord, Version
from adapters.problems import Code, Problem
from adapters.scaling import resolve_scalings
from adapters.store import AdapterStore, ResolvedVersion
from adapters.validation import validate
from adapters.writer import write_artifact

__all__ = [
    "AdapterArtifact",
    "AdapterConfig",
    "AdapterStore",
    "Code",
    "Event",
    "LoraModule",
    "NameRecord",
    "Problem",
    "ResolvedVersion",
    "Version",
    "open_artifact",
    "resolve_scalings",
    "validate",
    "version_digest",
    "weights_digest",
    "write_artifact",
]
