"""Files of readings as people have them: what is right is read, what is wrong is told by its row or refused."""

import builtins

import numpy as np
import pytest
from firedrake import COMM_WORLD, FunctionSpace, UnitIntervalMesh

from fem_diffusion import DataError, FileError, InputError, InstallError, point_sensors, read_measurements
from fem_diffusion.measurements import units
from fem_diffusion.measurements.units import converted, split_unit

NAMES = ["inlet [mg/l]", "outlet [mg/l]"]
WIDE = """# logger 7
Time,inlet [mg/l],outlet [mg/l],battery [V]
2026-03-01T00:00,1.5,2.0,12
2026-03-01T00:10,1.6,,12
2026-03-01T00:20,ERR,2.1,12
2026-03-01T00:20,1.7,2.1,12
2026-03-01T01:20,1.75,99,12
2026-03-01T01:10,1.8,3,12
2026-03-01T01:10,1.9,3,12
nonsense,1,2,12
2026-03-01T01:30,1,2
"""
NAN = np.nan


def _file(folder, text, name="readings.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def _kinds(found):
    return {(one.kind, one.sensor): one.rows for one in found.findings}


def test_a_wide_table_with_every_fault(tmp_path):
    found = read_measurements(_file(tmp_path, WIDE), NAMES, limits={"outlet": (0, 10)})
    np.testing.assert_array_equal(found.values, [[1.5, 2.0], [1.6, NAN], [1.7, 2.1], [NAN, 3.0], [1.75, NAN]])
    start = np.datetime64("2026-03-01T00:00")
    assert ((found.times - start) / np.timedelta64(1, "m")).tolist() == [0, 10, 20, 70, 80]
    # Rows as an editor numbers them, the comment being the first.
    assert _kinds(found) == {
        ("no number", NAMES[0]): (5,), ("out of range", NAMES[1]): (7,), ("duplicate", None): (6, 9),
        ("conflict", NAMES[0]): (8, 9), ("no time", None): (10,), ("wrong number of cells", None): (11,),
        ("not in order", None): (8,), ("missing rows", None): (), ("unknown column", None): ()}
    text = str(found)
    for part in ("5 times from 2026-03-01", "7 readings and 3 gaps (30.0%)", "'ERR' in row 5", "99 in row 7",
                 "'battery [V]': of no sensor", "from 2026-03-01T00:20 to 2026-03-01T01:10"):
        assert part in text, part
    assert not found.values.flags.writeable


def test_a_long_table_is_the_same(tmp_path):
    long = "time,sensor,value,unit\n" + "".join(
        f"{t},{name},{value},{unit}\n" for t, row in ((0, (1.5, 2.0)), (1, (1.6, None)), (2.5, ("nan", 2.1)))
        for name, value, unit in zip(("inlet", "outlet"), row, ("mg/l", "")) if value is not None)
    found = read_measurements(_file(tmp_path, long), NAMES)
    np.testing.assert_array_equal(found.values, [[1.5, 2.0], [1.6, NAN], [NAN, 2.1]])
    assert found.times.tolist() == [0, 1, 2.5]
    assert [(one.kind, one.sensor) for one in found.findings] == [("unit", NAMES[1])]


@pytest.mark.parametrize("text, more", [
    ("time;inlet;outlet\n0;1,5;2\n1;-1,6e-1;2,1\n", {"decimal": ","}),
    ("time\tinlet\toutlet\n0\t1.5\t2\n1\t-.16e0\t2.1\n", {}),
    ("when|outlet|inlet\n0|2|1.5|\n1|2.1|-0.16|\n", {"time": "When"}),
    ('"time","inlet (mg/l)","outlet [mg/l]"\r\n"0","1.5","2"\r\n\r\n"1","-0.16","2.1"', {}),
])
def test_other_ways_to_write_the_same(tmp_path, text, more):
    found = read_measurements(_file(tmp_path, text), NAMES, **more)
    np.testing.assert_array_equal(found.values, [[1.5, 2.0], [-0.16, 2.1]])
    assert found.times.tolist() == [0, 1]


def test_times_of_zones_and_of_other_formats(tmp_path):
    zones = "time,inlet,outlet\n2026-03-29T01:30+01:00,1,2\n2026-03-29T03:10+02:00,3,4\n"
    found = read_measurements(_file(tmp_path, zones), NAMES)
    assert found.times.astype("datetime64[m]").astype(str).tolist() == ["2026-03-29T00:30", "2026-03-29T01:10"]
    german = "time,inlet,outlet\n01.02.2026 12:00,1,2\n02.02.2026 12:00,3,4\n"
    with pytest.raises(DataError, match="time_format"):
        read_measurements(_file(tmp_path, german), NAMES)
    found = read_measurements(_file(tmp_path, german), NAMES, time_format="%d.%m.%Y %H:%M")
    assert found.times[0] == np.datetime64("2026-02-01T12:00")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_tell_the_encoding(tmp_path, encoding):
    text = "time,Zufluß [µg/l],outlet\n0,1,2\n"
    found = read_measurements(_file(tmp_path, text, encoding=encoding), ["Zufluß [µg/l]", "outlet"])
    np.testing.assert_array_equal(found.values, [[1, 2]])


def test_another_encoding_has_to_be_named(tmp_path):
    path = _file(tmp_path, "time,Zufluß,outlet\n0,1,2\n", encoding="cp1252")
    with pytest.raises(FileError, match="encoding='cp1252'"):
        read_measurements(path, ["Zufluß", "outlet"])
    np.testing.assert_array_equal(read_measurements(path, ["Zufluß", "outlet"], encoding="cp1252").values, [[1, 2]])
    with pytest.raises(FileError, match="encoding"):
        read_measurements(path, NAMES, encoding="no such thing")


def _malformed():
    head = "time,inlet,outlet\n"
    yield "empty", b"", "is empty"
    yield "blank lines", "\n\n# nothing\n", "is empty"
    yield "header only", head, "no row below"
    yield "no times", "date,inlet,outlet\n0,1,2\n", "no column 'time'.*'date', 'inlet'"
    yield "a sensor missing", "time,inlet,outlett\n0,1,2\n", r"no readings of 'outlet \[mg/l\]' \(is it 'outlett'"
    yield "a column twice", "time,inlet,inlet,outlet\n0,1,2,3\n", "'inlet' twice"
    yield "a sensor twice", "time,inlet,inlet (mg/l),outlet\n0,1,2,3\n", "several columns"
    yield "decimal commas in commas", head + "0,1,5,2,5\n1,1,5,2,5\n", "decimal=','"
    yield "decimal commas", "time;inlet;outlet\n0;1,5;2\n1;1,6;2\n", "decimal=','"
    yield "text alone", head + "0,a,b\n1,c,d\n", "no numbers, but 'a'"
    yield "gaps alone", head + "0,,\n1,,\n", "no numbers"
    yield "times with and without zones", head + "2026-01-01T00:00Z,1,2\n2026-01-01T00:10,1,2\n", "time zone.*line 3"
    yield "numbers and dates", head + "0,1,2\n2026-01-01,1,2\n", "numbers and dates"
    yield "no times at all", head + "x,1,2\ny,1,2\n", "time_format"
    yield "one long line", head + "0," + "1" * (2 << 20), "line 2 of more than"
    yield "a picture", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)), "encoding"
    yield "zeros", b"\0" * 1000, "no column"
    yield "an open quote", head + '0,"1,2\n' + "1,2,3\n" * 50_000, "no table"
    yield "an unknown unit", "time,inlet [bananas],outlet\n0,1,2\n", "pint does not know|is in 'bananas'"
    yield "another kind of unit", "time,inlet [m],outlet\n0,1,2\n", "different things|is in 'm'"
    yield "a unit that calculates", "time,inlet [mg**9999999/l],outlet\n0,1,2\n", "which is none|is in"


@pytest.mark.parametrize("text, message", [pytest.param(*rest, id=name) for name, *rest in _malformed()])
def test_what_is_no_table_of_readings_is_refused_with_a_remedy(tmp_path, text, message):
    with pytest.raises((DataError, FileError, InstallError), match=message) as error:
        read_measurements(_file(tmp_path, text), NAMES)
    assert len(str(error.value)) < 800 and str(error.value).endswith(".")


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    from fem_diffusion.measurements import table

    monkeypatch.setattr(table, "_MOST", 100)
    path = _file(tmp_path, "time,inlet,outlet\n" + "".join(f"{i},1,2\n" for i in range(50)))
    assert len(read_measurements(path, NAMES)) == 50
    with pytest.raises(DataError, match="more than 100 readings"):
        read_measurements(_file(tmp_path, path.read_text() + "50,1,2\n"), NAMES)


def test_a_folder_and_a_file_that_is_not_there_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.csv"):
        with pytest.raises(FileError):
            read_measurements(path, NAMES)


@pytest.mark.parametrize("more", [
    {"decimal": "?"}, {"delimiter": ";;"}, {"delimiter": 3}, {"time": 5}, {"limits": (1, 0)}, {"limits": (0, 1, 2)},
    {"limits": {"third": (0, 1)}}, {"encoding": 8}])
def test_wrong_arguments_are_refused(tmp_path, more):
    with pytest.raises(InputError):
        read_measurements(_file(tmp_path, "time,inlet,outlet\n0,1,2\n"), NAMES, **more)


@pytest.mark.parametrize("sensors", [[], ["a", "a"], 5, "inlet", [1, 2]])
def test_sensors_need_names_of_their_own(tmp_path, sensors):
    with pytest.raises(InputError):
        read_measurements(_file(tmp_path, "time,inlet,outlet\n0,1,2\n"), sensors)


def test_numbers_that_only_python_reads_are_none(tmp_path):
    text = "time,inlet,outlet\n0,1_000,2\n1,inf,2\n2,1e999,2\n3,٣,2\n4,0x10,2\n5,1,2\n6,2,2\n7,3,2\n8,4,2\n9,5,2\n"
    found = read_measurements(_file(tmp_path, text), NAMES)
    np.testing.assert_array_equal(found.values[:, 0], 5 * [NAN] + [1, 2, 3, 4, 5])
    assert _kinds(found)["no number", NAMES[0]] == (2, 3, 5, 6) and _kinds(found)["out of range", NAMES[0]] == (4,)


def test_names_have_units_and_indices_are_none():
    assert split_unit("gauge 3 [mg/l]") == ("gauge 3", "mg/l") and split_unit("T (°C)") == ("T", "°C")
    for name in ("(0.2, 0.5)", "(0.2, 0.5)[1]", "functional 0", "[mg/l]"):
        assert split_unit(name) == (name, None)


def test_units_are_converted():
    pytest.importorskip("pint")
    np.testing.assert_allclose(converted(np.array([1500.0, NAN]), "ug/l", "mg/l", "x"), [1.5, NAN])
    np.testing.assert_allclose(converted(np.array([20.0]), "degC", "K", "x"), [293.15])
    np.testing.assert_allclose(converted(np.array([20.0]), "°C", "degF", "x"), [68.0])
    np.testing.assert_allclose(converted(np.array([1.0]), "µg/m³", "kg/m**3", "x"), [1e-9])
    np.testing.assert_allclose(converted(np.array([25.0]), "%", "dimensionless", "x"), [0.25])


def test_units_of_the_file_become_those_of_the_sensors(tmp_path):
    pytest.importorskip("pint")
    path = _file(tmp_path, "time,inlet [ug/l],outlet\n0,1500,2\n1,9e9,3\n")
    found = read_measurements(path, NAMES, limits=(0, 100))
    np.testing.assert_allclose(found.values, [[1.5, 2], [NAN, 3]])
    assert ("out of range", NAMES[0]) in _kinds(found)
    with pytest.raises(DataError, match="the sensor has no unit"):
        read_measurements(path, ["inlet", "outlet"])


def test_without_pint_units_have_to_agree(tmp_path, monkeypatch):
    units._units.cache_clear()
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pint":
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    path = _file(tmp_path, "time,inlet [ug/l],outlet [mg/l]\n0,1500,2\n")
    with pytest.raises(InstallError, match="units"):
        read_measurements(path, NAMES)
    same = _file(tmp_path, "time,inlet [mg/l],outlet [mg/l]\n0,1500,2\n")
    np.testing.assert_array_equal(read_measurements(same, NAMES).values, [[1500, 2]])


def test_some_of_the_times(tmp_path):
    found = read_measurements(_file(tmp_path, WIDE), NAMES)
    np.testing.assert_array_equal(found[::2].values, found.values[::2])
    assert len(found[found.times > np.datetime64("2026-03-01T00:15")]) == 3
    for index in ([], [9], "a"):
        with pytest.raises(InputError):
            found[index]


@pytest.mark.parallel(2)
def test_one_rank_reads_for_all(tmp_path_factory):
    mesh = UnitIntervalMesh(8)
    sensors = point_sensors(FunctionSpace(mesh, "CG", 1), [[0.2], [0.8]], NAMES)
    folder = tmp_path_factory.mktemp("readings")
    path = _file(folder, WIDE)      # of each rank its own folder: that of rank 0 counts
    if COMM_WORLD.rank:
        path.unlink()
    found = read_measurements(path, sensors)
    assert all((np.nan_to_num(x) == np.nan_to_num(found.values)).all() for x in COMM_WORLD.allgather(found.values))
    broken = _file(folder, "nothing\n", "broken.csv")
    with pytest.raises(DataError):
        read_measurements(broken, sensors)
