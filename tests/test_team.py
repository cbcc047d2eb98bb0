"""What a team asks without a run: where any model is unsure, which images next, where the paid labels are; and a
round's model in stock tools."""
import copy
import csv
import glob
import itertools
import json
import os
import os.path as osp
import re
import shutil
import types

import cv2
import numpy as np
import pytest
import scipy.special
import tiny
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS
from PIL import Image

import al_label
import al_patch
import al_report

DROPOUT = [('model.decode_head.dropout_ratio', .5)]
CELL = dict(type='region', size=[8, 8])


@pytest.fixture(scope='module')
def model(tmp_path_factory, shared_data):
    """A config without an `al` block, a checkpoint that stock mmengine has trained, and a folder of images."""
    folder = tmp_path_factory.mktemp('model')
    config = folder / 'own.py'
    config.write_text(tiny.config_text(shared_data).replace("'al_patch', ", ''))
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({**tiny.NO_VAL, 'work_dir': str(folder / 'stock'), 'experiment_name': 'own',
                         'train_cfg.max_iters': 24})
    Runner.from_cfg(cfg).train()
    return types.SimpleNamespace(config=str(config), checkpoint=str(folder / 'stock' / 'iter_24.pth'),
                                 images=osp.join(shared_data, 'img', 'train'))


def read_csv(*path) -> list[dict]:
    with open(osp.join(*map(str, path)), newline='') as file:
        return list(csv.DictReader(file))


def rounds_of(work_dir) -> list:
    return al_patch.read_state(osp.join(work_dir, al_patch.STATE_FILE))['rounds']


# --- score maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', [
    dict(mode='whole'), dict(mode='slide', crop_size=(16, 24), stride=(16, 24))], ids=lambda mode: mode['mode'])
def test_maps_are_those_of_the_models_own_probabilities(model, shared_data, tmp_path, mode):
    """Entropies of what mmseg's `inference_model` gives, of the images of the test set."""
    text = al_report.maps(model.config, model.checkpoint, str(tmp_path / 'out'), cfg_options=[('model.test_cfg', mode)])
    cfg = Config.fromfile(model.config)
    cfg.model.test_cfg, cfg.test_pipeline = mode, cfg.test_dataloader.dataset.pipeline
    stock = init_model(cfg, model.checkpoint, 'cpu')
    scale, means = json.load(open(tmp_path / 'out' / 'scale.json')), {}
    for name in '0123':
        logits = inference_model(stock, osp.join(shared_data, 'img', 'val', f'{name}.png')).seg_logits.data.numpy()
        probs = scipy.special.softmax(logits.astype(np.float64), 0)
        found = np.load(tmp_path / 'out' / 'maps' / f'{name}.npy')
        np.testing.assert_allclose(found, scipy.special.entr(probs).sum(0), atol=1e-5)
        means[name] = found.mean(dtype=np.float64)
        with Image.open(tmp_path / 'out' / 'maps' / f'{name}.png') as image:
            levels = np.asarray(image)
        assert levels.dtype == np.uint16
        np.testing.assert_allclose(scale['0'] + levels / 65535. * (scale['65535'] - scale['0']), found, atol=1e-5)
        picture = cv2.imread(str(tmp_path / 'out' / 'overlays' / f'{name}.jpg'))
        assert picture.shape == (8 * tiny.SHAPE[0], 8 * tiny.SHAPE[1] + 90, 3)  # enlarged, and a bar
    rows = read_csv(tmp_path, 'out', 'scores.csv')
    assert [row['image'] for row in rows] == sorted(means, key=means.get, reverse=True)
    assert [float(row['mean']) for row in rows] == pytest.approx(sorted(means.values(), reverse=True), rel=1e-5)
    assert repr(rows[0]['image']) in text


@pytest.mark.parametrize('score, mc', [('entropy', 4), ('bald', 3), ('tiny:brightest', None)])
def test_maps_have_the_querys_scores(model, tmp_path, score, mc):
    """The highest score in an image is that of the query's best pixel there, with the same dropout masks."""
    al_report.maps(model.config, model.checkpoint, str(tmp_path / 'maps'), model.images, dict(type=score), mc, DROPOUT)
    strategy = dict(type=score, **({} if mc is None else dict(mc=mc)))
    al_label.ask(model.config, model.checkpoint, model.images, 5, str(tmp_path / 'ask'), None, strategy, 'pixel', None,
                 DROPOUT)
    ours, theirs = ({row['image']: float(row[key]) for row in read_csv(tmp_path, folder, 'scores.csv')}
                    for folder, key in (('maps', 'max'), ('ask', 'score')))
    assert ours == pytest.approx(theirs, rel=1e-4) and list(ours) != sorted(ours)


@pytest.mark.parametrize('score, why', [
    ('random', '--score should make a map'), ('crc', '--score should make a map'), ('entropie', 'should be one of'),
    ('tiny:not_a_number', "the score of image '0' is not finite")])
def test_scores_that_make_no_maps(model, tmp_path, score, why):
    with pytest.raises(ValueError, match=why):
        al_report.maps(model.config, model.checkpoint, str(tmp_path / 'out'), score=dict(type=score))
    assert not (tmp_path / 'out').exists()


# --- which images next -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('al', [
    dict(strategy=dict(type='bald', mc=3)), dict(strategy='coreset', pool_size=7),
    dict(strategy='ripu', unit=CELL, initial=12, budget=9),
    dict(strategy='pixelpick', unit='pixel', initial=4, budget=3, per_image=True, seed=3)],
    ids=lambda al: f'{al["strategy"]}')
def test_the_choice_is_that_of_a_run(model, make_cfg, train, tmp_path, al):
    """Of the same checkpoint, pool, labels and seed, id by id; the whole matrix is in `benchmarks/team.py`."""
    cfg = make_cfg(al, changes=dict(DROPOUT))
    _, rounds = train(cfg)
    labelled = osp.join(cfg.work_dir, 'round_0', 'labelled')
    if not osp.isdir(labelled):
        labelled = str(tmp_path / 'labelled.txt')
        (tmp_path / 'labelled.txt').write_text('\n'.join(rounds[0]['asked']))
    more = [(f'al.{key}', al[key]) for key in ('per_image', 'pool_size') if key in al]
    al_label.ask(model.config, tiny.checkpoint_of(cfg, rounds, 0), model.images, al.get('budget', 2),
                 str(tmp_path / 'ask'), labelled, al['strategy'], al.get('unit', 'image'), al.get('seed'),
                 DROPOUT + more)
    assert rounds_of(tmp_path / 'ask')[1]['asked'] == rounds[1]['asked']
    for name, units in rounds[1]['asked'].items():
        if units:
            masks = [al_patch.read_mask(osp.join(where, 'round_1', 'labelled', f'{name}.png'))
                     for where in (cfg.work_dir, tmp_path / 'ask')]
            assert (masks[0] == masks[1]).all()


def test_what_is_asked_for_is_exported(model, tmp_path, capsys):
    """The list, the contact sheet, scores, and what annotation tools get; exported again when it was deleted."""
    out = tmp_path / 'ask'
    al_label.main(['ask', model.config, model.checkpoint, '--images', model.images, '--budget', '3', '--out', str(out),
                   '--strategy', 'margin', 'reduce=max'])
    assert '3 images in 3 images' in capsys.readouterr().out
    rows, names = read_csv(out, 'scores.csv'), open(out / 'round_1' / 'to_label' / 'to_label.txt').read().split()
    assert len(rows) == 12 and [row['images asked'] for row in rows] == ['1'] * 3 + ['0'] * 9
    scores = [float(row['score']) for row in rows]
    assert scores == sorted(scores, reverse=True) and {row['image'] for row in rows[:3]} == {*names}
    with Image.open(out / 'contact_sheet.png') as sheet:
        assert sheet.width == 900  # three in a row
    files = {path.name: path.read_bytes() for path in (out / 'round_1' / 'to_label').iterdir() if path.is_file()}
    assert {*files} == {
            'to_label.txt', 'instructions.txt', 'cvat.zip', 'cvat_labels.json', 'label_studio.json', 'label_studio.xml'}
    shutil.rmtree(out / 'round_1' / 'to_label')
    al_label.main(['export', str(out)])
    again = {path.name: path.read_bytes() for path in (out / 'round_1' / 'to_label').iterdir() if path.is_file()}
    assert {name: content for name, content in again.items() if name != 'cvat.zip'} == {
        name: content for name, content in files.items() if name != 'cvat.zip'}  # that has dates
    assert f'{tiny.SHAPE[0]}' and osp.isfile(out / 'round_1' / 'to_label' / 'prediction' / f'{names[0]}.png')


def test_two_processes_choose_as_one(model, tmp_path):
    """Under `torchrun`, of which one says what came of it."""
    command = ['ask', model.config, model.checkpoint, '--images', model.images, '--budget', '9', '--unit', 'region',
               'size=[8,8]', '--strategy', 'coreset', '--out']
    al_label.main([*command, str(tmp_path / 'one')])
    done = tiny.shell('torchrun', '--standalone', '--nproc_per_node', '2', osp.join(tiny.ROOT, 'al_label.py'), *command,
                      str(tmp_path / 'two'))
    assert done.stdout.count('9 regions in') == 1
    one, two = (rounds_of(tmp_path / each)[1] for each in ('one', 'two'))
    assert one['ids'] == two['ids'] and one['asked'] == two['asked']
    assert read_csv(tmp_path, 'one', 'scores.csv') == read_csv(tmp_path, 'two', 'scores.csv')


def test_what_was_asked_for_trains(model, make_cfg, train, shared_data, tmp_path):
    """The folder is a run's: with the labels in its inbox it goes on."""
    out = tmp_path / 'ask'
    al_label.ask(model.config, model.checkpoint, model.images, 9, str(out), unit=CELL)
    for name in rounds_of(out)[1]['asked']:
        path = out / 'round_1' / 'labels' / f'{name}.png'
        os.makedirs(path.parent, exist_ok=True)
        shutil.copy(osp.join(shared_data, 'ann', 'train', f'{name}.png'), path)
    cfg = Config.fromfile(out / 'own.py')
    cfg.resume = True
    _, rounds = train(cfg)
    assert rounds[1]['metrics'] and rounds[1]['spent']['regions'] == 9 and rounds[0]['spent']['regions'] == 0


def test_labelled_images_of_another_folder(model, shared_data, tmp_path):
    """They are looked at, and not asked for."""
    for i in range(4):
        os.makedirs(tmp_path / 'have', exist_ok=True)
        shutil.copy(osp.join(shared_data, 'img', 'val', f'{i}.png'), tmp_path / 'have')
    al_label.ask(model.config, model.checkpoint, model.images, 12, str(tmp_path / 'ask'), str(tmp_path / 'have'),
                 'coreset')
    first, second = rounds_of(tmp_path / 'ask')
    assert first['asked'] == dict.fromkeys('0123') and [*second['asked']] == tiny.NAMES


def test_label_maps_of_some_of_the_images(model, shared_data, tmp_path):
    """What is not void in them is labelled: nothing of it is asked for."""
    label = np.full(tiny.SHAPE, 255, np.uint8)
    label[:16] = 1
    for name, array in {'a/00': label, 'b/07': np.zeros_like(label)}.items():
        os.makedirs(osp.dirname(tmp_path / 'have' / name), exist_ok=True)
        cv2.imwrite(str(tmp_path / 'have' / f'{name}.png'), array)
    al_label.ask(model.config, model.checkpoint, model.images, 10 * 24 + 12, str(tmp_path / 'ask'),
                 str(tmp_path / 'have'), 'margin', CELL)
    first, second = rounds_of(tmp_path / 'ask')
    assert first['asked'] == {'a/00': [0, 16 * 48], 'b/07': None} and first['pixels'] == 16 * 48 + 32 * 48
    assert 'b/07' not in second['asked'] and second['asked']['a/00'] == [12, 16 * 48]


def test_a_folder_of_any_images(model, shared_data, tmp_path):
    """With all suffixes, in folders, beside what is no image; a data set class that finds its files in its own way."""
    os.makedirs(tmp_path / 'new' / 'deep')
    image = cv2.imread(osp.join(shared_data, 'img', 'val', '0.png'))
    for path in ('x.JPG', 'deep/y.png', 'z.bmp', '.hidden.png'):
        cv2.imwrite(str(tmp_path / 'new' / path), image)
    (tmp_path / 'new' / 'notes.txt').write_text('no image')
    al_label.ask(model.config, model.checkpoint, str(tmp_path / 'new'), 1.0, str(tmp_path / 'ask'), cfg_options=[
        ('train_dataloader.dataset.type', 'BaseCDDataset')])
    assert {*rounds_of(tmp_path / 'ask')[1]['asked']} == {'x', 'deep/y', 'z'}


def other_model(model, tmp_path) -> dict:
    return dict(cfg_options=[('model.decode_head.num_classes', 5)])


def no_checkpoint(model, tmp_path) -> dict:
    return dict(checkpoint=str(tmp_path / 'gone.pth'))


def no_images(model, tmp_path) -> dict:
    return dict(images=str(tmp_path))


def damaged_images(model, tmp_path) -> dict:
    folder = shutil.copytree(model.images, tmp_path / 'some')
    for name in ('a/01.png', 'b/08.png'):
        (folder / name).write_bytes(b'no image')
    return dict(images=str(folder))


def truncated_image(model, tmp_path) -> dict:
    folder = shutil.copytree(model.images, tmp_path / 'some')
    (folder / 'a/03.png').write_bytes((folder / 'a/03.png').read_bytes()[:900])
    return dict(images=str(folder))


def strange_labels(model, tmp_path) -> dict:
    os.makedirs(tmp_path / 'have' / 'a')
    for name in ('a/00', 'stranger'):
        cv2.imwrite(str(tmp_path / 'have' / f'{name}.png'), np.zeros(tiny.SHAPE, np.uint8))
    return dict(labelled=str(tmp_path / 'have'))


def strange_names(model, tmp_path) -> dict:
    (tmp_path / 'split.txt').write_text('a/00\na/99\n')
    return dict(labelled=str(tmp_path / 'split.txt'))


def something_there(model, tmp_path) -> dict:
    (tmp_path / 'ask').mkdir()
    (tmp_path / 'ask' / 'mine.txt').write_text('mine')
    return {}


@pytest.mark.parametrize('wrong, why', [
    (other_model, r'of the model are not there \(decode_head.conv_seg.bias \[5\].*give the config that it was trained'),
    (no_checkpoint, 'CHECKPOINT should be a file with weights, but there is no .*gone.pth'),
    (no_images, '--images should be a folder of images, but .* holds none'),
    (damaged_images, 'a/01.png cannot be used .*; .*b/08.png cannot be used'),
    (truncated_image, 'a/03.png cannot be used'),
    (strange_labels, "1 of 2 files have names of no image there, such as 'stranger'"),
    (strange_names, "'a/00'.* 1 of 2 are not in the data set: a/99"),
    (something_there, '--out should be a new or an empty folder, but .* holds something'),
    (dict(budget=13), '--budget should be at most the 12 images that are not labelled, but got 13'),
    (dict(budget=200, unit=dict(type='region', size=[16, 16])), 'at most the 72 regions that are not labelled'),
    (dict(budget=0), '`al.budget` should be a positive int'), (dict(strategy='crc'), '--strategy should do without'),
    (dict(unit='images'), '`al.unit` should be one of')], ids=lambda each: getattr(each, '__name__', str(each)))
def test_bad_input_is_named_and_leaves_nothing(model, tmp_path, wrong, why):
    given = wrong if isinstance(wrong, dict) else wrong(model, tmp_path)
    given = dict(config=model.config, checkpoint=model.checkpoint, images=model.images, budget=2,
                 out=str(tmp_path / 'ask')) | given
    with pytest.raises(ValueError, match=why):
        al_label.ask(**given)
    left = [*(tmp_path / 'ask').rglob('*')] if (tmp_path / 'ask').exists() else []
    assert [path.name for path in left] == ['mine.txt'] * (wrong is something_there)
    assert torch.is_grad_enabled()


# --- what was paid for -----------------------------------------------------------------------------------------------


def read_png(*path) -> np.ndarray:
    with Image.open(osp.join(*map(str, path))) as image:
        return np.array(image)


def stock_labels(config) -> dict:
    """Name of an image -> the label map that mmseg reads in training on it, by the data set of a config."""
    leaf = Config.fromfile(config).train_dataloader.dataset
    leaf.pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    return {osp.relpath(item['img_path'], osp.join(osp.dirname(config), 'img'))[:-4]: item['gt_seg_map']
            for item in DATASETS.build(leaf)}


@pytest.mark.parametrize('al', [
    dict(), dict(unit=CELL, initial=12, budget=9), dict(unit=dict(type='region', window=1), initial=20, budget=10)],
    ids=['image', 'region', 'window'])
def test_the_data_set_of_a_run(make_cfg, train, build, shared_data, tmp_path, al):
    """Stock reads what is labelled, and void elsewhere; each label has its round; the invoice's sums are the table's;
    its config trains."""
    cfg = make_cfg(al, custom_imports=dict(imports=['al_patch', 'tiny']), changes={'train_dataloader.num_workers': 0})
    runner, rounds = train(cfg)
    out = tmp_path / 'out'
    al_label.main(['dataset', cfg.work_dir, '--out', str(out)])
    state = al_patch.State(al_patch.read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE)), cfg.work_dir,
                           al_patch.parse_settings(cfg.al), runner, al_patch.Pool(cfg))
    labels = stock_labels(str(out / 'config.py'))
    assert list(labels) == [name for name in tiny.NAMES if name in state.labelled()]  # in the pool's order
    for name, label in labels.items():
        truth = read_png(shared_data, 'ann', 'train', f'{name}.png')
        assert (label == np.where(state.mask(name), truth, 255)).all()
        assert (read_png(out, 'round', f'{name}.png') == np.select(
            [state.mask(name, 0), state.mask(name, 1)], [0, 1], 255)).all()
        assert osp.realpath(out / 'img' / f'{name}.png') == osp.join(shared_data, 'img', 'train', f'{name}.png')
    invoice = read_csv(out, 'invoice.csv')
    for k, entry in enumerate(rounds):
        row, = [row for row in invoice if (row['round'], row['class']) == (str(k), 'all')]
        pixels = sum(units[1] if units else 32 * 48 for units in entry['asked'].values())
        units = sum(units[0] if units else 1 for units in entry['asked'].values())
        assert (int(row['images']), int(row['pixels'])) == (len(entry['asked']), pixels)
        assert row['units'] == ('' if 'window' in str(al) else str(units))
        assert sum(int(row['pixels']) for row in invoice if row['round'] == str(k)) == 2 * pixels
    text = open(out / 'config.py').read()
    assert 'al_patch' not in text.replace('needs al_patch', '') and 'work_dir' not in text
    assert ('avg_non_ignore=True' in text) == bool(al)
    stock = Config.fromfile(out / 'config.py')
    stock.work_dir = str(tmp_path / 'stock')
    trained = build(stock)
    trained.train()
    assert trained.iter == 4 and len(trained.train_dataloader.dataset) == len(labels)


def test_label_files_have_the_values_of_the_runs_own(make_cfg, train, shared_data, tmp_path):
    """With `reduce_zero_label`, images copied, and without the suffix of a data set's class."""
    root = shutil.copytree(shared_data, tmp_path / 'data')
    for name in tiny.NAMES:
        cv2.imwrite(str(root / 'ann' / 'train' / f'{name}.png'), 1 + read_png(root, 'ann', 'train', f'{name}.png'))
    cfg = make_cfg(dict(initial=['b/08', 'a/03'], rounds=0), root=str(root), changes={
        **tiny.NO_VAL, 'train_dataloader.dataset.reduce_zero_label': True})
    train(cfg)
    al_label.dataset(cfg.work_dir, str(tmp_path / 'out'), copy=True)
    for name in ('a/03', 'b/08'):
        assert (read_png(tmp_path / 'out', 'ann', f'{name}.png') == read_png(root, 'ann', 'train', f'{name}.png')).all()
        assert not osp.islink(tmp_path / 'out' / 'img' / f'{name}.png')
    assert [*stock_labels(str(tmp_path / 'out' / 'config.py'))] == ['a/03', 'b/08']


def test_what_people_have_handed_in_is_taken_first(make_cfg, train, tmp_path):
    """In shares; with the times of asking and accepting; a data set without any label is refused, and nothing is left.
    """
    al = dict(oracle='human', unit=CELL, initial=12, budget=9)
    cfg = make_cfg(al)
    train(cfg)
    names = open(osp.join(cfg.work_dir, 'round_0', 'to_label', 'to_label.txt')).read().split()
    root = shutil.copytree(cfg.train_dataloader.dataset.data_root, tmp_path / 'data')
    inbox = osp.join(cfg.work_dir, 'round_0', 'labels')
    pool = al_patch.Pool(cfg)
    paths = {name: pool.info(name)['seg_map_path'] for name in names}
    blind = tmp_path / 'blind.py'
    blind.write_text(open(glob.glob(osp.join(cfg.work_dir, '*.py'))[0]).read() +
                     "\ntrain_dataloader['dataset']['data_prefix']['seg_map_path'] = 'nowhere'\n")
    shutil.copy(blind, glob.glob(osp.join(cfg.work_dir, '*.py'))[0])
    with pytest.raises(ValueError, match='nothing is labelled in .* yet'):
        al_label.dataset(cfg.work_dir, str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists() and root
    for name, path in paths.items():
        os.makedirs(osp.dirname(osp.join(inbox, name)), exist_ok=True)
        shutil.copy(path, osp.join(inbox, f'{name}.png'))
    al_label.dataset(cfg.work_dir, str(tmp_path / 'out'), parts=2)
    entry, = rounds_of(cfg.work_dir)
    assert al_patch.read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE))['phase'] == 'train'
    rows = [row for row in read_csv(tmp_path, 'out', 'invoice.csv') if row['class'] == 'all']
    assert [row['share'] for row in rows] == ['1/2', '2/2'] and sum(int(row['clicks']) for row in rows) == 12
    assert {(row['asked'], row['accepted']) for row in rows} == {(entry['asked_at'], entry['accepted_at'])}
    shares = {row['image']: row['share'] for row in read_csv(tmp_path, 'out', 'labels.csv')}
    assert shares == {name: f'{1 + i % 2}/2' for i, name in enumerate(names)}
    assert {row['newest file'] for row in read_csv(tmp_path, 'out', 'labels.csv')} == {'round_0'}


@pytest.mark.parametrize('work_dir, parts, why', [
    ('nowhere', 1, 'nowhere should be the --work-dir of a run, but there is no al_state.json'),
    ('.', 0, '--parts should be a positive int, but got 0')])
def test_data_sets_that_cannot_be_had(tmp_path, capsys, work_dir, parts, why):
    with pytest.raises(SystemExit, match='^2$'):
        al_label.main(['dataset', str(tmp_path / work_dir), '--out', str(tmp_path / 'out'), '--parts', str(parts)])
    assert re.match(f'al_label.py dataset: .*{why}', capsys.readouterr().err) and not (tmp_path / 'out').exists()


def test_a_data_set_of_files_with_any_suffix(model, shared_data, tmp_path):
    """What was asked for of a folder, where each image has its own: a label map then has the whole name."""
    image = cv2.imread(osp.join(shared_data, 'img', 'val', '0.png'))
    for path in ('x.JPG', 'deep/y.bmp'):
        for folder, array, name in (('new', image, path), ('ask/round_1/labels', image[..., 0] // 90, path)):
            name = name if folder == 'new' else osp.splitext(name)[0] + '.png'
            os.makedirs(osp.dirname(tmp_path / 'later' / folder / name), exist_ok=True)
            cv2.imwrite(str(tmp_path / 'later' / folder / name), array)
    al_label.ask(model.config, model.checkpoint, str(tmp_path / 'later' / 'new'), 2, str(tmp_path / 'ask'))
    shutil.copytree(tmp_path / 'later' / 'ask', tmp_path / 'ask', dirs_exist_ok=True)
    al_label.dataset(str(tmp_path / 'ask'), str(tmp_path / 'out'))
    labels = stock_labels(str(tmp_path / 'out' / 'config.py'))
    assert {*labels} == {'x', 'deep/y'} and all((label == image[..., 0] // 90).all() for label in labels.values())


def test_two_data_sets_stay_two(make_cfg, train, shared_data, tmp_path):
    """Beside a labelled source that is not of the pool, which stays as it is."""
    leaf = make_cfg().train_dataloader.dataset.to_dict()
    parts = [dict(leaf, data_prefix=dict(img_path=f'img/train/{part}', seg_map_path=f'ann/train/{part}'))
             for part in 'ab']
    source = dict(leaf, data_prefix=dict(img_path='img/val', seg_map_path='ann/val'))
    cfg = make_cfg(dict(initial=['00', '07'], rounds=0, pool='dataset.datasets.0'), changes={
        **tiny.NO_VAL, 'train_dataloader.dataset': dict(_delete_=True, type='ConcatDataset', datasets=[
            dict(type='ConcatDataset', datasets=parts), source])})
    train(cfg)
    al_label.dataset(cfg.work_dir, str(tmp_path / 'out'))
    stock = DATASETS.build(Config.fromfile(tmp_path / 'out' / 'config.py').train_dataloader.dataset)
    assert [osp.relpath(stock.get_data_info(i)['img_path'], tmp_path / 'out') for i in range(2)] == [
        'img/00.png', 'img/07.png'] and len(stock) == 6


# --- second looks ----------------------------------------------------------------------------------------------------


def losses_of(cfg, rounds: list, shared_data: str, name: str, k: int) -> np.ndarray:
    """What mmseg predicts for an image with the model that asked for round k, as a cross entropy a pixel."""
    stock = copy.deepcopy(cfg)
    stock.test_pipeline = cfg.test_dataloader.dataset.pipeline
    network = init_model(stock, tiny.checkpoint_of(cfg, rounds, max(0, k - 1)), 'cpu')
    logits = inference_model(network, osp.join(shared_data, 'img', 'train', f'{name}.png')).seg_logits.data.double()
    label = torch.from_numpy(read_png(shared_data, 'ann', 'train', f'{name}.png')).long()
    return torch.nn.functional.cross_entropy(logits[None], label[None], reduction='none')[0].numpy()


@pytest.mark.parametrize('al', [dict(rounds=2), dict(unit=CELL, initial=24, budget=9, rounds=2),
                                dict(unit='pixel', initial=60, budget=30)], ids=['image', 'region', 'pixel'])
def test_suspects_are_what_contradicts_the_model_that_did_not_see_it(make_cfg, train, shared_data, tmp_path, al):
    """Ranked by mean losses of mmseg's own probabilities; in the list, the request and the pictures."""
    cfg = make_cfg(al, changes={'train_cfg.max_iters': 12})
    _, rounds = train(cfg)
    state = al_patch.State(al_patch.read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE)), cfg.work_dir)
    al_label.main(['suspects', cfg.work_dir, '--out', str(tmp_path / 'out'), '--budget', '5'])
    found = read_csv(tmp_path, 'out', 'suspects.csv')
    expected = {}
    for k, entry in enumerate(rounds):
        for name in entry['asked']:
            loss = losses_of(cfg, rounds, shared_data, name, k)
            before = [j for j in range(k) if name in rounds[j]['asked']][-1:]
            new, old = (al_patch.read_mask(state.mask_path(j, name)) if 'unit' in al else np.ones(tiny.SHAPE, bool)
                        for j in [k, *(before or [k])])
            new = new & ~old if before else new
            for i, (y, x) in enumerate(itertools.product(range(0, 32, 8), range(0, 48, 8))):
                if al.get('unit') == CELL and new[y:y + 8, x:x + 8].all():
                    expected[name, i] = loss[y:y + 8, x:x + 8].mean()
            if al.get('unit') == 'pixel':
                expected.update({(name, int(i)): loss.flat[i] for i in np.flatnonzero(new)})
            if 'unit' not in al:
                expected[name, 0] = loss.mean()
    order = sorted(expected, key=expected.get, reverse=True)[:5]
    assert [(row['image'], int(row['unit'])) for row in found] == order
    assert [float(row['loss']) for row in found] == pytest.approx([expected[key] for key in order], rel=2e-3)
    asked = rounds_of(tmp_path / 'out')[1]['asked']
    assert {*asked} == {name for name, _ in order} and sum(units[0] if units else 1 for units in asked.values()) == 5
    assert all((tmp_path / 'out' / 'pictures' / f'{name}.jpg').is_file() for name in asked)
    assert {row['round'] for row in found} <= {'0', '1', '2'} and {row['label'] for row in found} <= {
        'dark', 'grey', 'bright'}


def test_a_mended_suspect_is_a_label_change(make_cfg, train, shared_data, tmp_path):
    """It is handed in like any other label; the list has what it was and what the model takes it for."""
    root = shutil.copytree(shared_data, tmp_path / 'data')
    path = str(root / 'ann' / 'train' / 'a' / '02.png')
    wrong = read_png(path)
    right = wrong.copy()
    wrong[:8, :8] = (wrong[:8, :8] + 1) % 3
    cv2.imwrite(path, wrong)
    cfg = make_cfg(dict(oracle='human', initial=tiny.NAMES[:4], rounds=0), root=str(root), changes={
        'train_cfg.max_iters': 60, 'train_cfg.val_interval': 60, 'default_hooks.checkpoint.interval': 60})
    train(cfg)
    al_label.suspects(cfg.work_dir, str(tmp_path / 'out'), 1)
    inbox = osp.join(cfg.work_dir, 'round_0', 'labels', 'a', '02.png')
    os.makedirs(osp.dirname(inbox))
    cv2.imwrite(inbox, right)
    cfg.resume = True
    train(cfg)
    changes = json.load(open(osp.join(cfg.work_dir, 'labels', 'label_changes.json')))
    assert {name: [*versions.values()] for name, versions in changes.items()} == {'a/02': [64]}


@pytest.mark.parametrize('rounds, budget, why', [
    (1, 7, '--budget should be at most the 6 images that are labelled in .*, but got 7'),
    (None, 1, 'no round of .* is trained yet')])
def test_suspects_that_cannot_be_had(make_cfg, train, tmp_path, rounds, budget, why):
    cfg = make_cfg(dict(rounds=1, oracle='simulated' if rounds else 'human'))
    train(cfg)
    with pytest.raises(ValueError, match=why):
        al_label.suspects(cfg.work_dir, str(tmp_path / 'out'), budget)
    assert not (tmp_path / 'out').exists()


# --- projects that grow, and what they cost --------------------------------------------------------------------------


def run_of(tmp_path, asked: list, settings: dict) -> str:
    """A run's state, with what each round has asked for."""
    al = {**dict(strategy='entropy', unit='image', budget=2, rounds=3), **settings}
    content = tiny.saved(asked, 'query', settings=al, pixels=None if al['unit'] == 'image' else 12 * 1536)
    for entry in content['rounds']:
        entry.update(spent=dict(images=1), **{} if al['unit'] == 'image' else dict(pixels=1))
    (tmp_path / al_patch.STATE_FILE).write_text(json.dumps(content))
    return str(tmp_path)


IMAGES = [dict.fromkeys(tiny.NAMES[:4]), dict.fromkeys(tiny.NAMES[4:6])]
REGIONS = [{'a/00': [6, 384], 'a/01': [6, 384]}, {'a/00': [3, 192], 'b/07': [5, 320]}]


@pytest.mark.parametrize('rounds, settings, sizes, rows', [
    (IMAGES, dict(), False, [[0, 4, 4, '-', '-'], [1, 2, 2, '-', '-'], ['so far', 6, 6, '-', '-'],
                             ['to come, about', 4, 4, '-', '-']]),
    (IMAGES, dict(budget=[2, 3, .25], prices=dict(image=20, pixel=.01, unit='s')), True, [
        [0, 4, 4, '-', 6144, 141.44], [1, 2, 2, '-', 3072, 70.72], ['so far', 6, 6, '-', 9216, 212.16],
        ['to come, about', 6, 6, '-', 9216, 212.16]]),
    (REGIONS, dict(unit='region', budget=8, prices=dict(image=10, click=1.5)), False, [
        [0, 2, 12, 12, 768, 38.], [1, 2, 8, 8, 512, 32.], ['so far', 4, 20, 20, 1280, 70.],
        ['to come, about', 4, 16, 16, 1024, 64.]]),
    (REGIONS, dict(unit='region', budget=.0625, rounds=2), False, [  # 1152 of 12 x 1536 pixels, 64 each, 4 an image
        [0, 2, 12, 12, 768], [1, 2, 8, 8, 512], ['so far', 4, 20, 20, 1280], ['to come, about', 4, 18, 18, 1152]]),
    (REGIONS, dict(unit='region', budget=2, per_image=True, rounds=2), False, [  # in each of 12 images
        [0, 2, 12, 12, 768], [1, 2, 8, 8, 512], ['so far', 4, 20, 20, 1280], ['to come, about', 6, 24, 24, 1536]])])
def test_status_says_what_rounds_cost_and_what_the_rest_will(tmp_path, rounds, settings, sizes, rows, capsys):
    path = run_of(tmp_path, rounds, settings)
    if sizes:
        (tmp_path / 'sizes.json').write_text(json.dumps({name: [1, 'loader', *tiny.SHAPE] for name in tiny.NAMES}))
    al_report.main(['status', path])
    table = capsys.readouterr().out.partition('What labels cost:')[2]
    found = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines() if line.startswith('|')]
    assert found[1:] == [list(map(str, row)) for row in rows]
    assert found[0][5:] == [f'cost in {prices.get("unit", "units")}' for prices in [settings.get('prices')] if prices]


@pytest.mark.parametrize('prices', [5, dict(image='20'), dict(clicks=2), dict(image=-1), dict(image=20, unit=3)])
def test_prices_that_are_none(prices):
    with pytest.raises(ValueError, match='`al.prices` should be None or a dict of prices >= 0 of an `image`'):
        al_patch.parse_settings(dict(prices=prices))


def test_a_run_goes_on_next_month(make_cfg, train, shared_data, tmp_path):
    """With images that have joined, more rounds and another strategy: they are in the next query's pool, and all shares
    are of as many images."""
    root = shutil.copytree(shared_data, tmp_path / 'data')
    cfg = make_cfg(dict(strategy='entropy', prices=dict(image=2)), root=str(root))
    train(cfg)
    for kind in ('img', 'ann'):
        for name in ('0', '1'):
            shutil.copy(root / kind / 'val' / f'{name}.png', root / kind / 'train' / 'b' / f'new_{name}.png')
    al = dict(strategy='coreset', rounds=2, budget=[2, 8], prices=dict(image=3))
    later = make_cfg(al, root=str(root), resume=True)
    _, rounds = train(later)
    assert {'b/new_0', 'b/new_1'} <= {*rounds[2]['asked']} and len(rounds[2]['asked']) == 8
    shares = ['28.57', '42.86', '100.0']  # 4, 6 and 14 of 14
    assert [row['% of images'] for row in read_csv(cfg.work_dir, 'learning_curve.csv')] == shares
    run = al_report.read_run(cfg.work_dir)
    assert [str(row[2]) for row in al_report.rounds_table(run['rounds']).rows] == shares
    assert list(al_report.curve(run['rounds'], 'mIoU')[0]) == [float(share) for share in shares]
    costs = [line.split('|')[-2].strip() for line in al_report.status(cfg.work_dir).splitlines() if 'so far' in line]
    assert costs == ['42']


# --- a round's model in stock tools ----------------------------------------------------------------------------------


@pytest.mark.parametrize('al', [dict(weights='continue'), dict(unit=CELL, initial=12, budget=9)],
                         ids=lambda al: [*al][0])
def test_a_rounds_config_and_checkpoint_are_stocks(make_cfg, train, build, al):
    """`Runner.test` gives the table's figures, `init_model` the round's model; nothing in the config is of a run."""
    cfg = make_cfg(al, **{'train_cfg.max_iters': 8} if 'weights' in al else {})
    _, rounds = train(cfg)
    path, = glob.glob(osp.join(cfg.work_dir, 'round_1', '*.py'))
    stock, checkpoint = Config.fromfile(path), tiny.checkpoint_of(cfg, rounds, 1)
    assert 'al' not in stock and 'al' not in stock.train_dataloader and 'al_patch' in stock.custom_imports.imports
    weights = init_model(path, checkpoint, 'cpu').state_dict()
    assert tiny.same(weights, tiny.weights_at(cfg, osp.relpath(checkpoint, cfg.work_dir)))
    assert 'state.json' not in torch.load(checkpoint)['meta']['cfg']
    stock.update(load_from=checkpoint, work_dir=cfg.work_dir + '_test')
    assert {key: round(float(value), 4) for key, value in build(stock).test().items()} == rounds[1]['metrics']


def test_the_launcher_names_al_patch_in_the_configs_of_rounds(shared_data, tmp_path, monkeypatch):
    text = tiny.config_text(shared_data).replace("custom_imports = dict(imports=['al_patch', 'tiny'])\n", '')
    (tmp_path / 'cfg.py').write_text(text + 'al = dict()\n')
    monkeypatch.setattr('sys.argv', ['al_train.py', str(tmp_path / 'cfg.py'), '--work-dir', str(tmp_path / 'work')])
    import al_train
    cfg = al_train.read_config(al_train.parse_args())
    assert cfg.custom_imports == dict(imports=['al_patch'], allow_failed_imports=True)
