"""The pool: names, leaves under wrappers, filtering there and only there, and no labels."""
import copy
import io
import json
import pathlib
import struct
import zlib

import cv2
import mmcv
import numpy as np
import pytest
import tiny
from mmengine.runner import Runner
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

import al_label
import al_patch
import al_report
from al_patch import Pool, leaf_configs, query_steps, write_atomically


@pytest.fixture
def leaf(make_cfg):
    """A function that returns the training set's config with some keys changed, e.g. one folder of the two."""

    def leaf_cfg(folder='', **changes) -> dict:
        cfg = make_cfg().train_dataloader.dataset.to_dict()
        cfg['data_prefix'] = {key: f'{path}/{folder}' for key, path in cfg['data_prefix'].items()}
        return {**cfg, **changes}

    return leaf_cfg


@pytest.fixture
def filtered(tmp_path):
    """A function that builds a data set's dataloader where these names are labelled."""

    def build(dataset: dict, names: list) -> object:
        path = tmp_path / 'al_state.json'
        write_atomically(str(path), json.dumps(tiny.saved([dict.fromkeys(names)])))
        return Runner.build_dataloader(dict(
            batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset,
            al=dict(state=str(path), round=0)))

    return build


def shown(dataset) -> list:
    """The names of what a data set gives, item by item."""
    paths = [dataset[i]['data_samples'].img_path for i in range(len(dataset))]
    return [path.split('img/train/')[1].removesuffix('.png') for path in paths]


def pool_of(make_cfg, dataset: dict) -> Pool:
    cfg = make_cfg()
    cfg.train_dataloader.dataset = dataset
    return Pool(cfg)


def test_names_are_as_split_files_spell_them(make_cfg, leaf, tmp_path):
    assert pool_of(make_cfg, leaf()).names == tiny.NAMES
    assert pool_of(make_cfg, leaf('b')).names == [name[2:] for name in tiny.NAMES[6:]]
    split = tmp_path / 'split.txt'
    split.write_text('b/07\na/03\n')
    assert pool_of(make_cfg, leaf(ann_file=str(split))).names == ['b/07', 'a/03']


@pytest.mark.parametrize('prefix, suffix, path, name', [
    ('/d/img', '.jpg', '/d/img/x.jpg', 'x'), ('/d/img/', '_img.png', '/d/img/aachen/a_0_img.png', 'aachen/a_0'),
    ('', '.jpg', '/d/img/x.jpg', 'x'), (None, None, '/d/x.tar.gz', 'x.tar'), ('/d', '.png', '/d/v1.2/x.png', 'v1.2/x')])
def test_image_name(prefix, suffix, path, name):
    dataset = type('', (), dict(data_prefix=dict(img_path=prefix), img_suffix=suffix))
    assert al_patch.image_name(dataset, dict(img_path=path)) == name


def test_own_indices_and_repeated_leaves(make_cfg, leaf):
    assert pool_of(make_cfg, leaf(indices=[7, 2])).names == [tiny.NAMES[7], tiny.NAMES[2]]
    assert pool_of(make_cfg, leaf(indices=3)).names == tiny.NAMES[:3]
    pool = pool_of(make_cfg, dict(type='ConcatDataset', datasets=[leaf(indices=3), leaf()]))
    assert pool.names == tiny.NAMES and len(pool) == 12


def test_two_images_of_one_name_are_refused(make_cfg, leaf, tmp_path):
    other = leaf(data_root=tiny.make_data(str(tmp_path / 'other')))
    with pytest.raises(ValueError, match="image names should be unique, but .*a/00.png and .*a/00.png are both 'a/00'"):
        pool_of(make_cfg, dict(type='ConcatDataset', datasets=[leaf(), other]))


def test_no_images_are_refused(make_cfg, leaf):
    with pytest.raises(ValueError, match='the training set has no images.*check `train_dataloader.dataset`'):
        pool_of(make_cfg, leaf(img_suffix='.jpg'))


def test_data_set_objects_are_refused(leaf):
    with pytest.raises(ValueError, match='should be a config dict down to its leaves, but got a BaseSegDataset object'):
        leaf_configs(dict(type='RepeatDataset', times=2, dataset=DATASETS.build(leaf())))


def test_images_are_read_by_name_or_position_without_labels(make_cfg, leaf):
    pool = pool_of(make_cfg, dict(type='ConcatDataset', datasets=[leaf(indices=3), leaf(seg_map_suffix='.gone')]))
    assert shown(pool) == tiny.NAMES and pool.pixels == 12 * 32 * 48
    assert all('gt_sem_seg' not in pool[i]['data_samples'] for i in range(12))
    assert pool['b/10']['data_samples'].img_path == pool[10]['data_samples'].img_path
    assert pool['b/10']['inputs'].shape == (3, 32, 48) and pool.load_image('b/10').shape == (32, 48, 3)
    assert pool.info('b/10')['seg_map_path'].endswith('b/10.gone')


def test_the_query_pipeline_is_the_test_pipeline_without_label_loaders(make_cfg):
    cfg = make_cfg()
    info = Pool(cfg).info('a/00')
    assert names_of(query_steps(cfg, info)) == ['LoadImageFromFile', 'PackSegInputs']
    assert len(cfg.test_dataloader.dataset.pipeline) == 3  # the config keeps its own
    steps = [dict(type=name) for name in ('LoadImageFromFile', 'mmseg.LoadAnnotations', 'LoadDepthAnnotation',
                                          'LoadBiomedicalAnnotation', 'PackSegInputs')]
    assert names_of(query_steps(dict(test_pipeline=steps), info)) == ['LoadImageFromFile', 'PackSegInputs']
    with pytest.raises(ValueError, match='has no `test_dataloader`, `val_dataloader` or `test_pipeline`'):
        query_steps({}, info)
    with pytest.raises(ValueError, match='a/00.png cannot be used .*should give `inputs`, but gives '):
        query_steps(dict(test_pipeline=steps[:1]), info)


def names_of(steps: list) -> list[str]:
    return [type(step).__name__ for step in steps]


def test_a_leaf_keeps_what_is_labelled_in_its_own_order(filtered, leaf):
    loader = filtered(leaf(), ['b/08', 'a/02', 'elsewhere'])
    assert shown(loader.dataset) == ['a/02', 'b/08'] and len(loader) == 2
    assert 'gt_sem_seg' in loader.dataset[0]['data_samples']
    assert shown(filtered(leaf(indices=[8, 1, 2]), ['b/08', 'a/02', 'a/03']).dataset) == ['b/08', 'a/02']
    assert shown(filtered(leaf(lazy_init=True), ['a/02']).dataset) == ['a/02']


def test_wrappers_filter_at_their_leaves(filtered, leaf):
    nested = dict(type='MultiImageMixDataset', pipeline=[], dataset=dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[leaf(indices=6), dict(
            type='ConcatDataset', datasets=[leaf(indices=range(6, 9)), leaf(indices=range(9, 12))])])))
    loader = filtered(nested, ['a/03', 'b/10', 'a/01'])  # nothing of the second leaf
    assert shown(loader.dataset) == ['a/01', 'a/03', 'b/10'] * 2
    twice = leaf(indices=6)  # one config in two places
    assert shown(filtered(dict(type='ConcatDataset', datasets=[twice, twice]), ['a/03']).dataset) == ['a/03'] * 2


def test_class_balance_is_computed_over_what_is_labelled(filtered, leaf, monkeypatch):
    asked = []

    def get_cat_ids(self, index):
        asked.append(tiny.NAMES.index(al_patch.image_name(self, self.get_data_info(index))))
        return [asked[-1] % 2]

    monkeypatch.setattr('mmseg.datasets.BaseSegDataset.get_cat_ids', get_cat_ids, raising=False)
    dataset = dict(type='ClassBalancedDataset', oversample_thr=.5, dataset=leaf())
    names = [tiny.NAMES[i] for i in (0, 2, 4, 5)]  # class 1 is in 1 of 4: repeated by sqrt(.5 / .25), rounded up
    assert shown(filtered(dataset, names).dataset) == [*names, names[3]]
    assert set(asked) == {0, 2, 4, 5}


def test_only_the_dataloader_with_the_key_is_filtered(filtered, leaf):
    loader = filtered(leaf(), ['a/02'])
    assert len(DATASETS.build(leaf())) == 12
    with pytest.raises(KeyError):
        filtered(leaf(type='NoSuchDataset'), ['a/02'])
    assert len(DATASETS.build(leaf())) == 12 and len(loader.dataset) == 1


def test_the_dataloaders_config_is_left_as_it_was(leaf, filtered):
    nested = dict(type='RepeatDataset', times=2, dataset=leaf())
    before = copy.deepcopy(nested)
    filtered(nested, ['a/02'])
    assert nested == before
    cfg = dict(dataset=nested, al=dict(state='x', round=0))
    with pytest.raises(FileNotFoundError):
        Runner.build_dataloader(cfg)
    assert cfg == dict(dataset=before, al=dict(state='x', round=0))


def test_training_and_validation_sets_of_a_round(make_state):
    state = make_state({}, [['b/09', 'a/01']])
    trainer = al_patch.build_round(state)
    assert shown(trainer.build_dataloader(trainer._train_dataloader).dataset) == ['a/01', 'b/09']
    assert len(trainer.build_dataloader(trainer._val_dataloader).dataset) == 4
    al_patch.close_round(trainer)


def test_a_wrapper_may_add_arguments_to_its_leaf(filtered, leaf, monkeypatch):
    class Fold(DATASETS.get('RepeatDataset')):
        """Hands a part of its config on, as those do that make folds."""

        def __init__(self, dataset, **kwargs):
            super().__init__(dict(dataset, indices=[1, 2, 3]), **kwargs)

    monkeypatch.setitem(DATASETS.module_dict, 'Fold', Fold)
    loader = filtered(dict(type='Fold', times=1, dataset=leaf()), ['a/03', 'a/05'])
    assert shown(loader.dataset) == ['a/03']


@pytest.mark.parametrize('wrapper', [{}, dict(type='RepeatDataset', times=2)], ids=['leaf', 'wrapped'])
def test_a_data_set_that_reads_everything_again_is_an_error(filtered, leaf, monkeypatch, wrapper):
    """A class whose own `full_init` ignores that it has been called would train on every label."""

    class OwnInit(DATASETS.get('BaseSegDataset')):

        def full_init(self):
            self.data_list, self._fully_initialized, self.serialize_data = self.load_data_list(), True, False

    monkeypatch.setitem(DATASETS.module_dict, 'OwnInit', OwnInit)
    dataset = leaf(type='OwnInit')
    with pytest.raises(ValueError, match='OwnInit.full_init should do nothing the second time'):
        filtered({**wrapper, 'dataset': dataset} if wrapper else dataset, ['a/02'])


def test_images_are_seen_through_the_labels_they_have(shared_data):
    """The tiny data set is what it says: brightness follows the label."""
    import cv2
    image, label = (cv2.imread(f'{shared_data}/{kind}/train/a/00.png', cv2.IMREAD_UNCHANGED) for kind in ('img', 'ann'))
    assert image.shape == (*tiny.SHAPE, 3) and label.shape == tiny.SHAPE and set(np.unique(label)) <= {0, 1, 2}
    means = [image[label == c].mean() for c in np.unique(label)]
    assert means == sorted(means)


@pytest.mark.parametrize('void', [-1, 255, 65535])
def test_what_people_call_void_is_void_whatever_its_value(make_cfg, void):
    """Also one that 8 bits do not hold."""
    cfg = make_cfg({})
    cfg.model.decode_head.ignore_index = void
    pool, is_void = Pool(cfg), np.eye(*tiny.SHAPE, dtype=bool)
    label = al_label.load_label(pool, 'a/01', pool.info('a/01')['seg_map_path'], is_void)
    assert (label[is_void] == void).all() and (label[~is_void] == pool.load_label('a/01')[~is_void]).all()
# --- sizes -----------------------------------------------------------------------------------------------------------


def turned(kind: str, orientation: int, at_the_end: bool = False) -> bytes:
    """An image file, (20, 30) as stored, that a tag tells to turn; in a PNG perhaps after the pixels."""
    tags, file = Image.Exif(), io.BytesIO()
    tags[0x112] = orientation
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file, kind, **({} if at_the_end else dict(exif=tags)))
    data, content = file.getvalue(), tags.tobytes().removeprefix(b'Exif\0\0')
    chunk = struct.pack('>I', len(content)) + b'eXIf' + content + struct.pack('>I', zlib.crc32(b'eXIf' + content))
    return data[:-12] + chunk + data[-12:] if at_the_end else data


@pytest.mark.parametrize('loader', [{}, dict(imdecode_backend='pillow'), dict(color_type='unchanged'),
                                    dict(color_type='color_ignore_orientation')], ids=str)
@pytest.mark.parametrize('kind, orientation, at_the_end', [
    ('JPEG', 1, False), ('JPEG', 6, False), ('JPEG', 3, False), ('PNG', 1, False), ('PNG', 6, False), ('PNG', 6, True),
    ('WEBP', 6, False), ('TIFF', 6, False), ('BMP', 1, False), ('PPM', 1, False)])
def test_a_size_is_that_of_what_is_loaded(make_cfg, tmp_path, kind, orientation, at_the_end, loader):
    cfg, path = make_cfg(), tmp_path / 'img' / f'x.{kind.lower()}'
    path.parent.mkdir()
    path.write_bytes(turned(kind, orientation, at_the_end))
    cfg.train_dataloader.dataset.update(data_root=str(tmp_path), img_suffix=path.suffix,
                                        data_prefix=dict(img_path='img'))
    cfg.test_dataloader.dataset.pipeline[0].update(loader)
    expected = mmcv.imfrombytes(path.read_bytes(), loader.get('color_type', 'color'),
                                backend=loader.get('imdecode_backend', 'cv2')).shape[:2]
    pool = Pool(cfg)
    assert pool.sizes == {'x': expected} == {'x': al_report.size_of(pool, 'x')}


def test_plain_files_are_not_decoded_to_know_their_size(make_cfg, monkeypatch):
    cfg = make_cfg()
    pool = Pool(cfg)  # it has tried the pipeline on the first
    with monkeypatch.context() as patch:
        patch.setattr('mmcv.imfrombytes', None)
        assert {name: al_report.size_of(pool, name) for name in pool.names} == dict.fromkeys(tiny.NAMES, tiny.SHAPE)
    cfg.test_dataloader.dataset.pipeline[0].to_float32 = True  # nobody knows what else a loader's options do
    pool = Pool(cfg)
    monkeypatch.setattr('mmcv.imfrombytes', None)
    with pytest.raises(ValueError, match='a/00.png cannot be used'):
        al_report.size_of(pool, 'a/00')


def test_a_loader_of_the_users_own_decides(make_cfg, monkeypatch):
    class Loader(TRANSFORMS.get('LoadImageFromFile')):
        """Bears the stock one's name, and turns the image."""

        def transform(self, results):
            results = super().transform(results)
            return dict(results, img=np.rot90(results['img']))

    Loader.__name__ = 'LoadImageFromFile'
    monkeypatch.setitem(TRANSFORMS.module_dict, 'Turning', Loader)
    cfg = make_cfg()
    cfg.test_dataloader.dataset.pipeline[0].type = 'Turning'
    assert set(Pool(cfg).sizes.values()) == {tiny.SHAPE[::-1]} == {al_report.size_of(Pool(cfg), 'a/00')}


def test_sizes_are_remembered_while_a_file_has_as_many_bytes(make_cfg, make_state, tmp_path, monkeypatch):
    root = tiny.make_data(str(tmp_path / 'data'))
    state, looked = make_state(root=root, changes={'test_dataloader.batch_size': 1}), []
    path = pathlib.Path(state.work_dir, 'sizes.json')
    al_report.check_pool(state)
    path.write_text(json.dumps(state.seen_files))
    real = al_report.size_of
    monkeypatch.setattr(al_report, 'size_of', lambda pool, name: looked.append(name) or real(pool, name))
    al_report.check_pool(state)
    assert not looked and state.pool.sizes == dict.fromkeys(tiny.NAMES, tiny.SHAPE)
    cv2.imwrite(f'{root}/img/train/b/07.png', np.zeros((8, 9, 3), np.uint8))
    al_report.check_pool(state)
    assert looked == ['b/07'] and state.pool.sizes['b/07'] == (8, 9)
    del looked[:]
    state.pool.leaves[0].pipeline.transforms[0].color_type = 'grayscale'  # another loader may turn images
    al_report.check_pool(state)
    assert looked == tiny.NAMES
    for damaged in ('', '{', '[]', 'null'):
        path.write_text(damaged)
        al_report.check_pool(state)
        assert state.pool.sizes['b/07'] == (8, 9)
