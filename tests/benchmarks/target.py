"""Does `al_report.py compare --target` tell how many more labels a target takes? Runs of ten rounds on the digits.

    python tests/benchmarks/target.py run OUT [--jobs 2]
    python tests/benchmarks/target.py report [CSV] [--hide 3]

``run`` makes twenty runs, ten seeds of each strategy, from 5 to 50 % of the images, and appends their curves to the
CSV; what has its rows there is not run again. ``report`` shows of each curve all but the last rounds, and asks when the
best of what is hidden is first reached.
"""
import argparse
import csv
import os
import os.path as osp
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from prettytable import PrettyTable

import al_patch
import al_report

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TABLE = osp.join(ROOT, 'resources', 'target.csv')
COLUMNS = ['strategy', 'seed', 'round', 'share', 'mIoU']
STRATEGIES, SEEDS, ROUNDS = ('random', 'entropy'), range(10), 9
FIRST, LATER = 600, 200  # iterations of the first training, and of those that go on from its weights


def iterations(n: int) -> dict:
    return {'train_cfg.max_iters': n, 'train_cfg.val_interval': n, 'param_scheduler.0.end': n,
            'default_hooks.checkpoint.interval': n}


def run(strategy: str, seed: int, out: str, table: str) -> None:
    work_dir = osp.join(out, strategy, f'seed_{seed}')
    os.makedirs(work_dir, exist_ok=True)
    config = osp.join(work_dir, 'config.py')
    with open(config, 'w') as file:
        al = dict(strategy=strategy, initial=20, budget=20, rounds=ROUNDS, weights='last', seed=seed, reports=False,
                  overrides={k: iterations(LATER if k else FIRST) for k in range(ROUNDS + 1)}, _delete_=True)
        file.write(f'_base_ = {osp.join(ROOT, "configs", "al_digits.py")!r}\nal = {al!r}\n'
                   f'randomness = dict(seed={seed})\n')
    state = osp.join(work_dir, al_patch.STATE_FILE)
    with open(osp.join(work_dir, 'log.txt'), 'a') as log:
        subprocess.run(['bash', osp.join(ROOT, 'dist_al_train.sh'), config, '0', '--work-dir', work_dir]
                       + ['--resume'] * osp.exists(state), check=True, stdout=log, stderr=log, cwd=out,
                       env=dict(os.environ, OMP_NUM_THREADS='1'))
    with open(table, 'a', newline='') as file:
        csv.writer(file).writerows([strategy, seed, k, entry['spent']['% of images'], entry['metrics']['mIoU']]
                                   for k, entry in enumerate(al_patch.read_state(state)['rounds']))
    print(f'{strategy}, seed {seed}: done', flush=True)


def read(table: str) -> dict[tuple, np.ndarray]:
    """(strategy, seed) -> share and mIoU after each round, (2, R)."""
    curves = {}
    with open(table, newline='') as file:
        for row in csv.DictReader(file):
            curves.setdefault((row['strategy'], int(row['seed'])), []).append([float(row['share']), float(row['mIoU'])])
    return {key: np.array(points).T for key, points in curves.items()}


def report(curves: dict, hide: int) -> PrettyTable:
    """Each run's answer, of what it is made, and whether it holds; in images of a hundred."""
    table = PrettyTable(['run', 'target', 'last seen at', 'truly', 'said', 'covers', 'width / further labels'])
    covers, widths, asked = [], [], 0
    for (strategy, seed), (share_R, values_R) in curves.items():
        seen, target = slice(len(share_R) - hide), values_R[-hide:].max()
        if target <= values_R[seen].max():
            table.add_row([f'{strategy} {seed}', f'{target:.1f}', f'{share_R[seen][-1]:.3g}', 'reached', '', '', ''])
            continue
        asked += 1
        truly, now = al_report.share_needed(share_R, values_R, target), share_R[seen][-1]
        low, middle, high = al_report.likely_labels(target, share_R[seen], values_R[seen])
        said, cover, width = 'cannot tell yet', '', ''
        if np.isfinite(high):
            said = f'{middle:.4g} ({low:.4g} to {high:.4g})'
            covers.append(low <= truly <= high)
            widths.append((high - low) / (truly - now))
            cover, width = 'yes' if covers[-1] else 'no', f'{widths[-1]:.2f}'
        table.add_row([f'{strategy} {seed}', f'{target:.1f}', f'{now:.3g}', f'{truly:.3g}', said, cover, width])
    print(table)
    table = PrettyTable(['answered', 'goal', 'interval covers', 'goal ', 'median width / further labels', 'goal  '])
    table.add_row([f'{len(covers)} of {asked}', '70 %', f'{np.mean(covers):.0%}' if covers else '', '80 %',
                   f'{np.median(widths):.2f}' if widths else '', '1'])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest='verb', required=True)
    add = verbs.add_parser('run')
    add.add_argument('out')
    add.add_argument('--jobs', type=int, default=2, help='runs at a time, one CPU thread each')
    add.add_argument('--table', default=TABLE, help='the CSV that rows are appended to')
    add = verbs.add_parser('report')
    add.add_argument('table', nargs='?', default=TABLE)
    add.add_argument('--hide', type=int, default=3, help='so many of the last rounds')
    args = parser.parse_args()
    if args.verb == 'report':
        return print(report(read(args.table), args.hide))
    if not osp.exists(args.table):
        with open(args.table, 'w', newline='') as file:
            csv.writer(file).writerow(COLUMNS)
    os.makedirs(args.out, exist_ok=True)
    done = read(args.table)
    jobs = [(strategy, seed) for seed in SEEDS for strategy in STRATEGIES if (strategy, seed) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(*job, osp.abspath(args.out), args.table), jobs))


if __name__ == '__main__':
    main()
