"""Train with active learning: ``python al_train.py <config> [options]``, the options being those of tools/train.py.

The config needs an ``al = dict(...)`` block; ``dist_al_train.sh`` starts several processes. An error ends with one
paragraph and exit code 2; with ``AL_TRACEBACK=1`` its traceback stands before it. A start that came to nothing leaves
nothing.
"""
import argparse
import contextlib
import datetime
import glob
import json
import logging
import os
import os.path as osp
import re
import shutil
import sys
import time
import traceback
import warnings

import mmengine.device.utils
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner

import al_patch  # (it patches Runner; with this line any script of yours does active learning)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a segmentor with active learning')
    parser.error = wrong_option
    parser.add_argument('config', help='config file with an `al` block')
    parser.add_argument('--work-dir', help='where the state, logs and checkpoints go')
    parser.add_argument('--resume', action='store_true', help='go on with the run in the work dir')
    parser.add_argument('--amp', action='store_true', help='train and query in mixed precision')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config keys: key=value ...',
                        type=key_and_value)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def key_and_value(option: str) -> str:
    if '=' not in option:
        raise argparse.ArgumentTypeError(f'should be key=value, but got {option!r}')
    return option


def wrong_option(message: str) -> None:
    raise ValueError(f'{message} (--help shows all options)')


def init_cpu_processes(cfg: Config) -> None:
    """Let ``--launcher`` do without a GPU, where mmengine asks for one: gloo, the CPU, and BN for SyncBN."""
    mmengine.device.utils.DEVICE = 'cpu'
    import mmcv.cnn  # noqa: F401  (where SyncBN gets its name; after al_patch)
    seconds = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    if seconds is not None and not (al_patch.is_number(seconds) and seconds > 0):
        raise ValueError(f'`env_cfg.dist_cfg.timeout` should be a number of seconds above 0, but got {seconds!r}')
    torch.distributed.init_process_group('gloo', timeout=seconds and datetime.timedelta(seconds=seconds))
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                                 find_unused_parameters=cfg.get('find_unused_parameters', False))
    MODELS.register_module('SyncBN', force=True, module=torch.nn.BatchNorm2d)


def read_config(args: argparse.Namespace) -> Config:
    with al_patch.reading(args.config):
        cfg = Config.fromfile(args.config)
    with al_patch.reading('--cfg-options'):
        cfg.merge_from_dict(args.cfg_options or {})
    if cfg.get('al') is None:
        raise ValueError(f"{args.config} has no `al` block: add al = dict(budget=0.05), or use tools/train.py")
    cfg.setdefault('custom_imports', dict(imports=[], allow_failed_imports=True))
    given = cfg.custom_imports.imports
    cfg.custom_imports.imports = [*dict.fromkeys(  # for stock tools, which are given the configs of rounds
        ['al_patch', *([given] if isinstance(given, str) else given)])]
    seed = cfg.get('randomness', {}).get('seed')
    if seed is not None and not al_patch.is_int(seed):
        raise ValueError(f'`randomness.seed` should be an int >= 0, but got {seed!r}')
    cfg.resume = args.resume
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join(
        'work_dirs', osp.splitext(osp.basename(args.config))[0])
    if args.amp:
        if cfg.optim_wrapper.get('type', 'OptimWrapper') not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise ValueError(f'--amp needs optim_wrapper.type to be OptimWrapper, but got {cfg.optim_wrapper.type}')
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale=cfg.optim_wrapper.get('loss_scale', 'dynamic'))
    return cfg


def start(cfg: Config, launcher: str) -> Runner:
    """The runner of a config, on the device that there is or ``AL_DEVICE`` names."""
    cfg.launcher = launcher
    device = mmengine.device.utils.DEVICE = os.environ.get('AL_DEVICE') or mmengine.device.get_device()
    if launcher == 'pytorch' and device not in ('cuda', 'npu', 'mlu', 'musa'):  # mmengine has no group for others
        if device == 'cpu' or os.environ['WORLD_SIZE'] != '1':
            init_cpu_processes(cfg)
        else:
            cfg.launcher = 'none'
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def leave(cfg: Config, before: dict, whole: str) -> None:
    """Write an error's traceback into the log or, where the start has come to nothing, remove what it has made: then
    ``work_dir``, whose entries ``before`` are known, is as it was, and gone if there were none."""
    after = entries(cfg.work_dir)
    made = {name for name in after if name in (al_patch.LOCK_FILE, osp.basename(cfg.filename))
            or re.fullmatch(r'\d{8}_\d{6}', name) and name not in before}
    if any(after[name] != before.get(name) for name in after.keys() - made):
        with open(max(glob.glob(osp.join(glob.escape(cfg.work_dir), '*', '*.log')), key=osp.getmtime), 'a') as log:
            log.write(whole)
        return
    for path in (osp.join(cfg.work_dir, name) for name in made - before.keys()):
        shutil.rmtree(path) if osp.isdir(path) else os.remove(path)
    if not before:
        os.rmdir(cfg.work_dir)


def entries(folder: str) -> dict:
    """When what lies in a folder was last written, by name; nothing where there is no folder."""
    return {entry.name: entry.stat(follow_symlinks=False).st_mtime_ns
            for entry in os.scandir(folder)} if osp.isdir(folder) else {}


def main() -> None:
    before = None
    warnings.filterwarnings('ignore', '``build_loss`` would|Default ``avg_non_ignore``')  # mmseg's, in every round
    try:
        args = parse_args()
        cfg = read_config(args)
        before = entries(cfg.work_dir)
        start(cfg, args.launcher).train()
        end_processes()
    except KeyboardInterrupt:  # the log said when the round started how to go on: no traceback
        raise SystemExit(130) from None
    except Exception as error:
        error.__suppress_context__ = False  # al_patch has suppressed what lay behind it
        whole = traceback.format_exc()
        if '\nKeyboardInterrupt' in whole:  # mmengine makes a SyntaxError of it, while it formats a config
            raise SystemExit(130) from None
        if before is not None and os.environ.get('RANK', '0') == '0':
            with contextlib.suppress(OSError, ValueError):
                leave(cfg, before, whole)
        among_others = 'AL_ERRORS' in os.environ
        if among_others and not all_fail(error):
            raise
        if os.environ.get('AL_TRACEBACK') and os.environ.get('LOCAL_RANK', '0') == '0':
            print(whole, file=sys.stderr, flush=True)
        sys.stdout.flush()
        if among_others:
            os._exit(0)  # gloo can hang where its process group is destroyed
        print(in_one_line(error), file=sys.stderr)
        raise SystemExit(2) from None


def end_processes() -> None:
    """End those of gloo, if this is one, all at once: its threads can abort a process that Python ends. Other backends
    say on a GPU that they want to be put away."""
    if not torch.distributed.is_initialized():
        return
    if torch.distributed.get_backend() != 'gloo':
        torch.distributed.destroy_process_group()
    else:
        torch.distributed.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def all_fail(error: Exception) -> bool:
    """Whether all processes of this machine fail of one error, within some seconds. What to say then lies in files,
    where dist_al_train.sh finds it; if not, the launcher has to end those that wait for this one."""
    files = [osp.join(os.environ['AL_ERRORS'], str(i)) for i in range(int(os.environ['LOCAL_WORLD_SIZE']))]
    mine, until = files[int(os.environ['LOCAL_RANK'])], time.time() + 10
    with open(mine + '.tmp', 'w') as file:
        json.dump([str(error), in_one_line(error)], file)
    os.replace(mine + '.tmp', mine)
    while not all(map(osp.isfile, files)) and time.time() < until:
        time.sleep(.1)
    return all(osp.isfile(file) and json.load(open(file))[0] == str(error) for file in files)


def in_one_line(error: Exception) -> str:
    """An error that the files beside this one raise is meant to be read so; any other has its type, too, and a hint.
    What fails in a dataloader's worker has the worker's traceback in its text."""
    text, whole = str(error), ''.join(traceback.format_exception(error))
    if '\nOriginal Traceback' in text:
        text = text.rstrip().rpartition('\n')[2].partition(': ')[2]
    if isinstance(error, OSError) and error.filename:
        return (f'al_train.py: {osp.abspath(error.filename)} cannot be used ({error.strerror}): choose another place, '
                'or mend what is there')
    text, where = ' '.join(text.splitlines()), re.findall('^ *File "(.+?)", line', whole, re.M)[-1]
    if osp.basename(where).startswith('al_') and isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        return f'al_train.py: {text}'
    if isinstance(error, KeyError):
        text += ' is missing: has each step of the pipelines what it needs from those before it?'
    return f'al_train.py: {type(error).__name__}: {text} (AL_TRACEBACK=1 shows where)'


if __name__ == '__main__':
    main()
