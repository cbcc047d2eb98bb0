"""Embeddings: each against its definition, pixel by pixel, for segments, windows, pixels and whole images."""
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import al_patch
from al_patch import (
    Peaks,
    Segments,
    class_confusion,
    class_cooccurrence,
    class_scores,
    generator,
    grid,
    mean_features,
    mean_gradient,
    pool_map,
)

SHAPE = 13, 18  # of the image
MAPS = [(1, 1), (4, 5), (7, 18), (13, 18), (20, 30)]  # resolutions of the logits


def blobs(shape: tuple) -> np.ndarray:
    """Segments of no regular form, with a number that is not there."""
    y, x = np.mgrid[:shape[0], :shape[1]]
    segments = (np.hypot(y - 4, x - 5) // 4 + 6 * (x > y)).astype(np.int32)
    return np.where(segments == 2, 13, segments)


CORNERS = np.array([0, 17, 40, 100, 12 * 18, 13 * 18 - 1])
UNITS = dict(  # units, ids (not in order: the labelled ones come after the free ones)
    grid=(grid(SHAPE, (4, 5)), np.array([0, 3, 15, 5, 14])),
    blobs=(Segments(blobs(SHAPE)), np.array([1, 13, 6, 0])),
    window=(Peaks(SHAPE, 1, 2), CORNERS), large_window=(Peaks(SHAPE, 7, 14), CORNERS[[5, 0]]),
    pixel=(Peaks(SHAPE, 0, 0), CORNERS))
each_unit = pytest.mark.parametrize('unit', UNITS)
each_map = pytest.mark.parametrize('cells', MAPS, ids=str)


def literal_weights(units, ids: np.ndarray, cells: tuple) -> np.ndarray:
    """Shares of the cells in each unit, pixel by pixel. (N, h, w)"""
    weights = np.zeros((len(ids), *cells))
    for weight_HW, i in zip(weights, ids):
        pixels = np.argwhere(units.mask(np.array([i])))
        for y, x in pixels:
            weight_HW[math.floor(y * cells[0] / SHAPE[0]), math.floor(x * cells[1] / SHAPE[1])] += 1 / len(pixels)
    return weights


def some_probs(cells: tuple, c: int = 4, absent: int = 2) -> torch.Tensor:
    """Probabilities by which one class is predicted nowhere. (C, h, w)"""
    logits = 3 * torch.randn(c, *cells, generator=generator(*cells))
    logits[absent] -= 20
    return logits.softmax(0)


def weights_of(name: str, cells: tuple) -> tuple:
    """The weights that an embedding gets and the literal ones; those of a whole image where there is no such unit."""
    if name == 'image':
        return None, np.full((1, *cells), 1 / math.prod(cells))
    units, ids = UNITS[name]
    return units.weights(ids, cells, 'cpu'), literal_weights(units, ids, cells)


each_candidate = pytest.mark.parametrize('name', [*UNITS, 'image'])


def entropy_of(p) -> float:
    return -sum(share * math.log(share) for share in p if share > 0)


# --- weights ---------------------------------------------------------------------------------------------------------


@each_unit
@each_map
def test_weights_are_the_shares_of_the_cells_in_a_unit(unit, cells):
    got, slow = weights_of(unit, cells)
    assert got.dtype == torch.float32 and got.to_dense().numpy().reshape(slow.shape) == pytest.approx(slow, abs=1e-6)
    assert got.to_dense().sum(1).tolist() == pytest.approx([1] * len(got))
    assert torch.equal(got.to_dense(), torch.sparse_coo_tensor(got.indices(), got.values(), got.shape).to_dense())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4),
       st.integers(0, 2**31))
def test_a_constant_map_is_constant_in_every_unit(h, w, cell_h, cell_w, radius, seed):
    windows, scores = Peaks((h, w), radius, 2 * radius), np.random.default_rng(seed).random(h * w)
    ids = windows.candidates(scores, np.zeros((h, w), bool), functools.partial(al_patch.uniform, seed), 5)[0]
    for weights in (windows.weights(ids, (cell_h, cell_w), 'cpu'),
                    grid((h, w), (4, 5)).weights(np.array([0]), (cell_h, cell_w), 'cpu')):
        assert pool_map(torch.full((2, cell_h, cell_w), 3.), weights).numpy() == pytest.approx(3)


# --- embeddings ------------------------------------------------------------------------------------------------------


@each_candidate
@each_map
def test_means_of_maps(name, cells):
    maps = torch.randn(6, *cells, generator=generator(0))
    weights, slow = weights_of(name, cells)
    means = [[(weight * each).sum() for each in maps.double().numpy()] for weight in slow]
    assert pool_map(maps, weights).numpy() == pytest.approx(np.array(means), abs=1e-5)
    assert torch.equal(mean_features(maps, weights), pool_map(maps, weights))


@each_candidate
@each_map
def test_class_scores(name, cells):
    probs, scores = some_probs(cells), torch.rand(cells, generator=generator(1))
    weights, slow = weights_of(name, cells)
    means = [[(weight * p * scores.double().numpy()).sum() for p in probs.double().numpy()] for weight in slow]
    assert class_scores(probs, scores, weights).numpy() == pytest.approx(np.array(means), abs=1e-5)


@each_candidate
@each_map
def test_the_gradient_of_a_candidate(name, cells):
    """Mean over its pixels of (p - onehot) h^T: the rows of `get_grad_embedding`, query_strategies/strategy.py, lines
    338 to 343, of JordanAsh/badge at a2d18ac, with the other sign."""
    probs, features = some_probs(cells), torch.randn(5, *cells, generator=generator(1))
    weights, slow = weights_of(name, cells)
    means = np.zeros((len(slow), 4, 5))
    for y, x in np.ndindex(*cells):
        p, h = probs[:, y, x].double().numpy(), features[:, y, x].double().numpy()
        for c in range(4):
            means[:, c] += slow[:, y, x, None] * h * (p[c] - (c == p.argmax()))
    assert mean_gradient(probs, features, weights).view(-1, 4, 5).numpy() == pytest.approx(means, abs=1e-5)
    if name == 'pixel':
        left, right = mean_gradient(probs, features, weights, in_one_cell=True)
        assert (left[:, :, None] * right[:, None]).numpy() == pytest.approx(means, abs=1e-5)


def test_the_gradient_is_that_of_the_predicted_labels_cross_entropy():
    """With respect to the weights of a 1x1 convolution, the last layer of a decode head."""
    layer, features = torch.nn.Conv2d(6, 5, 1), torch.randn(6, 3, 4, generator=generator(0))
    logits = layer(features)
    F.cross_entropy(logits[None], logits.argmax(0)[None]).backward()
    got = mean_gradient(logits.detach().softmax(0), features)[0]
    assert got.tolist() == pytest.approx(layer.weight.grad.flatten().tolist(), abs=1e-6)


def literal_confusion(probs_CHW: np.ndarray, weight_HW: np.ndarray) -> np.ndarray:
    c, matrix = len(probs_CHW), np.zeros((len(probs_CHW), ) * 2)
    total = np.zeros((c, 1))
    for y, x in np.ndindex(*weight_HW.shape):
        p = probs_CHW[:, y, x]
        matrix[p.argmax()] += weight_HW[y, x] * entropy_of(p) * p
        total[p.argmax()] += weight_HW[y, x] * entropy_of(p)
    return matrix / np.where(total > 0, total, 1)


@each_candidate
@each_map
def test_confusion_is_the_mean_softmax_by_predicted_class_weighted_by_entropy(name, cells):
    probs = some_probs(cells)
    weights, slow = weights_of(name, cells)
    got = class_confusion(probs, weights).view(-1, 4, 4).numpy()
    assert got == pytest.approx(np.stack([literal_confusion(probs.double().numpy(), each) for each in slow]), abs=1e-5)
    assert not got[:, 2].any()  # the class that is predicted nowhere
    sums = got.sum(2)
    assert np.logical_or(abs(sums - 1) < 1e-4, sums == 0).all() and (abs(sums - 1) < 1e-4).any(1).all()


def test_confusion_by_hand():
    """Two pixels of class 0: one that is sure, and has no weight, and one that is not."""
    probs = torch.tensor([[1., 0, 0], [.6, .4, 0], [.2, .2, .6]]).T[:, None]
    assert class_confusion(probs).view(3, 3).tolist() == [
        pytest.approx([.6, .4, 0]), [0, 0, 0], pytest.approx([.2, .2, .6])]


@each_candidate
@each_map
def test_cooccurrence_is_squared_and_normalised_by_row(name, cells):
    probs, thresholds = some_probs(cells), np.array([.05, .2, .5, .3])
    weights, slow = weights_of(name, cells)
    together = np.zeros((len(slow), 4, 4))
    for y, x in np.ndindex(*cells):
        member = probs[:, y, x].double().numpy() >= thresholds
        together += slow[:, y, x, None, None] * np.outer(member, member)
    squared = together**2
    expected = squared / np.where(squared.sum(2, keepdims=True) > 0, squared.sum(2, keepdims=True), 1)
    got = class_cooccurrence(probs, torch.tensor(thresholds), weights).view(-1, 4, 4).numpy()
    assert got == pytest.approx(expected, abs=1e-5) and not got[:, 2].any()  # a row of zeros where a class is absent
