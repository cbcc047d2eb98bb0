"""Active learning for stock MMSegmentation: one module that patches mmengine when it is imported.

With ``import al_patch`` (or ``custom_imports = dict(imports=['al_patch'])`` in a config) and an ``al = dict(...)`` block
in the config, ``runner.train()`` becomes active learning: it trains the whole schedule once per round on the labelled
images, scores the pool, chooses what to label next, writes that down, and goes on. Without an ``al`` block everything
is stock.

What is patched, and nothing else (see ``_PATCHES`` at the end; ``remove_patch()`` undoes it):

- ``mmengine.runner.Runner.train``: runs the rounds, if the runner's config has an ``al`` block.
- ``mmengine.runner.Runner.build_dataloader``: understands a key ``labelled`` in a dataloader's config.
- ``mmengine.dataset.BaseDataset.full_init``: under that key, keeps only the labelled images.
- ``mmcv.utils.ext_loader.load_ext``: only where mmcv has no compiled ops (mmcv-lite), so that a missing op fails when it
  is called, by name, and not when mmseg is imported.

The file reads in the order of one image's journey: settings, pool and state, labelled training set, training, query,
strategies, and last the rounds themselves and the patch.
"""
import contextlib
import copy
import difflib
import functools
import gc
import glob
import hashlib
import importlib.util
import inspect
import json
import math
import os
import os.path as osp
import random as python_random
import re
import time
import types
import zipfile
from contextvars import ContextVar
from typing import Callable, NamedTuple, Optional, Union

import mmcv.utils.ext_loader
import mmengine
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import all_gather_object, barrier, broadcast_object_list, get_dist_info, is_main_process
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner, find_latest_checkpoint, load_checkpoint
from mmengine.runner.amp import autocast
from mmengine.visualization import Visualizer
from prettytable import PrettyTable
from torch.utils.data import ConcatDataset, Subset

__version__ = '0.1.0'

# ---------------------------------------------------------------------------------------------------------------------
# Settings: the `al` block
# ---------------------------------------------------------------------------------------------------------------------

DEFAULTS = dict(
    unit='image',         # what is asked for: image
    strategy='entropy',   # a name, dict(type=a name, **options), or 'package.module:function' of your own
    initial=0.05,         # labelled at the start: int | fraction of the images | list of names | path of a split file
    budget=0.05,          # asked for per round: int | fraction of the images | list with one entry a round
    rounds=5,             # queries; training runs rounds + 1 times (a budget list sets it, too)
    weights='scratch',    # what a round starts from: scratch (= the config's own init or load_from) | last | best
    query_with='last',    # checkpoint that scores the pool: last | best
    pool_size=None,       # score only a random subset of the pool: int | fraction of the images
    overrides=None,       # config overrides for single rounds, e.g. {2: {'train_cfg.max_iters': 4000}}
    stop=None,            # stop early: dict(metric='mIoU', value=75) and / or dict(metric='mIoU', patience=2)
    seed=None)            # of every random choice; defaults to randomness.seed

MAY_CHANGE_ON_RESUME = ('rounds', 'budget', 'stop')  # they only extend a run


def _is_amount(value) -> bool:
    """An int counts; a float is a fraction. ``True`` is neither."""
    return (type(value) is int and value > 0) or (type(value) is float and 0 < value <= 1)


def _is_overrides(value) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch('0|[1-9][0-9]*', str(k)) and isinstance(v, dict) for k, v in value.items())


def _is_stop(value) -> bool:
    return (isinstance(value, dict) and set(value) <= {'metric', 'value', 'patience'} and
            ('value' in value or 'patience' in value) and isinstance(value.get('metric', ''), str) and
            isinstance(value.get('value', 0.), (int, float)) and
            type(value.get('patience', 1)) is int and value.get('patience', 1) > 0)


# key: (test, what the value should be)
_CHECKS = dict(
    unit=(lambda v: v in ('image', ), "'image'"),
    strategy=(lambda v: isinstance(v, str) or isinstance(v, dict) and isinstance(v.get('type'), str),
              "a strategy's name, dict(type=name, **options) or 'package.module:function'"),
    initial=(lambda v: _is_amount(v) or (isinstance(v, str) and v) or
             (isinstance(v, list) and v and all(isinstance(n, str) for n in v)),
             'a positive int, a fraction in (0, 1], a list of image names, or the path of a split file'),
    budget=(lambda v: _is_amount(v) or (isinstance(v, list) and v and all(map(_is_amount, v))),
            'a positive int, a fraction in (0, 1], or a list of these with one entry a round'),
    rounds=(lambda v: type(v) is int and v >= 0, 'an int >= 0'),
    weights=(lambda v: v in ('scratch', 'last', 'best'), "'scratch', 'last' or 'best'"),
    query_with=(lambda v: v in ('last', 'best'), "'last' or 'best'"),
    pool_size=(lambda v: v is None or _is_amount(v), 'None, a positive int, or a fraction in (0, 1]'),
    overrides=(lambda v: v is None or _is_overrides(v), 'None or a dict from a round to a dict of config keys, e.g. '
               "{2: {'train_cfg.max_iters': 4000}}"),
    stop=(lambda v: v is None or _is_stop(v), "None or a dict of 'metric' with 'value' and / or 'patience', e.g. "
          "dict(metric='mIoU', value=75)"),
    seed=(lambda v: v is None or (type(v) is int and v >= 0), 'None or an int >= 0'))


def parse_settings(block: dict) -> ConfigDict:
    """Validate an ``al`` block and fill in the defaults.

    Args:
        block: The config's ``al`` block.

    Returns:
        The settings, one attribute a key of ``DEFAULTS``.

    Raises:
        ValueError: It names the key, what it should be and what was given.
    """
    if not isinstance(block, dict):
        raise ValueError(f'`al` should be a dict, but got {block!r}')
    block = json.loads(json.dumps(_plain(block)))  # exactly as the state file will hold it: lists, string keys
    for key in block:
        if key not in DEFAULTS:
            near = difflib.get_close_matches(key, DEFAULTS, 1)
            hint = f'did you mean `al.{near[0]}`?' if near else f'known keys: {", ".join(DEFAULTS)}'
            raise ValueError(f'`al.{key}` is not a setting; {hint}')
    al = {**DEFAULTS, **block}
    for key, (is_valid, should_be) in _CHECKS.items():
        if not is_valid(al[key]):
            raise ValueError(f'`al.{key}` should be {should_be}, but got {al[key]!r}')
    if isinstance(al['budget'], list):
        if block.get('rounds', len(al['budget'])) != len(al['budget']):
            raise ValueError(f'`al.budget` should have one entry for each of the `al.rounds` = {al["rounds"]} rounds, '
                             f'but got {len(al["budget"])} entries')
        al['rounds'] = len(al['budget'])
    resolve_strategy(al['strategy'])
    return ConfigDict(al)


def _plain(value):
    """Config containers as plain ones; what JSON cannot hold is an error that says so."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f'`al` should hold only numbers, strings, lists and dicts, but got {value!r} '
                     f'({type(value).__name__})')


def count(amount, total: int) -> int:
    """An int or fraction as a number of units out of ``total``; a fraction is rounded, but is at least one."""
    return amount if isinstance(amount, int) else max(1, round(amount * total))


def budgets(al: dict, total: int) -> list[int]:
    """How many units each round asks for."""
    each = al['budget'] if isinstance(al['budget'], list) else [al['budget']] * al['rounds']
    return [count(amount, total) for amount in each]


def check_runner(al: dict, runner: Runner) -> None:
    """Refuse, before anything expensive, what ``al`` asks of a config that cannot give it.

    Raises:
        ValueError: It names the key of the config to change.
    """
    cfg = runner.cfg
    for key in ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not isinstance(cfg.get(key), dict):
            raise ValueError(f'active learning builds a new runner every round, so the config needs `{key}` as a dict, '
                             f'but got {type(cfg.get(key)).__name__}')
    checkpoint_hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    if not any(hook.save_last for hook in checkpoint_hooks):
        raise ValueError('`default_hooks.checkpoint` should be a CheckpointHook with save_last=True (its default): '
                         "a round's weights have to be on disk to score the pool and to resume")
    if 'best' in (al['weights'], al['query_with']):
        key = 'weights' if al['weights'] == 'best' else 'query_with'
        if cfg.get('val_cfg') is None:
            raise ValueError(f"`al.{key}='best'` needs validation, but the config has no `val_cfg`")
        if not any(hook.save_best for hook in checkpoint_hooks):
            raise ValueError(f"`al.{key}='best'` needs `default_hooks.checkpoint.save_best`, e.g. save_best='mIoU'")
    if al['stop'] and cfg.get('val_cfg') is None:
        raise ValueError('`al.stop` needs a validation metric, but the config has no `val_cfg`')
    late = [k for k in (al['overrides'] or {}) if int(k) > al['rounds']]
    if late:
        raise ValueError(f'`al.overrides` should name rounds from 0 to {al["rounds"]}, but got {", ".join(late)}')


# ---------------------------------------------------------------------------------------------------------------------
# The pool: all training images, by name, without their labels
# ---------------------------------------------------------------------------------------------------------------------


def image_name(dataset: BaseDataset, info: dict) -> str:
    """An image's name as mmseg's split files spell it: its path below ``img_path``, without ``img_suffix``."""
    prefix = (dataset.data_prefix or {}).get('img_path') or ''
    path = info['img_path']
    name = path[len(prefix):].lstrip('/') if prefix and path.startswith(prefix) else osp.basename(path)
    suffix = getattr(dataset, 'img_suffix', None) or osp.splitext(name)[1]
    return name[:-len(suffix)] if suffix and name.endswith(suffix) else name


def leaf_configs(dataset: dict) -> list[dict]:
    """The data sets under any nesting of wrappers (``RepeatDataset``, ``ConcatDataset``, ...), without building a
    wrapper, because some read every label to do so."""
    if not isinstance(dataset, dict):
        raise ValueError(f'`train_dataloader.dataset` should be a config dict down to its leaves, but got a '
                         f'{type(dataset).__name__} object')
    inner = dataset.get('datasets') or ([dataset['dataset']] if 'dataset' in dataset else [])
    return [leaf for item in inner for leaf in leaf_configs(item)] if inner else [dataset]


def query_pipeline(cfg: dict) -> list:
    """The test pipeline without the transforms that load labels."""
    for key in ('test_dataloader', 'val_dataloader'):
        if cfg.get(key):
            pipeline = leaf_configs(cfg[key]['dataset'])[0]['pipeline']
            break
    else:
        pipeline = cfg.get('test_pipeline')
    if not pipeline:
        raise ValueError('the pool is scored through the test pipeline, but the config has no `test_dataloader`, '
                         '`val_dataloader` or `test_pipeline`')
    return [step for step in pipeline if not re.match(r'Load\w*Ann', str(step['type']).rsplit('.')[-1])]


class Pool:
    """Every image of the training set, labelled or not, in the data set's order, readable without its label.

    Args:
        cfg: The run's config.

    Raises:
        ValueError: There is no image, or two images have one name.
    """

    def __init__(self, cfg: dict):
        pipeline, self.leaves, self.where, paths = query_pipeline(cfg), [], {}, {}
        for leaf_cfg in leaf_configs(cfg['train_dataloader']['dataset']):
            try:
                leaf = DATASETS.build({**leaf_cfg, 'pipeline': copy.deepcopy(pipeline)})
            except ValueError as error:  # mmengine's own for an empty one is 'need at least one array to concatenate'
                raise ValueError('the training set has no images or cannot be read: check `train_dataloader.dataset` '
                                 f'({error})') from error
            if not isinstance(leaf, BaseDataset):
                raise ValueError('active learning filters subclasses of mmengine.dataset.BaseDataset, but got a '
                                 f'{type(leaf).__name__}')
            leaf.full_init()
            leaf.test_mode = True  # an unreadable image is then an error, and not replaced by another one
            for index in range(len(leaf)):
                info = leaf.get_data_info(index)
                name, path = image_name(leaf, info), info['img_path']
                if paths.setdefault(name, path) != path:
                    raise ValueError(f'image names should be unique, but {paths[name]} and {path} are both {name!r}')
                self.where.setdefault(name, (len(self.leaves), index))
            self.leaves.append(leaf)
        self.names = list(self.where)
        if not self.names:
            raise ValueError('the training set has no images: check `train_dataloader.dataset`')

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, names: list[str]) -> ConcatDataset:
        """The images of these names, which are in pool order, through the query pipeline."""
        chosen = [[] for _ in self.leaves]
        for name in names:
            leaf, index = self.where[name]
            chosen[leaf].append(index)
        # not leaf.get_subset: its copies share a memo by id() for as long as the process lives, and mix objects up
        return ConcatDataset([Subset(leaf, indices) for leaf, indices in zip(self.leaves, chosen) if indices])


# ---------------------------------------------------------------------------------------------------------------------
# State: what was asked for and what came of it, in `work_dir/al_state.json`
# ---------------------------------------------------------------------------------------------------------------------

SCHEMA = 1
STATE_FILE = 'al_state.json'


def write_atomically(path: str, text: str) -> None:
    """Replace a file's content as a whole or, whenever the process is killed, not at all."""
    temporary = f'{path}.tmp'
    with open(temporary, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(osp.dirname(path), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def save_state(state: dict, work_dir: str) -> None:
    """Commit the state from rank 0; every rank returns when it is on disk."""
    if is_main_process():
        write_atomically(osp.join(work_dir, STATE_FILE), json.dumps(state, indent=1, ensure_ascii=False))
    barrier()


def read_state(path: str) -> dict:
    """Read ``al_state.json``.

    Raises:
        ValueError: It is damaged, or written by a newer version of this module.
    """
    try:
        with open(path, encoding='utf-8') as file:
            state = json.load(file)
        schema = state['schema']
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged ({error}); restore it from a copy, or start in another work_dir') from error
    if schema != SCHEMA:
        raise ValueError(f'{path} should have schema {SCHEMA}, but got {schema}: use the al_patch.py that wrote it')
    return state


def labelled(state: dict, until: Optional[int] = None) -> list[str]:
    """Names of the images that are labelled in round ``until`` (default: now), in the order they were asked for."""
    return [name for entry in state['rounds'][:None if until is None else until + 1] for name in entry['asked']]


def seed_of(*parts) -> int:
    """A seed for one named purpose, so that no draw depends on how many were made before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], 'big')


def generator(*parts) -> torch.Generator:
    """A CPU generator seeded for one named purpose."""
    return torch.Generator().manual_seed(seed_of(*parts))


def initial_names(initial, pool: Pool, seed: int) -> list[str]:
    """The images that are labelled before the first round.

    Raises:
        ValueError: More than there are, or names that are not in the data set.
    """
    if not isinstance(initial, (str, list)):
        n = count(initial, len(pool))
        if n > len(pool):
            raise ValueError(f'`al.initial` should be at most the {len(pool)} images there are, but got {initial!r}')
        chosen = torch.randperm(len(pool), generator=generator(seed, 'initial'))[:n]
        return [pool.names[i] for i in sorted(chosen.tolist())]
    if isinstance(initial, str) and not osp.isfile(initial):
        raise ValueError(f'`al.initial` should name a split file, but there is no file {initial!r}')
    names = initial if isinstance(initial, list) else mmengine.list_from_file(initial)
    names = list(dict.fromkeys(filter(None, (name.strip() for name in names))))
    strangers = [name for name in names if name not in pool.where]
    if strangers or not names:
        near = difflib.get_close_matches(strangers[0] if strangers else '', pool.names, 1) or pool.names[:1]
        raise ValueError(f'`al.initial` should hold names of training images such as {near[0]!r}, but {len(strangers)} '
                         f'of {len(names)} are not in the data set: {", ".join(strangers[:5])}')
    return sorted(names, key=pool.names.index)


def config_digest(cfg: dict) -> dict:
    """A short digest for each top-level config key that shapes training, to tell what changed between two starts."""
    volatile = {'al', 'work_dir', 'resume', 'launcher', 'log_level', 'visualizer', 'vis_backends', 'env_cfg',
                'experiment_name', 'model_wrapper_cfg', 'custom_imports', 'log_processor'}
    return {key: hashlib.sha256(repr(value).encode()).hexdigest()[:12]
            for key, value in sorted(Config.to_dict(cfg).items()) if key not in volatile}


def start_state(runner: Runner, al: dict, pool: Pool) -> dict:
    """A fresh state or, with ``--resume``, the one on disk; refused where going on would lose or mix labels.

    Raises:
        FileExistsError: A state is there, but ``--resume`` is not.
        ValueError: A setting has changed since the run began, or labelled images have left the data set.
    """
    path = osp.join(runner.work_dir, STATE_FILE)
    found = [osp.isfile(path)]
    broadcast_object_list(found)  # rank 0's view: it may write before another rank looks
    if not found[0]:
        seed = next(s for s in (al.seed, runner.cfg.get('randomness', {}).get('seed'), runner.seed) if s is not None)
        names = initial_names(al.initial, pool, seed)
        for n in budgets(al, len(pool)):
            if n > len(pool) - len(names):
                raise ValueError(f'`al.budget` should be at most the {len(pool) - len(names)} images that are not in '
                                 f'`al.initial`, but got {n} ({al.budget!r})')
        state = dict(schema=SCHEMA, phase='train', round=0, seed=seed, settings=al.to_dict(),
                     config=config_digest(runner.cfg), images=len(pool), rounds=[dict(asked=names)])
        if is_main_process():  # checkpoints of an older run: nothing of it may leak into this one
            for stale in glob.glob(osp.join(glob.escape(runner.work_dir), 'round_*', 'last_checkpoint')):
                os.remove(stale)
        save_state(state, runner.work_dir)
        return state
    if not runner.cfg.get('resume'):
        raise FileExistsError(f'{path} holds an active learning run already: add --resume to go on with it, or choose '
                              'another --work-dir')
    state = read_state(path)
    check_resume(state, al, pool)
    changed = [key for key, digest in config_digest(runner.cfg).items() if state['config'].get(key) != digest]
    if changed:
        runner.logger.warning(f'The config has changed since the run began: {", ".join(changed)}')
    state['settings'] = al.to_dict()
    return state


def check_resume(state: dict, al: dict, pool: Pool) -> None:
    """Refuse to go on with settings under which the rounds so far would have been others."""
    for key, value in state['settings'].items():
        if key not in MAY_CHANGE_ON_RESUME and al.get(key) != value:
            raise ValueError(f'`al.{key}` was {value!r} when the run began and cannot change on resume, but got '
                             f'{al.get(key)!r}')
    past = len(state['rounds']) - 1
    before, now = (budgets(settings, state['images'])[:past] for settings in (state['settings'], al))
    if before != now:
        raise ValueError(f'`al.rounds` and `al.budget` should leave the {past} queries that were made as they were '
                         f'({before} images), but got {now}')
    gone = [name for name in labelled(state) if name not in pool.where]
    if gone:
        raise ValueError(f'{len(gone)} labelled images are not in the data set any more: {", ".join(gone[:5])}')


# ---------------------------------------------------------------------------------------------------------------------
# The labelled training set: what `build_dataloader` and `full_init` do under the key `labelled`
# ---------------------------------------------------------------------------------------------------------------------

_LABELLED: ContextVar[Optional[frozenset]] = ContextVar('labelled', default=None)


def build_labelled_dataloader(build: Callable, dataloader: dict, *args, **kwargs):
    """Build a dataloader whose data sets keep only what is labelled.

    Args:
        build: Stock ``Runner.build_dataloader``.
        dataloader: A dataloader's config with ``labelled=dict(state=path of al_state.json, round=k)``.
    """
    dataloader = copy.copy(dataloader)
    where = dataloader.pop('labelled')
    names = labelled(read_state(where['state']), where['round'])
    token = _LABELLED.set(frozenset(names))
    try:
        loader = build(dataloader, *args, **kwargs)
    finally:
        _LABELLED.reset(token)
    check_filtered(loader.dataset)
    return loader


def keep_labelled(dataset: BaseDataset, names: frozenset) -> None:
    """Filter a leaf data set as soon as it knows its images, before any wrapper counts them or reads a label."""
    indices = range(len(dataset))
    dataset.get_subset_([i for i in indices if image_name(dataset, dataset.get_data_info(i)) in names])
    dataset.is_labelled = True


def check_filtered(dataset) -> None:
    """Refuse a data set with a leaf whose own ``full_init`` went past the filter: it would train on every label."""
    inner = getattr(dataset, 'datasets', None) or ([dataset.dataset] if hasattr(dataset, 'dataset') else [])
    for child in inner:
        check_filtered(child)
    if not inner and not getattr(dataset, 'is_labelled', False):
        raise ValueError(f'{type(dataset).__name__}.full_init should call mmengine\'s BaseDataset.full_init, where '
                         'only the labelled images are kept, but does not')


# ---------------------------------------------------------------------------------------------------------------------
# Training: one ordinary runner a round
# ---------------------------------------------------------------------------------------------------------------------


class RoundHook(Hook):
    """Keeps a round's last validation metrics, and makes its random draws a function of the iteration, so that a
    resumed round trains as an uninterrupted one."""
    priority = 'VERY_LOW'

    def __init__(self, seed: int):
        self.seed, self.metrics, self.validated_at = seed, {}, -1

    def before_train_epoch(self, runner: Runner) -> None:
        seed = seed_of(self.seed, runner.rank, 'epoch', runner.epoch)
        python_random.seed(seed)
        np.random.seed(seed % 2**32)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        torch.manual_seed(seed_of(self.seed, runner.rank, 'iter', runner.iter))

    def after_val_epoch(self, runner: Runner, metrics: Optional[dict] = None) -> None:
        self.metrics = {key: round(float(value), 4) for key, value in (metrics or {}).items() if np.isscalar(value)}
        self.validated_at = runner.iter


def round_dir(work_dir: str, k: int) -> str:
    return osp.join(work_dir, f'round_{k}')


def resumable_checkpoint(directory: str) -> Optional[str]:
    """The checkpoint that mmengine would resume from, if it is there and was written to its end."""
    path = find_latest_checkpoint(directory) if osp.isdir(directory) else None
    return path if path and osp.isfile(path) and zipfile.is_zipfile(path) else None


def round_config(runner: Runner, state: dict, resumed: bool) -> Config:
    """The config of the state's round: the run's own, less the ``al`` block, on the labelled images, with the round's
    overrides, work_dir and weights. It is dumped to that work_dir like any other."""
    al, k = ConfigDict(state['settings']), state['round']
    cfg = copy.deepcopy(runner.cfg)
    cfg.pop('al')
    cfg.merge_from_dict((al.overrides or {}).get(str(k), {}))
    cfg.work_dir = round_dir(runner.work_dir, k)
    cfg.experiment_name = f'{runner.experiment_name}_round_{k}'
    if isinstance(cfg.get('visualizer'), dict):
        cfg.visualizer.name = cfg.experiment_name  # visualizers are singletons by name: each round gets its own
    seed = cfg.get('randomness', {}).get('seed')
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': state['seed'] if seed is None else seed}
    cfg.train_dataloader.labelled = dict(state=osp.join(runner.work_dir, STATE_FILE), round=k)
    if k > 0 and al.weights != 'scratch':
        cfg.load_from = checkpoint_path(runner, state['rounds'][k - 1], al.weights)
    halfway = resumable_checkpoint(cfg.work_dir) if resumed and state['phase'] == 'train' else None
    cfg.resume = halfway is not None
    cfg.load_from = halfway or cfg.get('load_from')
    return cfg


def checkpoint_path(runner: Runner, entry: dict, which: str) -> str:
    """A round's ``last`` or ``best`` checkpoint."""
    path = osp.join(runner.work_dir, entry['checkpoints'][which])
    if not osp.isfile(path):
        raise FileNotFoundError(f'the checkpoint {path} that the run needs to go on is gone: put it back, or start in '
                                'another work_dir')
    return path


def build_round(runner: Runner, state: dict, resumed: bool) -> Runner:
    """A fresh runner for the state's round, of the caller's class; the caller's own takes over its model."""
    cfg = round_config(runner, state, resumed)
    trainer = type(runner).from_cfg(cfg)
    trainer.register_hook(RoundHook(seed_of(state['seed'], 'train', state['round'])))
    runner.model = trainer.model
    return trainer


def train_round(runner: Runner, trainer: Runner, state: dict) -> None:
    """Run the round's training, and note its metrics and checkpoints in the state."""
    begin = time.time()
    trainer.train()
    hook = next(hook for hook in trainer.hooks if isinstance(hook, RoundHook))
    if trainer.val_loop is not None and hook.validated_at != trainer.iter:  # e.g. resumed after the last iteration
        trainer.val_loop.run()
    checkpoints = dict(last=find_latest_checkpoint(trainer.work_dir))
    for checkpoint_hook in (h for h in trainer.hooks if isinstance(h, CheckpointHook)):
        best = getattr(checkpoint_hook, 'best_ckpt_path', None)
        checkpoints['best'] = best or next(iter(getattr(checkpoint_hook, 'best_ckpt_path_dict', {}).values()), None)
    broadcast = [checkpoints]
    broadcast_object_list(broadcast)  # only rank 0 saves, so only it knows
    state['rounds'][state['round']].update(
        images=len(labelled(state)), metrics=hook.metrics, train_seconds=round(time.time() - begin, 1),
        checkpoints={key: osp.relpath(path, runner.work_dir) for key, path in broadcast[0].items() if path})
    state['phase'] = 'query'
    save_state(state, runner.work_dir)


def close_round(trainer: Runner) -> None:
    """Drop what mmengine keeps for every runner by name, so that memory does not grow with rounds."""
    for handler in trainer.logger.handlers:
        handler.close()
    trainer.visualizer.close()
    for owner in (MMLogger, MessageHub, DefaultScope, Visualizer, type(trainer.visualizer)):
        owner._instance_dict.pop(trainer.experiment_name, None)
        owner._instance_dict.pop(trainer.visualizer.instance_name, None)


# ---------------------------------------------------------------------------------------------------------------------
# Query: score the pool with the round's model, and choose
# ---------------------------------------------------------------------------------------------------------------------


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, 'module', model)


@contextlib.contextmanager
def native_resolution(model: torch.nn.Module):
    """Let the decode head return logits at its own resolution, where all it does after is to enlarge them."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    head = getattr(model, 'decode_head', None)
    head = head[-1] if isinstance(head, torch.nn.ModuleList) else head
    only_resizes = getattr(type(head), 'predict_by_feat', None) is BaseDecodeHead.predict_by_feat
    if not only_resizes or model.test_cfg.get('mode', 'whole') != 'whole':
        yield
        return
    head.predict_by_feat = lambda seg_logits, batch_img_metas: seg_logits
    try:
        yield
    finally:
        del head.predict_by_feat


def predict_probs(model: torch.nn.Module, data: dict) -> list[torch.Tensor]:
    """Class probabilities of a batch, one (C, h, w) tensor an image, without padding, at the resolution of the logits
    (of the network's input where the head or slide inference enlarges them itself)."""
    data = model.data_preprocessor(data, False)
    samples = data['data_samples']
    metas = [sample.metainfo for sample in samples]
    with native_resolution(model):
        logits_NCHW = model.inference(data['inputs'], metas).float()
    if logits_NCHW.shape[1] == 1:  # a binary head with one sigmoid output
        probs_NCHW = torch.cat([1 - logits_NCHW.sigmoid(), logits_NCHW.sigmoid()], 1)
    else:
        probs_NCHW = logits_NCHW.softmax(1)
    h, w = probs_NCHW.shape[2:]
    in_h, in_w = data['inputs'].shape[2:]
    probs = []
    for probs_CHW, meta in zip(probs_NCHW, metas):
        left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
        probs.append(probs_CHW[:, round(top * h / in_h):max(1, h - round(bottom * h / in_h)),
                               round(left * w / in_w):max(1, w - round(right * w / in_w))])
    return probs


def query_dataloader(cfg: dict, pool: Pool, names: list[str]):
    """This rank's share of the images: whole batches, dealt in turn, so that a batch holds the same images, and an
    image gets the same score, for any number of processes; no image is scored twice.

    Returns:
        The dataloader, and for each of its batches the positions in ``names``.
    """
    rank, world_size = get_dist_info()
    loader = dict(next(cfg[key] for key in ('test_dataloader', 'val_dataloader') if cfg.get(key)))
    size = loader.pop('batch_size', 1)
    batches = [list(range(i, min(i + size, len(names)))) for i in range(0, len(names), size)][rank::world_size]
    loader.update(dataset=pool.subset(names), sampler=None, batch_sampler=batches)
    for key in ('drop_last', 'num_batch_per_epoch'):
        loader.pop(key, None)
    return Runner.build_dataloader(loader, seed=0), batches


class QueryProgress:
    """Log lines for the query pass in the form of mmengine's."""

    def __init__(self, runner: Runner, total: int):
        self.logger, self.total, self.begin = runner.logger, total, time.time()
        self.interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 50)

    def step(self, done: int) -> None:
        if done % self.interval == 0 or done == self.total:
            each = (time.time() - self.begin) / done
            eta = time.strftime('%H:%M:%S', time.gmtime(each * (self.total - done)))
            self.logger.info(f'Iter(query) [{done:{len(str(self.total))}d}/{self.total}]  eta: {eta}  time: {each:.4f}')


@torch.no_grad()
def score_images(trainer: Runner, strategy: 'Strategy', pool: Pool, names: list[str], logger_of: Runner) -> torch.Tensor:
    """Score every image with the model in ``trainer``.

    Returns:
        (N,) float64 on the CPU, in the order of ``names``, the same on every rank.

    Raises:
        ValueError: An image's score is not a finite number; it names the image.
    """
    model = unwrap(trainer.model).eval()
    loader, batches = query_dataloader(trainer.cfg, pool, names)
    progress, mine = QueryProgress(logger_of, len(batches)), []
    amp = (trainer.cfg.optim_wrapper.get('type') == 'AmpOptimWrapper')
    for done, (data, positions) in enumerate(zip(loader, batches), 1):
        with autocast(enabled=amp):
            probs = predict_probs(model, data)
        for position, probs_CHW in zip(positions, probs):
            score = float(strategy.reduce(strategy.score(probs_CHW[None])[0]))
            if not math.isfinite(score):
                raise ValueError(f'the score of image {names[position]!r} is {score}: the model gives no finite logits')
            mine.append((position, score))
        progress.step(done)
    scores_N = torch.zeros(len(names), dtype=torch.float64)
    for position, score in (item for share in all_gather_object(mine) for item in share):
        scores_N[position] = score
    return scores_N


def query(runner: Runner, trainer: Runner, state: dict, pool: Pool) -> list[str]:
    """Choose the images to label next. A function of checkpoint, pool, labelled set, settings and seed."""
    al, k = ConfigDict(state['settings']), state['round']
    have = set(labelled(state))
    names = [name for name in pool.names if name not in have]
    budget = min(budgets(al, state['images'])[k], len(names))
    if al.pool_size is not None:
        size = max(budget, count(al.pool_size, len(pool)))
        names = [names[i] for i in sorted(torch.randperm(len(names), generator=generator(
            state['seed'], 'pool_size', k))[:size].tolist())]
    strategy = resolve_strategy(al.strategy)
    if strategy.score is random:
        scores_N = random(len(names), generator(state['seed'], 'random', k))
    else:
        load_checkpoint(unwrap(trainer.model), checkpoint_path(runner, state['rounds'][k], al.query_with),
                        map_location='cpu', logger=runner.logger)
        scores_N = score_images(trainer, strategy, pool, names, runner)
    chosen_K = strategy.select(scores_N, budget, generator(state['seed'], 'select', k))
    picks = [sorted(chosen_K.tolist())]
    broadcast_object_list(picks)  # rank 0 decides
    if len(set(picks[0])) != budget or len(picks[0]) != budget:
        raise ValueError(f'`al.strategy.select` should choose {budget} different candidates, but got {picks[0]}')
    low, high = scores_N[picks[0]].aminmax()
    runner.logger.info(
        f'Round {k}: {strategy.name} asks for {len(picks[0])} of {len(names)} images, scores {low:.4g} to {high:.4g} '
        f'(pool {scores_N.min():.4g} to {scores_N.max():.4g}); labelled: {len(have) + len(picks[0])} of {len(pool)}')
    return [names[i] for i in picks[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Strategies: score (probabilities -> map, higher = ask) x reduce (map -> image) x select (scores -> choice)
# ---------------------------------------------------------------------------------------------------------------------


def random(n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform scores, one a candidate: no model is asked. (N,)"""
    return torch.rand(n, generator=generator, dtype=torch.float64)


def least_confidence(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """1 - p1, the probability of the most probable class (Lewis & Gale, 1994). (N, H, W) in [0, 1 - 1/C]"""
    return 1 - probs_NCHW.amax(1)


def margin(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """1 - (p1 - p2): one less the margin between the two most probable classes (Scheffer et al., 2001), so that the
    smallest margin scores highest. (N, H, W) in [0, 1]"""
    top2 = probs_NCHW.topk(2, dim=1).values
    return 1 - (top2[:, 0] - top2[:, 1])


def entropy(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """-sum p ln p over the classes, in nats (Shannon, 1948). (N, H, W) in [0, ln C]"""
    return torch.special.entr(probs_NCHW).sum(1)


def reduce_map(scores_HW: torch.Tensor, how: Union[str, float] = 'mean') -> torch.Tensor:
    """One number for a score map: its ``mean``, its ``max``, or the mean of its highest ``how`` percent of pixels."""
    if how == 'mean':
        return scores_HW.mean(dtype=torch.float64)
    if how == 'max':
        return scores_HW.max()
    k = max(1, round(scores_HW.numel() * how / 100))
    return scores_HW.flatten().topk(k).values.mean(dtype=torch.float64)


def topk(scores_N: torch.Tensor, budget: int, generator: torch.Generator) -> torch.Tensor:
    """The ``budget`` highest scores; ties go to the first in pool order. (K,) indices"""
    return scores_N.sort(descending=True, stable=True).indices[:budget]


SCORES = dict(random=random, least_confidence=least_confidence, margin=margin, entropy=entropy)
SELECTS = dict(topk=topk)
PRESETS = dict(
    random=dict(score='random', select='topk'),
    least_confidence=dict(score='least_confidence', select='topk'),
    margin=dict(score='margin', select='topk'),
    entropy=dict(score='entropy', select='topk'))


class Strategy(NamedTuple):
    """A strategy resolved to functions."""
    name: str
    score: Callable  # probs_NCHW -> scores_NHW, or `random`
    reduce: Callable  # scores_HW -> number
    select: Callable  # scores_N, budget, generator -> indices_K


def import_function(path: str, key: str) -> Callable:
    """The function that ``'package.module:function'`` names."""
    module, _, name = path.partition(':')
    try:
        function = getattr(importlib.import_module(module), name)
        if callable(function):
            inspect.signature(function)  # its options are read from there; some builtins have none
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'`{key}` should be importable, but got {path!r}: {error}') from error
    if not callable(function):
        raise ValueError(f'`{key}` should name a function, but {path!r} is a {type(function).__name__}')
    return function


def _lookup(table: dict, name, key: str) -> Callable:
    if isinstance(name, str) and ':' in name:
        return import_function(name, key)
    if not isinstance(name, str) or name not in table:
        raise ValueError(f'`{key}` should be one of {", ".join(table)}, or \'package.module:function\', but got {name!r}')
    return table[name]


def resolve_strategy(strategy: Union[str, dict]) -> Strategy:
    """A strategy's settings as functions.

    Args:
        strategy: A preset's name, a score of the user's own as ``'package.module:function'``, or a dict with ``type``
            (one of these) and options: ``score`` and ``select`` replace the preset's, ``reduce`` is ``'mean'``,
            ``'max'`` or a percentage; any other is handed to the function that has a parameter of that name.

    Raises:
        ValueError: An unknown name, listing those there are, or an unknown option.
    """
    options = dict(strategy) if isinstance(strategy, dict) else dict(type=strategy)
    name = options.pop('type')
    preset = dict(score=name, select='topk') if ':' in name else _lookup(PRESETS, name, 'al.strategy')
    parts = {**preset, **{key: options.pop(key) for key in ('score', 'select') if key in options}}
    score = _lookup(SCORES, parts['score'], 'al.strategy.score')
    select = _lookup(SELECTS, parts['select'], 'al.strategy.select')
    how = options.pop('reduce', 'mean')
    if how not in ('mean', 'max') and not (type(how) in (int, float) and 0 < how <= 100):
        raise ValueError(f"`al.strategy.reduce` should be 'mean', 'max' or a percentage in (0, 100], but got {how!r}")
    taken, known = {}, ['score', 'select', 'reduce']
    for function in (score, select):
        own = [p.name for p in list(inspect.signature(function).parameters.values())[1:]
               if p.name not in ('budget', 'generator')]
        known += own
        taken[function] = {key: options.pop(key) for key in own if key in options}
    if options:
        raise ValueError(f'`al.strategy` {name!r} has no option {", ".join(options)}; it takes {", ".join(known)}')
    score, select = (functools.partial(f, **taken[f]) if taken[f] else f for f in (score, select))
    return Strategy(name, score, functools.partial(reduce_map, how=how), select)


# ---------------------------------------------------------------------------------------------------------------------
# The rounds
# ---------------------------------------------------------------------------------------------------------------------


def run_rounds(runner: Runner) -> torch.nn.Module:
    """Active learning: train, query, label, once per round, until the rounds, the pool or a stopping rule end it.

    Args:
        runner: The caller's runner, whose config has an ``al`` block. It holds the last round's model afterwards.

    Returns:
        The last round's model.
    """
    al = parse_settings(runner.cfg.al)
    check_runner(al, runner)
    pool = Pool(runner.cfg)
    state = start_state(runner, al, pool)
    resumed = bool(runner.cfg.get('resume'))
    with torch.serialization.safe_globals(checkpoint_globals()):
        while True:
            log_round(runner, state)
            trainer = build_round(runner, state, resumed)
            if state['phase'] == 'train':
                train_round(runner, trainer, state)
                log_metrics(runner, state)
            reason = why_stop(state, len(pool))
            if reason:
                break
            begin = time.time()
            asked = query(runner, trainer, state, pool)
            state['rounds'][-1]['query_seconds'] = round(time.time() - begin, 1)
            state['rounds'].append(dict(asked=asked))
            state.update(round=state['round'] + 1, phase='train')
            save_state(state, runner.work_dir)
            close_round(trainer)
            del trainer
            gc.collect()
            resumed = False
        if resumed:
            load_checkpoint(unwrap(trainer.model), checkpoint_path(runner, state['rounds'][-1], 'last'),
                            map_location='cpu', logger=runner.logger)
    close_round(trainer)
    runner.logger.info(f'Active learning has ended: {reason}\n{rounds_table(state)}')
    runner._has_loaded = True  # `runner.test()` goes on with this model, not with `load_from`
    return runner.model


def why_stop(state: dict, total: int) -> Optional[str]:
    """The reason to end after the state's round, or None.

    Raises:
        ValueError: ``al.stop`` asks for a metric that validation does not report.
    """
    al, k = ConfigDict(state['settings']), state['round']
    if al.stop:
        metric = al.stop.get('metric', 'mIoU')
        history = [entry['metrics'].get(metric) for entry in state['rounds']]
        if None in history:
            raise ValueError(f'`al.stop.metric` should be one of {", ".join(state["rounds"][-1]["metrics"])}, but got '
                             f'{metric!r}')
        if history[-1] >= al.stop.get('value', math.inf):
            return f'{metric} {history[-1]:.2f} has reached al.stop.value = {al.stop.value}'
        since = len(history) - 1 - history.index(max(history))
        if since >= al.stop.get('patience', math.inf):
            return f'{metric} has not risen above {max(history):.2f} for al.stop.patience = {al.stop.patience} rounds'
    if k >= al.rounds:
        return f'all {al.rounds} rounds of queries are done'
    if len(labelled(state)) >= total:
        return f'the pool is empty after {k} rounds: all {total} images are labelled'
    return None


def log_round(runner: Runner, state: dict) -> None:
    """One line on where the run stands."""
    n, k = len(labelled(state)), state['round']
    runner.logger.info(f'Round {k} of {state["settings"]["rounds"]} ({state["phase"]}): {n} of {state["images"]} images '
                       f'labelled ({n / state["images"]:.1%}), seed {state["seed"]}, {round_dir(runner.work_dir, k)}')


def log_metrics(runner: Runner, state: dict) -> None:
    """The round's figures as scalars of the run's visualizer, over the number of labelled images."""
    entry = state['rounds'][-1]
    scalars = {f'al/{key}': value for key, value in entry['metrics'].items()}
    scalars.update({'al/round': state['round'], 'al/labelled_share': entry['images'] / state['images'],
                    'al/train_seconds': entry['train_seconds']})
    runner.visualizer.add_scalars(scalars, step=entry['images'])


def rounds_table(state: dict) -> str:
    """The run so far, one row a round."""
    metrics = list(dict.fromkeys(key for entry in state['rounds'] for key in entry.get('metrics', {})))
    table = PrettyTable(['round', 'images', '% of pool', *metrics, 'train s', 'query s'])
    for k, entry in enumerate(state['rounds']):
        values = [entry.get('metrics', {}).get(key) for key in metrics]
        table.add_row([k, entry['images'], f'{100 * entry["images"] / state["images"]:.1f}',
                       *('-' if value is None else f'{value:.2f}' for value in values),
                       entry['train_seconds'], entry.get('query_seconds', '-')])
    table.align = 'r'
    return table.get_string()


# ---------------------------------------------------------------------------------------------------------------------
# What the stack needs: checkpoints under torch >= 2.6, and mmcv without compiled ops
# ---------------------------------------------------------------------------------------------------------------------


def init_cpu_processes(cfg: Config) -> None:
    """Make ``--launcher`` work without a GPU, where mmengine asks for one: gloo, CPU gradients, and BN for SyncBN.

    Args:
        cfg: The config of the runner to be built; it is changed.
    """
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                                 find_unused_parameters=cfg.get('find_unused_parameters', False))

    def replace_sync_bn(node):
        if isinstance(node, dict):
            if node.get('type') == 'SyncBN':
                node['type'] = 'BN'
            node = list(node.values())
        for child in node if isinstance(node, (list, tuple)) else ():
            replace_sync_bn(child)

    replace_sync_bn(cfg.model)


def _getattr_of_history_buffer(owner, name: str):
    """Stands in for ``getattr`` while a checkpoint is read: mmengine pickles ``HistoryBuffer.mean`` and its like."""
    if owner is HistoryBuffer and name in ('mean', 'max', 'min', 'current'):
        return getattr(HistoryBuffer, name)
    raise ValueError(f'a checkpoint may only refer to the statistics of HistoryBuffer, but this one asks for {name!r} of '
                     f'{owner!r}')


def checkpoint_globals() -> list:
    """What mmengine's own checkpoints hold beside tensors. torch >= 2.6 refuses all that is not named here."""
    multiarray = importlib.import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    dtypes = [type(np.dtype(code)) for code in '?bBhHiIlLqQefd']
    return [HistoryBuffer, np.ndarray, np.dtype, *dict.fromkeys(dtypes), multiarray.scalar, multiarray._reconstruct,
            (_getattr_of_history_buffer, 'builtins.getattr')]


def load_ext_lazily(name: str, functions: list[str]):
    """In place of mmcv's ``load_ext`` where ``mmcv._ext`` is missing: an op fails when it is called, by name."""

    def missing(function: str) -> Callable:
        def op(*args, **kwargs):
            raise RuntimeError(f'this model calls the compiled op `{function}`, which mmcv-lite does not have: install '
                               'the full mmcv (pip uninstall mmcv-lite; pip install "mmcv>=2.0.0rc4,<2.2.0")')
        return op

    return types.SimpleNamespace(**{function: missing(function) for function in functions})


# ---------------------------------------------------------------------------------------------------------------------
# The patch
# ---------------------------------------------------------------------------------------------------------------------


def _wrap_train(train: Callable) -> Callable:

    @functools.wraps(train)
    def wrapper(self, *args, **kwargs):
        return train(self, *args, **kwargs) if self.cfg.get('al') is None else run_rounds(self)

    return wrapper


def _wrap_build_dataloader(build_dataloader: staticmethod) -> staticmethod:
    build = build_dataloader.__func__

    @functools.wraps(build)
    def wrapper(dataloader, *args, **kwargs):
        if isinstance(dataloader, dict) and 'labelled' in dataloader:
            return build_labelled_dataloader(build, dataloader, *args, **kwargs)
        return build(dataloader, *args, **kwargs)

    return staticmethod(wrapper)


def _wrap_full_init(full_init: Callable) -> Callable:

    @functools.wraps(full_init)
    def wrapper(self):
        is_new = not self._fully_initialized
        full_init(self)
        if is_new and _LABELLED.get() is not None:
            keep_labelled(self, _LABELLED.get())

    return wrapper


def _wrap_load_ext(load_ext: Callable) -> Callable:
    return load_ext if importlib.util.find_spec('mmcv._ext') else functools.wraps(load_ext)(load_ext_lazily)


# (owner, name): how to wrap it
_PATCHES = {
    (Runner, 'train'): _wrap_train,
    (Runner, 'build_dataloader'): _wrap_build_dataloader,
    (BaseDataset, 'full_init'): _wrap_full_init,
    (mmcv.utils.ext_loader, 'load_ext'): _wrap_load_ext,
}
_ORIGINALS = {}  # (owner, name): the raw attribute, as `vars(owner)` had it


def is_patched() -> bool:
    """Whether the patch is in place."""
    return bool(_ORIGINALS)


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


def remove_patch() -> None:
    """Undo the patch: every attribute is again the very object it was."""
    for (owner, name), original in reversed(_ORIGINALS.items()):
        setattr(owner, name, original)
    _ORIGINALS.clear()


apply_patch()
