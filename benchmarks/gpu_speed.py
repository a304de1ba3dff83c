"""Parts of gpu.py that measure speed: steps, what a step waits for, epochs, sampling, and the notebook's loop."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

import job
import measure
import roofline
import step
from dogvae.config import Config, Safety
from dogvae.inference.load import load
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.export import export
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from dogvae.training.step import Trainer
from gpu_part import Part, stepping


def steps(part: Part) -> None:
    """Our step as a user gets it, against the larger of the two floors that this device's peaks give."""
    bf16 = Trainer(Config.make(width=4), part.device).bf16
    kind = torch.bfloat16 if bf16 else torch.float32
    tflops, gbs = roofline.peaks(part.device, kind, 3, 256 if part.quick else 0)
    part.say("peaks", {"tflops": tflops, "gbs": gbs}, f"peaks: {tflops:.1f} TFLOP/s in {kind}, {gbs:.0f} GB/s")
    most = 0.0
    for samples in (1, 10):
        for batch in (2, 4) if part.quick else (64, 128, 256, 512, 1024):
            config = part.config(samples=samples, batch_size=batch, precision="bf16" if bf16 else "fp32")
            count = roofline.count(config)
            floor = max(roofline.floors(count, tflops, gbs).values())
            if part.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                took = part.seconds(stepping(Trainer(config, part.device)))
            except torch.OutOfMemoryError:
                part.say(f"K{samples}-batch{batch}", None, f"K = {samples:<2}, batch {batch:>4}: out of memory")
                continue
            rate, share = batch / took["median"], floor / took["median"]
            row = {"step_s": took, "images_per_s": rate, "floor_s": floor, "share": share, "peak_mb": part.peak_mb()}
            line = f"K = {samples:<2}, batch {batch:>4}: {1e3 * took['median']:8.2f} ms {rate:8.0f} images/s"
            part.say(f"K{samples}-batch{batch}", row, f"{line} {share:5.0%} of the roofline {row['peak_mb']:8.0f} MB")
            most = max(most, share)
    if not part.quick:
        part.check("no step is faster than its floor", most < 1.05, f"{most:.0%} of the roofline at most")


def profiled(part: Part, run: Callable[[], None], count: int) -> tuple[dict[str, int], dict[str, float]]:
    """Calls of each operator and of the CUDA runtime in `count` runs, and milliseconds of each kernel."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * part.cuda]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(count):
            run()
        roofline.settle(part.device)
    calls, kernels = {}, {}
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:
            calls[event.key] = event.count
        elif not event.is_user_annotation:  # those span kernels, which are there themselves
            kernels[event.key] = event.self_device_time_total / 1e3
    return calls, kernels


def waits(part: Part) -> None:
    """Counted as the difference between 10 and 20 steps, so that what the profiler itself calls falls away."""
    n = 2 if part.quick else 10
    for samples, batch in ((1, 4),) if part.quick else ((1, 64), (1, 256), (10, 64)):
        run = stepping(Trainer(part.config(samples=samples, batch_size=batch), part.device))
        step_ms = 1e3 * part.seconds(run)["median"]
        profiled(part, run, n)  # the first profile is slow, and finds what is made once
        (few, few_ms), (many, many_ms) = profiled(part, run, n), profiled(part, run, 2 * n)
        calls = {k: (v - few.get(k, 0)) / n for k, v in many.items() if v != few.get(k, 0)}
        kernels = {k: (v - few_ms.get(k, 0.0)) / n for k, v in many_ms.items()}

        def total(*words: str, calls: dict[str, float] = calls) -> float:
            return sum(v for k, v in calls.items() if k.startswith("cu") and any(word in k for word in words))

        row = {
            "launches": total("LaunchKernel", "GraphLaunch"), "copies": total("Memcpy"), "memsets": total("Memset"),
            "waits": total("Synchronize"), "gpu_ms": sum(kernels.values()), "step_ms": step_ms, "calls": calls,
            "kernels_ms": dict(sorted(kernels.items(), key=lambda item: -item[1])[:20]),
        }  # fmt: skip
        told = ", ".join(f"{row[name]:.1f} {name}" for name in ("launches", "copies", "memsets", "waits"))
        line = f"K = {samples}, batch {batch}: {told} a step; the GPU works {row['gpu_ms']:.2f} of {step_ms:.2f} ms"
        part.say(f"K{samples}-batch{batch}", row, line)
        if part.cuda:
            part.check(f"no step waits at K = {samples}, batch {batch}", row["waits"] < 0.05, f"{row['waits']:.1f}")


def epochs(part: Part) -> None:
    """`dogvae.training.loop.loop` with its default settings; the time of an epoch is from one end to the next."""
    images, count = (64, 3) if part.quick else (20_000, 8)
    data = part.photos(images, max(8, images // 20))
    config = part.config(epochs=count).for_data(str(data.path), data.fingerprint, data.size, images)
    began, first_s, ends = time.perf_counter(), 0.0, []
    records: list[dict[str, Any]] = []

    class Timing(Observer):
        def progress(self, epoch: int, step: int, steps: int) -> None:
            nonlocal first_s
            first_s = first_s or time.perf_counter() - began

        def epoch(self, record: dict[str, Any]) -> None:
            ends.append(time.perf_counter())
            records.append(metrics.json_ready(record))

    loop(config, Storage(part.folder / "run"), part.device, Timing(), Safety())
    last, rates = records[-1], [record["images_per_s"] for record in records[1:]]
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    whole, rate = measure.summary(seconds), measure.summary(rates)
    besides = measure.summary([s - images / r for s, r in zip(seconds, rates, strict=True)])
    found = {"epoch_s": whole, "besides_steps_s": besides, "images_per_s": rate, "first_step_s": first_s, "last": last}
    part.say(
        "epochs", found,
        f"{images} images, batch {config.batch_size}: {measure.shown(whole, '.2f')} s an epoch, "
        f"{measure.shown(besides, '.3f')} s of it besides its steps\n{measure.shown(rate, '.0f')} images/s in steps, "
        f"{last['data_wait']:.1%} of the time waiting for data; the first step has ended after {first_s:.1f} s",
    )  # fmt: skip
    part.check("no step of the epochs was skipped", not last["skipped_steps"], f"explained {last['val_explained']}")


def sampling(part: Part) -> None:
    """`DogVAE.sample`: drawing latents, decoding, and pictures as NumPy arrays; and the export that it comes from."""
    data, run = part.photos(32 if part.quick else 2000, 8), Storage(part.folder / "run")
    config = part.config(epochs=1).for_data(str(data.path), data.fingerprint, data.size, len(data.train))
    loop(config, run, part.device, Observer(), Safety())
    began = time.perf_counter()
    folder = export(run, config)
    took_s = time.perf_counter() - began
    part.say("export", took_s, f"exporting a run of {len(data.train)} images: {took_s:.1f} s")
    dogs = load(folder.uri, part.device)
    for n in (1, 4) if part.quick else (1, 64, 4096):
        took = part.seconds(lambda n=n: dogs.sample(n), rounds=3, round_s=1.0)  # type: ignore[misc]
        part.say(
            str(n), {"seconds": took, "per_s": n / took["median"]},
            f"{n:>5} dogs: {measure.shown(took, '.4f')} s, {n / took['median']:.0f} a second",
        )  # fmt: skip


def notebook(part: Part) -> None:
    """Our loop and the notebook's in turns, each whole: data, augmentation, steps."""
    for samples, batch in ((1, 4),) if part.quick else ((1, 256), (10, 32)):
        args = argparse.Namespace(
            samples=samples, batch_size=batch, width=4 if part.quick else 0, device=part.device.type, workers=1,
            repeats=2 if part.quick else 5, steps=2 if part.quick else 30, warmup=2 if part.quick else 10,
            threads=1 if part.quick else 4, loader_workers=0 if part.quick else min(4, measure.cores()),
            only=["ours", "ours, notebook", "notebook"],
        )  # fmt: skip
        folder = part.folder / f"K{samples}"
        job.write_photos(folder / "data", batch * (step.steps_of(args) + 2))
        for name, row in step.compare(samples, args, folder).items():
            times = f"; ours / it {measure.shown(row['ratio'], '.2f')}" if "ratio" in row else ""
            line = f"K = {samples}, batch {batch}: {name:<15}{measure.shown(row['images_per_s'], '.0f'):>24} images/s"
            part.say(f"K{samples}, {name}", row, line + times)
            if times and not part.quick:
                part.check(f"faster than the notebook at K = {samples}", row["ratio"]["low"] > 1, times[2:])
