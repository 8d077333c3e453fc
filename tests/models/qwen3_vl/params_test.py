"""Tests of mmmem_jax/models/qwen3_vl/params.py on eight CPU devices."""

import collections
import json
import math
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL
from mmmem_jax.models.qwen3_vl.params import (
    INDEX,
    SINGLE,
    load_model,
    load_params,
    locate,
    resolve,
    save_params,
)
from mmmem_jax.models.qwen3_vl.rules import RULES
from mmmem_jax.testing.qwen3_vl import TINY, random_params, write_checkpoint
from mmmem_jax.train.sharding import by_rules, make_mesh

QUERY = "model.language_model.layers.2.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen3_vl"), num_shards=2)


@pytest.fixture
def folder(written, tmp_path):
    """A copy to break."""
    return shutil.copytree(written, tmp_path / "model")


@pytest.fixture(scope="module")
def abstract():
    return nnx.state(nnx.eval_shape(lambda: Qwen3VL(TINY, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def wanted():
    """What was written."""
    return random_params(TINY, 0)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def shard_of(folder, tensor: str):
    """The file that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def change(path, change) -> None:
    """Changes the tensors of a file in place."""
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def place(folder, **files) -> None:
    """Changes where the index says that tensors lie; None: nowhere."""
    index = json.loads((folder / INDEX).read_text())
    placed = index["weight_map"] | files
    index["weight_map"] = {name: file for name, file in placed.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, abstract) -> str:
    with pytest.raises(UserError) as caught:
        load_params(folder, abstract)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRoundTrip:
    def test_what_is_written_comes_back(self, written, abstract, wanted):
        assert len(list(written.glob("*.safetensors"))) > 1
        assert_same(load_params(written, abstract), wanted)

    @pytest.mark.parametrize(("size", "num_files"), [(1e9, 1), (1, 122)])
    def test_in_any_number_of_files(self, size, num_files, tmp_path, abstract, wanted):
        save_params(tmp_path, wanted, TINY, max_shard_bytes=size)
        assert len(list(tmp_path.glob("*.safetensors"))) == num_files
        assert (tmp_path / INDEX).exists() == (num_files > 1)
        assert_same(load_params(tmp_path, abstract), wanted)

    def test_files_are_no_larger_than_asked(self, tmp_path, wanted):
        save_params(tmp_path, wanted, TINY, max_shard_bytes=2e5)
        sizes = [
            sum(x.nbytes for x in safetensors.numpy.load_file(path).values())
            for path in tmp_path.glob("*.safetensors")
        ]
        assert max(sizes) <= 2e5
        total = json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]
        assert sum(sizes) == total == sum(x.nbytes for x in jax.tree.leaves(wanted))

    def test_matrices_lie_transposed_and_layer_by_layer(self, written, wanted):
        found = safetensors.numpy.load_file(shard_of(written, QUERY))[QUERY]
        np.testing.assert_array_equal(found, wanted["layers"]["q_proj"]["kernel"][2].T)

    def test_patches_are_a_convolution_over_channels_time_and_pixels(self, written, wanted):
        name = "model.visual.patch_embed.proj.weight"
        found = safetensors.numpy.load_file(shard_of(written, name))[name]
        assert found.shape == (32, 3, 2, 16, 16)
        kernel = wanted["vision"]["patch_embed"]["kernel"][...]
        np.testing.assert_array_equal(
            found[5, 2, 1, 7], kernel[(2 * 2 + 1) * 256 + 7 * 16 :, 5][:16]
        )

    def test_the_dtype_is_that_of_the_model(self, written, wanted):
        model = load_model(written, dtype=jnp.bfloat16)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted)
        assert_same(nnx.state(model), rounded)
        assert model.dtype == jnp.bfloat16

    def test_bfloat16_files_widen_without_loss(self, tmp_path, abstract, wanted):
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted)
        save_params(tmp_path, rounded, TINY)
        found = load_params(tmp_path, abstract)
        assert_same(found, jax.tree.map(lambda x: x.astype(np.float32), rounded))


class TestMesh:
    @pytest.fixture(params=[(2, 2, 2), (4, 1, 2), (8, 1, 1)], ids=str)
    def mesh(self, request):
        return make_mesh(*request.param)

    def test_parameters_lie_where_the_rules_have_them(self, mesh, written, abstract, wanted):
        shardings = by_rules(mesh, abstract, RULES)
        found = load_params(written, abstract, shardings=shardings)
        assert jax.tree.map(lambda x: x.sharding, found) == shardings
        assert_same(found, wanted)

    def test_what_lies_on_a_mesh_is_written(self, written, abstract, wanted, tmp_path):
        found = load_params(
            written, abstract, shardings=by_rules(make_mesh(2, 2, 2), abstract, RULES)
        )
        save_params(tmp_path, found, TINY)
        assert_same(load_params(tmp_path, abstract), wanted)

    def test_no_number_is_read_twice_nor_a_tensor_whole(self, written, monkeypatch):
        """Of what is split eight ways, a host of one device would read an eighth."""
        read = collections.defaultdict(list)
        opened = safetensors.safe_open

        class Slice:
            def __init__(self, name, found):
                self.name, self.found = name, found

            def get_shape(self):
                return self.found.get_shape()

            def __getitem__(self, index):
                values = self.found[index]
                read[self.name].append(values.size)
                return values

        class Counting:
            def __init__(self, *args, **kwargs):
                self.file = opened(*args, **kwargs)

            def __enter__(self):
                self.file.__enter__()
                return self

            def __exit__(self, *error):
                return self.file.__exit__(*error)

            def keys(self):
                return self.file.keys()

            def get_slice(self, name):
                return Slice(name, self.file.get_slice(name))

        monkeypatch.setattr(safetensors, "safe_open", Counting)
        load_model(written, mesh=make_mesh(2, 2, 2))
        for name, sizes in read.items():
            with safetensors.safe_open(shard_of(written, name), framework="numpy") as file:
                whole = math.prod(file.get_slice(name).get_shape())
            if ".patch_embed.proj.weight" not in name:  # whose columns are cut from whole rows
                assert sum(sizes) == whole
            if name.endswith("proj.weight") and "visual" not in name:
                assert max(sizes) == whole // 4


@pytest.mark.parametrize("name", ["layers.x_proj.kernel", "layers.q_proj.kernel_lora_a"])
def test_locates_only_parameters(name):
    with pytest.raises(ValueError, match=f"{name} is no parameter"):
        locate(name, (4, 64, 64), TINY)


class TestTensors:
    def test_a_missing_one_names_itself(self, folder, abstract):
        change(shard_of(folder, QUERY), lambda tensors: tensors.pop(QUERY))
        place(folder, **{QUERY: None})
        found = refused(folder, abstract)
        assert f"{folder} has no tensor {QUERY} of shape (64, 64)" in found

    def test_an_extra_one_names_itself(self, folder, abstract):
        path = shard_of(folder, QUERY)
        change(path, lambda tensors: tensors.update(extra=np.zeros(3)))
        place(folder, extra=path.name)
        assert f"{path} has extra," in refused(folder, abstract)

    def test_a_misshapen_one_names_itself(self, folder, abstract):
        path = shard_of(folder, QUERY)
        change(path, lambda tensors: tensors.update({QUERY: np.zeros((64, 63), np.float32)}))
        found = refused(folder, abstract)
        assert f"{path} has {QUERY} of shape (64, 63)" in found
        assert "makes it (64, 64)" in found

    def test_one_of_another_layer_count_names_itself(self, folder, abstract):
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 3
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            UserError, match=r"has model\.language_model\.layers\.3\..*does not have"
        ):
            load_model(folder)

    def test_the_index_must_be_that_of_the_files(self, folder, abstract):
        path = shard_of(folder, QUERY)
        place(folder, nothing=path.name)
        assert f"{path} does not hold nothing" in refused(folder, abstract)
        place(folder, nothing=None, **{QUERY: None})
        assert f"{path} holds {QUERY}" in refused(folder, abstract)


class TestFiles:
    @pytest.mark.parametrize("left", [0, 5, 100, -1])
    def test_a_truncated_shard_names_itself(self, folder, abstract, left):
        path = shard_of(folder, QUERY)
        path.write_bytes(path.read_bytes()[:left])
        assert f"{path} is not a whole safetensors file" in refused(folder, abstract)

    def test_a_shard_that_is_not_there_names_itself(self, folder, abstract):
        path = shard_of(folder, QUERY)
        path.unlink()
        assert f"{path} is missing" in refused(folder, abstract)

    @pytest.mark.parametrize(
        "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.pt", "", 3, None, []]
    )
    def test_an_index_stays_in_its_folder(self, folder, abstract, name):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][QUERY] = name
        (folder / INDEX).write_text(json.dumps(index))
        assert f"{INDEX} places {QUERY} in {name!r}" in refused(folder, abstract)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b"\xff"])
    def test_an_index_that_is_none_names_itself(self, folder, abstract, content):
        (folder / INDEX).write_bytes(content)
        assert f"{INDEX} is no index" in refused(folder, abstract)

    def test_a_folder_without_weights_is_refused(self, folder, abstract):
        (folder / INDEX).unlink()
        found = refused(folder, abstract)
        assert SINGLE in found
        assert INDEX in found


class TestResolve:
    def test_a_folder_is_itself(self, tmp_path):
        assert resolve(tmp_path) == tmp_path

    def test_a_name_is_downloaded_without_code(self, tmp_path, monkeypatch):
        asked = {}

        def download(name, **arguments):
            asked.update(arguments, name=name)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert resolve("Qwen/Qwen3-VL-8B-Instruct", revision="abc") == tmp_path
        assert (asked["name"], asked["revision"]) == ("Qwen/Qwen3-VL-8B-Instruct", "abc")
        assert asked["allow_patterns"] == ["*.json", "*.safetensors", "*.jinja", "*.txt"]

    def test_without_a_network_it_is_one_line(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="owner/none is no folder here and cannot be") as caught:
            resolve("owner/none")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "name", ["", "none", "/no/such/folder", "a/b/c", "../up", "a/..", "a b/c"]
    )
    def test_what_is_neither_is_refused(self, name, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
        with pytest.raises(UserError, match="neither a folder nor"):
            resolve(name)
