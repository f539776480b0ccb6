"""`puna convert`: any format into any other, verified, in bounded memory, complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna import cli
from puna.errors import UserError
from puna.files import manifest_path, staged
from puna.model.attention import causal
from puna.model_loader import load_model
from puna.weights import verification
from puna.weights.convert import convert, summary
from puna.weights.formats import meta, safetensors_file, torch_pickle
from puna.weights.layerwise import trace
from puna.weights.open import open_checkpoint

RESULTS = {
    "hf": ("hf", "auto", 1),
    "hf-float16": ("hf", "float16", 1),
    "gguf": ("gguf", "auto", 1),
    "gguf-bfloat16": ("gguf", "bfloat16", 1),
    "gguf-q8_0": ("gguf", "q8_0", 1),
    "meta": ("meta", "auto", 1),
    "meta-2": ("meta", "bfloat16", 2),
    "presharded-4": ("presharded", "auto", 4),
    "megatron": ("megatron", "auto", 1),
}


@pytest.mark.parametrize(("to", "dtype", "ranks"), RESULTS.values(), ids=RESULTS)
def test_every_result_is_verified_and_becomes_hf_again(tiny_checkpoint, tmp_path, to, dtype, ranks) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True)
    done = convert(folder, tmp_path / "out", to, dtype, ranks=ranks)
    assert done.manifest["verification"]["tensors"] == 20 and done.manifest["verification"]["logits"]["tokens"] == 32
    assert (done.manifest["verification"]["logits"]["max_difference"] == 0) == (dtype == "auto")
    convert(tmp_path / "out", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    if dtype != "q8_0":
        assert all(torch.equal(before[n].to(t.dtype), t) for n, t in after.items())
    if dtype == "auto":
        assert all(before[n].dtype == t.dtype for n, t in after.items())


def test_the_manifest_says_where_it_came_from(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint(vocab_size=400)
    done = convert(folder, tmp_path / "model.gguf", "gguf", "q8_0")
    manifest = json.loads((tmp_path / "model.gguf.puna.json").read_text())
    assert manifest == done.manifest
    assert (
        manifest["source"]["files"]["model.safetensors"]
        == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    )
    assert manifest["source"]["format"] == "hf" and manifest["source"]["rope_order"] == "rotate-half"
    assert manifest["result"]["rope_order"] == "interleaved" and manifest["result"]["dtype"] == "q8_0"
    assert manifest["vocabulary"] == {"size": 400, "tokens": 384, "padding": 16}
    with open_checkpoint(folder) as source:
        tokenizer = source.tokenizer()
    assert manifest["tokenizer"]["chat_template_sha256"] == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert "tokenizer and every tensor, rounded to q8_0, equal" in summary(done)
    assert str(tmp_path) not in json.dumps(manifest) and manifest["source"]["name"] == folder.name
    convert(folder, tmp_path / "cut", "ranks", ranks=2, verify=False)
    files = convert(tmp_path / "cut/part_model", tmp_path / "merged", verify=False).manifest["source"]["files"]
    assert "1/model.safetensors" in files and "../tokenizer/tokenizer.json" in files


def test_streamed_logits_are_the_models(tiny_checkpoint) -> None:
    ids = torch.randint(384, (2, 9))
    for config in ({}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}):
        with open_checkpoint(tiny_checkpoint(**config)) as source, torch.inference_mode():
            model = load_model(source, torch.float64)
            hidden = model(ids, torch.arange(9).expand(2, 9), causal)
            traced = dict(trace(source, ids, torch.float64))
            assert list(traced) == [
                "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"
            ]  # fmt: skip
            assert torch.allclose(traced["model.norm"], hidden, atol=1e-12)
            assert torch.allclose(traced["lm_head"], model.logits(hidden), atol=1e-12)


def test_a_wrong_result_is_caught_and_nothing_is_left(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    folder = tiny_checkpoint()
    write = safetensors_file.write_file

    def flip(path: Path, tensors, read) -> None:
        write(path, tensors, read)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(safetensors_file, "write_file", flip)
    with pytest.raises(verification.VerificationError, match="lm_head.weight differs from the source in rows 0 to 383"):
        convert(folder, tmp_path / "x")
    monkeypatch.undo()
    monkeypatch.setattr(meta, "permute", lambda rows, head_dim: rows)  # B4: the row order forgotten
    with pytest.raises(verification.VerificationError, match="layers.0.self_attn.q_proj.weight differs"):
        convert(folder, tmp_path / "x", "meta")
    monkeypatch.undo()
    monkeypatch.setattr(meta, "params_from", lambda config: meta_params_with_another_theta(config))
    with pytest.raises(UserError, match="disagree on rope_theta"):
        convert(folder, tmp_path / "x", "meta")
    assert not list(tmp_path.iterdir())


def meta_params_with_another_theta(config):
    from puna.weights.formats.meta_params import params_from

    return params_from(config) | {"rope_theta": 1e6}


def test_logits_catch_what_tensors_do_not_show(tiny_checkpoint) -> None:
    import dataclasses

    with open_checkpoint(tiny_checkpoint()) as source, open_checkpoint(tiny_checkpoint()) as other:
        assert verification.verify(source, source, other)["logits"]["max_difference"] == 0
        other.config = dataclasses.replace(other.config, rope_theta=20000.0)
        with pytest.raises(verification.VerificationError, match="rope_theta is 20000.0, the source's 10000.0"):
            verification.verify(source, source, other)
        with pytest.raises(verification.VerificationError, match="logits are up to"):
            verification._same_logits(source, source, other)


def test_damaged_weights_are_said_so(tiny_checkpoint, tmp_path) -> None:
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match="logits that aren't finite"):
        convert(folder, tmp_path / "x")
    convert(folder, tmp_path / "x", verify=False)
    assert torch.isnan(load_file(tmp_path / "x/model.safetensors")["model.layers.1.mlp.up_proj.weight"]).sum() == 1


def test_values_beyond_float16_are_refused(tiny_checkpoint, tmp_path) -> None:
    folder = shutil.copytree(tiny_checkpoint(torch_dtype="bfloat16"), tmp_path / "large")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.gate_proj.weight"][0, 0] = -70000.0
    save_file(state, folder / "model.safetensors")
    for to in ("hf", "meta", "gguf"):
        with pytest.raises(UserError, match="gate_proj.weight has values beyond float16"):
            convert(folder, tmp_path / "x", to, "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_options_that_contradict_are_refused(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    for options, said in (
        ({"to": "gguff"}, "did you mean 'gguf'"),
        ({"dtype": "float8"}, "no data type 'float8'"),
        ({"dtype": "q8_0"}, "q8_0 is a data type of gguf, not of hf"),
        ({"ranks": 2}, "--ranks is an option of presharded and meta, not of"),
        ({"max_shard_gb": 0}, "max-shard-gb"),
    ):
        with pytest.raises(UserError, match=said):
            convert(folder, tmp_path / "x", **options)
    with pytest.raises(UserError, match="holds the checkpoint that is to be converted"):
        convert(folder, folder.parent, overwrite=True)
    with pytest.raises(UserError, match="holds the checkpoint that is to be converted"):
        convert(folder, folder, overwrite=True)
    with pytest.raises(UserError, match="The tokenizer has ids up to 383"):
        convert(tiny_checkpoint(vocab_size=380), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_only_what_puna_wrote_is_replaced(tiny_checkpoint, tmp_path) -> None:
    folder, other = tiny_checkpoint(), tiny_checkpoint(seed=1)
    for to in ("hf", "gguf"):
        dst = tmp_path / to
        convert(folder, dst, to, verify=False)
        with pytest.raises(UserError, match="exists already"):
            convert(other, dst, to, verify=False)
        convert(other, dst, to, verify=False, overwrite=True)
        with open_checkpoint(other) as want, open_checkpoint(dst) as have:
            assert torch.equal(want.read("model.norm.weight"), have.read("model.norm.weight"))
    (tmp_path / "mine").mkdir()
    convert(folder, tmp_path / "mine", verify=False)  # an empty directory is as good as none
    (tmp_path / "mine/puna.json").unlink()
    with pytest.raises(UserError, match="remove it yourself"):
        convert(folder, tmp_path / "mine", verify=False, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "gguf", "gguf.puna.json", "mine"}


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt("x"), ValueError("x")]


@pytest.mark.parametrize("error", FAILURES)
def test_a_failed_conversion_leaves_what_was_there(tiny_checkpoint, tmp_path, monkeypatch, error) -> None:
    folder = tiny_checkpoint()
    convert(folder, tmp_path / "out", verify=False)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    write = safetensors_file.write_file

    def fail(path: Path, tensors, read) -> None:
        write(path, tensors, read)
        raise error

    monkeypatch.setattr(safetensors_file, "write_file", fail)
    kind = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind, match="disk .* is full, nothing was written" if kind is UserError else "x"):
        convert(tiny_checkpoint(seed=1), tmp_path / "out", overwrite=True, max_shard_gb=6e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the always-full device of Linux")
def test_a_full_disk_is_recognised_through_torch_save() -> None:
    with pytest.raises(OSError, match="No space left"):
        torch_pickle.save_file({"a": torch.zeros(1_000_000)}, Path("/dev/full"))


def test_a_disk_that_is_too_small_is_said_before(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free space"):
        convert(tiny_checkpoint(), tmp_path / "deep/x")
    assert not list(tmp_path.iterdir())


def test_parents_made_for_a_result_go_with_it_when_it_fails(tmp_path) -> None:
    (tmp_path / "there").mkdir()
    for dst in ("deep/deeper/file", "there/deeper/file", "there/file"):
        with pytest.raises(UserError, match="no"), staged(tmp_path / dst) as path:
            path.write_text("half")
            raise UserError("no")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with pytest.raises(UserError, match="no"), staged(tmp_path / "deep/file") as path:
        (tmp_path / "deep/other").write_text("of someone else")
        raise UserError("no")
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep/other"]
    with staged(tmp_path / "deep/deeper/file") as path:
        path.write_text("whole")
    assert (tmp_path / "deep/deeper/file").read_text() == "whole"


def test_publishing_puts_back_what_it_moved_when_it_fails(tmp_path, monkeypatch) -> None:
    dst = tmp_path / "file"
    dst.write_text("old")
    manifest_path(dst).write_text("old manifest")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.parent.suffix == ".part" and path.name == "file":
            raise OSError(errno.EIO, "bad disk")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="bad disk"), staged(dst, overwrite=True) as path:
        path.write_text("new")
        manifest_path(path).write_text("new manifest")
    assert dst.read_text() == "old" and manifest_path(dst).read_text() == "old manifest"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_command_line(tiny_checkpoint, tmp_path, capsys) -> None:
    folder, out = str(tiny_checkpoint()), str(tmp_path / "out")
    assert cli.main(["convert", folder, out, "--to", "hf", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == out
    assert "rounded to bfloat16, equal the source's bit for bit" in said.err
    assert cli.main(["convert", folder, out, "--to", "hf"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["convert", folder, out, "--to", "meta", "--overwrite", "--no-verify", "--ranks", "2"]) == 0
    assert "not verified" in capsys.readouterr().err


# Conversions in a process of their own: memory, and death at any moment

BIG = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4,
       "head_dim": 128, "num_hidden_layers": 3, "torch_dtype": "bfloat16"}  # fmt: skip
LARGEST = 4096 * 1024  # elements of its largest tensors; all tensors together have 11 times as many

MEMORY = """
import sys, threading, time
from puna.weights.convert import convert

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

tiny, big, out, *steps = sys.argv[1:]
convert(tiny, out + "-tiny", "gguf", "q8_0")  # everything is imported and warm
base = peak = anonymous()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)

thread = threading.Thread(target=watch)
thread.start()
for step in steps:
    to, dtype, ranks = step.split(":")
    base, peak = (anonymous(),) * 2
    convert(big, f"{out}-{to}", to, dtype, **{"tp" if to == "megatron" else "ranks": int(ranks)})
    print(to, peak - base)
    big = f"{out}-{to}"
done = True
thread.join()
"""


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    source = str(Path(__file__).parents[2] / "src")
    env = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_is_bounded_by_the_largest_tensor(tiny_checkpoint, tmp_path) -> None:
    big = tiny_checkpoint(**BIG)
    total = (big / "model.safetensors").stat().st_size
    steps = ["ranks:float32:2", "hf:auto:1", "gguf:bfloat16:1", "meta:float32:4", "megatron:float32:4"]
    said = run(MEMORY, tiny_checkpoint(), big, tmp_path / "out", *steps).stdout.split()
    peaks = dict(zip(said[::2], map(int, said[1::2]), strict=True))
    whole = 2 * total  # in float32
    assert whole > 11 * LARGEST * 4
    one_file = sum(file.stat().st_size for file in tmp_path.glob("out-meta/*.pth")) / 4
    constant = 24 << 20
    for to in ("ranks", "hf", "gguf"):
        assert peaks[to] < LARGEST * 4 + constant < whole / 4, peaks
    assert max(peaks["meta"], peaks["megatron"]) < one_file + LARGEST * 4 + constant, peaks


KILLS = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from puna.weights.convert import convert

source, out, to, rounds = *sys.argv[1:4], int(sys.argv[4])
start = time.perf_counter()
convert(source, out + "-whole", to)
length = time.perf_counter() - start
for number in range(rounds):
    child = os.fork()
    if not child:
        try:
            convert(source, f"{out}-{number}", to)
        finally:
            os._exit(0)
    time.sleep(random.random() * length)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_killed_conversion_leaves_nothing_that_looks_whole(tiny_checkpoint, tmp_path, to) -> None:
    run(KILLS, tiny_checkpoint(**BIG | {"num_hidden_layers": 1}), tmp_path / "out", to, 8)
    killed = 0
    for number in range(8):
        path = tmp_path / f"out-{number}"
        if path.exists():  # the kill came after it was in place
            open_checkpoint(path).close()
            json.loads(manifest_path(path).read_text())
        else:
            killed += 1
    assert killed


def test_a_pickle_of_another_protocol_raises_no_warning(tmp_path, recwarn):
    torch.save({"a": torch.arange(3)}, tmp_path / "x.bin", pickle_protocol=4)
    with pytest.raises(UserError, match=r"x\.bin"):
        torch_pickle.load_file(tmp_path / "x.bin")
    assert not recwarn.list
