"""Training on every mesh of eight devices is training on one; faults of communication are caught."""

import pytest

pytest.importorskip("flax", reason="devices are JAX's")
pytest.importorskip("torch", reason="the harness plants faults in torch")

from parity_tests.harness import devices
from parity_tests.harness.measure import failures


def test_every_mesh_trains_as_one_device_does():
    measurements = devices.measure()
    assert len({each.case for each in measurements}) == len(devices.MESHES)
    assert not failures(measurements)


def test_faults_of_communication_are_caught():
    caught = list(devices.survey())
    assert len(caught) == len(devices.FAULTS) >= 8
    missed = [
        f"{fault.name}: expected {fault.where}, got {found}" for fault, found in caught if not fault.shows_at(found)
    ]
    assert not missed
