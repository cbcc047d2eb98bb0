"""Every preset in a whole run at every unit where it has a meaning, and says why where it has none."""
import math
import types

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import al_patch
from al_patch import PRESETS

SHORT = {**tiny.NO_VAL, 'train_cfg.max_iters': 2}
UNITS = dict(
    image=dict(unit='image', initial=4, budget=2),
    region=dict(unit=dict(type='region', size=[8, 8]), initial=10, budget=7),
    window=dict(unit=dict(type='region', window=1), initial=9, budget=5),
    superpixel=dict(unit=dict(type='superpixel', n_segments=12, compactness=100.), initial=8, budget=6),
    pixel=dict(unit='pixel', initial=20, budget=11))
MEANINGLESS = {(preset, 'pixel') for preset in ('contextual_diversity', 'crc')}


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('preset', PRESETS)
def test_a_run(make_cfg, train, preset, unit):
    cfg = make_cfg(dict(UNITS[unit], rounds=1, strategy=preset), changes=SHORT)
    if (preset, unit) in MEANINGLESS:
        with pytest.raises(ValueError, match=f"^`al.unit` should be .* for .*, but got '{unit}'"):
            train(cfg)
        return
    _, rounds = train(cfg)
    al = UNITS[unit]
    if unit == 'image':
        asked = rounds[1]['asked']
        assert len(asked) == al['budget'] and not set(asked) & set(rounds[0]['asked'])
    else:
        assert sum(n for n, _ in rounds[1]['asked'].values()) == al['budget']
        before, area = al_patch.spent, math.prod(tiny.SHAPE)
        assert rounds[1]['pixels'] <= 12 * area and before
    held_out = rounds[0].get('held_out', [])
    assert bool(held_out) == (preset == 'crc') and set(held_out) <= set(rounds[0]['asked'])


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=9), st.integers(1, 9000))
def test_the_shortlists_of_all_images_together_hold_the_budget(labelled, budget):
    """Also where most images have next to nothing left: an image's part is that of what is free."""
    names = [str(i) for i in range(len(labelled))]
    pool = types.SimpleNamespace(sizes={name: (50, 100) for name in names})
    asked = {name: [1, k] for name, k in zip(names[1:], labelled[1:])}
    state = dict(rounds=[dict(asked={'0': [9, labelled[0]]}), dict(asked=asked)])
    free = al_patch.free_pixels(state, pool, names)
    assert list(free.values()) == [5000 - k for k in labelled]
    collector = types.SimpleNamespace(budget=lambda name: budget, per_image=False, in_pixels=False)
    coreset, total = al_patch.resolve_strategy('coreset'), max(1, sum(free.values()))
    kept = [min(free[n], al_patch.shortlist(coreset, al_patch.parse_unit('pixel'), collector, n, free[n] / total))
            for n in names]
    assert sum(kept) >= min(budget, sum(free.values()))
