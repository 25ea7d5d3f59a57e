"""ExPLoRA and what pictures teach without labels: losses against the authors', counts, a teacher that follows, two stages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_golden import Case, DenseCall, site
from torch import Tensor
from torch.nn import functional as F

import veneer
from veneer import anatomy, registry
from veneer.cli.main import main
from veneer.errors import BadValue
from veneer.maths import self_supervision as losses
from veneer.maths.crops import crops, hidden_blocks
from veneer.models import self_supervised as models
from veneer.tasks.self_supervised_images import neighbours

WIDTH = 32


# -- losses -----------------------------------------------------------------------------------------------------


def test_lora_of_a_fused_layer_leaves_keys_alone() -> None:
    case = Case("explora", 0)
    method, p, W, x = registry.method("explora", r=3), case.params(), case["W"], case["x"]
    W_eff, y = W.clone(), F.linear(x, W, case["b"])
    for name, rows in (("q", slice(0, 12)), ("v", slice(24, 36))):
        own = {"A": p[f"A_{name}"], "B": p[f"B_{name}"]}
        at = site(f"attn.{name}", out=12, inside=12, rows=(rows.start, rows.stop), length=2)
        W_eff[rows] = method.weight(W[rows], own, at)
        y[..., rows] = method.forward(DenseCall(W[rows], case["b"][rows]), x, own, at)
    case.agree("W_eff", W_eff)
    case.agree("y", y)


@pytest.mark.parametrize("index", [1, 2])
def test_masked_autoencoding(index: int) -> None:
    case = Case("explora", index)
    kept, restore, mask = losses.masking(case["out.noise"], case.hyper["mask_ratio"])
    assert torch.equal(kept, case["out.ids_keep"]) and torch.equal(restore, case["out.ids_restore"])
    case.agree("mask", mask)
    target = losses.patches(case["x"], case.hyper["patch"])
    target = losses.standardised(target) if case.hyper["norm_pix_loss"] else target
    own = losses.patches(case["x"], case.hyper["patch"])
    torch.testing.assert_close(own if case["out.target"].allclose(own) else target, case["out.target"], rtol=0, atol=case.tolerance)
    case.agree("loss", losses.reconstruction(case["out.pred"], target, mask).mean().reshape(case["loss"].shape))


def test_class_tokens() -> None:
    case = Case("explora", 3)
    teacher = losses.sharpened(case["out.teacher_logits"], case["out.center"], case.hyper["tau_teacher"])
    case.agree("out.teacher_probs", teacher)
    across, local = losses.class_terms(teacher, case["out.student_global"], case["out.student_local"])
    case.agree("out.loss_global", across.reshape(case["out.loss_global"].shape))
    case.agree("out.loss_local", local.reshape(case["out.loss_local"].shape))
    case.agree("loss", (across + local).reshape(case["loss"].shape))
    case.agree("out.new_center", losses.moved_centre(case["out.center"], case["out.teacher_logits"]))


def test_sinkhorn() -> None:
    case = Case("explora", 4)
    case.agree("y", losses.sinkhorn(case["x"], case.hyper["temp"], case.hyper["iterations"]))


def test_hidden_patches() -> None:
    case = Case("explora", 5)
    teacher = losses.sharpened(case["out.teacher_patch"], case["out.center"], case.hyper["tau_teacher"])
    found = losses.patch_term(teacher, case["out.student_patch"], case["mask"].bool())
    case.agree("loss", found.reshape(case["loss"].shape))


def test_pictures_that_are_alike_are_driven_apart() -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    unit = F.normalize(x, dim=1)
    near = [min((float((a - b).norm()), j) for j, b in enumerate(unit) if j != i)[0] for i, a in enumerate(unit)]
    assert float(losses.spreading(x)) == pytest.approx(-sum(math.log(d + 1e-8) for d in near) / 6)
    x[1] = x[0] + 1e-3
    assert losses.spreading(x) > losses.spreading(x + torch.eye(6, 8) * 9)


# -- views ------------------------------------------------------------------------------------------------------


def test_crops_are_parts_of_the_picture(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.arange(32.0).expand(5, 3, 32, 32).contiguous()  # grows from left to right
    y = crops(x, 16, (0.05, 0.3), generator)
    assert y.shape == (5, 3, 16, 16)
    slopes = (y[..., 8, 1:] - y[..., 8, :-1]).mean((1, 2))
    assert (slopes.abs() < 2).all() and (slopes.abs() > 0.05).all()  # less than the whole picture's 2 a pixel: enlarged
    assert not torch.equal(crops(x, 16, (0.05, 0.3), generator), y)


def test_half_of_the_pictures_have_a_hidden_block(seed: int) -> None:
    masks = hidden_blocks(20, 7, 7, torch.Generator().manual_seed(seed))
    shares = masks.float().mean(1)
    assert int((shares > 0).sum()) == 10 and float(shares.max()) < 0.6 and float(shares[shares > 0].min()) >= 0.08
    for mask in masks[shares > 0].view(-1, 7, 7):
        rows, columns = mask.any(1), mask.any(0)
        assert int(mask.sum()) == int(rows.sum()) * int(columns.sum())


# -- counts -----------------------------------------------------------------------------------------------------


def test_counts_are_the_papers() -> None:
    from transformers import Dinov2Config, Dinov2Model

    def trained(spec: str, **sizes: Any) -> int:
        with torch.device("meta"):
            model = Dinov2Model(Dinov2Config(patch_size=14, **sizes))
        return veneer.attach(model, spec).summary().trained

    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    counts = {
        c["setting"].split(":")[0]: c["trainable"]
        for c in json.loads((Path(__file__).parent / "golden/explora.json").read_text())["counts"]
    }
    assert trained("explora", **large) == counts["D-[L]-r64"] == 18_723_840
    assert trained("explora(U=(1, 23, 24))", **large) == counts["blocks 1, L-1, L unfrozen + LoRA r64"]
    assert trained("lora(r=8)", **large) == counts["LoRA r=8 fine-tuning on Q,V"]
    assert trained("explora", hidden_size=768, num_hidden_layers=12, num_attention_heads=12) == 9_287_424


# -- models -----------------------------------------------------------------------------------------------------


def backbone(kind: str = "dinov2", side: int = 16) -> Any:
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    sizes: dict[str, Any] = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=side, patch_size=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vit":
            return ViTModel(ViTConfig(intermediate_size=64, hidden_dropout_prob=0.0, **sizes), add_pooling_layer=False)
        return Dinov2Model(Dinov2Config(mlp_ratio=2, **sizes))


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_every_method_trains_with_the_head_and_frozen_stays_frozen(kind: str, objective: str, seed: int) -> None:
    torch.manual_seed(seed)
    for spec in ("explora(r=4)", "lora(r=2)", "ssf + bottleneck-adapter", "vpt(length=2)"):
        made = (
            models.MaskedAutoencoderForSelfSupervision(backbone(kind), 0.5)
            if objective == "mae"
            else models.SelfDistillationForSelfSupervision(backbone(kind), 2, 16)
        )
        before = {name: p.detach().clone() for name, p in made.named_parameters()}
        x = torch.randn(6, 3, 16, 16)
        expected = made.backbone(pixel_values=x).last_hidden_state
        tuned = veneer.attach(made, spec)
        if spec != "vpt(length=2)":
            torch.testing.assert_close(made(x).last_hidden_state, expected, rtol=0, atol=1e-5)
        heads = {s.name for s in tuned.sites() if s.role == "head"}
        assert heads == {f"head.{name}" for name, m in made.head.named_modules() if isinstance(m, torch.nn.Linear)}
        made.train()
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
        first = []
        for _ in range(8):
            optimizer.zero_grad()
            torch.manual_seed(1)  # the same views: the loss must fall
            loss = made(x, torch.arange(6)).loss
            loss.backward()
            optimizer.step()
            first.append(loss.item())
        assert first[-1] < first[0], (spec, first)
        assert all(p.grad is not None for p in tuned.parameters())
        assert all(torch.equal(p, before[name]) for name, p in made.named_parameters() if name in before)
        made.eval()
        kept = made(x, torch.arange(6)).logits
        assert kept.shape == (6, 1 + 2 * WIDTH) and torch.equal(kept, made(x, torch.arange(6)).logits), "evaluation is the same each time"


def test_the_backbone_reads_kept_patches_alone() -> None:
    made = models.MaskedAutoencoderForSelfSupervision(backbone(), 0.75)
    lengths: list[int] = []
    made.backbone.encoder.layer[0].register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    x = torch.randn(2, 3, 16, 16)
    loss, each = made.objective(x, torch.Generator().manual_seed(0))
    assert lengths == [1 + 4] and each.shape == (2,)
    mask = losses.masking(torch.rand(2, 16, generator=torch.Generator().manual_seed(0)), 0.75)[2]
    removed = mask.bool().view(2, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(x)
    other = torch.where(removed, 2 * x + 1, x)  # standardised patches do not see it, and the backbone reads none of it
    torch.testing.assert_close(made.objective(other, torch.Generator().manual_seed(0))[0], loss, rtol=1e-4, atol=1e-4)


def test_the_teacher_is_the_running_mean_of_what_is_trained(seed: int) -> None:
    torch.manual_seed(seed)
    made = models.SelfDistillationForSelfSupervision(backbone(), 1, 16).train()
    logits = torch.randn(4, 16)
    balanced = models.SelfDistillationForSelfSupervision(backbone(), 1, 16, "sinkhorn").teacher
    torch.testing.assert_close(balanced.answers("class", logits, True), losses.sinkhorn(logits, 0.04))
    tuned = veneer.attach(made, "explora(r=2)")
    teacher = made.teacher
    tuned.adapters["default"].strategies.append(teacher)
    tuned.begin(10)
    names = dict(tuned.named_parameters())
    means = {name: p.detach().clone() for name, p in names.items()}
    x = torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for step in range(1, 4):
        now = {name: p.detach().clone() for name, p in names.items()}
        made(x, torch.arange(4)).loss.backward()
        assert all(torch.equal(p, now[name]) for name, p in names.items()), "the student's tensors come back after the teacher's turn"
        tuned.before_step()
        assert (names["head.prototypes/weight"].grad is None) == (step == 1), "the prototypes stand still at first"
        optimizer.step()
        tuned.after_step()
        optimizer.zero_grad()
        rest = 0.008 * (math.cos(math.pi * step / 10) + 1) / 2
        for name, p in names.items():
            means[name] = (1 - rest) * means[name] + rest * p.detach()
            torch.testing.assert_close(teacher.copies[name], means[name], rtol=1e-5, atol=1e-7)
    assert made.training and {"class", "patch"} == set(teacher.centres)
    again = models.SelfDistillationForSelfSupervision(backbone(), 1, 16).teacher
    again.start(tuned, "default", 10)
    again.load_state_dict(teacher.state_dict())
    assert again.step == 3 and all(torch.equal(again.copies[n], teacher.copies[n]) for n in names) and again.tau == teacher.tau


def test_merging_keeps_the_answers_and_the_other_rows(seed: int) -> None:
    torch.manual_seed(seed)
    made = models.MaskedAutoencoderForSelfSupervision(backbone())
    tuned = veneer.attach(made, "explora(r=4)")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 3, 16, 16)
    expected = made(x).last_hidden_state
    first, last = ({k: v.clone() for k, v in made.backbone.encoder.layer[i].state_dict().items() if "veneer" not in k} for i in (0, 1))
    plain: Any = tuned.merge(keep=False).detach()
    torch.testing.assert_close(plain(x).last_hidden_state, expected, rtol=0, atol=1e-4)
    changed = {k for k, v in plain.backbone.encoder.layer[0].state_dict().items() if not torch.equal(v, first[k])}
    assert changed and all(any(word in k for word in ("q_proj", "query", "v_proj", "value", "norm")) for k in changed)
    assert all(not torch.equal(v, last[k]) for k, v in plain.backbone.encoder.layer[1].state_dict().items())


def test_neighbours_are_counted_by_direction() -> None:
    features = np.array([[1, 0.1 * i] for i in range(4)] + [[0.1 * i, 1] for i in range(4)]) * np.arange(1, 9)[:, None]
    assert neighbours(features, list("aaaabbbb")) == [True] * 8
    assert sum(neighbours(features, list("abababab"))) < 8


# -- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with its preparation, pictures in one folder, and pictures in folders of classes."""
    from PIL import Image
    from transformers import BitImageProcessor

    folder = tmp_path_factory.mktemp("explora")
    backbone().save_pretrained(folder / "model")
    BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    chance = np.random.default_rng(0)
    for i in range(80):
        pixels = chance.integers(0, 120, (20, 20, 3)).astype(np.uint8)
        pixels[:, :, i % 2] += 100
        for place in (folder / "bare", folder / "named" / ("red", "green")[i % 2]):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def run(home: Path, out: Path, *more: str, data: str = "bare") -> int:
    flags = ["--model", str(home / "model"), "--data", str(home / data), "--steps", "4", "--batch-size", "8", "--out", str(out)]
    return main(["train", *flags, *more])


@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_two_stages(objective: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = f"self-supervised-images(objective={objective}, mask_ratio=0.5, local_crops=1, prototypes=16, centring=sinkhorn)"
    named = objective == "mae"
    assert run(home, tmp_path / "first", "--task", task, "--method", "explora(r=2)", data="named" if named else "bare") == 0
    told = capsys.readouterr().out
    assert ("neighbours" in told) == named and f"objective={objective}" in told
    assert main(["predict", str(tmp_path / "first"), str(home / "bare" / "0.png"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"][0]["features"]) == 2 * WIDTH
    assert main(["merge", str(tmp_path / "first"), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    before, after = (load_file(folder / "model.safetensors") for folder in (home / "model", tmp_path / "merged"))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    again = ["--model", str(tmp_path / "merged"), "--data", str(home / "named"), "--method", "lora(r=2)", "--steps", "2"]
    assert main(["train", *again, "--out", str(tmp_path / "second")]) == 0


def test_pictures_without_labels_need_no_task(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, tmp_path / "run", "--method", "lora(r=2)") == 0
    assert "Task: self-supervised-images (guessed" in capsys.readouterr().out


def test_a_run_that_was_cut_ends_the_same(home: Path, tmp_path: Path) -> None:
    from veneer.train import Recipe, train
    from veneer.train.interrupt import Interrupted

    task = "self-supervised-images(local_crops=1, prototypes=16)"
    settings = dict(model=str(home / "model"), data=str(home / "bare"), task=task, method="explora(r=2)", steps=6, batch_size=8, base=False)
    whole = train(Recipe.of({**settings, "out": str(tmp_path / "whole"), "checkpoint_every": 1}), progress=False, say=lambda line: None)

    calls = 0
    before = models.SelfDistillationForSelfSupervision.objective

    def stopping(self: Any, *args: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return before(self, *args)

    cut = Recipe.of({**settings, "out": str(tmp_path / "cut"), "checkpoint_every": 1})
    models.SelfDistillationForSelfSupervision.objective = stopping  # type: ignore[method-assign]
    try:
        with pytest.raises(Interrupted):
            train(cut, progress=False, say=lambda line: None)
    finally:
        models.SelfDistillationForSelfSupervision.objective = before  # type: ignore[method-assign]
    train(cut, progress=False, say=lambda line: None)
    first, second = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("whole", "cut"))
    assert whole.steps == 6 and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "self-supervised-images(objective=simclr)"], ["'simclr'", "'mae', 'dino'"]),
        (["--task", "self-supervised-images(objective=mae, mask_ratio=1.5)"], ["mask_ratio=1.5", "less than 1"]),
        (["--task", "self-supervised-images(objective=mae, mask_ratio=0.99)"], ["keeps none of the 16 patches", "at most 0.94"]),
        (["--task", "self-supervised-images(local_crops=-1)"], ["local_crops=-1", "at least 0"]),
        (["--task", "self-supervised-images(mask=0.5)"], ["'mask'", "'mask_ratio'"]),
        (["--image-size", "18"], ["18 × 18 pixels", "patches of 4", "--image-size 16 or 20"]),
        (["--method", "explora(U=(3,))"], ["U=(3,)", "there are 2; choose from 1 to 2"]),
        (["--method", "explora(U=(0,))"], ["U", "at least 1"]),
    ],
)
def test_what_cannot_be_is_told(flags: list[str], words: list[str], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, tmp_path / "run", *flags) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told


def test_models_that_are_no_vision_transformers_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BitImageProcessor, ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")).save_pretrained(tmp_path / "model")
    BitImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path / "model")
    assert main(["train", "--model", str(tmp_path / "model"), "--data", str(home / "bare"), "--out", str(tmp_path / "run")]) == 2
    assert "ResNetModel cannot be trained without labels here" in capsys.readouterr().err


def test_blocks_are_numbered_from_one() -> None:
    model = backbone()
    found = registry.method("explora", U=(1,)).select(anatomy.sites(model))
    assert {s.depth for s in found if s.role == "mlp.up"} == {0} and {s.depth for s in found if s.role == "attn.q"} == {0, 1}
    with pytest.raises(BadValue, match="choose from 1 to 2"):
        veneer.attach(model, "explora(U=(1, 7))")
