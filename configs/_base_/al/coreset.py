# CoreSet (Sener & Savarese, ICLR 2018): k-center greedy on the mean features before the last layer.
# 10 % of the images at first and 5 % more after each of 6 rounds: 10, 15, ..., 40 %. That is VAAL's protocol (Sinha et
# al., ICCV 2019) on Cityscapes. AL-SEG's dal-300-150-6 states it in images: 300 of 2,975, then 6 x 150.
# Same: greedy farthest point by Euclidean distance, first of all from what is labelled.
# Differs: no mixed integer program refines the choice, as in most later work. AL-SEG takes the backbone's last map:
# strategy=dict(type='coreset', features_from='backbone').
al = dict(strategy=dict(type='coreset'), initial=0.1, budget=0.05, rounds=6)
