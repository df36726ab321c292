"""The factor that multiplies B·A·x: computed per module here, and nowhere else."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from adapters.config import AdapterConfig
from adapters.errors import ArtifactError
from adapters.folder import CONFIG_FILE
from adapters.patterns import PatternTable, check_steps, match_modules
from adapters.problems import Code, Problem, refusal

Value = TypeVar("Value", int, float)


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


def exact_config(
    config: AdapterConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> AdapterConfig:
    """Return `config` with patterns that give each module just this rank and alpha.

    A key matches by PEFT's rule, so a path also matches every longer one that ends in it: the
    longer ones come first, and stand there even if they have the default.

    Raises: ArtifactError: this order of keys does not say it, as of two paths each has a dot where
        the other has none.
    """
    rank = max(ranks.values())  # engines size their buffers by it
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    made = replace(
        config,
        rank=rank,
        lora_alpha=alpha,
        rank_pattern=_exact_pattern(ranks, default=rank),
        alpha_pattern=_exact_pattern(alphas, default=alpha),
    )
    for module, found in resolve_scalings(made, list(ranks)).items():
        if (found.rank, found.alpha) != (ranks[module], float(alphas[module])):
            message = "no pattern tells it from another module; rename one of them"
            problem = Problem(Code.PATTERN_SYNTAX, module, message)
            raise refusal(ArtifactError, CONFIG_FILE, [problem])
    return made


def _exact_pattern(values: Mapping[str, Value], *, default: Value) -> dict[str, Value]:
    needed = {module: value for module, value in values.items() if value != default}
    table = PatternTable(needed)
    check_steps("pattern", table.steps(list(values)))
    spoilt = {m: v for m, v in values.items() if v == default and table.first_match(m) is not None}

    # Longest first; of one length, those with fewer dots, which stand for any character.
    def order(item: tuple[str, Value]) -> tuple[int, int, str]:
        return (-len(item[0]), item[0].count("."), item[0])

    return dict(sorted({**needed, **spoilt}.items(), key=order))


def scaling_factor(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """Return alpha / sqrt(rank) with `use_rslora`, else alpha / rank; rank is at least 1.

    Source: RoRA, arXiv 2501.04315, the same formula as rsLoRA, arXiv 2312.03732; LoRA 2106.09685.
    """
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _scaling(config: AdapterConfig, rank: int, alpha: float) -> ModuleScaling:
    factor = scaling_factor(alpha, rank, use_rslora=config.use_rslora)
    return ModuleScaling(rank, float(alpha), factor)
