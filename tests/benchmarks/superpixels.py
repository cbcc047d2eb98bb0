"""Superpixels against scikit-image's SLIC at full resolution, which they were before: CPU time and purity.

    python tests/benchmarks/superpixels.py DATA [--segments 1024 2000] [--every 1] [--every-large 12]

DATA holds img/train/*.jpg and ann/train/*.png of CamVid. Purity is the share of the labelled pixels whose class is the
most frequent one of their segment. *Full* is `slic(image, n, 10)`, once for the number that was asked for, and once for
a number at which it comes to about as many segments as ours, found by eight of the images. CPU time is the process's,
taken in turn, with one thread (OMP_NUM_THREADS=1); the ratio is to full for the same number asked for. Large images are
CamVid's, enlarged. The last table has images without any structure; "half" says whether there are half as many segments
as asked for.
"""
import argparse
import glob
import os.path as osp
import statistics
import time

import cv2
import numpy as np
from prettytable import PrettyTable
from skimage.segmentation import slic

import al_patch

COMPACTNESS = 10.


def full(image: np.ndarray, n: int) -> np.ndarray:
    return slic(image[..., ::-1], n, COMPACTNESS, start_label=0)


def ours(image: np.ndarray, n: int) -> np.ndarray:
    return al_patch.slic(image, n, COMPACTNESS)


def load(data: str, name: str, size: tuple | None) -> tuple[np.ndarray, np.ndarray]:
    image, label = cv2.imread(f'{data}/img/train/{name}.jpg'), cv2.imread(f'{data}/ann/train/{name}.png', -1)
    if size:
        image, label = cv2.resize(image, size), cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    return image, label


def purity(segments: np.ndarray, label: np.ndarray) -> float:
    classes, known = 11, label != 255
    counts = np.bincount(segments[known].astype(np.int64) * classes + label[known])
    return np.pad(counts, (0, -len(counts) % classes)).reshape(-1, classes).max(1).sum() / known.sum()


def look(function, image: np.ndarray, label: np.ndarray, n: int) -> tuple[int, float, float]:
    """Number of segments, purity and CPU time."""
    begin = time.process_time()
    segments = function(image, n)
    spent = time.process_time() - begin
    return len(np.unique(segments)), purity(segments, label), spent


def matching(samples: list, n: int) -> int:
    """What full has to be asked for, n at least, to come to as many segments as ours, in the mean of some images."""
    goal, asked = statistics.mean(int(ours(image, n).max()) for image, _ in samples), n
    while (found := statistics.mean(int(full(image, asked).max()) for image, _ in samples)) < goal:
        asked = int(asked * max(1.01, goal / found)) + 1
    return asked


def compare(table: PrettyTable, data: str, names: list[str], size: tuple | None, n: int) -> None:
    asked = matching([load(data, name, size) for name in names[::max(1, len(names) // 8)]], n)
    kinds = {'full': (full, n), 'full, as many': (full, asked), 'ours': (ours, n)}
    found = {kind: [] for kind in kinds}
    for name in names:
        image, label = load(data, name, size)
        for kind, (function, number) in kinds.items():
            found[kind].append(look(function, image, label, number))
    base = statistics.median(spent for _, _, spent in found['full'])
    for kind, rows in found.items():
        numbers, purities, spents = zip(*rows)
        spent = statistics.median(spents)
        table.add_row(['x'.join(map(str, image.shape[1::-1])), len(names), kind, kinds[kind][1],
                       round(statistics.mean(numbers)), f'{statistics.mean(purities):.4f}', f'{spent:.3f}',
                       f'{spent / base:.2f}'])
    print(table, flush=True)


def plain_images(shape: tuple) -> dict[str, np.ndarray]:
    """Speckle, of one colour or of three, binary, multiplicative (as of radar), and images of one colour."""
    rng = np.random.default_rng(0)

    def grey(image: np.ndarray) -> np.ndarray:
        return image.clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2)

    return dict(speckle=rng.integers(0, 256, (*shape, 3), np.uint8), grey=grey(rng.integers(0, 256, shape)),
                binary=grey(255 * (rng.random(shape) > .5)), radar=grey(100 * rng.gamma(1, 1, shape)),
                flat=grey(np.full(shape, 128)), black=grey(np.zeros(shape)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data')
    parser.add_argument('--segments', type=int, nargs='+', default=[1024, 2000])
    parser.add_argument('--every', type=int, default=1, help='of the images')
    parser.add_argument('--every-large', type=int, default=12)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    names = sorted(osp.basename(path)[:-4] for path in glob.glob(f'{args.data}/img/train/*.jpg'))
    table = PrettyTable(['size', 'images', '', 'asked', 'segments', 'purity', 's', 'ratio'])
    for size, every in ((None, args.every), ((2048, 1024), args.every_large)):
        for n in args.segments:
            compare(table, args.data, names[::every], size, n)
    table = PrettyTable(['image', 'size', 'asked', 'segments: full', 'ours', 'half'])
    for shape in ((360, 480), (1024, 2048)):
        for kind, image in plain_images(shape).items():
            for n in args.segments:
                numbers = [len(np.unique(function(image, n))) for function in (full, ours)]
                table.add_row([kind, 'x'.join(map(str, shape[::-1])), n, *numbers, numbers[1] >= n / 2])
    print(table)


if __name__ == '__main__':
    main()
