"""Act from a file that `getiaction export` wrote, by ONNX Runtime: the same actions as PyTorch's, sooner on a CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from getiaction.errors import InputError
from getiaction.interop.onnx_graph import CHUNK, NOISE, STEP_NOISE
from getiaction.keys import OBS_ENV_STATE, OBS_STATE, is_camera
from getiaction.policy import Features

SAID = ("n_obs_steps", "horizon", "n_action_steps", "num_inference_steps", "observations")


class OnnxPolicy:
    """Predict action chunks as the exported policy does; made for `Controller`.

    The same seed gives the actions of the policy in PyTorch, to float32 rounding: the noise is drawn in its order.

    Args:
        path: of a file that `getiaction export` wrote.
        num_threads: of ONNX Runtime; None lets it choose.

    Raises:
        InputError: ONNX Runtime is not installed, or this is no such file.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | Path, *, num_threads: int | None = None) -> None:
        self._session = open_session(Path(path), num_threads)
        said = self._session.get_modelmeta().custom_metadata_map
        if missing := [key for key in SAID if key not in said]:
            raise InputError(f"{path} was not written by getiaction export: it does not say its {', '.join(missing)}")
        self.n_obs_steps, self.horizon, self.n_action_steps, self.num_inference_steps, keys = (
            json.loads(said[key]) for key in SAID
        )
        self._shapes = {entry.name: tuple(entry.shape) for entry in self._session.get_inputs()}
        sizes = {key: self._shapes[key][2:] for key in keys}  # without B and To
        self.batch_size, _, action_dim = self._shapes[NOISE]
        self.features = Features(
            action_dim=action_dim,
            state_dim=sizes[OBS_STATE][0] if OBS_STATE in sizes else None,
            env_state_dim=sizes[OBS_ENV_STATE][0] if OBS_ENV_STATE in sizes else None,
            cameras={key: size for key, size in sizes.items() if is_camera(key)},
        )

    def eval(self) -> OnnxPolicy:
        """Return itself: it does not learn."""
        return self

    def predict_action_chunk(
        self,
        observations: Mapping[str, Tensor],
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the Ta actions to execute from the last observation on, in the dataset's units.

        Args:
            observations: `observation.*` (B, To, ...) in raw units, pictures uint8, or float in [0, 1], which are
                rounded to the 256 values that pictures are recorded in.
            noise: (B, T, Da) to start from; drawn from `generator` if None.
            generator: source of all randomness.

        Returns:
            (B, Ta, Da).

        Raises:
            ValueError: B is not the file's.
        """
        fed = {key: self._ready(key, observations[key]) for key in self.features.observation_keys}
        fed[NOISE] = torch.randn(self._shapes[NOISE], generator=generator) if noise is None else noise
        if STEP_NOISE in self._shapes:
            steps, *shape = self._shapes[STEP_NOISE]  # drawn step by step: at once they would be other numbers
            fed[STEP_NOISE] = torch.stack([torch.randn(shape, generator=generator) for _ in range(steps)])
        (chunk,) = self._session.run([CHUNK], {name: value.contiguous().numpy() for name, value in fed.items()})
        return torch.from_numpy(chunk)

    def _ready(self, key: str, value: Tensor) -> Tensor:
        if len(value) != self.batch_size:
            raise ValueError(
                f"{key} has {len(value)} rows, and the file was written for {self.batch_size}: write another with "
                f"getiaction export --batch-size {len(value)}"
            )
        if is_camera(key):
            return value if value.dtype == torch.uint8 else (value * 255).round().to(torch.uint8)
        return value.float()


def open_session(path: Path, num_threads: int | None) -> Any:
    """Return ONNX Runtime's session of a file.

    Raises:
        InputError: ONNX Runtime is not installed, or it cannot open the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnxruntime is not installed: pip install 'getiaction[export]'") from error
    if not path.is_file():
        raise InputError(f"{path} is no file: write one with getiaction export RUN_FOLDER --output {path}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimiser
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base class of their own
        raise InputError(f"{path} cannot be opened by ONNX Runtime: {str(error).splitlines()[0]}") from error
