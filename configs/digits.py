"""A small segmentation data set that needs no download: handwritten digits in cluttered 48x48 scenes.

The scenes are drawn on first use, in about a second, from the 1,797 handwritten digits that ship with scikit-learn.
Training and validation scenes share no handwritten digit. As in much real data, half of the training scenes are quiet,
with at most two digits, nearly all zeros, ones and twos, and half are busy, with two to four digits of any class. So
it matters which images are labelled. All validation scenes are busy: every class counts the same there.
"""
import os
import os.path as osp
import tempfile
from typing import Dict, List, Tuple

import cv2
import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

SIZE = 48  # of a scene, in pixels
SCENES = dict(train=400, val=100)
BUSY = dict(train=.5, val=1.0)  # share of busy scenes
QUIET_CLASSES = np.array([.32, .32, .32] + [.04 / 7] * 7)  # how often each digit is drawn in a quiet scene


@DATASETS.register_module()
class DigitsDataset(BaseSegDataset):
    """Background and the digits zero to nine; drawn into ``data_root`` if that is missing."""
    METAINFO = dict(
        classes=('background', 'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine'),
        palette=[[0, 0, 0], [51, 34, 136], [136, 204, 238], [68, 170, 153], [17, 119, 51], [153, 153, 51],
                 [221, 204, 119], [204, 102, 119], [136, 34, 85], [170, 68, 153], [221, 221, 221]])

    def __init__(self, img_suffix: str = '.png', seg_map_suffix: str = '.png', **kwargs) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)

    def load_data_list(self) -> List[dict]:
        """Draw the scenes if nobody has, then list them as usual."""
        if not osp.isdir(self.data_root):
            generate(self.data_root)
        return super().load_data_list()


def generate(root: str, seed: int = 0) -> None:
    """Draw all scenes into ``root``, which appears at once and complete, also where several processes start together.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError('DigitsDataset draws its scenes from the handwritten digits in scikit-learn, which is not '
                          'installed: pip install scikit-learn') from e
    root = osp.abspath(root)
    os.makedirs(osp.dirname(root), exist_ok=True)
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    with tempfile.TemporaryDirectory(prefix='.digits-', dir=osp.dirname(root)) as folder:
        for split, chosen in dict(train=order[:1300], val=order[1300:]).items():
            glyphs = {c: images[[i for i in chosen if labels[i] == c]].reshape(-1, 8, 8) / 16 for c in range(10)}
            for kind in ('img', 'ann'):
                os.makedirs(osp.join(folder, 'digits', kind, split))
            for number in range(SCENES[split]):
                scene = draw_scene(glyphs, rng.random() < BUSY[split], rng)
                for kind, array in zip(('img', 'ann'), scene):
                    cv2.imwrite(osp.join(folder, 'digits', kind, split, f'{number:04d}.png'), array)
        try:
            os.rename(osp.join(folder, 'digits'), root)
        except OSError:  # another process was faster; its scenes are the same, and ours go with the folder
            if not osp.isdir(root):
                raise


def draw_scene(glyphs: Dict[int, np.ndarray], busy: bool, rng: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
    """One scene: textured ground, strokes that are no digits, digits, noise.

    Args:
        glyphs: The handwritten digits of each class, (n, 8, 8), ink from 0 to 1.
        busy: Two to four digits of any class, instead of at most two, mostly of the three frequent ones.
        rng: Makes every choice.

    Returns:
        The image (BGR) and its label map, both uint8.
    """
    ground = rng.uniform(50, 110)
    texture = cv2.resize(rng.normal(0, rng.uniform(2, 10), (6, 6, 3)), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    image, label = ground + texture, np.zeros((SIZE, SIZE), np.uint8)

    def ink() -> np.ndarray:
        return rng.uniform(90, 130) + rng.normal(0, 6, 3)

    for _ in range(rng.integers(0, 3)):
        stroke = np.zeros((SIZE, SIZE))
        points = rng.integers(0, SIZE, 2) + rng.integers(-10, 11, (3, 2))
        cv2.polylines(stroke, [points.astype(np.int32)], bool(rng.random() < .3), 1., int(rng.integers(1, 4)))
        image += cv2.GaussianBlur(stroke, (3, 3), 0)[..., None] * ink() * .6
    for _ in range(rng.integers(2, 5) if busy else rng.integers(0, 3)):
        digit = int(rng.choice(10, p=None if busy else QUIET_CLASSES))
        side = int(rng.integers(20, 25))
        glyph = cv2.resize(rng.choice(glyphs[digit]), (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
        for _ in range(20):  # look for a free place; a digit that finds none is left out
            y, x = rng.integers(0, SIZE - side + 1, 2)
            window = slice(y, y + side), slice(x, x + side)
            if not label[window][glyph > .4].any():
                image[window] += glyph[..., None] * ink()
                label[window][glyph > .4] = digit + 1
                break
    image += rng.normal(0, rng.uniform(2, 6), image.shape)
    return image.clip(0, 255).astype(np.uint8), label
