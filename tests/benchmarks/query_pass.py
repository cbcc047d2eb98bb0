"""The query pass against a bare forward pass of the same model over the same loader.

    python tests/benchmarks/query_pass.py CONFIG [--strategies entropy bald] [--batch-size 8] [--images 100]
    ... --unit region size=[16,16]            # or: superpixel n_segments=2000, pixel, region window=4
    ... --budget 0.01                         # a share of all pixels, below image level; or: --budget 20 --per-image
    ... mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py --data data/camvid

Both run in turn, ``--repeat`` times, over the pool or its first images; printed are medians and the median of the
ratios. The bare pass loads the data, runs the data preprocessor and ``model(mode='tensor')``, and keeps nothing; the
query ends with its choice. SLIC, which is computed once a run, is not in it.

With ``--data`` the images are those of DATA/img/train/*.jpg, as they are, and the weights are random: so any config of
mmseg runs, by its name. Slide inference is a matter of ``--cfg-options model.test_cfg.mode=slide
model.test_cfg.crop_size=[256,256] model.test_cfg.stride=[170,170]``; its bare pass is ``model.inference``. For K-Net:
``mmseg::knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py``.
"""
import argparse
import ast
import statistics
import tempfile
import time

import torch
from mmengine.config import Config, DictAction
from mmengine.hub import get_config
from mmengine.runner import Runner
from model_sweep import without_pretrained
from prettytable import PrettyTable

import al_patch


def config_of(args: argparse.Namespace) -> Config:
    cfg = get_config(args.config) if '::' in args.config else Config.fromfile(args.config)
    if args.data:
        without_pretrained(cfg.model)
        data = dict(type='BaseSegDataset', data_root=args.data, img_suffix='.jpg', pipeline=[
            dict(type='LoadImageFromFile'), dict(type='PackSegInputs')], data_prefix=dict(
                img_path='img/train', seg_map_path='ann/train'))
        loader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data)
        cfg.merge_from_dict({f'{kind}_dataloader': dict(loader, _delete_=True) for kind in ('train', 'test')})
    cfg.merge_from_dict(args.cfg_options or {})
    for key in ('al', 'load_from', 'val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg.pop(key, None)
    cfg.test_dataloader.batch_size = args.batch_size
    if args.cpu_time:
        cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    return cfg


def make_state(runner: Runner, pool: al_patch.Pool, strategy: str, args: argparse.Namespace) -> al_patch.State:
    """A run in which nothing is labelled, before its first query with the strategy."""
    name, *options = args.unit
    unit = dict((key, ast.literal_eval(value)) for key, value in (option.split('=', 1) for option in options))
    al = al_patch.parse_settings(dict(unit=dict(unit, type=name), strategy=strategy, budget=args.budget,
                                      per_image=args.per_image))
    return al_patch.State(dict(seed=0, config={}, rounds=[dict(asked={})]), runner.work_dir, al, runner, pool)


@torch.no_grad()
def bare_pass(state: al_patch.State) -> None:
    model, names = state.model.eval(), state.pool.names
    for data in al_patch.query_dataloader(state, al_patch.deal_batches(state, names)):
        data = model.data_preprocessor(data, False)
        if model.test_cfg.get('mode') == 'slide':
            model.inference(data['inputs'], [sample.metainfo for sample in data['data_samples']])
        else:
            model(**data, mode='tensor')


@torch.no_grad()
def query_pass(state: al_patch.State) -> None:
    """``al_patch.query``, but for the loading of the round's checkpoint."""
    this = al_patch.Query(state, state.runner)
    for name, seen in al_patch.Network(state.runner, this.strategy).look(state, this.names, this.views):
        this.collector.add(name, *this.candidates(name, seen))
    assert this.asked()


def timed(clock, function, *args) -> float:
    begin = clock()
    function(*args)
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--data')
    parser.add_argument('--strategies', nargs='+', default=['entropy', 'margin', 'least_confidence', 'bald', 'ripu',
                                                                  'coreset', 'badge', 'contextual_diversity'])
    parser.add_argument('--unit', nargs='+', default=['image'], metavar='NAME OPTION=VALUE')
    parser.add_argument('--budget', type=ast.literal_eval, default=20)
    parser.add_argument('--per-image', action='store_true')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--images', type=int)
    parser.add_argument('--cpu-time', action='store_true', help='of this process (loading included), on a busy machine')
    parser.add_argument('--threads', type=int, help='of torch and OpenCV, on a CPU')
    parser.add_argument('--repeat', type=int, default=5)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        al_patch.cv2.setNumThreads(args.threads)
    cfg, clock = config_of(args), time.process_time if args.cpu_time else time.perf_counter
    table = PrettyTable(['strategy', 'images', 'bare s', 'query s', 'query / bare'])
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        pool = al_patch.Pool(runner.cfg)
        pool.names = pool.names[:args.images]
        query_pass(make_state(runner, pool, args.strategies[0], args))  # warm-up: page cache, superpixels
        for name in args.strategies:
            state, bare, query = make_state(runner, pool, name, args), [], []
            for _ in range(args.repeat):
                bare.append(timed(clock, bare_pass, state))
                query.append(timed(clock, query_pass, state))
            ratio = statistics.median(q / b for q, b in zip(query, bare))
            table.add_row([name, len(pool), f'{statistics.median(bare):.2f}', f'{statistics.median(query):.2f}',
                           f'{ratio:.3f}'])
    print(table)


if __name__ == '__main__':
    main()
