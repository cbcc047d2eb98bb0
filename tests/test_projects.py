"""Configs as public projects have them, and the rehearsal: what can fail fails before anything is paid for."""
import functools
import json
import os
import os.path as osp
import random
import re
import statistics

import cv2
import mmengine
import numpy as np
import pytest
import tiny
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmseg.datasets import BaseSegDataset
from mmseg.models import EncoderDecoder, FCNHead, SegDataPreProcessor
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS
from test_processes import join, start

import al_patch
import al_report
from al_patch import Pool, label_steps

LOAD, LABEL, PACK = (dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs'))
CELL = dict(type='region', size=[16, 16])
VOID = 255


def register(registry, kind: type) -> type:
    return registry.register_module(force=True, module=kind)


@functools.partial(register, TRANSFORMS)
class ThirdsToClasses(BaseTransform):
    """A label file of 0, 100 and 200, as classes; it asks for no more than is there."""

    def transform(self, results):
        if 'gt_seg_map' in results:
            results['gt_seg_map'] = (results['gt_seg_map'] // 100).astype(np.uint8)
        return results


@functools.partial(register, TRANSFORMS)
class StrictThirds(BaseTransform):
    """The same, and an error for any other value."""

    def transform(self, results):
        assert {*np.unique(results['gt_seg_map']).tolist()} <= {0, 100, 200}, 'no third'
        results['gt_seg_map'] = results['gt_seg_map'] // 100
        return results


@functools.partial(register, TRANSFORMS)
class BlueToClasses(BaseTransform):

    def transform(self, results):
        if 'gt_seg_map' in results:
            results['gt_seg_map'] = (results['gt_seg_map'][..., 0] // 100).astype(np.uint8)
        return results


@functools.partial(register, TRANSFORMS)
class MaskFromFile(BaseTransform):

    def transform(self, results):
        results['gt_seg_map'] = cv2.imread(results['seg_map_path'], cv2.IMREAD_UNCHANGED)
        results['seg_fields'].append('gt_seg_map')
        return results


@functools.partial(register, TRANSFORMS)
class TwoMaps(MaskFromFile):
    """Another label map beside the first."""

    def transform(self, results):
        results = super().transform(results)
        results['gt_parts'] = results['gt_seg_map'] + 10
        return results


@functools.partial(register, TRANSFORMS)
class NoLabels(BaseTransform):

    def transform(self, results):
        results['gt_seg_map'] = np.full(results['img_shape'], VOID, np.uint8)
        return results


@functools.partial(register, TRANSFORMS)
class Erodes(BaseTransform):
    """What becomes of a pixel depends on its neighbours."""

    def transform(self, results):
        results['gt_seg_map'] = cv2.erode(results['gt_seg_map'], np.ones((3, 3)))
        return results


@functools.partial(register, TRANSFORMS)
class Dilates(BaseTransform):
    """Where nearly all is of the highest value, all becomes so."""

    def transform(self, results):
        results['gt_seg_map'] = cv2.dilate(results['gt_seg_map'], np.ones((3, 3)))
        return results


@functools.partial(register, TRANSFORMS)
class Notes(BaseTransform):
    """Notes what training sees, under a name."""
    seen: dict = {}

    def __init__(self, part='labels', keys=('gt_seg_map', )):
        self.part, self.keys = part, keys

    def transform(self, results):
        if '/train/' in al_patch.image_path(results):
            name = al_patch.image_path(results).split('/train/')[1][:-4]
            self.seen.setdefault(self.part, {}).setdefault(name, []).append(
                [results[key].copy() for key in self.keys if key in results])
        return results


@functools.partial(register, TRANSFORMS)
class LoadPair(BaseTransform):

    def transform(self, results):
        paths = results['img_path']
        images = [cv2.imread(path) for path in (paths.values() if isinstance(paths, dict) else paths)]
        results['img'] = np.concatenate(images, -1)
        results['img_shape'] = results['ori_shape'] = images[0].shape[:2]
        return results


@functools.partial(register, DATASETS)
class Pairs(BaseSegDataset):
    METAINFO = dict(classes=('dark', 'grey', 'bright'))

    def __init__(self, kind='list', **kwargs):
        self.kind = kind
        super().__init__(**kwargs)

    def load_data_list(self):
        pairs = dict(list=lambda path: [path, path], dict=lambda path: dict(rgb=path, depth=path),
                     other=lambda path: None)
        infos = super().load_data_list()
        return [dict(info, img_path=pairs[self.kind](info['img_path']), **(
            dict(rgb_path=info['img_path']) if self.kind == 'other' else {})) for info in infos]


@functools.partial(register, DATASETS)
class OwnItems(BaseSegDataset):
    """Loads items in a way of its own: past its pipeline, past the filter of its images, or past neither."""
    METAINFO = dict(classes=('dark', 'grey', 'bright'))

    def __init__(self, past=None, **kwargs):
        self.past = past
        super().__init__(**kwargs)

    def full_init(self):
        super().full_init()
        self.every = getattr(self, 'every', None) or [self.get_data_info(i) for i in range(len(self))][::-1]

    def __getitem__(self, i):
        if self.past == 'pipeline':
            results = self.get_data_info(i)
            for step in self.pipeline.transforms:
                results = step(results)
            return results
        return self.pipeline(self.every[i] if self.past == 'filter' else self.get_data_info(i))


@functools.partial(register, DATASETS)
class KeepsBack:
    """Hands on all but each fourth image."""

    def __init__(self, dataset, keeps=True, lazy_init=False):
        self.dataset, self.keeps = DATASETS.build({**dataset, 'lazy_init': True}), keeps
        self.dataset.full_init()
        self.indices = [i for i in range(len(self.dataset)) if not keeps or i % 4]
        self.metainfo = self.dataset.metainfo

    def full_init(self):
        pass

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.dataset[self.indices[i]]


@pytest.fixture(autouse=True)
def nothing_seen():
    Notes.seen.clear()


@pytest.fixture
def config(make_cfg, tmp_path):
    """A function from the `al` block and the steps behind the image's loader to a config, on labels that are written
    by a function of the true ones."""

    def make(al, steps, write=lambda label: label, tested=None, **changes):
        root = tiny.make_data(tmp_path / 'own')
        for path in [osp.join(where, name) for where, _, names in os.walk(osp.join(root, 'ann')) for name in names]:
            cv2.imwrite(path, write(cv2.imread(path, cv2.IMREAD_UNCHANGED)))
        cfg = make_cfg(al, root=root, changes={**changes, 'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2})
        cfg.train_dataloader.dataset.pipeline = [LOAD, *steps, PACK]
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.pipeline = [LOAD, *(steps if tested is None else tested), PACK]
        return cfg

    return make


def times_100(label: np.ndarray) -> np.ndarray:
    return label * 100


def blue(label: np.ndarray) -> np.ndarray:
    return np.stack([label * 100, label * 0, label * 0 + 7], -1)  # blue: OpenCV and mmcv have it first


# --- steps that load labels and map their values ---------------------------------------------------------------------


@pytest.mark.parametrize('steps, write', [
    ([dict(type='MaskFromFile')], None), ([LABEL, dict(type='ThirdsToClasses')], times_100),
    ([LABEL, dict(type='StrictThirds')], times_100), ([LABEL, dict(type='BlueToClasses')], blue)],
    ids=['loader', 'map', 'strict', 'colours'])
@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'region'])
def test_labels_are_those_behind_the_last_step_that_maps_them(config, train, unit, steps, write):
    """What is hidden stays so through it, and what is labelled is the truth."""
    al = dict(unit=unit, initial=4, budget=2)
    cfg = config(al, [*steps, dict(type='RandomFlip', prob=0.), dict(type='Notes')], write or (lambda label: label))
    runner, rounds = train(cfg)
    state = al_patch.State(al_patch.read_state(osp.join(cfg.work_dir, 'al_state.json')), cfg.work_dir,
                           al_patch.parse_settings(cfg.al), runner, Pool(runner.cfg))
    for name in state.labelled():
        path = osp.join(cfg.train_dataloader.dataset.data_root, 'ann/train', f'{name}.png')
        file = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        truth = (file[..., 0] if file.ndim > 2 else file) // (100 if write else 1)
        assert np.array_equal(state.load_label(name), truth)
        for shown in seen_in_training(name):
            masks = [state.mask(name, k) for k in range(len(rounds)) if name in state.labelled(k)]
            assert (shown == VOID).all() or any(np.array_equal(shown, np.where(mask, truth, VOID)) for mask in masks)


def seen_in_training(name: str, part: str = 'labels') -> list:
    """Less what a query and the trials of steps have shown."""
    return [maps[0] for maps in Notes.seen[part].get(name, ()) if maps and maps[0].shape == tiny.SHAPE]


def transforms_of(*steps) -> list:
    return [TRANSFORMS.build(step) for step in steps]


@pytest.mark.parametrize('step, maps', [
    (dict(type='ThirdsToClasses'), True), (dict(type='StrictThirds'), True), (dict(type='RandomFlip', prob=1.), False),
    (dict(type='RandomFlip', prob=.5), False), (dict(type='Erodes'), False),
    (dict(type='Dilates'), False), (dict(type='Notes'), False),
    (dict(type='PhotoMetricDistortion'), False), (dict(type='Resize', scale=(64, 64)), False),
    (dict(type='RandomCrop', crop_size=(8, 8)), False), (dict(type='RandomRotate', prob=1., degree=90), False),
    (PACK, False)], ids=lambda value: value['type'] if isinstance(value, dict) else '')
def test_a_step_that_maps_values_is_known_by_what_it_does(config, step, maps):
    """Also on a label file that has one value, which the step leaves as it is; and no random number is used up."""
    cfg = config({}, [LABEL], lambda label: label * 0)
    pool = Pool(cfg)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    loading, mapping = label_steps(transforms_of(LOAD, LABEL, step), pool.info('a/00'))
    drawn = random.random(), np.random.rand(), float(torch.rand(1))
    assert [type(each).__name__ for each in loading] == ['LoadImageFromFile', 'LoadAnnotations']
    assert bool(mapping) == maps
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(1)))


@functools.partial(register, TRANSFORMS)
class LoadsBoth(MaskFromFile):
    """Image and label at once."""

    def transform(self, results):
        results['img'] = cv2.imread(results['img_path'])
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return super().transform({**results, 'seg_fields': []})


@pytest.mark.parametrize('steps', [
    [dict(type='LoadsBoth')], [dict(type='Compose', transforms=[LOAD, LABEL])],
    [dict(type='Compose', transforms=[dict(type='LoadsBoth'), dict(type='RandomFlip', prob=1., direction='vertical')])]
], ids=['both', 'nested', 'both nested'])
@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'region'])
def test_one_step_loads_image_and_label(config, train, unit, steps):
    """What is shown in training is what is labelled; the query shows such a step an empty label."""
    TRANSFORMS.register_module('Compose', force=True, module=mmengine.dataset.Compose)
    cfg = config(dict(unit=unit, initial=4, budget=2), [])
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline = [*steps, *[dict(type='Notes')] * (loader is cfg.train_dataloader), PACK]
    try:
        _, rounds = train(cfg)
    finally:
        TRANSFORMS.module_dict.pop('Compose')
    assert len(rounds) == 2
    shown = {name: [label for [label] in maps] for name, maps in Notes.seen['labels'].items()}
    assert {*shown} <= {name for entry in rounds for name in entry['asked']}
    if unit != 'image':
        for name, maps in shown.items():
            pixels = [sum((entry['asked'].get(name) or (0, 0))[1] for entry in rounds[:k]) for k in (1, 2)]
            seen = {int((label != VOID).sum()) for label in maps if label.shape == tiny.SHAPE}  # others are trials
            assert seen <= {*pixels, 0}


@functools.partial(register, TRANSFORMS)
class ForgetsToReturn(BaseTransform):

    def transform(self, results):
        results['img'] = results['img'][:, ::-1]


@functools.partial(register, TRANSFORMS)
class GivesUp(BaseTransform):
    """Now and then, as a crop without labels in it."""

    def transform(self, results):
        return results if np.random.rand() < .5 else None


@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'region'])
@pytest.mark.parametrize('steps, match', [
    ([dict(type='ForgetsToReturn'), PACK], 'ForgetsToReturn of the training pipeline should return what it'),
    ([dict(type='RandomCrop', crop_size=(8, 8), cat_max_ratio='x'), PACK], 'RandomCrop of the training pipeline: '),
    ([], 'the training pipeline should give `inputs`, .*, but gives img_path')], ids=['return', 'fails', 'pack'])
def test_a_step_of_the_training_pipeline_that_fails_is_named(config, train, unit, steps, match):
    cfg = config(dict(unit=unit, initial=4), [LABEL])
    cfg.train_dataloader.dataset.pipeline = [LOAD, LABEL, *steps]
    with pytest.raises(ValueError, match=match) as error:
        train(cfg)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('step, values', [
    (dict(type='RandomCutOut', prob=1., n_holes=2, cutout_shape=(6, 6), seg_fill_in=1), '1'),
    (dict(type='RandomRotFlip', rotate_prob=1., flip_prob=0.), '0'),  # it mixes neighbours
    (dict(type='RandomRotate', prob=1., degree=20, seg_pad_val=255), None),
    (dict(type='RandomCutOut', prob=1., n_holes=2, cutout_shape=(6, 6), seg_fill_in=255), None)])
def test_a_step_that_gives_labels_to_what_has_none(config, train, step, values):
    cfg = config(dict(unit=CELL, initial=6, budget=2), [LABEL], tested=[LABEL])
    cfg.train_dataloader.dataset.pipeline = [LOAD, LABEL, step, PACK]
    if values is None:
        assert len(train(cfg)[1]) == 2
        return
    with pytest.raises(ValueError, match=rf'^{step["type"]} of the training pipeline gives labels \({values}'):
        train(cfg)
    train(config(dict(rounds=0), [LABEL, step], tested=[LABEL],
                 work_dir=cfg.work_dir + '_image'))


def test_a_step_may_give_up_now_and_then(config, train):
    cfg = config(dict(unit=CELL, initial=6, budget=2), [LABEL], tested=[LABEL])
    cfg.train_dataloader.dataset.pipeline = [LOAD, LABEL, dict(type='GivesUp'), PACK]
    assert len(train(cfg)[1]) == 2


def test_every_map_that_is_loaded_is_hidden(config, train):
    cfg = config(dict(unit=CELL, initial=4, budget=2, rounds=0), [
        dict(type='TwoMaps'), dict(type='Notes', keys=('gt_seg_map', 'gt_parts'))])
    train(cfg)
    shown = [maps for each in Notes.seen['labels'].values() for maps in each if maps and maps[0].shape == tiny.SHAPE]
    assert shown and all(((label == VOID) == (parts == VOID)).all() and (label == VOID).any() for label, parts in shown)


@functools.partial(register, TRANSFORMS)
class PartsFromFile(BaseTransform):
    """A label map of its own, or what it makes of the one that is there."""

    def __init__(self, reads=True):
        self.reads = reads

    def transform(self, results):
        results['gt_parts'] = cv2.imread(results['seg_map_path'], 0) if self.reads else results['gt_seg_map'] // 2
        return results


@pytest.mark.parametrize('reads', [True, False])
def test_a_map_that_cannot_be_hidden_is_refused(config, train, reads):
    cfg = config(dict(unit=CELL, initial=4, rounds=0), [LABEL, dict(type='PartsFromFile', reads=reads)], tested=[LABEL])
    if not reads:
        train(cfg)
        return
    with pytest.raises(ValueError, match='^PartsFromFile of the training pipeline loads gt_parts from a file'):
        train(cfg)
    assert not [name for name in os.listdir(osp.join(cfg.work_dir, 'round_0')) if name.endswith('.pth')]


@functools.partial(register, TRANSFORMS)
class LabelAndDepth(MaskFromFile):
    """A map of real numbers that tells the label."""

    def transform(self, results):
        results = super().transform(results)
        results['gt_depth_map'] = results['gt_seg_map'] / 2.
        return results


def test_no_map_tells_what_is_hidden(config, train):
    """Two label files that differ where nothing is labelled give the same sample."""
    with pytest.raises(ValueError, match='^`gt_depth_map` of .*png should not depend on labels that nobody has asked'):
        train(config(dict(unit=CELL, initial=4, rounds=0), [dict(type='LabelAndDepth')]))
    train(config(dict(rounds=0), [dict(type='LabelAndDepth')], work_dir=config({}, []).work_dir + '_image'))


def test_a_pipeline_that_loads_no_label_says_so(config, train):
    with pytest.raises(ValueError, match='should load a label map, `gt_seg_map`, but loads none'):
        train(config({}, [], tested=[LABEL]))


# --- images and data sets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['list', 'dict', 'other'])
@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'region'])
def test_images_that_are_several_files(config, train, kind, unit):
    cfg = config(dict(unit=unit, rounds=1), [LABEL], **{
        'model.backbone.in_channels': 6 if kind != 'other' else 3,
        'model.data_preprocessor.mean': [128] * (6 if kind != 'other' else 3),
        'model.data_preprocessor.std': [64] * (6 if kind != 'other' else 3)})
    load = dict(type='LoadPair') if kind != 'other' else dict(type='LoadOther')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.update(type='Pairs', kind=kind)
        loader.dataset.pop('metainfo')
        loader.dataset.pipeline = [load, LABEL, PACK]
    _, rounds = train(cfg)
    assert len(rounds) == 2 and set(rounds[0]['asked']) < set(tiny.NAMES)


@functools.partial(register, TRANSFORMS)
class LoadOther(BaseTransform):

    def transform(self, results):
        return TRANSFORMS.build(LOAD)({**results, 'img_path': results['rgb_path']})


def parts_of(cfg, *pipelines) -> None:
    """The training set once for each of these pipelines."""
    leaf = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        dict(leaf, pipeline=[LOAD, *pipeline, PACK]) for pipeline in pipelines])


def test_a_part_without_labels_stays_whole(config, train):
    """That of a semi-supervised training: it is not in the pool, and needs no label."""
    cfg = config(dict(rounds=0), [LABEL])
    parts_of(cfg, [LABEL, dict(type='Notes')], [dict(type='NoLabels'), dict(type='Notes', part='images')])
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = cfg.default_hooks.checkpoint.interval = 30
    runner, rounds = train(cfg)
    assert set(Notes.seen['images']) == set(tiny.NAMES) and set(Notes.seen['labels']) == set(rounds[0]['asked'])
    assert len(Pool(runner.cfg)) == 12


@pytest.mark.parametrize('strategy', ['ripu', 'entropy'])
def test_a_source_that_is_labelled_beside_the_target(config, train, strategy):
    """Domain adaptation: budgets, counts and what is hidden are of the pool alone."""
    cfg = config(dict(unit=CELL, initial=4, budget=2, strategy=strategy, pool='dataset.datasets.1'), [LABEL])
    parts_of(cfg, [LABEL, dict(type='Notes', part='source')], [LABEL, dict(type='Notes', part='target')])
    leaf = cfg.train_dataloader.dataset.datasets
    leaf[0].data_prefix = dict(img_path='img/train/a', seg_map_path='ann/train/a')
    leaf[1].data_prefix = dict(img_path='img/train/b', seg_map_path='ann/train/b')
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = cfg.default_hooks.checkpoint.interval = 20
    runner, rounds = train(cfg)
    assert len(Pool(runner.cfg)) == 6 and {name for entry in rounds for name in entry['asked']} <= {
        name[2:] for name in tiny.NAMES if name[0] == 'b'}
    assert {name[0] for name in Notes.seen['source']} == {'a'} and {name[0] for name in Notes.seen['target']} == {'b'}
    shown = {part: sum((seen_in_training(name, part) for name in seen), []) for part, seen in Notes.seen.items()}
    assert all((label != VOID).all() for label in shown['source'])
    assert all((label == VOID).any() for label in shown['target'])


def test_a_pool_that_is_none_is_named(config, train):
    with pytest.raises(ValueError, match="`al.pool` should be the path in .* such as 'dataset', but got 'dataset.x'"):
        train(config(dict(pool='dataset.x'), [LABEL]))


@functools.partial(register, DATASETS)
class Fold4:
    """All but a fold, by an argument of its data set."""

    def __init__(self, source, fold=0):
        self.dataset = DATASETS.build({**source, 'indices': [i for i in range(12) if i % 4 != fold]})
        self.metainfo = self.dataset.metainfo

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i]


@functools.partial(register, DATASETS)
class ByItself(Fold4):
    """Builds a data set of its own."""

    def __init__(self, source, **kwargs):
        super().__init__(cfg_of_its_own, **kwargs)


@functools.partial(register, DATASETS)
class SourceAndTarget(Fold4):
    """Pairs of two data sets."""

    def __init__(self, source, target):
        self.source, self.target = DATASETS.build(source), DATASETS.build(target)
        self.metainfo = self.source.metainfo

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        self.target[i % len(self.target)]
        return self.source[i]


def test_a_wrapper_alters_what_its_data_set_is_built_with(config, train):
    """The pool is what it makes of it."""
    cfg = config(dict(initial=3, budget=3, rounds=2), [LABEL, dict(type='Notes')])
    cfg.train_dataloader.dataset = dict(type='Fold4', fold=1, source=cfg.train_dataloader.dataset.to_dict())
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = cfg.default_hooks.checkpoint.interval = 9
    _, rounds = train(cfg)
    asked = {name for entry in rounds for name in entry['asked']}
    assert asked == {name for i, name in enumerate(tiny.NAMES) if i % 4 != 1} == {*Notes.seen['labels']}


def test_a_source_and_a_target_under_names_of_their_own(config, train):
    cfg = config(dict(initial=3, rounds=1, pool='dataset.target'), [LABEL])
    leaf = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = dict(type='SourceAndTarget', **{
        part: dict(leaf, pipeline=[LOAD, LABEL, dict(type='Notes', part=part), PACK]) for part in ('source', 'target')})
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = cfg.default_hooks.checkpoint.interval = 20
    _, rounds = train(cfg)
    assert {*Notes.seen['source']} == {*tiny.NAMES}
    assert {*Notes.seen['target']} == {name for entry in rounds for name in entry['asked']}


def test_a_data_set_that_goes_past_the_filter_is_an_error(config, train):
    global cfg_of_its_own
    cfg = config({}, [LABEL])
    cfg_of_its_own = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = dict(type='ByItself', source=cfg_of_its_own)
    with pytest.raises(ValueError, match='ByItself should build .* as `train_dataloader.dataset.source`, but did not'):
        train(cfg)


@pytest.mark.parametrize('keeps', [True, False])
def test_a_wrapper_that_keeps_images_back_is_refused(config, train, keeps):
    cfg = config({}, [LABEL])
    cfg.train_dataloader.dataset = dict(type='KeepsBack', keeps=keeps, dataset=cfg.train_dataloader.dataset.to_dict())
    if keeps:
        with pytest.raises(ValueError, match="KeepsBack keeps back 3 of 12, such as 'a/00'"):
            train(cfg)
        assert not osp.exists(osp.join(cfg.work_dir, 'al_state.json'))
    else:
        assert len(train(cfg)[1]) == 2


# --- models ----------------------------------------------------------------------------------------------------------


@functools.partial(register, MODELS)
class TwoTasks(EncoderDecoder):

    def encode_decode(self, inputs, batch_img_metas):
        logits = super().encode_decode(inputs, batch_img_metas)
        return logits, logits.sigmoid()

    def predict(self, inputs, data_samples=None):
        metas = [sample.metainfo for sample in data_samples]
        return self.postprocess_result(self.inference(inputs, metas)[0], data_samples)


@functools.partial(register, MODELS)
class KeepsBackbone(EncoderDecoder):

    def train(self, mode=True):  # and it returns nothing
        super().train(mode)
        self.backbone.eval()


@functools.partial(register, MODELS)
class SumsOverRanks(EncoderDecoder):
    """Its forward waits for all processes."""

    def extract_feat(self, inputs):
        total = inputs.mean()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return [each + 0 * total for each in super().extract_feat(inputs)]


def test_several_outputs_are_refused_before_the_first_training(config, train):
    cfg = config({}, [LABEL], **{'model.type': 'TwoTasks'})
    with pytest.raises(ValueError, match=r'a query of .*a/00.png fails: TwoTasks.inference should return logits \(1, '):
        train(cfg)
    assert not osp.exists(osp.join(cfg.work_dir, 'al_state.json'))


@functools.partial(register, MODELS)
class Distills(BaseModel):
    """A student that learns from a teacher, whose loss needs no label."""

    def __init__(self, student, data_preprocessor=None):
        super().__init__()
        self.student, self.teacher = MODELS.build(student), MODELS.build(student)
        self.data_preprocessor = self.student.data_preprocessor

    def forward(self, inputs, data_samples=None, mode='tensor'):
        found = self.student(inputs, data_samples, mode)
        if mode == 'loss':
            with torch.no_grad():
                taught = self.teacher(inputs)
            found['loss_distill'] = (self.student(inputs) - taught).square().mean()
        return found


@pytest.mark.parametrize('al', [dict(strategy='entropy'), dict(strategy='coreset'), dict(unit=CELL, strategy='bald')],
                         ids=str)
def test_of_a_distillation_the_student_is_asked(config, train, al):
    cfg = config(dict(al, initial=6), [LABEL])
    cfg.model = dict(type='Distills', student=cfg.model.to_dict())
    assert len(train(cfg)[1]) == 2
    if al.get('unit'):
        assert 'loss_distill does not depend on labels' in tiny.log_of(osp.join(cfg.work_dir, 'round_0'))


def first_of_two(output) -> torch.Tensor:
    return output[0]


@pytest.mark.parametrize('al', [dict(strategy='coreset'), dict(strategy='bald'), dict(unit=CELL, strategy='entropy'),
                                dict(unit=CELL, strategy='crc', initial=20)], ids=str)
def test_logits_can_be_named(config, train, al):
    """The same choices as by a model that returns these alone."""
    asked = []
    for changes in ({'model.type': 'TwoTasks'}, {}):
        cfg = config(dict(al, **({'logits': 'test_projects:first_of_two'} if changes else {})), [LABEL], **changes)
        cfg.work_dir += str(len(asked))
        asked.append([entry['asked'] for entry in train(cfg)[1]])
    assert asked[0] == asked[1]


@functools.partial(register, MODELS)
class LogitsAmongOthers(EncoderDecoder):
    """A dict, in which one thing alone can be logits."""

    def encode_decode(self, inputs, batch_img_metas):
        return dict(depth=inputs[:, :1], logits=super().encode_decode(inputs, batch_img_metas), name='x')

    def whole_inference(self, inputs, batch_img_metas):
        return self.encode_decode(inputs, batch_img_metas)

    def predict(self, inputs, data_samples=None):
        metas = [sample.metainfo for sample in data_samples]
        return self.postprocess_result(self.inference(inputs, metas)['logits'], data_samples)


def test_logits_are_found_by_trial(config, train):
    assert len(train(config({}, [LABEL], **{'model.type': 'LogitsAmongOthers'}))[1]) == 2


@functools.partial(register, MODELS)
class ToDict(SegDataPreProcessor):

    def forward(self, data, training=False):
        data = super().forward(data, training)
        return dict(data, inputs=dict(rgb=data['inputs'], grey=data['inputs'].mean(1, keepdim=True)))


@functools.partial(register, MODELS)
class TakesDict(EncoderDecoder):

    def extract_feat(self, inputs):
        return super().extract_feat(inputs['rgb'] + inputs['grey'])

    def whole_inference(self, inputs, batch_img_metas):
        return self.encode_decode(inputs, batch_img_metas)


@pytest.mark.parametrize('al', [dict(strategy='coreset'), dict(strategy='bald'), dict(unit=CELL, strategy='entropy')])
def test_inputs_that_are_a_dict(config, train, al):
    cfg = config(al, [LABEL], **{'model.type': 'TakesDict', 'model.data_preprocessor.type': 'ToDict'})
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None  # mmseg's own prediction takes tensors
    cfg.default_hooks.checkpoint.save_best = None
    assert len(train(cfg)[1]) == 2


@functools.partial(register, MODELS)
class OnlyAdapters(tiny.TinyBackbone):
    """It saves what it learns, and has the rest from a file."""

    def __init__(self, init_cfg):
        super().__init__()
        self.init_cfg = init_cfg
        self.adapter = torch.nn.Conv2d(8, 8, 1)

    def forward(self, x):
        [x] = super().forward(x)
        return (x + self.adapter(x), )

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        for key in [key for key in state if {'stem', 'stage'} & {*key.split('.')}]:
            del state[key]
        return state


def test_adapters_are_resumed_in_a_query_with_what_is_frozen(config, train, tmp_path, monkeypatch):
    frozen = tiny.TinyBackbone()
    for weight in frozen.parameters():
        torch.nn.init.normal_(weight, std=.5)
    torch.save(frozen.state_dict(), tmp_path / 'frozen.pth')
    asked = []
    for stops in (False, True):
        cfg = config(dict(initial=3, budget=4), [LABEL], **{'model.backbone': dict(
            type='OnlyAdapters', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'frozen.pth')))})
        cfg.work_dir += f'_{stops}'
        if stops:
            with monkeypatch.context() as patch:
                patch.setattr(al_patch.Query, 'asked', lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    train(cfg)
            cfg.resume = True
        asked.append(train(cfg)[1][1]['asked'])
    assert asked[0] == asked[1]


@functools.partial(register, MODELS)
class LosesBackbone(EncoderDecoder):
    """Its checkpoints lack what nothing else brings back."""

    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if 'backbone' not in key}


def test_a_checkpoint_brings_the_model_back_or_is_refused(config, train):
    refused(config({}, [LABEL], **{'model.type': 'LosesBackbone'}), train,
            'a checkpoint of LosesBackbone should bring back the model .*: backbone.stem.weight, .* is neither in its')


@functools.partial(register, MODELS)
class Teaches(EncoderDecoder):
    """A teacher that follows with every call of its loss, by the number of calls."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.teacher, self.calls = torch.nn.Parameter(torch.zeros(3), requires_grad=False), 0

    def loss(self, inputs, data_samples):
        self.calls += 1
        self.teacher.data.add_(self.calls)
        return super().loss(inputs, data_samples)


@functools.partial(register, MODELS)
class StepsByItself(EncoderDecoder):
    """Trains in a way of its own, and has no losses to show."""

    def train_step(self, data, optim_wrapper):
        data = self.data_preprocessor(data, True)
        losses = EncoderDecoder.loss(self, data['inputs'], data['data_samples'])
        total, log_vars = self.parse_losses(losses)
        optim_wrapper.update_params(total)
        return log_vars

    def loss(self, inputs, data_samples):
        raise NotImplementedError


def test_a_step_of_the_models_own_is_left_alone(config, train):
    assert len(train(config(dict(initial=6), [LABEL], **{'model.type': 'StepsByItself'}))[1]) == 2


@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'region'])
def test_a_trial_of_losses_leaves_no_trace(config, train, unit):
    runner, _ = train(config(dict(unit=unit, initial=6, rounds=0), [LABEL], **{'model.type': 'Teaches'}))
    assert runner.model.calls == 2 and runner.model.teacher.tolist() == [3.] * 3


@functools.partial(register, MODELS)
class VoidIsDark(FCNHead):
    """A loss of its own, which takes void for class 0."""

    def loss(self, inputs, batch_data_samples, train_cfg):
        label = self._stack_batch_gt(batch_data_samples).squeeze(1)
        logits = torch.nn.functional.interpolate(self.forward(inputs), label.shape[1:])
        return dict(loss_own=torch.nn.functional.cross_entropy(logits, torch.where(label > 2, 0, label)))


def test_a_loss_that_takes_void_for_a_class_is_refused(config, train):
    cfg = config(dict(unit=CELL, initial=6), [LABEL], **{'model.decode_head.type': 'VoidIsDark'})
    with pytest.raises(ValueError, match='loss_own of VoidIsDark learns from pixels without a label'):
        train(cfg)


@functools.partial(register, MODELS)
class NoNumber(torch.nn.Module):
    loss_name = 'loss_none'

    def forward(self, pred, label, **kwargs):
        return pred.mean() * torch.nan


def test_a_loss_that_is_no_number_is_said(config, train):
    cfg = config(dict(initial=6), [LABEL], **{'model.decode_head.loss_decode': dict(type='NoNumber', _delete_=True)})
    with pytest.raises(ValueError, match='loss_none should be a finite number, but is nan on two training images'):
        train(cfg)


def test_a_loss_that_fails_is_said_before_the_first_iteration(config, train):
    auxiliary = dict(type='FCNHead', in_channels=8, channels=8, num_convs=1, num_classes=3, in_index=7)
    for unit in ('image', CELL):
        cfg = config(dict(unit=unit, initial=6), [LABEL], **{'model.auxiliary_head': auxiliary})
        cfg.work_dir += str(unit == 'image')
        with pytest.raises(ValueError, match='^the loss of 2 training images fails .IndexError: tuple index out of'):
            train(cfg)


def test_a_model_whose_train_returns_nothing(config, train):
    assert len(train(config({}, [LABEL], **{'model.type': 'KeepsBackbone'}))[1]) == 2


# --- the rehearsal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit, size, at_most', [('image', 7, 6), ('image', 6, None), (CELL, 13, 12)],
                         ids=['too large', 'fits', 'region'])
def test_a_batch_that_no_round_can_fill(make_cfg, train, unit, size, at_most):
    """Four images are labelled at first, and two more when round 1 begins."""
    cfg = make_cfg(dict(unit=unit, initial=4, budget=2, overrides={1: {
        'train_dataloader.batch_size': size, 'train_dataloader.drop_last': True}}), 'epochs')
    if at_most:
        refused(cfg, train, rf'^`al.overrides\[1\]`: `train_dataloader.batch_size` should be at most the {at_most} ')
    else:
        assert len(train(cfg)[1]) == 2


def refused(cfg, train, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        train(cfg)
    assert '\n' not in str(error.value) and not osp.exists(osp.join(cfg.work_dir, 'al_state.json'))


@functools.partial(register, MODELS)
class FailsInValidation(EncoderDecoder):

    def predict(self, inputs, data_samples=None):
        raise KeyError('thing')


@pytest.mark.parametrize('al, changes, match', [
    (dict(overrides={1: {'train_cfg.max_iter': 3}}), {}, r'the round of `al.overrides\[1\]` fails .*max_iter'),
    (dict(overrides={1: {'model.type': 'NoSuchModel'}}), {}, r'the round of `al.overrides\[1\]` fails .*NoSuchModel'),
    (dict(overrides={1: {'val_evaluator.type': 'NoSuchMetric'}}), {}, r'of `al.overrides\[1\]` fails .*NoSuchMetric'),
    (dict(overrides={1: {'optim_wrapper.optimizer.type': 'SDG'}}), {}, r'`al.overrides\[1\]`: `optim_wrapper` .*SDG'),
    ({}, {'model.type': 'FailsInValidation'}, "the validation of .*val/0.png fails .KeyError: 'thing'"),
    (dict(strategy='tiny:not_a_number'), {}, "the score of image 'a/00' is not finite"),
    (dict(strategy=dict(type='entropy', select='tiny:always_first')), {}, '`al.strategy.select` should choose')])
def test_what_would_fail_later_is_refused_before_anything(config, train, al, changes, match):
    refused(config(al, [LABEL], **changes), train, match)


@functools.partial(register, METRICS)
class NeedsMany(BaseMetric):
    """Of all images, and in words, too."""

    def process(self, data_batch, data_samples):
        self.results += [len(data_samples)]

    def compute_metrics(self, results):
        assert len(results) in (2, 4)
        return dict(mIoU=50., spread=statistics.stdev(results), note='well')


def test_metrics_of_many_images_and_in_words(config, train):
    cfg = config({}, [LABEL], val_evaluator=dict(type='NeedsMany', _delete_=True))
    cfg.val_dataloader = dict(cfg.val_dataloader.to_dict(), batch_size=1)
    assert [entry['metrics'] for entry in train(cfg)[1]] == [dict(mIoU=50., spread=0.)] * 2


@pytest.mark.parametrize('al, changes, match', [
    ({}, {'custom_hooks': [dict(type='EarlyStoppingHook', monitor='mDice', strict=True)]},
     '`custom_hooks.EarlyStoppingHook.monitor` should be one of aAcc'),
    ({}, {'param_scheduler': [dict(type='ReduceOnPlateauLR', monitor='mDice')]}, '`param_scheduler.monitor` should')])
def test_a_metric_that_is_waited_for_in_vain(config, train, al, changes, match):
    refused(config(al, [LABEL], **changes), train, match)


def test_checkpoints_of_every_scheduler_are_read(config, train):
    cfg = config({}, [LABEL], param_scheduler=[dict(type='OneCycleLR', eta_max=.1, total_steps=9, by_epoch=False)])
    assert len(train(cfg)[1]) == 2


class Thing:
    pass


@functools.partial(register, HOOKS)
class AddsThing(mmengine.hooks.Hook):

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['thing'] = Thing()


def test_a_checkpoint_that_cannot_be_read_is_refused_before_the_first_training(config, train):
    cfg = config({}, [LABEL], custom_hooks=[dict(type='AddsThing')])
    with pytest.raises(ValueError, match='a checkpoint of this run cannot be used .*holds test_projects.Thing'):
        train(cfg)
    assert not [name for _, _, names in os.walk(cfg.work_dir) for name in names if name.endswith('.pth')]


@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'region'])
@pytest.mark.parametrize('override, match', [
    ({'model.backbone.in_channels': 4}, 'to have 4 channels'),
    ({'model.decode_head.num_classes': 2}, 'out of bounds|index'),
    ({'val_evaluator': dict(type='IoUMetric', iou_metrics=['none'], _delete_=True)}, 'none'),
    ({'train_dataloader.dataset.pipeline': [LOAD, LABEL]}, 'fails')], ids=['channels', 'classes', 'metric', 'pipeline'])
def test_an_iteration_of_later_rounds_is_tried_before_the_first_training(config, train, unit, override, match):
    cfg = config(dict(unit=unit, initial=6, budget=2, rounds=2, overrides={2: override}), [LABEL])
    with pytest.raises(ValueError, match=r'^the round of `al.overrides\[2\]` fails|the validation of') as error:
        train(cfg)
    assert '\n' not in str(error.value) and re.search(match, str(error.value))
    assert not [name for name in os.listdir(cfg.work_dir) if name == 'round_1']
    assert not [name for _, _, names in os.walk(cfg.work_dir) for name in names if name.endswith('.pth')]


@pytest.mark.parametrize('unit', ['image', CELL], ids=['image', 'region'])
def test_of_test_time_augmentation_the_plain_view_is_scored(config, train, unit):
    """And the choice is that of a test pipeline without it."""
    asked = []
    for with_views in (True, False):
        cfg = config(dict(unit=unit, initial=3), [LABEL])
        cfg.work_dir += str(with_views)
        if with_views:
            cfg.test_dataloader = dict(cfg.test_dataloader.to_dict())
            cfg.test_dataloader.dataset.pipeline = [LOAD, dict(type='TestTimeAug', transforms=[
                [dict(type='Resize', scale_factor=ratio, keep_ratio=True) for ratio in (.5, 1., 2.)],
                [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (1., 0.)], [LABEL], [PACK]])]
        asked.append([entry['asked'] for entry in train(cfg)[1]])
    assert asked[0] == asked[1]


@pytest.mark.parametrize('al', [
    dict(strategy='bald', overrides={1: {'train_cfg.max_iters': 3}}),
    dict(unit=CELL, strategy='real', initial=4, overrides={1: {'train_dataloader.batch_size': 1}}),
    dict(unit=dict(type='superpixel', n_segments=12), strategy='coreset', initial=4),
    dict(unit='pixel', strategy='entropy', initial=40, budget=9)], ids=lambda al: str(al.get('unit')))
def test_nothing_of_it_stays(config, train, monkeypatch, al):
    """A run with and without it trains, scores and chooses bit for bit the same."""
    found = []
    rehearsals = {name: getattr(al_report, name) for name in (
        'rehearse', 'rehearse_rounds', 'rehearse_file', 'check_hidden')}
    for is_rehearsed in (True, False):
        for name, part in rehearsals.items():
            monkeypatch.setattr(al_report, name, part if is_rehearsed else lambda *args: None)
        cfg = config(al, [LABEL, dict(type='RandomFlip', prob=.5)])
        cfg.visualizer = dict(type='SegLocalVisualizer', alpha=.5, vis_backends=[dict(type='LocalVisBackend')])
        cfg.work_dir += f'_{len(found)}'
        runner, rounds = train(cfg)
        assert ('Rehearsed' in tiny.log_of(cfg.work_dir)) == (not found)
        found.append((runner.model.state_dict(), [(entry['asked'], entry['metrics']) for entry in rounds],
                      {name for name in os.listdir(cfg.work_dir) if not (name[0].isdigit() or name[-3:] == '.py')}))
    assert found[0][1:] == found[1][1:] and tiny.same(found[0][0], found[1][0])


def test_it_opens_no_label_that_was_not_asked_for(config, train, monkeypatch):
    opened, load = set(), mmengine.fileio.get
    for module in ('mmengine.fileio', 'mmcv.transforms.loading.fileio', 'mmseg.datasets.transforms.loading.fileio'):
        monkeypatch.setattr(f'{module}.get', lambda path, *args, **kwargs: opened.add(str(path)) or load(
            path, *args, **kwargs))
    _, rounds = train(config(dict(unit=CELL, strategy='coreset'), [LABEL]))
    labels = {path.split('ann/train/')[1][:-4] for path in opened if 'ann/train' in path}
    assert labels and labels <= {name for entry in rounds for name in entry['asked']}


def run_it(rank: int, processes: int, port: int, cfg) -> None:
    join(rank, processes, port, cfg)
    cfg.launcher = 'pytorch'
    al_patch.Runner.from_cfg(cfg).train()


def test_all_processes_take_part(config):
    cfg = config(dict(unit=CELL, strategy='entropy', initial=9, budget=4), [LABEL], **{'model.type': 'SumsOverRanks'})
    start(run_it, 2, cfg)
    with open(osp.join(cfg.work_dir, 'al_state.json')) as file:
        assert len(json.load(file)['rounds']) == 2
    assert 'Rehearsed a query of 2 images, a checkpoint, a validation of one in ' in tiny.log_of(cfg.work_dir)


def test_an_image_is_known_by_its_first_path():
    for info, path in [(dict(img_path='x'), 'x'), (dict(img_path=['x', 'y']), 'x'), (dict(img_path=dict(a='x')), 'x'),
                       (dict(img_path=None, rgb_path='x'), 'x'), (dict(sample_idx=3), '3')]:
        assert al_patch.image_path(info) == path
    assert issubclass(Pairs, BaseDataset)


# --- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit, past, text', [
    ('image', 'pipeline', 'does not ask the pipeline'), ('image', 'filter', r'loads .*/b/11\.png'),
    (dict(type='region', size=[8, 8]), 'pipeline', 'does not ask the pipeline'),
    ('image', None, None), (dict(type='region', size=[8, 8]), None, None)], ids=str)
def test_a_way_to_items_goes_through_filter_and_pipeline_or_is_refused(make_cfg, train, unit, past, text):
    cfg = make_cfg(dict(unit=unit, initial=['a/00', 'a/01'] if unit == 'image' else 3, budget=1, rounds=1), changes={
        'train_dataloader.dataset.type': 'OwnItems', 'train_dataloader.dataset.past': past, **tiny.NO_VAL,
        'train_cfg.max_iters': 1})
    if text is None:
        assert len(train(cfg)[1]) == 2
        return
    with pytest.raises(ValueError, match=f'OwnItems.__getitem__ should load images .* {text}'):
        train(cfg)
    assert 'Iter(train)' not in tiny.log_of(cfg.work_dir)


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('key', [1, '1'])
def test_a_tuple_of_an_override_stays_a_tuple(make_cfg, train, key):
    """RandomCrop takes no list; the state file has no word for tuples, and a run goes on with them all the same."""
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='RandomCrop', crop_size=(16, 24)),
             dict(type='PackSegInputs')]
    al = dict(rounds=1, overrides={key: {'train_dataloader.dataset.pipeline': steps}})
    cfg = make_cfg(al, changes={**tiny.NO_VAL, 'train_cfg.max_iters': 1})
    assert len(train(cfg)[1]) == 2
    cfg.resume, cfg.al.rounds = True, 2
    assert len(train(cfg)[1]) == 3
