"""The pool: names, leaves under wrappers, filtering there and only there, and no labels."""
import copy
import json

import numpy as np
import pytest
import tiny
from mmengine.runner import Runner
from mmseg.registry import DATASETS

import al_patch
from al_patch import Pool, leaf_configs, query_pipeline, write_atomically


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
        path, settings = tmp_path / 'al_state.json', dict(oracle=dict(type='simulated'))
        state = dict(schema=2, seed=0, config={}, settings=settings)
        write_atomically(str(path), json.dumps(dict(state, rounds=[dict(asked=dict.fromkeys(names))])))
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
    assert [step['type'] for step in query_pipeline(cfg)] == ['LoadImageFromFile', 'PackSegInputs']
    assert len(cfg.test_dataloader.dataset.pipeline) == 3  # the config keeps its own
    steps = [dict(type=name) for name in ('mmseg.LoadAnnotations', 'LoadDepthAnnotation', 'LoadBiomedicalAnnotation',
                                          'Resize')]
    assert query_pipeline(dict(test_pipeline=steps)) == steps[3:]
    with pytest.raises(ValueError, match='has no `test_dataloader`, `val_dataloader` or `test_pipeline`'):
        query_pipeline({})


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
