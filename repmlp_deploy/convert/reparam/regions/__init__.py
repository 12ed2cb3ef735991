"""Region merging: every structural re-parameterization, found in the traced graph instead of in class names.

A *region* is a part of the graph that computes an affine, shift-invariant map: convolutions, linear layers, BatchNorms
in evaluation mode, scales, average pools, zero pads, copies and additions, however they branch. It equals one
convolution, plus what it adds of other values.

`maps` is the algebra, `reading` says what a node computes, `commuting` moves BatchNorms through reshapes, `choosing`
says which regions pay, `writing` puts them back, and `checking` runs each beside what it replaces.
"""

from repmlp_deploy.convert.reparam.regions.merge import Merged, Region, Report, merge_regions, report_of

__all__ = ["Merged", "Region", "Report", "merge_regions", "report_of"]
