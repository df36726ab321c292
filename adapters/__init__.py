"""The adapter artifact: format, rules, digests and the store. Imports no torch."""

from adapters.artifact import AdapterArtifact, LoraModule, open_artifact
from adapters.config import AdapterConfig
from adapters.digest import version_digest, weights_digest
from adapters.scaling import module_rank, module_scaling
from adapters.store import AdapterStore, NameRecord, ResolvedVersion, Version
from adapters.writer import write_artifact

__all__ = [
    "AdapterArtifact",
    "AdapterConfig",
    "AdapterStore",
    "LoraModule",
    "NameRecord",
    "ResolvedVersion",
    "Version",
    "module_rank",
    "module_scaling",
    "open_artifact",
    "version_digest",
    "weights_digest",
    "write_artifact",
]
