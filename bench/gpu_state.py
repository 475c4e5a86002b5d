"""What a GPU check has done so far, kept on disk so that the next call goes on, and the one archive that holds every result."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARCHIVE = "gpu-check.tar.gz"
ARCHIVE_BYTES = 16 << 20  # where only a few small files can be brought back from a machine
LOG_BYTES = 256 << 10  # of a log, its end; the archive holds no more of it


class State:
    """The units that are done, by name, for one commit; another commit begins anew and leaves the rows that are there."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.folder, self.commit = folder, commit
        self.path = folder / "state.json"
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            found = {}
        self.done: dict[str, dict[str, Any]] = found.get("done", {}) if found.get("commit") == commit else {}

    def finish(self, unit: str, backends: Sequence[str], why: str | None = None) -> None:
        """Remember that a unit was measured with these backends; ``why`` says what is missing of it all the same."""
        self.done[unit] = {
            "at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "backends": list(backends),
            **({"why": why} if why else {}),
        }
        replace(self.path, (json.dumps({"commit": self.commit, "done": self.done}, indent=1) + "\n").encode())

    def forget(self, units: Sequence[str]) -> None:
        """Measure these again."""
        for unit in units:
            self.done.pop(unit, None)

    def due(self, unit: str, backends: Sequence[str]) -> bool:
        """Whether a unit has not been measured with all of these backends."""
        return unit not in self.done or not set(backends) <= set(self.done[unit]["backends"])


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a run that is killed, finds the old content or the new one."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def pack(folder: Path, into: Path) -> Path:
    """All files of a results folder in one archive, replaced atomically; of logs the end, where it grows too large."""
    into.mkdir(parents=True, exist_ok=True)
    for limit in (None, LOG_BYTES, LOG_BYTES >> 4):
        content = _packed(folder, limit)
        if len(content) <= ARCHIVE_BYTES:
            break
    replace(into / ARCHIVE, content)
    return into / ARCHIVE


def _packed(folder: Path, limit: int | None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=3) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.name.endswith(".part") or path.name == ARCHIVE:
                continue
            content = path.read_bytes()
            if path.suffix == ".log":
                content = content[-LOG_BYTES:]
            if limit is not None and path.suffix in (".log", ".jsonl"):
                content = content[-limit:]
            entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder)}")
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def unpack(archive: Path, folder: Path) -> None:
    """Put the files of an archive into a results folder, whatever the folder was called when it was packed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        for entry in packed.getmembers():
            inside = Path(*Path(entry.name).parts[1:])
            content = packed.extractfile(entry)
            if content is None or ".." in inside.parts or not inside.parts:
                continue
            path = folder / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, content.read())
