"""Reception: what stands behind the front door, each of it made once, at the start."""

from dataclasses import dataclass, field

from rora_serve.admission import Admission
from rora_serve.key_file import KeyFile
from rora_serve.lifetime import Lifetime
from rora_serve.limits import BodyRoom, Limiter
from rora_serve.metrics import Metrics
from rora_serve.models import ModelDirectory

# Where it is found in the app's state.
RECEPTION_STATE = "rora_reception"
_MIB = 1024 * 1024
_MAX_READING_BYTES, _MAX_READING_BYTES_OF_TENANT = 256 * _MIB, 64 * _MIB


def _body_room() -> BodyRoom:
    return BodyRoom(_MAX_READING_BYTES, _MAX_READING_BYTES_OF_TENANT)


@dataclass(frozen=True)
class Reception:
    """What a request goes through before vLLM sees it.

    Args:
        directory: what `model` may mean.
        admission: who is let in, and when.
        limiter: what tenants have used of their limits.
        metrics: which count requests.
        lifetime: whether requests are taken at all.
        max_model_len: tokens of a prompt and its answer at most.
        keys: of tenants; None lets everybody in.
        bodies: room for those that are being read.
    """

    directory: ModelDirectory
    admission: Admission
    limiter: Limiter
    metrics: Metrics
    lifetime: Lifetime
    max_model_len: int
    keys: KeyFile | None = None
    bodies: BodyRoom = field(default_factory=_body_room)
