"""Keep the earlier import path of `repmlp_deploy.nets.networks.repmlpnet`."""

from repmlp_deploy.nets.networks.repmlpnet import *  # noqa: F403 - every public name, by the module's own list
from repmlp_deploy.nets.networks.repmlpnet import __all__  # noqa: F401 - read by importers
