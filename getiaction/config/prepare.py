"""Check all that can be checked before anything is decoded or written."""

from __future__ import annotations

from getiaction.config.checks import check_config
from getiaction.config.dataset_checks import check_dataset
from getiaction.config.schema import Config
from getiaction.config.sources import find_data
from getiaction.data.mixture import Mixture


def find_checked_data(config: Config) -> Mixture:
    """Return the datasets that a config names, once it and they are known to fit.

    Raises:
        InputError: the config cannot work, there is no such dataset, or the two do not fit; all errors, one a line.
    """
    check_config(config)
    mixture = find_data(config)
    check_dataset(config, mixture)
    return mixture
