"""Settings of a command: one TOML file, and flags made from the same fields that win over it.

Used by rora-train and rora-serve. All mistakes are reported at once; an unknown key is one, and the
nearest known key is named.
"""

import argparse
import difflib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from adapters.errors import ConfigError

Keys = dict[str, Any]
Settings = TypeVar("Settings", bound=BaseModel)
FlagReader = Callable[[argparse.Namespace], Keys]


def add_flags(parser: argparse.ArgumentParser, model: type[BaseModel]) -> FlagReader:
    """Add a flag for each field of `model` to `parser`; return what reads them from its result.

    A field `train.batch_tokens` is the flag --train.batch-tokens. `none` as a value means no value.
    """
    settings = type(
        model.__name__,
        (BaseSettings, model),
        {"model_config": SettingsConfigDict(extra="forbid"), "__doc__": None},
    )
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        settings,
        root_parser=parser,
        cli_avoid_json=True,
        cli_enforce_required=False,
        cli_hide_none_type=True,
        cli_parse_none_str="none",
        cli_kebab_case=True,
    )

    def read_flags(namespace: argparse.Namespace) -> Keys:
        try:
            return source(parsed_args=namespace)()
        except SettingsError as error:
            raise ConfigError(f"flags: {error}") from error

    return read_flags


def with_hyphens(argv: Sequence[str]) -> list[str]:
    """Return arguments with our spelling of flags, so that --train.batch_tokens is one too."""
    spelt = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        is_flag = argument.startswith("--")
        spelt.append(f"{name.replace('_', '-')}{equals}{value}" if is_flag else argument)
    return spelt


def read_settings(model: type[Settings], path: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Return `model` from the TOML file at `path`, with `flags` over it.

    Raises: ConfigError: the file can not be read, or every mistake in it and in the flags.
    """
    keys = {} if path is None else _read_toml(path)
    merged = _merge(keys, flags)
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        where = str(path) if path is not None else "flags"
        problems = [_describe(model, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _read_toml(path: Path) -> Keys:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, a TOML configuration is expected") from None
    except OSError as error:
        raise ConfigError(f"{path}: can not be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> Keys:
    merged = dict(under)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _describe(model: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(model, location), n=1, cutoff=0.4)
        hint = f"; nearest known key: {near[0]}" if near else ""
        return f"{key}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{key}: missing, a value is expected"
    expected = problem["msg"].removeprefix("Value error, ")
    if not location:  # of several settings together, which the message names
        return str(expected)
    expected = f"{expected[:1].lower()}{expected[1:]}"
    if model.model_config.get("hide_input_in_errors"):  # it may be a secret in the wrong place
        return f"{key}: {expected}"
    return f"{key}: found {problem['input']!r}, {expected}"


def known_keys(model: type[BaseModel], location: Sequence[str] = ()) -> list[str]:
    """Return the dotted keys of all settings of `model`.

    Args: location: of a key; in tables whose names users choose, the names on its way are taken.
    """
    keys = []
    for name, field in model.model_fields.items():
        section, place = field.annotation, [name]
        rest = location[1:] if location[:1] == place else []
        if get_origin(section) is dict and rest:
            section, place, rest = get_args(section)[1], [name, rest[0]], rest[1:]
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [".".join((*place, inner)) for inner in known_keys(section, rest)]
        else:
            keys.append(name)
    return keys
