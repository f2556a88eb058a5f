"""Folders that cannot be written, also not by root, whom permissions do not stop: a mount does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def mount(*arguments: Any) -> bool:
    """Whether mounting fails."""
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode != 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder cannot be written, not even by root."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
        try:
            yield
        finally:
            folder.chmod(0o700)
        return
    if mount("--bind", folder, folder) or mount("-o", "remount,bind,ro", folder):
        pytest.skip("neither permissions nor mounts can make a folder read-only here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
