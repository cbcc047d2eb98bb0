"""The query pass against a bare forward pass of the same model over the same loader.

    python tests/benchmarks/query_pass.py CONFIG [--strategies entropy bald] [--batch-size 8] [--images 100]

Both run in turn, ``--repeat`` times, over the pool or its first images; printed are medians and the median of the
ratios. The bare pass loads the data, runs the data preprocessor and ``model(mode='tensor')``, and keeps nothing.
"""
import argparse
import statistics
import tempfile
import time

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from prettytable import PrettyTable

import al_patch


def bare_pass(model, cfg, pool, names) -> None:
    loader, _ = al_patch.query_dataloader(cfg, pool, names)  # both start the workers of a loader of their own
    with torch.no_grad():
        for data in loader:
            model(**model.data_preprocessor(data, False), mode='tensor')


def timed(clock, function, *args) -> float:
    begin = clock()
    function(*args)
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('--strategies', nargs='+', default=['entropy', 'margin', 'least_confidence', 'bald', 'ripu',
                                                                  'coreset', 'badge', 'contextual_diversity'])
    parser.add_argument('--unit', default='image')
    parser.add_argument('--full-res', action='store_true')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--images', type=int)
    parser.add_argument('--cpu-time', action='store_true', help='of this process (loading included), on a busy machine')
    parser.add_argument('--repeat', type=int, default=5)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.pop('al', None)
    cfg.test_dataloader.batch_size = args.batch_size
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    table = PrettyTable(['strategy', 'images', 'bare s', 'query s', 'query / bare'])
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        pool, model = al_patch.Pool(runner.cfg), runner.model.eval()
        names = pool.names[:args.images]
        bare_pass(model, runner.cfg, pool, names)  # warm-up: page cache
        for name in args.strategies:
            settings = al_patch.parse_settings(dict(unit=args.unit, strategy=name, full_res=args.full_res or None))
            state = dict(settings=settings, seed=0, rounds=[])
            strategy, bare, query = al_patch.resolve_strategy(name), [], []
            for _ in range(args.repeat):
                collector = al_patch.Collector(strategy.select, lambda name: 20, False, False, (0, ))
                bare.append(timed(clock, bare_pass, model, runner.cfg, pool, names))
                query.append(timed(clock, al_patch.collect, runner, runner, state, pool, names, strategy, collector))
            ratio = statistics.median(q / b for q, b in zip(query, bare))
            table.add_row([name, len(names), f'{statistics.median(bare):.2f}', f'{statistics.median(query):.2f}',
                           f'{ratio:.3f}'])
    print(table)


if __name__ == '__main__':
    main()
