"""Runs that are killed, stopped, started twice, or lose a process or the disk's last byte."""
import errno
import os
import os.path as osp
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tiny
import torch
from mmengine.runner import Runner
from tiny import ROOT, launch, result, shell, write_config

import al_patch
import al_report
from al_patch import STATE_FILE, only_run, read_state, run_rounds, write_atomically, write_png

SHORT = {**tiny.NO_VAL, 'train_cfg.max_iters': 1}
AL = 'dict(initial=4, budget=2, rounds=1)'


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def test_killed_runs_end_as_those_that_are_not():
    """By hand: `python tests/kill.py --kills 1000 --results kills.jsonl`."""
    done = shell(sys.executable, osp.join(ROOT, 'tests', 'kill.py'), '--kills', '4', '--units', 'region', '--processes',
                 '2', check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r'all .*\|   4   \|.*\|   0   \|\n', done.stdout), done.stdout


@pytest.mark.parametrize('loop, at', [('iters', 2), ('epochs', 1)])
def test_a_run_killed_before_its_validation_keeps_the_best_checkpoint(make_cfg, train, monkeypatch, loop, at):
    """The first validation is the best, and the run stops between its checkpoint and it."""
    values, evaluate = [], Runner.call_hook

    def fall(self, name, **kwargs):  # every validation is worse than the one before it
        if name == 'after_val_epoch':
            values.append(float(self.epoch or self.iter))
            kwargs['metrics'] = dict(mIoU=100 - values[-1])
        if name == 'before_val_epoch' and stops and self.work_dir.endswith('round_0'):
            stops.clear()
            raise InterruptedError
        return evaluate(self, name, **kwargs)

    monkeypatch.setattr(Runner, 'call_hook', fall)
    changes, stops = {'train_cfg.val_interval': at}, []
    _, expected = train(make_cfg({}, loop, changes=changes))
    cfg = make_cfg({}, loop, work_dir=make_cfg().work_dir + '_stopped', changes=changes)
    stops.append(True)
    with pytest.raises(InterruptedError):
        train(cfg)
    cfg.resume = True
    _, rounds = train(cfg)
    best = f'best_mIoU_{dict(iters="iter", epochs="epoch")[loop]}_{at}.pth'
    assert expected[0]['checkpoints']['best'] == rounds[0]['checkpoints']['best'] == best
    assert osp.isfile(osp.join(cfg.work_dir, 'round_0', best))


# --- moved and copied ------------------------------------------------------------------------------------------------


def files_in(folder: str) -> dict:
    return {osp.join(where, name): open(osp.join(where, name), 'rb').read()
            for where, _, names in os.walk(folder) for name in names}


@pytest.mark.parametrize('save_best', ['mIoU', ['mIoU', 'mAcc']])
def test_a_copy_goes_on_by_itself(make_cfg, train, tmp_path, monkeypatch, save_best):
    """Copied in mid-round, it comes to a better score: CheckpointHook deletes the best one before, by a path out of
    a checkpoint."""
    cfg = make_cfg(dict(rounds=0), changes={'train_cfg.max_iters': 6, 'train_cfg.val_interval': 2,
                                            'default_hooks.checkpoint.save_best': save_best})
    if not isinstance(save_best, str):
        cfg.default_hooks.checkpoint.rule = 'greater'
    copy, call = cfg.work_dir + ' \'copied\'', Runner.call_hook

    def call_hook(runner, name, **kwargs):
        if name == 'after_val_epoch':
            kwargs['metrics'] = dict(mIoU=float(runner.iter), mAcc=float(runner.iter))
        if name == 'after_train_iter' and runner.iter == 4 and not osp.exists(copy):
            raise InterruptedError
        begun.append(runner.iter) if name == 'before_train_iter' else None
        return call(runner, name, **kwargs)

    begun = []
    monkeypatch.setattr(Runner, 'call_hook', call_hook)
    with pytest.raises(InterruptedError):
        train(cfg)
    best = sorted(name for name in os.listdir(osp.join(cfg.work_dir, 'round_0')) if name.startswith('best'))
    assert 'best_mIoU_iter_4.pth' in best
    shutil.copytree(cfg.work_dir, copy)
    before = files_in(cfg.work_dir)
    begun.clear()
    _, rounds = train(make_cfg(dict(rounds=0), resume=True, work_dir=copy, changes={
        'train_cfg': cfg.train_cfg, 'default_hooks.checkpoint': cfg.default_hooks.checkpoint}))
    assert files_in(cfg.work_dir) == before and begun == [4, 5]  # and in mid-round
    assert rounds[0]['checkpoints'] == dict(last='iter_6.pth', best='best_mIoU_iter_6.pth')
    assert sorted(name for name in os.listdir(osp.join(copy, 'round_0')) if name.startswith('best')) == [
        name.replace('4', '6') for name in best]


@pytest.mark.parametrize('unit', ['image', 'region'])
def test_a_work_dir_that_was_moved_goes_on_in_mid_round(make_cfg, train, tmp_path, monkeypatch, unit):
    """To a place with any letters, behind a link; and again after the training, to its query."""
    al = dict(unit=unit, rounds=1)
    _, expected = train(make_cfg(al, work_dir=make_cfg().work_dir + '_whole'))
    cfg, call, begun, stops = make_cfg(al), Runner.call_hook, [], [2, 4]

    def call_hook(runner, name, **kwargs):
        if stops and name == 'before_train_iter' and runner.iter == stops[0] and runner.work_dir.endswith('round_1'):
            raise InterruptedError(stops.pop(0))
        begun.append(runner.iter) if name == 'before_train_iter' else None
        return call(runner, name, **kwargs)

    monkeypatch.setattr(Runner, 'call_hook', call_hook)
    with pytest.raises(InterruptedError):
        train(cfg)
    there = tmp_path / "Straße 'x' [y]\n日本"
    there.mkdir()
    shutil.move(cfg.work_dir, there / 'the work')
    (tmp_path / 'link').symlink_to(there)
    begun.clear()
    cfg = make_cfg(al, work_dir=str(tmp_path / 'link' / 'the work'), resume=True)
    _, rounds = train(cfg)
    assert begun == [2, 3]
    assert [(e['asked'], e['metrics'], e['checkpoints']) for e in rounds] == [
        (e['asked'], e['metrics'], e['checkpoints']) for e in expected]


def test_checkpoints_cannot_lie_elsewhere(make_cfg, train, tmp_path):
    with pytest.raises(ValueError, match='`default_hooks.checkpoint.out_dir` should be None: .* but got .*elsewhere'):
        train(make_cfg({}, changes={'default_hooks.checkpoint.out_dir': str(tmp_path / 'elsewhere')}))


@pytest.mark.parametrize('text', ['', '/', '..', '/etc/passwd', '../round_1/iter_2.pth', 'iter_9.pth'])
def test_only_the_name_counts_of_what_last_checkpoint_holds(tmp_path, text):
    for k in range(2):
        (tmp_path / f'round_{k}').mkdir()
        torch.save({}, tmp_path / f'round_{k}' / 'iter_2.pth')
    folder = str(tmp_path / 'round_0')
    assert al_patch.resumable_checkpoint(folder) is None
    (tmp_path / 'round_0' / 'last_checkpoint').write_text(text)
    expected = osp.join(folder, 'iter_2.pth') if text.endswith('iter_2.pth') else None
    assert al_patch.resumable_checkpoint(folder) == expected


def test_no_temporary_file_outlives_the_next_start(make_cfg, train, tmp_path):
    """Those of our own writers, wherever they are in the work_dir; a user's stays, and so does what a link leads to."""
    cfg = make_cfg(dict(unit='pixel', rounds=0), changes=SHORT)
    ours = [osp.join(cfg.work_dir, *parts) for parts in (
        ['al_state.json.al.tmp'], ['round_0', 'labelled', 'a', '.hidden', '0.png.al.tmp'], ['superpixels', 'x.al.tmp'])]
    (tmp_path / 'outside').mkdir()
    theirs = [osp.join(cfg.work_dir, 'notes.tmp'), str(tmp_path / 'outside' / 'x.al.tmp')]
    for resume in (False, True):
        for path in (*ours, *theirs):
            os.makedirs(osp.dirname(path), exist_ok=True)
            open(path, 'w').close()
        if not resume:
            os.symlink(tmp_path / 'outside', osp.join(cfg.work_dir, 'link'))
        train(make_cfg(dict(unit='pixel', rounds=int(resume)), changes={**SHORT, 'resume': resume}))
        assert not any(map(osp.exists, ours)) and all(map(osp.exists, theirs))


# --- SIGTERM and Ctrl-C ----------------------------------------------------------------------------------------------


def stops_itself(tmp_path, number: int, **kwargs) -> dict:
    return dict(dict(type='DieOnce', round=1, after=3, marker=str(tmp_path / 'died'), number=int(number)), **kwargs)


def test_a_run_that_sigterm_ends_goes_on(make_cfg, train, tmp_path, monkeypatch):
    """Ctrl-C, with its exit code: see test_scripts.py."""
    monkeypatch.delenv('AL_COMMAND', raising=False)
    monkeypatch.setattr(sys, 'argv', ['train it.py', 'x.py', '--resume'])
    _, expected = train(make_cfg({}, work_dir=make_cfg().work_dir + '_whole'))
    cfg = make_cfg({}, custom_hooks=[stops_itself(tmp_path, signal.SIGTERM)])
    child = os.fork()
    if child == 0:
        try:
            train(cfg)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert "go on with: python 'train it.py' x.py --resume\n" in tiny.log_of(cfg.work_dir)
    cfg.resume = True
    _, rounds = train(cfg)
    assert [(entry['asked'], entry['metrics']) for entry in rounds] == [
        (entry['asked'], entry['metrics']) for entry in expected]


# --- several processes -----------------------------------------------------------------------------------------------


def test_a_process_that_dies_ends_the_run(tmp_path, shared_data):
    """And does not leave the other one waiting for it: `shell` would lose its patience."""
    hook = dict(type='DieOnce', round=1, after=3, marker=str(tmp_path / 'died'), rank=1)
    config = write_config(tmp_path, shared_data, AL, sync=True, more=f'custom_hooks = [{hook}]\n')
    done = launch(config, 2, tmp_path / 'work', check=False)
    assert done.returncode not in (0, None) and (tmp_path / 'died').exists()
    assert read_state(tmp_path / 'work' / STATE_FILE)['round'] == 1
    with only_run(runner_in(tmp_path / 'work')):  # nobody is left who holds the work dir
        pass


def test_two_machines(tmp_path, shared_data):
    """Two launchers of one process each, as on two machines."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    config = write_config(tmp_path, shared_data, "dict(initial=4, budget=3, rounds=1, unit='pixel')", sync=True)
    command = ['bash', osp.join(ROOT, 'dist_al_train.sh'), str(config), '1', '--work-dir', str(tmp_path / 'work')]
    env = {**os.environ, 'PATH': osp.dirname(sys.executable) + os.pathsep + os.environ['PATH'], 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': osp.join(ROOT, 'tests'), 'CUDA_VISIBLE_DEVICES': '', 'NNODES': '2', 'PORT': port,
           'MASTER_ADDR': '127.0.0.1'}
    nodes = [subprocess.Popen(command, env={**env, 'NODE_RANK': str(rank)}, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT) for rank in range(2)]
    try:
        outputs = [node.communicate(timeout=150)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert ['Active learning has ended' in output for output in outputs] == [True, False]  # rank 0 alone logs
    assert [sum(n for n, _ in names.values()) for names, _ in result(tmp_path / 'work')] == [4, 3]


# --- two runs at once ------------------------------------------------------------------------------------------------


def runner_in(work_dir):
    import logging
    return type('', (), dict(work_dir=str(work_dir), logger=logging.getLogger('test')))


def test_a_second_run_is_refused_by_name_and_a_crash_frees_the_work_dir(tmp_path, make_cfg, train):
    """A worker that the first run has forked lives on, and does not keep the lock."""
    cfg = make_cfg({}, changes=SHORT)
    os.makedirs(cfg.work_dir)
    read, write = os.pipe()
    first = os.fork()
    if first == 0:
        try:
            with only_run(runner_in(cfg.work_dir)):
                worker = os.fork()
                if worker:
                    os.write(write, str(worker).encode())
                time.sleep(100)
        finally:
            os._exit(0)
    worker = int(os.read(read, 99))
    try:
        with pytest.raises(RuntimeError, match=rf'work is in use by process {first} on .*: wait for that run, stop it'):
            train(cfg)
        assert not osp.exists(osp.join(cfg.work_dir, STATE_FILE))
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        begin = time.time()
        with only_run(runner_in(cfg.work_dir)):
            assert time.time() - begin < 2
        os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read), os.close(write)
    assert len(train(cfg)[1]) == 2


def test_a_run_that_fails_frees_the_work_dir(make_cfg, train, monkeypatch):
    cfg = make_cfg({}, changes=SHORT)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(al_patch, 'run_rounds', lambda runner: (_ for _ in ()).throw(OSError))
        train(cfg)
    assert len(train(cfg)[1]) == 2


def test_where_files_cannot_be_locked_the_run_warns(make_cfg, train, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr('fcntl.lockf', unsupported)
    train(make_cfg(dict(rounds=0), changes=SHORT))
    assert re.search('al.lock cannot be locked .*take care that no other run uses this work_dir',
                     tiny.log_of(tmp_path / 'work'))


def test_run_rounds_is_what_the_lock_is_around(make_cfg, build, monkeypatch):
    seen = []
    monkeypatch.setattr(al_patch, 'run_rounds', lambda runner: seen.append(osp.isfile(
        osp.join(runner.work_dir, 'al.lock'))) or run_rounds(runner))
    build(make_cfg(dict(rounds=0), changes=SHORT)).train()
    assert seen == [True]


# --- a disk that is too small, and al.keep ---------------------------------------------------------------------------


ADAM = {'optim_wrapper.optimizer': dict(type='AdamW', lr=.1, _delete_=True)}


@pytest.mark.parametrize('al, changes, times', [
    (dict(rounds=1), {}, 2 * 2 * 2),  # rounds, checkpoints of each, weights and momentum
    (dict(rounds=1), ADAM, 2 * 2 * 3), (dict(rounds=3), {'default_hooks.checkpoint.save_optimizer': False}, 4 * 2),
    (dict(rounds=3), {'default_hooks.checkpoint.max_keep_ckpts': 1}, 4 * 2),
    (dict(rounds=3, keep='needed'), {}, 2 * 2 * 2), (dict(rounds=1), {'default_hooks.checkpoint.interval': -1}, 2 * 2),
    (dict(rounds=0), {'val_cfg': dict(), 'default_hooks.checkpoint.save_best': 'mIoU'}, 2 * 2 + 1),
    (dict(unit='region', rounds=1), {}, 2 * 2 * 2)])
def test_a_disk_that_is_too_small_is_refused_before_anything(make_cfg, build, monkeypatch, al, changes, times):
    """What the weights take, by hand: 8 bytes are BatchNorm's counter."""
    base = tiny.NO_VAL if 'val_cfg' not in changes else {}
    runner = build(make_cfg(al, changes={**base, **changes}))
    weights = sum(4 * p.numel() for p in runner.model.parameters()) + 2 * 4 * 8 + 8
    need = times * weights + ('unit' in al) * 2 * 12 * 32 * 48 // 100
    pool, al = al_patch.Pool(runner.cfg), al_patch.parse_settings(runner.cfg.al)
    state = al_patch.State(dict(seed=0, config={}), runner.work_dir, al, runner, pool)
    for free in (need, need - 1):
        monkeypatch.setattr(shutil, 'disk_usage', lambda path, free=free: types.SimpleNamespace(free=free))
        if free == need:
            al_report.check_disk(state)
        else:
            with pytest.raises(OSError, match=r'GB free for \d rounds .*: lower `default_hooks.check'):
                runner.train()
            assert not osp.exists(osp.join(runner.work_dir, STATE_FILE))


@pytest.mark.parametrize('weights', ['scratch', 'best'])
def test_only_checkpoints_that_are_needed_are_kept(make_cfg, train, weights):
    cfg = make_cfg(dict(rounds=2, weights=weights))
    _, expected = train(make_cfg(dict(rounds=2, weights=weights), work_dir=cfg.work_dir + '_all'))
    cfg.al.rounds = 1
    train(cfg)
    assert [checkpoints_in(cfg, k) for k in range(2)] == [['best_mIoU_iter_4.pth', 'iter_2.pth', 'iter_4.pth']] * 2
    cfg.al.update(rounds=2, keep='needed')
    cfg.resume = True
    _, rounds = train(cfg)
    assert [(e['asked'], e['metrics']) for e in rounds] == [(e['asked'], e['metrics']) for e in expected]
    assert [checkpoints_in(cfg, k) for k in range(3)] == [[], [], ['best_mIoU_iter_4.pth', 'iter_2.pth', 'iter_4.pth']]
    log = tiny.log_of(cfg.work_dir)
    assert all(f'Deleted {cfg.work_dir}/round_{k}/iter_4.pth' in log for k in range(2))
    train(cfg)  # it may be resumed once more


def checkpoints_in(cfg, k: int) -> list:
    return sorted(name for name in os.listdir(osp.join(cfg.work_dir, f'round_{k}')) if name.endswith('.pth'))


# --- a full disk -----------------------------------------------------------------------------------------------------


class FullDisk:
    """`os.fsync` that finds no space left for a file from its ``after``-th call on."""

    def __init__(self, after: int):
        self.left, self.fsync = after, os.fsync

    def __call__(self, file: int) -> None:
        self.left -= stat.S_ISREG(os.fstat(file).st_mode)
        if self.left < 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        self.fsync(file)


@pytest.mark.parametrize('unit', ['image', 'pixel'])
def test_a_full_disk_leaves_a_state_to_go_on_from(make_cfg, train, monkeypatch, unit):
    al = dict(unit=unit, initial=4, budget=2, rounds=1)
    whole = make_cfg(al, changes=SHORT)
    _, expected = train(whole)
    cfg = make_cfg(al, work_dir=whole.work_dir + '_full', changes=SHORT)
    writes = 0
    while True:  # every write in turn is the first that fails
        with monkeypatch.context() as patch:
            patch.setattr(os, 'fsync', FullDisk(writes))
            try:
                train(cfg)
                break
            except OSError as error:
                assert re.search(r'cannot be written and is left as it was \(\[Errno 28\] No space left', str(error))
        assert not [path for _, _, files in os.walk(cfg.work_dir) for path in files if path.endswith('.tmp')]
        path = osp.join(cfg.work_dir, STATE_FILE)
        cfg.resume, writes = osp.isfile(path), writes + 1
        assert not cfg.resume or read_state(path)['rounds'][0]['asked'] == expected[0]['asked']
    rounds = read_state(path)['rounds']
    assert writes >= 3 and [entry['asked'] for entry in rounds] == [entry['asked'] for entry in expected]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_write_that_the_system_refuses(tmp_path, monkeypatch):
    path = tmp_path / 'al_state.json'
    path.write_text('old')
    real = open
    monkeypatch.setattr('builtins.open', lambda name, *args, **kwargs: real(
        '/dev/full' if str(name).endswith('.tmp') else name, 'wb' if str(name).endswith('.tmp') else args[0]))
    with pytest.raises(OSError, match=r'al_state.json cannot be written and is left as it was .*No space left'):
        write_atomically(str(path), 'new')
    monkeypatch.undo()
    assert path.read_text() == 'old'


def test_a_mask_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / 'a' / 'x.png')
    write_png(path, np.eye(4, dtype=bool))
    with monkeypatch.context() as patch, pytest.raises(OSError, match='x.png cannot be written'):
        patch.setattr(os, 'replace', FullDisk(0))
        patch.setattr(os, 'fsync', FullDisk(0))
        write_png(path, np.zeros((4, 4), bool))
    assert (al_patch.read_mask(path) == np.eye(4, dtype=bool)).all() and os.listdir(tmp_path / 'a') == ['x.png']


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Evil:

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker, )


@pytest.mark.skipif(not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'),
                    reason='torch < 2.6 reads any checkpoint')
@pytest.mark.parametrize('phase', ['train', 'query', 'done'])
def test_a_checkpoint_that_would_run_code_is_refused_by_name(make_cfg, train, tmp_path, ctrl_c_counts, phase):
    cfg = make_cfg(dict(rounds=0 if phase == 'done' else 1), changes=tiny.NO_VAL)
    name = 'iter_4.pth'
    if phase == 'train':  # stopped halfway through round 0
        name, cfg.custom_hooks = 'iter_2.pth', [stops_itself(tmp_path, signal.SIGINT, round=0)]
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    else:
        train(make_cfg(dict(rounds=0), changes=tiny.NO_VAL))
    path = osp.join(cfg.work_dir, 'round_0', name)
    torch.save(dict(torch.load(path, weights_only=False), state_dict=Evil(tmp_path / 'ran')), path)
    cfg.resume = True
    with pytest.raises(ValueError, match=f'{path} cannot be used .* training state it holds posix.mkdir'):
        train(cfg)
    assert not (tmp_path / 'ran').exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / 'ran').exists()  # the checkpoint was evil indeed


def test_a_truncated_checkpoint_is_named(make_cfg, train):
    cfg = make_cfg({}, changes=tiny.NO_VAL)
    train(make_cfg(dict(rounds=0), changes=tiny.NO_VAL))
    path = osp.join(cfg.work_dir, 'round_0', 'iter_4.pth')
    os.truncate(path, os.path.getsize(path) // 2)
    cfg.resume = True
    with pytest.raises(ValueError, match=f'^{path} cannot be used'):
        train(cfg)
