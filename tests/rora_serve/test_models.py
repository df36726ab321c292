import asyncio
import json
import shutil
from pathlib import Path

import pytest

from adapters import AdapterStore, ResolvedVersion
from adapters.errors import (
    AdapterMismatchError,
    AdapterNameError,
    AdapterNotFoundError,
    StoreError,
)
from rora_serve.models import ModelDirectory, ServedBase, check_names

BASE = "base"
CAPACITY = 1_000_000
SERVED = ServedBase((BASE,), "f" * 64, "{{ base template }}")


class Engine:
    """Stands for the engine at the other end: notes what it is told, and can refuse or fail."""

    def __init__(self) -> None:
        self.loaded: list[tuple[int, Path]] = []
        self.held: set[int] = set()
        self.failures: list[Exception] = []

    async def load(self, lora_int_id: int, resolved: ResolvedVersion) -> int:
        await asyncio.sleep(0.01)
        if self.failures:
            raise self.failures.pop(0)
        assert lora_int_id not in self.held
        self.loaded.append((lora_int_id, resolved.folder))
        self.held.add(lora_int_id)
        return resolved.version.num_bytes

    async def drop(self, lora_int_id: int) -> None:
        await asyncio.sleep(0.01)
        self.held.remove(lora_int_id)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def store(tmp_path: Path, adapter: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    store.add(adapter, name="a")
    return store


@pytest.fixture
def directory(store: AdapterStore, engine: Engine) -> ModelDirectory:
    return ModelDirectory(SERVED, store, engine, capacity=CAPACITY)


def test_the_base_is_no_adapter_and_an_unknown_name_is_not_found(
    directory: ModelDirectory, engine: Engine
) -> None:
    assert asyncio.run(directory.open(BASE)) is None
    with pytest.raises(AdapterNotFoundError):
        asyncio.run(directory.open("nobody"))
    assert engine.loaded == []


def test_many_first_requests_load_an_adapter_once(
    directory: ModelDirectory, engine: Engine, store: AdapterStore
) -> None:
    async def ask() -> None:
        digest = store.resolve("a").version.digest
        names = ["a", "a@latest", f"a@sha256:{digest}"] * 5
        served = await asyncio.gather(*(directory.open(name) for name in names))
        assert [adapter.requested for adapter in served if adapter] == names
        assert {adapter.lora_int_id for adapter in served if adapter} == {1}

    asyncio.run(ask())
    assert len(engine.loaded) == 1


def test_a_new_version_is_another_adapter_to_the_engine(
    directory: ModelDirectory, engine: Engine, store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    config = changed / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))

    async def ask() -> None:
        first = await directory.open("a")
        store.add(changed, name="a")
        second = await directory.open("a")
        assert first is not None
        assert second is not None
        assert first.engine_name != second.engine_name
        assert (first.lora_int_id, second.lora_int_id) == (1, 2)

    asyncio.run(ask())
    assert len({folder for _, folder in engine.loaded}) == 2


def test_an_adapter_that_does_not_fit_is_refused_each_time(
    directory: ModelDirectory, engine: Engine
) -> None:
    engine.failures = [AdapterMismatchError("it does not fit") for _ in range(2)]

    async def ask() -> None:
        for _ in range(2):
            with pytest.raises(AdapterMismatchError, match=r"a@sha256:\w{12}: it does not fit"):
                await directory.open("a")
        assert await directory.open("a") is not None

    asyncio.run(ask())


def test_an_engine_error_is_not_remembered(directory: ModelDirectory, engine: Engine) -> None:
    engine.failures = [RuntimeError("lost")]

    async def ask() -> None:
        with pytest.raises(RuntimeError, match="lost"):
            await directory.open("a")
        assert await directory.open("a") is not None

    asyncio.run(ask())


def test_a_client_that_leaves_does_not_cancel_the_load_of_others(
    directory: ModelDirectory, engine: Engine
) -> None:
    async def ask() -> None:
        leaving = asyncio.create_task(directory.open("a"))
        staying = asyncio.create_task(directory.open("a"))
        await asyncio.sleep(0.005)
        leaving.cancel()
        assert await staying is not None

    asyncio.run(ask())
    assert len(engine.loaded) == 1


def test_an_adapter_named_like_the_base_is_refused_at_start(
    store: AdapterStore, adapter: Path
) -> None:
    check_names([BASE], store)
    store.add(adapter, name=BASE)
    with pytest.raises(AdapterNameError, match="named 'base' like the base model"):
        check_names([BASE], store)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("chat_template.jinja", "{{ a ** 9 }}", "template is not served: 'a' is undefined"),
        ("chat_template.jinja", "{{ base template }}\n", None),
        ("rora.json", {"base_model": {"name": "other", "fingerprint": "0"}}, "trained on 'other'"),
        # Another dtype of the same base has other bytes and is allowed by name.
        ("rora.json", {"base_model": {"name": BASE, "fingerprint": "0"}}, None),
        ("rora.json", {"base_model": {"name": "x", "fingerprint": "f" * 64}}, None),
        ("rora.json", {"base_model": "x"}, None),
        ("rora.json", {}, None),
    ],
)
def test_an_adapter_for_something_else_is_refused(
    engine: Engine,
    adapter: Path,
    tmp_path: Path,
    file: str,
    content: object,
    reason: str | None,
) -> None:
    text = content if isinstance(content, str) else json.dumps({"format": 1, **content})  # type: ignore[dict-item]
    (adapter / file).write_text(text)
    # In a store of its own: what rora.json says is not part of a version's digest.
    store = AdapterStore(tmp_path / "other")
    store.add(adapter, name="b")
    directory = ModelDirectory(SERVED, store, engine, capacity=CAPACITY)
    if reason is None:
        assert asyncio.run(directory.open("b")) is not None
        return
    with pytest.raises(AdapterMismatchError, match=reason):
        asyncio.run(directory.open("b"))
    assert engine.loaded == []


def test_a_template_is_looked_at_in_every_version_of_the_same_weights(
    directory: ModelDirectory, engine: Engine, store: AdapterStore, adapter: Path
) -> None:
    for name, text in (("b", "{{ messages[0].content }}"), ("c", "{{ a * 9 }}")):
        (adapter / "chat_template.jinja").write_text(text)
        store.add(adapter, name=name)

    async def ask() -> None:
        plain, templated = await directory.open("a"), await directory.open("b")
        assert plain is not None
        assert templated is not None
        assert plain.chat_template is None
        assert templated.chat_template is not None
        assert templated.chat_template.text == "{{ messages[0].content }}"
        assert (plain.engine_name, plain.lora_int_id) == (
            templated.engine_name, templated.lora_int_id,
        )  # fmt: skip
        for _ in range(2):
            with pytest.raises(
                AdapterMismatchError, match="template is not served: 'a' is undefined"
            ):
                await directory.open("c")

    asyncio.run(ask())
    assert len(engine.loaded) == 1


def test_a_probe_that_was_changed_is_refused(
    directory: ModelDirectory, engine: Engine, store: AdapterStore
) -> None:
    """Of the weights, what reads them says so."""
    (store.resolve("a").folder / "rora.json").write_text('{"format": 1, "probe": [1]}')
    with pytest.raises(AdapterMismatchError, match="differs from what was stored"):
        asyncio.run(directory.open("a"))
    assert engine.loaded == []


def test_the_store_never_shows_its_place_to_clients(
    directory: ModelDirectory, engine: Engine, store: AdapterStore
) -> None:
    folder = store.resolve("a").folder
    for text in (f"{folder}: no file", f"{folder}/adapter_model.safetensors: cut"):
        engine.failures = [AdapterMismatchError(text)]
        with pytest.raises(AdapterMismatchError) as caught:
            asyncio.run(directory.open("a"))
        assert str(store.root) not in str(caught.value)


def test_what_is_served_is_not_collected(directory: ModelDirectory, store: AdapterStore) -> None:
    asyncio.run(directory.open("a"))
    digest = store.resolve("a").version.digest
    with pytest.raises(StoreError, match="in use by a running server"):
        store.remove("a")
    store.remove("a", force=True)
    assert store.collect_garbage().leased == (digest,)
    assert store.collect_garbage().digests == ()


def test_what_is_refused_is_not_kept(
    directory: ModelDirectory, store: AdapterStore, adapter: Path
) -> None:
    (adapter / "chat_template.jinja").write_text("{% include 'x' %}")
    store.add(adapter, name="b")
    with pytest.raises(AdapterMismatchError):
        asyncio.run(directory.open("b"))
    assert list((store.root / "leases").iterdir()) == []


def test_a_store_that_can_only_be_read_is_served(
    directory: ModelDirectory, store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in the lock's place stands for a file system that is mounted to be read."""
    (store.root / ".lock").unlink()
    (store.root / ".lock").mkdir()
    served = asyncio.run(directory.open("a"))
    assert served is not None
    assert "no lease on a@sha256:" in caplog.text


@pytest.fixture
def other(store: AdapterStore, adapter: Path, tmp_path: Path) -> str:
    """Another adapter's name, of the same size."""
    folder = tmp_path / "other"
    shutil.copytree(adapter, folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    store.add(folder, name="other")
    return "other"


def test_adapters_that_nobody_asks_for_make_room_for_others(
    store: AdapterStore, engine: Engine, other: str
) -> None:
    """Their versions may be collected from then on."""
    num_bytes = store.resolve("a").version.num_bytes
    evicted: list[str] = []
    directory = ModelDirectory(SERVED, store, engine, capacity=num_bytes, evicted=evicted.append)

    async def ask() -> None:
        first = await directory.open("a")
        assert first is not None
        assert directory.bytes_by_name() == {"a": num_bytes}
        waiting = asyncio.create_task(directory.open(other))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        directory.close(first, was_answered=True)
        second = await waiting
        assert second is not None
        assert engine.held == {second.lora_int_id}
        directory.close(second, was_answered=True)
        again = await directory.open("a")
        assert again is not None
        assert engine.held == {again.lora_int_id} == {first.lora_int_id}

    asyncio.run(ask())
    assert evicted == ["a", other]
    assert len(engine.loaded) == 3
    leases = [path.name for path in (store.root / "leases").iterdir()]
    assert [name.partition(".")[0] for name in leases] == [store.resolve("a").version.digest]


def test_an_adapter_whose_client_hung_up_stays_until_vllm_gave_the_request_up(
    store: AdapterStore, engine: Engine, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rora_serve.models._ABORT_SECONDS", 0.1)
    num_bytes = store.resolve("a").version.num_bytes
    directory = ModelDirectory(SERVED, store, engine, capacity=num_bytes)

    async def ask() -> None:
        served = await directory.open("a")
        assert served is not None
        directory.close(served, was_answered=False)
        waiting = asyncio.create_task(directory.open(other))
        await asyncio.sleep(0.05)
        assert engine.held == {served.lora_int_id}
        assert await waiting is not None
        assert served.lora_int_id not in engine.held

    asyncio.run(ask())


def test_an_adapter_larger_than_all_memory_for_adapters_is_refused(
    store: AdapterStore, engine: Engine
) -> None:
    directory = ModelDirectory(SERVED, store, engine, capacity=100)
    with pytest.raises(AdapterMismatchError, match="adapter-memory-bytes"):
        asyncio.run(directory.open("a"))
    assert engine.loaded == []
    assert list((store.root / "leases").iterdir()) == []
