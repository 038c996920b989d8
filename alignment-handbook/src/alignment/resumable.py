"""Long work in batches that survives a kill, and becomes one file of JSON lines when it is complete.

Finished batches are in `OUTPUT.part`: a header with everything that their values depend on, then one line a batch. A
run with the same header resumes where the last one stopped; another ends with an error, so no file mixes two kinds.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.files import atomic_path

Entry = dict[str, Any]
#: Files of a model folder that decide what it computes.
_MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja")


class PartFile:
    """The finished batches of a file that is not complete yet.

    Args:
        output: The file that is written at the end, see `write_rows`. Nothing is written before the first batch is
            finished.
        header: Everything that the values depend on, as JSON values.
        overwrite: Replace `output`, and drop the batches of another header.

    Attributes:
        entries: The finished batches, in the order in which they were added.

    Raises:
        UserError: `output` exists already or has another ending, or there are batches of another header.
    """

    def __init__(self, output: str, header: Entry, overwrite: bool = False):
        self.output = Path(output)
        self.path = self.output.with_name(f"{self.output.name}.part")
        self._header: Entry = json.loads(json.dumps(header))
        if self.output.suffix not in (".jsonl", ".json") or self.output.is_dir():
            raise UserError(f"--output: {output}: rows are written as JSON; name a .jsonl file, or a .json for a list")
        if self.output.exists() and not overwrite:
            raise UserError(f"--output: {output} exists already; name another file, or give --overwrite")
        self._size, self.entries = self._read(overwrite)

    def _read(self, overwrite: bool) -> tuple[int, list[Entry]]:
        """Bytes and entries of the file up to the first line that a kill cut short."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        size, entries = 0, []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
            size += len(line) + 1
        if not entries:
            return 0, []
        found = entries[0] if isinstance(entries[0], dict) else {}
        if found == self._header:
            return size, entries[1:]
        if overwrite:
            return 0, []
        other = sorted(key for key in found | self._header if found.get(key) != self._header.get(key))
        raise UserError(
            f"{self.path} is of a run with another {', '.join(other)}; remove it to start anew, give --overwrite, or "
            "repeat that run's flags"
        )

    def add(self, entry: Entry) -> None:
        """Keeps a finished batch."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        with self.path.open("r+b") as file:
            file.seek(self._size)
            file.truncate()  # a line that a kill cut short
            file.writelines(_line(line).encode() for line in ([entry] if self._size else [self._header, entry]))
            self._size = file.tell()
        self.entries.append(entry)

    def finish(self, rows: Iterable[Entry]) -> None:
        """Writes the rows to the output and drops the batches."""
        write_rows(self.output, rows)
        self.path.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Entry]) -> None:
    """Writes rows as JSON lines, or to a `.json` as one list; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(list(rows), file, ensure_ascii=False, indent=2)
        else:
            file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave an empty file and no batches


def content_hash(value: Any) -> str:
    """A hash of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def fingerprint(name: str) -> str:
    """A hash that changes when a model or a code file does; "" for a Hub id.

    For a file it is of the content; for a model folder, of the names, sizes and times of its files: weights are large.
    """
    path = Path(name)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern)})
    return content_hash([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]) if files else ""


def _line(entry: Entry) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
