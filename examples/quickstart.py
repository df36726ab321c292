"""Train two adapters on two tasks, serve both beside their base model, and show what changed.

Uses the three commands and the `openai` client only, as a user would; writes to
runs/quickstart-<time>.
"""

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
from tqdm import tqdm

EXAMPLES = Path(__file__).parent
TASKS = ("snips_slots", "banking77")
BASE = "smollm2-135m-instruct"
START_SECONDS = 300
MAX_IN_FLIGHT = 32
MAX_ANSWER_TOKENS = 96
COMMANDS = Path(sys.executable).parent

Lines = list[dict[str, Any]]


def main() -> int:
    """Run all of it; the last line of the output is the JSON result."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--started", type=int, default=int(time.time()), help=argparse.SUPPRESS)
    started = parser.parse_args().started
    folder = Path("runs") / f"quickstart-{time.strftime('%Y%m%d-%H%M%S')}"
    store = folder / "store"
    for task in TASKS:
        train(task, folder / task)
        run("rora-adapters", "store", "add", folder / task / "adapter", "--name", task,
            "--store", store)  # fmt: skip
    say(f"serving {BASE} and {' and '.join(TASKS)} from one engine")
    port = free_port()
    log = folder / "rora-serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [COMMANDS / "rora-serve", "--store", store, "--port", str(port)],
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until_ready(server, port, log)
        accuracies = asyncio.run(measure(f"http://127.0.0.1:{port}/v1"))
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
    print_table(accuracies)
    print(f"\nAdapters and logs are in {folder}; serve them again with:")
    print(f"  .venv/bin/rora-serve --store {store}\n")
    print(json.dumps({"tasks": accuracies, "seconds": int(time.time()) - started}))
    return 0


def train(task: str, output: Path) -> None:
    """Train one adapter; accuracy is measured later, over HTTP."""
    say(f"training {task}, up to 3 minutes on 2 cores")
    config = EXAMPLES / task / "train.toml"
    run("rora-train", "run", config, "--output", output, "--data.eval", "none")


async def measure(url: str) -> dict[str, dict[str, float]]:
    """Ask the base and each task's adapter the task's held-out questions, all in one stream."""
    limit = asyncio.Semaphore(MAX_IN_FLIGHT)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        accuracies: dict[str, dict[str, float]] = {}
        for task in TASKS:
            lines = [
                json.loads(line)
                for line in (EXAMPLES / task / "test.jsonl").read_text().splitlines()
            ]
            say(f"asking {BASE} and {task} {len(lines)} held-out questions each")
            with tqdm(total=2 * len(lines), unit="answer") as bar:

                async def is_right(model: str, line: dict[str, Any], bar: Any = bar) -> bool:
                    async with limit:
                        answer = await ask(client, model, line["messages"][:-1])
                    bar.update()
                    return answer.strip() == line["messages"][-1]["content"]

                # Base and adapter take turns, so that every batch is a mixed one.
                pairs = [(model, line) for line in lines for model in (BASE, task)]
                right = await asyncio.gather(*(is_right(model, line) for model, line in pairs))
            accuracies[task] = {
                "base": sum(right[0::2]) / len(lines),
                "adapter": sum(right[1::2]) / len(lines),
            }
            show_one(lines[0], await ask(client, BASE, lines[0]["messages"][:-1]),
                     await ask(client, task, lines[0]["messages"][:-1]))  # fmt: skip
    return accuracies


async def ask(client: openai.AsyncOpenAI, model: str, messages: Lines) -> str:
    """Return the greedy answer of `model`."""
    answer = await client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=MAX_ANSWER_TOKENS,
    )
    return answer.choices[0].message.content or ""


def show_one(line: dict[str, Any], base: str, adapter: str) -> None:
    """Print one question with both answers."""
    print(f"  question  {line['messages'][-2]['content']}")
    print(f"  base      {' '.join(base.split())[:90]}")
    print(f"  adapter   {adapter}")


def print_table(accuracies: dict[str, dict[str, float]]) -> None:
    """Print accuracy by task, in percent."""
    print(f"\n{'task':12}  {'base':>6}  {'adapter':>7}")
    for task, by in accuracies.items():
        print(f"{task:12}  {by['base']:6.0%}  {by['adapter']:7.0%}")


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until the server answers; raise with the end of its log if it ends first."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"rora-serve did not come up; the end of {log}:\n{log.read_text()[-2000:]}")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: str, *arguments: str | Path) -> None:
    """Run one of the project's commands; it says itself what went wrong."""
    if subprocess.run([COMMANDS / command, *arguments], check=False).returncode:
        raise SystemExit(1)


def say(what: str) -> None:
    """Print what happens next."""
    print(f"\n== {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
