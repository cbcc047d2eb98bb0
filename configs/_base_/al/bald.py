# BALD (Houlsby et al., 2011) with MC dropout (Gal et al., ICML 2017): H(mean p) - mean H(p) over 20 passes.
# 10 % of the images at first and 5 % more after each of 6 rounds: 10, 15, ..., 40 %. That is VAAL's protocol (Sinha et
# al., ICCV 2019) on Cityscapes, which has MC dropout among its baselines.
# Same: the mutual information of prediction and weights, from the dropout layers that the model has.
# Differs: theirs classifies images. Here an image's score is the mean over the pixels of its map; BatchNorm stays in
# eval mode, and each image has dropout masks of its own.
al = dict(strategy=dict(type='bald', mc=20), initial=0.1, budget=0.05, rounds=6)
