"""Partly labelled images: masks, what training sees of them, and which losses can learn from them."""
import collections
import os.path as osp
import random
import shutil
import types

import cv2
import mmcv.transforms
import mmengine
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.runner import Runner
from mmseg.models import FCNHead
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image

import al_patch
import al_report
from al_patch import SparseLabels, State, gather_labelled_pixels, keep_pixels, read_mask, write_png

HALF = dict(type='Resize', scale_factor=.5)
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]


def labels_of(root, name: str) -> np.ndarray:
    return cv2.imread(f'{root}/ann/train/{name}.png', cv2.IMREAD_UNCHANGED)


def some_mask(share: float = .1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(tiny.SHAPE) < share


def mask_path(work_dir: str, k: int, name: str) -> str:
    return State(dict(seed=0, config={}), work_dir).mask_path(k, name)


@pytest.fixture
def sparse(tmp_path, shared_data):
    """A function from masks by name to a dataloader of partly labelled images, e.g. with further steps."""

    def build(masks: dict, steps=(), wrap=lambda leaf: leaf, whole=(), workers=0, load=LOAD, **changes):
        work_dir = str(tmp_path / 'sparse')
        for name, mask in masks.items():
            write_png(mask_path(work_dir, 1, name), mask)
        rounds = [dict.fromkeys(whole), {name: [1, int(mask.sum())] for name, mask in masks.items()}]
        state_file = osp.join(work_dir, al_patch.STATE_FILE)
        mmengine.dump(tiny.saved(rounds), state_file)
        leaf = dict(type='BaseSegDataset', data_root=shared_data, img_suffix='.png', seg_map_suffix='.png',
                    metainfo=dict(classes=('dark', 'grey', 'bright'), palette=[[0] * 3] * 3),
                    data_prefix=dict(img_path='img/train', seg_map_path='ann/train'),
                    pipeline=[*load, *steps, dict(type='PackSegInputs')], **changes)
        return Runner.build_dataloader(dict(
            batch_size=1, num_workers=workers, sampler=dict(type='DefaultSampler', shuffle=False), dataset=wrap(leaf),
            al=dict(state=state_file, round=1)))

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
            (dict(ignore_index=7), raw)]:  # no loss looks at that
        ignore = 255
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


def cropped(step: dict, label: np.ndarray, path='x', shown=None) -> np.ndarray:
    """The label map of one draw of a step, and where it begins, which the image tells."""
    shown = {'x': al_patch.Shown(mask='of x')} if shown is None else shown
    rows, columns = np.indices(label.shape)
    pipeline = SparseLabels([TRANSFORMS.build(step)], shown, 255)
    results = pipeline(dict(img_path=path, img=np.stack([rows, columns], 2), gt_seg_map=label,
                            seg_fields=['gt_seg_map']))
    return (*results['img'][0, 0], results['gt_seg_map'])


def places_of(label: np.ndarray, h: int, w: int) -> list:
    """All places where a crop holds a label, one by one."""
    return [(top, left) for top in range(max(0, label.shape[0] - h) + 1) for left in range(
        max(0, label.shape[1] - w) + 1) if (label[top:top + h, left:left + w] != 255).any()]


@pytest.mark.parametrize('pixels, size', [
    ([(0, 0)], (6, 8)), ([(5, 7)], (6, 8)), ([(0, 9), (7, 0)], (4, 4)), ([(0, 9), (7, 0), (8, 11)], (20, 5)),
    ([(3, 3)], (40, 40))], ids=str)
def test_a_crop_is_drawn_among_those_that_hold_a_label(pixels, size):
    """Each is as likely as any other, in a corner too; their number is counted one by one."""
    label = np.full((10, 12), 255, np.uint8)
    label[tuple(np.transpose(pixels))] = 1
    places, n = places_of(label, *size), 1500
    np.random.seed(0)
    drawn = collections.Counter(cropped(dict(type='RandomCrop', crop_size=size), label)[:2] for _ in range(n))
    expected = n / len(places)
    assert set(drawn) <= set(places)
    chi_square = sum((drawn[place] - expected)**2 / expected for place in places)
    assert chi_square < len(places) + 4 * (2 * len(places))**.5  # which has mean and half the variance len(places) - 1


def test_a_crop_keeps_the_share_of_a_class():
    """As many draws as mmseg's, and of labelled pixels alone: the places that mix two classes, if they are found."""
    label = np.full((10, 30), 255, np.uint8)
    label[4, [8, 12]], label[4, 25] = (0, 1), 2
    step = dict(type='RandomCrop', crop_size=(10, 6), cat_max_ratio=.75)
    np.random.seed(0)
    seen = [np.unique(cropped(step, label)[2]).tolist() for _ in range(400)]
    mixed = sum(classes == [0, 1, 255] for classes in seen) / 400
    places = places_of(label, 10, 6)
    share = np.mean([left in (7, 8) for _, left in places])  # of all that hold a label, both 8 and 12 lie in two
    assert abs(mixed - (1 - (1 - share)**11)) < .06 and [255] not in seen
    draws = []
    label[4, [12, 25]] = 255
    choice = np.random.choice
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, 'choice', lambda *args: draws.append(1) or choice(*args))
        cropped(step, label)
    assert len(draws) == 22  # top and left


def test_whole_labels_are_cropped_as_by_mmseg():
    """And so are those that have none to be found, as where all is void."""
    step, rng = dict(type='RandomCrop', crop_size=(6, 8), cat_max_ratio=.6), np.random.default_rng(0)
    label = rng.choice([0, 1, 255], (10, 12)).astype(np.uint8)
    for kwargs in (dict(path='y'), dict(shown={'x': al_patch.Shown()}), {}):
        given = np.full_like(label, 255) if not kwargs else label
        for seed in range(5):
            np.random.seed(seed)
            *_, ours = cropped(step, given, **kwargs)
            np.random.seed(seed)
            assert np.array_equal(ours, TRANSFORMS.build(step)(dict(
                img=np.zeros((10, 12, 3)), gt_seg_map=given, seg_fields=['gt_seg_map']))['gt_seg_map'])


def test_a_crop_of_a_way_of_its_own_is_drawn_again():
    class Corners(TRANSFORMS.get('RandomCrop')):
        calls = []

        def crop_bbox(self, results):
            self.calls.append(1)
            top = 8 * np.random.randint(2)
            return top, top + 2, 0, 2

    TRANSFORMS.register_module(module=Corners, force=True)
    label = np.full((10, 12), 255, np.uint8)
    label[9, 1] = 1
    np.random.seed(0)
    assert [cropped(dict(type='Corners', crop_size=(2, 2)), label)[0] for _ in range(30)] == [8] * 30
    assert 45 < len(Corners.calls) < 80  # every second draw


@pytest.mark.parametrize('mask', [np.zeros(tiny.SHAPE, bool), np.arange(48) + np.zeros((32, 1)) > 46])
def test_a_crop_that_never_has_labels_ends(sparse, mask, monkeypatch):
    """No pixel is labelled, or only those that the crop leaves out."""
    calls, crop = [], mmcv.transforms.CenterCrop.transform
    monkeypatch.setattr(mmcv.transforms.CenterCrop, 'transform', lambda *args: calls.append(1) or crop(*args))
    loader = sparse({'a/00': mask}, [dict(type='CenterCrop', crop_size=(12, 16))])
    calls.clear()  # it was tried whether the step maps values
    seen = shown(loader)['a/00']
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
    last = State(al_patch.read_state(f'{first.work_dir}/al_state.json'), first.work_dir).labelled()
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


# --- losses: each against a hand computation on the labelled pixels alone --------------------------------------------


def weighted_cross_entropy(logits_NC, label_N):
    weights_N = torch.tensor([1., .5, 2.])[label_N]
    return (weights_N * F.cross_entropy(logits_NC, label_N, reduction='none')).sum() / weights_N.sum()


def sigmoids(logits_NC, label_N):
    return F.binary_cross_entropy_with_logits(logits_NC, F.one_hot(label_N, 3).float())


def one_sigmoid(logits_NC, label_N, weight=1.):
    p, y = logits_NC[:, 0].sigmoid(), label_N
    return -(weight * y * p.log() + (1 - y) * (1 - p).log()).mean()


def hard(logits_NC, label_N, n, thresh):
    """Cross entropy of the pixels whose label has a lower probability than ``thresh`` and the n-th lowest, if higher.
    """
    p_N = logits_NC.softmax(1).gather(1, label_N[:, None])[:, 0]
    is_hard = p_N < max(float(p_N.detach().sort().values[min(n, len(p_N) - 1)]), thresh)
    return F.cross_entropy(logits_NC, label_N, reduction='none')[is_hard]


def tversky(logits_NC, label_N):
    p, losses = logits_NC.softmax(1), []
    for c in range(3):
        is_c = (label_N == c).float()
        tp, fp, fn = (p[:, c] * is_c).sum(), (p[:, c] * (1 - is_c)).sum(), ((1 - p[:, c]) * is_c).sum()
        losses.append(1 - (tp + 1) / (tp + .3 * fp + .7 * fn + 1))
    return sum(losses) / 3


def lovasz_extension(errors_N, is_c_N):
    """Sum of the errors, the highest first, each times what it adds to 1 - IoU of the pixels before it."""
    total, before, wrong = 0, 0., set()
    for i in errors_N.argsort(descending=True).tolist():
        wrong.add(i)
        missed = sum(bool(is_c_N[j]) for j in wrong)
        loss = 1 - (int(is_c_N.sum()) - missed) / (int(is_c_N.sum()) + len(wrong) - missed)
        total, before = total + errors_N[i] * (loss - before), loss
    return total


def lovasz(logits_NC, label_N):
    p = logits_NC.softmax(1)
    return torch.stack([lovasz_extension(((label_N == c).float() - p[:, c]).abs(), label_N == c)
                        for c in label_N.unique().tolist()]).mean()


def lovasz_hinge(logits_NC, label_N):
    return lovasz_extension((1 - logits_NC[:, 0] * (2. * label_N - 1)).relu(), label_N == 1)


def dice(logits_NC, label_N):
    p, y = logits_NC.sigmoid(), F.one_hot(label_N, 3).float()
    return 1 - 2 * (p * y).sum() / ((p**2).sum() + (y**2).sum() + 2e-3)


CE = dict(type='CrossEntropyLoss')
LOSSES = {  # a loss's config, outputs, further settings of the head, and what the loss should be
    'cross entropy': (CE, 3, {}, F.cross_entropy),
    'avg_non_ignore': (dict(CE, avg_non_ignore=True), 3, {}, F.cross_entropy),
    'class weights': (dict(CE, class_weight=[1., .5, 2.]), 3, {}, weighted_cross_entropy),
    'loss weight': (dict(CE, loss_weight=.4), 3, {}, lambda *args: .4 * F.cross_entropy(*args)),
    'three sigmoids': (dict(CE, use_sigmoid=True), 3, {}, sigmoids),
    'one sigmoid': (dict(CE, use_sigmoid=True), 1, {}, one_sigmoid),
    'pos_weight': (dict(CE, use_sigmoid=True, class_weight=[3.]), 1, {}, lambda *args: one_sigmoid(*args, 3.)),
    'sum': (dict(CE, reduction='sum'), 3, {}, lambda *args: F.cross_entropy(*args, reduction='sum')),
    'none': (dict(CE, reduction='none'), 3, {}, lambda *args: F.cross_entropy(*args, reduction='none')),
    'OHEM loss': (dict(type='OhemCrossEntropy', min_kept=5, thres=.3), 3, {}, lambda *args: hard(*args, 5, .3).mean()),
    'sampler': (CE, 3, dict(min_kept=3), lambda logits_NC, label_N: F.cross_entropy(
        logits_NC, label_N, reduction='none').sort().values[-6:].sum() / len(label_N)),
    'sampler with thresh': (CE, 3, dict(min_kept=3, thresh=.5), lambda *args: hard(*args, 6, .5).sum() / len(args[1])),
    'sampler, two losses': ([CE, dict(CE, loss_name='loss_b', class_weight=[1., .5, 2.])], 3, dict(min_kept=99),
                            lambda *args: F.cross_entropy(*args) + weighted_cross_entropy(*args)),
    'Tversky': (dict(type='TverskyLoss'), 3, {}, tversky),
    'Lovasz of a batch': (dict(type='LovaszLoss', reduction='none'), 3, {}, lovasz),
    'Lovasz per image': (dict(type='LovaszLoss', per_image=True), 3, {}, lovasz),
    'Lovasz hinge': (dict(type='LovaszLoss', loss_type='binary', reduction='none'), 1, {}, lovasz_hinge),
    'Dice': (dict(type='DiceLoss'), 3, {}, dice),
    'two losses': ([CE, dict(type='DiceLoss')], 3, {}, lambda *args: F.cross_entropy(*args) + dice(*args))}


def make_head(loss, outputs: int = 3, **sampler) -> FCNHead:
    return MODELS.build(dict(
        type='FCNHead', in_channels=8, channels=8, num_convs=1, num_classes=max(2, outputs), out_channels=outputs,
        loss_decode=loss, sampler=dict(type='OHEMPixelSampler', **sampler) if sampler else None))


def losses_of(head, logits, label_NHW):
    """The sum of a head's losses, mean over what is not reduced, as mmengine has it."""
    if 'Ohem' in type(head.loss_decode).__name__:  # a head that calls it, as DDRHead, passes nothing else
        return head.loss_decode(logits, label_NHW)
    samples = [types.SimpleNamespace(gt_sem_seg=types.SimpleNamespace(data=label[None])) for label in label_NHW]
    return sum(value.mean() for key, value in head.loss_by_feat(logits, samples).items() if 'loss' in key)


def some_labels(classes: int, n: int) -> torch.Tensor:
    """Two maps of 64 pixels, ``n`` of them labelled."""
    label = torch.full((2, 8, 8), 255)
    label.view(-1)[torch.randperm(128)[:n]] = torch.randint(0, classes, (n, ))
    return label


@pytest.mark.parametrize('n', [0, 20])
@pytest.mark.parametrize('which', LOSSES)
def test_a_loss_is_that_of_the_labelled_pixels(which, n):
    """Value and gradient; where nothing is labelled the gradient is zero, and without any label the loss, too."""
    loss, outputs, sampler, by_hand = LOSSES[which]
    torch.manual_seed(n)
    head, label = make_head(loss, outputs, **sampler), some_labels(max(2, outputs), n)
    gather_labelled_pixels(head)
    ours, theirs = torch.randn(2, outputs, 8, 8).expand(2, -1, -1, -1, -1).clone()
    ours, theirs = ours.requires_grad_(), theirs.requires_grad_()
    value = losses_of(head, ours, label)
    value.backward()
    if not n:
        assert value == 0 and not ours.grad.any()
        return
    known = label != 255
    expected = by_hand(theirs.movedim(1, -1)[known], label[known]).mean()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert not ours.grad.movedim(1, -1)[~known].any() and ours.grad.any()


@pytest.mark.parametrize('which', LOSSES)
def test_a_loss_of_one_labelled_pixel(which):
    """As a batch may have, if crops are small: it is easy, so that OHEM keeps none, and mmseg's Lovasz loses a
    dimension."""
    loss, outputs, sampler, _ = LOSSES[which]
    head, label, logits = make_head(loss, outputs, **sampler), some_labels(max(2, outputs), 1), torch.zeros(
        2, outputs, 8, 8)
    gather_labelled_pixels(head)
    logits.movedim(1, -1)[label != 255] = 9 * F.one_hot(label[label != 255], max(2, outputs))[:, -outputs:].float()
    value = losses_of(head, logits.requires_grad_(), label)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
    assert not logits.grad.movedim(1, -1)[label == 255].any()


@pytest.mark.parametrize('which', LOSSES)
def test_where_all_is_labelled_losses_are_mmsegs(which):
    loss, outputs, sampler, _ = LOSSES[which]
    torch.manual_seed(0)
    logits, label = torch.randn(2, outputs, 8, 8), some_labels(max(2, outputs), 128)
    stock, ours = make_head(loss, outputs, **sampler), make_head(loss, outputs, **sampler)
    gather_labelled_pixels(ours)
    assert torch.equal(losses_of(ours, logits, label), losses_of(stock, logits, label))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('n', [0, 20])
def test_in_half_precision(dtype, n):
    """A sum of logits would overflow."""
    head, label = make_head(CE), some_labels(3, n)
    gather_labelled_pixels(head)
    logits = (900 + torch.randn(2, 3, 8, 8)).to(dtype).requires_grad_()
    value = head.loss_decode(logits, label, ignore_index=255)
    value.backward()
    known = label != 255
    expected = F.cross_entropy(logits.detach().movedim(1, -1)[known].float(), label[known]) if n else torch.tensor(0.)
    torch.testing.assert_close(value.float(), expected, rtol=1e-2, atol=1e-2)
    assert logits.grad.isfinite().all() and bool(logits.grad.any()) == bool(n)


def test_every_heads_losses_are_gathered_once(make_cfg, build):
    """Those of auxiliary heads, too, and of a head with several; by the head's own `ignore_index`."""
    auxiliary = dict(type='FCNHead', in_channels=8, channels=8, num_convs=1, num_classes=3, in_index=0, ignore_index=7,
                     loss_decode=dict(CE, use_sigmoid=True))
    model = build(make_cfg(changes={'model.decode_head.loss_decode': [
        dict(CE, loss_name=f'loss_{i}') for i in 'ab'], 'model.auxiliary_head': auxiliary})).model
    for _ in range(2):
        gather_labelled_pixels(model)
    losses = [*model.decode_head.loss_decode, model.auxiliary_head.loss_decode]
    logits, label = torch.randn(1, 3, 8, 8), some_labels(3, 20)[:1]
    for loss, ignore_index in zip(losses, (255, 255, 7)):
        by_hand = sigmoids if loss.use_sigmoid else F.cross_entropy
        known = label != 255
        value = loss(logits, torch.where(known, label, ignore_index), ignore_index=ignore_index)
        torch.testing.assert_close(value, by_hand(logits.movedim(1, -1)[known], label[known]))
        assert not hasattr(loss.forward.__wrapped__, '__wrapped__')


@pytest.mark.parametrize('unit, is_gathered', [('image', False), ('pixel', True)])
def test_whole_images_train_as_stock(make_cfg, train, unit, is_gathered):
    runner, _ = train(make_cfg(dict(unit=unit, rounds=0), changes=tiny.NO_VAL))
    assert ('forward' in vars(runner.model.decode_head.loss_decode)) is is_gathered


# --- losses that are refused -----------------------------------------------------------------------------------------


class TotalVariation(torch.nn.Module):
    """Cross entropy that wants neighbours to be alike."""

    def forward(self, pred, target, weight=None, ignore_index=255):
        return F.cross_entropy(pred, target, ignore_index=ignore_index) + pred.diff(dim=2).abs().mean()


@pytest.mark.parametrize('loss, why', [
    (TotalVariation(), 'it looks at neighbours of pixels'),
    (dict(type='HuasdorffDisstanceLoss'), 'it looks at neighbours of pixels'),
    (dict(type='BoundaryLoss'), r'it fails on single pixels \(IndexError'),
    (dict(type='FocalLoss'), r'it fails on single pixels \(')],  # mmseg's version without a GPU fails on anything
    ids=lambda value: value.get('type', '') if isinstance(value, dict) else '')
def test_a_loss_that_needs_maps_is_refused(loss, why):
    head = make_head(CE)
    name = loss['type'] if isinstance(loss, dict) else type(loss).__name__
    head.loss_decode = torch.nn.ModuleList([head.loss_decode, MODELS.build(loss) if isinstance(loss, dict) else loss])
    with pytest.raises(ValueError, match=f'^{name} cannot train with partly labelled images: {why}.*; use a plain Cro'):
        al_report.check_losses(torch.nn.Sequential(head))


def test_a_run_refuses_the_loss_before_it_trains(make_cfg, train):
    changes = {**tiny.NO_VAL, 'model.decode_head.loss_decode.type': 'HuasdorffDisstanceLoss'}
    with pytest.raises(ValueError, match='^HuasdorffDisstanceLoss cannot train'):
        train(make_cfg(dict(unit='pixel'), changes=changes))
    train(make_cfg(dict(rounds=0), work_dir=make_cfg().work_dir + '_image', changes=changes))


def test_heads_that_learn_masks_of_whole_images_are_refused():
    class Head(torch.nn.Module):
        _seg_data_to_instance_data = None

    with pytest.raises(ValueError, match="^Head learns masks of whole images, .*: use `al.unit='image'` with it"):
        al_report.check_losses(torch.nn.Sequential(Head()))


# --- what learns from images without any label -----------------------------------------------------------------------

ENCNET = {'model.decode_head': dict(type='EncHead', in_channels=[8], in_index=[0], channels=8, num_classes=3,
                                    num_codes=4, norm_cfg=dict(type='BN'), _delete_=True)}
STDC = {'model.auxiliary_head': dict(type='STDCHead', in_channels=8, channels=8, num_convs=1, num_classes=2, in_index=0,
                                     norm_cfg=dict(type='BN'), loss_decode=[CE, dict(type='DiceLoss')])}


@MODELS.register_module()
class Distilled(FCNHead):
    """Wants its logits to be small, whatever the labels are."""

    def loss_by_feat(self, seg_logits, batch_data_samples) -> dict:
        return dict(super().loss_by_feat(seg_logits, batch_data_samples), loss_small=[(seg_logits**2).mean()] * 2)


@pytest.mark.parametrize('changes, loss', [(ENCNET, 'decode.loss_se of EncHead'), (STDC, 'aux.loss_ce of ')],
                         ids=['encnet', 'stdc'])
def test_a_loss_that_learns_from_nothing_is_refused(make_cfg, train, changes, loss):
    changes = {**tiny.NO_VAL, **changes}
    with pytest.raises(ValueError, match=f'^{loss}.*learns from pixels without a label: it is .* where there is none'):
        train(make_cfg(dict(unit='pixel'), changes=changes))
    train(make_cfg(dict(rounds=0), work_dir=make_cfg().work_dir + '_image', changes=changes))


def test_a_loss_that_does_not_depend_on_labels_is_left_alone(make_cfg, train):
    cfg = make_cfg(dict(unit='pixel', rounds=0), changes={**tiny.NO_VAL, 'model.decode_head.type': 'Distilled'})
    train(cfg)
    assert 'decode.loss_small does not depend on labels, and is left alone' in tiny.log_of(f'{cfg.work_dir}/round_0')


@pytest.mark.parametrize('loop', ['iters', 'epochs'])
def test_looking_for_it_changes_nothing(make_cfg, train, monkeypatch, loop):
    """Weights, running statistics and random numbers are after it as before, and the run is the same as without."""
    def states(runner) -> list:
        return [*map(torch.clone, runner.model.state_dict().values()), torch.get_rng_state(),
                torch.tensor(np.random.get_state()[1].astype(int)), torch.tensor(random.getstate()[1])]

    def look(runner):
        before = states(runner)
        check_void(runner)
        looked.append(all(map(torch.equal, before, states(runner))) and runner.model.training)

    looked, check_void, runs = [], al_report.check_void, []
    for function in (look, lambda runner: None):
        monkeypatch.setattr(al_report, 'check_void', function)
        cfg = make_cfg(dict(unit='pixel', rounds=0), loop, work_dir=f'{make_cfg().work_dir}_{len(runs)}')
        runner, rounds = train(cfg)
        runs.append((runner.model.state_dict(), [entry['metrics'] for entry in rounds]))
    assert looked == [True] and runs[0][1] == runs[1][1]
    assert all(torch.equal(value, runs[1][0][key]) for key, value in runs[0][0].items())
