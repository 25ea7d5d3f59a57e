"""Counts of true against predicted classes, and what follows from them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import BadValue
from veneer.tasks.confusion import Confusion, count

TRUTH = [0, 0, 0, 1, 1, 2]
FOUND = [0, 0, 1, 1, 0, 2]


def test_the_metrics_by_hand():
    c = Confusion(["sea", "land", "ice"]).add(TRUTH, FOUND)
    assert c.counts.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert c.iou.tolist() == pytest.approx([2 / 4, 1 / 3, 1])
    assert c.f1.tolist() == pytest.approx([4 / 6, 2 / 4, 1])
    assert c.recall.tolist() == pytest.approx([2 / 3, 1 / 2, 1])
    assert c.means() == pytest.approx(
        {
            "accuracy": 4 / 6,
            "mean_iou": (1 / 2 + 1 / 3 + 1) / 3,
            "mean_f1": (2 / 3 + 1 / 2 + 1) / 3,
            "mean_accuracy": (2 / 3 + 1 / 2 + 1) / 3,
        }
    )
    assert c.per_class()["ice"] == {"iou": 1, "f1": 1, "accuracy": 1}


labels = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=60)


@given(labels)
def test_each_metric_is_what_its_name_says(pairs):
    """Against the definitions, in sets of points."""
    kept = [(k, true, found) for k, (true, found) in enumerate(pairs) if true != 4]
    c = Confusion("abcd", ignored=4).add(*np.array(pairs).T)
    assert c.points == len(kept)
    for i in range(4):
        true, found = {k for k, t, _ in kept if t == i}, {k for k, _, f in kept if f == i}
        hits = len(true & found)
        for own, part, whole in ((c.iou, hits, len(true | found)), (c.f1, 2 * hits, len(true) + len(found)), (c.recall, hits, len(true))):
            assert own[i] == pytest.approx(part / whole) if whole else math.isnan(own[i])
    if kept:
        assert c.means()["accuracy"] == pytest.approx(sum(t == f for _, t, f in kept) / len(kept))


@given(labels, st.integers(0, 60))
def test_batches_add_up(pairs, cut):
    truth, found = np.array(pairs).T
    whole = Confusion("abcd", ignored=4).add(truth, found)
    parts = Confusion("abcd", ignored=4).add(truth[:cut], found[:cut]).add(truth[cut:], found[cut:])
    assert np.array_equal(whole.counts, parts.counts)


def test_classes_that_are_nowhere_are_left_out_of_the_means():
    c = Confusion(["a", "b", "never"]).add([0, 1], [0, 1])
    assert c.means() == {"accuracy": 1, "mean_iou": 1, "mean_f1": 1, "mean_accuracy": 1}
    assert all(math.isnan(v) for v in c.per_class()["never"].values())


def test_a_class_that_is_only_predicted_has_iou_0_and_no_accuracy():
    c = Confusion("ab").add([0, 0], [0, 1])
    assert c.iou.tolist() == [0.5, 0] and math.isnan(c.recall[1])


def test_nothing_but_ignored_points():
    c = Confusion("ab", ignored=255).add(np.full((2, 3), 255, np.uint8), np.zeros((2, 3), np.uint8))
    assert c.points == 0 and all(math.isnan(v) for v in c.means().values())


@pytest.mark.parametrize(
    ("truth", "found", "words"),
    [
        ([0, 1], [0], "shape"),
        ([0, 3], [0, 1], "truth hold the index 3, but there are 3 classes"),
        ([0, 1], [0, -1], "predictions hold the index -1"),
    ],
)
def test_wrong_input_is_named(truth, found, words):
    with pytest.raises(BadValue, match=words):
        count(truth, found, 3)


def test_no_classes():
    with pytest.raises(BadValue, match="no classes"):
        Confusion([])
