"""`dogvae doctor`: checks every node for what training needs, and prints a line with the remedy for what is wrong."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dogvae.cluster.nodes import least_nodes
from dogvae.commands.doctor_group import add_ranks, free_port, time_gradients
from dogvae.config import Config
from dogvae.console import say
from dogvae.storage import Storage, is_uri

PACKAGES = ("ray", "torch", "torchvision", "numpy", "pillow", "safetensors", "dogvae")
TIMEOUT_S = 60.0  # for a node to answer
STEP_IMAGES = 64  # of the step that is compared with the network: the batch size that large datasets get
CLOCK_S = 5.0  # how far a node's clock may be off
LEAST_DISK, LEAST_SHM = 5 << 30, 1 << 30  # bytes


@dataclass(frozen=True)
class Finding:
    """The result of one check on one node (or "all"), and the remedy if it is not ok."""

    check: str
    node: str
    ok: bool
    found: str
    remedy: str = ""


def examine(runs: str, data: str | None) -> list[Finding]:
    """Check every node of the cluster that this process is connected to."""
    import ray

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    token = uuid.uuid4().hex
    began = time.time()
    answers = _on_each(nodes, _inspect, Storage(runs).uri, data, token)
    least = max(len(nodes), least_nodes())
    remedy = "they join half a minute after `ray up`; if one does not, `ray monitor` and your yaml file show why"
    joined = f"{len(nodes)} of {least} joined: {', '.join(names.values())}"
    findings = [Finding("nodes", "all", len(nodes) == least, joined, remedy)]
    here = _versions()
    probes = []
    for node in nodes:
        address, answer = names[node["NodeID"]], answers[node["NodeID"]]
        if isinstance(answer, str):
            remedy = "is it reachable from here, and is dogvae installed there?"
            findings.append(Finding("answers", address, False, answer, remedy))
            continue
        if not answer["storage"]:
            probes.append(answer["probe"])
        findings += _judge(node, address, answer, here, began, time.time(), runs, data)
    findings += _check_shared(nodes, names, runs, probes)
    findings.append(_check_network(nodes, gpu=False))
    with_gpu = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1]
    if len(with_gpu) > 1:
        findings.append(_check_network(with_gpu, gpu=True))
        if findings[-1].ok:
            findings.append(_check_speed(with_gpu))
    return findings


def _on_each(nodes: list[dict[str, Any]], function: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """The results of `function(*args, i)` on every node i, by node ID; a line of text where it failed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0, **options)(function)
    futures = {}
    for i, node in enumerate(nodes):
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        futures[node["NodeID"]] = task.options(scheduling_strategy=on_node).remote(*args, i)
    ray.wait(list(futures.values()), num_returns=len(futures), timeout=TIMEOUT_S)
    return {node_id: _answer(future) for node_id, future in futures.items()}


def _answer(future: Any) -> Any:
    import ray

    try:
        return ray.get(future, timeout=0.1)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(future, force=True)
        return f"no answer in {TIMEOUT_S:.0f} s"
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        return " ".join(str(cause).strip().splitlines()[-1:]) or type(cause).__name__


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _inspect(runs: str, data: str | None, token: str, number: int) -> dict[str, Any]:
    """What a node has. Runs on that node, and leaves a file there for `_check_shared` to find."""
    import torch

    from dogvae.data.cache import copy_status
    from dogvae.data.dataset import Dataset
    from dogvae.data.manifest import read_manifest, shards_of
    from dogvae.errors import UsageError

    probe, storage_error = f".probe-{token}-{number}", ""
    try:
        Storage(runs).write(probe, socket.gethostname().encode())
    except (OSError, UsageError) as error:
        storage_error = str(error)
    found: dict[str, Any] = {"data": "", "images": 0, "fingerprint": "", "copy": ""}
    if data is not None:
        try:
            if is_uri(data):  # nothing is fetched: this is only a check
                manifest = read_manifest(data)
                found["copy"] = copy_status(manifest)
            else:
                manifest = Dataset(data).manifest
            images = sum(shard["count"] for shard in shards_of(manifest))
            found |= {"images": images, "fingerprint": manifest["fingerprint"]}
        except (OSError, UsageError) as error:
            found["data"] = str(error)
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None
    return found | {
        "versions": _versions(),
        "gpus": torch.cuda.device_count(),
        "clock": time.time(),
        "disk": shutil.disk_usage(os.path.expanduser("~")).free,
        "shm": shm,
        "storage": storage_error,
        "probe": probe,
    }


def _judge(
    node: dict[str, Any],
    address: str,
    answer: dict[str, Any],
    here: dict[str, str],
    began: float,
    ended: float,
    runs: str,
    data: str | None,
) -> list[Finding]:
    """The findings about a node, from its `answer`, our versions, and the times when it was asked and answered."""
    other = {name: v for name, v in answer["versions"].items() if v != here[name]}
    differing = ", ".join(f"{name} {v}, here {here[name]}" for name, v in other.items())
    promised, gpus = int(node["Resources"].get("GPU", 0)), answer["gpus"]
    off = max(0.0, began - answer["clock"], answer["clock"] - ended)
    findings = [
        Finding("versions", address, not other, differing or "same as here", "install the same versions on every node"),
        Finding(
            "GPUs",
            address,
            gpus >= promised,
            f"Ray counts {promised}, torch sees {gpus}",
            "run nvidia-smi there: does the driver work, and is torch a CUDA build that it supports?",
        ),
        Finding("clock", address, off < CLOCK_S, f"{off:.0f} s off", "turn on NTP there"),
        Finding(
            "disk", address, answer["disk"] > LEAST_DISK, f"{answer['disk'] / 2**30:.0f} GB free", "free space there"
        ),
        Finding(
            "storage",
            address,
            not answer["storage"],
            answer["storage"] or f"{runs} can be written to",
            "give --runs a place that this node may write to, such as s3://BUCKET/runs or a mounted share",
        ),
    ]
    if answer["shm"] is not None:
        size = f"/dev/shm of {answer['shm'] / 2**30:.1f} GB"
        findings.append(
            Finding("memory", address, answer["shm"] > LEAST_SHM, size, "in a container: --shm-size=8g or more")
        )
    if data is not None:
        copy = f", {answer['copy']}" if answer["copy"] else ""
        found = answer["data"] or f"{answer['images']:,} images, fingerprint {answer['fingerprint'][:8]}{copy}"
        remedy = "put the dataset where every node sees it by that path, or on S3"
        if is_uri(data):
            remedy = "this node must reach it, with rights to read it, and have room for it"
        findings.append(Finding("dataset", address, not answer["data"], found, remedy))
    return findings


def _check_shared(nodes: list[dict[str, Any]], names: dict[str, str], runs: str, probes: list[str]) -> list[Finding]:
    """Whether every node sees the files that all nodes wrote."""
    seen = _on_each(nodes, _read, Storage(runs).uri, probes)
    remedy = "give --runs storage that all nodes share: s3://BUCKET/runs, or an NFS mount"
    findings = []
    for node_id, missing in seen.items():
        ok = missing == 0
        found = "sees what all nodes write" if ok else f"does not see what {missing} of the nodes wrote"
        findings.append(Finding("shared", names[node_id], ok, found, remedy))
    _on_each(nodes, _forget, Storage(runs).uri, probes)
    return findings


def _read(runs: str, probes: list[str], number: int) -> int:
    return sum(not Storage(runs).exists(probe) for probe in probes)


def _forget(runs: str, probes: list[str], number: int) -> None:
    for probe in probes:
        Storage(runs).delete(probe)


def _check_network(nodes: list[dict[str, Any]], gpu: bool) -> Finding:
    """Whether one process on each node can add up numbers over the network that training would use."""
    backend = "nccl" if gpu else "gloo"
    first, (port,) = nodes[0]["NodeManagerAddress"], _on_each(nodes[:1], free_port).values()
    options = {"num_gpus": 1} if gpu else {}
    sums = _on_each(nodes, add_ranks, backend, first, port, len(nodes), **options)
    wrong = [str(s) for s in sums.values() if s != sum(range(len(nodes)))]
    remedy = (
        "open all ports between the nodes of the cluster; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network"
    )
    return Finding(
        backend, "all", not wrong, wrong[0] if wrong else f"{len(nodes)} of {len(nodes)} reach each other", remedy
    )


def _check_speed(nodes: list[dict[str, Any]]) -> Finding:
    """Whether gradients cross the network faster than one node trains: both are measured, on one GPU of each node."""
    first, (port,) = nodes[0]["NodeManagerAddress"], _on_each(nodes[:1], free_port).values()
    config = Config.make(batch_size=STEP_IMAGES)
    answers = _on_each(nodes, time_gradients, config, "nccl", first, port, len(nodes), num_gpus=1)
    wrong = [answer for answer in answers.values() if isinstance(answer, str)]
    if wrong:
        return Finding("speed", "all", False, wrong[0], "is a run using the GPUs? Ask again when they are free")
    step_s, exchange_s = (max(answer[i] for answer in answers.values()) for i in (0, 1))
    megabytes = next(iter(answers.values()))[2] / 1e6
    return _judge_speed(step_s, exchange_s, megabytes, [int(node["Resources"]["GPU"]) for node in nodes])


def _judge_speed(step_s: float, exchange_s: float, megabytes: float, gpus: list[int]) -> Finding:
    """The finding for nodes with so many GPUs each. A second node cannot pay if the gradients alone take longer than a
    step on the GPUs of one node.
    """
    most, total = max(gpus), sum(gpus)
    alone_s = step_s / most  # at best: within a node gradients take time, too
    found = (
        f"{megabytes:.1f} MB of gradients cross the network in {1e3 * exchange_s:.1f} ms, one node trains a step of "
        f"{STEP_IMAGES} images in {1e3 * alone_s:.1f} ms"
    )
    remedy = (
        f"a run on all {total} GPUs would be slower: use --gpus {most}, a node with more GPUs, or a larger "
        "--batch-size or --samples"
    )
    return Finding("speed", "all", exchange_s <= alone_s, found, remedy)


def show(findings: list[Finding]) -> bool:
    """Print a line for each finding, with the remedy for what is wrong. Returns whether all are ok."""
    widths = [max(len(text) for text in column) for column in zip(*((f.check, f.node) for f in findings), strict=True)]
    for f in findings:
        line = f"{'✓' if f.ok else '✗'} {f.check:<{widths[0]}}  {f.node:<{widths[1]}}  {f.found}"
        say(line if f.ok else f"{line}: {f.remedy}")
    return all(f.ok for f in findings)
