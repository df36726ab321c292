"""Prober: has the engine answer each version's probe once, and quarantines what answers otherwise.

Knows neither HTTP nor vLLM; what asks the engine is given to it.
"""

import asyncio
import contextvars
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from adapters import AdapterStore, ResolvedVersion
from adapters.errors import QuarantinedError, StoreError
from adapters.probe import Probe, ProbePrompt, read_probe
from adapters.tolerance import Form
from adapters.verdict import Found, LogProbs, ProbeVerdict, compare

if TYPE_CHECKING:
    from rora_serve.models import ServedAdapter

logger = logging.getLogger(__name__)

# Returns the likeliest next tokens after a prompt, as many as the engine gives, with their
# log-probs over the whole vocabulary; of the adapter, or of the base model if there is none.
NextLogProbs = Callable[[Sequence[int], "ServedAdapter | None"], Awaitable[LogProbs]]

# Probes that are asked at once: uploads bring as many as they like past the line for the engine.
_MAX_ASKED = 2
_MAX_BASE_ANSWERS = 256  # a few KB each; most adapters' probes ask the same


def base_in_build(fingerprint: str) -> str:
    """Return the last words of every engine build that runs the base model of this fingerprint."""
    return f"base {fingerprint[:12]}"


class Prober:
    """Compares what the engine answers with what each version's probe says.

    The outcome is kept in the store for this build of the engine, so that it is asked once. Where
    the store can only be read, once a start. A version without a probe proves less and is served.

    Args:
        store: where versions lie, and outcomes.
        next_log_probs: asks the engine.
        build: all that decides what the engine computes, in words.
        form: of the base model in the engine.
        max_prompt_tokens: that the engine takes; longer prompts of a probe are left out.
        quarantined: told the name of an adapter of which a version failed.
    """

    def __init__(
        self,
        store: AdapterStore,
        next_log_probs: NextLogProbs,
        *,
        build: str,
        form: Form,
        max_prompt_tokens: int,
        quarantined: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.build = build
        self._quarantined = quarantined
        self._store = store
        self._next_log_probs = next_log_probs
        self._form = form
        self._max_prompt_tokens = max_prompt_tokens
        # By version digest. What may be served stays so; what may not is looked up again, since
        # its quarantine can be lifted.
        self._cleared: set[str] = set()
        self._unkept: dict[str, ProbeVerdict] = {}
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._base_answers: OrderedDict[tuple[int, ...], LogProbs] = OrderedDict()
        self._asking = asyncio.Semaphore(_MAX_ASKED)
        self._asking_base = asyncio.Lock()

    async def quarantine(self, resolved: ResolvedVersion) -> str | None:
        """Return why a version must not be served, or None, also if its probe was not asked yet.

        Cost: one small read, unless the version was cleared.
        """
        if resolved.version.digest in self._cleared:
            return None
        return await asyncio.to_thread(self.read_quarantine, resolved)

    def read_quarantine(self, resolved: ResolvedVersion) -> str | None:
        """Return what the store says, as `quarantine`. Cost: one small read."""
        digest = resolved.version.digest
        record = self._store.probe_record(digest)
        if digest in self._unkept:
            record = record.with_verdict(self.build, self._unkept[digest])
        return record.quarantine(self.build)

    async def check(self, served: "ServedAdapter") -> None:
        """See that the engine, which holds the adapter, answers its probe as it was trained.

        Requests that come while it is asked wait for the same answers.

        Raises:
            QuarantinedError: it does not.
            ArtifactError: the probe breaks its form, or names tokens that the base model lacks.
        """
        digest = served.resolved.version.digest
        if digest in self._cleared:
            return
        check = self._checks.get(digest)
        if check is None:
            # In a context of its own: it is nobody's request, and none is to be charged for it.
            check = asyncio.create_task(self._check(served), context=contextvars.Context())
            self._checks[digest] = check
            check.add_done_callback(lambda _: self._checks.pop(digest))
        await asyncio.shield(check)

    async def _check(self, served: "ServedAdapter") -> None:
        digest = served.resolved.version.digest
        record = await asyncio.to_thread(self._store.probe_record, digest)
        if record.lifted is None:
            verdict = record.verdicts.get(self.build) or self._unkept.get(digest)
            if verdict is None:
                verdict = await self._asked(served)
            if verdict is not None and not verdict.passed:
                raise QuarantinedError(verdict.reason)
        self._cleared.add(digest)

    async def _asked(self, served: "ServedAdapter") -> ProbeVerdict | None:
        """Ask an adapter's probe; None if it brings none."""
        probe = await asyncio.to_thread(read_probe, served.resolved.folder)
        if probe is None:
            return None
        async with self._asking:
            found = await self._found(probe, served)
        verdict = compare(probe, found, self._form)
        await self._keep(served.resolved, verdict)
        return verdict

    async def _keep(self, resolved: ResolvedVersion, verdict: ProbeVerdict) -> None:
        if not verdict.passed:
            self._quarantined(resolved.name)
            logger.warning("%s: quarantined: %s", resolved.public_id, verdict.reason)
        try:
            await asyncio.to_thread(self._store.keep_verdict, resolved, self.build, verdict)
        except StoreError as error:  # a store that is mounted to be read
            logger.warning("%s: its probe is asked at each start: %s", resolved.public_id, error)
            if not verdict.passed:
                self._unkept[resolved.version.digest] = verdict

    async def _found(self, probe: Probe, served: "ServedAdapter") -> list[Found]:
        """Ask all prompts at once, so that they share steps."""
        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(self._ask(prompt, served)) for prompt in probe.prompts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in asked]

    async def _ask(self, prompt: ProbePrompt, served: "ServedAdapter") -> Found:
        if len(prompt.token_ids) > self._max_prompt_tokens:
            return Found({}, {})
        adapter = await self._next_log_probs(prompt.token_ids, served)
        return Found(await self._base_answer(prompt.token_ids), adapter)

    async def _base_answer(self, token_ids: tuple[int, ...]) -> LogProbs:
        async with self._asking_base:
            if token_ids not in self._base_answers:
                self._base_answers[token_ids] = await self._next_log_probs(token_ids, None)
                if len(self._base_answers) > _MAX_BASE_ANSWERS:
                    self._base_answers.popitem(last=False)
            self._base_answers.move_to_end(token_ids)
            return self._base_answers[token_ids]
