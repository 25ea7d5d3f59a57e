"""What differs between speech models: the window of fixed length that Whisper pads every clip to, and the language it writes."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.errors import BadValue


def window(extractor: Any) -> float | None:
    """Seconds that a feature extractor pads every clip to; None if it pads to the longest clip of a batch."""
    return getattr(extractor, "chunk_length", None) if hasattr(extractor, "nb_max_frames") else None


def shorten(model: nn.Module, extractor: Any, seconds: float) -> float:
    """Cuts the window to `seconds`, rounded up to whole positions, in place; gives its new length.

    The encoder's table keeps its first positions, so nothing else of the model changes; its work falls in proportion.
    Raises `BadValue` if the model's own window is shorter.
    """
    config: Any = model.config
    whole, positions = extractor.chunk_length, config.max_source_positions
    if seconds > whole:
        raise BadValue(f"max_seconds={seconds:g} is more than the {whole:g} s that the model hears; give at most {whole:g}.")
    kept = min(positions, -int(-seconds * positions // whole))
    frames = extractor.nb_max_frames * kept // positions
    encoder: Any = model.get_encoder()  # type: ignore[operator]
    table = encoder.embed_positions
    table.weight = nn.Parameter(table.weight.detach()[:kept].clone(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = encoder.max_source_positions = config.max_source_positions = kept
    extractor.nb_max_frames, extractor.n_samples = frames, frames * extractor.hop_length
    extractor.chunk_length = extractor.n_samples / extractor.sampling_rate
    return extractor.chunk_length


def write_in(language: str | None, model: Any, processor: Any, name: str) -> None:
    """Tells a model of several languages which one it writes. Raises `BadValue` if it must be named, or cannot be."""
    several = getattr(model.generation_config, "is_multilingual", None)
    if several and language is None:
        raise BadValue(f"{name} knows several languages. Name the one of the transcripts with --language, such as --language es.")
    if language is None:
        return
    if not several:
        raise BadValue(f"{name} has no choice of languages. Leave --language out; it learns the one of the transcripts.")
    try:
        processor.tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
    except ValueError as error:
        raise BadValue(f"language={language!r}: {error}") from None
    model.generation_config.language, model.generation_config.task = language, "transcribe"
