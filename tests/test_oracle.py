"""A human labels: what a run writes for them, what it takes back, and that it ends as one with simulated labels."""
import contextlib
import glob
import io
import json
import os
import os.path as osp
import re
import shutil
import sys
import threading
import time
import xml.etree.ElementTree as ET
import zipfile

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmseg.registry import MODELS
from PIL import Image
from tiny import ROOT, launch, shell, write_config

import al_label
import al_patch
from al_label import encode_rle, label_values, overlay
from al_patch import STATE_FILE, Pool, State, read_mask, read_state

BINARY = {'model.decode_head.num_classes': 2, 'model.decode_head.out_channels': 1, 'model.decode_head.threshold': 0.7,
          'model.decode_head.loss_decode.use_sigmoid': True}
NO_CLASS = 200  # what the annotator writes where no class fits
SHORT = {**tiny.NO_VAL, 'train_cfg.max_iters': 2}
CELL = dict(type='region', size=[8, 8])
RUNS = dict(
    image=dict(initial=4, budget=2),
    region=dict(unit=CELL, initial=10, budget=7),
    superpixel=dict(unit=dict(type='superpixel', n_segments=12, compactness=100.), initial=8, budget=6),
    pixel=dict(unit='pixel', strategy='margin', initial=60, budget=30))

FULL_DISK = '''
import os
import al_label
from mmengine.dist import get_rank
write = al_label.write_prediction
def write_or_fail(*args):
    if os.environ.get('FULL_ON_RANK') == str(get_rank()):
        raise OSError('the disk is full')
    write(*args)
al_label.write_prediction = write_or_fail
'''


@pytest.fixture
def truth(shared_data, tmp_path):
    """What the annotator knows: the tiny data set with some void."""
    root = shutil.copytree(shared_data, tmp_path / 'truth')
    for name in tiny.NAMES:
        label = read_label(root, name)
        label[:, 40:] = 255
        write_label(root, name, label)
    return root


@pytest.fixture
def blind(truth, tmp_path):
    """The data set before anybody has labelled it."""
    root = shutil.copytree(truth, tmp_path / 'blind')
    shutil.rmtree(root / 'ann' / 'train')
    return root


def label_file(root, name: str) -> str:
    return osp.join(root, 'ann', 'train', f'{name}.png')


def read_label(root, name: str) -> np.ndarray:
    return cv2.imread(label_file(root, name), cv2.IMREAD_UNCHANGED)


def write_label(root, name: str, label: np.ndarray) -> None:
    os.makedirs(osp.dirname(label_file(root, name)), exist_ok=True)
    cv2.imwrite(label_file(root, name), label)


def state_of(cfg) -> dict:
    return read_state(osp.join(cfg.work_dir, STATE_FILE))


def to_label(work_dir, k: int, *path) -> str:
    return osp.join(work_dir, f'round_{k}', 'to_label', *path)


def read_png(*path) -> np.ndarray:
    with Image.open(osp.join(*path)) as image:
        return np.array(image)


def annotate(root, truth, work_dir, k: int, skip=(), inbox: bool = False) -> list:
    """Play the annotator: label what a round asks for and not a pixel more. In the inbox, nothing else is in the file.
    """
    names = open(to_label(work_dir, k, 'to_label.txt')).read().split('\n')[:-1]
    for name in names:
        if name in skip:
            continue
        mask, known = to_label(work_dir, k, 'mask', f'{name}.png'), read_label(truth, name)
        asked = read_png(mask) if osp.exists(mask) else np.ones(tiny.SHAPE, bool)
        known, label = np.where(known == 255, NO_CLASS, known), np.full(tiny.SHAPE, 255, np.uint8)
        if inbox:
            path = osp.join(work_dir, f'round_{k}', 'labels', f'{name}.png')
            os.makedirs(osp.dirname(path), exist_ok=True)
            cv2.imwrite(path, np.where(asked, known, label))
        else:
            label = read_label(root, name) if osp.exists(label_file(root, name)) else label
            write_label(root, name, np.where(asked, known, label))
    return names


def masks_of(cfg, k: int) -> dict:
    """Name -> what is labelled after round k."""
    state = State(state_of(cfg), cfg.work_dir)
    return {name: np.ones(tiny.SHAPE, bool) if where is None else read_mask(state.mask_path(where, name))
            for name, where in state.labelled(k).items()}


@pytest.fixture
def human(make_cfg, blind):
    """A function from settings to a config with a human, and that of the same run when it goes on."""

    def make(al: dict, **changes) -> tuple:
        return tuple(make_cfg({**dict(oracle=dict(type='human', unlabelable=NO_CLASS)), **al}, root=str(blind),
                              changes={**SHORT, 'resume': resume, **changes}) for resume in (False, True))

    return make


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit, inbox', [
    ('image', True), ('region', False), ('region', True), ('superpixel', True), ('pixel', False)])
def test_two_rounds_with_an_annotator_end_as_those_with_simulated_labels(
        make_cfg, train, human, blind, truth, unit, inbox, tmp_path):
    """The labels come into the data set's own folder, or into the inbox."""
    al = dict(RUNS[unit], rounds=2)
    simulated = make_cfg(al, root=str(truth), work_dir=str(tmp_path / 'simulated'), changes=SHORT)
    expected_runner, expected = train(simulated)
    assert not osp.exists(to_label(simulated.work_dir, 0))
    cfg, go_on = human(al)
    runner, rounds = train(cfg)
    for k in range(3):
        state = state_of(cfg)
        assert (state['phase'], state['round'], len(rounds)) == ('label', k, k + 1)
        assert not osp.exists(label_file(blind, '')) or {
            f'{name}.png' for name in masks_of(cfg, k - 1)} == {
                osp.relpath(osp.join(d, f), label_file(blind, '')[:-4]) for d, _, files in os.walk(
                    osp.dirname(label_file(blind, ''))) for f in files}
        assert annotate(blind, truth, cfg.work_dir, k, inbox=inbox) == list(expected[k]['asked'])
        runner, rounds = train(go_on)
    assert state_of(cfg)['phase'] == 'query' and len(rounds) == 3
    for entry in expected:
        assert (entry['spent'].pop('% pure', None) is None) == (unit in ('image', 'pixel'))  # only the truth tells it
    for key in ('asked', 'pixels', 'void_pixels', 'spent'):
        assert [entry.get(key) for entry in rounds] == [entry.get(key) for entry in expected]
    assert unit == 'image' or any(entry['void_pixels'] for entry in rounds)
    ours, theirs = masks_of(cfg, 2), masks_of(simulated, 2)
    assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    weights = expected_runner.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in runner.model.state_dict().items())
    assert not [name for name in tiny.NAMES if name not in ours and osp.exists(label_file(blind, name))]


def test_the_script_ends_with_code_0_and_says_how_to_go_on(tmp_path, blind, truth):
    """In two processes, which share the images; one of them cannot export, and the other does not hang. The command in
    the log is taken at its word."""
    first = ['a/01', 'a/03', 'b/08']
    for name in first:
        write_label(blind, name, read_label(truth, name))
    (tmp_path / 'full_disk.py').write_text(FULL_DISK)
    al = dict(unit=CELL, initial=first, budget=9, rounds=1, oracle=dict(type='human', unlabelable=NO_CLASS))
    more = "custom_imports = dict(imports=['al_patch', 'tiny', 'full_disk'])\n"
    config, work_dir = write_config(tmp_path, str(blind), repr(al), sync=True, more=more), tmp_path / 'a work dir'
    reach = os.pathsep.join([ROOT, osp.join(ROOT, 'tests'), str(tmp_path)])
    done = launch(config, 2, work_dir, PYTHONPATH=reach, FULL_ON_RANK='1')
    asked = read_state(work_dir / STATE_FILE)['rounds'][1]['asked']
    log = done.stdout + done.stderr
    assert 'LabelHook.after_al_ask failed in round' in log and 'OSError: the disk is full' in log
    assert f'Round 1 waits for labels in {len(asked)} images (9 regions, 576 pixels): see {work_dir}/round_1' in log
    assert f'the first at {label_file(blind, list(asked)[0])}' in log
    [command] = set(re.findall('Then go on with: (.*)', log))
    assert not osp.exists(to_label(work_dir, 1, 'to_label.txt'))
    shell(sys.executable, osp.join(ROOT, 'al_label.py'), 'export', str(work_dir), PYTHONPATH=reach)
    assert all(osp.exists(to_label(work_dir, 1, 'prediction', f'{name}.png')) for name in asked)
    late = list(asked)[::2]
    assert annotate(blind, truth, work_dir, 1, late) == list(asked)
    done = shell('bash', '-c', command, PYTHONPATH=reach)
    log = done.stdout + done.stderr
    assert f'{sum(asked[name][0] for name in asked if name not in late)} of 9 regions are labelled. Not yet: ' in log
    assert all(f'{name} (region ' in log for name in late) and f'Then go on with: {command}' in log
    assert 'Traceback' not in log and read_state(work_dir / STATE_FILE)['phase'] == 'label'
    masks = {name: read_png(to_label(work_dir, 1, 'mask', f'{name}.png')) for name in asked}
    assert annotate(blind, truth, work_dir, 1) == list(asked)
    done = shell('bash', '-c', command, PYTHONPATH=reach)
    for name in {*first, *asked}:  # the processes have shared the images
        mask = np.full(tiny.SHAPE, name in first) | masks.get(name, False)
        assert np.array_equal(read_png(work_dir, 'labels', 'done', f'{name}.png'), mask)
        assert np.array_equal(read_png(work_dir, 'labels', 'classes', f'{name}.png'),
                              np.where(mask, read_label(truth, name), 255))
    assert '1 of 1 rounds of queries are done' in done.stdout + done.stderr


def test_a_run_that_polls_goes_on_by_itself(make_cfg, train, human, blind, truth, tmp_path, monkeypatch):
    """One start; what is wrong is told once, and mended meanwhile."""
    monkeypatch.setattr(al_label, 'POLL_SECONDS', .1)
    _, expected = train(make_cfg(dict(RUNS['region'], rounds=1), root=str(truth), work_dir=str(tmp_path / 'simulated'),
                                 changes=SHORT))
    cfg, _ = human(dict(RUNS['region'], rounds=1, oracle=dict(type='human', unlabelable=NO_CLASS, wait='poll')))

    def label() -> None:
        for k in range(2):
            while not osp.exists(to_label(cfg.work_dir, k, 'to_label.txt')):
                time.sleep(.05)
            names = annotate(blind, truth, cfg.work_dir, k, skip=tiny.NAMES[6:], inbox=True)
            wrong = osp.join(cfg.work_dir, f'round_{k}', 'labels', f'{names[0]}.png')
            right = open(wrong, 'rb').read() if osp.exists(wrong) else None
            os.makedirs(osp.dirname(wrong), exist_ok=True)
            cv2.imwrite(wrong, np.zeros((3, 3), np.uint8))
            while f'round_{k}/labels/{names[0]}.png cannot be used' not in tiny.log_of(cfg.work_dir):
                time.sleep(.05)
            if right:
                open(wrong, 'wb').write(right)
            annotate(blind, truth, cfg.work_dir, k, inbox=True)

    annotator = threading.Thread(target=label, daemon=True)
    annotator.start()
    runner, rounds = train(cfg)
    annotator.join()
    assert state_of(cfg)['phase'] == 'query' and 'metrics' in rounds[1]
    assert [entry['asked'] for entry in rounds] == [entry['asked'] for entry in expected]
    assert [entry['void_pixels'] for entry in rounds] == [entry['void_pixels'] for entry in expected]
    log = tiny.log_of(cfg.work_dir)
    assert log.count('. The run looks again') == 2 and 'looks for labels every 0.1 s' in log


# --- exports that failed, or were deleted ----------------------------------------------------------------------------


def exported(work_dir, k: int = 1) -> dict:
    """What a round gives to people: path -> content, of the archive that of its files."""
    files, folder = {}, to_label(work_dir, k)
    for path in filter(osp.isfile, glob.glob(osp.join(folder, '**'), recursive=True)):
        name = osp.relpath(path, folder)
        if name.endswith('.zip'):
            with zipfile.ZipFile(path) as archive:
                files.update({f'{name}/{file}': archive.read(file) for file in archive.namelist()})
        elif name not in ('delivered.json', 'void.txt'):
            files[name] = open(path, 'rb').read()
    return files


@pytest.fixture
def asks(train, human, blind, truth, monkeypatch, tmp_path):
    """A run by cells that is to ask for round 1 next: its config, a function that lets it do so while a function of
    al_label's raises an error, and what it gives to people when nothing does. The model is round 0's own."""
    small = {0: {'model.decode_head.channels': 4}}
    cfg, go_on = human(dict(RUNS['region'], strategy='random', overrides=small))
    train(cfg)
    annotate(blind, truth, cfg.work_dir, 0)
    undisturbed = human(dict(RUNS['region'], strategy='random', overrides=small), work_dir=str(tmp_path / 'other'))[1]
    shutil.copytree(cfg.work_dir, undisturbed.work_dir)
    train(undisturbed)

    def ask(function: str, error: BaseException) -> None:
        def fail(*args):
            raise error

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(al_label, function, fail)
            train(go_on)

    return go_on, ask, exported(undisturbed.work_dir)


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError('no space left')], ids=['stopped', 'failed'])
@pytest.mark.parametrize('function', ['write_mask', 'write_prediction', 'label_studio_interface'])
def test_an_export_that_was_cut_off_is_made_good_on_resume(train, asks, function, error):
    """The state is on disk by then, so the same is asked for; and what an annotator has written stays."""
    cfg, ask, expected = asks
    ask(function, error)
    assert (state_of(cfg)['phase'], state_of(cfg)['round']) == ('label', 1)
    assert ('LabelHook.after_al_ask failed in round' in logs_of(cfg)) == isinstance(error, OSError)
    assert not osp.exists(to_label(cfg.work_dir, 1, 'to_label.txt'))
    open(to_label(cfg.work_dir, 1, 'void.txt'), 'w').write('a/01\n')
    train(cfg)
    assert (state_of(cfg)['phase'], state_of(cfg)['round']) == ('label', 1)
    assert exported(cfg.work_dir) == expected
    assert {'cvat.zip', 'mask', 'overlay', 'prediction', 'to_label.txt'} < {path.split('/')[0] for path in expected}
    assert open(to_label(cfg.work_dir, 1, 'void.txt')).read() == 'a/01\n'


def test_a_finished_export_is_left_alone_on_resume(train, asks):
    cfg, _, expected = asks
    train(cfg)
    open(to_label(cfg.work_dir, 1, 'mask', 'mine.png'), 'w').close()
    train(cfg)
    assert exported(cfg.work_dir) == {**expected, 'mask/mine.png': b''}


def test_the_command_exports_again(asks, capsys):
    cfg, ask, expected = asks
    ask('label_studio_interface', OSError('no space left'))
    state = open(osp.join(cfg.work_dir, STATE_FILE)).read()
    for lose in (lambda folder: None, shutil.rmtree, lambda folder: os.remove(osp.join(folder, 'to_label.txt'))):
        lose(to_label(cfg.work_dir, 1))
        al_label.main(['export', cfg.work_dir])
        assert exported(cfg.work_dir) == expected
        assert capsys.readouterr().out.endswith(f'What round 1 asks for is in {to_label(cfg.work_dir, 1)}\n')
    assert open(osp.join(cfg.work_dir, STATE_FILE)).read() == state


@pytest.mark.parametrize('wrong, why', [
    ('phase', 'the run in {dir} does not wait for labels: python al_report.py status says what it does'),
    ('state', '{dir} should be the --work-dir of a run, but there is no al_state.json in it'),
    ('config', '{dir} does not hold the config, a .py file, that mmengine writes there: copy yours into it'),
    ('checkpoint', 'the checkpoint {dir}/round_0/iter_2.pth that the run needs to go on is gone: .*'),
    ('settings', '`al.budget` was .* when round 1 used it and cannot change on resume, but got .*')])
def test_the_command_says_in_a_line_why_it_cannot(asks, train, capsys, wrong, why):
    cfg, _, expected = asks
    train(cfg)
    path = osp.join(cfg.work_dir, STATE_FILE)
    if wrong == 'phase':
        text = open(path).read().replace('"phase": "label"', '"phase": "train"')
        open(path, 'w').write(text)
    elif wrong == 'settings':
        cfg.al.budget = 1
        cfg.dump(osp.join(cfg.work_dir, 'newest.py'))
    else:
        for each in glob.glob(osp.join(cfg.work_dir, dict(state=STATE_FILE, config='*.py',
                                                          checkpoint='round_0/iter_2.pth')[wrong])):
            os.remove(each)
    with pytest.raises(SystemExit) as error:
        al_label.main(['export', cfg.work_dir])
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f'al_label.py export: {why.format(dir=cfg.work_dir)}', last), last
    assert exported(cfg.work_dir) == expected


def test_what_an_older_run_left_is_gone(train, human):
    cfg, _ = human(RUNS['region'])
    os.makedirs(to_label(cfg.work_dir, 0, 'prediction', 'a'))
    open(to_label(cfg.work_dir, 0, 'void.txt'), 'w').write('a/01\n')
    train(cfg)
    assert {'to_label.txt', 'mask', 'overlay'} < {*os.listdir(to_label(cfg.work_dir, 0))}
    assert {'prediction', 'void.txt'}.isdisjoint(os.listdir(to_label(cfg.work_dir, 0)))


# --- labels that come back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'region'])
def test_labels_to_begin_with_have_to_be_there(train, human, blind, truth, unit):
    cfg, go_on = human(dict(unit=unit, initial=['b/08', 'a/01'], rounds=1))
    write_label(blind, 'a/01', read_label(truth, 'a/01'))
    _, rounds = train(cfg)
    assert (state_of(cfg)['phase'], len(rounds)) == ('label', 1)
    assert '1 of 2 ' in (log := tiny.log_of(cfg.work_dir)) and 'Not yet: b/08; all in' in log
    write_label(blind, 'b/08', read_label(truth, 'b/08'))
    _, rounds = train(go_on)
    assert len(rounds) == 2 and list(rounds[0]['asked']) == ['a/01', 'b/08'] and state_of(cfg)['phase'] == 'label'
    assert unit == 'image' or rounds[0]['void_pixels'] == 2 * 32 * 8


def test_the_oracle_is_one_of_two(make_cfg, train):
    with pytest.raises(ValueError, match="^`al.oracle` should be 'simulated' or 'human', but got 'robot'"):
        train(make_cfg(dict(oracle='robot')))


# --- the data set changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit', ['image', 'region'])
def test_new_images_join_the_pool_and_removed_ones_are_reported(train, human, blind, truth, unit):
    cfg, go_on = human(dict(RUNS[unit], initial=['a/01', 'b/08'], budget=100 if unit == 'region' else 9, rounds=1))
    for name in ('a/01', 'b/08'):
        write_label(blind, name, read_label(truth, name))
    train(cfg)
    assert state_of(cfg)['pool'] == tiny.NAMES and state_of(cfg)['images'] == 12
    annotate(blind, truth, cfg.work_dir, 1)
    asked = list(state_of(cfg)['rounds'][1]['asked'])
    [left] = [name for name in tiny.NAMES if name not in ['a/01', 'b/08', *asked]][:1] or [None]
    for name in ('a/new', 'c/new'):
        os.makedirs(osp.join(blind, 'img', 'train', osp.dirname(name)), exist_ok=True)
        cv2.imwrite(osp.join(blind, 'img', 'train', f'{name}.png'), np.zeros((*tiny.SHAPE, 3), np.uint8))
    if left:
        os.remove(osp.join(blind, 'img', 'train', f'{left}.png'))
    go_on.al.rounds = 2
    train(go_on)
    state = state_of(cfg)
    assert state['images'] == 14 - bool(left) == len(state['pool'])
    assert {'a/new', 'c/new'} < set(state['pool']) and left not in state['pool']
    assert unit == 'image' or state['pixels'] == (14 - bool(left)) * 32 * 48
    log = logs_of(cfg)
    assert f'2 new images have joined the pool, which has {14 - bool(left)} now' in log
    assert not left or f'1 images have left the data set: {left}. The run' in log
    assert unit == 'region' or {'a/new', 'c/new'} <= set(state['rounds'][2]['asked'])


def logs_of(cfg) -> str:
    return ''.join(open(osp.join(d, f)).read() for d, _, files in os.walk(cfg.work_dir) for f in files
                   if f.endswith('.log') and 'round_' not in d)


def test_a_labelled_image_that_is_gone_is_an_error(train, human, blind, truth):
    cfg, go_on = human(RUNS['image'])
    train(cfg)
    name = annotate(blind, truth, cfg.work_dir, 0)[0]
    os.remove(osp.join(blind, 'img', 'train', f'{name}.png'))
    why = f'^1 images that were asked for are not in the data set any more: {name} .*Bring them back, or take them ' \
        f'out of the run: python al_label.py drop {cfg.work_dir} {name}$'
    with pytest.raises(ValueError, match=why):
        train(go_on)


# --- what is written for the human -----------------------------------------------------------------------------------


@pytest.fixture
def asked(train, human, blind, truth):
    """A run by cells that waits for the labels of round 1: config, and (old, new) masks of the images it asks for."""
    cfg, go_on = human(dict(unit=CELL, initial=40, budget=60, rounds=1))
    train(cfg)
    annotate(blind, truth, cfg.work_dir, 0)
    train(go_on)
    before, now = masks_of(cfg, 0), masks_of(cfg, 1)
    masks = {}
    for name in state_of(cfg)['rounds'][1]['asked']:
        old = before.get(name, np.zeros(tiny.SHAPE, bool))
        masks[name] = old, now[name] & ~old
    assert any(old.any() for old, _ in masks.values()), 'some image should be asked for twice'
    return cfg, masks


def predicted(cfg, name: str) -> np.ndarray:
    """The model's own classes, (32, 48), through none of the module's code."""
    model = MODELS.build({**cfg.model, 'data_preprocessor': None}).eval()
    path = tiny.checkpoint_of(cfg, state_of(cfg)['rounds'], 0)
    model.load_state_dict(torch.load(path, weights_only=False)['state_dict'])
    image = cv2.imread(osp.join(cfg.train_dataloader.dataset.data_root, 'img', 'train', f'{name}.png'))
    with torch.no_grad():
        x = torch.from_numpy((image.astype(np.float32) - 128) / 64).permute(2, 0, 1)[None]
        logits = model.decode_head(model.backbone(x))
    return torch.nn.functional.interpolate(logits, tiny.SHAPE, mode='bilinear')[0].argmax(0).numpy()


def expected_labels(cfg, masks: dict, blind) -> dict:
    """Name -> old labels, the prediction where labels are asked for, 255 elsewhere."""
    labels = {name: np.where(old, read_label(blind, name) if old.any() else 255, 255)
              for name, (old, _) in masks.items()}
    return {name: np.where(new, predicted(cfg, name), np.where(labels[name] == NO_CLASS, 255, labels[name]))
            for name, (_, new) in masks.items()}


def test_masks_and_predictions(asked, blind):
    cfg, masks = asked
    for name, label in expected_labels(cfg, masks, blind).items():
        with Image.open(to_label(cfg.work_dir, 1, 'mask', f'{name}.png')) as image:
            assert image.mode == '1' and np.array_equal(np.array(image), masks[name][1])
        with Image.open(to_label(cfg.work_dir, 1, 'prediction', f'{name}.png')) as image:
            assert image.mode == 'P' and np.array_equal(np.array(image), label)
            assert image.getpalette()[:9] == [0, 0, 1, 90, 90, 90, 200, 200, 200]
        picture = cv2.imread(to_label(cfg.work_dir, 1, 'overlay', f'{name}.jpg'))
        assert picture.shape == (32 * 16, 48 * 16, 3)
    assert not osp.exists(to_label(cfg.work_dir, 0, 'prediction'))
    assert osp.exists(to_label(cfg.work_dir, 0, 'cvat.zip'))


@pytest.mark.parametrize('changes', [
    {}, BINARY, {'model.data_preprocessor.test_cfg': dict(size_divisor=32),
                 'test_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile'), dict(
                     type='Resize', scale=(70, 40), keep_ratio=True), dict(type='PackSegInputs')]},
    {'model.test_cfg': dict(mode='slide', crop_size=(24, 24), stride=(16, 16))},
    {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}],
    ids=['plain', 'binary', 'resized', 'slide', 'mixed precision'])
def test_predictions_are_those_of_mmseg(train, human, blind, truth, monkeypatch, changes):
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    cfg, go_on = human(dict(RUNS['image'], initial=8), **{'train_cfg.max_iters': 12}, **changes)
    for name in tiny.NAMES if changes is BINARY else ():
        label = read_label(truth, name)
        write_label(truth, name, np.where(label == 255, 255, label > 0).astype(np.uint8))
    train(cfg)
    annotate(blind, truth, cfg.work_dir, 0)
    runner, _ = train(go_on)
    pool, found = Pool(go_on), set()
    for name in state_of(cfg)['rounds'][1]['asked']:
        with torch.no_grad(), al_patch.precision(runner):
            [sample] = runner.model.eval().test_step(pseudo_collate([pool[name]]))
        expected = sample.pred_sem_seg.data[0].numpy()
        assert np.array_equal(read_png(to_label(cfg.work_dir, 1, 'prediction', f'{name}.png')), expected)
        found |= {*np.unique(expected).tolist()}
    assert len(found) > 1


def test_whole_images_have_predictions_only(train, human, blind, truth):
    cfg, go_on = human(RUNS['image'])
    train(cfg)
    annotate(blind, truth, cfg.work_dir, 0)
    train(go_on)
    names = state_of(cfg)['rounds'][1]['asked']
    assert open(to_label(cfg.work_dir, 1, 'to_label.txt')).read() == ''.join(f'{name}\n' for name in names)
    assert {*os.listdir(to_label(cfg.work_dir, 1))} == {
        'to_label.txt', 'prediction', 'cvat.zip', 'cvat_labels.json', 'label_studio.json', 'label_studio.xml',
        'instructions.txt'}
    for name in names:
        assert np.array_equal(read_png(to_label(cfg.work_dir, 1, 'prediction', f'{name}.png')), predicted(cfg, name))


def outline_mask(points: list) -> np.ndarray:
    """The pixels in a rectangle's outline, corners (x, y)."""
    (left, top), (right, bottom) = np.min(points, 0), np.max(points, 0)
    rows, columns = np.indices(tiny.SHAPE)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def test_cvat_reads_the_same_classes(asked, blind):
    """What is asked for as outlines below all; masks of earlier labels and of predictions, apart from each other."""
    cfg, masks = asked
    with zipfile.ZipFile(to_label(cfg.work_dir, 1, 'cvat.zip')) as archive:
        assert archive.namelist() == ['annotations.xml']
        root = ET.fromstring(archive.read('annotations.xml'))
    images = root.findall('image')
    assert [image.get('name') for image in images] == [f'{name}.png' for name in masks]
    assert {(image.get('height'), image.get('width')) for image in images} == {('32', '48')}
    for image, (name, label) in zip(images, expected_labels(cfg, masks, blind).items()):
        got, (old, new) = np.full(tiny.SHAPE, 255), masks[name]
        cells = [outline_mask([[float(n) for n in point.split(',')] for point in shape.get('points').split(';')])
                 for shape in image.findall('polygon') if (shape.get('label'), shape.get('z_order')) == ('asked', '-1')]
        assert np.array_equal(np.sum(cells, 0), new) and len(cells) == new.sum() / 64
        for shape in image.findall('mask'):
            numbers = [int(n) for n in shape.get('rle').split(',')]
            flat = [i % 2 for i, n in enumerate(numbers) for _ in range(n)]
            left, top, w, h = (int(shape.get(key)) for key in ('left', 'top', 'width', 'height'))
            mask = np.zeros(tiny.SHAPE, bool)
            mask[top:top + h, left:left + w] = np.reshape(flat, (h, w))
            assert not (mask & (new if shape.get('source') == 'manual' else old)).any()
            got[mask] = ['dark', 'grey', 'bright'].index(shape.get('label'))
        assert np.array_equal(got, label)
    assert json.load(open(to_label(cfg.work_dir, 1, 'cvat_labels.json'))) == [
        dict(name=name, color=colour, attributes=[]) for name, colour in (
            ('dark', '#000001'), ('grey', '#5a5a5a'), ('bright', '#c8c8c8'),
            ('unlabelable', '#ffffff'), ('asked', '#ffe600'))]


def decode_rle(data: list) -> np.ndarray:
    """thi.ng/rle-pack's decoder, bit by bit."""
    bits, at = ''.join(f'{byte:08b}' for byte in data), 0

    def read(n: int) -> int:
        nonlocal at
        at += n
        assert at <= len(bits)
        return int(bits[at - n:at], 2)

    total, word = read(32), read(5) + 1
    sizes, out = [read(4) + 1 for _ in range(4)], []
    while len(out) < total:
        is_run, n = read(1), read(sizes[read(2)]) + 1
        out += [read(word)] * n if is_run else [read(word) for _ in range(n)]
    assert len(bits) - at < 8 and len(out) == total
    return np.array(out)


def test_a_brush_by_hand():
    """One labelled pixel: 4 values, words of 8 bits, counters of 3, 4, 8 and 16; a run of 4 times 255."""
    bits = f'{4:032b}' + '00111' + '0010' + '0011' + '0111' + '1111' + '1' + '00' + '011' + '11111111' + '00000'
    assert encode_rle(np.ones((1, 1), bool)) == [int(bits[i:i + 8], 2) for i in range(0, len(bits), 8)]
    assert encode_rle(np.ones((1, 1), bool))[4:] == [57, 27, 252, 127, 224]


@pytest.mark.parametrize('mask', [
    np.zeros((3, 5), bool), np.ones((300, 300), bool), np.arange(7 * 9).reshape(7, 9) % 2 == 0,
    np.repeat([False, True, False, True, False, True], [2, 4, 5, 64, 65, 16384]).reshape(1, -1),
    np.repeat([True, False, True], [16385, 1, 3])[None], np.random.default_rng(0).random((40, 50)) < .2])
def test_a_brush_is_read_back(mask):
    pixels = decode_rle(encode_rle(mask)).reshape(*mask.shape, 4)
    assert all(np.array_equal(pixels[..., channel], 255 * mask) for channel in range(4))


def test_label_studio_reads_the_same_classes(asked, blind):
    cfg, masks = asked
    tasks = json.load(open(to_label(cfg.work_dir, 1, 'label_studio.json')))
    interface = ET.parse(to_label(cfg.work_dir, 1, 'label_studio.xml')).getroot()
    image, brush = interface.find('Image'), interface.find('BrushLabels')
    names = [label.get('value') for label in brush]
    assert names == ['dark', 'grey', 'bright', 'unlabelable'] and image.get('value') == '$image'
    assert [task['data']['name'] for task in tasks] == list(masks)
    for task, (name, label) in zip(tasks, expected_labels(cfg, masks, blind).items()):
        assert task['data']['image'] == f'/data/local-files/?d={str(blind)[1:]}/img/train/{name}.png'
        [prediction] = task['predictions']
        got, (old, new), cells = np.full(tiny.SHAPE, 255), masks[name], []
        for result in prediction['result']:
            if result['from_name'] == 'asked':
                assert result['readonly'] and result['value']['polygonlabels'] == ['asked']
                cells.append(outline_mask((np.array(result['value']['points']) * [.48, .32]).round(3).tolist()))
                continue
            assert (result['from_name'], result['to_name'], result['type']) == (
                brush.get('name'), image.get('name'), 'brushlabels') and brush.get('toName') == image.get('name')
            assert (result['original_height'], result['original_width']) == tiny.SHAPE
            alpha = decode_rle(result['value']['rle']).reshape(*tiny.SHAPE, 4)[..., 3]
            [value] = result['value']['brushlabels']
            assert not (old if not result['readonly'] else new)[alpha == 255].any()
            got[alpha == 255] = names.index(value)
        assert np.array_equal(got, label) and prediction['model_version'] == 'round_1'
        assert np.array_equal(np.sum(cells, 0), new) and len(cells) == new.sum() / 64
    first = json.load(open(to_label(cfg.work_dir, 0, 'label_studio.json')))
    shown = [result['from_name'] for task in first for result in task['predictions'][0]['result']]
    assert shown == ['asked'] * 40


@pytest.mark.parametrize('options', [
    {}, dict(reduce_zero_label=True), dict(metainfo=dict(classes=('bright', 'dark')))], ids=['plain', 'reduced', 'own'])
def test_the_values_of_label_files_are_those_that_mmseg_reads(make_cfg, tmp_path, monkeypatch, options):
    """All 256 of them, in a file; and a class is written as a value that is read as this class."""
    monkeypatch.setattr('mmseg.datasets.BaseSegDataset.METAINFO', dict(classes=('dark', 'grey', 'bright')))
    cfg = make_cfg()
    cfg.train_dataloader.dataset.update(metainfo=None)
    cfg.train_dataloader.dataset.update(options)
    pool, stock = Pool(cfg), Compose([dict(type='LoadAnnotations')])
    path = str(tmp_path / 'values.png')
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    read = stock({**pool.info('a/01'), 'seg_map_path': path})['gt_seg_map'].reshape(-1)
    classes, values = label_values(pool, 'a/01')
    assert np.array_equal(classes, read)
    assert all(classes[values[c]] == c for c in (0, 1, 255))
    assert values[[0, 1, 255]].tolist() == {'': [0, 1, 255], 'reduce_zero_label': [1, 2, 255],
                                            'metainfo': [2, 0, 255]}[next(iter(options), '')]
    pred, new = np.random.default_rng(0).integers(0, 2, tiny.SHAPE), np.eye(*tiny.SHAPE, dtype=bool)
    path = str(tmp_path / 'prediction' / 'a' / '01.png')
    al_label.write_label(path, pool, 'a/01', np.where(new, pred, 255).astype(np.uint8))
    read = stock({**pool.info('a/01'), 'seg_map_path': path})['gt_seg_map']
    assert np.array_equal(read, np.where(new, pred, 255))
    assert np.array_equal(al_label.read_label(path, pool, 'a/01'), read)


@pytest.mark.parametrize('void', [-1, 255, 65535])
def test_void_of_any_value_has_one_in_a_label_file(make_cfg, void):
    cfg = make_cfg()
    cfg.model.decode_head.ignore_index = void
    classes, values = label_values(Pool(cfg), 'a/01')
    assert classes.tolist() == values.tolist() == [*range(256)]


def test_colours_that_are_taken_give_way(make_cfg):
    palette = [[0, 0, 0], [7, 7, 7], [7, 7, 7], [7, 7, 8], [255, 255, 255], [255, 255, 255]]
    cfg = make_cfg()
    cfg.train_dataloader.dataset.metainfo = dict(classes=tuple('abcdef'), palette=palette)
    classes, colours = al_label.class_colours(Pool(cfg))
    assert classes == list('abcdef')
    assert colours.tolist() == [[0, 0, 1], [7, 7, 7], [7, 7, 8], [7, 7, 9], [255, 255, 255], [0, 0, 2]]


def test_the_colours_of_pascal_voc():
    from mmseg.datasets import PascalVOCDataset
    assert al_label.voc_colours()[:21].tolist() == PascalVOCDataset.METAINFO['palette']
    assert len({tuple(colour) for colour in al_label.voc_colours().tolist()}) == 256


def test_cvat_knows_images_by_their_files(make_cfg, tmp_path):
    """A name lacks the whole ``img_suffix``, the file only its extension."""
    for name in ('seq 1/frame.1_cam', 'top_cam'):
        os.makedirs(osp.dirname(tmp_path / 'img' / name), exist_ok=True)
        cv2.imwrite(str(tmp_path / 'img' / f'{name}.png'), np.zeros((4, 4, 3), np.uint8))
    cfg = make_cfg()
    cfg.train_dataloader.dataset.update(
        data_root=str(tmp_path), data_prefix=dict(img_path='img'), img_suffix='_cam.png')
    pool = Pool(cfg)
    assert [(name, al_label.image_stem(pool, name)) for name in pool.names] == [
        ('seq 1/frame.1', 'seq 1/frame.1_cam'), ('top', 'top_cam')]


# --- the picture -----------------------------------------------------------------------------------------------------

YELLOW = [0, 230, 255]  # BGR


@pytest.mark.parametrize('image', [
    np.full((400, 1000, 3), 90, np.uint8), np.full((400, 1000), 90, np.uint8), np.full((400, 1000, 4), 90, np.uint8)],
    ids=['colour', 'grey', 'with alpha'])
def test_a_region_is_outlined_and_the_rest_dimmed(image):
    mask = np.zeros((400, 1000), bool)
    mask[100:200, 300:400] = True
    picture = overlay(image, mask)
    assert picture.shape == (400, 1000, 3) and (picture[mask] == 90).all()
    assert (picture[:80] == 45).all() and (picture[:, 420:] == 45).all()
    yellow = (picture == YELLOW).all(2)
    rows, cols = np.flatnonzero(yellow.any(1)), np.flatnonzero(yellow.any(0))
    assert 90 < rows[0] < 100 and 199 < rows[-1] < 210 and 290 < cols[0] < 300 and 399 < cols[-1] < 410
    assert yellow[:, 350].sum() >= 2 and yellow[150].sum() >= 2


def test_a_single_pixel_has_a_circle_that_can_be_seen():
    mask = np.zeros((600, 900), bool)
    mask[200, 700] = True
    picture = overlay(np.full((600, 900, 3), 90, np.uint8), mask)
    assert (picture[200, 700] == 90).all() and (picture[200, 705] == 45).all()
    rows, cols = np.nonzero((picture == YELLOW).all(2))
    assert 10 <= np.hypot(rows - 200, cols - 700).min() <= np.hypot(rows - 200, cols - 700).max() <= 25
    assert {(y > 200, x > 700) for y, x in zip(rows, cols)} == {(a, b) for a in (True, False) for b in (True, False)}


def test_a_small_image_is_enlarged_and_one_of_16_bits_is_brought_into_range():
    image = (np.arange(20 * 30).reshape(20, 30) * 100).astype(np.uint16)
    picture = overlay(image, np.ones((20, 30), bool))
    assert picture.shape == (20 * 26, 30 * 26, 3) and picture.dtype == np.uint8
    inner = picture[13::26, 13::26, 0]
    assert inner.shape == (20, 30) and np.abs(inner[5:-5, 5:-5] - image[5:-5, 5:-5] * (255 / 59900)).max() <= 1


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_to_go_on(monkeypatch):
    monkeypatch.delenv('AL_COMMAND', raising=False)
    monkeypatch.setattr(sys, 'argv', ['tools/train.py', 'my config.py'])
    assert al_patch.resume_command() == "python tools/train.py 'my config.py' --resume"
    monkeypatch.setattr(sys, 'argv', ['tools/train.py', 'c.py', '--resume'])
    assert al_patch.resume_command() == 'python tools/train.py c.py --resume'
    monkeypatch.setenv('AL_COMMAND', 'bash dist_al_train.sh c.py 4 ')
    assert al_patch.resume_command() == 'bash dist_al_train.sh c.py 4 --resume'


# --- names that would break a file -----------------------------------------------------------------------------------


@pytest.fixture
def ask(make_state, tmp_path):
    """A function from what changes in the data set's config to a state that asks people for its first two images."""

    def make(**changes) -> al_patch.State:
        state = make_state(dict(oracle='human'), changes={
            f'train_dataloader.dataset.{key}': value for key, value in changes.items()})
        al_patch.add_round(state, dict.fromkeys(state.pool.names[:2]))
        return state

    return make


def read_labelmap(text: str) -> list:
    """Names, as CVAT's importer reads them: it strips lines, passes over comments, and cuts at colons."""
    lines = [line.strip() for line in io.StringIO(text)]
    return [line.split(':')[0] for line in lines if line and line[0] != '#']


ODD_NAMES = [('a:b', 'a%3Ab'), ('two\nlines', 'two%0Alines'), ('bell\a', 'bell%07'), ('#1', '%231'),
             (' end ', '%20end%20'), ('\u2028', '%E2%80%A8'), ('<&"\'/%3A é #>', '<&"\'/%3A é #>')]


@pytest.mark.parametrize('name, expected', ODD_NAMES)
def test_any_class_name_comes_through_the_tools_files(ask, name, expected):
    """What would break them stands as in an URL; all other names as they are."""
    state = ask(metainfo=dict(classes=(name, 'grey', 'background'), palette=[[9] * 3, [90] * 3, [200] * 3]))
    al_label.export(state)
    folder = osp.join(state.folder(), 'to_label')
    labels = json.load(open(osp.join(folder, 'cvat_labels.json')))
    brush = ET.parse(osp.join(folder, 'label_studio.xml')).getroot().find('BrushLabels')
    for names in [label['name'] for label in labels][:-1], [label.get('value') for label in brush]:
        assert names == [expected, 'grey', 'background']
        text = ''.join(f'{each}:{n},0,0::\n' for n, each in enumerate(names))  # a labelmap.txt
        assert read_labelmap(text) == names


@pytest.mark.parametrize('name', ['two\nlines', 'two\rlines', ' space', '#1', 'line\u2028'])
def test_an_image_name_that_is_no_line_is_refused_before_anything_is_written(ask, truth, tmp_path, name):
    for kind in ('img', 'ann'):
        os.makedirs(tmp_path / 'own' / kind)
        for new, old in (('b', 'a/00'), (name, 'a/01')):
            shutil.copy(osp.join(truth, kind, 'train', f'{old}.png'), tmp_path / 'own' / kind / f'{new}.png')
    state = ask(data_root=str(tmp_path / 'own'), data_prefix=dict(img_path='img', seg_map_path='ann'))
    with pytest.raises(ValueError, match='image names should be one line, .* but got ' + re.escape(repr(name))):
        al_label.export(state)
    assert not osp.exists(osp.join(state.folder(), 'to_label'))
