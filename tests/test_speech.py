"""Transcription: sounds and transcripts are read and checked, errors counted, and any speech encoder-decoder trains on them."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer import assets_speech
from veneer.cli.main import main
from veneer.errors import BadFile, BadValue, MissingExtra, VeneerError
from veneer.models.speech import shorten, window
from veneer.tasks import audio
from veneer.tasks.audio import samples, seconds
from veneer.tasks.data import Data, Table, read
from veneer.tasks.task import Options, guess, prepare
from veneer.tasks.transcription import Transcription
from veneer.tasks.word_errors import errors, plain_words
from veneer.train import Recipe, train

WORDS = ("low", "high")
RATE = 8000


def tone(path: Path, frequency: float = 400.0, length: float = 0.5, rate: int = RATE, channels: int = 1) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(length * rate)) / rate
    values = (0.5 * 32767 * np.sin(2 * np.pi * frequency * t)).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(values[:, None], channels, 1).tobytes())
    return str(path)


def clips(folder: Path, n: int = 40) -> str:
    """A CSV file of tones, low and high, each named by its word and a number."""
    lines = ["audio,text"]
    for i in range(n):
        tone(folder / "sounds" / f"{i}.wav", (300, 1500)[i % 2] + 3 * i, 0.3 + 0.01 * (i % 7))
        lines.append(f"sounds/{i}.wav,{WORDS[i % 2]} {'abcdefghij'[i // 2 % 10]}{'klmn'[i // 20]}")
    (folder / "clips.csv").write_text("\n".join(lines))
    return str(folder / "clips.csv")


def alphabet(folder: Path) -> str:
    """A tokenizer of single bytes with Whisper's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ("endoftext", "startoftranscript", "en", "zh", "de", "es", "transcribe", "translate", "notimestamps")
    core.add_special_tokens([f"<|{mark}|>" for mark in marks])
    path = folder / "tokenizer.json"
    core.save(str(path))
    return str(path)


def whisper(folder: Path, several: bool = False) -> str:
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
    from transformers import WhisperTokenizer as Words

    folder.mkdir(parents=True, exist_ok=True)
    words = Words(tokenizer_file=alphabet(folder))
    end, start = (words.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "startoftranscript"))
    marks = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    sides = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(words), num_mel_bins=16, d_model=16, **sides, **marks, max_source_positions=100, max_target_positions=32
    )
    model = WhisperForConditionalGeneration(config)
    told = {"lang_to_id": {"<|es|>": start + 4}, "task_to_id": {"transcribe": start + 5, "translate": start + 6}} if several else {}
    model.generation_config = GenerationConfig(
        **marks, max_length=32, is_multilingual=several, no_timestamps_token_id=start + 7, return_timestamps=False, **told
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=2), words).save_pretrained(folder)
    return str(folder)


def moonshine(folder: Path) -> str:
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor
    from transformers import Wav2Vec2Processor as Processor

    folder.mkdir(parents=True, exist_ok=True)
    words = PreTrainedTokenizerFast(
        tokenizer_file=alphabet(folder), bos_token="<|startoftranscript|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.eos_token_id}
    sides = {f"{s}_num_{k}": v for s in ("encoder", "decoder") for k, v in (("hidden_layers", 1), ("attention_heads", 2))}
    torch.manual_seed(0)
    config = MoonshineConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, **sides, **marks, decoder_start_token_id=words.bos_token_id
    )
    MoonshineForConditionalGeneration(config).save_pretrained(folder)
    Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), words).save_pretrained(folder)
    return str(folder)


MODELS: dict[str, Callable[[Path], str]] = {"whisper": whisper, "moonshine": moonshine}


# -- sounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (22050, 1)])
def test_sounds_come_at_the_rate_that_is_asked_for(rate: int, channels: int, tmp_path: Path) -> None:
    path = tone(tmp_path / "a.wav", 440, 0.5, rate, channels)
    heard = samples(path, 16000)
    assert heard.dtype == np.float32 and heard.shape == (8000,) and seconds(path) == pytest.approx(0.5)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    assert np.abs(heard - wanted)[400:-400].max() < 0.01
    assert np.array_equal(heard, samples({"bytes": Path(path).read_bytes(), "path": None}, 16000))


def test_sounds_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF and nothing else")
    tone(tmp_path / "empty.wav", length=0)
    for name, said in (("a.wav", "cannot be read as sound"), ("none.wav", "There is no sound file"), ("empty.wav", "its length is 0")):
        for read_it in (seconds, lambda path: samples(path, 16000)):
            with pytest.raises(BadFile, match=said):
                read_it(str(tmp_path / name))
    with pytest.raises(BadFile, match="cannot be read as sound"):
        seconds({"bytes": b"nothing", "path": "x.wav"})


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtra, match=r"'no_such_package'. Run: pip install 'veneer\[speech\]'"):
        audio.sound_extra("no_such_package.part")


# -- words ------------------------------------------------------------------------------------------------------


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert plain_words("¿Qué  tal? «It's 9.30», X-Ray…") == "qué tal it's 9 30 x ray"
    assert plain_words("... '—'") == ""
    assert errors("¡Hola, mundo!", "hola mundo.") == (0, 2, 0, 10)


def test_errors_are_edits_of_the_reference() -> None:
    assert errors("a b c d", "a x c")[:2] == (2, 4)  # one other, one left out
    assert errors("a b", "a b c d e")[:2] == (3, 2)  # may be more than there are words
    assert errors("one two", "") == (2, 2, 7, 7)
    assert errors("cat", "cut")[2:] == (1, 3)


def test_rates_are_those_of_all_words_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"audio": str(i), "text": text} for i, text in enumerate(("a b c", "d", "e f"))]
    task = Transcription(Options(text="text", audio="audio"))
    monkeypatch.setattr(task, "transcripts", lambda *_: ["a b c", "x", "e"])
    found = task.generate(torch.nn.Linear(1, 1), None, rows, 2).metrics
    assert found["wer"].value == pytest.approx(2 / 6) and found["wer"].n == 3
    assert found["cer"].value == pytest.approx(3 / 9) and found["cer"].low <= found["cer"].value <= found["cer"].high


# -- data -------------------------------------------------------------------------------------------------------


def test_the_task_is_guessed_and_says_its_columns(tmp_path: Path) -> None:
    task, lines = prepare(clips(tmp_path))
    assert task.slug == "transcription" and "audio='audio' (--audio)" in lines[0] and "text='text' (--text)" in lines[0]
    assert all(Path(row["audio"]).is_file() for row in task.splits.train.rows)  # found beside the table
    assert guess(Data("d", {"train": Table([{"audio": "a.wav", "text": "hello"}], "d")})) == "transcription"
    other, _ = prepare(clips(tmp_path), "transcription", Options(audio="audio", text="text", max_seconds=1.5))
    assert "max_seconds=1.5 (--max-seconds)" in other.said()


def test_folders_of_sounds_with_texts(tmp_path: Path) -> None:
    for split, n in (("train", 6), ("test", 2)):
        for i in range(n):
            tone(tmp_path / split / f"{i}.wav")
            (tmp_path / split / f"{i}.txt").write_text(f"hello\n{split} {i}\n")
    data = read(str(tmp_path))
    assert guess(data) == "transcription" and {k: len(t) for k, t in data.tables.items()} == {"train": 6, "test": 2}
    assert data.train.rows[1] == {"audio": str(tmp_path / "train" / "1.wav"), "text": "hello train 1"}
    assert len(read(str(tmp_path / "train")).train) == 6
    (tmp_path / "train" / "3.txt").unlink()
    with pytest.raises(BadFile, match=r"3\.wav has no transcript: there is no 3\.txt"):
        read(str(tmp_path))


def test_the_datasets_library_gives_sounds_as_bytes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [tone(tmp_path / f"{i}.wav", 400 + i) for i in range(12)]
    made = datasets.Dataset.from_list([{"audio": {"bytes": Path(f).read_bytes(), "path": f}, "text": f"w{i}"} for i, f in enumerate(files)])
    made = made.cast(datasets.Features({"audio": datasets.Audio(decode=False), "text": datasets.Value("string")}))
    made.cast_column("audio", datasets.Audio()).save_to_disk(str(tmp_path / "d"))
    task, _ = prepare(str(tmp_path / "d"))
    assert task.slug == "transcription"
    assert samples(task.splits.train.rows[0]["audio"], 16000).shape == (8000,)


BAD: list[tuple[str, dict[str, Any], type[VeneerError], str]] = [
    ("sounds/0.wav,", {}, BadValue, r"clips\.csv, line 14 \(train\): the column 'text' is empty"),
    ("sounds/0.wav,...", {}, BadValue, r"line 14 \(train\): the transcript '...' has no words"),
    (",hello", {}, BadValue, r"line 14 \(train\): the column 'audio' names no sound file"),
    ("sounds/none.wav,hello", {}, BadFile, r"line 14 \(train\): There is no sound file sounds/none.wav"),
    ("bad.wav,hello", {}, BadFile, r"line 14 \(train\): .*bad\.wav cannot be read as sound"),
    ("long.wav,hello", {"max_seconds": 2.5}, BadValue, r"line 14 \(train\): the clip is 3.0 s long, more than max_seconds=2.5"),
]


@pytest.mark.parametrize(("line", "options", "error", "said"), BAD)
def test_mistakes_in_rows_are_told_with_their_place(
    line: str, options: dict[str, Any], error: type[VeneerError], said: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    tone(tmp_path / "long.wav", length=3)
    with open(clips(tmp_path, 12), "a") as file:
        file.write("\n" + line)
    rows = read(str(tmp_path / "clips.csv")).train
    last = Table(rows.rows[-1:], rows.source, rows.lines[-1:])
    with pytest.raises(error, match=said):
        Transcription(Options(text="text", audio="audio", **options)).check(last, "train")


def test_columns_that_are_not_there() -> None:
    table = Table([{"voice": "a.wav", "words": "hello"}], "d.csv")
    with pytest.raises(BadValue, match=r"there are voice, words. Name it with --audio"):
        Transcription.columns(table, Options())
    with pytest.raises(BadValue, match=r"no column 'woords'.*'words'.*--text"):
        Transcription.columns(table, Options(audio="voice", text="woords"))
    found = Transcription.columns(table, Options(audio="voice", text="words"))
    assert (found.audio, found.text) == ("voice", "words")


# -- models -----------------------------------------------------------------------------------------------------


def loaded(kind: str, folder: Path, data: str, **options: Any) -> tuple[Transcription, Any, Any]:
    task, _ = prepare(data, "transcription", Options(max_new_tokens=8, **options))
    assert isinstance(task, Transcription)
    model, processor = task.load(MODELS[kind](folder))
    return task, model.eval(), processor


@pytest.mark.parametrize("kind", MODELS)
def test_labels_and_loss_are_the_models_own(kind: str, tmp_path: Path) -> None:
    task, model, processor = loaded(kind, tmp_path / "m", clips(tmp_path))
    encoded = task.encode(task.splits.train.rows[:3], processor)
    ids = encoded[0]["labels"]
    assert ids[0] != model.config.decoder_start_token_id and ids[-1] == model.config.eos_token_id
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == task.splits.train.rows[0]["text"]
    batch = task.collator(processor)(encoded[:3])
    with torch.no_grad():
        found = model(**batch)
    kept = task.reduce((found.logits,), batch["labels"])
    assert kept.shape == (3, 2) and float(kept[:, 0].sum() / kept[:, 1].sum()) == pytest.approx(float(found.loss), rel=1e-5)
    assert kept[:, 1].tolist() == [len(item["labels"]) for item in encoded]


@pytest.mark.parametrize("kind", MODELS)
def test_a_clips_transcript_does_not_depend_on_its_batch(kind: str, tmp_path: Path) -> None:
    task, model, processor = loaded(kind, tmp_path / "m", clips(tmp_path))
    sources = [row["audio"] for row in task.splits.test.rows + task.splits.validation.rows]
    together = task.transcripts(model, processor, sources, 8)
    assert together == [task.transcripts(model, processor, [source], 1)[0] for source in sources]
    assert task.predict(model, processor, [sources[0], {"audio": sources[1]}]) == [{"text": t} for t in together[:2]]


def test_a_shorter_window_is_the_front_of_the_whole(tmp_path: Path) -> None:
    task, model, processor = loaded("whisper", tmp_path / "m", clips(tmp_path))
    extractor = processor.feature_extractor
    long = task.features([tone(tmp_path / "a.wav", length=0.5)], processor)["input_features"]
    table = model.get_encoder().embed_positions.weight.detach().clone()
    assert window(extractor) == 2 and long.shape == (1, 16, 200)
    assert shorten(model, extractor, 1.001) == pytest.approx(1.02)  # rounded up to whole positions of 20 ms
    short = task.features([str(tmp_path / "a.wav")], processor)["input_features"]
    assert short.shape == (1, 16, 102) and torch.allclose(short[..., :60], long[..., :60], atol=1e-5)
    assert torch.equal(model.get_encoder().embed_positions.weight, table[:51])
    assert task.transcripts(model, processor, [str(tmp_path / "a.wav")], 1)
    with pytest.raises(BadValue, match=r"max_seconds=3 is more than the 1.02 s"):
        shorten(model, extractor, 3)


def test_clips_beyond_the_models_window_are_refused_before_training(tmp_path: Path) -> None:
    source = clips(tmp_path)
    tone(tmp_path / "sounds" / "7.wav", length=2.5)
    with pytest.raises(BadValue, match=r"clips\.csv, line 9 \((train|validation|test)\): the clip is 2.5 s long, more than the 2 s"):
        loaded("whisper", tmp_path / "m", source)
    loaded("moonshine", tmp_path / "n", source)  # pads to the longest clip: no window


def test_languages_are_named_where_there_are_several(tmp_path: Path) -> None:
    task, _ = prepare(clips(tmp_path))
    several, one = whisper(tmp_path / "several", several=True), whisper(tmp_path / "one")
    with pytest.raises(BadValue, match=r"several languages.*--language es"):
        task.load(several)
    for model, language, said in ((several, "klingon", "klingon"), (one, "es", "no choice of languages. Leave --language out")):
        with pytest.raises(BadValue, match=said):
            prepare(clips(tmp_path), "transcription", Options(language=language))[0].load(model)
    spanish, _ = prepare(clips(tmp_path), "transcription", Options(language="es", max_new_tokens=4))
    assert isinstance(spanish, Transcription)
    model, processor = spanish.load(several)
    ids = spanish.labels("low", processor)
    assert processor.tokenizer.convert_ids_to_tokens(ids[:3]) == ["<|es|>", "<|transcribe|>", "<|notimestamps|>"]
    sources = [row["audio"] for row in spanish.splits.test.rows[:2]]
    assert len(spanish.transcripts(model, processor, sources, 2)) == 2


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["lora(r=4)", "bitfit"])
def test_training_lowers_the_loss(kind: str, method: str, tmp_path: Path) -> None:
    settings = {"data": clips(tmp_path), "method": method, "steps": 12, "batch_size": 8, "lr": 3e-2, "max_new_tokens": 8, "device": "cpu"}
    outcome = train(Recipe.of({"model": MODELS[kind](tmp_path / "m"), "out": str(tmp_path / "run"), **settings}), progress=False)
    assert outcome.metrics["loss"].value < outcome.base_metrics["loss"].value - 0.03
    assert outcome.main == "wer" and {"wer", "cer", "loss"} <= outcome.metrics.keys() & outcome.base_metrics.keys()


def test_the_command_line_trains_measures_and_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run = clips(tmp_path), str(tmp_path / "run")
    argv = ["train", "--model", whisper(tmp_path / "m"), "--data", source, "--method", "s2-lora(r=4)", "--steps", "2", "--out", run]
    assert main([*argv, "--max-seconds", "1", "--max-new-tokens", "6", "--device", "cpu", "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert main(["evaluate", run, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["metrics"]
    assert again["wer"] == trained["metrics"]["wer"] and again["loss"]["value"] == pytest.approx(
        trained["metrics"]["loss"]["value"], rel=1e-4
    )
    assert main(["evaluate", run, "--data", clips(tmp_path / "others", 6), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["wer"]["n"] == 6
    assert main(["predict", run, tone(tmp_path / "new.wav"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["answers"][0]) == ["text"]
    assert main(["predict", run, str(tmp_path / "none.wav")]) == 2
    assert "There is no sound file" in capsys.readouterr().err
    assert main(["train", "--model", str(tmp_path / "m"), "--data", source, "--max-seconds", "0"]) == 2
    assert "max_seconds=0 is out of range" in capsys.readouterr().err


# -- the carriers -----------------------------------------------------------------------------------------------


def test_a_damaged_model_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x06\0\0\0\x05\0Whisp")
    with pytest.raises(BadFile, match="cannot be read as a CTranslate2 model"):
        assets_speech.read_ctranslate2(tmp_path / "model.bin")
