"""Functions of the user's own: registered or named by path, as in resources/strategies.md, and what they get."""
import functools
import inspect
import os.path as osp
import re
import sys
import types

import pytest
import tiny
import torch

import al_patch
from al_patch import AL_EMBEDDINGS, AL_SCORES, AL_SELECTORS, AL_STRATEGIES, parse_settings, resolve_strategy

TEXT = open(osp.join(osp.dirname(osp.abspath(al_patch.__file__)), 'resources', 'strategies.md')).read()
BLOCKS = re.findall(r'^```python\n(.*?)^```', TEXT, re.S | re.M)
FUNCTIONS = [block for block in BLOCKS if 'def ' in block and 'my_strategies' in block]
UNITS = dict(image=dict(unit='image', initial=4, budget=2),
             region=dict(unit=dict(type='region', size=[8, 8]), initial=10, budget=7))
SHORT = {**tiny.NO_VAL, 'train_cfg.max_iters': 1, 'model.decode_head.num_classes': 5}
REGISTRIES = dict(score=AL_SCORES, embed=AL_EMBEDDINGS, select=AL_SELECTORS, strategy=AL_STRATEGIES)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test registers is gone after it."""
    for registry in REGISTRIES.values():
        monkeypatch.setattr(registry, '_module_dict', dict(registry.module_dict))


# --- names of one's own ----------------------------------------------------------------------------------------------


def test_what_is_registered_is_a_name_in_a_config(make_cfg, train):

    @AL_SCORES.register_module()
    def class_1(probs_NCHW, power: float = 1.):
        return probs_NCHW[:, 1]**power

    @AL_EMBEDDINGS.register_module('shares')
    def class_shares(probs_CHW, weights_NP):
        return al_patch.pool_map(probs_CHW, weights_NP)

    @AL_SELECTORS.register_module(name='steepest')
    def select(scores_N, budget, generator, vectors_ND, sign: int = 1):
        return (sign * scores_N * vectors_ND.std(1)).argsort(descending=True)[:budget]

    @AL_STRATEGIES.register_module()
    def mine():
        return dict(score='class_1', embed='shares', select='steepest', power=2., reduce='max')

    assert resolve_strategy('class_1').score.func is class_1 and class_1(torch.ones(1, 2, 1, 1)).shape == (1, 1, 1)
    _, rounds = train(make_cfg(dict(strategy=dict(type='mine', sign=-1)), changes=SHORT))
    expected = dict(type='mine', score='class_1', embed='shares', select='steepest', power=2., sign=-1, reduce='max',
                    mc=1, shortlist=None, calibration=0., alpha=.05, flip=False, features_from='decode_head',
                    committee=1)
    assert rounds[1]['strategy'] == expected and len(rounds[1]['asked']) == 2
    assert parse_settings(dict(strategy=dict(type='mine', sign=-1, power=2))).strategy == dict(type='mine', sign=-1)
    assert resolve_strategy(dict(type='mine', power=3., embed='gradient')).record['power'] == 3.


@pytest.mark.parametrize('kind, options', [('score', {}), ('embed', dict(type='coreset')), ('select', {})])
def test_a_registered_part_replaces_one_of_a_strategy(kind, options):
    given = dict(score=['probs_NCHW'], embed=['features_KHW', 'weights_NP'],
                 select=['scores_N', 'budget', 'generator'])[kind]
    function = eval(f'lambda {", ".join(given)}: None')
    REGISTRIES[kind].register_module('mine', module=function)
    assert getattr(resolve_strategy({'type': 'entropy', **options, kind: 'mine'}), kind) is function


def test_an_unknown_name_is_refused_with_those_of_ones_own_in_the_list():
    AL_SCORES.register_module('mine', module=tiny.brightest)
    AL_STRATEGIES.register_module('ours', module=lambda: dict(score='mine', select='power', power=3.))
    with pytest.raises(ValueError, match='^`al.strategy` should be one of pixelpick, .*ours, .*entropy, .*, mine, or'):
        parse_settings(dict(strategy='yours'))
    with pytest.raises(ValueError, match="^`al.strategy.power` should be of type float, but got '2'"):
        parse_settings(dict(strategy=dict(type='ours', power='2')))


def place_of(function) -> str:
    return f'{__file__}:{inspect.unwrap(function).__code__.co_firstlineno}'


@pytest.mark.parametrize('registry', REGISTRIES.values(), ids=REGISTRIES)
def test_a_name_that_is_taken_is_an_error_that_shows_both_places(registry):

    def first():
        pass

    def second():
        pass

    registry.register_module('mine', module=first)
    with pytest.raises(KeyError, match=f"'mine'.*{registry.name}.*{place_of(first)}.*{place_of(second)}"):
        registry.register_module(name='mine')(second)
    assert registry.module_dict['mine'] is first
    assert registry.register_module('mine', force=True)(second) is second is registry.module_dict['mine']


@pytest.mark.parametrize('kind, name', [('score', 'entropy'), ('embed', 'features'), ('select', 'topk'),
                                        ('strategy', 'coreset')])
def test_a_name_of_al_patch_is_taken_too(kind, name):

    def mine():
        pass

    before = REGISTRIES[kind].module_dict[name]
    with pytest.raises(KeyError, match=f"'{name}'.*{al_patch.__file__}.*{place_of(mine)}"):
        REGISTRIES[kind].register_module(name)(mine)
    assert REGISTRIES[kind].module_dict[name] is before


def test_the_place_of_a_partial_is_that_of_its_function():
    first, second = functools.partial(tiny.brightest, power=2.), functools.partial(tiny.brightest, power=3.)
    AL_SCORES.register_module('mine', module=first)
    with pytest.raises(KeyError, match=f"'mine'.*{tiny.__file__}:.*{tiny.__file__}:"):
        AL_SCORES.register_module('mine', module=second)


@pytest.mark.parametrize('preset, match', [
    (dict(select='power'), '^`al.strategy.score` should be one of random, .*, but got None'),
    (dict(score='entrophy'), "^`al.strategy.score` should be one of random, .*, but got 'entrophy'"),
    (dict(score='entropy', beta=2.), '^`al.strategy.beta` is not a setting'),
    (dict(score='entropy', select='power', beta=0), '^`al.strategy.beta` should be a number above 0, but got 0')])
def test_a_registered_strategy_that_does_not_fit_is_refused_like_a_setting(preset, match):
    AL_STRATEGIES.register_module('mine', module=lambda: preset)
    with pytest.raises(ValueError, match=match):
        parse_settings(dict(strategy='mine'))


# --- the page ------------------------------------------------------------------------------------------------------


def al_blocks(text: str) -> list:
    """All `al = dict(...)` that name a function in my_strategies."""
    found = []
    for match in re.finditer(r'\bal = (?=dict\()', text):
        start, depth = match.end(), 0
        for end in range(start + 4, len(text)):
            depth += {'(': 1, ')': -1}.get(text[end], 0)
            if not depth:
                break
        found.append(text[start:end + 1])
    return [block for block in found if 'my_strategies:' in block]


@pytest.fixture
def my_strategies(tmp_path, monkeypatch):
    """The module that the page shows."""
    (tmp_path / 'my_strategies.py').write_text('\n'.join(FUNCTIONS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'my_strategies', raising=False)
    yield
    sys.modules.pop('my_strategies', None)


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('block', al_blocks(TEXT))
def test_what_the_page_shows_runs(make_cfg, train, my_strategies, block, unit):
    al = eval(block, {'__builtins__': {}, 'dict': dict})
    _, rounds = train(make_cfg({**al, **UNITS[unit], 'rounds': 1}, changes=SHORT))
    asked = rounds[1]['asked']
    assert (len(asked) if unit == 'image' else sum(n for n, _ in asked.values())) == UNITS[unit]['budget']


def test_every_function_that_the_page_shows_is_used_there():
    defined = set(re.findall(r'^def (\w+)', '\n'.join(FUNCTIONS), re.M))
    assert defined and defined == set(re.findall(r'my_strategies:(\w+)', ' '.join(al_blocks(TEXT))))


# --- all that a function can ask for ---------------------------------------------------------------------------------

WANTED = dict(score=['entropies_NHW', 'votes_NCHW', 'squares_NCHW', 'thresholds_C'],
              embed=['probs_CHW', 'features_KHW', 'scores_HW', 'weights_NP', 'thresholds_C', 'in_one_cell'],
              select=['generator', 'vectors_ND', 'draws_N', 'labelled_LD', 'labelled_scores_L', 'probs_NC', 'progress',
                      'number', 'predicted_NC', 'labelled_predicted_LC'])


@pytest.fixture
def greedy(monkeypatch):
    """A module whose functions ask for everything, and what they got."""
    got, module = {}, types.ModuleType('greedy')

    def score(probs_NCHW, entropies_NHW, votes_NCHW, squares_NCHW, thresholds_C, bonus=0.):
        got['score'] = dict(locals())
        return entropies_NHW + bonus

    def embed(probs_CHW, features_KHW, scores_HW, weights_NP, thresholds_C, in_one_cell, factor=1):
        got['embed'] = dict(locals())
        return factor * al_patch.pool_map(torch.cat([probs_CHW, features_KHW, scores_HW[None]]), weights_NP)

    def select(scores_N, budget, generator, vectors_ND, draws_N, labelled_LD, labelled_scores_L, probs_NC, progress,
               number, predicted_NC, labelled_predicted_LC, sign=1):
        got['select'] = dict(locals())
        return (sign * scores_N).topk(budget).indices

    module.score, module.embed, module.select = score, embed, select
    monkeypatch.setitem(sys.modules, 'greedy', module)
    return got


OWN = dict(type='greedy:score', embed='greedy:embed', select='greedy:select', mc=2, calibration=.5, alpha=.5,
           bonus=3., factor=2, sign=-1)


@pytest.mark.parametrize('unit', UNITS)
def test_a_function_gets_what_its_parameters_are_named_after(make_cfg, train, greedy, unit):
    train(make_cfg({**UNITS[unit], 'rounds': 2, 'strategy': OWN}, changes=SHORT))
    for kind, names in WANTED.items():
        assert set(names) <= set(greedy[kind]), kind
    score, embed, select = (greedy[kind] for kind in WANTED)
    n = len(select['scores_N'])
    draws = select['draws_N']
    assert len(draws) == n and (draws.diff() > 0).all() and 0 < draws[0] and draws[-1] < 1
    assert score['bonus'] == 3 and embed['factor'] == 2 and select['sign'] == -1 and select['progress'] == .5
    size = (8, 12) if unit == 'image' else tiny.SHAPE  # below image level scores are those of the image's own pixels
    assert score['entropies_NHW'].shape == (1, *size) and score['votes_NCHW'].shape == (1, 5, *size)
    assert score['votes_NCHW'].sum(1).numpy() == pytest.approx(1) and score['thresholds_C'].shape == (5, )
    assert embed['features_KHW'].shape == (8, 8, 12) and embed['scores_HW'].shape == (8, 12)
    assert select['vectors_ND'].shape == (n, 5 + 8 + 1) and select['probs_NC'].shape == (n, 5)
    assert select['labelled_LD'].shape == (len(select['labelled_scores_L']), 14) and len(select['labelled_LD'])
    is_close = functools.partial(pytest.approx, rel=1e-4, abs=1e-4 if unit == 'image' else .5)  # vectors stay coarse
    assert select['vectors_ND'][:, :5].numpy() == is_close(2 * select['probs_NC'].numpy())
    assert select['vectors_ND'][:, -1].numpy() == is_close(2 * select['scores_N'].numpy())
    assert (embed['weights_NP'] is None) == (unit == 'image')
    assert select['predicted_NC'].shape == (n, 5) and not embed['in_one_cell']
    assert select['predicted_NC'].sum(1).numpy() == pytest.approx(1)
    assert select['labelled_predicted_LC'].shape == (len(select['labelled_LD']), 5)
    assert select['number'] == n + len(select['labelled_LD'])
    if unit == 'image':
        assert n == 12 - 6 and len(select['labelled_LD']) == 6
    else:
        assert n + len(select['labelled_LD']) == 24 * 12 and len(select['labelled_LD']) == 17


def test_what_is_offered_is_what_this_file_asks_for():
    assert {*al_patch.OFFERED} - {'caps', 'split'} == {name for names in WANTED.values() for name in names}
