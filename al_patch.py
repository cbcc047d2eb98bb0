"""Active learning for stock MMSegmentation: one module that patches mmengine when it is imported.

With ``import al_patch`` (or ``custom_imports = dict(imports=['al_patch'])`` in a config) and an ``al = dict(...)``
block in the config, ``runner.train()`` becomes active learning: it trains the whole schedule once per round on what is
labelled, scores the pool, chooses what to label next, writes that down, and goes on. Without an ``al`` block everything
is stock.

What is patched, and nothing else (see ``_PATCHES`` at the end; ``remove_patch()`` undoes it):

- ``mmengine.runner.Runner.train``: runs the rounds, if the runner's config has an ``al`` block.
- ``mmengine.runner.Runner.build_dataloader``: understands a key ``al`` in a dataloader's config.
- ``mmcv.utils.ext_loader.load_ext``: only where mmcv has no compiled ops (mmcv-lite), so that a missing op fails when
  it is called, by name, and not when mmseg is imported.
- ``torch.load``'s allow-list: what mmengine's own checkpoints hold, which torch >= 2.6 would refuse.

Read it from the top: the block, ``run_rounds``, which is the whole journey, and then its rooms, each of which uses what
stands below it: training and the labelled set, query and network; then what all hand on, state and pool; units and
strategies; and last the checks of settings, files and seeds, guards, and the patch.

Two companions attach themselves where they lie beside this file: ``al_report.py`` draws and compares runs,
``al_label.py`` writes what people are to label.
"""
from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import difflib
import fcntl
import functools
import gc
import glob
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import os.path as osp
import pickle
import pprint
import random as python_random
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
import traceback
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Annotated, Any, Callable, Iterator, NamedTuple

import cv2
import mmcv.utils.ext_loader
import mmengine.runner.checkpoint
import numpy as np
import scipy.ndimage
import scipy.sparse
import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, Compose, InfiniteSampler
from mmengine.dist import all_gather_object, barrier, broadcast, get_dist_info, is_main_process
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.optim import AmpOptimWrapper, OneCycleParamScheduler
from mmengine.registry import DATASETS, OPTIM_WRAPPERS, DefaultScope, Registry
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, IterBasedTrainLoop, Runner, load_checkpoint
from mmengine.runner.amp import autocast
from mmengine.visualization import Visualizer
from PIL import Image
from rich.progress import track
from torch.utils.data import Dataset

__version__ = '0.1.0'

# ---------------------------------------------------------------------------------------------------------------------
# The `al` block: every key of it, its default, and what it may be
# ---------------------------------------------------------------------------------------------------------------------
#
# A setting is a parameter: its default stands beside its name, what it may be in its annotation. So it is with the
# block below, the units, the strategies' functions and the stopping rule, and `check_settings` checks them all.


def one_of(*values: str):
    return rule(f'{", ".join(map(repr, values[:-1]))} or {values[-1]!r}', lambda value: value in values)


def or_none(annotation):
    """``None``, or what the annotation asks for."""
    should_be, holds = annotation.__metadata__[0]
    return rule(f'None or {should_be}', lambda value: value is None or holds(value))


def rule(should_be: str, holds: Callable):
    return Annotated[Any, Rule(should_be, holds)]


class Rule(NamedTuple):
    """What a setting should be, in words that finish an error's sentence, and the test."""
    should_be: str
    holds: Callable


@dataclasses.dataclass
class Block:
    """The ``al`` block of a config."""
    unit: TypeName = 'image'         # what is asked for: image | region | superpixel | pixel, or dict(type=, **options)
    strategy: TypeName = 'power_entropy'  # a name, dict(type=a name, **options), or 'module:function' of your own
    initial: Initial = 0.05          # labelled at the start: as budget, at random | whole images: names or split file
    budget: Budget = 0.05            # asked for per round: int (units) | fraction | list, one entry a round
    per_image: Flag = False          # spend the budget in every image by itself, not over the whole pool
    rounds: Count = 5                # queries; training runs rounds + 1 times (a budget list sets it, too)
    weights: Start = 'scratch'       # what a round starts from: scratch (= the config's own) | last | best | continue
                                     # (= all of where the last one ended; max_iters is then the whole run's)
    query_with: Which = 'last'       # checkpoint that scores the pool: last | best
    pool: MaybePath = None           # which training data sets are the pool, e.g. 'dataset.datasets.1'; default: all
    group: MaybeExpression = None    # video, patient, tile of an image: a regular expression on its name, or function
    max_per_group: MaybeNatural = None   # so many images of a group at most in one query
    max_per_image: MaybeNatural = None   # below image level so many units of an image at most in one query
    max_images: MaybeNatural = None  # below image level units of so many images at most in one query
    frame_distance: MaybeNatural = None  # between two images of a group in one query, by the last number in their names
    logits: MaybeFunction = None     # 'package.module:function' from what `inference` returns to (N, classes, H, W)
    pool_size: MaybeAmount = None    # score only a random subset of the pool: int | fraction of the images
    oracle: TypeName = 'simulated'   # simulated: labels are on disk, hidden until asked for | human: wait for them
    overrides: Overrides = None      # config overrides for single rounds, e.g. {2: {'train_cfg.max_iters': 4000}}
    stop: StopSetting = None         # stop early: dict(metric='mIoU', value=75) and / or dict(metric=, patience=2)
    seed: MaybeCount = None          # of every random choice; defaults to randomness.seed


Flag = rule('True or False', lambda v: isinstance(v, bool))
MaybePath = or_none(rule('a path in `train_dataloader`', lambda v: isinstance(v, str)))
MaybeExpression = or_none(rule("a regular expression or 'package.module:function'", lambda v: isinstance(v, str)))
MaybeFunction = or_none(rule("'package.module:function'", lambda v: isinstance(v, str) and ':' in v))
Start = one_of('scratch', 'last', 'best', 'continue')
Which = one_of('last', 'best')
MaybeAmount = or_none(rule('a positive int, or a fraction in (0, 1]', lambda v: is_amount(v)))
Budget = rule('a positive int, a fraction in (0, 1], or a list of these with one entry a round',
              lambda v: is_amount(v) or is_list_of(v, is_amount))
Initial = rule('a positive int, a fraction in (0, 1], a list of image names, or the path of a split file',
               lambda v: is_amount(v) or bool(v) and isinstance(v, str) or is_list_of(v, lambda n: isinstance(n, str)))
TypeName = rule("a name, dict(type=name, **options) or 'package.module:function'",
                lambda v: isinstance(v, str) or isinstance(v, dict) and isinstance(v.get('type'), str))
Overrides = or_none(rule("a dict from a round to a dict of config keys, e.g. {2: {'train_cfg.max_iters': 4000}}",
                       lambda v: isinstance(v, dict) and all(re.fullmatch('0|[1-9][0-9]*', str(k)) and isinstance(
                           override, dict) for k, override in v.items())))
StopSetting = or_none(rule("a dict of 'metric' with 'value' and / or 'patience', e.g. dict(metric='mIoU', value=75)",
                         lambda v: isinstance(v, dict) and ('value' in v or 'patience' in v)))


# ---------------------------------------------------------------------------------------------------------------------
# The rounds: start or resume, train, query, ask, and when to stop
# ---------------------------------------------------------------------------------------------------------------------


def run_alone(runner: Runner) -> torch.nn.Module:
    """``run_rounds``, as the only run in its work_dir. What it raises is shown alone, without what lay behind it.

    Raises:
        OSError: mmengine could not write a checkpoint or a log. (The system's own error names no file.)
    """
    gc.freeze()  # what is there is not looked through for each data set that is built, and each state that is read
    try:
        with only_run(runner), checkpoints_are_data():
            return run_rounds(runner)
    except Exception as error:
        is_nameless = getattr(error, 'errno', None) and not error.filename
        raise OSError(f'a file in {runner.work_dir} cannot be written ({error}): go on with --resume when it can'
                      ) if is_nameless else error from None
    finally:
        gc.unfreeze()


def run_rounds(runner: Runner) -> torch.nn.Module:
    """Active learning: train, query, label, once per round, until the rounds, the pool or a stopping rule end it.

    Args:
        runner: The caller's runner, whose config has an ``al`` block. It holds the last round's model afterwards.

    Returns:
        The last round's model. With ``al.oracle='human'`` it returns when labels are to be given; resuming goes on.
    """
    state = start_or_resume(runner)
    # where labels have to be waited for, a hook may do so
    while state.phase != 'label' or tell_hooks(state, 'before_al_wait') or state.phase != 'label':
        trainer = build_round(state)
        if state.phase == 'train':
            tell_hooks(state, 'before_al_train', trainer)
            train_round(state, trainer)
            tell_hooks(state, 'after_al_train', trainer)
        if reason := why_stop(state):
            break
        asked = query(state, trainer)
        if not asked:
            reason = 'the pool is empty: nothing is left to ask for'
            break
        tell_hooks(state, 'after_al_query', trainer, asked)
        add_round(state, asked)
        tell_hooks(state, 'after_al_ask', trainer)
        close_round(trainer)
        del trainer
        gc.collect()
    else:
        return runner.model
    end_rounds(state, trainer, reason)
    return runner.model


def start_or_resume(runner: Runner) -> State:
    """Settings, pool and a fresh state or, with ``--resume``, the one on disk; refused where going on would lose or mix
    labels.

    Raises:
        FileExistsError: A state is there, but ``--resume`` is not.
        ValueError: A setting or the classes have changed since the run began, labelled images have left the data set,
            labels cannot be used, or the data cannot be trained on, validated or scored.
    """
    companions = attach_companions(runner)
    al = parse_settings(runner.cfg.al)
    check_config(runner)
    pool, path = Pool(runner.cfg, unwrap(runner.model)), osp.join(runner.work_dir, STATE_FILE)
    found = on_rank_0(lambda: remove_temporary(runner.work_dir) or osp.isfile(path))  # before another rank writes
    if found and not runner.cfg.get('resume'):
        raise FileExistsError(f'{path} holds an active learning run already: add --resume to go on with it (in a '
                              'script of your own, cfg.resume = True), or choose another --work-dir')
    seeds = al.seed, runner.cfg.get('randomness', {}).get('seed'), runner.seed
    content = read_state(path) if found else dict(seed=next(s for s in seeds if s is not None), config={})
    state = State(content, runner.work_dir, al, runner, pool)
    state.companions = companions
    for method in methods_of(runner, 'before_al_run'):
        method(state)
    if found:
        state.entry['spent'] = state.entry['spent'] or state.spent()  # schema 1 had it after training alone
    else:
        if runner.cfg.get('resume'):
            state.logger.warning(f'{runner.work_dir} holds no run to go on with: this is the start of one')
        add_round(state, initial_images(state) or query(state, None))
    if not found or state.phase == 'label':  # where the run was killed before, or a hook failed
        tell_hooks(state, 'after_al_ask', None)
    if found and state.keeps_labels:
        accept_labels(state)
        state.save()
    return state


def attach_companions(runner: Runner) -> list[Hook]:
    """The hooks of those companions that lie beside this file, registered; what is missing is said once, and its keys
    of the ``al`` block have no effect."""
    hooks, missing = [], []
    sys.modules.setdefault('al_patch', sys.modules[__name__])  # a companion imports this very module
    for name, keys in COMPANIONS.items():
        if osp.isfile(osp.join(osp.dirname(__file__), f'{name}.py')):
            hooks.append(importlib.import_module(f'{__package__}.{name}' if __package__ else name).hook())
            runner.register_hook(hooks[-1])
        else:
            missing.append(f'{name}.py')
            block_settings().update({key: (None, Any) for key in keys})
    if missing:
        runner.logger.info(f'Not beside al_patch.py: {", ".join(missing)}. The run does without checks and figures, or '
                           'exports')
    return hooks


def check_config(runner: Runner) -> None:
    """
    Raises:
        ValueError: The config is not one that rounds can be built of.
    """
    for key in ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not isinstance(value := runner.cfg.get(key), dict):
            raise ValueError(f'active learning builds a new runner every round, so the config needs `{key}` as a dict, '
                             f'but got {type(value).__name__}')
    if runner.cfg.al.get('weights') != 'continue':
        return
    if 'max_iters' not in runner.cfg.train_cfg:
        raise ValueError("`train_cfg` should be of an IterBasedTrainLoop with `al.weights='continue'`, but got "
                         f'{runner.cfg.train_cfg.to_dict()}')
    for hook in checkpoint_hooks(runner):
        if not (hook.save_optimizer and hook.save_param_scheduler):
            raise ValueError('`default_hooks.checkpoint` should have save_optimizer=True and save_param_scheduler=True '
                             f"with `al.weights='continue'`, but got {hook.save_optimizer} and "
                             f'{hook.save_param_scheduler}')


def initial_images(state: State) -> dict[str, None]:
    """The whole images that are labelled before the first round; empty where units of images are to be drawn.

    Raises:
        ValueError: Names that are not in the data set.
    """
    initial, pool = state.al.initial, state.pool
    if not isinstance(initial, (str, list)):
        if state.counts_pixels:
            return {}
        n = number_of(initial, len(pool))
        names = state.shuffled(pool.names, 'initial')[:n]
    else:
        with reading(f'the split file `al.initial` = {initial!r:.200}'):
            names = initial if isinstance(initial, list) else mmengine.list_from_file(initial)
        names = list(dict.fromkeys(filter(None, (name.strip() for name in names))))
        strangers = [name for name in names if name not in pool.where]
        if strangers or not names:
            near = difflib.get_close_matches(strangers[0] if strangers else '', pool.names, 1) or pool.names[:1]
            raise ValueError(f'`al.initial` should hold names of training images such as {near[0]!r}, but '
                             f'{len(strangers)} of {len(names)} are not in the data set: {", ".join(strangers[:5])}')
    return dict.fromkeys(filter(set(names).__contains__, pool.names))


def add_round(state: State, asked: dict) -> None:
    """Label what was asked for, or have a human do so: write the masks, then commit the state of the next round.

    Args:
        asked: Name of an image -> ids of its units, or None for the whole image.

    Raises:
        ValueError: A label that is on disk cannot be used; it names all the files. The state on disk is as it was.
    """
    k = len(state.rounds)
    if is_main_process():  # an older run's checkpoints and requests: nothing of it may leak into this one
        with contextlib.suppress(FileNotFoundError):
            os.remove(osp.join(state.folder(k), 'last_checkpoint'))
        shutil.rmtree(osp.join(state.folder(k), 'to_label'), ignore_errors=True)

    def ask(name: str) -> tuple:
        old = state.mask(name)
        new = state.mask_of(name, asked[name]) & ~old
        void = 0 if state.keeps_labels else state.count_void(name, new)
        if asked[name] is not None:
            write_png(state.mask_path(k, name), old | new)
        return asked[name] is not None and len(asked[name]), int(new.sum()), void

    figures = on_all_ranks(ask, list(asked))
    entry = dict(asked={name: [n, pixels] if n else None for name, (n, pixels, _) in figures.items()},
                 strategy=state.strategy_of(k).record)
    if state.counts_pixels:
        _, entry['pixels'], entry['void_pixels'] = map(sum, zip(*figures.values()))
    state.rounds.append(entry)
    state.phase, state.is_resumed = 'train', False
    if state.keeps_labels:  # images that `initial` names have their labels
        entry['ids'] = {name: ids.tolist() for name, ids in asked.items() if ids is not None}
        state.phase = 'label'
        accept_labels(state, is_asking=k > 0 or not isinstance(state.al.initial, (str, list)))
    entry.update(hold_out(state), spent=state.spent())
    state.save()


def hold_out(state: State) -> dict:
    """The labelled images that the newest round does not train on, if the strategy calibrates on some.

    Raises:
        ValueError: There is one labelled image only.
    """
    share, names = state.strategy.calibration, list(state.labelled())
    if not share:
        return {}
    if len(names) < 2:
        raise ValueError(f'`al.initial` should be at least 2 images, of which `al.strategy.calibration` = {share} are '
                         f'held out, but got {len(names)}')
    n = min(len(names) - 1, number_of(share, len(names)))
    return dict(held_out=state.shuffled(names, 'hold_out', len(state.rounds))[:n])


def tell_hooks(state: State, point: str, *args) -> None:
    """Call every hook of the caller's runner that has a method of this name: ``before_al_train(state, trainer)``,
    ``after_al_validate(state, trainer)``, whose ``state.warn`` is saved with the round's figures,
    ``after_al_train(state, trainer)``, ``after_al_query(state, trainer, asked)``, ``after_al_ask(state, trainer)`` or,
    where labels have to be waited for, ``before_al_wait(state)``, on all ranks. One that fails is reported, and stops
    neither the run nor the others."""
    for method in methods_of(state.runner, point):
        failed = None
        try:
            method(state, *args)
        except Exception:
            failed = traceback.format_exc()
        for text in filter(None, all_gather_object(failed)):  # which waits for all ranks, too
            hook = type(method.__self__).__name__
            state.logger.warning(f'{hook}.{point} failed in round {state.round}, the run goes on:\n{text}')


def methods_of(runner: Runner, point: str) -> list[Callable]:
    """The methods of this name that the caller's hooks have."""
    return [getattr(hook, point) for hook in runner.hooks if hasattr(hook, point)]


def why_stop(state: State) -> str | None:
    """The reason to end after the state's round, or None."""
    if state.al.stop and (reason := reached(state, **state.al.stop)):
        return reason
    if state.round >= state.al.rounds:
        return f'{state.al.rounds} of {state.al.rounds} rounds of queries are done'
    spent = state.spent()
    total = state.pool.pixels if state.counts_pixels else len(state.pool)
    if not state.dropped and spent.get('pixels', spent['images']) == total:  # what is dropped may have left the pool
        return f'the pool is empty after {state.round} rounds: everything is labelled'
    return None


def end_rounds(state: State, trainer: Runner, reason: str) -> None:
    """Say why, and leave the last round's weights in the caller's runner."""
    load_weights(state, state.checkpoint(state.round, 'last'))
    close_round(trainer)
    state.ended = reason
    state.save()
    state.logger.info(f'Active learning has ended: {reason}')
    tell_hooks(state, 'after_al_run')
    state.runner._has_loaded = True  # `runner.test()` goes on with this model, not with `load_from`


def parse_settings(block: dict) -> ConfigDict:
    """Validate an ``al`` block and fill in the defaults. Equal settings come out equal, however they were written.

    Raises:
        ValueError: It names the key, what it should be and what was given.
    """
    if not isinstance(block, dict):
        raise ValueError(f'`al` should be a dict, but got {block!r}')
    if 'full_res' in block:
        raise ValueError('`al.full_res` should be left out: below image level scores are those of the image\'s own '
                         f'pixels, always, but got {block["full_res"]!r}')
    try:  # exactly as the state file will hold it: lists, string keys
        block = json.loads(json.dumps(block, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f'`al` should hold only finite numbers, strings, lists and dicts, but got {block!r} ({error})'
                         ) from error
    al = ConfigDict(check_settings(block, block_settings(), 'al'))
    if isinstance(al.budget, list):
        if block.get('rounds', len(al.budget)) != len(al.budget):
            raise ValueError(f'`al.budget` should have one entry for each of the `al.rounds` = {al.rounds} rounds, '
                             f'but got {len(al.budget)} entries')
        al.rounds = len(al.budget)
    if al.stop:
        al.stop = check_settings(al.stop, settings_of(reached, 1), 'al.stop')
    name, given = split_setting(al.oracle)
    if name not in ORACLES:
        raise ValueError(f"`al.oracle` should be {' or '.join(map(repr, ORACLES))}, but got {name!r} (people's "
                         'labels need al_label.py beside al_patch.py)')
    al.oracle = dict(check_settings(given, settings_of(ORACLES[name]), 'al.oracle'), type=name)
    unit, strategy = resolve_unit(al.unit), resolve_strategy(al.strategy)
    al.unit, al.strategy = unit.setting, strategy.setting
    for key in ('max_per_image', 'max_images'):
        if al[key] and (al.per_image or not unit.kind.counts_pixels):
            raise ValueError(f'`al.{key}` should be None for whole images, and where `al.per_image` is True, but got '
                             f'{al[key]}')
    unit.kind.check(al, strategy)
    return al


@functools.cache
def block_settings() -> dict[str, tuple]:
    """The keys of the ``al`` block, each with default and annotation. A companion adds its own."""
    return settings_of(Block)


def accept_labels(state: State, **how) -> None:
    """Let whoever gives the labels put what is there into the label store, by a hook's ``accept_labels(state)``: it
    ends the phase ``label`` when there is enough to train on, and raises ValueError where a label cannot be used."""
    for method in methods_of(state.runner, 'accept_labels'):
        method(state, **how)


def resume_command() -> str:
    """The command line that goes on with this run. The launcher hands its own on in ``AL_COMMAND``."""
    command = os.environ.get('AL_COMMAND', '').strip() or shlex.join(['python', *sys.argv])
    return command if '--resume' in shlex.split(command) else f'{command} --resume'


def reached(state: State, metric: str = 'mIoU', value: MaybeNumber = None, patience: MaybeNatural = None
            ) -> str | None:
    """The stopping rule: a metric has come to ``value``, or has not risen for ``patience`` rounds. Its parameters are
    what ``al.stop`` may hold.

    Raises:
        ValueError: ``al.stop`` asks for a metric that validation does not report.
    """
    history = [entry['metrics'].get(metric) for entry in state.rounds]
    if None in history:
        raise ValueError(f'`al.stop.metric` should be one of {", ".join(state.entry["metrics"])}, but got {metric!r}')
    if value is not None and history[-1] >= value:
        return f'{metric} {history[-1]:.2f} has reached al.stop.value = {value}'
    if patience is not None and len(history) - 1 - history.index(max(history)) >= patience:
        return f'{metric} has not risen above {max(history):.2f} for al.stop.patience = {patience} rounds'
    return None


ORACLES = dict(simulated=lambda: None)  # and al_label's; what one takes are its options
COMPANIONS = dict(al_report=['reports', 'visualize', 'keep', 'prices'], al_label=[])  # and their keys of the `al` block

# ---------------------------------------------------------------------------------------------------------------------
# Training: one ordinary runner a round, the weights that it starts from, and what comes of it
# ---------------------------------------------------------------------------------------------------------------------


def build_round(state: State) -> Runner:
    """A fresh runner for the state's round, of the caller's class; the caller's own takes over its model."""
    log_round(state)
    with attribute(MMLogger, 'info', lambda *_: None):  # the run has said it
        trainer = type(state.runner).from_cfg(round_config(state))
    labelled = what_is_labelled(state)  # which is not in the config: stock tools read that
    if 'begin' in labelled and trainer._resume:
        labelled['begin'] = iteration_of(trainer._load_from)
    trainer._train_dataloader = {**trainer._train_dataloader, 'al': labelled}
    seed = seed_of(state.seed, 'train', 0 if state.end else state.round)  # rounds that go on are one training
    for hook in [RoundHook(seed, state.begin, state.end), *state.companions]:
        trainer.register_hook(hook)
    state.runner.model = trainer.model
    if state.phase == 'query' and hasattr(state.model, 'init_weights'):  # a checkpoint may hold only what is trained
        state.model.init_weights()
    if state.counts_pixels:
        gather_labelled_pixels(state.model)
    return trainer


def log_round(state: State) -> None:
    """One line on where the run stands, and how to go on if it is stopped."""
    spent = ', '.join(f'{key}: {value}' for key, value in state.spent().items())
    state.logger.info(f'Round {state.round} of {state.al.rounds} ({state.phase}), labelled {spent}; after a stop, go '
                      f'on with: {resume_command()}')


def round_config(state: State) -> Config:
    """The config of the state's round: the run's own, less the ``al`` block, on the labelled images, with the round's
    overrides, work_dir and weights. It is dumped to that work_dir like any other."""
    k, cfg = state.round, copy.deepcopy(state.runner.cfg)
    cfg.pop('al')
    cfg.merge_from_dict(override_of(state, k))
    state.digest = config_digest(cfg)
    state.changed = [key for key, digest in state.digest.items() if state.config and state.config.get(key) != digest]
    if state.changed:
        state.logger.warning(f'The config has changed since the last training: {", ".join(state.changed)}')
    cfg.work_dir = state.folder()
    cfg.experiment_name = f'{state.runner.experiment_name}_round_{k}'
    if isinstance(cfg.get('visualizer'), dict):
        cfg.visualizer.name = cfg.experiment_name  # visualizers are singletons by name: each round gets its own
    seed = cfg.get('randomness', {}).get('seed')
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': state.seed if seed is None else seed}
    goes_on = state.al.weights == 'continue' and state.phase == 'train'
    if k > 0 and state.phase == 'train' and state.al.weights != 'scratch':
        cfg.load_from = state.checkpoint(k - 1, 'last' if goes_on else state.al.weights)
    halfway = resumable_checkpoint(cfg.work_dir) if state.is_resumed and state.phase == 'train' else None
    state.begin = iteration_of(cfg.load_from) if goes_on and k else 0
    state.end = end_of(state, k, state.begin) if goes_on else None
    if goes_on:
        cfg.train_cfg.max_iters = state.runner.cfg.train_cfg.max_iters  # schedules end with it, the round by its hook
    cfg.resume = halfway is not None or state.begin > 0
    cfg.load_from = halfway or cfg.get('load_from')
    return cfg


def override_of(state: State, k: int) -> dict:
    """A round's overrides, with the tuples of the config, which are lists in the settings."""
    given = state.runner.cfg.al.get('overrides') or {}
    return given.get(str(k), given.get(k, {}))


def iteration_of(path: str) -> int:
    """The iteration at which a checkpoint was saved."""
    with reading(path):
        return torch.load(path, map_location='cpu')['meta']['iter']


def end_of(state: State, k: int, begin: int) -> int:
    """The iteration at which a round ends that goes on from ``begin``: after as many as its overrides say, or its share
    of what those of others leave; and where no gradients are left that ``accumulative_counts`` has yet to use.

    Raises:
        ValueError: It comes to nothing, or to more than the run has.
    """
    own, run = [], state.runner.cfg
    for i in range(k, state.al.rounds + 1):
        cfg = copy.deepcopy(run)
        cfg.train_cfg.max_iters = None
        cfg.merge_from_dict(override_of(state, i))
        own.append(cfg.train_cfg.max_iters)
    total = run.train_cfg.max_iters
    end = begin + (own[0] or (total - begin - sum(filter(None, own))) // own.count(None))
    if k < state.al.rounds:
        end -= end % run.optim_wrapper.get('accumulative_counts', 1)
    if not begin < end <= total:
        raise ValueError(f"`train_cfg.max_iters` should do for all {state.al.rounds + 1} trainings with `al.weights="
                         f"'continue'`, but got {total}, of which round {k} would have those from {begin} to {end}: "
                         'set it higher, or have fewer `al.rounds` or iterations in `al.overrides`')
    return end


def what_is_labelled(state: State) -> dict:
    """The key ``al`` of a training dataloader, by which it keeps what the newest round has: see
    ``build_labelled_dataloader``."""
    return dict(state=osp.join(state.work_dir, STATE_FILE), round=state.round, ignore_index=state.pool.ignore_index,
                pool=state.pool.paths, **(dict(begin=0) if state.al.weights == 'continue' else {}))


def train_round(state: State, trainer: Runner) -> None:
    """Run the round's training, and note its metrics and checkpoints in the state. The model then has the weights of
    the last checkpoint, which were validated: EMAHook leaves others in memory."""
    begin = time.time()
    with reading(trainer._load_from or 'a checkpoint of the config', pickle.UnpicklingError):
        trainer.train()
    hook = next(hook for hook in trainer.hooks if isinstance(hook, RoundHook))
    if trainer.val_loop is not None and hook.validated_at != trainer.iter:  # e.g. resumed after the last iteration
        trainer.val_loop.run()
    checkpoints = dict(last=resumable_checkpoint(trainer.work_dir))
    for checkpoint_hook in checkpoint_hooks(trainer):
        best = getattr(checkpoint_hook, 'best_ckpt_path', None)
        checkpoints['best'] = best or next(iter(getattr(checkpoint_hook, 'best_ckpt_path_dict', {}).values()), None)
    state.entry.update(metrics=hook.metrics, train_seconds=round(time.time() - begin, 1), changed=state.changed,
                       checkpoints={key: osp.basename(path) for key, path in all_gather_object(checkpoints)[0].items()
                                    if path})  # only rank 0 saves, so only it knows
    state.config = state.digest
    load_weights(state, state.checkpoint(state.round, 'last'))
    tell_hooks(state, 'after_al_validate', trainer)
    state.phase = 'query'
    state.save()


class RoundHook(Hook):
    """Keeps a round's last validation metrics, and makes its random draws and validations a function of the iteration,
    so that a resumed round trains as an uninterrupted one.

    Args:
        seed: The round's.
        begin, end: The iterations of a round that goes on where the last one ended.
    """
    priority = 'VERY_LOW'

    def __init__(self, seed: int, begin: int = 0, end: int | None = None):
        self.seed, self.begin, self.end, self.metrics, self.validated_at = seed, begin, end, {}, -1

    def before_train(self, runner: Runner) -> None:
        """Validate again what was resumed from: mmengine saves before it validates, and a run that is stopped in
        between would have lost the metrics and the best checkpoint."""
        loop = runner.train_loop
        if self.end:
            loop._max_iters = self.end
        if runner.val_loop is None or not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            return
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        at, end = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        if at > self.begin and at >= loop.val_begin and (at % loop.val_interval == 0 or at == end):
            runner.val_loop.run()

    def before_val_epoch(self, runner: Runner) -> None:
        """Validate what rank 0 saves: without SyncBN, each process has running statistics of its own. After EMAHook, at
        its higher priority, has swapped in its own."""
        for buffer in filter(torch.is_floating_point, unwrap(runner.model).buffers()):
            broadcast(buffer)

    def before_train_epoch(self, runner: Runner) -> None:
        seed = seed_of(self.seed, runner.rank, 'epoch', runner.epoch)
        python_random.seed(seed)
        np.random.seed(seed % 2**32)
        loop, batches = runner.train_loop, getattr(runner.train_loop, 'dataloader_iterator', None)
        if self.end:  # the sampler begins here: what mmengine asks for only to skip it is nothing
            loop.dataloader._iterator = batches._iterator  # where `close_round` looks for workers
            batches._iterator = itertools.chain(itertools.repeat(None, loop.iter), batches._iterator)
        if hasattr(batches, 'skip_iter'):  # the maintained fork's would spare the pipelines, and so their random draws
            batches.skip_iter = lambda skipped: collections.deque(itertools.islice(batches, skipped), maxlen=0)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        seed = seed_of(self.seed, runner.rank, 'iter', runner.iter)
        seed_draws(seed) if self.end else torch.manual_seed(seed)

    def after_train(self, runner: Runner) -> None:
        """Save the last weights, which mmengine does not where EarlyStoppingHook ends a round between checkpoints."""
        for hook in checkpoint_hooks(runner) if getattr(runner.train_loop, 'stop_training', False) else ():
            if hook.save_last:
                step = runner.epoch if hook.by_epoch else runner.iter
                if hook.last_ckpt != hook.file_backend.join_path(hook.out_dir, hook.filename_tmpl.format(step)):
                    hook._save_checkpoint_with_step(runner, step, dict(epoch=runner.epoch, iter=runner.iter))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what EarlyStoppingHook counts and mmengine forgets; it counts a validation after all saving is done."""
        checkpoint['early_stopping'] = [(float(h.best_score), h.wait_count) for h in self.early_stopping(runner)]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """And find what lies beside a checkpoint beside it, though its work_dir was moved or copied: CheckpointHook
        deletes the best when a better one comes. A round that goes on from the last one's has none of that yet."""
        if runner._resume:
            found = checkpoint['message_hub']['runtime_info']
            if checkpoint['meta']['iter'] == self.begin:
                for key in [key for key in found if key.startswith('best_') or key in ('last_ckpt', 'keep_ckpt_ids')]:
                    del found[key]
                return
            found.update({key: osp.join(runner.work_dir, osp.basename(path)) for key, path in found.items()
                          if '_ckpt' in key and isinstance(path, str)})
            for hook, counted in zip(self.early_stopping(runner), checkpoint.get('early_stopping', ())):
                hook.best_score, hook.wait_count = counted

    @staticmethod
    def early_stopping(runner: Runner) -> list[Hook]:
        return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.metrics = {key: round(float(value), 4) for key, value in (metrics or {}).items()
                        if np.isscalar(value) and not isinstance(value, (str, bytes))}
        self.validated_at = runner.iter


def close_round(trainer: Runner) -> None:
    """Drop what mmengine keeps for every runner by name, so that memory does not grow with rounds; and end dataloader
    workers, for each of which the garbage collector would wait five seconds."""
    for loop in (trainer._train_loop, trainer._val_loop):
        for owner in (getattr(loop, 'dataloader', None), getattr(loop, 'dataloader_iterator', None)):
            iterator = getattr(owner, '_iterator', None)
            if hasattr(iterator, '_shutdown_workers'):
                iterator._shutdown_workers()
    for handler in trainer.logger.handlers:
        handler.close()
    trainer.visualizer.close()
    if trainer.cfg.get('compile'):
        torch._dynamo.reset()  # it recompiles a function eight times in a process, and then silently stops to compile
    for owner in (MMLogger, MessageHub, DefaultScope, Visualizer, type(trainer.visualizer)):
        owner._instance_dict.pop(trainer.experiment_name, None)
        owner._instance_dict.pop(trainer.visualizer.instance_name, None)


def resumable_checkpoint(folder: str) -> str | None:
    """The checkpoint that mmengine wrote last, if it is there and was written to its end: the folder may have been
    moved or copied, so that only the name counts of the path that ``last_checkpoint`` holds."""
    with contextlib.suppress(FileNotFoundError):
        path = osp.join(folder, osp.basename(mmengine.get_text(osp.join(folder, 'last_checkpoint')).strip()))
        return path if zipfile.is_zipfile(path) else None


def checkpoint_hooks(runner: Runner) -> list[CheckpointHook]:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


# ---------------------------------------------------------------------------------------------------------------------
# The labelled training set: only labelled images and pixels reach training, and its losses
# ---------------------------------------------------------------------------------------------------------------------


def gather_labelled_pixels(model: torch.nn.Module) -> None:
    """Let every loss of a decode head see the labelled pixels alone, as one column (1, C, n, 1), so that its mean is
    theirs, whatever it does with void; without any it is zero."""
    for head, loss in losses_of(model):
        if not hasattr(loss.forward, 'gathers'):
            loss.forward = gathered(loss.forward, head.ignore_index)


def losses_of(model: torch.nn.Module) -> Iterator[tuple]:
    """The losses of all decode heads, each with its head."""
    for head in model.modules():
        if hasattr(head, 'loss_decode') and hasattr(head, 'ignore_index'):
            losses = head.loss_decode
            yield from ((head, loss) for loss in (losses if isinstance(losses, torch.nn.ModuleList) else [losses]))


def gathered(forward: Callable, ignore_index: int) -> Callable:
    """A loss's ``forward(pred_NCHW, label_NHW, weight=, ...)`` on the labelled pixels of a batch."""

    @functools.wraps(forward)
    def on_labelled(pred: torch.Tensor, label: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        known = label != ignore_index
        if known.all() or pred.shape[2:] != label.shape[1:]:
            return forward(pred, label, *args, **kwargs)
        is_map, n = kwargs.get('reduction_override') == 'none', int(known.sum())  # OHEMPixelSampler ranks pixels by it
        maps = {key: value[known].view(1, -1, 1) for key, value in kwargs.items()
                if isinstance(value, torch.Tensor) and value.shape == label.shape}
        with contextlib.suppress(Exception if n == 1 else ()):  # mmseg's Lovasz fails on one pixel, OHEM has no number
            loss = n and forward(pred.movedim(1, -1)[known].T[None, ..., None], label[known].view(1, -1, 1), *args,
                                 **{**kwargs, **maps})
            if n > 1 or n and loss.isfinite().all():
                return torch.zeros_like(label, dtype=loss.dtype).masked_scatter(known, loss) if is_map else loss
        return torch.zeros_like(label, dtype=pred.dtype) if is_map else (pred * 0).sum()

    on_labelled.gathers = True
    return on_labelled


def build_labelled_dataloader(build: Callable, dataloader: dict, *args, **kwargs):
    """Build a dataloader whose data sets keep only what is labelled.

    Every leaf of its config is handed to its wrapper as a callable, which builds the leaf and filters it, before any
    wrapper counts images or reads a label.

    Args:
        build: Stock ``Runner.build_dataloader``.
        dataloader: A dataloader's config with ``al=dict(state=path of al_state.json, round=k, ignore_index=255,
            pool=paths of the data sets in it that are filtered)``; all others stay as they are. With ``begin=`` an
            iteration, see ``begin_at``.
    """
    dataloader = copy.copy(dataloader)
    where, kept = dataloader.pop('al'), []
    content = read_state(where['state'])
    state = State(content, osp.dirname(where['state']), ConfigDict(content['settings']))
    have = {name: Shown(k is not None and state.mask_path(k, name), *(state.stored(name) if state.keeps_labels else ()))
            for name, k in state.labelled(where['round']).items()
            if name not in (state.rounds[where['round']].get('held_out') or ())}

    def filtered(config: dict, path: str) -> dict:
        if path not in where.get('pool', [path]):
            return config

        def build_leaf(**more) -> BaseDataset:  # a wrapper may add arguments of its own
            leaf = DATASETS.build({**copy.deepcopy(config), **more})
            leaf.full_init()
            keep_labelled(leaf, have, where.get('ignore_index', 255))
            kept.append((path, leaf, len(leaf)))
            return leaf

        return dict(type=build_leaf)

    dataloader['dataset'] = map_leaves(dataloader['dataset'], filtered)
    loader = build(dataloader, *args, **kwargs)
    for path in {*where.get('pool', ())} - {path for path, *_ in kept}:
        raise ValueError(f'{type(loader.dataset).__name__} should build its data set by the config that it is given as '
                         f'`train_dataloader.{path}`, but did not: it would train on images that are not labelled')
    for _, leaf, n in kept:
        if len(leaf) != n:  # mmengine and its wrappers call full_init again
            raise ValueError(f'{type(leaf).__name__}.full_init should do nothing the second time, as mmengine\'s '
                             f'BaseDataset.full_init, but has brought back images that are not labelled')
    if not len(loader) and not isinstance(loader.sampler, InfiniteSampler):
        raise ValueError(f'`train_dataloader.batch_size` should be at most the {len(loader.dataset)} labelled images, '
                         f'or drop_last=False, but got {loader.batch_size}: there is no batch to train with')
    if 'begin' in where:
        begin_at(loader, where['begin'], seed_of(state.seed, get_dist_info()[0], 'items'))
    return loader


def begin_at(loader: torch.utils.data.DataLoader, iteration: int, seed: int) -> None:
    """Let a dataloader begin at an iteration, and what an item draws depend on its place in the sampler's order alone.

    Raises:
        ValueError: The sampler is none in which a place can be found.
    """
    if type(loader.sampler) is not InfiniteSampler:
        raise ValueError("`train_dataloader.sampler` should be an InfiniteSampler, in whose order `al.weights="
                         f"'continue'` goes on, but got {type(loader.sampler).__name__}")
    first = iteration * loader.batch_size
    loader.sampler.indices = enumerate(itertools.islice(loader.sampler.indices, first, None), first)
    loader.dataset.__getitems__ = functools.partial(load_batch, loader.dataset, seed)  # which torch asks for, if it can


def load_batch(dataset: Dataset, seed: int, places: list[tuple]) -> list:
    """A batch by the places of its items in the sampler's order, and their indices."""
    return [seed_draws(seed_of(seed, place)) or dataset[index] for place, index in places]


def keep_labelled(dataset: BaseDataset, have: dict, ignore_index: int) -> None:
    """Filter a leaf data set, and hide what is not labelled of an image.

    Args:
        have: Image name -> what is ``Shown`` of it.
        ignore_index: What the loss ignores.
    """
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    names = [image_name(dataset, info) for info in infos]
    dataset.get_subset_([i for i, name in enumerate(names) if name in have])
    shown = {image_path(info): have[name] for info, name in zip(infos, names) if any(have.get(name, ()))}
    if shown or type(dataset.pipeline) is Compose:
        dataset.pipeline = SparseLabels(dataset.pipeline.transforms, shown, ignore_index)
        if shown:
            dataset.pipeline.find_steps(dataset.get_data_info(0))


class Shown(NamedTuple):
    """What training sees of an image's labels."""
    mask: str | None = None  # path of the mask of what is labelled; none: the whole image is
    classes: str | None = None  # path of the label store's map, in place of the data set's
    file: str | None = None  # path of the file that it came in, for the data set's loader

    def of(self, info: dict) -> dict:
        """What a data set knows of an image, with the label file that counts."""
        return {**info, 'seg_map_path': self.file} if self.file else info


def read_classes(path: str, ignore_index: int) -> np.ndarray:
    """A map of the label store, void as ``ignore_index``, (H, W) int64."""
    with reading(path), Image.open(path) as image:
        classes = np.array(image).astype(np.int64)
        return np.where(classes == (255 if image.mode == 'L' else 65535), ignore_index, classes)


class SparseLabels(Compose):
    """A data set's pipeline that shows only the labelled pixels of an image, and takes care not to lose them. A file
    that cannot be read is named.

    - The mask is applied behind the steps that load the label map and map its values, before any geometry, to all
      integer maps that they load.
    - The label store's map takes the place of what these steps give.
    - mmseg's ``RandomCrop`` is drawn among the places where it holds a labelled pixel: see ``crop_place``.
    - Another random transform that leaves no labelled pixel is drawn again, up to ten times.
    - A resize keeps every labelled pixel: its label lands where the pixel lands, also where nearest neighbour skips it.

    Args:
        transforms: The stock pipeline's.
        shown: Path of an image -> what is ``Shown`` of it; all other images are wholly labelled.
        ignore_index: What the loss ignores.
    """

    def __init__(self, transforms: list, shown: dict, ignore_index: int):
        super().__init__(steps_of(transforms))
        self.shown, self.ignore_index, self.mapping = shown, ignore_index, []

    def find_steps(self, info: dict) -> None:
        """Find the steps that map a label's values, by one image that is labelled."""
        with reading(f'{image_path(info)} or its label map'):
            self.mapping = label_steps(self.transforms, self.shown.get(image_path(info), Shown()).of(info))[1]

    def __call__(self, results: dict) -> dict | None:
        shown = self.shown.get(image_path(results))
        with reading(f'{image_path(results)} or its label map'):
            return super().__call__(results) if shown is None else self.show_labelled(results, shown)

    def show_labelled(self, results: dict, shown: Shown) -> dict | None:
        results = shown.of(results)
        for transform in self.transforms:
            if results is not None and transform not in self.mapping:
                results = self.apply(transform, results, shown)
        return results

    def apply(self, transform: Callable, before: dict, shown: Shown) -> dict | None:
        """What one transform makes of an image."""
        old, draw = before.get('gt_seg_map'), getattr(getattr(transform, 'crop_bbox', 0), '__qualname__', '')
        if draw.endswith('RandomCrop.crop_bbox') and shown.mask and (old != self.ignore_index).any():  # not its own way
            transform = copy.copy(transform)
            transform.crop_bbox = lambda _: crop_place(transform, old, self.ignore_index)
        results = transform(copy.copy(before))
        label = (results or {}).get('gt_seg_map')
        if label is None or label is old:
            return results
        if old is None:
            if shown.classes:
                classes = read_classes(shown.classes, self.ignore_index)
                results['gt_seg_map'] = classes.astype(np.promote_types(
                    label.dtype, np.min_scalar_type(classes.max())))
            else:
                results = Compose(self.mapping)(results)
            for key in new_maps(before, results) if shown.mask else ():
                mask, label_HW = read_mask(shown.mask), results[key]
                if mask.shape != label_HW.shape[:2]:
                    raise ValueError(f'the mask {shown.mask} has size {mask.shape}, but the label map '
                                     f'{label_HW.shape[:2]}')
                results[key] = np.full_like(label_HW, self.ignore_index)
                results[key][mask] = label_HW[mask]  # a tenth of `np.where`'s time, as most is hidden
        elif any('Resize' in cls.__name__ for cls in type(transform).__mro__):  # mmcv's and mmseg's
            results['gt_seg_map'] = keep_pixels(old, label, self.ignore_index)
        elif (old != self.ignore_index).any():
            for _ in range(10):
                if (results['gt_seg_map'] != self.ignore_index).any():
                    break
                results = transform(copy.copy(before)) or results
        return results


def crop_place(crop: Callable, label_HW: np.ndarray, ignore_index: int) -> tuple:
    """Draw where mmseg's ``RandomCrop`` cuts a partly labelled image: top, bottom, left and right.

    Each place where the crop holds a labelled pixel is as likely as any other: what drawing stock's crop until it holds
    one would come to. (So a pixel that more places show, as one in the middle, is seen more often, as with whole
    labels.) They are found by rejection among those in whose rows and in whose columns a label lies, hardly more than
    they. With ``cat_max_ratio`` up to eleven are drawn, as by mmseg, until no class has more than that share of what
    is labelled in it.
    """
    known_HW, (h, w) = label_HW != ignore_index, np.minimum(crop.crop_size, label_HW.shape)
    starts = [np.flatnonzero(np.convolve(known_HW.any(axis), np.ones(n), 'valid')) for axis, n in ((1, h), (0, w))]
    tries = 11
    while tries:
        top, left = map(np.random.choice, starts)
        place = top, top + h, left, left + w
        counts = np.bincount(crop.crop(label_HW, place)[crop.crop(known_HW, place)], minlength=1)
        tries -= counts.any()
        if 0 < counts.max() <= getattr(crop, 'cat_max_ratio', 1) * counts.sum():
            break
    return place


def keep_pixels(old_HW: np.ndarray, new_HW: np.ndarray, ignore_index: int) -> np.ndarray:
    """Put back, into a label map that was resized by nearest neighbour, the labelled pixels that it skipped."""
    rows, cols = np.divmod(np.flatnonzero(old_HW != ignore_index), old_HW.shape[1])
    r, c = rows * new_HW.shape[0] // old_HW.shape[0], cols * new_HW.shape[1] // old_HW.shape[1]
    lost = new_HW[r, c] == ignore_index
    new_HW = new_HW.copy()
    new_HW[r[lost], c[lost]] = old_HW[rows[lost], cols[lost]]
    return new_HW


# ---------------------------------------------------------------------------------------------------------------------
# Query: one pass over the pool, its progress, what it may spend in all and in an image, and the choice
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def query(state: State, trainer: Runner | None) -> dict[str, np.ndarray | None]:
    """Choose what to label next. A function of checkpoint, pool, labelled set, settings and seed.

    Args:
        trainer: The round's runner. None for the random choice before the first round.

    Returns:
        Name of an image -> ids of its chosen units, or None for the whole image.
    """
    begin, this = time.time(), Query(state, trainer)
    for name, seen in watched(state, 'query', this.look(), sum(map(len, deal_batches(state, this.names)))):
        this.collector.add(name, *this.candidates(name, seen))
    asked = this.asked()
    if state.rounds:
        state.entry['query_seconds'] = round(time.time() - begin, 1)
    return asked


class Query:
    """One query: the images that it looks at, what it may spend, and what can be asked for in each image.

    Attributes:
        names: Of all images that it looks at.
        open: Those of them from which it may choose; of the others only what is labelled counts.
        capped_by: The settings that cap it.
    """

    def __init__(self, state: State, trainer: Runner | None):
        al, pool, k, have = state.al, state.pool, len(state.rounds), state.labelled()
        self.state, self.trainer, self.strategy, state.thresholds = state, trainer, state.strategy_of(k), {}
        self.amount = budgets(al)[k - 1] if k else al.initial
        names = [name for name in pool.names if have.get(name, 0) is not None and name not in state.dropped]
        if al.pool_size is not None and k:
            least = 0 if state.counts_pixels else number_of(self.amount, len(pool))
            size = max(least, number_of(al.pool_size, len(pool)))
            names = state.shuffled(names, 'pool_size', k)[:size]
        self.open = frozenset(names)
        self.names = [name for name in pool.names if name in self.open or
                      name in have and self.strategy.asks_for_labelled]
        self.position = {name: i for i, name in enumerate(self.names)}
        self.free = self.free_pixels() if state.counts_pixels else {}
        self.total = sum(self.free.values())
        self.collector = Collector(self.strategy.select, self.budget, al.per_image, state.counts_pixels and isinstance(
            self.amount, float), (state.seed, 'select', k), (k - 1) / max(1, al.rounds))
        self.capped_by = {key: al[key] for key in ('max_per_image', 'max_images', 'max_per_group', 'frame_distance')
                          if al[key] and k}
        if self.capped_by:
            groups, frames = zip(*map(grouping(al.group or '.*'), self.names))
            units, images, group = (self.capped_by.get(key, math.inf) for key in (
                'max_per_image', 'max_images', 'max_per_group'))
            self.collector.caps = functools.partial(Caps, np.unique(groups, return_inverse=True)[1], np.array(frames),
                                                    units, images, group, self.capped_by.get('frame_distance', 0))
        self.collector.folder, self.collector.draw = state.work_dir, lambda i, ids: self.draw_of(self.names[i])(ids)
        state.collector = self.collector
        if self.strategy.needs_model:
            self.collector.device = next(state.model.parameters()).device

    def free_pixels(self) -> dict[str, int]:
        """How many pixels of each image are not labelled."""
        free = {name: math.prod(self.state.pool.sizes[name]) for name in self.open}
        for entry in self.state.rounds:
            for name, units in entry['asked'].items():
                if name in free:
                    free[name] -= units[1] if units else free[name]
        return free

    def draw_of(self, name: str) -> Callable:
        """The random number of each of an image's units."""
        return functools.partial(uniform, seed_of(self.state.seed, 'draw', len(self.state.rounds), name))

    def budget(self, name: str | None = None) -> int:
        """What may be spent: over all images or, with ``al.per_image``, in one."""
        pool, total = self.state.pool, len(self.state.pool)
        if self.state.counts_pixels:
            total = math.prod(pool.sizes[name]) if self.state.al.per_image else pool.pixels
        return number_of(self.amount, total)

    def limit(self, name: str, units: Areas) -> int | None:
        """How many candidates of an image are of use: with top-k, as many as the budget buys; where every pixel is one
        and each has a vector, four times the image's part of the budget, but at least 256.

        Raises:
            ValueError: ``al.strategy.shortlist`` is too short to spend the budget.
        """
        budget, shortlist = self.budget(name), self.strategy.shortlist
        if self.strategy.select is topk and not shortlist:
            budget = math.ceil(budget / units.least) if self.collector.in_pixels else budget
            return min(budget, self.capped_by.get('max_per_image', budget))
        share = budget * (1 if self.state.al.per_image else self.free.get(name, 0) / max(1, self.total))
        share = math.ceil(share / (units.size if self.collector.in_pixels else 1))
        if shortlist and shortlist < share:
            raise ValueError(f"`al.strategy.shortlist` should be at least {share}, an image's share of the budget, but "
                             f'got {shortlist}')
        return shortlist or (max(256, 4 * share) if units.is_dense and self.strategy.embed else None)

    def look(self) -> Iterator[tuple[str, Seen | None]]:
        """This rank's share of the images, each with what the network sees in it, or None where scores are drawn."""
        if not self.strategy.needs_model:
            return ((name, None) for batch in deal_batches(self.state, self.names) for name in batch)
        state, trainer = self.state, self.trainer
        load_weights(state, state.checkpoint(state.round, state.al.query_with))
        if self.strategy.calibration:
            state.thresholds = dict(thresholds_C=calibrate(state, trainer, self.strategy))
        return Network(trainer, self.strategy, state.al.logits).look(state, self.names, self.views)

    @property
    def views(self) -> list[Callable]:
        """What the strategy is shown of the logits: first, if vectors come from them, at their own resolution; last
        what scores and classes come from, which are those of the image's own pixels below image level."""
        embeds, scores = self.strategy.embeds_probs, self.strategy.needs_probs
        if not self.state.counts_pixels:
            return [without_padding] * (embeds or scores)
        return [as_it_is] * embeds + [to_image] * scores

    def maps(self, seen: Seen) -> tuple[torch.Tensor | None, dict]:
        """An image's score map: for whole images at the logits' resolution, less the padding, else of the original
        image's pixels. And ``features_KHW``, and ``probs_CHW`` and ``scores_HW`` at the logits' resolution or, with
        features, at theirs, less the padding, as far as vectors are made from them."""
        counts_pixels, strategy, maps = self.state.counts_pixels, self.strategy, {}
        scores = [None if strategy.score is random_scores else call_offering(
            strategy.score, means['probs_NCHW'], **means, **self.state.thresholds)[0] for means in seen.means]
        map_HW = scores[-1] if scores else None
        if strategy.embeds_probs:
            crop = without_padding if counts_pixels else as_it_is
            maps = dict(probs_CHW=crop(seen.means[0]['probs_NCHW'][0], seen))
            if scores[0] is not None:
                maps['scores_HW'] = crop(scores[0], seen)
        if seen.features is not None:
            features_KHW = without_padding(seen.features, seen).float()
            cells = features_KHW.shape[1:]
            maps = {key: each if each.shape[-2:] == cells else F.adaptive_avg_pool2d(each[None], cells)[0]
                    for key, each in maps.items()} | dict(features_KHW=features_KHW)
        return map_HW, maps

    def candidates(self, name: str, seen: Seen | None) -> tuple[Candidates, Candidates, int]:
        """The candidates of an image, its labelled units if the selector wants to know, and the number of all units.

        Raises:
            ValueError: A score or a vector is not finite; it names the image.
        """
        state, strategy, units = self.state, self.strategy, self.state.units(name)
        map_HW, maps = self.maps(seen) if seen else (None, {})
        if any(not torch.isfinite(each).all() for each in (map_HW, *maps.values()) if each is not None):
            raise ValueError(f'the score of image {name!r} is not finite: the model, or `al.strategy`, gives no finite '
                             'numbers; if it is the model, train its round again by: python al_label.py rewind '
                             f'{shlex.quote(state.work_dir)} {state.round} --train')
        draw = self.draw_of(name)
        values = random_scores(draw(np.arange(units.number))) if map_HW is None else units.values(
            map_HW.float(), strategy.reduce)
        taken, limit = state.mask(name) if state.counts_pixels else name in state.labelled(), self.limit(name, units)
        is_lean = self.collector.keeps_best and units.is_dense and units.size == 1
        values = torch.as_tensor(values).float() if is_lean else values
        found = [units.candidates(values, taken, draw, limit, self.collector.floor, self.collector.floor_draw)]
        if strategy.asks_for_labelled:
            found.append(units.known(values, taken, draw, limit))
        ids, values, pixels = map(np.concatenate, zip(*found))
        vectors = probs = predicted = None
        if maps and len(ids):
            shape, device = next((each.shape[-2:], each.device) for each in maps.values())
            vectors_ND = call_offering(strategy.embed, **maps, **self.state.thresholds, weights_NP=units.weights(
                ids, shape, device), in_one_cell=units.is_dense and units.size == 1)
            if isinstance(vectors_ND, tuple):
                self.collector.split, vectors_ND = vectors_ND[0].shape[1], torch.cat(vectors_ND, 1)
            vectors = vectors_ND.float().cpu().numpy()
        if strategy.needs_classes and len(ids):
            probs_NCHW = seen.means[-1]['probs_NCHW']
            if strategy.asks_for('probs_NC'):
                weights_NP = units.weights(ids, probs_NCHW.shape[2:], probs_NCHW.device)
                probs = pool_map(probs_NCHW[0], weights_NP).cpu().numpy()
            if strategy.asks_for_predicted:
                predicted = units.histograms(ids, predicted_classes(probs_NCHW)[0], probs_NCHW.shape[1])
        image, free = np.int32(self.position[name]), len(found[0][0])
        rows = Candidates(image, ids.astype(np.int32), values, np.int32(1), None) if is_lean else Candidates(
            np.full(len(ids), image), ids, values, pixels, draw(ids), vectors, probs, predicted)
        return rows.rows(slice(free if name in self.open else 0)), rows.rows(slice(free, None)), units.number

    def asked(self) -> dict[str, np.ndarray | None]:
        """The choice, after a line in the log. The highest score in each image stays in ``state.scores``."""
        state, chosen = self.state, self.collector.result()
        seen = {} if self.strategy.score is random_scores else self.collector.seen
        state.scores = dict(collections.ChainMap(*all_gather_object(seen)))
        if not len(chosen.id):
            return {}
        images = chosen.by_image()
        if self.collector.is_capped:
            state.warn(f'Query {len(state.rounds)} asks for {len(chosen.id)} units of the {self.amount} that '
                       '`al.budget` allows: ' + ' and '.join(f'`al.{key}` = {value}' for key, value in
                                                             self.capped_by.items()) + ' leave no more')
        (low, high, n), scores = self.collector.range, chosen.score
        what = f'{len(images)} of {len(self.open)} images'
        if state.counts_pixels:
            what = f'{len(chosen.id)} of {n} candidates ({chosen.pixels.sum()} pixels) in {what}'
        if self.strategy.score is not random_scores:
            what += f', scores {scores.min():.4g} to {scores.max():.4g} (all: {low:.4g} to {high:.4g})'
        if not state.rounds and state.strategy.needs_model:
            what += ', plainly at random: there is no model yet'
        if self.collector.blocks > 1:
            what += f', in {self.collector.blocks} random blocks of the candidates, each with its share of the budget'
        state.logger.info(f'Query {len(state.rounds)}: {self.strategy.name} asks for {what}')
        return {self.names[part.image]: part.id.astype(np.int64) if state.counts_pixels else None for part in images}


class Collector:
    """Gathers candidates image by image and keeps no more than can still be chosen, so that memory does not grow with
    the pool where the choice allows it: with a budget for each image, with top-k, and with noise on it.

    Args:
        select: The selector.
        budget: What may be spent: over all images, or in one (its name is handed over) if ``per_image``.
        per_image: Choose in every image by itself.
        in_pixels: Whether the budget counts pixels, and not units.
        seed: What seeds the choice.
        progress: Of the queries, for the selector.

    Attributes:
        floor: What scores lower cannot be chosen any more, nor what scores as low and draws more than ``floor_draw``.
        seen: Name of an image -> the highest score in it.
        equals: Score -> how many candidates have it, of the images of which it is the middle one. What most have is in
            the middle.
        range: Lowest and highest score, and number, of all candidates.
        device: Where the selector finds vectors. What is float64 stays on the CPU, as not every device has that.
        caps: What makes ``Caps`` of the images of candidates, if there are any; ``is_capped``: whether they left less
            than the budget.
        number: Of all units, labelled ones included.
        keeps_best: Whether the choice is the highest of all: no more of them are kept, and ranks send no more.
        keeps_chosen: Whether each candidate is ranked by itself: what is not chosen among some is not among more.
        draw: What makes the draws of an image's units, by its position, where candidates do not hold them.
        folder: Where ranks leave what rank 0 chooses from, and vectors lie that fill more than ``IN_MEMORY``.
        blocks: How many the choice is made in.
        split: Where vectors are outer products of two factors: the length of the first.
    """

    def __init__(self, select: Callable, budget: Callable, per_image: bool = False, in_pixels: bool = False,
                 seed: tuple = (), progress: float = 0.):
        self.select, self.budget, self.per_image, self.in_pixels = select, budget, per_image, in_pixels
        self.seed, self.progress, self.device, self.caps, self.is_capped = seed, progress, 'cpu', None, False
        self.parts, self.known, self.rows, self.kept, self.number, self.split = [], [], 0, 0, 0, None
        self.floor, self.floor_draw, self.seen, self.range = -math.inf, math.inf, {}, [math.inf, -math.inf, 0]
        self.equals, self.draw, self.folder, self.file, self.blocks = collections.Counter(), None, None, None, 1
        self.first_vector, self.is_one_vector = None, True

    @property
    def keeps_best(self) -> bool:
        return self.select is topk and self.keeps_chosen

    @property
    def keeps_chosen(self) -> bool:
        return without_options(self.select) in ONE_BY_ONE and not (self.per_image or self.caps)

    def add(self, name: str, candidates: Candidates, known: Candidates, number: int = 0) -> None:
        """An image's candidates, what is labelled of it where the selector wants to know, and the number of its
        units."""
        scores = candidates.score
        self.number = number if self.per_image else self.number + number
        if len(known.id) and not self.per_image:
            self.known.append(known)
        if not len(scores):
            return
        middle = np.median(scores)
        self.equals[middle] += np.count_nonzero(scores == middle)
        self.seen[name] = float(scores.max())
        self.range = [min(self.range[0], scores.min()), max(self.range[1], scores.max()), self.range[2] + len(scores)]
        if candidates.vector is not None:
            self.first_vector = candidates.vector[0] if self.first_vector is None else self.first_vector
            self.is_one_vector &= bool((candidates.vector == self.first_vector).all())
        if self.per_image:
            candidates = self.choose(candidates, self.budget(name), known, name)
        elif candidates.vector is not None and (self.rows + len(scores)) * candidates.vector[0].nbytes > IN_MEMORY:
            candidates = candidates._replace(vector=self.on_disk(candidates.vector))
        self.parts.append(candidates)
        self.rows += len(candidates.id)
        if self.keeps_chosen and self.rows > 1.25 * self.kept + 2**13:
            self.parts = self.highest(self.parts)
            self.rows = self.kept = sum(len(part.id) for part in self.parts)

    def on_disk(self, vectors_ND: np.ndarray) -> np.ndarray:
        self.file = self.file or tempfile.TemporaryFile(dir=self.folder)
        offset = self.file.seek(0, os.SEEK_END)
        vectors_ND.tofile(self.file)
        self.file.flush()
        return np.memmap(self.file, vectors_ND.dtype, 'r', offset, vectors_ND.shape)

    def highest(self, parts: list[Candidates]) -> list[Candidates]:
        """What the budget buys of the highest; and what scores lower will not be asked for."""
        budget = self.budget(None)
        if parts[0].draw is not None:
            n, parts = sum(len(part.id) for part in parts), [self.choose(Candidates.join(parts), budget)]
            if self.keeps_best and len(parts[0].id) < n:
                self.floor = parts[0].score.min()
                self.floor_draw = parts[0].draw[parts[0].score == self.floor].max()
            return parts
        scores_N = np.concatenate([part.score for part in parts])
        if budget >= len(scores_N):
            return parts
        scores_N.partition(len(scores_N) - budget)
        self.floor = scores_N[-budget]
        missing = budget - np.count_nonzero(scores_N[-budget:] > self.floor)
        del scores_N
        ties = [np.flatnonzero(part.score == self.floor) for part in parts]
        draws = [self.draw(part.image, part.id[each].astype(np.int64)) for part, each in zip(parts, ties)]
        self.floor_draw = np.partition(np.concatenate(draws), missing - 1)[missing - 1]
        for i, (part, each, drawn) in enumerate(zip(parts, ties, draws)):
            is_kept = part.score > self.floor
            is_kept[each[drawn <= self.floor_draw]] = True
            parts[i] = part.rows(is_kept)
        return parts

    def drop_lower(self) -> None:
        """Drop what scores lower than the choice of all ranks can: each says at what scores its candidates come to a
        1024th of the budget, two of them, and so on, and of the highest 1024 of these the choice is full."""
        scores_N = np.concatenate([part.score for part in self.parts] or [[]])
        order, steps = np.argsort(-scores_N), self.budget(None) * np.arange(1, 1025) / 1024
        reached = np.searchsorted(np.cumsum(Candidates.join(self.parts).pixels[order]), steps) if self.in_pixels and \
            self.parts and self.parts[0].draw is not None else np.ceil(steps).astype(int) - 1
        sketch = np.append(scores_N[order], -math.inf)[np.minimum(reached, len(scores_N))]
        floor = np.sort(np.concatenate(all_gather_object(sketch)))[-1024]
        self.parts = [part.rows(part.score >= floor) for part in self.parts]

    def choose(self, candidates: Candidates, budget: int, known: Candidates | None = None, *seed) -> Candidates:
        """What the selector picks for the budget, from rows in the order of their draws, so that the first of equals is
        a fair choice. A budget in pixels is spent as far as whole units go: the selector's picks are taken in its order
        until the next one is too large, but at least one."""
        n, candidates = len(candidates.id), candidates.shuffled()
        scores_N = self.tensor(candidates.score)
        known = known.shuffled() if known and len(known.id) else candidates.rows(slice(0))
        vectors_ND, labelled_LD = (self.tensor(each.vector, self.device) for each in (candidates, known))
        split = self.split
        if split and 'split' not in parameters_of(self.select):
            split, vectors_ND, labelled_LD = None, *((v[:, :split, None] * v[:, None, split:]).flatten(1)
                                                     for v in (vectors_ND, labelled_LD))
        offered = dict(
            vectors_ND=vectors_ND, split=split, probs_NC=self.tensor(candidates.probs), progress=self.progress,
            predicted_NC=self.tensor(candidates.predicted), draws_N=self.tensor(candidates.draw), number=self.number,
            labelled_LD=labelled_LD, labelled_scores_L=self.tensor(known.score),
            labelled_predicted_LC=self.tensor(known.predicted))
        k = math.ceil(budget / np.median(candidates.pixels)) if self.in_pixels and n else budget
        while n:
            k = min(k, n)
            caps = self.caps and self.caps(candidates.image)
            select = self.select if not caps or 'caps' in parameters_of(self.select) else asked_again(
                caps, self.select)
            picks = call_offering(select, scores_N, k, generator(*self.seed, *seed), **offered, caps=caps)
            picks = picks.cpu().numpy() if isinstance(picks, torch.Tensor) else np.asarray(picks)
            self.is_capped = bool(caps) and len(picks) < k
            if len(picks) != k and not self.is_capped or len(np.unique(picks)) != len(picks):
                raise ValueError(f'`al.strategy.select` should choose {k} different candidates, but got {len(picks)}, '
                                 f'{len(np.unique(picks))} of them different')
            if not self.in_pixels:
                break
            cost = np.cumsum(candidates.pixels[picks])
            if cost[-1] >= budget or k == n or self.is_capped:
                self.is_capped &= bool(cost[-1] < budget)
                picks = picks[:max(1, np.searchsorted(cost, budget, side='right'))]
                break
            k = math.ceil(k * budget / cost[-1]) + 1
        return candidates.rows(picks) if n else candidates

    def tensor(self, column: np.ndarray | None, device='cpu') -> torch.Tensor | None:
        return None if column is None else torch.from_numpy(column).to(device)

    def result(self) -> Candidates:
        """The choice of all ranks together."""
        ranges, numbers, splits = zip(*all_gather_object((self.range, self.number, self.split)))
        lows, highs, rows = zip(*ranges)
        self.range, self.number, self.split = [min(lows), max(highs), sum(rows)], sum(numbers), max(
            split or 0 for split in splits)
        if self.keeps_best and len(ranges) > 1:
            self.drop_lower()
        parts, known = (gathered_rows(each, osp.join(self.folder or '', name))
                        for each, name in ((self.parts, 'candidates'), (self.known, 'known')))
        self.parts, self.known = [], []
        return on_rank_0(lambda: self.chosen(parts, known))

    def chosen(self, parts: list[Candidates], known: list[Candidates]) -> Candidates:
        """The choice from all of them, by images and ids, without vectors, that nobody has use for any more."""
        if self.keeps_best and parts and parts[0].draw is None:
            parts = [each for part in parts for each in part.by_image()]
            return Candidates.join(self.highest(sorted(parts, key=lambda part: part.image)))
        if not self.per_image:
            parts = self.in_blocks(parts, known)
        return Candidates.join([part.bare() for part in parts]).sorted()

    def in_blocks(self, parts: list[Candidates], known: list[Candidates]) -> list[Candidates]:
        """The choice from all; where comparing each pick with each candidate is out of reach, from blocks of at most
        20,000 of them, drawn at random with what is labelled, each with its share of the budget; what was chosen from
        the last block counts as labelled for the next. (Not under caps, which hold for all blocks together.)"""
        budget, n = self.budget(None), sum(len(part.id) for part in parts)
        k = budget / np.median(np.concatenate([part.pixels for part in parts])) if self.in_pixels and n else budget
        is_far = without_options(self.select) in PAIRWISE and n * min(n, k) > FEW_PAIRS and not self.caps
        self.blocks = math.ceil(n / 19_000) if is_far else 1  # some are larger
        chosen, last, spent = [], [], 0
        for j in range(self.blocks):
            block, near = ([part.rows((part.draw * self.blocks).astype(int) == j) for part in each] if is_far else each
                           for each in (parts, known))
            picks = self.choose(Candidates.join(block), budget * (j + 1) // self.blocks - spent,
                                Candidates.join(near + last), *((j, ) if is_far else ()))
            spent += picks.pixels.sum() if self.in_pixels else len(picks.id)
            chosen, last = [*chosen, picks.bare()], [picks]
        return chosen


IN_MEMORY = 2**30  # bytes of vectors
FEW_PAIRS = 2**32  # of candidates and picks


def gathered_rows(parts: list[Candidates], prefix: str) -> list[Candidates]:
    """What all ranks have, on rank 0, by way of files: a message would be there several times, and on all ranks."""
    rank, world_size = get_dist_info()
    if world_size == 1:
        return parts
    path = f'{prefix}_{{}}{TEMPORARY}'

    def leave(rank: int) -> None:
        columns = Candidates.join(parts)._asdict()
        with open(path.format(rank), 'wb') as file:
            np.savez(file, **{key: column for key, column in columns.items() if column is not None})

    on_all_ranks(lambda rank: rank and leave(rank), list(range(world_size)))
    for other in () if rank else range(1, world_size):
        with np.load(path.format(other)) as columns:
            parts = [*parts, Candidates(**{'draw': None, **columns})]
        os.remove(path.format(other))
    return [] if rank else [part for part in parts if len(part.id)]


class Candidates(NamedTuple):
    """What can be asked for, one row each. Where single pixels are the highest of a whole pool, whose number is large,
    ``image`` and ``pixels`` of a part are one number, ``score`` is float32, and nothing is kept that can be had
    again."""
    image: np.ndarray  # (N,) int32: its position among those scored
    id: np.ndarray  # (N,) int64: number of a segment, or y * W + x of a pixel or of a window's centre
    score: np.ndarray  # (N,) float64
    pixels: np.ndarray  # (N,) int32: what it would add to the labelled pixels
    draw: np.ndarray | None  # (N,) float64 in (0, 1): its own, by seed, round, name of the image and id alone
    vector: np.ndarray | None = None  # (N, D) float32, if the strategy has an embedding
    probs: np.ndarray | None = None  # (N, C) float32, mean class probabilities, if the selector asks for them
    predicted: np.ndarray | None = None  # (N, C) float32, shares of its pixels predicted so, if it asks for them

    def rows(self, which) -> Candidates:
        return Candidates(*(column[which] if np.ndim(column) else column for column in self))

    @staticmethod
    def join(parts: list) -> Candidates:
        empty = Candidates(*(np.empty(0, t) for t in (np.int32, np.int64, np.float64, np.int32, np.float64)))
        columns = zip(*([part._replace(image=np.broadcast_to(part.image, len(part.id)), pixels=part.pixels if np.ndim(
            part.pixels) else None) for part in parts] or [empty]))
        columns = ([part for part in column if part is not None] for column in columns)
        joined = Candidates(*(np.concatenate(column) if column else None for column in columns))
        pixels = np.broadcast_to(np.int32(1), len(joined.id))  # of single ones
        return joined if joined.pixels is not None else joined._replace(pixels=pixels)

    def by_image(self) -> list[Candidates]:
        """The rows of each image, which lie together."""
        if not np.ndim(self.image):
            return [self]
        images, starts = np.unique(self.image, return_index=True)
        return [self.rows(slice(*ends))._replace(image=image) for image, *ends in zip(
            images, starts, [*starts[1:], len(self.id)])]

    def bare(self) -> Candidates:
        """Less what only a choice looks at."""
        return self._replace(vector=None, probs=None, predicted=None)

    def shuffled(self) -> Candidates:
        return self.rows(self.draw.argsort())

    def sorted(self) -> Candidates:
        return self.rows(np.lexsort((self.id, self.image)))


def watched(state: State, what: str, looks: Iterator, total: int) -> Iterator:
    """Go through images under a progress bar or, in files, with up to ten log lines, in the form of mmengine's."""
    begin, is_watched = time.time(), sys.stdout.isatty() and is_main_process()
    for done, look in enumerate(track(looks, what.capitalize(), total, disable=not is_watched), 1):
        yield look
        if not is_watched and (done == total or done % math.ceil(total / 10) == 0):
            each = (time.time() - begin) / done
            eta = time.strftime('%H:%M:%S', time.gmtime(each * (total - done)))
            state.logger.info(f'Iter({what}) [{done:{len(str(total))}}/{total}]  eta: {eta}  time: {each:.4f}')


def calibrate(state: State, trainer: Runner, strategy: Strategy) -> torch.Tensor:
    """For each class the highest threshold (in thousandths) at which the expected rate of false negatives in an image
    is at most ``strategy.alpha``, by conformal risk control (Angelopoulos et al., ICLR 2024) on the labelled images
    that the round did not train on; 0.001 for a class that they do not show often enough to tell. (C,)"""
    names, alpha, rates, images = state.entry['held_out'], strategy.alpha, 0, 0
    looks = Network(trainer, strategy, state.al.logits).look(state, names, [to_image], shared=False)
    for name, seen in watched(state, 'calibration', looks, len(names)):
        probs_CHW, label_HW = seen.means[0]['probs_NCHW'][0], state.load_label(name).astype(np.int64)
        label_HW = torch.from_numpy(np.where(state.mask(name), label_HW, -1))
        rate, shown = torch.ones(len(probs_CHW), 1001, dtype=torch.float64), torch.zeros(len(probs_CHW)).double()
        for c in label_HW.unique().tolist():
            if 0 <= c < len(probs_CHW):
                bins = (probs_CHW[c].cpu()[label_HW == c] * 1000).long()
                rate[c] = F.pad(bins.bincount(minlength=1001).cumsum(0)[:1000] / len(bins), (1, 0))
                shown[c] = 1
        rates, images = rates + rate * shown[:, None], images + shown
    bound = (images + 1) / images.clamp_min(1) * alpha - 1 / images.clamp_min(1)
    allowed = (rates / images.clamp_min(1)[:, None] <= bound[:, None]) & (images[:, None] > 0)
    thresholds_C = (allowed.sum(1) - 1).clamp_min(1) / 1000  # rates rise with the threshold
    state.logger.info(f'Calibrated on {len(names)} held-out images, thresholds: '
                      f'{", ".join(f"{t:.3f}" for t in thresholds_C.tolist())}')
    if (bound <= 0).all():
        state.warn(f'{len(names)} held-out images are too few to bound the rate of false negatives by '
                   f'`al.strategy.alpha` = {alpha}: a class needs {math.ceil(1 / alpha)} that show it')
    return thresholds_C.to(probs_CHW.device)


# ---------------------------------------------------------------------------------------------------------------------
# The network: which checkpoints score, how many passes they make over an image, and what these give
# ---------------------------------------------------------------------------------------------------------------------


def load_weights(state: State, path: str) -> None:
    """Load a checkpoint of the state's round into the run's model, unless that is what it holds.

    Raises:
        ValueError: It cannot be read, or holds more than the model would save, or less, or other shapes.
    """
    if getattr(state.model, 'al_weights', '') == path:
        return
    with reading(path):
        checkpoint = load_checkpoint(state.model, path, map_location='cpu', logger=state.logger)
    saved, own = ({f'{key.removeprefix("module.")} {[*getattr(value, "shape", ())]}' for key, value in each.items()}
                  for each in (checkpoint.get('state_dict', checkpoint), state.model.state_dict()))
    if saved != own:
        raise ValueError(f'{path} should hold the weights of this model, but {len(own - saved)} of the model are not '
                         f'there ({", ".join(sorted(own - saved)[:3])}) and {len(saved - own)} there not of the model '
                         f'({", ".join(sorted(saved - own)[:3])}): go on with the config that round {state.round} was '
                         'trained with, or train it again with this one by: python al_label.py rewind '
                         f'{shlex.quote(state.work_dir)} {state.round} --train')
    state.model.al_weights = path


class Network:
    """A segmentor in eval mode, and its passes over images: one, or ``strategy.mc`` with dropout (Gal & Ghahramani,
    ICML 2016), of one or more checkpoints.

    With dropout, what no dropout layer has touched is computed once: a module without dropout in it that gets again
    what it got in a first pass answers with what it made of that. Where the only dropout is that of
    channels before ``conv_seg``, as in most decode heads, a matrix product serves all passes. Masks come from a
    CPU generator for each image and pass, so they do not depend on batches, order, processes or the device.

    Args:
        trainer: A runner with the model; the query runs in the precision that it trains in.
        strategy: What asks for statistics and features. None: one pass, and class probabilities.
        logits_of: ``al.logits``.
    """

    def __init__(self, trainer: Runner, strategy: Strategy | None = None, logits_of: str | None = None):
        self.trainer, self.model = trainer, segmentor(unwrap(trainer.model))
        self.logits_of = function_named({}, logits_of, 'al.logits') if logits_of else leaves_of
        self.model.train(False)
        self.mc, flips = (strategy.mc, 1 + strategy.flip) if strategy else (1, 1)
        self.members = committee(self.model, strategy.committee if strategy else 1)
        self.turns = list(itertools.product(self.members, range(flips)))
        self.wanted = [name for name in STATISTICS if name == 'probs_NCHW' or strategy and strategy.asks_for(name)]
        self.features_from = strategy.features_from if strategy and strategy.embeds_features else None
        self.windows = None
        self.dropouts = dropouts_of(self.model) if self.mc > 1 else []
        self.fixed = dict.fromkeys(fixed_parts(self.model, set(self.dropouts))) if self.dropouts else ()

    def look(self, state: State, names: list[str], views: list[Callable], shared: bool = True
             ) -> Iterator[tuple[str, Seen]]:
        """Pass over images, or this rank's share of them.

        Args:
            views: What is done to the logits (C, h, w) of an image before the softmax, given what is ``Seen`` of it.
        """
        batches = deal_batches(state, names, shared)
        for data, batch in zip(query_dataloader(state, batches), batches):
            seeds = [seed_of(state.seed, 'mc', len(state.rounds), name) for name in batch]
            with precision(self.trainer):
                seen = list(self.see(data, seeds, views))
            yield from zip(batch, seen)

    def see(self, data: dict, seeds: list[int], views: list[Callable]) -> Iterator[Seen]:
        """What the network sees in the images of a batch, with a seed for the dropout masks of each."""
        data = self.model.data_preprocessor(data, False)
        inputs, metas = data['inputs'], [sample.metainfo for sample in data['data_samples']]
        are_scores, shape = classifies_masks(decode_head(self.model)), leaves_of(inputs)[0].shape[2:]
        batch = [Seen(meta, shape, self.model.align_corners, [{} for _ in views], None) for meta in metas]
        self.windows = Windows(self.model, self.features_from, not views) if self.features_from else None
        with native_resolution(self.model):
            if not views:
                with self.windows.open(inputs):
                    self.model.inference(inputs, [dict(meta) for meta in metas])
            for turn, (weights, flip) in enumerate(self.turns if views else ()):
                if weights and not flip:
                    self.model.load_state_dict(weights)
                given = mirrored(inputs) if flip else inputs
                seeds = [seed_of(seed, 'flip') for seed in seeds] if turn else seeds
                for logits_NSCHW in self.passes(given, [dict(meta) for meta in metas], seeds):
                    for logits_SCHW, seen in zip(logits_NSCHW.flip(-1) if flip else logits_NSCHW, batch):
                        for view, mean in zip(views, seen.means):
                            seen_MHW = view(logits_SCHW.flatten(0, 1), seen)
                            self.average(mean, to_probs(seen_MHW.unflatten(0, (len(logits_SCHW), -1)), are_scores))
            if self.members[0]:
                self.model.load_state_dict(self.members[0])
        features = self.windows.mean() if self.windows else itertools.repeat(None)
        yield from (seen._replace(features=each) for seen, each in zip(batch, features))

    def average(self, mean: dict, probs_SCHW: torch.Tensor) -> None:
        """Add what some passes have to the mean over all."""
        for name in self.wanted:
            share, number = STATISTICS[name](probs_SCHW), self.mc * len(self.turns)
            share = share if number == 1 else share.sum(0, keepdim=True).div_(number)
            mean[name] = mean[name].add_(share) if name in mean else share

    def classify(self, seen: Seen) -> np.ndarray:
        """The classes that mmseg predicts from the last view, (H, W)."""
        probs_CHW, head = seen.means[-1]['probs_NCHW'][0], decode_head(self.model)
        is_binary = getattr(head, 'out_channels', None) == 1
        return (probs_CHW[1] > head.threshold if is_binary else probs_CHW.argmax(0)).long().cpu().numpy()

    def passes(self, inputs_NCHW: torch.Tensor, metas: list[dict], seeds: list[int]) -> Iterator[torch.Tensor]:
        """Yield logits (N, S, C, h, w) of S passes at a time."""
        if self.mc == 1:
            yield self.logits(inputs_NCHW, metas)[:, None]
            return
        last, untouched, generators, head = [], [True], [], decode_head(self.model)
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead
        is_plain = (getattr(type(head), 'cls_seg', None) is BaseDecodeHead.cls_seg and hasattr(head, 'conv_seg') and
                    isinstance(head.dropout, torch.nn.Dropout2d) and self.dropouts == [head.dropout])
        with contextlib.ExitStack() as stack:
            for part in self.fixed:
                stack.enter_context(attribute(part, 'forward', remembering(part, generators)))
            for layer in self.dropouts:
                stack.enter_context(attribute(
                    layer, 'forward', functools.partial(apply_dropout, layer, generators, untouched)))
            if is_plain:
                stack.callback(head.conv_seg.register_forward_hook(
                    lambda _, args, output: last.extend([args[0], output])).remove)
            logits = self.logits(inputs_NCHW, metas)  # without dropout: there are no generators yet
            if untouched:
                raise ValueError(f'`al.strategy.mc` should be 1 for a {type(head).__name__}, which calls no dropout '
                                 f'layer on the way to its logits, but got {self.mc}')
            draws = [[generator(seed, i) for seed in seeds] for i in range(self.mc)]
            if last and last[-1] is logits:
                yield from self.last_layer(last[-2], draws, max(1, 2**17 // logits.numel()))
                return
            for draw in draws:
                generators[:] = draw
                yield self.logits(inputs_NCHW, metas)[:, None]

    def logits(self, inputs_NCHW: torch.Tensor, metas: list[dict]) -> torch.Tensor:
        """Logits of one pass, (N, C, h, w).

        Raises:
            ValueError: The model gives something else.
        """
        n, channels = len(metas), getattr(decode_head(self.model), 'out_channels', None)
        is_first = self.windows and self.windows.sum is None  # of the passes, without dropout
        with self.windows.open(inputs_NCHW) if is_first else contextlib.nullcontext():
            output = self.model.inference(inputs_NCHW, metas)
        found = [each for each in leaves_of(self.logits_of(output)) if isinstance(each, torch.Tensor) and
                 each.ndim == 4 and len(each) == n and each.shape[1] in (channels, channels or each.shape[1])]
        if len(found) != 1:
            shapes = ', '.join(str(tuple(getattr(each, 'shape', ())) or type(each).__name__)
                               for each in leaves_of(output)) or type(output).__name__
            raise ValueError(f'{type(self.model).__name__}.inference should return logits ({n}, {channels or "classes"}'
                             f", H, W), but got {shapes}: name a function that gets them from it by `al.logits="
                             "'package.module:function'`")
        return found[0]

    def last_layer(self, features_NKHW: torch.Tensor, draws: list, at_once: int) -> Iterator[torch.Tensor]:
        """Logits of all passes, from the input of ``conv_seg``: dropping a channel is a zero in its weights."""
        conv, p = decode_head(self.model).conv_seg, self.dropouts[0].p
        weight_CK, (h, w) = conv.weight.flatten(1), features_NKHW.shape[2:]
        for first in range(0, self.mc, at_once):
            draws_SNK = [[torch.rand(weight_CK.shape[1], generator=each) for each in draw]
                         for draw in draws[first:first + at_once]]
            mask_NSK = torch.stack([torch.stack(draw_NK) for draw_NK in draws_SNK], 1)
            weight_NSCK = weight_CK * ((mask_NSK >= p) / (1 - p)).to(weight_CK)[:, :, None]
            logits_NMP = weight_NSCK.flatten(1, 2) @ features_NKHW.flatten(2)
            logits_NSCHW = logits_NMP.unflatten(1, (-1, len(weight_CK))).unflatten(3, (h, w))
            yield logits_NSCHW + conv.bias.view(-1, 1, 1)


def committee(model: torch.nn.Module, number: int) -> list[dict | None]:
    """Weights that pass over images: those that the model holds and, up to a number, those of the other checkpoints of
    the round, from the newest on (snapshots; Huang et al., ICLR 2017).

    Raises:
        ValueError: There are not so many.
    """
    if number == 1 or not hasattr(model, 'al_weights'):  # no round was trained yet
        return [None]
    folder = osp.dirname(model.al_weights)
    paths = sorted(glob.glob(osp.join(glob.escape(folder), '[ei]*_*.pth')),
                   key=lambda path: int(re.findall(r'\d+', path)[-1]), reverse=True)
    others = [path for path in paths if not osp.samefile(path, model.al_weights)][:number - 1]
    if len(others) < number - 1:
        raise ValueError(f'`al.strategy.committee` = {number} needs so many checkpoints of a round, but {folder} has '
                         f'{1 + len(others)}: set `default_hooks.checkpoint.interval` and `.max_keep_ckpts` so that '
                         'they are kept')
    members = [copy.deepcopy(model.state_dict())]
    for path in others:
        with reading(path):
            members.append(CheckpointLoader.load_checkpoint(path, 'cpu')['state_dict'])
    return members


class Windows:
    """Features of a batch, from one call of ``inference``: those of each window that the model looks at, which for
    whole inference is the image. Overlapping windows are averaged, as mmseg averages their logits, but at the features'
    own resolution: a window's cells count in the image's cells by the area that they share.

    Args:
        place: ``al.strategy.features_from``.
        are_all: Whether nothing but features is wanted: what comes after them then does not run.

    Raises:
        ValueError: The model has no such place.
    """

    def __init__(self, model: torch.nn.Module, place: str, are_all: bool):
        self.model, self.place, self.are_all = model, place, are_all
        self.module, self.caught, self.starts = feature_module(model, place), [], iter(())
        self.sum = self.weight = None

    @contextlib.contextmanager
    def open(self, inputs):
        """Catch features while ``inference`` runs on these inputs."""
        look, inputs_NCHW = getattr(self.model, 'encode_decode', None), leaves_of(inputs)[0]
        self.starts = window_starts(self.model.test_cfg, inputs_NCHW.shape[2:])

        def keep(module, args, output=None) -> None:
            if not self.caught:  # a head may call its last layer more than once
                self.caught.append(args[0] if self.place == 'decode_head' else output)
                if self.are_all:
                    raise SeenEnough

        def look_at(window_NCHW, *args, **kwargs):
            try:
                logits = look(window_NCHW, *args, **kwargs)
            except SeenEnough:
                shape = leaves_of(window_NCHW)[0].shape
                logits = inputs_NCHW.new_zeros(()).expand(len(inputs_NCHW), self.model.out_channels, *shape[2:])
            self.add(leaves_of(window_NCHW)[0], inputs_NCHW)
            return logits

        kind = 'register_forward_pre_hook' if self.place == 'decode_head' else 'register_forward_hook'
        with contextlib.ExitStack() as stack:
            stack.callback(getattr(self.module, kind)(keep).remove)
            if look:
                stack.enter_context(attribute(self.model, 'encode_decode', look_at))
            else:
                stack.callback(self.add, inputs_NCHW, inputs_NCHW)
                stack.enter_context(contextlib.suppress(SeenEnough))
            yield

    def add(self, window_NCHW: torch.Tensor, inputs_NCHW: torch.Tensor) -> None:
        """What was caught in a window of the inputs, of which the next one is looked at."""
        if not self.caught:
            raise ValueError(no_features(self.model, self.place))
        part_NKHW = feature_map(self.model, self.place, self.caught.pop(), window_NCHW.shape[2:]).float()
        if window_NCHW.shape == inputs_NCHW.shape:
            self.sum, self.weight = part_NKHW, 1
            return
        y, x = next(self.starts, (0, 0))
        h, w = window_NCHW.shape[2:]
        if not torch.equal(window_NCHW, inputs_NCHW[..., y:y + h, x:x + w]):
            raise ValueError(f"`model.test_cfg.mode` should be 'whole' for features of a {type(self.model).__name__}, "
                             "whose windows are not those of mmseg's slide inference, or not in that order")
        shares = [cell_shares(*each).to(part_NKHW) for each in zip(
            inputs_NCHW.shape[2:], (y, x), (h, w), part_NKHW.shape[2:])]
        if self.sum is None:
            self.sum, self.weight = part_NKHW.new_zeros(*part_NKHW.shape[:2], *map(len, shares)), 0
        self.sum += shares[0] @ part_NKHW @ shares[1].T
        self.weight = self.weight + shares[0].sum(1)[:, None] * shares[1].sum(1)

    def mean(self) -> torch.Tensor:
        """(N, K, h, w)"""
        return self.sum / self.weight


def window_starts(test_cfg: dict, shape: tuple) -> Iterator[tuple[int, int]]:
    """Where the windows of mmseg's slide inference begin, in its order: the last of a row or column is shifted back."""
    if test_cfg.get('mode') == 'slide':
        yield from itertools.product(*(
            [max(0, min(i * stride, size - crop)) for i in range(max(0, size - crop + stride - 1) // stride + 1)]
            for size, crop, stride in zip(shape, test_cfg['crop_size'], test_cfg['stride'])))


class SeenEnough(Exception):
    """Ends the pass of a model at the features."""


def cell_shares(size: int, start: int, window: int, cells: int) -> torch.Tensor:
    """Along one axis, the share of each cell of an image that lies in each of a window's cells. (image's cells,
    window's cells)"""
    edges, own = (torch.arange(n + 1, dtype=torch.float64) * (length / n) + first for n, length, first in (
        (max(1, round(size * cells / window)), size, 0), (cells, window, start)))
    common = torch.minimum(edges[1:, None], own[1:]) - torch.maximum(edges[:-1, None], own[:-1])
    return common.clamp_min(0) / edges[1]


def feature_module(model: torch.nn.Module, place: str) -> torch.nn.Module:
    """The module whose output, or for ``decode_head`` the last layer whose input, features are: of a cascade's heads,
    that of the last which has one.

    Raises:
        ValueError: The model has none.
    """
    if place == 'decode_head':
        heads = getattr(model, 'decode_head', None)
        heads = heads if isinstance(heads, torch.nn.ModuleList) else [heads]
        module = next((head.conv_seg for head in reversed(heads) if hasattr(head, 'conv_seg')), None)
    else:  # a multimodal segmentor calls its backbone so
        name = 'image_encoder' if place == 'backbone' and not hasattr(model, 'backbone') else place
        module = dict(model.named_modules()).get(name)
    if module is None:
        raise ValueError(no_features(model, place))
    return module


def feature_map(model: torch.nn.Module, place: str, output, shape: tuple) -> torch.Tensor:
    """One map from what a module returns: a map, tokens of a transformer, or several, enlarged to the finest. Of those
    of a backbone, or of the neck after it, the ones that the decode head reads (``in_index``) count. (N, K, h, w)

    Raises:
        ValueError: There is none in it.
    """
    found = [each for each in leaves_of(output) if isinstance(each, torch.Tensor)]
    maps = [each for each in found if each.ndim == 4] or [
        each for each in map(functools.partial(token_map, shape=shape), found) if each is not None]
    if place == ('neck' if getattr(model, 'with_neck', False) else 'backbone') and len(maps) > 1:
        index = getattr(decode_head(model), 'in_index', -1)
        maps = [maps[i] for i in (index if isinstance(index, (list, tuple)) else [index])]
    if not maps:
        raise ValueError(no_features(model, place))
    finest = max((each.shape[2:] for each in maps), key=math.prod)
    return torch.cat([each if each.shape[2:] == finest else F.interpolate(each, finest) for each in maps], 1)


def token_map(tokens_NLK: torch.Tensor, shape: tuple) -> torch.Tensor | None:
    """Tokens as a map of an input's (H, W), less class tokens and registers, which come first. (N, K, h, w)"""
    if tokens_NLK.ndim != 3:
        return None
    for more in range(min(17, tokens_NLK.shape[1])):
        n = tokens_NLK.shape[1] - more
        h, w = (max(1, round(math.sqrt(n * a / b))) for a, b in (shape, shape[::-1]))
        if h * w == n:
            return tokens_NLK[:, more:].mT.unflatten(2, (h, w))
    return None


def mirrored(inputs):
    """A network's inputs, mirrored: a tensor, or lists and dicts of them."""
    if isinstance(inputs, dict):
        return {key: mirrored(each) for key, each in inputs.items()}
    return [mirrored(each) for each in inputs] if isinstance(inputs, (list, tuple)) else inputs.flip(-1)


def deal_batches(state: State, names: list[str], shared: bool = True) -> list[list[str]]:
    """This rank's batches of the images: dealt in turn, so that a batch holds the same images, and an image gets the
    same score, for any number of processes. All batches if not ``shared``."""
    rank, world_size = get_dist_info() if shared else (0, 1)
    size = scoring_loader(state.runner.cfg).get('batch_size', 1)
    return [names[i:i + size] for i in range(0, len(names), size)][rank::world_size]


def classifies_masks(head: torch.nn.Module) -> bool:
    """Whether a head ends in class scores of masks, a sum of softmax x sigmoid over its queries, and not in logits."""
    names = {'MaskFormerHead', 'Mask2FormerHead', 'SideAdapterCLIPHead'}
    return hasattr(head, '_seg_data_to_instance_data') or not names.isdisjoint(c.__name__ for c in type(head).__mro__)


def fixed_parts(module: torch.nn.Module, dropouts: set) -> Iterator[torch.nn.Module]:
    """The largest modules below this one that have none of the dropout layers in them."""
    for part in module.children():
        if isinstance(part, (torch.nn.ModuleList, torch.nn.ModuleDict)) or not dropouts.isdisjoint(part.modules()):
            yield from fixed_parts(part, dropouts)
        else:
            yield part


def query_dataloader(state: State, batches: list[list[str]]):
    """The test dataloader over batches of the pool's images."""
    loader = dict(scoring_loader(state.runner.cfg), dataset=state.pool, sampler=None, batch_sampler=batches)
    for key in ('batch_size', 'drop_last', 'num_batch_per_epoch'):
        loader.pop(key, None)
    return Runner.build_dataloader(loader, seed=0)


def scoring_loader(cfg: dict) -> dict:
    """The config of the dataloader whose batches the pool is scored in."""
    return next((cfg[key] for key in ('test_dataloader', 'val_dataloader') if cfg.get(key)), {})


def precision(trainer: Runner):
    """The context of the precision that a round trains in: mixed under an ``AmpOptimWrapper``, in its dtype."""
    wrapper = trainer.cfg.optim_wrapper
    kind, dtype = wrapper.get('type', 'OptimWrapper'), wrapper.get('dtype')
    kind = OPTIM_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    if not (inspect.isclass(kind) and issubclass(kind, AmpOptimWrapper)):
        return autocast(enabled=False, dtype=None)
    return autocast(enabled=True, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def native_resolution(model: torch.nn.Module):
    """Let the decode head return logits at its own resolution, where all it does after is to enlarge them."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    head = decode_head(model)
    only_resizes = getattr(type(head), 'predict_by_feat', None) is BaseDecodeHead.predict_by_feat
    if not only_resizes or model.test_cfg.get('mode', 'whole') != 'whole':
        return contextlib.nullcontext()
    return attribute(head, 'predict_by_feat', lambda seg_logits, batch_img_metas: seg_logits)


@contextlib.contextmanager
def attribute(owner, name: str, value):
    """Set an object's own attribute for a while."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if had else delattr(owner, name)


def as_it_is(maps_HW: torch.Tensor, seen: Seen) -> torch.Tensor:
    return maps_HW


def to_probs(logits_NCHW: torch.Tensor, are_scores: bool = False) -> torch.Tensor:
    """Softmax; for a binary head with one output, its sigmoid and the rest; for a head that classifies masks, whose
    class scores are not negative, their shares."""
    if are_scores:
        return logits_NCHW.float() / logits_NCHW.float().sum(1, keepdim=True).clamp_min(1e-12)
    if logits_NCHW.shape[1] > 1:
        return logits_NCHW.float().softmax(1)
    p = logits_NCHW.float().sigmoid()
    return torch.cat([1 - p, p], 1)


def remembering(module: torch.nn.Module, generators: list) -> Callable:
    """A module's ``forward`` that keeps what it gets and makes in the first pass, which is without dropout and so
    without ``generators``, and answers with that when it gets the same again. What has been written to since does not
    count."""
    forward, kept = module.forward, []

    def answer(*args, **kwargs):
        given = leaves_of((args, kwargs))
        for i, (before, output, versions) in enumerate(kept):
            if len(given) == len(before) and all(leaf._version == version for leaf, version in versions) and all(
                    map(same_argument, given, before)):
                kept.append(kept.pop(i))  # calls come again in the same order, so the next may be first
                return output
        versions = [(leaf, leaf._version) for leaf in given if isinstance(leaf, torch.Tensor)]
        output = forward(*args, **kwargs)
        if not generators:
            versions += [(leaf, leaf._version) for leaf in leaves_of(output) if isinstance(leaf, torch.Tensor)]
            kept.append((given, output, versions))
        return output

    return answer


def same_argument(one, other) -> bool:
    """Whether two arguments of a module are the same: the same memory, or the same numbers."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride()) or \
            torch.equal(one, other)
    return one is other or isinstance(one, (int, float, str)) and one == other


def leaves_of(value) -> list:
    """What nested tuples, lists and dicts hold."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else None
    return [value] if inner is None else [leaf for each in inner for leaf in leaves_of(each)]


def apply_dropout(layer: torch.nn.Module, generators: list, untouched: list, x: torch.Tensor) -> torch.Tensor:
    """A dropout layer's output, drawn from the generators, one for each image of the batch; without any, its input.
    What comes after is no longer ``untouched``."""
    untouched.clear()
    if not generators:
        return x
    images = len(generators) if len(x) % len(generators) == 0 else 1  # else the first axis is not the batch
    shape = (len(x) // images, *x.shape[1:])
    if not isinstance(layer, torch.nn.Dropout):  # whole channels
        shape = shape[:2] + (1, ) * (x.ndim - 2)
    mask = torch.cat([torch.rand(shape, generator=each) for each in generators[:images]])
    return x * ((mask >= layer.p).to(x.device) / (1 - layer.p)).to(x)  # a byte a number goes there


def no_features(model: torch.nn.Module, place: str) -> str:
    what = "the input of a head's last layer `conv_seg`" if place == 'decode_head' else \
        'a module of this name that makes maps (N, K, h, w) or tokens (N, L, K)'
    return (f'`al.strategy.features_from` should be where features are, e.g. \'backbone\', but got {place!r}: a '
            f'{type(model).__name__} with a {type(decode_head(model)).__name__} has not {what}')


def decode_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """The head that gives a segmentor's logits: of a cascade, the last."""
    head = getattr(segmentor(model), 'decode_head', None)
    return head[-1] if isinstance(head, (torch.nn.ModuleList, list)) else head


def segmentor(model: torch.nn.Module) -> torch.nn.Module:
    """What predicts: the model itself or, of a distillation, its student."""
    parts = model, getattr(model, 'student', None), getattr(model, 'architecture', None)
    return next((part for part in parts if hasattr(part, 'inference')), model)


def dropouts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The dropout layers that are in the way from image to logits."""
    kinds = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d)
    return [module for name, module in model.named_modules()
            if isinstance(module, kinds) and module.p > 0 and not name.startswith('auxiliary_head')]


def to_image(maps_CHW: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Maps over a network's input in the coordinates of the original image: what mmseg does to logits."""

    def resize(maps, size):
        return maps if tuple(maps.shape[1:]) == tuple(size) else F.interpolate(
            maps[None], tuple(size), mode='bilinear', align_corners=seen.align_corners)[0]

    return resize(without_padding(resize(maps_CHW, seen.input_hw), seen), seen.meta['ori_shape'][:2])


def without_padding(maps_HW: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Maps (..., h, w) over a network's input, at their own resolution, less the padding and unflipped."""
    meta, (in_h, in_w), (h, w) = seen.meta, seen.input_hw, maps_HW.shape[-2:]
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    rows = slice(round(top * h / in_h), max(1, h - round(bottom * h / in_h)))
    cols = slice(round(left * w / in_w), max(1, w - round(right * w / in_w)))
    maps_HW = maps_HW[..., rows, cols]
    if meta.get('flip'):
        maps_HW = maps_HW.flip(-1 if meta.get('flip_direction') == 'horizontal' else -2)
    return maps_HW


class Seen(NamedTuple):
    """What the network sees in an image."""
    meta: dict
    input_hw: tuple  # size of the network's input
    align_corners: bool  # how mmseg enlarges its logits
    means: list  # for each view a dict of `STATISTICS`, (1, ...) each
    features: torch.Tensor | None  # (K, h, w), of the pass without dropout


# ---------------------------------------------------------------------------------------------------------------------
# State: what was asked for, what it cost and what came of it; `al_state.json`, folders and paths of a run
# ---------------------------------------------------------------------------------------------------------------------


def config_digest(cfg: dict) -> dict:
    """A short digest for each top-level config key that shapes training, to tell what changed between two starts."""
    volatile = {'al', 'work_dir', 'resume', 'launcher', 'log_level', 'visualizer', 'vis_backends', 'env_cfg',
                'experiment_name', 'model_wrapper_cfg', 'custom_imports', 'log_processor'}
    return {key: hashlib.sha256(pprint.saferepr(value).encode()).hexdigest()[:12]  # a dumped config has another order
            for key, value in sorted(Config.to_dict(cfg).items()) if key not in volatile}


class State:
    """One run: its settings, its pool, and the rounds so far. It alone knows the JSON, the paths and the masks.

    Attributes:
        rounds: One dict a round: ``asked`` ({image name: None for the whole image, or [units, pixels]}), ``strategy``
            that asked, ``spent`` by then, and after training ``metrics``, ``checkpoints`` and times; see
            ``ROUND_FIELDS``.
        config: Digests of the config that trained last; ``digest``: of the round's, ``changed``: its keys that differ.
        begin, end: The iterations of the round, if it goes on where the last one ended.
        phase: What the newest round waits for: its labels (``label``), ``train`` or ``query``.
        is_resumed: Whether the newest round was begun by an earlier start of the run.
        companions: Hooks that go along in every round.
        scores, thresholds, collector: Of the newest query, in memory alone: image name -> the highest score in it;
            ``thresholds_C``, if the strategy calibrates; and its ``Collector``.
    """

    def __init__(self, content: dict, work_dir: str, al: dict | None = None, runner: Runner | None = None,
                 pool: Pool | None = None):
        self.work_dir, self.runner, self.pool = work_dir, runner, pool
        self.al = al
        self.seed, self.config = content['seed'], content['config']
        self.rounds, self.phase, self.ended = content.get('rounds', []), content.get('phase', 'train'), None
        self.is_resumed, self.companions, self._labelled, self._texts = bool(self.rounds), [], {}, []
        self.dropped = content.get('dropped', [])

    def save(self) -> None:
        """Commit the state from rank 0; every rank returns when it is on disk."""
        if is_main_process():
            content = dict(schema=SCHEMA, phase=self.phase, round=self.round, seed=self.seed, ended=self.ended,
                           settings=self.al.to_dict(), config=self.config, images=len(self.pool),
                           pixels=self.pool.pixels if self.counts_pixels else None, rounds=self.rounds,
                           pool=self.pool.names, classes=self.classes, dropped=self.dropped)
            write_state(self.work_dir, content, self._texts)
        barrier()

    @property
    def round(self) -> int:
        return len(self.rounds) - 1

    @property
    def entry(self) -> dict:
        """The newest round."""
        return self.rounds[-1]

    @property
    def logger(self) -> MMLogger:
        return self.runner.logger

    @property
    def model(self) -> torch.nn.Module:
        return unwrap(self.runner.model)

    @property
    def keeps_labels(self) -> bool:
        """Whether labels are in the store, and not the data set's own: people's, and those of one class a unit."""
        return split_setting(self.al.oracle)[0] == 'human' or self.al.get('unit', {}).get('label') == 'dominant'

    @property
    def classes(self) -> list[str]:
        """Names of the data set's classes."""
        return list(self.pool.leaves[0].metainfo.get('classes') or ())

    @functools.cached_property
    def strategy(self) -> Strategy:
        return resolve_strategy(self.al.strategy)

    def strategy_of(self, k: int) -> Strategy:
        """What asks for round ``k``: nothing is known before the first."""
        return self.strategy if k else resolve_strategy('random')

    @functools.cached_property
    def unit(self) -> Unit:
        return resolve_unit(self.al.unit)

    @property
    def counts_pixels(self) -> bool:
        """Whether the budget and what is labelled are counted in pixels, and kept in masks, or in whole images."""
        return self.unit.kind.counts_pixels

    def warn(self, text: str) -> None:
        """Log what is hardly as it should be, and keep it with the newest round, once."""
        if text not in self.entry.setdefault('warnings', []):
            self.entry['warnings'].append(text)
            self.logger.warning(text)

    def units(self, name: str) -> Areas:
        """The units of an image."""
        return self.unit.of(self, name)

    def shuffled(self, names: list[str], *purpose) -> list[str]:
        """Names of images in the order of what each has drawn for one named purpose."""
        return sorted(names, key=lambda name: seed_of(self.seed, *purpose, name))

    def folder(self, k: int | None = None) -> str:
        """The work_dir of a round (default: the newest)."""
        return osp.join(self.work_dir, f'round_{self.round if k is None else k}')

    def checkpoint(self, k: int, which: str) -> str:
        """A round's ``last`` or ``best`` checkpoint."""
        path = osp.join(self.folder(k), self.rounds[k]['checkpoints'].get(which, which))
        if not osp.isfile(path):
            raise FileNotFoundError(f'the checkpoint {path} that the run needs to go on is gone: put it back, or start '
                                    'in another work_dir')
        return path

    def labelled(self, until: int | None = None) -> dict[str, int | None]:
        """What is labelled in round ``until`` (default: now): image name -> None for a whole image, else the round
        whose mask file holds all that is labelled of it. In the order in which images were first asked for."""
        until = self.round if until is None else until
        if until not in self._labelled:
            self._labelled[until] = {name: None if units is None else k
                                     for k, entry in enumerate(self.rounds[:until + 1])
                                     for name, units in entry['asked'].items() if name not in self.dropped}
        return self._labelled[until]

    def mask_path(self, k: int, name: str) -> str:
        """Where round ``k`` keeps the mask of what is labelled of an image."""
        return png_path(osp.join(self.folder(k), 'labelled'), name, self.work_dir)

    def mask(self, name: str, until: int | None = None) -> np.ndarray:
        """What is labelled of an image in round ``until`` (default: now), (H, W) booleans."""
        have = self.labelled(until)
        if have.get(name) is not None:
            return read_mask(self.mask_path(have[name], name))
        return np.full(self.pool.sizes[name], name in have)

    def mask_of(self, name: str, ids: np.ndarray | None) -> np.ndarray:
        """The pixels of some units of an image, or all where ``ids`` is None, (H, W) booleans."""
        return np.full(self.pool.sizes[name], True) if ids is None else self.units(name).mask(ids)

    def load_label(self, name: str) -> np.ndarray:
        """The label map of an image that was asked for, (H, W): what people have given, or what is on disk."""
        return self.stored_label(name)[0] if self.keeps_labels else self.pool.load_label(name)

    def stored_label(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The classes of an image in the label store, and what of it is done, (H, W) both."""
        ignore_index, shape = self.pool.ignore_index, self.pool.sizes[name]
        if not osp.isfile(self.label_path('done', name)):
            return np.full(shape, ignore_index), np.zeros(shape, bool)
        return read_classes(self.label_path('classes', name), ignore_index), read_mask(self.label_path('done', name))

    def stored(self, name: str) -> tuple[str, str]:
        """Where the label store has an image's classes, and the newest file that they came in."""
        newest = [*mmengine.load(self.label_path('read', name, '.json')).values()][-1]
        return self.label_path('classes', name), self.label_path('handed_in', f'{name}.{newest}', '')

    def label_path(self, kind: str, name: str, suffix: str = '.png') -> str:
        """Where the label store keeps what people have given, whatever becomes of the files that it came in:
        ``labels/classes`` has classes, in 16 bits where 8 do not do, ``done`` the masks of what is done, where the
        highest value is void; ``handed_in`` has the files, under their hashes, and ``read`` their names by source."""
        path = png_path(osp.join(self.work_dir, 'labels', kind), name, self.work_dir)
        return path.removesuffix('.png') + suffix

    def count_void(self, name: str, mask_HW: np.ndarray) -> int:
        """How many pixels of what was asked for are void, after checking their labels."""
        label = self.pool.check_label(name, self.class_count, mask_HW)
        return int((label[mask_HW] == self.pool.ignore_index).sum())

    @property
    def class_count(self) -> int | None:
        """How many classes the model tells apart. One: its sigmoid tells it from 0."""
        classes = getattr(self.model, 'num_classes', None)
        return classes and max(2, classes)

    def spent(self) -> dict:
        """What is labelled by now, as figures for log and table: images and, below image level, units and pixels."""
        figures = dict(images=len({name for entry in self.rounds for name in entry['asked']}))
        if not self.counts_pixels:
            return {**figures, '% of images': round(100 * figures['images'] / len(self.pool), 2)}
        pixels, void = (sum(entry[key] for entry in self.rounds) for key in ('pixels', 'void_pixels'))
        units = sum(units[0] for entry in self.rounds for units in entry['asked'].values() if units)
        return {**figures, f'{self.al.unit.type}s': units, 'pixels': pixels,
                '% of pixels': round(100 * pixels / self.pool.pixels, 3),
                '% void': round(100 * void / max(1, pixels), 1)}


def read_state(path: str) -> dict:
    """What ``al_state.json`` holds, in today's schema.

    Raises:
        ValueError: It is damaged, or written by a newer version of this module.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file, object_pairs_hook=without_duplicates)
        schema = content['schema']
        if repr(schema) in ('1', '2'):  # and not True
            for entry in content['rounds']:
                if isinstance(entry['asked'], list):  # whole images
                    entry['asked'] = dict.fromkeys(entry['asked'])
                if 'pixels' in entry:
                    entry.setdefault('void_pixels', 0)
                entry.setdefault('spent', entry.pop('labelled', {}))
                entry.setdefault('strategy', {})
                for which, file in entry.get('checkpoints', {}).items():
                    entry['checkpoints'][which] = osp.basename(file)
            content = {'pool': [], 'ended': None, 'pixels': None, **content, 'schema': SCHEMA}
        if type(schema) is not int or schema <= SCHEMA:
            check_fields(content, STATE_FIELDS, 'state')
            last = len(content['rounds']) - 1
            for k, entry in enumerate(content['rounds']):
                is_trained = k < last or content['phase'] == 'query'
                check_fields(entry, ROUND_FIELDS + TRAINED_FIELDS * is_trained, f'rounds[{k}]')
            if content['round'] != last:
                raise ValueError(f'`state.round` should be {last}, the last of `rounds`, but is {content["round"]}')
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is damaged ({error}): restore a copy, or start in another work_dir') from error
    if schema > SCHEMA:
        raise ValueError(f'{path} should have schema {SCHEMA} or less, but got {schema}: use the al_patch.py that wrote'
                         ' it')
    return content


def write_state(work_dir: str, content: dict, finished: list[str]) -> None:
    """Write ``al_state.json``.

    Args:
        finished: The texts of all rounds but the newest, which change no more. They are kept from one call to the next,
            so that a round takes no longer because others were before it.
    """
    finished += map(to_text, content['rounds'][len(finished):-1])
    rounds = f'"rounds": [{", ".join([*finished, to_text(content["rounds"][-1])])}]'
    write_atomically(osp.join(work_dir, STATE_FILE), to_text({**content, 'rounds': []}).replace(
        '"rounds": []', rounds))  # a key: in strings, quotes are escaped


# in lines, but not by `indent`, which takes ten times as long
to_text = functools.partial(json.dumps, ensure_ascii=False, separators=(',\n', ': '))


def without_duplicates(pairs: list) -> dict:
    """A JSON object, in which no key stands twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'`{twice[0][0]}` stands twice in one object')
    return content


def check_fields(given: dict, fields: str, where: str) -> None:
    """
    Raises:
        ValueError: A field is not what ``fields``, a line each, say of it. One with a question mark may be missing.
    """
    for field, kind in (line.split(None, 1) for line in fields.splitlines()):
        name = field.rstrip('?')
        if not (is_kind(given[name], kind) if name in given else name != field):
            raise ValueError(f'`{where}.{name}` should be {kind}, but is '
                             f'{repr(given[name])[:200] if name in given else "missing"}')


def is_kind(value, kind: str) -> bool:
    """Whether a value out of JSON is a literal, of a type, or of one of ``KINDS``; {} and [] have such in them."""
    if kind[0] in '{[':
        parts = value.values() if isinstance(value, dict) else value
        return isinstance(value, dict if kind[0] == '{' else list) and all(is_kind(part, kind[1:-1]) for part in parts)
    first, _, rest = kind.partition(' | ')
    is_first = KINDS[first](value) if first in KINDS else first in (type(value).__name__, repr(value))
    return is_first or rest != '' and is_kind(value, rest)


KINDS = dict(
    count=lambda v: is_int(v), units_and_pixels=lambda v: is_list_of(v, is_int, 2),
    amount=lambda v: is_number(v) and 0 <= v < 2**63,
    file_name=lambda v: isinstance(v, str) and '/' not in v and v.strip('.'))
STATE_FIELDS = """\
schema         3
phase          'label' | 'train' | 'query'
round          count
seed           count
ended          None | str
settings       dict
config         {str}
images         count
pixels         None | count
rounds         [dict]
pool           [str]
dropped?       [str]
classes?       [str]
"""
# `asked`: of each image units and pixels, or None for the whole; `pixels`: below image level; `held_out`: images that
# the round does not train on; `ids`: of the units that people are asked for
ROUND_FIELDS = """\
asked          {units_and_pixels | None}
strategy       dict
spent          {amount}
pixels?        count
void_pixels?   count
held_out?      [str]
ids?           {[count]}
returned?      {units_and_pixels | None}
unchanged?     count
from_store?    count
asked_at?      str
accepted_at?   str
warnings?      [str]
"""
# `checkpoints`: last and best, in the round's own folder; `changed`: keys of the config, since the round before
TRAINED_FIELDS = """\
metrics        {float}
checkpoints    {file_name}
train_seconds  amount
query_seconds? amount
changed?       [str]
"""
STATE_FILE = 'al_state.json'
SCHEMA = 3

# ---------------------------------------------------------------------------------------------------------------------
# The pool: all training images by name; where images and the labels that were asked for come from
# ---------------------------------------------------------------------------------------------------------------------


class Pool(Dataset):
    """Every image of the training set, labelled or not, in the data set's order, through the query pipeline: without
    its label.

    Args:
        cfg: The run's config.
        model: What it builds.

    Attributes:
        ignore_index: What stands for "no label": what the loss ignores.
        paths: Of the data sets in the config that are the pool.
        leaves: These data sets; ``training``: the transforms of each in training.

    Raises:
        ValueError: There is no image, or two images have one name.
    """

    def __init__(self, cfg: dict, model: torch.nn.Module | None = None):
        self.ignore_index = getattr(decode_head(model or cfg.get('model')), 'ignore_index', 255)
        self.leaves, self.training, self.where, self.steps, paths = [], [], {}, {}, {}
        check = f'check `train_dataloader.dataset`, its folders (relative ones: from {os.getcwd()}) and `img_suffix`'
        try:
            leaves, transforms = build_leaves(cfg['train_dataloader']['dataset']), None
        except ValueError as error:  # mmengine's own for an empty one is 'need at least one array to concatenate'
            raise ValueError(f'the training set has no images or cannot be read: {check} ({error})') from error
        self.paths = pool_paths(leaves, cfg.get('al', {}).get('pool'))
        for leaf, pipeline in map(leaves.get, self.paths):
            self.training.append(steps_of(copy.deepcopy(pipeline)))
            if not isinstance(leaf, BaseDataset):
                raise ValueError('active learning filters subclasses of mmengine.dataset.BaseDataset, but got a '
                                 f'{type(leaf).__name__}')
            leaf.full_init()
            leaf.test_mode = True  # an unreadable image is then an error, and not replaced by another one
            for index in range(len(leaf)):
                info = leaf.get_data_info(index)
                name, path = image_name(leaf, info), image_path(info)
                with reading(path):
                    name.encode()  # the state is UTF-8: a file's name that is not has no place there
                if paths.setdefault(name, path) != path:
                    raise ValueError(f'image names should be unique, but {paths[name]} and {path} are both {name!r}')
                self.where.setdefault(name, (len(self.leaves), index))
            if len(leaf):
                transforms = transforms or query_steps(cfg, leaf.get_data_info(0))
                leaf.pipeline = Compose(transforms)
            self.leaves.append(leaf)
        self.names = list(self.where)
        if not self.names:
            raise ValueError(f'the training set has no images: {check}')

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str | int) -> dict:
        """An image, by name or position, as the query pipeline gives it. One that cannot be read is named."""
        leaf, index = self.leaf_of(name if isinstance(name, str) else self.names[name])
        with reading(image_path(leaf.get_data_info(index))):
            return leaf[index]

    def leaf_of(self, name: str) -> tuple[BaseDataset, int]:
        """The data set that an image stands in, and its index there."""
        leaf, index = self.where[name]
        return self.leaves[leaf], index

    def info(self, name: str) -> dict:
        """What the data set knows of an image: ``img_path``, ``seg_map_path`` and the rest."""
        leaf, index = self.leaf_of(name)
        return leaf.get_data_info(index)

    def load_image(self, name: str) -> np.ndarray:
        """An image as its pipeline loads it, (H, W[, C]), before any other transform; of several, as two dates, the
        first."""
        results = self.info(name)
        with reading(image_path(results)):
            for step in self.leaf_of(name)[0].pipeline.transforms:
                if 'img' not in results:
                    results = step(results)
            return results['img'][0] if isinstance(results['img'], list) else results['img']

    def load_label(self, name: str) -> np.ndarray:
        """The label map of an image that was asked for, (H, W), as training loads it."""
        (*first, last), mapping = self.label_steps(name)
        with reading(image_path(self.info(name))):
            results = Compose(first)(self.info(name))
        return Compose([last, *mapping])(results)['gt_seg_map']

    def label_steps(self, name: str, **more) -> tuple[list, list]:
        """The steps that load the label map of an image that was asked for, and those that map its values. Found once
        for a data set.

        Args:
            more: What is another in what the data set knows of the image, e.g. ``seg_map_path``.
        """
        leaf = self.where[name][0]
        if leaf not in self.steps:
            self.steps[leaf] = label_steps(self.training[leaf], {**self.info(name), **more})
        return self.steps[leaf]

    def check_label(self, name: str, classes: int | None, mask_HW: np.ndarray | slice = slice(None),
                    path: str | None = None, load: Callable | None = None) -> np.ndarray:
        """The labels of an image that was asked for, (H, W).

        Args:
            path, load: Of another label file than the data set's, and a function (name) that loads it.

        Raises:
            ValueError: Image or label map cannot be read, they differ in size, or a label under the mask is none of the
                classes.
        """
        ignore_index, shape = self.ignore_index, self.sizes[name]
        path = path or self.info(name).get('seg_map_path')
        with reading(path or f'the label map of {name!r}'):
            label = (load or self.load_label)(name)
            if label.shape != shape:
                is_small = label.shape[0] * shape[1] == label.shape[1] * shape[0]
                why = ': a thumbnail?' if is_small else ''
                why = ': a colour picture, or several maps in one?' if label.ndim > 2 else why
                raise ValueError(f'its size should be that of its image, {shape}, but is {label.shape}{why}')
            strange = np.setdiff1d(label[mask_HW], [*range(classes or 0), ignore_index])
            with contextlib.suppress(Exception), Image.open(path) as image:
                if image.mode[0] == 'I':  # mmseg's loader cuts 16 bits to 8
                    raw, labels = np.asarray(image)[mask_HW], label[mask_HW]
                    is_cut = ((raw % 256 == labels) | (labels == ignore_index)).all()
                    strange = np.unique(raw[raw > 255]) if is_cut else strange
            if classes and len(strange):
                raise ValueError(f'labels should be below {classes}, the number of classes, or {ignore_index} for none,'
                                 f' but got {", ".join(map(str, strange[:5]))}'
                                 f'{": divide by 255?" if 255 in strange else ""}')
        return label

    @functools.cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(H, W) of every image as its pipeline loads it. al_report.py remembers them between two starts."""
        return {name: self.load_image(name).shape[:2] for name in self.names}

    @functools.cached_property
    def pixels(self) -> int:
        return sum(h * w for h, w in self.sizes.values())


def new_maps(before: dict, after: dict) -> list[str]:
    """The integer maps of the label map's size that a step of a pipeline has added, itself among them."""
    size = after['gt_seg_map'].shape[:2] if 'gt_seg_map' in after else None
    return [key for key, value in after.items() if key not in (*before, 'img') and isinstance(value, np.ndarray)
            and value.dtype.kind in 'iub' and value.shape[:2] == size]


def query_steps(cfg: dict, info: dict) -> list[Callable]:
    """The transforms of the test pipeline that do without a label: what loads one goes, and what fails without. Of
    those of a ``TestTimeAug`` the ones that change the image least are taken.

    Args:
        info: What the data set knows of an image, on which they are tried.

    Raises:
        ValueError: There is no pipeline, or no ``inputs`` come of it; it names the step that fails.
    """
    loader = scoring_loader(cfg)
    pipeline = next(iter(leaf_configs(loader['dataset']).values()))['pipeline'] if loader else cfg.get('test_pipeline')
    if not pipeline:
        raise ValueError('the pool is scored through the test pipeline, but the config has no `test_dataloader`, '
                         '`val_dataloader` or `test_pipeline`')
    with undisturbed(), reading(image_path(info)):
        kept, results, failed = without_label(steps_of(copy.deepcopy(pipeline)), {
            key: value for key, value in info.items() if key != 'seg_map_path'})
        if 'inputs' not in results:
            shape = np.shape(results.get('img'))
            if len(shape) > 3:
                raise ValueError(f'the pipeline should load images (H, W[, C]), but got {shape}')
            if failed:
                raise failed
            raise ValueError(f'the test pipeline should give `inputs`, but gives {", ".join(results)}')
    return kept


def without_label(transforms: list[Callable], results: dict) -> tuple[list, dict, Exception | None]:
    """Of some transforms those that do without a label, what they make of an image, and the first error of another."""
    kept, failed = [], None
    for step in transforms:
        tried = [without_label(each.transforms, results) for each in getattr(step, 'subroutines', ())]
        if tried:
            steps, results, error = min(tried, key=lambda one: change_of(one[1]))
            kept, failed = kept + steps, failed or error
            continue
        try:
            after = step(copy.deepcopy(results))
        except Exception as error:
            failed, after = failed or error, None
        if after is None and 'img' not in results:
            with contextlib.suppress(Exception):
                step = WithoutLabel(step)
                after = step(copy.deepcopy(results))
        if after is None:
            continue
        if 'gt_seg_map' not in after or 'gt_seg_map' in results:
            results = after
            kept.append(step)
    return kept, results, failed


def change_of(results: dict) -> tuple[bool, float]:
    """Whether a packed image is flipped, and how far its size is from its own."""
    meta = results['data_samples'].metainfo if 'data_samples' in results else results
    return bool(meta.get('flip')), abs(math.log(meta['img_shape'][0] / meta['ori_shape'][0]))


class WithoutLabel:
    """A transform that loads image and label at once, given an empty label in place of the image's.

    Args:
        step: The transform.
    """

    def __init__(self, step: Callable):
        self.step = step

    def __call__(self, results: dict) -> dict:
        with tempfile.NamedTemporaryFile(suffix='.png') as file, Image.open(image_path(results)) as image:
            Image.new('L', image.size).save(file.name)
            after = self.step({**results, 'seg_map_path': file.name})
        return {key: value for key, value in after.items() if key not in ('seg_map_path', 'gt_seg_map')} | dict(
            seg_fields=[])


def label_steps(transforms: list[Callable], info: dict) -> tuple[list, list]:
    """The steps of a training pipeline up to the one that gives the label map, and those after it that do nothing but
    map each value of it to one, whatever the values are.

    Args:
        info: What the data set knows of an image that was asked for.

    Raises:
        ValueError: None gives a label map.
    """
    results, loading, mapping = copy.deepcopy(info), [], []
    with undisturbed():
        for step in transforms:
            if 'gt_seg_map' not in results:
                results = step(results)
                loading.append(step)
            elif maps_values(step, results):
                mapping.append(step)
                with contextlib.suppress(Exception):  # it may have values of its own for what is of no class
                    results = step(copy.deepcopy(results))
    if 'gt_seg_map' not in results:
        raise ValueError('the training pipeline should load a label map, `gt_seg_map`, but loads none')
    return loading, mapping


def maps_values(step: Callable, results: dict) -> bool:
    """Whether a step of a pipeline maps each value of a label map to one and leaves the image alone, as it does with a
    small map of one value that has, here and there, all others that it takes."""
    label = results['gt_seg_map']
    values = np.unique(label.reshape(-1, *label.shape[2:]), axis=0)
    values = values if label.ndim > 2 else np.union1d(values, np.arange(256).astype(label.dtype))

    def trial(values: np.ndarray) -> bool | None:
        before = np.repeat(values[-1:], 4096, 0)
        before[np.random.default_rng(0).permutation(4096)[:len(values)]] = values[:4096]
        with contextlib.suppress(Exception):
            after = step({**copy.deepcopy(results), 'gt_seg_map': before.reshape(64, 64, *label.shape[2:]).copy(),
                          'img': np.zeros((64, 64, 3), np.uint8)})
            new = after['gt_seg_map']
            if new.shape != (64, 64) or after['img'].shape != (64, 64, 3) or after['img'].any():
                return False
            _, which = np.unique(before.reshape(4096, -1), axis=0, return_inverse=True)
            is_function = len(np.unique(which.ravel() * 2**16 + new.ravel())) == which.max() + 1
            return is_function and not np.array_equal(new.ravel(), before)

    found = trial(values) and trial(values[::-1])  # a dilation is no function of both
    if found is None:  # it knows some values only, or needs what a step that is left out would have given
        known = [value for value in values if trial(value[None]) is not None]
        found = bool(known) and trial(np.stack(known)) and trial(np.stack(known[::-1]))
    return bool(found)


@contextlib.contextmanager
def undisturbed():
    """Give back the states of the random numbers that code within it draws."""
    states = python_random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    python_random.setstate(states[0])
    np.random.set_state(states[1])


def build_leaves(dataset: dict) -> dict[str, tuple]:
    """The data sets under any nesting of wrappers, as these build them, by their paths, each without its pipeline and
    with it. A wrapper finds no label in them: one that would read labels gives up, and they are built without it."""
    leaves = {}

    def building(config: dict, path: str) -> dict:

        def build_leaf(**more) -> Dataset:
            leaf = DATASETS.build({**copy.deepcopy(config), **more, 'pipeline': []})
            leaves[path] = leaf, {**config, **more}.get('pipeline', [])
            if hasattr(leaf, 'get_data_info'):
                leaf.full_init()
                know = leaf.get_data_info
                leaf.get_data_info = lambda i: {**know(i), 'seg_map_path': None}
            return leaf

        return dict(type=build_leaf)

    with undisturbed(), contextlib.suppress(Exception):
        DATASETS.build(map_leaves(dataset, building))
    for leaf, _ in leaves.values():
        vars(leaf).pop('get_data_info', None)
    for path, config in leaf_configs(dataset).items():
        if path not in leaves:
            leaves[path] = DATASETS.build({**config, 'pipeline': []}), config.get('pipeline', [])
    return leaves


def pool_paths(leaves: dict[str, tuple], named: str | None) -> list[str]:
    """The paths of the data sets that are the pool: what ``al.pool`` names or, if it names nothing, all that read
    labels.

    Raises:
        ValueError: ``al.pool`` names none of them.
    """
    paths = [path for path in leaves if named is None or f'{path}.'.startswith(f'{named}.')]
    if not paths:
        raise ValueError(f'`al.pool` should be the path in `train_dataloader` of a data set, such as '
                         f'{", ".join(map(repr, leaves))}, but got {named!r}')
    return paths if named or len(paths) == 1 else [path for path in paths if reads_labels(*leaves[path])] or paths


def reads_labels(leaf: Dataset, pipeline: list) -> bool:
    """Whether the pipeline of a data set gives no label map without a label file, or one with a class in it: that of
    the unlabelled part of a semi-supervised set does not."""
    with undisturbed(), contextlib.suppress(Exception):
        results = {**leaf[0], 'seg_map_path': None}
        for step in steps_of(copy.deepcopy(pipeline)):
            if 'gt_seg_map' not in results:
                results = step(results)
        return bool((results.get('gt_seg_map', 255) != 255).any())
    return True


def leaf_configs(dataset: dict) -> dict[str, dict]:
    """The data sets under any nesting of wrappers, by their paths in the dataloader."""
    leaves = {}
    map_leaves(dataset, lambda leaf, path: leaves.setdefault(path, leaf))
    return leaves


def map_leaves(dataset: dict, function: Callable, path: str = 'dataset') -> dict:
    """A data set's config in which a function has replaced the leaves under any nesting of wrappers (``RepeatDataset``,
    ``ConcatDataset``, ...), given each and its path. A wrapper is what has data sets among its arguments.

    Raises:
        ValueError: A data set is an object already.
    """
    if not isinstance(dataset, dict):
        raise ValueError(f'`train_dataloader.dataset` should be a config dict down to its leaves, but got a '
                         f'{type(dataset).__name__} object')
    mapped = {}
    for key, value in dataset.items():
        if value and key == 'dataset' or is_dataset(value):
            mapped[key] = map_leaves(value, function, f'{path}.{key}')
        elif value and (key == 'datasets' or isinstance(value, list) and all(map(is_dataset, value))):
            mapped[key] = [map_leaves(each, function, f'{path}.{key}.{i}') for i, each in enumerate(value)]
    return {**dataset, **mapped} if mapped else function(dataset, path)


def is_dataset(config) -> bool:
    """Whether a config is that of a data set: whether what it names has items."""
    with contextlib.suppress(Exception), DATASETS.switch_scope_and_registry(None) as registry:
        return hasattr(registry.get(config['type']) if isinstance(config['type'], str) else config['type'],
                       '__getitem__')
    return False


def steps_of(pipeline: list) -> list[Callable]:
    """The transforms of a pipeline, those of pipelines in it among them."""
    return [inner for step in Compose(pipeline).transforms
            for inner in (steps_of(step.transforms) if type(step).__name__ == 'Compose' else [step])]


def image_path(info: dict) -> str:
    """The first path of an image that a data set knows: ``img_path`` or, where there is none, another or its index."""
    path = info.get('img_path') or next((value for key, value in info.items() if key.endswith('path') and value and
                                         key != 'seg_map_path'), str(info.get('sample_idx')))
    return path if isinstance(path, str) else next(iter(path.values() if isinstance(path, dict) else path))


def image_name(dataset: BaseDataset, info: dict) -> str:
    """An image's name as mmseg's split files spell it: its path below ``img_path``, without ``img_suffix``."""
    prefix = (dataset.data_prefix or {}).get('img_path') or ''
    path = image_path(info)
    name = path[len(prefix):].lstrip('/') if prefix and path.startswith(prefix) else osp.basename(path)
    return name.removesuffix(getattr(dataset, 'img_suffix', None) or osp.splitext(name)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Units: how a score map becomes candidates, and a chosen candidate a mask
# ---------------------------------------------------------------------------------------------------------------------
#
# The units of one image answer the same questions, whatever they are:
#
# - values(scores_HW, reduce): a score for each of `number`, from a map
# - candidates(values, taken, draw, limit, floor, floor_draw): what can be asked for; ids in ascending order, scores,
#   pixels
# - known(values, taken, draw, limit): the same of what is labelled
# - mask(ids): the pixels of some of them, (H, W)
# - weights(ids, cells): how much of each lies in each cell of a coarser map
#
# `taken` is what is labelled, (H, W) booleans; `draw` gives ids their random numbers, by which ties break.


def resolve_unit(setting: str | dict) -> Unit:
    """A unit's settings as functions, with the defaults filled in.

    Raises:
        ValueError: An unknown unit or option, or a value out of range.
    """
    name, given = split_setting(setting)
    function = function_named(UNITS, name, 'al.unit')
    options = check_settings(given, settings_of(function), 'al.unit')
    return Unit(*function(**options), dict(options, type=name))


def regions(size: Pair = (32, 32), window: MaybeNatural = None) -> tuple:
    """Cells (h, w) of a fixed grid; or windows of (2 window + 1)^2 pixels anywhere, of which none overlaps another."""
    if window:
        return Peaks, lambda state, name: Peaks(state.pool.sizes[name], window, 2 * window)
    return Segments, lambda state, name: grid(state.pool.sizes[name], tuple(size))


@functools.lru_cache(8)
def grid(shape: tuple, size: tuple) -> Segments:
    """The cells of a grid, numbered in reading order; those at the right and lower border may be smaller."""
    (h, w), (cell_h, cell_w) = shape, size
    labels_HW = np.arange(h)[:, None] // cell_h * math.ceil(w / cell_w) + np.arange(w) // cell_w
    return Segments(labels_HW.astype(np.int32))


class Unit(NamedTuple):
    """What a run asks for: the class of an image's units, a function (state, name) that gives them, and the setting,
    with all options."""
    kind: type
    of: Callable
    setting: dict


def whole_images() -> tuple:
    """Whole images."""
    return Whole, lambda state, name: Whole()


def superpixels(n_segments: SegmentCount = 1024, compactness: Positive = 10., folder: MaybeFolder = None) -> tuple:
    """SLIC segments, computed once and kept in ``work_dir/superpixels``; or the user's own, in ``folder``: for each
    image a PNG of its name, of 16 bits or of three channels, where a segment is r + 256 g + 65536 b. There, what is
    not in any has a number, too."""
    return Segments, functools.partial(segments_of, n_segments, compactness, folder)


def segments_of(n_segments: int, compactness: float, folder: str | None, state: State, name: str) -> Segments:
    """The superpixels of an image, read from their file, which is made where it is missing and should not be there.

    Raises:
        ValueError: They cannot be computed or read, or are not of the image's size.
    """
    kept = folder or osp.join(state.work_dir, 'superpixels', f'{n_segments}_{compactness}')
    path = png_path(kept, name, '/' if folder else state.work_dir)
    if not (folder or osp.isfile(path)):
        image = state.pool.load_image(name)
        with reading(image_path(state.pool.info(name)), ValueError):
            image = slic(image, n_segments, compactness)
        write_png(path, image)
    with reading(path), Image.open(path) as image:
        labels_HW = np.asarray(image, np.int32)
        shape, size = labels_HW.shape, state.pool.sizes[name]
        if shape not in (size, (*size, 3)):
            raise ValueError(f'its size should be that of its image, {size}, with one channel or three, but is {shape}'
                             f'{"" if folder else ": delete it, and it is made again"}')
        if shape != size:
            labels_HW = labels_HW @ np.int32([1, 256, 65536])
            labels_HW = np.searchsorted(np.unique(labels_HW), labels_HW)
        return Segments(labels_HW)


def single_pixels(radius: Count = 0) -> tuple:
    """Single pixels, of which no two lie within ``radius`` of each other."""
    return Peaks, lambda state, name: Peaks(state.pool.sizes[name], 0, radius)


UNITS = dict(image=whole_images, region=regions, superpixel=superpixels, pixel=single_pixels)


def slic(image: np.ndarray, n_segments: int, compactness: float) -> np.ndarray:
    """SLIC superpixels (Achanta et al., 2012), numbered from 0, each in one piece. (H, W) uint16

    They are computed at half the resolution in six iterations, and stay if they have a quarter of the mean size, where
    scikit-image joins those below one half to others. So they follow classes better than ten iterations at full
    resolution do with as many segments, in less than a fourth of the time (``tests/benchmarks/superpixels.py``). Where
    the image is so noisy that most would be too small, they are made more compact.

    Raises:
        ImportError: scikit-image is missing.
        ValueError: There are more segments than 16 bits can number, or the image has values that are no numbers.
    """
    try:
        from skimage.segmentation import slic as skimage_slic
    except ImportError as error:
        raise ImportError("`al.unit='superpixel'` needs scikit-image: pip install scikit-image") from error
    (h, w), image = image.shape[:2], np.atleast_3d(image)
    image = image[..., np.minimum([2, 1, 0], image.shape[2] - 1)].astype(np.float32)  # from BGR, as mmcv loads it
    half = cv2.resize(image, (-(-w // 2), -(-h // 2)), interpolation=cv2.INTER_AREA)
    for times in 1, 10, 100, 1000:
        cells = skimage_slic(half, n_segments, times * compactness, 6, min_size_factor=.25, start_label=0)
        if cells.max() + 1 >= n_segments / 2:
            break
    if cells.max() >= 2**16:
        raise ValueError(f'`al.unit.n_segments` should be smaller than {n_segments}, which gives {cells.max() + 1}')
    return cv2.resize(cells.astype(np.uint16), (w, h), interpolation=cv2.INTER_NEAREST)


class Areas:
    """The units of an image of some ``shape``. Of those that can be asked for together none overlaps another:
    ``members(ids)`` are all their pixels, each with the position in ``ids`` of the one that it belongs to, (M,) both.
    Maps stay on the device: what is asked about them goes there."""

    def known(self, values, taken, draw, limit) -> tuple:
        return self.candidates(values, np.logical_not(taken), draw)

    def mask(self, ids: np.ndarray) -> np.ndarray:
        mask = np.zeros(self.shape, bool)
        mask.reshape(-1)[self.members(ids)[1]] = True
        return mask

    def weights(self, ids: np.ndarray, cells: tuple, device) -> torch.Tensor:
        """Sparse (N, P), P = h w, rows sum to 1."""
        share = self.shares(ids, tuple(cells)).tocoo()
        weights = torch.sparse_coo_tensor(np.stack([share.row, share.col]), share.data, share.shape,
                                          check_invariants=False)
        return weights._coalesced_(True).to(device)  # it is; torch < 2.1 cannot be told above

    def shares(self, ids: np.ndarray, cells: tuple) -> scipy.sparse.csr_matrix:
        """How much of each lies in each cell of a coarser map. (N, P) float32"""
        rows, pixels = self.members(ids)
        columns, n = cell_numbers(self.shape, cells).reshape(-1)[pixels], len(ids)
        share = scipy.sparse.coo_matrix((np.ones(len(rows), np.float32), (rows, columns)), (n, math.prod(cells)))
        share = share.tocsr()
        share.data /= np.repeat(np.bincount(rows, minlength=n), np.diff(share.indptr))
        return share

    def histograms(self, ids: np.ndarray, class_HW: torch.Tensor, classes: int) -> np.ndarray:
        """The share of each class in each. (N, C) float32"""
        rows, pixels = (torch.from_numpy(each).to(class_HW.device).long() for each in self.members(ids))
        counts = (rows * classes + class_HW.flatten()[pixels]).bincount(minlength=len(ids) * classes).cpu().numpy()
        counts = counts.reshape(-1, classes)
        return (counts / counts.sum(1, keepdims=True)).astype(np.float32)


@functools.lru_cache(8)
def cell_numbers(shape: tuple, cells: tuple) -> np.ndarray:
    """The number of the cell of a coarser map that each pixel lies in. (H, W) int32"""
    rows, columns = (np.arange(n) * k // n for n, k in zip(shape, cells))
    return (rows[:, None] * cells[1] + columns).astype(np.int32)


class Segments(Areas):
    """Numbered areas, (H, W): cells of a grid, superpixels. A score is the ``mean`` or ``max`` of its pixels."""
    counts_pixels, is_dense, size, least = True, False, 1, 1

    def __init__(self, labels_HW: np.ndarray):
        self.labels, self.pixels, self.shape = labels_HW, np.bincount(labels_HW.reshape(-1)), labels_HW.shape
        self.number, self.kept = len(self.pixels), {}

    @staticmethod
    def check(al: dict, strategy: Strategy) -> None:
        if strategy.reduce not in ('mean', 'max'):
            raise ValueError("`al.strategy.reduce` should be 'mean' or 'max' below image level, but got "
                             f'{strategy.reduce!r}')

    def values(self, scores_HW, reduce) -> np.ndarray:
        scores_P, device = scores_HW.flatten(), scores_HW.device
        if reduce == 'mean' and device.type == 'cpu':
            return np.bincount(self.labels.reshape(-1), scores_P) / np.maximum(self.pixels, 1)
        if device not in self.kept:
            self.kept[device] = torch.from_numpy(self.labels).to(device).long().flatten()
        if reduce == 'max':
            empty_N = scores_P.new_full((self.number, ), -math.inf)
            return empty_N.scatter_reduce_(0, self.kept[device], scores_P, 'amax').cpu().numpy()
        # in fixed point: so no sum depends on the order of its terms, which a device does not keep
        exponent = 40 - scores_P.abs().max().clamp_min(1e-30).log2().ceil()
        sums_N = torch.zeros(self.number, dtype=torch.long, device=device).index_add_(
            0, self.kept[device], (scores_P * exponent.exp2()).round().long())
        return sums_N.cpu().numpy() / 2.**float(exponent) / np.maximum(self.pixels, 1)

    def candidates(self, values, taken, draw, limit=None, floor=-math.inf, floor_draw=math.inf) -> tuple:
        is_open = np.bincount(self.labels[taken], minlength=self.number) == 0
        ids = np.flatnonzero(is_open & (self.pixels > 0))
        return ids, np.asarray(values[ids], np.float64), self.pixels[ids].astype(np.int32)

    def shares(self, ids: np.ndarray, cells: tuple) -> scipy.sparse.csr_matrix:
        if cells not in self.kept:  # a grid's serve all images
            self.kept[cells] = super().shares(np.arange(self.number), cells)
        return self.kept[cells][ids]

    def members(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row_of = np.full(self.number, -1, np.int32)
        row_of[ids] = np.arange(len(ids))
        rows_P = row_of[self.labels.reshape(-1)]
        inside = np.flatnonzero(rows_P >= 0)
        return rows_P[inside], inside


class Whole(Areas):
    """The whole image, scored at the logits' resolution."""
    counts_pixels, is_dense, size, least, number = False, False, 1, 1, 1

    @staticmethod
    def check(al: dict, strategy: Strategy) -> None:
        if al.per_image:
            raise ValueError('`al.per_image` should be False for whole images, but got True')

    def values(self, scores_HW, reduce) -> np.ndarray:
        return np.array([float(reduce_map(scores_HW, reduce))])

    def candidates(self, values, taken, draw, limit=None, floor=-math.inf, floor_draw=math.inf) -> tuple:
        n = int(not taken)
        return np.zeros(n, np.int64), values[:n], np.ones(n, np.int32)

    def weights(self, ids: np.ndarray, cells: tuple, device) -> None:
        return None

    def histograms(self, ids: np.ndarray, class_HW: torch.Tensor, classes: int) -> np.ndarray:
        counts = class_HW.flatten().long().bincount(minlength=classes).cpu().numpy()
        return (counts / class_HW.numel()).astype(np.float32)[None]


class Peaks(Areas):
    """Squares of (2 radius + 1)^2 pixels around any pixel, best first, whose centres lie more than ``gap`` apart. A
    score is that of the centre."""
    counts_pixels, is_dense = True, True

    def __init__(self, shape: tuple, radius: int, gap: int):
        self.shape, self.radius, self.gap = shape, radius, gap
        self.number, self.size = math.prod(shape), (2 * radius + 1)**2
        self.least = math.prod(min(n, radius + 1) for n in shape)  # at a corner

    @staticmethod
    def check(al: dict, strategy: Strategy) -> None:
        if not al.unit.get('window') and strategy.embed in (class_confusion, class_cooccurrence):
            raise ValueError(f"`al.unit` should be 'image', 'region' or 'superpixel' for the embedding "
                             f"{strategy.embed.__name__}, which is a pixel's softmax over again, but got 'pixel'")

    def values(self, scores_HW, reduce) -> torch.Tensor:
        return scores_HW.flatten()

    def candidates(self, values, taken, draw, limit=None, floor=-math.inf, floor_draw=math.inf) -> tuple:
        scores_N, is_peak_N = torch.as_tensor(values), np.zeros(self.number, bool)
        is_peak_N[peaks(scores_N.view(self.shape), self.gap, dilate(taken, self.gap - self.radius), draw, limit,
                        floor, floor_draw)] = True
        ids = np.flatnonzero(is_peak_N)  # sooner than a sort
        pixels = window_pixels(self.shape, self.radius).numpy().reshape(-1)[ids]
        return ids, at(scores_N, ids), pixels.astype(np.int32)

    def known(self, values, taken, draw, limit) -> tuple:
        """A random few: every labelled pixel would be one."""
        drawn = Peaks(self.shape, self.radius, 2 * self.radius)
        ids, _, pixels = drawn.candidates(np.zeros(self.number), ~taken, draw, limit)
        return ids, at(torch.as_tensor(values), ids), pixels

    def members(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ys, xs = (each[:, None] + np.arange(-self.radius, self.radius + 1) for each in np.divmod(ids, self.shape[1]))
        inside = ((ys >= 0) & (ys < self.shape[0]))[:, :, None] & ((xs >= 0) & (xs < self.shape[1]))[:, None]
        return np.nonzero(inside)[0], (ys[:, :, None] * self.shape[1] + xs[:, None])[inside]


def at(scores_N: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    """Some of the numbers on a device, as float64."""
    return scores_N[torch.from_numpy(ids).to(scores_N.device)].cpu().double().numpy()


def dilate(mask_HW: np.ndarray, radius: int) -> np.ndarray:
    """What lies within a square of ``radius`` around a pixel of a mask."""
    if not radius or not mask_HW.any():
        return mask_HW
    return cv2.dilate(mask_HW.view(np.uint8), np.ones((2 * radius + 1,) * 2, np.uint8)).view(bool)


def peaks(scores_HW: torch.Tensor, gap: int, blocked_HW: np.ndarray, draw: Callable, limit: int | None = None,
          floor: float = -math.inf, floor_draw: float = math.inf) -> np.ndarray:
    """Greedy peaks: again and again the highest free pixel, which blocks all within a square of radius ``gap``; ties go
    to the smallest draw.

    Returns:
        (K,) flat indices: those not below ``floor``, nor on it with a draw above ``floor_draw``, or the first ``limit``
        of them; with a gap, best first. (What is lower blocks nothing that is not.)
    """
    blocked_HW = torch.from_numpy(blocked_HW).to(scores_HW.device)
    scores_N = scores_HW.masked_fill(blocked_HW | (scores_HW < floor), -math.inf).flatten()
    if floor_draw < math.inf:
        ties = (scores_N == floor).nonzero()[:, 0].cpu()
        scores_N[ties[torch.from_numpy(draw(ties.numpy()) > floor_draw)].to(scores_N.device)] = -math.inf
    limit, picks = scores_N.numel() if limit is None else limit, []
    if gap == 0:
        return highest(scores_N, limit, draw)
    while len(picks) < limit and len(ids := highest(scores_N, 16 * limit, draw)):  # a few, as the rest may be blocked
        free_HW, picked_HW = np.zeros(scores_HW.shape, bool), np.zeros(scores_HW.shape, bool)
        free_HW.reshape(-1)[ids] = True
        is_free = memoryview(free_HW.reshape(-1))
        for i in ids[np.lexsort((draw(ids), -at(scores_N, ids)))].tolist():
            if is_free[i] and len(picks) < limit:
                y, x = divmod(i, scores_HW.shape[1])
                free_HW[max(0, y - gap):y + gap + 1, max(0, x - gap):x + gap + 1] = False
                picks.append(i)
                picked_HW[y, x] = True
        blocked_HW = torch.from_numpy(dilate(picked_HW, gap)).to(scores_N.device)
        scores_N.masked_fill_(blocked_HW.flatten(), -math.inf)
    return np.array(picks, np.int64)


def highest(scores_N: torch.Tensor, budget: int, draw: Callable) -> np.ndarray:
    """The rows of the highest scores above -inf, in any order; of those that tie at the end, which alone have to draw,
    the ones with the smallest draws. (K,)"""
    if budget >= int((scores_N > -math.inf).sum()):
        return (scores_N > -math.inf).nonzero()[:, 0].cpu().numpy()
    least = scores_N.kthvalue(len(scores_N) - budget + 1).values  # quick on a plateau, too
    rows, ties = (which.nonzero()[:, 0].cpu().numpy() for which in (scores_N > least, scores_N == least))
    missing = budget - len(rows)
    return np.concatenate([rows, ties[np.argpartition(draw(ties), missing - 1)[:missing]]])


# ---------------------------------------------------------------------------------------------------------------------
# Strategies: score (probabilities -> map, higher = ask) x embed (maps -> a vector a candidate) x select (-> choice)
# ---------------------------------------------------------------------------------------------------------------------
#
# All are pure functions, found by name in four registries; `@AL_SCORES.register_module()` makes a name of yours. Beside
# their first arguments they get what they name a parameter after, see OFFERED; every other parameter is an option of
# `al.strategy`. A strategy is a function that returns its parts and options; a score's name alone is one, too.


def call_offering(function: Callable, *args, **offered):
    """Call a function with some arguments, and what it names of what is offered."""
    takes = list(parameters_of(function))[len(args):]
    return function(*args, **{key: value for key, value in offered.items() if key in takes})


def mean_features(features_KHW: torch.Tensor, weights_NP: torch.Tensor | None = None) -> torch.Tensor:
    """Mean penultimate features (CoreSet; Sener & Savarese, ICLR 2018). (N, K)"""
    return pool_map(features_KHW, weights_NP)


def representative_errors(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
                          draws_N: torch.Tensor, probs_NC: torch.Tensor, clusters: Natural = 25,
                          caps: Caps | None = None) -> torch.Tensor:
    """Representative pseudo-errors (REAL; Chen et al., ECML-PKDD 2023). In each k-means cluster, those whose predicted
    class is not the cluster's majority class m are pseudo-errors; the cluster gets budget in proportion to their sum of
    1 - p_m, and takes random ones of them, or where they do not suffice its highest 1 - p_m. (K,) indices"""
    start = kmeanspp(scores_N, min(clusters, len(vectors_ND)), generator, vectors_ND, draws_N)
    cluster_N = kmeans(vectors_ND, start).cpu().numpy()
    pred_N, probs = probs_NC.argmax(1).numpy(), probs_NC.double().numpy()
    votes_JC = np.zeros((len(start), probs.shape[1]), int)
    np.add.at(votes_JC, (cluster_N, pred_N), 1)
    majority_N = votes_JC.argmax(1)[cluster_N]
    doubt_N, error_N = 1 - probs[np.arange(len(probs)), majority_N], pred_N != majority_N
    value = np.bincount(cluster_N, doubt_N * error_N, len(start))
    quota = np.floor(budget * value / max(value.sum(), 1e-12)).astype(int)
    if value.any():
        quota[np.argsort(-value, kind='stable')[:budget - quota.sum()]] += 1
    picks = []
    for j, k in enumerate(quota):
        errors, members = np.flatnonzero((cluster_N == j) & error_N), np.flatnonzero(cluster_N == j)
        order = errors if len(errors) > k else members[np.argsort(-doubt_N[members], kind='stable')]
        picks += allowed(order, k, caps).tolist()
    left = np.setdiff1d(np.arange(len(doubt_N)), picks)
    rest = allowed(left[np.argsort(-doubt_N[left], kind='stable')], budget - len(picks), caps)
    return torch.tensor([*picks, *rest.tolist()])


def medoids(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
            draws_N: torch.Tensor) -> torch.Tensor:
    """Of as many k-means clusters as are asked for, the candidate nearest to each one's mean (representative sampling;
    Xu et al., ECIR 2003); where one is empty, what it started from. (K,) indices"""
    start = kmeanspp(scores_N, budget, generator, vectors_ND, draws_N)
    cluster_N, vectors_ND = kmeans(vectors_ND, start), vectors_ND - vectors_ND.mean(0)
    sums_KD = torch.zeros_like(vectors_ND[:budget]).index_add_(0, cluster_N, vectors_ND)
    centres_KD = sums_KD / cluster_N.bincount(minlength=budget)[:, None].clamp_min(1)
    far_N = (vectors_ND - centres_KD[cluster_N]).square_().sum(1).cpu().numpy()
    cluster_N = cluster_N.cpu().numpy()
    order = np.lexsort((far_N, cluster_N))
    first = np.unique(cluster_N[order], return_index=True)[1]
    return torch.tensor(list(dict.fromkeys([*order[first].tolist(), *start.tolist()]))[:budget])


def typical(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
            draws_N: torch.Tensor, labelled_LD: torch.Tensor, clusters: Natural = 500,
            neighbours: Natural = 20) -> torch.Tensor:
    """TypiClust (Hacohen et al., ICML 2022). All, labelled or not, make as many k-means clusters as are labelled and
    asked for, but at most ``clusters``. Of those with over 5 members, in turn, from few labelled ones to many and from
    large to small, each gives the most typical of its candidates that are left: the one of the least mean distance to
    its ``neighbours`` nearest among these, or to half of them where they are fewer. (K,) indices"""
    all_ND, known = torch.cat([labelled_LD, vectors_ND]), len(labelled_LD)
    draws = torch.cat([torch.rand(known, generator=generator, dtype=draws_N.dtype), draws_N])
    start = kmeanspp(draws, min(known + budget, clusters, len(all_ND)), generator, all_ND, draws)
    cluster_M, picks = kmeans(all_ND, start).cpu(), []
    labelled_J, size_J = (each.bincount(minlength=len(start)) for each in (cluster_M[:known], cluster_M))
    order = np.lexsort((-size_J.numpy(), labelled_J.numpy()))
    left = {j: (cluster_M[known:] == j).nonzero()[:, 0] for j in order.tolist()}
    for large in (True, False):  # small ones are for what the others cannot give
        turn = collections.deque(j for j in left if len(left[j]) and bool(size_J[j] > 5) == large)
        while turn and len(picks) < budget:
            j = turn.popleft()
            own_MD, k = vectors_ND[left[j]], max(1, min(neighbours, len(left[j]) // 2))
            far_M = torch.cat([torch.cdist(part, own_MD).topk(min(k + 1, len(own_MD)), largest=False).values.sum(1)
                               for part in own_MD.split(1024)])  # to itself it is none
            best = int(far_M.argmin())
            picks.append(int(left[j][best]))
            left[j] = torch.cat([left[j][:best], left[j][best + 1:]])
            turn.extend([j] * bool(len(left[j])))
    return torch.tensor(picks)


def kmeans(vectors_ND: torch.Tensor, start_K: torch.Tensor) -> torch.Tensor:
    """Clusters by k-means from the vectors of some rows (Lloyd, 1982), until none changes, or 100 times. One that falls
    empty keeps its centre. (N,)"""
    vectors_ND = vectors_ND - vectors_ND.mean(0)
    centres_KD, before_N = vectors_ND[start_K], None
    for _ in range(100):
        cluster_N, sums_KD = [], 0
        for part_ND in vectors_ND.split(4096):
            cluster_N.append(torch.addmm((centres_KD**2).sum(1), part_ND, centres_KD.T, alpha=-2).argmin(1))
            sums_KD = sums_KD + torch.zeros_like(centres_KD).index_add_(0, cluster_N[-1], part_ND)
        cluster_N = torch.cat(cluster_N)
        if before_N is not None and torch.equal(cluster_N, before_N):
            break
        sizes_K1 = cluster_N.bincount(minlength=len(start_K))[:, None]
        before_N, centres_KD = cluster_N, torch.where(sizes_K1 > 0, sums_KD / sizes_K1.clamp_min(1), centres_KD)
    return cluster_N


def kmeanspp(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
             draws_N: torch.Tensor, split: int | None = None, caps: Caps | None = None) -> torch.Tensor:
    """The seeding of k-means++ (Arthur & Vassilvitskii, SODA 2007), as BADGE (Ash et al., ICLR 2020) uses it: the
    largest norm first, then draws in proportion to the squared distance to the nearest one chosen. (K,) indices

    Each candidate has a clock, which runs at the rate of that distance and rings when it has run for a time that the
    candidate drew, exponentially distributed. Such a clock has no memory, so whatever has run by now, the next to ring
    is drawn in proportion to the rates; and no draw depends on another candidate. Rates only fall, so no clock rings
    before the time that an old rate promises.
    """
    def norms_of(parts: list) -> torch.Tensor:
        return math.prod(map(squares, parts))[:, None]

    def columns_of(rows_KE: torch.Tensor) -> torch.Tensor:
        """Factors whose products with rows are squared distances."""
        return torch.cat([-2 * rows_KE[:, :first], rows_KE[:, first:-2], rows_KE[:, [-1, -2]]], 1)

    def run(clocks: tuple, rows: tuple, centres: tuple, values: list) -> None:
        """Let clocks run until one after the other rings, as their values say; then it slows those near it."""
        left_N, rate_N = clocks
        rates_NK = product(rows[0], columns_of(*centres).T).cummin(1).values.minimum(rate_N[:, None]).clamp_min_(1e-30)
        left_N.add_(rate_N, alpha=values[0]).add_(rates_NK[:, :-1] @ rate_N.new_tensor(values[1:]))
        rate_N.copy_(rates_NK[:, -1])

    product = functools.partial(outer_product, split=split) if split else torch.matmul
    parts = in_float64(vectors_ND).tensor_split([split], 1) if split else [vectors_ND]
    largest = int(norms_of(parts).argmax())
    parts = parts if split else [vectors_ND - vectors_ND.mean(0)]  # small norms lose less to rounding
    first, rows_NE = parts[0].shape[1], torch.cat([*parts, norms_of(parts), torch.ones_like(parts[0][:, :1])], 1)
    del parts
    clocks = -draws_N.log().to(rows_NE), torch.full_like(rows_NE[:, 0], 1e30)
    return lazily(clocks, (rows_NE, ), lambda clocks, k: -clocks[0] / clocks[1], run, budget, caps, largest,
                  lambda values, k: -sum(values))


def outer_product(one: torch.Tensor, other: torch.Tensor, split: int) -> torch.Tensor:
    """A matrix product of vectors that are outer products, and two numbers more: the inner product of a b^T and c d^T
    is (a c) (b d)."""
    return (one[..., :split] @ other[:split]) * (one[..., split:-2] @ other[split:-2]) + one[..., -2:] @ other[-2:]


OFFERED = (
    # a score gets the class probabilities (N, C, H, W), the mean over all passes, and on demand
    'entropies_NHW',  # mean entropy of the MC dropout passes, in nats
    'votes_NCHW',  # share of the MC dropout passes that predict a class
    'squares_NCHW',  # mean of the squared probabilities of the MC dropout passes
    'thresholds_C',  # probability from which on a class belongs to the prediction set, calibrated on held-out images
    # an embedding gets what it names, at the resolution of the logits
    'probs_CHW',  # class probabilities; with features, their means over the features' cells
    'features_KHW',  # features, at their own resolution: see `features_from`
    'scores_HW',  # the score map, as `probs_CHW`
    'weights_NP',  # sparse shares of the P = H W cells in each of N candidates, or None where the whole map is one
    'in_one_cell',  # whether each candidate is a single pixel, and so lies in one cell
    # a selector gets scores_N, budget and a seeded generator, and on demand the following: vectors where the model is,
    # all else on the CPU
    'generator',  # random numbers for one purpose; by position, so another candidate more changes them all
    'draws_N',  # each candidate's own random number in (0, 1), in ascending order; so the first few are a random few
    'vectors_ND',  # the embedding of the candidates
    'split',  # None, or that a vector is the outer product of its first so many numbers and the others
    'labelled_LD',  # the embedding of what is labelled
    'labelled_scores_L',  # the scores of what is labelled
    'labelled_predicted_LC',  # and its `predicted_NC`
    'probs_NC',  # mean class probabilities of the candidates
    'predicted_NC',  # the share of a candidate's pixels that the model predicts as each class
    'number',  # how many units there are, labelled ones included
    'progress',  # the share of the queries that were made before
    'caps',  # `Caps`, or None; a selector that does not name them is asked again for what they leave of its budget
)


def least_confidence(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """1 - p1, the probability of the most probable class (Lewis & Gale, 1994). (N, H, W) in [0, 1 - 1/C]"""
    return 1 - probs_NCHW.amax(1)


def margin(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """1 - (p1 - p2): one less the margin between the two most probable classes (Scheffer et al., 2001), so that the
    smallest margin scores highest. (N, H, W) in [0, 1]"""
    first_NHW, second_NHW = two_highest(probs_NCHW)
    return 1 - (first_NHW - second_NHW)


def probability_ratio(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """p2 / p1 of the two most probable classes (best versus second best; Joshi et al., CVPR 2009). (N, H, W) in [0, 1]
    """
    first_NHW, second_NHW = two_highest(probs_NCHW)
    return second_NHW / first_NHW


def two_highest(maps_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two highest probabilities, class by class: no sort. (N, H, W) each"""
    first, *others = maps_NCHW.unbind(1)
    first, second = first.clone(), torch.full_like(first, -math.inf)
    for map_NHW in others:
        torch.maximum(second, torch.minimum(first, map_NHW), out=second)
        torch.maximum(first, map_NHW, out=first)
    return first, second


def variation_ratio(probs_NCHW: torch.Tensor, votes_NCHW: torch.Tensor) -> torch.Tensor:
    """1 - the share of MC dropout passes that predict the modal class (Freeman, 1965; Gal et al., ICML 2017). (N, H, W)
    in [0, 1 - 1/C]"""
    return 1 - votes_NCHW.amax(1)


def mean_std(probs_NCHW: torch.Tensor, squares_NCHW: torch.Tensor) -> torch.Tensor:
    """Mean over the classes of the standard deviation of p over MC dropout passes (Kampffmeyer et al., CVPRW 2016).
    (N, H, W) in [0, 1/2]"""
    return (squares_NCHW - probs_NCHW**2).clamp_min(0).sqrt().mean(1)


def bald(probs_NCHW: torch.Tensor, entropies_NHW: torch.Tensor) -> torch.Tensor:
    """H(mean p) - mean H(p) over MC dropout passes, in nats: the mutual information of prediction and weights (BALD;
    Houlsby et al., 2011; Gal et al., ICML 2017). (N, H, W) in [0, ln C]"""
    return (entropy(probs_NCHW) - entropies_NHW).clamp_min(0)


def balanced_entropy(probs_NCHW: torch.Tensor, squares_NCHW: torch.Tensor) -> torch.Tensor:
    """The acquisition of balanced entropy (BalEnt; Woo, ICLR 2023; for pixels Didari et al., 2024). p of a class, over
    MC dropout passes, is taken for a Beta distribution of the same mean and variance. With p+, the one that is expected
    of that class after a label of it, and its differential entropy h, BalEnt = (sum of mean p x h(p+) + H(mean p)) /
    (H(mean p) + ln 2), in nats; its reciprocal from 0 on, so that what is just above 0 scores highest. (N, H, W)"""
    total, uncertain_NHW = 0, in_float64(entropy(probs_NCHW))
    for mean, square in zip(probs_NCHW.unbind(1), squares_NCHW.unbind(1)):
        mean = in_float64(mean).clamp(1e-9, 1 - 1e-9)
        spread = (in_float64(square) - mean**2).clamp_min(1e-9)
        a = (mean * (mean * (1 - mean) / spread - 1)).clamp_min(1e-9)
        b = a * (1 / mean - 1)
        total += mean * (torch.lgamma(a + 1) + torch.lgamma(b) - torch.lgamma(a + b + 1) - a * torch.digamma(a + 1)
                         - (b - 1) * torch.digamma(b) + (a + b - 1) * torch.digamma(a + b + 1))
    balance_NHW = (total + uncertain_NHW) / (uncertain_NHW + math.log(2))
    return torch.where(balance_NHW < 0, balance_NHW, 1 / balance_NHW)


def one_versus_rest(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """Sum over the classes of the entropy of "this class or another", in nats (one-vs-rest entropy, OREAL; Wu et al.,
    WACV 2025). (N, H, W)"""
    return entropy(probs_NCHW) + entropy(1 - probs_NCHW)


def conformal_risk(probs_NCHW: torch.Tensor, thresholds_C: torch.Tensor) -> torch.Tensor:
    """Share of the classes in a pixel's prediction set {c: p_c >= threshold_c}, each weighted by how confused it is in
    the image: the entropy of its row in ``class_cooccurrence`` (CRC-AL). (N, H, W) in [0, 1]"""
    maps = []
    for probs_CHW in probs_NCHW:
        shares_CC = class_cooccurrence(probs_CHW, thresholds_C).view(len(probs_CHW), -1)
        weights_C = torch.special.entr(shares_CC).sum(1)
        sets_CHW = (probs_CHW >= thresholds_C[:, None, None]).to(weights_C)
        maps.append(torch.einsum('c,chw->hw', weights_C, sets_CHW) / weights_C.sum().clamp_min(1e-12))
    return torch.stack(maps)


def reduce_map(scores_HW: torch.Tensor, how: str | float = 'mean') -> torch.Tensor:
    """One number for a score map: its ``mean``, its ``max``, or the mean of its highest ``how`` percent of pixels."""
    if how == 'mean':
        return in_float64(scores_HW).mean()
    if how == 'max':
        return scores_HW.max()
    k = max(1, round(scores_HW.numel() * how / 100))
    return in_float64(scores_HW.flatten().topk(k).values).mean()


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """In double precision, on the CPU if the device has none, as Apple's."""
    with contextlib.suppress(TypeError, RuntimeError):
        return x.double()
    return x.cpu().double()


def ripu(probs_NCHW: torch.Tensor, k: Natural = 1) -> torch.Tensor:
    """Region impurity x prediction uncertainty, RIPU's RA (Xie et al., CVPR 2022): entropy of the histogram of
    predicted classes in the (2k+1)^2 window / ln C, times the mean entropy in it / ln C. (N, H, W) in [0, 1]"""
    c = probs_NCHW.shape[1]
    maps = []
    for class_HW, entropy_HW in zip(predicted_classes(probs_NCHW), entropy(probs_NCHW)):
        mean = box_sum(entropy_HW, k) / window_pixels(entropy_HW.shape, k, entropy_HW.device)
        maps.append(impurity(class_HW, c, k) * mean / math.log(c)**2)
    return torch.stack(maps)


def ripu_pixel(probs_NCHW: torch.Tensor, k: Natural = 32) -> torch.Tensor:
    """RIPU's PA (Xie et al., CVPR 2022): a pixel's entropy times the entropy of the histogram of predicted classes in
    the (2k+1)^2 window around it, both in nats. (N, H, W)"""
    return torch.stack([impurity(class_HW, probs_NCHW.shape[1], k) * entropy_HW
                        for class_HW, entropy_HW in zip(predicted_classes(probs_NCHW), entropy(probs_NCHW))])


def impurity(pred_HW: torch.Tensor, classes: int, k: int) -> torch.Tensor:
    """Entropy, in nats, of the histogram of predicted classes in the (2k+1)^2 window around each pixel. (H, W)"""
    pixels, total = window_pixels(pred_HW.shape, k, pred_HW.device), 0
    narrow_HW = pred_HW.to(torch.uint8 if classes < 256 else torch.int16)
    for c in torch.bincount(pred_HW.flatten(), minlength=1).nonzero().flatten().tolist():
        number = box_sum((narrow_HW == c).view(torch.uint8), k)
        total = number.clamp_min(1).log_().mul_(number).add_(total)
    # sum of -n/N ln(n/N) = ln N - (sum of n ln n) / N; below one pixel's worth it is rounding, and means a pure window
    entropy_HW = pixels.log() - total / pixels
    return torch.where(entropy_HW < 1e-5, 0, entropy_HW)


def box_sum(map_HW: torch.Tensor, k: int) -> torch.Tensor:
    """Sums over (2k+1)^2 windows, zero-padded, in float32; the time does not depend on k on the CPU."""
    size = 2 * k + 1
    if map_HW.device.type != 'cpu':
        rows = F.avg_pool2d(map_HW[None].float(), (1, size), 1, (0, k), divisor_override=1)
        return F.avg_pool2d(rows, (size, 1), 1, (k, 0), divisor_override=1)[0]
    return torch.from_numpy(cv2.boxFilter(map_HW.numpy(), cv2.CV_32F, (size, size), normalize=False,
                                          borderType=cv2.BORDER_CONSTANT))


def window_pixels(shape: tuple, k: int, device=None) -> torch.Tensor:
    """How many pixels of each (2k+1)^2 window lie in the image. (H, W) float32"""
    rows, cols = (torch.minimum(i + k, i[-1]) - (i - k).clamp_min(0) + 1
                  for i in (torch.arange(n, device=device) for n in shape))
    return (rows[:, None] * cols).float()


def mean_gradient(probs_CHW: torch.Tensor, features_KHW: torch.Tensor, weights_NP: torch.Tensor | None = None,
                  in_one_cell: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the predicted label's cross entropy with respect to the weights of the last layer, (p - onehot(argmax
    p)) h^T with penultimate features h (BADGE; Ash et al., ICLR 2020): its mean over a candidate's pixels. (N, C * K),
    or the two factors where a candidate is one pixel"""
    gradient_CHW = probs_CHW - predicted_as(probs_CHW[None])[0].float()
    if in_one_cell:
        return pool_map(gradient_CHW, weights_NP), pool_map(features_KHW, weights_NP)
    return class_matrix(gradient_CHW, features_KHW, weights_NP).flatten(1)


def class_confusion(probs_CHW: torch.Tensor, weights_NP: torch.Tensor | None = None) -> torch.Tensor:
    """For each class the mean softmax of the pixels that are predicted so, weighted by their entropy (Contextual
    Diversity; Agarwal et al., ECCV 2020); zeros for a class that is not predicted. (N, C * C)"""
    matrix_NCC = class_matrix(predicted_as(probs_CHW[None])[0] * entropy(probs_CHW[None]), probs_CHW, weights_NP)
    return (matrix_NCC / matrix_NCC.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).flatten(1)


def predicted_classes(maps_NCHW: torch.Tensor) -> torch.Tensor:
    """The most probable classes, the first of equals; on the CPU class by class. (N, H, W) uint8, int16 above 255"""
    kind = torch.uint8 if maps_NCHW.shape[1] < 256 else torch.int16
    if maps_NCHW.device.type != 'cpu':
        return maps_NCHW.argmax(1).to(kind)
    best, *others = maps_NCHW.unbind(1)
    best, class_NHW = best.clone(), torch.zeros_like(best, dtype=kind)
    for c, map_NHW in enumerate(others, 1):
        class_NHW.masked_fill_(map_NHW > best, c)
        torch.maximum(best, map_NHW, out=best)
    return class_NHW


def predicted_as(maps_NCHW: torch.Tensor) -> torch.Tensor:
    """Where each class is the most probable. (N, C, H, W) booleans"""
    class_NHW = predicted_classes(maps_NCHW)
    numbers_C = torch.arange(maps_NCHW.shape[1], dtype=class_NHW.dtype, device=class_NHW.device)
    return class_NHW[:, None] == numbers_C[:, None, None]


def entropy(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """-sum p ln p over the classes, in nats (Shannon, 1948). (N, H, W) in [0, ln C]"""
    if probs_NCHW.device.type != 'cpu':
        return torch.special.entr(probs_NCHW).sum(1)
    total, tiny = 0, torch.finfo(probs_NCHW.dtype).tiny
    for p_NHW in probs_NCHW.unbind(1):  # half the time of `entr`, whose logarithms go one by one
        total = p_NHW.clamp_min(tiny).log_().mul_(p_NHW).add_(total)
    return total.neg_()


def class_cooccurrence(probs_CHW: torch.Tensor, thresholds_C: torch.Tensor,
                       weights_NP: torch.Tensor | None = None) -> torch.Tensor:
    """How often two classes are in one prediction set {c: p_c >= threshold_c}, squared and normalised by row (CRC-AL).
    (N, C * C)"""
    sets_CHW = (probs_CHW >= thresholds_C[:, None, None]).to(probs_CHW)
    matrix_NCC = class_matrix(sets_CHW, sets_CHW, weights_NP)**2
    return (matrix_NCC / matrix_NCC.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).flatten(1)


def class_matrix(rows_CHW: torch.Tensor, maps_CHW: torch.Tensor, weights_NP: torch.Tensor | None) -> torch.Tensor:
    """Mean of row c x map d over each candidate, or over the whole. (N, C, C)"""
    if weights_NP is None:
        return (rows_CHW.flatten(1) @ maps_CHW.flatten(1).T)[None] / rows_CHW[0].numel()
    return torch.stack([pool_map(row_HW * maps_CHW, weights_NP) for row_HW in rows_CHW], 1)


def class_scores(probs_CHW: torch.Tensor, scores_HW: torch.Tensor,
                 weights_NP: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of p_c x score for each class (ClaSP-PE, with entropy as the score). (N, C)"""
    return pool_map(probs_CHW * scores_HW, weights_NP)


def pool_map(maps_CHW: torch.Tensor, weights_NP: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of maps over each candidate, or over the whole. (N, C)"""
    flat_PC = maps_CHW.flatten(1).T
    return flat_PC.mean(0, keepdim=True) if weights_NP is None else torch.sparse.mm(weights_NP, flat_PC)


def top_percent(scores_N: torch.Tensor, budget: int, generator: torch.Generator, number: int | None = None,
                percent: Percent = 5., caps: Caps | None = None) -> torch.Tensor:
    """``budget`` at random among the highest, which are ``percent`` percent of all, labelled or not, but at least
    ``budget`` (PixelPick; Shin et al., ICCVW 2021). (K,) indices"""
    n = max(budget, int((number or len(scores_N)) * percent / 100))
    order = topk(scores_N, len(scores_N) if caps else n, generator)
    return allowed(torch.cat([order[:n].sort().values, order[n:]]), budget, caps)


def foreground_draw(scores_N: torch.Tensor, budget: int, generator: torch.Generator, draws_N: torch.Tensor,
                    predicted_NC: torch.Tensor, foreground: Part = 0.33, background: MaybeCount = 0,
                    caps: Caps | None = None) -> torch.Tensor:
    """At random: the share ``foreground`` of the budget in proportion to how much of a candidate is predicted as
    another class than the ``background``, the rest among all that are left (after nnActive's foreground-aware random,
    which sees the ground truth). (K,) indices"""
    shown_N = 1 - predicted_NC[:, background].double() if background is not None else torch.ones_like(draws_N)
    first = power_draw(shown_N, round(budget * foreground), generator, draws_N, 1., caps)
    rest_N = redraw(draws_N, 1)
    rest_N[first] = -1  # so they come last
    order = topk(rest_N, len(rest_N) if caps else budget - len(first), generator)[:len(rest_N) - len(first)]
    return torch.cat([first, allowed(order, budget - len(first), caps)])


def power_draw(scores_N: torch.Tensor, budget: int, generator: torch.Generator, draws_N: torch.Tensor,
               beta: Positive = 1., caps: Caps | None = None) -> torch.Tensor:
    """Top-k of ln s + Gumbel noise: a draw without replacement in proportion to s^beta (Kirsch et al., TMLR 2023). (K,)
    indices"""
    return topk(scores_N.double().clamp_min(0).log() + gumbel(draws_N, beta), budget, generator, caps)


def softmax_draw(scores_N: torch.Tensor, budget: int, generator: torch.Generator, draws_N: torch.Tensor,
                 beta: Positive = 1., caps: Caps | None = None) -> torch.Tensor:
    """Top-k of s + Gumbel noise: a draw without replacement in proportion to exp(beta s) (Kirsch et al., TMLR 2023).
    (K,) indices"""
    return topk(scores_N.double() + gumbel(draws_N, beta), budget, generator, caps)


def softrank_draw(scores_N: torch.Tensor, budget: int, generator: torch.Generator, draws_N: torch.Tensor,
                  beta: Positive = 1., caps: Caps | None = None) -> torch.Tensor:
    """Top-k of -ln rank + Gumbel noise, where the highest score has rank 1: a draw without replacement in proportion to
    rank^-beta (Kirsch et al., TMLR 2023). (K,) indices"""
    ranks_N = torch.empty_like(draws_N)
    ranks_N[topk(scores_N, len(scores_N), generator)] = torch.arange(1., len(scores_N) + 1).to(draws_N)
    return topk(gumbel(draws_N, beta) - ranks_N.log(), budget, generator, caps)


def stochastic_batches(scores_N: torch.Tensor, budget: int, generator: torch.Generator, draws_N: torch.Tensor,
                       batches: Natural = 100, caps: Caps | None = None) -> torch.Tensor:
    """Of ``batches`` random batches, the one with the highest mean score (Gaillochet et al., MedIA 2023): each holds
    the candidates that draw the lowest numbers for it. (K,) indices"""
    drawn = (topk(-redraw(draws_N, j), budget, generator, caps and caps.again()) for j in range(batches))
    return max(drawn, key=lambda rows: float(scores_N[rows].mean()))


def class_balance(scores_N: torch.Tensor, budget: int, generator: torch.Generator, predicted_NC: torch.Tensor,
                  labelled_scores_L: torch.Tensor, labelled_predicted_LC: torch.Tensor,
                  caps: Caps | None = None) -> torch.Tensor:
    """Top-k of the score, scaled to [0, 1], x exp(-share of the superpixels of the same class), which is what most of
    their pixels are predicted as (ClassBal; Cai et al., CVPR 2021): scale and shares are those of all, labelled or not.
    (K,) indices"""
    scores_M, class_M = torch.cat([scores_N, labelled_scores_L]), torch.cat(
        [predicted_NC, labelled_predicted_LC]).argmax(1)
    share_N = (class_M.bincount() / len(class_M))[class_M[:len(scores_N)]].double()
    scaled_N = (scores_N - scores_M.min()) / (scores_M.max() - scores_M.min()).clamp_min(1e-12)
    return topk(scaled_N * torch.exp(-share_N), budget, generator, caps)


def class_balanced_power(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
                         draws_N: torch.Tensor, progress: float, share: Part = 0.66, background: MaybeCount = 0,
                         betas: PositivePair = (1., 100.), caps: Caps | None = None) -> torch.Tensor:
    """``share`` of the budget in equal parts for every class but the ``background``, in shuffled order, by a draw as
    ``power_draw``'s from the class's column of ``class_scores``, the rest by one from the scores; beta grows
    geometrically over the queries, from the first of ``betas`` to the second, which one more query would have
    (ClaSP-PE, nnActive). (K,) indices"""
    beta = betas[0] * (betas[1] / betas[0])**progress
    columns = [*vectors_ND.cpu().double().T, scores_N.double()]
    order = torch.randperm(len(columns) - 1, generator=generator).tolist()
    order = [c for c in order if c != background]
    quota = [int(budget * share) // len(order) + (i < int(budget * share) % len(order)) for i in range(len(order))]
    free_N, picks = torch.ones(len(scores_N), dtype=torch.bool), []
    for c, k in zip([*order, -1], [*quota, budget - sum(quota)]):
        noisy_N = columns[c].clamp_min(0).log() + gumbel(draws_N, beta, c % len(columns))
        rows = free_N.nonzero()[:, 0]
        picks.append(allowed(rows[topk(noisy_N[rows], len(rows) if caps else k, generator)], k, caps))
        free_N[picks[-1]] = False
    return torch.cat(picks)


def topk(scores_N: torch.Tensor, budget: int, generator: torch.Generator, caps: Caps | None = None) -> torch.Tensor:
    """The ``budget`` highest scores; ties go to the first, which has the smallest draw. (K,) indices"""
    if caps:
        return caps.first(topk(scores_N, len(scores_N), generator), budget)
    if 0 < budget < len(scores_N) // 4:  # sort no more than can be chosen
        best = (scores_N >= scores_N.topk(budget).values[-1]).nonzero()[:, 0]
        return best[scores_N[best].sort(descending=True, stable=True).indices[:budget]]
    return scores_N.sort(descending=True, stable=True).indices[:budget]


def gumbel(draws_N: torch.Tensor, beta: float, stream: int = 0) -> torch.Tensor:
    """Gumbel(0, 1 / beta) noise, one draw a candidate. (N,)"""
    return redraw(draws_N, stream).log_().neg_().log_().div_(-beta)


def redraw(draws_N: torch.Tensor, stream: int) -> torch.Tensor:
    """Other random numbers of the same candidates, for each stream. (N,)"""
    return torch.from_numpy(uniform(stream, draws_N.numpy()))


def kcenter(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
            labelled_LD: torch.Tensor, distance: Distance = 'euclidean', first: First = 'farthest',
            caps: Caps | None = None) -> torch.Tensor:
    """k-center greedy: again and again the candidate that is farthest from all that is labelled or chosen (CoreSet;
    Sener & Savarese, ICLR 2018); the highest score is first without a labelled one, or if ``first`` is so. (K,) indices
    """
    points = bilinear_form(vectors_ND, vectors_ND, distance)
    nearest = (torch.full_like(points[2], math.inf), )
    traverse(approach, nearest, points, bilinear_form(labelled_LD, vectors_ND, distance), [])
    first = int(scores_N.argmax()) if first == 'highest' or not len(labelled_LD) else None
    return lazily(nearest, points, lambda nearest, k: nearest[0], approach, budget, caps, first, lambda values, k: 0.)


def bilinear_form(vectors_ND: torch.Tensor, among_ND: torch.Tensor, distance: str) -> tuple:
    """Left and right factors, norms and classes by which all distances are ``norms_i + norms_j - left_i . right_j``, by
    the number of common classes: squared Euclidean, or for class matrices (N, C * C) the symmetric Kullback-Leibler
    divergence of the rows of classes that both have, averaged over these, as the authors of Contextual Diversity
    compute it; 0 where none is common. Distances from the mean of some vectors lose less to rounding."""
    if distance == 'euclidean':
        vectors_ND = (vectors_ND - among_ND.mean(0)).mul_(math.sqrt(2))
        return vectors_ND, vectors_ND, squares(vectors_ND) / 2, None

    def rows_and_logs(vectors_ND: torch.Tensor) -> tuple:
        rows_NCC = vectors_ND.unflatten(1, (math.isqrt(vectors_ND.shape[1]), -1))
        has_NC1 = (rows_NCC > 0).all(2, keepdim=True)
        return has_NC1, torch.where(has_NC1, rows_NCC, 0), torch.where(has_NC1, rows_NCC, 1).log() / 2

    (have_NC1, *among), (has_NC1, *own) = map(rows_and_logs, (among_ND, vectors_ND))
    rows_NCC, logs_NCC = ((each - all_NCC.sum(0) / have_NC1.sum(0).clamp_min(1)) * has_NC1
                          for each, all_NCC in zip(own, among))
    own_NC, rows_ND, logs_ND = (rows_NCC * logs_NCC).sum(2), rows_NCC.flatten(1), logs_NCC.flatten(1)
    has_NC = has_NC1[..., 0].to(vectors_ND)
    return (torch.cat([rows_ND, logs_ND, -own_NC, -has_NC], 1), torch.cat([logs_ND, rows_ND, has_NC, own_NC], 1),
            torch.zeros_like(has_NC[:, 0]), has_NC)


def squares(vectors_ND: torch.Tensor) -> torch.Tensor:
    """Squared norms, without another copy of the vectors. (N,)"""
    return torch.einsum('nd,nd->n', vectors_ND, vectors_ND)


def apart(points: tuple, centres: tuple) -> torch.Tensor:
    """Distances from points to centres, less a point's own norm. (N, K)"""
    distances_NK = torch.addmm(centres[2], points[0], centres[1].T, alpha=-1)
    return distances_NK if points[3] is None else distances_NK / (points[3] @ centres[3].T).clamp_min(1)


def approach(nearest: tuple, points: tuple, centres: tuple, values: list) -> None:
    """Lower, in place, the distance to the nearest centre by further centres."""
    torch.minimum(nearest[0], apart(points, centres).amin(1) + points[2], out=nearest[0])


def barycentre(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
               labelled_LD: torch.Tensor, labelled_scores_L: torch.Tensor, tau: Part = 0.5,
               caps: Caps | None = None) -> torch.Tensor:
    """Greedy: the highest mean + least distance to what is labelled or chosen, where the distance from i to j is
    |v_i - v_j|^tau (s_j / (s_i + s_j))^(1 - tau) (CRC-AL). A pick adds no more to a mean than the farthest distance
    over their number. (K,) indices"""
    def advance(state: tuple, points: tuple, centres: tuple, values: list) -> None:
        (total_N, least_N), (vectors_ND, scores_N, norms_N), (centres_KD, scores_K, norms_K) = state, points, centres
        pull_NK = scores_N[:, None] / (scores_K + scores_N[:, None]).clamp_min_(1e-12)
        away_NK = torch.addmm(norms_K, vectors_ND, centres_KD.T, alpha=-2).add_(norms_N[:, None])
        away_NK = away_NK.clamp_min_(0).sqrt_().pow_(tau).mul_(pull_NK.pow_(1 - tau))
        total_N += away_NK.sum(1).cpu()
        torch.minimum(least_N, away_NK.amin(1).cpu().double(), out=least_N)

    points, known = ((each - vectors_ND.mean(0), score.to(each), squares(each - vectors_ND.mean(0)))
                     for each, score in ((vectors_ND, scores_N), (labelled_LD, labelled_scores_L)))
    farthest, number = (2 * float(torch.cat([points[2], known[2]]).max())**.5)**tau, len(labelled_LD)
    state = torch.zeros(len(scores_N)).double(), torch.full((len(scores_N), ), math.inf).double()
    traverse(advance, state, points, known, [])
    return lazily(state, points, lambda state, k: state[0] / (number + k) + state[1], advance, budget, caps,
                  None if number else int(scores_N.argmax()), lambda values, k: len(values) * farthest / (number + k))


def lazily(state: tuple, points: tuple, value: Callable, advance: Callable, budget: int, caps: Caps | None,
           first: int | None, drift: Callable) -> torch.Tensor:
    """A greedy choice: again and again the candidate of the highest value. (K,) indices

    As picks raise values little, if at all, old values nearly are upper bounds: as long as the best of an up-to-date
    few lies above what all others can have come to, it is the best of all; the others can wait for a matrix product.

    Args:
        state: Tensors with a row for each candidate, of which values are made.
        points: The like, that say how picks change a state.
        value: Makes values (N,) of a state, when k are chosen.
        advance: Changes the state of some points, in place, by centres, with the values for which these were chosen.
        first: The first pick, if it is not for its value.
        drift: What picks for some values, of k in all, can have raised another value by.
    """
    n, picks, block = len(state[0]), [], [] if first is None else [first]
    few, closed_N, values = min(n, 1024), torch.zeros(n, dtype=torch.bool, device=state[0].device), [0.] * len(block)
    if caps:
        caps.take(block)
    while True:
        traverse(advance, state, points, rows_of(points, block), values)
        picks += block
        closed_N[block] = True
        if caps:
            closed_N |= caps.closed().to(closed_N.device)
        value_N = value(state, len(picks)).masked_fill(closed_N, -math.inf)
        pick = int(value_N.argmax())
        best = float(value_N[pick])
        if len(picks) == budget or best == -math.inf:  # caps leave no more
            return torch.tensor(picks)
        highest, active = value_N.topk(min(few + 1, n))
        bound, active = float(highest[-1]) if few < n else -math.inf, active[:few].sort().values
        own, near, closed, block, values = rows_of(state, active), rows_of(points, active), closed_N[active], [], []
        while not block or (len(block) < min(512, budget - len(picks)) and
                            best > bound + drift(values, len(picks) + len(block))):
            block.append(pick)
            values.append(best)
            closed |= active == pick
            if caps:
                caps.take([pick])
                closed |= caps.closed(active)
            advance(own, near, rows_of(points, slice(pick, pick + 1)), [best])
            value_A = value(own, len(picks) + len(block)).masked_fill(closed, -math.inf)
            i = int(value_A.argmax())
            pick, best = int(active[i]), float(value_A[i])
        few = min(n, few * 2 if len(block) < 16 else few)


def traverse(advance: Callable, state: tuple, points: tuple, centres: tuple, values: list) -> None:
    """Advance all, a matrix product a block, which a processor's cache holds."""
    size = 2**18 // min(512, len(centres[0]) or 1)
    for rows in (slice(first, first + size) for first in range(0, len(state[0]), size)):
        for some in (slice(first, first + 512) for first in range(0, len(centres[0]), 512)):
            advance(rows_of(state, rows), rows_of(points, rows), rows_of(centres, some), values[some])


def rows_of(points: tuple, rows) -> tuple:
    return tuple(part if part is None else part[rows] for part in points)


def allowed(rows_K, budget: int, caps: Caps | None):
    """The first of some candidates, as caps allow."""
    return caps.first(rows_K, budget) if caps else rows_K[:budget]


def herding(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
            labelled_LD: torch.Tensor, radius: Positive = 1., caps: Caps | None = None) -> torch.Tensor:
    """Greedy: the candidate that adds most to how well all are covered, which is the mean over them of
    exp(-d^2 / radius^2), d to the nearest that is labelled or chosen, of vectors at unit length (MaxHerding; Bae et
    al., ECCV 2024). A gain only falls: one that is old is a bound, and few have to be computed again. (K,) indices"""
    vectors_ND = F.normalize(vectors_ND)
    cover_N, gain_N = torch.zeros_like(vectors_ND[:, 0]), torch.full_like(vectors_ND[:, 0], math.inf)
    new_N, closed_N = torch.zeros((2, len(vectors_ND)), dtype=torch.bool, device=vectors_ND.device)
    picks = []

    def cover_by(centres_KD: torch.Tensor) -> torch.Tensor:
        return (vectors_ND @ centres_KD.T).sub_(1).mul_(2 / radius**2).exp_()

    for part_KD in F.normalize(labelled_LD).split(256) if len(labelled_LD) else ():
        torch.maximum(cover_N, cover_by(part_KD).amax(1), out=cover_N)
    while len(picks) < budget:
        bound_N = gain_N.masked_fill(closed_N, -math.inf)
        best = int(bound_N.argmax())
        if bound_N[best] == -math.inf:  # caps leave no more
            break
        if not new_N[best]:
            rows = bound_N.topk(min(64, len(bound_N))).indices
            gain_N[rows] = cover_by(vectors_ND[rows]).sub_(cover_N[:, None]).clamp_min_(0).mean(0)
            new_N[rows] = True
            continue
        picks.append(best)
        torch.maximum(cover_N, cover_by(vectors_ND[[best]])[:, 0], out=cover_N)
        new_N[:] = False
        closed_N[best] = True
        if caps:
            caps.take([best])
            closed_N |= caps.closed().to(closed_N.device)
    return torch.tensor(picks)


class Caps:
    """Which candidates may still be chosen beside those that are: so many units of an image at most, of so many images,
    so many images of a group, and none of these less than some frames apart. Several units of one image open it once.

    Args:
        group_I, frame_I: The number of each image's group, and of its frame in it.
        units, images, group: How many units of an image, images in all, and images of a group at most.
        distance: How far apart two images of a group are at least.
        image_N: The image of each candidate.
    """

    def __init__(self, group_I: np.ndarray, frame_I: np.ndarray, units: float, images: float, group: float,
                 distance: int, image_N: np.ndarray):
        self.settings, self.image_N = (group_I, frame_I, units, images, group, distance), image_N
        self.units_I, self.closed_I = np.zeros_like(group_I), np.zeros_like(group_I, bool)

    def take(self, rows: list[int]) -> None:
        """Choose candidates."""
        group_I, frame_I, units, images, group, distance = self.settings
        for i in self.image_N[rows]:
            self.units_I[i] += 1
            self.closed_I[i] |= self.units_I[i] >= units
            if self.units_I[i] == 1:
                is_open, same_I = self.units_I > 0, group_I == group_I[i]
                is_full = (same_I & is_open).sum() >= group
                near_I = np.abs(frame_I - frame_I[i]) < distance
                self.closed_I |= (same_I & (near_I | is_full) | (is_open.sum() >= images)) & ~is_open

    def closed(self, rows=slice(None)) -> torch.Tensor:
        """Which candidates, of all or some rows, cannot be chosen any more. (N,) booleans"""
        rows, device = (rows, None) if isinstance(rows, slice) else (rows.cpu().numpy(), rows.device)
        return torch.from_numpy(self.closed_I[self.image_N[rows]]).to(device)

    def first(self, rows_K: torch.Tensor, budget: int) -> torch.Tensor:
        """The first of some candidates that may be chosen, up to a budget; each is, before the next is looked at."""
        picks = []
        for row in rows_K.tolist():
            if len(picks) == budget:
                break
            if not self.closed_I[self.image_N[row]]:
                picks.append(row)
                self.take([row])
        return torch.tensor(picks, dtype=torch.long)

    def again(self) -> Caps:
        """The same, with nothing chosen."""
        return Caps(*self.settings, self.image_N)


def asked_again(caps: Caps, select: Callable) -> Callable:
    """A selector that knows of no caps, asked again for what they left, among those that may be chosen, until it has
    spent the budget."""

    def select_within(scores_N, budget, generator, **offered):
        picks, rows = [], torch.arange(len(scores_N))
        while len(picks) < budget and len(rows):
            left = {key: value[rows] if key[-2:] in ('_N', 'ND', 'NC') and value is not None else value
                    for key, value in offered.items()}
            found = call_offering(select, scores_N[rows], min(budget - len(picks), len(rows)), generator, **left)
            picks += caps.first(rows[torch.as_tensor(found).cpu()], budget).tolist()
            free_N = ~caps.closed()
            free_N[picks] = False
            rows = free_N.nonzero()[:, 0]
        return torch.tensor(picks)

    return functools.update_wrapper(select_within, select)


def grouping(setting: str) -> Callable[[str], tuple[str, int]]:
    """What ``al.group`` makes of an image's name: its group and frame. An expression's first parenthesis is the group,
    or all that it matches; what it does not match is a group of its own.

    Raises:
        ValueError: There is no such function.
    """

    def by_expression(name: str) -> str:
        found = re.search(setting, name)
        return found[bool(found.groups())] if found else name

    is_function = re.fullmatch(r'[\w.]+:\w+', setting)
    group_of = function_named({}, setting, 'al.group') if is_function else by_expression
    return lambda name: (str(group_of(name)), int(re.findall('[0-9]+', f'0/{name}')[-1]))


class Functions(Registry):
    """mmengine's registry, of functions."""

    def register_module(self, name: str | None = None, force: bool = False, module: Callable | None = None):
        """As mmengine's, but a name that is taken is an error that shows both places.

        Raises:
            KeyError: The name stands for another function already.
        """
        if module is None:
            return functools.partial(self.register_module, name, force)
        key = name or module.__name__
        if key in self.module_dict and not force:
            places = [getattr(without_options(each), '__code__', None) for each in (self.module_dict[key], module)]
            places = [f'{code.co_filename}:{code.co_firstlineno}' if code else __file__ for code in places]
            raise KeyError(f'{key!r} is a name in {self.name} already: {places[0]}; the second is {places[1]}')
        return super().register_module(name, force, module)


def resolve_strategy(setting: str | dict) -> Strategy:
    """A strategy's settings as functions.

    Args:
        setting: A strategy's or a score's name, a score as ``'package.module:function'``, or a dict with ``type`` (one
            of these) and options: ``score``, ``embed`` and ``select`` replace the strategy's; then those of any
            strategy; any other is handed to the function that has a parameter of that name.

    Raises:
        ValueError: An unknown name, listing those there are, an unknown option, or functions that do not fit.
    """
    name, given = split_setting(setting)
    function_named({**AL_STRATEGIES.module_dict, **AL_SCORES.module_dict}, name, 'al.strategy')
    preset = AL_STRATEGIES.module_dict.get(name, lambda: dict(score=name))
    own = settings_of(preset)
    parts = preset(**check_settings({key: given.pop(key) for key in own if key in given}, own, 'al.strategy'))
    options = {'score': None, 'embed': None, 'select': 'topk', **parts, **given}
    record = {'type': name, **{part: options.pop(part) for part in PARTS}}
    functions = {part: None if part == 'embed' and record[part] is None else
                 composed_score(record[part]) if part == 'score' and isinstance(record[part], dict) else function_named(
                     registry.module_dict, record[part], f'al.strategy.{part}')
                 for part, (registry, _) in PARTS.items()}
    known = {part: settings_of(functions[part], arguments) for part, (_, arguments) in PARTS.items() if functions[part]}
    known['any'] = settings_of(Strategy, 5)
    takes = own | dict.fromkeys(PARTS, (None, Any)) | {
        key: how for each in known.values() for key, how in each.items()}
    check_settings(options, takes, 'al.strategy')
    filled = {part: check_settings({key: options[key] for key in table if key in options}, table, 'al.strategy')
              for part, table in known.items()}
    for part in functions:
        if filled.get(part):
            functions[part] = functools.partial(functions[part], **filled[part])
    for key, value in (item for table in filled.values() for item in table.items()):
        if record.setdefault(key, value) != value:
            raise ValueError(f'`al.strategy.{key}` should be given: it is an option of two parts, with defaults '
                             f'{record[key]!r} and {value!r}')
    strategy = Strategy(name, **functions, record=record, **filled['any'])
    if strategy.mc is None:
        strategy.mc = 20 if strategy.compares_passes else 1
    record.update(filled['any'], mc=strategy.mc)
    strategy.record = json.loads(json.dumps(record, default=repr))
    check_strategy(strategy)
    return strategy


def composed_score(setting: dict) -> Callable:
    """The score that a dict names: ``dict(type='product', of=[scores])`` or ``'sum'``, each a name or a dict, with
    ``weights`` of the sum's terms, or powers of the product's factors; or one score, with its options.

    Raises:
        ValueError: It names what is wrong.
    """
    where = 'al.strategy.score'
    check_settings(dict(score=setting), dict(score=(None, TypeName)), 'al.strategy')
    name, options = split_setting(setting)
    if name not in COMBINED:
        function = function_named({**AL_SCORES.module_dict, **COMBINED}, name, where)
        return functools.partial(function, **check_settings(options, settings_of(function, 1), where))
    combine = COMBINED[name]
    options = check_settings(options, settings_of(combine, 1), where)
    parts = [composed_score(each if isinstance(each, dict) else dict(type=each)) for each in options['of']]
    weights = options['weights'] or [1] * len(parts)
    if len(weights) != len(parts):
        raise ValueError(f'`{where}.weights` should have one for each of the {len(parts)} scores, but got {weights}')
    if random_scores in (part.func for part in parts if isinstance(part, functools.partial)):
        raise ValueError(f"`{where}.of` should be scores of what a model sees, but got 'random'")

    def score(probs_NCHW, **offered):
        return combine([call_offering(part, probs_NCHW, **offered) for part in parts], parts, weights)

    takes = {key: each for part in parts for key, each in parameters_of(part).items() if key in OFFERED}
    score.__name__, score.__signature__ = name, inspect.Signature([
        inspect.Parameter('probs_NCHW', inspect.Parameter.POSITIONAL_ONLY),
        *(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in takes)])
    return score


def product_of(scores: list, of: Scores, weights: MaybeNumbers = None) -> torch.Tensor:
    """The product of score maps, to powers."""
    return math.prod(score**weight for score, weight in zip(scores, weights))


def sum_of(scores: list, of: Scores, weights: MaybeNumbers = None) -> torch.Tensor:
    """The sum of score maps, with weights."""
    return sum(score * weight for score, weight in zip(scores, weights))


def check_strategy(strategy: Strategy) -> None:
    """Refuse functions that do not fit together."""
    score, embed, select = (function and without_options(function).__name__
                            for function in (strategy.score, strategy.embed, strategy.select))
    takes_vectors = strategy.asks_for('vectors_ND')
    for is_wrong, key, should_be, value in (
            (takes_vectors and not embed, 'embed', f'one of {", ".join(AL_EMBEDDINGS.module_dict)} for the selector '
             f'{select}', None),
            (embed and not takes_vectors, 'embed', f'None for the selector {select}, which takes no vectors', embed),
            (strategy.asks_for('scores_HW') and strategy.score is random_scores, 'score',
             f'a score map for the embedding {embed}', 'random'),
            (strategy.mc == strategy.committee == 1 and not strategy.flip and strategy.compares_passes, 'mc',
             f'above 1, or `committee`, or `flip` True, for {score}, which compares passes', 1),
            (strategy.features_from != 'decode_head' and not strategy.embeds_features, 'features_from',
             f'left out for {strategy.name}, which embeds no features', strategy.features_from),
            (strategy.asks_for('thresholds_C') != bool(strategy.calibration), 'calibration', 'a share of the labelled '
             'images for what asks for thresholds_C, and 0 for all else', strategy.calibration)):
        if is_wrong:
            raise ValueError(f'`al.strategy.{key}` should be {should_be}, but got {value!r}')


@dataclasses.dataclass
class Strategy:
    """A strategy resolved to functions. The last fields are options of any strategy."""
    name: str
    score: Callable                # probs_NCHW -> scores_NHW, or `random_scores`
    embed: Callable | None      # maps of an image -> vectors_ND of its candidates
    select: Callable               # scores_N, budget, generator -> indices_K
    record: dict                   # names of all parts, and all options, as the state keeps them
    mc: MaybeNatural = None        # passes with dropout; 1 is the one without; default: 20 for what compares passes
    shortlist: MaybeNatural = None  # the candidates of an image that are kept: its best so many
    calibration: Share = 0.        # share of the labelled images that a round does not train on, for thresholds
    alpha: Fraction = 0.05         # the rate of false negatives that the thresholds allow
    reduce: Reduce = 'mean'        # the score of an image or a segment: mean, max, or mean of its highest percent
    flip: Flag = False             # pass over the mirrored image, too
    committee: Natural = 1         # how many of the round's last checkpoints pass
    features_from: Module = 'decode_head'  # its last layer's input; or what `backbone`, `neck` or another module makes

    def asks_for(self, *names: str) -> bool:
        """Whether a part has a parameter of one of these names."""
        return any(not parameters_of(function).keys().isdisjoint(names)
                   for function in (self.score, self.embed, self.select) if function)

    @property
    def compares_passes(self) -> bool:
        return self.asks_for(*set(STATISTICS) - {'probs_NCHW'})

    @property
    def asks_for_predicted(self) -> bool:
        return self.asks_for('predicted_NC', 'labelled_predicted_LC')

    @property
    def asks_for_labelled(self) -> bool:
        return self.asks_for('labelled_LD', 'labelled_scores_L', 'labelled_predicted_LC')

    @property
    def needs_classes(self) -> bool:
        return self.asks_for('probs_NC') or self.asks_for_predicted

    @property
    def needs_probs(self) -> bool:
        return self.score is not random_scores or self.needs_classes

    @property
    def embeds_probs(self) -> bool:
        """Whether vectors are made from the logits."""
        return self.embed is not None and (self.asks_for('probs_CHW', 'scores_HW') or not self.embeds_features)

    @property
    def embeds_features(self) -> bool:
        return self.asks_for('features_KHW')

    @property
    def needs_model(self) -> bool:
        return self.needs_probs or self.embed is not None

    @property
    def setting(self) -> str | dict:
        """The shortest setting that gives this strategy."""
        setting = dict(type=self.name)
        for keys in (list(PARTS), list(self.record)):  # what a part's options are by default depends on the parts
            try:
                alone = resolve_strategy(setting).record
            except ValueError:  # it needs an option
                alone = {}
            setting.update({key: self.record[key] for key in keys
                            if key not in alone or alone[key] != self.record[key]})
        return setting if len(setting) > 1 else self.name


@functools.lru_cache(64)
def parameters_of(function: Callable):
    """What a function takes, by name."""
    return inspect.signature(function).parameters


def without_options(function: Callable) -> Callable:
    """The function itself, where a strategy has fixed some of its options."""
    return getattr(function, 'func', function)


def always(parts: dict) -> Callable[[], dict]:
    """A strategy that is the same parts, whatever is set."""
    return lambda: parts


def random_scores(draws_N: np.ndarray) -> np.ndarray:
    """Uniform scores: what the candidates have drawn, and no model is asked. (N,)"""
    return draws_N


STATISTICS = dict(  # of a pass; their mean over the passes is kept, and never each of them
    probs_NCHW=lambda probs_NCHW: probs_NCHW,
    entropies_NHW=entropy,
    votes_NCHW=lambda probs_NCHW: predicted_as(probs_NCHW).float(),
    squares_NCHW=lambda probs_NCHW: probs_NCHW**2)
AL_SCORES, AL_EMBEDDINGS, AL_SELECTORS, AL_STRATEGIES = [
    Functions(name, scope='mmseg', locations=['al_patch'])
    for name in ('al_score', 'al_embedding', 'al_selector', 'al_strategy')]

for registry, functions in (
        (AL_SCORES, dict(
            random=random_scores, least_confidence=least_confidence, margin=margin, ratio=probability_ratio,
            entropy=entropy, variation_ratio=variation_ratio, mean_std=mean_std, bald=bald, ripu=ripu,
            ripu_pixel=ripu_pixel, conformal_risk=conformal_risk, balent=balanced_entropy,
            one_vs_rest=one_versus_rest)),
        (AL_EMBEDDINGS, dict(
            features=mean_features, gradient=mean_gradient, confusion=class_confusion, cooccurrence=class_cooccurrence,
            class_scores=class_scores)),
        (AL_SELECTORS, dict(
            topk=topk, top_percent=top_percent, power=power_draw, softmax=softmax_draw, softrank=softrank_draw,
            foreground=foreground_draw, stochastic_batches=stochastic_batches, kcenter=kcenter, kmeanspp=kmeanspp,
            real=representative_errors, herding=herding, medoids=medoids, typical=typical,
            class_balance=class_balance, class_balanced_power=class_balanced_power, barycentre=barycentre)),
        (AL_STRATEGIES, {name: always(parts) for name, parts in dict(
            pixelpick=dict(score='margin', select='top_percent'),
            power_entropy=dict(score='entropy', select='power'),
            powerbald=dict(score='bald', select='power'),
            softmaxbald=dict(score='bald', select='softmax'),
            softrankbald=dict(score='bald', select='softrank'),
            stochastic_batches=dict(score='entropy', select='stochastic_batches'),
            coreset=dict(score='random', embed='features', select='kcenter'),
            badge=dict(score='random', embed='gradient', select='kmeanspp'),
            contextual_diversity=dict(score='random', embed='confusion', select='kcenter', distance='kl',
                                      first='highest'),
            real=dict(score='random', embed='features', select='real'),
            classbal=dict(score='ratio', select='class_balance'),
            oreal=dict(score='one_vs_rest', reduce='max'),
            maxherding=dict(score='random', embed='features', select='herding'),
            medoids=dict(score='random', embed='features', select='medoids'),
            typiclust=dict(score='random', embed='features', select='typical'),
            clasp_pe=dict(score='entropy', embed='class_scores', select='class_balanced_power'),
            crc=dict(score='conformal_risk', embed='cooccurrence', select='barycentre', calibration=0.2)).items()})):
    for name, function in functions.items():
        registry.register_module(name, module=function)


@AL_STRATEGIES.register_module(name='random')
def random_draw(foreground: Part = 0.) -> dict:
    """At random; with ``foreground``, that share of it where the model predicts foreground: see ``foreground_draw``."""
    return dict(score='random', **dict(select='foreground', foreground=foreground) if foreground else {})


COMBINED = dict(product=product_of, sum=sum_of)
ONE_BY_ONE = topk, power_draw, softmax_draw  # a candidate's rank among others is its own
# the work grows with picks x candidates
PAIRWISE = kcenter, kmeanspp, representative_errors, barycentre, herding, medoids, typical
PARTS = dict(score=(AL_SCORES, 1), embed=(AL_EMBEDDINGS, 0), select=(AL_SELECTORS, 3))  # arguments that always come

# ---------------------------------------------------------------------------------------------------------------------
# Checks of settings: one for all of them, and the rules that units' and strategies' options name
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(function: Callable, skip: int = 0) -> dict[str, tuple]:
    """The parameters of a function that settings may set, less the first ``skip``: name -> default and annotation."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except Exception:  # an annotation that only a type checker can read
        parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.default, p.annotation) for p in list(parameters)[skip:]
            if p.name not in OFFERED and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def check_settings(given: dict, known: dict[str, tuple], where: str) -> dict:
    """Settings with their defaults filled in.

    Args:
        known: See ``settings_of``.
        where: What the settings belong to, for an error: ``al``, ``al.unit``.

    Raises:
        ValueError: It names the setting, what it should be and what was given.
    """
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f'did you mean `{where}.{near[0]}`?' if near else f'known keys: {", ".join(known) or "none"}'
            merged = '; if a base config sets it, `_delete_=True` in your dict replaces all of the base\'s'
            raise ValueError(f'`{where}.{key}` is not a setting; {hint}{merged * (where != "al")}')
    filled = {}
    for key, (default, annotation) in known.items():
        value = given.get(key, default)
        if value is inspect.Parameter.empty:
            raise ValueError(f'`{where}.{key}` should be given: it has no default, and is none of {", ".join(OFFERED)}')
        filled[key] = list(value) if isinstance(value, tuple) else value
        wrong = [rule.should_be for rule in getattr(annotation, '__metadata__', ())
                 if isinstance(rule, Rule) and not rule.holds(filled[key])]
        if annotation in (int, float, bool, str) and not (
                type(value) is annotation or annotation is float and is_number(value)):
            wrong = [f'of type {annotation.__name__}']
        if wrong and key in given:
            raise ValueError(f'`{where}.{key}` should be {wrong[0]}, but got {value!r}')
    return filled


def is_amount(value) -> bool:
    """An int counts; a float is a fraction. ``True`` is neither."""
    return is_int(value, 1) or (type(value) is float and 0 < value <= 1)


def is_int(value, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def split_setting(setting: str | dict) -> tuple[str, dict]:
    """The name and the options in a setting that is a name, or ``dict(type=name, **options)``."""
    options = dict(setting) if isinstance(setting, dict) else dict(type=setting)
    return options.pop('type'), options


def function_named(table: dict, name: str, key: str) -> Callable:
    """The function of a name, or that of ``'package.module:function'``.

    Raises:
        ValueError: There is none; it names the setting ``key``.
    """
    if not isinstance(name, str) or ':' not in name:
        if name not in [*table]:
            raise ValueError(f"`{key}` should be one of {', '.join(table)}, or 'package.module:function', but got "
                             f'{name!r}')
        return table[name]
    module, _, attribute_name = name.partition(':')
    try:
        function = getattr(importlib.import_module(module), attribute_name)
        inspect.signature(function)  # its options are read from there; some builtins have none
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'`{key}` should name a function that can be imported, but got {name!r}: {error}') from error
    return function


def is_list_of(value, holds: Callable, length: int | None = None) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == (length or max(1, len(value))) and all(map(holds, value))


def is_number(value) -> bool:
    return type(value) in (int, float)


def number_of(amount: float, total: int) -> int:
    """An int as it is; a fraction of ``total``, rounded, but at least one."""
    return amount if isinstance(amount, int) else max(1, round(amount * total))


def budgets(al: dict) -> list:
    """What each round may ask for."""
    return al['budget'] if isinstance(al['budget'], list) else [al['budget']] * al['rounds']


Count = rule('an int >= 0', is_int)
MaybeCount = or_none(Count)
Natural = rule('a positive int', lambda v: is_int(v, 1))
MaybeNatural = or_none(Natural)
SegmentCount = rule('an int in [1, 65535]', lambda v: is_int(v, 1) and v < 2**16)
MaybeFolder = or_none(rule('the path of a folder', lambda v: isinstance(v, str) and osp.isdir(v)))
Number = rule('a number', is_number)
Module = rule("'decode_head', 'backbone', 'neck' or a module's dotted name", lambda v: isinstance(v, str))
MaybeNumber = or_none(Number)
Positive = rule('a number above 0', lambda v: is_number(v) and v > 0)
Fraction = rule('a fraction in (0, 1)', lambda v: is_number(v) and 0 < v < 1)
Part = rule('a fraction in [0, 1]', lambda v: is_number(v) and 0 <= v <= 1)
Share = rule('a fraction in [0, 1)', lambda v: is_number(v) and 0 <= v < 1)
Percent = rule('a percentage in (0, 100]', lambda v: is_number(v) and 0 < v <= 100)
Reduce = rule("'mean', 'max' or a percentage in (0, 100]",
              lambda v: v in ('mean', 'max') or is_number(v) and 0 < v <= 100)
Pair = rule('a pair of ints (h, w)', lambda v: is_list_of(v, lambda n: is_int(n, 1), 2))
PositivePair = rule('a pair of numbers above 0', lambda v: is_list_of(v, lambda n: is_number(n) and n > 0, 2))
Distance = one_of('euclidean', 'kl')
First = one_of('farthest', 'highest')
Scores = rule('a list of scores, by name or as dict(type=name, **options)', lambda v: is_list_of(
    v, lambda each: isinstance(each, str) or isinstance(each, dict) and isinstance(each.get('type'), str)))
MaybeNumbers = or_none(rule('a list of numbers', lambda v: is_list_of(v, is_number)))

# ---------------------------------------------------------------------------------------------------------------------
# Files, seeds and ranks: how masks and state are written and read, random numbers, shared work
# ---------------------------------------------------------------------------------------------------------------------


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, 'module', model)


@contextlib.contextmanager
def reading(path: str, errors: type = Exception):
    """Let an error name the file that it is about.

    Raises:
        ValueError: It is, in one line, what went wrong inside.
    """
    try:
        yield
    except errors as error:
        if ' cannot be used (' in str(error):
            raise
        is_gone = isinstance(error, FileNotFoundError) and osp.basename(path) in str(error)
        why = 'there is no such file' if is_gone else f'{type(error).__name__}: {error}'
        if isinstance(error, pickle.UnpicklingError):  # torch's own text, of many lines, tells to drop the protection
            what = ', '.join(re.findall(r'GLOBAL ([\w.]+)', why)) or 'what no checkpoint has'
            why = f'beside weights and training state it holds {what}: reading that could run any code'
        if isinstance(error, Image.DecompressionBombError):
            why += ' Set PIL.Image.MAX_IMAGE_PIXELS = None in a module of `custom_imports` if the file can be trusted'
        raise ValueError(f'{path} cannot be used ({" ".join(why.split())})') from error


def generator(*parts) -> torch.Generator:
    """A CPU generator seeded for one named purpose."""
    return torch.Generator().manual_seed(seed_of(*parts))


def seed_of(*parts) -> int:
    """A seed for one named purpose, so that no draw depends on how many were made before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], 'big')


def seed_draws(seed: int) -> None:
    """Seed what pipelines and models draw from."""
    python_random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def uniform(seed: int, numbers_N: np.ndarray) -> np.ndarray:
    """A random number in (0, 1) for each of some numbers of 8 bytes: its own, whatever stands beside it, and the same
    on every machine (SplitMix64; Steele et al., OOPSLA 2014). (N,) float64"""
    bits = (numbers_N.view(np.uint64) + 1) * 0x9e3779b97f4a7c15 + seed
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb
    return ((bits ^ bits >> 31) // 2**12 + .5) / 2**52


def on_all_ranks(function: Callable, names: list, title: str = '') -> dict:
    """What a function makes of each name; every rank does its share, and the first shows progress under a title.

    Raises:
        ValueError: On every rank, with what went wrong on any. (Another error than a ValueError, where it happened.)
    """
    rank, world_size = get_dist_info()
    mine, errors, odd = {}, [], None
    for name in track(names[rank::world_size], title, disable=rank or not title or not sys.stdout.isatty()):
        try:
            mine[name] = function(name)
        except Exception as error:
            errors.append(str(error))
            odd = odd if isinstance(error, ValueError) else error
    shares = all_gather_object((mine, errors))
    errors = sum((share[1] for share in shares), [])
    if odd:
        raise odd
    if errors:
        raise ValueError('; '.join(errors[:5]) + (f'; and {len(errors) - 5} more' if len(errors) > 5 else ''))
    return {name: share[0][name] for name in names for share in shares if name in share[0]}


def on_rank_0(function: Callable):
    """What a function makes on rank 0, on every rank. All ask each second whether it is ready, so that it may take
    longer than processes wait for each other: it runs in a thread, where ``no_grad`` has to be said again.

    Raises:
        ValueError: On every rank, with what went wrong. (Another error than a ValueError, on rank 0.)
    """
    if get_dist_info()[1] == 1:
        return function()
    work = [ThreadPoolExecutor(1).submit(torch.no_grad()(function))] if is_main_process() else []
    while not any(all_gather_object(len(wait(work, 1).done))):
        pass
    return on_all_ranks(lambda _: work[0].result(), ['rank 0'])['rank 0']


def png_path(folder: str, name: str, root: str | None = None) -> str:
    """Where a folder keeps its PNG for an image. It cannot lie outside the folder nor, through links, outside ``root``
    (default: the folder).

    Raises:
        ValueError: The name, or a link on the way, leads elsewhere.
    """
    folder = osp.abspath(folder)
    path = osp.abspath(osp.join(folder, name + '.png'))
    if not path.startswith(folder + os.sep):
        raise ValueError(f'an image name should stay below its directory, but got {name!r}')
    if not osp.realpath(path).startswith(osp.join(osp.realpath(root or folder), '')):
        raise ValueError(f'{path} should lie in {root or folder}, but a symbolic link leads to {osp.realpath(path)}')
    return path


def write_png(path: str, array_HW: np.ndarray, palette: np.ndarray | None = None) -> None:
    """An array as a PNG (booleans take 1 bit each; numbers may have a palette, (256, 3)), all or nothing."""
    png, image = io.BytesIO(), Image.fromarray(array_HW)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(png, 'PNG')
    write_atomically(path, png.getvalue())


def write_atomically(path: str, content: str | bytes) -> None:
    """Replace a file's content as a whole or, whenever the process is killed, not at all. Makes its folder.

    Raises:
        OSError: There is no space left, or the like. What was there is left as it was.
    """
    content, temporary = content.encode() if isinstance(content, str) else content, f'{path}{TEMPORARY}'
    try:
        os.makedirs(osp.dirname(path), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)  # left by a run that was killed; or a link, which is not to be written through
        with open(temporary, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise OSError(f'{path} cannot be written and is left as it was ({error}): go on with --resume when it can'
                      ) from error
    directory = os.open(osp.dirname(path), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def remove_temporary(folder: str) -> None:
    """Remove what a run that was killed was just writing."""
    for where, _, files in os.walk(folder):
        for file in files:
            if file.endswith(TEMPORARY):
                os.remove(osp.join(where, file))


TEMPORARY = '.al.tmp'


def read_mask(path: str) -> np.ndarray:
    """A mask as booleans, (H, W).

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return np.array(image, bool)
    except (OSError, SyntaxError) as error:
        raise ValueError(f'the mask {path} is missing or damaged ({error}): restore it from a copy') from error


# ---------------------------------------------------------------------------------------------------------------------
# Guards: one run at a time, checkpoints under torch >= 2.6, and mmcv without compiled ops
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_run(runner: Runner):
    """Hold ``work_dir/al.lock``, from rank 0. The others look whether it is theirs, too.

    It is a record lock (``lockf``): forked dataloader workers do not inherit it, as they would one of ``flock``, so
    that the kernel frees it in the instant in which the process dies, though its workers live on for seconds. Over NFS
    it counts for all machines, if the server locks at all. Closing any descriptor of the file would free it.

    Raises:
        RuntimeError: On every rank: another run holds it, or a rank looks for it elsewhere.
    """
    path, file, holder = osp.join(runner.work_dir, LOCK_FILE), None, None
    if is_main_process():
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file, 0)
            os.write(file, f'process {os.getpid()} on {socket.gethostname()}'.encode())
            os.fsync(file)  # for other machines
        except BlockingIOError:
            holder = os.read(file, 999).decode(errors='replace') or 'another process'
        except OSError as error:
            runner.logger.warning(f'{path} cannot be locked ({error}): take care that no other run uses this work_dir')
    holder = all_gather_object(holder)[0]
    try:
        if holder:
            raise RuntimeError(f'{runner.work_dir} is in use by {holder}: wait for that run, stop it, or choose '
                               'another --work-dir')
        if len(set(all_gather_object(osp.isfile(path) and osp.getmtime(path)))) > 1:
            raise RuntimeError(f'{runner.work_dir} should be one folder on a disk that all machines share, but not all '
                               f'processes find the {LOCK_FILE} of rank 0 in it: choose another --work-dir')
        yield
    finally:
        if file is not None:
            os.close(file)


def checkpoints_are_data():
    """Within it, the maintained fork's mmengine does not read again, without protection, what torch has refused."""
    return attribute(mmengine.runner.checkpoint, '_safe_torch_load', torch.load)


def checkpoint_globals() -> list:
    """What mmengine's own checkpoints hold beside tensors. torch >= 2.6 refuses all that is not named here."""
    multiarray = importlib.import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    dtypes = [type(np.dtype(code)) for code in '?bBhHiIlLqQefd']
    return [HistoryBuffer, OneCycleParamScheduler, np.ndarray, np.dtype, *dict.fromkeys(dtypes), multiarray.scalar,
            multiarray._reconstruct, (_getattr_of_mmengine, 'builtins.getattr')]


def _getattr_of_mmengine(owner, name: str):
    """Stands in for ``getattr`` while a checkpoint is read: mmengine pickles ``HistoryBuffer.mean`` and its like."""
    if owner is HistoryBuffer and name in ('mean', 'max', 'min', 'current') or (
            owner is OneCycleParamScheduler and name in ('_annealing_cos', '_annealing_linear')):
        return getattr(owner, name)
    raise ValueError(f'a checkpoint may only refer to the statistics of HistoryBuffer, but this one asks for {name!r} '
                     f'of {owner!r}')


LOCK_FILE = 'al.lock'


def load_ext_lazily(name: str, functions: list[str]):
    """In place of mmcv's ``load_ext`` where ``mmcv._ext`` is missing: an op fails when it is called, by name."""

    def missing(function: str) -> Callable:
        def op(*args, **kwargs):
            raise RuntimeError(f'this model calls the compiled op `{function}`, which the installed mmcv lacks: '
                               'install the full one, for mmcv-lite by: pip uninstall mmcv-lite; '
                               'pip install --no-build-isolation "mmcv>=2.0.0rc4,<2.2.0"')
        return op

    return types.SimpleNamespace(**{function: missing(function) for function in functions})


# ---------------------------------------------------------------------------------------------------------------------
# The patch
# ---------------------------------------------------------------------------------------------------------------------


def _wrap_train(train: Callable) -> Callable:

    @functools.wraps(train)
    def wrapper(self, *args, **kwargs):
        return train(self, *args, **kwargs) if self.cfg.get('al') is None else run_alone(self)

    return wrapper


def _wrap_build_dataloader(build_dataloader: staticmethod) -> staticmethod:
    build = build_dataloader.__func__

    @functools.wraps(build)
    def wrapper(dataloader, *args, **kwargs):
        if isinstance(dataloader, dict) and 'al' in dataloader:
            return build_labelled_dataloader(build, dataloader, *args, **kwargs)
        return build(dataloader, *args, **kwargs)

    return staticmethod(wrapper)


def _wrap_load_ext(load_ext: Callable) -> Callable:
    return load_ext if importlib.util.find_spec('mmcv._ext') else functools.wraps(load_ext)(load_ext_lazily)


def apply_patch() -> None:
    """Put the patch in place; a second call does nothing.

    Raises:
        RuntimeError: mmengine has no longer what is to be patched; it says what. Nothing is patched then.
    """
    if is_patched():
        return
    missing = [f'{owner.__name__}.{name}' for owner, name in _PATCHES if name not in vars(owner)]
    if missing:
        raise RuntimeError(f'al_patch cannot patch {", ".join(missing)}: not there in mmengine {mmengine.__version__}; '
                           'al_patch is tested with mmengine 0.10.7')
    _ORIGINALS.update({(owner, name): vars(owner)[name] for owner, name in _PATCHES})
    for (owner, name), wrap in _PATCHES.items():
        setattr(owner, name, wrap(vars(owner)[name]))
    if hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):  # came with what refuses them by default
        given = torch.serialization.get_safe_globals()
        _ALLOWED.enter_context(torch.serialization.safe_globals([x for x in checkpoint_globals() if x not in given]))


# (owner, name): how to wrap it
_PATCHES = {
    (Runner, 'train'): _wrap_train,
    (Runner, 'build_dataloader'): _wrap_build_dataloader,
    (mmcv.utils.ext_loader, 'load_ext'): _wrap_load_ext,
}


def is_patched() -> bool:
    """Whether the patch is in place."""
    return bool(_ORIGINALS)


def remove_patch() -> None:
    """Undo the patch: every attribute is again the very object it was."""
    for (owner, name), original in reversed(_ORIGINALS.items()):
        setattr(owner, name, original)
    _ORIGINALS.clear()
    _ALLOWED.close()


_ALLOWED = contextlib.ExitStack()  # what `torch.load` may read
_ORIGINALS = {}  # (owner, name): the raw attribute, as `vars(owner)` had it
apply_patch()
