import asyncio
import contextvars
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterStore, ResolvedVersion
from adapters.errors import AdapterMismatchError, ArtifactError, QuarantinedError, StoreError
from adapters.verdict_files import ProbeRecord
from rora_serve.api.errors import to_response
from rora_serve.models import ModelDirectory, ServedAdapter, ServedBase
from rora_serve.probing import Prober
from tests.workloads import set_alpha

PROMPTS = ((1, 9690), (1, 5, 6, 7))
BASE = {504: -0.21, 7: -2.5, 3681: -6.0}
ADAPTER = {3681: -0.03, 504: -4.0, 7: -7.0}
PROBE = {
    "dtype": "float32",
    "prompts": [
        {
            "token_ids": list(prompt),
            "base": {"token_ids": [504, 7], "log_probs": [-0.21, -2.5]},
            "adapter": {"token_ids": [3681, 504], "log_probs": [-0.03, -4.0]},
        }
        for prompt in PROMPTS
    ],
}
request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="nobody's")


class Engine:
    """Stands for the engine: notes what it is asked, by whom, and answers what it is told to."""

    def __init__(self) -> None:
        self.base: Mapping[int, float] = BASE
        self.adapter: Mapping[int, float] = ADAPTER
        self.failures: list[Exception] = []
        self.asked: list[tuple[tuple[int, ...], str | None]] = []
        self.requests: set[str] = set()
        self.num_asking = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def next_log_probs(
        self, token_ids: Sequence[int], served: ServedAdapter | None
    ) -> Mapping[int, float]:
        self.asked.append((tuple(token_ids), None if served is None else served.requested))
        self.requests.add(request.get())
        self.num_asking += 1
        try:
            await self.may_answer.wait()
            if self.failures:
                raise self.failures.pop(0)
            return self.base if served is None else self.adapter
        finally:
            self.num_asking -= 1

    def asked_of(self, name: str | None) -> list[tuple[int, ...]]:
        return [prompt for prompt, model in self.asked if model == name]


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def probed(adapter: Path) -> Path:
    (adapter / "rora.json").write_text(json.dumps({"format": 1, "probe": PROBE}))
    return adapter


@pytest.fixture
def store(tmp_path: Path, probed: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    store.add(probed, name="a")
    return store


def prober(store: AdapterStore, engine: Engine, **more: Any) -> Prober:
    settings: dict[str, Any] = {"build": "one", "form": "float32", "max_prompt_tokens": 100}
    return Prober(store, engine.next_log_probs, **(settings | more))


def served(store: AdapterStore, name: str = "a") -> ServedAdapter:
    return ServedAdapter(name, store.resolve(name), 1)


def record(store: AdapterStore) -> ProbeRecord:
    return store.probe_record(store.resolve("a").version.digest)


def read_only(store: AdapterStore) -> None:
    """A folder in the lock's place stands for a file system that is mounted to be read."""
    (store.root / ".lock").unlink()
    (store.root / ".lock").mkdir()


def test_a_probe_is_asked_once_and_the_outcome_kept(store: AdapterStore, engine: Engine) -> None:
    async def ask() -> None:
        first = prober(store, engine)
        for _ in range(3):
            await first.check(served(store))
        await prober(store, engine).check(served(store))

    asyncio.run(ask())
    assert sorted(engine.asked_of("a")) == sorted(engine.asked_of(None)) == sorted(PROMPTS)
    verdict = record(store).verdicts["one"]
    assert verdict.passed
    assert verdict.seen[0].adapter == (-0.03, -4.0)


def test_another_build_asks_again(store: AdapterStore, engine: Engine) -> None:
    asyncio.run(prober(store, engine).check(served(store)))
    engine.adapter = BASE
    with pytest.raises(QuarantinedError, match="the adapter's log-probs differ by"):
        asyncio.run(prober(store, engine, build="two").check(served(store)))
    assert {build: one.passed for build, one in record(store).verdicts.items()} == {
        "one": True,
        "two": False,
    }
    asyncio.run(prober(store, engine).check(served(store)))


def test_what_does_not_answer_as_trained_is_quarantined_until_that_is_lifted(
    store: AdapterStore, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.adapter = BASE

    quarantined: list[str] = []

    async def ask() -> None:
        checks = prober(store, engine, quarantined=quarantined.append)
        assert await checks.quarantine(store.resolve("a")) is None  # not known yet
        for _ in range(2):
            with pytest.raises(QuarantinedError, match="trained in float32, computed in float32"):
                await checks.check(served(store))
        reason = await checks.quarantine(store.resolve("a"))
        assert reason is not None
        assert "the adapter's log-probs differ by mean" in reason
        assert await prober(store, engine).quarantine(store.resolve("a")) == reason
        assert await prober(store, engine, build="two").quarantine(store.resolve("a")) is None
        AdapterStore(store.root).lift_quarantine("a", by="Ada")
        assert await checks.quarantine(store.resolve("a")) is None
        await checks.check(served(store))
        # Another build does not ask at all.
        await prober(store, engine, build="two").check(served(store))

    asyncio.run(ask())
    assert len(engine.asked) == 2 * len(PROMPTS)
    assert caplog.text.count("quarantined") == 1
    assert quarantined == ["a"]


def test_requests_that_come_at_once_wait_for_one_check(store: AdapterStore, engine: Engine) -> None:
    engine.adapter = BASE

    async def ask() -> None:
        checks = prober(store, engine)
        engine.may_answer.clear()
        waiting = [asyncio.create_task(checks.check(served(store))) for _ in range(5)]
        await asyncio.sleep(0.05)
        # All prompts of the adapter are in the engine at once.
        assert engine.num_asking == len(PROMPTS)
        waiting[0].cancel()  # one that hangs up ends it for nobody else
        engine.may_answer.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes[1:]] == [QuarantinedError] * 4
        assert isinstance(outcomes[0], asyncio.CancelledError)

    asyncio.run(ask())
    assert len(engine.asked_of("a")) == len(PROMPTS)


def test_few_probes_are_in_the_engine_at_once(
    store: AdapterStore, engine: Engine, probed: Path
) -> None:
    names = ["a"]
    for number in range(4):
        (probed / "chat_template.jinja").write_text(str(number))
        names.append(f"b{number}")
        store.add(probed, name=names[-1])

    async def ask() -> None:
        checks = prober(store, engine)
        await checks.check(served(store))  # the base has answered
        engine.may_answer.clear()
        waiting = [asyncio.create_task(checks.check(served(store, name))) for name in names[1:]]
        await asyncio.sleep(0.05)
        assert engine.num_asking == 2 * len(PROMPTS)
        engine.may_answer.set()
        await asyncio.gather(*waiting)

    asyncio.run(ask())
    assert all(sorted(engine.asked_of(name)) == sorted(PROMPTS) for name in names)


def test_no_request_is_charged_for_a_probe(store: AdapterStore, engine: Engine) -> None:
    async def ask() -> None:
        request.set("a client's")
        await prober(store, engine).check(served(store))

    asyncio.run(ask())
    assert engine.requests == {"nobody's"}


def test_the_base_is_asked_once_for_a_prompt_of_several_adapters(
    store: AdapterStore, engine: Engine, probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a"]
    for number in range(3):
        (probed / "chat_template.jinja").write_text(str(number))
        names.append(f"b{number}")
        store.add(probed, name=names[-1])

    async def ask(checks: Prober) -> None:
        await asyncio.gather(*(checks.check(served(store, name)) for name in names))

    asyncio.run(ask(prober(store, engine)))
    assert sorted(engine.asked_of(None)) == sorted(PROMPTS)
    assert all(sorted(engine.asked_of(name)) == sorted(PROMPTS) for name in names)
    monkeypatch.setattr("rora_serve.probing._MAX_BASE_ANSWERS", 1)
    engine.asked.clear()

    async def one_after_the_other() -> None:
        checks = prober(store, engine, build="two")
        for name in names:
            await checks.check(served(store, name))

    asyncio.run(one_after_the_other())
    assert len(engine.asked_of(None)) > len(PROMPTS)


def test_an_adapter_without_a_probe_is_served_unasked(
    store: AdapterStore, engine: Engine, probed: Path
) -> None:
    (probed / "rora.json").write_text('{"format": 1}')
    store.add(probed, name="a")
    asyncio.run(prober(store, engine).check(served(store)))
    assert engine.asked == []
    assert record(store) == ProbeRecord()


def test_a_failed_engine_is_not_the_adapters_fault(store: AdapterStore, engine: Engine) -> None:
    async def ask() -> None:
        checks = prober(store, engine)
        engine.failures = [RuntimeError("lost")]
        with pytest.raises(RuntimeError, match="lost"):
            await checks.check(served(store))
        assert engine.num_asking == 0  # nothing goes on behind its back
        assert record(store) == ProbeRecord()
        engine.failures = [AdapterMismatchError("token 9 is unknown")]
        with pytest.raises(AdapterMismatchError, match="token 9 is unknown"):
            await checks.check(served(store))
        await checks.check(served(store))

    asyncio.run(ask())
    assert record(store).verdicts["one"].passed


def test_prompts_that_are_too_long_for_the_engine_are_left_out(
    store: AdapterStore, engine: Engine
) -> None:
    engine.adapter = BASE
    with pytest.raises(QuarantinedError):
        asyncio.run(prober(store, engine, max_prompt_tokens=3).check(served(store)))
    assert engine.asked_of("a") == engine.asked_of(None) == [PROMPTS[0]]
    seen = record(store).verdicts["one"].seen
    assert [len(one.base) for one in seen] == [2, 0]
    asyncio.run(prober(store, engine, build="two", max_prompt_tokens=1).check(served(store)))


def test_a_store_that_can_only_be_read_is_checked_at_each_start(
    store: AdapterStore, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    read_only(store)

    async def ask() -> None:
        await prober(store, engine).check(served(store))
        engine.adapter = BASE
        checks = prober(store, engine)
        for _ in range(2):
            with pytest.raises(QuarantinedError):
                await checks.check(served(store))
            assert await checks.quarantine(store.resolve("a")) is not None

    asyncio.run(ask())
    assert len(engine.asked_of("a")) == 2 * len(PROMPTS)
    assert "its probe is asked at each start" in caplog.text
    with pytest.raises(StoreError):
        store.lift_quarantine("a", by="Ada")
    # Whoever may write it can lift it.
    (store.root / ".lock").rmdir()
    store.lift_quarantine("a", by="Ada")
    asyncio.run(prober(store, engine).check(served(store)))


def test_a_stored_probe_of_another_form_is_refused(store: AdapterStore, engine: Engine) -> None:
    """Of a store from before probes were checked, or one that was changed under us."""
    path = store.resolve("a").folder / "rora.json"
    path.write_text('{"format": 1, "probe": {"dtype": "int4"}}')
    with pytest.raises(ArtifactError, match="probe-form"):
        asyncio.run(prober(store, engine).check(served(store)))
    assert engine.asked == []


# In the directory of models.


class Loader:
    """Stands for what brings weights into the engine."""

    def __init__(self) -> None:
        self.num_loads = 0
        self.held: set[int] = set()

    async def load(self, lora_int_id: int, resolved: ResolvedVersion) -> int:
        self.num_loads += 1
        self.held.add(lora_int_id)
        return resolved.version.num_bytes

    async def drop(self, lora_int_id: int) -> None:
        self.held.remove(lora_int_id)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    monkeypatch.setattr("rora_serve.models._ABORT_SECONDS", 0.05)
    return Loader()


def directory(store: AdapterStore, engine: Engine, loader: Loader) -> ModelDirectory:
    """A directory with room for one adapter."""
    return ModelDirectory(
        ServedBase(("base",), "", None),
        store,
        loader,
        capacity=store.resolve("a").version.num_bytes,
        prober=prober(store, engine),
    )


@pytest.fixture
def other(store: AdapterStore, probed: Path) -> str:
    """Another adapter's name, of the same size, without a probe."""
    set_alpha(probed, 9)
    (probed / "rora.json").write_text('{"format": 1}')
    store.add(probed, name="other")
    return "other"


def test_the_probe_is_asked_of_weights_that_are_loaded(
    store: AdapterStore, engine: Engine, loader: Loader
) -> None:
    async def ask() -> None:
        models = directory(store, engine, loader)
        engine.may_answer.clear()
        opening = [asyncio.create_task(models.open("a")) for _ in range(3)]
        await asyncio.sleep(0.2)
        assert loader.num_loads == 1
        assert engine.num_asking == len(PROMPTS)
        assert not any(one.done() for one in opening)
        engine.may_answer.set()
        assert all([await one is not None for one in opening])
        assert await models.open("base") is None

    asyncio.run(ask())
    assert len(engine.asked_of("a")) == len(PROMPTS)


def test_a_quarantined_version_is_refused_and_makes_room_for_others(
    store: AdapterStore, engine: Engine, loader: Loader, other: str
) -> None:
    engine.adapter = BASE

    async def ask() -> None:
        models = directory(store, engine, loader)
        for _ in range(2):
            with pytest.raises(QuarantinedError, match=r"^a@sha256:\w{12}: trained in float32"):
                await models.open("a")
        assert loader.num_loads == 1
        served = await asyncio.wait_for(models.open(other), 5)
        assert served is not None
        assert loader.held == {served.lora_int_id}
        models.close(served, was_answered=True)
        with pytest.raises(QuarantinedError):
            await models.open("a")
        assert loader.num_loads == 2  # known beforehand: nothing is loaded for it
        store.lift_quarantine("a", by="Ada")
        assert await models.open("a") is not None

    asyncio.run(ask())


def test_the_same_weights_under_another_probe_are_another_version(
    store: AdapterStore, engine: Engine, loader: Loader, probed: Path
) -> None:
    (probed / "rora.json").write_text('{"format": 1}')
    store.add(probed, name="b")
    engine.adapter = BASE

    async def ask() -> None:
        models = directory(store, engine, loader)
        with pytest.raises(QuarantinedError):
            await models.open("a")
        assert await models.open("b") is not None

    asyncio.run(ask())
    assert loader.num_loads == 1


def test_weights_stay_while_their_probe_is_asked_whoever_hangs_up(
    store: AdapterStore, engine: Engine, loader: Loader, other: str
) -> None:
    async def ask() -> None:
        models = directory(store, engine, loader)
        engine.may_answer.clear()
        leaving = asyncio.create_task(models.open("a"))
        await asyncio.sleep(0.2)
        assert engine.num_asking == len(PROMPTS)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        waiting = asyncio.create_task(models.open(other))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        assert loader.num_loads == 1
        engine.may_answer.set()
        assert await asyncio.wait_for(waiting, 5) is not None

    asyncio.run(ask())
    assert record(store).verdicts["one"].passed


def test_clients_are_told_that_a_version_is_quarantined() -> None:
    answer = to_response(QuarantinedError("a@sha256:0: not as in training"), "a")
    assert answer.status == 422
    error = json.loads(answer.body)["error"]
    assert error["code"] == "adapter_quarantined"
    assert error["message"] == "a@sha256:0: not as in training"
