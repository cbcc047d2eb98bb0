"""Strategies: scores by hand and by definition, the registries, what a name stands for, and a query of each."""
import ast
import inspect
import math
import os
import os.path as osp
import re

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import torch.nn.functional as F

import al_patch
from al_patch import (
    AL_EMBEDDINGS,
    AL_SCORES,
    AL_SELECTORS,
    AL_STRATEGIES,
    OFFERED,
    box_sum,
    conformal_risk,
    generator,
    impurity,
    read_state,
    resolve_strategy,
    ripu,
    ripu_pixel,
    window_pixels,
)

SCORES, EMBEDDINGS, SELECTORS, PRESETS = (registry.module_dict for registry in (
    AL_SCORES, AL_EMBEDDINGS, AL_SELECTORS, AL_STRATEGIES))
PROBS = torch.tensor([[.5, .3, .2], [1., 0., 0.], [.25, .25, .5]]).T[None, :, None]  # (1, 3, 1, 3): three pixels
BY_HAND = dict(
    least_confidence=[.5, 0., .5],
    margin=[1 - (.5 - .3), 1 - (1 - 0), 1 - (.5 - .25)],
    ratio=[.3 / .5, 0., .5],
    entropy=[.5 * math.log(2) - .3 * math.log(.3) - .2 * math.log(.2), 0., 1.5 * math.log(2)])


@pytest.mark.parametrize('name', BY_HAND)
def test_scores(name):
    scores_NHW = SCORES[name](PROBS)
    assert scores_NHW.shape == (1, 1, 3)
    assert scores_NHW.flatten().tolist() == pytest.approx(BY_HAND[name], abs=1e-6)


@pytest.mark.parametrize('name, highest', dict(least_confidence=.75, margin=1., ratio=1., entropy=math.log(4)).items())
def test_uniform_probabilities_score_highest(name, highest):
    assert SCORES[name](torch.full((1, 4, 2, 2), .25)).flatten().tolist() == pytest.approx([highest] * 4)


# --- scores of several dropout passes --------------------------------------------------------------------------------


def score_of(name: str, passes_TCHW: torch.Tensor) -> torch.Tensor:
    """A score of passes over one image, from what is averaged over them. (H, W)"""
    means = {key: function(passes_TCHW).mean(0, keepdim=True) for key, function in al_patch.STATISTICS.items()}
    return al_patch.call_offering(SCORES[name], means['probs_NCHW'], **means)[0]


def entropy_of(shares) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


LITERAL = dict(  # of the T passes over one pixel, (T, C)
    variation_ratio=lambda p: 1 - max(np.bincount(p.argmax(1))) / len(p),
    mean_std=lambda p: np.mean([math.sqrt(np.mean((column - column.mean())**2)) for column in p.T]),
    bald=lambda p: entropy_of(p.mean(0)) - np.mean([entropy_of(each) for each in p]),
    balent=lambda p: literal_balance(p))


def literal_balance(p: np.ndarray) -> float:
    """With the differential entropy of scipy's Beta distribution."""
    total, uncertain = 0, entropy_of(p.mean(0))
    for mean, variance in zip(p.mean(0), p.var(0)):
        n = mean * (1 - mean) / variance - 1  # a + b, of the Beta distribution with these moments
        total += mean * scipy.stats.beta(mean * n + 1, (1 - mean) * n).entropy()
    balance = (total + uncertain) / (uncertain + math.log(2))
    return balance if balance < 0 else 1 / balance


@pytest.mark.parametrize('name', LITERAL)
@pytest.mark.parametrize('t, c', [(2, 2), (5, 4), (20, 19)])
def test_scores_of_passes_follow_their_definition(name, t, c):
    passes = (4 * torch.randn(t, c, 3, 5, generator=generator(t, c))).softmax(1)
    slow = np.array([[LITERAL[name](passes[:, :, y, x].double().numpy()) for x in range(5)] for y in range(3)])
    assert score_of(name, passes.double()).numpy() == pytest.approx(slow, abs=1e-5)
    assert slow.std() > 1e-3


@pytest.mark.parametrize('name, value', dict(variation_ratio=.5, mean_std=.5, bald=math.log(2)).items())
def test_passes_that_contradict_each_other_by_hand(name, value):
    assert score_of(name, torch.eye(2)[..., None, None]).tolist() == [[pytest.approx(value)]]


def test_balanced_entropy_by_hand():
    """p is uniform on (0, 1) for both classes; after a label it is Beta(2, 1), whose entropy is 1/2 - ln 2."""
    half, moment = torch.full((1, 2, 1, 1), .5), torch.full((1, 2, 1, 1), 1 / 3)
    balance = (.5 - math.log(2) + math.log(2)) / (math.log(2) + math.log(2))
    assert SCORES['balent'](half, moment).item() == pytest.approx(1 / balance)


@pytest.mark.parametrize('sure', [0., 1e-12])
def test_balanced_entropy_of_what_is_certain_is_a_number_and_comes_last(sure):
    passes = torch.tensor([1 - sure, sure]).view(1, 2, 1, 1).expand(4, 2, 1, 1)
    torn = torch.eye(2)[[0, 1, 0, 1], :, None, None]
    doubtful = (2 * torch.randn(4, 2, 3, 3, generator=generator(0))).softmax(1)
    assert (score_of('balent', passes) < score_of('balent', doubtful)).all() and score_of('balent', torn).isfinite()


def test_one_versus_rest_by_hand():
    def of_two(p: float) -> float:
        return entropy_of([p, 1 - p])
    expected = [of_two(.5) + of_two(.3) + of_two(.2), 0, of_two(.25) * 2 + of_two(.5)]
    assert SCORES['one_vs_rest'](PROBS).flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('name', [name for name in LITERAL if name != 'balent'])
def test_passes_that_agree_score_nothing_however_uncertain(name):
    passes = torch.rand(1, 7, 4, 4, generator=generator(0)).softmax(1).expand(6, -1, -1, -1)
    scores = score_of(name, passes)
    assert (scores >= 0).all() and scores.max() < 1e-3


# --- the conformal risk ----------------------------------------------------------------------------------------------


def literal_risk(p_CHW: np.ndarray, thresholds_C: np.ndarray) -> np.ndarray:
    c, h, w = p_CHW.shape
    sets = [[{i for i in range(c) if p_CHW[i, y, x] >= thresholds_C[i]} for x in range(w)] for y in range(h)]
    together = np.array([[sum(i in each and j in each for row in sets for each in row) for j in range(c)]
                         for i in range(c)], float)**2
    weights = [entropy_of(row / max(row.sum(), 1)) / math.log(c) for row in together]
    return np.array([[sum(weights[i] for i in each) / sum(weights) for each in row] for row in sets])


@pytest.mark.parametrize('c', [2, 5, 19])
def test_conformal_risk_follows_its_definition(c):
    probs = (2 * torch.randn(2, c, 6, 7, generator=generator(c))).softmax(1)
    thresholds = torch.linspace(.01, .4, c)
    slow = [literal_risk(each, thresholds.double().numpy()) for each in probs.double().numpy()]
    assert conformal_risk(probs, thresholds).numpy() == pytest.approx(np.stack(slow), abs=1e-5)
    assert np.std(slow) > .01


def test_conformal_risk_by_hand():
    """Class 2 is in no other's company: its row has no entropy. 0 and 1 are alone once, and together once."""
    probs = torch.tensor([[.8, .1, .1], [.1, .8, .1], [.5, .5, 0], [0, 0, 1]]).T[None, :, None]
    assert conformal_risk(probs, torch.full((3, ), .5)).flatten().tolist() == pytest.approx([.5, .5, 1, 0])


def test_conformal_risk_of_classes_that_are_never_confused_is_nothing():
    assert conformal_risk(torch.eye(3)[None, :, None], torch.full((3, ), .5)).tolist() == [[[0] * 3]]


def test_a_class_of_one_pixel_counts_in_full_however_large_the_image():
    """Its row is that of a small image: shared with the class of all other pixels, which are in its company once."""
    probs = torch.full((1, 3, 1500, 1500), 0.)
    probs[:, 0] = 1
    probs[:, :, 0, 0] = torch.tensor([.5, .5, 0])
    shares = EMBEDDINGS['cooccurrence'](probs[0], torch.full((3, ), .5)).view(3, 3)
    assert shares[1].tolist() == pytest.approx([.5, .5, 0])


# --- RIPU ------------------------------------------------------------------------------------------------------------


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


def test_ripu_by_hand():
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


# --- the registries --------------------------------------------------------------------------------------------------

FUNCTIONS = {**SCORES, **EMBEDDINGS, **SELECTORS}
HERE = osp.dirname(osp.abspath(al_patch.__file__))


def first_parameters(function) -> list:
    return list(inspect.signature(function).parameters)


def is_a_strategy(name: str) -> bool:
    """Whether a score's name alone is one: not where it needs an option."""
    try:
        return bool(resolve_strategy(name))
    except ValueError:
        return False


STRATEGIES = [*dict.fromkeys((*filter(is_a_strategy, SCORES), *PRESETS))]


def test_every_public_function_of_a_kind_is_in_its_registry():
    takes = {f: first_parameters(f) for name, f in vars(al_patch).items()
             if inspect.isfunction(f) and f.__module__ == 'al_patch' and not name.startswith('_')}
    assert {f for f, p in takes.items() if p[:1] == ['probs_NCHW']} == {*SCORES.values()} - {SCORES['random']}
    assert {f for f, p in takes.items() if p[:3] == ['scores_N', 'budget', 'generator']} == {*SELECTORS.values()}
    maps = {'probs_CHW', 'features_KHW'}
    assert {f for f, p in takes.items() if maps & set(p) and 'weights_NP' in p} == {*EMBEDDINGS.values()}


@pytest.mark.parametrize('function, given', [
    *((f, 1) for f in SCORES.values()), *((f, 0) for f in EMBEDDINGS.values()), *((f, 3) for f in SELECTORS.values())])
def test_what_a_function_takes_is_offered_or_is_a_setting_with_default_and_rule(function, given):
    for name, parameter in list(inspect.signature(function, eval_str=True).parameters.items())[given:]:
        rules = getattr(parameter.annotation, '__metadata__', ())
        assert name in OFFERED or parameter.default is not parameter.empty and any(
            isinstance(rule, al_patch.Rule) and rule.holds(parameter.default) for rule in rules), name


def test_what_is_offered_is_asked_for_by_some_function():
    assert set(OFFERED) <= {name for function in FUNCTIONS.values() for name in first_parameters(function)}


@pytest.mark.parametrize('name', sorted({*FUNCTIONS} - {'random', 'topk'}))  # which nobody has to be named for
def test_every_function_says_where_it_comes_from(name):
    text = ' '.join(FUNCTIONS[name].__doc__.split())
    assert re.search(r'\((?:[^()]*\b(?:19|20)\d\d|CRC-AL|ClaSP-PE|after nnActive)[^()]*\)', text)


def test_every_function_is_part_of_a_strategy():
    records = [resolve_strategy(name).record for name in [*STRATEGIES, dict(type='random', foreground=.33)]]
    assert [{record[part] for record in records} - {None} for part in ('score', 'embed', 'select')] == [
        {*SCORES}, {*EMBEDDINGS}, {*SELECTORS}]


@pytest.mark.parametrize('name', STRATEGIES)
def test_a_name_stands_for_its_functions_with_all_their_options(name):
    strategy, parts = resolve_strategy(name), dict(embed=None, select='topk')
    parts.update(PRESETS[name]() if name in PRESETS else dict(score=name))
    assert {key: strategy.record[key] for key in parts} == parts and strategy.record['type'] == strategy.name == name
    assert strategy.embed or parts['embed'] is None
    for part, table in dict(score=SCORES, embed=EMBEDDINGS, select=SELECTORS).items():
        bound = getattr(strategy, part)
        assert getattr(bound, 'func', bound) is table.get(parts[part])
        options = getattr(bound, 'keywords', {})
        assert {key: strategy.record[key] for key in options} == options


def readme_rows() -> dict:
    """Of the page's table of strategies: name -> its parts, each a list of what stands in code there."""
    rows = rows_of('resources/strategies.md')
    return {name.strip('`'): [re.findall('`(.+?)`', part) for part in parts.split(' × ')] for name, parts, *_ in rows}


def rows_of(page: str) -> list[list[str]]:
    table = re.search(r'^\|[^\n]*\bpaper\b[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)', open(osp.join(HERE, page)).read(),
                      re.M).group(1)
    return [[cell.strip() for cell in row.split('|')[1:]] for row in table.splitlines()]


def test_every_strategy_has_a_row_in_the_readme_and_every_row_is_one():
    assert sorted(readme_rows()) == sorted(STRATEGIES)
    assert re.findall('`(.+?)`', ' '.join(row[0] for row in rows_of('README.md'))) == [*readme_rows()]


@pytest.mark.parametrize('name', STRATEGIES)
def test_a_row_of_the_readme_says_what_the_strategy_is(name):
    record, parts = resolve_strategy(name).record, readme_rows()[name]
    score, embed, select = (code[0] if code else None for code in parts)
    assert [score or 'random', embed, select] == [record[part] for part in ('score', 'embed', 'select')]
    shown = {key: ast.literal_eval(value) for part in parts for key, value in (code.split('=') for code in part[1:])}
    assert shown.items() <= record.items()
    own = {*(PRESETS[name]() if name in PRESETS else ())} - {'score', 'embed', 'select'}
    assert own <= set(shown) and ('mc' in shown) == (record['mc'] > 1)


# --- scores of scores ------------------------------------------------------------------------------------------------


def composed(*of, kind='product', **more):
    return resolve_strategy(dict(type='entropy', score=dict(type=kind, of=[*of], **more)))


def test_a_product_and_a_sum_of_scores():
    p = torch.randn(2, 4, 9, 7, generator=generator(0)).softmax(1)
    ripu, entropy = al_patch.ripu(p, k=2), al_patch.entropy(p)
    torch.testing.assert_close(composed('entropy', dict(type='ripu', k=2)).score(p), ripu * entropy)
    torch.testing.assert_close(composed('entropy', dict(type='ripu', k=2), weights=[.5, 2]).score(p),
                               entropy.sqrt() * ripu**2)
    torch.testing.assert_close(composed('entropy', 'margin', kind='sum').score(p), entropy + al_patch.margin(p))
    inner = dict(type='sum', of=['entropy', 'tiny:brightest'], weights=[1, -.5])
    torch.testing.assert_close(composed('margin', inner).score(p), al_patch.margin(p) * (entropy - p[:, -1] / 2))
    torch.testing.assert_close(resolve_strategy(dict(type='entropy', score=dict(type='ripu', k=2))).score(p), ripu)


def test_a_composed_score_asks_for_what_its_parts_ask_for():
    strategy = composed('bald', 'variation_ratio')
    assert strategy.mc == 20 and strategy.asks_for('entropies_NHW') and strategy.asks_for('votes_NCHW')
    p = torch.randn(1, 4, 3, 3, generator=generator(0)).softmax(1)
    given = dict(entropies_NHW=al_patch.entropy(p) / 2, votes_NCHW=p, squares_NCHW=None)
    found = al_patch.call_offering(strategy.score, p, **given)
    torch.testing.assert_close(found, al_patch.entropy(p) / 2 * (1 - p.amax(1)))


@pytest.mark.parametrize('score, text', [
    (dict(type='product'), '`al.strategy.score.of` should be given'),
    (dict(type='product', of=[]), '`al.strategy.score.of` should be a list of scores'),
    (dict(type='product', of=['entropi']), '`al.strategy.score` should be one of random, '),
    (dict(type='sum', of=['entropy'], weights=[1, 2]), '`al.strategy.score.weights` should have one for each of the 1'),
    (dict(type='sum', of=['entropy', 'random']), "`al.strategy.score.of` should be scores of what a model sees"),
    (dict(type='sum', of=[dict(type='ripu', kk=2)]), '`al.strategy.score.kk` is not a setting; did you mean'),
    (dict(of=['entropy']), "`al.strategy.score` should be a name, dict"), ({}, '`al.strategy.score` should be a name')])
def test_a_wrong_composition_is_refused(score, text):
    with pytest.raises(ValueError, match=text):
        resolve_strategy(dict(type='entropy', score=score))


@pytest.mark.parametrize('unit', ['image', dict(type='region', window=1)], ids=str)
def test_a_run_with_a_composed_score(make_cfg, train, unit):
    """It is recorded as it is written, and a run goes on with it."""
    score = dict(type='product', of=['entropy', dict(type='ripu', k=2)])
    cfg = make_cfg(dict(unit=unit, strategy=dict(type='entropy', score=score), initial=4, budget=3, rounds=1), changes={
        **tiny.NO_VAL, 'train_cfg.max_iters': 1})
    _, rounds = train(cfg)
    assert rounds[1]['strategy']['score'] == score
    content = read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE))
    assert content['settings']['strategy'] == dict(type='entropy', score=score)
    assert resolve_strategy(content['settings']['strategy']).record == rounds[1]['strategy']


# --- parts and options of one's choice -------------------------------------------------------------------------------


def test_a_score_of_ones_own_takes_its_options():
    strategy = resolve_strategy(dict(type='tiny:brightest', power=2, reduce='max'))
    assert strategy.score(PROBS).flatten().tolist() == pytest.approx([.04, 0., .25])
    assert strategy.reduce == 'max' and strategy.select is SELECTORS['topk']


def test_score_and_select_replace_the_strategys():
    strategy = resolve_strategy(dict(type='power_entropy', score='tiny:brightest', select='tiny:last_ones'))
    assert strategy.score(PROBS).flatten().tolist() == PROBS[:, -1].flatten().tolist()
    assert strategy.select(torch.zeros(5), 2, generator(0)).tolist() == [3, 4]


@pytest.mark.parametrize('setting, part, options', [
    (dict(type='pixelpick', percent=10), 'select', dict(percent=10)), (dict(type='ripu', k=4), 'score', dict(k=4)),
    ('contextual_diversity', 'select', dict(distance='kl', first='highest')),
    (dict(type='random', foreground=.5), 'select', dict(foreground=.5, background=0)),
    (dict(type='clasp_pe', betas=[1, 2]), 'select', dict(share=.66, background=0, betas=[1, 2]))])
def test_an_option_is_handed_to_the_function_that_takes_it(setting, part, options):
    assert getattr(resolve_strategy(setting), part).keywords == options


@pytest.mark.parametrize('setting, mc', [
    ('entropy', 1), ('bald', 20), ('variation_ratio', 20), ('mean_std', 20), ('powerbald', 20),
    (dict(type='bald', mc=3), 3), (dict(type='entropy', mc=3), 3), (dict(type='bald', score='entropy'), 1)])
def test_only_what_compares_passes_has_several_by_default(setting, mc):
    assert resolve_strategy(setting).mc == mc


# --- a query of each at every unit -----------------------------------------------------------------------------------

UNITS = dict(
    image=dict(unit='image', initial=4, budget=2),
    region=dict(unit=dict(type='region', size=[8, 8]), initial=10, budget=7),
    window=dict(unit=dict(type='region', window=1), initial=9, budget=5),
    superpixel=dict(unit=dict(type='superpixel', n_segments=12, compactness=100.), initial=8, budget=6),
    pixel=dict(unit='pixel', initial=20, budget=11))
MEANINGLESS = {('contextual_diversity', 'pixel'), ('crc', 'pixel')}  # see test_settings.py


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('name', STRATEGIES)
def test_it_asks_for_what_the_budget_buys(make_state, name, unit):
    if (name, unit) in MEANINGLESS:
        return
    state = make_state(dict(UNITS[unit], strategy=name), changes=tiny.NO_VAL)
    al_patch.add_round(state, al_patch.initial_images(state) or al_patch.query(state, None))
    os.makedirs(state.folder(), exist_ok=True)
    torch.save(state.runner.model.state_dict(), osp.join(state.folder(), 'untrained.pth'))
    state.entry.update(checkpoints=dict(last='untrained.pth'), metrics={}, train_seconds=0.)
    al_patch.add_round(state, al_patch.query(state, state.runner))
    content = read_state(osp.join(state.work_dir, al_patch.STATE_FILE))
    first, second = content['rounds']
    if unit == 'image':
        assert list(second['asked'].values()) == [None] * 2 and not set(second['asked']) & set(first['asked'])
    else:
        assert sum(n for n, _ in second['asked'].values()) == UNITS[unit]['budget']
        assert sum(int(state.mask(image).sum()) for image in state.labelled()) == first['pixels'] + second['pixels']
    held_out = first.get('held_out', [])
    assert bool(held_out) == (name == 'crc') and set(held_out) <= set(first['asked'])
    assert content['settings']['strategy'] == name
    assert first['strategy'] == resolve_strategy('random').record
    assert second['strategy'] == resolve_strategy(name).record


def test_a_run_records_its_strategy_with_all_options(make_cfg, train):
    cfg = make_cfg(dict(strategy=dict(type='powerbald', mc=3, beta=2, alpha=.05)), changes={
        **tiny.NO_VAL, 'train_cfg.max_iters': 1})
    _, rounds = train(cfg)
    options = dict(shortlist=None, calibration=0., alpha=.05, reduce='mean', flip=False, features_from='decode_head',
                   committee=1)
    assert [entry['strategy'] for entry in rounds] == [
        dict(options, type='random', score='random', embed=None, select='topk', mc=1),
        dict(options, type='powerbald', score='bald', embed=None, select='power', beta=2, mc=3)]
    content = read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE))
    assert content['settings']['strategy'] == dict(type='powerbald', mc=3, beta=2)
