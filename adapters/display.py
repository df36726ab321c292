"""What rora-adapters prints: tables, and a picture of rank by layer and module."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from adapters.artifact import AdapterArtifact, LoraModule
from adapters.compact import Compaction
from adapters.diff import Difference
from adapters.digest import read_chat_template, read_provenance
from adapters.factors import Delta
from adapters.problems import shown
from adapters.receipt import Receipt
from adapters.validation import checked_tensors

_LAYER = re.compile(r"(?P<before>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)")
_BARS = "▁▂▃▄▅▆▇█"
_ABSENT = "·"
_MAX_LISTED = 10
_MAX_KINDS, _MAX_LAYERS = 200, 1000  # of a table and a picture

Row = Sequence[object]


def table(header: Sequence[str], rows: Iterable[Row]) -> str:
    """Return aligned columns; the first is text, the others are flushed right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [
        max(len(title), *(len(row[column]) for row in cells)) if cells else len(title)
        for column, title in enumerate(header)
    ]
    lines = []
    for row in [list(header), *cells]:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def described(artifact: AdapterArtifact, *, norms: bool) -> dict[str, Any]:
    """Return what `inspect --json` prints of an adapter.

    Args:
        artifact: to describe.
        norms: also read the tensors and give each delta's Frobenius norm.
    """
    modules = {
        name: {
            "name": name,
            "kind": module.kind,
            "rank": module.rank,
            "alpha": module.alpha,
            "scaling": module.scaling,
            "in_features": module.in_features,
            "out_features": module.out_features,
            "dtype": module.lora_a.dtype,
            "num_bytes": module.num_bytes,
        }
        for name, module in artifact.modules.items()
    }
    if norms:
        for module, lora_a, lora_b in checked_tensors(artifact):
            modules[module.name]["norm"] = Delta(lora_a, lora_b, module.scaling).norm()
    provenance = read_provenance(artifact.folder)
    ranks = [module.rank for module in artifact.modules.values()]
    return {
        "folder": str(artifact.folder),
        "use_rslora": artifact.config.use_rslora,
        "min_rank": min(ranks),
        "max_rank": max(ranks),
        "total_rank": sum(ranks),
        "num_bytes": artifact.num_bytes,
        "base_model": provenance.get("base_model") or artifact.config.base_model_name_or_path,
        "has_probe": provenance.get("probe") is not None,
        "has_chat_template": read_chat_template(artifact.folder) is not None,
        "modules": list(modules.values()),
    }


def described_text(artifact: AdapterArtifact, description: dict[str, Any]) -> str:
    """Return what `inspect` prints of an adapter: facts, a table by kind of module, a picture."""
    base = description["base_model"]
    base = base.get("name") if isinstance(base, dict) else base
    scaling = "alpha / sqrt(rank)" if description["use_rslora"] else "alpha / rank"
    ranks = _span([description["min_rank"], description["max_rank"]])
    has = [key for key in ("probe", "chat_template") if description[f"has_{key}"]]
    facts = [
        f"{artifact.folder}",
        f"  base model  {shown(base) if base else 'not named'}",
        f"  modules     {len(artifact.modules)}, rank {ranks}, {description['total_rank']} in all",
        f"  scaling     {scaling}",
        f"  size        {description['num_bytes'] / 1e6:.1f} MB",
        f"  brings      {', '.join(has).replace('_', ' ') or 'no probe, no chat template'}",
    ]
    norms = {m["name"]: m["norm"] for m in description["modules"] if "norm" in m}
    return "\n".join([*facts, "", _kinds_table(artifact, norms), "", rank_picture(artifact)])


def rank_picture(artifact: AdapterArtifact) -> str:
    """Return a line for each kind of module with a bar for each layer, as high as its rank."""
    by_kind: dict[str, dict[int, int]] = {}
    for name, (kind, layer) in _kinds(artifact).items():
        by_kind.setdefault(kind, {})[layer] = artifact.modules[name].rank
    highest = max(max(ranks.values()) for ranks in by_kind.values())
    num_layers = 1 + max(max(ranks) for ranks in by_kind.values())
    shown_kinds = list(by_kind.items())[:_MAX_KINDS]
    width = max(len(kind) for kind, _ in shown_kinds)
    lines = [f"rank by layer, {_BARS[0]} 1 to {_BARS[-1]} {highest}, {_ABSENT} none"]
    ticks = "".join(f"{layer:<10}" for layer in range(0, num_layers, 10)).rstrip()
    lines.append(f"{'':{width}}  {ticks}")
    for kind, ranks in shown_kinds:
        bars = "".join(
            _bar(ranks[layer], highest) if layer in ranks else _ABSENT
            for layer in range(num_layers if len(ranks) > 1 else max(ranks) + 1)
        )
        lines.append(f"{kind:{width}}  {bars}")
    if len(by_kind) > len(shown_kinds):
        lines.append(f"and {len(by_kind) - len(shown_kinds)} more kinds of module")
    return "\n".join(lines)


def _kinds(artifact: AdapterArtifact) -> dict[str, tuple[str, int]]:
    """Return for each module what it is called in every layer, and its layer; 0 if in none.

    Stacks of layers, as an encoder's and a decoder's, are told apart if there are several.
    """
    matches = {}
    for name in artifact.modules:
        match = _LAYER.fullmatch(name)
        if match is not None and int(match["layer"]) < _MAX_LAYERS:
            matches[name] = match
    several = len({match["before"] for match in matches.values()}) > 1
    kinds = {}
    for name in artifact.modules:
        if name not in matches:
            kinds[name] = (name, 0)
            continue
        before, layer, kind = matches[name].group("before", "layer", "kind")
        kinds[name] = (f"{before}.*.{kind}" if several else kind, int(layer))
    return kinds


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    parts = name.split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _bar(rank: int, highest: int) -> str:
    return _BARS[round((rank - 1) * (len(_BARS) - 1) / max(highest - 1, 1))]


def _kinds_table(artifact: AdapterArtifact, norms: dict[str, float]) -> str:
    kinds: dict[str, list[LoraModule]] = {}
    for name, (kind, _) in _kinds(artifact).items():
        kinds.setdefault(kind, []).append(artifact.modules[name])
    rows = []
    for kind, modules in list(kinds.items())[:_MAX_KINDS]:
        shapes = {f"{module.out_features} x {module.in_features}" for module in modules}
        row = [
            kind,
            len(modules),
            _span([module.rank for module in modules]),
            _span([module.scaling for module in modules]),
            shapes.pop() if len(shapes) == 1 else "differ",
            "/".join(sorted({m.lora_a.dtype for m in modules} | {m.lora_b.dtype for m in modules})),
            f"{sum(module.num_bytes for module in modules) / 1e6:.2f}",
        ]
        rows.append(row + ([_span([norms[m.name] for m in modules])] if norms else []))
    header = ["module", "number", "rank", "scaling", "out x in", "dtype", "MB"]
    return table([*header, "|delta|"] if norms else header, rows)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}-{high}"


def receipt_text(found: Receipt) -> str:
    """Return a receipt in a few lines."""
    norms = [module.norm for module in found.matched]
    trained = {True: "yes, by fingerprint", False: "no, another fingerprint", None: "not said"}
    lines = [
        f"on base model {found.base} (fingerprint {found.base_fingerprint[:12]})",
        f"  trained on it  {trained[found.is_trained_on_it]}",
        f"  matched        {len(found.matched)} modules, |delta| {_span(norms) if norms else '-'}, "
        f"{found.num_bytes / 1e6:.1f} MB",
        f"  untouched      {_listed(found.untouched)}",
    ]
    lines += [f"  {problem}" for problem in found.problems[:_MAX_LISTED]]
    if len(found.problems) > _MAX_LISTED:
        lines.append(f"  and {len(found.problems) - _MAX_LISTED} more problems")
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none of the base's linear layers"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} linear layers: {', '.join(names[:3])}{more}"


def compaction_text(found: Compaction) -> str:
    """Return what compaction did in a few lines."""
    left_out = sum(module.new_rank == 0 for module in found.modules)
    before = sum(module.rank for module in found.modules)
    after = sum(module.new_rank for module in found.modules)
    return "\n".join(
        [
            f"ranks        {before} -> {after} over {len(found.modules)} modules"
            + (f", {left_out} left out" if left_out else ""),
            f"size         {found.num_bytes / 1e6:.1f} -> {found.new_num_bytes / 1e6:.1f} MB",
            f"lost         {found.error:.2g} of the whole, at most {found.largest_error:.2g} of a "
            "module",
        ]
    )


def difference_text(found: Difference) -> str:
    """Return a table of two adapters' modules, and how they differ as a whole."""
    rows = [
        (
            module.name,
            *module.ranks,
            *(f"{norm:.4g}" for norm in module.norms),
            "-" if module.cosine is None else f"{module.cosine:.4f}",
            "-" if module.distance is None else f"{module.distance:.4g}",
        )
        for module in sorted(found.modules, key=lambda module: _natural(module.name))
    ]
    header = ["module", "rank", "rank'", "|delta|", "|delta'|", "cosine", "|difference|"]
    cosine = "none" if found.cosine is None else f"{found.cosine:.4f}"
    distance = "none" if found.relative_distance is None else f"{found.relative_distance:.4g}"
    return f"{table(header, rows)}\n\ncosine of the whole {cosine}, relative distance {distance}"
