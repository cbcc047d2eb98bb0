"""The `al` block: what is refused, by which words, what equal settings become, and the arithmetic of amounts."""
import types

import pytest
import tiny
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import al_patch
import al_report
from al_patch import State, block_settings, budgets, number_of, parse_settings, round_config

NAME = r"a name, dict\(type=name, \*\*options\) or 'package.module:function'"
AMOUNT = r'a positive int, a fraction in \(0, 1\]'
WRONG = dict(  # key -> what it should be: what it is
    unit={NAME: [None, 3, {}, dict(size=[1, 1])], 'one of image, region, superpixel, pixel, or': ['page']},
    strategy={NAME: [3, dict(score='entropy'), dict(type=None)], 'one of pixelpick, .*, entropy, .*': ['entrophy']},
    initial={f'{AMOUNT}, a list of image names, or the path of a split file': [0, -1, 1.5, 0., True, '', [], [1]]},
    budget={f'{AMOUNT}, or a list of these with one entry a round': [0, '5', [], [1, 0], None]},
    per_image={'True or False': [1, None], 'False for whole images': [True]},
    rounds={'an int >= 0': [-1, 2., True]}, weights={"'scratch', 'last', 'best' or 'continue'": ['first']},
    query_with={"'last' or 'best'": ['scratch']}, pool_size={r'None or a positive int, or a fraction': [0, 1.01]},
    oracle={"'simulated' or 'human'": ['machine']},
    overrides={'None or a dict from a round': [{'one': {}}, {'02': {}}, {1: 4000}, [1]]},
    stop={"None or a dict of 'metric' with": [{}, 3, dict(metric='mIoU')]},
    seed={'None or an int >= 0': [-1, .5, False]})
WRONG_STOP = dict(value={'None or a number': ['75', True]}, patience={'None or a positive int': [0, 1.5]})
WRONG_UNIT = dict(
    region=dict(size={r'a pair of ints \(h, w\)': [3, [3], [3, 0], [3, 4.], [1, 2, 3], None]},
                window={'None or a positive int': [0, -1, 1.5, True, '1']}),
    superpixel=dict(n_segments={r'an int in \[1, 65535\]': [0, 2**16, 10., None, True]},
                    compactness={'a number': ['10', None]},
                    folder={'None or the path of a folder': [3, '', 'no_such_folder', [tiny.ROOT]]}),
    pixel=dict(radius={'an int >= 0': [-1, .5, None]}))
WRONG_STRATEGY = dict(
    stochastic_batches=dict(batches={'a positive int': [0, 2.5, None]}),
    power_entropy=dict(beta={'a number above 0': ['x', 0, -1., True, None]}),
    softmaxbald=dict(beta={'a number above 0': [0]}), softrankbald=dict(beta={'a number above 0': [0]}),
    ripu=dict(k={'a positive int': ['a', 2.5, 0]}), ripu_pixel=dict(k={'a positive int': [-1]}),
    pixelpick=dict(percent={r'a percentage in \(0, 100\]': [500, 0, '5']}),
    contextual_diversity=dict(distance={"'euclidean' or 'kl'": ['cosine', 2]}),
    real=dict(clusters={'a positive int': [0, 2.]}),
    badge=dict(features_from={"'decode_head', 'backbone', 'neck' or": [0, None]}),
    clasp_pe=dict(share={r'a fraction in \[0, 1\]': [-.1, 2., 'x']},
                  betas={'a pair of numbers above 0': [1, [1], [0, 1], [1, 2, 3]]}),
    crc=dict(tau={r'a fraction in \[0, 1\]': [-.1, 1.1, 'x']}, alpha={r'a fraction in \(0, 1\)': [0, 1]},
             calibration={r'a fraction in \[0, 1\)': [1, -.1, None], 'a share of the labelled images': [0]}),
    entropy=dict(reduce={r"'mean', 'max' or a percentage in \(0, 100\]": ['median', 0, 101, True, ['mean']]},
                 mc={'None or a positive int': [0, 2.5]}, shortlist={'None or a positive int': [0]},
                 embed={'None for the selector topk': ['features'], 'one of features, .*': ['feature', ['features']]},
                 select={'one of topk, .*': ['bottomk', ['topk'], None]},
                 score={'one of random, .*': [['margin'], None]},
                 calibration={'a share of the labelled images': [.5]}),
    coreset=dict(embed={'one of features, .* for the selector kcenter': [None]}),
    bald=dict(mc={'above 1, or `committee`, or `flip` True, for bald': [1]}),
    clasp_pe_random=dict(score={'a score map for the embedding': ['random']}))
CASES = [  # a block, the key that is wrong, what it should be
    *(({key: value}, f'al.{key}', should_be) for key, wrong in WRONG.items()
      for should_be, values in wrong.items() for value in values),
    *((dict(stop={'metric': 'mIoU', key: value}), f'al.stop.{key}', should_be) for key, wrong in WRONG_STOP.items()
      for should_be, values in wrong.items() for value in values),
    *(({which: {'type': name.removesuffix('_random'), key: value}}, f'al.{which}.{key}', should_be)
      for which, table in dict(unit=WRONG_UNIT, strategy=WRONG_STRATEGY).items() for name, keys in table.items()
      for key, wrong in keys.items() for should_be, values in wrong.items() for value in values),
    (dict(unit='region', strategy=dict(type='entropy', reduce=5)), 'al.strategy.reduce', "'mean' or 'max' below image"),
    *((dict(unit=unit, strategy=strategy), 'al.unit', "'image', 'region' or 'superpixel' for the embedding class_")
      for unit in ('pixel', dict(type='pixel', radius=3)) for strategy in ('contextual_diversity', 'crc'))]


@pytest.mark.parametrize('block, key, should_be', CASES, ids=[str(block) for block, *_ in CASES])
def test_a_wrong_value_is_refused_by_its_key(block, key, should_be):
    with pytest.raises(ValueError, match=f'^`{key}` should be {should_be}.*, but got '):
        parse_settings(block)


@pytest.mark.parametrize('block, key, hint', [
    (dict(buget=1), 'al.buget', 'did you mean `al.budget`'),
    (dict(query_whit=1), 'al.query_whit', '.* `al.query_with`'),
    (dict(strategies='entropy'), 'al.strategies', '.* `al.strategy`'),
    (dict(xyzzy=1), 'al.xyzzy', 'known keys: unit, strategy, initial, budget, .*, seed'),
    (dict(unit=dict(type='region', sise=3)), 'al.unit.sise', 'did you mean `al.unit.size`'),
    (dict(unit=dict(type='region', xyzzy=3)), 'al.unit.xyzzy', 'known keys: size, window, label; '),
    (dict(unit=dict(type='image', size=[1, 1])), 'al.unit.size', 'known keys: none'),
    (dict(stop=dict(value=1, until=2)), 'al.stop.until', 'known keys: metric, value, patience'),
    (dict(strategy=dict(type='ripu', kk=2)), 'al.strategy.kk', 'did you mean `al.strategy.k`'),
    (dict(strategy=dict(type='entropy', selekt='power')), 'al.strategy.selekt', 'did you mean `al.strategy.select`'),
    (dict(strategy=dict(type='entropy', percent=2)), 'al.strategy.percent', 'known .*, reduce, .*_delete_=True'),
    (dict(strategy=dict(type='power_entropy', budget=2)), 'al.strategy.budget', '')])
def test_an_unknown_key_is_refused_with_the_nearest_or_all(block, key, hint):
    with pytest.raises(ValueError, match=f'^`{key}` is not a setting; {hint}'):
        parse_settings(block)


@pytest.mark.parametrize('strategy', [
    *(dict(type='crc', tau=tau) for tau in (0, 1.)), *(dict(type='clasp_pe', share=share) for share in (0., 1)),
    dict(type='pixelpick', percent=100), dict(type='entropy', reduce=100), dict(type='ripu', k=1)], ids=str)
def test_a_range_holds_its_ends_where_they_have_a_meaning(strategy):
    assert parse_settings(dict(strategy=strategy)).strategy in (strategy, strategy['type'])


@pytest.mark.parametrize('block', [3, 'entropy', ['entropy'], None])
def test_the_block_is_a_dict(block):
    with pytest.raises(ValueError, match='^`al` should be a dict, but got'):
        parse_settings(block)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), lambda probs: probs])
def test_what_json_cannot_hold_is_refused(value):
    """NaN would differ from itself on resume."""
    with pytest.raises(ValueError, match='^`al` should hold only finite numbers, strings, lists and dicts, but got'):
        parse_settings(dict(stop=dict(value=value)))


@pytest.mark.parametrize('path', [':', ':x', '.x:y', 'tiny:', 'tiny:darkest', 'tinny:brightest', 'builtins:max',
                                  'tiny:NAMES'])
@pytest.mark.parametrize('part', ['type', 'score', 'embed', 'select'])
def test_a_path_that_is_no_function_is_refused_by_its_key(path, part):
    key = 'al.strategy' if part == 'type' else f'al.strategy.{part}'
    with pytest.raises(ValueError, match=f'^`{key}` should name a function that can be imported, but got {path!r}: '):
        parse_settings(dict(strategy={'type': 'entropy', part: path}))


# --- options of a user's own function --------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch):
    """Registers a score of one's own, `mine`, with these parameters."""

    def register(parameters: str, future: bool = False) -> None:
        names = dict(al_patch=al_patch)
        exec(('from __future__ import annotations\n' if future else '')
             + f'def mine(probs_NCHW, {parameters}):\n    return probs_NCHW[:, 0]', names)
        monkeypatch.setitem(al_patch.AL_SCORES.module_dict, 'mine', names['mine'])

    return register


@pytest.mark.parametrize('future', [False, True])
@pytest.mark.parametrize('parameter, should_be, wrong, right', [
    ('power: float = 1.', 'of type float', ['2', True, [1.], None], [2, 2.5, -1]),
    ('power: int = 1', 'of type int', ['2', 2., True, None], [2, -1]),
    ('power: str = "a"', 'of type str', [2, None], ['b', '']),
    ('power: bool = False', 'of type bool', [1, 'True'], [True]),
    ('power: al_patch.Natural = 1', 'a positive int', [0, 1.], [2]),
    ('power: al_patch.or_none(al_patch.Percent) = None', r'None or a percentage in \(0, 100\]', [0, '2'], [None, 2.]),
    ('power: al_patch.one_of("a", "b") = "a"', "'a' or 'b'", ['c'], ['b'])])
def test_an_annotated_option_is_checked(own, parameter, should_be, wrong, right, future):
    own(parameter, future)
    for value in wrong:
        with pytest.raises(ValueError, match=f'^`al.strategy.power` should be {should_be}, but got '):
            parse_settings(dict(strategy=dict(type='mine', power=value)))
    for value in right:
        strategy = parse_settings(dict(strategy=dict(type='mine', power=value))).strategy
        assert al_patch.resolve_strategy(strategy).record['power'] == value


@pytest.mark.parametrize('annotation', ['', ': list', ': "unknown"', ': "float | NoSuchName"', ': "al_patch.NoSuch"'])
def test_an_option_of_any_other_annotation_may_be_anything(own, annotation):
    own(f'power{annotation} = 1')
    for value in ('x', 3, [1, 2], None):
        assert parse_settings(dict(strategy=dict(type='mine', power=value))).strategy['power'] == value


def test_an_option_without_a_default_has_to_be_given(own):
    own('power: float')
    assert parse_settings(dict(strategy=dict(type='mine', power=2.))).strategy['power'] == 2.
    for strategy in ('mine', dict(type='mine', mc=2)):
        with pytest.raises(ValueError, match='^`al.strategy.power` should be given: it has no default, and is none of'):
            parse_settings(dict(strategy=strategy))


# --- what settings become --------------------------------------------------------------------------------------------


def test_an_empty_block_is_the_defaults():
    defaults = {key: default for key, (default, _) in block_settings().items()}
    assert parse_settings({}).to_dict() == {**defaults, 'unit': dict(type='image'), 'oracle': dict(type='simulated')}
    assert vars(al_patch.Block()).items() <= defaults.items()


@pytest.mark.parametrize('units', [
    ['image', dict(type='image')],
    ['pixel', dict(type='pixel'), dict(type='pixel', radius=0)],
    ['region', dict(type='region', size=(32, 32)), dict(window=None, size=[32, 32], type='region')],
    ['superpixel', dict(type='superpixel', compactness=10), dict(type='superpixel', n_segments=1024)],
    [dict(type='region', size=(8, 9)), dict(type='region', size=[8, 9])]])
def test_equal_units_come_out_equal_with_all_options(units):
    first, *others = (parse_settings(dict(unit=unit)).unit for unit in units)
    assert all(other == first for other in others)


def test_a_units_options():
    assert parse_settings(dict(unit=dict(type='region', window=1))).unit == dict(
        type='region', size=[32, 32], window=1, label='exact')
    assert parse_settings(dict(unit=dict(type='superpixel', compactness=1))).unit == dict(
        type='superpixel', n_segments=1024, compactness=1, folder=None, label='exact')
    assert parse_settings(dict(unit='pixel')).unit == dict(type='pixel', radius=0)


SAME = {  # the shortest form, and others
    'entropy': [dict(type='entropy'), dict(type='entropy', mc=1), dict(type='entropy', mc=None, reduce='mean'),
                dict(type='entropy', score='entropy', embed=None, select='topk')],
    'bald': [dict(type='bald', mc=20), dict(type='bald', mc=None), dict(type='bald', shortlist=None, alpha=.05)],
    'random': [dict(type='random', calibration=0), dict(type='random', calibration=0.)],
    'power_entropy': [dict(type='power_entropy', beta=1), dict(type='power_entropy', select='power', beta=1.)],
    'pixelpick': [dict(type='pixelpick', percent=5), dict(type='pixelpick', score='margin')],
    'crc': [dict(type='crc', calibration=.2), dict(type='crc', tau=.5, alpha=.05)],
    'clasp_pe': [dict(type='clasp_pe', betas=[1, 100]), dict(type='clasp_pe', betas=(1., 100.), share=.66)],
    'contextual_diversity': [dict(type='contextual_diversity', distance='kl')],
    'tiny:brightest': [dict(type='tiny:brightest', power=1), dict(type='tiny:brightest', score='tiny:brightest')]}
SHORTEST = [  # a setting, and its shortest form
    (dict(type='ripu', k=4, mc=1), dict(type='ripu', k=4)),
    (dict(type='bald', mc=5, reduce='mean'), dict(type='bald', mc=5)),
    (dict(type='entropy', mc=20), dict(type='entropy', mc=20)),
    (dict(type='bald', select='power', beta=1), dict(type='bald', select='power')),
    (dict(type='power_entropy', select='softmax', beta=1), dict(type='power_entropy', select='softmax')),
    (dict(type='ripu', score='ripu_pixel', k=1), dict(type='ripu', score='ripu_pixel', k=1)),  # k=1 is ripu's default
    (dict(type='ripu', score='ripu_pixel', k=32), dict(type='ripu', score='ripu_pixel')),
    (dict(type='bald', score='entropy', mc=20), dict(type='bald', score='entropy', mc=20)),
    (dict(type='contextual_diversity', distance='euclidean', score='random'),
     dict(type='contextual_diversity', distance='euclidean')),
    (dict(type='coreset', embed='gradient', flip=False, distance='euclidean'),
     dict(type='coreset', embed='gradient')),
    (dict(type='tiny:brightest', power=2., select='tiny:last_ones'),
     dict(type='tiny:brightest', power=2, select='tiny:last_ones'))]


@pytest.mark.parametrize('setting, shortest', [
    *((setting, name) for name, others in SAME.items() for setting in [name, *others]), *SHORTEST], ids=str)
def test_a_strategy_is_kept_in_its_shortest_form(setting, shortest):
    """Whatever is left out is what the strategy has anyway, so a resumed run may spell it otherwise."""
    kept = parse_settings(dict(strategy=setting)).strategy
    assert kept == shortest
    assert al_patch.resolve_strategy(kept).record == al_patch.resolve_strategy(setting).record


@pytest.mark.parametrize('percent', [5., 50., 7.])
def test_two_parts_that_share_an_option_keep_it_though_their_defaults_differ(own, percent):
    own('percent=50.')
    kept = parse_settings(dict(strategy=dict(type='mine', select='top_percent', percent=percent))).strategy
    strategy = al_patch.resolve_strategy(kept)
    assert strategy.score.keywords == strategy.select.keywords == dict(percent=percent)


def test_stop_has_all_options():
    assert parse_settings(dict(stop=dict(value=75))).stop == dict(metric='mIoU', value=75, patience=None)


def test_overrides_have_string_keys_as_in_json():
    assert parse_settings(dict(overrides={2: dict(a=1)})).overrides == {'2': dict(a=1)}


def test_a_budget_list_sets_the_rounds():
    assert parse_settings(dict(budget=[1, 2, 3])).rounds == 3
    assert parse_settings(dict(budget=(1, .2), rounds=2)).budget == [1, .2]
    with pytest.raises(ValueError, match=r'^`al.budget` should .* `al.rounds` = 2 rounds, but got 3 entries'):
        parse_settings(dict(budget=[1, 2, 3], rounds=2))


@pytest.mark.parametrize('amount, total, n', [
    (7, 400, 7), (7, 3, 7), (.05, 400, 20), (1., 400, 400), (1, 400, 1), (.001, 400, 1), (.05, 2975, 149), (.1, 12, 1)])
def test_amounts(amount, total, n):
    assert number_of(amount, total) == n


def test_budgets():
    assert budgets(parse_settings(dict(budget=.1, rounds=3))) == [.1, .1, .1]
    assert budgets(parse_settings(dict(budget=[.1, 7]))) == [.1, 7]
    assert budgets(parse_settings(dict(rounds=0))) == []


# --- what a config has to give ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('al, changes, match', [
    (dict(weights='best'), {'default_hooks.checkpoint.save_best': None},
     "`al.weights='best'` needs .*`default_hooks.checkpoint.save_best`"),
    (dict(query_with='best'), {'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None},
     "`al.query_with='best'` needs validation"),
    (dict(stop=dict(value=1)), {'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None},
     '`al.stop` needs a validation metric'),
    (dict(), {'default_hooks.checkpoint.save_last': False}, '`default_hooks.checkpoint` should be'),
    (dict(), {'default_hooks.checkpoint': None}, '`default_hooks.checkpoint` should be'),
    (dict(overrides={2: {}}), {}, '`al.overrides` should name rounds from 0 to 1, but got 2')])
def test_a_config_that_cannot_serve_is_refused(make_cfg, build, al, changes, match):
    cfg = make_cfg(al, changes=changes)
    al, runner = parse_settings(cfg.al), build(cfg)
    with pytest.raises(ValueError, match=f'^{match}'):
        check_plan(al, runner)


def check_plan(al, runner) -> None:
    state = State(dict(seed=0, config={}), runner.work_dir, al, runner)
    for check in (al_report.check_overrides, al_report.check_schedule, al_report.check_best):
        check(state)


@pytest.fixture
def runner(make_cfg, build):
    return build(make_cfg({}))


# --- any block is settings or a refusal ------------------------------------------------------------------------------

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10), st.floats(), st.text(max_size=3),
    st.sampled_from(['image', 'entropy', 'random', 'last', 'best', 'mIoU', 'tiny:brightest', 'tiny:no', ':', '.x:y',
                     'x:', 'builtins:max', 'features', 'kcenter', 'kl']))
names = st.sampled_from(['type', 'score', 'select', 'reduce', 'power', 'value', 'patience', 'metric', '1', '²'])
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3), max_leaves=5)
amounts = st.integers(1, 20) | st.floats(.01, 1.)
unit_dicts = st.builds(lambda options, kind: dict(options, type=kind), st.dictionaries(
    st.sampled_from(['size', 'window', 'n_segments', 'compactness', 'radius', 'k']), values | amounts, max_size=2),
    st.sampled_from(['image', 'region', 'superpixel', 'pixel']) | leaves)
overrides = st.dictionaries(st.sampled_from([0, '1', '5', '6', 'x']), st.dictionaries(
    st.sampled_from(['train_cfg.max_iters', 'train_cfg.max_iters.x', '', '.', 'a.b', 'model']), values, max_size=2))
strategy_dicts = st.builds(lambda options, name: dict(options, type=name), st.dictionaries(
    names | st.sampled_from(['embed', 'k', 'beta', 'percent', 'distance', 'betas', 'mc', 'calibration', 'shortlist']),
    values, max_size=3),
    st.sampled_from([*al_patch.AL_SCORES.module_dict, *al_patch.AL_STRATEGIES.module_dict, 'tiny:brightest']))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(list(vars(al_patch.Block()))) | st.text(max_size=4), values, max_size=2) |
       st.builds(dict, strategy=strategy_dicts) | st.builds(dict, stop=values) | st.builds(dict, overrides=values))
def test_any_block_is_settings_or_a_value_error_that_names_it(block):
    try:
        al = parse_settings(block)
    except ValueError as error:
        assert str(error).startswith('`al')
        event('refused')
    else:
        assert set(al) == set(block_settings())
        assert all(int(k) >= 0 for k in al.overrides or {})
        assert parse_settings(al.to_dict()) == al  # as it is read from a state file


blocks = st.fixed_dictionaries({}, optional=dict(
    unit=unit_dicts, initial=amounts, budget=amounts | st.lists(amounts, min_size=1, max_size=3), overrides=overrides,
    per_image=st.booleans(), rounds=st.integers(0, 6), pool_size=amounts, stop=st.fixed_dictionaries({}, optional=dict(
        value=st.floats(), patience=st.integers(0, 3), metric=leaves))))


@settings(max_examples=400, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks)
def test_any_block_is_a_plan_or_a_value_error_that_names_it(runner, block):
    """What passes is one budget a round, and a config for each of them."""
    try:
        al = parse_settings(block)
        check_plan(al, runner)
    except ValueError as error:
        assert str(error).startswith('`al') and '\n' not in str(error)
        event('refused')
        return
    event('a plan')
    plan = budgets(al)
    assert len(plan) == al.rounds and all(1 <= number_of(amount, 1000) for amount in plan)
    for k in range(al.rounds + 1):
        state = State(dict(seed=0, config={}, rounds=[{}] * (k + 1)), runner.work_dir, al, runner,
                      types.SimpleNamespace(ignore_index=255, paths=['dataset']))
        assert round_config(state).work_dir.endswith(f'round_{k}')
