from __future__ import annotations

import copyreg
import io
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.errors import ConfigError, DataError
from partial_fc.evaluate import bins
from partial_fc.evaluate.bins import read_pairs, write_pairs

OMNIGLOT = Path(__file__).resolve().parents[3] / "shared/data/omniglot/omniglot_val.bin"

JPEG = [b"\xff\xd8\xff\xe0" + bytes([number, 0, 255, 10, 13, 39, 92]) * (3 + number) for number in range(5)]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 2


def written(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def flat(pairs: bins.Pairs) -> list[bytes]:
    """The 2n images in the order of the file."""
    images: list[bytes] = []
    for left, right in zip(pairs.left, pairs.right, strict=True):
        images += [pairs.images[left], pairs.images[right]]
    return images


def python2(images: list[bytes], same: list[bool], protocol: int) -> bytes:
    """The bytes that Python 2 writes for ``(images, same)``: its ``str`` are the STRING operations."""
    out = io.BytesIO()
    if protocol == 2:
        out.write(b"\x80\x02")
    out.write(b"(" + b"(" + b"l")
    for index, image in enumerate(images):
        if protocol == 0:
            out.write(b"S" + repr(image)[1:].encode() + b"\n" + f"p{index}\na".encode())
        else:
            out.write(b"T" + len(image).to_bytes(4, "little") + image + b"q" + bytes([index]) + b"a")
    out.write(b"(l")
    for answer in same:
        out.write((b"\x88" if answer else b"\x89") if protocol == 2 else (b"I01\n" if answer else b"I00\n"))
        out.write(b"a")
    out.write(b"t.")
    return out.getvalue()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_reads_bytes_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    images = [JPEG[0], JPEG[1], PNG, JPEG[0]]
    pairs = read_pairs(written(tmp_path / "a.bin", (images, [True, False]), protocol))
    assert flat(pairs) == images
    assert pairs.same.dtype == np.bool_ and pairs.same.tolist() == [True, False]
    assert len(pairs) == 2 and pairs.left.dtype == pairs.right.dtype == np.int64


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_reads_what_python_2_writes(tmp_path: Path, protocol: int) -> None:
    images = [JPEG[0], PNG, JPEG[2], JPEG[3]]
    content = python2(images, [False, True], protocol)
    assert pickle.loads(content, encoding="bytes") == (images, [False, True])
    (tmp_path / "a.bin").write_bytes(content)
    pairs = read_pairs(tmp_path / "a.bin")
    assert flat(pairs) == images and pairs.same.tolist() == [False, True]


def test_reads_a_numpy_array_of_python_2(tmp_path: Path) -> None:
    def array(image: bytes) -> bytes:
        size = len(image).to_bytes(4, "little")
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        return empty + b"(K\x01J" + size + b"\x85" + kind + b"\x89T" + size + image + b"tb"

    content = b"\x80\x02](" + array(JPEG[1]) + array(JPEG[2]) + b"e](\x88e\x86."
    # The legacy names are those of the file; NumPy itself agrees on what it says.
    images, _ = pickle.loads(content, encoding="bytes")
    assert [image.tobytes() for image in images] == JPEG[1:3] and images[0].dtype == np.uint8
    (tmp_path / "a.bin").write_bytes(content)
    assert flat(read_pairs(tmp_path / "a.bin")) == JPEG[1:3]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["read-only", "writable", "column", "strided"])
def test_reads_numpy_arrays(tmp_path: Path, protocol: int, kind: str) -> None:
    def array(image: bytes) -> np.ndarray:
        values = np.frombuffer(image, np.uint8)
        if kind == "writable":
            return values.copy()
        if kind == "column":  # as older OpenCV encodes
            return values.copy()[:, None]
        return np.repeat(values, 2)[::2] if kind == "strided" else values

    images = [JPEG[0], JPEG[1], JPEG[1], PNG]
    answers: Any
    for answers in ([np.bool_(True), False], np.array([True, False]), [1, 0], (True, False)):
        path = written(tmp_path / "a.bin", ([array(image) for image in images], answers), protocol)
        pairs = read_pairs(path)
        assert flat(pairs) == images and pairs.same.tolist() == [True, False]


def test_equal_images_are_kept_once(tmp_path: Path) -> None:
    copies = [bytes(bytearray(JPEG[0])) for _ in range(3)]
    pairs = read_pairs(written(tmp_path / "a.bin", ([copies[0], JPEG[1], JPEG[1], *copies[1:], PNG], [1, 0, 1])))
    assert pairs.images == [JPEG[0], JPEG[1], PNG]
    assert pairs.left.tolist() == [0, 1, 0] and pairs.right.tolist() == [1, 0, 2]


def test_written_file_is_small_and_read_by_the_usual_loader(tmp_path: Path) -> None:
    large = JPEG[0] + bytes(100_000)
    images = [bytes(bytearray(large)) for _ in range(20)]
    write_pairs(tmp_path / "a.bin", images, (index % 2 == 0 for index in range(10)))
    assert (tmp_path / "a.bin").stat().st_size < 110_000
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert pickle.loads((tmp_path / "a.bin").read_bytes()) == (images, [True, False] * 5)
    assert flat(read_pairs(tmp_path / "a.bin")) == images


@pytest.mark.parametrize("images, same", [([JPEG[0]] * 3, [True]), ([], [])])
def test_writing_needs_two_images_a_pair(tmp_path: Path, images: list[bytes], same: list[bool]) -> None:
    with pytest.raises(ConfigError, match="expected two a pair"):
        write_pairs(tmp_path / "a.bin", images, same)
    assert not list(tmp_path.iterdir())


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def proof(path: str) -> None:
    Path(path).write_text("executed")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_function_of_a_hostile_pickle_is_called(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "executed"
    for call in (
        Call(os.system, f"touch {mark}"),
        Call(eval, f"open({str(mark)!r}, 'w')"),
        Call(exec, f"open({str(mark)!r}, 'w')"),
        Call(open, str(mark), "w"),
        Call(proof, str(mark)),
        Call(pickle.loads, pickle.dumps(Call(proof, str(mark)))),
        Call(np.load, str(mark)),
        Call(getattr, "text", "join"),
    ):
        for content in (call, ([call, JPEG[0]], [True]), ([JPEG[0], JPEG[0]], call)):
            with pytest.raises(DataError, match="refused") as caught:
                read_pairs(written(tmp_path / "a.bin", content, protocol))
            assert "\n" not in str(caught.value) and str(tmp_path / "a.bin") in str(caught.value)
            assert not mark.exists()


def raw(*operations: bytes) -> bytes:
    return b"\x80\x04" + b"".join(operations)


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


HOSTILE = {
    "object array": pickle.dumps(([np.array([JPEG[0]], object)] * 2, [True])),
    "object type by name": raw(name("numpy", "dtype"), b"(\x8c\x01O\x89\x88tR."),
    "object array asked by name": raw(
        name("numpy.core.multiarray", "_reconstruct"), b"(", name("numpy", "ndarray"), b"(K\x02t\x8c\x01OtR."
    ),
    "float array": pickle.dumps(([np.zeros(4)] * 2, [True])),
    "string array": pickle.dumps((np.array(["a", "b"]), [True])),
    "structured type": pickle.dumps(([np.zeros(2, [("a", "u1")])] * 2, [True])),
    "another codec": raw(name("_codecs", "encode"), b"(\x8c\x01a\x8c\x03rot\x8c\x06strictt", b"R."),
    "a codec with code": raw(name("_codecs", "encode"), b"(C\x01a\x8c\x0aunicode_xxtR."),
    "a call of ndarray": raw(name("numpy", "ndarray"), b"(K\x05tR."),
    "a method by a dotted name": raw(b"\x8c\x05numpy\x8c\x0endarray.tofile\x93."),
    "a dotted module": raw(name("numpy.core.multiarray.os", "system"), b"."),
    "a name from the unpickler's module": raw(name("partial_fc.evaluate.bins", "pickle"), b"."),
    "state of a stand-in": raw(name("numpy", "ndarray"), b"}\x8c\x04nameK\x01sb."),
    "attributes of a stand-in": raw(name("numpy", "ndarray"), b"(N\x8c\x01aK\x01tb."),
    "a new object of a class": raw(name("numpy", "ndarray"), b")\x81."),
    "an instance": b"(inumpy\nndarray\n.",
    "an object": raw(b"(", name("numpy", "ndarray"), b"o."),
    "a persistent id": raw(b"Pfile\n."),
    "a binary persistent id": raw(b"NQ."),
    "a set": raw(b"\x8f."),
    "a dictionary": raw(b"}."),
    "an out-of-band buffer": raw(b"\x97."),
    "a huge memo index": raw(b"Nr\xff\xff\xff\xff."),
    "a huge byte array": raw(b"\x96\x00\x00\x00\x00\x00\x01\x00\x00abc."),
    "a huge string of bytes": raw(b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00abc."),
    "a huge frame": raw(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fabc."),
    "a huge number": raw(b"I" + b"9" * 100_000 + b"\n."),
    "an array of a negative shape": raw(
        name("numpy.core.numeric", "_frombuffer"),
        b"(C\x01a",
        name("numpy", "dtype"),
        b"\x8c\x02u1\x89\x88\x87RJ\xff\xff\xff\xffJ\xff\xff\xff\xff\x86\x8c\x01CtR.",
    ),
    "an array shorter than its shape": raw(
        name("numpy.core.numeric", "_frombuffer"),
        b"(C\x01a",
        name("numpy", "dtype"),
        b"\x8c\x02u1\x89\x88\x87RK\x07\x85\x8c\x01CtR.",
    ),
    "an array with itself as data": raw(name("numpy.core.multiarray", "_reconstruct"), b")R\x94(K\x01)Nh\x00h\x00tb."),
    "a loop": raw(b"]\x94h\x00a."),
    "nothing": b"",
    "an empty stack": b".",
    "no pickle": b"\xff\xd8\xff\xe0 is a picture",
    "text": b"images/a.jpg images/b.jpg 1\n",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_and_damaged_pickles_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    begin = time.perf_counter()
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    assert time.perf_counter() - begin < 5
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and message.startswith(str(path))


def test_registered_extensions_are_refused(tmp_path: Path) -> None:
    copyreg.add_extension("os", "getcwd", 240)
    try:
        with pytest.raises(DataError, match="operation 130"):
            (tmp_path / "a.bin").write_bytes(raw(b"\x82\xf0)R."))
            read_pairs(tmp_path / "a.bin")
    finally:
        copyreg.remove_extension("os", "getcwd", 240)


def test_stand_ins_stay_as_they_are(tmp_path: Path) -> None:
    before = {cls: dict(vars(cls)) for cls in (bins._Name, bins._Array, bins._Type)}
    for content in HOSTILE.values():
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(DataError):
            read_pairs(tmp_path / "a.bin")
    assert {cls: dict(vars(cls)) for cls in (bins._Name, bins._Array, bins._Type)} == before


WRONG = {
    "holds a list of 3": [1, 2, 3],
    "holds a bytes": b"ab",
    "its images are a int": (3, [True]),
    "its images are an array": (np.zeros((2, 2), np.uint8), [True]),
    "its answers are a str": ([JPEG[0]] * 2, "yes"),
    "its answers are an array": ([JPEG[0]] * 2, np.ones((1, 1), np.bool_)),
    "holds 3 images for 1 pairs": ([JPEG[0]] * 3, [True]),
    "holds 2 images for 2 pairs": ([JPEG[0]] * 2, [True, False]),
    "holds 0 images for 0 pairs": ([], []),
    "image 1 is a str": ([JPEG[0], "path.jpg"], [True]),
    "image 1 is a tuple": ([JPEG[0], (1, 2)], [True]),
    "image 1 starts with b'hello'": ([JPEG[0], b"hello"], [True]),
    "image 0 starts with b''": ([b"", b""], [True]),
    r"image 0 is an array of u1 of shape \(2, 2, 3\)": ([np.zeros((2, 2, 3), np.uint8)] * 2, [True]),
    "image 0 is an array of b1": ([np.zeros(4, np.bool_)] * 2, [True]),
    "the answer of pair 0 is 2": ([JPEG[0]] * 2, [2]),
    "the answer of pair 0 is a int": ([JPEG[0]] * 2, [10**500]),
    "the answer of pair 0 is a NoneType": ([JPEG[0]] * 2, [None]),
}


@pytest.mark.parametrize("match, content", WRONG.items(), ids=WRONG.keys())
def test_another_structure_is_named(tmp_path: Path, match: str, content: Any) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read_pairs(written(tmp_path / "a.bin", content))
    assert "\n" not in str(caught.value)


def test_truncations_are_an_error(tmp_path: Path) -> None:
    arrays = [np.frombuffer(image, np.uint8) for image in JPEG[:2]]
    path = tmp_path / "a.bin"
    for protocol in range(6):
        whole = pickle.dumps(([*JPEG[2:4], *arrays], [True, False]), protocol=protocol)
        for length in range(protocol % 3, len(whole), 3):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError):
                read_pairs(path)
        path.write_bytes(whole)
        assert len(read_pairs(path)) == 2


@given(st.data())
def test_changed_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    arrays = [np.frombuffer(image, np.uint8) for image in JPEG[:2]]
    content = bytearray(pickle.dumps(([*JPEG[2:4], *arrays], [True, np.bool_(False)]), data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.bin"
    path.write_bytes(content)
    try:
        pairs = read_pairs(path)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert len(pairs.left) == len(pairs.right) == len(pairs) >= 1


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.bin: can't be read: No such file"):
        read_pairs(tmp_path / "nowhere.bin")
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        read_pairs(tmp_path)


@pytest.mark.skipif(not OMNIGLOT.exists(), reason="the omniglot verification set is not on this machine")
def test_reads_the_real_set() -> None:
    pairs = read_pairs(OMNIGLOT)
    assert len(pairs) == 6000 and len(pairs.images) == 4264
    assert pairs.same.reshape(10, 2, 300).all(axis=2).tolist() == [[True, False]] * 10
    assert flat(pairs) == pickle.loads(OMNIGLOT.read_bytes())[0]
