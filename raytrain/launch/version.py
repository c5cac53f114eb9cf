"""Fingerprint of the code, which all nodes of a run must share."""

import hashlib

from raytrain.kinds import shared_packages
from raytrain.modules import source_files


def fingerprint() -> str:
    """Return a hash of the source of raytrain and of all installed kinds."""
    total = hashlib.sha256()
    for package in shared_packages():
        for name, file in source_files(package).items():
            total.update(f"{package}/{name}".encode() + b"\0" + file.read_bytes())
    return total.hexdigest()
