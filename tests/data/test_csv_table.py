"""Tables in CSV files: columns, targets, missing values and the split."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bqnn.data.columns import Column, columns_from, encode_rows
from bqnn.data.csv_file import CSVFile
from bqnn.data.csv_table import CSVData

HEAD = "id,area,city,garden,price"
CITIES = ["Ghent", "Aalst", "Ypres"]


def rows(count: int = 30) -> list[list[object]]:
    """Return rows with a price that a test can recompute from the other columns."""
    return [
        [f"F{i}", 40 + 2 * i, CITIES[i % 3], i % 2 == 0, 3 * i + 10 * (i % 3) + 0.5]
        for i in range(count)
    ]


def write(folder: Path, table: list[list[object]] | None = None, head: str = HEAD) -> str:
    lines = [head, *(",".join(map(str, row)) for row in (rows() if table is None else table))]
    (folder / "flats.csv").write_text("\n".join(lines))
    return str(folder / "flats.csv")


def read(path: str, target: str | int = "price", **options: object) -> CSVData:
    defaults = {"ignore": ["id"], "validation_share": 0.0}
    data = CSVData(path, target, **{**defaults, **options})
    data.prepare_data()
    data.setup()
    return data


def test_rows_are_encoded_and_standardized_by_the_training_rows(tmp_path):
    data = read(write(tmp_path), seed=3)
    assert data.input_names == [
        *("area", "city=Aalst", "city=Ghent", "city=Ypres", "garden=false", "garden=true"),
    ]
    assert (len(data.train), len(data.test)) == (24, 6)
    seen = []
    for part in (data.train, data.test):
        area = part.inputs[:, 0] * data.input_std[0] + data.input_mean[0]
        prices = part.targets * data.target_std + data.target_mean
        for row in range(len(part)):
            i = round((area[row].item() - 40) / 2)
            city = [float(name == CITIES[i % 3]) for name in sorted(CITIES)]
            assert part.inputs[row, 1:].tolist() == [*city, float(i % 2), float(i % 2 == 0)]
            assert prices[row].item() == pytest.approx(3 * i + 10 * (i % 3) + 0.5, rel=1e-5)
            seen.append(i)
    assert sorted(seen) == list(range(30))
    train = np.array([40 + 2 * i for i in seen[:24]])
    assert data.input_mean[0].item() == pytest.approx(train.mean())
    assert data.input_std[0].item() == pytest.approx(train.std())


def test_new_rows_are_read_with_the_facts_alone(tmp_path):
    data = read(write(tmp_path))
    facts = data.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["feature_names"] == ["area", "city", "garden"]
    assert facts["feature_categories"] == [[], sorted(CITIES), ["false", "true"]]
    assert facts["target_name"] == "price"
    assert len(facts["source_sha256"]) == 64
    assert facts["input_shape"] == [6]
    columns = columns_from(facts)
    assert columns == data.columns
    new = {"area": ["1e2"], "garden": ["True"], "city": ["Ypres"], "more": [""]}
    file = CSVFile(Path("new.csv"), new, [2], "")
    encoded = torch.cat([column.encode(file) for column in columns], 1)
    assert encoded.tolist() == [[100.0, 0.0, 0.0, 1.0, 0.0, 1.0]]


def test_the_split_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path)
    first, again, other = (read(path, seed=seed).test for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets)
    shares = read(path, test_share=0.5, validation_share=0.2)
    assert [len(part) for part in (shares.train, shares.val, shares.test)] == [12, 3, 15]


@pytest.mark.parametrize("target", ["city", 2, -3])
def test_text_is_a_class(tmp_path, target):
    data = read(write(tmp_path), target, features=["area", "price"])
    assert data.class_names == sorted(CITIES)
    assert data.test.targets.dtype == torch.int64
    assert data.test.targets.bincount().tolist() == [2, 2, 2]
    facts = data.facts()
    assert (facts["likelihood"], facts["class_names"]) == ("classification", sorted(CITIES))
    assert "target_mean" not in facts
    area = data.train.inputs[:, 0] * data.input_std[0] + data.input_mean[0]
    expected = [sorted(CITIES).index(CITIES[round((a - 40) / 2) % 3]) for a in area.tolist()]
    assert data.train.targets.tolist() == expected


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        ([0, 1], "auto", ["0", "1"]),
        ([0.0, 1.0], "auto", ["0", "1"]),
        ([1, "1.0", 2], "classification", ["1", "2"]),
        ([3, 10, -2], "classification", ["-2", "3", "10"]),
        (["yes", "no"], "auto", ["no", "yes"]),
        ([3, 10, -2], "auto", None),
        ([0, 1], "regression", None),
    ],
)
def test_the_kind_of_the_target_is_that_of_its_values(tmp_path, values, kind, names, caplog):
    caplog.set_level(logging.INFO)
    table = [[i, values[i % len(values)]] for i in range(30)]
    data = read(write(tmp_path, table, "a,y"), "y", ignore=[], kind=kind)
    assert data.class_names == names
    assert ("regression" if names is None else f"with {len(names)} classes") in caplog.text


def test_numbers_can_be_categories(tmp_path):
    table = [[i % 3 * 1000 + 5, i, 2 * i] for i in range(12)]
    data = read(write(tmp_path, table, "zip,a,y"), "y", ignore=[], categories=["zip"])
    assert data.columns == [Column("zip", ("5", "1005", "2005")), Column("a")]


def test_listed_categories_are_as_they_are_written(tmp_path, caplog):
    table = [[["007", "7", "7.0", "0123"][i % 4], i, 2 * i] for i in range(20)]
    data = read(write(tmp_path, table, "zip,a,y"), "y", ignore=[], categories=["zip"])
    assert data.columns[0] == Column("zip", ("007", "7", "7.0", "0123"))
    assert (data.train.inputs[:, :4].sum(1) == 1).all()
    assert not caplog.text
    new = encode_rows({"zip": ["7", "007", 123, "07"], "a": [0] * 4}, data.facts())
    expected = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert new[:, :4].tolist() == expected
    assert "the categories of 1 of 4 rows are not among" in caplog.text


def test_categories_have_a_limit(tmp_path):
    path = write(tmp_path, [[i, i, 2 * i] for i in range(13_000)], "zip,a,y")
    with pytest.raises(ValueError, match=r"'zip' has 10400 different values, .*ignore=\[zip\]"):
        read(path, "y", ignore=[], categories=["zip"])


def test_a_category_only_in_test_rows_is_not_an_input(tmp_path, caplog):
    table = [[i, f"c{i}", i] for i in range(10)]
    data = read(write(tmp_path, table, "a,b,y"), "y", ignore=[])
    assert data.test.inputs.shape == (2, 9)
    assert not data.test.inputs[:, 1:].any()
    assert (data.train.inputs[:, 1:].sum(1) == 1).all()
    assert "column 'b': the categories of 2 of 10 rows are not among" in caplog.text


def test_decimal_commas_are_read_if_the_option_says_so(tmp_path):
    table = [[f'"{i},5"', f"{i}"] for i in range(10)]
    path = write(tmp_path, table, "a,y")
    with pytest.raises(ValueError, match=r"'0,5', which has no decimal point; set decimal=comma"):
        read(path, "y", ignore=[])
    data = read(path, "y", ignore=[], decimal="comma")
    area = data.train.inputs[:, 0] * data.input_std[0] + data.input_mean[0]
    target = data.train.targets * data.target_std + data.target_mean
    torch.testing.assert_close(area, target + 0.5)


NOTATIONS = [
    *("${}", "{} $", "EUR {}", "{} EUR", "-${}", "US${}", "{}€", "({})", "{}%", "{} %", "1'{}0"),
    *("1.{}0,00", "1 {}0", "1\u202f{}0,5", "1_{}0", "1,{}0", "$1,{}0.50", "{} m2", "{}kg"),
    *("{} sq ft", "{}.5 °C", "12:{}", "12:{} pm", "1:{}:05", "2024-01-{}", "{}.01.2024"),
]


@pytest.mark.parametrize("form", NOTATIONS)
def test_numbers_in_other_notations_are_not_text(tmp_path, form):
    table = [[f'"{form.format(i)}"', i, "x"] for i in [*range(10, 30)] * 2]
    table[7][0] = "unknown"
    path = write(tmp_path, table, "a,b,c")
    where = f"flats.csv: line 2, column 'a' has '{form.format(10)}', a "
    with pytest.raises(ValueError, match=r"plain numbers|dates to") as error:
        read(path, "b", ignore=[])
    assert where.replace("\u202f", "\\u202f") in str(error.value)
    assert "(categories=[a])" in str(error.value)
    for kind in ("auto", "regression"):
        with pytest.raises(ValueError, match=r"plain numbers|dates to") as error:
            read(path, "a", kind=kind, ignore=[])
        assert "(kind=classification)" in str(error.value)
    assert read(path, "b", ignore=[], categories=["a"]).columns[0].categories is not None
    options = {"kind": "classification", "test_share": 0.5}
    assert len(read(path, "a", ignore=[], **options).class_names or ()) == 21


@pytest.mark.parametrize(
    "values",
    [
        *(["4x4", "4x2", "6x4"], ["A3", "B12"], ["Q1", "Q2"], ["1st", "2nd", "3rd"]),
        *(["3-room", "4-room"], ["36 months", "60 months"], ["16:9", "4:3"], ["10-20", "20-30"]),
        *(["<5", "5+"], ["1012 AB", "1013 CD"], [f"{i}th" for i in range(4, 21)], ["v1.2", "v1.3"]),
        *([f"{i}{'ABCD'[i % 4]}" for i in range(1, 21)], ["$60", "cheap", "dear", "free"]),
    ],
)
def test_text_with_digits_is_categories(tmp_path, values):
    table = [[values[i % len(values)], i] for i in range(100)]
    path = write(tmp_path, table, "a,b")
    assert read(path, "b", ignore=[]).columns == [Column("a", tuple(sorted(values)))]
    assert read(path, "a", ignore=[]).class_names == sorted(values)


@pytest.mark.parametrize("kind", ["auto", "regression"])
def test_a_target_with_decimal_commas_is_not_classes(tmp_path, kind):
    path = write(tmp_path, [[f"{i};{i},5"] for i in range(10)], "a;y")
    with pytest.raises(ValueError, match=r"'y' has '0,5', which has no decimal point; set decimal"):
        read(path, "y", ignore=[], kind=kind)
    path = write(tmp_path, [[f"{i};{i},5"] for i in range(10)] + [["3;4"]], "a;y")
    with pytest.raises(ValueError, match=r"has the number '4'; .*set decimal=comma"):
        read(path, "y", ignore=[], kind=kind)
    path = write(tmp_path, [[f"{i};{i}.5"] for i in range(10)], "a;y")
    with pytest.raises(ValueError, match=r"has '0.5', a number that .* 1500,5, without"):
        read(path, "y", ignore=[], kind=kind, decimal="comma")


@pytest.mark.parametrize("cell", ["", "NA", "nan", "NaN", "N/A", "null", "?", " "])
@pytest.mark.parametrize("column", [1, 2, 4])
def test_missing_values_are_refused_or_dropped(tmp_path, cell, column, caplog):
    table = rows()
    table[6][column] = cell
    name = HEAD.split(",")[column]
    path = write(tmp_path, table)
    with pytest.raises(ValueError, match=f"line 8, column '{name}' has '{cell.strip()}'") as error:
        read(path)
    for part in ("1 of its 30 cells", "missing=drop"):
        assert part in str(error.value)
    assert ("ignore=[" in str(error.value)) == (name != "price")
    data = read(path, missing="drop")
    assert len(data.train) + len(data.test) == 29
    assert "1 of 30 rows have missing values and are left out" in caplog.text


def test_ignored_columns_may_have_missing_values(tmp_path):
    table = rows()
    table[6][0] = ""
    assert len(read(write(tmp_path, table)).test) == 6


def changed(column: int, *values: object) -> list[list[object]]:
    """Return the usual rows with other values in a column from the fourth row on."""
    table = rows()
    for row, value in zip(table[3:], values, strict=False):
        row[column] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed(1, "big"), r"line 5, column 'area' has 'big', but line 2 has the number '40'"),
        (changed(1, "1_0"), r"line 5, column 'area' has '1_0', but"),
        (changed(1, "inf"), r"line 5, column 'area' has 'inf', but numbers must be finite"),
        (changed(1, "1e400"), r"line 5, column 'area' has '1e400', but numbers must be finite"),
        (changed(1, "-nan"), r"line 5, column 'area' has '-nan', but numbers must be finite"),
        (changed(1, "1e200"), r"at most 1e\+150; correct it, or convert the column"),
        (changed(2, "7"), r"line 2, column 'city' has 'Ghent', but line 5 has the number '7'"),
        (changed(2, "x" * 500), r"line 5, column 'city' has text of 500 characters"),
        (changed(4, "dear"), r"line 5, column 'price' has 'dear', but .*\(kind=classification\)"),
        (
            [[f"F{i}", f"2024-{i % 9 + 1}-01", "a", "b", i] for i in range(9)],
            r"'2024-1-01', a date",
        ),
        ([[i, f"t{i}", "a", "b", i] for i in range(150)], r"150 different texts.*ignore=\[area\]"),
        (changed(4, *[0.5] * 27)[3:], r"'price' has '0.5' in every row, so .*another column \(tar"),
        (rows(1), "has 1 complete row below its line of names"),
        ([], "has 0 complete rows"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(tmp_path, table, message):
    path = write(tmp_path, table)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "prise"}, "target='prise': .* no such column; choose one of 'id', 'area', "),
        ({"target": 5}, "target=5: .* no such column"),
        ({"target": -6}, "target=-6: .* no such column"),
        ({"features": ["area", "size"]}, "features='size': .* no such column"),
        ({"ignore": ["size"]}, "ignore='size': .* no such column"),
        ({"categories": [9]}, "categories=9: .* no such column"),
        ({"features": ["area", "price"]}, "features: 'price' is the column to predict"),
        ({"features": []}, "no input column is left besides 'price'; list other.*features=null"),
        ({"ignore": [0, 1, 2, 3]}, "no input column is left .*; leave one out of ignore"),
        ({"kind": "ranking"}, "kind='ranking': choose auto or regression or classification"),
        ({"missing": "mean"}, "missing='mean': choose refuse or drop"),
        ({"decimal": ","}, "decimal=',': choose point or comma"),
        ({"target": "city", "kind": "regression"}, "kind=regression: .* 'Ghent', which is not a n"),
        ({"test_share": 1.0}, r"test_share=1.0: .*choose a number above 0 and below 1"),
        ({"validation_share": 0.99}, "validation_share=0.99: it leaves none of the 24 rows"),
    ],
)
def test_an_option_that_does_not_fit_the_table_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        read(write(tmp_path), **{"target": "price", **options})
    assert str(error.value).isprintable()


def test_a_file_with_other_separators_is_told_which_ones_there_are(tmp_path):
    path = write(tmp_path, [["1 2 3"]] * 5, "a b y")
    with pytest.raises(ValueError, match="besides 'a b y'; separate columns by commas, semicolons"):
        read(path, -1, ignore=[])


def test_a_target_needs_two_classes_and_not_too_many(tmp_path):
    path = write(tmp_path, [[i, "a", f"c{i}"] for i in range(1001)], "a,b,c")
    for target, count in (("b", "1 different value"), ("c", "1001 different values")):
        with pytest.raises(ValueError, match=f"has {count}, but a classification"):
            read(path, target, features=["a"], ignore=[])


def test_a_constant_column_and_one_class_with_one_row_are_fine(tmp_path, caplog):
    table = [[7, "same", i, "rare" if i == 4 else "usual"] for i in range(20)]
    data = read(write(tmp_path, table, "a,b,c,y"), "y", ignore=[])
    assert data.class_names == ["rare", "usual"]
    assert data.train.targets.tolist().count(0) == 1
    assert "1 of 2 classes have a single row" in caplog.text
    assert not data.train.inputs[:, 0].any()
    assert data.train.inputs[:, 1].all()


def test_a_name_that_is_a_number_wins_over_an_index(tmp_path):
    path = write(tmp_path, [[i, 10 * i, 100 * i] for i in range(10)], "a,0,1")
    assert read(path, 0, ignore=[]).target_name == "0"
    assert read(path, 2, ignore=[]).target_name == "1"
    assert read(path, 1, ignore=[0]).input_names == ["a"]


def test_a_row_too_far_from_the_training_rows_is_named(tmp_path):
    table = [[i, 1.0, i] for i in range(10)]
    data = read(write(tmp_path, table, "a,b,y"), "y", ignore=[])
    drawn = data.test.targets[0] * data.target_std + data.target_mean
    table[round(drawn.item())][1] = 1e60
    with pytest.raises(ValueError, match=r"1e\+60 in column 'b', which is too far from the train"):
        read(write(tmp_path, table, "a,b,y"), "y", ignore=[])


# ---- new rows


COLUMNS = [Column("area"), Column("city", ("Aalst", "Ghent"))]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            {"area": ["7", "x"], "city": ["a", "b"]},
            "new.csv: line 4, column 'area' has 'x'; give a",
        ),
        ({"area": ["7", ""], "city": ["a", "b"]}, "line 4, column 'area' has ''; give a number"),
        ({"area": ["nan", "1"], "city": ["a", "b"]}, "line 2, column 'area' has 'nan'; give a n"),
        ({"area": ["7", "1"], "city": ["a", "NA"]}, "column 'city' has 'NA'; give a category"),
        ({"area": ["7", "1"]}, "new.csv has no column 'city', which the network reads; add it"),
    ],
)
def test_new_rows_need_every_value(cells, message):
    file = CSVFile(Path("new.csv"), cells, [2, 4], "")
    with pytest.raises(ValueError, match=message):
        for column in COLUMNS:
            column.encode(file)


def test_a_data_frame_of_new_rows_is_encoded_as_the_file_was(tmp_path):
    path = write(tmp_path)
    data = read(path, validation_share=0.0, test_share=0.5)
    encoded = encode_rows(pd.read_csv(path), data.facts())
    assert encoded.shape == (30, 6)
    inputs = torch.cat([data.train.inputs, data.test.inputs])
    expected = sorted(data.standardize(encoded).tolist())
    np.testing.assert_allclose(sorted(inputs.tolist()), expected, rtol=1e-6)


@pytest.mark.parametrize("value", [None, float("nan"), pd.NA, pd.NaT, "", np.nan])
@pytest.mark.parametrize("name", ["area", "city", "garden"])
def test_a_data_frame_needs_every_value(tmp_path, name, value):
    facts = read(write(tmp_path)).facts()
    frame = {"area": [70, 80], "city": ["Ghent", "Ypres"], "garden": [True, np.False_]}
    assert encode_rows(pd.DataFrame(frame), facts).tolist() == [
        [70, 0, 1, 0, 0, 1],
        [80, 0, 0, 1, 1, 0],
    ]
    frame[name] = [frame[name][0], value]
    with pytest.raises(ValueError, match=f"rows: row 1, column '{name}' has "):
        encode_rows(pd.DataFrame(frame, dtype=object), facts)
