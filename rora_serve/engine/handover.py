"""How a slot gets from the loader's process into the worker's, past the engine's loop.

Over a Unix socket in a folder of the server's own, one connection a slot:

    loader   a byte, and with it a file in memory whose first bytes will be the slot's
    worker   {"num_layers": n, "num_parts": n}, when it is the loader's turn
    loader   {"modules": [name, ...]}
    worker   {"sites": [[layer, part, kind, in, out] or null, ...]}
    loader   {"lora_int_id": n, "num_bytes": n, "element": "F32"}, once the file is written
    worker   {"published": true}

after the byte, lines of JSON. The worker copies the slot out of the file in one call to the system,
for which no thread has to wait: to receive 20 MB through the socket took longer than all of the
loader's work, since the worker's main thread wants the interpreter too. So slots lie in memory of
the worker's own, in large pages, which files in memory seldom get, and the loader uses one file for
all. A loader that stops halfway leaves nothing behind.
"""

import io
import json
import logging
import mmap
import os
import socket
import socketserver
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from adapters import open_artifact
from adapters.errors import EngineSeamError
from rora_serve.engine.loading import lay_out
from rora_serve.engine.pages import Pages
from rora_serve.engine.slots import Element, Site, Slot
from rora_serve.side_process import LOADING_NICENESS, NICENESS, leave_computing_cores

logger = logging.getLogger(__name__)

# Where the worker listens; set by rora_serve.launch for all of vLLM's processes.
SOCKET_VARIABLE = "RORA_SERVE_SOCKET"
_WORKER_SECONDS = 120  # without a sign of life; it answers in milliseconds
_REST_SECONDS = 0.5  # at most: who the adapter came in for may be gone, or wait for others
_KEPT_BYTES = 64 * 1024**2  # of a draft, or for the next slots; new pages cost more than old ones
_MOST_SPARE = 4  # slots that memory is found for beforehand


def refusal_file() -> Path:
    """Return where the worker writes why it does not serve the base model, beside its socket."""
    return Path(os.environ[SOCKET_VARIABLE]).with_name("refusal")


class SlotHolder(Protocol):
    """What receives slots in the worker."""

    @property
    def num_layers(self) -> int: ...  # noqa: D102

    @property
    def num_parts(self) -> int: ...  # noqa: D102

    @property
    def site(self) -> Callable[[str], Site | None]: ...  # noqa: D102

    def publish(self, lora_int_id: int, slot: Slot) -> threading.Event: ...  # noqa: D102


def receive_slots(path: Path, holder: SlotHolder) -> None:
    """Receive slots for `holder` in a thread of its own, as long as the process runs."""
    spare = _Spare()
    turn = threading.Lock()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            _let_others_go_first(LOADING_NICENESS)
            try:
                slot_file = _receive_file(self.request)
                if slot_file is None:
                    return
                with slot_file, turn, spare.at_rest():
                    first_step = _receive(slot_file, self.rfile, self.wfile, holder, spare)
                    if first_step is None:
                        return  # the adapter was refused
                    first_step.wait(_REST_SECONDS)
                _let_others_go_first(NICENESS)  # for a load that may never come
                spare.renew()
            except (OSError, ValueError) as error:  # the loader is gone; the server starts another
                logger.warning("a slot was not handed over: %s", error)

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    server = Server(str(path), Handler)

    def serve() -> None:
        leave_computing_cores()
        server.serve_forever()

    threading.Thread(target=serve, name="receive-slots", daemon=True).start()


def _let_others_go_first(least: int) -> None:
    """Give this thread a niceness of at least so much; without a privilege nobody gets less."""
    thread = threading.get_native_id()
    niceness = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, max(niceness, least))


def _receive_file(connection: socket.socket) -> io.FileIO | None:
    """Return the file that slots are laid out in; None if the loader went away."""
    data, files, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    if not files:
        raise OSError("no file came with it; more files may be open than the system allows")
    return io.FileIO(files[0])


def _receive(
    file: io.FileIO, rfile: Any, wfile: Any, holder: SlotHolder, spare: "_Spare"
) -> threading.Event | None:
    """Receive one slot. Returns: what tells when its first step is over; None: none came."""
    _write(wfile, {"num_layers": holder.num_layers, "num_parts": holder.num_parts})
    wanted = _read(rfile)
    if wanted is None:
        return None
    _write(wfile, {"sites": [holder.site(name) for name in wanted["modules"]]})
    header = _read(rfile)
    if header is None:
        return None
    memory = copied(file.fileno(), spare.take(header["num_bytes"]))
    slot = Slot(
        memory,
        element=Element[header["element"]],
        num_layers=holder.num_layers,
        num_parts=holder.num_parts,
    )
    first_step = holder.publish(header["lora_int_id"], slot)
    _write(wfile, {"published": True})
    return first_step


class _Spare:
    """Memory for the next slots, which the system looks for before it is needed.

    Virtual machines get pages that they never used, or gave back, from their host: 60 to 90 ms for
    20 MB were measured, which copying them takes 3 ms for. Adapters come in together when a server
    has started, and there is no time for it between one and the next: so it is for several.
    """

    def __init__(self) -> None:
        self._found: deque[Pages] = deque()
        self._looked_for: Pages | None = None
        self._sizes: deque[int] = deque(maxlen=8)
        self._is_lacking = False
        self._is_calm = threading.Event()
        self._is_calm.set()
        self._renewing = threading.Lock()
        # Zeros are written to what is nobody's yet.
        self._touching = threading.Lock()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Surround a load, and its first step, beside which only what it lacks is looked for.

        A processor that waits for a page of its host's does nothing else.
        """
        self._is_lacking = True
        self._is_calm.clear()
        try:
            yield
        finally:
            self._is_calm.set()

    def take(self, num_bytes: int) -> memoryview:
        """Return memory for a slot, of which as much is found as was by now."""
        self._sizes.append(num_bytes)
        with self._touching:
            self._is_lacking = False
            while self._found and self._found[0].num_bytes < num_bytes:
                self._found.popleft()  # slots are larger now
            pages = self._found.popleft() if self._found else None
            if pages is None:
                pages, self._looked_for = self._looked_for, None
            if pages is None or pages.num_bytes < num_bytes:
                pages = Pages(num_bytes)
        return pages.hold(num_bytes)

    def renew(self) -> None:
        """Get ready for other slots as large as the last ones: one, and more while they are small.

        Nothing, if another thread does so already.
        """
        if not self._renewing.acquire(blocking=False):
            return
        try:
            while self._find_one():
                pass
        except OSError as error:
            logger.warning("no memory was found for the next slot: %s", error)
        finally:
            self._renewing.release()

    def _find_one(self) -> bool:
        """Find memory for one more slot; tell whether there was need for it."""
        size = min(max(self._sizes), _KEPT_BYTES)
        with self._touching:
            held = sum(pages.num_bytes for pages in self._found)
            if len(self._found) == _MOST_SPARE or held + size > _KEPT_BYTES:
                return False
            pages = self._looked_for = Pages(size)
        touching = pages.touch()
        while True:
            if self._found or not self._is_lacking:
                self._is_calm.wait()
            with self._touching:
                if self._looked_for is not pages:
                    return True  # a slot got them
                if next(touching, self) is self:
                    self._found.append(pages)
                    self._looked_for = None
                    return True


def copied(file: int, memory: memoryview) -> memoryview:
    """Fill a slot's memory with a file's first bytes, and return it to be read.

    Raises: OSError: the file has fewer.
    """
    at, num_bytes = 0, len(memory)
    while at < num_bytes:
        count = os.preadv(file, [memory[at:]], at)
        if not count:
            raise OSError(f"a slot's file has {at} bytes, {num_bytes} are expected")
        at += count
    return memory.toreadonly()


class Draft:
    """A file in memory, without a name, in which one slot after the other is laid out."""

    def __init__(self) -> None:
        self.file = os.memfd_create("rora-serve-slot", os.MFD_CLOEXEC)
        self._memory: mmap.mmap | None = None

    def room(self, num_bytes: int) -> memoryview:
        """Return its first bytes, to be written to; what they were before is of no use."""
        if self._memory is None or len(self._memory) < num_bytes:
            os.ftruncate(self.file, num_bytes)
            self._memory = mmap.mmap(self.file, num_bytes)
        return memoryview(self._memory)[:num_bytes]

    def tidy(self) -> None:
        """Give a large slot's memory back."""
        if self._memory is not None and len(self._memory) > _KEPT_BYTES:
            self._memory = None
            os.ftruncate(self.file, 0)


def hand_over(
    path: Path, lora_int_id: int, folder: Path, weights_digest: str, *, draft: Draft
) -> int:
    """Read an adapter and let the worker's next step use it.

    Args:
        path: of the worker's socket.
        lora_int_id: what the engine will call it.
        folder: of the adapter.
        weights_digest: what it has to be.
        draft: nobody else's at the time.

    Returns: bytes of its slot.

    Raises:
        ArtifactError, AdapterMismatchError: as `lay_out`; the worker is as before.
        EngineSeamError: the worker does not answer.
    Cost: reads the adapter once.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_WORKER_SECONDS)
            connection.connect(str(path))
            socket.send_fds(connection, [b"f"], [draft.file])
            with connection.makefile("rwb") as stream:
                model = _answer(stream)
                artifact = open_artifact(folder)
                names = list(artifact.modules)
                _write(stream, {"modules": names})
                sites = _answer(stream)["sites"]
                memory, element = lay_out(
                    artifact,
                    {n: s and Site(*s) for n, s in zip(names, sites, strict=True)},
                    weights_digest=weights_digest,
                    num_layers=model["num_layers"],
                    num_parts=model["num_parts"],
                    make_memory=draft.room,
                )
                header = {"num_bytes": len(memory), "element": element.name}
                _write(stream, {"lora_int_id": lora_int_id, **header})
                _answer(stream)
                return len(memory)
    except (OSError, json.JSONDecodeError) as error:
        raise EngineSeamError(
            f"the engine's worker takes no adapters ({error}); its log says why"
        ) from error
    finally:
        draft.tidy()


def _answer(stream: Any) -> dict[str, Any]:
    answer = _read(stream)
    if answer is None:
        raise ConnectionError("the connection ended")
    return answer


def _read(stream: Any) -> dict[str, Any] | None:
    line = stream.readline()
    return json.loads(line) if line else None


def _write(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()
