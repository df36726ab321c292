"""rora-serve validate: what a server would serve, said without one."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters import AdapterStore, ResolvedVersion
from adapters.base_model import fingerprint
from adapters.errors import RoraError
from adapters.tolerance import Difference, Tolerance
from adapters.verdict import ProbeVerdict
from rora_serve.cli import main
from rora_serve.models import ModelDirectory, read_base
from rora_serve.tenants import key_lines, new_key
from tests.adapters.hostile.build import (
    QUERY,
    VALUE,
    WEIGHTS,
    change_keys,
    change_probe,
    change_tensors,
    factor,
    right,
)
from tests.rora_serve.adapter_server import Engine

Add = Callable[..., ResolvedVersion]
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A base model that right adapters fit."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    shapes = {QUERY: (6, 8), VALUE: (6, 8), "model.layers.0.mlp.up_proj": (9, 8)}
    weights = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    (folder / "model.safetensors").write_bytes(save(weights))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def add(tmp_path: Path, store: AdapterStore) -> Add:
    """Adds right adapters that all differ, each changed before it is stored."""
    added: list[str] = []

    def add_one(
        name: str, change: Callable[[Path], object] = lambda _: None, alias: str = "latest"
    ) -> ResolvedVersion:
        added.append(name)
        folder = right(tmp_path / f"source-{len(added)}")
        change_keys(folder, lora_alpha=len(added))
        change(folder)
        return store.add(folder, name=name, alias=alias)

    return add_one


@pytest.fixture
def ask(model: Path, store: AdapterStore, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs the command; returns its exit code, and its JSON."""

    def run(*arguments: str) -> tuple[int, Any]:
        given = ["validate", "--model", str(model), "--store", str(store.root), "--json"]
        code = main([*given, *arguments])
        return code, json.loads(capsys.readouterr().out)

    return run


def outcomes(found: Any) -> dict[str, str | None]:
    return {version["name"]: version["refusal"] for version in found["versions"]}


def test_a_store_that_is_served_whole(ask: Ask, add: Add, model: Path) -> None:
    first = add("a", alias="stable")
    second = add("a")
    probed = add("b", lambda folder: change_probe(folder, lambda _: None))
    code, found = ask("--adapter-memory-bytes", "1000000")
    assert code == 0
    assert found["base"] == {"names": ["tiny"], "fingerprint": fingerprint(model)}
    shown = {
        "rank": {"min": 2, "max": 3},
        "num_bytes": first.version.num_bytes,
        "is_served": True,
        "refusal": None,
    }
    assert found["versions"] == [
        {
            "name": version.name,
            "version": f"sha256:{version.version.digest}",
            "aliases": [alias],
            "probe": probe,
            **shown,
        }
        for version, alias, probe in (
            (first, "stable", "none"), (second, "latest", "none"), (probed, "latest", "not asked"),
        )
    ]  # fmt: skip
    assert found["problems"] == found["warnings"] == []
    assert found["totals"] == {
        "served": 3,
        "refused": 0,
        "unchecked": 0,
        "num_bytes": 3 * first.version.num_bytes,
        "adapter_memory_bytes": 1_000_000,
        "pinned_bytes": 0,
        "left_out_of_preload": 0,
        "fits_at_once": True,
    }


def claim_another(folder: Path) -> None:
    claim = {"name": "another", "fingerprint": "0"}
    (folder / "rora.json").write_text(json.dumps({"format": 1, "base_model": claim}))


def cut(version: ResolvedVersion) -> None:
    path = version.folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])


def flip(version: ResolvedVersion) -> None:
    path = version.folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def rewrite_probe(version: ResolvedVersion) -> None:
    (version.folder / "rora.json").write_text('{"format": 1, "probe": 1}')


def take_away(version: ResolvedVersion) -> None:
    for path in version.folder.iterdir():
        path.unlink()
    version.folder.rmdir()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut, "tensor-past-end"),
        (flip, "differs from what was stored"),
        (rewrite_probe, "differs from what was stored"),
        (take_away, "no such folder"),
    ],
)
def test_what_was_damaged_in_the_store_is_refused_and_the_rest_goes_on(
    ask: Ask, add: Add, store: AdapterStore, change: Callable[..., None], reason: str
) -> None:
    for name in ("a", "broken", "z"):
        add(name)
    change(store.resolve("broken"))
    code, found = ask()
    assert code == 1
    refusals = outcomes(found)
    refusal = refusals.pop("broken")
    assert refusal is not None
    assert reason in refusal
    assert refusals == {"a": None, "z": None}
    assert (found["totals"]["served"], found["totals"]["refused"]) == (2, 1)
    assert str(store.root) not in json.dumps(found["versions"])


def test_what_does_not_fit_the_base_is_refused_with_every_module(ask: Ask, add: Add) -> None:
    def move(folder: Path) -> None:
        away = {factor(QUERY, side): None for side in "AB"}
        there = QUERY.replace("layers.0", "layers.7")
        a, b = np.ones((2, 8), np.float32), np.ones((6, 2), np.float32)
        wide = np.ones((7, 3), np.float32)
        change_tensors(
            folder,
            **away,
            **{factor(there, "A"): a, factor(there, "B"): b, factor(VALUE, "B"): wide},
        )

    add("moved", move)
    code, found = ask()
    assert code == 1
    reason = outcomes(found)["moved"]
    assert reason is not None
    assert "layers.7.self_attn.q_proj: matches no linear layer of the base model" in reason
    assert "is for [7, 8], the base model has [6, 8]" in reason


def test_a_version_is_refused_in_the_words_of_the_server(
    ask: Ask, add: Add, store: AdapterStore, model: Path
) -> None:
    add("claims", claim_another)
    large = add("large")
    code, found = ask("--adapter-memory-bytes", str(large.version.num_bytes - 1))
    assert code == 1
    base, _ = read_base(model, ["tiny"])
    capacity = large.version.num_bytes - 1
    directory = ModelDirectory(base, store, Engine(), capacity=capacity)
    for name, reason in outcomes(found).items():
        with pytest.raises(RoraError) as caught:
            asyncio.run(directory.open(name))
        assert str(caught.value) == f"{store.resolve(name).public_id}: {reason}"


def quarantine(store: AdapterStore, version: ResolvedVersion, base: str) -> None:
    """Let an engine with this base model have found that a probe is answered otherwise."""
    nothing = Difference(0.0, 0.0)
    verdict = ProbeVerdict(
        passed=False,
        reason="log-probs differ",
        base=nothing,
        adapter=nothing,
        tolerance=Tolerance(0.1, 0.2),
        seen=(),
    )
    store.keep_verdict(version, f"vllm 0.32, cpu, base {base[:12]}", verdict)


def test_a_known_quarantine_is_told_until_it_is_lifted(
    ask: Ask, add: Add, store: AdapterStore, model: Path
) -> None:
    version = add("a", lambda folder: change_probe(folder, lambda _: None))
    # What came out on another base model says nothing of this one.
    quarantine(store, version, "0" * 64)
    assert ask()[0] == 0
    quarantine(store, version, fingerprint(model))
    code, found = ask()
    assert code == 1
    (shown,) = found["versions"]
    assert shown["probe"] == "quarantined"
    assert shown["refusal"].startswith("quarantined: log-probs differ (vllm 0.32, cpu, base ")
    store.lift_quarantine("a", by="somebody")
    code, found = ask()
    assert (code, found["versions"][0]["probe"]) == (0, "lifted")


def test_a_name_whose_record_is_broken_is_told_and_the_rest_goes_on(
    ask: Ask, add: Add, store: AdapterStore
) -> None:
    for name in ("a", "broken"):
        add(name)
    (store.root / "names" / "broken.json").write_text("{")
    code, found = ask()
    assert code == 1
    (problem,) = found["problems"]
    assert "broken.json: not a record of versions and aliases" in problem
    assert outcomes(found) == {"a": None}


def test_a_name_of_the_base_model_is_told(ask: Ask, add: Add) -> None:
    add("tiny")
    code, found = ask()
    assert code == 1
    assert "an adapter is named 'tiny' like the base model" in found["problems"][0]
    assert ask("--", "--served_model_name", "other", "--max-model-len", "128")[0] == 0
    code, found = ask("--", "--served-model-name", "other", "tiny", "--dtype", "float32")
    assert code == 1
    assert found["base"]["names"] == ["other", "tiny"]


def test_versions_that_no_alias_means_are_checked_on_request(ask: Ask, add: Add) -> None:
    old = add("a")
    new = add("a")
    cut(old)
    code, found = ask()
    assert code == 0
    assert [version["version"] for version in found["versions"]] == [f"sha256:{new.version.digest}"]
    assert found["totals"]["unchecked"] == 1
    code, found = ask("--all-versions")
    assert code == 1
    assert len(found["versions"]) == 2
    # What is to be preloaded is checked in any case.
    assert ask("--preload", f"a@sha256:{old.version.digest}")[0] == 1


def test_shared_weights_count_once_and_whether_all_fits_is_told(ask: Ask, add: Add) -> None:
    version = add("a")
    num_bytes = version.version.num_bytes
    add("b", lambda folder: change_keys(folder, lora_alpha=1))
    code, found = ask("--adapter-memory-bytes", str(num_bytes))
    assert code == 0
    assert found["totals"]["num_bytes"] == num_bytes
    assert found["totals"]["fits_at_once"]
    add("c")
    code, found = ask("--adapter-memory-bytes", str(num_bytes))
    assert code == 0
    assert not found["totals"]["fits_at_once"]


def test_preloads_and_pins_are_planned_as_the_server_does(ask: Ask, add: Add) -> None:
    first = add("a")
    add("b")
    num_bytes = first.version.num_bytes
    code, found = ask(
        "--pin", "a", "--preload", "*", "--preload", "zeta-*",
        "--adapter-memory-bytes", str(2 * num_bytes),
    )  # fmt: skip
    assert code == 0
    assert found["pin"] == [first.public_id]
    assert [name.partition("@")[0] for name in found["preload"]] == ["b"]
    assert found["totals"]["pinned_bytes"] == num_bytes
    assert found["warnings"] == ["--preload zeta-*: matches no adapter"]
    code, found = ask("--pin", "a", "--preload", "x", "--adapter-memory-bytes", str(num_bytes))
    assert code == 1
    assert [problem.partition(":")[0] for problem in found["problems"]] == ["--preload x", "--pin"]


def test_the_key_file_is_checked(ask: Ask, add: Add, tmp_path: Path) -> None:
    add("acme-1")
    keys = tmp_path / "keys.toml"
    keys.write_text(
        key_lines("acme", new_key())
        + '\nuse = ["acme-*", "shared", "new-*"]\nupload = ["new-*"]\nmanage = ["acme_*"]\n'
    )
    keys.chmod(0o644)
    code, found = ask("--keys", str(keys))
    assert code == 0
    assert found["warnings"] == [
        f"{keys}: others than its owner may read it (mode 644), 600 is expected; chmod it",
        f"{keys}: tenants.acme.use: 'shared' matches no adapter",
        f"{keys}: tenants.acme.manage: 'acme_*' matches no adapter",
    ]
    keys.write_text("[tenants.acme]\nkeys = ['rora-key']\nuse = ['A']\n")
    code, found = ask("--keys", str(keys))
    assert code == 1
    (problem,) = found["problems"]
    assert "tenants.acme.keys.0" in problem
    assert "tenants.acme.use.0" in problem
    assert "rora-key" not in problem


def test_settings_come_from_the_servers_own_file(
    model: Path, store: AdapterStore, add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add("a")
    file = tmp_path / "serve.toml"
    settings = f'model = "{model}"\nstore = "{store.root}"\nport = 1\npreload = ["nobody"]\n'
    file.write_text(settings)
    assert main(["validate", "--config", str(file)]) == 1
    assert "wrong: --preload nobody: adapter 'nobody'" in capsys.readouterr().out
    for more, message in (
        ("prelode = []", "prelode: unknown key; nearest known key: preload"),
        ("pin = ['A*']", "pin.0: found 'A*', letters in lower case"),
    ):
        file.write_text(settings + more)
        assert main(["validate", "--config", str(file)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["validate", "--prelode", "a"])
    assert caught.value.code == 2


def test_people_get_a_table_what_is_wrong_and_totals(
    model: Path, store: AdapterStore, add: Add, capsys: pytest.CaptureFixture[str]
) -> None:
    good = add("good", alias="stable")
    bad = add("bad")
    cut(bad)
    given = ["validate", "--model", str(model), "--store", str(store.root), "--pin", "good"]
    assert main([*given, "--adapter-memory-bytes", "1000"]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line[:3] in ("bad", "goo")}
    assert rows[good.public_id][1:] == ["latest,", "stable", "2-3", "0.0", "none", "served"]
    assert rows[bad.public_id][1:] == ["latest", "2-3", "0.0", "none", "refused"]
    assert any(line.startswith(f"refused: {bad.public_id}: ") for line in lines)
    assert lines[-3:] == [
        "served by tiny: 1 versions, 0.0 MB; refused: 1",
        "memory for adapters: 0.0 MB; all fit at once",
        "loaded before the server is ready: 1, of which pinned: 1, 0.0 MB; no room for: 0",
    ]


def test_progress_goes_where_errors_do(
    model: Path,
    store: AdapterStore,
    add: Add,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("rora_serve.validate_cli._PROGRESS_SECONDS", 0.0)
    for name in ("a", "b"):
        add(name)
    assert main(["validate", "--model", str(model), "--store", str(store.root), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["0 of 2 versions checked", "1 of 2 versions checked"]
    json.loads(captured.out)


def test_a_store_that_is_not_there_serves_the_base_alone(ask: Ask, store: AdapterStore) -> None:
    code, found = ask()
    assert code == 0
    assert found["warnings"] == [
        f"--store {store.root}: no such folder, only the base model is served"
    ]
    assert not store.root.exists()


def test_what_is_wrong_by_itself_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "--model", str(model), "--store", str(model / "config.json")]) == 2
    assert "a file, a folder made by rora-adapters is expected" in capsys.readouterr().err
    assert main(["validate", "--model", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_nothing_is_written_and_neither_vllm_nor_torch_is_loaded(
    model: Path, store: AdapterStore, add: Add
) -> None:
    """So that it can be asked where neither is installed, of a store that is mounted to be read."""
    add("a")
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    arguments = ["validate", "--model", str(model), "--store", str(store.root), "--preload", "*"]
    heavy = {"vllm", "torch", "transformers", "fastapi", "numba"}
    code = (
        "import sys; from rora_serve.cli import main\n"
        f"code = main({arguments!r})\n"
        f"print(code, sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr.splitlines()[-1] == "0 []"
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before
