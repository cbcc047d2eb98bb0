"""Files and models that are not as they should be: one clear line that names them, and nothing is written over."""
import errno
import json
import os
import os.path as osp
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.model import BaseModel
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from PIL import Image

import al_patch
import al_report
from al_patch import STATE_FILE, Pool, State, png_path, read_state, write_atomically, write_png
from al_report import check_no_label

SHORT = {**tiny.NO_VAL, 'train_cfg.max_iters': 1}
SAVER = 'default_hooks.checkpoint'
# round 0: the first four images; round 1: the last two of the pool
FIRST, LAST = tiny.NAMES[:4], tiny.NAMES[-2:]
IMAGES = dict(initial=FIRST, strategy=dict(type='random', select='tiny:last_ones'))
CELLS = dict(IMAGES, unit=dict(type='region', size=[16, 48]))  # two to an image: round 1 labels all of the last one


@pytest.fixture
def own_data(tmp_path, shared_data):
    """A copy of the tiny data set, to damage."""
    return shutil.copytree(shared_data, tmp_path / 'data')


def file_of(root, kind: str, name: str) -> str:
    return osp.join(root, kind, 'train', f'{name}.png')


def cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def empty(path: str) -> None:
    os.truncate(path, 0)


def garbage(path: str) -> None:
    with open(path, 'w') as file:
        file.write('<html>404</html>')


def smaller(path: str) -> None:
    cv2.imwrite(path, cv2.imread(path, cv2.IMREAD_UNCHANGED)[:-1])


def out_of_range(path: str) -> None:
    label = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    label[0, :3] = 255, 7, 3
    cv2.imwrite(path, label)


# --- what was asked for ----------------------------------------------------------------------------------------------


DAMAGES = [('img', cut, 'cannot be used'), ('img', empty, 'cannot be used'), ('img', garbage, 'cannot be used'),
           ('ann', cut, 'cannot be used'), ('ann', empty, 'cannot be used'), ('ann', os.remove, 'no such file'),
           ('ann', smaller, r'its size should be that of its image, \(32, 48\), but is \(31, 48\)'),
           ('ann', out_of_range, 'labels should be below 3, .*, or 255 for none, but got 3, 7')]


@pytest.mark.parametrize('al', [IMAGES, CELLS], ids=['image', 'region'])
@pytest.mark.parametrize('kind, damage, match', DAMAGES, ids=[f'{kind}-{f.__name__}' for kind, f, _ in DAMAGES])
def test_a_bad_file_of_what_is_asked_is_named_and_can_be_mended(make_cfg, train, own_data, al, kind, damage, match):
    cfg = make_cfg(al, root=str(own_data), changes=SHORT)
    path = file_of(own_data, kind, LAST[-1])
    damage(path)
    with pytest.raises(ValueError, match=rf'^{path} cannot be used \(.*{match if match != "cannot be used" else ""}') \
            as error:
        train(cfg)
    assert '\n' not in str(error.value)
    cfg.resume = osp.exists(osp.join(cfg.work_dir, STATE_FILE))
    if cfg.resume:
        state = read_state(osp.join(cfg.work_dir, STATE_FILE))
        assert (state['phase'], len(state['rounds'])) == ('query', 1)
    else:  # the size of every image is looked up before anything else
        assert damage in (empty, garbage)
    shutil.copy(file_of(own_data, kind, LAST[0]), path)
    _, rounds = train(cfg)
    assert list(rounds[1]['asked']) == (LAST if al is IMAGES else LAST[-1:])


@pytest.mark.parametrize('unit', ['image', 'pixel'])
def test_a_bad_label_to_begin_with_leaves_nothing_behind(make_cfg, train, own_data, unit):
    smaller(file_of(own_data, 'ann', FIRST[1]))
    out_of_range(file_of(own_data, 'ann', FIRST[2]))
    cfg = make_cfg(dict(unit=unit, initial=FIRST), root=str(own_data), changes=SHORT)
    with pytest.raises(ValueError, match=r'a/01.png cannot be used .*31, 48\)\); .*a/02.png cannot be used .*3, 7\)$'):
        train(cfg)
    assert not osp.exists(osp.join(cfg.work_dir, STATE_FILE))


def test_labels_that_are_not_asked_for_may_be_anything(make_cfg, train, own_data):
    """Of whole images, and of the pixels of an image."""
    for name in set(tiny.NAMES) - {*FIRST, *LAST}:
        garbage(file_of(own_data, 'ann', name))
    train(make_cfg(IMAGES, root=str(own_data), changes=SHORT))
    cfg = make_cfg(dict(IMAGES, unit=dict(type='region', size=[31, 48]), budget=1), root=str(own_data), changes=SHORT,
                   work_dir=make_cfg().work_dir + '_regions')  # the last region of the last image is its last row
    out_of_range(file_of(own_data, 'ann', LAST[-1]))
    _, rounds = train(cfg)
    assert rounds[1]['asked'] == {LAST[-1]: [1, 48]}


@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_labels_in_range_pass(make_cfg, reduce_zero_label):
    pool = Pool(make_cfg(changes={'train_dataloader.dataset.reduce_zero_label': reduce_zero_label}))
    label = pool.check_label('a/00', 3 - reduce_zero_label)
    assert set(np.unique(label)) == ({0, 1, 255} if reduce_zero_label else {0, 1, 2})
    with pytest.raises(ValueError, match='but got 1' if reduce_zero_label else 'but got 2'):
        pool.check_label('a/00', 2 - reduce_zero_label)


def test_only_labels_that_were_asked_for_are_looked_at(make_state, own_data):
    out_of_range(file_of(own_data, 'ann', 'a/00'))
    state, mask = make_state(root=str(own_data)), np.zeros(tiny.SHAPE, bool)
    mask[0, :2] = True
    with pytest.raises(ValueError, match=f'^{file_of(own_data, "ann", "a/00")} cannot be used .*labels should be below '
                                         '3, the number of classes, or 255 for none, but got 7'):
        state.count_void('a/00', mask)
    mask[0, 1] = False
    mask[1] = True
    assert state.count_void('a/00', mask) == 1  # void pixel


@pytest.mark.parametrize('unit', ['image', 'pixel'])
@pytest.mark.parametrize('workers', [0, 1])
def test_a_labelled_file_that_breaks_later_is_named(make_cfg, train, own_data, unit, workers):
    al = dict(unit=unit, initial=tiny.NAMES[:1] if unit == 'image' else 5)
    cfg = make_cfg(dict(al, rounds=0), root=str(own_data), changes=SHORT)
    _, rounds = train(cfg)
    for name in rounds[0]['asked']:
        garbage(file_of(own_data, 'ann', name))
    state = read_state(osp.join(cfg.work_dir, STATE_FILE))
    write_atomically(osp.join(cfg.work_dir, STATE_FILE), json.dumps(dict(state, phase='train')))
    os.remove(osp.join(cfg.work_dir, 'round_0', 'last_checkpoint'))  # so that the round is trained again
    cfg.resume, cfg.train_dataloader.num_workers = True, workers
    with pytest.raises(ValueError, match=r'train/[ab]/\d\d.png or its label map cannot be used'):
        train(cfg)


# --- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('damage', [cut, empty, garbage])
@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_of_the_pool_that_cannot_be_scored_is_named(make_cfg, train, own_data, damage, workers):
    cfg = make_cfg(dict(initial=FIRST), root=str(own_data), changes=SHORT)
    cfg.test_dataloader.num_workers = workers
    damage(file_of(own_data, 'img', LAST[0]))
    with pytest.raises(ValueError, match=f'{file_of(own_data, "img", LAST[0])} cannot be used'):
        train(cfg)
    assert osp.exists(osp.join(cfg.work_dir, STATE_FILE)) == (damage is cut)  # whose header is whole


def test_a_name_that_is_no_unicode_is_refused(make_cfg, own_data):
    os.rename(file_of(own_data, 'img', 'a/03').encode(), file_of(own_data, 'img', 'a/03').encode()[:-4] + b'\xff.png')
    with pytest.raises(ValueError, match='03.* cannot be used .*surrogates not allowed'):
        Pool(make_cfg(root=str(own_data)))


def test_one_image(make_cfg, train):
    changes = {**SHORT, 'train_dataloader.dataset.indices': 1}
    with pytest.raises(ValueError, match='`al.budget` should be at most the 0 images'):
        train(make_cfg(dict(initial=1, budget=1), changes=changes))
    _, rounds = train(make_cfg(dict(initial=1, rounds=0), changes=changes))
    assert [entry['asked'] for entry in rounds] == [{'a/00': None}]
    cfg = make_cfg(dict(unit='pixel', initial=3), changes=changes, work_dir=make_cfg().work_dir + '_pixels')
    assert [entry['asked'] for entry in train(cfg)[1]] == [{'a/00': [3, 3]}, {'a/00': [2, 2]}]


@pytest.mark.parametrize('loop', ['iters', 'epochs'])
def test_fewer_images_than_a_batch(make_cfg, train, loop):
    changes = {**tiny.NO_VAL, 'train_dataloader.batch_size': 5}
    assert len(train(make_cfg({}, loop, changes=changes))[1]) == 2
    changes['train_dataloader.drop_last'] = True
    cfg = make_cfg({}, loop, changes=changes, work_dir=make_cfg().work_dir + '_')
    if loop == 'iters':  # an endless sampler fills a batch
        assert len(train(cfg)[1]) == 2
        return
    with pytest.raises(ValueError, match='`train_dataloader.batch_size` should be at most the 4 labelled images, .* 5'):
        train(cfg)


@pytest.mark.parametrize('unit', ['image', dict(type='superpixel', n_segments=12)], ids=['image', 'superpixel'])
def test_grey_and_16_bit_images(make_cfg, train, own_data, unit):
    for i, name in enumerate(tiny.NAMES):
        path = file_of(own_data, 'img', name)
        image = cv2.imread(path)
        cv2.imwrite(path, image[..., 0] if i % 3 == 0 else image.astype(np.uint16) * 257 if i % 3 == 1 else image)
    _, rounds = train(make_cfg(dict(unit=unit), root=str(own_data), changes=SHORT))
    assert [len(e['asked']) if unit == 'image' else sum(n for n, _ in e['asked'].values()) for e in rounds] == [4, 2]


@pytest.mark.parametrize('unit', ['image', 'pixel'])
def test_paths_with_spaces_and_letters_of_any_script_and_links(make_cfg, train, shared_data, tmp_path, unit):
    al = dict(unit=unit, initial=6, budget=3)
    _, expected = train(make_cfg(al, changes=SHORT))
    root = tmp_path / "Straße 日本 'x' [y]"
    shutil.copytree(shared_data, root / 'the data')
    os.symlink(root / 'the data', root / 'a link')
    cfg = make_cfg(al, root=str(root / 'a link'), changes=SHORT, work_dir=str(root / 'Arbeit {1} *'))
    _, rounds = train(cfg)
    assert [entry['asked'] for entry in rounds] == [entry['asked'] for entry in expected]


def test_a_work_dir_that_cannot_be_written(make_cfg, train, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='file/work'):
        train(make_cfg({}, work_dir=str(tmp_path / 'file' / 'work')))


# --- what is looked at before the first training ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_the_order_of_the_pool(monkeypatch):
    """Selectors get their rows so: `tiny:last_ones` asks for the last images."""
    monkeypatch.setattr(al_patch.Candidates, 'shuffled', al_patch.Candidates.sorted)


def refused(cfg, train, match: str) -> None:
    """A run ends in one line before anything is trained or written."""
    with pytest.raises(ValueError, match=match) as error:
        train(cfg)
    left = {name for name in os.listdir(cfg.work_dir) if not name.endswith('.py')}  # mmengine's copy of the config
    assert '\n' not in str(error.value) and left.isdisjoint({STATE_FILE, 'sizes.json', 'round_0', 'superpixels'})


def state_of(runner, content=None) -> State:
    cfg = runner.cfg
    return State(content or dict(seed=0, config={}), runner.work_dir, al_patch.parse_settings(cfg.al), runner,
                 Pool(cfg, al_patch.unwrap(runner.model)))


def val_file(root, kind: str, name: str = '2') -> str:
    return osp.join(root, kind, 'val', f'{name}.png')


@pytest.mark.parametrize('unit', ['image', 'pixel'])
@pytest.mark.parametrize('kind, damage, match', [
    ('ann', os.remove, 'no such file'), ('ann', garbage, 'UnidentifiedImageError'), ('img', garbage, 'img/val/2.png'),
    ('ann', smaller, r'its size should be that of its image, \(32, 48\), but is \(31, 48\)')])
def test_a_bad_file_of_the_validation_set_is_named(make_cfg, train, own_data, unit, kind, damage, match):
    damage(val_file(own_data, kind))
    refused(make_cfg(dict(unit=unit), root=str(own_data)), train, f'ann/val/2.png cannot be used .*{match}|'
            f'{match}.* or its label map .*ann/val/2.png cannot be used')


def test_a_validation_set_without_images(make_cfg, train):
    prefix = 'val_dataloader.dataset.data_prefix.img_path'
    for changes in ({'val_dataloader.dataset.img_suffix': '.jpg'}, {prefix: 'nowhere'}):
        refused(make_cfg({}, changes=changes), train, '`val_dataloader.dataset`, which should have an image')
    changes = {'val_dataloader.dataset.img_suffix': '.jpg', 'val_dataloader.dataset.serialize_data': False}
    refused(make_cfg({}, changes=changes), train, '`val_dataloader.dataset`, which should have an image')


@pytest.mark.parametrize('al, fatal', [({}, False), (dict(weights='best'), True), (dict(query_with='best'), True),
                                       (dict(stop=dict(value=50)), True)], ids=str)
@pytest.mark.parametrize('void', [255, 1])
def test_a_validation_set_without_any_label(make_cfg, train, own_data, al, fatal, void):
    for name in '0123':
        cv2.imwrite(val_file(own_data, 'ann', name), np.full(tiny.SHAPE, void, np.uint8))
    cfg = make_cfg(al, root=str(own_data), changes={'val_evaluator.ignore_index': void})
    if fatal:
        refused(cfg, train, 'no pixel of `val_dataloader.dataset` has a label .*`best` checkpoint.*`al.stop`')
    else:
        train(cfg)
        assert 'no pixel of `val_dataloader.dataset` has a label' in tiny.log_of(cfg.work_dir)
    cv2.imwrite(val_file(own_data, 'ann', '3'), np.full(tiny.SHAPE, 0, np.uint8))  # one label is enough
    train(make_cfg(al, root=str(own_data), work_dir=cfg.work_dir + '_', changes={'val_evaluator.ignore_index': void}))


@pytest.mark.parametrize('key', ['test_dataloader', 'val_dataloader'])
def test_images_of_several_sizes_in_a_batch(make_cfg, train, own_data, key):
    """Refused where the pipeline leaves them so; not with batches of one, nor where it makes them equal."""
    names, split = (['a/03', 'a/04'], 'train') if key == 'test_dataloader' else (['1', '2'], 'val')
    for kind in ('img', 'ann'):
        path = osp.join(own_data, kind, split, f'{names[1]}.png')
        cv2.imwrite(path, cv2.imread(path, cv2.IMREAD_UNCHANGED)[:24, :40])
    al = dict(initial=[name for name in tiny.NAMES if name != 'a/04'][:4])
    refused(make_cfg(al, root=str(own_data), changes=SHORT if split == 'train' else {}), train,
            f'a batch of .*{names[0]}.png and .*{names[1]}.png .set `{key}.batch_size=1`. cannot be used')
    singly = {'test_dataloader.batch_size': 1, 'val_dataloader.batch_size': 1}
    train(make_cfg(al, root=str(own_data), work_dir=make_cfg().work_dir + '_1', changes=singly))
    cfg = make_cfg(al, root=str(own_data), work_dir=make_cfg().work_dir + '_2')
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline.insert(1, dict(type='Resize', scale=tiny.SHAPE[::-1], keep_ratio=False))
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='Resize', scale=tiny.SHAPE[::-1], keep_ratio=False))
    train(cfg)


@pytest.mark.parametrize('al, changes, name', [
    (dict(stop=dict(metric='mIou', value=50)), {}, 'mIou'), (dict(stop=dict(metric='mDice', patience=2)), {}, 'mDice'),
    (dict(query_with='best'), {f'{SAVER}.save_best': 'mAccc', f'{SAVER}.rule': 'greater'}, 'mAccc')])
def test_a_metric_that_is_not_reported(make_cfg, train, al, changes, name):
    refused(make_cfg(al, changes=changes), train,
            f"(`al.stop.metric`|.*save_best`) should be one of aAcc, mIoU, mAcc, but got '{name}'")


def test_metrics_that_are_reported_are_as_stock_names_them(make_cfg, train):
    kinds = ['mIoU', 'mDice', 'mFscore']
    _, rounds = train(make_cfg(dict(rounds=0, stop=dict(metric='mPrecision', value=100)), changes={
        'val_evaluator.iou_metrics': kinds, f'{SAVER}.save_best': 'auto'}))
    known = ['aAcc', 'mIoU', 'mAcc', 'mDice', 'mFscore', 'mPrecision', 'mRecall']
    assert list(rounds[0]['metrics']) == known
    cfg = make_cfg(dict(stop=dict(metric='x', value=1)), changes={'val_evaluator.iou_metrics': kinds},
                   work_dir=make_cfg().work_dir + '_')
    refused(cfg, train, f'should be one of {", ".join(known)}, but got')


@pytest.mark.parametrize('al', [dict(weights='best'), dict(query_with='best'), dict(stop=dict(value=50))], ids=str)
def test_a_validation_that_begins_after_the_end(make_cfg, train, al):
    refused(make_cfg(al, changes={'train_cfg.val_begin': 5}), train, '`al.*needs .*`train_cfg.val_begin`')
    train(make_cfg(al, changes={'train_cfg.val_begin': 4}, work_dir=make_cfg().work_dir + '_'))


def test_no_label_of_the_pool_is_opened(make_cfg, train, own_data, monkeypatch):
    shutil.rmtree(osp.join(own_data, 'ann', 'train'))
    cfg = make_cfg(dict(initial=FIRST), root=str(own_data))
    opened, real = [], Image.open
    monkeypatch.setattr(Image, 'open', lambda path, *args: opened.append(path) or real(path, *args))
    with pytest.raises(ValueError, match='a/00.png cannot be used .there is no such file'):  # where it asks for them
        train(cfg)
    assert any('img/train' in str(path) for path in opened) and not any('ann/train' in str(path) for path in opened)


# --- one value for "no label" ----------------------------------------------------------------------------------------


LOSS, FILL = 'model.decode_head.ignore_index', 'model.data_preprocessor.seg_pad_val'
PAD = dict(type='Pad', size=(40, 60))


@pytest.mark.parametrize('unit', ['image', 'region'])
@pytest.mark.parametrize('changes, step, key', [
    ({LOSS: 7}, None, '`seg_pad_val` of SegDataPreProcessor should be 7 .*but got 255'),
    ({FILL: 0}, None, '`seg_pad_val` of SegDataPreProcessor should be 255 .*but got 0'),
    ({}, dict(type='RandomRotate', prob=.5, degree=9., seg_pad_val=2), '`seg_pad_val` of RandomRotate .*but got 2'),
    ({}, dict(PAD, pad_val=dict(img=0, seg=1)), '`pad_val` of Pad .*but got 1'),
    ({}, dict(type='RandomChoice', transforms=[[dict(PAD, pad_val=dict(seg=1))]]), '`pad_val` of Pad .*but got 1'),
    ({}, dict(type='RandomApply', transforms=dict(PAD, pad_val=dict(seg=1))), '`pad_val` of Pad .*but got 1'),
    ({LOSS: 7, FILL: 7}, PAD, '`pad_val` of Pad should be 7 .*but got 255'),
    ({LOSS: -100, FILL: -100}, None, 'should be -100 .and that from 0 to 255.')])
def test_what_fills_label_maps_is_what_the_loss_ignores(make_cfg, build, unit, changes, step, key):
    cfg = make_cfg(dict(unit=unit, initial=4), changes=changes)
    if step:
        cfg.train_dataloader.dataset.pipeline.insert(2, step)
    state = state_of(build(cfg))
    if unit == 'region':
        with pytest.raises(ValueError, match=f'{key}.*would be trained on'):
            check_no_label(state)
    else:
        check_no_label(state)
        assert 'model.decode_head.ignore_index' in tiny.log_of(cfg.work_dir)


def test_a_wrappers_own_transforms_are_looked_at(make_cfg, build):
    cfg = make_cfg(dict(unit='region'))
    mosaic = dict(type='RandomMosaic', prob=1., img_scale=tiny.SHAPE, seg_pad_val=2)
    leaf = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='MultiImageMixDataset', dataset=leaf, pipeline=[mosaic])
    with pytest.raises(ValueError, match='`seg_pad_val` of RandomMosaic should be 255 .*but got 2'):
        check_no_label(state_of(build(cfg)))


@pytest.mark.parametrize('head', [dict(ignore_index=7), {}])
def test_an_auxiliary_head_ignores_the_same(make_cfg, build, head):
    cfg = make_cfg(dict(unit='region'))
    cfg.model.auxiliary_head = [dict(cfg.model.decode_head, in_index=0, **head)]
    if not head:
        check_no_label(state_of(build(cfg)))
        return
    with pytest.raises(ValueError, match='`ignore_index` of FCNHead should be 255 .*but got 7'):
        check_no_label(state_of(build(cfg)))


@pytest.mark.parametrize('key, name', [('train_dataloader.dataset', 'BaseSegDataset'), ('val_evaluator', 'IoUMetric')])
def test_what_hides_no_label_is_said_but_trains(make_cfg, train, key, name):
    cfg = make_cfg(dict(unit='pixel', rounds=0), changes={f'{key}.ignore_index': 0})
    train(cfg)
    assert f'`ignore_index` of {name} should be 255' in tiny.log_of(cfg.work_dir)


def test_the_value_that_the_loss_ignores_hides_what_is_not_labelled(make_cfg, train):
    changes = {LOSS: 7, FILL: 7, **SHORT}
    runner, rounds = train(make_cfg(dict(unit='pixel', initial=30, rounds=0), changes=changes))
    state = state_of(runner, read_state(osp.join(runner.work_dir, STATE_FILE)))
    loader = dict(runner.cfg.train_dataloader, al=al_patch.what_is_labelled(state))
    for sample in runner.build_dataloader(loader).dataset:
        label, name = sample['data_samples'].gt_sem_seg.data[0].numpy(), sample['data_samples'].img_path[-8:-4]
        assert (label != 7).sum() == rounds[0]['asked'][name][1] and 255 not in label
    assert state.pool.ignore_index == Pool(runner.cfg).ignore_index == 7


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('returned, what', [(None, 'NoneType'), ([], 'list'), ('feature', r'\(1, 3\)')])
def test_a_model_that_returns_no_logits_is_named(make_cfg, train, monkeypatch, returned, what):
    real = EncoderDecoder.inference
    monkeypatch.setattr(EncoderDecoder, 'inference', lambda *args: real(*args).mean((2, 3)) if returned else returned)
    with pytest.raises(ValueError, match=rf'EncoderDecoder.inference should return logits \(1, .*\), but got {what}'):
        train(make_cfg({}, changes=SHORT))


def test_a_model_without_inference_is_refused_before_training(make_cfg, train):

    @MODELS.register_module(force=True)
    class NoSegmentor(BaseModel):

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, inputs, data_samples=None, mode='tensor'):
            raise NotImplementedError

    cfg, random = make_cfg({}, changes=SHORT), make_cfg(dict(strategy='random'), changes=SHORT)
    cfg.model = random.model = dict(type='NoSegmentor')
    with pytest.raises(ValueError, match='`model` should be a segmentor of mmseg, .* but got NoSegmentor'):
        train(cfg)
    with pytest.raises(ValueError, match='the loss of 2 training images fails .NotImpl'):  # a random choice asks it not
        train(random)


def test_overrides_that_do_not_fit_are_refused_before_training(make_cfg, train):
    with pytest.raises(ValueError, match=r'`al.overrides\[1\]` should fit the config, but got .*max_iters'):
        train(make_cfg(dict(overrides={1: {'train_cfg.max_iters.x': 3}})))


# --- nothing is written outside work_dir -----------------------------------------------------------------------------


def in_work_dir(path) -> State:
    return State(dict(seed=0, config={}), str(path))


@pytest.mark.parametrize('name', ['../x', '/etc/x', 'a/../../x', '../', 'a/../../labelled/../../x'])
def test_a_name_cannot_lead_out(tmp_path, name):
    with pytest.raises(ValueError, match='an image name should stay below its directory, but got '):
        in_work_dir(tmp_path).mask_path(0, name)


@pytest.mark.parametrize('link', ['round_1', 'round_1/labelled', 'round_1/labelled/a', 'round_1/labelled/a/x.png'])
def test_a_link_cannot_lead_out(tmp_path, link):
    outside, link = tmp_path / 'outside', tmp_path / 'work' / link
    outside.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / 'x.png' if link.suffix else outside)
    with pytest.raises(ValueError, match=f'a symbolic link leads to {outside}'):
        in_work_dir(tmp_path / 'work').mask_path(1, 'a/x')
    assert not os.listdir(outside)


def test_links_that_stay_inside_and_a_linked_work_dir_are_followed(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'work').symlink_to(tmp_path / 'disk')
    write_png(in_work_dir(tmp_path / 'work').mask_path(0, 'x'), np.ones((2, 2), bool))
    assert osp.isfile(tmp_path / 'disk' / 'round_0' / 'labelled' / 'x.png')
    assert png_path(str(tmp_path), 'x') == str(tmp_path / 'x.png')


def test_a_temporary_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / 'outside').write_text('mine')
    (tmp_path / 'al_state.json.al.tmp').symlink_to(tmp_path / 'outside')
    write_atomically(str(tmp_path / 'al_state.json'), 'new')
    assert (tmp_path / 'outside').read_text() == 'mine' and (tmp_path / 'al_state.json').read_text() == 'new'


def test_a_lock_is_not_written_through_a_link(make_cfg, train, tmp_path):
    cfg = make_cfg({}, changes=SHORT)
    os.makedirs(cfg.work_dir)
    os.symlink(tmp_path / 'outside', osp.join(cfg.work_dir, 'al.lock'))
    with pytest.raises(OSError, match='al.lock'):
        train(cfg)
    assert not (tmp_path / 'outside').exists()


@pytest.mark.parametrize('k', ['0/../../../outside', None, 1.5])
def test_the_round_of_a_state_cannot_lead_out(make_cfg, train, k):
    cfg = make_cfg(dict(rounds=0), changes=SHORT)
    train(cfg)
    path = osp.join(cfg.work_dir, STATE_FILE)
    write_atomically(path, json.dumps(dict(read_state(path), round=k)))
    with pytest.raises(ValueError, match='al_state.json is damaged .`state.round` should be count, but is'):
        train(make_cfg(dict(rounds=0), changes={**SHORT, 'resume': True}))


def test_names_in_a_state_cannot_lead_out(make_cfg, train):
    """They have to be names of the data set, and of these none leads out."""
    cfg = make_cfg(dict(unit='pixel', rounds=0), changes=SHORT)
    train(cfg)
    path = osp.join(cfg.work_dir, STATE_FILE)
    state = read_state(path)
    state['rounds'][0]['asked']['../../x'] = [1, 1]
    write_atomically(path, json.dumps(state))
    with pytest.raises(ValueError, match='1 images that were asked for are not in the data set any more: ../../x'):
        train(make_cfg(dict(unit='pixel', rounds=0), changes={**SHORT, 'resume': True}))


def test_a_truncated_superpixel_file_is_named(make_cfg, train):
    al = dict(unit=dict(type='superpixel', n_segments=12), initial=8)
    cfg = make_cfg(dict(al, rounds=0), changes=SHORT)
    train(cfg)
    folder = osp.join(cfg.work_dir, 'superpixels')
    files = [osp.join(where, name) for where, _, names in os.walk(folder) for name in names]
    for path in files:
        cut(path)
    assert len(files) == 12
    with pytest.raises(ValueError, match='superpixels/.*png cannot be used'):
        train(make_cfg(dict(al, rounds=1), changes={**SHORT, 'resume': True}))


# --- errors from below -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('what', ['checkpoint', 'scalars'])
def test_a_full_disk_in_what_mmengine_writes_says_where_and_the_run_goes_on(make_cfg, train, monkeypatch, what):
    """The system's error names no file."""
    def is_full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _, expected = train(make_cfg({}, work_dir=make_cfg().work_dir + '_whole', changes=tiny.NO_VAL))
    cfg = make_cfg({}, changes=tiny.NO_VAL)
    with monkeypatch.context() as patch:
        if what == 'checkpoint':
            patch.setattr('mmengine.fileio.backends.local_backend.LocalBackend.put', is_full)
        else:
            patch.setattr('mmengine.visualization.LocalVisBackend.add_scalars', is_full)
        with pytest.raises(OSError, match=rf'^a file in {cfg.work_dir} cannot be written \(\[Errno 28\] No space left '
                                          r'on device\): go on with --resume when it can$'):
            train(cfg)
    cfg.resume = True
    assert train(cfg)[1][-1]['asked'] == expected[-1]['asked']


def test_an_error_that_names_its_file_stays_as_it_is(make_cfg, train, monkeypatch):
    def fail(runner):
        open('/no/such/file')

    monkeypatch.setattr(al_patch, 'run_rounds', fail)
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: '/no/such/file'$") as error:
        train(make_cfg({}))
    assert error.value.__cause__ is None


def test_errors_come_out_alone(make_cfg, train):
    """A script that does not know this module shows one traceback."""
    with pytest.raises(ValueError, match='^`al.strategy` should name a function that can be imported') as error:
        train(make_cfg(dict(strategy='no.such:thing')))
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_an_image_without_superpixels_is_named(make_cfg, train, monkeypatch):
    load = Pool.load_image
    monkeypatch.setattr(Pool, 'load_image', lambda self, name: load(self, name) * np.float32(
        'nan' if name == LAST[0] else 1))
    cfg = make_cfg(dict(unit=dict(type='superpixel', n_segments=12), initial=3), changes=SHORT)
    with pytest.raises(ValueError, match=f'train/{LAST[0]}.png cannot be used .ValueError: unmasked NaN'):
        train(cfg)


@pytest.mark.parametrize('strategy, initial', [('entropy', 3), ('random', 3), ('entropy', tiny.NAMES[:2])], ids=str)
def test_segments_of_the_users_own_are_looked_at_before_anything_else(make_cfg, train, tmp_path, strategy, initial):
    """All that are missing are named, and all of another size."""
    folder, (a, b, c, *_, last) = str(tmp_path / 'own'), tiny.NAMES
    for name in tiny.NAMES:
        write_png(osp.join(folder, f'{name}.png'), np.zeros((31 if name in (b, last) else 32, 48), np.uint16))
    for name in (a, c):
        os.remove(osp.join(folder, f'{name}.png'))
    cfg = make_cfg(dict(unit=dict(type='superpixel', folder=folder), strategy=strategy, initial=initial))
    os.makedirs(cfg.work_dir)
    refused(cfg, train, f'^{folder}/{a}.png cannot be used .there is no such file.; .*{b}.png cannot be used .*31, 48.*'
                        f'{c}.png.*; .*{last}.png cannot be used ')


@pytest.mark.parametrize('compactness', [0, -1.])
def test_superpixels_need_compactness(compactness):
    with pytest.raises(ValueError, match='`al.unit.compactness` should be a number above 0, but got '):
        al_patch.resolve_unit(dict(type='superpixel', compactness=compactness))


def test_an_image_that_is_too_large_for_pillow_says_what_to_do(make_state, monkeypatch):
    state = make_state()
    monkeypatch.setattr('PIL.Image.MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match=r'ann/train/a/00.png cannot be used .DecompressionBombError: Image size .* '
                                         r'Set PIL.Image.MAX_IMAGE_PIXELS = None in a module of `custom_imports`'):
        state.count_void('a/00', np.ones(tiny.SHAPE, bool))


# --- batches ---------------------------------------------------------------------------------------------------------

PLAIN = {'model.decode_head': dict(_delete_=True, type='FCNHead', in_channels=8, channels=8, num_convs=1,
                                   concat_input=False, num_classes=3, norm_cfg=dict(type='BN'))}
PSP = {'model.decode_head': dict(_delete_=True, type='PSPHead', in_channels=8, channels=8, num_classes=3,
                                 pool_scales=(1, ), norm_cfg=dict(type='BN'))}


def checkpoints_of(cfg) -> list:
    return [path for path in os.listdir(osp.join(cfg.work_dir, 'round_0')) if path.endswith('.pth')]


@pytest.mark.parametrize('unit', ['image', 'pixel'])
def test_a_last_batch_of_one_image_is_refused_before_training(make_cfg, train, unit):
    """Where a BatchNorm sees one pixel of it, and nowhere else."""
    al = dict(unit=unit, initial=tiny.NAMES[:5] if unit == 'image' else 60, rounds=0)  # 60 are in all 12 images
    odd = dict(PSP, **{**tiny.NO_VAL, 'train_dataloader.batch_size': 4 if unit == 'image' else 11})
    cfg = make_cfg(al, 'epochs', changes=odd)
    with pytest.raises(ValueError, match='^the last batch of an epoch, one image .set `train_dataloader.drop_last=True`'
                                         ', or another `batch_size`., cannot be used .*: Expected more than '
                                         '1 value per channel') as error:
        train(cfg)
    assert '\n' not in str(error.value) and not checkpoints_of(cfg)
    cfg = make_cfg(al, 'epochs', changes={**odd, 'train_dataloader.drop_last': True, 'resume': True})
    assert len(train(cfg)[1]) == 1  # it is mended
    for i, (loop, changes) in enumerate([('iters', odd), ('epochs', {**odd, **PLAIN})]):
        train(make_cfg(al, loop, changes=changes, work_dir=f'{cfg.work_dir}_{i}'))

def test_trying_a_batch_changes_nothing(make_cfg, train, monkeypatch):
    runs = []
    for check in (al_report.check_last_batch, lambda runner: None):
        monkeypatch.setattr(al_report, 'check_last_batch', check)
        cfg = make_cfg(dict(initial=3), 'epochs', work_dir=f'{make_cfg().work_dir}_{len(runs)}')
        runner, rounds = train(cfg)
        runs.append((runner.model.state_dict(), [(entry['asked'], entry['metrics']) for entry in rounds]))
    assert runs[0][1] == runs[1][1] and tiny.same(runs[0][0], runs[1][0])


# --- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit', ['image', dict(type='region', size=[8, 8]), dict(type='superpixel', n_segments=12)],
                         ids=['image', 'region', 'superpixel'])
@pytest.mark.parametrize('strategy', ['entropy', 'random'])
def test_a_test_pipeline_alone_scores_the_pool(make_cfg, train, unit, strategy):
    """As the test dataloader with the same pipeline does."""
    al = dict(unit=unit, strategy=strategy, initial=4)
    _, expected = train(make_cfg(al, work_dir=make_cfg().work_dir + '_', changes=SHORT))
    cfg = make_cfg(al, changes={**SHORT, 'test_dataloader': None, 'test_cfg': None, 'test_evaluator': None})
    cfg.test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    assert [entry['asked'] for entry in train(cfg)[1]] == [entry['asked'] for entry in expected]


# --- hundreds of inputs ----------------------------------------------------------------------------------------------


def test_a_sample_of_wrong_inputs():
    """bad_input.py has them all."""
    done = subprocess.run([sys.executable, osp.join(osp.dirname(__file__), 'bad_input.py'), '--sample', '40', '--seed',
                           f'{time.time_ns()}', '--scripts', '1'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
