"""What a mesh refuses, in a sentence that names what works."""

from dataclasses import replace

import pytest

from puna.errors import UserError
from puna.model.presets import PRESETS
from puna.parallel import process_group
from puna.parallel.mesh import MeshOptions, check_batch, check_length, check_model, resolve
from puna.parallel.strategy import ParallelStrategy


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


@pytest.mark.parametrize(
    ("device", "gpus", "ranks", "says"),
    [
        ("cuda", 0, 1, "The device is cuda, but torch sees no GPU here; use --device cpu."),
        ("cuda:3", 2, 1, "The device is cuda:3, but torch sees 2 GPU.s.; use one below cuda:2."),
        ("tpu", 0, 1, "There is no device 'tpu'; use auto, cpu or cuda."),
        ("cdua", 0, 1, "There is no device 'cdua' .did you mean 'cuda'"),
        ("mps", 0, 1, "puna runs on cpu and cuda, not on 'mps'."),
        ("cuda:0", 2, 2, "each rank takes a GPU of its own; use --device cuda, not cuda:0."),
        ("auto", 1, 2, "torchrun started more ranks than this machine has GPUs .1.; lower --nproc-per-node"),
    ],
)
def test_a_device_that_the_ranks_cannot_take(monkeypatch, device, gpus, ranks, says):
    """Training and inference choose by one function; what it refuses is known before any rank joins."""
    monkeypatch.setattr(process_group.torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(process_group.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(process_group.torch.cuda, "current_device", lambda: 0)
    for name, value in {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=says):
        ParallelStrategy.start(MeshOptions(), device)
