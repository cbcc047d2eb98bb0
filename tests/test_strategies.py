"""Strategies: values computed by hand, the tables, and functions of the user's own."""
import inspect
import math

import pytest
import torch

import al_patch
from al_patch import generator, reduce_map, resolve_strategy, topk

PROBS = torch.tensor([[.5, .3, .2], [1., 0., 0.], [.25, .25, .5]]).T[None, :, None]  # (1, 3, 1, 3): three pixels
BY_HAND = dict(
    least_confidence=[.5, 0., .5],
    margin=[1 - (.5 - .3), 1 - (1 - 0), 1 - (.5 - .25)],
    entropy=[.5 * math.log(2) - .3 * math.log(.3) - .2 * math.log(.2), 0., 1.5 * math.log(2)])


@pytest.mark.parametrize('name', BY_HAND)
def test_scores(name):
    scores_NHW = al_patch.SCORES[name](PROBS)
    assert scores_NHW.shape == (1, 1, 3)
    assert scores_NHW.flatten().tolist() == pytest.approx(BY_HAND[name], abs=1e-6)


@pytest.mark.parametrize('name, highest', dict(least_confidence=.75, margin=1., entropy=math.log(4)).items())
def test_uniform_probabilities_score_highest(name, highest):
    assert al_patch.SCORES[name](torch.full((1, 4, 2, 2), .25)).flatten().tolist() == pytest.approx([highest] * 4)


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


@pytest.mark.parametrize('table, first', [('SCORES', 'probs_NCHW'), ('SELECTS', 'scores_N')])
def test_tables_hold_public_functions_by_their_names(table, first):
    for name, function in getattr(al_patch, table).items():
        assert getattr(al_patch, name) is function and function.__doc__
        assert name == 'random' or next(iter(inspect.signature(function).parameters)) == first


def test_every_function_of_a_kind_is_in_its_table():
    public = {name: list(inspect.signature(f).parameters) for name, f in vars(al_patch).items()
              if inspect.isfunction(f) and f.__module__ == 'al_patch' and not name.startswith('_')}
    assert {n for n, p in public.items() if p[:1] == ['probs_NCHW']} == set(al_patch.SCORES) - {'random'}
    assert {n for n, p in public.items() if p[:2] == ['scores_N', 'budget']} == set(al_patch.SELECTS)


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
