# Active learning on ADE20K with SegFormer MiT-B0: the shipped config, plus what is below.
_base_ = ['mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', './_base_/al/power_entropy.py']
custom_imports = dict(imports=['al_patch'])
# 20,210 training images. The recipe, which can be changed for another one, labels 5 % = 1,010 at the start and 1,010
# more after each of 4 rounds: 1,010, 2,020, 3,030, 4,040, 5,050 (25 %). Each of the 5 trainings runs the whole schedule
# below: 5 x 40k iterations.

train_cfg = dict(max_iters=40000, val_interval=4000)
param_scheduler = [  # the base's warm-up, then its decay, ending with the schedule
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=40000, by_epoch=False)]
default_hooks = dict(checkpoint=dict(interval=4000, max_keep_ckpts=1, save_best='mIoU'))
randomness = dict(seed=0)
