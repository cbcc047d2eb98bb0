"""The wrong inputs of `bad_input.py`: generated from the tables of settings and state, by hand, and a newcomer's.

Each says how it is made, and which words the error should hold: the key or the file, and what was given.
"""
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import os.path as osp
import pickle
import re
import shutil
from typing import Any, Callable, Optional

import cv2
import numpy as np
import tiny
import torch

import al_label
import al_patch
import al_report

CONFIG, DATA, WORK, STATE = 'tiny_al.py', 'data', 'work', 'work/al_state.json'
NO_VALIDATION = '''
val_cfg = val_dataloader = val_evaluator = None
default_hooks['checkpoint'].update(save_best=None)
'''
SHORT = '''
train_cfg.update(max_iters=2, val_interval=2)
'''
FIRST = tiny.NAMES[:4]
BLOCK = dict(initial=FIRST, budget=2, rounds=1)
REGION = dict(unit=dict(type='region', size=[8, 8]), initial=12, budget=9, rounds=1)
SUPERPIXEL = dict(unit=dict(type='superpixel', n_segments=12, compactness=100.), initial=9, budget=6, rounds=1)
# runs that inputs begin with: block, whether they validate, and how often they are started, the first time anew
RUNS = dict(
    image=(BLOCK, False, 1), region=(REGION, False, 1), superpixel=(SUPERPIXEL, False, 1),
    best=(dict(BLOCK, query_with='best', weights='best'), True, 1),
    crc=(dict(BLOCK, strategy='crc', initial=6), False, 1),
    human=(dict(BLOCK, oracle='human', initial=4), False, 2), human_region=(dict(REGION, oracle='human'), False, 2),
    answered=(dict(REGION, oracle='human'), False, 3))  # the others end as they wait for round 1


@dataclasses.dataclass
class Case:
    """A wrong input."""
    kind: str
    name: str
    words: tuple                     # what the last line should hold: texts, or compiled patterns
    al: Any = None                   # keys of the block that differ; no dict: the whole of it
    more: str = ''                   # text that the config ends with
    options: tuple = ()              # of the command line; --work-dir comes before them
    run: Optional[str] = None        # the run that is there, to be resumed
    damage: Callable = lambda place: None  # makes the input, in a folder that holds config, data and run
    validates: bool = False          # whether the config has validation
    trains: bool = False             # whether only running can show it
    writes: tuple = ()               # beside logs it may leave files that match these
    command: Optional[tuple] = None  # in place of al_train.py's: a script, and its options
    gpus: Optional[str] = None       # only the real launcher will do
    holds: Optional[str] = None      # a file that another process has locked

    def __str__(self) -> str:
        return f'{self.kind}/{self.name}'

    def block(self):
        """The run's block, one more round if there is a run, with the keys that differ."""
        base = RUNS[self.run][0] if self.run else BLOCK
        base = dict(base, rounds=base['rounds'] + 1) if self.run and 'human' not in self.run else dict(base)
        return self.al if self.al is not None and not isinstance(self.al, dict) else {**base, **(self.al or {})}

    def config(self) -> str:
        return config_text(self.block(), self.validates or bool(self.run and RUNS[self.run][1]), self.more)


def config_text(al, validates: bool, more: str = '') -> str:
    text = tiny.config_text(DATA) + ('' if validates else NO_VALIDATION) + SHORT
    return text + (f'al = {al!r}\n' if al != 'none' else '') + more


CASES: list[Case] = []


def add(kind: str, name: str, *words, **how) -> None:
    CASES.append(Case(kind, name, words, **how))


# --- what damages ----------------------------------------------------------------------------------------------------


def image(name: str, split: str = 'train') -> str:
    return f'{DATA}/img/{split}/{name}.png'


def label(name: str, split: str = 'train') -> str:
    return f'{DATA}/ann/{split}/{name}.png'


def cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def empty(path: str) -> None:
    os.truncate(path, 0)


def page(path: str) -> None:
    os.makedirs(osp.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
        file.write('<html>404</html>')


def folder(path: str) -> None:
    remove(path)
    os.makedirs(path)


def remove(path: str) -> None:
    if osp.isdir(path) and not osp.islink(path):
        shutil.rmtree(path)
    elif osp.lexists(path):
        os.remove(path)


def draws(array_HW: np.ndarray) -> Callable:
    """What puts an array in the place of a picture."""

    def draw(path: str) -> None:
        os.makedirs(osp.dirname(path), exist_ok=True)
        cv2.imwrite(path, array_HW)

    return draw


H, W = tiny.SHAPE
FLAT = np.zeros(tiny.SHAPE, np.uint8)
smaller, thumbnail, turned = draws(FLAT[1:]), draws(FLAT[::2, ::2]), draws(FLAT.T)
of_no_class, void, deep = draws(FLAT + 7), draws(FLAT + 255), draws(FLAT.astype(np.uint16) + 300)
colours = draws(np.tile(np.arange(W, dtype=np.uint8)[None, :, None], (H, 1, 3)))
with_alpha = draws(np.tile(np.arange(W, dtype=np.uint8)[None, :, None], (H, 1, 4)))
small_picture, large_picture = draws(np.zeros((H // 2, W // 2, 3), np.uint8)), draws(np.zeros((2 * H, W, 3), np.uint8))
large_label = draws(np.zeros((2 * H, W), np.uint8))


def at(*paths: str, do: Callable) -> Callable:
    """What does so to these files."""

    def damage(place: str) -> None:
        for path in paths:
            do(osp.join(place, path))

    return damage


def read_json(path: str) -> dict:
    with open(path) as file:
        return json.load(file)


def changes_state(change: Callable) -> Callable:
    """What changes the content of the state."""

    def damage(place: str) -> None:
        path = osp.join(place, STATE)
        content = read_json(path)
        content = change(content) or content
        with open(path, 'w') as file:
            json.dump(content, file, indent=1)

    return damage


def last_asked(place: str) -> str:
    """The first image that the newest round asked for."""
    return next(iter(read_json(osp.join(place, STATE))['rounds'][-1]['asked']))


def at_last_asked(pattern: str, do: Callable) -> Callable:
    return lambda place: do(osp.join(place, pattern.format(last_asked(place))))


def at_checkpoint(do: Callable, which: str = 'last') -> Callable:
    """What does so to a checkpoint of the newest round."""

    def damage(place: str) -> None:
        content = read_json(osp.join(place, STATE))
        name = osp.basename(content['rounds'][-1]['checkpoints'][which])
        do(osp.join(place, WORK, f'round_{content["round"]}', name))

    return damage


def changes_checkpoint(change: Callable) -> Callable:

    def do(path: str) -> None:
        checkpoint = torch.load(path, weights_only=False)
        torch.save(change(checkpoint) or checkpoint, path)

    return at_checkpoint(do)


class RunsCode:
    """What a checkpoint must not hold."""

    def __reduce__(self):
        return print, ('code from a checkpoint runs',)


def write(path: str, text: str) -> Callable:

    def damage(place: str) -> None:
        os.makedirs(osp.dirname(osp.join(place, path)), exist_ok=True)
        with open(osp.join(place, path), 'w') as file:
            file.write(text)

    return damage


def both(*damages: Callable) -> Callable:

    def damage(place: str) -> None:
        for each in damages:
            each(place)

    return damage


# --- generated: each setting, of a wrong type, out of range, misspelt, missing where it has no default ---------------

# the words of a rule -> values of a wrong type, and values out of range. Of `None or ...` all but None is wrong, too
BIG = 2**70
WRONG_VALUES = {
    'True or False': (['yes', 1, None], []), 'an int >= 0': (['3', 2.5, True, None], [-1, BIG]),
    'a positive int': (['3', 2.5, None], [0, -1, BIG]), 'an int in [1, 65535]': (['9', 9.5, None], [0, 65536]),
    'a number': (['10', True, None], []), 'a number above 0': (['1', None], [0, -1.]),
    'a fraction in (0, 1)': (['.1', None], [0, 1.]), 'a fraction in [0, 1]': (['.1', None], [-.1, 1.5]),
    'a fraction in [0, 1)': (['.1', None], [-.1, 1.]), 'a percentage in (0, 100]': (['5 %', None], [0, 100.5]),
    "'mean', 'max' or a percentage in (0, 100]": ([None, ['mean']], ['median', 0, 101]),
    'the path of a folder': ([3, ['own']], ['no_such']),
    'a pair of ints (h, w)': ([8, '8x8', [8, 8.]], [[8], [0, 8], [8, 8, 8]]),
    'a pair of numbers above 0': ([1, ['1', 2]], [[1], [0, 1], [1, 2, 3]]),
    'a positive int, or a fraction in (0, 1]': (['3', True], [0, -1, 1.5]),
    'a positive int, a fraction in (0, 1], or a list of these with one entry a round':
        (['3', True, None, ['2']], [0, -1, 1.5, [], [2, 0]]),
    'a positive int, a fraction in (0, 1], a list of image names, or the path of a split file':
        ([True, None, [3]], [0, -1, 1.5, '', []]),
    'a path in `train_dataloader`': ([3, True], ['no.such']),
    "a regular expression or 'package.module:function'": ([3, True], ['(', 'no_such:function', 'tiny:no_such']),
    "a name, dict(type=name, **options) or 'package.module:function'":
        ([None, 3, ['image'], dict(type=3)], ['no such']),
    "a dict from a round to a dict of config keys, e.g. {2: {'train_cfg.max_iters': 4000}}":
        ([[1], 'x', {1: 4000}], [{-1: {}}, {'one': {}}]),
    'a dict of prices >= 0 of an `image` that is opened, a `click` and a `pixel`, and their `unit`, e.g. '
    "dict(image=20, click=1.5, unit='s')":
        ([3, 'cheap', dict(image='20'), dict(unit=3)], [dict(image=-1), dict(clicks=2)]),
    "a dict of 'metric' with 'value' and / or 'patience', e.g. dict(metric='mIoU', value=75)":
        ([75, 'mIoU'], [dict(metric='mIoU'), {}])}


def wrong_values(annotation) -> tuple[list, list]:
    """Values of a wrong type, and values out of range."""
    if annotation in (int, float, str, bool):
        return {int: ['3', 2.5, None], float: ['3', None], str: [3, None], bool: [1]}[annotation], []
    rule = next((rule for rule in getattr(annotation, '__metadata__', ()) if isinstance(rule, al_patch.Rule)), None)
    if rule is None:
        return [], []
    words = rule.should_be.removeprefix('None or ')
    if words not in WRONG_VALUES and words.startswith("'"):
        types, ranges = [3, None], ['no such']
    elif words not in WRONG_VALUES:
        raise KeyError(f'tests/wrong_inputs.py should hold wrong values for the rule {words!r}')
    else:
        types, ranges = WRONG_VALUES[words]
    if words != rule.should_be:
        types = [value for value in types if value is not None]
    return types, ranges


def with_key(parent: Optional[str], base, key: str, value) -> dict:
    """A block in which a key has a value: of the block itself or, with a ``parent``, of a setting that has options."""
    return {parent: {**base, key: value}} if parent else {key: value}


def options_of() -> list:
    """Every table of settings: the parent's key, the options that lead there, and the settings."""
    for companion in (al_report, al_label):
        companion.hook()  # it adds keys of its own
    tables = [(None, {}, al_patch.block_settings())]
    tables += [('unit', dict(type=name), al_patch.settings_of(function)) for name, function in al_patch.UNITS.items()]
    tables += [('oracle', dict(type=name), al_patch.settings_of(function))
               for name, function in getattr(al_patch, 'ORACLES', {}).items()]
    tables += [('stop', dict(metric='mIoU', value=75), al_patch.settings_of(al_patch.reached, 1)),
               ('strategy', dict(type='entropy'), al_patch.settings_of(al_patch.Strategy, 5)),
               ('strategy', dict(type='tiny:brightest'), al_patch.settings_of(tiny.brightest, 1))]
    for part, (registry, arguments) in al_patch.PARTS.items():
        for name, function in registry.module_dict.items():
            takes_vectors = 'vectors_ND' in inspect.signature(function).parameters
            leads = dict(score=dict(type='entropy', score=name), embed=dict(type='coreset', embed=name),
                         select=dict(type='entropy', select=name, **(dict(embed='features') if takes_vectors else {})))
            if name == 'barycentre':  # it comes with thresholds
                leads[part] = dict(type='crc')
            tables.append(('strategy', leads[part], al_patch.settings_of(function, arguments)))
    return tables


def add_settings() -> None:
    for parent, base, table in options_of():
        where = f'al.{parent}' if parent else 'al'
        lead = '+'.join(str(value) for value in base.values()) if parent else ''
        for key, (_, annotation) in table.items():
            for what, values in zip(('type', 'range'), wrong_values(annotation)):
                for value in values:
                    # a wrong name of a unit or a strategy, or their lack, is the setting's own; so is a metric
                    if where == 'al.stop' and key == 'metric' and value == 'no such':
                        continue
                    words = re.compile(rf'`{where}\.{key}(\.type)?`'), given_as(value)
                    add('settings', f'{where}.{key} {lead} {what} {value!r:.40}', *words,
                        al=with_key(parent, base, key, value), validates=where == 'al.stop' or key == 'stop')
            wrong = key + key[-1]
            add('settings', f'{where}.{key} {lead} misspelt', f'`{where}.{wrong}`', f'`{where}.{key}`',
                al=with_key(parent, base, wrong, 1))
        add('settings', f'{where} {lead} unknown', f'`{where}.xyzzy`', 'known keys',
            al=with_key(parent, base, 'xyzzy', 1))
    for key, options in dict(unit=dict(size=[8, 8]), strategy=dict(k=2), oracle=dict(accept_partial=True)).items():
        add('settings', f'al.{key} without its type', f'`al.{key}', 'type', al={key: options})
    own = write('mine.py', 'def needs(probs_NCHW, power: float):\n    return probs_NCHW[:, 0]\n')
    add('settings', 'al.strategy.power missing, which has no default', '`al.strategy.power` should be given',
        al=dict(strategy='mine:needs'), damage=own)
    for value in (3, 'entropy', ['entropy'], True):
        add('settings', f'al {value!r}', '`al` should be a dict', repr(value), al=value)
    for text in ("float('nan')", "float('inf')", 'lambda probs: probs', 'print', '1j', 'object()'):
        add('settings', f'al.stop.value {text}', '`al', 'finite numbers',
            re.compile(re.escape(dict([("float('nan')", 'nan'), ("float('inf')", 'inf')]).get(text, '<|j'))
                       if 'float' in text else 'function|1j|object'),
            validates=True, more=f"al.update(stop=dict(metric='mIoU', value={text}))\n")


def given_as(value):
    """A value as an error may show it."""
    shown = {repr(value), json.dumps(value), repr(str(value)), repr({str(k): v for k, v in value.items()})
             if isinstance(value, dict) else repr(value)}
    return re.compile('but (got|is|has) .*(' + '|'.join(map(re.escape, sorted(shown))) + ')')


# --- generated: each field of the state ------------------------------------------------------------------------------

MISSING = '(missing)'
DISAGREES = ('a name that is not in the pool', 'zero', 'far too large', 'more than there are', 'empty')
COUNT = {'text': '1', 'a fraction': 1.5, 'negative': -1, 'far too large': BIG}
MAYBE_COUNT = COUNT
AMOUNT = {'text': 'x', 'negative': -1., 'far too large': 1e300}
NAMES = {'text': 'a/00', 'no names': [3], 'null in it': [None]}
TEXTS = {'text': 'x', 'no texts': [3]}
POOL = {**NAMES, 'a list in it': [['a/00']], 'null': None}
# a field -> may it be missing; wrong values by name. `*` stands for the first key of a dict, 0 for that of a list
STATE_FIELDS = dict(
    schema=(False, {'text': '2', 'a fraction': 2.5, 'negative': -1, 'far too large': 99, 'null': None}),
    phase=(False, {'unknown': 'done', 'a number': 3, 'null': None}), round=(False, {**COUNT, 'null': None}),
    seed=(False, {**COUNT, 'null': None}), ended=(False, {'a number': 3, 'a list': []}),
    settings=(False, {'a list': [], 'text': 'x', 'null': None}),
    config=(False, {'a list': ['x'], 'a number in it': dict(model=3), 'null': None}),
    images=(False, {**COUNT, 'not those of the pool': 11, 'null': None}),
    pixels=(False, COUNT), rounds=(False, {'a dict': dict(a=3), 'empty': [], 'text in it': ['x'], 'null': None}),
    pool=(False, POOL), dropped=(True, NAMES),
    classes=(True, TEXTS))
ROUND_FIELDS = dict(
    asked=(False, {'a list': ['a/00'], 'text': 'a/00', 'null': None,
                   'a name that is not in the pool': {'no/such': None}, 'a unit without pixels': {'a/00': [1]},
                   'text for an image': {'a/00': 'all'},
                   'negative': {'a/00': [-1, 5]}, 'zero': {'a/00': [0, 0]}, 'far too large': {'a/00': [1, 10**9]}}),
    strategy=(False, {'text': 'entropy', 'a list': [], 'null': None}),
    spent=(False, {'a list': [], 'text': 'x', 'text in it': dict(images='4'), 'negative': dict(images=-4),
                   'far too large': dict(images=BIG)}),
    metrics=(False, {'a list': [], 'text in it': dict(mIoU='x'), 'null': None}),
    checkpoints=(False, {'a list': ['iter_2.pth'], 'a number': dict(last=3), 'null': None,
                         'a path out of it': dict(last='../../../iter_2.pth'),
                         'an absolute path': dict(last='/etc/passwd'), 'none': {}, 'empty': dict(last='')}),
    train_seconds=(False, AMOUNT), query_seconds=(True, AMOUNT))
REGION_FIELDS = dict(asked=ROUND_FIELDS['asked'], pixels=(False, COUNT),
                     void_pixels=(False, {**COUNT, 'more than there are': 10**6}))
CRC_FIELDS = dict(held_out=(True, {**NAMES, 'a name that is not in the pool': ['no/such'],
                                    'twice the same': ['a/00', 'a/00']}))
HUMAN_FIELDS = dict(
    ids=(True, {'a list': [], 'text': {'*': 'x'}, 'negative': {'*': [-1]}, 'far too large': {'*': [10**6]},
                'twice the same': {'*': 'twice'}, 'an image that nobody asked for': {'no/such': [0]}}),
    returned=(True, {'a list': [], 'text in it': {'a/00': 'x'}, 'negative': {'a/00': [-1, 5]}}),
    unchanged=(True, COUNT), from_store=(True, COUNT), asked_at=(True, {'a number': 3, 'a list': []}),
    accepted_at=(True, {'a number': 3}), warnings=(True, {'text': 'x', 'numbers': [3]}),
    changed=(True, {'text': 'x', 'numbers': [3]}))


def set_field(field: str, value, is_round: bool) -> Callable:

    def change(content: dict) -> None:
        owner = content['rounds'][-1 if field == 'held_out' else 0] if is_round else content
        if value == MISSING:
            owner.pop(field, None)
        elif isinstance(value, dict) and '*' in value:
            name, ids = next(iter(owner[field].items()))
            owner[field][name] = [*ids, ids[0]] if value['*'] == 'twice' else value['*']
        elif field in ('asked', 'spent', 'metrics', 'checkpoints', 'config') and isinstance(value, dict) and value:
            here = next(iter(owner[field]))  # an image that was asked for
            owner[field].update({here: value['a/00']} if 'a/00' in value else value)
        else:
            owner[field] = value

    return changes_state(change)


def shown_as(value):
    """The innermost of a wrong value, as an error may show it: it is the sign that the value was named."""
    while isinstance(value, (dict, list)) and value:
        key, value = next(iter(value.items())) if isinstance(value, dict) else (None, value[0])
        if key == 'no/such':
            return key
    return re.compile('|'.join(map(re.escape, {repr(value), json.dumps(value), str(value)})))


def add_state() -> None:
    tables = [('image', STATE_FIELDS, False), ('region', dict(pixels=STATE_FIELDS['pixels']), False),
              ('image', ROUND_FIELDS, True), ('region', REGION_FIELDS, True), ('crc', CRC_FIELDS, True),
              ('answered', HUMAN_FIELDS, True)]
    for run, table, is_round in tables:
        for field, (may_miss, wrong) in table.items():
            run = 'best' if (run, field) == ('image', 'metrics') else run  # the one that has some
            for what, value in {**({} if may_miss else {'missing': MISSING}), **wrong}.items():
                words = [re.compile(rf'\b{field}\b')]
                if what in DISAGREES:  # with what stands elsewhere
                    words = [re.compile(rf'\b({field}|rounds|spent)\b')]
                elif value not in (MISSING, []) and '*' not in str(value):
                    words.append(shown_as(value))
                if field == 'schema' and value == 99:
                    words = ['99']
                add('state', f'{run} {"rounds[0]." * is_round}{field} {what}', 'al_state.json', *words, run=run,
                    options=('--resume', ), damage=set_field(field, value, is_round))

    def twice(content: dict) -> None:
        content['rounds'][1]['asked'].update(dict.fromkeys(list(content['rounds'][0]['asked'])[:1]))

    def swapped(content: dict) -> None:  # of a whole image, a part; of parts, the whole
        asked = content['rounds'][1]['asked']
        asked.update({name: [1, 64] if asked[name] is None else None for name in list(asked)[:1]})

    def fewer_pixels(content: dict) -> None:
        units = next(iter(content['rounds'][0]['asked'].values()))
        units[1] -= 1

    def duplicate_key(place: str) -> None:
        path = osp.join(place, STATE)
        with open(path) as file:
            text = file.read()
        write(STATE, re.sub(r'("phase": .*?),', r'\1, \1,', text, count=1))(place)

    resume = dict(options=('--resume', ))
    for run in ('image', 'region'):
        add('state', f'{run} asked: whole or part is the other', 'al_state.json', re.compile('asked|spent'), run=run,
            damage=changes_state(swapped), **resume)
    add('state', 'image asked twice', 'al_state.json', 'a/00', run='image', damage=changes_state(twice), **resume)
    add('state', 'region asked: fewer pixels than the mask', 'al_state.json', re.compile('asked|mask'), run='region',
        damage=changes_state(fewer_pixels), **resume)
    add('state', 'crc held_out missing', re.compile('held_out|calibrate'), run='crc',
        damage=set_field('held_out', MISSING, True), **resume)
    add('state', 'a key twice', 'al_state.json', 'phase', run='image', damage=duplicate_key, **resume)
    add('state', 'pool: a name twice', 'al_state.json', 'pool', 'a/00', run='image',
        damage=changes_state(lambda content: content['pool'].append('a/00')), **resume)
    add('state', 'pool: other names', re.compile('al_state.json'), re.compile('pool|data set'), run='image',
        damage=changes_state(lambda content: content.update(pool=['x'] * 12)), **resume)
    add('state', 'phase label, though nobody is asked', 'al_state.json', 'phase', run='image',
        damage=changes_state(lambda content: content.update(phase='label')), **resume)
    add('state', 'round: one too many', 'al_state.json', 'round', run='image',
        damage=changes_state(lambda content: content.update(round=2)), **resume)
    add('state', 'rounds: one lost', 'al_state.json', 'round', run='image',
        damage=changes_state(lambda content: content.update(rounds=content['rounds'][:1])), **resume)
    for key, value in dict(unit=dict(type='pixel', radius=0), initial=5, seed=3, budget=0, oracle='human').items():
        change = functools.partial(lambda content, changed: content['settings'].update(changed), changed={key: value})
        add('state', f'settings.{key} {value!r}', re.compile(rf'\b{key}\b'), shown_as(value), run='image',
            damage=changes_state(change), **resume)
    mask = WORK + '/round_1/labelled/{}.png'
    flipped = np.zeros(tiny.SHAPE, bool)
    flipped[0, 0] = True
    for what, do in dict(
            deleted=remove, truncated=cut, empty=empty, page=page, folder=folder, smaller=draws(FLAT[1:] + 255),
            turned=draws(FLAT.T + 255), one_pixel=lambda path: al_patch.write_png(path, flipped),
            all_pixels=draws(FLAT + 255)).items():
        add('state', f'mask {what}', re.compile(r'round_1/labelled/\S+\.png'), run='region',
            damage=at_last_asked(mask, do), **resume)


# --- by hand: data ---------------------------------------------------------------------------------------------------

TRAIN = "train_dataloader['dataset']"
# only building a round shows it, or training one: the state is there by then
SHOWN_BY_A_ROUND = dict(writes=('work/*', ))
SHOWN_BY_TRAINING = dict(writes=('work/*', ), trains=True)


def add_data() -> None:
    add_data_files()
    add_data_folders()
    add_data_of_runs()


def add_data_files() -> None:
    # images and labels that the run begins with
    for what, do in dict(truncated=cut, page=page, empty=empty, folder=folder).items():  # a folder is no image
        add('data', f'first image {what}', 'a/01' if what == 'folder' else image('a/01'),
            damage=at(image('a/01'), do=do))
        add('data', f'first label {what}', label('a/01'), damage=at(label('a/01'), do=do))
    for what, (do, *words) in dict(
            missing=(remove, 'no such file'), smaller=(smaller, '(31, 48)', '(32, 48)'),
            turned=(turned, '(48, 32)', '(32, 48)'), thumbnail=(thumbnail, '(16, 24)', 'thumbnail'),
            colours=(colours, 'colour'), alpha=(with_alpha, 'colour'), of_no_class=(of_no_class, '3', '7'),
            deep=(deep, '300')).items():
        add('data', f'first label {what}', label('a/01'), *words, damage=at(label('a/01'), do=do))
        if what in ('missing', 'smaller', 'of_no_class'):
            add('data', f'first label {what}, pixels', label('a/01'), *words, al=dict(unit='pixel'),
                damage=at(label('a/01'), do=do))
    add('data', 'every label is a colour picture', 'ann/train', 'colour',
        damage=at(*map(label, tiny.NAMES), do=colours))
    add('data', 'masks of 0 and 255 for classes 0 and 1', 'ann/train', '255', 'divide by 255',
        more="model['decode_head'].update(ignore_index=254)\nmodel['data_preprocessor'].update(seg_pad_val=254)\n"
        "train_dataloader['dataset'].update(ignore_index=254)\n", damage=at(*map(label, tiny.NAMES), do=void))
    add('data', 'first image: a link to nowhere', 'a/02', damage=lambda place: (
        remove(osp.join(place, image('a/02'))), os.symlink('nowhere.png', osp.join(place, image('a/02')))))
    # images of the pool
    for what, do in dict(page=page, empty=empty).items():
        for unit in ('image', 'region', 'superpixel'):
            add('data', f'pool image {what}, {unit}', image('b/09'), damage=at(image('b/09'), do=do),
                al=dict(unit=unit, initial=FIRST))
    add('data', 'pool image truncated', image('b/09'), damage=at(image('b/09'), do=cut), **SHOWN_BY_TRAINING)
    large = both(at(image('b/09'), do=large_picture), at(label('b/09'), do=large_label))
    add('data', 'pool images of different sizes in a batch', image('b/09'), 'batch_size', damage=large)
    add('data', 'pool images of different sizes in a batch, regions', image('b/09'), 'batch_size', al=REGION,
        damage=large)
    # validation
    validates = dict(validates=True)
    stops = dict(validates=True, al=dict(stop=dict(metric='mIoU', patience=1)))  # without, it is a warning
    for what, do in dict(page=page, empty=empty, missing=remove, smaller=smaller, colours=colours).items():
        add('data', f'validation label {what}', label('1', 'val'), damage=at(label('1', 'val'), do=do), **validates)
    for path in (label('1', 'val'), image('1', 'val')):
        add('data', f'validation, truncated: {path}', path, damage=at(path, do=cut), **SHOWN_BY_TRAINING, **validates)
    for what, do in dict(page=page, empty=empty).items():
        add('data', f'validation image {what}', image('1', 'val'), damage=at(image('1', 'val'), do=do), **validates)
    every = [label(f'{i}', 'val') for i in range(4)]
    add('data', 'validation labels all void', re.compile('val_dataloader|ann/val'), re.compile('class|void|label'),
        damage=at(*every, do=void), **stops)
    add('data', 'validation labels of no class', re.compile('val_dataloader|ann/val'), re.compile('class'), '7',
        damage=at(*every, do=of_no_class), **stops)
    add('data', 'validation images of different sizes in a batch', re.compile('val_dataloader|img/val'),
        re.compile('batch_size'), damage=both(at(image('1', 'val'), do=large_picture),
                                                         at(label('1', 'val'), do=large_label)), **validates)


def add_data_folders() -> None:
    validates = dict(validates=True)
    for split, key, how in (('train', 'train_dataloader', {}), ('val', 'val_dataloader', validates)):
        dataset = f"{key}['dataset']"
        images, labels = f'img/{split}', f'ann/{split}'
        add('data', f'{split} images: no such folder', images, damage=at(f'{DATA}/{images}', do=remove), **how)
        add('data', f'{split} images: empty folder', key, damage=at(f'{DATA}/{images}', do=folder), **how)
        add('data', f'{split} labels: no such folder', labels, damage=at(f'{DATA}/{labels}', do=remove), **how)
        add('data', f'{split} labels: empty folder', labels, damage=at(f'{DATA}/{labels}', do=folder), **how)
        add('data', f'{split} root: no such folder', 'no_such_root', **how,
            more=f"{dataset}.update(data_root='no_such_root')\n")
        add('data', f'{split} img_suffix: no such files', key, **how,
            more=f"{dataset}.update(img_suffix='.tiff')\n")
        add('data', f'{split} seg_map_suffix: no such files', '.tiff', **how,
            more=f"{dataset}.update(seg_map_suffix='.tiff')\n")
        add('data', f'{split} ann_file: no such file', 'no_such.txt', **how,
            more=f"{dataset}.update(ann_file='no_such.txt')\n")
        add('data', f'{split} ann_file: empty', re.compile(f'{key}|none.txt'), **how,
            more=f"{dataset}.update(ann_file='none.txt')\n", damage=write(f'{DATA}/none.txt', ''))
        add('data', f'{split} ann_file: names that are no files', 'zz/99', **how,
            damage=write(f'{DATA}/some.txt', '\n'.join([*(tiny.NAMES if split == 'train' else '0123'), 'zz/99', ''])),
            more=f"{dataset}.update(ann_file='some.txt')\n")
    add('data', 'two images of one name', re.compile('unique|twice'), re.compile('00'), more="train_dataloader.update("
        "dataset=dict(type='ConcatDataset', datasets=[train_dataloader['dataset'], dict(train_dataloader['dataset'], "
        "data_prefix=dict(img_path='other/train', seg_map_path='ann/train'))]))\n",
        damage=lambda place: shutil.copytree(osp.join(place, DATA, 'img'), osp.join(place, DATA, 'other')))
    add('data', 'labels where images are looked for', re.compile('ann/train|img/train'), re.compile('colour'),
        more=f"{TRAIN}.update(data_prefix=dict(img_path='ann/train', seg_map_path='img/train'))\n")
    for what, text in dict(empty='', strange='zz/99\n', with_endings='a/00.png\na/01.png\n').items():
        add('data', f'split file {what}', re.compile(r'al\.initial'), re.compile('names of training images'),
            al=dict(initial='first.txt'), damage=write('first.txt', text))
    add('data', 'split file that is a folder', '`al.initial`', "'first'", al=dict(initial='first'),
        damage=lambda place: os.makedirs(osp.join(place, 'first')))
    add('data', 'split file that is no text', re.compile('al.initial'), 'first.txt', al=dict(initial='first.txt'),
        damage=lambda place: shutil.copy(osp.join(place, image('a/00')), osp.join(place, 'first.txt')))
    add('data', 'fewer classes than there are labels', 'ann/train', 'below 2', '2',
        more="model['decode_head'].update(num_classes=2)\n")


def add_data_of_runs() -> None:
    resume = dict(options=('--resume', ))
    for run in ('image', 'region'):
        add('data', f'a labelled image is gone, {run}', re.compile('not in the data set any more'), re.compile('drop'),
            run=run, damage=at_last_asked(f'{DATA}/img/train/{{}}.png', remove), **resume)
    add('data', 'a partly labelled image has another size now', re.compile(r'(img/train|labelled)/\S+\.png'),
        run='region', damage=at_last_asked(f'{DATA}/img/train/{{}}.png', large_picture), **resume)
    add('data', 'another data set altogether', 'not in the data set any more', run='image',
        damage=lambda place: os.rename(osp.join(place, DATA, 'img/train/a'), osp.join(place, DATA, 'img/train/c')),
        **resume)
    for what, do in dict(truncated=cut, smaller=smaller, of_no_class=of_no_class, missing=remove).items():
        by_training = what in ('truncated', 'of_no_class')  # a header does not show it
        add('data', f'labels that are {what} now', re.compile(r'ann/train/\S+\.png'), run='image', trains=by_training,
            writes=('work/*', ) if by_training else ('work/round_1/query_scores.json', ),
            damage=at(*map(label, tiny.NAMES), do=do), **resume)
    superpixels = WORK + '/superpixels/12_100.0/{}.png'
    for what, do in dict(truncated=cut, page=page, smaller=smaller, folder=folder).items():
        add('data', f'superpixels {what}', re.compile(r'superpixels/\S+\.png'), run='superpixel',
            damage=at_last_asked(superpixels, do), **resume)
    own = dict(unit=dict(type='superpixel', folder='own'), initial=9, budget=6, rounds=1)
    for what, do in dict(truncated=cut, page=page, smaller=smaller, folder=folder, alpha=with_alpha,
                         missing=remove).items():
        add('data', f'segments of the user\'s own, {what}', re.compile(r'own/a/03\.png'), al=own,
            damage=lambda place, do=do: own_segments(place) or do(osp.join(place, 'own/a/03.png')))


def own_segments(place: str) -> None:
    labels_HW = np.arange(math.prod(tiny.SHAPE), dtype=np.uint16).reshape(tiny.SHAPE) // 100
    for name in tiny.NAMES:
        al_patch.write_png(osp.join(place, f'own/{name}.png'), labels_HW)


# --- by hand: labels that people give --------------------------------------------------------------------------------

# what is right in other files is kept
STORE = 'work/labels/*', 'work/round_*/to_label/*'


def add_labels() -> None:
    for run in ('human', 'human_region'):
        inbox = WORK + '/round_1/labels/{}.png'
        for what, (do, *words) in dict(
                truncated=(cut_label, ), page=(page, ),
                smaller=(smaller, '(31, 48)', '(32, 48)'), turned=(turned, '(48, 32)', '(32, 48)'),
                thumbnail=(thumbnail, '(16, 24)', 'thumbnail'), colours=(colours, 'colour'),
                alpha=(with_alpha, 'colour'), deep=(deep, '300'), of_no_class=(of_no_class, '7', '3'),
                folder=(folder, )).items():
            add('labels', f'{run} {what}', re.compile(r'round_1/labels/\S+\.png'), *words, run=run, writes=STORE,
                options=('--resume', ), damage=at_last_asked(inbox, do))
        add('labels', f'{run} data set truncated', re.compile(r'ann/train/\S+\.png'), run=run, writes=STORE,
            options=('--resume', ), damage=at_last_asked(f'{DATA}/ann/train/{{}}.png', cut))
    add('labels', 'a photograph as JPEG', re.compile(r'round_1/labels/\S+\.jpg'), re.compile('colour'), run='human',
        writes=STORE, options=('--resume', ), damage=at_last_asked(WORK + '/round_1/labels/{}.jpg', colours))
    for what, do in dict(truncated=cut_label, of_no_class=of_no_class, smaller=smaller).items():
        add('labels', f'an earlier round\'s mended, {what}', re.compile(r'round_0/labels/\S+\.png'), run='answered',
            writes=STORE, options=('--resume', ), damage=at_first_asked(WORK + '/round_0/labels/{}.png', do))
    for kind, suffix in dict(classes='.png', done='.png', read='.json').items():
        for what, do in dict(truncated=cut, page=page, deleted=remove).items():
            if (kind, what) != ('read', 'deleted'):  # it is made again
                add('labels', f'the store\'s {kind} {what}', re.compile(rf'labels/{kind}/\S+\{suffix}'), run='answered',
                    options=('--resume', ), writes=STORE,
                    damage=at_first_asked(f'{WORK}/labels/{kind}/{{}}{suffix}', do))
    for kind in ('classes', 'done'):
        add('labels', f'the store\'s {kind} of another size', re.compile(rf'labels/{kind}/\S+\.png'), run='answered',
            options=('--resume', ), damage=at_first_asked(f'{WORK}/labels/{kind}/{{}}.png', smaller))
    for value, why in ((255, 'ignore'), (1, 'class')):
        add('labels', f'unlabelable has a meaning already: {why}', '`al.oracle', 'unlabelable', f'{value}', why,
            al=dict(oracle=dict(type='human', unlabelable=value)))
    add('labels', 'options for an oracle that has none', '`al.oracle.accept_partial`',
        al=dict(oracle=dict(type='simulated', accept_partial=True)))


def cut_label(path: str) -> None:
    draws(np.random.default_rng(0).integers(0, 3, tiny.SHAPE).astype(np.uint8))(path)
    cut(path)


def at_first_asked(pattern: str, do: Callable) -> Callable:
    """As ``at_last_asked``, of the first image that round 0 asked for."""
    return lambda place: do(osp.join(place, pattern.format(
        next(iter(read_json(osp.join(place, STATE))['rounds'][0]['asked'])))))


# --- by hand: work_dir -----------------------------------------------------------------------------------------------


def add_work_dir() -> None:
    resume = dict(options=('--resume', ))
    add('work_dir', 'a file in its place', 'work', re.compile('File exists|directory|folder'), damage=write(WORK, ''))
    add('work_dir', 'below a file', 'work/below', damage=write(WORK, ''), options=('--work-dir', 'work/below'))
    add('work_dir', 'where nobody can write', '/proc/work', options=('--work-dir', '/proc/work'))
    add('work_dir', 'a device', '/dev/null/work', options=('--work-dir', '/dev/null/work'))
    add('work_dir', 'a name that is too long', 'x' * 99, options=('--work-dir', 'x' * 300))
    add('work_dir', 'holds a run, but no --resume', 'work/al_state.json', '--resume', '--work-dir', run='image')
    add('work_dir', 'holds a waiting run, but no --resume', 'work/al_state.json', '--resume', run='human')
    add('work_dir', 'in use', 'work', 'in use', re.compile(r'process \d+'), holds='work/al.lock', damage=write(
        'work/al.lock', 'process 1 on elsewhere'))
    add('work_dir', 'in use, resumed', 'work', 'in use', run='image', holds='work/al.lock', **resume)
    add('work_dir', 'the lock is a folder', 'al.lock',
        damage=lambda place: os.makedirs(osp.join(place, WORK, 'al.lock')))
    add('work_dir', 'the lock is a link', 'al.lock', damage=lambda place: (
        os.makedirs(osp.join(place, WORK)), os.symlink('../elsewhere', osp.join(place, WORK, 'al.lock'))))
    add('work_dir', 'a round\'s folder is a file', 'round_0', damage=write('work/round_0', ''))
    add('work_dir', 'a round\'s folder leads out', 'round_0', 'elsewhere', al=REGION, damage=lambda place: (
        os.makedirs(osp.join(place, WORK)), os.makedirs(osp.join(place, 'elsewhere')),
        os.symlink('../elsewhere', osp.join(place, WORK, 'round_0'))))
    add('work_dir', 'more rounds than the disk holds', 'work', re.compile('GB|disk'), al=dict(rounds=10**7, budget=1))
    for what, text in dict(page='<html>404</html>', nothing='', half='{"schema": 2, "phase": ', null='null', list='[]',
                           number='3', nested='[' * 10**5).items():
        add('work_dir', f'state: {what}', 'work/al_state.json', damage=write(STATE, text), **resume)
    add('work_dir', 'state: no UTF-8', 'work/al_state.json', **resume, damage=lambda place: (
        os.makedirs(osp.join(place, WORK)), shutil.copy(osp.join(place, image('a/00')), osp.join(place, STATE))))
    add('work_dir', 'state: a folder', 'work/al_state.json', **resume,
        damage=lambda place: os.makedirs(osp.join(place, STATE)))
    add('work_dir', 'state: a folder, without --resume', 'work/al_state.json',
        damage=lambda place: os.makedirs(osp.join(place, STATE)))
    add('work_dir', 'state: another run\'s', '`al.unit`', 'pixel', run='region', al=dict(unit='pixel'), **resume)
    for run in ('image', 'region'):
        for what, do in dict(missing=remove, truncated=cut, page=page, empty=empty, folder=folder).items():
            add('work_dir', f'checkpoint {what}, {run}', re.compile(r'round_1/iter_2\.pth'), run=run,
                damage=at_checkpoint(do), **resume)
    add('work_dir', 'best checkpoint missing', re.compile(r'round_1/best\S+\.pth'), run='best',
        damage=at_checkpoint(remove, 'best'), **resume)

    def drop(checkpoint: dict) -> None:
        del checkpoint['state_dict']['decode_head.conv_seg.weight']

    def widen(checkpoint: dict) -> None:
        weight = checkpoint['state_dict']['backbone.stem.weight']
        checkpoint['state_dict']['backbone.stem.weight'] = weight.repeat(2, 1, 1, 1)

    def with_more(checkpoint: dict) -> None:
        checkpoint['state_dict']['decode_head.more'] = torch.zeros(1)

    for what, change, word in (('lacks a parameter', drop, 'conv_seg.weight'),
                               ('of another shape', widen, 'backbone.stem.weight'),
                               ('has one too many', with_more, 'decode_head.more')):
        add('work_dir', f'checkpoint {what}', 'round_1/iter_2.pth', word, run='image',
            damage=changes_checkpoint(change), **resume)
    add('work_dir', 'checkpoint of nothing', 'round_1/iter_2.pth', run='image',
        damage=changes_checkpoint(lambda checkpoint: dict(meta={})), **resume)
    add('work_dir', 'checkpoint that runs code', 'round_1/iter_2.pth', re.compile('code'), run='image',
        damage=changes_checkpoint(lambda checkpoint: dict(checkpoint, more=RunsCode())), **resume)
    add('work_dir', 'checkpoint that is a bare pickle', 'round_1/iter_2.pth', run='image', damage=at_checkpoint(
        lambda path: pickle.dump(RunsCode(), open(path, 'wb'))), **resume)

    def halfway(content: dict) -> None:
        content.update(phase='train', ended=None)
        for key in ('metrics', 'checkpoints', 'train_seconds', 'query_seconds'):
            content['rounds'][-1].pop(key, None)

    add('work_dir', 'checkpoint of a round\'s middle that runs code', 'round_1/iter_2.pth', 'code', run='image',
        damage=both(changes_checkpoint(lambda checkpoint: dict(checkpoint, more=RunsCode())), changes_state(halfway)),
        **resume)


# --- by hand: command line -------------------------------------------------------------------------------------------


def add_command_line() -> None:
    add_options()
    add_companions()


def add_options() -> None:
    def config_is(do: Callable) -> Callable:
        return at(CONFIG, do=do)

    add('command line', 'config missing', CONFIG, damage=config_is(remove))
    add('command line', 'config a folder', CONFIG, damage=config_is(folder))
    add('command line', 'config no Python', CONFIG, damage=config_is(page))
    add('command line', 'config empty', CONFIG, damage=config_is(empty))
    add('command line', 'config of another name', 'tiny_al.txt', re.compile(r'\.py|supported'), command=(
        'al_train.py', 'tiny_al.txt', '--work-dir', WORK), damage=lambda place: shutil.copy(
            osp.join(place, CONFIG), osp.join(place, 'tiny_al.txt')))
    add('command line', 'config with a syntax error', CONFIG, more='al = dict(\n')
    add('command line', 'config with an unknown name', CONFIG, 'no_such_name', more='x = no_such_name\n')
    add('command line', 'config with a base that is missing', re.compile('no_such_base'),
        more="_base_ = ['no_such_base.py']\n")
    add('command line', 'config with an import that is missing', 'no_such_module',
        more="custom_imports = dict(imports=['al_patch', 'tiny', 'no_such_module'])\n")
    add('command line', 'config without an `al` block', CONFIG, '`al`', al='none')
    add('command line', 'config with an `al` block of None', CONFIG, '`al`', more='al = None\n')
    add('command line', 'an unknown option', '--no-such', options=('--no-such', ))
    add('command line', 'an option without its value', '--work-dir', options=('--work-dir', ))
    add('command line', 'an argument too many', 'too_many', options=('too_many', ))
    add('command line', 'an unknown launcher', '--launcher', 'condor', options=('--launcher', 'condor'))
    add('command line', 'no config', 'config', command=('al_train.py', ))
    add('command line', '--cfg-options without =', '--cfg-options', 'al.rounds', options=('--cfg-options', 'al.rounds'))
    add('command line', '--cfg-options without a value', '--cfg-options', options=('--cfg-options', ))
    add('command line', '--cfg-options: a key below a number', '--cfg-options', 'max_iters',
        options=('--cfg-options', 'train_cfg.max_iters.x=3'))
    add('command line', '--cfg-options: an index out of range', '--cfg-options', '9',
        options=('--cfg-options', 'train_dataloader.dataset.pipeline.9.type=Resize'))
    for option, key, given in (('al.budgets=1', '`al.budgets`', '`al.budget`'),
                               ('al.rounds=five', '`al.rounds`', "'five'"),
                               ('al.unit.type=boxes', '`al.unit', "'boxes'"), ('al=entropy', '`al`', "'entropy'"),
                               ('al.strategy.type=entrpy', '`al.strategy', "'entrpy'"),
                               ('al.unit.size=8,8', '`al.unit', 'type'), ('al.seed=-1', '`al.seed`', '-1'),
                               ('al.budget=0', '`al.budget`', '0'), ('model.type=NoSuchModel', 'model', 'NoSuchModel'),
                               ('train_dataloader.batch_size=many', 'batch_size', 'many'),
                               ('train_cfg.max_iters=many', 'max_iters', 'many'),
                               ('optim_wrapper.optimizer.type=SDG', 'optimizer', 'SDG')):
        how = SHOWN_BY_A_ROUND if option.startswith(('train', 'optim')) else {}
        add('command line', f'--cfg-options {option}', key, given, options=('--cfg-options', option), **how)
    add('command line', '--amp for an optimizer wrapper of one\'s own', '--amp', 'OptimWrapperDict',
        options=('--amp', ), more="optim_wrapper.update(type='OptimWrapperDict')\n")
    for gpus in ('all', '-1', '1.5', '', '0x2'):
        add('command line', f'{gpus!r} GPUs', 'GPUs', gpus=gpus)
    add('command line', 'a wrong setting, with two processes', '`al.unit`', "'boxes'", gpus='2', al=dict(unit='boxes'))
    add('command line', 'a broken label, with two processes', label('a/01'), gpus='2',
        damage=at(label('a/01'), do=cut))
    add('command line', 'a timeout that is none, with two processes', '`env_cfg.dist_cfg.timeout`', "'long'", gpus='2',
        more="env_cfg = dict(dist_cfg=dict(timeout='long'))\n")


def add_companions() -> None:
    for command, *words in (
            ('al_label.py export nowhere', 'nowhere'), ('al_label.py export work', 'work', 'does not wait'),
            ('al_label.py rewind work 9', 'K', '9', '1'), ('al_label.py rewind work -1', '-1'),
            ('al_label.py rewind work one', 'one'), ('al_label.py rewind work 1', '1', 'newest'),
            ('al_label.py rewind nowhere 0', 'nowhere'), ('al_label.py drop work no/such', 'no/such'),
            ('al_label.py drop nowhere a/00', 'nowhere'), ('al_label.py drop work', 'IMAGE'),
            ('al_label.py', 'command'), ('al_label.py import work', 'import'),
            ('al_report.py status nowhere', 'nowhere'), ('al_report.py compare nowhere', 'nowhere'),
            ('al_report.py compare work nowhere', 'nowhere'), ('al_report.py compare work -o curves.xyz', 'xyz'),
            ('al_report.py compare work --metric mIoo', 'mIoo'), ('al_report.py compare work --full much', 'much'),
            ('al_report.py stats work', 'stats')):
        add('command line', command, *words, run='best' if 'compare' in command else 'image',
            command=tuple(command.split()))
    for script in ('al_label.py export', 'al_report.py status'):
        add('command line', f'{script} of a broken state', 'al_state.json', command=(*script.split(), 'work'),
            run='image', damage=at(STATE, do=cut))
    add('command line', 'al_label.py export without a config', 'config', run='human',
        command=('al_label.py', 'export', 'work'), damage=lambda place: remove(osp.join(place, WORK, CONFIG)))
    for command in ('rewind work 0', 'drop work a/00'):
        add('command line', f'al_label.py {command} of a run that goes on', 'in use', run='image', holds='work/al.lock',
            command=('al_label.py', *command.split()))


# --- by hand: config -------------------------------------------------------------------------------------------------


def add_config() -> None:
    resume, validates = dict(options=('--resume', )), dict(validates=True)
    # checkpoints and validation
    hook = '`default_hooks.checkpoint'
    add('config', 'no CheckpointHook', hook, 'CheckpointHook', more="default_hooks.update(checkpoint=None)\n")
    add('config', 'save_last=False', hook, 'save_last', more="default_hooks['checkpoint'].update(save_last=False)\n")
    add('config', 'checkpoints in another place', hook, "'elsewhere'",
        more="default_hooks['checkpoint'].update(out_dir='elsewhere')\n")
    for key in ('query_with', 'weights'):
        add('config', f'{key} best without save_best', f"`al.{key}='best'`", 'save_best', al={key: 'best'}, **validates,
            more="default_hooks['checkpoint'].update(save_best=None)\n")
        add('config', f'{key} best without validation', f"`al.{key}='best'`", 'val_cfg', al={key: 'best'})
    add('config', 'best of a metric that nobody reports', 'mIuO', al=dict(query_with='best'), **validates,
        more="default_hooks['checkpoint'].update(save_best='mIuO')\n")
    add('config', 'best, but no validation before the end', re.compile('best'), re.compile('val_interval|val_begin'),
        al=dict(query_with='best'), **validates, more='train_cfg.update(val_interval=9, val_begin=9)\n')
    add('config', 'stop without validation', '`al.stop`', 'val_cfg', al=dict(stop=dict(metric='mIoU', value=75)))
    add('config', 'stop for a metric that nobody reports', '`al.stop.metric`', "'mIuO'",
        al=dict(stop=dict(metric='mIuO', value=75)), **SHOWN_BY_TRAINING, **validates)
    # the block and the pool
    for key, value, total in (('initial', 13, '12'), ('budget', 9, '8'), ('initial', 1., None)):
        add('config', f'{key} {value}: more than there are', f'`al.{"budget" if total is None else key}`',
            total or '0', al={'initial': 4, key: value})
    add('config', 'budget list: more than there are', '`al.budget`', '9',
        al=dict(budget=[2, 9], rounds=2))
    add('config', 'budget list of another length', '`al.budget`', '`al.rounds`', '3', al=dict(budget=[1, 1], rounds=3))
    add('config', 'initial names an image twice and a strange one', '`al.initial`', 'zz/99',
        al=dict(initial=['a/00', 'a/00', 'zz/99']))
    add('config', 'per_image for whole images', '`al.per_image`', 'True', al=dict(per_image=True))
    add('config', 'crc with one image', '`al.initial`', '2', al=dict(strategy='crc', initial=1))
    for strategy in ('contextual_diversity', 'crc'):
        add('config', f'{strategy} for pixels', '`al.unit`', "'pixel'", al=dict(unit='pixel', strategy=strategy))
    for setting, key in ((dict(type='coreset', embed=None), 'embed'), (dict(type='entropy', embed='features'), 'embed'),
                         (dict(type='clasp_pe', score='random'), 'score'), (dict(type='bald', mc=1), 'mc'),
                         (dict(type='entropy', calibration=.5), 'calibration'),
                         (dict(type='crc', calibration=0), 'calibration')):
        add('config', f'parts that do not fit: {setting}', f'`al.strategy.{key}`', str(setting[key]),
            al=dict(strategy=setting))
    for path in ('no_such:f', 'tiny:no_such', 'tiny:', ':f', 'tiny:NAMES', 'builtins:max'):
        add('config', f'strategy {path}', '`al.strategy`', repr(path), al=dict(strategy=path))
    add('config', 'a selector that repeats itself', '`al.strategy.select`', 'different', **SHOWN_BY_TRAINING,
        al=dict(strategy=dict(type='entropy', select='tiny:always_first')))
    add('config', 'a score that is no number', re.compile('al.strategy|not_a_number'), 'finite', **SHOWN_BY_TRAINING,
        al=dict(strategy='tiny:not_a_number'))
    # overrides
    for what, overrides, *words in (
            ('a round that never comes', {2: {'train_cfg.max_iters': 3}}, '2', '1'),
            ('a key below a number', {1: {'train_cfg.max_iters.x': 3}}, 'max_iters'),
            ('a key that the config has not', {1: {'train_cgf.max_iters': 3}}, 'train_cgf'),
            ('the `al` block', {1: {'al.budget': 3}}, 'al.budget'), ('work_dir', {1: {'work_dir': 'x'}}, 'work_dir')):
        add('config', f'overrides: {what}', '`al.overrides', *words, al=dict(overrides=overrides))
    for key, value in (('train_cfg.max_iter', 3), ('model.type', 'NoSuchModel'),
                       ('train_dataloader.dataset.data_root', 'no_such')):
        add('config', f'overrides: {key}={value}', value if isinstance(value, str) else 'max_iter', **SHOWN_BY_TRAINING,
            al=dict(overrides={1: {key: value}}))
    # what it lacks
    for key in ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'):
        add('config', f'no {key}', key, more=f'{key} = None\n')
    add('config', 'nothing to train with', 'train_dataloader',
        more='train_dataloader = train_cfg = optim_wrapper = None\n')
    add('config', 'no test pipeline', re.compile('test_dataloader.*test_pipeline'),
        more='test_dataloader = test_cfg = test_evaluator = None\n')
    add('config', 'no label loader', 'training pipeline', re.compile('LoadAnnotations|gt_seg_map'), more=(
        f"{TRAIN}['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]\n"))
    add('config', 'a pipeline without a loader', 'pipeline', **SHOWN_BY_A_ROUND, more=(
        f"{TRAIN}['pipeline'] = [dict(type='LoadAnnotations'), dict(type='PackSegInputs')]\n"))
    for key, where in (('NoSuchTransform', f"{TRAIN}['pipeline'][2]"), ('NoSuchSampler', "train_dataloader['sampler']"),
                       ('NoSuchDataset', TRAIN), ('NoSuchBackbone', "model['backbone']"),
                       ('NoSuchHead', "model['decode_head']"), ('NoSuchLoss', "model['decode_head']['loss_decode']"),
                       ('NoSuchLoop', 'train_cfg'), ('NoSuchHook', "default_hooks['logger']")):
        add('config', f'a type that is none: {key}', key, more=f"{where}.update(type='{key}')\n",
            **SHOWN_BY_A_ROUND if key in ('NoSuchSampler', 'NoSuchLoop') else {})
    add('config', 'a metric that is none', 'NoSuchMetric', more="val_evaluator.update(type='NoSuchMetric')\n",
        **validates, **SHOWN_BY_A_ROUND)
    for key, value in (('batch_size', 0), ('batch_size', -2), ('num_workers', -1)):
        add('config', f'train_dataloader.{key} {value}', key, *[str(value)] * (key == 'batch_size'), **SHOWN_BY_A_ROUND,
            more=f'train_dataloader.update({key}={value})\n')
    add('config', 'more in a batch than is labelled', '`train_dataloader.batch_size`', '9', **SHOWN_BY_A_ROUND, more=(
        "train_dataloader.update(batch_size=9, drop_last=True, sampler=dict(type='DefaultSampler', shuffle=True))\n"
        "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)\n"
        "default_hooks['checkpoint'].update(by_epoch=True, interval=1)\n"))
    add('config', 'no iterations', 'max_iters', '0', **SHOWN_BY_A_ROUND, more='train_cfg.update(max_iters=0)\n')
    add('config', 'an option that the head has not', 'no_such_option', more=(
        "model['decode_head'].update(no_such_option=3)\n"))
    add('config', 'channels that do not fit', 'channels', **SHOWN_BY_A_ROUND,
        more="model['decode_head'].update(in_channels=9)\n")
    add('config', 'a model that does not segment', '`model`', 'TinyBackbone',
        more="model = dict(type='TinyBackbone')\n")
    add('config', 'depth maps', re.compile('NYUDataset|label map'), more=(
        f"train_dataloader['dataset'] = dict(type='NYUDataset', data_root={DATA!r}, img_suffix='.png', pipeline=["
        "dict(type='LoadImageFromFile'), dict(type='LoadDepthAnnotation'), dict(type='PackSegInputs')], "
        "data_prefix=dict(img_path='img/train', depth_map_path='ann/train'))\n"))
    load = "dict(type='LoadBiomedicalImageFromFile', decode_backend='numpy')"
    add('config', 'volumes', re.compile(r'img/train/\S+.npy'), re.compile('4, 32, 48'), damage=volumes, more=(
        f"{TRAIN}.update(img_suffix='.npy', seg_map_suffix='.npy')\n{TRAIN}['pipeline'] = [{load}, "
        "dict(type='LoadBiomedicalAnnotation', decode_backend='numpy'), dict(type='PackSegInputs')]\n"
        f"test_dataloader['dataset']['pipeline'] = [{load}, dict(type='PackSegInputs')]\n"))
    add('config', 'weights to begin with that are missing', re.compile('load_from|no_such.pth'), 'no_such.pth',
        more="load_from = 'no_such.pth'\n")
    add('config', 'weights to begin with that are a page', 'weights.pth', **SHOWN_BY_A_ROUND,
        more="load_from = 'weights.pth'\n", damage=write('weights.pth', '<html>404</html>'))
    add('config', 'a seed that is none', 'randomness.seed', "'zero'", more="randomness = dict(seed='zero')\n")
    add('config', 'a learning rate that diverges', re.compile('finite|nan|diverge'), re.compile('round 0|round_0'),
        **SHOWN_BY_TRAINING, more="optim_wrapper['optimizer'].update(lr=1e30)\ntrain_cfg.update(max_iters=6)\n")
    # "no label" is one value
    ignore = re.compile('ignore_index|seg_pad_val')
    for unit in ('pixel', dict(type='region', size=[8, 8])):
        for what, text in (('head', "model['decode_head'].update(ignore_index=254)\n"),
                           ('padding', "model['data_preprocessor'].update(seg_pad_val=0)\n")):
            add('config', f'no label is another value: {what}, {unit}', ignore, re.compile('254|0'), '255', more=text,
                al=dict(REGION, unit=unit))
    # what a model cannot do
    add('config', 'MC dropout without dropout', '`al.strategy.mc`', 'dropout', al=dict(strategy='bald'),
        more="model['decode_head'].update(dropout_ratio=0)\n")
    add('config', 'features from nowhere', '`al.strategy.features_from`', 'neck', 'backbone',
        al=dict(strategy=dict(type='coreset', features_from='neck')))
    add('config', 'a loss that looks at neighbours, regions', 'BoundaryLoss', 'al.unit', al=REGION,
        more="model['decode_head'].update(loss_decode=dict(type='BoundaryLoss'))\n")
    # what a resumed run cannot change
    for key, value in dict(unit='pixel', initial=5, seed=3, oracle='human', budget=3).items():
        add('config', f'resumed with another {key}', f'`al.{key}`', str(value), run='image', al={key: value}, **resume)
    add('config', 'resumed with a round less than there are', '`al.rounds`', run='image',
        al=dict(rounds=0), **resume)
    add('config', 'resumed with other overrides of a round that is done', '`al.overrides', '0', run='image',
        al=dict(overrides={0: {'train_cfg.max_iters': 3}}), **resume)
    add('config', 'resumed with another model', 'iter_2.pth', re.compile('backbone|decode_head'), run='image',
        more="model['decode_head'].update(channels=4)\n", **resume)


def volumes(place: str) -> None:
    for name in tiny.NAMES:
        np.save(osp.join(place, image(name)[:-3] + 'npy'), np.zeros((2, 4, H, W), np.float32))
        np.save(osp.join(place, label(name)[:-3] + 'npy'), np.zeros((4, H, W), np.float32))


# --- by someone who had read only the README -------------------------------------------------------------------------

# (how, what the error should hold), written before any of them was tried
NEWCOMER = [
    (dict(al=dict(strategy='Entropy')), '`al.strategy`', "'Entropy'", 'entropy'),
    (dict(al=dict(strategys='entropy')), '`al.strategys`', '`al.strategy`'),
    (dict(al=dict(initial='5%')), '`al.initial`', "'5%'"),
    (dict(al=dict(budget=5.0)), '`al.budget`', '5.0'),
    (dict(al=dict(unit='superpixels')), '`al.unit`', "'superpixels'", 'superpixel,'),
    (dict(al=dict(unit=dict(type='region', size='64x64'))), '`al.unit.size`', "'64x64'"),
    (dict(al=dict(unit=dict(name='region', size=[8, 8]))), '`al.unit', 'type'),
    (dict(al=dict(unit=dict(type='superpixel', size=[8, 8]))), '`al.unit.size`', 'n_segments'),
    (dict(al=dict(oracle='Human')), '`al.oracle`', "'Human'", "'human'"),
    (dict(al=dict(weights='pretrained')), '`al.weights`', "'pretrained'", "'scratch'"),
    (dict(al=dict(query_with='best')), '`al.query_with', 'save_best'),
    (dict(al=dict(stop=75), validates=True), '`al.stop`', '75', "metric='mIoU'"),
    (dict(options=('--cfg-options', 'al.rounds=five')), '`al.rounds`', "'five'"),
    (dict(options=('--cfg-options', 'al.budgets=0.1')), '`al.budgets`', '`al.budget`'),
    (dict(gpus='0', command=('0', CONFIG)), 'GPUs', 'usage'),  # the two swapped
    (dict(options=('--workdir', 'work_dirs/my_run')), '--workdir', '--help'),
    (dict(run='image'), 'al_state.json', '--resume'),  # the same command again
    (dict(run='image', al=dict(unit=dict(type='region', size=[8, 8])), options=('--resume', )), '`al.unit`', 'region'),
    (dict(al=dict(overrides={'train_cfg.max_iters': 4000})), '`al.overrides`', 'train_cfg.max_iters', 'round'),
    (dict(al=dict(overrides={1: {'max_iters': 4000}})), '`al.overrides', 'max_iters'),
    (dict(al=dict(initial='splits/first.txt')), '`al.initial`', 'splits/first.txt', 'file'),
    (dict(al=dict(initial=['a/00.png'])), '`al.initial`', 'a/00.png', "'a/00'"),
    (dict(al=dict(budget=[.05, .05], rounds=5)), '`al.budget`', '5', '2'),
    (dict(al=dict(strategy=dict(type='coreset', embed='feature'))), '`al.strategy.embed`', "'feature'", 'features'),
    (dict(al=dict(strategy='my_strategies:doubt')), '`al.strategy`', 'my_strategies'),
    (dict(al=dict(unit='pixel', strategy='contextual_diversity')), '`al.unit`', re.compile('contextual|confusion')),
    (dict(al=dict(strategy='bald'), more="model['decode_head'].update(dropout_ratio=0)\n"), 'dropout', 'mc'),
    (dict(al=dict(visualize=True)), '`al.visualize`', 'True', 'int'),
    (dict(al=dict(strategy=dict(type='entropy', reduce='median'))), '`al.strategy.reduce`', "'median'", "'max'"),
    (dict(al=dict(stop=dict(metric='miou', value=75)), validates=True, **SHOWN_BY_TRAINING), '`al.stop.metric`',
     "'miou'", 'mIoU'),
    (dict(al='entropy'), '`al`', "'entropy'", 'dict'),
    (dict(damage=at(CONFIG, do=remove)), CONFIG, 'no such file'),
    (dict(more=f"{TRAIN}.update(data_root='/data/cityscpaes')\n"), '/data/cityscpaes'),
    (dict(run='human', options=('--resume', ), writes=STORE,
          damage=at_last_asked(WORK + '/round_1/labels/{}.png', colours)), 'round_1/labels', 'colour'),
    (dict(run='human', options=('--resume', ), writes=STORE,
          damage=at_last_asked(WORK + '/round_1/labels/{}.png', thumbnail)), 'round_1/labels', '(16, 24)')]


def add_newcomer() -> None:
    for i, (how, *words) in enumerate(NEWCOMER):
        add('newcomer', f'{i:02d} {list(how.values())[0]!r:.60}', *words, **how)


@functools.cache
def all_cases() -> list[Case]:
    for function in (add_settings, add_state, add_data, add_labels, add_work_dir, add_command_line, add_config,
                     add_newcomer):
        function()
    names = [str(case) for case in CASES]
    assert len(names) == len(set(names)), f'twice: {sorted(name for name in set(names) if names.count(name) > 1)}'
    return CASES


def unknown_fields(content: dict) -> list[str]:
    """Fields of a state that no input here is about."""
    rounds = {**ROUND_FIELDS, **REGION_FIELDS, **CRC_FIELDS, **HUMAN_FIELDS}
    with contextlib.suppress(KeyError):
        return sorted({*content} - {*STATE_FIELDS} | {f'rounds.{key}' for entry in content['rounds']
                                                      for key in {*entry} - {*rounds}})
    return []
