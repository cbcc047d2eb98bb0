"""What RIPU costs beside what any version needs, and the choice of windows beside the full argmax for each of them.

    python tests/benchmarks/ripu.py [--size 1024 2048] [--classes 19] [--repeat 5] [--threads 1]

Scores: (softmax + RIPU) / (softmax + argmax + entropy). Windows: a share of the time of the naive loop, for as many
windows of k = 1 as cover ``--ratio`` of the image; the picks have to be the same.
"""
import argparse
import math
import statistics
import time

import cv2
import numpy as np
import torch
from prettytable import PrettyTable

import al_patch


def median_seconds(repeat: int, *functions) -> list:
    """Median of each function's time; they run in turn."""
    times = [[] for _ in functions]
    for _ in range(repeat):
        for function, mine in zip(functions, times):
            begin = time.perf_counter()
            function()
            mine.append(time.perf_counter() - begin)
    return [statistics.median(mine) for mine in times]


def naive_peaks(scores_HW: np.ndarray, gap: int, limit: int) -> list:
    """A maximum over all rows, and then over these, for each window."""
    scores_HW, picks = torch.from_numpy(scores_HW.copy()), []
    for _ in range(limit):
        values, cols = scores_HW.max(1)
        y = values.max(0).indices.item()
        x = cols[y].item()
        picks.append(y * scores_HW.shape[1] + x)
        scores_HW[max(0, y - gap):y + gap + 1, max(0, x - gap):x + gap + 1] = -torch.inf
    return picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', nargs=2, type=int, default=[1024, 2048])
    parser.add_argument('--classes', type=int, default=19)
    parser.add_argument('--ratio', type=float, default=0.0044)
    parser.add_argument('--repeat', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    (h, w), c = args.size, args.classes
    coarse = 3 * torch.randn(1, c, h // 32, w // 32, generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.interpolate(coarse, size=(h, w), mode='bilinear')

    def any_version():
        probs = logits.softmax(1)
        return probs.argmax(1), al_patch.entropy(probs)

    table = PrettyTable(['k', 'softmax + argmax + entropy s', 'softmax + RIPU s', 'ratio'])
    for k in (1, 4, 16, 32):
        base, ripu = median_seconds(args.repeat, any_version, lambda k=k: al_patch.ripu(logits.softmax(1), k))
        table.add_row([k, f'{base:.3f}', f'{ripu:.3f}', f'{ripu / base:.2f}'])
    print(table)
    scores, windows = al_patch.ripu(logits.softmax(1))[0], math.ceil(h * w * args.ratio / 9)
    scores_HW = scores.numpy()
    free = np.zeros((h, w), bool)

    def draw(ids: np.ndarray) -> np.ndarray:
        return (ids + 1) / 2**40  # of equals the first, as the naive loop has it

    naive, ours = median_seconds(args.repeat, lambda: naive_peaks(scores_HW, 2, windows),
                                 lambda: al_patch.peaks(scores, 2, free, draw, windows))
    same = naive_peaks(scores_HW, 2, windows) == al_patch.peaks(scores, 2, free, draw, windows).tolist()
    table = PrettyTable(['windows', 'naive s', 'ours s', '% of naive', 'same picks'])
    table.add_row([windows, f'{naive:.2f}', f'{ours:.4f}', f'{100 * ours / naive:.2f}', same])
    print(table)


if __name__ == '__main__':
    main()
