"""Servers of annotation tools, played by small ones that answer as the tools' APIs do: what is pushed, once each, and
what is pulled; what goes wrong on the way changes nothing, and is told in a line."""
import http.server
import json
import os
import re
import socket
import threading
from email import message_from_bytes
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import tiny
from PIL import Image
from test_tools import CELL, CLASSES, brushes, files_in
from tiny import part

import al_label

pytest.importorskip('requests')
DAY = '2026-01-01T00:00:00Z'
PERSONAL, LEGACY = 'eyJh.refresh.s3cret', '0123456789abcdef' * 2 + '01234567'


class Server(http.server.ThreadingHTTPServer):
    """Answers by a method for each path; notes requests, and may be told to fail the next ones.

    Attributes:
        seen: Method and path of each request; ``sent``: what it held.
        faults: Path's pattern -> what its next requests meet: a status, 'down', 'half' or 'no JSON'.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.seen, self.sent, self.faults, self.lock = [], [], {}, threading.RLock()
        self.url = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()

    def handle_error(self, *args):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_GET(self):
        body, url = self.rfile.read(int(self.headers.get('Content-Length') or 0)), urlsplit(self.path)
        with self.server.lock:
            self.server.seen.append(f'{self.command} {url.path.rstrip("/")}')
            fault = next((faults.pop(0) for pattern, faults in self.server.faults.items()
                          if faults and re.search(pattern, self.server.seen[-1])), None)
            query = {key: values if key.endswith('[]') else values[0] for key, values in parse_qs(url.query).items()}
            if 'json' in self.headers.get('Content-Type', ''):
                body = json.loads(body or b'null')
            elif 'multipart' in self.headers.get('Content-Type', ''):
                whole = message_from_bytes(f'Content-Type: {self.headers["Content-Type"]}\n\n'.encode() + body)
                body = {part.get_filename() or part.get_param('name', header='content-disposition'):
                        part.get_payload(decode=True) for part in whole.get_payload()}
            self.server.sent.append(body)
            if fault == 'down':
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if isinstance(fault, int):
                status, answer = fault, dict(detail=f'you sent {dict(self.headers)}')
            else:
                status, answer = self.server.answer(self.command, url.path.rstrip('/'), query, body, self.headers)
        content = b'<html>' if fault == 'no JSON' else b'' if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if fault == 'half' else content)
        if fault == 'half':
            self.close_connection = True

    do_POST = do_PUT = do_PATCH = do_GET


class PlayedLabelStudio(Server):
    """What Label Studio 1.23.2 was seen to answer, where it matters."""

    def __init__(self):
        super().__init__()
        self.projects, self.tasks, self.storages, self.files = [], [], [], []
        self.exchanged, self.sees_files = 0, True

    def answer(self, method: str, path: str, query: dict, body, headers) -> tuple:
        if path == '/api/version':
            return 200, {'release': '1.23.2', 'label-studio-os-package': {'version': '1.23.2'}}
        if path == '/api/token/refresh':
            self.exchanged += 1
            return (200, dict(access=f'access {self.exchanged}')) if body == dict(refresh=PERSONAL) else (401, {})
        if headers['Authorization'] not in (f'Token {LEGACY}', f'Bearer access {self.exchanged}'):
            return 401, dict(detail=f'not {headers["Authorization"]}')
        if path == '/api/projects':
            if method == 'POST':
                self.projects.append(dict(body, id=len(self.projects) + 7))
                return 201, self.projects[-1]
            found = self.projects[(int(query['page']) - 1) * 2:][:2]  # two a page
            return 200, dict(results=found, next='more' if found and found[-1] is not self.projects[-1] else None)
        if path == '/api/tasks':
            mine = [task for task in self.tasks if str(task['project']) == query['project']]
            size = int(query['page_size'])
            return 200, dict(total=len(mine), tasks=mine[(int(query['page']) - 1) * size:][:size])
        if path == '/api/storages/localfiles':
            if method == 'GET':
                return 200, self.storages
            if not self.sees_files:
                return 400, dict(non_field_errors=[f'Path {body["path"]} does not exist'])
            self.storages.append(body)
            return 201, body
        if path.startswith('/api/import/file-upload/'):
            return 200, dict(file=f'upload/{path.rpartition("/")[2]}-x.png')
        if path.endswith('/import') and query.get('commit_to_project') == 'false':
            self.files += body.items()
            return 201, dict(file_upload_ids=[*range(len(self.files) - len(body), len(self.files))])
        if path.endswith('/import'):
            self.tasks += [dict(task, id=len(self.tasks) + i, project=int(path.split('/')[3]), annotations=[],
                                total_annotations=0, cancelled_annotations=0) for i, task in enumerate(body)]
            return 201, dict(task_count=len(body))
        if path.endswith('/export'):
            assert query['exportType'] == 'JSON'
            return 200, [task for task in self.tasks if str(task['id']) in query['ids[]']]
        return 200, dict(path=path)

    def label(self, name: str, result: list, **more) -> None:
        for task in self.tasks:
            if task['data']['name'] == name:
                key = 'cancelled_annotations' if more.get('was_cancelled') else 'total_annotations'
                task['annotations'].append(dict(id=1, result=result, **more))
                task[key] += 1


@pytest.fixture
def label_studio(monkeypatch):
    server = PlayedLabelStudio()
    monkeypatch.setenv('LABEL_STUDIO_API_KEY', PERSONAL)
    monkeypatch.setattr(al_label, 'POLL_SECONDS', .1)
    yield server
    server.shutdown()


@pytest.fixture
def run(people):
    run = people(CELL)
    run.masks = run.ask({name: [i] for i, name in enumerate(tiny.NAMES)})
    return run


def test_a_round_is_pushed_and_pulled(run, truth, label_studio, monkeypatch):
    """In lots; a second push makes no task; only what is submitted comes back, and the rest is named."""
    label_studio.projects += [dict(id=i, title=f'{i}') for i in (1, 2, 3)]
    monkeypatch.setattr(al_label, 'lots', lambda items, title, size: [items[i:i + 5] for i in range(0, len(items), 5)])
    text = al_label.push(run.state, f'{label_studio.url}/')
    assert text == f'12 new tasks of the 12 images of round 0 are on {label_studio.url}'
    assert [task['data']['name'] for task in label_studio.tasks] == tiny.NAMES
    project = label_studio.projects[-1]
    assert 'each region that is outlined as "asked"' in project['expert_instruction'] and project['show_instruction']
    assert '<Label value="asked"' in project['label_config']
    assert [storage['path'] for storage in label_studio.storages] == [f'{run.root}/img/train']
    assert len([path for path in label_studio.seen if path.endswith('/import')]) == 3
    assert label_studio.sent[-1] == dict(model_version='round_0')
    assert al_label.push(run.state).startswith('0 new tasks of the 12') and len(label_studio.projects) == 4
    for name in tiny.NAMES[:2]:
        label_studio.label(name, brushes(part(truth(name), run.masks[name])))
    label_studio.label('a/02', brushes(truth('a/02')), was_cancelled=True)
    outcome = al_label.pull(run.state)
    assert outcome.text.splitlines()[:3] == [
        '2 of the 12 regions that round 0 asks for are answered',
        f'Not submitted: {", ".join(tiny.NAMES[3:])}', 'Cancelled by an annotator: a/02']
    assert (outcome.taken, outcome.missing) == (2, 10)
    for name in tiny.NAMES[:2]:
        assert np.array_equal(Image.open(run.inbox(0, name)), part(truth(name), run.masks[name]))


def test_images_that_the_server_does_not_see_are_uploaded(run, label_studio):
    label_studio.sees_files = False
    why = f'400: .* does not exist.*If the server cannot see {run.root}/img/train, use --upload'
    with pytest.raises(ValueError, match=why):
        al_label.push(run.state, label_studio.url)
    assert not label_studio.tasks
    al_label.push(run.state, label_studio.url, upload=True)
    sent = [(name, content) for name, content in label_studio.files]
    assert sent == [(f'{name[2:]}.png', open(f'{run.root}/img/train/{name}.png', 'rb').read()) for name in tiny.NAMES]
    assert [task['data']['image'] for task in label_studio.tasks] == [f'/data/upload/{i}-x.png' for i in range(12)]
    run.ask({'a/05': [7]})
    al_label.push(run.state)  # it is remembered
    assert label_studio.tasks[-1]['data']['image'] == '/data/upload/12-x.png'


def test_a_push_that_was_cut_off_goes_on(run, label_studio, monkeypatch):
    monkeypatch.setattr(al_label, 'lots', lambda items, title, size: [[item] for item in items])
    label_studio.faults = {'POST .*/import': [None, None, None, 500]}
    with pytest.raises(al_label.Unreachable, match='answers POST /api/projects/7/import with 500: '):
        al_label.push(run.state, label_studio.url)
    assert len(label_studio.tasks) == 3
    assert al_label.push(run.state).startswith('9 new tasks') and len(label_studio.projects) == 1
    assert [task['data']['name'] for task in label_studio.tasks] == tiny.NAMES


@pytest.mark.parametrize('token', [PERSONAL, LEGACY])
def test_tokens(run, label_studio, monkeypatch, token, capsys):
    """A personal one is exchanged, and again when what it was exchanged for has run out; none is ever told."""
    monkeypatch.setenv('LABEL_STUDIO_API_KEY', token)
    label_studio.faults = {'GET /api/tasks': [401]}
    if token == LEGACY:
        with pytest.raises(al_label.Refused, match='does not take the token in LABEL_STUDIO_API_KEY for GET /api/t'):
            al_label.push(run.state, label_studio.url)
    al_label.push(run.state, label_studio.url)
    assert label_studio.exchanged == (2 if token == PERSONAL else 0)
    label_studio.faults = {'GET /api/projects': [400, 500]}
    for _ in range(2):
        with pytest.raises(ValueError, match='answers GET /api/projects with .00') as error:
            al_label.pull(run.state)
        assert token not in str(error.value) and 'access' not in str(error.value)
    said = [path for path, content in files_in(run.state.work_dir).items() if token.encode() in content]
    assert not said
    monkeypatch.setenv('LABEL_STUDIO_API_KEY', 'eyJh.wrong.one')
    with pytest.raises(al_label.Refused, match='does not take the token in LABEL_STUDIO_API_KEY for POST /api/token'):
        al_label.pull(run.state)
    monkeypatch.delenv('LABEL_STUDIO_API_KEY')
    with pytest.raises(ValueError, match='needs a token: set it in the environment, as LABEL_STUDIO_API_KEY$'):
        al_label.pull(run.state)


FAULTS = [(401, 'Refused', 'not take|not taken'), (404, 'Refused', '404'), (500, 'Unreachable', '500'),
          ('down', 'Unreachable', 'does not answer'), ('half', 'Unreachable', 'not answer|did not'),
          ('no JSON', 'Unreachable', 'did not')]


@pytest.mark.parametrize('where', ['GET /api/projects', 'GET /api/tasks', 'GET /api/projects/7/export'])
def test_what_goes_wrong_is_told_in_a_line_and_changes_nothing(run, truth, label_studio, where):
    al_label.push(run.state, label_studio.url)
    label_studio.label('a/01', brushes(truth('a/01')))
    before = files_in(run.state.work_dir)
    for fault, kind, why in FAULTS:
        label_studio.faults = {f'^{where}$': [fault, fault]}
        with pytest.raises(getattr(al_label, kind), match=why) as error:
            al_label.pull(run.state)
        assert '\n' not in str(error.value) and label_studio.url in str(error.value)
        assert files_in(run.state.work_dir) == before
    label_studio.faults = {}
    assert al_label.pull(run.state).taken == 1


def test_it_waits_until_all_is_there(run, truth, label_studio, capsys):
    """A server that is away for a while is asked again."""
    al_label.push(run.state, label_studio.url)
    label_studio.label('a/01', brushes(truth('a/01')))

    def label_the_rest() -> None:
        with label_studio.lock:
            label_studio.faults = {'GET /api/tasks': ['down', 500]}
            for name in {*tiny.NAMES} - {'a/01'}:
                label_studio.label(name, brushes(truth(name)))

    timer = threading.Timer(3, label_the_rest)
    timer.start()
    al_label.main(['pull', run.state.work_dir, '--wait'])
    timer.join()
    said = capsys.readouterr().out
    assert [*dict.fromkeys(line.split(' regions')[0] for line in said.splitlines() if 'answered' in line)] == [
        '1 of the 12', '12 of the 12']
    assert 'it is asked again' in said and run.accept() == 'train'


@pytest.mark.parametrize('url, why', [
    ('localhost:8080', 'should be given as http://HOST:PORT .*, but got .localhost:8080'),
    ('http://me:word@host', "should be given as .*, but got 'host'"), ('http://127.0.0.1:9', 'does not answer')])
def test_addresses(run, url, why, monkeypatch):
    monkeypatch.setenv('LABEL_STUDIO_API_KEY', PERSONAL)
    with pytest.raises(ValueError, match=why) as error:
        al_label.push(run.state, url)
    assert 'word' not in str(error.value) and not os.path.exists(al_label.server_path(run.state))


def test_a_server_that_is_neither(run, label_studio):
    label_studio.answer = lambda *args: (200, dict(name='a shop'))
    with pytest.raises(ValueError, match='should be a Label Studio or a CVAT, but answers as neither'):
        al_label.push(run.state, label_studio.url)
    with pytest.raises(ValueError, match='^no server is remembered: push first, by python al_label.py push .* --to'):
        al_label.pull(run.state)


# --- CVAT ------------------------------------------------------------------------------------------------------------


class PlayedCvat(Server):
    """What CVAT's API description says, in the parts that its SDK asks for: that checks both sides."""

    def __init__(self):
        super().__init__()
        self.tasks, self.labels, self.shapes, self.frames, self.guides, self.states = [], [], [], [], [], []

    def answer(self, method: str, path: str, query: dict, body, headers) -> tuple:
        if path == '/api/server/about':
            return 200, dict(name='Computer Vision Annotation Tool', description='', version='2.80.0',
                             logo_url='', subtitle='')
        if path == '/api/version':
            return 404, {}
        if headers['Authorization'] != 'Bearer cvat-s3cret':
            return 401, dict(detail=f'not {headers["Authorization"]}')
        if path == '/api/users/self':
            return 200, dict(id=1, username='me', first_name='', last_name='', url='', email='', groups=[])
        if path == '/api/tasks' and method == 'POST':
            self.tasks.append(dict(self.task(body['name']), id=len(self.tasks) + 1))
            self.labels = [dict(label, id=11 + i, type='any', attributes=[]) for i, label in enumerate(body['labels'])]
            return 201, self.tasks[-1]
        if path == '/api/tasks':
            return 200, self.page([task for task in self.tasks if task['name'] == query['name']])
        if path == '/api/guides':
            self.guides.append(body)
            return 201, dict(id=1, task_id=body['task_id'], project_id=None, created_date=DAY, updated_date=DAY,
                             owner=None, markdown=body['markdown'], organization=None, is_public=False)
        if path == '/api/labels':
            return 200, self.page(self.labels)
        if path == '/api/jobs':
            return 200, self.page([self.job(i) for i in range(len(self.states))])
        if path.startswith('/api/requests/'):
            return 200, dict(id='rq', status='finished', message='', progress=1., operation=dict(
                type='create:task', target='task', task_id=1, format=None, name=None, job_id=None, project_id=None,
                function_id=None), created_date=DAY, owner=dict(id=1, username='me'))
        if path.endswith('/data'):
            if isinstance(body, dict):
                files = body.get('server_files') or [os.path.basename(n) for n in body if n.endswith('.png')]
                self.frames += sorted(files)
            if 'Upload-Finish' in headers or headers['Upload-Multiple'] is None and headers['Upload-Start'] is None:
                self.tasks[-1]['size'] = len(self.frames)
                self.states = ['new'] * -(-len(self.frames) // 5)  # a job for five images
            return 202 if headers['Upload-Multiple'] is None else 200, dict(rq_id='rq')
        if path.endswith('/data/meta'):
            frames = [dict(name=name, width=48, height=32, related_files=0) for name in self.frames]
            return 200, dict(frames=frames, size=len(frames), start_frame=0, stop_frame=len(frames) - 1,
                             image_quality=70, frame_filter='', deleted_frames=[], included_frames=None, chunk_size=36,
                             chunks_updated_date=DAY, storage_method='cache', storage='local',
                             media_type='imageset', cloud_storage_id=None, has_related_context=False)
        if path.endswith('/annotations'):
            if method == 'PUT':
                self.shapes = [dict(shape, id=i, group=0) for i, shape in enumerate(body['shapes'])]
            job = re.match('/api/jobs/([0-9]+)/', path)
            mine = range(5 * int(job[1]), 5 * int(job[1]) + 5) if job else range(999)
            return 200, dict(version=1, tags=[], tracks=[], shapes=[s for s in self.shapes if s['frame'] in mine])
        if re.fullmatch('/api/tasks/[0-9]+', path):
            return 200, self.tasks[int(path.rpartition('/')[2]) - 1]
        return 404, dict(path=path)

    @staticmethod
    def page(results: list) -> dict:
        return dict(count=len(results), next=None, previous=None, results=results)

    @staticmethod
    def task(name: str) -> dict:
        summary = dict(count=0, completed=0, validation=0, url='')
        return dict(id=1, name=name, size=0, mode='annotation', owner=None, assignee=None, bug_tracker='', overlap=0,
                    segment_size=20, status='annotation', subset='', dimension='2d', project_id=None, url='',
                    guide_id=None, organization=None, organization_id=None, jobs=summary, labels=dict(url=''),
                    created_date=DAY, updated_date=DAY,
                    source_storage=None, target_storage=None, data_original_chunk_type='imageset',
                    data_compressed_chunk_type='imageset', data_chunk_size=36, data=1, image_quality=70,
                    validation_mode=None, consensus_enabled=False, consensus_replicas=0)

    def job(self, i: int) -> dict:
        last = min(5 * i + 4, len(self.frames) - 1)
        return dict(id=i, url='', task_id=1, project_id=None, assignee=None, guide_id=None, dimension='2d',
                    bug_tracker='', status='annotation', stage='annotation', state=self.states[i], mode='annotation',
                    frame_count=last - 5 * i + 1, start_frame=5 * i, stop_frame=last, data_chunk_size=36,
                    data_original_chunk_type='imageset', data_compressed_chunk_type='imageset', type='annotation',
                    created_date=DAY, updated_date=DAY, organization=None,
                    organization_id=None, issues=dict(count=0, url=''), labels=dict(url=''), target_storage=None,
                    source_storage=None, assignee_updated_date=None, consensus_replicas=0, parent_job_id=None)


@pytest.fixture
def cvat(monkeypatch):
    pytest.importorskip('cvat_sdk')
    server = PlayedCvat()
    monkeypatch.setenv('CVAT_ACCESS_TOKEN', 'cvat-s3cret')
    yield server
    server.shutdown()


@pytest.mark.parametrize('upload', [True, False])
def test_a_task_of_cvat(run, truth, cvat, upload):
    """Submitted is what is in completed jobs; a second push makes no second task."""
    assert al_label.push(run.state, cvat.url, upload).startswith('12 new tasks of the 12 images')
    files = [f'{name}.png' for name in tiny.NAMES]
    assert [unquote(name) for name in cvat.frames] == files and ('%2F' in cvat.frames[0]) == upload
    assert [label['name'] for label in cvat.labels] == [*CLASSES, 'asked']
    assert 'each region' in cvat.guides[0]['markdown']
    assert {(shape['type'], shape['label_id'], shape['z_order']) for shape in cvat.shapes} == {('polygon', 14, -1)}
    assert [shape['points'] for shape in cvat.shapes][1] == [8., 0., 8., 8., 16., 8., 16., 0.]
    assert al_label.push(run.state).startswith('0 new tasks') and len(cvat.tasks) == 1
    assert al_label.pull(run.state).taken == 0
    cvat.states[0] = 'completed'
    for frame, name in enumerate(tiny.NAMES):  # image i is asked for region i
        y, x = frame // 6 * 8, frame % 6 * 8
        cell = truth(name)[y:y + 8, x:x + 8].reshape(-1)
        for c in np.unique(cell).tolist():
            edges = np.flatnonzero(np.diff(cell == c, prepend=False, append=cell[-1] != c))
            cvat.shapes.append(dict(
                type='mask', frame=frame, label_id=11 + c, z_order=0, attributes=[], source='manual', occluded=False,
                points=[*map(float, np.diff(edges, prepend=0)), x, y, x + 7, y + 7], id=99, group=0))
    outcome = al_label.pull(run.state)
    assert (outcome.taken, outcome.missing) == (5, 7)
    assert f'Not submitted: {", ".join(tiny.NAMES[5:])}' in outcome.text
    for name in tiny.NAMES[:5]:
        assert np.array_equal(Image.open(run.inbox(0, name)), part(truth(name), run.masks[name]))
    cvat.states = ['completed'] * 3
    assert al_label.pull(run.state).missing == 0 and run.accept() == 'train'


def test_a_push_to_cvat_that_was_cut_off_goes_on(run, cvat):
    for pattern, made in ('POST .*/data', 0), ('PUT .*/annotations', 12):
        cvat.faults = {pattern: [500] * 9}
        with pytest.raises(al_label.Unreachable, match=f'{cvat.url} cannot take .* .500.: '):
            al_label.push(run.state, cvat.url)
        assert (len(cvat.tasks), len(cvat.frames), cvat.shapes) == (1, made, [])
    cvat.faults = {}
    assert al_label.push(run.state).startswith('0 new') and (len(cvat.tasks), len(cvat.shapes)) == (1, 12)


@pytest.mark.parametrize('where', ['GET /api/tasks', 'GET /api/jobs/0/annotations'])
def test_what_goes_wrong_with_cvat_is_told_in_a_line_and_changes_nothing(run, cvat, where):
    al_label.push(run.state, cvat.url)
    cvat.states[0] = 'completed'
    before = files_in(run.state.work_dir)
    for fault, kind, why in FAULTS:
        cvat.faults = {f'^{where}$': [fault] * 9}
        with pytest.raises(getattr(al_label, kind), match=why) as error:
            al_label.pull(run.state)
        assert '\n' not in str(error.value) and cvat.url in str(error.value) and 's3cret' not in str(error.value)
        assert files_in(run.state.work_dir) == before
