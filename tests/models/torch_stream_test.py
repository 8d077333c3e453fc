"""Streams written here by hand: what is read back, what is refused, and what fuzzing cannot do."""

import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.models.torch_stream import read_torch_stream

KINDS = {
    "f4": "FloatStorage",
    "f8": "DoubleStorage",
    "f2": "HalfStorage",
    "i8": "LongStorage",
    "i4": "IntStorage",
    "i2": "ShortStorage",
    "i1": "CharStorage",
    "u1": "ByteStorage",
}
HEADER = b"".join(
    pickle.dumps(value, 2)
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
)


def push(value):
    """Returns the instructions that put a plain value on the pickle stack."""
    return pickle.dumps(value, 2)[2:-1]


def call(name, arguments):
    """Returns the instructions that call a global; `arguments` are instructions already."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + arguments + b"R"


def tensor(key, dtype, count, offset=0, shape=(), strides=()):
    kind = f"ctorch\n{KINDS[dtype]}\n".encode()
    storage = b"(" + push("storage") + kind + push(key) + push("cpu") + push(count) + b"NtQ"
    view = push(offset) + push(shape) + push(strides)
    hooks = call("collections.OrderedDict", b")")
    return call("torch._utils._rebuild_tensor_v2", b"(" + storage + view + b"\x89" + hooks + b"t")


def stream(tensors, storages, header=HEADER):
    """Writes a whole stream: tensors as instructions by name, storages as arrays by key."""
    items = b"".join(push(name) + value for name, value in tensors.items())
    state = b"\x80\x02" + call("collections.OrderedDict", b")") + b"(" + items + b"u"
    state += push({"_metadata": {}}) + b"b."
    content = [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    return header + state + pickle.dumps([*storages], 2) + b"".join(content)


NUMBERS = np.arange(24, dtype="<f4")
VALID = stream(
    {
        "turned": tensor("7", "f4", 24, 2, (3, 4), (1, 5)),
        "plain": tensor("7", "f4", 24, 0, (2, 3, 4), (12, 4, 1)),
        "count": tensor("9", "i8", 1),
    },
    {"7": NUMBERS, "9": np.array([5], "<i8")},
)


@pytest.fixture
def read(tmp_path):
    def read_bytes(content):
        path = tmp_path / "a.pth"
        path.write_bytes(content)
        return read_torch_stream(path)

    return read_bytes


class TestReads:
    def test_views_of_a_storage(self, read):
        tensors = read(VALID)
        assert [*tensors] == ["turned", "plain", "count"]
        assert np.array_equal(tensors["plain"], NUMBERS.reshape(2, 3, 4))
        assert np.array_equal(tensors["turned"], [[2, 7, 12, 17], [3, 8, 13, 18], [4, 9, 14, 19]])
        assert tensors["count"] == 5
        assert tensors["count"].dtype == np.int64
        assert not tensors["plain"].flags.writeable

    @pytest.mark.parametrize("dtype", KINDS)
    def test_every_dtype(self, read, dtype):
        array = np.array([0, 1, 100], dtype)
        tensors = read(stream({"a": tensor("0", dtype, 3, 0, (3,), (1,))}, {"0": array}))
        assert np.array_equal(tensors["a"], array)
        assert tensors["a"].dtype == array.dtype

    def test_the_stride_of_a_single_row_does_not_matter(self, read):
        one = stream({"a": tensor("0", "f4", 2, 0, (1, 2), (2**70, 1))}, {"0": NUMBERS[:2]})
        assert read(one)["a"].tolist() == [[0, 1]]


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("os.system", push(("touch hacked",))),
            ("posix.system", push(("touch hacked",))),
            ("builtins.eval", push(("open('hacked', 'w')",))),
            ("builtins.getattr", push(({}, "update"))),
            ("torch.load", push(("hacked",))),
            ("torch._utils._rebuild_parameter", push(())),
        ],
    )
    def test_a_call_is_named_and_not_made(self, read, name, arguments, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        attack = stream({"a": call(name, arguments)}, {})
        with pytest.raises(UserError, match=f"asks for '{name}'"):
            read(attack)
        with pytest.raises(UserError, match=f"asks for '{name}'"):
            read(b"\x80\x02" + call(name, arguments) + b".")
        assert os.listdir() == ["a.pth"]

    @pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
    def test_instructions_of_other_protocols(self, read, protocol):
        class Attack:
            def __reduce__(self):
                return os.system, ("false",)

        with pytest.raises(UserError, match="is not a legacy torch stream"):
            read(HEADER + pickle.dumps({"a": Attack()}, protocol))

    @pytest.mark.parametrize(
        "value",
        [
            call("torch.FloatStorage", push((4,))),  # a storage's name is not a function
            call("collections.OrderedDict", push(([("a", 1)],))),
            call("torch._utils._rebuild_tensor_v2", push((1, 2, 3, 4, 5, 6))),
            b"(" + push("storage") + push("FloatStorage") + push("0") + push("cpu") + b"K\x01NtQ",
            push("__class__") + push({"a": 1}) + b"b",
            push(3),
        ],
    )
    def test_values_that_are_no_tensors(self, read, value):
        with pytest.raises(UserError, match="is not a legacy torch stream"):
            read(stream({"a": value}, {}))

    @pytest.mark.parametrize(
        ("offset", "shape", "strides"),
        [
            (0, (2, 3), (3, 2)),
            (1, (6,), (1,)),
            (6, (), ()),
            (0, (2, 2), (2**62, 2**62)),
            (0, (2**40,), (0,)),
            (0, (7, 1), (0, 0)),
        ],
    )
    def test_a_view_past_its_storage(self, read, offset, shape, strides):
        attack = stream(
            {"weight": tensor("0", "f4", 6, offset, shape, strides)}, {"0": NUMBERS[:6]}
        )
        with pytest.raises(UserError, match="'weight' reaches beyond its storage"):
            read(attack)

    @pytest.mark.parametrize(
        ("offset", "shape", "strides"),
        [
            (-1, (2,), (1,)),
            (0, (-2,), (1,)),
            (0, (2,), (-1,)),
            (0, (0,), (1,)),
            (0, (2, 3), (1,)),
            (0, (1,) * 9, (1,) * 9),
            (0, (True,), (1,)),
            (0, ("2",), (1,)),
        ],
    )
    def test_an_impossible_view(self, read, offset, shape, strides):
        attack = stream({"a": tensor("0", "f4", 6, offset, shape, strides)}, {"0": NUMBERS[:6]})
        with pytest.raises(UserError, match="impossible shape, offset or strides"):
            read(attack)

    def test_storages_that_do_not_fit(self, read):
        one = {"a": tensor("0", "f4", 6, 0, (6,), (1,))}
        for storages in ({}, {"1": NUMBERS[:6]}, {"0": NUMBERS[:6], "1": NUMBERS}):
            with pytest.raises(UserError, match="list of storages disagree"):
                read(stream(one, storages))
        two_types = one | {"b": tensor("0", "i4", 6, 0, (6,), (1,))}
        with pytest.raises(UserError, match="list of storages disagree"):
            read(stream(two_types, {"0": NUMBERS[:6]}))
        with pytest.raises(UserError, match="storage '0' is not as large"):
            read(stream(one, {"0": NUMBERS[:5]}))
        with pytest.raises(UserError, match="bytes follow"):
            read(stream(one, {"0": NUMBERS[:6]}) + b"\0")
        giant = stream({"a": tensor("0", "f4", 2**62, 0, (6,), (1,))}, {"0": NUMBERS[:0]})
        with pytest.raises(UserError, match="ends early"):
            read(giant[:-8] + struct.pack("<q", 2**62))

    def test_other_files(self, read, tmp_path):
        other = HEADER.replace(b"little_endian", b"tiny__endian!")
        for content in (b"", b"PK\x03\x04", pickle.dumps(1001, 2), stream({}, {}, other)):
            with pytest.raises(UserError, match=r"a\.pth is not a legacy torch stream.*again"):
                read(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_torch_stream(tmp_path / "absent.pth")
        with pytest.raises(UserError, match="cannot be read"):
            read_torch_stream(tmp_path)

    def test_truncated_anywhere(self, read):
        for length in range(len(VALID)):
            with pytest.raises(UserError):
                read(VALID[:length])


def cut_and_paste(content, edits):
    """Overwrites, inserts or removes a few bytes."""
    for kind, place, patch in edits:
        at = place % (len(content) + 1)
        kept = {"overwrite": at + len(patch), "insert": at, "remove": at + len(patch)}[kind]
        content = content[:at] + (b"" if kind == "remove" else patch) + content[kept:]
    return content


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "remove"]),
        st.integers(0, len(VALID)),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


# pickletools unescapes what it takes for a string, and warns of escapes that Python has not.
@pytest.mark.filterwarnings("ignore:invalid .*escape sequence:DeprecationWarning")
class TestFuzz:
    @staticmethod
    def read_or_refuse(path, content):
        path.write_bytes(content)
        try:
            tensors = read_torch_stream(path)
        except UserError as error:
            refusal = str(error)
        else:  # a change that does no harm, such as another number in a storage
            refusal = ""
            assert all(array.copy().size > 0 for array in tensors.values())
        assert "\n" not in refusal

    @settings(
        max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(edits=EDITS)
    def test_mutated_streams(self, tmp_path, edits):
        self.read_or_refuse(tmp_path / "a.pth", cut_and_paste(VALID, edits))

    @settings(
        max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(noise=st.binary(max_size=200), as_state=st.booleans())
    def test_random_bytes(self, tmp_path, noise, as_state):
        content = HEADER + b"\x80\x02" + noise if as_state else noise
        self.read_or_refuse(tmp_path / "a.pth", content)
