"""One, two and four processes choose the same from one checkpoint, and write each file once."""
import collections
import contextlib
import copy
import json
import os
import os.path as osp
import shutil
import socket
import time
from types import SimpleNamespace

import mmengine.dist
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import al_patch
import al_report
import al_train
from al_patch import Pool, State, add_round, on_rank_0, only_run, parse_settings, query, read_state

LAST = 'entropy', 'pixel'  # the choice that is labelled, too
UNITS = dict(image='image', region=dict(type='region', size=[8, 8]), pixel=dict(type='pixel', radius=1))


# presets, and the scores that are strategies by their name alone: conformal_risk is none without calibration
STRATEGIES = [*al_patch.AL_STRATEGIES.module_dict, *sorted({*al_patch.AL_SCORES.module_dict} - {'conformal_risk'})]


def settings_of(strategy: str, unit: str) -> dict:
    return parse_settings(dict(unit=UNITS[unit], strategy=strategy, initial=tiny.NAMES[:3], budget=4, rounds=1))


def units_of(strategy: str) -> list:
    """Whole images, and pixels or else regions: those at which a preset is not refused."""
    units = []
    for unit in UNITS:
        with contextlib.suppress(ValueError):
            units.append(settings_of(strategy, unit) and unit)
    return units[:1] + units[1:][-1:]


def join(rank: int, processes: int, port: int, cfg: Config) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(processes), RANK=str(rank),
                      LOCAL_RANK=str(rank))
    al_train.init_cpu_processes(cfg)


def start(function, processes: int, *args) -> None:
    """Call a function (rank, processes, port, *args) in so many processes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(function, (processes, port, *args), processes, start_method='fork')


def choose(rank: int, processes: int, port: int, cfg: Config, cases: list, out: str) -> None:
    """What a rank makes of every case, and the files that it writes when it labels the last one; left in a file."""
    if processes > 1:
        join(rank, processes, port, cfg)
    cfg.experiment_name = f'choose_{processes}_{rank}'
    runner, chosen, replace, written = Runner.from_cfg(cfg), {}, os.replace, []
    pool, before = Pool(cfg), read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE))
    before['rounds'][0]['held_out'] = tiny.NAMES[:1]  # for those that calibrate
    for strategy, unit in cases:
        state = State(copy.deepcopy(before), cfg.work_dir, settings_of(strategy, unit), runner, pool)
        with al_patch.checkpoints_are_data():
            asked = query(state, runner)
        chosen[f'{strategy} {unit}'] = {name: ids if ids is None else ids.tolist() for name, ids in asked.items()}
    os.replace = lambda a, b: written.append(b) or replace(a, b)
    state.rounds[0].update(pixels=3 * 32 * 48, void_pixels=0)  # as it would have been below image level
    add_round(state, asked)
    os.replace = replace
    with open(osp.join(out, f'{processes}_{rank}.json'), 'w') as file:
        json.dump([chosen, written], file)


@pytest.fixture(scope='module')
def shares(tmp_path_factory, shared_data):
    """A function from a number of processes to what each of them chose and wrote. All start from one checkpoint."""
    folder = tmp_path_factory.mktemp('processes')
    cfg = Config.fromstring(tiny.config_text(shared_data), '.py')
    cfg.update(work_dir=str(folder / 'trained'), experiment_name='processes',
               al=dict(initial=tiny.NAMES[:3], budget=4, rounds=0))
    cases = [(strategy, unit) for strategy in STRATEGIES for unit in units_of(strategy)] + [LAST]

    def run(processes: int) -> list:
        own = Config(dict(cfg.to_dict(), work_dir=str(folder / f'of_{processes}')))
        shutil.copytree(folder / 'trained', own.work_dir)
        start(choose, processes, own, cases, str(folder))
        return [json.load(open(folder / f'{processes}_{rank}.json')) for rank in range(processes)]

    Runner.from_cfg(cfg).train()
    return {processes: run(processes) for processes in (1, 2, 4)}


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_any_number_of_processes_chooses_the_same(shares, strategy):
    assert len(units_of(strategy)) == 2
    for unit in units_of(strategy):
        [[[expected, _]], *others] = [[(chosen[f'{strategy} {unit}'], 0) for chosen, _ in shares[n]] for n in (1, 2, 4)]
        assert all(chosen == expected for ranks in others for chosen, _ in ranks)
        assert 4 == (len(expected) if unit == 'image' else sum(map(len, expected.values())))
        assert not {*expected} & {*tiny.NAMES[:3]}


@pytest.mark.parametrize('processes', [2, 4])
def test_the_state_is_written_by_rank_0_and_every_mask_by_one_rank(shares, processes):
    written = [paths for _, paths in shares[processes]]
    number = collections.Counter(path for paths in written for path in paths)
    chosen = shares[processes][0][0][' '.join(LAST)]
    assert set(number.values()) == {1} and len(number) == len(chosen) + 1
    states = [[path for path in paths if path.endswith('.json')] for paths in written]
    assert [len(paths) for paths in states] == [1] + [0] * (processes - 1)


def segment(rank: int, processes: int, port: int, cfg: Config, out: str) -> None:
    """The superpixels that a rank makes, left in a file, and what it knows of all."""
    join(rank, processes, port, cfg)
    cfg.experiment_name = f'segment_{rank}'
    runner, replace, written = Runner.from_cfg(cfg), os.replace, []
    state = State(dict(seed=0, config={}), cfg.work_dir, parse_settings(cfg.al), runner, Pool(cfg))
    os.replace = lambda a, b: written.append(b) or replace(a, b)
    seen = al_report.look_at_segments(state, state.pool.names)
    os.replace = replace
    with open(osp.join(out, f'{rank}.json'), 'w') as file:
        json.dump([seen, written], file)


def test_processes_share_the_superpixels(tmp_path, make_cfg):
    cfg = make_cfg(dict(unit=dict(type='superpixel', n_segments=12)))
    start(segment, 2, cfg, str(tmp_path))
    (seen, mine), (again, others) = [json.load(open(tmp_path / f'{rank}.json')) for rank in range(2)]
    assert seen == again and [*seen] == tiny.NAMES and min(seen.values()) >= 6
    assert len({*mine, *others}) == len(mine) + len(others) == 12 and len(mine) == 6


# --- what one waits for ----------------------------------------------------------------------------------------------


def try_to_wait(rank: int, processes: int, port: int, out: str) -> None:
    """Wait for work of rank 0, for work of it that fails, and without asking."""
    torch.set_grad_enabled(True)
    join(rank, processes, port, Config(dict(env_cfg=dict(dist_cfg=dict(backend='nccl', timeout=3)))))
    seen, ran = [], []

    def work(seconds: float, fails: bool = False) -> tuple:
        ran.append(seconds)
        time.sleep(seconds)
        if fails:
            raise ValueError('of rank 0')
        return rank, torch.is_grad_enabled()

    seen.append(on_rank_0(lambda: work(7)))
    for error in (ValueError, RuntimeError):
        try:
            on_rank_0(lambda: work(0, fails=True)) if error is ValueError else rank or time.sleep(7)
            mmengine.dist.barrier()
        except error as caught:
            seen.append([type(caught).__name__, str(caught) if error is ValueError else ''])
    with open(osp.join(out, f'{rank}.json'), 'w') as file:
        json.dump([seen, ran], file)
    os._exit(0)  # what has timed out is not to be waited for


def test_work_of_rank_0_may_take_longer_than_the_timeout(tmp_path):
    """env_cfg.dist_cfg.timeout counts on the CPU, too: 3 s, of which `barrier` is reminded."""
    start(try_to_wait, 2, str(tmp_path))
    (first, ran), (second, idle) = [json.load(open(tmp_path / f'{rank}.json')) for rank in range(2)]
    assert first[:2] == second[:2] == [[0, False], ['ValueError', 'of rank 0']]
    assert ['RuntimeError', ''] in first + second and (ran, idle) == ([7, 0], [])


def test_one_process_just_works():
    assert on_rank_0(lambda: torch.is_grad_enabled()) is torch.is_grad_enabled()
    with pytest.raises(ArithmeticError, match='as it is'):
        on_rank_0(lambda: (_ for _ in ()).throw(ArithmeticError('as it is')))


@pytest.mark.parametrize('timeout', ['an hour', 0, True])
def test_a_timeout_is_a_number_of_seconds(timeout):
    with pytest.raises(ValueError, match='`env_cfg.dist_cfg.timeout` should be a number of seconds above 0, but got '):
        al_train.init_cpu_processes(Config(dict(env_cfg=dict(dist_cfg=dict(timeout=timeout)))))


def try_to_lock(rank: int, processes: int, port: int, folders: list, out: str) -> None:
    join(rank, processes, port, Config({}))
    try:
        with only_run(SimpleNamespace(work_dir=folders[rank])):
            seen = 'alone'
    except RuntimeError as error:
        seen = str(error)
    with open(osp.join(out, str(rank)), 'w') as file:
        file.write(seen)
    mmengine.dist.barrier()


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('again', [True, False])
def test_a_work_dir_that_machines_do_not_share_is_refused_on_all(tmp_path, shared, again):
    """Whether or not an earlier run has left its lock in each."""
    folders = [str(tmp_path / 'one'), str(tmp_path / ('one' if shared else 'other'))]
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
        if again:
            open(osp.join(folder, 'al.lock'), 'w').close()
    start(try_to_lock, 2, folders, str(tmp_path))
    for rank, folder in enumerate(folders):
        assert (tmp_path / str(rank)).read_text() == ('alone' if shared else (
            f'{folder} should be one folder on a disk that all machines share, but not all processes find the al.lock '
            'of rank 0 in it: choose another --work-dir'))
