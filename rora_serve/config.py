"""ServeConfig: what rora-serve itself is told; every other option is vLLM's own, after `--`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_settings import CliImplicitFlag

from adapters.errors import ConfigError
from adapters.settings import add_flags, read_settings
from rora_serve.name_patterns import check_reference

_Reference = Annotated[str, AfterValidator(check_reference)]


class ServeConfig(BaseModel):
    """Settings of one server, from serve.toml and flags of the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None, description="folder or hub name of the base model; none: SmolLM2-135M-Instruct"
    )
    store: Path = Field(Path("store"), description="folder of adapters, made by rora-adapters")
    keys: Path | None = Field(
        None, description="TOML file of tenants and their keys; none: everybody may do everything"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    max_num_seqs: int = Field(64, ge=1, description="requests in one engine step at most")
    queue_per_tenant: int | None = Field(
        None, ge=1, description="requests of a tenant that may wait; none: 4 x max_num_seqs"
    )
    adapter_memory_bytes: int | None = Field(
        None, ge=1, description="memory for adapters; none: a quarter of what is free at the start"
    )
    preload: tuple[_Reference, ...] = Field(
        (),
        description="adapter to load before the server is ready: NAME, NAME@ALIAS, or a pattern as "
        "'acme-*', of which the newest that fit; may be repeated",
    )
    pin: tuple[_Reference, ...] = Field(
        (), description="adapter to load like that and to keep in memory; may be repeated"
    )
    max_upload_bytes: int = Field(4 * 1024**3, ge=1, description="of one adapter that is uploaded")
    import_from: tuple[Path, ...] = Field(
        (), description="folder below which adapters may be imported by path; may be repeated"
    )
    drain_seconds: float = Field(
        20.0, ge=0, description="that requests which run at a SIGTERM may still take"
    )
    compile: CliImplicitFlag[bool] = Field(
        default=False,
        description="compile the model on CPUs: faster steps, minutes at the first start",
    )


def add_settings(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], ServeConfig]:
    """Add the settings' flags and --config to `parser`; return what reads them from its result.

    What it returns raises ConfigError: every mistake in the file and the flags.
    """
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="serve.toml with these settings"
    )
    read_flags = add_flags(parser, ServeConfig)

    def read(arguments: argparse.Namespace) -> ServeConfig:
        config = read_settings(ServeConfig, arguments.config, read_flags(arguments))
        if config.store.exists() and not config.store.is_dir():
            raise ConfigError(
                f"--store {config.store}: a file, a folder made by rora-adapters is expected"
            )
        return config

    return read
