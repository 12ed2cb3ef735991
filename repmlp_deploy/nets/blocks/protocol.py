"""What a block type says of itself, so that it can be merged, folded, proved and blamed.

A block type is a module class that derives from `Reparameterizable`, in a file of its own in this package, and has an
entry in `nets.block_types.BLOCKS`. Merging, folding, diagnosis and the comparison of weights know no class by name.

    trained block --merged()--> merged module --folded()--> modules without any BatchNorm

Diagnosis compares what was made with `terms()`, the summands of a merged matrix, or with the `checks()` of a block
that says more. Both must be computed apart from `merged()` and `folded()`: a fault must not excuse itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from repmlp_deploy.nets.blocks.checks import Check, Finding, parameter_checks
from repmlp_deploy.nets.blocks.terms import MergedSum, Term, merged_checks

__all__ = ["Reparameterizable"]


class Reparameterizable(nn.Module):
    """A module that can be merged or folded. Every method has a default: override what the block type needs.

    Attributes:
        branched: the module has parallel branches while it is trained; a network without any such module is refused.
        mergeable: merging changes what is inside, so its children are compared as a whole and never one by one.
        exported_whole: an exported graph must hold every weight of the module unchanged.
        foreign_parts: names of children for which `exported_whole` does not hold, as they may be anybody's modules.
        as_convolution: compute as upstream's deploy mode does, for a baseline.
    """

    branched: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    exported_whole: ClassVar[bool] = False
    foreign_parts: ClassVar[tuple[str, ...]] = ()
    as_convolution: bool = False

    @property
    def deploy(self) -> bool:
        """Whether nothing is left to merge."""
        return True

    @classmethod
    def adopted(cls, foreign: nn.Module) -> Self | None:
        """Return the block of this type that shares the tensors of a module of another package.

        None means that `foreign` has another structure.

        Raises:
            AttributeError, ValueError: `foreign` has the structure, but a part or a size is missing.
        """
        del foreign
        return None

    def example_shapes(self) -> list[tuple[int, ...]]:
        """Return shapes (N, …) of inputs on which an adopted block is compared with its original, the best first."""
        return []

    def merged(self) -> nn.Module:
        """Return the merged form as a new module, computed in float64 and stored in the dtype of the weights."""
        return self

    def folded(self) -> dict[nn.Module, nn.Module]:
        """Return what replaces this merged module, or children of it, so that no BatchNorm is left."""
        return {}

    def terms(self, group: int, columns: Tensor | None = None) -> list[Term]:
        """Return the summands of one group of the merged matrix, or of some columns of it.

        Raises:
            ValueError: the block is merged already.
        """
        del group, columns
        return []

    def merged_sum(self, made: nn.Module) -> MergedSum | None:
        """Return where `made`, merged or folded, stores the sum of `terms`; None where it stores none."""
        del made
        return None

    def checks(self, made: nn.Module) -> Iterator[Check]:
        """Yield the checks of every tensor of `made`, the merged or folded form of this trained module."""
        stored = self.merged_sum(made)
        yield from parameter_checks(self, made, "") if stored is None else merged_checks(self, stored)

    def wrong_geometry(self, made: nn.Module) -> Finding | None:
        """Return what is wrong with sizes of `made` that no tensor shows; None where nothing is."""
        del made
        return None

    def wrong_forward(self, made: nn.Module, x: Tensor, got: Any) -> Finding | None:
        """Return what `made` did instead of this module, given `x`, when each of its tensors is right.

        Args:
            made: the merged or folded form.
            x: the first input, float64.
            got: the output of `made`.
        """
        del made, x, got
        return None

    def judged_together(self, made: nn.Module) -> tuple[str, ...]:
        """Return the names of children that only the output of the whole module can judge, as they share their work."""
        del made
        return ()
