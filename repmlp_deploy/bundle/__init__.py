"""The bundle on disk: its manifest, its probe and how both are stored."""

from repmlp_deploy.bundle.manifest import (
    MANIFEST,
    SCHEMA,
    ArtifactEntry,
    BatchRange,
    FileEntry,
    Hop,
    Manifest,
    TensorSpec,
    Verdict,
)
from repmlp_deploy.bundle.probe import PROBE, Probe
from repmlp_deploy.bundle.records import EngineReport, GraphRecord, Origin
from repmlp_deploy.bundle.storage import Bundle, check_output_folder, describe_file, hash_file

__all__ = [
    "MANIFEST",
    "PROBE",
    "SCHEMA",
    "ArtifactEntry",
    "BatchRange",
    "Bundle",
    "EngineReport",
    "FileEntry",
    "GraphRecord",
    "Hop",
    "Manifest",
    "Origin",
    "Probe",
    "TensorSpec",
    "Verdict",
    "check_output_folder",
    "describe_file",
    "hash_file",
]
