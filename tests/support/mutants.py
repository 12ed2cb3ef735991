"""The table of planted faults: for each, what is broken, and the place and the fault that the error must name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repmlp_deploy.card import ModelCard, Preprocessing
from repmlp_deploy.errors import CheckpointError, InputError, VerificationError
from support import faults
from support.task_cases import small_card

__all__ = ["CUT", "EXPORT", "FOLDING", "LOADING", "MERGING", "MISLOADING", "Mutant"]

CUT = small_card("repmlpnet", input_size=(16, 24), depths=(1, 2), partitions=((4, 3), (2, 3)), kernels=(1, 3))
"""Two partitions in the first stage, one in the second, h ≠ w, 1 < S < C."""
SQUARE = small_card("repmlpnet", input_size=(24, 24), depths=(1, 1), partitions=((2, 3), (3, 1)), kernels=(3,))
"""Partitions that divide the map either way round."""
OF_2021 = ModelCard(
    name="small-pure-mlp",
    family="pure-mlp",
    task="classify",
    input_size=(12, 18),
    network={
        "channels": (4, 8),
        "depths": (1, 2),
        "partitions": ((4, 3), (2, 3)),
        "groups": (2, 4),
        "kernels": (1, 3),
        "classes": 5,
    },
    preprocessing=Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
)


@dataclass(frozen=True)
class Mutant:
    """A planted fault, and what the error must say about it.

    Attributes:
        name: what was done.
        plant: does it.
        place: the block and the part that the error must name.
        fault: what the error must say went wrong.
        card: the network's.
        caught: the error that ends the export.
        batch: the batch sizes of the export.
    """

    name: str
    plant: faults.Plant
    place: str
    fault: str = ""
    card: ModelCard = CUT
    caught: type[Exception] = VerificationError
    batch: str = "2"


def is_3x3(block: Any, bn: object) -> bool:
    """Check whether a BatchNorm belongs to the 3x3 branch."""
    return bn is block.repconv3.bn


MERGING = [
    Mutant(
        "branch dropped",
        faults.merged_fc3(faults.without_its_3x3_branch),
        "stages.1.0 · fc3 · branch repconv3",
        "dropped",
    ),
    Mutant("branch counted twice", faults.branch_counted_twice, "stages.0.0 · fc3 · branch repconv1", "doubled"),
    Mutant(
        "another eps in every BatchNorm",
        faults.norm_in_merge(lambda block, _bn: faults.wide(block), faults.with_another_eps),
        "stages.1.0 · fc3 · every BatchNorm",
        "eps 0.001 instead of 1e-05",
    ),
    Mutant(
        "variance used as deviation",
        faults.norm_in_merge(lambda block, bn: bn is block.fc3_bn, faults.with_variance_as_deviation),
        "stages.0.0 · fc3 · fc3_bn",
        "variance used as deviation",
    ),
    Mutant(
        "bias of a branch's BatchNorm forgotten",
        faults.norm_in_merge(lambda block, bn: faults.wide(block) and is_3x3(block, bn), faults.without_bias),
        "stages.1.0 · fc3 · branch repconv3",
        "bias forgotten",
    ),
    Mutant(
        "mean of a branch's BatchNorm forgotten",
        faults.norm_in_merge(lambda block, bn: bn is block.repconv1.bn, faults.without_mean),
        "stages.0.0 · fc3 · branch repconv1",
        "mean forgotten",
    ),
    Mutant(
        "padding off by one",
        faults.kernel_in_merge(faults.off_by_one),
        "stages.0.0 · fc3 · every branch",
        "padding off by one",
    ),
    Mutant(
        "Toeplitz matrix transposed",
        faults.kernel_in_merge(faults.transposed_toeplitz),
        "stages.0.0 · fc3 · branch repconv3",
        "Toeplitz matrix transposed",
    ),
    Mutant(
        "h and w swapped in the Toeplitz matrix",
        faults.merged_fc3(faults.with_edges_swapped),
        "stages.1.0 · fc3 · branch repconv3",
        "h and w swapped",
    ),
    Mutant(
        "h and w of the merged block swapped",
        faults.partition_swapped,
        "stages.1.0 · fc3 · partition",
        "h and w swapped: 1x3, expected 3x1",
        card=SQUARE,
    ),
    Mutant(
        "sharesets permuted",
        faults.merged_fc3(faults.changed_matrix(lambda matrix: matrix.roll(1, dims=0))),
        "stages.1.0 · fc3",
        "holds what belongs to shareset",
    ),
    Mutant(
        "FC3 transposed",
        faults.merged_fc3(faults.changed_matrix(lambda matrix: matrix.transpose(1, 2))),
        "stages.1.0 · fc3",
        "matrix transposed",
    ),
    Mutant(
        "one merged weight off by 1e-3",
        faults.merged_fc3(faults.changed_matrix(faults.perturb)),
        "stages.1.0 · fc3",
        "fc3.weight[2, 1, 4] is",
    ),
    Mutant(
        "BatchNorm left in training mode",
        faults.left_training,
        "stages.1.0 · prebn2",
        "BatchNorm2d is left in training mode",
    ),
    Mutant(
        "2021: shift of the pooled BatchNorm dropped",
        faults.pool_norm_in_merge,
        "stages.1.0 · global perceptron",
        "shift dropped",
        card=OF_2021,
    ),
    Mutant(
        "2021: kernel transposed",
        faults.kernel_in_merge_of_2021,
        "stages.0.0 · fc3 · branch repconv3",
        "kernel transposed",
        card=OF_2021,
    ),
    Mutant(
        "2021: convolution fused without the mean",
        faults.conv_fused_without_mean,
        "stem · bn fold",
        "mean forgotten",
        card=OF_2021,
    ),
]

FOLDING = [
    Mutant(
        "prebn1's shift dropped",
        faults.norm_in_fold("prebn1", faults.without_shift),
        "stages.1.0 · prebn1 fold",
        "shift dropped",
    ),
    Mutant(
        "prebn1 with variance as deviation",
        faults.norm_in_fold("prebn1", faults.with_variance_as_deviation),
        "stages.1.0 · prebn1 fold",
        "variance used as deviation",
    ),
    Mutant(
        "prebn2's mean forgotten",
        faults.norm_in_fold("prebn2", faults.without_mean),
        "stages.1.0 · prebn2 fold",
        "mean forgotten",
    ),
    Mutant(
        "gate of the map before prebn1", faults.gate_of_the_raw_map, "stages.1.0 · global perceptron", "not applied"
    ),
    Mutant(
        "gate applied before the shift",
        faults.gate_before_the_shift,
        "stages.0.0 · global perceptron",
        "gate applied before the shift",
    ),
    Mutant(
        "another eps behind the FFN's second convolution",
        faults.fused_in_fold(lambda conv: conv.in_channels == 64, faults.with_another_eps),
        "stages.1.0 · ffn_fc2 · bn fold",
        "eps 0.001 instead of 1e-05",
    ),
    Mutant(
        "downsampling without its BatchNorm's bias",
        faults.fused_in_fold(lambda conv: conv.kernel_size == (2, 2), faults.without_bias),
        "embeds.0 · bn fold",
        "bias forgotten",
    ),
    Mutant("head without its BatchNorm's shift", faults.head_without_shift, "head · head_norm fold", "shift dropped"),
]

EXPORT = [
    Mutant(
        "one weight of the graph off by 1e-3",
        faults.changed_graph(faults.weight_in_graph("stages.1.1.fc3")),
        "stages.1.1 · fc3",
        "stages.1.1.fc3[0, 0, 5] is",
    ),
    Mutant(
        "sharesets of the graph permuted",
        faults.changed_graph(faults.sharesets_of_the_graph),
        "stages.1.0 · fc3",
        "the graph holds another weight",
    ),
    Mutant(
        "GELU by its tanh approximation",
        faults.changed_graph(faults.gelu_by_tanh),
        "stages.1.0 · ffn",
        "computes something else",
    ),
    Mutant(
        "batch size baked into a reshape",
        faults.changed_graph(faults.batch_in_a_reshape),
        "stages.1.1",
        "Reshape",
        batch="1:2:4",
    ),
    Mutant(
        "batch size baked into the borders", faults.batch_at_the_borders, "input", "fails at batch 1", batch="1:2:4"
    ),
]

LOADING = [
    Mutant(
        "a key renamed",
        faults.loaded(faults.key_renamed),
        "stages.1.0.repmlp_block.fc3_bn.weight",
        "missing",
        caught=CheckpointError,
    ),
    Mutant(
        "loaded in training mode",
        faults.loaded_in_training_mode,
        "stages.1.0.prebn1",
        "training mode",
        caught=InputError,
    ),
]
"""What loading itself refuses."""

MISLOADING = [
    Mutant("FC3 loaded transposed", faults.loaded(faults.fc3_transposed), "stages.1.0 · fc3", "holds another weight"),
    Mutant(
        "prebn1 and prebn2 exchanged on loading",
        faults.loaded(faults.norms_exchanged),
        "stages.1.1 · global perceptron · fc1",
        "holds another weight",
    ),
    Mutant("ema weights for the model's", faults.ema_for_model, "conv_embedding", "holds another weight"),
]
"""What only the checkpoint can tell: the export trusts what it loads, `repmlp-verify --ckpt FILE --bisect` does not."""
