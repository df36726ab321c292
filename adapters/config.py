"""AdapterConfig: what adapter_config.json says about the weights beside it.

Owns which of PEFT's LoraConfig keys are applied, which have no effect on inference, and which stop
the load. A key is applied or refused, never dropped: an ignored `use_rslora` or `rank_pattern`
gives wrong answers without an error.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import AdapterConfigError

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_PATTERN_LENGTH = 1000
ALL_LINEAR = "all-linear"

# Keys that initialise or train weights, or only describe: the stored tensors show their outcome.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "buffer_size", "direction", "dirichlet_prior",
        "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode", "kl_loss_weight",
        "layers_pattern", "lora_dropout", "megatron_config", "megatron_core", "num_samples",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "sample_scaler",
        "scale", "stable_gamma", "task_type", "use_entropy",
    }
)  # fmt: skip
# Kinds of adapter that we do not serve, by the key that switches them on.
_UNSERVED_KINDS = {
    "alora_invocation_tokens": "an Activated LoRA",
    "arrow_config": "an Arrow router",
    "corda_config": "a CorDA initialisation, which changes the base weights",
    "kasa_config": "a KaSA adapter",
    "exclude_modules": "a choice of modules by exclusion",
    "layer_replication": "layer replication",
    "layers_to_transform": "a choice of modules by layer",
    "loftq_config": "a LoftQ initialisation, which changes the base weights",
    "lora_bias": "a LoRA with bias terms",
    "lora_ga_config": "a LoRA-GA initialisation, which changes the base weights",
    "modules_to_save": "fully trained modules beside LoRA",
    "monteclora_config": "a MonteCLoRA adapter",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "a block-diagonal LoRA",
    "use_dora": "a DoRA adapter",
    "use_qalora": "a QALoRA adapter",
    "velora_config": "a VeLoRA adapter",
}
# The others (pissa, olora, corda, loftq, lora_ga) subtract the initial delta from the base weights,
# so that the stored A and B alone do not describe the adapter.
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_APPLIED = frozenset(
    {
        "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r",
        "rank_pattern", "target_modules", "use_rslora",
    }
)  # fmt: skip
_KNOWN = _APPLIED | _WITHOUT_EFFECT | frozenset(_UNSERVED_KINDS)


@dataclass(frozen=True)
class AdapterConfig:
    """The part of PEFT's LoraConfig that bears on the weights.

    Args:
        rank: default rank of a module (`r` on disk), at least 1.
        lora_alpha: default numerator of the scaling, above 0.
        use_rslora: scaling is alpha / sqrt(rank) if true (RoRA), alpha / rank if not.
        rank_pattern: rank of the modules that a key matches by PEFT's rule.
        alpha_pattern: alpha of the modules that a key matches by PEFT's rule.
        target_modules: names, suffixes or one regular expression, as PEFT writes them.
        base_model_name_or_path: for people; never part of an identity.
    """

    rank: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str = ()
    base_model_name_or_path: str | None = None

    def to_peft(self) -> dict[str, Any]:
        """Return the keys and values of adapter_config.json, as PEFT's LoraConfig reads them."""
        targets = self.target_modules
        return {
            "alpha_pattern": dict(self.alpha_pattern),
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "inference_mode": True,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": dict(self.rank_pattern),
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "task_type": "CAUSAL_LM",
            "use_rslora": self.use_rslora,
        }

    def targets(self, module: str) -> bool:
        """Tell whether PEFT would adapt `module`, by its own rule: a whole path or a suffix.

        Source: peft 0.21 `tuners/tuners_utils.py: check_target_module_exists`.
        """
        if not self.target_modules or self.target_modules == ALL_LINEAR:
            return True  # PEFT chooses by the kind of model or layer
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.target_modules)


def read_config(folder: Path) -> AdapterConfig:
    """Read `folder`/adapter_config.json.

    Raises: AdapterConfigError: the file is missing, no JSON object, or `parse_config` refuses it.
    """
    path = folder / CONFIG_FILE
    try:
        if path.exists() and not path.is_file():
            raise AdapterConfigError("no regular file")
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise AdapterConfigError(
                f"{size} bytes, at most {MAX_CONFIG_BYTES} are expected; export it again"
            )
        parsed = json.loads(path.read_bytes(), object_pairs_hook=_object_without_duplicates)
        # A lone surrogate passes as JSON and fails wherever the text is used.
        json.dumps(parsed, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise AdapterConfigError(
            f"{folder}: no {CONFIG_FILE}, an adapter folder holds one; "
            "name a folder written by rora-train or PEFT"
        ) from None
    except AdapterConfigError as error:
        raise AdapterConfigError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterConfigError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise AdapterConfigError(
            f"{path}: holds a {type(parsed).__name__}, a JSON object is expected"
        )
    return parse_config(parsed, where=str(path))


def parse_config(keys: Mapping[str, Any], *, where: str) -> AdapterConfig:
    """Turn the keys of a LoraConfig into an AdapterConfig, or say all that is wrong with them.

    Args:
        keys: the parsed adapter_config.json.
        where: file or origin, named in the error.
    Raises: AdapterConfigError: every broken rule, joined by "; ".
    """
    problems = [*_unserved(keys), *_unknown(keys)]
    if keys.get("peft_type") != "LORA":
        problems.append(f"peft_type is {keys.get('peft_type')!r}, only 'LORA' is served")
    if keys.get("bias", "none") != "none":
        problems.append(f"bias is {keys['bias']!r}, only 'none' is served")
    initialisation = keys.get("init_lora_weights", True)
    if not any(initialisation is one or initialisation == one for one in _HARMLESS_INITIALISATIONS):
        problems.append(
            f"init_lora_weights is {initialisation!r}, which changes the base weights; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    use_rslora = keys.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        problems.append(f"use_rslora is {use_rslora!r}, true or false is expected")
    # PEFT's defaults for both are 8.
    rank, alpha = keys.get("r", 8), keys.get("lora_alpha", 8)
    if not _is_rank(rank):
        problems.append(f"r is {rank!r}, an integer of at least 1 is expected")
    if not _is_alpha(alpha):
        problems.append(f"lora_alpha is {alpha!r}, a number above 0 is expected")
    patterns = {key: keys.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    problems += _wrong_values("rank_pattern", patterns["rank_pattern"], _is_rank, "integers")
    problems += _wrong_values("alpha_pattern", patterns["alpha_pattern"], _is_alpha, "numbers")
    targets = keys.get("target_modules") or ()
    problems += _wrong_targets(targets)
    if problems:
        raise AdapterConfigError(f"{where}: {'; '.join(problems)}")
    return AdapterConfig(
        rank=rank,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        base_model_name_or_path=keys.get("base_model_name_or_path"),
    )


def _unserved(keys: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {keys[key]!r}: {kind} is not served"
        for key, kind in _UNSERVED_KINDS.items()
        if keys.get(key)
    ]


def _unknown(keys: Mapping[str, Any]) -> list[str]:
    """Name unknown keys whose value could matter; null, false and empty ones pass."""
    problems = []
    for key in sorted(set(keys) - _KNOWN):
        if keys[key] in (None, False, 0, "", [], {}):
            continue
        near = difflib.get_close_matches(key, _KNOWN, n=1)
        hint = f" (nearest known key: {near[0]})" if near else ""
        problems.append(f"unknown key {key!r} with value {keys[key]!r} is not applied{hint}")
    return problems


def _wrong_values(
    key: str, pattern: Any, is_right: Callable[[Any], bool], wanted: str
) -> list[str]:
    if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
        return [f"{key} is {pattern!r}, an object of {wanted} above 0 is expected"]
    return [f"{key}: {reason}" for reason in map(_wrong_pattern, pattern) if reason]


def _wrong_targets(targets: Any) -> list[str]:
    if isinstance(targets, str):
        reason = _wrong_pattern(targets)
        return [f"target_modules: {reason}"] if reason else []
    if isinstance(targets, (list, tuple)) and all(isinstance(name, str) for name in targets):
        return []
    return [f"target_modules is {targets!r}, a list of names or one text is expected"]


def _wrong_pattern(pattern: str) -> str | None:
    """Say why a key that PEFT matches as a regular expression is none."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"a pattern of {len(pattern)} characters, at most {MAX_PATTERN_LENGTH} are expected"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern!r} is no regular expression ({error})"
    return None


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    # `value < inf` is false for NaN and for infinity, both of which Python's JSON reader accepts.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e308


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise AdapterConfigError(f"key {twice[0]!r} stands twice in one object, once is expected")
    return dict(pairs)
