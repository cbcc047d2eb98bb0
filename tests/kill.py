"""Kill runs with `kill -9` again and again, and compare what they come to with runs that nothing stopped.

    python tests/kill.py --kills 1000 --jobs 2 --results kills.jsonl
    python tests/kill.py --kills 20 --units region --processes 2 --labels human --keep some/folder

Every run is `al_train.main()` with real options: three trainings and two queries on a tiny data set, for each unit (and
for `continued`, whole images whose training goes on), with one process and with two, with simulated labels and with
those of an annotator, whom this script plays: between two starts he puts label maps of what is asked for into the
round's inbox, sometimes half of them first. The processes are forked from this one, which has imported mmseg before, so
that a start takes no seconds; they share one process group, which is killed as a whole. Half of the kills fall at
random instants, the other half at a file that is opened to be written, renamed or removed: the n-th of them, then or
within three milliseconds. After one kill in five the run's folder is moved, or copied, and the run goes on in the new
place: the old one must not come back, and the original must stay as it was, to the byte.

A run is right if, beside logs, reports and seconds, every file holds what it holds in the run that nothing stopped, and
no other file is left. Its line in the file of results is written when it ends: what a long measurement has found is
there whenever it is stopped, and the same command goes on with it.
"""
import argparse
import collections
import contextlib
import csv
import gc
import hashlib
import io
import itertools
import json
import mmap
import os
import os.path as osp
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from typing import Any, Iterator, NamedTuple, Optional

HERE = osp.dirname(osp.abspath(__file__))
sys.path[:0] = [osp.dirname(HERE), HERE]
import cv2  # noqa: E402
import mmengine.config.config  # noqa: E402
import mmengine.runner.runner  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.runner import ValLoop  # noqa: E402
from prettytable import PrettyTable  # noqa: E402

import al_label  # noqa: E402
import al_patch  # noqa: E402
import al_report  # noqa: E402
import al_train  # noqa: E402

UNITS = dict(
    image=dict(initial=3, budget=2, query_with='best', weights='last'),
    region=dict(unit=dict(type='region', size=[8, 8]), initial=12, budget=9, query_with='best'),
    window=dict(unit=dict(type='region', window=2), initial=9, budget=6, weights='best'),
    superpixel=dict(unit=dict(type='superpixel', n_segments=12, compactness=100.), initial=9, budget=6),
    pixel=dict(unit='pixel', strategy='pixelpick', per_image=True, initial=4, budget=3, weights='last'),
    continued=dict(initial=3, budget=2, query_with='best', weights='continue'))
MORE = '''
train_cfg = dict(type='IterBasedTrainLoop', max_iters={iters}, val_interval=2)
default_hooks['checkpoint'].update(max_keep_ckpts=1)
optim_wrapper['optimizer'].update(lr=.4)  # so high that the best checkpoint is often not the last
train_dataloader.update(num_workers={workers}, persistent_workers={workers} > 0)
'''
# phase: the functions that are it; the innermost counts
PHASES = {
    'starting': [],
    'between phases': [(al_patch, 'run_rounds')],
    'resuming': [(al_report, 'check_resume')],
    'building a round': [(al_patch, 'build_round')],
    'training': [(al_patch, 'train_round')],
    'validating': [(ValLoop, 'run')],
    'checkpointing': [(al_patch.Runner, 'save_checkpoint')],
    'querying': [(al_patch, 'query')],
    'labelling': [(al_patch, 'add_round')],
    'accepting labels': [(al_label, 'accept_labels')],
    'exporting': [(al_label, 'export')],
    'reporting': [(al_report, 'report_curve'), (al_report, 'report_asked'), (al_report, 'keep')],
    'writing a file': [(al_patch, 'write_atomically')],
    'writing the state': [(al_patch.State, 'save')]}
LOGS, REPORTS = r'\d{8}_\d{6}', r'learning_curve.*|asked\.png|asked_classes\.json|class_iou\.json|query_scores\.json'
VOID = 255


class Cell(NamedTuple):
    """A kind of run."""
    unit: str
    processes: int
    labels: str

    def __str__(self) -> str:
        return f'{self.unit}-{self.labels}-{self.processes}'


class Whole(NamedTuple):
    """What a run comes to that nothing stops: its files, and the seconds and writes (of each rank) that a start took at
    most."""
    files: dict
    seconds: float
    writes: list


class Wrong(Exception):
    """What is wrong with a run."""


# --- a start: fork, watch, kill --------------------------------------------------------------------------------------


def watch(board: memoryview) -> None:
    """Let the board's first number say in which phase this process is."""

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


def count_writes(folder: str, board: memoryview, rank: int, last: Optional[int], delay: float) -> None:
    """Let the board count what this rank is about to write, rename or remove in a folder, and let its process group die
    so long after the ``last`` one."""

    def die() -> None:
        time.sleep(delay)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR) or event in ('os.rename', 'os.remove', 'os.mkdir'):
            if str(args[0]).startswith(folder):
                board[1 + rank] += 1
                if board[1 + rank] == last:
                    threading.Thread(target=die, daemon=True).start() if delay else die()

    sys.addaudithook(hook)


def start(options: list, folder: str, processes: int, board: memoryview, log: str, aim: tuple) -> list:
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
            count_writes(folder, board, rank, *(aim[1:] if aim[0] == rank else (None, 0)))
            al_train.main()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pids


def run_until(options: list, work_dir: str, processes: int, log: str, delay: float, aim: tuple) -> tuple:
    """Start a run and kill it so many seconds after it has loaded its config, or where it aims at: at a rank's write,
    and how long after it.

    Returns:
        The phase in which it was killed, '' if it ended before, and each rank's writes.

    Raises:
        Wrong: A process fails by itself, or hangs.
    """
    board, begin = memoryview(mmap.mmap(-1, 64)).cast('I'), time.time()
    pids, was_killed, at = start(options, work_dir, processes, board, log, aim), False, None
    group = pids[0]

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)

    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pids.remove(pid)
                was_killed = was_killed or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                if status and not was_killed:
                    kill()
                    for each in pids:
                        os.waitpid(each, 0)
                    raise Wrong(f'a process fails by itself: {" ".join(open(log).read()[-1500:].split())}')
        at = at or board[0] and time.time() + delay
        if at and time.time() > at:
            kill()
        if time.time() > begin + 300:
            kill()
            raise Wrong(f'hangs: {" ".join(open(log).read()[-1500:].split())}')
        time.sleep(.003)
    return list(PHASES)[board[0]] if was_killed else '', board[1:1 + processes].tolist()


# --- a run: starts, kills, labels, other places ----------------------------------------------------------------------


class Project:
    """Runs of one kind, in a folder of their own."""

    def __init__(self, cell: Cell, folder: str, workers: int):
        self.cell, self.folder, self.log = cell, osp.join(folder, str(cell)), osp.join(folder, f'{cell}.log')
        self.config = osp.join(folder, f'{cell}.py')
        self.truth, root = (osp.join(folder, 'data', kind) for kind in ('simulated', cell.labels))
        al = dict(UNITS[cell.unit], rounds=2, oracle=cell.labels)
        with open(self.config, 'w') as file:
            text = tiny.config_text(root, sync=True) + MORE.format(
                workers=workers, iters=18 if al.get('weights') == 'continue' else 6)  # of the run, or of each round
            file.write(f'{text}al = {al!r}\n')
        cfg = Config.fromfile(self.config)
        init_default_scope(cfg.default_scope)
        al_label.hook()  # the settings of people who label are its
        self.settings, self.pool = al_patch.parse_settings(cfg.al), al_patch.Pool(cfg)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.whole = self.run_whole()

    def run_whole(self) -> Whole:
        """A run that nothing stops."""
        work_dir, seconds, writes = osp.join(self.folder, 'whole', 'work'), [], []
        while True:
            begin = time.time()
            writes.append(self.start(work_dir)[1])
            seconds.append(time.time() - begin)
            state = self.state(work_dir)
            if state.phase != 'label':
                break
            if len(seconds) > 9:
                raise Wrong(f'still waits in round {state.round}: {open(self.log).read()[-3000:]}')
            self.annotate(state)
        if self.cell.labels == 'human':
            for name in state.labelled():
                (classes, done), mask = state.stored_label(name), state.mask(name)
                if not (done[mask].all() and (classes[mask] == self.read_truth(name)[mask]).all()):
                    raise Wrong(f'{name} has other labels than were given')
        return Whole(contents(work_dir), max(seconds), [max(each) for each in zip(*writes)])

    def start(self, work_dir: str, delay: float = 1e9, aim: tuple = (None, )) -> tuple:
        resume = ['--resume'] if osp.isfile(osp.join(work_dir, al_patch.STATE_FILE)) else []
        return run_until([self.config, '--work-dir', work_dir, *resume], work_dir, self.cell.processes, self.log, delay,
                         aim)

    def state(self, work_dir: str) -> Optional[al_patch.State]:
        """The state on disk, all of whose masks can be read. None, if there is none yet."""
        path = osp.join(work_dir, al_patch.STATE_FILE)
        if not osp.isfile(path):
            return None
        state = al_patch.State(al_patch.read_state(path), work_dir, self.settings, pool=self.pool)
        for name in state.labelled():
            state.mask(name)
        return state

    def read_truth(self, name: str) -> np.ndarray:
        return cv2.imread(osp.join(self.truth, 'ann', 'train', f'{name}.png'), cv2.IMREAD_UNCHANGED)

    def annotate(self, state: al_patch.State, every: int = 1) -> None:
        """Put labels of what the newest round asks for into its inbox: of every unit, or of every second."""
        units = itertools.count()
        for name in state.entry['asked']:
            rows = al_label.unit_rows(state, name)
            known = np.isin(rows, [row for row in range(rows.max() + 1) if next(units) % every == 0])
            path = osp.join(state.folder(), 'labels', f'{name}.png')
            if known.any():
                os.makedirs(osp.dirname(path), exist_ok=True)
                cv2.imwrite(path, np.where(known, self.read_truth(name), np.uint8(VOID)))

    def run_killed(self, number: int, seed: int, kills: int) -> dict:
        """Kill a run until it ends or has been killed so often, and see what it came to: a line of the results."""
        rng, begin = random.Random(f'{seed} {self.cell} {number}'), time.time()
        folder = osp.join(self.folder, str(number))
        work_dir, places, copies, given = osp.join(folder, 'work'), itertools.count(1), {}, ()
        line = dict(self.cell._asdict(), run=number, seed=seed, kills=[], starts=0, moved=0, copied=0, halves=0)
        try:
            while True:
                delay, aim, how = 1e9, (None, ), ''
                part = rng.random()**2  # of a start: the early ones, which cost little, come to all of a run in the end
                if len(line['kills']) < kills and rng.random() < .5:
                    how, delay = 'instant', part * self.whole.seconds
                elif len(line['kills']) < kills:
                    rank = rng.randrange(self.cell.processes)
                    rank = rank if self.whole.writes[rank] else 0
                    how, after = 'write', rng.choice([0, rng.random() * .003])
                    aim = rank, 1 + int(part * self.whole.writes[rank]), after
                phase, _ = self.start(work_dir, delay, aim)
                line['starts'] += 1
                state = self.state(work_dir)
                if phase:
                    line['kills'].append([phase, how])
                    if rng.random() < .2 and osp.isdir(work_dir):
                        place, how = osp.join(folder, f'moved ä {next(places)}'), rng.choice(['moved', 'copied'])
                        if how == 'moved':
                            os.rename(work_dir, place)
                        else:
                            shutil.copytree(work_dir, place, symlinks=True)
                            copies[work_dir] = snapshot(work_dir)
                        line[how] += 1
                        work_dir, state = place, self.state(place)
                elif state.phase != 'label':
                    break
                elif given == (state.round, 1):
                    raise Wrong(f'does not take the labels of round {state.round}')
                is_asked = state and state.phase == 'label' and given != (state.round, 1)
                if is_asked and (not phase or rng.random() < .5):  # the annotator may be slower than the next start
                    given = state.round, 1 if given == (state.round, 2) else rng.choice([1, 2])
                    line['halves'] += given[1] == 2
                    self.annotate(state, given[1])
            wrong = [*differences(self.whole.files, contents(work_dir))]
            wrong += [f'left over: {name}' for name in sorted({*os.listdir(folder)} - {
                osp.basename(path) for path in (work_dir, *copies)})]
            wrong += [f'the original is not as it was: {path}' for path, was in copies.items() if snapshot(path) != was]
        except Exception as error:
            wrong = [str(error) if isinstance(error, Wrong) else ''.join(traceback.format_exception(error))[-1500:]]
        line.update(wrong=wrong[:20], seconds=round(time.time() - begin, 1))
        if not wrong:
            shutil.rmtree(folder)
        return line


# --- what a run comes to ---------------------------------------------------------------------------------------------


def snapshot(folder: str) -> dict:
    """Every path in a folder, and what is there."""
    return {path: None if osp.isdir(path) else hashlib.sha256(read(path)).hexdigest() for path in walk(folder)}


def walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        yield from (osp.join(parent, name) for name in (*folders, *files))


def read(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


def contents(work_dir: str) -> dict:
    """Path of every file, less the folders of logs -> what it holds, but for seconds, places and what is packed with a
    date."""
    paths = {osp.relpath(path, work_dir): path for path in walk(work_dir) if not osp.isdir(path)}
    return {name: content_of(path) for name, path in paths.items()
            if name.endswith('.tmp') or not any(re.fullmatch(LOGS, part) for part in name.split(os.sep))}


def content_of(path: str) -> Any:
    name = osp.basename(path)
    if name == al_patch.STATE_FILE:
        return without_seconds(json.loads(read(path)))
    if name.endswith('.pth'):
        weights = torch.load(path, map_location='cpu', weights_only=False)['state_dict']  # written by us, just now
        return {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in weights.items()}
    if name.endswith('.zip'):
        with zipfile.ZipFile(path) as archive:
            return {each: archive.read(each) for each in archive.namelist()}
    if name == 'last_checkpoint':
        return osp.basename(read(path).decode())
    if name == 'learning_curve.csv':
        with open(path, newline='') as file:
            return [{key: row[key] for key in row if not key.endswith(' s')} for row in csv.DictReader(file)]
    if name == al_patch.LOCK_FILE or name.endswith('.py'):
        return None
    return json.loads(read(path)) if name.endswith('.json') else read(path)


def without_seconds(value: Any) -> Any:
    """A state without times, and with checkpoints by name."""
    if isinstance(value, dict):
        return {key: {which: osp.basename(path) for which, path in each.items()} if key == 'checkpoints' else
                without_seconds(each) for key, each in value.items() if not key.endswith(('_seconds', '_at'))}
    return [*map(without_seconds, value)] if isinstance(value, list) else value


def differences(expected: dict, found: dict) -> Iterator[str]:
    """In what the files of a run differ from those of the run that nothing stopped. A report is drawn again only by
    the next round; and the label store keeps every version that was handed in."""
    for name in sorted({*expected, *found}):
        if name not in expected:
            if not name.startswith(osp.join('labels', 'handed_in', '')) or name.endswith('.tmp'):
                yield f'left over: {name}'
        elif not re.fullmatch(REPORTS, osp.basename(name)):
            if name not in found:
                yield f'missing: {name}'
            elif found[name] != expected[name]:
                yield f'differs: {name}: {difference(expected[name], found[name])}'


def difference(expected: Any, found: Any) -> str:
    """The first difference of two values, in short."""
    if isinstance(expected, dict) and isinstance(found, dict):
        pairs = {key: (expected.get(key, '-'), found.get(key, '-')) for key in [*expected, *found]}
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = dict(enumerate(zip(expected, found)))
    else:
        return f'{str(expected)[:80]} | {str(found)[:80]}'
    return next((f'{key}: {difference(*pair)}' for key, pair in pairs.items() if pair[0] != pair[1]), 'the order')


# --- all of them -----------------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Import, once for all that is forked from here, what a run would import, and spare what only takes time."""
    import matplotlib.pyplot
    import skimage.segmentation  # noqa: F401
    import torch._dynamo  # noqa: F401
    from mmseg.utils import register_all_modules
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=False)
    picture = io.BytesIO()
    matplotlib.pyplot.figure(figsize=(1, 1)).savefig(picture)
    al_report.draw_asked = al_report.draw_curves = lambda *args: None
    al_report.rendered = lambda figure, kind='png': picture.getvalue()  # every report is written, and none drawn
    mmengine.runner.runner.collect_env = dict  # it asks compilers for their version: slow
    mmengine.runner.runner.get_git_hash = str  # it starts git, at every checkpoint
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)  # so is yapf
    gc.collect()
    gc.freeze()  # every data set of mmengine's collects garbage, which would otherwise visit all of torch each time


def measure(cells: list, kills: int, seed: int, folder: str, workers: int, results: str) -> None:
    """Kill runs of each kind so many times, those that have had the fewest kills first, and write a line a run."""
    projects, begin = {}, time.time()
    while True:
        lines = read_lines(results)
        had = {cell: sum(len(line['kills']) for line in lines if of(line) == cell) for cell in cells}
        cell = min(cells, key=had.get)
        if had[cell] >= kills:
            return
        if cell not in projects:
            try:
                projects[cell] = Project(cell, folder, workers)
            except Wrong as error:
                print(f'{cell}, whole: {error}', flush=True)
                cells = [each for each in cells if each != cell]
                if not cells:
                    return
                continue
        number = sum(of(line) == cell for line in lines)
        line = projects[cell].run_killed(number, seed, min(kills - had[cell], 12))
        with open(results, 'a') as file:
            file.write(json.dumps(line) + '\n')
        total, places = sum(had.values()) + len(line['kills']), line['moved'] + line['copied']
        print(f'[{total}/{kills * len(cells)}, {time.time() - begin:.0f} s] {cell} run {number}: {len(line["kills"])} '
              f'kills, {places} moves, {line["seconds"]} s: {"; ".join(line["wrong"]) or "the same"}', flush=True)


def read_lines(results: str) -> list:
    if not osp.isfile(results):
        return []
    with open(results) as file:
        return [json.loads(line) for line in file]


def of(line: dict) -> Cell:
    return Cell(line['unit'], line['processes'], line['labels'])


def table_of(lines: list, cells: list) -> PrettyTable:
    table = PrettyTable(['unit', 'processes', 'labels', 'kills', 'at a write', 'moved', 'copied', 'halves', 'runs',
                         's a kill', 'killed while', 'wrong'])

    def add(name: tuple, some: list) -> None:
        kills = [kill for line in some for kill in line['kills']]
        phases = collections.Counter(phase for phase, _ in kills)
        table.add_row([*name, len(kills), sum(how == 'write' for _, how in kills),
                       *(sum(line[key] for line in some) for key in ('moved', 'copied', 'halves')), len(some),
                       f'{sum(line["seconds"] for line in some) / max(1, len(kills)):.1f}',
                       ', '.join(f'{n} {phase}' for phase, n in phases.most_common()),
                       sum(bool(line['wrong']) for line in some)])

    for cell in cells:
        add(cell, [line for line in lines if of(line) == cell])
    add(('all', '', ''), lines)
    table.max_width['killed while'] = 60
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=100, help='in all, in equal parts for each kind of run')
    parser.add_argument('--units', nargs='+', choices=UNITS, default=list(UNITS))
    parser.add_argument('--processes', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--labels', nargs='+', choices=['simulated', 'human'], default=['simulated', 'human'])
    parser.add_argument('--workers', type=int, default=0, help='of the training dataloader of each process')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=1, help='how many kinds of run are measured at a time')
    parser.add_argument('--results', help='a file for a line a run; what it holds counts')
    parser.add_argument('--keep', help='a folder for data, logs and runs that differ, to look into afterwards')
    args = parser.parse_args()
    warm_up()
    cells = [Cell(*each) for each in itertools.product(args.units, args.processes, args.labels)]
    with contextlib.ExitStack() as stack:
        folder = osp.abspath(args.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        results = args.results or osp.join(folder, 'kills.jsonl')
        if not osp.isdir(osp.join(folder, 'data')):
            tiny.make_data(osp.join(folder, 'data', 'simulated'))
            shutil.copytree(osp.join(folder, 'data', 'simulated'), osp.join(folder, 'data', 'human'))
            shutil.rmtree(osp.join(folder, 'data', 'human', 'ann', 'train'))  # people have their labels in the inbox
        jobs, each = [], -(-args.kills // len(cells))
        for job in range(args.jobs):
            jobs.append(os.fork())
            if not jobs[-1]:
                try:
                    measure(cells[job::args.jobs], each, args.seed, folder, args.workers, results)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
        failed = [os.waitpid(pid, 0)[1] for pid in jobs]
        lines = [line for line in read_lines(results) if of(line) in cells]
        print(table_of(lines, cells))
    return any(failed) or any(line['wrong'] for line in lines) or {*cells} != {*map(of, lines)}


if __name__ == '__main__':
    sys.exit(main())
