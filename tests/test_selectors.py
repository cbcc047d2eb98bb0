"""Selectors: against slow, literal ones, and by the frequency of what they draw."""
import functools
import itertools
import math
import struct

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import al_patch
from al_patch import (
    AL_SELECTORS,
    barycentre,
    class_balance,
    class_balanced_power,
    generator,
    herding,
    kcenter,
    kmeanspp,
    medoids,
    power_draw,
    representative_errors,
    softmax_draw,
    softrank_draw,
    stochastic_batches,
    top_percent,
    topk,
    typical,
)

SELECTORS = AL_SELECTORS.module_dict


def uniform(*shape: int, seed=0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator('uniform', seed, *shape), dtype=torch.float64)


def vectors(n: int, d: int, seed=0) -> torch.Tensor:
    """Positive rows that sum to 1: of use for all distances."""
    return (2 * uniform(n, d, seed=seed)).softmax(1).float()


def matrices(n: int, classes: int, seed=0) -> torch.Tensor:
    """Class matrices, in rows: of each a few classes are missing, and of some all."""
    rows = vectors(n * classes, classes, seed).view(n, classes, classes)
    has = uniform(n, classes, seed=('has', seed)) < uniform(n, 1, seed=('share', seed)) + .2
    return (rows * has[..., None]).flatten(1).float()


def chosen(select, scores_N: torch.Tensor, budget: int, draws_N: torch.Tensor, seed=0, **offered) -> list:
    """What a selector picks when candidates come as the collector hands them over: in the order of their draws."""
    order = draws_N.argsort()
    offered = {key: value[order] if key.endswith(('_N', '_ND', '_NC')) else value for key, value in offered.items()}
    options = {key: offered.pop(key) for key in {*offered} - {*al_patch.OFFERED}}
    picks = al_patch.call_offering(functools.partial(select, **options), scores_N[order], budget, generator(seed),
                                   draws_N=draws_N[order], **offered)
    return order[picks].tolist()


def draws(select, times: int, scores_N: torch.Tensor, budget: int, **offered) -> list:
    return [tuple(chosen(select, scores_N, budget, uniform(len(scores_N), seed=seed), seed, **offered))
            for seed in range(times)]


def drawn(n: int, seed=0) -> torch.Tensor:
    """Random numbers of candidates in their order."""
    return uniform(n, seed=('drawn', seed)).sort().values


def slow_uniform(seed: int, number: float) -> float:
    """The number that SplitMix64 (its authors' C code) makes of a float's bits and a seed, in (0, 1)."""
    [bits] = struct.unpack('<Q', struct.pack('<d', number))
    state, mask = (seed + (bits + 1) * 0x9e3779b97f4a7c15) % 2**64, 2**64 - 1
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9 & mask
    state = (state ^ (state >> 27)) * 0x94d049bb133111eb & mask
    state ^= state >> 31
    return ((state >> 12) + .5) / 2**52


def is_plausible(picks: list, expected: dict) -> bool:
    """Whether draws follow a distribution, by a chi-square test."""
    assert set(picks) <= set(expected) and sum(expected.values()) == pytest.approx(1)
    counts = [picks.count(outcome) for outcome in expected]
    return scipy.stats.chisquare(counts, [share * len(picks) for share in expected.values()]).pvalue > 1e-3


# --- all of them -----------------------------------------------------------------------------------------------------


def offer(n: int, labelled: int, classes: int, seed: int, coarse: bool) -> dict:
    """All that a selector can ask for; with many copies and ties if coarse."""
    some = vectors(n + labelled, classes, seed)
    some = (some * 4).round().clamp_min(.1) if coarse else some
    scores = uniform(n + labelled, seed=seed)
    scores = (scores * 3).floor() if coarse else scores
    return dict(scores_N=scores[:n], vectors_ND=some[:n], labelled_LD=some[n:], labelled_scores_L=scores[n:],
                probs_NC=some[:n], predicted_NC=some[:n], labelled_predicted_LC=some[n:], draws_N=drawn(n, seed),
                number=n + labelled, progress=.5)


@pytest.mark.parametrize('name', SELECTORS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(2, 5), st.floats(0, 1), st.integers(0, 999), st.booleans())
def test_a_budget_of_different_candidates_is_chosen_and_the_same_again(name, n, labelled, classes, share, seed, coarse):
    budget, offered = max(1, round(share * n)), offer(n, labelled, classes, seed, coarse)
    first, again = (al_patch.call_offering(SELECTORS[name], offered['scores_N'], budget, generator(seed),
                                           **offered).tolist() for _ in range(2))
    assert first == again and len(first) == len(set(first)) == budget and set(first) <= set(range(n))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.floats(0, 1))
def test_topk_with_ties_in_the_order_of_rows(scores, share):
    budget = max(1, round(share * len(scores)))
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget]
    assert topk(torch.tensor(scores, dtype=torch.float64), budget, generator(0)).tolist() == expected


@pytest.mark.parametrize('name', SELECTORS)
def test_one_candidate_less_changes_few_picks(name):
    """Each draws for itself: without one of 200 nearly all of the other picks are the same. If it was not picked all of
    them are, but where candidates share what then moves: a batch, a class's number, clusters, whom they cover."""
    offered, everything = offer(200, 3, 4, 0, False), torch.arange(200)
    draws_N = uniform(200, seed='own')
    if name in ('real', 'typical'):
        offered.update(clusters=5)
    if name in ('real', 'typical', 'medoids'):
        offered.update(vectors_ND=offered['vectors_ND'] + 9 * torch.eye(5)[everything % 5, :4])

    def choose(rows: torch.Tensor) -> set:
        some = {key: value[rows] if key.endswith(('_N', '_ND', '_NC')) else value for key, value in offered.items()}
        some.pop('draws_N')
        return {*rows[chosen(SELECTORS[name], some.pop('scores_N'), 30, draws_N[rows], **some)].tolist()}

    before = choose(everything)
    shares = {gone: len(before & choose(everything[everything != gone])) / len(before - {gone})
              for gone in range(0, 200, 3)}
    unpicked = [share for gone, share in shares.items() if gone not in before]
    assert np.mean([*shares.values()]) > (.9 if name == 'herding' else .95) and len(unpicked) > 40
    assert np.mean([share == 1 for share in unpicked]) > dict(
        stochastic_batches=.9, class_balance=.7, real=.5, herding=.4, typical=.3, medoids=.5).get(name, .99)


@pytest.mark.parametrize('name', SELECTORS)
def test_the_order_in_which_candidates_come_changes_nothing(name):
    """Ties and copies among them: the collector sorts by draws."""
    offered, draws_N = offer(60, 3, 4, 0, True), uniform(60, seed='own')
    offered.pop('draws_N')
    scores_N, order = offered.pop('scores_N'), torch.randperm(60, generator=generator(1))
    turned = {key: value[order] if key.endswith(('_ND', '_NC')) else value for key, value in offered.items()}
    first = chosen(SELECTORS[name], scores_N, 25, draws_N, **offered)
    assert order[chosen(SELECTORS[name], scores_N[order], 25, draws_N[order], **turned)].tolist() == first


@pytest.mark.parametrize('name', SELECTORS)
def test_among_equals_every_candidate_has_its_chance(name):
    """Not the first of the pool, nor the last."""
    n, same = 40, torch.ones(40, dtype=torch.float64)
    alike = torch.full((n, 3), 1 / 3)
    offered = dict(vectors_ND=alike, probs_NC=alike, predicted_NC=alike, progress=.5, labelled_LD=alike[:2],
                   labelled_predicted_LC=alike[:2], labelled_scores_L=torch.ones(2, dtype=torch.float64))
    counts = np.bincount(np.concatenate(draws(SELECTORS[name], 300, same, 4, **offered)), minlength=n)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_other_random_numbers_of_the_same_candidates():
    draws_N = uniform(50)
    for stream in (0, 1, 999):
        assert al_patch.redraw(draws_N, stream).tolist() == [slow_uniform(stream, u) for u in draws_N.tolist()]
    many = [al_patch.redraw(uniform(20000), stream).numpy() for stream in range(3)]
    assert all(scipy.stats.kstest(each, 'uniform').pvalue > .01 for each in many)
    assert abs(np.corrcoef([uniform(20000).numpy(), *many])[np.triu_indices(4, 1)]).max() < .03


# --- at random among the highest -------------------------------------------------------------------------------------


def test_top_percent_draws_among_the_highest():
    scores_N = torch.randperm(1000, generator=generator(0)).double()
    picked = [scores_N[list(each)] for each in draws(top_percent, 40, scores_N, 10)]
    assert set(torch.cat(picked).tolist()) == set(range(950, 1000))  # all of them in turn, and no other
    assert set(scores_N[top_percent(scores_N, 10, generator(0), percent=1)].tolist()) == set(range(990, 1000))
    draws_N = uniform(1000)
    best = sorted(range(1000), key=lambda i: -scores_N[i])[:50]
    assert chosen(top_percent, scores_N, 10, draws_N) == sorted(best, key=lambda i: draws_N[i])[:10]


@pytest.mark.parametrize('budget', [1, 7, 49, 50, 51, 400, 1000])
def test_top_percent_draws_among_the_budget_at_least(budget):
    scores_N = uniform(1000)
    picks = top_percent(scores_N, budget, generator(2))
    assert len(set(picks.tolist())) == budget and (scores_N[picks] >= scores_N.sort().values[-max(50, budget)]).all()


# --- Gumbel noise ----------------------------------------------------------------------------------------------------


def literal_noise(draws_N: torch.Tensor, beta: float, stream: int = 0) -> list:
    return [-math.log(-math.log(slow_uniform(stream, u))) / beta for u in draws_N.tolist()]


def literal_order(select, scores: np.ndarray, beta: float, seed: int) -> list:
    noise = literal_noise(drawn(len(scores), seed), beta)
    ranks = 1 + scipy.stats.rankdata(-scores, 'ordinal') - 1
    base = {power_draw: np.log(scores), softmax_draw: scores, softrank_draw: -np.log(ranks)}[select]
    return np.argsort(-(base + noise), kind='stable').tolist()


LAWS = {power_draw: lambda s, rank, beta: s**beta, softmax_draw: lambda s, rank, beta: math.exp(beta * s),
        softrank_draw: lambda s, rank, beta: rank**-beta}
each_law = pytest.mark.parametrize('select', LAWS, ids=lambda select: select.__name__)


@each_law
@pytest.mark.parametrize('beta', [.5, 1, 8])
def test_the_highest_of_the_literal_formula_with_the_same_noise(select, beta):
    scores = uniform(300) + .01
    for seed, budget in itertools.product(range(5), (1, 40, 300)):
        expected = literal_order(select, scores.numpy(), beta, seed)[:budget]
        assert select(scores, budget, generator(0), drawn(300, seed), beta=beta).tolist() == expected


@each_law
@pytest.mark.parametrize('beta', [1, 2])
def test_draws_are_in_proportion(select, beta):
    scores = torch.tensor([.2, 1.1, .4, .7], dtype=torch.float64)
    ranks = [4, 1, 3, 2]
    weights = [LAWS[select](s, rank, beta) for s, rank in zip(scores.tolist(), ranks)]
    pairs = {(i, j): weights[i] / sum(weights) * weights[j] / (sum(weights) - weights[i])
             for i, j in itertools.permutations(range(4), 2)}
    assert is_plausible(draws(select, 1500, scores, 2, beta=beta), pairs)


def test_the_noise_is_gumbels():
    noise = al_patch.gumbel(drawn(20000), 4.)
    assert scipy.stats.kstest(noise.numpy(), scipy.stats.gumbel_r(scale=1 / 4).cdf).pvalue > .01


@each_law
def test_without_noise_it_is_topk(select):
    scores = uniform(100)
    assert select(scores, 20, generator(0), drawn(100), beta=1e9).tolist() == topk(scores, 20, generator(0)).tolist()


def test_power_takes_what_scores_nothing_last():
    scores = torch.tensor([0., 2, -1, 1e-3])
    assert {tuple(sorted(each)) for each in draws(power_draw, 20, scores, 2)} == {(1, 3)}


# --- stochastic batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n, budget, batches', [(60, 7, 100), (60, 7, 3), (60, 1, 100), (60, 31, 10), (60, 60, 4)])
def test_the_best_of_the_batches_that_were_drawn(n, budget, batches):
    scores, draws_N = uniform(n), drawn(n)
    numbers = [[slow_uniform(j, u) for u in draws_N.tolist()] for j in range(batches)]
    candidates = [sorted(range(n), key=lambda i: each[i])[:budget] for each in numbers]
    expected = max(candidates, key=lambda batch: scores[batch].mean())
    picks = stochastic_batches(scores, budget, generator(0), draws_N, batches=batches).tolist()
    assert sorted(picks) == sorted(expected)


def test_one_batch_is_random_and_many_are_better():
    scores = uniform(200)

    def mean(batches: int) -> float:
        picks = draws(stochastic_batches, 60, scores, 5, batches=batches)
        return scores.numpy()[np.array(picks)].mean()

    assert mean(1) == pytest.approx(float(scores.mean()), abs=.05) and mean(1) + .1 < mean(10) < mean(1000) - .05
    assert set(itertools.chain(*draws(stochastic_batches, 600, scores, 5, batches=1))) == set(range(200))


# --- k-center --------------------------------------------------------------------------------------------------------


def distances_to(points: np.ndarray, centre: np.ndarray, distance: str) -> np.ndarray:
    """Squared Euclidean, or the symmetric Kullback-Leibler divergence of two rows, mean over the classes that both
    have (`kl` of CDAL_CS.py, sharat29ag/CDAL at a5697b5, where a class that one has not is nan or infinite, and left
    out)."""
    if distance == 'euclidean':
        return ((points - centre)**2).sum(1)
    classes = math.isqrt(len(centre))
    with np.errstate(divide='ignore', invalid='ignore'):
        a, b = points.reshape(-1, classes, classes), centre.reshape(classes, classes)
        each = (a * np.log(a / b) + b * np.log(b / a)).sum(2) / 2
    each = np.where(np.isfinite(each), each, np.nan)
    common = np.isfinite(each).sum(1)
    return np.where(common, np.nansum(each, 1) / np.maximum(common, 1), 0)


def naive_kcenter(points: np.ndarray, budget: int, centres: np.ndarray, distance: str, first: int | None) -> list:
    nearest, picks = np.full(len(points), np.inf), []
    for centre in centres:
        nearest = np.minimum(nearest, distances_to(points, centre, distance))
    while len(picks) < budget:
        picks.append(int(nearest.argmax()) if picks or first is None else first)
        nearest = np.minimum(nearest, distances_to(points, points[picks[-1]], distance))
        nearest[picks] = -1
    return picks


def kcenter_of(points: torch.Tensor, budget: int, labelled: int = 0, distance='euclidean', scores=None, **options
               ) -> list:
    """The picks among all points but the first few, which are labelled."""
    scores = uniform(len(points) - labelled, seed='scores') if scores is None else scores
    return kcenter(scores, budget, generator(0), points[labelled:], points[:labelled], distance, **options).tolist()


@pytest.mark.parametrize('distance', ['euclidean', 'kl'])
@pytest.mark.parametrize('labelled', [0, 1, 9])
@pytest.mark.parametrize('n, d, budget', [(30, 2, 30), (1024, 3, 50), (3000, 3, 150), (5000, 8, 200), (2000, 40, 60)])
def test_kcenter_picks_as_the_naive_loop(monkeypatch, distance, labelled, n, d, budget):
    points, blocks = vectors(n + labelled, d) if distance == 'euclidean' else matrices(n + labelled, min(d, 8)), []
    traverse = al_patch.traverse
    monkeypatch.setattr(al_patch, 'traverse', lambda *args: blocks.append(len(args[4])) or traverse(*args))
    if distance == 'euclidean':
        points = points * 10 + 5  # far from the origin
    exact = points.double().numpy()
    first = None if labelled else int(uniform(n, seed='scores').argmax())
    expected = naive_kcenter(exact[labelled:], budget, exact[:labelled], distance, first)
    assert kcenter_of(points, budget, labelled, distance) == expected
    blocks = list(filter(None, blocks))
    waited = 1 < len(blocks) < budget / 2  # and looked again
    assert sum(blocks) == budget and (waited or n < 3000 or distance == 'kl')


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 3), st.floats(0, 1), st.integers(0, 999))
def test_among_ties_and_copies_kcenter_picks_one_of_the_farthest(n, d, labelled, share, seed):
    points = (4 * uniform(n + labelled, d, seed=seed)).floor()
    exact, budget = points.numpy(), max(1, round(share * n))
    nearest = np.full(n, np.inf)
    for centre in exact[:labelled]:
        nearest = np.minimum(nearest, distances_to(exact[labelled:], centre, 'euclidean'))
    picks = kcenter_of(points.float(), budget, labelled)
    for i, pick in enumerate(picks):
        assert nearest[pick] >= 0 and (i == labelled == 0 or nearest[pick] == pytest.approx(nearest.max(), abs=1e-4))
        nearest = np.minimum(nearest, distances_to(exact[labelled:], exact[labelled + pick], 'euclidean'))
        nearest[picks[:i + 1]] = -1


@pytest.mark.parametrize('distance', ['euclidean', 'kl'])
def test_kcenter_can_begin_with_the_highest_score_where_some_is_labelled(distance):
    points = vectors(40, 4) if distance == 'euclidean' else matrices(40, 4)
    first, exact = int(uniform(35, seed='scores').argmax()), points.double().numpy()
    assert kcenter_of(points, 9, 5, distance, first='highest') == naive_kcenter(
        exact[5:], 9, exact[:5], distance, first) != kcenter_of(points, 9, 5, distance)


def test_class_matrices_apart_by_hand():
    """Two classes that both have, one that only one has; and two images with no common class."""
    log, at = math.log, torch.tensor([[.5, .5, 0], [.2, .8, 0], [0, 0, 0]]).new_tensor
    one = at([[.5, .25, .25], [.2, .4, .4], [0, 0, 0]]).flatten()
    two = at([[.25, .5, .25], [.2, .4, .4], [.1, .1, .8]]).flatten()
    three = at([[0, 0, 0], [0, 0, 0], [.3, .3, .4]]).flatten()
    some = torch.stack([one, two, three])
    points = al_patch.bilinear_form(some, some, 'kl')
    found = al_patch.apart(points, points) + points[2][:, None]
    third = (.2 * log(3) + .2 * log(3) + .4 * log(2)) / 2  # of two and three
    assert found.tolist() == [pytest.approx(each, abs=1e-5) for each in (
        [0, .25 * log(2) / 2, 0], [.25 * log(2) / 2, 0, third], [0, third, 0])]


@pytest.mark.parametrize('distance', ['euclidean', 'kl'])
def test_kcenter_with_copies_in_a_large_pool(distance):
    some = vectors(700, 3) if distance == 'euclidean' else vectors(2100, 3).view(700, 9)
    points = some.repeat(4, 1)[torch.randperm(2800, generator=generator(0))]
    picks = kcenter_of(points, 750, 0, distance)
    assert len(points[picks[:700]].unique(dim=0)) > 690  # hardly a copy, as long as there is something else
    assert len(set(picks)) == 750


def test_kcenter_starts_with_the_highest_score_and_goes_far_away():
    points = torch.tensor([[0., 0], [1, 0], [9, 0], [0, 5]])
    assert kcenter_of(points, 3, scores=torch.tensor([.1, .9, .3, .4])) == [1, 2, 3]
    assert kcenter_of(torch.cat([torch.tensor([[8., 0]]), points]), 2, 1) == [3, 1]


# --- k-means++ -------------------------------------------------------------------------------------------------------


def seeding_law(points: np.ndarray) -> dict:
    """The probability of each (second, third) pick."""
    first, law = int((points**2).sum(1).argmax()), {}
    near = distances_to(points, points[first], 'euclidean')
    for second in np.flatnonzero(near):
        then = np.minimum(near, distances_to(points, points[second], 'euclidean'))
        law.update({(second, third): near[second] / near.sum() * then[third] / then.sum()
                    for third in np.flatnonzero(then)})
    return law


def test_the_second_and_third_pick_are_drawn_by_squared_distance():
    points = torch.tensor([[3., 0], [0, 1], [1, -1], [-2, 0], [-1, .5]])
    picks = draws(kmeanspp, 600, torch.zeros(5), 3, vectors_ND=points)
    assert {each[0] for each in picks} == {0}
    assert is_plausible([each[1:] for each in picks], seeding_law(points.double().numpy()))


def test_a_third_pick_after_a_far_second_is_drawn_so_too():
    """One point is so far off that the others' clocks have hardly run when it rings."""
    points = torch.tensor([[1010., 0], [-1000, 0], [1000, 14], [1004, -9], [990, 4], [1002, 12]])
    picks = draws(kmeanspp, 500, torch.zeros(6), 3, vectors_ND=points)
    law = {third: share for (second, third), share in seeding_law(points.double().numpy()).items() if second == 1}
    third = [each[2] for each in picks if each[:2] == (0, 1)]
    assert len(third) > .98 * len(picks)
    assert is_plausible(third, {k: v / sum(law.values()) for k, v in law.items()})


def literal_clocks(points: np.ndarray, draws_N: list, budget: int) -> list:
    """All clocks run from one ring to the next."""
    left, picks = [-math.log(u) for u in draws_N], [int((points**2).sum(1).argmax())]
    rates = distances_to(points, points[picks[0]], 'euclidean')
    while len(picks) < budget:
        times = np.where(np.isin(range(len(points)), picks), np.inf, left / np.maximum(rates, 1e-30))
        picks.append(int(times.argmin()))
        left = left - np.maximum(rates, 1e-30) * times.min()
        rates = np.minimum(rates, distances_to(points, points[picks[-1]], 'euclidean'))
    return picks


@pytest.mark.parametrize('n, d, budget', [(40, 2, 40), (400, 4, 300), (3000, 3, 200), (5000, 8, 700), (2000, 40, 60)])
def test_kmeanspp_picks_as_the_literal_clocks(monkeypatch, n, d, budget):
    points, draws_N, blocks, run = vectors(n, d), drawn(n), [], al_patch.traverse
    monkeypatch.setattr(al_patch, 'traverse', lambda *args: blocks.append(len(args[4])) or run(*args))
    picks = kmeanspp(torch.zeros(n), budget, generator(0), points, draws_N).tolist()
    assert picks == literal_clocks(points.double().numpy(), draws_N.tolist(), budget)
    assert sum(blocks) == budget and len(blocks) < budget / 2  # it waited, and looked again
    assert picks != kmeanspp(torch.zeros(n), budget, generator(0), points, drawn(n, 1)).tolist()


def test_kmeanspp_spreads_better_than_chance():
    points = vectors(2000, 4).double().numpy()

    def cost(picks) -> float:
        return np.min([distances_to(points, points[i], 'euclidean') for i in picks], 0).mean()

    seeds = draws(kmeanspp, 4, torch.zeros(2000), 150, vectors_ND=torch.from_numpy(points))
    chance = np.mean([cost(np.random.default_rng(seed).choice(2000, 150, False)) for seed in range(4)])
    assert np.mean([cost(each) for each in seeds]) < .95 * chance


def test_of_copies_kmeanspp_takes_each_once_and_the_rest_at_random():
    points = torch.tensor([[1., 0]] * 3 + [[0, 2]] * 3)
    picks = draws(kmeanspp, 60, torch.zeros(6), 5, vectors_ND=points)
    assert {each[0] for each in picks} == {3, 4, 5} and {each[1] for each in picks} == {0, 1, 2}
    assert all(len(set(each)) == 5 for each in picks) and {each[4] for each in picks} == set(range(6))
    assert len(set(draws(kmeanspp, 60, torch.zeros(6), 6, vectors_ND=torch.ones(6, 2)))) > 40


# --- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n, d, clusters', [(60, 2, 5), (900, 6, 20), (20_000, 16, 9), (8, 3, 8), (50, 1, 1)])
def test_kmeans_is_lloyds(n, d, clusters):
    """In double precision, pass by pass; far from the origin."""
    some = uniform(n, d) + 3 * uniform(7, d, seed=1)[(7 * uniform(n, seed=2)).long()]
    points, start = (some + 40).float(), torch.arange(n)[uniform(n, seed=3).argsort()[:clusters]]
    x, before = points.double().numpy(), None
    centres = x[start.numpy()]
    for _ in range(100):
        cluster = ((x[:, None] - centres)**2).sum(2).argmin(1)
        if before is not None and (cluster == before).all():
            break
        before = cluster
        centres = np.array([x[cluster == j].mean(0) if (cluster == j).any() else centres[j] for j in range(clusters)])
    same = (al_patch.kmeans(points, start).numpy() == cluster).mean()
    assert same == 1 or n > 1000 and same > .99  # 91 times, in which what rounding does to one moves others


def test_an_empty_cluster_keeps_its_centre():
    points = torch.tensor([[0.], [0.], [1.], [9.]])
    assert al_patch.kmeans(points, torch.tensor([0, 1, 3])).tolist() == [1, 1, 0, 2]  # the first of equals, at first


@pytest.mark.parametrize('n, budget', [(40, 1), (60, 7), (300, 40)])
def test_medoids_are_the_nearest_to_the_means_of_kmeans_clusters(n, budget):
    points, draws_N = vectors(n, 4), drawn(n)
    start = kmeanspp(draws_N, budget, generator(0), points, draws_N)
    x, cluster = points.double().numpy(), al_patch.kmeans(points, start).numpy()
    expected = set()
    for j in range(budget):
        members = np.flatnonzero(cluster == j)
        expected.add(members[((x[members] - x[members].mean(0))**2).sum(1).argmin()])
    assert {*medoids(draws_N, budget, generator(0), points, draws_N).tolist()} == expected


# --- MaxHerding ------------------------------------------------------------------------------------------------------


def herding_gains(points: np.ndarray, labelled: np.ndarray, picks: list, radius: float) -> tuple[list, list]:
    """What each pick adds, and the most that one could add then: all gains anew for each pick."""
    points, labelled = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (points, labelled))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None] - b[None])**2).sum(2) / radius**2)

    cover = kernel(points, labelled).max(1) if len(labelled) else np.zeros(len(points))
    similar, gains, most = kernel(points, points), [], []
    for i, pick in enumerate(picks):
        gain = np.maximum(similar - cover[:, None], 0).mean(0)
        gain[picks[:i]] = -1
        gains.append(gain[pick])
        most.append(gain.max())
        cover = np.maximum(cover, similar[:, pick])
    return gains, most


@pytest.mark.parametrize('labelled', [0, 1, 9])
@pytest.mark.parametrize('n, budget, radius', [(30, 30, 1.), (200, 25, .3), (500, 60, .1)])
def test_herding_picks_what_adds_most(labelled, n, budget, radius):
    points = vectors(n + labelled, 6).double()
    picks = herding(torch.zeros(n), budget, generator(0), points[labelled:], points[:labelled], radius).tolist()
    gains, most = herding_gains(points[labelled:].numpy(), points[:labelled].numpy(), picks, radius)
    assert len(set(picks)) == budget and gains == pytest.approx(most, abs=1e-12)


def test_herding_takes_the_middle_of_the_larger_crowd_first():
    angles = torch.tensor([0., 1, 2, 40, 41, 42, 43, 44]).deg2rad()
    points = 7 * torch.stack([angles.cos(), angles.sin()], 1)
    assert herding(torch.zeros(8), 2, generator(0), points, points[:0], radius=.1).tolist() == [5, 1]
    assert herding(torch.zeros(8), 1, generator(0), points, points[5:6], radius=.1).tolist() == [1]


# --- TypiClust -------------------------------------------------------------------------------------------------------


def literal_typical(x: np.ndarray, cluster: np.ndarray, known: int, budget: int, neighbours: int) -> list:
    """As its authors select, but for distances, which the paper has and their code squares."""
    cluster, picks = cluster.copy(), []
    ids, sizes = np.unique(cluster, return_counts=True)
    order = sorted((j for j, size in zip(ids, sizes) if size > 5),
                   key=lambda j: ((cluster[:known] == j).sum(), -(cluster == j).sum()))
    cluster[:known] = -1
    for i in range(budget):
        rows = np.flatnonzero(cluster == order[i % len(order)])
        k = min(neighbours, len(rows) // 2)
        far = np.sqrt(((x[rows][:, None] - x[rows][None])**2).sum(2))
        picks.append(int(rows[np.sort(far, 1)[:, 1:k + 1].mean(1).argmin()]))
        cluster[picks[-1]] = -1
    return [pick - known for pick in picks]


@pytest.mark.parametrize('known', [0, 3, 8])
@pytest.mark.parametrize('n, budget, clusters', [(80, 4, 500), (300, 20, 9), (400, 12, 500)])
def test_typical_picks_as_its_authors(known, n, budget, clusters):
    everything = uniform(n + known, 3) + 3 * uniform(7, 3, seed=1)[(7 * uniform(n + known, seed=2)).long()]
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(al_patch, 'kmeans', lambda *args, kmeans=al_patch.kmeans: seen.setdefault(0, kmeans(*args)))
        picks = typical(torch.zeros(n), budget, generator(0), everything[known:], drawn(n), everything[:known],
                        clusters, 20)
    cluster = seen[0].numpy()
    assert len(np.unique(cluster)) == min(known + budget, clusters)
    assert picks.tolist() == literal_typical(everything.numpy(), cluster, known, budget, 20)


def test_small_clusters_give_what_the_large_ones_cannot():
    points = torch.cat([torch.arange(8.)[:, None] / 100, torch.tensor([[50.], [90.]])])
    picks = typical(torch.zeros(10), 10, generator(0), points, drawn(10), points[:0], clusters=3).tolist()
    assert sorted(picks) == list(range(10)) and set(picks[:8]) == set(range(8))


# --- REAL ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clustered(monkeypatch):
    """A function that selects by REAL with given clusters."""

    def choose(cluster_N: list, probs_NC: torch.Tensor, budget: int, seed=0, clusters=None) -> list:
        n, draws_N = len(cluster_N), uniform(len(cluster_N), seed=seed)
        clusters_N = np.array(cluster_N)[draws_N.argsort().numpy()]
        monkeypatch.setattr(al_patch, 'kmeans', lambda vectors_ND, start_K: torch.as_tensor(clusters_N))
        clusters = max(cluster_N) + 1 if clusters is None else clusters
        return chosen(representative_errors, torch.zeros(n), budget, draws_N, vectors_ND=vectors(n, 3),
                      probs_NC=probs_NC, clusters=clusters)

    return choose


def literal_real(cluster_N: list, p: np.ndarray, budget: int, draws_N: list) -> list:
    n, clusters, doubt = len(p), range(max(cluster_N) + 1), np.zeros(len(p))
    predicted, value, errors = [int(each.argmax()) for each in p], {}, {}
    for j in clusters:
        members = [i for i in range(n) if cluster_N[i] == j]
        votes = [predicted[i] for i in members]
        majority = max(range(p.shape[1]), key=votes.count)
        for i in members:
            doubt[i] = 1 - p[i, majority]
        errors[j] = [i for i in members if predicted[i] != majority]
        value[j] = sum(doubt[i] for i in errors[j])
    quota = {j: math.floor(budget * value[j] / sum(value.values())) for j in clusters}
    for j in sorted(clusters, key=lambda j: -value[j])[:budget - sum(quota.values())]:
        quota[j] += 1
    picks = []
    for j in clusters:
        if len(errors[j]) > quota[j]:
            picks += sorted(errors[j], key=lambda i: draws_N[i])[:quota[j]]
        else:
            members = [i for i in range(n) if cluster_N[i] == j]
            picks += sorted(members, key=lambda i: -doubt[i])[:quota[j]]
    rest = sorted(set(range(n)) - set(picks), key=lambda i: (-doubt[i], i))
    return picks + rest[:budget - len(picks)]


@pytest.mark.parametrize('n, clusters, budget', [(60, 4, 9), (60, 4, 30), (60, 7, 3), (60, 1, 20), (60, 3, 60)])
@pytest.mark.parametrize('sharpness', [1, 4])
def test_real_follows_its_definition(clustered, n, clusters, budget, sharpness):
    cluster_N = torch.randint(clusters, (n, ), generator=generator(n, clusters)).tolist()
    cluster_N[0] = clusters - 1
    probs = (sharpness * torch.randn(n, 4, generator=generator(0)) + torch.tensor([2., 0, 0, 0])).softmax(1)
    expected = literal_real(cluster_N, probs.double().numpy(), budget, uniform(n, seed=7).tolist())
    assert clustered(cluster_N, probs, budget, 7) == expected


def test_the_quotas_of_real_by_hand(clustered):
    """Two clusters of majority 0, with two and four pseudo-errors of doubt .8: a third and two thirds of the budget."""
    probs = torch.tensor([[.9, .1]] * 5 + [[.2, .8]] * 2 + [[.9, .1]] * 5 + [[.2, .8]] * 4)
    picks = [clustered([0] * 7 + [1] * 9, probs, 3, seed) for seed in range(80)]
    assert all(sum(i in (5, 6) for i in each) == 1 and sum(i >= 12 for i in each) == 2 for each in picks)
    assert {i for each in picks for i in each} == {5, 6, 12, 13, 14, 15}


def test_where_pseudo_errors_do_not_suffice_real_takes_the_most_doubtful(clustered):
    probs = torch.tensor([[.9, .1], [.7, .3], [.8, .2], [.4, .6], [.55, .45]])
    assert clustered([0] * 5, probs, 3) == [3, 4, 1]


@pytest.mark.parametrize('budget, picks', [(1, {3, 4}), (2, {1, 2}), (3, {1, 2, 3})])
def test_pseudo_errors_are_drawn_only_where_there_are_more_than_the_quota(clustered, budget, picks):
    """As in the authors' code: else the most doubtful of the cluster, though they be predicted as its majority."""
    probs = torch.tensor([[.8, .1, .1], [.36, .32, .32], [.38, .31, .31], [.4, .6, 0], [.45, 0, .55]])
    chosen = [clustered([0] * 5, probs, budget, seed) for seed in range(20)]
    assert {i for each in chosen for i in each} == picks


def test_without_pseudo_errors_real_takes_the_most_doubtful_of_all(clustered):
    probs = torch.tensor([[.9, .1], [.6, .4], [.2, .8], [.3, .7], [.85, .15]])
    assert clustered([0, 0, 1, 1, 0], probs, 3) == [1, 3, 2]


def test_a_cluster_that_fell_empty_gets_nothing(clustered):
    probs = torch.tensor([[.9, .1], [.8, .2], [.4, .6], [.1, .9]])
    assert sorted(clustered([0, 0, 0, 2], probs, 1, clusters=4)) == [2]


def test_real_clusters_for_itself():
    """Two clouds; in each, some that are predicted as the other one."""
    points = torch.cat([torch.randn(50, 3, generator=generator(i)) + 20 * i for i in range(2)])
    probs = torch.tensor([[.9, .1]] * 50 + [[.1, .9]] * 50)
    wrong = [3, 20, 41, 60, 77, 98]
    probs[wrong] = probs[wrong].flip(1)
    picks = representative_errors(torch.zeros(100), 6, generator(0), points, drawn(100), probs, clusters=2)
    assert sorted(picks.tolist()) == wrong


# --- class balance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('labelled', [0, 30])
def test_class_balance_follows_its_definition(labelled):
    """Scale and shares are of all superpixels (region_selection_using_al.py, lines 100 to 140, of
    cailile/Revisiting-Superpixels-for-Active-Learning at 214b4fe)."""
    shares, scores = vectors(80 + labelled, 4).double(), 3 * uniform(80 + labelled) - 1
    scores[80:] *= 2
    predicted = shares.argmax(1).tolist()
    low, high = float(scores.min()), float(scores.max())
    value = [(s - low) / (high - low) * math.exp(-predicted.count(c) / len(scores))
             for s, c in zip(scores.tolist(), predicted)]
    for budget in (1, 15, 80):
        expected = sorted(range(80), key=lambda i: (-value[i], i))[:budget]
        assert class_balance(scores[:80], budget, generator(0), shares[:80], scores[80:], shares[80:]
                             ).tolist() == expected


def test_of_equally_informative_ones_those_of_the_rare_class_come_first():
    probs = torch.eye(3)[[0, 0, 1, 0, 2, 0, 1]]
    assert class_balance(torch.tensor([1., 1, 1, 1, 1, 1, 0]), 3, generator(0), probs, torch.empty(0), probs[:0]
                         ).tolist() == [4, 2, 0]


# --- foreground ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('background', [0, 2])
def test_a_share_is_drawn_where_the_model_predicts_foreground(background):
    """1 in 20 candidates shows foreground: a third of the budget are such, and 1 in 20 of the rest."""
    predicted = torch.zeros(1000, 3)
    predicted[:, background] = 1
    predicted[::20] = torch.tensor([1 / 3] * 3)
    picks = np.array(draws(al_patch.foreground_draw, 200, uniform(1000), 30, predicted_NC=predicted, foreground=1 / 3,
                           background=background))
    shown = (picks % 20 == 0).sum(1)
    assert shown.min() >= 10 and shown.mean() == pytest.approx(10 + 20 * 40 / 990, abs=.3)
    for which in (np.arange(1000) % 20 == 0, np.arange(1000) % 20 > 0):
        counts = np.bincount(picks.reshape(-1), minlength=1000)[which]
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_foreground_is_drawn_in_proportion_to_its_share():
    shares = torch.tensor([0., .1, .2, .7])
    picks = draws(al_patch.foreground_draw, 2000, torch.zeros(4), 1, predicted_NC=torch.stack([1 - shares, shares], 1),
                  foreground=1.)
    assert is_plausible([pick for [pick] in picks], {1: .1, 2: .2, 3: .7})


def test_without_foreground_it_is_random():
    picks = draws(al_patch.foreground_draw, 600, torch.zeros(30), 4, predicted_NC=torch.eye(2)[torch.zeros(30).long()])
    assert scipy.stats.chisquare(np.bincount(np.array(picks).reshape(-1), minlength=30)).pvalue > 1e-3
    picks = draws(al_patch.foreground_draw, 600, torch.zeros(30), 4, predicted_NC=torch.eye(2)[torch.arange(30) % 2],
                  background=None)
    assert scipy.stats.chisquare(np.bincount(np.array(picks).reshape(-1), minlength=30)).pvalue > 1e-3


def literal_class_power(scores, vectors_ND, budget, g, draws_N, beta, share, background=0) -> list:
    (n, classes), picks = vectors_ND.shape, []
    balanced, shuffled = int(budget * share), torch.randperm(classes, generator=g).tolist()
    if background is not None:
        shuffled.remove(background)
    quota = {c: balanced // len(shuffled) for c in shuffled}
    for c in shuffled[:balanced % len(shuffled)]:
        quota[c] += 1
    for c in [*shuffled, classes]:
        column, k = (vectors_ND[:, c].tolist(), quota[c]) if c < classes else (scores.tolist(), budget - balanced)
        noise = literal_noise(draws_N, beta, c)
        noisy = [math.log(value) + each for value, each in zip(column, noise)]
        left = sorted(set(range(n)) - set(picks), key=lambda i: (-noisy[i], i))
        picks += left[:k]
    return picks


@pytest.mark.parametrize('progress, beta', [(0, 1), (.5, 10), (1, 100)])
@pytest.mark.parametrize('budget', [1, 10, 47, 100])
def test_class_balanced_power_follows_its_definition_and_its_beta_grows(progress, beta, budget):
    scores, some = uniform(100), uniform(100, 3, seed=1)
    expected = literal_class_power(scores, some, budget, generator(5), drawn(100), beta, .66)
    assert class_balanced_power(scores, budget, generator(5), some, drawn(100), progress).tolist() == expected


def test_the_schedule_of_beta_can_be_set(monkeypatch):
    betas, gumbel = [], al_patch.gumbel
    monkeypatch.setattr(al_patch, 'gumbel', lambda draws, beta, *args: betas.append(beta) or gumbel(draws, beta, *args))
    for progress in (0, .5, 1):
        class_balanced_power(uniform(9), 4, generator(0), uniform(9, 1), drawn(9), progress, background=None,
                             betas=[4., 1.])
    assert betas == pytest.approx([4, 4, 2, 2, 1, 1])


@pytest.mark.parametrize('background', [0, 2, None])
def test_the_background_has_no_quota(background):
    scores, some = uniform(100), uniform(100, 3, seed=1)
    expected = literal_class_power(scores, some, 31, generator(5), drawn(100), 10, .66, background)
    found = class_balanced_power(scores, 31, generator(5), some, drawn(100), .5, background=background).tolist()
    assert found == expected
    apart = torch.eye(3)[torch.arange(300) % 3]  # candidate i is of class i % 3 alone, and scores ask for class 0
    found = class_balanced_power(apart[:, 0], 30, generator(0), apart, drawn(300), 1., background=2)
    assert np.bincount(found.numpy() % 3, minlength=3)[2] == 0


def test_beta_over_five_queries(make_state, monkeypatch):
    """Spaced as in nnActive, to the digit that it prints."""
    state, betas = make_state(dict(strategy='random', rounds=5, budget=1, initial=1)), []
    for k in range(1, 6):
        state.rounds = [dict(asked={})] * k
        betas.append(100**al_patch.Query(state, None).collector.progress)
    assert betas == pytest.approx([1, 2.5, 6.3, 15.9, 39.8], abs=.06)


@pytest.mark.parametrize('share', [0., 1.])
def test_all_of_the_budget_can_go_by_score_or_by_class(share):
    scores, some = uniform(60), uniform(60, 3, seed=1)
    expected = literal_class_power(scores, some, 20, generator(5), drawn(60), 10, share)
    assert class_balanced_power(scores, 20, generator(5), some, drawn(60), .5, share=share).tolist() == expected


def test_every_class_gets_its_part_and_the_remainder_goes_to_any():
    """Candidate i is of class i % 4 alone; what the scores ask for is of class 0."""
    some = torch.eye(4)[torch.arange(400) % 4]
    scores = some[:, 0]
    counts = [np.bincount(np.array(each) % 4, minlength=4).tolist()
              for each in draws(class_balanced_power, 60, scores, 21, vectors_ND=some, progress=1., background=None)]
    assert {sum(each) for each in counts} == {21}  # int(.66 * 21) = 13 = 3 * 4 + 1, and 8 by score
    assert {tuple(each) for each in counts} == {(12, 3, 3, 3), (11, 4, 3, 3), (11, 3, 4, 3), (11, 3, 3, 4)}


# --- barycentre ------------------------------------------------------------------------------------------------------


def naive_barycentre(points: np.ndarray, scores: np.ndarray, labelled: int, budget: int, tau: float) -> list:
    """Points and scores of the labelled ones come first."""

    def away(i: int, j: int) -> float:
        return np.linalg.norm(points[i] - points[j])**tau * (scores[j] / (scores[i] + scores[j]))**(1 - tau)

    have, free = list(range(labelled)), list(range(labelled, len(points)))
    for _ in range(budget):
        value = [np.mean([away(i, j) for i in have]) + min(away(i, j) for i in have) if have else scores[j]
                 for j in free]
        have.append(free.pop(int(np.argmax(value))))
    return [i - labelled for i in have[labelled:]]


@pytest.mark.parametrize('labelled', [0, 1, 6])
@pytest.mark.parametrize('tau', [0., .5, 1.])
def test_barycentre_follows_its_definition(labelled, tau):
    points, scores = vectors(40 + labelled, 3), uniform(40 + labelled) + .01
    picks = barycentre(scores[labelled:], 12, generator(0), points[labelled:], points[:labelled], scores[:labelled],
                       tau=tau).tolist()
    assert picks == naive_barycentre(points.double().numpy(), scores.numpy(), labelled, 12, tau)


def test_barycentre_by_hand():
    """From the labelled one at 0 with score 1: 4^.5 (1/2)^.5 = 1.41 and 9^.5 (.2/1.2)^.5 = 1.22."""
    args = torch.tensor([[4.], [9.]]), torch.tensor([[0.]]), torch.tensor([1.])
    assert barycentre(torch.tensor([1., .2]), 1, generator(0), *args).tolist() == [0]
    assert barycentre(torch.tensor([1., .2]), 1, generator(0), *args, tau=1.).tolist() == [1]


def test_barycentre_of_scores_of_zero():
    picks = barycentre(torch.zeros(6), 4, generator(0), vectors(6, 2), vectors(2, 2, 1), torch.zeros(2)).tolist()
    assert len(set(picks)) == 4
