"""MC dropout: what is random and what is not, that replaying changes nothing, and what is averaged over the passes."""
import contextlib
import functools
import os.path as osp
import types

import mmengine
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.models import FCNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

import al_patch
from al_patch import Network, Pool, Query, State, dropouts_of, generator, parse_settings, resolve_strategy, seed_of

SEEDS = [11, 22, 33]


def layer(*channels: int, stride=2) -> nn.Conv2d:
    return nn.Conv2d(*channels, 3, stride=stride, padding=1)


@MODELS.register_module()
class DropoutBackbone(BaseModule):
    """Stages around dropout layers, called in a way of one's own."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.stem, self.side = nn.Sequential(layer(3, 8), nn.BatchNorm2d(8)), nn.Sequential(layer(8, 8, stride=1))
        self.stage, self.late = nn.Sequential(layer(8, 8)), nn.Sequential(layer(8, 8, stride=1))
        self.channels, self.elements = nn.Dropout2d(.4), nn.Dropout(.3)
        if way in ('held_twice', 'shared'):
            self.norm = nn.BatchNorm2d(8)
            self.first = nn.ModuleList([self.norm, nn.Conv2d(8, 8, 1), self.norm])
            self.second = nn.Sequential(nn.Conv2d(8, 8, 1), self.norm)
        if way != 'both':
            delattr(self, 'elements' if way == 'channels' else 'channels')

    def forward(self, x: torch.Tensor) -> tuple:
        return (getattr(self, f'by_{self.way}')(self.stem(x)), )

    def by_channels(self, x):
        return self.late(self.channels(self.stage(self.side(x).relu())))

    def by_elements(self, x):
        return self.late(self.elements(self.stage(self.side(x).relu())))

    def by_both(self, x):
        x = self.channels(self.stage(x))
        return self.late(self.elements(x)) + self.side(x)

    def by_in_place(self, x):
        """What the stem gives is written to before and after the dropout, and what the side gives through a view."""
        x.mul_(2).relu_()
        side = self.side(x)
        side[:, ::2].add_(1)
        x += side
        dropped = self.elements(self.stage(x))
        x.neg_()
        return self.late(dropped).relu_() + F.max_pool2d(x, 2)

    def by_many_calls(self, x):
        """Modules before the dropout that are called again, also behind it."""
        x = self.side(self.side(x).relu())
        dropped = self.elements(self.stage(x))
        return self.late(self.side(dropped)) + self.late(dropped) + F.max_pool2d(x, 2)

    def by_held_twice(self, x):
        """A norm that is in a list, too."""
        for module in self.first:
            x = module(x + 1)
        return self.late(self.elements(F.max_pool2d(x + self.norm(x + 3), 2)))

    def by_shared(self, x):
        """A norm that two modules hold, and that is called by itself and inside of one of them."""
        for module in self.first:
            x = module(x + 1)
        return self.late(self.elements(F.max_pool2d(self.second(x) + self.norm(x + 3), 2)))


@MODELS.register_module()
class HeadOfItsOwn(FCNHead):
    """FCNHead with a `cls_seg` of its own, which does the same: no short cut is taken for it."""

    def cls_seg(self, feat):
        return super().cls_seg(feat)


BACKBONES = 'channels', 'elements', 'both', 'in_place', 'many_calls', 'held_twice', 'shared'
MODELS_OF = dict(
    head={'model.decode_head.dropout_ratio': .5},
    own_head={'model.decode_head.dropout_ratio': .5, 'model.decode_head.type': 'HeadOfItsOwn',
              'model.decode_head.concat_input': True},
    slide={'model.decode_head.dropout_ratio': .5,
           'model.test_cfg': dict(mode='slide', crop_size=(32, 32), stride=(16, 16))},
    **{way: {'model.backbone': dict(type='DropoutBackbone', way=way), 'model.decode_head.dropout_ratio': ratio}
       for way, ratio in zip(BACKBONES, (0, 0, .1, .1, 0, 0, 0))})
each_model = pytest.mark.parametrize('which', MODELS_OF)


@pytest.fixture
def model_of(make_cfg):
    """A function that builds one of the models, with running statistics that are not those of a new one."""

    def build(which='head', **changes) -> nn.Module:
        torch.manual_seed(0)
        model = MODELS.build(make_cfg(changes={**MODELS_OF[which], **changes}).model)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(.5, 2)
        nn.init.normal_(model.decode_head.conv_seg.weight)
        return model.train()

    return build


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def images(n: int = 3) -> torch.Tensor:
    return 2 * torch.rand(n, 3, *tiny.SHAPE, generator=generator('images')) - 1


def count_calls(model: nn.Module, names: list) -> dict:
    """How often each of these modules is run, as it goes on."""
    calls = dict.fromkeys(names, 0)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    return calls


def metas(n: int = 3) -> list:
    return [dict(img_shape=tiny.SHAPE, ori_shape=tiny.SHAPE, pad_shape=tiny.SHAPE) for _ in range(n)]


def network(model: nn.Module, mc: int, strategy='entropy') -> Network:
    return Network(types.SimpleNamespace(model=model, cfg=None), resolve_strategy(dict(type=strategy, mc=mc)))


@torch.no_grad()
def passes(model: nn.Module, inputs: torch.Tensor, seeds: list, mc: int, native=True) -> torch.Tensor:
    """Logits of all passes, (T, N, C, h, w)."""
    with al_patch.native_resolution(model) if native else contextlib.nullcontext():
        return torch.cat(list(network(model, mc).passes(inputs, metas(len(inputs)), seeds)), 1).transpose(0, 1)


@torch.no_grad()
def naive_passes(model: nn.Module, inputs: torch.Tensor, seeds: list, mc: int, native=True) -> torch.Tensor:
    """Image by image and pass by pass through the whole network, with masks that hooks apply."""

    def mask(g, module, args, output):
        x = args[0]
        shape = x.shape[:2] + (1, ) * (x.ndim - 2) if isinstance(module, nn.Dropout2d) else x.shape
        return x * (torch.rand(shape, generator=g) >= module.p) / (1 - module.p)

    def one(image, seed, i):
        g = generator()
        g.manual_seed(seed_of(seed, i))
        handles = [module.register_forward_hook(functools.partial(mask, g)) for module in model.modules()
                   if isinstance(module, (nn.Dropout, nn.Dropout2d))]
        logits = model.eval().inference(image[None], metas(1))[0]
        for handle in handles:
            handle.remove()
        return logits

    with al_patch.native_resolution(model) if native else contextlib.nullcontext():
        return torch.stack([torch.stack([one(*each, i) for each in zip(inputs, seeds)]) for i in range(mc)])


# --- the passes ------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize('native', [True, False])
def test_passes_are_those_of_a_naive_loop(model_of, which, native):
    model = model_of(which)
    got, slow = (f(model, images(), SEEDS, 4, native) for f in (passes, naive_passes))
    assert got.shape == slow.shape == (4, 3, 3, *((8, 12) if native and which != 'slide' else tiny.SHAPE))
    assert_close(got, slow)
    assert got.std(0).mean() > .01  # the passes differ


@each_model
def test_an_image_is_the_same_in_any_batch(model_of, which):
    model, inputs = model_of(which), images()
    together = passes(model, inputs, SEEDS, 3)
    reverse = passes(model, inputs.flip(0), SEEDS[::-1], 3).flip(1)
    alone = torch.cat([passes(model, inputs[i:i + 1], SEEDS[i:i + 1], 3) for i in range(3)], 1)
    for other in (reverse, alone):
        assert_close(together, other)


@each_model
def test_masks_come_from_the_images_seed_and_the_number_of_the_pass(model_of, which):
    model, inputs = model_of(which), images(1).expand(3, -1, -1, -1)
    first = passes(model, inputs, [5, 5, 6], 4)
    torch.manual_seed(1)
    assert torch.equal(passes(model, inputs, [5, 5, 6], 4), first)
    assert_close(passes(model, inputs, [5, 5, 6], 2), first[:2])
    assert_close(first[:, 0], first[:, 1])
    different = [first[0, 0], first[1, 0], first[2, 0], first[3, 0], first[0, 2]]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(different) for b in different[:i])


def test_the_short_cut_is_taken_where_only_the_last_layer_is_behind_dropout(model_of, monkeypatch):
    taken, last_layer = [], Network.last_layer
    monkeypatch.setattr(Network, 'last_layer', lambda *args: taken.append(1) or last_layer(*args))
    for which in MODELS_OF:
        del taken[:]
        passes(model_of(which), images(), SEEDS, 2)
        assert bool(taken) == (which == 'head'), which


@pytest.mark.parametrize('mc', [1, 5])
def test_the_short_cut_gives_what_replaying_gives(model_of, mc):
    short, general = model_of('head'), model_of('own_head', **{'model.decode_head.concat_input': False})
    general.load_state_dict(short.state_dict())
    got, expected = (passes(model, images(), SEEDS, mc) for model in (short, general))
    assert_close(got, expected)


@pytest.mark.parametrize('at_once', [1, 2, 5, 100])
def test_how_many_passes_the_short_cut_takes_at_once_changes_nothing(model_of, at_once):
    model, features = model_of(), torch.randn(3, 8, 8, 12, generator=generator(0))
    parts = [list(network(model, 5).last_layer(
        features, [[generator(i, seed) for seed in SEEDS] for i in range(5)], n)) for n in (at_once, 5)]
    assert max(part.shape[1] for part in parts[0]) == min(at_once, 5) and len(parts[0]) == -(-5 // at_once)
    assert_close(torch.cat(parts[0], 1).detach(), torch.cat(parts[1], 1).detach())


@pytest.mark.parametrize('kind', [nn.Dropout, nn.Dropout2d])
def test_masks_are_drawn_on_the_cpu_whatever_the_device_is(kind, model_of):
    """`meta` stands for a device: a mask of its own would ask for a generator of its own."""
    x = torch.randn(2, 3, 4, 5)
    got = [al_patch.apply_dropout(kind(.4), [generator(i) for i in range(2)], [], x.to(device))
           for device in ('cpu', 'meta')]
    assert got[1].is_meta and got[1].shape == got[0].shape and (got[0] == 0).any()
    model = model_of().to('meta')
    [logits] = network(model, 2).last_layer(
        torch.empty(3, 8, 8, 12, device='meta'), [[generator(i, seed) for seed in SEEDS] for i in range(2)], 2)
    assert logits.is_meta and logits.shape == (3, 2, 3, 8, 12)


def test_one_pass_is_without_dropout(model_of):
    model = model_of('both')
    with torch.no_grad(), al_patch.native_resolution(model):
        plain = model.eval().inference(images(), metas())
    assert torch.equal(passes(model.train(), images(), SEEDS, 1)[0], plain)


# --- what stays as it is ---------------------------------------------------------------------------------------------


@each_model
def test_nothing_but_dropout_leaves_eval_mode(model_of, which):
    model = model_of(which)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = []
    handles = [module.register_forward_hook(lambda module, *_: modes.append(module.training))
               for module in model.modules()]
    passes(model, images(), SEEDS, 3)
    assert modes and not any(modes) and not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == len(
        handles) and not any('forward' in vars(module) for module in model.modules())


def test_the_model_is_as_before_when_a_pass_fails(model_of):
    model = model_of('both')
    model.backbone.late.forward = None
    with pytest.raises(TypeError):
        passes(model, images(), SEEDS, 3)
    del model.backbone.late.forward
    assert not any('forward' in vars(module) or module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())


@pytest.mark.parametrize('which, once, again', [
    ('own_head', ['backbone.stem', 'backbone.stage', 'decode_head.convs.0.conv', 'decode_head.conv_cat.conv'],
     ['decode_head.conv_seg']),
    *((which, ['backbone.stem.0', 'backbone.side.0', 'backbone.stage.0'],
       ['backbone.late.0', 'decode_head.convs.0.conv']) for which in ('channels', 'elements')),
    ('both', ['backbone.stem.0', 'backbone.stage.0'], ['backbone.side.0', 'backbone.late.0'])])
def test_what_is_before_the_first_dropout_is_computed_once(model_of, which, once, again):
    """Also behind a function, such as `relu` or `cat`."""
    model = model_of(which)
    calls = count_calls(model, once + again)
    passes(model, images(), SEEDS, 6)
    assert calls == {**dict.fromkeys(once, 1), **dict.fromkeys(again, 1 + 6)}


@pytest.mark.parametrize('p, again', [(0, 1), (.3, 1 + 6)])
def test_what_is_before_the_first_dropout_is_computed_once_a_crop(model_of, p, again):
    """In slide inference, of two crops here; with a dropout in the backbone, or only in the head."""
    model = model_of('slide', **{'model.backbone': dict(type='DropoutBackbone', way='elements')})
    model.backbone.elements.p = p
    calls = count_calls(model, ['backbone.stem.0', 'backbone.late.0', 'decode_head.conv_seg'])
    passes(model, images(), SEEDS, 6)
    assert [*calls.values()] == [2, 2 * again, 2 * 7]


def test_a_forward_of_a_modules_own_is_used_and_survives(model_of):
    """As activation checkpointing sets it."""
    model, calls = model_of('both'), []
    expected = passes(model, images(), SEEDS, 3)
    for module in (model.backbone.stem, model.backbone.late, model.backbone.elements):
        module.forward = functools.partial(lambda forward, x: calls.append(1) or forward(x), module.forward)
    own = [vars(module)['forward'] for module in model.modules() if 'forward' in vars(module)]
    assert torch.equal(passes(model, images(), SEEDS, 3), expected) and len(calls) > 3
    assert [vars(module)['forward'] for module in model.modules() if 'forward' in vars(module)] == own


# --- which dropout counts --------------------------------------------------------------------------------------------

AUXILIARY = dict(type='FCNHead', in_channels=8, channels=8, in_index=0, num_classes=3, dropout_ratio=.5)


@pytest.mark.parametrize('auxiliary', [AUXILIARY, [AUXILIARY, AUXILIARY]], ids=['one', 'two'])
def test_dropout_of_auxiliary_heads_and_of_probability_zero_does_not_count(model_of, auxiliary):
    model = model_of(**{'model.auxiliary_head': auxiliary, 'model.backbone': dict(type='DropoutBackbone', way='both')})
    model.backbone.channels.p = 0
    assert dropouts_of(model) == [model.backbone.elements, model.decode_head.dropout]


@pytest.mark.parametrize('changes', [{}, {'model.auxiliary_head': AUXILIARY}], ids=['plain', 'auxiliary'])
@pytest.mark.parametrize('strategy', ['bald', 'variation_ratio', dict(type='entropy', mc=5)], ids=str)
def test_a_model_without_dropout_is_refused_before_training(make_cfg, train, strategy, changes):
    cfg = make_cfg(dict(strategy=strategy), changes={'model.decode_head.dropout_ratio': 0, **changes})
    with pytest.raises(ValueError, match='^`al.strategy.mc` should be 1 for a FCNHead and a backbone without dropout'):
        train(cfg)
    assert not osp.exists(osp.join(cfg.work_dir, 'round_0'))


def test_a_head_with_dropout_and_without_conv_seg(model_of):
    model = model_of('elements', **{'model.decode_head.dropout_ratio': .1})
    conv = model.decode_head.conv_seg
    expected = passes(model, images(), SEEDS, 3)
    del model.decode_head.conv_seg
    model.decode_head.last = conv
    model.decode_head.forward = lambda inputs: conv(model.decode_head.dropout(
        model.decode_head._forward_feature(inputs)))
    assert_close(passes(model, images(), SEEDS, 3), expected)


def test_dropout_that_is_never_called_is_an_error(model_of):
    model = model_of()
    model.decode_head.forward = lambda inputs: model.decode_head.conv_seg(model.decode_head._forward_feature(inputs))
    with pytest.raises(ValueError, match='^`al.strategy.mc` should be 1 for a FCNHead, .* but got 3'):
        passes(model, images(), SEEDS, 3)


# --- what is averaged over the passes --------------------------------------------------------------------------------


def batch(n: int = 3) -> dict:
    """A batch of the query dataloader, images of the input's size, one of them flipped."""
    samples = [SegDataSample(metainfo=dict(img_shape=tiny.SHAPE, ori_shape=tiny.SHAPE, flip=i == 1,
                                           flip_direction='horizontal' if i == 1 else None)) for i in range(n)]
    return dict(inputs=list((128 + 60 * images(n)).byte()), data_samples=samples)


def stacked_probs(model: nn.Module, native: bool) -> np.ndarray:
    """Probabilities of all passes over the batch, in the images' own direction. (T, N, C, h, w)"""
    inputs = model.data_preprocessor(batch())['inputs']
    probs = naive_passes(model, inputs, SEEDS, 5, native).softmax(2).double().numpy()
    probs[:, 1] = probs[:, 1, ..., ::-1]
    return probs


VIEWS = dict(native=al_patch.without_padding, full_res=al_patch.to_image)
EXPECTED = dict(  # from probabilities (T, N, C, h, w)
    probs_NCHW=lambda p: p.mean(0), squares_NCHW=lambda p: (p**2).mean(0),
    entropies_NHW=lambda p: -(p * np.log(p)).sum(2).mean(0),
    votes_NCHW=lambda p: (p.argmax(2)[:, :, None] == np.arange(3)[:, None, None]).mean(0))


def asks_for_all(probs_NCHW, entropies_NHW, votes_NCHW, squares_NCHW):
    return probs_NCHW[:, 0]


@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('which', ['head', 'both'])
@torch.no_grad()
def test_statistics_are_means_over_all_passes(model_of, which, view):
    model = model_of(which)
    probs = stacked_probs(model, view == 'native')
    found = list(network(model, 5, 'test_mc:asks_for_all').see(batch(), SEEDS, [VIEWS[view]]))
    assert len(found) == 3
    for n, seen in enumerate(found):
        [means] = seen.means
        assert tuple(seen.input_hw) == tiny.SHAPE and seen.features is None and set(means) == set(EXPECTED)
        for name, expected in EXPECTED.items():
            assert means[name].shape[0] == 1
            assert means[name][0].numpy() == pytest.approx(expected(probs)[n], abs=1e-4), name


@pytest.mark.parametrize('which', ['head', 'both'])
@torch.no_grad()
def test_features_are_those_of_the_pass_without_dropout(model_of, which):
    model = model_of(which)
    plain, mc = ([seen.features for seen in network(model, t, 'coreset').see(
        batch(), SEEDS, [VIEWS['native']])] for t in (1, 4))
    assert all(torch.equal(a, b) for a, b in zip(plain, mc)) and plain[0].shape == (8, 8, 12)


@pytest.mark.parametrize('unit', ['image', 'region', 'pixel'])
@torch.no_grad()
def test_the_map_of_bald(model_of, make_cfg, build, unit):
    """Of whole images it is at the logits' resolution, else that of the image's own pixels."""
    cfg, names = make_cfg(), tiny.NAMES[:3]
    runner = build(cfg)
    runner.model, pool = model_of('both'), Pool(cfg)
    al = parse_settings(dict(unit=unit, strategy=dict(type='bald', mc=5)))
    state = State(dict(seed=7, config={}, rounds=[dict(asked={})]), cfg.work_dir, al, runner, pool)
    this = Query(state, runner)
    found = {name: this.maps(seen) for name, seen in Network(runner, state.strategy).look(state, names, this.views)}
    inputs = runner.model.data_preprocessor(mmengine.dataset.pseudo_collate([pool[name] for name in names]))['inputs']
    p = naive_passes(runner.model, inputs, [seed_of(7, 'mc', 1, name) for name in names], 5,
                     unit == 'image').softmax(2)
    p = p.double().numpy()
    expected = EXPECTED['entropies_NHW'](p.mean(0)[None]) - EXPECTED['entropies_NHW'](p)
    assert list(found) == names
    for slow, (map_HW, maps) in zip(torch.from_numpy(expected), found.values()):
        assert maps == {} and map_HW.shape == slow.shape and slow.max() > .01
        assert map_HW.numpy() == pytest.approx(slow.numpy(), abs=1e-4)


def test_a_run_gives_the_same_again_and_does_not_depend_on_the_batch_size(make_cfg, train):
    asked = []
    for tag, size in (('a', 2), ('b', 2), ('c', 5)):
        cfg = make_cfg(dict(strategy=dict(type='bald', mc=3)), work_dir=make_cfg().work_dir + tag, changes={
            **tiny.NO_VAL, 'train_cfg.max_iters': 1, 'test_dataloader.batch_size': size})
        asked.append(train(cfg)[1][1]['asked'])
    assert asked[0] == asked[1] == asked[2]
