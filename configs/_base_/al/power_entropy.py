# Power entropy (Kirsch et al., TMLR 2023): whole images, drawn without replacement in proportion to their mean entropy.
# 5 % of the images at first and 5 % more after each of 4 rounds: 5, 10, 15, 20, 25 %.
# Same: top-k of ln s + Gumbel noise, at beta = 1, their default.
# Differs: theirs classifies images; as nnActive has it for segmentation, s is the mean over the pixels.
al = dict(strategy=dict(type='power_entropy'), initial=0.05, budget=0.05, rounds=4)
