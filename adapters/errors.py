"""Every error that this project raises on purpose; owns the tree, no logic.

RoraError
├── ConfigError (ValueError)               a setting, a flag, a key of a configuration file
├── DataError (ValueError)                 a line of training or evaluation data
├── BaseModelError (ValueError)            a base model folder, name or build
├── ArtifactError (ValueError)             an adapter folder
│   └── AdapterMismatchError               the adapter does not fit the base model
│       └── QuarantinedError               its probe is not answered as it was trained
├── AdapterNameError (ValueError)          a name that breaks the grammar or is reserved
├── AdapterNotFoundError (LookupError)     a name, alias or digest that the store does not hold
├── StoreError (OSError)                   the store's own files
├── TrainingError (RuntimeError)           a run that can not go on, or whose result can not be used
└── EngineSeamError (RuntimeError)         the engine runs without our layers

A message reads "where: what was found, what was expected; what to do", on one line. Each class also
inherits the built-in error that it refines, so that callers may catch either.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters.problems import Problem


class RoraError(Exception):
    """Base of all errors raised on purpose; its text is one line fit for a user."""


class ConfigError(RoraError, ValueError):
    """A setting, a flag or a key of a configuration file is wrong."""


class DataError(RoraError, ValueError):
    """A line of training or evaluation data is wrong."""


class BaseModelError(RoraError, ValueError):
    """A base model can not be found, built or used."""


class ArtifactError(RoraError, ValueError):
    """An adapter folder breaks the format.

    codes: the rules that it breaks, each once, as docs/format.md lists them.
    problems: what adapters.problems has to say of each; empty if the rule is not the format's.
    """

    codes: tuple[str, ...] = ()
    problems: "tuple[Problem, ...]" = ()


class AdapterMismatchError(ArtifactError):
    """An adapter does not fit the base model."""


class QuarantinedError(AdapterMismatchError):
    """The engine does not answer an adapter's probe as it was trained."""


class AdapterNameError(RoraError, ValueError):
    """An adapter name breaks the grammar of names or is reserved."""


class AdapterNotFoundError(RoraError, LookupError):
    """No adapter has this name, alias or digest."""


class StoreError(RoraError, OSError):
    """The store's own files are missing, broken or can not be written."""


class TrainingError(RoraError, RuntimeError):
    """A training run can not go on, or its result can not be used."""


class EngineSeamError(RoraError, RuntimeError):
    """The engine does not run our adapter layers."""
