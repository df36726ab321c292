"""What our three commands share: one line for an error, and the exit codes 0, 1 and 2."""

import io
import sys
from collections.abc import Callable

from adapters.errors import AdapterNameError, ConfigError, RoraError

FAILED = 1
WRONG_USAGE = 2


def run_command(program: str, action: Callable[[], int]) -> int:
    """Run `action` and turn an error that we raise on purpose into one line on stderr.

    Returns: what `action` returned, 2 for wrong usage, 1 for any other failure, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not know every character
            stream.reconfigure(errors="replace")
    try:
        return action()
    except (ConfigError, AdapterNameError) as error:
        print(f"{program}: {_one_line(error)}", file=sys.stderr)
        return WRONG_USAGE
    except (RoraError, OSError) as error:
        print(f"{program}: {_one_line(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    """Return the error's text on one line; names that users choose may hold line breaks."""
    return " ".join(str(error).split())
