"""The Point-MAE backbone and its pre-training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SUBJECTS, loss, point_mae, points

import veneer
from veneer import anatomy, assets
from veneer.errors import BadValue
from veneer.maths.told import COORDINATES
from veneer.models.point_mae import PointMAEConfig, PointMAEForPointCloudClassification, PointMAEModel
from veneer.models.point_mae_layers import TokenNorm
from veneer.models.point_mae_pretraining import PointMAEForPreTraining, chamfer, pretrain
from veneer.train.state import write_state

POINTS = SUBJECTS["points"]


def test_the_size_of_the_published_model() -> None:
    with torch.device("meta"):
        model = PointMAEForPointCloudClassification(PointMAEConfig(num_labels=15, num_groups=128, num_points=2048))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 22.1


def test_every_layer_has_its_role() -> None:
    roles = {s.name.removeprefix("point_mae."): s.role for s in anatomy.sites(POINTS.build())}
    expected = {
        "embeddings.patch_embeddings.layer4": "embed.patch", "embeddings.patch_embeddings.norm2": "norm.embed",
        "embeddings.cls_position": "embed.position", "embeddings.cls_token": "parameter", "embeddings.position_embeddings.0": "embed.other",
        "encoder.layers.0.attn.qkv.q": "attn.q", "encoder.layers.0.attn.proj": "attn.o", "encoder.layers.1.mlp.fc1": "mlp.up",
        "encoder.layers.1.mlp.fc2": "mlp.down", "encoder.layers.1.norm1": "norm.attn", "encoder.layers.1.norm2": "norm.mlp",
        "encoder.norm": "norm.final", "head.0": "head", "encoder.layers.0": "block", "encoder.layers.0.mlp": "mlp",
    }  # fmt: skip
    assert {name: roles.get(name) for name in expected} == expected
    assert [s.name for s in anatomy.sites(POINTS.build()) if s.trainable_head] == ["head.0"]


def test_saved_and_loaded_it_answers_the_same_and_a_bare_backbone_takes_a_head(tmp_path: Path) -> None:
    model = POINTS.build(torch.float32)
    model.save_pretrained(tmp_path / "whole")
    again = PointMAEForPointCloudClassification.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(POINTS.answers(again), POINTS.answers(model))
    model.point_mae.save_pretrained(tmp_path / "bare")
    headed = PointMAEForPointCloudClassification.from_pretrained(tmp_path / "bare", num_labels=5).eval()
    assert POINTS.answers(headed).shape[1] == 5
    batch = POINTS.batch(dtype=torch.float32)
    assert torch.equal(headed.point_mae.piece_std, model.point_mae.piece_std) and (headed.point_mae.piece_std == 1).all()
    assert torch.equal(headed.point_mae(**batch).last_hidden_state, model.point_mae(**batch).last_hidden_state)
    skeleton = anatomy.skeleton(str(tmp_path / "whole"))
    assert type(skeleton) is PointMAEForPointCloudClassification and all(p.is_meta for p in skeleton.parameters())


def test_the_order_of_points_behind_the_first_does_not_matter() -> None:
    model, batch = POINTS.build(), POINTS.batch()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(23)])
    with torch.no_grad():
        torch.testing.assert_close(model(points=batch["points"][:, order]).logits, model(**batch).logits)


def test_a_frozen_tokeniser_keeps_its_running_numbers_and_a_training_one_moves_them() -> None:
    model, batch = POINTS.build(), POINTS.batch()
    norm = next(m for m in model.modules() if isinstance(m, TokenNorm))
    before = norm.running_mean.clone()
    veneer.attach(model, "full", head=False)
    loss(model.train(), batch)
    assert torch.equal(norm.running_mean, before)
    veneer.of(model).detach()
    loss(model.train(), batch)
    assert not torch.equal(norm.running_mean, before)


def test_positions_belong_to_the_class_token_and_the_patches_whatever_stands_between() -> None:
    model = POINTS.build()
    layer, x, position = model.point_mae.encoder.layers[0], torch.randn(2, 12, 16).double(), torch.randn(2, 9, 16).double()
    seen: list[torch.Tensor] = []
    layer.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x, position)
    torch.testing.assert_close(seen[0] - x, torch.cat([position[:, :1], torch.zeros(2, 3, 16).double(), position[:, 1:]], 1))


def test_a_block_tells_where_its_points_stand() -> None:
    model, batch = POINTS.build(), POINTS.batch()
    _, told = COORDINATES.listen(lambda points: model(points=points).logits, batch["points"])
    assert told is not None and told.shape == (4, 8, 3) and torch.equal(told[:, 0], batch["points"][:, 0])
    model(**batch)
    assert COORDINATES.value is None  # nobody listened


def test_drop_path_rests_without_gradients_and_keeps_the_mean_with_them() -> None:
    layer = point_mae(2, drop_path_rate=0.5).point_mae.encoder.layers[1].train()
    ones = torch.ones(4000, 1, 1)
    with torch.no_grad():
        assert torch.equal(layer.dropped(ones), ones)
    assert set(layer.dropped(ones).unique().tolist()) == {0.0, 2.0} and abs(float(layer.dropped(ones).mean()) - 1) < 0.15


def test_positions_may_be_added_once() -> None:
    every, once = point_mae(2).eval(), point_mae(2, positions="once").eval()
    once.load_state_dict(every.state_dict())
    batch = POINTS.batch(dtype=torch.float32)
    tokens, positions, centers, _ = every.point_mae.embeddings(batch["points"])
    by_hand = tokens + positions
    for layer in every.point_mae.encoder.layers:
        by_hand = layer(by_hand, None, centers)
    torch.testing.assert_close(once.point_mae(**batch).last_hidden_state, every.point_mae.encoder.norm(by_hand))
    assert not torch.allclose(every.point_mae(**batch).last_hidden_state, once.point_mae(**batch).last_hidden_state)


def test_heads_read_pieces_in_units_of_their_spread_over_the_clouds() -> None:
    backbone, clouds = POINTS.build().point_mae, torch.randn(12, 24, 3).double()
    backbone.standardise(clouds, batch=5)
    pieces = backbone.pieces(backbone(clouds).last_hidden_state)
    for i in (0, 2):
        torch.testing.assert_close(pieces[:, i].mean(0), torch.zeros(16).double(), atol=1e-8, rtol=0)
        torch.testing.assert_close(pieces[:, i].std(0), torch.ones(16).double(), atol=1e-3, rtol=0)
    assert not pieces[:, 1].any()  # no prompts


WRONG_MODELS: dict[str, tuple[Any, list[str]]] = {
    "heads": (lambda: PointMAEConfig(num_attention_heads=7), ["num_attention_heads=7", "hidden_size=384"]),
    "widths": (lambda: PointMAEConfig(point_widths=[1, 2]), ["three numbers"]),
    "pieces": (lambda: PointMAEConfig(head_pieces=["clss"]), ["cls, prompt, patch"]),
    "positions": (lambda: PointMAEConfig(positions="never"), ["'every' or 'once'"]),
    "points": (lambda: PointMAEConfig(num_points=40), ["num_points=40", "at least 64"]),
    "cloud": (lambda: POINTS.build()(points=torch.zeros(2, 5, 3).double()), ["5 points", "8 patches", "at least 8"]),
    "shape": (lambda: POINTS.build()(points=torch.zeros(2, 24, 4).double()), ["(2, 24, 4)", "[batch, points, 3]"]),
}


@pytest.mark.parametrize("what", WRONG_MODELS)
def test_sizes_and_clouds_that_do_not_fit_are_refused(what: str) -> None:
    action, words = WRONG_MODELS[what]
    with pytest.raises(BadValue) as said:
        action()
    assert all(word in str(said.value) for word in words) and "\n" not in str(said.value)


# -- pre-training -------------------------------------------------------------------------------------------------


def test_chamfer_is_the_mean_over_nearest_points_both_ways() -> None:
    a, b = torch.randn(2, 5, 3).double(), torch.randn(2, 4, 3).double()
    there = [min(float(((p - q) ** 2).sum()) for q in b[i]) for i in range(2) for p in a[i]]
    back = [min(float(((p - q) ** 2).sum()) for p in a[i]) for i in range(2) for q in b[i]]
    assert float(chamfer(a, b)) == pytest.approx(sum(there) / len(there) + sum(back) / len(back))
    assert float(chamfer(a, a)) == 0


def test_the_encoder_sees_the_visible_patches_alone_and_the_loss_falls() -> None:
    config = point_mae(1).config
    model, seen = PointMAEForPreTraining(config), []
    model.point_mae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    clouds = points(torch.Generator().manual_seed(0))["points"]
    value = model(clouds, torch.Generator().manual_seed(0))
    value.backward()
    assert seen == [8 - int(0.6 * 8)] and model.mask_token.grad is not None
    with torch.no_grad():
        untrained = float(model.eval()(clouds, torch.Generator().manual_seed(1)))
    trained = pretrain(config, clouds, 40, lr=1e-2)
    with torch.no_grad():
        assert float(trained(clouds, torch.Generator().manual_seed(1))) < 0.8 * untrained


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, clouds = point_mae(1, drop_path_rate=0.3).config, points(torch.Generator().manual_seed(0))["points"]
    whole, state = pretrain(config, clouds, 4, batch=2), tmp_path / "begun.safetensors"
    calls = []

    def stops(path: Path, held: Any) -> None:
        write_state(path, held)
        calls.append(held["epoch"])
        if held["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("veneer.models.point_mae_pretraining.write_state", stops)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, clouds, 4, batch=2, state=state)
    with pytest.raises(BadValue, match="other settings"):
        pretrain(config, clouds, 5, batch=2, state=state)
    again = pretrain(config, clouds, 4, batch=2, state=state)
    assert calls == [1, 2, 3, 4] and not state.exists()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_the_model_in_the_package_is_small_and_has_learnt() -> None:
    folder = Path(assets.resolve("point-mae"))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 10_000_000
    model = PointMAEModel.from_pretrained(folder).eval()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 128)
    with torch.no_grad():
        spread = model(torch.rand(4, 1024, 3) * 2 - 1).last_hidden_state[:, 1:].std()
    assert math.isfinite(float(spread)) and float(spread) > 0.1
