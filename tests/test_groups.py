"""Groups of images: caps hold inside every selector, and a round that they leave less asks for less."""
import math
import os
import os.path as osp

import mmengine
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_selectors import (
    SELECTORS,
    distances_to,
    drawn,
    literal_noise,
    literal_order,
    matrices,
    offer,
    uniform,
    vectors,
)

import al_patch
from al_patch import Caps, generator, grouping, kcenter, kmeanspp, power_draw, softmax_draw, softrank_draw
from al_report import status

SEVERAL = dict(max_per_group=2, frame_distance=3)


def caps_of(images: int, candidates: int, groups: int, most: float, distance: int, units=math.inf, opened=math.inf
            ) -> Caps:
    """Images in turn of one group and the next, frames ten apart; candidates in turn of one image and the next."""
    return Caps(np.arange(images) % groups, np.arange(images) // groups * 10, units, opened, most, distance,
                np.arange(candidates) % images)


def may_follow(caps: Caps, picks: list, row: int) -> bool:
    """By the words of the settings."""
    group_I, frame_I, units, opened, most, distance = caps.settings
    image, chosen = caps.image_N[row], caps.image_N[picks].tolist()
    others = [i for i in {*chosen} if group_I[i] == group_I[image]]
    return chosen.count(image) < units and (image in chosen or len({*chosen}) < opened and len(others) < most and all(
        abs(frame_I[image] - frame_I[i]) >= distance for i in others))


def walk(caps: Caps, order, budget: int) -> list:
    """Again and again the next that may follow."""
    picks = []
    for row in order:
        if len(picks) < budget and may_follow(caps, picks, row):
            picks.append(row)
    return picks


@pytest.mark.parametrize('name', [*SELECTORS, 'own'])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.sampled_from([1, 2, math.inf]),
       st.sampled_from([0, 10, 11, 25]), st.sampled_from([1, 3, math.inf]), st.sampled_from([1, 4, math.inf]),
       st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_picks_keep_to_the_caps_and_are_fewer_only_where_none_is_left(name, n, images, groups, most, distance, units,
                                                                      opened, share, seed, coarse):
    caps, budget = caps_of(images, n, groups, most, distance, units, opened), max(1, round(share * n))
    offered = offer(n, 2, 3, seed, coarse)
    select = SELECTORS.get(name, tiny.last_ones)
    if 'caps' not in al_patch.parameters_of(select):
        select = al_patch.asked_again(caps, select)
    picks = al_patch.call_offering(select, offered['scores_N'], budget, generator(seed),
                                   **{**offered, 'caps': caps}).tolist()
    assert len({*picks}) == len(picks) <= budget
    assert all(may_follow(caps, picks[:i], row) for i, row in enumerate(picks))
    if len(picks) < budget:
        if name == 'stochastic_batches':  # it is the best of many batches, of which each is as large as it can be
            assert picks
        else:
            assert not any(may_follow(caps, picks, row) for row in {*range(n)} - {*picks})


@pytest.mark.parametrize('name', SELECTORS)
def test_caps_that_close_nothing_change_nothing(name):
    offered = offer(200, 2, 3, 0, False)
    picks = [al_patch.call_offering(SELECTORS[name], offered['scores_N'], 30, generator(0), **offered, caps=caps
                                    ).tolist() for caps in (None, caps_of(50, 200, 5, math.inf, 0))]
    assert picks[0] == picks[1]


@pytest.mark.parametrize('distance', [0, 15])
@pytest.mark.parametrize('select', [power_draw, softmax_draw, softrank_draw])
def test_a_ranking_is_walked(select, distance):
    scores, caps = uniform(300) + .01, caps_of(90, 300, 7, 3, distance, 2, 18)
    order = literal_order(select, scores.numpy(), 1, 4)
    assert select(scores, 40, generator(0), drawn(300, 4), beta=1, caps=caps).tolist() == walk(caps.again(), order, 40)


@pytest.mark.parametrize('distance', ['euclidean', 'kl'])
@pytest.mark.parametrize('n, d, budget', [(40, 2, 30), (3000, 3, 150), (2000, 40, 60)])
def test_kcenter_passes_over_what_would_break_a_cap(distance, n, d, budget):
    """What is passed over is no centre."""
    points = vectors(n, d) if distance == 'euclidean' else matrices(n, min(d, 8))
    caps, scores = caps_of(n // 3, n, 7, n // 40, 25), uniform(n, seed='scores')
    nearest, picks = np.full(n, np.inf), []
    while len(picks) < budget:
        order = np.argsort(-(nearest if picks else scores.numpy()), kind='stable')
        row = next((row for row in order.tolist() if row not in picks and may_follow(caps, picks, row)), None)
        if row is None:
            break
        picks.append(row)
        nearest = np.minimum(nearest, distances_to(points.double().numpy(), points[row].double().numpy(), distance))
    found = kcenter(scores, budget, generator(0), points, points[:0], distance, caps=caps).tolist()
    assert found == picks and found != kcenter(scores, budget, generator(0), points, points[:0], distance).tolist()


@pytest.mark.parametrize('n, d, budget', [(40, 2, 30), (3000, 3, 200), (2000, 40, 60)])
def test_the_clock_of_a_closed_candidate_never_rings(n, d, budget):
    points, draws_N, caps = vectors(n, d), drawn(n), caps_of(n // 3, n, 7, n // 40, 25)
    found = kmeanspp(torch.zeros(n), budget, generator(0), points, draws_N, caps=caps).tolist()
    p, left = points.double().numpy(), np.array([-math.log(u) for u in draws_N.tolist()])
    picks = [int((p**2).sum(1).argmax())]
    rates = distances_to(p, p[picks[0]], 'euclidean')
    while len(picks) < budget:
        is_free = np.array([row not in picks and may_follow(caps, picks, row) for row in range(n)])
        if not is_free.any():
            break
        times = np.where(is_free, left / np.maximum(rates, 1e-30), np.inf)
        picks.append(int(times.argmin()))
        left = left - np.maximum(rates, 1e-30) * times.min()
        rates = np.minimum(rates, distances_to(p, p[picks[-1]], 'euclidean'))
    assert found == picks


def test_of_the_highest_percent_the_next_is_taken_and_then_the_rest():
    scores, caps = torch.arange(100.).double(), caps_of(10, 100, 2, 1, 0)
    order = [*range(80, 100), *range(79, -1, -1)]  # of the highest those that drew the least numbers come first
    found = SELECTORS['top_percent'](scores, 12, generator(0), percent=20., caps=caps).tolist()
    assert sorted(found) == sorted(walk(caps.again(), order, 12))


def test_each_random_batch_keeps_to_the_caps():
    scores, caps, draws_N = uniform(60), caps_of(20, 60, 4, 2, 0), drawn(60)
    orders = [np.argsort([-value for value in literal_noise(draws_N, 1, j)], kind='stable')[::-1] for j in range(9)]
    batches = [walk(caps.again(), order.tolist(), 7) for order in orders]
    best = max(batches, key=lambda rows: float(scores[rows].mean()))
    found = SELECTORS['stochastic_batches'](scores, 7, generator(0), draws_N, batches=9, caps=caps.again())
    assert sorted(found.tolist()) == sorted(best)


# --- images ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bright_units(state) -> dict:
    """Image -> its units' scores, in the highest order, by the very maps of the query."""
    this, found = al_patch.Query(state, state.runner), {}
    for name, seen in this.look():
        rows = this.candidates(name, seen)[0]
        found[name] = sorted(rows.score.tolist(), reverse=True)
    return found


@pytest.mark.parametrize('unit, strategy', [
    (dict(type='region', size=[8, 8]), 'entropy'), (dict(type='region', size=[8, 8]), 'stochastic_batches'),
    ('pixel', 'pixelpick'), ('pixel', 'coreset'), (dict(type='superpixel', n_segments=24), 'classbal')], ids=str)
def test_a_query_opens_so_many_images_and_takes_so_many_units_of_each(make_cfg, train, unit, strategy):
    """A choice may be less than the budget where no more can be opened."""
    _, rounds = train(make_cfg(dict(unit=unit, strategy=strategy, initial=10, budget=9, rounds=2, max_images=4,
                                    max_per_image=3), changes={**tiny.NO_VAL, 'train_cfg.max_iters': 1}))
    for entry in rounds[1:]:
        units = [n for n, _ in entry['asked'].values()]
        assert len(units) <= 4 and max(units) <= 3 and sum(units) == 9


def test_images_are_opened_by_their_best_units(make_state):
    """Of 12 images the 5 whose best unit scores highest; then the best units in these."""
    state = make_state(dict(unit=dict(type='region', size=[8, 8]), strategy='entropy', initial=1, budget=20,
                            max_images=5), changes=tiny.NO_VAL)
    al_patch.add_round(state, al_patch.query(state, None))
    os.makedirs(state.folder(), exist_ok=True)
    torch.save(state.runner.model.state_dict(), osp.join(state.folder(), 'untrained.pth'))
    state.entry.update(checkpoints=dict(last='untrained.pth'))
    scores = bright_units(state)
    opened = sorted(scores, key=lambda name: -scores[name][0])[:5]
    floor = sorted((score for name in opened for score in scores[name]), reverse=True)[19]
    asked = al_patch.query(state, state.runner)
    assert {*asked} <= {*opened} and sum(map(len, asked.values())) == 20
    assert {name: len(ids) for name, ids in asked.items()} == {
        name: n for name in opened if (n := sum(score >= floor for score in scores[name]))}


def test_what_caps_on_images_leave_is_said(make_cfg, train):
    cfg = make_cfg(dict(unit=dict(type='region', size=[8, 8]), initial=5, budget=9, rounds=1, max_images=2,
                        max_per_image=3), changes=tiny.NO_VAL)
    train(cfg)
    assert 'asks for 6 units of the 9 that `al.budget` allows: `al.max_per_image` = 3 and `al.max_images` = 2 leave ' \
        'no more' in tiny.log_of(cfg.work_dir)


@pytest.mark.parametrize('key', ['max_per_image', 'max_images'])
@pytest.mark.parametrize('more', [dict(unit='image'), dict(unit='pixel', per_image=True)], ids=str)
def test_caps_on_images_mean_nothing_for_whole_images_or_in_each(key, more):
    with pytest.raises(ValueError, match=f'`al.{key}` should be None for whole images, and where `al.per_image`'):
        al_patch.parse_settings({key: 3, **more})


# --- names -----------------------------------------------------------------------------------------------------------


def drive(name: str) -> int:
    return ord(name[0])


@pytest.mark.parametrize('setting, group, frame', [
    ('^[a-z]', 'a', 7), ('([a-z])/', 'a', 7), ('nothing', 'a/07', 7), ('test_groups:drive', '97', 7),
    ('a|(b)', 'None', 7)])
def test_a_group_is_what_an_expression_or_a_function_makes_of_a_name(setting, group, frame):
    assert grouping(setting)('a/07') == (group, frame)
    assert grouping(setting)('x')[1] == 0


# --- runs ------------------------------------------------------------------------------------------------------------


def group_counts(asked) -> list:
    return [sum(name[0] == group for name in asked) for group in 'ab']


@pytest.mark.parametrize('strategy', ['random', 'entropy', 'coreset', 'badge', 'real', 'stochastic_batches',
                                      dict(type='entropy', select='tiny:last_ones')])
def test_a_query_keeps_to_the_caps_and_says_what_they_left(make_cfg, train, strategy):
    cfg = make_cfg(dict(strategy=strategy, group='^[ab]', budget=4, initial=['a/00', 'b/06'], max_per_group=1,
                        rounds=2))
    _, rounds = train(cfg)
    assert [group_counts(entry['asked']) for entry in rounds] == [[1, 1]] * 3
    assert any('asks for 2 units of the 4' in text and '`al.max_per_group` = 1' in text
               for entry in rounds for text in entry.get('warnings', ()))
    assert 'asks for 2 units of the 4' in status(cfg.work_dir)
    assert '`al.group` makes 2 groups of the 12 images of the pool, of 6 to 6, e.g. a, b' in tiny.log_of(cfg.work_dir)


def test_frames_keep_their_distance(make_cfg, train):
    _, rounds = train(make_cfg(dict(group='^[ab]', frame_distance=3, initial=['a/00'], budget=4)))
    for group in 'ab':
        frames = sorted(int(name[2:]) for name in rounds[1]['asked'] if name[0] == group)
        assert len(frames) > 1 and np.diff(frames).min() >= 3


@pytest.mark.parametrize('unit, budget', [('region', .2), ('pixel', 90), ('superpixel', .2)])
def test_units_of_an_image_count_as_one_of_its_group(make_cfg, train, unit, budget):
    unit = dict(region=dict(type='region', size=[8, 8]), superpixel=dict(type='superpixel', n_segments=20)
                ).get(unit, unit)
    _, rounds = train(make_cfg(dict(unit=unit, budget=budget, initial=budget, group='^[ab]', max_per_group=2)))
    assert max(group_counts(rounds[0]['asked'])) > 2  # where nothing is known yet, chance alone chooses
    assert max(group_counts(rounds[1]['asked'])) == 2 and sum(map(len, [rounds[1]['asked']])) <= 4


def test_the_pool_is_empty_only_when_nothing_is_left_without_caps(make_cfg, train):
    cfg = make_cfg(dict(group='^[ab]', budget=6, initial=6, max_per_group=1, rounds=9))
    _, rounds = train(cfg)
    assert sum(len(entry['asked']) for entry in rounds) == 12
    assert 'the pool is empty' in mmengine.load(osp.join(cfg.work_dir, 'al_state.json'))['ended']


def test_a_group_on_both_sides_is_said_aloud(make_cfg, train, tmp_path):
    root = tiny.make_data(tmp_path / 'own')
    cfg = make_cfg(dict(group='^a|^b', rounds=0), root=root)
    cfg.val_dataloader.dataset.data_prefix = cfg.train_dataloader.dataset.data_prefix
    train(cfg)
    assert '2 groups are in both pool and validation set' in tiny.log_of(cfg.work_dir)


@pytest.mark.parametrize('al, match', [
    (dict(max_per_group=2), "`al.group` should be an expression"), (dict(frame_distance=2), '`al.group` should be an'),
    (dict(group='('), r"`al.group` should be a reg.* got '\('"),
    (dict(group='test_groups:none'), '`al.group` should be a reg'),
    (dict(group='^a', max_per_group=0), '`al.max_per_group` should be None or a positive int'),
    (dict(group='^a', per_image=True, unit='pixel', budget=4, initial=4), '`al.group` should be None where')])
def test_settings_that_say_nothing_are_refused(make_cfg, train, al, match):
    with pytest.raises(ValueError, match=match):
        train(make_cfg(al))


def test_processes_choose_as_one(make_cfg, build):
    """The choice is made on rank 0, of all ranks' candidates: the same for any batch size."""
    runs = []
    for size in (1, 3):
        cfg = make_cfg(dict(group='^[ab]', budget=5, initial=['a/00'], **SEVERAL))
        cfg.test_dataloader.batch_size, cfg.work_dir = size, f'{cfg.work_dir}_{size}'
        build(cfg).train()
        runs.append(mmengine.load(osp.join(cfg.work_dir, 'al_state.json'))['rounds'][1]['asked'])
    assert [*runs[0]] == [*runs[1]]


def test_own_selectors_get_the_caps_if_they_name_them(make_cfg, train):
    _, rounds = train(make_cfg(dict(strategy=dict(type='entropy', select='test_groups:highest_of_each'),
                                    group='^[ab]', budget=2, initial=['a/00'], max_per_group=1)))
    assert group_counts(rounds[1]['asked']) == [1, 1]


def highest_of_each(scores_N, budget, generator, caps):
    return caps.first(scores_N.argsort(descending=True), budget)


