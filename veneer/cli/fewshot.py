"""`veneer fewshot`: k examples in the prompt against an adapter trained on them, for the user's model and data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from veneer.cli.command import Flag
from veneer.cli.output import table
from veneer.errors import BadValue
from veneer.spec import parse_spec
from veneer.study.fewshot import FewShot
from veneer.tasks.task import Options, prepare

if TYPE_CHECKING:
    from torch import nn

SAMPLE = 200
"""Rows whose lengths are measured."""


def fewshot(
    model: Annotated[str, Flag("a model folder, a hub name, or a short name such as smollm2")],
    data: Annotated[str, Flag("texts with labels or choices: a file, a folder or a data set")],
    shots: Annotated[int, Flag("examples in the prompt")] = 32,
    method: Annotated[str, Flag("the adapter", metavar="SPEC")] = "ia3",
    steps: Annotated[int, Flag("optimiser steps of its training")] = 1000,
    batch_size: Annotated[int, Flag("rows per step")] = 8,
    text: Annotated[str | None, Flag("column of the text")] = None,
    label: Annotated[str | None, Flag("column of the label")] = None,
    runs: Annotated[int, Flag("timed predictions of each kind; 0 leaves the model's weights unloaded")] = 3,
) -> Any:
    """Compare the cost of examples in the prompt with that of a trained adapter: FLOPs, seconds, storage, memory."""
    from veneer.train.recipe import check_model

    for name, value in (("shots", shots), ("steps", steps), ("batch-size", batch_size)):
        if value < 1:
            raise BadValue(f"--{name} {value} must be at least 1.")
    parse_spec(method)
    check_model(model)
    task, _ = prepare(data, "multiple-choice", Options(text=text, label=label, max_length=10**6))
    from veneer import anatomy, assets

    skeleton = anatomy.skeleton(assets.resolve(model))
    cost = FewShot(**_lengths(task, model), **_sizes(skeleton, method), shots=shots, steps=steps, batch=batch_size)
    seconds = _seconds(skeleton, model, cost, runs) if runs > 0 else {}
    _show(cost, seconds, model, method)
    names = ("icl_flops", "tuned_flops", "training_flops", "icl_bytes", "tuned_bytes", "cache_bytes", "break_even")
    return {"sizes": cost, **{name: getattr(cost, name) for name in names}, "seconds": seconds}


def _lengths(task: Any, model: str) -> dict[str, Any]:
    """Mean tokens of an example with its right answer, and of a question with all answers."""
    from veneer.cli.base import processor_of

    tokenizer = processor_of(model)
    if tokenizer is None or not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise BadValue(f"{model} has no tokenizer, so examples cannot be measured in tokens. Choose a language model.")
    tokenizer.model_max_length = 10**6  # lengths are measured whole
    encoded = task.encode(task.splits.train.rows[:SAMPLE], tokenizer)
    shot = [len(e["input_ids"]) + len(e["answers"][0]) for e in encoded]
    query = [len(e["input_ids"]) + sum(map(len, e["answers"])) for e in encoded]
    return {"shot": sum(shot) / len(shot), "query": sum(query) / len(query)}


def _sizes(skeleton: nn.Module, method: str) -> dict[str, Any]:
    import veneer
    from veneer import anatomy

    total = sum(p.numel() for p in skeleton.parameters())
    attention = [s for s in anatomy.sites(skeleton) if s.kind == "attention"]
    config: Any = getattr(skeleton, "config", None)
    both = bool(getattr(config, "is_encoder_decoder", False))
    trained = veneer.attach(skeleton, method, head=False).summary().trained
    veneer.of(skeleton).detach()
    return {"parameters": total, "trained": trained, "cached": sum(s.out_features for s in attention), "encoder_decoder": both}


def _seconds(skeleton: nn.Module, model: str, cost: FewShot, runs: int) -> dict[str, float]:
    """Median seconds of a prediction of each kind, on the device there is; none for a prompt beyond the model's positions."""
    import torch

    from veneer.cli.base import with_weights

    config: Any = getattr(skeleton, "config", None)
    most = getattr(config, "max_position_embeddings", None) or 10**9
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = with_weights(skeleton, model).to(device)
    lengths = {"icl": round(cost.prompt + cost.query), "tuned": round(cost.query)}
    return {name: _timed(loaded, n, runs, device) for name, n in lengths.items() if n <= most}


def _timed(model: nn.Module, tokens: int, runs: int, device: str) -> float:
    import statistics
    import time

    import torch

    ids = torch.ones((1, max(tokens, 1)), dtype=torch.long, device=device)
    given = {"decoder_input_ids": ids[:, :1]} if getattr(model.config, "is_encoder_decoder", False) else {}  # type: ignore[union-attr]
    found = []
    with torch.inference_mode():
        for _ in range(runs + 1):  # the first one warms up
            start = time.perf_counter()
            model(input_ids=ids, **given)
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def _show(cost: FewShot, seconds: dict[str, float], model: str, method: str) -> None:
    print(
        f"{model} ({cost.parameters:,} parameters), {method} ({cost.trained:,} trained), {cost.shots} examples of {cost.shot:.0f} tokens; "
        f"a question with its answers: {cost.query:.0f}\n"
    )
    timed = ["–" if name not in seconds else f"{seconds[name]:.3g} s" for name in ("icl", "tuned")]
    rows = [
        ("FLOPs of a prediction", f"{cost.icl_flops:.2g}", f"{cost.tuned_flops:.2g}", _times(cost.icl_flops, cost.tuned_flops)),
        ("seconds of a prediction", *timed, _times(*(seconds[n] for n in ("icl", "tuned"))) if len(seconds) == 2 else ""),
        ("FLOPs of training", "0", f"{cost.training_flops:.2g}", f"{cost.steps} steps of {cost.batch}"),
        ("storage of a task", _bytes(cost.icl_bytes), _bytes(cost.tuned_bytes), "4 bytes a token id, 4 a number"),
        ("kept keys and values", _bytes(cost.cache_bytes), "0 B", "where the examples are not read again"),
    ]
    table(("", "in the prompt", "adapter", ""), rows, right=(1, 2))
    print(f"\nTraining pays for itself in FLOPs after {cost.break_even:,.0f} predictions.")


def _times(first: float, second: float) -> str:
    return f"{first / second:.1f} ×"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    return ""
