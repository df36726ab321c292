"""Module paths as a grid: a row for each layer, a column for each kind of module in it."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class ModuleGrid(NamedTuple):
    """Values by module, laid out.

    Args:
        cells: by (layer, kind of module).
        layers, kinds: rows and columns, in order.
        others: by path, of modules whose path has no number.
    """

    cells: dict[tuple[int, str], float]
    layers: list[int]
    kinds: list[str]
    others: dict[str, float]


def by_layer(values: Mapping[str, float]) -> ModuleGrid:
    """Lay out values by module path; the first number in a path is the layer."""
    cells, others = {}, {}
    matches = {name: re.fullmatch(r"(.*?)\.?\b(\d{1,9})\b\.?(.*)", name) for name in values}
    stems = {match[1] for match in matches.values() if match}
    for name, value in values.items():
        match = matches[name]
        if match is None:
            others[name] = value
        else:
            # Two towers have their own layer 0; one needs no word about where it stands.
            kind = match[3] if len(stems) == 1 else f"{match[1]}.*.{match[3]}"
            cells[int(match[2]), kind] = value
    kinds = sorted({kind for _, kind in cells}, key=_natural)
    return ModuleGrid(cells, sorted({layer for layer, _ in cells}), kinds, others)


def grid_in_words(values: Mapping[str, int], title: str) -> str:
    """Return whole numbers by module as lines of text: a table, and a line for each other path."""
    grid = by_layer(values)
    last_names = [kind.rpartition(".")[2] for kind in grid.kinds]
    heads = last_names if len(set(last_names)) == len(last_names) else grid.kinds
    lines = [title]
    if grid.cells:
        lines.append("  ".join(["layer", *heads]))
        for layer in grid.layers:
            cells = [f"{layer:5}"]
            for kind, head in zip(grid.kinds, heads, strict=True):
                value = grid.cells.get((layer, kind))
                cells.append(f"{'-' if value is None else f'{value:.0f}':>{len(head)}}")
            lines.append("  ".join(cells))
    lines += [f"{name}: {value:.0f}" for name, value in grid.others.items()]
    return "\n".join(lines)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key: numbers within a name by their value."""
    return [(int(n or 0), word) for word, n in re.findall(r"(\D+)(\d{0,9})", text)]
