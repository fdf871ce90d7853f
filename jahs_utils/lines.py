"""Files of lines that are written whole or not at all, whenever their writer is killed."""

from __future__ import annotations

import codecs
import os
from pathlib import Path


def read_lines(path: Path) -> list[bytes]:
    """The complete lines of a file; what a killed writer left at its end is none yet."""
    content = path.read_bytes() if path.exists() else b""
    return content.removeprefix(codecs.BOM_UTF8).split(b"\n")[:-1]


def append_line(path: Path, line: bytes) -> None:
    """Write a line in place of what a killed writer left; when this returns, the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
