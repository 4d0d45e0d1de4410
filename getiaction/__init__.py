"""GetiAction: train Diffusion Policies, from one command."""

from importlib.metadata import version

__version__ = version("getiaction")
