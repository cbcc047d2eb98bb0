"""Conformal risk control: images that are held out of training, and thresholds by the bound, written out."""
import os.path as osp
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

import al_patch
from al_patch import State, calibrate, generator, hold_out, parse_settings, read_state, resolve_strategy

# --- what is held out ------------------------------------------------------------------------------------------------


def state_of(asked: list, strategy='crc', seed=0) -> State:
    rounds = [dict(asked=dict.fromkeys(names)) for names in asked]
    return State(dict(seed=seed, config={}, rounds=rounds), '', parse_settings(dict(strategy=strategy)))


@pytest.mark.parametrize('images, share, number', [(10, .2, 2), (10, .5, 5), (2, .2, 1), (2, .9, 1), (100, .01, 1),
                                                   (3, .99, 2)])
def test_a_share_of_the_labelled_images_is_held_out_but_never_all(images, share, number):
    state = state_of([[f'{i}' for i in range(images)]], dict(type='crc', calibration=share))
    held_out = hold_out(state)['held_out']
    assert len(held_out) == len(set(held_out)) == number and set(held_out) < set(state.labelled())


def test_what_is_held_out_is_drawn_by_seed_and_round():
    names = [f'{i:02d}' for i in range(40)]
    states = [state_of([names]), state_of([names]), state_of([names], seed=1), state_of([names[:39], names[39:]])]
    first, again, other_seed, other_round = (tuple(hold_out(state)['held_out']) for state in states)
    assert first == again and len({first, other_seed, other_round}) == 3
    drawn = {name for seed in range(60) for name in hold_out(state_of([names], seed=seed))['held_out']}
    assert drawn == set(names)


def test_other_strategies_hold_nothing_out():
    assert hold_out(state_of([['a', 'b', 'c']], 'entropy')) == {}


def test_one_labelled_image_cannot_be_held_out():
    with pytest.raises(ValueError, match='^`al.initial` should be at least 2 images, .* = 0.2 are held out, but got 1'):
        hold_out(state_of([['a']]))


@HOOKS.register_module()
class NotesImages(Hook):
    """Notes which images a round trains on."""
    seen = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        names = {sample.img_path.split('img/train/')[1].removesuffix('.png') for sample in data_batch['data_samples']}
        self.seen.setdefault(osp.basename(runner.work_dir), set()).update(names)


@pytest.mark.parametrize('unit', [dict(unit='image'), dict(unit=dict(type='region', size=[16, 16]), initial=10)],
                         ids=['image', 'region'])
def test_a_round_does_not_train_on_what_it_holds_out(make_cfg, train, unit):
    cfg = make_cfg(dict(strategy=dict(type='crc', calibration=.4, alpha=.4), rounds=2, **unit), changes={
        **tiny.NO_VAL, 'train_cfg.max_iters': 10, 'custom_hooks': [dict(type='NotesImages')]})
    NotesImages.seen.clear()
    _, rounds = train(cfg)
    path = osp.join(cfg.work_dir, al_patch.STATE_FILE)
    for k, entry in enumerate(rounds):
        have = set(State(read_state(path), cfg.work_dir).labelled(k))
        trained = NotesImages.seen[f'round_{k}']
        assert entry['held_out'] and set(entry['held_out']) < have and trained == have - set(entry['held_out'])
        loader = Runner.build_dataloader({**cfg.train_dataloader, 'al': dict(state=path, round=k)}, seed=0)
        data_set = loader.dataset
        paths = {data_set.get_data_info(i)['img_path'] for i in range(len(data_set))}
        assert len(paths) == len(have) - len(entry['held_out'])
        assert not any(each.endswith(f'{name}.png') for each in paths for name in entry['held_out'])
    assert rounds[0]['held_out'] != rounds[2]['held_out']


# --- thresholds ------------------------------------------------------------------------------------------------------

CLASSES = 4


@pytest.fixture
def calibrated(monkeypatch):
    """A function that calibrates on given probabilities (C, H, W) and labels (H, W), of which perhaps only some pixels
    are labelled; and what was logged, and warned of."""
    warnings, told = [], []

    def thresholds(probs: list, labels: list, alpha: float, masks=None) -> list:
        masks = masks or [np.ones(label.shape, bool) for label in labels]

        class Given:
            """In place of the network."""

            def __init__(self, trainer, strategy, logits_of):
                pass

            def look(self, state, names, views, shared):
                assert views == [al_patch.to_image] and not shared  # every rank looks at all of them
                yield from ((name, SimpleNamespace(means=[dict(probs_NCHW=probs[int(name)][None])])) for name in names)

        monkeypatch.setattr(al_patch, 'Network', Given)
        state = SimpleNamespace(
            entry=dict(held_out=[f'{i}' for i in range(len(probs))]), mask=lambda name: masks[int(name)],
            load_label=lambda name: labels[int(name)],
            logger=SimpleNamespace(info=told.append), warn=warnings.append, runner=SimpleNamespace(hooks=[]),
            al=SimpleNamespace(logits=None))
        return calibrate(state, None, resolve_strategy(dict(type='crc', alpha=alpha))).tolist()

    thresholds.warnings, thresholds.told = warnings, told
    return thresholds


def some_images(n: int, shape=(5, 6), seed=0, absent=()) -> tuple:
    """Probabilities in the middle between thousandths, and labels: each image shows some of the classes and void."""
    rng, probs, labels = np.random.default_rng(seed), [], []
    for _ in range(n):
        shown = [c for c in rng.permutation(CLASSES)[:3] if c not in absent]
        label = rng.choice([*shown, 255], shape).astype(np.uint8)
        p = rng.beta(1, 3, (CLASSES, *shape))
        p = np.where(label == np.arange(CLASSES)[:, None, None], rng.beta(4, 1, p.shape), p)
        probs.append(torch.from_numpy((np.floor(p * 999) + .5) / 1000).float())
        labels.append(label)
    return probs, labels


def literal_thresholds(probs: list, labels: list, alpha: float, masks=None) -> list:
    """The highest of a thousand thresholds at which (n R + 1) / (n + 1) <= alpha, for n images that show the class."""
    masks = masks or [np.ones(label.shape, bool) for label in labels]
    thresholds, alpha = [], Fraction(str(alpha))
    for c in range(len(probs[0])):
        shown = [p[c].numpy()[(label == c) & mask] for p, label, mask in zip(probs, labels, masks)]
        shown = [values for values in shown if len(values)]
        n, best = len(shown), 1
        for j in range(1, 1001):
            rate = sum((Fraction(int((values < j / 1000).sum()), len(values)) for values in shown), Fraction(0))
            if n and (rate + 1) / (n + 1) <= alpha:
                best = max(best, j)
        thresholds.append(best / 1000)
    return thresholds


@pytest.mark.parametrize('images, alpha', [(12, .2), (30, .05), (25, .5), (5, .31), (40, .1)])
def test_thresholds_follow_the_bound(calibrated, images, alpha):
    probs, labels = some_images(images, seed=images)
    expected = literal_thresholds(probs, labels, alpha)
    assert calibrated(probs, labels, alpha) == pytest.approx(expected)
    assert max(expected) > .1 and not calibrated.warnings


def test_thresholds_by_hand(calibrated):
    """Four images of one pixel each. At alpha = .4, (n R + 1) / 5 <= .4 lets one of the four be lost."""
    probs = [torch.full((CLASSES, 1, 1), p) for p in (.2005, .5005, .7005, .9005)]
    labels = [np.zeros((1, 1), np.uint8)] * 4
    assert calibrated(probs, labels, .4) == pytest.approx([.5, .001, .001, .001])
    assert calibrated(probs, labels, .3) == pytest.approx([.2, .001, .001, .001])


def test_a_lower_rate_of_false_negatives_needs_lower_thresholds(calibrated):
    probs, labels = some_images(30)
    rows = [calibrated(probs, labels, alpha) for alpha in (.05, .1, .2, .4)]
    assert all(low <= high for a, b in zip(rows, rows[1:]) for low, high in zip(a, b)) and rows[0] != rows[-1]


def test_a_class_that_no_image_shows(calibrated):
    probs, labels = some_images(20, absent=(1, 2))
    got = calibrated(probs, labels, .3)
    assert got == pytest.approx(literal_thresholds(probs, labels, .3)) and got[1:3] == pytest.approx([.001] * 2)
    assert not calibrated.warnings  # it is so for the others


def test_only_labelled_pixels_count(calibrated):
    probs, labels = some_images(25)
    masks = [np.random.default_rng(i).random(label.shape) < .4 for i, label in enumerate(labels)]
    got = calibrated(probs, labels, .3, masks)
    assert got == pytest.approx(literal_thresholds(probs, labels, .3, masks)) != calibrated(probs, labels, .3)
    hidden = [np.where(mask, label, (label + 1) % CLASSES).astype(np.uint8) for mask, label in zip(masks, labels)]
    assert calibrated(probs, hidden, .3, masks) == got


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 5])
def test_a_network_is_calibrated_on_what_mmseg_makes_of_images(make_state, batch):
    al = dict(strategy=dict(type='crc', calibration=.5, alpha=.4))
    state = make_state(al, [tiny.NAMES], changes={'test_dataloader.batch_size': batch})
    model, names = state.runner.model.eval(), state.entry['held_out']
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=.5)
    got = calibrate(state, state.runner, state.strategy).tolist()
    samples = [model.test_step(pseudo_collate([state.pool[name]]))[0] for name in names]
    probs = [sample.seg_logits.data.softmax(0) for sample in samples]
    labels = [state.pool.load_label(name) for name in names]
    assert len(names) == 6 and got == pytest.approx(literal_thresholds(probs, labels, .4)) and max(got) > .001


def test_too_few_images_are_a_warning(calibrated):
    probs, labels = some_images(6)
    assert calibrated(probs, labels, .05) == pytest.approx([.001] * CLASSES)
    [text] = calibrated.warnings
    assert '6 held-out images are too few' in text and '`al.strategy.alpha` = 0.05' in text and 'needs 20' in text
    assert any(text.startswith('Iter(calibration) [6/6]  eta: 00:00:00') for text in calibrated.told)


def test_the_rate_is_bounded_on_images_that_were_not_seen(calibrated):
    """What conformal prediction promises, on average over many draws: 20 images to calibrate on, and one to test."""
    label, lost = np.arange(CLASSES, dtype=np.uint8)[:, None], []
    for seed in range(80):
        probs = torch.rand(21, CLASSES, generator=generator(seed))
        maps = [p.expand(CLASSES, CLASSES).T[..., None] for p in probs]
        thresholds = calibrated(maps[:20], [label] * 20, .2)
        lost += [float(p < threshold) for p, threshold in zip(probs[20], thresholds)]
    assert .08 < np.mean(lost) <= .2
