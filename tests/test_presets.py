"""Every preset in a whole run at every unit where it has a meaning, and says why where it has none."""
import math

import pytest
import tiny

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
