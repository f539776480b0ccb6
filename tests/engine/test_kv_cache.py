"""The size of the KV cache: as asked, or what the memory allows."""

from pathlib import Path

import pytest
import torch

from puna.engine.kv_cache import CPU_FRACTION, cache_blocks, cache_bytes, check_cache_tokens
from puna.errors import UserError
from puna.llm import LLM
from puna.model.llama import Llama
from puna.model.presets import PRESETS
from puna.model_loader import random_model
from puna.parallel import memory

SIZE = 16
BLOCK_BYTES = 2 * 2 * 2 * 8 * SIZE * 4  # layers, keys and values, KV heads, head size, positions, float32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(PRESETS["tiny-gqa"], torch.float32)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """8 GB available, and no container."""
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable:    8000000 kB\nBuffers: 7 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS", [(tmp_path / "max", tmp_path / "stat", "anon")])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def test_a_cache_as_large_as_asked(model: Llama):
    assert cache_blocks(model, SIZE, 256, 8, 1000, None) == 62
    with pytest.raises(UserError, match="raise kv_cache_tokens"):
        check_cache_tokens(SIZE - 1, SIZE, BLOCK_BYTES // SIZE, 1 << 30)


def test_no_more_than_the_longest_sequences_need(model: Llama, machine: Path):
    assert cache_blocks(model, SIZE, 250, 8, None, None) == 8 * 16


def test_as_much_as_the_memory_allows(model: Llama, machine: Path):
    free = 8_000_000 * 1024 * CPU_FRACTION
    assert cache_bytes(CPU) == free
    assert cache_blocks(model, SIZE, 10**6, 10**6, None, None) == free // BLOCK_BYTES


def test_ranks_share_the_machine(machine: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cache_bytes(CPU) == 8_000_000 * 1024 * CPU_FRACTION / 4


def test_a_container_may_have_less_than_its_machine(machine: Path):
    (machine / "stat").write_text("anon 1000\nfile 5000\n")
    for limit, left in ((b"5000", 4000), (b"500", 0), (b"max\n", 8_000_000 * 1024)):
        (machine / "max").write_bytes(limit)
        assert cache_bytes(CPU) == left * CPU_FRACTION


def test_no_memory_at_all(model: Llama, machine: Path):
    (machine / "stat").write_text("anon 1000\n")
    (machine / "max").write_text("1000")
    with pytest.raises(UserError, match="No memory is left"):
        cache_blocks(model, SIZE, 256, 8, None, None)


def test_weights_that_do_not_fit_are_refused_before_anything_is_allocated(
    model: Llama, machine: Path, monkeypatch: pytest.MonkeyPatch
):
    """Room for one and a half copies: one process has enough, and two that share the machine have too little."""
    needed = sum(weight.numel() for weight in model.parameters()) * 4
    (machine / "max").write_text(str(needed * 3 // 2))
    (machine / "stat").write_text("anon 0\nfile 999999999\n")  # pages of mapped files are no one's
    random_model(PRESETS["tiny-gqa"], torch.float32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    random_model(PRESETS["tiny-gqa"], torch.bfloat16)
    with pytest.raises(UserError, match=rf"take {needed:,} bytes .* has {needed * 3 // 4:,} bytes free"):
        random_model(PRESETS["tiny-gqa"], torch.float32)
    with pytest.raises(UserError, match=f"has {needed - 1:,} bytes free"):
        random_model(PRESETS["tiny-gqa"], torch.float32, available=needed - 1)
    random_model(PRESETS["tiny-gqa"], torch.float32, available=needed)  # measured before the ranks began


def test_a_gpu_has_what_is_free_and_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("mem_get_info", (1000, 9000)), ("memory_reserved", 500), ("memory_allocated", 200)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_bytes("cuda:0") == 1300


def test_the_largest_llama_is_refused_at_once(machine: Path):
    with pytest.raises(UserError, match=r"take 811,706,777,600 bytes \(756.0 GiB\), but cpu has"):
        LLM("llama3.1-405b", load_format="dummy")


def test_without_linux_half_of_the_machine(machine: Path):
    (machine / "meminfo").unlink()
    assert 2**20 < cache_bytes(CPU) < 2**50
