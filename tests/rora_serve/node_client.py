"""The official Node client, installed beside the files of clients/ that ask with it."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_FILES = Path(__file__).with_name("clients")
_INSTALL = ("ci", "--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund")


@dataclass(frozen=True)
class NodeClient:
    """A folder in which scripts find the client.

    Args: node: the command.
    """

    folder: Path
    node: str

    def run(self, *arguments: str, **environment: str) -> str:
        """Run node with some variables more; return what it printed. It must succeed."""
        result = subprocess.run(
            [self.node, *arguments], cwd=self.folder, env={**os.environ, **environment},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


def install(folder: Path) -> NodeClient:
    """Install the versions of the lock into a folder; skips the test where there is no npm."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("no npm on this machine, which the Node client is installed by")
    shutil.copytree(_FILES, folder)
    subprocess.run([npm, *_INSTALL], cwd=folder, check=True, timeout=180)
    return NodeClient(folder, node)
