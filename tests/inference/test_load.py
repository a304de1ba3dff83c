"""Loading an export: what is refused with one line, that nothing is executed, and what an import costs."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import dogvae
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.inference.load import load
from tests.support.command import in_new_process
from tests.support.exports import DIMS, LATENT, Exported
from tests.support.runs import SIZE

TENSORS = ("model.safetensors", "prior.safetensors")


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return shutil.copytree(exported.folder, tmp_path / "export")


def refused(folder: Path) -> str:
    """The one-line error of loading a folder, which must name the folder."""
    with pytest.raises(UsageError) as error:
        load(folder, "cpu")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**about(folder), **changes}))
    return folder


def replace(folder: Path, name: str, data: bytes) -> Path:
    """Write another file with a matching checksum in config.json, as a newer version or an attacker would."""
    (folder / name).write_bytes(data)
    return rewrite(folder, files={**about(folder)["files"], name: hashlib.sha256(data).hexdigest()})


def test_load_returns_the_exported_model(exported: Exported) -> None:
    model = dogvae.load(str(exported.folder))
    assert model.size == SIZE
    assert model.latent_shape == LATENT
    assert model.about["dataset_fingerprint"] == Dataset(exported.dataset).fingerprint
    assert not model.model.training
    weights = safetensors.torch.load_file(exported.folder / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.model.state_dict().items())


def test_folder_of_a_run_stands_for_the_export_in_it(exported: Exported) -> None:
    assert dogvae.load(exported.run).about == dogvae.load(exported.folder).about


def test_folder_without_an_export_is_refused(exported: Exported, tmp_path: Path) -> None:
    run = shutil.copytree(exported.run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    for folder in (tmp_path / "nowhere", tmp_path, run, exported.folder / "config.json"):
        assert "is not an exported model" in refused(folder)
        assert "RUN/export" in refused(folder)


@pytest.mark.parametrize("typed", ["dgos", "dgos/export"])
@pytest.mark.parametrize("open_it", [dogvae.load, dogvae.open_run])
def test_mistyped_run_is_answered_with_the_name_of_the_closest_one(
    typed: str, open_it: Callable[[Path], Any], tmp_path: Path
) -> None:
    for name in ("dogs", "cats"):
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=r"; did you mean dogs\?$"):
        open_it(tmp_path / typed)
    with pytest.raises(UsageError, match=r"(RUN/export|config\.json)$"):
        open_it(tmp_path / "horses")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"not json", b'{"format": "dogvae-export"', b"\xff\xfe\x00",
        b"[]", b"null", b"3", b'"dogvae-export"', b"{}", b'{"format": "dogvae-dataset"}',
    ],
)  # fmt: skip
def test_config_of_another_format_is_refused(data: bytes, copy: Path) -> None:
    (copy / "config.json").write_bytes(data)
    assert "is not an exported model" in refused(copy)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (2, "use dogvae 0.1 for it, or train again"),
        (4, "newer dogvae"),
    ],
)
def test_other_format_version_is_refused(version: Any, remedy: str, copy: Path) -> None:
    message = refused(rewrite(copy, version=version))
    assert f"format version {version}, this dogvae reads 3" in message
    assert remedy in message


@pytest.mark.parametrize("version", ["3", "2", None, [3], {}])
def test_version_that_is_not_a_number_is_named(version: Any, copy: Path) -> None:
    assert f"is damaged: config.json: version is {version!r}" in refused(rewrite(copy, version=version))


def test_config_that_is_nested_too_deeply_is_refused(copy: Path) -> None:
    for data in ("[" * 100_000, '{"a":' * 500 + "1" + "}" * 500):
        (copy / "config.json").write_text(data)
        assert "nested more than" in refused(copy)


@pytest.mark.parametrize("name", TENSORS)
def test_damaged_or_missing_file_is_refused(name: str, copy: Path) -> None:
    file = copy / name
    whole = file.read_bytes()
    for position in (0, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert f"{name} is damaged: its checksum is wrong" in refused(copy)
    file.write_bytes(whole)
    load(copy, "cpu")
    file.write_bytes(whole[:-1])
    assert f"{name} is damaged" in refused(copy)
    file.unlink()
    assert name in refused(copy)
    file.mkdir()
    assert name in refused(copy)


@pytest.mark.parametrize("name", TENSORS)
def test_pickle_in_place_of_tensors_is_not_executed(name: str, copy: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (copy / "executed",)

    trap = pickle.dumps(Trap())
    pickle.loads(trap)
    (copy / "executed").unlink()
    assert "is damaged" in refused(replace(copy, name, trap))
    assert not (copy / "executed").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None}, {"model": []}, {"model": {"colour": "brown"}},
        {"files": None}, {"files": ["model.safetensors"]}, {"files": {"model.safetensors": 5}}, {"files": {}},
        {"sigma": None}, {"sigma": "wide"}, {"sigma": 0}, {"sigma": -0.1}, {"sigma": math.nan}, {"sigma": 10**400},
        {"sigma": True}, {"sigma": "0.1"}, {"flow": True}, {"flow": {"settings": {"depth": 0}}},
    ],
)  # fmt: skip
def test_config_with_wrong_types_is_refused(changes: dict[str, Any], copy: Path) -> None:
    assert "is damaged" in refused(rewrite(copy, **changes))


@pytest.mark.parametrize(
    "setting",
    [
        {"width": "wide"}, {"width": 3}, {"image_size": 33}, {"latent_size": 5}, {"norm": "batch"},  # of no model
        {"width": 8}, {"latent_dim": 3}, {"latent_size": 8}, {"image_size": 64},  # of another model
        {"architecture": "notebook"}, {"width": 512, "latent_dim": 1024, "image_size": 256},  # 5 GB
    ],
)  # fmt: skip
def test_config_that_does_not_match_the_weights_is_refused(setting: dict[str, Any], copy: Path) -> None:
    assert "is damaged" in refused(rewrite(copy, model={**about(copy)["model"], **setting}))


@pytest.mark.parametrize("name", ["model", "files", "sigma"])
def test_config_with_a_missing_key_is_refused(name: str, copy: Path) -> None:
    rest = {k: v for k, v in about(copy).items() if k != name}
    (copy / "config.json").write_text(json.dumps(rest))
    assert name in refused(copy)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gaussian.mean", (DIMS - 1,)), ("gaussian.mean", (1, DIMS)), ("gaussian.factor", (DIMS, DIMS + 1)),
        ("gaussian.factor", (16, 16)), ("gaussian.factor", (1, DIMS, DIMS)),
        ("directions", (32, DIMS + 1)), ("scales", (31,)), ("parents", (1, DIMS)),
    ],
)  # fmt: skip
def test_prior_of_another_model_is_refused(name: str, shape: tuple[int, ...], copy: Path) -> None:
    prior = safetensors.torch.load((copy / "prior.safetensors").read_bytes())
    assert prior[name].shape != shape
    changed = safetensors.torch.save({**prior, name: torch.ones(shape)})
    told = refused(replace(copy, "prior.safetensors", changed))
    assert f"the tensor {'directions' if name == 'scales' else name} is float32" in told
    assert "and this model's float32 (" in told


Edit = Callable[[dict[str, torch.Tensor], str], Any]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.update({name: tensors[name].double()}), "the tensor {} is float64 ("),
        (lambda tensors, name: tensors.update({name: tensors[name].long()}), "the tensor {} is int64 ("),
        (lambda tensors, name: tensors[name].view(-1)[-1:].fill_(math.nan), "the tensor {} holds numbers that are not"),
        (lambda tensors, name: tensors[name].view(-1)[:1].fill_(-math.inf), "the tensor {} holds numbers that are not"),
        (lambda tensors, name: tensors.update({name: tensors[name][None]}), "the tensor {} is float32 (1, "),
        (lambda tensors, name: tensors.pop(name), "the tensor {} is missing"),
        (lambda tensors, name: tensors.update({name + "2": tensors[name].clone()}), "the tensor '{}2' belongs to"),
    ],
    ids=["float64", "int64", "NaN", "infinite", "shape", "missing", "extra"],
)
@pytest.mark.parametrize("file", TENSORS)
def test_tensor_that_the_model_cannot_have_is_named(file: str, edit: Edit, message: str, copy: Path) -> None:
    tensors = safetensors.torch.load((copy / file).read_bytes())
    name = "gaussian.mean" if file == "prior.safetensors" else list(tensors)[-1]
    edit(tensors, name)
    assert f"{file}: {message.format(name)}" in refused(replace(copy, file, safetensors.torch.save(tensors)))


def test_prior_with_a_missing_tensor_is_refused(copy: Path) -> None:
    prior = safetensors.torch.load((copy / "prior.safetensors").read_bytes())
    for name in prior:
        rest = safetensors.torch.save({k: v for k, v in prior.items() if k != name})
        assert name in refused(replace(copy, "prior.safetensors", rest))


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:-1", "cpu:x", "mps"])
def test_unknown_device_is_refused(device: str, exported: Exported) -> None:
    with pytest.raises(UsageError, match=f"^--device: {device} ") as error:
        load(exported.folder, device)
    assert "\n" not in str(error.value)


def test_gpu_is_refused_where_there_is_none(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(UsageError, match=r"^--device: cuda.* is not available on this machine"):
            load(exported.folder, device)
    assert load(exported.folder).device == torch.device("cpu")


def test_loaded_model_does_not_read_its_files_again(copy: Path) -> None:
    """Otherwise a new export over an old one would change the dogs of a running playground, or end it by SIGBUS."""
    model = load(copy, "cpu")
    file = copy / "prior.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert model.sample_latents(1, prior="gaussian", temperature=0).any()


# --- the cost of an import


def test_importing_dogvae_imports_no_heavy_package() -> None:
    """Importing torch takes seconds."""
    code = "import sys, dogvae; print(*sorted({'torch', 'numpy', 'ray', 'pyarrow'} & set(sys.modules)))"
    assert in_new_process(code) == []


def test_first_sample_is_fast_and_without_ray(exported: Exported) -> None:
    """1.5 seconds after `import torch` on one thread; the best of 3 tries, because other programs may be running."""
    code = """
import sys, time
import torch
torch.set_num_threads(1)
began = time.perf_counter()
import dogvae
assert dogvae.load(sys.argv[1], "cpu").sample(1).any()
print(time.perf_counter() - began, *[name for name in sys.modules if name.startswith("ray")])
"""
    for _ in range(3):
        seconds, *rays = in_new_process(code, str(exported.folder))
        assert rays == []
        if float(seconds) < 1.5:
            return
    pytest.fail(f"{seconds} s")


@pytest.mark.parametrize("runs", [None, "kept/here"])
def test_name_of_a_run_is_answered_with_its_folder(
    runs: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOGVAE_RUNS", raising=False)
    if runs:
        monkeypatch.setenv("DOGVAE_RUNS", runs)
    (tmp_path / (runs or "runs") / "best/export").mkdir(parents=True)
    text = f"best is not an exported model: .*; did you mean {re.escape(runs or 'runs')}/best\\?$"
    with pytest.raises(UsageError, match=text):
        load("best")
