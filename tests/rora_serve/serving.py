"""Starting real servers for tests, and asking them for log-probabilities."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from rora_serve.engine.platform_plugin import SEAM_FLAG

START_SECONDS = 480
STOP_SECONDS = 60
SOFT_STOP_TOKENS = 300  # of an answer that takes longer than new requests are taken, less than all
# One step must be able to hold every request of a test; float32, since PEFT's oracle is.
ENGINE_OPTIONS = ("--dtype", "float32", "--max-model-len", "1024")


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens after a prompt, each with the log-probs of the most likely ones."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    top_log_probs: tuple[dict[int, float], ...]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], port: int, log: Path, *, cores: str | None = None
) -> Iterator[Server]:
    """Start `command`, wait until it answers, stop it by SIGTERM at the end.

    Args: cores: that vLLM computes on, if not those that it or rora-serve would choose.
    """
    environment = {name: value for name, value in os.environ.items() if name != SEAM_FLAG}
    if cores is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = cores
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def our_command(
    store: Path, port: int, more: Sequence[str] = (), *, vllm_options: Sequence[str] = ()
) -> list[str]:
    """The command of a rora-serve with the default model."""
    own = ["--store", str(store), "--port", str(port), "--max-num-seqs", "32"]
    return [_script("rora-serve"), *own, *more, "--", *ENGINE_OPTIONS, *vllm_options]


def base_command(model: Path, port: int, more: Sequence[str], *, eager: bool) -> list[str]:
    """The command of vLLM's own server without LoRA."""
    return [
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model),
        "--served-model-name", "smollm2-135m-instruct", "--host", "127.0.0.1", "--port", str(port),
        *ENGINE_OPTIONS, "--kv-cache-memory-bytes", "2000000000", *more,
        *(["--enforce-eager"] if eager else []),
    ]  # fmt: skip


def stock_command(model: Path, adapters: dict[str, Path], port: int, modules: str) -> list[str]:
    """The command of vLLM's own server, at its best: only the layers that adapters have."""
    modules_given = [f"{name}={folder}" for name, folder in adapters.items()]
    return [
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model),
        "--served-model-name", "smollm2-135m-instruct",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *ENGINE_OPTIONS,
        "--max-num-seqs", "32", "--kv-cache-memory-bytes", "500000000",
        "--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", "32",
        "--lora-target-modules", *modules.split(), "--lora-modules", *modules_given,
    ]  # fmt: skip


def check_soft_stop(server: Server, model: str) -> None:
    """Send SIGTERM to a server that answers, and see how it ends."""

    def statuses(path: str, **body: object) -> Iterator[int]:
        while True:
            answer = (
                httpx.post(f"{server.url}{path}", json=body, timeout=60)
                if body
                else httpx.get(f"{server.url}{path}")
            )
            yield answer.status_code
            time.sleep(0.1)

    question = {"model": model, "prompt": "Count.", "ignore_eos": True}
    long = question | {"max_tokens": SOFT_STOP_TOKENS, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=long, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert next(status for status in statuses("/ready") if status != 200) == 503
        short = statuses("/v1/completions", **question, max_tokens=1)
        assert next(short) == 200, "whoever has not noticed yet is answered"
        assert next(status for status in short if status != 200) == 503
        rest = [line for line in lines if line]
    assert len(rest) >= SOFT_STOP_TOKENS, "the answer that was begun is whole"
    assert rest[-1] == "data: [DONE]"
    server.process.wait(STOP_SECONDS)


def ask_together(
    server: Server,
    requests: Sequence[tuple[str, tuple[int, ...]]],
    *,
    num_tokens: int,
    key: str = "none",
) -> list[Continuation]:
    """Ask for greedy continuations of (model, prompt) all at once, so that they share batches."""

    async def ask_all() -> list[Continuation]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            return await asyncio.gather(
                *(_ask(client, model, prompt, num_tokens) for model, prompt in requests)
            )

    return asyncio.run(ask_all())


async def _ask(
    client: openai.AsyncOpenAI, model: str, prompt: tuple[int, ...], num_tokens: int
) -> Continuation:
    answer = await client.completions.create(
        model=model,
        prompt=list(prompt),
        max_tokens=num_tokens,
        temperature=0,
        logprobs=5,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.top_logprobs is not None
    return Continuation(
        prompt,
        tuple(_token_id(token) for token in found.tokens),
        tuple({_token_id(t): value for t, value in top.items()} for top in found.top_logprobs),
    )


def metric_total(page: str, metric: str) -> float:
    """Return the sum of a metric over its labels, of what /metrics says."""
    lines = [line for line in page.splitlines() if line.startswith(f"{metric}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def requests_in_flight(server: Server) -> int:
    """Return how many requests were let in and are not answered yet."""
    page = httpx.get(f"{server.url}/metrics").text
    (count,) = re.findall(r"^rora_requests_in_flight (\S+)$", page, re.MULTILINE)
    return int(float(count))


def ends_within(server: Server, seconds: float) -> bool:
    """Tell whether all requests end within a time."""
    deadline = time.monotonic() + seconds
    while requests_in_flight(server):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _token_id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    tail = server.log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"the server did not come up (exit {server.process.poll()}):\n{tail}")
