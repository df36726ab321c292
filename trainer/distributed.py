"""Several processes that train one adapter together, started by torchrun.

Every process has the whole model and the same weights; each computes the gradient of its share of a
step's samples, and the sums are formed here. An adapter's gradients are so few that one sum a step,
after the backward pass, costs next to nothing, and it does not mind ranks that come and go, as
hooks on parameters would.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from adapters.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Args: rank: 0 to count - 1; local_rank, local_count: among those on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes; one message for all."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(
            tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))

    def any(self, *, truth: bool) -> bool:
        """Tell whether `truth` holds in any process."""
        if self.count == 1:
            return truth
        device = "cuda" if torch.cuda.is_available() else "cpu"
        holds = torch.tensor([float(truth)], device=device)
        self.sum([holds])
        return bool(holds)

    def agree(self, values: Mapping[str, str]) -> None:
        """Make sure that all processes have the same values.

        Raises: TrainingError: in every process, what they differ in.
        """
        if self.count == 1:
            return
        everyone: list[Mapping[str, str]] = [{} for _ in range(self.count)]
        torch.distributed.all_gather_object(everyone, dict(values))
        differing = [name for name in values if len({other[name] for other in everyone}) > 1]
        if differing:
            raise TrainingError(
                f"{' and '.join(differing)} differ between the {self.count} processes, the same "
                "are expected; give all of them the same files and versions"
            )

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


@contextmanager
def started(environ: Mapping[str, str]) -> Iterator[Processes]:
    """Yield this process's place by torchrun's variables in `environ`; alone without them.

    Raises: ConfigError: they are there in part, or hold no numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not environ.keys() & {"RANK", "WORLD_SIZE"}:
        yield Processes()
        return
    try:
        processes = Processes(*(int(environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"environment: {error} of torchrun's {', '.join(names)}, numbers are expected; "
            "start with torchrun"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(processes.local_rank)
        torch.distributed.init_process_group("nccl")
    else:
        # torchrun gives each process one thread unless told otherwise.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes.local_count))
        torch.distributed.init_process_group("gloo")
    try:
        yield processes
    finally:
        torch.distributed.destroy_process_group()
