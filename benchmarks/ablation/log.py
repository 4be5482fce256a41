"""The log of outcomes of single trainings, from which a killed benchmark continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ablation.recipe import Outcome

Key = tuple[int, str, int]
"""Depth of the network, name of the row, and seed."""
KEY_NAMES = ("depth", "row", "seed")


class OutcomeLog:
    """A file of JSON lines: a line with the settings, then one outcome per line.

    Args:
        path: The file. A missing file is created; the outcomes of an existing file are read. An incomplete last line is
            dropped.
        made_with: The settings that determine the outcomes, as plain values.

    Raises:
        ValueError: The file has other settings, or no line with settings.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self.path = path
        self.outcomes: dict[Key, Outcome] = {}
        if path.exists():
            self._read(made_with)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"made_with": made_with})

    def add(self, key: Key, outcome: Outcome) -> None:
        """Writes an outcome to the disk before returning."""
        self._append({**dict(zip(KEY_NAMES, key)), **asdict(outcome)})
        self.outcomes[key] = outcome

    def _read(self, made_with: Mapping[str, Any]) -> None:
        whole, newline, cut_off = self.path.read_text(encoding="utf-8").rpartition("\n")
        if not newline:
            self.path.unlink()
            return
        try:
            header, *lines = [json.loads(line) for line in whole.split("\n")]
            before = header["made_with"]
            outcomes = {tuple(line.pop(name) for name in KEY_NAMES): Outcome(**line) for line in lines}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} cannot be gone on with, as its first line does not say what its outcomes were made "
                "with, or another line is no outcome: delete it to begin anew, or write to another folder with "
                "--output"
            ) from error
        differing = [name for name in {**before, **made_with} if before.get(name) != made_with.get(name)]
        if differing:
            raise ValueError(
                f"{self.path} was begun with another {', '.join(differing)}: delete it to begin anew, or write "
                "to another folder with --output"
            )
        self.outcomes = outcomes
        if cut_off:
            self.path.write_text(whole + newline, encoding="utf-8")

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
