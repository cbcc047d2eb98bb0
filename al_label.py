"""What people are given when a run asks for labels, in ``round_<k>/to_label``: what to label, as masks and as pictures,
label maps to start from, and the same for CVAT and Label Studio. And what comes back: label files in
``round_<k>/labels``, and the store in ``labels`` that keeps them for training.

Beside ``al_patch.py`` it attaches itself to every run. By hand it writes again what failed or was deleted, sets a run
back to a round, or takes images out of it:

    python al_label.py export WORK_DIR
    python al_label.py rewind WORK_DIR K
    python al_label.py drop WORK_DIR IMAGE ...

And it answers what a team asks without a run:

    python al_label.py ask CONFIG CHECKPOINT --images FOLDER --budget N --out DIR      which of these images next?
    python al_label.py dataset WORK_DIR --out DIR                                       where is what we have paid for?
    python al_label.py suspects WORK_DIR --budget N --out DIR                           which labels look wrong?
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import os.path as osp
import pathlib
import re
import shutil
import tempfile
import time
import zipfile
from typing import TYPE_CHECKING, Callable, Iterator
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from al_patch import Pool, State

# ---------------------------------------------------------------------------------------------------------------------
# When: as a round asks, or on demand
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def hook() -> Hook:
    """The hook that exports when a round asks. A run that is resumed while it waits asks again: then only what was not
    finished is exported."""
    import mmengine.hooks

    import al_patch

    def human(accept_partial=False, accept_unchanged=False, unlabelable=None) -> None:
        """The options of people who label.

        Args:
            accept_partial: Go on with what there is; what is not labelled goes back to the pool.
            accept_unchanged: Take a file that was not touched since it was exported for an answer.
            unlabelable: The value of a label file for what was looked at and is of no class.
        """

    human.__annotations__.update(accept_partial=al_patch.Flag, accept_unchanged=al_patch.Flag,
                                 unlabelable=al_patch.MaybeCount)
    al_patch.ORACLES['human'] = human

    class LabelHook(mmengine.hooks.Hook):

        def after_al_ask(self, state: State, trainer: Runner | None) -> None:
            if state.phase == 'label' and not al_patch.on_all_ranks(lambda _: is_finished(state), ['rank 0'])['rank 0']:
                export(state, trainer)

        def before_al_run(self, state: State) -> None:
            if state.is_human and state.al.oracle.unlabelable is not None:
                check_unlabelable(state)

        def accept_labels(self, state: State, is_asking: bool = False) -> None:
            accept_labels(state, is_asking)

        def before_al_wait(self, state: State) -> None:
            log_request(state)

    return LabelHook()


def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(prog='al_label.py', description='What a run of active learning gives to people')
    commands = parser.add_subparsers(required=True, dest='command')
    for function, what in ((export_again, 'write again what a run that waits for labels asks for, in its folder'),
                           (rewind, 'set a run back to a round; later ones are moved aside, and their labels are kept'),
                           (drop, 'take images out of a run: their cost stays in its figures, nothing else changes')):
        command = commands.add_parser(function.__name__.split('_')[0], help=what, description=what)
        command.add_argument('work_dir', metavar='WORK_DIR')
        command.set_defaults(function=function)
        if function is rewind:
            command.add_argument('round', metavar='K', type=int, help='the round that asks anew')
            command.add_argument('--train', action='store_true', help='train round K anew, too')
        elif function is drop:
            command.add_argument('names', metavar='IMAGE', nargs='+', help='as the state file spells it')
    add_team_commands(commands)
    options = vars(parser.parse_args(argv))
    name, function = options.pop('command'), options.pop('function')
    try:
        print(function(**options))
    except Exception as error:
        parser.exit(2, f'al_label.py {name}: {" ".join(str(error).split()) or repr(error)}\n')


def export_again(work_dir: str) -> str:
    import al_patch
    state = waiting_run(work_dir)
    with al_patch.checkpoints_are_data():
        export(state)
    return f'What round {state.round} asks for is in {folder_of(state)}'


def rewind(work_dir: str, round: int, train: bool = False) -> str:
    """Set a run back to a round, which then asks anew, or trains anew. What came later is moved to ``rewound_<n>``,
    with the state file as it was; labels stay in the store, where the same request finds them.

    Raises:
        ValueError: There is no such round, or nothing comes after it.
    """
    import al_patch
    with stopped_run(work_dir) as content:
        last, phase = len(content['rounds']) - 1, content['phase']
        if not 0 <= round <= last:
            raise ValueError(f'K should be a round from 0 to {last}, but got {round}')
        entry, folder = content['rounds'][round], pathlib.Path(work_dir, f'round_{round}')
        checkpoints = entry.get('checkpoints', {}).values()
        gone = [file for file in checkpoints if not (folder / osp.basename(file)).is_file()]
        anew = train or bool(gone) or not checkpoints
        if round == last and (phase != 'query' or not train):
            raise ValueError(f'round {round} is the newest, and nothing comes after it (its phase is {phase!r}): '
                             '--resume goes on with it' + ', and --train trains it anew' * (phase == 'query'))
        aside = next(path for n in itertools.count() if not (path := pathlib.Path(work_dir, f'rewound_{n}')).exists())
        aside.mkdir()
        shutil.copy(osp.join(work_dir, al_patch.STATE_FILE), aside)
        for key in ('query_seconds', *('metrics', 'checkpoints', 'train_seconds', 'warnings') * anew):
            entry.pop(key, None)
        content.update(rounds=content['rounds'][:round + 1], round=round, ended=None,
                       phase='train' if anew else 'query')
        if anew and folder.is_dir():  # what it asks people for, and has of them, stays
            (aside / folder.name).mkdir()
            for path in [path for path in folder.iterdir() if path.name not in ('labelled', 'labels', 'to_label')]:
                shutil.move(path, aside / folder.name)
        al_patch.write_state(work_dir, content, [])  # stopped before this, it can be done again
        for k in range(round + 1, last + 1):
            if osp.isdir(later := osp.join(work_dir, f'round_{k}')):
                shutil.move(later, aside)
    return f'{work_dir} is back in round {round}, which {"is trained" if anew else "asks"} anew' + (
        f', as {", ".join(gone)} is gone' if gone else '') + f'; what was there is in {aside}. Go on with --resume'


def drop(work_dir: str, names: list[str]) -> str:
    """Take images out of a run: it neither trains on them nor asks for them. What they cost stays in its figures.

    Raises:
        ValueError: The run knows no image of that name.
    """
    import al_patch
    with stopped_run(work_dir) as content:
        known = {*content['pool'], *(name for entry in content['rounds'] for name in entry['asked'])}
        strange = [name for name in names if name not in known]
        if strange:
            raise ValueError(f'IMAGE should be the name of one in the data set, such as {min(known)!r}, but got '
                             f'{", ".join(map(repr, strange))}')
        content['dropped'] = sorted({*content.get('dropped', ()), *names})
        for entry in content['rounds']:
            entry['held_out'] = [name for name in entry.get('held_out', ()) if name not in names]
        al_patch.write_state(work_dir, content, [])
    return f'{work_dir} goes on without {", ".join(names)}'


@contextlib.contextmanager
def stopped_run(work_dir: str) -> Iterator[dict]:
    """The state of a run, which cannot go on meanwhile.

    Raises:
        RuntimeError: It goes on just now.
    """
    import types

    import mmengine

    import al_patch
    content = al_patch.read_state(osp.join(work_dir, al_patch.STATE_FILE))
    with al_patch.only_run(types.SimpleNamespace(work_dir=work_dir, logger=mmengine.MMLogger.get_current_instance())):
        yield content


def waiting_run(work_dir: str) -> State:
    """The run in a directory, as resuming would open it.

    Raises:
        ValueError: It does not wait for labels, or there is no config; or what resuming would raise.
    """
    from mmengine.config import Config
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    import al_patch
    content = al_patch.read_state(osp.join(work_dir, al_patch.STATE_FILE))
    if content['phase'] != 'label':
        raise ValueError(f'the run in {work_dir} does not wait for labels')
    configs = glob.glob(osp.join(glob.escape(work_dir), '*.py'))
    if not configs:
        raise ValueError(f'{work_dir} does not hold the config, a .py file, that mmengine writes there')
    cfg = Config.fromfile(max(configs, key=osp.getmtime))
    cfg.update(work_dir=work_dir, resume=True, launcher='none')
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    al_patch.attach_companions(runner)  # keys of the `al` block may be theirs
    al, pool = al_patch.parse_settings(cfg.al), al_patch.Pool(cfg, al_patch.unwrap(runner.model))
    state = al_patch.State(content, runner.work_dir, al, runner, pool)
    for check in al_patch.methods_of(runner, 'check_resume'):
        check(state, content)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# What a team asks without a run
# ---------------------------------------------------------------------------------------------------------------------


def add_team_commands(commands: argparse._SubParsersAction) -> None:
    try:
        import al_report
    except ModuleNotFoundError:  # they need it, all else does without
        return

    def command(function: Callable, what: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(function.__name__, help=what, description=what)
        parser.set_defaults(function=function)
        return parser

    asking = command(ask, 'which of these images to label next, by any model of mmseg\'s; DIR is then a run that waits')
    al_report.add_model_arguments(asking)
    asking.add_argument('--images', required=True, metavar='FOLDER', help='to choose from')
    asking.add_argument('--budget', required=True, type=lambda text: al_report.option_of(f'={text}')[1], metavar='N',
                        help='units, or a fraction, as `al.budget`')
    asking.add_argument('--labelled', metavar='FOLDER|SPLIT', help='what is labelled: a folder of other images; or of '
                        'label maps, or masks, <name>.png of some of the same; or a file of names')
    for option, default in dict(strategy='entropy', unit='image').items():
        asking.add_argument(f'--{option}', nargs='+', action=al_report.Setting, default=default, metavar='NAME',
                            help=f'as `al.{option}`: a name, and options as key=value')
    asking.add_argument('--seed', type=int, help="by default the config's, or 0")
    giving = command(dataset, 'all labels of a run as an ordinary data set of mmseg\'s, with a config and an invoice')
    giving.add_argument('--copy', action='store_true', help='images are copied, and not linked')
    giving.add_argument('--parts', type=int, default=1, metavar='N', help='in how many shares people had each round')
    doubting = command(suspects, 'accepted units that the model contradicts, the most certain first; DIR is then a run '
                       'that waits')
    doubting.add_argument('--budget', type=int, default=50, metavar='N', help='units')
    for parser in (giving, doubting):
        parser.add_argument('work_dir', metavar='WORK_DIR')
        parser.add_argument('--out', required=True, metavar='DIR', help='a new folder')


def ask(config: str, checkpoint: str, images: str, budget: float, out: str, labelled: str | None = None,
        strategy: str | dict = 'entropy', unit: str | dict = 'image', seed: int | None = None,
        cfg_options: list = ()) -> str:
    """Choose what to label next, as a run's first query would with this checkpoint. ``out`` is then the work_dir of a
    run whose round 1 waits for labels, with all exports, ``scores.csv`` and ``contact_sheet.png``.

    Raises:
        ValueError: A setting or a file that cannot be used; nothing is left in ``out`` then.
    """
    import al_patch
    import al_report
    if al_patch.resolve_strategy(strategy).calibration:
        raise ValueError('--strategy should do without labels that were held out of the training, but got '
                         f'{al_patch.split_setting(strategy)[0]!r}')
    with al_report.new_folder(out), al_patch.checkpoints_are_data():
        others = labelled and osp.isdir(labelled) and not is_of(images, labelled)
        state = al_report.state_of_model(config, checkpoint, out, [images, labelled] if others else [images],
                                         cfg_options, seed, strategy=strategy, unit=unit, budget=budget, oracle='human')
        al_report.check_model(state)
        note_labelled(state, labelled, others)
        asked = al_patch.query(state, state.runner)
        units = sum(units_in(asked, name) for name in asked)
        if not asked or isinstance(budget, int) and units < budget and not state.collector.is_capped:
            raise ValueError(f'--budget should be at most the {units} {state.al.unit.type}s that are not labelled, but '
                             f'got {budget}')
        request(state, asked)
    return al_report.last_words(f'{units} {state.al.unit.type}s in {len(asked)} images, see {folder_of(state)}')


def is_of(images: str, labelled: str) -> bool:
    """Whether the files in a folder are of images in another one, by their names.

    Raises:
        ValueError: Some are.
    """
    import al_report
    files = al_report.image_files(labelled)
    have, given = ({osp.splitext(file)[0] for file in each} for each in (al_report.image_files(images), files))
    strange = sorted(given - have)
    if not given or 0 < len(strange) < len(given):
        raise ValueError(f'--labelled should hold label maps of images in {images}, or other images, but '
                         f'{len(strange)} of {len(given)} files have names of no image there' + (
                             f', such as {strange[0]!r}' if strange else ''))
    with Image.open(osp.join(labelled, files[0])) as image:
        if strange and image.mode in '1P':
            raise ValueError(f'--labelled should hold label maps of images in {images}, or other images, but '
                             f'{image.filename} is a map with the name of none there')
    return not strange


def note_labelled(state: State, labelled: str | None, others: bool) -> None:
    """Put what is labelled already into a state's first round: whole images, or masks."""
    import al_patch
    pool, entry = state.pool, state.entry
    if labelled and osp.isdir(labelled) and not others:

        def note(name: str) -> list | None:
            path = osp.join(labelled, f'{name}.png')
            if not osp.isfile(path):
                return [0, 0]
            with al_patch.reading(path):
                with Image.open(path) as image:
                    mask = np.array(image) if image.mode == '1' else load_label(pool, name, path) != pool.ignore_index
                if mask.shape != pool.sizes[name]:
                    raise ValueError(f'its size should be that of its image, {pool.sizes[name]}, but is {mask.shape}')
            if mask.all() or mask.any() and not state.counts_pixels:
                return None
            if mask.any():
                al_patch.write_png(state.mask_path(0, name), mask)
            return [0, int(mask.sum())]

        asked = {name: units for name, units in al_patch.on_all_ranks(note, pool.names).items() if units != [0, 0]}
    elif others:
        asked = {name: None for name in pool.names if pool.where[name][0] == 1}
    elif labelled:
        before, state.al.initial = state.al.initial, labelled
        asked, state.al.initial = al_patch.initial_images(state), before
    else:
        return
    entry['asked'] = asked
    if state.counts_pixels:
        entry['pixels'] = sum(units[1] if units else math.prod(pool.sizes[name]) for name, units in asked.items())
    entry['spent'] = state.spent()


def suspects(work_dir: str, out: str, budget: int = 50) -> str:
    """Find accepted units that the model contradicts, those of the highest loss first. ``out`` is then the work_dir of
    a run that asks for them, with all exports; ``suspects.csv`` and ``pictures`` show what they are labelled as.

    Raises:
        ValueError: Fewer units are labelled, or none; nothing is left in ``out`` then.
    """
    import torch

    import al_patch
    import al_report
    with al_report.new_folder(out), opened_run(work_dir) as run, al_patch.checkpoints_are_data(), torch.no_grad():
        state = doubted(run, out, budget)
        look = second_look()(state, run)
        look.collector.result = functools.cache(look.collector.result)  # which `asked` asks, too
        for name, seen in al_patch.watched(state, 'suspects', look.look(), sum(map(len, look.rounds.values()))):
            look.collector.add(name, *look.candidates(name, seen))
        asked, chosen = look.asked(), look.collector.result()
        if len(chosen.id) < budget:
            raise ValueError(f'--budget should be at most the {len(chosen.id)} {state.al.unit.type}s that are labelled '
                             f'in {work_dir}, but got {budget}')
        request(state, asked)
        order = np.argsort(-chosen.score, kind='stable').tolist()
        rows = [[look.names[chosen.image[i]], int(chosen.id[i]), f'{chosen.score[i]:.4g}'] for i in order]
        al_report.write_csv(osp.join(out, 'suspects.csv'), [
            ['image', 'unit', 'loss', 'label', 'predicted', 'round'], *(
                [name, i, loss, *look.classes[name, i]] for name, i, loss in rows)])
        for name in asked:
            draw_suspects(state, run, name)
    return (f'{len(rows)} {state.al.unit.type}s in {len(asked)} images, see {out}. Mended label maps go into '
            f'{run.folder()}/labels, and --resume takes them')


def doubted(run: State, out: str, budget: int) -> State:
    """The state of a run in ``out`` over the same images, where all that is labelled in the other can be asked for, and
    nothing else."""
    import al_patch
    al = al_patch.parse_settings({**{key: run.al[key] for key in ('unit', 'logits')}, 'rounds': 1, 'budget': budget,
                                  'oracle': 'human', 'seed': run.seed})
    state = al_patch.State(dict(seed=run.seed, config={}), osp.abspath(out), al, run.runner, run.pool)
    state.units = run.units  # superpixels lie there
    kept = [path for k in range(len(run.rounds)) if (path := kept_checkpoint(run, k))]
    if not kept:
        raise ValueError(f'no round of {run.work_dir} is trained yet, or no checkpoint is there: there is no model to '
                         'contradict a label')
    checkpoint, asked = kept[-1], {}
    os.makedirs(state.folder(0))
    os.symlink(checkpoint, osp.join(state.folder(0), osp.basename(checkpoint)))
    state.rounds.append(dict(asked=asked, strategy={}, spent={}, metrics={}, train_seconds=0,
                             checkpoints=dict(last=osp.basename(checkpoint)), pixels=0, void_pixels=0))
    for name in run.pool.names:
        known = known_mask(run, name) if name in run.labelled() else np.zeros(run.pool.sizes[name], bool)
        if not known.all():
            asked[name] = [0, int((~known).sum())] if known.any() and run.counts_pixels else None
            state.entry['pixels'] += int((~known).sum())
            if asked[name]:
                al_patch.write_png(state.mask_path(0, name), ~known)
    state._labelled.clear()
    state.entry['spent'], state.phase = state.spent(), 'query'
    cfg = state.runner.cfg
    cfg.al = al
    cfg.dump(osp.join(out, 'config.py'))
    return state


def kept_checkpoint(run: State, k: int) -> str | None:
    """The last checkpoint of a round, if it is trained and has not been deleted."""
    with contextlib.suppress(FileNotFoundError, KeyError):
        return run.checkpoint(k, 'last')


def known_mask(run: State, name: str, k: int | None = None) -> np.ndarray:
    """What is labelled of an image by a round, or now: of people's, what is accepted, (H, W)."""
    return run.mask(name, k) & (run.stored_label(name)[1] if run.is_human else True)


@functools.cache
def second_look() -> type:
    """A query of what is labelled, whose score is the loss: the class, which needs al_patch."""
    import torch

    import al_patch

    class SecondLook(al_patch.Query):
        """
        Args:
            state: See ``doubted``.
            run: What it doubts.

        Attributes:
            rounds: Round -> the images that it asked for; ``checkpoints``: of each, the last, if it is there.
            classes: Name and unit -> what it is labelled and predicted as, and its round.
        """

        def __init__(self, state: State, run: State):
            super().__init__(state, run.runner)
            self.run, self.classes, labelled = run, {}, {*self.names}
            self.rounds = {k: [name for name in entry['asked'] if name in labelled]
                           for k, entry in enumerate(run.rounds)}
            self.checkpoints = [kept_checkpoint(run, k) for k in range(len(run.rounds))]
            newest = [path for path in self.checkpoints if path][-1]
            self.checkpoints.append(newest)

        def look(self) -> Iterator:
            """The images of each round, as seen by the model that asked for them, which was not trained on them, or by
            the next that is still there; those of the first by the first."""
            for k, names in self.rounds.items():
                self.k = k
                al_patch.load_weights(self.run, next(path for path in self.checkpoints[max(0, k - 1):] if path))
                network = al_patch.Network(self.run.runner, None, self.run.al.logits)
                yield from network.look(self.state, names, [al_patch.to_image], shared=False)

        def candidates(self, name: str, seen) -> tuple:
            state, run, probs_NCHW, units = self.state, self.run, seen.means[-1]['probs_NCHW'], self.state.units(name)
            mine = known_mask(run, name, self.k)
            mine &= ~run.mask(name, self.k - 1) if self.k else True
            label = torch.from_numpy(run.load_label(name).astype(np.int64))
            known = torch.from_numpy(mine) & (label != state.pool.ignore_index)
            label = torch.where(known, label, 0).to(probs_NCHW.device)
            loss_HW = -probs_NCHW[0].gather(0, label[None])[0].clamp_min(1e-12).log().cpu() * known
            sums, shares = (torch.as_tensor(units.values(each.float(), 'mean')) for each in (loss_HW, known))
            values = torch.where(shares > 0, sums / shares.clamp_min(1e-12), -1.)  # void contradicts nothing
            values = values if units.is_dense else values.numpy()
            draw, taken = self.draw_of(name), ~mine if state.counts_pixels else not mine.any()
            ids, values, pixels = units.candidates(values, taken, draw, self.limit(name, units), self.collector.floor,
                                                   self.collector.floor_draw)
            if len(ids):
                void, number = probs_NCHW.shape[1], probs_NCHW.shape[1] + 1
                best = np.argsort(-values, kind='stable')[:self.budget()]
                best.sort()
                shown = [units.histograms(ids[best], each, number).argmax(1) for each in (
                    torch.where(known, label.cpu(), void), torch.where(known, probs_NCHW[0].argmax(0).cpu(), void))]
                names = [*run.classes, *map(str, range(len(run.classes), void)), 'void']
                for i, one, other in zip(ids[best].tolist(), *shown):
                    self.classes[name, i] = names[one], names[other], self.k
            rows = al_patch.Candidates(np.full(len(ids), np.int32(self.position[name])), ids, values, pixels, draw(ids))
            return rows, rows.rows(slice(0)), units.number

    return SecondLook


def draw_suspects(state: State, run: State, name: str) -> None:
    """An image, its labels and what the model predicts, with what is doubted in it, side by side."""
    import mmcv

    import al_patch
    pool, colours = state.pool, np.append(class_colours(state.pool)[1][:, ::-1], [[255] * 3], 0)
    predicted = read_label(png_path(state, 'prediction', name), pool, name)
    labels = [np.where(label == pool.ignore_index, len(colours) - 1, label).clip(0, len(colours) - 1)
              for label in (run.load_label(name).astype(np.int64), predicted.astype(np.int64))]
    mask, image = asked_mask(state, name), pool.load_image(name)
    panels = [overlay(panel, mask) for panel in (image, *(colours[label].astype(np.uint8) for label in labels))]
    path = al_patch.png_path(osp.join(state.work_dir, 'pictures'), name, state.work_dir)
    mmcv.imwrite(np.hstack(panels), path[:-len('png')] + 'jpg')


def request(state: State, asked: dict) -> None:
    """Write what a state's first query has asked for: the state, the exports, scores and a contact sheet."""
    import al_patch
    import al_report
    al_patch.add_round(state, asked)
    export(state, state.runner)

    def write_lists() -> None:
        first = sorted(state.pool.names, key=lambda name: -state.scores.get(name, 0))
        al_report.write_csv(osp.join(state.work_dir, 'scores.csv'), [
            ['image', 'score', f'{state.al.unit.type}s asked'], *(
                [name, state.scores.get(name, ''), units_in(asked, name)] for name in first
                if name in state.scores or name in asked)])
        sheet = al_report.draw_contact_sheet(state.pool, [name for name in first if name in asked], state.scores)
        al_report.save_figure(sheet, osp.join(state.work_dir, 'contact_sheet.png'))

    al_patch.on_rank_0(write_lists)


def units_in(asked: dict, name: str) -> int:
    """How many units a query asks for in an image."""
    ids = asked.get(name, ())
    return 1 if ids is None else len(ids)


def dataset(work_dir: str, out: str, copy: bool = False, parts: int = 1) -> str:
    """Write all that is labelled in a run as a data set: ``img/``, links; ``ann/``, label maps in the values of the
    run's own, void where nothing is labelled; ``round/``, the round of every label, 255 where there is none;
    ``splits/``; ``config.py``, to train on it with mmseg alone; ``labels.csv``, a line an image and round, and
    ``invoice.csv``, a line a round and class. What lies in the inbox is taken first.

    Args:
        parts: In how many shares people were given each round: the invoice has lines of their own for each.

    Raises:
        ValueError: Nothing is labelled, or a label file in the inbox or an image cannot be used.
    """
    import al_patch
    import al_report
    with al_report.new_folder(out), stopped_run(work_dir), opened_run(work_dir) as state:
        if state.is_human:
            accept_labels(state)
            state.save()
        found = al_patch.on_all_ranks(lambda name: write_image(state, name, out, copy), [*state.labelled()], 'Data set')
        found = {name: each for name, each in found.items() if each}
        if not found:
            raise ValueError(f'nothing is labelled in {work_dir} yet: there is no data set')
        write_config(state, out, {name: file for name, (file, _) in found.items()})
        write_tables(state, out, {name: shares for name, (_, shares) in found.items()}, parts)
    return f'{len(found)} labelled images are in {out}, to train with {osp.join(out, "config.py")}'


@contextlib.contextmanager
def opened_run(work_dir: str) -> Iterator[State]:
    """The run in a directory, as resuming would open it; what mmengine logs about that goes elsewhere.

    Raises:
        ValueError: There is no config; or what resuming would raise.
    """
    from mmengine.config import Config

    import al_patch
    import al_report
    content = al_patch.read_state(osp.join(work_dir, al_patch.STATE_FILE))
    configs = glob.glob(osp.join(glob.escape(work_dir), '*.py'))
    if not configs:
        raise ValueError(f'{work_dir} does not hold the config, a .py file, that mmengine writes there')
    cfg = Config.fromfile(max(configs, key=osp.getmtime))
    with tempfile.TemporaryDirectory() as elsewhere:
        cfg.update(work_dir=elsewhere, resume=True, experiment_name=osp.basename(elsewhere))
        runner = al_report.start_quietly(cfg)
        al_patch.attach_companions(runner)  # keys of the `al` block may be theirs
        al, pool = al_patch.parse_settings(cfg.al), al_patch.Pool(cfg, al_patch.unwrap(runner.model))
        state = al_patch.State(content, osp.abspath(work_dir), al, runner, pool)
        state.ended = content['ended']
        al_report.check_pool(state)
        for check in al_patch.methods_of(runner, 'check_resume'):
            check(state, content)
        yield state


def write_image(state: State, name: str, out: str, copies: bool) -> tuple[str, dict] | None:
    """Write an image of a data set, its label map, and the round of each label.

    Returns:
        Its file below ``img``, and for each round that asked for some of it, for each class there, void, and all
        together: pixels and units (None where the run has not noted them). None where nothing is labelled.

    Raises:
        ValueError: The image is several files, or its pipeline reads another label map than was written.
    """
    import al_patch
    pool, past, void = state.pool, copy.copy(state), state.pool.ignore_index
    info, known = pool.info(name), state.mask(name) & (state.stored_label(name)[1] if state.is_human else True)
    if not known.any():
        return None
    path, leaf = al_patch.image_path(info), pool.leaf_of(name)[0]
    if info.get('img_path') != path or 'img_path2' in info:
        raise ValueError(f'the image {name!r} should be one file, to stand in a data set, but is {info["img_path"]!r}')
    label = np.where(known, state.load_label(name).astype(np.int64), void)
    rounds, shares = np.full(label.shape, 255, np.uint8), {}
    for k, entry in enumerate(state.rounds):
        if name in entry['asked']:
            new = known & state.mask(name, k) & ~state.mask(name, k - 1)
            rounds[new], past.rounds = min(k, 254), state.rounds[:k + 1]
            rows = numbers_of_units(past, name)
            classes = {state.classes[c] if c != void else 'void': label == c for c in np.unique(label[new]).tolist()}
            shares[k] = {key: (int((new & where).sum()), rows is not None and len(np.unique(rows[new & where])))
                         for key, where in {**classes, 'all': new}.items()}
    target = al_patch.png_path(osp.join(out, 'img'), name).removesuffix('.png')
    suffix = getattr(leaf, 'img_suffix', None) or osp.splitext(path)[1]
    os.makedirs(osp.dirname(target), exist_ok=True)
    (shutil.copyfile if copies else os.symlink)(osp.abspath(path), target + suffix)
    ann, when = (al_patch.png_path(osp.join(out, kind), name) for kind in ('ann', 'round'))
    write_label(ann, pool, name, label)
    al_patch.write_png(when, rounds)
    if (load_label(pool, name, ann) != label).any():
        raise ValueError(f'the label map of {name!r} should be one that the pipeline of its data set reads, but {ann} '
                         'is read as other classes: are label files in colours?')
    return name + suffix, shares


def numbers_of_units(past: State, name: str) -> np.ndarray | None:
    """The number of the unit of each pixel that the newest round has asked for in an image, (H, W); None where that
    cannot be told any more."""
    if past.entry['asked'][name] is None or name in past.entry.get('ids', {}):
        return unit_rows(past, name)
    units = past.units(name)
    numbers = np.arange(math.prod(units.shape)).reshape(units.shape)
    return getattr(units, 'labels', numbers if getattr(units, 'radius', 0) == 0 else None)


def write_config(state: State, out: str, files: dict[str, str]) -> None:
    """Write the split files of a data set, and the config of training on it with mmseg alone: the run's, with the
    overrides of its newest round."""
    import al_patch
    import al_report
    cfg, pool = copy.deepcopy(state.runner.cfg), state.pool
    cfg.merge_from_dict(al_patch.override_of(state, state.round))
    for key in ('al', 'work_dir', 'experiment_name', 'launcher', 'resume'):
        cfg.pop(key, None)
    given = (cfg.pop('custom_imports', None) or {}).get('imports', [])
    modules = [each for each in ([given] if isinstance(given, str) else given) if each != 'al_patch']
    if modules:
        cfg.custom_imports = dict(imports=modules)
    seed = cfg.get('randomness', {}).get('seed')
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': state.seed if seed is None else seed}

    def listed(leaf: dict, path: str) -> dict:
        if path not in pool.paths:
            return leaf
        number, (leaf, suffix) = pool.paths.index(path), al_report.listing(leaf)
        names = [name for name in pool.names if name in files and pool.where[name][0] == number]
        suffix = suffix if all(files[name] == name + suffix for name in names) else ''
        split = f'splits/train{f"_{number}" * (len(pool.paths) > 1)}.txt'
        write_lines(osp.join(out, split), [files[name].removesuffix(suffix) for name in names])
        if not suffix:  # then a label map is known by the image's whole name
            for name in names:
                path = osp.join(out, 'ann', name)
                os.replace(f'{path}.png', osp.join(out, 'ann', f'{files[name]}.png'))
        return {**leaf, 'data_root': '{{ fileDirname }}', 'ann_file': split, 'img_suffix': suffix,
                'data_prefix': dict(img_path='img', seg_map_path='ann'), 'seg_map_suffix': '.png'}

    cfg.train_dataloader.dataset = al_patch.map_leaves(cfg.train_dataloader.dataset, listed)
    partly = ''
    if state.counts_pixels:
        average_labelled(cfg.model)
        partly = ("# Images are partly labelled: cross entropies are means over labelled pixels here, by mmseg's own "
                  'avg_non_ignore. What a\n# run does beside that needs al_patch: it leaves out images without labels, '
                  'draws crops where labels are, keeps\n# labelled pixels in a resize, and lets any other loss see '
                  'labelled pixels alone.\n')
    for k in range(len(state.rounds)):
        write_lines(osp.join(out, 'splits', f'round_{k}.txt'), [
            name for name in files if name in state.rounds[k]['asked']])
    al_patch.write_atomically(osp.join(out, 'config.py'), (
        f'# All that was labelled in {len(state.rounds)} rounds, for mmseg alone; the schedule of round {state.round}. '
        f'Draws of augmentation are other ones\n# than in the run, and so are the figures, by as much as another seed '
        f'makes.\n{partly}{cfg.pretty_text}'))


def write_lines(path: str, lines: list[str]) -> None:
    import al_patch
    al_patch.write_atomically(path, ''.join(f'{line}\n' for line in lines))


def average_labelled(model: dict | list) -> None:
    """Let cross entropies in a model's config be means over labelled pixels."""
    for part in model.values() if isinstance(model, dict) else model:
        if isinstance(part, (dict, list)):
            average_labelled(part)
    if isinstance(model, dict) and model.get('type') == 'CrossEntropyLoss':
        model['avg_non_ignore'] = True


def write_tables(state: State, out: str, found: dict[str, dict], parts: int) -> None:
    """Write what each image and what each round and class has: ``labels.csv`` and ``invoice.csv``.

    Args:
        found: Name of an image -> round -> class, ``void`` or ``all`` -> pixels and units.
        parts: Shares of a round, by the place of an image in its ``to_label.txt``.
    """
    import al_report
    lines, sums = [], {}
    for name, rounds in found.items():
        source = [*read_json(state.label_path('read', name, '.json'))][-1:]
        for k, shares in rounds.items():
            pixels, units = shares['all']
            part = part_of(state, k, name, parts)
            lines.append([name, k, part, units or '', pixels, shares.get('void', (0, 0))[0], *(source or [''])])
            for key, (pixels, units) in shares.items():
                row = sums.setdefault((k, part, key), [0, 0, 0])
                row[:] = [row[0] + 1, row[1] + units, row[2] + pixels]
    order = {'all': -1, **{name: c for c, name in enumerate(state.classes)}, 'void': len(state.classes)}
    al_report.write_csv(osp.join(out, 'labels.csv'), [
        ['image', 'round', 'share', 'units', 'pixels', 'void pixels', 'newest file'], *lines])
    prices, table = state.al.get('prices') or {}, []
    for (k, part, key), (images, units, pixels) in sorted(sums.items(), key=lambda item: (
            item[0][:2], order.get(item[0][2], 0))):
        clicks = units if state.counts_pixels else 0
        cost = al_report.cost_of(prices, images, clicks, pixels) if prices and key == 'all' else ''
        table.append([k, part, key, images, units or '', clicks or '', pixels, cost,
                      *(state.rounds[k].get(when, '') for when in ('asked_at', 'accepted_at'))])
    al_report.write_csv(osp.join(out, 'invoice.csv'), [
        ['round', 'share', 'class', 'images', 'units', 'clicks', 'pixels', 'cost', 'asked', 'accepted'], *table])


def part_of(state: State, k: int, name: str, parts: int) -> str:
    """The share of a round in which people were given an image."""
    path = pathlib.Path(state.folder(k), 'to_label', 'to_label.txt')
    names = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    return f'{names.index(name) % parts + 1}/{parts}' if name in names else ''


# ---------------------------------------------------------------------------------------------------------------------
# What comes back: label files that people hand in, the store that keeps them, and when a round has enough
# ---------------------------------------------------------------------------------------------------------------------


def check_unlabelable(state: State) -> None:
    """
    Raises:
        ValueError: The value for what is of no class has a meaning already.
    """
    value, pool = state.al.oracle.unlabelable, state.pool
    names, values = class_colours(pool)[0], label_values(pool, pool.names[0])[1]
    known = {int(values[c]): f'the class {name!r}' for c, name in enumerate(names) if c != pool.ignore_index}
    known[int(values[pool.ignore_index])] = 'no label, `ignore_index`'
    if value in known:
        raise ValueError(f'`al.oracle.unlabelable` should be a value that label files do not have, but got {value}, '
                         f'which is {known[value]}')


def accept_labels(state: State, is_asking: bool = False) -> None:
    """Take what people have handed in into the label store. The newest round trains when all that it asked for is
    there or, with ``al.oracle.accept_partial``, when anything is: the rest goes back to the pool.

    Args:
        is_asking: The round begins: it reads no files, but what it asks for may lie in the store, from rounds that were
            undone.

    Raises:
        ValueError: It names the files that are there and wrong. What is right in others is in the store.
    """
    import al_patch
    entry, oracle, inbox = state.entry, state.al.oracle, Inbox(state)
    entry.setdefault('asked_at', now())
    entry.setdefault('ids', {})  # older states have none: what an image was asked for is one unit
    waits = state.phase == 'label'
    names = entry['asked'] if is_asking else state.labelled()
    reports = al_patch.on_all_ranks(lambda name: inbox.take(name, not is_asking), list(names))
    newest = {name: reports[name] for name in entry['asked'] if name in reports}
    accepted, asked = (sum(report[key] for report in newest.values()) for key in ('accepted', 'asked'))
    missing = {name: report['missing'] for name, report in newest.items() if report['missing']}
    wrong = [report['wrong'] for report in reports.values() if report['wrong']]
    if not is_asking:
        inbox.tell(reports, newest)
    elif accepted:
        entry['from_store'] = accepted
        state.logger.info(f'{accepted} of the {asked} units that round {state.round} asks for lie in the label store: '
                          'they are answered from there, and cost nothing again')
    if wrong:
        raise ValueError(f'{len(wrong)} label files cannot be used; all others are accepted. Mend them, and resume: '
                         f'{"; ".join(wrong[:5])}')
    if not waits:
        return
    if missing and not is_asking:
        state.logger.warning(f'{accepted} of {asked} {state.al.unit.type}s are labelled. Not yet: '
                             f'{describe_units(state, missing)}; all in {folder_of(state) / "delivered.json"}')
    if missing and not (accepted and oracle.accept_partial and not is_asking):
        return
    if missing:
        give_back(state, missing)
    entry['unchanged'] = sum(report['unchanged'] for report in newest.values())
    if entry['unchanged'] > .99 * accepted:
        state.logger.warning(f'{entry["unchanged"]} of the {accepted} {state.al.unit.type}s of round {state.round} are '
                             'exactly what the model had predicted: has anybody looked at them?')
    if state.counts_pixels:
        entry['void_pixels'] = sum(report['void'] for report in newest.values())
    state.phase = 'train'
    entry.update(al_patch.hold_out(state), spent=state.spent(), accepted_at=now())


def now() -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S')


def log_request(state: State) -> None:
    """Say what a human is to do, and how to go on."""
    import al_patch
    entry, folder = state.entry, osp.join(state.folder(), 'to_label')
    units = sum(units[0] for units in entry['asked'].values() if units)
    what = f' ({units} {state.al.unit.type}s, {entry["pixels"]} pixels)' if state.counts_pixels else ''
    names = [name for name in entry['asked'] if name not in state.dropped]
    first, own = names[0], state.pool.info(names[0]).get('seg_map_path')
    note = '' if are_grey(state) else '\nPredictions there are numbers of classes, and not the colours of label files'
    state.logger.info(f'Round {state.round} waits for labels in {len(names)} images{what}: see {folder}{note}\nPut '
                      f'each label map into {state.folder()}/labels, the first as {first}.png, or where the data set '
                      f'looks for it, the first at {own}\nThen go on with: {al_patch.resume_command()}')


def give_back(state: State, missing: dict[str, list]) -> None:
    """Return units of the newest round that nobody has labelled to the pool, as if they had not been asked for."""
    import al_patch
    entry, k = state.entry, state.round

    def keep(name: str) -> list | None:
        if name not in entry['ids']:
            return None
        kept = [i for i in entry['ids'][name] if i not in missing[name]]
        new = state.mask_of(name, np.array(kept, int)) & ~state.mask(name, k - 1)
        al_patch.write_png(state.mask_path(k, name), state.mask(name, k - 1) | new)
        return [len(kept), int(new.sum())] if kept else None

    kept = al_patch.on_all_ranks(keep, list(missing))
    state.logger.warning(f'Not labelled in round {k}, and back in the pool: {describe_units(state, missing)}')
    entry['returned'] = {name: entry['asked'][name] and [len(ids), 0] for name, ids in missing.items()}
    for name, units in kept.items():
        if units:
            entry['ids'][name] = [i for i in entry['ids'][name] if i not in missing[name]]
            entry['returned'][name][1] = entry['asked'][name][1] - units[1]
            entry['asked'][name] = units
        else:
            entry['returned'][name] = entry['asked'].pop(name)
            entry['ids'].pop(name, None)
    state._labelled.clear()  # it is another
    if state.counts_pixels:
        entry['pixels'] = sum(units[1] for units in entry['asked'].values())


def describe_units(state: State, units: dict[str, list]) -> str:
    """Images and, below image level, units in them, in words."""
    return in_words({f'{name} ({state.al.unit.type} {", ".join(map(str, ids[:5]))}{" ..." * (len(ids) > 5)})'
                     if state.entry['ids'].get(name) else name: None for name, ids in units.items()})


def in_words(found: dict, what: str = '') -> str:
    """The first of what was found, by name."""
    words = [f'{name} ({value} {what})' if what else f'{name}' for name, value in found.items()]
    return ', '.join(words[:10]) + f' and {len(words) - 10} more' * (len(words) > 10)


def unit_rows(state: State, name: str) -> np.ndarray:
    """For each pixel of an image the position of the unit that the newest round asks for there, or -1, (H, W)."""
    ids = state.entry.get('ids', {}).get(name) if name in state.entry['asked'] else []
    if ids is None:
        return np.where(asked_mask(state, name), 0, -1)
    rows = np.full(state.pool.sizes[name], -1)
    if ids:
        positions, pixels = state.units(name).members(np.array(ids, int))
        rows.reshape(-1)[pixels] = positions
    return rows


class Inbox:
    """What people hand in: a file for an image in ``round_<k>/labels`` or, where none of them has one, that of the data
    set. It is kept in the label store as classes, with what of it is done."""

    def __init__(self, state: State):
        self.state, self.oracle = state, state.al.oracle
        self.exported = read_json(exported_path(state))

    def sources(self, name: str, before: dict) -> list[tuple[str, str]]:
        """Where an image's labels may come from, and the path there: what counts more comes later. A file that is gone
        or empty counts as it was handed in ``before``."""
        found, handed_in = [], False
        for k in range(self.state.round + 1):
            source, stem = f'round_{k}', osp.join(self.state.folder(k), 'labels', name)
            here = [path for path in sorted(glob.glob(f'{glob.escape(stem)}.*')) if osp.splitext(path)[0] == stem and
                    not path.endswith('.tmp') and osp.getsize(path)]
            handed_in |= bool(here)
            if not here and source in before:
                here = [self.state.label_path('handed_in', f'{name}.{before[source]}', '')]
            found += [(source, path) for path in here]
        return found if handed_in and DATA_SET not in before else [
            (DATA_SET, self.state.pool.info(name).get('seg_map_path')), *found]

    def take(self, name: str, reads: bool) -> dict:
        """Keep what is new and right in an image's files, if it ``reads`` any, and compare what is done with what the
        newest round asks for.

        Returns:
            What came of it: how many units were ``asked`` for and ``accepted``, ids of the ``missing``, ``void``
            pixels, units ``unchanged`` from the prediction; pixels ``changed`` in labels that were there before, and
            ``outside`` of what was asked for; a file that is ``untouched`` since it was exported; what is ``wrong``.
        """
        import al_patch
        state, report = self.state, dict(untouched='', changed=0, outside=0, wrong='')
        (classes, done), rows, files = self.stored(name), unit_rows(state, name), []
        labelled = state.mask(name)
        mask = labelled | (rows >= 0)
        if (mask & ~labelled).any():  # stopped while units went back to the pool
            al_patch.write_png(state.mask_path(state.round, name), mask)
        was, had, answered = classes.copy(), done.copy(), np.zeros_like(done)
        try:
            waits = bool(((rows >= 0) & ~done).any())
            for source, path, content, version in self.new_files(name, report, waits) if reads else ():
                labels, known = self.read(name, path, mask)
                if source != DATA_SET:
                    report['outside'] += int((known & ~mask).sum())
                answered |= known & mask
                classes[known & mask] = labels[known & mask]
                files.append((source, content, version))
        except ValueError as error:
            report['wrong'], files = str(error), []
            classes, answered = was, np.zeros_like(done)
        size = np.bincount(rows[rows >= 0])

        def pixels(where_HW: np.ndarray) -> np.ndarray:
            return np.bincount(rows[(rows >= 0) & where_HW], minlength=len(size))

        is_done = (pixels(had) == size) | (pixels(answered) > 0)
        whole = np.append(is_done, False)[rows]  # a unit with a label is done: what has none in it is void
        report['changed'] = int((had & (was != classes)).sum())
        if files:
            self.keep(name, classes, had | answered | whole, files, report['changed'])
        ids = state.entry['ids'].get(name) or [0]
        report.update(asked=len(size), accepted=int(is_done.sum()), missing=[ids[i] for i in np.flatnonzero(~is_done)],
                      void=int((classes[whole] == state.pool.ignore_index).sum()), unchanged=0)
        path = folder_of(state) / 'prediction' / f'{name}.png'
        if len(size) and path.is_file():
            predicted = read_label(str(path), state.pool, name)
            same = (classes == predicted) & (predicted != state.pool.ignore_index)
            report['unchanged'] = int((is_done & (pixels(same) == size)).sum())
        return report

    def stored(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """As ``State.stored_label``.

        Raises:
            ValueError: The store has lost a file, or has one of another image.
        """
        size, paths = self.state.pool.sizes[name], [self.state.label_path(kind, name) for kind in ('classes', 'done')]
        if osp.isfile(self.state.label_path('read', name, '.json')) and not all(map(osp.isfile, paths)):
            raise ValueError(f'{" and ".join(path for path in paths if not osp.isfile(path))} of the label store is '
                             'gone: restore it from a copy')
        stored = self.state.stored_label(name)
        for path, array in zip(paths, stored):
            if array.shape != size:
                raise ValueError(f'{path} cannot be used (its size should be that of its image, {size}, but is '
                                 f'{array.shape}): restore it from a copy')
        return stored

    def new_files(self, name: str, report: dict, is_new: bool) -> Iterator[tuple[str, str, bytes, str]]:
        """An image's files that have something new, and those that count more than these: source, path, content, and
        the name of this version. All of them are ``is_new`` where something is waited for: it may have been in a file,
        kept aside, before anybody asked for it."""
        from mmengine import fileio

        import al_patch
        before = read_json(self.state.label_path('read', name, '.json'))
        for source, path in self.sources(name, before):
            content = b''
            with al_patch.reading(path), contextlib.suppress(FileNotFoundError):  # a data set may have none yet
                content = fileio.get(path) if path else b''
            version = version_of(content)
            if version in self.exported.get(name, ()) and not self.oracle.accept_unchanged:
                report['untouched'] = path
                continue
            version += osp.splitext(path or '')[1]
            is_new |= bool(content) and before.get(source) != version
            if content and is_new:
                yield source, path, content, version

    def read(self, name: str, path: str, mask_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The classes of a label file, and where it has an answer, (H, W) both.

        Raises:
            ValueError: It cannot be read, is of another size, or has a value that is no class under the mask; it names
                the file.
        """
        from mmengine import fileio

        import al_patch
        pool, void_HW = self.state.pool, None
        if self.oracle.unlabelable is not None:
            with al_patch.reading(path), Image.open(io.BytesIO(fileio.get(path))) as image:
                void_HW = np.asarray(image) == self.oracle.unlabelable
            void_HW = void_HW.all(2) if void_HW.ndim > 2 else void_HW
            if void_HW.all() and void_HW.shape == pool.sizes[name]:
                return np.full(void_HW.shape, pool.ignore_index), void_HW
        labels = pool.check_label(name, self.state.class_count, mask_HW, path,
                                  lambda name: load_label(pool, name, path, void_HW))
        known = labels != pool.ignore_index
        return labels, known if void_HW is None else known | void_HW

    def keep(self, name: str, classes: np.ndarray, done: np.ndarray, files: list, changed: int) -> None:
        """Put an image's labels into the store. It is done again until the last file of it is written."""
        from al_patch import write_atomically, write_png
        path, (_, _, newest) = self.state.label_path, files[-1]
        for _, content, version in files:
            kept = path('handed_in', f'{name}.{version}', '')
            if not osp.isfile(kept):
                write_atomically(kept, content)
        if changed:
            kept = path('changed', name, '.json')
            write_atomically(kept, json.dumps({**read_json(kept), newest: changed}))
        depth = np.uint8 if (self.state.class_count or 256) < 256 else np.uint16
        is_void = classes == self.state.pool.ignore_index
        write_png(path('classes', name), np.where(is_void, np.iinfo(depth).max, classes).astype(depth))
        write_png(path('done', name), done)
        kept = path('read', name, '.json')
        before = read_json(kept)
        read = {**before, **{source: version for source, _, version in files}}
        read[files[-1][0]] = read.pop(files[-1][0])  # the newest is last
        write_atomically(kept, json.dumps(read))

    def tell(self, reports: dict, newest: dict) -> None:
        """Say what came of what people handed in, and write it down: of the newest round in ``delivered.json``, and
        which labels of earlier ones it changed in ``label_changes.json``."""
        import al_patch
        state, folder, warn = self.state, folder_of(self.state), self.state.logger.warning
        changed, outside, untouched = ({name: report[key] for name, report in reports.items() if report[key]}
                                       for key in ('changed', 'outside', 'untouched'))
        if al_patch.is_main_process():
            al_patch.write_atomically(folder / 'delivered.json', json.dumps(newest, indent=1))
            root = pathlib.Path(state.work_dir, 'labels', 'changed')
            changes = {str(path.relative_to(root))[:-len('.json')]: json.loads(path.read_text())
                       for path in sorted(root.rglob('*.json'))}
            if changes:
                al_patch.write_atomically(root.parent / 'label_changes.json', json.dumps(changes, indent=1))
        if changed:
            warn(f'Labels that were there have changed, and the newer count: {in_words(changed, "pixels")}; all in '
                 f'{state.work_dir}/labels/label_changes.json, the older files in {state.work_dir}/labels/handed_in')
        if outside:
            state.logger.info('Nobody asked for what lies elsewhere in these files, it is kept aside: '
                              f'{in_words(outside, "pixels")}')
        if untouched:
            warn('Handed in as it was exported, which is no answer (but with `al.oracle.accept_unchanged`): '
                 f'{in_words(untouched)}')
        strange, known = {}, {*reports, *state.dropped}
        for k in range(state.round + 1):
            inbox = pathlib.Path(state.folder(k), 'labels')
            strange.update({str(path): None for path in sorted(inbox.rglob('[!.]*')) if path.is_file() and (
                path.suffix in ('', '.tmp') or str(path.relative_to(inbox).with_suffix('')) not in known)})
        if strange:
            warn(f'Nobody asked for these, they are kept aside: {in_words(strange)}')
        if (folder / 'void.txt').is_file():
            warn(f'{folder / "void.txt"} is not read any more: give what is of no class a value of its own in the '
                 'label file, and name it in `al.oracle.unlabelable`')


def are_grey(state: State) -> bool:
    """Whether what was handed in so far, or nothing yet, has one number a pixel."""
    for name in state.labelled():
        with contextlib.suppress(OSError, LookupError), Image.open(state.stored(name)[1]) as image:
            return len(image.getbands()) == 1
    return True


def load_label(pool: Pool, name: str, path: str, void_HW: np.ndarray | None = None) -> np.ndarray:
    """The classes of a label file of an image, as training reads it, (H, W): by the loaders of its pipeline, and those
    of its steps that map values.

    Args:
        void_HW: Where the file says that no class fits: no step sees that.
    """
    from mmengine.dataset import Compose
    loading, mapping = pool.label_steps(name, seg_map_path=path)
    results = Compose(loading)({**pool.info(name), 'seg_map_path': path})
    label = results['gt_seg_map']
    if void_HW is not None:
        label = results['gt_seg_map'] = label.astype(np.int64)
        label[void_HW] = label[np.unravel_index(void_HW.argmin(), void_HW.shape)]
    label = Compose(mapping)(results)['gt_seg_map']
    if void_HW is not None:
        label[void_HW] = pool.ignore_index
    return label


def version_of(content: bytes) -> str:
    """What tells a file's content from another's."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(path: str) -> dict:
    """What a JSON file holds; nothing, if there is none."""
    from al_patch import reading
    with reading(path):
        return json.loads(pathlib.Path(path).read_text()) if osp.isfile(path) else {}


def exported_path(state: State) -> str:
    """Where a run keeps the versions of all label maps that it has ever given to people to start from, by image."""
    return osp.join(state.work_dir, 'labels', 'exported.json')


DATA_SET, UNLABELABLE = 'data set', 'unlabelable'

# ---------------------------------------------------------------------------------------------------------------------
# What: masks, pictures, label maps to start from
# ---------------------------------------------------------------------------------------------------------------------


def export(state: State, trainer: Runner | None = None) -> None:
    """Write what the newest round asks for. All ranks share the images; ``to_label.txt`` comes last, so that an export
    is finished if it is there. Writing it again replaces each file by the same, and leaves an annotator's alone.

    Args:
        trainer: The runner whose model asked. Without it, it is built as it was.
    """
    import al_patch
    check_names(state)
    folder, names = folder_of(state), names_to_label(state)
    folder.mkdir(parents=True, exist_ok=True)
    if state.counts_pixels:
        al_patch.on_all_ranks(lambda name: write_mask(state, name), names)
    if state.round:  # before round 0 there is no model
        write_predictions(state, trainer, names)

    def write_formats() -> None:
        export_cvat(state, names)
        export_label_studio(state, names)
        al_patch.write_atomically(folder / 'to_label.txt', ''.join(f'{name}\n' for name in names))

    al_patch.on_rank_0(write_formats)  # which can take long


def is_finished(state: State) -> bool:
    """Whether an earlier start of the run has written all of the export."""
    return state.is_resumed and (folder_of(state) / 'to_label.txt').is_file()


def names_to_label(state: State) -> list[str]:
    """The images in which the newest round asks people for something: not those that lie in the store."""
    return [name for name in state.entry['asked'] if name not in state.dropped and mask_to_label(state, name).any()]


def folder_of(state: State) -> pathlib.Path:
    return pathlib.Path(state.folder(), 'to_label')


def mask_to_label(state: State, name: str) -> np.ndarray:
    """What the newest round asks people for in an image: not what the store has already, (H, W)."""
    return asked_mask(state, name) & ~state.stored_label(name)[1]


def asked_mask(state: State, name: str) -> np.ndarray:
    """What the newest round asks for of an image, (H, W) booleans."""
    return state.mask(name) & ~state.mask(name, state.round - 1)


def png_path(state: State, kind: str, name: str) -> str:
    """Where an image has its PNG: ``mask``, ``overlay`` or ``prediction``."""
    import al_patch
    return al_patch.png_path(folder_of(state) / kind, name, state.work_dir)


def write_mask(state: State, name: str) -> None:
    """Write what is asked for of an image, as a mask and as a picture."""
    import mmcv

    import al_patch
    mask, image = mask_to_label(state, name), state.pool.load_image(name)
    al_patch.write_png(png_path(state, 'mask', name), mask)
    mmcv.imwrite(overlay(image, mask), png_path(state, 'overlay', name)[:-len('png')] + 'jpg')


def overlay(image: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """A picture of what is to be labelled: the rest is dimmed, and what is asked for has an outline or, where it is too
    small to be seen, a circle. A small image is enlarged by a whole factor. (H, W, 3) uint8, BGR, as mmcv loads it"""
    image = np.atleast_3d(image)
    picture = image[..., [0, 1, 2] if image.shape[2] >= 3 else [0, 0, 0]]
    if picture.dtype != np.uint8:
        picture = cv2.normalize(picture.astype(np.float32), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    scale = max(1, 800 // max(mask_HW.shape))
    picture, mask_HW = (each.repeat(scale, 0).repeat(scale, 1) for each in (picture, mask_HW))
    picture, side = np.where(mask_HW[..., None], picture, picture // 2), max(mask_HW.shape)
    width = 2 + side // 1000
    wider = cv2.dilate(mask_HW.view(np.uint8), np.ones((4 * width + 1, ) * 2, np.uint8))
    for piece in cv2.findContours(wider, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]:
        (x, y), radius = cv2.minEnclosingCircle(piece)
        for colour, line in ((0, 0, 0), width + 2), ((0, 230, 255), width):
            if radius < side / 40:
                cv2.circle(picture, (round(x), round(y)), round(radius) + side // 80, colour, line, cv2.LINE_AA)
            else:
                cv2.drawContours(picture, [piece], -1, colour, line)
    return picture


def write_predictions(state: State, trainer: Runner | None, names: list[str]) -> None:
    """Write label maps of some images to start from, with what the checkpoint that asked for the round predicts."""
    import torch

    import al_patch
    past = copy.copy(state)
    past.rounds = state.rounds[:-1]
    past.runner = trainer or type(state.runner).from_cfg(al_patch.round_config(past))  # a round may override the model

    @torch.no_grad()
    def write_share(rank: str) -> None:
        al_patch.load_weights(past, past.checkpoint(past.round, state.al.query_with))
        network = al_patch.Network(past.runner, logits_of=state.al.logits)
        for name, seen in network.look(state, names, [al_patch.to_image]):
            write_prediction(state, name, network.classify(seen))

    # one call on each rank, which waits for no other: whatever fails in it, nobody hangs
    al_patch.on_all_ranks(write_share, [str(rank) for rank in range(al_patch.get_dist_info()[1])])
    if al_patch.is_main_process():
        note_exported(state, names)
    if not trainer:
        al_patch.close_round(past.runner)


def note_exported(state: State, names: list[str]) -> None:
    """Note versions of label maps to start from, so that one that comes back untouched is known."""
    import al_patch
    exported = read_json(exported_path(state))
    for name in names:
        version = version_of(pathlib.Path(png_path(state, 'prediction', name)).read_bytes())
        exported[name] = list(dict.fromkeys([*exported.get(name, ()), version]))
    al_patch.write_atomically(exported_path(state), json.dumps(exported, indent=1))


def write_prediction(state: State, name: str, pred_HW: np.ndarray) -> None:
    """Write a label map to start from: the prediction where labels are asked for, what was labelled before, and nothing
    elsewhere. A unit of a single pixel has no prediction: it would be an answer."""
    pool, (classes, done), rows = state.pool, state.stored_label(name), unit_rows(state, name)
    mask = mask_to_label(state, name) & np.append(np.bincount(rows[rows >= 0]) > 1, False)[rows]
    asked = np.where(mask, pred_HW, pool.ignore_index)
    write_label(png_path(state, 'prediction', name), pool, name, np.where(done, classes, asked))


def write_label(path: str, pool: Pool, name: str, label_HW: np.ndarray) -> None:
    """Write a label map, (H, W), in the values of an image's label file and, in 8 bits, the colours of its classes."""
    import al_patch
    values, colours, palette = label_values(pool, name)[1], class_colours(pool)[1], np.zeros((256, 3), np.uint8)
    if len(values) == 256:
        palette[values[:len(colours)]] = colours
    al_patch.write_png(path, values[label_HW], palette if len(values) == 256 else None)


def read_label(path: str, pool: Pool, name: str) -> np.ndarray:
    """The classes of a label map that ``write_label`` wrote, (H, W); ``ignore_index`` everywhere if there is none."""
    if not osp.isfile(path):
        return np.full(pool.sizes[name], pool.ignore_index)
    with Image.open(path) as image:
        return label_values(pool, name)[0][np.asarray(image)]


def label_values(pool: Pool, name: str) -> tuple[np.ndarray, np.ndarray]:
    """How training reads an image's label file, with ``reduce_zero_label``, classes of one's own and steps that map
    values: the class of each value in the file, and the value of each class, (256,) both or, above 255 classes,
    (65536,). ``ignore_index`` counts as a class."""
    return label_values_of(pool, pool.where[name][0])


@functools.lru_cache(8)
def label_values_of(pool: Pool, leaf: int) -> tuple[np.ndarray, np.ndarray]:
    name = next(name for name in pool.names if pool.where[name][0] == leaf)
    depth = np.uint8 if len(class_colours(pool)[0]) < 256 else np.uint16
    ignore = np.array(pool.ignore_index).astype(depth)  # as numpy wraps it, also where it is -1 or 65535
    given = np.arange(np.iinfo(depth).max + 1).astype(depth)
    classes, found = given.copy(), np.zeros(len(given), bool)
    # all at once or, where a step refuses some, one by one; if it refuses all, as with colours, they are classes
    for values in (given, *given[:256, None]):
        if not found.all():
            with contextlib.suppress(Exception):
                classes[values], found[values] = classes_of_values(pool, name, values), True
    classes[~found] = ignore if found.any() else classes[~found]
    of_class = np.full(len(given), ignore, depth)
    known, values = np.unique(classes, return_index=True)  # the smallest, where several stand for one class
    of_class[known] = values
    if classes[-1] == ignore:
        of_class[ignore] = given[-1]
    return classes, of_class


def classes_of_values(pool: Pool, name: str, values_N: np.ndarray) -> np.ndarray:
    """The classes that training reads in a label file of these values, (N,)."""
    pool = copy.copy(pool)
    pool.steps = {}  # of this file: those of the data set's, which may be pictures in colours, are others
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(np.tile(values_N, (2, 2))).save(path := osp.join(folder, 'values.png'))
        return load_label(pool, name, path)[0, :len(values_N)]


# ---------------------------------------------------------------------------------------------------------------------
# The formats of annotation tools
# ---------------------------------------------------------------------------------------------------------------------


def check_names(state: State) -> None:
    """Refuse image names that files with a name a line cannot hold: to_label.txt, and CVAT's default.txt.

    Raises:
        ValueError: It names the image.
    """
    for name in (name for name in state.entry['asked'] if name not in state.dropped):
        for line in name, image_stem(state.pool, name):
            if line.strip().splitlines() != [line] or line.startswith('#'):
                raise ValueError(f'image names should be one line, without spaces around it or # before it, to stand '
                                 f'in to_label.txt and cvat.zip, but got {name!r}: rename the file')


def in_tools(name: str) -> str:
    """A class's name as annotation tools can hold it: without what ends a field or a line of CVAT's labelmap.txt, or
    is no character in XML. That is written as in an URL, ``%3A`` for a colon."""
    breaks = r'[:\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff]|^[#\s]|\s\Z'
    return re.sub(breaks, lambda found: quote(found[0]), str(name))


def class_colours(pool: Pool) -> tuple[list[str], np.ndarray]:
    """The classes' names and colours for annotation tools: those of the data set's palette, (C, 3) uint8. Tools tell
    classes by colour, and black is none of them: a colour that is taken (ADE20K has one twice) gives way to the next.
    """
    meta, taken = pool.leaves[0].metainfo, dict.fromkeys([0])
    classes = [*map(in_tools, meta.get('classes') or range(255))]
    for colour in list(meta.get('palette') or voc_colours()[1:].tolist())[:len(classes)]:
        number = int.from_bytes(bytes(colour), 'big')
        while number in taken:
            number = (number + 1) % 2**24
        taken[number] = None
    return classes, np.array([list(number.to_bytes(3, 'big')) for number in taken][1:], np.uint8)


def tool_labels(state: State) -> tuple[list[str], np.ndarray]:
    """What people choose from in an annotation tool: the classes and, if label files have a value for it, a label for
    what is of none. Names, and colours (C, 3) uint8."""
    classes, colours = class_colours(state.pool)
    if state.al.oracle.unlabelable is None:
        return classes, colours
    free = next(colour for colour in ([n, n, n] for n in range(255, 0, -1)) if colour not in colours.tolist())
    return [*classes, UNLABELABLE], np.append(colours, np.uint8([free]), 0)


def voc_colours() -> np.ndarray:
    """Pascal VOC's colour of each number, (256, 3) uint8: its bit 3 b + c is bit 7 - b of channel c."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], 1, 9, 'little')
    return np.packbits(bits.reshape(256, 3, 3), 1)[:, 0]


def export_cvat(state: State, names: list[str]) -> None:
    """Write ``cvat.zip``, label maps to start from in the layout of CVAT's 'Segmentation mask 1.1': one colour a class,
    one object a class. ``cvat_labels.json`` is for CVAT's raw label constructor."""
    import al_patch
    folder, pool = folder_of(state), state.pool
    classes, colours = tool_labels(state)
    labels = [dict(name=c, color=f'#{bytes(colour).hex()}', attributes=[]) for c, colour in zip(classes, colours)]
    al_patch.write_atomically(folder / 'cvat_labels.json', json.dumps(labels, ensure_ascii=False))
    colours = np.insert(colours, 0, 0, 0)
    nothing = next(n for n in ('background', 'unlabelled', 'no label') if n not in classes)  # CVAT's is the first
    lines = [f'{label}:{r},{g},{b}::\n' for label, (r, g, b) in zip([nothing, *classes], colours)]
    temporary = folder / f'cvat.zip{al_patch.TEMPORARY}'
    with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('labelmap.txt', ''.join(['# label:color_rgb:parts:actions\n', *lines]))
        archive.writestr('ImageSets/Segmentation/default.txt', ''.join(f'{image_stem(pool, name)}\n' for name in names))
        for name in names:
            label = read_label(png_path(state, 'prediction', name), pool, name)
            label = np.where((label < len(classes)) & (label != pool.ignore_index), label + 1, 0)
            for kind, table in dict(SegmentationClass=colours, SegmentationObject=voc_colours()).items():
                png = cv2.imencode('.png', table[label][..., ::-1])[1]
                archive.writestr(f'{kind}/{image_stem(pool, name)}.png', png.tobytes())
    os.replace(temporary, folder / 'cvat.zip')


def image_stem(pool: Pool, name: str) -> str:
    """An image's path below ``img_path`` without its extension, by which CVAT knows it; a name lacks ``img_suffix``."""
    suffix = getattr(pool.leaf_of(name)[0], 'img_suffix', None)
    return osp.splitext(name + suffix)[0] if suffix else name


def export_label_studio(state: State, names: list[str]) -> None:
    """Write ``label_studio.json``, tasks with label maps to start from, one brush region a class, and
    ``label_studio.xml``, the labelling interface that they are for. Images are local files below the root ``/``."""
    import al_patch
    folder, pool, tasks = folder_of(state), state.pool, []
    classes, colours = tool_labels(state)
    for name in names:
        label = read_label(png_path(state, 'prediction', name), pool, name)
        brushes = [dict(id=f'class_{c}', type='brushlabels', from_name='label', to_name='image', image_rotation=0,
                        original_width=label.shape[1], original_height=label.shape[0],
                        value=dict(format='rle', rle=encode_rle(label == c), brushlabels=[classes[c]]))
                   for c in np.unique(label).tolist() if c < len(classes) and c != pool.ignore_index]
        url = '/data/local-files/?d=' + quote(osp.abspath(al_patch.image_path(pool.info(name))).lstrip(os.sep))
        tasks.append(json.dumps(dict(data=dict(image=url, name=name), predictions=[
            dict(model_version=f'round_{state.round}', result=brushes)] if brushes else []), ensure_ascii=False))
    al_patch.write_atomically(folder / 'label_studio.json', '[' + ',\n'.join(tasks) + ']\n')
    labels = ''.join(f'    <Label value={quoteattr(c)} background="#{bytes(colour).hex()}"/>\n'
                     for c, colour in zip(classes, colours))
    al_patch.write_atomically(folder / 'label_studio.xml', (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n  <BrushLabels name="label" toName="image">\n'
        f'{labels}  </BrushLabels>\n</View>\n'))


def encode_rle(mask_HW: np.ndarray) -> list[int]:
    """A mask as a brush of Label Studio's: the bytes of thi.ng/rle-pack over its RGBA pixels. The number of values (32
    bits), bits a value - 1 (5) and bits - 1 of four counters (4 each) are followed, for each run, by a 1, the number of
    a counter (2), the length - 1 in that counter's bits, and the value."""
    flat, counters = mask_HW.reshape(-1), (3, 4, 8, 16)
    edges = [*np.flatnonzero(np.diff(flat, prepend=~flat[:1])).tolist(), flat.size]
    bits = [f'{4 * flat.size:032b}{7:05b}', *(f'{n - 1:04b}' for n in counters)]
    for begin, end in itertools.pairwise(edges):
        for done in range(4 * begin, 4 * end, 2**16):
            length = min(4 * end - done, 2**16)
            i = next(i for i, n in enumerate(counters) if length <= 2**n)
            bits.append(f'1{i:02b}{length - 1:0{counters[i]}b}{255 * int(flat[begin]):08b}')
    return np.packbits(np.frombuffer(''.join(bits).encode(), np.uint8) - ord('0')).tolist()


if __name__ == '__main__':
    main()
