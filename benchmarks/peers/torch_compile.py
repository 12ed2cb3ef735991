"""Peer: `torch.compile` of the network as upstream merges it."""

from __future__ import annotations

import time

import torch
from common import answer, arguments, images

from repmlp_deploy.bench.subjects.seeding import seeded_network
from repmlp_deploy.card import load_card
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form


@torch.inference_mode()
def main() -> None:
    """Compile, time."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(options.threads)
    card = load_card(options.model)
    network = torch.compile(upstream_form(merge_branches(seeded_network(card))))
    inputs = torch.from_numpy(images(options.batch, (3, *card.input_size)))
    started = time.perf_counter()
    network(inputs)
    answer("torch.compile", options, lambda: network(inputs), time.perf_counter() - started)


if __name__ == "__main__":
    main()
