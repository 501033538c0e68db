"""Which GPU is here, asked of stand-ins for the driver's libraries."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from engineworks.runtime import gpu

MEMORY = 150_754_820_096


class Driver:
    """The functions of libcuda that are called, with their argument lists; 0 is success."""

    def __init__(self, *, count: int = 1, init: int = 0) -> None:
        self.count, self.init = count, init

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        assert ordinal == 0
        device._obj.value = 7
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        assert length == len(name)
        assert device.value == 7
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        size._obj.value = MEMORY
        return 0

    def cuDeviceGetPCIBusId(self, text: Any, length: int, device: Any) -> int:
        assert length == len(text)
        assert device.value == 7
        text.value = b"0000:1b:00.0"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12080
        return 0


class Management:
    """The functions of libnvidia-ml that are called."""

    def __init__(self, *, init: int = 0, version: int = 0, handle: int = 0, energy: int = 0):
        self.init, self.version, self.handle, self.energy = init, version, handle, energy
        self.open = False
        self.millijoules = 0

    def nvmlInit_v2(self) -> int:
        self.open = self.init == 0
        return self.init

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        assert length == len(text)
        text.value = b"580.65.06"
        return self.version

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: Any, handle: Any) -> int:
        assert bus.value == b"0000:1b:00.0"
        handle._obj.value = 5
        return self.handle

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:
        assert self.open
        assert handle.value == 5
        energy._obj.value = self.millijoules
        return self.energy

    def nvmlShutdown(self) -> int:
        self.open = False
        return 0


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr(gpu, "_library", found.get)
    return found


def test_a_gpu_is_described_by_its_driver(libraries: dict[str, Any]) -> None:
    management = Management()
    libraries.update({"libcuda.so.1": Driver(), "libnvidia-ml.so.1": management})
    assert gpu.find() == gpu.Gpu(
        name="NVIDIA H200",
        compute_capability="9.0",
        driver="580.65.06",
        cuda="12.8",
        memory_bytes=MEMORY,
    )
    assert not management.open


@pytest.mark.parametrize("driver", [None, Driver(count=0), Driver(init=100)])
def test_none_is_found_without_a_driver_or_a_device(
    libraries: dict[str, Any], driver: Driver | None
) -> None:
    libraries["libcuda.so.1"] = driver
    assert gpu.find() is None


@pytest.mark.parametrize("management", [None, Management(init=9), Management(version=2)])
def test_a_driver_that_does_not_tell_its_version_is_no_obstacle(
    libraries: dict[str, Any], management: Management | None
) -> None:
    libraries.update({"libcuda.so.1": Driver(), "libnvidia-ml.so.1": management})
    found = gpu.find()
    assert found is not None
    assert found.driver == ""


def test_a_library_that_is_not_installed_is_none() -> None:
    assert gpu._library("libengineworks-has-no-such.so.1") is None


def test_energy_is_counted_in_joules_on_the_device_of_this_process(
    libraries: dict[str, Any],
) -> None:
    management = Management()
    libraries.update({"libcuda.so.1": Driver(), "libnvidia-ml.so.1": management})
    meter = gpu.energy()
    assert meter is not None
    management.millijoules = 2**40 + 250  # more than 32 bits hold
    assert meter() == (2**40 + 250) / 1000


@pytest.mark.parametrize(
    ("driver", "management"),
    [
        (None, Management()),
        (Driver(), None),
        (Driver(init=100), Management()),
        (Driver(), Management(init=9)),
        (Driver(), Management(handle=6)),
        (Driver(), Management(energy=3)),  # not supported by this device
    ],
)
def test_energy_that_nobody_counts_is_none(
    libraries: dict[str, Any], driver: Driver | None, management: Management | None
) -> None:
    libraries.update({"libcuda.so.1": driver, "libnvidia-ml.so.1": management})
    assert gpu.energy() is None


@pytest.mark.gpu
def test_this_machines_gpu_is_the_one_of_its_driver() -> None:
    if gpu._library("libcuda.so.1") is None:
        pytest.skip("there is no CUDA driver here")
    found = gpu.find()
    assert found is not None
    assert found.name
    assert float(found.compute_capability) >= 7.0
    assert found.memory_bytes > 1 << 30
    assert ctypes.sizeof(ctypes.c_size_t) == 8
