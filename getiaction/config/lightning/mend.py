"""Mend what contradicts itself in a file of the format, saying each time what was changed and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from getiaction.config.checks import HALF
from getiaction.config.lightning.keys import MODEL_DEFAULTS
from getiaction.config.noise_checks import NOISE_REACHED
from getiaction.config.value_checks import is_number
from getiaction.data.metadata import DatasetMetadata
from getiaction.data.windows import delta_timestamps
from getiaction.errors import InputError

MARGIN = 0.875  # of a resized picture's side is left by a crop: the reference's 84 of 96
TOLERANCE_S = 1e-4
MOST_TIMES = 10_000
DOWN_DIMS = MODEL_DEFAULTS["down_dims"]


@dataclass
class Mended:
    """Hold `model.init_args`, mended in place, and the lines that say how.

    Args:
        values: every key that is given, or has a default that is not this package's own.
    """

    values: dict[str, Any]
    lines: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any) -> Any:
        """Return a value, or the default of the first GetiAction's class."""
        return self.values.get(key, default)

    def set(self, key: str, value: Any, why: str, default: Any = None) -> None:
        """Change a value and say so."""
        self.lines.append(f"{key} {say(self.values.get(key, default))} -> {say(value)}: {why}")
        self.values[key] = value


def mend(given: dict[str, Any], deltas: dict[str, Any] | None, metadata: DatasetMetadata) -> Mended:
    """Mend a model against itself, its action windows and its data.

    Args:
        given: `model.init_args`.
        deltas: `data.init_args.delta_timestamps`.
        metadata: of the dataset.

    Raises:
        InputError: values that nothing can be made of.
    """
    mended = Mended(dict(given))
    for check in (mend_norm, mend_time, mend_noise, mend_schedule):
        check(mended)
    mend_crop(mended, metadata)
    mended.lines += mend_deltas(mended, deltas, metadata)
    return mended


def mend_norm(mended: Mended) -> None:
    """Keep the batch norm that pretrained weights were trained with."""
    weights = mended.get("pretrained_backbone_weights", None)
    if weights is not None and mended.get("use_group_norm", True):
        why = f"{weights} were trained with batch norm, which group norm cannot take over"
        mended.set("use_group_norm", False, why, default=True)


def mend_time(mended: Mended) -> None:
    """Make the horizon divisible by the U-Net's halvings, and the executed actions fit into it."""
    levels, horizon = len(mended.get("down_dims", DOWN_DIMS)), mended.get("horizon", 16)
    factor = 2**levels
    if horizon % factor:
        fit = math.ceil(horizon / factor) * factor
        times = {0: "never", 1: "once", 2: "twice"}.get(levels - 1, f"{levels - 1} times")
        why = f"the U-Net halves time {times}, and LeRobot opens multiples of {factor} only"
        mended.set("horizon", fit, why, default=16)
        horizon = fit
    longest = horizon - mended.get("n_obs_steps", 2) + 1
    if longest < 1:
        raise InputError(
            f"model.init_args.n_obs_steps={mended.get('n_obs_steps', 2)} must be at most horizon={horizon}, "
            "which counts from the first observation"
        )
    if mended.get("n_action_steps", 8) > longest:
        why = f"of {horizon} predicted actions {longest} lie ahead: the first belong to past observations"
        mended.set("n_action_steps", longest, why, default=8)


def mend_noise(mended: Mended) -> None:
    """Let training see the noise that acting starts from, and act in no more steps than were trained."""
    import diffusers

    steps = mended.get("num_train_timesteps", 100)
    betas = {key: mended.values[key] for key in ("beta_schedule", "beta_start", "beta_end") if key in mended.values}
    try:
        scheduler = diffusers.DDPMScheduler(steps, **{"beta_schedule": "squaredcos_cap_v2", **betas})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(f"model.init_args.beta_schedule={betas.get('beta_schedule')}: {error}") from error
    alpha = float(scheduler.alphas_cumprod[-1])  # type: ignore[attr-defined]
    if alpha > NOISE_REACHED:
        why = f"over {steps} steps it ends at cumulative alpha {alpha:.2f}, so acting starts from noise never seen"
        mended.set("beta_schedule", "squaredcos_cap_v2", why)
    inference = mended.get("num_inference_steps", None)
    if inference is not None and inference > steps:
        mended.set("num_inference_steps", steps, f"there are num_train_timesteps={steps} only")


def mend_schedule(mended: Mended) -> None:
    """Warm up where a warm-up is asked for."""
    if mended.get("scheduler_name", "cosine") != "constant":
        return
    if mended.values.get("scheduler_warmup_steps"):
        steps = mended.values["scheduler_warmup_steps"]
        mended.set("scheduler_name", "constant_with_warmup", f"constant alone has no scheduler_warmup_steps={steps}")
    else:
        mended.values["scheduler_warmup_steps"] = 0


def mend_crop(mended: Mended, metadata: DatasetMetadata) -> None:
    """Resize pictures before a crop that would show less than half of them: "resolution" was meant."""
    crop, resize = mended.get("crop_shape", [84, 84]), mended.get("resize_shape", None)
    picture = resize or next((list(shape[1:]) for shape in metadata.cameras.values()), None)
    if crop is None or picture is None:
        return
    if any(side > whole for side, whole in zip(crop, picture, strict=True)):
        fit = [min(side, whole) for side, whole in zip(crop, picture, strict=True)]
        mended.set("crop_shape", fit, f"pictures have {picture[0]}x{picture[1]} pixels", default=[84, 84])
    elif resize is None and (shown := crop[0] * crop[1] / (picture[0] * picture[1])) < HALF:
        why = f"a crop of {crop[0]}x{crop[1]} shows {shown:.0%} of a {picture[0]}x{picture[1]} picture"
        if mended.get("crop_is_random", True):
            mended.set("resize_shape", [round(side / MARGIN) for side in crop], f"{why}; it is cropped from that now")
        else:
            mended.set("resize_shape", list(crop), f"{why}; it is resized to that now")
            mended.values["crop_shape"] = None


def mend_deltas(mended: Mended, deltas: dict[str, Any] | None, metadata: DatasetMetadata) -> Iterator[str]:
    """Say where `delta_timestamps` are not what steps, horizon and frame rate make them; the latter are used."""
    if deltas is None:
        return
    n_obs_steps, horizon = mended.get("n_obs_steps", 2), mended.get("horizon", 16)
    seen = [key for key in (*metadata.vectors, *metadata.cameras) if key != "action"]
    wanted = delta_timestamps([*seen, "action"], n_obs_steps=n_obs_steps, horizon=horizon, fps=metadata.fps)
    for key, times in deltas.items():
        if key not in wanted:
            yield f"delta_timestamps.{key} left out: the dataset has {', '.join(wanted)}"
            continue
        times = expand(key, times)
        if why := difference(times, wanted[key], metadata.fps, n_obs_steps if key == "action" else None):
            yield f"delta_timestamps.{key} {say_times(times)} -> {say_times(wanted[key])}: {why}"
    if missing := [key for key in seen if key not in deltas]:
        yield (
            f"delta_timestamps.{', '.join(missing)} none -> {say_times(wanted[missing[0]])}: "
            f"n_obs_steps={n_obs_steps} observations at {metadata.fps:g} Hz"
        )


def difference(times: Sequence[float], wanted: Sequence[float], fps: float, n_obs_steps: int | None) -> str | None:
    """Return why `times` are not those wanted, or None if they are."""
    if len(times) == len(wanted) and all(abs(a - b) <= TOLERANCE_S for a, b in zip(times, wanted, strict=True)):
        return None
    spacing = times[1] - times[0] if len(times) > 1 else 1 / fps
    if abs(spacing - 1 / fps) > TOLERANCE_S:
        speed = spacing * fps
        return f"the data have {fps:g} Hz; {spacing:g} s apart, a robot would act {speed:.3g} times as fast"
    if n_obs_steps is not None and abs(times[0] - wanted[0]) > TOLERANCE_S:
        return f"with n_obs_steps={n_obs_steps} actions count from the first observation"
    return f"{len(wanted)} steps are needed" if len(times) != len(wanted) else "they must end now"


def expand(key: str, times: Any) -> list[float]:
    """Return times as a list, with `...` filled in.

    Raises:
        InputError: they are no list of seconds.
    """
    said = f"data.init_args.delta_timestamps.{key}={times}"
    problem = InputError(f"{said} must be a list of seconds, [0.0, 0.1, ..., 1.5]")
    if not isinstance(times, list) or not times:
        raise problem
    place = times.index("...") if "..." in times else None
    if not all(is_number(time) for number, time in enumerate(times) if number != place):
        raise problem
    if place is None:
        return [float(time) for time in times]
    if place < 2 or place != len(times) - 2:
        raise problem
    first, step, last = times[0], times[1] - times[0], times[-1]
    count = round((last - first) / step) + 1 if step > 0 else 0
    if not 2 <= count <= MOST_TIMES:
        raise problem
    return [first + step * number for number in range(count)]


def say(value: Any) -> str:
    """Return a value as the file would have it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def say_times(times: Sequence[float]) -> str:
    """Return times in short."""
    shown = [f"{time:g}" for time in times]
    return f"[{', '.join(shown if len(shown) <= 4 else [*shown[:2], '...', shown[-1]])}]"
