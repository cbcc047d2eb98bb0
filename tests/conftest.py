"""Fixtures: nothing stays patched or cached after a test; a tiny data set and config."""
import gc
import itertools
import os.path as osp
import shutil
import signal
import sys

import cv2
import mmcv.utils.ext_loader
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import RUNNERS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

HERE = osp.dirname(osp.abspath(__file__))
sys.path[:0] = [osp.dirname(HERE), HERE]
import tiny  # noqa: E402

import al_label  # noqa: E402
import al_patch  # noqa: E402
import al_report  # noqa: E402

al_label.hook(), al_report.hook()  # some settings are theirs
TARGETS = ((Runner, 'train'), (Runner, 'build_dataloader'), (mmcv.utils.ext_loader, 'load_ext'))


def raw() -> list:
    return [vars(owner)[name] for owner, name in TARGETS]


def strict_where(condition, *values, where=np.where):
    """``np.where`` as from numpy 2.5 on; before, a number that the array's type does not hold came out as another."""
    dtypes = [value.dtype for value in values if isinstance(value, np.ndarray) and value.dtype.kind in 'iu']
    for number in (value for value in values if type(value) is int and dtypes):
        if not np.iinfo(dtypes[0]).min <= number <= np.iinfo(dtypes[0]).max:
            raise OverflowError(f'Python integer {number} out of bounds for {dtypes[0]}')
    return where(condition, *values)


def everything_below(cls: type) -> list:
    return [cls, *(c for child in cls.__subclasses__() for c in everything_below(child))]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """The patch is after a test as it was before, and mmengine's singletons are gone."""
    gc.freeze()  # every data set of mmengine's collects garbage, which would otherwise visit all of torch each time
    before = raw()
    DefaultScope.get_instance('tests', scope_name='mmseg')
    monkeypatch.setattr(np, 'where', strict_where)
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)  # it asks compilers for their version: slow
    for module in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):  # so is yapf, wherever mmengine gets it from
        monkeypatch.setattr(f'{module}.FormatCode', lambda text, **kwargs: (text, True), raising=False)
    yield
    assert all(now is then for now, then in zip(raw(), before)), 'a test has left the patch in another state'
    for owner in (MMLogger, MessageHub, DefaultScope, *everything_below(Visualizer)):
        owner._instance_dict.clear()


@pytest.fixture
def ctrl_c_counts():
    """What a shell starts in the background ignores Ctrl-C, and hands that on to what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope='session', autouse=True)
def stack():
    """All of mmseg, imported after the patch, and sums in one order, as in the subprocesses."""
    from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def shared_data(tmp_path_factory):
    """The tiny data set, to read only."""
    return tiny.make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture
def make_cfg(tmp_path, shared_data):
    """A function that returns the tiny config, with an `al` block of these settings and with these keys changed."""

    def make(al=None, loop='iters', root=shared_data, changes=None, **top) -> Config:
        cfg = Config.fromstring(tiny.config_text(root, loop), '.py')
        cfg.work_dir = str(tmp_path / 'work')
        if al is not None:
            cfg.al = dict(dict(initial=4, budget=2, rounds=1), **al)
        cfg.merge_from_dict({**(changes or {}), **top})
        return cfg

    return make


@pytest.fixture
def build():
    """A function from a config to its runner, under a name of its own."""
    numbers = itertools.count()

    def from_cfg(cfg: Config) -> Runner:
        cfg.experiment_name = f'tiny_{next(numbers)}'
        return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)

    return from_cfg


@pytest.fixture
def train(build):
    """A function that trains a config and returns the runner and the rounds in its state file."""

    def train_and_read(cfg: Config) -> tuple:
        runner = build(cfg)
        runner.train()
        return runner, al_patch.read_state(osp.join(cfg.work_dir, al_patch.STATE_FILE))['rounds']

    return train_and_read


@pytest.fixture
def make_state(make_cfg, build):
    """A function from the `al` block, whole images to label in each round, and what `make_cfg` takes, to a state."""

    def make(al=None, asked=(), **kwargs) -> al_patch.State:
        runner = build(make_cfg(al or {}, **kwargs))
        pool, al = al_patch.Pool(runner.cfg), al_patch.parse_settings(runner.cfg.al)
        state = al_patch.State(dict(seed=0, config={}), runner.work_dir, al, runner, pool)
        for names in asked:
            for entry in state.rounds:
                entry.update(metrics={}, checkpoints=dict(last='iter_4.pth'), train_seconds=1.)
            al_patch.add_round(state, dict.fromkeys(names))
        return state

    return make


@pytest.fixture
def blind(shared_data, tmp_path):
    """The data set before anybody has labelled it."""
    root = shutil.copytree(shared_data, tmp_path / 'blind')
    shutil.rmtree(root / 'ann' / 'train')
    return str(root)


@pytest.fixture
def people(make_cfg, build, blind):
    """A function from a unit, options of the oracle and a pipeline to a run of ``People``."""

    def make(unit='image', pipeline=tiny.PLAIN, changes=None, **oracle) -> tiny.People:
        cfg = make_cfg(dict(unit=unit, initial=1, budget=1, rounds=3, oracle=dict(type='human', **oracle)), root=blind,
                       changes={**tiny.SHORT, 'train_dataloader.dataset.pipeline': pipeline, **(changes or {})})
        return tiny.People(cfg, build(cfg))

    return make


@pytest.fixture
def truth(shared_data):
    """A function from an image's name to its labels, 0 to 2 everywhere."""
    return lambda name: cv2.imread(osp.join(shared_data, 'ann', 'train', f'{name}.png'), cv2.IMREAD_UNCHANGED)
