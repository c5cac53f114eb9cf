"""What this package knows of Flower. Imported before Flower itself, which reads the settings below on import."""

import os

SETTINGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""No report to Flower's telemetry and no question for a newer version, unless the user wants them."""

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
