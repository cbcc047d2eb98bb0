"""Units: settings, segments, greedy peaks, candidates, the collector, and where a planted uncertainty is found."""
import itertools
import math
import sys
import types

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import al_patch
from al_patch import (
    Candidates,
    Collector,
    Pool,
    dilate,
    grid,
    parse_settings,
    parse_unit,
    peaks,
    resolve_strategy,
    segments_of,
    top_percent,
    topk,
    unit_candidates,
    unit_mask,
)

REGION = dict(type='region', size=[2, 3], window=None)


def window(radius: int) -> dict:
    return dict(type='region', size=[1, 1], window=radius)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit, match', [
    ('page', r"`al.unit` should be 'image', 'region', .*, but got 'page'"),
    (dict(type='region', sise=3), "`al.unit` 'region' has no option sise; it takes size, window"),
    (dict(type='image', size=[1, 1]), "`al.unit` 'image' has no option size; it takes none"),
    *((dict(type='region', size=size), r'`al.unit.size` should be a pair of ints \(h, w\), but got')
      for size in (3, [3], [3, 0], [3, 4.], [1, 2, 3], None)),
    *((dict(type='region', window=value), '`al.unit.window` should be None or a positive int, but got')
      for value in (0, -1, 1.5, True, '1')),
    *((dict(type='superpixel', n_segments=value), r'`al.unit.n_segments` should be an int in \[1, 65535\], but got')
      for value in (0, 2**16, 10., None, True)),
    *((dict(type='superpixel', compactness=value), '`al.unit.compactness` should be a number, but got')
      for value in ('10', None)),
    *((dict(type='pixel', radius=value), '`al.unit.radius` should be an int >= 0, but got')
      for value in (-1, .5, None))])
def test_a_wrong_unit_is_refused_by_its_key(unit, match):
    with pytest.raises(ValueError, match=f'^{match}'):
        parse_settings(dict(unit=unit))


def test_a_units_defaults():
    assert parse_unit('pixel') == dict(type='pixel', radius=0)
    assert parse_unit(dict(type='region', window=1)) == dict(type='region', size=[32, 32], window=1)
    assert parse_settings(dict(unit=dict(type='region', size=(8, 9)))).unit.size == [8, 9]
    assert parse_unit(dict(type='superpixel', compactness=1)) == dict(type='superpixel', n_segments=1024, compactness=1)


@pytest.mark.parametrize('al, key', [
    (dict(per_image=True), 'per_image'), (dict(per_image=1), 'per_image'), (dict(full_res='yes'), 'full_res'),
    (dict(unit='region', strategy=dict(type='entropy', reduce=5)), 'strategy.reduce')])
def test_what_does_not_go_with_a_unit_is_refused(al, key):
    with pytest.raises(ValueError, match=f'^`al.{key}` should .*, but got'):
        parse_settings(al)


# --- segments and masks ----------------------------------------------------------------------------------------------


def test_the_cells_of_a_grid():
    assert grid((3, 7), (2, 3)).tolist() == [[0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2], [3, 3, 3, 4, 4, 4, 5]]
    assert np.unique(grid((4, 6), (2, 3))).tolist() == [0, 1, 2, 3]  # nothing left at the border
    assert not grid((4, 6), (32, 32)).any()
    assert segments_of(None, REGION, types.SimpleNamespace(sizes=dict(x=(3, 7))), 'x').shape == (3, 7)


def test_units_without_segments():
    assert segments_of(None, window(1), None, 'x') is None and segments_of(None, parse_unit('pixel'), None, 'x') is None


def test_the_mask_of_chosen_units():
    assert unit_mask(REGION, np.array([1, 5]), grid((3, 7), (2, 3)), (3, 7)).astype(int).tolist() == [
        [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1]]
    assert unit_mask(window(1), np.array([0, 12]), None, (3, 7)).astype(int).tolist() == [
        [1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]
    assert np.flatnonzero(unit_mask(dict(type='pixel', radius=5), np.array([3, 20]), None, (3, 7))).tolist() == [3, 20]


def test_dilate():
    mask = np.zeros((5, 6), bool)
    assert dilate(mask, 2) is mask
    mask[1, 2] = True
    assert dilate(mask, 0) is mask
    assert np.argwhere(dilate(mask, 1)).tolist() == [[y, x] for y in range(3) for x in range(1, 4)]


# --- greedy peaks ----------------------------------------------------------------------------------------------------


def greedy(scores_HW: np.ndarray, gap: int, blocked_HW: np.ndarray, limit, floor: float) -> list:
    """The whole map's argmax, again and again."""
    left, picks = np.where(blocked_HW, -np.inf, scores_HW.astype(float)), []
    while (limit is None or len(picks) < limit) and left.max() >= floor and left.max() > -np.inf:
        y, x = np.unravel_index(left.argmax(), left.shape)
        picks.append(y * left.shape[1] + x)
        left[max(0, y - gap):y + gap + 1, max(0, x - gap):x + gap + 1] = -np.inf
    return picks


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from([1, 2, 5, 1000]), st.integers(0, 4),
       st.integers(0, 2**31), st.sampled_from([0, .1, .6, 1]), st.none() | st.integers(1, 40),
       st.sampled_from([-math.inf, 0, 1, 2, 500, 1001]))
def test_peaks_are_the_greedy_ones(h, w, values, gap, seed, blocked, limit, floor):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, values + 1, (h, w)).astype(np.float32)  # with ties
    blocked_HW = rng.random((h, w)) < blocked
    before = scores.copy()
    assert peaks(scores, gap, blocked_HW, limit, floor).tolist() == greedy(scores, gap, blocked_HW, limit, floor)
    assert np.array_equal(scores, before)


@pytest.mark.parametrize('gap', [0, 1])
def test_peaks_on_a_large_map(gap):
    scores = np.random.default_rng(0).random((60, 900), np.float32)
    blocked = np.zeros(scores.shape, bool)
    assert peaks(scores, gap, blocked, 40).tolist() == greedy(scores, gap, blocked, 40, -math.inf)


# --- candidates ------------------------------------------------------------------------------------------------------


def candidates(unit, scores, taken=None, how='mean', limit=None, floor=-math.inf, segments=None) -> list:
    taken = np.zeros(scores.shape, bool) if taken is None else taken
    got = unit_candidates(unit, segments, taken, scores, how, limit, floor)
    assert got[0].dtype == np.int64 and got[1].dtype == np.float64 and got[2].dtype == np.int32
    return [column.tolist() for column in got]


@pytest.mark.parametrize('how, values', [
    ('mean', [4.5, 7.5, 9.5, 15., 18., 20.]), ('max', [9., 12., 13., 16., 19., 20.])])
def test_segments_score_the_mean_or_the_max_of_their_pixels(how, values):
    scores, segments = np.arange(21, dtype=np.float32).reshape(3, 7), grid((3, 7), (2, 3))
    assert candidates(REGION, scores, how=how, segments=segments) == [list(range(6)), values, [6, 6, 2, 3, 3, 1]]
    taken = np.zeros((3, 7), bool)
    taken[[0, 2], [0, 6]] = True  # one pixel is enough: cells 0 and 5 are gone
    assert candidates(REGION, scores, taken, how, segments=segments) == [[1, 2, 3, 4], values[1:5], [6, 2, 3, 3]]


def test_drawn_scores_are_the_segments_own_and_numbers_may_have_gaps():
    segments = np.array([[0, 0, 3], [3, 3, 5]], np.int32)
    got = unit_candidates(REGION, segments, np.zeros((2, 3), bool), np.arange(6.), 'mean', None, -math.inf)
    assert [column.tolist() for column in got] == [[0, 3, 5], [0., 3., 5.], [2, 3, 1]]
    scores = -np.ones((2, 3), np.float32)  # what is not there is no candidate, though nothing scores higher
    assert candidates(REGION, scores, how='max', segments=segments) == [[0, 3, 5], [-1.] * 3, [2, 3, 1]]


def test_windows_count_the_pixels_inside_the_image():
    scores = np.zeros((5, 7), np.float32)
    scores.flat[[0, 3, 17, 24, 34]] = 1, 3, 2, 4, 5  # 17 touches the windows of 3 and 24
    assert candidates(window(1), scores, limit=4) == [[0, 3, 24, 34], [1., 3., 4., 5.], [4, 6, 9, 4]]
    assert candidates(window(9), scores) == [[34], [5.], [35]]


def test_limit_and_floor():
    scores = np.array([[3, 1, 2, 5, 4]], np.float32)
    pixel = parse_unit('pixel')
    assert candidates(pixel, scores, limit=2) == [[3, 4], [5., 4.], [1, 1]]
    assert candidates(pixel, scores, floor=3) == [[0, 3, 4], [3., 5., 4.], [1] * 3]
    assert candidates(dict(type='pixel', radius=1), scores) == [[0, 3], [3., 5.], [1] * 2]
    assert candidates(dict(type='pixel', radius=1), scores, limit=1) == [[3], [5.], [1]]


@pytest.mark.parametrize('unit', [window(1), window(3), dict(type='pixel', radius=0), dict(type='pixel', radius=2)])
def test_round_after_round_nothing_overlaps_until_no_room_is_left(unit):
    rng, taken, picked = np.random.default_rng(0), np.zeros((17, 23), bool), []
    while True:
        ids, _, pixels = unit_candidates(unit, None, taken, rng.random((17, 23)), 'mean', 7, -math.inf)
        if not len(ids):
            break
        for i, n in zip(ids, pixels):
            new = unit_mask(unit, np.array([i]), None, taken.shape)
            assert new.sum() == n and not (new & taken).any()
            taken |= new
        picked += ids.tolist()
    gap = unit.get('radius', 2 * (unit.get('window') or 0))
    places = [divmod(i, 23) for i in picked]
    apart = min(max(abs(a - c), abs(b - d)) for (a, b), (c, d) in itertools.combinations(places, 2))
    assert apart > gap
    for place in np.ndindex(17, 23):  # none is left that would be far enough from all
        assert min(max(abs(place[0] - y), abs(place[1] - x)) for y, x in places) <= gap


# --- the collector ---------------------------------------------------------------------------------------------------


def some_candidates(images: int, rows: int, values: int = 500, seed: int = 0) -> list:
    """Candidates of some images, with ties."""
    rng = np.random.default_rng(seed)
    return [Candidates(np.full(rows, i, np.int32), np.sort(rng.choice(10 * rows, rows, False)),
                       rng.integers(0, values, rows) / 8, rng.integers(1, 10, rows).astype(np.int32))
            for i in range(images)]


def collected(parts: list, budget: int, in_pixels=False, per_image=False, select=topk) -> Collector:
    """A collector that is given what it may still choose, as `unit_candidates` does."""
    collector = Collector(select, lambda name: budget, in_pixels, per_image, (0, 'test'))
    for part in parts:
        collector.add(f'image {part.image[0]}', part.take(part.score >= collector.floor))
    return collector


def same(a: Candidates, b: Candidates) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def best(parts: list, budget: int, in_pixels: bool) -> Candidates:
    """The best of all, one by one."""
    everything = Candidates.join(parts)
    order = sorted(range(len(everything.id)), key=lambda r: (-everything.score[r], everything.image[r],
                                                             everything.id[r]))
    rows, cost = [], 0
    for row in order:
        cost += everything.pixels[row] if in_pixels else 1
        if cost > budget and rows:
            break
        rows.append(row)
    return everything.take(np.sort(rows))


@pytest.mark.parametrize('in_pixels', [False, True])
@pytest.mark.parametrize('budget', [1, 50, 3000])
def test_streaming_keeps_the_best_of_all(budget, in_pixels):
    parts = some_candidates(6, 25_000)
    collector = collected(parts, budget, in_pixels)
    assert collector.floor > 0 and collector.rows < 100_000  # it did not keep everything
    chosen = collector.result()
    assert same(chosen, best(parts, budget, in_pixels))
    spent = chosen.pixels.sum() if in_pixels else len(chosen.id)
    assert budget - 9 < spent <= max(budget, 9) if in_pixels else spent == budget


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 600), st.booleans(), st.integers(0, 2**31))
def test_the_budget_is_spent_exactly_as_far_as_there_are_units(images, rows, budget, in_pixels, seed):
    parts = some_candidates(images, rows, 6, seed)
    chosen = collected(parts, budget, in_pixels).result()
    assert same(chosen, best(parts, budget, in_pixels))
    assert in_pixels or len(chosen.id) == min(budget, images * rows)


def test_a_budget_in_pixels_buys_one_unit_at_least():
    assert collected([Candidates(*np.array([[0, 0], [4, 5], [1, 2], [900, 800]]))], 3, True).result().id.tolist() == [5]


@pytest.mark.parametrize('select', [topk, top_percent])
@pytest.mark.parametrize('in_pixels', [False, True])
def test_a_budget_per_image_is_spent_in_each(select, in_pixels):
    parts = some_candidates(4, 400)
    collector = collected(parts, 20, in_pixels, True, select)
    assert collector.rows <= 4 * 20
    chosen = collector.result()
    for i, part in enumerate(parts):
        mine = chosen.take(chosen.image == i)
        assert 20 - 9 < mine.pixels.sum() <= 20 if in_pixels else len(mine.id) == 20
        assert select is top_percent or same(mine, best([part], 20, in_pixels))
        assert mine.score.min() >= np.sort(part.score)[-20]  # 5 % of 400


def test_each_image_has_a_draw_of_its_own():
    [part] = some_candidates(1, 400)
    chosen = collected([part._replace(image=part.image + i) for i in range(4)], 5, False, True, top_percent).result()
    assert len({tuple(chosen.id[chosen.image == i]) for i in range(4)}) == 4


@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('in_pixels', [False, True])
@pytest.mark.parametrize('select', [topk, top_percent])
@pytest.mark.parametrize('ranks', [2, 3])
def test_the_choice_does_not_depend_on_who_saw_what(monkeypatch, select, in_pixels, per_image, ranks):
    parts = some_candidates(7, 12_000, 100)
    alone = collected(parts, 90, in_pixels, per_image, select)
    expected = alone.result()
    share = [collected(parts[rank::ranks], 90, in_pixels, per_image, select) for rank in range(ranks)]
    gathered = [(Candidates.join(each.parts), Candidates.join([]), each.range) for each in share]
    monkeypatch.setattr(al_patch, 'all_gather_object', lambda mine: gathered[::-1])
    for each in share:
        assert same(each.result(), expected) and (select is topk or each.range == alone.range)
    assert len(expected.id) == (90 * 7 if per_image else 90) or in_pixels


def test_an_empty_share_is_no_harm(monkeypatch):
    some, none = collected(some_candidates(2, 20), 5), collected([], 5)
    expected = some.result()
    gathered = [(Candidates.join(each.parts), Candidates.join([]), each.range) for each in (none, some)]
    monkeypatch.setattr(al_patch, 'all_gather_object', lambda mine: gathered)
    assert same(none.result(), expected) and len(expected.id) == 5
    monkeypatch.setattr(al_patch, 'all_gather_object', lambda mine: gathered[:1])
    assert len(none.result().id) == 0


# --- superpixels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def superpixels(make_cfg, tmp_path):
    """A function from an image's name and settings to its superpixels."""
    pool = Pool(make_cfg())

    def compute(name='a/00', **options) -> np.ndarray:
        unit = parse_unit(dict(type='superpixel', **{'n_segments': 12, 'compactness': 100., **options}))
        return segments_of(types.SimpleNamespace(work_dir=str(tmp_path)), unit, pool, name)

    return compute


def test_superpixels_are_fixed_and_computed_once(superpixels, monkeypatch):
    first, other = superpixels(), superpixels('a/01')
    assert first.shape == (32, 48) and first.dtype == np.int32 and set(first.flat) == set(range(12))
    assert not np.array_equal(first, other)
    slic = al_patch.slic
    monkeypatch.setattr(al_patch, 'slic', lambda *args: pytest.fail('computed again'))
    assert np.array_equal(superpixels(), first)
    monkeypatch.setattr(al_patch, 'slic', slic)
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    assert np.array_equal(slic(image, 9, 10.), slic(image, 9, 10.))
    assert slic(image[..., 0], 9, 10.).shape == slic(image[..., :1].repeat(4, 2), 9, 10.).shape == (20, 30)


def test_superpixels_of_other_settings_are_computed_anew(superpixels):
    assert superpixels().max() == 11 and superpixels(n_segments=60).max() == 59
    assert not np.array_equal(superpixels(), superpixels(compactness=10.))


def test_superpixels_are_kept_by_the_images_name(superpixels, tmp_path):
    superpixels('b/07')
    [path] = tmp_path.glob('superpixels/**/*.png')
    assert path.parts[-2:] == ('b', '07.png') and not list(tmp_path.glob('superpixels/**/*.tmp'))


def test_superpixels_stay_below_the_work_dir(superpixels):
    with pytest.raises(ValueError, match='an image name should stay below its directory'):
        superpixels('../../../a/00')


def test_superpixels_say_what_they_miss(superpixels, monkeypatch):
    monkeypatch.setitem(sys.modules, 'skimage.segmentation', None)
    with pytest.raises(ImportError, match="^`al.unit='superpixel'` needs scikit-image: pip install scikit-image"):
        superpixels()


# --- a planted uncertainty is found at its place ---------------------------------------------------------------------

TOP, LEFT, SIDE = 16, 32, 8  # the one bright square, in 32 x 48 pixels


@pytest.fixture
def found(make_cfg, build, tmp_path, monkeypatch):
    """A function from a unit, steps of the test pipeline and changes of the config to what is chosen in one image. The
    model is sure of class 0 where the image is dark, and torn between the two others where it is bright."""

    def choose(unit, steps=(), budget=1, **changes) -> Candidates:
        image = np.full((32, 48, 3), 0, np.uint8)
        image[TOP:TOP + SIDE, LEFT:LEFT + SIDE] = 255
        (tmp_path / 'img' / 'train').mkdir(parents=True)
        cv2.imwrite(str(tmp_path / 'img' / 'train' / 'x.png'), image)
        cfg = make_cfg(root=str(tmp_path), changes={
            'model.decode_head.num_convs': 0, 'model.decode_head.in_channels': 8, **changes})
        cfg.test_dataloader.dataset.pipeline[1:1] = steps
        runner = build(cfg)
        monkeypatch.setattr(runner.model.backbone, 'forward', lambda x: (
            F.avg_pool2d(x[:, :1], 4, ceil_mode=True).repeat(1, 8, 1, 1), ))
        torch.nn.init.zeros_(runner.model.decode_head.conv_seg.weight)
        torch.nn.init.zeros_(runner.model.decode_head.conv_seg.bias)
        runner.model.decode_head.conv_seg.weight.data[0] = -5 / 8
        pool = Pool(runner.cfg)
        state = dict(settings=parse_settings(dict(unit=unit)).to_dict(), seed=0, rounds=[])
        collector = Collector(topk, lambda name: budget, False, False, (0, ))
        al_patch.collect(runner, runner, state, pool, pool.names, resolve_strategy('entropy'), collector)
        return collector.result()

    return choose


WAYS = dict(
    plain=dict(), larger=dict(steps=[dict(type='Resize', scale=(72, 80))]),
    smaller=dict(steps=[dict(type='Resize', scale=(36, 24))]),
    keep_ratio=dict(steps=[dict(type='Resize', scale=(100, 50), keep_ratio=True)]),
    padded={'model.data_preprocessor.test_cfg': dict(size_divisor=40)},
    padded_by_size={'model.data_preprocessor.test_cfg': dict(size=(64, 64))},
    resized_and_padded={'steps': [dict(type='Resize', scale=(72, 48))],
                        'model.data_preprocessor.test_cfg': dict(size_divisor=40)},
    slide={'model.test_cfg': dict(mode='slide', crop_size=(32, 32), stride=(16, 16))},
    flipped=dict(steps=[dict(type='RandomFlip', prob=1.)]),
    flipped_vertically=dict(steps=[dict(type='RandomFlip', prob=1., direction='vertical')]))


@pytest.mark.parametrize('way', WAYS)
def test_the_cell_of_a_planted_uncertainty(found, way):
    chosen = found(dict(type='region', size=[SIDE, SIDE]), **WAYS[way])
    assert chosen.id.tolist() == [TOP // SIDE * 6 + LEFT // SIDE] and chosen.pixels.tolist() == [64]
    assert chosen.score[0] > .3


@pytest.mark.parametrize('unit', [dict(type='pixel', radius=1), window(2)], ids=['pixel', 'window'])
@pytest.mark.parametrize('way', WAYS)
def test_the_pixels_of_a_planted_uncertainty(found, way, unit):
    y, x = divmod(int(found(unit, **WAYS[way]).id[0]), 48)
    assert TOP <= y < TOP + SIDE and LEFT <= x < LEFT + SIDE


def test_the_image_of_a_planted_uncertainty_is_one_candidate(found):
    chosen = found('image')
    dark = 22 * math.exp(-10)  # two classes with logits ten below the third's: -2 p ln p - (1 - 2 p) ln (1 - 2 p)
    value = (4 * math.log(2) + 92 * dark) / 96  # 4 of the 96 pixels of the logits
    assert chosen.id.tolist() == [0] and chosen.score[0] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize('unit', ['image', 'pixel', 'region', window(1)], ids=str)
def test_a_score_that_is_no_number_is_an_error_in_every_unit(make_cfg, train, unit):
    cfg = make_cfg(dict(unit=unit, strategy='tiny:not_a_number', initial=['a/00']))
    with pytest.raises(ValueError, match=r"^the score of image '[ab]/\d\d' is not finite"):
        train(cfg)
