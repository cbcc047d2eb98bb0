"""What a team asks without a run: where any model is unsure, which images next; and a round's model in stock tools."""
import csv
import glob
import json
import os
import os.path as osp
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
    dict(strategy='coreset', unit=CELL, initial=12, budget=.05),
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
        assert sheet.width == 1100
    files = {path.name: path.read_bytes() for path in (out / 'round_1' / 'to_label').iterdir() if path.is_file()}
    assert {*files} == {'to_label.txt', 'cvat.zip', 'cvat_labels.json', 'label_studio.json', 'label_studio.xml'}
    shutil.rmtree(out / 'round_1' / 'to_label')
    al_label.main(['export', str(out)])
    again = {path.name: path.read_bytes() for path in (out / 'round_1' / 'to_label').iterdir() if path.is_file()}
    assert {name: content for name, content in again.items() if name != 'cvat.zip'} == {
        name: content for name, content in files.items() if name != 'cvat.zip'}  # that has dates
    assert f'{tiny.SHAPE[0]}' and osp.isfile(out / 'round_1' / 'to_label' / 'prediction' / f'{names[0]}.png')


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
    runner = al_train.build_runner(al_train.parse_args())
    assert runner.cfg.custom_imports == dict(imports=['al_patch'], allow_failed_imports=True)
