"""Facts about this machine, for `moekern doctor` and for the head of reports."""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# The features that decide which CPU kernels run, and those that future kernels could use.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16")


def cpu_name() -> str:
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The CPU_FEATURES that the processor has; empty where the system has no /proc/cpuinfo."""
    flags = set(cpuinfo("flags").split())
    return [feature for feature in CPU_FEATURES if feature in flags]


def cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")


def usable_cores() -> int:
    """The number of cores that this process may run on: in many containers fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with the number of threads that PyTorch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver on Linux; elsewhere of the CUDA API, as torch reports it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None if not torch.cuda.is_available() else "present"
    return next((word for word in words if word[0].isdigit() and "." in word), "present")
