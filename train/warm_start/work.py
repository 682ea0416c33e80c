"""What an interrupted warm start goes on from: the folder `<out>.partial`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import TensorReader, TensorSpec, TensorWriter, make_folder, read_json, write_json


class Work:
    """The folder `<out>.partial`: layers that are done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder / "layers")

    @property
    def begun(self) -> bool:
        """Whether an earlier run has left something here."""
        return (self.folder / "identity.json").exists()

    def claim(self, identity: dict) -> None:
        """Raises `UserError` if the folder belongs to another conversion."""
        file = self.folder / "identity.json"
        if not self.begun:
            write_json(file, identity)
        for name, value in read_json(file).items():
            if value != identity.get(name):
                raise UserError(f"{self.folder}: from a warm start of other {name}; delete that folder")

    def has_layer(self, layer: int) -> bool:
        return self._files(layer)[1].exists()

    def layer(self, layer: int) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
        """Weights by stage and measurements of a layer that is done."""
        tensors, facts = self._files(layer)
        stages: dict[str, dict[str, np.ndarray]] = {}
        for name, value in TensorReader(tensors).items():
            stage, _, tensor = name.partition(".")
            stages.setdefault(stage, {})[tensor] = value
        return stages, read_json(facts)

    def save_layer(self, layer: int, stages: dict[str, dict[str, np.ndarray]], facts: dict) -> None:
        flat = {f"{stage}.{name}": value for stage, weights in stages.items() for name, value in weights.items()}
        tensors, file = self._files(layer)
        with TensorWriter(tensors, [TensorSpec(name, value.shape, "float32") for name, value in flat.items()]) as out:
            for name, value in flat.items():
                out.write(name, value)
        write_json(file, facts)

    def _files(self, layer: int) -> tuple[Path, Path]:
        stem = self.folder / "layers" / f"{layer:03d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def remove(self) -> None:
        shutil.rmtree(self.folder)
