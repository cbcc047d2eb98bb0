# Active learning on augmented Pascal VOC 2012 with DeepLabV3+ R-50: the shipped config, plus what is below.
_base_ = ['mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-20k_voc12aug-512x512.py', './_base_/al/power_entropy.py']
custom_imports = dict(imports=['al_patch'])
# 10,582 training images: the base concatenates train (1,464) and aug (9,118). The recipe, which can be changed for
# another one, labels 5 % = 529 at the start and 529 more after each of 4 rounds: 529, 1,058, 1,587, 2,116, 2,645
# (25 %). The 5 trainings run 20k iterations each, as the base.

train_cfg = dict(val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=1, save_best='mIoU'))
randomness = dict(seed=0)
