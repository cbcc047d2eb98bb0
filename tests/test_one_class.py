"""Units that are answered by one class: simulated, by people, in tools; clicks and purity."""
import json
import os
import os.path as osp
import shutil

import mmengine
import numpy as np
import pytest
import tiny
from PIL import Image
from test_tools import brush, region, take, task_of, xml_of
from tiny import SHORT, VOID, part

import al_label
import al_patch
import al_report

CELL = dict(type='region', size=[8, 8], label='dominant')
SEGMENTS = dict(type='superpixel', n_segments=12, compactness=100., label='dominant')


def most_frequent(label: np.ndarray) -> int:
    """By counting; void is one more value, and the last of those that are equally frequent."""
    counts = {value: (label == value).sum() for value in (0, 1, 2, VOID)}
    return next(value for value in counts if counts[value] == max(counts.values()))


@pytest.fixture
def striped(tmp_path, shared_data):
    """The tiny data set, with labels in which region i has classes in other shares."""
    root = shutil.copytree(shared_data, tmp_path / 'striped')
    rng = np.random.default_rng(1)
    for name in tiny.NAMES:
        label = rng.choice([0, 1, 2, VOID], tiny.SHAPE, p=[.3, .3, .15, .25]).astype(np.uint8)
        label[:8, :8] = np.repeat([2, 1], 32).reshape(8, 8)  # a tie, to the lower class
        label[:8, 8:16] = np.repeat([VOID, 2], 32).reshape(8, 8)  # a tie with void, to the class
        label[:8, 16:24] = VOID
        Image.fromarray(label).save(root / 'ann' / 'train' / f'{name}.png')
    return str(root)


@pytest.mark.parametrize('unit', [CELL, SEGMENTS, dict(type='region', window=2, label='dominant')],
                         ids=['grid', 'superpixel', 'window'])
def test_training_sees_the_most_frequent_value(make_cfg, train, striped, unit):
    cfg = make_cfg(dict(unit=unit, initial=30, budget=20, rounds=1), root=striped, changes={
        **SHORT, 'train_dataloader.dataset.pipeline': tiny.PLAIN})
    runner, rounds = train(cfg)
    state = al_patch.State(al_patch.read_state(osp.join(cfg.work_dir, 'al_state.json')), cfg.work_dir,
                           al_patch.parse_settings(cfg.al), runner, al_patch.Pool(cfg))
    void = 0
    for name in state.labelled():
        label = np.array(Image.open(osp.join(striped, 'ann', 'train', f'{name}.png')))
        expected = np.full(tiny.SHAPE, VOID)
        for entry in rounds:
            for i in entry['ids'].get(name, ()):
                mask = state.units(name).mask(np.array([i]))
                expected[mask] = most_frequent(label[mask])
                void += mask.sum() * (most_frequent(label[mask]) == VOID)
        shown = mmengine.runner.Runner.build_dataloader(dict(cfg.train_dataloader, al=dict(
            state=osp.join(cfg.work_dir, 'al_state.json'), round=1))).dataset
        i = next(i for i in range(len(shown)) if al_patch.image_name(shown, shown.get_data_info(i)) == name)
        got = shown[i]['data_samples'].gt_sem_seg.data[0].numpy()
        assert np.array_equal(got, expected), name
    assert void and void == sum(entry['void_pixels'] for entry in rounds)
    assert [entry['spent']['clicks'] for entry in rounds] == [30, 50]
    assert not osp.exists(osp.join(cfg.work_dir, 'round_1', 'to_label'))


def test_a_tie(make_state, striped):
    """By hand: region 0 is 1, region 1 is 2, region 2 is void and spent."""
    state = make_state(dict(unit=CELL, initial=1, budget=1), root=striped)
    al_patch.attach_companions(state.runner)
    al_patch.add_round(state, {'a/01': np.array([0, 1, 2])})
    classes, done = state.stored_label('a/01')
    assert (classes[:8, :8] == 1).all() and (classes[:8, 8:16] == 2).all() and (classes[:8, 16:24] == VOID).all()
    assert done.sum() == 3 * 64 and done[:8, :24].all() and state.phase == 'train'
    assert state.entry['void_pixels'] == 64 and state.entry['asked'] == {'a/01': [3, 192]}


def test_purity(make_state, striped):
    """Halves, halves and all of one: (32 + 32 + 64) / 192. Windows have no purity."""
    for unit, expected in (CELL, 200 / 3), (dict(CELL, label='exact'), 200 / 3), (dict(type='pixel'), None):
        state = make_state(dict(unit=unit, initial=1, budget=1), root=striped)
        al_patch.attach_companions(state.runner)
        al_patch.add_round(state, {'a/01': np.array([0, 1, 2])})
        assert al_report.purity(state, ['a/01']) == (expected and pytest.approx(expected))
        al_report.look_at_labels(state)
        assert state.entry['spent'].get('% pure') == (expected and 66.67)
        assert ('clicks' in state.entry['spent']) == (unit.get('label') == 'dominant' or unit['type'] == 'pixel')
    entry = dict(state.entry, metrics={}, train_seconds=1.)
    entry['spent']['% pure'] = 66.67
    older = dict(entry, spent=dict(images=1, regions=3, clicks=3, pixels=192))  # of a version that told something else
    table = al_report.rounds_table([older, entry])
    assert [row[table.field_names.index('% pure')] for row in table.rows] == [None, 66.67]


@pytest.mark.parametrize('form', ['brush', 'point', 'cvat point', 'png'])
def test_a_stroke_or_a_point_is_for_the_whole_unit(people, tmp_path, form):
    run = people(SEGMENTS)
    masks = run.ask({'a/01': [2, 5], 'a/02': [1]})
    one = run.state.units('a/01').mask(np.array([5]))
    y, x = np.argwhere(one)[3]
    spot = np.zeros(tiny.SHAPE, bool)
    spot[y, x] = True
    point = region('keypointlabels', 'bright', x=(x + .5) * 100 / 48, y=(y + .5) * 100 / 32, width=1)
    if form == 'png':
        os.makedirs(tmp_path / 'maps' / 'a')
        path = str(tmp_path / 'maps')
        Image.fromarray(part(np.full(tiny.SHAPE, 2), spot)).save(tmp_path / 'maps' / 'a' / '01.png')
    elif form == 'cvat point':
        path = str(tmp_path / 'annotations.xml')
        open(path, 'w').write(xml_of({'a/01': [('points', dict(label='bright', points=f'{x + .2},{y + .9}'))]}))
    else:
        path = str(tmp_path / 'one.json')
        result = point if form == 'point' else region('brushlabels', 'bright', rle=brush(spot))
        json.dump([task_of(run, 'a/01', [result])], open(path, 'w'))
    text = take(run, path)
    assert text.splitlines()[:2] == ['1 of the 3 superpixels that round 0 asks for are answered',
                                     'Not yet: a/01 (superpixel 2), a/02 (superpixel 1)']
    assert np.array_equal(Image.open(run.inbox(0, 'a/01')), part(np.full(tiny.SHAPE, 2), one))
    run.hand_in(run.inbox(0, 'a/02'), part(np.ones(tiny.SHAPE), masks['a/02'] & (np.arange(48) % 2 == 0)))
    assert run.accept() == 'label'
    assert np.array_equal(run.store('a/02')[0], part(np.ones(tiny.SHAPE), masks['a/02']))


def test_two_classes_in_a_unit_are_named_and_refused(people, tmp_path):
    run = people(CELL)
    run.ask({'a/01': [0, 7]})
    label = np.full(tiny.SHAPE, VOID, np.uint8)
    label[9, 9:11] = 0, 2
    path = str(tmp_path / 'one.json')
    results = [region('brushlabels', name, rle=brush(label == c)) for c, name in ((0, 'dark'), (2, 'bright'))]
    json.dump([task_of(run, 'a/01', results)], open(path, 'w'))
    with pytest.raises(ValueError, match='^a/01: region 7 should have one class, but got dark and bright$'):
        take(run, path)
    run.hand_in(run.inbox(0, 'a/01'), label)
    with pytest.raises(ValueError, match='a/01.png cannot be used .*: region 7 should have one class, but got dark'):
        run.accept()
    assert not osp.exists(run.path('labels', 'classes'))


def test_what_is_shown_of_one_class_units(people, truth):
    """Outlines and no prediction, which would be an answer; and points can be set."""
    run = people(CELL)
    run.ask({'a/01': [0]})
    run.hand_in(run.inbox(0, 'a/01'), part(np.full(tiny.SHAPE, 2), np.eye(32, 48, dtype=bool) & (np.arange(48) < 8)))
    assert run.accept() == 'train'
    run.ask({'a/01': [7]})
    os.makedirs(run.path('round_1', 'to_label', 'prediction', 'a'))
    al_label.write_prediction(run.state, 'a/01', truth('a/01'))
    found = [(drawing.kind, drawing.label) for drawing in al_label.drawings(run.state, 'a/01')]
    assert found == [('outline', 'asked'), ('earlier', 'bright')]
    assert '<KeyPointLabels name="point" toName="image">' in al_label.label_studio_interface(run.state)
    assert 'by one stroke or point inside it' in al_label.instructions(run.state)


def test_a_label_is_one_of_two(make_cfg, train):
    with pytest.raises(ValueError, match="^`al.unit.label` should be 'exact' or 'dominant', but got 'most'$"):
        train(make_cfg(dict(unit=dict(CELL, label='most'))))
