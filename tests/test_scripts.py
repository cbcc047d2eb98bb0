"""The real scripts in processes of their own, with tiny budgets."""
import contextlib
import os
import os.path as osp
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import mmengine
import mmseg
import pytest
import tiny
from tiny import ROOT, launch, result, shell, write_config

import al_train
from al_patch import STATE_FILE, read_state

MMSEG_TRAIN = osp.join(osp.dirname(mmseg.__file__), '.mim', 'tools', 'train.py')


@pytest.fixture(scope='module')
def whole(tmp_path_factory, shared_data):
    """A run of two rounds that nothing interrupts: its config and its work dir."""
    folder = tmp_path_factory.mktemp('whole')
    config = write_config(folder, shared_data, 'dict(initial=4, budget=2, rounds=1)')
    done = launch(config, 0, folder / 'work')
    assert 'Active learning has ended: 1 of 1 rounds' in done.stdout + done.stderr
    return config, folder / 'work'


def test_the_launcher_in_one_process(whole):
    rounds = result(whole[1])
    assert [len(asked) for asked, _ in rounds] == [4, 2] and all('mIoU' in metrics for _, metrics in rounds)


def test_mmsegs_own_train_script_does_the_same(whole, tmp_path):
    reach = os.pathsep.join([ROOT, osp.join(ROOT, 'tests')])
    shell(sys.executable, MMSEG_TRAIN, str(whole[0]), '--work-dir', str(tmp_path / 'work'), PYTHONPATH=reach)
    assert result(tmp_path / 'work') == result(whole[1])


def test_without_resume_a_run_is_refused_and_left_alone(whole):
    config, work_dir = whole
    before = (work_dir / STATE_FILE).read_text()
    done = launch(config, 0, work_dir, check=False)
    assert done.returncode == 2 and 'add --resume to go on with it' in done.stderr
    assert (work_dir / STATE_FILE).read_text() == before


@pytest.mark.parametrize('number, code', [(None, 9), (int(signal.SIGINT), 130)], ids=['kill', 'ctrl_c'])
def test_a_run_that_is_stopped_ends_as_one_that_is_not(whole, tmp_path, shared_data, ctrl_c_counts, number, code):
    """Stopped in round 1 after three of four iterations, with a checkpoint of the second. The log says how to go on."""
    hook = dict(type='DieOnce', round=1, after=3, marker=str(tmp_path / 'died'), number=number)
    more, work_dir = f'custom_hooks = [{hook}]\n', tmp_path / 'a work dir'
    config = write_config(tmp_path, shared_data, 'dict(initial=4, budget=2, rounds=1)', more=more)
    done = launch(config, 0, work_dir, check=False)
    assert done.returncode == code and 'Traceback' not in done.stderr
    assert read_state(work_dir / STATE_FILE)['phase'] == 'train'
    commands = re.findall('Round (.) of 1 .* after a stop, go on with: (.*)', tiny.log_of(work_dir))
    [(_, command), again] = commands
    assert commands == [('0', command), ('1', command)] and shlex.split(command)[-3:] == [
        '--work-dir', str(work_dir), '--resume']
    done = shell('bash', '-c', command)
    assert 'resumed epoch: 0, iter: 2' in done.stdout + done.stderr
    assert result(work_dir) == result(whole[1])


def test_al_patch_alone(whole, tmp_path, shared_data):
    """Without its companions it trains and chooses the same; their settings are no error."""
    for name in ('al_patch.py', 'al_train.py'):
        shutil.copy(osp.join(ROOT, name), tmp_path)
    config = write_config(tmp_path, shared_data, 'dict(initial=4, budget=2, rounds=1, visualize=3)')
    shell(sys.executable, str(tmp_path / 'al_train.py'), str(config), '--work-dir', str(tmp_path / 'work'))
    assert result(tmp_path / 'work') == result(whole[1])
    log = tiny.log_of(tmp_path / 'work')
    assert len(re.findall('.*Not beside al_patch.py: al_report.py, al_label.py.*', log)) == 1
    assert 'Active learning has ended: 1 of 1 rounds of queries are done' in log
    assert {path.name for path in (tmp_path / 'work').iterdir() if path.is_file()} - {'al.lock'} == {
        STATE_FILE, config.name}
    assert not [*tmp_path.glob('work/**/*.png')]


def test_two_processes_train_and_ask_exactly(tmp_path, shared_data):
    """And tell hooks on each of them; one that fails on one rank stops nothing."""
    hook = dict(type='NotesPoints', folder=str(tmp_path), fails_on=1)
    config = write_config(tmp_path, shared_data, "dict(initial=4, budget=3, rounds=1, strategy='margin')", sync=True,
                          more=f'custom_hooks = [{hook}]\n')
    launch(config, 2, tmp_path / 'work')
    (first, _), (second, metrics) = result(tmp_path / 'work')
    assert (len(first), len(second), len({*first, *second})) == (4, 3, 7) and 'mIoU' in metrics
    told = [(tmp_path / f'rank_{rank}.txt').read_text().splitlines() for rank in range(2)]
    assert told[0] == told[1] == ['ask 0 None', 'train 0 round_0', ' '.join(['query 0 round_0', *second]),
                                  'ask 1 round_0', 'train 1 round_1']
    assert re.search('NotesPoints.after_al_train failed in round \\d, the run goes on:\n(.*\n)+?TypeError: of rank 1\n',
                     tiny.log_of(tmp_path / 'work'))


@pytest.mark.parametrize('unit', ['image', dict(type='region', window=2)], ids=['image', 'window'])
def test_any_number_of_processes_asks_the_same(tmp_path, shared_data, make_cfg, build, monkeypatch, unit):
    """One run is stopped between a training and its query, and goes on in one process and in two."""
    al = dict(unit=unit, initial=3, budget=4, rounds=1, strategy='tiny:entropy_or_stop')  # 5 batches of images
    runner = build(make_cfg(al))
    monkeypatch.setenv('TINY_STOP', '2')  # the images of the rehearsal
    with pytest.raises(InterruptedError):
        runner.train()
    config, asked = write_config(tmp_path, shared_data, repr(al)), []
    for gpus in (0, 2):
        shutil.copytree(runner.work_dir, tmp_path / f'work_{gpus}')
        launch(config, gpus, tmp_path / f'work_{gpus}', '--resume', TINY_STOP='')
        masks = {str(path)[-8:]: path.read_bytes() for path in tmp_path.glob(f'work_{gpus}/round_1/labelled/*/*.png')}
        asked.append(([names for names, _ in result(tmp_path / f'work_{gpus}')], masks))
    assert asked[0] == asked[1] and bool(masks) == (unit != 'image')
    assert [len(names) if unit == 'image' else sum(n for n, _ in names.values()) for names in asked[0][0]] == [3, 4]


def test_a_config_without_al_is_told_what_to_do(tmp_path, shared_data):
    done = launch(write_config(tmp_path, shared_data), 0, tmp_path / 'work', check=False)
    assert done.returncode == 2 and 'has no `al` block: add al = dict(' in done.stderr
    assert not (tmp_path / 'work').exists()


# --- how an error ends -----------------------------------------------------------------------------------------------


WRONG = [  # the al block, options, and the last line
    ('dict(initial=4, budgt=2)', [], '`al.budgt` is not a setting; did you mean `al.budget`?'),
    ('dict(initial=40)', [], '`al.initial` should be at most the 12 images there are, but got 40'),
    ("dict(strategy='no.such:thing')", [], "`al.strategy` should name a function that can be imported, but got "
     "'no.such:thing': No module named 'no'"),
    ('dict()', ['--cfg-options', 'x'], "argument --cfg-options: should be key=value, but got 'x' (--help shows all "
     'options)'),
    ('dict()', ['--wurk-dir', 'x'], 'unrecognized arguments: --wurk-dir x (--help shows all options)'),
    ('dict()', ['--cfg-options', 'model.backbone.x=1'], "TypeError: TinyBackbone.__init__() got an unexpected keyword "
     "argument 'x' (AL_TRACEBACK=1 shows where)"),
    ('dict()', ['--cfg-options', 'env_cfg.dist_cfg.timeout=-1'], '`env_cfg.dist_cfg.timeout` should be a number of '
     'seconds above 0, but got -1')]


@pytest.mark.parametrize('gpus, wrong', [(0, 0), (0, 2), (0, 3), (2, 1), (2, 4), (2, 5), (2, 6)])
def test_an_error_ends_in_one_line(tmp_path, shared_data, gpus, wrong):
    al, options, line = WRONG[wrong]
    done = launch(write_config(tmp_path, shared_data, al), gpus, tmp_path / 'work', *options, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f'al_train.py: {line}')
    assert 'Traceback' not in done.stdout + done.stderr and 'Error' not in done.stderr.rpartition('al_train.py: ')[0]
    assert not (tmp_path / 'work').exists()  # a start that failed leaves nothing


@pytest.mark.parametrize('before, made, kept', [
    (None, ['20261127_101010/a.log', 'my.py', 'al.lock'], None),  # a start that failed leaves no folder,
    ([], ['20261127_101010/a.log', 'my.py', 'al.lock'], None),
    (['my.py'], ['20261127_101010/a.log', 'my.py', 'al.lock'], ['my.py']),
    (['20261127_090909/a.log', STATE_FILE, 'my.py', 'round_0/x', 'al.lock'], ['20261127_101010/a.log', 'my.py'],
     ['20261127_090909', STATE_FILE, 'al.lock', 'my.py', 'round_0']),  # or that of the run that it should go on with
    (None, ['20261127_101010/a.log', STATE_FILE, 'al.lock'], ['20261127_101010', STATE_FILE, 'al.lock']),  # it began
    (['20261127_090909/a.log', 'round_0/x'], ['20261127_101010/a.log', 'round_0/y'],
     ['20261127_090909', '20261127_101010', 'round_0']),
    (None, ['20261127_101010/a.log', 'superpixels/b.png'], ['20261127_101010', 'superpixels'])])  # which took long
def test_what_an_error_leaves(tmp_path, before, made, kept):
    work_dir = tmp_path / 'work'

    def write(path: str, text: str) -> None:
        (work_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (work_dir / path).write_text(text)

    if before is not None:
        work_dir.mkdir()
    for i, path in enumerate(before or []):
        write(path, 'before')
        os.utime(work_dir / path, ns=(i, i))
    known = al_train.entries(work_dir)
    for path in made:
        write(path, 'made')
    al_train.leave(mmengine.ConfigDict(work_dir=str(work_dir), filename='configs/my.py'), known, ', the traceback')
    assert (set(os.listdir(work_dir)) if work_dir.exists() else None) == (None if kept is None else {*kept})
    if '20261127_101010' in (kept or ()):
        assert (work_dir / '20261127_101010' / 'a.log').read_text() == 'made, the traceback'


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / 'wrong.py').write_text('al = dict(')
    for name, why in {'none.py': 'there is no such file', 'wrong.py': 'SyntaxError: .*'}.items():
        done = launch(tmp_path / name, 0, tmp_path / 'work', check=False)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and re.fullmatch(rf'al_train.py: .*/{name} cannot be used \({why}\)', last)


@pytest.mark.parametrize('gpus', [0, 2])
def test_the_traceback_is_there_on_demand(tmp_path, shared_data, gpus):
    config = write_config(tmp_path, shared_data, WRONG[2][0])
    done = launch(config, gpus, tmp_path / 'work', check=False, AL_TRACEBACK='1')
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f'al_train.py: {WRONG[2][2]}')
    assert done.stderr.count('Traceback') == 2  # of the error, and of what lies behind it


def test_what_fails_in_a_worker_ends_in_one_line(tmp_path, shared_data):
    root = shutil.copytree(shared_data, tmp_path / 'data')
    al = f"dict(initial={tiny.NAMES[:4]}, budget=2, rounds=1, strategy='entropy')"
    config = write_config(tmp_path, root, al, more='test_dataloader.update(num_workers=1)\n')
    path = root / 'img' / 'train' / f'{tiny.NAMES[-1]}.png'
    path.write_text('no image')
    done = launch(config, 0, tmp_path / 'work', check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f'al_train.py: {path} cannot be used (')


def test_an_error_of_one_rank_keeps_the_output_of_torchrun(tmp_path, shared_data):
    config = write_config(tmp_path, shared_data, "dict(initial=4, budget=2, rounds=1, strategy='tiny:entropy_or_fail')")
    early = launch(config, 2, tmp_path / 'early', check=False, TINY_STOP='0')  # all agree on what a rehearsal shows
    said = 'al_train.py: a query of .*a/00.png fails .ArithmeticError: of rank 1; .*'
    assert early.returncode == 2 and re.fullmatch(said, early.stderr.splitlines()[-1])
    assert 'Traceback' not in early.stderr and not (tmp_path / 'early' / STATE_FILE).exists()
    done = launch(config, 2, tmp_path / 'work', check=False, TINY_STOP='2')
    assert done.returncode == 1 and 'ArithmeticError: of rank 1' in done.stderr and 'ChildFailedError' in done.stderr
    assert read_state(tmp_path / 'work' / STATE_FILE)['phase'] == 'query'


def test_through_another_script_the_error_stands_alone(tmp_path, shared_data):
    config = write_config(tmp_path, shared_data, WRONG[2][0])
    reach = os.pathsep.join([ROOT, osp.join(ROOT, 'tests')])
    done = shell(sys.executable, MMSEG_TRAIN, str(config), '--work-dir', str(tmp_path / 'work'), PYTHONPATH=reach,
                 check=False)
    assert done.returncode == 1 and done.stderr.count('Traceback') == 1
    assert done.stderr.splitlines()[-1] == f'ValueError: {WRONG[2][2]}'


def test_ctrl_c_while_mmengine_formats_a_config(monkeypatch, capsys):
    """It makes a SyntaxError of it."""
    def build(args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SyntaxError('Failed to format the config file') from None

    monkeypatch.setattr(al_train, 'read_config', build)
    monkeypatch.setattr(sys, 'argv', ['al_train.py', 'x.py'])
    with pytest.raises(SystemExit) as stop:
        al_train.main()
    assert stop.value.code == 130 and not capsys.readouterr().err


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_all_processes(tmp_path, shared_data, ctrl_c_counts, number):
    config = write_config(tmp_path, shared_data, 'dict(initial=4, budget=2, rounds=1)', sync=True,
                          more="train_cfg.update(max_iters=10**5)\ndefault_hooks['checkpoint'].update(interval=10**5)\n")
    env = {**os.environ, 'PATH': osp.dirname(sys.executable) + os.pathsep + os.environ['PATH'], 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': osp.join(ROOT, 'tests'), 'CUDA_VISIBLE_DEVICES': '', 'TMPDIR': str(tmp_path)}
    command = ['bash', osp.join(ROOT, 'dist_al_train.sh'), str(config), '2', '--work-dir', str(tmp_path / 'work')]
    with open(tmp_path / 'log', 'w') as log:
        run = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    until = time.time() + 100
    while '(train) [' not in (tmp_path / 'log').read_text() and time.time() < until:
        time.sleep(.1)
    run.send_signal(number)
    assert run.wait(60) == 128 + number and 'Traceback' not in (tmp_path / 'log').read_text()
    for path in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError), open(f'/proc/{path}/cmdline') as file:
            assert str(config) not in file.read()
    assert not [path for path in os.listdir(tmp_path) if path.startswith('tmp')]


def test_the_launcher_tells_its_usage():
    done = shell('bash', osp.join(ROOT, 'dist_al_train.sh'), check=False)
    assert done.returncode == 2 and done.stderr.startswith('usage: bash dist_al_train.sh <config> <GPUs>')
