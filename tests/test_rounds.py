"""Whole runs in one process: what a round trains on, starts from, is scored with, and when it all ends."""
import math
import os
import os.path as osp
import re
import shutil
import types

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from tiny import checkpoint_of, counts, same, weights_at

import al_patch
import al_report
from al_patch import State, parse_settings, query, why_stop


def asked_of(rounds: list) -> list:
    """The names of each round."""
    return [list(entry['asked']) for entry in rounds]


# --- the course of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('loop, last', [('iters', 'iter_4.pth'), ('epochs', 'epoch_2.pth')])
@pytest.mark.parametrize('validates', [True, False])
def test_a_run(make_cfg, train, loop, last, validates):
    cfg = make_cfg(dict(rounds=2), loop, changes={} if validates else tiny.NO_VAL)
    runner, rounds = train(cfg)
    names = sum(asked_of(rounds), [])
    assert counts(rounds) == [4, 2, 2] and len(set(names)) == 8 and set(names) <= set(tiny.NAMES)
    for k, entry in enumerate(rounds):
        assert entry['spent']['images'] == 4 + 2 * k and entry['checkpoints']['last'] == last
        assert ('mIoU' in entry['metrics']) == ('best' in entry['checkpoints']) == validates
        assert all(osp.isfile(checkpoint_of(cfg, rounds, k, which)) for which in entry['checkpoints'])
    assert same(runner.model.state_dict(), weights_at(cfg, f'round_2/{last}'))


def test_the_same_seed_gives_the_same_run(make_cfg, train):
    first, again = (train(make_cfg({}, work_dir=make_cfg().work_dir + tag))[1] for tag in 'ab')
    assert asked_of(first) == asked_of(again)
    assert [entry['metrics'] for entry in first] == [entry['metrics'] for entry in again]


def test_the_runner_tests_the_last_model(make_cfg, train):
    """And not the one that the config begins with."""
    other = make_cfg(dict(rounds=0), work_dir=make_cfg().work_dir + '_other')
    train(other)
    runner, rounds = train(make_cfg(dict(rounds=0), load_from=osp.join(other.work_dir, 'round_0', 'iter_4.pth')))
    model = {key: value.clone() for key, value in runner.model.state_dict().items()}
    assert {key: pytest.approx(value, abs=1e-3) for key, value in runner.test().items()} == rounds[0]['metrics']
    assert same(runner.model.state_dict(), model)


def test_validation_follows_the_last_iteration_in_any_case(make_cfg, train):
    runner, rounds = train(make_cfg(dict(rounds=0), 'epochs', changes={'train_cfg.val_interval': 3}))
    assert 'mIoU' in rounds[0]['metrics']


@pytest.mark.parametrize('al, images', [
    (dict(budget=5, rounds=5), [4, 5, 3]), (dict(budget=[1, 3], rounds=2), [4, 1, 3]),
    (dict(initial=.5, budget=.25, rounds=1), [6, 3]), (dict(initial=12, rounds=0), [12])])
def test_the_budget_is_spent_exactly_and_an_empty_pool_ends_the_run(make_cfg, train, al, images):
    cfg = make_cfg(al, changes={**tiny.NO_VAL, 'train_cfg.max_iters': 1})
    cfg.al = al if 'initial' in al else {'initial': 4, **al}
    assert counts(train(cfg)[1]) == images


def test_training_ends_when_a_value_is_reached(make_cfg, train):
    assert counts(train(make_cfg(dict(rounds=3, stop=dict(value=0))))[1]) == [4]


@pytest.mark.parametrize('stop, history, reason', [
    (dict(value=75), [70., 74.9], None), (dict(value=75), [70., 75.], 'mIoU 75.00 has reached al.stop.value = 75'),
    (dict(patience=2), [70., 72., 71.], None), (dict(patience=2), [70., 72., 71., 73.], None),
    (dict(patience=2), [70., 72., 71., 72.], 'mIoU has not risen above 72.00 for al.stop.patience = 2 rounds'),
    (dict(patience=1, value=90), [70., 91.], 'mIoU 91.00 has reached'), (None, [1.] * 6, '5 of 5 rounds of queries'),
    (dict(metric='mAcc', value=1), [0., 0.], '`al.stop.metric` should be one of mIoU, but got')])
def test_why_stop(stop, history, reason):
    rounds = [dict(asked={str(k): None}, metrics=dict(mIoU=value)) for k, value in enumerate(history)]

    def state(images: int, **settings) -> State:
        return State(dict(seed=0, config={}, rounds=rounds), '', parse_settings(settings), pool=range(images))

    if stop and 'metric' in stop:
        with pytest.raises(ValueError, match=reason):
            why_stop(state(100, stop=stop))
    else:
        got = why_stop(state(100, stop=stop))
        assert got is None if reason is None else got.startswith(reason)
    assert why_stop(state(len(history), rounds=9)).startswith('the pool is empty after')


# --- a round that diverges -------------------------------------------------------------------------------------------

ANEW = 'round_0 has diverged by iteration {}: loss and weights should be finite; mend the config, .* and --resume'


def config_with(make_cfg, tag: str, lr: float, **changes):
    return make_cfg({}, work_dir=make_cfg().work_dir + tag, changes={'optim_wrapper.optimizer.lr': lr, **changes})


@pytest.mark.parametrize('changes, at', [
    (tiny.NO_VAL, 4), ({}, 4), ({**tiny.NO_VAL, 'train_cfg.max_iters': 150}, 50),
    ({'train_cfg.max_iters': 150, 'train_cfg.val_interval': 20}, 20),
    ({**tiny.NO_VAL, 'custom_hooks': [dict(type='EMAHook', momentum=.5)]}, 4)],
    ids=['end', 'validation', 'on the way', 'validation on the way', 'ema'])
def test_a_round_that_diverges_ends_there_and_is_trained_anew(make_cfg, train, changes, at):
    """Also one that was killed before it could say so, with a checkpoint of no use."""
    changes = {'default_hooks.checkpoint.save_best': None, **changes}
    with pytest.raises(ValueError, match=ANEW.format(at)):
        train(config_with(make_cfg, '', 1e30, **changes))
    cfg = config_with(make_cfg, '', .1, resume=True, **changes)
    state, folder = al_patch.read_state(osp.join(cfg.work_dir, 'al_state.json')), osp.join(cfg.work_dir, 'round_0')
    assert state['phase'] == 'train' and [list(entry) for entry in state['rounds']] == [['asked', 'strategy', 'spent']]
    checkpoints = [file for file in os.listdir(folder) if file.endswith('.pth')]
    assert checkpoints and not osp.isfile(osp.join(folder, 'last_checkpoint'))
    if at == 4:
        with open(osp.join(folder, 'last_checkpoint'), 'w') as file:
            file.write(osp.join(folder, 'iter_4.pth'))
        with pytest.raises(ValueError, match=ANEW.format(at)):
            train(cfg)
    _, rounds = train(cfg)
    _, expected = train(config_with(make_cfg, 'other', .1, **changes))
    assert rounds[0]['metrics'] == expected[0]['metrics'] and asked_of(rounds) == asked_of(expected)


@pytest.mark.parametrize('losses, weights, diverged', [
    ([.5] * 20, {}, False), ([], {}, False), ([.5] * 19 + [math.nan], {}, False), ([.5] + [math.nan] * 9, {}, False),
    ([.5] + [math.nan] * 10, {}, True), ([math.inf] * 3, {}, True), ([.5], dict(weight=math.nan), True),
    ([.5], dict(weight=math.inf), True), ([.5], dict(running_var=math.nan), True), ([.5], dict(mask=-math.inf), False)])
@pytest.mark.parametrize('other_rank', [False, True])
def test_what_a_divergence_is(tmp_path, monkeypatch, losses, weights, diverged, other_rank):
    """A loss now and then, as of an iteration that mixed precision skips, is none; nor is a mask that is not saved."""
    model = torch.nn.BatchNorm2d(3)
    model.register_buffer('mask', torch.zeros(3), persistent=False)
    for name, value in weights.items():
        getattr(model, name).data[1] = value
    hub = types.SimpleNamespace(log_scalars={'train/loss': HistoryBuffer(losses, [1] * len(losses))} if losses else {})
    runner = types.SimpleNamespace(model=model, message_hub=hub, work_dir=str(tmp_path), iter=7)
    monkeypatch.setattr(al_patch, 'all_gather_object', lambda mine: [mine, other_rank])
    (tmp_path / 'last_checkpoint').touch()
    if diverged or other_rank:
        with pytest.raises(ValueError, match=f'^{tmp_path.name} has diverged by iteration 7'):
            al_report.check_finite(runner)
    else:
        al_report.check_finite(runner)
    assert (tmp_path / 'last_checkpoint').exists() != (diverged or other_rank)


# --- what a round is built from --------------------------------------------------------------------------------------


@pytest.mark.parametrize('weights', ['scratch', 'last', 'best'])
def test_what_a_round_starts_from(make_cfg, train, weights):
    """Round 1 learns nothing, so its weights are those that it began with."""
    cfg = make_cfg(dict(weights=weights, overrides={1: {'optim_wrapper.optimizer.lr': 0.}}),
                   changes={'train_cfg.val_interval': 1})
    runner, rounds = train(cfg)
    end, checkpoints = weights_at(cfg, checkpoint_of(cfg, rounds, 1)), {
        which: checkpoint_of(cfg, rounds, 0, which) for which in ('last', 'best')}
    if weights == 'scratch':
        assert not any(same(end, weights_at(cfg, path), 'stem.weight') for path in checkpoints.values())
    else:
        assert same(end, weights_at(cfg, checkpoints[weights]), '.weight')


def test_the_best_checkpoint_is_the_best(make_cfg, train):
    cfg = make_cfg(dict(rounds=0), changes={'train_cfg.val_interval': 1})
    runner, rounds = train(cfg)
    [log] = [osp.join(d, f) for d, _, files in os.walk(osp.join(cfg.work_dir, 'round_0')) for f in files
             if f == 'scalars.json']
    scores = [float(line.split('"mIoU": ')[1].split(',')[0]) for line in open(log) if 'mIoU' in line]
    assert rounds[0]['checkpoints']['best'] == f'best_mIoU_iter_{1 + scores.index(max(scores))}.pth'


def test_overrides_hold_for_their_round(make_cfg, train):
    runner, rounds = train(make_cfg(dict(overrides={1: {'train_cfg.max_iters': 6}}), changes=tiny.NO_VAL))
    assert [entry['checkpoints']['last'] for entry in rounds] == ['iter_4.pth', 'iter_6.pth']


@pytest.mark.parametrize('which', ['last', 'best'])
def test_the_checkpoint_that_scores(make_cfg, train, monkeypatch, which):
    loaded, load = [], al_patch.load_checkpoint
    monkeypatch.setattr(al_patch, 'load_checkpoint', lambda m, path, **k: loaded.append(path) or load(m, path, **k))
    cfg = make_cfg(dict(query_with=which), changes={'train_cfg.val_interval': 1})
    runner, rounds = train(cfg)
    trained = [checkpoint_of(cfg, rounds, k) for k in range(2)]
    assert loaded == {'last': trained, 'best': [trained[0], checkpoint_of(cfg, rounds, 0, 'best'), trained[1]]}[which]


class Adapted(tiny.TinyBackbone):
    """A backbone that saves its adapter alone, as of a large frozen one, which is the same whenever it is built."""

    def __init__(self):
        super().__init__()
        for weights in self.stem.parameters():
            torch.nn.init.constant_(weights, .1)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        for key in [key for key in state if 'stem' in key.split('.')]:
            del state[key]
        return state


@pytest.mark.parametrize('change, match', [
    (lambda w: w, None), (lambda w: {f'module.{key}': value for key, value in w.items()}, None),
    (lambda w: {**w, 'decode_head.conv_seg.bias': torch.zeros(4)},
     r'1 of the model are not there \(decode_head.conv_seg.bias \[3\]\) and 1 there not of the model '
     r'\(decode_head.conv_seg.bias \[4\]\): go on with the config that round 1 was trained with, or train it again '
     r'with this one by: python al_label.py rewind /\S+ 1 --train'),
    (lambda w: {key: value for key, value in w.items() if 'bn' not in key},
     r'5 of the model are not there \(decode_head.convs.0.bn.bias \[8\], .*\) and 0 there not of the model \(\)'),
    (lambda w: {**w, 'neck.weight': torch.zeros(2, 2)}, r'1 there not of the model \(neck.weight \[2, 2\]\)')],
    ids=['same', 'wrapped', 'shape', 'missing', 'unexpected'])
@pytest.mark.parametrize('is_bare', [False, True])
def test_a_checkpoint_that_does_not_fit_is_refused(make_state, change, match, is_bare):
    state = make_state({}, [tiny.NAMES[:4], tiny.NAMES[4:6]])
    weights = change({key: value + 1 for key, value in state.model.state_dict().items()})
    path = osp.join(state.work_dir, 'other.pth')
    torch.save(weights if is_bare else dict(state_dict=weights, meta={}), path)
    if match:
        with pytest.raises(ValueError, match=f'^{path} should hold the weights of this model, but .*{match}'):
            al_patch.load_weights(state, path)
    else:
        al_patch.load_weights(state, path)
        own = state.model.state_dict()
        assert all(torch.equal(own[key.removeprefix('module.')], value) for key, value in weights.items())


def test_what_a_model_does_not_save_is_no_fault(make_cfg, train, monkeypatch):
    MODELS.register_module('Adapted', module=Adapted)
    try:
        cfg = make_cfg({}, changes={**tiny.NO_VAL, 'model.backbone.type': 'Adapted'})
        assert counts(train(cfg)[1]) == [4, 2]
    finally:
        MODELS.module_dict.pop('Adapted')
    assert not any('stem' in key for key in weights_at(cfg, 'round_0/iter_4.pth'))


@pytest.mark.parametrize('rounds', [1, 2])
def test_another_model_does_not_score_what_is_left(make_cfg, train, monkeypatch, rounds):
    """Nor does it end a run as its last."""
    train(make_cfg({}, changes=tiny.NO_VAL))
    cfg = make_cfg(dict(rounds=rounds), resume=True, changes={**tiny.NO_VAL, 'model.decode_head.channels': 4})
    before = al_patch.read_state(osp.join(cfg.work_dir, 'al_state.json'))
    monkeypatch.setattr(EncoderDecoder, 'inference', lambda *args: pytest.fail('the model was asked'))
    monkeypatch.setattr(al_report, 'rehearse', lambda state: None)  # with what it begins with, and not for a score
    with pytest.raises(ValueError, match=r'round_1/iter_4.pth should hold the weights of this model, but 6 of the model'
                                         r' are not there \(decode_head.conv_seg.weight \[3, 4, 1, 1\], '):
        train(cfg)
    after = al_patch.read_state(osp.join(cfg.work_dir, 'al_state.json'))
    assert [after[key] for key in ('rounds', 'phase')] == [before[key] for key in ('rounds', 'phase')]


@pytest.mark.parametrize('own, al, seed', [(0, 5, 0), (1, 5, 1), (None, 5, 5), (3, None, 3)])
def test_the_config_seeds_training_and_al_seeds_choices(make_cfg, build, own, al, seed):
    state = al_patch.start_or_resume(build(make_cfg(dict(seed=al), randomness=dict(seed=own))))
    assert al_patch.round_config(state).randomness.seed == seed and state.seed == (own if al is None else al)


def test_resume_without_a_state_starts_afresh(make_cfg, train, monkeypatch):
    """Checkpoints of an older run in the same place are not gone on with."""
    changes = {**tiny.NO_VAL, 'resume': True}
    cfg = make_cfg(dict(rounds=0), changes=changes)
    train(make_cfg(dict(rounds=0, initial=5), changes=tiny.NO_VAL))
    os.remove(osp.join(cfg.work_dir, 'al_state.json'))
    monkeypatch.setattr('mmengine.runner.Runner.resume', lambda *args, **kwargs: pytest.fail('resumed'))
    assert counts(train(cfg)[1]) == [4]


@pytest.mark.parametrize('persistent', [True, False])
def test_dataloader_workers_end_with_their_round(make_state, persistent):
    """The garbage collector would wait five seconds for each of them."""
    workers = dict(num_workers=1, persistent_workers=persistent)
    state = make_state({}, [tiny.NAMES[:4]], changes=dict(train_dataloader=workers, val_dataloader=workers))
    trainer = al_patch.build_round(state)
    others = set(torch.multiprocessing.active_children())
    trainer.train()
    assert set(torch.multiprocessing.active_children()) - others
    al_patch.close_round(trainer)
    assert not set(torch.multiprocessing.active_children()) - others


def test_a_runner_of_ones_own(make_cfg, train, monkeypatch):
    monkeypatch.setattr(tiny.TinyRunner, 'trained', [])
    runner, rounds = train(make_cfg({}, runner_type='TinyRunner', changes=tiny.NO_VAL))
    assert type(runner) is tiny.TinyRunner and runner.trained == ['work', 'round_0', 'round_1']


# --- the query -------------------------------------------------------------------------------------------------------


def test_labels_that_were_not_asked_for_are_never_read(make_cfg, train, shared_data, tmp_path):
    _, rounds = train(make_cfg({}))
    root = shutil.copytree(shared_data, tmp_path / 'blind')
    for name in set(tiny.NAMES) - set(sum(asked_of(rounds), [])):
        os.remove(root / 'ann' / 'train' / f'{name}.png')
    _, blind = train(make_cfg({}, root=str(root), work_dir=str(tmp_path / 'blind_work')))
    assert asked_of(blind) == asked_of(rounds) and blind[1]['metrics'] == rounds[1]['metrics']


def test_random_asks_no_model(make_cfg, train, monkeypatch):
    monkeypatch.setattr(EncoderDecoder, 'inference', lambda *args: pytest.fail('the model was asked'))
    assert counts(train(make_cfg(dict(strategy='random', rounds=2), changes=tiny.NO_VAL))[1]) == [4, 2, 2]


def test_only_a_subset_of_the_pool_is_scored(make_cfg, build):
    runner, scored = build(make_cfg(dict(pool_size=.25, budget=2), changes=tiny.NO_VAL)), {}
    runner.register_hook(type('', (Hook, ), dict(after_al_query=lambda self, state, trainer, asked: scored.update(
        names=list(state.scores), asked=list(asked), before=set(state.labelled()))))())
    runner.train()
    assert len(scored['names']) == 3 and scored['names'] == sorted(scored['names'])
    assert len(scored['asked']) == 2 and set(scored['asked']) < set(scored['names'])
    assert not set(scored['names']) & scored['before']


def test_functions_of_ones_own(make_cfg, train, monkeypatch):
    monkeypatch.setattr(al_patch.Candidates, 'shuffled', al_patch.Candidates.sorted)  # `last_ones` are of the pool
    strategy = dict(type='tiny:brightest', select='tiny:last_ones', power=2)
    _, rounds = train(make_cfg(dict(strategy=strategy, initial=tiny.NAMES[:4]), changes=tiny.NO_VAL))
    assert list(rounds[1]['asked']) == tiny.NAMES[-2:]


def test_a_selection_that_misses_the_budget_is_an_error(make_cfg, train):
    with pytest.raises(ValueError, match='^`al.strategy.select` should'):
        train(make_cfg(dict(strategy=dict(type='random', select='tiny:always_first')), changes=tiny.NO_VAL))


def test_a_score_that_is_no_number_names_the_image(make_cfg, train):
    with pytest.raises(ValueError, match=r"the score of image 'a/\d\d' is not finite"):
        train(make_cfg(dict(strategy='tiny:not_a_number'), changes=tiny.NO_VAL))


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_are_told_what_has_happened_and_one_that_fails_stops_nothing(make_cfg, build, train):
    """Three hooks, of which the second fails after a training."""
    _, expected = train(make_cfg({}, work_dir=make_cfg().work_dir + '_without'))
    runner, calls = build(make_cfg({})), {}

    class Notes(Hook):
        fails = False

        def note(self, point, state, trainer, *args):
            calls.setdefault(id(self), []).append(
                (point, state.round, state.phase, trainer and osp.basename(trainer.work_dir), *map(sorted, args)))
            assert state.runner is runner and al_patch.read_state(osp.join(runner.work_dir, al_patch.STATE_FILE)
                                                                  )['phase'] == state.phase  # it is on disk

        def after_al_train(self, state, trainer):
            self.note('train', state, trainer)
            assert 'mIoU' in state.entry['metrics'] and len(trainer.train_dataloader.dataset) == 4 + 2 * state.round
            if self.fails:
                raise TypeError('of this hook')

        def after_al_query(self, state, trainer, asked):
            self.note('query', state, trainer, asked)
            assert set(asked.values()) == {None} and len(state.scores) == 8

        def after_al_ask(self, state, trainer):
            self.note('ask', state, trainer)

    hooks = [Notes(), type('Wrong', (Notes, ), dict(fails=True))(), Notes()]
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    rounds = al_patch.read_state(osp.join(runner.work_dir, al_patch.STATE_FILE))['rounds']
    assert asked_of(rounds) == asked_of(expected) and rounds[1]['metrics'] == expected[1]['metrics']
    for hook in hooks:
        assert calls[id(hook)] == [
            ('ask', 0, 'train', None), ('train', 0, 'query', 'round_0'),
            ('query', 0, 'query', 'round_0', sorted(rounds[1]['asked'])), ('ask', 1, 'train', 'round_0'),
            ('train', 1, 'query', 'round_1')]
    told = re.findall(r'WARNING - (\S+) failed in round \d, the run goes on:\nTraceback .*\n(?:  .*\n)*(.*)',
                      tiny.log_of(runner.work_dir))
    assert told == [('Wrong.after_al_train', 'TypeError: of this hook')] * 2


# --- scores, against computations of their own -----------------------------------------------------------------------


def network_input(root: str, name: str) -> torch.Tensor:
    image = cv2.imread(f'{root}/img/train/{name}.png').astype(np.float32)
    return torch.from_numpy((image - 128) / 64).permute(2, 0, 1)[None]


def entropies(logits_NCHW: torch.Tensor) -> float:
    p = np.exp(logits_NCHW[0].double().numpy())
    p /= p.sum(0)
    return float(np.mean([-sum(q * np.log(q) for q in p[:, y, x]) for y, x in np.ndindex(*p.shape[1:])]))


@pytest.fixture
def scored(make_state):
    """A function from changes of the config to its model, with drawn weights, and its scores of all images but one."""

    def score(strategy='entropy', **changes) -> tuple:
        state = make_state(dict(strategy=strategy), changes=changes)
        model = state.runner.model.eval()
        torch.manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=.5)
        os.makedirs(state.folder(0), exist_ok=True)
        torch.save(dict(state_dict=model.state_dict()), osp.join(state.folder(0), 'drawn.pth'))
        state.rounds.append(dict(asked={tiny.NAMES[0]: None}, checkpoints=dict(last='drawn.pth')))
        asked = query(state, state.runner)
        assert list(state.scores) == OTHERS and set(asked) == set(sorted(OTHERS, key=state.scores.get)[-2:])
        return model, list(state.scores.values())

    return score


OTHERS = tiny.NAMES[1:]


def test_the_selection_follows_from_the_checkpoint(make_cfg, train, shared_data):
    cfg = make_cfg(dict(strategy='entropy'), changes=tiny.NO_VAL)
    _, rounds = train(cfg)
    model = MODELS.build({**cfg.model, 'data_preprocessor': None}).eval()
    model.load_state_dict(weights_at(cfg, 'round_0/iter_4.pth'))
    pool = [name for name in tiny.NAMES if name not in rounds[0]['asked']]
    with torch.no_grad():
        scores = {name: entropies(model.decode_head(model.backbone(network_input(shared_data, name)))) for name in pool}
    assert list(rounds[1]['asked']) == sorted(sorted(pool, key=scores.get)[-2:])


@torch.no_grad()
def test_scores_are_taken_at_the_resolution_of_the_logits(scored, shared_data):
    model, scores = scored()
    slow = [entropies(model.decode_head(model.backbone(network_input(shared_data, name)))) for name in OTHERS]
    assert scores == pytest.approx(slow, rel=1e-5) and len(set(scores)) == 11


@torch.no_grad()
def test_padding_is_cropped_away(scored, shared_data):
    model, scores = scored(**{'model.data_preprocessor.test_cfg': dict(size_divisor=40)})
    padded = [torch.nn.functional.pad(network_input(shared_data, name), (0, 32, 0, 8)) for name in OTHERS]
    logits = [model.decode_head(model.backbone(image)) for image in padded]
    assert logits[0].shape[2:] == (10, 20)
    assert scores == pytest.approx([entropies(each[:, :, :8, :12]) for each in logits], rel=1e-5)


@torch.no_grad()
def test_slide_inference(scored, shared_data):
    model, scores = scored(**{'model.test_cfg': dict(mode='slide', crop_size=(32, 32), stride=(16, 16))})
    slow = []
    for name in OTHERS:
        total, n = torch.zeros(1, 3, 32, 48), torch.zeros(48)
        for x in (0, 16):
            logits = model.decode_head(model.backbone(network_input(shared_data, name)[..., x:x + 32]))
            total[..., x:x + 32] += torch.nn.functional.interpolate(logits, (32, 32), mode='bilinear')
            n[x:x + 32] += 1
        slow.append(entropies(total / n))
    assert scores == pytest.approx(slow, rel=1e-5)


def test_a_head_with_one_sigmoid_output(scored, monkeypatch):
    seen, predict = [], al_patch.to_probs
    monkeypatch.setattr(al_patch, 'to_probs', lambda *args: seen.extend(predict(*args)) or predict(*args))
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    head = dict(num_classes=2, out_channels=1, threshold=.5, loss_decode=loss)
    _, scores = scored('least_confidence', **{f'model.decode_head.{key}': value for key, value in head.items()})
    assert len(seen) == 11 and all(probs.shape == (2, 8, 12) for probs in seen)
    assert all(torch.allclose(probs.sum(0), torch.ones(8, 12)) for probs in seen)
    assert scores == pytest.approx([float(torch.minimum(one, other).mean()) for one, other in seen], rel=1e-5)


def test_the_head_is_left_as_it_was(scored):
    model, _ = scored()
    assert 'predict_by_feat' not in vars(model.decode_head)
