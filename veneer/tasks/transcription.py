"""Transcription: what is said in a sound file, by any speech encoder-decoder of transformers (Whisper, Moonshine …)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadFile, BadValue, Unsupported
from veneer.tasks.audio import beside, samples, seconds, sound_extra, too_long
from veneer.tasks.causal_lm import IGNORED, CausalLM
from veneer.tasks.data import Row, Table, column
from veneer.tasks.metric import Measured
from veneer.tasks.task import SOUNDS, Options, _first, check_text, load_failed
from veneer.tasks.word_errors import plain_words, rates

if TYPE_CHECKING:
    from torch import Tensor, nn

FILES = (*SOUNDS, "file", "path", "filename", "file_name")
TRANSCRIPTS = ("text", "sentence", "transcript", "transcription", "raw_transcription", "normalized_text")


class Transcription(CausalLM):
    """A sound file and its transcript. Metrics: word and character error rate of greedy answers, loss per token (bootstrap over clips).

    Errors are counted on lower-case words without punctuation; accents count. Whisper pads every clip to 30 s of features;
    `max_seconds` shortens that window, and the encoder's table of positions with it.
    """

    slug: ClassVar[str] = "transcription"
    per_token: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    headline: ClassVar[str] = "wer"
    fixed: bool
    """Whether the loaded model hears a window of fixed length."""
    start: int
    dtype: Any

    # -- data ---------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        import dataclasses

        found: dict[str, Any] = {}
        for name, flag, known in (("audio", "--audio", FILES), ("text", "--text", TRANSCRIPTS)):
            chosen = getattr(options, name) or _first(known, [c for c in table.columns if c not in found.values()])
            if chosen is None:
                have = ", ".join(table.columns)
                raise BadValue(f"{table.source}: no column is called {' or '.join(known[:3])}; there are {have}. Name it with {flag}.")
            found[name] = column(table, chosen, flag)
        return dataclasses.replace(options, **found)

    def check(self, table: Table, split: str) -> None:
        check_text(table, self.options, split)
        audio, most = self.options.audio or "", self.options.max_seconds
        for i, row in enumerate(table.rows):
            place = f"{table.place(i)} ({split})"
            if not plain_words(row[self.options.text or ""]):
                raise BadValue(f"{place}: the transcript {row[self.options.text or '']!r} has no words. Mend the row, or leave it out.")
            if not isinstance(row.get(audio), str | dict) or not row[audio]:
                raise BadValue(f"{place}: the column {audio!r} names no sound file. Mend the row, or choose another column with --audio.")
            row[audio] = beside(row[audio], table.source)
            try:
                length = seconds(row[audio])
            except BadFile as error:
                raise BadFile(f"{place}: {error}") from None
            if most is not None and length > most:
                raise too_long(place, length, f"max_seconds={most:g}")

    def said(self) -> str:
        given = {name: getattr(self.options, name) for name in ("audio", "language", "max_seconds")}
        shown = [f"{name}={value!r} (--{name.replace('_', '-')})" for name, value in given.items() if value is not None]
        return ", ".join([*shown, super().said()])

    # -- model --------------------------------------------------------------------------------------------------

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

        from veneer.assets import resolve
        from veneer.models.speech import shorten, window, write_in

        for module in ("soundfile", "scipy.signal", "jiwer"):
            sound_extra(module)
        folder = resolve(model)
        try:
            processor = AutoProcessor.from_pretrained(folder)
            loaded = AutoModelForSpeechSeq2Seq.from_pretrained(folder, **kwargs)
        except (OSError, ValueError) as error:
            raise load_failed(model, error) from error
        if not hasattr(processor, "feature_extractor") or not hasattr(processor, "tokenizer"):
            raise Unsupported(f"{model} has no processor with a feature extractor and a tokenizer, which transcription needs.")
        write_in(self.options.language, loaded, processor, model)
        most = window(processor.feature_extractor)
        if most is not None and self.options.max_seconds is not None:
            most = shorten(loaded, processor.feature_extractor, self.options.max_seconds)
        self.fixed, self.start, self.dtype = most is not None, loaded.config.decoder_start_token_id, loaded.dtype
        if most is not None and hasattr(self, "splits"):
            self.fits(most, model)
        return loaded, processor

    def fits(self, most: float, model: str) -> None:
        """Raises `BadValue` for a clip that is longer than the model's window."""
        for split, table in self.splits.items():
            for i, row in enumerate(table.rows):
                length = seconds(row[self.options.audio or ""])
                if length > most:
                    raise too_long(f"{table.place(i)} ({split})", length, f"the {most:g} s that {model} hears")

    def encode(self, rows: Sequence[Row], processor: Any) -> Sequence[dict[str, Any]]:  # type: ignore[override]
        return Clips(self, rows, processor)

    def labels(self, text: str, processor: Any) -> list[int]:
        """Token ids of a transcript as the decoder is to write them: without the first one, which it is given, and with an end."""
        ids = list(processor.tokenizer(text)["input_ids"])
        end = processor.tokenizer.eos_token_id
        return ids[ids[:1] == [self.start] :] + [end] * (ids[-1] != end)

    def features(self, sources: Sequence[Any], processor: Any) -> dict[str, Tensor]:
        """What the encoder reads of sound files: a fixed window each, or padded to the longest with its mask."""
        extractor = processor.feature_extractor
        heard = [samples(source, extractor.sampling_rate) for source in sources]
        given: dict[str, Any] = {"padding": "max_length"} if self.fixed else {"padding": True, "return_attention_mask": True}
        made = extractor(heard, sampling_rate=extractor.sampling_rate, return_tensors="pt", **given)
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in made.items()}

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        import torch

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            longest = max(len(item["labels"]) for item in items)
            labels = torch.tensor([item["labels"] + [IGNORED] * (longest - len(item["labels"])) for item in items])
            given = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=self.start)  # the decoder reads what it has written so far
            given = given.masked_fill(given == IGNORED, processor.tokenizer.eos_token_id)
            return {**self.features([item["audio"] for item in items], processor), "decoder_input_ids": given, "labels": labels}

        return collate

    # -- results ------------------------------------------------------------------------------------------------

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """Summed loss and number of tokens of every row [batch, 2]."""
        import torch

        scores = (logits[0] if isinstance(logits, tuple) else logits).float()
        loss = torch.nn.functional.cross_entropy(scores.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return torch.stack([loss.sum(1), (labels != IGNORED).sum(1).to(loss.dtype)], 1)

    def generate(self, model: nn.Module, processor: Any, rows: Sequence[Row], batch_size: int) -> Measured:
        answers = self.transcripts(model, processor, [row[self.options.audio or ""] for row in rows], batch_size)
        return Measured(rates([row[self.options.text or ""] for row in rows], answers))

    def transcripts(self, model: nn.Module, processor: Any, sources: Sequence[Any], batch_size: int) -> list[str]:
        """Greedy transcripts of sound files."""
        import torch
        from tqdm.auto import tqdm

        device = next(model.parameters()).device
        most = min(self.options.max_new_tokens, getattr(model.config, "max_target_positions", 10**9) - 8)  # type: ignore[union-attr]
        found: list[str] = []
        model.eval()
        for i in tqdm(range(0, len(sources), batch_size), desc="listening", leave=False, disable=None):
            given = {k: v.to(device) for k, v in self.features(sources[i : i + batch_size], processor).items()}
            with torch.inference_mode():
                ids = model.generate(**given, max_new_tokens=most, do_sample=False, num_beams=1, use_cache=True)  # type: ignore[operator]
            found += [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return found

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 8) -> list[dict[str, Any]]:
        """Transcripts of sound files, or of rows that name them."""
        audio = self.options.audio or ""
        sources = [item[audio] if isinstance(item, dict) and audio in item else item for item in inputs]
        return [{"text": text} for text in self.transcripts(model, processor, sources, batch_size)]


class Clips(Sequence):
    """Rows whose sounds are read only when a batch needs them."""

    def __init__(self, task: Transcription, rows: Sequence[Row], processor: Any) -> None:
        self.task, self.rows, self.processor = task, rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, options = self.rows[index], self.task.options
        return {"audio": row[options.audio or ""], "labels": self.task.labels(row[options.text or ""], self.processor)}
