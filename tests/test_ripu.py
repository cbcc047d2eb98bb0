"""RIPU and PixelPick, against their definitions written out pixel by pixel."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from al_patch import box_sum, generator, impurity, resolve_strategy, ripu, ripu_pixel, top_percent, window_pixels


def entropy_of(shares) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def literal_ripu(p_CHW: np.ndarray, k: int) -> tuple:
    """RIPU's RA and PA, (H, W) each."""
    c, h, w = p_CHW.shape
    ra, pa = np.zeros((2, h, w))
    for y, x in np.ndindex(h, w):
        window = p_CHW[:, max(0, y - k):y + k + 1, max(0, x - k):x + k + 1].reshape(c, -1).T
        predicted = [int(p.argmax()) for p in window]
        impurity = entropy_of(predicted.count(label) / len(predicted) for label in range(c))
        ra[y, x] = impurity / math.log(c) * np.mean([entropy_of(p) for p in window]) / math.log(c)
        pa[y, x] = impurity * entropy_of(p_CHW[:, y, x])
    return ra, pa


def smooth_probs(c: int, h: int, w: int, n: int = 1) -> torch.Tensor:
    """Random probabilities with some areas of one predicted class."""
    logits = torch.randn(n, c, h, w, generator=generator('probs', c, h, w))
    return (8 * F.avg_pool2d(logits, 3, 1, 1)).softmax(1)


@pytest.mark.parametrize('k', [1, 4])
@pytest.mark.parametrize('c', [2, 5, 19])
@pytest.mark.parametrize('h, w', [(9, 12), (3, 20)])  # windows of k = 4 are larger than the second
def test_both_follow_their_definition_borders_included(c, k, h, w):
    probs = smooth_probs(c, h, w)
    ra, pa = literal_ripu(probs[0].double().numpy(), k)
    assert ripu(probs, k)[0].numpy() == pytest.approx(ra, abs=2e-6)
    assert ripu_pixel(probs, k)[0].numpy() == pytest.approx(pa, abs=1e-5)
    assert len(np.unique(ra.round(6))) > 10  # it is not a map of zeros


def test_by_hand():
    """Two pixels of one class, one of the other: H(1/3, 2/3) / ln 2 times the mean of ln 2, 0 and 0 / ln 2."""
    probs = torch.tensor([[.5, 1, 0], [.5, 0, 1]])[None, :, None]  # (1, 2, 1, 3); a tie goes to the first class
    thirds = entropy_of([1 / 3, 2 / 3])
    assert ripu(probs, 1).flatten().tolist() == pytest.approx([0, thirds / math.log(2) / 3, 0], abs=1e-6)
    assert ripu_pixel(probs, 1).flatten().tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert ripu_pixel(probs, 2).flatten().tolist() == pytest.approx([thirds * math.log(2), 0, 0], abs=1e-6)


@pytest.mark.parametrize('score', [ripu, ripu_pixel])
def test_every_image_of_a_batch_is_by_itself(score):
    probs = smooth_probs(5, 8, 10, 3)
    assert torch.equal(score(probs, 2), torch.cat([score(each[None], 2) for each in probs]))


@pytest.mark.parametrize('k', [1, 4, 32])
@pytest.mark.parametrize('score', [ripu, ripu_pixel])
def test_a_pure_window_scores_exactly_nothing(score, k):
    probs = torch.full((1, 19, 70, 90), .5 / 18)
    probs[:, 7] = .5
    assert not score(probs, k).any()
    probs[:, :, :, 85:] = probs[:, :, :, 85:].roll(1, 1)  # another class, far to the right
    scores = score(probs, k)[0]
    assert not scores[:, :85 - k].any() and (scores[:, 85 - k:85] > 0).all()
    assert (scores >= 0).all()


def test_evenly_mixed_and_uncertain_is_the_highest():
    """A checkerboard of two classes: 1 with uniform probabilities, but for the odd number of pixels in a window."""
    probs = torch.full((1, 2, 6, 6), .5)
    probs[:, 1] += 1e-6 * ((torch.arange(6)[:, None] + torch.arange(6)) % 2)
    inner = ripu(probs, 1)[0, 1:-1, 1:-1]
    assert inner.flatten().tolist() == pytest.approx([entropy_of([4 / 9, 5 / 9]) / math.log(2)] * 16, abs=1e-5)


@pytest.mark.parametrize('k', [1, 3, 9])
def test_sums_and_sizes_of_windows(k):
    values = torch.rand(7, 11, generator=generator(k))
    slow = [[values[max(0, y - k):y + k + 1, max(0, x - k):x + k + 1] for x in range(11)] for y in range(7)]
    assert box_sum(values, k).tolist() == [[pytest.approx(float(v.sum()), rel=1e-5) for v in row] for row in slow]
    assert window_pixels((7, 11), k).tolist() == [[v.numel() for v in row] for row in slow]
    assert box_sum((values > .5).view(torch.uint8), k).tolist() == [[(v > .5).sum() for v in row] for row in slow]


def test_more_classes_than_a_byte_holds():
    pred = torch.tensor([[0, 256, 512, 511]])
    assert impurity(pred, 600, 9).flatten().tolist() == pytest.approx([math.log(4)] * 4, abs=1e-6)


# --- PixelPick's selection -------------------------------------------------------------------------------------------


def test_top_percent_draws_among_the_highest():
    scores_N = torch.randperm(1000, generator=generator(0)).double()
    drawn = [scores_N[top_percent(scores_N, 10, generator(seed))] for seed in range(40)]
    assert all(len(set(scores.tolist())) == 10 for scores in drawn)
    assert set(torch.cat(drawn).tolist()) == set(range(950, 1000))  # all of them in turn, and no other
    assert set(scores_N[top_percent(scores_N, 10, generator(0), percent=1)].tolist()) == set(range(990, 1000))


@pytest.mark.parametrize('budget', [1, 7, 49, 50, 51, 400, 1000])
def test_top_percent_spends_the_budget_exactly(budget):
    scores_N = torch.rand(1000, generator=generator(1))
    picks = top_percent(scores_N, budget, generator(2))
    assert len(picks) == len(set(picks.tolist())) == budget
    assert (scores_N[picks] >= scores_N.sort().values[-max(50, budget)]).all()


def test_top_percent_is_seeded():
    scores_N = torch.rand(1000, generator=generator(1))
    first, again, other = (top_percent(scores_N, 10, generator(seed)).tolist() for seed in (3, 3, 4))
    assert first == again != other


def test_pixelpick_is_the_margin_at_random_among_the_top_five_percent():
    strategy = resolve_strategy(dict(type='pixelpick', percent=10))
    assert strategy.score.__name__ == 'margin' and strategy.select.func is top_percent
    assert strategy.select.keywords == dict(percent=10)
    assert resolve_strategy('pixelpick').select is top_percent
    assert resolve_strategy(dict(type='ripu', k=4)).score.keywords == dict(k=4)
