"""Strategies: values computed by hand, the tables, and functions of the user's own."""
import inspect
import math
import os.path as osp
import re

import numpy as np
import pytest
import torch

import al_patch
from al_patch import (
    EMBEDS,
    INPUTS,
    PRESETS,
    SCORES,
    SELECTS,
    STATISTICS,
    conformal_risk,
    generator,
    reduce_map,
    resolve_strategy,
    topk,
)

PROBS = torch.tensor([[.5, .3, .2], [1., 0., 0.], [.25, .25, .5]]).T[None, :, None]  # (1, 3, 1, 3): three pixels
BY_HAND = dict(
    least_confidence=[.5, 0., .5],
    margin=[1 - (.5 - .3), 1 - (1 - 0), 1 - (.5 - .25)],
    ratio=[.3 / .5, 0., .5],
    entropy=[.5 * math.log(2) - .3 * math.log(.3) - .2 * math.log(.2), 0., 1.5 * math.log(2)])


@pytest.mark.parametrize('name', BY_HAND)
def test_scores(name):
    scores_NHW = al_patch.SCORES[name](PROBS)
    assert scores_NHW.shape == (1, 1, 3)
    assert scores_NHW.flatten().tolist() == pytest.approx(BY_HAND[name], abs=1e-6)


@pytest.mark.parametrize('name, highest', dict(least_confidence=.75, margin=1., ratio=1., entropy=math.log(4)).items())
def test_uniform_probabilities_score_highest(name, highest):
    assert al_patch.SCORES[name](torch.full((1, 4, 2, 2), .25)).flatten().tolist() == pytest.approx([highest] * 4)


# --- scores of several dropout passes --------------------------------------------------------------------------------


def score_of(name: str, passes_TCHW: torch.Tensor) -> torch.Tensor:
    """A score of passes over one image, from what is averaged over them. (H, W)"""
    means = {key: function(passes_TCHW).mean(0, keepdim=True) for key, function in STATISTICS.items()}
    return al_patch.call(SCORES[name], means['probs_NCHW'], **means)[0]


def entropy_of(shares) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


LITERAL = dict(  # of the T passes over one pixel, (T, C)
    variation_ratio=lambda p: 1 - max(np.bincount(p.argmax(1))) / len(p),
    mean_std=lambda p: np.mean([math.sqrt(np.mean((column - column.mean())**2)) for column in p.T]),
    bald=lambda p: entropy_of(p.mean(0)) - np.mean([entropy_of(each) for each in p]))


@pytest.mark.parametrize('name', LITERAL)
@pytest.mark.parametrize('t, c', [(2, 2), (5, 4), (20, 19)])
def test_scores_of_passes_follow_their_definition(name, t, c):
    passes = (4 * torch.randn(t, c, 3, 5, generator=generator(t, c))).softmax(1)
    slow = np.array([[LITERAL[name](passes[:, :, y, x].double().numpy()) for x in range(5)] for y in range(3)])
    assert score_of(name, passes).numpy() == pytest.approx(slow, abs=1e-5)
    assert slow.std() > 1e-3


@pytest.mark.parametrize('name, value', dict(variation_ratio=.5, mean_std=.5, bald=math.log(2)).items())
def test_passes_that_contradict_each_other_by_hand(name, value):
    assert score_of(name, torch.eye(2)[..., None, None]).tolist() == [[pytest.approx(value)]]


@pytest.mark.parametrize('name', LITERAL)
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
    thresholds = torch.full((3, ), .5)
    shares = al_patch.cooccurrence(probs[0], thresholds).view(3, 3)
    assert shares[1].tolist() == pytest.approx([.5, .5, 0])


# --- from a map to a number, and to a choice -------------------------------------------------------------------------


@pytest.mark.parametrize('how, value', [('mean', 3.), ('max', 6.), (25, 5.5), (25., 5.5), (1, 6.), (50, 4.5)])
def test_reduce(how, value):
    assert float(reduce_map(torch.tensor([[0., 1, 2, 3], [3, 4, 5, 6]]), how)) == value


def test_topk_takes_the_highest_and_ties_go_by_pool_order():
    scores_N = torch.tensor([1., 3, 2, 3, 2, 2])
    assert topk(scores_N, 2, generator(0)).tolist() == [1, 3]
    assert sorted(topk(scores_N, 4, generator(0)).tolist()) == [1, 2, 3, 4]
    assert topk(torch.zeros(500), 3, generator(0)).tolist() == [0, 1, 2]
    assert topk(scores_N, 6, generator(0)).sort().values.tolist() == list(range(6))


def test_random_is_seeded_by_purpose():
    draw = [al_patch.random(5, generator(*key)).tolist() for key in ((0, 'a'), (0, 'a'), (1, 'a'), (0, 'b'))]
    assert draw[0] == draw[1] and len(set(map(tuple, draw))) == 3


# --- the tables ------------------------------------------------------------------------------------------------------

OF_ITSELF = 'random', 'topk'  # what nobody has to be named for
README = osp.join(osp.dirname(osp.abspath(al_patch.__file__)), 'README.md')


def first_parameters(function) -> list:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize('table', [SCORES, EMBEDS, SELECTS], ids=['SCORES', 'EMBEDS', 'SELECTS'])
def test_tables_hold_public_functions_by_their_names(table):
    assert all(getattr(al_patch, name) is function for name, function in table.items())


def test_every_function_of_a_kind_is_in_its_table():
    takes = {name: first_parameters(f) for name, f in vars(al_patch).items()
             if inspect.isfunction(f) and f.__module__ == 'al_patch' and not name.startswith('_')}
    assert {n for n, p in takes.items() if p[:1] == ['probs_NCHW']} == set(SCORES) - {'random'}
    assert {n for n, p in takes.items() if p[:3] == ['scores_N', 'budget', 'generator']} == set(SELECTS)
    maps = {'probs_CHW', 'features_KHW'}
    assert {n for n, p in takes.items() if maps & set(p) and 'weights_NP' in p} == set(EMBEDS)


@pytest.mark.parametrize('function, given', [
    *((f, 1) for f in SCORES.values()), *((f, 0) for f in EMBEDS.values()), *((f, 3) for f in SELECTS.values())])
def test_what_a_function_takes_is_offered_or_has_a_default(function, given):
    for parameter in list(inspect.signature(function).parameters.values())[given:]:
        assert parameter.name in INPUTS or parameter.default is not parameter.empty or function is al_patch.random


def test_every_input_is_asked_for_by_some_function():
    taken = {name for table in (SCORES, EMBEDS, SELECTS) for f in table.values() for name in first_parameters(f)}
    assert set(INPUTS) <= taken


@pytest.mark.parametrize('name', {**SCORES, **EMBEDS, **SELECTS})
def test_every_function_says_where_it_comes_from(name):
    text = ' '.join({**SCORES, **EMBEDS, **SELECTS}[name].__doc__.split())
    assert name in OF_ITSELF or re.search(r'\((?:[^()]*\b(?:19|20)\d\d|CRC-AL|ClaSP-PE)[^()]*\)', text)


def test_every_table_entry_is_in_a_preset():
    for key, table in dict(score=SCORES, embed=EMBEDS, select=SELECTS).items():
        assert {preset[key] for preset in PRESETS.values() if key in preset} | {'topk'} >= set(table)


def readme_rows() -> dict:
    """Of the table of strategies: name -> its parts, each a list of what stands in code there."""
    section = open(README).read().split('\n## Strategies\n')[1].split('\n## ')[0]
    table = re.search(r'^\|[^\n]*\bpaper\b[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)', section, re.M).group(1)
    rows = [[cell.strip() for cell in row.split('|')[1:]] for row in table.splitlines()]
    return {name.strip('`'): [re.findall('`(.+?)`', part) for part in parts.split(' × ')] for name, parts, *_ in rows}


def test_every_preset_has_a_row_in_the_readme_and_every_row_is_one():
    assert sorted(readme_rows()) == sorted(PRESETS)


@pytest.mark.parametrize('name', PRESETS)
def test_a_row_of_the_readme_says_what_the_preset_is(name):
    preset, strategy, parts = PRESETS[name], resolve_strategy(name), readme_rows()[name]
    score, embed, select = (code[:1] and code[0] for code in parts)
    assert (score or 'random', embed or None, select) == (
        preset['score'], preset.get('embed'), preset.get('select', 'topk'))
    values = {}
    for function in filter(None, (strategy.score, strategy.embed, strategy.select)):
        values.update({key: p.default for key, p in inspect.signature(function).parameters.items()})
    for option in [code for part in parts for code in part[1:]]:
        key, value = option.split('=')
        assert str(values.get(key, getattr(strategy, key, None))).removesuffix('.0') == value.strip("'"), option
    options = {f'{key}={value!r}' for key, value in preset.items() if key not in ('score', 'embed', 'select')}
    assert options <= {code for part in parts for code in part}


@pytest.mark.parametrize('name', al_patch.PRESETS)
def test_every_preset_resolves(name):
    strategy = resolve_strategy(name)
    preset = al_patch.PRESETS[name]
    assert strategy.name == name and strategy.score is al_patch.SCORES[preset['score']]
    assert strategy.embed is (preset.get('embed') and al_patch.EMBEDS[preset['embed']])
    assert getattr(strategy.select, 'func', strategy.select) is al_patch.SELECTS[preset.get('select', 'topk')]
    assert {key: getattr(strategy, key, None) or strategy.select.keywords[key] for key in preset
            if key not in ('score', 'embed', 'select')} == {k: v for k, v in preset.items() if k not in (
                'score', 'embed', 'select')}


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match='^`al.strategy` should be one of ' + ', '.join(al_patch.PRESETS)):
        resolve_strategy('entrophy')
    with pytest.raises(ValueError, match='^`al.strategy.select` should be one of ' + ', '.join(al_patch.SELECTS)):
        resolve_strategy(dict(type='entropy', select='bottomk'))


def test_a_score_of_ones_own_takes_its_options():
    strategy = resolve_strategy(dict(type='tiny:brightest', power=2, reduce='max'))
    assert strategy.score(PROBS).flatten().tolist() == pytest.approx([.04, 0., .25])
    assert float(strategy.reduce(strategy.score(PROBS)[0])) == pytest.approx(.25) and strategy.select is topk


def test_score_and_select_replace_the_presets():
    strategy = resolve_strategy(dict(type='entropy', score='tiny:brightest', select='tiny:last_ones'))
    assert strategy.score.__name__ == 'brightest'
    assert strategy.select(torch.zeros(5), 2, generator(0)).tolist() == [3, 4]


@pytest.mark.parametrize('strategy, match', [
    (dict(type='entropy', power=2), "^`al.strategy` 'entropy' has no option power; it takes score, .*, reduce$"),
    (dict(type='tiny:brightest', powr=2), 'has no option powr; .*'),
    (dict(type='entropy', budget=2), 'has no option budget'),
    (dict(type='entropy', reduce='median'), "^`al.strategy.reduce` should be 'mean', 'max' or .* 'median'"),
    (dict(type='entropy', reduce=0), '^`al.strategy.reduce` should'),
    (dict(type='entropy', reduce=101), '^`al.strategy.reduce` should'),
    (dict(type='entropy', reduce=True), '^`al.strategy.reduce` should'),
    ('tiny:darkest', "^`al.strategy.score` should be importable, but got 'tiny:darkest'"),
    ('tinny:brightest', '^`al.strategy.score` should be importable'),
    ('tiny:NAMES', "^`al.strategy.score` should name a function, but 'tiny:NAMES' is a list")])
def test_wrong_options_are_refused(strategy, match):
    with pytest.raises(ValueError, match=match):
        resolve_strategy(strategy)


def test_the_unknown_options_message_names_those_there_are():
    with pytest.raises(ValueError, match='it takes score, embed, select, mc, .*, reduce, power$'):
        resolve_strategy(dict(type='tiny:brightest', powr=2))
