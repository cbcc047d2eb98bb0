"""What mmengine offers for training, over rounds: precision, schedules, averaged weights, memory and speed."""
import os.path as osp
import types

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from test_rounds import counts, same, weights_at

import al_patch


def run(make_cfg, train, tag: str, al=None, loop='iters', **changes) -> tuple:
    """A run in a directory of its own: its config, runner, rounds, and the weights of its last checkpoint."""
    cfg = make_cfg(al or {}, loop, work_dir=osp.join(make_cfg().work_dir, tag), changes=changes)
    runner, rounds = train(cfg)
    return cfg, runner, rounds, weights_at(cfg, rounds[-1]['checkpoints']['last'])


@HOOKS.register_module()
class WeightsSeen(Hook):
    """Keeps the weights with which each validation and test ran, and the learning rate of each iteration."""
    seen, rates = [], []

    def keep(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx == 0:
            self.seen.append({key: value.clone() for key, value in runner.model.state_dict().items()})

    after_val_iter = after_test_iter = keep

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.rates.append(runner.optim_wrapper.get_lr()['lr'][0])


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(WeightsSeen, 'seen', [])
    monkeypatch.setattr(WeightsSeen, 'rates', [])
    return WeightsSeen


# --- mixed precision and the optimizer -------------------------------------------------------------------------------


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """mmengine's wrapper asks for a GPU, but what it does runs anywhere, with bfloat16."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)


@pytest.mark.filterwarnings('ignore:.*GradScaler')
@pytest.mark.parametrize('kind', ['AmpOptimWrapper', 'mmengine.AmpOptimWrapper'])
def test_mixed_precision_in_training_and_query(make_cfg, train, amp_on_cpu, monkeypatch, kind):
    dtypes, forward = [], tiny.TinyBackbone.forward

    def spy(self, x):
        outputs = forward(self, x)
        dtypes.append((self.training, outputs[0].dtype))
        return outputs

    monkeypatch.setattr(tiny.TinyBackbone, 'forward', spy)
    cfg, runner, rounds, weights = run(make_cfg, train, 'amp', dict(rounds=2), **tiny.NO_VAL, **{
        'optim_wrapper.type': kind, 'optim_wrapper.dtype': 'bfloat16'})
    assert counts(rounds) == [4, 2, 2] and set(dtypes) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert weights['decode_head.conv_seg.weight'].dtype == torch.float32


@pytest.mark.parametrize('wrapper, expected', [
    (dict(type='OptimWrapper', dtype='float16'), (False, None)), ({}, (False, None)),
    (dict(type='AmpOptimWrapper'), (True, None)),
    (dict(type=AmpOptimWrapper, dtype='bfloat16'), (True, torch.bfloat16)),
    (dict(type='AmpOptimWrapper', dtype=torch.float16), (True, torch.float16))])
def test_the_query_has_the_precision_of_the_config(monkeypatch, wrapper, expected):
    """On a GPU the default is float16, in which a network that was trained in bfloat16 may overflow."""
    monkeypatch.setattr(al_patch, 'autocast', lambda enabled, dtype: (enabled, dtype))
    assert al_patch.precision(types.SimpleNamespace(cfg=Config(dict(optim_wrapper=wrapper)))) == expected


def test_gradient_accumulation(make_cfg, train, monkeypatch):
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, 'step', lambda self, *a, **k: steps.append(1) or step(self, *a, **k))
    for n, expected in ((1, 8), (2, 4)):
        del steps[:]
        _, _, rounds, _ = run(make_cfg, train, str(n), **tiny.NO_VAL, **{'optim_wrapper.accumulative_counts': n})
        assert counts(rounds) == [4, 2] and len(steps) == expected


def test_auto_scale_lr(make_cfg, train, seen):
    run(make_cfg, train, 'scaled', auto_scale_lr=dict(enable=True, base_batch_size=8),
        custom_hooks=[dict(type='WeightsSeen')], **tiny.NO_VAL)
    assert seen.rates == pytest.approx([.1 * 2 / 8] * 8)


@pytest.mark.parametrize('lr', [0., .1])
def test_from_scratch_every_round_starts_from_load_from(make_cfg, train, lr):
    start = osp.join(make_cfg().work_dir, 'start.pth')
    cfg, _, _, weights = run(make_cfg, train, 'other', dict(rounds=0), **tiny.NO_VAL)
    torch.save(dict(state_dict=weights), start)
    cfg, _, rounds, _ = run(make_cfg, train, 'run', dict(rounds=2), load_from=start, **tiny.NO_VAL,
                            **{'optim_wrapper.optimizer.lr': lr})
    for entry in rounds:
        assert same(weights_at(cfg, entry['checkpoints']['last']), weights, '.weight') == (lr == 0)
