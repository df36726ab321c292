"""FirstSteps: when the step is over that an adapter came in for, and the next one may be loaded.

That step reads a prompt, so that it is among the longest, and every running request waits for it.
Where all cores compute, loading another adapter meanwhile would make it longer still; in the steps
between, which mostly hold a token a request, it may take a quarter of one.
"""

import math
import threading
import time
from collections.abc import Set as AbstractSet

_IDLE_SECONDS = 0.1  # after a step: then there is nobody to go easy on
# That begin without the adapter. Its request comes milliseconds after it, in a step or between two,
# so that it is in the second one that begins; one that was loaded beforehand is in none.
_STEPS_WITHOUT = 2


class FirstSteps:
    """Tells when adapters have been through their first step.

    `expect` may come from any thread, the others from the one that makes steps.
    """

    def __init__(self) -> None:
        self._awaited: tuple[int, threading.Event] | None = None
        self._num_without = 0
        self._of_this_step: threading.Event | None = None
        self._is_stepping = False
        self._ended_at = -math.inf

    def expect(self, lora_int_id: int) -> threading.Event:
        """Return what is set when an adapter's first step is over; set already while none is made.

        Also when the steps that are made turn out to be without it. It stays unset if another one
        is expected before.
        """
        is_over = threading.Event()
        if not self._is_stepping and time.monotonic() - self._ended_at > _IDLE_SECONDS:
            is_over.set()
        self._num_without = 0
        self._awaited = (lora_int_id, is_over)
        return is_over

    def begin(self, lora_int_ids: AbstractSet[int]) -> None:
        """Begin a step of these adapters."""
        self._is_stepping = True
        if self._awaited is None:
            return
        lora_int_id, is_over = self._awaited
        if lora_int_id in lora_int_ids:
            self._of_this_step, self._awaited = is_over, None
        else:
            self._num_without += 1
            if self._num_without == _STEPS_WITHOUT:
                is_over.set()

    def end(self) -> None:
        """End it."""
        self._is_stepping = False
        self._ended_at = time.monotonic()
        if self._of_this_step is not None:
            self._of_this_step.set()
            self._of_this_step = None
