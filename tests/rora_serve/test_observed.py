"""The wrapper around generate counts every kind of output, and is otherwise not there."""

import asyncio
import gc
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.async_utils import collect_from_async_generator, merge_async_iterators
from vllm.v1.metrics.stats import RequestStateStats

from rora_serve.observed import observe
from rora_serve.request_log import Choice, RequestRecord, current_record

PROMPT = [5, 6, 7]
Part = tuple[int, Sequence[int], str | None]


def output(*parts: Part, stats: RequestStateStats | None = None, whole: bool = True) -> Any:
    """Return vLLM's output for (index, token ids, finish reason) of some choices."""
    completions = [
        CompletionOutput(index, "", list(tokens), None, None, finish_reason=finish)
        for index, tokens, finish in parts
    ]
    finished = whole and all(finish is not None for _, _, finish in parts)
    return RequestOutput(
        "id", None, PROMPT, None, completions, finished, stats, num_cached_tokens=2
    )


class Engine:
    """Yields what it was given, as vLLM's engine client would, and notes how it was left."""

    def __init__(self, outputs: Sequence[Any], *, ready: asyncio.Event | None = None) -> None:
        self.outputs = outputs
        self.ready = ready
        self.left: list[str] = []
        self.asked: list[dict[str, Any]] = []

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        assert isinstance(sampling_params, SamplingParams)
        self.asked.append({"prompt": prompt, "request_id": request_id, **options})
        try:
            for item in self.outputs:
                if isinstance(item, Exception):
                    raise item
                yield item
                await asyncio.sleep(0)
            if self.ready is not None:
                await self.ready.wait()
        except (asyncio.CancelledError, GeneratorExit) as error:
            await asyncio.sleep(0)  # vLLM tells its engine process
            self.left.append(type(error).__name__)
            raise


def counting_clock() -> Callable[[], float]:
    """Return a clock that is a second later each time it is looked at."""
    times: Iterator[int] = iter(range(1_000))
    return lambda: float(next(times))


def params(kind: RequestOutputKind, n: int = 1) -> SamplingParams:
    return SamplingParams(n=n, output_kind=kind)


def observed(outputs: Sequence[Any], **options: Any) -> Any:
    engine: Any = Engine(outputs, **options)
    observe(engine, counting_clock())
    return engine


def asked(engine: Any, kind: RequestOutputKind) -> tuple[RequestRecord, list[Any]]:
    """Return the record of one request, and what it was given."""
    record = RequestRecord("id", "POST", "/", 0.0)

    async def run() -> list[Any]:
        current_record.set(record)
        return await collect_from_async_generator(engine.generate("p", params(kind), "id"))

    return record, asyncio.run(run())


async def read_one_and_stop(engine: Any, record: RequestRecord) -> list[str]:
    """Read one output and close the stream; return how vLLM's call was left by then."""
    current_record.set(record)
    outputs = engine.generate("p", params(RequestOutputKind.DELTA), "id")
    await anext(outputs)
    await outputs.aclose()
    return list(engine.left)


def test_deltas_add_up() -> None:
    outputs = [output((0, [1], None)), output((0, [2, 3], None)), output((0, [4], "stop"))]
    record, given = asked(observed(outputs), RequestOutputKind.DELTA)
    assert [a is b for a, b in zip(given, outputs, strict=True)] == [True] * 3
    assert record.choices == [Choice(4, 1.0, 3.0)]
    assert (record.prompt_tokens, record.cached_tokens) == (3, 2)
    assert record.finish == "stop"


def test_cumulative_outputs_do_not() -> None:
    outputs = [
        output((0, [1], None)),
        output((0, [1, 2, 3], None)),
        output((0, [1, 2, 3], "length")),
    ]
    record, _ = asked(observed(outputs), RequestOutputKind.CUMULATIVE)
    assert record.choices == [Choice(3, 1.0, 2.0)]  # the last one brought no token
    assert (record.prompt_tokens, record.finish) == (3, "length")


def test_an_answer_at_once_has_vllms_times() -> None:
    stats = RequestStateStats(first_token_latency=0.25, first_token_ts=70.0, last_token_ts=73.0)
    outputs = [output((0, [1, 2, 3, 4], "stop"), stats=stats)]
    record, _ = asked(observed(outputs), RequestOutputKind.FINAL_ONLY)
    assert record.choices == [Choice(4, 0.25, 3.25)]
    assert record.token_seconds == [1.0]
    assert record.finish == "stop"


@pytest.mark.parametrize(
    ("parts", "stats"),
    [
        ([(0, [1, 2], "stop")], None),
        ([(0, [1, 2], "stop"), (1, [3], "length")], RequestStateStats(first_token_latency=1.0)),
        ([(0, [], "abort")], RequestStateStats()),
    ],
    ids=["no statistics", "two choices", "no tokens"],
)
def test_an_answer_at_once_has_no_times_where_vllm_tells_none(
    parts: list[Part], stats: RequestStateStats | None
) -> None:
    engine = observed([output(*parts, stats=stats)])
    record, _ = asked(engine, RequestOutputKind.FINAL_ONLY)
    assert record.generated_tokens == sum(len(tokens) for _, tokens, _ in parts)
    assert record.first_token_at is record.last_token_at is None
    assert record.finish == parts[-1][2]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_choices_are_told_apart(kind: RequestOutputKind) -> None:
    is_delta = kind is RequestOutputKind.DELTA
    outputs = [
        output((0, [1], None)),
        output((1, [1], None), (0, [2] if is_delta else [1, 2], None)),
        output((1, [2] if is_delta else [1, 2], "length"), whole=False),
        output((0, [3] if is_delta else [1, 2, 3], "stop")),
    ]
    record, _ = asked(observed(outputs), kind)
    assert record.choices == [Choice(3, 1.0, 4.0), Choice(2, 2.0, 3.0)]
    assert record.token_seconds == [1.5, 1.0]
    assert record.prompt_tokens == 3


def test_several_calls_of_one_request_add_up() -> None:
    engine = observed([output((0, [1], None)), output((0, [2], "stop"))])
    record = RequestRecord("id", "POST", "/", 0.0)

    async def run() -> None:
        current_record.set(record)
        delta = params(RequestOutputKind.DELTA)
        calls = [engine.generate("p", delta, str(number)) for number in range(3)]
        assert len([item async for item in merge_async_iterators(*calls)]) == 6

    asyncio.run(run())
    assert record.prompt_tokens == 9
    assert [choice.num_tokens for choice in record.choices] == [2, 2, 2]


def test_a_stream_read_by_another_task_fills_the_record_of_the_one_that_asked() -> None:
    engine = observed([output((0, [1], "stop"))])
    record = RequestRecord("id", "POST", "/", 0.0)

    async def run() -> None:
        async def ask() -> Any:
            current_record.set(record)
            return engine.generate("p", params(RequestOutputKind.DELTA), "id")

        outputs = await asyncio.create_task(ask())
        assert current_record.get() is None
        assert len(await collect_from_async_generator(outputs)) == 1

    asyncio.run(run())
    assert record.generated_tokens == 1


def test_calls_outside_of_requests_are_left_alone() -> None:
    engine = Engine([output((0, [1], "stop"))])
    made = []
    generate = engine.generate

    def noted_generate(*positional: Any, **options: Any) -> Any:
        made.append(generate(*positional, **options))
        return made[-1]

    any_engine: Any = engine
    any_engine.generate = noted_generate
    observe(any_engine, counting_clock())
    kind = params(RequestOutputKind.DELTA)
    assert any_engine.generate("p", kind, "id") is made[0]


def test_arguments_reach_vllm_however_they_are_given() -> None:
    engine = observed([])
    record = RequestRecord("id", "POST", "/", 0.0)

    async def run() -> None:
        current_record.set(record)
        kind = params(RequestOutputKind.DELTA)
        await collect_from_async_generator(engine.generate("p", kind, "1", trace_headers={"a": 1}))
        named = engine.generate(prompt="q", sampling_params=kind, request_id="2", session_id="s")
        await collect_from_async_generator(named)

    asyncio.run(run())
    assert engine.asked == [
        {"prompt": "p", "request_id": "1", "trace_headers": {"a": 1}},
        {"prompt": "q", "request_id": "2", "session_id": "s"},
    ]
    assert record.finish is None


def test_a_reader_that_stops_in_the_middle_ends_vllms_call_before_it_goes_on() -> None:
    engine = observed([output((0, [1], None)), output((0, [2], "stop"))])
    record = RequestRecord("id", "POST", "/", 0.0)
    assert asyncio.run(read_one_and_stop(engine, record)) == ["GeneratorExit"]
    assert record.choices == [Choice(1, 1.0, 1.0)]
    assert record.finish == "abort"


def test_a_stream_that_nobody_holds_any_more_ends_vllms_call() -> None:
    engine = observed([output((0, [1], None)), output((0, [2], "stop"))])

    async def run() -> None:
        current_record.set(RequestRecord("id", "POST", "/", 0.0))
        outputs = engine.generate("p", params(RequestOutputKind.DELTA), "id")
        await anext(outputs)
        assert not engine.left
        del outputs
        gc.collect()
        for _ in range(5):
            await asyncio.sleep(0)
        assert engine.left == ["GeneratorExit"]

    asyncio.run(run())


def test_a_cancelled_reader_cancels_vllms_call() -> None:
    record = RequestRecord("id", "POST", "/", 0.0)

    async def run() -> None:
        engine = observed([output((0, [1], None))], ready=asyncio.Event())
        current_record.set(record)
        outputs = engine.generate("p", params(RequestOutputKind.DELTA), "id")
        task = asyncio.create_task(collect_from_async_generator(outputs))
        while not record.choices:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.left == ["CancelledError"]

    asyncio.run(run())
    assert record.finish == "abort"


@pytest.mark.parametrize(
    ("kind", "n", "max_tokens", "expected"),
    [
        pytest.param(RequestOutputKind.FINAL_ONLY, 1, 100, 3 + 20, id="as many as others had"),
        pytest.param(RequestOutputKind.FINAL_ONLY, 2, 100, 3 + 2 * 20, id="choices"),
        pytest.param(RequestOutputKind.FINAL_ONLY, 1, 9, 3 + 9, id="no more than it asked for"),
        pytest.param(RequestOutputKind.DELTA, 1, 100, 3, id="a stream, before its first token"),
    ],
)
def test_a_client_that_hangs_up_early_is_charged_what_its_answer_likely_took(
    kind: RequestOutputKind, n: int, max_tokens: int, expected: int
) -> None:
    step = 4.0  # seconds between two looks at the clock
    times = itertools.count()
    engine: Any = Engine([output((0, list(range(40)), "stop"))])
    observe(engine, lambda: next(times) * step)
    record = RequestRecord("id", "POST", "/", 0.0)
    asked_for = SamplingParams(n=n, max_tokens=max_tokens, output_kind=kind)
    prompt = {"prompt_token_ids": PROMPT}

    async def run() -> None:
        nonlocal step
        current_record.set(RequestRecord("before", "POST", "/", 0.0))
        for _ in range(100):  # 40 tokens in 4 seconds each
            outputs = engine.generate(prompt, params(RequestOutputKind.DELTA), "id")
            await collect_from_async_generator(outputs)
        step = 2.0
        engine.outputs, engine.ready = [], asyncio.Event()
        current_record.set(record)
        outputs = engine.generate(prompt, asked_for, "id")
        task = asyncio.create_task(collect_from_async_generator(outputs))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert record.charged_tokens == expected
    assert (record.prompt_tokens, record.generated_tokens) == (0, 0)


def test_an_error_in_the_middle_passes_and_what_came_before_counts() -> None:
    error = ValueError("the engine has lost it")
    engine = observed([output((0, [1], None)), error])
    record = RequestRecord("id", "POST", "/", 0.0)

    async def run() -> None:
        current_record.set(record)
        outputs = engine.generate("p", params(RequestOutputKind.DELTA), "id")
        await anext(outputs)
        with pytest.raises(ValueError, match="lost it") as raised:
            await anext(outputs)
        assert raised.value is error

    asyncio.run(run())
    assert record.generated_tokens == 1
    assert record.finish == "error"


def test_a_reader_that_stops_after_the_last_output_did_not_hang_up() -> None:
    record = RequestRecord("id", "POST", "/", 0.0)
    asyncio.run(read_one_and_stop(observed([output((0, [1], "stop"))]), record))
    assert record.finish == "stop"
