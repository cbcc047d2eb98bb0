"""What the patch costs while it trains: an iteration of a round against a stock one on the same images, and memory.

    python tests/benchmarks/training.py CONFIG [--repeat 5] [--iters 40] [--cfg-options ...]

The stock runner gets the labelled images by mmengine's own ``indices``; both train in turn. The second table is the
resident memory of one process after each round of a run of random queries.
"""
import argparse
import os
import statistics
import tempfile
import time

from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.runner import Runner
from prettytable import PrettyTable

import al_patch


class Clock(Hook):
    """Seconds from the start of the tenth iteration to the end of the last."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if batch_idx == 10:
            self.begin = time.perf_counter()

    def after_train(self, runner) -> None:
        self.seconds = (time.perf_counter() - self.begin) / (runner.max_iters - 10)


def seconds_per_iter(cfg: Config, name: str) -> float:
    cfg = cfg.copy()
    cfg.experiment_name = name
    runner, clock = Runner.from_cfg(cfg), Clock()
    runner.register_hook(clock)
    if 'al' in cfg.train_dataloader:
        runner.register_hook(al_patch.RoundHook(0, False))
    runner.train()
    return clock.seconds


def resident_mib() -> float:
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('--repeat', type=int, default=5)
    parser.add_argument('--iters', type=int, default=40)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.train_cfg.update(max_iters=args.iters, val_interval=args.iters)
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        run_cfg = cfg.copy()
        run_cfg.al.update(strategy='random', rounds=4)
        memory, close_round = [], al_patch.close_round

        def close_and_measure(trainer):
            close_round(trainer)
            memory.append(resident_mib())

        al_patch.close_round = close_and_measure
        Runner.from_cfg(run_cfg).train()
        state_file = os.path.join(cfg.work_dir, al_patch.STATE_FILE)
        rounds = al_patch.read_state(state_file)['rounds']
        cfg.pop('al')
        for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
            cfg[key] = None
        plain, patched, times = cfg.copy(), cfg.copy(), ([], [])
        pool = al_patch.Pool(run_cfg)
        plain.train_dataloader.dataset.indices = [pool.names.index(name) for entry in rounds for name in entry['asked']]
        patched.train_dataloader.al = dict(state=state_file, round=4)
        for i in range(args.repeat):
            times[0].append(seconds_per_iter(plain, f'plain_{i}'))
            times[1].append(seconds_per_iter(patched, f'patched_{i}'))
    plain, patched = map(statistics.median, times)
    table = PrettyTable(['stock s/iter', 'patched s/iter', 'patched / stock'])
    table.add_row([f'{plain:.4f}', f'{patched:.4f}', f'{patched / plain:.3f}'])
    print(table)
    table = PrettyTable(['round', 'resident MiB'])
    table.add_rows([[k, f'{mib:.0f}'] for k, mib in enumerate(memory)])
    print(table)


if __name__ == '__main__':
    main()
