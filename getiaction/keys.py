"""Name the entries of a batch: LeRobot's keys, used by every room.

Shape letters, used in every docstring of this package:
B batch, To observation steps, T horizon, Ta executed action steps, N cameras, C H W image, Ds state, Da action.
"""

OBS_STATE = "observation.state"
OBS_ENV_STATE = "observation.environment_state"
OBS_IMAGE_PREFIX = "observation.image"
ACTION = "action"
ACTION_IS_PAD = "action_is_pad"


def is_camera(key: str) -> bool:
    """Tell whether `key` names a camera (`observation.image` or `observation.images.<name>`)."""
    return key == OBS_IMAGE_PREFIX or key.startswith(OBS_IMAGE_PREFIX + "s.") or key.startswith(OBS_IMAGE_PREFIX + ".")
