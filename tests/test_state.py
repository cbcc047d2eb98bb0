"""The state file: whole or not at all, readable or refused; what may change on resume; the initial images."""
import json
import os

import pytest
import tiny

import al_patch
from al_patch import Pool, check_resume, initial_names, labelled, parse_settings, read_state, write_atomically


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'al_state.json'
    path.write_text('{"schema": 1, "rounds": []}')
    return str(path)


def fail(*args):
    raise OSError('disk full')


@pytest.mark.parametrize('step', ['os.replace', 'os.fsync'])
def test_a_write_that_fails_leaves_the_old_state(path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(OSError, match='disk full'):
        patch.setattr(step, fail)
        write_atomically(path, '{"schema": 1, "rounds": [{}]}')
    assert read_state(path) == dict(schema=1, rounds=[])


def test_a_write_that_is_cut_off_leaves_the_old_state_and_the_next_one_works(path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, 'fsync', fail)
        write_atomically(path, '{"schema"')
    write_atomically(path, '{"schema": 1, "rounds": [1]}')
    assert read_state(path) == dict(schema=1, rounds=[1]) and os.listdir(os.path.dirname(path)) == ['al_state.json']


@pytest.mark.parametrize('text', ['', '{"schema": 1', '[]', '{}', 'null', '3', '\ud83d'])
def test_a_damaged_state_is_named(path, text):
    with open(path, 'wb') as file:
        file.write(text.encode('utf-8', 'surrogatepass'))
    with pytest.raises(ValueError, match='al_state.json is damaged .*: restore a copy, or start in another'):
        read_state(path)


def test_a_newer_state_is_named(path):
    write_atomically(path, '{"schema": 2}')
    with pytest.raises(ValueError, match='al_state.json should have schema 1, but got 2'):
        read_state(path)


def test_names_beyond_ascii_are_kept(path):
    state = dict(schema=1, rounds=[dict(asked=['straße/日本', 'a b'])])
    al_patch.save_state(state, os.path.dirname(path))
    assert read_state(path) == state and 'straße/日本' in open(path, encoding='utf-8').read()


def test_labelled():
    state = dict(rounds=[dict(asked=['c', 'a']), dict(asked=['b']), dict(asked=['d'])])
    assert list(labelled(state)) == ['c', 'a', 'b', 'd']
    assert [list(labelled(state, k)) for k in range(3)] == [['c', 'a'], ['c', 'a', 'b'], ['c', 'a', 'b', 'd']]


@pytest.fixture
def pool(make_cfg):
    return Pool(make_cfg())


def test_seeds_differ_by_purpose_and_stay_the_same():
    seeds = [al_patch.seed_of(*parts) for parts in ((0, 'a'), (0, 'b'), (1, 'a'), (0, 'a', 1), (0, 'a'))]
    assert len(set(seeds)) == 4 and seeds[0] == seeds[4] == 22560837461761
    assert all(0 <= seed < 2**48 for seed in seeds)


@pytest.mark.parametrize('initial, n', [(1, 1), (5, 5), (12, 12), (.25, 3), (.01, 1), (1., 12)])
def test_initial_as_an_amount(pool, initial, n):
    names = initial_names(initial, pool, 0)
    assert len(set(names)) == n and names == [name for name in pool.names if name in names]
    assert names == initial_names(initial, pool, 0)


def test_initial_depends_on_the_seed(pool):
    assert len({tuple(initial_names(4, pool, seed)) for seed in range(5)}) > 1


def test_initial_as_names_or_split_file(pool, tmp_path):
    split = tmp_path / 'split.txt'
    split.write_text('b/08\n\n  a/02 \nb/08\n')
    assert initial_names(str(split), pool, 0) == initial_names(['b/08', 'a/02'], pool, 1) == ['a/02', 'b/08']


@pytest.mark.parametrize('initial, match', [
    (13, '`al.initial` should be at most the 12 images there are, but got 13'),
    ('no/such/file.txt', "`al.initial` should name a split file, but there is no file 'no/such/file.txt'"),
    (['a/02', 'a/2'], r"such as 'a/\d\d', but 1 of 2 are not in the data set: a/2"),
    ([' '], 'should hold names of training images')])
def test_wrong_initials_are_refused(pool, initial, match):
    with pytest.raises(ValueError, match=match):
        initial_names(initial, pool, 0)


SETTINGS = dict(initial=4, budget=2, rounds=2)


def state_with(settings=None, queries=1) -> dict:
    rounds = [dict(asked=tiny.NAMES[:4]), *(dict(asked=tiny.NAMES[4 + 2 * k:6 + 2 * k]) for k in range(queries))]
    return dict(schema=1, settings=parse_settings(settings or SETTINGS).to_dict(), images=12, rounds=rounds)


@pytest.mark.parametrize('changes', [
    dict(), dict(rounds=5), dict(rounds=1), dict(stop=dict(value=90)), dict(budget=[2, 4, 3], rounds=3),
    dict(budget=[2, 1 / 6])])
def test_a_run_may_be_extended(pool, changes):
    check_resume(state_with(), parse_settings({**SETTINGS, **changes}), pool)


@pytest.mark.parametrize('changes, match', [
    (dict(initial=5), '`al.initial` was 4 when the run began and cannot change on resume, but got 5'),
    (dict(strategy='margin'), "`al.strategy` was 'entropy' when"), (dict(seed=3), '`al.seed` was None when'),
    (dict(weights='last'), "`al.weights` was 'scratch' when"), (dict(pool_size=.5), '`al.pool_size` was None'),
    (dict(query_with='best'), "`al.query_with` was 'last'"), (dict(overrides={1: {}}), '`al.overrides` was None'),
    (dict(budget=3), r'`al.rounds` and `al.budget` should leave the 1 queries .*\(\[2\]\), but got \[3\]'),
    (dict(rounds=0), r'should leave the 1 queries .*\(\[2\]\), but got \[\]')])
def test_a_run_may_not_be_rewritten(pool, changes, match):
    with pytest.raises(ValueError, match=match):
        check_resume(state_with(), parse_settings({**SETTINGS, **changes}), pool)


def test_labelled_images_must_still_be_there(pool):
    state = state_with()
    state['rounds'][1]['asked'].append('c/99')
    with pytest.raises(ValueError, match='1 labelled images are not in the data set any more: c/99'):
        check_resume(state, parse_settings(SETTINGS), pool)


def test_a_key_that_is_new_in_this_version_does_not_stop_a_resume(pool):
    state = state_with()
    del state['settings']['pool_size']  # as an older version wrote it
    check_resume(state, parse_settings(SETTINGS), pool)


def test_without_resume_a_run_is_not_overwritten(make_cfg, train):
    cfg = make_cfg(dict(rounds=0), changes=tiny.NO_VAL)
    train(cfg)
    path = os.path.join(cfg.work_dir, 'al_state.json')
    before = open(path).read()
    with pytest.raises(FileExistsError, match='al_state.json holds .* already: add --resume to go on'):
        train(cfg)
    assert open(path).read() == before


def test_a_budget_beyond_the_pool_is_refused_before_training(make_cfg, train, monkeypatch):
    monkeypatch.setattr(al_patch, 'train_round', fail)
    with pytest.raises(ValueError, match='`al.budget` should be at most the 8 images that are not in'):
        train(make_cfg(dict(budget=9)))


def test_a_finished_run_is_extended(make_cfg, train):
    short, changes = make_cfg({}, changes=tiny.NO_VAL), {**tiny.NO_VAL, 'resume': True}
    _, before = train(short)
    _, after = train(make_cfg(dict(rounds=2), changes=changes))
    assert [len(entry['asked']) for entry in after] == [4, 2, 2]
    for old, new in zip(before, after):
        assert {key: new[key] for key in old} == old  # nothing is trained or asked again


def test_a_changed_config_is_said(make_cfg, train, caplog):
    train(make_cfg(dict(rounds=0), changes=tiny.NO_VAL))
    cfg = make_cfg(dict(rounds=0), changes={**tiny.NO_VAL, 'resume': True, 'optim_wrapper.optimizer.lr': .2})
    train(cfg)
    logs = [os.path.join(d, f) for d, _, files in os.walk(cfg.work_dir) for f in files if f.endswith('.log')]
    assert any('The config has changed since the run began: optim_wrapper' in open(log).read() for log in logs)


def test_the_state_on_disk_is_json_with_the_settings_as_given(make_cfg, train):
    cfg = make_cfg(dict(rounds=0, overrides={0: {'train_cfg.max_iters': 2}}), changes=tiny.NO_VAL)
    train(cfg)
    state = json.load(open(os.path.join(cfg.work_dir, 'al_state.json')))
    assert state['settings'] == {**al_patch.DEFAULTS, 'unit': {'type': 'image'}, 'initial': 4, 'budget': 2, 'rounds': 0,
                                 'overrides': {'0': {'train_cfg.max_iters': 2}}}
    assert (state['schema'], state['seed'], state['images']) == (1, 0, 12)
