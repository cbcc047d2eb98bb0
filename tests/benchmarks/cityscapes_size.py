"""Time and memory of a choice at Cityscapes' size, from stored candidates: 2,975 images of 2048x1024.

    python tests/benchmarks/cityscapes_size.py superpixel [--images 2975] [--dims 128] [--share .05 --units 100000]
    python tests/benchmarks/cityscapes_size.py pixel [--flat]        # single pixels, 1 % of 6.2 G of them
    python tests/benchmarks/cityscapes_size.py ranks [--processes 8]  # superpixels by entropy, 5 % at once
    python tests/benchmarks/cityscapes_size.py blocks                # blocks against the exact algorithms, 30,000

What a query is given of each image is drawn as it comes, 1,025 superpixels with 19 class probabilities and vectors of
``--dims`` numbers in 50 clusters, or a smooth map of scores; so what is measured is what a query keeps and how it
chooses. Each row is a process of its own, with one thread for each of the machine's cores; its memory is the peak of
what it has resident, libraries included (half a gigabyte), and of the pages of files, which the system can drop, apart.
"""
import argparse
import functools
import math
import multiprocessing
import os
import socket
import tempfile
import time

import numpy as np
import torch
from prettytable import PrettyTable

import al_patch

PIXELS, UNITS, CLASSES = 2048 * 1024, 1025, 19
PRESETS = ('random', 'entropy', 'ratio', 'power_entropy', 'softrankbald', 'stochastic_batches', 'classbal', 'coreset',
           'badge', 'contextual_diversity', 'real', 'clasp_pe', 'crc')


def resident(kind: str) -> float:
    """GiB of a kind (VmHWM: the peak; RssFile: of files, now) that this process has had."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind)) / 2**20


def superpixels(i: int, strategy: al_patch.Strategy, dims: int) -> al_patch.Candidates:
    """The candidates of an image. Vectors are made as wide as the embedding's are."""
    rng = np.random.default_rng(i)
    n, ids = UNITS, np.arange(UNITS)
    centres = np.random.default_rng(10**6).normal(size=(50, dims)).astype(np.float32)
    vectors = probs = None
    if strategy.embed or strategy.needs_classes:
        probs = rng.dirichlet(np.full(CLASSES, .2), n).astype(np.float32)
    if strategy.embed:
        vectors = centres[rng.integers(0, 50, n)] + rng.normal(size=(n, dims)).astype(np.float32)
    embed = getattr(strategy.embed, '__name__', None)
    if embed == 'class_scores':
        vectors = probs * rng.random((n, 1), np.float32)
    elif embed in ('class_confusion', 'class_cooccurrence'):
        vectors = np.stack([rng.dirichlet(np.full(CLASSES, .5), CLASSES) for _ in range(8)]).astype(np.float32)
        vectors = np.roll(vectors[rng.integers(0, 8, n)].reshape(n, -1), i, 1)
    elif embed == 'mean_gradient':
        vectors = (probs[:, :, None] * vectors[:, None]).reshape(n, -1)
    draw = al_patch.uniform(i, ids)
    return al_patch.Candidates(np.full(n, i, np.int32), ids, draw if strategy.score is al_patch.random_scores else
                               rng.random(n), np.full(n, PIXELS // n, np.int32), draw, vectors, probs, probs)


def collected(args: argparse.Namespace, strategy: al_patch.Strategy, budget: int, images) -> al_patch.Collector:
    collector = al_patch.Collector(strategy.select, lambda name: budget, in_pixels=budget > 10**7, seed=(0, 'select'))
    collector.folder, nothing = args.folder, al_patch.Candidates.join([])
    for i in images:
        rows = superpixels(i, strategy, args.dims)
        if collector.keeps_best:
            rows = rows.rows(rows.score >= collector.floor)
        collector.add(str(i), rows, nothing, UNITS)
    return collector


def choose_superpixels(args: argparse.Namespace, name: str, budget: int) -> list:
    strategy = al_patch.resolve_strategy(name)
    begin = time.time()
    collector = collected(args, strategy, budget, range(args.images))
    gathered, before = time.time() - begin, resident('RssAnon')
    begin = time.time()
    chosen = collector.result()
    return [name, f'{UNITS * args.images:,}', f'{len(chosen.id):,}', collector.blocks, f'{gathered:.0f}',
            f'{time.time() - begin:.0f}', f'{before:.2f}', f'{resident("VmHWM"):.2f}', f'{resident("RssFile"):.2f}']


def choose_pixels(args: argparse.Namespace, name: str, budget: int) -> list:
    shape, begin = (1024, 2048), time.time()
    units, free = al_patch.Peaks(shape, 0, 0), np.zeros(shape, bool)
    collector = al_patch.Collector(al_patch.topk, lambda name: budget, in_pixels=True)
    collector.draw, none = lambda i, ids: al_patch.uniform(int(i), ids), al_patch.Candidates.join([])
    for i in range(args.images):
        map_HW = torch.rand(1, 1, 128, 256, generator=torch.Generator().manual_seed(i))
        map_HW = torch.nn.functional.interpolate(map_HW, shape, mode='bilinear')[0, 0]
        values = units.values(map_HW * (not args.flat), 'mean')
        ids, scores, _ = units.candidates(values, free, functools.partial(al_patch.uniform, i), budget,
                                          collector.floor, collector.floor_draw)
        collector.add(str(i), al_patch.Candidates(np.int32(i), ids.astype(np.int32), scores.astype(np.float32),
                                                  np.int32(1), None), none, PIXELS)
    gathered, before = time.time() - begin, resident('RssAnon')
    begin = time.time()
    chosen = collector.result()
    return [name, f'{PIXELS * args.images:,}', f'{len(chosen.id):,}', 1, f'{gathered:.0f}',
            f'{time.time() - begin:.0f}', f'{before:.2f}', f'{resident("VmHWM"):.2f}', f'{resident("RssFile"):.2f}']


def choose_with_others(rank: int, args: argparse.Namespace, processes: int, port: int, out) -> None:
    if processes > 1:
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(processes))
        torch.distributed.init_process_group('gloo')
    budget = round(args.share * args.images * UNITS)
    collector = collected(args, al_patch.resolve_strategy('entropy'), budget, range(rank, args.images, processes))
    begin, chosen = time.time(), collector.result()
    out.put((rank, resident('VmHWM'), time.time() - begin, hash(chosen.id.tobytes() + chosen.image.tobytes())))


def of_ranks(args: argparse.Namespace) -> PrettyTable:
    context, table = multiprocessing.get_context('fork'), PrettyTable([
        'processes', 'GiB of rank 0', 'most of another', 'ratio of rank 0', 's', 'same choice'])
    first = None
    for processes in (1, args.processes):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        out = context.Queue()
        workers = [context.Process(target=choose_with_others, args=(rank, args, processes, port, out))
                   for rank in range(processes)]
        for worker in workers:
            worker.start()
        found = sorted(out.get() for _ in workers)
        first = first or found[0]
        most, is_same = max((each[1] for each in found[1:]), default=0), {each[3] for each in found} == {first[3]}
        table.add_row([processes, f'{found[0][1]:.2f}', f'{most:.2f}', f'{found[0][1] / first[1]:.2f}',
                       f'{found[0][2]:.1f}', is_same])
    return table


def covering(vectors_ND: torch.Tensor, picks: torch.Tensor) -> tuple[float, float]:
    """The greatest distance to the nearest pick, and the sum of their squares."""
    nearest = torch.cat([torch.cdist(part, vectors_ND[picks]).amin(1) for part in vectors_ND.split(2048)])
    return float(nearest.max()), float((nearest.double()**2).sum())


def of_blocks(args: argparse.Namespace) -> PrettyTable:
    """Candidates of 30,000 in the blocks of 3.05 million: two of about 15,000, as at most 20,000 are in one."""
    n, k, generator = 30_000, round(args.share * 30_000), torch.Generator().manual_seed(0)
    table = PrettyTable(['vectors', 'selector', 'measure', 'exact', 'blocks', 'blocks / exact', 'random / exact'])
    strategy = al_patch.resolve_strategy('coreset')
    parts = [superpixels(i, strategy, args.dims) for i in range(math.ceil(n / UNITS))]
    rows, rng = al_patch.Candidates.join(parts).rows(slice(n)), np.random.default_rng(0)
    sizes = 1 / np.arange(1, 201)**2  # of clusters: the first has six in ten
    cluster_N = rng.choice(200, n, p=sizes / sizes.sum())
    mix = rng.normal(size=(8, args.dims))  # features lie near a subspace
    centres = 10 * rng.normal(size=(200, 8))[cluster_N]
    kinds = dict(normal=rng.normal(size=(n, args.dims)), subspace=rng.normal(size=(n, 8)) @ mix,
                 uneven=(centres + rng.normal(size=(n, 8))) @ mix + .1 * rng.normal(size=(n, args.dims)))
    for what, vectors in kinds.items():
        rows = rows._replace(vector=vectors.astype(np.float32))
        vectors = torch.from_numpy(rows.vector)
        for name, select, i in (('k-center', al_patch.kcenter, 0), ('k-means++', al_patch.kmeanspp, 1)):
            found = []
            for al_patch.FEW_PAIRS in (2**60, 1):
                collector = al_patch.Collector(select, lambda name: k, seed=(0, 'select'))
                collector.add('', rows, rows.rows(slice(0)))
                chosen = collector.result()
                where = {(image, j): row for row, (image, j) in enumerate(zip(rows.image, rows.id))}
                found.append(covering(vectors, torch.tensor([where[each] for each in zip(chosen.image, chosen.id)]))[i])
            found.append(covering(vectors, torch.randperm(n, generator=generator)[:k])[i])
            table.add_row([what, name, ('radius', 'potential')[i], *(f'{each:.4g}' for each in found[:2]),
                           *(f'{each / found[0]:.3f}' for each in found[1:])])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['superpixel', 'pixel', 'ranks', 'blocks'])
    parser.add_argument('--images', type=int, default=2975)
    parser.add_argument('--dims', type=int, default=128)
    parser.add_argument('--share', type=float, default=.05)
    parser.add_argument('--units', type=int, default=100_000)
    parser.add_argument('--strategies', nargs='+', default=PRESETS)
    parser.add_argument('--processes', type=int, default=8)
    parser.add_argument('--flat', action='store_true', help='all scores are equal')
    parser.add_argument('--folder', default=tempfile.gettempdir(), help='for what a query leaves on disk')
    args = parser.parse_args()
    if args.what in ('ranks', 'blocks'):
        print(of_ranks(args) if args.what == 'ranks' else of_blocks(args))
        return
    table = PrettyTable(['strategy', 'candidates', 'chosen', 'blocks', 'gathered s', 'choice s', 'GiB gathered',
                         'GiB at most', 'GiB of files'])
    if args.what == 'pixel':
        rows = [(choose_pixels, 'entropy', args.images * PIXELS // 100)]
    else:
        rows = [(choose_superpixels, name, budget) for name in args.strategies for budget in (
            round(args.share * args.images * PIXELS), args.units * args.images // 2975)]
    for function, *row in rows:
        with multiprocessing.get_context('fork').Pool(1) as pool:
            table.add_row(pool.apply(function, (args, *row)))
        print(table[-1:].get_string(border=False, header=len(table.rows) == 1), flush=True)
    print(table)


if __name__ == '__main__':
    main()
