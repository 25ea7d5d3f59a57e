"""Notes as MusicGen's tokens, and a small MusicGen for them: the real architecture at a size that trains in minutes.

MusicGen's own tokens come from EnCodec, whose weights are not at hand. Here a note is a row of log-mel spectra, and several
codebooks of k-means centres, each for what the ones before left over, turn every spectrum into as many tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.tasks.audio import sound_extra

if TYPE_CHECKING:
    import numpy as np
    from transformers import MusicgenForConditionalGeneration

RATE, STEP, WINDOW, BANDS = 16000, 80, 512, 40
"""Samples a second, between spectra (5 ms: half of the notes last less than 60), and in each; mel bands."""


@cache
def _bank() -> Tensor:
    """Mel filters [bands, frequencies]."""
    from transformers.audio_utils import mel_filter_bank

    made = mel_filter_bank(WINDOW // 2 + 1, BANDS, 30.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.tensor(made, dtype=torch.float32).T.contiguous()


def spectra(samples: np.ndarray, rate: int) -> Tensor:
    """Log-mel spectra [frames, 40] of int16 samples, one every 5 ms, the loudest band at 0 and 8 nepers below it at −8."""
    resample_poly = sound_extra("scipy.signal").resample_poly
    common = math.gcd(rate, RATE)
    x = torch.tensor(resample_poly(samples / 32768.0, RATE // common, rate // common), dtype=torch.float32)
    power = torch.stft(x, WINDOW, STEP, window=torch.hann_window(WINDOW), pad_mode="constant", return_complex=True).abs() ** 2
    found = (_bank() @ power).clamp_min(1e-10).log()
    return (found - found.max()).clamp_min(-8).T.contiguous()


class Codebooks:
    """Residual vector quantisation of spectra: `words` k-means centres a codebook, each fitted to what is left over.

    Raises `BadValue` for fewer spectra than centres.
    """

    def __init__(self, frames: Tensor, codebooks: int = 4, words: int = 64, seed: int = 0, rounds: int = 25) -> None:
        if len(frames) < words:
            raise BadValue(f"{len(frames)} spectra are too few for {words} words; give more notes or fewer words.")
        generator, left = Generator().manual_seed(seed), frames
        self.centres: list[Tensor] = []
        for _ in range(codebooks):
            centres = left[torch.randperm(len(left), generator=generator)[:words]].clone()
            for _ in range(rounds):
                near = torch.cdist(left, centres).argmin(1)
                sums, counts = torch.zeros_like(centres).index_add_(0, near, left), near.bincount(minlength=words)
                centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
            left = left - centres[torch.cdist(left, centres).argmin(1)]
            self.centres.append(centres)

    def encode(self, frames: Tensor) -> Tensor:
        """Tokens [frames, codebooks] of spectra [frames, bands]."""
        left, found = frames, []
        for centres in self.centres:
            found.append(torch.cdist(left, centres).argmin(1))
            left = left - centres[found[-1]]
        return torch.stack(found, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Spectra [..., bands] of tokens [..., codebooks]."""
        return torch.stack([centres[tokens[..., k]] for k, centres in enumerate(self.centres)]).sum(0)


def delayed(tokens: Sequence[Tensor], length: int, words: int) -> dict[str, Tensor]:
    """A batch for MusicGen's decoder, codebook k one step behind codebook k − 1 (arXiv:2306.05284); `words` is the empty token.

    tokens: of each note [frames, codebooks], cut to `length` frames. Gives decoder_input_ids [notes · codebooks, T], which begin
    empty, and labels [notes, T, codebooks], empty places −100, T = length + codebooks − 1.
    """
    books = tokens[0].shape[1]
    T = length + books - 1
    labels = torch.full((len(tokens), T, books), -100)
    for b, note in enumerate(tokens):
        n = min(len(note), length)
        for k in range(books):
            labels[b, k : k + n, k] = note[:n, k]
    read = torch.nn.functional.pad(labels[:, :-1], (0, 0, 1, 0), value=-100)
    read = read.masked_fill(read < 0, words)
    return {"decoder_input_ids": read.transpose(1, 2).reshape(-1, T), "labels": labels}


def musicgen(decoder: dict[str, Any], text: dict[str, Any], seed: int = 0) -> MusicgenForConditionalGeneration:
    """MusicGen of any size with random weights: text encoder (T5), decoder, and an EnCodec of the smallest size, which tokens bypass.

    Args:
        decoder, text: settings of `MusicgenDecoderConfig` and `T5Config`.
    """
    from transformers import EncodecConfig, MusicgenConfig, MusicgenForConditionalGeneration, T5Config
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    torch.manual_seed(seed)
    quiet: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0, "use_cache": False}
    empty: dict[str, Any] = {"pad_token_id": decoder["vocab_size"], "bos_token_id": decoder["vocab_size"]}
    unheard = EncodecConfig(num_filters=4, codebook_size=16, codebook_dim=8, hidden_size=8, upsampling_ratios=[4, 2], num_lstm_layers=1)
    parts = {
        "text_encoder": T5Config(dropout_rate=0.0, **text),
        "audio_encoder": unheard,
        "decoder": MusicgenDecoderConfig(**empty, **quiet, **decoder),
    }
    whole: dict[str, Any] = {name: part.to_dict() for name, part in parts.items()}
    return MusicgenForConditionalGeneration(MusicgenConfig(**whole))


def small(words: int = 64, codebooks: int = 4, width: int = 128, layers: int = 4, seed: int = 0) -> MusicgenForConditionalGeneration:
    """A MusicGen of 1.2 M parameters for notes; its prompts are `prompt`'s."""
    text = {"vocab_size": PROMPTS, "d_model": width // 2, "d_kv": 16, "d_ff": width, "num_layers": 2, "num_heads": 4}
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 4}
    return musicgen({"vocab_size": words, "num_codebooks": codebooks, **sizes}, text, seed)


def medium() -> MusicgenForConditionalGeneration:
    """MusicGen-medium's architecture (arXiv:2306.05284) on the meta device: a decoder of 1.84 G parameters, T5-base of 110 M."""
    sizes = {"hidden_size": 1536, "ffn_dim": 6144, "num_hidden_layers": 48, "num_attention_heads": 24, "num_codebooks": 4}
    text = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        return musicgen({"vocab_size": 2048, **sizes}, text)


def prompt(pitch: int, frames: int) -> list[int]:
    """What the text encoder reads of a note: its MIDI pitch, and its length in eighths of octaves of frames."""
    return [1 + min(pitch, 127), 130 + min(int(8 * math.log2(max(frames, 1))), 69)]


PROMPTS = 200
"""Words of the prompts."""


def sampled(model: Any, prompts: Tensor, length: int, words: int, generator: Generator) -> Tensor:
    """Tokens [notes, length, codebooks] drawn one step after another, in the order of `delayed`, without a key-value cache."""
    books = model.config.decoder.num_codebooks
    read = torch.full((len(prompts), books, length + books), words)
    with torch.inference_mode():
        heard = model.text_encoder(input_ids=prompts)
        for t in range(length + books - 1):
            ids = read[..., : t + 1].reshape(-1, t + 1)
            logits = model(encoder_outputs=(heard[0],), decoder_input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            drawn = torch.multinomial(logits, 1, generator=generator).view(-1, books)
            live = (torch.arange(books) <= t) & (t < torch.arange(books) + length)
            read[..., t + 1] = torch.where(live, drawn, torch.full_like(drawn, words))
    return torch.stack([read[:, k, 1 + k : 1 + k + length] for k in range(books)], -1)
