"""Keep the earlier import path of `repmlp_deploy.nets.networks.pure_mlp`."""

from repmlp_deploy.nets.networks.pure_mlp import *  # noqa: F403 - every public name, by the module's own list
from repmlp_deploy.nets.networks.pure_mlp import __all__  # noqa: F401 - read by importers
