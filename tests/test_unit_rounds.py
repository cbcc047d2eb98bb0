"""Whole runs below image level, in one process: budgets, masks, what is void, the end of the pool, and resuming."""
import math
import os.path as osp
import pathlib
import shutil
import types

import cv2
import numpy as np
import pytest
import tiny

import al_patch
from al_patch import Collector, Query, State, read_state, seed_of, uniform

SHORT = {**tiny.NO_VAL, 'train_cfg.max_iters': 2}
CELL = dict(type='region', size=[8, 8])  # 24 of them in each of 12 images
SUPERPIXEL = dict(type='superpixel', n_segments=12, compactness=100.)
AREA = math.prod(tiny.SHAPE)
RUNS = dict(
    grid=dict(unit=CELL, initial=10, budget=7),
    grid_at_the_border=dict(unit=dict(type='region', size=[9, 13]), initial=10, budget=7, strategy='margin'),
    window=dict(unit=dict(type='region', window=2), strategy='ripu', initial=9, budget=5),
    pixel=dict(unit='pixel', strategy='pixelpick', per_image=True, initial=3, budget=3),
    pixel_apart=dict(unit=dict(type='pixel', radius=2), strategy=dict(type='ripu_pixel', k=2), initial=20, budget=11),
    superpixel=dict(unit=SUPERPIXEL, initial=8, budget=6),
    random=dict(unit=CELL, strategy='random', initial=8, budget=6))


def state_of(cfg) -> State:
    """What a run has left: enough to read its masks."""
    pool = types.SimpleNamespace(sizes=dict.fromkeys(tiny.NAMES, tiny.SHAPE))
    return State(read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE)), cfg.work_dir, pool=pool)


def masks_until(cfg, k: int) -> dict:
    """Name -> mask, after round k."""
    state = state_of(cfg)
    return {name: state.mask(name, k) for name in state.labelled(k)}


def pixels_of(masks: dict) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def asked_of(rounds: list) -> list:
    return [entry['asked'] for entry in rounds]


def units_of(rounds: list) -> list:
    return [sum(n for n, _ in entry['asked'].values()) for entry in rounds]


@pytest.mark.parametrize('name', RUNS)
def test_a_run(make_cfg, train, name):
    al = RUNS[name]
    cfg = make_cfg(dict(al, rounds=2), changes=SHORT)
    _, rounds = train(cfg)
    content = read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE))
    unit = content['settings']['unit']
    assert content['pixels'] == 12 * AREA and unit == al_patch.resolve_unit(al['unit']).setting
    images = 12 if al.get('per_image') else 1
    assert units_of(rounds) == [al['initial'] * images, al['budget'] * images, al['budget'] * images]
    before = {}
    for k, entry in enumerate(rounds):
        now = masks_until(cfg, k)
        assert set(before) <= set(now) == set(before) | set(entry['asked'])
        for image, (units, pixels) in entry['asked'].items():
            old = before.get(image, np.zeros(tiny.SHAPE, bool))
            assert not (old & ~now[image]).any() and (now[image] & ~old).sum() == pixels >= units > 0
            assert not al.get('per_image') or units == 3
        assert entry['pixels'] == sum(pixels for _, pixels in entry['asked'].values())
        assert pixels_of(now) == sum(each['pixels'] for each in rounds[:k + 1])  # so nothing was asked for twice
        spent = entry['spent']
        assert spent['pixels'] == pixels_of(now) and entry['void_pixels'] == 0 == spent['% void']
        assert spent['% of pixels'] == round(100 * pixels_of(now) / (12 * AREA), 3)
        assert spent['images'] == len(now)
        assert spent[f'{unit["type"]}s'] == sum(units_of(rounds)[:k + 1])
        assert spent.get('clicks') == (sum(units_of(rounds)[:k + 1]) if unit['type'] == 'pixel' else None)
        before = now
    if name == 'grid':
        cells = [mask.reshape(4, 8, 6, 8).transpose(0, 2, 1, 3).reshape(24, 64) for mask in before.values()]
        assert sum(int(cell.all()) for image in cells for cell in image) == 24
        assert all(cell.all() == cell.any() for image in cells for cell in image)


def test_void_pixels_are_counted_and_stay_labelled(make_cfg, train, shared_data, tmp_path):
    """The annotator was asked for them, and said that they are of no class."""
    root = shutil.copytree(shared_data, tmp_path / 'void')
    for name in tiny.NAMES:
        label = cv2.imread(f'{root}/ann/train/{name}.png', cv2.IMREAD_UNCHANGED)
        label[:, 20:] = 255
        cv2.imwrite(f'{root}/ann/train/{name}.png', label)
    cfg = make_cfg(dict(unit=CELL, initial=60, budget=20), root=str(root), changes=SHORT)
    _, rounds = train(cfg)
    total = 0
    for k, entry in enumerate(rounds):
        now = sum(int(mask[:, 20:].sum()) for mask in masks_until(cfg, k).values())
        assert entry['void_pixels'] == now - total > 0
        total = now
        assert entry['spent']['% void'] == round(100 * total / pixels_of(masks_until(cfg, k)), 1)
    assert units_of(rounds) == [60, 20]


@pytest.mark.parametrize('al, last', [
    (dict(unit=CELL, initial=100, budget=100), 88), (dict(unit=SUPERPIXEL, initial=60, budget=60), 24),
    (dict(unit=CELL, initial=.5, budget=.4), 24 * 12 // 10 + 1), (dict(unit=dict(type='region', size=[99, 99]),
                                                                      initial=5, budget=5), 2)])
def test_a_pool_that_is_used_up_ends_the_run(make_cfg, train, al, last):
    _, rounds = train(make_cfg(dict(al, rounds=9), changes=SHORT))
    assert len(rounds) == 3 and units_of(rounds)[-1] in (last, last - 1)
    assert rounds[-1]['spent']['% of pixels'] == 100 and rounds[-1]['spent']['images'] == 12


def test_a_run_ends_where_no_window_fits_any_more(make_cfg, train):
    cfg = make_cfg(dict(unit=dict(type='region', window=4), strategy='ripu', initial=200, budget=100, rounds=9),
                   changes=SHORT)
    _, rounds = train(cfg)
    left = [~al_patch.dilate(mask, 4) for mask in masks_until(cfg, len(rounds) - 1).values()]
    assert len(left) == 12 and not any(mask.any() for mask in left) and rounds[-1]['spent']['% of pixels'] < 100


def test_a_pool_of_whole_images_that_is_used_up(make_cfg, train):
    _, rounds = train(make_cfg(dict(unit=CELL, initial=tiny.NAMES), changes=SHORT))
    assert len(rounds) == 1 and rounds[0]['spent']['% of pixels'] == 100


@pytest.mark.parametrize('al, most', [
    (dict(unit=CELL), 64), (dict(unit=dict(type='region', window=2), strategy='ripu'), 25),
    (dict(unit=SUPERPIXEL), 300), (dict(unit='pixel', strategy='pixelpick', per_image=True), 1),
    (dict(unit='pixel'), 1)])
def test_a_fraction_is_spent_to_within_one_unit(make_cfg, train, al, most):
    _, rounds = train(make_cfg(dict(al, initial=.05, budget=[.05, .1], rounds=2), changes=SHORT))
    total = 12 * AREA
    for entry, share in zip(rounds, (.05, .05, .1)):
        if al.get('per_image'):
            assert {pixels for _, pixels in entry['asked'].values()} == {round(share * total / 12)}
        else:
            assert round(share * total) - most < entry['pixels'] <= round(share * total)


def test_whole_images_to_begin_with(make_cfg, train):
    cfg = make_cfg(dict(unit=CELL, initial=['b/08', 'a/01'], budget=9, rounds=2), changes=SHORT)
    _, rounds = train(cfg)
    assert rounds[0]['asked'] == {'a/01': None, 'b/08': None} and rounds[0]['pixels'] == 2 * AREA
    assert units_of(rounds[1:]) == [9, 9] and not {'a/01', 'b/08'} & {*rounds[1]['asked'], *rounds[2]['asked']}
    masks = masks_until(cfg, 2)
    assert masks['a/01'].all() and pixels_of(masks) == 2 * AREA + 18 * 64 == rounds[2]['spent']['pixels']
    assert not osp.exists(state_of(cfg).mask_path(0, 'a/01'))


@pytest.mark.parametrize('name, phase', [
    ('grid', 'train'), ('grid', 'query'), ('grid', 'masks'), ('window', 'query'), ('pixel', 'query')])
def test_a_run_that_stops_goes_on_as_one_that_does_not(make_cfg, train, monkeypatch, name, phase):
    """It stops in the training, in the query, or when masks are written but not yet the state."""
    al = RUNS[name]
    whole = make_cfg(dict(al, rounds=2), changes=SHORT)
    _, expected = train(whole)
    cfg = make_cfg(dict(al, rounds=2), work_dir=whole.work_dir + '_stopped', changes=SHORT)
    (owner, step), which = dict(train=((al_patch, 'train_round'), 2), query=((Collector, 'result'), 2),
                                masks=((State, 'save'), 3))[phase]
    with monkeypatch.context() as patch:
        real, calls = getattr(owner, step), []

        def stop(*args):
            calls.append(args)
            if len(calls) == which:
                raise InterruptedError
            return real(*args)

        patch.setattr(owner, step, stop)
        with pytest.raises(InterruptedError):
            train(cfg)
    assert state_of(cfg).phase == ('train' if phase == 'train' else 'query')
    _, rounds = train(make_cfg(dict(al, rounds=2), work_dir=cfg.work_dir, changes={**SHORT, 'resume': True}))
    assert asked_of(rounds) == asked_of(expected)
    ours, theirs = masks_until(cfg, 2), masks_until(whole, 2)
    assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_neither_another_unit_nor_a_lost_mask_goes_unnoticed_on_resume(make_cfg, train):
    cfg = make_cfg(dict(unit=CELL, rounds=0), changes=SHORT)
    train(cfg)
    with pytest.raises(ValueError, match='^`al.unit` was .* when round 0 used it and cannot change on resume'):
        train(make_cfg(dict(unit=dict(CELL, size=[8, 9]), rounds=0), changes={**SHORT, 'resume': True}))
    shutil.rmtree(osp.join(cfg.work_dir, 'round_0', 'labelled'))
    with pytest.raises(ValueError, match=r'^the mask .*/round_0/labelled/[ab]/\d\d.png is missing or damaged'):
        train(make_cfg(dict(unit=CELL, rounds=1), changes={**SHORT, 'resume': True}))


def test_ripu_asks_where_its_windows_score_highest(make_cfg, train, monkeypatch):
    """Round 1 of a run, from its score maps and a greedy choice over all images together."""
    maps, candidates = {}, Query.candidates

    def noted(self, name, seen):
        maps[name] = self.maps(seen)[0] if seen else None
        return candidates(self, name, seen)

    monkeypatch.setattr(Query, 'candidates', noted)
    cfg = make_cfg(dict(RUNS['window'], rounds=1), changes=SHORT)
    _, rounds = train(cfg)
    first, left = masks_until(cfg, 0), []
    for name in tiny.NAMES:
        scores = maps[name].double().numpy().copy()
        assert scores.shape == tiny.SHAPE
        for y, x in np.argwhere(first.get(name, np.zeros(tiny.SHAPE, bool))):
            scores[max(0, y - 2):y + 3, max(0, x - 2):x + 3] = -math.inf
        left.append(scores)
    left, expected = np.stack(left), {}
    draws = np.stack([uniform(seed_of(0, 'draw', 1, name), np.arange(32 * 48)) for name in tiny.NAMES])
    for _ in range(5):  # of equals, as most scores are zero, the one with the smallest draw
        ties = np.where(left == left.max(), draws.reshape(left.shape), 1)
        i, y, x = np.unravel_index(ties.argmin(), left.shape)
        left[i, max(0, y - 4):y + 5, max(0, x - 4):x + 5] = -math.inf
        mask = expected.setdefault(tiny.NAMES[i], np.zeros(tiny.SHAPE, bool))
        mask[max(0, y - 2):y + 3, max(0, x - 2):x + 3] = True
    assert {name: int(mask.sum()) for name, mask in expected.items()} == {
        name: pixels for name, (_, pixels) in rounds[1]['asked'].items()}
    now = masks_until(cfg, 1)
    assert all((now[name] >= mask).all() for name, mask in expected.items())


# --- superpixels -----------------------------------------------------------------------------------------------------


def files_in(folder: str) -> dict:
    """Path of each file below a folder -> its content."""
    return {str(path): path.read_bytes() for path in pathlib.Path(folder).rglob('*') if path.is_file()}


def test_superpixels_are_made_before_anything_is_trained_and_only_once(make_cfg, train, monkeypatch):
    """By the test dataloader's workers. What a run leaves that is stopped meanwhile is not made again."""
    al, slic = dict(unit=SUPERPIXEL, initial=8, budget=6), al_patch.slic
    cfg = make_cfg(al, changes=SHORT)
    _, expected = train(make_cfg(al, changes=SHORT, work_dir=cfg.work_dir + '_whole'))
    whole = files_in(f'{cfg.work_dir}_whole/superpixels')
    assert len(whole) == 12
    made = []

    def stops(image, *options):
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(image)
        return slic(image, *options)

    monkeypatch.setattr(al_patch, 'slic', stops)
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    assert len(files_in(f'{cfg.work_dir}/superpixels')) == 7
    assert not osp.isfile(osp.join(cfg.work_dir, al_patch.STATE_FILE))
    monkeypatch.setattr(al_patch, 'slic', lambda *args: made.append(args) or slic(*args))
    del made[:]
    cfg.test_dataloader.num_workers = 2
    _, rounds = train(cfg)
    assert not made  # in this process
    assert asked_of(rounds) == asked_of(expected)
    assert {path.replace('_whole', ''): content for path, content in whole.items()} == files_in(
        f'{cfg.work_dir}/superpixels')
    assert 'Iter(superpixels) [12/12]' in tiny.log_of(cfg.work_dir)


def test_images_of_too_few_superpixels_are_named(make_cfg, train):
    al = dict(unit=dict(type='superpixel', n_segments=2000), initial=8, budget=6, rounds=0)
    cfg = make_cfg(al, changes=SHORT)
    train(cfg)
    assert ('12 images have less than half of the superpixels that `al.unit.n_segments` = 2000 asks for: '
            f'{", ".join(tiny.NAMES)}') in tiny.log_of(cfg.work_dir)
    cfg = make_cfg(dict(al, unit=SUPERPIXEL), changes=SHORT, work_dir=f'{cfg.work_dir}_12')
    train(cfg)
    assert 'less than half' not in tiny.log_of(cfg.work_dir)


def test_a_run_on_segments_of_the_users_own(make_cfg, train, tmp_path):
    """Whole segments are asked for, and nothing is made."""
    own = np.arange(32)[:, None] // 8 * 7 + np.arange(48) // 7
    for name in tiny.NAMES:
        al_patch.write_png(str(tmp_path / 'own' / f'{name}.png'), (own * 900).astype(np.uint16))
    cfg = make_cfg(dict(unit=dict(type='superpixel', folder=str(tmp_path / 'own')), initial=8, budget=6), changes=SHORT)
    _, rounds = train(cfg)
    assert units_of(rounds) == [8, 6] and not osp.exists(osp.join(cfg.work_dir, 'superpixels'))
    for mask in masks_until(cfg, 1).values():
        assert all(mask[own == i].all() or not mask[own == i].any() for i in range(28))
