"""The factor that multiplies B·A·x: computed per module here, and nowhere else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.config import AdapterConfig
from adapters.errors import ArtifactError
from adapters.folder import CONFIG_FILE
from adapters.patterns import match_modules
from adapters.problems import Problem, refusal


@dataclass(frozen=True, slots=True)
class ModuleScaling:
    """What a configuration says of one module."""

    rank: int
    alpha: float
    scaling: float


def resolve_scalings(config: AdapterConfig, modules: Sequence[str]) -> dict[str, ModuleScaling]:
    """Return rank, alpha and scaling of every module of an adapter.

    Raises: ArtifactError: a key of a pattern that matches none of `modules`, or patterns that are
        too costly to match; all are named.
    Cost: proportional to modules plus keys, if the keys are module paths.
    """
    scalings, problems = find_scalings(config, modules)
    if problems:
        raise refusal(ArtifactError, CONFIG_FILE, problems)
    return scalings


def find_scalings(
    config: AdapterConfig, modules: Sequence[str]
) -> tuple[dict[str, ModuleScaling], list[Problem]]:
    """Return what `resolve_scalings` does and what is wrong, as far as one can go.

    Returns: nothing of the modules, if the patterns are too costly to match; and every problem.
    """
    try:
        ranks, problems = match_modules("rank_pattern", config.rank_pattern, modules)
        alphas, more = match_modules("alpha_pattern", config.alpha_pattern, modules)
    except ArtifactError as error:
        return {}, list(error.problems)
    scalings = {
        module: _scaling(
            config, ranks.get(module, config.rank), alphas.get(module, config.lora_alpha)
        )
        for module in modules
    }
    return scalings, [*problems, *more]


def _scaling(config: AdapterConfig, rank: int, alpha: float) -> ModuleScaling:
    """Return alpha / sqrt(rank) with `use_rslora`, else alpha / rank.

    Source: RoRA, arXiv 2501.04315, the same formula as rsLoRA, arXiv 2312.03732; LoRA 2106.09685.
    """
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return ModuleScaling(rank, float(alpha), scaling)
