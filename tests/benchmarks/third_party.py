"""Public projects that build on mmseg, each with its own code, on tiny data in its own format: does `al` work there?

    python tests/benchmarks/third_party.py SNAPSHOTS [PROJECT ...] [-o third_party.jsonl]     # all: five minutes

Nothing is fetched. SNAPSHOTS is a folder of what you have fetched: open-cd, mmrgbx, sea-ice-mmseg, mmseg-satellite,
KTDA, mmseg-kd, ForestSim, Rein and Cloud-Adapter; `mmseg` is the installed package. What matters of a project (data
set, steps of the pipeline, segmentor, heads, hooks) is imported from there; where a package is missing that the project
imports, a stand-in takes its place, which the table names. Each project trains without `al`, with it at the image unit,
and at the region unit, each in a process of its own: two rounds of four iterations on the CPU. An outcome is

- `runs`: it ended well, and the state has two rounds;
- `refused`: a ValueError of one line, before any checkpoint was written;
- `fails`: all else, with the message, and whether that was after a training;
- `not run`: the project's own code cannot be imported, built or trained here.

What is refused is tried again with `strategy='random'`, which never runs the model. At the region unit it also notes
how much of each label map that training saw had a label: `gt_sem_seg 0.3`. A map that shows more than the others shows
labels that nobody has given yet. Results go to a file of JSON lines as they come; what is in it is not run again.
"""
import argparse
import glob
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import os.path as osp
import subprocess
import sys
import tempfile
import traceback
import types

import cv2
import numpy as np

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
SIDE, CELL = 64, 8
SPLITS = dict(train=8, val=4)
AL = dict(image=dict(initial=3, budget=2, rounds=1, strategy='entropy'),
          region=dict(initial=20, budget=20, rounds=1, strategy='entropy', unit=dict(type='region', size=[16, 16])))
AL.update({f'{mode}, random': dict(block, strategy='random') for mode, block in AL.items()})
CASES = {}  # for each project the function that makes its config, the folder of its snapshot, and what it needs


def case(name: str, folder: str, needed: str = 'nothing', fork: bool = False, missing: tuple = (),
         before=lambda: None):
    """Note a project.

    Args:
        needed: What its `al` block or config needed beside the defaults.
        fork: Whether it is an mmseg itself, to be imported in place of the installed one.
        missing: Packages that an empty stand-in is enough for.
        before: Sets up other stand-ins, before mmseg is imported.
    """

    def note(function):
        CASES[name] = types.SimpleNamespace(make=function, folder=folder, needed=needed, fork=fork, missing=missing,
                                            before=before)
        return function

    return note


# --- the project's modules in this process ----------------------------------------------------------------------------


class Absent(types.ModuleType):
    """Stands for a package that is not installed: whatever is imported from it is an empty class."""
    __path__, __version__ = [], '0'

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


class AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that are to be stood in for, and what is in them."""

    def __init__(self, *roots: str):
        self.roots = roots

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.split('.')[0] in self.roots else None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        pass


def stand_in(*roots: str) -> None:
    """Let a missing package be imported, empty."""
    missing = [root for root in roots if importlib.util.find_spec(root) is None]
    sys.meta_path.append(AbsentFinder(*missing))
    STOOD_IN.extend(missing)


STOOD_IN = []


def module(name: str, **names) -> types.ModuleType:
    """A stand-in with what is needed of a missing module, and the packages around it."""
    parts = name.split('.')
    if parts[0] not in STOOD_IN:
        STOOD_IN.append(parts[0])
    for k in range(1, len(parts) + 1):
        path = '.'.join(parts[:k])
        if path not in sys.modules:
            sys.modules[path] = Absent(path)
            sys.modules[path].__spec__ = importlib.machinery.ModuleSpec(path, None)
            if k > 1:
                setattr(sys.modules['.'.join(parts[:k - 1])], parts[k - 1], sys.modules[path])
    vars(sys.modules[name]).update(names)
    return sys.modules[name]


def bare(folder: str, *whole: str) -> None:
    """The packages below a folder without what their `__init__` imports, so that single modules can be imported: most
    `__init__` import every model, and with it packages that are missing here.

    Args:
        whole: Packages to import as they are.
    """
    above = osp.dirname(folder)
    for path, _, _ in os.walk(folder):
        name = osp.relpath(path, above).replace(os.sep, '.')
        if name in whole:
            continue
        package = types.ModuleType(name)
        package.__path__, package.__file__ = [path], osp.join(path, '__init__.py')
        sys.modules[name] = package


def load(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


# --- data and configs -------------------------------------------------------------------------------------------------


def write(path: str, array: np.ndarray) -> None:
    os.makedirs(osp.dirname(path), exist_ok=True)
    cv2.imwrite(path, array)


def scenes(classes: int, seed: int = 0):
    """For each image its split, its name, its labels in blocks, and the picture of them under noise."""
    rng = np.random.default_rng(seed)
    for split, number in SPLITS.items():
        for i in range(number):
            label = rng.integers(0, classes, (SIDE // CELL, SIDE // CELL))
            label = label.repeat(CELL, 0).repeat(CELL, 1).astype(np.uint8)
            picture = 30 + 200 / classes * label[..., None] + rng.normal(0, rng.uniform(2, 30), (SIDE, SIDE, 3))
            yield split, f'{split}{i}', label, picture.clip(0, 255).astype(np.uint8)


def config(model: dict, data: dict, train: list, test: list, scope: str = 'mmseg', batch: int = 2, test_batch: int = 1,
           splits: dict = None, metric: dict = None, best: str = 'mIoU', **more) -> dict:
    """What all configs share: four iterations, one validation, one checkpoint."""
    splits = splits or {split: dict(data_prefix=dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}'))
                        for split in SPLITS}
    val = dict(batch_size=test_batch, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
               dataset=dict(data, **splits['val'], pipeline=test))
    metric = metric or dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])
    return dict(
        default_scope=scope, model=model, val_dataloader=val, test_dataloader=val, val_evaluator=metric,
        test_evaluator=metric, val_cfg=dict(type='ValLoop'), test_cfg=dict(type='TestLoop'),
        train_dataloader=dict(batch_size=batch, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
                              dataset=dict(data, **splits['train'], pipeline=train)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4, save_best=best),
                           logger=dict(type='LoggerHook', interval=2)),
        log_processor=dict(by_epoch=False), randomness=dict(seed=0), **more)


def cross_entropy(scope: str = 'mmseg', weight: float = 1.) -> dict:
    return dict(type=f'{scope}.CrossEntropyLoss', use_sigmoid=False, loss_weight=weight)


def fcn(width: int, classes: int, index: int = -1, **more) -> dict:
    return dict(dict(type='mmseg.FCNHead', in_channels=width, channels=8, in_index=index, num_convs=1,
                     concat_input=False, num_classes=classes, norm_cfg=dict(type='BN'), align_corners=False,
                     loss_decode=cross_entropy()), **more)


RESNET = dict(type='mmseg.ResNetV1c', depth=18, base_channels=8, stem_channels=8, norm_eval=False, style='pytorch',
              norm_cfg=dict(type='BN'), contract_dilation=True)
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


# --- the projects -----------------------------------------------------------------------------------------------------


@case('open-cd', 'open-cd')
def open_cd(folder: str, root: str) -> dict:
    """LEVIR-CD: two images a sample, labels 0 and 255 to 0 and 1; BIT, a Siamese encoder."""
    bare(osp.join(folder, 'opencd'))
    load('opencd.registry', 'opencd.datasets.levir_cd', 'opencd.datasets.transforms.loading',
         'opencd.datasets.transforms.formatting', 'opencd.datasets.transforms.transforms',
         'opencd.models.data_preprocessor', 'opencd.models.change_detectors.siamencoder_decoder',
         'opencd.models.necks.feature_fusion', 'opencd.models.decode_heads.bit_head')
    for split, name, label, picture in scenes(2):
        write(f'{root}/{split}/A/{name}.png', np.roll(picture, 5, 0))
        write(f'{root}/{split}/B/{name}.png', picture)
        write(f'{root}/{split}/label/{name}.png', label * 255)
    splits = {split: dict(data_prefix=dict(img_path_from=f'{split}/A', img_path_to=f'{split}/B',
                                           seg_map_path=f'{split}/label')) for split in SPLITS}
    return config(
        dict(type='SiamEncoderDecoder', backbone=dict(RESNET, num_stages=3, out_indices=(2, ), dilations=(1, 1, 1),
                                                      strides=(1, 2, 1)),
             data_preprocessor=dict(type='DualInputSegDataPreProcessor', mean=MEAN * 2, std=STD * 2, bgr_to_rgb=True,
                                    size_divisor=32, test_cfg=dict(size_divisor=32)),
             neck=dict(type='FeatureFusionNeck', policy='concat', out_indices=(0, )),
             decode_head=dict(type='BITHead', in_channels=32, channels=8, embed_dims=8, enc_depth=1, dec_depth=1,
                              num_heads=2, drop_rate=0., token_len=4, upsample_size=4, num_classes=2,
                              norm_cfg=dict(type='LN'), align_corners=False, loss_decode=cross_entropy()),
             train_cfg=dict(), test_cfg=dict(mode='whole')),
        dict(type='LEVIR_CD_Dataset', data_root=root),
        [dict(type='MultiImgLoadImageFromFile'), dict(type='MultiImgLoadAnnotations'),
         dict(type='MultiImgRandomRotate', prob=0.5, degree=180),
         dict(type='MultiImgRandomCrop', crop_size=(48, 48), cat_max_ratio=0.75),
         dict(type='MultiImgRandomFlip', prob=0.5, direction='horizontal'), dict(type='MultiImgExchangeTime', prob=0.5),
         dict(type='MultiImgPhotoMetricDistortion'), dict(type='MultiImgPackSegInputs')],
        [dict(type='MultiImgLoadImageFromFile'), dict(type='MultiImgResize', scale=(SIDE, SIDE), keep_ratio=True),
         dict(type='MultiImgLoadAnnotations'), dict(type='MultiImgPackSegInputs')], 'opencd', splits=splits)


@case('open-cd, semantic', 'open-cd', needed='al.logits')
def open_cd_semantic(folder: str, root: str) -> dict:
    """SECOND: a label map of changes, and one of classes for each date; one head with three outputs."""
    cfg = open_cd(folder, root)
    load('opencd.datasets.second', 'opencd.models.decode_heads.general_scd_head',
         'opencd.models.change_detectors.siamencoder_multidecoder', 'opencd.evaluation.metrics.scd_metric')
    for split, name, label, _ in scenes(2):
        write(f'{root}/{split}/label/{name}.png', label)  # 0 and 1 here
        write(f'{root}/{split}/from/{name}.png', np.where(label, 1 + label, 0))
        write(f'{root}/{split}/to/{name}.png', np.where(label, 3 + label, 0))
    model = cfg['model']
    model.pop('neck')
    model.update(type='SiamEncoderMultiDecoder', backbone=dict(
        RESNET, num_stages=4, out_indices=(0, 1, 2, 3), dilations=(1, 1, 1, 1), strides=(1, 2, 2, 2)))
    model['decode_head'] = dict(
        type='GeneralSCDHead', binary_cd_neck=dict(type='FeatureFusionNeck', policy='abs_diff'),
        binary_cd_head=fcn(8, 2, 0), semantic_cd_head=fcn(8, 6, 0))
    for loader in ('train_dataloader', 'val_dataloader'):
        data = cfg[loader]['dataset']
        split = data['data_prefix']['img_path_from'].split('/')[0]
        data['type'] = 'SECOND_Dataset'
        data['data_prefix'].update(seg_map_path_from=f'{split}/from', seg_map_path_to=f'{split}/to')
        data['pipeline'] = [dict(step, type='MultiImgMultiAnnLoadAnnotations')
                            if step['type'] == 'MultiImgLoadAnnotations' else step for step in data['pipeline']
                            if step['type'] not in ('MultiImgRandomRotate', 'MultiImgExchangeTime')]
    cfg['test_dataloader'] = cfg['val_dataloader']
    cfg['val_evaluator'] = cfg['test_evaluator'] = dict(type='SCDMetric', iou_metrics=['mFscore', 'mIoU'], cal_sek=True)
    cfg['default_hooks']['checkpoint']['save_best'] = None
    cfg['al_more'] = dict(logits='third_party:changes')
    return cfg


def changes(outputs: dict):
    """Of the three logits of a semantic change detector those of change."""
    return outputs['seg_logits']


@case('mmrgbx', 'mmrgbx')
def mmrgbx(folder: str, root: str) -> dict:
    """Optical images and SAR, read by gdal; a neck that joins them, several losses, and a head beside the head."""
    bare(osp.join(folder, 'mmrgbx'))

    def bands_first(path: str) -> np.ndarray:
        image = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        return image if image.ndim == 2 else image.transpose(2, 0, 1)

    module('osgeo.gdal_array', LoadFile=bands_first)
    load('mmrgbx.registry', 'mmrgbx.datasets.yesegoptsar', 'mmrgbx.datasets.transforms.loading',
         'mmrgbx.datasets.transforms.formatting', 'mmrgbx.datasets.transforms.transforms',
         'mmrgbx.models.data_preprocessor', 'mmrgbx.models.segmentor.siamencoder_decoder',
         'mmrgbx.models.necks.feature_fusion', 'mmrgbx.models.necks.stack_necks')
    for split, name, label, picture in scenes(8):
        write(f'{root}/optical/{name}.png', picture)
        write(f'{root}/sar/{name}.png', picture[..., 0])
        write(f'{root}/label/{name}.png', label)
        with open(f'{root}/{split}.txt', 'a') as file:
            file.write(f'{name}\n')
    steps = [dict(type='MultiImgLoadImageFromFile'), dict(type='MultiImgLoadAnnotations', reduce_zero_label=False),
             dict(type='AnyImageToRGB')]
    return config(
        dict(type='SiamEncoderDecoder',
             data_preprocessor=dict(type='MultiInputSegDataPreProcessor', mean=MEAN, std=STD, size_divisor=32,
                                    test_cfg=dict(size_divisor=32)),
             backbone=dict(RESNET, num_stages=4, out_indices=(1, 2, 3)),
             neck=dict(type='StackNecks', necks=[
                 dict(type='SimpleFeatureFusionNeck', policy='concat', out_indices=(0, 1, 2)),
                 dict(type='mmseg.FPN', in_channels=[32, 64, 128], out_channels=8, num_outs=3)]),
             decode_head=dict(type='mmseg.UPerHead', in_channels=[8] * 3, in_index=[0, 1, 2], pool_scales=(1, 2),
                              channels=8, num_classes=8, align_corners=False, norm_cfg=dict(type='BN'), loss_decode=[
                                  # without its third one, FocalLoss, which mmseg 1.2.2 cannot compute on a CPU
                                  cross_entropy(), dict(type='mmseg.DiceLoss', loss_weight=0.4)]),
             auxiliary_head=fcn(8, 8, 1, loss_decode=cross_entropy(weight=0.4)), test_cfg=dict(mode='whole')),
        dict(type='YESegOptSarWithPs', data_root=root, with_ps=False),
        [*steps, dict(type='MultiImgRandomResize', scale=(SIDE, SIDE), ratio_range=(0.5, 2.), keep_ratio=True),
         dict(type='MultiImgRandomCrop', crop_size=(48, 48), cat_max_ratio=0.75),
         dict(type='MultiImgRandomFlip', prob=0.5), dict(type='MultiImgPhotoMetricDistortion'),
         dict(type='GridWavePS', amp=[3, 7], freq=[3, 15], randomize=True), dict(type='MultiImgPackSegInputs')],
        [*steps, dict(type='MultiImgPackSegInputs')], 'mmrgbx',
        splits={split: dict(ann_file=f'{root}/{split}.txt') for split in SPLITS})


@case('KTDA', 'KTDA')
def ktda(folder: str, root: str) -> dict:
    """Grass in .tif; a student that learns features from a frozen teacher inside the segmentor."""
    import torch
    bare(osp.join(folder, 'ktda'))
    module('timm.models.layers', trunc_normal_=torch.nn.init.trunc_normal_)
    module('timm.models.vision_transformer')
    load('ktda.datasets.grass', 'ktda.models.fam', 'ktda.models.fmm', 'ktda.models.segmentors.distill_encoder_decoder')
    for split, name, label, picture in scenes(5):
        write(f'{root}/img/{split}/{name}.tif', picture)
        write(f'{root}/ann/{split}/{name}.png', label)
    return config(
        dict(type='DistillEncoderDecoder',
             data_preprocessor=dict(type='SegDataPreProcessor', mean=MEAN, std=STD, bgr_to_rgb=True, size=(SIDE, SIDE)),
             teach_backbone=dict(type='VisionTransformer', img_size=(SIDE, SIDE), patch_size=16, embed_dims=16,
                                 num_layers=2, num_heads=2, out_indices=(0, 1), frozen_exclude=[], init_cfg=None),
             backbone=dict(RESNET, num_stages=4, out_indices=(2, 3), strides=(1, 2, 2, 2)),
             fam=dict(type='FAM', in_channels=[32, 64], out_channels=16, output_size=4),
             fmm=dict(type='FMM', in_channels=[16, 16], model_type='mlp'),
             neck=dict(type='MultiLevelNeck', in_channels=[16, 16], out_channels=16, scales=[2, 1]),
             decode_head=dict(type='UPerHead', in_channels=[16, 16], in_index=[0, 1], pool_scales=(1, 2), channels=8,
                              num_classes=5, norm_cfg=dict(type='BN'), align_corners=False,
                              loss_decode=cross_entropy()),
             auxiliary_head=fcn(16, 5, 1), train_cfg=dict(), test_cfg=dict(mode='whole')),
        dict(type='GrassDataset', data_root=root),
        [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='RandomCrop', crop_size=(SIDE, SIDE)),
         dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')],
        [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(SIDE, SIDE)), dict(type='LoadAnnotations'),
         dict(type='PackSegInputs')], test_batch=2)


@case('ForestSim', 'ForestSim', fork=True)
def forestsim(folder: str, root: str) -> dict:
    """A fork of mmseg 1.0 as it is, in place of the installed one; labels that end in `.png_group6.png`."""
    for split, name, label, picture in scenes(6):
        write(f'{root}/img/{split}/{name}.png', picture)
        write(f'{root}/ann/{split}/{name}.png_group6.png', label)
    return config(
        dict(type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor', mean=MEAN, std=STD,
                                                           bgr_to_rgb=True, size=(48, 48)),
             backbone=dict(type='MixVisionTransformer', embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 2, 4],
                           patch_sizes=[7, 3, 3, 3], sr_ratios=[8, 4, 2, 1], out_indices=(0, 1, 2, 3)),
             decode_head=dict(type='SegformerHead', in_channels=[8, 16, 16, 32], in_index=[0, 1, 2, 3], channels=8,
                              dropout_ratio=0.1, num_classes=6, norm_cfg=dict(type='BN'), align_corners=False,
                              loss_decode=cross_entropy()),
             train_cfg=dict(), test_cfg=dict(mode='slide', crop_size=(48, 48), stride=(32, 32))),
        dict(type='ForestSimDataset_Group6', data_root=root, reduce_zero_label=False),
        [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=False),
         dict(type='RandomResize', scale=(2 * SIDE, SIDE), ratio_range=(0.5, 2.), keep_ratio=True),
         dict(type='RandomCrop', crop_size=(48, 48), cat_max_ratio=0.75), dict(type='RandomFlip', prob=0.5),
         dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')],
        [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(2 * SIDE, SIDE), keep_ratio=True),
         dict(type='LoadAnnotations', reduce_zero_label=False), dict(type='PackSegInputs')])


def adapted_dino(folder: str, package: str, root: str, adapter: dict, modules: list, data: str, classes: int,
                 hook: bool = False) -> dict:
    """A frozen DINOv2 with an adapter, as Rein and Cloud-Adapter train it: the weights of the frozen part come from a
    file of their own, and no checkpoint has them.

    Args:
        hook: Add them to every checkpoint that is loaded, by the projects' hook, as they do in testing.
    """
    import torch
    from mmengine.registry import MODELS
    bare(osp.join(folder, package), f'{package}.models.backbones.dino_layers')
    load(f'{package}.models.backbones.utils', f'{package}.models.backbones.dino_v2', *modules,
         f'{package}.hooks.load_backbone_hook', f'{package}.optimizers.peft_optimizer_constructor',
         f'{package}.dg_metrics')
    sizes = dict(img_size=SIDE, patch_size=16, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2, init_values=1e-5,
                 block_chunks=0, ffn_layer='mlp', out_indices=[0, 1, 2, 3])
    weights = f'{root}/backbone.pth'
    os.makedirs(root, exist_ok=True)
    torch.manual_seed(0)
    torch.save(MODELS.build(dict(type='mmseg.DinoVisionTransformer', **sizes)).state_dict(), weights)
    for split, name, label, picture in scenes(classes):
        write(f'{root}/img/{split}/{name}.png', picture)
        write(f'{root}/ann/{split}/{name}{".png" if classes == 2 else "_labelTrainIds.png"}', label)
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='RandomFlip', prob=0.5),
                dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')]
    cfg = config(
        dict(type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor', mean=MEAN, std=STD,
                                                           bgr_to_rgb=True, size=(SIDE, SIDE)),
             backbone=dict(adapter, **sizes, init_cfg=dict(type='Pretrained', checkpoint=weights)),
             decode_head=fcn(16, classes, -1), train_cfg=dict(), test_cfg=dict(mode='whole')),
        dict(type=data, data_root=root, **({} if classes == 2 else dict(img_suffix='.png',
                                                                         seg_map_suffix='_labelTrainIds.png'))),
        pipeline, [step for step in pipeline if step['type'] not in ('RandomFlip', 'PhotoMetricDistortion')],
        metric=dict(type='DGIoUMetric', iou_metrics=['mIoU'], dataset_keys=['ann/'], mean_used_keys=['ann/']),
        best='mean_mIoU', custom_hooks=[dict(type='LoadBackboneHook', checkpoint_path=weights)] if hook else [])
    cfg['optim_wrapper'] = dict(
        type='OptimWrapper', constructor='PEFTOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.)}, norm_decay_mult=0.))
    return cfg


@case('Rein', 'Rein')
def rein(folder: str, root: str) -> dict:
    """A frozen DINOv2 with Reins: its state_dict holds what is trained, a hook adds the rest to what is loaded."""
    modules = [f'rein.models.backbones.{name}' for name in ('reins', 'reins_dinov2')]
    adapter = dict(type='ReinsDinoVisionTransformer', reins_config=dict(
        type='LoRAReins', token_length=8, embed_dims=16, num_layers=4, patch_size=16, lora_dim=2,
        link_token_to_query=False))
    return adapted_dino(folder, 'rein', root, adapter, modules, 'CityscapesDataset', 19, hook=True)


@case('Cloud-Adapter', 'Cloud-Adapter')
def cloud_adapter(folder: str, root: str) -> dict:
    """As Rein, with an adapter that has BatchNorm and a network of its own."""
    import torch
    from mmcv.cnn.bricks import DropPath

    def rearrange(tensor, pattern: str, h: int):
        """The two patterns that this adapter asks of einops."""
        if pattern == 'b n (h d) -> (b h) n d':
            return torch.cat([part for b in tensor for part in b.chunk(h, 1)]).view(len(tensor) * h, len(tensor[0]), -1)
        assert pattern == '(b h) n d -> b n (h d)', pattern
        return torch.stack([torch.cat(list(b), 1) for b in tensor.split(h)])

    module('einops', rearrange=rearrange)
    module('timm.layers', DropPath=DropPath, trunc_normal_=torch.nn.init.trunc_normal_)
    adapter = dict(type='CloudAdapterDinoVisionTransformer', adapter_index=[0, 1, 2, 3], cloud_adapter_config=dict(
        type='CloudAdapter', cnn_type='convnext', int_type='convnext', emd_dim=16, num_layers=4, context_dim=8,
        return_multi_feats=False, return_last_feature=False, rank_dim=4))
    names = ('models.backbones.cloud_adapter', 'models.backbones.cloud_adapter_dinov2', 'datasets.hrc_whu')
    return adapted_dino(folder, 'cloud_adapter', root, adapter, [f'cloud_adapter.{name}' for name in names],
                        'HRCWHUDataset', 2)


@case('sea-ice-mmseg', 'sea-ice-mmseg', fork=True,
      needed='a test pipeline whose loader is given the scenes of the pool, without labels; and that is not enough')
def sea_ice(folder: str, root: str) -> dict:
    """Images of NetCDF files and labels of .png files beside them, by one step that reads all of them when it is built;
    three label maps in one, three heads, and no classes in the metainfo but three lists."""

    class Scene(dict):
        """The little of an xarray data set that the loader asks for."""

        def __getitem__(self, channels):
            maps = np.stack([dict.__getitem__(self, channel) for channel in channels])
            return types.SimpleNamespace(to_array=lambda: types.SimpleNamespace(data=maps))

    module('xarray', open_dataset=lambda path, engine: Scene(np.load(open(path, 'rb'))))
    module('icecream', ic=lambda *args: None)
    module('AI4ArcticSeaIceChallenge.convert_raw_icechart')
    if not importlib.util.find_spec('tqdm'):
        module('tqdm', tqdm=list)
    load('mmseg.datasets.ai4arctic', 'mmseg.datasets.transforms.loading_ai4arctic',
         'mmseg.models.segmentors.mutitask_encoder_decoder', 'mmseg.evaluation.metrics.multitask_iou_metric')
    tasks, channels = dict(SIC=11, SOD=6, FLOE=7), ['nersc_sar_primary', 'nersc_sar_secondary', 'distance_map']
    os.makedirs(f'{root}/scenes')
    for split, name, label, picture in scenes(6):
        with open(f'{root}/scenes/{name}.nc', 'wb') as file:
            np.savez(file, **dict(zip(channels, picture.transpose(2, 0, 1).astype(np.float32))))
        for task in tasks:
            write(f'{root}/labels/{name}_{task}.png', label)
        for listed in (split, 'all'):
            with open(f'{root}/{listed}.txt', 'a') as file:
                file.write(f'{name}.nc\n')

    def loader(split: str, with_seg: bool = True) -> dict:
        return dict(type='PreLoadImageandSegFromNetCDFFile', data_root=f'{root}/scenes', gt_root=f'{root}/labels',
                    ann_file=f'{root}/{split}.txt', channels=channels, mean=[128., 128., 128.], std=[64., 64., 64.],
                    downsample_factor=1, with_seg=with_seg, GT_type=list(tasks))

    cfg = config(
        dict(type='MultitaskEncoderDecoder', data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[0, 0, 0], std=[1, 1, 1], size=(48, 48), pad_val=255, seg_pad_val=255),
             backbone=dict(RESNET, type='ResNetV1c', num_stages=4, out_indices=(0, 1, 2, 3)),
             decode_head=[dict(fcn(64, classes), type='FCNHead', task=task) for task, classes in tasks.items()],
             train_cfg=dict(), test_cfg=dict(mode='slide', crop_size=(48, 48), stride=(32, 32))),
        dict(type='AI4Arctic', data_root=f'{root}/scenes'),
        [loader('train'), dict(type='RandomResize', scale=(SIDE, SIDE), ratio_range=(0.9, 1.5), keep_ratio=True),
         dict(type='RandomCrop', crop_size=(48, 48), cat_max_ratio=0.9), dict(type='RandomFlip', prob=0.5),
         dict(type='PackSegInputs')],
        [loader('val'), dict(type='PackSegInputs')], best=None,
        splits={split: dict(ann_file=f'{root}/{split}.txt', data_prefix=dict(img_path='', seg_map_path=''))
                for split in SPLITS},
        metric=dict(type='MultitaskIoUMetric', tasks=list(tasks), iou_metrics=['mIoU', 'mFscore'],
                    num_classes=dict(SIC=12, SOD=7, FLOE=8)))
    cfg['test_dataloader'] = dict(cfg['val_dataloader'], dataset=dict(
        cfg['val_dataloader']['dataset'], pipeline=[loader('all', False), dict(type='PackSegInputs')]))
    return cfg


def before_satellite() -> None:

    def rearrange(tensor, pattern: str, p1: int, p2: int):
        """The one pattern that this head asks of einops."""
        assert pattern == 'b (p1 p2 c) h w -> b c (p1 h) (p2 w)', pattern
        b, c, h, w = tensor.shape
        return tensor.view(b, p1, p2, -1, h, w).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, p1 * h, p2 * w)

    module('einops', rearrange=rearrange)
    module('IPython', version_info=(9, 0), embed=None)  # matplotlib asks for the version


@case('mmseg-satellite', 'mmseg-satellite', fork=True, before=before_satellite,
      missing=('pycocotools', 'torchvision'),
      needed='nothing for images; regions: no direction head')
def satellite(folder: str, root: str) -> dict:
    """Nine label maps of eight files, of which the loader makes the classes; a segmentor that predicts five outputs."""

    import mmseg.datasets.satellite_seg  # noqa: F401
    import mmseg.models.decode_heads.ham_head_instance  # noqa: F401
    kinds = dict(direction_path='angle_direction', color_path='color', line_type_path='line_type', line_num_path='num',
                 attribute_path='attribute', ifbidirection_path='direction', ifboundary_path='boundary')
    rng = np.random.default_rng(1)
    for split, name, label, picture in scenes(4):
        write(f'{root}/img/{split}/{name}.png', picture)
        instance = np.kron(rng.integers(0, 9, (CELL, CELL)), np.ones((CELL, CELL))).astype(np.uint8)
        write(f'{root}/ann/{split}/{name}-GT.png', np.dstack([label, instance, 0 * label]))
        for key, kind in kinds.items():
            map_ = picture if key == 'direction_path' else (label > 0) * rng.integers(1, 3, label.shape)
            write(f'{root}/{kind}/{split}/{name}-GT.png', map_.astype(np.uint8))
    data = dict(type='SatelliteInstanceDataset', data_root=root)
    splits = {split: dict({key: f'{kind}/{split}' for key, kind in kinds.items()},
                          data_prefix=dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}')) for split in SPLITS}
    cfg = config(
        dict(type='EncoderDecoder', has_AE_head=False, has_direction_head=True, has_line_type_head=True,
             data_preprocessor=dict(type='SegDataPreProcessor', mean=MEAN, std=STD, bgr_to_rgb=True, size=(SIDE, SIDE),
                                    test_cfg=dict(size_divisor=32)),
             backbone=dict(type='MSCAN', embed_dims=[8, 8, 16, 16], mlp_ratios=[2] * 4, depths=[1] * 4, drop_rate=0.,
                           norm_cfg=dict(type='BN')),
             decode_head=dict(
                 type='LightHamInstanceHead', ignore_index=255, AE_dimension=4, in_channels=[8, 16, 16],
                 in_index=[1, 2, 3], channels=16, ham_channels=16, seg_upsample_channel=16, dropout_ratio=0.1,
                 num_classes=8, num_line_types=11, norm_cfg=dict(type='GN', num_groups=4), align_corners=False,
                 loss_decode=[dict(type='CrossEntropyLoss', class_weight=[1] + [20] * 7, avg_non_ignore=True),
                              dict(type='DiceLoss', loss_name='loss_dice', loss_weight=0.333)],
                 loss_direction_decode=[dict(type='MSERegressionLoss', loss_weight=2.)],
                 loss_linetype_decode=[dict(type='CrossEntropyLoss', avg_non_ignore=True)],
                 ham_kwargs=dict(MD_S=1, MD_R=4, train_steps=2, eval_steps=2, inv_t=100, rand_init=True)),
             train_cfg=dict(), test_cfg=dict(mode='whole')),
        data,
        [dict(type='LoadImageFromFile'), dict(type='LoadInstanceAnnotations'), dict(type='Resize', scale=(SIDE, SIDE)),
         dict(type='DilateGT', kernel_size=3), dict(type='RandomFlip', prob=0.5, direction='horizontal'),
         dict(type='PhotoMetricDistortion'), dict(type='PackInstanceSegInputs')],
        [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(SIDE, SIDE)), dict(type='LoadInstanceAnnotations'),
         dict(type='DilateGT', kernel_size=3), dict(type='PackInstanceSegInputs')], splits=splits)
    cfg['optim_wrapper']['optimizer'] = dict(type='AdamW', lr=8e-5, weight_decay=0.01)
    return cfg


@case('mmseg-kd', 'mmseg-kd', needed='nothing for images; regions: another rotation than RandomRotFlip')
def kd(folder: str, root: str) -> dict:
    """Slices of CT in folders of cases; a distiller around a student and a teacher, each a whole segmentor."""
    bare(osp.join(folder, 'seg'), 'seg.registry')
    bare(osp.join(folder, 'razor'), 'razor.registry', 'razor.models.task_modules.recorder')
    mmrazor()
    load('razor.models.algorithms.distill.configurable.single_teacher_distill', 'razor.models.distillers.ex_distiller',
         'razor.models.architectures.connectors.exkd_connector', 'razor.models.losses.exkd_loss',
         'seg.models.segmentors.encoder_decoder', 'seg.models.data_preprocessor', 'seg.datasets.synapse',
         'seg.datasets.transforms.transforms', 'seg.evaluation.metrics.iou_metric')
    for split, name, label, picture in scenes(14):
        write(f'{root}/img/{split}/case{name[-1:]}/slice.jpg', picture[..., 0])
        write(f'{root}/ann/{split}/case{name[-1:]}/slice.png', label)
    load_image = [dict(type='LoadImageFromFile', color_type='grayscale'), dict(type='seg.Normalize', grayscale=True)]
    resize = dict(type='Resize', scale=(SIDE, SIDE), keep_ratio=True)
    preprocessor = dict(type='seg.SegDataPreProcessor')
    resnet = dict(RESNET, type='mmseg.ResNetV1c', in_channels=1, num_stages=4, out_indices=(0, 1, 2, 3),
                  strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))

    def segmentor(width: int) -> dict:
        return dict(type='seg.EncoderDecoder', data_preprocessor=preprocessor,
                    backbone=dict(resnet, base_channels=width), decode_head=fcn(8 * width, 14, 3),
                    auxiliary_head=fcn(4 * width, 14, 2), train_cfg=dict(), test_cfg=dict(mode='whole'))

    layers = [f'backbone.layer{k}.1.conv2' for k in (3, 4)]
    recorders = {f'layer{k}': dict(type='ModuleOutputs', source=layer) for k, layer in enumerate(layers)}
    cfg = config(
        dict(type='razor.SingleTeacherDistill', architecture=dict(cfg_path=segmentor(8), pretrained=False),
             teacher=dict(cfg_path=segmentor(12), pretrained=False), distiller=dict(
                 type='razor.EXDistiller', student_recorders=recorders, teacher_recorders=recorders,
                 distill_losses={f'loss_{k}': dict(type='razor.EXKD_Loss', normalize=True, loss_weight=0.5, dist=True)
                                 for k in (0, 1)},
                 connectors={f'connect_{k}': dict(type='EXKDConnector', student_channels=32 * (k + 1),
                                                  teacher_channels=48 * (k + 1)) for k in (0, 1)},
                 loss_forward_mappings={f'loss_{k}': dict(
                     s_feature=dict(recorder=f'layer{k}', from_student=True, connector=f'connect_{k}'),
                     t_feature=dict(recorder=f'layer{k}', from_student=False)) for k in (0, 1)})),
        dict(type='seg.SynapseDataset', data_root=root),
        [*load_image, dict(type='mmseg.LoadAnnotations'), resize,
         dict(type='mmseg.RandomRotFlip', rotate_prob=0.5, flip_prob=0.5, degree=20), dict(type='mmseg.PackSegInputs')],
        [*load_image, resize, dict(type='mmseg.LoadAnnotations'), dict(type='mmseg.PackSegInputs')],
        metric=dict(type='seg.IoUMetric', iou_metrics=['mDice', 'mIoU']), best='mDice', find_unused_parameters=True)
    return cfg


def mmrazor() -> None:
    """The part of mmrazor that the project's distiller builds on, at its simplest."""
    import mmengine.registry
    import torch
    from mmengine.model import BaseModule
    from mmseg.utils import add_prefix
    registry = mmengine.registry

    class ModuleOutputsRecorder:
        """Keeps what a module puts out while it is entered."""

        def __init__(self, source: str):
            self.source, self.on, self.kept = source, False, []

        def keep(self, module, inputs, outputs):
            if self.on:
                self.kept.append(outputs)

        def get_record_data(self, record_idx: int = 0, data_idx=None):
            return self.kept[record_idx] if data_idx is None else self.kept[record_idx][data_idx]

    class Manager:
        """Recorders, or deliveries, entered together."""

        def __init__(self, recorders=None):
            self._recorders = {}

        recorders = property(lambda self: self._recorders)

        def get_recorder(self, name: str):
            return self._recorders[name]

        def prepare(self, model):
            modules = dict(model.named_modules())
            for recorder in self._recorders.values():
                modules[recorder.source].register_forward_hook(recorder.keep)

        def __enter__(self):
            for recorder in self._recorders.values():
                recorder.on, recorder.kept = True, []

        def __exit__(self, *error):
            for recorder in self._recorders.values():
                recorder.on = False

    class Distiller(BaseModule):

        def prepare_from_student(self, model):
            self.student_recorders.prepare(model)

        def prepare_from_teacher(self, model):
            self.teacher_recorders.prepare(model)

        def set_deliveries_override(self, override: bool):
            pass

        def build_distill_losses(self, losses):
            return torch.nn.ModuleDict({name: registry.MODELS.build(loss) for name, loss in losses.items()})

        build_connectors = build_distill_losses

    class Connector(BaseModule):

        def forward(self, feature):
            return self.forward_train(feature)

    class L2Loss(torch.nn.Module):

        def __init__(self, normalize=True, loss_weight=1., dist=False, div_element=False):
            super().__init__()
            self.normalize, self.loss_weight, self.dist, self.div_element = normalize, loss_weight, dist, div_element

        def normalize_feature(self, feature):
            return torch.nn.functional.normalize(feature.flatten(1), dim=1)

    registry.TASK_UTILS.register_module(module=ModuleOutputsRecorder)
    module('mmrazor.registry', **vars(registry))
    module('mmpretrain.registry')
    module('mmrazor.models.utils', add_prefix=add_prefix)
    module('mmrazor.models.task_modules', RecorderManager=Manager, DistillDeliveryManager=Manager)
    module('mmrazor.models.task_modules.recorder', RecorderManager=Manager)
    module('mmrazor.models.task_modules.recorder.base_recorder')
    module('mmrazor.models.task_modules.delivery', DistillDeliveryManager=Manager)
    module('mmrazor.models.distillers', ConfigurableDistiller=Distiller)
    module('mmrazor.models.architectures.connectors.base_connector', BaseConnector=Connector)
    module('mmrazor.models.losses', L2Loss=L2Loss)


@case('mmseg', '')
def own(folder: str, root: str) -> dict:
    """The installed package: UNet on HRF with two losses, the set repeated 40,000 times, slide inference."""
    import mmseg
    from mmengine.config import Config
    from model_sweep import without_pretrained
    folder = osp.join(osp.dirname(mmseg.__file__), '.mim', 'configs', 'unet')
    cfg = Config.fromfile(osp.join(folder, 'unet-s5-d16_fcn_4xb4-ce-1.0-dice-3.0-40k_hrf-256x256.py'))
    without_pretrained(cfg.model)
    for split, name, label, picture in scenes(2):
        write(f'{root}/img/{split}/{name}.png', picture)
        write(f'{root}/ann/{split}/{name}.png', label)
    model = cfg.model
    model.backbone.update(base_channels=4)
    model.decode_head.update(in_channels=4, channels=4)
    model.auxiliary_head.update(in_channels=8, channels=4)
    model.data_preprocessor.size = (48, 48)
    model.test_cfg.update(crop_size=(48, 48), stride=(32, 32))
    for loader, split in dict(train='train', val='val', test='val').items():
        data = cfg[f'{loader}_dataloader']
        data.update(num_workers=0, persistent_workers=False, batch_size=2 if split == 'train' else 1)
        data = data.dataset.dataset if split == 'train' else data.dataset
        data.update(data_root=root, img_suffix='.png', seg_map_suffix='.png',
                    data_prefix=dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}'))
        for step in data.pipeline:
            step.update({key: (SIDE, SIDE) for key in ('scale', ) if key in step})
            step.update({key: (48, 48) for key in ('crop_size', ) if key in step})
    cfg.train_cfg.update(max_iters=4, val_interval=4)
    cfg.default_hooks.checkpoint.update(interval=4, save_best='mDice')
    return cfg.to_dict()


# --- one run ----------------------------------------------------------------------------------------------------------


def note_labels(path: str):
    """A hook that keeps, for each map of labels in the batches of a training, the mean share of it that has a label."""
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module()
    class NoteLabels(Hook):

        def __init__(self):
            self.shares = {}

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            for sample in data_batch['data_samples']:
                for key, value in sample.all_items():
                    if hasattr(value, 'data') and value.data.dtype.is_floating_point is False:
                        self.shares.setdefault(key, []).append(float((value.data != 255).float().mean()))
            with open(path, 'w') as file:
                json.dump({key: round(float(np.mean(shares)), 2) for key, shares in self.shares.items()}, file)


def one(name: str, mode: str, snapshots: str, work: str) -> dict:
    """Train a project, in a process that does nothing else."""
    result, phase = {}, 'setup'
    try:
        folder = osp.abspath(osp.join(snapshots, CASES[name].folder))
        sys.path[:0] = [folder] * CASES[name].fork + [ROOT, osp.dirname(osp.abspath(__file__))]
        stand_in(*CASES[name].missing)
        CASES[name].before()
        if CASES[name].fork:
            import mmcv
            mmcv.__version__ = '2.0.1'  # forks of an older mmseg refuse 2.1.0
        import al_patch  # noqa: F401, I001  first, since mmseg cannot be imported beside mmcv-lite without it
        import mmseg.utils
        mmseg.utils.register_all_modules(False)
        assert not CASES[name].fork or mmseg.__file__.startswith(folder), 'another mmseg was imported'
        cfg = CASES[name].make(folder, osp.join(work, 'data'))
        from mmengine.config import Config
        from mmengine.runner import Runner
        note_labels(osp.join(work, 'shares.json'))
        cfg = dict(cfg, work_dir=osp.join(work, 'run'), env_cfg=dict(cudnn_benchmark=False))
        cfg['custom_hooks'] = [*cfg.get('custom_hooks', ()), dict(type='NoteLabels')]
        if mode != 'stock':
            cfg['al'] = dict(AL[mode], **cfg.pop('al_more', {}))
        cfg.pop('al_more', None)
        phase = 'build'
        runner = Runner.from_cfg(Config(cfg))
        phase = 'train'
        runner.train()
        phase = 'end'
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        result.update(error=type(error).__name__, message=str(error).strip())
    return dict(result, phase=phase, stood_in=STOOD_IN)


def judge(result: dict, mode: str, work: str) -> str:
    checkpoints = glob.glob(osp.join(work, 'run', '**', '*.pth'), recursive=True)
    message = result.get('message', '')
    if result['phase'] == 'end':
        if mode == 'stock':
            return 'runs'
        path = osp.join(work, 'run', 'al_state.json')
        rounds = json.load(open(path))['rounds'] if osp.exists(path) else []
        return 'runs' if len(rounds) == 2 else f'fails: {len(rounds)} rounds'
    if result['error'] == 'ValueError' and '\n' not in message and not checkpoints and mode != 'stock':
        return f'refused: {message}'
    if result['phase'] == 'setup' or mode == 'stock':
        return f'not run: {result["error"]}: {message}'
    return f'fails {"after a training" if checkpoints else "before any"}: {result["error"]}: {message}'


def run(name: str, mode: str, snapshots: str, keep: str = None) -> dict:
    with tempfile.TemporaryDirectory() as work:
        if keep:
            work = osp.join(keep, f'{name}, {mode}'.replace(', ', '_'))
            os.makedirs(work)
        command = [sys.executable, osp.abspath(__file__), snapshots, '--one', name, '--mode', mode, '--work', work]
        env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
            lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT')]
            result = json.loads(lines[-1][6:]) if lines else dict(
                phase='train', error=f'exit code {done.returncode}', message=done.stderr.strip()[-200:])
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            result, output = dict(phase='train', error='TimeoutExpired', message='no end in five minutes'), ''
        outcome = judge(result, mode, work).replace(work + os.sep, '')
        row = dict(project=name, mode=mode, outcome=outcome, stood_in=result.get('stood_in', []))
        shares = osp.join(work, 'shares.json')
        if mode.startswith('region') and osp.exists(shares):
            row['shares'] = json.load(open(shares))
        if keep:
            with open(osp.join(work, 'output.txt'), 'w') as file:
                file.write(output)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('snapshots', help='folder of the snapshots')
    parser.add_argument('projects', nargs='*', metavar='PROJECT')
    parser.add_argument('-o', '--output', default='third_party.jsonl')
    parser.add_argument('--keep', help='a new folder for data, work_dirs and output of the runs')
    for hidden in ('--one', '--mode', '--work'):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print('RESULT' + json.dumps(one(args.one, args.mode, args.snapshots, args.work)))
        return
    from prettytable import PrettyTable
    done = [json.loads(line) for line in open(args.output)] if osp.exists(args.output) else []
    projects = args.projects or list(CASES)
    for name in projects:
        for mode in ('stock', *AL):
            outcomes = {row['mode']: row['outcome'] for row in done if row['project'] == name}
            if mode in outcomes or outcomes.get('stock', '').startswith('not run') or (
                    'random' in mode and not outcomes[mode.split(',')[0]].startswith('refused')):
                continue
            done.append(run(name, mode, args.snapshots, args.keep))
            with open(args.output, 'a') as file:
                file.write(json.dumps(done[-1]) + '\n')
            print(done[-1], flush=True)
    table = PrettyTable(['project', 'stock', 'image', 'region', 'what it needed'], align='l', max_width=40)
    for name in projects:
        rows = {row['mode']: row for row in done if row['project'] == name}

        def cell(mode: str, rows: dict = rows) -> str:
            if mode not in rows:
                return '-'
            shown = ', '.join(f'{key} {share}' for key, share in rows[mode].get('shares', {}).items())
            outcome = rows[mode]['outcome']
            text = outcome[:200] + ' ...' * (len(outcome) > 200)
            text += f' ({shown})' if shown and outcome == 'runs' else ''
            return text + (f'; random: {cell(f"{mode}, random")}' if f'{mode}, random' in rows else '')

        stood_in = rows['stock']['stood_in'] if 'stock' in rows else []
        needed = CASES[name].needed + (f'; stand-ins: {", ".join(stood_in)}' if stood_in else '')
        table.add_row([name, cell('stock'), cell('image'), cell('region'), needed])
    print(table)


if __name__ == '__main__':
    main()
