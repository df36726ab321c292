"""Adapters that are in memory before the server is ready: which, and that it waits for them."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterStore, ResolvedVersion
from rora_serve.config import ServeConfig
from rora_serve.preload import Preloader, PreloadPlan, make_plan
from rora_serve.side_process import SideProcess
from tests.adapters.hostile.build import change_keys, right
from tests.rora_serve.adapter_server import BASE, AdapterServer, Engine, run

Add = Callable[..., ResolvedVersion]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def add(tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Adds adapters that all differ and take as many bytes, one second after the other."""
    added: list[str] = []

    def add_one(name: str, *, base: str = BASE, alias: str = "latest") -> ResolvedVersion:
        added.append(name)
        folder = right(tmp_path / f"source-{len(added)}")
        change_keys(folder, lora_alpha=len(added))
        claim = {"name": base, "fingerprint": "0"}
        (folder / "rora.json").write_text(json.dumps({"format": 1, "base_model": claim}))
        monkeypatch.setattr("adapters.store._now", lambda: 1_000 + len(added))
        return store.add(folder, name=name, alias=alias)

    return add_one


def plan(store: AdapterStore, *, capacity: int = 1_000_000, **settings: Any) -> PreloadPlan:
    asked = {"preload": (), "pin": (), **settings}
    return make_plan(store, base_names=[BASE], capacity=capacity, **asked)


def planned(found: PreloadPlan) -> list[tuple[str, bool]]:
    return [(wanted.resolved.name, wanted.is_pinned) for wanted in found.wanted]


def test_names_mean_what_requests_mean_by_them(store: AdapterStore, add: Add) -> None:
    first = add("a", alias="stable")
    second = add("a")
    digest = f"a@sha256:{first.version.digest[:12]}"
    for text, expected in (("a", second), ("a@stable", first), (digest, first)):
        (wanted,) = plan(store, preload=[text]).wanted
        assert wanted.resolved == expected
        assert not wanted.is_pinned


def test_every_name_that_is_not_there_is_told(store: AdapterStore, add: Add) -> None:
    add("a")
    found = plan(store, preload=["nobody", "a@stable", "a"], pin=[BASE, "a@sha256:000000000000"])
    problems = [problem.partition(": ")[0] for problem in found.problems]
    assert problems == [
        "--pin base", "--pin a@sha256:000000000000", "--preload nobody", "--preload a@stable",
    ]  # fmt: skip
    assert "the base model, which is always there" in found.problems[0]
    assert planned(found) == [("a", False)]


def test_a_pattern_means_the_newest_that_fit(store: AdapterStore, add: Add) -> None:
    versions = [add(f"acme-{number}") for number in range(5)]
    add("other")
    num_bytes = versions[0].version.num_bytes
    found = plan(store, preload=["acme-*", "zeta-*"], capacity=3 * num_bytes + 1)
    assert planned(found) == [("acme-4", False), ("acme-3", False), ("acme-2", False)]
    assert (found.num_left_out, found.idle, found.problems) == (2, ("--preload zeta-*",), ())
    assert len(plan(store, preload=["*"]).wanted) == 6


def test_a_pattern_with_an_alias_means_the_names_that_have_it(
    store: AdapterStore, add: Add
) -> None:
    first = add("a", alias="stable")
    add("a")
    add("b")
    (wanted,) = plan(store, pin=["*@stable"]).wanted
    assert wanted.resolved == first


def test_names_come_before_patterns_and_pins_before_the_rest(store: AdapterStore, add: Add) -> None:
    num_bytes = [add(name).version.num_bytes for name in "abcd"][-1]
    found = plan(store, preload=["*", "a"], pin=["*", "b"], capacity=4 * num_bytes)
    # Half of the memory for pins: b, and the newest, d.
    assert planned(found) == [("b", True), ("a", False), ("d", True), ("c", False)]
    assert found.num_left_out == 2  # to be pinned
    assert found.pinned_bytes == 2 * num_bytes
    # What is loaded anyway can be pinned by a pattern.
    assert planned(plan(store, preload=["a"], pin=["a*"])) == [("a", False), ("a", True)]


def test_what_is_named_has_to_fit(store: AdapterStore, add: Add) -> None:
    num_bytes = [add(name).version.num_bytes for name in "abc"][-1]
    found = plan(store, pin=["a", "b"], capacity=4 * num_bytes - 1)
    assert "--pin: what is named takes" in found.problems[0]
    assert "at most 50% may be pinned" in found.problems[0]
    assert plan(store, pin=["a", "b"], capacity=4 * num_bytes).problems == ()
    found = plan(store, preload=["a", "b", "c"], capacity=3 * num_bytes - 1)
    (problem,) = found.problems
    assert f"what is named takes {3 * num_bytes} bytes" in problem
    assert plan(store, preload=["a", "b", "c"], capacity=3 * num_bytes).problems == ()


def test_names_that_share_weights_take_them_once(store: AdapterStore, add: Add) -> None:
    first = add("a")
    store.add(first.folder, name="b")
    found = plan(store, pin=["a", "b"], capacity=2 * first.version.num_bytes)
    assert planned(found) == [("a", True), ("b", True)]
    assert found.problems == ()


@pytest.mark.parametrize("text", ["", "A", "a b", "a@", "a@B", "a@sha256:", "a@sha256:x!", "../a"])
def test_what_can_mean_no_version_is_no_setting(text: str) -> None:
    for setting in ("preload", "pin"):
        with pytest.raises(ValueError, match=setting):
            ServeConfig.model_validate({setting: [text]})


class GatedEngine(Engine):
    """Loads when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_load = asyncio.Event()

    async def load(self, lora_int_id: int, resolved: ResolvedVersion) -> int:
        await self.may_load.wait()
        return await super().load(lora_int_id, resolved)


class Start:
    """A server whose store is planned to be loaded, and who was told that it has to end."""

    def __init__(
        self, store: AdapterStore, process: SideProcess, folder: Path, **settings: Any
    ) -> None:
        self.engine = GatedEngine()
        self.server = AdapterServer(store, process, folder, engine=self.engine)
        self.preloader = self.server.preloader = Preloader(
            self.server.directory, self.server.residents, plan(store, **settings)
        )
        self.num_given_up = 0

    def give_up(self) -> None:
        self.num_given_up += 1

    async def is_ready(self) -> bool:
        return (await self.server.ask("GET", "/ready")).status_code == 200

    async def until_ready(self) -> None:
        async with asyncio.timeout(20):
            while not await self.is_ready():
                await asyncio.sleep(0.01)

    async def until_given_up(self) -> None:
        async with asyncio.timeout(20):
            while not self.num_given_up:
                await asyncio.sleep(0.01)

    async def shown(self, name: str) -> tuple[str, bool]:
        (version,) = (await self.server.ask("GET", f"/v1/adapters/{name}")).json()["versions"]
        return version["tier"], version["is_pinned"]


def test_the_server_is_ready_when_all_of_it_is_in_memory(
    store: AdapterStore,
    add: Add,
    side_process: SideProcess,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in "abcd":
        add(name)

    async def ask() -> None:
        start = Start(store, side_process, tmp_path, preload=["b", "c*"], pin=["a"])
        assert not await start.is_ready()
        start.preloader.begin(start.give_up)
        await asyncio.sleep(0.05)
        assert not await start.is_ready()
        start.engine.may_load.set()
        await start.until_ready()
        assert [await start.shown(name) for name in "abcd"] == [
            ("slot", True), ("host", False), ("host", False), ("store", False),
        ]  # fmt: skip
        # As any pin: it ends when somebody ends it.
        await start.server.ask("DELETE", "/v1/adapters/a/pin")
        assert await start.shown("a") == ("host", False)
        assert await start.preloader.end() is None
        assert start.num_given_up == 0

    run(ask())
    said = capsys.readouterr().err
    assert "rora-serve: ready; adapters in memory: 3, of which pinned: 1; " in said


def test_without_anything_to_load_it_is_ready_at_once(
    store: AdapterStore, add: Add, side_process: SideProcess, tmp_path: Path
) -> None:
    add("a")

    async def ask() -> None:
        start = Start(store, side_process, tmp_path, preload=["zeta-*"])
        start.preloader.begin(start.give_up)
        assert await start.is_ready()
        assert await start.preloader.end() is None

    run(ask())


def test_names_that_can_not_be_served_end_the_start_together(
    store: AdapterStore, add: Add, side_process: SideProcess, tmp_path: Path
) -> None:
    add("good")
    for name in ("bad", "worse"):
        add(name, base="another")

    async def ask() -> None:
        start = Start(store, side_process, tmp_path, preload=["good", "worse"], pin=["bad"])
        start.engine.may_load.set()
        start.preloader.begin(start.give_up)
        await start.until_given_up()
        error = await start.preloader.end()
        assert "2 of 3 adapters can not be served" in str(error)
        for name in ("bad", "worse"):
            reason = f"{store.resolve(name).public_id}: it was trained on 'another'"
            assert str(error).count(reason) == 1
        assert start.num_given_up == 1
        assert not await start.is_ready()

    run(ask())


def test_what_a_pattern_matches_and_can_not_be_served_is_left_out(
    store: AdapterStore,
    add: Add,
    side_process: SideProcess,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One tenant's broken adapter must not keep a server of all tenants from starting."""
    add("a")
    bad = add("bad", base="another")

    async def ask() -> None:
        start = Start(store, side_process, tmp_path, preload=["*"])
        start.engine.may_load.set()
        start.preloader.begin(start.give_up)
        await start.until_ready()
        assert await start.shown("a") == ("host", False)
        assert start.num_given_up == 0

    run(ask())
    said = capsys.readouterr().err
    assert f"left out of what --preload and --pin match: {bad.public_id}: it was trained" in said
    assert "adapters in memory: 1, of which pinned: 0" in said


def test_a_lost_engine_is_told_with_the_name_of_what_was_loaded(
    store: AdapterStore, add: Add, side_process: SideProcess, tmp_path: Path
) -> None:
    added = add("a")

    async def ask() -> None:
        start = Start(store, side_process, tmp_path, preload=["a"])
        start.engine.errors = [OSError("gone")]
        start.engine.may_load.set()
        start.preloader.begin(start.give_up)
        await start.until_given_up()
        assert f"{added.public_id}: OSError" in str(await start.preloader.end())

    run(ask())


def test_a_start_that_is_ended_meanwhile_is_no_failure(
    store: AdapterStore, add: Add, side_process: SideProcess, tmp_path: Path
) -> None:
    add("a")

    async def ask() -> None:
        start = Start(store, side_process, tmp_path, preload=["a"])
        start.preloader.begin(start.give_up)
        await asyncio.sleep(0.05)
        assert await start.preloader.end() is None
        assert start.num_given_up == 0
        start.engine.may_load.set()  # what others may wait for goes on

    run(ask())
