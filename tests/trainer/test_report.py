import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from numpy.typing import NDArray

from adapters import AdapterConfig, open_artifact, weights_digest, write_artifact
from adapters.errors import ArtifactError, ConfigError
from tests.workloads import formed_deltas, write_lines
from trainer.charts import draw_losses, draw_modules
from trainer.report import module_section, write_report
from trainer.run_log import Course, read_run_log

CONFIG = {"model": None, "adapter": {"method": "rora", "rank": 4, "alpha": 8.0}}
RESULT = {
    "base": {"loss": 3.25, "accuracy": 0.25, "by": "choice", "num_samples": 40},
    "adapter": {"loss": 1.5, "accuracy": 0.875, "by": "choice", "num_samples": 40},
}


def step_row(step: int, **more: object) -> dict[str, object]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 3 / step,
        "learning_rate": 1e-3 / step,
        "gradient_norm": 0.5 + 0.1 * (step % 3),
        "num_tokens": 100,
        "seconds": 0.5 * step,
    } | more


ROWS: list[object] = [
    *(step_row(step) for step in range(1, 6)),
    {"step": 5, "eval_loss": {"default": 1.75, "other": 2.5}, "best": True},
    *(step_row(step) for step in range(6, 11)),
    {"step": 10, "eval_loss": {"default": 1.5, "other": 2.75}, "best": False},
    {"evaluation": {"default": RESULT}},
]


def make_run(folder: Path, rows: list[object] | None = None, config: object = CONFIG) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "log.jsonl", ROWS if rows is None else rows)
    return folder


class Page(HTMLParser):
    """What a browser would see of a page: tags with attributes, texts, cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._is_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._is_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._is_cell = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._is_cell:
            self.rows[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def facts(self) -> dict[str, str]:
        return {row[0]: row[1] for row in self.rows if len(row) == 2}


def page_of(run: Path, adapter: Path) -> Page:
    return Page(write_report(run, adapter).read_text())


def texts_of(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def course_of(values: Sequence[float] | NDArray[np.float64]) -> Course:
    return Course(np.arange(len(values), dtype=np.float64), np.array(values, np.float64))


def assert_needs_nothing_else(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                assert (value or "").startswith("#")
            # Namespaces are names, never fetched.
            if not name.startswith("xmlns"):
                assert "//" not in (value or "")
                assert "url(" not in (value or "").replace("url(#", "")
    assert "@import" not in "".join(page.texts)


def test_a_report_is_one_file_that_needs_nothing_else(tmp_path: Path, adapter: Path) -> None:
    run = make_run(tmp_path / "run")
    page = page_of(run, adapter)
    assert_needs_nothing_else(page)
    assert page.count("figure") == page.count("svg") == 4
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    targets = {
        (attributes.get("xlink:href") or "#")[1:] for tag, attributes in page.tags if tag == "use"
    }
    assert targets
    assert targets <= set(ids)
    names = ["delta_norm", "gradient_norm", "learning_rate", "loss"]
    pngs = sorted((run / "report").iterdir())
    assert [path.name for path in pngs] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in pngs)


def round_row(number: int) -> dict[str, object]:
    ranks = {f"model.layers.{layer}.{kind}_proj": 4 for layer in range(3) for kind in "qv"}
    lost, got = "model.layers.0.q_proj", "model.layers.2.v_proj"
    moved = {lost: 4 - number, got: 4 + number}
    return {
        "step": 2 * number,
        "allocation": {
            "round": number, "step": 2 * number, "score": "gradient", "seconds": 1.25,
            "loss": 1.5, "base_loss": 2.5, "ranks": ranks | moved, "num_parameters": 12_345,
            "mean_scores": dict.fromkeys(ranks, 0.25), "pruned": {lost: 1},
            "grown": {got: 1},
        },
    }  # fmt: skip


def test_ranks_are_drawn_after_each_round(tmp_path: Path) -> None:
    rounds: list[object] = [round_row(number) for number in (1, 2, 3)]
    run = make_run(tmp_path / "run", [*ROWS, *rounds])
    page = page_of(run, tmp_path / "none")
    assert_needs_nothing_else(page)
    rows = [row for row in page.rows if len(row) == 8]
    assert [row[:5] for row in rows[1:]] == [
        [str(number), str(2 * number), "gradient", "24", "12,345"] for number in (1, 2, 3)
    ]
    assert rows[1][5:] == ["1.5000", "2.5000", "1.2"]
    assert ["Time", "5.0 s, and 3.8 s for measuring ranks"] in page.rows
    text = " ".join(page.texts)
    assert "Pruned: model.layers.0.q_proj 1. Grown: model.layers.2.v_proj 1." in text
    pictures = {path.name for path in (run / "report").iterdir()}
    assert {"ranks_1.png", "ranks_2.png", "ranks_3.png", "scores.png"} <= pictures
    # The last one is open, the others are folded behind it.
    titles = [t for t in page.texts if t.startswith(("Ranks after", "Importance in"))]
    assert titles == [
        "Ranks after round 3", "Importance in round 3", "Ranks after round 1", "Ranks after round 2"
    ]  # fmt: skip


def test_rounds_that_are_not_in_the_adapter_are_said_to_be_so(
    tmp_path: Path, adapter: Path
) -> None:
    path = adapter / "rora.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"allocation": {"rounds_in_adapter": 1}})
    )
    rounds: list[object] = [round_row(number) for number in (1, 2)]
    page = page_of(make_run(tmp_path / "run", [*ROWS, *rounds]), adapter)
    titles = [t for t in page.texts if t.startswith("Ranks after")]
    assert titles == ["Ranks after round 1", "Ranks after round 2, not in the adapter"]
    assert "The adapter has its best weights, after round 1." in " ".join(page.texts)


def test_a_hundred_rounds_are_not_a_hundred_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [*ROWS, *(round_row(number) for number in range(1, 101))])
    page_of(run, tmp_path / "none")
    pictures = [path for path in (run / "report").iterdir() if path.name.startswith("ranks_")]
    assert len(pictures) == 15
    assert run / "report" / "ranks_100.png" in pictures


def test_odd_rounds_are_passed_over(tmp_path: Path) -> None:
    odd: list[object] = [
        {"step": 1, "allocation": row}
        for row in (
            7, {"round": "x"}, {"round": -1}, {"round": 10**400}, {"round": 1},
            {"round": 2, "ranks": [1], "pruned": 5, "grown": {"a": "b"}, "loss": "<b>"},
            {"round": 3, "ranks": {"a.0.b": float("nan")}, "pruned": {"a.0.b": 3}},
        )
    ]  # fmt: skip
    page = page_of(make_run(tmp_path / "run", [*ROWS, *odd]), tmp_path / "none")
    assert [row[0] for row in page.rows if len(row) == 8] == ["Round", "1", "2", "3"]


def test_a_page_with_a_script_or_an_address_would_be_noticed() -> None:
    for text in (
        "<script>1</script>",
        '<a href="https://example.org">x</a>',
        '<p style="background: url(//example.org/x)">x</p>',
        '<p onclick="x()">x</p>',
    ):
        with pytest.raises(AssertionError):
            assert_needs_nothing_else(Page(text))


def test_the_head_says_what_was_trained(tmp_path: Path, adapter: Path) -> None:
    rows = [{"num_samples": 1234}, *ROWS]
    page = page_of(make_run(tmp_path / "run", rows), adapter)
    facts = page.facts()
    artifact = open_artifact(adapter)
    assert facts["Method"] == "rora"
    assert facts["Rank"] == "4"
    assert facts["Alpha"] == "8"
    assert facts["Scaling"] == "4"
    assert facts["Modules"] == str(len(artifact.modules))
    assert facts["Samples"] == "1,234"
    assert facts["Tokens"] == "1,000"
    assert facts["Steps"] == "10"
    assert facts["Time"] == "5.0 s"
    assert facts["Weights"] == f"sha256:{weights_digest(artifact)}"
    assert ["default", "3.2500", "1.5000", "25.0%", "87.5%", "choice", "40"] in page.rows
    config = next(text for text in page.texts if text.startswith("{"))
    assert json.loads(config) == CONFIG


def test_the_norms_are_those_of_the_formed_deltas(tmp_path: Path, adapter: Path) -> None:
    page = page_of(make_run(tmp_path / "run"), adapter)
    stated = {row[0]: row[1:] for row in page.rows if row[0].startswith("model.")}
    assert stated == {
        name: ["4", "4", f"{np.linalg.norm(delta):.4g}"]
        for name, delta in formed_deltas(adapter).items()
    }


def test_names_from_files_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile = '</svg></pre></title><script>alert(1)</script><img src=x onerror="x()">'
    module = "base.0.linear"
    ones = np.ones((2, 3), np.float32)
    adapter = tmp_path / "adapter"
    write_artifact(
        adapter,
        AdapterConfig(rank=2, lora_alpha=2, use_rslora=False, target_modules=("linear",)),
        {module: (ones, ones.T)},
        provenance={
            "base_model": {"name": hostile, "fingerprint": hostile},
            "training": {"versions": {hostile: hostile}, "seed": hostile},
        },
    )
    rows: list[object] = [
        *ROWS,
        {"step": 10, "eval_loss": {hostile: 1.0, "_hidden": 2.0, "$x^{2$": 3.0, "a\nb\x01": 4.0}},
        {"evaluation": {hostile: {"adapter": {"loss": 1.0, "by": hostile}}}},
        {"failed": hostile},
    ]
    config = {"model": hostile, "adapter": {"method": hostile}, hostile: hostile}
    page = page_of(make_run(tmp_path / "run", rows, config), adapter)
    assert_needs_nothing_else(page)
    assert page.count("svg") == 4
    text = "".join(page.texts)
    # Title, heading, failure, base model, method, set, judge, fingerprint, seed, version.
    assert text.count(hostile) >= 10
    assert "$x^{2$" in text
    assert "_hidden" in text
    assert "a\ufffdb\ufffd" in text


def test_equal_input_gives_equal_bytes(tmp_path: Path, adapter: Path) -> None:
    def content(run: Path) -> dict[str, bytes]:
        write_report(run, adapter)
        return {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    first, again = (content(make_run(tmp_path / name)) for name in ("a", "b"))
    assert first == again == content(tmp_path / "a")
    changed = [*ROWS[:-1], step_row(11)]
    other = content(make_run(tmp_path / "c", changed))
    for name in ("report.html", "loss.png", "learning_rate.png", "gradient_norm.png"):
        assert other[name] != first[name]
    assert other["delta_norm.png"] == first["delta_norm.png"]


def test_drawing_leaves_no_settings_behind(tmp_path: Path, adapter: Path) -> None:
    before = dict(mpl.rcParams)
    write_report(make_run(tmp_path / "run"), adapter)
    assert dict(mpl.rcParams) == before


def test_matplotlib_is_imported_by_the_first_report_only() -> None:
    program = "import sys, trainer.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_failed_run_has_a_report_without_an_adapter(tmp_path: Path, adapter: Path) -> None:
    run = make_run(tmp_path / "run")
    write_report(run, adapter)
    write_lines(run / "log.jsonl", [*ROWS[:3], {"failed": "step 4: loss nan"}])
    page = page_of(run, tmp_path / "absent")
    assert "The run failed: step 4: loss nan" in page.texts
    assert page.facts()["Weights"] == "no adapter"
    assert page.facts()["Rank"] == "4"
    assert page.count("svg") == 3
    assert not (run / "report" / "delta_norm.png").exists()


def test_a_log_without_a_step_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [{"failed": "stopped"}])
    page = page_of(run, tmp_path / "absent")
    assert page.count("svg") == 0
    assert page.facts()["Steps"] == "0"
    assert list((run / "report").iterdir()) == []


def test_odd_rows_and_values_are_passed_over(tmp_path: Path, adapter: Path) -> None:
    run = make_run(tmp_path / "run")
    odd_values: list[object] = ["NaN", None, True, [], {}]
    odd: list[object] = [
        *(step_row(11, loss=value) for value in odd_values),
        step_row(12, loss=math.nan, gradient_norm=math.inf, learning_rate=-math.inf),
        step_row(13, loss=1e308, gradient_norm=10**400),
        {"step": 14, "loss": 0.25},
        {"step": 2**70, "loss": 1.0},
        {"step": "15", "loss": 1.0},
        {"step": -1, "loss": 1.0},
        {"step": True, "loss": 1.0},
        {"step": 5, "eval_loss": {"default": math.nan, "gone": None}},
        {"step": 5, "eval_loss": 7},
        {"evaluation": {"empty": {}, "text": "x", "partial": {"base": {"loss": None}}}},
        {"evaluation": []},
        {"unknown": 1},
        [],
        None,
    ]
    with (run / "log.jsonl").open("ab") as log:
        log.write("".join(json.dumps(row) + "\n" for row in odd).encode())
        log.write(b"\xff\xfe\n" + b"[" * 100_000 + b'\n{"step": 16, "lo')
    found = read_run_log(run / "log.jsonl")
    assert list(found.steps) == [*range(1, 15)]
    losses = found.course("loss")
    assert losses.steps.tolist() == [*range(1, 11), 14]
    assert losses.values[-1] == 0.25
    assert list(found.eval_losses) == ["default", "other"]
    assert found.eval_losses["default"].steps.tolist() == [10]
    page = page_of(run, adapter)
    assert page.count("svg") == 4
    assert "3 of 14 steps have no finite loss." in page.texts
    assert ["partial", *"------"] in page.rows


def test_a_resumed_run_is_read_as_one(tmp_path: Path) -> None:
    rows = [
        *(step_row(step) for step in (1, 2, 3)),
        {"step": 2, "eval_loss": {"default": 2.0}, "best": True},
        {"failed": "stopped"},
        step_row(3, loss=0.5, seconds=0.25),  # from the checkpoint of step 2, on a new clock
        step_row(4, loss=0.25, seconds=0.5),
    ]
    log = read_run_log(write_lines(tmp_path / "log.jsonl", rows))
    assert log.course("loss").values.tolist() == [3, 1.5, 0.5, 0.25]
    assert log.seconds == pytest.approx(1.0 + 0.5)
    assert log.failure is None
    assert log.best_step == 2


def test_the_best_step_is_marked() -> None:
    course = course_of([3.0, 2.0, 1.0])
    marked = draw_losses("loss", course, {"held out": course}, 2)
    assert {"training", "held out", "best, step 2"} <= set(texts_of(marked.svg))
    assert "training" not in texts_of(draw_losses("loss", course, {}, None).svg)


def test_the_gradient_norm_is_logarithmic_when_it_spans_decades(tmp_path: Path) -> None:
    def ticks(name: str, norms: list[float]) -> list[str]:
        rows: list[object] = [step_row(i, gradient_norm=n) for i, n in enumerate(norms, 1)]
        run = make_run(tmp_path / name, rows)
        text = write_report(run, tmp_path / "absent").read_text()
        return texts_of(text[text.index('id="gradient_norm-figure_1"') :])

    assert {"0.01", "0.1", "1", "10"} <= set(ticks("wide", [0.005, 0.0, 50.0]))
    assert "10" not in ticks("narrow", [0.5, 0.75, 1.5])


def test_a_course_is_thinned_to_its_extremes_and_ends() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=100_000)
    values[[31_415, 92_653]] = 50.0, -50.0
    course = course_of(values)
    thin = course.thinned(1000)
    assert 500 < len(thin) <= 1000
    assert (thin.values.max(), thin.values.min()) == (50.0, -50.0)
    assert thin.steps[[0, -1]].tolist() == [0, 99_999]
    assert (np.diff(thin.steps) > 0).all()
    assert (values[thin.steps.astype(int)] == thin.values).all()
    assert course.thinned(100_000) is course


def test_smoothing_is_a_weighted_mean_of_the_past() -> None:
    values = np.array([4.0, 1.0, 3.0, 8.0])
    smooth = course_of(values).smoothed().values
    keep = 1 - 2 / 11
    for n in range(4):
        weights = [keep ** (n - i) for i in range(n + 1)]
        mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert smooth[n] == pytest.approx(mean)


def test_a_hundred_thousand_steps_give_a_small_page(tmp_path: Path, adapter: Path) -> None:
    rows: list[object] = [
        step_row(n, loss=2 + math.sin(n * n), gradient_norm=1.5 + math.cos(n * n))
        for n in range(1, 100_001)
    ]
    report = write_report(make_run(tmp_path / "run", rows), adapter)
    assert report.stat().st_size < 1_000_000
    assert Page(report.read_text()).facts()["Steps"] == "100,000"


def test_a_module_without_a_value_is_blank_and_zero_is_not() -> None:
    values = {
        "model.layers.0.q": 0.0,
        "model.layers.0.k": 7.25,
        "model.layers.10.k": math.nan,
        "model.layers.10.v": 0.5,
        "lm_head": 3.0,
    }
    picture = draw_modules("norm", values, "the label")
    cells = re.search(r'id="norm-QuadMesh_1">(.*?)</g>', picture.svg, re.S)
    assert cells
    fills = re.findall(r"fill: ([^;\"]*)", cells[1])
    # Rows are layers 0 and 10, columns k, q, v.
    assert [fill == "none" for fill in fills] == [False, False, True, True, True, False]
    assert fills[1] != fills[0] != fills[5] != fills[1]
    texts = texts_of(picture.svg)
    assert {"0", "10", "k", "q", "v", "7.25", "0.5", "lm_head", "the label"} <= set(texts)
    assert "nan" not in texts


def test_values_without_layers_are_bars(tmp_path: Path) -> None:
    picture = draw_modules("norm", {"lm_head": 3.0, "a_" + "x" * 80: -math.inf}, "norm")
    assert "QuadMesh" not in picture.svg
    assert "lm_head" in texts_of(picture.svg)
    assert any(text.endswith("x…") for text in texts_of(picture.svg))
    assert module_section("rank", "Ranks", {}, label="rank").picture is None
    assert not any(tmp_path.iterdir())


def test_two_towers_keep_their_layers_apart() -> None:
    values = {"text.layers.0.q": 1.25, "vision.layers.0.q": 2.5}
    texts = texts_of(draw_modules("norm", values, "norm").svg)
    assert {"text.layers.*.q", "vision.layers.*.q", "1.25", "2.5"} <= set(texts)


def test_tens_of_thousands_of_modules_stay_small() -> None:
    values = {f"model.layers.{n}.experts.{e}.up": n + e for n in range(60) for e in range(128)}
    assert len(draw_modules("norm", values, "norm").svg) < 400_000


def test_a_thousand_layers_or_bars_are_drawn_all_the_same() -> None:
    layers = draw_modules("norm", {f"layers.{n}.up": float(n) for n in range(3000)}, "norm")
    assert {"layer", "0", "2925"} <= set(texts_of(layers.svg))
    bars = draw_modules("norm", {f"up_{n}": float(n) for n in range(3000)}, "norm")
    assert {"up_2999", "up_2900", "norm, 100 largest of 3000"} <= set(texts_of(bars.svg))
    assert "up_2899" not in texts_of(bars.svg)


@pytest.mark.parametrize("missing", ["config.json", "log.jsonl"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run")
    (run / missing).unlink()
    with pytest.raises(ConfigError, match=rf"run: holds no {missing}, .* is expected"):
        write_report(run, tmp_path / "absent")


@pytest.mark.parametrize(("content", "found"), [("{", "is no JSON"), ("[]", "no JSON object")])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: str, found: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{found}"):
        write_report(run, tmp_path / "absent")


def test_a_broken_adapter_is_not_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ArtifactError):
        write_report(run, tmp_path / "adapter")
    assert not (run / "report.html").exists()
