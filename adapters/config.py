"""AdapterConfig: what adapter_config.json says about the weights beside it.

Owns which of PEFT's LoraConfig keys are applied, which have no effect on inference, and which stop
the load. A key is applied or refused, never dropped: an ignored `use_rslora` or `rank_pattern`
gives wrong answers without an error.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.folder import CONFIG_FILE
from adapters.patterns import check_keys, check_pattern, targeted
from adapters.problems import Code, Problem, shown
from adapters.reading import read_json_file

ALL_LINEAR = "all-linear"
_MAX_UNKNOWN = 20  # named of a file that has more

# Keys that initialise or train weights, or only describe: the stored tensors show their outcome.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "buffer_size", "direction", "dirichlet_prior",
        "eva_config", "fan_in_fan_out", "inference_mode", "kl_loss_weight",
        "layers_pattern", "lora_dropout", "megatron_config", "megatron_core", "num_samples",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "sample_scaler",
        "scale", "stable_gamma", "task_type", "use_entropy",
    }
)  # fmt: skip
# Kinds of adapter that we do not serve, by the key that switches them on.
_UNSERVED_KINDS: Mapping[str, tuple[Code, str]] = {
    "alora_invocation_tokens": (Code.KIND_ACTIVATED_LORA, "an Activated LoRA"),
    "arrow_config": (Code.KIND_ARROW, "an Arrow router"),
    "corda_config": (Code.KIND_CHANGED_BASE, "CorDA, which changes the base weights,"),
    "ensure_weight_tying": (Code.KIND_TIED_WEIGHTS, "an adapter that is tied to two weights"),
    "exclude_modules": (Code.KIND_EXCLUDED_MODULES, "a choice of modules by exclusion"),
    "kasa_config": (Code.KIND_KASA, "a KaSA adapter"),
    "layer_replication": (Code.KIND_LAYER_REPLICATION, "layer replication"),
    "layers_to_transform": (Code.KIND_CHOSEN_LAYERS, "a choice of modules by layer"),
    "loftq_config": (Code.KIND_CHANGED_BASE, "LoftQ, which changes the base weights,"),
    "lora_bias": (Code.KIND_LORA_BIAS, "a LoRA with bias terms"),
    "lora_ga_config": (Code.KIND_CHANGED_BASE, "LoRA-GA, which changes the base weights,"),
    "modules_to_save": (Code.KIND_MODULES_TO_SAVE, "a fully trained module beside LoRA"),
    "monteclora_config": (Code.KIND_MONTECLORA, "a MonteCLoRA adapter"),
    "target_parameters": (Code.KIND_PARAMETERS, "a LoRA on bare parameters"),
    "trainable_token_indices": (Code.KIND_TOKENS, "an adapter with trained token embeddings"),
    "use_bdlora": (Code.KIND_BLOCK_DIAGONAL, "a block-diagonal LoRA"),
    "use_dora": (Code.KIND_DORA, "a DoRA adapter"),
    "use_qalora": (Code.KIND_QALORA, "a QALoRA adapter"),
    "velora_config": (Code.KIND_VELORA, "a VeLoRA adapter"),
}
# What `convert` can say in another way, since the tensors show which modules were chosen.
CHOICE_KEYS = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform"})
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
            # PEFT chooses by the kind of model if there is no choice, and not if it is empty.
            "target_modules": targets if isinstance(targets, str) else sorted(targets) or None,
            "task_type": "CAUSAL_LM",
            "use_rslora": self.use_rslora,
        }

    def targets(self, modules: Sequence[str]) -> set[str]:
        """Return those of `modules` that PEFT would adapt, by its own rule.

        Raises: ArtifactError: the expression is too costly to match.
        """
        if not self.target_modules or self.target_modules == ALL_LINEAR:
            return set(modules)  # PEFT chooses by the kind of model or layer
        return targeted(self.target_modules, modules)


def read_config(folder: Path) -> tuple[AdapterConfig | None, list[Problem]]:
    """Read `folder`/adapter_config.json.

    Returns: as `parse_config`.
    Raises: FileNotFoundError; ArtifactError: the file is no JSON object within limits.
    """
    return parse_config(read_json_file(folder / CONFIG_FILE))


def parse_config(keys: Mapping[str, Any]) -> tuple[AdapterConfig | None, list[Problem]]:
    """Turn the keys of a LoraConfig into an AdapterConfig, and say all that is wrong with them.

    Args: keys: the parsed adapter_config.json.
    Returns: the configuration, or None if a key that it needs is wrong; and every broken rule.
    """
    refused = [*_unserved(keys), *_unknown(keys)]
    if keys.get("peft_type") != "LORA":
        message = f"is {shown(keys.get('peft_type'))}, only LORA is served"
        refused.append(Problem(Code.CONFIG_PEFT_TYPE, "peft_type", message))
    if keys.get("bias", "none") != "none":
        message = f"is {shown(keys['bias'])}, only none is served"
        refused.append(Problem(Code.KIND_BIAS, "bias", message))
    initialisation = keys.get("init_lora_weights", True)
    if not any(initialisation is one or initialisation == one for one in _HARMLESS_INITIALISATIONS):
        message = (
            f"is {shown(initialisation)}, which changes the base weights; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
        refused.append(Problem(Code.CONFIG_INITIALISATION, "init_lora_weights", message))
    wrong = _wrong_values(keys)
    if wrong:
        return None, [*refused, *wrong]
    targets = keys.get("target_modules") or ()
    base = keys.get("base_model_name_or_path")
    config = AdapterConfig(
        # PEFT's defaults for both are 8.
        rank=keys.get("r", 8),
        lora_alpha=keys.get("lora_alpha", 8),
        use_rslora=keys.get("use_rslora", False),
        rank_pattern=keys.get("rank_pattern") or {},
        alpha_pattern=keys.get("alpha_pattern") or {},
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        base_model_name_or_path=base if isinstance(base, str) else None,
    )
    return config, refused


def _wrong_values(keys: Mapping[str, Any]) -> list[Problem]:
    """Name the applied keys whose values can not be applied."""
    problems = []
    use_rslora, rank, alpha = (
        keys.get("use_rslora", False),
        keys.get("r", 8),
        keys.get("lora_alpha", 8),
    )
    if not isinstance(use_rslora, bool):
        message = f"is {shown(use_rslora)}, true or false is expected"
        problems.append(Problem(Code.CONFIG_USE_RSLORA, "use_rslora", message))
    if not _is_rank(rank):
        message = f"is {shown(rank)}, an integer of at least 1 is expected"
        problems.append(Problem(Code.CONFIG_RANK, "r", message))
    if not _is_alpha(alpha):
        message = f"is {shown(alpha)}, a number above 0 is expected"
        problems.append(Problem(Code.CONFIG_ALPHA, "lora_alpha", message))
    for key, code, is_right, wanted in (
        ("rank_pattern", Code.CONFIG_RANK_PATTERN, _is_rank, "integers"),
        ("alpha_pattern", Code.CONFIG_ALPHA_PATTERN, _is_alpha, "numbers"),
    ):
        pattern = keys.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
            message = f"is {shown(pattern)}, an object of {wanted} above 0 is expected"
            problems.append(Problem(code, key, message))
            continue
        problems += check_keys(key, list(pattern))
    targets = keys.get("target_modules") or ()
    if isinstance(targets, str):
        found = check_pattern("target_modules", targets)
        problems += [] if found is None else [found]
    elif not isinstance(targets, (list, tuple)) or not all(isinstance(t, str) for t in targets):
        message = f"is {shown(targets)}, a list of names or one text is expected"
        problems.append(Problem(Code.CONFIG_TARGETS, "target_modules", message))
    return problems


def _unserved(keys: Mapping[str, Any]) -> list[Problem]:
    return [
        Problem(code, key, f"is {shown(keys[key])}: {kind} is not served")
        for key, (code, kind) in _UNSERVED_KINDS.items()
        # To PEFT, 0 is a layer.
        if keys.get(key) or (key == "layers_to_transform" and keys.get(key) is not None)
    ]


def _unknown(keys: Mapping[str, Any]) -> list[Problem]:
    """Name unknown keys whose value could matter; null, false and empty ones pass."""
    problems = []
    for key in sorted(set(keys) - _KNOWN):
        if keys[key] in (None, False, 0, "", [], {}):
            continue
        near = difflib.get_close_matches(key[:100], _KNOWN, n=1)
        hint = f" (nearest known key: {near[0]})" if near else ""
        message = f"unknown key with value {shown(keys[key])}, which is not applied{hint}"
        problems.append(Problem(Code.CONFIG_KEY_UNKNOWN, key, message))
        if len(problems) == _MAX_UNKNOWN:
            break
    return problems


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_alpha(value: Any) -> bool:
    # `value < inf` is false for NaN and for infinity, both of which Python's JSON reader accepts.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e308
