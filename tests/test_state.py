"""The state file: whole or not at all, readable or refused; what may change on resume; the initial images."""
import copy
import json
import os
import os.path as osp
import re
import shutil
from typing import Callable

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import al_patch
import al_report
from al_patch import (
    STATE_FILE,
    Pool,
    State,
    initial_images,
    parse_settings,
    read_mask,
    read_state,
    write_atomically,
    write_png,
)

SMALL = tiny.saved([{'a/00': None}])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'al_state.json'
    path.write_text(json.dumps(SMALL))
    return str(path)


def fail(*args):
    raise OSError('disk full')


@pytest.mark.parametrize('step', ['os.replace', 'os.fsync'])
def test_a_write_that_fails_leaves_the_old_state_and_the_next_one_works(path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(OSError, match='disk full'):
        patch.setattr(step, fail)
        write_atomically(path, json.dumps(dict(SMALL, seed=1)))
    assert read_state(path) == SMALL and os.listdir(osp.dirname(path)) == ['al_state.json']
    write_atomically(path, json.dumps(dict(SMALL, seed=2)))
    assert read_state(path) == dict(SMALL, seed=2) and os.listdir(osp.dirname(path)) == ['al_state.json']


def test_a_round_is_put_into_words_once_when_it_is_finished(tmp_path, monkeypatch):
    """What a save takes does not grow with the rounds; and what is read is what was written, strange names too."""
    names, texts, finished = ['a/00', '"rounds": []', '\\"rounds\\": []', 'ö, ["x"]'], [], []
    to_text = al_patch.to_text
    monkeypatch.setattr(al_patch, 'to_text', lambda value: texts.append(value) or to_text(value))
    for k in range(4):
        content = tiny.saved([{name: [i, i]} for i, name in enumerate(names[:k + 1])], config=dict(x='"rounds": []'))
        al_patch.write_state(str(tmp_path), content, finished)
        assert read_state(str(tmp_path / STATE_FILE)) == content == json.loads((tmp_path / STATE_FILE).read_text())
        assert len(finished) == k and len(texts) == 2 + (k > 0)  # the round before, this one, and all else
        texts.clear()
    assert (tmp_path / STATE_FILE).read_text().count('\n') > 40  # to be read by people, too


@pytest.mark.parametrize('text', ['', '{"schema": 2', '[]', '{}', 'null', '3', '{"schema": 1}', '\ud83d'])
def test_a_damaged_state_is_named(path, text):
    with open(path, 'wb') as file:
        file.write(text.encode('utf-8', 'surrogatepass'))
    with pytest.raises(ValueError, match='al_state.json is damaged .*: restore a copy, or start in another'):
        read_state(path)


def test_a_newer_state_is_named(path):
    write_atomically(path, '{"schema": 4}')
    with pytest.raises(ValueError, match='al_state.json should have schema 3 or less, but got 4'):
        read_state(path)


def test_names_beyond_ascii_are_kept(make_state):
    state, names = make_state(), {'straße/日本': None, 'a b': None}
    state.rounds.append(dict(asked=names))
    state.save()
    path = osp.join(state.work_dir, STATE_FILE)
    text = open(path, encoding='utf-8').read()
    assert json.loads(text)['rounds'] == [dict(asked=names)] and 'straße/日本' in text


def test_labelled():
    asked = [{'c': None, 'a': [1, 4]}, {'b': None}, {'a': [2, 9], 'd': [1, 1]}]
    state = State(dict(seed=0, config={}, rounds=[dict(asked=names) for names in asked]), '/work')
    assert list(state.labelled().items()) == [('c', None), ('a', 2), ('b', None), ('d', 2)]
    assert [list(state.labelled(k)) for k in range(3)] == [['c', 'a'], ['c', 'a', 'b'], ['c', 'a', 'b', 'd']]
    assert state.labelled(0)['a'] == 0 and state.mask_path(2, 'x/a') == '/work/round_2/labelled/x/a.png'


@pytest.fixture
def pool(make_cfg):
    return Pool(make_cfg())


def test_seeds_differ_by_purpose_and_stay_the_same():
    seeds = [al_patch.seed_of(*parts) for parts in ((0, 'a'), (0, 'b'), (1, 'a'), (0, 'a', 1), (0, 'a'))]
    assert len(set(seeds)) == 4 and seeds[0] == seeds[4] == 22560837461761
    assert all(0 <= seed < 2**48 for seed in seeds)


@pytest.fixture
def initial(pool):
    """A function from `al.initial` and the seed to the names."""

    def names(setting, seed=0) -> list:
        state = State(dict(seed=seed, config={}), '', parse_settings(dict(initial=setting, rounds=0)), pool=pool)
        assert set(initial_images(state).values()) == {None}
        return list(initial_images(state))

    return names


@pytest.mark.parametrize('setting, n', [(1, 1), (5, 5), (12, 12), (.25, 3), (.01, 1), (1., 12)])
def test_initial_as_an_amount(initial, setting, n):
    names = initial(setting)
    assert len(set(names)) == n and names == [name for name in tiny.NAMES if name in names]
    assert names == initial(setting)


def test_initial_depends_on_the_seed(initial):
    assert len({tuple(initial(4, seed)) for seed in range(5)}) > 1


def test_initial_as_names_or_split_file(initial, tmp_path):
    split = tmp_path / 'split.txt'
    split.write_text('b/08\n\n  a/02 \nb/08\n')
    assert initial(str(split)) == initial(['b/08', 'a/02'], 1) == ['a/02', 'b/08']


@pytest.mark.parametrize('setting, match', [
    ('no/such/file.txt', "the split file `al.initial` = 'no/such/file.txt' cannot be used .there is no such file"),
    (['a/02', 'a/2'], r"such as 'a/\d\d', but 1 of 2 are not in the data set: a/2"),
    ([' '], 'should hold names of training images')])
def test_wrong_initials_are_refused(initial, setting, match):
    with pytest.raises(ValueError, match=match):
        initial(setting)


SETTINGS = dict(initial=4, budget=2, rounds=2, overrides={'0': {'a': 1}, '2': {'a': 2}})


@pytest.fixture
def resume(pool, tmp_path):
    """A function that resumes, with other settings, a run that has made some queries."""

    def check(changes=None, queries=1, phase='query', **damage) -> State:
        asked = [tiny.NAMES[:4], *(tiny.NAMES[4 + 2 * k:6 + 2 * k] for k in range(queries))]
        content = tiny.saved([*map(dict.fromkeys, asked)], phase, settings=parse_settings(SETTINGS).to_dict())
        content['rounds'][-1].update(damage)
        al = parse_settings({**SETTINGS, **(changes or {})})
        state = State(content, str(tmp_path), al, pool=pool)
        al_report.check_resume(state, content)
        return state

    return check


@pytest.mark.parametrize('changes', [
    dict(), dict(rounds=5), dict(rounds=1), dict(stop=dict(value=90)), dict(budget=[2, 4, 3], rounds=3),
    dict(budget=[2, 1 / 6]), dict(strategy='margin'), dict(strategy='coreset', pool_size=5), dict(weights='last'),
    dict(query_with='best'), dict(keep='needed'), dict(overrides={'0': {'a': 1}}),
    dict(overrides={0: {'a': 1}, 2: {'b': 3}})])
def test_what_no_round_has_used_may_change(resume, changes):
    resume(changes)


@pytest.mark.parametrize('changes, match', [
    (dict(initial=5), '`al.initial` was 4 when round 0 used it and cannot change on resume, but got 5'),
    (dict(unit='pixel'), "`al.unit` was {'type': 'image'} when round 0 used it"),
    (dict(seed=3), '`al.seed` was None when round 0'),
    (dict(oracle='human'), "`al.oracle` was 'simulated' when round 0"),
    (dict(overrides={1: {}}), "`al.overrides` was {'a': 1} when round 0 used it and cannot .* but got None"),
    (dict(overrides={0: {'a': 1}, 1: {}}), '`al.overrides` was None when round 1 used it'),
    (dict(budget=3), r'`al.budget` was \[2\] when round 1 used it and cannot change on resume, but got \[3\]'),
    (dict(rounds=0), '`al.rounds` was 1 when round 1 used it .* but got 0')])
def test_what_a_round_has_used_cannot_change(resume, changes, match):
    with pytest.raises(ValueError, match=match):
        resume(changes)


def test_the_overrides_of_a_round_that_has_not_begun_to_train_may_change(resume, tmp_path):
    changes = dict(overrides={0: {'a': 1}, 1: {'a': 5}})
    resume(changes, phase='train')
    (tmp_path / 'round_1').mkdir()
    torch.save({}, tmp_path / 'round_1' / 'iter_2.pth')
    (tmp_path / 'round_1' / 'last_checkpoint').write_text('/elsewhere/round_1/iter_2.pth')
    with pytest.raises(ValueError, match='`al.overrides` was None when round 1 used it'):
        resume(changes, phase='train')


def test_a_strategy_that_calibrates_needs_images_that_were_held_out(resume):
    resume(dict(strategy='crc'), held_out=tiny.NAMES[:1])
    with pytest.raises(ValueError, match="`al.strategy` should not calibrate, for round 1 .* but got 'crc'"):
        resume(dict(strategy='crc'))


def test_labelled_images_must_still_be_there(resume):
    for damage in (dict(asked={'c/99': None}), dict(held_out=['c/99'])):
        with pytest.raises(ValueError, match='1 images that were .* not in the data set any more: c/99 .*state.json'):
            resume(**damage)


def test_a_key_that_is_new_in_this_version_does_not_stop_a_resume(resume, monkeypatch):
    saved = tiny.saved

    def older(*args, settings, **more):
        return saved(*args, settings={key: settings[key] for key in set(settings) - {'pool_size', 'keep'}}, **more)

    monkeypatch.setattr(tiny, 'saved', older)
    resume()


def test_wrong_settings_in_a_state_name_it(resume, monkeypatch):
    saved = tiny.saved
    monkeypatch.setattr(tiny, 'saved', lambda *args, settings, **more: saved(*args, settings=dict(
        settings, budget=-1), **more))
    with pytest.raises(ValueError, match='al_state.json cannot be used .*`al.budget` should be'):
        resume()


def test_without_resume_a_run_is_not_overwritten(make_cfg, train):
    cfg = make_cfg(dict(rounds=0), changes=tiny.NO_VAL)
    train(cfg)
    path = osp.join(cfg.work_dir, 'al_state.json')
    before = open(path).read()
    with pytest.raises(FileExistsError, match='al_state.json holds .* already: add --resume to go on'):
        train(cfg)
    assert open(path).read() == before


def test_a_budget_beyond_the_pool_is_refused_before_training(make_cfg, train, monkeypatch):
    monkeypatch.setattr(al_patch, 'train_round', fail)
    with pytest.raises(ValueError, match='`al.budget` should be at most the 8 images that are not in'):
        train(make_cfg(dict(budget=9)))


def state_on_disk(cfg) -> dict:
    return json.load(open(osp.join(cfg.work_dir, STATE_FILE)))


def test_a_finished_run_is_extended(make_cfg, train, build):
    short, ended = make_cfg({}, changes=tiny.NO_VAL), []
    _, before = train(short)
    ended.append(state_on_disk(short)['ended'])
    runner = build(make_cfg(dict(rounds=2), changes={**tiny.NO_VAL, 'resume': True}))
    runner.register_hook(type('', (Hook, ), dict(
        after_al_ask=lambda self, *args: ended.append(state_on_disk(short)['ended'])))())
    runner.train()
    after = state_on_disk(short)['rounds']
    assert [len(entry['asked']) for entry in after] == [4, 2, 2]
    for old, new in zip(before, after):
        assert {key: new[key] for key in old} == old  # nothing is trained or asked again
    assert ended == ['1 of 1 rounds of queries are done', None]
    assert state_on_disk(short)['ended'] == '2 of 2 rounds of queries are done'


def test_a_changed_config_is_said(make_cfg, train):
    train(make_cfg(dict(rounds=0), changes=tiny.NO_VAL))
    cfg = make_cfg(dict(rounds=0), changes={**tiny.NO_VAL, 'resume': True, 'optim_wrapper.optimizer.lr': .2})
    train(cfg)
    assert 'The config has changed since the last training: optim_wrapper\n' in tiny.log_of(cfg.work_dir)


@pytest.mark.parametrize('classes, match', [
    (('dark', 'grey', 'bright', 'dog'), 'the 3 classes .* but got 4, and what differs is dog: go on with those, or'),
    (('dark', 'grey'), 'but got 2, and what differs is bright: '),
    (('grey', 'dark', 'bright'), 'but got 3, and what differs is their order: ')])
def test_other_classes_are_refused_before_anything_runs(make_cfg, train, monkeypatch, classes, match):
    train(make_cfg(dict(rounds=0), changes=tiny.NO_VAL))
    monkeypatch.setattr(al_patch, 'build_round', fail)
    cfg = make_cfg(dict(rounds=1), resume=True, changes=tiny.NO_VAL)
    cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
    before = state_on_disk(cfg)
    with pytest.raises(ValueError, match=match):
        train(cfg)
    assert state_on_disk(cfg) == before


def test_classes_that_an_older_version_did_not_note_are_taken_over(make_cfg, train):
    cfg = make_cfg(dict(rounds=0), changes=tiny.NO_VAL)
    train(cfg)
    state = state_on_disk(cfg)
    del state['classes']
    write_atomically(osp.join(cfg.work_dir, STATE_FILE), json.dumps(state))
    train(make_cfg(dict(rounds=0), resume=True, changes=tiny.NO_VAL))
    assert state_on_disk(cfg)['classes'] == ['dark', 'grey', 'bright']


def test_a_warning_is_logged_and_kept_once(make_state, monkeypatch):
    told, state = [], make_state({}, [tiny.NAMES[:4], tiny.NAMES[4:6]])
    state.rounds[0].update(metrics={}, checkpoints=dict(last='iter_4.pth'), train_seconds=1.)
    monkeypatch.setattr('mmengine.logging.MMLogger.warning', lambda self, text: told.append(text))
    for text in 'aba':
        state.warn(text)
    state.save()
    assert [entry.get('warnings') for entry in read_state(osp.join(state.work_dir, STATE_FILE))['rounds']] == [
        None, ['a', 'b']] and told == ['a', 'b']


def test_the_state_on_disk_is_json_with_all_settings(make_cfg, train):
    """Those of the `al` block and of the unit filled in; the strategy's in its shortest form, and resolved by round."""
    cfg = make_cfg(dict(rounds=1, strategy=dict(type='power_entropy', beta=2, reduce='mean'), stop=dict(value=99),
                        overrides={0: {'train_cfg.max_iters': 2}}))
    train(cfg)
    state = state_on_disk(cfg)
    assert list(state) == ['schema', 'phase', 'round', 'seed', 'ended', 'settings', 'config', 'images', 'pixels',
                           'rounds', 'pool', 'classes', 'dropped']
    defaults = {key: default for key, (default, _) in al_patch.block_settings().items()}
    assert state['settings'] == {
        **defaults, 'unit': {'type': 'image'}, 'initial': 4, 'budget': 2, 'rounds': 1,
        'strategy': {'type': 'power_entropy', 'beta': 2}, 'oracle': {'type': 'simulated'},
        'stop': {'metric': 'mIoU', 'value': 99, 'patience': None}, 'overrides': {'0': {'train_cfg.max_iters': 2}}}
    assert (state['schema'], state['seed'], state['images'], state['pixels'], state['pool']) == (
        3, 0, 12, None, tiny.NAMES)
    assert state['classes'] == ['dark', 'grey', 'bright']
    assert (state['phase'], state['round'], state['ended']) == ('query', 1, '1 of 1 rounds of queries are done')
    first, second = state['rounds']
    assert list(first) == ['asked', 'strategy', 'spent', 'metrics', 'train_seconds', 'changed', 'checkpoints',
                           'query_seconds']
    assert first['strategy']['type'] == 'random' and second['strategy'] == dict(
        type='power_entropy', score='entropy', embed=None, select='power', beta=2, mc=1, shortlist=None, calibration=0.,
        alpha=.05, reduce='mean', flip=False, features_from='decode_head', committee=1)
    assert set(second['asked'].values()) == {None} and second['spent'] == {'images': 6, '% of images': 50.}


# --- a state that was altered ----------------------------------------------------------------------------------------


WRONG = 'text', [3], 2.5, {'a': 'text'}, {'a': -1}, -1, 2**64, True, None
# which of these are right after all, for what the table of fields says; where it begins with None, None too
RIGHT = {'dict': [{'a': 'text'}, {'a': -1}], '{str}': [{'a': 'text'}], '{file_name}': [{'a': 'text'}], 'str': ['text'],
         'amount': [2.5]}


@pytest.fixture(scope='module')
def finished(tmp_path_factory, shared_data):
    """The work_dir of a run over regions, with everything that a state can hold."""
    cfg = Config.fromstring(tiny.config_text(shared_data), '.py')
    cfg.merge_from_dict({**tiny.NO_VAL, 'train_cfg.max_iters': 1, 'experiment_name': 'finished'})
    cfg.work_dir = str(tmp_path_factory.mktemp('finished') / 'work')
    cfg.al = REGIONS
    Runner.from_cfg(cfg).train()
    path = osp.join(cfg.work_dir, STATE_FILE)
    content = read_state(path)
    content['rounds'][1].update(
        held_out=[], ids={}, returned={}, unchanged=0, from_store=1, warnings=['x'], changed=['model'])
    write_atomically(path, json.dumps(dict(content, dropped=[], classes=['dark', 'grey', 'bright'])))
    return cfg.work_dir


REGIONS = dict(unit=dict(type='region', size=[16, 16]), initial=9, budget=6, rounds=1)


def everything_in(folder: str) -> dict:
    """Each file below a folder, less logs and the lock, and its bytes."""
    paths = [osp.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return {osp.relpath(path, folder): open(path, 'rb').read() for path in paths
            if path.endswith(('.json', '.png', '.pth', '.csv'))}


@pytest.mark.parametrize('where', ['state', 'rounds[1]'])
def test_every_field_of_a_state_is_checked(finished, tmp_path, where):
    """Missing, of another type, negative, far too large: each in one line that names field and file."""
    content = read_state(osp.join(finished, STATE_FILE))
    text = al_patch.STATE_FIELDS if where == 'state' else al_patch.ROUND_FIELDS + al_patch.TRAINED_FIELDS
    path, tried, kinds = str(tmp_path / STATE_FILE), 0, dict(line.split(None, 1) for line in text.splitlines())
    for name, kind in kinds.items():
        field = name.rstrip('?')
        for wrong in (*WRONG, 'missing'):
            altered = copy.deepcopy(content)
            part = altered if where == 'state' else altered['rounds'][1]
            if wrong == 'missing':
                part.pop(field, None)
            else:
                part[field] = wrong
            write_atomically(path, json.dumps(altered))
            right = [*RIGHT.get(kind.removeprefix('None | '), ()), *['missing'] * (field != name),
                     *[None] * kind.startswith('None | ')]
            if wrong in right:
                read_state(path)
                continue
            with pytest.raises(ValueError, match=rf'^{path} .*') as error:
                read_state(path)
            assert field in str(error.value) and '\n' not in str(error.value)
            tried += 1
    here = content if where == 'state' else content['rounds'][1]
    assert tried > 7 * len(kinds) and set(here) <= {name.rstrip('?') for name in kinds}


def both(key: str, value) -> Callable:
    return lambda content: content['rounds'][1].update({key: value})


@pytest.mark.parametrize('alter, match', [
    (lambda c: c.update(phase='trian'), "`state.phase` should be 'label' | 'train' | 'query', but is 'trian'"),
    (lambda c: c.update(round=0), '`state.round` should be 1, the last of `rounds`, but is 0'),
    (lambda c: c['rounds'][1]['asked'].update(x=[1, 256]), 'not in the data set any more: x (`rounds` of'),
    (lambda c: c['rounds'][1]['asked'].pop(next(iter(c['rounds'][1]['asked']))), '`rounds[1].pixels` of '),
    (both('pixels', 6 * 256 + 1), '`rounds[1].pixels` of '), (both('void_pixels', 99), '`rounds[1].spent` of '),
    (both('spent', dict(images=10**9)), '`rounds[1].spent` of '),
    (both('checkpoints', dict(last='../round_0/iter_1.pth')), '`rounds[1].checkpoints` should be {file_name}'),
    (both('checkpoints', dict(last='..')), '`rounds[1].checkpoints` should be {file_name}'),
    (both('metrics', dict(mIoU=-3)), '`rounds[1].metrics` should be {float}'),
    (lambda c: c['rounds'][0].pop('metrics'), '`rounds[0].metrics` should be {float}, but is missing'),
    (lambda c: c['settings'].update(unit='cell'), '`al.unit` should be one of'),
    (lambda c: c['settings'].update(rounds=-1), '`al.rounds` should be an int >= 0, but got -1')])
def test_what_does_not_agree_is_refused_and_nothing_changes(finished, make_cfg, train, tmp_path, alter, match):
    cfg = make_cfg(REGIONS, changes={**tiny.NO_VAL, 'train_cfg.max_iters': 1, 'resume': True})
    shutil.copytree(finished, cfg.work_dir)
    path = osp.join(cfg.work_dir, STATE_FILE)
    content = json.load(open(path))
    alter(content)
    write_atomically(path, json.dumps(content))
    before = everything_in(cfg.work_dir)
    with pytest.raises(ValueError, match=re.escape(match)) as error:
        train(cfg)
    assert STATE_FILE in str(error.value) and '\n' not in str(error.value)
    assert everything_in(cfg.work_dir) == before


def test_a_name_that_stands_twice_is_named(finished, tmp_path):
    text = open(osp.join(finished, STATE_FILE)).read()
    name = next(iter(json.loads(text)['rounds'][0]['asked']))
    (tmp_path / STATE_FILE).write_text(text.replace(f'"{name}": [', f'"{name}": [1, 256], "{name}": [', 1))
    with pytest.raises(ValueError, match=f'{STATE_FILE} is damaged .`{name}` stands twice'):
        read_state(str(tmp_path / STATE_FILE))


@pytest.mark.parametrize('damage, match', [
    (os.remove, 'is missing or damaged'), (lambda path: open(path, 'wb').close(), 'is missing or damaged'),
    (lambda path: write_png(path, np.ones((4, 4), bool)), r'should show the {n} pixels of \(32, 48\) .* shows 16 of'),
    (lambda path: write_png(path, ~read_mask(path)), r'shows {rest} of \(32, 48\)')])
def test_masks_that_do_not_agree_are_refused_and_nothing_changes(finished, make_cfg, train, damage, match):
    cfg = make_cfg(REGIONS, changes={**tiny.NO_VAL, 'train_cfg.max_iters': 1, 'resume': True})
    shutil.copytree(finished, cfg.work_dir)
    content = read_state(osp.join(cfg.work_dir, STATE_FILE))
    name, n = next((name, units[1]) for name, units in content['rounds'][0]['asked'].items()
                   if name not in content['rounds'][1]['asked'])
    path = osp.join(cfg.work_dir, 'round_0', 'labelled', f'{name}.png')
    damage(path)
    before = everything_in(cfg.work_dir)
    match = match.format(n=n, rest=32 * 48 - n)
    with pytest.raises(ValueError, match=f'^the mask {path} .*{match}') as error:
        train(cfg)
    assert '\n' not in str(error.value) and everything_in(cfg.work_dir) == before


# --- what changes between two starts ---------------------------------------------------------------------------------


def test_the_strategy_may_change_for_the_rounds_to_come(make_cfg, train):
    """Each round records its own, and which keys of the config were others than in the round before; overrides are."""
    cfg = make_cfg(dict(overrides={0: {'train_cfg.max_iters': 2}}), changes=tiny.NO_VAL)
    train(cfg)
    again = make_cfg(dict(rounds=3, strategy='margin', weights='last', overrides={0: {'train_cfg.max_iters': 2}}),
                     changes={**tiny.NO_VAL, 'resume': True, 'optim_wrapper.optimizer.lr': .2})
    _, rounds = train(again)
    assert [entry['strategy']['type'] for entry in rounds] == ['random', 'power_entropy', 'margin', 'margin']
    assert [entry['changed'] for entry in rounds] == [[], ['train_cfg'], ['optim_wrapper'], []]
    log = tiny.log_of(cfg.work_dir)
    assert "Settings have changed since the run last started: al.strategy was 'power_entropy' and is 'margin'; " \
        "al.rounds was 1 and is 3; al.weights was 'scratch' and is 'last'\n" in log
    assert 'The config has changed since the last training: optim_wrapper\n' in log


def test_best_is_asked_for_too_late(make_cfg, train):
    train(make_cfg({}, changes={'default_hooks.checkpoint.save_best': None}))
    with pytest.raises(FileNotFoundError, match='the checkpoint .*/round_1/best that the run needs to go on is gone'):
        train(make_cfg(dict(rounds=2, query_with='best'), resume=True))


# --- what an older version has written -------------------------------------------------------------------------------

@pytest.mark.parametrize('unit', ['image', 'region'])
def test_schema_2_is_read_as_today(path, unit):
    """It had paths of checkpoints relative to the work_dir, or outside of it, and no `changed`."""
    write_atomically(path, json.dumps(SCHEMA_1[unit]))
    today = read_state(path)
    then = copy.deepcopy(dict(today, schema=2))
    for entry in then['rounds'][:1]:
        entry['checkpoints'] = dict(last='round_0/iter_4.pth', best='../elsewhere/best_mIoU_iter_4.pth')
    write_atomically(path, json.dumps(then))
    assert read_state(path) == today


with open(osp.join(osp.dirname(__file__), 'schema_1.json')) as file:
    SCHEMA_1 = json.load(file)  # recorded in round 1, after the query and before the training


@pytest.mark.parametrize('unit', ['image', 'region'])
def test_schema_1_is_read_as_today(path, unit):
    old = SCHEMA_1[unit]
    write_atomically(path, json.dumps(old))
    state = read_state(path)
    assert (state['schema'], state['ended']) == (3, None)
    assert {key: state[key] for key in old if key not in ('schema', 'rounds')} == {
        key: value for key, value in old.items() if key not in ('schema', 'rounds')}
    for then, now in zip(old['rounds'], state['rounds']):
        assert now['asked'] == (dict.fromkeys(then['asked']) if unit == 'image' else then['asked'])
        assert 'labelled' not in now and now['spent'] == then.get('labelled', {}) and now['strategy'] == {}
        assert now.get('checkpoints') in (None, dict(last='iter_4.pth', best='best_mIoU_iter_4.pth'))
        assert all(now[key] == then[key] for key in set(then) - {'asked', 'labelled', 'checkpoints'})
    names = dict.fromkeys(name for entry in old['rounds'] for name in entry['asked'])
    assert list(State(state, '').labelled()) == list(names)


@pytest.mark.parametrize('unit', ['image', 'region'])
def test_a_run_resumes_from_schema_1(make_cfg, train, unit):
    old, settings = SCHEMA_1[unit], SCHEMA_1[unit]['settings']
    cfg = make_cfg({key: settings[key] for key in ('unit', 'strategy', 'initial', 'budget', 'rounds', 'stop')},
                   resume=True)
    for k, images in enumerate(SCHEMA_1['cells'] if unit == 'region' else ()):
        for name, cells in images.items():
            mask = np.isin(np.arange(6), cells).reshape(2, 3).repeat(16, 0).repeat(16, 1)
            al_patch.write_png(f'{cfg.work_dir}/round_{k}/labelled/{name}.png', mask)
    os.makedirs(cfg.work_dir, exist_ok=True)
    write_atomically(osp.join(cfg.work_dir, STATE_FILE), json.dumps(old))
    _, rounds = train(cfg)
    asked = [list(entry['asked']) for entry in rounds]
    assert asked[:2] == [list(entry['asked']) for entry in old['rounds']] and len(rounds) == 3
    assert [entry['metrics'] for entry in rounds[:1]] == [old['rounds'][0]['metrics']]
    assert all('mIoU' in rounds[k]['metrics'] and osp.isfile(tiny.checkpoint_of(cfg, rounds, k)) for k in (1, 2))
    if unit == 'image':
        assert len(set(sum(asked, []))) == 8
        assert [entry['spent']['images'] for entry in rounds] == [4, 6, 8]
    else:
        assert [entry['spent']['regions'] for entry in rounds] == [9, 15, 21]
        assert [entry['spent']['pixels'] for entry in rounds] == [9 * 256, 15 * 256, 21 * 256]
    assert state_on_disk(cfg)['schema'] == 3
    table = open(osp.join(cfg.work_dir, 'learning_curve.csv')).read().splitlines()
    assert len(table) == 4
