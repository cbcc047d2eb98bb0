# Active learning in minutes on two CPU cores, with nothing to download.
_base_ = ['mmseg::_base_/models/fcn_unet_s5-d16.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['al_patch', 'configs.digits'])
# Of the 400 training images 20 are labelled at the start, and after each of two queries 60 and 100 (25 %).
al = dict(strategy=dict(type='entropy'), initial=20, budget=40, rounds=2, seed=0)

data = dict(type='DigitsDataset', data_root='data/digits', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
train_dataloader = dict(batch_size=8, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True), dataset=dict(
    **data, data_prefix=dict(img_path='img/train', seg_map_path='ann/train')))
val_dataloader = dict(batch_size=10, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(
    **data, data_prefix=dict(img_path='img/val', seg_map_path='ann/val')))
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
bn = dict(type='BN', requires_grad=True)
model = dict(  # the base's U-Net, narrower, one stage shorter; background, 9 pixels in 10, counts less in the loss
    data_preprocessor=dict(size=(48, 48)), auxiliary_head=None, test_cfg=dict(mode='whole'),
    backbone=dict(base_channels=16, num_stages=4, strides=(2, 1, 1, 1), downsamples=(True,) * 3, norm_cfg=bn,
                  enc_num_convs=(2,) * 4, dec_num_convs=(2,) * 3, enc_dilations=(1,) * 4, dec_dilations=(1,) * 3),
    decode_head=dict(in_channels=16, in_index=3, channels=32, num_classes=11, norm_cfg=bn,
                     loss_decode=dict(class_weight=[0.2] + [1.0] * 10)))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.01))
param_scheduler = [dict(type='PolyLR', power=0.9, end=2000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2000, val_interval=2000)
val_cfg = dict(type='ValLoop')
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2000, max_keep_ckpts=1, save_best='mIoU'),
    logger=dict(type='LoggerHook', interval=100, log_metric_by_epoch=False))
randomness = dict(seed=0)
