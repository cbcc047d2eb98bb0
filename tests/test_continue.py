"""`al.weights='continue'`: a run of several rounds is one training, in which labels come in."""
import collections
import glob
import json
import os
import os.path as osp
import pickle

import pytest
import test_processes
import tiny
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from mmseg.registry import HOOKS
from tiny import same

import al_label
import al_patch
import al_report

RANDOM = {  # all that draws: the order, crops, flips, colours, dropout
    'model.decode_head.dropout_ratio': .5, 'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='RandomCrop', crop_size=(16, 16)),
        dict(type='RandomFlip', prob=.5), dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')],
    'model.data_preprocessor.size': (16, 16),
    'param_scheduler': [dict(type='PolyLR', power=.9, by_epoch=False, begin=1)]}  # `end` is that of the run
FIXED = {
    'model.decode_head.dropout_ratio': 0, 'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]}
LAST = 'iter_12.pth'


@pytest.fixture
def go(make_cfg, train, tmp_path):
    """A function that trains 12 iterations in so many rounds, which `continue`, in a work_dir of its own."""

    def run(tag: str, al=None, changes=None, **top) -> tuple:
        changes = {'train_cfg.max_iters': 12, **(changes or {})}
        cfg = make_cfg({**dict(weights='continue', rounds=2), **(al or {})}, changes=changes,
                       work_dir=str(tmp_path / tag), **top)
        return cfg, *train(cfg)

    return run


@pytest.fixture
def nothing_new(monkeypatch):
    """Every query asks for what is labelled already."""
    monkeypatch.setattr(al_patch, 'query', lambda state, trainer: {list(state.labelled())[0]: None}
                        if trainer else dict.fromkeys(tiny.NAMES[:4]))


def scalars(cfg) -> list:
    """What the visualizer's backend has of all rounds, in order."""
    paths = sorted(glob.glob(osp.join(cfg.work_dir, 'round_*', '*', 'vis_data', 'scalars.json')))
    return [json.loads(line) for path in paths for line in open(path)]


def learned(cfg, k: int, file: str = LAST) -> dict:
    """Weights, optimizer and schedules at the end of a round."""
    saved = torch.load(osp.join(cfg.work_dir, f'round_{k}', file), weights_only=False)
    return {key: saved.get(key) for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')}


def assert_alike(one, other) -> None:
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for each in zip(one, other):
            assert_alike(*each)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# --- one training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('workers', [dict(num_workers=0), dict(num_workers=2),
                                     dict(num_workers=2, persistent_workers=True)], ids=['0', '2', 'persistent'])
def test_rounds_without_new_labels_are_one_training_to_the_bit(go, nothing_new, workers):
    changes = {**RANDOM, **{f'train_dataloader.{key}': value for key, value in workers.items()}}
    several, one = (go(str(rounds), dict(rounds=rounds), changes)[0] for rounds in (2, 0))
    assert_alike(learned(several, 2), learned(one, 0))
    assert not same(learned(several, 0, 'iter_4.pth')['state_dict'], learned(one, 0)['state_dict'])
    alone = go('alone', dict(rounds=0), RANDOM)[0]
    assert_alike(learned(alone, 0), learned(one, 0))  # how many workers there are does not matter


@pytest.mark.parametrize('changes', [
    {'custom_hooks': [dict(type='EMAHook', momentum=.1, begin_iter=5)]},
    {'optim_wrapper.accumulative_counts': 3, 'train_cfg.max_iters': 13},
    {'optim_wrapper.optimizer': dict(type='AdamW', lr=.01, _delete_=True),
     'param_scheduler': [dict(type='LinearLR', start_factor=.1, by_epoch=False, end=5),
                         dict(type='CosineAnnealingLR', by_epoch=False, begin=5)]},
    {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}],
    ids=['ema', 'accumulated', 'adam', 'amp'])
@pytest.mark.filterwarnings('ignore:.*GradScaler')
def test_what_else_goes_on(go, nothing_new, monkeypatch, changes):
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    changes, last = {**RANDOM, **changes}, f'iter_{changes.get("train_cfg.max_iters", 12)}.pth'
    several, one = (go(str(rounds), dict(rounds=rounds), changes)[0] for rounds in (2, 0))
    assert_alike(learned(several, 2, last), learned(one, 0, last))


def test_it_is_stock_training_where_nothing_is_drawn(go, make_cfg, build, tmp_path):
    ours = go('ours', dict(initial=12, rounds=0), FIXED)[0]
    stock = make_cfg(changes={'train_cfg.max_iters': 12, **FIXED}, work_dir=str(tmp_path / 'stock' / 'round_0'))
    build(stock).train()
    stock.work_dir = osp.dirname(stock.work_dir)
    assert_alike(learned(ours, 0), learned(stock, 0))


def test_regions_with_any_number_of_workers_are_learned_alike(go):
    al = dict(unit=dict(type='region', size=[8, 8]), initial=20, budget=6)
    one, other = (go(str(n), al, {**RANDOM, 'train_dataloader.num_workers': n})[0] for n in (0, 2))
    assert_alike(learned(one, 2), learned(other, 2))


def test_iterations_and_schedules_go_on(go):
    cfg, _, rounds = go('run', changes={**RANDOM, 'default_hooks.logger.interval': 1})
    rows = [row for row in scalars(cfg) if 'loss' in row]
    assert [row['step'] for row in rows] == [*range(1, 13)]
    assert [row['lr'] for row in rows] == pytest.approx([.1, *(.1 * (1 - i / 10)**.9 for i in range(11))])
    assert [entry['checkpoints']['last'] for entry in rounds] == ['iter_4.pth', 'iter_8.pth', 'iter_12.pth']
    assert [entry['spent']['images'] for entry in rounds] == [4, 6, 8]


@pytest.mark.parametrize('workers', [0, 1])
def test_no_batch_is_loaded_to_be_skipped(go, monkeypatch, workers, tmp_path):
    load, file = BaseSegDataset.__getitem__, str(tmp_path / 'loaded')

    def note(self, index):
        with open(file, 'a') as opened:
            print(osp.basename(self.data_prefix['img_path']), len(self), file=opened)
        return load(self, index)

    for check in ('rehearse_rounds', 'check_first_losses', 'check_item', 'check_steps', 'check_void',
                  'check_last_batch'):
        monkeypatch.setattr(al_report, check, lambda *args, **kwargs: None)  # they load images, too
    monkeypatch.setattr(BaseSegDataset, '__getitem__', note)
    go('run', changes={'train_dataloader.num_workers': workers})
    loaded = collections.Counter(open(file))
    for n in (4, 6, 8):  # four batches of two in each round, and those that a worker has begun with when it ends
        assert 8 <= loaded[f'train {n}\n'] <= 8 + 2 * 2 * workers, loaded


# --- stops -----------------------------------------------------------------------------------------------------------


class Stop(Hook):
    """Fails once in a round, in an iteration."""
    at = None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (osp.basename(runner.work_dir), runner.iter) == Stop.at:
            Stop.at = None
            raise InterruptedError


@pytest.mark.parametrize('at, workers', [
    (('round_0', 3), 0), (('round_1', 5), 0), (('round_1', 7), 0), (('round_1', 7), 2), (('round_2', 8), 0)])
def test_a_run_that_was_stopped_comes_to_the_same(go, monkeypatch, at, workers):
    """Before the first checkpoint of a round, and halfway."""
    HOOKS.register_module('Stop', module=Stop, force=True)
    changes = {**RANDOM, 'custom_hooks': [dict(type='Stop')], 'train_dataloader.num_workers': workers}
    monkeypatch.setattr(Stop, 'at', at)
    with pytest.raises(InterruptedError):
        go('stopped', changes=changes)
    stopped, _, rounds = go('stopped', changes=changes, resume=True)
    whole, _, expected = go('whole', changes=changes)
    for k, file in enumerate(['iter_4.pth', 'iter_8.pth', LAST]):
        assert_alike(learned(stopped, k, file), learned(whole, k, file))
    assert [[entry[key] for key in ('asked', 'metrics', 'checkpoints')] for entry in rounds] == [
        [entry[key] for key in ('asked', 'metrics', 'checkpoints')] for entry in expected]


def test_a_round_begins_without_what_belongs_to_the_last_ones_folder(go, monkeypatch):
    """The best checkpoint, those to keep, and the count of EarlyStoppingHook; nor does it validate before it trains."""
    validated, values = [], iter([90., 80., 70., 60., 50., 40.])
    monkeypatch.setattr('mmseg.evaluation.IoUMetric.compute_metrics', lambda self, results: dict(mIoU=next(values)))
    monkeypatch.setattr(al_report, 'rehearse_validation', lambda *args: None)
    stock = al_patch.RoundHook.after_val_epoch
    monkeypatch.setattr(al_patch.RoundHook, 'after_val_epoch', lambda self, runner, metrics: (
        validated.append(runner.iter), stock(self, runner, metrics)))
    stop = dict(type='EarlyStoppingHook', monitor='mIoU', patience=2, min_delta=0)
    cfg, _, rounds = go('run', dict(query_with='best'), {
        'train_cfg.val_interval': 2, 'default_hooks.checkpoint.max_keep_ckpts': 1, 'custom_hooks': [stop]})
    assert validated == [2, 4, 6, 8, 10, 12]
    assert [entry['checkpoints']['best'] for entry in rounds] == [f'best_mIoU_iter_{i}.pth' for i in (2, 6, 10)]
    for k in range(3):
        files = {file for file in os.listdir(osp.join(cfg.work_dir, f'round_{k}')) if file.endswith('.pth')}
        assert files == {f'iter_{4 * k + 4}.pth', f'best_mIoU_iter_{4 * k + 2}.pth'}


def test_only_what_is_needed_is_kept_and_a_round_is_trained_anew(go):
    cfg, _, rounds = go('run', dict(keep='needed'), RANDOM)
    assert [len(glob.glob(osp.join(cfg.work_dir, f'round_{k}', '*.pth'))) > 0 for k in range(3)] == [False, False, True]
    cfg, _, rounds = go('all', changes=RANDOM)
    before = learned(cfg, 2)
    al_label.rewind(cfg.work_dir, 1, train=True)
    again = go('all', changes=RANDOM, resume=True)[2]
    assert_alike(before, learned(cfg, 2))
    assert [entry['asked'] for entry in again] == [entry['asked'] for entry in rounds]


def test_a_run_that_has_ended_is_extended(go):
    go('run', dict(rounds=1))
    with pytest.raises(ValueError, match='`train_cfg.max_iters` should do for all 3 trainings .* got 12, of which '
                                         'round 2 would have those from 12 to 12'):
        go('run', resume=True)
    cfg, _, rounds = go('run', changes={'train_cfg.max_iters': 15}, resume=True)
    assert [entry['checkpoints']['last'] for entry in rounds] == ['iter_6.pth', 'iter_12.pth', 'iter_15.pth']


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('total, rounds, more, ends', [
    (12, 2, {}, [4, 8, 12]), (14, 2, {}, [4, 9, 14]), (3, 2, {}, [1, 2, 3]), (7, 0, {}, [7]),
    (12, 2, {0: 6}, [6, 9, 12]), (13, 2, {1: 2}, [5, 7, 13]), (13, 2, {2: 4}, [4, 9, 13]),
    (12, 1, {0: 3, 1: 5}, [3, 8]), (14, 2, dict(accumulative_counts=3), [3, 6, 14]),
    (3, 3, {}, 'round 0 would have those from 0 to 0'), (12, 2, {0: 11}, 'round 1 would have those from 11 to 11'),
    (12, 1, {0: 9, 1: 5}, 'round 1 would have those from 9 to 14'), (12, 2, {2: 12}, 'round 0 would'),
    (5, 2, dict(accumulative_counts=2), 'round 0 would have those from 0 to 0')])
def test_the_rounds_share_the_iterations(make_state, total, rounds, more, ends):
    more = {**more}
    counts = more.pop('accumulative_counts', 1)
    overrides = {k: {'train_cfg': dict(max_iters=n)} if k % 2 else {'train_cfg.max_iters': n} for k, n in more.items()}
    state = make_state(dict(weights='continue', rounds=rounds, overrides=overrides or None),
                       changes={
                           'train_cfg.max_iters': total, 'optim_wrapper.accumulative_counts': counts})
    if isinstance(ends, str):
        with pytest.raises(ValueError, match=ends):
            al_report.check_continue(state)
        return
    al_report.check_continue(state)
    begin = 0
    for k, end in enumerate(ends):
        begin = al_patch.end_of(state, k, begin)
        assert begin == end


def test_a_round_of_other_length_is_rehearsed_and_trained(go):
    overrides = {1: {'train_cfg.max_iters': 6, 'train_dataloader.batch_size': 1}}
    cfg, _, rounds = go('run', dict(overrides=overrides), {**RANDOM, 'default_hooks.logger.interval': 1})
    assert [entry['checkpoints']['last'] for entry in rounds] == ['iter_3.pth', 'iter_9.pth', LAST]
    assert 'Rehearsed an iteration of 1 sets of overrides' in tiny.log_of(cfg.work_dir)
    lrs = [row['lr'] for row in scalars(cfg) if 'loss' in row]
    assert lrs == pytest.approx([.1, *(.1 * (1 - i / 10)**.9 for i in range(11))])


def test_a_round_that_stops_early_leaves_its_iterations_to_the_others(go):
    stop = dict(type='EarlyStoppingHook', monitor='mIoU', patience=1, min_delta=100)
    _, _, rounds = go('run', changes={'train_cfg.val_interval': 1, 'train_cfg.max_iters': 24, 'custom_hooks': [stop]})
    assert [entry['checkpoints']['last'] for entry in rounds] == ['iter_2.pth', 'iter_4.pth', 'iter_6.pth']


# --- what it cannot go on from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('loop, al, changes, match', [
    ('epochs', {}, {}, '`train_cfg` should be of an IterBasedTrainLoop with'),
    ('iters', dict(rounds=4), {}, '`train_cfg.max_iters` should do for all 5 trainings'),
    ('iters', {}, {'default_hooks.checkpoint.save_optimizer': False}, 'save_optimizer=True .* got False and True'),
    ('iters', {}, {'default_hooks.checkpoint.save_param_scheduler': False}, 'but got True and False'),
    ('iters', {}, {'train_dataloader.sampler.type': 'DefaultSampler'}, 'an InfiniteSampler, .* DefaultSampler'),
    ('iters', dict(overrides={1: {'train_dataloader.sampler.type': 'DefaultSampler'}}), {}, 'be an InfiniteSampler'),
    ('iters', dict(overrides={1: {'optim_wrapper.optimizer.lr': 1.}}), {}, 'optimizer.lr` should be left out'),
    ('iters', dict(overrides={1: {'train_cfg': dict(type='EpochBasedTrainLoop', max_epochs=1, _delete_=True)}}), {},
     r'`al.overrides\[1\]`: `train_cfg` should be of an IterBasedTrainLoop')])
def test_what_is_refused_before_training(make_cfg, train, monkeypatch, loop, al, changes, match):
    monkeypatch.setattr(al_patch.RoundHook, 'before_train_iter', lambda *args, **kwargs: pytest.fail('it trains'))
    with pytest.raises(ValueError, match=match):
        train(make_cfg({'weights': 'continue', **al}, loop, changes=changes))


def test_a_torch_that_cannot_is_named(make_state, monkeypatch):
    state = make_state(dict(weights='continue'))
    monkeypatch.setattr('torch.utils.data._utils.fetch._MapDatasetFetcher.fetch', lambda self, indices: self.collate_fn(
        [self.dataset[i] for i in indices]))
    with pytest.raises(RuntimeError, match='needs a DataLoader that calls Dataset.__getitems__'):
        al_report.check_continue(state)


# --- workers that are spawned, and processes -------------------------------------------------------------------------


def test_the_data_set_pickles(make_state):
    state = make_state(dict(weights='continue'), [tiny.NAMES[:4]], changes=RANDOM)
    trainer = al_patch.build_round(state)
    dataset = trainer.train_dataloader.dataset
    places = list(zip(range(4), range(4)))
    one, other = (each.__getitems__(places) for each in (dataset, pickle.loads(pickle.dumps(dataset))))
    assert all(torch.equal(a['inputs'], b['inputs']) for a, b in zip(one, other))
    al_patch.close_round(trainer)


@pytest.mark.parametrize('persistent', [True, False])
def test_workers_end_with_their_round(make_state, persistent):
    state = make_state(dict(weights='continue'), [tiny.NAMES[:4]], changes=dict(
        train_dataloader=dict(num_workers=1, persistent_workers=persistent)))
    trainer, others = al_patch.build_round(state), set(torch.multiprocessing.active_children())
    trainer.train()
    assert set(torch.multiprocessing.active_children()) - others
    al_patch.close_round(trainer)
    assert not set(torch.multiprocessing.active_children()) - others


def run_on(rank: int, processes: int, port: int, cfg) -> None:
    test_processes.join(rank, processes, port, cfg)
    cfg.launcher, cfg.experiment_name = 'pytorch', osp.basename(cfg.work_dir)
    Runner.from_cfg(cfg).train()


def test_two_processes(make_cfg, tmp_path, nothing_new):
    changes = {**RANDOM, 'train_cfg.max_iters': 12, 'model.decode_head.norm_cfg.type': 'BN'}
    several, one = (make_cfg(dict(weights='continue', rounds=rounds), changes=changes, work_dir=str(
        tmp_path / str(rounds))) for rounds in (2, 0))
    for cfg in (several, one):
        test_processes.start(run_on, 2, cfg)
    assert_alike(learned(several, 2), learned(one, 0))
