"""A web service: MODEL=folder_of_a_run uvicorn --app-dir examples web_service:app

It answers POST /predict {"rows": [...]} with predictions and their uncertainty. Rows are in the
units of the data: pixels [N, C, H, W], or features [N, F].
"""

import os
from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

import bqnn
from bqnn.inference.answers import RegressionAnswer

MAX_ROWS = 1000  # of a request

path = os.environ["MODEL"]
is_quantized = bqnn.load(path).recipe["stage"] in ("qat", "ptq")
model = bqnn.load(path, numeric="int8" if is_quantized else None).prepare()
app = FastAPI(title="bqnn", description=f"Predictions of {path}")


class Request(BaseModel):
    """The rows to predict."""

    rows: list[Any] = Field(min_length=1, max_length=MAX_ROWS)


@app.post("/predict")
def predict(request: Request) -> dict[str, Any]:
    """Predict rows. FastAPI calls it in many threads, which share the model."""
    try:
        answer = model.predict(request.rows)
    except (TypeError, ValueError) as error:
        raise HTTPException(422, str(error)) from error
    if isinstance(answer, RegressionAnswer):
        names = ("mean", "std", "aleatoric", "epistemic")
    else:
        names = ("labels", "probabilities", "entropy", "mutual_information")
    return {name: getattr(answer, name).tolist() for name in names}
