"""One config of every model family that mmseg ships, with random weights: what of active learning works with it.

    python tests/benchmarks/model_sweep.py [FAMILY ...] [-o sweep.jsonl]     # all families: about half an hour

Each family runs in a process of its own: entropy at the image and at the region unit; features (CoreSet; of the decode
head's last layer, else of the backbone) in whole and in slide inference; two passes of MC dropout; and one training
step on partly labelled images. Results go to a file of JSON lines as they come; what is in it is not run again.
MaskFormer and Mask2Former need mmdet, ConvNeXt and PoolFormer need mmpretrain.
"""
import argparse
import glob
import json
import os.path as osp
import subprocess
import sys
import types
import warnings

import numpy as np

import al_patch
import al_report

SIZE = 512 if 'mobilenet_v3' in sys.argv else 128  # its head pools windows of 49 x 49
PREFERRED = dict(  # the smaller one of a family, or the one that shows its own head
    beit='upernet', mae='upernet', san='san-vit-b16', setr='setr_vit-l_pup', swin='swin-tiny',
    twins='twins_pcpvt-s_fpn', vit='vit_deit-s16_upernet', convnext='convnext-tiny', poolformer='poolformer_s12',
    segnext='mscan-t',
    hrnet='fcn_hr18s', mask2former='swin-t', maskformer='swin-t', pidnet='pidnet-s', segmenter='segmenter_vit-t',
    segformer='mit-b0', knet='r50-d8_fcn', ocrnet='hr18s')


def config_of(family: str):
    """The family's config, without pretrained weights and at a size that a CPU can take."""
    import mmseg
    from mmengine.config import Config
    paths = sorted(glob.glob(osp.join(osp.dirname(mmseg.__file__), '.mim', 'configs', family, '*.py')))
    cfg = Config.fromfile(next((p for p in paths if PREFERRED.get(family, 'r50') in p), paths[0]))
    cfg.filename_used = osp.basename(cfg.filename)
    without_pretrained(cfg.model)
    if 'img_size' in cfg.model.get('backbone', ()):
        cfg.model.backbone.img_size = (SIZE, SIZE)
    if 'text_encoder' in cfg.model:
        cfg.model.text_encoder.templates = ['a photo of a {}.']  # of dozens, for each of 171 classes
    cfg.model.data_preprocessor.update(size=(SIZE, SIZE), size_divisor=None, test_cfg=None)
    return cfg


def without_pretrained(node) -> None:
    """Let a model's config begin with random weights, and run on a CPU."""
    if isinstance(node, dict):
        for key in ('pretrained', 'init_cfg'):
            if key in node:
                node[key] = None
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
        node = list(node.values())
    for child in node if isinstance(node, (list, tuple)) else ():
        without_pretrained(child)


def attempt(function) -> str:
    """'yes', or the last line of the reason."""
    try:
        function()
        return 'yes'
    except Exception as error:
        return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ""}'[:200]


def sweep(family: str) -> dict:
    import torch
    from mmengine.config import ConfigDict
    from mmengine.logging import MMLogger
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    register_all_modules()
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    result = dict(family=family)
    try:
        cfg = config_of(family)
        result['config'] = cfg.filename_used
        model = MODELS.build(cfg.model)
        if family == 'san':  # which can only load its weights
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        else:
            model.init_weights()
    except Exception as error:
        return {**result, 'build': f'{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}'}
    classes = al_patch.decode_head(model).num_classes
    rng = np.random.default_rng(0)

    def batch(labels: bool) -> dict:
        samples = []
        for i in range(2):
            sample = SegDataSample(metainfo=dict(ori_shape=(SIZE, SIZE), img_shape=(SIZE, SIZE), img_path=f'{i}.png',
                                                 pad_shape=(SIZE, SIZE), scale_factor=(1., 1.), flip=False))
            if labels:
                label = torch.full((1, SIZE, SIZE), 255)
                label[:, 16:48, 16:48] = torch.from_numpy(rng.integers(0, min(classes, 3), (1, 32, 32)))
                sample.gt_sem_seg = PixelData(data=label)
            samples.append(sample)
        return dict(inputs=[torch.from_numpy(rng.integers(0, 255, (3, SIZE, SIZE), np.uint8)) for _ in range(2)],
                    data_samples=samples)

    class Trainer:
        logger, cfg = MMLogger.get_current_instance(), ConfigDict(optim_wrapper=dict(type='OptimWrapper'))

    Trainer.model = model
    views = dict(image=[al_patch.as_it_is], region=[al_patch.without_padding, al_patch.to_image])
    slide = dict(mode='slide', crop_size=(SIZE, SIZE * 3 // 4), stride=(SIZE // 4, SIZE // 5))

    def query(strategy, unit: str, **test_cfg):
        strategy, model.test_cfg = al_patch.resolve_strategy(strategy), ConfigDict(cfg.model.test_cfg, **test_cfg)
        al_report.check_model(types.SimpleNamespace(model=model, strategy=strategy))
        units = al_patch.Whole() if unit == 'image' else al_patch.grid((SIZE, SIZE), (32, 32))
        with torch.no_grad():
            for seen in al_patch.Network(Trainer, strategy).see(
                    batch(False), [0, 1], views[unit] if strategy.needs_probs else []):
                for probs_CHW in (mean['probs_NCHW'][0] for mean in seen.means):
                    torch.testing.assert_close(probs_CHW.sum(0), torch.ones_like(probs_CHW[0]))
                assert unit == 'image' or not seen.means or seen.means[-1]['probs_NCHW'].shape[2:] == (SIZE, SIZE)
                if strategy.score is not al_patch.random_scores:
                    means = seen.means[-1]
                    assert torch.isfinite(al_patch.call_offering(strategy.score, means['probs_NCHW'], **means)).all()
                if strategy.embed:
                    share = units.weights(np.arange(units.number), seen.features.shape[1:], 'cpu')
                    vectors = al_patch.call_offering(strategy.embed, features_KHW=seen.features, weights_NP=share)
                    assert torch.isfinite(vectors).all() and len(vectors) == units.number

    def features(**test_cfg) -> str:
        for place in ('decode_head', 'backbone'):
            found = attempt(lambda place=place: [
                query(dict(type='coreset', features_from=place), unit, **test_cfg) for unit in views])
            if found == 'yes':
                return place
        return found

    def train():
        al_report.check_losses(model)
        al_patch.gather_labelled_pixels(model)
        Trainer.train_dataloader = types.SimpleNamespace(dataset=Images())
        model.train()
        al_report.check_void(Trainer)
        data = model.data_preprocessor(batch(True), True)
        losses = model.loss(data['inputs'], data['data_samples'])
        total = sum(value.mean() for key, value in losses.items() if 'loss' in key)
        assert torch.isfinite(total), 'the loss is not finite'
        total.backward()

    class Images:
        """The two images as a training set has them."""

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> dict:
            return {key: values[i] for key, values in batch(True).items()}

    result.update(image=attempt(lambda: query('entropy', 'image')), region=attempt(lambda: query('entropy', 'region')),
                  features=features(mode='whole'), slide=features(**slide),
                  mc=attempt(lambda: query(dict(type='bald', mc=2), 'image')), sparse=attempt(train))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('families', nargs='*')
    parser.add_argument('-o', '--output', default='model_sweep.jsonl')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print('RESULT' + json.dumps(sweep(args.one)))
        return
    import mmseg
    folder = osp.join(osp.dirname(mmseg.__file__), '.mim', 'configs')
    families = args.families or sorted(osp.basename(p) for p in glob.glob(osp.join(folder, '*')) if glob.glob(
        osp.join(p, '*.py')) and not osp.basename(p).startswith('_') and osp.basename(p) != 'dsdl')
    done = [json.loads(line) for line in open(args.output)] if osp.exists(args.output) else []
    for family in families:
        if family in [row['family'] for row in done]:
            continue
        try:
            command = [sys.executable, __file__, '--one', family]
            run = subprocess.run(command, capture_output=True, text=True, timeout=900)
            lines = [line for line in run.stdout.splitlines() if line.startswith('RESULT')]
            row = json.loads(lines[-1][6:]) if lines else dict(family=family, build=run.stderr.strip()[-200:])
        except subprocess.TimeoutExpired:
            row = dict(family=family, build='no answer in 15 minutes')
        done.append(row)
        with open(args.output, 'a') as file:
            file.write(json.dumps(row) + '\n')
        print(row, flush=True)
    columns = ('image', 'region', 'features', 'slide', 'mc', 'sparse')
    print('| family | config |' + ''.join(f' {c} |' for c in columns))
    for row in done:
        cells = [row['family'], row.get('config', ''), *(row.get(column, row.get('build')) for column in columns)]
        print('| ' + ' | '.join(map(str, cells)) + ' |')


if __name__ == '__main__':
    main()
