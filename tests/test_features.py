"""Features from any place of a model, in whole and in slide inference, and a pass that ends where they are."""
import glob
import os.path as osp
import types

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmengine.runner import Runner
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS

import al_patch
from al_patch import cell_shares, feature_map, resolve_strategy, token_map


@MODELS.register_module()
class PointBackbone(BaseModule):
    """1x1 convolutions: what a cell shows depends on one pixel alone. Linear, if asked, in it."""

    def __init__(self, stride: int = 1, is_linear: bool = False):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 1, stride=stride)
        self.act = torch.nn.Identity() if is_linear else torch.nn.Tanh()

    def forward(self, x: torch.Tensor) -> tuple:
        return (self.act(self.conv(x)), )


@MODELS.register_module()
class ManyMaps(BaseModule):
    """Two maps, the second one coarser, and what a transformer has beside them: a class token."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse, self.tokens = (torch.nn.Conv2d(3, n, s, stride=s) for n, s in ((8, 4), (5, 8), (6, 8)))
        self.block = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> tuple:
        tokens_NLK = self.tokens(x).flatten(2).mT
        self.block(torch.cat([9 * torch.ones_like(tokens_NLK[:, :1]), tokens_NLK], 1))
        return self.fine(x), (self.coarse(x), tokens_NLK.mean(1))


@MODELS.register_module()
class DoublingNeck(BaseModule):
    def forward(self, maps: tuple) -> list:
        return [2 * each for each in maps if isinstance(each, torch.Tensor)]


def network(make_cfg, strategy, **changes):
    """A network that sees an image, and the image's inputs and meta as a batch."""
    cfg = make_cfg(dict(strategy='random'), changes={'model.backbone': dict(type='PointBackbone'), **changes})
    torch.manual_seed(0)
    runner = Runner.from_cfg(cfg)
    data = next(iter(runner.build_dataloader(cfg.val_dataloader)))
    return al_patch.Network(runner, resolve_strategy(strategy)), data


def features_of(make_cfg, place='backbone', views=(), strategy='coreset', **changes) -> torch.Tensor:
    """Of both images of a batch, (N, K, h, w)."""
    net, data = network(make_cfg, dict(type=strategy, features_from=place), **changes)
    with torch.no_grad():
        return torch.stack([seen.features for seen in net.see(data, [0, 1], [*views])])


def slide(crop: tuple, stride: tuple) -> dict:
    return {'model.test_cfg': dict(mode='slide', crop_size=crop, stride=stride)}


# --- slide inference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('crop, stride', [((20, 24), (8, 11)), ((32, 20), (32, 7)), ((13, 17), (5, 9))], ids=str)
@pytest.mark.parametrize('views', [[], [al_patch.as_it_is]], ids=['features alone', 'with logits'])
def test_overlapping_windows_give_whole_inferences_features(make_cfg, crop, stride, views):
    """Six windows at least; the last is shifted back, to no multiple of the stride."""
    whole, seen = features_of(make_cfg), features_of(make_cfg, views=views, **slide(crop, stride))
    assert whole.shape == (2, 8, *tiny.SHAPE) and seen.numpy() == pytest.approx(whole.numpy(), abs=1e-5)


def test_at_a_stride_cells_of_windows_are_shared_out_by_area(make_cfg):
    """Where a window begins inside a cell its cells lie between those of the image; linear features lie there, too, of
    an image that is a ramp."""
    changes = {'model.backbone': dict(type='PointBackbone', stride=4, is_linear=True)}
    net, data = network(make_cfg, 'coreset', **changes, **slide((20, 24), (8, 11)))
    ramp = torch.arange(32.)[:, None] + 2 * torch.arange(48.)
    inputs = torch.stack([ramp, -ramp, ramp / 3])[None].repeat(2, 1, 1, 1)
    windows = al_patch.Windows(net.model, 'backbone', True)
    with torch.no_grad(), windows.open(inputs):
        net.model.inference(inputs, [dict(sample.metainfo) for sample in data['data_samples']])
    whole = net.model.backbone(inputs)[0]
    assert windows.mean().shape == whole.shape == (2, 8, 8, 12)
    off = (windows.mean() - whole).abs() / whole.std()
    assert off[..., 1:-1, 1:-1].mean() < .06  # half a cell at the borders of windows, where there is no neighbour
    shifted = slide((20, 24), (4, 8))  # windows begin at the edges of cells
    net.model.test_cfg = ConfigDict(shifted['model.test_cfg'])
    windows = al_patch.Windows(net.model, 'backbone', True)
    with torch.no_grad(), windows.open(inputs):
        net.model.inference(inputs, [dict(sample.metainfo) for sample in data['data_samples']])
    assert windows.mean().numpy() == pytest.approx(whole.detach().numpy(), rel=1e-4, abs=1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*[st.integers(1, 40)] * 6)
def test_windows_are_those_of_mmsegs_slide_inference(h, w, crop_h, crop_w, stride_h, stride_w):
    """As its own loop hands them to `encode_decode`."""
    test_cfg, inputs, seen = ConfigDict(mode='slide', crop_size=(crop_h, crop_w), stride=(
        min(stride_h, crop_h), min(stride_w, crop_w))), torch.arange(h * w).view(1, 1, h, w).float(), []

    def look(window, metas):
        seen.append(divmod(int(window.min()), w))
        return torch.zeros(1, 1, *window.shape[2:])

    model = types.SimpleNamespace(test_cfg=test_cfg, encode_decode=look, out_channels=1)
    EncoderDecoder.slide_inference(model, inputs, [{}])
    assert [*al_patch.window_starts(test_cfg, (h, w))] == seen


def test_windows_of_another_kind_are_refused(make_cfg):
    net, data = network(make_cfg, dict(type='coreset', features_from='backbone'), **slide((20, 24), (8, 11)))
    net.model.inference = lambda inputs, metas: net.model.encode_decode(inputs[..., 3:23, 2:26], metas)
    with pytest.raises(ValueError, match="`model.test_cfg.mode` should be 'whole' for features of a EncoderDecoder"):
        [*net.see(data, [0, 1], [])]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.data())
def test_every_cell_of_a_window_lies_in_the_image_once_and_ones_stay_ones(size, window, cells, data):
    window, cells = min(size, window), min(cells, window)
    starts = {0, size - window, data.draw(st.integers(0, size - window))}
    for start in starts:
        shares = cell_shares(size, start, window, cells)
        assert (shares >= 0).all() and (shares <= 1 + 1e-9).all()
        cell = size / len(shares)  # a window's cell is shared out in full
        assert (shares.sum(0) * cell).tolist() == pytest.approx([window / cells] * cells)
        own = [start + a * window / cells for a in range(cells + 1)]
        slow = [[max(0., min((i + 1) * cell, own[a + 1]) - max(i * cell, own[a])) / cell for a in range(cells)]
                for i in range(len(shares))]
        assert shares.numpy() == pytest.approx(np.array(slow), abs=1e-9)
    both = cell_shares(size, 0, window, cells), cell_shares(size, size - window, window, cells)
    weight = sum(each.sum(1) for each in both)
    ones = sum((each * torch.ones(cells)).sum(1) for each in both) / weight
    assert ones[weight > 0].tolist() == pytest.approx([1] * int((weight > 0).sum()))


def test_a_run_with_slide_inference_asks_as_one_with_whole_inference(make_cfg, train):
    """CoreSet, on features that do not depend on windows."""
    picks = []
    for number, more in enumerate(({}, slide((20, 24), (8, 11)))):
        cfg = make_cfg(dict(strategy=dict(type='coreset', features_from='backbone'), initial=3, budget=3, rounds=1),
                       changes={**tiny.NO_VAL, 'train_cfg.max_iters': 2, 'model.backbone': dict(type='PointBackbone'),
                                **more})
        cfg.work_dir += f'_{number}'
        _, rounds = train(cfg)
        picks.append([*rounds[1]['asked']])
    assert picks[0] == picks[1]


@pytest.mark.parametrize('unit', ['image', dict(type='region', size=[8, 8]), 'pixel'])
@pytest.mark.parametrize('strategy', ['coreset', 'badge', 'real'])
def test_strategies_with_vectors_run_with_slide_inference(make_cfg, train, unit, strategy):
    _, rounds = train(make_cfg(dict(unit=unit, strategy=strategy, initial=3, budget=3, rounds=1), changes={
        **tiny.NO_VAL, 'train_cfg.max_iters': 1, **slide((20, 24), (8, 11))}))
    assert len(rounds) == 2 and rounds[1]['asked']


# --- places ----------------------------------------------------------------------------------------------------------


def test_places_of_a_model(make_cfg):
    """A backbone of several maps, of which the head reads one or more; a neck; any module by its name."""
    def of(place, **more):
        return features_of(make_cfg, place, **{'model.backbone': dict(type='ManyMaps'), **more})

    neck = {'model.neck': dict(type='DoublingNeck')}
    fine, both, doubled = of('backbone.fine'), of('backbone', **neck), of('neck', **neck)
    coarse = F.interpolate(of('backbone.coarse'), (8, 12))
    assert fine.shape == (2, 8, 8, 12) and both.shape == (2, 13, 8, 12)
    assert torch.equal(both, torch.cat([fine, coarse], 1))  # all go into the neck
    assert torch.equal(doubled, 2 * fine)  # the last of one
    several = {'model.decode_head.in_index': [0, 1], 'model.decode_head.in_channels': [8, 5],
               'model.decode_head.input_transform': 'resize_concat'}
    assert torch.equal(of('backbone', **several), both)
    assert torch.equal(of('backbone', **{'model.decode_head.in_index': 0}), fine)
    tokens = of('backbone.block', **{'model.decode_head.in_index': 0})
    assert torch.equal(tokens, of('backbone.tokens', **{'model.decode_head.in_index': 0}))
    head = of('decode_head', **{'model.decode_head.in_index': 0})
    assert torch.equal(head, of('decode_head.convs', **{'model.decode_head.in_index': 0}))


@pytest.mark.parametrize('more', [0, 1, 2, 5])
@pytest.mark.parametrize('shape', [(4, 6), (16, 16), (32, 64), (1, 7)])
def test_tokens_become_the_map_that_they_were(shape, more):
    maps = torch.randn(2, 3, *shape)
    tokens = torch.cat([torch.zeros(2, more, 3), maps.flatten(2).mT], 1)
    assert torch.equal(token_map(tokens, tuple(16 * n for n in shape)), maps)


def test_what_is_no_map_is_refused(make_cfg):
    for place, text in (('neck', "'neck'.* has not a module of this name"), ('backbone.stem', "'backbone.stem'")):
        with pytest.raises(ValueError, match=f'`al.strategy.features_from` should be where features are.*{text}'):
            features_of(make_cfg, place)
    model = network(make_cfg, 'coreset')[0].model
    with pytest.raises(ValueError, match='maps .N, K, h, w. or tokens'):
        feature_map(model, 'backbone', torch.zeros(2, 8), (32, 48))


def test_a_place_that_is_not_there_is_an_error_before_any_training(make_cfg, train):
    cfg = make_cfg(dict(strategy=dict(type='coreset', features_from='backbone.layer9')))
    with pytest.raises(ValueError, match="features_from.*'backbone.layer9'"):
        train(cfg)
    assert not osp.exists(osp.join(cfg.work_dir, 'round_0'))


def test_features_without_vectors_are_refused():
    with pytest.raises(ValueError, match='`al.strategy.features_from` should be left out for entropy, which embeds'):
        resolve_strategy(dict(type='entropy', features_from='backbone'))
    with pytest.raises(ValueError, match='should be left out for contextual_diversity, which embeds no'):
        resolve_strategy(dict(type='contextual_diversity', features_from='backbone'))


# --- what does not run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('strategy, ran', [
    (dict(type='coreset', features_from='backbone'), []), (dict(type='coreset', features_from='backbone.stem'), []),
    ('coreset', ['convs']), (dict(type='coreset', score='entropy', features_from='backbone'), ['conv_seg', 'convs']),
    (dict(type='badge', features_from='backbone'), ['conv_seg', 'convs']), ('real', ['conv_seg', 'convs'])], ids=str)
@pytest.mark.parametrize('more', [{}, slide((20, 24), (8, 11))], ids=['whole', 'slide'])
def test_what_comes_after_the_features_runs_only_where_it_is_asked_for(make_state, strategy, ran, more):
    state = make_state(dict(strategy=strategy, initial=3, budget=2), changes={**tiny.NO_VAL, **more})
    al_patch.add_round(state, al_patch.initial_images(state))
    head, calls = state.model.decode_head, set()
    for name in ('convs', 'conv_seg'):
        getattr(head, name).register_forward_hook(lambda *_, name=name: calls.add(name))
    query = al_patch.Query(state, state.runner)
    network = al_patch.Network(state.runner, query.strategy)
    for _, seen in network.look(state, query.names, query.views):
        assert seen.features is not None and bool(seen.means) == ('conv_seg' in ran)
    assert sorted(calls) == ran


def test_a_segmentor_without_windows_of_its_own_gives_features(make_cfg):
    """One whose `inference` knows no `encode_decode`."""
    net, data = network(make_cfg, dict(type='coreset', features_from='backbone'))
    expected = features_of(make_cfg)
    model = net.model

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.decode_head, self.align_corners = model.backbone, model.decode_head, False
            self.data_preprocessor, self.test_cfg = model.data_preprocessor, model.test_cfg

        def inference(self, inputs, metas):
            return F.interpolate(self.decode_head(self.backbone(inputs)), inputs.shape[2:])

    net.trainer.model = Plain()
    for views in ([], [al_patch.as_it_is]):
        plain = al_patch.Network(net.trainer, resolve_strategy(dict(type='coreset', features_from='backbone')))
        with torch.no_grad():
            found = torch.stack([seen.features for seen in plain.see(data, [0, 1], views)])
        assert torch.equal(found, expected)


# --- flips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('more', [{}, slide((20, 24), (8, 11))], ids=['whole', 'slide'])
def test_a_mirrored_pass_counts_as_much_as_the_other(make_cfg, more):
    changes = {'model.backbone': dict(type='TinyBackbone'), **more}
    net, data = network(make_cfg, dict(type='bald', mc=1, flip=True), **changes)
    with torch.no_grad():
        [mean] = [seen.means[0] for seen in net.see(data, [0, 1], [al_patch.to_image])][:1]
        inputs = net.model.data_preprocessor(data, False)['inputs']
        metas = [dict(sample.metainfo) for sample in data['data_samples']]
        p = [net.model.inference(inputs, metas), net.model.inference(inputs.flip(-1), metas).flip(-1)]
    p = [each[0].softmax(0) for each in p]
    entropies = [torch.special.entr(each).sum(0) for each in p]
    assert mean['probs_NCHW'][0].numpy() == pytest.approx((sum(p) / 2).numpy(), abs=1e-5)
    assert mean['entropies_NHW'][0].numpy() == pytest.approx((sum(entropies) / 2).numpy(), abs=1e-5)
    assert not torch.allclose(p[0], p[1], atol=1e-3)


def test_flips_double_the_passes_with_dropout(make_cfg):
    """20 more, with masks of their own."""
    changes = {'model.backbone': dict(type='TinyBackbone'), 'model.decode_head.dropout_ratio': .5}
    net, data = network(make_cfg, dict(type='bald', mc=3, flip=True), **changes)
    given, plain = [], net.passes

    def passes(inputs, metas, seeds):
        for logits in plain(inputs, metas, seeds):
            given.append(logits)
            yield logits

    net.passes = passes
    with torch.no_grad():
        [*net.see(data, [0, 1], [al_patch.as_it_is])]
    stacked = torch.cat(given, 1)
    assert stacked.shape[1] == 6 and len({float(each.sum()) for each in stacked[0]}) == 6


def test_what_compares_passes_may_compare_an_image_and_its_mirror(make_cfg, train):
    _, rounds = train(make_cfg(dict(strategy=dict(type='bald', mc=1, flip=True), rounds=1), changes={
        **tiny.NO_VAL, 'train_cfg.max_iters': 1}))
    assert rounds[1]['strategy']['flip'] and len(rounds) == 2


# --- a committee -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('flip', [False, True])
def test_a_committee_of_checkpoints_counts_each_as_much(make_cfg, tmp_path, flip):
    """The model's own and the newest others; features are the model's, which keeps its weights."""
    changes = {'model.backbone': dict(type='TinyBackbone')}
    net, data = network(make_cfg, 'coreset', **changes)
    own, weights = {key: value.clone() for key, value in net.model.state_dict().items()}, []
    for number in (8, 9, 10, 100):
        weights.append({key: value + torch.randn_like(value) / 4 if value.is_floating_point() else value
                        for key, value in own.items()})
        torch.save(dict(state_dict=weights[-1]), tmp_path / f'iter_{number}.pth')
    torch.save(dict(state_dict=own), tmp_path / 'best_mIoU_iter_9.pth')
    net.model.al_weights = str(tmp_path / 'best_mIoU_iter_9.pth')
    setting = dict(type='bald', mc=1, embed='features', select='kcenter', committee=3, flip=flip)
    third = al_patch.Network(net.trainer, resolve_strategy(setting))
    with torch.no_grad():
        [plain], [seen] = ([*each.see(data, [0, 1], [al_patch.to_image])][:1] for each in (net, third))
        inputs, p = net.model.data_preprocessor(data, False)['inputs'], []
        metas = [dict(sample.metainfo) for sample in data['data_samples']]
        for each in (weights[3], weights[2], own):  # of 100 and 10 iterations
            net.model.load_state_dict(each)
            p += [net.model.inference(inputs, metas)[0].softmax(0)]
            p += [net.model.inference(inputs.flip(-1), metas).flip(-1)[0].softmax(0)] * flip
    assert seen.means[0]['probs_NCHW'][0].numpy() == pytest.approx((sum(p) / len(p)).numpy(), abs=1e-5)
    entropies = [torch.special.entr(each).sum(0) for each in p]
    assert seen.means[0]['entropies_NHW'][0].numpy() == pytest.approx((sum(entropies) / len(p)).numpy(), abs=1e-5)
    assert torch.equal(seen.features, plain.features) and not torch.allclose(p[0], p[-1], atol=1e-3)
    assert all(torch.equal(value, own[key]) for key, value in net.model.state_dict().items())
    with pytest.raises(ValueError, match='committee` = 7 needs so many checkpoints .* has 5: set .*max_keep_ckpts'):
        al_patch.Network(net.trainer, resolve_strategy(dict(setting, committee=7)))


KEEPS = {**tiny.NO_VAL, 'train_cfg.max_iters': 6, 'default_hooks.checkpoint.interval': 2,
         'default_hooks.checkpoint.max_keep_ckpts': 3}


def test_a_run_asks_its_committee_and_one_that_goes_on_asks_the_same(make_cfg, train, monkeypatch):
    setting = dict(strategy=dict(type='bald', mc=1, committee=3), rounds=1)
    _, rounds = train(make_cfg(setting, changes=KEEPS))
    alone = make_cfg(dict(setting, strategy=dict(type='bald', committee=1, flip=True, mc=1)),
                     work_dir=make_cfg().work_dir + 'alone', changes=KEEPS)
    assert train(alone)[1][1]['asked'] != rounds[1]['asked']
    cfg = make_cfg(setting, work_dir=make_cfg().work_dir + 'again', changes=KEEPS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(al_patch, 'query', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(cfg)
    cfg.resume = True
    assert train(cfg)[1][1]['asked'] == rounds[1]['asked'] and rounds[1]['strategy']['committee'] == 3


@pytest.mark.parametrize('keeps', [dict(interval=4), dict(max_keep_ckpts=2), dict(interval=-1)])
def test_a_committee_that_no_round_keeps_is_refused_before_training(make_cfg, train, keeps):
    cfg = make_cfg(dict(strategy=dict(type='bald', mc=1, committee=3)), changes={
        **KEEPS, **{f'default_hooks.checkpoint.{key}': value for key, value in keeps.items()}})
    with pytest.raises(ValueError, match='committee` = 3 needs so many checkpoints of each round: set `default_hooks'
                                         '.checkpoint.interval` to 2 or less, and `.max_keep_ckpts` to 3 or -1'):
        train(cfg)
    assert not glob.glob(osp.join(cfg.work_dir, '**', '*.pth'), recursive=True)


# --- heads without a last layer `conv_seg` ---------------------------------------------------------------------------

VIT = dict(type='VisionTransformer', img_size=tiny.SHAPE, patch_size=8, embed_dims=16, num_layers=2, num_heads=2,
           out_indices=(1, ), final_norm=True)
SEGMENTER = dict(type='SegmenterMaskTransformerHead', in_channels=16, channels=16, embed_dims=16, num_classes=3,
                 num_layers=1, num_heads=2, dropout_ratio=0., loss_decode=dict(type='CrossEntropyLoss'))
KNET = dict(
    type='IterativeDecodeHead', num_stages=1, kernel_update_head=[dict(
        type='KernelUpdateHead', num_classes=3, num_ffn_fcs=2, num_heads=2, num_mask_fcs=1, feedforward_channels=16,
        in_channels=8, out_channels=8, dropout=0., conv_kernel_size=1, ffn_act_cfg=dict(type='ReLU', inplace=True),
        with_ffn=True, feat_transform_cfg=dict(conv_cfg=dict(type='Conv2d'), act_cfg=None), kernel_updator_cfg=dict(
            type='KernelUpdator', in_channels=8, feat_channels=8, out_channels=8, act_cfg=dict(
                type='ReLU', inplace=True), norm_cfg=dict(type='LN')))],
    kernel_generate_head=dict(type='FCNHead', in_channels=8, channels=8, num_convs=1, concat_input=False, num_classes=3,
                              norm_cfg=dict(type='BN'), loss_decode=dict(type='CrossEntropyLoss')))


@pytest.mark.parametrize('unit', ['image', dict(type='region', size=[8, 8])], ids=['image', 'region'])
@pytest.mark.parametrize('backbone, head', [(VIT, SEGMENTER), (dict(type='TinyBackbone'), KNET)],
                         ids=['segmenter', 'knet'])
def test_heads_without_a_last_layer_have_vectors_from_the_backbone(make_cfg, train, backbone, head, unit):
    def changes() -> dict:
        return {**tiny.NO_VAL, 'train_cfg.max_iters': 1, 'model.backbone': dict(_delete_=True, **backbone),
                'model.decode_head': dict(_delete_=True, **head)}

    with pytest.raises(ValueError, match="`al.strategy.features_from` should be .* 'backbone', but got 'decode_head'"):
        train(make_cfg(dict(unit=unit, strategy='coreset'), changes=changes()))
    strategy = dict(type='real', features_from='backbone', clusters=3)
    _, rounds = train(make_cfg(dict(unit=unit, strategy=strategy, initial=4, budget=4, rounds=1), changes=changes()))
    assert sum(units[0] if units else 1 for units in rounds[1]['asked'].values()) == 4
