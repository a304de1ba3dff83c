"""The loop over steps and epochs, on every rank: going on from a checkpoint, saving, stopping, and bad days.

Knows torch.distributed, but nothing of Ray: what is outside is an `Observer`.
"""

from __future__ import annotations

import math
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dogvae import rng
from dogvae.config import Config, Safety
from dogvae.data.dataset import Batches, Dataset, epoch_order, rank_slice
from dogvae.errors import OutOfMemory, RunFailed, UsageError
from dogvae.inference.elbo import baselines, evaluate
from dogvae.network import likelihood as loss
from dogvae.storage import Storage
from dogvae.training import metrics, previews
from dogvae.training.checkpoint import KEEP_LATEST, Checkpoint, Checkpoints
from dogvae.training.observer import Observer
from dogvae.training.ranks import T, _agree, _everyones, _together
from dogvae.training.schedule import beta_at, lr_at
from dogvae.training.step import Trainer
from dogvae.training.sums import described

PICTURES = 10  # how often over a run pictures go to TensorBoard
POLL_STEPS_CUDA = 8  # steps between two looks at what is wanted; each makes the host wait for the GPU
PREEMPTION_INTERVAL_S = 1.0
TOUCH_S = 0.5  # how often ranks that wait for each other's data say that they are there
SILENT_S = 5.0  # until the user hears what is being waited for


def loop(
    config: Config, storage: Storage, device: torch.device, observer: Observer, safety: Safety | None = None
) -> bool:
    """Train from the latest checkpoint in `storage`, or from the start. Every rank calls it.

    Returns whether the last epoch is done; False if the observer wanted to stop, and a checkpoint is saved. Raises
    UsageError for what the user can mend, and RunFailed if it makes no sense to go on, the same on all ranks; but
    OutOfMemory on one rank alone, while others may wait for it: its process must end, or they wait on.
    """
    try:
        return _Run(config, storage, device, observer, safety or Safety()).train()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        wanted = str(error).splitlines()[0].partition("memory")[2].lstrip(".: ").partition(". ")[0]
        raise OutOfMemory(
            f"out of memory on {device} of {socket.gethostname()} ({wanted}): lower --batch-size, --samples or --width"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has no room for a tensor. CPUs have no error of their own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


class _Run:
    """A run on one rank: its state, and where in it training is (`meta`: epoch, step over all epochs, seconds)."""

    def __init__(
        self, config: Config, storage: Storage, device: torch.device, observer: Observer, safety: Safety
    ) -> None:
        self.config, self.observer, self.safety = config, observer, safety
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.dataset = self._open_data()
        self.steps = -(-len(self.dataset.train) // config.batch_size)  # of an epoch
        self.trainer = Trainer(config, device)
        _check_storage(storage, self.rank, self.world_size, 4 * self.trainer.nbytes)
        self.checkpoints = Checkpoints(storage, observer.note, safety.patience_s)
        saved = _agree(_together(self._latest))
        self.meta: dict[str, Any] = {"epoch": 0, "step": 0, "seconds": 0.0, "baselines": None, "records": []}
        if saved is not None:
            self.trainer.load(saved.tensors)
            self.meta = {**saved.meta, "val_loss": None}  # it is that checkpoint's, not that of those to come
            if self.rank == 0 and self.meta["epoch"] < config.epochs:
                done = self.meta["step"] - self.meta["epoch"] * self.steps
                workers = f"{self.world_size} worker{'s' if self.world_size > 1 else ''}"
                observer.note(f"going on in epoch {self.meta['epoch'] + 1} after step {done}, with {workers}")
        if self.meta["baselines"] is None:
            self.meta["baselines"] = _agree(
                baselines(config.model.likelihood, self.dataset) if self.rank == 0 else None
            )
        self.recorder = metrics.Recorder(storage, self.meta["records"], observer.note) if self.rank == 0 else None
        self.saved_at = self.asked_at = time.monotonic()
        self.endangered = False

    def train(self) -> bool:
        """See `loop`."""
        try:
            while self.meta["epoch"] < self.config.epochs:
                record = self._epoch()
                if record is None:
                    self.checkpoints.wait()
                    return False
                if self.observer.wants_saved:
                    self._settle()
                self.observer.epoch(record)
            self.checkpoints.wait()
            return True
        finally:
            if self.recorder:
                self.recorder.close()

    def _settle(self) -> None:
        """Wait until all that is known so far is on the storage."""
        self.checkpoints.wait()
        if self.recorder:
            self.recorder.wait()

    def _open_data(self) -> Dataset:
        """The dataset, fetched to each node and compared with its checksums by the ranks that share a copy."""

        def opened() -> Dataset:
            return Dataset(self.config.data, self.config.fingerprint)

        dataset = self._patiently(opened)
        copies = _everyones(dataset.copy_key)
        sharers = [rank for rank, copy in enumerate(copies) if copy == copies[self.rank]]
        for path in self._patiently(lambda: dataset.verify(sharers.index(self.rank), len(sharers))):
            self.observer.note(f"{path} on {socket.gethostname()} was damaged: it has been fetched again")
        return _together(opened)  # another rank may have put a file in the place of one that was open

    def _patiently(self, action: Callable[[], T]) -> T:
        """As `_together`, for what may take one node longer than the others may wait for it: they stay in touch."""
        began, told = time.monotonic(), False
        with ThreadPoolExecutor(1) as beside:
            doing = beside.submit(action)
            while busy := sorted({host for host in _everyones("" if doing.done() else socket.gethostname()) if host}):
                if self.rank == 0 and not told and time.monotonic() - began > SILENT_S:
                    told = True
                    self.observer.note(f"waiting for the dataset on {', '.join(busy)}")
                wait([doing], TOUCH_S)
        return _together(doing.result)

    def _latest(self) -> Checkpoint | None:
        saved = self.checkpoints.latest() if self.rank == 0 else None
        if saved is not None:
            if saved.meta.get("streams", 1) != rng.VERSION:
                raise UsageError(
                    "--resume: the checkpoint is of a dogvae that drew other random numbers, so this one cannot go on "
                    "from it bit for bit; go on with that version, or start a new run"
                )
            was, now = Config.make_nested(saved.meta["config"]).flat(), self.config.flat()
            differs = [f"{name} {was[name]}, not {now[name]}" for name in now if was[name] != now[name]]
            differs = [text for text in differs if text.split()[0] not in ("epochs", "data")]
            if differs:
                raise UsageError(f"--resume: the checkpoint is of another run: it has {'; '.join(differs)}")
        return saved

    def _epoch(self) -> dict[str, Any] | None:
        """The rest of an epoch, its validation and its checkpoint; returns its record, or None to stop within it."""
        trainer, config, epoch = self.trainer, self.config, self.meta["epoch"]
        n, first = len(self.dataset.train), self.meta["step"] - epoch * self.steps
        order = epoch_order(n, config.seed, epoch)

        def batch(step: int) -> np.ndarray:
            return order[step * config.batch_size : (step + 1) * config.batch_size]

        # Cut as they are needed: of ten million images all batches of an epoch are many more bytes than their order.
        mine = (b[rank_slice(len(b), self.rank, self.world_size)] for b in map(batch, range(first, self.steps)))
        seconds, began, waited = self.meta["seconds"], time.perf_counter(), 0.0
        feed = Batches(self.dataset.train, trainer.device)(mine)
        trainer.net.train()
        for step in range(first, self.steps):
            asked = time.perf_counter()
            images = next(feed)
            waited += time.perf_counter() - asked
            trainer.step(images, len(batch(step)), epoch, step, self.steps)
            self.meta = {**self.meta, "step": epoch * self.steps + step + 1}
            self.meta["seconds"] = seconds + time.perf_counter() - began
            if self.rank == 0:
                self.observer.progress(epoch, step + 1, self.steps)
            if self._poll():
                return None
        trained = time.perf_counter() - began
        sums = trainer.sums.over_ranks()
        val = evaluate(trainer.evaluated_model, self.dataset.val, trainer.device, self.rank, self.world_size)
        self._check_drift()
        last = epoch + (self.steps - 1) / self.steps
        record = {
            "epoch": epoch,
            "step": (epoch + 1) * self.steps,
            **described(sums, self.steps),
            **{f"val_{name}": value for name, value in val.items()},
            "val_explained": loss.explained(val["loss"], *self.meta["baselines"]),
            "val_loss_per_pixel": val["loss"] / (3 * config.model.image_size**2),
            "lr": lr_at(config, last),
            "beta": beta_at(config, last),
            "images_per_s": (n - first * config.batch_size) / trained,
            "data_wait": waited / trained,
            "world_size": self.world_size,
            "seconds": seconds + time.perf_counter() - began,
        }
        trainer.sums.clear()
        self.meta |= {"epoch": epoch + 1, "seconds": record["seconds"], "val_loss": val["loss"]}
        self.meta["records"] = [*self.meta["records"], metrics.plain(record)]
        if self.recorder:
            shown = epoch % max(1, config.epochs // PICTURES) == 0 or epoch == config.epochs - 1
            self.recorder.record(record, self._pictures() if shown else {})
        self._save()
        self.meta |= {"val_loss": None}  # it is this checkpoint's, not that of those within the next epoch
        return record

    def _poll(self) -> bool:
        """Between two steps: save if it is time, look for bad numbers and leaving nodes; returns whether to stop."""
        step = self.meta["step"]
        scheduled = bool(self.safety.checkpoint_steps) and step % self.safety.checkpoint_steps == 0
        if self.trainer.device.type == "cuda" and not self.endangered and not scheduled and step % POLL_STEPS_CUDA:
            return False
        now = time.monotonic()
        due = self.rank == 0 and not self.safety.checkpoint_steps and now - self.saved_at >= self.safety.checkpoint_s
        ask = self.rank == 0 and now - self.asked_at >= PREEMPTION_INTERVAL_S
        wishes = torch.tensor([self.observer.stopping(), due, ask], dtype=torch.int32, device=self.trainer.device)
        if self.world_size > 1:
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
        stop, due, ask = map(bool, wishes.tolist())
        self._check_numbers()
        if ask:
            self.asked_at = now
            if self.observer.preempted() and not self.endangered:
                self.endangered = True
                if self.rank == 0:
                    self.observer.note("a node is about to go: saving a checkpoint after every step")
        if stop or due or scheduled or self.endangered:
            self._save()
        return stop

    def _save(self) -> None:
        """Save the state as it is; every rank must call it."""
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

        _together(save)

    def _check_numbers(self) -> None:
        if int(self.trainer.streak) >= self.safety.max_skipped:
            epoch, step = self.meta["epoch"], self.meta["step"]
            good = self.checkpoints.last_step
            raise RunFailed(
                f"epoch {epoch + 1}, step {step}: the gradients of {self.safety.max_skipped} steps in a row were not "
                f"finite, at learning rate {lr_at(self.config, step / self.steps):.2g}; the last good checkpoint is of "
                f"step {good}. Try a lower --lr, or --grad-clip"
            )

    def _check_drift(self) -> None:
        """Every rank has the same weights, or something is broken that no checkpoint should keep."""
        if self.world_size == 1:
            return
        digest = 0
        for p in self.trainer.parameters.values():
            digest = zlib.crc32(p.detach().cpu().contiguous().numpy().data, digest)
        if len(set(_everyones(digest))) > 1:
            raise RunFailed(f"epoch {self.meta['epoch'] + 1}: the workers' weights have drifted apart")

    @torch.inference_mode()
    def _pictures(self) -> dict[str, np.ndarray]:
        photos = self.dataset.val.gather(np.arange(min(8, len(self.dataset.val))))
        model = self.trainer.evaluated_model.eval()
        try:
            return previews.standard(model, photos, self.trainer.device)
        finally:
            model.train()


def _check_storage(storage: Storage, rank: int, world_size: int, need: int) -> None:
    """UsageError on all ranks if one cannot write to the storage or does not see what the others write there."""
    token = _agree(uuid.uuid4().hex if rank == 0 else None)
    host = socket.gethostname()

    def write() -> None:
        try:
            storage.write(f".probe-{token}-{rank}", host.encode())
            free = shutil.disk_usage(storage.local).free if storage.local else math.inf
        except OSError as error:
            raise UsageError(f"--runs: {storage.uri} cannot be written to from {host}: {error}") from error
        if free < need * (KEEP_LATEST + 2):
            mb = need * (KEEP_LATEST + 2) / 2**20
            raise UsageError(f"--runs: {storage.uri} has {free / 2**20:.0f} MB free, the checkpoints need {mb:.0f} MB")

    def read() -> None:
        try:
            for other in range(world_size):
                storage.read(f".probe-{token}-{other}")
        except OSError as error:
            raise UsageError(
                f"--runs: {host} does not see in {storage.uri} what another worker wrote there: it must be storage "
                "that all nodes share"
            ) from error

    try:
        _together(write)
        _together(read)
    finally:
        with suppress(OSError):  # what made the check fail may make this fail; that error is the one to tell
            storage.delete(f".probe-{token}-{rank}")
