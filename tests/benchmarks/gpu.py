"""The steps of gpu.sh, each in a process of its own, until the time is up: training, choices, query passes, selectors.

1. ``dist_al_train.sh CONFIG 1`` trains Fast-SCNN on CamVid, images in float32 and regions in mixed precision, two
   rounds.
2. With its weights, each strategy chooses on the GPU and, from the same probabilities, brought there, on the CPU.
3. The query pass against bare inference, of preloaded images: Fast-SCNN at 480x360 with the trained weights,
   SegFormer-B0 at 2048x1024 with random ones, in float32, bfloat16 and float16; and the peak memory of both.
4. selection.py, with vectors on the GPU.
"""
import argparse
import glob
import json
import math
import os
import os.path as osp
import platform
import statistics
import subprocess
import sys
import time

HERE = osp.dirname(osp.abspath(__file__))
ROOT = osp.dirname(osp.dirname(HERE))
CONFIG = '''
_base_ = 'mmseg::{base}'
custom_imports = dict(imports={imports})
root = {data!r}
classes = dict(classes=list('abcdefghijk'), palette=[[0] * 3] * 11)
def data(split, *augment):
    return dict(type='BaseSegDataset', data_root=root, metainfo=classes, img_suffix='.jpg', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *augment, dict(type='PackSegInputs')],
        data_prefix=dict(img_path='img/' + split, seg_map_path='ann/' + split))
train_dataloader = dict(_delete_=True, batch_size={batch}, num_workers={workers}, sampler=dict(type='InfiniteSampler'),
                        dataset=data('train', dict(type='RandomFlip', prob=.5)))
val_dataloader = test_dataloader = dict(
    _delete_=True, batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data('val'))
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters={iters}, val_interval={iters})
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval={iters}))
optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=.05, momentum=.9))
param_scheduler = [dict(type='PolyLR', power=.9, begin=0, end={iters}, by_epoch=False)]
randomness = dict(seed=0)
'''
SMALL = 'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py'
LARGE = 'segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py'
MODELS = {SMALL: '''
bn = dict(type='BN')
norm_cfg = bn
model = dict(data_preprocessor=dict(size=(360, 480)), backbone=dict(norm_cfg=bn), decode_head=dict(
    norm_cfg=bn, num_classes=11), auxiliary_head=None)
''', LARGE: '''
model = dict(pretrained=None, backbone=dict(init_cfg=None), decode_head=dict(norm_cfg=dict(type='BN')),
             test_cfg=dict(_delete_=True, mode='whole'))
'''}
SHARE = .01  # of all pixels, a budget below the image
ROWS = [('image', 'entropy', 20), ('image', 'bald', 20), ('image', 'coreset', 20), ('region', 'entropy', SHARE),
        ('region', 'coreset', SHARE), ('superpixel', 'entropy', SHARE), ('superpixel', 'real', SHARE),
        ('pixel', 'entropy', SHARE), ('pixel', 'ripu_pixel', SHARE), (dict(type='region', window=1), 'ripu', SHARE)]
MORE = [('image', 'margin', 20), ('image', 'badge', 20), ('image', 'contextual_diversity', 20),
        ('superpixel', 'classbal', SHARE), ('pixel', dict(type='badge', shortlist=2000), SHARE)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data')
    parser.add_argument('work')
    parser.add_argument('results')
    parser.add_argument('--rehearse', action='store_true', help='on the stand-in, with less of all')
    parser.add_argument('--seconds', type=float, default=500, help='for all steps')
    parser.add_argument('--step', help='of this process: choices, or passes MODEL PRECISION')
    args = parser.parse_args()
    if args.step:
        return step(args)
    import cv2
    import numpy
    import torch
    print(f'Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, OpenCV '
          f'{cv2.__version__}', flush=True)
    begin, failed, script = time.time(), [], [sys.executable, osp.abspath(__file__), *sys.argv[1:], '--step']
    selection = ['--device', 'cuda', '--picks', '2000', '--sizes', '100000', '1000000']
    if args.rehearse:
        selection = ['--device', 'accel', '--picks', '20', '--sizes', '1000', '--repeat', '1']
    for name, seconds, command in (
            ('training, images, float32', 90, training(args, 'image', 'entropy', 8)),
            ('training, regions, mixed precision', 90, training(args, 'region', 'entropy', SHARE, *(
                [] if args.rehearse else ['--amp']))),
            ('choices on both', 60, [*script, 'choices']),
            *((f'passes, {model}, {precision}', 70, [*script, f'passes {model} {precision}'])
              for precision in ('float32', 'bfloat16', 'float16')[:1 if args.rehearse else 3]
              for model in ('SegFormer-B0', 'Fast-SCNN')),
            ('selectors', 60, [sys.executable, *(
                [osp.join(ROOT, 'tests', 'standin.py'), 'cuda'] if args.rehearse else []), osp.join(
                    HERE, 'selection.py'), *selection])):
        left = begin + args.seconds - time.time()
        print(f'\n== {name} (after {args.seconds - left:.0f} s)', flush=True)
        if left < 20:
            print('no time is left', flush=True)
            failed.append(name)
            continue
        log = osp.join(args.results, f'{name.replace(", ", "_").replace(" ", "_")}.log')
        with open(log, 'w') as file:
            try:
                code = subprocess.run(command, stdout=file, stderr=file, cwd=args.work, env=environment(args),
                                      timeout=min(left, 600 if args.rehearse else seconds)).returncode
            except subprocess.TimeoutExpired:
                code = 'its time was up'
        text = open(log).read()
        print(text if not name.startswith('training') else summary(args, command, text), flush=True)
        if code:
            print(f'{name}: {code}\n{text[-1500:] if name.startswith("training") else ""}', flush=True)
            failed.append(name)
    print(f'\n{time.time() - begin:.0f} s; failed: {failed or "nothing"}')
    return bool(failed)


def environment(args: argparse.Namespace) -> dict:
    """For a rehearsal with what a config imports to have the stand-in."""
    with open(osp.join(args.work, 'with_device.py'), 'w') as file:
        file.write('import standin\nif not standin.LIBRARIES:\n    standin.install("cuda")\n')
    return dict(os.environ, PYTHONPATH=f'{args.work}:{os.environ["PYTHONPATH"]}',
                **dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='') if args.rehearse else {})


def training(args: argparse.Namespace, unit: str, strategy: str, amount, *options: str) -> list:
    config = write_config(args, SMALL, f'{unit}_{strategy}.py', f'al = dict(unit={unit!r}, strategy={strategy!r}, '
                          f'initial={amount}, budget={amount}, rounds=1)\n')
    return ['bash', osp.join(ROOT, 'dist_al_train.sh'), config, '1', '--work-dir', osp.join(args.work, unit), *options]


def summary(args: argparse.Namespace, command: list, text: str) -> str:
    """What a training came to."""
    path = osp.join(command[command.index('--work-dir') + 1], 'al_state.json')
    if not osp.isfile(path):
        return text[-1500:]
    rounds = json.load(open(path))['rounds']
    memory = [int(each.rpartition('memory: ')[2].split()[0]) for each in text.splitlines() if ' memory: ' in each]
    return '\n'.join(f'round {k}: {len(each["asked"])} images asked for, {each.get("train_seconds")} s of training, '
                     f'{each.get("query_seconds")} s of query, {each.get("metrics")}'
                     for k, each in enumerate(rounds)) + f'\npeak memory of training: {max(memory, default=0)} MiB'


def write_config(args: argparse.Namespace, base: str, name: str, more: str = '', data: str = '') -> str:
    path = osp.join(args.work, name)
    with open(path, 'w') as file:
        file.write(CONFIG.format(
            base=base, data=data or args.data, imports=['al_patch'] + ['with_device'] * args.rehearse,
            batch=2 if args.rehearse else 8, workers=0 if args.rehearse else 4, iters=2 if args.rehearse else 200))
        file.write(MODELS[base] + more)
    return path


# --- in a process of their own ---------------------------------------------------------------------------------------


def step(args: argparse.Namespace) -> int:
    import al_patch
    if args.rehearse:
        import with_device  # noqa: F401
    what, *of = args.step.split()
    al_patch.slic = waves  # superpixels are made once a run, and are not what is measured
    if what == 'choices':
        state_of = prepared(args, 'Fast-SCNN', 'float32', 8 if args.rehearse else 40)
        return compare(state_of, (ROWS + MORE)[::5 if args.rehearse else 1])
    images = 3 if args.rehearse else 100 if of[0] == 'Fast-SCNN' else 16
    state_of = prepared(args, *of, images)
    table(state_of, ROWS[::4] if args.rehearse else ROWS, 1 if args.rehearse else 3)
    return 0


def prepared(args: argparse.Namespace, model: str, precision: str, images: int):
    """A model on the device, and preloaded images. Returns a function from a row to a state before its first query."""
    import cv2
    from mmengine.config import Config
    from mmengine.runner import Runner, load_checkpoint

    import al_patch
    data = args.data
    if model != 'Fast-SCNN':
        data, shape = osp.join(args.work, 'large'), (512, 256) if args.rehearse else (2048, 1024)
        for path in sorted(glob.glob(osp.join(args.data, 'img', 'train', '*.jpg')))[:images]:
            os.makedirs(osp.join(data, 'img', 'train'), exist_ok=True)
            cv2.imwrite(osp.join(data, 'img', 'train', osp.basename(path)), cv2.resize(cv2.imread(path), shape))
    cfg = Config.fromfile(write_config(args, SMALL if model == 'Fast-SCNN' else LARGE, 'passes.py', data=data))
    cfg.work_dir, cfg.experiment_name, cfg.log_level = osp.join(args.work, 'passes'), f'{model}_{precision}', 'WARNING'
    cfg.test_dataloader.dataset = cfg.train_dataloader.dataset
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator', 'load_from'):
        cfg.pop(key, None)
    if precision != 'float32':
        cfg.optim_wrapper = dict(type='AmpOptimWrapper', dtype=precision, optimizer=cfg.optim_wrapper.optimizer)
    runner = Runner.from_cfg(cfg)
    trained = glob.glob(osp.join(args.work, 'image', 'round_1', 'iter_*.pth'))
    if model == 'Fast-SCNN' and trained:
        with al_patch.checkpoints_are_data():
            load_checkpoint(runner.model, trained[0], 'cpu')
    for each in al_patch.decode_head(runner.model).conv_seg.parameters():
        each.data.mul_(100 if args.rehearse else 1)  # so that scores differ by more than rounding
    pool = al_patch.Pool(runner.cfg)
    pool.names = pool.names[:images]
    stock, kept = type(pool).__getitem__, {}
    type(pool).__getitem__ = lambda self, name: kept[name] if name in kept else kept.setdefault(name, stock(self, name))

    def state_of(row: tuple) -> al_patch.State:
        unit, strategy, budget = row
        budget = min(budget, images // 2) if unit == 'image' else budget
        al = al_patch.parse_settings(dict(unit=unit, strategy=strategy, budget=budget))
        return al_patch.State(dict(seed=0, config={}, rounds=[dict(asked={})]), runner.work_dir, al, runner, pool)

    return state_of


def waves(image, n_segments: int, compactness: float):
    """As many segments as asked for, between wavy lines. (H, W) uint16"""
    import numpy as np
    (h, w), (y, x) = image.shape[:2], np.indices(image.shape[:2])
    cell = math.sqrt(h * w / n_segments)
    rows, columns = (np.clip((a + cell / 4 * np.sin(b / cell * 2)) // cell, 0, n // cell).astype(int)
                     for a, b, n in ((y, x, h), (x, y, w)))
    return np.unique(rows * (columns.max() + 1) + columns, return_inverse=True)[1].reshape(h, w).astype(np.uint16)


def words(row: tuple) -> str:
    return ' '.join(each if isinstance(each, str) else ' '.join(map(str, each.values())) for each in row[:2])


def compare(state_of, rows: list) -> int:
    """Each row's choice on the device and, from the same probabilities and features, on the CPU."""
    import numpy as np
    import torch
    from prettytable import PrettyTable

    import al_patch
    found = PrettyTable(['strategy', 'same', 'of', 'scores apart', 'their deviation'])
    with torch.no_grad():
        for row in rows:
            state = state_of(row)
            queries = [al_patch.Query(state, state.runner) for _ in range(2)]
            queries[1].collector.device, apart, spread = 'cpu', 0, []
            for name, seen in al_patch.Network(state.runner, queries[0].strategy).look(
                    state, queries[0].names, queries[0].views):
                on_cpu = seen._replace(means=[{key: each.cpu() for key, each in mean.items()} for mean in seen.means],
                                       features=seen.features if seen.features is None else seen.features.cpu())
                rows_of_both = [query.candidates(name, each) for query, each in zip(queries, (seen, on_cpu))]
                for query, each in zip(queries, rows_of_both):
                    query.collector.add(name, *each)
                scores = [each[0].score for each in rows_of_both]
                if len(scores[0]) == len(scores[1]):
                    apart = max(apart, abs(scores[0] - scores[1]).max(initial=0))
                spread.append(scores[1])
            here, there = ({(name, i) for name, ids in query.asked().items()
                            for i in ([0] if ids is None else ids.tolist())} for query in queries)
            found.add_row([words(row), len(here & there), len(there), f'{apart:.0e}',
                           f'{np.concatenate(spread).std():.0e}'])
            print_last(found)
    return int(any(row[1] < .9 * row[2] for row in found.rows))


def table(state_of, rows: list, repeat: int) -> None:
    """Times of the query pass and of bare inference in turn, and the peak memory of both."""
    import query_pass
    import torch
    from prettytable import PrettyTable

    import al_patch
    is_cuda = torch.cuda.is_available()

    def timed(function, state) -> tuple:
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        with al_patch.precision(state.runner):
            function(state)
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 2**20 if is_cuda else 0

    found = PrettyTable(['strategy', 'bare ms', 'query ms', 'query / bare', 'bare MiB', 'query MiB'])
    for row in rows:
        state = state_of(row)
        for function in (query_pass.bare_pass, query_pass.query_pass):  # loads images, superpixels and kernels
            timed(function, state)
        pairs = [(timed(query_pass.bare_pass, state), timed(query_pass.query_pass, state)) for _ in range(repeat)]
        (bare, bare_mib), (query, query_mib) = ([statistics.median(column) for column in zip(*each)]
                                                for each in zip(*pairs))
        ratio, each = statistics.median(q[0] / b[0] for b, q in pairs), 1000 / len(state.pool)
        found.add_row([words(row), f'{bare * each:.1f}', f'{query * each:.1f}', f'{ratio:.2f}', f'{bare_mib:.0f}',
                       f'{query_mib:.0f}'])
        print_last(found)


def print_last(found) -> None:
    """A table's last row at once, as the time can be up before the next; with the first, its head."""
    print(found[-1:].get_string(header=len(found.rows) == 1, border=False), flush=True)


if __name__ == '__main__':
    sys.exit(main())
