"""The `al` block: what is refused, by which words, and the arithmetic of amounts."""
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from al_patch import DEFAULTS, budgets, check_runner, count, parse_settings, round_config

WRONG = [
    ('unit', 'page'), ('unit', None), ('strategy', 3), ('strategy', dict(score='entropy')), ('strategy', 'nonsense'),
    ('initial', 0), ('initial', -1), ('initial', 1.5), ('initial', 0.), ('initial', True), ('initial', ''),
    ('initial', []), ('initial', [1]), ('budget', 0), ('budget', '5'), ('budget', []), ('budget', [1, 0]),
    ('budget', None), ('rounds', -1), ('rounds', 2.), ('rounds', True), ('weights', 'first'), ('query_with', 'scratch'),
    ('pool_size', 0), ('pool_size', 1.01), ('overrides', {'one': {}}), ('overrides', {'02': {}}),
    ('overrides', {1: 4000}), ('overrides', [1]),
    ('stop', {}), ('stop', dict(metric='mIoU')), ('stop', dict(value='75')), ('stop', dict(patience=0)),
    ('stop', dict(patience=1.5)), ('stop', dict(value=1, until=2)), ('seed', -1), ('seed', 0.5), ('seed', False)]


@pytest.mark.parametrize('key, value', WRONG)
def test_a_wrong_value_is_refused_by_its_key(key, value):
    with pytest.raises(ValueError, match=f'^`al.{key}` should .*, but got '):
        parse_settings({key: value})


@pytest.mark.parametrize('key, near', [('buget', 'budget'), ('strategies', 'strategy'), ('query_whit', 'query_with')])
def test_an_unknown_key_is_refused_with_the_nearest(key, near):
    with pytest.raises(ValueError, match=f'^`al.{key}` is not a setting; did you mean `al.{near}`'):
        parse_settings({key: 1})


def test_an_unknown_key_with_nothing_near_lists_all():
    with pytest.raises(ValueError, match='known keys: ' + ', '.join(DEFAULTS)):
        parse_settings(dict(xyzzy=1))


@pytest.mark.parametrize('block', [3, 'entropy', ['entropy'], None])
def test_the_block_is_a_dict(block):
    with pytest.raises(ValueError, match='^`al` should be a dict, but got'):
        parse_settings(block)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r'^`al` should hold only .*\(function\)'):
        parse_settings(dict(strategy=lambda probs: probs))


def test_an_empty_block_is_the_defaults():
    assert parse_settings({}).to_dict() == {**DEFAULTS, 'unit': dict(type='image')}


def test_a_budget_list_sets_the_rounds():
    assert parse_settings(dict(budget=[1, 2, 3])).rounds == 3
    assert parse_settings(dict(budget=(1, .2), rounds=2)).budget == [1, .2]
    with pytest.raises(ValueError, match=r'^`al.budget` should .* `al.rounds` = 2 rounds, but got 3 entries'):
        parse_settings(dict(budget=[1, 2, 3], rounds=2))


def test_overrides_have_string_keys_as_in_json():
    assert parse_settings(dict(overrides={2: dict(a=1)})).overrides == {'2': dict(a=1)}


@pytest.mark.parametrize('amount, total, n', [
    (7, 400, 7), (7, 3, 7), (.05, 400, 20), (1., 400, 400), (1, 400, 1), (.001, 400, 1), (.05, 2975, 149), (.1, 12, 1)])
def test_count(amount, total, n):
    assert count(amount, total) == n


def test_budgets():
    assert budgets(parse_settings(dict(budget=.1, rounds=3))) == [.1, .1, .1]
    assert budgets(parse_settings(dict(budget=[.1, 7]))) == [.1, 7]
    assert budgets(parse_settings(dict(rounds=0))) == []
    assert [count(amount, 50) for amount in (.1, 7, .001, 1.)] == [5, 7, 1, 50]


@pytest.mark.parametrize('al, changes, match', [
    (dict(weights='best'), {'default_hooks.checkpoint.save_best': None}, "`al.weights='best'` needs `default_hooks"),
    (dict(query_with='best'), {'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None},
     "`al.query_with='best'` needs validation"),
    (dict(stop=dict(value=1)), {'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None},
     '`al.stop` needs a validation metric'),
    (dict(), {'default_hooks.checkpoint.save_last': False}, '`default_hooks.checkpoint` should be'),
    (dict(), {'default_hooks.checkpoint': None}, '`default_hooks.checkpoint` should be'),
    (dict(overrides={2: {}}), {}, '`al.overrides` should name rounds from 0 to 1, but got 2')])
def test_a_config_that_cannot_serve_is_refused(make_cfg, build, al, changes, match):
    cfg = make_cfg(al, changes=changes)
    with pytest.raises(ValueError, match=match):
        check_runner(parse_settings(cfg.al), build(cfg))


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10), st.floats(), st.text(max_size=3),
    st.sampled_from(['image', 'entropy', 'random', 'last', 'best', 'mIoU', 'tiny:brightest', 'tiny:no', ':', '.x:y',
                     'x:', 'builtins:max']))
names = st.sampled_from(['type', 'score', 'select', 'reduce', 'power', 'value', 'patience', 'metric', '1', '²'])
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3), max_leaves=5)
amounts = st.integers(1, 20) | st.floats(.01, 1.)
unit_dicts = st.builds(lambda options, kind: dict(options, type=kind), st.dictionaries(
    st.sampled_from(['size', 'window', 'n_segments', 'compactness', 'radius', 'k']), values | amounts, max_size=2),
    st.sampled_from(['image', 'region', 'superpixel', 'pixel']) | leaves)
overrides = st.dictionaries(st.sampled_from([0, '1', '5', '6', 'x']), st.dictionaries(
    st.sampled_from(['train_cfg.max_iters', 'train_cfg.max_iters.x', '', '.', 'a.b', 'model']), values, max_size=2))
strategy_dicts = st.builds(lambda options: dict(options, type='entropy'), st.dictionaries(names, values, max_size=2))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(list(DEFAULTS)) | st.text(max_size=4), values, max_size=2) |
       st.builds(dict, strategy=strategy_dicts) | st.builds(dict, stop=values) | st.builds(dict, overrides=values))
def test_any_block_is_settings_or_a_value_error_that_names_it(block):
    try:
        al = parse_settings(block)
    except ValueError as error:
        assert str(error).startswith('`al')
    else:
        assert set(al) == set(DEFAULTS)
        assert all(int(k) >= 0 for k in al.overrides or {})


@pytest.mark.parametrize('path', [':', ':x', '.x:y', 'tiny:', 'builtins:max'])
def test_a_path_that_is_no_function_is_refused_by_its_key(path):
    with pytest.raises(ValueError, match='^`al.strategy.score` should'):
        parse_settings(dict(strategy=path))


def test_an_option_of_another_type_than_a_name_is_refused_by_its_key():
    with pytest.raises(ValueError, match='^`al.strategy.score` should be one of'):
        parse_settings(dict(strategy=dict(type='entropy', score=['margin'])))


@pytest.fixture
def runner(make_cfg, build):
    return build(make_cfg({}))


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
        check_runner(al, runner)
    except ValueError as error:
        assert str(error).startswith('`al') and '\n' not in str(error)
        event('refused')
        return
    event('a plan')
    plan = budgets(al)
    assert len(plan) == al.rounds and all(1 <= count(amount, 1000) for amount in plan)
    for k in range(al.rounds + 1):
        state = dict(settings=al.to_dict(), round=k, seed=0, phase='train', rounds=[])
        assert round_config(runner, state, False).work_dir.endswith(f'round_{k}')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_no_finite_number_is_refused(value):
    """JSON has none, and NaN would differ from itself on resume."""
    with pytest.raises(ValueError, match='^`al` should hold only finite numbers'):
        parse_settings(dict(stop=dict(value=value)))
