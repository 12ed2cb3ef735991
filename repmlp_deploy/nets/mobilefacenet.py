"""Keep the earlier import path of `repmlp_deploy.nets.networks.mobilefacenet`."""

from repmlp_deploy.nets.networks.mobilefacenet import *  # noqa: F403 - every public name, by the module's own list
from repmlp_deploy.nets.networks.mobilefacenet import __all__  # noqa: F401 - read by importers
