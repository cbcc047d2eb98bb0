"""Run the same tiny runs with a revision of the project and with the working tree, and compare all that they leave.

    python tests/same.py HEAD
    python tests/same.py HEAD --only image-entropy region-human --keep some/folder
    python tests/same.py HEAD --alone
    python tests/same.py HEAD --named

Side A is the revision, side B the working tree. A run is `al_train.main()` on a config of its own, several starts in a
row where a run is resumed. What is compared: exit codes, what was asked for in each round, masks, metrics, weights,
reports, and what a human is given to label. A line a run; the exit code is 1 if any differs. A side imports its
al_patch once, in a process of its own, and forks for each start, so that a start takes no seconds.
"""
import argparse
import contextlib
import csv
import gc
import glob
import io
import itertools
import json
import math
import multiprocessing
import os
import os.path as osp
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from typing import Any, Callable, Iterator, NamedTuple, Optional

HERE = osp.dirname(osp.abspath(__file__))
TREE = osp.dirname(HERE)
# only a side's own root may give it its modules; `tiny` is the working tree's for both
sys.path[:] = [HERE, *(path for path in sys.path if osp.realpath(path) not in map(osp.realpath, (HERE, TREE)))]
sys.dont_write_bytecode = True
import mmengine.config.config  # noqa: E402
import mmengine.runner.runner  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from PIL import Image  # noqa: E402

CELL = dict(type='region', size=[8, 8])
IMAGE = dict(initial=4, budget=2)
REGION = dict(unit=CELL, initial=12, budget=9)
SUPERPIXEL = dict(unit=dict(type='superpixel', n_segments=12, compactness=100.), initial=9, budget=6)
PIXEL = dict(unit='pixel', initial=60, budget=30)
RESUME = ['--resume']
WHOLE = tiny.NAMES[3:6]
# long enough that the network tells classes apart, and so slow that the last bits of a sum do not come to count
LONGER = dict(
    iters="train_cfg.update(max_iters=24, val_interval=12)\ndefault_hooks['checkpoint'].update(interval=6)\n",
    epochs='train_cfg.update(max_epochs=4)\n')
WILD = "optim_wrapper['optimizer'].update(lr=.4)\n"  # then the best checkpoint is often not the last
DROPOUT = "model['backbone'].update(type='SameBackbone')\n"
SLIDE = "model.update(test_cfg=dict(mode='slide', crop_size=(16, 24), stride=(16, 24)))\n"
DIES = "custom_hooks = [dict(type='DieOnce', round={round}, after={after}, number={number}, marker='died')]\n"
SECONDS = 120  # that a start may take


class Case(NamedTuple):
    """A run: its settings, what is added to the config, and the options and the exit code of each start."""
    al: dict
    more: str = ''
    loop: str = 'iters'
    processes: int = 1
    starts: tuple = ([], )
    codes: tuple = (0, )


def case(base: dict, strategy: Any = 'entropy', more: str = '', rounds: Optional[int] = 2, **settings) -> Case:
    return Case({**base, 'strategy': strategy, **({} if rounds is None else dict(rounds=rounds)), **settings}, more)


def resumed(first: Case, *codes: int) -> Case:
    """The case with as many starts as exit codes, all but the first with --resume."""
    return first._replace(starts=([], *[RESUME] * (len(codes) - 1)), codes=codes)


def with_options(name: str, **options) -> dict:
    return dict(type=name, **options)


CASES = {
    'image-entropy': case(IMAGE, visualize=2),
    'image-margin-best-last-pool': case(IMAGE, 'margin', WILD, query_with='best', weights='last', pool_size=7),
    'image-bald': case(IMAGE, with_options('bald', mc=5)),
    'image-bald-backbone': case(IMAGE, with_options('bald', mc=5), DROPOUT),
    'image-bald-slide': case(IMAGE, with_options('bald', mc=5), SLIDE),
    'image-variation-ratio': case(IMAGE, with_options('variation_ratio', mc=5), DROPOUT),
    'image-coreset': case(IMAGE, 'coreset'),
    'image-badge': case(IMAGE, 'badge'),
    'image-contextual-diversity': case(IMAGE, 'contextual_diversity'),
    'image-real': case(IMAGE, with_options('real', clusters=3)),
    'image-crc': case(dict(initial=6, budget=2), with_options('crc', calibration=.5, alpha=.4)),
    'image-stochastic-batches': case(IMAGE, with_options('stochastic_batches', batches=3)),
    'image-powerbald': case(IMAGE, with_options('powerbald', mc=5)),
    'image-own-functions': case(IMAGE, with_options('tiny:brightest', select='tiny:last_ones', power=2., reduce=20)),
    'image-budget-list-best': case(IMAGE, 'least_confidence', WILD, None, budget=[1, .25], weights='best'),
    'image-stop-patience': case(IMAGE, rounds=4, stop=dict(patience=1)),
    'image-overrides-epochs': case(IMAGE, 'ratio', overrides={1: {'train_cfg.max_epochs': 6}})._replace(loop='epochs'),
    'image-coreset-2-processes': case(IMAGE, 'coreset')._replace(processes=2),
    'image-human': resumed(case(IMAGE, oracle='human'), 0, 0, 0, 0),
    'image-ended-and-extended': case(IMAGE, rounds=1)._replace(
        starts=([], [], [*RESUME, '--cfg-options', 'al.rounds=2']), codes=(0, 2, 0)),
    'region-entropy-fraction': case(REGION, budget=.04, visualize=2),
    'region-ripu': case(REGION, with_options('ripu', k=2)),
    'region-mean-std': case(REGION, with_options('mean_std', mc=5)),
    'region-coreset': case(REGION, 'coreset'),
    'region-real-per-image': case(REGION, with_options('real', clusters=3), per_image=True, budget=2),
    'region-clasp-pe': case(REGION, 'clasp_pe'),
    'region-crc': case(REGION, with_options('crc', calibration=.4, alpha=.4)),
    'region-margin-last': case(REGION, 'margin', weights='last'),
    'region-initial-names': case(REGION, initial=WHOLE),
    'region-entropy-2-processes': case(REGION)._replace(processes=2),
    'region-human': resumed(case(REGION, oracle='human'), 0, 0, 0, 0),
    'region-killed': resumed(case(REGION, more=DIES.format(round=1, after=15, number=None)), 9, 0),
    'region-terminated': resumed(case(REGION, more=DIES.format(round=0, after=15, number=15)), 143, 0),
    'window-1-ripu': case(dict(unit=dict(type='region', window=1), initial=20, budget=15), 'ripu'),
    'window-2-entropy-fraction': case(dict(unit=dict(type='region', window=2), initial=9, budget=.02)),
    'superpixel-entropy': case(SUPERPIXEL),
    'superpixel-coreset': case(SUPERPIXEL, 'coreset'),
    'superpixel-max': case(SUPERPIXEL, with_options('entropy', reduce='max')),
    'superpixel-classbal': case(SUPERPIXEL, 'classbal'),
    'pixel-pixelpick-per-image': case(PIXEL, 'pixelpick', per_image=True, initial=4, budget=3, seed=1),
    'pixel-entropy-radius': case(PIXEL, unit=dict(type='pixel', radius=2), seed=1),
    'pixel-ripu-pixel-radius': case(PIXEL, with_options('ripu_pixel', k=4), unit=dict(type='pixel', radius=4)),
    'pixel-real': case(PIXEL, with_options('real', clusters=5)),
    'pixel-coreset-shortlist': case(PIXEL, with_options('coreset', shortlist=40)),
}


@MODELS.register_module()
class SameBackbone(tiny.TinyBackbone):
    """The tiny backbone with dropout between its convolutions, so that MC dropout cannot take the short cut by a matrix
    product. It is registered here, since the processes of both sides are forked from this one."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(.3)

    def forward(self, x: torch.Tensor) -> tuple:
        return (self.stage(self.dropout(self.stem(x).relu())).relu(), )


# --- running ---------------------------------------------------------------------------------------------------------


def make_data(root: str) -> None:
    """The tiny data set with void in half of the last cells: enough to be counted, and no cell of 8 x 8 all void, which
    a human would have to confirm. Images that are labelled as a whole below image level have none: schema 1 did not
    count it there."""
    tiny.make_data(root)
    paths = glob.glob(osp.join(glob.escape(root), 'ann', 'train', '*', '*.png'))
    for path in set(paths).difference(osp.join(root, 'ann', 'train', f'{name}.png') for name in WHOLE):
        label = read_pixels(path)
        label[:, 44:] = 255
        Image.fromarray(label).save(path)


def write_config(path: str, root: str, case: Case) -> None:
    with open(path, 'w') as file:
        file.write(f'{tiny.config_text(root, case.loop)}{LONGER[case.loop]}{case.more}al = {case.al!r}\n')


def take_out(revision: str, folder: str) -> str:
    """The revision's files, in a folder."""
    archive = subprocess.run(['git', '-C', TREE, 'archive', revision], stdout=subprocess.PIPE)
    if archive.returncode:  # git has said why
        raise SystemExit(f'{revision} is no revision of {TREE}')
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter='data')
    return folder


def copy_alone(folder: str) -> str:
    """The working tree's two files that have to do without any other, in a folder."""
    os.makedirs(folder)
    for name in ('al_patch.py', 'al_train.py'):
        shutil.copy(osp.join(TREE, name), folder)
    return folder


def serve(root: str, folder: str, names: list, connection) -> None:
    """A side's process: import its modules once, then do one run after the other, and send each one's exit codes and
    seconds."""
    sys.path.insert(0, root)
    torch.set_num_threads(1)
    import al_patch
    import al_train
    if osp.dirname(osp.realpath(al_patch.__file__)) != osp.realpath(root):
        raise ImportError(f'al_patch should come from {root}, but got {al_patch.__file__}')
    import matplotlib.backends.backend_agg  # noqa: F401  (what a first figure and first superpixels would import)
    import skimage.segmentation  # noqa: F401
    from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    gc.freeze()  # every data set of mmengine's collects garbage, which would otherwise visit all of torch each time
    mmengine.runner.runner.collect_env = dict  # it asks compilers for their version: slow
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)  # so is yapf
    for name in names:
        begin, where = time.time(), osp.join(folder, name)
        os.makedirs(where)
        config = osp.join(osp.dirname(folder), 'configs', f'{name}.py')
        exact = []  # scores of image pixels, as they are always since that key has gone
        if 'full_res:' in open(al_patch.__file__).read() and CASES[name].al.get('unit', 'image') != 'image':
            exact = ['al.full_res=True']
        codes = [start(al_train.main, [config, '--work-dir', 'work', *options, *(
            exact and ['--cfg-options'] * ('--cfg-options' not in options) + exact)], CASES[name].processes, where)
                 for options in CASES[name].starts]
        connection.send((codes, time.time() - begin))


def start(main: Callable, options: list, processes: int, where: str) -> Any:
    """Fork a start's processes and wait for them. Returns the exit code, a list of them if several processes differ."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        distributed = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(processes))
    if processes > 1:
        options = [*options, '--launcher', 'pytorch']
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if not pids[-1]:
            ranks = dict(distributed, RANK=str(rank), LOCAL_RANK=str(rank)) if processes > 1 else {}
            os._exit(child(main, options, ranks, where))
    codes = wait(pids)
    return codes[0] if len(set(codes)) == 1 else codes


def child(main: Callable, options: list, environment: dict, where: str) -> int:
    """What a forked process does, in its run's folder and with its output in the log there. Returns its exit code."""
    try:
        os.chdir(where)
        with open('log', 'a') as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.update(environment)
        sys.argv = ['al_train.py', *options]
        main()
        return 0
    except SystemExit as error:
        if not isinstance(error.code, (int, type(None))):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def wait(pids: list) -> list:
    """The exit codes of processes as a shell has them: 128 + a signal's number. Those that hang are killed: 137."""
    codes, begin = {}, time.time()
    while len(codes) < len(pids):
        for pid in set(pids).difference(codes):
            if time.time() > begin + SECONDS:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                codes[pid] = code if code >= 0 else 128 - code
        time.sleep(.005)
    return [codes[pid] for pid in pids]


# --- comparing -------------------------------------------------------------------------------------------------------


def read_state(where: str) -> dict:
    """A run's state; an empty one if it never wrote any."""
    path = osp.join(where, 'work', 'al_state.json')
    return read_json(path) if osp.isfile(path) else dict(schema=None, rounds=[])


def in_schema_3(entry: dict) -> dict:
    """A round of a state in the form of schema 3: what was asked for is a dict, name -> None for a whole image, else
    [units, pixels]; in schema 1, a list of names stands for whole images. What is spent was called `labelled`, and
    void in whole images that `initial` names was not counted. A checkpoint's path was relative to the work_dir.
    """
    asked = entry['asked']
    entry = dict(entry, asked=dict.fromkeys(asked) if isinstance(asked, list) else asked)
    entry['spent'] = entry.get('labelled', entry.get('spent', {})) if 'metrics' in entry else {}
    entry['checkpoints'] = {which: osp.basename(path) for which, path in entry.get('checkpoints', {}).items()}
    return entry


def read_pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def read_json(path: str) -> Any:
    with open(path, encoding='utf-8') as file:
        return json.load(file)


def read_curve(path: str) -> list:
    """A learning curve's rows with numbers as numbers, less the columns of seconds and of what changed."""
    with open(path, newline='') as file:
        rows = [{key: value for key, value in row.items() if key not in ('train s', 'query s', 'changed')}
                for row in csv.DictReader(file)]
    return [{key: float(value) if value else None for key, value in row.items()} for row in rows]


def read_content(path: str) -> Any:
    """A file to be labelled from: JSON parsed, an archive as its members, all else as bytes. (Paths of images are the
    same on both sides, which share the data.)"""
    if path.endswith('.json'):
        return read_json(path)
    if path.endswith('.zip'):
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with open(path, 'rb') as file:
        return file.read()


def alike(a: Any, b: Any) -> bool:
    """Whether values are equal, and numbers in them to a millionth."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b


def look_alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether figures are equal, but for what the last bits of weights may make of a colour."""
    return a.shape == b.shape and bool((np.abs(a.astype(int) - b) <= 2).all())


# what is compared beside the state: files, how they are read and compared, and whether al_patch.py alone writes them
FILES = {
    'mask': ('round_*/labelled/**/*.png', read_pixels, np.array_equal, True),
    'learning curve': ('learning_curve.csv', read_curve, alike, False),
    'to_label': ('round_*/to_label/**', read_content, alike, False),
    'scores and classes': ('round_*/*.json', read_json, alike, False),
    'figure': ('*.png', read_pixels, look_alike, False),
    'contact sheet': ('round_*/*.png', read_pixels, look_alike, False),
    'picture': ('round_*/pictures/**/*.png', read_pixels, look_alike, False)}


def first_difference(a: dict, b: dict) -> str:
    """The first key under which dicts differ and both values; '' if they are equal."""
    for key in dict.fromkeys([*a, *b]):
        values = [each.get(key, 'nothing') for each in (a, b)]
        if values[0] != values[1]:
            return f'{key} {values[0]} | {values[1]}'
    return '' if list(a) == list(b) else 'in another order'


def state_differences(a: dict, b: dict) -> Iterator[str]:
    """In what the states of two runs differ, round by round."""
    for k, (ours, theirs) in enumerate(zip(a['rounds'], b['rounds'])):
        ours, theirs = in_schema_3(ours), in_schema_3(theirs)
        for key in ('asked', 'spent', 'metrics', 'checkpoints'):
            difference = first_difference(ours.get(key, {}), theirs.get(key, {}))
            if difference:
                yield f'round {k}: {key}: {difference}'
        for key in ('pixels', 'void_pixels', 'held_out'):
            if (ours.get(key) or 0) != (theirs.get(key) or 0):
                yield f'round {k}: {key}: {ours.get(key)} | {theirs.get(key)}'
    for key, (ours, theirs) in dict(
            rounds=[len(state['rounds']) for state in (a, b)],
            **{key: [state.get(key) for state in (a, b)] for key in ('phase', 'round', 'seed')}).items():
        if ours != theirs:
            yield f'{key}: {ours} | {theirs}'


def file_differences(wheres: list, alone: bool) -> Iterator[str]:
    for kind, (pattern, read, equal, by_itself) in FILES.items():
        if alone and not by_itself:
            continue
        works = [osp.join(where, 'work') for where in wheres]
        names = [{name for name in glob.glob(pattern, root_dir=work, recursive=True)
                  if osp.isfile(osp.join(work, name))} for work in works]
        for name in sorted(names[0] ^ names[1]):
            yield f'{kind}: {name} is only in {"A" if name in names[0] else "B"}'
        for name in sorted(names[0] & names[1]):
            if not equal(*(read(osp.join(work, name)) for work in works)):
                yield f'{kind}: {name}'


def weights_of(where: str, k: int, entry: dict) -> Optional[dict]:
    """The tensors of a round's last checkpoint; None if the round has not got that far."""
    path = osp.join(where, 'work', f'round_{k}', in_schema_3(entry)['checkpoints'].get('last', 'none'))
    if not osp.isfile(path):
        return None
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']  # written by us, just now


def weight_difference(wheres: list, states: list) -> float:
    """The largest difference of any weight in any round's last checkpoint; relative to the largest weight of its tensor
    where that is above 1, as BatchNorm's variances may be by far."""
    largest = 0.
    for k, entries in enumerate(zip(*(state['rounds'] for state in states))):
        a, b = (weights_of(where, k, entry) for where, entry in zip(wheres, entries))
        if not a or not b:
            continue
        if {key: value.shape for key, value in a.items()} != {key: value.shape for key, value in b.items()}:
            return math.inf
        for key in a:
            apart = (a[key].double() - b[key].double()).abs().max().item() / max(1, a[key].abs().max().item())
            largest = max(largest, math.inf if math.isnan(apart) else apart)
    return largest


def compare(case: Case, wheres: list, codes: list, alone: bool) -> tuple[str, bool]:
    """Two sides' runs of a case in words, and whether they are the same."""
    states = list(map(read_state, wheres))
    if codes[0] != list(case.codes):
        return f'exit codes of A: {codes[0]}, but should be {list(case.codes)}; {last_line(wheres[0])}', False
    if codes[0] != codes[1]:
        return f'exit codes: {codes[0]} | {codes[1]}; {last_line(wheres[1])}', False
    found = next(itertools.chain(state_differences(*states), file_differences(wheres, alone)), None)
    apart = weight_difference(wheres, states)
    weights = f'weights to {apart:.0e}'
    if found:
        return f'{found} ({weights})' if apart else found, False
    if apart > 1e-5:
        return f'weights (max |diff| {apart:.0e})', False
    return f'same, {weights}' if apart else 'same', True


def last_line(where: str) -> str:
    with open(osp.join(where, 'log'), errors='replace') as log:
        return f'the log ends with: {log.read().strip().splitlines()[-1:]}'


def run_all(revision: str, names: list, alone: bool, folder: str) -> list:
    """Do the runs on both sides at the same time, and print a line each. Returns the names of those that differ."""
    for name in names:
        os.makedirs(osp.join(folder, 'configs'), exist_ok=True)
        write_config(osp.join(folder, 'configs', f'{name}.py'), osp.join(folder, 'data'), CASES[name])
    make_data(osp.join(folder, 'data'))
    roots = dict(A=take_out(revision, osp.join(folder, 'files_of_A')),
                 B=copy_alone(osp.join(folder, 'files_of_B')) if alone else TREE)
    context, connections, differ, schemas = multiprocessing.get_context('fork'), [], [], None
    for side, root in roots.items():
        connection, far_end = context.Pipe(duplex=False)
        context.Process(target=serve, args=(root, osp.join(folder, side), names, far_end), daemon=True).start()
        far_end.close()  # so that the end of a side's process is the end of its messages
        connections.append(connection)
    for name in names:
        try:
            codes, seconds = zip(*(connection.recv() for connection in connections))
        except EOFError:
            raise SystemExit('a side has ended before its runs have: see the error above') from None
        wheres = [osp.join(folder, side, name) for side in roots]
        if schemas is None:
            schemas = [read_state(where)['schema'] for where in wheres]
            if schemas[0] != schemas[1]:
                print(f'States have schema {schemas[0]} | {schemas[1]}: a list of names in `asked` is taken for '
                      '{name: null}, whole images, and `labelled` for `spent`')
        words, same = compare(CASES[name], wheres, codes, alone)
        print(f'{name:28} {seconds[0]:5.1f} s {seconds[1]:5.1f} s  {words}', flush=True)
        differ += [] if same else [name]
    return differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('revision', help='of git, to compare the working tree with')
    parser.add_argument('--only', nargs='+', choices=CASES, metavar='NAME', help=f'of {", ".join(CASES)}')
    parser.add_argument('--keep', metavar='FOLDER', help='a new folder for data, runs and logs, to look into')
    parser.add_argument('--alone', action='store_true', help='side B is al_patch.py and al_train.py alone; reports, '
                        'pictures and to_label/ are not compared')
    parser.add_argument('--named', action='store_true', help='start from images by name, so that a change of what is '
                        'drawn is no difference for those that draw nothing')
    args = parser.parse_args()
    for each in CASES.values() if args.named else ():
        each.al['initial'] = tiny.NAMES[:each.al['initial']] if 'unit' not in each.al else WHOLE
    if args.keep and osp.isdir(args.keep) and os.listdir(args.keep):
        parser.error(f'--keep should be a new or an empty folder, but there is something in {args.keep}')
    names, begin = args.only or list(CASES), time.time()
    with contextlib.ExitStack() as stack:
        folder = osp.abspath(args.keep or stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        differ = run_all(args.revision, names, args.alone, folder)
    print(f'{len(names) - len(differ)} of {len(names)} runs are the same, {time.time() - begin:.0f} s' +
          (f'; not: {", ".join(differ)}' if differ else ''))
    return bool(differ)


if __name__ == '__main__':
    sys.exit(main())
