# Active learning on Cityscapes with Fast-SCNN: the shipped config, plus what is below.
_base_ = 'mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py'
custom_imports = dict(imports=['al_patch'])
# 2,975 training images. 5 % = 149 are labelled at the start and 149 more after each of 5 rounds:
# 149, 298, 447, 596, 745, 894 (30 %). Every one of the 6 trainings runs the whole schedule below: 6 x 40k iterations.
al = dict(strategy='entropy', initial=0.05, budget=0.05, rounds=5)

train_cfg = dict(max_iters=40000, val_interval=4000)
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False)]
default_hooks = dict(checkpoint=dict(interval=4000, max_keep_ckpts=1, save_best='mIoU'))
randomness = dict(seed=0)
