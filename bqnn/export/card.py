"""The model card: what an exported model is, how good, how large and how fast."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bqnn.export import measure
from bqnn.export.model import Exported, export
from bqnn.export.verification import Verification
from bqnn.inference.predictions import Prediction, score, with_non_finite
from bqnn.methods import Method
from bqnn.quant.engines.measure import has_vnni
from bqnn.quant.summary import sizes
from bqnn.seeds import Stream, stream_seed
from bqnn.text import counted

NUM_DRAWS = (1, 5, 20)  # that are measured
NUM_RESAMPLES = 50  # of the test rows, for the standard errors of metrics


def make_card(
    model: Method,
    exported: Exported,
    verification: Verification,
    path: Path,
    rows: np.ndarray,
    threads: int,
) -> dict[str, Any]:
    """Describe an exported model. This runs files in processes of their own.

    Args:
        model: The model with fake quantization, with its recipe.
        exported: What the file was written from.
        verification: The comparison of the file with int8.
        path: The file.
        rows: Inputs of the file [N, ...], to measure it with.
        threads: The number of threads to measure with.

    Returns:
        The content of card.json.
    """
    import onnxruntime

    recipe = model.recipe
    assert recipe is not None
    facts, quant = recipe["facts"], recipe["quant"]
    record = verification.record()
    return {
        "method": recipe["method"]["name"],
        "net": recipe["net"]["name"],
        "task": recipe["task"]["name"],
        "likelihood": facts["likelihood"],
        "class_names": facts.get("class_names"),
        "num_train": facts["num_train"],
        "inputs": {
            "shape": list(exported.inputs.shape),
            "dtype": exported.inputs.dtype.name,
            "largest_pixel": facts.get("input_scale"),
            "features": facts.get("feature_names"),
        },
        "form": verification.form,
        "masks": record["masks"],
        "num_samples": record["num_samples"],
        "weight_bits": quant["weight_bits"],
        "activation_bits": quant["activation_bits"],
        "engine": quant.get("engine"),
        "seed": recipe["seed"],
        "test_rows": record["rows"],
        "calibration": recipe.get("calibration"),
        "metrics": metrics_with_errors(verification.prediction.calibrated(model.calibration)),
        "verification": {
            k: record[k] for k in ("outputs", "differing", "largest_difference_steps")
        },
        "bytes": {"file": path.stat().st_size, **sizes(model.net)},
        "speed": {
            "draws": _measured_draws(model, exported, path, rows, threads),
            "threads": threads,
            "runtime": f"ONNX Runtime {onnxruntime.__version__}",
            "cpu": cpu_name(),
            "vnni": has_vnni(),
        },
    }


def metrics_with_errors(prediction: Prediction) -> dict[str, dict[str, float]]:
    """Compute metrics with their standard errors over the test rows, by the bootstrap.

    Args:
        prediction: Predictions with targets.

    Returns:
        `value` and `standard_error` of each metric that is finite.

    Examples:
        >>> from bqnn.inference.likelihoods import Classification
        >>> targets = torch.tensor([0, 1]).repeat(50)
        >>> prediction = Prediction(Classification(["a", "b"]), torch.zeros(1, 100, 2), targets)
        >>> metrics_with_errors(prediction)["error"]["value"]
        0.5
    """
    assert prediction.targets is not None
    values = with_non_finite(score, prediction)
    generator = torch.Generator().manual_seed(stream_seed(0, Stream.COMPARISON))
    count = len(prediction.targets)
    resampled: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(NUM_RESAMPLES):
        index = torch.randint(count, (count,), generator=generator)
        part = Prediction(
            prediction.likelihood, prediction.samples[:, index], prediction.targets[index]
        )
        for name, value in with_non_finite(score, part).items():
            resampled[name].append(value)
    errors = {name: float(np.std(each, ddof=1)) for name, each in resampled.items()}
    return {
        name: {"value": value, "standard_error": errors[name]}
        for name, value in values.items()
        if np.isfinite(value) and np.isfinite(errors[name])
    }


def cpu_name() -> str:
    """Return the name of the CPU of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_markdown(card: Mapping[str, Any]) -> str:
    """Return card.md for the content of card.json."""
    bits = f"{card['weight_bits']}-bit weights, {card['activation_bits']}-bit activations"
    speed, size, check = card["speed"], card["bytes"], card["verification"]
    draws = counted(card["num_samples"], "draw")
    given = ", which gets the masks that the file draws" if card["masks"] == "random" else ""
    new = " It draws new masks in each call." if card["masks"] == "random" else ""
    by = card["calibration"]
    calibrated = "" if by is None else f" Its predictions are calibrated ({by['name']})."
    lines = [
        f"# {card['method']} on {card['task']}",
        "",
        f"A Bayesian neural network ({card['net']}, method {card['method']}) in integers: {bits}, "
        f"{draws}, seed {card['seed']}. Trained on {card['num_train']} rows of {card['task']}, "
        f"quantized for the engine {card['engine']}, and exported by bqnn in the form "
        f"`{card['form']}`.{new}{calibrated}",
        "",
        f"Of {check['outputs']} outputs on {card['test_rows']} test rows, {check['differing']} "
        f"differ from bqnn's int8{given} (by at most {check['largest_difference_steps']:.3g} "
        "steps).",
        "",
        "## Accuracy and uncertainty",
        "",
        "On the test rows, with standard errors over them:",
        "",
        "| metric | value | standard error |",
        "|---|---|---|",
        *(
            f"| {name} | {each['value']:.4g} | {each['standard_error']:.2g} |"
            for name, each in card["metrics"].items()
        ),
        "",
        "## Size and speed",
        "",
        "| | |",
        "|---|---|",
        f"| model.onnx | {_mib(size['file'])} |",
        f"| parameters in float32 | {_mib(size['float_bytes'])} |",
        f"| parameters, packed at their bits | {_mib(size['packed_bytes'])} |",
        "",
        *_table_of_speed(speed["draws"]),
        "",
        f"Latencies are medians, with the number of calls in brackets, of {speed['runtime']} with "
        f"{counted(speed['threads'], 'thread')} on {speed['cpu']} "
        f"({'with' if speed['vnni'] else 'without'} VNNI). A file has a fixed number of draws: "
        "each row is a file of its own.",
        "",
        "## How to call it",
        "",
        "```python",
        *snippet(card),
        "```",
        "",
    ]
    return "\n".join(lines)


def snippet(card: Mapping[str, Any]) -> list[str]:
    """Return lines of Python that run the file without bqnn."""
    shape = ", ".join(map(str, card["inputs"]["shape"][1:]))
    largest = card["inputs"]["largest_pixel"]
    what = (
        "features in their original units" if largest is None else f"pixels from 0 to {largest:g}"
    )
    is_classifier = card["likelihood"] == "classification"
    shown = 'answer["probabilities"].argmax(-1), answer["mutual_information"]'
    if not is_classifier:
        shown = 'answer["mean"], answer["std"], answer["epistemic_std"]'
    return [
        "import numpy as np",
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession("model.onnx")',
        f"rows = np.zeros((5, {shape}), np.{card['inputs']['dtype']})  # {what}",
        "names = [output.name for output in session.get_outputs()]",
        'answer = dict(zip(names, session.run(names, {"inputs": rows})))',
        f"print({shown})",
    ]


def _table_of_speed(draws: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table with a row for each number of draws."""
    lines = [
        f"| draws | {' | '.join(f'batch of {size}' for size in measure.BATCHES)} | peak memory |",
        "|" + "---|" * (len(measure.BATCHES) + 2),
    ]
    for each in draws:
        times = [f"{t['milliseconds']:.3g} ms ({t['calls']})" for t in each["latencies"]]
        peak = "not known" if each["peak_bytes"] is None else _mib(each["peak_bytes"])
        lines.append(f"| {' | '.join([str(each['num_samples']), *times, peak])} |")
    return lines


def _measured_draws(
    model: Method, exported: Exported, path: Path, rows: np.ndarray, threads: int
) -> list[dict[str, Any]]:
    """Measure a file, and temporary ones with other numbers of draws, as far as a model has."""
    own = len(exported.steps)
    found = []
    with TemporaryDirectory() as folder:
        for count in sorted({own, *NUM_DRAWS}):
            file = path
            if count != own:
                if not _has_draws(model, count):
                    continue
                masks = "random" if exported.masks else "fixed"
                file = Path(folder, "model.onnx")
                file.write_bytes(export(model, count, exported.form, masks).content())
            found.append({"num_samples": count, **_measured(file, rows, threads)})
    return found


def _has_draws(model: Method, count: int) -> bool:
    """Return whether a model makes that many different draws."""
    try:
        return model.check_samples(count) == count
    except ValueError:
        return False


def _measured(path: Path, rows: np.ndarray, threads: int) -> dict[str, Any]:
    """Measure a file in a process of its own, whose memory is that of the runtime alone."""
    with TemporaryDirectory() as folder:
        inputs = Path(folder, "rows.npy")
        np.save(inputs, rows[: max(measure.BATCHES)])
        command = [sys.executable, str(Path(measure.__file__)), str(path), str(inputs)]
        done = subprocess.run([*command, str(threads)], capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"the file cannot be measured: {reason}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _mib(count: int) -> str:
    return f"{count / 2**20:.3g} MiB"
