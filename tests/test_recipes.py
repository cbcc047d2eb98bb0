"""Recipes: what they hold, that they can be exchanged, and that what they ask for is what their method's rule, written
out slowly, asks for on the same probabilities, features and draws.

The rules follow the papers and, where that is named, the authors' code. Nothing of it is copied.
"""
import ast
import glob
import math
import os.path as osp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from tiny import NO_VAL, ROOT, SHAPE

import al_patch
from al_patch import AL_SELECTORS, class_confusion, generator, mean_gradient, parse_settings, seed_of, uniform

RECIPES = {osp.basename(path)[:-3]: path for path in sorted(glob.glob(osp.join(ROOT, 'configs/_base_/al/*.py')))}
SHIPPED = sorted({*glob.glob(osp.join(ROOT, 'configs/al_*.py'))} - {osp.join(ROOT, 'configs/al_digits.py')})
METHODS = ['badge', 'bald', 'clasp_pe', 'classbal', 'contextual_diversity', 'coreset', 'crc', 'entropy', 'pixelpick',
           'power_entropy', 'ripu_pa', 'ripu_ra']


def recipe(name: str) -> dict:
    return Config.fromfile(RECIPES[name]).al.to_dict()


# --- what a recipe holds ---------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_each_method():
    assert list(RECIPES) == METHODS


@pytest.mark.parametrize('name', METHODS)
def test_a_recipe_is_short_and_holds_all_that_its_method_fixes(name):
    text = open(RECIPES[name]).read()
    [statement] = ast.parse(text).body  # no import either: in a virtual environment mmengine takes it for a lazy config
    assert statement.targets[0].id == 'al' and len(text.splitlines()) <= 20 and text.startswith('# ')
    al = recipe(name)
    assert list(Config.fromfile(RECIPES[name])) == ['al'] and {'strategy', 'initial', 'budget', 'rounds'} <= {*al}
    assert all(isinstance(al[key], dict) for key in ('unit', 'strategy', 'oracle') if key in al)
    assert not {'seed', 'oracle', 'pool', 'stop', 'overrides'} & {*al}
    parse_settings(al)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('shipped', SHIPPED, ids=osp.basename)
def test_a_recipe_takes_the_place_of_another_in_every_shipped_config(tmp_path, shipped, name):
    text, path = open(shipped).read(), tmp_path / osp.basename(shipped)
    assert text.count("'./_base_/al/power_entropy.py'") == 1
    path.write_text(text.replace("'./_base_/al/power_entropy.py'", repr(RECIPES[name])))
    mine, own = Config.fromfile(str(path)), Config.fromfile(shipped)
    assert mine.al == recipe(name)
    assert {key: mine[key] for key in mine if key != 'al'} == {key: own[key] for key in own if key != 'al'}
    parse_settings(mine.al)


@pytest.mark.parametrize('shipped', SHIPPED, ids=osp.basename)
def test_a_shipped_config_alone_is_the_recipe_of_the_default(shipped):
    assert Config.fromfile(shipped).al == recipe('power_entropy')
    assert recipe('power_entropy')['strategy'] == dict(type=parse_settings({}).strategy)


def test_the_budgets_of_ripu_by_hand():
    ra, pa = recipe('ripu_ra'), recipe('ripu_pa')
    assert ra['initial'] == ra['budget'] == math.ceil(1024 * 2048 * .05 / 5 / 3**2) == 2331
    assert pa['initial'] == pa['budget'] == math.ceil(40 / 5 / (1280 * 640) * (2048 * 1024)) == 21


@pytest.mark.parametrize('name, images', [('badge', 1190), ('crc', 1200), ('entropy', 745), ('power_entropy', 745)])
def test_the_images_of_cityscapes_that_are_labelled_in_the_end(name, images):
    al = recipe(name)
    assert al_patch.number_of(al['initial'], 2975) + al['rounds'] * al_patch.number_of(al['budget'], 2975) == \
        pytest.approx(images, abs=5)


def test_the_share_of_classbal():
    assert recipe('classbal')['budget'] / (2975 * 2048) == pytest.approx(.0164, abs=5e-5)


def test_the_betas_of_clasp_pe():
    """exponential_schedule over all trainings, of which the last asks nothing (nnactive/strategies/utils.py, lines 185
    to 187, MIC-DKFZ/nnActive f09a05c)."""
    rounds = recipe('clasp_pe')['rounds']
    ours = [100**((k - 1) / max(1, rounds)) for k in range(1, rounds + 1)]  # `progress` of the k-th query
    assert ours == pytest.approx(np.geomspace(1, 100, 6)[:5])
    assert ours == pytest.approx([1, 2.5, 6.3, 15.9, 39.8], abs=.06)


# --- what a query sees, by the model itself --------------------------------------------------------------------------


def kept(method):
    """A method of an image, asked once for each."""
    return lambda self, name: self.seen[method, name] if (method, name) in self.seen else \
        self.seen.setdefault((method, name), method(self, name))


class View:
    """What can be asked for in a query, and what the model says of it."""

    def __init__(self, state, asked):
        self.state, self.asked, self.k = state, set(asked), len(state.rounds)
        self.have, self.pool = state.labelled(), state.pool.names
        self.budget = al_patch.budgets(state.al)[self.k - 1]
        self.options = al_patch.resolve_strategy(state.al.strategy).record
        self.model, self.seen = state.model.eval(), {}

    @kept
    def own(self, name: str) -> np.ndarray:
        """Probabilities of the image's own pixels, from mmseg's own prediction, (C, H, W) float64."""
        with torch.no_grad():
            [sample] = self.model.test_step(pseudo_collate([self.state.pool[name]]))
        return softmax(sample.seg_logits.data.numpy())

    @kept
    def head(self, name: str) -> tuple:
        """Probabilities at the logits' own resolution, and what goes into the last layer."""
        inputs, model = [], self.model
        hook = model.decode_head.conv_seg.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with torch.no_grad():
            data = model.data_preprocessor(pseudo_collate([self.state.pool[name]]), False)
            logits = model.decode_head(model.extract_feat(data['inputs']))
        hook.remove()
        return softmax(logits[0].numpy()), inputs[0][0].double().numpy()

    def draw(self, name: str, i: int = 0) -> float:
        return float(uniform(seed_of(self.state.seed, 'draw', self.k, name), np.array([int(i)]))[0])

    def by_draw(self, candidates) -> list:
        return sorted(candidates, key=lambda each: self.draw(*each))

    def images(self, labelled: bool = False) -> list:
        return [(name, 0) for name in self.pool if (name in self.have) == labelled]

    @kept
    def taken(self, name: str) -> np.ndarray:
        return self.state.mask(name)

    def pixels(self, name: str) -> list:
        return [(name, int(i)) for i in np.flatnonzero(~self.taken(name))]

    def cell(self, i: int, shape: tuple) -> tuple:
        """Where a pixel lies in a smaller map."""
        y, x = divmod(i, SHAPE[1])
        return y * shape[0] // SHAPE[0], x * shape[1] // SHAPE[1]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64))
    return e / e.sum(0)


def nats(p) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def columns(maps: np.ndarray) -> list:
    """The pixels of a map (C, H, W), each a vector."""
    return [maps[:, y, x] for y in range(maps.shape[1]) for x in range(maps.shape[2])]


def best(candidates, score: dict, number: int) -> list:
    """The highest scores; candidates come in the order of their draws, which is that of equals."""
    return sorted(candidates, key=lambda each: -score[each])[:number]


def onehot(p: np.ndarray) -> np.ndarray:
    return (np.arange(len(p)) == p.argmax()).astype(float)


def gumbel(u: float, beta: float) -> float:
    return -math.log(-math.log(u)) / beta


def again(draw: float, stream: int) -> float:
    """Another number of the same candidate."""
    return float(uniform(stream, np.array([draw]))[0])


# --- the rules, written out ------------------------------------------------------------------------------------------


def of_entropy(view: View) -> list:
    score = {(name, 0): np.mean([nats(p) for p in columns(view.head(name)[0])]) for name in view.pool}
    return best(view.by_draw(view.images()), score, view.budget)


def of_power_entropy(view: View) -> list:
    score = {(name, 0): np.mean([nats(p) for p in columns(view.head(name)[0])]) for name in view.pool}
    noisy = {each: math.log(score[each]) + gumbel(again(view.draw(*each), 0), 1.) for each in view.images()}
    return best(noisy, noisy, view.budget)


def farthest(view: View, vector: dict, apart, start: list = ()) -> list:
    """k-center greedy: CDAL_CS.py lines 34-51 (sharat29ag/CDAL a5697b5), with Euclidean distance for CoreSet."""
    centres, picks, left = [vector[each] for each in view.images(True)], list(start), view.by_draw(view.images())
    while len(picks) < view.budget:
        chosen = centres + [vector[each] for each in picks]
        rest = [each for each in left if each not in picks]
        picks.append(max(rest, key=lambda each: min(apart(vector[each], centre) for centre in chosen)))
    return picks


def of_coreset(view: View) -> list:
    vector = {(name, 0): np.mean(columns(view.head(name)[1]), 0) for name in view.pool}
    return farthest(view, vector, lambda a, b: math.sqrt(((a - b)**2).sum()))


def confusion_of(probs: np.ndarray) -> np.ndarray:
    """preprocess.py lines 12-19 (sharat29ag/CDAL a5697b5): the mean softmax of a class, weighted by entropy."""
    rows = np.zeros((len(probs), len(probs)))
    for c in range(len(probs)):
        mine = [p for p in columns(probs) if p.argmax() == c]
        weights = [nats(p) for p in mine]
        if mine:
            rows[c] = sum(w * p for w, p in zip(weights, mine)) / sum(weights)
    return rows


def kl_of_common(a: np.ndarray, b: np.ndarray) -> float:
    """CDAL_CS.py lines 56-74 (sharat29ag/CDAL a5697b5): classes whose divergence is not finite are left out."""
    found = [.5 * sum(x * math.log(x / y) + y * math.log(y / x) for x, y in zip(a[c], b[c]))
             for c in range(len(a)) if (a[c] > 0).all() and (b[c] > 0).all()]
    return abs(sum(found) / len(found)) if found else 0.


def of_contextual_diversity(view: View) -> list:
    vector = {(name, 0): confusion_of(view.head(name)[0]) for name in view.pool}
    first = max(view.images(), key=lambda each: view.draw(*each))  # a random score is the candidate's draw
    return farthest(view, vector, kl_of_common, [first])


def draws_by_distance(view: View, candidates: list, vector: dict) -> list:
    """query_strategies/badge_sampling.py lines 52-69 (JordanAsh/badge a2d18ac): the largest norm, then one after the
    other in proportion to the squared distance to the nearest one chosen. The draw is that of exponential clocks."""
    picks = [max(candidates, key=lambda each: (vector[each]**2).sum())]
    left = {each: -math.log(view.draw(*each)) for each in candidates}
    rate = {each: math.inf for each in candidates}
    while len(picks) < view.budget:
        for each in candidates:
            rate[each] = max(1e-30, min(rate[each], ((vector[each] - vector[picks[-1]])**2).sum()))
        rest = [each for each in candidates if each not in picks]
        picks.append(min(rest, key=lambda each: left[each] / rate[each]))
        wait = left[picks[-1]] / rate[picks[-1]]
        for each in rest:
            left[each] -= wait * rate[each]
    return picks


def of_badge(view: View) -> list:
    vector = {}
    for name, _ in view.images():
        probs, features = map(columns, view.head(name))
        vector[name, 0] = np.mean([np.outer(p - onehot(p), h).ravel() for p, h in zip(probs, features)], 0)
    return draws_by_distance(view, view.by_draw(vector), vector)


def of_badge_of_pixels(view: View) -> list:
    """Of the pixels of an image the 256 that draw the highest numbers, each with the gradient of its cell."""
    vector = {}
    for name in view.pool:
        probs, features = view.head(name)
        for _, i in sorted(view.pixels(name), key=lambda each: -view.draw(*each))[:256]:
            y, x = view.cell(i, probs.shape[1:])
            vector[name, i] = np.outer(probs[:, y, x] - onehot(probs[:, y, x]), features[:, y, x]).ravel()
    return draws_by_distance(view, view.by_draw(vector), vector)


def of_bald(view: View) -> list:
    """20 passes; each drops channels before the last layer by numbers of its own."""
    layer, p, score = view.model.decode_head.conv_seg, view.model.decode_head.dropout.p, {}
    weight, bias = layer.weight[:, :, 0, 0].detach().double().numpy(), layer.bias.detach().double().numpy()
    for name, _ in view.images():
        passes, seed = [], seed_of(view.state.seed, 'mc', view.k, name)
        for t in range(20):
            kept = (torch.rand(weight.shape[1], generator=generator(seed, t)) >= p).double().numpy() / (1 - p)
            passes.append(columns(softmax(np.einsum('ck,khw->chw', weight * kept, view.head(name)[1])
                                          + bias[:, None, None])))
        score[name, 0] = np.mean([nats(np.mean(each, 0)) - np.mean([nats(q) for q in each]) for each in zip(*passes)])
    return best(view.by_draw(view.images()), score, view.budget)


def thresholds_of(view: View) -> list:
    """For each class the highest threshold, in thousandths, whose mean rate of false negatives over the images that
    were held out keeps to the bound of conformal risk control."""
    classes, alpha, found = len(view.own(view.pool[0])), view.options['alpha'], []
    for c in range(classes):
        rates = []
        for name in view.state.entry['held_out']:
            mine = view.own(name)[c][view.state.load_label(name) == c]
            if len(mine):
                rates.append([np.mean([p < t / 1000 for p in mine]) for t in range(1001)])
        n, kept = len(rates), [1]
        if n:
            kept += [t for t in range(1, 1001) if np.mean([r[t] for r in rates]) <= (n + 1) / n * alpha - 1 / n]
        found.append(max(kept) / 1000)
    return found


def of_crc(view: View) -> list:
    """alseg/helpers/conformal_risk_map.py lines 23-88 and alseg/selectors/top_diverse_k.py lines 16-43 (AL-SEG
    45f47c2), the weights as in distance_metrics.py lines 19-29."""
    thresholds, vector, score, tau = thresholds_of(view), {}, {}, view.options['tau']
    assert len(set(thresholds)) > 1
    for name in view.pool:
        pixels = columns(view.head(name)[0])
        sets = [[c for c in range(len(p)) if p[c] >= thresholds[c]] for p in pixels]
        together = np.array([[sum(c in each and d in each for each in sets) for d in range(len(thresholds))]
                             for c in range(len(thresholds))], float)**2
        shares = np.array([row / max(1., row.sum()) for row in together])
        weights = [nats(row) for row in shares]
        vector[name, 0] = shares.ravel()
        score[name, 0] = np.mean([sum(weights[c] for c in each) / max(1e-12, sum(weights)) for each in sets])
    traversed, picks, left = view.images(True), [], view.by_draw(view.images())

    def away(i, j) -> float:
        return math.sqrt(((vector[i] - vector[j])**2).sum())**tau * (
            score[j] / max(1e-12, score[i] + score[j]))**(1 - tau)

    while len(picks) < view.budget:
        far = {j: [away(i, j) for i in traversed + picks] for j in left if j not in picks}
        picks.append(max(far, key=lambda j: np.mean(far[j]) + min(far[j])))
    return picks


def around(y: int, x: int, k: int) -> tuple:
    return slice(max(0, y - k), y + k + 1), slice(max(0, x - k), x + k + 1)


def ripu_maps(probs: np.ndarray, k: int) -> tuple:
    """RA and PA: core/active/floating_region.py lines 42-63 and build.py lines 47-56 (BIT-DA/RIPU 84328cf), less their
    1e-6 in the logarithms."""
    c, h, w = probs.shape
    uncertain, pred = np.array([nats(p) for p in columns(probs)]).reshape(h, w), probs.argmax(0)
    ra, pa = np.zeros((2, h, w))
    for y, x in np.ndindex(h, w):
        window = around(y, x, k)
        shares = np.bincount(pred[window].ravel(), minlength=c) / pred[window].size
        ra[y, x] = nats(shares) / math.log(c) * uncertain[window].mean() / math.log(c)
        pa[y, x] = nats(shares) * uncertain[y, x]
    return ra, pa


def greedy(view: View, which: int, radius: int, gap: int) -> list:
    """In each image again and again the highest pixel, which takes those within the gap: RIPU's core/active/build.py
    lines 58-77 and 128-152."""
    picks = []
    for name in view.pool:
        score = ripu_maps(view.own(name), view.options['k'])[which]
        for y, x in np.argwhere(view.taken(name)):
            score[around(y, x, gap - radius)] = -math.inf
        for _ in range(view.budget):
            if score.max() == -math.inf:
                break
            equal = np.flatnonzero(score >= score.max() * (1 - 1e-6))  # rounding tells those above 0 apart, or not
            if score.max() > 0 and len(equal) > 1:
                equal = [i for i in equal if (name, i) in view.asked] or equal
            i = min(equal, key=lambda i: view.draw(name, i))
            y, x = divmod(int(i), SHAPE[1])
            picks.append((name, i))
            score[around(y, x, gap)] = -math.inf
    return picks


def of_ripu_ra(view: View) -> list:
    return greedy(view, 0, 1, 2)


def of_ripu_pa(view: View) -> list:
    return greedy(view, 1, 0, view.state.al.unit.radius)


def of_pixelpick(view: View) -> list:
    """query.py lines 33-66 (NoelShin/PixelPick 43c2981): the top 5 % of all pixels, then some of these at random."""
    picks = []
    for name in view.pool:
        score = {}
        for each in view.pixels(name):
            first, second = sorted(view.own(name).reshape(-1, math.prod(SHAPE))[:, each[1]])[:-3:-1]
            score[each] = 1 - (first - second)
        top = best(view.by_draw(score), score, int(math.prod(SHAPE) * .05))
        picks += view.by_draw(top)[:view.budget]
    return picks


def of_classbal(view: View) -> list:
    """scripts/region_selection_using_al.py lines 67-118 and extract_model_predictions.py lines 68-96 (cailile/
    Revisiting-Superpixels-for-Active-Learning 214b4fe); the least score is that of a superpixel."""
    score, label, left = {}, {}, []
    for name in view.pool:
        probs, segments = view.own(name), view.state.units(name).labels
        pred, second = probs.argmax(0), np.sort(probs, 0)
        for j in np.unique(segments):
            mine = segments == j
            score[name, j] = np.mean(second[-2][mine] / second[-1][mine])
            label[name, j] = np.bincount(pred[mine]).argmax()
            if not view.taken(name)[mine].any():
                left.append((name, j))
    low, high, n = min(score.values()), max(score.values()), len(score)
    final = {each: (score[each] - low) / (high - low) * math.exp(-sum(
        label[other] == label[each] for other in label) / n) for each in left}
    assert len(left) < n
    return best(view.by_draw(left), final, view.budget)


def of_clasp_pe(view: View) -> list:
    """nnactive/strategies/entropy_balanced.py lines 188-232 (MIC-DKFZ/nnActive f09a05c): 66 % of the query in equal
    parts for the foreground, a remainder to the first of the shuffled classes; no candidate twice."""
    by_class, by_entropy = {}, {}
    for name in view.pool:
        own, (probs, _) = view.own(name), view.head(name)
        uncertain = np.array([nats(p) for p in columns(own)]).reshape(SHAPE)
        segments = view.state.units(name).labels
        for j in np.unique(segments):
            mine = segments == j
            if not view.taken(name)[mine].any():
                cells = [view.cell(i, probs.shape[1:]) for i in np.flatnonzero(mine)]
                by_class[name, j] = np.mean([probs[:, y, x] * nats(probs[:, y, x]) for y, x in cells], 0)
                by_entropy[name, j] = uncertain[mine].mean()
    candidates, classes = view.by_draw(by_entropy), len(probs)
    order = torch.randperm(classes, generator=generator(view.state.seed, 'select', view.k)).tolist()
    order = [c for c in order if c != 0]
    number, beta = int(view.budget * .66), 100**((view.k - 1) / view.state.al.rounds)
    picks = []
    for place, c in enumerate([*order, classes]):
        part = number // len(order) + (place < number % len(order)) if c < classes else view.budget - number
        noisy = {each: math.log(by_class[each][c] if c < classes else by_entropy[each]) + gumbel(
            again(view.draw(*each), c), beta) for each in candidates if each not in picks}
        picks += best(noisy, noisy, part)
    return picks


def of_random(view: View) -> list:
    """The share of the budget in proportion to what is predicted as foreground, the rest among all that are left."""
    shown = {}
    for name in view.pool:
        pred, segments = view.own(name).argmax(0), view.state.units(name).labels
        for j in np.unique(segments):
            if not view.taken(name)[segments == j].any():
                shown[name, j] = np.mean(pred[segments == j] != 0)
    candidates, number = view.by_draw(shown), round(view.budget * .33)
    noisy = {each: math.log(shown[each]) + gumbel(again(view.draw(*each), 0), 1.) if shown[each] else -math.inf
             for each in candidates}
    first = best(candidates, noisy, number)
    rest = {each: again(view.draw(*each), 1) for each in candidates if each not in first}
    return first + best(rest, rest, view.budget - number)


# --- every recipe runs, and asks for what its rule asks for ----------------------------------------------------------

CELLS = dict(type='region', size=[8, 8])
RUNS = dict(  # rule, recipe, and what is scaled down for twelve images of 32 x 48 pixels
    entropy=(of_entropy, 'entropy', dict(initial=3, budget=3)),
    power_entropy=(of_power_entropy, 'power_entropy', dict(initial=3, budget=3)),
    coreset=(of_coreset, 'coreset', dict(initial=3, budget=3)),
    badge=(of_badge, 'badge', dict(initial=3, budget=4)),
    badge_of_pixels=(of_badge_of_pixels, 'badge', dict(unit=dict(type='pixel'), initial=30, budget=30)),
    contextual_diversity=(of_contextual_diversity, 'contextual_diversity', dict(initial=3, budget=3)),
    bald=(of_bald, 'bald', dict(initial=3, budget=3)),
    crc=(of_crc, 'crc', dict(initial=5, budget=3, strategy=dict(type='crc', alpha=.57, tau=.5, calibration=.5))),
    ripu_ra=(of_ripu_ra, 'ripu_ra', dict(initial=8, budget=8)),
    ripu_pa=(of_ripu_pa, 'ripu_pa', dict(initial=1, budget=1, rounds=1)),  # two pixels so far apart fill an image
    ripu_pa_closer=(of_ripu_pa, 'ripu_pa', dict(
        initial=4, budget=4, unit=dict(type='pixel', radius=5), strategy=dict(type='ripu_pixel', k=5))),
    pixelpick=(of_pixelpick, 'pixelpick', dict()),
    classbal=(of_classbal, 'classbal', dict(
        unit=dict(type='superpixel', n_segments=60, compactness=100.), initial=60, budget=40)),
    clasp_pe=(of_clasp_pe, 'clasp_pe', dict(unit=CELLS, initial=40, budget=32)),
    random=(of_random, None, dict(strategy=dict(type='random', foreground=.33), unit=CELLS, initial=40, budget=32)))


@HOOKS.register_module()
class AsksByRule(Hook):
    """Notes after each query what it asks for, and what a rule asks for."""

    def __init__(self, rule: str):
        self.rule = globals()[rule]

    def after_al_query(self, state, trainer, asked):
        asked = [(image, int(i)) for image, ids in asked.items() for i in ([0] if ids is None else ids)]
        FOUND.append((asked, [(image, int(i)) for image, i in self.rule(View(state, asked))]))


FOUND = []


@pytest.mark.parametrize('name', RUNS)
def test_a_recipe_runs_and_asks_for_what_its_rule_asks_for(make_cfg, train, name):
    rule, base, scaled = RUNS[name]
    al = {**(recipe(base) if base else {}), 'rounds': 2, 'seed': 5, **scaled}
    FOUND.clear()
    train(make_cfg(al, changes={**NO_VAL, 'train_cfg.max_iters': 8, 'default_hooks.logger.interval': 100,
                                'custom_hooks': [dict(type='AsksByRule', rule=rule.__name__)]}))
    assert len(FOUND) == al['rounds']
    for asked, slow in FOUND:
        assert sorted(asked) == sorted(slow) and len(asked) >= scaled.get('budget', 10)


def test_every_recipe_has_a_rule():
    assert {base for _, base, _ in RUNS.values()} - {None} == {*METHODS}
    assert {of.__name__ for of, *_ in RUNS.values()} == {each for each in globals() if each.startswith('of_')}


# --- the pure functions alone ----------------------------------------------------------------------------------------

NUMBERS = dict(c=st.integers(2, 6), h=st.integers(1, 5), w=st.integers(1, 5), seed=st.integers(0, 2**31),
               sharpness=st.sampled_from([.5, 3., 20.]))


def random_probs(c: int, h: int, w: int, sharpness: float, *seed) -> torch.Tensor:
    return (sharpness * torch.randn(c, h, w, generator=generator(*seed))).softmax(0).clamp_min(1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**NUMBERS, k=st.integers(1, 4))
def test_the_mean_gradient_is_the_mean_of_outer_products(c, h, w, seed, sharpness, k):
    probs, features = random_probs(c, h, w, sharpness, seed), torch.randn(k, h, w, generator=generator(seed, 'h'))
    each = [np.outer(p - onehot(p), h).ravel() for p, h in zip(columns(probs.double().numpy()),
                                                              columns(features.double().numpy()))]
    assert mean_gradient(probs, features)[0].numpy() == pytest.approx(np.mean(each, 0), abs=1e-5)
    weights = torch.rand(3, h * w, generator=generator(seed, 'w'))
    weights /= weights.sum(1, keepdim=True)
    assert mean_gradient(probs, features, weights.to_sparse()).numpy() == pytest.approx(
        weights.numpy() @ np.array(each), abs=1e-5)
    one, other = mean_gradient(probs, features, torch.eye(h * w).to_sparse(), in_one_cell=True)
    assert (one[:, :, None] * other[:, None]).flatten(1).numpy() == pytest.approx(np.array(each), abs=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**NUMBERS, n=st.integers(2, 9), labelled=st.integers(0, 3), data=st.data())
def test_the_farthest_by_the_confusion_of_common_classes(c, h, w, seed, sharpness, n, labelled, data):
    probs = [random_probs(c, h, w, sharpness, seed, i) for i in range(n + labelled)]
    rows = [confusion_of(each.double().numpy()) for each in probs]
    vectors = torch.cat([class_confusion(each) for each in probs])
    assert vectors.numpy() == pytest.approx(np.stack(rows).reshape(len(rows), -1), abs=1e-5)
    scores, budget = torch.rand(n, generator=generator(seed, 's')), data.draw(st.integers(1, n))
    picks = AL_SELECTORS.get('kcenter')(scores, budget, generator(0), vectors[:n], vectors[n:], distance='kl',
                                        first='highest').tolist()
    assert picks[0] == scores.argmax() and len(set(picks)) == budget
    centres = rows[n:] + [rows[picks[0]]]
    for i, pick in enumerate(picks[1:], 1):
        near = {j: min(kl_of_common(rows[j], centre) for centre in centres) for j in range(n) if j not in picks[:i]}
        assert near[pick] == pytest.approx(max(near.values()), rel=1e-3, abs=1e-4)
        centres.append(rows[pick])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(c=st.integers(2, 6), n=st.integers(1, 20), labelled=st.integers(0, 9), seed=st.integers(0, 2**31),
       data=st.data())
def test_class_balance_scales_and_counts_over_all(c, n, labelled, seed, data):
    scores = torch.rand(n + labelled, generator=generator(seed), dtype=torch.float64)
    shares = torch.randn(n + labelled, c, generator=generator(seed, 'c')).softmax(1)
    budget, label = data.draw(st.integers(1, n)), shares.argmax(1).tolist()
    picks = AL_SELECTORS.get('class_balance')(scores[:n], budget, generator(0), shares[:n], scores[n:], shares[n:])
    low, high = float(scores.min()), float(scores.max())
    final = {i: (float(scores[i]) - low) / max(high - low, 1e-12) * math.exp(-label.count(label[i]) / len(label))
             for i in range(n)}
    assert picks.tolist() == best(range(n), final, budget)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 60), more=st.integers(0, 60), seed=st.integers(0, 2**31),
       percent=st.sampled_from([5, 20., 100]), values=st.integers(1, 50), data=st.data())
def test_top_percent_takes_the_first_of_the_highest_of_all(n, more, seed, percent, values, data):
    scores = torch.randint(values, (n, ), generator=generator(seed)).double()
    budget = data.draw(st.integers(1, n))
    picks = AL_SELECTORS.get('top_percent')(scores, budget, generator(0), n + more, percent).tolist()
    top = best(range(n), dict(enumerate(scores.tolist())), max(budget, int((n + more) * percent / 100)))
    assert picks == sorted(top)[:budget]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 30), c=st.integers(2, 5), seed=st.integers(0, 2**31), share=st.sampled_from([0., .33, .66, 1.]),
       background=st.sampled_from([None, 0, 1]), data=st.data())
def test_foreground_draw_takes_its_share_where_foreground_is_predicted(n, c, seed, share, background, data):
    shares = torch.randn(n, c, generator=generator(seed, 'c')).mul(3).softmax(1)
    draws = torch.rand(n, generator=generator(seed), dtype=torch.float64).clamp(1e-9, 1 - 1e-9).sort().values
    budget = data.draw(st.integers(1, n))
    picks = AL_SELECTORS.get('foreground')(draws, budget, generator(0), draws, shares, share, background).tolist()
    shown = [1. if background is None else 1 - float(shares[i, background]) for i in range(n)]
    noisy = {i: math.log(shown[i]) + gumbel(again(float(draws[i]), 0), 1.) for i in range(n)}
    first = best(range(n), noisy, round(budget * share))
    rest = {i: again(float(draws[i]), 1) for i in range(n) if i not in first}
    assert picks == first + best(rest, rest, budget - len(first))
