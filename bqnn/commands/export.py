"""The verb `bqnn export`: write quantized networks as ONNX files, and verify them."""

from pathlib import Path
from typing import Any

import torch

from bqnn.checkpoints.file import find_checkpoints
from bqnn.checkpoints.recipe import described, load
from bqnn.data.task import make_data
from bqnn.export.card import make_card, write_markdown
from bqnn.export.model import export as export_model
from bqnn.export.packages import require_packages
from bqnn.export.verification import rows_in_units, verify
from bqnn.files import write_json, write_text, written_beside
from bqnn.jobs.isolation import leave_as_found
from bqnn.jobs.job import Job
from bqnn.jobs.parts import run_parts
from bqnn.jobs.terminal import say
from bqnn.quant.onnx.session import start_session
from bqnn.training.process import prepare_torch
from bqnn.training.trainer import refuse_devices


def check(config: dict[str, Any], is_sweep: bool) -> None:
    """Refuse a GPU, and a format whose packages are missing.

    Raises:
        ValueError: The devices are refused, or a package is missing.
    """
    refuse_devices(config["trainer"], allow_several=False)
    require_packages()


def run(job: Job) -> None:
    """Export the checkpoint of a path, or all checkpoints of a pattern."""
    require_packages()
    configs = [
        {**job.config, **described(recipe), "checkpoint": str(path)}
        for path, recipe in find_checkpoints(job.config["checkpoint"], "quantized").items()
    ]
    run_parts(job, configs, export)


def export(job: Job) -> None:
    """Export one network, verify the file, and describe it."""
    leave_as_found(job)
    prepare_torch(job)
    config = job.config
    options = {"trust": config["trust"]}
    model = load(config["checkpoint"], "simulated", **options)
    num_samples = model.check_samples(config["num_samples"])
    data = make_data(config, model.recipe)
    rows = rows_in_units(data)
    path, threads = job.folder / "model.onnx", torch.get_num_threads()
    exported = export_model(model, num_samples, config["form"], config["masks"])
    session = start_session(exported.content(with_masks=True), threads)
    integer = load(config["checkpoint"], "int8", **options)
    verification = verify(session, exported, integer, rows, data.test.targets)
    write_json(job.folder / "verification.json", verification.record())
    verification.require_equal()
    with written_beside(path) as beside:
        beside.write_bytes(exported.content())
    inputs = rows.numpy().astype(exported.inputs.dtype)
    card = make_card(model, exported, verification, path, inputs, threads)
    write_json(job.folder / "card.json", card)
    write_text(job.folder / "card.md", write_markdown(card))
    say(_outcome(verification.record(), path))


def _outcome(record: dict[str, Any], path: Path) -> str:
    return (
        f"{record['differing']} of {record['outputs']} outputs differ from int8 "
        f"({record['rows']} rows, {record['num_samples']} draws)\nresults in {path.parent}"
    )
