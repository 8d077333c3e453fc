"""JSON objects of a folder, and one line for what is none."""

import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.models.json_object import read_object


def test_reads_an_object(tmp_path):
    (tmp_path / "a.json").write_text('{"空": [1]}', encoding="utf-8")
    assert read_object(tmp_path / "a.json") == {"空": [1]}


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "has no a.json"), ("{", "is not JSON"), ("[1]", "not a JSON object"), ("\xff", "JSON")],
)
def test_anything_else_is_one_line(tmp_path, content, said):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=said) as caught:
        read_object(path)
    assert "\n" not in str(caught.value)
