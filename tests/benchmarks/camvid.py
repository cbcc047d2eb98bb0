# CamVid at 240x180 with ImageNet features: the recipe of study.py, which writes the data and sets the variables.
_base_ = 'mmseg::_base_/default_runtime.py'
custom_imports = dict(imports=['al_patch', 'efficientnet_lite'])
iters = 800  # of a first training
al = dict(strategy='entropy', initial=20, budget=20, rounds=3)

root = '{{$STUDY_DATA:data/camvid_240x180}}'
classes = ('Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol', 'Fence', 'Car', 'Pedestrian',
           'Bicyclist')
palette = [[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0], [192, 128, 128],
           [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]]


def data(split, *augment):
    return dict(type='BaseSegDataset', data_root=root, metainfo=dict(classes=classes, palette=palette),
                data_prefix=dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}'), img_suffix='.png',
                pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *augment,
                          dict(type='PackSegInputs')])


def loader(split):
    return dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data(split))


train_dataloader = dict(batch_size=8, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
                        dataset=data('train', dict(type='RandomFlip', prob=0.5)))
val_dataloader, test_dataloader = loader('val'), loader('test')
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
bn = dict(type='BN')
model = dict(
    type='EncoderDecoder', data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[127.] * 3, std=[128.] * 3, bgr_to_rgb=True, size=(180, 240), seg_pad_val=255),
    backbone=dict(type='EfficientNetLite0', cache='{{$STUDY_CACHE:data/camvid_240x180/cache}}'),
    neck=dict(type='FPN', in_channels=[24, 40, 112, 320], out_channels=64, num_outs=4),
    decode_head=dict(
        type='PlainFPNHead', in_channels=[64] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32], channels=64,
        dropout_ratio=0.1, num_classes=11, norm_cfg=bn, align_corners=False, loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.01))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, end=50, by_epoch=False),
                   dict(type='PolyLR', power=0.9, begin=50, end=iters, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters)
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
default_hooks = dict(logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
                     checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=iters, max_keep_ckpts=1))
randomness = dict(seed=0)
