"""Measures against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm_ext.evaluation import preference_accuracy, retrieval_at_1, spearman, variance_explained
from stitchvm_ext.evaluation.metrics import number_captions


def test_spearman():
    a = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4
    assert spearman(a, torch.tensor([5.0, 1.0, 6.0, 7.0])) == pytest.approx(3 / 22.5**0.5)
    assert math.isnan(spearman(a, torch.ones(4)))


def test_variance_explained():
    truth = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert variance_explained(truth, truth) == 1
    assert variance_explained(torch.full((4,), 1.5), truth) == pytest.approx(0)
    assert variance_explained(truth + 1, truth) == pytest.approx(1 - 1 / 1.25)


def test_retrieval_with_several_and_equal_captions():
    texts, own = number_captions([["a", "b"], ["a"], ["c"]])
    assert texts == ["a", "b", "c"] and own == [{0, 1}, {0}, {2}]
    embeddings = torch.eye(3)
    nearest_texts = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.2, 0.1], [0.6, 0.0, 0.5]])
    assert retrieval_at_1(nearest_texts, embeddings, own) == pytest.approx(2 / 3)  # the third is nearest to "a"
    assert retrieval_at_1(nearest_texts, embeddings, own, rows=2) == pytest.approx(2 / 3)


def test_preference_accuracy():
    ranks = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 5.0, 5.0])
    scores = torch.tensor([0.9, 0.1, 0.5, 0.2, 0.2, 1.0, 2.0])
    # 2 of 3 pairs; one tie of scores, which is wrong; a group that people ranked equal, which does not count
    assert preference_accuracy(scores, ranks, [3, 2, 2]) == pytest.approx((2 / 3 + 0) / 2)
    assert preference_accuracy(-ranks, ranks, [3, 2, 2]) == 1
    assert math.isnan(preference_accuracy(scores[5:], ranks[5:], [2]))
