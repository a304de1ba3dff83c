"""What more workers bring: strong and weak scaling here, the gradients' exchange alone, and on paper 8 to 1,024 GPUs.

    python benchmarks/scaling.py [--workers 1 2] [--batch-size 16] [--repeats 5] [--json FILE]
    python benchmarks/scaling.py --device cuda --workers 1 2 4 8 --batch-size 256    # a GPU each

Workers are processes of --threads threads each, without Ray, that train by `dogvae.training.step`. Strong scaling keeps
the global batch, weak scaling the batch of a worker. All take turns, round by round. In each round a group of workers
also trains without exchanging gradients (DDP's no_sync; batch norm's statistics still go around) and sums up as many
bytes as the gradients have, alone. "Unconnected" are as many single workers at the same time that know nothing of each
other: what cores and memory that are shared can give, whoever trains on them.

On paper, from one worker's step T, gradients of B bytes, n workers, bandwidth w and latency a:

    exchange(n) = 2 (n - 1) / n * B / w + 2 a log2(n)          a ring for the bytes, a tree for the latency
    norms(n)    = L * 2 a log2(n)                              L waits for batch norm's sums, which nothing hides
    step(n)     = T + norms(n) + max(0, exchange(n) - h T)     h: the share of T behind which the exchange hides
    efficiency  = T / step(n)

With h = 2/3, the backward pass, and with h = 0, nothing hidden. The formula is compared with what is measured here: T
from unconnected workers, w from the bare sum, a from a sum of one number.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from typing import Any

import measure

BACKWARD = 2 / 3  # of a step's FLOPs
GPUS = (8, 16, 64, 256, 1024)


def exchange_s(n: int, nbytes: float, bandwidth: float, latency: float = 0.0) -> float:
    """Seconds to sum up `nbytes` over n workers in a ring: each sends 2 (n - 1) / n of them (Patarasuk & Yuan 2009)."""
    return 2 * (n - 1) / n * nbytes / bandwidth + 2 * latency * math.log2(n)


def step_s(
    n: int, alone: float, nbytes: float, bandwidth: float, latency: float, waits: int, hidden: float = BACKWARD
) -> float:
    """Seconds of a step on n workers, of which each needs `alone` for its own part."""
    norms = waits * 2 * latency * math.log2(n)
    return alone + norms + max(0.0, exchange_s(n, nbytes, bandwidth, latency) - hidden * alone)


def norm_waits(config: Any) -> int:
    """How often a step waits for sums of batch norm's statistics: once a layer forward, once backward."""
    from dogvae.network.norm import SyncBatchNorm
    from dogvae.network.vae import VAE

    return 2 * sum(isinstance(module, SyncBatchNorm) for module in VAE(config.model).modules())


def contend(args: argparse.Namespace) -> None:
    """One worker: in a turn it makes steps, makes them without exchange, and sums up bytes."""
    import torch
    import torch.distributed as dist

    from dogvae.config import Config
    from dogvae.data.dataset import rank_slice
    from dogvae.training.step import Trainer

    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    n = args.batch_size
    trainer = Trainer(Config.make(batch_size=n, samples=args.samples, width=args.width, norm=args.norm), device)
    mine = rank_slice(n, rank, world_size)
    images = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8)[mine].to(device)
    gradients, number = torch.zeros(trainer.nbytes // 4, device=device), torch.zeros(1, device=device)
    taken = iter(range(10**9))

    def timed(times: int, work: Any) -> float:
        if world_size > 1:
            dist.all_reduce(number)
        began = time.perf_counter()
        for _ in range(times):
            work()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    def step() -> None:
        trainer.step(images, n, 0, next(taken), 10**6)

    def alone() -> None:
        with trainer.net.no_sync():
            step()

    def turn(steps: int) -> dict[str, float]:
        timed(1, step)
        answer = {"step_s": timed(steps, step)}
        if world_size > 1:
            answer["alone_s"] = timed(steps, alone)
            answer["sum_s"] = timed(steps, lambda: dist.all_reduce(gradients))
            answer["latency_s"] = timed(10 * steps, lambda: dist.all_reduce(number))
        return answer

    if rank > 0:
        for _ in range(args.repeats + 1):
            turn(args.steps)
        return
    for order in measure.orders():
        measure.say(turn(order["steps"]))


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of workers and each kind of scaling."""
    names: dict[str, tuple[int, int]] = {}  # workers, global batch
    for n in args.workers:
        for kind in args.kinds:
            batch = args.batch_size * (n if kind == "weak" else 1)
            names[f"{kind} {n}"] = (n, batch)
            if n > 1 and args.device == "cpu":  # n at once, of which each has its part of the batch
                names |= {f"unconnected {kind} {n}.{i}": (1, batch // n) for i in range(n)}
    commands = {}
    for name, (n, batch) in names.items():
        command = measure.child(
            __file__, "--contender", "--threads", args.threads, "--batch-size", batch, "--samples", args.samples,
            "--width", args.width, "--norm", args.norm, "--device", args.device,
            "--repeats", args.repeats, "--steps", args.steps,
        )  # fmt: skip
        commands[name] = (measure.ranks(n, command) if n > 1 else command, args.threads)
    rounds: list[dict[str, Any]] = []
    with measure.contenders(commands) as started:
        groups: dict[str, list[measure.Contender]] = {}
        for name, contender in started.items():
            groups.setdefault(name.split(".")[0], []).append(contender)
        for number in range(args.repeats + 1):  # the first warms up
            answers: dict[str, Any] = {}
            for name in list(groups) if number % 2 == 0 else list(reversed(groups)):
                for contender in groups[name]:
                    contender.order(steps=args.steps)
                answers[name] = [contender.answer() for contender in groups[name]]
            rounds.append(answers)
    return [
        row(kind, n, args.batch_size * (n if kind == "weak" else 1), rounds[1:], args)
        for kind in args.kinds
        for n in args.workers
    ]


def row(kind: str, n: int, batch: int, rounds: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What was measured of n workers, beside what the formula says."""
    name = f"{kind} {n}"
    seconds = [answers[name][0] for answers in rounds]
    single = f"{kind} {min(args.workers)}"
    base = (args.batch_size * (min(args.workers) if kind == "weak" else 1)) / min(args.workers)
    rates = [batch / s["step_s"] for s in seconds]
    singles = [base / answers[single][0]["step_s"] for answers in rounds]  # images/s of a worker in the least group
    found: dict[str, Any] = {
        "kind": kind, "workers": n, "batch": batch, "images_per_s": measure.summary(rates),
        "efficiency": measure.summary([rate / (n * one) for rate, one in zip(rates, singles, strict=True)]),
    }  # fmt: skip
    if n > 1:
        found["exchange_share"] = measure.summary([1 - s["alone_s"] / s["step_s"] for s in seconds])
        found["sum_s"] = measure.summary([s["sum_s"] for s in seconds])
        found["latency_s"] = measure.summary([s["latency_s"] for s in seconds])
    if f"unconnected {name}" in rounds[0]:
        each = [max(one["step_s"] for one in answers[f"unconnected {name}"]) for answers in rounds]
        found["unconnected"] = measure.ratio(rates, [batch / s for s in each])
        alone, nbytes = measure.summary(each)["median"], args.gradient_bytes
        bandwidth = exchange_s(n, nbytes, 1.0) / found["sum_s"]["median"]
        latency = found["latency_s"]["median"] / (2 * math.log2(n))
        found["gb_per_s"] = bandwidth / 1e9
        found["measured_s"] = batch / found["images_per_s"]["median"]
        found["predicted_s"] = [
            step_s(n, alone, nbytes, bandwidth, latency, args.waits, hidden) for hidden in (BACKWARD, 0.0)
        ]
    return found


def paper(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Predicted efficiencies of GPUs: `hidden` behind the backward pass, and `bare`, not hidden at all."""
    alone, rows = args.gpu_step_ms / 1e3, []
    for network, bandwidth in (("100 Gb/s", 100e9 / 8), ("NVLink 900 GB/s", 900e9 / 2)):  # 900 is both directions
        for n in GPUS:
            both = [
                alone / step_s(n, alone, args.gradient_bytes, bandwidth, args.latency_us / 1e6, args.waits, hidden)
                for hidden in (BACKWARD, 0.0)
            ]
            rows.append({"network": network, "gpus": n, "hidden": both[0], "bare": both[1]})
    return rows


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--batch-size", type=int, default=16, help="of all workers (strong), of each (weak)")
    parser.add_argument("--kinds", nargs="+", choices=("strong", "weak"), default=["strong", "weak"])
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--norm", choices=("batch", "group"), default="batch", help="of batch norm all workers wait")
    parser.add_argument("--steps", type=int, default=3, help="of each kind in a round (default: 3)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of each worker (default: 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--gpu-step-ms", type=float, default=10.0, help="a GPU's step on paper: take it from gpu.py (default: 10)"
    )
    parser.add_argument("--latency-us", type=float, default=10.0, help="of a message on paper (default: 10)")
    parser.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return
    from dogvae.config import Config
    from dogvae.network.vae import VAE

    config = Config.make(width=args.width, norm=args.norm)
    args.gradient_bytes = 4 * sum(p.numel() for p in VAE(config.model).parameters())
    args.waits = norm_waits(config)
    rows, predicted = compare(args), paper(args)
    lines = [
        f"width {args.width}, {args.norm} norm, K = {args.samples}, "
        f"{args.threads} thread{'s' * (args.threads > 1)} a worker, "
        f"{args.gradient_bytes / 1e6:.1f} MB of gradients, {args.repeats} rounds of {args.steps} steps",
        f"{'':<10}{'batch':>6}{'images/s':>22}{'efficiency':>20}{'of unconnected':>20}{'exchange':>22}{'bare sum':>10}",
    ]

    def share(figure: dict[str, float] | None) -> str:
        return measure.shown(figure, ".0%") if figure else ""

    for r in rows:
        bare = f"{r['sum_s']['median'] * 1e3:.0f} ms" if "sum_s" in r else ""
        lines.append(
            f"{r['kind'] + ' ' + str(r['workers']):<10}{r['batch']:>6}{measure.shown(r['images_per_s']):>22}"
            f"{share(r['efficiency']):>20}{share(r.get('unconnected')):>20}{share(r.get('exchange_share')):>22}{bare:>10}"
        )
    for r in rows:
        if "predicted_s" in r:
            low, high = r["predicted_s"]
            lines.append(
                f"the formula, {r['kind']} {r['workers']}: {low * 1e3:.0f} ms hidden, {high * 1e3:.0f} ms not hidden, "
                f"at {r['gb_per_s']:.2f} GB/s; measured {r['measured_s'] * 1e3:.0f} ms"
            )
    lines += [
        f"\non paper, not measured: {args.gpu_step_ms:g} ms a step, {args.latency_us:g} us a message, {args.waits}",
        "waits for batch norm; efficiency if the exchange hides behind the backward pass, and if it does not",
        *(f"{p['network']:<18}{p['gpus']:>6} GPUs{p['hidden']:>8.1%}{p['bare']:>8.1%}" for p in predicted),
    ]
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    measure.report({"settings": settings, "rows": rows, "paper": predicted}, lines, args)


if __name__ == "__main__":
    main()
