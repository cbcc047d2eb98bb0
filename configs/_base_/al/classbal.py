# ClassBal (Cai et al., CVPR 2021): superpixels by best versus second best, less of classes that are predicted often.
# 100,000 superpixels at first, at random, and 100,000 more after each of 4 rounds, at a click each: 100k, 200k, ...,
# 500k of the 2,975 x 2,048 of Cityscapes. Where there are fewer, all are labelled at once and the run ends. A fraction
# counts pixels, and 100,000 / (2,975 * 2,048) = .0164 of them is the same share: initial=0.0164, budget=0.0164.
# Same: mean p2 / p1, scaled to [0, 1], x exp(-share of the superpixels whose majority class it is).
# Differs: SLIC (compactness 10) for SEEDS. Theirs predicts at half the resolution, and takes 0 for the least score as
# soon as an image has fewer than 2,148 superpixels; here it is the least that there is.
al = dict(
    unit=dict(type='superpixel', n_segments=2048), strategy=dict(type='classbal'), initial=100_000, budget=100_000,
    rounds=4)
