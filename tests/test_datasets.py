"""Every data set class and loader of mmseg on a few files: names, the index filter, images and labels."""
import inspect
import os
import os.path as osp
import types

import cv2
import mmengine
import mmseg.datasets  # noqa: F401  registers them
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.runner import Runner
from mmseg.registry import DATASETS

import al_patch

SHIPPED = {name: cls for name, cls in DATASETS.module_dict.items() if cls.__module__.startswith('mmseg.')}
WRAPPERS = {'MultiImageMixDataset'}
DEPTH = {'NYUDataset'}
CHANGES = {'BaseCDDataset', 'LEVIRCDDataset'}
NAMES = ['one/0', 'one/1', 'two/2', 'two/3']
MIXED = dict(type='RandomMosaic', prob=1., img_scale=tiny.SHAPE)


def write(path: str, array: np.ndarray) -> str:
    os.makedirs(osp.dirname(path), exist_ok=True)
    if path.endswith('.npy'):
        np.save(path, array)
    else:
        cv2.imwrite(path, array)
    return path


class Gdal:
    """What mmseg asks of gdal, by OpenCV: gdal is a system library."""

    @staticmethod
    def Open(path: str):
        array = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        return None if array is None else types.SimpleNamespace(ReadAsArray=lambda: array.transpose(2, 0, 1))


@pytest.fixture
def gdal(monkeypatch):
    monkeypatch.setattr('mmseg.datasets.transforms.loading.gdal', Gdal)


@pytest.fixture
def dsdl(monkeypatch):
    """A stand-in for the package dsdl, which is only a description of where files are."""

    def describe(dsdl_yaml, **kwargs):
        field = types.SimpleNamespace
        items = [{'Image': [field(location=f'{name}.jpg')], 'LabelMap': [field(location=f'{name}.png')]}
                 for name in mmengine.list_from_file(dsdl_yaml)]
        return type('Items', (list, ), dict(class_names=['a', 'b', 'c', 'd', 'e']))(items)

    monkeypatch.setattr('mmseg.datasets.dsdl.DSDLDataset', describe)


def make_shipped(name: str, root: str) -> tuple[dict, list]:
    """Config of a data set class on files of its own naming, and its image names. The label of image i is i + 1."""
    cls = SHIPPED[name]
    takes = {key: parameter.default for base in reversed(cls.__mro__) if '__init__' in vars(base)
             for key, parameter in inspect.signature(base.__init__).parameters.items()}
    suffix, ann_suffix = takes['img_suffix'], takes.get('depth_map_suffix', takes['seg_map_suffix'])
    if name == 'REFUGEDataset':  # fixed in its own __init__
        suffix = '.png'
    prefix = {key: {'img_path': 'img', 'img_path2': 'later'}.get(key, 'ann') for key in takes['data_prefix']}
    for i, image in enumerate(NAMES):
        pixels = np.full((*tiny.SHAPE, 3), 40 * i, np.uint8)
        for key, folder in prefix.items():
            is_image = key.startswith('img')
            path = f'{root}/{folder}/{image}{suffix if is_image else ann_suffix}'
            write(path, pixels + 5 * (key == 'img_path2') if is_image else np.full(tiny.SHAPE, i + 1, np.uint8))
    cfg = dict(type=name, data_root=root, data_prefix=prefix)
    if not cls.METAINFO and name not in ('DSDLSegDataset', 'DecathlonDataset'):
        cfg['metainfo'] = dict(classes=list('abcdef'))
    split = f'{root}/split.txt'
    mmengine.put_text('\n'.join(NAMES), split)
    if name in ('PascalVOCDataset', 'DSDLSegDataset'):
        cfg['ann_file'] = 'split.txt'
    if name == 'DecathlonDataset':
        items = [dict(image=f'./img/{image}{suffix}', label=f'./ann/{image}{ann_suffix}') for image in NAMES]
        mmengine.dump(dict(training=items, test=[], labels={str(i): c for i, c in enumerate('abcdef')}),
                      f'{root}/dataset.json')
        return dict(type=name, data_root=root, ann_file='dataset.json'), [f'img/{image}' for image in NAMES]
    return cfg, NAMES


def pipeline_of(name: str) -> list:
    load = [dict(type='LoadImageFromFile')]
    if name in CHANGES:
        load = [dict(type='LoadMultipleRSImageFromFile'), dict(type='ConcatCDInput')]
    if name == 'HSIDrive20Dataset':  # the maintained fork's
        load = [dict(type='LoadImageFromNpyFile')]
    labels = dict(type='LoadDepthAnnotation' if name in DEPTH else 'LoadAnnotations')
    return [load[0], labels, *load[1:], dict(type='PackSegInputs')]


@pytest.fixture
def filtered(tmp_path):
    """A function that builds a data set where these names are labelled."""

    def build(dataset: dict, names: list):
        path = tmp_path / 'al_state.json'
        mmengine.dump(tiny.saved([dict.fromkeys(names)]), str(path))
        return Runner.build_dataloader(dict(
            batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset,
            al=dict(state=str(path), round=0))).dataset

    return build


def test_these_are_all():
    assert len(SHIPPED) >= 29  # the maintained fork has more
    assert all(issubclass(cls, BaseDataset) for name, cls in SHIPPED.items() if name not in WRAPPERS)


@pytest.mark.parametrize('name', sorted(set(SHIPPED) - WRAPPERS))
def test_every_data_set_class(filtered, tmp_path, gdal, dsdl, name):
    cfg, names = make_shipped(name, str(tmp_path / 'data'))
    cfg['pipeline'] = pipeline_of(name)
    pool = al_patch.Pool(dict(train_dataloader=dict(dataset=cfg), test_pipeline=cfg['pipeline']))
    assert pool.names == names and pool.sizes[names[3]] == tiny.SHAPE
    assert pool.load_image(names[2]).max() == 80
    dataset = filtered(cfg, [names[3], names[1]])
    assert len(dataset) == 2
    for sample, i in zip(dataset, (1, 3)):
        assert sample['inputs'].float().min() == 40 * i and len(sample['inputs']) == (6 if name in CHANGES else 3)
        if name in DEPTH:
            assert (sample['data_samples'].gt_depth_map.data == i + 1).all()
            continue
        expected = i + 1 - bool(dataset.reduce_zero_label)
        assert (sample['data_samples'].gt_sem_seg.data == expected).all()
        assert (pool.load_label(names[i]) == expected).all()
        if len(dataset.metainfo['classes']) > 4:
            assert pool.check_label(names[i], len(dataset.metainfo['classes'])).shape == tiny.SHAPE


# --- shapes of a training set's config -------------------------------------------------------------------------------

LABELLED = ['a/01', 'a/03', 'b/08', 'b/10']


@DATASETS.register_module()
class OneFolder(SHIPPED['BaseSegDataset']):
    """Leaves out, by mmengine's `filter_cfg`, all but one folder."""

    def filter_data(self) -> list:
        return [info for info in self.data_list if f'/{self.filter_cfg["folder"]}/' in info['img_path']]


@DATASETS.register_module()
class WithoutIndices(SHIPPED['BaseSegDataset']):
    """Knows few of its parent's parameters."""

    def __init__(self, data_root: str, data_prefix: dict, pipeline: list, img_suffix: str, seg_map_suffix: str):
        super().__init__(data_root=data_root, data_prefix=data_prefix, pipeline=pipeline, img_suffix=img_suffix,
                         seg_map_suffix=seg_map_suffix)


@DATASETS.register_module()
class Fold(ConcatDataset):
    """A wrapper that adds arguments to its leaf's config: two thirds of its images."""

    def __init__(self, dataset: dict, fold: int):
        super().__init__([DATASETS.build({**dataset, 'indices': [i for i in range(12) if i % 3 != fold]})])


def balanced(leaf: dict) -> dict:
    return dict(type='ClassBalancedDataset', oversample_thr=.5, dataset=leaf)


def mixed(leaf: dict) -> dict:
    return dict(type='MultiImageMixDataset', pipeline=[], dataset=leaf)


SHAPES = {  # what a shape makes of the leaf's config, and the labelled images that are in it, in its order
    'a leaf': (lambda leaf: leaf, LABELLED),
    'indices=4': (lambda leaf: dict(leaf, indices=4), ['a/01', 'a/03']),
    'indices=-3': (lambda leaf: dict(leaf, indices=-3), ['b/10']),
    'indices, a list': (lambda leaf: dict(leaf, indices=[10, 2, 1]), ['b/10', 'a/01']),
    'filter_cfg': (lambda leaf: dict(leaf, type='OneFolder', filter_cfg=dict(folder='b')), ['b/08', 'b/10']),
    'lazy leaf': (lambda leaf: dict(leaf, lazy_init=True), LABELLED),
    'lazy wrappers': (lambda leaf: dict(type='ConcatDataset', lazy_init=True, datasets=[
        dict(type='RepeatDataset', times=2, dataset=dict(leaf, lazy_init=True), lazy_init=True)]), LABELLED * 2),
    'serialize_data=False': (lambda leaf: dict(leaf, serialize_data=False), LABELLED),
    'no parameter indices': (lambda leaf: dict(leaf, type='WithoutIndices'), LABELLED),
    'RepeatDataset': (lambda leaf: dict(type='RepeatDataset', times=3, dataset=leaf), LABELLED * 3),
    'ConcatDataset': (lambda leaf: dict(type='ConcatDataset', datasets=[
        dict(leaf, indices=[4, 5]), dict(leaf, indices=-3), dict(leaf, indices=4)]), ['b/10', 'a/01', 'a/03']),
    # class 1 is in one image of four: it is repeated sqrt(.5 / .25) times, rounded up
    'ClassBalancedDataset': (balanced, ['a/01', 'a/03', 'b/08', 'b/08', 'b/10']),
    'MultiImageMixDataset': (mixed, LABELLED),
    'one image in two leaves': (lambda leaf: dict(type='ConcatDataset', datasets=[
        dict(leaf, indices=4), dict(leaf, indices=[10, 3])]), ['a/01', 'a/03', 'b/10', 'a/03']),
    'one dict twice': (lambda leaf: dict(type='ConcatDataset', datasets=[leaf] * 2), LABELLED * 2),
    'a class as type': (lambda leaf: dict(leaf, type=SHIPPED['BaseSegDataset']), LABELLED),
    '_scope_': (lambda leaf: dict(leaf, _scope_='mmseg'), LABELLED),
    'a scope in the name': (lambda leaf: dict(leaf, type='mmseg.BaseSegDataset'), LABELLED),
    'ConfigDict': (lambda leaf: ConfigDict(mixed(balanced(leaf))), ['a/01', 'a/03', 'b/08', 'b/08', 'b/10']),
    'Config': (lambda leaf: Config(dict(dataset=leaf)).dataset, LABELLED),
    'a wrapper that adds arguments': (lambda leaf: dict(type='Fold', fold=1, dataset=leaf), ['a/03', 'b/08'])}


@pytest.fixture
def leaf(make_cfg) -> dict:
    """The tiny training set's config."""
    return make_cfg().train_dataloader.dataset.to_dict()


@pytest.mark.parametrize('shape', SHAPES)
def test_every_shape_of_a_config(filtered, leaf, monkeypatch, shape):
    asked = []

    def get_cat_ids(self, i: int) -> list:
        asked.append(al_patch.image_name(self, self.get_data_info(i)))
        return [int(asked[-1] == 'b/08')]

    monkeypatch.setattr(SHIPPED['BaseSegDataset'], 'get_cat_ids', get_cat_ids, raising=False)
    del leaf['metainfo']
    make, expected = SHAPES[shape]
    dataset = filtered(make(leaf), [*LABELLED, 'elsewhere'])
    names = ['/'.join(sample['data_samples'].img_path.split('/')[-2:])[:-4] for sample in (
        dataset[i] for i in range(len(dataset)))]
    assert names == expected and set(asked) <= set(LABELLED)


@pytest.mark.parametrize('serialize', [False, True])
@pytest.mark.parametrize('wrap', [lambda leaf: leaf, lambda leaf: dict(type='RepeatDataset', times=2, dataset=leaf)])
def test_a_class_that_reads_all_of_it_anew_is_refused(filtered, leaf, monkeypatch, wrap, serialize):
    """mmengine calls `full_init` again, after the data set was filtered: it would train on every label."""

    class Anew(SHIPPED['BaseSegDataset']):

        def full_init(self):
            self.data_list, self.serialize_data, self._fully_initialized = self.load_data_list(), serialize, True
            if serialize:
                self.data_bytes, self.data_address = self._serialize_data()

    with pytest.raises(ValueError, match=r'^Anew.full_init should do nothing the second time, .* brought back images'):
        filtered(wrap(dict(leaf, type=Anew)), LABELLED)


def test_a_full_init_of_its_own_that_runs_once_is_filtered(filtered, leaf):

    class Once(SHIPPED['BaseSegDataset']):

        def full_init(self):
            if not self._fully_initialized:
                self.data_list, self.serialize_data, self._fully_initialized = self.load_data_list(), False, True

    assert len(filtered(dict(leaf, type=Once), LABELLED)) == 4


# --- runs ------------------------------------------------------------------------------------------------------------


def run(make_cfg, train, dataset, al=None, **changes) -> tuple:
    """A run of two rounds on a training set that differs from the tiny one in these keys, or is made from it."""
    cfg = make_cfg(al or {}, changes={**tiny.NO_VAL, 'train_cfg.max_iters': 1, **changes})
    old = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = dataset(old) if callable(dataset) else {**old, **dataset}
    return train(cfg)


def test_every_wrapper_nested(make_cfg, train, monkeypatch):
    """Nothing but what is labelled is loaded, also by an augmentation that mixes images."""
    loaded, load = [], BaseDataset.prepare_data

    def spy(self, i: int):
        if 'LoadAnnotations' in str(self.pipeline):
            loaded.append(al_patch.image_name(self, self.get_data_info(i)))
        return load(self, i)

    monkeypatch.setattr(BaseDataset, 'prepare_data', spy)
    monkeypatch.setattr(SHIPPED['BaseSegDataset'], 'get_cat_ids', lambda self, i: [i % 2], raising=False)

    def nested(leaf: dict) -> dict:
        leaf, pack = {**leaf, 'pipeline': leaf['pipeline'][:-1]}, leaf['pipeline'][-1]
        folders = [dict(leaf, data_prefix={key: f'{path}/{folder}' for key, path in leaf['data_prefix'].items()})
                   for folder in 'ab']
        balanced = dict(type='ClassBalancedDataset', oversample_thr=.9, dataset=folders[0])
        both = dict(type='ConcatDataset', datasets=[balanced, dict(type='RepeatDataset', times=2, dataset=folders[1])])
        mixed = dict(type='MultiImageMixDataset', pipeline=[MIXED], dataset=both)
        return dict(type='MultiImageMixDataset', pipeline=[dict(type='Resize', scale=tiny.SHAPE[::-1]), pack],
                    dataset=dict(type='RepeatDataset', times=3, dataset=mixed))

    for unit in ('image', 'region'):
        del loaded[:]
        al = dict(unit=unit, initial=['00', '03', '07', '10'], budget=2)
        _, rounds = run(make_cfg, train, nested, al, work_dir=make_cfg().work_dir + unit, **{'train_cfg.max_iters': 4})
        asked = set(rounds[1]['asked'])
        assert set(al['initial']) <= set(loaded) <= {*al['initial'], *asked} and asked & set(loaded)


@pytest.mark.parametrize('unit', ['image', dict(type='region', size=[8, 8])], ids=['image', 'region'])
def test_reduce_zero_label(make_cfg, train, unit):
    """Label 0 becomes void and the others one less, in training and in the count of void pixels."""
    names = tiny.NAMES[:2]
    _, rounds = run(make_cfg, train, dict(reduce_zero_label=True), dict(unit=unit, initial=names, budget=4))
    cfg = make_cfg()
    cfg.train_dataloader.dataset.reduce_zero_label = True
    pool = al_patch.Pool(cfg)
    root = cfg.train_dataloader.dataset.data_root
    old, new = (np.stack(each) for each in zip(*((cv2.imread(f'{root}/ann/train/{name}.png', 0), pool.load_label(name))
                                                for name in names)))
    assert (new == np.where(old == 0, 255, old.astype(int) - 1)).all()
    if unit != 'image':
        assert rounds[0]['void_pixels'] == (old == 0).sum() and rounds[1]['void_pixels'] == sum(
            (cv2.imread(f'{root}/ann/train/{name}.png', 0)[al_patch.read_mask(
                f'{cfg.work_dir}/round_1/labelled/{name}.png')] == 0).sum() for name in rounds[1]['asked'])


def test_an_ann_file_is_all_there_is(make_cfg, train, tmp_path):
    split = tmp_path / 'split.txt'
    split.write_text('\n'.join(tiny.NAMES[3:8]))
    _, rounds = run(make_cfg, train, dict(ann_file=str(split)), dict(initial=2, budget=3))
    assert {*rounds[0]['asked'], *rounds[1]['asked']} == set(tiny.NAMES[3:8])


def channels(n: int) -> dict:
    return {'model.data_preprocessor.mean': [100.], 'model.data_preprocessor.std': [50.],
            'model.backbone.in_channels': n}


@pytest.fixture
def shapes(monkeypatch):
    """Channels of what reached the network, in training and in the query, and the largest value."""
    seen, forward = [], tiny.TinyBackbone.forward
    monkeypatch.setattr(tiny.TinyBackbone, 'forward', lambda self, x: seen.append(
        (self.training, x.shape[1], float(x.max()))) or forward(self, x))
    return seen


def pictures(make_cfg) -> int:
    """How many pictures of images the first query has left."""
    return sum(len(files) for *_, files in os.walk(osp.join(make_cfg().work_dir, 'round_1', 'pictures')))


@pytest.mark.parametrize('unit', ['image', 'region'])
def test_two_images_of_a_change_detection_set(make_cfg, train, gdal, shapes, unit):
    load = [dict(type='LoadMultipleRSImageFromFile'), dict(type='LoadAnnotations'), dict(type='ConcatCDInput'),
            dict(type='PackSegInputs')]
    prefix = dict(img_path='img/train', img_path2='img/train', seg_map_path='ann/train')
    dataset = dict(type='BaseCDDataset', img_suffix2='.png', pipeline=load, data_prefix=prefix)
    al = dict(unit=unit, initial=tiny.NAMES[:4], visualize=2 * (unit == 'region'))
    _, rounds = run(make_cfg, train, dataset, al, **channels(6), **{'test_dataloader.dataset.pipeline': load})
    assert len(rounds) == 2 and {shape[:2] for shape in shapes} == {(True, 6), (False, 6)}
    assert pictures(make_cfg) in ((1, 2) if unit == 'region' else (0, ))  # the first may be one of those drawn always


LOADERS = dict(
    eight_bits=(np.uint8, 4, dict(type='LoadImageFromFile', color_type='unchanged')),
    sixteen_bits=(np.uint16, 4, dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='cv2')),
    sixteen_bits_float=(np.uint16, 4, dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True)),
    one_channel=(np.uint16, 1, dict(type='LoadImageFromFile', color_type='unchanged')),
    gdal=(np.uint16, 4, dict(type='LoadSingleRSImageFromFile')),
    array=(np.uint16, 4, dict(type='LoadImageFromNDArray')))


@DATASETS.register_module()
class Arrays(SHIPPED['BaseSegDataset']):
    """Images that are in memory."""

    def load_data_list(self) -> list:
        return [dict(info, img=cv2.imread(info['img_path'], cv2.IMREAD_UNCHANGED)) for info in super().load_data_list()]


@pytest.mark.parametrize('which, unit', [*zip(LOADERS, ['image', 'region', 'pixel'] * 2), ('sixteen_bits', 'image')])
def test_imagery_of_other_depths(make_cfg, train, gdal, shapes, shared_data, tmp_path, which, unit):
    dtype, n, load = LOADERS[which]
    if dtype == np.uint16 and not load.get('to_float32') and not hasattr(torch, 'uint16'):
        pytest.skip('torch < 2.3 has no 16-bit tensors: load with to_float32=True')
    scale = 1 if dtype == np.uint8 else 250
    for name in tiny.NAMES:
        image = cv2.imread(f'{shared_data}/img/train/{name}.png')[..., [0, 1, 2, 0][:n]].astype(dtype) * scale
        write(f'{tmp_path}/img/{name}.png', image.squeeze())
    pipeline = [load, dict(type='LoadAnnotations'), dict(type='RandomFlip', prob=.5), dict(type='PackSegInputs')]
    dataset = dict(data_root=None, pipeline=pipeline, type='Arrays' if which == 'array' else 'BaseSegDataset',
                   data_prefix=dict(img_path=str(tmp_path / 'img'), seg_map_path=f'{shared_data}/ann/train'))
    al = dict(unit=unit, initial=tiny.NAMES[:4], visualize=int(unit == 'region'))
    _, rounds = run(make_cfg, train, dataset, al, **channels(n), **{
        'test_dataloader.dataset.pipeline': [load, pipeline[-1]]})
    assert len(rounds) == 2 and {shape[:2] for shape in shapes} == {(True, n), (False, n)}
    assert max(shape[2] for shape in shapes) > (1000 if scale > 1 else 2)
    assert pictures(make_cfg) == (unit == 'region')


@pytest.mark.parametrize('load', [
    dict(type='LoadBiomedicalImageFromFile', decode_backend='numpy'),
    dict(type='LoadBiomedicalData', decode_backend='numpy')], ids=lambda load: load['type'])
def test_volumes_are_refused_before_training(make_cfg, train, tmp_path, load):
    """mmseg can load and augment them, but neither packs them nor has a network for them."""
    for name in tiny.NAMES:
        write(f'{tmp_path}/img/{name}.npy', np.zeros((2, 4, *tiny.SHAPE), np.float32))
        write(f'{tmp_path}/ann/{name}.npy', np.zeros((4, *tiny.SHAPE), np.float32))
    labels = dict(type='LoadBiomedicalAnnotation', decode_backend='numpy')
    dataset = dict(data_root=None, img_suffix='.npy', seg_map_suffix='.npy', pipeline=[load, labels],
                   data_prefix=dict(img_path=f'{tmp_path}/img', seg_map_path=f'{tmp_path}/ann'))
    for unit in ('image', 'region'):
        with pytest.raises(ValueError, match=r'should load images \(H, W\[, C\]\), but got \(\d, 4, 32, 48\)'):
            run(make_cfg, train, dataset, dict(unit=unit, initial=tiny.NAMES[:4]),
                **{'test_dataloader.dataset.pipeline': [load]})
    assert not osp.exists(osp.join(make_cfg().work_dir, 'round_0'))


def test_labels_of_another_kind_are_refused_before_training(make_cfg, train, tmp_path):
    cfg, _ = make_shipped('NYUDataset', str(tmp_path / 'data'))
    with pytest.raises(ValueError, match='should load a label map, `gt_seg_map`, but loads none'):
        run(make_cfg, train, lambda _: dict(cfg, pipeline=pipeline_of('NYUDataset')), dict(initial=2, budget=1))
