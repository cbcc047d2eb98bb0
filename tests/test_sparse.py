"""Partly labelled images: masks, what training sees of them, and which losses can learn from them."""
import os.path as osp
import shutil
import types

import cv2
import mmcv.transforms
import numpy as np
import pytest
import tiny
import torch
from mmengine.runner import Runner
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image

import al_patch
from al_patch import SparseLabels, check_loss, keep_pixels, mask_path, read_mask, read_state, write_png

HALF = dict(type='Resize', scale_factor=.5)
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]


def labels_of(root, name: str) -> np.ndarray:
    return cv2.imread(f'{root}/ann/train/{name}.png', cv2.IMREAD_UNCHANGED)


def some_mask(share: float = .1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(tiny.SHAPE) < share


@pytest.fixture
def sparse(tmp_path, shared_data):
    """A function from masks by name to a dataloader of partly labelled images, e.g. with further steps."""

    def build(masks: dict, steps=(), wrap=lambda leaf: leaf, whole=(), workers=0, load=LOAD, **changes):
        work_dir = str(tmp_path / 'sparse')
        for name, mask in masks.items():
            write_png(mask_path(work_dir, 1, name), mask)
        rounds = [dict(asked=list(whole)), dict(asked={name: [1, int(mask.sum())] for name, mask in masks.items()})]
        al_patch.save_state(dict(schema=1, rounds=rounds), work_dir)
        leaf = dict(type='BaseSegDataset', data_root=shared_data, img_suffix='.png', seg_map_suffix='.png',
                    metainfo=dict(classes=('dark', 'grey', 'bright'), palette=[[0] * 3] * 3),
                    data_prefix=dict(img_path='img/train', seg_map_path='ann/train'),
                    pipeline=[*load, *steps, dict(type='PackSegInputs')], **changes)
        return Runner.build_dataloader(dict(
            batch_size=1, num_workers=workers, sampler=dict(type='DefaultSampler', shuffle=False), dataset=wrap(leaf),
            labelled=dict(state=osp.join(work_dir, al_patch.STATE_FILE), round=1)))

    return build


def shown(loader) -> dict:
    """Name -> label map, as a model gets them."""
    samples = [sample for batch in loader for sample in batch['data_samples']]
    return {'/'.join(s.img_path.split('/')[-2:])[:-4]: s.gt_sem_seg.data[0].numpy() for s in samples}


# --- masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_is_an_image_of_one_bit(tmp_path):
    path, mask = mask_path(str(tmp_path), 3, 'a/x.y'), some_mask(.5)
    write_png(path, mask)
    assert path == str(tmp_path / 'round_3' / 'labelled' / 'a' / 'x.y.png')
    with Image.open(path) as image:
        assert image.mode == '1' and image.size == (48, 32)
    assert [*(tmp_path / 'round_3' / 'labelled' / 'a').iterdir()] == [tmp_path / 'round_3/labelled/a/x.y.png']
    assert np.array_equal(read_mask(path), mask) and read_mask(path).dtype == bool
    assert np.array_equal(cv2.imread(path, cv2.IMREAD_GRAYSCALE) > 0, mask)


@pytest.mark.parametrize('name', ['../x', '../../al_state', '/etc/x', 'a/../../x'])
def test_a_mask_stays_in_its_directory(tmp_path, name):
    with pytest.raises(ValueError, match='^an image name should stay below its directory, but got'):
        mask_path(str(tmp_path), 0, name)


def test_a_damaged_mask_is_named(tmp_path):
    path = mask_path(str(tmp_path), 0, 'x')
    with pytest.raises(ValueError, match='x.png is missing or damaged'):
        read_mask(path)
    write_png(path, some_mask())
    data = open(path, 'rb').read()
    for damaged in (b'', data[:len(data) // 2], b'no image'):
        open(path, 'wb').write(damaged)
        with pytest.raises(ValueError, match='x.png is missing or damaged'):
            read_mask(path)


# --- what training sees ----------------------------------------------------------------------------------------------


def test_only_labelled_pixels_of_labelled_images_are_shown(sparse, shared_data):
    masks = {name: some_mask(seed=i) for i, name in enumerate(tiny.NAMES[1:3])}
    seen = shown(sparse(masks, whole=['b/10']))
    assert list(seen) == ['a/01', 'a/02', 'b/10']
    for name, mask in masks.items():
        assert np.array_equal(seen[name], np.where(mask, labels_of(shared_data, name), 255))
    assert np.array_equal(seen['b/10'], labels_of(shared_data, 'b/10'))


def test_labels_are_hidden_as_soon_as_they_are_loaded(sparse, shared_data):
    """And after what loading does to them."""
    mask, raw = some_mask(), labels_of(shared_data, 'a/00').astype(int)
    for changes, expected in [
            (dict(reduce_zero_label=True), np.where(raw == 0, 255, raw - 1)),
            (dict(metainfo=dict(classes=('grey', 'bright'), palette=[[0] * 3] * 2)), None),
            (dict(ignore_index=7), raw)]:
        ignore = changes.get('ignore_index', 255)
        if 'metainfo' in changes:  # a custom data set's label_map: dark is no class of it, the others move up
            base = DATASETS.get('BaseSegDataset')
            two = type('TwoOfThree', (base, ), dict(METAINFO=dict(classes=('dark', 'grey', 'bright'))))
            DATASETS.register_module(module=two, force=True)
            loader = sparse({'a/00': mask}, wrap=lambda leaf: {**leaf, 'type': 'TwoOfThree', 'metainfo': dict(
                classes=('grey', 'bright'), palette=[[0] * 3] * 2)})
            assert loader.dataset.label_map == {0: 255, 1: 0, 2: 1}
            expected = np.where(raw == 0, 255, raw - 1)
        else:
            loader = sparse({'a/00': mask}, **changes)
        pipeline, info = loader.dataset.pipeline, loader.dataset[0]
        assert isinstance(pipeline, SparseLabels) and np.array_equal(
            info['data_samples'].gt_sem_seg.data[0], np.where(mask, expected, ignore))
        first = []
        spy = types.SimpleNamespace(transform=lambda results, first=first: first.append(results['gt_seg_map']))
        pipeline.transforms[2] = lambda results, spy=spy: spy.transform(results)
        assert pipeline(loader.dataset.get_data_info(0)) is None
        assert np.array_equal(first[0], np.where(mask, expected, ignore)) and first[0].dtype == np.uint8


def test_a_mask_of_another_size_is_an_error(sparse):
    with pytest.raises(ValueError, match=r'the mask .*a/00.png has size \(4, 4\), but the label map \(32, 48\)'):
        shown(sparse({'a/00': np.ones((4, 4), bool)}))


def test_a_crop_without_labels_is_drawn_again(sparse):
    mask = np.zeros(tiny.SHAPE, bool)
    mask[16, 24] = True  # in about every fourth crop
    loader = sparse({'a/00': mask}, [dict(type='RandomCrop', crop_size=(12, 16))])
    np.random.seed(0)
    assert np.mean([(shown(loader)['a/00'] != 255).sum() for _ in range(40)]) > .8
    crop = TRANSFORMS.build(dict(type='RandomCrop', crop_size=(12, 16)))
    label = np.where(mask, 1, 255).astype(np.uint8)
    once = [(crop(dict(img=np.zeros((*tiny.SHAPE, 3)), gt_seg_map=label, seg_fields=['gt_seg_map']))['gt_seg_map']
             != 255).sum() for _ in range(40)]
    assert np.mean(once) < .5  # it is the drawing again that makes the difference


@pytest.mark.parametrize('mask', [np.zeros(tiny.SHAPE, bool), np.arange(48) + np.zeros((32, 1)) > 46])
def test_a_crop_that_never_has_labels_ends(sparse, mask, monkeypatch):
    """No pixel is labelled, or only those that the crop leaves out."""
    calls, crop = [], mmcv.transforms.CenterCrop.transform
    monkeypatch.setattr(mmcv.transforms.CenterCrop, 'transform', lambda *args: calls.append(1) or crop(*args))
    seen = shown(sparse({'a/00': mask}, [dict(type='CenterCrop', crop_size=(12, 16))]))['a/00']
    assert seen.shape == (16, 12) and (seen == 255).all() and len(calls) == (11 if mask.any() else 1)


# --- resizing --------------------------------------------------------------------------------------------------------


def spread_mask() -> np.ndarray:
    """One pixel in each square of four, at a random corner."""
    rng, mask = np.random.default_rng(0), np.zeros(tiny.SHAPE, bool)
    for y, x in np.ndindex(16, 24):
        mask[2 * y + rng.integers(2), 2 * x + rng.integers(2)] = rng.random() < .5
    return mask


@pytest.mark.parametrize('step', [
    HALF, dict(type='Resize', scale=(24, 16)), dict(type='RandomResize', scale=(24, 16), ratio_range=(1., 1.)),
    dict(type='RandomResize', scale=(24, 16), ratio_range=(1., 1.), keep_ratio=True),
    dict(type='RandomChoiceResize', scales=[(24, 16)]), dict(type='ResizeShortestEdge', scale=16, max_size=99)],
    ids=lambda step: step['type'])
def test_a_smaller_image_keeps_every_label(sparse, shared_data, step):
    mask, label = spread_mask(), labels_of(shared_data, 'a/00')
    seen = shown(sparse({'a/00': mask}, [step]))['a/00']
    expected = np.full((16, 24), 255)
    for y, x in np.argwhere(mask):
        expected[y // 2, x // 2] = label[y, x]
    assert np.array_equal(seen, expected) and 100 < mask.sum() == (seen != 255).sum()


@pytest.mark.parametrize('h, w', [(16, 24), (20, 31), (1, 1), (32, 48), (57, 48), (64, 96)])
def test_a_lone_label_lands_where_its_pixel_lands(h, w):
    rng = np.random.default_rng(0)
    for y, x in zip(rng.integers(0, 32, 40), rng.integers(0, 48, 40)):
        old = np.full(tiny.SHAPE, 255, np.uint8)
        old[y, x] = 2
        new = cv2.resize(old, (w, h), interpolation=cv2.INTER_NEAREST)
        before = new.copy()
        kept = keep_pixels(old, new, 255)
        assert np.array_equal(new, before) and kept.dtype == np.uint8
        assert kept[int(y * h / 32 + 1e-9), int(x * w / 48 + 1e-9)] == 2
        assert set(np.argwhere(kept != before).flatten().tolist()) <= {y * h // 32, x * w // 48}


def test_what_nearest_neighbour_kept_stays():
    old = np.full((4, 4), 255, np.uint8)
    old[0, :2] = 1, 2  # both fall into one pixel
    assert keep_pixels(old, old[::2, ::2], 255).tolist() == [[1, 255], [255, 255]]
    old[0, 0] = 255
    assert keep_pixels(old, old[::2, ::2], 255).tolist() == [[2, 255], [255, 255]]


# --- loaders and wrappers --------------------------------------------------------------------------------------------


def test_in_worker_processes(sparse):
    masks = {name: some_mask(seed=i) for i, name in enumerate(tiny.NAMES[:3])}
    inside, outside = shown(sparse(masks, workers=2)), shown(sparse(masks))
    assert list(inside) == tiny.NAMES[:3] and all(np.array_equal(inside[name], outside[name]) for name in masks)


def test_under_wrappers(sparse):
    masks = {name: some_mask(seed=i) for i, name in enumerate(('a/00', 'b/07'))}

    def wrap(leaf: dict) -> dict:
        leaves = [{**leaf, 'indices': range(i, i + 6)} for i in (0, 6)]
        return dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=leaves))

    seen, plain = sparse(masks, wrap=wrap), shown(sparse(masks))
    assert len(seen.dataset) == 4
    assert all(np.array_equal(shown(seen)[name], plain[name]) for name in masks)


# --- hidden labels do not reach training -----------------------------------------------------------------------------


def weights_of(cfg, k: int) -> dict:
    return torch.load(f'{cfg.work_dir}/round_{k}/iter_4.pth', weights_only=False)['state_dict']


@pytest.mark.parametrize('unit, amount', [(dict(type='region', size=[8, 8]), 12), ('pixel', 60)])
def test_other_labels_at_hidden_pixels_change_nothing(make_cfg, train, shared_data, tmp_path, unit, amount):
    al = dict(unit=unit, initial=amount, budget=amount)
    first = make_cfg(al, changes=tiny.NO_VAL)
    _, rounds = train(first)
    root, hidden = shutil.copytree(shared_data, tmp_path / 'garbage'), 0
    last = al_patch.labelled(read_state(f'{first.work_dir}/al_state.json'))
    for name in tiny.NAMES:
        mask = read_mask(mask_path(first.work_dir, last[name], name)) if name in last else np.zeros(tiny.SHAPE, bool)
        label = labels_of(root, name)
        hidden += (~mask).sum()
        cv2.imwrite(f'{root}/ann/train/{name}.png', np.where(mask, label, (label + 1) % 3))
    again = make_cfg(al, root=str(root), work_dir=str(tmp_path / 'again'), changes=tiny.NO_VAL)
    _, same_rounds = train(again)
    assert [entry['asked'] for entry in same_rounds] == [entry['asked'] for entry in rounds] and hidden > 10_000
    for k in range(2):
        ours, theirs = weights_of(first, k), weights_of(again, k)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_losses_average_over_labelled_pixels(make_cfg, build):
    cfg = make_cfg(dict(unit='pixel'), changes={
        'model.decode_head.loss_decode': [dict(type='CrossEntropyLoss', loss_name=f'loss_{i}') for i in 'ab'],
        'model.auxiliary_head': dict(type='FCNHead', in_channels=8, channels=8, num_convs=1, num_classes=3, in_index=0,
                                     loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))})
    runner = build(cfg)
    al_patch.prepare_losses(runner)
    losses = [m for m in runner.model.modules() if hasattr(m, 'avg_non_ignore')]
    assert len(losses) == 3 and all(loss.avg_non_ignore for loss in losses)


@pytest.mark.parametrize('unit, value', [('image', False), ('pixel', True)])
def test_whole_images_train_as_stock(make_cfg, train, unit, value):
    runner, _ = train(make_cfg(dict(unit=unit, rounds=0), changes=tiny.NO_VAL))
    assert runner.model.decode_head.loss_decode.avg_non_ignore is value


@pytest.mark.parametrize('thresh', [None, .7])
def test_hard_pixels_are_mined_among_labelled_ones(make_cfg, build, thresh):
    """mmseg's OHEMPixelSampler, also where a batch has no label at all."""
    runner = build(make_cfg(changes={'model.decode_head.sampler': dict(
        type='OHEMPixelSampler', min_kept=5, **({'thresh': thresh} if thresh else {}))}))
    al_patch.prepare_losses(runner)
    head, features = runner.model.decode_head, [torch.randn(2, 8, 8, 12, requires_grad=True)]
    label = torch.full((1, 32, 48), 255)
    for n in (0, 1, 30):
        label[0, 16, :n] = 1
        sample = types.SimpleNamespace(gt_sem_seg=types.SimpleNamespace(data=label), metainfo={})
        losses = head.loss(features, [sample] * 2, None)
        losses['loss_ce'].backward()
        assert torch.isfinite(losses['loss_ce']) and torch.isfinite(head.conv_seg.weight.grad).all()
        assert bool(losses['loss_ce'] > 0) == bool(n)


# --- which losses are let in -----------------------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """Cross entropy that looks at what is ignored, or divides by the number of what is not."""

    def __init__(self, looks: bool):
        super().__init__()
        self.looks = looks

    def forward(self, pred, target, weight=None, ignore_index=255):
        if self.looks:
            return torch.nn.functional.cross_entropy(pred, target * (target != ignore_index))
        return torch.nn.functional.cross_entropy(pred, target, ignore_index=ignore_index)


@pytest.mark.parametrize('loss, why', [
    (Toy(True), 'pixels without a label change it'), (Toy(False), 'it is not finite where there is none')])
def test_a_loss_that_looks_at_hidden_pixels_is_refused(loss, why):
    with pytest.raises(ValueError, match=f'^Toy cannot train with partly labelled images: {why}; use a plain Cross'):
        check_loss(loss, 3, 255)


@pytest.mark.parametrize('loss, channels', [
    (dict(type='CrossEntropyLoss'), 3), (dict(type='CrossEntropyLoss', avg_non_ignore=True), 19),
    (dict(type='CrossEntropyLoss', use_sigmoid=True), 3), (dict(type='TverskyLoss'), 3),
    (dict(type='OhemCrossEntropy'), 3), (dict(type='LovaszLoss', loss_type='binary', reduction='none'), 1)], ids=str)
def test_mmsegs_losses_that_are_let_in(loss, channels):
    check_loss(MODELS.build(loss), channels, 255)


def weighs_what_is_labelled() -> bool:
    """mmseg 1.2.2 looks up the class weight of `ignore_index`, too: it fails on a pixel without a label."""
    loss = MODELS.build(dict(type='CrossEntropyLoss', class_weight=[1., 1.]))
    try:
        return bool(loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]]), ignore_index=255).isfinite())
    except IndexError:
        return False


@pytest.mark.parametrize('loss, channels, why', [
    (dict(type='DiceLoss'), 3, 'pixels without a label change it'),
    (dict(type='HuasdorffDisstanceLoss'), 3, 'pixels without a label change it'),
    (dict(type='LovaszLoss', reduction='none'), 3, 'it is not finite where there is none'),
    (dict(type='LovaszLoss', per_image=True), 3, 'it is not finite where there is none'),
    (dict(type='CrossEntropyLoss', use_sigmoid=True), 1, r'it fails on them \(RuntimeError: max'),
    (dict(type='CrossEntropyLoss', class_weight=[1., 1., 2.]), 3, r'it fails on them \(IndexError: index 255'),
    (dict(type='FocalLoss'), 3, r'it fails on them \(RuntimeError'),  # mmseg's version without a GPU fails on anything
    (dict(type='BoundaryLoss'), 3, r'it fails on them \(IndexError')], ids=str)
def test_mmsegs_losses_that_are_refused(loss, channels, why):
    if 'class_weight' in loss and weighs_what_is_labelled():
        pytest.skip('this mmseg weighs classes where pixels have a label')
    with pytest.raises(ValueError, match=f'^{loss["type"]} cannot train with partly labelled images: {why}'):
        check_loss(MODELS.build(loss), channels, 255)


def softmax_with_class_weights(logits, label):
    return torch.nn.functional.cross_entropy(logits, label, torch.tensor([1., .5, 2.]), ignore_index=255)


def one_sigmoid(logits, label):
    known = label != 255
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0][known], label[known].float())


def one_sigmoid_with_weight(logits, label):
    known = label != 255
    p, y = logits[:, 0][known].sigmoid(), label[known]
    return -(3. * y * p.log() + (1 - y) * (1 - p).log()).mean()


@pytest.mark.parametrize('labelled', [0, 1, 20])
@pytest.mark.parametrize('options, channels, slow', [
    (dict(class_weight=[1., .5, 2.]), 3, softmax_with_class_weights), (dict(use_sigmoid=True), 1, one_sigmoid),
    (dict(use_sigmoid=True, class_weight=[3.]), 1, one_sigmoid_with_weight)])
def test_cross_entropy_is_averaged_over_labelled_pixels(options, channels, slow, labelled):
    torch.manual_seed(labelled)
    logits, label = torch.randn(2, channels, 4, 4, requires_grad=True), torch.full((2, 4, 4), 255)
    label.view(-1)[torch.randperm(32)[:labelled]] = torch.randint(0, max(2, channels), (labelled, ))
    head = torch.nn.Module()
    head.loss_decode = MODELS.build(dict(type='CrossEntropyLoss', **options))
    head.ignore_index, head.out_channels = 255, channels
    logger = types.SimpleNamespace(info=lambda line: None)
    al_patch.prepare_losses(types.SimpleNamespace(model=torch.nn.Sequential(head), logger=logger))
    value = head.loss_decode(logits, label, ignore_index=255)
    value.backward()
    assert float(value) == pytest.approx(float(slow(logits, label)) if labelled else 0., rel=1e-5)
    assert bool(logits.grad.any()) == bool(labelled)


def test_a_run_refuses_the_loss_before_it_trains(make_cfg, train):
    cfg = make_cfg(dict(unit='pixel'), changes={'model.decode_head.loss_decode.type': 'DiceLoss'})
    with pytest.raises(ValueError, match='^DiceLoss cannot train'):
        train(cfg)
    train(make_cfg(dict(rounds=0), work_dir=cfg.work_dir + '_image', changes={
        **tiny.NO_VAL, 'model.decode_head.loss_decode.type': 'DiceLoss'}))


def test_heads_that_learn_masks_of_whole_images_are_refused():
    class Head(torch.nn.Module):
        _seg_data_to_instance_data = None

    trainer = types.SimpleNamespace(model=torch.nn.Sequential(Head()))
    with pytest.raises(ValueError, match="^Head learns masks of whole images, .*: use `al.unit='image'` with it"):
        al_patch.prepare_losses(trainer)
