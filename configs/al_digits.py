# Active learning in two minutes on a laptop's CPU, nothing to download:
_base_ = ['mmseg::_base_/models/fcn_unet_s5-d16.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['al_patch', 'configs.digits'])
# 400 training images. 20 are labelled at the start and 20 more after each of 4 rounds: 20, 40, 60, 80, 100 (25 %).
al = dict(strategy='entropy', initial=20, budget=20, rounds=4, seed=0)

train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(64, 64), ratio_range=(0.8, 1.4), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(64, 64)), dict(type='PackSegInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
data = dict(type='DigitsDataset', data_root='data/digits')
train_dataloader = dict(batch_size=8, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True), dataset=dict(
    **data, data_prefix=dict(img_path='img/train', seg_map_path='ann/train'), pipeline=train_pipeline))
val_dataloader = dict(batch_size=10, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(
    **data, data_prefix=dict(img_path='img/val', seg_map_path='ann/val'), pipeline=test_pipeline))
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])

bn = dict(type='BN', requires_grad=True)
model = dict(data_preprocessor=dict(size=(64, 64)), auxiliary_head=None,
             backbone=dict(base_channels=16, strides=(2, 1, 1, 1, 1), norm_cfg=bn),
             decode_head=dict(in_channels=16, channels=32, num_classes=11, norm_cfg=bn), test_cfg=dict(mode='whole'))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=500, val_interval=500)
val_cfg = dict(type='ValLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.01))
param_scheduler = [dict(type='PolyLR', power=0.9, end=500, by_epoch=False)]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=500, max_keep_ckpts=1, save_best='mIoU'))
randomness = dict(seed=0)
