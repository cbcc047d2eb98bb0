"""What the patch costs while it trains: an iteration of a round against a stock one on the same images, and memory.

    python tests/benchmarks/training.py [CONFIG] [--repeat 5] [--iters 40] [--cfg-options ...]

The first table is what a sample of a partly labelled image takes, against stock's of the same image with all of its
labels: 2048x1024 with one labelled cell of 32x32, which few crops of 512x1024 hold, or with a tenth of them. With a
config, the stock runner gets the labelled images by mmengine's own ``indices``; both train in turn. The last table is
the resident memory of one process after each round of a run of random queries.
"""
import argparse
import itertools
import os
import os.path as osp
import statistics
import tempfile
import time

import cv2
import numpy as np
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.registry import TRANSFORMS, init_default_scope
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


def crop_table(repeat: int, folder: str) -> PrettyTable:
    """CPU time of a sample under Cityscapes' training pipeline: median of its ratio to stock's, from equal seeds."""
    cv2.setNumThreads(1)
    init_default_scope('mmseg')
    rng, masks = np.random.default_rng(0), {name: np.zeros((1024, 2048), bool) for name in ('corner', 'middle')}
    masks['corner'][:32, :32] = masks['middle'][480:512, 992:1024] = True
    masks['tenth'] = np.repeat(np.repeat(rng.random((32, 64)) < .1, 32, 0), 32, 1)
    label = np.repeat(np.repeat(rng.integers(0, 19, (16, 32)), 64, 0), 64, 1).astype(np.uint8)
    image = cv2.GaussianBlur(rng.integers(0, 255, (1024, 2048, 3)).astype(np.uint8), (0, 0), 2)
    info = dict(img_path=osp.join(folder, 'image.png'), seg_map_path=osp.join(folder, 'label.png'),
                reduce_zero_label=False, label_map=None)
    cv2.imwrite(info['img_path'], image)
    cv2.imwrite(info['seg_map_path'], label)
    table = PrettyTable(['RandomResize', 'cat_max_ratio', 'labelled', 'stock ms', 'patched ms', 'patched / stock'])
    for resize, most, (name, mask) in itertools.product((False, True), (1., .75), masks.items()):
        path = osp.join(folder, f'{name}.png')
        al_patch.write_png(path, mask)
        steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *[dict(
            type='RandomResize', scale=(2048, 1024), ratio_range=(.5, 2.), keep_ratio=True)] * resize, dict(
                type='RandomCrop', crop_size=(512, 1024), cat_max_ratio=most), dict(type='RandomFlip', prob=.5), dict(
                    type='PhotoMetricDistortion'), dict(type='PackSegInputs')]
        stock = Compose([TRANSFORMS.build(step) for step in steps])
        patched = al_patch.SparseLabels(stock.transforms, {info['img_path']: al_patch.Shown(path)}, 255)
        times = []
        for seed in range(8 * repeat):
            for pipeline in (stock, patched):
                al_patch.seed_draws(seed)
                begin = time.process_time()
                pipeline(dict(info, seg_fields=[]))
                times.append(1000 * (time.process_time() - begin))
        pairs = np.array(times[2:]).reshape(-1, 2)
        table.add_row([resize, most, name, *(f'{ms:.1f}' for ms in np.median(pairs, 0)),
                       f'{np.median(pairs[:, 1] / pairs[:, 0]):.2f}'])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', nargs='?')
    parser.add_argument('--repeat', type=int, default=5)
    parser.add_argument('--iters', type=int, default=40)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(crop_table(args.repeat, folder))
    if args.config is None:
        return
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
