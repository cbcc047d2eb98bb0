"""Class probabilities of every kind of head and segmentor, against what mmseg's own prediction makes of them."""
import shutil
import types

import cv2
import mmengine
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from mmseg.models.decode_heads import Mask2FormerHead, MaskFormerHead
from mmseg.models.decode_heads.san_head import SideAdapterCLIPHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from al_patch import Network, Pool, State, generator, to_image

SIZE, ORIGINAL = (24, 40), (36, 60)  # of the network's input, and of the image file


class ClassifiesMasks:
    """A stand-in for what gives five masks and their classes; what is made of them is the real head's."""

    def __init__(self, num_classes: int = 3, **kwargs):
        BaseModule.__init__(self)
        self.num_classes = self.out_channels = num_classes
        self.align_corners, self.threshold = False, None
        self.masks, self.classes = torch.nn.Conv2d(8, 5, 1), torch.nn.Linear(8, 5 * (num_classes + 1))

    def forward(self, x, _):
        if len(x) == 3:  # of SAN: images, visual features, and embeddings of the classes
            x = (x[1][0] + x[2][:, :, None, None], )
        masks, classes = self.masks(x[0]), self.classes(x[0].mean((2, 3))).unflatten(1, (5, -1))
        pairs = (masks, classes) if isinstance(self, SideAdapterCLIPHead) else (classes, masks)
        return tuple([torch.zeros_like(each), each] for each in pairs)  # of two layers, of which the last counts


for name, head in dict(TinyMaskFormer=MaskFormerHead, TinyMask2Former=Mask2FormerHead,
                       TinySAN=SideAdapterCLIPHead).items():
    MODELS.register_module(module=type(name, (ClassifiesMasks, head), {}))


@MODELS.register_module()
class TinyText(BaseModule):
    """Embeddings of the classes, all in one."""

    def forward(self):
        return torch.linspace(-1, 1, 8)[None]


BASE = dict(in_channels=8, channels=8, num_classes=3)
FCN = dict(type='FCNHead', num_convs=1, concat_input=False, **BASE)
SIGMOID = dict(type='CrossEntropyLoss', use_sigmoid=True)
MULTIMODAL = dict(type='MultimodalEncoderDecoder', image_encoder=dict(type='TinyBackbone'),
                  text_encoder=dict(type='TinyText'), decode_head=dict(type='TinySAN'))
POINTS = dict(subdivision_steps=2, subdivision_num_points=40, scale_factor=2)
FPN = dict(in_channels=[8], in_index=[0], channels=8, num_classes=3)
HEADS = dict(
    softmax=FCN, align_corners={**FCN, 'align_corners': True},
    sigmoid={**FCN, 'num_classes': 2, 'out_channels': 1, 'loss_decode': SIGMOID},
    sigmoid_of_one_class={**FCN, 'num_classes': 1, 'loss_decode': SIGMOID},
    ocrnet=[FCN, dict(type='OCRHead', ocr_channels=4, norm_cfg=dict(type='BN'), **BASE)],
    pointrend=[dict(type='FPNHead', feature_strides=[4], **FPN), dict(type='PointHead', num_fcs=1, **FPN)],
    maskformer=dict(type='TinyMaskFormer'), mask2former=dict(type='TinyMask2Former'),
    multimodal=dict(asymetric_input=False, **MULTIMODAL),
    multimodal_asymmetric=dict(asymetric_input=True, encoder_resolution=.5, **MULTIMODAL))


def model_of(make_cfg, which: str, **test_cfg):
    torch.manual_seed(0)
    cfg, head = make_cfg().model, HEADS[which]
    if 'text_encoder' in head:
        cfg = Config(dict(model=dict(data_preprocessor=cfg.data_preprocessor, **head))).model
    else:
        cfg.update(decode_head=head, **dict(type='CascadeEncoderDecoder', num_stages=2) if type(head) is list else {})
    cfg.test_cfg = dict(**POINTS, **test_cfg)
    model = MODELS.build(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=.5)
    return model.eval()


def batch() -> dict:
    """Three images, the second flipped."""
    images = 255 * torch.rand(3, 3, *SIZE, generator=generator('images'))
    flips = [{}, dict(flip=True, flip_direction='horizontal'), {}]
    return dict(inputs=list(images.byte()), data_samples=[
        SegDataSample(metainfo=dict(img_shape=SIZE, ori_shape=ORIGINAL, **flip)) for flip in flips])


WHOLE, SLIDE = dict(mode='whole'), dict(mode='slide', crop_size=(24, 24), stride=(16, 16))


# what mmseg itself cannot do: it crops the padding off masks that have none, or are as large as a padded image
CASES = [(which, padded, test_cfg) for which in HEADS for padded in (False, True) for test_cfg in (WHOLE, SLIDE)
         if not (padded and (which == 'maskformer' or which == 'mask2former' and test_cfg is SLIDE))]


@pytest.mark.parametrize('which, padded, test_cfg', CASES, ids=lambda v: v['mode'] if isinstance(v, dict) else str(v))
@torch.no_grad()
def test_probabilities_are_those_of_mmsegs_prediction(make_cfg, which, padded, test_cfg):
    model = model_of(make_cfg, which, **test_cfg)
    if padded:
        model.data_preprocessor.test_cfg = dict(size_divisor=32)
    samples = model.test_step(batch())
    network = Network(types.SimpleNamespace(model=model))
    for sample, seen in zip(samples, network.see(batch(), [0] * 3, [to_image])):
        logits, probs = sample.seg_logits.data.double(), seen.means[0]['probs_NCHW'][0]
        if which.startswith('sigmoid'):  # mmseg has taken the sigmoid already
            expected = torch.cat([1 - logits, logits])
        elif which.startswith('m'):
            assert (logits >= 0).all()
            expected = logits / logits.sum(0)
        else:
            expected = logits.softmax(0)
        assert probs.shape == (max(2, model.out_channels), *ORIGINAL) and expected.std(0).mean() > .01
        torch.testing.assert_close(probs.double(), expected, rtol=1e-3, atol=1e-5)
        assert (network.classify(seen) == sample.pred_sem_seg.data[0].numpy()).mean() > .999  # but for ties


BINARY = dict(sigmoid=dict(num_classes=2, out_channels=1), sigmoid_of_one_class=dict(num_classes=1))


@pytest.fixture
def binary(make_cfg, shared_data, tmp_path):
    """A function from a head's settings and an `al` block to a config for two classes, with labels 0 and 1."""

    def make(al: dict, head: dict, work_dir: str = 'work') -> Config:
        root = shutil.copytree(shared_data, tmp_path / work_dir / 'data')
        for path in root.glob('ann/**/*.png'):
            cv2.imwrite(str(path), (cv2.imread(str(path), 0) > 0).astype('uint8'))
        cfg = make_cfg(al, root=str(root), work_dir=str(tmp_path / work_dir))
        cfg.model.decode_head.update(loss_decode=SIGMOID, threshold=.9, **head)
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.metainfo = dict(classes=('dark', 'bright'), palette=[[0, 0, 0], [200, 200, 200]])
        return cfg

    return make


@pytest.mark.parametrize('unit', ['image', 'region', 'pixel'])
@pytest.mark.parametrize('head', BINARY.values(), ids=BINARY)
def test_a_run_with_one_output(binary, train, head, unit):
    """Below image level, mmseg's loss fails on a batch without labels, and is spared it."""
    _, rounds = train(binary(dict(strategy='margin', unit=unit, initial=4, budget=2), head))
    assert [entry['spent'][f'{unit}s'] for entry in rounds] == [4, 6]


@torch.no_grad()
def test_classes_are_those_that_mmseg_predicts_above_the_threshold(binary, build):
    runner = build(binary({}, BINARY['sigmoid']))
    torch.nn.init.normal_(runner.model.decode_head.conv_seg.weight, std=30)
    pool, network = Pool(runner.cfg), Network(runner)
    state = State(dict(seed=0, config={}), runner.work_dir, runner=runner, pool=pool)
    [(name, seen)] = network.look(state, tiny.NAMES[:1], [to_image])
    [sample] = runner.model.eval().test_step(mmengine.dataset.pseudo_collate([pool[name]]))
    expected = sample.pred_sem_seg.data[0].numpy()
    assert set(np.unique(expected)) == {0, 1} and (sample.seg_logits.data[0].numpy() > .5).sum() > expected.sum()
    assert (network.classify(seen) == expected).all()
