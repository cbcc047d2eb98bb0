"""Whole runs that people label on a real Label Studio, against those with simulated labels: id by id. Then a picture of
a task, if Chromium is there. Called by label_studio.sh, when it has started the server:

    python tests/label_studio.py URL FOLDER
"""
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import requests

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from PIL import Image  # noqa: E402

import al_label  # noqa: E402
import al_patch  # noqa: E402

CLASSES, VOID = ['dark', 'grey', 'bright'], 200
SUPERPIXEL = dict(type='superpixel', n_segments=12, compactness=100.)
RUNS = {
    'image': dict(initial=4, budget=2),
    'region': dict(unit=dict(type='region', size=[8, 8]), initial=10, budget=7),
    'superpixel': dict(unit=SUPERPIXEL, initial=8, budget=6),
    'dominant': dict(unit=dict(SUPERPIXEL, label='dominant'), initial=8, budget=6)}


class Annotator:
    """Somebody who knows the hidden labels, logged in to the server."""

    def __init__(self, url: str, truth: str):
        self.url, self.truth, self.session = url, truth, requests.Session()
        self.session.trust_env = False
        for _ in range(600):
            try:
                if self.session.get(f'{url}/user/login/').ok:
                    break
            except requests.ConnectionError:
                time.sleep(1)
        done = self.session.post(f'{url}/user/login/', headers=dict(Referer=url), data=dict(
            email='me@example.com', password='tiny-tests', csrfmiddlewaretoken=self.session.cookies['csrftoken']))
        assert done.ok, done.text
        os.environ['LABEL_STUDIO_API_KEY'] = self.ask('POST', '/api/token/')['token']

    def ask(self, method: str, path: str, **what):
        response = self.session.request(method, self.url + path, headers={
            'X-CSRFToken': self.session.cookies['csrftoken'], 'Referer': self.url}, **what)
        assert response.ok, response.text
        return response.json() if response.content else None

    def project(self, work_dir: str) -> int:
        with open(os.path.join(work_dir, 'labels', 'server.json')) as file:
            title = json.load(file)['title']
        projects = self.ask('GET', '/api/projects', params=dict(page_size=100))['results']
        [project] = [each['id'] for each in projects if each['title'] == title]
        return project

    def answer(self, work_dir: str, is_dominant: bool) -> int:
        """Label all tasks that have no annotation: one brush a class; or, of one-class units, a stroke of a few pixels
        in the middle of each outline."""
        self.segments = os.path.join(work_dir, 'superpixels', '12_100.0')
        tasks = self.ask('GET', '/api/tasks', params=dict(project=self.project(work_dir), page_size=1000))['tasks']
        new = [task['id'] for task in tasks if not task['total_annotations']]
        for i in new:
            task = self.ask('GET', f'/api/tasks/{i}')
            path = os.path.join(self.truth, 'ann', 'train', f'{task["data"]["name"]}.png')
            label = cv2.imread(path, cv2.IMREAD_UNCHANGED)
            regions = [region for each in task['predictions'] for region in each['result']]
            answer = self.strokes(task['data']['name'], label, regions) if is_dominant else label
            result = [dict(type='brushlabels', from_name='label', to_name='image', original_width=48,
                           original_height=32, image_rotation=0, value=dict(
                               format='rle', rle=tiny.brush(answer == value), brushlabels=[name]))
                      for value, name in {**dict(enumerate(CLASSES)), 255: 'unlabelable'}.items()
                      if (answer == value).any()]
            self.ask('POST', f'/api/tasks/{i}/annotations', json=dict(result=regions + result, lead_time=1))
        return len(new)

    def strokes(self, name: str, label: np.ndarray, regions: list) -> np.ndarray:
        segments = cv2.imread(os.path.join(self.segments, f'{name}.png'), cv2.IMREAD_UNCHANGED)
        answer = np.full(label.shape, 254)
        for unit in {int(region['id'].split('_')[1]) for region in regions if region['from_name'] == 'asked'}:
            values, counts = np.unique(label[segments == unit], return_counts=True)
            rows, columns = np.nonzero(segments == unit)
            answer[rows[:3], columns[:3]] = values[counts.argmax()]
        return answer


def train(cfg: Config, name: str, **changes) -> dict:
    """A start of a run, or another; its state then."""
    cfg = cfg.copy()
    cfg.merge_from_dict(changes)
    cfg.experiment_name = name
    DefaultScope.get_instance(name, scope_name='mmseg')
    Runner.from_cfg(cfg).train()
    return al_patch.read_state(os.path.join(cfg.work_dir, al_patch.STATE_FILE))


def make_config(root: str, work_dir: str, al: dict, **changes) -> Config:
    cfg = Config.fromstring(tiny.config_text(root), '.py')
    cfg.merge_from_dict({**tiny.NO_VAL, 'train_cfg.max_iters': 2, **changes})
    cfg.al, cfg.work_dir, cfg.log_level = al, work_dir, 'WARNING'
    return cfg


def compare(annotator: Annotator, name: str, roots: dict, folder: str) -> None:
    """A run with people against the one with simulated labels."""
    oracles = dict(simulated='simulated', human=dict(type='human', unlabelable=VOID))
    simulated, human = (make_config(roots[who], os.path.join(folder, who, name), dict(
        RUNS[name], rounds=2, oracle=oracle)) for who, oracle in oracles.items())
    expected, work_dir, k = train(simulated, f'{name}_simulated'), human.work_dir, 0
    state = train(human, f'{name}_human')
    while state['phase'] == 'label':
        for _ in range(2):  # the second makes no task
            al_label.main(['push', work_dir, *(['--to', annotator.url] + ['--upload'] * (name == 'image')) * (k == 0)])
        n = annotator.answer(work_dir, name == 'dominant')
        assert n == len(state['rounds'][k]['asked']), (n, k)
        if name == 'superpixel':  # as files, which hold all rounds: JSON and JSON-MIN by turns
            path = os.path.join(folder, f'export_{k}.json')
            with open(path, 'w') as file:
                json.dump(annotator.ask('GET', f'/api/projects/{annotator.project(work_dir)}/export', params=dict(
                    exportType=['JSON', 'JSON_MIN'][k % 2])), file)
            al_label.main(['import', work_dir, path])
        else:
            al_label.main(['pull', work_dir, '--wait'])
        k += 1
        state = train(human, f'{name}_human_{k}', resume=True)
    for key in ('asked', 'pixels', 'void_pixels'):
        ours, theirs = ([entry.get(key) for entry in each['rounds']] for each in (state, expected))
        assert ours == theirs, (name, key, ours, theirs)
    weights = [tiny.weights_at(cfg, 'round_2/iter_2.pth') for cfg in (simulated, human)]
    assert tiny.same(*weights), f'{name}: other weights'
    print(f'{name}: {k} rounds, the same ids, pixels and weights as with simulated labels', flush=True)


def photograph(annotator: Annotator, truth: str, folder: str) -> None:
    """A picture of the task of an image that has an earlier label, a prediction, and what is asked for now."""
    root = os.path.join(folder, 'large')
    for kind in ('img/train', 'img/val', 'ann/train', 'ann/val'):
        for path, _, files in os.walk(os.path.join(truth, kind)):
            for file in files:
                image = cv2.imread(os.path.join(path, file), cv2.IMREAD_UNCHANGED)
                image = cv2.resize(image, (480, 320), interpolation=cv2.INTER_CUBIC if kind[0] == 'i' else 0)
                os.makedirs(os.path.join(root, os.path.relpath(path, truth)), exist_ok=True)
                cv2.imwrite(os.path.join(root, os.path.relpath(path, truth), file), image)
    unit = dict(type='superpixel', n_segments=40)
    cfg = make_config(root, os.path.join(folder, 'picture'), dict(
        unit=unit, strategy='margin', per_image=True, initial=3, budget=3, oracle=dict(type='human')),
        **{'train_cfg.max_iters': 60, 'model.data_preprocessor.size': (320, 480)})
    state, inbox = train(cfg, 'picture_0'), os.path.join(cfg.work_dir, 'round_0', 'labels')
    shutil.copytree(os.path.join(root, 'ann', 'train'), inbox, dirs_exist_ok=True)
    state = train(cfg, 'picture_1', resume=True)
    assert state['round'] == 1
    al_label.main(['push', cfg.work_dir, '--to', annotator.url])
    project = annotator.project(cfg.work_dir)
    task = annotator.ask('GET', '/api/tasks', params=dict(project=project, page_size=9))['tasks'][3]['id']

    class Proxy(http.server.BaseHTTPRequestHandler):
        """Chromium's way to the server, logged in."""

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            headers = {'X-CSRFToken': annotator.session.cookies['csrftoken'], 'Referer': annotator.url,
                       'Content-Type': self.headers.get('Content-Type', '')}
            answer = annotator.session.request(self.command, annotator.url + self.path, data=body, headers=headers)
            self.send_response(answer.status_code)
            self.send_header('Content-Type', answer.headers.get('Content-Type', ''))
            self.send_header('Content-Length', str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_PATCH = do_PUT = do_GET

        def log_message(self, *args):
            pass

    proxy = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    picture = os.path.join(os.path.dirname(HERE), 'resources', 'label_studio.png')
    subprocess.run([
        'chromium', '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
        '--disable-background-networking', '--disable-component-update', '--disable-sync', '--hide-scrollbars',
        f'--user-data-dir={folder}/chromium', '--window-size=1500,900', '--virtual-time-budget=60000',
        f'--screenshot={picture}', f'http://127.0.0.1:{proxy.server_port}/projects/{project}/data?task={task}'],
        check=True, timeout=300, capture_output=True)
    Image.open(picture).quantize(128).save(picture, optimize=True)
    print(f'A task in a browser: {picture}')


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
    for name in RUNS:
        compare(annotator, name, dict(simulated=truth, human=blind), folder)
    if shutil.which('chromium'):
        photograph(annotator, truth, folder)


if __name__ == '__main__':
    main(*sys.argv[1:])
