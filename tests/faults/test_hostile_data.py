"""Case files and lists made to do harm, and parsers under random input: refused with the reason, in bounded memory."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from refusals import bounded_memory

from dataloaders.cases import Case, CaseError, case_file, find_cases, read_case
from dataloaders.geometry import read_geometry
from dataloaders.lists import read_list
from tools.command_line import read_options
from utils.errors import UserError
from utils.options import Parser

SHAPE = (24, 22, 18)
NOISE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
BALL = (NOISE > 1).astype(np.uint8)
# The same inputs at every run, and no state between runs.
STEADY = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# -- case files --


def external_values(f, name, values):
    """Values that lie in a file of raw numbers beside, or anywhere else that can be read."""
    raw = Path(f.filename).with_name("raw.bin")
    raw.write_bytes(values.tobytes())
    f.create_dataset(name, SHAPE, values.dtype, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])


def virtual_values(f, name, values):
    """Values that lie in another h5 file."""
    other = Path(f.filename).with_name("other.h5")
    with h5py.File(other, "w") as g:
        g["values"] = values
    layout = h5py.VirtualLayout(SHAPE, values.dtype)
    layout[:] = h5py.VirtualSource(other, "values", SHAPE)
    f.create_virtual_dataset(name, layout)


def external_link(f, name, values):
    """A name that leads into another h5 file."""
    other = Path(f.filename).with_name("other.h5")
    with h5py.File(other, "w") as g:
        g["values"] = values
    f[name] = h5py.ExternalLink(other, "/values")


def soft_link(f, name, values):
    f["elsewhere"] = values
    f[name] = h5py.SoftLink("/elsewhere")


def endless_link(f, name, values):
    f[name] = h5py.SoftLink(f"/{name}")


def terabytes(f, name, values):
    """A kilobyte of file that promises 64 TiB."""
    f.create_dataset(name, (2**14, 2**15, 2**15), values.dtype, chunks=(64, 64, 64), compression="gzip")


def a_huge_chunk(f, name, values):
    """A small volume in pieces of 4 GiB, each unpacked whole."""
    side = 1300 if values.dtype.itemsize == 1 else 900
    f.create_dataset(name, SHAPE, values.dtype, chunks=(side, side, side), maxshape=(None,) * 3, compression="gzip")


HARMFUL = {
    external_values: "takes its values from other files",
    virtual_values: "takes its values from other files",
    external_link: "is a link to .*other.h5/values",
    soft_link: "is a link to /elsewhere",
    endless_link: "is a link to",
    terabytes: r"claims \\(16384, 32768, 32768\\), .* GiB, where 2 is the most",
    a_huge_chunk: r"is kept in pieces of .* GiB, where 2 is the most",
    lambda f, name, values: f.create_group(name): "is no dataset",
    lambda f, name, values: f.create_dataset(name, data=h5py.Empty("f")): "three-dimensional|shape",
    lambda f, name, values: f.create_dataset(name, data=np.zeros(SHAPE, [("a", "f4")])): "must be .*numbers",
}
HARMFUL = {how: said.replace("\\\\", "\\") for how, said in HARMFUL.items()}


@pytest.mark.parametrize("name", ["image", "label"])
@pytest.mark.parametrize("how", HARMFUL, ids=lambda how: how.__name__)
def test_21_h5_that_leads_elsewhere_or_claims_terabytes_is_refused_from_its_header(how, name, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        for key, values in {"image": NOISE, "label": BALL}.items():
            if key == name:
                how(f, key, values)
            else:
                f[key] = values
    assert (tmp_path / "a.h5").stat().st_size < 2**20
    with bounded_memory(), pytest.raises(CaseError, match=f"'{name}' .*({HARMFUL[how]})|h5 file"):
        read_case(Case("a", tmp_path / "a.h5", True))


def test_21_a_file_that_is_no_file_is_not_waited_for(tmp_path):
    """A pipe, whose opening would wait for a writer that never comes."""
    (tmp_path / "case").mkdir()
    os.mkfifo(tmp_path / "case" / "mri_norm2.h5")
    assert find_cases(tmp_path, ["case"], labeled=True)[0] == []


# -- lists and names --


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a/" * 3000 + "b", "~", "$HOME", "nul", "con.h5", ". ."])
def test_32_names_that_no_file_can_have_are_missing_and_no_crash(name, tmp_path):
    assert case_file(tmp_path, name) is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/../../b", "/etc/passwd", "..", "a/..", "//etc"])
def test_32_a_name_cannot_lead_out_of_the_data_set(name, tmp_path):
    (tmp_path / "train.list").write_text(f"case00\n{name}\n")
    with pytest.raises(UserError, match="names paths outside the data set"):
        read_list(tmp_path / "train.list")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no endless file")
def test_32_an_endless_list_or_options_file_is_refused_within_bounded_memory(tmp_path):
    (tmp_path / "train.list").symlink_to("/dev/zero")
    for read in (lambda: read_list(tmp_path / "train.list"), lambda: Parser().expand(["@/dev/zero"])):
        with bounded_memory(), pytest.raises(UserError, match=r"cannot read .* more than 16777216 bytes"):
            read()


# -- random input --

WORDS = st.sampled_from(
    [b"case00", b"case01", b"\n", b"\r\n", b"\r", b" ", b"..", b"/", b"\\", b"\xef\xbb\xbf", b"\0", b"#"]
)
LISTS = st.one_of(st.binary(max_size=60), st.lists(WORDS, max_size=12).map(b"".join))


@settings(STEADY, max_examples=400)
@given(LISTS)
@example("case00\u2028../x".encode())
@example(b"\xff\xfe")
def test_32_any_bytes_are_a_list_or_a_user_s_mistake(tmp_path, content):
    (tmp_path / "a.list").write_bytes(content)
    try:
        names = read_list(tmp_path / "a.list")
    except UserError as e:
        assert str(tmp_path / "a.list") in str(e)
        return
    assert names and len(set(names)) == len(names)
    for name in names:
        assert ".." not in Path(name).parts and not Path(name).is_absolute()
        assert (tmp_path / "set").resolve() in (tmp_path / "set" / name).resolve().parents or name == "."
        assert case_file(tmp_path, name) is None


FLAGS = st.sampled_from(
    ["--lr", "--labeled", "--patch-size", "--lr-steps", "--deterministic", "--name", "--fresh", "--k"]
)
VALUES = st.one_of(
    st.text(max_size=8), st.integers().map(str), st.floats().map(str), st.sampled_from(["", "-1", "nan"])
)


@settings(STEADY, max_examples=300)
@given(st.lists(st.one_of(FLAGS, VALUES), max_size=6))
def test_34_any_words_are_options_or_a_user_s_mistake(tmp_path, args):
    if "--help" in args or "-h" in args:
        return
    try:
        options, _, folder, state, _ = read_options(["--data", str(tmp_path), "--runs", str(tmp_path), *args])
    except UserError as e:
        assert str(e)[-1] in ".?" or "\n" in str(e)
        return
    assert state is None and options.lr >= 0 and isinstance(folder, Path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small case file: chunked and packed image, plain label, attributes."""
    path = tmp_path_factory.mktemp("whole") / "a.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset("image", data=NOISE[:6, :6, :6], chunks=(3, 6, 6), compression="gzip")
        f["label"] = BALL[:6, :6, :6]
        f.attrs["spacing"] = (1.0, 1.0, 2.0)
    return path.read_bytes()


def read_anything(path):
    """Reads a case file as training and testing do; what is wrong with it is a CaseError and nothing else."""
    case = Case("a", path, True)
    try:
        image, label = read_case(case)
        spacing = read_geometry(case)["spacing"]
    except CaseError:
        return False
    assert image.dtype == np.float32 and image.ndim == 3 and np.isfinite(image).all() and label.shape == image.shape
    assert set(np.unique(label)) <= {0, 1} and min(spacing) > 0
    return True


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)


@settings(STEADY, max_examples=400)
@given(CHANGES, st.one_of(st.just(1.0), st.floats(0, 1)))
def test_21_any_damage_to_an_h5_file_is_named_or_harmless(tmp_path, whole, changes, share):
    data = bytearray(whole)
    for place, change in changes:
        data[int(place * len(data))] ^= change
    (tmp_path / "a.h5").write_bytes(data[: int(share * len(data))])
    read_anything(tmp_path / "a.h5")


KINDS = st.sampled_from(["f2", "f4", "f8", ">f4", "u1", "i8", "?", "c8", "S3", "O"])


@settings(STEADY, max_examples=150)
@given(KINDS, st.lists(st.integers(0, 5), max_size=5), KINDS, st.lists(st.integers(0, 5), max_size=5))
def test_27_any_types_and_shapes_are_read_or_named(tmp_path, image, shape, label, label_shape):
    def values(kind, shape):
        ones = np.random.default_rng(1).integers(0, 2, shape)
        return np.full(shape, "text", object) if kind == "O" else ones.astype(kind)

    with h5py.File(tmp_path / "a.h5", "w") as f:
        for name, kind, size in (("image", image, shape), ("label", label, label_shape)):
            f.create_dataset(name, data=values(kind, size), dtype=h5py.string_dtype() if kind == "O" else None)
    if read_anything(tmp_path / "a.h5"):
        assert image[-2] in "fui" and len(shape) == 3 and shape == label_shape
    shutil.rmtree(tmp_path, ignore_errors=False)
    tmp_path.mkdir()
