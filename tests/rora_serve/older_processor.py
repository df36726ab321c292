"""Tests once more, as they run on a processor without AVX-512."""

import os
import subprocess
import sys
from pathlib import Path


def run_compiled_for_avx2(test_file: str, cache: Path, *options: str) -> None:
    """Run a module of tests whose compiled functions may use AVX2 alone.

    Args:
        cache: an empty folder for what is compiled.
        options: of pytest.
    Raises: CalledProcessError: a test failed.
    """
    older = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,-avx512f",
        "NUMBA_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test_file, *options]
    subprocess.run(command, env={**os.environ, **older}, check=True, timeout=300)
