"""Broken rules of an adapter: their stable codes, and how several of them become one line.

docs/format.md, "Codes", says what each code means; a code never changes its meaning.
"""

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from adapters.errors import ArtifactError

_MAX_SHOWN = 8
_MAX_PLACES = 2
_MAX_VALUE_LENGTH = 120

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _MAX_VALUE_LENGTH
_REPR.maxlist = _REPR.maxdict = 10

Refused = TypeVar("Refused", bound=ArtifactError)


class Code(StrEnum):
    """One rule that an adapter, or an archive of one, can break."""

    # The folder and its files.
    FOLDER_MISSING = "folder-missing"
    FILE_LINK = "file-link"
    FILE_NOT_REGULAR = "file-not-regular"
    FILE_UNREADABLE = "file-unreadable"
    FILE_TOO_LARGE = "file-too-large"
    FILE_CHANGED = "file-changed"
    WEIGHTS_MISSING = "weights-missing"
    WEIGHTS_PICKLE = "weights-pickle"
    CONFIG_MISSING = "config-missing"
    TEMPLATE_NOT_TEXT = "template-not-text"
    # JSON, in any of the files.
    JSON_NOT_TEXT = "json-not-text"
    JSON_SYNTAX = "json-syntax"
    JSON_TOO_MANY_VALUES = "json-too-many-values"
    JSON_DUPLICATE_KEY = "json-duplicate-key"
    JSON_NOT_OBJECT = "json-not-object"
    # The header of the weights file.
    HEADER_CUT = "header-cut"
    HEADER_PAST_END = "header-past-end"
    HEADER_TOO_LARGE = "header-too-large"
    HEADER_METADATA = "header-metadata"
    TENSORS_TOO_MANY = "tensors-too-many"
    TENSOR_NAME = "tensor-name"
    TENSOR_ENTRY = "tensor-entry"
    TENSOR_DTYPE = "tensor-dtype"
    TENSOR_SHAPE = "tensor-shape"
    TENSOR_OFFSETS = "tensor-offsets"
    TENSOR_SIZE = "tensor-size"
    TENSOR_GAP = "tensor-gap"
    TENSOR_OVERLAP = "tensor-overlap"
    TENSOR_PAST_END = "tensor-past-end"
    BYTES_AFTER_TENSORS = "bytes-after-tensors"
    # Which tensors there are.
    TENSORS_NONE = "tensors-none"
    TENSOR_UNKNOWN = "tensor-unknown"
    TENSOR_BASE_WEIGHT = "tensor-base-weight"
    TENSOR_DORA = "tensor-dora"
    TENSOR_BIAS = "tensor-bias"
    TENSOR_SAVED_MODULE = "tensor-saved-module"
    TENSOR_ADAPTER_NAME = "tensor-adapter-name"
    TENSOR_FOREIGN_LAYOUT = "tensor-foreign-layout"
    FACTOR_MISSING = "factor-missing"
    FACTOR_KINDS = "factor-kinds"
    FACTOR_DTYPE = "factor-dtype"
    FACTOR_SHAPE = "factor-shape"
    RANK_FACTORS = "rank-factors"
    RANK_CONFIG = "rank-config"
    RANK_TOO_LARGE = "rank-too-large"
    TARGET_MISSING = "target-missing"
    # adapter_config.json.
    CONFIG_KEY_UNKNOWN = "config-key-unknown"
    CONFIG_PEFT_TYPE = "config-peft-type"
    CONFIG_RANK = "config-rank"
    CONFIG_ALPHA = "config-alpha"
    CONFIG_USE_RSLORA = "config-use-rslora"
    CONFIG_INITIALISATION = "config-initialisation"
    CONFIG_TARGETS = "config-targets"
    CONFIG_RANK_PATTERN = "config-rank-pattern"
    CONFIG_ALPHA_PATTERN = "config-alpha-pattern"
    PATTERN_SYNTAX = "pattern-syntax"
    PATTERN_TOO_LONG = "pattern-too-long"
    PATTERN_TOO_COSTLY = "pattern-too-costly"
    PATTERN_WITHOUT_MATCH = "pattern-without-match"
    # Kinds of adapter that are not served, by the key that switches them on.
    KIND_ACTIVATED_LORA = "kind-activated-lora"
    KIND_ARROW = "kind-arrow"
    KIND_BIAS = "kind-bias"
    KIND_BLOCK_DIAGONAL = "kind-block-diagonal"
    KIND_CHANGED_BASE = "kind-changed-base"
    KIND_CHOSEN_LAYERS = "kind-chosen-layers"
    KIND_DORA = "kind-dora"
    KIND_EXCLUDED_MODULES = "kind-excluded-modules"
    KIND_KASA = "kind-kasa"
    KIND_LAYER_REPLICATION = "kind-layer-replication"
    KIND_LORA_BIAS = "kind-lora-bias"
    KIND_MODULES_TO_SAVE = "kind-modules-to-save"
    KIND_MONTECLORA = "kind-monteclora"
    KIND_PARAMETERS = "kind-parameters"
    KIND_QALORA = "kind-qalora"
    KIND_TIED_WEIGHTS = "kind-tied-weights"
    KIND_TOKENS = "kind-tokens"
    KIND_VELORA = "kind-velora"
    # Numbers.
    VALUES_NOT_FINITE = "values-not-finite"
    VALUES_TOO_LARGE = "values-too-large"
    DELTA_ZERO = "delta-zero"
    # rora.json.
    PROBE_FORM = "probe-form"
    # Against a base model.
    BASE_OTHER = "base-other"
    MODULE_UNMATCHED = "module-unmatched"
    MODULE_SHAPE = "module-shape"
    # Other layouts, when an adapter is converted.
    LAYOUT_UNKNOWN = "layout-unknown"
    LAYOUT_AMBIGUOUS = "layout-ambiguous"
    LAYOUT_NEEDS_BASE = "layout-needs-base"
    # Archives.
    ARCHIVE_SYNTAX = "archive-syntax"
    ARCHIVE_CLIMBS = "archive-climbs"
    ARCHIVE_LINK = "archive-link"
    ARCHIVE_SPECIAL_FILE = "archive-special-file"
    ARCHIVE_DUPLICATE = "archive-duplicate"
    ARCHIVE_ENCRYPTED = "archive-encrypted"
    ARCHIVE_COMPRESSION = "archive-compression"
    ARCHIVE_TOO_MANY = "archive-too-many"
    ARCHIVE_BOMB = "archive-bomb"
    ARCHIVE_NO_ADAPTER = "archive-no-adapter"
    ARCHIVE_SEVERAL_ADAPTERS = "archive-several-adapters"


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    Args:
        code: which rule.
        where: the file, key, module, tensor or member of an archive that breaks it.
        message: what was found, what was expected; what to do.
    """

    code: Code
    where: str
    message: str

    def __str__(self) -> str:
        return f"{shown(self.where)}: {self.message} [{self.code}]"


def describe(problems: Sequence[Problem]) -> str:
    """Return one line for all problems: alike ones together, and not more than fit a line."""
    groups: dict[tuple[Code, str], list[str]] = {}
    for problem in problems:
        groups.setdefault((problem.code, problem.message), []).append(problem.where)
    lines = []
    for (code, message), places in list(groups.items())[:_MAX_SHOWN]:
        where = ", ".join(shown(place) for place in places[:_MAX_PLACES])
        if len(places) > _MAX_PLACES:
            where += f" and {len(places) - _MAX_PLACES} more"
        lines.append(f"{where}: {message} [{code}]")
    if len(groups) > _MAX_SHOWN:
        lines.append(f"and {len(groups) - _MAX_SHOWN} more problems")
    return "; ".join(lines)


def refusal(kind: type[Refused], place: Path | str, problems: Iterable[Problem]) -> Refused:
    """Return the error of class `kind` that tells all `problems` of `place`."""
    found = tuple(problems)
    error = kind(f"{place}: {describe(found)}")
    error.codes = tuple(dict.fromkeys(str(problem.code) for problem in found))
    error.problems = found
    return error


def shown(value: object) -> str:
    """Return a value from somebody else's file as a message may hold it: short, on one line."""
    text = value if isinstance(value, str) else _REPR.repr(value)
    # Cut before it is looked at: it may be megabytes.
    cut = text[: _MAX_VALUE_LENGTH + 1]
    cut = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cut)
    return cut if len(cut) <= _MAX_VALUE_LENGTH else f"{cut[:_MAX_VALUE_LENGTH]}…"
