"""Files and models that are not as they should be: one clear line that names them, and nothing is written over."""
import json
import os
import os.path as osp
import shutil

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.model import BaseModel
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS

from al_patch import STATE_FILE, Pool, State, png_path, read_state, write_atomically, write_png

SHORT = {**tiny.NO_VAL, 'train_cfg.max_iters': 1}
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
    else:  # below image level, the size of every image is looked up before anything else
        assert al is CELLS and damage in (empty, garbage)
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
    state = read_state(osp.join(cfg.work_dir, STATE_FILE))
    assert (state['phase'], len(state['rounds'])) == ('query', 1)


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


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('returned, what', [(None, 'NoneType'), ([], 'list'), ('feature', r'\(2, 3\)')])
def test_a_model_that_returns_no_logits_is_named(make_cfg, train, monkeypatch, returned, what):
    real = EncoderDecoder.inference
    monkeypatch.setattr(EncoderDecoder, 'inference', lambda *args: real(*args).mean((2, 3)) if returned else returned)
    with pytest.raises(ValueError, match=rf'EncoderDecoder.inference should return logits \(2, .*\), but got {what}'):
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
    with pytest.raises(NotImplementedError):  # a random choice asks no model
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
    (tmp_path / 'al_state.json.tmp').symlink_to(tmp_path / 'outside')
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
    with pytest.raises(ValueError, match='al_state.json is damaged .its round is'):
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
