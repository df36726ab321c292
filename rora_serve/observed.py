"""A wrapper around the engine's `generate` that notes in a request's record what it yields.

All of vLLM's handlers go through it. Several prompts, beam search and answers that call tools make
several calls for one request, at once or in turn; each counts what the engine read and generated.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind

from rora_serve.request_log import Choice, RequestRecord, current_record

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

Outputs = AsyncGenerator["RequestOutput", None]


def observe(engine: "EngineClient", clock: Callable[[], float] = time.monotonic) -> None:
    """Let `engine.generate` fill the record of the request that calls it.

    Args: clock: the one that records' `arrived_at` is read from.
    Cost: a look at each output; calls outside of requests are left alone.
    """
    generate: Callable[..., Outputs] = engine.generate
    pace = _Pace()

    def observed_generate(
        prompt: Any, sampling_params: "SamplingParams", request_id: str, **options: Any
    ) -> Outputs:
        outputs = generate(prompt, sampling_params, request_id, **options)
        # Here, not where it is read: a streamed answer is read by another task.
        record = current_record.get()
        if record is None:
            return outputs
        return _observed(outputs, _Call(record, prompt, sampling_params, pace, clock))

    engine.generate = observed_generate  # type: ignore[method-assign]


async def _observed(outputs: Outputs, call: "_Call") -> Outputs:
    call.began_at = call.clock()
    try:
        async for output in outputs:
            call.note(output)
            yield output
    except (asyncio.CancelledError, GeneratorExit):
        call.end("abort")
        raise
    except Exception:
        call.end("error")
        raise
    finally:
        # Whoever closes this one means that one: vLLM gives the request up there.
        await outputs.aclose()


class _Pace:
    """How many tokens the calls that came to their end generated in a second, of late."""

    _WEIGHT = 0.1  # of the newest call

    def __init__(self) -> None:
        self.tokens_per_second = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take in one sequence of tokens, and how long its call took."""
        if seconds > 0:
            found = num_tokens / seconds
            self.tokens_per_second += self._WEIGHT * (found - self.tokens_per_second)


class _Call:
    """One call of `generate`, and what it came to so far."""

    def __init__(
        self,
        record: RequestRecord,
        prompt: Any,
        params: "SamplingParams",
        pace: _Pace,
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self.began_at = 0.0
        self._record = record
        self._prompt = prompt
        self._params = params
        self._kind = params.output_kind
        self._pace = pace
        self._choices: dict[int, Choice] = {}
        self._is_begun = self._is_whole = False

    def note(self, output: "RequestOutput") -> None:
        """Add what an output brought."""
        record = self._record
        if not self._is_begun:
            self._is_begun = True
            record.prompt_tokens += len(output.prompt_token_ids or ())
            record.cached_tokens += output.num_cached_tokens or 0
        now = self.clock()
        for part in output.outputs:
            choice = self._choices.get(part.index)
            if choice is None:
                choice = self._choices[part.index] = Choice()
                record.choices.append(choice)
            before = choice.num_tokens
            choice.num_tokens = len(part.token_ids)
            if self._kind is RequestOutputKind.DELTA:
                choice.num_tokens += before
            if self._kind is not RequestOutputKind.FINAL_ONLY and choice.num_tokens > before:
                choice.last_at = now
                if choice.first_at is None:
                    choice.first_at = now
            if part.finish_reason is not None:
                record.finish = part.finish_reason
                self._pace.note(choice.num_tokens, now - self.began_at)
        if self._kind is RequestOutputKind.FINAL_ONLY:
            self._note_times(output)
        self._is_whole = output.finished

    def _note_times(self, output: "RequestOutput") -> None:
        """Take the times of an answer that comes at once from vLLM's statistics.

        They are of one choice, and there are none with --disable-log-stats.
        """
        stats, choices = output.metrics, list(self._choices.values())
        if stats is not None and len(choices) == 1 and choices[0].num_tokens:
            first = self.began_at + stats.first_token_latency
            choices[0].first_at = first
            choices[0].last_at = first + stats.last_token_ts - stats.first_token_ts

    def end(self, finish: str) -> None:
        """Note why the call ended, unless it had come to its end already."""
        if not self._is_whole:
            self._record.finish = finish
            self._record.unseen_tokens += self._num_unseen()

    def _num_unseen(self) -> int:
        """Estimate the tokens that the engine took and told nothing of.

        Of an answer that comes at once it tells nothing before the end of a choice.
        """
        is_text = isinstance(self._prompt, str)
        token_ids = () if is_text else (self._prompt.get("prompt_token_ids") or ())
        num_tokens = 0 if self._is_begun else len(token_ids)
        if self._kind is RequestOutputKind.FINAL_ONLY:
            likely = round(self._pace.tokens_per_second * (self.clock() - self.began_at))
            each = (
                likely if self._params.max_tokens is None else min(likely, self._params.max_tokens)
            )
            num_tokens += each * max((self._params.n or 1) - len(self._choices), 0)
        return num_tokens
