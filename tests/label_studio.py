"""Whole runs that people label on a real Label Studio, against those with simulated labels: id by id. Called by
label_studio.sh, with the server's address; the token is in LABEL_STUDIO_API_KEY.

    python tests/label_studio.py URL [FOLDER]
"""
import json
import os
import shutil
import sys
import tempfile

import requests

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

import al_label  # noqa: E402
import al_patch  # noqa: E402

CLASSES, VOID = ['dark', 'grey', 'bright'], 200
SUPERPIXEL = dict(type='superpixel', n_segments=12, compactness=100.)
RUNS = {
    'image': dict(initial=4, budget=2),
    'region': dict(unit=dict(type='region', size=[8, 8]), initial=10, budget=7),
    'superpixel': dict(unit=SUPERPIXEL, initial=8, budget=6),
    'dominant': dict(unit=dict(SUPERPIXEL, label='dominant'), initial=8, budget=6)}


def brush(mask: np.ndarray) -> list:
    """A mask as Label Studio's RLE, without any run: one value after another, in blocks of up to 8."""
    values = mask.reshape(-1).repeat(4).astype(int) * 255
    bits = f'{values.size:032b}{7:05b}' + ''.join(f'{n - 1:04b}' for n in (3, 4, 8, 16))
    for block in np.split(values, range(8, values.size, 8)):
        bits += f'000{len(block) - 1:03b}' + ''.join(f'{value:08b}' for value in block)
    return [int(bits[i:i + 8].ljust(8, '0'), 2) for i in range(0, len(bits), 8)]


class Annotator:
    """Somebody who knows the hidden labels, at the server's API."""

    def __init__(self, url: str, truth: str):
        self.url, self.truth, self.session = url, truth, requests.Session()
        self.session.trust_env = False

    def ask(self, method: str, path: str, **what):
        access = requests.post(f'{self.url}/api/token/refresh', json=dict(refresh=os.environ['LABEL_STUDIO_API_KEY']))
        response = self.session.request(method, self.url + path, headers=dict(
            Authorization=f'Bearer {access.json()["access"]}'), **what)
        assert response.ok, response.text
        return response.json() if response.content else None

    def answer(self, title: str, is_dominant: bool) -> int:
        """Label all tasks that have no annotation: one brush a class; or, of one-class units, a stroke of a few pixels
        in the middle of each outline."""
        projects = self.ask('GET', '/api/projects', params=dict(page_size=100))['results']
        [project] = [each['id'] for each in projects if each['title'] == title]
        tasks = self.ask('GET', '/api/tasks', params=dict(project=project, page_size=1000))['tasks']
        new = [task['id'] for task in tasks if not task['total_annotations']]
        for i in new:
            task = self.ask('GET', f'/api/tasks/{i}')
            path = os.path.join(self.truth, 'ann', 'train', f'{task["data"]["name"]}.png')
            label = cv2.imread(path, cv2.IMREAD_UNCHANGED)
            regions = [region for each in task['predictions'] for region in each['result']]
            answer = self.strokes(task['data']['name'], label, regions) if is_dominant else label
            result = [dict(type='brushlabels', from_name='label', to_name='image', original_width=48,
                           original_height=32, image_rotation=0, value=dict(
                               format='rle', rle=brush(answer == value), brushlabels=[name]))
                      for value, name in {**dict(enumerate(CLASSES)), 255: 'unlabelable'}.items()
                      if (answer == value).any()]
            self.ask('POST', f'/api/tasks/{i}/annotations', json=dict(result=regions + result, lead_time=1))
        return len(new)

    def strokes(self, name: str, label: np.ndarray, regions: list) -> np.ndarray:
        segments, answer = self.segments(name), np.full(label.shape, 254)
        for unit in {int(region['id'].split('_')[1]) for region in regions if region['from_name'] == 'asked'}:
            values, counts = np.unique(label[segments == unit], return_counts=True)
            rows, columns = np.nonzero(segments == unit)
            answer[rows[:3], columns[:3]] = values[counts.argmax()]
        return answer

    def segments(self, name: str) -> np.ndarray:
        return cv2.imread(os.path.join(self.folder, f'{name}.png'), cv2.IMREAD_UNCHANGED)


def train(cfg: Config, name: str, **changes) -> dict:
    """A start of a run, or another; its state then."""
    cfg = cfg.copy()
    cfg.merge_from_dict(changes)
    cfg.experiment_name = name
    DefaultScope.get_instance(name, scope_name='mmseg')
    Runner.from_cfg(cfg).train()
    return al_patch.read_state(os.path.join(cfg.work_dir, al_patch.STATE_FILE))


def main(url: str, folder: str) -> None:
    from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    al_label.POLL_SECONDS = 1
    truth = tiny.make_data(os.path.join(folder, 'truth'))
    for name in tiny.NAMES:
        path = os.path.join(truth, 'ann', 'train', f'{name}.png')
        label = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        label[:, 44:] = 255
        cv2.imwrite(path, label)
    blind = shutil.copytree(truth, os.path.join(folder, 'blind'))
    shutil.rmtree(os.path.join(blind, 'ann', 'train'))
    annotator = Annotator(url, truth)
    for name, al in RUNS.items():
        al, runs = dict(al, rounds=2), {}
        for who, root in dict(simulated=truth, human=blind).items():
            cfg = runs[who] = Config.fromstring(tiny.config_text(root), '.py')
            cfg.merge_from_dict({**tiny.NO_VAL, 'train_cfg.max_iters': 2})
            cfg.work_dir, cfg.log_level = os.path.join(folder, who, name), 'WARNING'
            cfg.al = dict(al, oracle=dict(type='human', unlabelable=VOID) if who == 'human' else 'simulated')
        expected = train(runs['simulated'], f'{name}_simulated')
        state, work_dir = train(runs['human'], f'{name}_human'), runs['human'].work_dir
        annotator.folder = os.path.join(work_dir, 'superpixels', '12_100.0')
        k = 0
        while state['phase'] == 'label':
            for _ in range(2):  # the second makes no task
                al_label.main(['push', work_dir, *['--to', url, *['--upload'] * (name == 'image')] * (k == 0)])
            with open(os.path.join(work_dir, 'labels', 'server.json')) as file:
                title = json.load(file)['title']
            n = annotator.answer(title, name == 'dominant')
            assert n == len(state['rounds'][k]['asked']), (n, k)
            al_label.main(['pull', work_dir, '--wait'])
            k += 1
            state = train(runs['human'], f'{name}_human_{k}', resume=True)
        for key in ('asked', 'pixels', 'void_pixels', 'spent'):
            ours, theirs = ([entry.get(key) for entry in each['rounds']] for each in (state, expected))
            assert ours == theirs, (name, key, ours, theirs)
        weights = [tiny.weights_at(cfg, 'round_2/iter_2.pth') for cfg in runs.values()]
        assert tiny.same(*weights), f'{name}: other weights'
        print(f'{name}: equal to the simulated run, in {k} rounds of '
              f'{json.dumps([len(entry["asked"]) for entry in state["rounds"]])} images')


if __name__ == '__main__':
    main(sys.argv[1].rstrip('/'), sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
