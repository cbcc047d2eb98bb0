"""Give wrong inputs, hundreds of them, to real runs, and check how each is refused.

    python tests/bad_input.py [--only PATTERN] [--list] [--sample N] [--jobs N] [--scripts N]

Every run is `al_train.main()` with real options in a folder of its own, on the tiny data set. It is forked from this
process, which has imported mmseg before, so that a start takes no seconds; a random sample goes through the real
launcher as well. `wrong_inputs.py` has the inputs. Of each is checked that

- the exit code is 2, and there is no traceback;
- the last line holds the key or the file, what it should be and what was given;
- no training had begun, where that was knowable: no line of one in the log, no checkpoint;
- nothing on disk has changed but logs.
"""
import argparse
import collections
import contextlib
import fcntl
import gc
import hashlib
import importlib
import os
import os.path as osp
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from fnmatch import fnmatch
from typing import Callable, NamedTuple

HERE = osp.dirname(osp.abspath(__file__))
ROOT = osp.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
os.environ['CUDA_VISIBLE_DEVICES'] = ''
import mmengine.config.config  # noqa: E402
import mmengine.runner.runner  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from prettytable import PrettyTable  # noqa: E402
from wrong_inputs import CONFIG, RUNS, STATE, WORK, Case, all_cases, config_text, read_json, unknown_fields  # noqa: E402

import al_label  # noqa: E402
import al_report  # noqa: E402
import al_train  # noqa: E402

SCRIPTS = {'al_train.py': al_train.main, 'al_label.py': al_label.main, 'al_report.py': al_report.main}
LIMIT = 60  # seconds
# words of what an input should be, or of what to do
SAYS_HOW = re.compile(
    r'should|needs?\b|cannot|has to|have to|\bis (not|in use|gone|missing|damaged|none|no)\b|'
    r'\bare (not|gone|missing|both)|there (is|are) no|no such|not found|did you mean|known keys|'
    r'\buse\b|\badd\b|choose|restore|expected|invalid|'
    r'required|unrecognized|usage|must|not allowed|refused|has no|does not|can not|fail(ed|s)\b|nothing', re.I)
TRAINING = re.compile(r'(Iter|Epoch)\(train\)')
LOGS = re.compile(r'(^|/)(\d{8}_\d{6}|__pycache__|vis_data)(/|$)|\.log$|'
                  r'(^|/)(al\.lock|(sizes|palette)\.json)$|(^|/)work\S*/[^/]+\.py$')


def import_all() -> None:
    """Import what runs import, so that they need not."""
    for module in ('matplotlib.pyplot', 'matplotlib.backends.backend_agg', 'mmseg.visualization', 'torch._dynamo',
                   'skimage.segmentation'):
        importlib.import_module(module)
    Image.preinit()
    from mmseg.utils import register_all_modules  # after the patch
    register_all_modules(init_default_scope=False)


class Result(NamedTuple):
    """What came of an input."""
    case: Case
    wrong: list       # what is wrong about how it ended
    line: str         # the last line that it wrote
    how: str          # 'forked', or 'script'
    seconds: float


def snapshot(place: str) -> dict:
    """What the files in a folder hold, by path; logs aside."""
    found = {}
    for where, folders, files in os.walk(place):
        for name in [*files, *(folder for folder in folders if osp.islink(osp.join(where, folder)))]:
            path = osp.join(where, name)
            relative = osp.relpath(path, place)
            if osp.islink(path):
                found[relative] = os.readlink(path)
            elif not LOGS.search(relative):  # of the lock not even a descriptor: closing one would free it
                with open(path, 'rb') as file:
                    found[relative] = hashlib.sha256(file.read()).hexdigest()
    return found


def fork(command: tuple, place: str, out: str) -> int:
    """Start a script in a process of its own, in a folder. Returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.setpgid(0, 0)
        os.chdir(place)
        sys.path.insert(0, place)  # where functions of the user's own lie
        sys.argv = [*command]
        os.environ['AL_COMMAND'] = f'bash dist_al_train.sh {" ".join(command[1:])}'
        try:
            SCRIPTS[command[0]]()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def command_of(case: Case) -> tuple:
    """A script's name, and its options."""
    return case.command or ('al_train.py', CONFIG, '--work-dir', WORK, *case.options)


def start_script(case: Case, place: str, out: str) -> subprocess.Popen:
    """Start the real launcher, as the leader of a group of processes."""
    name, *options = command_of(case)
    if case.gpus is not None and case.command:
        command = ['bash', osp.join(ROOT, 'dist_al_train.sh'), *case.command]
    elif name == 'al_train.py':
        command = ['bash', osp.join(ROOT, 'dist_al_train.sh'), *options[:1], case.gpus or '0', *options[1:]]
        command = command[:3] if case.gpus == '' else command
    else:
        command = [sys.executable, osp.join(ROOT, name), *options]
    env = {**os.environ, 'PATH': osp.dirname(sys.executable) + os.pathsep + os.environ['PATH'], 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': os.pathsep.join([HERE, place])}
    with open(out, 'w') as file:
        return subprocess.Popen(command, cwd=place, env=env, stdout=file, stderr=file, start_new_session=True)


def what_is_wrong(case: Case, code: int, text: str, before: dict, after: dict) -> tuple[list, str]:
    """What is wrong about how a run ended, and the last line that it wrote."""
    lines = [line for line in text.splitlines() if line.strip()]
    line, wrong = lines[-1].strip() if lines else '', []
    if code != 2:
        wrong.append(f'exit code {code}')
    if 'Traceback (most recent call last)' in text:
        wrong.append('traceback')
    missing = [getattr(word, 'pattern', word) for word in case.words
               if not (word.search(line) if isinstance(word, re.Pattern) else word in line)]
    if missing:
        wrong.append(f'the last line lacks {", ".join(map(repr, missing))}')
    if not SAYS_HOW.search(line):
        wrong.append('the last line does not say what is expected')
    if len(line) > 1500:
        wrong.append(f'the last line has {len(line)} characters')
    checkpoints = [path for path in after.keys() - before.keys() if path.endswith('.pth')]
    if not case.trains and (TRAINING.search(text) or checkpoints):
        wrong.append('training had begun')
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
                     and not any(fnmatch(path, pattern) for pattern in case.writes)
                     and not (path in checkpoints and 'training had begun' in wrong))
    if changed:
        more = f' and {len(changed) - 3} more' * (len(changed) > 3)
        wrong.append(f'changed on disk: {", ".join(changed[:3])}{more}')
    return wrong, line


def begin_runs(folder: str, jobs: int, names: set) -> list[str]:
    """Make the runs that inputs begin with, each in a folder of its name. Returns what is wrong about them."""
    os.makedirs(osp.join(folder, 'none'))
    tiny.make_data(osp.join(folder, 'none', 'data'))
    wrong = []

    def steps(name: str):
        block, validates, starts = RUNS[name]
        place = osp.join(folder, name)
        shutil.copytree(osp.join(folder, 'none'), place)
        with open(osp.join(place, CONFIG), 'w') as file:
            file.write(config_text(block, validates))
        for i in range(starts):
            out = osp.join(folder, f'{name}.{i}.txt')
            code = yield fork(('al_train.py', CONFIG, '--work-dir', WORK, *['--resume'] * (i > 0)), place, out), None
            if code:
                wrong.append(f'the run {name} should end well, but ended with {code}: {open(out).read()[-2000:]}')
                return
        wrong.extend(f'the field {field} of {name}\'s state has no wrong inputs in wrong_inputs.py'
                     for field in unknown_fields(read_json(osp.join(place, STATE))))

    run_all([steps(name) for name in sorted(names)], jobs)
    return wrong


def try_input(case: Case, folder: str, number: int, scripted: bool, tell: Callable):
    """Make a wrong input, and give it to a run: a generator of processes to wait for."""
    place, out = osp.join(folder, f'{number}'), osp.join(folder, f'{number}.txt')
    shutil.copytree(osp.join(folder, case.run or 'none'), place, symlinks=True)
    with open(osp.join(place, CONFIG), 'w') as file:
        file.write(case.config())
    try:
        case.damage(place)
    except Exception as error:  # the run that it is made from is another than it was
        tell(Result(case, [f'it cannot be made: {error!r}'], '', 'not run', 0.))
        return
    before, lock, begin = snapshot(place), None, time.time()
    if case.holds:
        lock = open(osp.join(place, case.holds), 'r+')
        fcntl.lockf(lock, fcntl.LOCK_EX)
    process = start_script(case, place, out) if scripted else None  # unless it is kept, Python would wait for it
    code = yield process.pid if process else fork(command_of(case), place, out), lock
    if process:
        process.returncode = code
    with open(out, errors='replace') as file:
        text = file.read()
    wrong, line = what_is_wrong(case, code, text, before, snapshot(place))
    tell(Result(case, wrong, line, 'script' if scripted else 'forked', time.time() - begin))
    if not wrong:
        shutil.rmtree(place)
        os.remove(out)


def run_all(generators: list, jobs: int) -> None:
    """Run generators of processes, so many at once, and send each the exit code of what it waits for."""
    waiting, running = collections.deque(generators), {}

    def go_on(generator, code=None) -> None:
        with contextlib.suppress(StopIteration):
            pid, lock = generator.send(code)
            running[pid] = generator, lock, time.time()

    while waiting or running:
        while waiting and len(running) < jobs:
            go_on(waiting.popleft())
        if not running:
            continue
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            generator, lock, _ = running.pop(pid)
            if lock:
                lock.close()
            go_on(generator, os.waitstatus_to_exitcode(status))
        elif not pid:
            for late in [pid for pid, (*_, begin) in running.items() if time.time() > begin + LIMIT]:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(late, signal.SIGKILL)
            time.sleep(.005)


def spread(cases: list, n: int, rng: random.Random) -> list:
    """So many of the cases, in turn of each kind."""
    kinds = collections.defaultdict(list)
    for case in rng.sample(cases, len(cases)):
        kinds[case.kind].append(case)
    ordered = sorted(((rank, kind, case) for kind, members in kinds.items() for rank, case in enumerate(members)),
                     key=lambda item: item[:2])
    return [case for *_, case in ordered[:n]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', metavar='PATTERN', help='a regular expression that kind/name holds')
    parser.add_argument('--list', action='store_true', help='the inputs, and end')
    parser.add_argument('--sample', type=int, metavar='N', help='so many inputs, spread over the kinds')
    parser.add_argument('--jobs', type=int, default=2, help='how many run at once')
    parser.add_argument('--scripts', type=int, default=10, metavar='N', help='so many go through the launcher, too')
    parser.add_argument('--seed', type=int, default=0, help='of what is drawn')
    parser.add_argument('--keep', help='a folder for what failed, to look into afterwards')
    args = parser.parse_args()
    rng = random.Random(args.seed)
    cases = [case for case in all_cases() if re.search(args.only, str(case))]
    real = [case for case in cases if case.gpus is not None]
    forked = [case for case in cases if case.gpus is None]
    forked = forked if args.sample is None else spread(forked, args.sample, rng)
    real = real[:max(0, len(real) if args.sample is None else 0)] + spread(
        [case for case in forked if not case.holds], args.scripts, rng)
    if args.list:
        print('\n'.join(map(str, [*forked, *(case for case in real if case.gpus is not None)])))
        return 0
    torch.set_num_threads(1)
    import_all()
    gc.freeze()  # every data set of mmengine's collects garbage, which would otherwise visit all of torch each time
    mmengine.runner.runner.collect_env = dict  # it asks compilers for their version: slow
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)  # so is yapf
    results, begin = [], time.time()

    def tell(result: Result) -> None:
        results.append(result)
        if result.wrong:
            print(f'{result.case} ({result.how}): {"; ".join(result.wrong)}\n    | {result.line[:400]}', flush=True)

    with contextlib.ExitStack() as stack:
        folder = args.keep or stack.enter_context(tempfile.TemporaryDirectory())
        folder = osp.join(osp.realpath(folder), 'bad_input')
        os.makedirs(folder)
        wrong = begin_runs(folder, args.jobs, {case.run for case in [*forked, *real]} - {None})
        print(*wrong, sep='\n', end='\n' * bool(wrong))
        numbered = [*((case, False) for case in forked), *((case, True) for case in real)]
        run_all([try_input(case, folder, i, scripted, tell) for i, (case, scripted) in enumerate(numbered)], args.jobs)
    table = PrettyTable(['kind', 'inputs', 'as they should', 'not'], align='r')
    for kind in [*dict.fromkeys(result.case.kind for result in results), None]:
        mine = [bool(result.wrong) for result in results if result.how != 'script' or result.case.gpus is not None
                if kind in (None, result.case.kind)]
        table.add_row([kind or 'all', len(mine), len(mine) - sum(mine), sum(mine)])
    scripted = [bool(result.wrong) for result in results if result.how == 'script']
    print(f'{table}\nThrough the launcher, of these: {len(scripted)}, of which {sum(scripted)} not as they should\n'
          f'{time.time() - begin:.0f} s')
    return int(bool(wrong) or any(result.wrong for result in results))


if __name__ == '__main__':
    sys.exit(main())
