# Active learning on augmented Pascal VOC 2012 with DeepLabV3+ R-50: the shipped config, plus what is below.
_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-20k_voc12aug-512x512.py'
custom_imports = dict(imports=['al_patch'])
# 10,582 training images: the base concatenates train (1,464) and aug (9,118). 500 are labelled at the start and, after
# each round, more and more: 500, 750, 1,250, 2,250, 4,250 (40 %). The 5 trainings run 20k iterations each, as the base.
al = dict(strategy='entropy', initial=500, budget=[250, 500, 1000, 2000])

train_cfg = dict(val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=1, save_best='mIoU'))
randomness = dict(seed=0)
