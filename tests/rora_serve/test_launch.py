"""How adapters get into an engine that is not on a CPU, where our layers step aside."""

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from adapters.errors import AdapterMismatchError
from rora_serve import launch
from tests.rora_serve.adapter_server import Place


def test_a_containers_share_of_processors_is_rounded_up(tmp_path: Path) -> None:
    assert launch._cpu_quota(tmp_path) is None
    for text, expected in (("max 100000", None), ("250000 100000", 3), ("5000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert launch._cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("num_cores", "given", "expected"),
    [
        (2, {}, "40000"),
        (2, {"GOMP_SPINCOUNT": "7"}, "7"),
        (2, {"OMP_WAIT_POLICY": "active"}, None),
        (8, {}, None),
    ],
)
def test_openmps_threads_sleep_soon_where_every_core_computes(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, given: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
    monkeypatch.setattr(os, "environ", dict(given))
    launch._set_environment()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_kernels_are_compiled_anew_when_any_of_their_sources_changes() -> None:
    """All modules of the engine that compiled functions take code or sizes from."""
    engine = Path(launch.__file__).parent / "engine"
    decorators = re.compile(r"^ *@(cfunc|compiled|inlined|intrinsic)\b", re.MULTILINE)
    sources = {file.stem for file in engine.glob("*.py") if decorators.search(file.read_text())}
    assert {"kernels", "products", "replay"} <= sources
    found = set[str]()
    while sources:
        name = sources.pop()
        found.add(name)
        text = (engine / f"{name}.py").read_text()
        sources |= set(re.findall(r"from rora_serve\.engine\.(\w+) import", text)) - found
    running_them = {"decoding", "large_outputs", "pages", "ragged_batch", "recording", "threads"}
    assert set(launch._KERNEL_SOURCES) == found - running_them


def test_on_gpus_vllm_loads_and_drops_adapters_itself(place: Place) -> None:
    class Engine:
        """Stands for vLLM on a GPU, which is not here."""

        def __init__(self) -> None:
            self.loras: dict[int, LoRARequest] = {}

        async def add_lora(self, request: LoRARequest) -> bool:
            if self.loras:
                raise ValueError("no room")
            self.loras[request.lora_int_id] = request
            return True

        async def remove_lora(self, lora_id: int) -> bool:
            return self.loras.pop(lora_id, None) is not None

    async def run() -> None:
        engine: Any = Engine()
        adapters = launch._Adapters(engine, None)
        first, second = (
            place.store.resolve(f"a@{digest}") for digest in (place.first, place.second)
        )
        assert await adapters.load(5, first) == first.version.num_bytes
        assert engine.loras[5].lora_path == str(first.folder)
        assert engine.loras[5].lora_name == first.version.weights_digest
        with pytest.raises(AdapterMismatchError, match="no room"):
            await adapters.load(6, second)
        await adapters.drop(5)
        path = second.folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
        with pytest.raises(Exception, match="differs from what was stored"):
            await adapters.load(6, second)
        assert engine.loras == {}

    asyncio.run(run())
