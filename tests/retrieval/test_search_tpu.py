"""Search as XLA compiles it for TPUs that are not here: it fits, and nothing travels meanwhile."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from colbert_jax.ahead import topology_devices
from colbert_jax.collectives import KINDS
from colbert_jax.retrieval.search import _make_merge, _make_update
from colbert_jax.sharding import make_mesh

QUERIES, K, BLOCK, LENGTH = 256, 100, 64, 187


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=topology_devices("v5e:2x4"))


def _shape(mesh, shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def _best(mesh):
    shape, batch = (mesh.size, QUERIES, K), ("data", "fsdp")
    return _shape(mesh, shape, jnp.float32, batch), _shape(mesh, shape, jnp.int32, batch)


def _sent(program):
    return {kind for kind in KINDS if f" {kind}" in program.as_text()}


def test_chips_score_their_shares_of_a_block_without_talking(mesh):
    batch, documents = ("data", "fsdp"), mesh.size * BLOCK
    program = (
        _make_update(mesh, K)
        .lower(
            *_best(mesh),
            _shape(mesh, (QUERIES, 39, 128), jnp.float32),
            _shape(mesh, (QUERIES, 39), jnp.bool_),
            _shape(mesh, (documents, LENGTH, 128), jnp.int8, batch),
            _shape(mesh, (documents, LENGTH), jnp.bool_, batch),
            _shape(mesh, (documents, LENGTH), jnp.float32, batch),
            _shape(mesh, (documents,), jnp.int32, batch),
        )
        .compile()
    )
    assert _sent(program) == set()
    assert program.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_chips_meet_once_at_the_end(mesh):
    assert _sent(_make_merge(mesh, K).lower(*_best(mesh)).compile())  # so that the above can fail
