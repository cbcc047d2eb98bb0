"""What people hand in, and the label store: what counts as done, what is kept, what is named, and going back."""
import contextlib
import json
import os
import os.path as osp
import re
import shutil
import subprocess
import sys
from typing import Iterator

import cv2
import mmengine
import numpy as np
import pytest
import tiny
from mmcv.transforms import BaseTransform
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS
from PIL import Image
from tiny import PLAIN, SHORT, VOID, People, part

import al_label
import al_patch
from al_patch import STATE_FILE, read_mask, read_state

CELL = dict(type='region', size=[8, 8])  # 6 in a row: number 7 is rows 8 to 15 and columns 8 to 15
UNITS = dict(region=CELL, superpixel=dict(type='superpixel', n_segments=12, compactness=100.), pixel='pixel')


@TRANSFORMS.register_module()
class TwoValues(BaseTransform):
    """0 and 255 to 0 and 1; anything else is an error."""

    def transform(self, results):
        label = results['gt_seg_map']
        assert {*np.unique(label).tolist()} <= {0, 255}, 'neither 0 nor 255'
        label //= 255  # in place
        return results


@TRANSFORMS.register_module()
class ColoursToClasses(BaseTransform):
    COLOURS = [[0, 0, 0], [90, 90, 90], [200, 200, 200]]

    def transform(self, results):
        colours = results['gt_seg_map']
        label = np.full(colours.shape[:2], VOID, np.uint8)
        for c, colour in enumerate(self.COLOURS):
            label[(colours == colour).all(2)] = c
        results['gt_seg_map'] = label
        return results


@TRANSFORMS.register_module()
class BelowThree(BaseTransform):
    """0, 1, 2 to 2, 1, 0; it knows void, and nothing else."""

    def transform(self, results):
        table = {0: 2, 1: 1, 2: 0, VOID: VOID}
        results['gt_seg_map'] = np.array([[table[v] for v in row] for row in results['gt_seg_map'].tolist()], np.uint8)
        return results


@TRANSFORMS.register_module()
class LoadDeepLabels(LoadAnnotations):
    """A label file of 16 bits as it is: mmseg's own cuts it to 8."""

    def _load_seg_map(self, results):
        results['gt_seg_map'] = cv2.imread(results['seg_map_path'], cv2.IMREAD_UNCHANGED)
        results.setdefault('seg_fields', []).append('gt_seg_map')


@TRANSFORMS.register_module()
class LoadBoth(BaseTransform):
    """Image and label at once."""

    def transform(self, results):
        results = TRANSFORMS.build(PLAIN[0])(results)
        return TRANSFORMS.build(PLAIN[1])({**results, 'seg_fields': []})


@contextlib.contextmanager
def killed_at_write(monkeypatch, stop: int) -> Iterator[list]:
    """Ends what it holds as a kill does, at the write that comes after so many others. Gives the writes."""
    write, calls = al_patch.write_atomically, []

    def write_or_die(*args):
        calls.append(args)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(al_patch, 'write_atomically', write_or_die)
        yield calls


# --- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit', UNITS)
def test_a_round_that_holds_only_what_was_newly_asked_loses_nothing(people, truth, unit):
    run, name = people(UNITS[unit]), 'a/01'
    first = run.ask({name: [0, 1], 'b/08': [3]})
    run.hand_in(run.inbox(0, name), part(truth(name), first[name]))
    run.hand_in(run.own('b/08'), part(truth('b/08'), first['b/08']))
    assert run.accept() == 'train'
    second = run.ask({name: [7], 'a/03': [2]})
    if unit == 'region':
        assert np.argwhere(second[name]).min(0).tolist() == [8, 8] and second[name].sum() == 64
    run.hand_in(run.inbox(1, name), part(truth(name), second[name]))
    run.hand_in(run.own('a/03'), part(truth('a/03'), second['a/03']))
    assert run.accept() == 'train'
    shown = run.trained_on(1)
    assert {*shown} == {name, 'a/03', 'b/08'}
    assert np.array_equal(shown[name], part(truth(name), first[name], second[name]))
    assert np.array_equal(shown['b/08'], part(truth('b/08'), first['b/08']))
    assert np.array_equal(shown['a/03'], part(truth('a/03'), second['a/03']))
    assert not osp.exists(run.path('labels', 'label_changes.json'))


@pytest.mark.parametrize('where', ['inbox', 'data set'])
@pytest.mark.parametrize('what', ['deleted', 'emptied', 'void'])
def test_what_is_deleted_or_emptied_changes_nothing(people, truth, where, what):
    run, name = people(CELL), 'a/01'
    asked = run.ask({name: [0, 7]})[name]
    path = run.inbox(0, name) if where == 'inbox' else run.own(name)
    run.hand_in(path, part(truth(name), asked))
    run.accept()
    before = run.store(name)
    if what == 'deleted':
        os.remove(path)
    elif what == 'emptied':
        os.truncate(path, 0)
    else:
        run.hand_in(path, np.full(tiny.SHAPE, VOID, np.uint8))
    for _ in range(2):
        assert run.accept() == 'train'
        assert all(map(np.array_equal, run.store(name), before))
    assert np.array_equal(run.trained_on(0)[name], part(truth(name), asked))
    assert not osp.exists(run.path('labels', 'label_changes.json')) and 'have changed' not in run.log


def test_a_lower_file_does_not_count_more_when_a_higher_one_is_gone(people):
    """An inbox goes before the data set's file, also when that is read for the first time after the inbox is empty."""
    run, name = people(CELL), 'a/01'
    asked = run.ask({name: [0]})[name]
    run.hand_in(run.inbox(0, name), part(np.ones(tiny.SHAPE), asked))
    run.hand_in(run.own(name), np.full(tiny.SHAPE, 2, np.uint8))
    run.accept()
    os.remove(run.inbox(0, name))
    run.accept()
    assert (run.store(name)[0][:8, :8] == 1).all() and not osp.exists(run.path('labels', 'label_changes.json'))
    asked = run.ask({name: [7]})[name]
    assert run.accept() == 'train'  # the data set's file has that, too
    assert (run.store(name)[0][:8, :8] == 1).all() and (run.store(name)[0][asked] == 2).all()


@pytest.mark.parametrize('where', ['its inbox', 'a later inbox', 'the data set'])
def test_a_mended_label_counts_and_is_told(people, truth, where):
    run, name = people(CELL), 'a/01'
    asked = run.ask({name: [0]})[name]
    label = part(truth(name), asked)
    first = run.own(name) if where == 'the data set' else run.inbox(0, name)
    run.hand_in(first, label)
    run.accept()
    run.ask({name: [7]})
    older = open(first, 'rb').read()
    mended = label.copy()
    mended[0, :5] = (label[0, :5] + 1) % 3
    mended[8:16, 8:16] = 2 if where == 'a later inbox' else VOID
    mended[1, 1] = VOID  # no label where there was one: the older stays
    run.hand_in(run.inbox(1, name) if where == 'a later inbox' else first, mended)
    assert run.accept() == ('train' if where == 'a later inbox' else 'label')
    expected = label.copy()
    expected[0, :5], expected[8:16, 8:16] = mended[0, :5], mended[8:16, 8:16]
    assert np.array_equal(run.store(name)[0], expected)
    assert f'the newer count: {name} (5 pixels)' in run.log
    [(image, changes)] = json.load(open(run.path('labels', 'label_changes.json'))).items()
    assert image == name and [*changes.values()] == [5]
    folder = run.path('labels', 'handed_in', 'a')
    assert older in [open(osp.join(folder, file), 'rb').read() for file in os.listdir(folder)]
    log = run.log
    run.accept()
    assert run.log.count('the newer count') == log.count('the newer count') == 1


def test_which_file_counts_more(people):
    """A later inbox, then an earlier one, then the data set's file: whatever is mended last."""
    run, name = people(CELL), 'a/01'
    full = {value: np.full(tiny.SHAPE, value, np.uint8) for value in (0, 1, 2)}
    run.ask({name: [0]})
    run.hand_in(run.own(name), full[0])
    run.accept()
    run.ask({name: [7]})
    run.hand_in(run.inbox(1, name), full[1])
    run.accept()
    assert (run.store(name)[0][:8, :8] == 1).all()
    run.hand_in(run.inbox(0, name), full[2])
    run.accept()
    assert (run.store(name)[0][:8, :8] == 1).all()
    run.hand_in(run.own(name), full[2])
    run.accept()
    assert (run.store(name)[0][:8, :8] == 1).all()
    run.hand_in(run.inbox(1, name), full[0])
    run.accept()
    assert (run.store(name)[0][:8, :8] == 0).all() and (run.store(name)[0][8:16, 8:16] == 0).all()


def test_a_slip_in_a_mended_file_is_named(people, truth):
    run, name = people(), 'a/01'
    run.ask({name: None})
    run.hand_in(run.own(name), truth(name))
    run.accept()
    before = run.store(name)
    run.hand_in(run.own(name), np.full(tiny.SHAPE, 77, np.uint8))
    with pytest.raises(ValueError, match=f'{re.escape(run.own(name))} cannot be used .*below 3, .* but got 77'):
        run.accept()
    assert all(map(np.array_equal, run.store(name), before))


@pytest.mark.parametrize('stop', range(12))
def test_a_kill_between_any_two_writes(people, truth, monkeypatch, stop):
    """Of what is mended and what is new in one image: the same is in the store then, and in the list of changes."""
    run, name = people(CELL), 'a/01'
    first = run.ask({name: [0]})[name]
    run.hand_in(run.inbox(0, name), part(truth(name), first))
    run.accept()
    second = run.ask({name: [7]})[name]
    mended = part(truth(name), first, second)
    mended[0, 0] = (mended[0, 0] + 1) % 3
    run.hand_in(run.inbox(1, name), mended)
    with killed_at_write(monkeypatch, stop) as calls:
        run.accept()
    assert run.accept() == 'train'
    assert np.array_equal(run.store(name)[0], mended) and np.array_equal(run.store(name)[1], first | second)
    [changes] = json.load(open(run.path('labels', 'label_changes.json'))).values()
    assert [*changes.values()] == [1]
    assert not [file for *_, files in os.walk(run.path('labels')) for file in files if file.endswith('.tmp')]
    assert len(calls) in (stop + 1, 8)


# --- what is done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit', UNITS)
def test_each_unit_needs_a_label(people, truth, unit):
    """One labelled pixel is enough for its unit, and for no other; what else is in that unit is void."""
    run, name = people(UNITS[unit]), 'a/01'
    run.ask({name: [0, 5, 7], 'a/03': [2]})
    units = [run.state.mask_of(name, np.array([i])) for i in (0, 5, 7)]
    label = np.full(tiny.SHAPE, VOID, np.uint8)
    y, x = np.argwhere(units[1])[0]
    label[y, x] = 1
    run.hand_in(run.inbox(0, name), label)
    assert run.accept() == 'label'
    assert run.delivered(name)['missing'] == [0, 7] and run.delivered('a/03')['missing'] == [2]
    assert f'1 of 4 {unit}s are labelled. Not yet: {name} ({unit} 0, 7), a/03 ({unit} 2); all in' in run.log
    assert np.array_equal(run.store(name)[1], units[1])
    run.hand_in(run.inbox(0, name), part(truth(name), units[0], units[2]))
    run.hand_in(run.own('a/03'), truth('a/03'))
    assert run.accept() == 'train'
    shown = run.trained_on(0)[name]
    assert np.array_equal(shown, np.where(units[1], label, part(truth(name), units[0], units[2])))
    assert run.state.entry['void_pixels'] == units[1].sum() - 1


def test_part_of_a_round_goes_on_and_the_rest_is_in_the_pool_again(people, truth):
    run = people(CELL, accept_partial=True)
    asked = run.ask({'a/01': [0, 7], 'a/03': [2], 'b/08': [1]})
    assert run.accept() == 'label'  # nothing at all
    only = run.state.mask_of('a/01', np.array([7]))
    run.hand_in(run.inbox(0, 'a/01'), part(truth('a/01'), only))
    run.hand_in(run.inbox(0, 'a/03'), part(truth('a/03'), asked['a/03']))
    assert run.accept() == 'train'
    entry = run.state.entry
    assert entry['asked'] == {'a/01': [1, 64], 'a/03': [1, 64]} and entry['pixels'] == 128 == entry['spent']['pixels']
    assert entry['returned'] == {'a/01': [1, 64], 'b/08': [1, 64]} and entry['ids'] == {'a/01': [7], 'a/03': [2]}
    assert (entry['spent']['images'], entry['spent']['regions'], entry['void_pixels']) == (2, 2, 0)
    assert 'and back in the pool: a/01 (region 0), b/08 (region 1)' in run.log
    assert np.array_equal(read_mask(run.path('round_0', 'labelled', 'a', '01.png')), only)
    assert not read_mask(run.path('round_0', 'labelled', 'b', '08.png')).any()
    assert {*run.trained_on(0)} == {'a/01', 'a/03'}
    query = al_patch.Query(run.state, None)
    assert query.free['a/01'] == 32 * 48 - 64 and query.free['b/08'] == 32 * 48
    assert 0 in query.candidates('a/01', None)[0].id and 7 not in query.candidates('a/01', None)[0].id
    assert query.candidates('b/08', None)[0].id.tolist() == [*range(24)]
    again = run.ask({'a/01': [0], 'b/08': [1]})
    run.hand_in(run.inbox(1, 'a/01'), part(truth('a/01'), again['a/01']))
    run.hand_in(run.inbox(1, 'b/08'), part(truth('b/08'), again['b/08']))
    assert run.accept() == 'train' and run.state.entry['spent']['pixels'] == 256
    shown = run.trained_on(1)
    assert np.array_equal(shown['a/01'], part(truth('a/01'), only, again['a/01'])) and len(shown) == 3


def test_part_of_a_round_of_whole_images(people, truth):
    run = people(accept_partial=True)
    run.ask({'a/01': None, 'a/03': None})
    run.hand_in(run.own('a/03'), truth('a/03'))
    assert run.accept() == 'train'
    assert run.state.entry['asked'] == {'a/03': None} and run.state.entry['returned'] == {'a/01': None}
    assert run.state.entry['spent']['images'] == 1 and 'a/01' in al_patch.Query(run.state, None).open


@pytest.mark.parametrize('stop', range(10))
def test_a_kill_while_units_go_back_to_the_pool(people, truth, monkeypatch, stop):
    """What is delivered after it counts."""
    run = people(CELL)
    asked = run.ask({'a/01': [0, 7], 'b/08': [1]})
    only = run.state.mask_of('a/01', np.array([7]))
    run.hand_in(run.inbox(0, 'a/01'), part(truth('a/01'), only))
    with killed_at_write(monkeypatch, stop):
        run.accept(accept_partial=True)
        return
    for name in asked:
        run.hand_in(run.inbox(0, name), part(truth(name), asked[name]))
    assert run.accept() == 'train'
    assert run.state.entry['asked'] == {'a/01': [2, 128], 'b/08': [1, 64]}
    assert all(np.array_equal(label, part(truth(name), asked[name])) for name, label in run.trained_on(0).items())


# --- what was exported -----------------------------------------------------------------------------------------------


def export(run: People, seed: int = 0) -> dict:
    """Give people random predictions to start from; name -> the prediction."""
    rng, predictions = np.random.default_rng(seed), {}
    for name in al_label.names_to_label(run.state):
        predictions[name] = rng.integers(0, 3, tiny.SHAPE)
        al_label.write_prediction(run.state, name, predictions[name])
    al_label.note_exported(run.state, [*predictions])
    return predictions


@pytest.mark.parametrize('unit', ['image', 'region', 'superpixel'])
@pytest.mark.parametrize('where', ['inbox', 'data set'])
def test_an_export_that_is_handed_back_untouched_is_no_answer(people, unit, where):
    run, name = people(UNITS.get(unit, 'image')), 'a/01'
    asked = run.ask({name: [0, 7] if unit != 'image' else None})[name]
    predicted = export(run)[name]
    path = run.inbox(0, name) if where == 'inbox' else run.own(name)
    os.makedirs(osp.dirname(path))
    shutil.copy(run.path('round_0', 'to_label', 'prediction', f'{name}.png'), path)
    assert run.accept() == 'label'
    assert run.delivered(name)['accepted'] == 0 and f'which is no answer (but with `al.oracle.accept_unchanged`): ' \
        f'{name}' in run.log
    assert not osp.exists(run.path('labels', 'classes', f'{name}.png'))
    assert run.accept(accept_unchanged=True) == 'train'
    n = 1 if unit == 'image' else 2
    assert np.array_equal(run.store(name)[0], part(predicted, asked)) and run.state.entry['unchanged'] == n
    assert f'{n} of the {n} {unit}s of round 0 are exactly what the model had predicted' in run.log


def test_an_export_stays_one_in_later_rounds(people, truth):
    """Also one of a round before, and one of before it was exported again."""
    run, name = people(CELL, accept_partial=True), 'a/01'
    asked = run.ask({name: [0, 7], 'a/03': [2]})
    older = export(run)
    run.hand_in(run.inbox(0, 'a/03'), part(truth('a/03'), asked['a/03']))
    os.makedirs(osp.dirname(run.own(name)))
    shutil.copy(run.path('round_0', 'to_label', 'prediction', f'{name}.png'), run.own(name))
    assert not np.array_equal(export(run, 1)[name], older[name])
    assert run.accept() == 'train' and run.state.entry['asked'] == {'a/03': [1, 64]}
    run.ask({name: [0]})
    export(run, 2)
    assert run.accept() == 'label' and run.delivered(name, 1)['accepted'] == 0


def test_a_file_that_somebody_saved_is_an_answer(people):
    """The very same labels, in other bytes; how many of them agree is counted, and not warned of below 99 %."""
    run = people(CELL)
    run.ask({'a/01': [0, 7], 'a/03': [2]})
    predicted = export(run)
    for name, label in predicted.items():
        label = label.astype(np.uint8)
        label[16:] = 0  # not asked for
        label[0, 16] = (label[0, 16] + 1) % 3  # in region 2
        run.hand_in(run.inbox(0, name), label)
    assert run.accept() == 'train' and run.state.entry['unchanged'] == 2
    assert 'exactly what the model had predicted' not in run.log


def test_void_is_no_agreement_with_what_has_no_prediction(people):
    run = people('pixel', unlabelable=200)
    run.ask({'a/01': [50]})
    export(run)
    run.hand_in(run.inbox(0, 'a/01'), np.full(tiny.SHAPE, 200, np.uint8))
    assert run.accept() == 'train' and run.state.entry['unchanged'] == 0 and run.state.entry['void_pixels'] == 1


@pytest.mark.parametrize('unit', ['pixel', dict(type='region', size=[1, 1])], ids=['pixel', 'region'])
def test_a_single_pixel_starts_from_nothing(people, unit):
    run = people(unit)
    run.ask({'a/01': [0, 50]})
    export(run)
    assert (np.array(Image.open(run.path('round_0', 'to_label', 'prediction', 'a', '01.png'))) == VOID).all()


# --- values of label files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit', ['image', 'region'])
def test_what_is_of_no_class_is_said_with_a_value(people, unit):
    """With ``reduce_zero_label`` and a step that fails on what it does not know; where all of an image is so, too."""
    pipeline = [PLAIN[0], PLAIN[1], dict(type='BelowThree'), PLAIN[2]]
    run = people(CELL if unit == 'region' else 'image', pipeline, {'train_dataloader.dataset.reduce_zero_label': True},
                 unlabelable=200)
    run.ask({'a/01': [0, 7], 'a/03': [1]} if unit == 'region' else {'a/01': None, 'a/03': None})
    label = np.full(tiny.SHAPE, 1, np.uint8)  # 0 once reduced, 2 once mapped
    label[:8, :8] = 200
    label[8:16, 8:12] = 0  # none
    run.hand_in(run.inbox(0, 'a/01'), label)
    run.hand_in(run.inbox(0, 'a/03'), np.full(tiny.SHAPE, 200, np.uint8))
    assert run.accept() == 'train'
    expected = np.full(tiny.SHAPE, 2 if unit == 'image' else VOID)
    expected[8:16, 12:16] = 2
    expected[:8, :8] = expected[8:16, 8:12] = VOID
    shown = run.trained_on(0)
    assert np.array_equal(shown['a/01'], expected) and (shown['a/03'] == VOID).all()
    assert unit == 'image' or run.state.entry['void_pixels'] == 64 + 32 + 64


def test_without_that_value_it_is_a_slip(people):
    run = people()
    run.ask({'a/01': None})
    run.hand_in(run.inbox(0, 'a/01'), np.full(tiny.SHAPE, 200, np.uint8))
    with pytest.raises(ValueError, match='01.png cannot be used .*but got 200'):
        run.accept()


@pytest.mark.parametrize('unit', ['image', 'region'])
def test_steps_that_map_values_count_once(people, truth, unit):
    """At acceptance, and not in training again. They write to their arrays."""
    run = people(CELL if unit == 'region' else 'image', [PLAIN[0], PLAIN[1], dict(type='TwoValues'), PLAIN[2]])
    asked = run.ask({'a/01': [0, 7] if unit == 'region' else None, 'a/03': [2] if unit == 'region' else None})
    run.hand_in(run.inbox(0, 'a/01'), (truth('a/01') > 0).astype(np.uint8) * 255)
    run.hand_in(run.inbox(0, 'a/03'), np.zeros(tiny.SHAPE, np.uint8))  # there the step changes nothing
    # 255 is no label after the last step only
    run.state.pool.ignore_index = 255
    assert run.accept() == 'train'
    shown = run.trained_on(0)
    assert np.array_equal(shown['a/01'], part(truth('a/01') > 0, asked['a/01']))
    assert np.array_equal(shown['a/03'], part(np.zeros(tiny.SHAPE), asked['a/03']))


def test_a_label_that_such_a_step_refuses_is_wrong(people, truth):
    run = people(pipeline=[PLAIN[0], PLAIN[1], dict(type='TwoValues'), PLAIN[2]])
    run.ask({'a/01': None})
    run.hand_in(run.inbox(0, 'a/01'), truth('a/01'))  # 0 to 2, which would pass for classes
    with pytest.raises(ValueError, match='01.png cannot be used .*neither 0 nor 255'):
        run.accept()


def test_label_maps_in_colours(people, truth):
    run = people(CELL, [PLAIN[0], PLAIN[1], dict(type='ColoursToClasses'), PLAIN[2]])
    asked = run.ask({'a/01': [0, 7]})['a/01']
    export(run)  # it looks at what values of a grey file mean
    run.hand_in(run.inbox(0, 'a/01'), np.array(ColoursToClasses.COLOURS, np.uint8)[truth('a/01')])
    assert run.accept() == 'train'
    assert np.array_equal(run.trained_on(0)['a/01'], part(truth('a/01'), asked))
    al_label.log_request(run.state)
    assert 'Predictions there are numbers of classes' in tiny.log_of(run.state.work_dir)


def test_a_loader_of_image_and_label_at_once(people, truth):
    run = people(CELL, [dict(type='LoadBoth'), PLAIN[2]])
    asked = run.ask({'a/01': [0, 7]})['a/01']
    run.hand_in(run.inbox(0, 'a/01'), truth('a/01'))
    assert run.accept() == 'train'
    assert np.array_equal(run.trained_on(0)['a/01'], part(truth('a/01'), asked))


@pytest.mark.parametrize('loader', ['LoadDeepLabels', 'LoadAnnotations'])
def test_more_than_255_classes(people, loader):
    classes = dict(classes=[f'c{i}' for i in range(300)], palette=[[i % 256, i // 256, 1] for i in range(300)])
    run = people(CELL, [PLAIN[0], dict(type=loader), PLAIN[2]], {
        'model.decode_head.num_classes': 300, 'train_dataloader.dataset.metainfo': classes,
        'model.decode_head.ignore_index': 65535})
    asked = run.ask({'a/01': [0, 7]})['a/01']
    label = np.full(tiny.SHAPE, 280, np.uint16)
    label[0, 0], label[0, 1] = 255, 65535
    os.makedirs(osp.dirname(run.inbox(0, 'a/01')))
    cv2.imwrite(run.inbox(0, 'a/01'), label)
    if loader == 'LoadAnnotations':  # it cuts 280 to 24: a class, but another
        with pytest.raises(ValueError, match='01.png cannot be used .* got 280'):
            run.accept()
        return
    assert run.accept() == 'train' and run.store('a/01')[0].dtype == np.uint16
    expected = np.where(asked, label, 65535)
    assert np.array_equal(run.store('a/01')[0], expected) and np.array_equal(run.trained_on(0)['a/01'], expected)
    run.ask({'a/01': [8]})
    predicted = np.full(tiny.SHAPE, 290)
    al_label.write_prediction(run.state, 'a/01', predicted)
    found = cv2.imread(run.path('round_1', 'to_label', 'prediction', 'a', '01.png'), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(found, np.where(run.state.mask_of('a/01', np.array([8])), 290, expected))


def test_exports_speak_the_values_of_label_files(people):
    """What is exported, saved and handed in is read as the classes that were predicted."""
    run = people(pipeline=[PLAIN[0], PLAIN[1], dict(type='TwoValues'), PLAIN[2]])
    run.ask({'a/01': None})
    predicted = np.arange(32 * 48).reshape(tiny.SHAPE) % 2
    al_label.write_prediction(run.state, 'a/01', predicted)
    file = np.array(Image.open(run.path('round_0', 'to_label', 'prediction', 'a', '01.png')))
    assert np.array_equal(file, predicted * 255)
    run.hand_in(run.inbox(0, 'a/01'), file)
    assert run.accept() == 'train' and run.state.entry['unchanged'] == 1
    assert np.array_equal(run.store('a/01')[0], predicted)


# --- what cannot be used, and what nobody asked for ------------------------------------------------------------------


@pytest.mark.parametrize('wrong, why', [
    ('cut', ''), ('text', ''), ('turned', r'should be that of its image, \(32, 48\), but is \(48, 32\)'),
    ('small', r'but is \(16, 24\): a thumbnail\?'), ('colours', r'but is \(32, 48, 3\): a colour picture'),
    ('deep', 'got 40000'), ('code', 'got 25[678]'), ('value', r'got 200, 255: divide by 255\?')])
@pytest.mark.parametrize('unit', ['image', 'region'])
def test_a_broken_file_is_named_and_all_others_are_kept(people, truth, unit, wrong, why):
    run = people(CELL if unit == 'region' else 'image', changes={'model.decode_head.ignore_index': 254}
                 if wrong == 'value' else None)
    run.ask({name: [0, 7] if unit == 'region' else None for name in ('a/01', 'a/03', 'b/08')})
    for name in ('a/01', 'a/03', 'b/08'):
        run.hand_in(run.inbox(0, name), truth(name))
    path, good = run.inbox(0, 'a/03'), truth('a/03')
    if wrong == 'cut':
        os.truncate(path, 60)
    elif wrong == 'text':
        open(path, 'w').write('not a picture')
    else:
        odd = np.where(good == 0, 255, 200).astype(np.uint8)
        cv2.imwrite(path, dict(turned=good.T, small=good[::2, ::2], colours=np.stack([good] * 3, 2), value=odd,
                               code=good.astype(np.uint16) + 256, deep=good.astype(np.uint16) + 40000)[wrong])
    with pytest.raises(ValueError, match=f'^1 label files cannot be used; .*{path} cannot be used .*{why}') as error:
        run.accept()
    assert '\n' not in str(error.value)
    assert run.delivered('a/01')['missing'] == [] and run.delivered('a/03')['wrong'].startswith(path)
    for name in ('a/01', 'b/08'):
        assert run.store(name)[1].any()
        os.remove(run.inbox(0, name))
    cv2.imwrite(path, good)
    assert run.accept() == 'train' and len(run.trained_on(0)) == 3


def test_what_nobody_asked_for_is_named_and_kept_aside(people, truth):
    run = people(CELL)
    asked = run.ask({'a/01': [0]})['a/01']
    for name in ('a/01', 'a/04'):
        run.hand_in(run.inbox(0, name), truth(name))
    open(run.inbox(0, 'a/01').replace('.png', ''), 'w').write('no extension')
    assert run.accept() == 'train'
    log = run.log
    assert f'Nobody asked for what lies elsewhere in these files, it is kept aside: a/01 ({32 * 48 - 64} pixels)' in log
    assert f'Nobody asked for these, they are kept aside: {run.inbox(0, "a/01")[:-4]}, {run.inbox(0, "a/04")}' in log
    assert np.array_equal(run.trained_on(0)['a/01'], part(truth('a/01'), asked)) and len(run.trained_on(0)) == 1
    assert osp.exists(run.inbox(0, 'a/04')) and not osp.exists(run.path('labels', 'done', 'a', '04.png'))


def test_values_that_nobody_asked_for_may_be_anything(people, truth):
    run = people(CELL)
    asked = run.ask({'a/01': [0]})['a/01']
    run.hand_in(run.inbox(0, 'a/01'), np.where(asked, truth('a/01'), 77).astype(np.uint8))
    assert run.accept() == 'train'
    assert np.array_equal(run.trained_on(0)['a/01'], part(truth('a/01'), asked))


def test_an_older_void_file_is_answered(people, truth):
    run = people(CELL)
    run.ask({'a/01': [0]})
    mmengine.put_text('a/01\n', run.path('round_0', 'to_label', 'void.txt'))
    assert run.accept() == 'label' and 'void.txt is not read any more: give what is of no class a value' in run.log


# --- going back, and taking out --------------------------------------------------------------------------------------


def final(work_dir) -> list:
    """What a run came to, but for times, and what it took from where."""
    content = read_state(osp.join(work_dir, STATE_FILE))
    return content['phase'], content['ended'], [
        {key: value for key, value in entry.items() if not key.endswith(('seconds', '_at')) and
         key not in ('from_store', 'unchanged')}
        for entry in content['rounds']]


@pytest.fixture
def runs(make_cfg, train, blind, shared_data):
    """A function that trains a run to its end, with people who answer in the inboxes; and the config to go on with."""

    def make(unit, oracle='human') -> tuple:
        al = dict(image=dict(initial=4, budget=2), region=dict(unit=CELL, initial=10, budget=7),
                  superpixel=dict(unit=UNITS['superpixel'], initial=8, budget=6),
                  pixel=dict(unit='pixel', strategy='margin', initial=60, budget=30))[unit]
        cfgs = [make_cfg(dict(al, rounds=2, oracle=oracle), root=blind if oracle == 'human' else shared_data,
                         changes={**SHORT, 'resume': resume}) for resume in (False, True)]
        runner, _ = train(cfgs[0])
        while (content := read_state(osp.join(cfgs[0].work_dir, STATE_FILE)))['phase'] == 'label':
            for name in content['rounds'][-1]['asked']:
                path = osp.join(cfgs[0].work_dir, f'round_{content["round"]}', 'labels', f'{name}.png')
                os.makedirs(osp.dirname(path), exist_ok=True)
                shutil.copy(osp.join(shared_data, 'ann', 'train', f'{name}.png'), path)
            runner, _ = train(cfgs[1])
        return cfgs[1], runner

    return make


def weights_of(cfg) -> dict:
    last = read_state(osp.join(cfg.work_dir, STATE_FILE))['rounds'][-1]['checkpoints']['last']
    return tiny.weights_at(cfg, last if osp.dirname(last) else osp.join('round_2', last))


@pytest.mark.parametrize('unit, back, oracle', [
    ('image', ['1'], 'human'), ('region', ['0'], 'human'), ('superpixel', ['1', '--train'], 'human'),
    ('pixel', ['0', '--train'], 'human'), ('region', ['1', '--train'], 'simulated')])
def test_rewound_and_repeated(runs, train, monkeypatch, capsys, unit, back, oracle):
    """The same picks, nothing asked of people, the same end; and nothing was deleted."""
    cfg, _ = runs(unit, oracle)
    expected, weights = final(cfg.work_dir), weights_of(cfg)
    files = {file for _, _, names in os.walk(cfg.work_dir) for file in names}
    n = sum(len(names) for _, _, names in os.walk(cfg.work_dir))
    al_label.main(['rewind', cfg.work_dir, *back])
    assert f'is back in round {back[0]}, which {"is trained" if back[1:] else "asks"} anew' in capsys.readouterr().out
    content, k = read_state(osp.join(cfg.work_dir, STATE_FILE)), int(back[0])
    assert (content['phase'], content['round'], content['ended']) == ('train' if back[1:] else 'query', k, None)
    assert sum(len(names) for _, _, names in os.walk(cfg.work_dir)) >= n + 1
    assert {file for _, _, names in os.walk(cfg.work_dir) for file in names} >= files
    assert not osp.exists(osp.join(cfg.work_dir, f'round_{k + 1}')) and osp.isdir(osp.join(
        cfg.work_dir, 'rewound_0', f'round_{k + 1}'))
    monkeypatch.setattr(al_label, 'export', lambda *args: pytest.fail('people were asked'))
    train(cfg)
    assert final(cfg.work_dir) == expected and tiny.same(weights_of(cfg), weights)
    if oracle == 'human':
        rounds = read_state(osp.join(cfg.work_dir, STATE_FILE))['rounds']
        asked = [sum(units[0] if units else 1 for units in entry['asked'].values()) for entry in rounds]
        assert [entry.get('from_store', 0) for entry in rounds] == [0] * (k + 1) + asked[k + 1:]
        assert f'{asked[-1]} of the {asked[-1]} units that round 2 asks for lie in the label store' in tiny.log_of(
            cfg.work_dir)


def test_another_request_after_a_rewind_asks_for_what_is_not_in_the_store(runs, train, make_cfg, blind):
    cfg, _ = runs('region')
    al_label.main(['rewind', cfg.work_dir, '1'])
    cfg.al.budget = [7, 12]
    cfg.al.rounds = 2
    had = {name: np.array(Image.open(osp.join(cfg.work_dir, 'labels', 'done', f'{name}.png'))) for name in tiny.NAMES
           if osp.exists(osp.join(cfg.work_dir, 'labels', 'done', f'{name}.png'))}
    train(cfg)
    content = read_state(osp.join(cfg.work_dir, STATE_FILE))
    entry = content['rounds'][2]
    assert content['phase'] == 'label' and entry['from_store'] == 7 and entry['pixels'] == 12 * 64
    folder = osp.join(cfg.work_dir, 'round_2', 'to_label')
    listed = open(osp.join(folder, 'to_label.txt')).read().split()
    masks = {name: read_mask(osp.join(folder, 'mask', f'{name}.png')) for name in listed}
    assert sum(mask.sum() for mask in masks.values()) == 5 * 64 and all(mask.any() for mask in masks.values())
    assert not any((mask & had[name]).any() for name, mask in masks.items() if name in had)


@pytest.mark.parametrize('back, why', [
    (['3'], 'K should be a round from 0 to 2, but got 3'), (['-1'], 'K should be a round from 0 to 2, but got -1'),
    (['2'], r"round 2 is the newest, and nothing comes after it \(its phase is 'query'\): --resume goes on with it, and"
     ' --train trains it anew')])
def test_where_a_run_cannot_go_back_to(runs, capsys, back, why):
    cfg, _ = runs('image', 'simulated')
    before = sorted(os.walk(cfg.work_dir)), open(osp.join(cfg.work_dir, STATE_FILE)).read()
    with pytest.raises(SystemExit) as error:
        al_label.main(['rewind', *(['--', cfg.work_dir, '-1'] if back == ['-1'] else [cfg.work_dir, *back])])
    assert error.value.code == 2
    assert re.fullmatch(f'al_label.py rewind: {why}', capsys.readouterr().err.splitlines()[-1])
    os.remove(osp.join(cfg.work_dir, 'al.lock')) if not any('al.lock' in f for _, _, f in before[0]) else None
    assert (sorted(os.walk(cfg.work_dir)), open(osp.join(cfg.work_dir, STATE_FILE)).read()) == before


def test_a_run_that_goes_on_is_left_alone(people):
    run = people()
    run.ask({'a/01': None})
    hold = f'import sys, fcntl; f = open({run.path("al.lock")!r}, "a"); fcntl.lockf(f, fcntl.LOCK_EX); ' \
        'print(1, flush=True); sys.stdin.read()'
    with subprocess.Popen([sys.executable, '-c', hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for command in (['rewind', run.state.work_dir, '0'], ['drop', run.state.work_dir, 'a/01']):
            with pytest.raises(SystemExit, match='2'):
                al_label.main(command)
        other.stdin.close()
    assert read_state(run.path(STATE_FILE))['dropped'] == []


@pytest.mark.parametrize('unit', ['image', 'region'])
def test_an_image_that_is_dropped_before_it_is_labelled(make_cfg, train, blind, shared_data, unit):
    """Its file may go: the run goes on without it, its cost stays."""
    al = dict(initial=4, budget=2, rounds=1) if unit == 'image' else dict(unit=CELL, initial=10, budget=40, rounds=1)
    cfg, go_on = (make_cfg(dict(al, oracle='human'), root=blind, changes={**SHORT, 'resume': resume})
                  for resume in (False, True))
    _, rounds = train(cfg)
    names, spent = [*rounds[0]['asked']], rounds[0]['spent']
    al_label.main(['drop', cfg.work_dir, names[0]])
    os.remove(osp.join(blind, 'img', 'train', f'{names[0]}.png'))
    shutil.rmtree(osp.join(cfg.work_dir, 'round_0', 'to_label'))
    train(go_on)
    assert f'Round 0 waits for labels in {len(names) - 1} images' in tiny.log_of(cfg.work_dir)
    assert open(osp.join(cfg.work_dir, 'round_0', 'to_label', 'to_label.txt')).read().split() == names[1:]
    shutil.copytree(osp.join(shared_data, 'ann', 'train'), osp.join(blind, 'ann', 'train'))
    train(go_on)
    rounds = train(go_on)[1]
    content = read_state(osp.join(cfg.work_dir, STATE_FILE))
    assert content['dropped'] == [names[0]] and content['ended'] and names[0] in rounds[0]['asked']
    assert {key: n for key, n in rounds[0]['spent'].items() if '%' not in key} == {
        key: n for key, n in spent.items() if '%' not in key}
    assert names[0] not in rounds[1]['asked'] and ' failed in round' not in tiny.log_of(cfg.work_dir)


def test_a_labelled_image_that_is_dropped_does_not_train(people, truth, capsys):
    run = people(CELL)
    asked = run.ask({'a/01': [0], 'a/03': [2]})
    for name in asked:
        run.hand_in(run.inbox(0, name), truth(name))
    run.accept()
    al_label.main(['drop', run.state.work_dir, 'a/03'])
    assert capsys.readouterr().out.endswith('goes on without a/03\n')
    assert run.accept() == 'train' and [*run.trained_on(0)] == ['a/01']
    assert run.state.spent()['images'] == 2 and run.state.spent()['pixels'] == 128
    assert 'a/03' not in al_patch.Query(run.state, None).open and 'kept aside: ' + run.inbox(0, 'a/03') not in run.log
    with pytest.raises(SystemExit):
        al_label.main(['drop', run.state.work_dir, 'x/9'])
    assert "IMAGE should be the name of one in the data set, such as 'a/00', but got 'x/9'" in capsys.readouterr().err


def test_the_pool_is_not_empty_before_it_is(people, truth):
    """Eleven images are left once one is dropped and gone: eleven that were asked for are not all of them."""
    run = people()
    run.ask(dict.fromkeys(tiny.NAMES[:11]))
    run.state.dropped, run.al.rounds = ['a/00'], 3
    run.state.pool.names = tiny.NAMES[1:]
    assert al_patch.why_stop(run.state) is None


# --- no peeking ------------------------------------------------------------------------------------------------------

OPENED = []  # label files, by a hook that cannot be taken out again


def note_opened(event: str, args: tuple) -> None:
    if event == 'open' and isinstance(args[0], str) and '/ann/train/' in args[0]:
        OPENED.append(args[0].split('/ann/train/')[1][:-len('.png')])


sys.addaudithook(note_opened)


@pytest.mark.parametrize('oracle', ['simulated', 'human'])
@pytest.mark.parametrize('unit', ['image', *UNITS])
def test_no_label_file_is_opened_that_nobody_asked_for(make_cfg, train, unit, oracle):
    """All label files are there; a human's are in the data set's own folder, too."""
    OPENED.clear()
    for resume in (False, True, True) if oracle == 'human' else (False, ):
        _, rounds = train(make_cfg(dict(unit=UNITS.get(unit, 'image'), initial=2, budget=2, rounds=1, oracle=oracle,
                                        strategy='margin'), changes={**SHORT, 'resume': resume}))
    asked = {name for entry in rounds for name in entry['asked']}
    assert len(rounds) == 2 and 'metrics' in rounds[1] and {*OPENED} == asked and len(asked) < 12


@pytest.mark.parametrize('value', [None, 200])
def test_tools_have_a_label_for_what_is_of_no_class(people, value):
    run = people(unlabelable=value)
    run.ask({'a/01': None})
    al_label.export(run.state)
    names = ['dark', 'grey', 'bright', *['unlabelable'] * (value is not None), 'asked']
    labels = json.load(open(run.path('round_0', 'to_label', 'cvat_labels.json')))
    assert [label['name'] for label in labels] == names and len({label['color'] for label in labels}) == len(names)
    interface = open(run.path('round_0', 'to_label', 'label_studio.xml')).read()
    found = [f'value="{name}"' in interface for name in (*names, 'unlabelable')]
    assert found == [True] * len(names) + [value is not None]


def test_a_run_that_polls_waits_for_all(people):
    with pytest.raises(ValueError, match="^`al.oracle.accept_partial` should be False with wait='poll', for it waits"):
        al_label.check_oracle(people(wait='poll', accept_partial=True).state)


@pytest.mark.parametrize('value, meaning', [(1, "the class 'grey'"), (255, 'no label, `ignore_index`'), (200, None)])
def test_a_value_for_no_class_that_has_a_meaning_is_refused(people, value, meaning):
    run = people(unlabelable=value)
    if meaning is None:
        al_label.check_oracle(run.state)
        return
    with pytest.raises(ValueError, match=f'^`al.oracle.unlabelable` should be .* but got {value}, which is {meaning}$'):
        al_label.check_oracle(run.state)
