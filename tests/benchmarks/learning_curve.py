"""Draw the learning curves of finished runs: mean over the runs of a label, and one standard deviation around it.

    python tests/benchmarks/learning_curve.py OUT.png entropy=DIR,DIR,... random=DIR,DIR,... [--metric mIoU]
"""
import argparse
import os.path as osp

import matplotlib
import numpy as np

from al_patch import STATE_FILE, read_state

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out')
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--metric', default='mIoU')
    args = parser.parse_args()
    _, axes = plt.subplots(figsize=(6, 3.4), dpi=150)
    for run, color, marker in zip(args.runs, ('#0072b2', '#d55e00', '#009e73'), 'os^'):
        label, _, dirs = run.partition('=')
        rounds = [read_state(osp.join(path, STATE_FILE))['rounds'] for path in dirs.split(',')]
        values = np.array([[entry['metrics'][args.metric] for entry in each] for each in rounds])
        images = [entry['labelled']['images'] for entry in rounds[0]]
        mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
        axes.plot(images, mean, color=color, marker=marker, label=f'{label} ({len(values)} seeds)')
        axes.fill_between(images, mean - std, mean + std, color=color, alpha=.2, linewidth=0)
        spread = np.broadcast_to(std, mean.shape)
        print(label, ', '.join(f'{n}: {m:.1f} ± {s:.1f}' for n, m, s in zip(images, mean, spread)))
    axes.set(xlabel='labelled images', ylabel=f'validation {args.metric} (%)', xticks=images)
    axes.grid(alpha=.3)
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    plt.tight_layout()
    plt.savefig(args.out)


if __name__ == '__main__':
    main()
