"""Networks of other families: recognised by the names in their checkpoints, and built by timm where timm has them."""

from repmlp_deploy.convert.source.other_families.recognition import OtherFamily, notes_on_merged, recognise_family

__all__ = ["OtherFamily", "notes_on_merged", "recognise_family"]
