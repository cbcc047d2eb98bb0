"""A data set, a network and a config so small that a round takes a tenth of a second, and what the configs import."""
import base64
import glob
import json
import os
import os.path as osp
import select
import shutil
import subprocess
import sys
from typing import Optional

import cv2
import mmengine
import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.runner import Runner
from mmseg.registry import HOOKS, MODELS, RUNNERS
from PIL import Image

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
SHAPE = 32, 48
NAMES = [f'a/{i:02d}' for i in range(6)] + [f'b/{i:02d}' for i in range(6, 12)]  # twelve training images in two folders
CONFIG = '''
default_scope = 'mmseg'
custom_imports = dict(imports=['al_patch', 'tiny'])
classes = dict(classes=('dark', 'grey', 'bright'), palette=[[0, 0, 0], [90, 90, 90], [200, 200, 200]])
data = dict(type='BaseSegDataset', data_root={root!r}, metainfo=classes, img_suffix='.png', seg_map_suffix='.png')
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type={sampler!r}, shuffle=True),
    dataset=dict(**data, data_prefix=dict(img_path='img/train', seg_map_path='ann/train'), pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='RandomFlip', prob=0.5),
        dict(type='PackSegInputs')]))
val_dataloader = test_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**data, data_prefix=dict(img_path='img/val', seg_map_path='ann/val'), pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]))
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[128] * 3, std=[64] * 3, size=({h}, {w}), seg_pad_val=255),
    backbone=dict(type='TinyBackbone'),
    decode_head=dict(type='FCNHead', in_channels=8, channels=8, num_convs=1, concat_input=False, num_classes=3,
                     norm_cfg=dict(type='SyncBN' if {sync} else 'BN'), loss_decode=dict(type='CrossEntropyLoss')),
    test_cfg=dict(mode='whole'))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
train_cfg = dict({loop})
val_cfg, test_cfg = dict(), dict()
default_hooks = dict(checkpoint=dict(type='CheckpointHook', {every}, save_best='mIoU'),
                     logger=dict(type='LoggerHook', interval=2))
randomness = dict(seed=0)
'''
LOOPS = dict(
    iters=dict(sampler='InfiniteSampler', every='interval=2, by_epoch=False',
               loop="type='IterBasedTrainLoop', max_iters=4, val_interval=4"),
    epochs=dict(sampler='DefaultSampler', every='interval=1',
                loop="type='EpochBasedTrainLoop', max_epochs=2, val_interval=2"))
# a config without validation
NO_VAL = {'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None, 'default_hooks.checkpoint.save_best': None}


def config_text(root: str, loop: str = 'iters', sync: bool = False) -> str:
    return CONFIG.format(root=str(root), h=SHAPE[0], w=SHAPE[1], sync=sync, **LOOPS[loop])


def log_of(work_dir) -> str:
    """All that a run has logged."""
    paths = sorted(glob.glob(osp.join(glob.escape(str(work_dir)), '*', '*.log')))
    return ''.join(open(path, encoding='utf-8').read() for path in paths)


def make_data(root: str) -> str:
    """Three bands, the brighter the higher the label, under noise that differs from image to image."""
    rng = np.random.default_rng(0)
    for split, names in dict(train=NAMES, val=[f'{i}' for i in range(4)]).items():
        for name in names:
            label = np.repeat(np.repeat(rng.integers(0, 3, (4, 6)), 8, 0), 8, 1).astype(np.uint8)
            image = 50 + 75 * label[..., None] + rng.normal(0, rng.uniform(2, 50), (*SHAPE, 3))
            for kind, array in dict(img=image.clip(0, 255).astype(np.uint8), ann=label).items():
                path = osp.join(root, kind, split, f'{name}.png')
                os.makedirs(osp.dirname(path), exist_ok=True)
                cv2.imwrite(path, array)
    return str(root)


@MODELS.register_module()
class TinyBackbone(BaseModule):
    """Two convolutions, at a quarter of the resolution."""

    def __init__(self, in_channels: int = 3):
        super().__init__()
        self.stem = torch.nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.stage = torch.nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> tuple:
        return (self.stage(self.stem(x).relu()).relu(), )


@RUNNERS.register_module()
class TinyRunner(Runner):
    """Counts its trainings, through a `train` of its own."""
    trained = []

    def train(self):
        self.trained.append(osp.basename(self.work_dir))
        return super().train()


@HOOKS.register_module()
class DieOnce(Hook):
    """Ends a process, of all ranks or one, after an iteration of a round, but only once: as `kill -9` does, or by a
    signal."""
    priority = 'LOWEST'

    def __init__(self, round: int, after: int, marker: str, rank: Optional[int] = None, number: Optional[int] = None):
        self.round, self.after, self.marker, self.rank, self.number = f'round_{round}', after, marker, rank, number

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        here = runner.work_dir.endswith(self.round) and runner.iter + 1 == self.after
        if here and self.rank in (None, runner.rank) and not osp.exists(self.marker):
            mmengine.put_text('', self.marker)
            if self.number is None:
                os._exit(9)
            os.kill(os.getpid(), self.number)


@HOOKS.register_module()
class NotesPoints(Hook):
    """Notes, in a file of each rank, which points of active learning it is called at; after a training it may fail."""

    def __init__(self, folder: str, fails_on: Optional[int] = None):
        self.folder, self.fails_on = folder, fails_on

    def note(self, point: str, state, *args) -> None:
        with open(osp.join(self.folder, f'rank_{state.runner.rank}.txt'), 'a') as file:
            print(point, state.round, *args, file=file)

    def after_al_train(self, state, trainer):
        self.note('train', state, osp.basename(trainer.work_dir))
        if state.runner.rank == self.fails_on:
            raise TypeError(f'of rank {self.fails_on}')

    def after_al_query(self, state, trainer, asked):
        self.note('query', state, osp.basename(trainer.work_dir), *asked)

    def after_al_ask(self, state, trainer):
        self.note('ask', state, trainer and osp.basename(trainer.work_dir))


def entropy_or_stop(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """A score that a test can make fail after so many calls, to stop a run between a training and its query."""
    if os.environ.get('TINY_STOP') == '0':
        raise InterruptedError('TINY_STOP is set')
    if os.environ.get('TINY_STOP'):
        os.environ['TINY_STOP'] = str(int(os.environ['TINY_STOP']) - 1)
    return -(probs_NCHW * probs_NCHW.log()).sum(1)


def entropy_or_fail(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """A score that fails on one rank alone: the others go on, and wait for it."""
    if os.environ.get('RANK') == '1' and os.environ.get('TINY_STOP') == '0':
        raise ArithmeticError('of rank 1')
    return entropy_or_stop(probs_NCHW) if os.environ.get('TINY_STOP') != '0' else probs_NCHW[:, 0]


def brightest(probs_NCHW: torch.Tensor, power: float = 1.) -> torch.Tensor:
    """A score of the user's own, with an option."""
    return probs_NCHW[:, -1]**power


def flat(probs_NCHW: torch.Tensor) -> torch.Tensor:
    """A score that tells nothing."""
    return 0 * probs_NCHW[:, 0]


def not_a_number(probs_NCHW: torch.Tensor) -> torch.Tensor:
    return probs_NCHW[:, 0] * torch.nan


def one_vector(probs_CHW: torch.Tensor, weights_NP: Optional[torch.Tensor]) -> torch.Tensor:
    """An embedding in which all are alike."""
    return torch.ones(1 if weights_NP is None else len(weights_NP), 2)


def always_first(scores_N: torch.Tensor, budget: int, generator: torch.Generator) -> torch.Tensor:
    """A wrong selection: it names one candidate again and again."""
    return torch.zeros(budget, dtype=torch.long)


def last_ones(scores_N: torch.Tensor, budget: int, generator: torch.Generator) -> torch.Tensor:
    """A selection of the user's own: the last of the pool."""
    return torch.arange(len(scores_N))[-budget:]


# --- the real scripts, and what they leave ---------------------------------------------------------------------------


def shell(*command, check: bool = True, **env) -> subprocess.CompletedProcess:
    """Run a command as a user's shell would, on the CPU, with the tests' helper module in reach."""
    path = osp.dirname(sys.executable) + os.pathsep + os.environ['PATH']
    env = {**os.environ, 'PATH': path, 'PYTHONPATH': osp.join(ROOT, 'tests'), 'OMP_NUM_THREADS': '1',
           'CUDA_VISIBLE_DEVICES': '', **env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=170)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def launch(config, gpus: int, work_dir, *options, **kwargs) -> subprocess.CompletedProcess:
    script = osp.join(ROOT, 'dist_al_train.sh')
    return shell('bash', script, str(config), str(gpus), '--work-dir', str(work_dir), *options, **kwargs)


def result(work_dir) -> list:
    """What a run came to: the images and the metrics of each round."""
    rounds = mmengine.load(osp.join(work_dir, 'al_state.json'))['rounds']
    return [(entry['asked'], entry.get('metrics')) for entry in rounds]


def write_config(folder, root: str, al: str = '', sync: bool = False, more: str = ''):
    path = folder / 'tiny_al.py'
    path.write_text(config_text(root, sync=sync) + (al and f'al = {al}\n') + more)
    return path


def saved(asked: list, phase: str = 'train', **more) -> dict:
    """A state that asked for so much in each round, as `al_state.json` holds it. All but the last are trained."""
    trained = dict(metrics={}, checkpoints=dict(last='iter_4.pth'), train_seconds=1.)
    rounds = [dict(asked=names, strategy={}, spent={}, **(trained if k < len(asked) - 1 or phase == 'query' else {}))
              for k, names in enumerate(asked)]
    return dict(dict(schema=3, phase=phase, round=len(asked) - 1, seed=0, ended=None, config={}, images=12,
                     settings=dict(oracle=dict(type='simulated')),
                     pixels=None, rounds=rounds, pool=NAMES), **more)


def counts(rounds: list) -> list:
    return [len(entry['asked']) for entry in rounds]


def checkpoint_of(cfg, rounds: list, k: int, which: str = 'last') -> str:
    """The path of a round's checkpoint."""
    return osp.join(cfg.work_dir, f'round_{k % len(rounds)}', rounds[k]['checkpoints'][which])


def weights_at(cfg, path: str) -> dict:
    return torch.load(osp.join(cfg.work_dir, path), weights_only=False)['state_dict']


def same(a: dict, b: dict, ending: str = '') -> bool:
    keys = [key for key in a if key.endswith(ending)]
    return bool(keys) and all(torch.equal(a[key], b[key]) for key in keys)


# --- people who label ------------------------------------------------------------------------------------------------

PLAIN = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
SHORT = {**NO_VAL, 'train_cfg.max_iters': 2}
VOID = 255


class People:
    """A run that people label, without its trainings: it asks for what a test says."""

    def __init__(self, cfg, runner):
        self.runner, self.root = runner, cfg.train_dataloader.dataset.data_root
        import al_patch
        al_patch.attach_companions(runner)
        self.pool, self.al = al_patch.Pool(runner.cfg), al_patch.parse_settings(runner.cfg.al)
        self.state = al_patch.State(dict(seed=0, config={}), runner.work_dir, self.al, runner, self.pool)

    def ask(self, asked: dict) -> dict:
        """What is asked for of each image, and its mask."""
        import al_patch
        asked = {name: ids if ids is None else np.array(ids) for name, ids in asked.items()}
        for entry in self.state.rounds:
            entry.update(metrics={}, checkpoints=dict(last='iter_2.pth'), train_seconds=1.)
        al_patch.add_round(self.state, asked)
        return {name: self.state.mask_of(name, ids) for name, ids in asked.items()}

    def accept(self, **oracle) -> str:
        """Resume: take what is there. Returns the phase then."""
        import al_patch
        al = al_patch.parse_settings({**self.al, 'oracle': {**self.al.oracle, **oracle}})
        content = al_patch.read_state(self.path(al_patch.STATE_FILE))
        self.state = al_patch.State(content, self.state.work_dir, al, self.runner, self.pool)
        al_patch.accept_labels(self.state)
        self.state.save()
        return self.state.phase

    def path(self, *parts) -> str:
        return osp.join(self.state.work_dir, *parts)

    def inbox(self, k: int, name: str) -> str:
        return self.path(f'round_{k}', 'labels', f'{name}.png')

    def own(self, name: str) -> str:
        return osp.join(self.root, 'ann', 'train', f'{name}.png')

    def hand_in(self, path: str, label: np.ndarray) -> None:
        os.makedirs(osp.dirname(path), exist_ok=True)
        cv2.imwrite(path, label)

    def store(self, name: str) -> tuple:
        """Classes and what is done, as the files have them."""
        return tuple(np.array(Image.open(self.path('labels', kind, f'{name}.png'))) for kind in ('classes', 'done'))

    def delivered(self, name: str, k: int = 0) -> dict:
        return json.load(open(self.path(f'round_{k}', 'to_label', 'delivered.json')))[name]

    def trained_on(self, k: int) -> dict:
        """Name -> the label map that the dataloader of a round gives."""
        import al_patch
        dataset = Runner.build_dataloader(dict(self.runner.cfg.train_dataloader, al=dict(
            state=self.path(al_patch.STATE_FILE), round=k, ignore_index=self.pool.ignore_index))).dataset
        names = [al_patch.image_name(dataset, dataset.get_data_info(i)) for i in range(len(dataset))]
        return {name: dataset[i]['data_samples'].gt_sem_seg.data[0].numpy() for i, name in enumerate(names)}

    @property
    def log(self) -> str:
        return log_of(self.state.work_dir)


def brush(mask: np.ndarray) -> list:
    """A mask as Label Studio's RLE, without any run: one value after another, in blocks of up to 8."""
    values = mask.reshape(-1).repeat(4).astype(int) * 255
    bits = f'{values.size:032b}{7:05b}' + ''.join(f'{n - 1:04b}' for n in (3, 4, 8, 16))
    for block in np.split(values, range(8, values.size, 8)):
        bits += f'000{len(block) - 1:03b}' + ''.join(f'{value:08b}' for value in block)
    return [int(bits[i:i + 8].ljust(8, '0'), 2) for i in range(0, len(bits), 8)]


def part(label: np.ndarray, *masks) -> np.ndarray:
    """A label map that has only this, and no label elsewhere."""
    return np.where(np.any(masks, axis=0), label, VOID).astype(np.uint8)


# --- a browser -------------------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium, spoken to through a pipe (its DevTools protocol); ``told`` is what its pages said of
    themselves: requests, the console, errors. It has no network."""
    PATH = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
             '--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars '
             '--remote-debugging-pipe').split()

    def __init__(self, folder):
        (to_read, self.to), (self.read_from, to_write) = os.pipe(), os.pipe()
        # the protocol has its ends at 3 and 4, whatever lies there now
        command = f'exec 8<&{to_read} 9>&{to_write}; exec 3<&8 4>&9 8<&- 9>&-; exec "$@"'
        self.process = subprocess.Popen(
            ['bash', '-c', command, 'bash', self.PATH, *self.FLAGS, f'--user-data-dir={folder}', 'about:blank'],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read), os.close(to_write)
        self.rest, self.number, self.told, self.session = b'', 0, [], None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in 'Page', 'Runtime', 'Log', 'Network':
            self.call(f'{domain}.enable')

    def call(self, method: str, **params) -> dict:
        """What the browser answers; what it tells meanwhile goes to ``told``."""
        self.number += 1
        call = dict(id=self.number, method=method, params=params)
        call.update(dict(sessionId=self.session) if self.session else {})
        os.write(self.to, json.dumps(call).encode() + b'\0')
        return self.next(lambda message: message.get('id') == self.number)['result']

    def next(self, is_it) -> dict:
        while True:
            while b'\0' not in self.rest:
                if not select.select([self.read_from], [], [], 60)[0]:
                    raise TimeoutError('the browser says nothing')
                self.rest += os.read(self.read_from, 1 << 20)
            message, self.rest = self.rest.split(b'\0', 1)
            message = json.loads(message)
            if 'method' in message:
                self.told.append((message['method'], message['params']))
            if is_it(message):
                return message

    def open(self, path, width: int = 1280, height: int = 900, scheme: str = 'light') -> None:
        """Open a file and wait until all of it is there."""
        self.told.clear()
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        self.call('Page.navigate', url=f'file://{path}')
        if not any(name == 'Page.loadEventFired' for name, _ in self.told):
            self.next(lambda message: message.get('method') == 'Page.loadEventFired')

    def run(self, script: str):
        """The value of a JavaScript expression, awaited."""
        done = self.call('Runtime.evaluate', expression=script, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in done, done
        return done['result'].get('value')

    def press(self, key: str, code: int) -> None:
        for kind in 'keyDown', 'keyUp':
            text = dict(text='\r') if key == 'Enter' and kind == 'keyDown' else {}
            self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, path, whole: bool = False) -> None:
        shot = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=whole)
        with open(path, 'wb') as file:
            file.write(base64.b64decode(shot['data']))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to), os.close(self.read_from)
