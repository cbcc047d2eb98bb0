"""The query: what is chosen of all candidates, in any number of processes, and where a planted uncertainty is found."""
import contextlib
import copy
import functools
import itertools
import math
import os
import os.path as osp
import re
import types

import cv2
import mmengine
import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict

import al_patch
import al_report
from al_patch import AL_SELECTORS, Candidates, Collector, Pool, Query, State, parse_settings, power_draw, query, topk

top_percent = AL_SELECTORS.get('top_percent')

# --- the collector ---------------------------------------------------------------------------------------------------


def some_candidates(images: int, rows: int, values: int = 500, seed: int = 0) -> list:
    """Candidates of some images, with ties."""
    rng = np.random.default_rng(seed)
    return [Candidates(np.full(rows, i, np.int32), np.sort(rng.choice(10 * rows, rows, False)),
                       rng.integers(0, values, rows) / 8, rng.integers(1, 10, rows).astype(np.int32), rng.random(rows))
            for i in range(images)]


def collected(parts: list, budget: int, in_pixels=False, per_image=False, select=topk) -> Collector:
    """A collector that is given what it may still choose, as units do."""
    collector = Collector(select, lambda name: budget, per_image, in_pixels, (0, 'test'))
    for part in parts:
        is_over = (part.score > collector.floor) | (part.score == collector.floor) & (part.draw <= collector.floor_draw)
        collector.add(f'image {part.image[0]}', part.rows(is_over), part.rows(slice(0)))
    return collector


def same(a: Candidates, b: Candidates) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def best(parts: list, budget: int, in_pixels: bool) -> Candidates:
    """The best of all, one by one; of equals the one with the smallest draw."""
    everything = Candidates.join(parts)
    order = sorted(range(len(everything.id)), key=lambda r: (-everything.score[r], everything.draw[r]))
    rows, cost = [], 0
    for row in order:
        cost += everything.pixels[row] if in_pixels else 1
        if cost > budget and rows:
            break
        rows.append(row)
    return everything.rows(np.sort(rows))


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


@pytest.mark.parametrize('in_pixels', [False, True])
def test_equal_scores_of_all_images_compete_by_their_draws_in_bounded_memory(in_pixels):
    """Nothing scores below the floor, so every image is looked at in full."""
    parts = some_candidates(30, 20_000, 1)
    collector = collected(parts, 900, in_pixels)
    assert collector.floor == 0 and collector.rows < 100_000
    chosen = collector.result()
    assert same(chosen, best(parts, 900, in_pixels))
    assert scipy.stats.chisquare(np.bincount(chosen.image, minlength=30)).pvalue > 1e-3
    assert same(collected(parts[::-1], 900, in_pixels).result(), chosen)  # in whatever order images come


def lean(parts: list) -> list:
    """As single pixels come that are the highest of a whole pool."""
    return [part._replace(image=part.image[0], id=part.id.astype(np.int32), score=part.score.astype(np.float32),
                          pixels=np.int32(1), draw=None) for part in parts]


def collected_lean(parts: list, budget: int, everything: list) -> Collector:
    """Of every part as much as the collector's floor lets pass."""
    collector, draws = Collector(topk, lambda name: budget, in_pixels=True, seed=(0, 'test')), {
        part.image[0]: dict(zip(part.id, part.draw)) for part in everything}
    collector.draw = lambda i, ids: np.array([draws[i][each] for each in ids.tolist()])
    for full, part in zip(parts, lean(parts)):
        is_over = (part.score > collector.floor) | (part.score == collector.floor) & (
            full.draw <= collector.floor_draw)
        collector.add(f'image {part.image}', part.rows(is_over), full.rows(slice(0)))
    return collector


@pytest.mark.parametrize('ranks', [1, 3])
@pytest.mark.parametrize('budget', [1, 50, 3000, 10**6])
@pytest.mark.parametrize('values', [1, 6, 500])
def test_single_pixels_are_kept_without_what_can_be_had_again(monkeypatch, values, budget, ranks):
    parts = [part._replace(pixels=np.ones_like(part.pixels)) for part in some_candidates(9, 4_000, values)]
    share = [collected_lean(parts[rank::ranks], budget, parts) for rank in range(ranks)]
    assert ranks > 1 or budget > 3000 or share[0].rows < 1.25 * budget + 2**13 + 4000
    if ranks > 1:
        as_ranks(monkeypatch, share)
    expected = best(parts, budget, True)
    for each in share:
        chosen = each.result()
        assert chosen.draw is None and chosen.score.dtype == np.float32 and chosen.id.dtype == np.int32
        for column in ('image', 'id', 'score', 'pixels'):
            assert np.array_equal(getattr(chosen, column), getattr(expected, column))


def test_ranks_send_little_more_than_the_budget(monkeypatch):
    """Eight ranks, each of which could spend all of it."""
    share = [collected(some_candidates(4, 25_000, 10**6, rank), 8192) for rank in range(8)]
    sketches = []
    monkeypatch.setattr(al_patch, 'all_gather_object', lambda mine: sketches.append(mine) or [mine])
    for each in share:
        copy.copy(each).drop_lower()
    monkeypatch.setattr(al_patch, 'all_gather_object', lambda mine: sketches)
    for each in share:
        each.drop_lower()
    assert 8192 <= sum(len(part.id) for each in share for part in each.parts) <= 8192 * (1 + 8 / 1024)


def test_vectors_that_fill_memory_lie_on_disk(monkeypatch, tmp_path):
    parts = candidates_with_vectors(9, 60)
    expected = collected_with_vectors(parts, AL_SELECTORS.get('kcenter')).result()
    monkeypatch.setattr(al_patch, 'IN_MEMORY', 100 * 4 * 4)
    collector = Collector(AL_SELECTORS.get('kcenter'), lambda name: 30, seed=(0, 'test'), progress=.5)
    collector.folder = str(tmp_path)
    for i, (candidates, known) in enumerate(parts):
        collector.add(f'image {i}', candidates, known, 65)
    assert [isinstance(part.vector, np.memmap) for part in collector.parts] == [False] + [True] * 5
    assert same(collector.result(), expected) and not os.listdir(tmp_path)


@pytest.mark.parametrize('in_pixels', [False, True])
@pytest.mark.parametrize('name', ['kcenter', 'kmeanspp', 'real', 'barycentre'])
def test_where_pairs_are_out_of_reach_the_choice_is_made_in_blocks(monkeypatch, name, in_pixels):
    rng = np.random.default_rng(0)
    parts = [Candidates(np.full(4000, i, np.int32), np.arange(4000), rng.random(4000), np.full(4000, 3, np.int32),
                        rng.random(4000), *(rng.random((4000, 3)).astype(np.float32) for _ in range(3)))
             for i in range(10)]
    monkeypatch.setattr(al_patch, 'FEW_PAIRS', 10**6)

    def chosen(images: list) -> Candidates:
        collector = Collector(AL_SELECTORS.get(name), lambda name: 301, in_pixels=in_pixels, seed=(0, 'test'))
        for part in images:
            collector.add('an image', part, part.rows(slice(0)))
        rows = collector.result()
        assert collector.blocks == 3  # 40,000 of at most 20,000
        return rows

    rows = chosen(parts)
    assert (rows.pixels.sum() if in_pixels else len(rows.id)) in range(298, 302)
    assert len({*zip(rows.image, rows.id)}) == len(rows.id) and same(chosen(parts[::-1]), rows)  # in whatever order
    draws = np.concatenate([parts[i].draw[parts[i].id == j] for i, j in zip(rows.image, rows.id)])
    assert np.bincount((3 * draws).astype(int)).tolist() == ([100 // 3] * 2 + [34] if in_pixels else [100, 100, 101])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 600), st.booleans(), st.integers(0, 2**31))
def test_the_budget_is_spent_exactly_as_far_as_there_are_units(images, rows, budget, in_pixels, seed):
    parts = some_candidates(images, rows, 6, seed)
    chosen = collected(parts, budget, in_pixels).result()
    assert same(chosen, best(parts, budget, in_pixels))
    assert in_pixels or len(chosen.id) == min(budget, images * rows)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(1, 900), st.booleans(), st.sampled_from([.5, 1., 8.]), st.integers(0, 2**31))
def test_what_noise_ranks_does_not_depend_on_what_was_dropped_on_the_way(images, budget, in_pixels, beta, seed):
    """ln s + noise of each, in order, as far as the budget goes."""
    parts = [part._replace(score=part.score + .1) for part in some_candidates(images, 5000, 50, seed)]
    collector = collected(parts, budget, in_pixels, select=functools.partial(power_draw, beta=beta))
    assert collector.rows < 5000 + 1.25 * budget + 2**13 and collector.floor == -math.inf
    whole = Candidates.join(parts).shuffled()
    noisy = np.log(whole.score) - np.log(-np.log(al_patch.uniform(0, whole.draw))) / beta
    order = np.argsort(-noisy, kind='stable')
    n = max(1, np.searchsorted(np.cumsum(whole.pixels[order]), budget, 'right')) if in_pixels else budget
    assert same(collector.result(), whole.rows(order[:n]).sorted())


def test_a_budget_in_pixels_buys_one_unit_at_least():
    two = Candidates(*np.array([[0, 0], [4, 5], [1, 2], [900, 800], [.1, .2]]))
    assert collected([two], 3, True).result().id.tolist() == [5]


@pytest.mark.parametrize('select', [topk, top_percent])
@pytest.mark.parametrize('in_pixels', [False, True])
def test_a_budget_per_image_is_spent_in_each(select, in_pixels):
    parts = some_candidates(4, 400)
    collector = collected(parts, 20, in_pixels, True, select)
    assert collector.rows <= 4 * 20
    chosen = collector.result()
    for i, part in enumerate(parts):
        mine = chosen.rows(chosen.image == i)
        assert 20 - 9 < mine.pixels.sum() <= 20 if in_pixels else len(mine.id) == 20
        assert select is top_percent or same(mine, best([part], 20, in_pixels))
        assert mine.score.min() >= np.sort(part.score)[-20]  # 5 % of 400


@pytest.mark.parametrize('select, per_image, refused', [
    ('kcenter', False, True), ('softrank', False, True), ('topk', False, False), ('power', False, False),
    ('softrank', True, False)], ids=str)
def test_more_candidates_than_memory_are_refused_by_those_of_a_few_images(make_state, monkeypatch, select, per_image,
                                                                          refused):
    """Two images of 1000 candidates: 2,975 images have 3 million, of 32 bytes, and vectors of 16 more."""
    state = make_state(dict(unit='pixel', budget=9, per_image=per_image))
    collector = Collector(AL_SELECTORS.get(select), lambda name: 9, per_image, seed=(0, 'test'))
    for part in some_candidates(2, 1000):
        vectors = np.zeros((1000, 4), np.float32) if select == 'kcenter' else None
        collector.add(f'{part.image[0]}', part._replace(vector=vectors), part.rows(slice(0)))
    size = 2975 * 1000 * (4 + 8 + 8 + 4 + 8 + 16 * (select == 'kcenter'))
    for memory, error in ((size + 2**20, False), (size - 2**20, refused)):
        monkeypatch.setattr(os, 'sysconf', dict(SC_PHYS_PAGES=memory, SC_PAGE_SIZE=1).get)
        with pytest.raises(ValueError, match='2,975,000 candidates at once take') if error else \
                contextlib.nullcontext():
            al_report.check_memory(collector, 2975, state)


# --- any number of processes -----------------------------------------------------------------------------------------


def as_ranks(monkeypatch, share: list) -> None:
    """Let every collector gather what all of them have, in another order."""
    facts, sketches = [(each.range, each.number, each.split) for each in share], []
    monkeypatch.setattr(al_patch, 'all_gather_object', lambda mine: sketches.append(mine) or [mine])
    for each in share:
        if each.keeps_best:
            copy.copy(each).drop_lower()
    monkeypatch.setattr(al_patch, 'all_gather_object', lambda mine: (facts if len(mine) == 3 else sketches)[::-1])
    sent = [copy.copy(each) for each in share]
    for each in sent:
        if each.keeps_best and len(sent) > 1:
            each.drop_lower()
    rows = [[Candidates.join(parts) for parts in column]
            for column in zip(*((each.parts, each.known) for each in sent[::-1]))]
    turns = itertools.cycle(rows)
    monkeypatch.setattr(al_patch, 'gathered_rows', lambda parts, prefix: next(turns))


@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('in_pixels', [False, True])
@pytest.mark.parametrize('select', [topk, top_percent, power_draw])
@pytest.mark.parametrize('ranks', [2, 3])
def test_the_choice_does_not_depend_on_who_saw_what(monkeypatch, select, in_pixels, per_image, ranks):
    parts = some_candidates(7, 12_000, 100)
    alone = collected(parts, 90, in_pixels, per_image, select)
    expected = alone.result()
    share = [collected(parts[rank::ranks], 90, in_pixels, per_image, select) for rank in range(ranks)]
    as_ranks(monkeypatch, share)
    for each in share:
        assert same(each.result(), expected) and (select is topk or each.range == alone.range)
    assert len(expected.id) == (90 * 7 if per_image else 90) or in_pixels


def test_an_empty_share_is_no_harm(monkeypatch):
    some, none = collected(some_candidates(2, 20), 5), collected([], 5)
    expected = copy.copy(some).result()
    as_ranks(monkeypatch, [none, some])
    assert same(none.result(), expected) and len(expected.id) == 5
    as_ranks(monkeypatch, [none])
    assert len(none.result().id) == 0


def candidates_with_vectors(images: int, rows: int) -> list:
    """Of each image its candidates, and what is labelled of it."""
    parts = []
    for i in range(images):
        n, rng = rows if i % 4 else 0, np.random.default_rng(i)
        vectors, probs = (torch.from_numpy(rng.normal(size=(rows + 5, 4))).softmax(1).float().numpy() for _ in range(2))
        everything = Candidates(np.full(rows + 5, i, np.int32), np.arange(rows + 5), rng.random(rows + 5),
                                np.full(rows + 5, 3, np.int32), rng.random(rows + 5), vectors, probs, probs)
        parts.append((everything.rows(slice(n)), everything.rows(slice(n, None))))
    return parts


def collected_with_vectors(parts: list, select) -> Collector:
    collector = Collector(select, lambda name: 30, seed=(0, 'test'), progress=.5)
    for i, (candidates, known) in enumerate(parts):
        collector.add(f'image {i}', candidates, known, 65)
    return collector


@pytest.mark.parametrize('ranks', [1, 2, 3])
@pytest.mark.parametrize('name', [name for name in AL_SELECTORS.module_dict if name != 'topk'])
def test_the_choice_of_every_selector_does_not_depend_on_the_number_of_processes(monkeypatch, name, ranks):
    parts, select = candidates_with_vectors(9, 60), AL_SELECTORS.get(name)
    if name == 'real':
        select = functools.partial(select, clusters=5)
    expected = collected_with_vectors(parts, select).result()
    share = [collected_with_vectors(parts[rank::ranks], select) for rank in range(ranks)]
    as_ranks(monkeypatch, share)
    for each in share:
        got = each.result()
        assert np.array_equal(got.image, expected.image) and np.array_equal(got.id, expected.id)
        assert np.array_equal(got.score, expected.score) and got.vector is got.probs is got.predicted is None
    assert len(expected.id) == 30 and len(set(zip(expected.image, expected.id))) == 30


@pytest.mark.parametrize('name', ['kcenter', 'barycentre'])
def test_what_is_labelled_counts_wherever_it_was_seen(name):
    parts, select = candidates_with_vectors(9, 60), AL_SELECTORS.get(name)
    blind = [(candidates, known.rows(slice(0))) for candidates, known in parts]
    chosen, other = (collected_with_vectors(each, select).result() for each in (parts, blind))
    assert not np.array_equal(chosen.id, other.id)


@pytest.mark.parametrize('picks', [[0, 0, 1], [0, 1], [0, 1, 2, 3]], ids=str)
def test_a_selector_that_does_not_choose_as_many_as_asked_for_is_refused(picks):
    with pytest.raises(ValueError, match='^`al.strategy.select` should choose 3 different candidates, but got '):
        collected(some_candidates(1, 9), 3, select=lambda scores_N, budget, generator: torch.tensor(picks)).result()


# --- a planted uncertainty is found at its place ---------------------------------------------------------------------

TOP, LEFT, SIDE = 16, 32, 8  # the one bright square, in 32 x 48 pixels
INSIDE = (TOP + SIDE // 2) * 48 + LEFT + SIDE // 2
DARK, BRIGHT = -2., 127 / 64  # as the data preprocessor gives them


def window(radius: int) -> dict:
    return dict(type='region', size=[1, 1], window=radius)


@pytest.fixture
def planted(make_cfg, build, tmp_path, monkeypatch):
    """A function from settings, steps of the test pipeline and changes of the config to a state before its query, and
    the trainer. The one image is dark with a bright square, and a feature of the model is brightness. It is sure of
    class 0 where the image is dark, and torn between the two others where it is bright."""

    def plant(al, steps=(), **changes) -> tuple:
        image = np.zeros((32, 48, 3), np.uint8)
        image[TOP:TOP + SIDE, LEFT:LEFT + SIDE] = 255
        (tmp_path / 'img' / 'train').mkdir(parents=True)
        cv2.imwrite(str(tmp_path / 'img' / 'train' / 'x.png'), image)
        cfg = make_cfg(dict(al, budget=1), root=str(tmp_path), changes={'model.decode_head.num_convs': 0, **changes})
        cfg.test_dataloader.dataset.pipeline[1:1] = steps
        runner = build(cfg)
        monkeypatch.setattr(runner.model.backbone, 'forward', lambda x: (
            F.avg_pool2d(x[:, :1], 4, ceil_mode=True).repeat(1, 8, 1, 1), ))
        layer = runner.model.decode_head.conv_seg
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        layer.weight.data[0] = -5 / 8
        (tmp_path / 'round_0').mkdir(exist_ok=True)
        torch.save(runner.model.state_dict(), tmp_path / 'round_0' / 'planted.pth')
        first = dict(asked={}, checkpoints=dict(last='planted.pth'))
        state = State(dict(seed=0, config={}, rounds=[first]), str(tmp_path), parse_settings(cfg.al), runner,
                      Pool(runner.cfg))
        return state, runner

    return plant


@pytest.fixture
def found(planted):
    """A function from a unit, steps and changes to the state after the query, and the ids that are asked for."""

    def choose(unit, **way) -> tuple:
        state, trainer = planted(dict(unit=unit, strategy='entropy'), **way)
        asked = query(state, trainer)
        assert list(asked) == ['x']
        return state, asked['x']

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
    state, ids = found(dict(type='region', size=[SIDE, SIDE]), **WAYS[way])
    assert ids.tolist() == [TOP // SIDE * 6 + LEFT // SIDE] and state.scores['x'] > .3
    assert np.argwhere(state.units('x').mask(ids)).tolist() == [
        [y, x] for y in range(TOP, TOP + SIDE) for x in range(LEFT, LEFT + SIDE)]


@pytest.mark.parametrize('unit', [dict(type='pixel', radius=1), window(2)], ids=['pixel', 'window'])
@pytest.mark.parametrize('way', WAYS)
def test_the_pixels_of_a_planted_uncertainty(found, way, unit):
    y, x = divmod(int(found(unit, **WAYS[way])[1][0]), 48)
    assert TOP <= y < TOP + SIDE and LEFT <= x < LEFT + SIDE


def test_the_image_of_a_planted_uncertainty_is_one_candidate(found):
    state, ids = found('image')
    dark = 22 * math.exp(-10)  # two classes with logits ten below the third's: -2 p ln p - (1 - 2 p) ln (1 - 2 p)
    value = (4 * math.log(2) + 92 * dark) / 96  # 4 of the 96 pixels of the logits
    assert ids is None and state.scores == dict(x=pytest.approx(value, rel=1e-3))


# --- the vector of a place in the image ------------------------------------------------------------------------------

VECTOR_WAYS = {key: WAYS[key] for key in ('plain', 'larger', 'padded', 'resized_and_padded', 'flipped')}
PLACES = dict(cell=(dict(type='region', size=[SIDE, SIDE]), TOP // SIDE * 6 + LEFT // SIDE), window=(window(1), INSIDE),
              pixel=('pixel', INSIDE))


@pytest.fixture
def candidates_of(planted):
    """A function from unit, strategy and the like to all candidates of the one image."""

    def collect(unit, strategy, amp=False, **way) -> Candidates:
        state, runner = planted(dict(unit=unit, strategy=strategy), **way)
        optim_wrapper = ConfigDict(type='AmpOptimWrapper' if amp else 'OptimWrapper')
        this = Query(state, types.SimpleNamespace(model=runner.model, cfg=ConfigDict(optim_wrapper=optim_wrapper)))
        with torch.no_grad():
            [(candidates, known, _)] = [this.candidates(name, seen) for name, seen in this.look()]
        assert not len(known.id)
        return candidates

    return collect


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('way', VECTOR_WAYS)
def test_a_vector_is_that_of_its_place(candidates_of, way, place):
    unit, bright = PLACES[place]
    rows = candidates_of(unit, dict(type='coreset', shortlist=1536), **VECTOR_WAYS[way])
    [row] = np.flatnonzero(rows.id == bright) if place != 'window' else \
        [np.abs(np.divmod(rows.id, 48) - np.array(divmod(bright, 48))[:, None]).max(0).argmin()]  # drawn, and apart
    y, x = np.divmod(rows.id, 48)
    far = rows.id == 0 if place == 'cell' else (np.abs(y - TOP - 4) > 12) | (np.abs(x - LEFT - 4) > 12)
    assert rows.vector.shape == (len(rows.id), 8) and rows.vector[far] == pytest.approx(DARK)
    assert rows.vector[row].max() > 1.2 and rows.vector.max() <= BRIGHT + 1e-4
    assert way not in ('plain', 'flipped') or rows.vector[row] == pytest.approx(BRIGHT, abs=.01)


def with_classes(scores_N, budget, generator, probs_NC, predicted_NC):
    """A selector that asks for all that a candidate has of classes."""
    return topk(scores_N, budget, generator)


@pytest.mark.parametrize('unit', [dict(type='region', size=[5, 7]), dict(type='superpixel', n_segments=20), 'pixel',
                                  window(2)], ids=lambda unit: unit if isinstance(unit, str) else unit['type'])
@pytest.mark.parametrize('way', WAYS)
def test_scores_and_classes_are_those_of_the_images_own_pixels(candidates_of, planted, monkeypatch, way, unit):
    """Of the softmax of mmseg's own logits, after all that it does to them."""
    kept = []
    monkeypatch.setattr(Query, '__init__', lambda self, state, trainer, init=Query.__init__: (
        kept.append((state, trainer)), init(self, state, trainer))[1])
    rows = candidates_of(unit, dict(type='entropy', select='test_query:with_classes'), **WAYS[way])
    [(state, trainer)] = kept
    with torch.no_grad():
        [sample] = trainer.model.test_step(mmengine.dataset.pseudo_collate([state.pool['x']]))
    probs_CHW = sample.seg_logits.data.float().softmax(0).double().numpy()
    score_HW, units = -(probs_CHW * np.log(probs_CHW)).sum(0), state.units('x')
    assert score_HW.shape == (32, 48) and len(rows.id)
    predicted_CHW = np.eye(3)[probs_CHW.argmax(0)].transpose(2, 0, 1)
    for i, (id, score, probs, predicted) in enumerate(zip(rows.id, rows.score, rows.probs, rows.predicted)):
        if i % 7 == 0 or i < 20:
            mask = units.mask(np.array([id]))
            own = score_HW[divmod(id, 48)] if units.is_dense else score_HW[mask].mean()
            assert score == pytest.approx(own, abs=1e-5)
            assert probs == pytest.approx(probs_CHW[:, mask].mean(1), abs=1e-5)
            assert predicted == pytest.approx(predicted_CHW[:, mask].mean(1), abs=1e-5)


def test_the_key_full_res_is_refused_in_a_line():
    with pytest.raises(ValueError, match='`al.full_res` should be left out: .* but got True'):
        parse_settings(dict(full_res=True))


@pytest.mark.parametrize('way', ['plain', 'padded'])
def test_the_vector_of_an_image_leaves_out_its_padding(candidates_of, way):
    vector = candidates_of('image', 'coreset', **WAYS[way]).vector
    assert vector.shape == (1, 8) and vector == pytest.approx(-2 + 64 / 32 / 48 * 255 / 64, abs=1e-3)


@pytest.mark.parametrize('unit', ['image', 'region'])
@pytest.mark.parametrize('strategy', ['coreset', 'badge', 'contextual_diversity', 'real', 'clasp_pe'])
def test_mixed_precision_gives_single_precision_vectors(candidates_of, unit, strategy):
    """As a round trained by AmpOptimWrapper, which itself needs a GPU."""
    rows = candidates_of(unit, strategy, amp=True, **{'model.decode_head.num_convs': 1})
    assert rows.vector.dtype == np.float32 and len(rows.vector) == len(rows.id) and np.isfinite(rows.vector).all()
    assert rows.probs is None or rows.probs.dtype == np.float32


@pytest.mark.parametrize('unit', ['image', 'pixel', 'region', window(1)], ids=str)
def test_a_score_that_is_no_number_is_an_error_in_every_unit(planted, unit):
    state, trainer = planted(dict(unit=unit, strategy='tiny:not_a_number'))
    with pytest.raises(ValueError, match=r"^the score of image 'x' is not finite"):
        query(state, trainer)


# --- draws belong to candidates ---------------------------------------------------------------------------------------

UNITS = dict(
    image='image', region=dict(type='region', size=[8, 8]), window=window(1), pixel='pixel',
    apart=dict(type='pixel', radius=2), superpixel=dict(type='superpixel', n_segments=24, compactness=100.))
each_unit = pytest.mark.parametrize('unit', UNITS)


def asked_of(state: State, names: list) -> set:
    """What a query that draws makes of some images: image and id of each unit that it asks for."""
    state.pool.names = names
    this = Query(state, None)
    for name in names:
        this.collector.add(name, *this.candidates(name, None))
    return {(name, i) for name, ids in this.asked().items() for i in ([0] if ids is None else ids.tolist())}


@each_unit
def test_one_image_less_changes_few_random_picks(make_state, unit):
    """Those of the other images stay, and as many as it had come in."""
    state = make_state(dict(unit=UNITS[unit], initial=12 if unit != 'image' else 4))
    before = asked_of(state, tiny.NAMES)
    assert len(before) == 12 or unit == 'image'
    for gone in tiny.NAMES:
        after = asked_of(state, [name for name in tiny.NAMES if name != gone])
        assert {each for each in before if each[0] != gone} <= after and len(after) == len(before)


@each_unit
def test_the_order_of_images_changes_no_random_pick(make_state, unit):
    state = make_state(dict(unit=UNITS[unit], initial=30 if unit != 'image' else 4))
    assert asked_of(state, tiny.NAMES) == asked_of(state, tiny.NAMES[::-1])


def test_names_that_are_drawn_stay_without_one_of_them():
    state = State(dict(seed=3, config={}), '')
    names = [f'{i}' for i in range(200)]
    for purpose in (('initial', ), ('pool_size', 1), ('pool_size', 2), ('hold_out', 1)):
        first = state.shuffled(names, *purpose)
        assert sorted(first) == sorted(names) != first == state.shuffled(names[::-1], *purpose)
        assert state.shuffled(names[:100] + names[101:], *purpose) == [name for name in first if name != '100']
    assert state.shuffled(names, 'pool_size', 1) != state.shuffled(names, 'pool_size', 2)


@each_unit
@pytest.mark.parametrize('per_image', [False, True])
def test_a_map_that_is_flat_is_asked_for_anywhere(make_state, unit, per_image):
    """Over all images and, in them, over all quarters, in several rounds and so by several draws."""
    if unit == 'image' and per_image:
        return
    budget = 4 if unit == 'image' else 2 if per_image else 24
    state = make_state(dict(unit=UNITS[unit], initial=1, budget=budget, rounds=9, per_image=per_image,
                            strategy='tiny:flat'), changes=tiny.NO_VAL)
    images, quarters = np.zeros(12), np.zeros(4)
    for k in range(1, 10):
        state.rounds = [dict(asked={}, checkpoints=dict(last='untrained.pth')) for _ in range(k)]
        os.makedirs(state.folder())
        torch.save(state.runner.model.state_dict(), osp.join(state.folder(), 'untrained.pth'))
        for name, ids in query(state, state.runner).items():
            images[tiny.NAMES.index(name)] += 1 if ids is None else len(ids)
            y, x = np.nonzero(state.mask_of(name, ids))
            quarters += np.bincount(y // 16 * 2 + x // 24, minlength=4) / len(y)
    assert images.sum() == budget * 9 * (12 if per_image else 1)
    assert scipy.stats.chisquare(images).pvalue > 1e-3
    assert unit == 'image' or scipy.stats.chisquare(quarters).pvalue > 1e-3


# --- what is said of a choice that is a draw -------------------------------------------------------------------------

EQUAL = 'More than nine in ten scores of the tiny:brightest query are equal, and the choice among them is a draw'


@pytest.mark.parametrize('unit, n', [('image', 12), (dict(type='region', size=[8, 8]), 288), ('pixel', 18432)],
                         ids=['image', 'region', 'pixel'])
@pytest.mark.parametrize('others, warns', [(0, True), (1, True), (2, False)])
def test_nine_in_ten_equal_scores_are_a_warning(make_state, monkeypatch, unit, n, others, warns):
    """The score is 0.5 but in some of the twelve images, of which the first and the last come."""
    state = make_state(dict(unit=unit, strategy='tiny:brightest', budget=5), changes=tiny.NO_VAL)
    state.rounds.append(dict(asked={}))
    this = Query(state, None)
    for i, name in enumerate(this.names):
        units = state.units(name)
        scores = torch.linspace(.1, .9, units.number) + i / 99 if i % 11 == 0 and i // 11 < others else \
            torch.full((units.number, ), .5)
        draw = functools.partial(al_patch.uniform, i)
        taken = np.full(state.pool.sizes[name], False) if unit != 'image' else False
        found = units.candidates(scores.numpy(), taken, draw, None, -math.inf)
        rows = Candidates(np.full(len(found[0]), i, np.int32), *found, draw(found[0]))
        this.collector.add(name, rows, rows.rows(slice(0)))
    assert this.collector.range[2] == n and len(this.asked()) > 0
    al_report.warn_of_draws(state)
    assert [EQUAL in text for text in state.entry.get('warnings', ())] == [True] * warns


def test_drawn_scores_are_no_warning_and_no_figures_in_the_log(make_cfg, train):
    cfg = make_cfg(dict(strategy='random', unit=dict(type='region', size=[8, 8]), initial=20), changes=tiny.NO_VAL)
    _, rounds = train(cfg)
    assert not any('warnings' in entry for entry in rounds), rounds
    told = re.findall(r'INFO - Query (\d): random asks for (\d+ of \d+ candidates \(\d+ pixels\)) in .* images\n',
                      tiny.log_of(cfg.work_dir))
    assert told == [('0', '20 of 288 candidates (1280 pixels)'), ('1', '2 of 268 candidates (128 pixels)')]


@pytest.mark.parametrize('strategy', [dict(type='random', foreground=.33), 'entropy', 'random'], ids=str)
def test_without_a_model_the_log_says_that_the_choice_is_plainly_random(make_cfg, train, strategy):
    cfg = make_cfg(dict(strategy=strategy, unit=dict(type='region', size=[8, 8]), initial=20, budget=6), changes={
        **tiny.NO_VAL, 'train_cfg.max_iters': 1})
    _, rounds = train(cfg)
    lines = re.findall(r'INFO - (Query .*)\n', tiny.log_of(cfg.work_dir))
    assert ['plainly at random: there is no model yet' in line for line in lines] == [strategy != 'random', False]
    assert ('foreground' in rounds[1]['strategy']) == isinstance(strategy, dict)


@pytest.mark.parametrize('unit, initial', [('image', 4), (dict(type='region', size=[8, 8]), 20)],
                         ids=['image', 'region'])
@pytest.mark.parametrize('embed, warns', [('tiny:one_vector', True), ('features', False)])
def test_equal_vectors_are_a_warning(make_cfg, train, unit, initial, embed, warns):
    strategy = dict(type='coreset', embed=embed)
    _, rounds = train(make_cfg(dict(strategy=strategy, unit=unit, initial=initial), changes=tiny.NO_VAL))
    assert rounds[0].get('warnings', []) == [
        'All vectors of the coreset query are equal, and the choice among them is a draw: has the model learned '
        'anything?'] * warns


# --- what is looked at -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('unit, initial', [('image', 5), (dict(type='region', size=[8, 8]), 20), ('pixel', 300)],
                         ids=['image', 'region', 'pixel'])
def test_a_random_subset_of_the_pool_offers_all_candidates_and_the_rest_only_what_is_labelled(
        make_cfg, train, monkeypatch, unit, initial):
    offered, add = {}, Collector.add

    def note(self, name, candidates, known, number):
        offered.setdefault(self.seed[2], {})[name] = len(candidates.id), len(known.id)
        return add(self, name, candidates, known, number)

    monkeypatch.setattr(Collector, 'add', note)
    cfg = make_cfg(dict(unit=unit, initial=initial, budget=3, pool_size=3, strategy='coreset'), changes={
        **tiny.NO_VAL, 'train_cfg.max_iters': 1})
    rounds = train(cfg)[1]
    free = {name for name, (n, _) in offered[1].items() if n}
    labelled = {name for name, (_, n) in offered[1].items() if n}
    assert len(free) == 3 and labelled == set(rounds[0]['asked']) and set(rounds[1]['asked']) <= free


class SomePool:
    """As many images of 50 x 100 pixels."""

    def __init__(self, number: int):
        self.names = [str(i) for i in range(number)]
        self.sizes, self.pixels = dict.fromkeys(self.names, (50, 100)), 5000 * number

    def __len__(self):
        return len(self.names)


def query_of(labelled: list, **al) -> Query:
    """A query at pixels, after two rounds that asked for so many in each image."""
    pool = SomePool(len(labelled))
    asked = {name: [1, k] for name, k in zip(pool.names, labelled)}
    rounds = [dict(asked={'0': asked.pop('0')}), dict(asked=asked)]
    al = parse_settings({'unit': 'pixel', 'strategy': 'coreset', **al})
    runner = types.SimpleNamespace(model=torch.nn.Linear(1, 1))
    return Query(State(dict(seed=0, config={}, rounds=rounds), '', al, runner, pool), None)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=9), st.integers(1, 9000))
def test_the_shortlists_of_all_images_together_hold_the_budget(labelled, budget):
    """Also where most images have next to nothing left: an image's part is that of what is free."""
    this = query_of(labelled, budget=budget)
    assert this.free == {name: 5000 - k for name, k in zip(this.names, labelled)}
    kept = [min(this.free[name], this.limit(name, this.state.units(name))) for name in this.names]
    assert sum(kept) >= min(budget, sum(this.free.values()))


def test_a_shortlist_that_cannot_hold_the_budget_is_refused():
    this = query_of([0, 0], budget=100, strategy=dict(type='coreset', shortlist=49))
    with pytest.raises(ValueError, match="^`al.strategy.shortlist` should be at least 50, an image's share of the "
                                         "budget, but got 49"):
        this.limit('0', this.state.units('0'))
