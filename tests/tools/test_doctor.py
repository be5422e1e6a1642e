"""The doctor: facts, self-tests that notice a wrong backend, problems with fixes, exit codes."""

import json
import os
from pathlib import Path

import pytest
import torch

import moekern as mk
from moekern import cli
from moekern.backends.cuda.build import kernel_cache
from moekern.cli import doctor, selftest
from moekern.cli.doctor import Diagnosis
from moekern.cli.selftest import SelfTest
from moekern.report import machine


def test_healthy_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["healthy"] is True
    assert found["facts"]["software"]["torch"] == torch.__version__
    assert found["facts"]["CPU"]["kernels"] in ("scalar", "avx2", "avx512", "avx512bf16")
    assert (
        set(found["facts"]["GPU"]) >= {"driver", "torch CUDA", "devices", "CuPy", "kernel cache"}
        or torch.cuda.is_available()
    )
    tested = {(test["backend"], test["dtype"]) for test in found["self_tests"]}
    assert tested >= {(name, dtype) for name in ("reference", "cpu") for dtype in ("float32", "bfloat16", "float16")}
    for test in found["self_tests"]:
        assert test["passed"]
        assert 0 < test["error"] <= test["allowed"]


def passing(backend: str, dtype: torch.dtype, device: str) -> SelfTest:
    return SelfTest(backend, str(dtype).removeprefix("torch."), True, 1e-7, 1e-5, "")


def failing(backend: str, dtype: torch.dtype, device: str) -> SelfTest:
    test = passing(backend, dtype, device)
    if backend == "cpu" and dtype != torch.float32:
        return SelfTest(backend, test.dtype, False, 0.5, 1e-5, "output is off by 5.0e-01 (allowed 1e-05)")
    return test


@pytest.fixture
def spotless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no known facts except its self-tests."""
    for examine in ("examine_cpu", "examine_gpu", "examine_cupy", "examine_cache"):
        monkeypatch.setattr(doctor, examine, lambda diagnosis: None)


@pytest.mark.usefixtures("spotless")
def test_failed_self_test_is_one_problem_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "run_self_test", failing)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    problems = [line for line in out.splitlines() if line.startswith("problem:")]
    assert len(problems) == 1
    assert "the cpu backend fails in bfloat16, float16: output is off by 5.0e-01" in problems[0]
    assert "; fix: " in problems[0]
    assert out.count("FAILED") == 2


@pytest.mark.usefixtures("spotless")
def test_all_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_self_test", passing)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("No problems found.\n")


def test_no_cpu_backend_is_not_healthy() -> None:
    assert not Diagnosis(self_tests=[passing("reference", torch.float32, "cpu")]).healthy
    assert Diagnosis(self_tests=[passing("cpu", torch.float32, "cpu")]).healthy


@pytest.mark.parametrize(
    ("result", "spoiled"), [(0, "output"), (1, "gradient of x"), (2, "gradient of scores"), (4, "gradient of w_down")]
)
def test_self_test_notices_a_wrong_result(monkeypatch: pytest.MonkeyPatch, result: int, spoiled: str) -> None:
    right_grad, right_experts = torch.autograd.grad, mk.experts
    calls = []

    def grad(*args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        gradients = list(right_grad(*args, **kwargs))
        calls.append(gradients)
        if len(calls) == 2 and result:  # the first call makes the float64 result
            gradients[result - 1] = gradients[result - 1] * 1.001
        return tuple(gradients)

    def experts(*args: torch.Tensor) -> torch.Tensor:
        return right_experts(*args) * (1 if result else 1.001)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(mk, "experts", experts)
    test = selftest.run_self_test("reference", torch.float32, "cpu")
    assert not test.passed
    assert test.message.startswith(f"{spoiled} is off by ")


def test_self_test_reports_what_is_raised_and_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest.run_self_test("cuda", torch.float32, "cpu").message.startswith("ValueError: backend: 'cuda'")
    right = mk.experts

    def warn(*args: torch.Tensor) -> torch.Tensor:
        import warnings

        warnings.warn("slow today", stacklevel=1)
        return right(*args)

    monkeypatch.setattr(mk, "experts", warn)
    test = selftest.run_self_test("reference", torch.float32, "cpu")
    assert (test.passed, test.message) == (True, "slow today")


def test_nan_is_an_infinite_error() -> None:
    assert selftest.relative_error(torch.tensor([float("nan")]), torch.ones(1, dtype=torch.float64)) == float("inf")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("gpu")
def test_missing_cupy_is_a_problem_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_importable", lambda name: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    diagnosis = Diagnosis()
    doctor.examine_cupy(diagnosis)
    assert diagnosis.problems == [("CuPy is missing", "pip install 'moekern[cuda12]'")]


def test_missing_cupy_is_a_fact_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_importable", lambda name: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    diagnosis = Diagnosis()
    doctor.examine_cupy(diagnosis)
    assert diagnosis.problems == []
    assert diagnosis.facts["GPU"]["CuPy"] == "not installed (for GPUs: pip install 'moekern[cuda13]')"


@pytest.mark.usefixtures("gpu")
def test_broken_cupy_and_old_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ImportError("libcudart.so.13:\n cannot open shared object file")

    monkeypatch.setattr(machine, "is_importable", lambda name: True)
    monkeypatch.setattr(machine, "package_version", lambda name: "14.2.0")
    monkeypatch.setattr(doctor, "cupy_version", broken)
    monkeypatch.setattr(doctor, "nvrtc_version", lambda: "13.2")
    diagnosis = Diagnosis()
    doctor.examine_cupy(diagnosis)
    problems = [what for what, _ in diagnosis.problems]
    assert problems == [
        "cupy-cuda12x and cupy-cuda13x exclude each other",
        "CuPy is not usable: libcudart.so.13: cannot open shared object file",
    ]


@pytest.mark.parametrize(
    ("torch_cuda", "problem", "fix"),
    [
        (None, "torch was built for the CPU only", "install a CUDA build"),
        ("13.2", "cannot use a GPU", "check nvidia-smi"),
    ],
)
def test_driver_without_a_usable_gpu(
    monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, problem: str, fix: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(doctor.machine, "driver_version", lambda: "580.65.06")
    diagnosis = Diagnosis()
    doctor.examine_gpu(diagnosis)
    assert diagnosis.facts["GPU"] == {
        "driver": "580.65.06",
        "torch CUDA": torch_cuda or "none (torch was built for the CPU only)",
        "devices": "none",
    }
    assert len(diagnosis.problems) == 1
    assert problem in diagnosis.problems[0][0]
    assert fix in diagnosis.problems[0][1]


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder, problems in ((tmp_path / "new" / "cache", 0), (file / "cache", 1)):
        monkeypatch.setenv("MOEKERN_CACHE_DIR", str(folder))
        diagnosis = Diagnosis()
        doctor.examine_cache(diagnosis)
        assert len(diagnosis.problems) == problems
        assert not folder.exists()
    assert diagnosis.problems[0][1] == "set MOEKERN_CACHE_DIR to a writable folder"


def test_environment_that_changes_what_runs_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_CPU_ISA", "avx2")
    diagnosis = Diagnosis()
    doctor.examine_packages(diagnosis)
    assert "MOEKERN_CPU_ISA=avx2" in diagnosis.facts["software"]["environment"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes are those of POSIX")
def test_cache_that_is_damaged_or_open_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(tmp_path / "kernels"))
    names = [f"kernel-{i:040x}.cubin" for i in range(3)]
    for name in names:
        kernel_cache.keep(name, b"cubin" * 1000)
    for name in names[1:]:
        (tmp_path / "kernels" / name).write_bytes(b"cut")
    before = [(tmp_path / "kernels" / name).stat().st_mtime_ns for name in names]
    diagnosis = Diagnosis()
    doctor.examine_cache(diagnosis)
    fact = diagnosis.facts["GPU"]["kernel cache"]
    assert fact == f"{tmp_path / 'kernels'} (writable, trusted): 3 kernels, 0.0 of at most 1024 MiB"
    assert f"{names[1]} is damaged" in diagnosis.problems[0][0] or f"{names[2]} is damaged" in diagnosis.problems[0][0]
    assert diagnosis.problems[0][0].endswith("and 1 more")
    assert [(tmp_path / "kernels" / name).stat().st_mtime_ns for name in names] == before
    (tmp_path / "kernels").chmod(0o777)
    diagnosis = Diagnosis()
    doctor.examine_cache(diagnosis)
    assert "NOT trusted" in diagnosis.facts["GPU"]["kernel cache"]
    assert "kernels is writable by other users (mode 0777)" in diagnosis.problems[0][0]
    assert "MOEKERN_TRUSTED_CACHE=" in diagnosis.problems[0][1]
    assert diagnosis.usable


def test_bad_cache_limit_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_CACHE_LIMIT", "plenty")
    diagnosis = Diagnosis()
    doctor.examine_cache(diagnosis)
    assert not diagnosis.usable
    assert "MOEKERN_CACHE_LIMIT: got 'plenty'" in diagnosis.problems[0][0]


@pytest.mark.parametrize("value", ["gpu", "cuda"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU MOEKERN_BACKEND=cuda works")
def test_a_backend_that_makes_every_call_fail(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.verbs.backend._default", value)
    diagnosis = Diagnosis()
    doctor.examine_environment(diagnosis)
    assert not diagnosis.usable
    assert not diagnosis.healthy
    assert f"MOEKERN_BACKEND={value} makes every call fail: " in diagnosis.problems[0][0]


def test_misspelt_and_misleading_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEKERN_BACKED", "cpu")
    monkeypatch.setenv("MOEKERN_CUDA_DIR", str(tmp_path))
    diagnosis = Diagnosis()
    doctor.examine_environment(diagnosis)
    assert "set MOEKERN_CUDA_DIR to a directory that holds hopper.cuh" in diagnosis.problems[0][0]
    assert "moekern reads no environment variable MOEKERN_BACKED" in diagnosis.problems[1][0]
    assert "did you mean MOEKERN_BACKEND?" in diagnosis.problems[1][1]
