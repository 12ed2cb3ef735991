"""Keep the earlier import path of `repmlp_deploy.nets.networks.repmlp_resnet`."""

from repmlp_deploy.nets.networks.repmlp_resnet import *  # noqa: F403 - every public name, by the module's own list
from repmlp_deploy.nets.networks.repmlp_resnet import __all__  # noqa: F401 - read by importers
