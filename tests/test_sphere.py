"""Losses and arcs on the unit sphere, and where a face lies: numbers of published code, and their laws."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import map_coordinates
from test_golden import Case
from torch import Tensor
from torch.nn import functional as F

from veneer.maths.face_alignment import MARGIN, around, frames, inverse, similarity, targets
from veneer.maths.sphere import alignment, on_sphere, pairs, slerp, slerp_within_classes, uniformity
from veneer.tasks.faces import aligned

SLUG = "clip-deepfake"


def features(n: int = 9, d: int = 5) -> Tensor:
    return on_sphere(torch.randn(n, d, dtype=torch.float64))


# -- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_published_losses(index: int) -> None:
    case = Case(SLUG, index)
    z, labels = case["z"].clone().requires_grad_(), case["labels"]
    f = on_sphere(z)
    logits = f @ case["param.head_W"].T + case["param.head_b"]
    parts = {"ce": F.cross_entropy(logits, labels), "align": alignment(f, labels), "uniform": uniformity(f, 2, case.hyper["clip_value"])}
    loss = parts["ce"] + case.hyper["w_align"] * parts["align"] + case.hyper["w_uniform"] * parts["uniform"]
    case.agree("out.features", f)
    case.agree("out.logits", logits)
    for name, value in parts.items():
        case.agree(f"loss.{name}", value[None])
    case.agree("loss", loss[None])
    case.agree("grad.z", torch.autograd.grad(loss, z)[0])
    case.agree("out.slerp", slerp(case["slerp.A"], case["slerp.B"], case["slerp.t"]))


def test_published_alignment_of_faces() -> None:
    case = Case(SLUG, 2)
    places = targets(case.hyper["res"], case.hyper["scale"])
    case.agree("out.target", torch.tensor(places, dtype=torch.float64))
    M = similarity([(float(x), float(y)) for x, y in case["landmarks"]], places)
    case.agree("out.M", torch.tensor(M, dtype=torch.float64))


# -- laws of the sphere -----------------------------------------------------------------------------------------


def test_features_have_norm_one_whatever_their_size_and_in_half_precision() -> None:
    z = torch.randn(7, 6)
    torch.testing.assert_close(on_sphere(z).norm(dim=1), torch.ones(7))
    torch.testing.assert_close(on_sphere(13.5 * z), on_sphere(z))
    assert on_sphere(z.bfloat16()).dtype == torch.float32


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 4))
def test_losses_are_their_sums_over_pairs(n: int, d: int, classes: int) -> None:
    f, labels = features(n, d), torch.randint(classes, (n,))
    alike, all_pairs = [], []
    for i in range(n):
        for j in range(i + 1, n):
            squared = float(((f[i] - f[j]) ** 2).sum())
            all_pairs.append(math.exp(-2 * squared))
            alike += [squared] if labels[i] == labels[j] else []
    assert float(alignment(f, labels)) == pytest.approx(sum(alike) / len(alike) if alike else 0.0, abs=1e-12)
    assert 0 <= float(alignment(f, labels)) <= 4 + 1e-12
    assert float(uniformity(f)) == pytest.approx(math.log(max(sum(all_pairs) / len(all_pairs), 1e-6)), abs=1e-12)
    assert math.log(1e-6) - 1e-12 <= float(uniformity(f)) <= 1e-12


def test_batches_too_small_for_pairs_give_no_nan() -> None:
    one = features(1).requires_grad_()
    with pytest.warns(UserWarning, match="one picture has no pairs"):
        loss = uniformity(one) + alignment(one, torch.zeros(1))
    loss.backward()
    assert loss.item() == 0 and one.grad is not None and not one.grad.any()
    assert float(alignment(features(2), torch.tensor([0, 1]))) == 0
    far = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(uniformity(far, t=20)) == pytest.approx(math.log(1e-6))  # floored


def test_arcs_begin_and_end_and_stay_on_the_sphere() -> None:
    a, b = features(20, 4), features(20, 4)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    t = torch.empty(20, 1, dtype=torch.float64).uniform_(-0.5, 1.5)
    torch.testing.assert_close(slerp(a, b, t).norm(dim=1), torch.ones(20, dtype=torch.float64))
    middle = slerp(a, b, 0.5)
    torch.testing.assert_close((middle * a).sum(1), (middle * b).sum(1))
    torch.testing.assert_close(slerp(3 * a, 0.2 * b, t), slerp(a, b, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_arcs_between_equal_features_are_finite_with_their_gradients(dtype: torch.dtype) -> None:
    a = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    for b in (a, -a.detach(), a.detach().clone()):
        (grad,) = torch.autograd.grad(slerp(a, b, torch.full((5, 1), 0.3)).sum(), a)
        assert torch.isfinite(grad).all()


def test_moves_stay_within_the_class_and_change_nothing_in_place() -> None:
    f, labels = features(12, 3), torch.tensor([0] * 6 + [1] * 5 + [2])
    f[:6, 0], f[6:11, 0] = f[:6, 0].abs() + 2, -f[6:11, 0].abs() - 2  # two classes on two sides
    f = on_sphere(f)
    before = f.clone()
    moved = slerp_within_classes(f, labels)
    assert torch.equal(f, before)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(12, dtype=torch.float64))
    assert (moved[:6, 0] > 0).all() and (moved[6:11, 0] < 0).all()
    assert torch.equal(moved[11], f[11])
    assert not torch.equal(moved[:11], f[:11])
    ends = slerp_within_classes(f, labels, 1.0, 1.0)  # whole arcs: every row is a row of its class
    assert all((ends[i] - f[labels == labels[i]]).norm(dim=1).min() < 1e-7 for i in range(12))


def test_pairs_are_each_counted_once() -> None:
    i, j, squared = pairs(features(6))
    assert len(squared) == 15 and bool((i < j).all())


# -- laws of the crop -------------------------------------------------------------------------------------------


def test_the_similarity_is_the_best_one_and_is_undone() -> None:
    draw = random.Random(3)
    points = [(draw.uniform(0, 200), draw.uniform(0, 200)) for _ in range(5)]
    goals = targets()

    def error(M: tuple) -> float:
        return sum(
            (M[0][0] * x + M[0][1] * y + M[0][2] - u) ** 2 + (M[1][0] * x + M[1][1] * y + M[1][2] - v) ** 2
            for (x, y), (u, v) in zip(points, goals)
        )

    (a, b, c), (d, e, f) = best = similarity(points, goals)
    assert (a, b) == pytest.approx((e, -d))
    for _ in range(50):
        s, r, u, v = (draw.gauss(0, 0.01) for _ in range(4))
        assert error(((a + s, b - r, c + u), (d + r, e + s, f + v))) >= error(best)
    (p, q, r), (s, t, u) = inverse(best)
    for x, y in points:
        X, Y = a * x + b * y + c, d * x + e * y + f
        assert (p * X + q * Y + r, s * X + t * Y + u) == pytest.approx((x, y))
    exact = similarity(points, [(2 * -y + 5, 2 * x - 7) for x, y in points])  # a quarter turn, doubled, shifted
    assert np.allclose(exact, ((0, -2, 5), (2, 0, -7)))
    with pytest.raises(ValueError, match="one"):
        similarity([(3.0, 4.0)] * 5, goals)


def test_landmarks_land_on_their_places_and_pixels_are_interpolated() -> None:
    y, x = np.mgrid[:120, :160]
    ramp = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)  # a pixel's colour is its place
    points = [(60.0, 40.0), (100.0, 44.0), (79.0, 66.0), (62.0, 84.0), (94.0, 88.0)]
    crop = np.asarray(aligned(Image.fromarray(ramp), points), float)
    M = inverse(similarity(points, targets()))
    for X, Y in targets():
        i, j = round(Y), round(X)
        wanted = (M[0][0] * j + M[0][1] * i + M[0][2], M[1][0] * j + M[1][1] * i + M[1][2])
        assert crop[i, j, :2] == pytest.approx(wanted, abs=1.0)
    v, u = np.mgrid[:256, :256]
    ys, xs = M[1][0] * u + M[1][1] * v + M[1][2], M[0][0] * u + M[0][1] * v + M[0][2]
    inside = (xs > 1) & (xs < 158) & (ys > 1) & (ys < 118)
    assert inside.mean() > 0.5
    wanted_red = map_coordinates(ramp[..., 0].astype(float), [ys, xs], order=1)
    assert np.abs(crop[..., 0] - wanted_red)[inside].max() <= 1


def test_a_box_is_widened_to_a_square_around_its_middle() -> None:
    left, top, right, bottom = around((10, 20, 50, 40))
    assert right - left == bottom - top == round(MARGIN * 40)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((30, 30), abs=1)


@pytest.mark.parametrize(("count", "wanted"), [(300, 32), (33, 32), (32, 32), (5, 32), (100, 1)])
def test_frames_are_spread_from_first_to_last(count: int, wanted: int) -> None:
    taken = frames(count, wanted)
    assert len(taken) == len(set(taken)) == min(count, wanted) and taken[0] == 0
    if wanted > 1:
        assert taken[-1] == count - 1
        gaps = {b - a for a, b in itertools.pairwise(taken)}
        assert max(gaps) - min(gaps) <= 1
