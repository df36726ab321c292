"""Loader: reads adapters in a process of its own, so that it stalls neither engine nor server."""

from pathlib import Path

from adapters import ResolvedVersion
from rora_serve.engine.handover import hand_over
from rora_serve.side_process import LOADING_NICENESS, SideProcess


class Loader:
    """Hands adapters of the store to the engine's worker, one after the other.

    Args: socket: where the worker receives them.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._process = SideProcess(LOADING_NICENESS)
        self._process.start()

    async def load(self, lora_int_id: int, resolved: ResolvedVersion) -> int:
        """Load an adapter's weights into the engine. Returns: bytes that they take there.

        Raises:
            ArtifactError: the folder is not what was stored.
            AdapterMismatchError: it does not fit the model.
            StoreError: reading it ended the loader's process.
            EngineSeamError: the engine takes no adapters.
        """
        weights = resolved.version.weights_digest
        job = (self._socket, lora_int_id, resolved.folder, weights)
        return await self._process.run(resolved.public_id, hand_over, *job)

    def close(self) -> None:
        """End the process."""
        self._process.close()
