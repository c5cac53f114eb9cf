"""The version of the code, which all machines of a run have to share."""

import hashlib

from raytrain.kinds import kind_entry_points
from raytrain.modules import source_files


def fingerprint() -> str:
    """Return a hash of the source of raytrain and of all installed kinds, to tell whether two machines run the same."""
    total = hashlib.sha256()
    for package in sorted({"raytrain", *(point.module.partition(".")[0] for point in kind_entry_points().values())}):
        for name, file in source_files(package).items():
            total.update(f"{package}/{name}".encode() + b"\0" + file.read_bytes())
    return total.hexdigest()
