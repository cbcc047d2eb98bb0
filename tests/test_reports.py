"""Reports and pictures: curves, tables and figures of runs, against values computed by hand; and the command line."""
import copy
import csv
import json
import math
import os
import os.path as osp
import pickle
import re
import shutil
import subprocess
import sys
import time
import types

import cv2
import mmengine
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

import al_patch
import al_report
from al_patch import STATE_FILE, Pool
from al_report import area_under_curve, group_runs, main, mean_and_std, ranking_overlap, share_needed, units_per_image

al_report.hook()  # `visualize` is now a key of the `al` block
ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
NAN = pytest.approx(math.nan, nan_ok=True)
CELL = dict(type='region', size=[8, 8])  # 24 of them in each of 12 images


def make_state(shares: list, values: list, seed: int = 0, phase: str = 'query', clicks: bool = False, **settings):
    """The state of a run on 100 images: the labelled share and mIoU after each round."""
    al = dict(rounds=len(shares) - 1, seed=seed, strategy='entropy')
    al = al_patch.parse_settings({**al, **settings}).to_dict()
    spent = [{'images': share, '% of images': float(share)} for share in shares]
    asked = [{f'{i}': None for i in range(a, b)} for a, b in zip([0, *shares], shares)]
    if clicks:
        spent = [{'images': 1, 'regions': 10 * share, 'clicks': 10 * share, '% of pixels': float(share)}
                 for share in shares]
    rounds = [dict(asked=names, spent=have, metrics=dict(aAcc=1., mIoU=value), train_seconds=9., query_seconds=1.)
              for names, have, value in zip(asked, spent, values)]
    k, ended = len(rounds) - 1, None
    if phase == 'query' and k >= al['rounds']:
        ended = f'{al["rounds"]} of {al["rounds"]} rounds of queries are done'
    return dict(schema=3, phase=phase, round=k, seed=seed, ended=ended, settings=al, images=100, rounds=rounds,
                config=dict(model='m', randomness=f'r{seed}'))


def of_schema_1(state: dict) -> dict:
    """A state as the first schema had it: lists of images, figures of trained rounds only, no reason of the end."""
    state = copy.deepcopy(state)
    del state['ended']
    for entry in state['rounds']:
        spent, entry['asked'] = entry.pop('spent'), list(entry['asked'])
        if 'metrics' in entry:
            entry['labelled'] = spent
    return dict(state, schema=1)


def write_state(folder, state: dict) -> str:
    os.makedirs(folder, exist_ok=True)
    (folder / STATE_FILE).write_text(json.dumps(state))
    return str(folder)


def cells_of(table: str) -> dict:
    """First cell of a row -> the others."""
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines() if '|' in line]
    return {first: others for first, *others in rows}


def size_of(path) -> tuple:
    with Image.open(path) as image:
        assert np.asarray(image.convert('L')).std() > 5, 'an empty figure'
        return image.size


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('share, values, area', [
    ([10, 20], [40, 60], 50), ([0, 10, 40], [0, 20, 50], (10 * 10 + 30 * 35) / 40), ([5], [70], math.nan)])
def test_area_under_curve(share, values, area):
    assert area_under_curve(np.array(share, float), np.array(values, float)) == pytest.approx(area, nan_ok=True)


@pytest.mark.parametrize('level, needed', [
    (50, 15),  # half way between 40 and 60
    (60, 20), (72, 30 + 10 * 22 / 30),  # up again from the dip at 50
    (40, 10), (30, 10),  # reached at the first point
    (80, 40), (81, math.nan)])
def test_share_needed(level, needed):
    share, values = np.array([10., 20., 30., 40.]), np.array([40., 60., 50., 80.])
    assert share_needed(share, values, level) == pytest.approx(needed, nan_ok=True)


def test_mean_and_std():
    assert mean_and_std([10., 12., 14.]) == '12.00 ± 2.00' and mean_and_std([3.]) == '3.00'
    assert mean_and_std([math.nan, 1.]) == '- (1 of 2)' and mean_and_std([math.nan]) == '-'


@pytest.mark.parametrize('void', [-1, 255, 65535])
def test_void_is_no_class_whatever_its_value(void):
    assert al_report.class_counts(np.array([0, 2, 2, void]), 3).tolist() == [1, 0, 2]


def test_ranking_overlap():
    before = dict(zip('abcde', [5, 4, 3, 2, 1]), gone=9)
    assert ranking_overlap(before, dict(zip('abcde', [.5, .4, .3, .2, .1]))) == (pytest.approx(1), NAN)
    assert ranking_overlap(before, dict(zip('abcde', [1, 2, 3, 4, 5]))) == (pytest.approx(-1), NAN)
    # ranks 1 2 3 4 5 against 1 3 2 4 5: 1 - 6 (1 + 1) / (5 * 24)
    assert ranking_overlap(before, dict(zip('abcde', [5, 3, 4, 2, 1]))) == (pytest.approx(.9), NAN)
    assert ranking_overlap(before, dict(a=1, new=2)) == (NAN, NAN)
    # of 109 a tenth are the first 10, of which 7 have stayed; a tenth of 99 would be too few to tell
    many = {f'{i}': -i for i in range(109)}
    moved = {**many, **{f'{i}': -200 for i in range(3)}}
    assert ranking_overlap(many, moved)[1] == .7
    assert ranking_overlap({f'{i}': -i for i in range(99)}, moved)[1] == NAN


def test_runs_are_grouped_by_all_but_their_seeds():
    runs = {'a0': make_state([10, 20, 30], [40, 50, 60], 0), 'a1': make_state([10, 20], [42, 54], 1, rounds=2),
            'a2': make_state([10, 20, 30], [1, 2, 3], 2, visualize=3),
            'b': make_state([10, 20, 30], [30, 40, 50], 0, strategy='random'),
            'young': dict(make_state([10], [0], 0, rounds=2), rounds=[dict(asked={'0': None}, spent={})])}
    groups = group_runs(runs, 'mIoU')
    assert list(groups) == ['entropy', 'random']
    assert groups['entropy'].shape == (3, 3, 2)  # as far as all three are
    assert groups['entropy'][:, 2].tolist() == [[40, 50], [42, 54], [1, 2]]
    other = make_state([10, 20, 30], [7, 8, 9], 0)
    other['config']['model'] = 'another'
    assert list(group_runs({**runs, 'c': other}, 'mIoU')) == ['entropy', 'random', 'entropy (c)']
    assert list(group_runs(dict(a=runs['a0'], d=make_state([10, 20, 30], [1, 1, 1], budget=7)), 'mIoU')) == [
        'budget=0.05', 'budget=7']


# --- the command line ------------------------------------------------------------------------------------------------


def test_compare_by_hand(tmp_path, capsys):
    """Two seeds from 40 to 60, and from 44 to 68, over 10 to 20 %; all labels give 70."""
    dirs = [write_state(tmp_path / 'a', make_state([10, 20], [40, 60], 0)),
            write_state(tmp_path / 'b', make_state([10, 20], [44, 68], 1)),
            write_state(tmp_path / 'r', make_state([10, 20], [30, 40], 0, strategy='random')),
            write_state(tmp_path / 'full', make_state([100], [70], 0, initial=1.))]
    main(['compare', *dirs, '-o', str(tmp_path / 'out' / 'curves.png')])
    cells = cells_of(capsys.readouterr().out)
    assert cells['runs'] == ['seeds', 'rounds', '% labelled', 'last mIoU', 'area under curve', '% for 90% of full',
                             '% for 95% of full']
    # 90 % is 63 and 95 % is 66.5: the first seed ends below; the second gets there at 10 + 10 * 19 / 24 and 19.375
    assert cells['entropy'] == ['2', '2', '10 to 20', '64.00 ± 5.66', '53.00 ± 4.24', '- (1 of 2)', '- (1 of 2)']
    assert cells['random'] == ['1', '2', '10 to 20', '40.00', '35.00', '-', '-'] and len(cells) == 3
    assert size_of(tmp_path / 'out' / 'curves.png') == (672, 456)
    main(['compare', *dirs[:2], '--full', '60', '-o', str(tmp_path / 'curves.pdf')])
    # 54 at 17 and at 10 + 10 * 10 / 24 = 14.17 %, 57 at 18.5 and at 15.42; of two, std = difference / sqrt 2
    assert cells_of(capsys.readouterr().out)['entropy'][-2:] == ['15.58 ± 2.00', '16.96 ± 2.18']
    assert (tmp_path / 'curves.pdf').read_bytes().startswith(b'%PDF')


SHARES = [5 * k for k in range(1, 8)]


def test_labels_that_a_target_takes(tmp_path, capsys):
    """60 - 40 (x / 5)^-1 is 56 at 50 % and 55 at 40 %; 7 rounds come to 35 %."""
    dirs = [write_state(tmp_path / 'a', make_state(SHARES, [60 - 200 / x for x in SHARES], rounds=9)),
            write_state(tmp_path / 'r', make_state(SHARES, [40, 48, 39, 47, 40, 48, 40], strategy='random', rounds=9)),
            write_state(tmp_path / 'm', make_state(SHARES[:3], [40, 50, 53], strategy='margin', rounds=9)),
            write_state(tmp_path / 'e', make_state(SHARES[:3], [40, 50, 60], strategy='ripu', rounds=9)),
            write_state(tmp_path / 'full', make_state([100], [55 / .95], initial=1.))]
    main(['compare', *dirs, '--target', '.95'])
    cells = {name: row[-1] for name, row in cells_of(capsys.readouterr().out).items()}
    assert cells['runs'] == '% for 55, 5 to 95 % likely'
    assert cells['random'] == cells['margin'] == 'cannot tell yet' and cells['ripu'] == '12.5 (reached)'
    middle, low, high = map(float, re.fullmatch(r'(.+) \((.+) to (.+)\)', cells['entropy']).groups())
    assert 35 < low < 40 < high < 60 and 36 < middle < 44
    main(['compare', dirs[0], '--target', '55'])
    assert cells_of(capsys.readouterr().out)['entropy'][-1] == cells['entropy']
    with pytest.raises(SystemExit):
        main(['compare', dirs[0], '--target', '.95'])
    assert '--target 0.95 should be of full supervision, which needs --full VALUE' in capsys.readouterr().err


def test_intervals_of_a_target_hold_what_comes():
    """Power laws with a scatter of a point: nine in ten are to lie in them."""
    rng, inside, answers = np.random.default_rng(0), 0, 0
    x = 5. * np.arange(1, 11)
    for _ in range(40):
        power = rng.uniform(.3, 1.5)
        values, target = (60 - 40 * k**-power for k in (np.arange(1, 11), rng.uniform(7.5, 9.5)))
        values = values + rng.standard_normal(10)
        true = al_report.share_needed(x, values, target)
        if true > x[6]:  # not before, and before the end
            low, high = np.quantile(al_report.labels_to(target, x[:7], values[:7], 500), (.05, .95),
                                    method='inverted_cdf')
            inside, answers = inside + (low <= true <= high), answers + 1
    assert answers > 20 and .75 < inside / answers <= 1


def test_clicks_get_a_panel_of_their_own(tmp_path):
    path = write_state(tmp_path / 'a', make_state([10, 20], [40, 60], clicks=True, unit=CELL))
    main(['compare', path, '-o', str(tmp_path / 'curves.png')])
    assert size_of(tmp_path / 'curves.png') == (1344, 456)


def test_report_is_called_compare_now(tmp_path, capsys):
    path = write_state(tmp_path / 'a', make_state([10, 20], [40, 60]))
    out = []
    for command in ('report', 'compare'):
        main([command, path, '-o', str(tmp_path / 'curves.png')])
        out.append(capsys.readouterr())
    assert out[0].out == out[1].out and out[1].err == ''
    assert out[0].err == 'al_report.py: `report` is called `compare` now\n'
    assert os.listdir(tmp_path) == ['a', 'curves.png'] or os.listdir(tmp_path) == ['curves.png', 'a']


def test_states_of_the_first_schema_are_compared_too(tmp_path, capsys):
    state = make_state([10, 20], [40, 60], clicks=True, unit=CELL)
    tables = []
    for name, each in dict(old=of_schema_1(state), new=state).items():
        main(['compare', write_state(tmp_path / name, each), '-o', str(tmp_path / 'curves.png')])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and '10 to 20' in tables[0]


@pytest.mark.parametrize('schema', [1, 3])
@pytest.mark.parametrize('phase, rounds, text', [
    ('train', 2, 'Round 1 of 2: training on what is labelled; it last wrote'),
    ('query', 2, 'Round 1 of 2: scoring the pool; it last wrote'),
    ('label', 2, 'Round 1 of 2: waiting for the labels that to_label/ in its folder asks for'),
    ('query', 1, 'Ended after round 1: 1 of 1 rounds of queries are done')])
def test_status(tmp_path, capsys, phase, rounds, text, schema):
    state = make_state([10, 20], [40, 60], phase=phase, rounds=rounds)
    if phase != 'query':
        state['rounds'][1] = {key: state['rounds'][1][key] for key in ('asked', 'spent')}
    path = write_state(tmp_path / 'run', state if schema == 3 else of_schema_1(state))
    (tmp_path / 'run' / 'my.py').touch()
    main(['status', path])
    out = capsys.readouterr().out
    assert text in out and 'entropy, unit image, seed 0' in out
    images = 10 if phase == 'label' else 20  # what is asked for is not labelled yet
    assert f'Labelled: {images} images' + f', {images}.0 % of images' * (schema == 3 or phase == 'query') in out
    assert f'bash dist_al_train.sh {path}/my.py <GPUs> --work-dir {path} --resume' in out
    assert ('To go on with more `al.rounds`: bash' in out) == ('Ended' in text)
    assert ('|     1 |     20 |' in out) == (phase == 'query')
    if schema == 3 or phase == 'query':
        assert '|     0 |     10 |        10.0 |' in out


def test_tables_and_curves_show_where_something_changed(tmp_path, capsys):
    """Another strategy from query 2 on, and another schedule in round 3; that round 0 is drawn is no change."""
    state = make_state([10, 20, 30, 40], [40, 50, 60, 70])
    asked_by = ['random', 'entropy', 'margin', 'margin']
    for entry, name, keys in zip(state['rounds'], asked_by, [[], [], [], ['param_scheduler', 'train_cfg']]):
        entry.update(strategy=dict(type=name, mc=1), changed=keys)
    expected = ['', '', 'margin', 'param_scheduler, train_cfg']
    assert al_report.changes(state['rounds']) == expected
    table = al_report.rounds_table(state['rounds'])
    assert [row[-1] for row in table.rows] == expected and table.field_names[-1] == 'changed'
    assert 'changed' not in al_report.rounds_table(make_state([10, 20], [40, 50])['rounds']).field_names
    points = al_report.curve(state['rounds'], 'mIoU')
    figure = al_report.draw_curves(dict(run=points[None]), 'mIoU', None)
    al_report.mark_changes(figure, state['rounds'], 'mIoU', points)
    assert [(text.xy[0], text.get_text()) for text in figure.axes[0].texts] == [
        (30, 'margin'), (40, 'param_scheduler, train_cfg')]
    main(['compare', write_state(tmp_path / 'a', state), write_state(tmp_path / 'b', make_state([10, 20], [40, 50])),
          '-o', str(tmp_path / 'curves.png')])
    assert 'changed=round 2: margin; round 3: param_scheduler, train_cfg' in capsys.readouterr().out


def test_status_says_why_a_run_has_ended(tmp_path, capsys):
    state = dict(make_state([10, 20], [40, 60], rounds=5), ended='mIoU 60.00 has reached al.stop.value = 50')
    main(['status', write_state(tmp_path / 'run', state)])
    assert 'Ended after round 1: mIoU 60.00 has reached al.stop.value = 50\n' in capsys.readouterr().out


def test_status_of_a_folder_lists_the_runs_in_it(tmp_path, capsys):
    """With round, metric and what each waits for; one that cannot be read is a row, too."""
    waits = make_state([10, 20], [40, 60.], phase='label', rounds=4, unit=CELL)
    waits['rounds'][1] = dict(asked={'a': [2, 60], 'b': [1, 30]}, spent={})
    states = {'done': make_state([10, 20], [40, 60]), 'deep/er': make_state([10], [40], rounds=3),
              'people': waits, 'cut': dict(schema=3)}
    for name, state in states.items():
        write_state(tmp_path / name, state)
    os.utime(tmp_path / 'done' / STATE_FILE, (time.time() - 7200, ) * 2)
    main(['status', str(tmp_path)])
    rows = cells_of(capsys.readouterr().out)
    assert list(rows) == ['run', 'cut', 'deep/er', 'done', 'people'] and 'cut/al_state.json cannot' in rows['cut'][-1]
    assert rows['done'][:4] == ['entropy', 'image', '1 of 1', 'mIoU 60.00 (round 1)']
    assert rows['done'][4].startswith('2:00:') and rows['done'][5] == 'has ended: 1 of 1 rounds of queries are done'
    assert rows['deep/er'][2:4] == ['0 of 3', 'mIoU 40.00 (round 0)']
    assert rows['deep/er'][5] == 'is scoring the pool, or has stopped'
    assert rows['people'][2:4] == ['1 of 4', 'mIoU 40.00 (round 0)']
    assert rows['people'][5] == 'waits for labels of 3 regions'


@pytest.mark.parametrize('command, error', [
    *(([command, 'nowhere'], 'nowhere should be the --work-dir of a run, but there is no al_state.json')
      for command in ('status', 'compare')),
    (['compare', '{run}', '--metric', 'mDice'], 'no run has finished a round with mDice'),
    (['compare', '{run}', '-o', 'x.docx'], 'docx'), (['status', '{cut}'], 'cut/al_state.json cannot be read'),
    (['status', '{newer}'], 'its schema 4 is newer than this al_report.py')])
def test_what_cannot_be_shown_is_an_error_in_words(tmp_path, monkeypatch, capsys, command, error):
    monkeypatch.chdir(tmp_path)
    state = make_state([10, 20], [40, 60])
    runs = dict(run=write_state(tmp_path / 'a', state), cut=write_state(tmp_path / 'cut', state),
                newer=write_state(tmp_path / 'newer', dict(state, schema=4)))
    (tmp_path / 'cut' / STATE_FILE).write_text('{"schema": 2, "pha')
    with pytest.raises(SystemExit, match='^2$'):
        main([part.format(**runs) for part in command])
    assert re.match(f'al_report.py {command[0]}: .*{error}', capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ['a', 'cut', 'newer']


@pytest.mark.parametrize('command, needs', [
    (['status'], ()), (['compare'], ('numpy', )), (['compare', '-o', 'curves.png'], ('numpy', 'matplotlib')),
    (['html'], ('numpy', 'matplotlib'))])
def test_the_command_line_imports_only_what_it_needs(tmp_path, command, needs):
    path = write_state(tmp_path / 'a', make_state([10, 20], [40, 60]))
    script = osp.join(ROOT, 'al_report.py')
    code = ('import runpy, sys; script = sys.argv[1]; del sys.argv[0]; runpy.run_path(script, run_name="__main__"); '
            'print(sorted({"al_patch", "torch", "mmengine", "mmcv", "numpy", "matplotlib"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code, script, command[0], path, *command[1:]], cwd=tmp_path,
                          capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and ('entropy' in done.stdout or command == ['html']), done.stderr
    assert done.stdout.splitlines()[-1] == str(sorted(needs))


# --- in a run --------------------------------------------------------------------------------------------------------


def asked_of(rounds: list) -> list:
    return [entry['asked'] for entry in rounds]


def read_class_counts(cfg, k: int) -> list:
    return mmengine.load(osp.join(cfg.work_dir, f'round_{k}', 'asked_classes.json'))


def labels_of(root: str, names: list) -> np.ndarray:
    return np.stack([np.asarray(Image.open(osp.join(root, 'ann', 'train', f'{name}.png'))) for name in names])


@pytest.fixture
def no_failure(monkeypatch):
    """Let what goes wrong in a report stop the run, for once: else a test of its files would not say why."""
    monkeypatch.setattr('mmengine.logging.MMLogger.warning', lambda self, text, *args: (
        pytest.fail(text) if 'the run goes on' in text else None))


def test_whole_images(make_cfg, train, shared_data, tmp_path, no_failure):
    """Curve, table, classes, scores, pictures; and what is asked for does not depend on being looked at."""
    _, unseen = train(make_cfg(dict(rounds=2, strategy='entropy'), work_dir=str(tmp_path / 'unseen')))
    cfg = make_cfg(dict(rounds=2, strategy='entropy', visualize=4))
    _, rounds = train(cfg)
    assert asked_of(rounds) == asked_of(unseen) and rounds[2]['metrics'] == unseen[2]['metrics']
    with open(osp.join(cfg.work_dir, 'learning_curve.csv'), newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['images'] for row in rows] == ['4', '6', '8'] and [row['round'] for row in rows] == ['0', '1', '2']
    assert [float(row['mIoU']) for row in rows] == [entry['metrics']['mIoU'] for entry in rounds]
    assert float(rows[0]['query s']) == rounds[0]['query_seconds'] and rows[2]['query s'] == ''
    assert size_of(osp.join(cfg.work_dir, 'learning_curve.png')) == (672, 456)
    assert size_of(osp.join(cfg.work_dir, 'asked.png'))[0] == 1210
    for k, entry in enumerate(rounds):
        counts = np.bincount(labels_of(shared_data, list(entry['asked'])).reshape(-1), minlength=3)
        assert read_class_counts(cfg, k) == counts.tolist()
        iou = mmengine.load(osp.join(cfg.work_dir, f'round_{k}', 'class_iou.json'))
        assert list(iou) == ['dark', 'grey', 'bright']
        assert np.mean(list(iou.values())) == pytest.approx(entry['metrics']['mIoU'], abs=.01)
    for k in range(2):
        folder = osp.join(cfg.work_dir, f'round_{k + 1}')  # of the round that asks
        scores = mmengine.load(osp.join(cfg.work_dir, f'round_{k}', 'query_scores.json'))
        assert set(rounds[k + 1]['asked']) == set(sorted(scores, key=scores.get)[-2:])
        assert set(scores) == set(tiny.NAMES) - {name for asked in asked_of(rounds[:k + 1]) for name in asked}
        names = {osp.relpath(osp.join(where, file), osp.join(folder, 'pictures'))[:-4]
                 for where, _, files in os.walk(osp.join(folder, 'pictures')) for file in files}
        fixed = names if k == 0 else fixed & names  # noqa: F821
        assert set(rounds[k + 1]['asked']) <= names and len(names) == 4
        for name in names:  # input, prediction and score in a row, or these, label and errors
            assert size_of(osp.join(folder, 'pictures', f'{name}.png'))[0] == 1100
        assert size_of(osp.join(folder, 'contact_sheet.png'))[0] == 600  # two images
    assert len(fixed) >= 2 and not osp.exists(osp.join(cfg.work_dir, 'round_0', 'pictures'))


@pytest.mark.parametrize('al', [
    dict(unit=CELL, initial=20, budget=15), dict(unit=CELL, initial=20, budget=15, strategy='random'),
    dict(unit='pixel', strategy='pixelpick', per_image=True, initial=3, budget=3),
    dict(unit=dict(type='region', window=2), strategy='ripu', initial=9, budget=5)],
    ids=['grid', 'random', 'pixel', 'window'])
def test_below_image_level(make_cfg, train, shared_data, no_failure, al):
    cfg = make_cfg(dict(al, rounds=1, visualize=2))
    _, rounds = train(cfg)
    for k in range(2):
        assert sum(read_class_counts(cfg, k)) == rounds[k]['pixels']
    masks = {name: al_patch.read_mask(osp.join(cfg.work_dir, 'round_0', 'labelled', f'{name}.png'))
             for name in rounds[0]['asked']}
    counts = np.bincount(np.concatenate([labels_of(shared_data, [name])[0][mask] for name, mask in masks.items()]))
    assert read_class_counts(cfg, 0) == counts.tolist()
    panels = 1 + (al['unit'] == 'pixel')  # one more for clicks
    assert size_of(osp.join(cfg.work_dir, 'learning_curve.png')) == (672 * panels, 456)
    first = max(rounds[1]['asked'], key=lambda name: rounds[1]['asked'][name][0])
    assert size_of(osp.join(cfg.work_dir, 'round_1', 'pictures', f'{first}.png'))[0] == 1100
    assert not osp.exists(osp.join(cfg.work_dir, 'round_1', 'contact_sheet.png'))
    units = units_per_image(rounds, 12)
    assert sorted(filter(None, units)) == sorted(n for n, _ in rounds[1]['asked'].values())
    assert len(units) == 12 and units[0] == units.max()


@pytest.mark.parametrize('strategy', [
    dict(type='bald', mc=3), dict(type='crc', calibration=.5, alpha=.5), dict(type='coreset')],
    ids=['passes', 'thresholds', 'vectors'])
def test_the_score_map_is_that_of_the_query(make_cfg, train, monkeypatch, no_failure, strategy):
    """Whatever a strategy asks of the model: the score of an image's best cell is then the maximum of its map."""
    maps, draw = {}, al_report.draw_picture
    monkeypatch.setattr(al_report, 'draw_picture', lambda *args: maps.update({args[2]: args[4]}) or draw(*args))
    cfg = make_cfg(dict(unit=CELL, initial=tiny.NAMES[:4], budget=2, visualize=6,
                        strategy=dict(strategy, reduce='max')))
    train(cfg)
    scores = mmengine.load(osp.join(cfg.work_dir, 'round_0', 'query_scores.json'))
    if strategy['type'] == 'coreset':
        assert set(maps.values()) == {None} and scores == {}
    else:
        assert set(maps) & set(scores)
        assert {name: map_HW.max() for name, map_HW in maps.items() if name in scores} == {
            name: pytest.approx(scores[name], rel=1e-5) for name in maps if name in scores}


def test_no_label_is_opened_that_was_not_asked_for(make_cfg, train, shared_data, tmp_path, no_failure, monkeypatch):
    """Pictures show images that nobody asked for; their label files do not exist."""
    _, rounds = train(make_cfg({}))
    root, asked = shutil.copytree(shared_data, tmp_path / 'blind'), {**rounds[0]['asked'], **rounds[1]['asked']}
    for name in set(tiny.NAMES) - set(asked):
        os.remove(root / 'ann' / 'train' / f'{name}.png')
    opened, load = [], Pool.load_label
    monkeypatch.setattr(Pool, 'load_label', lambda pool, name, *more: opened.append(name) or load(pool, name, *more))
    cfg = make_cfg(dict(visualize=24), root=str(root), work_dir=str(tmp_path / 'blind_work'))
    assert asked_of(train(cfg)[1]) == asked_of(rounds) and set(opened) == set(asked)
    drawn = [file for _, _, files in os.walk(osp.join(cfg.work_dir, 'round_1', 'pictures')) for file in files]
    assert len(drawn) == 12


@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'grid'])
def test_a_human_has_yet_to_label_what_is_drawn(make_cfg, train, shared_data, tmp_path, no_failure, unit):
    """The label files of what is asked for do not exist when it is drawn; those of earlier rounds are shown."""
    root, kept = shutil.copytree(shared_data, tmp_path / 'human'), tiny.NAMES[:4]
    for name in tiny.NAMES[4:]:
        os.remove(root / 'ann' / 'train' / f'{name}.png')
    cfg = make_cfg(dict(unit=unit, oracle='human', initial=kept, budget=2, visualize=24), root=str(root))
    _, rounds = train(cfg)
    assert len(rounds) == 2 and 'metrics' not in rounds[1] and not set(rounds[1]['asked']) & set(kept)
    drawn = [file for _, _, files in os.walk(osp.join(cfg.work_dir, 'round_1', 'pictures')) for file in files]
    assert len(drawn) == 12
    main(['status', cfg.work_dir])


def drawn_panels(monkeypatch) -> dict:
    """Title -> panels of all pictures to be drawn, by title."""
    pictures, draw = {}, al_report.draw_panels

    def draw_panels(panels):
        figure = draw(panels)
        figure.suptitle = lambda title: pictures.update({title: panels})
        return figure

    monkeypatch.setattr(al_report, 'draw_panels', draw_panels)
    return pictures


@pytest.mark.parametrize('oracle', ['simulated', 'human'])
@pytest.mark.parametrize('unit, strategy', [('image', 'entropy'), ('image', 'coreset'), (CELL, 'entropy'),
                                            (CELL, 'random')])
def test_every_panel_shows_something(make_cfg, train, shared_data, monkeypatch, no_failure, unit, strategy, oracle):
    """Scores where there are any, labels and errors where labels are known, and of a person's only what is labelled."""
    pictures = drawn_panels(monkeypatch)
    cfg = make_cfg(dict(unit=unit, strategy=strategy, oracle=oracle, initial=tiny.NAMES[:4], budget=2, visualize=12))
    _, rounds = train(cfg)
    asked = rounds[1]['asked']
    assert len(pictures) == 12
    for title, panels in pictures.items():
        verb, name = re.fullmatch('round 1 (asks for|does not ask for) (.*)', title).groups()
        assert (verb == 'asks for') == (name in asked)
        known = name in tiny.NAMES[:4] or name in asked and oracle == 'simulated'
        titles = ['input', 'prediction', *['score: entropy'] * (strategy == 'entropy')]
        if unit != 'image':
            new = 100 * sum(asked.get(name, [0, 0])[1:]) / 1536
            titles += [f'asked for now, {new:.3g} % (orange);\nbefore, {100 * (name in tiny.NAMES[:4])} % (blue)']
        assert list(panels)[:len(titles)] == titles and len(panels) == len(titles) + 2 * known
        if known:
            label, wrong = labels_of(shared_data, [name])[0], list(panels)[-1]
            shown = (panels['labels'] != 255).any(-1)
            colours = np.array([[0, 0, 0], [90, 90, 90], [200, 200, 200]])
            assert (panels['labels'][shown] == colours[label[shown]]).all()
            errors = (panels['prediction'] != panels['labels']).any(-1)[shown].mean()
            assert wrong == f'wrong: {100 * errors:.3g} % of the labels (pink)'


def test_flat_scores_are_not_stretched():
    """Over noise a colour bar would show structure; over scores that differ it stands beside them."""
    noise = .7 + 1e-6 * np.random.default_rng(0).random((8, 8))
    image, steps = np.zeros((8, 8, 3), np.uint8), np.linspace(0, 1, 64).reshape(8, 8)
    figure = al_report.draw_panels(dict(input=image, flat=noise, zero=0 * noise, scores=steps))
    by_title = {axes.get_title(): axes for axes in figure.axes}
    assert list(by_title) == ['input', 'flat, 0.7 everywhere', 'zero, 0 everywhere', 'scores', '']  # '': the only bar
    assert len(np.unique(by_title['flat, 0.7 everywhere'].images[0].get_array())) == 1
    assert by_title['scores'].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize('images', [1, 2, 4, 8, 9, 20, 48])
def test_a_contact_sheet_fills_its_canvas(images):
    """As many rows as needed, and as many columns; a row is short by one image at most a row."""
    pool = type('', (), dict(load_image=lambda self, name: np.full((10, 20, 3), 99, np.uint8)))()
    figure = al_report.draw_contact_sheet(pool, [f'{i}' for i in range(images)], {})
    rows, columns = figure.axes[0].get_gridspec().get_geometry()
    assert rows == math.ceil(images / 8) and 0 <= rows * columns - images < rows
    assert figure.get_figwidth() == pytest.approx(min(11, 3 * columns))


def asked_in(rounds: int, units: int = 0) -> al_report.Asked:
    return al_report.Asked(['a', 'b'], np.ones((rounds, 2), int), np.full((rounds, 2), 50.),
                           np.full((max(0, rounds - 2), 2), .5), np.array([units, 0]), None)


@pytest.mark.parametrize('rounds, units, panels', [
    (1, 0, {(0, 0), (0, 1)}), (2, 0, {(0, 0), (0, 1)}), (3, 0, {(0, 0), (0, 1)}),  # one pair of queries is no course
    (2, 5, {(0, 0), (0, 1), (1, 0)}), (4, 0, {(0, 0), (0, 1), (1, 0)}), (4, 5, {(0, 0), (0, 1), (1, 0), (1, 1)})])
def test_asked_png_fills_its_canvas(rounds, units, panels):
    figure = al_report.draw_asked(asked_in(rounds, units))
    spans = [axes.get_subplotspec() for axes in figure.axes if axes.get_subplotspec()]
    assert {(span.rowspan.start, span.colspan.start) for span in spans} == panels
    cells = sum(len(span.rowspan) * len(span.colspan) for span in spans)
    assert cells == np.prod(spans[0].get_gridspec().get_geometry())


# --- curves: colours and heights -------------------------------------------------------------------------------------


def test_every_strategy_has_a_style_of_its_own():
    parts = {**al_patch.AL_STRATEGIES.module_dict, **al_patch.AL_SCORES.module_dict}  # and those of other tests
    ours = {name for name, part in parts.items() if part.__module__ == 'al_patch'}
    assert {*al_report.STYLED} == ours - {'conformal_risk'}  # the score of `crc`
    shown = al_report.styles([*al_report.STYLED])
    assert len({tuple(style.values()) for style in shown}) == len(al_report.STYLED)
    for others in (['random', 'entropy'], ['mine', 'entropy', 'budget=7', 'random']):  # whatever stands beside
        assert [style for name, style in zip(others, al_report.styles(others)) if name in al_report.STYLED] == [
            shown[al_report.STYLED.index(name)] for name in others if name in al_report.STYLED]
    assert al_report.styles(['mine', 'random'])[0] == al_report.styles(['mine'])[0]
    seven = al_report.styles(['entropy', 'entropy (b)', 'budget=7', 'mine', 'x', 'real', 'random'])
    assert len({style['color'] for style in seven}) == 7 and seven[0] == shown[0]


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of two colours' luminances."""
    def luminance(colour: str) -> float:
        rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(np.where(rgb <= .03928, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4) @ [.2126, .7152, .0722])
    dark, bright = sorted([luminance(a), luminance(b)])
    return (bright + .05) / (dark + .05)


@pytest.mark.parametrize('deficit', [  # Viénot et al., 1999: how red- and green-blind people see linear RGB
    [[.11238, .88762, 0], [.11238, .88762, 0], [.00401, -.00401, 1]],
    [[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]], np.eye(3)], ids=['protan', 'deutan', 'none'])
def test_colours_are_told_apart(deficit):
    rgb = np.array([[int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)] for colour in al_report.COLOURS])
    seen = (rgb ** 2.2 @ np.transpose(deficit)).clip(0) ** (1 / 2.2)
    distances = np.linalg.norm(seen[:, None] - seen, axis=-1) + np.eye(len(seen))
    assert distances.min() > .12


@pytest.mark.parametrize('values, full, low, high', [
    ([17.6, 17.3], None, 13.2, 17.62), ([40, 60], None, 39, 61), ([0, 0], None, -.06, .06),
    ([40, 60], 70, 38.5, 73.3)])
def test_noise_does_not_look_like_a_crash(values, full, low, high):
    """An axis shows a quarter of what it reaches at least, and has room for what is written above a line."""
    points = np.array([[[10., 20.], [math.nan] * 2, values]])
    axes = al_report.draw_curves(dict(run=points), 'mIoU', full).axes[0]
    assert axes.get_ylim() == pytest.approx((low, high), abs=.1)
    texts = [(text.get_text(), text.xy[1]) for text in axes.texts]
    assert texts == ([] if full is None else [('full supervision: 70.00', 70)])


def test_spreads_stand_beside_each_other():
    """As bars, a few points apart, and inside the axis: bands would hide one another."""
    seeds = np.array([[[10., 20.], [math.nan] * 2, [40., 60.]], [[10., 20.], [math.nan] * 2, [44., 70.]]])
    axes = al_report.draw_curves(dict(entropy=seeds, real=seeds), 'mIoU', None).axes[0]
    bars = [container.lines[2][0] for container in axes.containers]
    x = [bar.get_transform().transform(bar.get_segments()[0][0])[0] for bar in bars]
    assert x[1] - x[0] == pytest.approx(3 / 72 * axes.figure.dpi) and not axes.collections[2:]
    assert [segment[:, 1].tolist() for segment in bars[0].get_segments()] == [
        [42 - 8**.5, 42 + 8**.5], [65 - 50**.5, 65 + 50**.5]]
    low, high = axes.get_ylim()
    assert low < 42 - 8**.5 and high > 65 + 50**.5


def test_nothing_is_written_unasked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(['compare', write_state(tmp_path / 'a', make_state([10, 20], [40, 60]))])
    assert capsys.readouterr().out.endswith('\nCurves: --out FILE draws them\n')
    assert [(path.name, os.listdir(path)) for path in tmp_path.iterdir()] == [('a', [STATE_FILE])]


@pytest.mark.parametrize('broken, points', [
    ('al_report.rendered', {'after_al_train', 'after_al_query'}),
    ('al_report.look', {'after_al_train', 'after_al_query'}),
    ('al_report.class_counts', {'before_al_train', 'after_al_train', 'after_al_query'}),
    ('mmengine.load', {'before_al_train', 'after_al_train'}), ('al_report.curve', {'after_al_train'})])
def test_a_failure_only_warns(make_cfg, train, monkeypatch, broken, points):
    texts = []
    monkeypatch.setattr('mmengine.logging.MMLogger.warning', lambda self, text, *args: texts.append(str(text)))
    monkeypatch.setattr(broken, lambda *args, **kwargs: 1 / 0)
    _, rounds = train(make_cfg(dict(visualize=2)))
    assert len(rounds) == 2 and 'metrics' in rounds[1]
    failed = [text for text in texts if 'the run goes on' in text]
    assert all('ZeroDivisionError' in text or broken == 'al_report.np' for text in failed)
    assert {text.split(' failed')[0].rpartition('.')[2] for text in failed} == points


def test_without_reports_nothing_is_drawn(make_cfg, train, monkeypatch, no_failure):
    """But what they are drawn from is kept, and pictures are a matter of `visualize`."""
    cfg = make_cfg(dict(reports=False, visualize=2))
    monkeypatch.setattr(al_report, 'draw_asked', lambda *args: 1 / 0)
    train(cfg)
    found = {file for _, _, files in os.walk(cfg.work_dir) for file in files}
    assert not {'learning_curve.png', 'asked.png'} & found
    assert {'learning_curve.csv', 'asked_classes.json', 'class_iou.json', 'contact_sheet.png'} <= found


def test_a_rounds_config_is_put_into_words_once(make_cfg, train, monkeypatch):
    """For its log, its dump, its visualizer and each checkpoint, which hold what they would without the hook."""
    texts = []
    monkeypatch.setattr('mmengine.config.config.FormatCode', lambda text, **how: texts.append(text) or (text, True))
    cfg = make_cfg({})
    runner, rounds = train(cfg)
    here = [text for text in texts if "'round_" in text or '/round_' in text]
    assert len(here) == len(set(here)) == len(rounds) == 2
    for k, text in enumerate(here):
        assert torch.load(tiny.checkpoint_of(cfg, rounds, k), weights_only=False)['meta']['cfg'] == text
    copied = pickle.loads(pickle.dumps(runner.cfg))
    assert type(copied) is Config and copied.to_dict() == runner.cfg.to_dict()


def test_tensorboard_shows_numbers_and_figures(make_cfg, train, no_failure):
    cfg = make_cfg(dict(unit=CELL, initial=20, budget=15, rounds=2, visualize=1), visualizer=dict(
        type='SegLocalVisualizer', vis_backends=[dict(type='TensorboardVisBackend')]))
    _, rounds = train(cfg)
    [folder] = {where for where, _, files in os.walk(cfg.work_dir) for file in files
                if 'tfevents' in file and 'round_' not in where}
    events = event_accumulator.EventAccumulator(folder).Reload()
    steps = [20, 35, 50]  # units
    assert [(e.step, e.value) for e in events.Scalars('al/mIoU')] == [
        (step, pytest.approx(entry['metrics']['mIoU'])) for step, entry in zip(steps, rounds)]
    counts = np.array([read_class_counts(cfg, k) for k in range(3)])
    assert [e.value for e in events.Scalars('al/% of asked/grey')] == pytest.approx(100 * counts[:, 1] / counts.sum(1))
    assert [e.step for e in events.Scalars('al/rank correlation with last query')] == [50]
    assert [e.step for e in events.Scalars('al/IoU/dark')] == steps
    units = units_per_image(rounds, 12)
    assert events.Scalars('al/% of units in a tenth of images')[-1].value == pytest.approx(100 * units[0] / 30)
    tags = events.Tags()['images']
    assert {'al_learning_curve', 'al_asked'} <= set(tags) and any(tag.startswith('al_picture_') for tag in tags)
    assert [e.step for e in events.Images('al_learning_curve')] == steps


def void_outside(root: str, folder, split: str, keep: tuple) -> None:
    """Make all labels of a split void but some."""
    for where, _, files in os.walk(folder / 'ann' / split):
        for file in files:
            label = cv2.imread(osp.join(where, file), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(osp.join(where, file), np.where(np.isin(label, keep), label, 255).astype(np.uint8))


@pytest.mark.parametrize('keep, texts', [
    ((0, 1, 2), []), ((0, 2), ['No label of the validation set is of grey, whose IoU is nan or 0 in every']),
    ((0, ), ['No label of the validation set is of grey, bright, whose', 'aAcc is 100,', 'mIoU is 100,',
              'mAcc is 100,', 'The loss is 0 in all iterations']),
    ((), ['No label of the validation set is of dark, grey, bright, whose', 'aAcc is nan', 'mIoU is nan',
          'mAcc is nan'])], ids=['right', 'one class missing', 'one class', 'void'])
def test_figures_that_right_labels_do_not_give_are_warnings(make_cfg, train, shared_data, tmp_path, capsys, monkeypatch,
                                                            keep, texts):
    """In the log, with their round in the state, and once each in `status`. A model that knows of no second class has
    no loss, and is right with labels of the first."""
    root, told = shutil.copytree(shared_data, tmp_path / 'data'), []
    void_outside(shared_data, root, 'val', keep)
    if keep == (0, ):
        monkeypatch.setattr('mmseg.models.decode_heads.FCNHead.forward', lambda self, x: self.conv_seg(
            self.convs(x[0])) * 0 + torch.tensor([99., 0, 0]).view(3, 1, 1))
        void_outside(shared_data, root, 'train', keep)
    monkeypatch.setattr('mmengine.logging.MMLogger.warning', lambda self, text, *args: told.append(text))
    cfg = make_cfg(dict(initial=4), root=str(root), changes={'default_hooks.checkpoint.save_best': None})
    _, rounds = train(cfg)
    queries = [text for text in rounds[0].get('warnings', ()) if 'query are equal' in text]
    assert bool(queries) == (keep == (0, ))
    for entry in rounds:
        warned = [text for text in entry.get('warnings', ()) if text not in queries and 'All labels' not in text]
        assert len(warned) == len(texts) and all(map(str.startswith, warned, texts))
        assert all(told.count(text) == 2 for text in warned)
    main(['status', cfg.work_dir])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith('Warning') and 'All labels' not in line] == [
        f'Warning in round 0, 1: {text}' for text in warned] + [f'Warning in round 0: {text}' for text in queries]


def test_without_validation_there_is_a_table_but_no_curve(make_cfg, train, no_failure):
    cfg = make_cfg({}, changes=tiny.NO_VAL)
    train(cfg)
    assert osp.isfile(osp.join(cfg.work_dir, 'learning_curve.csv')) and osp.isfile(osp.join(cfg.work_dir, 'asked.png'))
    assert not osp.exists(osp.join(cfg.work_dir, 'learning_curve.png'))


@pytest.mark.parametrize('al, totals', [
    ({}, [8]), (dict(strategy='random'), [8]),  # the first images are not chosen by a query
    (dict(strategy='random', unit=CELL, initial=20), [12, 12]), (dict(unit='pixel', initial=20), [12, 12])],
    ids=['model', 'random', 'random regions', 'pixels'])
@pytest.mark.parametrize('watched', [True, False])
def test_progress_is_a_bar_for_people_and_lines_for_files(make_cfg, train, monkeypatch, capsys, watched, al, totals):
    lines = []
    monkeypatch.setattr('mmengine.logging.MMLogger.info', lambda self, text, *args: lines.append(text))
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: watched, raising=False)
    train(make_cfg(al, changes=tiny.NO_VAL))
    told = [line.split(']')[0].replace(' ', '') for line in lines if 'Iter(query)' in line]
    assert told == ([] if watched else [f'Iter(query)[{done}/{n}' for n, step in zip(
        totals, [1] if totals == [8] else [2, 2]) for done in range(step, n + 1, step)])  # at most ten
    bars = capsys.readouterr().out.split('Query ')[1:]  # a line would break the bar
    assert sum('100%' in bar for bar in bars) >= len(totals) * watched and bool(bars) == watched


def test_the_log_says_what_is_to_come_and_in_the_end_where_to_look(make_cfg, train):
    """Environment and config once; in a round no more than mmengine's own lines and few of ours."""
    cfg = make_cfg(dict(overrides={2: {'train_cfg.max_iters': 6}}, rounds=2, budget=[2, 3]))
    runner, rounds = train(cfg)
    log = tiny.log_of(cfg.work_dir)
    plan = 'To come: 3 rounds of 4, 4, 6 iterations, 14 in all; they ask for 2 images, 3 images more; seed 0'
    assert plan in log and log.index(plan) < log.index('About 0:00:0') < log.index('has ended')
    assert log.count('to go, to the end of round 2 at ') == 2 and 'per class results' not in log
    assert log.count('System environment') == 1 and log.count('Hooks will be executed') == 1
    for k in range(3):
        own = tiny.log_of(osp.join(cfg.work_dir, f'round_{k}'))
        assert '(train)' in own and len(own.splitlines()) < 70 and 'System' not in own and 'Config:' not in own
    figures, model, *commands = log.splitlines()[-4:]
    paths = re.findall('[^ ,]*/[^ ,]*', f'{figures} {model}')
    assert len(paths) == 5 and all(map(osp.isfile, {*paths} - {'tools/test.py'})) and 'round_2/iter_6.pth, for' in model
    assert all('al_report.py ' in line and cfg.work_dir in line for line in commands)


@pytest.mark.parametrize('loop, al, changes, lengths', [
    ('iters', dict(overrides={1: {'train_cfg': dict(max_iters=9)}}), {}, [4, 9, 4]),
    ('epochs', dict(overrides={2: {'train_cfg.max_epochs': 5}}), {}, [4, 6, 20]),  # 4, 6, 8 images, two a batch
    ('epochs', dict(unit=CELL, initial=60), {}, [12, 12, 12]),  # some of all 12 images
    ('iters', dict(weights='continue'), {'train_cfg.max_iters': 30}, [10, 10, 10])])
def test_iterations_of_rounds(make_cfg, train, monkeypatch, loop, al, changes, lengths):
    """Counted in a training: of those before, and those to come."""
    counted, count = [], al_report.iterations_of_rounds
    monkeypatch.setattr(al_report, 'iterations_of_rounds', lambda *args: counted.append(count(*args)) or counted[-1])
    train(make_cfg(dict(al, rounds=2), loop, changes={**tiny.NO_VAL, **changes}))
    assert counted == [lengths] * 3


def test_how_long_it_will_take(make_cfg, train, monkeypatch):
    """By the median of the rounds that are done: 3 s an iteration, 5 s a query."""
    state = types.SimpleNamespace(
        round=3, begin=0, seed=7, al=types.SimpleNamespace(rounds=5, oracle=dict(type='human')), logger=None,
        rounds=[dict(train_seconds=30., query_seconds=5.), dict(train_seconds=60., query_seconds=5.),
                dict(train_seconds=1., query_seconds=90.), {}])
    said = []
    state.logger = types.SimpleNamespace(info=said.append)
    monkeypatch.setattr(al_report, 'iterations_of_rounds', lambda *args: [10, 20, 10, 10, 10, 20])
    al_report.tell_what_is_to_come(state, types.SimpleNamespace(iter=4), False)
    [line] = said  # 6 + 10 + 20 iterations and 2 queries
    assert re.match('About 0:01:58 to go, to the end of round 5 at .* and the time to label$', line)


def test_names_may_hold_dollars():
    """Between two of them matplotlib would read a formula, which this is none."""
    asked = asked_in(2)._replace(classes=['$\\frac$', '$_$'])
    assert al_report.rendered(al_report.draw_asked(asked)).startswith(b'\x89PNG')


def test_visualize_is_a_setting():
    with pytest.raises(ValueError, match='`al.visualize` should be an int >= 0, but got True'):
        al_patch.parse_settings(dict(visualize=True))


def test_a_resumed_run_may_be_looked_at(make_cfg, train):
    """`visualize` may change, and a state without it is one of an earlier version."""
    cfg = make_cfg({}, changes=tiny.NO_VAL)
    train(cfg)
    path = osp.join(cfg.work_dir, STATE_FILE)
    state = mmengine.load(path)
    del state['settings']['visualize']
    mmengine.dump(state, path)
    again = Config(make_cfg(dict(rounds=2, visualize=2), changes=tiny.NO_VAL, resume=True).to_dict())
    assert len(train(again)[1]) == 3 and osp.isdir(osp.join(cfg.work_dir, 'round_2', 'pictures'))


def test_what_a_kill_leaves_of_a_figure_is_removed_at_the_next_start(tmp_path, monkeypatch):
    """By its name: `al_report` has it without importing `al_patch`."""
    monkeypatch.setattr(al_report.os, 'replace', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        al_report.save_figure(al_report.figures.Figure(), str(tmp_path / 'asked.png'))
    assert [path.name for path in tmp_path.iterdir()] == ['asked.png' + al_patch.TEMPORARY]
    al_patch.remove_temporary(str(tmp_path))
    assert not [*tmp_path.iterdir()]
