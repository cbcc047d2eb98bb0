"""Resident memory of a query over a synthetic pool: score maps are drawn on the fly and streamed through the collector.

    python tests/benchmarks/query_memory.py [--images 200] [--size 1024 2048] [--budget 0.01]

One row a unit and strategy; a budget of 1 % of all pixels over the whole pool, as for 2,975 images of 2048 x 1024.
"""
import argparse
import functools
import math
import os
import time

import numpy as np
import torch
from prettytable import PrettyTable

import al_patch


def resident_mib() -> float:
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=200)
    parser.add_argument('--size', nargs=2, type=int, default=[1024, 2048])
    parser.add_argument('--budget', type=float, default=0.01)
    parser.add_argument('--flat', action='store_const', const=0, default=1, help='all scores are equal')
    args = parser.parse_args()
    (h, w), n = args.size, args.images
    table = PrettyTable(['unit', 'images', 'seconds', 'chosen', '% of pixels',
                         *(f'MiB at {p} %' for p in range(0, 101, 25))])
    budget, nothing = round(args.budget * n * h * w), al_patch.Candidates.join([])
    for name, units in {'region': al_patch.grid((h, w), (32, 32)),
                        'windows of 9': al_patch.Peaks((h, w), radius=4, gap=8),
                        'pixel': al_patch.Peaks((h, w), radius=0, gap=0)}.items():
        collector = al_patch.Collector(al_patch.topk, lambda name: budget, in_pixels=True)
        rng, free, memory, begin = np.random.default_rng(0), np.zeros((h, w), bool), [], time.perf_counter()
        for i in range(n):
            if i % math.ceil(n / 4) == 0:
                memory.append(resident_mib())
            draw = functools.partial(al_patch.uniform, i)
            scores = torch.from_numpy(args.flat * rng.random((h, w), np.float32))
            found = units.candidates(units.values(scores, 'mean'), free, draw, budget, collector.floor)
            image = np.full(len(found[0]), i, np.int32)
            collector.add(str(i), al_patch.Candidates(image, *found, draw(found[0])), nothing)
        chosen = collector.result()
        memory.append(resident_mib())
        table.add_row([name, n, f'{time.perf_counter() - begin:.0f}', len(chosen.id),
                       f'{100 * chosen.pixels.sum() / (n * h * w):.4f}', *(f'{mib:.0f}' for mib in memory)])
        del collector, chosen
        print(table)


if __name__ == '__main__':
    main()
