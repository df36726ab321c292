"""How a slot gets from the loader's process into the worker's, past the engine's loop.

Over a Unix socket in a folder of the server's own, one connection a slot; lines are JSON:

    loader   {"modules": [name, ...]}
    worker   {"sites": [[layer, part, kind, in, out] or null, ...], "num_layers": n, "num_parts": n}
    loader   {"lora_int_id": n, "num_bytes": n, "element": "F32"}, then that many bytes
    worker   {"published": true}

The worker receives straight into the memory that its layers will read. A loader that stops halfway
leaves nothing behind.
"""

import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from adapters import open_artifact
from adapters.errors import EngineSeamError
from rora_serve.engine.loading import lay_out
from rora_serve.engine.slots import Element, Site, Slot, new_memory

logger = logging.getLogger(__name__)

# Where the worker listens; set by rora_serve.launch for all of vLLM's processes.
SOCKET_VARIABLE = "RORA_SERVE_SOCKET"
_WORKER_SECONDS = 120  # without a sign of life; it answers in milliseconds


class SlotHolder(Protocol):
    """What receives slots in the worker."""

    @property
    def num_layers(self) -> int: ...  # noqa: D102

    @property
    def num_parts(self) -> int: ...  # noqa: D102

    @property
    def site(self) -> Callable[[str], Site | None]: ...  # noqa: D102

    def publish(self, lora_int_id: int, slot: Slot) -> None: ...  # noqa: D102


def receive_slots(path: Path, holder: SlotHolder) -> None:
    """Receive slots for `holder` in a thread of its own, as long as the process runs."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                _receive(self.rfile, self.wfile, holder)
            except OSError as error:  # the loader's end is gone; the server starts another
                logger.warning("a slot was not handed over: %s", error)

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    server = Server(str(path), Handler)

    def serve() -> None:
        # The worker's threads are bound to the cores that compute; this one takes any other.
        with suppress(OSError, AttributeError):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
        server.serve_forever()

    threading.Thread(target=serve, name="receive-slots", daemon=True).start()


def _receive(rfile: Any, wfile: Any, holder: SlotHolder) -> None:
    names: list[str] = json.loads(rfile.readline())["modules"]
    answer = {
        "sites": [holder.site(name) for name in names],
        "num_layers": holder.num_layers,
        "num_parts": holder.num_parts,
    }
    _write(wfile, answer)
    line = rfile.readline()
    if not line:
        return  # the adapter was refused
    header = json.loads(line)
    memory = new_memory(header["num_bytes"])
    with memoryview(memory) as view:
        if rfile.readinto(view) < len(view):
            logger.warning("a slot was not handed over whole")
            return
    slot = Slot(
        memory,
        element=Element[header["element"]],
        num_layers=holder.num_layers,
        num_parts=holder.num_parts,
    )
    holder.publish(header["lora_int_id"], slot)
    _write(wfile, {"published": True})


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
    Cost: reads the adapter once, and copies it once into the worker.
    """
    artifact = open_artifact(folder)
    names = list(artifact.modules)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_WORKER_SECONDS)
            connection.connect(str(path))
            with connection.makefile("rwb") as stream:
                _write(stream, {"modules": names})
                answer = json.loads(stream.readline())
                sites = [None if site is None else Site(*site) for site in answer["sites"]]
                memory, element = lay_out(
                    artifact,
                    dict(zip(names, sites, strict=True)),
                    weights_digest=weights_digest,
                    num_layers=answer["num_layers"],
                    num_parts=answer["num_parts"],
                )
                _write(
                    stream,
                    {
                        "lora_int_id": lora_int_id,
                        "num_bytes": len(memory),
                        "element": element.name,
                    },
                )
                connection.sendall(memory)
                if not stream.readline():
                    raise ConnectionError("the connection ended")
                return len(memory)
    except (ConnectionError, FileNotFoundError, TimeoutError, json.JSONDecodeError) as error:
        raise EngineSeamError(
            f"the engine's worker takes no adapters ({error}); its log says why"
        ) from error


def _write(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()
