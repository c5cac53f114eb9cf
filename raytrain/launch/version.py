"""The version of the code, which all machines of a run have to share."""

import hashlib

from raytrain.kinds import shared_packages
from raytrain.modules import sources_of


def fingerprint() -> str:
    """Return a hash of the source of raytrain and of all installed kinds, to tell whether two machines run the same."""
    total = hashlib.sha256()
    for package in shared_packages():
        for name, file in sources_of(package).items():
            total.update(f"{package}/{name}".encode() + b"\0" + file.read_bytes())
    return total.hexdigest()
