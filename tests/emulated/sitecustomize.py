"""On the PYTHONPATH of an arm that is to have a device: what the environment names (devices.py)."""

import llama_cpp  # noqa: F401, its libraries are those that a device belongs to
from devices import register

register()
