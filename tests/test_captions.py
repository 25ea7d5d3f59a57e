"""A language model that reads pictures: tiny towers and models, contexts, pooling, whole runs, captions by grammar, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import llama, spread
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

import veneer
from veneer import contexts
from veneer.anatomy import sites
from veneer.assets import FASHION_CLASSES
from veneer.cli.main import main
from veneer.errors import BadFile, BadValue, VeneerError
from veneer.models.captioner import CaptionerConfig, ImageTokensForCaptioning
from veneer.tasks.fashion_captions import captioned, lights, shapes, tones
from veneer.tasks.image_captioning import names
from veneer.tasks.task import Options, prepare, with_own
from veneer.train import Recipe, evaluate, predict, train

SMALL = dict(hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=48)
WORDS = ["a", "dark", "light", "square", "circle", "is", "the", ".", "small", "large", "red", "blue"]


def captioner(image_tokens: int = 4, **changes: Any) -> ImageTokensForCaptioning:
    config = CaptionerConfig(CLIPVisionConfig(**SMALL), LlamaConfig(**TEXT, max_position_embeddings=64), image_tokens, **changes)
    return spread(ImageTokensForCaptioning(config)).eval()  # type: ignore[return-value]


def batch(n: int = 3, image_tokens: int = 4) -> dict[str, torch.Tensor]:
    """[BOS], the picture's places, five words; the last row is two words shorter."""
    ids = torch.cat([torch.ones(n, 1), torch.full((n, image_tokens), 48.0), torch.randint(2, 48, (n, 5))], 1).long()
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[-1, -2:] = 0
    labels[:, : 1 + image_tokens] = -100
    labels[-1, -2:] = -100
    return {"input_ids": ids, "pixel_values": torch.randn(n, 3, 56, 56), "attention_mask": mask, "labels": labels}


# -- the model --------------------------------------------------------------------------------------------------


def test_the_sequence_is_the_prompt_the_projected_picture_and_the_words() -> None:
    model, given = captioner(), batch()
    seen: list[torch.Tensor] = []
    model.language_model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        out = model(**given)
    patches = model.vision_tower(given["pixel_values"], interpolate_pos_encoding=True).last_hidden_state[:, 1:].unflatten(1, (4, 4))
    for k, (i, j) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):  # four quarters of 4 × 4 patches
        torch.testing.assert_close(seen[0][:, 1 + k], model.projector(patches[:, i : i + 2, j : j + 2].mean((1, 2))))
    torch.testing.assert_close(seen[0][:, 5:], model.get_input_embeddings()(given["input_ids"][:, 5:]))
    logp = out.logits[:, :-1].log_softmax(-1)
    picked = [float(logp[b, t, given["labels"][b, t + 1]]) for b in range(3) for t in range(9) if given["labels"][b, t + 1] != -100]
    assert len(picked) == 13 and float(out.loss) == pytest.approx(-sum(picked) / 13, rel=1e-5)


def test_text_alone_is_the_language_model() -> None:
    model, ids = captioner(), torch.randint(48, (2, 7))
    torch.testing.assert_close(model(ids).logits, model.language_model(ids).logits)


@pytest.mark.parametrize(
    "spec",
    [
        "lora(r=2)",
        "context-peft(r=2)",
        "ln-tuning",
        "ssf",
        "full",
        "probe(targets=projector)",
        "prefix-tuning(length=2)",
        "prompt-tuning(length=3)",
    ],
)
def test_adapters_leave_the_tower_alone_and_train_the_projector(spec: str) -> None:
    model, given = captioner(), batch()
    tuned = veneer.attach(model, spec)
    plain = model(**given).logits
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and not any("vision_tower" in n for n in trained) and not any(s.module.startswith("vision_tower") for s in sites(model))
    assert sum("projector" in n for n in trained) == 2 and (spec == "full" or not any("lm_head" in n for n in trained))
    optimiser = torch.optim.SGD(tuned.param_groups(lr=0.5))
    model.train()(**given).loss.backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
    optimiser.step()
    assert model.eval()(**given).logits.shape == plain.shape == (3, 10, 48)
    assert (model(**given).logits - plain).abs().max() > 1e-4
    assert len([n for n in trained if "projector" not in n]) > 0 or spec.startswith("probe")


def test_picture_tokens_and_text_tokens_have_parameters_of_their_own() -> None:
    model, given = captioner(), batch()
    tuned = veneer.attach(model, "context-peft(r=2)", head=False)
    B = [p for n, p in model.named_parameters() if n.endswith(".B")] or [p for p in tuned.parameters() if p.shape[-1] == 2]
    with torch.no_grad():
        for p in B:
            p.normal_()
    ids = given["input_ids"][:, :1]
    said = model(ids).logits
    with torch.no_grad():
        for p in B:
            p[1].zero_()  # the picture's
    torch.testing.assert_close(model(ids).logits, said)  # text alone does not use them
    model.train()(**given).loss.backward()
    assert all(p.grad is not None and p.grad[0].any() and p.grad[1].any() for p in B[:1])
    assert contexts.NOW.numbers is None


def test_checkpoints_are_told_the_contexts_again() -> None:
    given, grads = batch(), []
    model = captioner(dropout=0.0)
    tuned = veneer.attach(model, "context-peft(r=2)")
    with torch.no_grad():
        for i, p in enumerate(tuned.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(**given).loss.backward()
        grads.append([p.grad.clone() for p in tuned.parameters()])  # type: ignore[union-attr]
        model.zero_grad()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", ["context-peft(r=2)", "lora(r=2)", "prefix-tuning(length=2)"])
def test_written_captions_are_the_likeliest_words_one_by_one(spec: str) -> None:
    model, given = captioner(), batch(2)
    tuned = veneer.attach(model, spec)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.3 * torch.randn_like(p))
    prompt, pixels = given["input_ids"][:, :5], given["pixel_values"]
    new = model.generate(
        prompt, pixels, torch.ones_like(prompt), max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    ids = prompt
    for k in range(4):
        logits = model(ids, pixels).logits[:, -1]
        assert torch.equal(logits.argmax(-1), new[:, k])
        ids = torch.cat([ids, new[:, k : k + 1]], 1)


def test_saved_and_read_again(tmp_path: Path) -> None:
    model, given = captioner(9, dropout=0.2), batch(image_tokens=9)
    model.save_pretrained(tmp_path)
    again = ImageTokensForCaptioning.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**given).logits, model(**given).logits)
    assert again.config.image_tokens == 9 and again.dropout.p == 0.2


def test_pictures_and_places_must_fit() -> None:
    model, given = captioner(), batch(image_tokens=3)
    with pytest.raises(BadValue, match="a picture and 4 places of the token 48"):
        model(**given)
    with pytest.raises(BadValue, match="a picture and 4 places"):
        model(batch()["input_ids"])
    with pytest.raises(BadValue, match="too few for 4 image tokens"):
        model(batch()["input_ids"], torch.randn(3, 3, 14, 28))


# -- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower with its processor and a language model with a tokenizer of fifteen words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    spread(CLIPVisionModel(CLIPVisionConfig(**SMALL))).save_pretrained(root / "tower")  # type: ignore[operator]
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(root / "tower")
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"▁{w}" for w in WORDS)])}, unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = dict(pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]")
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(root / "language")
    spread(llama(2, 16, eos_token_id=2)).save_pretrained(root / "language")  # type: ignore[operator]
    return root


def shown(folder: Path, count: int = 60, name: str = "captions.csv") -> str:
    """Dark and light pictures with captions that tell so."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,caption,label"]
    for i in range(count):
        shade, kind = (("dark", 20), ("light", 230))[i % 2], ("square", "circle")[i // 2 % 2]
        Image.new("L", (30, 30), shade[1] + i % 7).save(folder / f"{i}.png")
        lines.append(f"{i}.png,a {shade[0]} {kind} .,{shade[0]}")
    (folder / name).write_text("\n".join(lines))
    return str(folder)


def settings(models: Path, data: str, out: Path, **changes: Any) -> Recipe:
    given = dict(task="image-captioning", model=str(models / "language"),
                  vision=str(models / "tower"), data=data, out=str(out), method="context-peft(r=4)",
                 steps=40, batch_size=16, lr=3e-2, image_tokens=4, image_size=28, max_new_tokens=6, eval_every=40)  # fmt: skip
    return Recipe.of({**given, **changes})


@pytest.fixture(scope="module")
def run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("captions")
    data = shown(root / "data")
    train(settings(models, data, root / "run"), progress=False)
    return root / "run", data


def test_a_run_learns_to_say_what_it_sees(run: tuple[Path, str]) -> None:
    folder, data = run
    record = json.loads((folder / "run.json").read_text())
    found, base = record["outcome"]["metrics"], record["outcome"]["base_metrics"]
    assert record["task"]["name"] == "image-captioning" and set(found) == {"loss", "perplexity", "bleu", "accuracy"}
    assert (
        found["loss"]["high"] < base["loss"]["low"] and found["accuracy"]["value"] > 0.9 and found["bleu"]["value"] > base["bleu"]["value"]
    )
    said = predict(folder, [f"{data}/0.png", f"{data}/1.png"])
    assert names(said[0]["caption"], "dark") and names(said[1]["caption"], "light")
    again = evaluate(folder, f"{data}/captions.csv")
    assert again["accuracy"].n == 60 and again["accuracy"].value > 0.9


def test_the_same_run_by_json_lines_with_plain_lora(models: Path, tmp_path: Path) -> None:
    data = Path(shown(tmp_path / "d"))
    rows = [dict(zip(("image", "caption"), line.split(","))) for line in (data / "captions.csv").read_text().split("\n")[1:]]
    (data / "captions.csv").unlink()
    (data / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = settings(models, str(data / "list.jsonl"), tmp_path / "r", method="lora(r=4)", steps=2, checkpointing=True)
    outcome = train(recipe, progress=False)
    assert set(outcome.metrics) == {"loss", "perplexity", "bleu"} and outcome.main == "loss"


def test_merged_with_one_context_and_read_again(models: Path, run: tuple[Path, str], tmp_path: Path) -> None:
    recipe = settings(models, run[1], tmp_path / "r", method="lora(r=4)", steps=3, base=False)
    before = train(recipe, progress=False)
    assert main(["merge", str(tmp_path / "r"), "--out", str(tmp_path / "merged")]) == 0
    assert main(["anatomy", str(tmp_path / "merged")]) == 0
    again = settings(models, run[1], tmp_path / "s", model=str(tmp_path / "merged"), method="lora(r=4)", steps=1, lr=1e-9)
    assert train(again, progress=False).base_metrics["loss"].value == pytest.approx(before.metrics["loss"].value, rel=1e-3)


def test_two_contexts_cannot_be_merged(run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(run[0]), "--out", str(tmp_path / "merged")]) == 2
    assert "every context has a weight of its own" in capsys.readouterr().err


# -- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "options", "error", "words"),
    [
        ("99.png,a dark square .,dark", {}, BadFile, ["captions.csv, line 62", "99.png"]),
        (",a dark square .,dark", {}, BadFile, ["line 62", "'image' is empty"]),
        ("captions.csv,a dark square .,dark", {}, BadFile, ["line 62"]),
        ("0.png,,dark", {}, BadValue, ["line 62", "'caption' is empty"]),
        ("0.png,a,b", {"image_tokens": 15}, BadValue, ["image_tokens=15", "9 or 16"]),
        ("0.png,a,b", {"text": "title"}, BadValue, ["'title'", "--text"]),
        ("0.png,a,b", {"vision": "dinov2-smal"}, VeneerError, ["'dinov2-small'"]),
    ],
)
def test_mistakes(line: str, options: dict[str, Any], error: type[VeneerError], words: list[str], models: Path, tmp_path: Path) -> None:
    data = Path(shown(tmp_path / "d"))
    with (data / "captions.csv").open("a") as file:
        file.write("\n" + line)
    with pytest.raises(error) as caught:
        own = {"vision": str(models / "tower"), **{k: v for k, v in options.items() if k != "text"}}
        prepare(str(data), with_own("image-captioning", own), Options(text=options.get("text")))
    assert all(word in str(caught.value) for word in words)


def test_long_captions_are_refused_not_cut(models: Path, tmp_path: Path) -> None:
    seeing = with_own("image-captioning", {"vision": str(models / "tower"), "image_tokens": 4})
    task, _ = prepare(shown(tmp_path / "d"), seeing, Options(max_length=200))
    _, reader = task.load(str(models / "language"))
    row = dict(task.splits.train.rows[0])
    assert len(task.encode([{**row, "caption": " ".join("a" * 58)}], reader)[0]["input_ids"]) == 64  # all positions there are
    with pytest.raises(BadValue, match=r"'a a a .*has 60 tokens with its end, and at most 59 fit: that is all the language model can read"):
        task.encode([{**row, "caption": " ".join("a" * 59)}], reader)
    short, _ = prepare(shown(tmp_path / "d"), seeing, Options(max_length=5))
    with pytest.raises(BadValue, match=r"at most 5 fit: give more with --max-length"):
        short.encode([{**row, "caption": "a a a a a"}], reader)


def test_a_table_without_captions(tmp_path: Path) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "0.png")
    (tmp_path / "d.csv").write_text("image,label\n" + "0.png,a\n" * 20)
    with pytest.raises(BadValue, match="no column is called caption; there are label, image"):
        prepare(str(tmp_path / "d.csv"), "image-captioning")


# -- captions by grammar ----------------------------------------------------------------------------------------


def test_facts_are_measured_in_the_picture() -> None:
    images = np.zeros((3, 28, 28), np.uint8)
    images[0, 2:26, 10:16] = 100
    images[1, 14:20, 2:26] = 250
    images[2, 4:24, 4:24] = 160
    images[2, 4:14] //= 3
    assert tones(images) == ["dark", "light", "dark"] and tones(images[1:] // 250 * 180)[0] == "grey"
    assert shapes(images) == ["much taller than wide", "much wider than tall", "as wide as tall"]
    assert lights(images) == ["evenly lit", "brighter at the bottom", "brighter at the bottom"]
    assert lights(images[:, ::-1])[1:] == ["brighter at the top"] * 2
    assert shapes(images.transpose(0, 2, 1)[:2]) == ["much wider than tall", "much taller than wide"]
    rows = captioned(images, np.array([3, 9, 0]))
    assert [row["label"] for row in rows] == ["dress", "ankle boot", "T-shirt"]
    for row, tone, shape in zip(rows, tones(images), shapes(images)):
        assert all(names(row["caption"], word) for word in (row["label"], tone, shape))
    assert [row["caption"] for row in captioned(images[1:], np.array([9, 0]), first=1)] == [row["caption"] for row in rows[1:]]


def test_a_class_counts_as_a_word_of_its_own() -> None:
    assert names("A dark T-shirt, evenly lit.", "T-shirt") and not names("A dark T-shirt, evenly lit.", "shirt")
    assert names("Wider than tall: a grey Ankle Boot.", "ankle boot") and not names("a bagpipe", "bag")
    assert len({a for a in FASHION_CLASSES for b in FASHION_CLASSES if names(a, b)}) == len(FASHION_CLASSES)
