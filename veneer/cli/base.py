"""The base model of a saved adapter, loaded again with the adapter on it, and sample inputs to compare models by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli.folder import PEFT_WEIGHTS, facts_of, header
from veneer.errors import BadFile, BadValue
from veneer.train.outcome import RUN_FILE
from veneer.train.recipe import check_model

if TYPE_CHECKING:
    from torch import Tensor, nn


PEFT_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""Task types in PEFT's files → the class of transformers that they were made for."""


def base_name(folder: Path, model: str | None) -> str:
    """Folder or hub name of the adapter's base model: what the user says, else what the adapter remembers."""
    facts = facts_of(folder)
    name = model or (facts.get("training") or {}).get("model") or (facts.get("base") or {}).get("name")
    if not name:
        raise BadValue(f"{folder} does not say which model it was made for. Name it with --model.")
    check_model(str(name))
    return str(name)


def load_base(folder: Path, model: str | None = None) -> nn.Module:
    """The base model in the class and with the head shape that the adapter was made for.

    Raises `VeneerError`s if it is not known or cannot be loaded.
    """
    run = folder.parent
    if model is None and (run / RUN_FILE).is_file():
        from veneer.train.use import rebuild

        return rebuild(run, adapter=False)[0]
    import transformers
    from transformers.utils import logging

    from veneer import models
    from veneer.assets import resolve
    from veneer.tasks.task import load_failed

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts, name = facts_of(folder), base_name(folder, model)
    models.register()
    cls: Any = getattr(transformers, _class_name(facts), None) or models.architecture(_class_name(facts)) or transformers.AutoModel
    labels = _labels(folder, facts) if "Classification" in cls.__name__ else None
    try:
        return cls.from_pretrained(resolve(name), **({"num_labels": labels} if labels else {})).eval()
    except (OSError, ValueError) as error:
        raise load_failed(name, error) from error


def with_weights(skeleton: nn.Module, name: str) -> nn.Module:
    """A skeleton's model again with its weights, without a progress bar. Raises `BadFile` if they cannot be had."""
    from transformers.utils import logging

    from veneer import anatomy
    from veneer.assets import resolve

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return anatomy.with_weights(skeleton, resolve(name))


def _class_name(facts: dict[str, Any]) -> str:
    """The class of transformers that the adapter was made for."""
    if "peft" in facts:
        return PEFT_TASKS.get(str(facts["peft"].get("task_type")), "AutoModel")
    return str((facts.get("base") or {}).get("class"))


def _labels(folder: Path, facts: dict[str, Any]) -> int | None:
    """Number of classes of the task head that is saved with the adapter; None if none is."""
    if "peft" not in facts:
        return next((s["out"] for s in facts.get("sites") or [] if s.get("role") == "head"), None)
    heads = [t["shape"][0] for n, t in header(folder / PEFT_WEIGHTS)[0].items() if re.search(r"(classifier|score)\b.*weight$", n)]
    return heads[-1] if heads else None


def processor_of(name: str) -> Any:
    """The tokenizer or image processor that belongs to a model; None if it has none."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from veneer.assets import resolve

    for kind in (AutoTokenizer, AutoImageProcessor):
        try:
            return kind.from_pretrained(resolve(name))
        except (OSError, ValueError, KeyError):
            continue
    return None


def samples(model: Any) -> dict[str, Tensor]:
    """Made-up inputs of the right kind and shape, always the same: 4 rows of 24 tokens, 2 pictures or sounds, or the model's own."""
    import torch

    if hasattr(model, "example_inputs"):
        return model.example_inputs()
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    kind = getattr(model, "main_input_name", "input_ids")
    if kind == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {kind: torch.randn((2, getattr(model.config, "num_channels", 3), height, width), generator=generator)}
    if kind == "input_features":
        frames = 2 * model.config.max_source_positions
        ids = torch.full((2, 4), model.config.decoder_start_token_id)
        return {kind: torch.randn((2, model.config.num_mel_bins, frames), generator=generator), "decoder_input_ids": ids}
    if kind == "input_ids" and getattr(config, "vocab_size", 0):
        ids = torch.randint(0, config.vocab_size, (4, 24), generator=generator)
        again = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **again}
    raise BadFile(f"{type(model).__name__} takes {kind!r}; veneer knows no sample inputs of that kind to verify the result with.")


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a model answers: its logits, or its last hidden states."""
    import torch

    model.eval()
    first = next(p for p in model.parameters() if p.is_floating_point())
    placed = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    with torch.no_grad():
        found: Any = getattr(model, "predictions", model)(**placed)
    if isinstance(found, torch.Tensor):
        return found.float().cpu()
    return (found.logits if hasattr(found, "logits") else found[0]).float().cpu()


def difference(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the first."""
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-12))
