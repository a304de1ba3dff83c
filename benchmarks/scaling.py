"""What more workers bring: strong and weak scaling on this machine, and the time that exchanging gradients takes.

    python benchmarks/scaling.py [--workers 1 2] [--batch-size 16] [--repeats 5] [--json FILE]
    python benchmarks/scaling.py --device cuda --workers 1 2 4 8 --batch-size 256    # a GPU each

A worker is a process of --threads threads, without Ray, that trains by `dogvae.training.step`. Strong scaling keeps the
global batch, weak scaling keeps the batch of a worker. All take turns, round by round. The columns:

    efficiency        images/s of n workers, divided by n times those of a worker of the smallest group
    of unconnected    images/s of n workers, divided by those of n single workers that run at the same time and do not
                      communicate: this is what shared cores and memory allow, whoever trains on them
    exchange          the share of a step that exchanging gradients takes: the step is repeated under DDP's no_sync.
                      The batch's squared error, a number, is exchanged in both cases
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import measure
from dogvae.config import Config


def contend(args: argparse.Namespace) -> None:
    """One worker: a turn is `steps` training steps, and as many without the exchange of gradients."""
    import torch
    import torch.distributed as dist

    from dogvae.data.dataset import rank_slice
    from dogvae.training.step import Trainer

    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # or torch.cuda.synchronize() would wait for the first GPU on every rank
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    n = args.batch_size
    trainer = Trainer(Config.make(batch_size=n, samples=args.samples, width=args.width), device)
    images = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8)[rank_slice(n, rank, world_size)].to(device)
    taken = iter(range(10**9))

    def timed(times: int, work: Any) -> float:
        """Seconds of each call of `work`; all workers begin together."""
        if world_size > 1:
            dist.all_reduce(torch.zeros(1, device=device))
        began = time.perf_counter()
        for _ in range(times):
            work()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    def step() -> None:
        trainer.step(images, n, 0, next(taken), 10**6)

    def step_alone() -> None:
        with trainer.net.no_sync():
            step()

    def turn(steps: int) -> dict[str, float]:
        timed(1, step)
        answer = {"step_s": timed(steps, step)}
        if world_size > 1:
            answer["alone_s"] = timed(steps, step_alone)
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
            if n > 1 and args.device == "cpu":
                names |= {f"unconnected {kind} {n}.{i}": (1, batch // n) for i in range(n)}
    commands = {}
    for name, (n, batch) in names.items():
        command = measure.child(
            __file__, "--contender", "--threads", args.threads, "--batch-size", batch, "--samples", args.samples,
            "--width", args.width, "--device", args.device,
            "--repeats", args.repeats, "--steps", args.steps,
        )  # fmt: skip
        commands[name] = (measure.ranks(n, command) if n > 1 else command, args.threads)
    rounds: list[dict[str, Any]] = []
    with measure.contenders(commands) as started:
        groups: dict[str, list[measure.Contender]] = {}
        for name, contender in started.items():
            groups.setdefault(name.split(".")[0], []).append(contender)
        for number in range(args.repeats + 1):  # the first round warms up
            answers: dict[str, Any] = {}
            for name in list(groups) if number % 2 == 0 else list(reversed(groups)):
                for contender in groups[name]:
                    contender.order(steps=args.steps)
                answers[name] = [contender.answer() for contender in groups[name]]
            rounds.append(answers)
    return [row(kind, n, rounds[1:], args) for kind in args.kinds for n in args.workers]


def row(kind: str, n: int, rounds: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """The figures of n workers, from the answers of each round by the contender's name."""
    name, least = f"{kind} {n}", min(args.workers)
    batch, least_batch = (args.batch_size * (count if kind == "weak" else 1) for count in (n, least))
    seconds = [answers[name][0] for answers in rounds]
    rates = [batch / s["step_s"] for s in seconds]
    singles = [least_batch / least / answers[f"{kind} {least}"][0]["step_s"] for answers in rounds]  # of one worker
    found: dict[str, Any] = {
        "kind": kind, "workers": n, "batch": batch, "images_per_s": measure.summary(rates),
        "efficiency": measure.summary([rate / (n * one) for rate, one in zip(rates, singles, strict=True)]),
    }  # fmt: skip
    if n > 1:
        found["exchange"] = measure.summary([1 - s["alone_s"] / s["step_s"] for s in seconds])
    if f"unconnected {name}" in rounds[0]:
        slowest = [max(one["step_s"] for one in answers[f"unconnected {name}"]) for answers in rounds]
        found["unconnected"] = measure.ratio(rates, [batch / s for s in slowest])
    return found


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--batch-size", type=int, default=16, help="of all workers (strong), of each (weak)")
    parser.add_argument("--kinds", nargs="+", choices=("strong", "weak"), default=["strong", "weak"])
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--width", type=int, default=Config().model.width, help="(default: the default network's)")
    parser.add_argument("--steps", type=int, default=3, help="of each kind in a round (default: 3)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of each worker (default: 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return
    rows = compare(args)
    lines = [
        f"width {args.width}, K = {args.samples}, "
        f"{args.threads} thread{'s' * (args.threads > 1)} a worker, {args.repeats} rounds of {args.steps} steps",
        f"{'':<10}{'batch':>6}{'images/s':>22}{'efficiency':>20}{'of unconnected':>20}{'exchange':>22}",
    ]
    for r in rows:
        efficiency, unconnected, exchange = (
            measure.shown(r[key], ".0%") if key in r else "" for key in ("efficiency", "unconnected", "exchange")
        )
        lines.append(
            f"{r['kind'] + ' ' + str(r['workers']):<10}{r['batch']:>6}{measure.shown(r['images_per_s']):>22}"
            f"{efficiency:>20}{unconnected:>20}{exchange:>22}"
        )
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    measure.report({"settings": settings, "rows": rows}, lines, args)


if __name__ == "__main__":
    main()
