# Entropy (Shannon, 1948; Settles, 2009): whole images, those of the highest mean entropy.
# 5 % of the images at first and 5 % more after each of 4 rounds: 5, 10, 15, 20, 25 %.
al = dict(strategy=dict(type='entropy'), initial=0.05, budget=0.05, rounds=4)
