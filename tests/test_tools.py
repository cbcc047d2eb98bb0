"""Annotation tools: what their exports come to, as label maps in the inbox, and what is shown in them."""
import base64
import io
import itertools
import json
import os
import os.path as osp
import pathlib
import threading
import types
import xml.etree.ElementTree as ET
import zipfile

import cv2
import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import VOID, People, brush, part

import al_label
import al_patch

CELL = dict(type='region', size=[8, 8])  # 6 in a row: number 7 is rows 8 to 15 and columns 8 to 15
CLASSES = ['dark', 'grey', 'bright']
COLOURS = [(0, 0, 1), (90, 90, 90), (200, 200, 200)]


def region(kind: str, label: str, size: tuple = tiny.SHAPE, **value) -> dict:
    """A region as Label Studio stores it."""
    return dict(type=kind, from_name='label', to_name='image', original_height=size[0], original_width=size[1],
                value={**value, kind: [label]})


def brushes(label: np.ndarray) -> list:
    return [region('brushlabels', name, format='rle', rle=brush(label == c))
            for c, name in enumerate(CLASSES) if (label == c).any()]


def task_of(run: People, name: str, *results: list, **data) -> dict:
    """A task of the newest round with an annotation of each list of regions."""
    tasks = json.loads(al_label.label_studio_files(run.state, [name], {})['label_studio.json'])
    return dict(tasks[0], data={**tasks[0]['data'], **data}, annotations=[
        dict(id=i, was_cancelled=False, updated_at=f'2026-01-0{i + 1}', result=list(result))
        for i, result in enumerate(results)])


def min_of(task: dict) -> dict:
    """The same as in a JSON-MIN, as Label Studio 1.23 writes it."""
    [annotation] = task['annotations']
    return {**task['data'], 'id': 3, 'annotator': 1, 'annotation_id': 7, 'updated_at': '2026-01-01', 'label': [
        {**result['value'], 'original_width': result['original_width'], 'original_height': result['original_height']}
        for result in annotation['result']]}


def archive(path, files: dict) -> str:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return str(path)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'PNG')
    return file.getvalue()


def xml_of(shapes: dict, size: tuple = tiny.SHAPE) -> str:
    """CVAT for images 1.1: name -> (tag, attributes) of shapes."""
    root = ET.Element('annotations')
    for name, each in shapes.items():
        image = ET.SubElement(root, 'image', name=f'{name}.png', height=str(size[0]), width=str(size[1]))
        for tag, attributes in each:
            ET.SubElement(image, tag, {key: str(value) for key, value in dict(dict(z_order=0), **attributes).items()})
    return ET.tostring(root, 'unicode')


def cvat_mask(label: str, mask: np.ndarray) -> tuple:
    """A mask of CVAT's over its whole image."""
    runs = [[bool(key), len([*group])] for key, group in itertools.groupby(mask.reshape(-1).tolist())]
    numbers = [0] * runs[0][0] + [n for _, n in runs]
    return 'mask', dict(label=label, rle=', '.join(map(str, numbers)), left=0, top=0, width=mask.shape[1],
                        height=mask.shape[0])


def write_json(run: People, labels: dict, path) -> str:
    path = path / 'project-1.json'
    path.write_text(json.dumps([task_of(run, name, brushes(label)) for name, label in labels.items()]))
    return str(path)


def write_min(run: People, labels: dict, path) -> str:
    path = path / 'min.json'
    path.write_text(json.dumps([min_of(task_of(run, name, brushes(label))) for name, label in labels.items()]))
    return str(path)


def write_xml(run: People, labels: dict, path) -> str:
    shapes = {name: [cvat_mask(CLASSES[c], label == c) for c in range(3) if (label == c).any()]
              for name, label in labels.items()}
    return archive(path / 'task.zip', {'annotations.xml': xml_of(shapes)})


def write_colours(run: People, labels: dict, path) -> str:
    lines = ['# label:color_rgb:parts:actions', 'background:0,0,0::'] + [
        f'{name}:{",".join(map(str, colour))}::' for name, colour in zip(CLASSES, COLOURS)]
    table = np.zeros((256, 3), np.uint8)
    table[:3] = COLOURS
    return archive(path / 'mask.zip', {'labelmap.txt': '\n'.join(lines), **{
        f'SegmentationClass/{name}.png': png(table[label]) for name, label in labels.items()}})


def write_folder(run: People, labels: dict, path) -> str:
    for name, label in labels.items():
        os.makedirs(osp.dirname(path / 'maps' / name), exist_ok=True)
        (path / 'maps' / f'{name}.png').write_bytes(png(label))
    return str(path / 'maps')


def write_zip(run: People, labels: dict, path) -> str:
    return archive(path / 'maps.zip', {f'mine/{name}.png': png(label) for name, label in labels.items()})


WRITERS = [write_json, write_min, write_xml, write_colours, write_folder, write_zip]


def take(run: People, path: str, check: bool = False) -> str:
    return al_label.take_file(run.state, path, check)


def files_in(folder: str) -> dict:
    return {path: path.read_bytes() for path in sorted(pathlib.Path(folder).rglob('*')) if path.is_file()}


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('write', WRITERS)
def test_an_export_is_in_the_inbox_and_the_run_accepts_it(people, truth, tmp_path, write):
    """Half of it first: what is missing is named. What lies elsewhere is kept aside."""
    run = people(CELL)
    masks = run.ask({'a/01': [0, 7], 'b/08': [3]})
    half = part(truth('a/01'), masks['a/01'] & (np.arange(48) < 8))
    half[30, 40] = 1
    before = files_in(run.state.work_dir)
    path = write(run, {'a/01': half}, tmp_path)
    text = take(run, path, check=True)
    assert files_in(run.state.work_dir) == before
    assert text.splitlines() == [
        '1 of the 3 regions that round 0 asks for are answered', 'Not yet: a/01 (region 7), b/08 (region 3)',
        'Outside what was asked for, kept aside: a/01 (1 pixels)',
        f'1 label maps would be new in {run.path("round_0", "labels")}']
    assert take(run, path).splitlines() == [*text.splitlines()[:-1], text.splitlines()[-1].replace('would be', 'are')]
    kept = files_in(run.state.work_dir)
    assert take(run, path).endswith('\nNothing is new') and files_in(run.state.work_dir) == kept
    assert np.array_equal(np.array(Image.open(run.inbox(0, 'a/01'))), half) and run.accept() == 'label'
    rest = {'a/01': part(truth('a/01'), masks['a/01'] & (np.arange(48) >= 8)), 'b/08': truth('b/08')}
    assert take(run, write(run, rest, tmp_path)).startswith('3 of the 3 regions that round 0 asks for are answered\n')
    assert run.accept() == 'train'
    assert all(np.array_equal(label, part(truth(name), masks[name])) for name, label in run.trained_on(0).items())
    masks = run.ask({'a/01': [2], 'b/08': [5]})
    text = take(run, write(run, {'b/08': part(truth('b/08'), masks['b/08'])}, tmp_path))
    assert text.startswith('1 of the 2 regions that round 1 asks for') and 'Outside' not in text  # as a/01 had before


@pytest.mark.parametrize('write', WRITERS)
def test_an_export_of_an_older_round_changes_nothing(people, truth, tmp_path, write):
    """One of Label Studio says so; of others, what was labelled just so before is passed over."""
    run = people(CELL)
    mask = run.ask({'a/01': [0]})['a/01']
    path = write(run, {'a/01': part(truth('a/01'), mask)}, tmp_path)
    take(run, path)
    run.accept()
    run.ask({'a/01': [7]})
    before = files_in(run.state.work_dir)
    if write in (write_json, write_min):
        with pytest.raises(ValueError, match='Of an older round than 1, passed over: a/01'):
            take(run, path)
    else:
        assert take(run, path).splitlines() == [
            '0 of the 1 regions that round 1 asks for are answered', 'Labelled just so before: a/01',
            'Not yet: a/01 (region 7)', 'Nothing is new']
    assert files_in(run.state.work_dir) == before


def rectangle(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros(tiny.SHAPE, bool)
    mask[top:bottom, left:right] = True
    return mask


PERCENT = np.array([100 / 48, 100 / 32])


@pytest.mark.parametrize('result, expected', [
    (region('polygonlabels', 'grey', points=(np.array([[4, 8], [12, 8], [12, 16], [4, 16]]) * PERCENT).tolist()),
     rectangle(8, 16, 4, 12)),
    (region('polygonlabels', 'grey', points=(np.array([[0, 0], [8, 0], [0, 8]]) * PERCENT).tolist()),
     np.add.outer(np.arange(32) + .5, np.arange(48) + .5) < 8),
    (region('rectanglelabels', 'grey', x=4 * 100 / 48, y=25., width=100 / 6, height=25.), rectangle(8, 16, 4, 12)),
    (region('rectanglelabels', 'grey', x=12 * 100 / 48, y=25., width=100 / 6, height=12.5, rotation=90),
     rectangle(8, 16, 8, 12)),
    (region('keypointlabels', 'grey', x=4.5 * 100 / 48, y=8.5 * 100 / 32, width=1.), rectangle(8, 9, 4, 5)),
    (region('brushlabels', 'grey', rle=brush(rectangle(1, 2, 3, 9))), rectangle(1, 2, 3, 9)),
    (dict(type='choices', value=dict(choices=['good'])), rectangle(0, 0, 0, 0))])
def test_regions_of_label_studio(people, result, expected):
    run = people()
    run.ask({'a/01': None})
    notes = al_label.collections.defaultdict(dict)
    [answer] = al_label.read_label_studio(run.state, [task_of(run, 'a/01', [result])], notes)
    assert answer.is_submitted and np.array_equal(answer.known, expected)
    assert (answer.classes == np.where(expected, 1, VOID)).all()


@pytest.mark.parametrize('shape, expected', [
    (('polygon', dict(points='4.00,8.00;12.00,8.00;12.00,16.00;4.00,16.00')), rectangle(8, 16, 4, 12)),
    (('box', dict(xtl=4, ytl=8, xbr=12, ybr=16)), rectangle(8, 16, 4, 12)),
    (('box', dict(xtl=4, ytl=10, xbr=12, ybr=14, rotation=90)), rectangle(8, 16, 6, 10)),
    (('mask', dict(rle='1, 2, 1', left=5, top=6, width=2, height=2)),
     rectangle(6, 7, 6, 7) | rectangle(7, 8, 5, 6)),
    (('points', dict(points='4.50,8.50;6.99,9.00')), rectangle(8, 9, 4, 5) | rectangle(9, 10, 6, 7)),
    (('tag', {}), rectangle(0, 0, 0, 0))])
def test_shapes_of_cvat(people, shape, expected):
    run = people()
    run.ask({'a/01': None})
    tag, attributes = shape
    xml = xml_of({'a/01': [(tag, dict(attributes, label='grey')), (
        'polygon', dict(label='asked', points='0,0;48,0;48,32;0,32', z_order=-1))]})
    [answer] = al_label.read_cvat(run.state, xml.encode())
    assert np.array_equal(answer.known, expected) and (answer.classes == np.where(expected, 1, VOID)).all()


def test_a_higher_shape_covers_a_lower_one(people):
    run = people()
    run.ask({'a/01': None})
    box = dict(xtl=0, ytl=0, xbr=48, ybr=32)
    shapes = [('box', dict(box, label=label, z_order=z)) for label, z in (('grey', 2), ('dark', 10), ('bright', 9))]
    xml = xml_of({'a/01': shapes})
    assert (al_label.read_cvat(run.state, xml.encode())[0].classes == 0).all()
    both = [region('brushlabels', label, rle=brush(np.ones(tiny.SHAPE, bool))) for label in ('bright', 'dark')]
    [answer] = al_label.read_label_studio(run.state, [task_of(run, 'a/01', both)], {})
    assert (answer.classes == 0).all()


def test_what_is_of_no_class_is_a_label(people, tmp_path):
    run = people(CELL, unlabelable=200)
    run.ask({'a/01': [0, 7]})
    task = task_of(run, 'a/01', [region('brushlabels', 'unlabelable', rle=brush(rectangle(0, 8, 0, 8)))])
    (tmp_path / 'one.json').write_text(json.dumps([task]))
    assert take(run, str(tmp_path / 'one.json')).startswith('1 of the 2 regions')
    assert (np.array(Image.open(run.inbox(0, 'a/01'))) == np.where(rectangle(0, 8, 0, 8), 200, 255)).all()


def test_what_is_told(people, tmp_path):
    """The newest of several annotators counts; cancelled, empty and unsubmitted tasks are named, and older rounds'."""
    run = people()
    run.ask(dict.fromkeys(['a/01', 'a/02', 'a/03', 'a/04', 'b/08']))
    full = {label: [region('brushlabels', label, rle=brush(np.ones(tiny.SHAPE, bool)))] for label in CLASSES}
    cancelled = task_of(run, 'a/02', full['dark'])
    cancelled['annotations'][0]['was_cancelled'] = True
    tasks = [task_of(run, 'a/01', full['dark'], full['grey']), cancelled, task_of(run, 'a/03', []),
             task_of(run, 'a/04')]
    tasks[0]['annotations'].reverse()
    (tmp_path / 'all.json').write_text(json.dumps(tasks))
    assert take(run, str(tmp_path / 'all.json')).splitlines() == [
        '1 of the 5 images that round 0 asks for are answered',
        'Not submitted: a/04', 'Labelled more than once, what was changed last counts: a/01',
        'Cancelled by an annotator: a/02', 'Nothing is labelled: a/03', 'Not yet: a/02, a/03, a/04, b/08',
        f'1 label maps are new in {run.path("round_0", "labels")}']
    assert (cv2.imread(run.inbox(0, 'a/01')) == 1).all()
    tasks = [task_of(run, 'a/01', full['bright']), task_of(run, 'a/05', full['dark'])]
    (tmp_path / 'all.json').write_text(json.dumps(tasks))
    assert take(run, str(tmp_path / 'all.json')).splitlines()[1:-1] == [
        'Another label than before, of which the newer counts: a/01 (1536 pixels)', 'Not yet: a/02, a/03, a/04, b/08',
        'Nobody asked for these images, they are kept aside: a/05']
    assert (cv2.imread(run.inbox(0, 'a/01')) == 2).all()


def test_predictions_that_somebody_submitted_are_answers_and_files_as_exported_are_none(people, truth, tmp_path):
    run = people(CELL)
    run.ask({'a/01': [0]})
    run.hand_in(run.inbox(0, 'a/01'), truth('a/01'))
    run.accept()
    run.ask({'a/03': [7]})
    os.makedirs(run.path('round_1', 'to_label', 'prediction', 'a'))
    al_label.write_prediction(run.state, 'a/03', truth('a/03'))
    al_label.note_exported(run.state, ['a/03'])
    files = al_label.cvat_files(run.state, ['a/03'], {})
    (tmp_path / 'cvat.zip').write_bytes(files['cvat.zip'])
    why = '.Just as it was exported, which is no answer .*: a/03.: give what was'
    for path in (str(tmp_path / 'cvat.zip'), run.path('round_1', 'to_label', 'prediction')):
        with pytest.raises(ValueError, match=f'holds no answer to what round 1 asks for {why}'):
            take(run, path)
    [task] = json.loads(al_label.label_studio_files(run.state, ['a/03'], {})['label_studio.json'])
    task['annotations'] = [dict(result=task['predictions'][0]['result'])]
    (tmp_path / 'one.json').write_text(json.dumps([task]))
    text = take(run, str(tmp_path / 'one.json'))
    assert text.startswith('1 of the 1 regions that round 1 asks for are answered, 1 of them exactly as predicted\n')
    assert run.accept() == 'train' and run.state.entry['unchanged'] == 1


# --- a round in shares -----------------------------------------------------------------------------------------------


def test_three_shares_on_other_machines(people, truth, tmp_path):
    """Each share holds its images; they come back in any order."""
    run = people(CELL)
    masks = run.ask({name: [i] for i, name in enumerate(tiny.NAMES[:7])})
    al_label.export(run.state)
    with pytest.raises(ValueError, match='^--part should be of at most 7 shares, .* but got 8$'):
        al_label.pack(run.state, 'png', (8, 8), False)
    seen = {}
    for i in (3, 1, 2):
        for tool in al_label.TOOLS:
            path = al_label.pack(run.state, tool, (i, 3), True)
            with zipfile.ZipFile(path) as file:
                names = [name[len('images/'):-len('.png')] for name in file.namelist() if name.startswith('images/')]
                assert names == tiny.NAMES[:7][i - 1::3]
                for name in names:
                    original = open(osp.join(run.root, 'img', 'train', f'{name}.png'), 'rb').read()
                    assert file.read(f'images/{name}.png') == original
                if tool == 'label-studio':
                    tasks = json.loads(file.read('label_studio.json'))
                    for task in tasks:
                        kind, content = task['data']['image'].split(',')
                        assert kind == 'data:image/png;base64'
                        assert base64.b64decode(content) == file.read(f'images/{task["data"]["name"]}.png')
                        task['annotations'] = [dict(result=brushes(part(truth(task['data']['name']), masks[
                            task['data']['name']])))]
                elif tool == 'png':
                    assert {*file.namelist()} == {'instructions.txt', *(f'{kind}/{name}.{end}' for name in names for
                                                  kind, end in (('images', 'png'), ('labels', 'png'), ('mask', 'png'),
                                                                ('overlay', 'jpg')))}
        (tmp_path / f'{i}.json').write_text(json.dumps(tasks))
        seen[i] = take(run, str(tmp_path / f'{i}.json')).splitlines()[0]
    assert [text.split(' ')[0] for text in seen.values()] == ['2', '5', '7'] and run.accept() == 'train'


def test_the_command(people, truth, tmp_path, capsys):
    run = people()
    run.ask({'a/01': None, 'a/02': None})
    al_label.main(['export', run.state.work_dir, '--to', 'label-studio', '--part', '2/2'])
    share = run.path('round_0', 'to_label', 'label-studio_2_of_2.zip')
    assert capsys.readouterr().out.endswith(f'What round 0 asks for is in {share}\n')
    path = write_json(run, {'a/02': truth('a/02')}, tmp_path)
    for options in ([], ['--check']):
        al_label.main(['import', run.state.work_dir, path, *options])
        assert '1 of the 2 images that round 0 asks for are answered\nNot yet: a/01\n' in capsys.readouterr().out
    for share in ('0/2', '3/2', '2', 'a/b', '-1/2'):
        with pytest.raises(SystemExit):
            al_label.main(['export', run.state.work_dir, f'--part={share}'])
        assert f'should be I/N with I from 1 to N, such as 2/3, but got {share!r}' in capsys.readouterr().err


@pytest.mark.parametrize('shape', ['image', 'region', 'superpixel', 'pixel'])
def test_what_is_asked_for_is_outlined(people, shape):
    """Regions and superpixels by their borders, pixels by circles, whole images not at all."""
    unit = dict(region=CELL, superpixel=dict(type='superpixel', n_segments=12, compactness=100.)).get(shape, shape)
    run = people(unit)
    mask = run.ask({'a/01': None if shape == 'image' else [3, 5]})['a/01']
    found = [drawing for drawing in al_label.drawings(run.state, 'a/01')]
    assert {drawing.label for drawing in found} == ({'asked'} if shape != 'image' else set())
    assert len(found) == (0 if shape == 'image' else 2)
    if shape in ('region', 'superpixel'):
        inside = np.zeros(tiny.SHAPE, np.uint8)
        for drawing in found:
            cv2.fillPoly(inside, [drawing.shape.astype(int)], 1)
        edge = cv2.dilate(mask.view(np.uint8), np.ones((3, 3))) - cv2.erode(mask.view(np.uint8), np.ones((3, 3)))
        assert ((inside == mask) | (edge > 0)).all()
    elif shape == 'pixel':
        for drawing, x in zip(found, (3, 5)):
            radius = np.hypot(*(drawing.shape - [x + .5, .5]).T)
            assert np.allclose(radius, 2.6)
    root = ET.fromstring(zipfile.ZipFile(io.BytesIO(al_label.cvat_files(run.state, ['a/01'], {})['cvat.zip'])).read(
        'annotations.xml'))
    assert len(root.findall('.//polygon')) == len(found)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def labelled_task(run: People, **data) -> dict:
    return task_of(run, 'a/01', [region('brushlabels', 'grey', rle=brush(np.ones(tiny.SHAPE, bool)))], **data)


def with_result(run: People, result: dict) -> list:
    return [task_of(run, 'a/01', [result])]


BOX = dict(label='grey', xtl=0, ytl=0, xbr=9, ybr=9)
WRONG = {  # what a file holds, from a run -> JSON, XML, files of a zip, or bytes; and what is said
    'a name that leads elsewhere': (lambda run: {'../a/01.png': png(np.zeros(tiny.SHAPE, np.uint8))},
                                    "names in a zip should stay below its root, but got '../a/01.png'"),
    'an absolute name': (lambda run: {'/a/01.png': b''}, "should stay below its root, but got '/a/01.png'"),
    'a zip bomb': (lambda run: {'a/01.png': bytes(2**27)}, 'a zip of labels should unpack to at most 200 times its si'),
    'a mask of another size': (lambda run: {'a/01.png': png(np.zeros((8, 8), np.uint8))},
                               r'a/01: labels should be of the size of the image, \(32, 48\), but are of \(8, 8\)'),
    'a brush of another size': (lambda run: with_result(run, region('brushlabels', 'grey', (8, 8), rle=brush(
        np.ones((8, 8), bool)))), r'a/01: labels should be of the size of the image, .* but are of \(8, 8\)'),
    'an image of another size': (lambda run: xml_of({'a/01': [('box', BOX)]}, (8, 8)), r'a/01: .* but are of \(8, 8\)'),
    'an unknown label': (lambda run: with_result(run, region(
        'polygonlabels', 'cow', points=[[0, 0], [9, 0], [9, 9]])),
                         "a/01: labels should be dark, grey, bright, but got 'cow'"),
    'two labels': (lambda run: with_result(run, dict(region('brushlabels', 'grey'), value=dict(
        brushlabels=['grey', 'dark']))), 'a region should have one label'),
    'an unknown form': (lambda run: with_result(run, region('ellipselabels', 'grey', x=1, y=1, radiusX=2, radiusY=2)),
                        'labels should be brushes, polygons, rectangles or points, but got ellipselabels'),
    'an unknown shape': (lambda run: xml_of({'a/01': [('cuboid', BOX)]}), 'masks, polygons, boxes or points, but got '),
    'an unknown image': (lambda run: xml_of({'b/99': [('box', BOX)]}),
                         "images should be of this run's data set, such as 'a/00', but got 'b/99.png'"),
    'a task of another project': (lambda run: [labelled_task(run, request='0123')], 'the task of a/01 should be of '
                                  "what this run asks for in round 1, but is of another run's round 1"),
    'a task of the future': (lambda run: [labelled_task(run, round=7)], "but is of another run's round 7"),
    'an older round': (lambda run: [labelled_task(run, round=0)], 'Of an older round than 1, passed over: a/01'),
    'RLE that ends': (lambda run: with_result(run, region('brushlabels', 'grey', rle=brush(
        np.ones(tiny.SHAPE, bool))[:-9])), 'its RLE ends too early'),
    'RLE that is none': (lambda run: with_result(run, region('brushlabels', 'grey', rle=[300, -1])), 'OverflowError'),
    'RLE of CVAT that ends': (lambda run: xml_of({'a/01': [('mask', dict(
        label='grey', rle='1, 2', left=0, top=0, width=2, height=2))]}), 'a mask should have 2 x 2 pixels inside'),
    'a mask outside': (lambda run: xml_of({'a/01': [('mask', dict(
        label='grey', rle='0, 4', left=47, top=0, width=2, height=2))]}), 'a mask should have 2 x 2 pixels inside'),
    'empty': (lambda run: [task_of(run, 'a/01', [])], 'Nothing is labelled: a/01'),
    'not submitted': (lambda run: [task_of(run, 'a/01')], 'Not submitted: a/01'),
    'cancelled': (lambda run: [dict(labelled_task(run), annotations=[dict(result=[], was_cancelled=True)])],
                  'Cancelled by an annotator: a/01'),
    'an untouched export': (lambda run: json.loads(al_label.label_studio_files(
        run.state, ['a/01'], {})['label_studio.json']), 'Not submitted: a/01'),
    'another JSON': (lambda run: dict(a=1), 'a JSON should be an export of Label Studio, a list of tasks'),
    'no JSON': (lambda run: b'{', 'JSONDecodeError'),
    'another XML': (lambda run: '<html/>', "should be of 'CVAT for images 1.1', but its root is 'html'"),
    'entities': (lambda run: '<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', 'should have no declarations'),
    'no labels at all': (lambda run: {'readme.txt': b'hello'}, 'it should be a JSON or .*, but holds readme.txt'),
    'a colour of no label': (lambda run: {
        'labelmap.txt': 'background:0,0,0::\ngrey:90,90,90::\n',
        'SegmentationClass/a/01.png': png(np.full((*tiny.SHAPE, 3), 7, np.uint8))},
        r'should have the colours of its labelmap.txt, but got \(7, 7, 7\)'),
    'a value that is no class': (lambda run: {'a/01.png': png(np.full(tiny.SHAPE, 9, np.uint8))},
                                 'labels should be below 3, .* but got 9'),
    'a picture that is none': (lambda run: {'a/01.png': b'\x89PNG'}, 'UnidentifiedImageError'),
    'what people are given': (lambda run: {'to_label.txt': 'a/01', 'mask/a/01.png': png(np.ones(tiny.SHAPE, bool))},
                              'that is what people are given: import the folder in which they have labelled')}


@pytest.mark.parametrize('what', WRONG)
def test_what_is_wrong_is_told_in_a_line_and_changes_nothing(people, tmp_path, truth, what):
    """With a right image beside it, which is not taken either."""
    make, why = WRONG[what]
    run = people()
    run.ask({'a/00': None})
    run.hand_in(run.inbox(0, 'a/00'), truth('a/00'))
    run.accept()
    run.ask({'a/01': None, 'a/02': None})
    given, path = make(run), tmp_path / 'given.json'
    if isinstance(given, dict) and not {'a'} == {*given}:
        path = archive(tmp_path / 'given.zip', given)
    elif isinstance(given, str):
        path = tmp_path / 'annotations.xml'
        path.write_text(given)
    else:
        path.write_bytes(given if isinstance(given, bytes) else json.dumps(given).encode())
    before = files_in(run.state.work_dir)
    for check in (True, False):
        with pytest.raises(ValueError, match=why) as error:
            take(run, str(path), check)
        assert '\n' not in str(error.value) and str(path) in str(error.value)
    assert files_in(run.state.work_dir) == before


def test_one_wrong_image_keeps_all_out(people, tmp_path, truth):
    run = people()
    run.ask({'a/01': None, 'a/02': None})
    tasks = [task_of(run, 'a/02', brushes(truth('a/02'))), *with_result(run, region('brushlabels', 'cow', rle=[]))]
    (tmp_path / 'both.json').write_text(json.dumps(tasks))
    with pytest.raises(ValueError, match='RLE ends too early'):
        take(run, str(tmp_path / 'both.json'))
    assert not osp.exists(run.path('round_0', 'labels'))


def test_a_file_that_is_not_there(people):
    run = people()
    run.ask({'a/01': None})
    with pytest.raises(ValueError, match='nowhere.json cannot be used .there is no such file.'):
        take(run, '/nowhere.json')


def test_label_files_in_colours(people, truth, tmp_path):
    """A data set whose steps turn the colours of its palette into classes gets such a file."""
    from test_labels import ColoursToClasses
    run = people(CELL, [tiny.PLAIN[0], tiny.PLAIN[1], dict(type='ColoursToClasses'), tiny.PLAIN[2]])
    mask = run.ask({'a/01': [0]})['a/01']
    take(run, write_json(run, {'a/01': part(truth('a/01'), mask)}, tmp_path))
    colours = np.array(Image.open(run.inbox(0, 'a/01')))
    assert (colours[mask] == np.array(ColoursToClasses.COLOURS)[truth('a/01')[mask]]).all()
    assert run.accept() == 'train'
    assert np.array_equal(run.trained_on(0)['a/01'], part(truth('a/01'), mask))


def test_a_run_that_trains_is_no_hindrance(people, truth, tmp_path):
    """Its lock is its own; two that import at once wait for each other."""
    run = people()
    run.ask({'a/01': None, 'a/02': None})
    paths = [write(run, {name: truth(name)}, tmp_path) for write, name in ((write_json, 'a/01'), (write_xml, 'a/02'))]
    with al_patch.only_run(types.SimpleNamespace(work_dir=run.state.work_dir, logger=run.runner.logger)):
        threads = [threading.Thread(target=take, args=(run, path)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert run.accept() == 'train'
