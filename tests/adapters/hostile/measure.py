"""Checks each case of the corpus in a process of its own and prints what it took, as JSON lines.

python -m tests.adapters.hostile.measure FOLDER
"""

import json
import os
import resource
import sys
from pathlib import Path

from adapters.errors import ArtifactError, RoraError
from adapters.sources import open_source
from adapters.validation import validate
from tests.adapters.hostile.build import build


def check(path: Path) -> dict[str, object]:
    """Return the codes that an adapter is refused with, and any error outside our tree."""
    try:
        with open_source(str(path)) as folder:
            return {"codes": [str(problem.code) for problem in validate(folder).problems]}
    except ArtifactError as error:
        return {"codes": list(error.codes), "text": str(error)}
    except RoraError as error:
        return {"codes": [], "text": str(error)}
    except BaseException as error:  # what must not happen
        return {"codes": [], "crash": repr(error)}


def main(folder: Path) -> None:
    """Build the corpus and check every case, each in a fork of this small process."""
    for one, path in build(folder):
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            found = check(path)
            used = resource.getrusage(resource.RUSAGE_SELF)
            row = {
                "case": one.name,
                "code": one.code,
                **found,
                "cpu_seconds": used.ru_utime + used.ru_stime,
                "peak_mb": used.ru_maxrss / 1024,
            }
            print(json.dumps(row), flush=True)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if status != 0:
            print(json.dumps({"case": one.name, "code": one.code, "codes": [], "crash": status}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
