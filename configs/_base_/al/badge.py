# BADGE (Ash et al., ICLR 2020): k-means++ seeding on the gradients of the last layer under the predicted labels.
# 10 % of the images at first and 5 % more after each of 6 rounds: 10, 15, ..., 40 %. That is VAAL's protocol (Sinha et
# al., ICCV 2019) on Cityscapes. AL-SEG's dal-300-150-6 states it in images: 300 of 2,975, then 6 x 150.
# Same: (p - onehot) h^T, the largest norm first, then draws in proportion to the squared distance to what is chosen.
# Differs: theirs classifies images. Here an image's gradient is the mean over the pixels of its map, as a mean loss
# has it. AL-SEG leaves h out and pools p - onehot to about 400 numbers.
al = dict(strategy=dict(type='badge'), initial=0.1, budget=0.05, rounds=6)
