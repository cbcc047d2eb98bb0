"""What mmengine offers for training, over rounds: precision, schedules, averaged weights, memory and speed."""
import os.path as osp
import types

import mmengine
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from tiny import checkpoint_of, counts, same, weights_at

import al_patch


def run(make_cfg, train, tag: str, al=None, loop='iters', **changes) -> tuple:
    """A run in a directory of its own: its config, runner, rounds, and the weights of its last checkpoint."""
    cfg = make_cfg(al or {}, loop, work_dir=osp.join(make_cfg().work_dir, tag), changes=changes)
    runner, rounds = train(cfg)
    return cfg, runner, rounds, weights_at(cfg, checkpoint_of(cfg, rounds, -1))


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


@HOOKS.register_module()
class RaiseOnce(Hook):
    """Ends a run by an error in its first round, after an iteration."""
    priority = 'LOWEST'

    def __init__(self, after: int, marker: str):
        self.after, self.marker = after, marker

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after and not osp.exists(self.marker):
            mmengine.put_text('', self.marker)
            raise InterruptedError('once')


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(WeightsSeen, 'seen', [])
    monkeypatch.setattr(WeightsSeen, 'rates', [])
    return WeightsSeen


def assert_same_runs(one: tuple, other: tuple) -> None:
    """Two runs asked for the same, and came to the same metrics and weights."""
    assert [entry['asked'] for entry in one[2]] == [entry['asked'] for entry in other[2]]
    assert [entry['metrics'] for entry in one[2]] == [entry['metrics'] for entry in other[2]]
    assert [entry['checkpoints'] for entry in one[2]] == [entry['checkpoints'] for entry in other[2]]
    assert set(one[3]) == set(other[3])
    for key, value in one[3].items():
        torch.testing.assert_close(value, other[3][key], rtol=1e-5, atol=1e-6)


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
    cfg, runner, rounds, weights = run(make_cfg, train, 'amp', dict(rounds=1), **tiny.NO_VAL, **{
        'optim_wrapper.type': kind, 'optim_wrapper.dtype': 'bfloat16'})
    assert counts(rounds) == [4, 2] and set(dtypes) == {(True, torch.bfloat16), (False, torch.bfloat16)}
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
    cfg, _, rounds, _ = run(make_cfg, train, 'run', dict(rounds=1), load_from=start, **tiny.NO_VAL,
                            **{'optim_wrapper.optimizer.lr': lr})
    for k in range(len(rounds)):
        assert same(weights_at(cfg, checkpoint_of(cfg, rounds, k)), weights, '.weight') == (lr == 0)


# --- which weights: EMA ----------------------------------------------------------------------------------------------

EMA = [dict(type='EMAHook', momentum=.5), dict(type='WeightsSeen')]


@pytest.mark.parametrize('buffers', [False, True])
def test_ema_query_and_report_look_with_what_validation_saw(make_cfg, train, monkeypatch, seen, buffers):
    looked, look = [], al_patch.Network.look

    def spy(self, state, names, *args, **kwargs):
        looked.append((state.round, {key: value.clone() for key, value in self.model.state_dict().items()}))
        return look(self, state, names, *args, **kwargs)

    monkeypatch.setattr(al_patch.Network, 'look', spy)
    hooks = [{**EMA[0], 'update_buffers': buffers}, EMA[1]]
    cfg, runner, rounds, last = run(make_cfg, train, 'ema', dict(visualize=1), custom_hooks=hooks)
    assert [k for k, _ in looked] == [0, 0, 0, 1]  # the report, the query, its picture, the last report
    assert len(seen.seen) == 2 and all(same(weights, seen.seen[k]) for k, weights in looked)
    raw = torch.load(checkpoint_of(cfg, rounds, 0), weights_only=False)['ema_state_dict']
    assert not same({'module.' + key: value for key, value in looked[0][1].items()}, raw, '.weight')
    assert same(last, seen.seen[1]) and same(runner.model.state_dict(), last)


def test_ema_the_runner_tests_what_validation_saw(make_cfg, train, seen):
    _, runner, rounds, last = run(make_cfg, train, 'ema', dict(rounds=0), custom_hooks=EMA)
    assert {key: pytest.approx(value, abs=1e-3) for key, value in runner.test().items()} == rounds[0]['metrics']
    assert same(seen.seen[-1], last)


def test_ema_processes_validate_the_averaged_statistics_of_rank_0(make_cfg, train, monkeypatch):
    """Those that are saved, and not the ones that EMAHook has put aside."""
    shown = []
    monkeypatch.setattr(al_patch, 'broadcast', lambda buffer: shown.append(buffer.clone()))
    hooks = [dict(EMA[0], update_buffers=True)]
    *_, weights = run(make_cfg, train, 'ema', dict(rounds=0), custom_hooks=hooks)
    assert any(torch.equal(each, weights['decode_head.convs.0.bn.running_mean']) for each in shown)


# --- early stopping, and what a resumed round goes on with -----------------------------------------------------------


@pytest.mark.parametrize('loop, last', [('iters', 'iter_3.pth'), ('epochs', 'epoch_3.pth')])
def test_early_stopping(make_cfg, train, loop, last):
    """The round ends where the hook says, between two checkpoints: its last weights are still on disk."""
    hook = dict(type='EarlyStoppingHook', monitor='mIoU', rule='greater', patience=2, min_delta=1000.)
    length = dict(iters='train_cfg.max_iters', epochs='train_cfg.max_epochs')[loop]
    changes = {length: 50, 'train_cfg.val_interval': 1, 'default_hooks.checkpoint.interval': 50,
               'default_hooks.checkpoint.save_best': None}
    cfg, runner, rounds, weights = run(make_cfg, train, 'early', loop=loop, custom_hooks=[hook], **changes)
    assert [entry['checkpoints']['last'] for entry in rounds] == [last] * 2
    assert same(runner.model.state_dict(), weights)


@pytest.mark.filterwarnings('ignore:.*GradScaler')
@pytest.mark.parametrize('changes', [
    dict(hooks=[dict(type='EMAHook', momentum=.5)]), {'optim_wrapper.accumulative_counts': 2},
    {'optim_wrapper.type': 'AmpOptimWrapper'},
    dict(hooks=[dict(type='EarlyStoppingHook', monitor='mIoU', rule='greater', patience=2, min_delta=1000.)])],
    ids=['ema', 'accumulation', 'amp', 'early_stopping'])
def test_a_resumed_round_is_as_one_that_was_not_stopped(make_cfg, train, amp_on_cpu, changes):
    changes = {'train_cfg.val_interval': 2, 'train_cfg.max_iters': 8, **changes}
    hooks = changes.pop('hooks', [])

    def go(tag: str, fails: bool, **more):
        marker = osp.join(make_cfg().work_dir, tag, 'marker')
        if not fails:
            mmengine.put_text('', marker)
        failing = dict(type='RaiseOnce', after=5, marker=marker)
        return run(make_cfg, train, tag, dict(rounds=0), custom_hooks=[*hooks, failing], **changes, **more)

    with pytest.raises(InterruptedError):
        go('stopped', True)
    assert_same_runs(go('stopped', True, resume=True), go('straight', False))


# --- memory and speed ------------------------------------------------------------------------------------------------

MC = dict(strategy=dict(type='bald', mc=3))
RESNET = {
    'model.backbone': dict(type='ResNet', depth=18, base_channels=8, strides=(1, 1, 1, 1), dilations=(1, 1, 1, 1)),
    'model.decode_head.in_channels': 64, 'model.decode_head.in_index': 3}


@pytest.mark.parametrize('where, on, model', [
    ('mmengine.runner.activation_checkpointing.checkpoint',
     dict(activation_checkpointing=['backbone.stage', 'decode_head.conv_seg']), {}),
    ('mmseg.models.backbones.resnet.cp.checkpoint', {'model.backbone.with_cp': True}, RESNET)],
    ids=['modules', 'with_cp'])
def test_activation_checkpointing(make_cfg, train, monkeypatch, where, on, model):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    changes = {**model, **tiny.NO_VAL, 'train_cfg.max_iters': 2}
    plain = run(make_cfg, train, 'plain', MC, **changes)
    monkeypatch.setattr(where, lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))
    saving = run(make_cfg, train, 'saving', MC, **{**changes, **on})
    assert calls and counts(saving[2]) == [4, 2]
    assert all(torch.allclose(saving[3][key], plain[3][key], atol=1e-6) for key in plain[3] if key.endswith('weight'))


def test_sync_bn_in_one_process_is_bn(make_cfg, train):
    runs = [run(make_cfg, train, kind, MC, **{'model.decode_head.norm_cfg.type': kind}) for kind in ('SyncBN', 'BN')]
    assert_same_runs(*runs)
    assert type(runs[0][1].model.decode_head.convs[0].bn).__name__ != 'SyncBatchNorm'


def test_compile(make_cfg, train, monkeypatch):
    """Each round compiles anew: torch._dynamo gives up on a function after eight times. The first really does, here."""
    try:
        torch.compile(len, backend='eager')
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f'this torch does not compile: {error}')
    compiled, resets, compile, reset = [], [], torch.compile, torch._dynamo.reset

    def compile_once(function, **options):
        compiled.append(options)
        return function if len(compiled) > 1 else compile(function, **options)

    monkeypatch.setattr(torch, 'compile', compile_once)
    monkeypatch.setattr(torch._dynamo, 'reset', lambda: resets.append(len(compiled)) or reset())
    changes = {**tiny.NO_VAL, 'train_cfg.max_iters': 1}
    assert_same_runs(*(run(make_cfg, train, tag, **changes, **options) for tag, options in (
        ('compiled', dict(compile=dict(backend='eager'))), ('plain', {}))))
    assert compiled == [dict(backend='eager')] * 2 and resets == [1, 2]
