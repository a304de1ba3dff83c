"""The least time that a training step can take on this machine, and the share of it that a step reaches.

    python benchmarks/roofline.py [--batch-size 8 --samples 10 --width 48 ...] [--repeats 5] [--json FILE]
    python benchmarks/roofline.py --device cuda --batch-size 256 --peak-tflops 989 --peak-gbs 3350

Takes the settings of the model and the training as train_distributed.py does.

    FLOPs    of the convolutions, forward and backward, as torch.utils.flop_counter counts them (a multiply-add is two).
             All other layers count as none: memory bounds them
    bytes    counted from the layers: each reads its input and writes its output, one after another, as PyTorch runs
             them. In activations of a layer, forward and backward: convolution 2 and 4, normalisation 3 and 5,
             activation 2 and 3, shuffle 2 and 2, residual addition 3 and 3; the loss 5 of fp32. Weights: read once
             forward and twice backward. For each weight Adam reads four and writes three fp32 numbers; averaging reads
             two and writes one more

The compute floor is FLOPs / peak FLOP/s, the memory floor is bytes / peak bandwidth. A step takes at least the larger
one. Without --peak-tflops and --peak-gbs, the peaks are what a matrix product and a copy reach here, in the precision
of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import measure
from dogvae.commands import flags
from dogvae.config import Config
from dogvae.network.vae import VAE, Residual
from dogvae.training.step import Trainer

Shape = torch.Size


def bytes_of(layer: nn.Module, before: Shape, after: Shape, item: int) -> int:
    """Bytes that a layer moves for its activations, forward and backward, at `item` bytes a number.

    `before` and `after` are the shapes of its input and its output.
    """
    read, written = math.prod(before) * item, math.prod(after) * item
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return (read + written) + (2 * read + 2 * written)  # backward: x and dy for dw, dy again for dx, dx itself
    if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
        return (2 * read + written) + (4 * read + written)  # both ways: statistics first, then normalise
    if isinstance(layer, nn.PixelShuffle | nn.PixelUnshuffle):
        return 2 * (read + written)
    if isinstance(layer, Residual):  # besides its convolutions: two activations and the addition
        return (2 * (2 + 3) + 3 + 3) * read
    return (read + written) + (2 * read + written)


def count(config: Config) -> dict[str, float]:
    """GFLOP of an image in the encoder and of one sample of it in the decoder, GFLOP and GB of a step, weights."""
    size, n, k = config.model.image_size, config.batch_size, config.samples
    item = 2 if config.precision == "bf16" else 4
    moved = 0.0

    def add_bytes(layer: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal moved
        images = n * k if layer in in_decoder else n
        moved += bytes_of(layer, args[0].shape, out.shape, item) * images

    with torch.device("meta"):  # shapes without numbers: nothing is computed
        model = VAE(config.model)
        in_decoder = set(model.decoder.modules())
        for layer in model.modules():
            if isinstance(layer, Residual) or not list(layer.children()):
                layer.register_forward_hook(add_bytes)
        with FlopCounterMode(display=False) as counter:
            outputs, mu, logvar = model(torch.empty(1, 3, size, size), torch.empty(1, 1, *model.latent_shape))
            (outputs.sum() + mu.sum() + logvar.sum()).backward()
    flops = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    encoder, decoder = flops["VAE.encoder"] / 1e9, flops["VAE.decoder"] / 1e9
    weights = sum(p.numel() for p in model.parameters())
    if config.model.architecture == "default":
        moved += 4 * 3 * size**2 * item * n * k  # from opponent colours to red, green and blue
    moved += 5 * 3 * size**2 * 4 * n * k  # the loss
    moved += weights * (3 * item + 4 * 7 + (4 * 3 if config.ema else 0))
    return {
        "encoder_gflop": encoder,
        "decoder_gflop": decoder,
        "image_gflop": encoder + k * decoder,
        "step_gflop": (encoder + k * decoder) * n,
        "step_gb": moved / 1e9,
        "weights": weights,
        "gradient_mb": weights * 4 / 1e6,
    }


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call, after two calls that warm up."""
    seconds = []
    for i in range(repeats + 2):
        settle(device)
        began = time.perf_counter()
        work()
        settle(device)
        if i >= 2:
            seconds.append(time.perf_counter() - began)
    return seconds


def settle(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(device: torch.device, dtype: torch.dtype, repeats: int, side: int = 0) -> tuple[float, float]:
    """TFLOP/s of a matrix product, the best of two sizes, and GB/s of a copy; of each the fastest of `repeats`."""
    side = side or (8192 if device.type == "cuda" else 2048)
    flops = 0.0
    for n in (side, side // 2):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        flops = max(flops, 2 * n**3 / min(timed(lambda a=a, b=b: a @ b, device, repeats)))
    source = torch.zeros(side * side * 8, device=device)  # much larger than any cache
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), device, repeats))
    return flops / 1e12, 2 * source.nbytes / copy / 1e9


def measured(config: Config, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` training steps on images that are already on the device."""
    trainer = Trainer(config, device)
    size, n = config.model.image_size, config.batch_size
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=device)
    steps = iter(range(10**9))
    return timed(lambda: trainer.step(images, n, 0, next(steps), 10**6), device, repeats)


def floors(figures: dict[str, float], tflops: float, gbs: float) -> dict[str, float]:
    """The least seconds of a step, by its FLOPs and by its bytes; `figures` as `count` gives them."""
    return {"compute_s": figures["step_gflop"] / tflops / 1e3, "memory_s": figures["step_gb"] / gbs}


def main() -> None:
    parser = measure.parser(__doc__)
    flags.add_settings(parser)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=measure.cores(), help="(default: all cores)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: 5)")
    parser.add_argument("--peak-tflops", type=float, help="(default: a matrix product's, here)")
    parser.add_argument("--peak-gbs", type=float, help="(default: a copy's, here)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = Config.make(**{"batch_size": 8, **flags.given(args)})
    config = config.replace(precision="bf16" if Trainer(config.replace(width=4), device).bf16 else "fp32")
    found = count(config)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    tflops, gbs = peaks(device, dtype, args.repeats)
    tflops, gbs = args.peak_tflops or tflops, args.peak_gbs or gbs
    floor = floors(found, tflops, gbs)
    step = measure.summary(measured(config, device, args.repeats))
    share = max(floor.values()) / step["median"]
    lines = [
        f"{config.model.architecture} network, width {config.model.width}, latent_dim {config.model.latent_dim}, "
        f"{config.model.image_size} x {config.model.image_size}, batch {config.batch_size}, K = {config.samples}, "
        f"{config.precision}, {args.threads} threads; {found['weights'] / 1e6:.2f} M weights",
        f"forward and backward: {found['encoder_gflop']:.3f} GFLOP an image for the encoder, "
        f"{found['decoder_gflop']:.3f} for each sample's decoder: {found['image_gflop']:.2f} an image",
        f"a step            {found['step_gflop']:9.1f} GFLOP {found['step_gb']:9.2f} GB",
        f"peaks             {tflops * 1e3:9.0f} GFLOP/s {gbs:7.1f} GB/s",
        f"floors            {floor['compute_s'] * 1e3:9.1f} ms    {floor['memory_s'] * 1e3:9.1f} ms",
        f"measured          {step['median'] * 1e3:9.1f} ms    ({step['low'] * 1e3:.1f}-{step['high'] * 1e3:.1f}), "
        f"{config.batch_size / step['median']:.1f} images/s: {share:.0%} of what the larger floor allows",
    ]
    figures = {
        "settings": config.to_dict(), **found, "peak_tflops": tflops, "peak_gbs": gbs,
        **floor, "step_s": step, "share": share,
    }  # fmt: skip
    measure.report(figures, lines, args)


if __name__ == "__main__":
    main()
