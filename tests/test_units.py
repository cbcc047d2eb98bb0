"""Units: segments, greedy peaks, draws, what can be asked for in an image, masks, and superpixels."""
import functools
import itertools
import math
import re
import sys
import types

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import al_patch
from al_patch import Peaks, Pool, Segments, Whole, dilate, grid, peaks, resolve_unit, uniform

CELLS = grid((3, 7), (2, 3)).labels


def units_of(setting, shape=(3, 7)):
    """The units of an image of this shape."""
    return resolve_unit(setting).of(types.SimpleNamespace(pool=types.SimpleNamespace(sizes=dict(x=shape))), 'x')


def window(radius: int) -> dict:
    return dict(type='region', size=[1, 1], window=radius)


# --- segments and masks ----------------------------------------------------------------------------------------------


def test_the_cells_of_a_grid():
    assert CELLS.tolist() == [[0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2], [3, 3, 3, 4, 4, 4, 5]]
    assert np.unique(grid((4, 6), (2, 3)).labels).tolist() == [0, 1, 2, 3]  # nothing left at the border
    assert not grid((4, 6), (32, 32)).labels.any()


@pytest.mark.parametrize('setting, kind', [
    ('image', Whole), (dict(type='region', size=[2, 3]), Segments), (window(1), Peaks), ('pixel', Peaks)], ids=str)
def test_the_class_of_a_setting(setting, kind):
    assert type(units_of(setting)) is resolve_unit(setting).kind is kind


@pytest.mark.parametrize('setting, ids, expected', [
    (dict(type='region', size=[2, 3]), [1, 5], [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1]]),
    (window(1), [0, 12], [[1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]),
    (dict(type='pixel', radius=5), [3, 20], [[0, 0, 0, 1, 0, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 0, 1]]),
    ('pixel', [], [[0] * 7] * 3)], ids=str)
def test_the_mask_of_chosen_units(setting, ids, expected):
    mask_HW = units_of(setting).mask(np.array(ids, np.int64))
    assert mask_HW.dtype == bool and mask_HW.astype(int).tolist() == expected


def test_dilate():
    map_HW = np.zeros((5, 6), bool)
    assert dilate(map_HW, 2) is map_HW
    map_HW[1, 2] = True
    assert dilate(map_HW, 0) is map_HW
    assert np.argwhere(dilate(map_HW, 1)).tolist() == [[y, x] for y in range(3) for x in range(1, 4)]


# --- greedy peaks ----------------------------------------------------------------------------------------------------


def in_reading_order(ids: np.ndarray) -> np.ndarray:
    """Draws by which the first of equals is chosen."""
    return (ids + 1) / 1e9


def greedy(scores_HW: np.ndarray, gap: int, blocked_HW: np.ndarray, draw, limit, floor: float, floor_draw=math.inf
           ) -> list:
    """The whole map's highest, with the smallest draw, again and again."""
    left, picks = np.where(blocked_HW, -np.inf, scores_HW.astype(float)), []
    draws = draw(np.arange(left.size)).tolist()
    while (limit is None or len(picks) < limit) and left.max() >= floor and left.max() > -np.inf:
        best = min(np.flatnonzero(left == left.max()).tolist(), key=lambda i: draws[i])
        if left.max() == floor and draws[best] > floor_draw:
            break
        picks.append(best)
        y, x = divmod(picks[-1], left.shape[1])
        left[max(0, y - gap):y + gap + 1, max(0, x - gap):x + gap + 1] = -np.inf
    return picks


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from([1, 2, 5, 1000]), st.integers(0, 4),
       st.integers(0, 2**31), st.sampled_from([0, .1, .6, 1]), st.none() | st.integers(1, 40),
       st.sampled_from([-math.inf, 0, 1, 2, 500, 1001]), st.sampled_from([math.inf, .1, .5]))
def test_peaks_are_the_greedy_ones(h, w, values, gap, seed, blocked, limit, floor, floor_draw):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, values + 1, (h, w)).astype(np.float32)  # with ties
    blocked_HW = rng.random((h, w)) < blocked
    before, args = scores.copy(), (scores, gap, blocked_HW, functools.partial(uniform, seed), limit, floor, floor_draw)
    got, expected = peaks(torch.from_numpy(scores), *args[1:]).tolist(), greedy(*args)
    assert got == expected if gap else sorted(got) == sorted(expected)
    assert np.array_equal(scores, before)


@pytest.mark.parametrize('gap', [0, 1])
def test_peaks_on_a_large_map(gap):
    scores = np.random.default_rng(0).random((60, 900), np.float32)
    args = scores, gap, np.zeros(scores.shape, bool), functools.partial(uniform, 7), 40, -math.inf
    assert set(peaks(torch.from_numpy(scores), *args[1:])) == set(greedy(*args))


@pytest.mark.parametrize('setting', ['pixel', dict(type='pixel', radius=2), dict(type='region', window=1)], ids=str)
@pytest.mark.parametrize('limit', [5, 40])
def test_on_a_flat_map_any_place_is_asked_for(setting, limit):
    """Neither the first rows nor the borders: by thirds of rows and of columns, as often as places at random."""
    units, found = units_of(setting, (60, 90)), []
    for seed in range(40):
        found += units.candidates(np.zeros(5400, np.float32), np.zeros((60, 90), bool),
                                  functools.partial(uniform, seed), limit)[0].tolist()
    assert len(found) == 40 * limit
    y, x = np.divmod(found, 90)
    counts = np.bincount(y // 20 * 3 + x // 30, minlength=9)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_a_plateau_shares_what_the_higher_ones_leave():
    scores = np.zeros((30, 40), np.float32)
    scores[3, 4:9] = 1
    picked = [set(peaks(torch.from_numpy(scores), 0, scores > 1, functools.partial(uniform, seed), 12).tolist())
              for seed in range(9)]
    assert all(len(each) == 12 and each >= set(range(124, 129)) for each in picked)
    assert len(set.union(*picked)) > 5 + 9 * 6  # hardly a place twice


# --- draws -----------------------------------------------------------------------------------------------------------


def test_an_ids_draw_depends_on_nothing_beside_it():
    ids = np.array([7, 0, 123456789012, 3])
    first = uniform(5, ids)
    assert first.dtype == np.float64 and ((0 < first) & (first < 1)).all()
    assert uniform(5, ids[::-1]).tolist() == first[::-1].tolist() and uniform(5, ids[2:3]).tolist() == [first[2]]
    assert len({*first, *uniform(6, ids)}) == 8


def test_draws_are_those_of_splitmix64():
    """The first numbers of its reference code for the state 1234567."""
    expected = 6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821
    assert uniform(1234567, np.arange(5)).tolist() == [((number >> 12) + .5) / 2**52 for number in expected]


def test_draws_are_uniform_and_independent():
    for a, b in itertools.combinations([uniform(seed, np.arange(20000)) for seed in (0, 1, 2**48 - 1)], 2):
        assert scipy.stats.kstest(a, 'uniform').pvalue > .01 < scipy.stats.kstest(b, 'uniform').pvalue
        table = np.histogram2d(a, b, 10, [[0, 1], [0, 1]])[0]
        assert scipy.stats.chisquare(table.reshape(-1)).pvalue > .001
        table = np.histogram2d(a[1:], a[:-1], 10, [[0, 1], [0, 1]])[0]
        assert scipy.stats.chisquare(table.reshape(-1)).pvalue > .001


# --- what can be asked for -------------------------------------------------------------------------------------------


def candidates(units, scores, taken=None, reduce='mean', limit=None, floor=-math.inf) -> list:
    scores = torch.as_tensor(scores)
    taken = np.zeros(scores.shape, bool) if taken is None else taken
    values = units.values(scores, reduce) if scores.ndim == 2 else scores.numpy()
    got = units.candidates(values, taken, in_reading_order, limit, floor)
    assert got[0].dtype == np.int64 and got[1].dtype == np.float64 and got[2].dtype == np.int32
    return [column.tolist() for column in got]


@pytest.mark.parametrize('reduce, value', [('mean', 3.), ('max', 6.), (25, 5.5), (25., 5.5), (1, 6.), (50, 4.5)])
def test_a_whole_image_is_one_candidate_with_a_number_for_its_map(reduce, value):
    scores = torch.tensor([[0., 1, 2, 3], [3, 4, 5, 6]])
    assert candidates(Whole(), scores, False, reduce) == [[0], [value], [1]]
    assert candidates(Whole(), scores, True, reduce) == [[], [], []]
    assert candidates(Whole(), torch.tensor([.25], dtype=torch.float64), False, reduce) == [[0], [.25], [1]]  # drawn
    known = Whole().known(Whole().values(scores, reduce), True, in_reading_order, None)
    assert [column.tolist() for column in known] == [[0], [value], [1]]
    assert Whole().number == 1 and Whole().weights(np.zeros(1, np.int64), (2, 4), 'cpu') is None


@pytest.mark.parametrize('reduce, values', [
    ('mean', [4.5, 7.5, 9.5, 15., 18., 20.]), ('max', [9., 12., 13., 16., 19., 20.])])
def test_segments_score_the_mean_or_the_max_of_their_pixels(reduce, values):
    scores, segments = np.arange(21, dtype=np.float32).reshape(3, 7), Segments(CELLS)
    assert candidates(segments, scores, reduce=reduce) == [list(range(6)), values, [6, 6, 2, 3, 3, 1]]
    taken = np.zeros((3, 7), bool)
    taken[[0, 2], [0, 6]] = True  # one pixel is enough: cells 0 and 5 are gone
    assert candidates(segments, scores, taken, reduce) == [[1, 2, 3, 4], values[1:5], [6, 2, 3, 3]]
    of_all = segments.values(torch.from_numpy(scores), reduce)
    known = segments.known(of_all, CELLS < 2, in_reading_order, 1)  # all, whatever the limit
    assert [column.tolist() for column in known] == [[0, 1], values[:2], [6, 6]]


def test_drawn_scores_are_the_segments_own_and_numbers_may_have_gaps():
    segments = Segments(np.array([[0, 0, 3], [3, 3, 5]], np.int32))
    assert segments.number == 6
    taken = np.zeros((2, 3), bool)
    assert candidates(segments, torch.arange(6.), taken) == [[0, 3, 5], [0., 3., 5.], [2, 3, 1]]
    scores = -np.ones((2, 3), np.float32)  # what is not there is no candidate, though nothing scores higher
    assert candidates(segments, scores, reduce='max') == [[0, 3, 5], [-1.] * 3, [2, 3, 1]]


def test_windows_count_the_pixels_inside_the_image():
    scores = np.zeros((5, 7), np.float32)
    scores.flat[[0, 3, 17, 24, 34]] = 1, 3, 2, 4, 5  # 17 touches the windows of 3 and 24
    assert candidates(units_of(window(1), (5, 7)), scores, limit=4) == [[0, 3, 24, 34], [1., 3., 4., 5.], [4, 6, 9, 4]]
    assert candidates(units_of(window(9), (5, 7)), scores) == [[34], [5.], [35]]
    flat = candidates(units_of(window(1), (5, 7)), scores.reshape(-1), np.zeros((5, 7), bool), limit=4)  # as if drawn
    assert flat == candidates(units_of(window(1), (5, 7)), scores, limit=4)


def test_limit_and_floor():
    scores = np.array([[3, 1, 2, 5, 4]], np.float32)
    pixels, apart = units_of('pixel', (1, 5)), units_of(dict(type='pixel', radius=1), (1, 5))
    assert candidates(pixels, scores, limit=2) == [[3, 4], [5., 4.], [1, 1]]
    assert candidates(pixels, scores, floor=3) == [[0, 3, 4], [3., 5., 4.], [1] * 3]
    assert candidates(apart, scores) == [[0, 3], [3., 5.], [1] * 2]
    assert candidates(apart, scores, limit=1) == [[3], [5.], [1]]


@pytest.mark.parametrize('setting', [window(1), window(3), 'pixel', dict(type='pixel', radius=2)], ids=str)
def test_round_after_round_nothing_overlaps_until_no_room_is_left(setting):
    units, rng, taken, picked = units_of(setting, (17, 23)), np.random.default_rng(0), np.zeros((17, 23), bool), []
    while True:
        ids, _, pixels = candidates(units, rng.random((17, 23)), taken, limit=7)
        if not ids:
            break
        for i, n in zip(ids, pixels):
            new = units.mask(np.array([i]))
            assert new.sum() == n and not (new & taken).any()
            taken |= new
        picked += ids
    gap = 2 * setting['window'] if 'window' in setting else resolve_unit(setting).setting['radius']
    places = [divmod(i, 23) for i in picked]
    apart = min(max(abs(a - c), abs(b - d)) for (a, b), (c, d) in itertools.combinations(places, 2))
    assert apart > gap
    for place in np.ndindex(17, 23):  # none is left that would be far enough from all
        assert min(max(abs(place[0] - y), abs(place[1] - x)) for y, x in places) <= gap


@pytest.mark.parametrize('setting, radius', [(window(1), 1), (window(3), 3), ('pixel', 0),
                                             (dict(type='pixel', radius=2), 0)], ids=str)
def test_a_random_few_are_known_of_what_is_labelled(setting, radius):
    """Each lies in what is labelled, and they are apart: two labelled windows may touch, two labelled pixels, too."""
    rng, taken = np.random.default_rng(0), np.zeros((40, 50), bool)
    taken[5:25, 8:40] = True
    scores = rng.random((40, 50), np.float32).reshape(-1)
    units = units_of(setting, (40, 50))
    draws = [units.known(scores, taken, functools.partial(uniform, seed), 6) for seed in (0, 0, 1)]
    assert draws[0][0].tolist() == draws[1][0].tolist() != draws[2][0].tolist()
    for ids, values, pixels in draws:
        assert len(ids) == 6 and pixels.tolist() == [(2 * radius + 1)**2] * 6
        assert values.tolist() == scores[ids].tolist()
        masks = [Peaks((40, 50), radius, 0).mask(np.array([i])) for i in ids]
        assert all((mask & ~taken).sum() == 0 for mask in masks) and sum(masks).max() == 1
    everything = units.known(scores, taken, in_reading_order, None)[0]
    assert len(everything) == taken.sum() if radius == 0 else 6 < len(everything) <= taken.sum() / (2 * radius + 1)**2


# --- superpixels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def superpixels(make_cfg, tmp_path):
    """A function from an image's name and settings to its superpixels."""
    state = types.SimpleNamespace(work_dir=str(tmp_path), pool=Pool(make_cfg()))

    def compute(name='a/00', **options) -> np.ndarray:
        return resolve_unit(dict(dict(type='superpixel', n_segments=12, compactness=100.), **options)).of(
            state, name).labels

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
    assert superpixels().max() == 11 and superpixels(n_segments=60).max() == 39  # 5 x 8 of the grid
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


def test_superpixels_of_another_size_than_their_image_are_named(superpixels, tmp_path):
    superpixels()
    [path] = tmp_path.glob('superpixels/**/*.png')
    al_patch.write_png(str(path), np.zeros((30, 48), np.uint16))
    with pytest.raises(ValueError, match=rf'^{path} cannot be used .*size should be that of its image, \(32, 48\), '
                                         r'with one channel or three, but is \(30, 48\): delete it'):
        superpixels()
    path.unlink()
    assert superpixels().shape == (32, 48)


@pytest.mark.parametrize('shape', [(32, 48, 3), (31, 47, 3), (32, 47), (31, 48, 1), (32, 48, 2), (32, 48, 5)], ids=str)
@pytest.mark.parametrize('image', ['speckle', 'binary', 'flat', 'black', 'halves'])
def test_superpixels_are_in_one_piece_and_half_as_many_as_asked_for_at_least(shape, image):
    rng = np.random.default_rng(0)
    image = dict(speckle=rng.integers(0, 256, shape), binary=255 * rng.integers(0, 2, shape), flat=np.full(shape, 9),
                 black=np.zeros(shape), halves=np.full(shape, 9) * (np.arange(shape[1]) < 24).reshape(
                     -1, *[1] * (len(shape) - 2)))[image].astype(np.uint8)
    for n in (4, 12, 40):
        labels = al_patch.slic(image, n, 10.)
        assert labels.shape == shape[:2] and labels.dtype == np.uint16
        assert labels.max() + 1 >= n / 2 and set(labels.flat) == set(range(labels.max() + 1))
        assert [scipy.ndimage.label(labels == i)[1] for i in range(labels.max() + 1)] == [1] * (labels.max() + 1)


def test_superpixels_follow_what_is_in_the_image():
    """Two halves under noise: no segment has pixels of both, but for the cell of two pixels that the border crosses."""
    image = np.random.default_rng(0).normal([[[80]], [[81]]], 3, (2, 64, 48)).reshape(128, 48)
    image[71:] += 90
    labels = al_patch.slic(image.clip(0, 255).astype(np.uint8), 40, 10.)
    assert not set(labels[:70].flat) & set(labels[72:].flat)


def test_images_of_other_kinds_have_superpixels():
    """What a value is scaled by, and the order of channels, does not matter; numbers that are none do."""
    image = np.random.default_rng(0).integers(0, 60, (24, 36, 3)).repeat(2, 0).repeat(2, 1)
    expected = al_patch.slic(image.astype(np.uint8), 30, 10.)
    for other in (image.astype(np.int64), (image * 64).astype(np.uint16), image / 4096 - 3):
        assert (al_patch.slic(other, 30, 10.) == expected).mean() > .99
    with pytest.raises(ValueError, match='NaN'):
        al_patch.slic(np.where(image == 7, np.nan, image), 30, 10.)


def test_more_superpixels_than_16_bits_number_are_refused(monkeypatch):
    monkeypatch.setattr('skimage.segmentation.slic', lambda *args, **kwargs: np.arange(2**16 + 4).reshape(4, -1))
    with pytest.raises(ValueError, match='`al.unit.n_segments` should be smaller than 60000, which gives 65540'):
        al_patch.slic(np.zeros((8, 8, 3), np.uint8), 60000, 10.)


@pytest.mark.parametrize('kind', ['8 bits', '16 bits', 'three channels'])
def test_superpixels_of_the_users_own(superpixels, tmp_path, kind):
    """Numbers mean r + 256 g + 65536 b; the segments are the same, whatever their numbers."""
    own, path = np.random.default_rng(0).integers(0, 200, (32, 48)), str(tmp_path / 'own' / 'a' / '00.png')
    if kind == 'three channels':
        own = own * 83000  # up to 16.5 million
        al_patch.write_png(path, np.stack([own % 256, own // 256 % 256, own // 65536], 2).astype(np.uint8))
    else:
        own = own * 300 if kind == '16 bits' else own
        al_patch.write_png(path, own.astype(np.uint16 if kind == '16 bits' else np.uint8))
    found = superpixels(folder=str(tmp_path / 'own'))
    pairs = set(zip(own.flat, found.flat))
    assert len(pairs) == len(set(own.flat)) == len(set(found.flat)) and found.max() < 2**16
    assert found.dtype.kind == 'i' and not list(tmp_path.glob('superpixels'))
    with pytest.raises(ValueError, match='own/a/01.png cannot be used .there is no such file.'):
        superpixels('a/01', folder=str(tmp_path / 'own'))


@pytest.mark.parametrize('shape', [(31, 48), (32, 48, 4), (32, 48, 2), (31, 48, 3)], ids=str)
def test_superpixels_of_the_users_own_have_to_fit(superpixels, tmp_path, shape):
    al_patch.write_png(str(tmp_path / 'own' / 'a' / '00.png'), np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r'own/a/00.png cannot be used .*size should be that of its image, \(32, 48\), '
                                         rf'with one channel or three, but is {re.escape(str(shape))}\)$'):
        superpixels(folder=str(tmp_path / 'own'))
