"""What a folder holds is what its slot holds, by whichever way it gets there."""

import asyncio
import contextlib
import multiprocessing
import os
import platform
import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest

from adapters import AdapterConfig, AdapterStore, ResolvedVersion, open_artifact, write_artifact
from adapters.digest import weights_digest
from adapters.errors import AdapterMismatchError, ArtifactError, EngineSeamError, StoreError
from adapters.limits import MIB
from adapters.tensors import Array
from rora_serve.engine import handover
from rora_serve.engine.handover import hand_over, receive_slots
from rora_serve.engine.loading import lay_out, read_slot
from rora_serve.engine.pages import SharedPages, new_memory
from rora_serve.engine.slots import Element, Site, Slot
from rora_serve.loader import Loader
from rora_serve.side_process import LOADING_NICENESS

SITES: dict[str, Site | None] = {
    "m.q": Site(0, 0, "linear", 6, 8),
    "m.v": Site(0, 2, "linear", 6, 4),
    "m.o": Site(2, 0, "linear", 8, 6),
    "m.e": Site(3, 0, "embedding", 20, 6),
}
NUM_LAYERS, NUM_PARTS = 4, 3


class Holder:
    """Stands for the worker's manager."""

    num_layers, num_parts = NUM_LAYERS, NUM_PARTS

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.first_step = threading.Event()
        self.first_step.set()

    @property
    def site(self) -> Callable[[str], Site | None]:
        return SITES.get

    def publish(self, lora_int_id: int, slot: Slot) -> threading.Event:
        self.slots[lora_int_id] = slot
        return self.first_step


def make(folder: Path, factors: dict[str, tuple[int, int, int]], dtype: object = "f4") -> Path:
    """factors: per module (rank, in_features, out_features)."""
    generator = np.random.default_rng(0)
    arrays = {
        name: (
            generator.normal(size=(rank, columns)).astype(dtype),  # type: ignore[call-overload]
            generator.normal(size=(rows, rank)).astype(dtype),  # type: ignore[call-overload]
        )
        for name, (rank, columns, rows) in factors.items()
    }
    pattern = {name: rank for name, (rank, _, _) in factors.items()}
    config = AdapterConfig(
        1, 4, use_rslora=True, rank_pattern=pattern, target_modules=tuple(factors)
    )
    write_artifact(folder, config, arrays, provenance={})
    return folder


def read(folder: Path) -> Slot:
    return read_slot(
        folder,
        SITES.get,
        weights_digest=weights_digest(open_artifact(folder)),
        num_layers=NUM_LAYERS,
        num_parts=NUM_PARTS,
    )


def block(slot: Slot, layer: int, count: int) -> Array:
    dtypes = {Element.F32: "f4", Element.F16: "f2", Element.BF16: ml_dtypes.bfloat16}
    dtype = np.dtype(dtypes[slot.element])
    return np.frombuffer(slot.memory, dtype, count, int(slot.offsets[layer]))


@pytest.mark.parametrize(
    ("dtype", "element"),
    [("f4", Element.F32), ("f2", Element.F16), (ml_dtypes.bfloat16, Element.BF16)],
)
def test_a_slot_holds_the_files_numbers_unpadded_and_in_their_dtype(
    tmp_path: Path, dtype: object, element: Element
) -> None:
    folder = make(tmp_path / "a", {"m.v": (1, 6, 4), "m.q": (3, 6, 8)}, dtype)
    slot = read(folder)
    assert slot.element is element
    assert slot.ranks.tolist() == [[3, 0, 1], [0] * 3, [0] * 3, [0] * 3]
    assert slot.scalings[0].tolist() == [np.float32(4 / 3**0.5), 0, 4]
    assert (slot.addresses > 0).tolist() == [True, False, False, False]
    stored = {module.name: (a, b) for module, a, b in open_artifact(folder).read_tensors()}
    numbers = [stored["m.q"][0], stored["m.v"][0], stored["m.q"][1].T, stored["m.v"][1].T]
    expected = np.concatenate([array.reshape(-1) for array in numbers])
    np.testing.assert_array_equal(block(slot, 0, len(expected)), expected)
    tables = slot.offsets.nbytes + slot.ranks.nbytes + slot.scalings.nbytes
    assert len(slot.memory) <= tables + 64 + open_artifact(folder).num_bytes


def test_factors_of_several_dtypes_are_held_exactly(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    a = generator.normal(size=(2, 6)).astype("f2")
    b = generator.normal(size=(8, 2)).astype("f4")
    config = AdapterConfig(2, 2, target_modules=("m.q",))
    write_artifact(tmp_path / "a", config, {"m.q": (a, b)}, provenance={})
    slot = read(tmp_path / "a")
    assert slot.element is Element.F32
    expected = np.concatenate([a.astype("f4").reshape(-1), b.T.reshape(-1)])
    np.testing.assert_array_equal(block(slot, 0, len(expected)), expected)
    version = AdapterStore(tmp_path / "store").add(tmp_path / "a", name="a").version
    assert version.num_bytes == expected.nbytes > open_artifact(tmp_path / "a").num_bytes, (
        "room is made for what the slot takes"
    )


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"m.x": (2, 6, 8)}, "m.x: the base model has no such linear layer that"),
        ({"m.e": (2, 20, 6)}, "m.e: the base model has no such linear layer that"),
        (
            {"m.q": (2, 6, 9)},
            r"m.q: the adapter is for \[9, 6\], the base model has \[8, 6\]",
        ),
        ({"m.q": (513, 6, 8)}, "m.q: rank 513, at most 512 is served"),
        ({"m.q": (1, 6, 8), "m.x": (1, 1, 1), "m.y": (1, 1, 1)}, r"m\.x: .*; m\.y: "),
        ({f"m.{n}": (1, 1, 1) for n in range(9)}, "and 4 more modules"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_all_that_does_not(
    tmp_path: Path, factors: dict[str, tuple[int, int, int]], message: str
) -> None:
    with pytest.raises(AdapterMismatchError, match=message):
        read(make(tmp_path / "a", factors))


def test_two_modules_of_one_place_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", {"m.q": (1, 6, 8), "n.q": (2, 6, 8)})
    with pytest.raises(AdapterMismatchError, match=r"one place for it and m\.q"):
        read_slot(
            folder,
            lambda name: SITES[name.replace("n.", "m.")],
            weights_digest=weights_digest(open_artifact(folder)),
            num_layers=NUM_LAYERS,
            num_parts=NUM_PARTS,
        )


def test_another_file_than_the_digests_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", {"m.q": (3, 6, 8)})
    artifact = open_artifact(folder)
    digest = weights_digest(artifact)
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()

    def read_again() -> None:
        lay_out(artifact, SITES, weights_digest=digest, num_layers=4, num_parts=3)

    for content, message in (
        (whole[:-4] + b"\0\0\0\0", "differs from what was stored"),
        (whole[:-1], "ends after"),
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            read_again()
    path.unlink()
    with pytest.raises(ArtifactError, match="is gone"):
        read_again()
    path.write_bytes(whole)
    read_again()


def test_what_another_process_writes_to_a_slot_is_there_and_its_memory_goes_back() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    num_bytes = 5 * MIB + 5  # of large pages and small ones
    pages = SharedPages.new(num_bytes)
    written = multiprocessing.get_context("fork").Process(target=_write, args=(pages,))
    written.start()
    written.join()
    written.close()
    memory = pages.memory.toreadonly()
    assert bytes(memory) == bytes(range(250)) * (num_bytes // 250) + bytes(num_bytes % 250)
    del pages
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "what is mapped stays without it"
    assert bytes(memory[:3]) == b"\0\1\2"
    content = memory.obj
    gone = weakref.ref(content)
    del content, memory
    assert gone() is None, "it goes with the last that refers to it"


def _write(pages: SharedPages) -> None:
    other = SharedPages(os.dup(pages.file), pages.num_bytes)
    other.memory[: -(pages.num_bytes % 250)] = bytes(range(250)) * (pages.num_bytes // 250)


def test_pages_are_found_without_touching_what_is_there_and_large_where_they_can_be() -> None:
    pages = SharedPages.new(7 * MIB)
    pages.memory[3 * MIB : 3 * MIB + 5] = b"there"
    assert [pages.find_some() for _ in range(5)] == [True] * 4 + [False]
    assert bytes(pages.memory[3 * MIB - 1 : 3 * MIB + 6]) == b"\0there\0"
    pages.memory[6 * MIB :] = b"x" * MIB
    pages.seal(9 * MIB)
    while pages.find_some():
        pass
    assert bytes(pages.memory[3 * MIB : 3 * MIB + 5]) == b"there"
    assert bytes(pages.memory[6 * MIB : 9 * MIB]) == b"x" * MIB + bytes(2 * MIB)
    assert len(bytes(pages.memory)) == 9 * MIB
    if _gives_large_pages():
        assert _mapping_of(pages.memory)["ShmemPmdMapped"] == 8 * 1024


def test_nobody_can_cut_what_another_process_reads() -> None:
    pages = SharedPages.new(MIB)
    pages.seal(MIB // 2)
    for num_bytes in (0, MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(pages.file, num_bytes)
    pages.memory[:2] = b"ab"
    assert os.pread(pages.file, 2, 0) == b"ab"


@pytest.mark.parametrize(
    ("missing", "are_large"), [("_MADV_COLLAPSE", False), ("MADV_POPULATE_WRITE", True)]
)
def test_older_systems_find_pages_too_and_slots_are_in_large_ones(
    missing: str, are_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"rora_serve.engine.pages.{missing}", 9999)
    pages = SharedPages.new(5 * MIB)
    pages.memory[3 * MIB] = 7
    before = psutil.Process().memory_info().rss
    while pages.find_some():
        pass
    assert psutil.Process().memory_info().rss - before > 4 * MIB
    assert pages.are_large is (are_large and _gives_large_pages())
    memory = handover.settled(pages)
    assert bytes(memory) == bytes(3 * MIB) + b"\7" + bytes(2 * MIB - 1)
    is_copy = not pages.are_large
    pages.memory[0] = 1
    assert memory[0] == (0 if is_copy else 1)


def _gives_large_pages() -> bool:
    return tuple(int(n) for n in platform.release().split("-")[0].split(".")[:2]) >= (6, 1)


def _mapping_of(memory: memoryview) -> dict[str, int]:
    """KiB of each kind of the mapping that begins where `memory` does."""
    start = np.frombuffer(memory, np.uint8).ctypes.data
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(f"{start:x}-") for line in lines)
    found = {}
    for line in lines:
        match = re.fullmatch(r"(\w+): +(\d+) kB", line)
        if match is None:
            break
        found[match[1]] = int(match[2])
    return found


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 2 * 1024**2, 21 * 1024**2 + 1])
@pytest.mark.parametrize(
    "memory", [new_memory, lambda num_bytes: SharedPages.new(num_bytes).memory]
)
def test_memory_is_not_rounded_up_to_large_pages(
    num_bytes: int, memory: Callable[[int], memoryview]
) -> None:
    before = psutil.Process().memory_info().rss
    numbers = np.frombuffer(memory(num_bytes), np.uint8)
    numbers[:] = 1
    assert psutil.Process().memory_info().rss - before <= num_bytes + 512 * 1024
    assert len(numbers) == num_bytes
    if num_bytes:
        assert numbers.ctypes.data % (2 * MIB) == 0
    del numbers
    assert psutil.Process().memory_info().rss - before <= 512 * 1024


def test_memory_that_was_found_before_gives_back_what_a_slot_does_not_need() -> None:
    before = psutil.Process().memory_info().rss
    pages = SharedPages.new(21 * MIB)
    while pages.find_some():
        pass
    assert psutil.Process().memory_info().rss - before > 20 * MIB
    pages.seal(5 * MIB + 1)
    numbers = np.frombuffer(pages.memory, np.uint8)
    assert not numbers.any()
    assert psutil.Process().memory_info().rss - before < 6 * MIB
    assert 512 * os.fstat(pages.file).st_blocks < 6 * MIB, "nor does the file have it"
    numbers[:] = 1
    del pages
    assert numbers.all(), "it is the slot's by now"
    del numbers
    assert psutil.Process().memory_info().rss - before < MIB


def test_memory_is_found_for_several_slots_and_lent_to_one_each() -> None:
    spare = handover._Spare()
    spare.take(3 * MIB)
    spare.renew()
    found = list(spare._found)
    assert [pages.num_bytes for pages in found] == [3 * MIB] * 4
    assert not any(pages.find_some() for pages in found), "all pages are found"
    taken = [spare.take(num_bytes) for num_bytes in (3 * MIB, 1 * MIB, 2 * MIB)]
    assert taken == found[:3]
    assert [len(pages.memory) for pages in taken] == [3 * MIB, 1 * MIB, 2 * MIB]
    for number, pages in enumerate(taken):
        pages.memory[:] = bytes([number]) * pages.num_bytes
    assert [pages.memory[-1] for pages in taken] == [0, 1, 2]
    assert len(spare.take(20 * MIB).memory) == 20 * MIB, "more than was foreseen"
    spare.renew()
    assert [pages.num_bytes for pages in spare._found] == [20 * MIB] * 3, "64 MiB at most"
    assert spare.take(100 * MIB).num_bytes == 100 * MIB
    spare._found.clear()
    spare.renew()
    assert [pages.num_bytes for pages in spare._found] == [64 * MIB], "of large ones a part"


def test_a_slot_may_get_memory_of_which_a_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spare = handover._Spare()
    spare.take(9 * MIB)
    half_way, go_on = threading.Event(), threading.Event()
    find_some = SharedPages.find_some

    def find_slowly(pages: SharedPages) -> bool:
        if threading.current_thread() is thread and pages._found_bytes == 4 * MIB:
            half_way.set()
            assert go_on.wait(60)
        return find_some(pages)

    monkeypatch.setattr(SharedPages, "find_some", find_slowly)
    thread = threading.Thread(target=spare.renew)
    thread.start()
    assert half_way.wait(60)
    pages = spare.take(15 * MIB)
    go_on.set()
    assert pages._found_bytes == 4 * MIB
    while pages.find_some():
        pass
    pages.memory[:] = b"x" * 15 * MIB
    assert bytes(pages.memory) == b"x" * 15 * MIB
    thread.join(60)
    assert not thread.is_alive()
    assert pages not in spare._found


def test_memory_is_not_looked_for_beside_a_load_that_has_some() -> None:
    spare = handover._Spare()
    spare.take(8 * MIB)
    with spare.at_rest():
        thread = threading.Thread(target=spare.renew)
        thread.start()
        _wait_until(lambda: len(spare._found) == 1)
        time.sleep(0.2)
        assert len(spare._found) == 1, "what this load needs, and no more"
        assert spare.take(8 * MIB).num_bytes == 8 * MIB
        time.sleep(0.2)
        assert not spare._found, "it has what it needs"
    thread.join(60)
    assert not thread.is_alive()
    assert len(spare._found) == 4


def _wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_slot_after_the_other_is_handed_over_whatever_their_sizes(tmp_path: Path) -> None:
    holder = Holder()
    receive_slots(tmp_path / "socket", holder)
    for number, rank in enumerate((9, 1, 30, 2, 2)):
        folder = make(tmp_path / str(number), {"m.v": (rank, 6, 4), "m.o": (200, 8, 6)})
        digest = weights_digest(open_artifact(folder))
        hand_over(tmp_path / "socket", number, folder, digest)
        assert bytes(holder.slots[number].memory) == read(folder).memory[:]


def _slot_files() -> list[str]:
    """Files in memory that are open: of slots to come, and of those that are being laid out."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(os.readlink(link))  # noqa: PTH115  (of a file without a name)
    return [name for name in names if "rora-serve-slot" in name]


def test_a_slot_is_handed_over_as_it_was_laid_out(tmp_path: Path) -> None:
    holder, num_files = Holder(), len(_slot_files())
    receive_slots(tmp_path / "socket", holder)
    folder = make(tmp_path / "a", {"m.v": (1, 6, 4), "m.o": (200, 8, 6)})
    expected = read(folder)
    digest = weights_digest(open_artifact(folder))
    assert hand_over(tmp_path / "socket", 7, folder, digest) == len(expected.memory)
    assert bytes(holder.slots[7].memory) == expected.memory[:]
    assert not holder.slots[7].ranks.flags.writeable
    with pytest.raises(ArtifactError, match="differs from what was stored"):
        hand_over(tmp_path / "socket", 8, folder, "0" * 64)
    misfit = make(tmp_path / "b", {"m.x": (1, 1, 1)})
    other_digest = weights_digest(open_artifact(misfit))
    with pytest.raises(AdapterMismatchError, match=r"m\.x"):
        hand_over(tmp_path / "socket", 8, misfit, other_digest)
    assert list(holder.slots) == [7]
    # What was refused has gone, and others are ready.
    _wait_until(lambda: len(_slot_files()) == num_files + handover._MOST_SPARE)
    with pytest.raises(EngineSeamError, match="takes no adapters"):
        hand_over(tmp_path / "nobody", 8, folder, digest)


def test_a_load_begins_when_the_first_step_of_the_last_ones_adapter_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_REST_SECONDS", 60.0)
    holder = Holder()
    holder.first_step.clear()
    receive_slots(tmp_path / "socket", holder)
    folder = make(tmp_path / "a", {"m.q": (3, 6, 8)})
    digest = weights_digest(open_artifact(folder))

    def load(lora_int_id: int) -> None:
        hand_over(tmp_path / "socket", lora_int_id, folder, digest)

    load(1)
    second = threading.Thread(target=load, args=(2,), daemon=True)
    second.start()
    second.join(0.2)
    assert second.is_alive(), "it waits"
    assert list(holder.slots) == [1]
    holder.first_step.set()
    second.join(20)
    assert list(holder.slots) == [1, 2]


def test_a_load_waits_for_a_first_step_that_never_comes_for_a_moment_only(tmp_path: Path) -> None:
    holder = Holder()
    holder.first_step.clear()
    receive_slots(tmp_path / "socket", holder)
    folder = make(tmp_path / "a", {"m.q": (3, 6, 8)})
    digest = weights_digest(open_artifact(folder))
    for number in range(2):
        hand_over(tmp_path / "socket", number, folder, digest)
    assert list(holder.slots) == [0, 1]


@pytest.mark.parametrize(("server", "expected"), [(0, LOADING_NICENESS), (15, 15)])
def test_slots_are_received_behind_what_computes_and_never_before_the_server(
    tmp_path: Path, server: int, expected: int
) -> None:
    """Without a privilege nobody may be less nice than the server is."""
    found: list[int] = []

    class Noting(Holder):
        def publish(self, lora_int_id: int, slot: Slot) -> threading.Event:
            found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return super().publish(lora_int_id, slot)

    def start() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), server)
        receive_slots(tmp_path / "socket", Noting())

    starter = threading.Thread(target=start)
    starter.start()
    starter.join()
    folder = make(tmp_path / "a", {"m.q": (3, 6, 8)})
    digest = weights_digest(open_artifact(folder))
    hand_over(tmp_path / "socket", 1, folder, digest)
    assert found == [expected]


@pytest.fixture
def resolved(tmp_path: Path) -> ResolvedVersion:
    return AdapterStore(tmp_path / "store").add(make(tmp_path / "a", {"m.q": (3, 6, 8)}), name="a")


def reader_of(pid: int) -> psutil.Process:
    """The process in which the loader of process `pid` reads; it is the last one that started."""
    children = psutil.Process(pid).children()
    readers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return max(readers, key=lambda reader: reader.create_time())


def test_the_loader_reads_in_a_process_of_its_own_and_outlives_its_death(
    tmp_path: Path, resolved: ResolvedVersion
) -> None:
    holder = Holder()
    receive_slots(tmp_path / "socket", holder)

    async def load() -> None:
        with contextlib.closing(Loader(tmp_path / "socket")) as loader:
            assert await loader.load(1, resolved) == len(holder.slots[1].memory)
            reader = reader_of(os.getpid())
            reader.kill()
            psutil.wait_procs([reader])
            await asyncio.sleep(0.2)
            with pytest.raises(StoreError, match="was ended while it was read"):
                await loader.load(2, resolved)
            await loader.load(3, resolved)
            (resolved.folder / "adapter_config.json").write_text("{")
            with pytest.raises(ArtifactError) as caught:
                await loader.load(4, resolved)
            assert caught.value.problems, "what the process found comes over whole"

    asyncio.run(load())
    assert set(holder.slots) == {1, 3}


def test_a_loader_ends_with_its_parent(tmp_path: Path, resolved: ResolvedVersion) -> None:
    """Even if that is killed, and so can not say goodbye."""
    receive_slots(tmp_path / "socket", Holder())
    context = multiprocessing.get_context("spawn")
    loaded = context.Event()
    parent = context.Process(target=_load_and_wait, args=(tmp_path / "socket", resolved, loaded))
    parent.start()
    assert loaded.wait(60)
    assert parent.pid is not None
    reader = reader_of(parent.pid)
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs([reader], timeout=20)
    assert alive == []


def _load_and_wait(socket: Path, resolved: ResolvedVersion, loaded: Any) -> None:
    loader = Loader(socket)
    asyncio.run(loader.load(1, resolved))
    loaded.set()
    time.sleep(60)
