"""Look at runs of active learning: curves, tables and pictures.

    python al_report.py status WORK_DIR                             where a run, or each in a folder, stands
    python al_report.py compare WORK_DIR [WORK_DIR ...] [-o FILE]   learning curves, their area, labels needed
    python al_report.py maps CONFIG CHECKPOINT --out DIR            where any model of mmseg's is unsure, as files
    python al_report.py html WORK_DIR [WORK_DIR ...] [-o FILE]      all there is to see of runs: a page in one file

Where this file lies beside ``al_patch.py``, a hook also looks at every run: after a round's training it draws
``learning_curve.png`` and ``asked.png`` and, with ``al.visualize``, some images after each query. It keeps what it
draws from in JSON files in the rounds' folders, and hands all of it to the run's visualizer.

Read it from the top: each uses what stands below it.
"""
from __future__ import annotations

import argparse
import ast
import base64
import collections
import contextlib
import copy
import csv
import datetime
import functools
import gc
import glob
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import os.path as osp
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
import zlib
from typing import Any, Callable, Iterable, Iterator, NamedTuple


class Lazy:
    """A module that is imported when it is first asked for something: ``status`` then needs none of these, and
    ``compare`` no torch."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


al_patch, jinja2, mmcv, mmengine, ndimage, np, pil, prettytable, torch = map(Lazy, (
    'al_patch', 'jinja2', 'mmcv', 'mmengine', 'scipy.ndimage', 'numpy', 'PIL.Image', 'prettytable', 'torch'))
colors, figures, matplotlib, patches, transforms = map(Lazy, (
    'matplotlib.colors', 'matplotlib.figure', 'matplotlib', 'matplotlib.patches', 'matplotlib.transforms'))


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(prog='al_report.py', description='Look at runs of active learning')
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('status', help='where a run stands, and how to go on; or all runs in a folder').add_argument(
        'dir', metavar='WORK_DIR')
    comparing = commands.add_parser('compare', aliases=['report'],
                                    help='compare runs: learning curves, their area, labels needed')
    comparing.add_argument('-o', '--out', metavar='FILE', help='draw the curves: .png, .pdf or .svg')
    comparing.add_argument('--target', type=float, metavar='VALUE', help='how many labels that takes: a share of full '
                           'supervision, as 0.95, or a metric above 1')
    paging = commands.add_parser('html', help='a page in one file: curves, tables, and what was asked for')
    paging.add_argument('-o', '--out', metavar='FILE', help='by default report.html in the first WORK_DIR')
    for several in comparing, paging:
        several.add_argument('dirs', nargs='+', metavar='WORK_DIR', help='those that differ in seeds are averaged')
        several.add_argument('--metric', help='by default that of `al.stop`, or mIoU')
        several.add_argument('--full', type=float, metavar='VALUE', help='the metric with all labels; by default that '
                             'of a WORK_DIR in which everything is labelled')
    mapping = commands.add_parser('maps', help='where any model of mmseg\'s is unsure: score maps of images, as files')
    add_model_arguments(mapping)
    mapping.add_argument('--images', metavar='FOLDER', help='by default the images of the config\'s test_dataloader')
    mapping.add_argument('--score', default=dict(type='entropy'), nargs='+', action=Setting, metavar='NAME',
                         help='a name or package.module:function, and options: ripu k=2')
    mapping.add_argument('--mc', type=int, help='passes with dropout')
    args = parser.parse_args(argv)
    if args.command == 'report':
        print('al_report.py: `report` is called `compare` now', file=sys.stderr)
    try:
        print(status(args.dir) if args.command == 'status' else
              maps(args.config, args.checkpoint, args.out, args.images, args.score, args.mc,
                   args.cfg_options) if args.command == 'maps' else
              write_page(args.dirs, args.out, args.metric, args.full) if args.command == 'html' else
              compare(args.dirs, args.out, args.metric, args.full, args.target))
    except (OSError, ValueError) as error:
        parser.exit(2, f'al_report.py {args.command}: {error}\n')
    except ModuleNotFoundError as error:
        parser.exit(2, f'al_report.py {args.command}: {error}: pip install {error.name}\n')


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What a command is told of a model that no run has trained."""
    parser.add_argument('config', metavar='CONFIG', help='any of mmseg\'s; it needs no `al` block')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a file with its weights')
    parser.add_argument('--out', required=True, metavar='DIR', help='a new folder')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', type=option_of,
                        help='override config keys, e.g. test_dataloader.batch_size=4')


class Setting(argparse.Action):
    """A setting out of a command line, ``name key=value ...``, as the ``al`` block has it."""

    def __call__(self, parser, namespace, values, option_string=None):
        name, *options = values
        try:
            setattr(namespace, self.dest, dict(map(option_of, options), type=name))
        except argparse.ArgumentTypeError as error:
            parser.error(f'{option_string} {name}: {error}')


def option_of(text: str) -> tuple[str, Any]:
    """An option ``key=value`` of a command line."""
    key, is_option, value = text.partition('=')
    if not is_option:
        raise argparse.ArgumentTypeError(f'should be key=value, but got {text!r}')
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return key, value


# ---------------------------------------------------------------------------------------------------------------------
# The hook
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def hook() -> mmengine.hooks.Hook:
    """The hook of every run. With it, these are keys of the ``al`` block: ``reports``, whether to draw the run's curve
    and what it has asked for, ``visualize``, how many images to draw after each query, ``keep``, which checkpoints, and
    ``prices``, what labels cost."""
    al_patch.block_settings().update(
        reports=(True, al_patch.Flag), visualize=(0, al_patch.Count), keep=('all', al_patch.one_of('all', 'needed')),
        prices=(None, al_patch.or_none(al_patch.rule(
            'a dict of prices >= 0 of an `image` that is opened, a `click` and a `pixel`, and their `unit`, e.g. '
            "dict(image=20, click=1.5, unit='s')", are_prices))))

    class QuicklyDumped(mmengine.Config):
        """A config that is put into words once, not for each checkpoint, log and dump of a round: yapf takes a quarter
        of a second and more each time."""

        @property
        def pretty_text(self) -> str:
            what = repr(self)
            if what not in texts:
                texts.clear()
                texts[what] = super().pretty_text
            return texts[what]

        def __reduce__(self):  # it is stock in another process
            return object.__new__, (mmengine.Config, ), self.__getstate__()

    texts = {}

    class ReportHook(mmengine.hooks.Hook):
        """Looks at a run. ``al_patch`` turns what goes wrong in it into a warning, once ``before_al_run`` has let it
        begin."""
        priority = 'VERY_LOW'  # in training, what others have made ready is looked at
        state = None  # of the run, while a round trains
        is_first = True  # whether no training has begun since the start
        is_sparse = False  # whether images are partly labelled, so that losses have to be tried on one without labels
        shown = set()  # values of the validation labels of a round that this rank has seen

        def before_train(self, runner) -> None:
            check_finite(runner)  # of one that was killed before it could say so
            self.shown, dataset = set(), runner.train_dataloader.dataset
            for leaf in leaves_under(dataset):
                check_item(leaf)
                check_steps(leaf, is_alone=leaf is dataset)
                check_hidden(leaf)
            is_first, self.is_first = self.is_first and self.state is not None, False
            if is_first and not runner.iter:
                check_first_losses(runner)
            if self.is_sparse:
                check_void(runner)
            check_last_batch(runner)
            if is_first:
                as_one(rehearse_file, runner)
                as_one(rehearse_rounds, self.state)
            if self.state:
                tell_what_is_to_come(self.state, runner, is_first)

        def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
            if runner.iter % 50 == 0 and runner.cfg.get('al') is None:  # it waits for the device
                check_finite(runner)

        def after_train(self, runner) -> None:
            check_finite(runner)

        def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
            for sample in outputs or ():
                if hasattr(sample, 'gt_sem_seg'):
                    self.shown.update(sample.gt_sem_seg.data.unique().tolist())

        def before_val_epoch(self, runner) -> None:
            """Have mmseg's IoUMetric, and those like it, keep the IoU of every class: they return means only."""
            if runner.cfg.get('al') is not None:  # it is no round's
                return
            check_finite(runner)
            name_files(runner.val_dataloader.dataset)
            for metric in getattr(getattr(runner.val_loop, 'evaluator', None), 'metrics', ()):
                compute = getattr(metric, 'total_area_to_metrics', None)
                if compute and 'total_area_to_metrics' not in vars(metric):
                    metric.total_area_to_metrics = functools.partial(keep_class_iou, runner, metric, compute)

        def before_al_run(self, state: al_patch.State) -> None:
            self.is_sparse, self.is_first = state.counts_pixels, True
            if type(state.runner.cfg) is mmengine.Config:
                object.__setattr__(state.runner.cfg, '__class__', QuicklyDumped)  # and so are the rounds', its copies
            for check in (check_rounds, check_amounts, check_groups, check_overrides, check_schedule,
                          check_continue, check_best, check_committee, check_model, check_pool, check_masks,
                          check_validation, check_no_label, check_disk, check_wrappers, check_segments, rehearse,
                          make_segments):
                check(state)

        def before_al_train(self, state: al_patch.State, trainer) -> None:
            self.state = state
            if al_patch.is_main_process():
                al_patch.write_atomically(osp.join(state.work_dir, 'sizes.json'), json.dumps(state.seen_files))
                look_at_labels(state)
                colours = np.array(state.pool.leaves[0].metainfo['palette'], int) @ [65536, 256, 1]
                al_patch.write_atomically(osp.join(state.work_dir, 'palette.json'),
                                          json.dumps(dict(zip(state.classes, colours.tolist()))))

        def after_al_validate(self, state: al_patch.State, trainer) -> None:
            warn_of_figures(state, trainer, self.shown)

        def check_resume(self, state: al_patch.State, content: dict) -> None:
            check_resume(state, content)

        @torch.no_grad()
        def after_al_train(self, state: al_patch.State, trainer) -> None:
            self.state = None
            if al_patch.is_main_process():
                delete_checkpoints(state)
                write_table(state)
                report_curve(state)
                report_asked(state, trainer)

        def after_al_run(self, state: al_patch.State) -> None:
            state.logger.info('\n'.join([f'The run, by rounds:\n{rounds_table(rounds_of(state))}', *last_lines(state)]))

        @torch.no_grad()
        def after_al_query(self, state: al_patch.State, trainer, asked: dict) -> None:
            warn_of_draws(state)
            if al_patch.is_main_process():
                keep(state, 'query_scores.json', state.scores)
                draw_pictures(state, trainer, asked)

    return ReportHook()


def are_prices(value) -> bool:
    return isinstance(value, dict) and {*value} <= {'image', 'click', 'pixel', 'unit'} and all(
        isinstance(price, str) if key == 'unit' else type(price) in (int, float) and price >= 0
        for key, price in value.items())


def delete_checkpoints(state: al_patch.State) -> None:
    """With ``al.keep='needed'``, delete those of all rounds before the newest, which is trained."""
    for k in range(state.round) if state.al.keep == 'needed' else ():
        for path in glob.glob(osp.join(glob.escape(state.folder(k)), '*.pth')):
            os.remove(path)
            state.logger.info(f"Deleted {path}: al.keep='needed', and a later round is trained")


def tell_what_is_to_come(state: al_patch.State, trainer, is_first: bool) -> None:
    """At the first training of a start, what there is to train and to ask for; and as soon as a round is done, in each
    that follows, how long all of it will take if it goes on like that."""
    k, lengths = state.round, iterations_of_rounds(state, trainer)
    to_come = [lengths[k] + state.begin - trainer.iter, *lengths[k + 1:]]
    n, same = len(to_come), len({*to_come}) == 1
    if is_first:
        asked = [amount_in_words(state, budget) for budget in al_patch.budgets(state.al)[k:]]
        asks = f'each but the last asks for {asked[0]} more' if len({*asked}) == 1 else \
            f'they ask for {", ".join(asked)} more' if asked else 'nothing more is asked for'
        each = ', '.join(map(str, to_come[:1] if same else to_come)) + ' iterations' + ' each' * (same and n > 1)
        state.logger.info(f'To come: {n} round{"s" * (n > 1)} of {each}, {sum(to_come)} in all; {asks}; seed '
                          f'{state.seed}')
    if done := state.rounds[:k]:
        seconds = sum(to_come) * np.median([entry['train_seconds'] / each for entry, each in zip(done, lengths)])
        seconds += (n - 1) * np.median([entry.get('query_seconds', 0) for entry in done])
        end = time.strftime('%H:%M on %d %B', time.localtime(time.time() + seconds))
        state.logger.info(f'About {datetime.timedelta(seconds=round(seconds))} to go, to the end of round {k + n - 1} '
                          f'at {end}' + ', and the time to label' * (state.al.oracle['type'] == 'human'))


def iterations_of_rounds(state: al_patch.State, trainer) -> list[int]:
    """How many iterations each round has; about, where epochs have as many as there are images."""
    images, lengths, begin = [entry['spent'].get('images') for entry in state.rounds], [], 0
    for k in range(max(state.al.rounds, state.round) + 1):
        if state.al.weights == 'continue':
            begin, before = al_patch.end_of(state, k, begin), begin
            lengths.append(begin - before)
            continue
        cfg = mmengine.Config(dict(train_cfg=copy.deepcopy(state.runner.cfg.train_cfg)))
        cfg.merge_from_dict({key: value for key, value in al_patch.override_of(state, k).items()
                             if key.split('.')[0] == 'train_cfg'})
        length = cfg.train_cfg.get('max_iters') or trainer.max_iters
        if cfg.train_cfg.get('max_epochs'):
            n = images[k] if k <= state.round else images[-1] if state.counts_pixels else images_by(state, k)
            length = cfg.train_cfg.max_epochs * len(trainer.train_dataloader) * (n or images[-1]) / images[-1]
        lengths.append(max(1, round(length)))
    return lengths


def amount_in_words(state: al_patch.State, amount: float) -> str:
    """What a budget buys."""
    where = ' of each image' * state.al.per_image
    if isinstance(amount, float) and state.counts_pixels:
        return f'{100 * amount:g} % of the pixels{where}'
    return f'{al_patch.number_of(amount, len(state.pool))} {state.al.unit.type}s{where}'


def last_lines(state: al_patch.State) -> list[str]:
    """The figures of a run that has ended, its model, and the commands to look further."""
    tool, folder = min(osp.relpath(__file__), osp.abspath(__file__), key=len), state.folder()
    figures = [path for name in ('learning_curve.png', 'asked.png')
               if osp.isfile(path := osp.join(state.work_dir, name))]
    config = max(glob.glob(osp.join(glob.escape(folder), '*.py')), key=osp.getmtime, default='its config')
    tool, run = map(shlex.quote, (tool, state.work_dir))
    return [*[f'Figures: {", ".join(figures)}'] * bool(figures),
            f'Final model: {state.checkpoint(state.round, "last")}, for tools/test.py with {config}',
            f'To look further: python {tool} html {run}', f'                 python {tool} compare {run} ANOTHER_RUN']


def name_files(dataset) -> None:
    """Have a data set name the file that it cannot read."""
    pipeline = getattr(dataset, 'pipeline', None)
    if type(pipeline) is mmengine.dataset.Compose:

        class Named(mmengine.dataset.Compose):

            def __call__(self, results: dict) -> dict | None:
                with al_patch.reading(f'{results.get("img_path")} or its label map {results.get("seg_map_path")}'):
                    return super().__call__(results)

        dataset.pipeline = Named(pipeline.transforms)


def check_finite(runner) -> None:
    """End a round that has diverged, and let a resumed run begin it anew. A loss now and then that is no number, as
    that of an iteration that mixed precision skips, does not count.

    Raises:
        ValueError: On every rank: a weight is not finite, or none of the last ten losses is.
    """
    losses = runner.message_hub.log_scalars.get('train/loss', al_patch.HistoryBuffer()).data[0][-10:]
    weights = filter(torch.is_tensor, runner.model.state_dict().values())
    if any(al_patch.all_gather_object(len(losses) and not np.isfinite(losses).any() or not all(
            weight.isfinite().all() for weight in weights))):
        with contextlib.suppress(FileNotFoundError):  # another rank was first
            os.remove(osp.join(runner.work_dir, 'last_checkpoint'))
        raise ValueError(f'{osp.basename(runner.work_dir)} has diverged by iteration {runner.iter}: loss and '
                         'weights should be finite; mend the config, e.g. by a lower `optim_wrapper.optimizer.lr`, '
                         'and --resume trains the round anew')


def keep_class_iou(runner, metric, compute: Callable, *args, **kwargs) -> dict:
    """What a metric computes; each class's IoU goes into the round's ``class_iou.json``. mmengine calls it on rank 0,
    and does not guard it: what goes wrong here must not end a run."""
    computed = compute(*args, **kwargs)
    try:
        percent = {name: round(100 * float(value), 2) for name, value in zip(
            metric.dataset_meta['classes'], computed.get('IoU', ())) if np.isfinite(value)}
        al_patch.write_atomically(osp.join(runner.work_dir, 'class_iou.json'), json.dumps(percent))
    except Exception as error:
        runner.logger.warning(f'keep_class_iou failed, the run goes on: {type(error).__name__}: {error}')
    return computed


def warn_of_figures(state: al_patch.State, trainer, shown: set) -> None:
    """Warn of what a training hardly comes to with right labels; on all ranks, with what each has ``shown``."""
    losses = trainer.message_hub.log_scalars.get('train/loss')
    shown, are_zero = zip(*al_patch.all_gather_object((shown, losses is not None and not np.any(losses.data[0]))))
    shown = set().union(*shown)
    absent = [name for c, name in enumerate(state.classes) if c not in shown]
    if shown and absent:
        state.warn(f'No label of the validation set is of {in_short(absent)}, whose IoU is nan or 0 in every round: '
                   'check the values in its label files')
    for key, value in state.entry['metrics'].items():
        if value == 100 or value != value:
            state.warn(f'{key} is {value:g}, as of labels that show one class or none: check the values in the label '
                       'files of the validation set')
    if all(are_zero):
        state.warn('The loss is 0 in all iterations, as of labels that show one class or none: check the values in the '
                   'label files of the training set')


def warn_of_draws(state: al_patch.State) -> None:
    """Warn where a query's choice was more or less a draw; on all ranks, each with its share of the candidates."""
    collector, strategy = state.collector, state.strategy
    equals = sum(al_patch.all_gather_object(collector.equals), collections.Counter())
    n, are_one = collector.range[2], all(al_patch.all_gather_object(collector.is_one_vector))
    if n > 1 and max(equals.values(), default=0) > .9 * n and strategy.score is not al_patch.random_scores:
        state.warn(f'More than nine in ten scores of the {strategy.name} query are equal, and the choice among them is '
                   'a draw: has the model learned anything?')
    if n > 1 and strategy.embed and are_one:
        state.warn(f'All vectors of the {strategy.name} query are equal, and the choice among them is a draw: has the '
                   'model learned anything?')


def in_short(names: list[str]) -> str:
    return ', '.join(names[:10]) + (f' and {len(names) - 10} more' if len(names) > 10 else '')


# ---------------------------------------------------------------------------------------------------------------------
# Any model: where it is unsure, as files; and the state of a run that has not been, which a query of it needs
# ---------------------------------------------------------------------------------------------------------------------


def maps(config: str, checkpoint: str, out: str, images: str | None = None, score: dict | None = None,
         mc: int | None = None, cfg_options: list = ()) -> str:
    """Write the score map of every image, in its own coordinates and from the enlarged logits: ``maps/<name>.npy``
    (H, W) float32, the same as a PNG of 16 bits, from the lowest to the highest score of all images (``scale.json``),
    and in colours over the image, with a bar. ``scores.csv`` has means and maxima, the highest mean first.

    Raises:
        ValueError: A setting or a file that cannot be used; a score that makes no map, or is not finite.
    """
    score = {**(score or dict(type='entropy')), **({} if mc is None else dict(mc=mc))}
    with new_folder(out), al_patch.checkpoints_are_data(), torch.no_grad():
        state = state_of_model(config, checkpoint, out, images and [images], cfg_options, strategy=score)
        if state.strategy.score is al_patch.random_scores or state.strategy.calibration:
            raise ValueError(f'--score should make a map of class probabilities alone, but got {score["type"]!r}')
        check_model(state)
        figures = write_maps(state)
    return last_words(f'{len(figures)} score maps are in {out}, the most unsure image is {next(iter(figures))!r}')


def write_maps(state: al_patch.State) -> dict[str, tuple]:
    """The files; all ranks share the images.

    Returns:
        Name of an image -> mean, highest and lowest score, the highest mean first.
    """
    names, figures = state.pool.names, {}
    looks = al_patch.Network(state.runner, state.strategy, state.al.logits).look(state, names, [al_patch.to_image])
    total = sum(map(len, al_patch.deal_batches(state, names)))
    for name, seen in al_patch.watched(state, 'maps', looks, total):
        score_HW = score_map(state, state.strategy, seen)
        if not np.isfinite(score_HW).all():
            raise ValueError(f'the score of image {name!r} is not finite: the model, or --score, gives no finite '
                             'numbers')
        content = io.BytesIO()
        np.save(content, score_HW)
        al_patch.write_atomically(map_path(state, name), content.getvalue())
        figures[name] = float(score_HW.mean(dtype=np.float64)), float(score_HW.max()), float(score_HW.min())
    figures = dict(collections.ChainMap(*al_patch.all_gather_object(figures)))
    figures = dict(sorted(figures.items(), key=lambda item: (-item[1][0], item[0])))
    low, high = min(lowest for _, _, lowest in figures.values()), max(highest for _, highest, _ in figures.values())
    al_patch.on_all_ranks(functools.partial(draw_map, state, low, high), names, 'Pictures')
    if al_patch.is_main_process():
        write_csv(osp.join(state.work_dir, 'scores.csv'), [
            ['image', 'mean', 'max'], *([name, *map('{:.6g}'.format, each[:2])] for name, each in figures.items())])
        al_patch.write_atomically(osp.join(state.work_dir, 'scale.json'), json.dumps({'0': low, '65535': high}))
    return figures


def map_path(state: al_patch.State, name: str, kind: str = 'maps', suffix: str = '.npy') -> str:
    path = al_patch.png_path(osp.join(state.work_dir, kind), name, state.work_dir)
    return path.removesuffix('.png') + suffix


def draw_map(state: al_patch.State, low: float, high: float, name: str) -> None:
    """Write an image's score map, whose file is there, as a PNG of 16 bits, and over the image."""
    score_HW = np.load(map_path(state, name)).astype(np.float64)
    share_HW = (score_HW - low) / max(high - low, 1e-12)
    al_patch.write_png(map_path(state, name, suffix='.png'), (65535 * share_HW).round().astype(np.uint16))
    image, times = to_rgb(state.pool.load_image(name)), math.ceil(240 / len(score_HW))
    picture = .4 * image + .6 * heat_colours()[(255 * share_HW).round().astype(int)]
    picture = np.hstack([picture.repeat(times, 0).repeat(times, 1), colour_bar(times * len(score_HW), low, high)])
    mmcv.imwrite(picture[..., ::-1].round().astype(np.uint8), map_path(state, name, 'overlays', '.jpg'))


@functools.cache
def heat_colours() -> np.ndarray:
    """The colours of low to high scores, (256, 3)."""
    return 255 * importlib.import_module('matplotlib').colormaps['cividis'](range(256))[:, :3]


@functools.lru_cache(8)
def colour_bar(height: int, low: float, high: float) -> np.ndarray:
    """A bar that tells which colour is which score, (height, 90, 3)."""
    figure = figures.Figure((.9, height / 100), dpi=100)
    axes = figure.add_axes((.1, 12 / height, .2, 1 - 24 / height))
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap='cividis', aspect='auto',
                extent=(0, 1, low, max(high, low + 1e-12)))
    axes.set(xticks=[])
    axes.yaxis.tick_right()
    return mmcv.imfrombytes(rendered(figure), channel_order='rgb')


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[None]:
    """A folder that is new, or was empty, and that goes again if what should fill it fails.

    Raises:
        ValueError: It holds something.
    """
    is_first = 'TORCHELASTIC_RUN_ID' not in os.environ or os.environ['RANK'] == '0'
    was_there = osp.isdir(path)
    if is_first and osp.lexists(path) and not (was_there and not os.listdir(path)):
        raise ValueError(f'--out should be a new or an empty folder, but {path} holds something: choose another, or '
                         'delete it')
    try:
        yield
    except BaseException:
        if is_first and osp.isdir(path):
            shutil.rmtree(path)
            if was_there:
                os.mkdir(path)
        raise


def state_of_model(config: str, checkpoint: str, out: str, folders: list[str] | None = None, options: list = (),
                   seed: int | None = None, **al) -> al_patch.State:
    """The state of a run that has trained one round, whose checkpoint is the user's own: so all that is asked of a run
    can be asked of any model. Nothing is labelled in it.

    Args:
        out: The work_dir.
        folders: Of images, which are the pool. By default they are those of the config's test_dataloader.
        options: Pairs of a config's key and its value.
        seed: By default the config's or 0.
        al: Settings of the ``al`` block.

    Raises:
        ValueError: A file cannot be used, or the weights are not this model's: it names parameters.
    """
    from mmengine.hub import get_config
    if not osp.isfile(checkpoint):
        raise ValueError(f'CHECKPOINT should be a file with weights, but there is no {checkpoint}')
    with al_patch.reading(config):
        cfg = get_config(config) if '::' in config else mmengine.Config.fromfile(config)
    cfg.al = dict(al, rounds=1)
    with al_patch.reading('--cfg-options'):
        cfg.merge_from_dict(dict(options))
    test = al_patch.scoring_loader(cfg)
    loader = cfg.get('train_dataloader') or test
    if not (loader and (folders or test)):
        raise ValueError(f'{config} should have a test_dataloader, which tells how images are loaded, but has none')
    cfg.al.setdefault('seed', (cfg.get('randomness', {}).get('seed') if seed is None else seed) or 0)
    cfg.update(work_dir=osp.abspath(out), resume=False, load_from=None, visualizer=None,
               train_dataloader=copy.deepcopy(dict(loader if folders else test)))
    for key, default in dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=.01)),
                             train_cfg=dict(type='IterBasedTrainLoop', max_iters=1)).items():
        cfg[key] = cfg.get(key) or default  # what is not there is not used
    runner = start_quietly(cfg)
    if folders:
        leaf = next(iter(al_patch.leaf_configs(loader['dataset']).values()))
        sets = [folder_dataset(leaf, folder, osp.join(out, f'images_{i}.txt')) for i, folder in enumerate(folders)]
        runner.cfg.train_dataloader.dataset = sets[0] if len(sets) == 1 else dict(type='ConcatDataset', datasets=sets)
        runner.dump_config()
    companions = al_patch.attach_companions(runner)
    state = al_patch.State(dict(seed=runner.cfg.al.seed, config={}), runner.work_dir, al_patch.parse_settings(
        runner.cfg.al), runner, al_patch.Pool(runner.cfg, al_patch.unwrap(runner.model)))
    state.companions, state.thresholds = companions, {}
    check_pool(state)
    link = osp.join(state.folder(0), osp.basename(checkpoint))
    if al_patch.is_main_process():
        os.makedirs(osp.dirname(link))
        os.symlink(osp.abspath(checkpoint), link)
    al_patch.barrier()
    state.rounds.append(dict(asked={}, strategy={}, spent={}, metrics={}, checkpoints=dict(last=osp.basename(link)),
                             train_seconds=0, **dict(pixels=0, void_pixels=0) if state.counts_pixels else {}))
    state.entry['spent'], state.phase = state.spent(), 'query'
    try:
        al_patch.load_weights(state, link)
    except ValueError as error:
        words = str(error).replace(link, checkpoint).partition(': go on with')[0]
        raise ValueError(f'{words}: give the config that it was trained with') from None
    return state


def start_quietly(cfg: mmengine.Config):
    """The runner of a config, which does not say what the environment and the config are; of one of ``torchrun``'s
    processes or, without it, of this one."""
    level, cfg.log_level = cfg.get('log_level', 'INFO'), 'WARNING'
    runner = importlib.import_module('al_train').start(
        cfg, 'pytorch' if 'TORCHELASTIC_RUN_ID' in os.environ else 'none')
    runner.cfg.log_level = level
    for each in (runner.logger, *runner.logger.handlers):
        each.setLevel(level)
    return runner


def last_words(text: str) -> str:
    """What a command has to say; of ``torchrun``'s processes, which end with it, the first says it."""
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        print(text * al_patch.is_main_process(), end='\n' * al_patch.is_main_process())
        importlib.import_module('al_train').end_processes()
    return text


def folder_dataset(leaf: dict, folder: str, listed: str) -> dict:
    """The config of a data set of all images below a folder, with classes and pipeline as another's.

    Args:
        leaf: The config of the other.
        listed: A file to list the images in. Their names are as the other's if they end as its do.

    Raises:
        ValueError: There is no image.
    """
    files = image_files(folder)
    if not files:
        raise ValueError(f'--images should be a folder of images, but {folder} holds none')
    leaf, suffix = listing(leaf)
    suffix = suffix if all(file.endswith(suffix) for file in files) else ''
    if al_patch.is_main_process():
        al_patch.write_atomically(listed, ''.join(f'{file[:len(file) - len(suffix)]}\n' for file in files))
    al_patch.barrier()
    return {**leaf, 'data_root': None, 'data_prefix': dict(img_path=osp.abspath(folder)), 'img_suffix': suffix,
            'ann_file': osp.abspath(listed)}


def listing(leaf: dict) -> tuple[dict, str]:
    """The config of a data set that finds its images by a list, with classes and pipeline as another's, and what its
    images' names end with: the other itself or, if it finds images in a way of its own, mmseg's plain one."""
    from mmseg.datasets import BaseSegDataset
    known = al_patch.DATASETS.build({**leaf, 'pipeline': [], 'lazy_init': True})
    if type(known).load_data_list is not BaseSegDataset.load_data_list:
        meta = {key: known.metainfo[key] for key in ('classes', 'palette') if known.metainfo.get(key)}
        leaf = dict(type='BaseSegDataset', metainfo=meta, pipeline=leaf.get('pipeline', []), seg_map_suffix='.png',
                    reduce_zero_label=getattr(known, 'reduce_zero_label', False))
    return {**leaf, 'indices': None}, getattr(known, 'img_suffix', None) or ''


def image_files(folder: str) -> list[str]:
    """The images below a folder, by their paths there."""
    paths = (osp.relpath(osp.join(where, file), folder) for where, _, files in os.walk(folder, followlinks=True)
             for file in files if osp.splitext(file)[1].lower() in IMAGES and not file.startswith('.'))
    return sorted(paths, key=lambda path: osp.join(folder, path))


IMAGES = {'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.jp2', '.npy'}


# ---------------------------------------------------------------------------------------------------------------------
# Before a run: what data, config and disk can tell without training
# ---------------------------------------------------------------------------------------------------------------------


def check_rounds(state: al_patch.State) -> None:
    """Compare what the state of a resumed run says with itself, and say what has changed since.

    Raises:
        ValueError: It names the field that does not agree.
    """
    path, pool, warn = osp.join(state.work_dir, al_patch.STATE_FILE), state.pool, state.logger.warning
    if not state.rounds:
        return
    content = al_patch.read_state(path)
    for field, should, given in disagreements(content, pool):
        raise ValueError(f'`{field}` of {path} should {should}, but has {given!r:.200}: restore a copy, or start in '
                         'another work_dir')
    check_resume(state, content)
    changed = [f'al.{key} was {value!r} and is {state.al[key]!r}' for key, value in content['settings'].items()
               if key in state.al and value != state.al[key]]
    if changed:
        warn(f'Settings have changed since the run last started: {"; ".join(changed)}')
    joined, left = {*pool.names}.difference(content['pool']), [name for name in content['pool']
                                                               if name not in pool.where]
    if joined:
        state.logger.info(f'{len(joined)} new images have joined the pool, which has {len(pool)} now')
    if left:
        warn(f'{len(left)} images have left the data set: {in_short(left)}. The run goes on without them')


def check_resume(state: al_patch.State, content: dict) -> None:
    """Refuse to rewrite what rounds have used, and to go on with other images, classes or masks.

    Args:
        content: The state as it was saved.

    Raises:
        ValueError: It names the setting and the round that used it, or what does not agree.
    """
    path, rounds, settings = osp.join(state.work_dir, al_patch.STATE_FILE), state.rounds, content['settings']
    with al_patch.reading(path):
        began = al_patch.parse_settings({
            key: settings[key] for key in state.al if key in settings and key != 'strategy'})
    for k in range(len(rounds)):
        begun = k < state.round or state.phase == 'query' or al_patch.resumable_checkpoint(state.folder())
        was, now = (dict(rounds=min(k, al.rounds), pool=al.pool, unit=al.unit, initial=al.initial, seed=al.seed,
                         oracle=al.oracle.type, budget=[0, *al_patch.budgets(al)][k:k + 1],
                         overrides=begun and (al.overrides or {}).get(str(k)))
                    for al in (began, state.al))
        for key in was:
            if was[key] != now[key]:
                raise ValueError(f'`al.{key}` was {was[key]!r} when round {k} used it and cannot change on resume, but '
                                 f'got {now[key]!r}')
    if state.strategy.calibration and not state.entry.get('held_out'):
        raise ValueError(f'`al.strategy` should not calibrate, for round {state.round} has begun without images to do '
                         f'so, but got {state.strategy.name!r}')
    if content.get('classes') not in (None, state.classes):  # an older version's state does not hold them
        raise ValueError(f'the data set should have the {len(content["classes"])} classes with which the run began, '
                         f'but got {len(state.classes)}, and what differs is '
                         f'{", ".join({*content["classes"]} ^ {*state.classes}) or "their order"}: go on with those, '
                         'or start in another work_dir with `al.initial` = a split file of what is labelled')
    gone = [name for entry in rounds for names in (entry['asked'], entry.get('held_out') or ()) for name in names
            if name not in state.pool.where and name not in state.dropped]
    if gone:
        raise ValueError(f'{len(gone)} images that were asked for are not in the data set any more: '
                         f'{", ".join(gone[:5])} (`rounds` of {path}). Bring them back, or take them out of the run: '
                         f'python al_label.py drop {shlex.join([state.work_dir, *gone[:5]])}')
    now = state.spent()
    wrong = [key for key, value in state.entry['spent'].items() if '% of' not in key and now.get(key, value) != value]
    if wrong:
        raise ValueError(f'`rounds[{state.round}].spent` of {path} should be {now}, the sum over the rounds, but is '
                         f'{state.entry["spent"]}: restore a copy')


def disagreements(content: dict, pool: al_patch.Pool) -> Iterator[tuple[str, str, Any]]:
    """What a state says that cannot be, by its own settings: the field, what it should be, and what it has."""
    names, is_partly, phase, whole, labelled = (
        content['pool'], content['pixels'] is not None, content['phase'], set(), set())
    is_human = al_patch.split_setting(content['settings'].get('oracle', 'simulated'))[0] == 'human'
    twice = [name for name, n in collections.Counter(names).items() if n > 1]
    if twice:
        yield 'pool', 'name each image once', twice[0]
    if names and content['images'] != len(names):  # the oldest have no names
        yield 'images', f'be {len(names)}, how many `pool` has', content['images']
    if phase == 'label' and not is_human:
        yield 'phase', "be 'train' or 'query' where nobody is asked", phase
    for k, entry in enumerate(content['rounds']):
        where, asked, held_out = f'rounds[{k}]', entry['asked'], entry.get('held_out', [])
        for name, units in asked.items():
            if name in whole or units and not is_partly:
                yield f'{where}.asked', 'name images that are not labelled yet, whole ones with null', {name: units}
        whole.update(name for name, units in asked.items() if units is None)
        labelled.update(asked)
        for name, ids in entry.get('ids', {}).items():
            n, pixels = asked.get(name) or (0, 0)
            if not n == len({*ids}) == len(ids) or max(ids) >= math.prod(pool.sizes.get(name, (math.inf, ))):
                yield f'{where}.ids', 'have units that were asked for, each once', {name: ids}
        if len({*held_out}) < len(held_out) or {*held_out} - labelled:
            yield f'{where}.held_out', 'name labelled images, each once', held_out
        if (k < len(content['rounds']) - 1 or phase == 'query') and 'last' not in entry['checkpoints']:
            yield f'{where}.checkpoints', 'have a `last`', entry['checkpoints']
        for key in ('pixels', 'void_pixels') if is_partly else ():
            if key not in entry:
                yield f'{where}.{key}', 'be a count', 'nothing'
        if is_partly and {*asked} <= {*pool.sizes}:
            pixels = sum(math.prod(pool.sizes[name]) if units is None else units[1] for name, units in asked.items())
            if not entry['void_pixels'] <= entry['pixels'] == pixels:
                yield f'{where}.pixels', f'be {pixels}, the sum of `asked`, with fewer `void_pixels`', entry['pixels']


def check_masks(state: al_patch.State) -> None:
    """Compare the masks of all that is labelled with what was asked for.

    Raises:
        ValueError: On every rank; it names those that are missing or damaged, or do not agree.
    """

    def check(name: str) -> None:
        path, size = state.mask_path(state.labelled()[name], name), state.pool.sizes[name]
        mask, pixels = al_patch.read_mask(path), sum(entry['asked'].get(name, (0, 0))[1] for entry in state.rounds)
        if mask.shape != size or mask.sum() != pixels:
            raise ValueError(f'the mask {path} should show the {pixels} pixels of {size} that {al_patch.STATE_FILE} '
                             f'has in `asked`, but shows {mask.sum()} of {mask.shape}: restore both from one copy')

    now = state.round if state.phase == 'label' else None  # people's answers may shrink what is asked for just now
    al_patch.on_all_ranks(check, [name for name, k in state.labelled().items()
                                  if k not in (None, now) and name in state.pool.where])


def check_amounts(state: al_patch.State) -> None:
    """
    Raises:
        ValueError: More whole images are to be asked for than there are.
    """
    al, total = state.al, len(state.pool)
    if state.counts_pixels or state.rounds:
        return
    is_amount = not isinstance(al.initial, (str, list))
    n = al_patch.number_of(al.initial, total) if is_amount else len(al_patch.initial_images(state))
    if n > total:
        raise ValueError(f'`al.initial` should be at most the {total} images there are, but got {al.initial!r}')
    worst = max((al_patch.number_of(budget, total) for budget in al_patch.budgets(al)), default=0)
    if worst > total - n:
        raise ValueError(f'`al.budget` should be at most the {total - n} images that are not in `al.initial`, but '
                         f'got {worst} ({al.budget!r})')


def check_groups(state: al_patch.State) -> None:
    """Say what ``al.group`` makes of the pool, and of the validation set.

    Raises:
        ValueError: It is no function or expression; or a cap is set without it, or where it has no effect.
    """
    al, pool = state.al, state.pool
    if not al.group and (al.max_per_group or al.frame_distance):
        raise ValueError("`al.group` should be an expression such as 'video_[0-9]+', or 'package.module:function', as "
                         '`al.max_per_group` or `al.frame_distance` is set, but got None')
    if not al.group:
        return
    if al.per_image:
        raise ValueError('`al.group` should be None where `al.per_image` spends the budget in every image by itself, '
                         f'but got {al.group!r}')
    try:
        group_of = al_patch.grouping(al.group)
        groups = collections.Counter(group_of(name)[0] for name in pool.names)
    except Exception as error:
        raise ValueError(f"`al.group` should be a regular expression, or 'package.module:function' of an image's name, "
                         f'but got {al.group!r} ({type(error).__name__}: {error})') from error
    sizes = sorted(groups.values())
    state.logger.info(f'`al.group` makes {len(groups)} groups of the {len(pool)} images of the pool, of {sizes[0]} to '
                      f'{sizes[-1]}, e.g. {in_short([*groups][:3])}')
    if sizes[-1] == 1:
        state.logger.warning(f'`al.group` = {al.group!r} makes every image of the pool a group of its own, so '
                             'that caps on groups come to nothing: it should match what images of a group share')
    images = validation_set(state.runner)
    if images:
        names = [al_patch.image_name(images, images.get_data_info(i)) for i in range(len(images))]
        both = [group for group in dict.fromkeys(group_of(name)[0] for name in names) if group in groups]
        if both:
            state.logger.warning(f'{len(both)} groups are in both pool and validation set, whose figures are then too '
                                 f'good: {in_short(both)}. Keep each of them in one of the two')


def check_overrides(state: al_patch.State) -> None:
    """
    Raises:
        ValueError: An override is of a round that never comes, of no key of the config, or does not fit there.
    """
    al, cfg = state.al, state.runner.cfg
    read = re.findall(r"cfg\.get\(\s*'(\w+)'", inspect.getsource(mmengine.runner.Runner))  # keys that need not be there
    known = {*cfg, *read, *inspect.signature(mmengine.runner.Runner).parameters} - {'al', 'work_dir', 'resume'}
    for k, override in (al.overrides or {}).items():
        if int(k) > al.rounds:
            raise ValueError(f'`al.overrides` should name rounds from 0 to {al.rounds}, but got {k}')
        for key in override:
            if key.split('.')[0] not in known:
                raise ValueError(f'`al.overrides[{k}]` should hold keys of the config but `al`, `work_dir` and '
                                 f"`resume`, e.g. 'train_cfg.max_iters', but got {key!r}")
        try:
            copy.deepcopy(cfg).merge_from_dict(override)
        except Exception as error:
            raise ValueError(f'`al.overrides[{k}]` should fit the config, but got {override} ({error})') from error


def check_schedule(state: al_patch.State) -> None:
    """
    Raises:
        ValueError: A round cannot train, or its weights are not to be found.
    """
    for k, override in {None: {}, **(state.al.overrides or {})}.items():
        cfg, where = copy.deepcopy(state.runner.cfg), '' if k is None else f'`al.overrides[{k}]`: '
        cfg.merge_from_dict(override)
        for key in ('max_iters', 'max_epochs'):
            if (length := cfg.train_cfg.get(key, 1)) is not None and not al_patch.is_int(length, 1):
                raise ValueError(f'{where}`train_cfg.{key}` should be a positive int, but got {length!r}')
        loader = cfg.train_dataloader
        if loader.get('drop_last') and 'Infinite' not in str(loader.get('sampler')) and al_patch.is_int(
                size := loader.get('batch_size'), 1 + (at_most := images_by(state, int(k or 0)))):
            raise ValueError(f'{where}`train_dataloader.batch_size` should be at most the {at_most} labelled '
                             f'images, or drop_last=False, but got {size}: there is no batch to train with')
        with al_patch.reading(f'{where}`optim_wrapper` = {cfg.optim_wrapper}'):
            state.runner.build_optim_wrapper(copy.deepcopy(cfg.optim_wrapper))
        path = cfg.get('load_from')
        if path and '://' not in path and not osp.isfile(osp.expanduser(path)):
            raise FileNotFoundError(f'{where}`load_from` should be a checkpoint, but there is no file {path!r}')
    if state.counts_pixels:
        check_losses(state.model)
    hooks = al_patch.checkpoint_hooks(state.runner)
    if not any(hook.save_last for hook in hooks):
        raise ValueError('`default_hooks.checkpoint` should be a CheckpointHook with save_last=True (its default): '
                         "a round's weights have to be on disk to score the pool and to resume")
    for hook in hooks:
        if hook.out_dir:
            raise ValueError("`default_hooks.checkpoint.out_dir` should be None: a round's checkpoints lie in its own "
                             f'folder, but got {hook.out_dir!r}; choose another --work-dir, or make it a link')


def check_continue(state: al_patch.State) -> None:
    """
    Raises:
        ValueError: No round can go on where the last one ended, or an override would not count there.
        RuntimeError: Nor with this torch.
    """
    begin, loop = 0, mmengine.runner.IterBasedTrainLoop
    if state.al.weights != 'continue':
        return
    for k in (None, *(state.al.overrides or ())):
        override = {} if k is None else al_patch.override_of(state, int(k))
        cfg, where = copy.deepcopy(state.runner.cfg), '' if k is None else f'`al.overrides[{k}]`: '
        cfg.merge_from_dict(override)
        kind = cfg.train_cfg.get('type', loop)
        kind = mmengine.registry.LOOPS.get(kind) if isinstance(kind, str) else kind
        if 'max_iters' not in cfg.train_cfg or not issubclass(kind, loop):
            raise ValueError(f"{where}`train_cfg` should be of an IterBasedTrainLoop with `al.weights='continue'`, but "
                             f'got {cfg.train_cfg.to_dict()}')
        for key in override:
            if key.split('.')[0] in ('optim_wrapper', 'param_scheduler'):
                raise ValueError(f"{where}`{key}` should be left out with `al.weights='continue'`, by which a round "
                                 'goes on with optimizer and schedules of the last one')
    for k in range(state.al.rounds + 1):
        begin = al_patch.end_of(state, k, begin)
    probe = type('', (list, ), dict(__getitems__=lambda self, indices: ['asked']))([0])
    if next(iter(torch.utils.data.DataLoader(probe, collate_fn=list))) != ['asked']:
        raise RuntimeError("`al.weights='continue'` needs a DataLoader that calls Dataset.__getitems__ (torch >= 2.0), "
                           f'but got torch {torch.__version__}: update it, or choose other `al.weights`')


def images_by(state: al_patch.State, k: int) -> int:
    """How many images can be labelled when round ``k`` begins."""
    total, began = len(state.pool), max(0, state.round)
    if state.counts_pixels:
        return total
    n = len(state.labelled()) if state.rounds else len(al_patch.initial_images(state))
    return min(total, n + sum(al_patch.number_of(budget, total) for budget in al_patch.budgets(state.al)[began:k]))


def check_best(state: al_patch.State) -> None:
    """
    Raises:
        ValueError: The run asks for a best checkpoint or a stopping rule where nothing is validated.
    """
    al, cfg, hooks = state.al, state.runner.cfg, al_patch.checkpoint_hooks(state.runner)
    validates = cfg.get('val_cfg') is not None and cfg.train_cfg.get('val_begin', 1) <= (
        cfg.train_cfg.get('max_iters') or cfg.train_cfg.get('max_epochs') or math.inf)
    for key in ('weights', 'query_with'):
        if al[key] == 'best' and not (validates and any(hook.save_best for hook in hooks)):
            raise ValueError(f"`al.{key}='best'` needs validation (`val_cfg`, and a `train_cfg.val_begin` that is "
                             "reached) and `default_hooks.checkpoint.save_best`, e.g. save_best='mIoU'")
    if al.stop and not validates:
        raise ValueError('`al.stop` needs a validation metric, but the config has no `val_cfg`, or training ends '
                         'before its `train_cfg.val_begin`')


def check_committee(state: al_patch.State) -> None:
    """
    Raises:
        ValueError: A round keeps fewer checkpoints than are to pass over images.
    """
    number, train_cfg = state.strategy.committee, state.runner.cfg.train_cfg
    length = train_cfg.get('max_iters') or train_cfg.get('max_epochs')
    if number > 1 and not any((hook.max_keep_ckpts < 0 or hook.max_keep_ckpts >= number) and
                              0 < hook.interval <= length / number for hook in al_patch.checkpoint_hooks(state.runner)):
        raise ValueError(f'`al.strategy.committee` = {number} needs so many checkpoints of each round: set '
                         f'`default_hooks.checkpoint.interval` to {length // number} or less, and `.max_keep_ckpts` to '
                         f'{number} or -1')


def check_no_label(state: al_patch.State) -> None:
    """Compare what else stands for "no label" with what the loss ignores, which decides. Whole images train as in stock
    mmseg, with a warning.

    Raises:
        ValueError: Below image level, what nobody has labelled would be trained on. It names the key to set.
    """
    void, loop, parts = state.pool.ignore_index, state.runner.val_loop, [state.runner.cfg.train_dataloader.dataset]
    for part in parts:  # which grow: data sets under wrappers, their transforms, and those that a transform holds
        parts += filter(None, [
            *getattr(part, 'datasets', []), getattr(part, 'dataset', None), *getattr(part, 'transforms', []),
            *mmengine.dataset.Compose(copy.deepcopy(getattr(part, 'pipeline', []))).transforms])
    for part in [*parts, *state.model.modules(), *(loop.evaluator.metrics if loop else [])]:
        pads = getattr(part, 'pad_val', None)
        is_pad = isinstance(pads, dict)  # mmcv's Pad; elsewhere it is the image's
        for key in ('ignore_index', 'pad_val' if is_pad else 'seg_pad_val'):
            value = pads.get('seg', 255) if key == 'pad_val' else getattr(part, key, void)
            trains = state.counts_pixels and (key != 'ignore_index' or hasattr(part, 'loss_decode'))
            if value != void or trains and not 0 <= void < 256:
                name = part['type'] if isinstance(part, dict) else type(part).__name__
                text = (f'`{key}` of {name} should be {void} (and that from 0 to 255), what the loss ignores by '
                        f'`model.decode_head.ignore_index`, but got {value}')
                if trains:
                    raise ValueError(f'{text}: what nobody has labelled would be trained on')
                state.logger.warning(text)


def check_pool(state: al_patch.State) -> None:
    """Look at every image of the pool once, by its header where that tells what is loaded, for its size. No label is
    opened. ``state.seen_files`` is for ``sizes.json``, where the next start finds it.

    Raises:
        ValueError: An image cannot be read, or the model does not take images of their sizes in one batch.
    """
    begin, pool, known, path = time.time(), state.pool, {}, osp.join(state.work_dir, 'sizes.json')
    loader = repr(pool.leaves[0].pipeline.transforms[0])
    with contextlib.suppress(OSError, ValueError, TypeError), open(path) as file:
        known = dict(json.load(file))

    def look(name: str) -> list:
        file, seen = al_patch.image_path(pool.info(name)), known.get(name, [])
        stamp = [osp.getsize(file) if osp.isfile(file) else begin, loader]
        return seen if seen[:2] == stamp else [*stamp, *size_of(pool, name)]

    seen = al_patch.on_all_ranks(look, pool.names, 'Pool')
    pool.sizes = {name: tuple(size) for name, (_, _, *size) in seen.items()}
    loader = al_patch.scoring_loader(state.runner.cfg)
    check_batches(state, 'test_dataloader', pool, pool.sizes, loader.get('batch_size', 1))
    state.logger.info(f'Looked at the {len(pool)} images of the pool in {time.time() - begin:.1f} s')
    state.seen_files = seen


def size_of(pool: al_patch.Pool, name: str) -> tuple[int, int]:
    """(H, W) of an image as its pipeline loads it, by the file's header where that is certain to say it."""
    from mmcv.transforms import LoadImageFromFile
    step = pool.leaf_of(name)[0].pipeline.transforms[0]
    is_stock = type(step) is LoadImageFromFile and vars(step) == vars(LoadImageFromFile())
    return is_stock and header_size(al_patch.image_path(pool.info(name))) or pool.load_image(name).shape[:2]


def header_size(path: str) -> tuple[int, int] | None:
    """(H, W) by an image file's header; None where a loader may make something else of the file."""
    with contextlib.suppress(Exception), al_patch.Image.open(path) as image:
        kind = image.format
        if kind in ('JPEG', 'BMP') and image.getexif().get(0x112, 1) == 1 or (
                kind == 'PNG' and b'eXIf' not in mmengine.fileio.get(path)):  # Pillow would decode it for that
            return image.size[::-1]
    return None


def check_validation(state: al_patch.State) -> None:
    """Look at every image of the validation set once, by its header where that will do.

    Raises:
        ValueError: There is none, one cannot be read or has a label map of another size; or the model does not take
            them in one batch.
    """
    al, labelled = state.al, []
    with al_patch.reading('the validation set, `val_dataloader.dataset`, which should have an image at least,'):
        images, loop = validation_set(state.runner), state.runner.val_loop
        if images is None:
            return
        metrics = loop.evaluator.metrics
        numbers = range(len(images))
        numbers[0]
    voids = [getattr(each, 'ignore_index', 255) for each in (state.pool, *metrics)]

    def look(i: int) -> tuple:
        info = images.get_data_info(i)
        image, label = al_patch.image_path(info), info.get('seg_map_path')
        size, values = header_size(image), []
        if not (labelled and size and size == header_size(label) and is_grey(label)):
            with al_patch.reading(f'{image} or its label map {label}'):
                sample = images[i]['data_samples']
                if not hasattr(sample, 'gt_sem_seg'):  # it is validated by something else
                    labelled.append(i)
                    return size, True, []
                size, label = sample.ori_shape, sample.gt_sem_seg.data.squeeze(0)
                if label.shape != size:
                    raise ValueError(f'its size should be that of its image, {size}, but is {tuple(label.shape)}'
                                     f'{": a colour picture, or several maps in one?" * (label.ndim > 2)}')
                values = [value for value in label.unique().tolist() if value not in voids]
                labelled.extend(value for value in values if value < (state.class_count or math.inf))
        return size, bool(labelled), values[:5]

    seen = al_patch.on_all_ranks(look, numbers, 'Validation set')
    check_batches(state, 'val_dataloader', images, {i: seen[i][0] for i in numbers}, loop.dataloader.batch_size)
    if not any(shown for _, shown, _ in seen.values()):
        values = sorted({value for _, _, values in seen.values() for value in values})
        text = (f'no pixel of `val_dataloader.dataset` has a label of a class, below {state.class_count}, but void or '
                f'{", ".join(map(str, values[:5])) or "nothing"}, so that its metrics are nan')
        if al.stop or 'best' in (al.weights, al.query_with):
            raise ValueError(f'{text}: there is no `best` checkpoint, and no end for `al.stop`')
        state.logger.warning(text)


def validation_set(runner):
    """The data set that a runner validates on; None where it has none of images that know their files."""
    images = getattr(getattr(runner.val_loop, 'dataloader', None), 'dataset', None)
    return images if hasattr(images, 'get_data_info') else None


def is_grey(path: str) -> bool:
    """Whether a label file has one number a pixel, by its header."""
    with al_patch.Image.open(path) as image:
        return len(image.getbands()) == 1


def check_batches(state: al_patch.State, key: str, dataset, sizes: dict, n: int) -> None:
    """Put neighbours whose sizes differ into one batch, if a batch holds more than one image.

    Args:
        sizes: Item of the data set -> (H, W) as it is loaded.
        n: Images in a batch.

    Raises:
        ValueError: The pipeline leaves their sizes different, and the model does not take that.
    """
    pairs = {(sizes[one], sizes[other]): (one, other) for one, other in itertools.pairwise(sizes)
             if sizes[one] != sizes[other]}
    for pair in pairs.values() if n != 1 else ():
        batch = [dataset[item] for item in pair]
        paths = ' and '.join(al_patch.image_path(each['data_samples'].metainfo) for each in batch)
        with al_patch.reading(f'a batch of {paths} (set `{key}.batch_size=1`)'):
            state.model.data_preprocessor(mmengine.dataset.pseudo_collate(batch), False)


def check_model(state: al_patch.State) -> None:
    """
    Raises:
        ValueError: The model cannot serve the strategy: it gives no logits or features, or has no dropout layer.
    """
    model, strategy = al_patch.segmentor(state.model), state.strategy
    if strategy.needs_model and not hasattr(model, 'inference'):
        raise ValueError('`model` should be a segmentor of mmseg, whose `inference` returns logits, for all that '
                         f"`al.strategy` can be but 'random', but got {type(model).__name__}")
    if strategy.mc > 1 and not al_patch.dropouts_of(model):
        head = type(al_patch.decode_head(model)).__name__
        raise ValueError(f'`al.strategy.mc` should be 1 for a {head} and a backbone without dropout (or set '
                         f'`model.decode_head.dropout_ratio`), but got {strategy.mc}')
    if strategy.embeds_features:
        al_patch.feature_module(model, strategy.features_from)


def check_wrappers(state: al_patch.State) -> None:
    """Ask wrappers of data sets that are not mmengine's or mmseg's which images they hand on, without their pixels.

    Raises:
        ValueError: One hands on a part of its data set alone, as the fold of a cross-validation does.
    """
    dataset, reached, kinds = state.runner.cfg.train_dataloader.dataset, set(), []

    def find(config: dict) -> None:
        for inner in [*config.get('datasets', ()), *filter(None, [config.get('dataset')])]:
            with al_patch.DATASETS.switch_scope_and_registry(None) as registry:
                kind = registry.get(config['type']) if isinstance(config['type'], str) else config['type']
            kinds.extend([kind] * (not kind.__module__.startswith(('mmengine.', 'mmseg.'))))
            find(inner)

    def probe(config: dict, path: str) -> dict:

        def build_leaf(**more):
            leaf = al_patch.DATASETS.build({**copy.deepcopy(config), **more, 'pipeline': []})
            leaf.full_init()
            known, pack = leaf.get_data_info, mmengine.registry.TRANSFORMS.build(dict(type='PackSegInputs'))

            def get_data_info(i: int) -> dict:
                info = known(i)
                info.pop('seg_map_path', None)
                reached.add(al_patch.image_name(leaf, info))
                return info

            leaf.get_data_info, leaf.pipeline = get_data_info, pack
            return leaf

        return dict(type=build_leaf)

    find(dataset)
    if not kinds:
        return
    names = ' in '.join(kind.__name__ for kind in kinds)
    try:
        with al_patch.undisturbed():
            whole = al_patch.DATASETS.build(al_patch.map_leaves(dataset, probe))
            for i in range(len(whole)):
                whole[i]
    except Exception as error:  # it wants pixels or labels
        state.logger.info(f'Whether {names} hands on all images of its data set is not known ({error})')
        return
    kept_back = {*state.pool.names} - reached
    if kept_back:
        raise ValueError(f'`train_dataloader.dataset` should train on all its images, but {names} keeps back '
                         f'{len(kept_back)} of {len(state.pool)}, such as {min(kept_back)!r}, whose labels would be '
                         'asked for in vain: choose images by `ann_file` or `indices` of the data set in it')


def check_disk(state: al_patch.State) -> None:
    """Compare what the rounds to come will write with what is free: their checkpoints and, at a hundredth of a byte a
    pixel, masks and superpixels. An optimizer keeps as much as the weights take, Adam twice.

    Raises:
        OSError: It does not fit.
    """
    al, cfg, copies = state.al, state.runner.cfg, 0
    free = al_patch.all_gather_object(shutil.disk_usage(state.work_dir).free)[0]  # as rank 0 sees it
    for hook in al_patch.checkpoint_hooks(state.runner):
        saved = cfg.train_cfg.get('max_epochs' if hook.by_epoch else 'max_iters', 1) // hook.interval
        saved = saved // (al.rounds + 1) + 1 if al.weights == 'continue' else saved
        saved = max(1, min(saved, hook.max_keep_ckpts % 2**31))  # -1 of both: the last, and all
        copies += saved * (1 + hook.save_optimizer * (1 + ('Adam' in str(cfg.optim_wrapper))))
        copies += len(hook.save_best or ())
    left = al.rounds + 1 - sum('metrics' in entry for entry in state.rounds)
    need = copies * sum(weight.nbytes for weight in state.model.state_dict().values())
    need *= left if al.keep == 'all' else min(2, left)
    if state.counts_pixels:
        need += left * state.pool.pixels // 100
    if need > free:
        raise OSError(
            f'{state.work_dir} should have {need / 1e9:.2f} GB free for {left} rounds with {copies} times the weights '
            f'each, but has {free / 1e9:.2f}: lower `default_hooks.checkpoint.max_keep_ckpts`, set '
            "`al.keep='needed'`, or choose another --work-dir")


def check_segments(state: al_patch.State) -> None:
    """Look at superpixels of the user's own, or make those that the rehearsal needs.

    Raises:
        ValueError: Some are missing, cannot be read, or are not of their image's size.
    """
    if state.al.unit.type == 'superpixel':
        look_at_segments(state, state.pool.names if state.al.unit.folder else state.pool.names[:2])


def make_segments(state: al_patch.State) -> None:
    """Make the superpixels of all images that have none yet, or look at those that a stopped run has left, and name the
    images that have too few of them.

    Raises:
        ValueError: Some cannot be made or read.
    """
    if state.al.unit.type != 'superpixel' or state.al.unit.folder:
        return
    begin, asked = time.time(), state.al.unit.n_segments
    few = [name for name, number in look_at_segments(state, state.pool.names).items() if number < asked / 2]
    state.logger.info(f'Superpixels of {len(state.pool)} images in {time.time() - begin:.1f} s')
    if few:
        state.logger.warning(f'{len(few)} images have less than half of the superpixels that `al.unit.n_segments` = '
                             f'{asked} asks for: {", ".join(few)}')


def look_at_segments(state: al_patch.State, names: list[str]) -> dict[str, int]:
    """How many superpixels each image has. They are read, or made, by the workers of the test dataloader; every rank
    does its share.

    Raises:
        ValueError: On every rank, if some cannot be.
    """
    rank, world_size = al_patch.get_dist_info()
    mine, workers = names[rank::world_size], al_patch.scoring_loader(state.runner.cfg).get('num_workers', 0)
    state.pool.sizes  # noqa: B018  (looked at here, once, and not in each worker)
    numbers = torch.utils.data.DataLoader(Segmented(state), None, sampler=mine, num_workers=workers)
    looks = al_patch.watched(state, 'superpixels', iter(numbers), len(mine))
    found = {name: number for number, name in zip(looks, mine)}  # to the end of `looks`, where it logs

    def number_of(name: str) -> int:
        if isinstance(found[name], Exception):
            raise found[name]
        return found[name]

    return al_patch.on_all_ranks(number_of, names)


class Segmented:
    """The number of segments of each image, by name, or the error that came of it. It stands in for the state, which
    no worker needs."""

    def __init__(self, state: al_patch.State):
        self.pool, self.work_dir, self.of = state.pool, state.work_dir, state.unit.of

    def __getitem__(self, name: str) -> int | Exception:
        try:
            return int(np.count_nonzero(self.of(self, name).pixels))
        except Exception as error:
            return error


# ---------------------------------------------------------------------------------------------------------------------
# The rehearsal: a round in miniature
# ---------------------------------------------------------------------------------------------------------------------


def rehearse(state: al_patch.State) -> None:
    """Query two images of the pool, validate one, and build each round that has overrides, with the run's own code and
    its model as it begins, on every rank. No label is looked at but of the validation set, and nothing of it stays.

    Raises:
        ValueError: What fails, and on what.
    """
    begin, was = time.time(), {module: module.training for module in state.model.modules()}
    what = []
    for part in (rehearse_query, rehearse_checkpoint, rehearse_validation, rehearse_overrides):
        with al_patch.undisturbed(), torch.no_grad():
            what.append(as_one(part, state))
    for module, is_training in was.items():
        module.training = is_training
    state.logger.info(f'Rehearsed {", ".join(filter(None, what)) or "nothing"} in {time.time() - begin:.1f} s')


def as_one(function: Callable, *args):
    """What a function makes of something, on each rank.

    Raises:
        ValueError: On all of them, if it fails on one.
    """
    failed = made = None
    try:
        made = function(*args)
    except ValueError as error:
        failed = error
    for text in filter(None, al_patch.all_gather_object(failed and str(failed))):
        raise failed or ValueError(text)
    return made


@contextlib.contextmanager
def rehearsing(what: str):
    """Let an error say in what part it happened."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith('`') or ' cannot be used (' in str(error):
            raise
        raise ValueError(f'{what} fails: {" ".join(str(error).split())}') from error
    except Exception as error:
        raise ValueError(f'{what} fails ({type(error).__name__}: {" ".join(str(error).split())}; AL_TRACEBACK=1 shows '
                         'where)') from error


def rehearse_query(state: al_patch.State) -> str | None:
    """Load, inference, scores, vectors, units, choice and masks of two images, as if nothing were labelled."""
    strategy, few = state.strategy, copy.copy(state)
    if not strategy.needs_model or max(0, state.round) >= state.al.rounds:
        return None
    few.pool, few.rounds, few._labelled, few.dropped = copy.copy(state.pool), [dict(asked={})], {}, []
    few.pool.names = state.pool.names[:2]
    few.pool.pixels = sum(math.prod(state.pool.sizes[name]) for name in few.pool.names)
    query, network = al_patch.Query(few, state.runner), al_patch.Network(
        state.runner, strategy, state.al.logits)
    if isinstance(query.amount, int) and not state.al.per_image:  # it is of the whole pool
        query.amount = min(query.amount, 2)
    for name in few.pool.names:
        path = al_patch.image_path(few.pool.info(name))
        with rehearsing(f'a query of {path}'):
            data = mmengine.dataset.pseudo_collate([few.pool[name]])
            with al_patch.precision(state.runner):
                [seen] = network.see(data, [0], query.views)
            maps = [*(mean['probs_NCHW'] for mean in seen.means), seen.features]
            if strategy.calibration:
                few.thresholds = dict(thresholds_C=torch.full_like(maps[0][0, :, 0, 0], .5))
            if not all(each.isfinite().all() for each in maps if each is not None):
                state.logger.warning(f'The model, as it begins, gives no finite numbers for {path}: are its '
                                     '`load_from` and `data_preprocessor` right?')
                return None
            query.collector.add(name, *query.candidates(name, seen))
    check_memory(query.collector, len(state.pool), state)
    with rehearsing('the choice of a query'):
        chosen = query.collector.chosen(query.collector.parts, query.collector.known)
        for i in np.unique(chosen.image):
            few.mask_of(few.pool.names[i], chosen.id[chosen.image == i] if state.counts_pixels else None)
    return f'a query of {len(few.pool.names)} images'


def check_memory(collector: al_patch.Collector, images: int, state: al_patch.State) -> None:
    """
    Raises:
        ValueError: The candidates of all images would take more than there is, by those of a few.
    """
    few = max(1, len(collector.seen))
    rows = sum(len(part.id) for part in collector.parts) * images / few
    size = sum(column.nbytes for part in collector.parts for column in part if column is not None) * images / few
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    if not state.unit.kind.is_dense:  # vectors may lie on disk
        memory += shutil.disk_usage(state.work_dir).free
    if size > memory and not collector.keeps_chosen:
        raise ValueError(f'a query by {state.strategy.name} should have `al.per_image=True` or `al.strategy.shortlist` '
                         f'for {images} images at `al.unit={state.unit.setting["type"]!r}`: {rows:,.0f} candidates at '
                         f'once take {size / 2**30:,.0f} GiB, and there are {memory / 2**30:,.0f}')


def rehearse_checkpoint(state: al_patch.State) -> str | None:
    """A checkpoint in memory, and back into the same model after other weights were put in.

    Raises:
        ValueError: The model then gives other class probabilities, so that the pool would be scored by another one than
            was trained.
    """
    model, name, network = state.model, state.pool.names[0], al_patch.Network(
        state.runner, logits_of=state.al.logits)
    if not state.strategy.needs_model or max(0, state.round) >= state.al.rounds:
        return None
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {key: value.detach().cpu().clone() for key, value in everything.items()}
    missing = [key for key, _ in model.named_parameters() if key not in model.state_dict()]

    def begin() -> None:
        """Where a checkpoint is a part of the model, the rest is what a resumed run builds."""
        if missing:
            built = mmengine.registry.MODELS.build(copy.deepcopy(state.runner.cfg.model))
            getattr(built, 'init_weights', lambda: None)()
            for key, value in built.named_parameters():
                if key in missing:
                    everything[key].data.copy_(value)

    def probabilities() -> torch.Tensor:
        mmengine.runner.set_random_seed(0)
        with al_patch.precision(state.runner):
            [seen] = network.see(mmengine.dataset.pseudo_collate([state.pool[name]]), [0], [al_patch.as_it_is])
        return seen.means[0]['probs_NCHW']

    with rehearsing('a checkpoint, saved and loaded again,'):
        begin()
        before, again, saved = probabilities(), probabilities(), copy.copy(model.state_dict())
        saved.update({key: value.detach().clone() for key, value in saved.items() if torch.is_tensor(value)})
        for key, value in everything.items():
            if value.is_floating_point() and key in saved:
                value.data.normal_()
        begin()
        mmengine.runner.checkpoint.load_state_dict(model, saved, logger=logging.getLogger('silent'))
        after = probabilities()
    for key, value in own.items():
        everything[key].data.copy_(value)
    if torch.equal(before, again) and not torch.allclose(before, after, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(f'a checkpoint of {type(model).__name__} should bring back the model that was saved, but it '
                         f'gives other class probabilities: {in_short(missing) or "something"} is neither in its '
                         '`state_dict` nor the same whenever it is built and `init_weights` was called')
    return 'a checkpoint'


def rehearse_validation(state: al_patch.State, runner=None) -> str | None:
    """One image of the validation set, through model and metrics.

    Raises:
        ValueError: The metrics lack one that ``al.stop`` or a checkpoint's ``save_best`` names.
    """
    runner = runner or state.runner
    loop, images, model = runner.val_loop, validation_set(runner), al_patch.unwrap(runner.model)
    if images is None:
        return None
    path = al_patch.image_path(images.get_data_info(0))
    model.train(False)
    with rehearsing(f'the validation of {path}'):
        evaluator = runner.build_evaluator(copy.deepcopy(runner.cfg.val_evaluator))
        evaluator.dataset_meta = images.metainfo
        data = mmengine.dataset.pseudo_collate([images[0]])
        with al_patch.autocast(enabled=getattr(loop, 'fp16', False)):
            outputs = model.val_step(data)
            evaluator.process(data_samples=outputs, data_batch=data)
        silent = al_patch.attribute(mmengine.logging.MMLogger, 'callHandlers', lambda *_: None)  # a table of one image
        with silent, warnings.catch_warnings(), np.errstate(all='ignore'):
            warnings.simplefilter('ignore')  # means of no class
            try:
                metrics = evaluator.evaluate(1)
            except Exception:  # it may want as many as there are
                for _ in range(len(images)):
                    evaluator.process(data_samples=outputs, data_batch=data)
                metrics = evaluator.evaluate(len(images))
    asked = {'al.stop.metric': [state.al.stop.metric] if state.al.stop else []}
    asked['default_hooks.checkpoint.save_best'] = sum(
        (hook.save_best or [] for hook in al_patch.checkpoint_hooks(runner)), []) if metrics else []
    asked['custom_hooks.EarlyStoppingHook.monitor'] = [hook.monitor for hook in runner.hooks if isinstance(
        hook, mmengine.hooks.EarlyStoppingHook) and hook.strict]
    schedulers = runner.cfg.get('param_scheduler') or []
    asked['param_scheduler.monitor'] = [scheduler['monitor'] for scheduler in (
        schedulers if isinstance(schedulers, list) else [schedulers]) if 'monitor' in scheduler]
    for key, names in asked.items():
        for name in names:
            if name not in ('auto', *metrics):
                raise ValueError(f'`{key}` should be one of {", ".join(metrics)}, but got {name!r}')
    return 'a validation of one'


def rehearse_overrides(state: al_patch.State) -> str | None:
    """Build each round of other overrides, its loop and its optimizer, on data of no images."""
    return f'{n} sets of overrides' if (n := sum(1 for _ in rounds_to_come(state))) else None


def rehearse_file(trainer) -> None:
    """Write a checkpoint of a round that begins, with its optimizer, schedulers and what hooks add, and read it.

    Raises:
        ValueError: It holds what is not read again, so that neither a query nor a resumed run could.
    """
    folder = [tempfile.mkdtemp() if al_patch.is_main_process() else None]
    try:
        with al_patch.undisturbed():
            trainer.save_checkpoint(
                folder[0], 'checkpoint', save_param_scheduler=trainer.param_schedulers is not None, by_epoch=False)
        if folder[0]:
            with al_patch.reading('a checkpoint of this run'):
                torch.load(osp.join(folder[0], 'checkpoint'), map_location='cpu')
    finally:
        shutil.rmtree(folder[0] or '', ignore_errors=True)


def rehearse_rounds(state: al_patch.State) -> None:
    """Train one iteration of each round to come that has other overrides, on what is labelled now, and validate one
    image with it. Nothing of it stays.

    Raises:
        ValueError: What fails, and by which overrides.
    """
    begin, n = time.time(), 0
    with al_patch.undisturbed():
        for k, trainer in rounds_to_come(state, al=al_patch.what_is_labelled(state)):
            with rehearsing(f'the round of `al.overrides[{k}]`'):
                if state.counts_pixels:
                    check_losses(trainer.model)
                    al_patch.gather_labelled_pixels(trainer.model)
                trainer.optim_wrapper.initialize_count_status(trainer.model, 0, trainer.max_iters)
                trainer.model.train()
                trainer.model.train_step(next(iter(trainer.train_dataloader)), optim_wrapper=trainer.optim_wrapper)
                with torch.no_grad():
                    rehearse_validation(state, trainer)
            n += 1
    if n:
        state.logger.info(f'Rehearsed an iteration of {n} sets of overrides in {time.time() - begin:.1f} s')


def rounds_to_come(state: al_patch.State, **loader) -> Iterator[tuple]:
    """A round and its runner for each different set of overrides of the rounds to come, with loops, optimizer and
    schedulers.

    Args:
        loader: Keys for its ``train_dataloader``; without any it has no images.
    """
    distinct = {json.dumps(override, sort_keys=True): (k, al_patch.override_of(state, int(k)))
                for k, override in (state.al.overrides or {}).items() if override and int(k) > state.round}
    for k, override in distinct.values():
        cfg = copy.deepcopy(state.runner.cfg)
        cfg.pop('al')
        cfg.merge_from_dict(override)
        for key in ('persistent_workers', 'prefetch_factor', 'timeout', 'multiprocessing_context'):  # of workers
            cfg.train_dataloader.pop(key, None)
        cfg.train_dataloader.update(loader, num_workers=0, drop_last=False)  # more images will be labelled by then
        cfg.visualizer = dict(type='Visualizer')  # without a backend that would begin a run elsewhere
        with tempfile.TemporaryDirectory() as cfg.work_dir, rehearsing(f'the round of `al.overrides[{k}]`'):
            cfg.experiment_name, cfg.log_level = f'{state.runner.experiment_name}_rehearsal_{k}', 'ERROR'
            trainer = type(state.runner).from_cfg(cfg)
            if not loader:
                trainer._train_dataloader = torch.utils.data.DataLoader([0])
            trainer.optim_wrapper = trainer.build_optim_wrapper(trainer.optim_wrapper)
            trainer._train_loop = trainer.build_train_loop(trainer._train_loop)
            trainer.param_schedulers = trainer.build_param_scheduler(trainer.param_schedulers or [])
            trainer._val_loop = trainer.val_loop  # which builds it
            yield k, trainer
            al_patch.close_round(trainer)


def leaves_under(dataset) -> Iterator:
    """The data sets with images under any wrappers."""
    parts = [part for value in vars(dataset).values() for part in (value if isinstance(value, list) else [value])
             if hasattr(part, '__getitem__') and hasattr(part, 'metainfo')]
    for part in parts:
        yield from leaves_under(part)
    if not parts and hasattr(dataset, 'get_data_info') and hasattr(dataset, 'pipeline') and len(dataset):
        yield dataset


def check_item(dataset) -> None:
    """Ask a data set whose way to an item is its own for one: does it go through what filters and hides?

    Raises:
        ValueError: It does not, so that it would train on what nobody has labelled.
    """
    stock, pipeline, asked = mmengine.dataset.BaseDataset, dataset.pipeline, []
    if not isinstance(pipeline, al_patch.SparseLabels) or all(
            getattr(type(dataset), name, None) is getattr(stock, name) for name in ('__getitem__', 'prepare_data')):
        return

    class Watched(mmengine.dataset.Compose):
        def __call__(self, results: dict) -> dict | None:
            asked.append(al_patch.image_path(results))
            return pipeline(copy.deepcopy(results))

    watched = Watched([])
    vars(watched).update(vars(pipeline))
    labelled = {al_patch.image_path(dataset.get_data_info(i)) for i in range(len(dataset))}
    with al_patch.undisturbed(), al_patch.attribute(dataset, 'pipeline', watched), rehearsing(
            f'the first item of {type(dataset).__name__}'):
        dataset[0]
    strangers = [path for path in asked if path not in labelled]
    if strangers or not asked:
        raise ValueError(f'{type(dataset).__name__}.__getitem__ should load images of its `data_list` through its '
                         '`pipeline`, as BaseDataset does: what is labelled is chosen and hidden there, but it '
                         f'{"loads " + strangers[0] if strangers else "does not ask the pipeline"}')


def check_steps(dataset, is_alone: bool) -> None:
    """Run the training pipeline on one image, step by step, and look for label maps that a later step loads from a file
    of its own: what al_patch hides is loaded with ``gt_seg_map``, by the same step.

    Args:
        is_alone: Whether no wrapper has steps of its own.

    Raises:
        ValueError: It names the step that fails, or returns nothing; or loads a map of which every pixel would be
            trained on.
    """
    pipeline, info = dataset.pipeline, dataset.get_data_info(0)
    path, mapping = al_patch.image_path(info), getattr(pipeline, 'mapping', ())
    shown = getattr(pipeline, 'shown', {}).get(path)
    results = shown.of(info) if shown else info
    with al_patch.undisturbed():
        for step in getattr(pipeline, 'transforms', ()):
            if shown and step in mapping:
                continue
            what, before = f'{type(step).__name__} of the training pipeline', results
            with al_patch.reading(f'{what}: {path} or its label map'):
                tries = (pipeline.apply(step, copy.deepcopy(before), shown) if shown else step(copy.deepcopy(before))
                         for _ in range(10))  # a crop may give up now and then
                results = next(filter(None, tries), None)
            if results is None:
                raise ValueError(f'{what} should return what it makes of {path}, but returned nothing in ten trials')
            if not (shown and shown.mask and 'gt_seg_map' in before):
                continue
            values = labels_given(step, before, pipeline.ignore_index)
            if values:
                raise ValueError(f'{what} gives labels ({", ".join(map(str, values[:5]))}) to pixels that have none: '
                                 f'let it fill up with {pipeline.ignore_index} and not mix neighbours, leave it out, '
                                 "or use `al.unit='image'`")
            maps = al_patch.new_maps(before, results)
            if maps and not is_made(step, before, maps):
                raise ValueError(f'{what} loads {", ".join(maps)} from a file: every pixel of it would be trained on, '
                                 'also where nothing is labelled. Let the step that loads `gt_seg_map` load it, too: '
                                 'both are hidden then')
    if is_alone and 'inputs' not in results:
        raise ValueError('the training pipeline should give `inputs`, as PackSegInputs does at its end, but gives '
                         f'{", ".join(results)}')


def labels_given(step: Callable, before: dict, ignore_index: int) -> list:
    """What a step of a pipeline makes of a label map without any label, but for that."""
    maps, found = ('gt_seg_map', *al_patch.new_maps({}, before)), set()
    void = {**before, **{key: np.full_like(before[key], ignore_index) for key in maps}}
    for _ in range(10):
        with contextlib.suppress(Exception):  # it may well want labels
            found.update(np.unique((step(copy.deepcopy(void)) or void).get('gt_seg_map', ())).tolist())
    return sorted(found - {ignore_index})


def check_hidden(dataset) -> None:
    """Load a partly labelled image with other labels in its file where nothing is labelled: training sees the same.

    Raises:
        ValueError: It names what differs.
    """
    pipeline, shown_of = dataset.pipeline, getattr(dataset.pipeline, 'shown', {})
    infos = map(dataset.get_data_info, range(len(dataset) if shown_of else 0))
    info = next((info for info in infos if shown_of.get(al_patch.image_path(info), al_patch.Shown()).mask), None)
    if info is None:
        return
    image_path = al_patch.image_path(info)
    shown = shown_of[image_path]
    file = shown.of(info).get('seg_map_path')

    def sample(path: str) -> dict:
        shown_of[image_path] = shown._replace(file=path)
        with al_patch.undisturbed():
            mmengine.runner.set_random_seed(0)
            packed = pipeline(copy.deepcopy(info)) or {}
        items = {**packed, **{key: getattr(value, 'data', value) for key, value in getattr(
            packed.get('data_samples'), 'items', dict)()}}
        return {key: np.asarray(value) for key, value in items.items() if isinstance(value, (torch.Tensor, np.ndarray))}

    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, osp.basename(file or ''))
        if not write_other_labels(file, shown.mask, path):
            return
        try:
            one, two = sample(file), sample(path)
        finally:
            shown_of[image_path] = shown
    for key in one:
        if key not in two or not np.array_equal(one[key], two[key], equal_nan=one[key].dtype.kind == 'f'):
            raise ValueError(f'`{key}` of {file} should not depend on labels that nobody has asked for, but changes '
                             'with them, so that they would be trained on: make it of `gt_seg_map`, by a step behind '
                             "the one that loads that, or use `al.unit='image'`")


def write_other_labels(file: str | None, mask: str, path: str) -> bool:
    """A copy of a label file, with other ones of its values where the mask shows none. Whether that can be: what is no
    picture, or one of a format that loses something, is left to the mask."""
    try:
        with al_patch.Image.open(file) as image:
            label, kind, palette = np.array(image), image.format, image.getpalette()
        hidden, values = ~al_patch.read_mask(mask), np.unique(label.reshape(-1, *label.shape[2:]), axis=0)
        label[hidden] = values[np.random.default_rng(0).integers(0, len(values), hidden.sum())]
    except (OSError, ValueError, AttributeError, IndexError):
        return False
    image = al_patch.Image.fromarray(label)
    if palette and image.mode == 'L':
        image.putpalette(palette)
    image.save(path, kind)
    with al_patch.Image.open(path) as image:
        return np.array_equal(np.asarray(image), label)


def is_made(step: Callable, before: dict, maps: list[str]) -> bool:
    """Whether a step needs no file for its maps."""
    with contextlib.suppress(Exception):
        alone = step(copy.deepcopy({key: value for key, value in before.items() if not key.endswith('path')}))
        return all(key in alone for key in maps)
    return False


def check_losses(model: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: A head learns masks of whole images, or a loss cannot be gathered.
    """
    for head in model.modules():
        if al_patch.classifies_masks(head):
            raise ValueError(f'{type(head).__name__} learns masks of whole images, for which pixels without a label '
                             "are background: use `al.unit='image'` with it")
    for head, loss in al_patch.losses_of(model):
        if not hasattr(loss.forward, 'gathers'):
            check_loss(loss, head.out_channels, next(model.parameters(), torch.empty(0)).device)


def check_loss(loss: torch.nn.Module, channels: int, device: torch.device) -> None:
    """Try a loss on a column of pixels and on the same in another order.

    Raises:
        ValueError: It looks at neighbours, which a pixel of a partly labelled image does not have.
    """
    pred = torch.linspace(0, 9, 12 * channels, device=device).sin().view(1, channels, 12, 1)
    label, why = (torch.arange(12) % max(2, channels)).view(1, 12, 1).to(device), 'it looks at neighbours of pixels'
    try:
        values = torch.stack([loss(pred[:, :, order], label[:, order]).mean()
                              for order in ([*range(12)], [*range(0, 12, 2), *range(1, 12, 2)])])
        if torch.allclose(values, values[0], rtol=1e-3):
            return
    except Exception as error:
        why = f'it fails on single pixels ({type(error).__name__}: {error})'
    raise ValueError(f"{type(loss).__name__} cannot train with partly labelled images: {why}; use a plain "
                     "CrossEntropyLoss, or `al.unit='image'`")


def check_first_losses(trainer) -> None:
    """Train on two images, but for the step, if the model steps as mmengine's.

    Raises:
        ValueError: It fails, or a loss is no number.
    """
    if type(al_patch.unwrap(trainer.model)).train_step is mmengine.model.BaseModel.train_step:
        for key, loss in trial_losses(trainer, 2, None)[0].items():
            if not loss.isfinite():
                raise ValueError(f'{key} should be a finite number, but is {loss:g} on two training images, as the '
                                 'model begins: are `load_from`, `data_preprocessor` and the loss right?')


def check_void(trainer) -> None:
    """Train on two images without any label, but for the step: what is then not zero learns from what nobody labelled,
    unless it does not change with labels at all, as a distillation loss.

    Raises:
        ValueError: It names the loss.
    """
    model = al_patch.unwrap(trainer.model)
    void, *some = trial_losses(trainer, 2, lambda label: torch.full_like(label, getattr(
        al_patch.decode_head(model), 'ignore_index', 255)), torch.zeros_like, torch.ones_like)
    for key in filter(void.get, void):
        if any(void[key] != each[key] for each in some):  # of two classes, as a loss may take void for one of them
            raise ValueError(f'{key} of {type(al_patch.decode_head(model)).__name__} learns from pixels without a '
                             f'label: it is {float(void[key]):.3g} where there is none at all; use '
                             "`al.unit='image'`, or leave that loss out of the config")
        trainer.logger.info(f'{key} does not depend on labels, and is left alone')
    trainer.logger.info('Partly labelled images: losses see labelled pixels only, and are zero where there are none')


def check_last_batch(trainer) -> None:
    """Train on one image, but for the step, if the last batch of an epoch is so small: a BatchNorm after a pooling to
    one pixel, as in PSPHead and ASPPHead, fails on it, and only trying tells.

    Raises:
        ValueError: It fails.
    """
    loader = trainer.train_dataloader
    if isinstance(loader.sampler, mmengine.dataset.DefaultSampler) and trainer.max_iters >= len(loader) and (
            len(loader.sampler) - (len(loader) - 1) * (loader.batch_size or 0) == 1):
        with al_patch.reading('the last batch of an epoch, one image (set `train_dataloader.drop_last=True`, or another'
                              ' `batch_size`),', ValueError):
            trial_losses(trainer, 1, None)


def trial_losses(trainer, n: int, *fills) -> list[dict]:
    """The losses of ``n`` training images (first, last, ...), for each function that makes their label maps of other
    ones, or None. Random numbers, and what the model counts and averages, are afterwards as before."""
    model, dataset = al_patch.unwrap(trainer.model), trainer.train_dataloader.dataset
    weights = [(weight, weight.detach().clone()) for weight in (*model.parameters(), *model.buffers())]
    counts = [(module, {key: value for key, value in vars(module).items() if isinstance(value, (int, float))})
              for module in model.modules()]  # of iterations, say

    def losses(fill: Callable) -> dict:
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        for sample in data['data_samples'] if fill else ():
            sample.gt_sem_seg.data = fill(sample.gt_sem_seg.data)
        torch.manual_seed(0)  # of dropout
        with rehearsing(f'the loss of {n} training images'), al_patch.precision(trainer):
            found = model(**data, mode='loss').items()
        return {key: sum(map(torch.sum, value)) if isinstance(value, list) else value.sum()
                for key, value in found if 'loss' in key}

    with al_patch.undisturbed(), torch.no_grad():
        batch = mmengine.dataset.pseudo_collate([dataset[-i % len(dataset)] for i in range(n)])
        found = [*map(losses, fills)]
        for weight, before in weights:
            weight.copy_(before)
        for module, before in counts:
            vars(module).update(before)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def write_page(dirs: list[str], out: str | None = None, metric: str | None = None, full: float | None = None) -> str:
    """Write what there is to see of runs, finished or not, into one HTML file that loads nothing: from their state, the
    JSON files in the rounds' folders and the pictures there.

    Returns:
        What was written.

    Raises:
        ValueError: A state cannot be read, or ``out`` is a folder.
    """
    out = out or osp.join(dirs[0], 'report.html')
    if osp.isdir(out):
        raise ValueError(f'--out should be a file, e.g. {osp.join(out, "report.html")}, but {out} is a folder')
    runs = {osp.normpath(path): read_run(path) for path in dirs}
    metric = metric_of(runs, metric)
    groups, members = group_runs(runs, metric), name_groups(runs, metric)
    full = full_of(runs, metric) if full is None and metric else full
    looks = {label: IN_PAGE.get(style['color'], style['color']) for label, style in zip(groups, styles(groups))}
    colours = {path: looks[label] for label, paths in members.items() for path in paths}
    shown = [show_run(path, run, metric, full, colours.get(path)) for path, run in runs.items()]
    data = data_uris([path for run in shown for each in [run, *run['rounds']] for path in each['pictures']])
    figure = draw_curves(groups, metric, full) if groups else None
    if figure and len(runs) == 1:
        [run] = runs.values()
        mark_changes(figure, run['rounds'], metric, curve(run['rounds'], metric))
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE).render(
        runs=shown, data=data, metric=metric, curves=figure and as_svg(figure),
        table=len(runs) > 1 and groups and groups_table(groups, metric, full), when=time.strftime('%d %B %Y, %H:%M'),
        looks=looks, cite=CITE, css=PAGE_CSS)
    content = page.encode('utf-8', 'replace')  # what is no character in a name would be an error
    save_file(content, out)
    return f'{out}: {len(runs)} runs, {len(data)} pictures, {len(content) / 1e6:.1f} MB; open it in any browser'


def show_run(path: str, run: dict, metric: str | None, full: float | None, colour: str | None) -> dict:
    """What the page says of one run."""
    rounds, colours = run['rounds'], read_json(osp.join(path, 'palette.json'), {})
    done = [entry for entry in rounds if 'metrics' in entry]
    classes = run.get('classes') or [*colours]
    head, stands, *lines = '\n'.join(sum(around_tables(path, run), [])).splitlines()
    said = [line.partition(': bash ') for line in lines]
    points = curve(rounds, metric)
    figures = {}
    if points.size:
        share, last = points[0, -1], points[2, -1]
        of = 'pixels' if '% of pixels' in rounds[-1]['spent'] else 'images'
        figures = {metric: f'{last:.2f}', 'with labels of': f'{share:.4g} % of {of}'}
        if points.shape[1] > 1:
            figures['since round 0'] = f'{last - points[2, 0]:+.2f}'
        if full:
            figures['of full supervision'] = f'{100 * last / full:.1f} %'
    ious = [(k, read_json(osp.join(path, f'round_{k}', 'class_iou.json'), {})) for k in range(len(done))]
    known = [(k, iou) for k, iou in ious if iou]
    return dict(
        name=osp.basename(osp.abspath(path)), colour=colour, stands=stands, figures=figures,
        settings=head.removeprefix(f'{path}: '), table=rounds_table(done) if done else None,
        notes=[line for line, is_command, _ in said if not is_command],
        commands=[(words, f'bash {command}') for words, is_command, command in said if is_command] + [
            ('This page anew', f'python al_report.py html {shlex.quote(path)}')],
        iou={name: [iou.get(name) for _, iou in known] for name in classes if any(name in iou for _, iou in known)},
        iou_rounds=[k for k, _ in known], swatches={name: f'#{int(c) & 0xffffff:06x}' for name, c in colours.items()},
        rounds=[show_round(path, k, entry, classes) for k, entry in enumerate(rounds)],
        unit=in_words(run['settings']['unit']).partition('(')[0],
        pictures=[file for file in [osp.join(path, 'asked.png')] if osp.isfile(file)])


def show_round(path: str, k: int, entry: dict, classes: list, at_most: int = 200) -> dict:
    """What the page says of what round ``k`` asked for."""
    folder, asked = osp.join(path, f'round_{k}'), entry['asked']
    counts = read_json(osp.join(folder, 'asked_classes.json'), [])
    pixels = entry.get('pixels') or sum(counts)
    counts = sorted(zip(counts, classes), key=lambda pair: -pair[0])
    scores = read_json(osp.join(path, f'round_{k - 1}', 'query_scores.json'), {}) if k else {}
    names = sorted(asked, key=lambda name: (-(asked[name] or [0])[0], -scores.get(name, 0)))
    found = [sorted(glob.glob(osp.join(glob.escape(folder), files), recursive=True), key=lambda file: (
        osp.splitext(osp.relpath(file, osp.join(folder, 'pictures')))[0] not in asked, file))  # what it asked for first
        for files in ('contact_sheet.png', 'pictures/**/*.png', 'to_label/overlay/**/*.jpg')]
    void = entry.get('void_pixels')
    if void and pixels:
        counts = [*counts, (void, 'void')]
    return dict(
        k=k, units=units_of(entry), images=len(asked), strategy=(entry.get('strategy') or {}).get('type'),
        pictures=[path for paths in found for path in paths[:12]],
        left_out=sum(max(0, len(paths) - 12) for paths in found),
        classes=[(name, 100 * n / pixels) for n, name in counts if n and pixels], bars=bars_of(scores, asked),
        names=[(name, asked[name], scores.get(name)) for name in names[:at_most]], more=max(0, len(names) - at_most))


def bars_of(scores: dict, asked: dict, bins: int = 32) -> dict | None:
    """A histogram of the highest score in each image: for each bar its height, in percent of the highest, and of how
    many percent of its images a round asked."""
    if len(scores) < 2:
        return None
    all_N, edges = np.histogram([*scores.values()], bins)
    asked_N, _ = np.histogram([score for name, score in scores.items() if name in asked], edges)
    return dict(low=edges[0], high=edges[-1], images=len(scores), bars=[
        (100 * n / all_N.max(), 100 * a / max(1, n)) for n, a in zip(all_N.tolist(), asked_N.tolist())])


def data_uris(paths: list[str], limit: int = 9_000_000) -> dict[str, str]:
    """Pictures by path, as data in the page, of ``limit`` characters in all: the more there are, the smaller. What
    cannot be read is left out."""
    width, uris, total = 1100., {}, math.inf
    while total > limit:
        for path in paths:
            with contextlib.suppress(OSError, SyntaxError, ValueError), pil.open(path) as image:
                image, content = image.convert('RGB'), io.BytesIO()
                image.thumbnail((width, 2 * width))
                image.save(content, 'WEBP', quality=80, method=2)
                uris[path] = f'data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}'
        total = sum(map(len, uris.values()))
        if total > limit:
            print(f'{len(uris)} pictures are too many at {width:.0f} pixels: made smaller', file=sys.stderr)
            width *= .9 * (limit / total)**.5
    return uris


def as_svg(figure: figures.Figure) -> str:
    """A figure as a part of the page: in its font, and in colours that suit its background."""
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'al'}):
        svg = rendered(figure, 'svg').decode()
    svg = re.sub(r'(?s)<metadata>.*?</metadata>|<style.*?</style>| (width|height)="[\d.]+pt"| id="[a-z]+_\d+"', '',
                 svg[svg.index('<svg'):])
    for colour, ours in IN_PAGE.items():
        svg = svg.replace(f': {colour}', f': {ours}')
    n = len(figure.axes)
    return svg.replace('<svg', '<svg role="img" aria-label="Learning curves, of which tables hold the figures" '
                               f'style="min-width: {21 * n}rem; max-width: {32 * n}rem"', 1)


IN_PAGE = {'#000000': 'currentColor', '#ffffff': 'none', '#606060': 'var(--soft)'}  # what dark pages have otherwise


def read_json(path: str, default):
    """The numbers, by name or in a list, that a file holds; if it is another, or none can be read, the default."""
    with contextlib.suppress(OSError, ValueError, TypeError), open(path, encoding='utf-8') as file:
        content = json.load(file)
        numbers = content.values() if isinstance(content, dict) else content
        if isinstance(content, type(default)) and all(map(math.isfinite, numbers)):
            return content
    return default


CITE = """@misc{mmseg2020,
    title={{MMSegmentation}: OpenMMLab Semantic Segmentation Toolbox and Benchmark},
    author={MMSegmentation Contributors},
    howpublished={\\url{https://github.com/open-mmlab/mmsegmentation}},
    year={2020}
}"""
PAGE_CSS = """
:root { color-scheme: light dark; --ink: #1b1d22; --soft: #5b616b; --line: #dfe2e7; --card: #f6f7f9; --back: #fff;
    --blue: #0072b2; --orange: #d55e00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #a3aab6; --line: #343943; --card: #1f232a;
    --back: #15181d; --blue: #56b4e9; --orange: #e8873a } img { filter: brightness(.88) } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 5rem; max-width: 76rem; color: var(--ink);
    background: var(--back); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.2; text-wrap: balance } h1 { font-size: 1.9rem; margin: .5rem 0 }
h2 { font-size: 1.45rem; margin: 3.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem }
p { margin: .4rem 0; max-width: 46rem } .soft, figcaption, th { color: var(--soft) }
a { color: var(--blue) } :focus-visible { outline: 3px solid var(--blue); outline-offset: 2px }
.skip { position: absolute; left: -99rem } .skip:focus { position: static }
nav ul { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; list-style: none }
nav a { display: block; padding: .35rem .8rem; border: 1px solid var(--line); border-radius: 2rem;
    text-decoration: none; color: inherit } nav a:hover { background: var(--card) }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .4em }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1rem 0 }
dl div { background: var(--card); border-radius: .6rem; padding: .7rem 1rem }
dt { color: var(--soft); font-size: .85rem }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .32rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600 } td:first-child, th:first-child { text-align: left } .iou td + td {
    background: color-mix(in srgb, var(--blue) calc(var(--v) * .45%), transparent) }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border: 1px solid var(--soft) }
.warn { border-left: 4px solid var(--orange); background: var(--card); padding: .6rem 1rem; margin: .5rem 0 }
details { border: 1px solid var(--line); border-radius: .6rem; margin: .6rem 0; padding: 0 1rem }
details[open] { padding-bottom: 1rem } details details { font-size: .92rem }
summary { cursor: pointer; padding: .6rem 0; font-weight: 600 } summary span { font-weight: 400; color: var(--soft) }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1.5rem }
.share { display: grid; grid-template-columns: minmax(5rem, 9rem) 1fr 4rem; align-items: center; gap: .6rem;
    font-size: .92rem } .share i { height: .7em; border-radius: .2em; background: var(--blue); min-width: 1px }
.share b { font-weight: 400; text-align: right; font-variant-numeric: tabular-nums }
.bars { display: flex; align-items: flex-end; height: 6rem; border-bottom: 1px solid var(--soft) }
.bars i { flex: 1; position: relative; background: var(--line); margin-right: 1px }
.bars i b { position: absolute; inset: auto 0 0 0; background: var(--orange) }
.ends { display: flex; justify-content: space-between; font-size: .85rem; color: var(--soft) }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem }
figure { margin: 1rem 0; min-width: 0 } figure div { overflow: auto; border-radius: .4rem }
figcaption { font-size: .9rem }
img { display: block; max-width: 100%; background: #fff; border-radius: .4rem; cursor: zoom-in }
figure div:focus img { max-width: none; cursor: default }
svg { display: block; width: 100%; height: auto } svg * { stroke-linejoin: round }
svg text { fill: currentColor; font-family: system-ui, sans-serif !important }
pre { background: var(--card); border-radius: .4rem; padding: .7rem 1rem; margin: .3rem 0 .8rem; white-space: pre-wrap;
    user-select: all; font-size: .88rem }
@media print { details:not([open]) { display: none } }
"""
PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<title>Active learning: {{ runs | map(attribute='name') | join(', ') | truncate(60) }}</title>
<style>{{ css | safe }}</style></head><body>
{% macro dot(colour) %}{% if colour %}
<span class="dot" style="background: {{ colour }}"></span>{% endif %}{% endmacro %}
{% macro grid(table, label, chips={}) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ label }}"><table>
<thead><tr>{% for name in table.field_names %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>
{%- if loop.first %}{{ dot(chips[cell]) }}{% endif %}
{{- '–' if cell is none else cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
{% macro picture(path, name) %}{% if path in data %}
<figure><div tabindex="0" role="group" aria-label="{{ name }}, larger while it has the focus">
<img src="{{ data[path] }}" alt="{{ name }}"></div>
<figcaption><bdi>{{ name }}</bdi></figcaption></figure>
{% endif %}{% endmacro %}
<a class="skip" href="#main">To the content</a>
<header><h1>Active learning{% if runs | length == 1 %}: <bdi>{{ runs[0].name }}</bdi>{% endif %}</h1>
<p class="soft">As of {{ when }}</p>
{% if runs | length > 1 %}<nav aria-label="Runs"><ul>
{% for run in runs %}<li><a href="#run-{{ loop.index }}">{{ dot(run.colour) }}<bdi>{{ run.name }}</bdi></a></li>
{% endfor %}</ul></nav>{% endif %}</header>
<main id="main">
{% if curves %}<div class="scroll" tabindex="0" role="region" aria-label="Learning curves">{{ curves | safe }}</div>
{% endif %}
{% if table %}{{ grid(table, 'Runs compared', looks) }}{% endif %}
{% for run in runs %}{% set number = loop.index %}
<section id="run-{{ number }}"><h2>{{ dot(run.colour) }}<bdi>{{ run.name }}</bdi></h2>
<p class="soft">{{ run.settings }}</p><p><strong>{{ run.stands }}</strong></p>
<dl>{% for name, value in run.figures.items() %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% for line in run.notes %}<p{% if line.startswith('Warning') %} class="warn"{% endif %}>{{ line }}</p>{% endfor %}
{% if run.table %}<h3>Rounds</h3>{{ grid(run.table, 'Rounds of ' ~ run.name) }}{% endif %}
{% if run.iou %}<h3>IoU of each class, by round (%)</h3>
<div class="scroll" tabindex="0" role="region" aria-label="IoU of each class"><table class="iou"><thead><tr>
<th scope="col">class</th>{% for k in run.iou_rounds %}<th scope="col">{{ k }}</th>{% endfor %}</tr></thead><tbody>
{% for name, values in run.iou.items() %}<tr><td>{% if name in run.swatches %}
<span class="swatch" style="background: {{ run.swatches[name] }}"></span>{% endif %}<bdi>{{ name }}</bdi></td>
{% for value in values %}<td style="--v: {{ value or 0 }}">{{ '–' if value is none else '%.0f' | format(value) }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
<h3>What each round asked for</h3>
{% if not run.rounds | map(attribute='pictures') | sum(start=[]) %}
<p class="soft">With al.visualize=8 there are pictures, too, eight after each query.</p>{% endif %}
{% for round in run.rounds | reverse %}
<details{% if loop.first and number == 1 %} open{% endif %}><summary>Round {{ round.k }}
<span>{{ round.units }} {{ run.unit }}s{% if run.unit != 'image' %} in {{ round.images }} images{% endif %}
{% if round.strategy %}, by {{ round.strategy }}{% endif %}</span>
</summary><div class="two">
{% if round.classes %}<div><h3>Classes, % of pixels</h3>
{% for name, share in round.classes[:16] %}<div class="share"><bdi>{{ name }}</bdi>
<i style="width: {{ share }}%{% if name in run.swatches %}; background: {{ run.swatches[name] }};
 outline: 1px solid var(--soft){% endif %}"></i><b>{{ '%.2f' | format(share) }}</b></div>{% endfor %}
{% if round.classes | length > 16 %}<p class="soft">and {{ round.classes | length - 16 }} more</p>{% endif %}</div>
{% endif %}
{% if round.bars %}<div><h3>Scores of {{ round.bars.images }} images</h3><div class="bars" role="img"
 aria-label="Histogram of the highest score in each image, from {{ round.bars.low }} to {{ round.bars.high }}">
{% for height, asked in round.bars.bars %}<i style="height: {{ height }}%"><b style="height: {{ asked }}%"></b></i>
{% endfor %}</div><div class="ends"><span>{{ '%.4g' | format(round.bars.low) }}</span>
<span>{{ '%.4g' | format(round.bars.high) }}</span></div>
<p class="soft">The highest score in each image; orange: those asked for.</p></div>{% endif %}
</div>
<details><summary>Names</summary><div class="scroll" tabindex="0" role="region" aria-label="Names"><table><thead><tr>
<th scope="col">image</th><th scope="col">units</th><th scope="col">pixels</th><th scope="col">highest score</th></tr>
</thead><tbody>{% for name, asked, score in round.names %}<tr><td><bdi>{{ name }}</bdi></td>
<td>{{ asked[0] if asked else 'all' }}</td><td>{{ asked[1] if asked else 'all' }}</td>
<td>{{ '–' if score is none else '%.4g' | format(score) }}</td></tr>
{% endfor %}</tbody></table></div>
{% if round.more %}<p class="soft">and {{ round.more }} more, which al_state.json names</p>{% endif %}</details>
<div class="pictures">
{% for path in round.pictures %}{{ picture(path, path.rpartition('round_' ~ round.k)[2].lstrip('/')) }}{% endfor %}
</div>{% if round.left_out %}<p class="soft">and {{ round.left_out }} more pictures in its folder</p>{% endif %}
</details>{% endfor %}
{% for path in run.pictures %}<details><summary>Classes, IoU, rankings and budget in one figure</summary>
{{ picture(path, 'asked.png') }}</details>{% endfor %}
<h3>Go on</h3>
{% for words, command in run.commands %}<p>{{ words }}</p><pre tabindex="0"><code>{{ command }}</code></pre>{% endfor %}
</section>{% endfor %}
<section><h2>Cite</h2><p>The paper of the strategy, as the README names it, with its settings above, the seeds and the
labels spent; and MMSegmentation:</p><pre tabindex="0"><code>{{ cite }}</code></pre></section>
</main></body></html>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a run: its curve, and what it has asked for
# ---------------------------------------------------------------------------------------------------------------------


def write_table(state: al_patch.State) -> None:
    """Write the run so far, one row a round, into ``learning_curve.csv``."""
    table = rounds_table(rounds_of(state))
    write_csv(osp.join(state.work_dir, 'learning_curve.csv'), [table.field_names, *table.rows])


def report_curve(state: al_patch.State) -> None:
    """Draw the run's learning curve, if it validates, and hand the round's figures to its visualizer."""
    entry, metric, rounds = state.entry, main_metric(state.rounds, state.al.stop), rounds_of(state)
    scalars = {**entry['spent'], **entry['metrics'], 'round': state.round, 'train_seconds': entry['train_seconds']}
    add_scalars(state, scalars)
    if metric and state.al.reports:
        points = curve(rounds, metric)
        figure = draw_curves({in_words(state.al.strategy): points[None]}, metric, full_level([points]))
        mark_changes(figure, rounds, metric, points)
        show(state, figure, osp.join(state.work_dir, 'learning_curve.png'), 'learning_curve')


def rounds_of(state: al_patch.State) -> list[dict]:
    return of_one_pool(state.rounds, len(state.pool), state.pool.pixels if state.counts_pixels else None)


def mark_changes(figure: figures.Figure, rounds: list[dict], metric: str, points: np.ndarray) -> None:
    """Write beside the rounds that differ from the one before what is another in them."""
    done = [words for entry, words in zip(rounds, changes(rounds)) if metric in entry.get('metrics', ())]
    for row, axes in enumerate(figure.axes):
        for k, words in enumerate(done):
            if words:
                axes.axvline(points[row, k], color='#999999', linestyle='--', linewidth=.8)
                axes.annotate(textwrap.shorten(words, 48, placeholder=' …'), (points[row, k], 0), (2, 2),
                              ('data', 'axes fraction'), 'offset points', rotation=90, size=7, color='#555555')


def report_asked(state: al_patch.State, trainer) -> None:
    """Draw what the run has asked for, and hand the numbers to its visualizer."""
    pool, rounds, classes = state.pool, state.round + 1, state.classes
    queries = kept(state, 'query_scores.json', state.round)
    asked = Asked(
        classes, np.array([each or [0] * len(classes) for each in kept(state, 'asked_classes.json', rounds)]),
        np.array([[iou.get(name, math.nan) for name in classes] for iou in kept(state, 'class_iou.json', rounds)]),
        np.array([ranking_overlap(*pair) for pair in zip(queries, queries[1:])]).reshape(-1, 2),
        units_per_image(state.rounds, len(pool)), predicted_classes(state, trainer) if state.al.visualize else None,
        np.array([entry['spent'].get('% pure', math.nan) for entry in state.rounds]))
    add_scalars(state, asked.newest())
    if state.al.reports:
        show(state, draw_asked(asked), osp.join(state.work_dir, 'asked.png'), 'asked')


def look_at_labels(state: al_patch.State) -> None:
    """Count the classes of what the newest round was given, and say it aloud where there is only one."""
    classes = state.classes
    names = [name for name in state.entry['asked'] if name not in state.dropped]
    counts = {name: class_counts(state.load_label(name)[state.mask(name) & ~state.mask(name, state.round - 1)],
                                 len(classes)) for name in names}
    shown = np.array([(each > 0).sum() for each in counts.values()])
    total = sum(counts.values(), np.zeros(len(classes), int))
    keep(state, 'asked_classes.json', total.tolist())
    if state.al.unit.type == 'pixel' or state.al.unit.get('label') == 'dominant':  # one click answers for a unit
        state.entry['spent']['clicks'] = sum(map(units_of, state.rounds))
    if state.counts_pixels and state.al.oracle.type != 'human' and (pure := purity(state, names)):
        state.entry['spent']['% pure'] = round(pure, 2)
    many = units_of(state.entry) > 9 if state.counts_pixels else len(counts) > 1  # a few units may well be of one
    before = kept(state, 'asked_classes.json', state.round)
    ever = (np.sum([total, *filter(None, before)], 0) > 0).sum()  # a strategy may ask for one that was rare
    if ever <= 1 and many:
        absent = [name for name, n in zip(classes, total) if not n]
        state.warn(f'All labels that round {state.round} got are {classes[int(total.argmax())]!r}: none is '
                   f'{" or ".join(map(repr, absent[:5]))}. 255 means no label: files that hold 0 and 255 for two '
                   'classes should hold 0 and 1')
    elif not state.counts_pixels and np.median(shown) > 2 and 0 < (shown <= 1).mean() < .05:  # few, or it is the data
        odd = [name for name, n in zip(counts, shown) if n <= 1]
        state.warn(f'Labelled with one class or none, where most images have {np.median(shown):.0f}: '
                   f'{", ".join(odd[:10])}. Are their label files whole?')


def purity(state: al_patch.State, names: list[str]) -> float | None:
    """How much of what the newest round asked for has the most frequent class of its unit, void being one, in percent;
    None where units are no fixed areas. Exact labels tell it: those of the data set."""
    pure = pixels = 0
    for name in names:
        units, new = state.units(name), state.mask(name) & ~state.mask(name, state.round - 1)
        if not isinstance(units, al_patch.Segments):
            return None
        classes = np.unique(state.pool.load_label(name)[new], return_inverse=True)[1].reshape(-1)
        counts = np.zeros((units.number, int(classes.max(initial=0)) + 1), int)
        np.add.at(counts, (units.labels[new], classes), 1)
        pure, pixels = pure + int(counts.max(1).sum()), pixels + len(classes)
    return 100 * pure / max(1, pixels)


def ranking_overlap(before: dict, after: dict) -> tuple[float, float]:
    """How alike two queries rank the images that both scored: Spearman's rank correlation, and the share of the highest
    tenth of the one that is in the highest tenth of the other. Not a number where there are fewer than two images, and
    fewer than ten in a tenth."""
    names = [name for name in before if name in after]
    if len(names) < 2:
        return math.nan, math.nan
    orders = [np.argsort([-scores[name] for name in names], kind='stable') for scores in (before, after)]
    first, second = (set(order[:len(names) // 10].tolist()) for order in orders)
    return (float(np.corrcoef(*map(np.argsort, orders))[0, 1]),
            len(first & second) / len(first) if len(first) >= 10 else math.nan)


def units_per_image(rounds: list[dict], images: int) -> np.ndarray:
    """How many units queries have asked for in every image, most first; 0 of whole images. (N,)"""
    units = collections.Counter()
    for entry in rounds[1:]:
        units.update({name: asked[0] for name, asked in entry['asked'].items() if asked})
    return np.array(sorted(units.values(), reverse=True) + [0] * (images - len(units)))


def predicted_classes(state: al_patch.State, trainer, images: int = 32) -> np.ndarray:
    """Pixels of every class that the model predicts in a few images of the pool, drawn at random. (C,)"""
    have, classes = state.labelled(), len(state.classes)
    names = [name for name in state.pool.names if have.get(name, 0) is not None]
    looks = look(state, trainer, state.shuffled(names, 'predicted', state.round)[:images])
    return sum((class_counts(prediction_HW, classes) for _, prediction_HW, _ in looks), np.zeros(classes, int))


def draw_asked(asked: Asked) -> figures.Figure:
    """What was asked for: classes against predictions, IoU of classes, overlap of rankings, budget over images, and the
    purity of units."""
    rows = [[draw_classes] + [draw_iou] * bool(np.isfinite(asked.iou_RC).any()),
            [draw_overlaps] * bool(np.isfinite(asked.overlaps_Q2[1:]).any())
            + [draw_budget] * bool(asked.units_N.any()),
            [draw_purity] * bool(asked.purity_R is not None and np.isfinite(asked.purity_R).any())]
    shown = np.sort(np.argsort(-asked.pixels_RC.sum(0), kind='stable')[:30])  # more could not be read
    mosaic = [(row * 2)[:2] for row in rows if row]
    heights = (1.3 + .24 * len(shown), 3., 3.)[:len(mosaic)]
    figure = figures.Figure((11, sum(heights)), dpi=110, layout='constrained')
    for draw, axes in figure.subplot_mosaic(mosaic, height_ratios=heights).items():
        draw(axes, asked, shown)
    return figure


def draw_classes(axes, asked: Asked, shown: np.ndarray) -> None:
    counts = {'asked at the start': asked.pixels_RC[0], 'by queries': asked.pixels_RC[1:].sum(0),
              'predicted in the pool': asked.predicted_C}
    for (label, counts_C), colour, marker in zip(counts.items(), COLOURS, MARKERS):
        if counts_C is not None and counts_C.any():
            shares = (100 * counts_C / counts_C.sum())[shown].clip(.01)
            axes.scatter(shares, range(len(shown)), color=colour, marker=marker, label=label, alpha=.8)
    tidy(axes, legend=False, xscale='log', xlim=(.008, 125), xlabel='% of pixels', ylim=(len(shown) - .5, -.5),
         yticks=range(len(shown)), yticklabels=[asked.classes[c] for c in shown])
    axes.legend(frameon=False, ncols=3, loc='lower center', bbox_to_anchor=(.5, 1), columnspacing=1,
                title='classes of pixels')
    axes.set_xticks([.01, .1, 1, 10, 100], ['≤ 0.01', '0.1', '1', '10', '100'])


def draw_iou(axes, asked: Asked, shown: np.ndarray) -> None:
    iou_CR = asked.iou_RC[:, shown].T
    rounds = iou_CR.shape[1]
    heat = axes.imshow(iou_CR, vmin=0, vmax=100, cmap='cividis', aspect='auto')
    for (c, k), value in np.ndenumerate(iou_CR) if rounds <= 12 else ():
        axes.text(k, c, f'{value:.0f}', ha='center', va='center', size=8, color='wk'[int(value > 50)])
    axes.set(xlabel='round', title='IoU (%)', xticks=range(0, rounds, rounds // 13 + 1), yticks=range(len(shown)),
             yticklabels=[asked.classes[c] for c in shown])
    axes.figure.colorbar(heat, ax=axes)


def draw_overlaps(axes, asked: Asked, shown: np.ndarray) -> None:
    queries = [f'{q + 1} → {q + 2}' for q in range(len(asked.overlaps_Q2))]
    for values, label, colour, marker in zip(asked.overlaps_Q2.T, ('rank correlation', 'share of the top tenth kept'),
                                             COLOURS, MARKERS):
        if np.isfinite(values).any():
            axes.plot(queries, values, marker + '-', color=colour, label=label)
    tidy(axes, xlabel='queries', ylim=(min(-.05, np.nanmin(asked.overlaps_Q2) - .05), 1.05),
         title='do consecutive queries rank images alike?')


def draw_budget(axes, asked: Asked, shown: np.ndarray) -> None:
    units_N = asked.units_N
    axes.plot(np.linspace(0, 100, len(units_N) + 1), 100 * np.r_[0, units_N.cumsum()] / units_N.sum(),
              color=COLOURS[0], label='so far')
    axes.plot([0, 100], [0, 100], color='#555555', linestyle=':', label='if all images got the same')
    tidy(axes, xlabel='% of images, those asked most first', ylabel='% of units asked for',
         title='do a few images take it all?')


def draw_purity(axes, asked: Asked, shown: np.ndarray) -> None:
    axes.plot(range(len(asked.purity_R)), asked.purity_R, 'o-', color=COLOURS[0])
    tidy(axes, legend=False, xlabel='round that asked', ylabel='% of pixels', xticks=range(len(asked.purity_R)),
         title='do units have one class?')


class Asked(NamedTuple):
    """What a run has asked for in R rounds, by Q + 1 queries, and what came of it."""
    classes: list
    pixels_RC: np.ndarray  # of each class, among those that a round asked for
    iou_RC: np.ndarray  # in percent; not a number where it is not known
    overlaps_Q2: np.ndarray  # of consecutive queries, see `ranking_overlap`
    units_N: np.ndarray  # of each image, see `units_per_image`
    predicted_C: np.ndarray | None  # pixels of each class that the model predicts in the pool
    purity_R: np.ndarray | None = None  # see `purity`; not a number where it is not known

    def newest(self) -> dict[str, float]:
        """The last round's numbers, by name."""
        shares_C = 100 * self.pixels_RC[-1] / max(1, self.pixels_RC[-1].sum())
        numbers = {f'IoU/{name}': value for name, value in zip(self.classes, self.iou_RC[-1])}
        numbers.update({f'% of asked/{name}': share for name, share in zip(self.classes, shares_C)})
        for overlap in self.overlaps_Q2[-1:]:
            numbers.update(zip(('rank correlation with last query', 'top tenth kept since last query'), overlap))
        if self.units_N.any():
            most = self.units_N[:max(1, len(self.units_N) // 10)].sum()
            numbers['% of units in a tenth of images'] = 100 * most / self.units_N.sum()
        return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: a few images of each query
# ---------------------------------------------------------------------------------------------------------------------


def draw_pictures(state: al_patch.State, trainer, asked: dict) -> None:
    """Draw ``al.visualize`` images after a query: half of them those that it asks for first, the others the same in
    every round; for whole images also a contact sheet of what it asks for."""
    n, scores, strategy, pool = state.al.visualize, state.scores, state.strategy, state.pool
    if not n:
        return
    if not strategy.needs_model:  # then the query has not loaded it
        al_patch.load_weights(state, state.checkpoint(state.round, state.al.query_with))
    folder = state.folder(state.round + 1)  # of the round that asks for it
    first = sorted(asked, key=lambda name: -(scores.get(name, 0) if asked[name] is None else len(asked[name])))
    names = list(dict.fromkeys(first[:n - n // 2] + state.shuffled(pool.names, 'pictures')))[:n]
    for name, prediction_HW, score_HW in look(state, trainer, names, strategy):
        figure = draw_picture(state, asked, name, prediction_HW, score_HW)
        show(state, figure, al_patch.png_path(osp.join(folder, 'pictures'), name, state.work_dir), f'picture_{name}')
    if not state.counts_pixels:
        show(state, draw_contact_sheet(pool, first, scores), osp.join(folder, 'contact_sheet.png'), 'contact_sheet')


def look(state: al_patch.State, trainer, names: list[str], strategy: al_patch.Strategy | None = None
         ) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """The classes that the model predicts in images and, if the strategy has any, its score map, (H, W) each, in the
    image's own coordinates, from the enlarged logits."""
    network = al_patch.Network(trainer, strategy, state.al.logits)
    for name, seen in network.look(state, names, [al_patch.to_image], shared=False):
        has_map = strategy and strategy.score is not al_patch.random_scores
        yield name, network.classify(seen), score_map(state, strategy, seen) if has_map else None


def score_map(state: al_patch.State, strategy: al_patch.Strategy, seen: al_patch.Seen) -> np.ndarray:
    """The score of each pixel of an image, by what the network sees in it, (H, W)."""
    means = seen.means[-1]
    scores_NHW = al_patch.call_offering(strategy.score, means['probs_NCHW'], **means, **state.thresholds)
    return scores_NHW[0].float().cpu().numpy()


def draw_picture(state: al_patch.State, asked: dict, name: str, prediction_HW: np.ndarray,
                 score_HW: np.ndarray | None) -> figures.Figure:
    """An image in panels: input, prediction, scores if there are any, below image level what is asked for and, as far
    as there are labels, these and where the prediction differs."""
    pool, old = state.pool, state.mask(name)
    classes, image, strength = state.classes, to_rgb(pool.load_image(name)), .5
    new, n = state.mask_of(name, asked[name]) & ~old if name in asked else np.zeros_like(old), len(classes)
    known = old if state.al.oracle.type == 'human' else old | new  # a human has yet to label what is new
    # that of an image that was not asked for stays closed
    label = state.load_label(name).astype(np.int64) if known.any() else np.full(known.shape, n)
    truth_HW = np.where(known & (label >= 0), label, n).clip(max=n)
    wrong, shares = (truth_HW < n) & (truth_HW != prediction_HW), [100 * mask.mean() for mask in (new, old)]
    wrong_share = 100 * wrong.sum() / max(1, (truth_HW < n).sum())
    if state.unit.kind.is_dense:  # make single pixels large enough to be seen
        radius, strength = max(old.shape) // 120, 1
        where = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        truth_HW = np.where(al_patch.dilate(known, radius), truth_HW[tuple(where)], n)
        old, new, wrong = (al_patch.dilate(mask, radius) for mask in (old, new, wrong))
    colours = np.r_[pool.leaves[0].metainfo['palette'], [[255] * 3]].astype(np.uint8)  # mmseg's; white is no class
    panels = {'input': image, 'prediction': colours[prediction_HW]}
    if score_HW is not None:
        panels[f'score: {in_words(state.al.strategy)}'] = score_HW
    if state.counts_pixels:
        panels['asked for now, {:.3g} % (orange);\nbefore, {:.3g} % (blue)'.format(*shares)] = tint(
            image, {COLOURS[0]: old, COLOURS[1]: new}, strength)
    if (truth_HW < n).any():
        panels['labels'] = colours[truth_HW]
        panels[f'wrong: {wrong_share:.3g} % of the labels (pink)'] = tint(image, {COLOURS[3]: wrong}, max(strength, .8))
    figure = draw_panels(panels)
    asks = 'asks for' if name in asked else 'does not ask for'
    figure.suptitle(f'round {state.round + 1} {asks} {name}')
    number = class_counts(np.r_[prediction_HW.flat, truth_HW.flat], n)
    biggest = np.sort(np.argsort(-number, kind='stable')[:min(16, np.count_nonzero(number))])
    figure.legend(handles=[patches.Patch(facecolor=colours[c] / 255, edgecolor='k', label=classes[c]) for c in biggest],
                  ncols=8 if len(panels) > 4 else 5, loc='outside lower center', frameon=False, fontsize=9)
    return figure


def draw_panels(panels: dict[str, np.ndarray]) -> figures.Figure:
    """Two to six panels by title: colours (H, W, 3), of which the first is, or scores (H, W)."""
    h, w, _ = next(iter(panels.values())).shape
    rows = 1 + (len(panels) > 3)
    columns = math.ceil(len(panels) / rows)
    figure = figures.Figure((11 / 3 * columns, 1. + rows * (.4 + 3.4 * h / w)), dpi=100, layout='constrained')
    grid = figure.add_gridspec(rows, 2 * columns)
    for i, (title, panel) in enumerate(panels.items()):
        row, column = divmod(i, columns)
        left = 2 * column + row * (rows * columns - len(panels))  # a last row that is shorter stands in the middle
        axes = figure.add_subplot(grid[row, left:left + 2], xticks=[], yticks=[])
        axes.set_title(title, size=10)
        if panel.ndim == 2 and np.ptp(panel) <= .01 * abs(panel).max():  # stretched, noise would look like structure
            axes.set_title(f'{title}, {panel.mean():.3g} everywhere', size=10)
            axes.imshow(np.zeros_like(panel), cmap='cividis', vmin=-1, vmax=1)
        elif panel.ndim == 2:
            figure.colorbar(axes.imshow(panel, cmap='cividis'), ax=axes, shrink=.8)
        else:
            axes.imshow(panel)
    return figure


def draw_contact_sheet(pool: al_patch.Pool, names: list[str], scores: dict, at_most: int = 48) -> figures.Figure:
    """Small pictures of the images that a query asks for, those with the highest scores, if any, first."""
    images = {name: to_rgb(pool.load_image(name)) for name in names[:at_most]}
    rows, (h, w) = math.ceil(len(images) / 8), np.mean([image.shape[:2] for image in images.values()], 0)
    columns = math.ceil(len(images) / rows)
    width = min(11 / columns, 3)  # of an image, in inches
    figure = figures.Figure((columns * width, .6 + rows * (.45 + .95 * width * h / w)), dpi=100, layout='constrained')
    order = ',\nhighest scores first' * bool(scores)
    figure.suptitle(f'{len(images)} of {len(names)} images asked for{order}', size=10)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, (name, image) in zip(figure.axes, images.items()):
        score = f'{scores[name]:.4g}' if name in scores else ''
        axes.set_title(f'{name if len(name) < 18 else "…" + name[-16:]}\n{score}', size=8)
        axes.imshow(image)
    return figure


def to_rgb(image: np.ndarray) -> np.ndarray:
    """An image as loaded, (H, W[, C]) and BGR, for the eye: (H, W, 3) uint8."""
    image = image.reshape(*image.shape[:2], -1)
    image = image[..., 2::-1] if image.shape[2] > 2 else image[..., [0, 0, 0]]
    if image.dtype != np.uint8:  # e.g. 16 bits of a satellite
        low, high = np.percentile(image, (1, 99))
        image = 255 * ((image - low) / max(high - low, 1e-9)).clip(0, 1)
    return image.astype(np.uint8)


def tint(image_HW3: np.ndarray, masks: dict, strength: float) -> np.ndarray:
    """An image in pale grey and, where the mask of a colour is true, mixed with that colour."""
    result = np.repeat(160 + .35 * image_HW3.mean(2, keepdims=True), 3, 2)
    for colour, mask_HW in masks.items():
        result[mask_HW] = (1 - strength) * image_HW3[mask_HW] + strength * 255 * np.array(colors.to_rgb(colour))
    return result.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Compare runs
# ---------------------------------------------------------------------------------------------------------------------


def compare(dirs: list[str], out: str | None = None, metric: str | None = None, full: float | None = None,
            target: float | None = None) -> str:
    """The table of finished or running runs; their learning curves in one figure, where ``out`` says.

    Raises:
        ValueError: No run has finished a round with the metric, or a target's full supervision is not known.
    """
    runs = {path: read_run(path) for path in dirs}
    metric = metric_of(runs, metric)
    groups = group_runs(runs, metric)
    if not groups:
        known = sorted({key for run in runs.values() for entry in run['rounds'] for key in entry.get('metrics', ())})
        raise ValueError(f'no run has finished a round with {metric or "a validation"}: ' + (
            f'--metric should be one of {", ".join(known)}' if known else 'wait for one, or validate'))
    full = full_of(runs, metric) if full is None else full
    if target and target <= 1:
        if not full:
            raise ValueError(f'--target {target:g} should be of full supervision, which needs --full VALUE or a run in '
                             f'which everything is labelled; or be a {metric} above 1')
        target *= full
    if out:
        save_figure(draw_curves(groups, metric, full), out)
    return f'{groups_table(groups, metric, full, target)}\nCurves: {out or "--out FILE draws them"}'


def metric_of(runs: dict, metric: str | None) -> str | None:
    """The metric to compare runs by: the given one, or that of the first that has any."""
    metrics = (main_metric(run['rounds'], run['settings'].get('stop')) for run in runs.values())
    return metric or next(filter(None, metrics), None)


def full_of(runs: dict, metric: str) -> float | None:
    """The metric with all labels, by those runs that have come so far."""
    return full_level([curve(run['rounds'], metric) for run in runs.values()])


def group_runs(runs: dict, metric: str) -> dict[str, np.ndarray]:
    """Curves of runs that differ in their seeds alone, by what sets them apart, as far as all of them are. (S, 3, R)"""
    groups = {label: [curve(runs[path]['rounds'], metric) for path in paths]
              for label, paths in name_groups(runs, metric).items()}
    return {label: np.stack([points[:, :min(each.shape[1] for each in curves)] for points in curves])
            for label, curves in groups.items()}


def name_groups(runs: dict, metric: str) -> dict[str, list[str]]:
    """Group runs that differ in their seeds alone.

    Args:
        runs: Directory -> state. Left out are runs without a finished round, and of a single round on all labels.

    Returns:
        Label that says what sets the group apart -> its directories.
    """
    groups, result = {}, {}
    for path, run in runs.items():
        points = curve(run['rounds'], metric)
        if points.size and not (points.shape[1] == 1 and points[0, 0] == 100):
            settings = {key: value for key, value in run['settings'].items()
                        if key not in ('seed', 'visualize', 'keep')}
            settings.update(changed='; '.join(f'round {k}: {words}' for k, words in enumerate(changes(run['rounds']))
                                              if words))
            config = {key: value for key, value in run['config'].items() if key != 'randomness'}
            groups.setdefault(json.dumps([settings, config], sort_keys=True), []).append((path, settings))
    every = [members[0][1] for members in groups.values()]
    keys = dict.fromkeys(key for settings in every for key in settings)
    differ = [key for key in keys if any(each.get(key) != every[0].get(key) for each in every)] or ['strategy']
    for members in groups.values():
        path, settings = members[0]
        label = ', '.join(('' if key in ('strategy', 'unit') else f'{key}=') + in_words(settings.get(key))
                          for key in differ)
        if label in result:  # then their configs differ
            label = f'{label} ({osp.basename(osp.abspath(path))})'
        result[label] = [path for path, _ in members]
    return result


def groups_table(groups: dict[str, np.ndarray], metric: str, full: float | None, target: float | None = None
                 ) -> prettytable.PrettyTable:
    """One row a group: the metric at its end, area under the curve, labels needed for 90 and 95 % of full supervision;
    means and standard deviations over seeds, or how many of the seeds came that far; and what a target would take."""
    levels = {f'% for {level:.0%} of full': level * full for level in (.9, .95)} if full else {}
    table = prettytable.PrettyTable(
        ['runs', 'seeds', 'rounds', '% labelled', f'last {metric}', 'area under curve', *levels], align='r')
    table.align['runs'] = 'l'
    for label, curves in groups.items():
        share_R, last_S = curves[:, 0].mean(0), curves[:, 2, -1]
        table.add_row([label, *curves.shape[::2], f'{share_R[0]:.4g} to {share_R[-1]:.4g}', mean_and_std(last_S),
                       mean_and_std([area_under_curve(share, values) for share, _, values in curves]),
                       *(mean_and_std([share_needed(share, values, level) for share, _, values in curves])
                         for level in levels.values())])
    if target:
        table.add_column(f'% for {target:.4g}, 5 to 95 % likely', [
            forecast(target, curves[:, 0].mean(0), curves[:, 2].mean(0)) for curves in groups.values()], 'r')
    return table


def forecast(target: float, share_R: np.ndarray, values_R: np.ndarray) -> str:
    """The labelled share that a target takes, in words."""
    done = share_needed(share_R, values_R, target)
    if math.isfinite(done):
        return f'{done:.4g} (reached)'
    low, middle, high = likely_labels(target, share_R, values_R)
    return f'{middle:.4g} ({low:.4g} to {high:.4g})' if math.isfinite(high) else 'cannot tell yet'


def likely_labels(target: float, share_R: np.ndarray, values_R: np.ndarray) -> tuple | np.ndarray:
    """Labelled shares that the one a target takes is below with 5, 50 and 95 %; infinity where nothing can be told."""
    return (math.inf, ) * 3 if len(share_R) < 4 else np.quantile(
        labels_to(target, share_R, values_R), (.05, .5, .95), method='inverted_cdf')


def area_under_curve(share_R: np.ndarray, values_R: np.ndarray) -> float:
    """The metric's mean height between the first and the last labelled share, by the trapezoid rule."""
    if len(share_R) < 2:
        return math.nan
    return float((values_R[1:] + values_R[:-1]) / 2 @ np.diff(share_R) / (share_R[-1] - share_R[0]))


def share_needed(share_R: np.ndarray, values_R: np.ndarray, level: float) -> float:
    """The labelled share at which the metric, linear between rounds, first reaches a level; not a number if never."""
    reached = np.flatnonzero(values_R >= level)
    if not len(reached):
        return math.nan
    around = slice(max(0, reached[0] - 1), reached[0] + 1)
    return float(np.interp(level, values_R[around], share_R[around]))


def labels_to(target: float, share_R: np.ndarray, values_R: np.ndarray, draws: int = 4000) -> np.ndarray:
    """Labelled shares at which a run that goes on as before would first show a metric, as samples: rounds that are to
    come are drawn from fits of a + b (1 - x^-c) / c to the curve, from logarithm (c = 0) to power law, each as likely
    as it fits, with the scatter around them. A round weighs 0.7 of the next, and 2 % of the metric as the scatter as
    much as four rounds. (draws,) infinity where it does not within ten times the labels of now."""
    rng, step, fits = np.random.default_rng(0), share_R[-1] - share_R[-2], []
    weight_R = .7**np.arange(len(share_R))[::-1]
    n, root_R = weight_R.sum(), np.sqrt(weight_R)
    share_T = np.arange(share_R[-1], min(100, 10 * share_R[-1]) + step / 2, step)  # the last round and those to come
    for c in (0, .25, .5, 1, 2):
        shape_R, shape_T = (np.log(x) if c == 0 else (1 - x**-c) / c for x in (share_R, share_T))
        middle = weight_R @ shape_R / n
        spread = np.sqrt(weight_R @ (shape_R - middle)**2 / n)
        basis_R, basis_T = (np.c_[np.ones(len(shape)), (shape - middle) / spread] for shape in (shape_R, shape_T))
        best = np.linalg.lstsq(root_R[:, None] * basis_R, root_R * values_R)[0]
        fits.append((best, weight_R @ (values_R - basis_R @ best)**2 + 4 * (.02 * target)**2, basis_T))
    odds, samples = np.array([rest for _, rest, _ in fits])**(-(n + 3) / 2), []
    for (best, rest, basis_T), number in zip(fits, rng.multinomial(draws, odds / odds.sum())):
        noise_S1 = np.sqrt(rest / rng.chisquare(n + 3, (number, 1)))
        line_S2 = best + rng.standard_normal((number, 2)) * noise_S1 / math.sqrt(n)
        values_ST = line_S2 @ basis_T.T + noise_S1 * rng.standard_normal((number, len(share_T)))
        values_ST[:, 0] = values_R[-1]
        samples += [share_needed(share_T, values_T, target) for values_T in values_ST]
    return np.nan_to_num(samples, nan=math.inf)


def mean_and_std(values: list) -> str:
    if not np.isfinite(values).all():
        return f'- ({np.isfinite(values).sum()} of {len(values)})' if np.isfinite(values).any() else '-'
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else '')


def draw_curves(groups: dict[str, np.ndarray], metric: str, full: float | None) -> figures.Figure:
    """The metric over the labelled share and, where there are any, over clicks: means, and one standard deviation."""
    has_clicks = any(np.isfinite(curves[:, 1]).any() for curves in groups.values())
    xlabels = ['labelled share (%)', 'clicks'][:1 + has_clicks]
    figure = figures.Figure((5.6 * len(xlabels), 3.8), dpi=120, layout='constrained')
    for row, axes in enumerate(figure.subplots(1, len(xlabels), squeeze=False)[0]):
        for shift, ((label, curves), style) in enumerate(zip(groups.items(), styles(groups)), -(len(groups) // 2)):
            draw_curve(axes, curves[:, row].mean(0), curves[:, 2], 3 * shift, **style,
                       label=f'{label} ({len(curves)} seeds)' if len(curves) > 1 else label)
        tidy(axes, legend=False, xlabel=xlabels[row], ylabel=metric)
        draw_levels(axes, {} if full is None else {f'full supervision: {full:.2f}': full})
    figure.legend(*axes.get_legend_handles_labels(), loc='outside upper left', ncols=len(xlabels), frameon=False,
                  fontsize=9)
    return figure


def draw_curve(axes, x_R: np.ndarray, values_SR: np.ndarray, shift: float, **style) -> None:
    """The mean over seeds and, of several, one standard deviation as bars, which other curves' do not hide: all of it
    stands some points (1/72 inch) aside."""
    mean_R = values_SR.mean(0)
    std_R = values_SR.std(0, ddof=1) if len(values_SR) > 1 else 0 * mean_R
    aside = transforms.ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(x_R, mean_R, std_R if std_R.any() else None, elinewidth=1, transform=axes.transData + aside, **style)
    # the axes know nothing of what stands aside
    axes.update_datalim(np.c_[[*x_R, *x_R], [*(mean_R - std_R), *(mean_R + std_R)]])
    axes.autoscale_view()


def draw_levels(axes, levels: dict[str, float]) -> None:
    """Lines at some heights, and above each what it is. Then the axis gets room for that, and shows at least a quarter
    of what it reaches: else a run that stands still would look like a crash."""
    for text, level in levels.items():
        axes.axhline(level, color='#606060', linestyle=':', zorder=1)
        axes.annotate(text, (.01, level), (0, 2), ('axes fraction', 'data'), 'offset points', size=8, color='#606060')
    low, high = axes.get_ylim()
    high = max(high, max(levels.values(), default=low) + .1 * (high - low))
    axes.set_ylim(min(low, high - abs(high) / 4), high)


def styles(labels: Iterable[str]) -> list[dict]:
    """Colour, marker and line of each label: of the strategy that it names, or else by its letters. One that is taken
    gives way to the next whose colour is free."""
    taken, result, labels = {}, {}, list(labels)
    named = {label: [STYLED.index(word) for word in re.findall(r'\w+', label) if word in STYLED] for label in labels}
    for label in sorted(labels, key=lambda label: not named[label]):
        i = (named[label] or [zlib.crc32(label.encode())])[0]
        i = min(range(i, i + 56), key=lambda i: (i % 56 in taken, i % 7 in taken.values(), i)) % 56
        taken[i] = i % 7
        result[label] = dict(color=COLOURS[i % 7], marker=MARKERS[i % 8], linestyle=('-', '--', '-.', ':')[i // 7 % 4])
    return [result[label] for label in labels]


def tidy(axes, legend: bool = True, **labels) -> None:
    axes.set(**labels)
    axes.grid(alpha=.3)
    axes.spines[['top', 'right']].set_visible(False)
    if legend:
        axes.legend(frameon=False)


# Okabe & Ito's, which colour-blind people tell apart, with a grey for their black, and less the yellow
COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#606060'
MARKERS = 'os^Dv<>X'
STYLED = [  # strategies by colour, one row a kind of line: seven columns and eight markers
    'entropy', 'real', 'margin', 'coreset', 'badge', 'bald', 'random',
    'crc', 'least_confidence', 'classbal', 'power_entropy', 'stochastic_batches', 'ripu', 'variation_ratio',
    'ratio', 'mean_std', 'pixelpick', 'ripu_pixel', 'powerbald', 'contextual_diversity', 'softmaxbald',
    'softrankbald', 'clasp_pe', 'maxherding', 'oreal', 'typiclust', 'balent', 'medoids', 'one_vs_rest']


def curve(rounds: list[dict], metric: str) -> np.ndarray:
    """After each finished round, the labelled share in percent, clicks (not a number for whole images), and a metric.
    (3, R)"""
    done = [(entry['spent'], entry['metrics'][metric]) for entry in rounds if metric in entry.get('metrics', ())]
    return np.array([(spent.get('% of pixels', spent.get('% of images')), spent.get('clicks', math.nan), value)
                     for spent, value in done], float).reshape(-1, 3).T


def full_level(curves: list[np.ndarray]) -> float | None:
    """The mean metric of those runs that have come to label everything, or None."""
    values = [each[2, -1] for each in curves if each.size and each[0, -1] == 100]
    return float(np.mean(values)) if values else None


def main_metric(rounds: list[dict], stop: dict | None) -> str | None:
    """The metric to look at: that of ``al.stop``, mIoU, or the first there is."""
    have = list(rounds[0].get('metrics', ()))
    return next((metric for metric in ((stop or {}).get('metric'), 'mIoU', *have) if metric in have), None)


# ---------------------------------------------------------------------------------------------------------------------
# Where a run stands
# ---------------------------------------------------------------------------------------------------------------------


def status(path: str) -> str:
    """Where a run stands, what it waits for, and the command to go on; of a folder of runs, a table of them."""
    runs = [osp.dirname(file) for depth in ('*', '*/*') for file in glob.glob(
        osp.join(glob.escape(path), depth, STATE_FILE))]
    if runs and not osp.isfile(osp.join(path, STATE_FILE)):
        return str(runs_table(path, sorted(runs)))
    run = read_run(path)
    done = [entry for entry in run['rounds'] if 'metrics' in entry]
    above, below = around_tables(path, run)
    return '\n'.join([*above, *([str(rounds_table(done))] if done else []),
                      'What labels cost:', str(costs_table(path, run)), *below])


def around_tables(path: str, run: dict) -> tuple[list[str], list[str]]:
    """What ``status`` says of a run above its tables, and below them."""
    k, al = run['round'], run['settings']
    phase = f'{PHASES.get(run["phase"], run["phase"])}; it last wrote {silent_for(path):.0f} s ago'
    config = max(glob.glob(osp.join(glob.escape(path), '*.py')), key=osp.getmtime, default='<config>')
    when = 'To go on with more `al.rounds`' if run['ended'] else \
        'With the labels in place' if run['phase'] == 'label' else 'If it has stopped, go on with'
    warned = {}
    for i, entry in enumerate(run['rounds']):
        for text in entry.get('warnings', ()):
            warned.setdefault(text, []).append(str(i))
    return [f'{path}: {in_words(al["strategy"])}, unit {in_words(al["unit"])}, seed {run["seed"]}',
            f'Ended after round {k}: {run["ended"]}' if run['ended'] else f'Round {k} of {al["rounds"]}: {phase}',
            *labels_of(path, run)], [
        *(f'Warning in round {", ".join(rounds)}: {text}' for text, rounds in warned.items()),
        f'{when}: bash dist_al_train.sh {config} <GPUs> --work-dir {path} --resume']


def runs_table(folder: str, paths: list[str]) -> prettytable.PrettyTable:
    """The runs of a folder, one row each: how far it is, what it has come to, and what it waits for."""
    table = prettytable.PrettyTable(['run', 'strategy', 'unit', 'round', 'metric', 'last wrote', 'it'], align='l')
    for path in paths:
        name, ago = osp.relpath(path, folder), f'{datetime.timedelta(seconds=round(silent_for(path)))} ago'
        try:
            run = read_run(path)
        except ValueError as error:
            table.add_row([name, *'----', ago, error])
            continue
        al, done = run['settings'], [entry for entry in run['rounds'] if 'metrics' in entry]
        metric = done and main_metric(done, al.get('stop'))
        waits = f'waits for labels of {units_of(run["rounds"][-1])} {in_words(al["unit"]).partition("(")[0]}s'
        table.add_row([name, in_words(al['strategy']), in_words(al['unit']), f'{run["round"]} of {al["rounds"]}',
                       f'{metric} {done[-1]["metrics"][metric]:.2f} (round {len(done) - 1})' if metric else '-', ago,
                       f'has ended: {run["ended"]}' if run['ended'] else waits if run['phase'] == 'label' else
                       f'is {PHASES.get(run["phase"], run["phase"])}, or has stopped'])
    return table


def silent_for(path: str) -> float:
    """How many seconds ago a run wrote its state or a log."""
    logs = [log for depth in ('*', '*/*') for log in glob.glob(osp.join(glob.escape(path), depth, '*.log'))]
    return time.time() - max(map(osp.getmtime, [osp.join(path, STATE_FILE), *logs]))


def labels_of(work_dir: str, run: dict) -> list[str]:
    """What is labelled and, of people's labels, how much of what was asked for is there: as the run last saw it, for it
    alone can tell what is right."""
    rounds, k = run['rounds'], run['round']
    waits, unit = run['phase'] == 'label', in_words(run['settings']['unit']).partition('(')[0]
    spent = rounds[-1 - waits]['spent'] if len(rounds) > waits else {}
    lines = ['Labelled: ' + (', '.join(f'{value} {key}' for key, value in spent.items()) or 'nothing yet')]
    if waits:
        folder, asked = osp.join(work_dir, f'round_{k}'), rounds[-1]['asked']
        inbox = [osp.relpath(path, osp.join(folder, 'labels')) for path in glob.glob(
            osp.join(glob.escape(folder), 'labels', '**', '*.*'), recursive=True)]
        path, seen = osp.join(folder, 'to_label', 'delivered.json'), {}
        if osp.isfile(path):
            with open(path, encoding='utf-8') as file:
                seen = json.load(file)
        wrong = [report['wrong'] for report in seen.values() if report['wrong']]
        lines += [
            f'Asked for: {units_of(rounds[-1])} {unit}s in {len(asked)} images',
            f'Delivered: {len({osp.splitext(path)[0] for path in inbox} & set(asked))} files in {folder}/labels; when '
            f'the run last looked, {sum(report["accepted"] for report in seen.values())} {unit}s were accepted, '
            f'{len(wrong)} files wrong', *(f'Wrong: {why}' for why in wrong[:10])]
    unchanged = [f'{entry["unchanged"]} of {units_of(entry)} in round {i}'
                 for i, entry in enumerate(rounds) if entry.get('unchanged')]
    return lines + [f'Labelled as the model had predicted: {", ".join(unchanged)}'] * bool(unchanged)


def units_of(entry: dict) -> int:
    """How many units a round asked for."""
    return sum(units[0] if units else 1 for units in entry['asked'].values())


PHASES = dict(train='training on what is labelled', query='scoring the pool',
              label='waiting for the labels that to_label/ in its folder asks for')


def rounds_table(rounds: list[dict]) -> prettytable.PrettyTable:
    """Finished rounds, one row each."""
    metrics = list(dict.fromkeys(key for entry in rounds for key in entry['metrics']))
    spent = [*rounds[-1]['spent']]  # an older version's may be others
    columns = ['round', *spent, *metrics, 'train s', 'query s', 'changed']
    table, marks = prettytable.PrettyTable(columns, align='r', none_format='-'), changes(rounds)
    for k, (entry, words) in enumerate(zip(rounds, marks)):
        table.add_row([k, *map(entry['spent'].get, spent), *map(entry['metrics'].get, metrics), entry['train_seconds'],
                       entry.get('query_seconds'), words])
    if not any(marks):
        table.del_column('changed')
    return table


def of_one_pool(rounds: list[dict], images: int | None, pixels: int | None) -> list[dict]:
    """Rounds whose shares are all of the images, or pixels, that there are now: others may have joined since."""
    totals = {'% of images': ('images', images, 2), '% of pixels': ('pixels', pixels, 3)}

    def share(key: str, spent: dict) -> float:
        of, total, digits = totals.get(key, (None, None, None))
        return round(100 * spent[of] / total, digits) if total else spent[key]

    return [{**entry, 'spent': {key: share(key, entry['spent']) for key in entry['spent']}} for entry in rounds]


def costs_table(work_dir: str, run: dict) -> prettytable.PrettyTable:
    """What each round has asked for, in all, and about what the rest will, as queries have been so far: with
    ``al.prices`` in the user's own money or time, too."""
    al, sizes = run['settings'], {}
    prices = al.get('prices') or {}
    with contextlib.suppress(OSError, ValueError), open(osp.join(work_dir, 'sizes.json')) as file:
        sizes = {name: size[-2] * size[-1] for name, size in json.load(file).items()}
    costs = [cost_of_round(entry, sizes) for entry in run['rounds']]
    rows = {str(k): cost for k, cost in enumerate(costs)}
    rows['so far'] = [None if None in column else sum(column) for column in zip(*costs)]
    budget = al.get('budget', ())
    left = (budget if isinstance(budget, list) else [budget] * al['rounds'])[len(costs) - 1:al['rounds']]
    if left and not run['ended']:
        past = [sum(each or 0 for each in column) for column in zip(*(costs[1:] or costs))]
        rows['to come, about'] = cost_to_come(left, past, run, al.get('per_image'))
    table = prettytable.PrettyTable(['round', 'images opened', 'units', 'clicks', 'pixels'] + [
        f'cost in {prices.get("unit", "units")}'] * bool(prices), align='r', none_format='-')
    for what, (images, units, clicks, pixels) in rows.items():
        table.add_row([what, images, units, clicks, pixels] + [cost_of(prices, images, clicks, pixels)] * bool(prices))
    return table


def cost_of_round(entry: dict, sizes: dict[str, int]) -> list:
    """What a round has asked for: images that were opened, units, clicks (one a unit; None for whole images) and
    pixels (None where sizes of images are not known)."""
    asked = entry['asked']
    pixels = sum(units[1] if units else sizes.get(name, math.nan) for name, units in asked.items())
    clicks = sum(units[0] for units in asked.values() if units) if 'pixels' in entry else None
    return [len(asked), units_of(entry), clicks, None if pixels != pixels else pixels]


def cost_to_come(left: list, past: list, run: dict, per_image: bool) -> list:
    """What the rounds that are left will ask for.

    Args:
        left: Their budgets.
        past: Images, units, clicks and pixels of queries so far.
    """
    images, units, clicks, pixels = past
    each, total, all_pixels = pixels / max(1, units), run['images'], run.get('pixels')
    if all_pixels is None:
        n = sum(amount if isinstance(amount, int) else max(1, round(amount * total)) for amount in left)
        return [n, n, None, round(n * each) if pixels else None]
    buys = total if per_image else 1
    n = round(sum(amount * (buys if isinstance(amount, int) else all_pixels / max(1, each)) for amount in left))
    opened = min(len(left) * total, round(n * images / max(1, units)))
    return [opened, n, n, round(n * each)]


def cost_of(prices: dict, images: int, clicks: int | None, pixels: int | None) -> float:
    """What that comes to in the user's own prices."""
    amounts = dict(image=images, click=clicks or 0, pixel=pixels or 0)
    return round(sum(prices.get(what, 0) * amount for what, amount in amounts.items()), 2)


def changes(rounds: list[dict]) -> list[str]:
    """What is another in each round than in the one before: the strategy that asked, from the second query on, and keys
    of the config, of which `model` and the schedule are some."""
    asked_by = [None, None, *(entry.get('strategy') for entry in rounds[1:])]  # before the first there is none
    return [', '.join([in_words({key: value for key, value in entry['strategy'].items() if key == 'type'})
                       for _ in range(before not in (None, {}, entry.get('strategy')))] + entry.get('changed', []))
            for before, entry in zip(asked_by, rounds)]


def in_words(setting) -> str:
    """A setting in few words: ``name``, or ``name(option=value)``."""
    if not isinstance(setting, dict) or 'type' not in setting:
        return str(setting)
    options = ', '.join(f'{key}={option}' for key, option in setting.items() if key != 'type' and option is not None)
    return f'{setting["type"]}({options})' if options else setting['type']


def read_run(work_dir: str) -> dict:
    """What a run's state file holds: of any schema as of 3, as far as it is looked at here.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of a newer schema.
    """
    path, images = osp.join(work_dir, STATE_FILE), set()
    if not osp.isfile(path):
        raise FileNotFoundError(f'{work_dir} should be the --work-dir of a run, but there is no {STATE_FILE} in it')
    try:
        with open(path, encoding='utf-8') as file:
            run = json.load(file)
        if run['schema'] > 3:
            raise ValueError(f'its schema {run["schema"]} is newer than this al_report.py: use the one of the '
                             'project that wrote it')
        for entry in run['rounds']:
            if isinstance(entry['asked'], list):  # whole images
                entry['asked'] = dict.fromkeys(entry['asked'])
            images.update(entry['asked'])
            entry.setdefault('spent', entry.get('labelled', dict(images=len(images))))
        run['rounds'] = of_one_pool(run['rounds'], run.get('images'), run.get('pixels'))
        all_done = run['phase'] == 'query' and run['round'] >= run['settings']['rounds']
        run.setdefault('ended', f'{run["round"]} of {run["round"]} rounds of queries are done' if all_done else None)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} cannot be read ({type(error).__name__}: {error})') from error
    return run


STATE_FILE = 'al_state.json'


# ---------------------------------------------------------------------------------------------------------------------
# Files, classes
# ---------------------------------------------------------------------------------------------------------------------


def keep(state: al_patch.State, name: str, value) -> None:
    """Write a JSON file in the folder of the state's round."""
    al_patch.write_atomically(osp.join(state.folder(), name), json.dumps(value, sort_keys=True))


def kept(state: al_patch.State, name: str, rounds: int) -> list:
    """What each of the first rounds keeps in its file of that name; an empty dict where there is none."""
    paths = [osp.join(state.folder(k), name) for k in range(rounds)]
    return [mmengine.load(path) if osp.isfile(path) else {} for path in paths]


def show(state: al_patch.State, figure: figures.Figure, path: str, tag: str) -> None:
    """Write a figure, and hand it to the run's visualizer."""
    png = rendered(figure)
    os.makedirs(osp.dirname(path), exist_ok=True)
    al_patch.write_atomically(path, png)
    tag = 'al_' + re.sub(r'[^\w.-]+', '_', tag)  # without slashes: LocalVisBackend makes a file name of it
    state.runner.visualizer.add_image(tag, mmcv.imfrombytes(png, channel_order='rgb'), step_of(state))


def step_of(state: al_patch.State) -> int:
    """The step of scalars and figures: how many units, or images, are labelled."""
    return state.entry['spent'][f'{state.al.unit.type}s']


def add_scalars(state: al_patch.State, scalars: dict[str, float]) -> None:
    """Hand numbers to the run's visualizer, over the number of labelled images or units."""
    state.runner.visualizer.add_scalars({f'al/{key}': float(value) for key, value in scalars.items()
                                         if np.isfinite(value)}, step=step_of(state))


def save_figure(figure: figures.Figure, path: str) -> None:
    save_file(rendered(figure, osp.splitext(path)[1][1:] or 'png'), path)


def save_file(content: bytes, path: str) -> None:
    """Write a file, as a whole or not at all; what a kill leaves, the next start of a run removes by its name. (It is
    ``al_patch.write_atomically``'s work, which ``compare`` does without, because it would import torch.)"""
    temporary = f'{path}.al.tmp'
    os.makedirs(osp.dirname(osp.abspath(path)), exist_ok=True)
    with open(temporary, 'wb') as file:
        file.write(content)
    os.replace(temporary, path)


def write_csv(path: str, rows: list) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    al_patch.write_atomically(path, text.getvalue())


def rendered(figure: figures.Figure, kind: str = 'png') -> bytes:
    content = io.BytesIO()
    for text in figure.findobj(lambda artist: hasattr(artist, 'set_parse_math')):
        text.set_parse_math(False)  # a name may hold two dollars
    figure.savefig(content, format=kind)
    return content.getvalue()


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """How many labels there are of every class; void is none. (C,)"""
    return np.bincount(labels[(labels >= 0) & (labels < classes)], minlength=classes)


if __name__ == '__main__':
    gc.disable()  # it looks at all of matplotlib again and again; idle BLAS threads cost even more CPU time
    os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
    main()
