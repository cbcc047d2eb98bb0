"""The query pass against what inference costs anyway: the same model, over the same loader.

    python tests/benchmarks/query_pass.py CONFIG [--images 30]                       # every row of the table
    ... --strategies entropy bald --unit region size=[16,16] --budget 0.01           # or rows of one's own
    ... --last-layer 0                        # a flat model: all scores tie; 30: a sharp one
    ... mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py --data data/camvid --classes 11

*bare* is ``model.inference``, with the loading of the data, and keeps nothing; *test_step* is ``model.test_step``, what
a prediction costs; the query ends with its choice. They run in turn, ``--repeat`` times, over the pool or its first
images, and printed are medians, and the medians of ratios to bare. Superpixels, which are computed once a run, are not
in it.

With ``--data`` the images are those of DATA/img/train/*.jpg, as they are, and the weights are random: so any config of
mmseg runs, by its name. Slide inference is a matter of ``--cfg-options model.test_cfg.mode=slide
model.test_cfg.crop_size=[256,256] model.test_cfg.stride=[170,170]``. For K-Net:
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
from mmengine.runner import Runner, load_checkpoint
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
    if args.classes:
        cfg.model.pop('auxiliary_head', None)
        cfg.model.decode_head.num_classes = args.classes
    cfg.merge_from_dict(args.cfg_options or {})
    for key in ('al', 'load_from', 'val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg.pop(key, None)
    cfg.test_dataloader.batch_size = args.batch_size
    if args.cpu_time:
        cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    return cfg


def rows_of(args: argparse.Namespace) -> list[tuple]:
    """Unit, strategy, budget (below image level a share of all pixels, or so many in each image) of each row."""
    if args.strategies:
        name, *options = args.unit
        unit = {key: ast.literal_eval(value) for key, value in (option.split('=', 1) for option in options)}
        return [(dict(unit, type=name), strategy, args.budget, args.per_image) for strategy in args.strategies]
    rows = [('image', strategy, 20, False) for strategy in (
        'entropy', 'margin', 'least_confidence', 'ripu', 'coreset', dict(type='coreset', features_from='backbone'),
        'badge', 'contextual_diversity', 'bald', 'variation_ratio')]
    rows += [('region', strategy, .02, False) for strategy in ('entropy', 'coreset')]
    rows += [('superpixel', strategy, .02, False) for strategy in ('entropy', 'classbal', 'coreset', 'real')]
    rows += [('pixel', strategy, 10, True) for strategy in ('entropy', 'pixelpick', 'real')]
    rows += [('pixel', strategy, .01, False) for strategy in ('entropy', 'ripu_pixel')]
    return rows + [(dict(type='region', window=1), strategy, .02, False) for strategy in ('ripu', 'entropy')]


def make_state(runner: Runner, pool: al_patch.Pool, row: tuple) -> al_patch.State:
    """A run in which nothing is labelled, before its first query with the strategy."""
    al = al_patch.parse_settings(dict(zip(('unit', 'strategy', 'budget', 'per_image'), row)))
    return al_patch.State(dict(seed=0, config={}, rounds=[dict(asked={})]), runner.work_dir, al, runner, pool)


def loaded(state: al_patch.State):
    return al_patch.query_dataloader(state, al_patch.deal_batches(state, state.pool.names))


@torch.no_grad()
def bare_pass(state: al_patch.State) -> None:
    model = state.model.eval()
    for data in loaded(state):
        data = model.data_preprocessor(data, False)
        model.inference(data['inputs'], [sample.metainfo for sample in data['data_samples']])


@torch.no_grad()
def predict(state: al_patch.State) -> None:
    model = state.model.eval()
    for data in loaded(state):
        model.test_step(data)


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
    parser.add_argument('--strategies', nargs='+', help='all rows, if none is named')
    parser.add_argument('--unit', nargs='+', default=['image'], metavar='NAME OPTION=VALUE')
    parser.add_argument('--budget', type=ast.literal_eval, default=20)
    parser.add_argument('--per-image', action='store_true')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--images', type=int)
    parser.add_argument('--cpu-time', action='store_true', help='of this process (loading included), on a busy machine')
    parser.add_argument('--threads', type=int, help='of torch and OpenCV, on a CPU')
    parser.add_argument('--repeat', type=int, default=5)
    parser.add_argument('--classes', type=int, help='of the heads')
    parser.add_argument('--load-from', help='a checkpoint')
    parser.add_argument('--last-layer', type=float, default=1, help='what the weights that make logits are scaled by')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        al_patch.cv2.setNumThreads(args.threads)
    cfg, clock = config_of(args), time.process_time if args.cpu_time else time.perf_counter
    table = PrettyTable(['unit', 'strategy', 'budget', 'bare s', 'query s', 'query / bare', 'test_step / bare'])
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        if args.load_from:
            with al_patch.checkpoints_are_data():
                load_checkpoint(runner.model, args.load_from, 'cpu')
        for each in al_patch.decode_head(runner.model).conv_seg.parameters():
            each.data.mul_(args.last_layer)
        pool = al_patch.Pool(runner.cfg)
        pool.names = pool.names[:args.images]
        for row in rows_of(args):
            state = make_state(runner, pool, row)
            query_pass(make_state(runner, pool, row))  # warm-up: page cache, superpixels
            times = [[timed(clock, each, state) for each in (bare_pass, query_pass, predict)]
                     for _ in range(args.repeat)]
            bare, query, _ = map(statistics.median, zip(*times))
            ratios = (statistics.median(each[i] / each[0] for each in times) for i in (1, 2))
            unit, strategy, budget, per_image = row
            table.add_row([unit if isinstance(unit, str) else ' '.join(map(str, unit.values())),
                           strategy if isinstance(strategy, str) else ' '.join(map(str, strategy.values())),
                           f'{budget} an image' if per_image else budget, f'{bare:.2f}', f'{query:.2f}',
                           *(f'{ratio:.2f}' for ratio in ratios)])
            print(table[-1:].get_string(header=len(table.rows) == 1, border=False), flush=True)
    print(table)


if __name__ == '__main__':
    main()
