"""report.html: what a run did, for people, in one file that needs no network and no script.

Owns the page and the choice of pictures; trainer/charts.py draws, trainer/run_log.py reads the log.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters import AdapterArtifact, open_artifact, weights_digest
from adapters.digest import read_provenance
from adapters.errors import ConfigError
from adapters.factors import Delta
from adapters.writer import make_folder, replace_file
from trainer.run_log import RunLog, finite, read_run_log

if TYPE_CHECKING:
    from trainer.charts import Picture

REPORT_FILE = "report.html"
PICTURES_FOLDER = "report"
_MAX_ROUNDS = 16  # of allocation whose ranks are drawn; of more, every second, third ...
_MAX_MOVES = 12  # modules that are named beside a round's picture
_MAX_ROWS = 1000  # of the table of modules; a mixture of experts has tens of thousands
_NONE = "-"
Values = Mapping[str, Any]

_CSS = """
:root { color-scheme: light dark; --line: #8885; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.facts td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.failed { border-left: 4px solid #d33; padding: .5rem 1rem; overflow-wrap: anywhere; }
.note { opacity: .75; font-size: .9rem; }
summary { cursor: pointer; margin: .5rem 0; }
pre { overflow-x: auto; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading with a picture under it.

    Args:
        name: of the picture's file, without an ending.
        title: the heading.
        picture: None if the run has no numbers to draw.
        note: a sentence under the heading, or nothing.
        folded: shown when it is clicked on.
    """

    name: str
    title: str
    picture: "Picture | None"
    note: str = ""
    folded: bool = False


def write_report(run_folder: Path, adapter_folder: Path) -> Path:
    """Write report.html and report/*.png of a run, and return the path of report.html.

    Equal files give equal bytes. A run that failed, and so has no adapter folder, has one too.

    Args:
        run_folder: holds config.json and log.jsonl of the run, and gets the report.
        adapter_folder: what the run exported, if it came so far.

    Raises:
        ConfigError: the run's folder lacks one of the two files, or config.json is no object.
        ArtifactError: the adapter breaks the format.
    """
    config = _read_config(run_folder)
    try:
        log = read_run_log(run_folder / "log.jsonl")
    except FileNotFoundError as error:
        raise _no_run(run_folder, "log.jsonl") from error
    artifact = open_artifact(adapter_folder) if adapter_folder.exists() else None
    origin = read_provenance(adapter_folder) if artifact else {}
    norms = _delta_norms(artifact) if artifact else {}
    in_adapter = finite(_at(origin, "allocation", "rounds_in_adapter"))
    num_in_adapter = len(log.rounds) if in_adapter is None else int(in_adapter)
    sections = [
        *_course_sections(log),
        *_round_sections(log, num_in_adapter),
        module_section(
            "delta_norm",
            "What the adapter changes",
            norms,
            label="Frobenius norm of scaling · B · A",
            note="Blank: a module without an adapter.",
        ),
    ]
    model = _text_at(config, "model") or _text_at(origin, "base_model", "name") or "default model"
    parts = [
        f"<h1>{escape(f'Adapter of {model}')}</h1>",
        f'<p class="failed">The run failed: {escape(log.failure)}</p>' if log.failure else "",
        _facts(_summary(config, log, artifact, origin)),
        _results(log.results),
        _rounds(log, num_in_adapter),
        *map(_section, sections),
        _modules(artifact, norms),
        _folded("Provenance", _facts(_provenance_rows(origin))) if origin else "",
        _folded("Resolved configuration", f"<pre>{escape(_indented(config))}</pre>"),
    ]
    _write_pictures(run_folder / PICTURES_FOLDER, sections)
    replace_file(run_folder / REPORT_FILE, _page(model, parts).encode(errors="replace"))
    return run_folder / REPORT_FILE


def module_section(
    name: str, title: str, values: Mapping[str, float], *, label: str, note: str = ""
) -> Section:
    """Return a section with a heat map of values by layer and kind of module.

    Args:
        name: of the picture's file, without an ending.
        title: the heading.
        values: by module path; a module that has none stays blank.
        label: what the values are.
        note: a sentence under the heading, or nothing.
    """
    from trainer.charts import draw_modules  # noqa: PLC0415  (imports matplotlib)

    return Section(name, title, draw_modules(name, values, label) if values else None, note)


def _course_sections(log: RunLog) -> list[Section]:
    """Return loss, learning rate and gradient norm over steps."""
    from trainer.charts import draw_course, draw_log_course, draw_losses  # noqa: PLC0415

    loss, rate, norm = map(log.course, ("loss", "learning_rate", "gradient_norm"))
    unusable = log.num_steps - len(loss)
    draw_norm = draw_log_course if norm.spans_decades else draw_course
    any_loss = len(loss) or log.eval_losses
    return [
        Section(
            "loss",
            "Loss",
            draw_losses("loss", loss, log.eval_losses, log.best_step) if any_loss else None,
            f"{unusable} of {log.num_steps} steps have no finite loss." if unusable else "",
        ),
        Section(
            "learning_rate",
            "Learning rate",
            draw_course("learning_rate", rate, "learning rate") if len(rate) else None,
        ),
        Section(
            "gradient_norm",
            "Gradient norm",
            draw_norm("gradient_norm", norm, "norm before clipping") if len(norm) else None,
        ),
    ]


def _round_sections(log: RunLog, num_in_adapter: int) -> list[Section]:
    """Return what allocation did: the adapter's ranks and scores, and, folded, other rounds'."""
    sections = []
    every = max(1, math.ceil(len(log.rounds) / _MAX_ROUNDS))
    drawn = log.rounds[::-1][::every]
    last = next((row for row in drawn if row["round"] <= num_in_adapter), None)
    for row in drawn[::-1]:
        number, is_last = row["round"], row is last
        later = "" if number <= num_in_adapter else ", not in the adapter"
        section = module_section(
            f"ranks_{number}",
            f"Ranks after round {number}{later}",
            _numbers(row.get("ranks")),
            label="rank",
            note=_moves(row),
        )
        sections.append(replace(section, folded=not is_last))
        if is_last and _numbers(row.get("mean_scores")):
            scores = module_section(
                "scores",
                f"Importance in round {number}",
                _numbers(row.get("mean_scores")),
                label="mean score of a module's ranks",
                note="Loss without a rank less the loss with it alone. Blank: no rank.",
            )
            sections.append(scores)
    # The last first, and what came before behind it.
    return sorted(sections, key=lambda section: section.folded)


def _moves(row: Values) -> str:
    """Return which modules lost and got ranks in a round."""

    def listed(counts: Mapping[str, float]) -> str:
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count:.0f}" for name, count in ordered[:_MAX_MOVES])
        more = len(ordered) - _MAX_MOVES
        return f"{shown}, and {more} more modules" if more > 0 else shown or "none"

    lost, got = _numbers(row.get("pruned")), _numbers(row.get("grown"))
    return f"Pruned: {listed(lost)}. Grown: {listed(got)}."


def _rounds(log: RunLog, num_in_adapter: int) -> str:
    """Return the table of allocation's rounds."""
    if not log.rounds:
        return ""
    head = ("Round", "Step", "Score", "Ranks", "Parameters", "Loss", "without adapter", "Seconds")
    rows = []
    for row in log.rounds:
        losses = (finite(row.get(key)) for key in ("loss", "base_loss"))
        seconds = finite(row.get("seconds"))
        rows.append(
            (
                str(row["round"]),
                _number(row.get("step")) or _NONE,
                str(row.get("score", _NONE)),
                f"{sum(_numbers(row.get('ranks')).values()):,.0f}",
                _number(row.get("num_parameters")) or _NONE,
                *(_NONE if loss is None else f"{loss:.4f}" for loss in losses),
                _NONE if seconds is None else f"{seconds:.1f}",
            )
        )
    note = "Losses are those of the samples that importance was measured on, before the move."
    if num_in_adapter < len(log.rounds):
        note += f" The adapter has its best weights, after round {num_in_adapter}."
    return f'<h2>Allocation of ranks</h2><p class="note">{note}</p>{_table(head, rows)}'


def _numbers(values: object) -> dict[str, float]:
    """Return what is a finite number of a mapping from a file."""
    found = {str(k): finite(v) for k, v in (values if isinstance(values, dict) else {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def _summary(
    config: Values, log: RunLog, artifact: AdapterArtifact | None, origin: Values
) -> list[tuple[str, str]]:
    """Return what was trained, as rows of name and value."""
    modules = list(artifact.modules.values()) if artifact else []
    scoring = [finite(row.get("seconds")) or 0.0 for row in log.rounds]
    measuring = f", and {_duration(sum(scoring))} for measuring ranks" if scoring else ""
    samples = log.num_samples
    if samples is None:
        samples = _at(origin, "training", "num_samples")
    rows = [
        ("Base model", _text_at(origin, "base_model", "name") or _text_at(config, "model")),
        ("Method", _text_at(config, "adapter", "method")),
        ("Rank", _span([module.rank for module in modules]) or _text_at(config, "adapter", "rank")),
        ("Alpha", _span([m.alpha for m in modules]) or _text_at(config, "adapter", "alpha")),
        ("Scaling", _span([module.scaling for module in modules])),
        ("Modules", f"{len(modules)}" if modules else ""),
        ("Samples", _number(samples)),
        ("Tokens", f"{log.num_tokens:,}"),
        ("Steps", f"{log.num_steps:,}"),
        ("Time", _duration(log.seconds) + measuring),
        ("Weights", f"sha256:{weights_digest(artifact)}" if artifact else "no adapter"),
    ]
    return [(name, value) for name, value in rows if value]


def _results(results: Mapping[str, Values]) -> str:
    """Return the table of held-out results, base against adapter."""
    rows = []
    for name, result in results.items():
        base, adapter = (
            side if isinstance(side, dict) else {}
            for side in (result.get("base"), result.get("adapter"))
        )
        losses = [finite(side.get("loss")) for side in (base, adapter)]
        accuracies = [finite(side.get("accuracy")) for side in (base, adapter)]
        if not base and not adapter:
            continue
        rows.append(
            (
                name,
                *(_NONE if loss is None else f"{loss:.4f}" for loss in losses),
                *(_NONE if share is None else f"{share:.1%}" for share in accuracies),
                _text_at(adapter, "by") or _NONE,
                _number(adapter.get("num_samples", base.get("num_samples"))) or _NONE,
            )
        )
    if not rows:
        return ""
    head = ("Set", "Loss, base", "adapter", "Accuracy, base", "adapter", "Judged by", "Samples")
    return f"<h2>Held-out results</h2>{_table(head, rows)}"


def _section(section: Section) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    if section.picture is None:
        body = '<p class="note">The run has no numbers to draw here.</p>'
    else:
        label = escape(section.title)
        body = f'<figure role="img" aria-label="{label}">{section.picture.svg}</figure>'
    if section.folded:
        return _folded(section.title, note + body)
    return f"<section><h2>{escape(section.title)}</h2>{note}{body}</section>"


def _modules(artifact: AdapterArtifact | None, norms: Mapping[str, float]) -> str:
    """Return the folded table of modules in numbers."""
    if artifact is None:
        return ""
    modules = list(artifact.modules.values())
    rows = [
        (module.name, f"{module.rank}", f"{module.scaling:.4g}", f"{norms[module.name]:.4g}")
        for module in modules[:_MAX_ROWS]
    ]
    title = f"Modules, {len(rows)} of {len(modules)}" if len(rows) < len(modules) else "Modules"
    return _folded(title, _table(("Module", "Rank", "Scaling", "Norm of delta"), rows))


def _provenance_rows(origin: Values) -> list[tuple[str, str]]:
    versions = _at(origin, "training", "versions")
    rows = [
        ("Base fingerprint", _text_at(origin, "base_model", "fingerprint")),
        ("Data sha256", _text_at(origin, "training", "data_sha256")),
        ("Seed", _text_at(origin, "training", "seed")),
        *((versions if isinstance(versions, dict) else {}).items()),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _delta_norms(artifact: AdapterArtifact) -> dict[str, float]:
    # Weights that are not finite, or whose product is not, are blank in the picture.
    with np.errstate(all="ignore"):
        norms = {m.name: Delta(a, b, m.scaling).norm() for m, a, b in artifact.read_tensors()}
    return {name: norms[name] for name in artifact.modules}


def _write_pictures(folder: Path, sections: Sequence[Section]) -> None:
    make_folder(folder)
    for section in sections:
        path = folder / f"{section.name}.png"
        if section.picture is None:
            path.unlink(missing_ok=True)  # of an earlier report
        else:
            replace_file(path, section.picture.png)


def _page(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of names and values, which breaks long values."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in rows
    )
    return f'<table class="facts">\n{lines}</table>'


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table with a line of headings, which scrolls sideways when it is too wide."""

    def line(tag: str, cells: tuple[str, ...]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>\n"

    lines = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>\n{lines}</table></div>'


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _read_config(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _no_run(run_folder, path.name) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is no JSON, a run's configuration is expected") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds no JSON object, a run's configuration is expected")
    return config


def _no_run(folder: Path, missing: str) -> ConfigError:
    return ConfigError(
        f"{folder}: holds no {missing}, the output folder of a run is expected; name that"
    )


def _at(values: Values, *keys: str) -> Any:
    """Return what stands under nested keys, or None."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _text_at(values: Values, *keys: str) -> str:
    found = _at(values, *keys)
    return "" if found is None else str(found)


def _number(value: object) -> str:
    number = finite(value)
    return "" if number is None else f"{number:,.0f}"


def _span(values: Sequence[float]) -> str:
    """Return one number, or from the least to the largest, or nothing of none."""
    ends = sorted({min(values), max(values)}) if values else []
    return " to ".join(f"{value:.5g}" for value in ends)


def _duration(seconds: float) -> str:
    whole = math.floor(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {whole % 60:02} s"


def _indented(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
