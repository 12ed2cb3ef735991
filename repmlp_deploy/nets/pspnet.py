"""Keep the earlier import path of `repmlp_deploy.nets.networks.pspnet`."""

from repmlp_deploy.nets.networks.pspnet import *  # noqa: F403 - every public name, by the module's own list
from repmlp_deploy.nets.networks.pspnet import __all__  # noqa: F401 - read by importers
