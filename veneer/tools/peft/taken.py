"""An adapter on its way out: its parts by module, and the config and tensors that come of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from veneer.calls import Frozen
from veneer.forms import Form
from veneer.part import Part, add_fold
from veneer.slot import Slot
from veneer.tools.peft.names import CLASSIFIERS, PROMPTS, Places, picks, short_targets, task_type, turned
from veneer.tuned import Tuned


@dataclass
class Taken:
    """An adapter on its way out: its parts by module, and the config and tensors that come of them."""

    tuned: Tuned
    name: str
    places: Places
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def remembered(self) -> dict[str, Any]:
        """The config it was loaded with, if it came from PEFT."""
        return dict(self.tuned.adapters[self.name].facts.get("peft") or {})

    def task(self) -> str | None:
        """PEFT's name of the model's task; as remembered where it was loaded."""
        return self.remembered.get("task_type") or task_type(self.tuned.model)

    def put(self, path: str, slot: str, tensor: Tensor) -> None:
        self.tensors[f"base_model.model.{path}.{slot}"] = tensor

    def layer(self, parts: Sequence[Part]) -> tuple[nn.Module, Slot, Form]:
        module = self.tuned.model.get_submodule(parts[0].site.module)
        slot: Slot = module.veneer  # type: ignore[assignment]
        return module, slot, slot.forms[parts[0].site.parameter]

    def frozen(self, parts: Sequence[Part]) -> Frozen:
        module, slot, form = self.layer(parts)
        return Frozen(slot, module, form)

    def folded(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias with these parts, and no others, folded in."""
        call = self.frozen(parts)
        W, b = call.weight(), call.bias()
        new_W, new_b = W, b
        for rows in dict.fromkeys(p.site.rows for p in parts):
            new_W, new_b = add_fold(new_W, new_b, W, b, rows, [p for p in parts if p.site.rows == rows], 1.0)
        return new_W, new_b

    def modules(self) -> list[str]:
        """Paths of the base's modules."""
        return [name for name, _ in self.tuned.model.named_modules() if name and "veneer" not in name.split(".")]

    def name_targets(self, paths: Sequence[str]) -> None:
        """`target_modules`: as remembered where that still picks these modules, else the shortest list that does."""
        modules = self.modules()
        before = self.remembered.get("target_modules")
        same = before and {m for m in modules if picks(before, m)} == set(paths)
        self.config["target_modules"] = before if same else short_targets(paths, modules)
        turned_round = [
            turned(self.layer([p])[2]) for p in self.tuned.adapters[self.name].parts if p.site.module in paths and p.site.kind == "linear"
        ]
        self.config["fan_in_fan_out"] = bool(turned_round) and all(turned_round)


Grouped = dict[str, list[Part]]
"""Parts of one method by module; several where a fused weight is adapted by row ranges."""


def grouped(parts: Iterable[Part]) -> Grouped:
    out: Grouped = {}
    for part in parts:
        out.setdefault(part.site.module, []).append(part)
    return out


def most(values: list[Any]) -> Any:
    return max(values, key=values.count)


def whole_number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def finish(taken: Taken) -> None:
    """The fields every config has; what the adapter was loaded with fills those that are not set here."""
    model, config = taken.tuned.model, taken.config
    task = taken.task()
    if task in CLASSIFIERS and not config.get("modules_to_save"):
        task = None  # PEFT would look for a head in the file
    if task is None and config["peft_type"] in PROMPTS:
        task = "FEATURE_EXTRACTION"
    if task == "SEQ_2_SEQ_LM" and config["peft_type"] in PROMPTS:
        config["num_transformer_submodules"] = 1
    kind = type(model)
    plain = kind.__mro__[2] if kind.__name__.startswith("Adapted") else kind
    common = {
        "task_type": task,
        "auto_mapping": None if task else {"base_model_class": plain.__name__, "parent_library": plain.__module__},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "inference_mode": True,
        "revision": None,
    }
    before = taken.remembered
    if before.get("peft_type") == config["peft_type"]:
        kept = {"task_type", "auto_mapping", "base_model_name_or_path", "revision"}
        common |= {k: before[k] for k in kept if k in before}
        if config.get("modules_to_save") and before.get("modules_to_save"):
            config["modules_to_save"] = before["modules_to_save"]
        if before.get("bias") and config.get("bias") not in (None, "none"):
            config["bias"] = before["bias"]
        taken.config = {**before, **common, **config}
    else:
        taken.config = {**common, **config}
