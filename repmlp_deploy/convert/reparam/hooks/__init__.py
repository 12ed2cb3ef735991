"""Hooks: the merge that another package brings itself, called and compared one call at a time.

Packages merge by methods of their modules, or by one function over the network. Both are called on a float64 copy,
under float64 as the default type, because a hook that makes a new layer makes it in the default type.
"""

from repmlp_deploy.convert.reparam.hooks.merge import describe_hooks, merge_by_function, merge_by_hooks
from repmlp_deploy.convert.reparam.hooks.table import HOOKS, find_hook, hooks_in

__all__ = ["HOOKS", "describe_hooks", "find_hook", "hooks_in", "merge_by_function", "merge_by_hooks"]
