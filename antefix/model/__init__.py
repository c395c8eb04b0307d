"""DeepSeek-V4's architecture in PyTorch, with an explicit cache: a paged pool of blocks and a small window state."""

from antefix.model.arithmetic import Arithmetic, probe
from antefix.model.draft import can_draft, draft, follow, follow_ran
from antefix.model.loading import check_device, load_model, save_model
from antefix.model.model import Model, init_weights
from antefix.model.model_config import ModelConfig
from antefix.model.pool import BlockPool
from antefix.model.replay import replay
from antefix.model.runner import Ran, forward, run_tokens
from antefix.model.window_state import Sequence, WindowState, state_bytes

__all__ = [
    "Arithmetic",
    "BlockPool",
    "Model",
    "ModelConfig",
    "Ran",
    "Sequence",
    "WindowState",
    "can_draft",
    "check_device",
    "draft",
    "follow",
    "follow_ran",
    "forward",
    "init_weights",
    "load_model",
    "replay",
    "probe",
    "run_tokens",
    "save_model",
    "state_bytes",
]
