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
│   └── NoEarlierVersionError              an alias that has not meant anything else
├── StoreError (OSError)                   the store's own files
│   ├── StoreConflictError                 a change that an alias, a version or a lease forbids
│   ├── AliasMovedError                    an alias that somebody else moved meanwhile
│   └── StoreFullError                     no room for what is to be written
├── ResidencyError (RuntimeError)          memory for adapters: what requests or pins still need
├── PreloadError (RuntimeError)            adapters without which a server was told not to be ready
├── TrainingError (RuntimeError)           a run that can not go on, or whose result can not be used
├── AuthenticationError (ValueError)       a request whose key can not be told
├── LimitExceededError (RuntimeError)      a request above its tenant's limits
├── EngineSeamError (RuntimeError)         the engine runs without our layers
├── OverloadedError (RuntimeError)         more requests wait than may
└── DeadlineError (TimeoutError)           a request that waited longer than it allowed

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


class NoEarlierVersionError(AdapterNotFoundError):
    """An alias can not be rolled back: it has not meant anything else."""


class StoreError(RoraError, OSError):
    """The store's own files are missing, broken or can not be written."""


class StoreConflictError(StoreError):
    """A change of the store is not made while something in it stands against it."""


class AliasMovedError(StoreError):
    """An alias means something else than when its move began, and stays so."""


class StoreFullError(StoreError):
    """There is no room for what is to be written."""


class ResidencyError(RoraError, RuntimeError):
    """An adapter can not leave or stay in memory now: requests or pins stand against it."""


class PreloadError(RoraError, RuntimeError):
    """Adapters that a server was told to have before it is ready can not be served."""


class TrainingError(RoraError, RuntimeError):
    """A training run can not go on, or its result can not be used."""


class AuthenticationError(RoraError, ValueError):
    """A request does not say plainly which key it presents."""


class LimitExceededError(RoraError, RuntimeError):
    """A request is above a limit of its tenant, for now.

    retry_after_seconds: after which it may come again.
    """

    retry_after_seconds: float = 0.0


class EngineSeamError(RoraError, RuntimeError):
    """The engine does not run our adapter layers."""


class OverloadedError(RoraError, RuntimeError):
    """More requests wait than may; this one was not taken.

    retry_after_seconds: when those that wait now will have been let in, as things go.
    """

    retry_after_seconds: int = 1


class StoppingError(RoraError, RuntimeError):
    """The server stops and takes no more requests."""


class EngineDiedError(RoraError, RuntimeError):
    """The engine died, so that nothing can be answered any more."""


class DeadlineError(RoraError, TimeoutError):
    """A request's deadline came before its turn."""
