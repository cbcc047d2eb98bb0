"""What a run takes beside training and query, and what its state takes to be saved and read.

    python tests/benchmarks/rounds.py [--rounds 30] [--images 20000] [--unit region] [--profile]

The first table is of a run on the tiny data set of the tests, with the figures that ``al_report.py`` draws and with
``reports=False``: seconds a round, by what they were spent on, in the first three rounds after the first and in the
last three, which should not differ. The second is of a state below image level in which every image was asked for in
six rounds.
"""
import argparse
import collections
import cProfile
import gc
import os
import os.path as osp
import pstats
import statistics
import sys
import tempfile
import time

import numpy as np
from mmengine.config import Config
from mmengine.runner import Runner
from prettytable import PrettyTable

import al_patch

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
import tiny  # noqa: E402

PARTS = {'runner': ['build_round'], 'hooks': ['tell_hooks'], 'training': ['train_round'], 'query': ['query'],
         'new labels': ['add_round'], 'end': ['close_round']}


def timed_run(root: str, work_dir: str, rounds: int, unit: str, **al) -> list[dict]:
    """Seconds of each part in each round, as a run calls them; what hooks take within a part is theirs."""
    amount = dict(initial=4, budget=.01) if unit == 'image' else dict(initial=40, budget=1)
    cfg = Config.fromstring(tiny.config_text(root), '.py')
    cfg.merge_from_dict(dict(work_dir=work_dir, experiment_name=osp.basename(work_dir), launcher='none',
                             log_level='ERROR'))
    cfg.al = dict(unit=dict(type='region', size=(8, 8)) if unit == 'region' else unit, rounds=rounds, **amount, **al)
    spent, inside, originals = [collections.Counter()], [], {}

    def clocked(part: str, function):
        def call(*args, **kwargs):
            inside.append(0.)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - begin
                spent[-1][part] += seconds - inside.pop()
                if inside:
                    inside[-1] += seconds
                if part == 'end':
                    spent.append(collections.Counter())
        return call

    for part, names in PARTS.items():
        for name in names:
            originals[name] = getattr(al_patch, name)
            setattr(al_patch, name, clocked(part, originals[name]))
    begin = time.perf_counter()
    try:
        Runner.from_cfg(cfg).train()
    finally:
        for name, function in originals.items():
            setattr(al_patch, name, function)
    for entry in spent[1:-1]:
        entry['beside training and query'] = sum(entry[part] for part in PARTS if part not in ('training', 'query'))
    print(f'{rounds + 1} rounds, {al or "reports"}: {time.perf_counter() - begin:.1f} s')
    return spent[1:-1]


def rounds_table(root: str, folder: str, args: argparse.Namespace) -> PrettyTable:
    table = PrettyTable(['reports', 'rounds', *PARTS, 'beside training and query'])
    for reports in (True, False):
        al = {} if reports else dict(reports=False)
        spent = timed_run(root, osp.join(folder, f'reports_{reports}'), args.rounds, args.unit, **al)
        for which, few in (('first', spent[:3]), ('last', spent[-3:])):
            table.add_row([reports, which, *(f'{statistics.median(entry[column] for entry in few):.2f}'
                                             for column in table.field_names[2:])])
    return table


def state_table(folder: str, images: int) -> PrettyTable:
    rng, names = np.random.default_rng(0), [f'city_{i % 50:02d}/city_{i:06d}_000019_leftImg8bit' for i in range(images)]
    asked = [{name: [int(n), 1024 * int(n)] for name, n in zip(names, rng.integers(1, 20, images))} for _ in range(6)]
    content, finished, times = tiny.saved(asked, pool=names, images=images), [], ([], [])
    for entry in content['rounds']:
        entry.update(pixels=0, void_pixels=0)
    al_patch.write_state(folder, content, finished)
    path = osp.join(folder, al_patch.STATE_FILE)
    gc.freeze()  # as a run does
    for _ in range(7):
        for seconds, function in zip(times, (lambda: al_patch.write_state(folder, content, finished),
                                             lambda: al_patch.read_state(path))):
            begin = time.perf_counter(), time.process_time()
            function()
            seconds.append([1000 * (time.perf_counter() - begin[0]), 1000 * (time.process_time() - begin[1])])
    table = PrettyTable(['images', 'MB', 'save ms', 'save CPU ms', 'load ms', 'load CPU ms'])
    table.add_row([images, f'{os.path.getsize(path) / 1e6:.1f}', *(
        f'{statistics.median(each):.0f}' for seconds in times for each in zip(*seconds))])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--images', type=int, default=20_000)
    parser.add_argument('--unit', default='region', choices=['image', 'region', 'pixel'])
    parser.add_argument('--profile', action='store_true', help='of a run with reports')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = tiny.make_data(osp.join(folder, 'data'))
        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(timed_run, root, osp.join(folder, 'profiled'), args.rounds, args.unit)
            pstats.Stats(profile).sort_stats('cumulative').print_stats(70)
            return
        print(rounds_table(root, folder, args))
        print(state_table(folder, args.images))


if __name__ == '__main__':
    main()
