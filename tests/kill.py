"""Kill a run with `kill -9` again and again, resume it, and compare it with a run that nothing stopped.

    python tests/kill.py --kills 50 --unit region --processes 2

Before one in five of the resumes, the work_dir is moved, or copied and the copy goes on.

Every run is `al_train.main()` with real options: three rounds of queries on a tiny data set. Its processes are forked
from this one, which has imported mmseg before, so that a start takes no seconds, and they share one process group,
which is killed as a whole. Half of the kills fall at random instants; the other half are aimed at phases that are too
short to be hit by chance. After every kill the state and all masks that it refers to must be readable.
"""
import argparse
import collections
import contextlib
import gc
import mmap
import os
import os.path as osp
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback

HERE = osp.dirname(osp.abspath(__file__))
sys.path[:0] = [osp.dirname(HERE), HERE]
import mmengine.config.config  # noqa: E402
import mmengine.runner.runner  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from mmengine.runner import ValLoop  # noqa: E402
from prettytable import PrettyTable  # noqa: E402

import al_patch  # noqa: E402
import al_train  # noqa: E402

UNITS = dict(
    image=dict(initial=3, budget=2, query_with='best', weights='last'),
    region=dict(unit=dict(type='region', size=[8, 8]), initial=12, budget=9, query_with='best'),
    superpixel=dict(unit=dict(type='superpixel', n_segments=12, compactness=100.), initial=9, budget=6),
    pixel=dict(unit='pixel', strategy='pixelpick', per_image=True, initial=4, budget=3, weights='last'))
MORE = '''
train_cfg = dict(type='IterBasedTrainLoop', max_iters=6, val_interval=2)
default_hooks['checkpoint'].update(max_keep_ckpts=1)
optim_wrapper['optimizer'].update(lr=.4)  # so high that the best checkpoint is often not the last
train_dataloader.update(num_workers={workers}, persistent_workers={workers} > 0)
'''
# phase: the functions that are it; the innermost counts
PHASES = {
    'starting': [],
    'between phases': [(al_patch, 'run_rounds')],
    'building a round': [(al_patch, 'build_round')],
    'training': [(al_patch, 'train_round')],
    'validating': [(ValLoop, 'run')],
    'checkpointing': [(al_patch.Runner, 'save_checkpoint')],
    'scoring': [(al_patch, 'query')],
    'selecting': [(al_patch.Collector, 'choose'), (al_patch.Collector, 'result')],
    'labelling': [(al_patch, 'add_round')],
    'writing a mask': [(al_patch, 'write_png')],
    'writing the state': [(al_patch.State, 'save')]}
AIMED_AT = ['checkpointing', 'selecting', 'labelling', 'writing a mask', 'writing the state']


def watch(board: mmap.mmap) -> None:
    """Let the board's one byte say in which phase this process is."""

    def watched(function, phase):

        def wrapper(*args, **kwargs):
            before, board[0] = board[0], phase
            try:
                return function(*args, **kwargs)
            finally:
                board[0] = before

        return wrapper

    for phase, functions in enumerate(PHASES.values()):
        for owner, name in functions:
            setattr(owner, name, watched(vars(owner)[name], phase))


def start(options: list, processes: int, board: mmap.mmap, log: str) -> list:
    """Fork a run's processes into one process group. Returns their ids, the group's first."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        where = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(processes))
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid:
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pids[0] if pids else pid)  # here and there: whichever comes first
            pids.append(pid)
            continue
        try:
            os.setpgid(0, pids[0] if pids else 0)
            with open(log, 'a') as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = ['al_train.py', *options]
            if processes > 1:
                os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
                sys.argv += ['--launcher', 'pytorch']
            if rank == 0:
                watch(board)
            al_train.main()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pids


def ended(pids: list, log: str) -> bool:
    """Whether all processes have ended, and well. Those that have are taken out of the list."""
    for pid in list(pids):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done and status:
            raise RuntimeError(f'a process failed by itself:\n{open(log).read()[-3000:]}')
        if done:
            pids.remove(pid)
    return not pids


def run_until(options: list, processes: int, log: str, rng=None, seconds: float = 0.) -> str:
    """Start a run and kill it: at an instant drawn from ``seconds``, or in a phase. Without ``rng`` it may end.

    Returns:
        The phase in which it was killed; '' if it ended before.
    """
    board, begin = mmap.mmap(-1, 1), time.time()
    pids = start(options, processes, board, log)
    group = pids[0]
    aim = rng and rng.random() < .5 and list(PHASES).index(rng.choice(AIMED_AT))
    delay = rng.uniform(0, .004 if aim else seconds) if rng else 1e9
    at = None if aim else begin + delay
    while at is None or time.time() < at:
        if aim and at is None and board[0] == aim:
            at = time.time() + delay
        if ended(pids, log):
            return ''
        if time.time() > begin + 300:
            os.killpg(group, signal.SIGKILL)
            raise TimeoutError(f'a run hangs:\n{open(log).read()[-3000:]}')
        time.sleep(.0002 if aim else .005)
    phase = list(PHASES)[board[0]]
    os.killpg(group, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    return phase


def masks_of(work_dir: str, content: dict) -> dict:
    """Every mask that the state refers to."""
    state = al_patch.State(content, work_dir)
    return {name: al_patch.read_mask(state.mask_path(k, name)).tolist()
            for name, k in state.labelled().items() if k is not None}


def outcome(work_dir: str) -> tuple:
    """What a run asked for and what came of it.

    Raises:
        AssertionError: Something was asked for twice.
    """
    state = al_patch.read_state(osp.join(work_dir, al_patch.STATE_FILE))
    rounds, masks = state['rounds'], masks_of(work_dir, state)
    if state['settings']['unit']['type'] == 'image':
        names = [name for entry in rounds for name in entry['asked']]
        assert len(names) == len(set(names)), 'an image was asked for twice'
    else:
        labelled = sum(sum(map(sum, mask)) for mask in masks.values())
        assert sum(entry['pixels'] for entry in rounds) == labelled, 'pixels were asked for twice'
    return [(entry['asked'], entry['metrics'], entry['checkpoints']) for entry in rounds], masks


def contents(folder: str) -> dict:
    """Every file below a folder, and its bytes."""
    paths = [osp.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return {path: open(path, 'rb').read() for path in paths}


def measure(unit: str, processes: int, workers: int, kills: int, seed: int, folder: str) -> list:
    """Kill runs of a unit so many times. Returns a row of the table."""
    config, log = osp.join(folder, f'{unit}.py'), osp.join(folder, f'{unit}_{processes}.log')
    root = osp.join(folder, 'data')
    if not osp.isdir(root):
        tiny.make_data(root)
    with open(config, 'w') as file:
        text = tiny.config_text(root, sync=True) + MORE.format(workers=workers)
        file.write(f'{text}al = dict(rounds=3, **{UNITS[unit]!r})\n')

    def options(work_dir: str) -> list:
        resume = ['--resume'] if osp.isfile(osp.join(work_dir, al_patch.STATE_FILE)) else []
        return [config, '--work-dir', work_dir, *resume]

    whole = osp.join(folder, f'{unit}_{processes}')
    begin = time.time()
    run_until(options(whole), processes, log)
    seconds, expected, rng = time.time() - begin, outcome(whole), random.Random(f'{seed} {unit} {processes}')
    phases, runs, resumes, moves, equal = collections.Counter(), 0, 0, 0, True
    while sum(phases.values()) < kills or not runs:
        work_dir, runs, phase, originals = f'{whole}_run_{runs}', runs + 1, 'start', []
        while phase:
            resumes += phase != 'start'
            left = sum(phases.values()) < kills
            phase = run_until(options(work_dir), processes, log, rng if left else None, seconds)
            path = osp.join(work_dir, al_patch.STATE_FILE)
            if phase and rng.random() < .2:
                elsewhere = f'{whole}_{runs}_{resumes} elsewhere'
                if rng.random() < .5:
                    shutil.move(work_dir, elsewhere)
                else:
                    shutil.copytree(work_dir, elsewhere)
                    originals.append((work_dir, contents(work_dir)))
                work_dir, path, moves = elsewhere, osp.join(elsewhere, al_patch.STATE_FILE), moves + 1
            if phase:
                phases[phase] += 1
                if osp.isfile(path):
                    masks_of(work_dir, al_patch.read_state(path))
        left = [name for _, _, names in os.walk(work_dir) for name in names if name.endswith('.tmp')]
        same = outcome(work_dir) == expected and not left and all(
            contents(original) == before for original, before in originals)
        equal = equal and same
        if same:
            for folder in (work_dir, *(original for original, _ in originals)):
                shutil.rmtree(folder)
        else:
            print(f'{work_dir} differs from {whole}; log: {log}', flush=True)
    return [unit, processes, sum(phases.values()), runs, resumes, moves, f'{seconds:.1f}',
            ', '.join(f'{n} {phase}' for phase, n in phases.most_common()), 'yes' if equal else 'NO']


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=50, help='for each unit and number of processes')
    parser.add_argument('--unit', nargs='+', choices=UNITS, default=list(UNITS))
    parser.add_argument('--processes', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--workers', type=int, default=0, help='of the training dataloader of each process')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--keep', help='a folder for data, runs and logs, to look into afterwards')
    args = parser.parse_args()
    torch.set_num_threads(1)
    from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    gc.freeze()  # every data set of mmengine's collects garbage, which would otherwise visit all of torch each time
    mmengine.runner.runner.collect_env = dict  # it asks compilers for their version: slow
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)  # so is yapf
    table = PrettyTable(['unit', 'processes', 'kills', 'runs', 'resumes', 'moved', 'run s', 'killed while', 'equal?'])
    with contextlib.ExitStack() as stack:
        folder = args.keep or stack.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(folder, exist_ok=True)
        for unit in args.unit:
            for processes in args.processes:
                table.add_row(measure(unit, processes, args.workers, args.kills, args.seed, folder))
                print(' | '.join(map(str, table.rows[-1])), flush=True)
    print(table)
    return any(row[-1] != 'yes' for row in table.rows)


if __name__ == '__main__':
    sys.exit(main())
