"""DeepSeek-V4's architecture in PyTorch, with an explicit cache: a paged pool of blocks and a small window state."""

from antefix.model.config import ModelConfig
from antefix.model.loading import load_model, save_model
from antefix.model.model import Model, init_weights

__all__ = ["Model", "ModelConfig", "init_weights", "load_model", "save_model"]
