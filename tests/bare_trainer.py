"""A Lightning Trainer that trains, and does nothing beside."""

from typing import Any

import pytorch_lightning as pl


def bare_trainer(max_epochs: int, **options: Any) -> pl.Trainer:
    """On the CPU, without logs, checkpoints and progress bars, but for what the options ask."""
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(max_epochs=max_epochs, **(bare | options))
