"""Keep the earlier import path of `repmlp_deploy.nets.blocks.repmlp2021`."""

from repmlp_deploy.nets.blocks.repmlp2021 import *  # noqa: F403 - every public name, by the module's own list
from repmlp_deploy.nets.blocks.repmlp2021 import __all__  # noqa: F401 - read by importers
