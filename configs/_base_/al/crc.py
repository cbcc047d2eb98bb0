# CRC-AL (Erhan & Ure, AI 2025; AL-SEG): conformal risk maps, and the barycentre distance of class co-occurrences.
# AL-SEG's dal-300-150-6 on Cityscapes: 300 of the 2,975 images at first and 150 more after each of 6 rounds: 300, 450,
# ..., 1,200 (40 %). On other data: initial=0.1, budget=0.05.
# Same: thresholds for a rate of false negatives of alpha=0.05, risk, embedding and selector with tau=0.5.
# Differs: theirs calibrates on the images that it trained on. Here a fifth of the labelled images is held out of
# training for it, without which the guarantee does not hold. The bound is (n + 1) / n alpha - 1 / n, as in the theory;
# their code has 1 / (n + 1) for the last term. Thresholds are in thousandths, not interpolated between them.
al = dict(strategy=dict(type='crc', alpha=0.05, tau=0.5, calibration=0.2), initial=300, budget=150, rounds=6)
