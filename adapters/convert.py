"""Other layouts of LoRA weights -> the adapter folder, where the mapping is exact.

What is read: PEFT's own folders, also with an adapter's name in the tensors' names or without the
prefix, or with modules chosen by layer, exclusion or a costly expression; one file of kohya's
sd-scripts; and, given the base model, fused projections whose parts the base has apart. Where a
file does not say enough, it is refused: a guess would be an adapter that answers wrongly.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapters.artifact import PEFT_PREFIX
from adapters.config import CHOICE_KEYS, AdapterConfig, parse_config
from adapters.digest import read_chat_template, read_provenance
from adapters.errors import ArtifactError
from adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from adapters.header import TensorInfo, header_of
from adapters.limits import MAX_ADAPTER_BYTES
from adapters.patterns import PatternTable, check_pattern, check_steps, targeted
from adapters.problems import Code, Problem, refusal, shown
from adapters.reading import open_regular, read_json_file, reading
from adapters.receipt import BaseShapes, layer_problem
from adapters.scaling import exact_config, resolve_scalings
from adapters.tensors import NUMPY_DTYPES, Array, TensorFile, open_tensors
from adapters.writer import FactorPair, write_artifact

_PEFT_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\."
    r"(?P<kind>lora|lora_embedding)_(?P<side>A|B)(?:\.(?P<adapter>(?!weight$|bias$)\w+))?(?:\.weight)?"
)
_MAX_LAYERS_PATTERNS = 10
_KOHYA_NAME = re.compile(r"(?P<module>[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
# What sd-scripts puts before a module's path, whose dots it makes underscores.
_KOHYA_PREFIXES = ("lora_te1_", "lora_te2_", "lora_te_", "lora_unet_", "lora_")
# Projections whose weight is the parts' weights, one after the other, by rows.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}


@dataclass
class _Source:
    """What a file holds, by module path."""

    factors: dict[str, FactorPair] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    use_rslora: bool = False
    base_name: str | None = None


def convert(source: Path, output: Path, *, base: BaseShapes | None) -> list[str]:
    """Write an adapter folder from another layout.

    Args:
        source: an adapter folder, or one safetensors file.
        output: new folder.
        base: the base model, which kohya's names and fused projections can not be read without.
    Returns: what was done, in words.

    Raises: ArtifactError: a tensor of no known layout, or one whose meaning is not certain.
    Cost: reads every tensor once, holds all in memory.
    """
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    tensors = _read_header(weights)
    notes: list[str] = []
    with open_tensors(weights) as file:
        if any(_KOHYA_NAME.fullmatch(name) for name in tensors):
            found = _read_kohya(tensors, file, base, weights, notes)
        else:
            found = _read_peft(tensors, file, source, notes)
    problems = [
        Problem(Code.VALUES_NOT_FINITE, module, "holds NaN or infinity, numbers are expected")
        for module, pair in found.factors.items()
        if not all(np.isfinite(factor.astype(np.float32)).all() for factor in pair)
    ]
    if problems:
        raise refusal(ArtifactError, source, problems)
    if base is not None:
        _split_fused(found, base, notes)
        _check_fits(found, base)
    provenance = read_provenance(source) if source.is_dir() else {}
    template = read_chat_template(source) if source.is_dir() else None
    write_artifact(
        output,
        _config(found),
        found.factors,
        provenance={"format": 1, **provenance, "conversion": notes},
        embeddings=found.embeddings,
        chat_template=template,
    )
    return notes


def _read_header(weights: Path) -> dict[str, TensorInfo]:
    try:
        with open_regular(weights, max_bytes=MAX_ADAPTER_BYTES) as file, reading(weights):
            tensors = header_of(file, weights)
    except FileNotFoundError:
        message = "no such file, safetensors weights are expected"
        raise refusal(
            ArtifactError, weights.parent, [Problem(Code.WEIGHTS_MISSING, weights.name, message)]
        ) from None
    problems = [
        Problem(Code.FACTOR_DTYPE, name, f"is {tensor.dtype}, {', '.join(NUMPY_DTYPES)} are read")
        for name, tensor in tensors.items()
        if tensor.dtype not in NUMPY_DTYPES
    ]
    if not tensors:
        problems = [Problem(Code.TENSORS_NONE, weights.name, "holds no tensor")]
    if problems:
        raise refusal(ArtifactError, weights, problems)
    return tensors


# PEFT.


def _read_peft(
    tensors: Mapping[str, TensorInfo], file: TensorFile, source: Path, notes: list[str]
) -> _Source:
    found = _Source()
    sides: dict[str, dict[str, TensorInfo]] = {}
    kinds: dict[str, bool] = {}
    adapters = set()
    problems = []
    for name, tensor in tensors.items():
        match = _PEFT_NAME.fullmatch(name)
        if match is None:
            message = "no factor of LoRA in a layout that is known"
            problems.append(Problem(Code.LAYOUT_UNKNOWN, name, message))
            continue
        adapters.add(match["adapter"])
        is_embedding = match["kind"] == "lora_embedding"
        sides.setdefault(match["module"], {})
        is_mixed = kinds.setdefault(match["module"], is_embedding) != is_embedding
        if match["side"] in sides[match["module"]] or is_mixed:
            message = "is one more factor of its module, one A and one B are expected"
            problems.append(Problem(Code.LAYOUT_AMBIGUOUS, name, message))
            continue
        sides[match["module"]][match["side"]] = tensor
    if len(adapters) > 1:
        listed = ", ".join(sorted(str(adapter) for adapter in adapters))
        message = f"holds several adapters ({listed}), one is expected; save each by itself"
        problems.append(Problem(Code.LAYOUT_AMBIGUOUS, WEIGHTS_FILE, message))
    problems += _missing_partners(sides)
    if problems:
        raise refusal(ArtifactError, source, problems)
    if adapters != {None}:
        notes.append(f"took the adapter's name {adapters.pop()!r} out of the tensors' names")
    if not any(name.startswith(PEFT_PREFIX) for name in tensors):
        notes.append(f"put the prefix {PEFT_PREFIX!r} before the tensors' names")
    found.embeddings = {module for module, is_embedding in kinds.items() if is_embedding}
    config = _peft_config(source, list(sides), notes)
    scalings = resolve_scalings(config, list(sides))
    for module, pair in sides.items():
        lora_a, lora_b = file.read(pair["A"]), file.read(pair["B"])
        if lora_a.ndim != 2 or lora_a.shape[0] != scalings[module].rank:
            message = (
                f"adapter_config.json declares rank {scalings[module].rank}, lora_A is "
                f"{list(lora_a.shape)}; alpha / rank is not certain, so correct rank_pattern"
            )
            raise refusal(ArtifactError, source, [Problem(Code.RANK_CONFIG, module, message)])
        found.factors[module] = (lora_a, lora_b)
        found.alphas[module] = scalings[module].alpha
    found.use_rslora, found.base_name = config.use_rslora, config.base_model_name_or_path
    return found


def _peft_config(source: Path, modules: list[str], notes: list[str]) -> AdapterConfig:
    """Return the configuration beside PEFT's weights, with the modules that it chose by path."""
    folder = source if source.is_dir() else source.parent
    try:
        keys = read_json_file(folder / CONFIG_FILE)
    except FileNotFoundError:
        message = f"no {CONFIG_FILE}, which says how these weights are scaled"
        raise refusal(
            ArtifactError, folder, [Problem(Code.CONFIG_MISSING, CONFIG_FILE, message)]
        ) from None
    targets = keys.get("target_modules")
    is_costly = isinstance(targets, str) and check_pattern("target_modules", targets) is not None
    kept: dict[str, Any] = {key: value for key, value in keys.items() if key not in CHOICE_KEYS}
    if is_costly:
        kept["target_modules"] = None
        notes.append("did not check that target_modules chooses these modules: it is too costly")
    config, problems = parse_config(kept)
    if config is None or problems:
        raise refusal(ArtifactError, folder, problems)
    config = _without_idle_keys(config, modules, notes)
    chosen = config.targets(modules) - _not_chosen(keys, modules)
    problems = [
        Problem(Code.TARGET_MISSING, module, "is not a module that the configuration chooses")
        for module in modules
        if module not in chosen
    ]
    if problems:
        raise refusal(ArtifactError, folder, problems)
    used = [key for key in ("target_modules", *sorted(CHOICE_KEYS)) if keys.get(key)]
    if len(used) > 1 or isinstance(targets, str):
        notes.append(f"wrote out the modules that {', '.join(used)} chose")
    return config


def _without_idle_keys(
    config: AdapterConfig, modules: list[str], notes: list[str]
) -> AdapterConfig:
    """Leave out the keys of patterns that match no module, which change nothing."""
    kept: dict[str, Any] = {}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name)
        table = PatternTable(pattern)
        check_steps(name, table.steps(modules))
        idle = set(table.unmatched(modules))
        kept[name] = {key: value for key, value in pattern.items() if key not in idle}
        if idle:
            notes.append(f"left out of {name} what matches no module: {shown(min(idle))}, …")
    return replace(config, **kept)


def _not_chosen(keys: Mapping[str, Any], modules: list[str]) -> set[str]:
    """Return the modules that `exclude_modules` or `layers_to_transform` leaves out.

    Source: peft 0.21 `tuners/tuners_utils.py: check_target_module_exists`.
    Raises: ArtifactError: a choice that can not be read.
    """
    left_out: set[str] = set()
    exclude = keys.get("exclude_modules") or []
    layers, pattern = keys.get("layers_to_transform"), keys.get("layers_pattern")
    patterns = [pattern] if isinstance(pattern, str) else pattern or ["[^.]*"]
    layers = [layers] if isinstance(layers, int) else layers
    wanted = layers or []
    problems = []
    if isinstance(exclude, str):
        found = check_pattern("exclude_modules", exclude)
        problems += [] if found is None else [found]
    elif not isinstance(exclude, list) or not all(isinstance(name, str) for name in exclude):
        message = f"is {shown(exclude)}, a list of names or one text is expected"
        problems.append(Problem(Code.KIND_EXCLUDED_MODULES, "exclude_modules", message))
    plain = isinstance(patterns, list) and all(
        isinstance(one, str) and re.fullmatch(r"[\w]+|\[\^\.\]\*", one) for one in patterns
    )
    if (
        not plain
        or len(patterns) > _MAX_LAYERS_PATTERNS
        or not isinstance(wanted, list)
        or not all(isinstance(layer, int) for layer in wanted)
    ):
        message = f"with {shown(patterns)} chooses layers in a way that is not read"
        problems.append(Problem(Code.KIND_CHOSEN_LAYERS, "layers_to_transform", message))
    if problems:
        raise refusal(ArtifactError, CONFIG_FILE, problems)
    if exclude:
        left_out |= targeted(exclude, modules)
    if wanted:
        expressions = [re.compile(rf".*\.{one}\.(\d+)\.") for one in patterns]
        numbers = {str(layer) for layer in wanted}
        for module in modules:
            found_layers = (expression.match(module) for expression in expressions)
            match = next((match for match in found_layers if match is not None), None)
            if match is None or match[1] not in numbers:
                left_out.add(module)
    return left_out


# kohya's sd-scripts.


def _read_kohya(
    tensors: Mapping[str, TensorInfo],
    file: TensorFile,
    base: BaseShapes | None,
    weights: Path,
    notes: list[str],
) -> _Source:
    if base is None:
        message = (
            "names modules with underscores for dots, which only the base model can undo; give it "
            "with --model"
        )
        problem = Problem(Code.LAYOUT_NEEDS_BASE, weights.name, message)
        raise refusal(ArtifactError, weights.parent, [problem])
    paths: dict[str, list[str]] = {}
    for module in base.linear:
        paths.setdefault(module.replace(".", "_"), []).append(module)
    parts: dict[str, dict[str, TensorInfo]] = {}
    problems = []
    for name, tensor in tensors.items():
        match = _KOHYA_NAME.fullmatch(name)
        modules = [] if match is None else _kohya_modules(match["module"], paths)
        if match is None or len(modules) != 1:
            what = f"could be {', '.join(modules)}" if modules else "names no module of the base"
            code = Code.LAYOUT_AMBIGUOUS if modules else Code.LAYOUT_UNKNOWN
            problems.append(Problem(code, name, what))
            continue
        side = {"lora_down.weight": "A", "lora_up.weight": "B"}.get(match["part"], "alpha")
        if side in parts.setdefault(modules[0], {}):
            message = f"is one more {side} of {modules[0]}, one is expected"
            problems.append(Problem(Code.LAYOUT_AMBIGUOUS, name, message))
            continue
        parts[modules[0]][side] = tensor
    problems += _missing_partners(parts)
    for module, pair in parts.items():
        shapes = [pair[side].shape for side in ("A", "B") if side in pair]
        if any(len(shape) != 2 for shape in shapes) or (
            "alpha" in pair and np.prod(pair["alpha"].shape) != 1
        ):
            message = "factors with two dimensions and one alpha are expected"
            problems.append(Problem(Code.FACTOR_SHAPE, module, message))
    if problems:
        raise refusal(ArtifactError, weights, problems)
    found = _Source(base_name=base.name)
    for module, pair in parts.items():
        lora_a, lora_b = file.read(pair["A"]), file.read(pair["B"])
        alpha = float(file.read(pair["alpha"]).reshape(-1)[0]) if "alpha" in pair else 0.0
        found.factors[module] = (lora_a, lora_b)
        if not 0 <= alpha < math.inf:
            message = f"alpha is {alpha}, a number of at least 0 is expected"
            problem = Problem(Code.CONFIG_ALPHA, module, message)
            raise refusal(ArtifactError, weights, [problem])
        # sd-scripts, networks/lora.py: no alpha, or 0, means the rank.
        found.alphas[module] = alpha or float(lora_a.shape[0])
    notes.append("read the layout of kohya's sd-scripts")
    return found


def _kohya_modules(flat: str, paths: Mapping[str, list[str]]) -> list[str]:
    """Return the base's modules that a name of sd-scripts can mean."""
    starts = [prefix for prefix in ("", *_KOHYA_PREFIXES) if flat.startswith(prefix)]
    return [module for start in starts for module in paths.get(flat.removeprefix(start), [])]


def _missing_partners(sides: Mapping[str, Mapping[str, TensorInfo]]) -> list[Problem]:
    return [
        Problem(Code.FACTOR_MISSING, module, f"has no factor {side}, both are expected")
        for module, pair in sides.items()
        for side in sorted({"A", "B"} - set(pair))
    ]


# Fused projections.


def _split_fused(found: _Source, base: BaseShapes, notes: list[str]) -> None:
    """Give each part of a fused projection its own factors: the same A, and its rows of B."""
    for module in list(found.factors):
        parent, dot, last = module.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in _FUSED.get(last, ())]
        if not parts or module in base.linear or not all(part in base.linear for part in parts):
            continue
        lora_a, lora_b = found.factors[module]
        sizes = [shape[0] for part in parts if (shape := base.linear[part]) is not None]
        if len(sizes) < len(parts) or any(part in found.factors for part in parts):
            message = "stands beside its own parts, or the base model's are quantised"
            problem = Problem(Code.LAYOUT_AMBIGUOUS, module, message)
            raise refusal(ArtifactError, f"on base model {base.name}", [problem])
        if sum(sizes) != lora_b.shape[0]:
            message = f"B has {lora_b.shape[0]} rows, {' + '.join(map(str, sizes))} are expected"
            problem = Problem(Code.MODULE_SHAPE, module, message)
            raise refusal(ArtifactError, f"on base model {base.name}", [problem])
        alpha = found.alphas.pop(module)
        del found.factors[module]
        for part, rows in zip(parts, _rows(lora_b, sizes), strict=True):
            found.factors[part] = (lora_a, rows)
            found.alphas[part] = alpha
        notes.append(f"split {module} into {', '.join(p.rpartition('.')[2] for p in parts)}")


def _check_fits(found: _Source, base: BaseShapes) -> None:
    """Refuse modules that the base model does not have, or has in other sizes."""
    fits = [
        layer_problem(module, (lora_b.shape[0], lora_a.shape[1]), base.linear, kind="linear layer")
        for module, (lora_a, lora_b) in found.factors.items()
        if module not in found.embeddings
    ]
    problems = [problem for problem in fits if problem is not None]
    if problems:
        raise refusal(ArtifactError, f"on base model {base.name}", problems)


def _rows(lora_b: Array, sizes: list[int]) -> list[Array]:
    return np.split(lora_b, np.cumsum(sizes)[:-1])


def _config(found: _Source) -> AdapterConfig:
    """Return the configuration that names every module by its path."""
    empty = AdapterConfig(
        rank=1,
        lora_alpha=1.0,
        use_rslora=found.use_rslora,
        target_modules=tuple(sorted(found.factors)),
        base_model_name_or_path=found.base_name,
    )
    ranks = {module: lora_a.shape[0] for module, (lora_a, _) in found.factors.items()}
    return exact_config(empty, ranks, found.alphas)
