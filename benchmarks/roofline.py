"""The least time that a training step can take on this machine, and the share of it that a step reaches.

    python benchmarks/roofline.py [--batch-size 8 --samples 10 --width 64 ...] [--repeats 5] [--json FILE]
    python benchmarks/roofline.py --device cuda --batch-size 256 --peak-tflops 989 --peak-gbs 3350

Takes the model's and the training's settings as train_distributed.py does. FLOPs (a multiply-add is two) and bytes are
counted from the layers, forward and backward, and the FLOPs compared with what torch.utils.flop_counter sees:

    FLOPs    of a convolution: 2 * k^2 * c_in * c_out * pixels forward (those of the output; of the input if it is
             transposed), as many for the gradient of its weights, and for that of its input, which the first layer
             does not need. All else counts as none: memory bounds it
    bytes    every layer reads what it needs and writes what it makes, one after another, as PyTorch runs them. In
             pictures of a layer, forward and backward: convolution 2 and 4, normalisation 3 and 5, activation 2 and 3,
             loss 5 of fp32. Weights: read once forward and twice backward; Adam reads four and writes three fp32
             numbers for each, averaging them two and one more

The compute floor is FLOPs / peak FLOP/s, the memory floor bytes / peak bandwidth; a step takes at least the larger one.
Unless they are given, the peaks are what a matrix product and a copy reach here, in the precision of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import measure
from dogvae.commands import flags
from dogvae.config import Config
from dogvae.network.vae import VAE
from dogvae.training.step import Trainer

Shape = torch.Size


def layers(config: Config) -> list[tuple[str, nn.Module, Shape, Shape]]:
    """(name, layer, shape of its input, of its output) for one image and one sample, in the order they run."""
    with torch.device("meta"):
        model = VAE(config.model)
        seen: list[tuple[str, nn.Module, Shape, Shape]] = []
        hooks = []
        for name, module in model.named_modules():
            if not list(module.children()) and name:

                def note(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                    seen.append((name, module, args[0].shape, out.shape))

                hooks.append(module.register_forward_hook(note))
        model.eval()(torch.empty(1, 3, *2 * [config.model.image_size]), torch.empty(1, 1, *model.latent_shape))
        for hook in hooks:
            hook.remove()
    return seen


def flops_of(layer: nn.Module, before: Shape, after: Shape, first: bool = False) -> int:
    """FLOPs of a layer, forward and backward; only convolutions count, the rest is bound by memory."""
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return 0
    pixels = math.prod((before if isinstance(layer, nn.ConvTranspose2d) else after)[2:])
    forward = 2 * math.prod(layer.kernel_size) * layer.in_channels * layer.out_channels * pixels
    return forward * (2 if first else 3)


def bytes_of(layer: nn.Module, before: Shape, after: Shape, item: int) -> int:
    """Bytes that a layer moves for its activations, forward and backward, at `item` bytes a number."""
    read, written = math.prod(before) * item, math.prod(after) * item
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return (read + written) + (2 * read + 2 * written)  # backward: x and dy for dw, dy again for dx, dx itself
    if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
        return (2 * read + written) + (4 * read + written)  # statistics first, then normalise; so too backward
    return (read + written) + (2 * read + written)


def count(config: Config) -> dict[str, float]:
    """GFLOP of an image in the encoder, of a sample of it in the decoder; GFLOP and GB of a step; weights."""
    found = layers(config)
    item = 2 if config.precision == "bf16" else 4
    size, n, k = config.model.image_size, config.batch_size, config.samples
    gflop = {"encoder": 0.0, "decoder": 0.0}
    moved, weights = 0.0, 0
    for i, (name, layer, before, after) in enumerate(found):
        part = name.split(".")[0]
        gflop[part] += flops_of(layer, before, after, first=i == 0) / 1e9
        moved += bytes_of(layer, before, after, item) * n * (k if part == "decoder" else 1)
        weights += sum(p.numel() for p in layer.parameters())
    if config.model.architecture == "default":  # from opponent colours to red, green and blue
        gflop["decoder"] += 2 * 2 * 9 * size**2 / 1e9  # its matrix has no gradient
        moved += 4 * 3 * size**2 * item * n * k
    moved += 5 * 3 * size**2 * 4 * n * k
    moved += weights * (3 * item + 4 * 7 + (4 * 3 if config.ema else 0))
    per_image = gflop["encoder"] + k * gflop["decoder"]
    return {
        "encoder_gflop": gflop["encoder"],
        "decoder_gflop": gflop["decoder"],
        "image_gflop": per_image,
        "step_gflop": per_image * n,
        "step_gb": moved / 1e9,
        "weights": weights,
        "gradient_mb": weights * 4 / 1e6,
    }


def counted(config: Config) -> float:
    """GFLOP of a forward and backward pass for one image, as PyTorch's own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = VAE(config.model)
        x = torch.empty(1, 3, *2 * [config.model.image_size])
        with FlopCounterMode(display=False) as counter:
            logits, mu, logvar = model(x, torch.empty(config.samples, 1, *model.latent_shape))
            (logits.sum() + mu.sum() + logvar.sum()).backward()
    return counter.get_total_flops() / 1e9


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call, after two that warm up."""
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
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(device: torch.device, dtype: torch.dtype, repeats: int, side: int = 0) -> tuple[float, float]:
    """TFLOP/s of a matrix product and GB/s of a copy: the best of some, and of two sizes."""
    side = side or (8192 if device.type == "cuda" else 2048)
    flops = 0.0
    for n in (side, side // 2):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        flops = max(flops, 2 * n**3 / min(timed(lambda a=a, b=b: a @ b, device, repeats)))
    source = torch.zeros(side * side * 8, device=device)  # far beyond any cache
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), device, repeats))
    return flops / 1e12, 2 * source.nbytes / copy / 1e9


def measured(config: Config, device: torch.device, repeats: int) -> list[float]:
    """Seconds of our training step on images that are there already."""
    trainer = Trainer(config, device)
    size, n = config.model.image_size, config.batch_size
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=device)
    steps = iter(range(10**9))
    return timed(lambda: trainer.step(images, n, 0, next(steps), 10**6), device, repeats)


def floors(figures: dict[str, float], tflops: float, gbs: float) -> dict[str, float]:
    """Seconds that a step takes at least, by its FLOPs and by its bytes."""
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
    flop_counter = counted(config)
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
        f"{found['decoder_gflop']:.3f} for each sample's decoder: {found['image_gflop']:.2f} an image "
        f"(PyTorch's counter: {flop_counter:.2f})",
        f"a step            {found['step_gflop']:9.1f} GFLOP {found['step_gb']:9.2f} GB",
        f"peaks             {tflops * 1e3:9.0f} GFLOP/s {gbs:7.1f} GB/s",
        f"floors            {floor['compute_s'] * 1e3:9.1f} ms    {floor['memory_s'] * 1e3:9.1f} ms",
        f"measured          {step['median'] * 1e3:9.1f} ms    ({step['low'] * 1e3:.1f}-{step['high'] * 1e3:.1f}), "
        f"{config.batch_size / step['median']:.1f} images/s: {share:.0%} of what the larger floor allows",
    ]
    figures = {
        "settings": config.to_dict(), **found, "flop_counter_gflop": flop_counter, "peak_tflops": tflops,
        "peak_gbs": gbs, **floor, "step_s": step, "share": share,
    }  # fmt: skip
    measure.report(figures, lines, args)


if __name__ == "__main__":
    main()
