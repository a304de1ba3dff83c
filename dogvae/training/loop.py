"""The training loop, which every rank runs: epochs and steps, resuming, saving, stopping, and what ends a run early.

It knows torch.distributed, but nothing of Ray: an `Observer` connects it to the outside.
"""

from __future__ import annotations

import socket
import sys
import time
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from dogvae import rng
from dogvae.config import Config, Safety
from dogvae.data.dataset import Batches, epoch_order, rank_slice
from dogvae.errors import OutOfMemory, RunFailed
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.checkpoint import Checkpoint, Checkpoints
from dogvae.training.observer import Observer
from dogvae.training.preflight import check_same_run, check_storage, open_dataset
from dogvae.training.ranks import broadcast, on_all_ranks, on_all_ranks_with_heartbeat, rank_and_world_size
from dogvae.training.schedule import beta_at, lr_at
from dogvae.training.step import Trainer
from dogvae.training.trackers import Tracking, start_trackers

PICTURES = 10  # how often during a run pictures go to TensorBoard
POLL_STEPS_CUDA = 8  # steps between two polls on a GPU: each poll makes the host wait for the GPU
PREEMPTION_INTERVAL_S = 1.0  # between two questions whether a node is about to leave


def loop(
    config: Config,
    storage: Storage,
    device: torch.device,
    observer: Observer,
    safety: Safety | None = None,
    tracking: Tracking | None = None,
) -> bool:
    """Train from the latest checkpoint in `storage`, or from the start. Every rank calls it.

    Returns True after the last epoch, and False if the observer asked to stop, after saving a checkpoint. Raises
    UsageError for a mistake of the user, and RunFailed if the run cannot continue: both on all ranks. OutOfMemory is
    raised on one rank alone. Other ranks may be waiting for that rank, so its process must end.
    """
    try:
        return _Run(config, storage, device, observer, safety or Safety(), tracking).train()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        wanted = str(error).splitlines()[0].partition("memory")[2].lstrip(".: ").partition(". ")[0]
        raise OutOfMemory(
            f"out of memory on {device} of {socket.gethostname()} ({wanted}): lower --batch-size, --samples or --width"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has no room for a tensor. On CPUs torch raises a plain RuntimeError for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


class _Run:
    """A run on one rank. Each checkpoint keeps `meta`: finished epochs, steps over all epochs, seconds, records, ..."""

    def __init__(
        self,
        config: Config,
        storage: Storage,
        device: torch.device,
        observer: Observer,
        safety: Safety,
        tracking: Tracking | None,
    ) -> None:
        self.config, self.observer, self.safety = config, observer, safety
        self.rank, self.world_size = rank_and_world_size()
        self.dataset = open_dataset(config, observer.note)
        self.steps = -(-len(self.dataset.train) // config.batch_size)  # of an epoch
        self.trainer = Trainer(config, device)
        check_storage(storage, self.trainer.nbytes)
        self.checkpoints = Checkpoints(storage, observer.note, safety.patience_s)
        self.meta: dict[str, Any] = {"epoch": 0, "step": 0, "seconds": 0.0, "mean_error": None, "records": []}
        saved = broadcast(on_all_ranks(self._latest))
        if saved is not None:
            self.trainer.load(saved.tensors)
            self.meta = {**saved.meta, "val_loss": None}  # val_loss belongs to that checkpoint, not to later ones
            if self.rank == 0 and self.meta["epoch"] < config.epochs:
                done = self.meta["step"] - self.meta["epoch"] * self.steps
                workers = f"{self.world_size} worker{'s' if self.world_size > 1 else ''}"
                observer.note(f"going on in epoch {self.meta['epoch'] + 1} after step {done}, with {workers}")
        if self.meta["mean_error"] is None:
            self.meta["mean_error"] = self._baseline()
        self.recorder = None
        if self.rank == 0:
            shown = None if observer.wants_saved else config  # a search reports on its trials itself
            known = self.meta["records"]
            trackers = start_trackers(tracking, config, storage, known, observer.note)
            self.recorder = metrics.Recorder(storage, known, observer.note, shown, trackers)
        self.saved_at = self.asked_at = time.monotonic()
        self.node_leaves = False  # then there is a checkpoint after every step

    def _latest(self) -> Checkpoint | None:
        """The latest checkpoint on rank 0, None on the others."""
        saved = self.checkpoints.latest() if self.rank == 0 else None
        if saved is not None:
            check_same_run(saved.meta, self.config)
        return saved

    def _baseline(self) -> float:
        """What the task compares its validation with; rank 0 computes it, which may take minutes."""

        def compute() -> float | None:
            return self.trainer.task.baseline(self.dataset) if self.rank == 0 else None

        def waiting_for(hosts: list[str]) -> None:
            if self.rank == 0:
                self.observer.note(f"waiting for the mean of the training images on {', '.join(hosts)}")

        return cast(float, broadcast(on_all_ranks_with_heartbeat(compute, waiting_for)))

    def train(self) -> bool:
        """See `loop`."""
        try:
            while self.meta["epoch"] < self.config.epochs:
                record = self._epoch()
                if record is None:
                    self.checkpoints.wait()
                    return False
                if self.observer.wants_saved:
                    self.checkpoints.wait()
                    if self.recorder:
                        self.recorder.wait(last=self.meta["epoch"] >= self.config.epochs)
                self.observer.epoch(record)
            self.checkpoints.wait()
            return True
        finally:
            if self.recorder:
                failed = isinstance(sys.exc_info()[1], Exception)  # Ray Tune ends a trial by SystemExit
                done = self.meta["epoch"] >= self.config.epochs
                self.recorder.close("failed" if failed else "finished" if done else "stopped")

    def _epoch(self) -> dict[str, Any] | None:
        """Train, validate and save the rest of the current epoch. Returns its record, or None if it was stopped."""
        trainer, config, epoch = self.trainer, self.config, self.meta["epoch"]
        seconds, began = self.meta["seconds"], time.perf_counter()
        n, first = len(self.dataset.train), self.meta["step"] - epoch * self.steps
        waited = self._train_steps(first)
        if waited is None:
            return None
        sums = trainer.sums.over_ranks().cpu()  # waits for a GPU to finish the steps
        trained = time.perf_counter() - began
        val = trainer.task.validate(
            trainer.evaluated_model,
            self.dataset.val,
            trainer.device,
            self.rank,
            self.world_size,
            self.meta["mean_error"],
        )
        self._check_same_weights()
        last = epoch + (self.steps - 1) / self.steps
        record = {
            "epoch": epoch,
            "step": (epoch + 1) * self.steps,
            **trainer.sums.described(sums, self.steps),
            **{f"val_{name}": value for name, value in val.items()},
            "lr": lr_at(config, last),
            "beta": beta_at(config, last),
            "images_per_s": (n - first * config.batch_size) / trained,
            "data_wait": waited / trained,
            "world_size": self.world_size,
            "seconds": seconds + time.perf_counter() - began,
        }
        trainer.sums.clear()
        self.meta |= {"epoch": epoch + 1, "seconds": record["seconds"], "val_loss": val["loss"]}
        self.meta["records"] = [*self.meta["records"], metrics.json_ready(record)]
        if self.recorder:
            shown = epoch % max(1, config.epochs // PICTURES) == 0 or epoch == config.epochs - 1
            self.recorder.record(record, self._pictures() if shown else {})
        self._save()
        self.meta |= {"val_loss": None}  # checkpoints within the next epoch have none
        return record

    def _train_steps(self, first: int) -> float | None:
        """The steps of the current epoch from number `first` on.

        Returns the seconds spent waiting for data, or None if the observer asked to stop.
        """
        trainer, config, epoch = self.trainer, self.config, self.meta["epoch"]
        order = epoch_order(len(self.dataset.train), config.seed, epoch)

        def batch(step: int) -> np.ndarray:
            return order[step * config.batch_size : (step + 1) * config.batch_size]

        # Sliced lazily: for ten million images all slices of an epoch would take far more memory than their order.
        mine = (b[rank_slice(len(b), self.rank, self.world_size)] for b in map(batch, range(first, self.steps)))
        seconds, began, waited = self.meta["seconds"], time.perf_counter(), 0.0
        batches = Batches(self.dataset.train, trainer.device)(mine)
        trainer.net.train()
        for step in range(first, self.steps):
            asked = time.perf_counter()
            images = next(batches)
            waited += time.perf_counter() - asked
            trainer.step(images, len(batch(step)), epoch, step, self.steps)
            self.meta = {**self.meta, "step": epoch * self.steps + step + 1}
            self.meta["seconds"] = seconds + time.perf_counter() - began
            if self.rank == 0:
                self.observer.progress(epoch, step + 1, self.steps)
            if self._poll():
                return None
        return waited

    def _poll(self) -> bool:
        """Between two steps: save if it is time, check numbers and nodes. Returns whether to stop."""
        step = self.meta["step"]
        scheduled = bool(self.safety.checkpoint_steps) and step % self.safety.checkpoint_steps == 0
        if self.trainer.device.type == "cuda" and not self.node_leaves and not scheduled and step % POLL_STEPS_CUDA:
            return False
        now = time.monotonic()
        due = self.rank == 0 and not self.safety.checkpoint_steps and now - self.saved_at >= self.safety.checkpoint_s
        ask = self.rank == 0 and now - self.asked_at >= PREEMPTION_INTERVAL_S
        wishes = torch.tensor([self.observer.stopping(), due, ask], dtype=torch.int32)
        if self.world_size > 1:
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
        stop, due, ask = map(bool, wishes.tolist())
        self._check_skipped()
        if ask:
            self.asked_at = now
            if self.observer.preempted() and not self.node_leaves:
                self.node_leaves = True
                if self.rank == 0:
                    self.observer.note("a node is about to go: saving a checkpoint after every step")
        if stop or due or scheduled or self.node_leaves:
            self._save()
        return stop

    def _save(self) -> None:
        """Save the current state. Every rank must call it."""
        sums = self.trainer.sums.over_ranks()

        def save() -> None:
            if self.rank == 0:
                self.saved_at = time.monotonic()
                about = {
                    "config": self.config.to_dict(),
                    "fingerprint": self.config.fingerprint,
                    "streams": rng.VERSION,
                }
                self.checkpoints.save({**self.trainer.state(), "sums": sums}, {**self.meta, **about})

        on_all_ranks(save)

    def _check_skipped(self) -> None:
        """RunFailed if too many steps in a row were skipped."""
        if int(self.trainer.streak) >= self.safety.max_skipped:
            epoch, step = self.meta["epoch"], self.meta["step"]
            good = self.checkpoints.last_step
            raise RunFailed(
                f"epoch {epoch + 1}, step {step}: the gradients of {self.safety.max_skipped} steps in a row were not "
                f"finite, at learning rate {lr_at(self.config, step / self.steps):.2g}; the last good checkpoint is of "
                f"step {good}. Try a lower --lr, or --grad-clip"
            )

    def _check_same_weights(self) -> None:
        """RunFailed if ranks hold different weights, before a checkpoint keeps them."""
        if self.world_size == 1:
            return
        # Sums of the weights' bits: that of a weight is the same on all ranks only if the least is the largest.
        bits = torch.stack(
            [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in self.trainer.model.parameters()]
        )
        extremes = torch.cat([bits, -bits])
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        largest, least_negated = extremes.cpu().chunk(2)
        if not torch.equal(largest, -least_negated):
            raise RunFailed(f"epoch {self.meta['epoch'] + 1}: the workers' weights have drifted apart")

    @torch.inference_mode()
    def _pictures(self) -> dict[str, np.ndarray]:
        model = self.trainer.evaluated_model.eval()
        try:
            return self.trainer.task.pictures(model, self.dataset, self.trainer.device)
        finally:
            model.train()
