"""How a slot gets from the loader's process into the worker's, past the engine's loop.

Over a Unix socket in a folder of the server's own, one connection a slot:

    worker   {"num_layers": n, "num_parts": n}, when it is the loader's turn
    loader   {"modules": [name, ...]}
    worker   {"sites": [[layer, part, kind, in, out] or null, ...]}
    loader   {"num_bytes": n}
    worker   a byte, and with it the slot: a file in memory, of as many bytes
    loader   {"lora_int_id": n, "element": "F32"}, once it is laid out
    worker   {"published": true}

lines of JSON, but for the byte. The loader writes where layers read: nothing is copied, and the
worker's main thread, which wants the interpreter too, waits for nothing. Where a file in memory
gets no large pages, before Linux 6.1, the worker copies the slot into memory of its own, which
does. A loader that stops halfway leaves nothing behind.
"""

import ctypes
import json
import logging
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
from rora_serve.engine.pages import SharedPages, new_memory
from rora_serve.engine.slots import Element, Site, Slot
from rora_serve.side_process import LOADING_NICENESS, NICENESS, leave_computing_cores

logger = logging.getLogger(__name__)

# Where the worker listens; set by rora_serve.launch for all of vLLM's processes.
SOCKET_VARIABLE = "RORA_SERVE_SOCKET"
_WORKER_SECONDS = 120  # without a sign of life; it answers in milliseconds
_REST_SECONDS = 0.5  # at most: who the adapter came in for may be gone, or wait for others
_SPARE_BYTES = 64 * 1024**2  # of all together
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
                with turn, spare.at_rest():
                    first_step = _receive(self.connection, self.rfile, self.wfile, holder, spare)
                    if first_step is not None:
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


def _receive(
    connection: socket.socket, rfile: Any, wfile: Any, holder: SlotHolder, spare: "_Spare"
) -> threading.Event | None:
    """Receive one slot. Returns: what tells when its first step is over; None: none came."""
    _write(wfile, {"num_layers": holder.num_layers, "num_parts": holder.num_parts})
    wanted = _read(rfile)
    if wanted is None:
        return None
    _write(wfile, {"sites": [holder.site(name) for name in wanted["modules"]]})
    wanted = _read(rfile)
    if wanted is None:
        return None
    pages = spare.take(wanted["num_bytes"])
    socket.send_fds(connection, [b"f"], [pages.file])
    while pages.find_some():
        pass  # while the loader is at work
    header = _read(rfile)
    if header is None:
        return None
    slot = Slot(
        settled(pages).toreadonly(),
        element=Element[header["element"]],
        num_layers=holder.num_layers,
        num_parts=holder.num_parts,
    )
    first_step = holder.publish(header["lora_int_id"], slot)
    _write(wfile, {"published": True})
    return first_step


def settled(pages: SharedPages) -> memoryview:
    """Return what was written to pages, in large ones if the system has any for this process."""
    if pages.are_large:
        return pages.memory
    memory = new_memory(pages.num_bytes)
    to, source = (ctypes.c_ubyte.from_buffer(piece) for piece in (memory, pages.memory))
    # While other Python runs.
    ctypes.memmove(ctypes.addressof(to), ctypes.addressof(source), pages.num_bytes)
    return memory


class _Spare:
    """Memory for the next slots, which the system looks for before it is needed.

    Virtual machines get pages that they never used, or gave back, from their host: 60 to 90 ms for
    20 MB were measured, which laying a slot out takes 15 ms for. Adapters come in together when a
    server has started, and there is no time for it between one and the next: so it is for several.
    """

    def __init__(self) -> None:
        self._found: deque[SharedPages] = deque()
        self._looked_for: SharedPages | None = None
        self._sizes: deque[int] = deque(maxlen=8)
        self._is_lacking = False
        self._is_calm = threading.Event()
        self._is_calm.set()
        self._renewing = threading.Lock()
        self._lending = threading.Lock()

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

    def take(self, num_bytes: int) -> SharedPages:
        """Return memory for a slot, of which as much is found as was by now."""
        self._sizes.append(num_bytes)
        with self._lending:
            self._is_lacking = False
            if self._found:
                pages = self._found.popleft()
            else:
                pages, self._looked_for = self._looked_for or SharedPages.new(num_bytes), None
        pages.seal(num_bytes)
        return pages

    def renew(self) -> None:
        """Get ready for other slots as large as the last ones: one, and more while they are small.

        Nothing, if another thread does so already, or none came yet.
        """
        if not self._sizes or not self._renewing.acquire(blocking=False):
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
        size = min(max(self._sizes), _SPARE_BYTES)
        with self._lending:
            held = sum(pages.num_bytes for pages in self._found)
            if len(self._found) == _MOST_SPARE or held + size > _SPARE_BYTES:
                return False
            pages = self._looked_for = SharedPages.new(size)
        are_left = True
        while True:
            if self._found or not self._is_lacking:
                self._is_calm.wait()
            with self._lending:
                if self._looked_for is not pages:
                    return True  # a slot got them
                if not are_left:
                    self._found.append(pages)
                    self._looked_for = None
                    return True
            are_left = pages.find_some()


def hand_over(path: Path, lora_int_id: int, folder: Path, weights_digest: str) -> int:
    """Read an adapter and let the worker's next step use it.

    Args:
        path: of the worker's socket.
        lora_int_id: what the engine will call it.
        folder: of the adapter.
        weights_digest: what it has to be.

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
            with connection.makefile("rwb") as stream:
                model = _answer(stream)
                artifact = open_artifact(folder)
                names = list(artifact.modules)
                _write(stream, {"modules": names})
                sites = _answer(stream)["sites"]

                def ask_for_memory(num_bytes: int) -> memoryview:
                    _write(stream, {"num_bytes": num_bytes})
                    return SharedPages(_receive_file(connection), num_bytes).memory

                memory, element = lay_out(
                    artifact,
                    {n: s and Site(*s) for n, s in zip(names, sites, strict=True)},
                    weights_digest=weights_digest,
                    num_layers=model["num_layers"],
                    num_parts=model["num_parts"],
                    make_memory=ask_for_memory,
                )
                _write(stream, {"lora_int_id": lora_int_id, "element": element.name})
                _answer(stream)
                return len(memory)
    except (OSError, json.JSONDecodeError) as error:
        raise EngineSeamError(
            f"the engine's worker takes no adapters ({error}); its log says why"
        ) from error


def _receive_file(connection: socket.socket) -> int:
    """Return the file in memory that a slot is laid out in."""
    data, files, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise ConnectionError("the connection ended")
    if not files:
        raise OSError("no file came with it; more files may be open than the system allows")
    return files[0]


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
