"""Diffusion pipelines: the loss is the pipeline's own, adapters lower it, files are diffusers' own, and mistakes are told early."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

import veneer  # noqa: E402
from veneer.errors import BadFile, BadValue, Unsupported, VeneerError  # noqa: E402
from veneer.models.diffusion import PLACES, Diffusion, Prior  # noqa: E402
from veneer.models.noising import Noising  # noqa: E402
from veneer.models.pipelines import check_size, default_size, granule, load_pipeline  # noqa: E402
from veneer.models.sampling import pixels, sample  # noqa: E402
from veneer.models.text_conditions import context, encode, family_of  # noqa: E402
from veneer.models.tiny_diffusion import KINDS, tiny_pipeline  # noqa: E402
from veneer.study.contact_sheet import contact_sheet  # noqa: E402
from veneer.tasks.data import read  # noqa: E402
from veneer.tasks.described_fashion import described  # noqa: E402
from veneer.tasks.described_pictures import listed, prompt_of  # noqa: E402
from veneer.tasks.image_classification import open_picture  # noqa: E402
from veneer.tasks.latent_rows import LatentRows, stacked, text_bytes  # noqa: E402
from veneer.tasks.task import Options, prepare, with_own  # noqa: E402
from veneer.tools.diffusers_lora import read_back, save_diffusers  # noqa: E402
from veneer.train import Outcome, Recipe, train  # noqa: E402

SIZE = 16
COLOURS = ("red", "green", "blue")


def model_of(kind: str = "sd", text_encoders: bool = False, **sizes: Any) -> Diffusion:
    pipeline = tiny_pipeline(kind, width=16, **sizes)
    pipeline.set_progress_bar_config(disable=True)
    return Diffusion(pipeline, SIZE, text_encoders).eval()


def batch_of(model: Diffusion, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Rows of coloured squares with their names."""
    pictures = [(Image.new("RGB", (20, 18), COLOURS[i % 3]), f"a {COLOURS[i % 3]} square") for i in range(rows)]
    made = LatentRows(pictures, lambda row: row, model)
    return stacked([made[i] for i in range(rows)])


def outfits(folder: Path, rows: int = 24, **changes: Any) -> Path:
    """A folder of drawn outfits in the data form: pictures, and metadata.jsonl with image, description, attributes."""
    (folder / "images").mkdir(parents=True)
    chance, lines = random.Random(0), []
    for i in range(rows):
        colour = chance.choice(COLOURS)
        picture = Image.new("RGB", (20, 18), "white")
        picture.paste(colour, (4, 3, 12 + i % 5, 16))
        picture.putpixel((0, 0), (i, 0, 0))
        picture.save(folder / "images" / f"{i:02}.png")
        row = {"image": f"images/{i:02}.png", "description": f"A {colour} dress.", "attributes": {"color": colour, "row": i}}
        lines.append(json.dumps({**row, **changes.get(str(i), {})}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a prior, to the end."""
    data, folder = outfits(tmp_path_factory.mktemp("data") / "outfits"), tmp_path_factory.mktemp("runs") / "run"
    settings = {"model": str(tiny), "data": str(data), "task": "text-to-image", "method": "lora(r=4, targets='attn.* cross.* mlp.*')"}
    settings |= {
        "out": str(folder),
        "steps": 15,
        "lr": 1e-2,
        "batch_size": 4,
        "sample_steps": 2,
        "prior_prompt": "a dress",
        "prior_pictures": 3,
    }
    train(Recipe.of({**settings, "device": "cpu"}), progress=False, say=lambda line: None)
    return folder


# -- what is predicted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_clean_latents_follow_from_what_is_predicted(prediction: str) -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if prediction == "flow" else DDIMScheduler(prediction_type=prediction)
    noising = Noising(scheduler)
    x, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    places = torch.rand(5)
    noised, times, target = noising(x, noise, places)
    a = torch.ones(1) if prediction == "flow" else scheduler.alphas_cumprod[times].double().sqrt().view(-1, 1, 1, 1)
    sigma = (times.double() / 1000).view(-1, 1, 1, 1) if prediction == "flow" else (1 - a**2).sqrt()
    clean = {
        "epsilon": lambda: (noised - sigma * target) / a,
        "v_prediction": lambda: a * noised - sigma * target,
        "sample": lambda: target,
        "flow": lambda: noised - sigma * target,
    }[prediction]()
    torch.testing.assert_close(clean, x, atol=1e-4, rtol=1e-4)
    drawn = noising.draw(1000, "cpu")
    assert drawn.min() > 0 and drawn.max() < 1 and 0.4 < drawn.mean() < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_asked_as_the_pipeline_asks_it(kind: str) -> None:
    """One sampling step of the pipeline, without guidance: the same prompt, time and latents give the same prediction here."""
    model = model_of(kind)
    seen: list[Any] = []
    model.net.register_forward_hook(lambda net, args, kwargs, out: seen.append((args, kwargs, out[0])), with_kwargs=True)
    x = torch.randn(1, 4, SIZE // 2, SIZE // 2)
    given = {"latents": x}
    if kind == "flux":
        given = {"latents": model.pipeline._pack_latents(x, 1, 4, SIZE // 2, SIZE // 2)}
    if kind == "pixart":
        given["use_resolution_binning"] = False
    model.pipeline("a red square", num_inference_steps=1, guidance_scale=1.0, height=SIZE, width=SIZE, output_type="latent", **given)
    args, kwargs, expected = seen[0]
    time = kwargs["timestep"] if "timestep" in kwargs else args[1]
    time = time * 1000 if kind == "flux" else time
    if kind == "flux":
        expected = model.pipeline._unpack_latents(expected, SIZE, SIZE, model.pipeline.vae_scale_factor)
    with torch.no_grad():
        found = family_of(model.pipeline).denoise(model.net, x, time.reshape(1), model.conditions(["a red square"]), SIZE)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert granule(model.pipeline) == (2 if kind in ("sd", "sdxl") else 4)


def test_evaluation_is_fixed_by_the_row_alone() -> None:
    model = model_of()
    batch = batch_of(model, 6)
    with torch.no_grad():
        whole = model(**batch)
        torch.manual_seed(7)
        parts = [model(**{k: v[i : i + 2] for k, v in batch.items()}).logits for i in (4, 0, 2)]
    assert whole.logits.shape == (6, PLACES)
    torch.testing.assert_close(torch.cat([parts[1], parts[2], parts[0]]), whole.logits)
    assert float(whole.loss) == pytest.approx(float(whole.logits.mean()))
    other = dict(batch, labels=batch["labels"] + 1)
    with torch.no_grad():
        assert not torch.allclose(model(**other).logits, whole.logits)


def test_the_same_latents_again_and_decoded() -> None:
    """Latents are scaled and shifted as the pipeline undoes it."""
    model = model_of("sd3")
    picture = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    vae, config = model.pipeline.vae, model.pipeline.vae.config
    with torch.no_grad():
        direct = vae.encode(picture).latent_dist
    mean, std = model.latents(picture)[0]
    torch.testing.assert_close(mean / config.scaling_factor + config.shift_factor, direct.mean[0])
    torch.testing.assert_close(std / config.scaling_factor, direct.std[0])


# -- training ---------------------------------------------------------------------------------------------------


LEARNERS = [("sd", m) for m in ("lora(r=4)", "wara(r=4)", "tlora(R_res=2)", "nera(r=4)", "ssf", "lora(r=2, targets='conv mlp.*')")]


@pytest.mark.parametrize(("kind", "method"), [*LEARNERS, ("sd3", "tlora(R_res=2)"), ("sd3", "nera(r=4)"), ("flux", "wara(r=4)")])
def test_adapters_of_any_kind_lower_the_loss(method: str, kind: str) -> None:
    model = model_of(kind)
    batch = batch_of(model, 2)
    tuned = veneer.attach(model, method)
    optimiser = torch.optim.AdamW(tuned.param_groups(lr=0.02))
    with tuned.disabled(), torch.no_grad():
        before = float(model(**batch).loss)
    model.train()
    for _ in range(10):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        assert float(model(**batch).loss) < before - 1e-3
        with tuned.disabled():
            assert float(model(**batch).loss) == before
    assert all(site.name.startswith(model.wraps) for site in tuned.sites())


def test_text_encoders_train_when_asked() -> None:
    model = model_of(text_encoders=True)
    tuned = veneer.attach(model, "lora(r=2)")
    assert {site.name.split(".")[0] for site in tuned.sites()} == {"unet", "text_encoder"}
    batch = batch_of(model)
    assert batch["prompt"].dtype == torch.uint8 and "text" not in batch
    model.train()
    model(**batch).loss.backward()
    moved = {name.split(".")[0] for name, p in tuned.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"unet", "text_encoder"}
    frozen = model_of()
    with torch.no_grad():
        torch.testing.assert_close(frozen(**batch_of(frozen)).logits, model.eval()(**batch).logits)


def test_the_prior_counts_with_its_weight() -> None:
    model = model_of()
    batch, other = batch_of(model, 2), batch_of(model, 3)
    latents = other.pop("latents")
    other.pop("labels")
    model.train()

    def loss(weight: float | None) -> float:
        model.prior = None if weight is None else Prior(latents, other, weight)
        torch.manual_seed(3)
        return model(**batch).loss.item()

    none, half, whole = loss(0.0), loss(0.5), loss(1.0)
    assert whole - none == pytest.approx(2 * (half - none), rel=1e-4) and whole > none
    assert model(**batch).logits.shape == (2, 1)


def test_a_run_from_data_to_pictures(finished: Path) -> None:
    outcome = Outcome.load(finished)
    assert outcome.metrics["loss"].value < outcome.base_metrics["loss"].value
    assert outcome.metrics["loss"].n == 2 and outcome.main == "loss"
    told = [json.loads(line) for line in (finished / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in told] == [0, 1] and all(row["method"].startswith("lora") for row in told)
    for row in told:
        shown = [Image.open(finished / "samples" / row[kind]) for kind in ("reference", "before", "after")]
        assert all(picture.size == (SIZE, SIZE) for picture in shown) and shown[1].tobytes() != shown[2].tobytes()
    assert Image.open(finished / "contact-sheet.png").width > 3 * 96
    assert len(list((finished / "prior").glob("*.png"))) == 3


def test_pictures_before_are_the_bases_own(finished: Path, tiny: Path) -> None:
    pipeline = load_pipeline(str(tiny))
    told = json.loads((finished / "samples" / "samples.jsonl").read_text().splitlines()[0])
    made = sample(Diffusion(pipeline, SIZE), [told["text"]], told["seed"], 2)[0]
    kept = Image.open(finished / "samples" / told["before"])
    assert max(abs(a - b) for a, b in zip(made.tobytes(), kept.tobytes())) <= 1


def test_the_same_recipe_gives_the_same_run(tiny: Path, tmp_path: Path) -> None:
    data = outfits(tmp_path / "data", 12)
    settings = {"model": str(tiny), "data": str(data), "task": "text-to-image", "steps": 2, "sample_steps": 1, "device": "cpu"}
    runs = [train(Recipe.of({**settings, "out": str(tmp_path / name)}), progress=False, say=lambda line: None) for name in "ab"]
    assert runs[0].curve == runs[1].curve and runs[0].metrics == runs[1].metrics


def test_predicting_evaluating_and_exporting_a_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from veneer.cli.main import main

    assert main(["predict", str(finished), "a red dress", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    assert answer["seed"] == 0 and Image.open(answer["image"]).size == (SIZE, SIZE)
    assert main(["evaluate", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]["loss"]["value"]
    assert found == pytest.approx(Outcome.load(finished).metrics["loss"].value, rel=1e-4)
    for form in ("diffusers", "merged"):
        assert main(["export", str(finished), "--to", form, "--out", str(tmp_path / form), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["difference"] < 1e-4
    assert [p.name for p in (tmp_path / "diffusers").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert load_pipeline(str(tmp_path / "merged")).unet is not None


# -- diffusers' LoRA file -----------------------------------------------------------------------------------------


def moved(model: Diffusion, method: str) -> Any:
    tuned = veneer.attach(model, method)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tuned


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("sd", "lora(r=3, alpha=6, targets='attn.* cross.* mlp.* conv other')"),
        ("sd", "lora(r=2) + lora(r=3, targets='attn.q')"),
        ("sd", "wara(r=2, wavelet='db2')"),
        ("sdxl", "wara(form='tiny', r=4)"),
        ("sd3", "lora(r=2, targets='attn.*')"),
        ("flux", "lora(r=2, targets='attn.* mlp.*')"),
    ],
)
def test_diffusers_reads_the_file_to_the_same_output(kind: str, method: str, tmp_path: Path) -> None:
    model, again = model_of(kind), model_of(kind)
    inputs = model.example_inputs()
    tuned = moved(model, method)
    save_diffusers(tuned, tmp_path)
    with torch.no_grad():
        plain, expected = again.predictions(**inputs), model.predictions(**inputs)
        found = read_back(again, tmp_path).predictions(**inputs)  # type: ignore[operator]
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_text_encoders_are_in_the_file(tmp_path: Path) -> None:
    model, again = model_of(text_encoders=True), model_of(text_encoders=True)
    inputs = model.example_inputs()
    save_diffusers(moved(model, "lora(r=2)"), tmp_path)
    with torch.no_grad():
        found = read_back(again, tmp_path).predictions(**inputs)  # type: ignore[operator]
        torch.testing.assert_close(found, model.predictions(**inputs), atol=1e-4, rtol=1e-3)


def test_a_bare_network_writes_the_same_file(tmp_path: Path) -> None:
    model = model_of()
    tuned = moved(model, "lora(r=2)")
    save_diffusers(tuned, tmp_path / "whole")
    net = model_of().net
    other = veneer.attach(net, "lora(r=2)")
    with torch.no_grad():
        for a, b in zip(other.parameters(), tuned.parameters()):
            a.copy_(b)
    save_diffusers(other, tmp_path / "bare")
    a, b = ((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("whole", "bare"))
    assert a == b


def test_what_is_not_of_low_rank_is_refused_or_approximated(tmp_path: Path) -> None:
    model, again = model_of(), model_of()
    tuned = moved(model, "tlora(R_res=2)")
    with pytest.raises(Unsupported, match=r"TLoRA at unet\.\S+ is not of low rank.*--as-lora --rank"):
        save_diffusers(tuned, tmp_path)
    save_diffusers(tuned, tmp_path, rank=32)
    inputs = model.example_inputs()
    with torch.no_grad():
        found = read_back(again, tmp_path).predictions(**inputs)  # type: ignore[operator]
        torch.testing.assert_close(found, model.predictions(**inputs), atol=1e-3, rtol=1e-2)
    with pytest.raises(Unsupported, match=r"NeRA at .* nonlinear"):
        save_diffusers(moved(model_of(), "nera(r=2)"), tmp_path)
    with pytest.raises(Unsupported, match="no part of a pipeline"):
        save_diffusers(veneer.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora(r=2, targets='0')"), tmp_path)
    pixart = model_of("pixart")
    save_diffusers(moved(pixart, "lora(r=2)"), tmp_path)
    with pytest.raises(Unsupported, match="reads no LoRA files"):
        read_back(pixart, tmp_path)


@pytest.mark.parametrize("method", ["ssf", "lora(r=2, targets='conv other')", "wara(r=2)"])
def test_merged_networks_give_the_same(method: str) -> None:
    """Also where a norm's channels come first, as in the residual blocks of a UNet."""
    model = model_of()
    inputs = model.example_inputs()
    tuned = moved(model, method)
    with torch.no_grad():
        expected = model.predictions(**inputs)
        tuned.merge()
        torch.testing.assert_close(model.predictions(**inputs), expected, atol=1e-4, rtol=1e-3)


def test_a_runs_adapter_goes_into_a_pipeline(finished: Path, tiny: Path, recwarn: pytest.WarningsRecorder) -> None:
    pipeline = load_pipeline(str(tiny))
    veneer.load(pipeline.unet, finished / "adapter")
    assert not [w for w in recwarn if "another shape of base" in str(w.message)]
    told = json.loads((finished / "samples" / "samples.jsonl").read_text().splitlines()[0])
    made = sample(Diffusion(pipeline, SIZE), [told["text"]], told["seed"], 2)[0]
    kept = Image.open(finished / "samples" / told["after"])
    assert max(abs(a - b) for a, b in zip(made.tobytes(), kept.tobytes())) <= 1


# -- data ---------------------------------------------------------------------------------------------------------


def test_roles_of_the_text_stream_and_of_double_attention() -> None:
    from diffusers import SD3Transformer2DModel

    sizes = dict(sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16)
    net = SD3Transformer2DModel(**sizes, caption_projection_dim=16, pooled_projection_dim=16, dual_attention_layers=(0,))
    roles = {
        s.name.removeprefix("transformer_blocks.0."): s.role for s in veneer.anatomy.sites(net) if s.name.startswith("transformer_blocks.0")
    }
    assert [roles[f"attn.add_{x}_proj"] for x in "qkv"] == ["attn.q", "attn.k", "attn.v"]
    assert roles["attn.to_add_out"] == roles["attn.to_out.0"] == roles["attn2.to_out.0"] == "attn.o"
    assert not any(role.startswith("cross") for role in roles.values())


def test_prompts_from_descriptions_attributes_and_templates(tmp_path: Path) -> None:
    row = {"image": "x.png", "description": "A red dress.", "attributes": '{"color": "red", "fit": ["slim", "short"], "belt": null}'}
    assert prompt_of(row, "description", "attributes", None) == "A red dress, color red, fit slim, short"
    assert prompt_of(row, "description", "attributes", "a sketch of {description} ({attributes})").startswith(
        "a sketch of A red dress. (color red"
    )
    assert prompt_of({}, None, None, "a photo of sks dog") == "a photo of sks dog"
    assert listed("{not json") == "{not json" and listed(None) == ""
    data = outfits(tmp_path / "d", 12)
    for form, text in (("csv", "img_paths,Input Prompt,split\n"), ("jsonl", "")):
        (data / "metadata.jsonl").unlink(missing_ok=True)
        splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
        rows = [(f"images/{i:02}.png", f"outfit {i}", split) for i, split in enumerate(splits)]
        lines = [",".join(r) for r in rows] if text else [json.dumps(dict(zip(("file_name", "text", "split"), r))) for r in rows]
        (data / f"metadata.{form}").write_text(text + "\n".join(lines))
        task, _ = prepare(str(data), "text-to-image")
        assert [len(table) for _, table in task.splits.items()] == [8, 2, 2]
        assert task.prompt(task.splits.test.rows[0]) == "outfit 10"  # type: ignore[attr-defined]
        (data / f"metadata.{form}").unlink()


def test_one_subject_needs_pictures_and_a_template_only(tmp_path: Path) -> None:
    folder = outfits(tmp_path / "d", 12) / "images"
    task, _ = prepare(str(folder), "text-to-image(template='a photo of sks dress')")
    assert {task.prompt(row) for row in task.splits.train.rows} == {"a photo of sks dress"}  # type: ignore[attr-defined]


def test_pictures_are_cut_to_squares_and_transparent_parts_are_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (10, 0, 30, 20))
    picture.save(tmp_path / "x.png")
    assert open_picture(tmp_path / "x.png", under="white").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(tmp_path / "x.png").getpixel((0, 0)) == (255, 0, 0)
    found = pixels(open_picture(tmp_path / "x.png", under="white"), 10)
    assert found.shape == (3, 10, 10) and found[2].min() > 0.9 and found[0].max() < -0.5


def test_what_is_measured_on_a_garment() -> None:
    import numpy as np

    picture = np.zeros((28, 28), np.uint8)
    picture[4:24, 10:16] = 200
    row = described(picture, "dress")
    assert row["description"] == "a dress" and row["attributes"] == {"type": "dress", "shade": "light", "shape": "narrow"}
    assert (
        described(picture.T // 4, "bag")["attributes"]["shape"] == "wide" and described(picture * 0, "bag")["attributes"]["shade"] == "dark"
    )


def test_a_contact_sheet_shows_every_picture() -> None:
    one = Image.new("RGB", (8, 8), "red")
    sheet = contact_sheet([("a → prompt " * 30, [one, None]), ("b", [one, one])], ("x", "y"))
    red = sum(count for count, colour in sheet.getcolors(1 << 20) if colour == (255, 0, 0))
    assert red == 3 * 96 * 96


def test_long_prompts_are_told_and_cut(tiny: Path, tmp_path: Path) -> None:
    data = outfits(tmp_path / "d", 12, **{"3": {"description": "zebra " * 40}})
    told: list[str] = []
    settings = {"model": str(tiny), "data": str(data), "task": "text-to-image", "steps": 1, "sample_steps": 1, "out": str(tmp_path / "run")}
    train(Recipe.of({**settings, "device": "cpu"}), progress=False, say=told.append)
    assert any("1 of 12 prompts are longer than the 77 tokens" in line for line in told)


# -- mistakes -----------------------------------------------------------------------------------------------------


def spoilt(folder: Path, what: str) -> dict[str, Any]:
    """A folder of outfits with one mistake in it, and the options to read it with."""
    changes: dict[str, Any] = {"empty": {"5": {"description": " "}}, "missing": {"5": {"image": "images/99.png"}}}.get(what, {})
    outfits(folder, 12, **changes)
    if what == "broken":
        file = folder / "images" / "05.png"
        file.write_bytes(file.read_bytes()[:40])
    if what == "text file":
        (folder / "images" / "05.png").write_text("no picture")
    if what == "twice":
        (folder / "images" / "06.png").write_bytes((folder / "images" / "05.png").read_bytes())
    if what in ("no description", "template"):
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"image": row["image"], "colour": "red"}) for row in rows))
    if what == "split":
        (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace('"row": 5', '"row": 5}, "split": {"x": 1'))
    return {"template": "a {color} dress"} if what == "template" else {}


MISTAKES = {
    "empty": (BadValue, r"metadata.jsonl, line 6 .*no description; fill the column 'description'"),
    "missing": (BadFile, r"metadata.jsonl, line 6 .*no picture .*99.png"),
    "broken": (BadFile, r"line 6 .*05.png cannot be read as a picture"),
    "text file": (BadFile, r"line 6 .*05.png cannot be read as a picture"),
    "twice": (BadValue, r"is the same picture as .*Leave one of them out"),
    "no description": (BadValue, r"no descriptions; there are .*template="),
    "template": (BadValue, r"no column 'color'.*Nearest: 'colour'"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_in_the_data(what: str, tmp_path: Path) -> None:
    options = spoilt(tmp_path / "d", what)
    kind, words = MISTAKES[what]
    with pytest.raises(kind, match=f"(?s){words}"):
        prepare(str(tmp_path / "d"), with_own("text-to-image", options))


def test_a_wrong_split_is_told_with_its_line(tmp_path: Path) -> None:
    outfits(tmp_path / "d", 12)
    (tmp_path / "d" / "metadata.jsonl").write_text('{"image": "images/01.png", "text": "x", "split": "trian"}')
    with pytest.raises(BadFile, match="line 1: split='trian'"):
        read(str(tmp_path / "d"))


def loaded(folder: Path, **options: Any) -> Any:
    from veneer.tasks.text_to_image import TextToImage

    return TextToImage(Options(**options)).load(str(folder))


def test_pipelines_that_cannot_be_taught_are_refused(tiny: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "plain")
    with pytest.raises(Unsupported, match="DDPMPipeline has no text encoder"):
        loaded(tmp_path / "plain")
    with pytest.raises(BadValue, match=r"image_size=17 is no multiple of 2.*choose 16"):
        loaded(tiny, image_size=17)
    with pytest.raises(BadValue, match="max_length=100 is more than the 77 tokens"):
        loaded(tiny, max_length=100)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(BadFile, match="model_index"):
        loaded(tmp_path / "other")
    with pytest.raises(Unsupported, match="prediction_type='flow_prediction'"):
        Noising(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    flow = tiny_pipeline("flux")
    with pytest.raises(BadValue, match="no multiple of 4"):
        check_size(flow, 18)
    assert context(flow, None)[1] == 512 and context(flow, 64)[1] == 64 and encode(flow, ["a"], 64)["text"].shape[1] == 64
    assert default_size(flow) == 256


@pytest.mark.parametrize("wrong", [lambda m: veneer.attach(m, "prompt-tuning"), lambda m: veneer.attach(m, "lora(targets='head')")])
def test_methods_that_find_no_place_are_refused(wrong: Callable[[Diffusion], Any]) -> None:
    with pytest.raises(VeneerError):
        wrong(model_of())


def test_bytes_come_back_as_text() -> None:
    model = model_of(text_encoders=True)
    texts = ["ein größeres Kleid", "a"]
    batch = stacked([{"prompt": text_bytes(text)} for text in texts])
    told, plain = model._told(batch["prompt"], {}), model.conditions(texts)
    torch.testing.assert_close(told["text"], plain["text"])
