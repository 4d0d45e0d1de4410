"""Act from a file that `getiaction export` wrote, by ONNX Runtime: the same actions as PyTorch's, sooner on a CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from getiaction.errors import InputError, first_line
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
        self._shapes = {entry.name: tuple(entry.shape) for entry in self._session.get_inputs()}
        chunk = {entry.name: tuple(entry.shape) for entry in self._session.get_outputs()}
        said = self._session.get_modelmeta().custom_metadata_map
        try:
            self.n_obs_steps, self.horizon, self.n_action_steps, self.num_inference_steps, keys = (
                json.loads(said[key]) for key in SAID
            )
            self.batch_size, horizon, action_dim = self._shapes[NOISE]
            sizes = {key: self._shapes[key][2:] for key in keys}  # without B and To
            seen = {self._shapes[key][:2] for key in keys}
            self.features = Features(
                action_dim=action_dim,
                state_dim=sizes[OBS_STATE][0] if OBS_STATE in sizes else None,
                env_state_dim=sizes[OBS_ENV_STATE][0] if OBS_ENV_STATE in sizes else None,
                cameras={key: size for key, size in sizes.items() if is_camera(key)},
            )
            fits = seen == {(self.batch_size, self.n_obs_steps)} and horizon == self.horizon
            fits = fits and chunk[CHUNK] == (self.batch_size, self.n_action_steps, action_dim)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} was not written by getiaction export: {error!r} in what it says of itself"
            ) from error
        if not fits:
            raise InputError(f"{path} does not do what it says of itself: write it again with getiaction export")

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
            ValueError: B, or another size, is not the file's; or a picture holds other numbers.
        """
        given: dict[str, Tensor] = {key: observations[key] for key in self.features.observation_keys}
        given[NOISE] = torch.randn(self._shapes[NOISE], generator=generator) if noise is None else noise
        if STEP_NOISE in self._shapes:
            steps, *shape = self._shapes[STEP_NOISE]  # drawn step by step: at once they would be other numbers
            given[STEP_NOISE] = torch.stack([torch.randn(shape, generator=generator) for _ in range(steps)])
        fed = {name: self._ready(name, value).contiguous().numpy() for name, value in given.items()}
        (chunk,) = self._session.run([CHUNK], fed)
        return torch.from_numpy(chunk)

    def _ready(self, name: str, value: Tensor) -> Tensor:
        wanted, got = self._shapes[name], tuple(value.shape)
        if got != wanted:
            other = got[1:] == wanted[1:]
            advice = f": write another file with getiaction export --batch-size {len(value)}" if other else ""
            raise ValueError(f"{name} must have shape {wanted}, got {got}{advice}")
        value = value.detach()
        return as_recorded(name, value) if is_camera(name) else value.float()


def as_recorded(key: str, pictures: Tensor) -> Tensor:
    """Return pictures as uint8; what resizing left a little below 0 or above 1 is cut off.

    Raises:
        ValueError: they are neither uint8 nor float in [0, 1].
    """
    if pictures.dtype == torch.uint8:
        return pictures
    if not pictures.is_floating_point() or not ((pictures > -0.5) & (pictures < 1.5)).all():  # NaN is neither
        raise ValueError(f"{key} must be uint8, or float in [0, 1]; it is {pictures.dtype} and holds other numbers")
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def open_session(path: Path, num_threads: int | None) -> Any:
    """Return ONNX Runtime's session of a file.

    Raises:
        InputError: ONNX Runtime is not installed, or it cannot open the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnxruntime is not installed: pip install onnxruntime") from error
    if not path.is_file():
        raise InputError(f"{path} is no file: write one with getiaction export RUN_FOLDER --output {path}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimiser
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base class of their own
        raise InputError(f"{path} cannot be opened by ONNX Runtime: {first_line(error)}") from error
