"""What people are given when a run asks for labels, in ``round_<k>/to_label``: what to label, as masks and as pictures,
label maps to start from, and the same for CVAT and Label Studio.

Beside ``al_patch.py`` it attaches itself to every run. What failed then, or was deleted since, is written again by

    python al_label.py export WORK_DIR
"""
from __future__ import annotations

import argparse
import copy
import functools
import glob
import itertools
import json
import os
import os.path as osp
import pathlib
import zipfile
from typing import TYPE_CHECKING
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from al_patch import Pool, State

# ---------------------------------------------------------------------------------------------------------------------
# When: as a round asks, or on demand
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def hook() -> Hook:
    """The hook that exports when a round asks. A run that is resumed while it waits asks again: then only what was not
    finished is exported."""
    import mmengine.hooks

    import al_patch

    class LabelHook(mmengine.hooks.Hook):

        def after_al_ask(self, state: State, trainer: Runner | None) -> None:
            if state.phase == 'label' and not al_patch.on_all_ranks(lambda _: is_finished(state), ['rank 0'])['rank 0']:
                export(state, trainer)

    return LabelHook()


def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(prog='al_label.py', description='What a run of active learning gives to people')
    command = parser.add_subparsers(required=True).add_parser(
        'export', help='write again what a run that waits for labels asks for, in round_<k>/to_label')
    command.add_argument('work_dir', metavar='WORK_DIR')
    work_dir = parser.parse_args(argv).work_dir
    import al_patch
    try:
        state = waiting_run(work_dir)
        with al_patch.checkpoints_are_data():
            export(state)
    except Exception as error:
        command.exit(2, f'al_label.py export: {" ".join(str(error).split()) or repr(error)}\n')
    print(f'What round {state.round} asks for is in {folder_of(state)}')


def waiting_run(work_dir: str) -> State:
    """The run in a directory, as resuming would open it.

    Raises:
        ValueError: It does not wait for labels, or there is no config; or what resuming would raise.
    """
    from mmengine.config import Config
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    import al_patch
    content = al_patch.read_state(osp.join(work_dir, al_patch.STATE_FILE))
    if content['phase'] != 'label':
        raise ValueError(f'the run in {work_dir} does not wait for labels')
    configs = glob.glob(osp.join(glob.escape(work_dir), '*.py'))
    if not configs:
        raise ValueError(f'{work_dir} does not hold the config, a .py file, that mmengine writes there')
    cfg = Config.fromfile(max(configs, key=osp.getmtime))
    cfg.update(work_dir=work_dir, resume=True, launcher='none')
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    al_patch.attach_companions(runner)  # keys of the `al` block may be theirs
    al, pool = al_patch.parse_settings(cfg.al), al_patch.Pool(cfg)
    al_patch.check_resume(content, al, pool)
    return al_patch.State(content, runner.work_dir, al, runner, pool)


# ---------------------------------------------------------------------------------------------------------------------
# What: masks, pictures, label maps to start from
# ---------------------------------------------------------------------------------------------------------------------


def export(state: State, trainer: Runner | None = None) -> None:
    """Write what the newest round asks for. All ranks share the images; ``to_label.txt`` comes last, so that an export
    is finished if it is there. Writing it again replaces each file by the same, and leaves an annotator's alone.

    Args:
        trainer: The runner whose model asked. Without it, it is built as it was.
    """
    import al_patch
    folder = folder_of(state)
    folder.mkdir(parents=True, exist_ok=True)
    if state.counts_pixels:
        al_patch.on_all_ranks(lambda name: write_mask(state, name), list(state.entry['asked']))
    if state.round:  # before round 0 there is no model
        write_predictions(state, trainer)
    if al_patch.is_main_process():
        export_cvat(state)
        export_label_studio(state)
        al_patch.write_atomically(folder / 'to_label.txt', split_file(state))


def is_finished(state: State) -> bool:
    """Whether an earlier start of the run has written all of the export."""
    path = folder_of(state) / 'to_label.txt'
    return state.is_resumed and path.is_file() and path.read_bytes() == split_file(state).encode()


def split_file(state: State) -> str:
    return ''.join(f'{name}\n' for name in state.entry['asked'])


def folder_of(state: State) -> pathlib.Path:
    return pathlib.Path(state.folder(), 'to_label')


def png_path(state: State, kind: str, name: str) -> str:
    """Where an image has its PNG: ``mask``, ``overlay`` or ``prediction``."""
    import al_patch
    return al_patch.png_path(folder_of(state) / kind, name, state.work_dir)


def write_mask(state: State, name: str) -> None:
    """Write what is asked for of an image, as a mask and as a picture."""
    import mmcv

    import al_patch
    mask, image = state.asked_mask(name), state.pool.load_image(name)
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


def write_predictions(state: State, trainer: Runner | None) -> None:
    """Write label maps to start from, with what the checkpoint that asked for the round predicts."""
    import torch

    import al_patch
    past = copy.copy(state)
    past.rounds = state.rounds[:-1]
    past.runner = trainer or type(state.runner).from_cfg(al_patch.round_config(past))  # a round may override the model

    @torch.no_grad()
    def write_share(rank: str) -> None:
        al_patch.load_weights(past, past.checkpoint(past.round, state.al.query_with))
        network = al_patch.Network(past.runner)
        for name, seen in network.look(state, list(state.entry['asked']), [al_patch.to_image]):
            write_prediction(state, name, network.classify(seen))

    # one call on each rank, which waits for no other: whatever fails in it, nobody hangs
    al_patch.on_all_ranks(write_share, [str(rank) for rank in range(al_patch.get_dist_info()[1])])
    if not trainer:
        al_patch.close_round(past.runner)


def write_prediction(state: State, name: str, pred_HW: np.ndarray) -> None:
    """Write a label map to start from: the prediction where labels are asked for, what was labelled before, and nothing
    elsewhere."""
    pool, old = state.pool, state.mask(name, state.round - 1)
    label = np.where(state.asked_mask(name), pred_HW, pool.ignore_index)
    if old.any():
        label[old] = pool.load_label(name)[old]
    write_label(png_path(state, 'prediction', name), pool, name, label.astype(np.uint8))


def write_label(path: str, pool: Pool, name: str, label_HW: np.ndarray) -> None:
    """Write a label map, (H, W) uint8, in the values of an image's label file and the colours of its classes."""
    import al_patch
    values, colours, palette = label_values(pool, name)[1], class_colours(pool)[1], np.zeros((256, 3), np.uint8)
    palette[values[:len(colours)]] = colours
    al_patch.write_png(path, values[label_HW], palette)


def read_label(path: str, pool: Pool, name: str) -> np.ndarray:
    """The classes of a label map that ``write_label`` wrote, (H, W) uint8; 255 everywhere if there is none."""
    if not osp.isfile(path):
        return np.full(pool.sizes[name], 255, np.uint8)
    with Image.open(path) as image:
        return label_values(pool, name)[0][np.asarray(image)]


def label_values(pool: Pool, name: str) -> tuple[np.ndarray, np.ndarray]:
    """How mmseg reads an image's label file, with ``reduce_zero_label`` and classes of one's own: the class of each
    value in the file, and the value of each class, (256,) both. ``ignore_index`` counts as a class."""
    info, ignore = pool.info(name), pool.ignore_index
    classes, own = np.r_[255, :254, 255] if info.get('reduce_zero_label') else np.r_[:256], info.get('label_map') or {}
    classes = np.array([own.get(c, c) for c in classes.tolist()]).astype(np.uint8)
    values = np.full(256, ignore, np.uint8)
    known, values_of_known = np.unique(classes, return_index=True)  # the smallest, where several stand for one class
    values[known] = values_of_known
    if classes[255] == ignore:
        values[ignore] = 255
    return classes, values


# ---------------------------------------------------------------------------------------------------------------------
# The formats of annotation tools
# ---------------------------------------------------------------------------------------------------------------------


def class_colours(pool: Pool) -> tuple[list[str], np.ndarray]:
    """The classes, and their colours in the data set's palette, (C, 3) uint8. Annotation tools tell classes by colour,
    and black is none of them: a colour that is taken (ADE20K has one twice) gives way to the next."""
    meta, taken = pool.leaves[0].metainfo, dict.fromkeys([0])
    classes = list(meta.get('classes') or map(str, range(255)))
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


def export_cvat(state: State) -> None:
    """Write ``cvat.zip``, label maps to start from in the layout of CVAT's 'Segmentation mask 1.1': one colour a class,
    one object a class. ``cvat_labels.json`` is for CVAT's raw label constructor."""
    import al_patch
    folder, pool, names = folder_of(state), state.pool, state.entry['asked']
    classes, colours = class_colours(pool)
    labels = [dict(name=c, color=f'#{bytes(colour).hex()}', attributes=[]) for c, colour in zip(classes, colours)]
    al_patch.write_atomically(folder / 'cvat_labels.json', json.dumps(labels, ensure_ascii=False))
    nothing, colours = 'unlabelled' if 'background' in classes else 'background', np.insert(colours, 0, 0, 0)  # CVAT's
    lines = [f'{label}:{r},{g},{b}::\n' for label, (r, g, b) in zip([nothing, *classes], colours)]
    with zipfile.ZipFile(folder / 'cvat.zip.tmp', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('labelmap.txt', ''.join(['# label:color_rgb:parts:actions\n', *lines]))
        archive.writestr('ImageSets/Segmentation/default.txt', ''.join(f'{image_stem(pool, name)}\n' for name in names))
        for name in names:
            label = read_label(png_path(state, 'prediction', name), pool, name)
            label = np.where(label < len(classes), label + 1, 0)
            for kind, table in dict(SegmentationClass=colours, SegmentationObject=voc_colours()).items():
                png = cv2.imencode('.png', table[label][..., ::-1])[1]
                archive.writestr(f'{kind}/{image_stem(pool, name)}.png', png.tobytes())
    os.replace(folder / 'cvat.zip.tmp', folder / 'cvat.zip')


def image_stem(pool: Pool, name: str) -> str:
    """An image's path below ``img_path`` without its extension, by which CVAT knows it; a name lacks ``img_suffix``."""
    suffix = getattr(pool.leaf_of(name)[0], 'img_suffix', None)
    return osp.splitext(name + suffix)[0] if suffix else name


def export_label_studio(state: State) -> None:
    """Write ``label_studio.json``, tasks with label maps to start from, one brush region a class, and
    ``label_studio.xml``, the labelling interface that they are for. Images are local files below the root ``/``."""
    import al_patch
    folder, pool, tasks = folder_of(state), state.pool, []
    classes, colours = class_colours(pool)
    for name in state.entry['asked']:
        label = read_label(png_path(state, 'prediction', name), pool, name)
        brushes = [dict(id=f'class_{c}', type='brushlabels', from_name='label', to_name='image', image_rotation=0,
                        original_width=label.shape[1], original_height=label.shape[0],
                        value=dict(format='rle', rle=encode_rle(label == c), brushlabels=[classes[c]]))
                   for c in np.unique(label).tolist() if c < len(classes)]
        url = '/data/local-files/?d=' + quote(osp.abspath(pool.info(name)['img_path']).lstrip(os.sep))
        tasks.append(json.dumps(dict(data=dict(image=url, name=name), predictions=[
            dict(model_version=f'round_{state.round}', result=brushes)] if brushes else []), ensure_ascii=False))
    al_patch.write_atomically(folder / 'label_studio.json', '[' + ',\n'.join(tasks) + ']\n')
    labels = ''.join(f'    <Label value={quoteattr(c)} background="#{bytes(colour).hex()}"/>\n'
                     for c, colour in zip(classes, colours))
    al_patch.write_atomically(folder / 'label_studio.xml', (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n  <BrushLabels name="label" toName="image">\n'
        f'{labels}  </BrushLabels>\n</View>\n'))


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


if __name__ == '__main__':
    main()
