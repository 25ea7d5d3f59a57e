"""What a run gave: read again from its `run.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import BadFile
from veneer.tasks.metric import Metric

RUN_FILE = "run.json"


@dataclass
class Outcome:
    """The result of one run on the test rows.

    Args:
        folder: of the run; `folder / "adapter"` is the adapter.
        method: spec. trained, total: numbers of parameters, total with the adapter.
        metrics, base_metrics: by name, of the adapted and of the untouched model.
        seconds: of training, evaluations during it included. seconds_per_step: median.
        peak_memory: bytes: highest resident memory during training, or highest allocated memory of the GPU.
        adapter_bytes: size of the adapter's folder on disk.
        curve: by step: loss, learning rate, and the validation metrics where they were measured.
        correct: for each test row whether the answer was right; None where answers are neither right nor wrong.
    """

    folder: Path
    method: str
    trained: int
    total: int
    metrics: dict[str, Metric]
    base_metrics: dict[str, Metric]
    seconds: float
    seconds_per_step: float
    peak_memory: int
    adapter_bytes: int
    main: str = "accuracy"
    steps: int = 0
    best_step: int | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    correct: list[bool] | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Outcome:
        """Reads a finished run. Raises `BadFile` if the folder holds none."""
        found = read_run(folder).get("outcome")
        if found is None:
            raise BadFile(f"The run in {folder} is not finished. The command that started it goes on with it.")
        for name in ("metrics", "base_metrics"):
            found[name] = {k: Metric(**v) for k, v in found[name].items()}
        return cls(**{**found, "folder": Path(folder)})

    def as_json(self) -> dict[str, Any]:
        """JSON values; `Outcome.load` reads them."""
        return {**dataclasses.asdict(self), "folder": str(self.folder)}


def read_run(folder: str | Path) -> dict[str, Any]:
    """The contents of a run's `run.json`. Raises `BadFile` if it is missing or damaged."""
    path = Path(folder) / RUN_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFile(f"{folder} is not the folder of a run: it holds no {RUN_FILE}.") from None
    except (ValueError, OSError) as error:
        raise BadFile(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict) or "recipe" not in found:
        raise BadFile(f"{path} is not the record of a run.")
    return found
