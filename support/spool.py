"""A list of records that is kept in memory while it is small, and in a temporary file when it is not."""

from __future__ import annotations

import marshal
import tempfile
from array import array
from collections.abc import Sequence
from typing import Any


class Spool(Sequence):
    """Records of strings, numbers, bytes, tuples and lists. Up to `memory` bytes of them stay in memory.

    The file is temporary: the system removes it when the process ends, however it ends.
    """

    def __init__(self, memory: int = 2**26):
        self._file = tempfile.SpooledTemporaryFile(max_size=memory)
        self._ends = array("Q", [0])
        self._at_end = True  # where the file's position is

    def append(self, record: Any) -> None:
        """Add a record. OSError if the disk is full."""
        if not self._at_end:
            self._file.seek(0, 2)
            self._at_end = True
        data = marshal.dumps(record)
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Any:
        """Return record i as it was added."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        self._file.seek(self._ends[i])
        self._at_end = False
        return marshal.loads(self._file.read(self._ends[i + 1] - self._ends[i]))
