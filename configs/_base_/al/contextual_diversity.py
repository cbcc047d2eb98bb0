# Contextual Diversity (CDAL; Agarwal et al., ECCV 2020), its variant CDAL-CS: k-center greedy on class confusions.
# 10 % of the images at first and 5 % more after each of 6 rounds: 10, 15, ..., 40 %. That is VAAL's protocol (Sinha et
# al., ICCV 2019) on Cityscapes. AL-SEG's dal-300-150-6 states it in images: 300 of 2,975, then 6 x 150; CDAL's own code
# takes the size as an argument.
# Same: the first pick of a round at random, then the farthest from what is labelled or chosen, by the symmetric KL of
# the rows of classes that both images predict, averaged over these.
# Differs: the random pick is one of the pool; theirs draws among all, and ends with an error if it is labelled.
al = dict(strategy=dict(type='contextual_diversity'), initial=0.1, budget=0.05, rounds=6)
