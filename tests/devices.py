"""Runs on the stand-in accelerator, as each kind of device, against the same runs on the CPU: strategies at every unit.

    python tests/devices.py                                      # all of them, as cuda, npu and mps: half an hour
    python tests/devices.py --only region-badge pixel-entropy --kinds mps
    python tests/devices.py --crossing                           # what leaves the device in a query, of five strategies

A run trains a tiny network on the device, scores the pool there and trains again. It fails if it ends in an error, if
it asks for others than the run on the CPU does, or if fewer than a thousand operations ran on the device. One that asks
for others is compared, too, with the CPU by the formula that a device has for the entropy, whose last bits differ. A
line a run; the exit code is 1 if any fails. A process for each kind does all its runs.

With ``--crossing`` the table has how many float32 maps of the image's size (H W) a query brings to the host for each
image, how often the host waits for the device, and how many maps go there, the image itself included.
"""
import argparse
import gc
import itertools
import json
import os
import os.path as osp
import subprocess
import sys
import tempfile
import time
import traceback

HERE = osp.dirname(osp.abspath(__file__))
sys.path[:0] = [osp.dirname(HERE), HERE]
KINDS, LEAST, ASKS = ('cuda', 'npu', 'mps'), 1000, 'asks for'
IMAGE = dict(initial=4, budget=2)
REGION = dict(unit=dict(type='region', size=[8, 8]), initial=12, budget=9)
WINDOW = dict(unit=dict(type='region', window=2), initial=12, budget=9)
SUPERPIXEL = dict(unit=dict(type='superpixel', n_segments=12, compactness=100.), initial=9, budget=6)
PIXEL = dict(unit='pixel', initial=60, budget=30)
UNITS = dict(image=IMAGE, region=REGION, window=WINDOW, superpixel=SUPERPIXEL, pixel=PIXEL)
SLIDE = "model.update(test_cfg=dict(mode='slide', crop_size=(20, 24), stride=(8, 11)))\n"
DROPOUT = "model['backbone'].update(type='WithDropout')\n"
SMALLER = dict(mc=3, batches=3, k=2, clusters=3)  # options of strategies that have them, for less time
SCORES = ('entropy', 'margin', 'ratio', 'least_confidence', 'variation_ratio', 'mean_std', 'bald', 'balent',
          'one_vs_rest', 'ripu', 'ripu_pixel')


def run_of(unit: dict, strategy: dict, more: str = '', **al) -> tuple:
    """The `al` block of a run, and what is added to its config."""
    return dict(unit, strategy=strategy, rounds=1, **al), more


SAMPLE = {  # each score, embedding and selector once; `test_device.py` runs these
    'image-badge': run_of(IMAGE, dict(type='badge'), visualize=1),
    'image-contextual-diversity': run_of(IMAGE, dict(type='contextual_diversity')),
    'image-variation-ratio-softmax': run_of(IMAGE, dict(type='variation_ratio', select='softmax', mc=3), DROPOUT),
    'image-powerbald-flip': run_of(IMAGE, dict(type='powerbald', mc=3, flip=True)),
    'image-mean-std-softrank': run_of(IMAGE, dict(type='mean_std', select='softrank', mc=3, reduce=10)),
    'image-slide-coreset': run_of(IMAGE, dict(type='coreset'), SLIDE, weights='continue'),
    'region-batches': run_of(REGION, dict(type='least_confidence', select='stochastic_batches', batches=3)),
    'region-crc': run_of(REGION, dict(type='crc', calibration=.4), max_images=5),
    'region-clasp': run_of(REGION, dict(type='clasp_pe')),
    'region-foreground': run_of(REGION, dict(type='random', foreground=.5), max_per_image=2),
    'region-balent-medoids': run_of(REGION, dict(type='balent', mc=3, embed='features', select='medoids')),
    'window-ripu': run_of(WINDOW, dict(type='ripu')),
    'pixel-pixelpick': run_of(PIXEL, dict(type='pixelpick'), per_image=True),
    'pixel-badge': run_of(PIXEL, dict(type='badge'), max_images=5),
    'pixel-ripu-pixel': run_of(PIXEL, dict(type='ripu_pixel', k=2)),
    'superpixel-classbal': run_of(SUPERPIXEL, dict(type='classbal')),
    'superpixel-real': run_of(SUPERPIXEL, dict(type='real', clusters=3), max_per_image=2),
    'superpixel-maxherding': run_of(SUPERPIXEL, dict(type='maxherding'), max_per_image=2),
    'superpixel-oreal-typical': run_of(SUPERPIXEL, dict(type='oreal', embed='features', select='typical', clusters=3)),
    'superpixel-product': run_of(SUPERPIXEL, dict(type='entropy', score=dict(type='product', of=['entropy', 'ripu'])))}


def all_runs() -> dict:
    """Every strategy, and every score as one, at every unit that takes it."""
    import al_patch
    names, runs = (*al_patch.AL_STRATEGIES.module_dict, *SCORES), {}
    for unit, name in itertools.product(UNITS, dict.fromkeys(names)):
        parameters = al_patch.resolve_strategy(name).record
        options = {key: value for key, value in SMALLER.items() if key in parameters and (
            key != 'mc' or parameters['mc'] > 1)}
        run = run_of(UNITS[unit], dict(type=name, **options, **(dict(calibration=.4) if name == 'crc' else {})))
        try:
            al_patch.parse_settings(run[0])
        except ValueError:
            continue
        runs[f'{unit}-{name}'] = run
    return {**runs, **SAMPLE}


def work(kind: str, names: list, folder: str) -> None:
    """Do runs as one kind of device, and write what each came to: {name: {asked, operations, ...}}."""
    import standin
    import torch
    runs = all_runs()  # which imports al_patch, before all of mmseg
    if kind in KINDS:
        standin.install(kind)
    torch.set_num_threads(1)
    import mmengine.config.config
    import mmengine.runner.runner
    import tiny
    from mmengine.config import Config
    from mmengine.runner import Runner
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    import al_patch

    @MODELS.register_module()
    class WithDropout(tiny.TinyBackbone):
        """Drops single numbers, where a head drops whole channels."""

        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(.5)

        def forward(self, x):
            return (self.dropout(super().forward(x)[0]), )

    register_all_modules(init_default_scope=False)
    mmengine.runner.runner.collect_env = dict  # slow, as is yapf
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)
    attach, query, crossed, found = al_patch.attach_companions, al_patch.query, {}, {}

    def counted(state, trainer):
        before = standin.CROSSED.copy()
        asked = query(state, trainer)
        if trainer is not None:
            crossed.update({key: standin.CROSSED[key] - before[key] for key in standin.CROSSED})
        return asked

    al_patch.query = counted
    if kind == 'formula':
        al_patch.entropy = al_patch.STATISTICS['entropies_NHW'] = lambda probs: torch.special.entr(probs).sum(1)
        al_patch.AL_SCORES.module_dict['entropy'] = al_patch.entropy
    for name in names:
        al, more = runs[name]
        text = tiny.config_text(osp.join(folder, 'data')) + more
        cfg = Config.fromstring(text + 'val_cfg = val_dataloader = val_evaluator = None\n', '.py')
        cfg.merge_from_dict(dict(al=al, work_dir=osp.join(folder, kind, name), experiment_name=f'{kind}_{name}'))
        cfg.default_hooks.checkpoint.save_best = None
        cfg.train_cfg.max_iters = 8 if al.get('weights') == 'continue' else 4
        al_patch.attach_companions = attach if 'visualize' in al else lambda runner: []
        begin, before = time.process_time(), sum(standin.DONE.values())
        try:
            Runner.from_cfg(cfg).train()
            rounds = al_patch.read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE))['rounds']
            found[name] = dict(asked=[each['asked'] for each in rounds])
        except Exception:
            found[name] = dict(error=traceback.format_exc())
        found[name].update(operations=sum(standin.DONE.values()) - before, crossed=dict(crossed),
                           seconds=time.process_time() - begin)
        with open(osp.join(folder, f'{kind}.json'), 'w') as file:
            json.dump(found, file)


def work_as_each(kinds: list, names: list, folder: str) -> None:
    """Import what takes long once, and fork for each kind."""
    import tiny
    tiny.make_data(osp.join(folder, 'data'))
    all_runs()  # which imports al_patch, before all of mmseg
    import skimage.segmentation  # noqa: F401
    from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    gc.freeze()  # every data set of mmengine's collects garbage, which would otherwise visit all of torch each time
    for kind in kinds:
        child = os.fork()
        if not child:
            log = os.open(osp.join(folder, f'{kind}.log'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            try:
                work(kind, names, folder)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
        os.waitpid(child, 0)


def run(kinds: list, names: list, folder: str) -> dict:
    """Do runs as each kind. Returns {kind: what `work` writes}."""
    code = f'import devices; devices.work_as_each({kinds!r}, {names!r}, {folder!r})'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=folder, env={
        **os.environ, 'PYTHONPATH': HERE, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    found = {}
    for kind in kinds:
        path = osp.join(folder, f'{kind}.json')
        found[kind] = json.load(open(path)) if osp.isfile(path) else {}
        if len(found[kind]) < len(names) and osp.isfile(osp.join(folder, f'{kind}.log')):
            print(open(osp.join(folder, f'{kind}.log')).read()[-2000:])
    return found


def fault_of(on_cpu: dict | None, there: dict | None) -> str:
    """What is wrong with a run there, in words; '' if nothing is."""
    if not there or not on_cpu:
        return 'the process ended'
    if 'error' in on_cpu:
        return f'on the CPU: {on_cpu["error"].strip().splitlines()[-1]}'
    if 'error' in there:
        return there['error'].strip().splitlines()[-1]
    if there['operations'] < LEAST:
        return f'{there["operations"]} operations'
    for k, pair in enumerate(zip(on_cpu['asked'], there['asked'])):
        if pair[0] != pair[1]:
            return f'query {k} {ASKS} {pair[1]}, on the CPU for {pair[0]}'
    return ''


def crossing(found: dict) -> None:
    import tiny
    from prettytable import PrettyTable
    bytes_of_map = 4 * tiny.SHAPE[0] * tiny.SHAPE[1]
    table = PrettyTable(['run', 'maps to the host', 'waits', 'maps to the device'])
    for name, each in found.items():
        images = len(tiny.NAMES) - (4 if name.startswith('image') else 0)
        host, waits, device = (each['crossed'].get(key, 0) / images for key in ('to_host', 'waits', 'to_device'))
        table.add_row([name, *(f'{value:.2f}' for value in (host / bytes_of_map, waits, device / bytes_of_map))])
    print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', metavar='NAME')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=KINDS)
    parser.add_argument('--crossing', action='store_true')
    parser.add_argument('--traceback', action='store_true')
    args = parser.parse_args()
    names = args.only or list(all_runs())
    if args.crossing:
        args.kinds, names = ['cuda'], [f'{unit}-{name}' for unit in UNITS for name in (
            'entropy', 'coreset', 'real', 'badge', 'ripu_pixel') if f'{unit}-{name}' in all_runs()]
    with tempfile.TemporaryDirectory() as folder:
        if args.crossing:
            crossing(run(args.kinds, names, folder)['cuda'])
            return 0
        found = run(['cpu', *args.kinds], names, folder)
        differ = [name for name in names if any(ASKS in fault_of(found['cpu'].get(name), found[kind].get(name))
                                                for kind in args.kinds)]
        found.update(run(['formula'], differ, folder) if differ else {})
    faults = 0
    for name, kind in itertools.product(names, args.kinds):
        each = found[kind].get(name, {})
        fault, words = fault_of(found['cpu'].get(name), each), 'same'
        if ASKS in fault and not fault_of(found['formula'].get(name), each):
            fault, words = '', "same, but for the entropy's last bits"
        faults += bool(fault)
        print(f'{name:32} {kind:5} {each.get("seconds", 0):5.1f} s {each.get("operations", 0):6}  {fault or words}')
        if args.traceback and 'error' in each:
            print(each['error'])
    print(f'{len(names) * len(args.kinds) - faults} of {len(names) * len(args.kinds)} runs are the same')
    return bool(faults)


if __name__ == '__main__':
    sys.exit(main())
