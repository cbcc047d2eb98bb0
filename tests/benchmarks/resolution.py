"""Scores of whole images at the logits' resolution, as a query has them, against those of the images' own pixels.

    python tests/benchmarks/resolution.py DATA [--iters 400]

DATA holds img/train/*.jpg and ann/train/*.png of CamVid's 11 classes. Fast-SCNN is trained on them first, from random
weights; printed are, for each score, the rank correlation over all images, and how many of the first 20 are the same.
"""
import argparse
import tempfile

import scipy.stats
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.runner import Runner
from prettytable import PrettyTable

import al_patch

SCORES = ('entropy', 'margin', 'least_confidence', 'ratio', 'ripu', 'ripu_pixel')


def config_of(data: str, iters: int) -> Config:
    cfg = get_config('mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py')
    for head in (cfg.model.decode_head, *cfg.model.auxiliary_head):
        head.num_classes = 11
    Config.merge_from_dict(cfg, {'model.data_preprocessor.size': (360, 480), 'norm_cfg.type': 'BN'})

    def dataset(*steps) -> dict:
        return dict(type='BaseSegDataset', data_root=data, img_suffix='.jpg', metainfo=dict(classes=[*'abcdefghijk']),
                    data_prefix=dict(img_path='img/train', seg_map_path='ann/train'), pipeline=[
                        dict(type='LoadImageFromFile'), *steps, dict(type='PackSegInputs')])

    loader = dict(num_workers=0, persistent_workers=False)
    cfg.train_dataloader = dict(loader, batch_size=4, sampler=dict(type='InfiniteSampler'), dataset=dataset(
        dict(type='LoadAnnotations'), dict(type='RandomFlip', prob=.5)))
    cfg.pool = dict(loader, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False),
                    dataset=dataset())
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters)
    cfg.param_scheduler = [dict(type='PolyLR', power=.9, end=iters, by_epoch=False)]
    cfg.randomness = dict(seed=0)
    for key in ('dataloader', 'cfg', 'evaluator'):
        cfg[f'val_{key}'] = cfg[f'test_{key}'] = None
    cfg.default_hooks = dict(logger=dict(type='LoggerHook', interval=50))
    return cfg


def without_sync(node) -> None:
    """SyncBN needs several processes."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        without_sync(child)
    if isinstance(node, dict) and node.get('type') == 'SyncBN':
        node['type'] = 'BN'


@torch.no_grad()
def scores_of(runner: Runner, loader) -> dict:
    """Score -> resolution -> a value for each image."""
    found = {name: ([], []) for name in SCORES}
    network = al_patch.Network(runner)
    for data in loader:
        [seen] = network.see(data, [0], [al_patch.without_padding, al_patch.to_image])
        for name, values in found.items():
            for mean, kept in zip(seen.means, values):
                kept.append(float(al_patch.AL_SCORES.get(name)(mean['probs_NCHW'])[0].mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data')
    parser.add_argument('--iters', type=int, default=400)
    args = parser.parse_args()
    cfg = config_of(args.data, args.iters)
    without_sync(cfg._cfg_dict)
    table = PrettyTable(['score', 'rank correlation', 'same of the first 20'])
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        runner.train()
        loader = runner.build_dataloader(cfg.pool)
        for name, (coarse, exact) in scores_of(runner, loader).items():
            first = [{*torch.tensor(values).topk(20).indices.tolist()} for values in (coarse, exact)]
            table.add_row([name, f'{scipy.stats.spearmanr(coarse, exact).statistic:.4f}', len(first[0] & first[1])])
    print(table)


if __name__ == '__main__':
    main()
