"""Active learning for stock MMSegmentation: one module that patches mmengine when it is imported.

With ``import al_patch`` (or ``custom_imports = dict(imports=['al_patch'])`` in a config) and an ``al = dict(...)``
block in the config, ``runner.train()`` becomes active learning: it trains the whole schedule once per round on what is
labelled, scores the pool, chooses what to label next, writes that down, and goes on. Without an ``al`` block everything
is stock.

What is patched, and nothing else (see ``_PATCHES`` at the end; ``remove_patch()`` undoes it):

- ``mmengine.runner.Runner.train``: runs the rounds, if the runner's config has an ``al`` block.
- ``mmengine.runner.Runner.build_dataloader``: understands a key ``labelled`` in a dataloader's config.
- ``mmengine.dataset.BaseDataset.full_init``: under that key, keeps only the labelled images.
- ``mmcv.utils.ext_loader.load_ext``: only where mmcv has no compiled ops (mmcv-lite), so that a missing op fails when
  it is called, by name, and not when mmseg is imported.

The file reads in the order of one image's journey: settings, pool and state, labelled training set, training, query,
strategies, the human who labels, the rounds themselves and what guards them, reports and pictures, and the patch.

``python al_patch.py report DIR [DIR ...]`` compares runs, and ``python al_patch.py status DIR`` says where one stands.
"""
import argparse
import collections
import contextlib
import copy
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
import random as python_random
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import types
import warnings
import zipfile
from contextvars import ContextVar
from typing import Callable, Iterator, NamedTuple, Optional, Union
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2
import mmcv.utils.ext_loader
import mmengine.runner.checkpoint
import numpy as np
import scipy.cluster.vq
import scipy.ndimage
import scipy.sparse
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb as colour_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, Compose, InfiniteSampler, pseudo_collate
from mmengine.dist import all_gather_object, barrier, broadcast, broadcast_object_list, get_dist_info, is_main_process
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook, LoggerHook
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import DATASETS, OPTIM_WRAPPERS, DefaultScope
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, find_latest_checkpoint, load_checkpoint
from mmengine.runner.amp import autocast
from mmengine.visualization import Visualizer
from PIL import Image
from prettytable import PrettyTable
from rich.progress import MofNCompleteColumn, Progress
from torch.utils.data import ConcatDataset, Subset

__version__ = '0.1.0'

# ---------------------------------------------------------------------------------------------------------------------
# Settings: the `al` block
# ---------------------------------------------------------------------------------------------------------------------

DEFAULTS = dict(
    unit='image',         # what is asked for: image | region | superpixel | pixel, or dict(type=a unit, **options)
    strategy='entropy',   # a name, dict(type=a name, **options), or 'package.module:function' of your own
    initial=0.05,         # labelled at the start: as budget, at random | whole images: list of names or split file
    budget=0.05,          # asked for per round: int (units) | fraction (of images or pixels) | list, one entry a round
    per_image=False,      # spend the budget in every image by itself, not over the whole pool
    rounds=5,             # queries; training runs rounds + 1 times (a budget list sets it, too)
    weights='scratch',    # what a round starts from: scratch (= the config's own init or load_from) | last | best
    query_with='last',    # checkpoint that scores the pool: last | best
    pool_size=None,       # score only a random subset of the pool: int | fraction of the images
    full_res=None,        # score the enlarged logits, not the native ones; default: for pixels and windows only
    oracle='simulated',   # simulated: labels are on disk, hidden until asked for | human: stop and wait for them
    overrides=None,       # config overrides for single rounds, e.g. {2: {'train_cfg.max_iters': 4000}}
    stop=None,            # stop early: dict(metric='mIoU', value=75) and / or dict(metric='mIoU', patience=2)
    visualize=0,          # images to draw after each query: those asked for first, and as many that stay the same
    seed=None)            # of every random choice; defaults to randomness.seed

UNIT_OPTIONS = dict(
    image=dict(),                                    # whole images
    region=dict(size=[32, 32], window=None),         # cells (h, w) of a grid; or (2 window + 1)^2 pixels anywhere
    superpixel=dict(n_segments=1024, compactness=10.),  # SLIC segments
    pixel=dict(radius=0))                            # single pixels, of which no two lie within radius of each other

MAY_CHANGE_ON_RESUME = ('rounds', 'budget', 'stop', 'visualize')  # they extend a run, or only look at it


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
    unit=(lambda v: isinstance(v, str) or isinstance(v, dict) and isinstance(v.get('type'), str),
          f"{', '.join(map(repr, UNIT_OPTIONS))}, or dict(type=one of these, **options)"),
    strategy=(lambda v: isinstance(v, str) or isinstance(v, dict) and isinstance(v.get('type'), str),
              "a strategy's name, dict(type=name, **options) or 'package.module:function'"),
    initial=(lambda v: _is_amount(v) or (isinstance(v, str) and v) or
             (isinstance(v, list) and v and all(isinstance(n, str) for n in v)),
             'a positive int, a fraction in (0, 1], a list of image names, or the path of a split file'),
    budget=(lambda v: _is_amount(v) or (isinstance(v, list) and v and all(map(_is_amount, v))),
            'a positive int, a fraction in (0, 1], or a list of these with one entry a round'),
    per_image=(lambda v: isinstance(v, bool), 'True or False'),
    full_res=(lambda v: v is None or isinstance(v, bool), 'None, True or False'),
    rounds=(lambda v: type(v) is int and v >= 0, 'an int >= 0'),
    weights=(lambda v: v in ('scratch', 'last', 'best'), "'scratch', 'last' or 'best'"),
    query_with=(lambda v: v in ('last', 'best'), "'last' or 'best'"),
    pool_size=(lambda v: v is None or _is_amount(v), 'None, a positive int, or a fraction in (0, 1]'),
    oracle=(lambda v: v in ('simulated', 'human'), "'simulated' or 'human'"),
    overrides=(lambda v: v is None or _is_overrides(v), 'None or a dict from a round to a dict of config keys, e.g. '
               "{2: {'train_cfg.max_iters': 4000}}"),
    stop=(lambda v: v is None or _is_stop(v), "None or a dict of 'metric' with 'value' and / or 'patience', e.g. "
          "dict(metric='mIoU', value=75)"),
    visualize=(lambda v: type(v) is int and v >= 0, 'an int >= 0'),
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
    al['unit'] = parse_unit(al['unit'])
    strategy = resolve_strategy(al['strategy'])
    if al['unit']['type'] not in ('image', 'pixel') and strategy.reduce.keywords['how'] not in ('mean', 'max'):
        raise ValueError("`al.strategy.reduce` should be 'mean' or 'max' below image level, but got "
                         f"{strategy.reduce.keywords['how']!r}")
    if al['unit']['type'] == 'pixel' and strategy.embed in (confusion, cooccurrence):
        raise ValueError(f"`al.unit` should be 'image', 'region' or 'superpixel' for the embedding "
                         f"{strategy.embed.__name__}, which is a pixel's softmax over again, but got 'pixel'")
    if al['per_image'] and al['unit']['type'] == 'image':
        raise ValueError('`al.per_image` should be False for whole images, but got True')
    return ConfigDict(al)


def parse_unit(unit) -> dict:
    """A unit's settings with its defaults filled in.

    Raises:
        ValueError: An unknown unit or option, or a value out of range.
    """
    given = dict(unit) if isinstance(unit, dict) else dict(type=unit)
    kind = given.pop('type')
    if kind not in UNIT_OPTIONS:
        raise ValueError(f'`al.unit` should be {_CHECKS["unit"][1]}, but got {kind!r}')
    strangers = [key for key in given if key not in UNIT_OPTIONS[kind]]
    if strangers:
        raise ValueError(f'`al.unit` {kind!r} has no option {", ".join(strangers)}; it takes '
                         f'{", ".join(UNIT_OPTIONS[kind]) or "none"}')
    unit = dict(type=kind, **{**UNIT_OPTIONS[kind], **given})
    is_natural = {key: type(value) is int and value > 0 for key, value in unit.items()}
    size = unit.get('size')
    for key, ok, should_be in (
            ('size', isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size),
             'a pair of ints (h, w)'),
            ('window', unit.get('window') is None or is_natural['window'], 'None or a positive int'),
            ('n_segments', is_natural.get('n_segments') and unit['n_segments'] < 2**16, 'an int in [1, 65535]'),
            ('compactness', isinstance(unit.get('compactness'), (int, float)), 'a number'),
            ('radius', unit.get('radius') == 0 or is_natural.get('radius'), 'an int >= 0')):
        if key in unit and not ok:
            raise ValueError(f'`al.unit.{key}` should be {should_be}, but got {unit[key]!r}')
    return unit


def _plain(value):
    """Config containers as plain ones; what JSON cannot hold is an error that says so."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)) or isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(f'`al` should hold only finite numbers, strings, lists and dicts, but got {value!r} '
                     f'({type(value).__name__})')


def count(amount, total: int) -> int:
    """An int as it is; a fraction of ``total``, rounded, but at least one."""
    return amount if isinstance(amount, int) else max(1, round(amount * total))


def budgets(al: dict) -> list:
    """What each round may ask for."""
    return al['budget'] if isinstance(al['budget'], list) else [al['budget']] * al['rounds']


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
    check_model(unwrap(runner.model), resolve_strategy(al['strategy']))
    if al['stop'] and cfg.get('val_cfg') is None:
        raise ValueError('`al.stop` needs a validation metric, but the config has no `val_cfg`')
    late = [k for k in (al['overrides'] or {}) if int(k) > al['rounds']]
    if late:
        raise ValueError(f'`al.overrides` should name rounds from 0 to {al["rounds"]}, but got {", ".join(late)}')
    for k, override in (al['overrides'] or {}).items():
        try:
            copy.deepcopy(cfg).merge_from_dict(override)
        except Exception as error:
            raise ValueError(f'`al.overrides[{k}]` should fit the config, but got {override} ({error})') from error


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
    return [step for step in pipeline if not loads_labels(step)]


def loads_labels(step: dict) -> bool:
    """Whether a transform of a pipeline's config loads labels: LoadAnnotations and its like."""
    return re.match(r'Load\w*Ann', str(step['type']).rsplit('.')[-1]) is not None


@contextlib.contextmanager
def reading(path: str, errors: type = Exception):
    """Let an error name the file that it is about.

    Raises:
        ValueError: It is, in one line, what went wrong inside.
    """
    try:
        yield
    except errors as error:
        why = f'{type(error).__name__}: {error}'
        if isinstance(error, pickle.UnpicklingError):  # torch's own text, of many lines, tells to drop the protection
            what = ', '.join(re.findall(r'GLOBAL ([\w.]+)', why)) or 'what no checkpoint has'
            why = f'beside weights and training state it holds {what}: reading that could run any code'
        raise ValueError(f'{path} cannot be used ({" ".join(why.split())})') from error


def no_classes(labels: np.ndarray, classes: Optional[int], ignore_index: int) -> Optional[str]:
    """What is wrong with labels, if some are neither one of so many classes (None: unknown) nor the one to ignore."""
    strange = np.setdiff1d(labels, [*range(classes or 0), ignore_index])
    return f'labels should be below {classes}, the number of classes, or {ignore_index} for none, but got ' \
        f'{", ".join(map(str, strange[:5]))}' if classes and len(strange) else None


class NamedSubset(Subset):
    """Some images of a leaf data set. One that cannot be read is an error that names it."""

    def __getitem__(self, i: int) -> dict:
        with reading(self.dataset.get_data_info(self.indices[i])['img_path']):
            return self.dataset[self.indices[i]]

    def __getitems__(self, indices: list) -> list:
        return [self[i] for i in indices]


class Pool:
    """Every image of the training set, labelled or not, in the data set's order, readable without its label.

    Args:
        cfg: The run's config.

    Raises:
        ValueError: There is no image, or two images have one name.
    """

    def __init__(self, cfg: dict):
        pipeline, self.leaves, self.where, paths = query_pipeline(cfg), [], {}, {}
        self.label_loaders = []
        for leaf_cfg in leaf_configs(cfg['train_dataloader']['dataset']):
            try:
                leaf = DATASETS.build({**leaf_cfg, 'pipeline': copy.deepcopy(pipeline)})
            except ValueError as error:  # mmengine's own for an empty one is 'need at least one array to concatenate'
                raise ValueError('the training set has no images or cannot be read: check `train_dataloader.dataset` '
                                 f'({error})') from error
            self.label_loaders.append([step for step in leaf_cfg.get('pipeline', ()) if loads_labels(step)])
            if not isinstance(leaf, BaseDataset):
                raise ValueError('active learning filters subclasses of mmengine.dataset.BaseDataset, but got a '
                                 f'{type(leaf).__name__}')
            leaf.full_init()
            leaf.test_mode = True  # an unreadable image is then an error, and not replaced by another one
            for index in range(len(leaf)):
                info = leaf.get_data_info(index)
                name, path = image_name(leaf, info), info['img_path']
                with reading(path):
                    name.encode()  # the state is UTF-8: a file's name that is not has no place there
                if paths.setdefault(name, path) != path:
                    raise ValueError(f'image names should be unique, but {paths[name]} and {path} are both {name!r}')
                self.where.setdefault(name, (len(self.leaves), index))
            self.leaves.append(leaf)
        self.names = list(self.where)
        if not self.names:
            raise ValueError('the training set has no images: check `train_dataloader.dataset`')

    def __len__(self) -> int:
        return len(self.names)

    def info(self, name: str) -> dict:
        """What the data set knows of an image: ``img_path``, ``seg_map_path`` and the rest."""
        leaf, index = self.where[name]
        return self.leaves[leaf].get_data_info(index)

    def load_image(self, name: str) -> np.ndarray:
        """An image as its pipeline loads it, (H, W[, C]), before any other transform."""
        leaf, index = self.where[name]
        info = self.leaves[leaf].get_data_info(index)
        with reading(info['img_path']):
            image = self.leaves[leaf].pipeline.transforms[0](info)['img']
            if image.ndim not in (2, 3):
                raise ValueError(f'the pipeline should load images (H, W[, C]), but got {image.shape}')
            return image

    def load_label(self, name: str) -> np.ndarray:
        """The label map of an image that was asked for, (H, W), as training loads it."""
        leaf, index = self.where[name]
        results = Compose(self.label_loaders[leaf])(self.leaves[leaf].get_data_info(index))
        if 'gt_seg_map' not in results:
            raise ValueError('the training pipeline should load a label map, `gt_seg_map`, but loads none')
        return results['gt_seg_map']

    @property
    def classes(self) -> list[str]:
        return list(self.leaves[0].metainfo['classes'])

    @property
    def palette(self) -> np.ndarray:
        """The classes' colours, RGB. (C, 3)"""
        return np.array(self.leaves[0].metainfo['palette'])

    def check_label(self, name: str, classes: Optional[int], mask_HW: Optional[np.ndarray] = None) -> np.ndarray:
        """The label map of an image that was asked for, or its values (N,) under the mask of what was.

        Raises:
            ValueError: Image or label map cannot be read, they differ in size, or a label is none of the classes.
        """
        leaf, index = self.where[name]
        path, shape = self.leaves[leaf].get_data_info(index).get('seg_map_path'), self.load_image(name).shape[:2]
        with reading(path or f'the label map of {name!r}'):
            label = self.load_label(name)
            if label.shape != shape:
                raise ValueError(f'its size should be that of its image, {shape}, but is {label.shape}')
            label = label if mask_HW is None else label[mask_HW]
            why = no_classes(label, classes, self.ignore_index(name))
            if why:
                raise ValueError(why)
        return label

    def ignore_index(self, name: str) -> int:
        return getattr(self.leaves[self.where[name][0]], 'ignore_index', 255)

    @functools.cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(H, W) of every image, from the files' headers where Pillow knows the format."""
        sizes = {}
        for name, (leaf, index) in self.where.items():
            try:
                with Image.open(self.leaves[leaf].get_data_info(index)['img_path']) as image:
                    sizes[name] = image.size[::-1]
            except (OSError, ValueError, Image.DecompressionBombError):  # not local, or only the pipeline reads it
                sizes[name] = self.load_image(name).shape[:2]
        return sizes

    def subset(self, names: list[str]) -> ConcatDataset:
        """The images of these names, which are in pool order, through the query pipeline."""
        chosen = [[] for _ in self.leaves]
        for name in names:
            leaf, index = self.where[name]
            chosen[leaf].append(index)
        # not leaf.get_subset: its copies share a memo by id() for as long as the process lives, and mix objects up
        return ConcatDataset([NamedSubset(leaf, indices) for leaf, indices in zip(self.leaves, chosen) if indices])


# ---------------------------------------------------------------------------------------------------------------------
# State: what was asked for and what came of it, in `work_dir/al_state.json`
# ---------------------------------------------------------------------------------------------------------------------

SCHEMA = 1
STATE_FILE = 'al_state.json'


def write_atomically(path: str, content: Union[str, bytes]) -> None:
    """Replace a file's content as a whole or, whenever the process is killed, not at all.

    Raises:
        OSError: There is no space left, or the like. What was there is left as it was.
    """
    content, temporary = content.encode() if isinstance(content, str) else content, f'{path}.tmp'
    try:
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
        if type(state.get('round', 0)) is not int:  # it names a directory
            raise ValueError(f'its round is {state["round"]!r}')
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged ({error}): restore a copy, or start in another work_dir') from error
    if schema != SCHEMA:
        raise ValueError(f'{path} should have schema {SCHEMA}, but got {schema}: use the al_patch.py that wrote it')
    return state


def labelled(state: dict, until: Optional[int] = None) -> dict[str, Optional[int]]:
    """What is labelled in round ``until`` (default: now): image name -> None for a whole image, else the round whose
    mask file holds all that is labelled of it. In the order in which the images were first asked for."""
    have = {}
    for k, entry in enumerate(state['rounds'][:None if until is None else until + 1]):
        whole = isinstance(entry['asked'], list)
        have.update({name: None if whole else k for name in entry['asked']})
    return have


def png_path(folder: str, name: str, root: Optional[str] = None) -> str:
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


def mask_path(work_dir: str, k: int, name: str) -> str:
    """Where round ``k`` keeps the mask of what is labelled of an image."""
    return png_path(osp.join(round_dir(work_dir, k), 'labelled'), name, work_dir)


def write_png(path: str, array_HW: np.ndarray, palette: Optional[np.ndarray] = None) -> None:
    """An array as a PNG (booleans take 1 bit each; numbers may have a palette, (256, 3)), all or nothing."""
    os.makedirs(osp.dirname(path), exist_ok=True)
    png, image = io.BytesIO(), Image.fromarray(array_HW)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(png, 'PNG')
    write_atomically(path, png.getvalue())


def read_mask(path: str) -> np.ndarray:
    """A mask as booleans, (H, W).

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert('1'))
    except (OSError, SyntaxError) as error:
        raise ValueError(f'the mask {path} is missing or damaged ({error}): restore it from a copy') from error


def labelled_mask(runner: Runner, pool: Pool, have: dict, name: str) -> np.ndarray:
    """What is labelled of an image, (H, W) booleans."""
    if name not in have:
        return np.zeros(pool.sizes[name], bool)
    return np.ones(pool.sizes[name], bool) if have[name] is None else \
        read_mask(mask_path(runner.work_dir, have[name], name))


def on_all_ranks(function: Callable, names: list[str]) -> dict:
    """What a function makes of each name; every rank does its share.

    Raises:
        ValueError: On every rank, with what went wrong on any.
    """
    rank, world_size = get_dist_info()
    mine, errors = {}, []
    for name in names[rank::world_size]:
        try:
            mine[name] = function(name)
        except ValueError as error:
            errors.append(str(error))
    shares = all_gather_object((mine, errors))
    errors = [error for share in shares for error in share[1]]
    if errors:
        raise ValueError('; '.join(errors[:5]) + (f'; and {len(errors) - 5} more' if len(errors) > 5 else ''))
    return {name: share[0][name] for name in names for share in shares if name in share[0]}


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
        ValueError: A setting has changed since the run began, labelled images have left the data set, or labels that
            a human was asked for are not there yet.
    """
    path = osp.join(runner.work_dir, STATE_FILE)
    found = [osp.isfile(path)]
    broadcast_object_list(found)  # rank 0's view: it may write before another rank looks
    if not found[0]:
        seed = next(s for s in (al.seed, runner.cfg.get('randomness', {}).get('seed'), runner.seed) if s is not None)
        state = dict(schema=SCHEMA, phase='train', round=0, seed=seed, settings=al.to_dict(),
                     config=config_digest(runner.cfg), images=len(pool), rounds=[], pool=pool.names)
        if al.unit.type != 'image':
            state['pixels'] = sum(h * w for h, w in pool.sizes.values())
        if al.unit.type == 'image' or isinstance(al.initial, (str, list)):
            names = initial_names(al.initial, pool, seed)
            left = len(pool) - len(names)
            worst = max((count(n, len(pool)) for n in budgets(al)), default=0)
            if al.unit.type == 'image' and worst > left:
                raise ValueError(f'`al.budget` should be at most the {left} images that are not in `al.initial`, but '
                                 f'got {worst} ({al.budget!r})')
            asked = names
        else:
            asked = query(runner, None, state, pool)
        if is_main_process():  # checkpoints of an older run: nothing of it may leak into this one
            for stale in glob.glob(osp.join(glob.escape(runner.work_dir), 'round_*', 'last_checkpoint')):
                os.remove(stale)
        add_round(runner, state, pool, asked)
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
    if state['phase'] == 'label':
        accept_labels(runner, state, pool)
    update_pool(runner, state, pool)
    return state


def check_resume(state: dict, al: dict, pool: Pool) -> None:
    """Refuse to go on with settings under which the rounds so far would have been others."""
    for key, value in state['settings'].items():
        if key not in MAY_CHANGE_ON_RESUME and al.get(key) != value:
            raise ValueError(f'`al.{key}` was {value!r} when the run began and cannot change on resume, but got '
                             f'{al.get(key)!r}')
    past = len(state['rounds']) - 1
    before, now = (budgets(settings)[:past] for settings in (state['settings'], al))
    if before != now:
        raise ValueError(f'`al.rounds` and `al.budget` should leave the {past} queries that were made as they were '
                         f'({before}), but got {now}')
    gone = [name for name in labelled(state) if name not in pool.where]
    if gone:
        raise ValueError(f'{len(gone)} labelled images are not in the data set any more: {", ".join(gone[:5])}')


# ---------------------------------------------------------------------------------------------------------------------
# The labelled training set: what `build_dataloader` and `full_init` do under the key `labelled`
# ---------------------------------------------------------------------------------------------------------------------

_LABELLED: ContextVar[Optional[dict]] = ContextVar('labelled', default=None)  # image name -> path of its mask, or None


def build_labelled_dataloader(build: Callable, dataloader: dict, *args, **kwargs):
    """Build a dataloader whose data sets keep only what is labelled.

    Args:
        build: Stock ``Runner.build_dataloader``.
        dataloader: A dataloader's config with ``labelled=dict(state=path of al_state.json, round=k)``.
    """
    dataloader = copy.copy(dataloader)
    where = dataloader.pop('labelled')
    state = read_state(where['state'])
    have = labelled(state, where['round'])
    for name in state['rounds'][where['round']].get('held_out', ()):
        del have[name]
    token = _LABELLED.set({name: None if k is None else mask_path(osp.dirname(where['state']), k, name)
                           for name, k in have.items()})
    try:
        loader = build(dataloader, *args, **kwargs)
    finally:
        _LABELLED.reset(token)
    check_filtered(loader.dataset)
    if not len(loader) and not isinstance(loader.sampler, InfiniteSampler):
        raise ValueError(f'`train_dataloader.batch_size` should be at most the {len(loader.dataset)} labelled images, '
                         f'or drop_last=False, but got {loader.batch_size}: there is no batch to train with')
    return loader


def keep_labelled(dataset: BaseDataset, have: dict) -> None:
    """Filter a leaf data set as soon as it knows its images, before any wrapper counts them or reads a label; and hide
    what is not labelled of an image."""
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    names = [image_name(dataset, info) for info in infos]
    dataset.get_subset_([i for i, name in enumerate(names) if name in have])
    dataset.is_labelled = True
    masks = {info['img_path']: have[name] for info, name in zip(infos, names) if have.get(name)}
    if masks or type(dataset.pipeline) is Compose:
        dataset.pipeline = SparseLabels(dataset.pipeline.transforms, masks, getattr(dataset, 'ignore_index', 255))


def check_filtered(dataset) -> None:
    """Refuse a data set with a leaf whose own ``full_init`` went past the filter: it would train on every label."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, key) for key in ('dataset', '_dataset')
                                                   if hasattr(dataset, key)]
    for child in inner:
        check_filtered(child)
    if not inner and not getattr(dataset, 'is_labelled', False):
        raise ValueError(f'{type(dataset).__name__}.full_init should call mmengine\'s BaseDataset.full_init, where '
                         'only the labelled images are kept, but does not')


class SparseLabels(Compose):
    """A data set's pipeline that shows only the labelled pixels of an image, and takes care not to lose them. A file
    that cannot be read is named.

    - The mask is applied by the transform that loads the label map, before any geometry.
    - A random transform that leaves no labelled pixel, as a crop can, is drawn again, up to ten times.
    - A resize keeps every labelled pixel: its label lands where the pixel lands, also where nearest neighbour skips it.

    Args:
        transforms: The stock pipeline's.
        masks: Path of an image -> path of its mask; all other images are wholly labelled.
        ignore_index: What the loss ignores.
    """

    def __init__(self, transforms: list, masks: dict, ignore_index: int):
        super().__init__(transforms)
        self.masks, self.ignore_index = masks, ignore_index

    def __call__(self, results: dict) -> Optional[dict]:
        path = self.masks.get(results['img_path'])
        with reading(f'{results["img_path"]} or its label map'):
            return super().__call__(results) if path is None else self.show_labelled(results, path)

    def show_labelled(self, results: dict, path: str) -> Optional[dict]:
        for transform in self.transforms:
            before, results = results, transform(copy.copy(results))
            if results is None:
                return None
            label, old = results.get('gt_seg_map'), before.get('gt_seg_map')
            if label is None or label is old:
                continue
            if old is None:
                results['gt_seg_map'] = self.hide(label, path)
            elif any('Resize' in cls.__name__ for cls in type(transform).__mro__):  # mmcv's and mmseg's
                results['gt_seg_map'] = keep_pixels(old, label, self.ignore_index)
            elif (old != self.ignore_index).any():
                for _ in range(10):
                    if (results['gt_seg_map'] != self.ignore_index).any():
                        break
                    results = transform(copy.copy(before))
        return results

    def hide(self, label_HW: np.ndarray, path: str) -> np.ndarray:
        mask = read_mask(path)
        if mask.shape != label_HW.shape[:2]:
            raise ValueError(f'the mask {path} has size {mask.shape}, but the label map {label_HW.shape[:2]}')
        return np.where(mask, label_HW, np.array(self.ignore_index, label_HW.dtype))


def keep_pixels(old_HW: np.ndarray, new_HW: np.ndarray, ignore_index: int) -> np.ndarray:
    """Put back, into a label map that was resized by nearest neighbour, the labelled pixels that it skipped."""
    rows, cols = np.divmod(np.flatnonzero(old_HW != ignore_index), old_HW.shape[1])
    r, c = rows * new_HW.shape[0] // old_HW.shape[0], cols * new_HW.shape[1] // old_HW.shape[1]
    lost = new_HW[r, c] == ignore_index
    new_HW = new_HW.copy()
    new_HW[r[lost], c[lost]] = old_HW[rows[lost], cols[lost]]
    return new_HW


def prepare_losses(trainer: Runner) -> None:
    """Make a model's losses average over labelled pixels only, and refuse those that look at the others.

    Every loss of a decode head is tried on a few pixels: one without any label must be finite, and the gradient must
    vanish where there is no label.

    Raises:
        ValueError: A loss or head that cannot be trained with partly labelled images; it names it.
    """
    for module in unwrap(trainer.model).modules():
        if classifies_masks(module):
            raise ValueError(f'{type(module).__name__} learns masks of whole images, for which pixels without a label '
                             "are background: use `al.unit='image'` with it")
        if hasattr(module, 'avg_non_ignore'):
            module.avg_non_ignore = True
            if getattr(module.cls_criterion, '__name__', None) in ('cross_entropy', 'binary_cross_entropy'):
                module.cls_criterion = functools.partial(mean_over_labelled, module.cls_criterion)
    heads = [m for m in unwrap(trainer.model).modules() if hasattr(m, 'loss_decode') and hasattr(m, 'ignore_index')]
    names = []
    for head in heads:
        losses = head.loss_decode if isinstance(head.loss_decode, torch.nn.ModuleList) else [head.loss_decode]
        for loss in losses:
            names.append(type(loss).__name__)
            check_loss(loss, head.out_channels, head.ignore_index)
    trainer.logger.info('Partly labelled images: avg_non_ignore is set where a loss has it; checked that unlabelled '
                        f'pixels have no gradient under {", ".join(dict.fromkeys(names))}')


def mean_over_labelled(criterion: Callable, pred_NCHW: torch.Tensor, label_NHW: torch.Tensor, *args,
                       **kwargs) -> torch.Tensor:
    """mmseg's cross entropy, which fails with one sigmoid output where no pixel is labelled, and with class weights
    looks up that of ``ignore_index`` too: it is spared the one, and told by what to divide for the other."""
    labels = label_NHW[label_NHW != kwargs['ignore_index']]
    if kwargs['reduction'] == 'mean' and not labels.numel():
        return pred_NCHW.sum() * 0
    weight_C = kwargs.get('class_weight')
    if (weight_C is not None and kwargs.get('avg_factor') is None and kwargs['reduction'] == 'mean'
            and criterion.__name__ == 'cross_entropy'):
        kwargs['avg_factor'] = weight_C[labels].sum()
    return criterion(pred_NCHW, label_NHW, *args, **kwargs)


def check_loss(loss: torch.nn.Module, channels: int, ignore_index: int) -> None:
    """Try a loss on partly labelled and on unlabelled pixels.

    Raises:
        ValueError: It lets unlabelled pixels in, or is not finite where no pixel is labelled.
    """
    logits = torch.randn(2, channels, 4, 4, generator=generator('loss'))
    parameter = next(itertools.chain(loss.buffers(), loss.parameters()), logits)
    logits = logits.to(parameter.device).requires_grad_()
    label = torch.zeros(2, 4, 4, dtype=torch.long, device=logits.device)
    label[:, :, 2:] = ignore_index
    takes = inspect.signature(loss.forward).parameters
    options = dict(weight=None, ignore_index=ignore_index)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        options = {key: value for key, value in options.items() if key in takes}
    why = None
    try:
        value, empty = (loss(logits, each, **options).mean() for each in (label, torch.full_like(label, ignore_index)))
        if torch.autograd.grad(value, logits)[0][..., 2:].any():
            why = 'pixels without a label change it'
        elif not torch.isfinite(empty):
            why = 'it is not finite where there is none'
    except Exception as error:
        raise ValueError(f'{type(loss).__name__} cannot train with partly labelled images: it fails on them '
                         f"({type(error).__name__}: {error}); use a plain CrossEntropyLoss, or `al.unit='image'`"
                         ) from error
    if why:
        raise ValueError(f'{type(loss).__name__} cannot train with partly labelled images: {why}; use a '
                         "plain CrossEntropyLoss, or `al.unit='image'`")


# ---------------------------------------------------------------------------------------------------------------------
# Training: one ordinary runner a round
# ---------------------------------------------------------------------------------------------------------------------


class RoundHook(Hook):
    """Keeps a round's last validation metrics, and makes its random draws and validations a function of the iteration,
    so that a resumed round trains as an uninterrupted one."""
    priority = 'VERY_LOW'

    def __init__(self, seed: int):
        self.seed, self.metrics, self.validated_at = seed, {}, -1

    def before_train(self, runner: Runner) -> None:
        """Validate again what was resumed from: mmengine saves before it validates, and a run that is stopped in
        between would have lost the metrics and the best checkpoint."""
        loop = runner.train_loop
        if runner.val_loop is None or not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            return
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        at, end = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        if at > 0 and at >= loop.val_begin and (at % loop.val_interval == 0 or at == end):
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
        batches = getattr(runner.train_loop, 'dataloader_iterator', None)
        if hasattr(batches, 'skip_iter'):  # the maintained fork's would spare the pipelines, and so their random draws
            batches.skip_iter = lambda skipped: collections.deque(itertools.islice(batches, skipped), maxlen=0)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        torch.manual_seed(seed_of(self.seed, runner.rank, 'iter', runner.iter))

    def after_train(self, runner: Runner) -> None:
        """Save the last weights, which mmengine does not where EarlyStoppingHook ends a round between checkpoints."""
        for hook in runner.hooks if getattr(runner.train_loop, 'stop_training', False) else ():
            if isinstance(hook, CheckpointHook) and hook.save_last:
                step = runner.epoch if hook.by_epoch else runner.iter
                if hook.last_ckpt != hook.file_backend.join_path(hook.out_dir, hook.filename_tmpl.format(step)):
                    hook._save_checkpoint_with_step(runner, step, dict(epoch=runner.epoch, iter=runner.iter))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what EarlyStoppingHook counts and mmengine forgets; it counts a validation after all saving is done."""
        checkpoint['early_stopping'] = [(float(h.best_score), h.wait_count) for h in self.early_stopping(runner)]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        for hook, counted in zip(self.early_stopping(runner), checkpoint.get('early_stopping', ())):
            if runner._resume:
                hook.best_score, hook.wait_count = counted

    @staticmethod
    def early_stopping(runner: Runner) -> list[Hook]:
        return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]

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


def load_weights(runner: Runner, trainer: Runner, path: str) -> None:
    """Load a checkpoint into the round's model; an error names it."""
    with reading(path):
        load_checkpoint(unwrap(trainer.model), path, map_location='cpu', logger=runner.logger)


def build_round(runner: Runner, state: dict, resumed: bool) -> Runner:
    """A fresh runner for the state's round, of the caller's class; the caller's own takes over its model."""
    cfg = round_config(runner, state, resumed)
    trainer = type(runner).from_cfg(cfg)
    trainer.register_hook(RoundHook(seed_of(state['seed'], 'train', state['round'])))
    trainer.register_hook(ClassIoU())
    if state['settings']['unit']['type'] != 'image':
        prepare_losses(trainer)
    runner.model = trainer.model
    return trainer


def train_round(runner: Runner, trainer: Runner, state: dict) -> None:
    """Run the round's training, and note its metrics and checkpoints in the state. The model then has the weights of
    the last checkpoint, which were validated: EMAHook leaves others in memory."""
    begin = time.time()
    with reading(trainer._load_from or 'a checkpoint of the config', pickle.UnpicklingError):
        trainer.train()
    hook = next(hook for hook in trainer.hooks if isinstance(hook, RoundHook))
    if trainer.val_loop is not None and hook.validated_at != trainer.iter:  # e.g. resumed after the last iteration
        trainer.val_loop.run()
    checkpoints = dict(last=find_latest_checkpoint(trainer.work_dir))
    for checkpoint_hook in (h for h in trainer.hooks if isinstance(h, CheckpointHook)):
        best = getattr(checkpoint_hook, 'best_ckpt_path', None)
        checkpoints['best'] = best or next(iter(getattr(checkpoint_hook, 'best_ckpt_path_dict', {}).values()), None)
    shared = [checkpoints]
    broadcast_object_list(shared)  # only rank 0 saves, so only it knows
    state['rounds'][state['round']].update(
        labelled=spent(state), metrics=hook.metrics, train_seconds=round(time.time() - begin, 1),
        checkpoints={key: osp.relpath(path, runner.work_dir) for key, path in shared[0].items() if path})
    load_weights(runner, trainer, checkpoint_path(runner, state['rounds'][state['round']], 'last'))
    state['phase'] = 'query'
    save_state(state, runner.work_dir)


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


# ---------------------------------------------------------------------------------------------------------------------
# Query: score the pool with the round's model, and choose
# ---------------------------------------------------------------------------------------------------------------------


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, 'module', model)


def precision(trainer: Runner):
    """The context of the precision that a round trains in: mixed under an ``AmpOptimWrapper``, in its dtype."""
    wrapper = trainer.cfg.optim_wrapper
    kind, dtype = wrapper.get('type', 'OptimWrapper'), wrapper.get('dtype')
    kind = OPTIM_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    if not (inspect.isclass(kind) and issubclass(kind, AmpOptimWrapper)):
        return autocast(enabled=False, dtype=None)
    return autocast(enabled=True, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)


@contextlib.contextmanager
def attribute(owner, name: str, value):
    """Set an object's own attribute for a while."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if had else delattr(owner, name)


def label_classes(model: torch.nn.Module) -> Optional[int]:
    """How many values labels have, if that is known: two for a head with one class, whose sigmoid tells it from 0."""
    classes = getattr(model, 'num_classes', None)
    return classes and max(2, classes)


def decode_head(model: torch.nn.Module) -> Optional[torch.nn.Module]:
    """The head that gives a segmentor's logits: of a cascade, the last."""
    head = getattr(model, 'decode_head', None)
    return head[-1] if isinstance(head, torch.nn.ModuleList) else head


def feature_head(model: torch.nn.Module) -> Optional[torch.nn.Module]:
    """The head whose ``conv_seg`` gets the penultimate features: of a cascade, the last that has one."""
    heads = getattr(model, 'decode_head', None)
    heads = list(heads) if isinstance(heads, torch.nn.ModuleList) else [heads]
    return next((head for head in reversed(heads) if hasattr(head, 'conv_seg')), None)


def classifies_masks(head: torch.nn.Module) -> bool:
    """Whether a head ends in class scores of masks, a sum of softmax x sigmoid over its queries, and not in logits."""
    names = {'MaskFormerHead', 'Mask2FormerHead', 'SideAdapterCLIPHead'}
    return hasattr(head, '_seg_data_to_instance_data') or not names.isdisjoint(c.__name__ for c in type(head).__mro__)


def native_resolution(model: torch.nn.Module):
    """Let the decode head return logits at its own resolution, where all it does after is to enlarge them."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    head = decode_head(model)
    only_resizes = getattr(type(head), 'predict_by_feat', None) is BaseDecodeHead.predict_by_feat
    if not only_resizes or model.test_cfg.get('mode', 'whole') != 'whole':
        return contextlib.nullcontext()
    return attribute(head, 'predict_by_feat', lambda seg_logits, batch_img_metas: seg_logits)


def dropouts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The dropout layers that are in the way from image to logits."""
    kinds = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d)
    return [module for name, module in model.named_modules()
            if isinstance(module, kinds) and module.p > 0 and not name.startswith('auxiliary_head')]


def check_model(model: torch.nn.Module, strategy: 'Strategy') -> None:
    """Refuse a strategy that the model cannot serve.

    Raises:
        ValueError: It gives no logits, or has no dropout layer, or no penultimate features.
    """
    if strategy.needs_model and not hasattr(model, 'inference'):
        raise ValueError('`model` should be a segmentor of mmseg, whose `inference` returns logits, for all that '
                         f"`al.strategy` can be but 'random', but got {type(model).__name__}")
    head = decode_head(model)
    if strategy.mc > 1 and not dropouts_of(model):
        raise ValueError(f'`al.strategy.mc` should be 1 for a {type(head).__name__} and a backbone without dropout (or '
                         f'set `model.decode_head.dropout_ratio`), but got {strategy.mc}')
    if strategy.asks_for('features_KHW') and (
            feature_head(model) is None or model.test_cfg.get('mode', 'whole') != 'whole'):
        raise ValueError(no_features(model))


def no_features(model: torch.nn.Module) -> str:
    return ('`al.strategy.embed` should not need features here: they are the input of `conv_seg` of a BaseDecodeHead, '
            f'run on the whole image, but the model ends in {type(decode_head(model)).__name__} with '
            f'test_cfg.mode={model.test_cfg.get("mode", "whole")!r}')


def tensors_of(output) -> list:
    """The leaves of a module's output."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else None
    return [output] if values is None else [leaf for value in values for leaf in tensors_of(value)]


class Network:
    """A segmentor in eval mode, and its passes over a batch: one, or ``mc`` with dropout (Gal & Ghahramani, ICML 2016).

    With dropout, all that is computed before the first dropout layer is computed once: the output of every module
    without dropout inside that was called before is kept, and replayed. Where the only dropout is that of channels
    before ``conv_seg``, as in most decode heads, a matrix product serves all passes. Masks come from a generator for
    each image and pass, so they do not depend on batches, order or processes.
    """

    def __init__(self, model: torch.nn.Module, mc: int = 1):
        self.model, self.mc, self.dropouts = model.eval(), mc, dropouts_of(model) if mc > 1 else []
        random_parts = {part for part in model.modules() if any(inner in self.dropouts for inner in part.modules())}
        fixed = dict.fromkeys(self.fixed_parts(model, random_parts)) if mc > 1 else ()
        held = collections.Counter(inner for part in fixed for inner in part.modules())
        self.fixed = [part for part in fixed if held[part] == 1]  # calls from inside of another one are not replayed

    def fixed_parts(self, module: torch.nn.Module, random_parts: set):
        """The largest modules without dropout in them."""
        for part in module.children():
            if part in random_parts or isinstance(part, (torch.nn.ModuleList, torch.nn.ModuleDict)):
                yield from self.fixed_parts(part, random_parts)
            else:
                yield part

    def __call__(self, inputs_NCHW: torch.Tensor, metas: list[dict], seeds: list[int]):
        """Yield logits (S, N, C, h, w) of S passes at a time."""
        if self.mc == 1:
            yield self.logits(inputs_NCHW, metas)[None]
            return
        kept, last = {module: [] for module in self.fixed}, []
        with self.keep(kept, last, len(inputs_NCHW)):
            logits = self.logits(inputs_NCHW, metas)
        draws = ([torch.Generator(logits.device).manual_seed(seed_of(seed, i)) for seed in seeds]
                 for i in range(self.mc))
        if last and last[-1][1] is logits and isinstance(self.dropouts[0], torch.nn.Dropout2d) and \
                len(self.dropouts) == 1:
            yield from self.last_layer(last[-1][0], list(draws), max(1, 2**17 // logits.numel()))
            return
        for generators in draws:
            with self.replay(kept, generators):
                yield self.logits(inputs_NCHW, metas)[None]

    def logits(self, inputs_NCHW: torch.Tensor, metas: list[dict]) -> torch.Tensor:
        """Logits of one pass, (N, C, h, w).

        Raises:
            ValueError: The model gives something else.
        """
        logits, n = self.model.inference(inputs_NCHW, metas), len(metas)
        if not (isinstance(logits, torch.Tensor) and logits.ndim == 4 and len(logits) == n):
            what = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f'{type(self.model).__name__}.inference should return logits ({n}, classes, H, W), but '
                             f'got {what}')
        return logits

    @contextlib.contextmanager
    def keep(self, kept: dict, last: list, n: int):
        """Keep the outputs of the fixed parts until a dropout layer is called, but not those that are written to; and
        input and output of a plain ``conv_seg`` behind its head's dropout."""
        waiting, head = [True], decode_head(self.model)

        def note(module, args, output):
            if waiting:
                leaves = tensors_of(output)
                is_batch = all(isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == n for leaf in leaves)
                kept[module].append((output, [(leaf, leaf._version) for leaf in leaves]) if is_batch else None)

        handles = [module.register_forward_hook(note) for module in self.fixed]
        handles += [module.register_forward_pre_hook(lambda *_: waiting.clear()) for module in self.dropouts]
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead
        is_plain = getattr(type(head), 'cls_seg', None) is BaseDecodeHead.cls_seg and hasattr(head, 'conv_seg')
        if is_plain and self.dropouts[-1] is getattr(head, 'dropout', None):
            handles.append(head.conv_seg.register_forward_hook(lambda _, args, output: last.append((args[0], output))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if waiting:
            raise ValueError(f'`al.strategy.mc` should be 1 for a {type(head).__name__}, which calls no dropout layer '
                             f'on the way to its logits, but got {self.mc}')
        for outputs in kept.values():
            outputs[:] = [held[0] if held and all(leaf._version == version for leaf, version in held[1]) else None
                          for held in outputs]

    def last_layer(self, features_NKHW: torch.Tensor, draws: list, at_once: int):
        """Logits of all passes, from the input of ``conv_seg``: dropping a channel is a zero in its weights."""
        conv, p = decode_head(self.model).conv_seg, self.dropouts[0].p
        weight_CK, (h, w) = conv.weight.flatten(1), features_NKHW.shape[2:]
        for first in range(0, self.mc, at_once):
            mask_NSK = torch.stack([torch.stack([torch.rand(weight_CK.shape[1], generator=each, device=weight_CK.device)
                                                 for each in image]) for image in zip(*draws[first:first + at_once])])
            weight_NSCK = weight_CK * ((mask_NSK >= p) / (1 - p)).to(weight_CK)[:, :, None]
            logits_NMP = weight_NSCK.flatten(1, 2) @ features_NKHW.flatten(2)
            logits_NSCHW = logits_NMP.unflatten(1, (-1, len(weight_CK))).unflatten(3, (h, w))
            yield (logits_NSCHW + conv.bias.view(-1, 1, 1)).transpose(0, 1)

    @contextlib.contextmanager
    def replay(self, kept: dict, generators: list[torch.Generator]):
        """Answer calls from what was kept, and draw from the generators, one for each image of the batch."""

        def replayed(forward, outputs):
            outputs = iter(outputs)

            def answer(*args, **kwargs):
                output = next(outputs, None)
                return forward(*args, **kwargs) if output is None else output

            return answer

        def drop(module, x):
            images = len(generators) if len(x) % len(generators) == 0 else 1  # else the first axis is not the batch
            shape = (len(x) // images, *x.shape[1:])
            if not isinstance(module, torch.nn.Dropout):  # whole channels
                shape = shape[:2] + (1, ) * (x.ndim - 2)
            mask = torch.cat([torch.rand(shape, generator=each, device=x.device) for each in generators[:images]])
            return x * ((mask >= module.p) / (1 - module.p)).to(x.dtype)

        with contextlib.ExitStack() as stack:
            for module, outputs in kept.items():
                if outputs:
                    stack.enter_context(attribute(module, 'forward', replayed(module.forward, outputs)))
            for module in self.dropouts:
                stack.enter_context(attribute(module, 'forward', functools.partial(drop, module)))
            yield


def to_image(maps_CHW: torch.Tensor, meta: dict, input_hw: tuple, align_corners: bool) -> torch.Tensor:
    """Maps over a network's input in the coordinates of the original image: what mmseg does to logits."""

    def resize(maps, size):
        return maps if tuple(maps.shape[1:]) == tuple(size) else F.interpolate(
            maps[None], tuple(size), mode='bilinear', align_corners=align_corners)[0]

    return resize(without_padding(resize(maps_CHW, input_hw), meta, input_hw), meta['ori_shape'][:2])


def as_it_is(maps_HW: torch.Tensor, meta: dict, input_hw: tuple) -> torch.Tensor:
    return maps_HW


def without_padding(maps_HW: torch.Tensor, meta: dict, input_hw: tuple) -> torch.Tensor:
    """Maps (..., h, w) over a network's input, at their own resolution, less the padding and unflipped."""
    (in_h, in_w), (h, w) = input_hw, maps_HW.shape[-2:]
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    maps_HW = maps_HW[..., round(top * h / in_h):max(1, h - round(bottom * h / in_h)),
                      round(left * w / in_w):max(1, w - round(right * w / in_w))]
    if meta.get('flip'):
        maps_HW = maps_HW.flip(-1 if meta.get('flip_direction') == 'horizontal' else -2)
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


STATISTICS = dict(  # what is averaged over the passes, and never kept for each
    probs_NCHW=lambda probs_NCHW: probs_NCHW,
    entropies_NHW=lambda probs_NCHW: entropy(probs_NCHW),
    votes_NCHW=lambda probs_NCHW: F.one_hot(probs_NCHW.argmax(1), probs_NCHW.shape[1]).movedim(3, 1).float(),
    squares_NCHW=lambda probs_NCHW: probs_NCHW**2)


def statistics(network: Network, data: dict, seeds: list[int], wanted: list[str], views: list[Callable],
               with_features: bool = False):
    """Run the network over a batch of the query dataloader.

    Args:
        seeds: One for each image, of its dropout masks.
        wanted: Names of ``STATISTICS``.
        views: What is done to the logits (C, h, w) before the softmax, given the image's meta and the input's size.

    Yields:
        For each image its meta, the input's size, for each view the statistics (1, ...), and the features (K, h, w).
    """
    data = network.model.data_preprocessor(data, False)
    metas, input_hw = [sample.metainfo for sample in data['data_samples']], data['inputs'].shape[2:]
    means, caught, hook = [[{} for _ in views] for _ in metas], [], None
    if with_features:  # of the pass without dropout, which is the first
        hook = feature_head(network.model).conv_seg.register_forward_pre_hook(
            lambda _, args: None if caught else caught.append(args[0]))
    are_scores = classifies_masks(decode_head(network.model))
    with native_resolution(network.model):
        for logits_SNCHW in network(data['inputs'], [dict(meta) for meta in metas], seeds):
            for n, meta in enumerate(metas):
                for view, mean in zip(views, means[n]):
                    seen_MHW = view(logits_SNCHW[:, n].flatten(0, 1), meta, input_hw)
                    probs_SCHW = to_probs(seen_MHW.unflatten(0, (len(logits_SNCHW), -1)), are_scores)
                    for name in wanted:
                        share = STATISTICS[name](probs_SCHW)
                        share = share if network.mc == 1 else share.sum(0, keepdim=True).div_(network.mc)
                        mean[name] = mean[name].add_(share) if name in mean else share
    if hook:
        hook.remove()
        if not caught:
            raise ValueError(no_features(network.model))
    for meta, mean, features_KHW in zip(metas, means, caught[0] if caught else [None] * len(metas)):
        yield meta, input_hw, mean, features_KHW


def predictions(network: Network, data: dict, seeds: list[int], strategy: 'Strategy', full_res: bool, whole: bool,
                **offered):
    """What the images of a batch give a strategy.

    Args:
        strategy: Its score, and what its embedding and selector ask for.
        full_res: Score the logits enlarged to the original image, and not at their own resolution.
        whole: The image is one candidate: leave the score map at the logits' resolution, less the padding. Else it
            comes in the coordinates of the original image.

    Yields:
        For each image a score map (H, W), and a dict with ``probs_CHW``, ``scores_HW`` and ``features_KHW`` at the
        logits' resolution, less the padding, as far as they are asked for.
    """
    align = network.model.align_corners
    native, crop = (without_padding, as_it_is) if whole else (as_it_is, without_padding)
    for_vectors = strategy.embed is not None or strategy.asks_for('probs_NC')
    views = [native] * (for_vectors or not full_res) + [functools.partial(to_image, align_corners=align)] * full_res
    wanted = [name for name in STATISTICS if name == 'probs_NCHW' or strategy.asks_for(name)]
    for meta, input_hw, means, features_KHW in statistics(network, data, seeds, wanted, views,
                                                          strategy.asks_for('features_KHW')):
        scores = [None if strategy.score is random else
                  call(strategy.score, mean['probs_NCHW'], **mean, **offered)[0] for mean in means]
        map_HW = scores[-1]
        if not (full_res or whole or map_HW is None):
            map_HW = to_image(map_HW[None], meta, input_hw, align)[0]
        maps = {}
        if for_vectors:
            maps = dict(probs_CHW=crop(means[0]['probs_NCHW'][0], meta, input_hw))
            if scores[0] is not None:
                maps['scores_HW'] = crop(scores[0], meta, input_hw)
            if features_KHW is not None:
                maps['features_KHW'] = without_padding(features_KHW, meta, input_hw).float()
                if maps['features_KHW'].shape[1:] != maps['probs_CHW'].shape[1:]:  # a head that refines its logits
                    maps['features_KHW'] = F.interpolate(maps['features_KHW'][None], maps['probs_CHW'].shape[1:])[0]
        yield map_HW, maps


def query_dataloader(cfg: dict, pool: Pool, names: list[str], shared: bool = True):
    """This rank's share of the images: whole batches, dealt in turn, so that a batch holds the same images, and an
    image gets the same score, for any number of processes; no image is scored twice. All images if not ``shared``.

    Returns:
        The dataloader, and for each of its batches the positions in ``names``.
    """
    rank, world_size = get_dist_info() if shared else (0, 1)
    loader = dict(next(cfg[key] for key in ('test_dataloader', 'val_dataloader') if cfg.get(key)))
    size = loader.pop('batch_size', 1)
    batches = [list(range(i, min(i + size, len(names)))) for i in range(0, len(names), size)][rank::world_size]
    loader.update(dataset=pool.subset(names), sampler=None, batch_sampler=batches)
    for key in ('drop_last', 'num_batch_per_epoch'):
        loader.pop(key, None)
    return Runner.build_dataloader(loader, seed=0), batches


class QueryProgress:
    """Progress of the query pass: a bar where a person is watching, else log lines in the form of mmengine's."""

    def __init__(self, runner: Runner, total: int):
        self.logger, self.total, self.begin, self.bar = runner.logger, total, time.time(), None
        self.interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 50)
        if sys.stdout.isatty() and is_main_process():
            self.bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn())
            self.task = self.bar.add_task('Query', total=total)
            self.bar.start()
            self.bar.console.show_cursor(True)  # it would stay hidden after an error

    def step(self, done: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done)
            if done == self.total:
                self.bar.stop()
        if done == self.total or not self.bar and done % self.interval == 0:
            each = (time.time() - self.begin) / done
            eta = time.strftime('%H:%M:%S', time.gmtime(each * (self.total - done)))
            self.logger.info(f'Iter(query) [{done:{len(str(self.total))}d}/{self.total}]  eta: {eta}  time: {each:.4f}')


class Candidates(NamedTuple):
    """What can be asked for, one row each, by image (its position among those scored) and then by id."""
    image: np.ndarray  # (N,) int32
    id: np.ndarray  # (N,) int64: number of a segment, or y * W + x of a pixel or of a window's centre
    score: np.ndarray  # (N,) float64
    pixels: np.ndarray  # (N,) int32: what it would add to the labelled pixels
    vector: Optional[np.ndarray] = None  # (N, D) float32, if the strategy has an embedding
    probs: Optional[np.ndarray] = None  # (N, C) float32, mean class probabilities, if the selector asks for them

    def take(self, rows) -> 'Candidates':
        return Candidates(*(None if column is None else column[rows] for column in self))

    @staticmethod
    def join(parts: list) -> 'Candidates':
        empty = Candidates(*(np.empty(0, t) for t in (np.int32, np.int64, np.float64, np.int32)))
        columns = list(zip(empty, *parts))
        return Candidates(*map(np.concatenate, columns[:4]), *(
            np.concatenate(held) if (held := [part for part in column if part is not None]) else None
            for column in columns[4:]))

    def sorted(self) -> 'Candidates':
        return self.take(np.lexsort((self.id, self.image)))


class Collector:
    """Gathers candidates image by image and keeps no more than can still be chosen, so that memory does not grow with
    the pool where the choice allows it: with a budget for each image, and with top-k.

    Args:
        select: The selector.
        budget: What may be spent: over all images, or in each if ``per_image``.
        in_pixels: Whether the budget counts pixels, and not units.
        per_image: Choose in every image by itself.
        seed: What seeds the choice.
        progress: Of the queries, for the selector.
        device: Where the selector computes.
    """

    def __init__(self, select: Callable, budget: Callable, in_pixels: bool, per_image: bool, seed: tuple,
                 progress: float = 0., device='cpu'):
        self.select, self.budget, self.in_pixels, self.per_image, self.seed = select, budget, in_pixels, per_image, seed
        self.progress, self.device = progress, device
        self.parts, self.known, self.rows, self.kept = [], [], 0, 0
        self.floor = -math.inf  # what scores lower cannot be chosen any more
        self.seen = {}  # name of an image -> the highest score in it
        self.range = [math.inf, -math.inf, 0]  # lowest and highest score and number of all candidates that were seen

    def add(self, name: str, candidates: Candidates, known: Optional[Candidates] = None) -> None:
        """An image's candidates, and what is labelled of it where the selector wants to know."""
        scores = candidates.score
        if known is not None and not self.per_image:
            self.known.append(known)
        if not len(scores):
            return
        self.seen[name] = float(scores.max())
        self.range = [min(self.range[0], scores.min()), max(self.range[1], scores.max()), self.range[2] + len(scores)]
        if self.per_image:
            candidates = self.choose(candidates, self.budget(name), known, name)
        self.parts.append(candidates)
        self.rows += len(candidates.id)
        if not self.per_image and is_topk(self.select) and self.rows > 2 * self.kept + 2**16:
            self.parts = [self.choose(Candidates.join(self.parts), self.budget(None))]
            if len(self.parts[0].id) < self.rows:
                self.floor = self.parts[0].score.min()
            self.rows = self.kept = len(self.parts[0].id)

    def choose(self, candidates: Candidates, budget: int, known: Optional[Candidates] = None, *seed) -> Candidates:
        """What the selector picks for the budget, in the order of the rows. A budget in pixels is spent as far as whole
        units go: the selector's picks are taken in its order until the next one is too large, but at least one."""
        n = len(candidates.id)
        scores_N, vectors_ND, probs_NC = (None if column is None else torch.from_numpy(column).to(self.device)
                                          for column in (candidates.score, candidates.vector, candidates.probs))
        offered = dict(vectors_ND=vectors_ND, probs_NC=probs_NC, progress=self.progress)
        if vectors_ND is not None:
            empty = known is None or known.vector is None
            offered['labelled_LD'] = vectors_ND[:0] if empty else torch.from_numpy(known.vector).to(self.device)
            offered['labelled_scores_L'] = scores_N[:0] if empty else torch.from_numpy(known.score).to(self.device)
        k = math.ceil(budget / np.median(candidates.pixels)) if self.in_pixels and n else budget
        while n:
            k = min(k, n)
            picks = call(self.select, scores_N, k, generator(*self.seed, *seed), **offered)
            picks = picks.cpu().numpy() if isinstance(picks, torch.Tensor) else np.asarray(picks)
            if len(picks) != k or len(np.unique(picks)) != k:
                raise ValueError(f'`al.strategy.select` should choose {k} different candidates, but got {len(picks)}, '
                                 f'{len(np.unique(picks))} of them different')
            if not self.in_pixels:
                break
            cost = np.cumsum(candidates.pixels[picks])
            if cost[-1] >= budget or k == n:
                picks = picks[:max(1, np.searchsorted(cost, budget, side='right'))]
                break
            k = math.ceil(k * budget / cost[-1]) + 1
        return candidates.take(np.sort(picks)) if n else candidates

    def result(self) -> Candidates:
        """The choice of all ranks together."""
        parts, known, ranges = zip(*all_gather_object((Candidates.join(self.parts), Candidates.join(self.known),
                                                       self.range)))
        lows, highs, numbers = zip(*ranges)
        self.range = [min(lows), max(highs), sum(numbers)]
        candidates, known = (Candidates.join(each).sorted() for each in (parts, known))
        # rank 0 decides; without its vectors, that no other rank has use for
        chosen = [candidates if self.per_image or not is_main_process() else
                  self.choose(candidates, self.budget(None), known)]
        chosen[0] = chosen[0]._replace(vector=None, probs=None)
        broadcast_object_list(chosen)
        return chosen[0]


def free_pixels(state: dict, pool: Pool, names: list[str]) -> dict[str, int]:
    """How many pixels of each image are not labelled."""
    free = {name: math.prod(pool.sizes[name]) for name in names}
    for entry in state['rounds']:
        for name in set(free).intersection(entry['asked']):
            free[name] = free[name] - entry['asked'][name][1] if isinstance(entry['asked'], dict) else 0
    return free


def shortlist(strategy: 'Strategy', unit: dict, collector: Collector, name: str, part: float) -> Optional[int]:
    """How many candidates of an image are of use: with top-k, as many as the budget buys; where every pixel is one and
    each has a vector, four times the image's part of the budget, but at least 256.

    Raises:
        ValueError: ``al.strategy.shortlist`` is too short to spend the budget.
    """
    budget = collector.budget(name)
    if is_topk(strategy.select) and not strategy.shortlist:
        return budget
    is_dense = unit['type'] == 'pixel' or bool(unit.get('window'))
    share = budget * (1 if collector.per_image else part)
    share = math.ceil(share / ((2 * (unit.get('window') or 0) + 1)**2 if collector.in_pixels and is_dense else 1))
    if strategy.shortlist and strategy.shortlist < share:
        raise ValueError(f"`al.strategy.shortlist` should be at least {share}, an image's share of the budget, but got "
                         f'{strategy.shortlist}')
    return strategy.shortlist or (max(256, 4 * share) if is_dense and strategy.embed else None)


def image_candidates(runner: Runner, pool: Pool, have: dict, name: str, position: int, map_HW: Optional[torch.Tensor],
                     maps: dict, strategy: 'Strategy', draw: torch.Generator, limit: Optional[int], floor: float,
                     unit: dict, offered: dict) -> tuple[Candidates, Candidates]:
    """The candidates of an image, and its labelled units.

    Args:
        map_HW: Its score map, or None: scores are drawn.
        maps: What its vectors are made from, see ``predictions``.
        limit: No more than the best so many are of use,
        floor: and none below this score.
    """
    how = strategy.reduce.keywords['how']
    segments = taken = None
    if unit['type'] == 'image':
        ids, pixels, free = np.zeros(1, np.int64), np.ones(1, np.int32), int(name not in have)
        scores = random(1, draw) if map_HW is None else strategy.reduce(map_HW).reshape(1)
        scores = np.asarray(scores.cpu(), np.float64)
    else:
        segments, taken = segments_of(runner, unit, pool, name), labelled_mask(runner, pool, have, name)
        scores = np.asarray(map_HW.float().cpu()) if map_HW is not None else \
            random(taken.size if segments is None else int(segments.max()) + 1, draw).numpy()
        found = [unit_candidates(unit, segments, taken, scores, how, limit, floor)]
        free = len(found[0][0])
        if strategy.asks_for('labelled_LD'):  # a random few where every pixel is one
            drawn = scores if segments is not None else random(taken.size, draw).numpy()
            found.append(unit_candidates({**unit, 'radius': 0}, segments, ~taken, drawn, how, limit, -math.inf))
            if segments is None:
                found[1] = (found[1][0], scores.reshape(-1)[found[1][0]].astype(np.float64), found[1][2])
        ids, scores, pixels = map(np.concatenate, zip(*found))
    vectors = probs = None
    if maps and len(ids):
        shape = maps['probs_CHW'].shape[1:]
        weights_NP = None if taken is None else cell_weights(unit, ids, segments, taken.shape, shape)
        weights_NP = weights_NP if weights_NP is None else weights_NP.to(maps['probs_CHW'].device)
        if strategy.embed:
            vectors = call(strategy.embed, **maps, **offered, weights_NP=weights_NP).float().cpu().numpy()
        if strategy.asks_for('probs_NC'):
            probs = pool_map(maps['probs_CHW'], weights_NP).cpu().numpy()
    rows = Candidates(np.full(len(ids), position, np.int32), ids, scores, pixels, vectors, probs)
    return rows.take(slice(free)), rows.take(slice(free, None))


@torch.no_grad()
def collect(runner: Runner, trainer: Optional[Runner], state: dict, pool: Pool, names: list[str], strategy: 'Strategy',
            collector: Collector, closed: frozenset = frozenset()) -> None:
    """Feed this rank's share of the images to the collector, scored by the model in ``trainer``, or at random. Of those
    that are ``closed`` only what is labelled counts."""
    al, have, k = ConfigDict(state['settings']), labelled(state), len(state['rounds'])
    unit, whole = al.unit, al.unit.type == 'image'
    full_res = (unit.type == 'pixel' or bool(unit.get('window'))) if al.full_res is None else al.full_res
    loader, batches = query_dataloader(runner.cfg, pool, names)
    progress, offered, network = QueryProgress(runner, len(batches)), {}, None
    free = {} if whole else free_pixels(state, pool, [name for name in names if name not in closed])
    total = sum(free.values())
    if strategy.needs_model:
        network = Network(unwrap(trainer.model), strategy.mc)
    if strategy.calibration:
        with precision(trainer):
            offered['thresholds_C'] = calibrate(runner, network, state, pool, strategy.alpha)
    for done, (data, positions) in enumerate(zip(loader if network else itertools.repeat(None), batches), 1):
        results = [(None, {})] * len(positions)
        if network:
            seeds = [seed_of(state['seed'], 'mc', k, names[position]) for position in positions]
            with precision(trainer):
                results = list(predictions(network, data, seeds, strategy, full_res, whole, **offered))
        for position, (map_HW, maps) in zip(positions, results):
            name = names[position]
            if any(not torch.isfinite(each).all() for each in (map_HW, *maps.values()) if each is not None):
                raise ValueError(f'the score of image {name!r} is not finite: the model gives no finite logits')
            draw = generator(state['seed'], 'random', k, name)
            limit = None if whole else shortlist(strategy, unit, collector, name, free.get(name, 0) / max(1, total))
            found, known = image_candidates(runner, pool, have, name, position, map_HW, maps, strategy, draw, limit,
                                            collector.floor, unit, offered)
            collector.add(name, found.take(slice(0)) if name in closed else found, known)
        if network:
            progress.step(done)


def calibrate(runner: Runner, network: Network, state: dict, pool: Pool, alpha: float) -> torch.Tensor:
    """For each class the highest threshold (in thousandths) at which the expected rate of false negatives in an image
    is at most ``alpha``, by conformal risk control (Angelopoulos et al., ICLR 2024) on the labelled images that the
    round did not train on; 0.001 for a class that they do not show often enough to tell. (C,)"""
    names, have = state['rounds'][-1]['held_out'], labelled(state)
    loader, batches = query_dataloader(runner.cfg, pool, names, shared=False)
    rates, images = 0, 0
    for data, positions in zip(loader, batches):
        views = [functools.partial(to_image, align_corners=network.model.align_corners)]
        batch = statistics(network, data, [0] * len(positions), ['probs_NCHW'], views)
        for position, (_, _, means, _) in zip(positions, batch):
            probs_CHW, name = means[0]['probs_NCHW'][0], names[position]
            label_HW = pool.load_label(name)
            label_HW = torch.from_numpy(np.where(labelled_mask(runner, pool, have, name), label_HW, -1))
            rate, seen = torch.ones(len(probs_CHW), 1001, dtype=torch.float64), torch.zeros(len(probs_CHW))
            for c in label_HW.unique().tolist():
                if 0 <= c < len(probs_CHW):
                    bins = (probs_CHW[c].cpu()[label_HW == c] * 1000).long()
                    rate[c] = F.pad(bins.bincount(minlength=1001).cumsum(0)[:1000] / len(bins), (1, 0))
                    seen[c] = 1
            rates, images = rates + rate * seen[:, None], images + seen
    bound = (images + 1) / images.clamp_min(1) * alpha - 1 / images.clamp_min(1)
    allowed = (rates / images.clamp_min(1)[:, None] <= bound[:, None]) & (images[:, None] > 0)
    thresholds_C = (allowed.sum(1) - 1).clamp_min(1) / 1000  # rates rise with the threshold
    runner.logger.info(f'Calibrated on {len(names)} held-out images, thresholds: '
                       f'{", ".join(f"{t:.3f}" for t in thresholds_C.tolist())}')
    if (bound <= 0).all():
        runner.logger.warning(f'{len(names)} held-out images are too few to bound the rate of false negatives by '
                              f'`al.strategy.alpha` = {alpha}: a class needs {math.ceil(1 / alpha)} that show it')
    return thresholds_C.to(probs_CHW.device)


def query(runner: Runner, trainer: Optional[Runner], state: dict, pool: Pool):
    """Choose what to label next. A function of checkpoint, pool, labelled set, settings and seed.

    Args:
        trainer: The round's runner. None for the random choice before the first round.

    Returns:
        Names of images or, below image level, a dict from them to the ids of the chosen units.
    """
    al, k, have = ConfigDict(state['settings']), len(state['rounds']), labelled(state)
    whole = al.unit.type == 'image'
    amount, strategy = (al.initial, resolve_strategy('random')) if k == 0 else (
        budgets(al)[k - 1], resolve_strategy(al.strategy))
    names = [name for name in pool.names if name not in have or not whole and have[name] is not None]
    if al.pool_size is not None and k > 0:
        size = count(al.pool_size, len(pool))
        size = max(size, count(amount, len(pool))) if whole else size
        order = torch.randperm(len(names), generator=generator(state['seed'], 'pool_size', k)).tolist()
        names = [names[i] for i in sorted(order[:size])]
    size, closed = len(names), frozenset()
    if strategy.asks_for('labelled_LD'):
        closed = frozenset(have).difference(names)
        names = [name for name in pool.names if name in closed.union(names)]
    if strategy.needs_model:
        load_weights(runner, trainer, checkpoint_path(runner, state['rounds'][-1], al.query_with))

    def budget(name: Optional[str]) -> int:
        if whole or isinstance(amount, int):
            return count(amount, len(pool))
        return count(amount, math.prod(pool.sizes[name]) if al.per_image else state['pixels'])

    device = next(unwrap(trainer.model).parameters()).device if strategy.needs_model else 'cpu'
    collector = Collector(strategy.select, budget, not whole and isinstance(amount, float), al.per_image,
                          (state['seed'], 'select', k), (k - 1) / max(1, al.rounds - 1), device)
    collect(runner, trainer, state, pool, names, strategy, collector, closed)
    chosen = collector.result()
    keep_scores(runner, k, {} if strategy.score is random else collector.seen)
    if not len(chosen.id):
        return {}
    (low, high, n), scores = collector.range, chosen.score
    asked = [names[i] for i in np.unique(chosen.image)]
    what = f'{len(asked)} of {size} images' if whole else \
        f'{len(chosen.id)} of {n} candidates ({chosen.pixels.sum()} pixels) in {len(asked)} of {size} images'
    runner.logger.info(f'Query {k}: {strategy.name} asks for {what}, scores {scores.min():.4g} to {scores.max():.4g} '
                       f'(all: {low:.4g} to {high:.4g})')
    return asked if whole else {names[i]: chosen.id[chosen.image == i] for i in np.unique(chosen.image)}


def hold_out(state: dict) -> dict:
    """The labelled images that the newest round does not train on, if the strategy calibrates on some.

    Raises:
        ValueError: There is one labelled image only.
    """
    share, names = resolve_strategy(state['settings']['strategy']).calibration, list(labelled(state))
    if not share:
        return {}
    if len(names) < 2:
        raise ValueError(f'`al.initial` should be at least 2 images, of which `al.strategy.calibration` = {share} are '
                         f'held out, but got {len(names)}')
    order = torch.randperm(len(names), generator=generator(state['seed'], 'hold_out', len(state['rounds']))).tolist()
    return dict(held_out=[names[i] for i in sorted(order[:min(len(names) - 1, max(1, round(share * len(names))))])])


def add_round(runner: Runner, state: dict, pool: Pool, asked, trainer: Optional[Runner] = None) -> None:
    """Label what was asked for, or have a human do so: write the masks, then commit the state of the next round."""
    k, have, unit = len(state['rounds']), labelled(state), ConfigDict(state['settings']).unit
    classes, entry = label_classes(unwrap(runner.model)), dict(asked=asked)
    is_human = state['settings']['oracle'] == 'human'  # whose labels are not there before they are accepted

    def label_units(name: str) -> list:
        old = labelled_mask(runner, pool, have, name)
        new = unit_mask(unit, asked[name], segments_of(runner, unit, pool, name), old.shape) & ~old
        void = 0 if is_human else int((pool.check_label(name, classes, new) == pool.ignore_index(name)).sum())
        write_png(mask_path(runner.work_dir, k, name), old | new)
        return [len(asked[name]), int(new.sum()), void]

    if isinstance(asked, list) and not is_human:
        on_all_ranks(lambda name: len(pool.check_label(name, classes)), asked)
    if isinstance(asked, dict):
        figures = on_all_ranks(label_units, list(asked))
        entry = dict(asked={name: figures[name][:2] for name in asked},
                     pixels=sum(pixels for _, pixels, _ in figures.values()),
                     void_pixels=sum(void for _, _, void in figures.values()))
    elif unit.type != 'image':
        entry['pixels'] = sum(math.prod(pool.sizes[name]) for name in asked)
    state['rounds'].append(entry)
    entry.update(hold_out(state))
    state.update(round=k, phase='train')
    if is_human:
        ask_human(runner, trainer, state, pool)
    save_state(state, runner.work_dir)


# ---------------------------------------------------------------------------------------------------------------------
# Units: how a score map becomes candidates, and a chosen candidate a mask
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(8)
def grid(shape: tuple, size: tuple) -> np.ndarray:
    """The cells of a grid, numbered in reading order; those at the right and lower border may be smaller. (H, W)"""
    (h, w), (cell_h, cell_w) = shape, size
    return (np.arange(h)[:, None] // cell_h * math.ceil(w / cell_w) + np.arange(w) // cell_w).astype(np.int32)


def slic(image: np.ndarray, n_segments: int, compactness: float) -> np.ndarray:
    """SLIC superpixels (Achanta et al., 2012), numbered from 0. (H, W) uint16

    Raises:
        ImportError: scikit-image is missing.
    """
    try:
        from skimage.segmentation import slic as skimage_slic
    except ImportError as error:
        raise ImportError("`al.unit='superpixel'` needs scikit-image: pip install scikit-image") from error
    channels = image[..., 2::-1] if image.ndim == 3 and image.shape[2] >= 3 else image  # BGR, as mmcv loads it
    axis = -1 if channels.ndim == 3 else None
    return skimage_slic(channels, n_segments, compactness, start_label=0, channel_axis=axis).astype(np.uint16)


def segments_of(runner: Runner, unit: dict, pool: Pool, name: str) -> Optional[np.ndarray]:
    """The fixed segments of an image, (H, W); superpixels are computed once and kept in ``work_dir/superpixels``. None
    where every pixel is a candidate."""
    if unit['type'] == 'region' and not unit['window']:
        return grid(pool.sizes[name], tuple(unit['size']))
    if unit['type'] != 'superpixel':
        return None
    settings = f'{unit["n_segments"]}_{unit["compactness"]}'
    path = png_path(osp.join(runner.work_dir, 'superpixels', settings), name, runner.work_dir)
    if not osp.isfile(path):
        write_png(path, slic(pool.load_image(name), unit['n_segments'], unit['compactness']))
    with reading(path), Image.open(path) as image:
        return np.asarray(image).astype(np.int32)


def unit_candidates(unit: dict, segments: Optional[np.ndarray], taken: np.ndarray, scores: np.ndarray, how: str,
                    limit: Optional[int], floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The candidates of an image.

    Args:
        unit: The unit's settings.
        segments: (H, W) numbers of fixed segments, or None where every pixel, or window around it, is a candidate.
        taken: (H, W) what is labelled.
        scores: A score map (H, W), or drawn scores of every segment or pixel, flat.
        how: The score of a segment is the ``mean`` or ``max`` of its pixels.
        limit: No more than the best so many are of use,
        floor: and none below this score.

    Returns:
        Ids in ascending order, scores and numbers of pixels, (N,) each.
    """
    if segments is None:
        radius, gap = (unit['window'], 2 * unit['window']) if unit['type'] == 'region' else (0, unit['radius'])
        h, w = taken.shape
        ids = np.sort(peaks(scores.reshape(h, w), gap, dilate(taken, gap - radius), limit, floor))
        rows, cols = np.divmod(ids, w)
        pixels = ((np.minimum(rows + radius, h - 1) - np.maximum(rows - radius, 0) + 1) *
                  (np.minimum(cols + radius, w - 1) - np.maximum(cols - radius, 0) + 1))
        return ids, scores.reshape(-1)[ids].astype(np.float64), pixels.astype(np.int32)
    flat = segments.reshape(-1)
    pixels = np.bincount(flat)
    ids = np.flatnonzero((pixels > 0) & (np.bincount(flat[taken.reshape(-1)], minlength=len(pixels)) == 0))
    if scores.ndim == 1:
        values = scores
    elif how == 'mean':
        values = np.bincount(flat, scores.reshape(-1)) / np.maximum(pixels, 1)
    else:
        values = scipy.ndimage.maximum(scores, segments, np.arange(len(pixels)))
    return ids, np.asarray(values[ids], np.float64), pixels[ids].astype(np.int32)


def dilate(mask_HW: np.ndarray, radius: int) -> np.ndarray:
    """All pixels within a square of ``radius`` around those of a mask."""
    return cv2.dilate(mask_HW.view(np.uint8), np.ones((2 * radius + 1,) * 2, np.uint8)).view(bool) \
        if radius and mask_HW.any() else mask_HW


def peaks(scores_HW: np.ndarray, gap: int, blocked_HW: np.ndarray, limit: Optional[int] = None,
          floor: float = -math.inf) -> np.ndarray:
    """Greedy peaks: again and again the highest free pixel, which blocks all within a square of radius ``gap``; ties go
    to the first in reading order. A pick costs the argmax of the rows that it touches, not of the whole map.

    Returns:
        (K,) flat indices, best first: those not below ``floor``, or the first ``limit`` of them.
    """
    scores_HW = np.where(blocked_HW | (scores_HW < floor), -np.inf, scores_HW)
    (h, w), limit = scores_HW.shape, scores_HW.size if limit is None else limit
    if gap == 0:
        flat = scores_HW.reshape(-1)
        if limit < flat.size:
            floor = np.partition(flat, flat.size - limit)[flat.size - limit]  # the limit-th highest
        ids = np.flatnonzero((flat >= floor) & (flat > -np.inf))
        return ids[np.argsort(-flat[ids], kind='stable')][:limit]
    cols = scores_HW.argmax(1)
    best, picks = scores_HW[np.arange(h), cols], []
    while len(picks) < limit:
        y = int(best.argmax())
        if best[y] == -np.inf:
            break
        x, rows = int(cols[y]), slice(max(0, y - gap), y + gap + 1)
        picks.append(y * w + x)
        scores_HW[rows, max(0, x - gap):x + gap + 1] = -np.inf
        cols[rows] = scores_HW[rows].argmax(1)
        best[rows] = np.take_along_axis(scores_HW[rows], cols[rows, None], 1)[:, 0]
    return np.array(picks, np.int64)


def unit_mask(unit: dict, ids: np.ndarray, segments: Optional[np.ndarray], shape: tuple) -> np.ndarray:
    """The pixels of the chosen units, (H, W) booleans."""
    if segments is not None:
        chosen = np.zeros(segments.max() + 1, bool)
        chosen[ids] = True
        return chosen[segments]
    mask, radius = np.zeros(shape, bool), unit.get('window') or 0
    for y, x in zip(*np.divmod(ids, shape[1])):
        mask[max(0, y - radius):y + radius + 1, max(0, x - radius):x + radius + 1] = True
    return mask


def cell_weights(unit: dict, ids: np.ndarray, segments: Optional[np.ndarray], shape: tuple,
                 cells: tuple) -> torch.Tensor:
    """How much of each unit lies in each cell of a coarser map over the image: sparse (N, P), rows sum to 1.

    Args:
        shape: (H, W) of the image.
        cells: (h, w) of the map; P = h w.
    """
    (h, w), radius = shape, unit.get('window') or 0
    if segments is not None:
        row_of = np.full(segments.max() + 1, -1)
        row_of[ids] = np.arange(len(ids))
        rows = row_of[segments.reshape(-1)]
        pixels = np.flatnonzero(rows >= 0)
        rows, (y, x) = rows[pixels], np.divmod(pixels, w)
    else:
        dy, dx = (offset.reshape(-1) for offset in np.mgrid[-radius:radius + 1, -radius:radius + 1])
        y, x = ids[:, None] // w + dy, ids[:, None] % w + dx
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        rows, y, x = np.nonzero(inside)[0], y[inside], x[inside]
    columns = y * cells[0] // h * cells[1] + x * cells[1] // w
    share = scipy.sparse.coo_matrix((np.ones(len(rows), np.float32), (rows, columns)),
                                    (len(ids), cells[0] * cells[1])).tocsr().tocoo()
    share.data /= np.bincount(rows, minlength=len(ids))[share.row]
    weights = torch.sparse_coo_tensor(np.stack([share.row, share.col]), share.data, share.shape)
    return weights._coalesced_(True)  # it is; torch < 2.1 cannot be told above


# ---------------------------------------------------------------------------------------------------------------------
# Strategies: score (probabilities -> map, higher = ask) x embed (maps -> a vector a candidate) x select (-> choice)
# ---------------------------------------------------------------------------------------------------------------------
#
# All are pure functions. Beside their first arguments they get what they name a parameter after, see INPUTS; every
# other parameter with a default is an option of `al.strategy`.

INPUTS = dict(
    # a score gets the class probabilities (N, C, H, W), the mean over all passes, and on demand
    entropies_NHW='mean entropy of the MC dropout passes, in nats',
    votes_NCHW='share of the MC dropout passes that predict a class',
    squares_NCHW='mean of the squared probabilities of the MC dropout passes',
    thresholds_C='probability from which on a class belongs to the prediction set, calibrated on held-out images',
    # an embedding gets what it names, at the resolution of the logits
    probs_CHW='class probabilities',
    features_KHW="penultimate features: the input of the decode head's last layer",
    scores_HW='the score map',
    weights_NP='sparse shares of the P = H W cells in each of N candidates, or None where the whole map is one',
    # a selector gets scores_N, budget and generator, and on demand
    vectors_ND='the embedding of the candidates',
    labelled_LD='the embedding of what is labelled',
    labelled_scores_L='the scores of what is labelled',
    probs_NC='mean class probabilities of the candidates',
    progress='0 in the first query to 1 in the last')


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


def ratio(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """p2 / p1 of the two most probable classes (best versus second best; Joshi et al., CVPR 2009). (N, H, W) in [0, 1]
    """
    top2 = probs_NCHW.topk(2, dim=1).values
    return top2[:, 1] / top2[:, 0]


def entropy(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """-sum p ln p over the classes, in nats (Shannon, 1948). (N, H, W) in [0, ln C]"""
    return torch.special.entr(probs_NCHW).sum(1)


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


def conformal_risk(probs_NCHW: torch.Tensor, thresholds_C: torch.Tensor) -> torch.Tensor:
    """Share of the classes in a pixel's prediction set {c: p_c >= threshold_c}, each weighted by how confused it is in
    the image: the entropy of its row in ``cooccurrence`` (CRC-AL). (N, H, W) in [0, 1]"""
    maps = []
    for probs_CHW in probs_NCHW:
        shares_CC = cooccurrence(probs_CHW, thresholds_C).view(len(probs_CHW), -1)
        weights_C = torch.special.entr(shares_CC).sum(1)
        sets_CHW = (probs_CHW >= thresholds_C[:, None, None]).to(weights_C)
        maps.append(torch.einsum('c,chw->hw', weights_C, sets_CHW) / weights_C.sum().clamp_min(1e-12))
    return torch.stack(maps)


def reduce_map(scores_HW: torch.Tensor, how: Union[str, float] = 'mean') -> torch.Tensor:
    """One number for a score map: its ``mean``, its ``max``, or the mean of its highest ``how`` percent of pixels."""
    if how == 'mean':
        return scores_HW.mean(dtype=torch.float64)
    if how == 'max':
        return scores_HW.max()
    k = max(1, round(scores_HW.numel() * how / 100))
    return scores_HW.flatten().topk(k).values.mean(dtype=torch.float64)


def box_sum(map_HW: torch.Tensor, k: int) -> torch.Tensor:
    """Sums over (2k+1)^2 windows, zero-padded, in float32; the time does not depend on k on the CPU."""
    size = 2 * k + 1
    if map_HW.is_cuda:
        rows = F.avg_pool2d(map_HW[None].float(), (1, size), 1, (0, k), divisor_override=1)
        return F.avg_pool2d(rows, (size, 1), 1, (k, 0), divisor_override=1)[0]
    return torch.from_numpy(cv2.boxFilter(map_HW.numpy(), cv2.CV_32F, (size, size), normalize=False,
                                          borderType=cv2.BORDER_CONSTANT))


def window_pixels(shape: tuple, k: int, device=None) -> torch.Tensor:
    """How many pixels of each (2k+1)^2 window lie in the image. (H, W) float32"""
    rows, cols = (torch.minimum(i + k, i[-1]) - (i - k).clamp_min(0) + 1
                  for i in (torch.arange(n, device=device) for n in shape))
    return (rows[:, None] * cols).float()


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


def ripu(probs_NCHW: torch.Tensor, k: int = 1) -> torch.Tensor:
    """Region impurity x prediction uncertainty, RIPU's RA (Xie et al., CVPR 2022): entropy of the histogram of
    predicted classes in the (2k+1)^2 window / ln C, times the mean entropy in it / ln C. (N, H, W) in [0, 1]"""
    c = probs_NCHW.shape[1]
    maps = []
    for probs_CHW, entropy_HW in zip(probs_NCHW, entropy(probs_NCHW)):
        mean = box_sum(entropy_HW, k) / window_pixels(entropy_HW.shape, k, entropy_HW.device)
        maps.append(impurity(probs_CHW.argmax(0), c, k) * mean / math.log(c)**2)
    return torch.stack(maps)


def ripu_pixel(probs_NCHW: torch.Tensor, k: int = 32) -> torch.Tensor:
    """RIPU's PA (Xie et al., CVPR 2022): a pixel's entropy times the entropy of the histogram of predicted classes in
    the (2k+1)^2 window around it, both in nats. (N, H, W)"""
    return torch.stack([impurity(probs_CHW.argmax(0), len(probs_CHW), k) * entropy_HW
                        for probs_CHW, entropy_HW in zip(probs_NCHW, entropy(probs_NCHW))])


def pool_map(maps_CHW: torch.Tensor, weights_NP: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Mean of maps over each candidate, or over the whole. (N, C)"""
    flat_PC = maps_CHW.flatten(1).T
    return flat_PC.mean(0, keepdim=True) if weights_NP is None else torch.sparse.mm(weights_NP, flat_PC)


def features(features_KHW: torch.Tensor, weights_NP: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Mean penultimate features (CoreSet; Sener & Savarese, ICLR 2018). (N, K)"""
    return pool_map(features_KHW, weights_NP)


def gradient(probs_CHW: torch.Tensor, weights_NP: Optional[torch.Tensor] = None, size: int = 400) -> torch.Tensor:
    """Gradient of the predicted label's cross entropy with respect to the logits, p - onehot(argmax p) (BADGE; Ash et
    al., ICLR 2020): its mean over a candidate, or for whole images over each cell of a square grid, which has as many
    cells as make about ``size`` dimensions. (N, D)"""
    gradient_CHW = probs_CHW - F.one_hot(probs_CHW.argmax(0), len(probs_CHW)).movedim(2, 0)
    if weights_NP is not None:
        return pool_map(gradient_CHW, weights_NP)
    return F.adaptive_avg_pool2d(gradient_CHW, max(1, round(math.sqrt(size / len(probs_CHW))))).reshape(1, -1)


def class_matrix(rows_CHW: torch.Tensor, maps_CHW: torch.Tensor, weights_NP: Optional[torch.Tensor]) -> torch.Tensor:
    """Mean of row c x map d over each candidate, or over the whole. (N, C, C)"""
    if weights_NP is None:
        return (rows_CHW.flatten(1) @ maps_CHW.flatten(1).T)[None] / rows_CHW[0].numel()
    return torch.stack([pool_map(row_HW * maps_CHW, weights_NP) for row_HW in rows_CHW], 1)


def confusion(probs_CHW: torch.Tensor, weights_NP: Optional[torch.Tensor] = None) -> torch.Tensor:
    """For each class the mean softmax of the pixels that are predicted so, weighted by their entropy (Contextual
    Diversity; Agarwal et al., ECCV 2020); a class that is not predicted has a row of float32's epsilon. (N, C * C)"""
    predicted_CHW = F.one_hot(probs_CHW.argmax(0), len(probs_CHW)).movedim(2, 0)
    matrix_NCC = class_matrix(predicted_CHW * entropy(probs_CHW[None]), probs_CHW, weights_NP)
    total_NC1 = matrix_NCC.sum(2, keepdim=True)
    tiny = torch.finfo(torch.float32).eps
    return torch.where(total_NC1 > 0, matrix_NCC / total_NC1, tiny).clamp_min(tiny).flatten(1)


def cooccurrence(probs_CHW: torch.Tensor, thresholds_C: torch.Tensor,
                 weights_NP: Optional[torch.Tensor] = None) -> torch.Tensor:
    """How often two classes are in one prediction set {c: p_c >= threshold_c}, squared and normalised by row (CRC-AL).
    (N, C * C)"""
    sets_CHW = (probs_CHW >= thresholds_C[:, None, None]).to(probs_CHW)
    matrix_NCC = class_matrix(sets_CHW, sets_CHW, weights_NP)**2
    return (matrix_NCC / matrix_NCC.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).flatten(1)


def class_scores(probs_CHW: torch.Tensor, scores_HW: torch.Tensor,
                 weights_NP: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Mean of p_c x score for each class (ClaSP-PE, with entropy as the score). (N, C)"""
    return pool_map(probs_CHW * scores_HW, weights_NP)


def topk(scores_N: torch.Tensor, budget: int, generator: torch.Generator) -> torch.Tensor:
    """The ``budget`` highest scores; ties go to the first in pool order. (K,) indices"""
    if 0 < budget < len(scores_N) // 4:  # sort no more than can be chosen
        best = (scores_N >= scores_N.topk(budget).values[-1]).nonzero()[:, 0]
        return best[scores_N[best].sort(descending=True, stable=True).indices[:budget]]
    return scores_N.sort(descending=True, stable=True).indices[:budget]


def is_topk(select: Callable) -> bool:
    return select is topk


def top_percent(scores_N: torch.Tensor, budget: int, generator: torch.Generator, percent: float = 5.) -> torch.Tensor:
    """``budget`` at random among the highest ``percent`` percent, but at least ``budget`` (PixelPick; Shin et al.,
    ICCVW 2021). (K,) indices"""
    n = max(budget, round(len(scores_N) * percent / 100))
    best = topk(scores_N, n, generator)
    return best[torch.randperm(len(best), generator=generator)[:budget].to(best.device)]


def gumbel(n: int, beta: float, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Gumbel(0, 1 / beta) noise, one draw a candidate. (N,)"""
    return torch.rand(n, generator=generator, dtype=torch.float64).log_().neg_().log_().div_(-beta).to(like.device)


def power(scores_N: torch.Tensor, budget: int, generator: torch.Generator, beta: float = 1.) -> torch.Tensor:
    """Top-k of ln s + Gumbel noise: a draw without replacement in proportion to s^beta (Kirsch et al., TMLR 2023). (K,)
    indices"""
    noise_N = gumbel(len(scores_N), beta, generator, scores_N)
    return topk(scores_N.double().clamp_min(0).log() + noise_N, budget, generator)


def softmax(scores_N: torch.Tensor, budget: int, generator: torch.Generator, beta: float = 1.) -> torch.Tensor:
    """Top-k of s + Gumbel noise: a draw without replacement in proportion to exp(beta s) (Kirsch et al., TMLR 2023).
    (K,) indices"""
    return topk(scores_N.double() + gumbel(len(scores_N), beta, generator, scores_N), budget, generator)


def softrank(scores_N: torch.Tensor, budget: int, generator: torch.Generator, beta: float = 1.) -> torch.Tensor:
    """Top-k of -ln rank + Gumbel noise, where the highest score has rank 1: a draw without replacement in proportion to
    rank^-beta (Kirsch et al., TMLR 2023). (K,) indices"""
    ranks_N = torch.empty_like(scores_N, dtype=torch.float64)
    ranks_N[topk(scores_N, len(scores_N), generator)] = torch.arange(1., len(scores_N) + 1, dtype=torch.float64,
                                                                     device=scores_N.device)
    return topk(gumbel(len(scores_N), beta, generator, scores_N) - ranks_N.log(), budget, generator)


def stochastic_batches(scores_N: torch.Tensor, budget: int, generator: torch.Generator,
                       batches: int = 100) -> torch.Tensor:
    """Of ``batches`` random batches, the one with the highest mean score (Gaillochet et al., MedIA 2023). A shuffled
    pool, cut up, gives as many batches as fit. (K,) indices"""
    best, fit = (-math.inf, None), max(1, len(scores_N) // budget)
    for first in range(0, batches, fit):
        order = torch.randperm(len(scores_N), generator=generator).to(scores_N.device)
        cut = order[:min(fit, batches - first) * budget].view(-1, budget)
        means = scores_N[cut].mean(1)
        best = max(best, (float(means.max()), cut[means.argmax()]), key=lambda pair: pair[0])
    return best[1]


def class_balance(scores_N: torch.Tensor, budget: int, generator: torch.Generator,
                  probs_NC: torch.Tensor) -> torch.Tensor:
    """Top-k of the score, scaled to [0, 1], x exp(-share of the candidates with the same predicted class) (ClassBal;
    Cai et al., CVPR 2021). (K,) indices"""
    pred_N = probs_NC.argmax(1)
    share_N = (pred_N.bincount() / len(pred_N))[pred_N].double()
    scaled_N = (scores_N - scores_N.min()) / (scores_N.max() - scores_N.min()).clamp_min(1e-12)
    return topk(scaled_N * torch.exp(-share_N), budget, generator)


def class_balanced_power(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
                         progress: float, share: float = 0.66, betas: tuple = (1., 100.)) -> torch.Tensor:
    """``share`` of the budget in equal parts for every class, by a ``power`` draw from the class's column of
    ``class_scores``, the rest by one from the scores; beta grows geometrically over the queries (ClaSP-PE, nnActive).
    (K,) indices"""
    beta = betas[0] * (betas[1] / betas[0])**progress
    columns = [*vectors_ND.T.to(torch.float64), scores_N.double()]
    classes = len(columns) - 1
    quota = [int(budget * share) // classes] * classes
    for c in torch.randperm(classes, generator=generator)[:int(budget * share) % classes].tolist():
        quota[c] += 1
    free_N, picks = torch.ones(len(scores_N), dtype=torch.bool, device=scores_N.device), []
    for column_N, k in zip(columns, [*quota, budget - sum(quota)]):
        noisy_N = column_N.clamp_min(0).log() + gumbel(len(column_N), beta, generator, column_N)
        rows = free_N.nonzero()[:, 0]
        picks.append(rows[topk(noisy_N[rows], k, generator)])
        free_N[picks[-1]] = False
    return torch.cat(picks)


def bilinear_form(vectors_ND: torch.Tensor, distance: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left and right factors and norms by which all distances are ``norms_i + norms_j - left_i . right_j``: squared
    Euclidean, or twice the symmetric Kullback-Leibler divergence (of vectors that are positive)."""
    if distance == 'kl':
        logs_ND = vectors_ND.log()
        return torch.cat([vectors_ND, logs_ND], 1), torch.cat([logs_ND, vectors_ND], 1), (vectors_ND * logs_ND).sum(1)
    if distance != 'euclidean':
        raise ValueError(f"`al.strategy.distance` should be 'euclidean' or 'kl', but got {distance!r}")
    return vectors_ND * math.sqrt(2), vectors_ND * math.sqrt(2), (vectors_ND**2).sum(1)


def approach(nearest_N: torch.Tensor, points: tuple, centres: tuple) -> None:
    """Lower, in place, every point's distance to the nearest centre by further centres: a matrix product a block."""
    (left, _, norms), (_, right, centre_norms) = points, centres
    for rows, near in zip(torch.arange(len(left)).split(8192), nearest_N.split(8192)):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        for first in range(0, len(right), 512):
            block = slice(first, first + 512)
            distances = torch.addmm(centre_norms[block], left[rows], right[block].T, alpha=-1).amin(1) + norms[rows]
            torch.minimum(near, distances, out=near)


def take(points: tuple, rows) -> tuple:
    return tuple(part[rows] for part in points)


def kcenter(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
            labelled_LD: torch.Tensor, distance: str = 'euclidean') -> torch.Tensor:
    """k-center greedy: again and again the candidate that is farthest from all that is labelled or chosen (CoreSet;
    Sener & Savarese, ICLR 2018); without a labelled one, the highest score is first. (K,) indices

    Distances only fall, so old ones are upper bounds: as long as the farthest of an up-to-date few lies above the
    bounds of all others, it is the farthest of all, and the others can wait for a matrix product.
    """
    offset = vectors_ND.mean(0) if distance == 'euclidean' else 0  # small norms lose less to rounding
    points = bilinear_form(vectors_ND - offset, distance)
    nearest_N = torch.full((len(vectors_ND), ), math.inf, device=vectors_ND.device)
    picks, few = [], min(len(vectors_ND), 1024)
    if len(labelled_LD):
        approach(nearest_N, points, bilinear_form(labelled_LD - offset, distance))
    while len(picks) < budget:
        values, active = nearest_N.topk(min(few + 1, len(nearest_N)))
        bound, active = float(values[-1]) if few < len(nearest_N) else -math.inf, active[:few].sort().values
        near, own, block = nearest_N[active], take(points, active), []
        pick = int((nearest_N if picks or len(labelled_LD) else scores_N).argmax())
        while True:
            block.append(pick)
            near = torch.minimum(near, own[2] + points[2][pick] - own[0] @ points[1][pick])
            near[active == pick] = -math.inf
            best = int(near.argmax())
            if len(picks) + len(block) == budget or not near[best] > bound:
                break
            pick = int(active[best])
        approach(nearest_N, points, take(points, block))
        picks += block
        nearest_N[picks] = -math.inf
        few = min(len(vectors_ND), few * 2 if len(block) < 16 else few)
    return torch.tensor(picks)


def kmeanspp(scores_N: torch.Tensor, budget: int, generator: torch.Generator,
             vectors_ND: torch.Tensor) -> torch.Tensor:
    """The seeding of k-means++ (Arthur & Vassilvitskii, SODA 2007), as BADGE (Ash et al., ICLR 2020) uses it: the
    largest norm first, then draws in proportion to the squared distance to the nearest one chosen. (K,) indices

    Draws come in blocks from the distances before the block, and one is accepted with the probability by which its own
    has fallen since: the same distribution, and one matrix product a block.
    """
    points = bilinear_form(vectors_ND - vectors_ND.mean(0), 'euclidean')
    nearest_N = torch.full((len(vectors_ND), ), math.inf, device=vectors_ND.device)
    picks = block = [int((vectors_ND**2).sum(1).argmax())]
    while len(picks) < budget:
        approach(nearest_N, points, take(points, block))
        nearest_N[picks] = 0
        nearest_N.clamp_min_(0)
        total_N = nearest_N.double().cumsum(0)
        if not total_N[-1] > 0:  # only copies of what is chosen are left
            rest = torch.ones(len(vectors_ND), dtype=torch.bool)
            rest[picks] = False
            rest = rest.nonzero()[:, 0]
            return torch.cat([torch.tensor(picks), rest[torch.randperm(len(rest), generator=generator)]])[:budget]
        draws, accept = torch.rand(2, 128, generator=generator, dtype=torch.float64)
        rows = torch.searchsorted(total_N, (draws * total_N[-1].cpu()).to(total_N), right=True)
        rows = rows.clamp_max(len(nearest_N) - 1)
        left, right, norms = take(points, rows)
        between = (norms[:, None] + norms - left @ right.T).clamp_min(0).cpu().numpy()
        now, rows, block = nearest_N[rows].cpu().numpy(), rows.tolist(), []
        enough = accept.numpy() * now
        for j, row in enumerate(rows):
            if enough[j] < now[j] and row not in block and len(picks) + len(block) < budget:
                block.append(row)
                now = np.minimum(now, between[j])
        picks = picks + block
    return torch.tensor(picks)


def real(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
         probs_NC: torch.Tensor, clusters: int = 25) -> torch.Tensor:
    """Representative pseudo-errors (REAL; Chen et al., ECML-PKDD 2023). In each k-means cluster, those whose predicted
    class is not the cluster's majority class m are pseudo-errors; the cluster gets budget in proportion to their sum of
    1 - p_m, and draws at random among them, or where they do not suffice takes its highest 1 - p_m. (K,) indices"""
    start = kmeanspp(scores_N, min(clusters, len(vectors_ND)), generator, vectors_ND).numpy()
    vectors = vectors_ND.double().cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a cluster that falls empty keeps its centre, and gets no budget
        _, cluster_N = scipy.cluster.vq.kmeans2(vectors, vectors[start], minit='matrix', iter=100)
    pred_N, probs = probs_NC.argmax(1).cpu().numpy(), probs_NC.double().cpu().numpy()
    majority = [np.bincount(pred_N[cluster_N == j]).argmax() if (cluster_N == j).any() else 0
                for j in range(len(start))]
    majority_N = np.array(majority)[cluster_N]
    doubt_N, error_N = 1 - probs[np.arange(len(probs)), majority_N], pred_N != majority_N
    value = np.bincount(cluster_N, doubt_N * error_N, len(start))
    quota = np.floor(budget * value / max(value.sum(), 1e-12)).astype(int)
    if value.any():
        quota[np.argsort(-value, kind='stable')[:budget - quota.sum()]] += 1
    picks = []
    for j, k in enumerate(quota):
        errors, members = np.flatnonzero((cluster_N == j) & error_N), np.flatnonzero(cluster_N == j)
        picks += errors[torch.randperm(len(errors), generator=generator)[:k].numpy()].tolist() if len(errors) > k else \
            members[np.argsort(-doubt_N[members], kind='stable')[:k]].tolist()
    doubt_N[picks] = -1
    return torch.tensor([*picks, *np.argsort(-doubt_N, kind='stable')[:budget - len(picks)].tolist()])


def barycentre(scores_N: torch.Tensor, budget: int, generator: torch.Generator, vectors_ND: torch.Tensor,
               labelled_LD: torch.Tensor, labelled_scores_L: torch.Tensor, tau: float = 0.5) -> torch.Tensor:
    """Greedy: the highest mean + least distance to what is labelled or chosen, where the distance from i to j is
    |v_i - v_j|^tau (s_j / (s_i + s_j))^(1 - tau) (CRC-AL). (K,) indices"""
    all_vectors, all_scores = torch.cat([labelled_LD, vectors_ND]), torch.cat([labelled_scores_L, scores_N]).double()
    total_N, least_N = torch.zeros_like(scores_N, dtype=torch.float64), torch.full_like(scores_N, math.inf).double()
    traversed, taken_N = list(range(len(labelled_LD))), torch.zeros_like(scores_N, dtype=torch.bool)
    for step in range(len(traversed) + budget):
        if step >= len(traversed):
            value_N = total_N / len(traversed) + least_N if traversed else scores_N
            pick = int(torch.where(taken_N, -math.inf, value_N).argmax())
            taken_N[pick] = True
            traversed.append(len(labelled_LD) + pick)
        i = traversed[step]
        away_N = (vectors_ND - all_vectors[i]).norm(dim=1).double()
        pull_N = scores_N / (all_scores[i] + scores_N).clamp_min(1e-12)
        away_N = away_N**tau * pull_N.double()**(1 - tau)
        total_N, least_N = total_N + away_N, torch.minimum(least_N, away_N)
    return torch.tensor(traversed[len(labelled_LD):]) - len(labelled_LD)


SCORES = dict(random=random, least_confidence=least_confidence, margin=margin, ratio=ratio, entropy=entropy,
              variation_ratio=variation_ratio, mean_std=mean_std, bald=bald, ripu=ripu, ripu_pixel=ripu_pixel,
              conformal_risk=conformal_risk)
EMBEDS = dict(features=features, gradient=gradient, confusion=confusion, cooccurrence=cooccurrence,
              class_scores=class_scores)
SELECTS = dict(topk=topk, top_percent=top_percent, power=power, softmax=softmax, softrank=softrank,
               stochastic_batches=stochastic_batches, kcenter=kcenter, kmeanspp=kmeanspp, real=real,
               class_balance=class_balance, class_balanced_power=class_balanced_power, barycentre=barycentre)
PRESETS = dict(
    random=dict(score='random'),
    least_confidence=dict(score='least_confidence'),
    margin=dict(score='margin'),
    ratio=dict(score='ratio'),
    entropy=dict(score='entropy'),
    variation_ratio=dict(score='variation_ratio', mc=20),
    mean_std=dict(score='mean_std', mc=20),
    bald=dict(score='bald', mc=20),
    ripu=dict(score='ripu'),
    ripu_pixel=dict(score='ripu_pixel'),
    pixelpick=dict(score='margin', select='top_percent'),
    power_entropy=dict(score='entropy', select='power'),
    powerbald=dict(score='bald', mc=20, select='power'),
    softmaxbald=dict(score='bald', mc=20, select='softmax'),
    softrankbald=dict(score='bald', mc=20, select='softrank'),
    stochastic_batches=dict(score='entropy', select='stochastic_batches'),
    coreset=dict(score='random', embed='features', select='kcenter'),
    badge=dict(score='random', embed='gradient', select='kmeanspp'),
    contextual_diversity=dict(score='random', embed='confusion', select='kcenter', distance='kl'),
    real=dict(score='random', embed='features', select='real'),
    classbal=dict(score='ratio', select='class_balance'),
    clasp_pe=dict(score='entropy', embed='class_scores', select='class_balanced_power'),
    crc=dict(score='conformal_risk', embed='cooccurrence', select='barycentre', calibration=0.2))


class Strategy(NamedTuple):
    """A strategy resolved to functions."""
    name: str
    score: Callable  # probs_NCHW -> scores_NHW, or `random`
    reduce: Callable  # scores_HW -> number
    select: Callable  # scores_N, budget, generator -> indices_K
    embed: Optional[Callable] = None  # maps of an image -> vectors_ND of its candidates
    mc: int = 1  # passes with dropout; 1 is the one without
    shortlist: Optional[int] = None  # the candidates of an image that are kept: its best so many
    calibration: float = 0.  # share of the labelled images that a round does not train on, to calibrate thresholds
    alpha: float = 0.05  # the rate of false negatives that the thresholds allow

    def asks_for(self, name: str) -> bool:
        return any(name in parameters_of(function) for function in (self.score, self.embed, self.select) if function)

    @property
    def needs_model(self) -> bool:
        return self.score is not random or self.embed is not None or self.asks_for('probs_NC')


STRATEGY_OPTIONS = dict(  # beside those of the functions; key: (test, what the value should be)
    mc=(lambda v: type(v) is int and v > 0, 'a positive int'),
    shortlist=(lambda v: v is None or type(v) is int and v > 0, 'None or a positive int'),
    calibration=(lambda v: type(v) in (int, float) and 0 <= v < 1, 'a fraction in [0, 1)'),
    alpha=(lambda v: type(v) in (int, float) and 0 < v < 1, 'a fraction in (0, 1)'),
    reduce=(lambda v: v in ('mean', 'max') or type(v) in (int, float) and 0 < v <= 100,
            "'mean', 'max' or a percentage in (0, 100]"))


@functools.lru_cache(64)
def parameters_of(function: Callable):
    """What a function takes, by name."""
    return inspect.signature(function).parameters


def call(function: Callable, *args, **offered):
    """Call a function with some arguments, and what it names of what is offered."""
    takes = list(parameters_of(function))[len(args):]
    return function(*args, **{key: value for key, value in offered.items() if key in takes})


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
        raise ValueError(f"`{key}` should be one of {', '.join(table)}, or 'package.module:function', but got {name!r}")
    return table[name]


def resolve_strategy(strategy: Union[str, dict]) -> Strategy:
    """A strategy's settings as functions.

    Args:
        strategy: A preset's name, a score of the user's own as ``'package.module:function'``, or a dict with ``type``
            (one of these) and options: ``score``, ``embed`` and ``select`` replace the preset's; then those of
            ``STRATEGY_OPTIONS``; any other is handed to the function that has a parameter of that name.

    Raises:
        ValueError: An unknown name, listing those there are, an unknown option, or functions that do not fit.
    """
    options = dict(strategy) if isinstance(strategy, dict) else dict(type=strategy)
    name = options.pop('type')
    preset = dict(score=name) if ':' in name else _lookup(PRESETS, name, 'al.strategy')
    options = {**preset, **options}
    score = _lookup(SCORES, options.pop('score'), 'al.strategy.score')
    embed = options.pop('embed', None)
    embed = embed and _lookup(EMBEDS, embed, 'al.strategy.embed')
    select = _lookup(SELECTS, options.pop('select', 'topk'), 'al.strategy.select')
    own = {key: options.pop(key) for key in STRATEGY_OPTIONS if key in options}
    for key, value in own.items():
        is_valid, should_be = STRATEGY_OPTIONS[key]
        if not is_valid(value):
            raise ValueError(f'`al.strategy.{key}` should be {should_be}, but got {value!r}')
    known, bound = ['score', 'embed', 'select', *STRATEGY_OPTIONS], []
    for function, given in ((score, 1), (embed, 0), (select, 3)):  # the arguments that a function always gets
        free = [p for p in list(parameters_of(function).values())[given:] if p.name not in INPUTS] if function else []
        mine = {p.name: options.pop(p.name) for p in free if p.name in options}
        missing = [p.name for p in free if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in mine]
        if missing and function is not random:
            raise ValueError(f'`al.strategy` {name!r}: the parameter {missing[0]} of {function.__name__} should be one '
                             f'of {", ".join(INPUTS)}, have a default or be given')
        known += [p.name for p in free]
        bound.append(functools.partial(function, **mine) if mine else function)
    if options:
        raise ValueError(f'`al.strategy` {name!r} has no option {", ".join(options)}; it takes {", ".join(known)}')
    reduce = functools.partial(reduce_map, how=own.pop('reduce', 'mean'))
    resolved = Strategy(name, bound[0], reduce, bound[2], bound[1], **own)
    check_strategy(resolved)
    return resolved


def check_strategy(strategy: Strategy) -> None:
    """Refuse functions that do not fit together."""
    functions = strategy.score, strategy.select, strategy.embed
    score, select, embed = (function and getattr(function, 'func', function).__name__ for function in functions)
    if strategy.asks_for('vectors_ND') and not embed:
        raise ValueError(f'`al.strategy.embed` should be one of {", ".join(EMBEDS)} for the selector {select}, but got '
                         'None')
    if embed and not strategy.asks_for('vectors_ND'):
        raise ValueError(f'`al.strategy.embed` should be None for the selector {select}, which takes no vectors, but '
                         f'got {embed}')
    if strategy.asks_for('scores_HW') and score == 'random':
        raise ValueError(f'`al.strategy.score` should be a score map for the embedding {embed}, but got {score}')
    if strategy.mc == 1 and any(map(strategy.asks_for, ('entropies_NHW', 'votes_NCHW', 'squares_NCHW'))):
        raise ValueError(f'`al.strategy.mc` should be above 1 for {score}, which compares dropout passes, but got 1')
    if strategy.asks_for('thresholds_C') != bool(strategy.calibration):
        raise ValueError('`al.strategy.calibration` should be a share of the labelled images for what asks for '
                         f'thresholds_C, and 0 for all else, but got {strategy.calibration}')


# ---------------------------------------------------------------------------------------------------------------------
# Oracle: a human who labels, while the run waits on disk
# ---------------------------------------------------------------------------------------------------------------------


def label_dir(work_dir: str, k: int) -> str:
    """Where round ``k`` writes what a human is to label."""
    return osp.join(round_dir(work_dir, k), 'to_label')


def ask_human(runner: Runner, trainer: Optional[Runner], state: dict, pool: Pool) -> None:
    """Write what the state's round asks for to ``round_<k>/to_label``, and let the state wait for the labels. This
    comes before the state is committed: whenever that waits, all is written.

    Args:
        trainer: The last round's runner, whose model labels in advance. None before the first round.

    Raises:
        ValueError: The labels that the run begins with, because ``al.initial`` names images, are not there.
    """
    k, settings = state['round'], state['settings']
    if k == 0 and isinstance(settings['initial'], (str, list)):
        accept_labels(runner, state, pool)
        return
    state['phase'], names, masks = 'label', list(state['rounds'][k]['asked']), asked_masks(runner, state, pool)
    folder = label_dir(runner.work_dir, k)
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)  # of an export that was cut off
        os.makedirs(folder)
    barrier()
    for name, pred_HW in predict(runner, trainer, state, pool, names):
        old, new = masks(name)
        if settings['unit']['type'] != 'image':
            write_png(png_path(osp.join(folder, 'mask'), name), new)
            path = png_path(osp.join(folder, 'overlay'), name)
            mmcv.imwrite(overlay(pool.load_image(name), new), path[:-len('png')] + 'jpg')
        if pred_HW is not None:
            write_prediction(png_path(osp.join(folder, 'prediction'), name), pool, name, pred_HW, old, new)
    barrier()
    if is_main_process():
        write_atomically(osp.join(folder, 'to_label.txt'), ''.join(f'{name}\n' for name in names))
        export_cvat(folder, pool, names)
        export_label_studio(folder, pool, names, f'round_{k}')


def asked_masks(runner: Runner, state: dict, pool: Pool) -> Callable:
    """A function from an image's name to what was labelled of it before the state's round, and what that asks for:
    (H, W) booleans both."""
    now, before = (labelled(state, k) for k in (state['round'], state['round'] - 1))

    def masks(name: str) -> tuple[np.ndarray, np.ndarray]:
        old = labelled_mask(runner, pool, before, name)
        return old, labelled_mask(runner, pool, now, name) & ~old

    return masks


@torch.no_grad()
def predict(runner: Runner, trainer: Optional[Runner], state: dict, pool: Pool,
            names: list[str]) -> Iterator[tuple[str, Optional[np.ndarray]]]:
    """This rank's share of the images, each with the classes (H, W) that the checkpoint which asked for it predicts or,
    before the first round, None."""
    rank, world_size = get_dist_info()
    if trainer is None:
        yield from ((name, None) for name in names[rank::world_size])
        return
    model, entry = unwrap(trainer.model).eval(), state['rounds'][state['round'] - 1]
    load_checkpoint(model, checkpoint_path(runner, entry, state['settings']['query_with']), map_location='cpu',
                    logger=runner.logger)
    for data, positions in zip(*query_dataloader(runner.cfg, pool, names)):
        with precision(trainer):
            samples = model.test_step(data)
        for position, sample in zip(positions, samples):
            yield names[position], sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)


def label_values(pool: Pool, name: str) -> tuple[np.ndarray, np.ndarray]:
    """How mmseg reads an image's label file, with ``reduce_zero_label`` and classes of one's own: the class of each
    value in the file, and the value of each class, (256,) both. ``ignore_index`` counts as a class."""
    info, ignore, classes = pool.info(name), pool.ignore_index(name), np.arange(256)
    if info.get('reduce_zero_label'):
        classes = np.where(np.isin(classes, (0, 255)), 255, classes - 1)
    own = info.get('label_map') or {}
    classes = np.array([own.get(c, c) for c in classes.tolist()]).astype(np.uint8)
    values = np.full(256, ignore, np.uint8)
    values[classes[::-1]] = np.arange(256)[::-1]  # the smallest, where several stand for one class
    values[ignore] = 255 if classes[255] == ignore else values[ignore]
    return classes, values


def write_prediction(path: str, pool: Pool, name: str, pred_HW: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
    """Write a label map to start from, in the values of the label files: the prediction where labels are asked for
    (``new``), what was labelled before (``old``), and nothing elsewhere."""
    label = np.full(new.shape, pool.ignore_index(name), np.uint8)
    if old.any():
        label[old] = pool.load_label(name)[old]
    label[new] = pred_HW[new]
    values, colours, palette = label_values(pool, name)[1], class_colours(pool)[1], np.zeros((256, 3), np.uint8)
    palette[values[:len(colours)]] = colours
    write_png(path, values[label], palette)


def read_prediction(folder: str, pool: Pool, name: str) -> np.ndarray:
    """The classes of a label map to start from, (H, W) uint8; 255 everywhere if there is none."""
    path = png_path(osp.join(folder, 'prediction'), name)
    if not osp.isfile(path):
        return np.full(pool.sizes[name], 255, np.uint8)
    with Image.open(path) as image:
        return label_values(pool, name)[0][np.asarray(image)]


def overlay(image: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """A picture of what is to be labelled: the rest is dimmed, and what is asked for has an outline or, where it is too
    small to be seen, a circle. A small image is enlarged by a whole factor. (H, W, 3) uint8, BGR, as mmcv loads it"""
    image = image[..., None] if image.ndim == 2 else image
    picture = image[..., :3] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
    if picture.dtype != np.uint8:
        picture = cv2.normalize(picture.astype(np.float32), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    scale = max(1, 800 // max(mask_HW.shape))
    picture, mask_HW = (each.repeat(scale, 0).repeat(scale, 1) for each in (picture, mask_HW))
    picture, side = np.where(mask_HW[..., None], picture, picture // 2), max(mask_HW.shape)
    width = 2 + side // 1000
    pieces, _ = cv2.findContours(dilate(mask_HW, 2 * width).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    for piece in pieces:
        (x, y), radius = cv2.minEnclosingCircle(piece)
        for colour, line in (((0, 0, 0), width + 2), ((0, 230, 255), width)):
            if radius < side / 40:
                cv2.circle(picture, (round(x), round(y)), round(radius) + side // 80, colour, line, cv2.LINE_AA)
            else:
                cv2.drawContours(picture, [piece], -1, colour, line)
    return picture


def voc_colours() -> np.ndarray:
    """Pascal VOC's colour of each number, (256, 3) uint8: its bit 3 b + c is bit 7 - b of channel c."""
    bits = np.arange(256)[:, None, None] >> np.arange(9).reshape(3, 3) & 1
    return (bits << np.array([[7], [6], [5]])).sum(1).astype(np.uint8)


def class_colours(pool: Pool) -> tuple[list[str], np.ndarray]:
    """The classes, and their colours in the data set's palette, (C, 3) uint8. Annotation tools tell classes by colour,
    and black is none of them: a colour that is taken (ADE20K has one twice) gives way to the next."""
    meta, taken = pool.leaves[0].metainfo, dict.fromkeys([0])
    classes = list(meta.get('classes') or map(str, range(255)))
    for colour in list(meta.get('palette') or voc_colours()[1:].tolist())[:len(classes)]:
        number = int.from_bytes(bytes(colour), 'big')
        while number in taken:
            number = (number + 1) % 2**24
        taken[number] = None
    return classes, np.array([list(number.to_bytes(3, 'big')) for number in taken][1:], np.uint8)


def export_cvat(folder: str, pool: Pool, names: list[str]) -> None:
    """Write ``cvat.zip``, label maps to start from in the layout of CVAT's 'Segmentation mask 1.1': one colour a class,
    one object a class. ``cvat_labels.json`` is for CVAT's raw label constructor."""
    classes, colours = class_colours(pool)
    tables = dict(SegmentationClass=np.zeros((256, 3), np.uint8), SegmentationObject=np.zeros((256, 3), np.uint8))
    tables['SegmentationClass'][:len(classes)] = colours
    tables['SegmentationObject'][:len(classes)] = voc_colours()[1:len(classes) + 1]
    nothing = 'unlabelled' if 'background' in classes else 'background'  # CVAT's own name for it
    lines = [f'{label}:{",".join(map(str, colour))}::'
             for label, colour in zip([nothing, *classes], [[0, 0, 0], *colours.tolist()])]
    with zipfile.ZipFile(osp.join(folder, 'cvat.zip'), 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('labelmap.txt', '\n'.join(['# label:color_rgb:parts:actions', *lines, '']))
        archive.writestr('ImageSets/Segmentation/default.txt', ''.join(f'{image_stem(pool, name)}\n' for name in names))
        for name, (kind, table) in itertools.product(names, tables.items()):
            png = cv2.imencode('.png', table[read_prediction(folder, pool, name)][..., ::-1])[1]
            archive.writestr(f'{kind}/{image_stem(pool, name)}.png', png.tobytes())
    labels = [dict(name=c, color=f'#{bytes(colour).hex()}', attributes=[]) for c, colour in zip(classes, colours)]
    write_atomically(osp.join(folder, 'cvat_labels.json'), json.dumps(labels, ensure_ascii=False))


def image_stem(pool: Pool, name: str) -> str:
    """An image's path below ``img_path`` without its extension, by which CVAT knows it; a name lacks ``img_suffix``."""
    suffix = getattr(pool.leaves[pool.where[name][0]], 'img_suffix', None)
    return osp.splitext(name + suffix)[0] if suffix else name


def export_label_studio(folder: str, pool: Pool, names: list[str], version: str) -> None:
    """Write ``label_studio.json``, tasks with label maps to start from, one brush region a class, and
    ``label_studio.xml``, the labelling interface that they are for. Images are local files below the root ``/``."""
    classes, colours = class_colours(pool)
    tasks = []
    for name in names:
        label = read_prediction(folder, pool, name)
        brushes = [dict(id=f'class_{c}', type='brushlabels', from_name='label', to_name='image', image_rotation=0,
                        original_width=label.shape[1], original_height=label.shape[0],
                        value=dict(format='rle', rle=encode_rle(label == c), brushlabels=[classes[c]]))
                   for c in np.unique(label).tolist() if c < len(classes)]
        url = '/data/local-files/?d=' + quote(osp.abspath(pool.info(name)['img_path']).lstrip(os.sep))
        tasks.append(json.dumps(dict(data=dict(image=url, name=name), predictions=[
            dict(model_version=version, result=brushes)] if brushes else []), ensure_ascii=False))
    write_atomically(osp.join(folder, 'label_studio.json'), '[' + ',\n'.join(tasks) + ']\n')
    labels = [f'    <Label value={quoteattr(c)} background="#{bytes(colour).hex()}"/>'
              for c, colour in zip(classes, colours)]
    write_atomically(osp.join(folder, 'label_studio.xml'), '\n'.join([
        '<View>', '  <Image name="image" value="$image" zoom="true"/>', '  <BrushLabels name="label" toName="image">',
        *labels, '  </BrushLabels>', '</View>', '']))


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


def accept_labels(runner: Runner, state: dict, pool: Pool) -> None:
    """Check that all labels of the state's round are there, count void pixels, and let the round train.

    Raises:
        ValueError: It names the images whose label file is missing, unreadable, of another size than the image, or
            without a label where it was asked for. ``to_label/missing.txt`` holds them all.
    """
    k, entry, masks = state['round'], state['rounds'][state['round']], asked_masks(runner, state, pool)
    missing_path, void_path = (osp.join(label_dir(runner.work_dir, k), file) for file in ('missing.txt', 'void.txt'))
    void_names = mmengine.list_from_file(void_path) if osp.isfile(void_path) else []
    rank, world_size = get_dist_info()
    classes = label_classes(unwrap(runner.model))
    mine = {name: check_label(pool, name, masks(name)[1], name in void_names, classes)
            for name in list(entry['asked'])[rank::world_size]}
    figures = {name: figure for share in all_gather_object(mine) for name, figure in share.items()}
    missing = [f'{name}: {figures[name][0]}' for name in entry['asked'] if figures[name][0]]
    if missing:
        if is_main_process():
            os.makedirs(osp.dirname(missing_path), exist_ok=True)
            write_atomically(missing_path, '\n'.join([*missing, '']))
        raise ValueError(f'{len(missing)} of the {len(figures)} label maps that round {k} needs are not there yet (all '
                         f'in {missing_path}): {"; ".join(missing[:10])}')
    if is_main_process() and osp.isfile(missing_path):
        os.remove(missing_path)
    if state['settings']['unit']['type'] != 'image':
        entry['void_pixels'] = sum(void for _, void in figures.values())
    state['phase'] = 'train'


def check_label(pool: Pool, name: str, mask: np.ndarray, may_be_void: bool,
                classes: Optional[int] = None) -> tuple[Optional[str], int]:
    """What is wrong with the label file of an image that was asked for, or None; and how many pixels in ``mask`` are
    void. One without any label there is taken for not done yet, unless it ``may_be_void``. Labels there should be below
    ``classes``, if that is known."""
    try:
        label = pool.load_label(name)
    except FileNotFoundError as error:
        return f'there is no label file {error.filename or ""}', 0
    except Exception as error:  # whatever the data set's own loader makes of a damaged file
        return f'the label file cannot be read ({type(error).__name__}: {error})', 0
    if label.shape != mask.shape:
        return f'the label map should have the size of the image, {mask.shape}, but got {label.shape}', 0
    void = int((label[mask] == pool.ignore_index(name)).sum())
    why = no_classes(label[mask], classes, pool.ignore_index(name))
    if void == mask.sum() and not may_be_void:
        why = 'it has no label where it was asked for; if all that is void, name the image in to_label/void.txt'
    return why, void


def update_pool(runner: Runner, state: dict, pool: Pool) -> None:
    """On resume: images that were added to the data set join the pool; those that were removed are reported."""
    known, now = state.get('pool', pool.names), set(pool.names)
    added, removed = now.difference(known), [name for name in known if name not in now]
    if added:
        runner.logger.info(f'{len(added)} new images have joined the pool, which has {len(pool)} now')
    if removed:
        runner.logger.warning(f'{len(removed)} unlabelled images have left the data set: {", ".join(removed[:10])}')
    if 'pixels' in state and (added or removed):
        state['pixels'] = sum(h * w for h, w in pool.sizes.values())
    state.update(images=len(pool), pool=pool.names)
    save_state(state, runner.work_dir)


def log_request(runner: Runner, state: dict, pool: Pool) -> None:
    """Say what a human is to do, and how to go on."""
    k, entry = state['round'], state['rounds'][state['round']]
    what = '' if 'pixels' not in entry else f' ({sum(n for n, _ in entry["asked"].values())} ' \
        f'{state["settings"]["unit"]["type"]}s, {entry["pixels"]} pixels)'
    runner.logger.info(
        f'Round {k} waits for labels in {len(entry["asked"])} images{what}: see {label_dir(runner.work_dir, k)}\n'
        f'Put each label map where the data set looks for it, the first at '
        f'{pool.info(next(iter(entry["asked"]))).get("seg_map_path")}\nThen go on with: {resume_command()}')


def resume_command() -> str:
    """The command line that goes on with this run. The launcher hands its own on in ``AL_COMMAND``."""
    command = os.environ.get('AL_COMMAND', '').strip() or shlex.join(['python', *sys.argv])
    return command if '--resume' in shlex.split(command) else f'{command} --resume'


# ---------------------------------------------------------------------------------------------------------------------
# The rounds
# ---------------------------------------------------------------------------------------------------------------------


def run_rounds(runner: Runner) -> torch.nn.Module:
    """Active learning: train, query, label, once per round, until the rounds, the pool or a stopping rule end it.

    Args:
        runner: The caller's runner, whose config has an ``al`` block. It holds the last round's model afterwards.

    Returns:
        The last round's model. With ``al.oracle='human'`` it returns when labels are to be given; resuming goes on.
    """
    al = parse_settings(runner.cfg.al)
    check_runner(al, runner)
    pool = Pool(runner.cfg)
    state = start_state(runner, al, pool)
    resumed = bool(runner.cfg.get('resume'))
    with checkpoints_are_data():
        while state['phase'] != 'label':
            log_round(runner, state)
            trainer = build_round(runner, state, resumed)
            if state['phase'] == 'train':
                train_round(runner, trainer, state)
                log_metrics(runner, state)
                report(runner, trainer, state, pool)
            reason = why_stop(state)
            if reason:
                break
            begin = time.time()
            asked = query(runner, trainer, state, pool)
            if not asked:
                reason = 'the pool is empty: nothing is left to ask for'
                break
            state['rounds'][-1]['query_seconds'] = round(time.time() - begin, 1)
            draw_pictures(runner, trainer, state, pool, asked)
            add_round(runner, state, pool, asked, trainer)
            close_round(trainer)
            del trainer
            gc.collect()
            resumed = False
        else:
            log_request(runner, state, pool)
            return runner.model
        if resumed:
            load_weights(runner, trainer, checkpoint_path(runner, state['rounds'][-1], 'last'))
    close_round(trainer)
    runner.logger.info(f'Active learning has ended: {reason}\n{rounds_table(state)}')
    runner._has_loaded = True  # `runner.test()` goes on with this model, not with `load_from`
    return runner.model


def why_stop(state: dict) -> Optional[str]:
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
    figures = spent(state)
    if any(figures.get(key) == state.get(key) for key in ('images', 'pixels') if f'% of {key}' in figures):
        return f'the pool is empty after {k} rounds: everything is labelled'
    return None


def spent(state: dict) -> dict:
    """What is labelled by now, as figures for log and table: images and, below image level, units, clicks (one a unit)
    and pixels."""
    figures = dict(images=len(labelled(state)))
    if state['settings']['unit']['type'] == 'image':
        return {**figures, '% of images': round(100 * figures['images'] / state['images'], 2)}
    pixels = sum(entry.get('pixels', 0) for entry in state['rounds'])
    asked = [entry['asked'] for entry in state['rounds'] if isinstance(entry['asked'], dict)]
    units = sum(n for names in asked for n, _ in names.values())
    return {**figures, f'{state["settings"]["unit"]["type"]}s': units, 'clicks': units, 'pixels': pixels,
            '% of pixels': round(100 * pixels / state['pixels'], 3),
            '% void': round(100 * sum(entry.get('void_pixels', 0) for entry in state['rounds']) / max(1, pixels), 1)}


def log_round(runner: Runner, state: dict) -> None:
    """One line on where the run stands."""
    figures = ', '.join(f'{key}: {value}' for key, value in spent(state).items())
    k, rounds = state['round'], state['settings']['rounds']
    runner.logger.info(f'Round {k} of {rounds} ({state["phase"]}), labelled {figures}; seed {state["seed"]}, '
                       f'{round_dir(runner.work_dir, k)}')


def log_metrics(runner: Runner, state: dict) -> None:
    """The round's figures as scalars of the run's visualizer, over the number of labelled images or units."""
    entry = state['rounds'][-1]
    scalars = {f'al/{key}': value for key, value in {**entry['labelled'], **entry['metrics']}.items()}
    scalars.update({'al/round': state['round'], 'al/train_seconds': entry['train_seconds']})
    runner.visualizer.add_scalars(scalars, step=units_labelled(state))


def rounds_table(state: dict) -> PrettyTable:
    """The run so far, one row a round."""
    metrics = list(dict.fromkeys(key for entry in state['rounds'] for key in entry.get('metrics', {})))
    table = PrettyTable(['round', *spent(state), *metrics, 'train s', 'query s'])
    for k, entry in enumerate(state['rounds']):
        table.add_row([k, *entry['labelled'].values(), *(entry['metrics'].get(key, '-') for key in metrics),
                       entry['train_seconds'], entry.get('query_seconds', '-')])
    table.align = 'r'
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Reports: a run in tables and curves, after each round and from the command line
# ---------------------------------------------------------------------------------------------------------------------

COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000'  # Okabe & Ito, less the yellow
MARKERS = 'os^Dv<>X'


def never_stops(look: Callable) -> Callable:
    """Make a function that only looks at a run do so on rank 0, and turn whatever goes wrong in it into a warning."""

    @functools.wraps(look)
    def wrapper(runner: Runner, *args) -> None:
        try:
            if is_main_process():
                look(runner, *args)
        except Exception as error:
            runner.logger.warning(f'{look.__name__} failed, the run goes on: {type(error).__name__}: {error}')

    return wrapper


class ClassIoU(Hook):
    """Keeps the IoU of every class, as of a round's last validation, if the metric is mmseg's IoUMetric or like it."""

    def before_val_epoch(self, runner: Runner) -> None:
        for metric in runner.val_loop.evaluator.metrics:
            compute = getattr(metric, 'total_area_to_metrics', None)
            if compute and 'total_area_to_metrics' not in vars(metric):  # IoUMetric itself returns means only
                metric.total_area_to_metrics = functools.partial(self.compute, runner, metric, compute)

    @staticmethod
    def compute(runner: Runner, metric, compute: Callable, *args, **kwargs) -> dict:
        figures = compute(*args, **kwargs)
        keep_class_iou(runner, metric.dataset_meta['classes'], figures.get('IoU', ()))
        return figures


@never_stops
def keep_class_iou(runner: Runner, classes: list, iou_C: np.ndarray) -> None:
    percent = {name: round(100 * float(value), 2) for name, value in zip(classes, iou_C) if np.isfinite(value)}
    write_atomically(osp.join(runner.work_dir, 'class_iou.json'), json.dumps(percent))


@never_stops
def keep_round(runner: Runner, k: int, name: str, value) -> None:
    write_atomically(osp.join(round_dir(runner.work_dir, k), name), json.dumps(value, sort_keys=True))


def keep_scores(runner: Runner, k: int, seen: dict) -> None:
    """Write down the highest score in every image that query ``k`` looked at, from all ranks."""
    seen = {name: score for share in all_gather_object(seen) for name, score in share.items()}
    if k > 0:
        keep_round(runner, k - 1, 'query_scores.json', seen)


def kept(runner: Runner, name: str, rounds: int) -> list[Union[dict, list]]:
    """What each of the first rounds keeps in its file of that name; an empty dict where there is none."""
    paths = [osp.join(round_dir(runner.work_dir, k), name) for k in range(rounds)]
    return [mmengine.load(path) if osp.isfile(path) else {} for path in paths]


@never_stops
def report(runner: Runner, trainer: Runner, state: dict, pool: Pool) -> None:
    """After a round's training: write ``learning_curve.csv``, ``learning_curve.png`` and ``asked.png``, and hand the
    figures, and the numbers in them, to the run's visualizer."""
    table = rounds_table(state).get_csv_string(lineterminator='\n')
    write_atomically(osp.join(runner.work_dir, 'learning_curve.csv'), re.sub(r'(?<=,)-(?=[,\n])', '', table))
    metric, step, k, classes = main_metric(state), units_labelled(state), state['round'], pool.classes
    if metric:
        points = curve(state, metric)
        figure = draw_curves({in_words(state['settings']['strategy']): points[None]}, metric, full_level([points]))
        save_figure(figure, osp.join(runner.work_dir, 'learning_curve.png'), runner, 'learning_curve', step)
    asked_RC, units_N = asked_classes(runner, state, pool), units_per_image(state, len(pool))
    queries, ious = kept(runner, 'query_scores.json', k), kept(runner, 'class_iou.json', k + 1)
    iou_RC = np.array([[iou.get(name, math.nan) for name in classes] for iou in ious])
    overlaps_Q2 = np.array([ranking_overlap(*pair) for pair in zip(queries, queries[1:])]).reshape(-1, 2)
    scalars = {f'al/IoU/{name}': value for name, value in zip(classes, iou_RC[-1])}
    shares_C = 100 * asked_RC[-1] / max(1, asked_RC[-1].sum())
    scalars.update({f'al/% of asked/{name}': share for name, share in zip(classes, shares_C)})
    for values in overlaps_Q2[-1:]:
        scalars.update(zip(('al/rank correlation with last query', 'al/top tenth kept since last query'), values))
    if units_N.any():
        scalars['al/% of units in a tenth of images'] = 100 * units_N[:max(1, len(pool) // 10)].sum() / units_N.sum()
    runner.visualizer.add_scalars({key: float(v) for key, v in scalars.items() if np.isfinite(v)}, step=step)
    predicted_C = predicted_classes(trainer, state, pool) if state['settings'].get('visualize') else None
    figure = draw_asked(classes, asked_RC, predicted_C, iou_RC, overlaps_Q2, units_N)
    save_figure(figure, osp.join(runner.work_dir, 'asked.png'), runner, 'asked', step)


def class_counts(label_HW: np.ndarray, mask_HW: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of every class under a mask; void is none. (C,)"""
    labels = label_HW[mask_HW]
    return np.bincount(labels[labels < classes], minlength=classes)


def asked_classes(runner: Runner, state: dict, pool: Pool) -> np.ndarray:
    """Pixels of every class among those that each round asked for: the last is counted, the others were. (R, C)"""
    k, masks, counts = state['round'], asked_masks(runner, state, pool), 0
    for name in state['rounds'][k]['asked']:
        counts += class_counts(pool.load_label(name), masks(name)[1], len(pool.classes))
    keep_round(runner, k, 'asked_classes.json', counts.tolist())
    return np.array([each or [0] * len(pool.classes) for each in kept(runner, 'asked_classes.json', k + 1)])


def ranking_overlap(before: dict, after: dict) -> tuple[float, float]:
    """How alike two queries rank the images that both scored: Spearman's rank correlation, and the share of the highest
    tenth of the one that is in the highest tenth of the other. Not a number where there are fewer than two."""
    names = [name for name in before if name in after]
    if len(names) < 2:
        return math.nan, math.nan
    orders = [np.argsort([-scores[name] for name in names], kind='stable') for scores in (before, after)]
    tops = [set(order[:max(1, len(names) // 10)].tolist()) for order in orders]
    return float(np.corrcoef(*map(np.argsort, orders))[0, 1]), len(tops[0] & tops[1]) / len(tops[0])


def units_per_image(state: dict, images: int) -> np.ndarray:
    """How many units queries have asked for in every image, most first; 0 of whole images. (N,)"""
    units = {}
    for entry in state['rounds'][1:]:
        for name, (n, _) in entry['asked'].items() if isinstance(entry['asked'], dict) else ():
            units[name] = units.get(name, 0) + n
    return np.array(sorted(units.values(), reverse=True) + [0] * (images - len(units)))


def main_metric(state: dict) -> Optional[str]:
    """The metric to look at: that of ``al.stop``, mIoU, or the first there is."""
    have = list(state['rounds'][0].get('metrics', ()))
    wanted = [(state['settings'].get('stop') or {}).get('metric'), 'mIoU', *have]
    return next((metric for metric in wanted if metric in have), None)


def units_labelled(state: dict) -> int:
    """The step of scalars and figures: how many units, or images, are labelled."""
    return state['rounds'][-1]['labelled'][f'{state["settings"]["unit"]["type"]}s']


def curve(state: dict, metric: Optional[str]) -> np.ndarray:
    """After each finished round, the labelled share in percent, clicks (not a number for whole images), and a metric.
    (3, R)"""
    rows = []
    for entry in (entry for entry in state['rounds'] if metric in entry.get('metrics', ())):
        have, value = entry['labelled'], entry['metrics'][metric]
        rows.append((have.get('% of pixels', have.get('% of images')), have.get('clicks', math.nan), value))
    return np.array(rows, float).reshape(-1, 3).T


def in_words(value) -> str:
    """A setting in few words: ``name``, or ``name(option=value)``."""
    if not isinstance(value, dict) or 'type' not in value:
        return str(value)
    options = ', '.join(f'{key}={option}' for key, option in value.items() if key != 'type' and option is not None)
    return f'{value["type"]}({options})' if options else value['type']


def group_runs(runs: dict, metric: str) -> dict[str, np.ndarray]:
    """Group runs that differ in their seeds alone.

    Args:
        runs: Directory -> state. Left out are runs without a finished round, and of a single round on all labels.

    Returns:
        Label that says what sets the group apart -> its curves, as far as all of them are. (S, 3, R)
    """
    groups, result = {}, {}
    for path, state in runs.items():
        points = curve(state, metric)
        if points.size and not (points.shape[1] == 1 and points[0, 0] == 100):
            settings = {key: value for key, value in state['settings'].items() if key not in ('seed', 'visualize')}
            config = {key: value for key, value in state['config'].items() if key != 'randomness'}
            groups.setdefault(json.dumps([settings, config], sort_keys=True), []).append((path, settings, points))
    every = [members[0][1] for members in groups.values()]
    differ = [key for key in DEFAULTS if any(each.get(key) != every[0].get(key) for each in every)] or ['strategy']
    for members in groups.values():
        path, settings, _ = members[0]
        label = ', '.join(('' if key in ('strategy', 'unit') else f'{key}=') + in_words(settings.get(key))
                          for key in differ)
        if label in result:  # then their configs differ
            label = f'{label} ({osp.basename(osp.abspath(path))})'
        rounds = min(points.shape[1] for *_, points in members)
        result[label] = np.stack([points[:, :rounds] for *_, points in members])
    return result


def full_level(curves: list[np.ndarray]) -> Optional[float]:
    """The mean metric of those runs that have come to label everything, or None."""
    values = [each[2, -1] for each in curves if each.size and each[0, -1] == 100]
    return float(np.mean(values)) if values else None


def area_under_curve(share_R: np.ndarray, values_R: np.ndarray) -> float:
    """The metric's mean height between the first and the last labelled share, by the trapezoid rule."""
    if len(share_R) < 2:
        return math.nan
    return float(((values_R[1:] + values_R[:-1]) / 2 * np.diff(share_R)).sum() / (share_R[-1] - share_R[0]))


def share_needed(share_R: np.ndarray, values_R: np.ndarray, level: float) -> float:
    """The labelled share at which the metric, linear between rounds, first reaches a level; not a number if never."""
    reached = np.flatnonzero(values_R >= level)
    if not len(reached):
        return math.nan
    around = slice(max(0, reached[0] - 1), reached[0] + 1)
    return float(np.interp(level, values_R[around], share_R[around]))


def mean_and_std(values: list) -> str:
    if not np.isfinite(values).all():
        return f'- ({np.isfinite(values).sum()} of {len(values)})' if np.isfinite(values).any() else '-'
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else '')


def groups_table(groups: dict[str, np.ndarray], metric: str, full: Optional[float]) -> PrettyTable:
    """One row a group: the metric at its end, area under the curve, labels needed for 90 and 95 % of full supervision;
    means and standard deviations over seeds, or how many of the seeds came that far."""
    levels = {f'% for {level:.0%} of full': level * full for level in (.9, .95)} if full else {}
    table = PrettyTable(['runs', 'seeds', 'rounds', '% labelled', f'last {metric}', 'area under curve', *levels])
    for label, curves in groups.items():
        share_R, last_S = curves[:, 0].mean(0), curves[:, 2, -1]
        table.add_row([label, *curves.shape[::2], f'{share_R[0]:.4g} to {share_R[-1]:.4g}', mean_and_std(last_S),
                       mean_and_std([area_under_curve(share, values) for share, _, values in curves]),
                       *(mean_and_std([share_needed(share, values, level) for share, _, values in curves])
                         for level in levels.values())])
    table.align = 'r'
    table.align['runs'] = 'l'
    return table


def save_figure(figure: Figure, path: str, runner: Optional[Runner] = None, tag: str = '', step: int = 0) -> None:
    """Write a figure, all or nothing, and hand it to the visualizer of the run, if there is one."""
    os.makedirs(osp.dirname(osp.abspath(path)), exist_ok=True)
    temporary = f'{path}.{os.getpid()}.tmp'
    figure.savefig(temporary, format=osp.splitext(path)[1][1:] or 'png')
    os.replace(temporary, path)
    if runner:
        with Image.open(path) as image:  # a tag without slashes: LocalVisBackend makes a file name of it
            runner.visualizer.add_image('al_' + re.sub(r'[^\w.-]+', '_', tag), np.array(image.convert('RGB')), step)


def tidy(axes, legend: bool = True, **labels) -> None:
    axes.set(**labels)
    axes.grid(alpha=.3)
    axes.spines[['top', 'right']].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def draw_curve(axes, x_R: np.ndarray, values_SR: np.ndarray, colour: str, marker: str, label: str) -> None:
    """The mean over seeds and, of several, one standard deviation around it."""
    mean_R = values_SR.mean(0)
    axes.plot(x_R, mean_R, marker + '-', color=colour, label=label)
    if len(values_SR) > 1:
        std_R = values_SR.std(0, ddof=1)
        axes.fill_between(x_R, mean_R - std_R, mean_R + std_R, color=colour, alpha=.2, linewidth=0)


def draw_curves(groups: dict[str, np.ndarray], metric: str, full: Optional[float]) -> Figure:
    """The metric over the labelled share and, where there are any, over clicks: means, and one standard deviation."""
    has_clicks = any(np.isfinite(curves[:, 1]).any() for curves in groups.values())
    xlabels = ['labelled share (%)', 'clicks'][:1 + has_clicks]
    figure = Figure((5.6 * len(xlabels), 3.8), dpi=120, layout='constrained')
    for row, axes in enumerate(figure.subplots(1, len(xlabels), squeeze=False)[0]):
        for i, (label, curves) in enumerate(groups.items()):
            draw_curve(axes, curves[:, row].mean(0), curves[:, 2], COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)],
                       f'{label} ({len(curves)} seeds)' if len(curves) > 1 else label)
        if full is not None:
            axes.axhline(full, color='#555555', linestyle=':', label=f'all labels: {full:.2f}')
        tidy(axes, legend=row == 0, xlabel=xlabels[row], ylabel=metric)
    return figure


def draw_asked(classes: list, asked_RC: np.ndarray, predicted_C: Optional[np.ndarray], iou_RC: np.ndarray,
               overlaps_Q2: np.ndarray, units_N: np.ndarray) -> Figure:
    """What was asked for: classes against predictions, IoU of classes, overlap of rankings, and budget over images."""
    shown = np.sort(np.argsort(-asked_RC.sum(0), kind='stable')[:30])  # more could not be read
    rows = [['classes'] + ['iou'] * bool(np.isfinite(iou_RC).any()),
            ['overlap'] * bool(np.isfinite(overlaps_Q2).any()) + ['budget'] * bool(units_N.any())]
    mosaic, heights = [(row * 2)[:2] for row in rows if row], (1.3 + .24 * len(shown), 3.)
    figure = Figure((11, sum(heights[:len(mosaic)])), dpi=110, layout='constrained')
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights[:len(mosaic)])
    names = dict(yticks=range(len(shown)), yticklabels=[classes[c] for c in shown])
    counts = {'asked at the start': asked_RC[0], 'by queries': asked_RC[1:].sum(0),
              'predicted in the pool': predicted_C}
    for (label, counts_C), colour, marker in zip(counts.items(), COLOURS, 'os^'):
        if counts_C is not None and counts_C.any():
            shares = (100 * counts_C / counts_C.sum())[shown].clip(.01)
            axes['classes'].scatter(shares, names['yticks'], color=colour, marker=marker, label=label, alpha=.8)
    tidy(axes['classes'], legend=False, xscale='log', xlim=(.008, 125), xlabel='% of pixels', **names,
         ylim=(len(shown) - .5, -.5))
    axes['classes'].legend(frameon=False, ncols=3, loc='lower center', bbox_to_anchor=(.5, 1), columnspacing=1,
                           title='classes of pixels')
    axes['classes'].set_xticks([.01, .1, 1, 10, 100], ['≤ 0.01', '0.1', '1', '10', '100'])
    if 'iou' in axes:
        heat = axes['iou'].imshow(iou_RC[:, shown].T, vmin=0, vmax=100, cmap='cividis', aspect='auto')
        for (k, c), value in np.ndenumerate(iou_RC[:, shown]) if len(iou_RC) <= 12 else ():
            axes['iou'].text(k, c, f'{value:.0f}', ha='center', va='center', size=8, color='wk'[int(value > 50)])
        axes['iou'].set(xlabel='round', title='IoU (%)', xticks=range(0, len(iou_RC), len(iou_RC) // 13 + 1), **names)
        figure.colorbar(heat, ax=axes['iou'])
    if 'overlap' in axes:
        queries = [f'{q + 1} → {q + 2}' for q in range(len(overlaps_Q2))]
        for values, label, style in zip(overlaps_Q2.T, ('rank correlation', 'share of the top tenth kept'), 'os'):
            axes['overlap'].plot(queries, values, style + '-', color=COLOURS['os'.index(style)], label=label)
        tidy(axes['overlap'], xlabel='queries', ylim=(min(-.05, np.nanmin(overlaps_Q2) - .05), 1.05),
             title='do consecutive queries rank images alike?')
    if 'budget' in axes:
        percent = np.linspace(0, 100, len(units_N) + 1)
        axes['budget'].plot(percent, 100 * np.r_[0, units_N.cumsum()] / units_N.sum(), color=COLOURS[0], label='so far')
        axes['budget'].plot([0, 100], [0, 100], color='#555555', linestyle=':', label='if all images got the same')
        tidy(axes['budget'], xlabel='% of images, those asked most first', ylabel='% of units asked for',
             title='do a few images take it all?')
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: a few images of each query
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_one(trainer: Runner, state: dict, pool: Pool, name: str, strategy: Optional[Strategy] = None, **offered):
    """The prediction for an image and, if the strategy has any, its score map, (H, W) each, in the image's own
    coordinates, from the enlarged logits."""
    network = Network(unwrap(trainer.model), strategy.mc if strategy else 1)
    wanted = [key for key in STATISTICS if key == 'probs_NCHW' or strategy and strategy.asks_for(key)]
    seeds = [seed_of(state['seed'], 'mc', len(state['rounds']), name)]
    views = [functools.partial(to_image, align_corners=network.model.align_corners)]
    with precision(trainer):
        data = pseudo_collate([pool.subset([name])[0]])
        [(_, _, [means], _)] = statistics(network, data, seeds, wanted, views)
        scores_NHW = call(strategy.score, means['probs_NCHW'], **means, **offered) if has_map(strategy) else [None]
    probs_CHW, head = means['probs_NCHW'][0], decode_head(network.model)
    prediction_HW = probs_CHW[1] > head.threshold if getattr(head, 'out_channels', None) == 1 else probs_CHW.argmax(0)
    return prediction_HW.long().cpu().numpy(), None if scores_NHW[0] is None else scores_NHW[0].float().cpu().numpy()


def has_map(strategy: Optional[Strategy]) -> bool:
    return strategy is not None and strategy.score is not random


def predicted_classes(trainer: Runner, state: dict, pool: Pool, images: int = 32) -> np.ndarray:
    """Pixels of every class that the model predicts in a few images of the pool, drawn at random. (C,)"""
    have = labelled(state)
    names = [name for name in pool.names if have.get(name, 0) is not None]
    order = torch.randperm(len(names), generator=generator(state['seed'], 'predicted', state['round'])).tolist()
    maps = [predict_one(trainer, state, pool, names[i])[0].reshape(-1) for i in order[:images]]
    return sum((np.bincount(each, minlength=len(pool.classes)) for each in maps), np.zeros(len(pool.classes), int))


@never_stops
@torch.no_grad()
def draw_pictures(runner: Runner, trainer: Runner, state: dict, pool: Pool, asked) -> None:
    """Draw ``al.visualize`` images after a query: half of them those that it asks for first, the others the same in
    every round; for whole images also a contact sheet of what it asks for."""
    n, folder = state['settings'].get('visualize', 0), round_dir(runner.work_dir, state['round'])
    if not n:
        return
    strategy, model, offered = resolve_strategy(state['settings']['strategy']), unwrap(trainer.model), {}
    if not strategy.needs_model:  # then the query has not loaded it
        load_checkpoint(model, checkpoint_path(runner, state['rounds'][-1], state['settings']['query_with']), 'cpu')
    if strategy.calibration:
        offered['thresholds_C'] = calibrate(runner, Network(model), state, pool, strategy.alpha)
    scores = mmengine.load(osp.join(folder, 'query_scores.json'))
    first = sorted(asked, key=lambda name: -(len(asked[name]) if isinstance(asked, dict) else scores.get(name, 0)))
    order = torch.randperm(len(pool), generator=generator(state['seed'], 'pictures')).tolist()
    for name in dict.fromkeys(first[:n - n // 2] + [pool.names[i] for i in order[:n // 2]]):
        prediction, score = predict_one(trainer, state, pool, name, strategy, **offered)
        figure = draw_picture(runner, state, pool, asked, name, prediction, score)
        path = png_path(osp.join(folder, 'pictures'), name)
        save_figure(figure, path, runner, f'picture_{name}', units_labelled(state))
    if isinstance(asked, list):
        figure = draw_contact_sheet(pool, first, scores)
        save_figure(figure, osp.join(folder, 'contact_sheet.png'), runner, 'contact_sheet', units_labelled(state))


def draw_picture(runner: Runner, state: dict, pool: Pool, asked, name: str, prediction: np.ndarray,
                 score: Optional[np.ndarray]) -> Figure:
    """An image in six panels: input, prediction, scores, asked for now, labelled so far, and the labels asked for."""
    unit, old = ConfigDict(state['settings']).unit, labelled_mask(runner, pool, labelled(state), name)
    new = np.zeros_like(old)
    if name in asked:
        segments = segments_of(runner, unit, pool, name)
        new = ~old & (isinstance(asked, list) or unit_mask(unit, asked[name], segments, old.shape))
    shares, n = (new.mean(), (old | new).mean()), len(pool.classes)
    known = old if state['settings'].get('oracle') == 'human' else old | new  # a human has yet to label what is new
    label = pool.load_label(name) if known.any() else n  # that of an image that was not asked for stays closed
    truth, image, strength = np.where(known, label, n).clip(0, n), to_rgb(pool.load_image(name)), .5
    if unit.type == 'pixel' or unit.get('window'):  # make single pixels large enough to be seen
        radius = max(old.shape) // 120
        where = scipy.ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        truth = np.where(dilate(known, radius), truth[tuple(where)], n)
        old, new, strength = dilate(old, radius), dilate(new, radius), 1
    colours = np.r_[pool.palette, [[255] * 3]].astype(np.uint8)  # mmseg's; white is no class
    panels = {'input': image, 'prediction': colours[prediction],
              f'score: {in_words(state["settings"]["strategy"])}': score,
              f'asked for now: {100 * shares[0]:.3g} %': tint(image, {COLOURS[1]: new}, strength),
              f'labelled so far: {100 * shares[1]:.3g} %': tint(image, {COLOURS[0]: old, COLOURS[1]: new}, strength),
              'labels asked for': colours[truth]}
    figure = Figure((11, 1. + 2 * (.25 + 3.4 * old.shape[0] / old.shape[1])), dpi=100, layout='constrained')
    figure.suptitle(f'round {state["round"]}: {name}')
    for axes, (title, panel) in zip(figure.subplots(2, 3).flat, panels.items()):
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, size=10)
        if panel is None:
            axes.text(.5, .5, 'no score map', ha='center', va='center')
        elif panel.ndim == 2:
            figure.colorbar(axes.imshow(panel, cmap='cividis'), ax=axes, shrink=.8)
        else:
            axes.imshow(panel)
    number = np.bincount(np.r_[prediction.flat, truth.flat], minlength=n)[:n]
    biggest = np.sort(np.argsort(-number, kind='stable')[:min(16, np.count_nonzero(number))])
    figure.legend(handles=[Patch(facecolor=colours[c] / 255, edgecolor='k', label=pool.classes[c]) for c in biggest],
                  ncols=8, loc='outside lower center', frameon=False, fontsize=9)
    return figure


def draw_contact_sheet(pool: Pool, names: list[str], scores: dict, at_most: int = 48) -> Figure:
    """Small pictures of the images that a query asks for, those with the highest scores, if any, first."""
    images = {name: to_rgb(pool.load_image(name)) for name in names[:at_most]}
    rows, (h, w) = math.ceil(len(images) / 8), np.mean([image.shape[:2] for image in images.values()], 0)
    figure = Figure((11, .4 + rows * (.45 + 1.3 * h / w)), dpi=100, layout='constrained')
    figure.suptitle(f'{len(images)} of {len(names)} images asked for' + ', highest scores first' * bool(scores))
    for axes in figure.subplots(rows, 8, squeeze=False).flat:
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
        result[mask_HW] = (1 - strength) * image_HW3[mask_HW] + strength * 255 * np.array(colour_to_rgb(colour))
    return result.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The command line: compare runs, and see where one stands
# ---------------------------------------------------------------------------------------------------------------------

PHASES = dict(train='training on what is labelled', query='scoring the pool',
              label='waiting for the labels that to_label/ in its folder asks for')


def compare_runs(dirs: list[str], out: str, metric: Optional[str], full: Optional[float]) -> str:
    """Draw the learning curves of finished or running runs into one figure.

    Returns:
        Their table.

    Raises:
        ValueError: No run has finished a round with the metric.
    """
    runs = {path: read_state(osp.join(path, STATE_FILE)) for path in dirs}
    metric = metric or next(filter(None, map(main_metric, runs.values())), None)
    groups = group_runs(runs, metric)
    if not groups:
        raise ValueError(f'no run has finished a round with {metric or "a validation"}')
    full = full_level([curve(state, metric) for state in runs.values()]) if full is None else full
    save_figure(draw_curves(groups, metric, full), out)
    return f'{groups_table(groups, metric, full)}\nCurves: {out}'


def status(path: str) -> str:
    """Where a run stands, what it waits for, and the command to go on."""
    state = read_state(osp.join(path, STATE_FILE))
    k, al, done = state['round'], state['settings'], [entry for entry in state['rounds'] if 'metrics' in entry]
    reason = why_stop(state) if state['phase'] == 'query' else None
    logs = [log for depth in ('*', '*/*') for log in glob.glob(osp.join(glob.escape(path), depth, '*.log'))]
    ago = time.time() - max(map(osp.getmtime, [osp.join(path, STATE_FILE), *logs]))
    config = max(glob.glob(osp.join(glob.escape(path), '*.py')), key=osp.getmtime, default='<config>')
    when = 'To go on with more `al.rounds`' if reason else \
        'With the labels in place' if state['phase'] == 'label' else 'If it has stopped, go on with'
    return '\n'.join([
        f'{path}: {in_words(al["strategy"])}, unit {in_words(al["unit"])}, seed {state["seed"]}',
        f'Ended after round {k}: {reason}' if reason else
        f'Round {k} of {al["rounds"]}: {PHASES.get(state["phase"], state["phase"])}; it last wrote {ago:.0f} s ago',
        'Labelled: ' + ', '.join(f'{value} {key}' for key, value in spent(state).items()),
        *([str(rounds_table(dict(state, rounds=done)))] if done else []),
        f'{when}: bash dist_al_train.sh {config} <GPUs> --work-dir {path} --resume'])


def main(argv: Optional[list] = None) -> None:
    parser = argparse.ArgumentParser(prog='al_patch.py', description='Look at runs of active learning')
    commands = parser.add_subparsers(dest='command', required=True)
    compare = commands.add_parser('report', help='compare runs: learning curves, their area, labels needed')
    compare.add_argument('dirs', nargs='+', metavar='DIR', help='work dirs; those that differ in seeds are averaged')
    compare.add_argument('-o', '--out', default='report.png', metavar='FILE', help='figure: .png, .pdf or .svg')
    compare.add_argument('--metric', help='by default that of `al.stop`, or mIoU')
    compare.add_argument('--full', type=float, metavar='VALUE', help='the metric with all labels; by default that of '
                         'a DIR in which everything is labelled')
    commands.add_parser('status', help='where a run stands, and how to go on').add_argument('dir', metavar='DIR')
    args = parser.parse_args(argv)
    try:
        print(status(args.dir) if args.command == 'status' else
              compare_runs(args.dirs, args.out, args.metric, args.full))
    except (OSError, ValueError) as error:
        raise SystemExit(f'al_patch.py {args.command}: {error}') from error


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time, and how to go on with one that was stopped
# ---------------------------------------------------------------------------------------------------------------------

LOCK_FILE = 'al.lock'


class Stopped(SystemExit):
    """SIGTERM as an exception, so that it unwinds as Ctrl-C does, with a shell's exit code: 128 + 15."""


def run_alone(runner: Runner) -> torch.nn.Module:
    """``run_rounds``, as the only run in its work_dir. When it is stopped, the log says how to go on."""
    with only_run(runner), stops_with_a_word(runner):
        return run_rounds(runner)


@contextlib.contextmanager
def only_run(runner: Runner):
    """Hold ``work_dir/al.lock``, from rank 0.

    It is a record lock (``lockf``): forked dataloader workers do not inherit it, as they would one of ``flock``, so
    that the kernel frees it in the instant in which the process dies, though its workers live on for seconds. Over NFS
    it counts for all machines, if the server locks at all. Closing any descriptor of the file would free it.

    Raises:
        RuntimeError: Another run holds it.
    """
    path, file, holder = osp.join(runner.work_dir, LOCK_FILE), None, [None]
    if is_main_process():
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file, 0)
            os.write(file, f'process {os.getpid()} on {socket.gethostname()}'.encode())
        except BlockingIOError:
            holder = [os.read(file, 999).decode(errors='replace') or 'another process']
        except OSError as error:
            runner.logger.warning(f'{path} cannot be locked ({error}): take care that no other run uses this work_dir')
    broadcast_object_list(holder)
    try:
        if holder[0]:
            raise RuntimeError(f'{runner.work_dir} is in use by {holder[0]}: wait for that run, stop it, or choose '
                               'another --work-dir')
        yield
    finally:
        if file is not None:
            os.close(file)


@contextlib.contextmanager
def stops_with_a_word(runner: Runner):
    """On SIGTERM and Ctrl-C, unless somebody handles them already, log the command that goes on with the run."""
    stopped, before = [], {}

    def stop(number, frame=None):
        stopped.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(128 + number)

    for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == default:
            before[number] = signal.signal(number, stop)
    try:
        yield
    except BaseException as error:
        if not stopped:
            raise
        runner.logger.warning(f'Stopped. Nothing is lost; go on with: {resume_command()}')
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            raise
        stop(stopped[0])  # a bare `except` on the way, as there is in mmengine, had made another error of it
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    raise ValueError(f'a checkpoint may only refer to the statistics of HistoryBuffer, but this one asks for {name!r} '
                     f'of {owner!r}')


def checkpoint_globals() -> list:
    """What mmengine's own checkpoints hold beside tensors. torch >= 2.6 refuses all that is not named here."""
    multiarray = importlib.import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    dtypes = [type(np.dtype(code)) for code in '?bBhHiIlLqQefd']
    return [HistoryBuffer, np.ndarray, np.dtype, *dict.fromkeys(dtypes), multiarray.scalar, multiarray._reconstruct,
            (_getattr_of_history_buffer, 'builtins.getattr')]


@contextlib.contextmanager
def checkpoints_are_data():
    """Within it, ``torch.load`` by default reads what mmengine's own checkpoints hold, and refuses the rest.

    That is torch >= 2.6, the first that protects by default; before it any checkpoint is read, as by stock mmengine.
    The maintained fork's mmengine reads again, without protection, what was refused: not here.
    """
    fallback = getattr(mmengine.runner.checkpoint, '_safe_torch_load', None)
    with contextlib.ExitStack() as stack:
        if hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):  # came with that default
            stack.enter_context(torch.serialization.safe_globals(checkpoint_globals()))
            if fallback is not None:
                stack.callback(setattr, mmengine.runner.checkpoint, '_safe_torch_load', fallback)
                mmengine.runner.checkpoint._safe_torch_load = torch.load
        yield


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


if __name__ == '__main__':  # scripts import the module under its name: it patches then, and only once
    main()
else:
    apply_patch()
