"""A Lightning Trainer without loggers, checkpoints and progress bars."""

from typing import Any

import pytorch_lightning as pl


def bare_trainer(max_epochs: int, **options: Any) -> pl.Trainer:
    """Create a Trainer on the CPU that only trains; `options` override the arguments."""
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(max_epochs=max_epochs, **(bare | options))
