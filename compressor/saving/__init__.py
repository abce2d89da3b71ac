"""Saving: models and states as files that are whole or not there."""

from compressor.saving.model import (
    MODEL_FILES,
    ModelConfig,
    adapter_at,
    load,
    model_folder,
    model_name,
    read_config,
    save,
)
from compressor.saving.state import load_state, save_state

__all__ = [
    "MODEL_FILES",
    "ModelConfig",
    "adapter_at",
    "load",
    "load_state",
    "model_folder",
    "model_name",
    "read_config",
    "save",
    "save_state",
]
