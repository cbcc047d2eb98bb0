"""Annotation tools: what their exports come to, as label maps in the inbox, and what is shown in them."""
import base64
import io
import itertools
import json
import os
import os.path as osp
import pathlib
import xml.etree.ElementTree as ET
import zipfile

import cv2
import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import VOID, People, part

import al_label

CELL = dict(type='region', size=[8, 8])  # 6 in a row: number 7 is rows 8 to 15 and columns 8 to 15
CLASSES = ['dark', 'grey', 'bright']
COLOURS = [(0, 0, 1), (90, 90, 90), (200, 200, 200)]


def brush(mask: np.ndarray) -> list:
    """A mask as Label Studio's RLE, without any run: one value after another, in blocks of up to 8."""
    values = mask.reshape(-1).repeat(4).astype(int) * 255
    bits = f'{values.size:032b}{7:05b}' + ''.join(f'{n - 1:04b}' for n in (3, 4, 8, 16))
    for block in np.split(values, range(8, values.size, 8)):
        bits += f'000{len(block) - 1:03b}' + ''.join(f'{value:08b}' for value in block)
    return [int(bits[i:i + 8].ljust(8, '0'), 2) for i in range(0, len(bits), 8)]


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
    [answer] = al_label.read_cvat(run.state, xml.encode(), {})
    assert np.array_equal(answer.known, expected) and (answer.classes == np.where(expected, 1, VOID)).all()


def test_a_higher_shape_covers_a_lower_one(people):
    run = people()
    run.ask({'a/01': None})
    box = dict(xtl=0, ytl=0, xbr=48, ybr=32)
    shapes = [('box', dict(box, label=label, z_order=z)) for label, z in (('grey', 2), ('dark', 10), ('bright', 9))]
    xml = xml_of({'a/01': shapes})
    assert (al_label.read_cvat(run.state, xml.encode(), {})[0].classes == 0).all()
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
    why = '.Just as it was exported, which is no answer .*: a/03.$'
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
