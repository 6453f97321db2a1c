"""docs/configuration.md is up to date, and defaults in the code equal those of conf/."""

from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from bqnn.data import DATASETS
from bqnn.methods import METHODS, Pointwise
from bqnn.nets import NETS
from bqnn.optim import OPTIMIZERS, SGHMC
from bqnn.quant.callback import QuantizationCallback
from bqnn.quant.spec import QuantSpec
from bqnn.settings.conf import CONF, built_in
from bqnn.settings.options import TABLES
from bqnn.settings.reference import reference


def test_the_page_of_all_keys_is_up_to_date() -> None:
    page = (CONF.parent / "docs" / "configuration.md").read_text()
    assert page == reference(), "python -m bqnn.settings.reference > docs/configuration.md"


def test_every_key_with_a_default_has_its_meaning() -> None:
    for line in reference().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and cells[1] and cells[2] != "true or false":
            assert cells[3], cells[0]


def defaults(called: Any) -> dict[str, Any]:
    parameters = signature(called).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not Parameter.empty}


CODE = [
    *((METHODS[name], CONF / "method" / f"{name}.yaml", None) for name in METHODS),
    *((NETS[name], CONF / "net" / f"{name}.yaml", None) for name in NETS),
    (DATASETS["uci"], CONF / "task" / "uci.yaml", None),
    (DATASETS["synthetic"], CONF / "task" / "synthetic.yaml", None),
    (DATASETS["digits"], CONF / "task" / "digits.yaml", None),
    (DATASETS["mnist"], CONF / "task" / "mnist.yaml", None),
    (DATASETS["fashion_mnist"], CONF / "task" / "fashion_mnist.yaml", None),
    (DATASETS["cifar10"], CONF / "task" / "cifar10.yaml", None),
    (DATASETS["images"], CONF / "task" / "images.yaml", None),
    (DATASETS["table"], CONF / "task" / "table.yaml", None),
    (QuantSpec, CONF / "quant" / "default.yaml", None),
    (QuantizationCallback, CONF / "quant" / "default.yaml", None),
    (SGHMC, CONF / "method" / "sghmc.yaml", "optimizer"),
]


@pytest.mark.parametrize(("called", "path", "group"), CODE, ids=lambda c: getattr(c, "stem", ""))
def test_a_default_in_the_code_is_that_of_the_configuration(
    called: Any, path: Path, group: str | None
) -> None:
    configured = yaml.safe_load(path.read_text())
    configured = configured if group is None else configured[group]
    own = defaults(called)
    for key in own.keys() & configured.keys():
        default = configured[key]
        if default in (None, "???"):  # these stand for no value
            continue
        if called is Pointwise and key in ("num_samples", "val_samples"):  # it has one draw anyway
            continue
        ours = list(own[key]) if isinstance(own[key], tuple) else own[key]
        assert ours == (float(default) if isinstance(ours, float) else default), key


def test_the_built_in_names_are_those_of_the_tables() -> None:
    tables: dict[str, Mapping[str, Any]] = {"method": METHODS, "net": NETS, "task": DATASETS}
    for group, table in tables.items():
        assert set(built_in(group)) == set(table)


def test_every_table_is_of_the_configuration() -> None:
    assert set(OPTIMIZERS) >= {"adam", "sghmc"}
    for group in TABLES:
        assert group == "" or (CONF / group.partition(".")[0]).is_dir()
