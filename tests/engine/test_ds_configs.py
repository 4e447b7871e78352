"""Every file in ds_configs/ trains, on two ranks of a CPU, and computes what zero0.json computes."""

import json
import os
from pathlib import Path

import pytest
from launching import REPOSITORY
from test_training import shapes_spec, train

from blipds.config.deepspeed import offload_folders
from blipds.engine.ops import ASYNC_IO, load_op
from blipds.errors import UserError
from blipds.training.building import prepare_offload_folders

STEPS = 10  # 70 images in batches of 8: into the second epoch
# what no CPU has: DeepSpeed's quantizer is a CUDA kernel (the rest of zero3_multinode trains)
CUDA_ONLY = ("zero_quantized_weights", "zero_quantized_gradients")


def names() -> list[str]:
    return sorted(path.stem for path in (REPOSITORY / "ds_configs").glob("*.json"))


def spec(name, folder):
    """The file as it is, but for fp32, a folder that exists, and what needs CUDA."""
    ds = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    ds["bf16"]["enabled"] = ds["fp16"]["enabled"] = False
    zero = ds["zero_optimization"]
    for key in CUDA_ONLY:
        if key in zero:
            zero[key] = False
    for section in (zero.get("offload_optimizer", {}), zero.get("offload_param", {})):
        if section.get("device") == "nvme":
            section["nvme_path"] = str(folder)
    return {**shapes_spec(name, 0, 4, 1, STEPS), "ds": ds, "nvme": str(folder) if "nvme" in name else None}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{file: {losses, weight_sums, nvme_bytes}} of one launch; without libaio all but the NVMe file."""
    folder = tmp_path_factory.mktemp("ds_configs")
    nvme = tmp_path_factory.mktemp("nvme")
    libaio = not any(load_op(builder, print) for builder in ASYNC_IO)
    found = train(folder, 2, [spec(name, nvme) for name in names() if libaio or "nvme" not in name])
    found["left on the disk"] = [str(path) for path in nvme.rglob("*") if path.is_file()]
    return found


@pytest.fixture
def nvme(results):
    if "zero3_nvme" not in results:
        reason = "DeepSpeed's async_io does not compile: it needs libaio-dev, which tests/run.sh could not install"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return results["zero3_nvme"]


def test_nvme_needs_a_folder_and_each_run_has_its_own_in_it(tmp_path):
    given = spec("zero3_nvme", tmp_path)["ds"]
    one, other = (offload_folders(prepare_offload_folders(given, Path(run))) for run in ("run1", "run2"))
    assert one.isdisjoint(other)
    assert all(Path(folder).parent == tmp_path for folder in one | other)
    with pytest.raises(UserError, match=r"nvme_path .*/none in the DeepSpeed JSON: no folder that can be written to"):
        prepare_offload_folders(spec("zero3_nvme", tmp_path / "none")["ds"], Path())


@pytest.mark.parametrize("name", [name for name in names() if name not in ("zero0", "zero3_nvme")])
def test_it_trains_as_zero0_does(name, results):
    agrees(results[name], results["zero0"])


def agrees(result, reference):
    assert len(result["losses"]) == STEPS
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert result["weight_sums"] == pytest.approx(reference["weight_sums"], rel=1e-3, abs=1e-3)


def test_nvme_trains_as_zero0_does(nvme, results):
    """Parameters, master weights and moments come back from the files, or the losses would not be these."""
    agrees(nvme, results["zero0"])


def test_nvme_writes_the_files_and_removes_them(nvme, results):
    """At least the two moments and the master copy, 12 bytes of most parameters, both ranks together."""
    parameters = 2_000_000
    assert nvme["nvme_bytes"][-1] >= nvme["nvme_bytes"][0] > 12 * parameters
    assert results["left on the disk"] == []
