"""Name the entries of a batch: LeRobot's keys, used by every room.

Shape letters, used in every docstring of this package:
B batch, To observation steps, T horizon, Ta executed action steps, N cameras, C H W image, Ds state, Da action.
"""

OBS_STATE = "observation.state"
OBS_ENV_STATE = "observation.environment_state"
ACTION = "action"
ACTION_IS_PAD = "action_is_pad"


def is_camera(key: str) -> bool:
    """Tell whether `key`, an observation that a policy uses, is a picture: each that is no state."""
    return key.startswith("observation.") and key not in (OBS_STATE, OBS_ENV_STATE)
