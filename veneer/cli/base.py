"""The base model of a saved adapter, loaded again with the adapter on it, and sample inputs to compare models by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli.folder import facts_of
from veneer.errors import BadFile, BadValue
from veneer.train.outcome import RUN_FILE
from veneer.train.recipe import check_model

if TYPE_CHECKING:
    from torch import Tensor, nn


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

    from veneer.assets import resolve
    from veneer.tasks.task import load_failed

    facts, name = facts_of(folder), base_name(folder, model)
    cls: Any = getattr(transformers, str((facts.get("base") or {}).get("class")), transformers.AutoModel)
    heads = [s["out"] for s in facts.get("sites") or [] if s.get("role") == "head" and cls.__name__.endswith("Classification")]
    try:
        return cls.from_pretrained(resolve(name), **({"num_labels": heads[0]} if heads else {})).eval()
    except (OSError, ValueError) as error:
        raise load_failed(name, error) from error


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
    """Made-up inputs of the right kind and shape, always the same: 4 rows of 24 tokens, or 2 pictures or sounds."""
    import torch

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
        found: Any = model(**placed)
    return (found.logits if hasattr(found, "logits") else found[0]).float().cpu()


def difference(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the first."""
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-12))
