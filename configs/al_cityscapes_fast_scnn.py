# Active learning on Cityscapes with Fast-SCNN: the shipped config, plus what is below.
_base_ = ['mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py', './_base_/al/power_entropy.py']
custom_imports = dict(imports=['al_patch'])
# 2,975 training images. The recipe, which can be changed for another one, labels 5 % = 149 at the start and 149 more
# after each of 4 rounds: 149, 298, 447, 596, 745 (25 %). Every one of the 5 trainings runs the whole schedule below:
# 5 x 40k iterations.

train_cfg = dict(max_iters=40000, val_interval=4000)
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False)]
default_hooks = dict(checkpoint=dict(interval=4000, max_keep_ckpts=1, save_best='mIoU'))
randomness = dict(seed=0)
