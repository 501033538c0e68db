"""Which GPU is here and what it has used: asked of the driver, without package or CUDA context.

Written from NVIDIA's reference manuals; never run on a machine with a GPU.

Source: CUDA Driver API, "Device Management" and "Version Management"; NVML API Reference,
"System Queries" and "Device Queries".
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

_CUDA, _NVML = "libcuda.so.1", "libnvidia-ml.so.1"
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR, _MINOR = 75, 76
_TEXT_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device that this process sees.

    Attributes:
        name: as the driver tells it, e.g. ``NVIDIA H200``.
        compute_capability: e.g. ``9.0``.
        driver: version of the driver, empty where NVML is not there.
        cuda: latest version that the driver supports, e.g. ``13.0``.
        memory_bytes: of the whole device.
    """

    name: str
    compute_capability: str
    driver: str
    cuda: str
    memory_bytes: int


def find() -> Gpu | None:
    """The GPU, or None where there is no driver or no device."""
    cuda = _library(_CUDA)
    device, count = ctypes.c_int(), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    if count.value == 0 or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(_TEXT_BYTES)
    major, minor, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory = ctypes.c_size_t()
    cuda.cuDeviceGetName(name, _TEXT_BYTES, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDriverGetVersion(ctypes.byref(version))  # 1000 major + 10 minor
    return Gpu(
        name=name.value.decode(),
        compute_capability=f"{major.value}.{minor.value}",
        driver=_driver(),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        memory_bytes=memory.value,
    )


def energy() -> Callable[[], float] | None:
    """A meter: joules that the device has used, whoever made it work, idle power included.

    Counted by the device itself since its driver was loaded (Volta and later), in steps of a few
    tens of milliseconds.

    Returns:
        The meter; None where there is no device, or it does not count.
    """
    cuda, nvml = _library(_CUDA), _library(_NVML)
    device, handle = ctypes.c_int(), ctypes.c_void_p()
    bus = ctypes.create_string_buffer(_TEXT_BYTES)
    if cuda is None or nvml is None or cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    # the two libraries number devices differently: the place on the bus says which one is meant
    if cuda.cuDeviceGetPCIBusId(bus, _TEXT_BYTES, device) or nvml.nvmlInit_v2():
        return None
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle)):
        return None
    count = ctypes.c_ulonglong()

    def joules() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(count))
        return count.value / 1000

    failed = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(count))
    return None if failed else joules


def _driver() -> str:
    nvml = _library(_NVML)
    if nvml is None or nvml.nvmlInit_v2():
        return ""
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    failed = nvml.nvmlSystemGetDriverVersion(text, _TEXT_BYTES)
    nvml.nvmlShutdown()
    return "" if failed else text.value.decode()


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:  # not installed
        return None
