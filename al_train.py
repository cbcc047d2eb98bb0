"""Train with active learning: ``python al_train.py <config> [options]``, the options being those of tools/train.py.

The config needs an ``al = dict(...)`` block; ``dist_al_train.sh`` starts several processes.
"""
import argparse
import os
import os.path as osp

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner

import al_patch  # noqa: F401  (patches Runner; with this line any script of yours does active learning)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a segmentor with active learning')
    parser.add_argument('config', help='config file with an `al` block')
    parser.add_argument('--work-dir', help='where the state, logs and checkpoints go')
    parser.add_argument('--resume', action='store_true', help='go on with the run in the work dir')
    parser.add_argument('--amp', action='store_true', help='train and query in mixed precision')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config keys: key=value ...')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def init_cpu_processes(cfg: Config) -> None:
    """Let ``--launcher`` do without a GPU, where mmengine asks for one: gloo, CPU gradients, and BN for SyncBN."""
    import mmcv.cnn  # noqa: F401  (where SyncBN gets its name; after al_patch)
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                                 find_unused_parameters=cfg.get('find_unused_parameters', False))
    MODELS.register_module('SyncBN', force=True, module=torch.nn.BatchNorm2d)


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if cfg.get('al') is None:
        raise SystemExit(f"{args.config} has no `al` block: add al = dict(strategy='entropy'), or use tools/train.py")
    cfg.launcher, cfg.resume = args.launcher, args.resume
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join(
        'work_dirs', osp.splitext(osp.basename(args.config))[0])
    if args.amp:
        if cfg.optim_wrapper.get('type', 'OptimWrapper') not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise SystemExit(f'--amp needs optim_wrapper.type to be OptimWrapper, but got {cfg.optim_wrapper.type}')
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale=cfg.optim_wrapper.get('loss_scale', 'dynamic'))
    if args.launcher == 'pytorch' and not torch.cuda.is_available():
        init_cpu_processes(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    try:
        runner.train()
    except KeyboardInterrupt:  # the log said when the round started how to go on: no traceback
        raise SystemExit(130) from None


if __name__ == '__main__':
    main()
