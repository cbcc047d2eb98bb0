# RIPU, region-based (RA; Xie et al., CVPR 2022): windows of 3 x 3 pixels, impurity x uncertainty, greedy in each image.
# 5 % of the pixels in 5 rounds: ceil(H W .05 / 5 / 3^2) = 2,331 windows an image and round at 1024 x 2048. At other
# sizes put your own H and W.
# Same: score, window and how far windows stay apart, in this round and from those before.
# Differs: their first model comes from a labelled source domain. Here it comes from as many windows again, drawn at
# random, or from whole images of yours: initial='a split file'. Theirs asks five times in one training, which goes on
# with its weights; here each round trains anew; weights='continue' goes on as theirs. Equal scores go to a draw.
al = dict(
    unit=dict(type='region', window=1), strategy=dict(type='ripu', k=1), per_image=True, rounds=5,
    initial=-(-1024 * 2048 * 5 // (100 * 5 * 3**2)), budget=-(-1024 * 2048 * 5 // (100 * 5 * 3**2)))  # rounds up
