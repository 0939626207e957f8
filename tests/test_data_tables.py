"""Tables: numbers, categories, missing values, and errors that name columns and rows."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxdl.data import fit_fill_missing, fit_standardize, read_table, split_rows
from jaxdl.errors import JaxdlError

CSV = """age,town,rooms,sold,price
31,Rome,3,true,10.5
,Oslo,NA,false,20
47,,5,true,30
52,Rome,,,40
"""


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "homes.csv"
    path.write_text(CSV)
    return path


def test_columns_arrive_in_order_with_nan_and_minus_one_for_missing(csv):
    table = read_table(csv, target="price", categorical=["town"])
    arrays = table.source.arrays
    assert table.numeric == ("age", "rooms", "sold")
    assert table.categories == {"town": ("Oslo", "Rome")}
    nan = np.nan
    expected = [[31, 3, 1], [nan, nan, 0], [47, 5, 1], [52, nan, nan]]
    np.testing.assert_array_equal(arrays["features"], np.array(expected, np.float32))
    np.testing.assert_array_equal(arrays["categories"], [[1], [0], [-1], [1]])
    np.testing.assert_array_equal(arrays["target"], [10.5, 20, 30, 40])
    assert [arrays[key].dtype for key in ("features", "categories", "target")] == [np.float32, np.int32, np.float32]


def test_parquet_and_csv_agree(csv, tmp_path):
    columns = {
        "age": [31, None, 47, 52],
        "town": pa.array(["Rome", "Oslo", None, "Rome"]).dictionary_encode(),
        "rooms": [3.0, None, 5.0, float("nan")],
        "sold": [True, False, True, None],
        "price": pa.array([10.5, 20, 30, 40], pa.float32()),
    }
    parquet.write_table(pa.table(columns), tmp_path / "homes.parquet")
    one, other = (read_table(path, target="price", categorical=["town"]) for path in (csv, tmp_path / "homes.parquet"))
    assert one.categories == other.categories
    for key, value in one.source.arrays.items():
        np.testing.assert_array_equal(value, other.source.arrays[key])


def test_a_missing_text_target_is_an_error(csv):
    with pytest.raises(JaxdlError, match="the target 'town' is missing in row 2"):
        read_table(csv, target="town")


def test_labels_and_shared_codes(tmp_path):
    first, second, strange = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.csv"
    first.write_text("x,kind,c\n1,cat,3\n2,dog,1\n3,cat,2\n")
    second.write_text("x,kind,c\n1,dog,2\n")
    strange.write_text("x,kind,c\n1,cow,9\n")
    train = read_table(first, target="kind", categorical=["c"])
    assert train.classes == ("cat", "dog")
    assert train.source.arrays["label"].tolist() == [0, 1, 0]
    assert train.categories == {"c": ("1", "2", "3")}
    shared = {"target": "kind", "categorical": ["c"], "categories": train.categories, "classes": train.classes}
    test = read_table(second, **shared)
    assert (test.source.arrays["label"].tolist(), test.source.arrays["categories"].tolist()) == ([1], [[1]])
    assert read_table(second, target="kind", categorical=["c"]).source.arrays["label"].tolist() == [0]
    with pytest.raises(JaxdlError, match=r"(?s)2 problem.*'c' holds '9' in row 0, not one of.*'kind' holds 'cow'"):
        read_table(strange, **shared)


def test_integer_categories_sort_as_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("y,c\n1,10\n2,9\n3,\n")
    table = read_table(path, target="y", categorical=["c"])
    assert table.categories == {"c": ("9", "10")}
    assert table.source.arrays["categories"].ravel().tolist() == [1, 0, -1]
    assert table.source.arrays["features"].shape == (3, 0)


def test_one_hot_appends_one_column_a_value(csv):
    table = read_table(csv, target="price", categorical=["town"], drop=["age", "rooms", "sold"]).one_hot()
    assert table.numeric == ("town=Oslo", "town=Rome")
    assert table.source.arrays["features"].tolist() == [[0, 1], [1, 0], [0, 0], [0, 1]]
    assert "categories" not in table.source.arrays
    assert table.one_hot() is table


def test_the_whole_road_from_file_to_finite_features(csv):
    source = read_table(csv, target="price", categorical=["town"]).one_hot().source
    train_rows, _ = split_rows(len(source), 0.25)
    train = source.select(train_rows)
    fill = fit_fill_missing(train)
    standardize = fit_standardize(train.map(fill), "features")
    ready = train.map(fill).map(standardize)
    ready.check_finite()
    np.testing.assert_allclose(ready.arrays["features"].mean(0), 0, atol=1e-6)


def test_problems_of_columns_come_all_at_once(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("name,when,big,y\nann,2020-01-02,1e300,1\nbob,2020-01-03,inf,\n")
    with pytest.raises(JaxdlError) as caught:
        read_table(path, target="y")
    message = str(caught.value)
    assert "3 problem(s)" in message
    assert "column 'name' is string ('ann', 'bob'), not numbers; add it to categorical= or drop=" in message
    assert "column 'when' is date32" in message
    assert "column 'big' is infinite or exceeds float32 in row 0, 1" in message
    with pytest.raises(JaxdlError, match="the target 'y' is missing in row 1"):
        read_table(path, target="y", drop=["name", "when", "big"])


def test_unknown_and_doubled_names(csv):
    with pytest.raises(JaxdlError, match=r"(?s)no column 'prize'; nearest: price.*no column 'Town'; nearest: town"):
        read_table(csv, target="prize", categorical=["Town"])
    with pytest.raises(JaxdlError, match="'price' is named twice"):
        read_table(csv, target="price", drop=["price"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n3\n", "cannot be read as a table"),
        ("a.csv", "", "cannot be read as a table"),
        ("a.csv", "x,y\n", "has no rows"),
        ("a.csv", "x,x,y\n1,2,3\n", "several columns of the name x"),
        ("a.parquet", "PAR1 but not really", "cannot be read as a table"),
        ("a.xlsx", "x", "must end in .csv, .parquet or .pq"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(JaxdlError, match=message) as caught:
        read_table(tmp_path / name, target="y")
    assert name in str(caught.value)


def test_a_missing_file(tmp_path):
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(JaxdlError, match="does not exist"):
            read_table(tmp_path / name, target="y")
