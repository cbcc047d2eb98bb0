# PixelPick (Shin et al., ICCVW 2021): single pixels, at random among the 5 % of smallest margin in each image.
# 10 pixels an image at first, at random, and 10 more after each of 9 rounds: 10, 20, ..., 100 pixels an image.
# Same: margin p1 - p2, int(.05 H W) of all pixels, then 10 of these without preference.
# Differs: their code excludes void pixels by the ground truth, which nobody has before asking. Cityscapes is 256 x 512
# there. Pixels that are labelled are no candidates here; there they rank last.
al = dict(
    unit=dict(type='pixel'), strategy=dict(type='pixelpick', percent=5), per_image=True, initial=10, budget=10,
    rounds=9)
