# RIPU, pixel-based (PA; Xie et al., CVPR 2022): single pixels, more than 32 apart, greedy in each image.
# 40 pixels of an image of 640 x 1280 in 5 rounds: ceil(40 / 5 / (640 * 1280) * (1024 * 2048)) = 21 pixels an image and
# round at 1024 x 2048. At other sizes put your own H and W.
# Same: score, its window of 65 x 65 and how far pixels stay apart, in this round and from those before.
# Differs: their first model comes from a labelled source domain. Here it comes from as many pixels again, drawn at
# random, or from whole images of yours: initial='a split file'. Theirs asks five times in one training, which goes on
# with its weights; here each round trains anew; weights='continue' goes on as theirs. Equal scores go to a draw.
al = dict(
    unit=dict(type='pixel', radius=32), strategy=dict(type='ripu_pixel', k=32), per_image=True, rounds=5,
    initial=-(-40 * 1024 * 2048 // (5 * 640 * 1280)), budget=-(-40 * 1024 * 2048 // (5 * 640 * 1280)))  # rounds up
