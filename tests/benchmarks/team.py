"""What a team asks without a run, measured: does ``ask`` choose as a run does, and what does it cost?

    python tests/benchmarks/team.py same [--only image-entropy ...]
    python tests/benchmarks/team.py cost CONFIG CHECKPOINT IMAGES

*same* trains the tiny runs of ``tests/same.py`` for a round and asks by that round's checkpoint, of the same pool, with
the same labels: all that is asked for has to be what the run asks for, id by id. *cost* is CPU time: of ``maps`` and
``ask`` and, by itself, of the query in ``ask``.
"""
import argparse
import os
import os.path as osp
import sys
import tempfile
import time

HERE = osp.dirname(osp.abspath(__file__))
sys.path[:0] = [osp.dirname(HERE)]
import same  # noqa: E402

sys.path[:0] = [osp.dirname(osp.dirname(HERE))]  # which that has taken away
import mmengine.config.config  # noqa: E402
import mmengine.runner.runner  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

import al_label  # noqa: E402
import al_patch  # noqa: E402
import al_report  # noqa: E402


def in_state(work_dir: str) -> al_patch.State:
    content = al_patch.read_state(osp.join(work_dir, al_patch.STATE_FILE))
    return al_patch.State(content, work_dir)


def same_choice(name: str, case, root: str, folder: str) -> str:
    """Whether ``ask`` chooses what the run does, in words."""
    os.makedirs(folder)
    config, work = osp.join(folder, 'config.py'), osp.join(folder, 'run')
    same.write_config(config, root, case._replace(al={**case.al, 'rounds': 1, 'stop': None, 'oracle': 'simulated'}))
    cfg = Config.fromfile(config)
    if isinstance(cfg.al.get('budget'), list):
        cfg.al.budget = cfg.al.budget[:1]
    cfg.work_dir, cfg.experiment_name, cfg.custom_hooks = work, name, []
    Runner.from_cfg(cfg).train()
    run = in_state(work)
    first, second = run.rounds
    labelled = osp.join(work, 'round_0', 'labelled')
    if not osp.isdir(labelled):
        labelled = osp.join(folder, 'labelled.txt')
        with open(labelled, 'w') as file:
            file.writelines(f'{name}\n' for name in first['asked'])
    al = {key: value for key, value in cfg.al.items() if key not in (
        'strategy', 'unit', 'budget', 'initial', 'rounds', 'stop', 'oracle', 'visualize', 'weights', 'overrides',
        'seed', 'query_with')}
    checkpoint = osp.join(work, 'round_0', first['checkpoints'][cfg.al.get('query_with', 'last')])
    try:
        al_label.ask(config, checkpoint, osp.join(root, 'img', 'train'), cfg.al.budget, osp.join(folder, 'ask'),
                     labelled, cfg.al.strategy, cfg.al.get('unit', 'image'), cfg.al.get('seed'),
                     [(f'al.{key}', value) for key, value in al.items()])
    except ValueError as error:
        return f'refused: {error}'
    asked = in_state(osp.join(folder, 'ask'))
    if asked.rounds[1]['asked'] != second['asked']:
        return f'DIFFERS: {second["asked"]} | {asked.rounds[1]["asked"]}'
    masks = [[al_patch.read_mask(state.mask_path(1, name)) for name, units in second['asked'].items() if units]
             for state in (run, asked)]
    return 'same' if all((a == b).all() for a, b in zip(*masks)) else 'DIFFERS in masks'


def compare(names: list) -> int:
    results = {}
    mmengine.runner.runner.collect_env = dict  # it asks compilers for their version, and yapf takes longer than a run
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)
    with tempfile.TemporaryDirectory() as folder:
        root = osp.join(folder, 'data')
        same.make_data(root)
        for name in names:
            results[name] = same_choice(name, same.CASES[name], root, osp.join(folder, name))
            print(f'{name:32} {results[name]}', file=sys.stderr, flush=True)
    n = sum(result == 'same' for result in results.values())
    print(f'{n} of {len(results)} are the same; not: '
          f'{", ".join(name for name, result in results.items() if result != "same") or "none"}')
    return any(result.startswith('DIFFERS') for result in results.values())


def cost(config: str, checkpoint: str, images: str) -> None:
    query, seconds = al_patch.query, {}

    def timed(name, function, *args):
        begin = time.process_time()
        result = function(*args)
        seconds[name] = time.process_time() - begin
        return result

    al_patch.query = lambda *args: timed('query', query, *args)
    with tempfile.TemporaryDirectory() as folder:
        timed('ask', al_label.ask, config, checkpoint, images, 100, osp.join(folder, 'ask'))
        timed('maps', al_report.maps, config, checkpoint, osp.join(folder, 'maps'), images)
    print(', '.join(f'{name} {value:.1f} s' for name, value in seconds.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('same').add_argument('--only', nargs='+', choices=same.CASES, metavar='NAME')
    costing = commands.add_parser('cost')
    for name in ('config', 'checkpoint', 'images'):
        costing.add_argument(name)
    args = parser.parse_args()
    if args.command == 'same':
        raise SystemExit(compare(args.only or list(same.CASES)))
    cost(args.config, args.checkpoint, args.images)


if __name__ == '__main__':
    main()
