"""What a mesh refuses, in a sentence that names what works."""

from dataclasses import replace

import pytest

from puna.errors import UserError
from puna.model.presets import PRESETS
from puna.parallel.mesh import MeshOptions, check_batch, check_length, check_model, resolve


def test_shards_take_the_ranks_that_the_others_leave():
    assert resolve(MeshOptions(tp=2, pp=2, cp=2), 32).dp_shard == 4
    assert resolve(MeshOptions(dp_replicate=2, dp_shard=3), 6).data_size == 6


@pytest.mark.parametrize(
    ("options", "ranks", "says"),
    [
        ({"tp": 3}, 4, "tp 3 needs a multiple of 3 ranks, not 4"),
        ({"tp": 2, "pp": 2}, 6, "pp 2 x tp 2 needs a multiple of 4 ranks, not 6"),
        ({"tp": 2}, 1, "tp 2 needs a multiple of 2 ranks, not 1"),
        ({"dp_shard": 3}, 4, "dp_shard 3 is 3 ranks, and there are 4; start 3 or set dp_shard to -1"),
        ({"dp_shard": 2, "tp": 2}, 1, "tp 2 x dp_shard 2 is 4 ranks, and there is 1"),
        ({"tp": 0}, 1, "tp must be at least 1, not 0"),
        ({"dp_shard": 0}, 1, "dp_shard must be at least 1, or -1"),
        ({"pp": 2, "pp_schedule": "2f2b"}, 2, "one of 1f1b, gpipe, interleaved, not '2f2b'"),
        ({"cp": 2, "cp_method": "square"}, 2, "one of allgather, ring, not 'square'"),
        ({"pp": 2, "virtual_stages": 2}, 2, "virtual_stages 2 needs pp_schedule interleaved"),
        ({"pp": 2, "pp_schedule": "interleaved"}, 2, "interleaved needs pp and virtual_stages of 2 or more"),
        ({"sequence_parallel": True}, 1, "sequence_parallel needs tp of 2 or more"),
    ],
)
def test_ranks_that_do_not_make_the_mesh(options, ranks, says):
    with pytest.raises(UserError, match=says):
        resolve(MeshOptions(**options), ranks)


@pytest.mark.parametrize(
    ("options", "config", "says"),
    [
        ({"tp": 4}, {}, "9 attention heads and 3 key/value heads cannot be split over 4 ranks; use one of 1, 3, 9"),
        ({"tp": 3}, {"intermediate_size": 1000}, "MLP of 1000 cannot be split over tp 3"),
        ({"tp": 9}, {"vocab_size": 10, "intermediate_size": 90}, "vocabulary of 10 is too small for tp 9"),
        ({"cp": 2}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "set cp to 1"),
        ({"pp": 16, "pp_schedule": "interleaved", "virtual_stages": 2}, {}, "30 layers cannot be cut into 32"),
    ],
)
def test_models_that_cannot_be_cut(options, config, says):
    with pytest.raises(UserError, match=says):
        check_model(replace(PRESETS["smollm2-135m"], **config), MeshOptions(**options))


def test_batches_are_dealt_out():
    assert check_batch(MeshOptions(dp_replicate=2, dp_shard=2), 32, 2, 512) == 4
    assert check_batch(MeshOptions(dp_shard=1, pp=4, pp_schedule="gpipe"), 2, 2, 512) == 1


@pytest.mark.parametrize(
    ("options", "batch", "says"),
    [
        ({"dp_shard": 4}, (10, 2, 64), "10 rows cannot be dealt out to 4 data ranks.*use a multiple of 8, such as 8"),
        ({"dp_shard": 4}, (2, 1, 64), "use a multiple of 4, such as 4"),
        ({"dp_shard": 1, "pp": 4}, (6, 2, 64), "1f1b needs at least as many microbatches as stages, 4, not 3"),
        (
            {"dp_shard": 1, "pp": 2, "pp_schedule": "interleaved", "virtual_stages": 2},
            (6, 2, 64),
            "interleaved needs a multiple of pp 2 microbatches, not 3",
        ),
        ({"dp_shard": 1, "cp": 2}, (1, 1, 66), "66 tokens cannot be cut by this mesh; use a multiple of 4"),
        ({"dp_shard": 1, "cp": 2, "tp": 2, "sequence_parallel": True}, (1, 1, 36), "use a multiple of 8"),
    ],
)
def test_batches_that_the_layout_does_not_divide(options, batch, says):
    with pytest.raises(UserError, match=says):
        check_batch(MeshOptions(**options), *batch)


def test_a_length_that_every_rank_gets_a_part_of():
    check_length(MeshOptions(cp=2, tp=2, sequence_parallel=True), 64)
    check_length(MeshOptions(tp=2), 63)
