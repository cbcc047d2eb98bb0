"""What people are given when a run asks for labels, in ``round_<k>/to_label``: what to label, as masks and as pictures,
label maps to start from, and the same for CVAT and Label Studio. And what comes back: label files in
``round_<k>/labels``, and the store in ``labels`` that keeps them for training.

Beside ``al_patch.py`` it attaches itself to every run. By hand it writes what a round asks for again, or a share of it,
takes what an annotation tool exports, does both with a server of Label Studio or CVAT, sets a run back to a round, or
takes images out of it:

    python al_label.py export WORK_DIR [--to cvat | label-studio | png] [--part 2/3] [--with-images]
    python al_label.py import WORK_DIR FILE [--check]
    python al_label.py push WORK_DIR --to URL [--upload]
    python al_label.py pull WORK_DIR [--wait] [--check]
    python al_label.py rewind WORK_DIR K
    python al_label.py drop WORK_DIR IMAGE ...

And it answers what a team asks without a run:

    python al_label.py ask CONFIG CHECKPOINT --images FOLDER --budget N --out DIR      which of these images next?
    python al_label.py dataset WORK_DIR --out DIR                                       where is what we have paid for?
    python al_label.py suspects WORK_DIR --budget N --out DIR                           which labels look wrong?
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import copy
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import mimetypes
import os
import os.path as osp
import pathlib
import re
import secrets
import shutil
import sys
import tempfile
import time
import types
import warnings
import xml.etree.ElementTree as ET
import zipfile
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, NamedTuple
from urllib.parse import quote, unquote
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
from PIL import Image
from rich.progress import track
from scipy import ndimage

if TYPE_CHECKING:
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from al_patch import Pool, State

# ---------------------------------------------------------------------------------------------------------------------
# When: as a round asks, or on demand
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def hook() -> Hook:
    """The hook that exports when a round asks, pushes that to the server that people label on, and may wait for them. A
    run that is resumed while it waits asks again: then only what was not finished is exported."""
    import mmengine.hooks

    import al_patch

    def human(accept_partial=False, accept_unchanged=False, unlabelable=None, wait='end') -> None:
        """The options of people who label.

        Args:
            accept_partial: Go on with what there is; what is not labelled goes back to the pool.
            accept_unchanged: Take a file that was not touched since it was exported for an answer.
            unlabelable: The value of a label file for what was looked at and is of no class.
            wait: ``end`` the run until it is resumed, or ``poll``: stay, and look into the inbox again and again.
        """

    human.__annotations__.update(accept_partial=al_patch.Flag, accept_unchanged=al_patch.Flag,
                                 unlabelable=al_patch.MaybeCount, wait=al_patch.one_of('end', 'poll'))
    al_patch.ORACLES['human'] = human
    for name in 'region', 'superpixel':
        al_patch.UNITS[name] = with_label(al_patch.UNITS[name])

    class LabelHook(mmengine.hooks.Hook):

        def after_al_ask(self, state: State, trainer: Runner | None) -> None:
            if state.phase == 'label' and not al_patch.on_all_ranks(lambda _: is_finished(state), ['rank 0'])['rank 0']:
                export(state, trainer)
            if state.phase == 'label' and osp.isfile(server_path(state)):
                al_patch.on_rank_0(lambda: push_or_tell(state))

        def before_al_run(self, state: State) -> None:
            if is_human(state):
                check_oracle(state)

        def accept_labels(self, state: State, is_asking: bool = False) -> None:
            if is_human(state):
                accept_labels(state, is_asking)
            elif state.phase == 'label':
                accept_truth(state)

        def before_al_wait(self, state: State) -> None:
            log_request(state)
            if state.al.oracle.wait == 'poll':
                wait_for_labels(state)

    return LabelHook()


def with_label(unit: Callable) -> Callable:
    """A unit with an option more: ``label``, what an answer is: ``exact``, a class for each pixel, or ``dominant``, one
    class for all of them."""
    import inspect

    import al_patch

    @functools.wraps(unit)
    def labelled_unit(label: str = 'exact', **options) -> tuple:
        return unit(**options)

    known = inspect.signature(unit, eval_str=True)
    kind = al_patch.one_of('exact', 'dominant')
    labelled_unit.__signature__ = known.replace(parameters=[*known.parameters.values(), inspect.Parameter(
        'label', inspect.Parameter.KEYWORD_ONLY, default='exact', annotation=kind)])
    return labelled_unit


def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(prog='al_label.py', description='What a run of active learning gives to people, '
                                                                     'and takes from them')
    commands = parser.add_subparsers(required=True, dest='command')

    def add(function: Callable, what: str, *arguments: tuple) -> None:
        command = commands.add_parser(function.__name__.split('_')[0], help=what, description=what)
        command.add_argument('work_dir', metavar='WORK_DIR')
        command.set_defaults(function=function)
        for name, details in arguments:
            command.add_argument(name, **details)

    add(export_again, 'write again what a run that waits for labels asks for, or a share of it for one annotator',
        ('--to', dict(choices=TOOLS, help='for this tool alone')),
        ('--part', dict(type=share_of, metavar='I/N', help='share I of N, as one file')),
        ('--with-images', dict(action='store_true', help='the images are in that file, too')))
    add(import_labels, 'take what people have labelled: an export of Label Studio or CVAT, or label maps',
        ('file', dict(metavar='FILE', help='JSON or JSON-MIN of Label Studio; CVAT for images 1.1 or Segmentation mask '
                                           '1.1; a folder, or a zip, of PNGs')),
        ('--check', dict(action='store_true', help='say what would come of it, and write nothing')))
    add(push_tasks, 'make tasks of what a round asks for on a server of Label Studio or CVAT, once each',
        ('--to', dict(metavar='URL', help='of the server; default: that of the last time')),
        ('--upload', dict(action='store_true', help='hand the images over, which the server does not see')))
    add(pull_labels, 'take what was submitted on that server',
        ('--wait', dict(action='store_true', help='until all is there')),
        ('--check', dict(action='store_true', help='say what would come of it, and write nothing')))
    add(rewind, 'set a run back to a round; later ones are moved aside, and their labels are kept',
        ('round', dict(metavar='K', type=int, help='the round that asks anew')),
        ('--train', dict(action='store_true', help='train round K anew, too')))
    add(drop, 'take images out of a run: their cost stays in its figures, nothing else changes',
        ('names', dict(metavar='IMAGE', nargs='+', help='as the state file spells it')))
    add_team_commands(commands)
    options = vars(parser.parse_args(argv))
    name, function = options.pop('command'), options.pop('function')
    try:
        print(function(**options))
    except Exception as error:
        parser.exit(2, f'al_label.py {name}: {" ".join(str(error).split()) or repr(error)}\n')


def share_of(text: str) -> tuple[int, int]:
    """``'2/3'`` as numbers.

    Raises:
        argparse.ArgumentTypeError: It is no share.
    """
    found = re.fullmatch('([0-9]+)/([0-9]+)', text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f'should be I/N with I from 1 to N, such as 2/3, but got {text!r}')
    return part, parts


def export_again(work_dir: str, to: str | None = None, part: tuple | None = None, with_images: bool = False) -> str:
    """
    Args:
        to: One of ``TOOLS``; default: all.
        part: Number and count of a share, which is written as one file.
    """
    import al_patch
    tools = [to] if to else TOOLS
    with opened_run(work_dir) as state:
        check_waits(state, work_dir)
        if not (part or with_images) or not (folder_of(state) / 'to_label.txt').is_file():
            with al_patch.checkpoints_are_data():
                export(state, tools=tools)
        where = [folder_of(state)]
        if part or with_images:
            where = [pack(state, tool, part or (1, 1), with_images) for tool in tools]
        return f'What round {state.round} asks for is in {", ".join(map(str, where))}'


def import_labels(work_dir: str, file: str, check: bool = False) -> str:
    """Take what people have labelled into the inbox of the newest round, where the run finds it on ``--resume``."""
    with opened_run(work_dir) as state:
        return take_file(state, file, check)


def take_file(state: State, file: str, check: bool = False) -> str:
    """
    Raises:
        ValueError: Something in the file cannot be used, or nothing in it is an answer. Then nothing has changed.
    """
    notes = collections.defaultdict(dict)
    outcome = hand_in(state, read_answers(state, file, notes), notes, check)
    if not outcome.taken:
        notes.pop('Not yet')
        raise ValueError(f'{file} holds no answer to what round {state.round} asks for ({in_lines(notes, "; ")}): '
                         'give what was exported after people had labelled that')
    return outcome.text


def push_tasks(work_dir: str, to: str | None = None, upload: bool = False) -> str:
    """Make tasks of what a round asks for on a server, which is remembered. What is there already stays as it is."""
    with opened_run(work_dir) as state:
        check_waits(state, work_dir)
        return push(state, to, upload)


def check_waits(state: State, work_dir: str) -> None:
    """
    Raises:
        ValueError: The run does not wait for labels.
    """
    if state.phase != 'label':
        raise ValueError(f'the run in {work_dir} does not wait for labels: python al_report.py status says what it '
                         'does')


def push(state: State, to: str | None = None, upload: bool = False) -> str:
    import al_patch
    before = read_json(server_path(state))
    if not (to or before):
        raise ValueError('--to should be the address of a server, as none is remembered, e.g. --to http://localhost:8080')
    title = f'{osp.basename(state.work_dir)[:40]} {secrets.token_hex(4)}'  # Label Studio takes 50 characters
    where = {'title': title, **before, 'url': (to or before['url']).rstrip('/'),
             'upload': upload or not to and before['upload']}
    server, names = server_at(where), names_to_label(state)
    al_patch.write_atomically(server_path(state), json.dumps(where))  # before anything stands there under this title
    new = server.push(state, names, where['upload'])
    return f'{new} new tasks of the {len(names)} images of round {state.round} are on {where["url"]}'


def push_or_tell(state: State) -> None:
    """Push what a round asks for to the server of the rounds before."""
    try:
        state.logger.info(push(state))
    except (ValueError, ImportError) as error:
        state.logger.warning(f'{error}. Push by hand: python al_label.py push {state.work_dir}')


def wait_for_labels(state: State) -> None:
    """Look for labels, in the inbox and on the server, until all are there. What is wrong or down is told once."""
    import al_patch
    told = set()

    def tell(error: Exception) -> None:
        if str(error) not in told:
            told.add(str(error))
            state.logger.warning(f'{error}. The run looks again')

    def look() -> list[str]:
        """The versions of all files in the inbox, with those that were just submitted."""
        time.sleep(POLL_SECONDS)
        if osp.isfile(server_path(state)):
            try:
                pull(state)
            except (ValueError, ImportError) as error:
                tell(error)
        files = [state.pool.info(name).get('seg_map_path') for name in state.entry['asked']]
        files += glob.glob(osp.join(glob.escape(state.folder()), 'labels', '**'), recursive=True)
        return [f'{file} {os.stat(file).st_mtime_ns}' for file in files if file and osp.exists(file)]

    before = []
    state.logger.info(f'Round {state.round} looks for labels every {POLL_SECONDS} s, and goes on when all are there')
    while state.phase == 'label':
        now = al_patch.on_rank_0(look)
        if now != before:
            before = now
            try:
                accept_labels(state)
            except ValueError as error:
                tell(error)
    state.save()


def pull_labels(work_dir: str, wait: bool = False, check: bool = False) -> str:
    """Take what was submitted into the inbox; or ``wait``, and look again and again, until all is there."""
    told = ''
    with opened_run(work_dir) as state:
        while True:
            try:
                outcome = pull(state, check)
                text, missing = outcome.text, outcome.missing
            except Unreachable as error:
                if not wait:
                    raise
                text, missing = f'{error}; it is asked again', True
            if not (wait and missing):
                return text
            if text != told:
                print(told := text, flush=True)
            time.sleep(POLL_SECONDS)


def pull(state: State, check: bool = False) -> Outcome:
    where, notes = read_json(server_path(state)), collections.defaultdict(dict)
    if not where:
        raise ValueError(f'no server is remembered: push first, by python al_label.py push {state.work_dir} --to URL')
    return hand_in(state, server_at(where).pull(state, notes), notes, check)


def server_path(state: State) -> str:
    """Where a run keeps on which server people label, and what the run is called there."""
    return osp.join(state.work_dir, 'labels', 'server.json')


def rewind(work_dir: str, round: int, train: bool = False) -> str:
    """Set a run back to a round, which then asks anew, or trains anew. What came later is moved to ``rewound_<n>``,
    with the state file as it was; labels stay in the store, where the same request finds them.

    Raises:
        ValueError: There is no such round, or nothing comes after it.
    """
    import al_patch
    with stopped_run(work_dir) as content:
        last, phase = len(content['rounds']) - 1, content['phase']
        if not 0 <= round <= last:
            raise ValueError(f'K should be a round from 0 to {last}, but got {round}')
        entry, folder = content['rounds'][round], pathlib.Path(work_dir, f'round_{round}')
        checkpoints = entry.get('checkpoints', {}).values()
        gone = [file for file in checkpoints if not (folder / osp.basename(file)).is_file()]
        anew = train or bool(gone) or not checkpoints
        if round == last and (phase != 'query' or not train):
            raise ValueError(f'round {round} is the newest, and nothing comes after it (its phase is {phase!r}): '
                             '--resume goes on with it' + ', and --train trains it anew' * (phase == 'query'))
        aside = next(path for n in itertools.count() if not (path := pathlib.Path(work_dir, f'rewound_{n}')).exists())
        aside.mkdir()
        shutil.copy(osp.join(work_dir, al_patch.STATE_FILE), aside)
        for key in ('query_seconds', *('metrics', 'checkpoints', 'train_seconds', 'warnings') * anew):
            entry.pop(key, None)
        content.update(rounds=content['rounds'][:round + 1], round=round, ended=None,
                       phase='train' if anew else 'query')
        if anew and folder.is_dir():  # what it asks people for, and has of them, stays
            (aside / folder.name).mkdir()
            for path in [path for path in folder.iterdir() if path.name not in ('labelled', 'labels', 'to_label')]:
                shutil.move(path, aside / folder.name)
        al_patch.write_state(work_dir, content, [])  # stopped before this, it can be done again
        for k in range(round + 1, last + 1):
            if osp.isdir(later := osp.join(work_dir, f'round_{k}')):
                shutil.move(later, aside)
    return f'{work_dir} is back in round {round}, which {"is trained" if anew else "asks"} anew' + (
        f', as {", ".join(gone)} is gone' if gone else '') + f'; what was there is in {aside}. Go on with --resume'


def drop(work_dir: str, names: list[str]) -> str:
    """Take images out of a run: it neither trains on them nor asks for them. What they cost stays in its figures.

    Raises:
        ValueError: The run knows no image of that name.
    """
    import al_patch
    with stopped_run(work_dir) as content:
        known = {*content['pool'], *(name for entry in content['rounds'] for name in entry['asked'])}
        strange = [name for name in names if name not in known]
        if strange:
            raise ValueError(f'IMAGE should be the name of one in the data set, such as {min(known)!r}, but got '
                             f'{", ".join(map(repr, strange))}')
        content['dropped'] = sorted({*content.get('dropped', ()), *names})
        for entry in content['rounds']:
            entry['held_out'] = [name for name in entry.get('held_out', ()) if name not in names]
        al_patch.write_state(work_dir, content, [])
    return f'{work_dir} goes on without {", ".join(names)}'


@contextlib.contextmanager
def stopped_run(work_dir: str) -> Iterator[dict]:
    """The state of a run, which cannot go on meanwhile.

    Raises:
        RuntimeError: It goes on just now.
    """
    import mmengine

    import al_patch
    content = read_state(work_dir)
    with al_patch.only_run(types.SimpleNamespace(work_dir=work_dir, logger=mmengine.MMLogger.get_current_instance())):
        yield content


@contextlib.contextmanager
def opened_run(work_dir: str, start: Callable | None = None) -> Iterator[State]:
    """The run in a directory, as resuming would open it; what mmengine logs about that goes elsewhere.

    Args:
        start: Makes a runner of a config.

    Raises:
        ValueError: There is no config; or what resuming would raise.
    """
    from mmengine.config import Config
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    import al_patch
    start = start or (lambda cfg: RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg))
    content = read_state(work_dir)
    configs = glob.glob(osp.join(glob.escape(work_dir), '*.py'))
    if not configs:
        raise ValueError(f'{work_dir} does not hold the config, a .py file, that mmengine writes there: copy yours '
                         'into it')
    cfg = Config.fromfile(max(configs, key=osp.getmtime))
    with tempfile.TemporaryDirectory() as elsewhere, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the run has told them
        cfg.update(work_dir=elsewhere, resume=True, launcher='none', log_level='WARNING',
                   experiment_name=osp.basename(elsewhere))
        runner = start(cfg)
        al_patch.attach_companions(runner)  # keys of the `al` block may be theirs
        al, pool = al_patch.parse_settings(cfg.al), al_patch.Pool(cfg, al_patch.unwrap(runner.model))
        pool.sizes, pool.pixels = Sizes(pool), content['pixels']
        state = al_patch.State(content, osp.abspath(work_dir), al, runner, pool)
        state.ended = content['ended']
        for check in al_patch.methods_of(runner, 'check_resume'):
            check(state, content)
        try:
            yield state
        finally:
            al_patch.close_round(runner)


def read_state(work_dir: str) -> dict:
    """What a run's state file holds.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    import al_patch
    path = osp.join(work_dir, al_patch.STATE_FILE)
    if not osp.isfile(path):
        raise FileNotFoundError(f'{work_dir} should be the --work-dir of a run, but there is no {osp.basename(path)} '
                                'in it')
    return al_patch.read_state(path)


class Sizes(dict):
    """As ``Pool.sizes``, of those images alone that are asked about."""

    def __init__(self, pool: Pool):
        super().__init__()
        self.pool = pool

    def __missing__(self, name: str) -> tuple[int, int]:
        self[name] = self.pool.load_image(name).shape[:2]
        return self[name]

# ---------------------------------------------------------------------------------------------------------------------
# Servers: a round's tasks there, once each, and what was submitted. Both kinds have `push(state, names, upload)`, which
# returns how many tasks are new, and `pull(state, notes)`, which returns answers
# ---------------------------------------------------------------------------------------------------------------------


def server_at(where: dict) -> LabelStudio | Cvat:
    """What stands at the ``url`` of a server: each of the two tells its name to anybody.

    Raises:
        ValueError: Neither, or nothing answers.
    """
    url = where['url']
    if '@' in url or not re.match('https?://', url):
        raise ValueError('the server should be given as http://HOST:PORT or https://HOST, and the token in the environ'
                         f'ment, but got {url.partition("@")[2] or url!r}')
    server = Rest(url, None)
    for path, sign, kind in (('/api/version', 'label-studio', LabelStudio),
                             ('/api/server/about', 'Computer Vision Annotation Tool', Cvat)):
        answer = ''
        with contextlib.suppress(Refused):
            answer = server.ask('GET', path)
        if sign in str(answer):
            return kind(url, where['title'])
    raise ValueError(f'{url} should be a Label Studio or a CVAT, but answers as neither: is the port right, and '
                     'no proxy between?')


class Unreachable(ValueError):
    """A server does not answer, or not as it should: it may later."""


class Refused(ValueError):
    """A server does not do what was asked."""


class Rest:
    """A REST API.

    Args:
        variable: That of the environment which holds the token, if one is needed. No message ever does.
    """

    def __init__(self, url: str, variable: str | None):
        try:
            import requests
        except ImportError as error:
            raise ImportError('push and pull need requests: pip install requests') from error
        self.url, self.variable, self.session = url, variable, requests.Session()
        self.session.auth = self.sign  # and not with a password out of .netrc
        self.token, self.authorization = token_in(variable, url) if variable else '', ''

    def sign(self, request):
        request.headers.update(dict(Authorization=self.authorization) if self.authorization else {})
        return request

    def ask(self, method: str, path: str, **what):
        """What the server answers, out of JSON.

        Raises:
            Unreachable, Refused: In one line, why it does not.
        """
        import requests
        for renewed in (False, True):
            try:
                response = self.session.request(method, self.url + path, timeout=(10, 300), **what)
                if response.status_code == 401 and not renewed and self.renew():
                    continue
                content = response.json() if response.ok else None
            except requests.exceptions.JSONDecodeError as error:
                raise Unreachable(f'{self.url} should answer {method} {path} with JSON, but did not') from error
            except requests.RequestException as error:
                raise Unreachable(f'{self.url} does not answer {method} {path} ({type(error).__name__})') from error
            break
        status = response.status_code
        if status in (401, 403):
            raise Refused(f'{self.url} does not take the token in {self.variable} for {method} {path} ({status})')
        if not response.ok:
            said = without(response.text, self.token, self.authorization.rpartition(' ')[2])
            raise (Unreachable if status >= 500 or status == 429 else Refused)(
                f'{self.url} answers {method} {path} with {status}: {said}')
        return content

    def renew(self) -> bool:
        """Get what the token stands for, if it is to be exchanged, again."""
        return False


class LabelStudio(Rest):
    """Label Studio: a project for a run, with a task for each image of each round."""

    def __init__(self, url: str, title: str):
        super().__init__(url, 'LABEL_STUDIO_API_KEY')
        self.title = title
        self.is_personal = self.token.count('.') == 2  # a refresh token; others are 40 hexadecimal digits
        self.authorization = f'Token {self.token}'
        self.renew()

    def renew(self) -> bool:
        if self.is_personal:
            self.authorization, self.is_personal = '', False  # while asking
            try:
                access = self.ask('POST', '/api/token/refresh', json=dict(refresh=self.token))['access']
            finally:
                self.is_personal = True
            self.authorization = f'Bearer {access}'
        return self.is_personal

    def push(self, state: State, names: list[str], upload: bool) -> int:
        project = self.project() or self.ask('POST', '/api/projects', json=dict(
            title=self.title, label_config=label_studio_interface(state), show_instruction=True,
            expert_instruction=instructions(state)))['id']
        there = {task['data'].get('name') for task in self.tasks(state, project)}
        new = [name for name in names if name not in there]
        if new and not upload:
            self.connect(project, {osp.dirname(osp.abspath(image_path(state, name))) for name in new})
        for lot in lots(new, 'Push', 20):
            urls = self.upload(project, {name: image_path(state, name) for name in lot}) if upload else {}
            tasks = [label_studio_task(state, name, urls.get(name) or local_url(state, name)) for name in lot]
            self.ask('POST', f'/api/projects/{project}/import', json=tasks)
        if state.round or state.counts_pixels:  # else nothing is shown beside the image
            self.ask('PATCH', f'/api/projects/{project}', json=dict(model_version=f'round_{state.round}'))
        return len(new)

    def pull(self, state: State, notes: dict[str, dict]) -> list[Answer]:
        project = self.project()
        if project is None:
            raise Refused(f'{self.url} has no project {self.title!r}: push first')
        tasks = self.tasks(state, project)
        done = [task['id'] for task in tasks if task.get('total_annotations') or task.get('cancelled_annotations')]
        notes['Not submitted'].update({task['data']['name']: None for task in tasks if task['id'] not in done})
        exported = []
        for lot in lots(done, 'Pull', 50):
            exported += self.ask('GET', f'/api/projects/{project}/export', params={
                'exportType': 'JSON', 'download_all_tasks': 'true', 'ids[]': lot})
        return read_label_studio(state, exported, notes)

    def project(self) -> int | None:
        """The run's project."""
        for page in itertools.count(1):
            found = self.ask('GET', '/api/projects', params=dict(page=page, page_size=100, include='id,title'))
            for project in found['results']:
                if project['title'] == self.title:
                    return project['id']
            if not found.get('next'):
                return None

    def tasks(self, state: State, project: int) -> list[dict]:
        """The tasks of what the newest round asks for."""
        tasks = []
        for page in itertools.count(1):
            found = self.ask('GET', '/api/tasks', params=dict(project=project, page=page, page_size=100))
            tasks += found['tasks']
            if page * 100 >= found['total']:
                return [task for task in tasks if task['data'].get('request') == request_of(state)]

    def connect(self, project: int, folders: set[str]) -> None:
        """Let the server hand out the images in some folders, which it has to see.

        Raises:
            Refused: It does not.
        """
        have = {storage['path'] for storage in self.ask('GET', '/api/storages/localfiles', params=dict(
            project=project))}
        folder = osp.commonpath(folders)
        if folder not in have:
            try:
                self.ask('POST', '/api/storages/localfiles', json=dict(project=project, path=folder, title=folder))
            except Refused as error:
                raise Refused(f'{error}. If the server cannot see {folder}, use --upload') from error

    def upload(self, project: int, images: dict[str, str]) -> dict[str, str]:
        """Hand images over: their addresses on the server."""
        with contextlib.ExitStack() as stack:
            files = [(f'file_{i}', (osp.basename(path), stack.enter_context(open(path, 'rb'))))
                     for i, path in enumerate(images.values())]
            ids = self.ask('POST', f'/api/projects/{project}/import', params=dict(commit_to_project='false'),
                           files=files)['file_upload_ids']
        files = [self.ask('GET', f'/api/import/file-upload/{i}')['file'] for i in ids]
        return {name: f'/data/{file}' for name, file in zip(images, files)}


class Cvat:
    """CVAT, by its own SDK: a task for a round of a run, with a job for every few images."""

    def __init__(self, url: str, title: str):
        try:
            import cvat_sdk
        except ImportError as error:
            raise ImportError('CVAT needs its SDK: pip install cvat-sdk') from error
        self.url, self.title, self.token = url, title, token_in('CVAT_ACCESS_TOKEN', url)
        with self.asking('log in'):
            self.client = cvat_sdk.make_client(url, access_token=self.token)
        self.client.logger.setLevel('ERROR')

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Let errors of the SDK be ours.

        Raises:
            Unreachable, Refused: In one line, what went wrong.
        """
        import urllib3
        from cvat_sdk.exceptions import ApiException, CvatSdkException, OpenApiException
        try:
            yield
        except (ApiException, CvatSdkException) as error:
            status = getattr(error, 'status', None) or 0
            said = without(str(getattr(error, 'body', None) or error), self.token)
            said = 'the token in CVAT_ACCESS_TOKEN is not taken' if status in (401, 403) else said
            raise (Unreachable if status >= 500 or status == 429 else Refused)(
                f'{self.url} cannot {what} ({status}): {said}') from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(f'{self.url} does not answer, to {what} ({type(error).__name__})') from error
        except (OpenApiException, json.JSONDecodeError) as error:
            raise Unreachable(f'{self.url} should answer as CVAT does, but did not, to {what} ({type(error).__name__})'
                              ) from error

    def push(self, state: State, names: list[str], upload: bool) -> int:
        from cvat_sdk.core.helpers import DeferredTqdmProgressReporter
        from cvat_sdk.core.proxies.tasks import ResourceType
        task = self.task(state)
        is_new = not (task and task.size)
        with self.asking('make a task'):
            if task is None:
                labels = json.loads(cvat_files(state, [], {})['cvat_labels.json'])
                task = self.client.tasks.create(dict(name=self.title_of(state), labels=labels, segment_size=20))
                self.client.api_client.guides_api.create(annotation_guide_write_request=dict(
                    task_id=task.id, markdown=instructions(state)))
            if not is_new and self.client.api_client.tasks_api.retrieve_annotations(task.id)[0].shapes:
                return 0
        with self.asking('take the images'), tempfile.TemporaryDirectory() as folder:
            if is_new:
                files = [cvat_file(state, name) for name in names]
                if upload:  # where a file has no folder
                    files = [osp.join(folder, quote(file, safe='')) for file in files]
                    for file, name in zip(files, names):
                        shutil.copy(image_path(state, name), file)  # the SDK takes a link's target's name
                task.upload_data(files, resource_type=ResourceType.LOCAL if upload else ResourceType.SHARE,
                                 pbar=DeferredTqdmProgressReporter() if sys.stdout.isatty() else None)
        with self.asking('take what is to be labelled'):
            labels = {label.name: label.id for label in task.get_labels()}
            shapes = [cvat_api_shape(drawing, frame, labels) for frame, info in enumerate(task.get_frames_info())
                      for drawing in drawings(state, image_named(state, info.name))]
            if shapes:
                task.set_annotations(dict(shapes=shapes))
        return len(names) * is_new

    def pull(self, state: State, notes: dict[str, dict]) -> list[Answer]:
        task, answers = self.task(state), []
        if task is None:
            raise Refused(f'{self.url} has no task {self.title_of(state)!r}: push first')
        with self.asking('hand out what was labelled'):
            labels = {label.id: label.name for label in task.get_labels()}
            frames = [image_named(state, info.name) for info in task.get_frames_info()]
            for job in track(task.get_jobs(), 'Pull', disable=not sys.stdout.isatty()):
                mine = range(job.start_frame, job.stop_frame + 1)
                if job.state != 'completed':
                    notes['Not submitted'].update({frames[frame]: None for frame in mine})
                    continue
                shapes = sorted(job.get_annotations().shapes, key=lambda shape: shape.z_order)
                answers += [(frames[frame], [(labels[shape.label_id], *cvat_xml_shape(shape)) for shape in shapes
                                             if shape.frame == frame]) for frame in mine]
        return [painted(state, name, ((label, cvat_mask(kind, shape, state.pool.sizes[name]))
                                      for label, kind, shape in shapes), True) for name, shapes in answers]

    def title_of(self, state: State) -> str:
        return f'{self.title} round {state.round} {request_of(state)}'

    def task(self, state: State):
        """The task of what the newest round asks for."""
        with self.asking('list tasks'):
            found = self.client.api_client.tasks_api.list(name=self.title_of(state))[0].results
            return self.client.tasks.retrieve(found[0].id) if found else None


def cvat_api_shape(drawing: Drawing, frame: int, labels: dict[str, int]) -> dict:
    """A drawing as CVAT's API has it: of a mask the runs, and its box."""
    kind, shape = cvat_shape(drawing)
    points = re.split('[,;]', shape['points']) if kind == 'polygon' else [
        *shape['rle'].split(','), shape['left'], shape['top'], *(
            int(shape[a]) + int(shape[b]) - 1 for a, b in (('left', 'width'), ('top', 'height')))]
    return dict(type=kind, frame=frame, label_id=labels[drawing.label], points=[*map(float, points)], attributes=[],
                occluded=False, z_order=-(kind == 'polygon'),
                source='auto' if drawing.kind == 'prediction' else 'manual')


def cvat_xml_shape(shape) -> tuple[str, dict]:
    """A shape of CVAT's API as 'CVAT for images' has it: see ``cvat_mask``."""
    kind, points = str(shape.type), list(shape.points)
    if kind == 'mask':
        *runs, left, top, right, bottom = map(int, points)
        return kind, dict(rle=','.join(map(str, runs)), left=left, top=top, width=right - left + 1,
                          height=bottom - top + 1)
    if kind == 'rectangle':
        return 'box', dict(zip(('xtl', 'ytl', 'xbr', 'ybr'), points), rotation=shape.rotation or 0)
    return kind, dict(points=';'.join(f'{x},{y}' for x, y in zip(points[::2], points[1::2])))


def token_in(variable: str, url: str) -> str:
    """
    Raises:
        ValueError: The environment has none.
    """
    token = os.environ.get(variable, '').strip()
    if not token:
        raise ValueError(f'{url} needs a token: set it in the environment, as {variable}')
    return token


def without(text: str, *secrets: str) -> str:
    """The beginning of what a server says, in one line."""
    for secret in filter(None, secrets):
        text = text.replace(secret, '...')
    return ' '.join(text.split())[:200]


def lots(items: list, title: str, size: int) -> Iterator[list]:
    """Some at a time, with progress."""
    return track([items[i:i + size] for i in range(0, len(items), size)], title, disable=not sys.stdout.isatty())

# ---------------------------------------------------------------------------------------------------------------------
# What tools export, as label maps in the inbox: the run accepts them when it goes on, as it does any file there
# ---------------------------------------------------------------------------------------------------------------------


def hand_in(state: State, answers: list[Answer], notes: dict[str, dict], is_trial: bool = False) -> Outcome:
    """Put answers into the inbox of the newest round, beside what is in it, all or none. What the run will make of them
    is found by what it will use.

    Args:
        notes: What is to be told beside: a sentence -> the images that it is about.
        is_trial: Nothing is written.

    Raises:
        ValueError: An answer cannot be used.
    """
    import al_patch
    inbox, asked, folder = Inbox(state), state.entry['asked'], osp.join(state.folder(), 'labels')
    empty, old = 'Nothing is labelled', 'Labelled just so before'
    untouched = 'Just as it was exported, which is no answer (but with `al.oracle.accept_unchanged`)'
    for answer in answers:
        if not answer.known.any():
            notes[empty][answer.name] = None
        elif not answer.is_submitted and is_as_predicted(state, answer):
            notes[untouched][answer.name] = None
        elif answer.name in state.labelled() and not is_new(inbox, answer):
            notes[old][answer.name] = None
    answers = [each for each in answers if not any(each.name in notes[what] for what in (empty, untouched, old))]
    with lock_inbox(state) if answers and not is_trial else contextlib.nullcontext(), \
            tempfile.TemporaryDirectory() as staged:
        inbox.staged = staged
        for answer in answers:
            stage(inbox, answer, al_patch.png_path(folder, answer.name, state.work_dir), notes)
        paths = {str(path.relative_to(staged)): path for path in sorted(pathlib.Path(staged).rglob('*.png'))}
        reports = {name: inbox.take(name, True, keeps=False) for name in state.labelled()
                   if name in asked or f'{name}.png' in paths}
        new = {osp.join(folder, path): content for path, file in paths.items()
               if (content := file.read_bytes()) != read_bytes(osp.join(folder, path))}
        for path, content in {} if is_trial else new.items():
            al_patch.write_atomically(path, content)
    newest = {name: reports[name] for name in asked if name in reports}
    accepted, total, unchanged = (sum(report[key] for report in newest.values())
                                  for key in ('accepted', 'asked', 'unchanged'))
    missing = {name: report['missing'] for name, report in newest.items() if report['missing']}
    notes['Not yet'] = unit_words(state, missing)
    notes['Outside what was asked for, kept aside'] = {
        f'{name} ({report["outside"]} pixels)': None for name, report in reports.items() if report['outside']}
    notes['Nobody asked for these images, they are kept aside'] = {
        name: None for name in (path.removesuffix('.png') for path in paths) if name not in state.labelled()}
    notes['Wrong'] = {report['wrong']: None for report in reports.values() if report['wrong']}
    text = '\n'.join([
        f'{accepted} of the {total} {state.al.unit.type}s that round {state.round} asks for are answered'
        f'{f", {unchanged} of them exactly as predicted" if unchanged else ""}', *in_lines(notes, '\n').splitlines(),
        f'{len(new)} label maps {"would be" if is_trial else "are"} new in {folder}' if new else 'Nothing is new'])
    return Outcome(text, len(paths) + len(notes[old]), total - accepted)


class Outcome(NamedTuple):
    """What came of answers: in lines, how many images are ``taken``, and how many units are ``missing`` yet."""
    text: str
    taken: int
    missing: int


def is_as_predicted(state: State, answer: Answer) -> bool:
    """Whether an answer is what was exported to start from."""
    path = png_path(state, 'prediction', answer.name)
    return not state.al.oracle.accept_unchanged and osp.isfile(path) and np.array_equal(
        answer.classes, read_label(path, state.pool, answer.name)) and bool(
        (answer.classes != state.pool.ignore_index)[answer.known].all())


def is_new(inbox: Inbox, answer: Answer) -> bool:
    """Whether an answer says more of what is asked for, or something else, than the label store has."""
    classes, done = inbox.stored(answer.name)
    return bool((answer.known & inbox.state.mask(answer.name) & ~(done & (classes == answer.classes))).any())


def stage(inbox: Inbox, answer: Answer, path: str, notes: dict[str, dict]) -> None:
    """Write an answer, on top of what the file in the inbox says, beside that inbox, as a label file of the data set:
    in grey, or in the colours of its palette, whichever is read as it was meant.

    Raises:
        ValueError: The data set reads neither.
    """
    from mmengine.dataset import Compose

    import al_patch
    state, pool, (name, classes, known, _) = inbox.state, inbox.state.pool, answer
    classes, known = inbox.spread(name, classes, known)
    before, done = inbox.stored(name)
    if osp.isfile(path):
        older, there = inbox.read(name, path, state.mask(name))
        before, done = np.where(there, older, before), done | there
        classes, known = np.where(known, classes, older), known | there
    classes = np.where(known, classes, pool.ignore_index)
    if differs := int((done & known & (before != classes)).sum()):
        notes['Another label than before, of which the newer counts'][f'{name} ({differs} pixels)'] = None
    values, palette = label_values(pool, name)[1], pool.leaves[0].metainfo.get('palette') or [[1, 1, 1]]
    colours = np.full((len(values), 3), 1, np.uint8)  # no class, unless a palette has it: then it is not read as meant
    colours[:len(palette)] = palette
    staged = al_patch.png_path(inbox.staged, name)
    for table in values, colours, colours[:, ::-1]:
        picture = table[classes]
        picture[known & (classes == pool.ignore_index)] = state.al.oracle.unlabelable or 0
        al_patch.write_png(staged, picture)
        pool.steps.clear()  # they are found by a file: not by one that training does not take
        with contextlib.suppress(Exception), al_patch.undisturbed():
            Compose(pool.training[pool.where[name][0]])({**pool.info(name), 'seg_map_path': staged})
            if all(map(np.array_equal, inbox.read(name, staged, known), (classes, known))):
                return
    raise ValueError(f'{name}: the data set reads label files neither as numbers of classes nor in the colours of its '
                     f'palette: put label maps of your own into {osp.dirname(path)}')


@contextlib.contextmanager
def lock_inbox(state: State) -> Iterator[None]:
    """Held for as long as it takes to add to the inbox: two may import at once, whatever the run does meanwhile."""
    with open(osp.join(state.work_dir, 'inbox.lock'), 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_lines(notes: dict[str, dict], separator: str) -> str:
    return separator.join(f'{what}: {in_words(names)}' for what, names in notes.items() if names)


def read_bytes(path: str) -> bytes:
    """What a file holds; nothing, if there is none."""
    return pathlib.Path(path).read_bytes() if osp.isfile(path) else b''


def read_answers(state: State, path: str, notes: dict[str, dict]) -> list[Answer]:
    """What a tool has exported: a file, a zip or a folder.

    Raises:
        ValueError: It is of no kind that is known, or something in it cannot be used.
    """
    import al_patch
    with al_patch.reading(path):
        files = files_in(path)
        labelmap, tasks, shapes = ([file for file in files if file.endswith(end)]
                                   for end in ('labelmap.txt', '.json', '.xml'))
        if labelmap:
            return read_colours(state, files, labelmap[0])
        if tasks:
            return read_label_studio(state, json.loads(files[tasks[0]]()), notes)
        if shapes:
            return read_cvat(state, files[shapes[0]]())
        return read_maps(state, files, path)


def files_in(path: str) -> dict[str, Callable[[], bytes]]:
    """The files in a folder or a zip, or a file alone: name -> a function that reads it. Nothing is unpacked.

    Raises:
        ValueError: It is a zip whose names lead elsewhere, or that unpacks to far more than it holds.
    """
    root = pathlib.Path(path)
    if root.is_dir():
        return {str(file.relative_to(root)): file.read_bytes for file in sorted(root.rglob('[!.]*')) if file.is_file()}
    if not zipfile.is_zipfile(path):
        return {root.name: root.read_bytes}
    archive = zipfile.ZipFile(path)
    files = [info for info in archive.infolist() if not info.is_dir()]
    strange = [info.filename for info in files if osp.isabs(info.filename) or '..' in re.split(r'[/\\]', info.filename)]
    if strange:
        raise ValueError(f'names in a zip should stay below its root, but got {strange[0]!r}')
    size, packed = sum(info.file_size for info in files), sum(info.compress_size for info in files)
    if size > max(2**26, 200 * packed):
        raise ValueError(f'a zip of labels should unpack to at most 200 times its size, but {packed} bytes would be '
                         f'{size}')
    return {info.filename: functools.partial(archive.read, info) for info in files}


def read_label_studio(state: State, tasks: list, notes: dict[str, dict]) -> list[Answer]:
    """Answers in what Label Studio exports as JSON or JSON-MIN: of each task that this round has given, the annotation
    that was changed last; neither predictions nor drafts.

    Raises:
        ValueError: It is none, or a task is not of this run.
    """
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError('a JSON should be an export of Label Studio, a list of tasks, but is not')
    answers, newest = [], collections.defaultdict(list)
    for task in tasks:
        data = task.get('data', task)
        name = image_named(state, data.get('name') or data.get('image') or '')
        given = data.get('round', state.round), data.get('request', request_of(state))
        if given[0] < state.round:
            notes[f'Of an older round than {state.round}, passed over'][name] = None
        elif given != (state.round, request_of(state)):
            raise ValueError(f'the task of {name} should be of what this run asks for in round {state.round}, but is '
                             f'of another run\'s round {given[0]}')
        else:
            done = [min_annotation(task)] if 'data' not in task else task.get('annotations', [])
            if not done:
                notes['Not submitted'][name] = None
            newest[name] += done
    for name, given in newest.items():
        kept = [each for each in given if not each.get('was_cancelled')]
        if len(kept) < len(given):
            notes['Cancelled by an annotator'][name] = None
        if len(kept) > 1:
            notes['Labelled more than once, what was changed last counts'][name] = None
        if kept:
            last = max(kept, key=lambda each: (str(each.get('updated_at')), each.get('id') or 0))
            pieces = (piece for result in last['result'] for piece in label_studio_pieces(state, name, result))
            answers.append(painted(state, name, pieces, True))
    return answers


def min_annotation(task: dict) -> dict:
    """The annotation in a task of a JSON-MIN, in which each control's regions stand beside the data."""
    regions = [region for value in task.values() if isinstance(value, list)
               for region in value if isinstance(region, dict) and 'original_width' in region]
    return dict(updated_at=task.get('updated_at'), id=task.get('annotation_id'), result=[
        dict({key: region[key] for key in ('original_width', 'original_height')}, value=region, type=kind)
        for region in regions for kind in region if kind.endswith('labels')])


def label_studio_pieces(state: State, name: str, result: dict) -> Iterator[tuple[str, np.ndarray]]:
    """The label and the mask, (H, W), of a region in Label Studio; none of what is no region.

    Raises:
        ValueError: It is for an image of another size, has another form than those that are known, or two labels.
    """
    value, kind, (h, w) = result.get('value', {}), result.get('type', ''), state.pool.sizes[name]
    if not kind.endswith('labels'):
        return
    if len(value[kind]) != 1:
        raise ValueError(f'{name}: a region should have one label, but got {value[kind]}')
    if value[kind] == [asked_label(state)]:
        return
    size = result['original_height'], result['original_width']
    check_size(name, size, (h, w))
    percent = np.array([w, h]) / 100
    if 'rle' in value:
        mask = decode_rle(value['rle'], (h, w))
    elif 'points' in value:
        mask = filled(np.array(value['points'], float) * percent, (h, w))
    elif {'x', 'y', 'width', 'height'} <= {*value}:
        start, extent = (np.array([value[a], value[b]], float) * percent for a, b in (('x', 'y'), ('width', 'height')))
        mask = filled(start + turned(CORNERS * extent, value.get('rotation', 0)), (h, w))
    elif kind == 'keypointlabels':
        mask = points_mask([np.array([value['x'], value['y']], float) * percent], (h, w))
    else:
        raise ValueError(f'{name}: labels should be brushes, polygons, rectangles or points, but got {kind}')
    yield value[kind][0], mask


def read_cvat(state: State, content: bytes) -> list[Answer]:
    """Answers in the ``annotations.xml`` of CVAT's 'CVAT for images 1.1'.

    Raises:
        ValueError: It is another XML, or has entities of its own, or an image that is not of this run.
    """
    if b'<!DOCTYPE' in content:
        raise ValueError('an XML of labels should have no declarations of its own, but has <!DOCTYPE')
    answers, root = [], ET.fromstring(content)
    if root.tag != 'annotations':
        raise ValueError(f"an XML should be of 'CVAT for images 1.1', but its root is {root.tag!r}")
    for image in root.iter('image'):
        name = image_named(state, image.get('name'))
        size = check_size(name, (int(image.get('height')), int(image.get('width'))), state.pool.sizes[name])
        shapes = sorted(image, key=lambda shape: int(shape.get('z_order', 0)))
        answers.append(painted(state, name, ((shape.get('label'), cvat_mask(shape.tag, shape.attrib, size)) for shape in
                                             shapes if shape.tag != 'tag'), False))
    return answers


def cvat_mask(kind: str, shape: dict, size: tuple) -> np.ndarray:
    """The mask of a shape in CVAT, (H, W).

    Raises:
        ValueError: It has another form than those that are known, or cannot be decoded.
    """
    if kind == 'mask':
        left, top, width, height = (int(shape[key]) for key in ('left', 'top', 'width', 'height'))
        runs = np.array(shape['rle'].split(','), int)
        if runs.sum() != width * height or runs.min() < 0 or min(left, top) < 0 or (
                top + height > size[0] or left + width > size[1]):
            raise ValueError(f'a mask should have {width} x {height} pixels inside its image, but its RLE does not')
        mask = np.zeros(size, bool)
        mask[top:top + height, left:left + width] = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)
        return mask
    if kind == 'box':
        low, high = (np.array([shape[f'x{a}'], shape[f'y{a}']], float) for a in ('tl', 'br'))
        centre = (low + high) / 2
        return filled(centre + turned((CORNERS - .5) * (high - low), float(shape.get('rotation', 0))), size)
    if kind not in ('polygon', 'points'):
        raise ValueError(f'labels should be masks, polygons, boxes or points, but got {kind}')
    points = [np.array(point.split(','), float) for point in shape['points'].split(';')]
    return filled(np.array(points), size) if kind == 'polygon' else points_mask(points, size)


def read_colours(state: State, files: dict[str, Callable], labelmap: str) -> list[Answer]:
    """Answers in CVAT's 'Segmentation mask 1.1': a colour a label, and black is none."""
    lines = [line.split(':') for line in files[labelmap]().decode().splitlines() if line.strip() and line[0] != '#']
    labels = {tuple(map(int, line[1].split(','))): line[0] for line in lines}
    labels.pop((0, 0, 0), None)
    answers = []
    for file in (file for file in files if '/SegmentationClass/' in f'/{file}' and file.endswith('.png')):
        name = image_named(state, file.rpartition('SegmentationClass/')[2])
        with Image.open(io.BytesIO(files[file]())) as image:
            check_size(name, image.size[::-1], state.pool.sizes[name])
            picture = np.array(image.convert('RGB'))
        found = {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0).tolist()} - {(0, 0, 0)}
        if strange := found - {*labels}:
            raise ValueError(f'{file} should have the colours of its labelmap.txt, but got {min(strange)}')
        answers.append(painted(state, name, ((labels[c], (picture == c).all(2)) for c in found), False))
    return answers


def read_maps(state: State, files: dict[str, Callable], path: str) -> list[Answer]:
    """Answers in label maps with the values of the data set's label files, a PNG an image; of an exported share those
    in its ``labels``."""
    import al_patch
    if 'to_label.txt' in files:
        raise ValueError('that is what people are given: import the folder in which they have labelled')
    pngs, inbox, answers = [file for file in files if file.lower().endswith('.png')], Inbox(state), []
    pngs = [file for file in pngs if 'labels' in pathlib.PurePath(file).parts] or pngs
    if not pngs:
        raise ValueError(f'it should be a JSON or JSON-MIN of Label Studio, a CVAT for images 1.1 or Segmentation mask '
                         f'1.1 of CVAT, or label maps as PNGs, but holds {", ".join([*files][:3]) or "nothing"}')
    with tempfile.TemporaryDirectory() as folder:
        for file in pngs:
            name, content = image_named(state, file), files[file]()
            with Image.open(io.BytesIO(content)) as image:
                check_size(name, image.size[::-1], state.pool.sizes[name])
            al_patch.write_atomically(copied := osp.join(folder, file), content)
            try:
                classes, known = inbox.read(name, copied, state.mask(name))
            except ValueError as error:
                raise ValueError(str(error).replace(folder, path)) from error
            known &= (classes < (state.class_count or 2**16)) | (classes == state.pool.ignore_index)
            answers.append(Answer(name, np.where(known, classes, state.pool.ignore_index), known, False))
    return answers


def image_named(state: State, given: str) -> str:
    """The image that a tool's name or address stands for: by its name or its path, with or without an extension, as it
    is or as in an URL, below whatever folder.

    Raises:
        ValueError: There is none.
    """
    known, given = image_names(state.pool), str(given)
    for text in (given, unquote(given)):
        parts = re.split(r'[/\\]|\?d=', text)
        for i in range(len(parts)):
            tail = '/'.join(parts[i:])
            for each in (tail, osp.splitext(tail)[0]):
                if each in known:
                    return known[each]
    raise ValueError(f'images should be of this run\'s data set, such as {min(state.pool.names)!r}, but got {given!r}')


@functools.lru_cache(2)
def image_names(pool: Pool) -> dict[str, str]:
    """What images are called, by tools and by us -> their names."""
    return {**{image_stem(pool, name): name for name in pool.names}, **{name: name for name in pool.names}}


def check_size(name: str, size: tuple, expected: tuple) -> tuple:
    """
    Raises:
        ValueError: Labels are for an image of another size.
    """
    if tuple(size) != tuple(expected):
        raise ValueError(f'{name}: labels should be of the size of the image, {tuple(expected)}, but are of '
                         f'{tuple(size)}')
    return tuple(expected)


def painted(state: State, name: str, pieces: Iterable[tuple[str, np.ndarray]], is_submitted: bool) -> Answer:
    """What labelled pieces of an image come to: a later one covers an earlier one.

    Raises:
        ValueError: A label is none of the run's.
    """
    labels, size, ignore_index = tool_labels(state)[0], state.pool.sizes[name], state.pool.ignore_index
    classes, known, count = np.full(size, ignore_index), np.zeros(size, bool), len(class_colours(state.pool)[0])
    for label, mask in pieces:
        if label == asked_label(state):
            mask = mask & False
        elif label not in labels:
            raise ValueError(f'{name}: labels should be {", ".join(labels[:20])}, but got {label!r}')
        else:
            c = labels.index(label)
            classes[mask] = c if c < count else ignore_index
        known |= mask
    return Answer(name, classes, known, is_submitted)


class Answer(NamedTuple):
    """What somebody says of an image: ``classes``, and where they are ``known``, (H, W) both. What is known and of no
    class is unlabelable. What is not ``submitted`` may be a prediction that nobody has looked at."""
    name: str
    classes: np.ndarray
    known: np.ndarray
    is_submitted: bool


CORNERS = np.array([[0., 0.], [1., 0.], [1., 1.], [0., 1.]])


def turned(points_N2: np.ndarray, degrees: float) -> np.ndarray:
    """Points that are turned around the origin, clockwise in an image."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points_N2 @ np.array([[c, s], [-s, c]])


def filled(points_N2: np.ndarray, size: tuple) -> np.ndarray:
    """The pixels whose centres lie in a polygon with corners (x, y), (H, W): row by row, between its edges."""
    (x, y), (next_x, next_y) = points_N2.T, np.roll(points_N2, -1, 0).T
    mask = np.zeros((size[0], size[1] + 1), np.int8)
    for row in range(max(0, math.ceil(y.min() - .5)), min(size[0], math.ceil(y.max() - .5))):
        crosses = (y <= row + .5) != (next_y <= row + .5)
        at = x[crosses] + (row + .5 - y[crosses]) * (next_x - x)[crosses] / (next_y - y)[crosses]
        np.add.at(mask[row], np.ceil(at - .5).clip(0, size[1]).astype(int), 1)
    return mask.cumsum(1)[:, :-1] % 2 == 1


def points_mask(points: list, size: tuple) -> np.ndarray:
    """The pixels in which points (x, y) lie, (H, W)."""
    mask = np.zeros(size, bool)
    x, y = np.floor(points).astype(int).T
    mask[y.clip(0, size[0] - 1), x.clip(0, size[1] - 1)] = True
    return mask


def decode_rle(data: list[int], size: tuple) -> np.ndarray:
    """The mask of a brush of Label Studio's, (H, W): see ``encode_rle``; it may also have single values in place of a
    run, after a 0. What is at least half opaque counts.

    Raises:
        ValueError: It cannot be decoded, or is of another size.
    """
    bits, at = (np.unpackbits(np.array(data, np.uint8)) + ord('0')).tobytes().decode(), 0

    def number(n: int) -> int:
        nonlocal at
        at += n
        if at > len(bits):
            raise ValueError('its RLE ends too early: export it again')
        return int(bits[at - n:at], 2)

    total, n = number(32), number(5) + 1
    if total != 4 * size[0] * size[1] or n != 8:
        raise ValueError(f'a brush should be of 4 x {size[0]} x {size[1]} values of 8 bits, but its RLE is of {total} '
                         f'of {n}')
    counters, values, filled_to = [number(4) + 1 for _ in range(4)], np.empty(total, np.uint8), 0
    while filled_to < total:
        is_run, length = number(1), number(counters[number(2)]) + 1
        if filled_to + length > total:
            raise ValueError('its RLE is longer than it says: export it again')
        values[filled_to:filled_to + length] = number(n) if is_run else [number(n) for _ in range(length)]
        filled_to += length
    return values.reshape(*size, 4)[..., 3] >= 128

# ---------------------------------------------------------------------------------------------------------------------
# What a team asks without a run
# ---------------------------------------------------------------------------------------------------------------------


def add_team_commands(commands: argparse._SubParsersAction) -> None:
    try:
        import al_report
    except ModuleNotFoundError:  # they need it, all else does without
        return

    def command(function: Callable, what: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(function.__name__, help=what, description=what)
        parser.set_defaults(function=function)
        return parser

    asking = command(ask, 'which of these images to label next, by any model of mmseg\'s; DIR is then a run that waits')
    al_report.add_model_arguments(asking)
    asking.add_argument('--images', required=True, metavar='FOLDER', help='to choose from')
    asking.add_argument('--budget', required=True, type=lambda text: al_report.option_of(f'={text}')[1], metavar='N',
                        help='units, or a fraction, as `al.budget`')
    asking.add_argument('--labelled', metavar='FOLDER|SPLIT', help='what is labelled: a folder of other images; or of '
                        'label maps, or masks, <name>.png of some of the same; or a file of names')
    for option in ('strategy', 'unit'):
        asking.add_argument(f'--{option}', nargs='+', action=al_report.Setting, metavar='NAME',
                            default=argparse.SUPPRESS, help=f'as `al.{option}`: a name, and options as key=value')
    asking.add_argument('--seed', type=int, help="by default the config's, or 0")
    giving = command(dataset, 'all labels of a run as an ordinary data set of mmseg\'s, with a config and an invoice')
    giving.add_argument('--copy', action='store_true', help='images are copied, and not linked')
    giving.add_argument('--parts', type=int, default=1, metavar='N', help='in how many shares people had each round')
    doubting = command(suspects, 'accepted units that the model contradicts, the most certain first; DIR is then a run '
                       'that waits')
    doubting.add_argument('--budget', type=int, default=50, metavar='N', help='units')
    for parser in (giving, doubting):
        parser.add_argument('work_dir', metavar='WORK_DIR')
        parser.add_argument('--out', required=True, metavar='DIR', help='a new folder')


def ask(config: str, checkpoint: str, images: str, budget: float, out: str, labelled: str | None = None,
        strategy: str | dict = 'power_entropy', unit: str | dict = 'image', seed: int | None = None,
        cfg_options: list = ()) -> str:
    """Choose what to label next, as a run's first query would with this checkpoint. ``out`` is then the work_dir of a
    run whose round 1 waits for labels, with all exports, ``scores.csv`` and ``contact_sheet.png``.

    Raises:
        ValueError: A setting or a file that cannot be used; nothing is left in ``out`` then.
    """
    import al_patch
    import al_report
    if al_patch.resolve_strategy(strategy).calibration:
        raise ValueError('--strategy should do without labels that were held out of the training, but got '
                         f'{al_patch.split_setting(strategy)[0]!r}')
    with al_report.new_folder(out), al_patch.checkpoints_are_data():
        others = labelled and osp.isdir(labelled) and not is_of(images, labelled)
        state = al_report.state_of_model(config, checkpoint, out, [images, labelled] if others else [images],
                                         cfg_options, seed, strategy=strategy, unit=unit, budget=budget, oracle='human')
        al_report.check_model(state)
        note_labelled(state, labelled, others)
        asked = al_patch.query(state, state.runner)
        units = sum(units_in(asked, name) for name in asked)
        if not asked or isinstance(budget, int) and units < budget and not state.collector.is_capped:
            raise ValueError(f'--budget should be at most the {units} {state.al.unit.type}s that are not labelled, but '
                             f'got {budget}')
        request(state, asked)
    return al_report.last_words(f'{units} {state.al.unit.type}s in {len(asked)} images, see {folder_of(state)}')


def is_of(images: str, labelled: str) -> bool:
    """Whether the files in a folder are of images in another one, by their names.

    Raises:
        ValueError: Some are.
    """
    import al_report
    files = al_report.image_files(labelled)
    have, given = ({osp.splitext(file)[0] for file in each} for each in (al_report.image_files(images), files))
    strange = sorted(given - have)
    if not given or 0 < len(strange) < len(given):
        raise ValueError(f'--labelled should hold label maps of images in {images}, or other images, but '
                         f'{len(strange)} of {len(given)} files have names of no image there' + (
                             f', such as {strange[0]!r}' if strange else ''))
    with Image.open(osp.join(labelled, files[0])) as image:
        if strange and image.mode in '1P':
            raise ValueError(f'--labelled should hold label maps of images in {images}, or other images, but '
                             f'{image.filename} is a map with the name of none there')
    return not strange


def note_labelled(state: State, labelled: str | None, others: bool) -> None:
    """Put what is labelled already into a state's first round: whole images, or masks."""
    import al_patch
    pool, entry = state.pool, state.entry
    if labelled and osp.isdir(labelled) and not others:

        def note(name: str) -> list | None:
            path = osp.join(labelled, f'{name}.png')
            if not osp.isfile(path):
                return [0, 0]
            with al_patch.reading(path):
                with Image.open(path) as image:
                    mask = np.array(image) if image.mode == '1' else load_label(pool, name, path) != pool.ignore_index
                if mask.shape != pool.sizes[name]:
                    raise ValueError(f'its size should be that of its image, {pool.sizes[name]}, but is {mask.shape}')
            if mask.all() or mask.any() and not state.counts_pixels:
                return None
            if mask.any():
                al_patch.write_png(state.mask_path(0, name), mask)
            return [0, int(mask.sum())]

        asked = {name: units for name, units in al_patch.on_all_ranks(note, pool.names).items() if units != [0, 0]}
    elif others:
        asked = {name: None for name in pool.names if pool.where[name][0] == 1}
    elif labelled:
        before, state.al.initial = state.al.initial, labelled
        asked, state.al.initial = al_patch.initial_images(state), before
    else:
        return
    entry['asked'] = asked
    if state.counts_pixels:
        entry['pixels'] = sum(units[1] if units else math.prod(pool.sizes[name]) for name, units in asked.items())
    entry['spent'] = state.spent()


def suspects(work_dir: str, out: str, budget: int = 50) -> str:
    """Find accepted units that the model contradicts, those of the highest loss first. ``out`` is then the work_dir of
    a run that asks for them, with all exports; ``suspects.csv`` and ``pictures`` show what they are labelled as.

    Raises:
        ValueError: Fewer units are labelled, or none; nothing is left in ``out`` then.
    """
    import torch

    import al_patch
    import al_report
    with al_report.new_folder(out), opened_run(
            work_dir, al_report.start_quietly) as run, al_patch.checkpoints_are_data(), torch.no_grad():
        al_report.check_pool(run)
        state = doubted(run, out, budget)
        look = second_look()(state, run)
        look.collector.result = functools.cache(look.collector.result)  # which `asked` asks, too
        for name, seen in al_patch.watched(state, 'suspects', look.look(), sum(map(len, look.rounds.values()))):
            look.collector.add(name, *look.candidates(name, seen))
        asked, chosen = look.asked(), look.collector.result()
        if len(chosen.id) < budget:
            raise ValueError(f'--budget should be at most the {len(chosen.id)} {state.al.unit.type}s that are labelled '
                             f'in {work_dir}, but got {budget}')
        request(state, asked)
        order = np.argsort(-chosen.score, kind='stable').tolist()
        rows = [[look.names[chosen.image[i]], int(chosen.id[i]), f'{chosen.score[i]:.4g}'] for i in order]
        al_report.write_csv(osp.join(out, 'suspects.csv'), [
            ['image', 'unit', 'loss', 'label', 'predicted', 'round'], *(
                [name, i, loss, *look.classes[name, i]] for name, i, loss in rows)])
        for name in asked:
            draw_suspects(state, run, name)
    return (f'{len(rows)} {state.al.unit.type}s in {len(asked)} images, see {out}. Mended label maps go into '
            f'{run.folder()}/labels, and --resume takes them')


def doubted(run: State, out: str, budget: int) -> State:
    """The state of a run in ``out`` over the same images, where all that is labelled in the other can be asked for, and
    nothing else."""
    import al_patch
    al = al_patch.parse_settings({**{key: run.al[key] for key in ('unit', 'logits')}, 'rounds': 1, 'budget': budget,
                                  'oracle': 'human', 'seed': run.seed, 'strategy': 'entropy'})  # for its top-k
    state = al_patch.State(dict(seed=run.seed, config={}), osp.abspath(out), al, run.runner, run.pool)
    state.units = run.units  # superpixels lie there
    kept = [path for k in range(len(run.rounds)) if (path := kept_checkpoint(run, k))]
    if not kept:
        raise ValueError(f'no round of {run.work_dir} is trained yet, or no checkpoint is there: there is no model to '
                         'contradict a label. Let a round train, with al.keep=\'all\'')
    checkpoint, asked = kept[-1], {}
    os.makedirs(state.folder(0))
    os.symlink(checkpoint, osp.join(state.folder(0), osp.basename(checkpoint)))
    state.rounds.append(dict(asked=asked, strategy={}, spent={}, metrics={}, train_seconds=0,
                             checkpoints=dict(last=osp.basename(checkpoint)), pixels=0, void_pixels=0))
    for name in run.pool.names:
        known = known_mask(run, name) if name in run.labelled() else np.zeros(run.pool.sizes[name], bool)
        if not known.all():
            asked[name] = [0, int((~known).sum())] if known.any() and run.counts_pixels else None
            state.entry['pixels'] += int((~known).sum())
            if asked[name]:
                al_patch.write_png(state.mask_path(0, name), ~known)
    state._labelled.clear()
    state.entry['spent'], state.phase = state.spent(), 'query'
    cfg = state.runner.cfg
    cfg.al = al
    cfg.dump(osp.join(out, 'config.py'))
    return state


def kept_checkpoint(run: State, k: int) -> str | None:
    """The last checkpoint of a round, if it is trained and has not been deleted."""
    with contextlib.suppress(FileNotFoundError, KeyError):
        return run.checkpoint(k, 'last')


def known_mask(run: State, name: str, k: int | None = None) -> np.ndarray:
    """What is labelled of an image by a round, or now: of people's, what is accepted, (H, W)."""
    return run.mask(name, k) & (run.stored_label(name)[1] if run.keeps_labels else True)


@functools.cache
def second_look() -> type:
    """A query of what is labelled, whose score is the loss: the class, which needs al_patch."""
    import torch

    import al_patch

    class SecondLook(al_patch.Query):
        """
        Args:
            state: See ``doubted``.
            run: What it doubts.

        Attributes:
            rounds: Round -> the images that it asked for; ``checkpoints``: of each, the last, if it is there.
            classes: Name and unit -> what it is labelled and predicted as, and its round.
        """

        def __init__(self, state: State, run: State):
            super().__init__(state, run.runner)
            self.run, self.classes, labelled = run, {}, {*self.names}
            self.rounds = {k: [name for name in entry['asked'] if name in labelled]
                           for k, entry in enumerate(run.rounds)}
            self.checkpoints = [kept_checkpoint(run, k) for k in range(len(run.rounds))]
            newest = [path for path in self.checkpoints if path][-1]
            self.checkpoints.append(newest)

        def look(self) -> Iterator:
            """The images of each round, as seen by the model that asked for them, which was not trained on them, or by
            the next that is still there; those of the first by the first."""
            for k, names in self.rounds.items():
                self.k = k
                al_patch.load_weights(self.run, next(path for path in self.checkpoints[max(0, k - 1):] if path))
                network = al_patch.Network(self.run.runner, None, self.run.al.logits)
                yield from network.look(self.state, names, [al_patch.to_image], shared=False)

        def candidates(self, name: str, seen) -> tuple:
            state, run, probs_NCHW, units = self.state, self.run, seen.means[-1]['probs_NCHW'], self.state.units(name)
            mine = known_mask(run, name, self.k)
            mine &= ~run.mask(name, self.k - 1) if self.k else True
            label = torch.from_numpy(run.load_label(name).astype(np.int64))
            known = torch.from_numpy(mine) & (label != state.pool.ignore_index)
            label = torch.where(known, label, 0).to(probs_NCHW.device)
            loss_HW = -probs_NCHW[0].gather(0, label[None])[0].clamp_min(1e-12).log().cpu() * known
            sums, shares = (torch.as_tensor(units.values(each.float(), 'mean')) for each in (loss_HW, known))
            values = torch.where(shares > 0, sums / shares.clamp_min(1e-12), -1.)  # void contradicts nothing
            values = values if units.is_dense else values.numpy()
            draw, taken = self.draw_of(name), ~mine if state.counts_pixels else not mine.any()
            ids, values, pixels = units.candidates(values, taken, draw, self.limit(name, units), self.collector.floor,
                                                   self.collector.floor_draw)
            if len(ids):
                void, number = probs_NCHW.shape[1], probs_NCHW.shape[1] + 1
                best = np.argsort(-values, kind='stable')[:self.budget()]
                best.sort()
                shown = [units.histograms(ids[best], each, number).argmax(1) for each in (
                    torch.where(known, label.cpu(), void), torch.where(known, probs_NCHW[0].argmax(0).cpu(), void))]
                names = [*run.classes, *map(str, range(len(run.classes), void)), 'void']
                for i, one, other in zip(ids[best].tolist(), *shown):
                    self.classes[name, i] = names[one], names[other], self.k
            rows = al_patch.Candidates(np.full(len(ids), np.int32(self.position[name])), ids, values, pixels, draw(ids))
            return rows, rows.rows(slice(0)), units.number

    return SecondLook


def draw_suspects(state: State, run: State, name: str) -> None:
    """An image, its labels and what the model predicts, with what is doubted in it, side by side."""
    import mmcv

    import al_patch
    pool, colours = state.pool, np.append(class_colours(state.pool)[1][:, ::-1], [[255] * 3], 0)
    predicted = read_label(png_path(state, 'prediction', name), pool, name)
    labels = [np.where(label == pool.ignore_index, len(colours) - 1, label).clip(0, len(colours) - 1)
              for label in (run.load_label(name).astype(np.int64), predicted.astype(np.int64))]
    mask, image = asked_mask(state, name), pool.load_image(name)
    panels = [overlay(panel, mask) for panel in (image, *(colours[label].astype(np.uint8) for label in labels))]
    path = al_patch.png_path(osp.join(state.work_dir, 'pictures'), name, state.work_dir)
    mmcv.imwrite(np.hstack(panels), path[:-len('png')] + 'jpg')


def request(state: State, asked: dict) -> None:
    """Write what a state's first query has asked for: the state, the exports, scores and a contact sheet."""
    import al_patch
    import al_report
    al_patch.add_round(state, asked)
    export(state, state.runner)

    def write_lists() -> None:
        first = sorted(state.pool.names, key=lambda name: -state.scores.get(name, 0))
        al_report.write_csv(osp.join(state.work_dir, 'scores.csv'), [
            ['image', 'score', f'{state.al.unit.type}s asked'], *(
                [name, state.scores.get(name, ''), units_in(asked, name)] for name in first
                if name in state.scores or name in asked)])
        sheet = al_report.draw_contact_sheet(state.pool, [name for name in first if name in asked], state.scores)
        al_report.save_figure(sheet, osp.join(state.work_dir, 'contact_sheet.png'))

    al_patch.on_rank_0(write_lists)


def units_in(asked: dict, name: str) -> int:
    """How many units a query asks for in an image."""
    ids = asked.get(name, ())
    return 1 if ids is None else len(ids)


def dataset(work_dir: str, out: str, copy: bool = False, parts: int = 1) -> str:
    """Write all that is labelled in a run as a data set: ``img/``, links; ``ann/``, label maps in the values of the
    run's own, void where nothing is labelled; ``round/``, the round of every label, 255 where there is none;
    ``splits/``; ``config.py``, to train on it with mmseg alone; ``labels.csv``, a line an image and round, and
    ``invoice.csv``, a line a round and class. What lies in the inbox is taken first.

    Args:
        parts: In how many shares people were given each round: the invoice has lines of their own for each.

    Raises:
        ValueError: Nothing is labelled, or a label file in the inbox or an image cannot be used.
    """
    import al_patch
    import al_report
    if parts < 1:
        raise ValueError(f'--parts should be a positive int, but got {parts}')
    with al_report.new_folder(out), stopped_run(work_dir), opened_run(work_dir, al_report.start_quietly) as state:
        al_report.check_pool(state)
        if state.keeps_labels:
            accept_labels(state)
            state.save()
        found = al_patch.on_all_ranks(lambda name: write_image(state, name, out, copy), [*state.labelled()], 'Data set')
        found = {name: each for name, each in found.items() if each}
        if not found:
            raise ValueError(f'nothing is labelled in {work_dir} yet: there is no data set')
        write_config(state, out, {name: file for name, (file, _) in found.items()})
        write_tables(state, out, {name: shares for name, (_, shares) in found.items()}, parts)
    return f'{len(found)} labelled images are in {out}, to train with {osp.join(out, "config.py")}'


def write_image(state: State, name: str, out: str, copies: bool) -> tuple[str, dict] | None:
    """Write an image of a data set, its label map, and the round of each label.

    Returns:
        Its file below ``img``, and for each round that asked for some of it, for each class there, void, and all
        together: pixels and units (None where the run has not noted them). None where nothing is labelled.

    Raises:
        ValueError: The image is several files, or its pipeline reads another label map than was written.
    """
    import al_patch
    pool, past, void = state.pool, copy.copy(state), state.pool.ignore_index
    info, known = pool.info(name), known_mask(state, name)
    if not known.any():
        return None
    path, leaf = al_patch.image_path(info), pool.leaf_of(name)[0]
    if info.get('img_path') != path or 'img_path2' in info:
        raise ValueError(f'the image {name!r} should be one file, to stand in a data set, but is {info["img_path"]!r}')
    label = np.where(known, state.load_label(name).astype(np.int64), void)
    rounds, shares = np.full(label.shape, 255, np.uint8), {}
    for k, entry in enumerate(state.rounds):
        if name in entry['asked']:
            new = known & state.mask(name, k) & ~state.mask(name, k - 1)
            rounds[new], past.rounds = min(k, 254), state.rounds[:k + 1]
            rows = numbers_of_units(past, name)
            classes = {state.classes[c] if c != void else 'void': label == c for c in np.unique(label[new]).tolist()}
            shares[k] = {key: (int((new & where).sum()), rows is not None and len(np.unique(rows[new & where])))
                         for key, where in {**classes, 'all': new}.items()}
    target = al_patch.png_path(osp.join(out, 'img'), name).removesuffix('.png')
    suffix = getattr(leaf, 'img_suffix', None) or osp.splitext(path)[1]
    os.makedirs(osp.dirname(target), exist_ok=True)
    (shutil.copyfile if copies else os.symlink)(osp.abspath(path), target + suffix)
    ann, when = (al_patch.png_path(osp.join(out, kind), name) for kind in ('ann', 'round'))
    write_label(ann, pool, name, label)
    al_patch.write_png(when, rounds)
    if (load_label(pool, name, ann) != label).any():
        raise ValueError(f'the label map of {name!r} should be one that the pipeline of its data set reads, but {ann} '
                         'is read as other classes: are label files in colours?')
    return name + suffix, shares


def numbers_of_units(past: State, name: str) -> np.ndarray | None:
    """The number of the unit of each pixel that the newest round has asked for in an image, (H, W); None where that
    cannot be told any more."""
    if past.entry['asked'][name] is None or name in past.entry.get('ids', {}):
        return unit_rows(past, name)
    units = past.units(name)
    numbers = np.arange(math.prod(units.shape)).reshape(units.shape)
    return getattr(units, 'labels', numbers if getattr(units, 'radius', 0) == 0 else None)


def write_config(state: State, out: str, files: dict[str, str]) -> None:
    """Write the split files of a data set, and the config of training on it with mmseg alone: the run's, with the
    overrides of its newest round."""
    import al_patch
    import al_report
    cfg, pool = copy.deepcopy(state.runner.cfg), state.pool
    cfg.merge_from_dict(al_patch.override_of(state, state.round))
    for key in ('al', 'work_dir', 'experiment_name', 'launcher', 'resume'):
        cfg.pop(key, None)
    given = (cfg.pop('custom_imports', None) or {}).get('imports', [])
    modules = [each for each in ([given] if isinstance(given, str) else given) if each != 'al_patch']
    if modules:
        cfg.custom_imports = dict(imports=modules)
    seed = cfg.get('randomness', {}).get('seed')
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': state.seed if seed is None else seed}

    def listed(leaf: dict, path: str) -> dict:
        if path not in pool.paths:
            return leaf
        number, (leaf, suffix) = pool.paths.index(path), al_report.listing(leaf)
        names = [name for name in pool.names if name in files and pool.where[name][0] == number]
        suffix = suffix if all(files[name] == name + suffix for name in names) else ''
        split = f'splits/train{f"_{number}" * (len(pool.paths) > 1)}.txt'
        write_lines(osp.join(out, split), [files[name].removesuffix(suffix) for name in names])
        if not suffix:  # then a label map is known by the image's whole name
            for name in names:
                path = osp.join(out, 'ann', name)
                os.replace(f'{path}.png', osp.join(out, 'ann', f'{files[name]}.png'))
        return {**leaf, 'data_root': '{{ fileDirname }}', 'ann_file': split, 'img_suffix': suffix,
                'data_prefix': dict(img_path='img', seg_map_path='ann'), 'seg_map_suffix': '.png'}

    cfg.train_dataloader.dataset = al_patch.map_leaves(cfg.train_dataloader.dataset, listed)
    partly = "# The run's rounds go on from earlier weights: set load_from to them.\n" * (state.al.weights != 'scratch')
    if state.counts_pixels:
        average_labelled(cfg.model)
        partly += ("# Images are partly labelled: cross entropies are means over labelled pixels here, by mmseg's own "
                  'avg_non_ignore. What a\n# run does beside that needs al_patch: it leaves out images without labels, '
                  'draws crops where labels are, keeps\n# labelled pixels in a resize, and lets any other loss see '
                  'labelled pixels alone.\n')
    for k in range(len(state.rounds)):
        write_lines(osp.join(out, 'splits', f'round_{k}.txt'), [
            name for name in files if name in state.rounds[k]['asked']])
    al_patch.write_atomically(osp.join(out, 'config.py'), (
        f'# All that was labelled in {len(state.rounds)} rounds, for mmseg alone; the schedule of round {state.round}. '
        f'Draws of augmentation are other ones\n# than in the run, and so are the figures, by as much as another seed '
        f'makes.\n{partly}{cfg.pretty_text}'))


def write_lines(path: str, lines: list[str]) -> None:
    import al_patch
    al_patch.write_atomically(path, ''.join(f'{line}\n' for line in lines))


def average_labelled(model: dict | list) -> None:
    """Let cross entropies in a model's config be means over labelled pixels."""
    for part in model.values() if isinstance(model, dict) else model:
        if isinstance(part, (dict, list)):
            average_labelled(part)
    if isinstance(model, dict) and model.get('type') == 'CrossEntropyLoss':
        model['avg_non_ignore'] = True


def write_tables(state: State, out: str, found: dict[str, dict], parts: int) -> None:
    """Write what each image and what each round and class has: ``labels.csv`` and ``invoice.csv``.

    Args:
        found: Name of an image -> round -> class, ``void`` or ``all`` -> pixels and units.
        parts: Shares of a round, by the place of an image in its ``to_label.txt``.
    """
    import al_report
    lines, sums = [], {}
    for name, rounds in found.items():
        source = [*read_json(state.label_path('read', name, '.json'))][-1:]
        for k, shares in rounds.items():
            pixels, units = shares['all']
            part = part_of(state, k, name, parts)
            lines.append([name, k, part, units or '', pixels, shares.get('void', (0, 0))[0], *(source or [''])])
            for key, (pixels, units) in shares.items():
                row = sums.setdefault((k, part, key), [0, 0, 0])
                row[:] = [row[0] + 1, row[1] + units, row[2] + pixels]
    order = {'all': -1, **{name: c for c, name in enumerate(state.classes)}, 'void': len(state.classes)}
    al_report.write_csv(osp.join(out, 'labels.csv'), [
        ['image', 'round', 'share', 'units', 'pixels', 'void pixels', 'newest file'], *lines])
    prices, table = state.al.get('prices') or {}, []
    for (k, part, key), (images, units, pixels) in sorted(sums.items(), key=lambda item: (
            item[0][:2], order.get(item[0][2], 0))):
        clicks = units if state.counts_pixels else 0
        cost = al_report.cost_of(prices, images, clicks, pixels) if prices and key == 'all' else ''
        table.append([k, part, key, images, units or '', clicks or '', pixels, cost,
                      *(state.rounds[k].get(when, '') for when in ('asked_at', 'accepted_at'))])
    al_report.write_csv(osp.join(out, 'invoice.csv'), [
        ['round', 'share', 'class', 'images', 'units', 'clicks', 'pixels', 'cost', 'asked', 'accepted'], *table])


def part_of(state: State, k: int, name: str, parts: int) -> str:
    """The share of a round in which people were given an image."""
    path = pathlib.Path(state.folder(k), 'to_label', 'to_label.txt')
    names = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    return f'{names.index(name) % parts + 1}/{parts}' if name in names else ''


# ---------------------------------------------------------------------------------------------------------------------
# What comes back: label files that people hand in, the store that keeps them, and when a round has enough
# ---------------------------------------------------------------------------------------------------------------------


def check_oracle(state: State) -> None:
    """
    Raises:
        ValueError: The run would not wait for what it polls for; or the value for what is of no class has a meaning.
    """
    value, pool = state.al.oracle.unlabelable, state.pool
    if state.al.oracle.accept_partial and state.al.oracle.wait == 'poll':
        raise ValueError("`al.oracle.accept_partial` should be False with wait='poll', for it waits for all, but got "
                         'True')
    if value is None:
        return
    names, values = class_colours(pool)[0], label_values(pool, pool.names[0])[1]
    known = {int(values[c]): f'the class {name!r}' for c, name in enumerate(names) if c != pool.ignore_index}
    known[int(values[pool.ignore_index])] = 'no label, `ignore_index`'
    if value in known:
        raise ValueError(f'`al.oracle.unlabelable` should be a value that label files do not have, but got {value}, '
                         f'which is {known[value]}')


def accept_labels(state: State, is_asking: bool = False) -> None:
    """Take what people have handed in into the label store. The newest round trains when all that it asked for is
    there or, with ``al.oracle.accept_partial``, when anything is: the rest goes back to the pool.

    Args:
        is_asking: The round begins: it reads no files, but what it asks for may lie in the store, from rounds that were
            undone.

    Raises:
        ValueError: It names the files that are there and wrong. What is right in others is in the store.
    """
    import al_patch
    entry, oracle, inbox = state.entry, state.al.oracle, Inbox(state)
    entry.setdefault('asked_at', now())
    entry.setdefault('ids', {})  # older states have none: what an image was asked for is one unit
    waits = state.phase == 'label'
    names = entry['asked'] if is_asking else state.labelled()
    reports = al_patch.on_all_ranks(lambda name: inbox.take(name, not is_asking), list(names))
    newest = {name: reports[name] for name in entry['asked'] if name in reports}
    accepted, asked = (sum(report[key] for report in newest.values()) for key in ('accepted', 'asked'))
    missing = {name: report['missing'] for name, report in newest.items() if report['missing']}
    wrong = [report['wrong'] for report in reports.values() if report['wrong']]
    if not is_asking:
        inbox.tell(reports, newest)
    elif accepted:
        entry['from_store'] = accepted
        state.logger.info(f'{accepted} of the {asked} units that round {state.round} asks for lie in the label store: '
                          'they are answered from there, and cost nothing again')
    if wrong:
        raise ValueError(f'{len(wrong)} label files cannot be used; all others are accepted. Mend them, and resume: '
                         f'{"; ".join(wrong[:5])}')
    if not waits:
        return
    if missing and not is_asking:
        state.logger.warning(f'{accepted} of {asked} {state.al.unit.type}s are labelled. Not yet: '
                             f'{describe_units(state, missing)}; all in {folder_of(state) / "delivered.json"}')
    if missing and not (accepted and oracle.accept_partial and not is_asking):
        return
    if missing:
        give_back(state, missing)
    entry['unchanged'] = sum(report['unchanged'] for report in newest.values())
    if entry['unchanged'] > .99 * accepted:
        state.logger.warning(f'{entry["unchanged"]} of the {accepted} {state.al.unit.type}s of round {state.round} are '
                             'exactly what the model had predicted: has anybody looked at them?')
    if state.counts_pixels:
        entry['void_pixels'] = sum(report['void'] for report in newest.values())
    state.phase = 'train'
    entry.update(al_patch.hold_out(state), spent=state.spent(), accepted_at=now())


def now() -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S')


def log_request(state: State) -> None:
    """Say what a human is to do, and how to go on."""
    import al_patch
    entry, folder = state.entry, osp.join(state.folder(), 'to_label')
    units = sum(units[0] for units in entry['asked'].values() if units)
    what = f' ({units} {state.al.unit.type}s, {entry["pixels"]} pixels)' if state.counts_pixels else ''
    names = [name for name in entry['asked'] if name not in state.dropped]
    first, own = names[0], state.pool.info(names[0]).get('seg_map_path')
    note = '' if are_grey(state) else '\nPredictions there are numbers of classes, and not the colours of label files'
    state.logger.info(f'Round {state.round} waits for labels in {len(names)} images{what}: see {folder}{note}\nPut '
                      f'each label map into {state.folder()}/labels, the first as {first}.png, or where the data set '
                      f'looks for it, the first at {own}\nOr let it be done: python al_label.py import '
                      f'{state.work_dir} FILE, what an annotation tool has exported; or push and pull, to its server\n'
                      f'Then go on with: {al_patch.resume_command()}')


def accept_truth(state: State) -> None:
    """Take one class for each unit that the newest round asks for from the data set's own labels, at once.

    Raises:
        ValueError: It names the label files that cannot be used.
    """
    import al_patch
    inbox = Inbox(state)
    reports = al_patch.on_all_ranks(lambda name: inbox.take(name, True), list(state.entry['asked'])).values()
    wrong = [report['wrong'] for report in reports if report['wrong']]
    if wrong:
        raise ValueError('; '.join(wrong[:5]))
    state.entry['void_pixels'], state.phase = sum(report['void'] for report in reports), 'train'


def give_back(state: State, missing: dict[str, list]) -> None:
    """Return units of the newest round that nobody has labelled to the pool, as if they had not been asked for."""
    import al_patch
    entry, k = state.entry, state.round

    def keep(name: str) -> list | None:
        if name not in entry['ids']:
            return None
        kept = [i for i in entry['ids'][name] if i not in missing[name]]
        new = state.mask_of(name, np.array(kept, int)) & ~state.mask(name, k - 1)
        al_patch.write_png(state.mask_path(k, name), state.mask(name, k - 1) | new)
        return [len(kept), int(new.sum())] if kept else None

    kept = al_patch.on_all_ranks(keep, list(missing))
    state.logger.warning(f'Not labelled in round {k}, and back in the pool: {describe_units(state, missing)}')
    entry['returned'] = {name: entry['asked'][name] and [len(ids), 0] for name, ids in missing.items()}
    for name, units in kept.items():
        if units:
            entry['ids'][name] = [i for i in entry['ids'][name] if i not in missing[name]]
            entry['returned'][name][1] = entry['asked'][name][1] - units[1]
            entry['asked'][name] = units
        else:
            entry['returned'][name] = entry['asked'].pop(name)
            entry['ids'].pop(name, None)
    state._labelled.clear()  # it is another
    if state.counts_pixels:
        entry['pixels'] = sum(units[1] for units in entry['asked'].values())


def describe_units(state: State, units: dict[str, list]) -> str:
    """Images and, below image level, units in them, in words."""
    return in_words(unit_words(state, units))


def unit_words(state: State, units: dict[str, list]) -> dict[str, None]:
    return {f'{name} ({state.al.unit.type} {", ".join(map(str, ids[:5]))}{" ..." * (len(ids) > 5)})'
            if state.entry['ids'].get(name) else name: None for name, ids in units.items()}


class Inbox:
    """What people hand in: a file for an image in ``round_<k>/labels`` or, where none of them has one, that of the data
    set. It is kept in the label store as classes, with what of it is done."""

    def __init__(self, state: State):
        self.state, self.oracle = state, state.al.oracle if is_human(state) else TRUTH
        self.exported, self.staged = read_json(exported_path(state)), None  # a folder of files that are yet to come in

    def sources(self, name: str, before: dict) -> list[tuple[str, str]]:
        """Where an image's labels may come from, and the path there: what counts more comes later. A file that is gone
        or empty counts as it was handed in ``before``."""
        found, handed_in = [], False
        for k in range(self.state.round + 1):
            source, folders = f'round_{k}', [osp.join(self.state.folder(k), 'labels')]
            if self.staged and k == self.state.round:
                folders.insert(0, self.staged)
            here = next(filter(None, (files_of(folder, name) for folder in folders)), [])
            handed_in |= bool(here)
            if not here and source in before:
                here = [self.state.label_path('handed_in', f'{name}.{before[source]}', '')]
            found += [(source, path) for path in here]
        return found if handed_in and DATA_SET not in before else [
            (DATA_SET, self.state.pool.info(name).get('seg_map_path')), *found]

    def take(self, name: str, reads: bool, keeps: bool = True) -> dict:
        """Keep what is new and right in an image's files, if it ``reads`` any and ``keeps`` that, and compare what is
        done with what the newest round asks for.

        Returns:
            What came of it: how many units were ``asked`` for and ``accepted``, ids of the ``missing``, ``void``
            pixels, units ``unchanged`` from the prediction; pixels ``changed`` in labels that were there before, and
            ``outside`` of what was asked for; a file that is ``untouched`` since it was exported; what is ``wrong``.
        """
        import al_patch
        state, report = self.state, dict(untouched='', changed=0, outside=0, wrong='')
        (classes, done), rows, files = self.stored(name), unit_rows(state, name), []
        labelled = state.mask(name)
        mask = labelled | (rows >= 0)
        if keeps and (mask & ~labelled).any():  # stopped while units went back to the pool
            al_patch.write_png(state.mask_path(state.round, name), mask)
        was, had, answered = classes.copy(), done.copy(), np.zeros_like(done)
        try:
            waits = bool(((rows >= 0) & ~done).any())
            for source, path, content, version in self.new_files(name, report, waits) if reads else ():
                labels, known = self.read(name, path, mask)
                if source != DATA_SET and path.startswith(self.staged or ''):  # an import tells of its own files alone
                    report['outside'] += int((known & ~mask).sum())
                answered |= known & mask
                classes[known & mask] = labels[known & mask]
                files.append((source, content, version))
        except ValueError as error:
            report['wrong'], files = str(error), []
            classes, answered = was, np.zeros_like(done)
        size = np.bincount(rows[rows >= 0])

        def pixels(where_HW: np.ndarray) -> np.ndarray:
            return np.bincount(rows[(rows >= 0) & where_HW], minlength=len(size))

        is_done = (pixels(had) == size) | (pixels(answered) > 0)
        whole = np.append(is_done, False)[rows]  # a unit with a label is done: what has none in it is void
        report['changed'] = int((had & (was != classes)).sum())
        if files and keeps:
            self.keep(name, classes, had | answered | whole, files, report['changed'])
        ids = state.entry['ids'].get(name) or [0]
        report.update(asked=len(size), accepted=int(is_done.sum()), missing=[ids[i] for i in np.flatnonzero(~is_done)],
                      void=int((classes[whole] == state.pool.ignore_index).sum()), unchanged=0)
        path = folder_of(state) / 'prediction' / f'{name}.png'
        if len(size) and path.is_file():
            predicted = read_label(str(path), state.pool, name)
            same = (classes == predicted) & (predicted != state.pool.ignore_index)
            report['unchanged'] = int((is_done & (pixels(same) == size)).sum())
        return report

    def stored(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """As ``State.stored_label``.

        Raises:
            ValueError: The store has lost a file, or has one of another image.
        """
        size, paths = self.state.pool.sizes[name], [self.state.label_path(kind, name) for kind in ('classes', 'done')]
        if osp.isfile(self.state.label_path('read', name, '.json')) and not all(map(osp.isfile, paths)):
            raise ValueError(f'{" and ".join(path for path in paths if not osp.isfile(path))} of the label store is '
                             'gone: restore it from a copy')
        stored = self.state.stored_label(name)
        for path, array in zip(paths, stored):
            if array.shape != size:
                raise ValueError(f'{path} cannot be used (its size should be that of its image, {size}, but is '
                                 f'{array.shape}): restore it from a copy')
        return stored

    def new_files(self, name: str, report: dict, is_new: bool) -> Iterator[tuple[str, str, bytes, str]]:
        """An image's files that have something new, and those that count more than these: source, path, content, and
        the name of this version. All of them are ``is_new`` where something is waited for: it may have been in a file,
        kept aside, before anybody asked for it."""
        from mmengine import fileio

        import al_patch
        before = read_json(self.state.label_path('read', name, '.json'))
        for source, path in self.sources(name, before):
            content = b''
            with al_patch.reading(path), contextlib.suppress(FileNotFoundError):  # a data set may have none yet
                content = fileio.get(path) if path else b''
            version = version_of(content)
            if version in self.exported.get(name, ()) and not self.oracle.accept_unchanged:
                report['untouched'] = path
                continue
            version += osp.splitext(path or '')[1]
            is_new |= bool(content) and before.get(source) != version
            if content and is_new:
                yield source, path, content, version

    def read(self, name: str, path: str, mask_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The classes of a label file, and where it has an answer, (H, W) both.

        Raises:
            ValueError: It cannot be read, is of another size, or has a value that is no class under the mask; it names
                the file.
        """
        from mmengine import fileio

        import al_patch
        pool, void_HW = self.state.pool, None
        if self.oracle.unlabelable is not None:
            with al_patch.reading(path), Image.open(io.BytesIO(fileio.get(path))) as image:
                void_HW = np.asarray(image) == self.oracle.unlabelable
            void_HW = void_HW.all(2) if void_HW.ndim > 2 else void_HW
            if void_HW.all() and void_HW.shape == pool.sizes[name]:
                return np.full(void_HW.shape, pool.ignore_index), void_HW
        labels = pool.check_label(name, self.state.class_count, mask_HW, path,
                                  lambda name: load_label(pool, name, path, void_HW))
        known = labels != pool.ignore_index
        with al_patch.reading(path):
            return self.spread(name, labels, known if void_HW is None else known | void_HW)

    def spread(self, name: str, labels: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels, and where they are known, (H, W) both; where an answer is one class for a unit, for all of it. From
        the truth that is the most frequent one, void last of those that are equally so.

        Raises:
            ValueError: Somebody has given two.
        """
        state, ignore_index = self.state, self.state.pool.ignore_index
        if not is_one_class(state):
            return labels, known
        numbers, ids = unit_numbers(state, name)
        values, index = np.unique(
            np.where(labels == ignore_index, 2**16, labels.astype(np.int64)), return_inverse=True)
        inside = (numbers >= 0) & (known | (not is_human(state)))
        counts = np.bincount(numbers[inside] * len(values) + index.reshape(labels.shape)[inside],
                             minlength=len(ids) * len(values)).reshape(-1, len(values))
        values[values == 2**16] = ignore_index
        for i in np.flatnonzero((counts > 0).sum(1) > 1) if is_human(state) else ():
            names = [tool_labels(state)[0][v] if v != ignore_index else UNLABELABLE for v in values[counts[i] > 0]]
            raise ValueError(f'{name}: {state.al.unit.type} {ids[i]} should have one class, but got '
                             f'{" and ".join(names)}')
        known = np.where(numbers >= 0, np.append(counts.any(1), False)[numbers], known)
        answers = np.append(values[counts.argmax(1)] if len(ids) else [], ignore_index).astype(labels.dtype)
        return np.where((numbers >= 0) & known, answers[numbers], labels), known

    def keep(self, name: str, classes: np.ndarray, done: np.ndarray, files: list, changed: int) -> None:
        """Put an image's labels into the store. It is done again until the last file of it is written."""
        from al_patch import write_atomically, write_png
        path, (_, _, newest) = self.state.label_path, files[-1]
        for _, content, version in files:
            kept = path('handed_in', f'{name}.{version}', '')
            if not osp.isfile(kept):
                write_atomically(kept, content)
        if changed:
            kept = path('changed', name, '.json')
            write_atomically(kept, json.dumps({**read_json(kept), newest: changed}))
        depth = np.uint8 if (self.state.class_count or 256) < 256 else np.uint16
        is_void = classes == self.state.pool.ignore_index
        write_png(path('classes', name), np.where(is_void, np.iinfo(depth).max, classes).astype(depth))
        write_png(path('done', name), done)
        kept = path('read', name, '.json')
        before = read_json(kept)
        read = {**before, **{source: version for source, _, version in files}}
        read[files[-1][0]] = read.pop(files[-1][0])  # the newest is last
        write_atomically(kept, json.dumps(read))

    def tell(self, reports: dict, newest: dict) -> None:
        """Say what came of what people handed in, and write it down: of the newest round in ``delivered.json``, and
        which labels of earlier ones it changed in ``label_changes.json``."""
        import al_patch
        state, folder, warn = self.state, folder_of(self.state), self.state.logger.warning
        changed, outside, untouched = ({name: report[key] for name, report in reports.items() if report[key]}
                                       for key in ('changed', 'outside', 'untouched'))
        if al_patch.is_main_process():
            al_patch.write_atomically(folder / 'delivered.json', json.dumps(newest, indent=1))
            root = pathlib.Path(state.work_dir, 'labels', 'changed')
            changes = {str(path.relative_to(root))[:-len('.json')]: json.loads(path.read_text())
                       for path in sorted(root.rglob('*.json'))}
            if changes:
                al_patch.write_atomically(root.parent / 'label_changes.json', json.dumps(changes, indent=1))
        if changed:
            warn(f'Labels that were there have changed, and the newer count: {in_words(changed, "pixels")}; all in '
                 f'{state.work_dir}/labels/label_changes.json, the older files in {state.work_dir}/labels/handed_in')
        if outside:
            state.logger.info('Nobody asked for what lies elsewhere in these files, it is kept aside: '
                              f'{in_words(outside, "pixels")}')
        if untouched:
            warn('Handed in as it was exported, which is no answer (but with `al.oracle.accept_unchanged`): '
                 f'{in_words(untouched)}')
        strange, known = {}, {*reports, *state.dropped}
        for k in range(state.round + 1):
            inbox = pathlib.Path(state.folder(k), 'labels')
            strange.update({str(path): None for path in sorted(inbox.rglob('[!.]*')) if path.is_file() and (
                path.suffix in ('', '.tmp') or str(path.relative_to(inbox).with_suffix('')) not in known)})
        if strange:
            warn(f'Nobody asked for these, they are kept aside: {in_words(strange)}')
        if (folder / 'void.txt').is_file():
            warn(f'{folder / "void.txt"} is not read any more: give what is of no class a value of its own in the '
                 'label file, and name it in `al.oracle.unlabelable`')


def files_of(folder: str, name: str) -> list[str]:
    """The files in an inbox that are an image's, whatever their extension."""
    stem = osp.join(folder, name)
    return [path for path in sorted(glob.glob(f'{glob.escape(stem)}.*')) if osp.splitext(path)[0] == stem and
            not path.endswith('.tmp') and osp.getsize(path)]


def are_grey(state: State) -> bool:
    """Whether what was handed in so far, or nothing yet, has one number a pixel."""
    for name in state.labelled():
        with contextlib.suppress(OSError, LookupError), Image.open(state.stored(name)[1]) as image:
            return len(image.getbands()) == 1
    return True

# ---------------------------------------------------------------------------------------------------------------------
# What: masks, pictures, label maps to start from
# ---------------------------------------------------------------------------------------------------------------------


def export(state: State, trainer: Runner | None = None, tools: list[str] | None = None) -> None:
    """Write what the newest round asks for. All ranks share the images; ``to_label.txt`` comes last, so that an export
    is finished if it is there. Writing it again replaces each file by the same, and leaves an annotator's alone.

    Args:
        trainer: The runner whose model asked. Without it, it is built as it was.
        tools: Those that files are for; default: all.
    """
    import al_patch
    check_names(state)
    folder, names = folder_of(state), names_to_label(state)
    folder.mkdir(parents=True, exist_ok=True)
    if state.counts_pixels:
        al_patch.on_all_ranks(lambda name: write_mask(state, name), names)
    if state.round:  # before round 0 there is no model
        write_predictions(state, trainer, names)

    def write_formats() -> None:
        for tool in tools or TOOLS:
            for file, content in TOOLS[tool](state, names, {}).items():
                al_patch.write_atomically(folder / file, content)
        al_patch.write_atomically(folder / 'instructions.txt', instructions(state))
        al_patch.write_atomically(folder / 'to_label.txt', ''.join(f'{name}\n' for name in names))

    al_patch.on_rank_0(write_formats)  # which can take long


def pack(state: State, tool: str, part: tuple, with_images: bool) -> pathlib.Path:
    """Write one of several shares of the images for a tool into one zip, and return its path."""
    import al_patch
    names, share = names_to_label(state)[part[0] - 1::part[1]], folder_of(state) / f'{tool}_{part[0]}_of_{part[1]}.zip'
    if not names:
        raise ValueError(f'--part should be of at most {len(names_to_label(state))} shares, the images of round '
                         f'{state.round}, but got {part[1]}')
    images = {name: image_path(state, name) for name in names if with_images}
    temporary = f'{share}{al_patch.TEMPORARY}'
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(temporary, 'w', zipfile.ZIP_DEFLATED) as archive:
        for file, content in TOOLS[tool](state, names, images).items():
            archive.writestr(file, content)
        archive.writestr('instructions.txt', instructions(state))
        for name, image in images.items():
            archive.write(image, f'images/{cvat_file(state, name)}')
        for name in names if tool == 'png' else ():
            write_label(path := osp.join(folder, 'label.png'), state.pool, name,
                        read_label(png_path(state, 'prediction', name), state.pool, name))
            archive.write(path, f'labels/{name}.png')
            for kind in ('mask', 'overlay'):
                for file in glob.glob(glob.escape(png_path(state, kind, name)[:-len('png')]) + '*'):
                    archive.write(file, osp.relpath(file, folder_of(state)))
    os.replace(temporary, share)
    return share


def is_finished(state: State) -> bool:
    """Whether an earlier start of the run has written all of the export."""
    return state.is_resumed and (folder_of(state) / 'to_label.txt').is_file()


def write_mask(state: State, name: str) -> None:
    """Write what is asked for of an image, as a mask and as a picture."""
    import mmcv

    import al_patch
    mask, image = mask_to_label(state, name), state.pool.load_image(name)
    al_patch.write_png(png_path(state, 'mask', name), mask)
    mmcv.imwrite(overlay(image, mask), png_path(state, 'overlay', name)[:-len('png')] + 'jpg')


def overlay(image: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """A picture of what is to be labelled: the rest is dimmed, and what is asked for has an outline or, where it is too
    small to be seen, a circle. A small image is enlarged by a whole factor. (H, W, 3) uint8, BGR, as mmcv loads it"""
    image = np.atleast_3d(image)
    picture = image[..., [0, 1, 2] if image.shape[2] >= 3 else [0, 0, 0]]
    if picture.dtype != np.uint8:
        picture = cv2.normalize(picture.astype(np.float32), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    scale = max(1, 800 // max(mask_HW.shape))
    picture, mask_HW = (each.repeat(scale, 0).repeat(scale, 1) for each in (picture, mask_HW))
    picture, side = np.where(mask_HW[..., None], picture, picture // 2), max(mask_HW.shape)
    width = 2 + side // 1000
    wider = cv2.dilate(mask_HW.view(np.uint8), np.ones((4 * width + 1, ) * 2, np.uint8))
    for piece in cv2.findContours(wider, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]:
        (x, y), radius = cv2.minEnclosingCircle(piece)
        for colour, line in ((0, 0, 0), width + 2), ((0, 230, 255), width):
            if radius < side / 40:
                cv2.circle(picture, (round(x), round(y)), round(radius) + side // 80, colour, line, cv2.LINE_AA)
            else:
                cv2.drawContours(picture, [piece], -1, colour, line)
    return picture


def write_predictions(state: State, trainer: Runner | None, names: list[str]) -> None:
    """Write label maps of some images to start from, with what the checkpoint that asked for the round predicts."""
    import torch

    import al_patch
    past = copy.copy(state)
    past.rounds = state.rounds[:-1]
    past.runner = trainer or type(state.runner).from_cfg(al_patch.round_config(past))  # a round may override the model

    @torch.no_grad()
    def write_share(rank: str) -> None:
        al_patch.load_weights(past, past.checkpoint(past.round, state.al.query_with))
        network = al_patch.Network(past.runner, logits_of=state.al.logits)
        for name, seen in network.look(state, names, [al_patch.to_image]):
            write_prediction(state, name, network.classify(seen))

    # one call on each rank, which waits for no other: whatever fails in it, nobody hangs
    al_patch.on_all_ranks(write_share, [str(rank) for rank in range(al_patch.get_dist_info()[1])])
    if al_patch.is_main_process():
        note_exported(state, names)
    if not trainer:
        al_patch.close_round(past.runner)


def note_exported(state: State, names: list[str]) -> None:
    """Note versions of label maps to start from, so that one that comes back untouched is known."""
    import al_patch
    exported = read_json(exported_path(state))
    for name in names:
        version = version_of(pathlib.Path(png_path(state, 'prediction', name)).read_bytes())
        exported[name] = list(dict.fromkeys([*exported.get(name, ()), version]))
    al_patch.write_atomically(exported_path(state), json.dumps(exported, indent=1))


def write_prediction(state: State, name: str, pred_HW: np.ndarray) -> None:
    """Write a label map to start from: the prediction where labels are asked for, what was labelled before, and nothing
    elsewhere. A unit that has one class, as a single pixel, has no prediction: it would be an answer."""
    pool, (classes, done), rows = state.pool, state.stored_label(name), unit_rows(state, name)
    size = np.bincount(rows[rows >= 0], minlength=1) * (not is_one_class(state))
    mask = mask_to_label(state, name) & np.append(size > 1, False)[rows]
    asked = np.where(mask, pred_HW, pool.ignore_index)
    write_label(png_path(state, 'prediction', name), pool, name, np.where(done, classes, asked))

# ---------------------------------------------------------------------------------------------------------------------
# The formats of annotation tools
# ---------------------------------------------------------------------------------------------------------------------


def check_names(state: State) -> None:
    """Refuse image names that files with a name a line cannot hold: to_label.txt, and the default.txt of CVAT.

    Raises:
        ValueError: It names the image.
    """
    for name in (name for name in state.entry['asked'] if name not in state.dropped):
        for line in name, image_stem(state.pool, name):
            if line.strip().splitlines() != [line] or line.startswith('#'):
                raise ValueError(f'image names should be one line, without spaces around it or # before it, to stand '
                                 f'in to_label.txt and cvat.zip, but got {name!r}: rename the file')


def cvat_files(state: State, names: list[str], images: dict) -> dict[str, str | bytes]:
    """``cvat.zip``, what is asked for and label maps to start from as 'CVAT for images 1.1', and ``cvat_labels.json``
    for CVAT's raw label constructor."""
    classes, colours = tool_labels(state)
    labels = [dict(name=c, color=f'#{bytes(colour).hex()}', attributes=[])
              for c, colour in zip([*classes, asked_label(state)], [*colours, np.uint8([255, 230, 0])])]
    root = ET.Element('annotations')
    ET.SubElement(root, 'version').text = '1.1'
    listed = ET.SubElement(ET.SubElement(ET.SubElement(root, 'meta'), 'task'), 'labels')
    for label in labels:
        element = ET.SubElement(listed, 'label')
        for key in 'name', 'color':
            ET.SubElement(element, key).text = label[key]
        ET.SubElement(element, 'attributes')
    for i, name in enumerate(names):
        h, w = state.pool.sizes[name]
        image = ET.SubElement(root, 'image', id=str(i), name=cvat_file(state, name), width=str(w), height=str(h))
        for drawing in drawings(state, name):
            source = 'auto' if drawing.kind == 'prediction' else 'manual'
            ET.SubElement(image, *cvat_shape(drawing), label=drawing.label, source=source, occluded='0',
                          z_order=str(-(drawing.kind == 'outline')))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as files:
        files.writestr('annotations.xml', ET.tostring(root, 'unicode', xml_declaration=True))
    return {'cvat.zip': archive.getvalue(), 'cvat_labels.json': json.dumps(labels, ensure_ascii=False)}


def cvat_shape(drawing: Drawing) -> tuple[str, dict]:
    """A drawing as an element in an ``annotations.xml``: its tag, and attributes."""
    if drawing.kind == 'outline':
        return 'polygon', dict(points=';'.join(f'{x:.2f},{y:.2f}' for x, y in drawing.shape.tolist()))
    [(rows, columns)] = ndimage.find_objects(drawing.shape.astype(int))
    flat = drawing.shape[rows, columns].reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:]))  # from a run of no pixels, if the first is
    return 'mask', dict(
        rle=', '.join(map(str, np.diff(edges, prepend=0).tolist())), left=str(columns.start), top=str(rows.start),
        width=str(columns.stop - columns.start), height=str(rows.stop - rows.start))


def drawings(state: State, name: str) -> Iterator[Drawing]:
    """What is shown of an image, of the newest round: the lowest first."""
    pool, (earlier, done), rows = state.pool, state.stored_label(name), unit_rows(state, name)
    rows[done], ids = -1, state.entry.get('ids', {}).get(name) or []
    for row, place in enumerate(ndimage.find_objects(rows + 1)) if ids else ():
        if place:
            offset = place[1].start, place[0].start
            for i, corners in enumerate(outlines(rows[place] == row, max(rows.shape))):
                yield Drawing('outline', f'{state.al.unit.type}_{ids[row]}_{i}', asked_label(state), corners + offset)
    label, classes = read_label(png_path(state, 'prediction', name), pool, name), class_colours(pool)[0]
    for kind, labels in dict(earlier=np.where(done, earlier, pool.ignore_index),
                             prediction=np.where(done, pool.ignore_index, label)).items():
        for c in np.unique(labels).tolist():
            if c < len(classes) and c != pool.ignore_index:
                yield Drawing(kind, f'{kind}_{c}', classes[c], labels == c)


def outlines(mask_HW: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """The outer outlines of the pieces of a mask, corners (x, y) between pixels, (N, 2) each. What is too small to be
    seen in an image of that ``side`` has a circle around it."""
    h, w = mask_HW.shape
    if max(h, w) < 2 + side / 100:
        turn = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        yield np.array([w, h]) / 2 + (2 + side / 80) * np.stack([np.cos(turn), np.sin(turn)], 1)
        return
    big = np.pad(mask_HW, 1).repeat(2, 0).repeat(2, 1).view(np.uint8)  # so that outlines run between pixels
    for piece in cv2.findContours(big, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
        yield np.ceil(piece[:, 0] / 2) - 1


class Drawing(NamedTuple):
    """What is shown of an image in a tool: an ``outline`` of what is asked for, (N, 2) corners (x, y); or a mask,
    (H, W), of an ``earlier`` label or of a ``prediction``."""
    kind: str
    id: str
    label: str
    shape: np.ndarray


def cvat_file(state: State, name: str) -> str:
    """What CVAT calls an image: its path in a share that holds the images' directory."""
    return image_stem(state.pool, name) + osp.splitext(image_path(state, name))[1]


def image_stem(pool: Pool, name: str) -> str:
    """An image's path below ``img_path`` without its extension, by which CVAT knows it; a name lacks ``img_suffix``."""
    suffix = getattr(pool.leaf_of(name)[0], 'img_suffix', None)
    return osp.splitext(name + suffix)[0] if suffix else name


def label_studio_files(state: State, names: list[str], images: dict) -> dict[str, str]:
    """``label_studio.json``, tasks with label maps to start from, one brush region a class, below outlines of what is
    asked for, which cannot be changed; and ``label_studio.xml``, the labelling interface. Images are in it, or local
    files below the root ``/``."""
    tasks = []
    for name in names:
        url = data_url(images[name]) if name in images else local_url(state, name)
        tasks.append(label_studio_task(state, name, url))
    return {'label_studio.json': '[' + ',\n'.join(json.dumps(task, ensure_ascii=False) for task in tasks) + ']\n',
            'label_studio.xml': label_studio_interface(state)}


def label_studio_task(state: State, name: str, url: str) -> dict:
    (h, w), regions = state.pool.sizes[name], []
    for drawing in drawings(state, name):
        kind = 'polygonlabels' if drawing.kind == 'outline' else 'brushlabels'
        value = dict(points=(100 * drawing.shape / [w, h]).round(4).tolist(), closed=True) if kind == 'polygonlabels' \
            else dict(format='rle', rle=encode_rle(drawing.shape))
        regions.append(dict(
            id=drawing.id, type=kind, from_name='asked' if kind == 'polygonlabels' else 'label', to_name='image',
            original_width=w, original_height=h, image_rotation=0, value={**value, kind: [drawing.label]},
            readonly=drawing.kind != 'prediction', meta=dict(text=[drawing.id if kind == 'polygonlabels' else
                                                                  drawing.kind])))
    return dict(data=dict(image=url, name=name, round=state.round, request=request_of(state), task=instructions(state)),
                predictions=[dict(model_version=f'round_{state.round}', result=regions)] if regions else [])


def label_studio_interface(state: State) -> str:
    classes, colours = tool_labels(state)
    labels = ''.join(f'    <Label value={quoteattr(c)} background="#{bytes(colour).hex()}"/>\n'
                     for c, colour in zip(classes, colours))
    points = f'  <KeyPointLabels name="point" toName="image">\n{labels}  </KeyPointLabels>\n' * is_one_class(state)
    return ('<View>\n  <Header value="$task" size="5"/>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <BrushLabels name="label" toName="image">\n{labels}  </BrushLabels>\n{points}'
            '  <PolygonLabels name="asked" toName="image" opacity="0" strokeWidth="2">\n'
            f'    <Label value={quoteattr(asked_label(state))} background="#ffe600"/>\n  </PolygonLabels>\n</View>\n')


def local_url(state: State, name: str) -> str:
    """Where Label Studio serves an image, if its root of local files is ``/``."""
    return '/data/local-files/?d=' + quote(osp.abspath(image_path(state, name)).lstrip(os.sep))


def data_url(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or 'application/octet-stream'
    return f'data:{kind};base64,{base64.b64encode(pathlib.Path(path).read_bytes()).decode()}'


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

# ---------------------------------------------------------------------------------------------------------------------
# Label maps in the values of label files, and paths
# ---------------------------------------------------------------------------------------------------------------------


def instructions(state: State) -> str:
    """What annotators are told."""
    unit, classes, how = state.al.unit.type, tool_labels(state)[0], 'all of it'
    if is_one_class(state):
        how = 'by one stroke or point inside it'
    what = f'each {unit} that is outlined as "{asked_label(state)}", {how}'
    if not state.counts_pixels:
        what = 'all of each image'
    if unit == 'pixel':
        what = 'the pixel in the middle of each circle'
    return (f'Label {what}, as one of: {", ".join(classes)}. '
            + f'Where none of them fits, it is "{UNLABELABLE}". ' * (UNLABELABLE in classes)
            + 'What is labelled elsewhere is kept aside until that is asked for.' * state.counts_pixels + '\n')


def request_of(state: State) -> str:
    """What tells a round's request from any other, also of the same images."""
    asked = sorted({*state.entry['asked'], *state.entry.get('returned', ())})
    return version_of(json.dumps([state.seed, state.round, state.al.unit, asked]).encode())


def asked_label(state: State) -> str:
    """The label that shows in tools what is asked for."""
    return next(text for text in ('asked', 'asked for', 'al: asked for') if text not in tool_labels(state)[0])


def tool_labels(state: State) -> tuple[list[str], np.ndarray]:
    """What people choose from in an annotation tool: the classes and, if label files have a value for it, a label for
    what is of none. Names, and colours (C, 3) uint8."""
    classes, colours = class_colours(state.pool)
    if state.al.oracle.unlabelable is None:
        return classes, colours
    free = next(colour for colour in ([n, n, n] for n in range(255, 0, -1)) if colour not in colours.tolist())
    return [*classes, UNLABELABLE], np.append(colours, np.uint8([free]), 0)


def class_colours(pool: Pool) -> tuple[list[str], np.ndarray]:
    """The classes' names and colours for annotation tools: those of the data set's palette, (C, 3) uint8. Tools tell
    classes by colour, and black is none of them: a colour that is taken (ADE20K has one twice) gives way to the next.
    """
    meta, taken = pool.leaves[0].metainfo, dict.fromkeys([0])
    classes = [*map(in_tools, meta.get('classes') or range(255))]
    for colour in list(meta.get('palette') or voc_colours()[1:].tolist())[:len(classes)]:
        number = int.from_bytes(bytes(colour), 'big')
        while number in taken:
            number = (number + 1) % 2**24
        taken[number] = None
    return classes, np.array([list(number.to_bytes(3, 'big')) for number in taken][1:], np.uint8)


def voc_colours() -> np.ndarray:
    """Pascal VOC's colour of each number, (256, 3) uint8: its bit 3 b + c is bit 7 - b of channel c."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], 1, 9, 'little')
    return np.packbits(bits.reshape(256, 3, 3), 1)[:, 0]


def in_tools(name: str) -> str:
    """A class's name as annotation tools can hold it: without what ends a field or a line of CVAT's labelmap.txt, or
    is no character in XML. That is written as in an URL, ``%3A`` for a colon."""
    breaks = r'[:\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff]|^[#\s]|\s\Z'
    return re.sub(breaks, lambda found: quote(found[0]), str(name))


def write_label(path: str, pool: Pool, name: str, label_HW: np.ndarray) -> None:
    """Write a label map, (H, W), in the values of an image's label file and, in 8 bits, the colours of its classes."""
    import al_patch
    values, colours, palette = label_values(pool, name)[1], class_colours(pool)[1], np.zeros((256, 3), np.uint8)
    if len(values) == 256:
        palette[values[:len(colours)]] = colours
    al_patch.write_png(path, values[label_HW], palette if len(values) == 256 else None)


def image_path(state: State, name: str) -> str:
    import al_patch
    return al_patch.image_path(state.pool.info(name))


def read_label(path: str, pool: Pool, name: str) -> np.ndarray:
    """The classes of a label map that ``write_label`` wrote, (H, W); ``ignore_index`` everywhere if there is none."""
    if not osp.isfile(path):
        return np.full(pool.sizes[name], pool.ignore_index)
    with Image.open(path) as image:
        return label_values(pool, name)[0][np.asarray(image)]


def label_values(pool: Pool, name: str) -> tuple[np.ndarray, np.ndarray]:
    """How training reads an image's label file, with ``reduce_zero_label``, classes of one's own and steps that map
    values: the class of each value in the file, and the value of each class, (256,) both or, above 255 classes,
    (65536,). ``ignore_index`` counts as a class."""
    return label_values_of(pool, pool.where[name][0])


@functools.lru_cache(8)
def label_values_of(pool: Pool, leaf: int) -> tuple[np.ndarray, np.ndarray]:
    name = next(name for name in pool.names if pool.where[name][0] == leaf)
    depth = np.uint8 if len(class_colours(pool)[0]) < 256 else np.uint16
    ignore = np.array(pool.ignore_index).astype(depth)  # as numpy wraps it, also where it is -1 or 65535
    given = np.arange(np.iinfo(depth).max + 1).astype(depth)
    classes, found = given.copy(), np.zeros(len(given), bool)
    # all at once or, where a step refuses some, one by one; if it refuses all, as with colours, they are classes
    for values in (given, *given[:256, None]):
        if not found.all():
            with contextlib.suppress(Exception):
                classes[values], found[values] = classes_of_values(pool, name, values), True
    classes[~found] = ignore if found.any() else classes[~found]
    of_class = np.full(len(given), ignore, depth)
    known, values = np.unique(classes, return_index=True)  # the smallest, where several stand for one class
    of_class[known] = values
    if classes[-1] == ignore:
        of_class[ignore] = given[-1]
    return classes, of_class


def classes_of_values(pool: Pool, name: str, values_N: np.ndarray) -> np.ndarray:
    """The classes that training reads in a label file of these values, (N,)."""
    pool = copy.copy(pool)
    pool.steps = {}  # of this file: those of the data set's, which may be pictures in colours, are others
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(np.tile(values_N, (2, 2))).save(path := osp.join(folder, 'values.png'))
        return load_label(pool, name, path)[0, :len(values_N)]


def load_label(pool: Pool, name: str, path: str, void_HW: np.ndarray | None = None) -> np.ndarray:
    """The classes of a label file of an image, as training reads it, (H, W): by the loaders of its pipeline, and those
    of its steps that map values.

    Args:
        void_HW: Where the file says that no class fits: no step sees that.
    """
    from mmengine.dataset import Compose
    loading, mapping = pool.label_steps(name, seg_map_path=path)
    results = Compose(loading)({**pool.info(name), 'seg_map_path': path})
    label = results['gt_seg_map']
    if void_HW is not None:
        label = results['gt_seg_map'] = label.astype(np.int64)
        label[void_HW] = label[np.unravel_index(void_HW.argmin(), void_HW.shape)]
    label = Compose(mapping)(results)['gt_seg_map']
    if void_HW is not None:
        label[void_HW] = pool.ignore_index
    return label


def unit_rows(state: State, name: str) -> np.ndarray:
    """For each pixel of an image the position of the unit that the newest round asks for there, or -1, (H, W)."""
    ids = state.entry.get('ids', {}).get(name) if name in state.entry['asked'] else []
    if ids is None:
        return np.where(asked_mask(state, name), 0, -1)
    rows = np.full(state.pool.sizes[name], -1)
    if ids:
        positions, pixels = state.units(name).members(np.array(ids, int))
        rows.reshape(-1)[pixels] = positions
    return rows


def is_human(state: State) -> bool:
    return state.al.oracle.type == 'human'


def is_one_class(state: State) -> bool:
    """Whether an answer is one class for all of a unit."""
    return state.al.unit.get('label') == 'dominant'


def unit_numbers(state: State, name: str) -> tuple[np.ndarray, list[int]]:
    """For each pixel of an image the position of its unit among all that rounds have asked for in it, or -1, (H, W);
    and their ids."""
    numbers, ids = np.full(state.pool.sizes[name], -1), []
    for entry in state.rounds:
        if new := entry.get('ids', {}).get(name):
            positions, pixels = state.units(name).members(np.array(new, int))
            numbers.reshape(-1)[pixels] = positions + len(ids)
            ids += new
    return numbers, ids


def mask_to_label(state: State, name: str) -> np.ndarray:
    """What the newest round asks people for in an image: not what the store has already, (H, W)."""
    return asked_mask(state, name) & ~state.stored_label(name)[1]


def asked_mask(state: State, name: str) -> np.ndarray:
    """What the newest round asks for of an image, (H, W) booleans."""
    return state.mask(name) & ~state.mask(name, state.round - 1)


def in_words(found: dict, what: str = '') -> str:
    """The first of what was found, by name."""
    words = [f'{name} ({value} {what})' if what else f'{name}' for name, value in found.items()]
    return ', '.join(words[:10]) + f' and {len(words) - 10} more' * (len(words) > 10)


def names_to_label(state: State) -> list[str]:
    """The images in which the newest round asks people for something: not those that lie in the store."""
    return [name for name in state.entry['asked'] if name not in state.dropped and mask_to_label(state, name).any()]


def png_path(state: State, kind: str, name: str) -> str:
    """Where an image has its PNG: ``mask``, ``overlay`` or ``prediction``."""
    import al_patch
    return al_patch.png_path(folder_of(state) / kind, name, state.work_dir)


def folder_of(state: State) -> pathlib.Path:
    return pathlib.Path(state.folder(), 'to_label')


def version_of(content: bytes) -> str:
    """What tells a file's content from another's."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(path: str) -> dict:
    """What a JSON file holds; nothing, if there is none."""
    from al_patch import reading
    with reading(path):
        return json.loads(pathlib.Path(path).read_text()) if osp.isfile(path) else {}


def exported_path(state: State) -> str:
    """Where a run keeps the versions of all label maps that it has ever given to people to start from, by image."""
    return osp.join(state.work_dir, 'labels', 'exported.json')


TRUTH = types.SimpleNamespace(unlabelable=None, accept_unchanged=True)  # how the data set's own labels are read
DATA_SET, UNLABELABLE, POLL_SECONDS = 'data set', 'unlabelable', 10
TOOLS = {'cvat': cvat_files, 'label-studio': label_studio_files, 'png': lambda *_: {}}

if __name__ == '__main__':
    main()
