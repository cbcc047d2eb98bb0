# ClaSP-PE (nnActive): regions; two thirds of a query in equal parts for all classes but the background, with noise.
# 6 equal shares, the first at random and 5 by queries. Theirs are 20 to 500 patches by data set; here 2 % of the pixels
# each: 2, 4, ..., 12 %.
# Same: 66 % of a query by p_c x entropy, class by class, the rest by entropy, both under power noise, whose beta goes
# from 1 towards 100 over the trainings: 1, 2.5, 6.3, 15.9, 39.8.
# Differs: a unit is a cell of 32 x 32 pixels; theirs is a 3-D patch, and may lie anywhere. p is one model's; theirs is
# the mean of five. Classes choose one after the other over the whole pool; theirs first set aside their best of each
# image, which no other class gets. Class 0 is the background; if there is none:
# strategy=dict(type='clasp_pe', background=None).
al = dict(unit=dict(type='region', size=[32, 32]), strategy=dict(type='clasp_pe'), initial=0.02, budget=0.02, rounds=5)
