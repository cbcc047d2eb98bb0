"""Time of the selectors against a plain incremental version and the arithmetic limit.

    python tests/benchmarks/selection.py [--sizes 10000 30000 100000] [--repeat 3] [--device cuda] [--picks 1000]

K = L = min(5 % of N, 1,000) candidates are chosen and labelled, of d = 128 normally distributed dimensions, which lie
on the device. The limit
is 2 N (K + L) d operations (k-means++ knows no labelled ones: 2 N K d) at the rate of a matrix product measured in the
same run. The plain version updates every distance after every pick.
"""
import argparse
import functools
import statistics
import time

import torch
from prettytable import PrettyTable

import al_patch


def timed(function, *args) -> float:
    begin = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def multiply_rate(device: str) -> float:
    """Operations a second of a product in the shape of the selectors'."""
    a, b = torch.randn(8192, 128).to(device), torch.randn(128, 512).to(device)
    return 2 * 8192 * 128 * 512 / min(timed(torch.mm, a, b) for _ in range(20))


def plain_kcenter(vectors: torch.Tensor, labelled: torch.Tensor, k: int) -> list[int]:
    norms, nearest, picks = (vectors**2).sum(1), torch.full((len(vectors), ), torch.inf).to(vectors), []
    for centre in labelled:
        torch.minimum(nearest, norms + centre @ centre - 2 * (vectors @ centre), out=nearest)
    while len(picks) < k:
        picks.append(int(nearest.argmax()))
        centre = vectors[picks[-1]]
        torch.minimum(nearest, norms + centre @ centre - 2 * (vectors @ centre), out=nearest)
    return picks


def plain_kmeanspp(vectors: torch.Tensor, k: int) -> list[int]:
    norms, nearest, picks = (vectors**2).sum(1), torch.full((len(vectors), ), torch.inf).to(vectors), []
    picks.append(int(norms.argmax()))
    while len(picks) < k:
        centre = vectors[picks[-1]]
        torch.minimum(nearest, norms + centre @ centre - 2 * (vectors @ centre), out=nearest)
        picks.append(int(torch.multinomial(nearest.clamp_min(0), 1)))
    return picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--sizes', type=int, nargs='+', default=[10_000, 30_000, 100_000])
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--picks', type=int, default=1000, help='at most')
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = PrettyTable(['selector', 'N', 'K', 's', 'plain s', '/ plain', '/ limit'])
    for n in args.sizes:
        k, draw = min(n // 20, args.picks), torch.Generator().manual_seed(0)
        vectors, labelled = (torch.randn(rows, 128, generator=draw).to(args.device) for rows in (n, k))
        scores = torch.rand(n, generator=draw, dtype=torch.float64)
        draws = torch.rand(n, generator=draw, dtype=torch.float64).sort().values
        same = al_patch.kcenter(scores, k, draw, vectors, labelled).tolist() == plain_kcenter(vectors, labelled, k)
        assert same or args.device != 'cpu'  # elsewhere sums have other orders
        for ours, args_of_ours, plain, args_of_plain, operations in (
                (al_patch.kcenter, (scores, k, draw, vectors, labelled), plain_kcenter, (vectors, labelled, k), 4),
                (al_patch.kmeanspp, (scores, k, draw, vectors, draws), plain_kmeanspp, (vectors, k), 2)):
            times = [(timed(ours, *args_of_ours), timed(plain, *args_of_plain),
                      operations * n * k * 128 / multiply_rate(args.device)) for _ in range(args.repeat)]
            seconds, slow, limit = (statistics.median(column) for column in zip(*times))
            table.add_row([ours.__name__, n, k, f'{seconds:.3f}', f'{slow:.3f}', f'{seconds / slow:.2f}',
                           f'{seconds / limit:.1f}'])
    scores, draw = torch.rand(10**6, dtype=torch.float64), torch.Generator()
    draws = torch.rand(10**6, dtype=torch.float64).sort().values
    for name in ('topk', 'power', 'softmax', 'softrank', 'stochastic_batches'):
        select = functools.partial(al_patch.call_offering, al_patch.AL_SELECTORS.get(name), draws_N=draws)
        seconds = statistics.median(timed(select, scores, 1000, draw) for _ in range(args.repeat))
        slow = statistics.median(timed(torch.sort, scores) for _ in range(args.repeat))
        table.add_row([name, 10**6, 1000, f'{seconds:.3f}', f'{slow:.3f} (sort)', f'{seconds / slow:.2f}', '-'])
    print(table)


if __name__ == '__main__':
    main()
