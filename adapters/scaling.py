"""The factor that multiplies B·A·x: computed per module here, and nowhere else."""

import math
import re
from collections.abc import Mapping

from adapters.config import AdapterConfig


def matching_key(pattern: Mapping[str, object], module: str) -> str | None:
    r"""Return the first key of `pattern` that matches `module` by PEFT's rule, or None.

    A key matches if the regular expression `(.*\.)?(key)$` does: the whole module path or a part of
    it that begins after a dot.

    Source: peft 0.21 `utils/other.py: get_pattern_key`.
    Checked against: PEFT's own function, in tests/adapters/test_scaling.py.
    """
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


def module_rank(config: AdapterConfig, module: str) -> int:
    """Return the rank that the configuration declares for `module`."""
    key = matching_key(config.rank_pattern, module)
    return config.rank if key is None else config.rank_pattern[key]


def module_alpha(config: AdapterConfig, module: str) -> float:
    """Return the numerator of the scaling of `module`."""
    key = matching_key(config.alpha_pattern, module)
    return float(config.lora_alpha if key is None else config.alpha_pattern[key])


def module_scaling(config: AdapterConfig, module: str) -> float:
    """Return the scaling of `module`: alpha / sqrt(rank) with `use_rslora`, else alpha / rank.

    Source: RoRA, arXiv 2501.04315, the same formula as rsLoRA, arXiv 2312.03732; LoRA 2106.09685.
    """
    alpha, rank = module_alpha(config, module), module_rank(config, module)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
