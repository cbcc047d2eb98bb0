"""Functions of the user's own: those in the README run as they stand there, and get all that they can ask for."""
import os.path as osp
import re
import sys
import types

import pytest
import tiny
import torch

import al_patch

TEXT = open(osp.join(osp.dirname(osp.abspath(al_patch.__file__)), 'README.md')).read()
BLOCKS = re.findall(r'^```python\n(.*?)^```', TEXT, re.S | re.M)
FUNCTIONS = [block for block in BLOCKS if 'def ' in block and 'my_strategies' in block]
UNITS = dict(image=dict(unit='image', initial=4, budget=2),
             region=dict(unit=dict(type='region', size=[8, 8]), initial=10, budget=7))
SHORT = {**tiny.NO_VAL, 'train_cfg.max_iters': 1, 'model.decode_head.num_classes': 5}


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
    """The module that the README shows."""
    (tmp_path / 'my_strategies.py').write_text('\n'.join(FUNCTIONS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'my_strategies', raising=False)
    yield
    sys.modules.pop('my_strategies', None)


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('block', al_blocks(TEXT))
def test_what_the_readme_shows_runs(make_cfg, train, my_strategies, block, unit):
    al = eval(block, {'__builtins__': {}, 'dict': dict})
    _, rounds = train(make_cfg({**al, **UNITS[unit], 'rounds': 1}, changes=SHORT))
    asked = rounds[1]['asked']
    assert (len(asked) if unit == 'image' else sum(n for n, _ in asked.values())) == UNITS[unit]['budget']


def test_every_function_that_the_readme_shows_is_used_there():
    defined = set(re.findall(r'^def (\w+)', '\n'.join(FUNCTIONS), re.M))
    assert defined and defined == set(re.findall(r'my_strategies:(\w+)', ' '.join(al_blocks(TEXT))))


# --- all that a function can ask for ---------------------------------------------------------------------------------

WANTED = dict(score=['entropies_NHW', 'votes_NCHW', 'squares_NCHW', 'thresholds_C'],
              embed=['probs_CHW', 'features_KHW', 'scores_HW', 'weights_NP', 'thresholds_C'],
              select=['vectors_ND', 'labelled_LD', 'labelled_scores_L', 'probs_NC', 'progress'])


@pytest.fixture
def greedy(monkeypatch):
    """A module whose functions ask for everything, and what they got."""
    got, module = {}, types.ModuleType('greedy')

    def score(probs_NCHW, entropies_NHW, votes_NCHW, squares_NCHW, thresholds_C, bonus=0.):
        got['score'] = dict(locals())
        return entropies_NHW + bonus

    def embed(probs_CHW, features_KHW, scores_HW, weights_NP, thresholds_C, factor=1):
        got['embed'] = dict(locals())
        return factor * al_patch.pool_map(torch.cat([probs_CHW, features_KHW, scores_HW[None]]), weights_NP)

    def select(scores_N, budget, generator, vectors_ND, labelled_LD, labelled_scores_L, probs_NC, progress, sign=1):
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
    assert score['bonus'] == 3 and embed['factor'] == 2 and select['sign'] == -1 and select['progress'] == 1
    assert score['entropies_NHW'].shape == (1, 8, 12) and score['votes_NCHW'].shape == (1, 5, 8, 12)
    assert score['votes_NCHW'].sum(1).numpy() == pytest.approx(1) and score['thresholds_C'].shape == (5, )
    assert embed['features_KHW'].shape == (8, 8, 12) and embed['scores_HW'].shape == (8, 12)
    assert select['vectors_ND'].shape == (n, 5 + 8 + 1) and select['probs_NC'].shape == (n, 5)
    assert select['labelled_LD'].shape == (len(select['labelled_scores_L']), 14) and len(select['labelled_LD'])
    assert select['vectors_ND'][:, :5].numpy() == pytest.approx(2 * select['probs_NC'].numpy(), abs=1e-5)
    assert select['vectors_ND'][:, -1].numpy() == pytest.approx(2 * select['scores_N'].numpy(), rel=1e-4, abs=1e-4)
    assert (embed['weights_NP'] is None) == (unit == 'image')
    if unit == 'image':
        assert n == 12 - 6 and len(select['labelled_LD']) == 6
    else:
        assert n + len(select['labelled_LD']) == 24 * 12 and len(select['labelled_LD']) == 17


def test_set_of_inputs_is_what_this_file_asks_for():
    assert set(al_patch.INPUTS) == {name for names in WANTED.values() for name in names}
