"""rora-adapters as a user meets it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import AdapterConfig, AdapterStore, open_artifact, write_artifact
from adapters.cli import main
from adapters.probe import Answer, Probe, ProbePrompt
from adapters.verdict import Found, compare
from tests.adapters.hostile.build import QUERY, change_keys, right, write_zip
from tests.conftest import LINEAR
from tests.workloads import make_random_adapter

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def ranked(tmp_path: Path, tiny_model: Path) -> Path:
    config = AdapterConfig(
        4,
        8,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 16},
        target_modules=LINEAR[:-1],
    )
    return make_random_adapter(
        tmp_path / "ranked", tiny_model, config=config, modules=LINEAR[:-1], seed=1
    )


def run(*arguments: object, expect: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == expect


def read_json(capsys: Capture) -> Any:
    return json.loads(capsys.readouterr().out)


def test_inspect_shows_facts_a_table_and_a_picture(
    tmp_path: Path, tiny_model: Path, capsys: Capture
) -> None:
    config = AdapterConfig(
        4,
        8,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 16},
        target_modules=("q_proj", "k_proj"),
    )
    folder = make_random_adapter(
        tmp_path / "a", tiny_model, config=config, modules=("q_proj", "k_proj"), seed=1
    )
    run("inspect", folder)
    out = capsys.readouterr().out
    assert "4, rank 4-16, 28 in all" in out
    assert "alpha / sqrt(rank)" in out
    table = next(line for line in out.splitlines() if line.startswith("self_attn.q_proj  "))
    assert table.split()[1:] == ["2", "4-16", "2-4", "48", "x", "48", "F32", "0.01"]
    picture = [line.split() for line in out.splitlines() if line.endswith(("█▂", "▂▂"))]
    assert picture == [["self_attn.k_proj", "▂▂"], ["self_attn.q_proj", "█▂"]]


def test_inspect_prints_json_for_machines(ranked: Path, adapter: Path, capsys: Capture) -> None:
    run("inspect", ranked, adapter, "--json")
    first, second = read_json(capsys)
    assert (first["folder"], second["folder"]) == (str(ranked), str(adapter))
    assert {module["name"]: module["rank"] for module in first["modules"]} == {
        module.name: module.rank for module in open_artifact(ranked).modules.values()
    }
    assert "norm" not in first["modules"][0]
    run("inspect", adapter, "--json", "--norms")
    assert all(module["norm"] > 0 for module in read_json(capsys)[0]["modules"])


def test_inspect_reads_no_weights(ranked: Path, capsys: Capture) -> None:
    """A weights file whose numbers are gone, and whose length is right, is inspected alike."""
    run("inspect", ranked, "--json")
    before = read_json(capsys)
    weights = ranked / "adapter_model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    content = weights.read_bytes()
    weights.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    run("inspect", ranked, "--json")
    assert read_json(capsys) == before


def test_validate_says_every_problem_and_note(tmp_path: Path, capsys: Capture) -> None:
    good, bad = right(tmp_path / "good"), right(tmp_path / "bad")
    (good / "optimizer.pt").write_bytes(b"pickle")
    change_keys(bad, r=5, use_dora=True, alpha_pattern={"nobody": 2}, target_modules=["q_proj"])
    run("validate", good)
    assert capsys.readouterr().out.splitlines() == [
        f"{good}: right",
        "  note: never opened and not stored: optimizer.pt",
    ]
    run("validate", good, bad, expect=1)
    out = capsys.readouterr().out
    assert f"{bad}: 4 problems" in out
    for code in ("kind-dora", "rank-config", "pattern-without-match", "target-missing"):
        assert f"[{code}]" in out
    run("validate", good, bad, "--json", expect=1)
    reports = read_json(capsys)
    assert [len(report["problems"]) for report in reports] == [0, 4]
    assert reports[1]["problems"][0]["code"] == "kind-dora"
    assert reports[0]["notes"] == ["never opened and not stored: optimizer.pt"]


def test_validate_gives_a_receipt_for_a_base_model(
    ranked: Path, tiny_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    run("validate", ranked, "--model", tiny_model)
    out = capsys.readouterr().out
    assert "on base model model" in out
    assert "matched        12 modules" in out
    assert "untouched      2 linear layers: model.layers.0.mlp.down_proj" in out
    run("validate", right(tmp_path / "other"), "--model", tiny_model, "--json", expect=1)
    (report,) = read_json(capsys)
    assert {problem["code"] for problem in report["problems"]} == {"module-shape"}
    assert report["receipt"]["problems"] == report["problems"]
    run("validate", tmp_path / "other", "--model", tiny_model, expect=1)
    assert f"{QUERY}: is for [6, 8], the base model has [48, 48]" in capsys.readouterr().out


def test_compact_says_what_was_lost(ranked: Path, tmp_path: Path, capsys: Capture) -> None:
    run("compact", ranked, "--output", tmp_path / "b", "--max-error", "0.5")
    out = capsys.readouterr().out
    assert "ranks        60 -> " in out
    assert "of the whole" in out
    run("compact", ranked, "--output", tmp_path / "c", "--rank-budget", "20", "--json")
    found = read_json(capsys)
    assert sum(module["new_rank"] for module in found["modules"]) == 20
    run("diff", ranked, tmp_path / "c", "--json")
    assert read_json(capsys)["relative_distance"] == pytest.approx(found["error"], rel=1e-4)


def test_diff_prints_a_table_in_the_order_of_layers(
    ranked: Path, adapter: Path, capsys: Capture
) -> None:
    run("diff", ranked, adapter)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "module",
        "rank",
        "rank'",
        "|delta|",
        "|delta'|",
        "cosine",
        "|difference|",
    ]
    assert lines[-1].startswith("cosine of the whole")
    assert len(lines) == 1 + 14 + 2


def test_convert_and_add_take_archives(
    tmp_path: Path, ranked: Path, tiny_model: Path, capsys: Capture
) -> None:
    files = {f"x/{path.name}": path.read_bytes() for path in ranked.iterdir()}
    write_zip(tmp_path / "a.zip", files)
    run("convert", tmp_path / "a.zip", "--output", tmp_path / "b", "--model", tiny_model)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "b")
    store = ("--store", tmp_path / "store")
    run("store", "add", tmp_path / "a.zip", "--name", "a", "--model", tiny_model, *store)
    assert capsys.readouterr().out.startswith("a@sha256:")


def test_an_adapter_that_does_not_fit_the_base_is_not_stored(
    tmp_path: Path, tiny_model: Path, capsys: Capture
) -> None:
    folder, store = right(tmp_path / "a"), ("--store", tmp_path / "store")
    run("store", "add", folder, "--name", "a", "--model", tiny_model, *store, expect=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "on base model model" in line
    assert "[module-shape]" in line
    assert not (tmp_path / "store").exists()
    run("store", "add", folder, "--name", "a", *store)


def test_the_store_is_kept_from_the_command_line(
    tmp_path: Path, ranked: Path, capsys: Capture
) -> None:
    store = ("--store", tmp_path / "store")
    run("store", "add", ranked, "--name", "a", *store)
    first = capsys.readouterr().out.strip()
    (ranked / "chat_template.jinja").write_text("changed")
    run("store", "add", ranked, "--name", "a", "--alias", "canary", *store)
    second = capsys.readouterr().out.strip()
    run("store", "alias", "a@canary", "latest", *store)
    assert capsys.readouterr().out.strip() == f"a@latest is {second[2:21]}"
    run("store", "show", "a", *store)
    out = capsys.readouterr().out
    assert f"{second[2:21]}   4-16" in out
    assert "latest, canary" in out
    run("store", "rollback", "a", *store)
    assert capsys.readouterr().out.strip() == f"a is {first[2:21]}"
    run("store", "show", "a", "--json", *store)
    assert [event["action"] for event in read_json(capsys)["history"]] == [
        "add", "add", "alias", "rollback",
    ]  # fmt: skip
    run("store", "remove", second, *store, expect=1)
    assert "is what canary means" in capsys.readouterr().err
    run("store", "remove", "a@canary", *store)
    run("store", "remove", second, *store)
    capsys.readouterr()
    run("store", "gc", "--dry-run", *store)
    assert capsys.readouterr().out.startswith("1 versions would be deleted")
    run("store", "gc", "--json", "--keep", "1", *store)
    assert read_json(capsys)["digests"] == [second.partition(":")[2]]
    assert AdapterStore(tmp_path / "store").resolve("a").public_id == first[:21]


def test_a_quarantine_is_shown_and_lifted_from_the_command_line(
    tmp_path: Path, ranked: Path, capsys: Capture
) -> None:
    store = AdapterStore(tmp_path / "store")
    first = store.add(ranked, name="a")
    (ranked / "chat_template.jinja").write_text("changed")
    second = store.add(ranked, name="a")
    probe = Probe("float32", is_quantized=False, prompts=(
        ProbePrompt((1,), Answer((2,), (-1.0,)), Answer((3,), (-1.0,))),
    ))  # fmt: skip
    right, wrong = Found({2: -1.0}, {3: -1.0}), Found({2: -1.0}, {3: -2.0})
    store.keep_verdict(first, "build one", compare(probe, [wrong], "float32"))
    given = ("--store", store.root)

    def state(version: str) -> str:
        run("store", "show", "a", *given)
        row = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith(version)
        )
        return row.split()[5]

    short = [f"sha256:{one.version.digest[:12]}" for one in (first, second)]
    assert [state(version) for version in short] == ["quarantined", "-"]
    store.keep_verdict(second, "build one", compare(probe, [right], "float32"))
    assert [state(version) for version in short] == ["quarantined", "passed"]
    run("store", "show", "a", *given)
    assert "the adapter's log-probs differ by mean 1" in capsys.readouterr().out
    run("store", "lift", f"a@{short[0]}", *given)
    assert capsys.readouterr().out.strip() == f"{first.public_id} is served whatever its probe says"
    assert [state(version) for version in short] == ["lifted", "passed"]
    run("store", "show", "a", "--json", *given)
    shown = read_json(capsys)["probes"][first.version.digest]
    assert shown["lifted"]["by"]
    assert shown["verdicts"]["build one"]["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["store", "show", "b"], "adapter 'b': the store holds no such name"),
        (["store", "lift", "b"], "adapter 'b': the store holds no such name"),
        (["store", "lift", "a@stable"], "no alias 'stable'"),
        (["store", "rollback", "a"], "alias 'latest' has no earlier version"),
        (["store", "rollback", "a@x"], "no alias 'x'"),
        (["store", "alias", "a", "X"], "alias 'X': 1 to 64 lower-case letters"),
        (["store", "remove", "a@latest"], "remove the name or move the alias"),
        (["inspect", "nowhere"], "no such folder or archive"),
        (["diff", "nowhere", "nowhere"], "no such folder or archive"),
        (["convert", "no.safetensors", "--output", "x"], "no such file"),
        (["compact", "a", "--output", "x", "--max-error", "2"], "at least 0 and below 1"),
        (["validate", "a", "--model", "/nowhere"], "no such folder"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    ranked: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    AdapterStore(tmp_path / "store").add(ranked, name="a")
    (tmp_path / "a").symlink_to(ranked)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["compact", "a", "--output", "x"],
        ["compact", "a", "--output", "x", "--max-error", "1e-3", "--rank-budget", "8"],
        ["store", "gc", "--keep", "-1"],
        ["store"],
        [],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_diff_names_the_one_that_is_wrong(tmp_path: Path, capsys: Capture) -> None:
    files = {f"x/{path.name}": path.read_bytes() for path in right(tmp_path / "a").iterdir()}
    write_zip(tmp_path / "good.zip", files)
    write_zip(tmp_path / "bad.zip", {**files, "x/adapter_model.safetensors": b"123"})
    run("diff", tmp_path / "good.zip", tmp_path / "bad.zip", expect=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/bad.zip: adapter_model.safetensors: 3 bytes" in line


def test_stacks_of_layers_are_told_apart(tmp_path: Path, capsys: Capture) -> None:
    factors = {
        f"{stack}.layers.0.q": (np.ones((r, 4), "f4"), np.ones((4, r), "f4"))
        for stack, r in (("encoder", 2), ("decoder", 8))
    }
    config = AdapterConfig(2, 2, rank_pattern={"decoder.layers.0.q": 8}, target_modules=("q",))
    write_artifact(tmp_path / "a", config, factors, provenance={})
    run("inspect", tmp_path / "a")
    out = capsys.readouterr().out
    assert "1 to █ 8" in out
    assert "decoder.layers.*.q  █" in out


def test_an_adapter_may_not_have_the_name_of_the_base(
    ranked: Path, tiny_model: Path, capsys: Capture
) -> None:
    run("store", "add", ranked, "--name", tiny_model.name, "--model", tiny_model, expect=2)
    assert "it is the base model's" in capsys.readouterr().err
