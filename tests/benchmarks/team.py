"""What a team asks without a run, measured: does ``ask`` choose as a run does, and what does it cost?

    python tests/benchmarks/team.py same [--only image-entropy ...]
    python tests/benchmarks/team.py cost CONFIG CHECKPOINT IMAGES
    python tests/benchmarks/team.py suspects CONFIG OUT [--share .05] [--cfg-options ...]

*same* trains the tiny runs of ``tests/same.py`` for a round and asks by that round's checkpoint, of the same pool, with
the same labels: all that is asked for has to be what the run asks for, id by id. *cost* is CPU time: of ``maps`` and
``ask`` and, by itself, of the query in ``ask``. *suspects* trains a run of regions of which a share is labelled wrong,
each as another class of the data set, and looks for them: how many of the first 50 are wrong, and how many of the wrong
are among the first ``share`` of all; by models that were not trained on a unit, and by the newest.
"""
import argparse
import csv
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
import numpy as np  # noqa: E402
from mmengine.config import Config, DictAction  # noqa: E402
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


def swap(cfg: Config, share: float, folder: str) -> set:
    """Label maps of a config's training images in which a share of the units is of a wrong class; the config then reads
    them.

    Returns:
        Name and number of each wrong unit.
    """
    pool, rng, wrong = al_patch.Pool(cfg), np.random.default_rng(0), set()
    classes, size = len(pool.leaves[0].metainfo['classes']), tuple(cfg.al.unit['size'])
    for name in pool.names:
        label = pool.load_label(name).astype(np.uint8)
        units = al_patch.grid(label.shape, size)
        for i in np.flatnonzero(rng.random(units.number) < share).tolist():
            mask = units.mask(np.array([i]))
            counts = np.bincount(label[mask & (label < classes)], minlength=classes)
            if counts.any():  # what is all void has no class
                label[mask] = rng.choice(np.setdiff1d(np.arange(classes), counts.argmax()))
                wrong.add((name, i))
        al_patch.write_png(al_patch.png_path(folder, name), label)
    leaf = next(iter(al_patch.leaf_configs(cfg.train_dataloader.dataset).values()))
    leaf.data_prefix.seg_map_path, leaf.seg_map_suffix = osp.abspath(folder), '.png'
    return wrong


def find_wrong(config: str, out: str, share: float, options: dict) -> None:
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options or {})
    cfg.work_dir, resumed = osp.join(out, 'run'), osp.isdir(osp.join(out, 'run'))
    Runner.from_cfg(Config(dict(cfg, work_dir=osp.join(out, 'first'), experiment_name='first')))  # sets the scope
    wrong = swap(cfg, share, osp.join(out, 'ann'))
    if not resumed:
        Runner.from_cfg(cfg).train()
    state = in_state(cfg.work_dir)
    total = sum(units[0] for entry in state.rounds for units in entry['asked'].values())
    stock_look = al_label.second_look().look

    def newest(self):
        checkpoint, last = self.run.checkpoint, len(self.run.rounds) - 1
        self.run.checkpoint = lambda k, which: checkpoint(last, which)
        return stock_look(self)

    for what, look in {'not trained on it': stock_look, 'newest': newest}.items():
        al_label.second_look().look = look
        folder = osp.join(out, what.replace(' ', '_'))
        al_label.suspects(cfg.work_dir, folder, round(share * total))
        with open(osp.join(folder, 'suspects.csv'), newline='') as file:
            rows = list(csv.DictReader(file))
        hits = np.array([(row['image'], int(row['unit'])) in wrong for row in rows])
        masks = {name: state_mask(state, name) for name in state.labelled()}
        there = sum(masks[name].reshape(-1)[al_patch.grid(masks[name].shape, tuple(cfg.al.unit['size'])).members(
            np.array([i]))[1]].all() for name, i in wrong if name in masks)
        print(f'{what}: {total} units, of which {there} are wrong; precision at 50: {hits[:50].mean():.2f} (random '
              f'{there / total:.2f}), recall at {share:.0%}: {hits.sum() / there:.2f} (random {share:.2f})', flush=True)


def state_mask(state: al_patch.State, name: str) -> np.ndarray:
    return al_patch.read_mask(state.mask_path(state.labelled()[name], name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('same').add_argument('--only', nargs='+', choices=same.CASES, metavar='NAME')
    costing = commands.add_parser('cost')
    for name in ('config', 'checkpoint', 'images'):
        costing.add_argument(name)
    finding = commands.add_parser('suspects')
    finding.add_argument('config')
    finding.add_argument('out')
    finding.add_argument('--share', type=float, default=.05)
    finding.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    if args.command == 'suspects':
        return find_wrong(args.config, args.out, args.share, args.cfg_options)
    if args.command == 'same':
        raise SystemExit(compare(args.only or list(same.CASES)))
    cost(args.config, args.checkpoint, args.images)


if __name__ == '__main__':
    main()
