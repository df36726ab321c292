"""The command rora-serve."""

import argparse
import os
import socket
import sys

from adapters.base_model import cache_folder, find_model, model_name
from adapters.command import run_command
from adapters.errors import ConfigError
from adapters.settings import with_hyphens
from rora_serve.config import add_settings
from rora_serve.tenants import check_tenant_name, key_lines, new_key

PROGRAM = "rora-serve"


def main(argv: list[str] | None = None) -> int:
    """Run rora-serve. Returns: 0 stopped by a signal, 1 failed, 2 wrong usage."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["key"]:
        return run_command(PROGRAM, lambda: _make_key(given[1:]))
    ours, vllm_options = _split(given)
    if ours[:1] == ["validate"]:
        from rora_serve.validate_cli import validate  # noqa: PLC0415  (only its own imports)

        return run_command(PROGRAM, lambda: validate(ours[1:], vllm_options))
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Serve adapters of one base model beside it, behind an OpenAI-style API.",
        epilog="`rora-serve validate ...` says what a server with the same arguments would serve, "
        "without starting one. `rora-serve key NAME` makes a key for a tenant of --keys. Options "
        "after `--` go to vLLM as they are, for example: -- --max-model-len 4096",
    )
    read_config = add_settings(parser)
    arguments = parser.parse_args(with_hyphens(ours))

    def serve() -> int:
        config = read_config(arguments)
        _check_port(config.host, config.port)
        folder = find_model(config.model, cache=cache_folder(os.environ))
        from rora_serve.launch import launch  # noqa: PLC0415  (imports vLLM, which takes seconds)

        return launch(config, folder, base_name=model_name(config.model), vllm_options=vllm_options)

    return run_command(PROGRAM, serve)


def _make_key(argv: list[str]) -> int:
    """Print a new key, and what the key file says of it."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} key",
        description="Make a key. It is printed and kept nowhere; the key file has its hash.",
    )
    parser.add_argument("name", metavar="NAME", help="of the tenant that gets it")
    name = check_tenant_name(parser.parse_args(argv).name)
    key = new_key()
    print(f"{key}\n\n# For --keys FILE; a tenant that is there already gets one hash more.")
    print(key_lines(name, key))
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return our arguments and vLLM's, which stand after the first `--`."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _check_port(host: str, port: int) -> None:
    """Try the address before the engine takes its minute to start.

    Raises: ConfigError: it is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port}: {error.strerror}, a free address is expected; "
                "choose another port or stop what listens there"
            ) from error
